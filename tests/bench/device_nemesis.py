#!/usr/bin/env python3
"""device_nemesis: embedded_smtpd.py and client.py are killed over and over, around the reply that counts.

    device      operators send it commands by mail until each got its 250; the mail server misbehaves, too
    gateway     cameras send it mails until each got its 250; gateway and relay are killed in turn
    outbox      client.py --outbox with a relay that is there or not; what ended with 0 or 75 counts

Each is ended by kill -9 at random or at a chosen system call, or by SIGTERM. At the end everything works again, and

    device      each command was carried out exactly once, in order: its reply tells the value before and after; each
                reply arrived, and came a second time only because of an end of the device, as the same mail
    gateway     each mail that got its 250 is one alert, with its picture
    outbox      each event that counts is one alert, none is two

    python3 tests/bench/device_nemesis.py [--only WORD]       25 kills each
    python3 tests/bench/device_nemesis.py --long              300 kills each
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import create_connection

import harness
from faultsink import Sink
from harness import Process, Red, Stage, must, until

sys.path.insert(0, str(harness.ROOT / "tests"))
from neighbours import free_port

CHOSEN_CALLS = ("fdatasync", "pwrite64", "sendto")
CLIENT_CALLS = ("fsync", "rename", "sendto", "write", "unlink")
PROGRAM = "embedded_smtpd.py"
SINK_FAULTS = ("dot:die%20", "dot:451%20", "dot:reset%20", "body:drop=1%20", "quit:drop")


@dataclass
class Mail:
    """A mail that is sent again until it was accepted. `tries`: how often the whole mail went out."""

    name: str
    sender: str
    recipient: str
    content: bytes
    picture: str = ""  # SHA-256, or ""
    expected: str = ""  # the reply says this
    has_id: bool = True
    tries: int = 0
    accepted: bool = False

    def hand_over(self, port: int) -> int:
        """One SMTP dialogue; the code of the reply that ended it. Raises OSError and ValueError."""
        commands = (f"MAIL FROM:<{self.sender}>", f"RCPT TO:<{self.recipient}>", "DATA")
        steps = [(b"EHLO test\r\n", 250), *((f"{command}\r\n".encode(), 250) for command in commands[:2])]
        steps += [(b"DATA\r\n", 354), (self.content + b".\r\n", 250)]
        with create_connection(("127.0.0.1", port), 10) as sock, sock.makefile("rb") as replies:
            code = read_reply(replies)
            for data, wanted in steps:
                self.tries += data is steps[-1][0]
                sock.sendall(data)
                code = read_reply(replies)
                if code != wanted:
                    return code
            sock.sendall(b"QUIT\r\n")
            return code


def read_reply(replies: Iterator[bytes]) -> int:
    """The code of one reply. Raises ConnectionError at the end of the connection."""
    for line in replies:
        if line[3:4] != b"-":
            return int(line[:3])
    raise ConnectionError("closed")


class Senders:
    """Threads, each of which hands over one mail after the other while it may, each until it is accepted."""

    def __init__(self, port: Callable[[], int], makers: list[Iterator[Mail]]) -> None:
        self.mails: list[list[Mail]] = [[] for _ in makers]
        self.refused: list[str] = []
        self._port, self._ended = port, threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(maker, mails), daemon=True)
            for maker, mails in zip(makers, self.mails, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Let each finish its mail. Raises Red when one of them cannot."""
        self._ended.set()
        for thread in self._threads:
            thread.join(harness.HEAL_S)
            must(not thread.is_alive(), "a mail was not accepted within a minute")

    def _run(self, maker: Iterator[Mail], mails: list[Mail]) -> None:
        while not self._ended.is_set():
            mails.append(mail := next(maker))
            while not mail.accepted:
                try:
                    code = mail.hand_over(self._port())
                except (OSError, ValueError):
                    code = 0
                mail.accepted = code == 250
                if 500 <= code < 600:
                    self.refused.append(f"{mail.name}: {code}")
                time.sleep(0.0 if mail.accepted else 0.02)


class Killer:
    """Starts a program and ends it in one way or another."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.done = rng, Counter[str]()
        self._ways = ["kill"] * 4 + ["term"] + ["call"] * 4 * bool(harness.STRACE)

    def epoch(self, program: Process) -> None:
        """One life of the program. Raises Red when it does not start though nothing was done to it."""
        how = self.rng.choice(self._ways)
        wrapper = harness.inject(self.rng.choice(CHOSEN_CALLS), str(self.rng.randrange(1, 80))) if how == "call" else []
        try:
            program.start(*wrapper)
        except Red:
            if how != "call":
                raise
        latest = time.monotonic() + self.rng.uniform(0.05, 0.6) * (3 if how == "call" else 1)
        while not program.dead() and time.monotonic() < latest:
            time.sleep(0.005)
        if how == "term":
            must(program.stop() == 0, "SIGTERM: not exit 0")
        program.kill()
        self.done[how] += 1


def nothing_waits(spool: Path, program: Process) -> bool:
    """Is the queue of this spool empty? What has to wait for long, because nobody knows whether it arrived, goes now."""
    command = [sys.executable, str(program.product / "smtp_module.py")]
    shown = subprocess.run([*command, "queue", "--json", "--spool", spool], capture_output=True, check=True)
    if waiting := json.loads(shown.stdout):
        must(not [row for row in waiting if row["state"] == "failed"], f"failed: {waiting[:1]}")
        subprocess.run([*command, "retry", "all", "--spool", spool], capture_output=True, check=False)
        time.sleep(0.5)
    return not waiting


# --- The device ---------------------------------------------------------------------------------------


def commands(parameter: str, values: Iterator[str], first: str) -> Iterator[Mail]:
    """Mails that set a parameter to one value after the other. Each has a sender of its own: the device answers an
    address a hundred times an hour."""
    before = first
    for number, value in enumerate(values):
        name = f"{parameter}-{number}"
        sender = f"{name}@example.org"
        head = f"From: {sender}\r\nTo: device@localhost\r\nMessage-ID: <{name}@example.org>\r\n"
        content = f"{head}Subject: CMD SET {parameter}={value}\r\n\r\nplease\r\n".encode()
        yield Mail(name, sender, "device@localhost", content, expected=f"{parameter}: {before} -> {value}")
        before = value


def device(product: Path, seed: int, kills: int) -> str:
    """Raises Red."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="proof-") as place, closing(Sink(Path(place) / "got.jsonl", seed=seed)) as sink:
        folder = Path(place)
        settings = {"DEVICE_STATE": str(folder / "state"), "DEVICE_HOST": "127.0.0.1", "DEVICE_PORT": "0",
                    "DEVICE_ADDRESS": "device@localhost", "SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(sink.port)}  # fmt: skip
        program, killer = Process(folder, product, PROGRAM, **settings), Killer(rng)
        with running(program):
            program.start()
            thresholds = (str(number % 101) for number in itertools.count(1))
            names = (f"front {number}" for number in itertools.count())
            first = {name: ask(program, sink, name) for name in ("threshold", "name")}
            makers = [commands("threshold", thresholds, first["threshold"]), commands("name", names, first["name"])]
            senders = Senders(lambda: program.port, makers)
            program.kill()
            for _ in range(kills):
                sink.script(*rng.sample(SINK_FAULTS, rng.choice((0, 1, 1, 2))))
                killer.epoch(program)
            sink.script()
            program.start()
            senders.end()
            mails = [mail for maker in senders.mails for mail in maker]
            must(not senders.refused, f"refused: {senders.refused[:3]}")
            until("nothing waits", lambda: nothing_waits(folder / "state/device.db", program), harness.HEAL_S)
            complaints = [*wrong_replies(mails, sink, program.started)]
            complaints += harness.some("tracebacks", {"log"} if program.said("Traceback") else set())
            last = {"threshold": senders.mails[0][-1], "name": senders.mails[1][-1]}
            for name, mail in last.items():
                if (value := ask(program, sink, name)) != mail.expected.rpartition("-> ")[2]:
                    complaints.append(f"{name} is {value} at the end, not {mail.expected.rpartition('-> ')[2]}")
            must(program.stop() == 0, "SIGTERM: not exit 0")
        must(not complaints, "; ".join(complaints))
        again, copies = sum(mail.tries > 1 for mail in mails), Counter(mail["message_id"] for mail in sink.mails)
        return (f"{kills} ends {dict(killer.done)}, {len(mails)} commands, {again} of them sent more than once, each"
                f" carried out once, {copies.total() - len(copies)} replies came again, one at most"
                f" {max(copies.values())} times")  # fmt: skip


def ask(program: Process, sink: Sink, parameter: str) -> str:
    """The value of a parameter, by CMD GET."""
    name = f"get-{parameter}-{len(sink.mails)}"
    head = f"From: {name}@example.org\r\nMessage-ID: <{name}@example.org>\r\n"
    mail = Mail(name, f"{name}@example.org", "device@localhost", f"{head}Subject: CMD GET {parameter}\r\n\r\n".encode())
    must(mail.hand_over(program.port) == 250, "CMD GET was refused")
    found = until("the reply to CMD GET", lambda: [one for one in list(sink.mails) if one["to"] == [mail.sender]])
    line = next(line for line in found[0]["text"].splitlines() if line.startswith(f"{parameter} = "))
    return str(line.partition(" = ")[2])


def wrong_replies(mails: list[Mail], sink: Sink, started: list[float]) -> Iterator[str]:
    """What is wrong with the replies to these commands. Each has a recipient of its own."""
    replies: dict[str, list[dict[str, str]]] = defaultdict(list)
    for reply in sink.mails:
        replies[reply["to"][0]].append(reply)
    missing = {mail.name for mail in mails if not any(one["answered"] == "yes" for one in replies[mail.sender])}
    changed = {mail.name for mail in mails for one in replies[mail.sender] if mail.expected not in one["text"].splitlines()}
    several = {mail.name for mail in mails if len({one["message_id"] for one in replies[mail.sender]}) > 1}
    yield from harness.some("commands without a reply", missing)
    yield from harness.some("carried out twice, not at all or in another order", changed)
    yield from harness.some("replies with several Message-IDs", several)
    by_end, unexplained = harness.repeats([*sink.mails, *sink.refused], started, lambda mail: mail["to"])
    if unexplained or max(by_end.values(), default=0) > harness.UNWRITTEN_MAX + 2:
        yield f"{unexplained} replies were sent again though they had been accepted, after ends of the device {by_end}"


@contextmanager
def running(*programs: Process) -> Iterator[None]:
    """End the programs on leaving."""
    try:
        yield
    finally:
        for program in programs:
            program.kill()


# --- The gateway --------------------------------------------------------------------------------------


def alarms(camera: str, rng: random.Random) -> Iterator[Mail]:
    """Mails of a camera; each names a camera of its own in the recipient's address. Most have a Message-ID."""
    for number in itertools.count():
        name = f"{camera}-{number}"
        has_id, picture = rng.random() < 0.8, b""
        head = f"From: {camera}@lan\r\nSubject: Motion detected\r\n" + f"Message-ID: <{name}@lan>\r\n" * has_id
        body = "\r\nEVENT TYPE: Motion Detected\r\n"
        if rng.random() < 0.5:
            picture = b"\xff\xd8\xff" + rng.randbytes(rng.randrange(1, 30_000))
            head += "MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=b\r\n"
            data = base64.encodebytes(picture).decode().replace("\n", "\r\n")
            body = (f"\r\n--b\r\nContent-Type: text/plain\r\n{body}--b\r\nContent-Type: image/jpeg; name=a.jpg\r\n"
                    f"Content-Transfer-Encoding: base64\r\n\r\n{data}--b--\r\n")  # fmt: skip
        digest = hashlib.sha256(picture).hexdigest() if picture else ""
        recipient = f"alerts+{name}@localhost"
        yield Mail(name, f"{camera}@lan", recipient, (head + body).encode(), picture=digest, has_id=has_id)


def gateway(product: Path, seed: int, kills: int) -> str:
    """Raises Red."""
    rng = random.Random(seed)
    with Stage(product, seed=seed, clients=0, ALERT_PORT=str(free_port())) as stage:
        relay, state = stage.relay, stage.folder / "state"
        settings = {"DEVICE_STATE": str(state), "DEVICE_HOST": "127.0.0.1", "DEVICE_PORT": "0"}
        program, killer = Process(stage.folder, product, PROGRAM, **settings), Killer(rng)
        program.arguments = ["--to-relay", f"127.0.0.1:{relay.environ['ALERT_PORT']}"]
        with running(program):
            relay.start()
            senders = Senders(lambda: program.port, [alarms(name, random.Random(f"{seed}{name}")) for name in ("a", "b")])
            for _ in range(kills):
                if rng.random() < 0.3 and not relay.dead():
                    relay.kill()
                elif relay.dead() and rng.random() < 0.7:
                    relay.start()
                killer.epoch(program)
            if relay.dead():
                relay.start()
            program.start()
            senders.end()
            mails = [mail for maker in senders.mails for mail in maker]
            must(not senders.refused, f"refused: {senders.refused[:3]}")
            until("nothing waits", lambda: nothing_waits(state / "to-relay.db", program), harness.HEAL_S)
            stage.drain()
            must(program.stop() == 0, "SIGTERM: not exit 0")
        complaints = [*wrong_alerts(mails, stage)]
        complaints += harness.some("tracebacks", {"log"} if program.said("Traceback") or relay.said("Traceback") else set())
        must(not complaints, "; ".join(complaints))
        again = sum(mail.tries > 1 for mail in mails)
        return (f"{kills} ends {dict(killer.done)}, {len(mails)} mails of cameras, {again} of them sent more than once,"
                f" {len(stage.delivered())} alerts, each once")  # fmt: skip


def wrong_alerts(mails: list[Mail], stage: Stage) -> Iterator[str]:
    """What is wrong with the alerts that these mails became. A mail without a Message-ID may be one alert each try."""
    alerts: dict[str, set[str]] = defaultdict(set)
    pictures: dict[str, set[str]] = defaultdict(set)
    for mail in stage.sink.mails:
        for name, camera in mail["alerts"]:
            alerts[camera].add(name)
            pictures[camera] |= set(mail["pictures"])
    yield from harness.some("lost", {mail.name for mail in mails if not alerts[mail.name]})
    doubled = {mail.name for mail in mails if len(alerts[mail.name]) > (1 if mail.has_id else max(1, mail.tries))}
    yield from harness.some("more than one alert", doubled)
    yield from harness.some("picture changed", {mail.name for mail in mails if pictures[mail.name] != {mail.picture} - {""}})
    yield from harness.some("never sent", alerts.keys() - {mail.name for mail in mails})


# --- The outbox of client.py --------------------------------------------------------------------------


class Client:
    """Runs client.py --outbox, once for each event. Each event is that of a camera of its own."""

    def __init__(self, stage: Stage, product: Path, rng: random.Random) -> None:
        self._folder, self._rng = stage.folder, rng
        self._command = [sys.executable, str(product / "client.py"), "--port", stage.relay.environ["ALERT_PORT"],
                         "--retries", "0", "--timeout", "2", "--outbox", str(stage.folder / "outbox"), "--camera"]  # fmt: skip

    def run(self, camera: str, *wrapper: str, seconds: float | None = None) -> int:
        """Its exit code; negative when it was killed, as it is after so many seconds."""
        with subprocess.Popen([*wrapper, *self._command, camera], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              stdin=subprocess.DEVNULL, cwd=self._folder) as process:  # fmt: skip
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                return process.wait()

    def run_and_kill(self, camera: str) -> int:
        """The same; it may be killed, in one way or another."""
        if self._rng.random() < 0.5 and harness.STRACE:
            return self.run(camera, *harness.inject(self._rng.choice(CLIENT_CALLS), str(self._rng.randrange(1, 6))))
        return self.run(camera, seconds=self._rng.choice((None, self._rng.uniform(0.02, 0.2))))


def outbox(product: Path, seed: int, kills: int) -> str:
    """Raises Red."""
    rng = random.Random(seed)
    with Stage(product, seed=seed, clients=0, ALERT_PORT=str(free_port())) as stage:
        relay, client = stage.relay, Client(stage, product, rng)
        codes: dict[str, int] = {}
        for number in range(kills * 3):
            if relay.dead() and rng.random() < 0.4:
                relay.start()
            elif not relay.dead() and rng.random() < 0.2:
                relay.kill()
            codes[f"cam-{number}"] = client.run_and_kill(f"cam-{number}")
        if relay.dead():
            relay.start()
        codes["last"] = client.run("last")
        must(set(codes.values()) <= {0, 75, -9} and codes["last"] == 0, f"exit codes {Counter(codes.values())}")
        stage.drain()
        alerts: dict[str, set[str]] = defaultdict(set)
        for mail in stage.sink.mails:
            for name, camera in mail["alerts"]:
                alerts[camera].add(name)
        complaints = [*harness.some("lost", {name for name, code in codes.items() if code >= 0 and not alerts[name]})]
        complaints += harness.some("more than one alert", {name for name, ids in alerts.items() if len(ids) > 1})
        must(not complaints, "; ".join(complaints))
        kept, killed, sent = (sum(code == one for code in codes.values()) for one in (75, -9, 0))
        return (f"{len(codes)} runs, {killed} killed, {kept} kept their event, {sent} handed over all,"
                f" {sum(map(bool, alerts.values()))} alerts, each once")  # fmt: skip


PROOFS: dict[str, Callable[[Path, int, int], str]] = {"device": device, "gateway": gateway, "outbox": outbox}


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--long", action="store_true", help="300 kills each")
    parser.add_argument("--kills", type=int, help="so many kills each")
    parser.add_argument("--only", choices=PROOFS, help="one of them")
    args = parser.parse_args()
    kills = args.kills or (300 if args.long else 6 if args.short else 25)
    print(f"device_nemesis: seed {args.seed}, {kills} kills each; {harness.machine()}", flush=True)
    red = 0
    for name, proof in PROOFS.items():
        if args.only in (None, name):
            held, words = harness.outcome(lambda: proof(args.product, args.seed, kills))  # noqa: B023
            red += not held
            print(f"{name}: {words}", flush=True)
    print(f"{red} red{'' if harness.STRACE else '; skipped: strace is missing, so no kill at a chosen call'}")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
