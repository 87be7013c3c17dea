"""Every kind of mail that the programs send, in three languages, as bytes: for tests that look at them from outside."""

from __future__ import annotations

import base64
import email.policy
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from test_device import OPS, SECRET, Bench

import embedded_smtpd as emb
import server
import smtp_module as smtp

NOW = 1_777_673_700.0  # 2026-05-01T22:15:00Z
WIDE, PERSIAN, CHINESE = "WAREHOUSE_NORTH_ENTRANCE", "دوربین حیاط پشتی ۲", "前门摄像头 👁"
LONG_PATH = "/mnt/nas/recordings/" + "0123456789abcdef" * 8
FAILED = {"reports": (7, 8, 9), "why": f"owner@example.com: 550 5.1.1 <{WIDE.lower()}@example.com> no such user"}
LANGS = server.LANGS


def item(seq: int = 1, picture: bytes | None = None, arrived: float = NOW, **fields: Any) -> smtp.Entry:
    """What the spool would hand over for a line with these fields."""
    line: dict[str, Any] = {"event": "MOTION_DETECTED", "camera": "garage", "id": f"id{seq}"} | fields
    if picture is not None:
        line["image_b64"] = base64.b64encode(picture).decode()
    parsed = server.parse_line(json.dumps(line).encode(), b"", arrived)
    assert isinstance(parsed, server.Event)
    new = parsed.entry
    return smtp.Entry(seq, new.id, new.kind, new.source, new.arrived, new.payload, lambda: new.picture, picture is not None)


def own(event: str, **content: Any) -> smtp.Entry:
    """An alert of the relay's own."""
    payload = json.dumps({"event": event, "camera": "garage", **content}).encode()
    return smtp.Entry(1, "relay-1", event, "garage", NOW, payload)


def summary(arrived: float = NOW, **meta: Any) -> smtp.Entry:
    """The relay's daily mail."""
    counts = {"received": 7, "groups": [["MOTION_DETECTED", "garage", 5], ["X.y", "باغ", 2]], "silent": [], "why": ""}
    counts |= {"queued": 2, "sent": 9, "failed": 0} | meta
    payload = json.dumps({"event": server.SUMMARY, "camera": "relay", "meta": counts}).encode()
    return smtp.Entry(1, "summary-1", server.SUMMARY, "relay", arrived, payload)


def envelope(
    items: Sequence[smtp.Entry], config: server.RelayConfig, **fields: Any
) -> smtp.Message:
    """What the relay would send for these entries; `fields` are those of the delivery."""
    to = fields.pop("recipients", ("a@x.org", "b@y.org"))
    delivery = smtp.Delivery(1, "alert", tuple(one.seq for one in items), to[0], to, **fields)
    return server.AlertMailer(config).render(delivery, items)


def day(picture: bytes) -> list[smtp.Entry]:
    """Sixty alerts of three cameras, with and without a picture, a wrong clock and long values."""
    events, items = ("MOTION_DETECTED", "DOOR_OPENED", "CAMERA_DISCONNECTED"), []
    for n in range(60):
        told = "1970-01-01T00:02:11Z" if n % 13 == 0 else smtp.iso(NOW + 7 * n)
        more: dict[str, Any] = {"meta": {"zone": n, "path": LONG_PATH}} if n % 5 == 0 else {}
        items.append(
            item(n, picture if n % 7 == 0 else None, NOW + 7 * n, camera=(WIDE, PERSIAN, CHINESE)[n % 3],
                 event=events[n % 9 % 3], timestamp=told, image_filename=f"p{n}.png", **more)
        )  # fmt: skip
    return items


def of_the_relay(lang: str, picture: bytes) -> dict[str, bytes]:
    """The relay's mails by a name for each kind."""
    full = {"zone": 4, "score": 0.87, "W" * 24: "W" * 100, "sha256": "0123456789abcdef" * 4, "path": LONG_PATH}
    link = "https://nas.lan/clips/" + "front-door_2026-05-01_" * 8
    kinds: dict[str, tuple[list[smtp.Entry], dict[str, Any]]] = {
        "alert": ([item(camera="CAM1")], {}),
        "alert with a picture": ([item(2, picture, camera="FRONT DOOR", event="DOOR_OPENED")], {}),
        "alert with everything": (
            [item(3, picture, camera=WIDE, meta=full, image_url=link, timestamp="1970-01-01T00:02:11Z")], FAILED,
        ),
        "alert of a Persian camera": ([item(4, picture, camera=PERSIAN, image_filename="باغ.png")], {}),
        "alert of a Chinese camera": ([item(5, picture, camera=CHINESE, event="TAMPER_DETECTED")], {}),
        "alert without its picture": ([item(6, picture)], {"max_bytes": 0, "error": "dot: 552 5.3.4 too big"}),
        "silent camera": ([own("CAMERA_DISCONNECTED", last_seen="2026-05-01T21:00:00Z")], {}),
        "camera that is back": ([own("CAMERA_RECONNECTED", gone_s=4000)], {}),
        "digest": (day(picture), {}),
        "digest of two": ([item(7, camera="CAM1"), item(8, picture, camera="CAM1")], {}),
        "summary": ([summary()], {}),
        "summary of a bad day": ([summary(silent=["attic", WIDE, PERSIAN], failed=3, why=FAILED["why"])], {}),
    }  # fmt: skip
    config = replace(server.RelayConfig(sender="خانه Home <home@example.org>"), lang=lang)
    return {
        name: b"".join(envelope(items, config, recipients=("owner@example.com",), **mail).data)
        for name, (items, mail) in kinds.items()
    }


def of_the_device() -> dict[str, bytes]:
    """The device's mails by a name for each kind."""
    mails = {}
    with tempfile.TemporaryDirectory() as folder:
        policy = emb.Policy(emb.networks(emb.PRIVATE), operators=(OPS,), secret=SECRET)
        bench = Bench(Path(folder), policy, sender="device@example.org", report_to=(OPS,))
        bench.now = time.time()  # the Date of the mails

        def ask(name: str, command: str, data: bytes | None = None) -> None:
            token = policy.sign(command, OPS, int(bench.now) + 60, len(mails).to_bytes(6, "big"), data)
            assert bench.send(f"CMD {command} ~{token}", data=data).startswith("250"), command
            (reply,) = bench.replies()
            mails[f"device: {name}"] = reply.as_bytes(policy=email.policy.SMTP)
            bench.now += 1

        ask("name", f"SET name={PERSIAN}")
        ask("wide name", f"SET name={WIDE * 2}")
        ask("update", "UPDATE firmware-1.2.3_of_the_third_camera", b"hello")
        ask("read", "READ firmware-1.2.3_of_the_third_camera")
        for name, command in (("status", "STATUS"), ("get", "GET voltage"), ("snapshot", "SNAPSHOT cam1")):
            ask(name, command)
        for name, command in (("help", "HELP"), ("wrong", "SET relay5=on"), ("log", "LOG")):
            ask(name, command)
        bench.device.report_every = 60
        bench.now += 100
        bench.device.idle()
        (report,) = bench.replies()
        mails["device: report"] = report.as_bytes(policy=email.policy.SMTP)
        bench.outbox.close()
    return mails


def every_mail() -> dict[str, bytes]:
    """All of them, by language and kind."""
    picture = emb.test_card(1, NOW)
    alerts = {f"{lang}: {name}": data for lang in LANGS for name, data in of_the_relay(lang, picture).items()}
    return alerts | of_the_device()
