#!/usr/bin/env python3
"""mutants: do the proofs notice what they are for? Each mutant of the relay breaks one promise; the named check, a short
form of a proof with real processes, must go red for it, and be green for the relay as it is.

A mutant whose place is not found in the code ends the program: it has to be brought up to date.

    python3 tests/bench/mutants.py [--only WORD]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import faults
import harness
import powerloss
from harness import Run

MAIL, RELAY = "smtp_module.py", "server.py"
Edit = tuple[str, str, str]


def power_loss(run: Run) -> str:
    """60 moments."""
    found = powerloss.replay(run.product, run.seed, 60, 0)
    harness.must(not found.bad_points, f"{found}")
    return f"{found}"


@dataclass(frozen=True)
class Mutant:
    """What is broken, where, and which check must notice it."""

    what: str
    seen_by: str
    check: Callable[[Run], str]
    edits: tuple[Edit, ...]


def soak(script: str) -> Callable[[Run], str]:
    """A check: the mail server fails in this way, and no alert may fail or be lost of it."""
    return partial(faults.soak, scripts=(script,))


PUT = r"receipts = self\._outbox\.put\(\[event\.entry for event in events\]\)"
PUT_HALF = r"""kept = [event.entry for event in events][: len(events) // 2 if self.stopping else None]
            receipts = [*self._outbox.put(kept), *(smtp.PutResult(e.entry.id, True) for e in events[len(kept):])]"""
after_the_dot, takes_nothing = faults.killed_after_the_dot, faults.takes_nothing

MUTANTS = (
    # put
    Mutant("answers before the commit", "power loss", power_loss,
           tuple(powerloss.CONTROLS["answers before the commit"])),
    Mutant("synchronous=NORMAL", "power loss", power_loss, tuple(powerloss.CONTROLS["synchronous=NORMAL"])),
    Mutant("all who share a commit are answered though it failed", "fsync fails", faults.fsync_fails, (
        (MAIL, r"^( +)for put in puts:\n( +)if alone or not",
         r"\1for put in puts[1:]:\n\2put.results = [PutResult(entry.id, True) for entry in put.entries]\n"
         r"\1for put in puts[:1]:\n\2if alone or not"),
    )),
    Mutant("an id is not looked up", "the same event twice", faults.sent_twice, (
        (MAIL, "id TEXT NOT NULL UNIQUE", "id TEXT NOT NULL"), (MAIL, "while not entry.unique:", "while False:"),
    )),
    Mutant("the row of a picture is not stored", "power loss", power_loss, (
        (MAIL, r"^( +)if entry\.picture:\n( +)db\.execute\(\"INSERT INTO pictures", r'\1if False:\n\2db.execute("INSERT INTO pictures'),
    )),
    Mutant("a picture is not held against its checksum", "spool damaged", partial(faults.damaged, name="one bit in a picture"), (
        (MAIL, r"if hashlib\.sha256\(data\)\.digest\(\) == checksum", "if True"),
    )),
    Mutant("a payload is not held against its checksum", "spool damaged", partial(faults.damaged, name="one bit in a payload"), (
        (MAIL, r"or hashlib\.sha256\(payload\)\.digest\(\) != checksum", ""),
    )),
    Mutant("two programs may own a spool", "two relays", faults.two_relays, ((MAIL, r"fcntl\.flock\(.*\)", "pass"),)),
    Mutant("a removed spool is written to", "spool removed", faults.spool_deleted, (
        (MAIL, r"if file_identity\(self\.path\) != self\._identity:", "if False:"),
    )),
    Mutant("SIGTERM drops what was read", "SIGTERM while busy", faults.term_while_busy, ((RELAY, PUT, PUT_HALF),)),
    # create and finish
    Mutant("sent without being written", "kill -9 while a backlog drains", faults.killed_while_draining, (
        (MAIL, r"^( +)if self\._ended:\n( +)with self\._transaction\(\):", r"\1if False:\n\2with self._transaction():"),
        (MAIL, r"^( +)self\._write_outcomes\(\)\n( +)yield self\._db", r"\2yield self._db"),
    )),
    Mutant("outcomes are written after a second only", "power loss", power_loss,
           tuple(powerloss.CONTROLS["outcomes are written after a second only"])),
    Mutant("written as sent before the 250", "kill -9 after the dot", after_the_dot,
           tuple(powerloss.CONTROLS["written as sent before the 250"])),
    Mutant("only the first recipient gets a delivery", "one bad recipient of two", faults.bad_recipient, (
        (MAIL, r"for recipient in message\.recipients if entries else \(\):",
         "for recipient in message.recipients[:1] if entries else ():"),
        (MAIL, r"number = len\(message\.recipients\)", "number = min(1, len(message.recipients))"),
    )),
    Mutant("retry forgets who has it", "one recipient refused for good", faults.refused_recipient, (
        (MAIL, r"served\[seq\]\.add\(recipient\)", "pass"),
    )),
    Mutant("a changed recipient counts for new alerts only", "a mended recipient", faults.mended_recipient, (
        (MAIL, r"if number := self\._outbox\.void_changed\(.*\):", "if number := 0:"),
    )),
    # outcomes
    Mutant("a 4xx counts as sent", "451 to the dot", soak("dot:451*3"), (
        (MAIL, r"Verdict\.REFUSED if refused else Verdict\.TRY_LATER", "Verdict.REFUSED if refused else Verdict.SENT"),
    )),
    Mutant("a lost connection counts as sent", "drop in the body", soak("body:drop=900*3"), (
        (MAIL, r"Outcome\(Verdict\.TRY_LATER, 0, printable", "Outcome(Verdict.SENT, 0, printable"),
    )),
    Mutant("a refused login fails alerts", "535 to AUTH", soak("auth:535 5.7.8 no*3"), (
        (MAIL, r"^( +)self\._note_failure\(EVERYTHING, error\.outcome, began\)",
         r"\g<0>\n\1for entry in self._outbox.newest(1):\n\1    self._outbox.fail_entry(entry.seq, 'login refused')"),
    )),
    Mutant("a new Message-ID each time", "death after the dot", soak("dot:die*3"), (
        (MAIL, r"hashlib\.sha256\(key\.encode\(", "hashlib.sha256(os.urandom(8) + key.encode("),
    )),
    Mutant("what was accepted is sent again now and then", "451 to the dot", soak("dot:451*3"), (
        (MAIL, r"return delivery\._replace\(state=\"sent\", ", "return delivery._replace(state='sent' if delivery.number % 7 or delivery.tries > 1 else 'open', "),
    )),
    Mutant("PIPELINING is trusted for ever", "PIPELINING is broken", faults.broken_pipelining, (
        (MAIL, r"self\._lock_step = True", "pass"),
    )),
    Mutant("a mail that is too big stays as it is", "mails with pictures are refused", faults.too_big, (
        (MAIL, r"strip = has_pictures and delivery\.max_bytes != 0$", "strip = False"),
    )),
    # pauses
    Mutant("all mail is never paused", "mail server takes nothing", takes_nothing, (
        (MAIL, r"return paused is not None and self\._monotonic\(\) < paused\.until", "return False"),
    )),
    Mutant("a recipient is never paused", "mail server takes nothing", takes_nothing, (
        (MAIL, r"trouble\.failures >= FAILURES_TO_PAUSE", "False"),
    )),
    Mutant("a paused server is never probed", "421 to MAIL", soak("mail:421 4.3.2 busy*3"), (
        (MAIL, r"return paused is not None and self\._monotonic\(\) < paused\.until", "return paused is not None"),
    )),
    Mutant("a paused recipient is never probed", "mail server takes nothing", takes_nothing, (
        (MAIL, r"if not paused or self\._monotonic\(\) >= paused\.until:", "if not paused:"),
    )),
    Mutant("pauses do not grow", "mail server takes nothing", takes_nothing, (
        (MAIL, r"max\(shortest, 2 \* trouble\.length\)", "0.2"),
    )),
    Mutant("one bad recipient pauses all mail", "one bad recipient of two", faults.bad_recipient, (
        (MAIL, r"self\._note_failure\(delivery\.recipient, outcome, work\.began\)",
         "self._note_failure(EVERYTHING, outcome, work.began)"),
    )),
    Mutant("alerts fail while nothing gets through", "nothing fails", faults.nothing_ages, (
        (MAIL, r" and accepted_at > first_failed$", ""),
    )),
)  # fmt: skip


@cache
def as_it_is(check: Callable[[Run], str], run: Run) -> tuple[bool, str]:
    """The outcome of a check for the relay as it is."""
    return harness.outcome(partial(check, run))


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--only", default="", metavar="WORD", help="mutants whose description holds this")
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if args.only in mutant.what]
    harness.HEAL_S = 30.0  # For most mutants this time passes.
    print(f"seed {args.seed}; {harness.machine()}\n")
    print("| mutant | check | the relay as it is | the mutant |\n|---|---|---|---|", flush=True)
    survived, skipped = list[str](), list[str]()
    for mutant in chosen:
        sound, words = as_it_is(mutant.check, Run(args.product, args.seed, True))
        with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
            broken = harness.mutant(Path(folder), args.product, mutant.edits)
            alive, seen = harness.outcome(partial(mutant.check, Run(broken, args.seed, True)))
        if words.startswith("skipped"):
            skipped.append(mutant.what)
        elif alive or not sound:
            survived.append(mutant.what)
        state = "green" if sound and mutant.what not in skipped else words
        print(f"| {mutant.what} | {mutant.seen_by} | {state} | {'SURVIVED ' * alive}{seen} |", flush=True)
    print(f"\n{len(chosen)} mutants, {len(survived)} not noticed{': ' * bool(survived)}{'; '.join(survived)}"
          f"{f', {len(skipped)} skipped: ' * bool(skipped)}{'; '.join(skipped)}")  # fmt: skip
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
