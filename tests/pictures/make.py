#!/usr/bin/env python3
"""Makes the pictures in this folder: real mails of the programs, as a phone shows them. Needs Chromium.

python3 tests/pictures/make.py
"""

from __future__ import annotations

import email
import email.policy
import os
import sys
import tempfile
import time
from dataclasses import replace
from email.message import EmailMessage
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
os.environ["TZ"] = "Europe/Berlin"
time.tzset()

import mails  # noqa: E402  it is found only now, and its times are those of the zone
from browser import Browser, page_with_pictures  # noqa: E402
from test_device import Bench  # noqa: E402

import embedded_smtpd as emb  # noqa: E402
import server  # noqa: E402
import smtp_module as smtp  # noqa: E402

WIDTH, HEIGHT, SCALE = 360, 720, 1.5  # of the phone, in its pixels; how many of the picture make one of them
BYTES_MAX = 150_000

# What a camera over a front door might see at night; {x} is how far somebody has come, {clock} what it writes into it.
SCENE = """<body style="margin:0"><svg viewBox="0 0 640 360" width="640" height="360" font-family="monospace">
<rect width="640" height="360" fill="#16222f"/>
<path d="M0 210 L640 180 V360 H0Z" fill="#26302c"/><path d="M250 360 L330 192 L400 189 L560 360Z" fill="#4a4f52"/>
<rect x="40" y="60" width="210" height="170" fill="#5c4a40"/><path d="M25 66 L145 8 L265 66Z" fill="#33272a"/>
<rect x="70" y="95" width="48" height="44" fill="#f2d48a"/><path d="M94 95 V139 M70 117 H118" stroke="#4a3a30"/>
<rect x="170" y="120" width="52" height="110" fill="#2f3f36"/><circle cx="213" cy="178" r="3" fill="#d8b24a"/>
<path d="M474 48 L380 300 H568Z" fill="#ffe9b0" opacity=".16"/>
<rect x="470" y="40" width="6" height="160" fill="#20262b"/><circle cx="473" cy="40" r="9" fill="#fff3cf"/>
<g transform="translate({x} 150)" fill="#14191d"><circle cx="24" cy="14" r="13"/>
<path d="M8 32 Q24 22 40 32 L44 92 H4Z"/><path d="M10 90 L6 150 H18 L24 100 L30 150 H42 L38 90Z"/></g>
<rect width="640" height="26" fill="#000" opacity=".45"/>
<text x="10" y="18" fill="#fff" font-size="15">CAMERA 1</text>
<text x="630" y="18" fill="#fff" font-size="15" text-anchor="end">{clock}</text></svg></body>"""


def scene(window: Browser, x: int, when: float) -> bytes:
    """A JPEG of the camera."""
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
    window.show(SCENE.replace("{x}", str(x)).replace("{clock}", clock), 640, height=360)
    return window.picture(kind="jpeg")


def save(window: Browser, name: str, data: bytes, *, dark: bool = False) -> None:
    """Take the picture of a mail."""
    message = email.message_from_bytes(data, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    window.show(page_with_pictures(message), WIDTH, height=HEIGHT, dark=dark, scale=SCALE)
    picture = window.picture(HEIGHT)
    if len(picture) > BYTES_MAX:
        raise SystemExit(f"{name} has {len(picture)} bytes, more than {BYTES_MAX}")
    (HERE / name).write_bytes(picture)
    print(f"{name}: {len(picture)} bytes, {message['Subject']}")


def status() -> bytes:
    """The device's answer to CMD STATUS."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), emb.Policy(emb.networks(emb.PRIVATE)), sender="gate@example.org")
        for command in ("SET name=Gate", "ARM", "RELAY 1 ON", "SET threshold=95", "STATUS"):
            bench.send(f"CMD {command}")
        data = bench.replies()[-1].as_bytes(policy=email.policy.SMTP)
        bench.outbox.close()
        return data


def main() -> None:
    smtp.hostname = lambda: "nas"  # whose name stands below the alerts
    config = server.RelayConfig(sender="Home <home@example.org>")
    to = ("owner@example.com",)
    with Browser() as window:
        steps = [scene(window, 360 - 25 * n, mails.NOW + 47 * n) for n in range(4)]

        def alert(seq: int, event: str, camera: str, picture: bytes | None = None) -> smtp.Item:
            meta = {"zone": 4, "score": 0.87} if event == "MOTION_DETECTED" else {}
            when = mails.NOW + 47 * seq
            return mails.item(
                seq, picture, when, event=event, camera=camera, meta=meta, image_filename="door.jpg",
                timestamp=smtp.iso(when),
            )  # fmt: skip

        def sent(items: list[smtp.Item], lang: str = "en") -> bytes:
            return b"".join(mails.envelope(items, replace(config, lang=lang), recipients=to).data)

        save(window, "alert.png", sent([alert(1, "DOOR_OPENED", "front door", steps[1])]))
        save(window, "alert-fa-dark.png", sent([alert(2, "MOTION_DETECTED", "حیاط پشتی", steps[2])], "fa"), dark=True)
        cameras = ("front door", "garage", "back yard")
        events = ("MOTION_DETECTED", "DOOR_OPENED", "MOTION_DETECTED", "MOTION_DETECTED", "CAMERA_DISCONNECTED")
        many = [alert(n, events[n % 5], cameras[n % 3], steps[n] if n < len(steps) else None) for n in range(14)]
        save(window, "digest.png", sent(many))
        save(window, "status.png", status())


if __name__ == "__main__":
    main()
