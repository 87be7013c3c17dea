"""Mails of real cameras become events of the relay."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from email.message import EmailMessage
from email.policy import SMTP
from pathlib import Path
from typing import Any

import pytest
from test_embedded_smtpd import PATIENCE, Program

import embedded_smtpd as emb
import server
from embedded_smtpd import CameraMails, Mail, camera_event, read_letter
from smtp_module import DiskFull, Outbox

NOW = 1_790_000_000.0
JPEG = b"\xff\xd8\xff\xe0" + bytes(200)
PNG = emb.test_card(1, NOW)

DAHUA = """Alarm Event: Motion Detection
Alarm Input Channel No.: 2
Alarm Device Name: NVR-6C39
Alarm Start Time(D/M/Y H:M:S): 01/02/2026 03:04:05
IP Address: 192.168.1.108
"""
REOLINK = "Alarm Camera Name: Garage\nAlarm Event: Motion Detected\nAlarm Input Channel No.: 1\n"
HIKVISION = """This is an automatically generated e-mail from your DVR.

EVENT TYPE:          Tampering Alarm
EVENT TIME:          2026-02-01,03:04:05
DVR NAME:            Embedded Net DVR
CHANNEL NAME:        Front door
CHANNEL NUMBER:      A1
"""


def event_of(content: bytes, recipient: str = "alerts@localhost") -> dict[str, Any] | None:
    mail = Mail("cam@lan", [recipient], content)
    return camera_event(mail, read_letter(content, lenient=True), NOW)


def written(text: str, subject: str = "Alert", encoding: str = "7bit") -> bytes:
    data = text.replace("\n", "\r\n").encode()
    data = base64.encodebytes(data).replace(b"\n", b"\r\n") if encoding == "base64" else data
    kind = f"Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: {encoding}"
    return f"Subject: {subject}\r\n{kind}\r\n\r\n".encode() + data


@pytest.mark.parametrize("encoding", ["7bit", "base64"])
@pytest.mark.parametrize(
    "text, event, camera",
    [
        (DAHUA, "MOTION_DETECTED", "NVR-6C39 2"),
        (DAHUA.replace("Motion Detection", "Video Loss"), "CAMERA_DISCONNECTED", "NVR-6C39 2"),
        (DAHUA.replace("Motion Detection", "Video Tampering") + "Channel Name: Yard\n", "TAMPER_DETECTED", "Yard"),
        (DAHUA + "Alarm Input Channel Name: Tor 1\n", "MOTION_DETECTED", "Tor 1"),
        (DAHUA.replace("Channel No.", "Channel"), "MOTION_DETECTED", "NVR-6C39 2"),
        (REOLINK, "MOTION_DETECTED", "Garage"),
        (HIKVISION, "TAMPER_DETECTED", "Front door"),
        (
            HIKVISION.replace("CHANNEL NAME", "X").replace("DVR NAME", "IPC NAME"),
            "TAMPER_DETECTED",
            "Embedded Net DVR A1",
        ),
        (HIKVISION.replace("Tampering Alarm", "Video Signal Lost"), "CAMERA_DISCONNECTED", "Front door"),
        ("EVENT TYPE: Motion Detected\nIPC NAME: Driveway\n", "MOTION_DETECTED", "Driveway"),
        ("EVENT TYPE: Motion Detected\nDVR NAME: Shed\n", "MOTION_DETECTED", "Shed"),
        ("Alarm Event: Video Loss\nAlarm Device Name: NVR\n", "CAMERA_DISCONNECTED", "NVR"),
        ("Alarm Event: Door opened\n", "DOOR_OPENED", "alerts"),
        ("Alarm Event: Device restart\n", "SYSTEM_RESTARTED", "alerts"),
        ("Alarm Event: Something new\n", "MOTION_DETECTED", "alerts"),
        ("Alarm Event: دوربین\nChannel Name: در\n", "MOTION_DETECTED", "در"),
        (DAHUA + "Alarm Input Channel Name: \u200b\nChannel Name: Yard\n", "MOTION_DETECTED", "Yard"),
        (DAHUA + "Channel Name: \u200d \u2060\n", "MOTION_DETECTED", "NVR-6C39 2"),
        (DAHUA + "Channel Name: " + "\u200c" * 200 + "Tor\n", "MOTION_DETECTED", "NVR-6C39 2"),
        ("Alarm Device Name: \u200b\nAlarm Input Channel: 2\n", "MOTION_DETECTED", "alerts"),
        ("nothing to be understood\n", "MOTION_DETECTED", "alerts"),
        ("", "MOTION_DETECTED", "alerts"),
    ],
)
def test_text_of_the_recorder_says_what_and_where(text: str, event: str, camera: str, encoding: str) -> None:
    made = event_of(written(text, encoding=encoding))
    assert made and (made["event"], made["camera"]) == (event, camera)
    assert isinstance(server.parse_line(json.dumps(made).encode(), b"", NOW), server.Event)  # the relay takes it


def test_line_of_the_text_is_split_after_its_whole_name() -> None:
    made = event_of(written(DAHUA + "Odd (name: 1\n"))
    assert made and made["meta"]["alarm start time(d/m/y h:m:s)"] == "01/02/2026 03:04:05"
    assert made["meta"]["odd (name"] == "1"


@pytest.mark.parametrize(
    "subject, event",
    [
        ("Motion detected", "MOTION_DETECTED"),
        ("Camera masked", "TAMPER_DETECTED"),
        ("Video Loss alarm", "CAMERA_DISCONNECTED"),
        ("Camera disconnected", "CAMERA_DISCONNECTED"),
        ("Camera reconnected", "CAMERA_RECONNECTED"),
        ("Video signal recovered", "CAMERA_RECONNECTED"),
        ("Lens covered", "TAMPER_DETECTED"),
        ("Front door", "DOOR_OPENED"),
        ("System restart", "SYSTEM_RESTARTED"),
        ("E-mail test", "TEST"),
        ("Latest picture", "MOTION_DETECTED"),
        ("=?utf-8?q?Video_loss?=", "CAMERA_DISCONNECTED"),
    ],
)
def test_subject_says_it_where_the_text_does_not(subject: str, event: str) -> None:
    made = event_of(written("hello", subject))
    assert made and made["event"] == event


@pytest.mark.parametrize(
    "text, subject", [("Alarm Event: Motion Detection Stop\n", "x"), ("hello", "Motion Detection Stop")]
)
def test_alarm_that_ended_is_no_event(text: str, subject: str) -> None:
    assert event_of(written(text, subject)) is None


def test_detail_of_the_address_names_the_camera_before_all_else() -> None:
    made = event_of(written(REOLINK), "alerts+north gate@localhost")
    assert made and made["camera"] == "north gate"
    for recipient, camera in (("garage", "garage"), ("alerts+@x.org", "alerts"), ("+yard@x.org", "yard"), ("@", "camera")):
        made = event_of(written("x"), recipient)
        assert made and made["camera"] == camera


@pytest.mark.parametrize("picture", [JPEG, PNG])
def test_first_part_that_is_a_picture_is_it_whatever_its_label(picture: bytes) -> None:
    message = EmailMessage(policy=SMTP)
    message["Subject"] = "x"
    message.set_content(REOLINK)
    message.add_attachment(b"not a picture", maintype="image", subtype="jpeg", filename="a.jpg")
    message.add_attachment(picture, maintype="application", subtype="octet-stream", filename="../b.dat")
    message.add_attachment(JPEG + b"2", maintype="image", subtype="jpeg", filename="c.jpg")
    made = event_of(message.as_bytes())
    assert made and base64.b64decode(made["image_b64"]) == picture and made["image_filename"] == "b.dat"


def test_what_the_mail_said_is_kept_in_bounds() -> None:
    text = "".join(f"Line {number}: {'v' * 1000}\n" for number in range(100))
    made = event_of(b"From: A <a@b>\r\nDate: Mon, 2 Mar 2026 10:00:00 +0100\r\n" + written(DAHUA + text, "S"))
    assert made and len(made["meta"]) == 32 and max(map(len, made["meta"].values())) <= 300
    assert made["meta"]["subject"] == "S" and made["meta"]["from"] == "a@b" and "10:00:00" in made["meta"]["date"]
    assert made["meta"]["ip address"] == "192.168.1.108"
    assert made["timestamp"] == "2026-09-21T14:13:20.000+00:00"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\r\n",
        b"no headers at all",
        b"Content-Type: multipart/mixed\r\n\r\nx",
        b"Subject: a\x01b\r\nSubject: c\r\n\r\n",
        b"Subject: =?x-evil?q?Alarm?=\r\nDate: =?utf-8?b?Q?=\r\n\r\n",
    ],
)
def test_odd_mail_is_still_an_alert(content: bytes) -> None:
    made = event_of(content)
    assert made and made["event"] == "MOTION_DETECTED" and made["camera"] == "alerts"


@pytest.mark.parametrize("kind", ["plain", "html"])
@pytest.mark.parametrize("filler", [" " * 100_000, "<" * 100_000, "a:" * 100_000, "(" * 100_000, "()" * 50_000, "&#" + "9" * 5000 + ";"])
def test_text_that_is_costly_to_read_is_an_alert_within_a_second(filler: str, kind: str) -> None:
    head = f"Subject: Front door\r\nContent-Type: text/{kind}\r\n\r\n"
    began = time.process_time()
    made = event_of(f"{head}{filler}\r\nAlarm Start: now\r\n".encode())
    assert made and made["event"] == "DOOR_OPENED"
    assert time.process_time() - began < 1


def test_mail_sent_twice_is_one_event_and_without_message_id_each_is_its_own(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "events.db")
    app = CameraMails(outbox)
    named = b"Message-ID: <a@b>\r\n" + written("x")
    twins = [b"To: garage@lan\r\n" + named, b"To: yard@lan\r\n" + named]  # two cameras that count alike
    for content in [named, named, b"Received: by mx.lan\r\n" + named, *twins, written("x"), written("x")]:
        assert app.deliver(Mail("", ["a"], content), "10.0.0.1") == emb.ACCEPTED
    assert len(list(outbox.waiting())) == 5
    outbox.close()


class Relay:
    """A relay that answers from a list, then with `queued`; remembers what it was told."""

    def __init__(self, port: int = 0, answers: tuple[dict[str, object], ...] = ()):
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
                    for line in file:
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


def test_old_camera_that_quits_with_the_final_dot_gets_through(tmp_path: Path, relay: Relay) -> None:
    program = receiver(tmp_path, relay.port)
    with program.connect() as sock, sock.makefile("rb") as answers:
        for line in (b"HELO", b"MAIL FROM:<>", b"RCPT TO:<yard>", b"DATA"):
            answers.readline()
            sock.sendall(line + b"\r\n")
        answers.readline()
        sock.sendall(b"Subject: tamper\n\nx\n.\ny\r\n.\r\nQUIT\r\n")
        assert answers.read().startswith(b"250 2.6.0")
    assert relay.wait_for(1)[0]["event"] == "TAMPER_DETECTED"
    program.stop()


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


def test_mail_of_a_million_fields_does_not_fill_the_memory() -> None:
    flood = emb.text_fields("".join(f"{number}: x\n" for number in range(1_000_000)))
    assert flood["1"] == "x" and len(flood) < 100_000
