"""The whole program as a process on a free port: sockets, deadlines, TLS, the flags."""

from __future__ import annotations

import contextlib
import io
import mailbox
import os
import queue
import re
import shutil
import signal
import smtplib
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import EmailMessage
from email.policy import SMTP
from pathlib import Path

import pytest

import embedded_smtpd as emb
from smtp_module import Settings

PROGRAM = str(Path(__file__).parent.parent / "embedded_smtpd.py")
PATIENCE = 20.0  # seconds: how long a condition may take on a busy machine


class Program:
    """embedded_smtpd.py as a process."""

    def __init__(self, folder: Path, *flags: str, wait: bool = True, **variables: str):
        self.folder = folder
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("DEVICE_", "SMTP_", "ALERT_"))
        }
        self.process = subprocess.Popen(
            [sys.executable, PROGRAM, *flags],
            cwd=folder,
            env=environment | variables,
            text=True,
            stdin=subprocess.PIPE if "--stdio" in flags else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.log: queue.Queue[str] = queue.Queue()
        self.out: queue.Queue[str] = queue.Queue()
        self.readers = [
            threading.Thread(target=lambda s=stream, lines=lines: [lines.put(line) for line in s], daemon=True)
            for stream, lines in ((self.process.stderr, self.log), (self.process.stdout, self.out))
        ]
        for reader in self.readers:
            reader.start()
        if wait:
            self.port = int(self.logged(r"listening on \S+:(\d+)")[1])

    def logged(self, pattern: str) -> re.Match[str]:
        return self.seen(self.log, pattern)

    def seen(self, lines: queue.Queue[str], pattern: str) -> re.Match[str]:
        ends = time.monotonic() + PATIENCE
        while True:
            line = lines.get(timeout=max(0.01, ends - time.monotonic()))
            if found := re.search(pattern, line):
                return found

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE)

    def smtp(self) -> smtplib.SMTP:
        return smtplib.SMTP("127.0.0.1", self.port, local_hostname="test", timeout=PATIENCE)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(PATIENCE)
        for reader in self.readers:
            reader.join(PATIENCE)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        return code


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    running: list[Program] = []

    def starter(*flags: str, **variables: str) -> Program:
        program = Program(tmp_path, *flags, **variables)
        running.append(program)
        return program

    yield starter
    for program in running:
        program.stop()


def debug(start: Callable[..., Program], *flags: str, **variables: str) -> Program:
    return start("--debug", "--port", "0", *flags, **variables)


def mail(subject: str = "hello", text: str = "hello\n") -> EmailMessage:
    message = EmailMessage(policy=SMTP)
    message["From"], message["To"], message["Subject"], message["Message-ID"] = (
        "a@b.c",
        "d@e.f",
        subject,
        f"<{time.time_ns()}@x>",
    )
    message.set_content(text)
    return message


def talk(sock: socket.socket, *lines: bytes) -> list[bytes]:
    """Say each line when the answer to the one before is there; all answers, the greeting first."""
    with sock.makefile("rb") as answers:
        said = [answers.readline()]
        for line in lines:
            sock.sendall(line)
            answer = answers.readline()
            while answer[3:4] == b"-":
                answer = answers.readline()
            said.append(answer)
        return said


OPEN = (b"EHLO x\r\n", b"MAIL FROM:<a@b.c>\r\n", b"RCPT TO:<d@e.f>\r\n", b"DATA\r\n")


def test_debug_receiver_shows_and_keeps_each_mail(start: Callable[..., Program], tmp_path: Path) -> None:
    program = debug(start, "--maildir", "kept")
    message = mail("سلام 中文", "line one\n\x1b[31mred\n")
    message.add_attachment(b"\x89PNG...", maintype="image", subtype="png", filename="x.png")
    with program.smtp() as smtp:
        smtp.login("anybody", "anything")
        smtp.send_message(message, "a@b.c", ["d@e.f", "g@h.i"])
    assert program.seen(program.out, r"mail 1 from <a@b.c> to <d@e.f>, <g@h.i>")
    assert program.seen(program.out, "Subject: سلام 中文")
    assert program.seen(program.out, r"^\\x1b\[31mred")
    assert program.seen(program.out, r"\[image/png x.png 7 bytes\]")
    (kept,) = mailbox.Maildir(tmp_path / "kept", create=False)
    assert kept["Return-Path"] == "<a@b.c>" and kept.get_all("Delivered-To") == ["d@e.f", "g@h.i"]
    assert [part.get_payload(decode=True) for part in kept.walk() if part.get_filename()] == [b"\x89PNG..."]
    assert program.stop() == 0


@pytest.mark.parametrize("second", [b"Subject: b", b"subject : b", b".Subject: b"])
def test_debug_receiver_refuses_a_second_subject(second: bytes) -> None:
    receiver = emb.DebugReceiver(io.StringIO())
    with pytest.raises(emb.Refused, match=r"more than one Subject"):
        receiver.deliver(emb.Mail("", ["a@b.c"], b"Subject: a\r\n" + second + b"\r\n\r\nSubject: c\r\n"), "127.0.0.1")
    assert receiver.mails == 0


def test_quiet_receiver_prints_counts(start: Callable[..., Program]) -> None:
    program = debug(start, "--quiet")
    for _ in range(3):
        with program.smtp() as smtp:
            smtp.send_message(mail())
            smtp.send_message(mail())
    assert program.process.poll() is None
    program.process.send_signal(signal.SIGTERM)
    assert program.seen(program.out, "6 mails")


def test_listens_on_every_address_of_a_name_and_on_both_families(start: Callable[..., Program]) -> None:
    program = debug(start, "--host", "::")
    for host in ("127.0.0.1", "::1") if socket.has_ipv6 else ("127.0.0.1",):
        with smtplib.SMTP(host, program.port, timeout=PATIENCE) as smtp:
            assert smtp.noop()[0] == 250


def test_port_that_is_taken_is_an_error_and_not_a_traceback(start: Callable[..., Program], tmp_path: Path) -> None:
    taken = debug(start).port
    second = Program(tmp_path, "--debug", "--port", str(taken), wait=False)
    assert second.process.wait(PATIENCE) == 78
    assert second.logged("DEVICE_HOST, --port: cannot listen on 'localhost' port")
    second.stop()


@pytest.mark.parametrize(
    "variables, names",
    [
        ({"DEVICE_PORT": "x"}, "DEVICE_PORT"),
        ({"DEVICE_ALLOW": "10.0.0.0/99"}, "DEVICE_ALLOW"),
        ({"DEVICE_OPERATORS": "nobody"}, "DEVICE_OPERATORS"),
        ({"DEVICE_USER": "ops"}, "DEVICE_PASS"),
        ({"DEVICE_TLS_CERT": "/nowhere"}, "DEVICE_TLS_CERT.*/nowhere"),
        ({"DEVICE_TLS_KEY": "k"}, "DEVICE_TLS_CERT: missing, though DEVICE_TLS_KEY is set"),
        ({"DEVICE_MAX_MAIL": "many"}, "DEVICE_MAX_MAIL"),
        ({"DEVICE_TIMEOUT": "soon"}, "DEVICE_TIMEOUT"),
        ({"DEVICE_TIMEOUT": "0"}, "DEVICE_TIMEOUT.*more than 0"),
        ({"DEVICE_MAX_MAIL": "0"}, "DEVICE_MAX_MAIL.*more than 0"),
        ({"DEVICE_HOST": "no such host"}, "DEVICE_HOST"),
        ({"DEVICE_HOST": "a..b"}, "DEVICE_HOST"),
        ({"DEVICE_HOST": "localhost:25"}, "DEVICE_HOST.*without a port"),
        ({"DEVICE_STATE": "/dev/null/x"}, "DEVICE_STATE"),
        ({"DEVICE_ADDRESS": "x"}, "DEVICE_ADDRESS"),
        ({"DEVICE_REPORT_TO": "x"}, "DEVICE_REPORT_TO"),
    ],
)
def test_wrong_setting_stops_the_start_and_names_the_variable(
    tmp_path: Path, variables: dict[str, str], names: str
) -> None:
    program = Program(tmp_path, wait=False, **variables)
    assert program.process.wait(PATIENCE) == 78
    assert program.logged(names)
    program.stop()


def test_address_that_the_machine_does_not_have_yet_is_waited_for(tmp_path: Path) -> None:
    program = Program(tmp_path, wait=False, DEVICE_HOST="192.0.2.1")
    assert program.logged("cannot start yet: DEVICE_HOST: .*; trying again until it works")
    assert program.stop() == 0


def test_login_in_another_encoding_than_utf_8_is_taken_as_its_bytes() -> None:
    rules = emb.rules_from(Settings({"DEVICE_USER": "caf\udce9", "DEVICE_PASS": "\udcff"}), stdio=True)
    assert (rules.user, rules.password) == (b"caf\xe9", b"\xff")


@pytest.mark.parametrize("level", ["debug", "error"])
def test_where_it_listens_is_logged_whatever_the_level(start: Callable[..., Program], level: str) -> None:
    assert debug(start, "--log-level", level).port


def test_input_before_the_greeting_is_out_of_turn(start: Callable[..., Program]) -> None:
    program = debug(start)
    with program.connect() as first, program.connect() as second:
        second.sendall(b"EHLO early\r\n")
        assert talk(first, b"QUIT\r\n")[1].startswith(b"221")
        with second.makefile("rb") as answers:
            assert answers.read().startswith(b"554 5.5.0")


@pytest.mark.parametrize("ending", ["reset", "close", "half-close in the mail"])
def test_peer_that_vanishes_in_a_mail_delivers_nothing_and_the_next_is_served(
    start: Callable[..., Program], tmp_path: Path, ending: str
) -> None:
    program = debug(start, "--maildir", "kept")
    sock = program.connect()
    assert talk(sock, *OPEN)[-1].startswith(b"354")
    sock.sendall(b"Subject: x\r\n\r\nhalf a mail\r\n.")
    if ending == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    elif ending == "half-close in the mail":
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(100) == b""
    sock.close()
    with program.smtp() as smtp:
        smtp.send_message(mail())
    assert len(list((tmp_path / "kept" / "new").iterdir())) == 1


def test_half_closed_peer_still_gets_its_answer(start: Callable[..., Program]) -> None:
    with debug(start).connect() as sock:
        assert talk(sock, *OPEN)[-1].startswith(b"354")
        sock.sendall(b"x\r\n.\r\n")
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(100).startswith(b"250 2.6.0")


def test_answer_reaches_a_peer_that_goes_on_talking(start: Callable[..., Program]) -> None:
    with debug(start).connect() as sock:
        talk(sock)
        with contextlib.suppress(ConnectionError, BrokenPipeError):
            for _ in range(50):
                sock.sendall(b"x" * 65536)
        with sock.makefile("rb") as answers:
            assert answers.readline().startswith(b"421 4.7.0")


def test_silent_and_dripping_peers_are_cut_off_by_the_clock(start: Callable[..., Program]) -> None:
    program = debug(start, DEVICE_TIMEOUT="1")
    for drip in (b"", b"x"):
        with program.connect() as sock:
            talk(sock)
            sock.settimeout(0.2)
            began, answer = time.monotonic(), b""
            while not answer and time.monotonic() - began < PATIENCE:
                with contextlib.suppress(TimeoutError):
                    sock.sendall(drip)
                    answer = sock.recv(100)
            assert answer.startswith(b"421 4.4.2") and time.monotonic() - began < 5


@dataclass
class Turns:
    """A session in a thread over a real connection, with a clock that goes on by `stride` at each look."""

    stride: float
    crowd: bool = False
    rules: emb.Rules = emb.Rules("dev", 1000)  # noqa: RUF009  frozen
    now: float = 0.0

    def clock(self) -> float:
        self.now += self.stride
        return self.now

    def __enter__(self) -> socket.socket:
        self.listener = socket.create_server(("127.0.0.1", 0))
        peer = socket.create_connection(self.listener.getsockname(), PATIENCE)
        sock = self.listener.accept()[0]
        emb.set_tick(sock)
        self.others = socket.create_connection(self.listener.getsockname()) if self.crowd else None
        self.server = emb.Server([self.listener], timeout=60.0)
        self.peer, self.link = peer, emb.Link(sock, "127.0.0.1", self.server, self.clock)
        session = emb.Session(self.rules)
        self.thread = threading.Thread(target=emb.converse, args=(self.link, session, lambda mail: emb.ACCEPTED))
        self.thread.start()
        return peer

    def __exit__(self, *_: object) -> None:
        self.peer.close()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        if self.others:
            self.others.close()
        self.server.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emb, "TICK_SECONDS", 0.02)


@pytest.mark.parametrize("crowd, longest", [(False, 60), (True, 10)])
def test_peer_that_takes_no_answers_is_cut_off_and_sooner_while_others_wait(
    quick: None, crowd: bool, longest: float
) -> None:
    rules = emb.Rules("h" * 8_000_000, 1000)  # a greeting that is more than the kernel keeps for a peer
    turns = Turns(stride=1.0, crowd=crowd, rules=rules)
    with turns:
        turns.thread.join(PATIENCE)
        assert not turns.thread.is_alive()
    assert longest < turns.now < longest + 60


def test_session_ends_after_ten_minutes_however_busy_the_peer_is(quick: None) -> None:
    turns = Turns(stride=4.0)
    with turns as peer, peer.makefile("rb") as answers:
        codes = [answers.readline()[:3]]
        while codes[-1] in (b"220", b"250"):
            peer.sendall(b"NOOP\r\n")
            codes.append(answers.readline()[:3])
    assert codes[-1] == b"421" and len(codes) > 10
    assert 600 < turns.now < 640


@pytest.mark.parametrize("trouble", [MemoryError, ValueError])
def test_session_that_goes_wrong_here_ends_alone(quick: None, trouble: type[Exception]) -> None:
    def fail(address: str) -> bool:
        raise trouble

    with Turns(stride=0.0, rules=emb.Rules("dev", 1000, mailbox=fail)) as peer:
        assert talk(peer, *OPEN[:3])[-1] == emb.FAILED
        assert peer.recv(100) == b""


def test_peer_that_is_gone_before_the_handshake_ends_nothing_else() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with socket.create_connection(listener.getsockname()), listener:
        sock = listener.accept()[0]
        os.close(sock.detach())  # as ssl leaves it then
        server = emb.Server()
        emb.Link(sock, "127.0.0.1", server).close(b"")
        server.close()


def test_stop_signal_ends_a_session_and_the_program(start: Callable[..., Program]) -> None:
    program = debug(start)
    with program.connect() as sock:
        talk(sock, b"EHLO x\r\n")
        began = time.monotonic()
        assert program.stop() == 0
        assert time.monotonic() - began < 5
        assert sock.recv(100).startswith(b"421 4.3.2")


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no such sockets, no systemd")
@pytest.mark.parametrize("flags", [(), ("--to-relay", "localhost:1")])
def test_service_manager_is_told_of_start_and_stop(tmp_path: Path, flags: tuple[str, ...]) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE)
        program = Program(tmp_path, "--port", "0", *flags, NOTIFY_SOCKET=str(tmp_path / "notify"))
        assert manager.recv(100) == b"READY=1"
        with program.smtp() as smtp:
            assert smtp.noop()[0] == 250
        assert program.stop() == 0
        assert manager.recv(100) == b"STOPPING=1"


def test_stop_signal_right_after_the_start_and_a_second_one_are_a_clean_end(tmp_path: Path) -> None:
    for pause in range(8):
        program = Program(tmp_path, "--port", "0")
        time.sleep(pause / 500)  # another moment each time
        began = time.monotonic()
        program.process.send_signal(signal.SIGTERM)
        time.sleep(pause / 500)
        program.process.send_signal(signal.SIGTERM)
        assert program.stop() == 0 and time.monotonic() - began < 5


def test_flood_of_connections_leaves_nothing_behind(start: Callable[..., Program]) -> None:
    program = debug(start)
    for _ in range(30):
        with program.connect() as sock:
            assert talk(sock)[0].startswith(b"220")
    with program.smtp() as smtp:
        assert smtp.noop()[0] == 250
    assert len(os.listdir(f"/proc/{program.process.pid}/fd")) < 20 if Path("/proc").exists() else True


def test_stdio_speaks_the_protocol(tmp_path: Path) -> None:
    program = Program(tmp_path, "--debug", "--stdio", "--trace", wait=False)
    assert program.process.stdin is not None
    assert program.seen(program.out, "^220")
    for line, answer in (
        (b"EHLO x", "250 HELP"),
        (b"AUTH LOGIN dXNlcg==", "334"),
        (b"c2VjcmV0", "235"),
        (b"QUIT", "221"),
    ):
        program.process.stdin.write(line.decode() + "\r\n")
        program.process.stdin.flush()
        assert program.seen(program.out, answer)
    assert program.process.wait(PATIENCE) == 0
    traced = [program.log.get() for _ in range(program.log.qsize())]
    assert any("(user)" in line for line in traced) and not any("c2VjcmV0" in line for line in traced)
    program.stop()


# TLS


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("openssl"):
        pytest.skip("openssl is missing")
    folder = tmp_path_factory.mktemp("tls")
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    made_for = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *made_for, *files]
    subprocess.run(request, check=True, capture_output=True)
    return folder


def secured(start: Callable[..., Program], certificate: Path, **variables: str) -> Program:
    files = {"DEVICE_TLS_CERT": str(certificate / "cert.pem"), "DEVICE_TLS_KEY": str(certificate / "key.pem")}
    return debug(start, **files, **variables)


def starttls(program: Program, certificate: Path) -> ssl.SSLSocket:
    """A connection that is encrypted by now, and is told an end that is a cut."""
    sock = program.connect()
    assert talk(sock, b"EHLO x\r\n", b"STARTTLS\r\n")[-1].startswith(b"220")
    context = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
    return context.wrap_socket(sock, server_hostname="localhost", suppress_ragged_eofs=False)


def test_mail_comes_through_tls(start: Callable[..., Program], certificate: Path) -> None:
    program = secured(start, certificate)
    with smtplib.SMTP("localhost", program.port, timeout=PATIENCE) as smtp:
        smtp.starttls(context=ssl.create_default_context(cafile=str(certificate / "cert.pem")))
        smtp.login("a", "b")
        smtp.send_message(mail(text="x" * 70 + "\n" + "long line\n" * 20_000))
    assert program.seen(program.out, "mail 1 from")


def test_half_closed_peer_still_gets_its_answer_over_tls(start: Callable[..., Program], certificate: Path) -> None:
    with starttls(secured(start, certificate), certificate) as sock:
        for line in OPEN:
            sock.sendall(line)
            assert sock.recv(1000)[:1] in (b"2", b"3")
        sock.sendall(b"x\r\n.\r\n")
        socket.socket.shutdown(sock, socket.SHUT_WR)  # an end of the connection, not of the encryption
        assert sock.recv(100).startswith(b"250 2.6.0")


@pytest.mark.parametrize("ending", ["quit", "early", "slow"])
def test_peer_over_tls_can_tell_the_end_from_a_cut(
    start: Callable[..., Program], certificate: Path, ending: str
) -> None:
    said, answer = {
        "quit": (b"QUIT\r\n", b"221"), "early": (b"NOOP\r\n" * 5000, b"554 5.5.0"), "slow": (b"", b"421 4.4.2")
    }[ending]  # fmt: skip
    program = secured(start, certificate, DEVICE_TIMEOUT="1" if ending == "slow" else "60")
    with starttls(program, certificate) as sock, sock.makefile("rb") as answers:
        sock.sendall(said)
        assert answers.read().startswith(answer)


def test_next_peer_is_not_kept_waiting_by_those_that_do_not_answer_the_end(
    start: Callable[..., Program], certificate: Path
) -> None:
    program = secured(start, certificate)
    began = time.monotonic()
    with contextlib.ExitStack() as silent:
        for _ in range(20):
            silent.enter_context(starttls(program, certificate)).sendall(b"QUIT\r\n")
        with program.smtp() as smtp:
            assert smtp.noop()[0] == 250
    assert time.monotonic() - began < 20 * emb.LINGER_SECONDS / 2


@pytest.mark.parametrize("hello", [b"garbage garbage garbage\r\n", b""])
def test_handshake_that_fails_costs_the_peer_alone(
    start: Callable[..., Program], certificate: Path, hello: bytes
) -> None:
    program = secured(start, certificate)
    with program.connect() as sock:
        assert talk(sock, b"EHLO x\r\n", b"STARTTLS\r\n")[-1].startswith(b"220")
        sock.sendall(hello)
        if not hello:
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while sock.recv(1000):
                pass
    with program.smtp() as smtp:
        assert smtp.noop()[0] == 250


# The device


def test_device_answers_a_command_by_mail(start: Callable[..., Program], tmp_path: Path) -> None:
    receiver = debug(start)
    variables = {"SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(receiver.port), "DEVICE_STATE": str(tmp_path / "state")}
    program = start("--port", "0", **variables)
    with program.smtp() as smtp:
        smtp.sendmail("ops@example.com", "device@localhost", mail("CMD SET relay1=on").as_bytes())
        with pytest.raises(smtplib.SMTPRecipientsRefused) as refused:
            smtp.sendmail("ops@example.com", "other@localhost", b"x")
        assert refused.value.recipients["other@localhost"][0] == 550
    assert receiver.seen(receiver.out, "from <> to <ops@example.com>")
    assert receiver.seen(receiver.out, "relay1: off -> on")
    assert program.stop() == 0
    assert len(list((tmp_path / "state" / "mail" / "new").iterdir())) == 1


def ipv6_name() -> str:
    """A name of this machine's IPv6 loopback, the address itself where it has no name."""
    for name in ("ip6-localhost", "localhost6", "ip6-loopback"):
        with contextlib.suppress(OSError):
            if {item[4][0] for item in socket.getaddrinfo(name, None)} == {"::1"}:
                return name
    return "::1"


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_device_and_the_server_of_its_replies_may_be_ipv6_names(start: Callable[..., Program]) -> None:
    receiver = debug(start, "--host", ipv6_name())
    program = start("--host", ipv6_name(), "--port", "0", SMTP_HOST=ipv6_name(), SMTP_PORT=str(receiver.port))
    with smtplib.SMTP(ipv6_name(), program.port, timeout=PATIENCE) as smtp:
        smtp.sendmail("ops@example.com", "device@localhost", mail("CMD ARM").as_bytes())
    assert receiver.seen(receiver.out, "armed: off -> on")


@pytest.mark.parametrize("mailbox", ["Postmaster", "postmaster@localhost"])
def test_mail_to_postmaster_is_kept_and_obeyed_like_any_other(
    start: Callable[..., Program], tmp_path: Path, mailbox: str
) -> None:
    program = start("--port", "0", DEVICE_STATE="state", DEVICE_SECRET="correct horse")
    with program.smtp() as smtp:
        smtp.sendmail("ops@example.com", mailbox, mail("hello").as_bytes())
        with pytest.raises(smtplib.SMTPDataError, match=r"5\.7\.1"):
            smtp.sendmail("ops@example.com", mailbox, mail("CMD ARM").as_bytes())
        assert smtp.docmd("MAIL", "FROM:<a@b.c>")[0] == 250
        assert smtp.docmd("RCPT", "TO:<postmaster@elsewhere>")[0] == 550
    assert len(list((tmp_path / "state" / "mail" / "new").iterdir())) == 1


def test_reply_that_cannot_be_sent_is_kept_over_a_restart(start: Callable[..., Program], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    variables = {"SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(port), "DEVICE_STATE": str(tmp_path / "state")}
    program = start("--port", "0", **variables)
    with program.smtp() as smtp:
        smtp.sendmail("ops@example.com", "device@localhost", mail("CMD ARM").as_bytes())
    program.process.kill()
    program.process.wait(PATIENCE)
    receiver = debug(start)
    start("--port", "0", **variables | {"SMTP_PORT": str(receiver.port)})
    assert receiver.seen(receiver.out, "armed: off -> on")


def test_state_where_no_file_can_be_made_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "state" / "device.db").mkdir(parents=True)
    program = Program(tmp_path, wait=False, DEVICE_STATE="state")
    assert program.process.wait(PATIENCE) == 78
    assert program.logged("DEVICE_STATE")
    program.stop()


def test_second_device_on_the_same_state_is_sent_away(start: Callable[..., Program], tmp_path: Path) -> None:
    start("--port", "0", DEVICE_STATE="state")
    second = Program(tmp_path, "--port", "0", wait=False, DEVICE_STATE="state")
    assert second.process.wait(PATIENCE) == 75
    second.stop()


def test_signed_subject_of_the_command_line_controls_the_device(start: Callable[..., Program], tmp_path: Path) -> None:
    (tmp_path / "fw.bin").write_bytes(b"hello")
    flags = ("--sign", "UPDATE fw", "--operator", "ops@example.com", "--file", "fw.bin")
    signer = Program(tmp_path, *flags, wait=False, DEVICE_SECRET="correct horse")
    subject = signer.seen(signer.out, "CMD UPDATE fw ~[a-z2-7]{32}$")[0]
    assert signer.process.wait(PATIENCE) == 0
    signer.stop()
    program = start("--port", "0", DEVICE_SECRET="correct horse")
    message = mail(subject)
    message.replace_header("From", "ops@example.com")
    message.add_attachment(b"hello", maintype="application", subtype="octet-stream", filename="fw.bin")
    with program.smtp() as smtp:
        assert not smtp.sendmail("ops@example.com", "device@localhost", message.as_bytes())
        with pytest.raises(smtplib.SMTPDataError, match=r"5\.7\.1"):
            smtp.sendmail("ops@example.com", "device@localhost", mail("CMD ARM").as_bytes())
    assert program.logged("UPDATE fw of ops@example.com")


@pytest.mark.parametrize(
    "flags, secret, says",
    [
        (("ARM", "--operator", "a@b.c"), "", "DEVICE_SECRET: missing"),
        (("ARM",), "s", "--operator: missing"),
        (("ARM", "--operator", "nonsense"), "s", "--operator: 'nonsense' is not a mail address"),
        (("DANCE", "--operator", "a@b.c"), "s", "--sign: 'DANCE' is no command"),
        (("ARM", "--operator", "a@b.c", "--file", "none"), "s", "--file: none"),
        (("UPDATE fw", "--operator", "a@b.c"), "s", "--file: missing; give the attachment"),
        (
            ("SET relay9=on", "--operator", "a@b.c"),
            "s",
            "--sign: there is no parameter 'relay9'; these can be set: name",
        ),
        (
            ("SET threshold=101", "--operator", "a@b.c"),
            "s",
            "--sign: threshold: '101' is wrong; give a whole number from",
        ),
        (("RELAY 1", "--operator", "a@b.c"), "s", "the form is RELAY n ON|OFF"),
    ],
)
def test_sign_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], secret: str, says: str
) -> None:
    monkeypatch.setenv("DEVICE_SECRET", secret)
    assert emb.main(["--sign", *flags]) == 78
    captured = capsys.readouterr()
    assert says in captured.err and not captured.out


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--quiet",), "--quiet goes with --debug"),
        (("--maildir", "box"), "--maildir goes with --debug"),
        (("--to-relay", "localhost:5000", "--quiet"), "--quiet goes with --debug"),
        (("--operator", "a@b.c"), "--operator goes with --sign"),
        (("--debug", "--file", "f"), "--file goes with --sign"),
        (("--ttl", "5m"), "--ttl goes with --sign"),
        (("--sign", "ARM", "--ttl", "0"), "--ttl: '0' is wrong; give 1s to 3650d"),
        (("--sign", "ARM", "--ttl", "soon"), "--ttl: 'soon' is not a duration; write 90 (seconds), 5m"),
        (("--sign", "ARM", "--ttl", "999999d"), "--ttl: '999999d' is wrong; give 1s to 3650d"),
    ],
)
def test_flag_that_would_do_nothing_is_wrong_usage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], says: str
) -> None:
    monkeypatch.setattr(emb, "run", lambda *values, **named: 0)
    with pytest.raises(SystemExit) as caught:
        emb.main(flags)
    assert caught.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize(
    "operator, warned", [("a@b.c", False), ("A@B.C", False), ("Ann <a@b.c>", False), ("x@b.c", True)]
)
def test_sign_for_a_stranger_to_the_device_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], operator: str, warned: bool
) -> None:
    monkeypatch.setenv("DEVICE_SECRET", "s")
    monkeypatch.setenv("DEVICE_OPERATORS", "d@e.f,a@b.c")
    assert emb.main(["--sign", "ARM", "--operator", operator]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("CMD ARM ~")
    assert ("--operator: x@b.c is not among DEVICE_OPERATORS" in captured.err) == warned


def test_network_that_is_not_allowed_gets_554(start: Callable[..., Program]) -> None:
    program = debug(start, DEVICE_ALLOW="10.0.0.0/8")
    with program.connect() as sock, sock.makefile("rb") as answers:
        assert answers.read().startswith(b"554 5.7.1")
