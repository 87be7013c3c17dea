"""The plan is pure: what waits, what was sent, the configuration and the time in; the mails that are due out."""

import bisect
import datetime as dt
import heapq
import itertools
import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

import server
from smtp_module import DAY_S, DueMessage, History, PendingEntry, Plan

HOUR, MINUTE = 3600.0, 60.0
NOW = dt.datetime(2026, 5, 6, 12, 0, tzinfo=dt.UTC).timestamp()  # a Wednesday
routes = server.listed(";", server.Route.of)
MOTION, DOOR = "MOTION_DETECTED", "DOOR_OPENED"
PLAIN = server.RelayConfig(recipients=("a@x.org",))
ALONE, DIGEST = "alone", "digest"


@pytest.fixture
def timezone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def choose(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield choose
    monkeypatch.undo()
    time.tzset()


@pytest.fixture(autouse=True)
def utc(timezone: Callable[[str], None]) -> None:
    timezone("UTC")


def local(text: str) -> float:
    """`2026-05-06 22:30` in the time zone of the test."""
    return dt.datetime.fromisoformat(text).timestamp()


def row(seq: int, arrived: float, event: str = MOTION, camera: str = "cam1", served: Sequence[str] = ()) -> PendingEntry:
    return PendingEntry(seq, f"id{seq}", event, camera, arrived, frozenset(served))


def decide(config: server.RelayConfig, rows: Sequence[PendingEntry], now: float, most: int = 1000, **sent: Any) -> Plan:
    times = list(sent.pop("times", ()))
    return server.plan(config, iter(rows), History(times, **sent), now, most)


def mails(plan: Plan) -> list[tuple[int, ...]]:
    return [message.entries for message in plan.due]


def test_without_any_rule_each_alert_is_a_mail_oldest_first() -> None:
    plan = decide(PLAIN, [row(1, NOW - 5), row(2, NOW - 4), row(3, NOW)], NOW)
    assert mails(plan) == [(1,), (2,), (3,)] and plan.wake is None
    assert plan.due[0] == DueMessage((1,), ("a@x.org",), "alert", ((MOTION, "cam1"),))


def test_nothing_waits_and_nothing_is_due() -> None:
    assert decide(PLAIN, [], NOW) == Plan([], None, "")


def test_plan_pulls_no_more_rows_than_it_needs() -> None:
    rows = (row(seq, NOW) for seq in itertools.count(1))
    plan = server.plan(PLAIN, rows, History(), NOW, 32)
    assert len(plan.due) == 32 and next(rows).seq == 33


# cooldown: the first at once, those of the next N seconds as one digest, which opens the next window

COOL = replace(PLAIN, cooldown_s=60.0)
GROUP, OTHER = (MOTION, "cam1"), (MOTION, "cam2")

WINDOWS: list[tuple[str, list[PendingEntry], dict[tuple[str, str], float], float, list[tuple[int, ...]], float | None]] = [
    # what, waiting, when mails of the groups last began, seconds since NOW, mails, wake
    ("the first goes at once", [row(1, NOW)], {}, 0, [(1,)], None),
    ("the others of a burst wait", [row(1, NOW), row(2, NOW), row(3, NOW)], {}, 0, [(1,)], 60),
    ("in the window they wait", [row(2, NOW + 1), row(3, NOW + 59)], {GROUP: NOW}, 59.9, [], 60),
    ("at its end they come as one", [row(2, NOW + 1), row(3, NOW + 59)], {GROUP: NOW}, 60, [(2, 3)], None),
    ("one alone in the window comes at its end", [row(2, NOW + 1)], {GROUP: NOW}, 60, [(2,)], None),
    ("a window in which nothing came is closed", [row(2, NOW + 60)], {GROUP: NOW}, 60, [(2,)], None),
    ("the digest opens the next window", [row(4, NOW + 61)], {GROUP: NOW + 60}, 61, [], 120),
    ("what came between its end and the digest is in it", [row(2, NOW + 1), row(3, NOW + 70)], {GROUP: NOW}, 75,
     [(2, 3)], None),
    ("another camera has its own window",
     [row(2, NOW + 1), row(3, NOW + 2, camera="cam2")], {GROUP: NOW}, 3, [(3,)], 60),
    ("another event has its own window", [row(2, NOW + 1), row(3, NOW + 2, DOOR)], {GROUP: NOW}, 3, [(3,)], 60),
    ("two windows end at once", [row(2, NOW + 1), row(3, NOW + 2, camera="cam2"), row(4, NOW + 3)],
     {GROUP: NOW, OTHER: NOW}, 60, [(2, 4), (3,)], None),
    ("the next wake is the first end", [row(2, NOW + 1), row(3, NOW + 2, camera="cam2")],
     {GROUP: NOW, OTHER: NOW - 30}, 5, [], 30),
    ("priority does not break a window", [row(2, NOW + 1, DOOR)], {(DOOR, "cam1"): NOW}, 2, [], 60),
    ("an alert from before the window", [row(2, NOW - 500)], {GROUP: NOW}, 60, [(2,)], None),
    ("the clock was set back an hour", [row(2, NOW + 1)], {GROUP: NOW + 3600}, 1, [(2,)], None),
    ("an alert from before the clock was set back", [row(2, NOW + 3600)], {}, 0, [(2,)], None),
    ("the clock went on ten years", [row(2, NOW + 1), row(3, NOW + 2)], {GROUP: NOW}, 3.2e8, [(2, 3)], None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "groups", "after", "due", "wake"), [entry[1:] for entry in WINDOWS], ids=[entry[0] for entry in WINDOWS]
)
def test_window_of_the_table(
    rows: list[PendingEntry], groups: dict[tuple[str, str], float], after: float, due: list[tuple[int, ...]], wake: float | None
) -> None:
    plan = decide(COOL, rows, NOW + after, groups=groups)
    assert mails(plan) == due
    assert plan.wake == (None if wake is None else NOW + wake)
    assert (plan.why == "cooldown") == (wake is not None)


def test_digest_says_which_groups_it_closes_and_what_it_is() -> None:
    plan = decide(COOL, [row(2, NOW + 1), row(3, NOW + 2)], NOW + 60, groups={GROUP: NOW})
    assert plan.due == [DueMessage((2, 3), ("a@x.org",), "digest", (GROUP,))]


def test_restart_inside_a_window_changes_nothing() -> None:
    """No plan is stored: what was sent is read back from the spool, so the answer is the same."""
    rows = [row(2, NOW + 1), row(3, NOW + 30)]
    before = decide(COOL, rows[:1], NOW + 20, groups={GROUP: NOW}, kinds={"alert": NOW}, times=[NOW])
    after = decide(COOL, rows, NOW + 40, groups={GROUP: NOW})
    assert before == replace(after) and after.wake == NOW + 60


def test_changed_cooldown_counts_for_what_waits() -> None:
    rows = [row(2, NOW + 1), row(3, NOW + 2)]
    assert mails(decide(COOL, rows, NOW + 10, groups={GROUP: NOW})) == []
    assert mails(decide(replace(COOL, cooldown_s=5.0), rows, NOW + 10, groups={GROUP: NOW})) == [(2, 3)]
    assert mails(decide(PLAIN, rows, NOW + 10, groups={GROUP: NOW})) == [(2,), (3,)]


def test_large_digest_is_cut_in_bounded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "DIGEST_MAX", 100)
    rows = [row(seq, NOW + 1) for seq in range(2, 252)]
    plan = decide(COOL, rows, NOW + 60, groups={GROUP: NOW})
    assert [len(items) for items in mails(plan)] == [100, 100, 50]
    assert sorted(itertools.chain(*mails(plan))) == list(range(2, 252))


def test_digest_is_not_made_before_all_rows_were_seen() -> None:
    """Looking stops at `most` mails: a digest made then would miss what comes behind."""
    rows = [row(2, NOW + 1), *(row(seq, NOW + 2, camera=f"c{seq}") for seq in range(3, 8)), row(9, NOW + 3)]
    plan = decide(COOL, rows, NOW + 60, most=3, groups={GROUP: NOW})
    assert mails(plan) == [(3,), (4,), (5,)] and plan.wake == NOW + 60
    assert mails(decide(COOL, [rows[0], *rows[4:]], NOW + 60, most=3, groups={GROUP: NOW})) == [(6,), (7,), (2, 9)]


# quiet hours


def quiet(text: str, **more: Any) -> server.RelayConfig:
    return replace(PLAIN, quiet=server.quiet_rules(text), **more)


NIGHT, WEEK = "22:00-07:00", "Mon-Fri 22:00-07:00; Sat,Sun 23:00-09:00"
# 2026-05-04 is a Monday; Berlin changes on 2026-03-29 (02:00 -> 03:00) and 2026-10-25 (03:00 -> 02:00);
# Tehran changed on 2021-03-22 (00:00 -> 01:00) and 2021-09-22 (00:00 -> 23:00 of the day before).
HOURS: list[tuple[str, str, str, str, str | None]] = [
    # zone, rules, now, end of the quiet hours or None, in local time (or in UTC, with Z)
    ("UTC", NIGHT, "2026-05-06 21:59:59", None),
    ("UTC", NIGHT, "2026-05-06 22:00", "2026-05-07 07:00"),
    ("UTC", NIGHT, "2026-05-06 23:59:59", "2026-05-07 07:00"),
    ("UTC", NIGHT, "2026-05-07 00:00", "2026-05-07 07:00"),
    ("UTC", NIGHT, "2026-05-07 06:59:59", "2026-05-07 07:00"),
    ("UTC", NIGHT, "2026-05-07 07:00", None),
    ("UTC", "12:00-13:00", "2026-05-07 12:30", "2026-05-07 13:00"),
    ("UTC", "00:00-06:00", "2026-05-07 00:00", "2026-05-07 06:00"),
    ("UTC", "18:00-00:00", "2026-05-07 23:59:59", "2026-05-08 00:00"),
    ("UTC", "18:00-24:00", "2026-05-07 23:59:59", "2026-05-08 00:00"),
    ("UTC", "18:00-24:00", "2026-05-08 00:00", None),
    ("UTC", NIGHT, "2026-12-31 23:00", "2027-01-01 07:00"),
    ("UTC", NIGHT, "2028-02-28 23:00", "2028-02-29 07:00"),
    # week-ends: the day on which the window begins counts
    ("UTC", WEEK, "2026-05-08 22:30", "2026-05-09 07:00"),  # Friday night
    ("UTC", WEEK, "2026-05-09 08:00", None),  # Saturday morning belongs to Friday's rule
    ("UTC", WEEK, "2026-05-09 22:30", None),
    ("UTC", WEEK, "2026-05-09 23:30", "2026-05-10 09:00"),
    ("UTC", WEEK, "2026-05-11 08:00", "2026-05-11 09:00"),  # Monday morning belongs to Sunday's
    ("UTC", WEEK, "2026-05-11 22:00", "2026-05-12 07:00"),
    ("UTC", "Sat-Mon 10:00-11:00", "2026-05-10 10:30", "2026-05-10 11:00"),  # a range that passes the week's end
    ("UTC", "Sat-Mon 10:00-11:00", "2026-05-12 10:30", None),
    # windows that touch or overlap are one
    ("UTC", "22:00-02:00; 02:00-07:00", "2026-05-06 23:00", "2026-05-07 07:00"),
    ("UTC", "22:00-03:00; 02:00-07:00; 06:30-08:00", "2026-05-06 23:00", "2026-05-07 08:00"),
    ("UTC", "Fri 18:00-24:00; Sat,Sun 00:00-24:00; Mon 00:00-06:00", "2026-05-08 19:00", "2026-05-11 06:00"),
    ("UTC", "Mon-Sat 00:00-24:00; Sun 00:00-23:00", "2026-05-04 12:00", "2026-05-10 23:00"),
    # clock changes
    ("Europe/Berlin", NIGHT, "2026-03-28 23:00", "2026-03-29 05:00Z"),
    ("Europe/Berlin", NIGHT, "2026-10-24 23:00", "2026-10-25 06:00Z"),
    ("Europe/Berlin", "22:00-02:30", "2026-03-28 23:00", "2026-03-29 01:30Z"),  # an end that is skipped
    ("Europe/Berlin", "22:00-02:30", "2026-10-24 23:00", "2026-10-25 00:30Z"),  # an end that comes twice: the first
    ("Europe/Berlin", "02:30-04:00", "2026-03-29 01:59", None),
    ("Europe/Berlin", "02:30-03:00", "2026-03-29 03:10", None),  # a window that does not exist that day
    ("Asia/Tehran", NIGHT, "2021-03-21 23:30", "2021-03-22 02:30Z"),
    ("Asia/Tehran", "18:00-00:00", "2021-03-21 23:30", "2021-03-21 20:30Z"),  # midnight is skipped
    ("Asia/Tehran", NIGHT, "2021-09-21 22:30", "2021-09-22 03:30Z"),
    ("Asia/Tehran", NIGHT, "2026-05-06 23:30", "2026-05-07 03:30Z"),
]


@pytest.mark.parametrize(("zone", "rules", "now", "end"), HOURS)
def test_quiet_hours_of_the_table(
    zone: str, rules: str, now: str, end: str | None, timezone: Callable[[str], None]
) -> None:
    timezone(zone)
    moment = local(now)
    config = quiet(rules)
    plan = decide(config, [row(1, moment)], moment)
    if end is None:
        assert mails(plan) == [(1,)] and plan.wake is None
    else:
        assert plan == Plan([], local(end), "quiet hours")
        assert mails(decide(config, [row(1, moment), row(2, moment)], local(end))) == [(1, 2)]


def test_what_was_held_at_night_comes_as_one_digest_and_what_comes_after_it_alone() -> None:
    rows = [row(1, local("2026-05-06 23:00")), row(2, local("2026-05-07 06:59:59"), camera="cam2")]
    rows.append(row(3, local("2026-05-07 07:00")))
    assert mails(decide(quiet(NIGHT), rows, local("2026-05-07 07:00"))) == [(3,), (1, 2)]
    assert mails(decide(quiet(NIGHT), rows, local("2026-05-07 15:00"))) == [(3,), (1, 2)]


def test_what_the_night_found_waiting_comes_with_its_digest() -> None:
    """Held by a window when the quiet hours began: it was held by them, too."""
    config = quiet(NIGHT, cooldown_s=2 * HOUR)
    rows = [row(1, local("2026-05-06 21:50")), row(2, local("2026-05-06 23:00"), camera="cam2")]
    groups = {GROUP: local("2026-05-06 21:45")}
    assert mails(decide(config, rows, local("2026-05-06 23:50"), groups=groups)) == []
    assert mails(decide(config, rows, local("2026-05-07 07:00"), groups=groups)) == [(1, 2)]


def test_night_digest_opens_the_next_window() -> None:
    config, end = quiet(NIGHT, cooldown_s=HOUR), local("2026-05-07 07:00")
    held = row(1, end - 60)
    assert mails(decide(config, [held, row(2, end + 1)], end + 2)) == [(1, 2)]
    plan = decide(config, [row(2, end + 1)], end + 2, groups={GROUP: end})
    assert mails(plan) == [] and plan.wake == end + HOUR


def test_with_a_daily_limit_the_night_is_one_digest_too() -> None:
    """The last hour of it is no digest of its own: each mail counts."""
    end = local("2026-05-07 07:00")
    rows = [row(1, end - 8 * HOUR), row(2, end - 60, camera="cam2"), row(3, end, camera="cam3")]
    assert mails(decide(quiet(NIGHT, daily_max=20), rows, end)) == [(3,), (1, 2)]
    assert mails(decide(quiet(NIGHT, daily_max=20), rows[:2], end, times=[end - HOUR] * 9)) == [(1, 2)]


@pytest.mark.parametrize("event", ["DOOR_OPENED", "TAMPER_DETECTED", "CAMERA_DISCONNECTED", "CAMERA_RECONNECTED"])
def test_priority_alerts_break_the_night(event: str) -> None:
    night = local("2026-05-07 03:00")
    plan = decide(quiet(NIGHT), [row(1, night), row(2, night, event), row(3, night, "SYSTEM_RESTARTED")], night)
    assert mails(plan) == [(2,)] and plan.wake == local("2026-05-07 07:00")


def test_priority_is_a_matter_of_the_configuration() -> None:
    night = local("2026-05-07 03:00")
    config = quiet(NIGHT, priority=("MOTION_*",))
    assert mails(decide(config, [row(1, night), row(2, night, DOOR)], night)) == [(1,)]


def test_changed_quiet_hours_count_for_what_waits() -> None:
    rows = [row(1, local("2026-05-07 03:00")), row(2, local("2026-05-07 03:30"))]
    assert mails(decide(quiet("22:00-04:00"), rows, local("2026-05-07 05:00"))) == [(1, 2)]
    assert mails(decide(PLAIN, rows, local("2026-05-07 05:00"))) == [(1,), (2,)]


def test_clock_set_back_into_the_night_holds_and_forward_lets_go() -> None:
    rows = [row(1, local("2026-05-07 12:00"))]
    assert mails(decide(quiet(NIGHT), rows, local("2026-05-07 05:00"))) == []
    assert mails(decide(quiet(NIGHT), rows, local("2036-05-07 12:00"))) == [(1,)]


# the daily limit

FOUR = replace(PLAIN, daily_max=4)
TWENTY = replace(PLAIN, daily_max=20)


def many(number: int, start: float = NOW, event: str = MOTION, first: int = 1) -> list[PendingEntry]:
    return [row(first + n, start, event, f"c{n}") for n in range(number)]


BUDGET: list[tuple[str, server.RelayConfig, list[PendingEntry], dict[str, Any], list[tuple[int, ...]], float | None]] = [
    # what, configuration, waiting, sent, mails, wake (seconds from NOW)
    ("single mails until half are used", TWENTY, many(12), {}, [(n,) for n in range(1, 11)], DAY_S / 5),
    ("mails under way count", TWENTY, many(12), {"untried": 7}, [(1,), (2,), (3,)], DAY_S / 5),
    ("mails of 24 hours count", TWENTY, many(12), {"times": [NOW - HOUR] * 8}, [(1,), (2,)], 23 * HOUR / 5),
    ("older ones do not", TWENTY, many(3), {"times": [NOW - DAY_S] * 20}, [(1,), (2,), (3,)], None),
    ("half are used: digests only", TWENTY, many(3), {"times": [NOW - 1] * 10}, [], DAY_S / 5 - 1),
    ("the first digest", TWENTY, many(3, NOW - 9), {"times": [NOW - DAY_S / 5] * 10}, [(1, 2, 3)], None),
    ("the second digest, a fifth of the day later", TWENTY, many(3),
     {"times": [NOW - HOUR] * 10 + [NOW], "kinds": {"paced": NOW}}, [], (DAY_S - HOUR) / 4),
    ("half of the rest is not theirs", TWENTY, many(3, NOW - 9), {"times": [NOW - 23 * HOUR] * 15}, [], HOUR),
    ("priority alerts use what remains", TWENTY, many(7, event=DOOR), {"times": [NOW - HOUR] * 15},
     [(1,), (2,), (3,), (4,), (5,)], 23 * HOUR),
    ("priority alerts come through behind others", TWENTY, [*many(9), *many(1, event=DOOR, first=10)],
     {"times": [NOW - 1] * 10}, [(10,)], DAY_S / 5 - 1),
    ("a thousand priority alerts do not take fifty days", TWENTY, many(1000, NOW - 2 * HOUR, DOOR),
     {"times": [NOW - HOUR] * 19}, [tuple(range(1, 1001))], None),
    ("a late priority alert is one like any while half are left", TWENTY, many(2, NOW - 2 * HOUR, DOOR),
     {"times": [NOW - HOUR] * 8}, [(1,), (2,)], None),
    ("all are used: everything waits until the oldest is 24 hours old", FOUR, many(2, event=DOOR),
     {"times": [NOW - 20 * HOUR, NOW - 3, NOW - 2, NOW - 1]}, [], 4 * HOUR),
    ("the oldest is 24 hours old", FOUR, many(2, event=DOOR), {"times": [NOW - DAY_S, NOW - 3, NOW - 2, NOW - 1]},
     [(1,)], DAY_S - 3),
    ("a limit of one", replace(FOUR, daily_max=1), many(3), {}, [(1,)], DAY_S),
    ("a limit of one, the next day", replace(FOUR, daily_max=1), many(3, NOW - DAY_S), {}, [(1, 2, 3)], None),
    ("a limit of two keeps one for priority", replace(FOUR, daily_max=2), many(3), {"times": [NOW - 1]}, [], DAY_S - 1),
    ("a limit of two, for priority",
     replace(FOUR, daily_max=2), many(1, event=DOOR), {"times": [NOW - 1]}, [(1,)], None),
    ("what is an hour late comes as a digest", TWENTY, many(5, NOW - HOUR - 1), {}, [(1, 2, 3, 4, 5)], None),
    ("behind priority alerts nothing waits for more than a day", TWENTY,
     [*many(2, NOW - DAY_S - 1), *many(9, event=DOOR, first=10)], {"times": [NOW - HOUR] * 18},
     [(10,), (1, 2)], 23 * HOUR),
    ("times of a clock that was set back ten years",
     TWENTY, many(2), {"times": [NOW + 3.2e8] * 20}, [(1,), (2,)], None),
    ("times of a clock that was set back an hour", FOUR, many(2, event=DOOR), {"times": [NOW + HOUR] * 4}, [],
     DAY_S + HOUR),
    ("a summary is a mail like any for the limit", FOUR, [row(1, NOW, server.SUMMARY, "relay")],
     {"times": [NOW - HOUR] * 4}, [], 23 * HOUR),
    ("a summary is not put off for anything else", FOUR, [row(1, NOW, server.SUMMARY, "relay")],
     {"times": [NOW - HOUR] * 3}, [(1,)], None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "rows", "sent", "due", "wake"), [entry[1:] for entry in BUDGET], ids=[entry[0] for entry in BUDGET]
)
def test_daily_limit_of_the_table(
    config: server.RelayConfig,
    rows: list[PendingEntry],
    sent: dict[str, Any],
    due: list[tuple[int, ...]],
    wake: float | None,
) -> None:
    plan = decide(config, rows, NOW, **sent)
    assert mails(plan) == due
    assert plan.wake == (None if wake is None else pytest.approx(NOW + wake, abs=0.001))


def test_a_digest_that_uses_up_half_of_the_limit_holds_all_that_waits_for_it() -> None:
    config = replace(TWENTY, cooldown_s=60.0)
    rows = [row(number, NOW - 5, camera="yard") for number in range(2, 6)]
    sent = {"times": [NOW - HOUR] * 9, "groups": {(MOTION, "yard"): NOW - 60}}
    assert mails(decide(config, rows, NOW, **sent)) == [(2, 3, 4, 5)]


def test_a_daily_limit_does_not_cut_a_long_window_short() -> None:
    config = replace(TWENTY, cooldown_s=5 * HOUR)
    for event in (MOTION, DOOR):
        groups = {(event, "cam1"): NOW}
        assert decide(config, [row(1, NOW + 60, event)], NOW + 2 * HOUR, groups=groups).wake == NOW + 5 * HOUR
        assert mails(decide(config, [row(1, NOW + 60, event)], NOW + 5 * HOUR, groups=groups)) == [(1,)]


def test_digests_for_several_recipients_share_the_daily_limit() -> None:
    config = replace(TWENTY, routes=routes("c0=a@y.org; c1=b@y.org; c2=c@y.org"))
    times = [NOW - DAY_S / 5] * 10
    plan = decide(config, many(3, NOW - 9), NOW, times=times)
    assert mails(plan) == [(1,)] and plan.wake is not None  # the oldest; the others in turn


def test_summary_is_held_neither_by_the_night_nor_by_a_window() -> None:
    config, night = quiet(NIGHT, cooldown_s=2 * DAY_S), local("2026-05-07 03:00")
    rows = [row(1, night, server.SUMMARY, "relay")]
    assert mails(decide(config, rows, night, groups={(server.SUMMARY, "relay"): night - DAY_S})) == [(1,)]


# routes

ROUTED = replace(PLAIN, routes=routes("cam1,DOOR_*=a@x.org,b@y.org; garage*=c@z.org; cam*=d@z.org"))
ROUTES = [
    ((MOTION, "cam1"), ("a@x.org", "b@y.org")),
    ((DOOR, "attic"), ("a@x.org", "b@y.org")),
    ((DOOR, "garage2"), ("a@x.org", "b@y.org")),
    ((MOTION, "garage2"), ("c@z.org",)),
    ((MOTION, "cam2"), ("d@z.org",)),
    ((MOTION, "Garage2"), ("a@x.org",)),
    ((MOTION, "attic"), ("a@x.org",)),
]


@pytest.mark.parametrize(("group", "recipients"), ROUTES)
def test_first_route_that_matches_gives_the_recipients(group: tuple[str, str], recipients: tuple[str, ...]) -> None:
    (message,) = decide(ROUTED, [row(1, NOW, *group)], NOW).due
    assert message.recipients == recipients


def test_digest_holds_only_what_goes_to_the_same_people() -> None:
    night = local("2026-05-07 03:00")
    config = quiet(NIGHT, routes=ROUTED.routes)
    rows = [row(1, night), row(2, night, camera="garage1"), row(3, night, camera="cam2"), row(4, night)]
    plan = decide(config, rows, local("2026-05-07 07:00"))
    assert [(message.entries, message.recipients) for message in plan.due] == [
        ((1, 4), ("a@x.org", "b@y.org")),
        ((2,), ("c@z.org",)),
        ((3,), ("d@z.org",)),
    ]


def test_changed_route_counts_for_what_waits() -> None:
    (message,) = decide(replace(ROUTED, routes=routes("*=new@x.org")), [row(1, NOW - HOUR)], NOW).due
    assert message.recipients == ("new@x.org",)


def test_who_has_it_already_does_not_get_it_again() -> None:
    (message,) = decide(ROUTED, [row(1, NOW, served=["a@x.org"])], NOW).due
    assert message.recipients == ("b@y.org",)


# Recipients to whom nothing can go now

TWO = replace(PLAIN, recipients=("a@x.org", "b@y.org"))


def test_message_all_of_whose_recipients_are_paused_is_not_created() -> None:
    rows = [row(1, NOW), row(2, NOW)]
    assert decide(TWO, rows, NOW, paused=frozenset(TWO.recipients)) == Plan([], None, "")
    (first, second) = decide(TWO, rows, NOW, paused=frozenset({"a@x.org"})).due
    assert (first.recipients, second.recipients) == (TWO.recipients, TWO.recipients)
    assert decide(TWO, [row(1, NOW, served=["b@y.org"])], NOW, paused=frozenset({"a@x.org"})).due == []


def test_what_is_held_for_a_paused_recipient_holds_up_nobody_else() -> None:
    config = replace(PLAIN, routes=routes("cam1=c@z.org"))
    plan = decide(config, [row(1, NOW), row(2, NOW, camera="cam2")], NOW, paused=frozenset({"c@z.org"}))
    assert mails(plan) == [(2,)]


def test_entry_that_everybody_has_is_finished_though_all_are_paused() -> None:
    (message,) = decide(PLAIN, [row(1, NOW, served=["a@x.org"])], NOW, paused=frozenset({"a@x.org"})).due
    assert message.recipients == ()


OVERDUE = [
    # what, cooldown, waiting, seconds since NOW, mails
    ("what waited through an outage goes as one", 60.0,
     [row(1, NOW), row(2, NOW + 1, DOOR), row(3, NOW + 2, camera="cam2")], 3600, [(1, 2, 3)]),
    ("one alone is one alert", 60.0, [row(1, NOW)], 3600, [(1,)]),
    ("what has just come goes by itself", 60.0,
     [row(1, NOW), row(2, NOW + 1, DOOR), row(3, NOW + 3600, camera="cam2")], 3600, [(3,), (1, 2)]),
    ("without a cooldown each is a mail", 0.0, [row(1, NOW), row(2, NOW + 1)], 3600, [(1,), (2,)]),
    ("a short wait is no outage", 60.0, [row(1, NOW), row(2, NOW, DOOR)], 60, [(1,), (2,)]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("cooldown", "rows", "after", "due"), [entry[1:] for entry in OVERDUE], ids=[entry[0] for entry in OVERDUE]
)
def test_overdue_alerts_of_the_table(
    cooldown: float, rows: list[PendingEntry], after: float, due: list[tuple[int, ...]]
) -> None:
    assert mails(decide(replace(PLAIN, cooldown_s=cooldown), rows, NOW + after)) == due


# The daily limit counts deliveries: one a recipient

LIMITED = replace(TWO, daily_max=4)
DELIVERIES = [
    # waiting, what was sent, mails
    ([row(1, NOW), row(2, NOW)], {}, [(1,)]),  # two places; half are used then
    ([row(1, NOW, DOOR), row(2, NOW, DOOR), row(3, NOW, DOOR)], {}, [(1,), (2,)]),
    ([row(1, NOW, DOOR)], {"times": [NOW - 1] * 2}, [(1,)]),
    ([row(1, NOW, DOOR)], {"times": [NOW - 1] * 3}, []),  # One place is free, the alert needs two.
    ([row(1, NOW, DOOR)], {"times": [NOW - 1], "untried": 2}, []),
    ([row(1, NOW, DOOR, served=["a@x.org"])], {"times": [NOW - 1] * 3}, [(1,)]),
]


@pytest.mark.parametrize(("rows", "sent", "due"), DELIVERIES)
def test_daily_limit_counts_one_delivery_a_recipient(
    rows: list[PendingEntry], sent: dict[str, Any], due: list[tuple[int, ...]]
) -> None:
    assert mails(decide(LIMITED, rows, NOW, **sent)) == due


# Random schedules, with a courier that creates, sends, fails, retries and pauses recipients; the clock is ours


@dataclass
class Simulation:
    """What the courier does, on a virtual clock: look, create, send, finish."""

    config: server.RelayConfig
    chance: random.Random
    rows: list[PendingEntry] = field(default_factory=list)
    history: History = field(default_factory=lambda: History([]))
    now: float = NOW
    seen: int = 0
    wake: float = 0.0
    created: Counter[int] = field(default_factory=Counter)  # entry: the messages that it came in
    sent: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    attempts: list[tuple[float, int, bool]] = field(default_factory=list)  # when, a number, whether it was tried before
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def look(self) -> None:
        """Plan until nothing more is due; rows that are held are looked at again only when the plan said so."""
        for _ in range(10_000):
            if self.now >= self.wake:
                self.seen, self.wake = 0, math.inf
            rows = [waiting for waiting in self.rows if waiting.seq > self.seen]
            pulled = iter(rows)
            plan = server.plan(self.config, pulled, self.history, self.now, self.chance.choice([1, 4, 32]))
            rest = sum(1 for _ in pulled)
            self.seen = max([self.seen, *(waiting.seq for waiting in rows[: len(rows) - rest])])
            self.wake = min(self.wake, plan.wake or math.inf)
            for message in plan.due:
                self.create(message)
            if not plan.due and not rest:
                assert self.wake > self.now, f"waits for {plan.why!r} without an end: the courier would spin"
                return
        raise AssertionError("the plan never ends")

    def create(self, message: DueMessage) -> None:
        by_seq = {waiting.seq: waiting for waiting in self.rows}
        entries = [by_seq[seq] for seq in message.entries]
        assert message.groups == tuple(dict.fromkeys((entry.kind, entry.source) for entry in entries))
        assert not self.history.paused.issuperset(message.recipients)
        for entry in entries:
            assert server.route(self.config, entry.kind, entry.source) == message.recipients
            self.created[entry.seq] += 1
            self.delays.append(self.now - entry.arrived)
        self.rows = [waiting for waiting in self.rows if waiting.seq not in message.entries]
        self.history.groups.update(dict.fromkeys(message.groups, self.now))
        self.history.kinds[message.kind] = self.now
        for _ in message.recipients:
            self.history.untried += 1
            heapq.heappush(self.attempts, (self.now + self.chance.uniform(0.1, 9), next(self.numbers), False))

    def attempt(self) -> None:
        """A delivery is sent, fails for good, or is tried again later: then it needs a free place in the limit."""
        _, number, tried = heapq.heappop(self.attempts)
        limit, taken = self.config.daily_max, sum(when > self.now - DAY_S for when in self.history.times)
        if tried and limit and taken + self.history.untried >= limit:
            return heapq.heappush(self.attempts, (self.now + 600, number, True))
        self.history.untried -= not tried
        roll = self.chance.random()
        if roll < 0.1:
            heapq.heappush(self.attempts, (self.now + self.chance.uniform(5, 7 * HOUR), number, True))
        elif roll < 0.95:
            self.history.times = [*self.history.times, self.now]
            self.sent.append(self.now)
        self.wake = 0.0  # A place in the daily limit may be free.

    def run(self, arrivals: Sequence[tuple[float, str, str]]) -> None:
        """Arrivals as they come, then until nothing waits."""
        coming = deque(enumerate(sorted(arrivals), 1))
        resumes = math.inf
        for _ in range(100_000):
            moments = [self.wake, resumes, *([coming[0][1][0]] if coming else ()), *(when for when, *_ in self.attempts[:1])]
            if min(moments) == math.inf:
                break
            self.now = max(self.now, min(moments))
            while self.attempts and self.attempts[0][0] <= self.now:
                self.attempt()
            while coming and coming[0][1][0] <= self.now:
                seq, (when, event, camera) = coming.popleft()
                self.rows.append(row(seq, when, event, camera))
            if self.now >= resumes:
                self.history.paused, self.wake, resumes = frozenset(), 0.0, math.inf
            elif self.chance.random() < 0.02 and resumes == math.inf:
                self.history.paused = frozenset({self.chance.choice(("a@x.org", "c@z.org"))})
                resumes = self.now + self.chance.uniform(1, HOUR)
            self.look()
            if self.chance.random() < 0.02:  # A restart: what is remembered comes from the spool, of a day.
                self.seen, self.wake = 0, 0.0
                self.history.times = [when for when in self.sent if when > self.now - DAY_S]
        assert not self.rows, f"{len(self.rows)} alerts wait for ever"


def schedule(chance: random.Random) -> list[tuple[float, str, str]]:
    events = [MOTION, MOTION, MOTION, DOOR, "SYSTEM_RESTARTED", "CAMERA_DISCONNECTED"]
    days = chance.choice([0.02, 0.5, 2.0])
    bursts = [NOW + chance.uniform(0, days * DAY_S) for _ in range(6)]
    spread = [NOW + chance.uniform(0, days * DAY_S) for _ in range(chance.randint(0, 80))]
    burst = [chance.choice(bursts) + chance.expovariate(1 / 20) for _ in range(chance.randint(0, 150))]
    return [(when, chance.choice(events), f"cam{chance.randint(1, 4)}") for when in spread + burst]


@pytest.mark.parametrize("seed", range(60))
def test_each_alert_comes_in_exactly_one_mail_whatever_the_schedule(seed: int) -> None:
    chance = random.Random(seed)
    config = replace(
        PLAIN,
        cooldown_s=chance.choice([0.0, 5.0, 60.0, 5 * HOUR]),
        daily_max=chance.choice([0, 2, 3, 5, 20, 100]),
        quiet=chance.choice(
            [frozenset(), *map(server.quiet_rules, (NIGHT, "13:00-14:00; 14:00-14:30; Wed 00:00-24:00"))]
        ),
        routes=chance.choice([(), ROUTED.routes]),
    )
    arrivals = schedule(chance)
    run = Simulation(config, chance)
    run.run(arrivals)
    assert run.created == Counter(range(1, len(arrivals) + 1))
    if config.daily_max:
        run.sent.sort()
        for number, when in enumerate(run.sent):
            assert number + 1 - bisect.bisect_right(run.sent, when - DAY_S) <= config.daily_max
    else:
        assert max(run.delays, default=0.0) <= config.cooldown_s + 2 * DAY_S
