"""From the queue to the server, one pass at a time: a clock and a transport of the test's own, the real outbox."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Clock, wait_for

import smtp_module as smtp
from smtp_module import (
    Courier,
    Draft,
    Envelope,
    History,
    Item,
    Mail,
    NewItem,
    Outbox,
    Outcome,
    Plan,
    Unavailable,
    Verdict,
    Waiting,
)  # fmt: skip

SENT, LATER, REFUSED = Verdict.SENT, Verdict.TRY_LATER, Verdict.REFUSED
YES = Outcome(SENT, 250, "taken", "dot")
NO = Outcome(REFUSED, 550, "5.1.1 unknown", "rcpt")
BUSY = Outcome(LATER, 450, "4.2.0 later", "rcpt")
BIG = Outcome(REFUSED, 552, "5.3.4 too big", "dot", too_big=True)
AWAY = Outcome(LATER, 0, "refused", "connect", ours=True)
LOGIN = Outcome(LATER, 535, "5.7.8 bad credentials", "login", ours=True)
SENDER = Outcome(LATER, 550, "5.7.1 sender not allowed", "mail", ours=True)
QUOTA = Outcome(LATER, 550, "5.4.5 daily quota exceeded", "dot", ours=True)


class Owner:
    """Each item a mail to `to`; with `together`, all that waits is one mail. What it was asked stays in `planned`."""

    def __init__(self, *to: str, together: bool = False, window: float = 0.0, limit: int = 0) -> None:
        self.to, self.together, self.window, self.limit = to or ("ann@x.org",), together, window, limit
        self.planned: list[list[str]] = []
        self.rendered: list[Mail] = []
        self.poison: set[str] = set()
        self.hold_until: float | None = None
        self.sent: list[History] = []

    def plan(self, waiting: Iterable[Waiting], sent: History, now: float, most: int) -> Plan:
        self.planned.append([])
        self.sent.append(History(list(sent.times), sent.pending, dict(sent.lanes), dict(sent.kinds)))
        rows: list[Waiting] = []
        for row in waiting:
            self.planned[-1].append(row.id)
            rows.append(row)
            if len(rows) >= most and not self.together and not self.hold_until:
                break
        if self.hold_until and now < self.hold_until:
            return Plan([], self.hold_until, "quiet hours")
        groups = [rows] if self.together and rows else [[row] for row in rows]
        return Plan([
            Draft(tuple(row.seq for row in group),
                  tuple(name for name in self.to if name not in group[0].taken), "alert",
                  tuple(row.lane for row in group)) for group in groups
        ])  # fmt: skip

    def recipients(self, lane: str) -> tuple[str, ...]:
        return self.to

    def render(self, mail: Mail, items: Sequence[Item]) -> Envelope:
        self.rendered.append(mail)
        for item in items:
            if item.id in self.poison:
                raise KeyError("poison")
            item.picture()
        return Envelope("relay@x.org", mail.recipients, [",".join(item.id for item in items).encode()])


class Post:
    """A transport that answers as told: `say` maps a mail's ids to outcomes, `away` is why nobody can connect."""

    def __init__(self) -> None:
        self.away: Outcome | None = None
        self.say: Callable[[str, str], Outcome] = lambda ids, name: YES
        self.got: list[tuple[str, tuple[str, ...]]] = []
        self.tried: list[str] = []
        self.opened = self.closed = 0
        self.before: Callable[[str], None] = lambda ids: None

    def open(self) -> None:
        self.opened += 1
        if self.away:
            raise Unavailable(self.away)

    def deliver(self, envelopes: Iterable[Envelope], wanted: Callable[[], bool]) -> Iterator[dict[str, Outcome]]:
        for envelope in envelopes:
            yield self.deliver_one(envelope) if wanted() else {}

    def deliver_one(self, envelope: Envelope) -> dict[str, Outcome]:
        ids = b"".join(envelope.data).decode()
        self.tried.append(ids)
        self.before(ids)
        outcomes = {name: self.say(ids, name) for name in envelope.recipients}
        if taken := tuple(name for name, outcome in outcomes.items() if outcome.verdict is SENT):
            self.got.append((ids, taken))
        return outcomes

    def close(self) -> None:
        self.closed += 1

    def ids(self) -> list[str]:
        return [ids for ids, _ in self.got]


class Bench:
    """An outbox, an owner, a transport and a clock, with a courier that is stepped by hand."""

    def __init__(self, spool: Path, clock: Clock, owner: Owner | None = None, **settings: Any) -> None:
        self.spool, self.clock, self.owner, self.post = spool, clock, owner or Owner(), Post()
        self.settings = {"retry_first": 10.0, "retry_max": 100.0, "clock": clock, **settings}
        self.outbox = Outbox(spool)
        self.restart(close=False)

    def restart(self, *, close: bool = True) -> None:
        if close:
            self.outbox.close()
            self.outbox = Outbox(self.spool)
        self.courier = Courier(self.outbox, self.owner, lambda: self.post, **self.settings)

    def put(self, *names: str, picture: bytes | None = None) -> None:
        self.outbox.put([NewItem(name, f"lane-{name[0]}", b"x", picture, self.clock()) for name in names])
        self.courier.ring()

    def run(self) -> int:
        """Step until nothing is due; how many steps there were."""
        steps = 0
        while self.courier.step(self.post):
            steps += 1
            assert steps < 1000, "the courier runs hot"
        return steps

    def probe(self) -> int:
        """As if the pause of a hold were over."""
        self.courier._hold_until = 0.0
        return self.run()

    def later(self, seconds: float) -> int:
        self.clock.now += seconds
        return self.run()

    def states(self) -> dict[str, str]:
        self.courier._kept_house = time.monotonic()
        self.courier.tick()
        return {row["id"]: row["state"] for row in smtp.read_queue(self.spool)}


@pytest.fixture
def bench(spool: Path, clock: Clock) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(owner: Owner | None = None, **settings: Any) -> Bench:
        made.append(Bench(spool, settings.pop("clock", clock), owner, **settings))
        return made[-1]

    yield make
    for one in made:
        one.outbox.close()


# what goes well


def test_what_waits_is_sent_oldest_first_once(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.put("a", "b", "c")
    b.run()
    assert b.post.ids() == ["a", "b", "c"]
    assert b.run() == 0
    assert b.outbox.counts() == {"queued": 0, "sent": 3, "failed": 0}


def test_a_mail_costs_one_synchronous_commit_and_many_share_it(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.put(*(f"i{n}" for n in range(100)))
    said: list[str] = []
    b.outbox._db.set_trace_callback(said.append)
    b.run()
    assert len(b.post.got) == 100
    assert said.count("COMMIT") <= 100 + 12
    assert said.count("PRAGMA synchronous=FULL") <= 12


def test_nothing_is_asked_again_while_nothing_has_changed(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.put("a")
    b.run()
    asked = len(b.owner.planned)
    for _ in range(10):
        b.run()
    assert len(b.owner.planned) == asked


def test_what_the_plan_holds_is_looked_at_again_only_when_its_time_comes(bench: Callable[..., Bench]) -> None:
    b = bench(Owner(window=60.0))
    b.owner.hold_until = b.clock() + 100
    b.put("a", "b")
    assert b.run() == 0
    b.put("c")
    b.run()
    assert b.owner.planned[-1] == ["c"]
    assert b.states() == {"a": "held", "b": "held", "c": "held"}
    row = smtp.read_queue(b.spool)[0]
    assert (row["error"], row["next"], row["recipients"]) == ("quiet hours", smtp.iso(b.clock() + 100), ["ann@x.org"])
    b.later(99)
    assert b.post.got == []
    b.later(1)
    assert b.post.ids() == ["a", "b", "c"]
    assert b.states() == {}


def test_a_mail_in_flight_does_not_make_the_plan_look_at_what_it_holds(bench: Callable[..., Bench]) -> None:
    b = bench(Owner(window=60.0))
    b.put("a")
    other = Post()
    b.owner.hold_until = None
    seen: list[int] = []

    def meanwhile(ids: str) -> None:
        b.owner.hold_until = b.clock() + 1000
        b.put("held")
        b.courier.step(other)
        asked = len(b.owner.planned)
        for _ in range(5):
            b.courier.step(other)
        seen.append(len(b.owner.planned) - asked)

    b.post.before = meanwhile
    b.run()
    assert seen == [0]


def test_a_clock_set_back_while_the_plan_holds_is_noticed(bench: Callable[..., Bench]) -> None:
    b = bench(Owner(window=60.0))
    b.owner.hold_until = b.clock() + 100
    b.put("a")
    b.run()
    b.owner.hold_until = None
    b.later(-3600)
    assert b.post.ids() == ["a"]


def test_history_tells_the_plan_what_was_sent_and_survives_a_restart(bench: Callable[..., Bench]) -> None:
    b = bench(Owner(window=3600.0, limit=5))
    start = b.clock()
    b.put("a1")
    b.run()
    b.clock.now += 10
    b.put("b1")
    b.run()
    for _ in range(2):
        b.put("c1")
        b.clock.now += 1
        b.courier.ring()
        b.run()
        last = b.owner.sent[-1]
        assert list(last.times)[:2] == [start, start + 10]
        assert (last.lanes["lane-a"], last.lanes["lane-b"], last.pending) == (start, start + 10, 0)
        b.restart()


def test_a_mail_that_is_over_since_the_plan_looked_at_the_clock_counts(bench: Callable[..., Bench]) -> None:
    b = bench(Owner(window=3600.0, limit=5))
    b.put("a")
    b.run()
    for earlier in (0.001, 3600.0):  # another sender was quicker; the clock was set back an hour
        times, pending = b.outbox.budget(b.clock() - earlier, 5)
        assert (list(times), pending) == ([b.clock()], 0)


def test_mails_of_the_future_do_not_use_up_the_budget(bench: Callable[..., Bench]) -> None:
    b = bench(Owner(window=3600.0, limit=5))
    b.clock.now += 10 * 365 * smtp.DAY_S
    b.put("a")
    b.run()
    b.clock.now -= 10 * 365 * smtp.DAY_S
    b.put("b")
    b.run()
    assert list(b.owner.sent[b.owner.planned.index(["b"])].times) == []


# what goes wrong with a mail


def test_a_refusal_is_final_shown_and_told_once(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.post.say = lambda ids, name: NO if ids == "a" else YES
    b.put("a")
    b.run()
    assert b.later(10_000) == 0
    assert b.states() == {"a": "failed"}
    row = smtp.read_queue(b.spool)[0]
    assert (row["tries"], row["next"], row["recipients"]) == (1, None, ["ann@x.org"])
    assert "550 5.1.1 unknown" in row["error"]
    b.put("b", "c")
    b.run()
    assert [(m.failed, "5.1.1" in m.why) for m in b.owner.rendered[-2:]] == [(1, True), (0, False)]


def test_a_failure_is_told_by_a_mail_that_goes_out_and_not_by_one_that_waits(bench: Callable[..., Bench]) -> None:
    b = bench()
    replies = {"bad": NO, "temp": BUSY}
    b.post.say = lambda ids, name: replies.get(ids, YES)
    for name in ("bad", "temp", "good", "better"):
        b.put(name)
        b.run()
    assert [m.failed for m in b.owner.rendered] == [0, 1, 1, 0]
    replies.clear()
    b.later(100)
    assert b.post.ids() == ["good", "better", "temp"] and b.owner.rendered[-1].failed == 0


def test_later_means_backoff_with_jitter_and_another_try_as_the_same_mail(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.post.say = lambda ids, name: BUSY
    b.put("a")
    b.run()
    begun = b.clock()
    waits = []
    while len(waits) < 6:
        tries = len(b.post.tried)
        while len(b.post.tried) == tries:
            b.later(0.5)
        waits.append(b.clock() - begun)
        begun = b.clock()
    for waited, most in zip(waits, (10, 20, 40, 80, 100, 100), strict=True):
        assert most * 0.8 - 1 <= waited <= most + 1
    b.post.say = lambda ids, name: YES
    b.later(100)
    assert len({mail.number for mail in b.owner.rendered}) == 1
    assert b.owner.rendered[-1].tries == 7


def test_a_mail_that_waits_does_not_hold_up_others(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.post.say = lambda ids, name: BUSY if ids == "a" else YES
    b.put("a", "b")
    b.run()
    assert b.post.ids() == ["b"]


def test_backoff_is_kept_over_a_restart(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.post.say = lambda ids, name: BUSY
    b.put("a")
    b.run()
    for _ in range(3):
        b.later(100)
    b.restart()
    assert b.run() == 0
    assert b.later(63) == 0
    assert b.later(18) == 1
    assert b.owner.rendered[-1].tries == 4


def test_recipients_count_one_by_one(bench: Callable[..., Bench]) -> None:
    b = bench(Owner("a@x.org", "b@x.org", "c@x.org"))
    replies = {"a@x.org": YES, "b@x.org": BUSY, "c@x.org": NO}
    b.post.say = lambda ids, name: replies[name]
    b.put("one")
    b.run()
    replies["b@x.org"] = YES
    b.later(20)
    assert b.post.got == [("one", ("a@x.org",)), ("one", ("b@x.org",))]
    assert b.states() == {"one": "failed"}
    replies["c@x.org"] = YES
    b.outbox.retry("one")
    b.courier._replan()
    b.run()
    assert b.post.got[2:] == [("one", ("c@x.org",))]
    assert b.states() == {}


def test_when_everybody_has_it_already_nothing_is_sent(bench: Callable[..., Bench]) -> None:
    b = bench(Owner("a@x.org", "b@x.org"))
    b.post.say = lambda ids, name: NO if name == "b@x.org" else YES
    b.put("one")
    b.run()
    b.owner.to = ("a@x.org",)
    b.outbox.retry("one")
    b.courier._replan()
    b.run()
    assert b.post.tried == ["one"]
    assert b.outbox.counts() == {"queued": 0, "sent": 1, "failed": 0}


def test_too_big_goes_again_at_once_without_pictures_and_then_fails(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.post.say = lambda ids, name: BIG if not b.owner.rendered[-1].bare else YES
    b.put("a", picture=b"picture")
    b.run()
    assert [mail.bare for mail in b.owner.rendered] == [False, True]
    assert b.outbox.counts()["sent"] == 1
    b.post.say = lambda ids, name: BIG
    b.put("b", picture=b"picture")
    b.run()
    assert b.states() == {"b": "failed"}


def test_too_big_for_one_recipient_alone(bench: Callable[..., Bench]) -> None:
    b = bench(Owner("a@x.org", "b@x.org"))
    b.post.say = lambda ids, name: BIG if name == "b@x.org" and not b.owner.rendered[-1].bare else YES
    b.put("a")
    b.run()
    assert b.post.got == [("a", ("a@x.org",)), ("a", ("b@x.org",))]


def test_what_cannot_be_composed_fails_and_the_others_go(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.owner.poison = {"b"}
    b.put("a", "b", "c")
    b.run()
    assert b.post.ids() == ["a", "c"]
    assert b.states() == {"b": "failed"}
    assert "cannot be composed: KeyError" in smtp.read_queue(b.spool)[0]["error"]


def test_what_cannot_be_composed_fails_alone_in_a_mail_of_several(bench: Callable[..., Bench]) -> None:
    b = bench(Owner(together=True))
    b.owner.poison = {"b"}
    b.put("a", "b", "c")
    b.run()
    assert b.post.ids() == ["a,c"]
    assert b.states() == {"b": "failed"}
    assert "cannot be composed: KeyError" in smtp.read_queue(b.spool)[0]["error"]


def test_a_mail_that_memory_is_too_short_for_waits(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def cannot(*_: Any) -> Envelope:
        raise MemoryError

    b = bench()
    b.put("a")
    with monkeypatch.context() as short:
        short.setattr(b.owner, "render", cannot)
        short.setattr(smtp, "TICK_S", 0.01)
        assert b.courier.step(b.post) and b.courier.step(b.post)
    assert b.states() == {"a": "waiting"}
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == ["out of memory"]
    b.run()
    assert b.post.ids() == ["a"]


@pytest.mark.parametrize("rot", ["payload = x'00'", "payload = 'text'"])
def test_a_damaged_row_fails_and_the_others_of_its_mail_go(bench: Callable[..., Bench], rot: str) -> None:
    b = bench(Owner(together=True))
    b.put("a", "b", "c", picture=b"picture")
    with b.outbox.transaction() as db:
        db.execute(f"UPDATE items SET {rot} WHERE id = 'b'")
    b.run()
    assert b.post.ids() == ["a,c"]
    assert b.states() == {"b": "failed"}
    assert b.outbox.counts() == {"queued": 0, "sent": 2, "failed": 1}
    assert smtp.read_queue(b.spool)[0]["error"] == "damaged on disk"


def test_a_mail_goes_without_a_picture_that_is_damaged(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    b = bench(Owner(together=True))
    b.put("a", "b", picture=b"picture")
    with b.outbox.transaction() as db:
        db.execute("UPDATE items SET picture_at = picture_at + 1 WHERE id = 'b'")
    b.run()
    assert b.post.ids() == ["a,b"]
    assert b.outbox.counts() == {"queued": 0, "sent": 2, "failed": 0}
    assert "the picture of row 2 is left out: damaged on disk" in caplog.text


def test_age_is_the_sum_of_its_own_delays(bench: Callable[..., Bench]) -> None:
    b = bench(max_age=300.0)
    b.post.say = lambda ids, name: BUSY
    b.put("a")
    for _ in range(3):
        b.later(100)
    assert b.states() == {"a": "waiting"}
    b.clock.now += 10 * 365 * smtp.DAY_S
    b.run()
    assert b.states() == {"a": "waiting"}, "a jump of the clock expires nothing"
    for _ in range(6):
        b.later(100)
    assert b.states() == {"a": "failed"}
    assert "given up after" in smtp.read_queue(b.spool)[0]["error"]


def test_a_clock_set_back_an_hour_puts_nothing_off_for_an_hour(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.post.say = lambda ids, name: BUSY
    b.put("a")
    b.run()
    b.post.say = lambda ids, name: YES
    b.later(-3600)
    assert b.post.ids() == ["a"]


# what is about us


@pytest.mark.parametrize("why", [AWAY, LOGIN])
def test_a_server_that_cannot_be_used_burns_no_tries_and_freezes_nothing(
    bench: Callable[..., Bench], why: Outcome, caplog: pytest.LogCaptureFixture
) -> None:
    b = bench(advise=lambda outcome: "Do this.")
    b.post.away = why
    b.put("a", "b")
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            assert b.probe() == 0
    assert b.outbox.rows("SELECT count(*) FROM mails") == [(0,)]
    assert b.states() == {"a": "held", "b": "held"}
    row = smtp.read_queue(b.spool)[0]
    assert (row["tries"], row["error"], row["recipients"]) == (0, str(why), ["ann@x.org"])
    loud = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(loud) == 1 and "Do this." in loud[0].getMessage()
    b.owner.to = ("new@x.org",)
    b.post.away = None
    with caplog.at_level(logging.INFO):
        b.probe()
    assert b.post.got == [("a", ("new@x.org",)), ("b", ("new@x.org",))]
    assert "the mail server is back" in caplog.text
    assert b.states() == {}


@pytest.mark.parametrize("step", ["connect", "tls", "greeting"])
def test_a_server_that_is_away_is_tried_once_a_minute_though_what_stands_before_it_accepts(
    bench: Callable[..., Bench], step: str
) -> None:
    b = bench(retry_max=3600.0)
    b.post.away = Outcome(LATER, 0, "the server closed the connection", step, ours=True)
    b.put("a")
    for _ in range(20):
        b.probe()
    assert 0 < b.courier._hold_until - time.monotonic() <= smtp.PROBE_MAX_S


def test_while_held_nobody_connects_before_the_pause_is_over(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.post.away = AWAY
    b.put("a")
    b.run()
    assert b.post.opened == 1
    b.run()
    assert b.post.opened == 1
    assert 7.9 < b.courier._hold_until - time.monotonic() < 10.1


@pytest.mark.parametrize("why", [SENDER, QUOTA])
def test_a_refused_sender_or_quota_holds_all_and_tries_one_mail_at_a_time(
    bench: Callable[..., Bench], why: Outcome, caplog: pytest.LogCaptureFixture
) -> None:
    b = bench()
    b.put(*(f"i{n}" for n in range(10)))
    b.run()
    b.post.got.clear()
    b.post.tried.clear()
    b.post.say = lambda ids, name: why
    b.put(*(f"j{n}" for n in range(10)))
    with caplog.at_level(logging.INFO):
        b.run()
        pauses = []
        for _ in range(4):
            pauses.append(b.courier._hold_until - time.monotonic())
            assert b.probe() == 1, "one mail finds out"
    assert pauses == sorted(pauses) and pauses[-1] > 4 * pauses[0], "the pause grows"
    assert len(set(b.post.tried)) == 1
    assert [record.levelno for record in caplog.records].count(logging.ERROR) == 1
    assert "is back" not in caplog.text
    assert {row["tries"] for row in smtp.read_queue(b.spool)} == {0}
    assert set(b.states().values()) == {"held"}
    b.post.say = lambda ids, name: YES
    b.probe()
    assert sorted(b.post.ids()) == [f"j{n}" for n in range(10)]


def test_one_recipient_with_trouble_about_us_keeps_what_the_others_got(bench: Callable[..., Bench]) -> None:
    b = bench(Owner("a@x.org", "b@x.org"))
    b.post.say = lambda ids, name: QUOTA if name == "b@x.org" else YES
    b.put("one")
    b.run()
    b.post.say = lambda ids, name: YES
    b.probe()
    b.later(100)
    assert b.post.got == [("one", ("a@x.org",)), ("one", ("b@x.org",))]


def test_a_hold_by_one_sender_does_not_send_the_mail_of_another_twice(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.put("a", "b")
    other = Post()
    other.say = lambda ids, name: LOGIN

    def meanwhile(ids: str) -> None:
        b.post.before = lambda ids: None
        while b.courier.step(other):  # takes what is ready, fails, holds
            pass
        b.courier._hold_until = 0.0
        third = Post()
        while b.courier.step(third):
            pass
        assert third.ids() == ["b"]

    b.post.before = meanwhile
    b.run()
    b.probe()
    assert b.post.ids() == ["a"]


def test_a_hold_at_delivery_is_not_ended_by_a_connection(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    b = bench()
    b.post.say = lambda ids, name: AWAY  # a transport that learns only at delivery that its server is no use
    b.put("a", "b")
    b.run()
    for _ in range(5):
        b.probe()
    assert b.courier._hold_until - time.monotonic() > 30
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1


def test_only_one_sender_finds_out_whether_a_hold_is_over(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.post.say = lambda ids, name: SENDER
    b.put("a", "b")
    b.run()
    others: list[bool] = []
    b.post.before = lambda ids: others.append(b.courier.step(Post()))
    assert b.probe() == 1
    assert others == [False]


def test_one_sender_that_cannot_connect_does_not_hold_up_one_that_is_at_work(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    b = bench()
    other = Post()
    other.away = AWAY
    b.put("a", "b")
    b.post.before = lambda ids: b.put("c") if ids == "a" else b.courier.step(other) and None
    with caplog.at_level(logging.ERROR):
        b.run()
    assert sorted(b.post.ids()) == ["a", "b", "c"]
    assert caplog.records == []


def test_what_waits_longer_than_its_life_fails_even_then(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(max_age=600.0)
    b.post.away = AWAY
    b.put("old")
    b.run()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    b.courier.tick()
    b.clock.now += 10 * 365 * smtp.DAY_S  # the wall clock says nothing
    now += 500
    b.put("young")
    b.courier.tick()
    assert b.outbox.counts() == {"queued": 2, "sent": 0, "failed": 0}
    now += 101
    b.courier.tick()
    assert b.outbox.counts() == {"queued": 1, "sent": 0, "failed": 1}
    row = next(row for row in smtp.read_queue(b.spool) if row["state"] == "failed")
    assert row["id"] == "old" and "connect: refused" in row["error"]
    now += 500
    b.courier.tick()
    assert b.outbox.counts()["failed"] == 2


def test_what_is_sent_again_while_everything_is_held_has_a_new_life(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(max_age=600.0)
    b.post.away = AWAY
    b.put("a")
    b.run()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for _ in range(11):
        b.courier.tick()
        now += 61
    assert b.outbox.counts() == {"queued": 0, "sent": 0, "failed": 1}
    request(b.spool, "retry", "all")
    for _ in range(9):
        b.courier.tick()
        now += 61
    assert b.outbox.counts() == {"queued": 1, "sent": 0, "failed": 0}


def test_what_is_given_up_while_everything_is_held_goes_once_when_it_is_sent_again(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(Owner("ann@x.org", "bob@x.org"), max_age=600.0)
    b.post.say = lambda ids, name: YES if name == "ann@x.org" else BUSY
    b.put("a", "b")
    b.run()
    b.post.say = lambda ids, name: SENDER
    b.put("c")
    b.later(30)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    b.courier.tick()
    now += 601
    b.courier.tick()
    assert b.outbox.counts() == {"queued": 0, "sent": 0, "failed": 3}
    assert {row["id"]: row["recipients"] for row in smtp.read_queue(b.spool)}["a"] == ["bob@x.org"]
    b.post.say, b.post.got = lambda ids, name: YES, []
    b.outbox.retry()
    b.courier.ring()
    b.probe()
    assert sorted(b.post.got) == [("a", ("bob@x.org",)), ("b", ("bob@x.org",)), ("c", ("ann@x.org", "bob@x.org"))]
    assert b.outbox.counts() == {"queued": 0, "sent": 3, "failed": 0}


def test_mails_of_which_nothing_is_left_do_not_make_a_hold_longer(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.put("a", "b", "c", "d")
    b.run()
    b.post.say = lambda ids, name: SENDER
    b.put("e", "f", "g", "h")
    b.run()
    assert len(b.outbox.due(math.inf, math.inf, (), 9)) > 1  # begun as a batch
    b.outbox.drop()
    b.post.say = lambda ids, name: YES
    b.put("new")
    b.probe()
    assert b.post.ids()[-1] == "new"


# a backlog


def test_a_backlog_drains_oldest_first_and_what_is_new_does_not_starve(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.put(*(f"old{n:03}" for n in range(400)))
    for _ in range(100):
        b.courier.step(b.post)
    b.put("new")
    place = len(b.post.got)
    b.run()
    ids = b.post.ids()
    assert ids.index("new") - place < 70
    assert [name for name in ids if name != "new"] == [f"old{n:03}" for n in range(400)]


def test_a_pass_looks_at_few_rows_of_a_long_queue(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.put(*(f"i{n}" for n in range(5000)))
    b.courier.step(b.post)
    assert sum(map(len, b.owner.planned)) <= 8


# requests


def request(spool: Path, what: str, name: str) -> None:
    Path(f"{spool}.request-{time.time_ns()}").write_text(json.dumps([what, name]))


def test_a_retry_by_hand_does_not_make_the_next_try_later(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.post.away = AWAY
    b.put("a")
    b.run()
    for _ in range(5):
        request(b.spool, "retry", "all")
        b.courier.tick()
        b.run()
    assert b.courier._hold_until - time.monotonic() <= 20


def test_retry_sends_what_failed_again_and_ends_a_hold(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.post.say = lambda ids, name: NO
    b.put("a", "b")
    b.run()
    b.post.say = lambda ids, name: YES
    request(b.spool, "retry", "a")
    b.courier.tick()
    b.run()
    assert b.post.ids() == ["a"]
    assert not list(b.spool.parent.glob("*.request-*"))
    b.post.away = AWAY
    b.put("c")
    b.run()
    b.post.away = None
    request(b.spool, "retry", "all")
    b.courier.tick()
    b.run()
    assert sorted(b.post.ids()) == ["a", "b", "c"]


def test_drop_of_what_waits_is_put_off_or_has_failed(bench: Callable[..., Bench]) -> None:
    b = bench()
    replies = {"off": BUSY, "failed": NO}
    b.post.say = lambda ids, name: replies.get(ids, YES)
    b.put("off", "failed")
    b.run()
    b.post.away = AWAY
    b.put("waits")
    request(b.spool, "drop", "all")
    b.courier.tick()
    assert b.outbox.counts() == {"queued": 0, "sent": 0, "failed": 0}
    b.post.away = None
    replies.clear()
    b.later(100)
    assert b.post.got == [] and b.states() == {}
    assert b.outbox.rows("SELECT count(*) FROM mails WHERE state = 1") == [(0,)]


def test_drop_of_an_alert_in_flight_stays_dropped(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.post.before = lambda ids: b.outbox.drop("a") and None
    b.post.say = lambda ids, name: BUSY
    b.put("a")
    b.run()
    b.later(100)
    assert b.post.tried == ["a"]
    assert b.outbox.counts() == {"queued": 0, "sent": 0, "failed": 0}


def test_a_request_that_is_none_is_said_and_removed(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    b = bench()
    for text in ("", "{", "[]", '["retry"]', '["retry", 5]', "5"):
        Path(f"{b.spool}.request-1").write_text(text)
        b.courier.tick()
        assert not list(b.spool.parent.glob("*.request-*")), text


# a disk that fails


def test_what_was_sent_is_written_down_before_anything_else(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench()
    monkeypatch.setattr(smtp, "TICK_S", 0.001)
    real, failures = Outbox.transaction, [0]

    def transaction(self: Outbox, **how: bool) -> Any:
        failures[0] += not how.get("durable", True)
        if not how.get("durable", True) and failures[0] < 4:
            raise smtp.SpoolError("the disk is full")
        return real(self, **how)

    monkeypatch.setattr(Outbox, "transaction", transaction)
    b.put("a")
    b.run()
    assert b.post.tried == ["a"] and b.outbox.counts()["sent"] == 1


# threads


@contextlib.contextmanager
def running(b: Bench) -> Iterator[None]:
    b.courier.start()
    try:
        yield
    finally:
        b.courier.stop()


def test_an_event_on_an_idle_relay_goes_at_once(bench: Callable[..., Bench]) -> None:
    for senders in (1, 2):
        b = bench(senders=senders, clock=time.time)
        with running(b):
            times = []
            for number in range(25):
                time.sleep(0.003)
                began = time.monotonic()
                b.put(f"{senders}-{number}")
                wait_for(lambda post=b.post, n=number: len(post.got) > n)
                times.append(time.monotonic() - began)
        assert sorted(times)[len(times) // 2] < 0.05
        b.outbox.close()


def test_two_senders_send_each_mail_once(bench: Callable[..., Bench]) -> None:
    b = bench(senders=2, clock=time.time)
    threads = set()

    def note(ids: str) -> None:
        threads.add(threading.current_thread().name)
        time.sleep(0.001)

    b.post.before = note
    with running(b):
        for number in range(200):
            b.put(f"i{number}")
        wait_for(lambda: b.outbox.counts()["sent"] == 200)
    assert sorted(b.post.ids()) == sorted(f"i{number}" for number in range(200))
    assert threads == {"sender-1", "sender-2"}


def test_what_waits_behind_a_mail_that_hangs_is_taken_over_by_another_sender(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smtp, "BATCH_S", 0.1)
    monkeypatch.setattr(smtp, "TICK_S", 0.02)
    b = bench(senders=2, clock=time.time)
    b.courier._most_at_once = smtp.BATCH_MAILS  # all went well so far
    go = threading.Event()
    b.post.before = lambda ids: go.wait(20) and None if ids == "i0" else None
    with running(b):
        b.put(*(f"i{number}" for number in range(20)))
        wait_for(lambda: b.outbox.counts()["sent"] == 19)
        assert "i0" not in b.post.ids()
        go.set()
        wait_for(lambda: b.outbox.counts()["sent"] == 20)
    assert sorted(b.post.ids()) == sorted(f"i{number}" for number in range(20))


def test_an_alert_after_a_quiet_week_goes_at_once(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.put("a", "b", "c")
    b.run()
    b.clock.now += 8 * smtp.DAY_S
    b.courier._kept_house = -math.inf
    b.courier.tick()
    assert b.outbox.counts()["sent"] == 0, "all are forgotten"
    b.put("d")
    b.run()
    assert b.post.ids() == ["a", "b", "c", "d"]


def test_batches_grow_only_while_full_ones_go_out_briskly(bench: Callable[..., Bench]) -> None:
    b = bench()
    for name in "abcdef":
        b.put(name)
        b.run()
    assert b.courier._most_at_once == 2
    b.put(*(f"i{n}" for n in range(100)))
    b.run()
    assert b.courier._most_at_once == smtp.BATCH_MAILS


def test_a_sender_takes_over_no_more_than_half(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    b = bench()
    b.courier._most_at_once = 8
    monkeypatch.setattr(smtp, "BATCH_S", -1.0)  # everybody is late
    other = Post()

    def meanwhile(ids: str) -> None:
        b.post.before = lambda ids: None
        assert b.courier.step(other)

    b.post.before = meanwhile
    b.put(*(f"i{n}" for n in range(8)))
    b.courier.step(b.post)
    assert (b.post.ids(), other.ids()) == (["i0", "i1", "i2", "i3"], ["i4", "i5", "i6", "i7"])


def test_stop_begins_no_other_mail(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.courier._most_at_once = 8
    b.post.before = lambda ids: b.courier._stopping.set()
    b.put("a", "b", "c")
    b.courier.step(b.post)
    assert b.post.ids() == ["a"] and b.outbox.counts() == {"queued": 2, "sent": 1, "failed": 0}


def test_a_hold_begins_though_another_sender_has_waited_long_for_an_answer(bench: Callable[..., Bench]) -> None:
    b = bench()
    other = Post()
    other.away = AWAY

    def meanwhile(ids: str) -> None:
        b.courier._batches[0].taken_at -= 2 * smtp.PROBE_MAX_S
        b.put("b")
        assert not b.courier.step(other) and b.courier._hold == AWAY

    b.post.before = meanwhile
    b.put("a")
    b.courier.step(b.post)


def test_a_disk_that_cannot_be_read_does_not_make_a_sender_run_hot(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(clock=time.time)
    tried: list[int] = []

    def load(self: Outbox, mail: Mail) -> list[Item]:
        tried.append(mail.number)
        raise smtp.SpoolError("the disk failed")

    with monkeypatch.context() as broken:
        broken.setattr(Outbox, "load", load)
        with running(b):
            b.put("a")
            wait_for(lambda: len(tried) == 2)
    assert len(tried) <= 3
    b.restart()
    b.run()
    assert b.post.ids() == ["a"]


def test_a_connection_is_closed_when_there_is_no_more_work(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smtp, "LINGER_S", 0.05)
    b = bench(clock=time.time)
    with running(b):
        b.put("a")
        wait_for(lambda: b.post.got)
        wait_for(lambda: b.post.closed == 1)


def test_retries_come_without_a_ring(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp, "TICK_S", 0.02)
    b = bench(clock=time.time, retry_first=0.05)
    replies = [BUSY, BUSY, YES]
    b.post.say = lambda ids, name: replies.pop(0)
    with running(b):
        b.put("a")
        wait_for(lambda: b.post.got)


def test_the_log_tells_of_each_mail_once_and_of_a_batch_together(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    names = [f"{number}-{'x' * 120}" for number in range(300)]
    b = bench()
    b.put(*names)
    b.run()
    lines = [smtp.OneLine("%(message)s").format(record) for record in caplog.records if "sent" in record.message]
    told = [re.fullmatch(r"sent (.*) to ann@x\.org", line) for line in lines]
    assert [name for match in told if match for name in match[1].split(", ")] == names
    assert len(lines) < 30


def test_a_sender_that_stumbles_goes_on(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(smtp, "TICK_S", 0.01)  # its pause after each
    b = bench(clock=time.time)
    faults: list[Exception] = [smtp.SpoolError("the disk failed"), RuntimeError("a mistake")]
    real = b.owner.plan

    def plan(*arguments: Any) -> Plan:
        if faults:
            raise faults.pop(0)
        return real(*arguments)

    b.owner.plan = plan  # type: ignore[method-assign]
    with running(b):
        b.put("a")
        wait_for(lambda: b.post.got)
    assert "the disk failed" in caplog.text and "stumbled" in caplog.text


def test_stop_waits_for_the_mail_that_is_under_way(bench: Callable[..., Bench]) -> None:
    b = bench(clock=time.time)
    under_way = threading.Event()

    def slowly(ids: str) -> None:
        under_way.set()
        time.sleep(0.2)

    b.post.before = slowly
    b.courier.start()
    b.put("a")
    under_way.wait(5)
    b.courier.stop()
    assert b.outbox.counts()["sent"] == 1
    assert b.post.closed == 1


def test_stop_leaves_what_takes_too_long_for_the_next_start(bench: Callable[..., Bench]) -> None:
    b = bench(clock=time.time)
    under_way, go = threading.Event(), threading.Event()
    b.post.before = lambda ids: under_way.set() or (go.wait(5) and None)
    b.courier.start()
    b.put("a")
    under_way.wait(5)
    began = time.monotonic()
    b.courier.stop(timeout=0.1)
    assert time.monotonic() - began < 2
    b.outbox.close()
    go.set()
    for thread in b.courier._threads:
        thread.join(5)
    b.post.before = lambda ids: None
    b.restart()
    b.run()
    assert b.post.ids() == ["a", "a"], "the outcome was not written down, so it goes again"
