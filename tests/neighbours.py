"""Neighbours: what the tests and benchmarks with other people's programs share.

Blocks of the README as the tests run them, our own programs as processes, and a Postfix of one's own.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 20.0  # how long a condition may take on a busy machine
SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # daemons lie there; a user's PATH often lacks it
README_FOLDER = "/opt/dvr/"  # where the README has the four programs


def until(what: str, condition: Callable[[], Any], seconds: float = PATIENCE_S) -> Any:
    """Wait for a condition and return its value; fail, saying what did not come about."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.01)
    return found


def free_port() -> int:
    """A free port of 127.0.0.1 outside the range from which the kernel takes ports for outgoing connections."""
    while True:
        port = random.randint(20_000, 31_999)
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


@contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder that other users may enter, as daemons that give up root must; pytest's own they may not."""
    folder = Path(tempfile.mkdtemp(prefix="dvr-neighbours-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


# The README


def readme_block(first_line: str) -> str:
    """The one fenced block of the README that begins with this line (a comment that names the file, or a command)."""
    blocks = re.findall(r"(?ms)^```\w*\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"))
    (found,) = [block for block in blocks if block.startswith(first_line)]
    return str(found)


def adapted(text: str, **places: object) -> str:
    """A block of the README for this machine: our folder, this Python, and what else is to be put in place of what.

    Every place must occur: a README that says something else is noticed.
    """
    text = text.replace(README_FOLDER, f"{ROOT}/").replace("python3 ", f"{sys.executable} ")
    for old, new in places.items():
        assert old in text, f"the README's block does not hold {old!r}"
        text = text.replace(old, str(new))
    return text


# Our own programs


class Program:
    """One of the four programs as a process, its standard error in `folder/name.log`."""

    def __init__(self, folder: Path, *words: str, name: str = "", **variables: str) -> None:
        self.folder, self.words, self.variables = folder, words, variables
        self.log = folder / f"{name or Path(words[0]).stem}.log"
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start, and wait for the port that it logs. The same again after `end` takes the same port."""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / self.words[0]), *self.words[1:]],
                cwd=self.folder, env=environment(**self.variables), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.port = int(until(f"{self.words[0]} listens: {self.log.read_text()}", self._listening)[1])

    def _listening(self) -> re.Match[str] | None:
        assert self.process.poll() is None, self.log.read_text()
        return re.search(r"listening on \S+:(\d+)\n", self.log.read_text())

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send the signal, unless it has ended, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


def environment(**variables: str) -> dict[str, str]:
    """The environment without settings of ours, and these variables."""
    ours = ("ALERT_", "SMTP_", "DEVICE_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | variables


# Postfix


MAIN_CF = {
    "compatibility_level": "3.6",
    "maillog_file_prefixes": "/",
    "inet_interfaces": "127.0.0.1",
    "inet_protocols": "ipv4",
    "myhostname": "mx.test",
    "mydestination": "",
    "mynetworks": "127.0.0.0/8",
    "smtpd_relay_restrictions": "permit_mynetworks, reject",
    "smtp_dns_support_level": "disabled",
    "minimal_backoff_time": "1s",
    "maximal_backoff_time": "1s",
    "queue_run_delay": "1s",
    "alias_maps": "",
    "alias_database": "",
}
MASTER_CF = """
127.0.0.1:{port} inet n - n - - smtpd
postlog unix-dgram n - n - 1 postlogd
pickup unix n - n 60 1 pickup
qmgr unix n - n 300 1 qmgr
cleanup unix n - n - 0 cleanup
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
tlsmgr unix - - n 1000? 1 tlsmgr
smtp unix - - n - - smtp
relay unix - - n - - smtp
showq unix n - n - - showq
error unix - - n - - error
retry unix - - n - - error
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
"""
QUEUES = (
    "active", "bounce", "corrupt", "defer", "deferred", "flush", "hold", "incoming", "maildrop", "private", "public",
    "saved", "trace",
)  # fmt: skip


class Postfix:
    """A Postfix of one's own in `folder` (which the user postfix must be able to enter), on one port of 127.0.0.1.

    It takes mail of this machine for anybody and sends all of it to `relayhost` ("[127.0.0.1]:2525"). `main` is more
    for main.cf, and wins; `master` is more for master.cf. Nothing of the machine's own Postfix is touched.

        with open_folder() as folder, Postfix(folder, "[127.0.0.1]:2525") as postfix:
            send_mail_to(postfix.port)
    """

    def __init__(self, folder: Path, relayhost: str, master: str = "", **main: str) -> None:
        self.folder, self.port = folder, free_port()
        self.conf, self.log_file = folder / "conf", folder / "maillog"
        places = {"queue_directory": folder / "queue", "data_directory": folder / "data", "maillog_file": self.log_file}
        for name in ("conf", "queue", "data", "queue/pid", *(f"queue/{name}" for name in QUEUES)):
            (folder / name).mkdir()
        for name in ("data", *(f"queue/{name}" for name in QUEUES)):
            shutil.chown(folder / name, "postfix")
            (folder / name).chmod(0o700)
        (folder / "queue" / "quick-start").touch()  # it need not look at its own installation, which takes seconds
        lines = MAIN_CF | {name: str(place) for name, place in places.items()} | {"relayhost": relayhost} | main
        (self.conf / "main.cf").write_text("".join(f"{name} = {value}\n" for name, value in lines.items()))
        (self.conf / "master.cf").write_text(MASTER_CF.format(port=self.port) + master)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @staticmethod
    def missing() -> str:
        """Why there can be none here; "" where there can."""
        if not shutil.which("postfix", path=SBIN):
            return "postfix is not installed"
        return "" if os.geteuid() == 0 else "an own Postfix needs root"

    def start(self) -> Self:
        """Start it and wait until it accepts connections."""
        self._postfix("start")
        until("Postfix accepts connections", self._accepts)
        return self

    def stop(self) -> None:
        """Stop it, if it runs; what it holds stays in its queue."""
        if self.running():
            self._postfix("abort")  # like stop, but it does not wait for idle processes
            until("Postfix has stopped", lambda: not self.running())

    def running(self) -> bool:
        return self._postfix("status", check=False) == 0

    def log(self) -> str:
        """What it has logged so far."""
        return self.log_file.read_text("utf-8", "replace") if self.log_file.exists() else ""

    def waiting(self) -> int:
        """How many mails are in its queue, those that it is sending included."""
        folders = (self.folder / "queue" / name for name in ("maildrop", "incoming", "active", "deferred", "hold"))
        return sum(path.is_file() for folder in folders for path in folder.rglob("*"))

    def _postfix(self, command: str, *, check: bool = True) -> int:
        # never a pipe: the daemons would hold it open
        with (self.folder / "command.log").open("ab") as log:
            done = subprocess.run(
                ["postfix", "-c", str(self.conf), command], env=os.environ | {"PATH": SBIN},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False, timeout=60,
            )  # fmt: skip
        assert not check or done.returncode == 0, (self.folder / "command.log").read_text() + self.log()
        return done.returncode

    def _accepts(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True
