#!/usr/bin/env python3
"""mutants: do the proofs bite? Each mutant of the relay breaks one promise; the named short check must go red.

The same check must be green for the relay as it is. A mutant whose place is not found in the code ends the program.

    python3 tests/bench/mutants.py [--only M3]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import faults
import harness
import powerloss
from harness import Run

MAIL, RELAY = "smtp_module.py", "server.py"
Edit = tuple[str, str, str]


def power_fails(run: Run) -> str:
    """60 crash points."""
    found = powerloss.replay(run.product, run.seed, 60, 0)
    harness.must(not found.lossy, f"{found}")
    return f"{found}"


@dataclass(frozen=True)
class Mutant:
    """What is broken, where, and which check must see it."""

    what: str
    seen_by: str
    check: Callable[[Run], str]
    edits: tuple[Edit, ...]


TAKE_LATER = r"""receipts = [smtp.Receipt(event.item.id, True) for event in events]
            threading.Timer(0.05, self._outbox.put, ([event.item for event in events],)).start()"""
TAKE_HALF = r"""kept = [event.item for event in events][: len(events) // 2 if self.stopping else None]
            receipts = [*self._outbox.put(kept), *(smtp.Receipt(e.item.id, True) for e in events[len(kept):])]"""
PUT = r"receipts = self\._outbox\.put\(\[event\.item for event in events\]\)"
LATER = r"(def judge\(.*(?:\n.*)*?REFUSED if refused else Verdict\.)TRY_LATER"
soak = faults.soak

MUTANTS = {
    "M1": Mutant("answers before the commit", "power loss", power_fails, ((RELAY, PUT, TAKE_LATER),)),
    "M2": Mutant("synchronous=NORMAL", "power loss", power_fails, tuple(powerloss.CONTROLS["synchronous=NORMAL"])),
    "M3": Mutant("marks a mail as sent before its 250", "kill -9 after the dot", faults.killed_after_the_dot, (
        (MAIL, r"(\n +)(yield envelope\n)",
         r"\1self._settle(mail, dict.fromkeys(mail.recipients, Outcome(Verdict.SENT)))\1\2"),
    )),
    "M4": Mutant("a 4xx counts as sent", "451 to the dot", partial(soak, scripts=("dot:451*3",)), (
        (MAIL, LATER, r"\1SENT"),
    )),
    "M5": Mutant("a lost connection counts as sent", "drop in the body", partial(soak, scripts=("body:drop=900*3",)), (
        (MAIL, r"Outcome\(Verdict\.TRY_LATER, 0, printable", "Outcome(Verdict.SENT, 0, printable"),
    )),
    "M6": Mutant("a refused login fails alerts", "535 to AUTH", partial(soak, scripts=("auth:535 5.7.8 no*3",)), (
        (MAIL, r"( +)self\._hold_back\(error\.outcome\)",
         r"\g<0>\n\1error.outcome.code == 535 and self._outbox.expire(9e9, 'login refused')"),
    )),
    "M7": Mutant("an id is not looked up", "the same event twice", faults.sent_twice, (
        (MAIL, "id TEXT NOT NULL UNIQUE", "id TEXT NOT NULL"), (MAIL, "while not item.fresh:", "while False:"),
    )),
    "M8": Mutant("a new Message-ID each time", "death after the dot", partial(soak, scripts=("dot:die*3",)), (
        (MAIL, r"hashlib\.sha256\(key\.encode\(", "hashlib.sha256(os.urandom(8) + key.encode("),
    )),
    "M9": Mutant("the end of a batch is lost on SIGTERM", "SIGTERM while busy", faults.term_while_busy, (
        (RELAY, PUT, TAKE_HALF),
    )),
    "M10": Mutant("no lock on the spool", "two relays", faults.two_relays, ((MAIL, r"fcntl\.flock\(.*\)", "pass"),)),
}  # fmt: skip


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--only", metavar="NAME", choices=sorted(MUTANTS), help="one mutant")
    args = parser.parse_args()
    print(f"seed {args.seed}; {harness.machine()}\n")
    print("| mutant | check | the relay as it is | the mutant |\n|---|---|---|---|", flush=True)
    survived = 0
    for name, mutant in MUTANTS.items():
        if args.only in (None, name):
            with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
                broken = harness.mutant(Path(folder), args.product, mutant.edits)
                sound, words = harness.outcome(lambda: mutant.check(Run(args.product, args.seed, True)))  # noqa: B023
                alive, seen = harness.outcome(lambda: mutant.check(Run(broken, args.seed, True)))  # noqa: B023
            survived += alive or not sound
            state = "green" if sound and not words.startswith("skipped") else words
            print(f"| {name} {mutant.what} | {mutant.seen_by} | {state} | {'SURVIVED ' * alive}{seen} |", flush=True)
    print(f"\n{survived} survived" if survived else "\nevery mutant was seen")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
