"""From the queue to the server, one step at a time: clocks and a transport of the test's own, the real outbox."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Clock, wait_for

import server
import smtp_module as smtp
from smtp_module import (
    Courier,
    Delivery,
    DueMessage,
    Entry,
    History,
    Message,
    NewEntry,
    Outbox,
    Outcome,
    PendingEntry,
    Plan,
    PreparedMessage,
    RetryRules,
    Unavailable,
    Verdict,
    judge,
    judge_error,
)  # fmt: skip

ANN, BOB = "ann@x.org", "bob@x.org"
YES = judge("dot", 250, "taken")
BUSY, REFUSED = judge("rcpt", 450, "4.2.0 later"), judge("rcpt", 550, "5.1.1 unknown")
BIG = judge("dot", 552, "5.3.4 too big")
CUT, SILENT = judge_error("dot", ConnectionResetError()), judge_error("dot", TimeoutError())
AWAY = judge_error("connect", ConnectionRefusedError())
LOGIN = judge("login", 535, "5.7.8 bad credentials")
SENDER = judge("mail", 550, "5.7.1 sender not allowed")
QUOTA = judge("dot", 550, "5.4.5 daily quota exceeded")
FIRST, LONGEST = 10.0, 3600.0
MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0


class Policy:
    """Each entry is a message to `to`; with `together`, all that waits is one. What it was asked stays in `planned`."""

    def __init__(self, *to: str, together: bool = False, window: float = 0.0, limit: int = 0) -> None:
        self.to, self.together, self.window, self.limit = to or (ANN,), together, window, limit
        self.planned: list[list[str]] = []
        self.histories: list[History] = []
        self.rendered: list[Delivery] = []
        self.cannot_compose: set[str] = set()
        self.hold_until: float | None = None

    def plan(self, waiting: Iterable[PendingEntry], sent: History, now: float, most: int) -> Plan:
        self.planned.append([])
        self.histories.append(History(list(sent.times), sent.untried, dict(sent.groups), dict(sent.kinds), sent.paused))
        due: list[DueMessage] = []
        for entry in waiting:
            self.planned[-1].append(entry.id)
            to = tuple(name for name in self.to if name not in entry.served)
            taken = len(sent.times) + sent.untried + sum(len(message.recipients) for message in due)
            if self.limit and taken + len(to) > self.limit:
                continue
            if (self.hold_until and now < self.hold_until) or (to and sent.paused.issuperset(to)):
                continue
            if self.together and due:
                due = [due[0]._replace(entries=(*due[0].entries, entry.seq))]
            else:
                due.append(DueMessage((entry.seq,), to, "alert", ((entry.kind, entry.source),)))
            if len(due) >= most and not self.together:
                break
        if self.hold_until and now < self.hold_until:
            return Plan(due, self.hold_until, "quiet hours")
        return Plan(due, sent.times[0] + DAY if self.limit and sent.times else None)

    def recipients(self, kind: str, source: str) -> tuple[str, ...]:
        return self.to

    def render(self, delivery: Delivery, entries: Sequence[Entry]) -> Message:
        self.rendered.append(delivery)
        for entry in entries:
            if entry.id in self.cannot_compose:
                raise KeyError("poison")
            entry.picture()
        names = ",".join(entry.id for entry in entries)
        return Message("relay@x.org", [names.encode()], f"alert {names}")


class FakeServer:
    """A transport that answers as told: `answer` maps ids and recipient to an outcome, `away` is why nobody can
    connect. It notes what it was asked (`tried`) and what it accepted (`got`) as pairs of ids and recipient."""

    def __init__(self, clock: Callable[[], float] = lambda: 0.0) -> None:
        self.clock = clock
        self.away: Outcome | None = None
        self.answer: Callable[[str, str], Outcome] = lambda ids, to: YES
        self.got: list[tuple[str, str]] = []
        self.tried: list[tuple[str, str]] = []
        self.times: list[float] = []
        self.opened = self.closed = 0
        self.looks_ahead = False
        self.ahead: PreparedMessage | None = None
        self.before: Callable[[str], object] = lambda ids: None

    def open(self) -> None:
        self.opened += 1
        if self.away:
            raise Unavailable(self.away)

    def send(self, message: PreparedMessage, following: Callable[[], PreparedMessage | None]) -> Outcome:
        assert self.ahead in (None, message), "what was announced comes next"
        ids = b"".join(message.message.data).decode()
        self.tried.append((ids, message.recipient))
        self.times.append(self.clock())
        self.before(ids)
        self.ahead = following() if self.looks_ahead else None
        outcome = self.answer(ids, message.recipient)
        if outcome.verdict is Verdict.SENT:
            self.got.append((ids, message.recipient))
        return outcome

    def close(self) -> None:
        self.closed += 1
        self.ahead = None

    def ids(self) -> list[str]:
        return [ids for ids, _ in self.got]


class Bench:
    """An outbox, a policy, a server and clocks, with a courier that is stepped by hand."""

    def __init__(self, spool: Path, policy: Policy | None = None, **settings: Any) -> None:
        self.spool, self.policy = spool, policy or Policy()
        self.clock, self.monotonic = Clock(), Clock(5000.0)
        self.server = FakeServer(self.monotonic)
        self.settings = {"rules": RetryRules(FIRST, LONGEST), "clock": self.clock, "monotonic": self.monotonic, **settings}
        self.outbox = Outbox(spool)
        self.restart(close=False)

    def restart(self, *, close: bool = True) -> None:
        if close:
            self.outbox.close()
            self.outbox = Outbox(self.spool)
        self.courier = Courier(self.outbox, self.policy, lambda: self.server, **self.settings)

    def put(self, *names: str, picture: bytes | None = None) -> None:
        self.outbox.put([NewEntry(name, "MOTION", name[0], b"x", picture, self.clock()) for name in names])
        self.courier.notify()

    def run(self) -> int:
        """Step until nothing is due; how many transactions there were."""
        before = len(self.server.tried)
        for _ in range(1000):
            if not self.courier.run(self.server):
                return len(self.server.tried) - before
        raise AssertionError("the courier runs hot")

    def later(self, seconds: float) -> int:
        """The same, after so many seconds."""
        self.clock.now += seconds
        self.monotonic.now += seconds
        return self.run()

    def wait(self, seconds: float, every: float = 1.0) -> int:
        """The same, for so many seconds, with all that a courier does meanwhile."""
        before = len(self.server.tried)
        for _ in range(int(seconds / every)):
            self.later(every)
            self.courier.tick()
        return len(self.server.tried) - before

    def queue(self) -> dict[str, dict[str, Any]]:
        """What `queue` shows, by id."""
        self.courier.tick()
        return {row["id"]: row for row in smtp.read_queue(self.spool)}

    def states(self) -> dict[str, str]:
        return {name: row["state"] for name, row in self.queue().items()}

    def counts(self) -> tuple[int, int, int]:
        """How many entries wait, were sent, failed."""
        self.outbox.flush()
        return tuple(self.outbox.counts().values())  # type: ignore[return-value]

    def request(self, what: str, name: str = "all") -> None:
        """As the command line does while the owner runs."""
        Path(f"{self.spool}.request-{time.time_ns()}").write_text(json.dumps([what, name]))
        self.courier.tick()


def a_minute(server: FakeServer) -> int:
    """The most transactions in any minute."""
    return max((sum(start <= when < start + MINUTE for when in server.times) for start in server.times), default=0)


Make = Callable[..., Bench]


@pytest.fixture
def bench(spool: Path) -> Iterator[Make]:
    made: list[Bench] = []

    def make(*arguments: Any, **settings: Any) -> Bench:
        made.append(Bench(spool, *arguments, **settings))
        return made[-1]

    yield make
    for one in made:
        one.outbox.close()


def names(number: int, prefix: str = "i") -> list[str]:
    return [f"{prefix}{n:03}" for n in range(number)]


# What goes well


def test_what_waits_is_sent_oldest_first_once(bench: Make) -> None:
    b = bench()
    b.put("a", "b", "c")
    assert b.run() == 3 and b.server.ids() == ["a", "b", "c"]
    assert b.run() == 0 and b.counts() == (0, 3, 0)


def test_each_recipient_gets_a_mail_of_their_own_that_names_all(bench: Make) -> None:
    b = bench(Policy(ANN, BOB))
    b.put("a", "b")
    b.run()
    assert sorted(b.server.got) == [("a", ANN), ("a", BOB), ("b", ANN), ("b", BOB)]
    assert {delivery.recipients for delivery in b.policy.rendered} == {(ANN, BOB)}


def test_the_log_tells_of_each_delivery_once_what_it_is_about(bench: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    b = bench(Policy(ANN, BOB))
    b.put("a")
    b.run()
    assert [record.getMessage() for record in caplog.records] == [f"sent alert a to {ANN}", f"sent alert a to {BOB}"]


def test_many_deliveries_share_a_commit(bench: Make) -> None:
    b = bench()
    b.put(*names(160))
    said: list[str] = []
    b.outbox._db.set_trace_callback(said.append)
    assert b.run() == 160
    assert said.count("COMMIT") <= 2 * 160 / smtp.FILL + 160 / smtp.UNWRITTEN_MAX


def test_outcomes_are_written_after_sixteen_after_a_second_or_when_a_sender_runs_dry(bench: Make) -> None:
    b = bench()
    b.put(*names(40))
    unwritten: list[int] = []
    b.server.before = lambda ids: unwritten.append(b.outbox.unwritten())
    b.run()
    assert max(unwritten) == 15 and b.outbox.unwritten() == 0
    b.server.before = lambda ids: ids == "b" and (b.courier.tick(), unwritten.append(b.outbox.unwritten()))
    b.put("a", "b")
    b.run()
    assert unwritten[-1] == 0


def test_nothing_is_asked_again_while_nothing_has_changed(bench: Make) -> None:
    b = bench()
    b.put("a")
    b.run()
    asked = len(b.policy.planned)
    for _ in range(10):
        b.later(1)
    assert len(b.policy.planned) == asked


def test_in_a_backlog_neither_the_oldest_nor_what_is_new_waits_for_all_the_others(bench: Make) -> None:
    b = bench()
    b.put(*names(400, "old"))
    b.server.before = lambda ids: len(b.server.got) == 100 and b.put("new")
    b.run()
    ids = b.server.ids()
    assert sorted(ids) == ["new", *names(400, "old")]
    assert ids.index("old000") < 16 and ids.index("new") < 140


def test_a_plan_of_a_long_queue_looks_at_few_entries(bench: Make) -> None:
    b = bench()
    b.put(*names(2000))
    b.server.before = lambda ids: b.courier._stopping.set()
    b.courier.run(b.server)
    assert sum(map(len, b.policy.planned)) <= 2 * smtp.FILL


# What the plan holds


def test_what_the_plan_holds_is_looked_at_again_only_when_its_time_comes(bench: Make) -> None:
    b = bench(Policy(window=60.0))
    b.policy.hold_until = b.clock() + 100
    b.put("a", "b")
    assert b.run() == 0
    b.put("c")
    b.run()
    assert b.policy.planned[-1] == ["c"]
    row = b.queue()["a"]
    assert [row[key] for key in ("state", "error", "next", "recipients")] == [
        "held", "quiet hours", smtp.iso(b.clock() + 100), [ANN],
    ]  # fmt: skip
    assert b.later(99) == 0 and b.later(1) == 3
    assert b.server.ids() == ["a", "b", "c"] and b.states() == {}


def test_the_connection_comes_before_anything_is_created(bench: Make) -> None:
    b = bench()
    b.server.away = AWAY
    b.put("a")
    b.run()
    assert b.outbox.rows("SELECT count(*) FROM deliveries") == [(0,)]
    b.policy.to, b.server.away = (BOB,), None
    b.later(MINUTE)
    assert b.server.got == [("a", BOB)]


def test_the_queue_names_the_recipients_of_what_arrives_while_all_waits(bench: Make) -> None:
    b = bench()
    fail_with(b, SENDER)
    b.put("a")
    b.wait(HOUR, every=MINUTE)
    b.put("new", "zoo")
    assert {name: row["recipients"] for name, row in b.queue().items()} == {"a": [ANN], "new": [ANN], "zoo": [ANN]}


def test_history_tells_the_plan_what_was_sent_and_survives_a_restart(bench: Make) -> None:
    b = bench(Policy(window=3600.0, limit=5))
    start = b.clock()
    b.put("a1")
    b.run()
    b.clock.now += 10
    b.put("b1")
    b.run()
    for _ in range(2):
        b.restart()
        b.clock.now += 1
        b.put(f"c{b.clock.now}")
        b.run()
        history = b.policy.histories[-1]
        assert list(history.times)[:2] == [start, start + 10] and history.untried == 0
        assert (history.groups["MOTION", "a"], history.groups["MOTION", "b"]) == (start, start + 10)


def test_a_retry_needs_a_free_place_in_the_daily_limit_as_a_new_message_does(bench: Make) -> None:
    b = bench(Policy(window=3600.0, limit=3))
    b.server.answer = lambda ids, to: BUSY if ids == "late" else YES
    b.put("late", "a")
    b.run()
    b.server.answer = lambda ids, to: YES
    b.put("b", "c", "d")
    b.later(2 * FIRST)
    assert len(b.server.got) == 3
    assert b.wait(HOUR, every=30.0) == 0
    b.wait(DAY + HOUR, every=5 * MINUTE)
    assert sorted(b.server.ids()) == ["a", "b", "c", "d", "late"]


# What goes wrong with one delivery

NO_PAUSES = RetryRules(10.0, 100.0, pause_recipients=False)


def test_later_means_backoff_with_jitter_and_another_try_as_the_same_message(bench: Make) -> None:
    b = bench(rules=NO_PAUSES)
    b.server.answer = lambda ids, to: BUSY
    b.put("a")
    b.run()
    waits, begun = [], b.clock()
    while len(waits) < 6:
        if b.later(0.5):
            waits.append(b.clock() - begun)
            begun = b.clock()
    for waited, most in zip(waits, (10, 20, 40, 80, 100, 100), strict=True):
        assert most * 0.8 <= waited <= most + 0.5
    assert len({delivery.number for delivery in b.policy.rendered}) == 1
    assert b.queue()["a"]["tries"] == 7


def test_backoff_is_kept_over_a_restart(bench: Make) -> None:
    b = bench(rules=NO_PAUSES)
    b.server.answer = lambda ids, to: BUSY
    b.put("a")
    b.run()
    for _ in range(3):
        b.later(100)
    b.restart()
    assert b.run() == 0 and b.later(63) == 0 and b.later(18) == 1


def test_a_delivery_that_is_tried_again_later_holds_up_no_other(bench: Make) -> None:
    b = bench()
    b.server.answer = lambda ids, to: BUSY if ids == "a" else YES
    b.put("a", "b", "c")
    b.run()
    assert b.server.ids() == ["b", "c"]


@pytest.mark.parametrize("bad", [REFUSED, BUSY, judge("rcpt", 552, "5.2.2 mailbox full"), judge("dot", 554, "5.7.1 no"),
                                 judge_error("rcpt", smtp.ReplyError(421, "closing")), CUT, SILENT])  # fmt: skip
def test_a_bad_recipient_delays_nobody_and_nobody_gets_it_twice(bench: Make, bad: Outcome) -> None:
    b = bench(Policy(ANN, BOB))
    b.server.answer = lambda ids, to: bad if to == BOB else YES
    for name in names(10):
        b.put(name)
        b.later(1)
    assert b.server.got == [(name, ANN) for name in names(10)], "the good one has each at once"
    b.server.answer = lambda ids, to: YES
    b.wait(2 * HOUR, every=10.0)
    assert sorted(b.server.got) == sorted((name, to) for name in names(10) for to in (ANN, BOB))
    assert b.counts() == (0, 10, 0)


def test_a_refused_recipient_fails_in_its_time_and_is_shown_and_reported(bench: Make) -> None:
    b = bench(Policy(ANN, BOB))
    b.server.answer = lambda ids, to: REFUSED if to == BOB else YES
    b.put("a")
    b.run()
    b.wait(2 * DAY, every=HOUR)
    assert b.states() == {"a": "held"}, "the server has accepted nothing since"
    b.put("b")
    b.run()
    b.restart()  # It remembers when a mail was last accepted.
    b.wait(2 * HOUR, every=60.0)
    row = b.queue()["a"]
    assert [row[key] for key in ("state", "next", "recipients")] == ["failed", None, [BOB]]
    assert row["error"] == f"{BOB}: rcpt: 550 5.1.1 unknown"


def test_a_refusal_is_final_at_once_where_that_is_wanted(bench: Make) -> None:
    b = bench(rules=RetryRules(FIRST, 30.0, refused_after=0.0, pause_recipients=False))
    b.server.answer = lambda ids, to: REFUSED
    b.put("a", "b", "c", "d")
    assert b.run() == 4 and set(b.states().values()) == {"failed"}


@pytest.mark.parametrize("refusal", [REFUSED, SENDER, BUSY])
def test_nothing_fails_while_nothing_gets_through(bench: Make, refusal: Outcome) -> None:
    b = bench(Policy(ANN))
    b.server.answer = lambda ids, to: refusal
    b.put("a", "b")
    b.wait(20 * DAY, every=3 * HOUR)
    assert b.counts() == (2, 0, 0)
    b.server.answer = lambda ids, to: YES
    b.wait(2 * HOUR, every=MINUTE)
    assert b.counts() == (0, 2, 0) and sorted(b.server.ids()) == ["a", "b"]


def test_an_address_that_is_wrong_is_logged_from_the_first_refusal(
    bench: Make, caplog: pytest.LogCaptureFixture
) -> None:
    b = bench(advise=lambda outcome: "Check the address.")
    b.server.answer = lambda ids, to: REFUSED
    b.put("a")
    b.run()
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1 and "550 5.1.1 unknown" in errors[0] and "Check the address." in errors[0]


def test_a_spool_that_is_half_full_is_logged(bench: Make, caplog: pytest.LogCaptureFixture) -> None:
    b = bench()
    b.server.answer = lambda ids, to: REFUSED
    b.put("a", picture=bytes(100_000))
    b.outbox._size_max = 10_000_000
    b.wait(2 * MINUTE)
    assert "half full" not in caplog.text
    b.outbox._size_max = 190_000
    b.wait(2 * MINUTE)
    assert "half full: 1 alerts wait, 0 have failed" in caplog.text


def test_what_everybody_has_is_not_sent_again(bench: Make) -> None:
    b = bench(Policy(ANN, BOB))
    b.server.answer = lambda ids, to: BUSY if to == BOB else YES
    b.put("a")
    b.run()
    b.policy.to = (ANN,)
    b.restart()
    assert b.wait(HOUR, every=10.0) == 0 and b.counts() == (0, 1, 0)


# Pictures that may be what is refused


def with_pictures(b: Bench, outcome: Outcome) -> Callable[[str, str], Outcome]:
    """Give this outcome to a mail that goes with its pictures."""
    return lambda ids, to: YES if b.policy.rendered[-1].max_bytes == 0 else outcome


@pytest.mark.parametrize("outcome", [BIG, judge("mail", 552, "5.3.4 too big"), judge("data", 554, "5.3.4 too big")])
def test_what_is_too_big_goes_again_at_once_without_pictures(bench: Make, outcome: Outcome) -> None:
    b = bench()
    b.server.answer = with_pictures(b, outcome)
    b.put("a", picture=b"picture")
    assert b.run() == 2
    assert [delivery.max_bytes for delivery in b.policy.rendered] == [None, 0]
    assert b.policy.rendered[-1].error == str(outcome), "the mail can say what the server said"
    assert b.counts() == (0, 1, 0)


@pytest.mark.parametrize(
    ("outcome", "seconds"),
    [(judge("dot", 554, "5.7.1 virus found"), MINUTE), (judge("data", 554, "no"), MINUTE), (CUT, MINUTE), (SILENT, MINUTE),
     (judge("dot", 451, "4.7.1 not this"), 3 * HOUR)],
)  # fmt: skip
def test_content_that_never_gets_through_arrives_as_text(bench: Make, outcome: Outcome, seconds: float) -> None:
    b = bench()
    b.server.answer = with_pictures(b, outcome)
    b.put("a", picture=b"picture")
    b.wait(seconds)
    assert b.counts() == (0, 1, 0) and b.policy.rendered[-1].error == str(outcome)


def test_several_mails_that_are_cut_for_their_size_all_arrive_and_small_ones_at_once(bench: Make) -> None:
    b = bench()
    b.server.answer = lambda ids, to: CUT if "big" in ids and b.policy.rendered[-1].max_bytes is None else YES
    b.put(*names(5, "big"), picture=b"picture")
    b.put("small")
    b.wait(15 * MINUTE)
    assert sorted(b.server.ids()) == [*names(5, "big"), "small"]


PROBES = "a probe goes before the hour is over: it is the only delivery that can tell whether its recipient is paused still"


@pytest.mark.xfail(strict=True, reason=PROBES)
@pytest.mark.parametrize(("picture", "copies"), [(None, 2), (b"picture", 3)])
def test_a_mail_whose_dot_is_never_answered_comes_again_once_and_then_hourly(
    bench: Make, picture: bytes | None, copies: int
) -> None:
    """The server may have stored it each time. With pictures, they are left out before it waits."""
    b = bench(rules=RetryRules())
    b.server.answer = lambda ids, to: SILENT
    b.put("a", picture=picture)
    b.run()
    assert 1 + b.wait(HOUR - MINUTE, every=5.0) == copies
    assert b.wait(DAY, every=MINUTE) <= 25


@pytest.mark.xfail(strict=True, reason=PROBES)
def test_mails_whose_dots_are_never_answered_do_not_make_the_others_come_again(bench: Make) -> None:
    b = bench(rules=RetryRules())
    b.server.answer = lambda ids, to: SILENT
    b.put(*names(5))
    b.wait(HOUR, every=5.0)
    assert max(Counter(ids for ids, _ in b.server.tried).values()) <= 2
    b.put("new")
    b.wait(2 * HOUR, every=MINUTE)
    assert "new" in dict(b.server.tried), "what is new has its try"


# What cannot be sent at all


def test_what_cannot_be_composed_fails_and_the_others_go(bench: Make) -> None:
    b = bench()
    b.policy.cannot_compose = {"b"}
    b.put("a", "b", "c")
    b.run()
    assert b.server.ids() == ["a", "c"] and b.states() == {"b": "failed"}
    assert "cannot be composed: KeyError" in b.queue()["b"]["error"]


def test_what_cannot_be_composed_fails_alone_in_a_digest(bench: Make) -> None:
    b = bench(Policy(ANN, BOB, together=True, window=60.0))
    b.policy.cannot_compose = {"b"}
    b.put("a", "b", "c")
    b.run()
    assert sorted(b.server.got) == [("a,c", ANN), ("a,c", BOB)] and b.states() == {"b": "failed"}


@pytest.mark.parametrize("rot", ["payload = x'00'", "payload = 'text'"])
def test_a_damaged_entry_fails_and_the_others_of_its_digest_go(bench: Make, rot: str) -> None:
    b = bench(Policy(together=True, window=60.0))
    b.put("a", "b", "c")
    with b.outbox.transaction() as db:
        db.execute(f"UPDATE entries SET {rot} WHERE id = 'b'")
    b.run()
    assert b.server.ids() == ["a,c"] and b.counts() == (0, 2, 1)
    assert b.queue()["b"]["error"] == "damaged on disk"


def test_a_mail_that_memory_is_too_short_for_waits(
    bench: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def cannot(*_: Any) -> Message:
        b.courier._stopping.set()
        raise MemoryError

    b = bench()
    b.put("a")
    with monkeypatch.context() as short:
        short.setattr(b.policy, "render", cannot)
        b.courier.run(b.server)
    assert b.states() == {"a": "waiting"} and [record.getMessage() for record in caplog.records] == []
    b.restart()
    b.run()
    assert b.server.ids() == ["a"]


def test_failures_are_reported_once_by_a_mail_that_goes_out(bench: Make) -> None:
    b = bench()
    answers = {"bad": REFUSED, "later": BUSY}
    b.server.answer = lambda ids, to: answers.get(ids, YES)
    for name in ("bad", "later", "good", "better"):
        b.put(name)
        b.run()
    reports = {delivery.entries: (delivery.reports, "5.1.1" in delivery.why) for delivery in b.policy.rendered}
    assert reports == {(1,): ((), False), (2,): ((1,), True), (3,): ((1,), True), (4,): ((), False)}


# What is about us pauses all mail

ABOUT_US = [
    AWAY, LOGIN, SENDER, QUOTA, judge_error("resolve", OSError("no name")), judge_error("tls", TimeoutError()),
    judge("greeting", 554, "no"), judge("ehlo", 550, "no"), judge("login", 454, "later"), judge("mail", 450, "later"),
    judge("rcpt", 530, "5.7.0 log in first"), judge("data", 535, "no"), judge("dot", 534, "no"),
]  # fmt: skip


def fail_with(b: Bench, outcome: Outcome) -> None:
    """Have the server fail in this way: on the way to MAIL when connecting, else when sending."""
    before_mail = outcome.step in smtp.STEPS_BEFORE_MAIL
    b.server.away = outcome if before_mail else None
    b.server.answer = (lambda ids, to: YES) if before_mail else (lambda ids, to: outcome)


def mend(b: Bench) -> None:
    b.server.away, b.server.answer = None, lambda ids, to: YES


@pytest.mark.parametrize("outcome", ABOUT_US, ids=str)
def test_what_is_about_us_pauses_all_mail_burns_no_tries_and_is_logged_once(
    bench: Make, caplog: pytest.LogCaptureFixture, outcome: Outcome
) -> None:
    b = bench(Policy(ANN, BOB), advise=lambda outcome: "Do this.")
    fail_with(b, outcome)
    b.put(*names(50))
    b.run()
    assert b.wait(HOUR) <= 20 and a_minute(b.server) <= 6
    assert b.server.opened <= 75
    queue = b.queue().values()
    assert {(row["state"], row["tries"], row["error"]) for row in queue} == {("held", 0, str(outcome))}
    (loud,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert str(outcome) in loud and "Do this." in loud
    mend(b)
    with caplog.at_level(logging.INFO):
        b.wait(HOUR + MINUTE)
    assert sorted(b.server.got) == sorted((name, to) for name in names(50) for to in (ANN, BOB))
    assert "the mail server is back" in caplog.text and b.states() == {}


@pytest.mark.parametrize(
    ("outcome", "first", "longest"),
    [(AWAY, FIRST, 60), (judge_error("greeting", TimeoutError()), FIRST, 60), (LOGIN, 60, LONGEST),
     (judge("login", 454, "later"), FIRST, LONGEST), (judge("greeting", 554, "no"), FIRST, LONGEST),
     (SENDER, FIRST, LONGEST), (QUOTA, FIRST, LONGEST)],
)  # fmt: skip
def test_a_pause_doubles_up_to_its_longest(bench: Make, outcome: Outcome, first: float, longest: float) -> None:
    b = bench()
    fail_with(b, outcome)
    b.put("a")
    b.run()
    probes, begun = [], b.clock()
    asked = b.server.opened
    for _ in range(12 if longest > 60 else 6):
        while b.server.opened == asked:
            b.later(1)
        probes.append(b.clock() - begun)
        begun, asked = b.clock(), b.server.opened
    for waited, most in zip(probes, (min(longest, first * 2**n) for n in range(20)), strict=False):
        assert most * 0.8 - 1 <= waited <= most + 1


def test_a_pause_ends_when_the_step_that_failed_succeeds(bench: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    b = bench()
    fail_with(b, AWAY)
    b.put("a")
    b.run()
    fail_with(b, SENDER)  # The server is back, and does not like the sender.
    b.later(FIRST)
    words = " ".join(record.getMessage() for record in caplog.records)
    assert words.index("refused") < words.index("is back") < words.index("sender not allowed")
    b.later(2 * FIRST)
    assert words.count("is back") == 1, "that it can be connected to says nothing about the sender"


@pytest.mark.xfail(strict=True, reason="whatever comes after MAIL ends a pause of all mail, also one that began at the dot")
def test_a_pause_for_the_daily_quota_is_not_over_when_a_recipient_is_refused(bench: Make) -> None:
    b = bench(Policy(ANN, BOB))
    fail_with(b, QUOTA)
    b.put(*names(20))
    b.run()
    b.server.answer = lambda ids, to: BUSY  # The probe does not come to the dot.
    b.later(FIRST)
    assert b.server.opened == 2 and set(b.states().values()) == {"held"}


def test_one_message_finds_out_whether_a_pause_is_over(bench: Make) -> None:
    b = bench()
    fail_with(b, SENDER)
    b.put("a")
    b.run()
    b.put(*names(50))
    for _ in range(5):
        assert b.later(HOUR) == 1
    assert {ids for ids, _ in b.server.tried} == {"a"}
    assert b.outbox.rows("SELECT count(*) FROM deliveries") == [(1,)]


def join(b: Bench, other: FakeServer) -> None:
    """Let another sender begin, if it may, because the first one is slow."""
    b.monotonic.now += smtp.JOIN_AFTER_S
    b.courier.run(other, False)


def test_only_one_sender_finds_out(bench: Make) -> None:
    b = bench()
    fail_with(b, SENDER)
    b.put("a", "b")
    b.run()
    other = FakeServer()
    b.server.before = lambda ids: join(b, other)
    assert b.later(FIRST) == 1 and other.opened == 0


def test_a_failure_of_what_was_begun_before_the_pause_does_not_make_it_longer(bench: Make) -> None:
    b = bench()
    other = FakeServer()
    b.put("a", "b")

    def meanwhile(ids: str) -> None:
        b.server.before = lambda ids: None
        b.monotonic.now += 1
        fail_with(b, QUOTA)
        other.answer = b.server.answer
        b.courier.run(other, False)
        b.monotonic.now += 1

    b.server.before = meanwhile
    b.run()
    assert len(other.tried) == 1 and len(b.server.tried) == 1
    assert b.later(FIRST - 1) == 1, "it is the first pause"


def test_a_sender_that_cannot_connect_pauses_all_and_another_one_ends_what_it_does(bench: Make) -> None:
    b = bench()
    other = FakeServer()
    other.away = AWAY
    b.put("a", "b", "c")

    def meanwhile(ids: str) -> None:
        b.server.before = lambda ids: None
        b.monotonic.now += 1
        b.courier.run(other, False)

    b.server.before = meanwhile
    b.run()
    b.later(MINUTE)
    assert b.server.ids() == ["a", "b", "c"], "each once"


def test_the_length_of_a_pause_is_forgotten_after_ten_successes(bench: Make) -> None:
    b = bench()
    for turn, (number, expected) in enumerate(((0, FIRST), (7, 2 * FIRST), (7, 4 * FIRST), (8, FIRST))):
        b.put(*names(number, f"between{turn}-"))  # Two more were sent at the end of the pause.
        b.run()
        fail_with(b, SENDER)
        b.put(f"held{turn}")
        b.run()
        mend(b)
        assert b.later(expected * 0.79) == 0
        b.put(f"later{turn}")
        assert b.later(expected * 0.21 + 1) == 2


def test_a_server_that_is_away_is_looked_for_every_minute_and_after_a_retry_at_once(bench: Make) -> None:
    b = bench()
    fail_with(b, AWAY)
    b.put("a")
    b.wait(HOUR)
    assert 55 <= b.server.opened <= 80
    mend(b)
    b.request("retry")
    assert b.run() == 1


# Three failures in a row pause a recipient

ABOUT_A_RECIPIENT = [
    BUSY, REFUSED, CUT, SILENT, judge_error("rcpt", smtp.ReplyError(421, "too many mails")), judge_error("data", ConnectionResetError()),
    judge("rcpt", 553, "5.7.1 Sender address rejected: not owned by user"),
    judge("rcpt", 554, "5.7.1 Client host blocked using zen.spamhaus.org"), judge("rcpt", 550, "5.7.1 Unable to relay"),
    judge("dot", 554, "Message rejected: Email address is not verified"), judge("dot", 451, "4.7.0 rate limited"),
    judge("dot", 550, "5.7.1 User has exceeded its 24-hour sending limit"), judge("data", 554, "5.7.1 only 10 messages per day"),
]  # fmt: skip


@pytest.mark.parametrize("outcome", ABOUT_A_RECIPIENT, ids=str)
def test_an_outage_at_rcpt_or_later_costs_a_handful_of_transactions_and_no_alert(bench: Make, outcome: Outcome) -> None:
    b = bench(Policy(window=60.0, together=False))
    b.server.answer = lambda ids, to: outcome
    b.put(*names(100))
    b.run()
    assert len(b.server.tried) == smtp.FAILURES_TO_PAUSE
    assert b.wait(HOUR) <= 12 and a_minute(b.server) <= 6
    assert b.counts() == (100, 0, 0)
    assert set(b.states().values()) == {"held"}
    mend(b)
    b.wait(HOUR + MINUTE)
    assert sorted(b.server.ids()) == names(100)


def test_failures_that_are_not_in_a_row_pause_nobody(bench: Make) -> None:
    b = bench()
    b.server.answer = lambda ids, to: BUSY if "bad" in ids else YES
    for number in range(10):
        b.put(f"bad{number}", f"good{number}")
        b.run()
    assert len(b.server.got) == 10


def test_a_paused_recipient_holds_up_no_other_and_what_waits_for_paused_ones_alone_is_not_created(bench: Make) -> None:
    b = bench(Policy(ANN, BOB))
    b.server.answer = lambda ids, to: REFUSED if to == BOB else YES
    for name in names(10):
        b.put(name)
        b.later(0.1)
    assert [to for _, to in b.server.tried].count(BOB) == 3 and len(b.server.got) == 10
    assert b.states() == dict.fromkeys(names(10), "held")
    created = b.outbox.rows("SELECT count(*) FROM deliveries")
    b.server.answer = lambda ids, to: REFUSED
    b.put("for-ann", "for-ann-2", "for-ann-3")
    b.run()
    b.put("for-nobody")
    b.wait(MINUTE)
    assert b.outbox.rows("SELECT count(*) FROM deliveries") == [(created[0][0] + 6,)]
    assert b.states()["for-nobody"] == "held"


def test_while_a_recipient_fails_its_deliveries_are_tried_one_at_a_time_the_least_recently_tried_first(
    bench: Make,
) -> None:
    b = bench(rules=RetryRules(FIRST, 20.0))
    b.server.answer = lambda ids, to: REFUSED
    b.put("a", "b", "c", "d", "e")
    b.wait(10 * MINUTE)
    order = "".join(ids for ids, _ in b.server.tried)
    assert order.startswith("abcdeabcdeabcde")


def test_while_a_recipient_fails_only_one_of_its_deliveries_is_with_a_sender(bench: Make) -> None:
    b = bench()
    b.server.answer = lambda ids, to: REFUSED
    b.put("a", "b", "c", "d")
    other = FakeServer()
    b.server.before = lambda ids: ids != "a" and join(b, other)
    b.run()
    b.wait(MINUTE)
    assert len(b.server.tried) > 4 and other.tried == []


def test_a_probe_costs_a_delivery_no_try(bench: Make) -> None:
    b = bench()
    b.server.answer = lambda ids, to: BUSY
    b.put("a", "b", "c")
    b.run()
    assert b.wait(DAY, every=MINUTE) > 20
    assert {row["tries"] for row in b.queue().values()} == {1}


def test_a_limiter_that_lets_one_through_now_and_then_makes_no_new_storm(bench: Make) -> None:
    b = bench()
    accepted: list[float] = []

    def limited(ids: str, to: str) -> Outcome:
        if accepted and b.clock() - accepted[-1] < 5.0:
            return judge("dot", 451, "4.7.0 too many messages, slow down")
        accepted.append(b.clock())
        return YES

    b.server.answer = limited
    b.put(*names(100))
    b.run()
    b.wait(10 * MINUTE)
    assert a_minute(b.server) <= 30, "not many more than the limiter would let through"
    assert len(b.server.tried) <= 4 * len(accepted)


def test_a_pause_ends_when_nothing_is_left_to_try(bench: Make) -> None:
    b = bench()
    b.server.answer = lambda ids, to: REFUSED
    b.put("a", "b", "c")
    b.run()
    b.request("drop")
    mend(b)
    b.put("new")
    b.wait(MINUTE)
    assert b.server.ids() == ["new"]


def test_an_owner_may_do_without_pauses_of_recipients(bench: Make) -> None:
    b = bench(rules=NO_PAUSES)
    b.server.answer = lambda ids, to: YES if ids == "good" else BUSY
    b.put("a", "b", "c", "d")
    b.run()
    assert len(b.server.tried) == 4
    b.put("good")
    b.run()
    assert b.server.ids() == ["good"]


# The message that follows

def ahead(b: Bench) -> FakeServer:
    b.server.looks_ahead = True
    return b.server


def test_the_next_is_prepared_while_the_server_works_and_no_more(bench: Make) -> None:
    b = bench()
    ahead(b)
    b.put(*names(40))
    taken: list[int] = []
    b.server.answer = lambda ids, to: (taken.append(len(b.courier._with_senders)), YES)[1]
    b.run()
    assert sorted(b.server.ids()) == names(40) and max(taken) == 2


def test_what_follows_goes_back_when_all_mail_is_paused(bench: Make) -> None:
    b = bench()
    ahead(b)
    b.put("a", "b")
    fail_with(b, QUOTA)
    assert b.run() == 1 and b.server.closed == 1
    mend(b)
    b.later(FIRST)
    assert b.server.ids() == ["a", "b"]


def test_stop_begins_no_other_message_and_leaves_it_for_the_next_start(bench: Make) -> None:
    b = bench()
    ahead(b)
    b.server.answer = lambda ids, to: (b.courier._stopping.set(), YES)[1]
    b.put("a", "b", "c")
    b.courier.run(b.server)
    assert b.server.ids() == ["a"] and b.server.closed == 1
    mend(b)
    b.restart()
    b.run()
    assert b.server.ids() == ["a", "b", "c"] and b.counts() == (0, 3, 0)


# Retry, drop, changed recipients, requests


def test_retry_sends_what_failed_again_to_who_has_not_got_it_and_ends_pauses(bench: Make) -> None:
    b = bench(Policy(ANN, BOB), rules=RetryRules(FIRST, LONGEST, refused_after=0.0))
    b.server.answer = lambda ids, to: REFUSED if to == BOB else YES
    b.put("a", "b")
    b.run()
    assert b.states() == {"a": "failed", "b": "failed"}
    mend(b)
    b.request("retry", "a")
    b.run()
    assert b.server.got[2:] == [("a", BOB)] and b.states() == {"b": "failed"}
    fail_with(b, LOGIN)
    b.put("c")
    b.run()
    mend(b)
    b.request("retry")
    b.run()
    assert sorted(b.server.got[3:]) == [("b", BOB), ("c", ANN), ("c", BOB)]


def test_a_retry_by_hand_does_not_make_the_next_try_later(bench: Make) -> None:
    b = bench()
    fail_with(b, SENDER)
    b.put("a")
    b.run()
    for _ in range(5):
        b.request("retry")
        assert b.run() == 1
    assert b.later(FIRST) == 1


@pytest.mark.parametrize("how", ["start", "retry"])
def test_a_mended_recipient_gets_what_the_wrong_one_did_not_and_nobody_gets_it_twice(bench: Make, how: str) -> None:
    b = bench(Policy(ANN, "wrong@x.org"))
    b.server.answer = lambda ids, to: REFUSED if to == "wrong@x.org" else YES
    b.put("a", "b")
    b.run()
    b.policy.to = (ANN, BOB)
    b.restart() if how == "start" else b.request("retry")
    b.run()
    assert sorted(b.server.got) == [("a", ANN), ("a", BOB), ("b", ANN), ("b", BOB)]
    assert b.counts() == (0, 2, 0)


def test_drop_ends_what_waits_is_put_off_or_has_failed(bench: Make) -> None:
    b = bench(rules=RetryRules(FIRST, LONGEST, refused_after=0.0))
    answers = {"put-off": BUSY, "failed": REFUSED}
    b.server.answer = lambda ids, to: answers.get(ids, YES)
    b.put("put-off", "failed")
    b.run()
    b.server.away = AWAY
    b.put("waits")
    b.request("drop")
    assert b.states() == {} and b.counts() == (0, 0, 0)
    mend(b)
    assert b.wait(HOUR) == 0


def test_what_is_dropped_in_flight_stays_dropped(bench: Make) -> None:
    b = bench()
    b.server.before = lambda ids: b.outbox.drop("a")
    b.server.answer = lambda ids, to: BUSY
    b.put("a")
    assert b.run() == 1 and b.wait(HOUR) == 0 and b.counts() == (0, 0, 0)


def test_a_request_is_answered_in_its_file_and_the_answer_does_not_stay_for_ever(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench()
    b.put("a", "b")
    for number, name in enumerate(("a", "nobody")):
        Path(f"{b.spool}.request-{number}").write_text(json.dumps(["drop", name]))
    b.courier.tick()
    answers = sorted(b.spool.parent.glob("*.request-*"))
    assert [json.loads(path.read_text()) for path in answers] == [{"failed": 0, "others": 1}, {"failed": 0, "others": 0}]
    assert {path.stat().st_mode & 0o777 for path in answers} == {0o600}
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2 * smtp.HOUSEKEEPING_S)
    b.courier.tick()
    assert not list(b.spool.parent.glob("*.request-*"))


@pytest.mark.parametrize("text", ["", "{", "[]", '["retry"]', '["retry", 5]', '["fly", "all"]', "5", "[" * 100_000])
def test_a_request_that_is_none_is_logged_and_removed(bench: Make, text: str, caplog: pytest.LogCaptureFixture) -> None:
    b = bench()
    b.put("a")
    path = Path(f"{b.spool}.request-1")
    path.write_text(text)
    b.courier.tick()
    if path.exists():  # A number is the name of no entry.
        assert json.loads(path.read_text()) == {"failed": 0, "others": 0}
    else:
        assert "not a request" in caplog.text


# Clocks


def test_a_clock_that_is_set_neither_ages_nor_delays_anything(bench: Make) -> None:
    for step in (10 * 365 * DAY, -10 * 365 * DAY, 3 * HOUR, -HOUR):
        b = bench(Policy(ANN, BOB))
        b.server.answer = lambda ids, to: REFUSED if to == BOB else YES
        b.put(f"a{step}")
        b.run()
        b.clock.now += step
        b.courier.tick()
        b.put(f"b{step}")
        b.wait(10 * MINUTE)
        assert b.counts() == (2, 0, 0), step
        mend(b)
        b.wait(HOUR)
        assert b.counts() == (0, 2, 0), step
        b.outbox.close()
        b.spool.unlink()


def test_a_clock_set_back_while_the_plan_holds_is_noticed(bench: Make) -> None:
    b = bench(Policy(window=60.0))
    b.policy.hold_until = b.clock() + 100
    b.put("a")
    b.run()
    b.policy.hold_until = None
    b.clock.now -= HOUR
    assert b.run() == 1


def test_an_alert_after_a_quiet_week_goes_at_once(bench: Make) -> None:
    b = bench(Policy(window=60.0))
    b.put("a", "b", "c")
    b.run()
    b.wait(8 * DAY, every=HOUR)
    assert b.counts() == (0, 0, 0), "all are forgotten"
    b.put("d")
    assert b.run() == 1


# A disk that fails


def test_while_outcomes_cannot_be_written_nothing_new_is_begun(bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    b = bench()
    monkeypatch.setattr(smtp, "TICK_S", 0.001)
    monkeypatch.setattr(smtp, "UNWRITTEN_MAX", 1)
    real, failures = Outbox.flush, [0]

    def flush(self: Outbox) -> None:
        if self.unwritten() and failures[0] < 4:
            failures[0] += 1
            assert len(b.server.tried) == 1
            raise smtp.SpoolError("the disk is full")
        real(self)

    monkeypatch.setattr(Outbox, "flush", flush)
    b.put("a", "b")
    b.run()
    assert failures == [4] and b.server.ids() == ["a", "b"] and b.counts() == (0, 2, 0)


def test_a_disk_that_cannot_be_read_does_not_make_a_sender_run_hot(bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    b = bench(clock=time.time, monotonic=time.monotonic)
    tried: list[int] = []

    def load(self: Outbox, delivery: Delivery) -> list[Entry]:
        tried.append(delivery.number)
        raise smtp.SpoolError("the disk failed")

    with monkeypatch.context() as broken:
        broken.setattr(Outbox, "load", load)
        with running(b):
            b.put("a")
            wait_for(lambda: len(tried) == 2)
    assert len(tried) <= 3
    b.restart()
    b.run()
    assert b.server.ids() == ["a"]


# Threads


@contextlib.contextmanager
def running(b: Bench) -> Iterator[None]:
    b.courier.start()
    try:
        yield
    finally:
        b.courier.stop()


@pytest.fixture
def real_time(bench: Make) -> Make:
    """A bench whose courier runs in threads, by the clocks of the machine."""
    return lambda **settings: bench(clock=time.time, monotonic=time.monotonic, **settings)


@pytest.mark.parametrize("senders", [1, 2])
def test_an_event_on_an_idle_relay_goes_at_once(real_time: Make, senders: int) -> None:
    b = real_time(senders=senders)
    with running(b):
        times = []
        for number in range(15):
            began = time.monotonic()
            b.put(f"a{number}")
            wait_for(lambda n=number: len(b.server.got) > n)
            times.append(time.monotonic() - began)
    assert sorted(times)[len(times) // 2] < 0.05


def test_another_sender_joins_when_none_has_gone_for_a_while(real_time: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp, "JOIN_AFTER_S", 0.05)
    b = real_time(senders=2)
    go = threading.Event()
    b.server.before = lambda ids: ids == "i000" and go.wait(20)
    with running(b):
        b.put(*names(30))
        wait_for(lambda: len(b.server.got) == 29)
        assert "i000" not in b.server.ids()
        go.set()
        wait_for(lambda: len(b.server.got) == 30)
    assert sorted(b.server.ids()) == names(30) and b.counts() == (0, 30, 0)


def test_the_first_sender_does_the_work_while_it_keeps_up(bench: Make) -> None:
    b = bench()
    other = FakeServer()
    b.server.before = lambda ids: b.courier.run(other, False)
    assert not b.courier.run(other, False)
    b.later(HOUR)
    b.put(*names(40))
    b.run()
    assert len(b.server.got) == 40 and other.opened == 0


def test_a_server_that_hangs_at_the_dot_holds_two_deliveries_and_no_more(bench: Make) -> None:
    b = bench()
    ahead(b)
    b.put(*names(10))
    other = FakeServer()

    def hang(ids: str, to: str) -> Outcome:
        mend(b)
        b.monotonic.now += smtp.JOIN_AFTER_S
        assert b.courier.run(other, False)
        return YES

    b.server.answer = hang
    b.run()
    assert other.ids() == names(10)[2:] and b.server.ids() == names(10)[:2]


def test_a_connection_is_kept_for_a_while_and_then_closed(real_time: Make) -> None:
    b = real_time(keep_open_s=0.05)
    with running(b):
        b.put("a")
        wait_for(lambda: b.server.closed == 1)
        b.put("b")
        wait_for(lambda: b.server.closed == 2)
    assert b.server.ids() == ["a", "b"]


def test_retries_come_by_themselves(real_time: Make) -> None:
    b = real_time(rules=RetryRules(0.02, 1.0))
    answers = [BUSY, BUSY, YES]
    b.server.answer = lambda ids, to: answers.pop(0)
    with running(b):
        b.put("a")
        wait_for(lambda: b.server.got)


def test_a_sender_goes_on_whatever_fails(
    real_time: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(smtp, "TICK_S", 0.01)
    b = real_time()
    faults: list[Exception] = [smtp.SpoolError("the disk failed"), RuntimeError("a mistake")]
    real = b.policy.plan

    def plan(*arguments: Any) -> Plan:
        if faults:
            raise faults.pop(0)
        return real(*arguments)

    b.policy.plan = plan  # type: ignore[method-assign]
    with running(b):
        b.put("a")
        wait_for(lambda: b.server.got)
    assert "the disk failed" in caplog.text and "it goes on" in caplog.text


def test_stop_waits_for_the_delivery_that_is_under_way(real_time: Make) -> None:
    b = real_time()
    under_way = threading.Event()
    b.server.before = lambda ids: (under_way.set(), time.sleep(0.1))
    b.courier.start()
    b.put("a")
    assert under_way.wait(5)
    b.courier.stop()
    assert b.counts() == (0, 1, 0) and b.server.closed == 1


def test_stop_leaves_what_takes_too_long_for_the_next_start(real_time: Make) -> None:
    b = real_time()
    under_way, go = threading.Event(), threading.Event()
    b.server.before = lambda ids: (under_way.set(), go.wait(5))
    b.courier.start()
    b.put("a")
    assert under_way.wait(5)
    began = time.monotonic()
    b.courier.stop(timeout=0.1)
    assert time.monotonic() - began < 2
    b.outbox.close()
    go.set()
    for thread in b.courier._threads:
        thread.join(5)
    b.server.before = lambda ids: None
    b.restart()
    b.run()
    assert b.server.ids() == ["a", "a"], "the outcome was not written, so it goes again"


# With the relay's plan


class RelayPolicy(Policy):
    """Digests as the relay makes them."""

    def __init__(self, *to: str, cooldown: float) -> None:
        super().__init__(*to, window=DAY)
        self.config = replace(server.RelayConfig(), recipients=to, cooldown_s=cooldown)

    def plan(self, waiting: Iterable[PendingEntry], sent: History, now: float, most: int) -> Plan:
        return server.plan(self.config, waiting, sent, now, most)


@pytest.mark.parametrize("outage", [AWAY, LOGIN, SENDER, QUOTA, BUSY, REFUSED, CUT, judge("dot", 554, "5.7.1 too many")], ids=str)
def test_an_outage_with_a_cooldown_ends_in_one_digest(bench: Make, outage: Outcome) -> None:
    b = bench(RelayPolicy(ANN, cooldown=5.0), rules=RetryRules())
    fail_with(b, outage)
    for name in names(60):
        b.put(name)
        b.wait(1)
    assert b.wait(HOUR) <= 20 and a_minute(b.server) <= 6
    assert b.counts() == (60, 0, 0) and set(b.states().values()) == {"held"}
    mend(b)
    b.wait(HOUR + MINUTE)
    assert sorted(",".join(b.server.ids()).split(",")) == names(60)
    assert len(b.server.got) <= 4, "what was begun before the pause, and one digest"


def test_a_dead_recipient_does_not_delay_the_digests_of_a_good_one(bench: Make) -> None:
    b = bench(RelayPolicy(ANN, BOB, cooldown=20.0), rules=RetryRules())
    b.server.answer = lambda ids, to: REFUSED if to == BOB else YES
    for name in names(200):
        b.put(name)
        b.wait(1)
    b.wait(21)
    mails = [ids for ids, to in b.server.got if to == ANN]
    assert 10 <= len(mails) <= 12 and sorted(",".join(mails).split(",")) == names(200)


def test_many_open_deliveries_that_are_due_go_one_after_the_other(bench: Make) -> None:
    b = bench()
    b.put(*(f"m{number}" for number in range(60)))
    b.outbox.create([DueMessage((number,), (ANN,), "alert") for number in range(1, 61)], b.clock())
    b.restart()
    assert b.run() == 60, "more than are looked up at once"
