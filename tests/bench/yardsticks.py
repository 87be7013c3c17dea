"""yardsticks: how fast others do the same work on the same machine, in the same run.

Programs in C (Postfix and its smtp-sink and smtp-source), SQLite by itself, aiosmtpd, and the plain way to write an
alert server: a thread a connection, the email package, smtplib, nothing on disk. What is missing here raises Skipped.

    python3 tests/bench/yardsticks.py PORT SMTP_PORT      the plain server, as bench.py starts it; SMTP_PORT 0: no mails
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import smtplib
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path

from harness import ROOT, Skipped, until

sys.path.insert(0, str(ROOT / "tests"))
from neighbours import SBIN, Postfix, free_port, open_folder

SINK, SOURCE = (shutil.which(name, path=SBIN) for name in ("smtp-sink", "smtp-source"))
SMALL, PICTURE = 3_000, 277_000  # bytes of an alert's mail: alone, and with a picture of 200 KB


# ───────────────────────────────────────────── Servers ──────────────────────────────────────────────


@contextlib.contextmanager
def process(port: int, *command: str) -> Iterator[int]:
    """A server as a process that answers at this port, ended afterwards."""
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tempfile.gettempdir())

    def answers() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return False
        return True

    try:
        until(f"{command[0]} answers", answers)
        yield port
    finally:
        running.terminate()
        running.wait()


def smtp_sink() -> contextlib.AbstractContextManager[int]:
    """Postfix's receiver, in C: takes mail as fast as it comes, and forgets it."""
    if not SINK:
        raise Skipped("Postfix's smtp-sink is not installed")
    port = free_port()
    user = ("-u", "nobody") if os.geteuid() == 0 else ()
    return process(port, SINK, *user, f"127.0.0.1:{port}", "1000")


def debug_receiver() -> contextlib.AbstractContextManager[int]:
    """Our own receiver, counting."""
    port = free_port()
    words = ("--debug", "--quiet", "--host", "127.0.0.1", "--port", str(port))
    return process(port, sys.executable, str(ROOT / "embedded_smtpd.py"), *words)


def aiosmtpd() -> contextlib.AbstractContextManager[int]:
    """The receiver of the asyncio world, told to forget what it takes."""
    if not importlib.util.find_spec("aiosmtpd"):
        raise Skipped("aiosmtpd is not installed")
    port = free_port()
    words = ("-n", "-c", "aiosmtpd.handlers.Sink", "-l", f"127.0.0.1:{port}")
    return process(port, sys.executable, "-m", "aiosmtpd", *words)


END_OF_MAIL = b"\r\n.\r\n"
ANSWERS = {b"EHLO": b"250-counter\r\n250 PIPELINING\r\n", b"DATA": b"354 go on\r\n", b"QUIT": b"221 bye\r\n"}


class Counter:
    """A receiver in a process of its own that does nothing but count: it takes less of the machine than any other."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._taken = multiprocessing.Value("q", 0)
        self._process = multiprocessing.Process(target=self._serve, daemon=True)

    def __enter__(self) -> Counter:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._listener.close()

    def taken(self) -> int:
        """Mails so far."""
        return int(self._taken.value)

    def _serve(self) -> None:
        while True:
            threading.Thread(target=self._session, args=(self._listener.accept()[0],), daemon=True).start()

    def _session(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(b"220 ready\r\n")
        rest, end = b"", b"\r\n"  # of a command, or of a mail
        while chunk := sock.recv(1 << 16):
            rest, answers = rest + chunk, b""
            while end in rest:
                said, _, rest = rest.partition(end)
                if end == END_OF_MAIL:
                    with self._taken.get_lock():
                        self._taken.value += 1
                    end, verb = b"\r\n", b""
                else:
                    verb = said[:4].upper()
                if verb == b"DATA":
                    rest, end = b"\r\n" + rest, END_OF_MAIL
                answers += ANSWERS.get(verb, b"250 ok\r\n")
            if end == END_OF_MAIL:
                rest = rest[-4:]
            if answers:
                sock.sendall(answers)


def plain_server(smtp_port: int = 0) -> contextlib.AbstractContextManager[int]:
    """`serve_plainly` as a process."""
    port = free_port()
    return process(port, sys.executable, __file__, str(port), str(smtp_port))


def serve_plainly(port: int, smtp_port: int) -> None:
    """A thread a connection, a mail through a new SMTP connection before each answer; nothing is kept on disk."""

    def session(sock: socket.socket) -> None:
        with sock, sock.makefile("rwb") as lines:
            for line in lines:
                event = json.loads(line)
                picture = base64.b64decode(event.get("image_b64", ""))
                if smtp_port:
                    with smtplib.SMTP("127.0.0.1", smtp_port) as smtp:
                        smtp.send_message(plain_mail(event, picture))
                lines.write(b'{"ok": true, "status": "queued"}\n')
                lines.flush()

    with socket.create_server(("127.0.0.1", port)) as listener:
        while True:
            threading.Thread(target=session, args=(listener.accept()[0],), daemon=True).start()


def plain_mail(event: dict[str, str], picture: bytes) -> EmailMessage:
    """An alert as the email package makes it."""
    mail = EmailMessage()
    mail["Subject"] = f"DVR ALERT: {event['event']} - {event['camera']}"
    mail["From"], mail["To"] = "relay@example.org", "owner@example.org"
    mail.set_content("".join(f"{name}: {value}\n" for name, value in event.items() if name != "image_b64"))
    if picture:
        mail.add_attachment(picture, maintype="image", subtype="jpeg", filename=event["image_filename"])
    return mail


# ───────────────────────────────────────────── Figures ──────────────────────────────────────────────


def per_second(number: int, began: float) -> float:
    """The rate of so many since then."""
    return number / (time.perf_counter() - began)


def source(port: int, number: int, size: int, connections: int = 1) -> float:
    """Mails a second that smtp-source gets rid of."""
    if not SOURCE:
        raise Skipped("Postfix's smtp-source is not installed")
    envelope = ("-f", "a@example.com", "-t", "device@localhost")
    load = ("-d", "-s", str(connections), "-m", str(number), "-l", str(size))
    began = time.perf_counter()
    subprocess.run([SOURCE, *load, *envelope, f"127.0.0.1:{port}"], check=True, capture_output=True)
    return per_second(number, began)


def sqlite_commits(number: int) -> float:
    """Rows a second, each on disk before the next."""
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(sqlite3.connect(f"{folder}/row.db")) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("CREATE TABLE rows(id TEXT PRIMARY KEY, payload BLOB)")
        began = time.perf_counter()
        for count in range(number):
            with db:
                db.execute("INSERT INTO rows VALUES (?, ?)", (str(count), b"x" * 120))
        return per_second(number, began)


@contextlib.contextmanager
def postfix(smtp_port: int, **settings: str) -> Iterator[Postfix]:
    """A Postfix in a temporary folder that sends everything to this port."""
    if reason := Postfix.missing():
        raise Skipped(reason)
    with open_folder() as folder, Postfix(Path(folder), f"[127.0.0.1]:{smtp_port}", **settings) as running:
        yield running


def postfix_accepts(connections: int, number: int) -> float:
    """Mails a second onto Postfix's disk, where they are held: it does nothing else meanwhile."""
    with postfix(1, smtpd_data_restrictions="check_client_access static:HOLD") as running:
        rate = source(running.port, number, SMALL, connections)
        assert running.waiting() == number
        return rate


def postfix_delivers(receiver: Counter, number: int, size: int) -> float:
    """Mails a second through Postfix, from the first one sent to it to the last one taken."""
    with postfix(receiver.port) as running:
        wanted = receiver.taken() + number
        began = time.perf_counter()
        source(running.port, number, size, connections=4)
        until("all is sent", lambda: receiver.taken() >= wanted, 600)
        return per_second(number, began)


def smtplib_delivers(smtp_port: int, number: int, picture: bytes) -> float:
    """Mails a second with the email package and smtplib over one kept connection."""
    event = {"event": "MOTION_DETECTED", "camera": "cam1", "image_filename": "snap.jpg"}
    with smtplib.SMTP("127.0.0.1", smtp_port) as smtp:
        began = time.perf_counter()
        for _ in range(number):
            smtp.send_message(plain_mail(event, picture))
        return per_second(number, began)


if __name__ == "__main__":
    serve_plainly(int(sys.argv[1]), int(sys.argv[2]))
