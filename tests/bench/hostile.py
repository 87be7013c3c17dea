#!/usr/bin/env python3
"""hostile: the event port under attack. Nothing brings it down, and an honest client is served meanwhile.

The relay has a token. The honest client sends pictures with it, and must never be told `busy`; the others do not know it.
Prints a table: the attack, the honest client's figures, what the relay did.

    python3 tests/bench/hostile.py [--only WORD]
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import resource
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import harness
from harness import Relay, Run, Stage, Table, certificate, must, needs, until

table = Table()
row = table.row
HONEST_P99_S, FRESH_MAX_S = 5.0, 5.0  # red beyond; a loaded machine is slow, and "held up" is for ever


TOKEN = "a token that the others do not know"
PICTURE = base64.b64encode(b"\xff\xd8\xff" + random.Random(1).randbytes(300_000)).decode()


class Honest:
    """A client that sends a picture every 10 ms while inside, every tenth on a connection of its own.

    The token is the last that its lines say. What is not accepted counts as not served.
    """

    def __init__(self, relay: Relay, context: ssl.SSLContext | None = None) -> None:
        self.kept: list[float] = []
        self.fresh: list[float] = []
        self._relay, self._context, self._done = relay, context, threading.Event()
        self._complaint = ""
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Honest:
        self._thread.start()
        until("the honest client is served", lambda: self.kept or self._complaint)
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(30)

    def served_again(self, times: int = 1) -> None:
        """Wait until it was served so many times more on new connections, or was not."""
        number = len(self.fresh) + times
        until("the honest client is served again", lambda: len(self.fresh) >= number or self._complaint)

    def verdict(self) -> str:
        """It ends; its figures. Raises Red when it was not served well."""
        self.__exit__()
        must(not self._complaint, f"the honest client: {self._complaint}")
        p99 = sorted(self.kept)[int(len(self.kept) * 0.99)]
        slowest = max(self.fresh, default=0.0)
        must(p99 < HONEST_P99_S, f"the honest client's p99 is {p99:.2f} s")
        must(slowest < FRESH_MAX_S, f"a fresh connection waited {slowest:.2f} s")
        return (f"honest: {len(self.kept)} answers p99 {p99 * 1e3:.0f} ms, {len(self.fresh)} fresh connections"
                f" at most {slowest * 1e3:.0f} ms, none refused")  # fmt: skip

    def _run(self) -> None:
        try:
            with connected(self._relay, self._context) as kept:
                number = 0
                while not self._done.wait(0.01):
                    number += 1
                    self.kept.append(self._one(kept, number, "kept"))
                    if number % 10 == 0:
                        began = time.monotonic()
                        with connected(self._relay, self._context) as fresh:
                            self._one(fresh, number, "fresh")
                        self.fresh.append(time.monotonic() - began)
        except (OSError, ValueError, harness.Red) as error:
            self._complaint = f"{type(error).__name__}: {error}"

    def _one(self, stream: Any, number: int, kind: str) -> float:
        began = time.monotonic()
        event = {"event": "MOTION_DETECTED", "camera": "honest", "id": f"{kind}-{number}"}
        event |= {"image_b64": PICTURE, "token": TOKEN}
        stream.write(json.dumps(event).encode() + b"\n")
        stream.flush()
        answer = json.loads(stream.readline())
        must(answer["ok"], f"not served: {answer}")
        return time.monotonic() - began


@contextlib.contextmanager
def connected(relay: Relay, context: ssl.SSLContext | None = None) -> Iterator[Any]:
    """A connection as a file for both ways."""
    with contextlib.ExitStack() as stack:
        sock: socket.socket = stack.enter_context(socket.create_connection(("127.0.0.1", relay.port), 10))
        if context:
            sock = stack.enter_context(context.wrap_socket(sock, server_hostname="localhost"))
        yield stack.enter_context(sock.makefile("rwb"))


class Crowd:
    """Many hostile connections at once."""

    def __init__(self, relay: Relay, number: int, **options: int) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard < number + 200:
            raise harness.Skipped(f"no more than {hard} open files are permitted")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, number + 200), hard))
        self.members = []
        for _ in range(number):
            sock = socket.socket()
            if receive := options.get("receive"):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
            sock.settimeout(10)
            sock.connect(("127.0.0.1", relay.port))
            sock.setblocking(False)
            self.members.append(sock)

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """All hang up."""
        for sock in self.members:
            sock.close()

    def send(self, data: bytes) -> int:
        """To each that still takes it; how many did not."""
        refused = 0
        for sock in self.members:
            try:
                sock.send(data)
            except OSError:
                refused += 1
        return refused


def recovered(stage: Stage, slack_mib: int = 120) -> str:
    """After the attack: alive, no tracebacks, all that was accepted mailed, and small again. Raises Red.

    It is not as small as before its first picture: the slack is for what the allocator keeps of them.
    """
    must(not stage.relay.dead(), "the relay died")
    until("nothing waits", lambda: stage.relay.counts()["queued"] == 0, harness.HEAL_S)
    must(stage.relay.counts()["failed"] == 0, "alerts failed")
    with contextlib.suppress(harness.Red):
        until("it is small again", lambda: not stage.grown(slack_mib), 40)
    must(not (grown := stage.grown(slack_mib)), f"more than at the start: {', '.join(grown)}")
    traces = stage.relay.said("Traceback")
    must(not traces, f"{traces} tracebacks in the log")
    return f"{stage.relay.footprint()['VmRSS'] >> 10} MiB at the end"


def attacked(run: Run, *wrapper: str, **environ: str) -> Stage:
    """A running relay that knows its size; alerts come as digests, so that mail is not what is measured."""
    stage = run.stage(clients=1, **{"ALERT_COOLDOWN": "0.3", "ALERT_TOKEN": TOKEN} | environ)
    stage.relay.start(*wrapper)
    stage.baseline = stage.relay.footprint()
    return stage


# ───────────────────────────────────────────── Lines ────────────────────────────────────────────────

JPEG, GIF = "/9j/4AAQSkZJRgABAQAAAQABAAD/", "R0lGODlhAQABAAAAACw="
SEEDS = (
    {"event": "MOTION_DETECTED", "camera": "cam1", "id": "a-1", "timestamp": "2026-01-02T03:04:05Z"},
    {"event": "DOOR_OPENED", "camera": "درب حیاط", "meta": {"zone": 3, "ok": True}, "image_url": "https://x.org/a"},
    {"event": "X", "camera": "后门 📷", "image_filename": "../../a.jpg", "image_b64": JPEG * 40},
    {"event": "E", "camera": "c", "image_b64": GIF}, {"heartbeat": "cam1"}, {"ping": 1},
)  # fmt: skip
NASTY = (
    b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\\ud800", b"\\u0000", b"\\u202e", b"\r", b"\x0b", b"NaN",
    b"-Infinity", b"1e999", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b'"', b"\\", b"{", b"}", b",", b":", b"null",
    b"true", b"[]", b"{}", b'"id":"a-1",', b'"image_b64":"', b'"event":', b"=?utf-8?q?=0ABcc:x?=", b"<script>",
    b"\xe2\x80\xa8", b"A" * 70_000, b"'",
)  # fmt: skip


def mutated(rng: random.Random) -> bytes:
    """One line that was right once; never blank, never with LF inside."""
    line = bytearray(json.dumps(rng.choice(SEEDS), ensure_ascii=rng.random() < 0.5).encode())
    for _ in range(rng.choice((0, 1, 1, 2, 3, 8))):
        at, end = sorted(rng.randrange(len(line) + 1) for _ in range(2))
        end = min(end, at + rng.choice((1, 1, 4, 40)))
        kind = rng.randrange(5)
        if kind == 0:
            line[at:end] = rng.choice(NASTY)
        elif kind == 1:
            line[at:at] = rng.choice(NASTY)
        elif kind == 2:
            line[at:end] = b""
        elif kind == 3:
            line[at:at] = line[at:end] * rng.choice((1, 2, 50))
        else:
            line[at:end] = rng.randbytes(end - at)
    text = bytes(line).replace(b"\n", b" ")
    return text if text.strip() else b"{"


@row("mutated lines", "100,000 (short: 5,000), seeded, in batches over one socket")
def mutated_lines(run: Run) -> str:
    rng, many, said = random.Random(run.seed), 5000 if run.short else 100_000, Counter[str]()
    with attacked(run, ALERT_MAX_LINE="64KiB", ALERT_TOKEN="") as stage:
        for start in range(0, many, 250):
            lines = [mutated(rng) for _ in range(250)]
            try:
                for answer in stage.relay.ask(*lines, timeout=30):
                    said[answer.get("error") or answer["status"]] += 1
            except (OSError, ValueError) as error:
                raise harness.Red(f"lines {start} to {start + 250}: not answered one by one: {error!r}") from None
        must(said.total() == many, f"{many - said.total()} lines have no answer")
        return f"0 of {many} unanswered, {dict(said)}, {recovered(stage)}"


COSTLY = (b"{", b"[]", b'"",', b'\\"', b"1e9,", b'"k":1,', b'"image_b64":"', b"9", b" ")


@row("costly lines", "4 peers send lines of 16 MiB made of the same few bytes (short: 2 MiB)")
def costly_lines(run: Run) -> str:
    length = (2 if run.short else 16) << 20
    lines = [(b'{"event":"E","x":[' + piece * (length // len(piece)))[: length - 2] for piece in COSTLY]
    with attacked(run) as stage, Honest(stage.relay) as honest:
        peers = [threading.Thread(target=stage.relay.ask, args=lines, kwargs={"timeout": 60}) for _ in range(4)]
        for peer in peers:
            peer.start()
        for peer in peers:
            peer.join()
        return f"{honest.verdict()}, {recovered(stage, 600)}"


@row("other protocols", "HTTP, SSH and TLS to the port; reset, half-closed, nothing at all")
def other_protocols(run: Run) -> str:
    with attacked(run) as stage, Honest(stage.relay) as honest:
        for _ in range(20):
            for hello in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"SSH-2.0-x\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b""):
                for last in ("close", "reset", "half"):
                    with socket.create_connection(("127.0.0.1", stage.relay.port), 5) as sock:
                        sock.sendall(hello)
                        if last == "reset":
                            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        elif last == "half":
                            sock.shutdown(socket.SHUT_WR)
                            while sock.recv(4096):
                                pass
        return f"{honest.verdict()}, {recovered(stage)}"


# ───────────────────────────────────────────── Connections ──────────────────────────────────────────


@row("slow loris and flood", "1,000 peers of a byte a second, then 5,000 connections (short: 100 and 500)")
def loris_and_flood(run: Run) -> str:
    slow, flood, pause = (100, 500, 0.1) if run.short else (1000, 5000, 1.0)
    with attacked(run) as stage, Honest(stage.relay) as honest, Crowd(stage.relay, slow) as loris:
        for byte in b'{"event":':
            loris.send(bytes([byte]))
            time.sleep(pause)
        began = time.monotonic()
        with Crowd(stage.relay, flood):
            took = time.monotonic() - began
            threads = stage.relay.footprint()["Threads"]
            loris.send(b"x")
            time.sleep(2 * pause)
        loris.leave()
        return f"{honest.verdict()}, flood in {took:.1f} s, {threads} threads at the peak, {recovered(stage)}"


@row("silent strangers", "as many silent connections as there are places, and half as many again (short: 150 at 100)")
def silent_strangers(run: Run) -> str:
    places = 100 if run.short else 4096
    with attacked(run, ALERT_MAX_CONNECTIONS=str(places)) as stage, Honest(stage.relay) as honest:
        with Crowd(stage.relay, places + places // 2) as crowd:
            honest.served_again(2 if run.short else 20)
            verdict = honest.verdict()
            told = sum(b"busy" in _peek(sock) for sock in crowd.members)
        must(told >= places // 2, f"only {told} were told that their places are needed")
        must(stage.relay.said("turned out") == 1, "not logged once")
        return f"{verdict}, {told} strangers turned out, {recovered(stage)}"


@row("half-sent lines", "1,000 peers each within a line of 16 MiB (short: of 512 KiB)")
def half_sent_lines(run: Run) -> str:
    peers, most = 1000, 512 << 10 if run.short else 16 << 20
    with attacked(run) as stage, Honest(stage.relay) as honest, Crowd(stage.relay, peers) as crowd:
        peak, left, end = 0, [most - 1] * peers, time.monotonic() + (5 if run.short else 40)
        while any(left) and time.monotonic() < end:
            for number, sock in enumerate(crowd.members):
                try:
                    left[number] -= sock.send(b"{" * min(left[number], 65536))
                except BlockingIOError:
                    pass
                except OSError:  # it was turned out
                    left[number] = 0
            peak = max(peak, stage.relay.footprint()["VmRSS"])
        honest.served_again(2 if run.short else 20)
        verdict = honest.verdict()
        crowd.leave()
        grown = peak - stage.baseline["VmRSS"] >> 10
        must(grown < 600, f"{grown} MiB more")
        return f"{verdict}, {grown} MiB more at the peak, {recovered(stage, 600)}"


@row("peers that never read", "50 peers send pings without end")
def never_read(run: Run) -> str:
    with attacked(run) as stage, Honest(stage.relay) as honest, Crowd(stage.relay, 50, receive=4096) as crowd:
        end = time.monotonic() + (0.5 if run.short else 35)
        while time.monotonic() < end:
            crowd.send(b'{"ping": 1}\n' * 100)
            time.sleep(0.05)
        crowd.leave()
        return f"{honest.verdict()}, {recovered(stage)}"


@row("many tiny lines", "40 peers send 4 MiB of pings each and do not read (short: 10)")
def tiny_lines(run: Run) -> str:
    peers = 10 if run.short else 40
    with attacked(run) as stage, Crowd(stage.relay, peers) as crowd:
        data, sent, peak = b'{"ping":1}\n' * 380_000, [0] * peers, 0
        end = time.monotonic() + (3 if run.short else 15)
        while min(sent) < len(data) and time.monotonic() < end:
            for number, sock in enumerate(crowd.members):
                with contextlib.suppress(OSError):
                    sent[number] += sock.send(data[sent[number] :])
            peak = max(peak, stage.relay.footprint()["VmRSS"])
        crowd.leave()
        grown = peak - stage.baseline["VmRSS"] >> 10
        must(grown < 4 * peers, f"{grown} MiB more for {peers} peers of 4 MiB")
        return f"{grown} MiB more at the peak, {recovered(stage, 200)}"


@row("peers that send and leave", "500 events, closed at once without reading, half of them with a reset")
def send_and_leave(run: Run) -> str:
    with attacked(run, ALERT_TOKEN="") as stage:
        for number in range(500):
            with socket.create_connection(("127.0.0.1", stage.relay.port), 5) as sock:
                sock.sendall(b'{"event": "X", "camera": "c", "id": "left-%d"}\n' % number)
                if number % 2:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        until("all are accepted", lambda: len(stage.delivered()) == 500, 10)
        return f"500 of 500 accepted, {recovered(stage)}"


@row("handshakes never finished", "500 peers on a TLS port send half a ClientHello (short: 100)")
def handshakes(run: Run) -> str:
    with run.stage(clients=1, ALERT_COOLDOWN="0.3") as stage:
        certificate(stage.folder)
        trust = ssl.create_default_context(cafile=str(stage.folder / "cert.pem"))
        stage.relay.environ["ALERT_TLS_CERT"] = str(stage.folder / "cert.pem")
        stage.relay.environ["ALERT_TLS_KEY"] = str(stage.folder / "key.pem")
        stage.relay.environ["ALERT_TOKEN"] = TOKEN
        stage.relay.start()
        peers = 100 if run.short else 500
        with Honest(stage.relay, trust) as honest, Crowd(stage.relay, peers) as crowd:
            crowd.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
            time.sleep(0.3 if run.short else 12)
            threads = stage.relay.footprint()["Threads"]
        must(run.short or threads < peers / 2, f"{threads} threads: handshakes have no deadline")
        must(not stage.relay.dead() and not stage.relay.said("Traceback"), "dead, or tracebacks in the log")
        return f"{honest.verdict()}, {threads} threads at the end"


@row("few file descriptors", "prlimit --nofile=64, 200 silent connections")
def few_descriptors(run: Run) -> str:
    with attacked(run, needs("prlimit"), "--nofile=64") as stage:
        with Crowd(stage.relay, 200):
            used = idled(run, stage)
            with Honest(stage.relay) as honest:
                honest.served_again(2)
                verdict = honest.verdict()
        return f"{used}, {verdict}, {recovered(stage)}"


@row("few file descriptors, no token", "as before; where nobody is a stranger, the others are served afterwards")
def few_descriptors_open(run: Run) -> str:
    with attacked(run, needs("prlimit"), "--nofile=64", ALERT_TOKEN="") as stage:
        with Crowd(stage.relay, 200):
            used = idled(run, stage)
        with Honest(stage.relay) as honest:
            honest.served_again(2)
        return f"{used}, then {honest.verdict()}, {recovered(stage)}"


def idled(run: Run, stage: Stage) -> str:
    """The relay's share of a processor for a while. Raises Red when it is in a busy loop."""
    seconds, before = 0.5 if run.short else 5.0, stage.relay.cpu_s()
    time.sleep(seconds)
    used = (stage.relay.cpu_s() - before) / seconds
    must(used < 0.5, f"a busy loop: {used:.0%} of a processor")
    return f"{used:.0%} of a processor meanwhile"


@row("SIGSTOP and SIGCONT", "2 s, with 300 connections waiting")
def stopped(run: Run) -> str:
    with attacked(run) as stage, Crowd(stage.relay, 300) as crowd:
        stage.relay.signal(signal.SIGSTOP)
        crowd.send(b'{"ping": 1}\n')
        time.sleep(0.5 if run.short else 2)
        stage.relay.signal(signal.SIGCONT)
        answered = [until("an answer", lambda s=sock: b"pong" in _peek(s)) for sock in crowd.members]
        crowd.leave()
        return f"{len(answered)} of 300 answered, {recovered(stage)}"


def _peek(sock: socket.socket) -> bytes:
    try:
        return sock.recv(4096, socket.MSG_PEEK)
    except BlockingIOError:
        return b""


@row("a log that nobody reads", "standard error is a full pipe: 300 events, their mails, SIGTERM")
def log_unread(run: Run) -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:  # the port that it logs is not to be read
        number = free.getsockname()[1]
    # An empty PYTHONUNBUFFERED counts as none: a buffered standard error is the harder case.
    with run.stage(clients=3, ALERT_PORT=str(number), PYTHONUNBUFFERED="") as stage:
        relay, (read, write) = stage.relay, os.pipe()
        relay.port = number
        os.set_blocking(write, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(write, b"." * 4096)
        os.set_blocking(write, True)
        try:
            command = [sys.executable, str(run.product / "server.py")]
            relay.process = subprocess.Popen(command, cwd=stage.folder, env=relay.environ, stderr=write)
            until("it answers", lambda: _answers(relay))
            stage.offer(300, 20)
            until("nothing waits", lambda: relay.counts()["queued"] == 0, 20)
            began = time.monotonic()
            must(relay.stop() == 0, "SIGTERM: not exit 0")
            return f"{stage.figures()}, ended in {time.monotonic() - began:.1f} s"
        finally:
            os.close(read)
            os.close(write)


def _answers(relay: Relay) -> bool:
    try:
        return bool(relay.counts()["ok"])
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(table.main(__doc__))
