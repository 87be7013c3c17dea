"""Nothing brings the event port down: short forms of tests/bench/hostile.py, with an honest client meanwhile."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import harness
import hostile

RUN = harness.Run(harness.ROOT, seed=1, short=True)


def prove(row):
    try:
        row(RUN)
    except harness.Skipped as reason:
        pytest.skip(str(reason))


def test_every_mutated_line_has_one_answer():
    prove(hostile.mutated_lines)


def test_lines_that_are_costly_to_read_hold_nobody_up():
    prove(hostile.costly_lines)


def test_a_slow_loris_and_a_flood_of_connections_hold_nobody_up():
    prove(hostile.loris_and_flood)


def test_half_sent_lines_share_a_bounded_memory_and_leave_room_for_the_token():
    prove(hostile.half_sent_lines)


def test_silent_strangers_leave_places_for_the_token():
    prove(hostile.silent_strangers)


def test_a_log_that_nobody_reads_holds_up_neither_mail_nor_the_end():
    prove(hostile.log_unread)


def test_peers_that_never_read_hold_nobody_up():
    prove(hostile.never_read)


def test_an_event_counts_though_its_sender_left_without_reading():
    prove(hostile.send_and_leave)


def test_handshakes_that_are_never_finished_hold_nobody_up():
    prove(hostile.handshakes)


def test_strangers_that_use_up_the_file_descriptors_leave_some_for_the_token():
    prove(hostile.few_descriptors)


def test_running_out_of_file_descriptors_is_survived():
    prove(hostile.few_descriptors_open)


def test_every_peer_is_answered_after_a_stop():
    prove(hostile.stopped)
