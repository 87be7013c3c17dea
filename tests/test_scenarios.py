"""The rules of delivery, over random schedules in simulated time.

A seed makes a schedule: alerts, what the mail server does and when, changes of the configuration, kills, requests of the
command line. The real Outbox, Courier and relay policy run against a simulated mail server; a ledger, written from the
contract and not from the code, checks each step. A schedule that breaks a rule is made as short as possible and its
transcript is printed.

    python tests/test_scenarios.py --seeds 5000 [--first 200]     many seeds; what fails is sorted by rule
    python tests/test_scenarios.py --seed 17 [--log]              one seed with its transcript
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime as dt
import fnmatch
import itertools
import json
import logging
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import PNG

import server
import smtp_module as smtp
from smtp_module import Delivery, DueMessage, Entry, History, NewEntry, Outcome, PendingEntry, Plan, Verdict

SEEDS = int(os.environ.get("SCENARIO_SEEDS", "200"))
EVERYBODY = "*"  # the key of what the mail server does to all mail
ANN, BOB, CID, DAN = PEOPLE = ("ann@x.org", "bob@x.org", "cid@x.org", "dan@x.org")
PICTURE = base64.b64encode(PNG[:200])
EPOCH = 1_700_000_000.0  # the wall clock at the begin of a schedule, or up to a week later
LATENCY_S = 0.02  # of each step of a transaction
TIMEOUT_S, DOT_TIMEOUT_S = 30.0, 600.0  # how long the client waits for a server that is silent
TICK_S = 0.5
SLOWEST_POLL_S = 300.0
UNWRITTEN_S = 1.0  # an outcome is on disk after this
DAY_S = 86400.0
OPENING = ("resolve", "connect", "greeting", "login")


class Violation(AssertionError):
    """A rule is broken."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule = rule


class Killed(BaseException):
    """The program ends here, whatever it was doing."""


# what a schedule is made of


@dataclass(frozen=True)
class Setup:
    """The configuration of the relay, and of its client."""

    recipients: tuple[str, ...] = (ANN,)
    routes: tuple[tuple[str, tuple[str, ...]], ...] = ()  # pattern of camera or event, recipients
    plain: bool = False  # a small policy of its own in place of the relay's
    cooldown: float = 0.0
    daily_max: int = 0
    quiet: tuple[int, int] | None = None  # hours of the day
    retry_first: float = 5.0
    retry_max: float = 300.0
    max_age: float = 7200.0
    refused_after: float = 3600.0
    senders: int = 2
    pipelining: bool = True

    def route(self, event: str, camera: str) -> tuple[str, ...]:
        for pattern, names in self.routes:
            if fnmatch.fnmatchcase(camera, pattern) or fnmatch.fnmatchcase(event, pattern):
                return names
        return self.recipients

    def policy(self) -> Any:
        if self.plain:
            return PlainPolicy(self)
        quiet = server.quiet_rules("{:02}:00-{:02}:00".format(*self.quiet)) if self.quiet else frozenset[int]()
        config = server.RelayConfig(
            recipients=self.recipients,
            routes=tuple(server.Route.of(f"{pattern}={','.join(names)}") for pattern, names in self.routes),
            cooldown_s=self.cooldown, daily_max=self.daily_max, quiet=quiet, sender="relay@x.org",
        )  # fmt: skip
        return server.AlertMailer(config)

    def rules(self) -> smtp.RetryRules:
        return smtp.RetryRules(self.retry_first, self.retry_max, self.max_age, self.refused_after)

    def is_quiet(self, wall: float) -> bool:
        if not self.quiet:
            return False
        begin, end = self.quiet
        hour = dt.datetime.fromtimestamp(wall).hour
        return begin <= hour < end if begin < end else hour >= begin or hour < end


class PlainPolicy:
    """Each alert is a mail of its own."""

    window, limit = 0.0, 0

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def plan(self, waiting: Iterable[PendingEntry], sent: History, now: float, most: int) -> Plan:
        due: list[DueMessage] = []
        for entry in waiting:
            to = tuple(name for name in self.recipients(entry.kind, entry.source) if name not in entry.served)
            if to and sent.paused.issuperset(to):
                continue
            due.append(DueMessage((entry.seq,), to, "plain", ((entry.kind, entry.source),)))
            if len(due) >= most:
                break
        return Plan(due)

    def recipients(self, kind: str, source: str) -> tuple[str, ...]:
        return self._setup.route(kind, source)

    def render(self, delivery: Delivery, entries: Sequence[Entry]) -> smtp.Message:
        shown = delivery.max_bytes != 0 and any(entry.picture() for entry in entries)
        names = ",".join(entry.id for entry in entries)
        text = f"Message-ID: <{names}@x>\r\nX-Alert-Id: {names}\r\nTo: {','.join(delivery.recipients)}\r\n\r\n"
        return smtp.Message("relay@x.org", [text.encode(), *([b"Content-Type: image/png\r\n"] if shown else [])])


@dataclass(frozen=True)
class Behaviour:
    """What the mail server does at a step, to one recipient or to everybody.

    fine; slow: it answers after `seconds`; reply: it answers `reply`; cut: it closes the connection; silent: it never
    answers; lost: it accepts the mail and does not say so; picture: as reply (or cut), to mails with pictures alone;
    limit: as reply, unless `seconds` have passed since it last accepted one; size: larger mails are refused at MAIL.
    """

    kind: str = "fine"
    step: str = ""
    reply: str = ""
    seconds: float = 0.0
    chance: float = 1.0

    def __str__(self) -> str:
        more = f" {self.reply}" * bool(self.reply) + f" {self.seconds:g} s" * bool(self.seconds)
        return f"{self.kind} at {self.step}{more}" + (f" ({self.chance:.0%})" if self.chance < 1 else "")


FINE = Behaviour()


@dataclass(frozen=True)
class Schedule:
    """What happens, and when, in seconds from the begin."""

    seed: int
    setup: Setup
    begins: float  # the wall clock
    ends: float
    actions: tuple[tuple[Any, ...], ...]  # (at, name of the action, its arguments)


# the simulated mail server and the transport to it


class Rendered(smtp.Message):
    """A message, with what the ledger wants to know of it."""

    number: int
    prepared: float
    message_id: str
    ids: tuple[str, ...]
    to: frozenset[str]
    pictures: bool


def read_mail(message: smtp.Message) -> tuple[str, tuple[str, ...], frozenset[str], bool]:
    """What stands in a mail: its Message-ID, the ids of its alerts, its To, whether it has pictures."""
    text = b"".join(message.data).decode()
    head, _, body = text.partition("\r\n\r\n")
    fields = dict(re.findall(r"^([\w-]+): ([^\r]*(?:\r\n[ \t][^\r]*)*)", head, re.MULTILINE))
    if "X-Alert-Id" in fields:
        ids = tuple(fields["X-Alert-Id"].strip().split(","))
    else:
        table = re.search(r"text/csv(?:.|\n)*?\r\n\r\n([A-Za-z0-9+/=\r\n]+?)\r\n--", body)
        assert table, text
        lines = base64.b64decode(table[1]).decode("utf-8-sig").splitlines()[1:]
        ids = tuple(line.partition(",")[0] for line in lines)
    to = frozenset(re.findall(r"[\w.]+@[\w.]+", fields["To"]))
    return fields["Message-ID"].strip(), ids, to, "Content-Type: image/" in body


@dataclass(eq=False)
class Transaction:
    """One try of one delivery, as the ledger knows it."""

    message: Rendered
    recipient: str
    began: float
    ended: float | None = None
    outcome: Outcome | None = None
    followed_by: int = 0  # the delivery that was begun together with the end of this one

    @property
    def ids(self) -> str:
        names = self.message.ids
        return ",".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


class Wire:
    """A transport to the simulated server: the same order of steps as the SMTP client, without a socket."""

    def __init__(self, simulation: Simulation, sender: Sender) -> None:
        self._simulation, self._sender = simulation, sender
        self._connected, self._mails = False, 0

    def open(self) -> None:
        if self._connected:
            return
        ledger, began = self._simulation.ledger, self._simulation.now
        try:
            self._connect()
        except smtp.Unavailable as error:
            ledger.not_opened(error.outcome)
            raise
        ledger.opened(began)

    def _connect(self) -> None:
        for step in OPENING:
            if outcome := self._answer(step, None):
                outcome = replace(outcome, verdict=Verdict.TRY_LATER, about_us=True, too_big=False)
                raise smtp.Unavailable(outcome)
        self._connected, self._mails = True, 0

    def send(self, message: smtp.PreparedMessage, following: Callable[[], Any] | None = None) -> Outcome:
        rendered = message.message
        assert isinstance(rendered, Rendered)
        transaction = Transaction(rendered, message.recipient, self._simulation.now)
        self._simulation.ledger.begins(transaction)
        outcome = self._deliver(transaction, message.length, following)
        self._simulation.ledger.ends(transaction, outcome)
        return outcome

    def _deliver(self, transaction: Transaction, length: int, following: Callable[[], Any] | None) -> Outcome:
        """A kept connection that ends at MAIL is made anew, once."""
        for again in (True, False):
            kept, worn = self._connected, self._mails > 0
            try:
                if not kept:
                    self._connect()
                outcome = self._transact(transaction, length, following)
            except smtp.Unavailable as error:
                return error.outcome
            if not (again and kept and outcome.step == "mail" and (worn or outcome.code in (0, 421))):
                break
            if outcome.verdict is Verdict.SENT or outcome.too_big:
                break
            self._connected = False
        return outcome

    def _transact(self, transaction: Transaction, length: int, following: Callable[[], Any] | None) -> Outcome:
        for step in ("mail", "rcpt", "data", "dot"):
            if step == "dot" and following and self._simulation.setup.pipelining and (later := following()):
                transaction.followed_by = later.message.number
            if outcome := self._answer(step, transaction, length):
                return outcome
        self._simulation.ledger.stored(transaction, answered=True)
        self._mails += 1
        return smtp.judge("dot", 250, "taken")

    def _answer(self, step: str, transaction: Transaction | None, length: int = 0) -> Outcome | None:
        """Wait for the answer to a step; None: yes."""
        at_dot = step == "dot"
        found = self._simulation.behaviour(step, transaction, length)
        quick = LATENCY_S * (0.5 + self._simulation.random.random())
        wait = found.seconds if found.kind == "slow" else quick
        if found.kind in ("silent", "lost"):
            wait = DOT_TIMEOUT_S if at_dot else TIMEOUT_S
        if found.kind == "lost" and transaction:
            self._simulation.ledger.stored(transaction, answered=False)
            wait = wait if found.reply else quick
        try:
            self._sender.sleep(wait)
        except Killed:
            if at_dot and transaction and found.kind in ("fine", "slow") and self._simulation.random.random() < 0.5:
                self._simulation.ledger.stored(transaction, answered=False)
            raise
        if found.kind in ("fine", "slow"):
            return None
        return self._bad(step, found, length)

    def _bad(self, step: str, found: Behaviour, length: int) -> Outcome:
        code, _, text = found.reply.partition(" ")
        if found.kind in ("silent", "lost", "cut") or not code:
            self._connected = False
            silent = found.kind == "silent" or (found.kind == "lost" and found.reply)
            cut = ConnectionRefusedError() if step == "connect" else ConnectionResetError()
            return smtp.judge_error(step, TimeoutError() if silent else cut)
        if step in OPENING or code == "421":
            self._connected = False
        outcome = smtp.judge(step, int(code), text)
        return replace(outcome, size_limit=length - 1) if found.kind == "size" else outcome

    def close(self) -> None:
        self._connected = False


# the ledger: what must hold


@dataclass(eq=False)
class Copy:
    """A mail as it lies in somebody's mailbox. `lost`: the program was killed before it wrote down that it was sent."""

    at: float
    transaction: Transaction
    answered: bool
    lost: bool = False


@dataclass(eq=False)
class Alert:
    id: str
    event: str
    camera: str
    put_at: float
    wall: float
    picture: bool
    routes: list[tuple[str, ...]]  # who should get it, by each configuration since it was put
    state: str = "waiting"
    deliveries: set[int] = field(default_factory=set)  # those that count, since a retry
    planned_again: bool = False
    dropped_at: float | None = None
    copies: dict[str, list[Copy]] = field(default_factory=lambda: defaultdict(list))

    def has(self, name: str) -> bool:
        return any(copy.answered and not copy.lost for copy in self.copies[name])


@dataclass(eq=False)
class Made:
    """A delivery as the ledger knows it."""

    number: int
    alerts: tuple[Alert, ...]
    recipient: str
    state: str = "open"
    ended: float = 0.0
    tries: list[Transaction] = field(default_factory=list)

    def first_failed(self) -> float | None:
        failed = (one.ended for one in self.tries if one.outcome and one.outcome.verdict is not Verdict.SENT
                  and not one.outcome.about_us)  # fmt: skip
        return next((when for when in failed if when is not None), None)


@dataclass(frozen=True)
class Promise:
    """What `queue` said of an alert."""

    alert: Alert = field(repr=False)
    id: str
    names: frozenset[str]  # to whom a delivery of it is open
    state: str
    next: float
    made_at: float
    turn: int


class Ledger:
    """What happened, checked against the rules."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self.alerts: dict[str, Alert] = {}
        self.by_seq: dict[int, Alert] = {}
        self.made: dict[int, Made] = {}
        self.transactions: list[Transaction] = []
        self.in_flight: set[Transaction] = set()
        self.attempts: list[tuple[float, str]] = []  # in vain, to connect or to deliver
        self.accepted: list[tuple[float, int]] = []  # and told so
        self.failures: Counter[str] = Counter()  # in a row, of each recipient
        self.unsure: set[str] = set()  # whose pause may be over, because nothing was left to try
        self.failing_since: dict[str, float] = {}  # since the first failure of that row was known
        self.down: Outcome | None = None  # the last trouble about us, until it is over
        self.down_since = 0.0
        self.trouble: set[str] = set()  # who had failures in this life of the courier
        self.created_at: dict[tuple[str, str], list[float]] = defaultdict(list)  # by group
        self.digests: dict[tuple[str, ...], float] = {}  # of what had waited longer than its cooldown
        self.lost = 0
        self.ended_at = 0.0
        self.turn = 0  # what promises were based on has changed
        self.promises: list[Promise] = []

    @property
    def _now(self) -> float:
        return self._simulation.now

    def _note(self, text: str) -> None:
        self._simulation.note(text)

    # alerts

    def put(self, entry: NewEntry, seq: int, picture: bool) -> None:
        setup = self._simulation.setup
        alert = Alert(entry.id, entry.kind, entry.source, self._now, entry.arrived, picture,
                      [setup.route(entry.kind, entry.source)])  # fmt: skip
        self.alerts[entry.id] = self.by_seq[seq] = alert

    def unfinished(self) -> list[Alert]:
        return [alert for alert in self.alerts.values() if alert.state in ("waiting", "sending")]

    # deliveries

    def created(self, due: Sequence[DueMessage], created: Sequence[Delivery]) -> None:  # noqa: C901
        messages: dict[tuple[tuple[int, ...], tuple[str, ...]], list[Delivery]] = defaultdict(list)
        for delivery in created:
            messages[delivery.entries, delivery.recipients].append(delivery)
        if self.down and len(messages) > (2 if self._simulation.setup.plain else 1):
            raise Violation("created while all mail waits", f"{len(messages)} messages at once")
        for (seqs, recipients), deliveries in messages.items():
            alerts = tuple(self.by_seq[seq] for seq in seqs)
            self._note(f"created {','.join(alert.id for alert in alerts)} for {', '.join(recipients)}")
            self._check_created(alerts, recipients)
            for name in recipients:
                self._forgive(name)
            for delivery in deliveries:
                self.made[delivery.number] = Made(delivery.number, alerts, delivery.recipient)
            for alert in alerts:
                if alert.state != "waiting":
                    raise Violation("created twice", f"{alert.id} is {alert.state}")
                alert.state = "sending"
                alert.deliveries |= {delivery.number for delivery in deliveries}
        for message in due:
            for alert in (self.by_seq[seq] for seq in message.entries if not message.recipients):
                if alert.state == "waiting":
                    alert.state = "sending"
                    self._settle(alert)
        if not self._simulation.setup.plain:
            self._check_planned(list(messages))

    def _check_created(self, alerts: Sequence[Alert], recipients: tuple[str, ...]) -> None:
        if all(self.is_paused(name) for name in recipients):
            raise Violation("created for paused recipients", f"{[a.id for a in alerts]} for {recipients}")
        for alert, name in itertools.product(alerts, recipients):
            if alert.has(name):
                raise Violation("created for somebody who has it", f"{alert.id} for {name}")
            if name not in self._simulation.setup.route(alert.event, alert.camera):
                raise Violation("created for nobody's recipient", f"{alert.id} for {name}")

    def _check_planned(self, messages: Sequence[tuple[tuple[int, ...], tuple[str, ...]]]) -> None:
        """Quiet hours and cooldowns."""
        setup, wall = self._simulation.setup, self._simulation.wall()
        for seqs, recipients in messages:
            alerts = [self.by_seq[seq] for seq in seqs]
            groups = {(alert.event, alert.camera) for alert in alerts}
            if setup.is_quiet(wall) and any(alert.event != "DOOR_OPENED" for alert in alerts):
                raise Violation("created in quiet hours", str([alert.id for alert in alerts]))
            if self._simulation.clock_was_set or setup.quiet or setup.daily_max or not setup.cooldown:
                continue
            again = any(alert.planned_again for alert in alerts)
            for group in groups:
                overdue = any(wall - alert.wall > setup.cooldown for alert in alerts)
                for when in self.created_at[group] if not (again or overdue) else ():
                    if self._now - when < setup.cooldown - 1:
                        raise Violation("two mails in one cooldown", f"{group} at {when:.1f} and now")
                if not again:
                    self.created_at[group].append(self._now)
            if not again and all(wall - alert.wall > setup.cooldown + 6 for alert in alerts):
                before = self.digests.get(recipients, -1e9)
                waited = min(alert.put_at for alert in alerts) + setup.cooldown + 6
                if self._now - before < setup.cooldown and waited < before:
                    raise Violation("more than one digest of what waited", f"for {recipients}, at {before:.1f} and now")
                self.digests[recipients] = self._now

    def is_paused(self, name: str) -> bool:
        return self.failures[name] >= 3

    def _settle(self, alert: Alert) -> None:
        """An alert ends when its last delivery has ended."""
        states = {self.made[number].state for number in alert.deliveries}
        if alert.state == "sending" and "open" not in states:
            alert.state = "failed" if "failed" in states else "sent"

    def finished(self, delivery: Delivery) -> None:
        made = self.made[delivery.number]
        if made.state != "open":
            return
        if delivery.state == "failed":
            self._check_failed(made)
            self._note(f"failed {','.join(alert.id for alert in made.alerts)} to {made.recipient}")
        made.state, made.ended = delivery.state, self._now
        if made.state != "open":
            for alert in made.alerts:
                self._settle(alert)
            self._forgive(made.recipient)

    def _forgive(self, name: str) -> None:
        """Where nothing is open that could find out whether a pause is over, the next message does."""
        if not any(made.recipient == name and made.state == "open" for made in self.made.values()):
            self.failures[name] = 0
            self.failing_since.pop(name, None)
            self.unsure.add(name)

    def _check_failed(self, made: Made) -> None:
        setup, first, last = self._simulation.setup, made.first_failed(), made.tries[-1].outcome
        assert last
        if first is None:
            raise Violation("failed without a failure", made.alerts[0].id)
        limit = setup.refused_after if last.verdict is Verdict.REFUSED else setup.max_age
        if last.verdict is Verdict.REFUSED and not setup.refused_after:
            return
        slack = 62.0 if self._simulation.clock_was_set else 1.0
        if self._now - first < limit - slack:
            raise Violation("failed too soon", f"{made.alerts[0].id} to {made.recipient} after {self._now - first:.0f} s")
        if not any(when >= first for when, number in self.accepted if number != made.number):
            raise Violation("failed while nothing got through", f"{made.alerts[0].id} to {made.recipient}")

    # transactions

    def opened(self, began: float) -> None:
        if self.down and self.down.step in OPENING and began >= self.down_since:
            self.down = None

    def not_opened(self, outcome: Outcome) -> None:
        self._note(f"no connection: {outcome}")
        self.attempts.append((self._now, ""))
        self._is_down(outcome)

    def _is_down(self, outcome: Outcome) -> None:
        if not self.down:
            self.down_since = self._now
        self.down = outcome
        self.trouble.add(EVERYBODY)
        self.check_promises("", outcome)

    def begins(self, transaction: Transaction) -> None:
        message, name = transaction.message, transaction.recipient
        made = self.made[message.number]
        if made.recipient != name or made.state in ("sent", "failed"):
            raise Violation("sent again", f"{transaction.ids} to {name} is {made.state}")
        for alert in made.alerts:
            if alert.id in message.ids and alert.dropped_at is not None and message.prepared > alert.dropped_at:
                raise Violation("sent though dropped", alert.id)
        since = self.failing_since.get(name)
        if since is not None and message.prepared > since:
            for other in self.in_flight:
                if other.recipient == name and other.message.prepared > since:
                    raise Violation("two at a time to a failing recipient", f"{other.ids} and {transaction.ids} to {name}")
        made.tries.append(transaction)
        self.in_flight.add(transaction)
        self.transactions.append(transaction)

    def stored(self, transaction: Transaction, answered: bool) -> None:
        """A mail lies in its mailbox."""
        message, name = transaction.message, transaction.recipient
        if name not in message.to:
            raise Violation("To does not name the recipient", f"{transaction.ids}: {message.to}")
        for identity in message.ids:
            alert = self.alerts[identity]
            if not any(name in names for names in alert.routes):
                raise Violation("sent to a stranger", f"{identity} to {name}")
            if earlier := alert.copies[name]:
                last = earlier[-1]
                if last.answered and not last.lost:
                    raise Violation("sent twice", f"{identity} to {name}, first at {last.at:.1f}")
                same = last.transaction.message.message_id == message.message_id
                if not same and not alert.planned_again:
                    raise Violation("sent twice with another Message-ID", f"{identity} to {name}")
            alert.copies[name].append(Copy(self._now, transaction, answered))
            if alert.picture and not message.pictures and len(message.ids) == 1:
                self._check_without_picture(transaction)

    def _check_without_picture(self, transaction: Transaction) -> None:
        tries = [one for one in self.made[transaction.message.number].tries if one.outcome and not one.outcome.about_us]
        at_data = [one.outcome for one in tries if one.outcome and one.outcome.step in ("data", "dot")]
        if any(one.outcome and one.outcome.too_big for one in tries):
            return
        if sum(one.code >= 500 or one.code == 0 for one in at_data) >= 2:
            return
        first = min((one.ended for one in tries if one.ended), default=self._now)
        if self._now - first < 3600 or not at_data:
            raise Violation("a picture was left out", transaction.ids)

    def ends(self, transaction: Transaction, outcome: Outcome) -> None:
        transaction.ended, transaction.outcome = self._now, outcome
        self.in_flight.discard(transaction)
        name = transaction.recipient
        if outcome.verdict is not Verdict.SENT:
            self.attempts.append((self._now, name))
        self._note(f"{transaction.ids} to {name}: {outcome}")
        if outcome.about_us:
            self._is_down(outcome)
            return
        self.check_promises(name, outcome)
        self.down = None
        if outcome.verdict is Verdict.SENT:
            self.unsure.discard(name)
            self.failures[name] = 0
            self.failing_since.pop(name, None)
            self.accepted.append((self._now, transaction.message.number))
            return
        self.failures[name] += 1
        if self.is_paused(name):
            self.unsure.discard(name)
        self.failing_since.setdefault(name, self._now)
        self.trouble.add(name)

    # restarts

    def ended_life(self) -> None:
        """The courier has stopped."""
        self.failures.clear()
        self.unsure.clear()
        self.failing_since.clear()
        self.trouble.clear()
        self.down = None
        self.turn += 1
        self.ended_at = self._now
        for transaction in self.in_flight:
            transaction.ended = self._now
        self.in_flight.clear()

    def compare_with_disk(self, outbox: smtp.Outbox, killed: bool) -> None:
        """After a kill, outcomes of the last second may not be on disk; nothing else may be missing."""
        on_disk = dict(outbox.rows("SELECT number, state FROM deliveries"))
        reverted = 0
        for made in self.made.values():
            state = on_disk.get(made.number)
            if made.state in ("void", "forgotten") or state == made.state:
                continue
            if not (killed and state == "open" and made.ended >= self.ended_at - UNWRITTEN_S):
                raise Violation("an outcome was lost", f"{made.alerts[0].id} to {made.recipient} is {state}, was {made.state}")
            reverted += 1
            for copies in (alert.copies[made.recipient] for alert in made.alerts):
                for copy in copies[-1:] if made.state == "sent" else ():
                    copy.lost = True
            self.lost += made.state == "sent"
            self.accepted = [one for one in self.accepted if one[1] != made.number]
            made.state = "open"
            for alert in made.alerts:
                if made.number in alert.deliveries and alert.state in ("sent", "failed"):
                    alert.state = "sending"
        if reverted > 16 + self._simulation.setup.senders:
            raise Violation("a kill repeats too many", str(reverted))

    def reconfigured(self) -> None:
        """Who gets what waits may have changed; deliveries to somebody who gets none of it are planned anew."""
        setup = self._simulation.setup
        for alert in self.alerts.values():
            if alert.state != "sent" and (names := setup.route(alert.event, alert.camera)) != alert.routes[-1]:
                alert.routes.append(names)
        for made in self.made.values():
            if made.state == "open" and not any(
                made.recipient in setup.route(alert.event, alert.camera) for alert in made.alerts
            ):
                made.state = "void"
                for alert in made.alerts:
                    if alert.state in ("waiting", "sending"):
                        self._wait_again(alert)

    # requests

    def retried(self, name: str) -> int:
        found = [alert for alert in self.alerts.values() if name in (alert.id, "all") and alert.state in ("failed", "sending")
                 and any(self.made[number].state == "failed" for number in alert.deliveries)]  # fmt: skip
        for alert in found:
            self._wait_again(alert)
        self.turn += 1
        return len(found)

    def _wait_again(self, alert: Alert) -> None:
        alert.state, alert.planned_again = "waiting", True
        alert.deliveries = {number for number in alert.deliveries if self.made[number].state in ("sent", "open")}

    def dropped(self, name: str) -> tuple[int, int]:
        found = [a for a in self.alerts.values() if a.state in ("waiting", "sending", "failed") and name in (a.id, "all")]
        failed = sum(alert.state == "failed" for alert in found)
        for alert in found:
            alert.state, alert.dropped_at = "dropped", self._now
        for made in self.made.values():
            if made.state == "open" and not any(a.state in ("waiting", "sending") for a in made.alerts):
                made.state = "dropped"
                self._forgive(made.recipient)
        self.turn += 1
        return failed, len(found) - failed

    # what `queue` says

    def check_queue(self, rows: Sequence[dict[str, Any]]) -> None:
        shown = {row["id"]: row for row in rows}
        first = min((row["next"] for row in rows if row["next"]), default="")
        for alert in self.alerts.values():
            row = shown.pop(alert.id, None)
            if alert.state in ("sent", "dropped"):
                if row:
                    raise Violation("queue shows what has ended", f"{alert.id} is {alert.state}: {row}")
                continue
            if row is None:
                raise Violation("queue does not show what waits", f"{alert.id} is {alert.state}")
            self._check_row(alert, row)
            if alert.state == "sending" and row["next"]:
                self._promise(alert, row, first)
        if shown:
            raise Violation("queue shows what there is not", str(shown))

    def waits_for(self, alert: Alert) -> set[str]:
        """Who still gets an alert; of a failed one, who did not."""
        wanted = "failed" if alert.state == "failed" else "open"
        names = {self.made[n].recipient for n in alert.deliveries if self.made[n].state == wanted}
        if alert.state == "waiting":
            route = self._simulation.setup.route(alert.event, alert.camera)
            names |= {name for name in route if not alert.has(name)}
        return names

    def _check_row(self, alert: Alert, row: dict[str, Any]) -> None:  # noqa: C901
        names, now = self.waits_for(alert), self._simulation.wall()

        def wrong(what: str) -> Violation:
            return Violation(f"queue: {what}", f"{alert.id} is {alert.state}, {sorted(names)}; paused "
                             f"{[n for n in names if self.is_paused(n)]}, down {self.down}; shown {row}")  # fmt: skip

        if (alert.state == "failed") != (row["state"] == "failed"):
            raise wrong("state")
        if set(row["recipients"]) != names:
            raise wrong("recipients")
        if (row["since"], row["group"]) != (smtp.iso(alert.wall), f"{alert.event} {alert.camera}"):
            raise wrong("since or group")
        if alert.state == "failed":
            if row["next"] is not None or not row["error"]:
                raise wrong("next or error of what has failed")
            return
        if not names:
            return  # Nobody is left who should get it; the next plan ends it.
        blocked = bool(self.down) or all(map(self.is_paused, names))
        if blocked and row["state"] != "held":
            raise wrong("waiting, though it is held")
        if not (blocked or self.unsure & names or self._is_full()) and alert.state == "sending" and row["state"] == "held":
            raise wrong("held, though it is not")
        if row["state"] == "held" and not (row["error"] and row["next"]):
            raise wrong("no next or error of what is held")
        if self.down and self.down.said not in row["error"]:
            raise wrong("error")
        slack = 60 if self._simulation.clock_was_set else 3
        if row["next"] and smtp.from_iso(row["next"]) < now - slack and not self._simulation.is_busy():
            raise wrong("next is over")

    def _is_full(self) -> bool:
        """The daily limit is used up."""
        most = self._simulation.setup.daily_max
        return 0 < most <= sum(when > self._now - DAY_S for when, _ in self.accepted)

    def _promise(self, alert: Alert, row: dict[str, Any], first: str) -> None:
        """Keep in mind when an alert will be tried. Whatever is tried while all mail waits must be the first of them."""
        due = smtp.from_iso(row["next"]) - self._simulation.offset
        if due > self._now + 3 and (not self.down or row["next"] == first) and not (self._simulation.is_busy() or self._is_full()):
            state = "down" if self.down else row["state"]
            names = frozenset(self.waits_for(alert))
            self.promises.append(Promise(alert, alert.id, names, state, due, self._now, self.turn))

    def check_promises(self, name: str, outcome: Outcome | None = None) -> None:
        """Something was tried: was that when `queue` said? It changes what was said about others."""
        early = 2.0
        for promise in self.promises:
            concerned = promise.state == "down" or name in promise.names
            if promise.turn == self.turn and concerned and promise.state in ("down", "held"):
                began = self._now - LATENCY_S * 10
                quick = not outcome or "timed out" not in str(outcome)
                in_flight = any(t.began <= promise.made_at for t in self.transactions[-10:] if t.ended in (None, self._now))
                if quick and not in_flight and began < promise.next - early:
                    raise Violation("tried before queue said", f"{promise} at {self._now:.1f}")
        if name:
            self.promises = [one for one in self.promises if one.state != "down" and name not in one.names]
        else:
            self.promises = []

    def check_kept(self) -> None:
        """Is something over that `queue` promised?"""
        for promise in self.promises:
            tried_now = any(one.recipient in promise.names for one in self.in_flight)
            concerned = promise.turn == self.turn and promise.alert.state == "sending" and not tried_now
            if concerned and self._now > promise.next + 60 + self.blocked(promise.made_at):
                raise Violation("not tried when queue said", f"{promise} at {self._now:.1f}")

    # waiting

    def blocked(self, since: float) -> float:
        """Seconds in which all senders were busy with slow transactions, or with one that ended just now."""
        marks: list[tuple[float, int]] = []
        for one in self.transactions:
            end = self._now if one.ended is None else one.ended
            if end > since and end - one.began > 2:
                marks += [(max(since, one.began), 1), (end, -1)]
        total, busy, last = 0.0, 0, since
        for when, change in sorted(marks):
            total += (when - last) if busy >= self._simulation.setup.senders else 0
            busy, last = busy + change, when
        return total

    def check_waits(self) -> None:
        """Nobody waits for another: who is well, and was well, has what was put."""
        simulation, setup = self._simulation, self._simulation.setup
        self.check_kept()
        if setup.quiet or setup.daily_max:
            return
        for alert in self.unfinished():
            for name in self.waits_for(alert):
                if any(one.recipient == name and alert.id in one.message.ids for one in self.in_flight):
                    continue
                well = max(alert.put_at, simulation.well_since(name))
                longest = 60.0 + setup.cooldown
                if self.trouble & {name, EVERYBODY} or self._has_failed(alert, name):
                    longest += max(setup.retry_max, 300.0)
                    if any(not copy.answered for copy in alert.copies[name]) or simulation.was_silent:
                        longest = max(longest, 3660.0 + setup.cooldown)
                waited = self._now - well
                longest += 3600.0 if simulation.clock_was_set else 0.0
                if waited > longest + self.blocked(well) + self._followed(alert, name, well):
                    raise Violation("waits for another", f"{alert.id} for {name}, {waited:.0f} s, longest {longest:.0f} s")

    def _has_failed(self, alert: Alert, name: str) -> bool:
        deliveries = (self.made[number] for number in alert.deliveries)
        return any(made.recipient == name and made.first_failed() is not None for made in deliveries)

    def _followed(self, alert: Alert, name: str, since: float) -> float:
        """Seconds in which it was begun behind a mail whose end was slow: a server that hangs holds two deliveries."""
        mine = {number for number in alert.deliveries if self.made[number].recipient == name}
        slow = [one for one in self.transactions if one.followed_by in mine]
        return sum(max(0.0, (self._now if one.ended is None else one.ended) - max(since, one.began)) for one in slow)

    # at the end

    def check_end(self) -> None:
        for alert in self.alerts.values():
            if alert.state == "dropped":
                continue
            if alert.state != "sent":
                raise Violation("waits for ever", f"{alert.id} is {alert.state}")
            reached = {name for name, copies in alert.copies.items() if copies}
            always = set(alert.routes[0]).intersection(*alert.routes[1:])
            if not always <= reached or not any(set(names) <= reached for names in alert.routes):
                raise Violation("not reached", f"{alert.id} reached {sorted(reached)} of {alert.routes}")
        self.check_limit()
        self.check_storms()

    def check_limit(self) -> None:
        most = self._simulation.setup.daily_max
        times = [when for when, _ in self.accepted]
        for first, last in zip(times, times[most + self.lost :], strict=False):
            if most and last - first < DAY_S - 1 and not self._simulation.clock_was_set:
                raise Violation("more mails than the daily limit", f"{most + 1} from {first:.0f} to {last:.0f}")

    def check_storms(self) -> None:
        """While the server, or a recipient, is out of order, it is tried a handful of times a minute."""
        simulation = self._simulation
        for key, begin, end, behaviour in simulation.outages():
            times = [when for when, name in self.attempts if begin <= when < end and key in (EVERYBODY, name)]
            most = 8 + 2 * simulation.setup.senders
            if key == EVERYBODY and behaviour.step not in (*OPENING, "mail"):
                most *= len(PEOPLE)
            for number, first in enumerate(times):
                inside = sum(when < first + 60 for when in times[number:])
                disturbed = sum(first - 1 <= when < first + 60 for when in simulation.disturbances)
                sent = sum(first - 1 <= when < first + 60 for when, _ in self.accepted)
                if inside > most * (1 + disturbed) + min(4 * sent, 2 * most):
                    raise Violation("a storm", f"{inside} tries in the minute after {first:.1f} while {key} is {behaviour}")


# the simulation: time, threads that run one at a time, what a schedule does


class Sender:
    """A thread of the courier. It runs only while the simulation waits for it."""

    def __init__(self, simulation: Simulation, courier: smtp.Courier, number: int) -> None:
        self._simulation, self._courier, self._number = simulation, courier, number
        self.wire = Wire(simulation, self)
        self.idle, self.worked, self.killed, self.ended = True, False, False, False
        self.until = 0.0
        self._error: BaseException | None = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """Let it run until it waits for the server, or finds nothing to do."""
        self._go.release()
        self._back.acquire()
        if self._error:
            raise self._error

    def sleep(self, seconds: float) -> None:
        self.until = self._simulation.now + seconds
        self._yield()

    def _yield(self) -> None:
        self._back.release()
        self._go.acquire()
        if self.killed:
            raise Killed

    def _work(self) -> None:
        used = 0.0
        try:
            self._go.acquire()
            while not self.killed:
                self.idle = False
                self.worked = self._courier.run(self.wire, self._number == 0)
                used = self._simulation.now if self.worked else used
                if self._simulation.now - used >= smtp.KEEP_OPEN_S:
                    self.wire.close()
                self.idle = True
                self._yield()
        except Killed:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.idle = self.ended = True
            self._back.release()

    def kill(self) -> None:
        self.killed = True
        self.resume()
        self._thread.join()


class WatchedOutbox(smtp.Outbox):
    """The outbox, whose ledger hears of what is created and finished."""

    ledger: Ledger

    def create(self, due: Sequence[DueMessage], now: float) -> list[Delivery]:
        created = super().create(due, now)
        self.ledger.created(due, created)
        return created

    def finish(self, delivery: Delivery, now: float) -> None:
        super().finish(delivery, now)
        self.ledger.finished(delivery)


class WatchedPolicy:
    """A policy, whose messages tell the ledger what they are."""

    def __init__(self, simulation: Simulation, policy: Any) -> None:
        self._simulation, self._policy = simulation, policy
        self.window, self.limit = policy.window, policy.limit

    def plan(self, waiting: Iterable[PendingEntry], sent: History, now: float, most: int) -> Plan:
        plan: Plan = self._policy.plan(waiting, sent, now, most)
        return plan

    def recipients(self, kind: str, source: str) -> Collection[str]:
        names: Collection[str] = self._policy.recipients(kind, source)
        return names

    def render(self, delivery: Delivery, entries: Sequence[Entry]) -> Rendered:
        message = Rendered(*self._policy.render(delivery, entries))
        message.number, message.prepared = delivery.number, self._simulation.now
        message.message_id, message.ids, message.to, message.pictures = read_mail(message)
        if sorted(message.ids) != sorted(entry.id for entry in entries):
            raise Violation("a mail says something else", f"{message.ids}")
        return message


class Simulation:
    """A schedule that is played."""

    def __init__(self, schedule: Schedule, folder: Path) -> None:
        self.schedule, self.setup = schedule, schedule.setup
        self.path = folder / "alerts.db"
        self.now, self.offset = 0.0, schedule.begins
        self.random = random.Random(schedule.seed)
        self.transcript: list[tuple[float, str]] = []
        self.ledger = Ledger(self)
        self.behaviours: dict[str, Behaviour] = {}
        self.history: list[tuple[float, str, Behaviour]] = []
        self.disturbances: list[float] = []  # restarts, requests
        self.clock_was_set = self.was_silent = False
        self._admitted: dict[str, float] = {}
        self._senders: list[Sender] = []
        self._up_since: float | None = None
        self._pace, self._ticked, self._expected = TICK_S, 0.0, 0.0
        self._restless = True

    def note(self, text: str) -> None:
        self.transcript.append((self.now, text))

    def wall(self) -> float:
        return self.now + self.offset

    # the mail server

    def behaviour(self, step: str, transaction: Transaction | None, length: int) -> Behaviour:
        """What the server does now, at this step."""
        for key in (EVERYBODY, transaction.recipient if transaction else ""):
            found = self.behaviours.get(key, FINE)
            if found.step == step and (found.chance == 1 or self.random.random() < found.chance):
                if found.kind == "limit":
                    if self.now - self._admitted.get(key, -1e9) >= found.seconds:
                        self._admitted[key] = self.now
                        continue
                elif found.kind == "picture":
                    if not (transaction and transaction.message.pictures):
                        continue
                elif found.kind == "size" and length <= found.seconds:
                    continue
                return found
        return FINE

    def well_since(self, name: str) -> float:
        """Since when nothing has been wrong with the server, this recipient, and the relay; never: infinity."""
        if self._up_since is None or self.behaviours.get(name, FINE) != FINE or self.behaviours.get(EVERYBODY, FINE) != FINE:
            return float("inf")
        return max([self._up_since, *(when for when, key, _ in self.history if key in (name, EVERYBODY))])

    def outages(self) -> Iterator[tuple[str, float, float, Behaviour]]:
        """Who was refused by the server, from when to when, and how."""
        bad: dict[str, tuple[float, Behaviour]] = {}
        for when, key, behaviour in [*self.history, *((self.now, key, FINE) for key in (*PEOPLE, EVERYBODY))]:
            if key in bad:
                begin, what = bad.pop(key)
                if what.chance == 1:
                    yield key, begin, when, what
            if behaviour.kind in ("reply", "cut", "silent", "limit"):
                bad[key] = when, behaviour

    # time

    def advance(self, until: float) -> None:
        """Let time pass."""
        while True:
            self._poll()
            if self.now >= until:
                return
            ahead = [until, self.now + self._pace]
            ahead += [sender.until for sender in self._senders if not sender.idle]
            if self._expected > self.now:
                ahead.append(self._expected)
            self.now = min(ahead)
            for sender in self._senders:
                if not sender.idle and sender.until <= self.now:
                    sender.resume()
                    self._restless = True
            if self.now == self._expected:
                self._restless = True

    def _poll(self) -> None:
        if self._up_since is None:
            self._pace = SLOWEST_POLL_S
            return
        if self.now - self._ticked >= TICK_S:
            self._ticked = self.now
            self._courier.tick()
        for sender in self._senders:
            if sender.idle:
                sender.resume()
                self._restless |= sender.worked or not sender.idle
                if all(one.idle for one in self._senders):
                    break  # What the first sender has not found, no other one has.
        if self._restless:
            self._pace, self._restless, self._expected = TICK_S / 2, False, 0.0
            return
        self._pace = min(self._pace * 1.6, SLOWEST_POLL_S if self.ledger.unfinished() else DAY_S)
        if self._pace > 4 and not self._expected:  # Nothing happens: when does `queue` say that something will?
            times = [smtp.from_iso(row["next"]) - self.offset for row in smtp.read_queue(self.path) if row["next"]]
            self._expected = min((when for when in times if when > self.now), default=-1.0)

    # the relay

    def begin(self, killed: bool = False) -> None:
        self.outbox = WatchedOutbox(self.path)
        self.outbox.ledger = self.ledger
        self.ledger.compare_with_disk(self.outbox, killed)
        self.ledger.reconfigured()
        self._courier = smtp.Courier(
            self.outbox, WatchedPolicy(self, self.setup.policy()), self._no_transport, senders=self.setup.senders,
            rules=self.setup.rules(), clock=self.wall, monotonic=lambda: self.now,
        )  # fmt: skip
        open_ones = {number for (number,) in self.outbox.rows("SELECT number FROM deliveries WHERE state = 'open'")}
        if open_ones != {made.number for made in self.ledger.made.values() if made.state == "open"}:
            raise Violation("not what should be open after a start", str(open_ones))
        self._senders = [Sender(self, self._courier, number) for number in range(self.setup.senders)]
        self._up_since, self._restless = self.now, True

    def _no_transport(self) -> Any:
        raise AssertionError("no thread was started")

    def end(self, killed: bool) -> None:
        """Stop the courier: what is under way gets four seconds, or none."""
        if self._up_since is None:
            return
        self._courier.stop(0)
        until = self.now + (0 if killed else 4)
        while self.now < until and self.is_busy():
            self.now = min(until, *(sender.until for sender in self._senders if not sender.idle))
            for sender in self._senders:
                if not sender.idle and sender.until <= self.now:
                    sender.resume()
        self.outbox.close()
        self.close()
        self.ledger.ended_life()
        self._up_since = None

    def is_busy(self) -> bool:
        return any(not sender.idle for sender in self._senders)

    def close(self) -> None:
        """End the threads."""
        for sender in self._senders:
            if not sender.ended:
                sender.kill()
        self._senders = []

    # what a schedule does

    def put(self, name: str, event: str, camera: str, picture: bool) -> None:
        if self._up_since is None or name in self.ledger.alerts:
            return
        content = {"event": event, "camera": camera} | ({"image": "a.png"} if picture else {})
        payload = json.dumps(content).encode()
        entry = NewEntry(name, event, camera, payload, PICTURE if picture else None, self.wall())
        self.note(f"put {name}: {event} {camera}" + " with a picture" * picture)
        assert self.outbox.put([entry])[0].new
        assert not self.outbox.put([entry])[0].new, "the same again is a duplicate"
        ((seq,),) = self.outbox.rows("SELECT seq FROM entries WHERE id = ?", name)
        self.ledger.put(entry, seq, picture)
        self._courier.notify()
        self._restless = True

    def behave(self, key: str, behaviour: Behaviour) -> None:
        if behaviour == FINE and self.behaviours.get(key, FINE) == FINE:
            return
        self.note(f"the server is now to {'everybody' if key == EVERYBODY else key}: {behaviour}")
        self.behaviours[key] = behaviour
        self.history.append((self.now, key, behaviour))
        no_answer = behaviour.kind in ("silent", "lost", "cut") or (behaviour.kind == "picture" and not behaviour.reply)
        self.was_silent |= no_answer and behaviour.step == "dot"

    def request(self, what: str, name: str) -> None:
        if self._up_since is None:
            return
        self.disturbances.append(self.now)
        path = Path(f"{self.path}.request-1")
        smtp.write_request(path, [what, name])
        self._courier.tick()
        answer = json.loads(path.read_text())
        path.unlink()
        self.note(f"{what} {name}: {answer}")
        if what == "retry":
            expected = {"failed": self.ledger.retried(name)}
        else:
            expected = dict(zip(("failed", "others"), self.ledger.dropped(name), strict=True))
        if {key: answer[key] for key in expected} != expected:
            raise Violation(f"{what} answers wrongly", f"{answer}, right is {expected}")
        self._restless = True

    def stop(self, how: str) -> None:
        if self._up_since is None:
            return
        self.note("killed" if how == "kill" else "stopped")
        self.end(killed=how == "kill")
        self._was_killed = how == "kill"

    def start(self, changes: dict[str, Any]) -> None:
        if self._up_since is not None:
            return
        self.setup = replace(self.setup, **changes)
        self.note(f"started with {changes or 'the same configuration'}")
        self.disturbances.append(self.now)
        self.begin(self._was_killed)

    def clock(self, step: float) -> None:
        self.note(f"the clock is set by {step:+.0f} s")
        self.offset += step
        self.clock_was_set = True
        self.ledger.turn += 1
        self._expected, self._restless = 0.0, True
        if self._up_since is not None:
            self._courier.tick()

    def check(self) -> None:
        if self._up_since is None:
            return
        self._courier.tick()
        rows = smtp.read_queue(self.path)
        self.note(f"queue: {[(row['id'], row['state'], row['next']) for row in rows[:6]]}")
        self.ledger.check_queue(rows)
        self.ledger.check_waits()
        counts = self.outbox.counts()
        states = Counter(alert.state for alert in self.ledger.alerts.values())
        if (counts["queued"], counts["failed"]) != (states["waiting"] + states["sending"], states["failed"]):
            raise Violation("counts", f"{counts}, right is {states}")

    # all of it

    def play(self) -> None:
        self.note(f"{self.setup}")
        self.begin()
        for at, action, *arguments in self.schedule.actions:
            self.advance(at)
            getattr(self, action)(*arguments)
        self.advance(self.schedule.ends)
        self.note("everything is mended")
        self.start({})
        for key in (*PEOPLE, EVERYBODY):
            self.behave(key, FINE)
        self._settle()
        self.request("retry", "all")
        self._settle()
        self.check()
        self.ledger.check_end()
        self._forget()
        self.end(killed=False)

    def _settle(self) -> None:
        """Wait until nothing waits."""
        setup, began = self.setup, self.now
        longest = max(setup.retry_max, 300.0, 3600.0 if self.was_silent else 0) + setup.cooldown + 120
        longest += DAY_S if setup.quiet else 3600 if self.clock_was_set else 0
        if setup.daily_max:
            longest += 2 * DAY_S + DAY_S * sum(len(self.ledger.waits_for(a)) for a in self.ledger.unfinished()) / setup.daily_max
        longest += sum(sender.until - self.now for sender in self._senders if not sender.idle)
        while waiting := self.ledger.unfinished():
            if self.now > began + longest:
                detail = f"{[(a.id, a.state) for a in waiting[:5]]} after {longest:.0f} s"
                raise Violation("waits though everything is mended", detail)
            self.advance(self.now + max(5.0, min(self._pace, 60.0)))
            self.ledger.check_kept()
        self.advance(self.now + 2)

    def _forget(self) -> None:
        """Deliveries are forgotten with their entries."""
        self.advance(self.now + 8 * DAY_S)
        for table in ("entries", "deliveries"):
            found = self.outbox.rows(f"SELECT count(*) FROM {table}")[0][0]
            dropped = any(alert.state == "dropped" for alert in self.ledger.alerts.values())
            if found and not (dropped or self.clock_was_set):  # `drop` uses the clock of the machine
                raise Violation("not forgotten", f"{found} {table}")


# schedules from seeds


def make(seed: int) -> Schedule:
    """A schedule; the same seed makes the same one."""
    choose = random.Random(seed)
    plain = choose.random() < 0.3
    daily_max = choose.choice([0, 0, 0, 0, 0, 6, 12]) if not plain else 0
    quiet = choose.choice([None, None, None, None, (22, 7), (9, 12)]) if not plain else None
    ends = choose.choice([120.0, 900.0, 900.0, 3600.0, 14400.0])
    if daily_max or quiet:
        ends = choose.choice([14400.0, 2 * DAY_S])
    setup = Setup(
        plain=plain, daily_max=daily_max, quiet=quiet, **_recipients(choose),
        cooldown=0.0 if plain else choose.choice([0.0, 0.0, 10.0, 60.0, 600.0]),
        retry_first=choose.choice([5.0, 10.0]), retry_max=choose.choice([60.0, 300.0, 300.0, 3600.0]),
        max_age=choose.choice([600.0, 7200.0, DAY_S]), refused_after=choose.choice([0.0, 300.0, 300.0, 3600.0]),
        senders=choose.choice([1, 2, 2, 3]), pipelining=choose.random() < 0.7,
    )  # fmt: skip
    actions: list[tuple[Any, ...]] = [*_alerts(choose, ends), *_troubles(choose, ends)]
    actions += [(choose.uniform(0, ends), "check") for _ in range(choose.randint(2, 10))]
    for _ in range(choose.choice([0, 0, 0, 1, 2])):
        what = choose.choice(["retry", "retry", "drop"])
        actions.append((choose.uniform(0, ends), "request", what, choose.choice(["all", "e1", "e2", "e3"])))
    for _ in range(choose.choice([0, 0, 0, 1, 1, 2, 3])):
        actions += _restart(choose, ends, setup)
    if choose.random() < 0.06:  # a machine without a clock of its own: it starts in the past, until it hears the time
        at, step = choose.uniform(0, ends), choose.choice([-DAY_S * 19_000, -36_000.0, -300.0])
        actions += [(at, "stop", "kill"), (at, "clock", step), (at, "start", {})]
        actions.append((at + choose.choice([1.0, 20.0, 600.0]), "clock", -step))
    if choose.random() < 0.08:
        step = choose.choice([-DAY_S * 400, -7200.0, -90.0, 30.0, 600.0, 86400.0 * 3, 86400.0 * 4000])
        actions.append((choose.uniform(0, ends), "clock", step))
    actions.sort(key=lambda action: action[0])
    return Schedule(seed, setup, EPOCH + choose.uniform(0, 7 * DAY_S), ends, tuple(actions))


def _recipients(choose: random.Random) -> dict[str, Any]:
    names = tuple(choose.sample(PEOPLE, choose.choice([1, 1, 2, 2, 3])))
    routes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    if choose.random() < 0.35:
        routes = ((choose.choice(["cam1", "cam2", "DOOR_*"]), tuple(choose.sample(PEOPLE, choose.choice([1, 2])))),)
    return {"recipients": names, "routes": routes}


def _alerts(choose: random.Random, ends: float) -> Iterator[tuple[Any, ...]]:
    number = choose.randint(3, 24)
    bursts = [choose.uniform(0, ends * 0.8) for _ in range(choose.randint(1, 4))]
    for index in range(number):
        at = choose.choice(bursts) if choose.random() < 0.5 else choose.uniform(0, ends * 0.9)
        event = choose.choice(["MOTION_DETECTED", "MOTION_DETECTED", "DOOR_OPENED"])
        yield at, "put", f"e{index}", event, choose.choice(["cam1", "cam1", "cam2", "cam3"]), choose.random() < 0.3


RCPT_REPLIES = ("550 5.1.1 unknown", "550 5.7.1 sender not owned", "452 4.2.2 mailbox full", "450 4.7.1 too many mails",
                "421 4.7.0 slow down", "553 relaying denied")  # fmt: skip
DOT_REPLIES = ("554 5.7.1 spam", "550 5.7.0 sender not owned", "451 4.3.0 later", "421 4.7.0 slow down", "552 5.2.2 full")


def _recipient_trouble(choose: random.Random) -> Behaviour:
    step = choose.choice(["rcpt", "rcpt", "dot", "data"])
    reply = choose.choice(DOT_REPLIES if step != "rcpt" else RCPT_REPLIES)
    chance = choose.choice([1.0, 1.0, 1.0, 0.5])
    kind = choose.choice(["reply", "reply", "reply", "cut", "silent", "lost", "slow", "limit", "picture"])
    if kind == "lost":
        return Behaviour("lost", "dot", choose.choice(["", "never"]), chance=chance)
    if kind == "slow":
        return Behaviour("slow", step, seconds=choose.choice([3.0, 20.0, 120.0]))
    if kind == "limit":
        return Behaviour("limit", choose.choice(["rcpt", "dot"]), choose.choice(["450 4.7.1 rate", "421 4.7.0 rate", "451 rate"]),
                         choose.choice([2.0, 5.0, 30.0]))  # fmt: skip
    if kind == "picture":
        reply = choose.choice(["552 5.3.4 too big", "554 5.6.0 no pictures", "451 4.6.0 no", ""])
        return Behaviour("picture", "dot", reply)
    return Behaviour(kind, step, reply if kind == "reply" else "", chance=chance)


def _server_trouble(choose: random.Random) -> Behaviour:
    kinds = (
        Behaviour("cut", "connect"), Behaviour("cut", "connect"), Behaviour("silent", "connect"), Behaviour("cut", "greeting"),
        Behaviour("reply", "greeting", "554 5.7.1 go away"), Behaviour("reply", "greeting", "421 4.3.2 busy"),
        Behaviour("reply", "login", "535 5.7.8 bad password"), Behaviour("reply", "login", "454 4.7.0 later"),
        Behaviour("reply", "mail", "550 5.7.1 sender not owned"), Behaviour("reply", "mail", "452 4.5.3 too many mails"),
        Behaviour("reply", "mail", "421 4.7.0 slow down"), Behaviour("cut", "mail"), Behaviour("silent", "mail"),
        Behaviour("reply", "rcpt", "530 5.7.0 log in"), Behaviour("reply", "dot", "550 5.4.5 quota exceeded"),
        Behaviour("reply", "rcpt", "450 4.7.1 too many mails"), Behaviour("reply", "dot", "550 5.7.1 sender not owned"),
        Behaviour("limit", "rcpt", "450 4.7.1 rate", 5.0), Behaviour("limit", "dot", "421 4.7.0 rate", 20.0),
        Behaviour("slow", "dot", seconds=10.0), Behaviour("cut", "dot", chance=0.3), Behaviour("cut", "connect", chance=0.5),
        Behaviour("size", "mail", "552 5.3.4 too big", 3000.0),
    )  # fmt: skip
    return choose.choice(kinds)


def _troubles(choose: random.Random, ends: float) -> Iterator[tuple[Any, ...]]:
    found = [(choose.choice(PEOPLE), _recipient_trouble(choose)) for _ in range(choose.choice([0, 1, 1, 2, 3]))]
    found += [(EVERYBODY, _server_trouble(choose)) for _ in range(choose.choice([0, 0, 1, 1, 2]))]
    for key, behaviour in found:
        begins = choose.choice([0.0, choose.uniform(0, ends * 0.8)])
        yield begins, "behave", key, behaviour
        if choose.random() < 0.7 or ends > 14400:
            yield choose.uniform(begins, min(ends, begins + 14400)), "behave", key, FINE


def _restart(choose: random.Random, ends: float, setup: Setup) -> Iterator[tuple[Any, ...]]:
    at = choose.uniform(0, ends)
    yield at, "stop", choose.choice(["kill", "kill", "term"])
    changes: dict[str, Any] = {}
    if choose.random() < 0.4:
        changes |= _recipients(choose)
    if choose.random() < 0.2 and not setup.plain:
        changes["cooldown"] = choose.choice([0.0, 10.0, 60.0])
    yield at + choose.choice([0.0, 0.0, 1.0, 60.0]), "start", changes


# playing, shrinking, telling


FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else None  # thousands of synchronous commits


class Records(logging.Handler):
    """What the product logs, for the transcript."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self._simulation = simulation

    def emit(self, record: logging.LogRecord) -> None:
        self._simulation.note(f"    {record.levelname} {record.getMessage()}")
        if record.exc_info:
            self._simulation.note("".join(traceback.format_exception(*record.exc_info)))


def play(schedule: Schedule, log: bool = False) -> tuple[Exception | None, Simulation]:
    """Play a schedule; what went wrong, and the simulation."""
    folder = Path(tempfile.mkdtemp(prefix="scenario-", dir=FOLDER))
    state, logger = random.getstate(), smtp.log
    random.seed(schedule.seed)
    simulation = Simulation(schedule, folder)
    handler, level, disabled = Records(simulation), logger.level, logger.disabled
    logger.disabled = not log
    if log:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        simulation.play()
        return None, simulation
    except Exception as error:
        return error, simulation
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.disabled = disabled
        random.setstate(state)
        with contextlib.suppress(Exception):
            simulation.end(killed=True)
        shutil.rmtree(folder, ignore_errors=True)


def rule_of(error: Exception | None) -> str:
    return error.rule if isinstance(error, Violation) else type(error).__name__ if error else ""


def shrink(schedule: Schedule, rule: str, seconds: float = 20.0) -> Schedule:
    """A schedule with fewer actions that breaks the same rule."""
    until, size = time.monotonic() + seconds, max(1, len(schedule.actions) // 2)
    while time.monotonic() < until:
        for at in range(0, len(schedule.actions), size):
            rest = schedule.actions[:at] + schedule.actions[at + size :]
            shorter = replace(schedule, actions=rest)
            if rule_of(play(shorter)[0]) == rule:
                schedule = shorter
                break
        else:
            if size == 1:
                break
            size //= 2
    return schedule


def describe(schedule: Schedule, log: bool = False) -> str:
    """The transcript of a schedule, and how it ended."""
    error, simulation = play(schedule, log)
    lines = [f"{when:10.2f}  {text}" for when, text in simulation.transcript]
    if error and not isinstance(error, Violation):
        lines += traceback.format_exception(error)
    return "\n".join([f"seed {schedule.seed}", *lines, f"==> {error or 'nothing is wrong'}"])


def failing(seeds: Iterable[int]) -> Iterator[tuple[int, Exception]]:
    for seed in seeds:
        error, _ = play(make(seed))
        if error:
            yield seed, error


@pytest.mark.parametrize("part", range(4))
def test_the_rules_hold_over_random_schedules(part: int) -> None:
    for seed, error in failing(range(part, SEEDS, 4)):
        pytest.fail(describe(shrink(make(seed), rule_of(error)), log=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--log", action="store_true", help="the transcript has the log of the product")
    parser.add_argument("--whole", action="store_true", help="do not make the schedule shorter")
    args = parser.parse_args()
    if args.seed is not None:
        schedule = make(args.seed)
        rule = rule_of(play(schedule)[0])
        print(describe(shrink(schedule, rule) if rule and not args.whole else schedule, args.log))
        return bool(rule)
    rules: dict[str, list[int]] = defaultdict(list)
    for seed, error in failing(range(args.first, args.first + args.seeds)):
        rules[rule_of(error)].append(seed)
        if len(rules[rule_of(error)]) == 1:
            print(f"seed {seed}: {error}", flush=True)
    for rule, seeds in sorted(rules.items(), key=lambda item: -len(item[1])):
        print(f"{len(seeds):6} {rule}: {seeds[:12]}")
    print(f"{args.seeds} seeds, {sum(map(len, rules.values()))} failed")
    return bool(rules)


if __name__ == "__main__":
    sys.exit(main())
