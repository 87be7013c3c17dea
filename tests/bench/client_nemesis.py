#!/usr/bin/env python3
"""client_nemesis: client.py is killed over and over while it sends with --outbox. Nothing that it took on may be lost.

Each epoch starts the client in a loop over the same outbox, takes the relay away for a while (SIGSTOP, or SIGTERM and a
new start), and ends the client with kill -9 at a random moment. The client has taken an event on when it has printed
the relay's answer, or when the event is a file in the outbox. In the end a last client hands over what is kept, and

    1 every event that was taken on has arrived as one mail, and only one     2 nothing arrives that was never sent
    3 no file in the outbox is ever half an event                             4 the outbox is empty

    python3 tests/bench/client_nemesis.py            40 kills
    python3 tests/bench/client_nemesis.py --kills 1000
"""

from __future__ import annotations

import json
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
from collections import defaultdict
from pathlib import Path

import harness
from faultsink import Sink
from harness import Relay, must, until


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def start_client(product: Path, folder: Path, port: int, *flags: str) -> subprocess.Popen[bytes]:
    """A client in `folder` whose answers go to a file there, so that it never waits for a reader."""
    command = [sys.executable, str(product / "client.py"), "--port", str(port), "--outbox", "kept", *flags]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ALERT_")}
    with (folder / "answers").open("wb") as answers, (folder / "client.log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, env=environ, stdout=answers, stderr=log)


def accepted(folder: Path) -> set[str]:
    """The ids that the last client was told the relay has. A line that kill -9 cut off was not printed."""
    lines = (folder / "answers").read_bytes().split(b"\n")[:-1]
    return {answer["id"] for answer in map(json.loads, lines) if answer["ok"] and "id" in answer}


def kept(folder: Path) -> set[str]:
    """The ids in the outbox. Raises ValueError where a file is not a whole event."""
    return {json.loads(path.read_text())["id"] for path in (folder / "kept").glob("*.json")}


def epoch(product: Path, folder: Path, relay: Relay, rng: random.Random, number: int) -> None:
    """One client's life and death, the relay there or not."""
    flags = ["--id", f"e{number}", "--json", "--timeout", "0.2"]
    flags += ["--loop", rng.choice(("0", "0.005", "0.03")), "--retries", rng.choice("013")]
    if rng.random() < 0.3:
        flags += ["--image", "picture"]
    client = start_client(product, folder, relay.port, *flags)
    time.sleep(rng.uniform(0.0, 0.3))
    away = rng.choice(("", "", "stopped", "ended"))
    if away == "stopped":
        relay.signal(signal.SIGSTOP)
    elif away == "ended":
        must(relay.stop() == 0, "the relay did not exit with 0")
    time.sleep(rng.uniform(0.0, 0.5))
    if rng.random() < 0.5:
        relay.signal(signal.SIGCONT)
        if relay.dead():
            relay.start()
        time.sleep(rng.uniform(0.0, 0.3))
    client.kill()
    client.wait()
    relay.signal(signal.SIGCONT)


def run(product: Path, seed: int, kills: int) -> str:
    """The whole run; its figures. Raises harness.Red."""
    rng = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="proof-"))
    sink = Sink(folder / "got.jsonl", seed=seed)
    relay = Relay(folder, sink.port, product, ALERT_PORT=str(free_port()))
    (folder / "picture").write_bytes(b"\x89PNG\r\n\x1a\n" + rng.randbytes(100_000))
    taken_on: set[str] = set()
    ever_kept: set[str] = set()
    try:
        for number in range(kills):
            if relay.dead():
                relay.start()
            epoch(product, folder, relay, rng, number)
            ever_kept |= kept(folder)
            taken_on |= accepted(folder) | ever_kept
        if relay.dead():
            relay.start()
        last = start_client(product, folder, relay.port, "--heartbeat", "1", "--count", "1", "--retries", "9", "--json")
        must(last.wait(harness.HEAL_S) == 0, "the last client did not exit with 0")
        must(not kept(folder), "the outbox is not empty")
        until("nothing waits", lambda: relay.counts()["queued"] == 0, harness.HEAL_S)
        mails: dict[str, set[str]] = defaultdict(set)
        for mail in sink.mails:
            for name, _ in mail["alerts"]:
                mails[name].add(mail["message_id"])
        must(taken_on <= mails.keys(), f"lost: {sorted(taken_on - mails.keys())[:5]}")
        twice = [name for name, found in mails.items() if len(found) > 1]
        must(not twice, f"more than one mail of an event: {twice[:5]}")
        unknown = [name for name in mails if not re.fullmatch(r"e\d+-\d+", name)]
        must(not unknown, f"never sent: {unknown[:5]}")
        return f"0 lost of {len(taken_on)} taken on, {len(ever_kept)} of them kept, {len(mails)} arrived, {kills} kills"
    finally:
        relay.kill()
        sink.close()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--kills", type=int, help="so many kills")
    args = parser.parse_args()
    kills = args.kills or (5 if args.short else 40)
    print(f"client_nemesis: seed {args.seed}, {kills} kills; {harness.machine()}", flush=True)
    held, words = harness.outcome(lambda: run(args.product, args.seed, kills))
    print(words)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
