#!/usr/bin/env python3
"""faults: one fault after the other, each against a relay of its own; then everything works again, and the nine checks
of nemesis.py are made.

Prints a table: what failed, how, and whether nothing acknowledged was lost, repeated without cause or changed.

    python3 tests/bench/faults.py [--only WORD]
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import harness
import nemesis
import powerloss
from faultsink import Resolver
from harness import REPEATS_MAX, Red, Run, Sent, Skipped, Stage, Table, certificate, must, needs, until

table = Table()
row = table.row
USER = 54_321  # a user id without processes; root can start some for it
SLOW = {"ALERT_RETRY_FIRST": "1", "ALERT_RETRY_MAX": "4"}  # where transactions are counted


def finish(stage: Stage, *, retry: bool = False, **options: Any) -> str:
    """Everything works again; make the nine checks. Returns the figures. Raises Red."""
    stage.heal(retry)
    stage.check(**options)
    return stage.figures()


# --- The process -------------------------------------------------------------------------------------


@row("kill -9 at random", "nemesis.py")
def kill_at_random(run: Run) -> str:
    return nemesis.run(run.product, run.seed, 6 if run.short else 20, 300 if run.short else 1500)


@row("kill -9 at chosen points", "strace inject, the Nth fdatasync, pwrite64, sendto of a thread")
def kill_at_chosen_points(run: Run) -> str:
    with run.stage(clients=1, picture_max=9000) as stage:
        points = [(call, n) for call in nemesis.CHOSEN_CALLS for n in range(1, 4 if run.short else 25)]
        for call, n in points:
            stage.driver.allow(3)
            try:
                stage.relay.start(*harness.inject(call, str(n)))
            except Red:  # it was killed while it started
                must(stage.relay.dead(), "it does not start")
            end = time.monotonic() + 2
            while not stage.relay.dead() and not stage.driver.settled() and time.monotonic() < end:
                time.sleep(0.005)
            stage.relay.kill()
        return f"{len(points)} points, {finish(stage)}"


@row("kill -9 after the dot", "the mail server has the mail and has not answered")
def killed_after_the_dot(run: Run) -> str:
    with run.stage() as stage:
        stage.relay.start()
        for _ in range(3):
            stage.sink.script("dot:stall")
            stage.offer(20)
            until("mails are under way", lambda: len(stage.sink.waiting_peers) == 2)
            stage.relay.kill()
            stage.heal()
        return finish(stage)


@row("kill -9 while a backlog drains", f"again and again: each time at most {REPEATS_MAX} mails come twice")
def killed_while_draining(run: Run) -> str:
    with run.stage(picture_max=0) as stage:
        stage.sink.close_port()
        stage.relay.start()
        stage.offer(600 if run.short else 3000)
        stage.sink.open_port()
        for _ in range(3 if run.short else 12):
            if stage.relay.dead():
                stage.relay.start()
            mails = len(stage.sink.mails)
            until("mails are sent", lambda: len(stage.sink.mails) >= mails + 100)  # noqa: B023
            stage.relay.kill()
        return finish(stage)


@row("the same event twice", "at once, on another connection, after a restart, after its mail")
def sent_twice(run: Run) -> str:
    line = b'{"event": "X", "camera": "c", "id": "same"}'
    with run.stage() as stage:
        stage.relay.start()
        said = [answer["status"] for answer in stage.relay.ask(line, line) + stage.relay.ask(line)]
        until("it is mailed", lambda: stage.sink.mails)
        stage.relay.stop()
        stage.relay.start()
        said.append(stage.relay.ask(line)[0]["status"])
        must(said == ["queued"] + ["duplicate"] * 3, f"answered {said}")
        stage.record.sent["same"] = Sent("same", "c", line)
        return finish(stage)


@row("power loss", "powerloss.py, dropped and torn")
def power_loss(run: Run) -> str:
    found = powerloss.replay(run.product, run.seed, 60 if run.short else 300, 1)
    must(not found.bad_points, f"{found}")
    return f"{found}"


@row("SIGTERM while busy", "twice in a row, 50 clients, the mail server slow after the dot")
def term_while_busy(run: Run) -> str:
    with run.stage(clients=50, picture_max=3000) as stage:
        for _ in range(2 if run.short else 5):
            stage.sink.script("dot:slow=0.2")
            stage.relay.start()
            stage.driver.allow(1500)
            until("half is acknowledged", lambda: stage.driver.left() < 750)
            stage.relay.signal(signal.SIGTERM)
            must(stage.relay.stop() == 0, "not exit 0")
        return finish(stage)


@row("SIGTERM at once", "as soon as it listens, under load, 60 times (short: 4)")
def term_at_once(run: Run) -> str:
    with run.stage(clients=30, picture_max=3000) as stage:
        for _ in range(4 if run.short else 60):
            stage.driver.allow(300)
            stage.relay.start()
            must(stage.relay.stop() == 0, "not exit 0")
        return finish(stage)


@row("SIGTERM within a line", "half an event has arrived: no answer that makes a camera give up")
def term_within_a_line(run: Run) -> str:
    with run.stage() as stage:
        stage.relay.start()
        with socket.create_connection(("127.0.0.1", stage.relay.port), 10) as sock:
            sock.sendall(b'{"ping": 1}\n{"event": "DOOR_OPENED", "cam')
            answers = sock.makefile("rb")
            must(b"pong" in answers.readline(), "no pong")
            stage.relay.signal(signal.SIGTERM)
            said = answers.read()
        must(not said or b"shutting_down" in said, f"answered {said.decode().strip()}")
        return f"answered {said.decode().strip() or 'nothing'}"


@row("SIGSTOP and SIGCONT", "kill -STOP for 1 s (long: 6 s), clients and server waiting")
def stopped(run: Run) -> str:
    with run.stage(SMTP_TIMEOUT="2", ALERT_IDLE_TIMEOUT="2") as stage:
        stage.relay.start()
        stage.driver.allow(300)
        stage.relay.signal(signal.SIGSTOP)
        time.sleep(1 if run.short else 6)
        stage.relay.signal(signal.SIGCONT)
        return finish(stage)


@row("SIGPIPE and SIGHUP", "a pipe breaks: it goes on; the terminal is gone: it ends")
def pipe_and_terminal_gone(run: Run) -> str:
    with run.stage() as stage:
        stage.relay.start()
        for number, outcome in ((signal.SIGPIPE, stage.driver.settled), (signal.SIGHUP, stage.relay.dead)):
            stage.driver.allow(300)
            until("half is acknowledged", lambda: stage.driver.left() < 150)
            stage.relay.signal(number)
            until("it goes on, or ends", outcome)
        return finish(stage)


@row("two relays, one spool", "started twice")
def two_relays(run: Run) -> str:
    with run.stage() as stage:
        stage.relay.start()
        second = harness.Relay(stage.folder, stage.sink.port, run.product)
        second.log = stage.folder / "second.log"
        try:
            second.start()
        except Red:
            must(second.process and second.process.wait() == 75, "the second did not exit 75")
        else:
            second.kill()
            raise Red("the second one runs")
        stage.offer(50)
        return finish(stage)


@row("crash loop", "kill -9 every 0.3 s with the mail server away")
def crash_loop(run: Run) -> str:
    with run.stage() as stage:
        stage.sink.close_port()
        for _ in range(4 if run.short else 20):
            stage.relay.start()
            stage.offer(10)
            time.sleep(0.3)
            stage.relay.kill()
        burned = [line for line in stage.relay.queue() if line["tries"]]
        must(not burned, f"{len(burned)} alerts have burned tries: {burned[:1]}")
        stage.sink.open_port()
        return finish(stage)


@row("little memory", "prlimit --as: 160 MiB more for 700 connections, 10 MiB more for pictures of 6 MB")
def little_memory(run: Run) -> str:
    short = "out of memory|MemoryError"  # The interpreter itself reports a thread that cannot even begin.
    with run.stage(picture_max=6_000_000) as stage:
        for room, peers, events in ((160, 700, 0), (10, 0, 20)):
            stage.relay.kill()
            stage.relay.log.unlink(missing_ok=True)
            stage.relay.start()
            stage.relay.limit(f"as={stage.relay.footprint()['VmSize'] + room * 1024 << 10}")
            with crowd(stage, peers):

                def is_short(events: int = events) -> bool:
                    if stage.driver.settled():
                        stage.driver.allow(events)
                    return stage.relay.said(short) > 0

                until("memory is short", is_short)
                must(not stage.relay.dead(), "it died")
            stage.relay.limit("as=unlimited")
            stage.offer(50)
            must((said := stage.relay.said("out of memory")) <= 1, f"said {said} times, not once")
            must(not stage.relay.said("Traceback"), "tracebacks")
        return finish(stage, excused=REPEATS_MAX)  # A reply may have come that there was no memory to read.


@row("few processes", "prlimit --nproc=30 as another user, 60 connections")
def few_processes(run: Run) -> str:
    with run.stage() as stage:
        os.chown(stage.folder, USER, USER)
        stage.relay.start(needs("prlimit"), "--nproc=30", *somebody_else())
        with crowd(stage, 60) as peers:
            for peer in peers:
                peer.sendall(b'{"ping": 1}\n')
            busy = sum(b"busy" in peer.recv(4096) for peer in peers)
        must(30 < busy < 60, f"{busy} of 60 peers were turned away")
        must(stage.relay.said("out of memory or threads") == 1, "not said, or not once")
        stage.offer(50)
        return f"{busy} of 60 peers were turned away, {finish(stage)}"


def somebody_else() -> list[str]:
    """The words before a command that make it another user's, who has no other processes. Raises Skipped."""
    words = [needs("setpriv"), f"--reuid={USER}", "--clear-groups"]
    python = [*words, sys.executable, "-c", "import sqlite3, ssl"]
    if os.geteuid() or subprocess.run(python, capture_output=True, check=False).returncode:
        raise Skipped("only root can be another user, who must be able to run this Python")
    return words


@contextlib.contextmanager
def crowd(stage: Stage, number: int) -> Iterator[list[socket.socket]]:
    """So many peers who connect and wait."""
    with contextlib.ExitStack() as stack:
        connect = functools.partial(socket.create_connection, ("127.0.0.1", stage.relay.port), 5)
        yield [stack.enter_context(connect()) for _ in range(number)]


# --- The disk ----------------------------------------------------------------------------------------


@row("fsync fails", "strace inject EIO, slowly, 8 clients: none of those that share a commit is acknowledged")
def fsync_fails(run: Run) -> str:
    with run.stage(clients=8) as stage:
        stage.sink.close_port()
        stage.relay.start()
        stage.offer(50)
        with stage.relay.attached(*harness.inject("fdatasync", "1+", "error=EIO:delay_enter=20000")):
            before = len(stage.record.acked)
            stage.driver.allow(400)
            until("spool_error is answered", lambda: stage.record.refusals["spool_error"] > 50)
            must(len(stage.record.acked) == before, "acknowledged without an fsync")
            must(not stage.relay.dead(), "it died")
        stage.relay.kill()
        stage.sink.open_port()
        return finish(stage)


@row("writes fail", "strace inject EIO, EROFS, ENOSPC: nothing acknowledged meanwhile, goes on by itself")
def writes_fail(run: Run) -> str:
    with run.stage() as stage:
        stage.relay.start()
        for error in ("EIO", "EROFS", "ENOSPC"):
            stage.offer(30)
            refused = stage.record.refusals.total()
            with stage.relay.attached(*harness.inject("pwrite64", "1+", f"error={error}")):
                stage.driver.allow(100)
                until("it is refused", lambda: stage.record.refusals.total() > refused + 3)  # noqa: B023
                before = len(stage.record.acked)
                until("more is refused", lambda: stage.record.refusals.total() > refused + 9)  # noqa: B023
                must(len(stage.record.acked) == before, f"{error}: acknowledged without having been written")
                must(not stage.relay.dead(), "it died")
            until("it goes on", stage.driver.settled)
        return finish(stage)


@row("log on a full disk", "strace inject ENOSPC, writes to the log alone")
def log_full(run: Run) -> str:
    with run.stage() as stage:
        stage.relay.start()
        with stage.relay.attached(*harness.inject("write", "1+", "error=ENOSPC"), "-P", str(stage.relay.log)):
            stage.offer(100)
            until("all is delivered", lambda: len(stage.delivered()) == 100)
        return finish(stage)


@row("log stalls", "who reads the log through a pipe is stopped, and the pipe is full: mail and SIGTERM go on")
def log_stalls(run: Run) -> str:
    with run.stage(picture_max=0) as stage:
        stage.relay.start(needs("bash"), "-c", 'exec "$@" 2> >(exec cat >&2)', "bash")
        reader = int(Path(f"/proc/{stage.relay.pid}/task/{stage.relay.pid}/children").read_text())
        os.kill(reader, signal.SIGSTOP)
        try:
            stage.offer(1500)
            until("all is delivered while the log stalls", lambda: len(stage.delivered()) == 1500)
            must(stage.relay.stop() == 0, "SIGTERM while the log stalls: not exit 0")
        finally:
            os.kill(reader, signal.SIGCONT)
        return finish(stage)


@row("disk slow", "strace inject, 50 ms before each fdatasync")
def disk_slow(run: Run) -> str:
    with run.stage() as stage:
        stage.relay.start(*harness.inject("fdatasync", "1+", "delay_enter=50000"))
        stage.offer(200)
        return finish(stage)


@row("spool full", "ALERT_SPOOL_MAX=400KiB, the mail server away")
def spool_full(run: Run) -> str:
    with run.stage(ALERT_SPOOL_MAX="400KiB") as stage:
        return fill(stage, lambda: accepts_again(stage) and finish(stage))


@row("files cannot grow", "prlimit --fsize=400000; then they can: nothing was lost, it goes on by itself")
def files_cannot_grow(run: Run) -> str:
    with run.stage() as stage:
        wrapper = [needs("prlimit"), "--fsize=400000:unlimited"]
        return fill(stage, lambda: stage.relay.limit("fsize=unlimited") or (accepts_again(stage) and finish(stage)), *wrapper)


@row("disk full", "a tmpfs of 12 MiB")
def disk_full(run: Run) -> str:
    with run.stage(picture_max=600_000) as stage, small_disk(stage, "size=12m"):
        return fill(stage, lambda: accepts_again(stage) and finish(stage))


@row("disk full, and mails put off", "a tmpfs of 12 MiB, rcpt:450 for most: what is written down of them needs room, too")
def disk_full_put_off(run: Run) -> str:
    with run.stage(picture_max=600_000, ALERT_SENDERS="4") as stage, small_disk(stage, "size=12m"):
        stage.sink.close_port()
        stage.relay.start()
        stage.driver.allow(300)
        until("the clients have given up", stage.driver.settled)  # else each refusal makes room
        stage.sink.script("rcpt:450 later%80")
        stage.sink.open_port()
        until("many are put off", lambda: stage.sink.faults_done.total() > 20)
        stage.sink.script()
        return accepts_again(stage) and finish(stage)


@row("no inode is left", "a tmpfs with nr_inodes: one for each file that it has, then one less at a start")
def no_inode(run: Run) -> str:
    with run.stage() as stage, small_disk(stage, "nr_inodes=100") as small:
        stage.sink.close_port()
        stage.relay.start()
        inodes = len(list(small.iterdir())) + 1
        for number in (inodes, inodes - 1, inodes):
            subprocess.run(["mount", "-o", f"remount,nr_inodes={number}", small], check=True)
            if number < inodes:
                refuses_to_start(stage)
                continue
            if stage.relay.dead():
                stage.relay.start()
            stage.offer(50)
            stage.relay.stop()
        stage.sink.open_port()
        return finish(stage)


@contextlib.contextmanager
def small_disk(stage: Stage, options: str) -> Iterator[Path]:
    """The spool on a file system of its own. Raises Skipped."""
    small = stage.folder / "small"
    small.mkdir()
    mount = [needs("mount"), "-t", "tmpfs", "-o", options, "proof", small]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        raise Skipped("mounting is not permitted; try it under `unshare -rm`")
    stage.relay.spool = small / "alerts.db"
    stage.relay.environ["ALERT_SPOOL"] = str(stage.relay.spool)
    try:
        yield small
    finally:
        subprocess.run(["umount", "-l", small], check=False)


def refuses_to_start(stage: Stage, *wrapper: str) -> None:
    """In one line that names the spool. Raises Red."""
    try:
        stage.relay.start(*wrapper)
    except Red as complaint:
        must("Traceback" not in str(complaint) and "alerts.db" in str(complaint), str(complaint))
    else:
        raise Red("it runs")


def accepts_again(stage: Stage) -> bool:
    """Without a restart, an alert is taken while the others go out. Raises Red."""
    stage.record.sent["again"] = Sent("again", "c", b'{"event": "X", "camera": "c", "id": "again"}')
    stage.drain()
    return bool(until("it accepts again", lambda: stage.relay.ask(stage.record.sent["again"].line)[0]["ok"], 10))


def fill(stage: Stage, then: Callable[[], str], *wrapper: str) -> str:
    """More events than there is room for, the mail server being away; then it is back."""
    stage.sink.close_port()
    stage.relay.start(*wrapper)
    stage.driver.allow(300)
    until("no room is left", lambda: stage.record.refusals["spool_full"] + stage.record.refusals["spool_error"] > 5)
    must(not stage.relay.dead(), "it died")
    stage.sink.open_port()
    return then()


@row("spool not writable", "a folder of somebody else's")
def not_writable(run: Run) -> str:
    with run.stage() as stage:
        stage.folder.chmod(0o755)
        (stage.folder / "theirs").mkdir(mode=0o500)
        stage.relay.environ["ALERT_SPOOL"] = str(stage.folder / "theirs/alerts.db")
        refuses_to_start(stage, *([] if os.geteuid() else somebody_else()))
        return "refuses to start and says why"


@row("spool removed or replaced under a running relay", "new alerts get spool_error, what waits still goes out")
def spool_deleted(run: Run) -> str:
    with run.stage() as stage:
        for replaced in (False, True):
            stage.sink.close_port()
            stage.relay.start()
            stage.offer(50)
            before = len(stage.record.acked)
            for name in stage.folder.glob("alerts.db*"):
                if name.suffix != ".lock":
                    name.unlink()
            if replaced:
                stage.relay.spool.write_bytes(b"")
            refused = stage.record.refusals["spool_error"]
            stage.driver.allow(50)
            until("spool_error is answered", lambda: stage.record.refusals["spool_error"] > refused + 5)  # noqa: B023
            must(len(stage.record.acked) == before, "acknowledged without a spool")
            must(stage.relay.said("removed or replaced: nothing new") == 1, "the log does not say so, or not once")
            stage.sink.open_port()
            until("what waited goes out", lambda: len(stage.delivered()) == before)  # noqa: B023
            until("nothing waits", lambda: stage.relay.counts()["queued"] == 0)
            must(stage.relay.stop() == 0, "SIGTERM: not exit 0")
            stage.relay.log.unlink()
            stage.heal()
            stage.relay.stop()
        return finish(stage)


PAGE = 8192
DAMAGES = {
    "first 100 bytes zero": lambda data, rng: bytes(100) + data[100:],
    "random pages": lambda data, rng: overwrite(rng.sample(range(PAGE, len(data), PAGE), len(data) // PAGE // 20), data, rng),
    "cut in half": lambda data, rng: data[: len(data) // 2],
    "cut to nothing": lambda data, rng: b"",
    "one bit in a payload": lambda data, rng: flip(rng.choice(re.findall(rb'"camera": ?"cam\d+"', data)), data),
    "one bit in a picture": lambda data, rng: flip(rng.choice(re.findall(rb"/9j/[A-Za-z0-9+/]{20}", data)), data),
}


def overwrite(pages: Sequence[int], data: bytes, rng: random.Random) -> bytes:
    """The data with nonsense in the pages at these offsets."""
    for at in pages:
        data = data[:at] + rng.randbytes(PAGE) + data[at + PAGE :]
    return data


def flip(victim: bytes, data: bytes) -> bytes:
    """The data with one bit changed in each copy of the victim: a page may hold an old copy that counts no more."""
    return data.replace(victim, victim[:-5] + bytes([victim[-5] ^ 1]) + victim[-4:])


@row("spool damaged", "; ".join(DAMAGES))
def spool_damaged(run: Run) -> str:
    return "; ".join(damaged(run, name) for name in DAMAGES)


def damaged(run: Run, name: str) -> str:
    """60 alerts wait while the spool is damaged, 20 come afterwards; how many arrive."""
    with run.stage(picture_max=9000) as stage:
        stage.sink.close_port()
        stage.relay.start()
        stage.offer(60)
        stage.relay.stop()
        spool = stage.relay.spool
        spool.write_bytes(DAMAGES[name](spool.read_bytes(), random.Random(run.seed)))
        stage.relay.start()
        stage.sink.open_port()
        stage.offer(20)
        stage.damaged |= stage.record.sent.keys()
        stage.heal()
        loud = stage.relay.said(r"(?i)\berror\b.*(damaged|lost|empty|checksum)")
        must(loud or len(stage.delivered()) == 80, f"{name}: the log does not say so")
        must(not stage.relay.said("Traceback"), f"{name}: tracebacks")
        unknown = [one for one in stage.delivered() if one not in stage.record.sent]
        must(not unknown, f"{name}: delivered {unknown}")
        must(not (wrong := list(stage.contents())), f"{name}: {wrong}")
        arrived, left_out = len(stage.delivered()), sum(mail["left_out"] for mail in stage.sink.mails)
        must("picture" not in name or (arrived, left_out) == (80, 1), f"{name}: {arrived} arrive, {left_out} say so")
        return f"{name}: {arrived} of 80 arrive, {left_out} without their picture"


@row("poison row", "a stored alert that cannot be composed")
def poison_row(run: Run) -> str:
    with run.stage(picture_max=0) as stage:
        return poisoned(stage)


@row("poison row in a digest", "only it fails, the alerts beside it arrive")
def poison_in_a_digest(run: Run) -> str:
    with run.stage(picture_max=0, ALERT_COOLDOWN="0.5") as stage:
        return poisoned(stage)


def poisoned(stage: Stage) -> str:
    """An alert whose content is no object waits between two others; with a cooldown, in a digest with the second."""
    sound = b'{"event": "X", "camera": "c"}'
    contents = {"first": sound, "poison": b"[]", "second": sound}
    entries = ", ".join(f"m.NewEntry({name!r}, 'X', 'c', {content!r})" for name, content in contents.items())
    put = f"import smtp_module as m; m.Outbox({str(stage.relay.spool)!r}).put([{entries}])"
    subprocess.run([sys.executable, "-c", put], cwd=stage.relay.product, env=stage.relay.environ, check=True)
    stage.record.sent |= {name: Sent(name, "c", b"") for name in contents}
    stage.relay.start()
    stage.offer(100)
    stage.heal()
    must({"first", "second"} <= stage.delivered().keys(), f"delivered: {contents.keys() & stage.delivered().keys()}")
    must(stage.relay.said("cannot be composed"), "not said")
    stage.relay.log.write_text("")  # The traceback in it was wanted.
    stage.check(may_fail={"poison"})
    return stage.figures()


@row("spool locked by another program", "BEGIN EXCLUSIVE held for 6 s")
def spool_locked(run: Run) -> str:
    with run.stage() as stage:
        stage.relay.start()
        stage.offer(20)
        with closing(sqlite3.connect(stage.relay.spool, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            stage.driver.allow(50)
            time.sleep(1 if run.short else 6)
            must(not stage.relay.dead(), "it died")
        return finish(stage)


# --- The mail server ---------------------------------------------------------------------------------

MAIL_FAULTS = (  # What the mail server does; no alert may fail of it.
    *(f"{step}:{code}*3" for code in ("451 4.3.0 later", "421 4.3.2 busy")
      for step in ("greeting", "ehlo", "starttls", "auth", "mail", "rcpt", "data", "dot")),
    *(f"{step}:554 5.7.1 no*3" for step in ("greeting", "ehlo", "starttls", "auth", "mail")),
    "auth:535 5.7.8 wrong password*3", "auth:534 5.7.9 app password*3", "rcpt:530 5.7.0 login first*2",
    "mail:550 5.4.5 daily limit*2", "dot:550 5.4.5 daily limit*2", "rcpt:552 too many*2", "rcpt:450 greylisted*3",
    "body:drop=0*3", "body:drop=1*3", "body:drop=900*3", "dot:drop*3", "dot:die*3", "dot:reset*3", "dot:garbage*6",
    "greeting:garbage*6", "ehlo:garbage*6", "mail:garbage*6", "rcpt:garbage*6", "data:garbage*6", "quit:garbage",
    "quit:drop", "mail:slow=0.02*2", "dot:slow=0.02*2", "greeting:endless*2", "mail:endless*1", "dot:endless*2",
    "mail:stall*1", "dot:stall*1", "greeting:stall*1", "tls:stall*1", "tls:drop*3", "tls:garbage*3",
)  # fmt: skip
REFUSALS = ("rcpt:550 5.1.1 nobody*2", "data:554 5.6.0 no*2", "dot:554 5.7.0 spam*2", "rcpt:553 no*2", "dot:550 no*2")


@row("mail server fails, at every step and in every way", f"{len(MAIL_FAULTS)} scripts, lock-step and pipelined")
def mail_server_fails(run: Run) -> str:
    return soak(run, MAIL_FAULTS[run.seed % 5 :: 5] if run.short else MAIL_FAULTS)


def soak(run: Run, scripts: Sequence[str]) -> str:
    """Each script over a new connection, with and without PIPELINING; no alert may fail."""
    with mail_stage(run) as stage:
        for fault in scripts:
            for pipelining in (True, False):
                stage.sink.pipelining = pipelining
                stage.sink.close_port()
                stage.sink.script(fault)
                stage.sink.peers_left = 0
                stage.sink.open_port()
                stage.offer(10 if run.short else 50)
                if fault.startswith("quit"):  # A connection is kept for 30 s; at the end it is closed at once.
                    stage.drain()
                    stage.relay.stop()
                    stage.relay.start()
                until(f"{fault} happens", lambda: stage.sink.faults_done)
                # The relay gives up waiting for a reply, but for that to the dot, which may take ten minutes.
                if fault.split("*")[0].endswith((":stall", ":endless")) and fault != "dot:stall*1":
                    until(f"{fault}: the relay gives up", lambda: stage.sink.peers_left)
                stage.sink.faults_done.clear()
                stage.sink.script()
                if fault.startswith(("dot", "body")):  # What got no answer twice would wait for an hour.
                    stage.relay.command("retry", "all")
                stage.drain()
                must(not stage.relay.counts()["failed"], f"{fault}: alerts failed")
        must(not stage.sink.too_early, f"{stage.sink.too_early} commands before their turn, without PIPELINING")
        return finish(stage)


@row("mail server refuses for good", f"ALERT_REFUSED_AFTER=0: {'; '.join(REFUSALS)}; then retry all")
def mail_server_refuses(run: Run) -> str:
    with mail_stage(run, ALERT_REFUSED_AFTER="0") as stage:
        stage.sink.pipelining = False  # With it, a 5xx could be about the group, and is asked for once more.
        for number, fault in enumerate(REFUSALS, 1):
            stage.sink.script(fault)
            stage.offer(20)
            until("two alerts fail", lambda: stage.relay.counts()["failed"] == 2 * number)  # noqa: B023
        stage.heal(retry=True)
        must(not stage.relay.counts()["failed"], "retry all leaves failed ones")
        return f"{2 * len(REFUSALS)} failed and were sent by retry, {finish(stage)}"


REFUSED_TO_ALL = (
    "rcpt:550 5.7.1 sender address not owned by the account", "dot:554 5.7.1 your address is blocked",
    "rcpt:450 4.7.1 too many mails in this hour", "dot:421 4.7.0 limit reached", "rcpt:drop", "mail:550 5.1.8 bad sender",
)  # fmt: skip


@row("mail server takes nothing for a while", f"{'; '.join(REFUSED_TO_ALL)}: few transactions, nothing fails")
def takes_nothing(run: Run) -> str:
    """The times after which a delivery may fail pass several times over, but nothing else is accepted meanwhile."""
    said = []
    for fault in REFUSED_TO_ALL[:: 5 if run.short else 1]:
        with run.stage(picture_max=0, ALERT_REFUSED_AFTER="1", ALERT_MAX_AGE="1", **SLOW) as stage:
            stage.sink.script(fault)
            stage.relay.start()
            stage.offer(100)
            time.sleep(6)
            tries = stage.sink.commands["mail"]
            must(3 <= tries <= 12, f"{fault}: {tries} transactions in 6 s")
            must(not stage.relay.counts()["failed"], f"{fault}: alerts failed")
            finish(stage)
            said.append(f"{fault}: {tries}")
    return f"transactions in 6 s: {'; '.join(said)}"


@row("nothing fails while nothing gets through", "rcpt:550, rcpt:450 for 5 s, ALERT_REFUSED_AFTER=ALERT_MAX_AGE=1")
def nothing_ages(run: Run) -> str:
    for fault in ("rcpt:550 5.7.1 sender address not owned", "rcpt:450 4.7.1 too many mails"):
        with run.stage(picture_max=0, ALERT_REFUSED_AFTER="1", ALERT_MAX_AGE="1") as stage:
            stage.sink.script(fault)
            stage.relay.start()
            stage.offer(2)
            time.sleep(5)
            must(not stage.relay.counts()["failed"], f"{fault}: alerts failed")
            must(stage.sink.commands["mail"] >= 6, f"{fault}: {stage.sink.commands['mail']} tries only")
            finish(stage)
    people = ("bob@example.org", "alice@example.org")
    with run.stage(recipients=people, picture_max=0, ALERT_REFUSED_AFTER="1", ALERT_MAX_AGE="1") as stage:
        stage.sink.script("rcpt@bob:550 5.1.1 nobody")
        stage.relay.start()
        for number in (1, 2):
            stage.offer(1)
            until("alice has it", lambda: len(stage.sink.mails) == number)  # noqa: B023
            until("it was tried for bob", lambda: stage.sink.faults_done.total() >= number)  # noqa: B023
        until("the first has failed for bob", lambda: stage.relay.counts()["failed"] >= 1)
        return f"and when something gets through it fails, {finish(stage, retry=True)}"


@row("rate limit, with a cooldown", "rcpt:450 for 6 s, 150 alerts of 50 cameras: a handful of tries, then one digest")
def rate_limit(run: Run) -> str:
    with run.stage(picture_max=0, ALERT_COOLDOWN="1", **SLOW) as stage:
        stage.sink.script("rcpt:450 4.7.1 too many mails")
        stage.relay.start()
        stage.offer(150)
        time.sleep(6)
        tries = stage.sink.commands["mail"]
        must(tries <= 12, f"{tries} transactions in 6 s")
        figures = finish(stage)
        largest = max(len(mail["alerts"]) for mail in stage.sink.mails)
        must(len(stage.sink.mails) <= 40 and largest >= 50, f"{len(stage.sink.mails)} mails, {largest} in the largest")
        return f"{tries} tries, then {len(stage.sink.mails)} mails, the largest with {largest} alerts, {figures}"


@row("a limiter that admits one mail every 2 s", "for 12 s: it makes no new storm")
def one_at_a_time(run: Run) -> str:
    with run.stage(picture_max=0, **SLOW) as stage:
        stage.sink.interval_s = 2.0
        stage.relay.start()
        stage.offer(100)
        time.sleep(6 if run.short else 12)
        tries, mails = stage.sink.commands["mail"], len(stage.sink.mails)
        must(mails >= 2, f"{mails} mails got through")
        must(tries <= 5 * (mails + 2), f"{tries} transactions for {mails} mails")
        stage.sink.interval_s = 0.0
        return f"{tries} transactions for {mails} mails, {finish(stage)}"


@row("a limit of mails per connection", "452 to the sixth MAIL: a new connection, no pause")
def mails_per_connection(run: Run) -> str:
    with run.stage(picture_max=0) as stage:
        stage.sink.mails_per_connection = 5
        stage.relay.start()
        stage.offer(100)
        until("all is delivered", lambda: len(stage.delivered()) == 100)
        must(not stage.relay.said("all mail waits"), "it paused")
        return f"{stage.sink.sessions} connections, {finish(stage)}"


def mail_stage(run: Run, **environ: str) -> Stage:
    """A running relay that logs in over STARTTLS."""
    stage = run.stage(SMTP_HOST="localhost", SMTP_SECURITY="starttls", SMTP_USER="relay", SMTP_PASS="secret",
                      SMTP_TIMEOUT="1", sink={"auth": True}, picture_max=0, **environ)  # fmt: skip
    stage.sink.tls = certificate(stage.folder)
    stage.relay.environ["SMTP_CAFILE"] = str(stage.folder / "cert.pem")
    stage.relay.start()
    return stage


BAD_RECIPIENT = (
    "rcpt@bob:550 5.1.1 nobody", "rcpt@bob:450 4.2.2 full", "rcpt@bob:421 4.7.0 go away", "rcpt@bob:drop",
    "dot@bob:554 5.7.1 no", "dot@bob:421 no", "body@bob:drop=10", "dot@bob:drop",
)  # fmt: skip


@row("one bad recipient of two", f"{'; '.join(BAD_RECIPIENT)}: the good one has all at once, the bad one after retry")
def bad_recipient(run: Run) -> str:
    said = []
    for fault in BAD_RECIPIENT:
        people = ("bob@example.org", "alice@example.org")
        with run.stage(recipients=people, picture_max=0, **SLOW) as stage:
            stage.relay.start()
            stage.sink.script(fault)
            began = time.monotonic()
            stage.offer(30)
            until(f"{fault}: alice has all", lambda: sum("alice" in mail["to"][0] for mail in stage.sink.mails) >= 30, 10)
            took, tries = time.monotonic() - began, stage.sink.faults_done.total()
            must(tries <= 8, f"{fault}: {tries} tries for bob in {took:.1f} s")
            finish(stage, retry=True)
            must(len(stage.sink.mails) == 60, f"{fault}: {len(stage.sink.mails)} mails, not 60")
            said.append(f"{fault}: {took:.1f} s")
    return f"30 alerts at the good one's after {'; '.join(said)}"


@row("one recipient refused for good, then retry", "rcpt@bob:550: who has it does not get it again")
def refused_recipient(run: Run) -> str:
    people = ("bob@example.org", "alice@example.org")
    with run.stage(recipients=people, picture_max=0, ALERT_REFUSED_AFTER="0") as stage:
        stage.relay.start()
        stage.sink.script("rcpt@bob:550 5.1.1 nobody")
        stage.offer(20)
        until("it has failed for bob", lambda: stage.relay.counts()["failed"] == 20)
        until("alice has all", lambda: len(stage.delivered()) == 20)
        finish(stage, retry=True)
        must(len(stage.sink.mails) == 40, f"{len(stage.sink.mails)} mails, not 40")
        return stage.figures()


@row("a mended recipient", "rcpt@bob:550, a restart with carol in his place: she gets all, nobody gets it again")
def mended_recipient(run: Run) -> str:
    with run.stage(recipients=("bob@example.org", "alice@example.org"), picture_max=0) as stage:
        stage.relay.start()
        stage.sink.script("rcpt@bob:550 5.1.1 nobody")
        stage.offer(20)
        until("alice has all", lambda: len(stage.delivered()) == 20)
        stage.relay.stop()
        stage.recipients = ("carol@example.org", "alice@example.org")
        stage.relay.environ["ALERT_RECIPIENT"] = ",".join(stage.recipients)
        stage.relay.start()
        until("nothing waits", lambda: not stage.relay.counts()["queued"])
        stage.check()
        must(len(stage.sink.mails) == 40, f"{len(stage.sink.mails)} mails, not 40")
        return stage.figures()


BROKEN_PIPELINING = (
    "rcpt@early:lost", "mail@early:lost", "data@early:lost", "rcpt@early:503 5.5.1 out of order",
    "mail@early:503 5.5.1 out of order", "rcpt@early:garbage", "data@early:554 5.5.0 improper pipelining",
)  # fmt: skip


@row("PIPELINING is offered and broken", f"{'; '.join(BROKEN_PIPELINING)}: lock step from then on, nothing twice")
def broken_pipelining(run: Run) -> str:
    said = []
    for fault in BROKEN_PIPELINING[:: 3 if run.short else 1]:
        with run.stage(picture_max=0, SMTP_TIMEOUT="1") as stage:
            stage.sink.script(fault)
            stage.relay.start()
            stage.offer(100)
            until(f"{fault}: all is delivered", lambda: len(stage.delivered()) == 100)
            broken = stage.sink.faults_done.total()
            must(0 < broken <= harness.SENDERS, f"{fault}: {broken} times")  # Each connection learns it by itself.
            finish(stage)
            must(len(stage.sink.mails) == 100, f"{fault}: {len(stage.sink.mails)} mails, not 100")
            said.append(f"{fault}: {broken}")
    return f"troubles of 100 mails: {'; '.join(said)}"


TOO_BIG = (("mail", "534 SIZE=Message too big"), ("mail", "552 5.3.4 too big"), ("mail", "554 5.7.1 too big"),
           ("dot", "552 5.3.4 too big"), ("dot", "554 5.6.0 attachments are not allowed"))  # fmt: skip


@row("mails with pictures are refused", f"{'; '.join(f'{step}: {reply}' for step, reply in TOO_BIG)}: the text arrives")
def too_big(run: Run) -> str:
    said = []
    for step, reply in TOO_BIG:
        with run.stage(picture_max=200_000, long_fields=False) as stage:
            stage.sink.too_big = (60_000, step, reply)
            stage.relay.start()
            stage.offer(60)
            until(f"{reply}: all is delivered", lambda: len(stage.delivered()) == 60)
            stage.damaged |= stage.record.sent.keys()
            finish(stage)
            must(not stage.relay.said("all mail waits"), f"{reply}: all mail waited")
            left_out = sum(mail["left_out"] for mail in stage.sink.mails)
            must(left_out, f"{reply}: no mail says that its picture was left out")
            said.append(f"{reply}: {left_out}")
    return f"of 60 mails without their picture: {'; '.join(said)}"


WRONG_TLS = {  # what the mail server shows, and what the log must say of it
    "unknown signer": (certificate, "self.signed"),
    "wrong name": (functools.partial(certificate, name="wrong.example.org"), "mismatch|doesn't match|not valid for"),
    "expired": (functools.partial(certificate, days=-1), "expired"),
    "TLS 1.0 only": (functools.partial(certificate, only=ssl.TLSVersion.TLSv1), "(?i)protocol"),
    "STARTTLS not offered": (lambda folder: None, "not offered"),
}


@row("mail server's certificate wrong", f"{', '.join(WRONG_TLS)}: never in the clear")
def wrong_certificate(run: Run) -> str:
    login = {"SMTP_HOST": "localhost", "SMTP_SECURITY": "starttls", "SMTP_USER": "u", "SMTP_PASS": "p"}
    with run.stage(sink={"auth": True}, **login) as stage:
        for name, (context, words) in WRONG_TLS.items():
            stage.relay.kill()
            stage.relay.log.unlink(missing_ok=True)
            stage.sink.tls = context(stage.folder)
            stage.relay.environ["SMTP_CAFILE"] = "" if name == "unknown signer" else str(stage.folder / "cert.pem")
            stage.relay.start()
            stage.offer(10)
            sessions = stage.sink.sessions
            until("it has tried twice", lambda: stage.sink.sessions >= sessions + 2)  # noqa: B023
            must(not stage.sink.mails, f"{name}: mail went out")
            must(stage.relay.said(words), f"{name}: the log does not say so")
        must(not [line for line in stage.relay.queue() if line["tries"]], "tries were burned")
        stage.relay.kill()
        stage.sink.tls = certificate(stage.folder)
        return finish(stage)


@row("mail server away", "connection refused, for 2 s; processor time under 5 %")
def sink_away(run: Run) -> str:
    with run.stage() as stage:
        stage.relay.start()
        stage.sink.close_port()
        stage.offer(100)
        before = stage.relay.cpu_s()
        time.sleep(2)
        used = (stage.relay.cpu_s() - before) / 2
        must(used < 0.05, f"{used:.0%} of a processor while idle")
        stage.sink.open_port()
        return f"{used:.1%} of a processor, {finish(stage)}"


@row("mail server swallows connections", "a full backlog: events are accepted meanwhile")
def black_hole(run: Run) -> str:
    with run.stage(SMTP_TIMEOUT="3", SMTP_SECURITY="none") as stage, hole("127.0.0.1") as port:
        stage.relay.environ["SMTP_PORT"] = str(port)
        stage.relay.start()
        stage.offer(200, 10)
        stage.relay.kill()
        stage.relay.environ["SMTP_PORT"] = str(stage.sink.port)
        return finish(stage)


@contextlib.contextmanager
def hole(address: str, port: int = 0) -> Iterator[int]:
    """A port whose backlog is full: connections are neither taken nor refused."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, port), family=family, backlog=0) as listener, contextlib.ExitStack() as stack:
        for _ in range(4):
            sock = stack.enter_context(socket.socket(family))
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@row("mail server's name not found", "the resolver says nothing, SERVFAIL, NXDOMAIN: events are accepted meanwhile")
def not_resolved(run: Run) -> str:
    with run.stage(SMTP_HOST=NAME, SMTP_SECURITY="none") as stage, closing(resolver()) as dns:
        wrapper = with_file(stage, "/etc/resolv.conf", f"nameserver {dns.address}\noptions timeout:3 attempts:1\n")
        for fault in dns.FAULTS:
            dns.fault, asked = fault, dns.queries
            stage.relay.start(*wrapper)
            stage.offer(200, 10)
            until("it has asked", lambda: dns.queries > asked)  # noqa: B023
            must(stage.relay.stop() == 0, "SIGTERM: not exit 0")
        must(not stage.sink.sessions, "it found the mail server")
        must(not [line for line in stage.relay.queue() if line["tries"]], "tries were burned")
        stage.relay.start(*wrapper)
        until("it has asked again", lambda: dns.queries > asked + 1)
        dns.fault = ""
        return finish(stage)


def resolver() -> Resolver:
    """Raises Skipped."""
    try:
        return Resolver()
    except OSError as error:
        raise Skipped(f"port 53 of a loopback address: {error.strerror}") from None


@row("mail server's name has several addresses", "the first refuses, then swallows connections; the second works")
def several_addresses(run: Run) -> str:
    with run.stage(SMTP_HOST=NAME, SMTP_SECURITY="none", SMTP_TIMEOUT="1") as stage:
        wrapper = with_file(stage, "/etc/hosts", f"::1 {NAME}\n127.0.0.1 {NAME}\n")
        ask = f"import socket; print(socket.getaddrinfo({NAME!r}, 25)[0][4][0])"
        first = subprocess.run([*wrapper, sys.executable, "-c", ask], capture_output=True, check=False).stdout
        if first != b"::1\n":
            raise Skipped(f"this machine puts {first.decode().strip() or 'no address'} first")
        stage.relay.start(*wrapper)
        stage.offer(50)
        until("all is delivered", lambda: len(stage.delivered()) == 50)
        with hole("::1", stage.sink.port):
            stage.relay.stop()
            stage.relay.start(*wrapper)
            stage.offer(50)
            return finish(stage)


NAME = "mail.example.org"


def with_file(stage: Stage, path: str, text: str) -> list[str]:
    """The words before a command for which this file holds another text. Raises Skipped."""
    if subprocess.run([needs("unshare"), "-rm", "true"], capture_output=True, check=False).returncode:
        raise Skipped("name spaces are not permitted")
    other = stage.folder / path.replace("/", "-")
    other.write_text(text)
    return ["unshare", "-rm", "sh", "-c", f'mount --bind {other} {path} && exec "$@"', "sh"]


@row("backlog after an outage", "10,000 alerts (short: 500), then new ones while it drains")
def backlog(run: Run) -> str:
    many = 500 if run.short else 10_000
    with run.stage(picture_max=3000) as stage:
        stage.sink.close_port()
        stage.relay.start()
        stage.offer(many)
        stage.sink.open_port()
        until("it drains", lambda: len(stage.sink.mails) > many // 10, 30)
        answer = stage.relay.ask(b'{"event": "DOOR_OPENED", "camera": "new", "id": "new"}')[0]
        stage.record.sent["new"] = Sent("new", "new", b"")
        must(answer["ok"], f"the new alert: {answer}")
        until("the new alert goes out", lambda: "new" in stage.delivered(), 30)
        place = [name for mail in stage.sink.mails for name, _ in mail["alerts"]].index("new")
        must(run.short or place < many * 0.9, "the new alert had to wait for the backlog")
        return f"the new alert came as number {place} of {many}, {finish(stage)}"


@row("the clock jumps", "time.time() 1 h back, 10 years on, to 1970, at a start and live")
def clock_jumps(run: Run) -> str:
    with run.stage() as stage:
        offset = stage.folder / "offset"
        offset.write_text("0")
        (stage.folder / "sitecustomize.py").write_text(
            f"import time\nreal = time.time\ntime.time = lambda: real() + float(open({str(offset)!r}).read() or 0)\n"
        )
        stage.relay.environ["PYTHONPATH"] = str(stage.folder)
        stage.sink.script("dot:451 later%70", "mail:451 later%20")
        for jump in (-3600, 10 * 365 * 86400, 1000 - int(time.time()), 0):
            stage.relay.start()
            stage.offer(30)
            offset.write_text(str(jump))
            stage.offer(30)
            stage.relay.kill()
        return finish(stage)


if __name__ == "__main__":
    sys.exit(table.main(__doc__))
