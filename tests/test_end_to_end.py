"""Real processes, real sockets: a client, the relay, and an independent mail server."""

import contextlib
import email
import email.policy
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller

ROOT = Path(__file__).resolve().parent.parent
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40


class Mailbox:
    """An aiosmtpd server that keeps what it gets; `answers` are taken for the next mails, in order."""

    def __init__(self, port: int = 0) -> None:
        self.mails: list[Any] = []
        self.answers: list[str] = []
        self._arrived = threading.Condition()
        self._sock = socket.create_server(("127.0.0.1", port))
        self.port = self._sock.getsockname()[1]
        sock = self._sock

        class Bound(Controller):
            def _create_server(self) -> Any:
                return self.loop.create_server(self._factory_invoker, sock=sock)

        self._controller = Bound(self, hostname="127.0.0.1", port=self.port)
        self._controller.start()

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        with self._arrived:
            if self.answers:
                return self.answers.pop(0)
            message = email.message_from_bytes(envelope.content, policy=email.policy.default)
            message.rcpt_tos = envelope.rcpt_tos  # type: ignore[attr-defined]
            self.mails.append(message)
            self._arrived.notify_all()
        return "250 OK"

    def wait(self, number: int, seconds: float = 20.0) -> list[Any]:
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.mails) >= number, seconds), (
                f"{len(self.mails)} of {number} mails"
            )
            return list(self.mails)

    def stop(self) -> None:
        self._controller.stop()


class Process:
    """One of the programs as a process in a folder of its own, its standard error read all the time."""

    def __init__(self, folder: Path, *args: str, **environ: str) -> None:
        env = {"PATH": os.environ["PATH"], "HOME": str(folder), **environ}
        self.log: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / args[0]), *args[1:]],
            cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append(line)

    def port(self) -> int:
        return int(until(lambda: re.search(r"listening on \S+:(\d+)", "".join(self.log)))[1])

    def hit(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.hit(number)
        return self.wait()

    def wait(self) -> int:
        code = self._process.wait(20)
        self._reader.join(5)
        assert self._process.stderr is not None
        self._process.stderr.close()
        return code

    @property
    def running(self) -> bool:
        return self._process.poll() is None


def until(condition: Any, seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.01)
    return found


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    box = Mailbox()
    yield box
    box.stop()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    started: list[Process] = []

    def run(*args: str, **environ: str) -> Process:
        started.append(Process(tmp_path, *args, **environ))
        return started[-1]

    yield run
    for process in started:
        if process.running:
            process.end(signal.SIGKILL)


def relay(start: Any, mailbox: Mailbox | None, *args: str, **environ: str) -> Process:
    smtp = {"SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(mailbox.port)} if mailbox else {}
    return start("server.py", "--port", "0", *args, **({"ALERT_RECIPIENT": "owner@example.com"} | smtp | environ))


def client(folder: Path, port: int, *args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "client.py"), "--port", str(port), *args],
        cwd=folder, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60, check=False, **more,
    )  # fmt: skip


def send(port: int, *lines: dict[str, Any]) -> list[dict[str, Any]]:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile("rb") as answers:
            return [json.loads(answer) for answer in answers]


def queue(folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "smtp_module.py"), "queue", "--json", "--spool", "spool/alerts.db"],
        cwd=folder, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def test_an_event_with_a_picture_becomes_a_mail_with_the_picture(start: Any, mailbox: Mailbox, tmp_path: Path) -> None:
    (tmp_path / "snap.png").write_bytes(PNG)
    port = relay(start, mailbox).port()
    done = client(
        tmp_path, port, "--event", "DOOR_OPENED", "--camera", "حیاط 🏠", "--image", "snap.png", "--meta", "zone=4"
    )
    assert done.returncode == 0, done.stderr
    (mail,) = mailbox.wait(1)
    assert mail["Subject"] == "DVR ALERT: DOOR_OPENED - حیاط 🏠"
    assert mail["To"] == "owner@example.com"
    assert mail["Auto-Submitted"] == "auto-generated"
    pictures = [part for part in mail.walk() if part.get_filename() == "snap.png"]
    assert [part.get_content() for part in pictures] == [PNG]
    page = mail.get_body(("html",)).get_content()
    assert f"cid:{pictures[0]['Content-ID'][1:-1]}" in page
    assert "حیاط 🏠" in page and "حیاط 🏠" in mail.get_body(("plain",)).get_content()


def test_alerts_wait_while_the_mail_server_is_away_and_go_out_when_it_is_back(start: Any, tmp_path: Path) -> None:
    away = socket.create_server(("127.0.0.1", 0))
    port = away.getsockname()[1]
    away.close()
    process = relay(
        start, None, SMTP_HOST="127.0.0.1", SMTP_PORT=str(port), ALERT_RETRY_FIRST="0.2", ALERT_RETRY_MAX="0.5"
    )
    said = send(process.port(), *({"event": "E", "camera": "c", "id": f"n{n}"} for n in range(5)))
    assert [answer["status"] for answer in said] == ["queued"] * 5
    held = until(lambda: [row for row in queue(tmp_path) if row["state"] == "held"])
    assert [row["id"] for row in held] == [f"n{n}" for n in range(5)]
    assert held[0]["tries"] == 0 and "refused" in held[0]["error"] and held[0]["recipients"] == ["owner@example.com"]
    assert sum("all mail waits" in line for line in process.log) == 1
    mailbox = Mailbox(port)
    try:
        assert sorted(mail["X-Alert-Id"] for mail in mailbox.wait(5)) == [f"n{n}" for n in range(5)]
        until(lambda: queue(tmp_path) == [])
    finally:
        mailbox.stop()


def test_what_was_queued_survives_a_kill_and_goes_out_once(start: Any, mailbox: Mailbox, tmp_path: Path) -> None:
    first = relay(start, None, SMTP_HOST="127.0.0.1", SMTP_PORT="1", ALERT_RECIPIENT="owner@example.com")
    send(first.port(), {"event": "E", "camera": "c", "id": "kept"})
    first.end(signal.SIGKILL)
    second = relay(start, mailbox)
    mailbox.wait(1)
    assert send(second.port(), {"event": "E", "camera": "c", "id": "kept"})[0]["status"] == "duplicate"
    send(second.port(), {"event": "E", "camera": "c", "id": "next"})
    assert [mail["X-Alert-Id"] for mail in mailbox.wait(2)] == ["kept", "next"]


def test_a_refused_alert_fails_is_told_of_and_can_be_retried(start: Any, mailbox: Mailbox, tmp_path: Path) -> None:
    mailbox.answers.append("554 5.7.1 no thanks")
    port = relay(start, mailbox, ALERT_REFUSED_AFTER="0").port()
    send(port, {"event": "E", "camera": "c", "id": "bad"})
    failed = until(lambda: [row for row in queue(tmp_path) if row["state"] == "failed"])
    assert failed[0]["id"] == "bad" and "554" in failed[0]["error"]
    send(port, {"event": "E", "camera": "c", "id": "good"})
    assert "no thanks" in mailbox.wait(1)[0].get_body(("plain",)).get_content()
    subprocess.run(
        [sys.executable, str(ROOT / "smtp_module.py"), "retry", "bad"],
        cwd=tmp_path,
        check=True,
        timeout=30,
        capture_output=True,
    )
    assert mailbox.wait(2)[1]["X-Alert-Id"] == "bad"


def test_forty_alerts_come_as_the_first_and_a_digest(start: Any, mailbox: Mailbox) -> None:
    port = relay(start, mailbox, ALERT_COOLDOWN="2").port()
    send(port, *({"event": "MOTION_DETECTED", "camera": "cam1", "id": f"n{n}"} for n in range(41)))
    first, digest = mailbox.wait(2)
    assert first["X-Alert-Id"] == "n0"
    assert digest["Subject"].startswith("DVR ALERT: 40 alerts - ")
    csv = next(part for part in digest.walk() if part.get_filename() == "events.csv").get_content()
    assert csv.splitlines()[0] == "\ufeffid,event,camera,time,arrived,meta"
    assert {line.split(",")[0] for line in csv.splitlines()[1:]} == {f"n{n}" for n in range(1, 41)}


def test_silence_raises_an_alert_and_the_return_another(start: Any, mailbox: Mailbox) -> None:
    port = relay(start, mailbox, ALERT_EXPECT="cam1=2s").port()
    assert mailbox.wait(1)[0]["Subject"] == "DVR ALERT: CAMERA_DISCONNECTED - cam1"
    assert send(port, {"heartbeat": "cam1"}) == [{"ok": True, "status": "alive"}]
    assert mailbox.wait(2)[1]["Subject"] == "DVR ALERT: CAMERA_RECONNECTED - cam1"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_relay_in_time_with_exit_0(start: Any, mailbox: Mailbox, number: int) -> None:
    process = relay(start, mailbox)
    with socket.create_connection(("127.0.0.1", process.port())):
        began = time.monotonic()
        assert process.end(number) == 0
        assert time.monotonic() - began < 5


def test_signals_in_a_row_still_end_the_relay_with_exit_0(start: Any, mailbox: Mailbox) -> None:
    process = relay(start, mailbox)
    process.port()
    for _ in range(20):
        process.hit(signal.SIGTERM)
        time.sleep(0.005)
    assert process.wait() == 0


def test_systemd_is_told_when_the_relay_is_ready_and_when_it_stops(
    start: Any, mailbox: Mailbox, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(20)
        process = relay(start, mailbox, NOTIFY_SOCKET=str(tmp_path / "notify"))
        assert told.recv(100) == b"READY=1"
        assert send(process.port(), {"ping": 1})[0]["status"] == "pong"
        assert process.end() == 0
        assert told.recv(100) == b"STOPPING=1"


def test_connections_are_not_fewer_because_of_a_limit_that_the_relay_may_raise(start: Any) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        process = relay(start, None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    port = process.port()
    with contextlib.ExitStack() as peers:
        for _ in range(100):
            last = peers.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        last.sendall(b'{"ping": 1}\n')
        assert b"pong" in last.recv(4096)


def test_a_second_relay_on_the_same_spool_exits_75(start: Any, mailbox: Mailbox) -> None:
    relay(start, mailbox).port()
    assert relay(start, mailbox).wait() == 75


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"ALERT_PORT": "abc"}, "ALERT_PORT"),
        ({"ALERT_HOST": "0.0.0.0"}, "ALERT_TOKEN"),
        ({"ALERT_HOST": "a..b", "ALERT_TOKEN": "secret"}, "ALERT_HOST, ALERT_PORT: cannot listen there: "),
        ({"ALERT_COOLDOWN": "soon"}, "ALERT_COOLDOWN"),
        ({"ALERT_ROUTES": "cam1=nobody"}, "ALERT_ROUTES"),
        ({"ALERT_QUIET": "22:00-25:00"}, "ALERT_QUIET"),
        ({"ALERT_SPOOL": os.devnull + "/alerts.db"}, "ALERT_SPOOL"),
        ({"ALERT_SPOOL": "."}, "ALERT_SPOOL"),
        ({"SMTP_HOST": "mail.example.com"}, "ALERT_RECIPIENT"),
        ({"SMTP_USER": "me"}, "SMTP_HOST"),
        ({"SMTP_HOST": "mail.example.com", "SMTP_USER": "me", "SMTP_PASS": "hunter2", "SMTP_SECURITY": "none",
          "ALERT_RECIPIENT": "a@b.c"}, "SMTP_SECURITY"),
    ],
)  # fmt: skip
def test_a_wrong_setting_stops_the_start_with_78_and_names_it(start: Any, environ: dict[str, str], named: str) -> None:
    process = start("server.py", "--port" if "ALERT_PORT" not in environ else "--log-level",
                    "0" if "ALERT_PORT" not in environ else "info", **environ)  # fmt: skip
    assert process.wait() == 78
    assert named in "".join(process.log)
    assert "hunter2" not in "".join(process.log)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"ALERT_HOST": "192.0.2.1", "ALERT_TOKEN": "x"}, "cannot start yet: ALERT_HOST: "),
        ({"ALERT_HOST": "nowhere.invalid", "ALERT_TOKEN": "x"}, "cannot start yet: ALERT_HOST: "),
        pytest.param(
            {"ALERT_SPOOL": "/proc/nothing/alerts.db"}, "cannot start yet: ALERT_SPOOL: ",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="needs a folder in which nobody makes folders"),
        ),
        ({"SMTP_HOST": "mail.example.com", "SMTP_USER": "me", "SMTP_PASS_COMMAND": "exit 6", "ALERT_RECIPIENT": "a@b.c"},
         "listening on"),
    ],
)  # fmt: skip
def test_what_heals_itself_after_the_machine_has_booted_does_not_end_the_start(
    start: Any, environ: dict[str, str], said: str
) -> None:
    process = start("server.py", "--port", "0", **environ)
    until(lambda: said in "".join(process.log))
    assert process.running and process.end() == 0


@pytest.mark.parametrize("program", ["server.py", "embedded_smtpd.py"])
def test_a_misspelled_setting_is_told_of_at_the_start(start: Any, tmp_path: Path, program: str) -> None:
    (tmp_path / ".env").write_text("SMTP_PASSWORD=hunter2\n")
    process = start(program, "--port", "0", ALERT_RECIPENT="hunter2")
    assert process.port() and process.end() == 0
    warnings = [line for line in process.log if "did you mean" in line]
    assert len(warnings) == 2 and "ALERT_RECIPIENT" in warnings[0] and "SMTP_PASS?" in warnings[1]
    assert "hunter2" not in "".join(process.log)


def test_no_password_or_token_reaches_the_log(start: Any, mailbox: Mailbox) -> None:
    process = relay(start, mailbox, "--log-level", "debug", ALERT_TOKEN="s3cret-token")
    send(
        process.port(),
        {"event": "E", "camera": "c", "token": "s3cret-token"},
        {"event": "E", "camera": "c", "token": "s3cret-wrong"},
    )
    mailbox.wait(1)
    process.end()
    assert "s3cret" not in "".join(process.log)


def test_the_demo_shows_the_whole_job_and_exits_0(tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "server.py"), "--demo"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DVR ALERT: MOTION_DETECTED - garden" in done.stdout
    folder = Path(done.stdout.strip().splitlines()[-1].strip())
    assert len(list(folder.glob("*.eml"))) == len(list(folder.glob("*.html"))) >= 4
