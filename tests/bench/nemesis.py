#!/usr/bin/env python3
"""nemesis: the relay is killed over and over while clients send and the mail server misbehaves. Nothing may be lost.

Each epoch starts the relay on the same spool, perhaps with other settings, scripts what fails, lets the clients send,
and ends the relay: kill -9 at random or at a chosen system call, SIGTERM, SIGSTOP; fsync may fail, or files may not
grow. At the end everything works again, `retry all` sends what failed, and the nine checks are made:

    1 every acknowledged alert reached each of the two recipients        2 nothing waits
    3 nothing was delivered that was never sent                          4 the contents are equal
    5 after one end of the relay at most 16 finished deliveries and those in flight came twice, with the same
      Message-ID; nothing else came twice that the server had accepted
    6 nothing failed that the server had not refused for good            7 nothing refused was delivered
    8 the spool is sound, threads and files are as at the start          9 answers and recovery come in time

    python3 tests/bench/nemesis.py            60 kills, 5,000 acknowledged
    python3 tests/bench/nemesis.py --long     1,000 kills, 100,000 acknowledged
"""

from __future__ import annotations

import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import harness
from harness import Stage

CHOSEN_CALLS = ("fdatasync", "pwrite64", "sendto")
RECIPIENTS = (harness.OWNER, "second@example.org")
SINK_FAULTS = (
    "greeting:421%30", "greeting:554%20", "ehlo:drop%20", "mail:451%20", "mail:421%10", "rcpt:450%20", "data:451%20",
    "body:drop=1%20", "body:drop=3000%20", "dot:451%20", "dot:421%10", "dot:die%10", "dot:reset%10", "dot:garbage%10",
    "quit:drop", "rcpt:garbage%10", "dot:slow=0.01%20", "mail:stall%2", "greeting:endless%5", "greeting:stall%10",
    "rcpt@second:450 4.2.2 full%50", "rcpt@second:421%20", "dot@second:drop%20", "dot:554 5.7.1 no%10",
    "dot@second:550 5.7.1 no%30", "mail@early:lost%5", "rcpt@early:503 5.5.1 out of order%20",
)  # fmt: skip


def wrapper(rng: random.Random, how: str) -> list[str]:
    """What stands in front of the relay's command in this epoch."""
    if how == "call":
        return harness.inject(rng.choice(CHOSEN_CALLS), str(rng.randrange(1, 60)))
    if how == "eio":
        return harness.inject("fdatasync", f"{rng.randrange(2, 30)}..{rng.randrange(30, 60)}", "error=EIO")
    if how == "fsize":
        return ["prlimit", f"--fsize={rng.randrange(1, 8) << 20}"]
    return []


def end(stage: Stage, rng: random.Random, how: str) -> None:
    """Let the epoch last a little, then end the relay."""
    pause = rng.uniform(0.0, 0.5)
    if how == "call":
        latest = time.monotonic() + 1.0
        while not stage.relay.dead() and time.monotonic() < latest:
            time.sleep(0.005)
    else:
        time.sleep(pause)
    if how == "stop":
        stage.relay.signal(signal.SIGSTOP)
        time.sleep(rng.uniform(0.0, 0.2))
        stage.relay.signal(signal.SIGCONT)
        time.sleep(rng.uniform(0.0, 0.1))
    if how == "term":
        harness.must(stage.relay.stop() == 0, "SIGTERM: not exit 0")
    stage.relay.kill()


def run(product: Path, seed: int, kills: int, acked: int) -> str:
    """The whole run; its figures. Raises Red."""
    rng = random.Random(seed)
    ways = ["kill"] * 10 + ["term"] * 2 + ["stop"] * 2 + ["fsize"]
    ways += ["call"] * 6 + ["eio"] * 2 if harness.STRACE else []
    done: Counter[str] = Counter()
    with Stage(product, seed=seed, clients=4, recipients=RECIPIENTS) as stage:
        stage.baseline = stage.relay.start().footprint()
        stage.relay.kill()
        for epoch in range(kills):
            how = rng.choice(ways)
            stage.sink.script(*rng.sample(SINK_FAULTS, rng.choice((0, 1, 1, 2, 3))))
            stage.sink.pipelining = rng.random() < 0.5
            stage.relay.environ["ALERT_COOLDOWN"] = rng.choice(("0", "0", "0", "0.5"))
            stage.relay.environ["ALERT_REFUSED_AFTER"] = rng.choice(("0", "1", "1d"))
            try:
                stage.relay.start(*wrapper(rng, how))
            except harness.Red:
                if how not in ("call", "eio", "fsize"):  # These may hit while it starts.
                    raise
            stage.driver.allow(acked // kills + (epoch < acked % kills))
            end(stage, rng, how)
            done[how] += 1
        stage.relay.environ["ALERT_COOLDOWN"] = "0"
        stage.sink.script()
        began = time.monotonic()
        stage.relay.start()
        harness.must(time.monotonic() - began < 5, "9 the start took more than 5 s")
        healed = stage.heal(retry=True)
        figures = (f"{kills} kills {dict(done)}, {stage.figures()}, {len(stage.replanned)} failed and retried,"
                   f" healed in {healed:.1f} s, sink faults {sum(stage.sink.faults_done.values())}")  # fmt: skip
        try:
            stage.check()
        except harness.Red as red:
            raise harness.Red(f"{red}; {figures}") from None
        answered = stage.record.acked.keys() | stage.record.given_up  # One of a batch that broke off may be in both.
        harness.must(len(answered) == acked, f"{len(answered)} of {acked} were acknowledged or given up")
        skipped = "" if harness.STRACE else "; skipped: strace is missing, so no kill at a chosen call and no EIO"
        return f"0 lost, {figures}{skipped}"


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--long", action="store_true", help="1,000 kills, 100,000 acknowledged")
    parser.add_argument("--kills", type=int, help="so many kills")
    parser.add_argument("--acked", type=int, help="so many events acknowledged")
    args = parser.parse_args()
    kills, acked = (1000, 100_000) if args.long else (12, 600) if args.short else (60, 5000)
    kills, acked = args.kills or kills, args.acked or acked
    print(f"nemesis: seed {args.seed}, {kills} kills, {acked} events; {harness.machine()}", flush=True)
    held, words = harness.outcome(lambda: run(args.product, args.seed, kills, acked))
    print(words)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
