#!/usr/bin/env python3
"""powerloss: the power fails at the instant each acknowledgement starts to be sent. Is the event on the disk?

kill -9 cannot answer that: the kernel keeps what a killed process wrote. So the relay's system calls are recorded
with strace while clients send, and the disk is rebuilt as a power cut would leave it at each positive answer:

    dropped   of what was written since the last fsync of its file, nothing has reached the disk
    torn      a random part has, in sectors of 512 bytes, in any order

SQLite then opens the rebuilt spool; every id acknowledged up to and with this answer must stand in it, with its
picture unless it was delivered, and the file must be sound. At the end a real relay is started on the last rebuilt disk
and must deliver all of it. The negative controls must lose: the relay with synchronous=NORMAL, and one that does not
sync its pictures.

Not shown: drives that lie about flushing, and directory entries (a file counts as there once it was made).

    python3 tests/bench/powerloss.py                  500 crash points, dropped and torn twice, and the control
    python3 tests/bench/powerloss.py --points 10000 --torn 5
"""

from __future__ import annotations

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
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import harness
from harness import Red, Stage

CALLS = "pwrite64,lseek,write,sendto,ftruncate,fsync,fdatasync,unlink,rename"
# a whole call, or the beginning of one that was interrupted; and its end
BEGINS = re.compile(
    rb'(?P<thread>\d+) +(?P<name>\w+)\((?:\d+<(?P<path>[^>]*)>)?(?:(?:, )?"(?P<text>[^"]*)"(?P<cut>\.\.\.)?)?'
    rb'(?P<rest>[^")]*)\)? *(?:= (?P<result>-?\d+)|<unfinished)'
)
RESUMES = re.compile(rb"(\d+) +<\.\.\. (\w+) resumed>.*= (-?\d+)")
SECTOR = 512
CONTROLS = {
    "synchronous=NORMAL": [
        ("smtp_module.py", r"raise .*synchronous=FULL was not taken.*", "pass"),
        ("smtp_module.py", r"synchronous=FULL", "synchronous=NORMAL"),
        ("smtp_module.py", r"'FULL' if durable", "'NORMAL' if durable"),
    ],
    "pictures not synced": [("smtp_module.py", r"^( +)sync\(self\._file\)$", r"\1pass")],
}
DURABLE = ("", "-wal", "-journal", ".pictures")
ROUND = 400  # crash points recorded with one relay: the trace stays small


def plain(text: bytes | None) -> bytes:
    """strace's \\x68\\x69 -> the bytes."""
    return bytes.fromhex((text or b"").replace(b"\\x", b"").decode())


@dataclass
class File:
    """One file of the spool: what is surely on disk, and what was written since."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # (offset, data), or (length, None): cut off

    @staticmethod
    def put(image: bytearray, offset: int, data: bytes | None) -> None:
        """Apply one write to an image."""
        if data is None:
            del image[offset:]
        else:
            image.extend(bytes(max(0, offset - len(image))))
            image[offset : offset + len(data)] = data

    def sync(self, number: int) -> None:
        """The first `number` pending writes have reached the disk."""
        for write in self.pending[:number]:
            self.put(self.durable, *write)
        del self.pending[:number]

    def after_the_cut(self, rng: random.Random | None) -> bytearray:
        """The file as the power cut leaves it: dropped (no `rng`), or torn."""
        image = bytearray(self.durable)
        for offset, data in self.pending if rng else ():
            if data is None or rng.random() < 0.3:
                if rng.random() < 0.5:
                    self.put(image, offset, data)
                continue
            for start in range(0, len(data), SECTOR):
                if rng.random() < 0.5:
                    self.put(image, offset + start, data[start : start + SECTOR])
        return image


class Disk:
    """The files of the spool, driven by the recorded calls."""

    def __init__(self, spool: Path) -> None:
        self._spool = str(spool)
        self.files: dict[str, File] = {}
        self._begun: dict[bytes, tuple[str, File, int, bytes | None, int]] = {}
        self._at = 0  # where the next write into the pictures goes

    def file(self, path: bytes) -> File | None:
        """The file, if what is acknowledged lies in it; `-shm` is memory and the lock is empty."""
        suffix = path.decode().removeprefix(self._spool)
        return self.files.setdefault(suffix, File()) if suffix in DURABLE else None

    def replay(self, trace: Path) -> Iterator[list[str]]:
        """Run through the trace; stops with the ids of each positive answer that starts to be sent."""
        with trace.open("rb") as lines:
            for line in lines:
                if resumed := RESUMES.match(line):
                    if begun := self._begun.pop(resumed[1], None):
                        self._finish(*begun, result=int(resumed[3]))
                elif call := BEGINS.match(line):
                    yield from self._call(call)

    def _call(self, call: re.Match[bytes]) -> Iterator[list[str]]:
        name, path, text = call["name"].decode(), plain(call["path"]), plain(call["text"])
        if path.startswith(b"socket"):
            if ids := acknowledged(text):
                yield ids
        elif name in ("unlink", "rename"):
            suffix = text.decode().removeprefix(self._spool)
            harness.must(name == "unlink" or suffix not in self.files, "the spool was renamed; the replay cannot")
            self.files.pop(suffix, None)
        elif file := self.file(path):
            harness.must(not call["cut"], "a write was too long for the trace")
            if name == "lseek":  # nobody else moves it before the write: the product holds a lock
                self._at = int(call["rest"].split(b",")[1])
                return
            offset = int(call["rest"].split(b",")[-1]) if name in ("pwrite64", "ftruncate") else self._at
            self._at += len(text) * (name == "write")
            begun = (name, file, offset, None if name == "ftruncate" else text, len(file.pending))
            if call["result"] is None:
                self._begun[call["thread"]] = begun
            else:
                self._finish(*begun, result=int(call["result"]))

    def _finish(self, name: str, file: File, offset: int, data: bytes | None, pending: int, *, result: int) -> None:
        """A call has ended: writes count now; an fsync covers what was written before it began."""
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
    """Let clients send until so many answers have gone out, under strace."""
    if not harness.STRACE:
        raise harness.Skipped("strace is missing")
    strace = [harness.STRACE, "-D", "-f", "-qq", "-y", "-xx", "-s", "4000000", "-o", str(trace), "-e", f"trace={CALLS}"]
    stage.relay.start(*strace)
    rng = random.Random(seed)
    while len(stage.books.waits) < points * 1.05:
        stage.offer(min(20, points))
        time.sleep(rng.random() * 0.01)
    stage.heal()
    stage.relay.kill()
    threading.Event().wait(0.2)  # strace, not our child, writes its last lines


def examine(spool: Path, wanted: set[str], thorough: bool) -> set[str]:
    """Open a rebuilt spool; the ids that are missing, or whose picture is."""
    try:
        file = Path(f"{spool}.pictures")
        pictures = file.read_bytes() if file.exists() else b""
        with closing(sqlite3.connect(spool)) as db:
            rows = db.execute("SELECT id, settled, picture_sum, picture_at, picture_size FROM items")
            whole = {
                name for name, settled, digest, at, size in rows
                if settled or not digest or hashlib.sha256(pictures[at : at + size]).digest() == digest
            }  # fmt: skip
            if thorough and db.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                return wanted
            return wanted - whole
    except sqlite3.Error:
        return wanted


@dataclass
class Result:
    """What a replay found."""

    points: int = 0
    lossy: int = 0
    disks: int = 0
    lost: int = 0

    def __str__(self) -> str:
        points = f"{self.lossy} of {self.points} crash points ({self.disks} disks)"
        return f"{points} lose acknowledged events, at most {self.lost}"

    def add(self, points: int, lossy: int, disks: int, lost: int) -> None:
        """Count more."""
        self.points, self.lossy, self.disks = self.points + points, self.lossy + lossy, self.disks + disks
        self.lost = max(self.lost, lost)


def one_round(product: Path, seed: int, points: int, torn: int) -> Result:
    """Record once and fail the power at each of the first `points` answers. Raises Red when nothing can be recorded."""
    result, told, rng = Result(), set(), random.Random(seed)
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with Stage(product, seed=seed, clients=4, picture_max=6000) as stage, \
            tempfile.TemporaryDirectory(dir=memory, prefix="powerloss-") as place:  # fmt: skip
        record(stage, stage.folder / "trace", points, seed)
        disk, spool = Disk(stage.relay.spool), Path(place) / "alerts.db"
        for ids in disk.replay(stage.folder / "trace"):
            told |= set(ids)
            worst = 0
            for number in range(1 + torn):
                disk.rebuild(spool, rng if number else None)
                worst = max(worst, len(examine(spool, told, thorough=result.points % 20 == 0)))
            result.add(1, bool(worst), 1 + torn, worst)
            if result.points == points:
                break
        harness.must(result.points == points, f"only {result.points} answers were recorded, not {points}")
        if not result.lossy:
            come_back(stage, disk, told)
    return result


def come_back(stage: Stage, disk: Disk, told: set[str]) -> None:
    """A real relay starts on the rebuilt disk; all that was acknowledged is delivered before the cut or after it."""
    for name in stage.folder.glob("alerts.db*"):
        name.unlink()
    disk.rebuild(stage.relay.spool, None)
    stage.relay.start()
    harness.until("nothing waits", lambda: stage.relay.counts()["queued"] == 0, harness.HEAL_S)
    if missing := told - stage.delivered().keys():
        raise Red(f"{len(missing)} acknowledged events are never delivered after the power cut")


def replay(product: Path, seed: int, points: int, torn: int) -> Result:
    """Rounds of recordings with different seeds."""
    total = Result()
    while total.points < points:
        found = one_round(product, seed + total.points, min(ROUND, points - total.points), torn)
        total.add(found.points, found.lossy, found.disks, found.lost)
    return total


def control(product: Path, edits: list[tuple[str, str, str]], seed: int, points: int) -> Result:
    """The same with a product that is broken on purpose."""
    folder = Path(tempfile.mkdtemp(prefix="control-"))
    try:
        return replay(harness.mutant(folder, product, edits), seed, points, 0)
    finally:
        shutil.rmtree(folder)


def proof(product: Path, seed: int, points: int, torn: int, controlled: bool) -> str:
    """The product must not lose, the control must. Raises Red."""
    found = replay(product, seed, points, torn)
    harness.must(not found.lossy, f"{found} in a power cut")
    if not controlled:
        return f"{found}"
    words = [f"{found}"]
    for name, edits in CONTROLS.items():
        bad = control(product, edits, seed, min(points, 100))
        harness.must(bad.lossy, f"the control, {name}, loses nothing: this proof sees nothing")
        words.append(f"control, {name}: {bad}")
    return "; ".join(words)


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--points", type=int, help="crash points (500; short: 60)")
    parser.add_argument("--torn", type=int, default=2, help="torn disks a point (2)")
    parser.add_argument("--no-control", action="store_true", help="without the negative control")
    args = parser.parse_args()
    points = args.points or (60 if args.short else 500)
    print(f"powerloss: seed {args.seed}, {points} crash points; {harness.machine()}", flush=True)

    held, words = harness.outcome(lambda: proof(args.product, args.seed, points, args.torn, not args.no_control))
    print(words)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
