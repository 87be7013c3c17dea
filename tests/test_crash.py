"""Nothing acknowledged is ever lost: short forms of tests/bench/, with real processes that are really killed."""

import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import faults
import harness
import mutants
import nemesis
import powerloss

RUN = harness.Run(harness.ROOT, seed=1, short=True)


def prove(row):
    try:
        row(RUN)
    except harness.Skipped as reason:
        pytest.skip(str(reason))


needs_strace = pytest.mark.skipif(not harness.STRACE, reason="strace is missing")


def test_nothing_is_lost_when_the_relay_is_killed_over_and_over_and_the_mail_server_fails():
    nemesis.run(RUN.product, seed=4, kills=6, acked=300)


@needs_strace
def test_what_is_acknowledged_survives_a_power_cut_at_that_instant():
    found = powerloss.replay(RUN.product, seed=1, points=50, torn=1)
    assert (found.points, found.bad_points) == (50, 0), found


@needs_strace
@pytest.mark.parametrize("broken", powerloss.CONTROLS)
def test_the_power_cut_test_notices_a_relay_that_breaks_its_promise(broken):
    try:
        assert powerloss.control(RUN.product, powerloss.CONTROLS[broken], seed=1, points=100).bad_points
    except harness.Red:
        pass  # The relay that came back on such a disk did what it must not.


def test_a_mail_cut_off_after_the_dot_is_sent_again_with_the_same_message_id():
    prove(faults.killed_after_the_dot)


def test_an_event_sent_again_is_a_duplicate_also_after_a_restart():
    prove(faults.sent_twice)


def test_sigterm_at_any_time_exits_0_and_loses_nothing():
    prove(faults.term_at_once)


def test_a_second_relay_on_the_same_spool_exits_75():
    prove(faults.two_relays)


@needs_strace
def test_nothing_is_acknowledged_when_fsync_fails():
    prove(faults.fsync_fails)


def test_a_full_spool_is_said_and_drains():
    prove(faults.spool_full)


def test_a_spool_deleted_under_a_running_relay_accepts_nothing_and_what_waits_goes_out():
    prove(faults.spool_deleted)


def test_every_mutant_still_finds_its_place_in_the_code():
    for mutant in mutants.MUTANTS:
        with tempfile.TemporaryDirectory() as folder:
            harness.mutant(Path(folder), harness.ROOT, mutant.edits)
