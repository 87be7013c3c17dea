"""The plan is pure: what waits, what was sent, the configuration and the time in; the mails that are due out."""

import bisect
import datetime as dt
import heapq
import itertools
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

import server
from smtp_module import DAY_S, Draft, History, Plan, Waiting

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


def row(seq: int, arrived: float, event: str = MOTION, camera: str = "cam1", taken: Sequence[str] = ()) -> Waiting:
    return Waiting(seq, f"id{seq}", f"{event} {camera}", arrived, frozenset(taken))


def decide(config: server.RelayConfig, rows: Sequence[Waiting], now: float, most: int = 1000, **sent: Any) -> Plan:
    times = deque(sent.pop("times", ()))
    return server.plan(config, iter(rows), History(times, **sent), now, most)


def mails(plan: Plan) -> list[tuple[int, ...]]:
    return [draft.items for draft in plan.drafts]


def test_without_any_rule_each_alert_is_a_mail_oldest_first() -> None:
    plan = decide(PLAIN, [row(1, NOW - 5), row(2, NOW - 4), row(3, NOW)], NOW)
    assert mails(plan) == [(1,), (2,), (3,)] and plan.wake is None
    assert plan.drafts[0] == Draft((1,), ("a@x.org",), "alert", (f"{MOTION} cam1",))


def test_nothing_waits_and_nothing_is_due() -> None:
    assert decide(PLAIN, [], NOW) == Plan([], None, "")


def test_plan_pulls_no_more_rows_than_it_needs() -> None:
    rows = (row(seq, NOW) for seq in itertools.count(1))
    plan = server.plan(PLAIN, rows, History(), NOW, 32)
    assert len(plan.drafts) == 32 and next(rows).seq == 33


# cooldown: the first at once, those of the next N seconds as one digest, which opens the next window

COOL = replace(PLAIN, cooldown_s=60.0)
LANE, OTHER = f"{MOTION} cam1", f"{MOTION} cam2"

WINDOWS: list[tuple[str, list[Waiting], dict[str, float], float, list[tuple[int, ...]], float | None]] = [
    # what, waiting, when mails of the lanes last began, seconds since NOW, mails, wake
    ("the first goes at once", [row(1, NOW)], {}, 0, [(1,)], None),
    ("the others of a burst wait", [row(1, NOW), row(2, NOW), row(3, NOW)], {}, 0, [(1,)], 60),
    ("in the window they wait", [row(2, NOW + 1), row(3, NOW + 59)], {LANE: NOW}, 59.9, [], 60),
    ("at its end they come as one", [row(2, NOW + 1), row(3, NOW + 59)], {LANE: NOW}, 60, [(2, 3)], None),
    ("one alone in the window comes at its end", [row(2, NOW + 1)], {LANE: NOW}, 60, [(2,)], None),
    ("a window in which nothing came is closed", [row(2, NOW + 60)], {LANE: NOW}, 60, [(2,)], None),
    ("the digest opens the next window", [row(4, NOW + 61)], {LANE: NOW + 60}, 61, [], 120),
    ("what came between its end and the digest is in it", [row(2, NOW + 1), row(3, NOW + 70)], {LANE: NOW}, 75,
     [(2, 3)], None),
    ("another camera has its own window",
     [row(2, NOW + 1), row(3, NOW + 2, camera="cam2")], {LANE: NOW}, 3, [(3,)], 60),
    ("another event has its own window", [row(2, NOW + 1), row(3, NOW + 2, DOOR)], {LANE: NOW}, 3, [(3,)], 60),
    ("two windows end at once", [row(2, NOW + 1), row(3, NOW + 2, camera="cam2"), row(4, NOW + 3)],
     {LANE: NOW, OTHER: NOW}, 60, [(2, 4), (3,)], None),
    ("the next wake is the first end", [row(2, NOW + 1), row(3, NOW + 2, camera="cam2")],
     {LANE: NOW, OTHER: NOW - 30}, 5, [], 30),
    ("priority does not break a window", [row(2, NOW + 1, DOOR)], {f"{DOOR} cam1": NOW}, 2, [], 60),
    ("an alert from before the window", [row(2, NOW - 500)], {LANE: NOW}, 60, [(2,)], None),
    ("the clock was set back an hour", [row(2, NOW + 1)], {LANE: NOW + 3600}, 1, [(2,)], None),
    ("an alert from before the clock was set back", [row(2, NOW + 3600)], {}, 0, [(2,)], None),
    ("the clock went on ten years", [row(2, NOW + 1), row(3, NOW + 2)], {LANE: NOW}, 3.2e8, [(2, 3)], None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "lanes", "after", "due", "wake"), [entry[1:] for entry in WINDOWS], ids=[entry[0] for entry in WINDOWS]
)
def test_window_of_the_table(
    rows: list[Waiting], lanes: dict[str, float], after: float, due: list[tuple[int, ...]], wake: float | None
) -> None:
    plan = decide(COOL, rows, NOW + after, lanes=lanes)
    assert mails(plan) == due
    assert plan.wake == (None if wake is None else NOW + wake)
    assert (plan.why == "cooldown") == (wake is not None)


def test_digest_says_which_lanes_it_closes_and_what_it_is() -> None:
    plan = decide(COOL, [row(2, NOW + 1), row(3, NOW + 2)], NOW + 60, lanes={LANE: NOW})
    assert plan.drafts == [Draft((2, 3), ("a@x.org",), "digest", (LANE,))]


def test_restart_inside_a_window_changes_nothing() -> None:
    """No plan is stored: what was sent is read back from the spool, so the answer is the same."""
    rows = [row(2, NOW + 1), row(3, NOW + 30)]
    before = decide(COOL, rows[:1], NOW + 20, lanes={LANE: NOW}, kinds={"alert": NOW}, times=[NOW])
    after = decide(COOL, rows, NOW + 40, lanes={LANE: NOW})
    assert before == replace(after) and after.wake == NOW + 60


def test_changed_cooldown_counts_for_what_waits() -> None:
    rows = [row(2, NOW + 1), row(3, NOW + 2)]
    assert mails(decide(COOL, rows, NOW + 10, lanes={LANE: NOW})) == []
    assert mails(decide(replace(COOL, cooldown_s=5.0), rows, NOW + 10, lanes={LANE: NOW})) == [(2, 3)]
    assert mails(decide(PLAIN, rows, NOW + 10, lanes={LANE: NOW})) == [(2,), (3,)]


def test_large_digest_is_cut_in_bounded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "DIGEST_MAX", 100)
    rows = [row(seq, NOW + 1) for seq in range(2, 252)]
    plan = decide(COOL, rows, NOW + 60, lanes={LANE: NOW})
    assert [len(items) for items in mails(plan)] == [100, 100, 50]
    assert sorted(itertools.chain(*mails(plan))) == list(range(2, 252))


def test_digest_is_not_made_before_all_rows_were_seen() -> None:
    """Looking stops at `most` mails: a digest made then would miss what comes behind."""
    rows = [row(2, NOW + 1), *(row(seq, NOW + 2, camera=f"c{seq}") for seq in range(3, 8)), row(9, NOW + 3)]
    plan = decide(COOL, rows, NOW + 60, most=3, lanes={LANE: NOW})
    assert mails(plan) == [(3,), (4,), (5,)] and plan.wake == NOW + 60
    assert mails(decide(COOL, [rows[0], *rows[4:]], NOW + 60, most=3, lanes={LANE: NOW})) == [(6,), (7,), (2, 9)]


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
    lanes = {LANE: local("2026-05-06 21:45")}
    assert mails(decide(config, rows, local("2026-05-06 23:50"), lanes=lanes)) == []
    assert mails(decide(config, rows, local("2026-05-07 07:00"), lanes=lanes)) == [(1, 2)]


def test_night_digest_opens_the_next_window() -> None:
    config, end = quiet(NIGHT, cooldown_s=HOUR), local("2026-05-07 07:00")
    held = row(1, end - 60)
    assert mails(decide(config, [held, row(2, end + 1)], end + 2)) == [(1, 2)]
    plan = decide(config, [row(2, end + 1)], end + 2, lanes={LANE: end})
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


def many(number: int, start: float = NOW, event: str = MOTION, first: int = 1) -> list[Waiting]:
    return [row(first + n, start, event, f"c{n}") for n in range(number)]


BUDGET: list[tuple[str, server.RelayConfig, list[Waiting], dict[str, Any], list[tuple[int, ...]], float | None]] = [
    # what, configuration, waiting, sent, mails, wake (seconds from NOW)
    ("single mails until half are used", TWENTY, many(12), {}, [(n,) for n in range(1, 11)], DAY_S / 5),
    ("mails under way count", TWENTY, many(12), {"pending": 7}, [(1,), (2,), (3,)], DAY_S / 5),
    ("mails of 24 hours count", TWENTY, many(12), {"times": [NOW - HOUR] * 8}, [(1,), (2,)], 23 * HOUR / 5),
    ("older ones do not", TWENTY, many(3), {"times": [NOW - DAY_S] * 20}, [(1,), (2,), (3,)], None),
    ("half are used: digests only", TWENTY, many(3), {"times": [NOW - 1] * 10}, [], DAY_S / 5 - 1),
    ("the first digest", TWENTY, many(3, NOW - 9), {"times": [NOW - DAY_S / 5] * 10}, [(1, 2, 3)], None),
    ("the second digest, a fifth of the day later", TWENTY, many(3),
     {"times": [NOW - HOUR] * 10 + [NOW], "kinds": {"spread": NOW}}, [], (DAY_S - HOUR) / 4),
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
    rows: list[Waiting],
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
    sent = {"times": [NOW - HOUR] * 9, "lanes": {f"{MOTION} yard": NOW - 60}}
    assert mails(decide(config, rows, NOW, **sent)) == [(2, 3, 4, 5)]


def test_a_daily_limit_does_not_cut_a_long_window_short() -> None:
    config = replace(TWENTY, cooldown_s=5 * HOUR)
    for event in (MOTION, DOOR):
        lanes = {f"{event} cam1": NOW}
        assert decide(config, [row(1, NOW + 60, event)], NOW + 2 * HOUR, lanes=lanes).wake == NOW + 5 * HOUR
        assert mails(decide(config, [row(1, NOW + 60, event)], NOW + 5 * HOUR, lanes=lanes)) == [(1,)]


def test_digests_for_several_recipients_share_the_daily_limit() -> None:
    config = replace(TWENTY, routes=routes("c0=a@y.org; c1=b@y.org; c2=c@y.org"))
    times = [NOW - DAY_S / 5] * 10
    plan = decide(config, many(3, NOW - 9), NOW, times=times)
    assert mails(plan) == [(1,)] and plan.wake is not None  # the oldest; the others in turn


def test_summary_is_held_neither_by_the_night_nor_by_a_window() -> None:
    config, night = quiet(NIGHT, cooldown_s=2 * DAY_S), local("2026-05-07 03:00")
    rows = [row(1, night, server.SUMMARY, "relay")]
    assert mails(decide(config, rows, night, lanes={f"{server.SUMMARY} relay": night - DAY_S})) == [(1,)]


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


@pytest.mark.parametrize(("lane", "recipients"), ROUTES)
def test_first_route_that_matches_gives_the_recipients(lane: tuple[str, str], recipients: tuple[str, ...]) -> None:
    (draft,) = decide(ROUTED, [row(1, NOW, *lane)], NOW).drafts
    assert draft.recipients == recipients


def test_digest_holds_only_what_goes_to_the_same_people() -> None:
    night = local("2026-05-07 03:00")
    config = quiet(NIGHT, routes=ROUTED.routes)
    rows = [row(1, night), row(2, night, camera="garage1"), row(3, night, camera="cam2"), row(4, night)]
    plan = decide(config, rows, local("2026-05-07 07:00"))
    assert [(draft.items, draft.recipients) for draft in plan.drafts] == [
        ((1, 4), ("a@x.org", "b@y.org")),
        ((2,), ("c@z.org",)),
        ((3,), ("d@z.org",)),
    ]


def test_changed_route_counts_for_what_waits() -> None:
    (draft,) = decide(replace(ROUTED, routes=routes("*=new@x.org")), [row(1, NOW - HOUR)], NOW).drafts
    assert draft.recipients == ("new@x.org",)


def test_who_has_it_already_does_not_get_it_again() -> None:
    (draft,) = decide(ROUTED, [row(1, NOW, taken=["a@x.org"])], NOW).drafts
    assert draft.recipients == ("b@y.org",)


def test_camera_with_spaces_keeps_its_name_in_the_lane() -> None:
    alerts = server.Alerts(replace(PLAIN, routes=routes("back door 2=b@y.org")))
    assert alerts.recipients("MOTION_DETECTED back door 2") == ("b@y.org",)


# random schedules, with a courier that freezes, sends, is away, and is refused; the clock is ours


@dataclass
class Simulation:
    """What the courier does, on a virtual clock: look, freeze, send, settle."""

    config: server.RelayConfig
    chance: random.Random
    rows: list[Waiting] = field(default_factory=list)
    history: History = field(default_factory=History)
    now: float = NOW
    seen: int = 0
    wake: float = 0.0
    carried: dict[int, list[tuple[str, ...]]] = field(default_factory=dict)  # seq -> the mails that it came in
    sent: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    under_way: list[tuple[float, int]] = field(default_factory=list)

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
            for draft in plan.drafts:
                self.freeze(draft)
            if not plan.drafts and not rest:
                assert self.wake > self.now, f"waits for {plan.why!r} without an end: the courier would spin"
                return
        raise AssertionError("the plan never ends")

    def freeze(self, draft: Draft) -> None:
        by_seq = {waiting.seq: waiting for waiting in self.rows}
        lanes = tuple(dict.fromkeys(by_seq[seq].lane for seq in draft.items))
        assert draft.lanes == lanes
        for seq in draft.items:
            assert server.route(self.config, *by_seq[seq].lane.split(" ", 1)) == draft.recipients
            self.carried.setdefault(seq, []).append(draft.recipients)
            self.delays.append(self.now - by_seq[seq].arrived)
        self.rows = [waiting for waiting in self.rows if waiting.seq not in draft.items]
        self.history.lanes.update(dict.fromkeys(lanes, self.now))
        self.history.kinds[draft.kind] = self.now
        self.history.pending += 1
        retried = self.chance.random() < 0.1
        taking = self.chance.uniform(0.1, 7 * HOUR if retried else 9)
        heapq.heappush(self.under_way, (self.now + taking, draft.items[0]))

    def settle(self) -> None:
        heapq.heappop(self.under_way)
        self.history.pending -= 1
        if self.chance.random() < 0.95:
            self.history.times.append(self.now)
            self.sent.append(self.now)
        else:
            self.wake = 0.0  # it was refused for good: its place in the daily limit is free

    def run(self, arrivals: Sequence[tuple[float, str]]) -> None:
        """Arrivals as they come, then until nothing waits."""
        coming = deque(enumerate(sorted(arrivals), 1))
        for _ in range(100_000):
            moments = [when for when in (self.wake, *([coming[0][1][0]] if coming else ())) if when < math.inf]
            moments += [self.under_way[0][0]] if self.under_way else []
            if not moments:
                break
            self.now = max(self.now, min(moments))
            while self.under_way and self.under_way[0][0] <= self.now:
                self.settle()
            while coming and coming[0][1][0] <= self.now:
                seq, (when, lane) = coming.popleft()
                self.rows.append(Waiting(seq, f"id{seq}", lane, when))
            self.look()
            if self.chance.random() < 0.02:  # a restart: what is remembered comes from the spool, of a day
                self.seen, self.wake = 0, 0.0
                self.history.times = deque(when for when in self.sent if when > self.now - DAY_S)
        assert not self.rows, f"{len(self.rows)} alerts wait for ever"


def schedule(chance: random.Random) -> list[tuple[float, str]]:
    events = [MOTION, MOTION, MOTION, DOOR, "SYSTEM_RESTARTED", "CAMERA_DISCONNECTED"]
    days = chance.choice([0.02, 0.5, 2.0])
    bursts = [NOW + chance.uniform(0, days * DAY_S) for _ in range(6)]
    spread = [NOW + chance.uniform(0, days * DAY_S) for _ in range(chance.randint(0, 80))]
    burst = [chance.choice(bursts) + chance.expovariate(1 / 20) for _ in range(chance.randint(0, 150))]
    return [(when, f"{chance.choice(events)} cam{chance.randint(1, 4)}") for when in spread + burst]


@pytest.mark.parametrize("seed", range(60))
def test_each_alert_comes_in_exactly_one_mail_whatever_the_schedule(seed: int) -> None:
    chance = random.Random(seed)
    config = replace(
        PLAIN,
        cooldown_s=chance.choice([0.0, 5.0, 60.0, 5 * HOUR]),
        daily_max=chance.choice([0, 1, 2, 3, 5, 20, 100]),
        quiet=chance.choice(
            [frozenset(), *map(server.quiet_rules, (NIGHT, "13:00-14:00; 14:00-14:30; Wed 00:00-24:00"))]
        ),
        routes=chance.choice([(), ROUTED.routes]),
    )
    arrivals = schedule(chance)
    run = Simulation(config, chance)
    run.run(arrivals)
    assert sorted(run.carried) == list(range(1, len(arrivals) + 1))
    assert all(len(times) == 1 for times in run.carried.values())
    if config.daily_max:
        run.sent.sort()
        for number, when in enumerate(run.sent):
            assert number + 1 - bisect.bisect_right(run.sent, when - DAY_S) <= config.daily_max
    else:
        assert max(run.delays, default=0.0) <= config.cooldown_s + 2 * DAY_S
