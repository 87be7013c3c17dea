"""harness: what the proofs share. A relay as a real process, clients that keep books, and the nine checks.

    clients (Driver) ──events──▶ relay (Relay: python3 server.py) ──mails──▶ sink (faultsink.Sink)
        sent, acked, refused                                                    delivered

Clients and sink never die; the relay does. Afterwards the books must agree (Stage.check).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import itertools
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faultsink import Sink

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("server.py", "smtp_module.py")
STRACE = shutil.which("strace")
START_S, STOP_S, HEAL_S = 20.0, 5.0, 60.0
FAST = {"ALERT_RETRY_FIRST": "0.1", "ALERT_RETRY_MAX": "0.5", "SMTP_TIMEOUT": "5"}


class Red(Exception):
    """A check failed; the text says which and how."""


class Skipped(Exception):
    """This machine lacks something; the text says what."""


def until(what: str, check: Callable[[], Any], seconds: float = START_S) -> Any:
    """Wait for a condition. Raises Red when it does not come about in time."""
    end = time.monotonic() + seconds
    while not (found := check()):
        if time.monotonic() > end:
            raise Red(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.005)
    return found


def must(condition: object, complaint: str) -> None:
    """Raises Red unless the condition holds."""
    if not condition:
        raise Red(complaint)


def inject(call: str, when: str, effect: str = "signal=KILL") -> list[str]:
    """A command in front of the relay's: strace that kills it (or fails it) at chosen system calls of a thread."""
    if not STRACE:
        raise Skipped("strace is missing")
    # -D: strace is the grandchild, so that the relay is our own child
    fault = f"inject={call}:{effect}:when={when}"
    return [STRACE, "-D", "-f", "-qq", "-o", os.devnull, "-e", f"trace={call}", "-e", fault]


def mutant(folder: Path, product: Path, edits: Sequence[tuple[str, str, str]]) -> Path:
    """A copy of the product with (file, pattern, replacement) applied. A pattern that is not found ends the program."""
    folder.mkdir(exist_ok=True)
    for name in PROGRAMS:
        shutil.copy(product / name, folder)
    for name, pattern, replacement in edits:
        text, number = re.subn(pattern, replacement, (folder / name).read_text("utf-8"), flags=re.M)
        if not number:
            sys.exit(f"{name} has changed: nothing matches {pattern!r}; bring the mutant up to date")
        compile(text, name, "exec")  # a mutant that cannot run proves nothing
        (folder / name).write_text(text, "utf-8")
    return folder


# ───────────────────────────────────────────── The relay ────────────────────────────────────────────


class Relay:
    """The product, as a process that may be started and killed many times over one spool."""

    def __init__(self, folder: Path, smtp_port: int, product: Path = ROOT, **environ: str) -> None:
        self.folder, self.spool, self.log = folder, folder / "alerts.db", folder / "relay.log"
        own = {name: value for name, value in os.environ.items() if not name.startswith(("ALERT_", "SMTP_"))}
        self.environ = own | {
            "ALERT_HOST": "127.0.0.1", "ALERT_PORT": "0", "ALERT_SPOOL": str(self.spool),
            "ALERT_RECIPIENT": "owner@example.org", "SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(smtp_port),
            "SMTP_FROM": "relay@example.org", "PYTHONDONTWRITEBYTECODE": "1",
        } | FAST | environ  # fmt: skip
        self.product, self.port = product, 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *wrapper: str) -> Relay:
        """Start it and wait until it listens. Raises Red."""
        offset = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            command = [*wrapper, sys.executable, str(self.product / "server.py")]
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=self.environ, stdin=subprocess.DEVNULL, stderr=log
            )
        found = until("the relay listens", lambda: self._listening(offset))
        self.port = int(found[1])
        return self

    @contextlib.contextmanager
    def attached(self, strace: str, *options: str) -> Iterator[None]:
        """While inside, strace with these options is attached to it, to the threads to come too."""
        command = [strace, *(word for word in options if word != "-D"), "-p", str(self.pid)]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as tracer:
            try:
                until("strace is attached", lambda: "TracerPid:\t0" not in Path(f"/proc/{self.pid}/status").read_text())
                yield
            finally:
                tracer.terminate()

    def _listening(self, offset: int) -> re.Match[bytes] | None:
        said = self.log.read_bytes()[offset:]
        found = re.search(rb"listening on \S*:(\d+)\s", said)
        if not found and self.dead():
            raise Red(f"the relay did not start: {said[-2000:].decode('utf-8', 'replace')}")
        return found

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def dead(self) -> bool:
        """Has the process ended?"""
        return self.process is None or self.process.poll() is not None

    def signal(self, number: int) -> None:
        """Send it a signal, if it lives."""
        if not self.dead():
            os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9, and reaped."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)
        if self.process:
            self.process.wait()

    def stop(self) -> int:
        """SIGTERM; its exit status. Raises Red when it takes longer than promised."""
        assert self.process is not None
        self.signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_S + 1.0)
        except subprocess.TimeoutExpired:
            raise Red(f"SIGTERM: still running after {STOP_S:.0f} s") from None

    def ask(self, *lines: bytes, timeout: float = 10.0) -> list[dict[str, Any]]:
        """Send lines on a connection of their own; the answers. Raises OSError."""
        with socket.create_connection(("127.0.0.1", self.port), timeout) as sock, sock.makefile("rb") as answers:
            sock.sendall(b"".join(line + b"\n" for line in lines))
            return [json.loads(answers.readline()) for _ in lines]

    def counts(self) -> dict[str, int]:
        """What a ping answers: queued, sent, failed."""
        return self.ask(json.dumps({"ping": 1, "token": self.environ.get("ALERT_TOKEN")}).encode())[0]

    def queue(self) -> list[dict[str, Any]]:
        """What `smtp_module.py queue --json` shows."""
        command = [sys.executable, str(self.product / "smtp_module.py"), "queue", "--json", "--spool", str(self.spool)]
        done = subprocess.run(command, env=self.environ, cwd=self.folder, capture_output=True, check=False)
        must(done.returncode == 0, f"queue: exit {done.returncode}: {done.stderr.decode()}")
        return list(json.loads(done.stdout))

    def limit(self, what: str) -> None:
        """Set a soft limit of the running process: `as=300000000`, `as=unlimited`."""
        subprocess.run([needs("prlimit"), "--pid", str(self.pid), f"--{what}:"], check=True)

    def footprint(self) -> dict[str, int]:
        """Resident and mapped KiB, threads and open files of the process."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        names = ("VmRSS", "VmSize", "Threads")
        found = {name: int(re.search(rf"^{name}:\s+(\d+)", status, re.M)[1]) for name in names}  # type: ignore[index]
        return found | {"fds": len(os.listdir(f"/proc/{self.pid}/fd"))}

    def cpu_s(self) -> float:
        """Processor seconds used so far."""
        used = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(used[11]) + int(used[12])) / os.sysconf("SC_CLK_TCK")

    def said(self, pattern: str) -> int:
        """How many times the log says something."""
        return len(re.findall(pattern, self.log.read_text("utf-8", "replace")))


# ───────────────────────────────────────────── The clients ──────────────────────────────────────────


@dataclass(frozen=True)
class Sent:
    """An event as a client sent it: its line, and what must come out at the other end."""

    id: str
    camera: str
    line: bytes
    picture: str  # SHA-256, or ""


@dataclass
class Books:
    """What the clients know. Nothing is ever taken out."""

    sent: dict[str, Sent] = field(default_factory=dict)
    acked: dict[str, float] = field(default_factory=dict)
    given_up: set[str] = field(default_factory=set)  # refused, and not sent again
    unsure: set[str] = field(default_factory=set)  # once sent without an answer, or to a disk that failed: may be there
    refusals: Counter[str] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)  # seconds from a batch to its last answer
    wrong: list[str] = field(default_factory=list)  # answers that the protocol does not allow


LATER = ("busy", "spool_full", "spool_error", "shutting_down")
GIVE_UP_ON = ("spool_full", "shutting_down")


class Driver:
    """Clients, each a thread with one connection: batches out, answers in, what was not acknowledged again."""

    def __init__(self, port: Callable[[], int], clients: int, seed: int, picture_max: int = 60_000) -> None:
        self.books, self._port, self._picture_max = Books(), port, picture_max
        self._allowed, self._lock, self._idle = 0, threading.Condition(), 0
        self._ended, self._number = False, itertools.count()
        self._threads = [
            threading.Thread(target=self._client, args=(number, random.Random(f"{seed}-{number}")), daemon=True)
            for number in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def allow(self, number: int) -> None:
        """Let the clients make so many more events."""
        with self._lock:
            self._allowed += number
            self._lock.notify_all()

    def left(self) -> int:
        """How many of the allowed events have not been made yet."""
        return self._allowed

    def settled(self) -> bool:
        """Is everything acknowledged (or given up) that was allowed?"""
        return not self._allowed and self._idle == len(self._threads)

    def end(self) -> None:
        """No more; the threads end."""
        with self._lock:
            self._ended = True
            self._lock.notify_all()
        for thread in self._threads:
            thread.join()

    def _client(self, number: int, rng: random.Random) -> None:
        pending: list[Sent] = []
        while not self._ended:
            pending = pending or self._batch(number, rng)
            try:
                with socket.create_connection(("127.0.0.1", self._port()), 10) as sock, sock.makefile("rb") as answers:
                    while pending and not self._ended:
                        pending = self._exchange(sock, answers, pending, rng)
                        if not pending and rng.random() < 0.9:  # most connections are kept
                            pending = self._batch(number, rng)
            except (OSError, ValueError):
                time.sleep(0.01)

    def _batch(self, client: int, rng: random.Random) -> list[Sent]:
        """Some of what is allowed, once something is."""
        with self._lock:
            self._idle += 1
            self._lock.wait_for(lambda: self._allowed or self._ended)
            self._idle -= 1
            count = min(rng.choice((1, 1, 2, 10, 40)), self._allowed)
            self._allowed -= count
        return [self._event(f"c{client}-{next(self._number)}", rng) for _ in range(count)]

    def _event(self, name: str, rng: random.Random) -> Sent:
        fields: dict[str, Any] = {"event": "MOTION_DETECTED", "camera": f"cam{rng.randrange(50)}", "id": name}
        picture = b""
        if rng.random() < 0.3 and self._picture_max:
            picture = b"\xff\xd8\xff" + rng.randbytes(rng.randrange(self._picture_max))
            fields |= {"image_filename": "a.jpg", "image_b64": base64.b64encode(picture).decode()}
        line = json.dumps(fields | {"meta": {"number": 4}}).encode() + b"\n"
        event = Sent(name, fields["camera"], line, hashlib.sha256(picture).hexdigest() if picture else "")
        self.books.sent[name] = event
        return event

    def _exchange(self, sock: socket.socket, answers: Any, batch: list[Sent], rng: random.Random) -> list[Sent]:
        """One batch, and what of it must be sent again. Raises OSError and ValueError."""
        began = time.monotonic()
        sender = threading.Thread(target=_send, args=(sock, b"".join(event.line for event in batch)), daemon=True)
        sender.start()  # answers are read while the batch is still going out
        again, unanswered = [], {event.id for event in batch}
        try:
            for event in batch:
                line = answers.readline()
                if not line.endswith(b"\n"):
                    raise ConnectionError("closed")
                again += self._book(event, json.loads(line), rng)
                unanswered.discard(event.id)
        finally:
            self.books.unsure |= unanswered
        sender.join()
        self.books.waits.append(time.monotonic() - began)
        return again

    def _book(self, event: Sent, answer: dict[str, Any], rng: random.Random) -> list[Sent]:
        if answer.get("ok"):
            if answer["id"] != event.id or answer["status"] not in ("queued", "duplicate"):
                self.books.wrong.append(f"{event.id}: {answer}")
            self.books.acked[event.id] = time.time()
            return []
        self.books.refusals[answer["error"]] += 1
        if answer["error"] == "spool_error":  # which may leave a trace
            self.books.unsure.add(event.id)
        if answer["error"] not in LATER:
            self.books.wrong.append(f"{event.id}: {answer}")
        if answer["error"] in GIVE_UP_ON and rng.random() < 0.1:
            self.books.given_up.add(event.id)
            return []
        return [event]


def _send(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        sock.sendall(data)


# ───────────────────────────────────────────── Stage and checks ─────────────────────────────────────


class Stage:
    """Sink, relay and clients in a folder of their own; on leaving, all of it is gone."""

    def __init__(self, product: Path = ROOT, *, seed: int = 1, clients: int = 3, picture_max: int = 60_000,
                 sink: dict[str, Any] | None = None, **environ: str) -> None:  # fmt: skip
        self.folder = Path(tempfile.mkdtemp(prefix="proof-"))
        self.sink = Sink(self.folder / "got.jsonl", seed=seed, **(sink or {}))
        self.relay = Relay(self.folder, self.sink.port, product, **environ)
        self.driver = Driver(lambda: self.relay.port, clients, seed, picture_max)
        self.books = self.driver.books
        self.incidents = 0  # times at which mails under way may have been cut off
        self.baseline: dict[str, int] = {}

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.relay.kill()
        self.driver.end()
        self.sink.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def offer(self, number: int, seconds: float = HEAL_S) -> None:
        """So many events, all of them acknowledged when this returns. Raises Red."""
        self.driver.allow(number)
        until(f"{number} events acknowledged", self.driver.settled, seconds)

    def heal(self) -> float:
        """Everything works again; seconds until nothing waits. Raises Red."""
        began = time.monotonic()
        self.sink.script()
        if self.relay.dead():
            self.relay.start()
        until("every client has its answer", self.driver.settled, HEAL_S)
        until("nothing waits", lambda: self.relay.counts()["queued"] == 0, HEAL_S)
        return time.monotonic() - began

    def delivered(self) -> dict[str, list[dict[str, Any]]]:
        """The mails in which each id came."""
        mails: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for mail in list(self.sink.mails):
            for name, _ in mail["alerts"]:
                mails[name].append(mail)
        return mails

    def repeats(self) -> int:
        """Copies of mails beyond the first."""
        copies = Counter(mail["message_id"] for mail in self.sink.mails)
        return sum(copies.values()) - len(copies)

    def check(self, *, may_fail: set[str] | None = None) -> None:
        """The nine checks, over a relay that has healed. Raises Red with all that is wrong."""
        complaints = [*self._promise(may_fail or set()), *self._contents(), *self._sound(), *self.books.wrong[:3]]
        if complaints:
            raise Red("; ".join(complaints))

    def _promise(self, may_fail: set[str]) -> Iterator[str]:
        books, mails, queue = self.books, self.delivered(), self.relay.queue()
        failed = {row["id"] for row in queue if row["state"] == "failed"}
        waiting = {row["id"] for row in queue} - failed
        delivered = {name for name, copies in mails.items() if any(mail["answered"] == "yes" for mail in copies)}
        yield from _some("1 lost", books.acked.keys() - delivered - failed - waiting)
        yield from _some("2 still waiting", waiting)
        yield from _some("3 delivered, never sent", mails.keys() - books.sent.keys())
        yield from _some("6 failed without cause", failed - may_fail)
        yield from _some("6 delivered and failed", failed & delivered)
        yield from _some("7 refused, yet delivered", mails.keys() & books.given_up - books.acked.keys() - books.unsure)

    def _contents(self) -> Iterator[str]:
        mails, sent = self.delivered(), self.books.sent
        wrong = {
            name for mail in self.sink.mails for name, camera in mail["alerts"]
            if name in sent and (camera != sent[name].camera or (len(mail["alerts"]) == 1
                and mail["pictures"] != [sent[name].picture] * bool(sent[name].picture)))
        }  # fmt: skip
        yield from _some("4 content changed", wrong)
        names = {name: {mail["message_id"] for mail in copies} for name, copies in mails.items()}
        yield from _some("5 several Message-IDs", {name for name, found in names.items() if len(found) > 1})
        unanswered = sum(mail["answered"] == "unknown" or mail["fault"] == "reset" for mail in self.sink.mails)
        most = self.incidents * int(self.relay.environ.get("ALERT_SENDERS", "2")) + unanswered
        if self.repeats() > most:
            yield f"5 {self.repeats()} repeated mails, where {most} attempts were cut off"

    def _sound(self) -> Iterator[str]:
        if self.baseline:
            until("threads and files as at the start", lambda: not self.grown(), 15)
        for complaint in self.grown():
            yield f"8 {complaint}"
        if self.relay.stop() != 0:
            yield "8 SIGTERM: not exit 0"
        with contextlib.closing(sqlite3.connect(f"file:{self.relay.spool}?mode=ro", uri=True)) as db:
            if (found := db.execute("PRAGMA integrity_check").fetchone()) != ("ok",):
                yield f"8 integrity_check: {found}"
        if traces := self.relay.said("Traceback"):
            yield f"8 {traces} tracebacks in the log"

    def grown(self, slack_mib: int = 200) -> list[str]:
        """What the relay has more of than at the start."""
        now = self.relay.footprint() if self.baseline else {}
        slack = {"VmRSS": slack_mib << 10, "Threads": 6, "fds": 8}
        return [f"{n}: {self.baseline[n]} -> {now[n]}" for n in slack if now and now[n] > self.baseline[n] + slack[n]]

    def figures(self) -> str:
        """One line about the run."""
        books = self.books
        waits = sorted(books.waits) or [0.0]
        p50, p99 = statistics.median(waits), waits[int(len(waits) * 0.99)]
        return (f"{len(books.acked)} acknowledged, {len(self.sink.mails)} mails, {self.repeats()} repeated,"
                f" refused {dict(books.refusals)}, answer p50 {p50 * 1e3:.1f} ms p99 {p99 * 1e3:.0f} ms")  # fmt: skip


def _some(what: str, names: set[str]) -> Iterator[str]:
    if names:
        yield f"{what}: {len(names)} ({', '.join(sorted(names)[:5])}{'…' * (len(names) > 5)})"


# ───────────────────────────────────────────── Commands ─────────────────────────────────────────────


def needs(program: str) -> str:
    """Its path. Raises Skipped."""
    if not (found := shutil.which(program)):
        raise Skipped(f"{program} is missing")
    return found


def certificate(
    folder: Path, name: str = "localhost", days: int = 2, only: ssl.TLSVersion | None = None
) -> ssl.SSLContext:
    """A self-signed certificate, folder/cert.pem and key.pem, as a server's context. Raises Skipped.

    With negative `days` it has expired; `only` is the one version of TLS that the server speaks.
    """
    cert, key, request = folder / "cert.pem", folder / "key.pem", folder / "request.pem"
    names = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    for command in (
        ["req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", request, *names],
        ["x509", "-req", "-in", request, "-signkey", key, "-days", str(days), "-copy_extensions", "copy", "-out", cert],
    ):
        subprocess.run([needs("openssl"), *command], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    if only:
        context.set_ciphers("ALL:@SECLEVEL=0")  # what is old counts as insecure
        with warnings.catch_warnings(action="ignore"):
            context.minimum_version = context.maximum_version = only
    return context


def absolute(text: str) -> Path:
    """A path that means the same in every folder."""
    return Path(text).resolve()


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The flags that every proof has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    anything = random.SystemRandom().randrange(10**6)
    parser.add_argument("--seed", type=int, default=anything, help="of all that is random")
    parser.add_argument("--short", action="store_true", help="a form for the impatient")
    parser.add_argument("--product", type=absolute, default=ROOT, help="the folder with server.py and smtp_module.py")
    return parser


def machine() -> str:
    """Where the figures were taken."""
    versions = f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    return f"{versions}, {platform.system()} {platform.release()}, {os.cpu_count()} cores"


def outcome(proof: Callable[[], str]) -> tuple[bool, str]:
    """Run a proof: did it hold (or could not be run here), and what to say of it."""
    try:
        return True, proof()
    except (Red, OSError, ValueError) as red:
        return False, f"RED: {red or type(red).__name__}"
    except Skipped as reason:
        return True, f"skipped: {reason}"


@dataclass(frozen=True)
class Run:
    """What every row of a table is told."""

    product: Path
    seed: int
    short: bool

    def stage(self, **options: Any) -> Stage:
        """A stage, its relay not yet started."""
        return Stage(self.product, seed=self.seed, **options)


class Table:
    """Rows of (name, how, function): a proof each."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[str, Callable[[Run], str]]] = {}

    def row(self, name: str, how: str) -> Callable[[Callable[[Run], str]], Callable[[Run], str]]:
        """Enter a function in the table."""

        def enter(function: Callable[[Run], str]) -> Callable[[Run], str]:
            self.rows[name] = (how, function)
            return function

        return enter

    def main(self, doc: str | None) -> int:
        """Run the rows and print the table; 1 when one is red."""
        parser = arguments(doc)
        parser.add_argument("--only", default="", metavar="WORD", help="rows whose name holds this")
        args = parser.parse_args()
        chosen = {name: entry for name, entry in self.rows.items() if args.only in name}
        if not chosen:
            parser.error(f"no row is called {args.only!r}; there are: {', '.join(self.rows)}")
        print(f"seed {args.seed}; {machine()}\n\n| fault | how | result | seconds |\n|---|---|---|---|", flush=True)
        red = 0
        for name, (how, function) in chosen.items():
            began = time.monotonic()
            held, words = outcome(lambda: function(Run(args.product, args.seed, args.short)))  # noqa: B023
            red += not held
            print(f"| {name} | {how} | {words} | {time.monotonic() - began:.1f} |", flush=True)
        print(f"\n{len(chosen)} rows, {red} red")
        return 1 if red else 0
