"""What many tests share: a clock to set, a spool, certificates, and mail servers on free ports."""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452") + bytes(range(256)) * 8


class Clock:
    """A wall clock that stands still until it is set."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def spool() -> Iterator[Path]:
    """Where a spool can be made, in memory where the system has room there: each commit of a real disk costs a sync."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 200 << 20
    with tempfile.TemporaryDirectory(dir=memory if roomy else None) as folder:
        yield Path(folder) / "spool" / "alerts.db"


def wait_for(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Wait until the condition holds and return its value; fail after `seconds`."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "the condition did not come true"
        time.sleep(0.002)
    return value


# certificates, made with the openssl command


@dataclass(frozen=True)
class Certificates:
    """Paths of certificate and key by name: good, wrong (another name), expired, selfsigned; and the signer's."""

    folder: Path

    @property
    def ca(self) -> str:
        return str(self.folder / "ca.pem")

    def pair(self, name: str) -> tuple[str, str]:
        return str(self.folder / f"{name}.pem"), str(self.folder / f"{name}.key")

    def context(self, name: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.pair(name))
        return context


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    def request(name: str, subject: str) -> None:
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        openssl("req", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={subject}")

    def sign(name: str, names: str, *issuer: str) -> None:
        (folder / "extensions").write_text(
            f"subjectAltName={names}\nbasicConstraints={'CA:TRUE' if name == 'ca' else 'CA:FALSE'}\n"
        )
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", "-extfile", "extensions", *issuer)

    by_ca = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
    here = "DNS:localhost,IP:127.0.0.1"
    for name, names, issuer in (
        ("ca", "DNS:signer", ("-days", "30", "-signkey", "ca.key")),
        ("good", here, ("-days", "30", *by_ca)),
        ("wrong", "DNS:elsewhere.example", ("-days", "30", *by_ca)),
        ("expired", here, ("-days", "-1", *by_ca)),
        ("selfsigned", here, ("-days", "30", "-signkey", "selfsigned.key")),
    ):
        request(name, name)
        sign(name, names, *issuer)
    return Certificates(folder)


# a real mail server: aiosmtpd


@dataclass
class Received:
    """A mail as the server got it, with the envelope."""

    sender: str
    recipients: list[str]
    content: bytes


class Mailbox(Controller):
    """aiosmtpd on a free port of 127.0.0.1; keeps what it takes in `mails`."""

    def __init__(self, *, tls: ssl.SSLContext | None = None, implicit: bool = False, **options: Any) -> None:
        self.mails: list[Received] = []
        self.refuse: dict[str, str] = {}  # recipient -> reply
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.options = {"tls_context": None if implicit else tls, **options}
        super().__init__(
            self, hostname="127.0.0.1", port=self.sock.getsockname()[1], ssl_context=tls if implicit else None
        )

    def factory(self) -> SMTP:
        with warnings.catch_warnings():  # it warns of a login without TLS, which some tests want
            warnings.simplefilter("ignore")
            return SMTP(self, hostname="mail.test", ident="test", loop=self.loop, **self.options)

    def _create_server(self) -> Any:  # the library cannot take a free port by itself
        return self.loop.create_server(self._factory_invoker, sock=self.sock, ssl=self.ssl_context)

    def _trigger_server(self) -> None:  # the library would connect once by itself, which spoils what tests count
        self._factory_invoker()

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:
        if address in self.refuse:
            return self.refuse[address]
        envelope.rcpt_tos.append(address)
        return "250 ok"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        self.mails.append(Received(envelope.mail_from or "", list(envelope.rcpt_tos), envelope.original_content))
        return "250 taken"


# a mail server that does what a script says


CLOSE = b""  # close the connection in place of an answer
STALL = b"\0stall"  # say nothing more

Answer = bytes | list[bytes] | Callable[[str], bytes | Iterator[bytes]]


@dataclass
class Scripted:
    """An SMTP server of its own thread a connection, whose answers are scripted by verb.

    Keys are the verbs, "greeting", and "." for the answer to the mail. A list is used up one by one, then the
    usual answer follows; a function may return or yield. `hears` limits the bytes of a mail that are read before
    the connection breaks. `loses`: what comes in one packet with a "command", or with the "dot", is lost. `implicit`:
    TLS from the first byte.
    """

    answers: dict[str, Answer] = field(default_factory=dict)
    extensions: tuple[str, ...] = ("PIPELINING", "8BITMIME")
    tls: ssl.SSLContext | None = None
    implicit: bool = False
    hears: int | None = None
    loses: str = ""
    host: str = "127.0.0.1"
    port: int = 0
    commands: list[str] = field(default_factory=list)
    mails: list[Received] = field(default_factory=list)
    connections: int = 0

    def __post_init__(self) -> None:
        self.listener = socket.create_server((self.host, self.port), backlog=50)
        self.port = self.listener.getsockname()[1]
        self.open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def verbs(self) -> list[str]:
        return [line.split()[0].split(":")[0].upper() for line in self.commands]

    def stop(self) -> None:
        self.listener.close()
        for sock in self.open:
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            self.open.append(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _say(
        self, sock: socket.socket, key: str, line: str, usual: bytes, mail: Received | None = None
    ) -> bytes:
        """Answer; the bytes said last, CLOSE for none. A mail that is taken is in `mails` before anybody is told."""
        answer: Any = self.answers.get(key, usual)
        if isinstance(answer, list):
            answer = answer.pop(0) if answer else usual
        elif callable(answer):
            answer = answer(line)
        if answer == STALL:
            sock.recv(1)  # until the peer has had enough
            answer = CLOSE
        for piece in [answer] if isinstance(answer, bytes) else answer:
            if mail and piece.startswith(b"250"):
                self.mails.append(mail)
            sock.sendall(piece)
            answer = piece
        return answer

    def _serve(self, sock: socket.socket) -> None:
        try:
            self._session(sock)
        except (OSError, ValueError):
            pass
        finally:
            sock.close()

    def _session(self, sock: socket.socket) -> None:  # noqa: C901, PLR0912  one verb a branch
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.implicit and self.tls:
            sock = self._wrap(sock)
        if not self._say(sock, "greeting", "", b"220 scripted\r\n"):
            return
        reader = Reader(sock)
        sender, recipients = None, list[str]()
        while raw := reader.line():
            line = raw.decode("utf-8", "replace").rstrip("\r\n")
            self.commands.append(line)
            if self.loses == "command":
                reader.received = b""
            verb = line.partition(" ")[0].upper()
            said = self._say(sock, verb, line, self._usual(verb, sender is not None, bool(recipients)))
            if not said or verb == "QUIT":
                return
            good = said[:1] in (b"2", b"3")
            if verb == "MAIL" and good:
                sender, recipients = line.partition("<")[2].partition(">")[0], []
            elif verb == "RCPT" and good:
                recipients.append(line.partition("<")[2].partition(">")[0])
            elif verb == "STARTTLS" and good and self.tls:
                sock = self._wrap(sock)
                reader = Reader(sock)
            elif verb == "DATA" and said.startswith(b"354"):
                if self.hears is not None:
                    reader.hear(self.hears)
                    return sock.close()
                mail = Received(sender or "", recipients, _read_mail(reader))
                if self.loses == "dot":
                    reader.received = b""
                said = self._say(sock, ".", "", b"250 taken\r\n" if recipients else b"554 nobody\r\n", mail)
                if not said:
                    return
                sender, recipients = None, []
            elif verb == "RSET":
                sender, recipients = None, []

    def _wrap(self, sock: socket.socket) -> ssl.SSLSocket:
        assert self.tls is not None
        wrapped = self.tls.wrap_socket(sock, server_side=True)
        self.open.append(wrapped)
        return wrapped

    def _usual(self, verb: str, begun: bool, anybody: bool) -> bytes:
        if verb == "EHLO":
            names = ("scripted", *self.extensions)
            return "".join(f"250{'-' if n < len(names) else ' '}{name}\r\n" for n, name in enumerate(names, 1)).encode()
        usual = {"DATA": b"354 go on\r\n" if anybody else b"554 nobody\r\n", "AUTH": b"235 welcome\r\n"}
        usual |= {"STARTTLS": b"220 go on\r\n", "QUIT": b"221 bye\r\n"}
        if not begun:
            usual["RCPT"] = b"503 MAIL first\r\n"
        return usual.get(verb, b"250 ok\r\n")


class Reader:
    """Lines from a socket; `received` is what came with the last one."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self.received = sock, b""

    def line(self) -> bytes:
        while b"\n" not in self.received:
            if not (chunk := self._sock.recv(1 << 16)):
                return b""
            self.received += chunk
        line, end, self.received = self.received.partition(b"\n")
        return line + end

    def hear(self, number: int) -> None:
        while len(self.received) < number and (chunk := self._sock.recv(1 << 16)):
            self.received += chunk


def _read_mail(reader: Reader) -> bytes:
    lines = []
    while (line := reader.line()) != b".\r\n":
        if not line:
            raise OSError("the mail was cut off")
        lines.append(line.removeprefix(b"."))
    return b"".join(lines)


@pytest.fixture
def mailbox() -> Iterator[Callable[..., Mailbox]]:
    started: list[Mailbox] = []

    def start(**options: Any) -> Mailbox:
        box = Mailbox(**options)
        box.start()
        started.append(box)
        return box

    yield start
    for box in started:
        box.stop()


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    started: list[Scripted] = []

    def start(**options: Any) -> Scripted:
        started.append(Scripted(**options))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def pytest_configure() -> None:
    """The programs under test must hear Ctrl-C, though a shell may have started the tests deaf to it (`pytest &`)."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """motion needs 30 s to call a camera lost: the others run meanwhile."""
    items.sort(key=lambda item: item.name == "test_motion_reports_a_lost_camera")
