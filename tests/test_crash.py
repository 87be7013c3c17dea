"""Nothing acknowledged is ever lost: short forms of tests/bench/, with real processes that are really killed."""

import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import client_nemesis
import device_nemesis
import faults
import harness
import mutants
import nemesis
import powerloss

RUN = harness.Run(harness.ROOT, seed=1, short=True)


def prove(row, **options):
    try:
        row(RUN, **options)
    except harness.Skipped as reason:
        pytest.skip(str(reason))


needs_strace = pytest.mark.skipif(not harness.STRACE, reason="strace is missing")


def test_nothing_is_lost_when_the_relay_is_killed_over_and_over_and_the_mail_server_fails():
    nemesis.run(RUN.product, seed=4, kills=6, acked=300)


def test_each_command_is_carried_out_once_when_the_device_is_killed_over_and_over():
    device_nemesis.device(RUN.product, seed=1, kills=4)


def test_each_mail_of_a_camera_is_one_alert_when_the_gateway_is_killed_over_and_over():
    device_nemesis.gateway(RUN.product, seed=1, kills=4)


def test_no_event_is_lost_when_the_client_is_killed_over_and_over():
    client_nemesis.run(RUN.product, seed=1, kills=4)


@needs_strace
def test_a_power_cut_at_any_moment_loses_nothing_and_repeats_little():
    found = powerloss.replay(RUN.product, seed=1, points=50, torn=1)
    assert (found.points, found.bad_points) == (50, 0), found


@needs_strace
@pytest.mark.parametrize("broken", ["synchronous=NORMAL", "written as sent before the 250"])
def test_the_power_cut_test_notices_a_relay_that_breaks_its_promise(broken):
    assert powerloss.control(RUN.product, powerloss.CONTROLS[broken], seed=1, points=40)


def test_a_mail_cut_off_after_the_dot_is_sent_again_with_the_same_message_id():
    prove(faults.killed_after_the_dot)


def test_a_kill_while_a_backlog_drains_repeats_little():
    prove(faults.killed_while_draining)


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


@pytest.mark.parametrize("damage", ["cut in half", "one bit in a picture"])
def test_of_a_damaged_spool_what_can_be_read_goes_out(damage):
    prove(faults.damaged, name=damage)


def test_a_clock_that_jumps_delays_and_loses_nothing():
    prove(faults.clock_jumps)


def test_a_log_that_nobody_reads_stops_neither_mail_nor_the_end_of_the_program():
    prove(faults.log_stalls)


def test_a_deferred_mail_is_tried_again_at_its_time():
    prove(faults.soak, scripts=("rcpt:552 too many*2",))


def test_broken_pipelining_loses_and_doubles_nothing():
    prove(faults.broken_pipelining)


def test_every_mutant_still_finds_its_place_in_the_code():
    for mutant in mutants.MUTANTS:
        with tempfile.TemporaryDirectory() as folder:
            harness.mutant(Path(folder), harness.ROOT, mutant.edits)
