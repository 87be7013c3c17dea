"""The event port with real sockets: one answer a line, in order, after the commit; nobody disturbs another."""

import base64
import contextlib
import gc
import json
import logging
import os
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import server
import smtp_module as smtp

EVENT = b'{"event": "MOTION_DETECTED", "camera": "cam1"}\n'
TOKEN = "s3cret"
WITH_TOKEN = b'{"event": "DOOR_OPENED", "camera": "front", "token": "s3cret"}\n'
BUSY = {"ok": False, "error": "busy", "detail": server.BUSY.detail}


def with_picture(length: int, **fields: Any) -> bytes:
    """An event with a picture, whose token, if it has one, comes last."""
    picture = base64.b64encode(b"\xff\xd8\xff" + bytes(length)).decode()
    return json.dumps({"event": "E", "camera": "c", "image_b64": picture} | fields).encode() + b"\n"


class Running:
    """A relay in this process, without a courier: what it accepts stays in the outbox."""

    def __init__(self, folder: Path, outbox: smtp.Outbox | None = None, **settings: Any) -> None:
        self.config = replace(server.RelayConfig(port=0, spool=str(folder / "alerts.db")), **settings)
        self.outbox = outbox or smtp.Outbox(self.config.spool, size_max=self.config.spool_max)
        self.relay = server.Relay(self.config, self.outbox, server.CameraMonitor(self.config, self.outbox), lambda: None)
        self.relay.listen()
        self.relay.start()

    def connect(self) -> socket.socket:
        return socket.create_connection((self.config.host, self.relay.port), timeout=10)

    def ask(self, data: bytes) -> list[dict[str, Any]]:
        """Send, half-close, and read every answer until the relay closes."""
        with self.connect() as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            return answers(sock)

    def stop(self) -> None:
        self.relay.stop(2)
        self.outbox.close()


def answers(sock: socket.socket) -> list[dict[str, Any]]:
    """All until the relay closes; a peer that is turned out within a line gets a reset after them."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(65536):
            data += chunk
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Any]:
    started: list[Running] = []

    def start(**settings: Any) -> Running:
        started.append(Running(tmp_path, **settings))
        return started[-1]

    yield start
    for running in started:
        running.stop()


def until(condition: Any, seconds: float = 10.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.005)
    return found


def test_every_line_gets_one_answer_in_order(run: Any) -> None:
    lines = [EVENT, b'{"ping": 1}\n', b"nonsense\n", b'{"heartbeat": "cam1"}\n', b"\n", b"  \r\n", b"[]\n", EVENT]
    said = run().ask(b"".join(lines))
    assert [entry.get("status") or entry["error"] for entry in said] == [
        "queued", "pong", "bad_json", "alive", "bad_json", "queued",
    ]  # fmt: skip


def test_many_lines_in_one_write_are_all_answered(run: Any) -> None:
    running = run()
    said = running.ask(b"".join(b'{"event": "E", "camera": "c", "id": "n%d"}\n' % n for n in range(3000)))
    assert [entry["id"] for entry in said] == [f"n{n}" for n in range(3000)]
    assert running.outbox.counts()["queued"] == 3000


def test_a_line_may_come_byte_by_byte_and_end_with_crlf(run: Any) -> None:
    with run().connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in '{"event": "E", "camera": "حیاط"}\r\n'.encode():
            sock.sendall(bytes([byte]))
        assert json.loads(sock.recv(4096))["status"] == "queued"


def test_the_last_line_may_lack_its_line_feed(run: Any) -> None:
    assert [entry["status"] for entry in run().ask(EVENT + EVENT.strip())] == ["queued", "queued"]


def test_answer_is_sent_only_after_the_commit(run: Any, tmp_path: Path) -> None:
    gate = threading.Event()

    class Slow(smtp.Outbox):
        def put(self, items: Any) -> Any:
            assert gate.wait(10)
            return super().put(items)

    running = run(outbox=Slow(tmp_path / "slow.db"))
    with running.connect() as sock:
        sock.sendall(EVENT)
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        gate.set()
        sock.settimeout(10)
        assert b'"queued"' in sock.recv(4096)
    assert running.outbox.counts()["queued"] == 1


def test_the_same_id_twice_is_a_duplicate_also_on_two_connections(run: Any) -> None:
    running = run()
    line = b'{"event": "E", "camera": "c", "id": "x"}\n'
    assert running.ask(line) == [{"ok": True, "id": "x", "status": "queued"}]
    again = b'{"id": "x", "unknown": 1, "camera": "c", "meta": null, "event": "E"}\n'
    assert running.ask(again)[0]["status"] == "duplicate"
    assert running.outbox.counts()["queued"] == 1


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_line_limit_is_exact_whatever_ends_the_line(run: Any, end: bytes) -> None:
    running = run(max_line=200)

    def of_length(number: int) -> bytes:
        start = b'{"event": "E", "camera": "c", "x": "'
        return start + b"a" * (number - len(start) - 2) + b'"}' + end

    said = running.ask(of_length(199) + of_length(200) + of_length(201) + EVENT)
    assert [entry.get("status") or entry["error"] for entry in said] == ["queued", "queued", "too_large", "queued"]


def test_a_too_long_line_is_read_past_and_answered_once(run: Any) -> None:
    said = run(max_line=1000).ask(b"a" * 3500 + b"\n" + EVENT)
    assert [entry.get("status") or entry["error"] for entry in said] == ["too_large", "queued"]


def test_at_four_times_the_limit_the_connection_closes(run: Any) -> None:
    with run(max_line=1000).connect() as sock:
        sock.sendall(EVENT + b"a" * 4100)
        said = answers(sock)
    assert [entry.get("status") or entry["error"] for entry in said] == ["queued", "too_large"]


def test_a_wrong_token_is_answered_late_and_closes(run: Any) -> None:
    running = run(token="s3cret ütf")
    began = time.monotonic()
    with running.connect() as sock:
        sock.sendall(EVENT + EVENT)
        said = answers(sock)
    assert [entry["error"] for entry in said] == ["unauthorized"]
    assert time.monotonic() - began >= server.UNAUTHORIZED_DELAY_S
    assert running.outbox.counts()["queued"] == 0


def test_the_right_token_lets_in_and_is_not_kept(run: Any) -> None:
    running = run(token="s3cret ütf")
    line = json.dumps({"event": "E", "camera": "c", "token": "s3cret ütf"}).encode() + b"\n"
    assert running.ask(line)[0]["status"] == "queued"
    with running.outbox.transaction() as db:
        assert b"s3cret" not in db.execute("SELECT payload FROM entries").fetchone()[0]


def test_a_ping_needs_the_token_only_for_the_counts(run: Any) -> None:
    running = run(token="t")
    assert running.ask(b'{"ping": 1}\n{"ping": 1, "token": "t"}\n') == [
        {"ok": True, "status": "pong"},
        {"ok": True, "status": "pong", "queued": 0, "sent": 0, "failed": 0},
    ]


def test_beyond_the_most_connections_busy_is_said_at_once(run: Any) -> None:
    running = run(max_connections=1)
    with running.connect() as first:
        first.sendall(EVENT)
        assert b"queued" in first.recv(4096)
        with running.connect() as second:
            assert answers(second)[0]["error"] == "busy"
    until(lambda: not running.relay._connections)
    assert running.ask(EVENT)[0]["status"] == "queued"


def test_a_silent_connection_is_closed(run: Any) -> None:
    with run(idle_timeout_s=0.2).connect() as sock:
        assert answers(sock) == []


def test_a_long_line_that_comes_steadily_may_take_longer_than_the_idle_time(run: Any) -> None:
    with run(idle_timeout_s=0.3).connect() as sock:
        sock.sendall(b'{"event": "E", "camera": "c", "x": "')
        for _ in range(12):
            sock.sendall(b"a" * 20_000)
            time.sleep(0.05)
        sock.sendall(b'"}\n')
        assert json.loads(sock.recv(4096))["status"] == "queued"


def test_a_line_that_trickles_for_too_long_is_closed(run: Any) -> None:
    with run(idle_timeout_s=0.3).connect() as sock, pytest.raises(OSError):
        for _ in range(200):
            sock.sendall(b"a")
            time.sleep(0.02)


def test_a_peer_that_never_reads_and_closes_still_has_its_lines_accepted(run: Any) -> None:
    running = run()
    for _ in range(5):
        sock = running.connect()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.sendall(EVENT)
        time.sleep(0.01)
        sock.close()
    until(lambda: running.outbox.counts()["queued"] == 5)


def test_half_sent_lines_share_one_budget(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "UNANSWERED_MAX_BYTES", 1 << 20)
    running = run()
    with running.connect() as hog, running.connect() as second:
        hog.sendall(b"a" * 1_000_000)
        until(lambda: running.relay._counted_bytes > 900_000)
        second.sendall(b"b" * 200_000)
        assert answers(second)[0]["error"] == "busy"
        assert running.ask(EVENT)[0]["status"] == "queued"
    until(lambda: running.relay._counted_bytes == 0)


# strangers: peers that have shown neither token nor certificate where one is asked for


def test_strangers_with_half_sent_lines_give_way_to_a_picture_with_the_token(
    run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "UNANSWERED_MAX_BYTES", 1 << 20)
    running = run(token=TOKEN)
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(running.connect()) for _ in range(4)]
        for number, stranger in enumerate(strangers, 1):
            stranger.sendall(b"a" * 250_000)
            until(lambda number=number: running.relay._counted_bytes == number * 250_000)
        for _ in range(3):
            assert running.ask(with_picture(200_000, token=TOKEN))[0]["status"] == "queued"
        assert answers(strangers[0]) == [BUSY]  # the one who came first
        until(lambda: running.relay._counted_bytes == 750_000)
        strangers[1].sendall(b"\n")
        assert b"bad_json" in strangers[1].recv(4096)
    until(lambda: running.relay._counted_bytes == 0)
    told = [record.getMessage() for record in caplog.records if "turned out" in record.getMessage()]
    assert len(told) == 1 and "127.0.0.1:" in told[0]


def test_among_strangers_it_is_never_the_newcomer_who_is_turned_out(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "UNANSWERED_MAX_BYTES", 1 << 20)
    running = run(token=TOKEN)
    with running.connect() as first, running.connect() as second:
        first.sendall(b"a" * 600_000)
        until(lambda: running.relay._counted_bytes == 600_000)
        second.sendall(b"b" * 600_000)
        assert [entry["error"] for entry in answers(first)] == ["busy"]
        until(lambda: running.relay._counted_bytes == 600_000)


def test_a_peer_that_has_shown_the_token_is_not_turned_out(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "UNANSWERED_MAX_BYTES", 1 << 20)
    running = run(token=TOKEN)
    with running.connect() as known, running.connect() as stranger:
        known.sendall(WITH_TOKEN)
        assert b"queued" in known.recv(4096)
        line = with_picture(700_000, token=TOKEN)
        known.sendall(line[:900_000])
        until(lambda: running.relay._counted_bytes == 900_000)
        stranger.sendall(b"b" * 200_000)
        assert [entry["error"] for entry in answers(stranger)] == ["busy"]
        known.sendall(line[900_000:])
        assert b"queued" in known.recv(4096)


def test_silent_strangers_give_their_places_to_newcomers_and_known_peers_do_not(
    run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    running = run(token=TOKEN, max_connections=3)
    with running.connect() as known, running.connect() as first, running.connect() as second:
        known.sendall(WITH_TOKEN)
        assert b"queued" in known.recv(4096)
        until(lambda: len(running.relay._connections) == 3)
        with running.connect() as newcomer:
            newcomer.sendall(WITH_TOKEN)
            assert b"queued" in newcomer.recv(4096)
            assert answers(first) == [BUSY]
            with running.connect() as another:
                another.sendall(WITH_TOKEN)
                assert b"queued" in another.recv(4096)
                assert [entry["error"] for entry in answers(second)] == ["busy"]
                until(lambda: len(running.relay._connections) == 3)
                with running.connect() as too_many:
                    assert answers(too_many) == [BUSY]
        known.sendall(WITH_TOKEN)
        assert b"queued" in known.recv(4096)
    assert sum("turned out" in record.getMessage() for record in caplog.records) == 1
    assert sum("too many connections" in record.getMessage() for record in caplog.records) == 1


def test_strangers_give_way_also_where_the_system_permits_no_more_threads(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    running = run(token=TOKEN)
    with running.connect() as stranger:
        until(lambda: running.relay._connections)
        with monkeypatch.context() as short:
            short.setattr("server._thread.start_new_thread", cannot)
            assert [entry["error"] for entry in running.ask(WITH_TOKEN)] == ["busy"]
        assert [entry["error"] for entry in answers(stranger)] == ["busy"]
        assert running.ask(WITH_TOKEN)[0]["status"] == "queued"


def test_a_stranger_that_does_not_read_its_answers_gives_its_place_at_once(run: Any) -> None:
    running = run(token=TOKEN, max_connections=1)
    with running.connect() as deaf:
        deaf.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while True:
                deaf.sendall(b'{"ping": 1}\n' * 5000)
        assert running.ask(WITH_TOKEN)[0]["status"] == "queued"
        until(lambda: not running.relay._connections, 2)


def test_a_peer_that_is_turned_out_while_it_sends_learns_it_at_once(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be in a long sendall, with more than the buffers of the kernel hold."""
    monkeypatch.setattr(server, "UNANSWERED_MAX_BYTES", 3 << 20)
    running = run(token=TOKEN)
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(running.connect()) for _ in range(4)]
        began = time.monotonic()
        threads = [threading.Thread(target=send, args=(stranger, b"a" * 15_000_000)) for stranger in strangers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - began < 5


def send(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        sock.sendall(data)


def test_a_stranger_may_be_silent_for_less_long_than_a_known_peer(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STRANGER_TIMEOUT_S", 0.3)
    running = run(token=TOKEN)
    with running.connect() as known, running.connect() as stranger:
        known.sendall(WITH_TOKEN)
        assert b"queued" in known.recv(4096)
        assert answers(stranger) == []
        known.sendall(WITH_TOKEN)
        assert b"queued" in known.recv(4096)


def test_where_nothing_is_asked_for_nobody_is_a_stranger(run: Any) -> None:
    running = run(max_connections=2)
    with running.connect(), running.connect():
        until(lambda: len(running.relay._connections) == 2)
        assert [entry["error"] for entry in running.ask(EVENT)] == ["busy"]


def test_a_stream_of_small_events_goes_on_while_others_hold_all_the_memory(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "UNANSWERED_MAX_BYTES", 1 << 20)
    running = run()
    with running.connect() as hog:
        hog.sendall(b"a" * 1_000_000)
        until(lambda: running.relay._counted_bytes == 1_000_000)
        said = running.ask(EVENT * 5000)
    assert [entry["status"] for entry in said] == ["queued"] * 5000


# what the log says


@pytest.fixture
def info(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "relay")
    return caplog


def test_accepted_events_are_one_line_of_the_log_for_a_commit(run: Any, info: pytest.LogCaptureFixture) -> None:
    running = run()
    running.ask(b'{"event": "DOOR_OPENED", "camera": "front", "id": "a:1"}\n')
    running.ask(b"".join(b'{"event": "E", "camera": "c%d", "id": "a:%d"}\n' % (n, n) for n in range(1, 6)))
    said = [record.getMessage() for record in info.records if record.getMessage().startswith("accepted")]
    assert said[0] == "accepted DOOR_OPENED front (a:1)"
    assert said[1].startswith("accepted E c1 (a:1-")  # the same id, another event
    assert said[1].endswith("E c2 (a:2), E c3 (a:3), +2") and len(said) == 2


def test_a_refused_token_is_logged_once_with_its_peer_and_without_the_token(
    run: Any, info: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "UNAUTHORIZED_DELAY_S", 0.0)
    running = run(token=TOKEN)
    for _ in range(3):
        running.ask(b'{"ping": 1, "token": "guess\\n"}\n')
    said = [record.getMessage() for record in info.records if record.levelname == "WARNING"]
    assert len(said) == 1
    assert re.fullmatch(r"127\.0\.0\.1:\d+ was refused: token is missing or wrong", said[0])


def test_what_is_logged_once_is_logged_again_after_a_while(
    run: Any, info: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LOG_AGAIN_S", 0.05)
    relay = run().relay
    until(lambda: relay.log_once("%s", "again") or len([r for r in info.records if r.getMessage() == "again"]) == 3)


def test_a_failed_handshake_is_logged_once_with_its_peer(
    run: Any, certificate: Path, info: pytest.LogCaptureFixture
) -> None:
    running = run(tls=smtp.server_tls(str(certificate), ""))
    for _ in range(3):
        with running.connect() as plain:
            plain.sendall(EVENT)
            with contextlib.suppress(OSError):
                plain.recv(4096)
    with running.connect():  # a look at the port is none
        pass
    until(lambda: not running.relay._connections)
    said = [record.getMessage() for record in info.records if record.levelname == "WARNING"]
    assert len(said) == 1 and re.match(r"no TLS with 127\.0\.0\.1:\d+: .", said[0])


def test_a_full_spool_is_said_and_the_connection_goes_on(run: Any) -> None:
    running = run(spool_max=100_000)
    said = running.ask(with_picture(200_000) + b'{"ping": 1}\n')
    assert [entry.get("error") or entry["status"] for entry in said] == ["spool_full", "pong"]


def test_a_failed_disk_is_said_and_the_connection_goes_on(run: Any) -> None:
    running = run()
    running.outbox._db.close()
    with running.connect() as sock:
        sock.sendall(EVENT)
        assert json.loads(sock.recv(4096))["error"] == "spool_error"
        sock.sendall(b'{"heartbeat": "c"}\n')
        assert json.loads(sock.recv(4096))["status"] == "alive"


def test_stopping_answers_what_has_been_read(run: Any) -> None:
    running = run()
    with running.connect() as sock:
        sock.sendall(EVENT * 50)
        until(lambda: running.outbox.counts()["queued"] == 50)
        running.relay.stop(2)
        assert [entry["status"] for entry in answers(sock)] == ["queued"] * 50
    with pytest.raises(OSError):
        running.connect()


@pytest.mark.parametrize("line", [b"nonsense", b"{}", b"[" * 99, b"x" * 20_000_000, EVENT.strip(), b'{"heartbeat": ""}'])
def test_a_connection_is_forgotten_when_it_ends_whatever_was_refused(run: Any, line: bytes) -> None:
    running = run()
    if line == EVENT.strip():
        running.outbox._db.close()
    gc.collect()
    gc.disable()
    try:
        assert not running.ask(line + b"\n")[0]["ok"]
        until(lambda: not running.relay._connections, 2)
    finally:
        gc.enable()


def test_threads_that_wait_for_the_interpreter_look_less_often_the_more_they_are(run: Any) -> None:
    running = run()
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(running.connect())
        until(lambda: sys.getswitchinterval() > 0.009)
    until(lambda: sys.getswitchinterval() < 0.006)


def test_stopping_waits_no_longer_than_its_connections_live(run: Any) -> None:
    running = run()
    with running.connect() as one, running.connect() as other:
        for sock in (one, other):
            sock.sendall(EVENT)
            assert b"queued" in sock.recv(4096)
        began = time.monotonic()
        running.relay.stop(60)
    assert time.monotonic() - began < 30


def test_a_half_read_line_is_not_judged_when_the_relay_stops(run: Any) -> None:
    running = run()
    with running.connect() as sock:
        sock.sendall(b'{"ping": 1}\n{"event": "E", "camera": "c", "x": "aaa')
        assert b"pong" in sock.recv(4096)
        running.relay.stop(2)
        assert [entry["error"] for entry in answers(sock)] == ["shutting_down"]


def test_a_peer_that_sends_on_while_the_relay_ends_is_not_told_of_a_failed_disk(
    run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    running = run()
    running.outbox.close()  # after the wait for those who were connected
    assert [entry["error"] for entry in running.ask(EVENT * 2)] == ["shutting_down"] * 2
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_of_a_batch_what_fits_is_taken(run: Any) -> None:
    running = run(spool_max=1 << 20)
    said = [entry.get("status") or entry["error"] for entry in running.ask(with_picture(100_000) * 20)]
    assert said.count("queued") >= 4 and said.count("spool_full") >= 10
    assert said == sorted(said, key=["queued", "spool_full"].index)


@pytest.mark.parametrize(
    ("place", "shortage"),
    [("_thread.start_new_thread", RuntimeError), ("Connection", MemoryError)],
)
def test_without_threads_or_memory_peers_are_turned_away_and_the_log_says_so_once(
    run: Any, place: str, shortage: type[Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def cannot(*_: Any) -> None:
        raise shortage

    running = run()
    with monkeypatch.context() as short:
        short.setattr(f"server.{place}", cannot)
        said = [running.ask(EVENT) for _ in range(5)]
    assert [[entry["error"] for entry in one] for one in said] == [["busy"]] * 5
    assert [record.exc_info for record in caplog.records if record.levelname == "ERROR"] == [None]
    assert running.ask(EVENT)[0]["status"] == "queued"


def test_a_line_that_memory_is_too_short_for_is_not_called_wrong(
    run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def cannot(*_: Any) -> None:
        raise MemoryError

    running = run()
    with monkeypatch.context() as short:
        short.setattr(server, "parse_line", cannot)
        said = [running.ask(EVENT * 2) for _ in range(2)]
    assert [[entry["error"] for entry in one] for one in said] == [["busy"]] * 2  # and the connection closes
    assert [record.exc_info for record in caplog.records if record.levelname == "ERROR"] == [None]


def test_it_listens_on_ipv6(run: Any) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        running = run(host="::1")
    except OSError:
        pytest.skip("no IPv6 loopback")
    assert running.ask(EVENT)[0]["status"] == "queued"


def test_an_address_that_the_machine_has_only_by_name_is_passed_over(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ::1 for localhost, where IPv6 is switched off; 192.0.2.1 is nobody's, RFC 5737."""
    names = {"localhost": ("192.0.2.1", "127.0.0.1"), "elsewhere": ("192.0.2.1",)}

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, port)) for number in names[host]]

    with monkeypatch.context() as resolver:
        resolver.setattr(socket, "getaddrinfo", look_up)
        running = run(host="localhost")
        with pytest.raises(OSError, match="assign"):
            server.Relay(replace(running.config, host="elsewhere"), running.outbox, Any, Any).listen()
    running.config = replace(running.config, host="127.0.0.1")
    assert running.ask(EVENT)[0]["status"] == "queued"


@pytest.mark.skipif(os.name != "posix", reason="no such timeouts")
@pytest.mark.parametrize(("form", "size"), [("ii", 8), ("qq", 16)], ids=["32-bit time", "64-bit time"])
def test_kernel_gets_its_timeouts_in_the_size_that_it_has(form: str, size: int) -> None:
    class Machine(socket.socket):
        """On a 32-bit system, the size of a pointer tells nothing about the size of its time."""

        def getsockopt(self, *_: Any) -> Any:
            return bytes(size)

        def setsockopt(self, _level: int, option: int, value: Any) -> None:
            said[option] = struct.unpack(form, value)

    said: dict[int, tuple[int, int]] = {}
    with Machine() as sock:
        smtp.wait_at_most(sock, 2.5, 30)
    assert said == {socket.SO_RCVTIMEO: (2, 500_000), socket.SO_SNDTIMEO: (30, 0)}


def test_a_free_port_is_free_on_every_address(monkeypatch: pytest.MonkeyPatch) -> None:
    create, rivals = socket.create_server, contextlib.ExitStack()

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, port)) for number in ("127.0.0.1", "127.0.0.2")]

    def create_where_others_are_quicker(address: tuple[str, int], **options: Any) -> socket.socket:
        sock = create(address, **options)
        if address == ("127.0.0.1", 0) and len(taken) < 3:
            taken.append(sock.getsockname()[1])
            rivals.enter_context(create(("127.0.0.2", taken[-1])))
        return sock

    taken: list[int] = []
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_server", create_where_others_are_quicker)
    with rivals:
        one, other = smtp.listen("localhost", 0, 5)
        with one, other:
            assert one.getsockname()[1] == other.getsockname()[1] not in taken
        with pytest.raises(OSError, match="in use"):
            smtp.listen("localhost", taken[0], 5)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("openssl"):
        pytest.skip("openssl is missing")
    path = tmp_path_factory.mktemp("tls") / "relay.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-keyout", path, "-out", path.with_suffix(".crt")],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_text(path.read_text() + path.with_suffix(".crt").read_text())
    return path


def tls_client(certificate: Path, own: Path | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(certificate))
    if own:
        context.load_cert_chain(own)
    return context


def test_events_come_in_over_tls(run: Any, certificate: Path) -> None:
    running = run(tls=smtp.server_tls(str(certificate), ""))
    picture = "A" * 100_000
    big = json.dumps({"event": "E", "camera": "c", "image_b64": picture}).encode() + b"\n"
    with tls_client(certificate).wrap_socket(running.connect(), server_hostname="localhost") as sock:
        sock.sendall(EVENT * 3 + big + EVENT)
        with sock.makefile("rb") as lines:
            said = [json.loads(lines.readline()) for _ in range(5)]
    assert [entry["status"] for entry in said] == ["queued"] * 5
    assert "warning" in said[3]


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_connection_may_be_silent_for_longer_than_a_socket_can_wait(
    run: Any, certificate: Path, encrypted: bool
) -> None:
    tls = smtp.server_tls(str(certificate), "") if encrypted else None
    raw = run(tls=tls, idle_timeout_s=1e6 * smtp.DAY_S).connect()
    with tls_client(certificate).wrap_socket(raw, server_hostname="localhost") if encrypted else raw as sock:
        sock.sendall(EVENT)
        assert b"queued" in sock.recv(4096)


def test_a_relay_that_stops_answers_over_tls_what_it_has_read(run: Any, certificate: Path) -> None:
    running = run(tls=smtp.server_tls(str(certificate), ""))
    with tls_client(certificate).wrap_socket(running.connect(), server_hostname="localhost") as sock:
        sock.sendall(EVENT + b'{"event": "E", "camera": "c", "x": "aaa')
        assert b"queued" in sock.recv(4096)
        running.relay.stop(2)
        assert [entry["error"] for entry in answers(sock)] == ["shutting_down"]


@pytest.mark.parametrize("number", [1, 5000], ids=["who is done", "who still talks"])
def test_a_peer_over_tls_can_tell_the_end_from_a_cut(
    run: Any, certificate: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "UNAUTHORIZED_DELAY_S", 0.0)
    raw, client = run(tls=smtp.server_tls(str(certificate), ""), token="t").connect(), tls_client(certificate)
    with client.wrap_socket(raw, server_hostname="localhost", suppress_ragged_eofs=False) as sock:
        sock.sendall(EVENT * number)
        assert [entry["error"] for entry in answers(sock)] == ["unauthorized"]


def test_a_peer_that_is_gone_before_the_handshake_is_closed_gently_too(certificate: Path) -> None:
    peer = socket.socket()  # not connected any more
    smtp.close_gently(smtp.server_tls(str(certificate), "").wrap_socket(peer, server_side=True), 0)


def test_a_silent_or_talkative_handshake_costs_only_itself(run: Any, certificate: Path) -> None:
    running = run(tls=smtp.server_tls(str(certificate), ""))
    with running.connect(), running.connect() as plain:
        plain.sendall(EVENT)
        with contextlib.suppress(ConnectionResetError):
            assert b"queued" not in plain.recv(4096)
        with tls_client(certificate).wrap_socket(running.connect(), server_hostname="localhost") as sock:
            sock.sendall(EVENT)
            assert b"queued" in sock.recv(4096)
    assert running.outbox.counts()["queued"] == 1


def test_strangers_in_a_handshake_give_their_places_to_a_client_certificate(run: Any, certificate: Path) -> None:
    tls = smtp.server_tls(str(certificate), "", str(certificate))
    running = run(tls=tls, client_ca=True, max_connections=2)
    own = tls_client(certificate, certificate)
    with running.connect() as first, running.connect(), own.wrap_socket(running.connect(), server_hostname="localhost") as sock:
        sock.sendall(EVENT)
        assert b"queued" in sock.recv(4096)
        assert first.recv(1) == b""
        with own.wrap_socket(running.connect(), server_hostname="localhost") as another:
            another.sendall(EVENT)
            assert b"queued" in another.recv(4096)
        sock.sendall(EVENT)
        assert b"queued" in sock.recv(4096)


def test_a_stranger_over_tls_gives_its_place_too(run: Any, certificate: Path) -> None:
    running = run(tls=smtp.server_tls(str(certificate), ""), token=TOKEN, max_connections=1)
    client = tls_client(certificate)
    with client.wrap_socket(running.connect(), server_hostname="localhost") as first:
        first.sendall(b'{"ping": 1}\n')
        assert b"pong" in first.recv(4096)
        with client.wrap_socket(running.connect(), server_hostname="localhost") as newcomer:
            newcomer.sendall(WITH_TOKEN)
            assert b"queued" in newcomer.recv(4096)
        assert answers(first) == []


def test_without_a_client_certificate_nobody_gets_in_where_one_is_asked_for(run: Any, certificate: Path) -> None:
    running = run(tls=smtp.server_tls(str(certificate), "", str(certificate)), client_ca=True)
    with (
        pytest.raises(OSError),  # TLS 1.3 tells the client only when it reads
        tls_client(certificate).wrap_socket(running.connect(), server_hostname="localhost") as sock,
    ):
        sock.sendall(EVENT)
        assert sock.recv(4096)
    with tls_client(certificate, certificate).wrap_socket(running.connect(), server_hostname="localhost") as sock:
        sock.sendall(EVENT)
        assert b"queued" in sock.recv(4096)
    assert running.outbox.counts()["queued"] == 1
