"""bench: every figure of the README's table, and its yardsticks, in one run.

    python3 tests/bench/bench.py [--quick] [--only WORD]

Everything is durable and runs on this machine: the load, the relay and the receiver share its processors.
Yardsticks are measured in the same run (yardsticks.py). Compare ratios; single figures drift with the machine.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import os
import resource
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import yardsticks
from harness import ROOT, Relay, Skipped, machine, until
from yardsticks import PICTURE, SMALL, Counter

QUICK = False
ROWS: list[tuple[str, str, str]] = []
TAG = iter(range(10**9))


def scaled(number: int) -> int:
    """A count of work, a tenth of it with --quick."""
    return max(10, number // 10) if QUICK else number


def row(work: str, figure: str, *against: str) -> None:
    """One line of the table."""
    ROWS.append((work, figure, "; ".join(against)))
    print(f"{work:<68} {figure:<24} {ROWS[-1][2]}", flush=True)


def beside(ours: float, name: str, measure: Callable[[], float]) -> str:
    """A yardstick, measured now, and how many times as fast we are; or why there is none here."""
    try:
        theirs = measure()
    except Skipped as reason:
        return f"{name}: skipped, {reason}"
    return f"{name}: {theirs:,.0f}/s ({ours / theirs:.2f}x)"


# ───────────────────────────────────────────── The relay under load ─────────────────────────────────


@contextlib.contextmanager
def relay(smtp_port: int, **environ: str) -> Iterator[Relay]:
    """The relay in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        running = Relay(Path(folder), smtp_port, **environ).start()
        try:
            yield running
        finally:
            running.kill()


def event(picture: str = "") -> bytes:
    """One line, with an id of its own."""
    shown = f', "image_filename": "snap.jpg", "image_b64": "{picture}"' if picture else ""
    return (
        f'{{"event": "MOTION_DETECTED", "camera": "cam{next(TAG) % 8}", "id": "{os.getpid()}-{next(TAG)}",'
        f' "timestamp": "2026-05-01T22:15:00Z", "meta": {{"zone": 4}}{shown}}}\n'
    ).encode("ascii")


def picture(size: int) -> str:
    """Base64 of something that begins like a JPEG."""
    return base64.b64encode(b"\xff\xd8\xff" + os.urandom(size)).decode("ascii") if size else ""


def stream(port: int, number: int, size: int = 0) -> float:
    """Events a second over one connection, each acknowledged."""
    shown = picture(size)
    lines = (event(shown) for _ in range(number))
    writes = lines if size else [b"".join(lines)]  # all pictures at once would be much memory
    answered = 0
    with socket.create_connection(("127.0.0.1", port)) as sock:

        def read() -> None:
            nonlocal answered
            while answered < number and (chunk := sock.recv(1 << 16)):
                answered += chunk.count(b"\n")

        reader = threading.Thread(target=read)
        reader.start()
        began = time.perf_counter()
        for write in writes:
            sock.sendall(write)
        reader.join()
        return number / (time.perf_counter() - began)


def lock_step(port: int, clients: int, number: int, size: int = 0) -> float:
    """Events a second of clients that each wait for their answer, driven by this one process: it takes little."""
    shown = picture(size)
    lines = (event(shown) for _ in range(clients * number))
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        for _ in range(clients):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(sock, selectors.EVENT_READ)
        began = time.perf_counter()
        for key in list(selector.get_map().values()):
            key.fileobj.sendall(next(lines))
        answered = 0
        while answered < clients * number:
            for key, _ in selector.select():
                assert b'"queued"' in key.fileobj.recv(4096)
                answered += 1
                if line := next(lines, b""):
                    key.fileobj.sendall(line)
        return clients * number / (time.perf_counter() - began)


def delivered(running: Relay, receiver: Counter, number: int, size: int = 0) -> float:
    """Mails a second from the first event sent to the last mail taken."""
    wanted = receiver.taken() + number
    began = time.perf_counter()
    stream(running.port, number, size)
    until("all is sent", lambda: receiver.taken() >= wanted, 600)
    return number / (time.perf_counter() - began)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """What is started inside shares one processor: how processes fall on several makes a factor of its own."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# ───────────────────────────────────────────── The rows ─────────────────────────────────────────────


def plainly(smtp_port: int, number: int, size: int = 0) -> float:
    """Events a second of the plain server: 16 clients at once wait for the mail."""
    with yardsticks.plain_server(smtp_port) as port:
        return lock_step(port, 16, number // 16, size)


def accepting() -> None:
    """Events onto the disk."""
    number = scaled(3000)
    single = yardsticks.sqlite_commits(number)
    with relay(1) as running:
        streamed = stream(running.port, scaled(100_000))
        waited = lock_step(running.port, 16, scaled(600))
        pictures = stream(running.port, scaled(500), 200_000)
    row(
        "events accepted, one streaming connection", f"{streamed:,.0f}/s",
        beside(streamed, "SQLite, one commit a row", lambda: single),
        beside(streamed, "Postfix, one connection", lambda: yardsticks.postfix_accepts(1, number)),
    )  # fmt: skip
    row(
        "the same, 16 clients each waiting for its answer", f"{waited:,.0f}/s",
        beside(waited, "SQLite, one commit a row", lambda: single),
        beside(waited, "Postfix, 16 connections", lambda: yardsticks.postfix_accepts(16, number)),
        beside(waited, "the plain way, nothing on disk", lambda: plainly(0, number)),
    )  # fmt: skip
    with one_core(), relay(1) as running:
        row("16 waiting clients, all on one core", f"{lock_step(running.port, 16, scaled(600)):,.0f}/s")
    row("events with a 200 KB picture accepted", f"{pictures:,.0f}/s")


def mailing() -> None:
    """Events to mails in the receiver."""
    shown = b"\xff\xd8\xff" + os.urandom(200_000)
    with Counter() as receiver:
        with relay(receiver.port) as running:
            small = delivered(running, receiver, scaled(20_000))
            large = delivered(running, receiver, scaled(1500), 200_000)
        row(
            "event to mail, small", f"{small:,.0f}/s",
            beside(small, "Postfix", lambda: yardsticks.postfix_delivers(receiver, scaled(2000), SMALL)),
            beside(small, "the plain way", lambda: plainly(receiver.port, scaled(1600))),
        )  # fmt: skip
        row(
            "event to mail, 200 KB picture", f"{large:,.0f}/s",
            beside(large, "Postfix", lambda: yardsticks.postfix_delivers(receiver, scaled(600), PICTURE)),
            beside(large, "the plain way", lambda: plainly(receiver.port, scaled(320), 200_000)),
            beside(large, "smtplib, kept connection",
                   lambda: yardsticks.smtplib_delivers(receiver.port, scaled(300), shown)),
        )  # fmt: skip
    with one_core(), Counter() as receiver, relay(receiver.port) as running:
        row("event to mail, small, all on one core", f"{delivered(running, receiver, scaled(20_000)):,.0f}/s")


class Stamps:
    """A receiver that notes when each mail's final dot came."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.times: list[float] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            threading.Thread(target=self._session, args=(sock,), daemon=True).start()

    def _session(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with sock, sock.makefile("rb") as lines:
            sock.sendall(b"220 ready\r\n")
            data = False
            for line in lines:
                if data:
                    if line == b".\r\n":
                        self.times.append(time.perf_counter())
                        data = False
                        sock.sendall(b"250 ok\r\n")
                elif line.upper().startswith(b"DATA"):
                    data = True
                    sock.sendall(b"354 go\r\n")
                else:
                    sock.sendall(b"250 ok\r\n")


def latency() -> None:
    """One event at a time on an idle relay."""
    stamps = Stamps()
    waits = []
    with relay(stamps.port) as running, socket.create_connection(("127.0.0.1", running.port)) as sock:
        for number in range(scaled(400)):
            time.sleep(0.01)
            began = time.perf_counter()
            sock.sendall(event())
            until("the mail", lambda number=number: len(stamps.times) > number)
            waits.append((stamps.times[number] - began) * 1000)
            sock.recv(4096)
    cuts = statistics.quantiles(waits, n=100)
    row("one event on an idle relay, seen at the receiver", f"p50 {cuts[49]:.1f} ms, p99 {cuts[98]:.1f} ms")


def receiving() -> None:
    """The lock-step receivers, one connection, interleaved with other people's."""
    with yardsticks.debug_receiver() as debug, the_device() as device:
        receive("lock-step receiver, 1 KB mails", debug, scaled(6000), 1024)
        receive("lock-step receiver, 270 KB mails", debug, scaled(1000), 270_000)
        receive("the device itself, every mail stored, 1 KB mails", device, scaled(1500), 1024)
    with one_core(), yardsticks.debug_receiver() as debug:
        receive("lock-step receiver, 1 KB mails, all on one core", debug, scaled(6000), 1024)
        receive("lock-step receiver, 270 KB mails, all on one core", debug, scaled(1000), 270_000)


def receive(work: str, port: int, number: int, size: int) -> None:
    """One row: ours at this port, between the others."""
    with contextlib.ExitStack() as stack:
        ports: dict[str, int] = {}
        against: list[str] = []
        for name, server in (("smtp-sink", yardsticks.smtp_sink), ("aiosmtpd", yardsticks.aiosmtpd)):
            try:
                ports[name] = stack.enter_context(server())
            except Skipped as reason:
                against.append(f"{name}: skipped, {reason}")
        try:
            rounds = [[yardsticks.source(at, number, size) for at in (port, *ports.values())] for _ in range(3)]
        except Skipped as reason:
            return row(work, "skipped", str(reason))
        ours, *theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
        beaten = (f"{name}: {rate:,.0f}/s ({ours / rate:.2f}x)" for name, rate in zip(ports, theirs, strict=True))
        row(work, f"{ours:,.0f}/s", *beaten, *against)


@contextlib.contextmanager
def the_device() -> Iterator[int]:
    """The device with a folder of its own."""
    port = yardsticks.free_port()
    with tempfile.TemporaryDirectory() as folder:
        settings = (f"DEVICE_STATE={folder}", "DEVICE_HOST=127.0.0.1", f"DEVICE_PORT={port}")
        command = (sys.executable, str(ROOT / "embedded_smtpd.py"), "--log-level", "warning")
        with yardsticks.process(port, "env", *settings, *command):
            yield port


def idling() -> None:
    """Many silent connections."""
    number = scaled(2000)
    with relay(1) as running:
        before = running.footprint()["VmRSS"]
        began = time.perf_counter()
        socks = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(number)]
        socks[-1].sendall(b'{"ping": 1}\n')
        assert socks[-1].recv(4096)
        took = time.perf_counter() - began
        each = (running.footprint()["VmRSS"] - before) / number
        for sock in socks:
            sock.close()
    row(f"{number:,} idle connections", f"{took:.2f} s, {each:.1f} KiB each")


def waiting() -> None:
    """Ingest while very many alerts wait, because the mail server is away."""

    def rate() -> float:
        return statistics.median(stream(running.port, 4000) for _ in range(3))

    with relay(1, ALERT_RETRY_FIRST="1", ALERT_RETRY_MAX="1") as running:
        empty, memory = rate(), running.footprint()["VmRSS"]
        for number in map(scaled, (20_000, 60_000, 120_000)):
            stream(running.port, max(1, number - running.counts()["queued"]))
            full, grown = rate(), running.footprint()["VmRSS"] - memory
            against = f"empty: {empty:,.0f}/s ({full / empty:.2f}x), memory {grown / 1024:+.0f} MiB"
            row(f"ingest with {number:,} alerts waiting", f"{full:,.0f}/s", against)


def starting() -> None:
    """`client.py`, one event, as a whole process."""

    def timed(*command: str) -> tuple[float, float]:
        """Seconds by the clock, and of processor time."""
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, cwd=tempfile.gettempdir())
        took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    with relay(1) as running:
        ours = (sys.executable, "-S", str(ROOT / "client.py"), "--port", str(running.port), "--token", "t")
        bare = (sys.executable, "-S", "-c", "import json, socket")
        pairs = [(timed(*ours), timed(*bare)) for _ in range(scaled(150))]
    for what, number in (("", 0), (", processor time", 1)):
        ours_s, bare_s = (statistics.median(times[number] for times in column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(client[number] / python[number] for client, python in pairs)
        against = f"import json, socket: {bare_s * 1000:.1f} ms ({ratio:.2f}x)"
        row(f"client.py, one event, whole process{what}", f"{ours_s * 1000:.1f} ms", against)


def growing() -> None:
    """How rate and memory change with picture size and connections."""

    def memory(running: Relay) -> str:
        return f"memory {running.footprint()['VmRSS'] / 1024:.0f} MiB"

    with Counter() as receiver:
        for size, number in ((0, 2000), (20_000, 2000), (200_000, 400), (2_000_000, 60)):
            with relay(receiver.port) as running:
                rate = delivered(running, receiver, scaled(number), size)
                row(f"growth: event to mail, picture of {size // 1000} KB", f"{rate:,.0f}/s", memory(running))
    for clients in (1, 4, 16, 64):
        with relay(1) as running:
            rate = lock_step(running.port, clients, scaled(4800) // clients)
            row(f"growth: {clients} clients each waiting for its answer", f"{rate:,.0f}/s", memory(running))


MEASURES: tuple[Callable[[], None], ...] = (accepting, mailing, latency, receiving, idling, waiting, starting, growing)


def main() -> int:
    """Measure, print the table."""
    global QUICK
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    parser.add_argument("--only", metavar="WORD", help=f"one of {' '.join(m.__name__ for m in MEASURES)}")
    args = parser.parse_args()
    QUICK = args.quick
    print(f"{machine()}\n")
    for measure in MEASURES:
        if not args.only or measure.__name__ == args.only:
            measure()
    print("\n| work | measured | against |\n|---|---|---|")
    for columns in ROWS:
        print(f"| {' | '.join(columns)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
