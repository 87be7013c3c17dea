"""Silence is an event, raised once; a relay that was away accuses nobody; and the daily mail comes once a day."""

import datetime as dt
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import server
import smtp_module as smtp

DAY_S = smtp.DAY_S
expectations = server.listed(",", server.expectation)


class Clock:
    """Both clocks of the machine, in our hands."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mono, self.wall = 1000.0, dt.datetime(2026, 5, 6, 12, 0).timestamp()
        monkeypatch.setattr(time, "monotonic", lambda: self.mono)
        monkeypatch.setattr(time, "time", lambda: self.wall)

    def run(self, seconds: float) -> None:
        self.mono += seconds
        self.wall += seconds


class Station:
    """A camera monitor and a daily summary on a spool; they can be restarted."""

    def __init__(self, folder: Path, clock: Clock, expect: str = "", summary_at: str = "") -> None:
        self.path, self.clock = folder / "alerts.db", clock
        self.config = replace(server.RelayConfig(), expect=expectations(expect) if expect else ())
        self.at = server.clock(summary_at) if summary_at else None
        self.seen = 0
        self.start()

    def start(self) -> None:
        self.outbox = smtp.Outbox(self.path, schema=server.CAMERA_SCHEMA)
        self.monitor = server.CameraMonitor(self.config, self.outbox)
        self.summary = server.DailySummary(self.at, self.clock.wall, self.outbox)

    def stop(self) -> None:
        self.outbox.close()

    def restart(self, away: float = 0.0) -> None:
        self.stop()
        self.clock.run(away)
        self.start()

    def wait(self, seconds: float, hearing: tuple[str, ...] = (), every: float = 1.0) -> list[dict[str, Any]]:
        """Tick every second; the alerts that were raised."""
        for second in range(int(seconds)):
            self.clock.run(1.0)
            for camera in hearing if second % every == 0 else ():
                self.monitor.heard(camera)
            self.monitor.tick(self.clock.mono, self.clock.wall)
            self.summary.tick(self.clock.wall, self.monitor.silent())
        return self.raised()

    def raised(self) -> list[dict[str, Any]]:
        """What was put into the spool since the last look."""
        rows = self.outbox.rows("SELECT payload, id FROM entries ORDER BY seq")
        fresh, self.seen = rows[self.seen :], len(rows)
        return [{**json.loads(payload), "id": name} for payload, name in fresh]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield Clock(monkeypatch)
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def station(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., Station]]:
    made: list[Station] = []

    def make(expect: str = "", summary_at: str = "") -> Station:
        made.append(Station(tmp_path, clock, expect, summary_at))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def names(raised: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(alert["event"], alert["camera"]) for alert in raised]


GONE, BACK = "CAMERA_DISCONNECTED", "CAMERA_RECONNECTED"


def test_silent_camera_is_raised_once(station: Callable[..., Station]) -> None:
    here = station("cam1=5m")
    here.monitor.heard("cam1")
    assert here.wait(300) == []
    assert names(here.wait(1)) == [(GONE, "cam1")]
    assert here.wait(900) == [] and here.monitor.silent() == ["cam1"]


def test_alert_of_silence_says_when_the_camera_was_last_seen(station: Callable[..., Station]) -> None:
    here = station("cam1=1m")
    here.monitor.heard("cam1")
    last = smtp.iso(here.clock.wall)
    (alert,) = here.wait(100)
    assert alert["last_seen"] == last and alert["id"].startswith("relay-")


def test_return_is_raised_once_with_the_time_that_it_was_gone(station: Callable[..., Station]) -> None:
    here = station("cam1=5m")
    here.monitor.heard("cam1")
    here.wait(1000)
    here.monitor.heard("cam1")
    (alert,) = here.wait(1)
    assert (alert["event"], alert["camera"], alert["gone_s"]) == (BACK, "cam1", 1000)
    assert here.wait(200) == [] and here.monitor.silent() == []


def test_camera_that_falls_silent_again_is_raised_again(station: Callable[..., Station]) -> None:
    here = station("cam1=1m")
    for _ in range(3):
        here.monitor.heard("cam1")
        assert names(here.wait(61))[-1:] == [(GONE, "cam1")]


def test_signs_of_life_keep_a_camera_alive(station: Callable[..., Station]) -> None:
    here = station("cam1=1m,cam2=1m")
    assert names(here.wait(600, hearing=("cam1",), every=50)) == [(GONE, "cam2")]


def test_recorders_word_that_the_camera_is_gone_is_no_sign_of_life(station: Callable[..., Station]) -> None:
    here = station("cam1=1m")
    here.monitor.heard("cam1", "MOTION_DETECTED")
    here.wait(40)
    here.monitor.heard("cam1", GONE)
    assert names(here.wait(30)) == [(GONE, "cam1")]


LIMITS = [
    # ALERT_EXPECT, camera, whether it is missed after 6 minutes, after 11, after an hour
    ("cam1=5m,garage=1h,*=10m", "cam1", (True, True, True)),
    ("cam1=5m,garage=1h,*=10m", "garage", (False, False, True)),
    ("cam1=5m,garage=1h,*=10m", "باغ", (False, True, True)),
    ("*=10m,cam1=5m", "cam1", (True, True, True)),
    ("*=10m,garage=1h", "garage", (False, False, True)),
    ("cam?=5m", "cam1", (True, True, True)),
    ("cam?=5m", "garage", (False, False, False)),
    ("cam[1]=5m", "cam[1]", (True, True, True)),
    ("cam1=5m", "Cam1", (False, False, False)),
    ("", "cam1", (False, False, False)),
]


@pytest.mark.parametrize(("expect", "camera", "missed"), LIMITS)
def test_limit_of_the_table(
    station: Callable[..., Station], expect: str, camera: str, missed: tuple[bool, bool, bool]
) -> None:
    here = station(expect)
    here.monitor.heard(camera)
    found = []
    for seconds in (360, 300, 2941):
        here.wait(seconds)
        found.append(camera in here.monitor.silent())
    assert tuple(found) == missed


def test_named_camera_that_never_came_is_missed_and_one_of_a_pattern_is_not(station: Callable[..., Station]) -> None:
    assert names(station("cam1=1m,c*=1m,*=1m").wait(70)) == [(GONE, "cam1")]


def test_silence_is_remembered_over_a_restart(station: Callable[..., Station]) -> None:
    here = station("cam1=1m")
    here.monitor.heard("cam1")
    assert names(here.wait(100)) == [(GONE, "cam1")]
    here.restart(away=500)
    assert here.monitor.silent() == ["cam1"]
    assert here.wait(200) == []
    here.monitor.heard("cam1")
    (alert,) = here.wait(1)
    assert (alert["event"], alert["gone_s"]) == (BACK, 800)


def test_return_that_was_not_yet_written_down_is_raised_after_the_restart(station: Callable[..., Station]) -> None:
    here = station("cam1=1m")
    here.monitor.heard("cam1")
    here.wait(100)
    here.monitor.heard("cam1")  # and now the power fails
    here.restart()
    here.monitor.heard("cam1")
    assert names(here.wait(1)) == [(BACK, "cam1")]


def test_relay_that_was_itself_down_accuses_nobody(station: Callable[..., Station]) -> None:
    here = station("cam1=5m,*=5m")
    here.wait(60, hearing=("cam1", "cam2"))
    here.restart(away=7200)
    assert here.wait(299) == []
    assert sorted(names(here.wait(2))) == [(GONE, "cam1"), (GONE, "cam2")]


def test_relay_that_was_stopped_for_a_while_accuses_nobody(station: Callable[..., Station]) -> None:
    """SIGSTOP and SIGCONT, or a laptop that slept: nobody could be heard meanwhile."""
    here = station("*=5m")
    here.wait(100, hearing=("cam1",), every=100)
    here.clock.run(7200)
    assert here.wait(150) == []
    assert names(here.wait(120)) == [(GONE, "cam1")]


@pytest.mark.parametrize("step", [-3600.0, 3600.0, 3.2e8, -3.2e8])
def test_clock_step_accuses_nobody_and_hides_nobody(station: Callable[..., Station], step: float) -> None:
    here = station("cam1=5m")
    here.monitor.heard("cam1")
    here.clock.wall += step
    assert here.wait(299) == []
    assert names(here.wait(5)) == [(GONE, "cam1")]
    here.monitor.heard("cam1")
    (alert,) = here.wait(1)
    assert alert["gone_s"] >= 0


def test_alert_and_the_fact_that_it_was_raised_are_one_transaction(
    station: Callable[..., Station], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = station("cam1=1m")
    here.monitor.heard("cam1")
    here.wait(60)
    here.clock.run(2)

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(here.outbox, "add", fail)
        with pytest.raises(smtp.SpoolError):
            here.monitor.tick(here.clock.mono, here.clock.wall)
    assert here.raised() == [] and here.monitor.silent() == []
    assert names(here.wait(1)) == [(GONE, "cam1")]  # the next tick does it
    here.restart()
    assert here.wait(300) == []


def test_cameras_are_bounded(station: Callable[..., Station], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CAMERAS_MAX", 10)
    here = station("*=1m")
    for number in range(100):
        here.monitor.heard(f"cam{number}")
    assert len(here.wait(70)) == 10
    for number in range(100):
        here.monitor.heard(f"cam{number}")
    assert [event for event, _ in names(here.wait(1))] == [BACK] * 10


def test_camera_that_is_expected_no_more_is_forgotten(station: Callable[..., Station]) -> None:
    here = station("cam1=1m")
    here.wait(100)
    assert here.monitor.silent() == ["cam1"]
    here.config = replace(here.config, expect=expectations("cam2=1h"))
    here.restart()
    assert here.monitor.silent() == []


def test_watched_camera_costs_no_transaction_a_tick(station: Callable[..., Station]) -> None:
    here = station("*=1h")
    statements: list[str] = []
    here.wait(10, hearing=("cam1",))
    here.outbox._db.set_trace_callback(statements.append)
    here.wait(20, hearing=("cam1",))
    assert sum(statement.startswith("COMMIT") for statement in statements) <= 6


# the daily mail


def at(text: str) -> float:
    return dt.datetime.fromisoformat(text).timestamp()


def daily(here: Station, *moments: str) -> list[str]:
    """Look at the calendar at these moments; the days of the mails that were written."""
    days = []
    for moment in moments:
        here.clock.wall = at(moment)
        if here.summary.tick(here.clock.wall, here.monitor.silent()):
            days.append(here.outbox.status()["summary"])
    assert [alert["event"] for alert in here.raised()] == [server.SUMMARY] * len(days)
    return days


def test_daily_mail_comes_once_a_day_at_its_hour(station: Callable[..., Station]) -> None:
    here = station(summary_at="18:00")
    assert daily(here, "2026-05-06 12:01", "2026-05-06 17:59:59") == []
    assert daily(here, "2026-05-06 18:00", "2026-05-06 18:00:01", "2026-05-06 23:59") == ["2026-05-06"]
    assert daily(here, "2026-05-07 00:01", "2026-05-07 17:59") == []
    assert daily(here, "2026-05-07 18:00:01", "2026-05-07 18:01") == ["2026-05-07"]


def test_daily_mail_does_not_come_for_the_day_before_the_relay_was_there(station: Callable[..., Station]) -> None:
    here = station(summary_at="08:00")
    assert daily(here, "2026-05-06 12:01", "2026-05-06 23:59", "2026-05-07 07:59") == []
    assert daily(here, "2026-05-07 08:00") == ["2026-05-07"]


def test_daily_mail_comes_never_twice_also_not_after_a_restart(station: Callable[..., Station]) -> None:
    here = station(summary_at="18:00")
    assert daily(here, "2026-05-06 18:00") == ["2026-05-06"]
    here.restart(away=60)
    assert daily(here, "2026-05-06 18:05", "2026-05-06 23:00") == []


def test_daily_mail_comes_late_where_the_relay_was_off_at_the_hour(station: Callable[..., Station]) -> None:
    here = station(summary_at="18:00")
    assert daily(here, "2026-05-06 18:00") == ["2026-05-06"]
    here.restart(away=2 * DAY_S)
    assert daily(here, "2026-05-08 21:00") == ["2026-05-08"]
    assert daily(here, "2026-05-09 18:00") == ["2026-05-09"]


def test_late_daily_mail_does_not_cost_that_of_the_next_day(station: Callable[..., Station]) -> None:
    here = station(summary_at="23:30")
    assert daily(here, "2026-05-06 23:30") == ["2026-05-06"]
    here.restart()
    assert daily(here, "2026-05-08 00:10") == ["2026-05-07"]
    here.restart()
    assert daily(here, "2026-05-08 23:30") == ["2026-05-08"]


@pytest.mark.parametrize("hour", ["02:30", "00:00", "03:00"])
@pytest.mark.parametrize("start", ["2026-03-28 12:00", "2026-10-24 12:00"])
def test_daily_mail_survives_the_change_of_the_clocks(station: Callable[..., Station], start: str, hour: str) -> None:
    here = station(summary_at=hour)
    here.clock.wall = at(start)
    here.restart()
    days = []
    for _ in range(4 * 48):
        here.clock.run(1800)
        if here.summary.tick(here.clock.wall, []):
            days.append(here.outbox.status()["summary"])
    assert len(here.raised()) == len(set(days)) == len(days) == 4


def test_clock_set_back_an_hour_writes_no_second_mail(station: Callable[..., Station]) -> None:
    here = station(summary_at="18:00")
    assert daily(here, "2026-05-06 18:00", "2026-05-06 17:00", "2026-05-06 18:00") == ["2026-05-06"]


def test_clock_that_was_years_ahead_does_not_silence_the_daily_mail_for_years(station: Callable[..., Station]) -> None:
    here = station(summary_at="18:00")
    assert daily(here, "2036-05-06 18:00") == ["2036-05-06"]
    assert daily(here, "2026-05-07 12:00", "2026-05-07 18:00", "2026-05-08 18:00") == [
        "2026-05-07",
        "2026-05-08",
    ]


def test_daily_mail_whose_commit_failed_comes_with_the_next_tick(
    station: Callable[..., Station], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    here = station(summary_at="18:00")
    with monkeypatch.context() as patch:
        patch.setattr(here.outbox, "store_status", fail)
        with pytest.raises(smtp.SpoolError):
            daily(here, "2026-05-06 18:00")
    assert here.raised() == []
    assert daily(here, "2026-05-06 18:01", "2026-05-06 18:02") == ["2026-05-06"]


def test_without_an_hour_there_is_no_daily_mail(station: Callable[..., Station]) -> None:
    assert daily(station(), "2026-05-06 12:01", "2026-05-07 12:01") == []


def test_daily_mail_counts_what_was_received_waits_failed_and_is_silent(station: Callable[..., Station]) -> None:
    here = station("cam9=1m", summary_at="18:00")
    here.clock.wall = at("2026-05-06 15:00")
    here.wait(70)
    for number in range(5):
        content = json.dumps({"event": "MOTION_DETECTED", "camera": "باغ"}).encode()
        here.outbox.put([smtp.NewEntry(f"i{number}", "MOTION_DETECTED", "باغ", content, None, here.clock.wall)])
    old = json.dumps({"event": "DOOR_OPENED", "camera": "c"}).encode()
    here.outbox.put([smtp.NewEntry("old", "DOOR_OPENED", "c", old, None, here.clock.wall - 2 * DAY_S)])
    here.raised()
    here.clock.wall = at("2026-05-06 18:00")
    here.summary.tick(here.clock.wall, here.monitor.silent())
    (alert,) = here.raised()
    assert alert["event"] == server.SUMMARY
    assert alert["meta"]["received"] == 6 and alert["meta"]["queued"] == 7 and alert["meta"]["failed"] == 0
    assert alert["meta"]["groups"] == [["MOTION_DETECTED", "باغ", 5], ["CAMERA_DISCONNECTED", "cam9", 1]]
    assert alert["meta"]["silent"] == ["cam9"]


def test_client_cannot_write_the_daily_mail() -> None:
    with pytest.raises(server.Refusal):
        server.parse_line(json.dumps({"event": server.SUMMARY, "camera": "c"}).encode(), b"", 0.0)


def test_a_camera_seen_only_just_before_a_restart_is_still_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    station = Station(tmp_path, Clock(monkeypatch), "*=10s")
    station.monitor.heard("new")
    station.wait(1)
    station.monitor.heard("newer")
    station.monitor.tick(station.clock.mono, station.clock.wall, last=True)
    station.restart()
    assert {alert["camera"] for alert in station.wait(15)} == {"new", "newer"}
    station.stop()
