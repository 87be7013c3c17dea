#!/usr/bin/env python3
"""powerloss: the power fails while the relay works. Is what it acknowledged on the disk, and what else is?

kill -9 cannot show that: the kernel keeps what a killed process wrote. So the relay's system calls are recorded with
strace while clients send, and the disk is rebuilt as a power cut would leave it

    at each positive answer      when it starts to be sent to the client
    at each synchronous write    when it begins: between the outcome of a delivery, or an event, and its commit

in these forms:

    dropped   of what was written since the last fsync of its file, nothing has reached the disk
    torn      a random part has, in sectors of 512 bytes, in any order

SQLite then opens the rebuilt spool, which must be sound, and hold

    every id that was acknowledged so far, with its picture unless it was delivered
    no delivery as sent that the mail server had not accepted by then
    no more than 16 accepted deliveries, and those in flight, as not sent: so many mails may come twice

At the end a real relay is started on the disk of the last answer, and on the one with the most outcomes that were not
committed; each must deliver the rest, and repeat no more than that with the same Message-ID. The negative controls, in
which one promise is broken, must be noticed.

Not shown: drives that lie about flushing, and directory entries (a file counts as there once it was made).

    python3 tests/bench/powerloss.py                  500 moments, dropped and torn twice, and the controls
    python3 tests/bench/powerloss.py --points 10000 --torn 5
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import harness
from harness import REPEATS_MAX, Red, Stage

CALLS = "pwrite64,write,sendto,ftruncate,fsync,fdatasync,unlink,rename"
# A whole call, or the beginning of one that was interrupted; and the end of that.
BEGINS = re.compile(
    rb'(?P<thread>\d+) +(?P<time>[\d.]+) (?P<name>\w+)\((?:\d+<(?P<path>[^>]*)>)?'
    rb'(?:(?:, )?"(?P<text>[^"]*)"(?P<cut>\.\.\.)?)?(?P<rest>[^")]*)\)? *(?:= (?P<result>-?\d+)|<unfinished)'
)
RESUMES = re.compile(rb"(\d+) +[\d.]+ <\.\.\. (\w+) resumed>.*= (-?\d+)")
SECTOR = 512
DURABLE = ("", "-wal", "-journal")
ROUND = 400  # crash points recorded with one relay: the trace stays small
CONTROLS = {
    "synchronous=NORMAL": [
        ("smtp_module.py", r"raise .*synchronous=FULL was not taken.*", "pass"),
        ("smtp_module.py", r"synchronous=FULL", "synchronous=NORMAL"),
    ],
    "answers before the commit": [
        ("server.py", r"receipts = self\._outbox\.put\(\[event\.entry for event in events\]\)",
         r"""receipts = [smtp.PutResult(event.entry.id, True) for event in events]
            threading.Timer(0.05, self._outbox.put, ([event.entry for event in events],)).start()"""),
    ],
    "written as sent before the 250": [
        ("smtp_module.py", r"( +)(outcome = transport\.send\(held\[0\]\.message, .*\))",
         r"\1self._outbox.finish(held[0].delivery._replace(state='sent'), self._clock())\n"
         r"\1self._outbox.flush()\n\1\2"),
    ],
    "outcomes are written after a second only": [
        ("smtp_module.py", r"( +)ended = len\(self\._ended\)\n +self\._write_outcomes\(\)",
         r"\1ended = len(self._ended) * bool(self._ended and self._ended[0][1] < time.time() - 1)\n"
         r"\1ended and self._write_outcomes()"),
    ],
}  # fmt: skip


def plain(text: bytes | None) -> bytes:
    """The bytes that strace shows as \\x68\\x69."""
    return bytes.fromhex((text or b"").replace(b"\\x", b"").decode())


@dataclass
class File:
    """One file of the spool: what is surely on disk, and what was written since."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # (offset, data), or (length, None): cut off

    @staticmethod
    def apply(image: bytearray, offset: int, data: bytes | None) -> None:
        """Apply one write to an image."""
        if data is None:
            del image[offset:]
        else:
            image.extend(bytes(max(0, offset - len(image))))
            image[offset : offset + len(data)] = data

    def sync(self, number: int) -> None:
        """The first `number` pending writes have reached the disk."""
        for write in self.pending[:number]:
            self.apply(self.durable, *write)
        del self.pending[:number]

    def after_the_cut(self, rng: random.Random | None) -> bytearray:
        """The file as the power cut leaves it: dropped (no `rng`), or torn."""
        image = bytearray(self.durable)
        for offset, data in self.pending if rng else ():
            if data is None or rng.random() < 0.3:
                if rng.random() < 0.5:
                    self.apply(image, offset, data)
                continue
            for start in range(0, len(data), SECTOR):
                if rng.random() < 0.5:
                    self.apply(image, offset + start, data[start : start + SECTOR])
        return image


class Moment(NamedTuple):
    """A moment at which the power may fail, Unix time; `ids` were acknowledged just now."""

    time: float
    ids: list[str]


class Disk:
    """The files of the spool, driven by the recorded calls."""

    def __init__(self, spool: Path) -> None:
        self._spool = str(spool)
        self.files: dict[str, File] = {}
        self._begun: dict[bytes, tuple[str, File, int, bytes | None, int]] = {}

    def file(self, path: bytes) -> File | None:
        """The file, if what is acknowledged lies in it; `-shm` is memory and the lock is empty."""
        suffix = path.decode().removeprefix(self._spool)
        return self.files.setdefault(suffix, File()) if suffix in DURABLE else None

    def replay(self, trace: Path) -> Iterator[Moment]:
        """Run through the trace; stops at each moment at which the power may fail."""
        with trace.open("rb") as lines:
            for line in lines:
                if resumed := RESUMES.match(line):
                    if begun := self._begun.pop(resumed[1], None):
                        self._finish(*begun, result=int(resumed[3]))
                elif call := BEGINS.match(line):
                    yield from self._call(call)

    def _call(self, call: re.Match[bytes]) -> Iterator[Moment]:
        name, path, text = call["name"].decode(), plain(call["path"]), plain(call["text"])
        if path.startswith(b"socket"):
            if ids := acknowledged(text):
                yield Moment(float(call["time"]), ids)
        elif name in ("unlink", "rename"):
            suffix = text.decode().removeprefix(self._spool)
            harness.must(name == "unlink" or suffix not in self.files, "the spool was renamed; the replay cannot")
            self.files.pop(suffix, None)
        elif file := self.file(path):
            harness.must(not call["cut"], "a write was too long for the trace")
            harness.must(name != "write", "this SQLite writes without pwrite64; the replay cannot")
            sync = name in ("fsync", "fdatasync")
            if sync and file.pending:
                yield Moment(float(call["time"]), [])
            offset = 0 if sync else int(call["rest"].split(b",")[-1])
            begun = (name, file, offset, None if name == "ftruncate" else text, len(file.pending))
            if call["result"] is None:
                self._begun[call["thread"]] = begun
            else:
                self._finish(*begun, result=int(call["result"]))

    def _finish(self, name: str, file: File, offset: int, data: bytes | None, pending: int, *, result: int) -> None:
        """A call has ended: writes count from now on; an fsync covers what was written before it began."""
        if result < 0:
            return
        if name in ("fsync", "fdatasync"):
            file.sync(pending)
        else:
            file.pending.append((offset, data))

    def rebuild(self, spool: Path, rng: random.Random | None) -> None:
        """Write the files as the power cut leaves them."""
        for suffix in (*DURABLE, "-shm"):
            if file := self.files.get(suffix):
                Path(f"{spool}{suffix}").write_bytes(file.after_the_cut(rng))
            else:
                Path(f"{spool}{suffix}").unlink(missing_ok=True)


def acknowledged(data: bytes) -> list[str]:
    """The ids of the positive answers in what is sent to a client."""
    if b'"status": "queued"' not in data and b'"status": "duplicate"' not in data:
        return []
    return [json.loads(line)["id"] for line in data.splitlines() if b'"ok": true' in line and b'"id"' in line]


def record(stage: Stage, trace: Path, points: int, seed: int) -> None:
    """Let clients send until there are enough moments, under strace."""
    if not harness.STRACE:
        raise harness.Skipped("strace is missing")
    options = ["-D", "-f", "-qq", "-y", "-xx", "-ttt", "-s", "4000000", "-o", str(trace), "-e", f"trace={CALLS}"]
    stage.relay.start(harness.STRACE, *options)
    stage.sink.script("dot:451 later%3", "rcpt:450 later%2")
    rng = random.Random(seed)
    while len(stage.record.waits) < points * 1.1:
        stage.offer(min(20, points))
        time.sleep(rng.random() * 0.01)
    stage.heal()
    stage.relay.kill()
    threading.Event().wait(0.2)  # strace is not our child; it writes its last lines.


@dataclass
class Books:
    """What was acknowledged to the clients, and when the mail server accepted which alert, Unix time."""

    sent: dict[str, harness.Sent]
    accepted: dict[str, float]
    acked: set[str] = field(default_factory=set)


def examine(spool: Path, books: Books, when: float, thorough: bool) -> tuple[Counter[str], int]:
    """Open the spool as it was at a moment: what is wrong with it, and how many mails may come twice."""
    wrong: Counter[str] = Counter()
    try:
        with closing(sqlite3.connect(spool)) as db:
            wrong["unsound"] += bool(thorough and db.execute("PRAGMA integrity_check").fetchone() != ("ok",))
            entries = db.execute("SELECT id, state, checksum, payload, data FROM entries LEFT JOIN pictures USING (seq)")
            states = {}
            for name, state, checksum, payload, picture in entries:
                whole = state == "sent" or (sha256(payload) == checksum and picture_of(picture) == books.sent[name].picture)
                states[name] = state if whole else "damaged"
            wrong["lost"] = len(books.acked - states.keys()) + sum(states[name] == "damaged" for name in books.acked & states.keys())
            sent = {name for name, state in states.items() if state == "sent"}
            wrong["sent too early"] = sum(books.accepted.get(name, when) >= when for name in sent)
            repeated = sum(accepted < when and states.get(name) != "sent" for name, accepted in books.accepted.items())
            wrong["too many repeated"] = max(0, repeated - REPEATS_MAX)
            return +wrong, repeated
    except sqlite3.DatabaseError as error:  # While the tables are made, some are missing.
        return +Counter(lost=len(books.acked), unsound=not isinstance(error, sqlite3.OperationalError)), 0


def sha256(data: bytes | None) -> bytes:
    """The digest of a payload; one that is missing has none."""
    return hashlib.sha256(data).digest() if data else b""


def picture_of(data: bytes | None) -> str:
    """The digest of the picture that the spool holds in Base64, "" for none."""
    return hashlib.sha256(base64.b64decode(data)).hexdigest() if data else ""


@dataclass
class Result:
    """What a replay found. `wrong`: at how many moments each kind of fault was found; `worst`: how many of it."""

    points: int = 0
    bad_points: int = 0
    disks: int = 0
    repeated: int = 0  # the most mails that would come twice
    wrong: Counter[str] = field(default_factory=Counter)
    worst: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        text = f"{self.bad_points} of {self.points} moments ({self.disks} disks) break the promise"
        details = [f"{kind}: {number} moments, at most {self.worst[kind]}" for kind, number in self.wrong.items()]
        return f"{text}{' (' * bool(details)}{'; '.join(details)}{')' * bool(details)}, at most {self.repeated} mails twice"

    def add(self, other: Result) -> None:
        """Count more."""
        self.points, self.bad_points = self.points + other.points, self.bad_points + other.bad_points
        self.disks, self.repeated = self.disks + other.disks, max(self.repeated, other.repeated)
        self.wrong += other.wrong
        self.worst |= other.worst


def one_round(product: Path, seed: int, points: int, torn: int) -> Result:
    """Record once and fail the power at the first `points` moments. Raises Red when too few can be recorded."""
    result, rng = Result(), random.Random(seed)
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with Stage(product, seed=seed, clients=4, picture_max=12_000) as stage, \
            tempfile.TemporaryDirectory(dir=memory, prefix="powerloss-") as place:  # fmt: skip
        record(stage, stage.folder / "trace", points, seed)
        disk, spool, worst = Disk(stage.relay.spool), Path(place) / "alerts.db", Path(place) / "worst"
        accepted = {name: mail["time"] for mail in reversed(stage.sink.mails) for name, _ in mail["alerts"]}
        books = Books(stage.record.sent, accepted)
        most, at_worst, moment = -1, (0.0, frozenset[str]()), Moment(0.0, [])
        for moment in disk.replay(stage.folder / "trace"):
            books.acked |= set(moment.ids)
            wrong: Counter[str] = Counter()
            for number in range(1 + torn):
                disk.rebuild(spool, rng if number else None)
                found, repeated = examine(spool, books, moment.time, thorough=result.points % 20 == 0)
                wrong |= found
                if repeated > most:
                    most, at_worst = repeated, (moment.time, frozenset(books.acked))
                    disk.rebuild(worst, None)
            result.add(Result(1, bool(wrong), 1 + torn, most, Counter(wrong.keys()), wrong))
            if result.points == points:
                break
        harness.must(result.points == points, f"only {result.points} moments were recorded, not {points}")
        if not result.bad_points:
            disk.rebuild(spool, None)
            mails = list(stage.sink.mails)
            for files, (when, acked) in ((worst, at_worst), (spool, (moment.time, frozenset(books.acked)))):
                stage.sink.mails = [mail for mail in mails if mail["time"] < when]
                come_back(stage, files, acked)
    return result


def come_back(stage: Stage, files: Path, acked: frozenset[str]) -> None:
    """A real relay starts on a rebuilt disk: all that was acknowledged arrives, before the cut or after it. Raises Red."""
    stage.relay.kill()
    for name in stage.folder.glob("alerts.db*"):
        name.unlink()
    for suffix in DURABLE:
        if Path(f"{files}{suffix}").exists():
            shutil.copy(f"{files}{suffix}", f"{stage.relay.spool}{suffix}")
    stage.relay.start()
    stage.drain()
    by_end, unexplained = stage.repeats()
    complaints = [*harness.some("lost after the power cut", set(acked - stage.delivered().keys())), *stage.contents()]
    if unexplained or max(by_end.values(), default=0) > REPEATS_MAX:
        complaints.append(f"{by_end} mails were repeated after the power cut, {unexplained} without any")
    if complaints:
        raise Red("; ".join(complaints))


def replay(product: Path, seed: int, points: int, torn: int) -> Result:
    """Rounds of recordings with different seeds."""
    total = Result()
    while total.points < points:
        total.add(one_round(product, seed + total.points, min(ROUND, points - total.points), torn))
    return total


def control(product: Path, edits: list[tuple[str, str, str]], seed: int, points: int) -> str:
    """The same with a product that is broken on purpose; what was noticed, "" for nothing."""
    with tempfile.TemporaryDirectory(prefix="control-") as folder:
        try:
            found = replay(harness.mutant(Path(folder), product, edits), seed, points, 0)
        except Red as red:
            return f"{red}"
        return f"{found}" if found.bad_points else ""


def proof(product: Path, seed: int, points: int, torn: int, controlled: bool) -> str:
    """The product must keep the promise, the controls must not. Raises Red."""
    found = replay(product, seed, points, torn)
    harness.must(not found.bad_points, f"{found}")
    words = [f"{found}"]
    for name, edits in CONTROLS.items() if controlled else ():
        noticed = control(product, edits, seed, min(points, 100))
        harness.must(noticed, f"the control, {name}, breaks no promise: this proof sees nothing")
        words.append(f"control, {name}: {noticed}")
    return "\n".join(words)


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--points", type=int, help="moments (500; short: 60)")
    parser.add_argument("--torn", type=int, default=2, help="torn disks at each moment (2)")
    parser.add_argument("--no-control", action="store_true", help="without the negative controls")
    args = parser.parse_args()
    points = args.points or (60 if args.short else 500)
    print(f"powerloss: seed {args.seed}, {points} moments; {harness.machine()}", flush=True)
    held, words = harness.outcome(lambda: proof(args.product, args.seed, points, args.torn, not args.no_control))
    print(words)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
