"""Rules of the courier that random schedules (test_scenarios.py) found broken, each as short as it can be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Clock

import smtp_module as smtp
from smtp_module import (
    Courier,
    Delivery,
    DueMessage,
    Entry,
    History,
    NewEntry,
    Outbox,
    Outcome,
    PendingEntry,
    Plan,
    Verdict,
)

ANN, BOB = "ann@x.org", "bob@x.org"
YES = Outcome(Verdict.SENT, 250, "", "dot")
NO = smtp.judge("rcpt", 550, "5.1.1 unknown")
LATER = smtp.judge("rcpt", 450, "4.7.1 later")
AWAY = smtp.judge_error("connect", ConnectionRefusedError())


class Policy:
    """Each entry is a message to everybody in `to`."""

    def __init__(self, *to: str, limit: int = 0) -> None:
        self.to, self.limit, self.window = to, limit, smtp.DAY_S if limit else 0.0

    def plan(self, waiting: Iterable[PendingEntry], sent: History, now: float, most: int) -> Plan:
        due = [DueMessage((one.seq,), tuple(name for name in self.to if name not in one.served)) for one in waiting]
        due = [message for message in due if not sent.paused.issuperset(message.recipients or {""})]
        return Plan(due[: self.limit - len(sent.times) - sent.untried] if self.limit else due)

    def recipients(self, kind: str, source: str) -> tuple[str, ...]:
        return self.to

    def render(self, delivery: Delivery, entries: Sequence[Entry]) -> smtp.Message:
        return smtp.Message("relay@x.org", [",".join(entry.id for entry in entries).encode()])


class Rig:
    """An outbox, and a courier that is run by hand with a clock of the test's own. `say` gives the outcomes."""

    def __init__(self, spool: Path, clock: Clock, *to: str, limit: int = 0, **rules: Any) -> None:
        self.spool, self.clock, self.policy = spool, clock, Policy(*(to or (ANN,)), limit=limit)
        self.rules = smtp.RetryRules(**{"first": 10.0, "longest": 100.0, **rules})
        self.away: Outcome | None = None
        self.say: Callable[[str, str], Outcome] = lambda entry, name: YES
        self.tried: list[tuple[str, str]] = []
        self.looks_ahead = False
        self.uptime = 0.0
        self.start()

    def start(self) -> None:
        self.outbox = Outbox(self.spool)
        self.courier = Courier(self.outbox, self.policy, lambda: self, rules=self.rules, clock=self.clock,
                               monotonic=lambda: self.uptime)  # fmt: skip

    def open(self) -> None:
        if self.away:
            raise smtp.Unavailable(self.away)

    def send(self, message: smtp.PreparedMessage, following: Callable[[], Any]) -> Outcome:
        entry = b"".join(message.message.data).decode()
        self.tried.append((entry, message.recipient))
        if self.looks_ahead:
            following()
        return self.say(entry, message.recipient)

    def close(self) -> None:
        pass

    def put(self, *names: str, source: str = "cam1") -> None:
        self.outbox.put([NewEntry(name, "MOTION", source, b"x", None, self.clock()) for name in names])
        self.courier.notify()

    def run(self) -> list[tuple[str, str]]:
        """Deliver what is due; what was tried."""
        number = len(self.tried)
        while self.courier.run(self):
            assert len(self.tried) < number + 1000, "the courier runs hot"
        return self.tried[number:]

    def later(self, seconds: float) -> list[tuple[str, str]]:
        self.clock.now += seconds
        self.uptime += seconds
        return self.run()

    def request(self, what: str, name: str) -> None:
        smtp.write_request(Path(f"{self.spool}.request-1"), [what, name])
        self.courier.tick()

    def queue(self) -> dict[str, dict[str, Any]]:
        self.courier.tick()
        return {row["id"]: row for row in smtp.read_queue(self.spool)}


@pytest.fixture
def rig(spool: Path, clock: Clock) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(*to: str, **rules: Any) -> Rig:
        made.append(Rig(spool, clock, *to, **rules))
        return made[-1]

    yield make
    for one in made:
        one.outbox.close()


def test_what_failed_is_tried_again_though_the_next_one_to_its_recipient_went_before_that_was_written(
    rig: Callable[..., Rig],
) -> None:
    r = rig()
    r.looks_ahead = True
    r.say = lambda entry, name: LATER if entry == "first" else YES
    r.put("first", "second")
    assert r.run() == [("first", ANN), ("second", ANN)]
    r.say = lambda entry, name: YES
    assert r.later(10) == [("first", ANN)]


# what `queue` says


def test_the_next_try_of_what_waits_for_a_paused_recipient_is_when_the_probe_goes(rig: Callable[..., Rig]) -> None:
    r = rig(refused_after=10_000.0)
    r.say = lambda entry, name: NO  # not tried again before five minutes, except as a probe
    r.put("a", "b", "c")
    r.run()
    row = r.queue()["a"]
    assert row["state"] == "held"
    assert r.clock() < smtp.from_iso(row["next"]) <= r.clock() + 10
    assert len(r.later(10)) == 1


def test_who_has_an_entry_is_not_shown_as_one_of_its_recipients_when_it_waits_again(rig: Callable[..., Rig]) -> None:
    r = rig(ANN, BOB, refused_after=0.0)
    r.say = lambda entry, name: NO if name == BOB else YES
    r.put("a")
    r.run()
    r.away = AWAY
    r.request("retry", "a")
    assert r.queue()["a"]["recipients"] == [BOB]


def test_a_group_that_arrives_while_all_mail_waits_has_its_recipients_in_the_queue(rig: Callable[..., Rig]) -> None:
    r = rig()
    r.away = AWAY
    r.put("a")
    r.run()
    assert r.queue()["a"]["recipients"] == [ANN]
    r.put("b", source="cam2")
    assert r.queue()["b"]["recipients"] == [ANN]


def test_the_next_try_moves_with_a_clock_that_is_set(rig: Callable[..., Rig]) -> None:
    r = rig()
    r.away = AWAY
    r.put("a")
    r.run()
    r.queue()
    r.clock.now += 3600
    assert r.clock() < smtp.from_iso(r.queue()["a"]["next"]) <= r.clock() + 10


def test_what_fails_again_after_a_retry_shows_who_has_not_got_it_now(rig: Callable[..., Rig]) -> None:
    r = rig(ANN, BOB, refused_after=0.0)
    r.say = lambda entry, name: NO
    r.put("a")
    r.run()
    assert r.queue()["a"]["recipients"] == [ANN, BOB]
    r.say = lambda entry, name: NO if name == BOB else YES
    r.request("retry", "a")
    r.run()
    assert r.queue()["a"]["recipients"] == [BOB]


def test_a_retry_that_needs_a_place_in_the_daily_limit_is_held_until_there_is_one(rig: Callable[..., Rig]) -> None:
    r = rig(limit=2)
    r.say = lambda entry, name: LATER if entry == "a" else YES
    r.put("a")
    r.run()
    r.put("b", "c")
    r.run()
    r.say = lambda entry, name: YES
    assert r.later(10) == []
    row = r.queue()["a"]
    assert (row["state"], row["error"]) == ("held", "the daily limit is used up")
    assert row["next"] == smtp.iso(r.clock() - 10 + smtp.DAY_S)
    assert r.later(smtp.DAY_S) == [("a", ANN)]


# the daily limit, and a clock that is set


def test_retries_and_new_mails_that_are_due_together_do_not_exceed_the_daily_limit(rig: Callable[..., Rig]) -> None:
    r = rig(limit=3)
    r.say = lambda entry, name: LATER
    r.put("a", "b")
    r.run()
    r.say = lambda entry, name: YES
    r.put("c", "d", "e")
    r.later(10)
    assert r.outbox.counts() == {"queued": 2, "sent": 3, "failed": 0}


def test_a_delivery_that_was_never_tried_goes_though_the_clock_was_set_back(rig: Callable[..., Rig]) -> None:
    r = rig()
    r.say = lambda entry, name: smtp.judge("dot", 550, "5.4.5 quota exceeded")
    r.put("a")
    r.run()
    r.clock.now -= 400 * smtp.DAY_S
    r.courier.tick()
    r.say = lambda entry, name: YES
    assert r.later(10) == [("a", ANN)]


@pytest.mark.parametrize("back", [600.0, 10 * smtp.DAY_S, 19_000 * smtp.DAY_S])
def test_a_machine_that_starts_in_the_past_and_then_hears_the_time_tries_again_within_an_hour(
    rig: Callable[..., Rig], back: float
) -> None:
    r = rig()
    r.say = lambda entry, name: LATER
    r.put("a")
    r.run()
    r.outbox.close()
    r.clock.now -= back
    r.start()
    r.clock.now += back
    r.courier.tick()
    r.say = lambda entry, name: YES
    assert r.later(3600) == [("a", ANN)]


def test_a_clock_that_is_set_while_a_mail_is_under_way_does_not_make_it_fail(rig: Callable[..., Rig]) -> None:
    r = rig()
    r.put("b", "a")
    r.say = lambda entry, name: LATER if entry == "a" else YES
    r.run()
    r.put("c")
    r.later(5)

    def set_clock(entry: str, name: str) -> Outcome:
        r.clock.now += 10 * smtp.DAY_S
        r.courier.tick()
        return LATER

    r.say = set_clock
    assert r.later(10) == [("a", ANN)]
    assert r.outbox.counts()["failed"] == 0


def test_what_was_sent_before_the_clock_was_set_is_still_a_duplicate(rig: Callable[..., Rig]) -> None:
    r = rig()
    r.put("a")
    r.run()
    r.clock.now += 10 * smtp.DAY_S
    r.courier.tick()
    r.put("a")
    assert r.run() == []


# probes


def paused(r: Rig) -> None:
    """Pause mail to BOB."""
    r.say = lambda entry, name: LATER if name == BOB else YES
    r.put("a", "b", "c")
    r.run()
    assert [row["state"] for row in r.queue().values()] == ["held"] * 3


def test_a_probe_that_is_begun_together_with_the_end_of_another_mail_is_sent(rig: Callable[..., Rig]) -> None:
    r = rig(ANN, BOB)
    r.looks_ahead = True
    paused(r)
    r.say = lambda entry, name: LATER if name == BOB or entry == "d" else YES
    r.put("d")
    r.run()
    r.put("e")
    r.run()
    assert [name for _, name in r.later(10)] == [ANN, BOB]


def test_a_probe_that_was_found_and_then_not_sent_goes_next(rig: Callable[..., Rig]) -> None:
    r = rig(ANN, BOB)
    paused(r)
    r.away = AWAY
    r.later(10)
    r.away = None
    assert [name for _, name in r.later(10)] == [BOB]


def test_a_probe_that_said_only_that_all_mail_waits_is_sent_again_when_that_is_over(rig: Callable[..., Rig]) -> None:
    r = rig(ANN, BOB)
    paused(r)
    for seconds in (10, 20):
        assert len(r.later(seconds)) == 1
    r.say = lambda entry, name: smtp.judge("mail", 450, "4.3.2 busy")
    assert len(r.later(40)) == 1
    assert [name for _, name in r.later(10)] == [BOB]


@pytest.mark.parametrize("step", ["rcpt", "connect"])
def test_a_server_that_takes_a_mail_now_and_then_gets_all_of_them_without_a_storm(
    rig: Callable[..., Rig], step: str
) -> None:
    r = rig(longest=3600.0)
    refused, last = smtp.judge(step, 450, "4.7.1 rate"), -30.0

    def limited(entry: str, name: str) -> Outcome:
        nonlocal last
        if r.uptime - last < 30:
            return refused
        last = r.uptime
        return YES

    r.say = limited
    r.put(*(f"e{number}" for number in range(30)))
    tries = [len(r.later(10)) for _ in range(360)]
    assert r.outbox.counts()["sent"] == 30
    assert max(sum(tries[at : at + 6]) for at in range(360)) <= 12
