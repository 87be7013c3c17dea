"""The durable queue: what `put` has returned for is there, whatever happens to the process, the file or the disk."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, wait_for

import smtp_module as smtp
from smtp_module import DAY_S, Delivery, DueMessage, NewEntry, Outbox, PutResult, SpoolBusy, SpoolError, SpoolFull

ANN, BOB, EVE = "ann@x.org", "bob@x.org", "eve@x.org"


def entry(name: str, payload: bytes = b"hello", picture: bytes | None = None, **more: Any) -> NewEntry:
    return NewEntry(name, "MOTION", "yard", payload, picture, **more)


def ids(outbox: Outbox) -> list[str]:
    """The entries that wait, in order."""
    return [row.id for row in outbox.pending()]


def create(outbox: Outbox, *names: str, to: Sequence[str] = (ANN,), now: float = 0.0) -> list[Delivery]:
    """Deliveries of these entries, or of all that wait, each entry a message of its own."""
    rows = [row for row in outbox.pending() if row.id in names or not names]
    return outbox.create([DueMessage((row.seq,), tuple(to)) for row in rows], now)


def finish(outbox: Outbox, *deliveries: Delivery, state: str = "sent", now: float = 0.0, **changes: Any) -> None:
    """End these deliveries, on disk."""
    for delivery in deliveries:
        outbox.finish(delivery._replace(state=state, tries=delivery.tries + 1, **changes), now)
    outbox.flush()


def pictures(outbox: Outbox) -> dict[str, bytes | None]:
    """The pictures of all that waits, which is in deliveries afterwards."""
    return {loaded.id: loaded.picture() for delivery in create(outbox) for loaded in outbox.load(delivery)}


def statements(outbox: Outbox) -> list[str]:
    """What SQLite runs from now on."""
    said: list[str] = []
    outbox._db.set_trace_callback(said.append)
    return said


def put_together(outbox: Outbox, puts: dict[str, NewEntry]) -> dict[str, object]:
    """Put each from a thread of its own, so that all are in one commit; what became of each."""
    results: dict[str, object] = {}

    def put(name: str) -> None:
        try:
            results[name] = outbox.put([puts[name]])[0].new
        except Exception as error:
            results[name] = type(error)

    threads = [threading.Thread(target=put, args=(name,)) for name in puts]
    with outbox._lock:  # What gathers behind a commit goes into the next one.
        for thread in threads:
            thread.start()
        wait_for(lambda: len(outbox._puts) == len(puts))
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def outbox(spool: Path) -> Iterator[Outbox]:
    with contextlib.closing(Outbox(spool)) as opened:
        yield opened


# Putting


def test_what_was_put_is_there_after_a_new_start(spool: Path) -> None:
    with contextlib.closing(Outbox(spool)) as outbox:
        assert [result.new for result in outbox.put([entry("a"), entry("b", picture=b"picture")])] == [True, True]
    with contextlib.closing(Outbox(spool)) as outbox:
        assert outbox.counts() == {"queued": 2, "sent": 0, "failed": 0}
        assert pictures(outbox) == {"a": None, "b": b"picture"}


def test_every_commit_is_synchronous(outbox: Outbox) -> None:
    assert smtp.pragma(outbox._db, "synchronous") == 2
    assert outbox._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    said = statements(outbox)
    outbox.put([entry("a")])
    finish(outbox, *create(outbox))
    assert said.count("COMMIT") == 3 and not any("synchronous" in statement.lower() for statement in said)


def test_threads_share_commits_and_each_gets_its_own_results(outbox: Outbox) -> None:
    said = statements(outbox)
    names = [str(number) for number in range(20)]
    assert put_together(outbox, {name: entry(name) for name in names}) == dict.fromkeys(names, True)
    assert said.count("COMMIT") == 1 and sorted(ids(outbox)) == sorted(names)


def test_what_is_put_together_in_one_commit_is_bounded(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp, "COMMIT_MAX_BYTES", 1000)
    said = statements(outbox)
    put_together(outbox, {str(number): entry(str(number), bytes(400)) for number in range(6)})
    assert said.count("COMMIT") == 3
    outbox.put([entry("larger", bytes(2000))])
    assert len(ids(outbox)) == 7


def test_an_entry_that_cannot_be_stored_costs_only_itself(outbox: Outbox) -> None:
    names = ["good-1", "bad\ud800", "good-2"]
    assert put_together(outbox, {name: entry(name, picture=b"x") for name in names}) == {
        "good-1": True, "bad\ud800": UnicodeEncodeError, "good-2": True,
    }  # fmt: skip


def test_an_entry_that_is_too_big_for_the_spool_costs_only_itself(spool: Path) -> None:
    with contextlib.closing(Outbox(spool, size_max=400_000)) as outbox:
        sizes = {"small": 1000, "big": 500_000, "other": 1001}
        assert put_together(outbox, {name: entry(name, bytes(size)) for name, size in sizes.items()}) == {
            "small": True, "big": SpoolFull, "other": True,
        }  # fmt: skip


def test_a_failed_transaction_leaves_nothing(outbox: Outbox) -> None:
    with pytest.raises(ValueError, match="changed my mind"), outbox.transaction() as db:
        assert outbox.add(db, entry("a")).new
        raise ValueError("changed my mind")
    assert ids(outbox) == []
    with outbox.transaction() as db:
        assert outbox.add(db, entry("a")).new and not outbox.add(db, entry("a")).new
    assert outbox.counts()["queued"] == 1


# Duplicates


@pytest.mark.parametrize("picture", [None, b"picture"])
def test_the_same_again_is_a_duplicate_and_takes_no_room(outbox: Outbox, picture: bytes | None) -> None:
    first, second = outbox.put([entry("a", b"one", picture), entry("a", b"one", picture)])
    assert (first, second) == (PutResult("a", new=True), PutResult("a", new=False))
    assert outbox.put([entry("a", b"one", picture)]) == [PutResult("a", new=False)]
    assert outbox.counts()["queued"] == 1
    assert outbox.rows("SELECT count(*) FROM pictures") == [(1 if picture else 0,)]


@pytest.mark.parametrize(
    "other",
    [entry("a", b"two"), entry("a", b"one", b"picture"), entry("a", b"", b"one")],
    ids=["payload", "picture", "moved"],
)
def test_the_same_id_with_other_content_gets_a_suffix_and_is_known_again(outbox: Outbox, other: NewEntry) -> None:
    outbox.put([entry("a", b"one")])
    (first,), (again,) = outbox.put([other]), outbox.put([other])
    assert first.new and first.id.startswith("a-") and not again.new
    assert again.id == first.id
    assert ids(outbox) == ["a", first.id]


def test_a_long_id_with_a_suffix_stays_within_128_characters(outbox: Outbox) -> None:
    name = "x" * 128
    (_, changed) = outbox.put([entry(name, b"one"), entry(name, b"two")])
    assert changed.new and len(changed.id) == 128 and changed.id != name


def test_what_has_ended_is_remembered_for_seven_days(outbox: Outbox) -> None:
    outbox.put([entry("dropped"), entry("sent"), entry("failed")])
    outbox.drop("dropped")
    now = time.time()
    finish(outbox, *create(outbox, "sent", now=now), now=now)
    finish(outbox, *create(outbox, "failed", now=now), state="failed", now=now)
    assert outbox.prune(now + smtp.MEMORY_S - 10) == 0
    assert [result.new for result in outbox.put([entry("dropped"), entry("sent"), entry("failed")])] == [False] * 3
    assert outbox.prune(now + smtp.MEMORY_S + 10) == 2
    assert outbox.counts() == {"queued": 0, "sent": 0, "failed": 1}, "what failed is kept until somebody decides"
    assert [result.new for result in outbox.put([entry("dropped"), entry("sent")])] == [True, True]


def test_deliveries_are_forgotten_with_the_last_of_their_entries(outbox: Outbox) -> None:
    outbox.put([entry("old"), entry("failed")])
    (delivery,) = outbox.create([DueMessage((1, 2), (ANN,))], 0.0)
    outbox.fail_entry(2, "damaged on disk")
    finish(outbox, delivery, now=1.0)
    assert outbox.prune(smtp.MEMORY_S + 10) == 1
    assert outbox.rows("SELECT count(*) FROM deliveries") == [(1,)]
    outbox.drop("failed")
    assert outbox.prune(time.time() + smtp.MEMORY_S + 10) == 1
    assert outbox.rows("SELECT count(*) FROM deliveries") == [(0,)]


def test_no_number_is_given_twice(spool: Path) -> None:
    for expected in (1, 3, 5):  # A plan that has seen entry 2 looks for entries beyond it.
        with contextlib.closing(Outbox(spool)) as outbox:
            outbox.put([entry("a"), entry("b")])
            assert [row.seq for row in outbox.pending()] == [expected, expected + 1]
            deliveries = create(outbox)
            assert [delivery.number for delivery in deliveries] == [expected, expected + 1]
            finish(outbox, *deliveries)
            assert outbox.prune(time.time() + 2 * smtp.MEMORY_S) == 2


# Limits


BULK = [(b"x" * 20_000, None), (b"x", b"x" * 20_000)]


@pytest.mark.parametrize("bulk", BULK, ids=["payload", "picture"])
def test_a_full_spool_refuses_and_accepts_again_when_there_is_room(
    spool: Path, bulk: tuple[bytes, bytes | None]
) -> None:
    with contextlib.closing(Outbox(spool, size_max=400_000)) as outbox:
        assert not outbox.half_full()
        with pytest.raises(SpoolFull):
            for number in range(100):
                outbox.put([entry(str(number), *bulk)])
        assert 10 < len(ids(outbox)) < 20 and outbox.half_full()
        finish(outbox, *create(outbox))
        assert outbox.put([entry("again", *bulk)])[0].new


def test_what_has_ended_frees_its_room_and_is_not_written_over(outbox: Outbox) -> None:
    outbox.put([entry("a", b"secret", picture=bytes(1_000_000))])
    (delivery,) = create(outbox)
    outbox._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finish(outbox, delivery)
    assert os.path.getsize(f"{outbox.path}-wal") < 200_000
    assert outbox.rows("SELECT payload FROM entries") == [(None,)]
    assert outbox.rows("SELECT count(*) FROM pictures") == [(0,)]


def leave_free(monkeypatch: pytest.MonkeyPatch, total: int, free: int) -> None:
    usage = shutil.disk_usage("/")._replace(total=total, free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_the_last_room_of_a_disk_is_kept_for_outcomes(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox.put([entry("a")])
    leave_free(monkeypatch, 10**9, smtp.DISK_RESERVE_BYTES - 1)
    with pytest.raises(smtp.DiskFull):
        outbox.put([entry("b")])
    finish(outbox, *create(outbox))
    assert outbox.counts()["sent"] == 1


def test_the_log_is_emptied_before_anything_is_refused(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox.put([entry("a", bytes(100_000))])
    log = Path(f"{outbox.path}-wal")
    assert log.stat().st_size > 100_000
    leave_free(monkeypatch, 1_000_000, 100_000)  # 50,000 of them are kept for bookkeeping.
    assert outbox.put([entry("b", bytes(20_000))])[0].new
    assert log.stat().st_size < 100_000
    with pytest.raises(SpoolFull):
        outbox.put([entry("c", bytes(30_000))])


def test_the_log_stays_short_whatever_is_put(outbox: Outbox) -> None:
    for number in range(10):
        outbox.put([entry(str(number), picture=bytes(2 << 20))])
    assert os.path.getsize(f"{outbox.path}-wal") < smtp.CHECKPOINT_BYTES + (5 << 19)


def test_the_log_leaves_room_for_the_database_on_a_small_disk(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that has taken the last of the disk cannot be written into the database, which has to grow for it."""
    leave_free(monkeypatch, 12 << 20, 4 << 20)
    with contextlib.closing(Outbox(spool)) as outbox:
        for number in range(60):
            outbox.put([entry(str(number))])
            outbox.publish_status(number=number)
        assert os.path.getsize(f"{spool}-wal") < (12 << 20) // 20 // 2


def test_a_database_that_cannot_grow_is_full_and_goes_on_sending(outbox: Outbox) -> None:
    outbox.put([entry("a", bytes(50_000))])
    outbox._db.execute(f"PRAGMA max_page_count={smtp.pragma(outbox._db, 'page_count') + 2}")
    with pytest.raises(SpoolFull):
        outbox.put([entry("b", bytes(50_000))])
    assert outbox.counts()["queued"] == 1
    finish(outbox, *create(outbox))
    assert outbox.put([entry("b", bytes(50_000))])[0].new


@pytest.mark.parametrize("waits", [False, True])
def test_unused_room_is_given_back_at_a_start_when_nothing_waits(
    spool: Path, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    monkeypatch.setattr(smtp, "VACUUM_MIN_BYTES", 500_000)
    with contextlib.closing(Outbox(spool)) as outbox:
        outbox.put([entry("a", picture=bytes(1_000_000))])
        finish(outbox, *create(outbox))
        if waits:
            outbox.put([entry("b")])
    with contextlib.closing(Outbox(spool)) as outbox:
        assert not outbox.put([entry("a", picture=bytes(1_000_000))])[0].new
    assert (spool.stat().st_size < 200_000) != waits


# One owner; readable by the owner alone


def test_a_second_owner_is_refused_and_the_lock_ends_with_the_process(spool: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import smtp_module, time\n"
    code += f"smtp_module.Outbox({str(spool)!r}); print('open', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "open\n"
        with pytest.raises(SpoolBusy):
            Outbox(spool)
        other.kill()
    Outbox(spool).close()


def test_a_start_that_fails_leaves_nothing_open(spool: Path) -> None:
    spool.mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(SpoolError) as caught:
            Outbox(spool)
        assert not isinstance(caught.value, SpoolBusy)
    spool.rmdir()
    Outbox(spool).close()


def test_closing_twice_is_harmless_and_frees_the_spool(spool: Path) -> None:
    outbox = Outbox(spool)
    outbox.close()
    outbox.close()
    with pytest.raises(SpoolError):
        outbox.put([entry("a")])
    Outbox(spool).close()


def test_there_is_one_file_and_its_lock_and_they_are_their_owners_alone(spool: Path) -> None:
    with contextlib.closing(Outbox(spool)) as outbox:
        outbox.put([entry("a", picture=b"picture")])
        assert {stat.S_IMODE(path.stat().st_mode) for path in spool.parent.iterdir()} == {0o600}
        assert stat.S_IMODE(spool.parent.stat().st_mode) == 0o700
    assert sorted(path.name for path in spool.parent.iterdir()) == ["alerts.db", "alerts.db.lock"]


def test_a_spool_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError):
        Outbox(tmp_path / "file" / "alerts.db")


# Damage and loss


def fill(spool: Path, number: int = 200) -> bytearray:
    """A spool with so many entries; its bytes."""
    with contextlib.closing(Outbox(spool)) as outbox:
        outbox.put([entry(f"id-{n}", b"x" * 600) for n in range(number)])
    return bytearray(spool.read_bytes())


def rot(data: bytearray) -> None:
    """Put rubbish where entries lie."""
    data[len(data) // 2 : len(data) // 2 + 4096] = os.urandom(4096)


@pytest.mark.parametrize("damage", ["header", "page", "truncated", "text"])
def test_a_damaged_spool_is_moved_aside_and_what_can_be_read_is_saved(
    spool: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    data = fill(spool)
    if damage == "header":
        data[:100] = bytes(100)
    elif damage == "page":
        rot(data)
    elif damage == "truncated":
        del data[len(data) * 3 // 4 :]
    else:
        data = bytearray(b"not a database, but long enough to be looked at" * 20)
    spool.write_bytes(data)
    with caplog.at_level(logging.ERROR), contextlib.closing(Outbox(spool)) as outbox:
        saved = ids(outbox)
        assert outbox.put([entry("new")])[0].new
    (aside,) = spool.parent.glob("alerts.db.damaged-*")
    assert aside.read_bytes() == data
    assert f"was damaged and moved to {aside}; {len(saved)} alerts that wait" in caplog.text
    if damage == "page":
        assert 150 < len(saved) < 200


def test_a_large_spool_is_not_read_through_but_what_waits_is(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp, "CHECKED_MAX_BYTES", 0)
    data = fill(spool)
    rot(data)
    spool.write_bytes(data)
    with contextlib.closing(Outbox(spool)) as outbox:
        assert 150 < len(ids(outbox)) < 200
        assert outbox.put([entry("new")])[0].new


def test_an_emptied_spool_is_logged(spool: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(spool)
    spool.write_bytes(b"")
    with caplog.at_level(logging.ERROR), contextlib.closing(Outbox(spool)) as outbox:
        assert ids(outbox) == []
    assert "was empty" in caplog.text


def test_after_salvage_no_new_entry_takes_the_number_of_a_lost_one(spool: Path) -> None:
    with contextlib.closing(Outbox(spool)) as outbox:
        outbox.put([entry(name, picture=name.encode()) for name in ("kept", "lost", "lost too")])
        to_all = DueMessage((1, 2, 3), (ANN,), "digest")
        outbox.create([to_all], 0.0)
        with outbox.transaction() as db:  # As if their page could not be read.
            db.execute("DELETE FROM entries WHERE seq > 1")
        (root,) = outbox._db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'entries_state'").fetchone()
        page_bytes = smtp.pragma(outbox._db, "page_size")
    data = bytearray(spool.read_bytes())
    data[(root - 1) * page_bytes : (root - 1) * page_bytes + 8] = os.urandom(8)
    spool.write_bytes(data)
    with contextlib.closing(Outbox(spool)) as outbox:
        assert outbox.put([entry("new", picture=b"new")])[0].new, "its picture has a place"
        ((delivery,), _) = outbox.due(8.0, (), (), 9, 9)
        assert [loaded.id for loaded in outbox.load(delivery)] == ["kept"]
        assert ids(outbox) == ["new"]


def test_salvage_keeps_deliveries_failures_duplicates_pictures_and_the_owners_tables(spool: Path) -> None:
    schema = "CREATE TABLE IF NOT EXISTS mine(name TEXT PRIMARY KEY, value TEXT);"
    with contextlib.closing(Outbox(spool, schema=schema)) as outbox:
        outbox.put([entry(name, picture=name.encode()) for name in ("failed", "sending", "waiting", "sent")])
        to_ann, to_bob = create(outbox, "sending", to=(ANN, BOB))
        finish(outbox, to_ann, *create(outbox, "sent"))
        finish(outbox, to_bob, state="open", next_try=7.0)
        finish(outbox, *create(outbox, "failed"), state="failed", error="no")
        with outbox.transaction() as db:
            db.execute("INSERT INTO mine VALUES ('kept', 'yes')")
        outbox.publish_status(summary="2026-05-06")
        (root,) = outbox._db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'entries_state'").fetchone()
        page_bytes = smtp.pragma(outbox._db, "page_size")
    data = bytearray(spool.read_bytes())
    data[(root - 1) * page_bytes :][:8] = b""
    data[(root - 1) * page_bytes : (root - 1) * page_bytes + 8] = os.urandom(8)  # An index is damaged, no table.
    spool.write_bytes(data)
    with contextlib.closing(Outbox(spool, schema=schema)) as outbox:
        assert list(spool.parent.glob("alerts.db.damaged-*"))
        assert outbox.counts() == {"queued": 2, "sent": 1, "failed": 1}
        assert ids(outbox) == ["waiting"]
        ((delivery,), _) = outbox.due(8.0, (), (), 9, 9)
        assert (delivery.recipient, delivery.recipients, delivery.tries) == (BOB, (ANN, BOB), 1)
        assert [loaded.picture() for loaded in outbox.load(delivery)] == [b"sending"]
        finish(outbox, delivery)
        assert outbox.counts() == {"queued": 1, "sent": 2, "failed": 1}
        assert outbox.rows("SELECT value FROM mine") == [("yes",)] and outbox.status() == {"summary": "2026-05-06"}
        assert not outbox.put([entry("sent", picture=b"sent")])[0].new


def test_salvage_loses_no_entry_for_pictures_that_cannot_be_read(spool: Path) -> None:
    with contextlib.closing(Outbox(spool)) as outbox:
        outbox.put([entry(name, picture=name.encode() * 50_000) for name in "abcdefgh"])
    data = bytearray(spool.read_bytes())
    place = data.find(b"d" * 1000)
    data[place - 8192 : place + 8192] = os.urandom(16384)
    spool.write_bytes(data)
    with contextlib.closing(Outbox(spool)) as outbox:
        found = pictures(outbox)
        assert list(found) == list("abcdefgh")
        assert sum(picture is not None for picture in found.values()) >= 4
        assert all(picture in (None, name.encode() * 50_000) for name, picture in found.items())


def test_what_was_in_deliveries_that_cannot_be_read_waits_again(spool: Path) -> None:
    with contextlib.closing(Outbox(spool)) as outbox:
        outbox.put([entry("a"), entry("b")])
        create(outbox, "a")
        outbox._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (root,) = outbox._db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'deliveries'").fetchone()
        page_bytes = smtp.pragma(outbox._db, "page_size")
    with spool.open("r+b") as file:
        file.seek((root - 1) * page_bytes)
        file.write(os.urandom(page_bytes))
    with contextlib.closing(Outbox(spool)) as outbox:
        assert ids(outbox) == ["a", "b"]
        finish(outbox, *create(outbox))
        assert outbox.counts() == {"queued": 0, "sent": 2, "failed": 0}


def test_damage_while_running_is_repaired(spool: Path) -> None:
    with contextlib.closing(Outbox(spool)) as outbox:
        outbox.put([entry(f"id-{n}", b"x" * 600) for n in range(200)])
        outbox._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        outbox._db.execute("PRAGMA cache_size=0")
        with spool.open("r+b") as file:
            file.seek(4096)
            file.write(os.urandom(spool.stat().st_size - 4096))
        with pytest.raises(SpoolError):
            for number in range(10):
                ids(outbox)
                outbox.put([entry(f"more-{number}")])
        assert outbox.put([entry("after")])[0].new
        assert "after" in ids(outbox)


def test_an_entry_and_a_picture_that_rot_are_noticed(outbox: Outbox, caplog: pytest.LogCaptureFixture) -> None:
    outbox.put([entry("a"), entry("b", picture=b"picture")])
    first, second = create(outbox)
    with outbox.transaction() as db:
        db.execute("UPDATE entries SET payload = ? WHERE id = 'a'", (b"hellO",))
        db.execute("UPDATE pictures SET data = ?", (b"picturE",))
    with pytest.raises(smtp.Damaged):
        outbox.load(first)
    (loaded,) = outbox.load(second)
    assert loaded.picture() is None and "picture of entry 2 is damaged and is left out" in caplog.text


def test_a_picture_dropped_in_flight_is_no_damage(outbox: Outbox, caplog: pytest.LogCaptureFixture) -> None:
    outbox.put([entry("a", picture=b"picture")])
    (delivery,) = create(outbox)
    (loaded,) = outbox.load(delivery)
    outbox.drop("a")
    assert loaded.picture() is None and not caplog.records


@pytest.mark.skipif(os.name == "nt", reason="what is open cannot be removed there")
@pytest.mark.parametrize("how", ["file", "all", "folder", "replaced", "moved"])
def test_a_spool_that_was_removed_accepts_nothing_and_still_sends_what_waits(
    spool: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    with contextlib.closing(Outbox(spool)) as outbox:
        outbox.put([entry("sending", picture=b"picture"), entry("waiting")])
        deliveries = create(outbox, "sending")
        if how == "folder":
            shutil.rmtree(spool.parent)
        elif how == "moved":
            spool.parent.rename(spool.parent.with_name("elsewhere"))
        else:
            for path in list(spool.parent.iterdir()) if how == "all" else [spool]:
                path.unlink()
        if how == "replaced":
            sqlite3.connect(spool).close()
            spool.touch()
        for number in range(3):
            with pytest.raises(SpoolError, match="removed or replaced"):
                outbox.put([entry(f"new-{number}")])
        with pytest.raises(SpoolError), outbox.transaction() as db:
            outbox.add(db, entry("new"))
        (words,) = [record.getMessage() for record in caplog.records]
        assert "nothing new is accepted" in words and "only when" in words
        deliveries += create(outbox)
        assert [loaded.picture() for loaded in outbox.load(deliveries[0])] == [b"picture"]
        finish(outbox, *deliveries, now=time.time())
        outbox.publish_status(pauses={})
        outbox.prune(time.time())
        assert outbox.counts() == {"queued": 0, "sent": 2, "failed": 0}


def test_a_disk_that_fails_in_a_commit_accepts_nothing_and_the_outcomes_stay(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox.put([entry("a")])
    (delivery,) = create(outbox)
    outbox.finish(delivery._replace(state="sent"), 0.0)

    class NoSync:
        """The database, with a disk that fails at each COMMIT."""

        def __init__(self, db: sqlite3.Connection) -> None:
            self._db = db

        def __getattr__(self, name: str) -> Any:
            return getattr(self._db, name)

        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if "COMMIT" in sql:
                raise sqlite3.OperationalError("disk I/O error")
            return self._db.execute(sql, *values)

    with monkeypatch.context() as patched:
        patched.setattr(outbox, "_db", NoSync(outbox._db))
        for attempt in (lambda: outbox.put([entry("b")]), outbox.flush, lambda: outbox.publish_status(x=1)):
            with pytest.raises(SpoolError):
                attempt()
    assert outbox.unwritten() == 1
    outbox.put([entry("c")])
    assert outbox.counts() == {"queued": 1, "sent": 1, "failed": 0} and ids(outbox) == ["c"]


# The version before

OLD_TABLES = """
CREATE TABLE items(seq INTEGER PRIMARY KEY, id TEXT, settled REAL);
CREATE TABLE mails(mail INTEGER PRIMARY KEY);
CREATE TABLE notes(name TEXT, value TEXT);
CREATE TABLE parameters(name TEXT, value TEXT);
INSERT INTO items VALUES (1, 'a', 5.0), (2, 'b', {settled});
INSERT INTO parameters VALUES ('relay1', 'on');
"""


def old_spool(spool: Path, settled: str) -> None:
    spool.parent.mkdir()
    with contextlib.closing(sqlite3.connect(spool)) as db:
        db.executescript(OLD_TABLES.format(settled=settled))
    for suffix in (".pictures", ".sent"):
        Path(f"{spool}{suffix}").write_bytes(b"x")


def test_tables_of_the_version_before_are_replaced_when_nothing_waits_in_them(spool: Path) -> None:
    old_spool(spool, "6.0")
    for _ in range(2):
        with contextlib.closing(Outbox(spool, schema="CREATE TABLE IF NOT EXISTS parameters(name, value);")) as outbox:
            outbox.put([entry("a")])
            assert ids(outbox) == ["a"]
            assert outbox.rows("SELECT * FROM parameters") == [("relay1", "on")]
    assert sorted(path.name for path in spool.parent.iterdir()) == ["alerts.db", "alerts.db.lock"]


def test_a_file_of_the_version_before_in_which_something_waits_is_left_as_it_is(spool: Path) -> None:
    old_spool(spool, "NULL")
    for _ in range(2):
        with pytest.raises(SpoolError, match=r"1 .*not sent; let that version send or drop"):
            Outbox(spool)
    with contextlib.closing(sqlite3.connect(spool)) as db:
        assert db.execute("SELECT count(*) FROM items WHERE settled IS NULL").fetchone() == (1,)
    assert Path(f"{spool}.pictures").exists()


# From entries to deliveries, and their end


def test_pending_pages_through_everything_in_order(outbox: Outbox) -> None:
    outbox.put([entry(str(n)) for n in range(101)])
    assert ids(outbox) == [str(n) for n in range(101)]
    assert [row.id for row in outbox.pending(after=99)] == ["99", "100"]
    assert [row.id for row in outbox.newest(2)] == ["100", "99"]


def test_all_recipients_of_a_message_are_created_in_one_commit(outbox: Outbox) -> None:
    outbox.put([entry("a"), entry("b"), entry("c")])
    said = statements(outbox)
    deliveries = outbox.create([DueMessage((1, 2), (ANN, BOB), "digest"), DueMessage((3,), (EVE,), "alert")], 5.0)
    assert said.count("COMMIT") == 1 and ids(outbox) == []
    assert [(one.kind, one.entries, one.recipient, one.recipients) for one in deliveries] == [
        ("digest", (1, 2), ANN, (ANN, BOB)), ("digest", (1, 2), BOB, (ANN, BOB)), ("alert", (3,), EVE, (EVE,)),
    ]  # fmt: skip
    assert [loaded.id for loaded in outbox.load(deliveries[0])] == ["a", "b"]


def test_what_was_dropped_after_planning_is_left_out(outbox: Outbox) -> None:
    outbox.put([entry("a"), entry("b"), entry("c")])
    outbox.drop("a")
    outbox.drop("c")
    (delivery,) = outbox.create([DueMessage((1, 2), (ANN,)), DueMessage((3,), (ANN,))], 0.0)
    assert delivery.entries == (2,)
    assert outbox.counts() == {"queued": 1, "sent": 0, "failed": 0}


def test_entries_for_whom_nobody_is_left_are_finished(outbox: Outbox) -> None:
    outbox.put([entry("a", picture=b"picture")])
    assert create(outbox, to=()) == []
    assert outbox.counts() == {"queued": 0, "sent": 1, "failed": 0}
    assert outbox.rows("SELECT count(*) FROM pictures") == [(0,)]


@pytest.mark.parametrize(
    ("states", "ended"),
    [
        (("sent", "sent"), "sent"), (("sent", "open"), "queued"), (("failed", "open"), "queued"),
        (("failed", "sent"), "failed"), (("sent", "failed"), "failed"), (("failed", "failed"), "failed"),
    ],
)  # fmt: skip
def test_an_entry_ends_with_the_last_of_its_deliveries(outbox: Outbox, states: tuple[str, str], ended: str) -> None:
    outbox.put([entry("a")])
    for delivery, state in zip(create(outbox, to=(ANN, BOB)), states, strict=True):
        finish(outbox, delivery, state=state)
    assert outbox.counts() == {"queued": 0, "sent": 0, "failed": 0} | {ended: 1}


def test_outcomes_are_written_with_the_next_commit_whatever_it_is_for(outbox: Outbox) -> None:
    outbox.put([entry(str(n)) for n in range(20)])
    deliveries = create(outbox)
    said = statements(outbox)
    for delivery in deliveries:
        outbox.finish(delivery._replace(state="sent"), 0.0)
    assert said == [] and outbox.unwritten() == 20
    assert [result.new for result in outbox.put([entry("3"), entry("new")])] == [False, True]
    assert said.count("COMMIT") == 1 and outbox.unwritten() == 0
    assert outbox.counts() == {"queued": 1, "sent": 20, "failed": 0}


def test_what_ended_without_being_written_is_neither_due_nor_dropped_nor_counted(outbox: Outbox) -> None:
    outbox.put([entry("a"), entry("b")])
    first, second = create(outbox)
    outbox.finish(first._replace(state="sent"), 0.0)
    assert outbox.due(1.0, (), (), 9, 9)[0] == [second]
    assert outbox.least_recently_tried(ANN, 1.0) == second
    assert outbox.drop() == (0, 1)
    assert outbox.counts() == {"queued": 0, "sent": 1, "failed": 0}


OWNER = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import smtp_module as smtp
outbox = smtp.Outbox(sys.argv[1])
outbox.put([smtp.NewEntry(name, "MOTION", "yard", name.encode()) for name in "abc"])
deliveries = outbox.create([smtp.DueMessage((row.seq,), ("ann@x.org",)) for row in outbox.pending()], 0.0)
outbox.finish(deliveries[0]._replace(state="sent"), 5.0)
outbox.flush()
outbox.finish(deliveries[1]._replace(state="sent"), 5.0)
os._exit(9)
"""


def test_a_kill_repeats_only_what_was_not_written_as_the_same_message(spool: Path) -> None:
    subprocess.run([sys.executable, "-c", OWNER, str(spool)], check=False)
    with contextlib.closing(Outbox(spool)) as outbox:
        assert outbox.counts() == {"queued": 2, "sent": 1, "failed": 0}
        deliveries, _ = outbox.due(1.0, (), (), 9, 9)
        assert [(one.number, one.entries, one.recipients) for one in deliveries] == [(2, (2,), (ANN,)), (3, (3,), (ANN,))]
        assert [loaded.payload for loaded in outbox.load(deliveries[0])] == [b"b"]


def test_due_deliveries_are_untried_first_and_tell_when_to_ask_again(outbox: Outbox) -> None:
    outbox.put([entry(name) for name in "abcd"])
    a, b, c, d = create(outbox)
    finish(outbox, a, state="open", next_try=5.0, tried_at=1.0)
    finish(outbox, b, state="open", next_try=50.0, tried_at=1.0)
    found, again = outbox.due(10.0, (), (), 9, 9)
    assert [one.number for one in found] == [c.number, d.number, a.number] and again == 50.0
    found, again = outbox.due(10.0, {c.number}, (), 9, 0)
    assert [one.number for one in found] == [d.number] and again <= 11.0, "no room for what was tried before"
    assert outbox.due(10.0, (), {ANN}, 9, 9) == ([], float("inf"))


def test_a_step_of_the_clock_moves_the_times_of_open_deliveries(outbox: Outbox) -> None:
    outbox.put([entry("a")])
    (delivery,) = create(outbox)
    finish(outbox, delivery, state="open", next_try=100.0, tried_at=1.0, first_failed=1.0)
    outbox.shift_times(-1e9, 1e9, -50.0)
    ((moved,), _) = outbox.due(60.0, (), (), 9, 9)
    assert moved.first_failed == -49.0 and outbox.due(40.0, (), (), 9, 9) == ([], 50.0)


def test_the_budget_counts_deliveries_of_a_day_and_open_ones_never_tried(outbox: Outbox) -> None:
    now = 10 * DAY_S
    outbox.put([entry(str(n)) for n in range(8)])
    old, sent, ahead, future, failed, tried, *_ = create(outbox)
    for delivery, when in ((old, now - DAY_S), (sent, now - 5), (ahead, now + 3600), (future, now + 2 * DAY_S)):
        finish(outbox, delivery, now=when)
    finish(outbox, failed, state="failed", now=now - 5)
    finish(outbox, tried, state="open", tried_at=now - 5)
    assert outbox.budget(now, 9) == ([now - 5, now + 3600], 2)
    assert outbox.budget(now, 1) == ([now + 3600], 2)


def test_history_tells_when_a_message_of_each_group_and_kind_was_last_created(outbox: Outbox) -> None:
    outbox.put([entry("a"), entry("b"), NewEntry("c", "DOOR", "hall", b"x")])
    for number, (when, kind) in enumerate(((10.0, "alert"), (20.0, "digest"), (30.0, "alert")), 1):
        outbox.create([DueMessage((number,), (ANN,), kind)], when)
    history = outbox.history(15.0)
    assert history.groups == {("MOTION", "yard"): 20.0, ("DOOR", "hall"): 30.0}
    assert history.kinds == {"digest": 20.0, "alert": 30.0}


# What was refused or failed is reported once


def test_failures_are_reported_by_a_mail_that_was_sent(outbox: Outbox) -> None:
    outbox.put([entry(str(n)) for n in range(4)])
    first, second, third, fourth = create(outbox)
    finish(outbox, first, state="failed", error="550 no")
    finish(outbox, second, state="open", error="550 never", refused=True, next_try=9.0)
    assert outbox.unreported() == ((1, 2), f"{ANN}: 550 no; {ANN}: 550 never")
    assert outbox.unreported(but=(1,)) == ((2,), f"{ANN}: 550 never")
    finish(outbox, third, state="open", error="450 later", reports=(1, 2))
    assert outbox.unreported()[0] == (1, 2), "that mail did not go out"
    finish(outbox, fourth, reports=(1, 2))
    assert outbox.unreported() == ((), "")


def test_a_refusal_that_is_over_is_not_reported(outbox: Outbox) -> None:
    outbox.put([entry("a")])
    (delivery,) = create(outbox)
    refused = delivery._replace(error="550 no", tries=1)
    finish(outbox, refused, state="open", refused=True)
    finish(outbox, refused)
    assert outbox.unreported() == ((), "")


# Retry, drop, changed recipients


def test_who_was_served_adds_up_over_the_lives_of_an_entry(outbox: Outbox) -> None:
    outbox.put([entry("a")])
    for recipients, states, served in (
        ((ANN, BOB), ("sent", "failed"), {ANN}),
        ((BOB, EVE), ("failed", "failed"), {ANN}),
        ((BOB, EVE), ("failed", "sent"), {ANN, EVE}),
    ):
        for delivery, state in zip(create(outbox, to=recipients), states, strict=True):
            finish(outbox, delivery, state=state, error="550 no")
        assert outbox.counts()["failed"] == 1
        assert outbox.retry("a") == (1, 0)
        (row,) = outbox.pending()
        assert row.served == served
    finish(outbox, *create(outbox, to=(BOB,)))
    assert outbox.counts() == {"queued": 0, "sent": 1, "failed": 0}


def test_retry_lets_also_those_wait_again_who_failed_while_others_are_still_tried(outbox: Outbox) -> None:
    outbox.put([entry("a")])
    to_ann, to_bob = create(outbox, to=(ANN, BOB))
    finish(outbox, to_ann, state="failed", error="550 no")
    finish(outbox, to_bob, state="open", next_try=99.0)
    outbox.retry("a")
    (row,) = outbox.pending()
    assert row.served == {BOB}
    finish(outbox, *create(outbox, to=(ANN,)), to_bob)
    assert outbox.counts() == {"queued": 0, "sent": 1, "failed": 0}


def test_retry_makes_open_deliveries_due_and_counts_what_it_did(outbox: Outbox) -> None:
    outbox.put([entry("failed"), entry("later"), entry("other"), entry("waiting")])
    finish(outbox, *create(outbox, "failed"), state="failed")
    later, other = create(outbox, "later", "other")
    finish(outbox, later, other, state="open", next_try=99.0)
    assert outbox.retry("later") == (0, 1)
    assert [one.number for one in outbox.due(1.0, (), (), 9, 9)[0]] == [later.number]
    assert outbox.retry() == (1, 3)
    assert len(outbox.due(1.0, (), (), 9, 9)[0]) == 2
    assert ids(outbox) == ["failed", "waiting"]
    assert outbox.retry("nobody") == (0, 0)


def test_drop_ends_entries_and_their_open_deliveries(outbox: Outbox) -> None:
    outbox.put([entry(name, picture=b"x") for name in ("waiting", "later", "failed", "digest-1", "digest-2", "sent")])
    finish(outbox, *create(outbox, "failed"), state="failed")
    finish(outbox, *create(outbox, "sent"))
    finish(outbox, *create(outbox, "later"), state="open", next_try=99.0)
    (digest,) = outbox.create([DueMessage((4, 5), (ANN,))], 0.0)
    assert outbox.drop("digest-1") == (0, 1)
    assert [loaded.id for loaded in outbox.load(digest)] == ["digest-2"]
    assert [one.number for one in outbox.due(9.0, (), (), 9, 9)[0]] == [digest.number]
    assert outbox.drop() == (1, 3)
    assert outbox.counts() == {"queued": 0, "sent": 1, "failed": 0}
    assert outbox.due(999.0, (), (), 9, 9)[0] == [] and outbox.load(digest) == []
    assert outbox.rows("SELECT count(*) FROM pictures") == [(0,)]
    assert outbox.retry() == (0, 0)


def test_what_was_dropped_in_flight_stays_dropped(outbox: Outbox) -> None:
    outbox.put([entry("a")])
    (delivery,) = create(outbox)
    outbox.drop("a")
    finish(outbox, delivery, state="open", next_try=0.0)
    assert outbox.due(9.0, (), (), 9, 9)[0] == [] and outbox.counts()["queued"] == 0


def test_who_is_a_recipient_again_was_not_served_by_a_delivery_that_was_voided(outbox: Outbox) -> None:
    outbox.put([entry("a")])
    to_ann, _ = create(outbox, to=(ANN, BOB))
    finish(outbox, to_ann, state="failed", error="550 no")
    outbox.retry()
    assert outbox.void_changed(lambda kind, source: (ANN,)) == 1
    (row,) = outbox.pending()
    assert row.served == frozenset()


def test_an_open_delivery_to_a_former_recipient_is_planned_anew_and_nobody_gets_it_twice(outbox: Outbox) -> None:
    outbox.put([entry("a"), entry("b")])
    deliveries = create(outbox, to=(ANN, BOB, EVE))
    sent, _, kept, *_ = deliveries
    finish(outbox, sent)
    assert outbox.void_changed(lambda kind, source: (ANN, EVE, "new@x.org")) == 2
    a, b = outbox.pending()
    assert (a.served, b.served) == ({ANN, EVE}, {ANN, EVE})
    created = create(outbox, to=("new@x.org",))
    finish(outbox, *created, kept, deliveries[3], deliveries[5])
    assert outbox.counts() == {"queued": 0, "sent": 2, "failed": 0}


# The queue as others see it


def test_the_queue_is_read_without_writing_while_in_use_and_after(spool: Path) -> None:
    with contextlib.closing(Outbox(spool)) as outbox:
        outbox.put([entry("a")])
        assert [row["id"] for row in smtp.read_queue(spool)] == ["a"]
    before = sorted(path.name for path in spool.parent.iterdir())
    assert [row["id"] for row in smtp.read_queue(spool)] == ["a"]
    assert sorted(path.name for path in spool.parent.iterdir()) == before


def test_the_queue_of_a_killed_owner_can_be_read(spool: Path) -> None:
    subprocess.run([sys.executable, "-c", OWNER, str(spool)], check=False)
    assert [row["id"] for row in smtp.read_queue(spool)] == ["b", "c"]


def test_who_reads_the_spool_delays_nobody(outbox: Outbox) -> None:
    outbox.put([entry("a", picture=bytes(100_000))])
    with contextlib.closing(sqlite3.connect(outbox.path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM entries").fetchall()
        began = time.monotonic()
        outbox._empty_log()
        finish(outbox, *create(outbox))
        assert time.monotonic() - began < smtp.BUSY_S / 2
    assert smtp.pragma(outbox._db, "busy_timeout") == smtp.BUSY_S * 1000


def test_reading_a_queue_that_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SpoolError, match="no such spool"):
        smtp.read_queue(tmp_path / "nothing.db")
    (tmp_path / "text.db").write_text("not a database, but long enough to be looked at" * 20)
    with pytest.raises(SpoolError):
        smtp.read_queue(tmp_path / "text.db")


def test_the_queue_shows_an_entry_with_the_recipients_who_have_not_got_it(outbox: Outbox) -> None:
    outbox.put([entry(name, arrived=60.0) for name in ("sending", "failed", "waiting", "sent")])
    finish(outbox, *create(outbox, "sent"))
    sent, busy, later = create(outbox, "sending", to=(ANN, BOB, EVE))
    finish(outbox, sent)
    finish(outbox, busy, state="open", next_try=120.0, error="450 busy")
    finish(outbox, later, state="open", next_try=180.0, error="450 busy")
    sent, refused = create(outbox, "failed", to=(ANN, BOB))
    finish(outbox, sent)
    finish(outbox, refused, state="failed", error="550 no")
    outbox.publish_status(recipients={"MOTION yard": [ANN]})
    shared = {"group": "MOTION yard", "since": "1970-01-01T00:01:00Z"}
    assert smtp.read_queue(outbox.path) == [
        {"id": "sending", "state": "waiting", "next": "1970-01-01T00:02:00Z", "tries": 1, "error": "450 busy",
         "recipients": [BOB, EVE], **shared},
        {"id": "failed", "state": "failed", "next": None, "tries": 1, "error": f"{BOB}: 550 no",
         "recipients": [BOB], **shared},
        {"id": "waiting", "state": "waiting", "next": None, "tries": 0, "error": None,
         "recipients": [ANN], **shared},
    ]  # fmt: skip


# All of it in any order


def test_every_entry_is_its_own_whatever_comes_goes_and_starts_anew(spool: Path) -> None:
    chance = random.Random(5)
    there: dict[str, bytes | None] = {}
    number = 0
    for _ in range(6):
        with contextlib.closing(Outbox(spool)) as outbox:
            for _ in range(10):
                new = {f"n{number + k}": chance.randbytes(chance.choice((0, 10, 500, 20_000))) or None for k in range(4)}
                number += 4
                outbox.put([entry(name, name.encode(), picture) for name, picture in new.items()])
                there |= new
                gone = chance.sample(sorted(there), chance.randrange(len(there)))
                create(outbox, *gone[2:])
                for delivery in outbox.due(9.0, (), (), 999, 999)[0]:
                    if outbox.load(delivery)[0].id in gone[2:]:
                        finish(outbox, delivery)
                for name in gone[:2]:
                    outbox.drop(name)
                there = {name: picture for name, picture in there.items() if name not in gone}
            assert outbox.counts()["queued"] == len(there)
            loaded = [one for delivery in outbox.due(9.0, (), (), 999, 999)[0] for one in outbox.load(delivery)]
            found = {one.id: one.picture() for one in loaded} | pictures(outbox)
            assert found == there
