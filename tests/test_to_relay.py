"""Mails of real cameras become events of the relay: the gateway as a process, and how it hands over."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import smtplib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from email.policy import SMTP
from pathlib import Path
from typing import Any

import pytest
from conftest import Clock, wait_for
from test_embedded_smtpd import PATIENCE, Program

import embedded_smtpd as emb
from embedded_smtpd import CameraMails, Mail
from smtp_module import DiskFull, Outbox

NOW = 1_790_000_000.0
JPEG = b"\xff\xd8\xff\xe0" + bytes(200)
DAHUA = "Alarm Event: Motion Detection\nAlarm Input Channel No.: 2\nAlarm Device Name: NVR-6C39\n"
REOLINK = "Alarm Camera Name: Garage\nAlarm Event: Motion Detected\nAlarm Input Channel No.: 1\n"


def written(text: str, subject: str = "Alert") -> bytes:
    head = f"Subject: {subject}\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n"
    return head.encode() + text.replace("\n", "\r\n").encode()


def kept(outbox: Outbox) -> list[dict[str, Any]]:
    return [json.loads(payload) for (payload,) in outbox.rows("SELECT payload FROM entries ORDER BY seq")]


DATED = b"Message-ID: <a@b>\r\nDate: Mon, 21 Sep 2026 14:13:00 +0000\r\n" + written("x")
CONSTANT = b"Message-ID: <a@b>\r\n" + written("x")
SHOWN = CONSTANT.replace(b"text/plain; charset=utf-8", b"image/jpeg")[:-1] + JPEG


@pytest.mark.parametrize(
    "content, seconds, events",
    [
        (DATED, 0.2, 1),
        (DATED, 60, 1),
        (DATED, 110, 1),
        (DATED, 600, 2),
        (DATED, 86400, 2),
        (DATED, -3600, 2),
        (SHOWN, 60, 1),
        (SHOWN, 600, 2),
        (CONSTANT, 0.2, 1),
        (CONSTANT, 2, 2),
        (CONSTANT, 600, 2),
        (written("x"), 0, 2),
    ],
)
def test_mail_that_comes_again_is_a_repeat_within_minutes_and_a_new_alarm_later(
    content: bytes, seconds: float, events: int, tmp_path: Path, clock: Clock
) -> None:
    with contextlib.closing(Outbox(tmp_path / "events.db")) as outbox:
        app = CameraMails(outbox, clock=clock)
        for moment in (NOW, NOW + seconds):
            clock.now = moment
            assert app.deliver(Mail("", ["a"], content), "10.0.0.1") == emb.ACCEPTED
        assert len(kept(outbox)) == events == len({event["id"] for event in kept(outbox)})


def test_mails_of_two_cameras_that_count_alike_are_two_events_and_a_relay_between_changes_nothing(tmp_path: Path) -> None:
    with contextlib.closing(Outbox(tmp_path / "events.db")) as outbox:
        app = CameraMails(outbox)
        for content in (DATED, b"Received: by mx.lan\r\n" + DATED, b"To: garage@lan\r\n" + DATED, b"To: yard@lan\r\n" + DATED):
            app.deliver(Mail("", ["a"], content), "10.0.0.1")
        assert len(kept(outbox)) == 3


def test_mail_to_two_cameras_is_an_event_of_each_with_the_picture(tmp_path: Path) -> None:
    with contextlib.closing(Outbox(tmp_path / "events.db")) as outbox:
        app = CameraMails(outbox)
        for _ in range(2):
            app.deliver(Mail("", ["owner@x", "a+one@x", "a+two@x"], SHOWN), "10.0.0.1")
        events = kept(outbox)
        assert [event["camera"] for event in events] == ["one", "two"] and events[0]["id"] != events[1]["id"]
        assert [base64.b64decode(event["image_b64"])[:4] for event in events] == [JPEG[:4]] * 2


def test_mail_of_an_alert_relay_makes_no_loop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(Outbox(tmp_path / "events.db")) as outbox:
        app = CameraMails(outbox)
        assert app.deliver(Mail("", ["a"], b"X-Alert-Id: 1\r\n" + DATED), "10.0.0.1") == emb.ACCEPTED
        app.deliver(Mail("", ["a"], b"Auto-Submitted: auto-generated\r\n" + DATED), "10.0.0.1")
        assert len(kept(outbox)) == 1 and "an alert relay wrote it" in caplog.text


def test_refusals_are_logged_once_for_each_peer_and_again_when_they_had_ceased(caplog: pytest.LogCaptureFixture, clock: Clock) -> None:
    refusals = emb.RefusalLog(clock)
    for _ in range(5):
        refusals.add("10.0.0.1", emb.WRONG_LOGIN)
        clock.now += 1000
    refusals.add("10.0.0.2", emb.WRONG_LOGIN)
    refusals.add("10.0.0.1", emb.UNKNOWN_COMMAND)
    assert len(caplog.messages) == 3
    clock.now += 4000
    refusals.add("10.0.0.1", emb.WRONG_LOGIN)
    assert len(caplog.messages) == 4 and caplog.messages[0] == "refused 10.0.0.1: 535 5.7.8 user or password is wrong"
    for number in range(5000):
        refusals.add(f"peer {number}", emb.WRONG_LOGIN)
    assert len(refusals.last) == emb.REFUSALS_KEPT


class Relay:
    """A relay that answers from a list, then with `queued`; remembers what it was told.

    It closes after a line of more than `longest` bytes, with an answer or, if `mute`, without one.
    """

    def __init__(
        self, port: int = 0, answers: tuple[dict[str, object], ...] = (), longest: int = 1 << 30, mute: bool = False
    ):
        self.longest, self.mute = longest, mute
        self.listener = socket.create_server(("127.0.0.1", port))
        self.port = self.listener.getsockname()[1]
        self.answers = list(answers)
        self.events: list[dict[str, Any]] = []
        self.heard = threading.Condition()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                with sock, sock.makefile("rwb") as file:
                    for line in iter(lambda: file.readline(self.longest), b""):
                        if not line.endswith(b"\n"):
                            if not self.mute:
                                sock.sendall(b'{"ok": false, "error": "too_large", "detail": "no"}\n')
                            break
                        with self.heard:
                            answer = self.answers.pop(0) if self.answers else {"ok": True, "status": "queued"}
                            file.write(json.dumps(answer).encode() + b"\n")
                            file.flush()
                            self.events.append(json.loads(line))
                            self.heard.notify_all()

    def wait_for(self, count: int) -> list[dict[str, Any]]:
        with self.heard:
            assert self.heard.wait_for(lambda: len(self.events) >= count, PATIENCE)
            return self.events

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


@pytest.fixture
def relay() -> Iterator[Relay]:
    made = Relay(
        answers=tuple({"ok": False, "error": error, "detail": "no"} for error in ("bad_event", "busy", "bad_json"))
    )
    yield made
    made.close()


def receiver(folder: Path, port: int) -> Program:
    return Program(folder, "--to-relay", f"127.0.0.1:{port}", "--port", "0", ALERT_TOKEN=" t0ken\n", DEVICE_STATE="state")


def test_refused_event_is_dropped_and_every_other_is_handed_over(tmp_path: Path, relay: Relay) -> None:
    program = receiver(tmp_path, relay.port)
    with program.smtp() as smtp:
        smtp.login("any", "login")
        for camera in ("one", "two"):
            smtp.sendmail("cam", camera, written("x"))
    events = relay.wait_for(4)
    assert [event["camera"] for event in events] == ["one", "two", "two", "two"]
    assert events[1] == events[2] == events[3] and events[0]["token"] == "t0ken" and events[0]["id"] != events[1]["id"]
    assert program.logged("refused an event.*bad_event")
    assert program.stop() == 0
    assert b"t0ken" not in (tmp_path / "state" / "to-relay.db").read_bytes()


def test_alarm_that_is_too_large_for_the_relay_goes_without_its_picture(tmp_path: Path) -> None:
    refusal = {"ok": False, "error": "too_large", "detail": "no"}
    relay = Relay(answers=(refusal, refusal))  # of the alarm without a picture, which is dropped, and of the picture
    program = receiver(tmp_path, relay.port)
    message = EmailMessage(policy=SMTP)
    message.set_content(REOLINK)
    with program.smtp() as smtp:
        smtp.sendmail("cam", "bare", written("x" * 1000))
        message.add_attachment(JPEG, maintype="image", subtype="jpeg")
        smtp.sendmail("cam", "alerts", message.as_bytes())
    events = relay.wait_for(3)
    assert [(event["camera"], "image_b64" in event) for event in events] == [
        ("bare", False), ("Garage", True), ("Garage", False)
    ]  # fmt: skip
    assert events[1]["id"] == events[2]["id"]
    assert program.stop() == 0
    relay.close()


def with_picture(size: int, camera: str) -> bytes:
    message = EmailMessage(policy=SMTP)
    message.set_content(f"Alarm Event: Motion\nChannel Name: {camera}\n")
    message.add_attachment(JPEG + bytes(size), maintype="image", subtype="jpeg")
    return message.as_bytes()


@pytest.mark.parametrize("mute", [False, True], ids=["answers", "mute"])
def test_relay_that_closes_over_a_picture_gets_the_alarm_without_it_and_nothing_waits_behind(tmp_path: Path, mute: bool) -> None:
    relay = Relay(longest=100_000, mute=mute)
    program = receiver(tmp_path, relay.port)
    with program.smtp() as smtp:
        for size, camera in ((10, "one"), (3_000_000, "two"), (10, "three")):
            smtp.sendmail("cam", "alerts", with_picture(size, camera).replace(b"Channel", b"image_b64: x\r\nChannel"))
    events = relay.wait_for(3)
    assert {event["camera"]: "image_b64" in event for event in events} == {"one": True, "two": False, "three": True}
    assert program.logged("MOTION_DETECTED of two is too large for the relay: it goes without its picture")
    assert program.stop() == 0
    relay.close()


def test_event_is_kept_while_the_relay_is_away(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    program = receiver(tmp_path, port)
    with program.smtp() as smtp:
        smtp.sendmail("cam", "alerts+garage@x", written(DAHUA))
    program.process.kill()
    program.stop()
    relay = Relay(port)
    again = receiver(tmp_path, port)
    assert relay.wait_for(1)[0]["camera"] == "garage"
    assert again.stop() == 0
    relay.close()


def test_wrong_port_behind_which_no_relay_listens_is_told(tmp_path: Path) -> None:
    other = Program(tmp_path, "--debug", "--port", "0")
    program = receiver(tmp_path, other.port)
    with program.smtp() as smtp:
        smtp.sendmail("cam", "alerts+garage@x", written(DAHUA))
    assert program.logged(f"relay 127.0.0.1:{other.port}: this is no answer of an alert relay")
    assert (program.stop(), other.stop()) == (0, 0)


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Callable[..., tuple[Program, Relay]]]:
    started: list[tuple[Program, Relay]] = []

    def start(*flags: str, **variables: str) -> tuple[Program, Relay]:
        relay = Relay()
        target = f"127.0.0.1:{relay.port}"
        started.append((Program(tmp_path, "--to-relay", target, "--port", "0", *flags, **variables), relay))
        return started[-1]

    yield start
    for program, relay in started:
        program.stop()
        relay.close()


Gateway = Callable[..., tuple[Program, Relay]]


def test_old_camera_that_quits_with_the_final_dot_gets_through(gateway: Gateway) -> None:
    program, relay = gateway()
    with program.connect() as sock, sock.makefile("rb") as answers:
        for line in (b"HELO", b"MAIL FROM:<>", b"RCPT TO:<yard>", b"DATA"):
            answers.readline()
            sock.sendall(line + b"\r\n")
        answers.readline()
        sock.sendall(b"Subject: tamper\n\nx\n.\ny\r\n.\r\nQUIT\r\n")
        assert answers.read().startswith(b"250 2.6.0")
    assert relay.wait_for(1)[0]["event"] == "TAMPER_DETECTED"


def test_camera_that_says_all_at_once_and_is_gone_before_it_is_served_gets_through(gateway: Gateway) -> None:
    program, relay = gateway()
    held = [program.connect() for _ in range(emb.GATEWAY_SESSIONS)]
    for sock in held:
        assert sock.recv(3) == b"220"
    for number in range(16):
        with program.connect() as sock:
            sock.sendall(b"HELO\r\nMAIL FROM:<>\r\nRCPT TO:<cam%d>\r\nDATA\r\nSubject: x\r\n.\r\nQUIT\r\n" % number)
    for sock in held:
        sock.close()
    assert {event["camera"] for event in relay.wait_for(16)} == {f"cam{number}" for number in range(16)}


def test_sixteen_cameras_that_fire_together_are_served_while_one_sends_slowly(gateway: Gateway) -> None:
    program, relay = gateway()
    slow = program.connect()
    slow.sendall(b"HELO\r\nMAIL FROM:<>\r\nRCPT TO:<slow>\r\nDATA\r\nSubject: x\r\n\r\n")
    picture = with_picture(200_000, "")

    def fire(number: int) -> None:
        with program.smtp() as smtp:
            smtp.sendmail("cam", f"alerts+cam{number}@x", picture)

    cameras = [threading.Thread(target=fire, args=(number,)) for number in range(16)]
    for camera in cameras:
        camera.start()
    assert {event["camera"] for event in relay.wait_for(16)} == {f"cam{number}" for number in range(16)}
    for camera in cameras:
        camera.join()
    slow.sendall(b".\r\n")
    assert relay.wait_for(17)[16]["camera"] == "slow"
    slow.close()


def test_slow_uplink_that_sends_steadily_is_not_slow_and_a_silent_one_is_cut_off_with_its_alarm(gateway: Gateway) -> None:
    program, relay = gateway(DEVICE_TIMEOUT="1")
    with program.connect() as sock, sock.makefile("rb") as answers:
        sock.sendall(b"HELO\r\nMAIL FROM:<>\r\nRCPT TO:<steady>\r\nDATA\r\nSubject: ")
        began = time.monotonic()
        while time.monotonic() < began + 2.5:  # longer than any silence may be, in one line
            sock.sendall(b"x")
            time.sleep(0.1)
        sock.sendall(b"\r\n.\r\nQUIT\r\n")
        assert b"250 2.6.0 accepted" in answers.read()
    with program.connect() as sock, sock.makefile("rb") as answers:
        sock.sendall(b"HELO\r\nMAIL FROM:<>\r\nRCPT TO:<silent>\r\nDATA\r\nSubject: video loss\n\nx\n.\n")
        assert answers.read().endswith(b"250 2.6.0 accepted\r\n")
    with program.connect() as sock:
        sock.sendall(b"HELO\r\nMAIL FROM:<>\r\nRCPT TO:<cut>\r\nDATA\r\nSubject: tamper\r\n\r\nx")
        sock.recv(1)
    events = relay.wait_for(3)
    assert [(event["camera"], "incomplete" in event["meta"]) for event in events] == [
        ("steady", False), ("silent", True), ("cut", True)
    ]  # fmt: skip
    assert [event["event"] for event in events] == ["MOTION_DETECTED", "CAMERA_DISCONNECTED", "TAMPER_DETECTED"]


def test_mail_that_is_under_way_when_the_gateway_stops_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emb, "TICK_SECONDS", 0.02)
    mails: list[Mail] = []
    peer, ours = socket.socketpair()
    emb.smtp.wait_at_most(ours, 0.02, 0.02)
    server = emb.Server()
    session = emb.LenientSession(emb.Rules("gateway", 1000, any_login=True, lenient=True))

    def deliver(mail: Mail) -> bytes:
        mails.append(mail)
        return emb.ACCEPTED

    thread = threading.Thread(target=emb.converse, args=(emb.Link(ours, "127.0.0.1", server), session, deliver))
    thread.start()
    with peer, peer.makefile("rb") as answers:
        peer.sendall(b"HELO\r\nMAIL FROM:<>\r\nRCPT TO:<last>\r\nDATA\r\nSubject: tamper\r\n")
        wait_for(lambda: b"tamper" in session._content)
        server.stop()
        assert answers.read().endswith(b"250 2.6.0 accepted\r\n")
    thread.join(PATIENCE)
    server.close()
    assert [(mail.recipients, bytes(mail.data), mail.incomplete) for mail in mails] == [(["last"], b"Subject: tamper\r\n", True)]


def test_clip_over_the_limit_costs_only_itself(gateway: Gateway) -> None:
    program, relay = gateway(DEVICE_MAX_MAIL="1MiB")
    message = EmailMessage(policy=SMTP)
    message.set_content(REOLINK)
    message.add_attachment(JPEG, maintype="image", subtype="jpeg")
    message.add_attachment(bytes(2_000_000), maintype="video", subtype="mp4", filename="clip.mp4")
    with program.smtp() as smtp:
        smtp.sendmail("cam", "alerts", message.as_bytes())
    (event,) = relay.wait_for(1)
    assert base64.b64decode(event["image_b64"]) == JPEG and event["meta"]["attached"] == "clip.mp4"
    assert event["meta"]["incomplete"]


def test_what_is_refused_is_logged_with_the_peer_and_the_reason(gateway: Gateway) -> None:
    program, _ = gateway(DEVICE_USER="cam", DEVICE_PASS="secret")
    for _ in range(2):
        with program.smtp() as smtp, pytest.raises(smtplib.SMTPAuthenticationError):
            smtp.login("cam", "guess")
    assert program.logged(r"refused 127\.0\.0\.1: 535 5\.7\.8")
    program.stop()
    rest = "".join(iter(lambda: program.log.get_nowait() if not program.log.empty() else "", ""))
    assert "535" not in rest and "guess" not in rest


@pytest.mark.parametrize(
    "target", ["nowhere", ":5000", "localhost:0", "::1:5000", "[::1:5000", "a b:5000", "localhost:65536", "localhost:", ""]
)
def test_wrong_target_stops_the_start(target: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SystemExit):
        emb.main(["--to-relay"])
    assert emb.main(["--to-relay", target, "--port", "0"]) == 78


@pytest.mark.parametrize(
    "target, host", [("localhost:5000", "localhost"), ("10.0.0.1:5000", "10.0.0.1"), ("[::1]:5000", "::1")]
)
def test_target_is_a_name_or_an_address_and_a_port(target: str, host: str) -> None:
    assert emb.host_and_port(target) == (host, 5000)


def test_last_of_the_disk_is_kept_for_handing_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage("/")._replace(total=10**9, free=16 << 20)
    with contextlib.closing(Outbox(tmp_path / "to-relay.db")) as outbox:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
        with pytest.raises(DiskFull):
            CameraMails(outbox).deliver(Mail("cam@lan", ["cam1@x"], b"Subject: Motion\r\n\r\n"), "")
