"""harness: what the proofs share: the relay as a real process, clients that remember what they sent, and nine checks.

    clients (Driver) --events--> relay (Relay: python3 server.py) --mails--> sink (faultsink.Sink)

Clients and sink live in the process of the proof and never stop; the relay is killed and started again. At the end
`Stage.check` compares what the clients sent, what was acknowledged to them, what the sink received, and the queue.
"""

from __future__ import annotations

import argparse
import base64
import bisect
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faultsink import Sink

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("client.py", "server.py", "smtp_module.py", "embedded_smtpd.py")
STRACE = shutil.which("strace")
START_S, STOP_S, HEAL_S = 20.0, 5.0, 60.0
FAST = {"ALERT_RETRY_FIRST": "0.1", "ALERT_RETRY_MAX": "0.5", "SMTP_TIMEOUT": "5"}
OWNER = "owner@example.org"
SENDERS = 2  # of the relay
UNWRITTEN_MAX = 16  # finished deliveries that a kill may repeat
REPEATS_MAX = UNWRITTEN_MAX + 2 * SENDERS  # and those in flight: of each sender one, and the one begun with its dot


class Red(Exception):
    """A check failed; the text says which and how."""


class Skipped(Exception):
    """This machine lacks something; the text says what."""


def until(what: str, check: Callable[[], Any], seconds: float = START_S) -> Any:
    """Wait for a condition and return its value. Raises Red when it does not come about in time."""
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
    """Words in front of a command: strace kills it, or fails its calls, at chosen system calls of each thread."""
    if not STRACE:
        raise Skipped("strace is missing")
    # -D: strace is the grandchild, so that the program is our own child.
    fault = f"inject={call}:{effect}:when={when}"
    return [STRACE, "-D", "-f", "-qq", "-o", os.devnull, "-e", f"trace={call}", "-e", fault]


def mutant(folder: Path, product: Path, edits: Sequence[tuple[str, str, str]]) -> Path:
    """A copy of the product with (file, pattern, replacement) applied. A pattern that is not found ends the proof."""
    folder.mkdir(exist_ok=True)
    for name in PROGRAMS:
        shutil.copy(product / name, folder)
    for name, pattern, replacement in edits:
        text, number = re.subn(pattern, replacement, (folder / name).read_text("utf-8"), flags=re.M)
        if not number:
            sys.exit(f"{name} has changed: nothing matches {pattern!r}; bring the mutant up to date")
        compile(text, name, "exec")  # A mutant that cannot run proves nothing.
        (folder / name).write_text(text, "utf-8")
    return folder


# --- Processes ----------------------------------------------------------------------------------------


class Process:
    """One of the four programs, as a process that may be started and killed many times."""

    def __init__(self, folder: Path, product: Path, program: str, **environ: str) -> None:
        self.folder, self.product, self.program = folder, product, program
        self.log = folder / f"{Path(program).stem}.log"
        ours = ("ALERT_", "SMTP_", "DEVICE_")
        own = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        self.environ = own | {"PYTHONDONTWRITEBYTECODE": "1"} | environ
        self.arguments: list[str] = []
        self.port = 0
        self.started: list[float] = []  # Unix times
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *wrapper: str) -> None:
        """Start it and wait until it listens; `wrapper` are words in front of its command. Raises Red."""
        offset = self.log.stat().st_size if self.log.exists() else 0
        command = [*wrapper, sys.executable, str(self.product / self.program), *self.arguments]
        self.started.append(time.time())
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=self.environ, stdin=subprocess.DEVNULL, stderr=log
            )
        found = until(f"{self.program} listens", lambda: self._listening(offset))
        self.port = int(found[1])

    def _listening(self, offset: int) -> re.Match[bytes] | None:
        text = self.log.read_bytes()[offset:]
        found = re.search(rb"listening on \S*:(\d+)\s", text)
        if not found and self.dead():
            raise Red(f"{self.program} did not start: {text[-2000:].decode('utf-8', 'replace')}")
        return found

    @contextlib.contextmanager
    def attached(self, strace: str, *options: str) -> Iterator[None]:
        """While inside, strace with these options is attached to it, to the threads to come, too."""
        command = [strace, *(word for word in options if word != "-D"), "-p", str(self.pid)]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as tracer:
            try:
                until("strace is attached", lambda: "TracerPid:\t0" not in Path(f"/proc/{self.pid}/status").read_text())
                yield
            finally:
                tracer.terminate()

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
        """kill -9, and wait for its end."""
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
        """How many times the pattern occurs in the log."""
        return len(re.findall(pattern, self.log.read_text("utf-8", "replace")))


class Relay(Process):
    """server.py over one spool."""

    def __init__(self, folder: Path, smtp_port: int, product: Path = ROOT, **environ: str) -> None:
        self.spool = folder / "alerts.db"
        settings = {
            "ALERT_HOST": "127.0.0.1", "ALERT_PORT": "0", "ALERT_SPOOL": str(self.spool), "ALERT_RECIPIENT": OWNER,
            "SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(smtp_port), "SMTP_FROM": "relay@example.org",
        } | FAST | environ  # fmt: skip
        super().__init__(folder, product, "server.py", **settings)

    def start(self, *wrapper: str) -> Relay:  # type: ignore[override]
        """Start it and wait until it listens. Raises Red."""
        super().start(*wrapper)
        return self

    def ask(self, *lines: bytes, timeout: float = 10.0) -> list[dict[str, Any]]:
        """Send lines on a connection of their own; the answers. Raises OSError."""
        with socket.create_connection(("127.0.0.1", self.port), timeout) as sock, sock.makefile("rb") as answers:
            sock.sendall(b"".join(line + b"\n" for line in lines))
            return [json.loads(answers.readline()) for _ in lines]

    def counts(self) -> dict[str, int]:
        """What a ping answers: queued, sent, failed."""
        return self.ask(json.dumps({"ping": 1, "token": self.environ.get("ALERT_TOKEN")}).encode())[0]

    def command(self, *words: str) -> bytes:
        """What a command of smtp_module.py prints for this spool. Raises Red."""
        command = [sys.executable, str(self.product / "smtp_module.py"), *words, "--spool", str(self.spool)]
        done = subprocess.run(command, env=self.environ, cwd=self.folder, capture_output=True, check=False)
        must(done.returncode == 0, f"{words[0]}: exit {done.returncode}: {done.stderr.decode()}")
        return done.stdout

    def queue(self) -> list[dict[str, Any]]:
        """What `queue --json` shows."""
        return list(json.loads(self.command("queue", "--json")))


# --- Clients ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """An event as a client sent it: its line, and what its mail must hold."""

    id: str
    camera: str
    line: bytes
    picture: str = ""  # SHA-256, or ""
    marks: frozenset[str] = frozenset()  # words in its long fields


@dataclass
class Record:
    """What the clients have sent and which answers they got. Nothing is ever taken out."""

    sent: dict[str, Sent] = field(default_factory=dict)
    acked: dict[str, float] = field(default_factory=dict)
    given_up: set[str] = field(default_factory=set)  # refused, and not sent again
    unsure: set[str] = field(default_factory=set)  # got no answer, or spool_error, at least once: may be in the spool
    refusals: Counter[str] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)  # seconds from a batch to its last answer
    wrong: list[str] = field(default_factory=list)  # answers that the protocol does not allow


LATER = ("busy", "spool_full", "spool_error", "shutting_down")
GIVE_UP_ON = ("spool_full", "shutting_down")


class Driver:
    """Clients, each a thread with one connection: it sends a batch, reads the answers, and sends again what was not
    acknowledged. Some events have long fields in several scripts, some have pictures."""

    def __init__(
        self, port: Callable[[], int], clients: int, seed: int, picture_max: int = 60_000, long_fields: bool = True
    ) -> None:
        self.record, self._port, self._picture_max, self._long_fields = Record(), port, picture_max, long_fields
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
        """Is everything that was allowed acknowledged or given up?"""
        return not self._allowed and self._idle == len(self._threads)

    def end(self) -> None:
        """End the threads."""
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
                        if not pending and rng.random() < 0.9:  # Most connections are kept.
                            pending = self._batch(number, rng)
            except (OSError, ValueError):
                time.sleep(0.01)

    def _batch(self, client: int, rng: random.Random) -> list[Sent]:
        """Wait until events are allowed, and make some."""
        with self._lock:
            self._idle += 1
            self._lock.wait_for(lambda: self._allowed or self._ended)
            self._idle -= 1
            count = min(rng.choice((1, 1, 2, 10, 40)), self._allowed)
            self._allowed -= count
        return [self._event(f"c{client}-{next(self._number)}", rng) for _ in range(count)]

    def _event(self, name: str, rng: random.Random) -> Sent:
        fields: dict[str, Any] = {"event": "MOTION_DETECTED", "camera": f"cam{rng.randrange(50)}", "id": name}
        picture, marks = b"", set()
        if rng.random() < 0.3 and self._picture_max:
            picture = b"\xff\xd8\xff" + rng.randbytes(rng.randrange(self._picture_max))
            fields |= {"image_filename": "a.jpg", "image_b64": base64.b64encode(picture).decode()}
        if self._long_fields and rng.random() < 0.2:
            marks = lengthen(name, fields, rng)
        else:
            fields["meta"] = {"number": 4}
        line = json.dumps(fields, ensure_ascii=rng.random() < 0.5).encode() + b"\n"
        digest = hashlib.sha256(picture).hexdigest() if picture else ""
        event = Sent(name, fields["camera"], line, digest, frozenset(marks))
        self.record.sent[name] = event
        return event

    def _exchange(self, sock: socket.socket, answers: Any, batch: list[Sent], rng: random.Random) -> list[Sent]:
        """Send one batch; what of it must be sent again. Raises OSError and ValueError."""
        began = time.monotonic()
        sender = threading.Thread(target=_send, args=(sock, b"".join(event.line for event in batch)), daemon=True)
        sender.start()  # Answers are read while the batch is still going out.
        again, unanswered = [], {event.id for event in batch}
        try:
            for event in batch:
                line = answers.readline()
                if not line.endswith(b"\n"):
                    raise ConnectionError("closed")
                again += self._note_answer(event, json.loads(line), rng)
                unanswered.discard(event.id)
        finally:
            self.record.unsure |= unanswered
        sender.join()
        self.record.waits.append(time.monotonic() - began)
        return again

    def _note_answer(self, event: Sent, answer: dict[str, Any], rng: random.Random) -> list[Sent]:
        record = self.record
        if answer.get("ok"):
            if answer["id"] != event.id or answer["status"] not in ("queued", "duplicate"):
                record.wrong.append(f"{event.id}: {answer}")
            record.acked[event.id] = time.time()
            return []
        record.refusals[answer["error"]] += 1
        if answer["error"] == "spool_error":  # It may be in the spool all the same, where the disk came back.
            record.unsure.add(event.id)
        if answer["error"] not in LATER:
            record.wrong.append(f"{event.id}: {answer}")
        if answer["error"] in GIVE_UP_ON and rng.random() < 0.1:
            record.given_up.add(event.id)
            return []
        return [event]


SCRIPTS = ("abcdefghij ", "\u0641\u0627\u0631\u0633\u06cc ", "\u6444\u50cf\u5934", "\U0001f4f7 ", "<b>&amp;\"'\\", f"{'x' * 99} ")


def lengthen(name: str, fields: dict[str, Any], rng: random.Random) -> set[str]:
    """Add a long link, file name and meta to an event; the marks by which its mail shows them."""
    filling = rng.choice(SCRIPTS) * 400
    kinds = ["meta", "last", "link"] + ["file"] * ("image_b64" in fields)
    mark = {kind: f"mark-{name}-{kind}" for kind in kinds}
    # A value is shown up to 2,000 characters.
    values = {f"{filling[:60]} {number}": filling[: rng.randrange(1900)] for number in range(rng.randrange(30))}
    fields["meta"] = values | {"a": f"{mark['meta']} {filling[:1800]}", "zz": mark["last"]}
    fields["image_url"] = f"https://cam.example.org/{mark['link']}/{'x' * rng.randrange(1500)}?a=b&c=d"
    if "file" in mark:
        fields["image_filename"] = f"{'/' * rng.randrange(3000)}a/..\\{mark['file']}.{filling.replace(chr(92), '')}.jpg"
    return set(mark.values())


def _send(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        sock.sendall(data)


# --- Stage and checks ---------------------------------------------------------------------------------


class Stage:
    """Sink, relay and clients in a folder of their own. On leaving, all of it is removed."""

    def __init__(self, product: Path = ROOT, *, seed: int = 1, clients: int = 3, picture_max: int = 60_000,
                 long_fields: bool = True, recipients: Sequence[str] = (OWNER,), sink: dict[str, Any] | None = None,
                 **environ: str) -> None:  # fmt: skip
        self.folder, self.recipients = Path(tempfile.mkdtemp(prefix="proof-")), tuple(recipients)
        self.sink = Sink(self.folder / "got.jsonl", seed=seed, **(sink or {}))
        environ = {"ALERT_RECIPIENT": ",".join(recipients), "ALERT_SENDERS": str(SENDERS)} | environ
        self.relay = Relay(self.folder, self.sink.port, product, **environ)
        self.driver = Driver(lambda: self.relay.port, clients, seed, picture_max, long_fields)
        self.record = self.driver.record
        self.replanned: set[str] = set()  # failed once and were retried: a digest of them may be another message
        self.damaged: set[str] = set()  # their pictures may be missing
        self.baseline: dict[str, int] = {}

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.relay.kill()
        self.driver.end()
        self.sink.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def offer(self, number: int, seconds: float = HEAL_S) -> None:
        """Send so many events; all of them are acknowledged when this returns. Raises Red."""
        self.driver.allow(number)
        until(f"{number} events acknowledged", self.driver.settled, seconds)

    def heal(self, retry: bool = False) -> float:
        """Everything works again; seconds until nothing waits. `retry`: what failed or has to wait for long is sent now,
        as `smtp_module.py retry all` does it. Raises Red."""
        began = time.monotonic()
        self.sink.script()
        if self.relay.dead():
            self.relay.start()
        until("every client has its answer", self.driver.settled, HEAL_S)
        if retry:
            self.replanned |= {row["id"] for row in self.relay.queue() if row["state"] == "failed"}
            self.relay.command("retry", "all")
        self.drain()
        return time.monotonic() - began

    def drain(self) -> None:
        """Wait until nothing waits. Raises Red when for a minute nothing gets less; it says what still waits."""
        least, latest = sys.maxsize, time.monotonic() + HEAL_S
        while queued := self.relay.counts()["queued"]:
            if queued < least:
                least, latest = queued, time.monotonic() + HEAL_S
            if time.monotonic() > latest:
                left = [row for row in self.relay.queue() if row["state"] != "failed"]
                raise Red(f"not within {HEAL_S:.0f} s: nothing waits: {len(left)} wait, {left[:1]}")
            time.sleep(0.03)

    def delivered(self) -> dict[str, list[dict[str, Any]]]:
        """The mails in which each alert came."""
        mails: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for mail in list(self.sink.mails):
            for name, _ in mail["alerts"]:
                mails[name].append(mail)
        return mails

    def repeats(self) -> tuple[dict[int, int], int]:
        """`repeats` of all that the sink received; an alert to a recipient is the same thing, whatever mail it is in."""
        mails = [*self.sink.mails, *self.sink.refused]
        return repeats(mails, self.relay.started, lambda mail: itertools.product((one for one, _ in mail["alerts"]), mail["to"]))

    def check(self, *, may_fail: set[str] | None = None, excused: int = 0) -> None:
        """The nine checks, over a relay that has healed. `may_fail`: ids that may have failed, besides those that were
        refused after their dot; `excused`: repeats that trouble of the machine explains. Raises Red with all that is
        wrong."""
        complaints = [*self._promise(may_fail or set()), *self.contents(), *self._repeated(excused), *self._sound()]
        complaints += self.record.wrong[:3]
        if complaints:
            raise Red("; ".join(complaints))

    def _promise(self, may_fail: set[str]) -> Iterator[str]:
        record, mails, queue = self.record, self.delivered(), self.relay.queue()
        failed = {row["id"] for row in queue if row["state"] == "failed"}
        waiting = {row["id"] for row in queue} - failed
        refused = {name for mail in self.sink.refused if mail["code"] >= 500 for name, _ in mail["alerts"]}
        for recipient in self.recipients:
            delivered = {
                name for name, copies in mails.items()
                if any(mail["answered"] == "yes" and recipient in mail["to"] for mail in copies)
            }  # fmt: skip
            yield from some(f"1 lost for {recipient}", record.acked.keys() - delivered - failed - waiting)
        yield from some("2 still waiting", waiting)
        yield from some("3 delivered, never sent", mails.keys() - record.sent.keys())
        yield from some("6 failed without cause", failed - may_fail - refused)
        yield from some("7 refused, yet delivered", mails.keys() & record.given_up - record.acked.keys() - record.unsure)

    def contents(self) -> Iterator[str]:
        """What is wrong with the contents of the mails and their Message-IDs."""
        yield from some("4 content changed", {name for mail in self.sink.mails for name in self._changed(mail)})
        yield from some("4 more than one recipient", {mail["message_id"] for mail in self.sink.mails if len(mail["to"]) != 1})
        names = {name: {mail["message_id"] for mail in copies} for name, copies in self.delivered().items()}
        changed = {name for name, found in names.items() if len(found) > 1}
        yield from some("5 several Message-IDs", changed - self.replanned)

    def _changed(self, mail: dict[str, Any]) -> Iterator[str]:
        """The ids of the alerts in a mail that are not as they were sent. A digest shows neither links nor meta."""
        single = len(mail["alerts"]) == 1
        at_content = any(fault.startswith(("body:", "dot:")) for fault in self.sink.faults_done)
        for name, camera in mail["alerts"]:
            if sent := self.record.sent.get(name):
                left_out = mail["left_out"] and not mail["pictures"] and (at_content or name in self.damaged)
                whole = left_out or mail["pictures"] == [sent.picture] * bool(sent.picture)
                marks = {mark for mark in sent.marks if not (left_out and mark.endswith("-file"))}
                if camera != sent.camera or (single and not (whole and marks.issubset(mail["marks"]))):
                    yield name

    def _repeated(self, excused: int) -> Iterator[str]:
        by_end, unexplained = self.repeats()
        if unexplained > excused:
            yield f"5 {unexplained} mails were sent again though the server had accepted them"
        if by_end and max(by_end.values()) > REPEATS_MAX:
            yield f"5 {max(by_end.values())} mails were repeated after one end of the relay, not {REPEATS_MAX} at most"

    def _sound(self) -> Iterator[str]:
        if self.baseline:
            with contextlib.suppress(Red):
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
        waits = sorted(self.record.waits) or [0.0]
        p50, p99 = statistics.median(waits), waits[int(len(waits) * 0.99)]
        by_end, unexplained = self.repeats()
        repeated = f"{sum(by_end.values()) + unexplained} repeated (at most {max(by_end.values(), default=0)} after one end)"
        left_out = sum(mail["left_out"] for mail in self.sink.mails)
        return (f"{len(self.record.acked)} acknowledged, {len(self.sink.mails)} mails, {repeated},"
                f"{f' {left_out} without their picture,' * bool(left_out)} refused {dict(self.record.refusals)}, answer p50 {p50 * 1e3:.1f} ms p99 {p99 * 1e3:.0f} ms")  # fmt: skip


def repeats(
    mails: Sequence[dict[str, Any]], started: Sequence[float], things: Callable[[dict[str, Any]], Iterable[object]]
) -> tuple[dict[int, int], int]:
    """Mails that were sent again though the server had accepted them: how many because of the end of each process of the
    sender (by its number; they were `started` at these times), and how many without such a cause.

    `things` are what is in a mail and should come once. A refused attempt counts, too. What the server accepted without
    the sender being able to know it does not.
    """
    attempts: dict[object, list[tuple[float, int]]] = defaultdict(list)
    for number, mail in enumerate(mails):
        for thing in things(mail):
            attempts[thing].append((mail["time"], number))
    by_end: dict[int, set[int]] = defaultdict(set)
    for tries in attempts.values():
        for (_, number), (_, again) in itertools.pairwise(sorted(tries)):
            first, second = mails[number], mails[again]
            if first["answered"] == "yes" and first["fault"] != "reset":
                process, next_one = (bisect.bisect(started, mail["session"]) for mail in (first, second))
                by_end[process if process < next_one else -1].add(again)
    unexplained = len(by_end.pop(-1, ()))
    return {process: len(numbers) for process, numbers in by_end.items()}, unexplained


def some(what: str, names: set[str]) -> Iterator[str]:
    """A complaint about these, if there are any."""
    if names:
        yield f"{what}: {len(names)} ({', '.join(sorted(names)[:5])}{', ...' * (len(names) > 5)})"


# --- Commands -----------------------------------------------------------------------------------------


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
        context.set_ciphers("ALL:@SECLEVEL=0")  # OpenSSL counts old versions as insecure.
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
    parser.add_argument("--short", action="store_true", help="the quick form")
    parser.add_argument("--product", type=absolute, default=ROOT, help="the folder with the four programs")
    return parser


def machine() -> str:
    """Where the figures were taken."""
    versions = f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    return f"{versions}, {platform.system()} {platform.release()}, {os.cpu_count()} cores"


def outcome(proof: Callable[[], str]) -> tuple[bool, str]:
    """Run a proof: did it hold (or could it not be run here), and what to say of it."""
    try:
        return True, proof()
    except (Red, OSError, ValueError) as red:
        return False, f"RED: {red or type(red).__name__}"
    except Skipped as reason:
        return True, f"skipped: {reason}"


@dataclass(frozen=True)
class Run:
    """What every row of a table is given."""

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
        """Run the rows and print the table; 1 when one is red. The last line counts them, and names what was skipped."""
        parser = arguments(doc)
        parser.add_argument("--only", default="", metavar="WORD", help="rows whose name holds this")
        args = parser.parse_args()
        chosen = {name: entry for name, entry in self.rows.items() if args.only in name}
        if not chosen:
            parser.error(f"no row is called {args.only!r}; there are: {', '.join(self.rows)}")
        print(f"seed {args.seed}; {machine()}\n\n| fault | how | result | seconds |\n|---|---|---|---|", flush=True)
        red, skipped = 0, list[str]()
        for name, (how, function) in chosen.items():
            began = time.monotonic()
            held, words = outcome(lambda: function(Run(args.product, args.seed, args.short)))  # noqa: B023
            red += not held
            skipped += [name] * words.startswith("skipped")
            print(f"| {name} | {how} | {words} | {time.monotonic() - began:.1f} |", flush=True)
        print(f"\n{len(chosen)} rows, {red} red{f', {len(skipped)} skipped: ' * bool(skipped)}{'; '.join(skipped)}")
        return 1 if red else 0
