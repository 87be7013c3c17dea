"""The rules all together over random schedules: recipients that are dead, slow, limited and mended, a server that is
away, a changed configuration, restarts and kills. The outbox, the courier and the relay's plan are real; the clock and
the mail server are ours."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_courier import AWAY, BUSY, CUT, LOGIN, QUOTA, REFUSED, SENDER, SILENT, YES, Bench, a_minute

import server
import smtp_module as smtp
from smtp_module import Delivery, Entry, History, Message, NewEntry, Outcome, PendingEntry, Plan

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
GOOD, OTHER, WRONG, MENDED = "good@x.org", "other@x.org", "wrong@x.org", "mended@x.org"
HANDFUL = 6  # transactions in a minute


class RelayPolicy:
    """The relay's plan, with mails that hold the ids of their alerts."""

    def __init__(self, config: server.RelayConfig) -> None:
        self.config = config
        self.window = max(config.cooldown_s, DAY) if config.cooldown_s or config.daily_max else 0.0
        self.limit = config.daily_max

    def plan(self, waiting: Iterable[PendingEntry], sent: History, now: float, most: int) -> Plan:
        return server.plan(self.config, waiting, sent, now, most)

    def recipients(self, kind: str, source: str) -> tuple[str, ...]:
        return server.route(self.config, kind, source)

    def render(self, delivery: Delivery, entries: Sequence[Entry]) -> Message:
        names = ",".join(entry.id for entry in entries)
        return Message("relay@x.org", [names.encode()], names)


def mail(delivery: Delivery) -> str:
    """The ids of its alerts, which are numbered as they arrive."""
    return ",".join(f"i{seq - 1}" for seq in delivery.entries)


class Killed(BaseException):
    """The process was killed while a mail was under way."""


class Relay(Bench):
    """A bench with the relay's plan, whose server can fail in many ways and whose courier can be killed."""

    def __init__(self, spool: Path, config: server.RelayConfig) -> None:
        self.resets: list[float] = []  # when pauses were forgotten
        super().__init__(spool, RelayPolicy(config), rules=smtp.RetryRules())  # type: ignore[arg-type]
        self.server.answer = self.respond
        self.trouble: dict[str, Callable[[], Outcome]] = {}  # by recipient; "" is all mail
        self.unsure: set[tuple[str, str]] = set()  # mails that may come again: nobody was told that they are there
        self.kill_at = -1  # the number of a transaction
        self.accepted: list[tuple[float, str, str]] = []  # when, the ids, the recipient

    def respond(self, ids: str, to: str) -> Outcome:
        find = self.trouble.get("") or self.trouble.get(to)
        outcome = find() if find else YES
        if outcome is SILENT:  # It was accepted, and nobody was told.
            self.server.got.append((ids, to))
            self.unsure.add((ids, to))
        if outcome.verdict is smtp.Verdict.SENT:
            self.accepted.append((self.clock(), ids, to))
        if len(self.server.tried) == self.kill_at:
            self.unsure |= {(ids, to), *((mail(one), one.recipient) for one, _ in self.outbox._ended)}
            self.outbox.flush = lambda: None  # type: ignore[method-assign]
            self.server.got += [(ids, to)] * (outcome is YES)
            raise Killed
        return outcome

    def set_trouble(self, who: str, outcome: Outcome | Callable[[], Outcome] | None) -> None:
        """Let the server fail in this way, for one recipient or ("") for all mail, or no longer."""
        if not who:
            self.server.away = outcome if outcome in (AWAY, LOGIN) else None  # type: ignore[assignment]
        if outcome is None:
            self.trouble.pop(who, None)
        else:
            self.trouble[who] = outcome if callable(outcome) else lambda: outcome

    def restart(self, *, close: bool = True) -> None:
        self.resets.append(self.monotonic())
        super().restart(close=close)

    def request(self, what: str, name: str = "all") -> None:
        self.resets.append(self.monotonic())
        super().request(what, name)

    def run(self) -> int:
        try:
            return super().run()
        except Killed:
            self.outbox._ended.clear()
            self.server.close()
            self.restart()
            return 0

    def alert(self, name: str, event: str, camera: str) -> None:
        self.outbox.put([NewEntry(name, event, camera, b"x", None, self.clock())])
        self.courier.notify()

    def received(self, recipient: str) -> Counter[str]:
        """How often each alert came to a recipient."""
        return Counter(name for ids, to in self.server.got if to == recipient for name in ids.split(","))


def limiter(relay: Relay, seconds: float) -> Callable[[], Outcome]:
    """A server that accepts one mail every so many seconds."""
    last = [-seconds]

    def find() -> Outcome:
        if relay.clock() - last[0] < seconds:
            return smtp.judge("dot", 451, "4.7.0 slow down")
        last[0] = relay.clock()
        return YES

    return find


def configured(*recipients: str, **more: Any) -> server.RelayConfig:
    return replace(server.RelayConfig(), recipients=recipients, **more)


@pytest.fixture
def relay(spool: Path, request: pytest.FixtureRequest) -> Callable[..., Relay]:
    def make(*recipients: str, **more: Any) -> Relay:
        made = Relay(spool, configured(*recipients, **more))
        request.addfinalizer(made.outbox.close)
        return made

    return make


OUTAGES = [AWAY, LOGIN, SENDER, QUOTA, BUSY, REFUSED, CUT, smtp.judge("dot", 554, "5.7.1 too many"),
           smtp.judge_error("rcpt", smtp.ReplyError(421, "4.7.0 too many connections"))]  # fmt: skip


@pytest.mark.parametrize("outage", OUTAGES, ids=str)
def test_an_outage_with_a_cooldown_ends_in_one_digest(relay: Callable[..., Relay], outage: Outcome) -> None:
    r = relay(GOOD, cooldown_s=5.0)
    r.set_trouble("", outage)
    for number in range(100):
        r.alert(f"i{number}", "MOTION_DETECTED", "yard")
        r.wait(1)
    assert a_minute(r.server) <= HANDFUL and set(r.states().values()) == {"held"}
    r.wait(HOUR)
    assert r.counts() == (100, 0, 0) and a_minute(r.server) <= HANDFUL
    r.set_trouble("", None)
    r.wait(HOUR + MINUTE)
    assert r.counts() == (0, 100, 0) and set(r.received(GOOD).values()) == {1}
    assert len(r.server.got) <= 4 + (outage is CUT), "what was begun before the pause, and one digest"


def test_a_digest_for_a_dead_and_a_good_recipient_comes_to_the_good_one_in_time(relay: Callable[..., Relay]) -> None:
    r = relay(GOOD, WRONG, cooldown_s=20.0)
    r.set_trouble(WRONG, REFUSED)
    for number in range(300):
        r.alert(f"i{number}", "MOTION_DETECTED", "yard")
        r.wait(1)
    r.wait(30)
    mails = [ids for ids, to in r.server.got if to == GOOD]
    assert 14 <= len(mails) <= 17 and sum(r.received(GOOD).values()) == 300


class Life:
    """A random life of a relay, a second at a time."""

    def __init__(self, relay: Relay, chance: random.Random, *, kills: bool, outages: bool) -> None:
        self.relay, self.chance, self.kills, self.outages = relay, chance, kills, outages
        self.arrived: dict[str, float] = {}
        self.mended = False

    def happen(self) -> None:
        """Perhaps something happens in this second."""
        chance, relay, roll = self.chance, self.relay, self.chance.random()
        if roll < 0.08:
            for _ in range(chance.choice((1, 1, 1, 12))):
                name = f"i{len(self.arrived)}"
                self.arrived[name] = relay.clock()
                relay.alert(name, chance.choice(("MOTION_DETECTED", "DOOR_OPENED")), f"cam{chance.randint(1, 3)}")
        elif roll < 0.084 and self.outages:
            relay.set_trouble("", chance.choice(OUTAGES))
        elif roll < 0.09:
            relay.set_trouble("", None)
        elif roll < 0.096:
            relay.set_trouble(OTHER, chance.choice((BUSY, REFUSED, CUT, SILENT, limiter(relay, 5), limiter(relay, 40), None)))
        elif roll < 0.099 and self.kills:
            relay.kill_at = len(relay.server.tried) + chance.randint(1, 3)
        elif roll < 0.101:
            relay.restart()
        elif roll < 0.103:
            relay.request("retry")
        elif roll < 0.1035 and not self.mended:
            self.mend()

    def mend(self) -> None:
        """Somebody has seen that an address is wrong."""
        self.mended = True
        config = replace(self.relay.policy.config, recipients=(GOOD, OTHER, MENDED))  # type: ignore[attr-defined]
        self.relay.policy = RelayPolicy(config)  # type: ignore[assignment]
        self.relay.restart()

    def look(self) -> None:
        """What `queue` says is true: an alert is in it exactly while somebody has not got it, and it says who."""
        relay = self.relay
        has = {to: relay.received(to) for to in (GOOD, OTHER, WRONG, MENDED)}
        unsure = {(name, to) for ids, to in relay.unsure for name in ids.split(",")}
        queue = relay.queue()
        for name, row in queue.items():
            assert row["recipients"], name
            for to in row["recipients"]:
                assert not has[to][name] or (name, to) in unsure, f"{to} has {name}, and the queue says not: {row}"
        for name in self.arrived.keys() - queue.keys():
            assert all(has[to][name] for to in (GOOD, OTHER, MENDED)), f"somebody lacks {name}, and it is in no queue"

    def most_in_a_minute(self, recipient: str) -> int:
        """Transactions for a recipient, less those that a start or a retry allows."""
        times = [when for (_, to), when in zip(self.relay.server.tried, self.relay.server.times, strict=True) if to == recipient]
        resets = self.relay.resets
        return max((sum(start <= when < start + MINUTE for when in times)
                    - HANDFUL * sum(start - 1 <= when < start + MINUTE for when in resets) for start in times), default=0)


@pytest.mark.parametrize("seed", range(12))
def test_every_alert_reaches_each_recipient_once_whatever_happens(relay: Callable[..., Relay], seed: int) -> None:
    chance = random.Random(seed)
    limit, cooldown = chance.choice((0, 0, 60)), chance.choice((0.0, 0.0, 7.0, 120.0))
    r = relay(GOOD, OTHER, WRONG, daily_max=limit, cooldown_s=cooldown)
    r.server.looks_ahead = chance.random() < 0.7
    r.set_trouble(WRONG, REFUSED)
    life = Life(r, chance, kills=not limit, outages=chance.random() < 0.6)
    start = r.clock()
    for second in range(1200):
        life.happen()
        r.wait(1)
        if second % 100 == 99:
            life.look()
    assert life.most_in_a_minute(WRONG) <= HANDFUL
    r.kill_at = -1
    r.set_trouble("", None)
    r.set_trouble(OTHER, None)
    if not life.mended:
        life.mend()
    for _ in range(40):  # With a daily limit it takes days.
        r.wait(HOUR, every=5 * MINUTE)
        r.request("retry")
        if not r.counts()[0]:
            break
        r.wait(DAY, every=HOUR)
    assert r.states() == {}
    for to in (GOOD, OTHER, MENDED):
        received = r.received(to)
        assert received.keys() == life.arrived.keys(), f"{to} lacks {life.arrived.keys() - received.keys()}"
        unsure = {name for ids, unsure_to in r.unsure if unsure_to == to for name in ids.split(",")}
        assert {name for name, number in received.items() if number > 1} <= unsure
    assert not r.received(WRONG)
    if limit:
        times = [when for when, *_ in r.accepted]
        assert all(sum(when - DAY < other <= when for other in times) <= limit for when in times)
    elif not life.outages:
        came = {name: when for when, ids, to in reversed(r.accepted) if to == GOOD for name in ids.split(",")}
        waits = [came[name] - when for name, when in life.arrived.items() if when < start + 900]
        assert max(waits) <= 2 * cooldown + 5, "nobody waits for another"  # What is planned anew opens a window, too.
