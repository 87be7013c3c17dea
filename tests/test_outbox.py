"""The durable queue: what `put` has returned for is there, whatever happens to the process, the file or the disk."""

from __future__ import annotations

import contextlib
import errno
import itertools
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import smtp_module as smtp
from smtp_module import Draft, NewItem, Outbox, SpoolBusy, SpoolError, SpoolFull


def item(name: str, payload: bytes = b"hello", picture: bytes | None = None, **more: Any) -> NewItem:
    return NewItem(name, "lane", payload, picture, **more)


def ids(outbox: Outbox) -> list[str]:
    return [row.id for row in outbox.waiting()]


def count_commits(outbox: Outbox) -> list[str]:
    """Statements as SQLite runs them, from now on."""
    said: list[str] = []
    outbox._db.set_trace_callback(said.append)
    return said


def rot(spool: Path, what: bytes, into: bytes) -> None:
    """Change what stands in the file of pictures."""
    path = Path(f"{spool}.pictures")
    path.write_bytes(path.read_bytes().replace(what, into))


def shown(outbox: Outbox) -> dict[str, bytes | None]:
    """The pictures of all that waits, which is in mails afterwards."""
    mails = outbox.freeze([Draft((row.seq,), ("x@y.z",)) for row in outbox.waiting()], 0.0)
    return {loaded.id: loaded.picture() for mail in mails for loaded in outbox.load(mail)}


def kept(outbox: Outbox) -> dict[str, bytes | None]:
    """The pictures of all that is not over."""
    sql = "SELECT id, picture_sum, picture_at, picture_size FROM items WHERE settled IS NULL"
    places = {name: smtp.Place(*place) for name, *place in outbox.rows(sql)}
    return {name: outbox._pictures.read(place) if place.size else None for name, place in places.items()}


def send(outbox: Outbox, *names: str) -> None:
    """Freeze these and settle them as sent, on disk only with the next durable commit."""
    rows = [row for row in outbox.waiting() if row.id in names]
    for mail in outbox.freeze([Draft((row.seq,), ("x@y.z",)) for row in rows], 0.0):
        outbox.settle(smtp.conclude(mail, {"x@y.z": smtp.Outcome(smtp.Verdict.SENT, 250)}, 0.0, 1.0, 9.0), 0.0)
    outbox.flush()


@pytest.fixture
def outbox(spool: Path) -> Iterator[Outbox]:
    with contextlib.closing(Outbox(spool)) as opened:
        yield opened


# putting


def test_what_was_put_is_there_after_a_new_start(spool: Path) -> None:
    with contextlib.closing(Outbox(spool)) as outbox:
        assert [r.new for r in outbox.put([item("a"), item("b")])] == [True, True]
    with contextlib.closing(Outbox(spool)) as outbox:
        assert ids(outbox) == ["a", "b"]
        assert outbox.counts() == {"queued": 2, "sent": 0, "failed": 0}


def test_what_is_over_is_freed_and_not_written_over(outbox: Outbox) -> None:
    outbox.put([item("a", picture=bytes(1_000_000))])
    outbox.settle(outbox.freeze([Draft((1,), ("ann@x.org",))], 1.0)[0]._replace(state=smtp.SENT), 2.0)
    outbox._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    outbox.flush()
    assert os.path.getsize(f"{outbox.path}-wal") < 200_000


def test_it_is_synchronous_and_this_is_read_back(outbox: Outbox) -> None:
    assert smtp.pragma(outbox._db, "synchronous") == 2
    assert outbox._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    outbox.note(x=1)  # a commit that need not be on disk
    said = count_commits(outbox)
    outbox.put([item("a")])
    assert said.index("PRAGMA synchronous=FULL") < said.index("COMMIT")


def test_threads_share_commits_and_each_gets_its_own_receipts(outbox: Outbox) -> None:
    said = count_commits(outbox)
    wrong: list[str] = []
    gate = threading.Barrier(8)

    def put(thread: int) -> None:
        gate.wait()
        for number in range(50):
            names = [f"{thread}-{number}-{k}" for k in range(3)]
            if [(r.id, r.new) for r in outbox.put([item(name) for name in names])] != [(name, True) for name in names]:
                wrong.append(names[0])

    with outbox._lock:  # what gathers behind a commit goes into the next one
        threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        while len(outbox._gathered) < 8:
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(set(ids(outbox))) == 8 * 50 * 3
    assert said.count("COMMIT") <= 8 * 50 - 7


def test_one_item_that_cannot_be_stored_costs_only_itself(outbox: Outbox) -> None:
    results: dict[str, object] = {}

    def put(name: str) -> None:
        try:
            results[name] = outbox.put([item(name)])[0].new
        except Exception as error:
            results[name] = type(error)

    names = ["good-1", "bad\ud800", "good-2"]
    with outbox._lock:
        threads = [threading.Thread(target=put, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        while len(outbox._gathered) < 3:
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert results == {"good-1": True, "bad\ud800": UnicodeEncodeError, "good-2": True}


@pytest.mark.parametrize("picture", [None, b"picture"])
def test_the_same_again_is_a_duplicate(outbox: Outbox, picture: bytes | None) -> None:
    outbox.put([item("a", b"one", picture)])
    assert outbox.put([item("a", b"one", picture)]) == [smtp.Receipt("a", new=False)]
    assert outbox.counts()["queued"] == 1


def test_the_same_twice_in_one_batch_is_a_duplicate(outbox: Outbox) -> None:
    assert [r.new for r in outbox.put([item("a"), item("a")])] == [True, False]


@pytest.mark.parametrize(
    "other",
    [item("a", b"two"), item("a", b"one", b"picture"), item("a", b"", b"one")],
    ids=["payload", "picture", "moved"],
)
def test_the_same_id_with_other_content_gets_a_suffix_and_is_known_again(outbox: Outbox, other: NewItem) -> None:
    outbox.put([item("a", b"one")])
    (first,), (again,) = outbox.put([other]), outbox.put([other])
    assert first.new and first.id.startswith("a-") and not again.new
    assert again.id == first.id
    assert ids(outbox) == ["a", first.id]


def test_a_long_id_with_a_suffix_stays_within_128_characters(outbox: Outbox) -> None:
    name = "x" * 128
    (_, changed) = outbox.put([item(name, b"one"), item(name, b"two")])
    assert changed.new and len(changed.id) == 128 and changed.id != name


def test_no_number_is_given_twice(spool: Path) -> None:
    for expected in (1, 3, 5):  # a courier that has seen row 2 looks for rows beyond it
        with contextlib.closing(Outbox(spool)) as outbox:
            outbox.put([item("a"), item("b")])
            assert [row.seq for row in outbox.waiting()] == [expected, expected + 1]
            send_all(outbox)
            assert [number for (number,) in outbox.rows("SELECT mail FROM mails")] == [expected, expected + 1]
            assert outbox.prune(time.time() + 2 * smtp.MEMORY_S) == 2


def test_a_settled_id_is_remembered_and_forgotten_after_seven_days(outbox: Outbox) -> None:
    outbox.put([item("a"), item("b"), item("c")])
    outbox.drop("a")
    now = time.time()
    send_all(outbox, now)
    assert outbox.counts() == {"queued": 0, "sent": 2, "failed": 0}
    outbox.prune(now + smtp.MEMORY_S - 10)
    assert [r.new for r in outbox.put([item("a"), item("b")])] == [False, False]
    assert outbox.prune(now + smtp.MEMORY_S + 10) == 3
    assert outbox.counts() == {"queued": 0, "sent": 0, "failed": 0}
    assert [r.new for r in outbox.put([item("a"), item("b")])] == [True, True]


def send_all(outbox: Outbox, now: float = 0.0) -> None:
    for mail in outbox.freeze([Draft((row.seq,), ("x@y.z",)) for row in outbox.waiting()], now):
        outbox.settle(smtp.conclude(mail, {"x@y.z": smtp.Outcome(smtp.Verdict.SENT, 250)}, now, 1.0, 9.0), now)
    outbox.flush()


def test_settled_rows_lose_their_payload(outbox: Outbox) -> None:
    outbox.put([item("a", b"secret")])
    send_all(outbox)
    assert outbox.rows("SELECT payload FROM items") == [(None,)]


@pytest.mark.parametrize("bulk", [(b"x" * 20_000, None), (b"x", b"x" * 20_000)], ids=["payload", "picture"])
def test_a_full_spool_refuses_and_takes_again_when_there_is_room(
    spool: Path, bulk: tuple[bytes, bytes | None]
) -> None:
    with contextlib.closing(Outbox(spool, size_max=400_000)) as outbox:
        with pytest.raises(SpoolFull):
            for number in range(100):
                outbox.put([item(str(number), *bulk)])
        assert 10 < len(ids(outbox)) < 20
        send_all(outbox)
        assert outbox.put([item("again", *bulk)])[0].new


def test_what_is_too_big_for_the_spool_costs_only_itself(spool: Path) -> None:
    with contextlib.closing(Outbox(spool, size_max=400_000)) as outbox:
        results: list[object] = []

        def put(payload: bytes) -> None:
            try:
                results.append(outbox.put([item(str(len(payload)), payload)])[0].new)
            except SpoolFull:
                results.append("full")

        with outbox._lock:
            threads = [threading.Thread(target=put, args=(b"x" * n,)) for n in (1000, 500_000, 1001)]
            for thread in threads:
                thread.start()
            while len(outbox._gathered) < 3:
                time.sleep(0.001)
        for thread in threads:
            thread.join()
        assert sorted(map(str, results)) == ["True", "True", "full"]


def test_a_disk_that_is_nearly_full_is_not_filled(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(total=10**9, free=smtp.DISK_RESERVE_BYTES - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SpoolFull):
        outbox.put([item("a")])


def test_what_stands_in_the_log_needs_its_room_again_and_is_cleared_before_anything_is_refused(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox.put([item("a", b"x" * 100_000)])
    log = Path(f"{outbox.path}-wal")
    assert log.stat().st_size > 100_000
    outbox._room_until = 0.0
    usage = shutil.disk_usage("/")._replace(total=1_000_000, free=100_000)  # 50,000 of it are kept for bookkeeping
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert outbox.put([item("b", b"x" * 20_000)])[0].new
    assert log.stat().st_size < 100_000
    with pytest.raises(SpoolFull):
        outbox.put([item("c", b"x" * 30_000)])


def test_a_database_that_cannot_grow_says_full_and_goes_on_sending(outbox: Outbox) -> None:
    outbox.put([item("a", b"x" * 50_000)])
    outbox._db.execute(f"PRAGMA max_page_count={smtp.pragma(outbox._db, 'page_count') + 2}")
    with pytest.raises(SpoolFull):
        outbox.put([item("b", b"x" * 50_000)])
    assert outbox.counts()["queued"] == 1
    send_all(outbox)
    assert outbox.put([item("b", b"x" * 50_000)])[0].new


def test_a_failed_transaction_leaves_nothing_and_the_counts_right(outbox: Outbox) -> None:
    with pytest.raises(ValueError, match="changed my mind"), outbox.transaction() as db:
        assert outbox.add(db, item("a")).new
        raise ValueError("changed my mind")
    assert ids(outbox) == [] and outbox.counts()["queued"] == 0
    with outbox.transaction() as db:
        assert outbox.add(db, item("a")).new and not outbox.add(db, item("a")).new
    assert outbox.counts()["queued"] == 1


# one owner; readable by the owner alone


def test_a_second_owner_is_refused_and_the_lock_ends_with_the_process(spool: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import smtp_module, time\n"
    code += f"smtp_module.Outbox({str(spool)!r}); print('open', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "open\n"
        with pytest.raises(SpoolBusy):
            Outbox(spool)
        other.kill()
    Outbox(spool).close()


@pytest.mark.skipif(os.name == "nt", reason="what is open cannot be removed there")
def test_a_second_owner_is_refused_though_the_lock_was_removed(outbox: Outbox) -> None:
    outbox.put([item("a", picture=b"picture")])
    Path(f"{outbox.path}.lock").unlink()
    with pytest.raises(SpoolBusy):
        Outbox(outbox.path)
    assert outbox.put([item("b", picture=b"another")])[0].new
    assert shown(outbox) == {"a": b"picture", "b": b"another"}


def test_a_start_that_fails_leaves_nothing_open(spool: Path) -> None:
    Outbox(spool).close()
    Path(f"{spool}.sent").unlink()
    Path(f"{spool}.sent").mkdir()
    with pytest.raises(SpoolError):
        Outbox(spool)
    Path(f"{spool}.sent").rmdir()
    Outbox(spool).close()


def test_closing_twice_is_harmless_and_frees_the_spool(spool: Path) -> None:
    outbox = Outbox(spool)
    outbox.close()
    outbox.close()
    with pytest.raises(SpoolError):
        outbox.put([item("a")])
    Outbox(spool).close()


def test_the_files_are_their_owners_alone(spool: Path) -> None:
    with contextlib.closing(Outbox(spool)) as outbox:
        outbox.put([item("a")])
        assert {stat.S_IMODE(path.stat().st_mode) for path in spool.parent.iterdir()} == {0o600}
        assert stat.S_IMODE(spool.parent.stat().st_mode) == 0o700


def test_a_spool_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError):
        Outbox(tmp_path / "file" / "alerts.db")


# damage and loss


def damaged_spool(spool: Path, number: int = 200) -> None:
    with contextlib.closing(Outbox(spool)) as outbox:
        outbox.put([item(f"id-{n}", b"x" * 600) for n in range(number)])


@pytest.mark.parametrize("damage", ["header", "page", "truncated"])
def test_a_damaged_spool_is_moved_aside_said_and_what_can_be_read_is_saved(
    spool: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    damaged_spool(spool)
    data = bytearray(spool.read_bytes())
    if damage == "header":
        data[:100] = bytes(100)
    elif damage == "page":
        data[len(data) // 2 : len(data) // 2 + 4096] = os.urandom(4096)
    else:
        del data[len(data) * 3 // 4 :]
    spool.write_bytes(data)
    with caplog.at_level(logging.ERROR), contextlib.closing(Outbox(spool)) as outbox:
        saved = ids(outbox)
        assert outbox.put([item("new")])[0].new
    assert "damaged" in caplog.text
    assert list(spool.parent.glob("alerts.db.damaged-*"))
    if damage == "page":
        assert 150 < len(saved) < 200


def test_a_large_spool_is_not_read_through_but_what_waits_is(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp, "CHECKED_MAX_BYTES", 0)
    damaged_spool(spool)
    data = bytearray(spool.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4096] = os.urandom(4096)
    spool.write_bytes(data)
    with contextlib.closing(Outbox(spool)) as outbox:
        assert 150 < len(ids(outbox)) < 200
        assert outbox.put([item("new")])[0].new


def test_an_emptied_spool_is_said_loudly(spool: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged_spool(spool)
    spool.write_bytes(b"")
    with caplog.at_level(logging.ERROR), contextlib.closing(Outbox(spool)) as outbox:
        assert ids(outbox) == []
    assert "was empty" in caplog.text


def test_salvage_keeps_failures_partial_deliveries_and_the_owners_tables(spool: Path) -> None:
    schema = "CREATE TABLE IF NOT EXISTS mine(name TEXT PRIMARY KEY, value TEXT);"
    with contextlib.closing(Outbox(spool, schema=schema)) as outbox:
        outbox.put([item("failed"), item("frozen"), item("waiting"), item("sent")])
        (failed, frozen, _, sent) = outbox.waiting()
        mails = outbox.freeze([Draft((row.seq,), ("a@x.y", "b@x.y")) for row in (failed, frozen, sent)], 0.0)
        for mail, verdict in zip(mails, ("REFUSED", "TRY_LATER", "SENT"), strict=True):
            outcomes = {"a@x.y": smtp.Outcome(smtp.Verdict.SENT), "b@x.y": smtp.Outcome(smtp.Verdict[verdict], 450)}
            outbox.settle(smtp.conclude(mail, outcomes, 0.0, 1.0, 9.0), 0.0)
            outbox.flush()
        with outbox.transaction() as db:
            db.execute("INSERT INTO mine VALUES ('kept', 'yes')")
    data = bytearray(spool.read_bytes())
    page = next(
        n for n in range(1, len(data) // 4096) if b"kept" not in data[n * 4096 :][:4096] and data[n * 4096] == 10
    )
    data[page * 4096 : page * 4096 + 8] = os.urandom(8)  # an index
    spool.write_bytes(data)
    with contextlib.closing(Outbox(spool, schema=schema)) as outbox:
        assert outbox.counts() == {"queued": 2, "sent": 1, "failed": 1}
        assert ids(outbox) == ["waiting"]
        (mail,) = outbox.due(5.0, 99.0, (), 9)
        assert (mail.recipients, mail.taken) == (("b@x.y",), ("a@x.y",))
        assert outbox.rows("SELECT value FROM mine") == [("yes",)]
        assert not outbox.put([item("sent")])[0].new


def test_damage_while_running_is_repaired(spool: Path, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(Outbox(spool)) as outbox:
        outbox.put([item(f"id-{n}", b"x" * 600) for n in range(200)])
        outbox._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        outbox._db.execute("PRAGMA cache_size=0")
        with spool.open("r+b") as file:
            file.seek(4096)
            file.write(os.urandom(spool.stat().st_size - 4096))
        with pytest.raises(SpoolError):
            for number in range(10):
                ids(outbox)
                outbox.put([item(f"more-{number}")])
        assert outbox.put([item("after")])[0].new
        assert "after" in ids(outbox)


@pytest.mark.parametrize("what", ["file", "all", "folder", "replaced"])
def test_a_spool_that_vanishes_while_in_use_is_written_anew_before_anything_is_acknowledged(
    spool: Path, what: str
) -> None:
    with contextlib.closing(Outbox(spool)) as outbox:
        outbox.put([item("before", picture=b"picture")])
        if what == "folder":
            shutil.rmtree(spool.parent)
        else:
            for path in [spool] if what != "all" else list(spool.parent.iterdir()):
                path.unlink()
        if what == "replaced":
            sqlite3.connect(spool).close()
            spool.touch()
        assert outbox.put([item("after")])[0].new
        with pytest.raises(SpoolBusy):
            Outbox(spool)
        assert {row["id"] for row in smtp.read_queue(spool)} == {"before", "after"}
    with contextlib.closing(Outbox(spool)) as outbox:
        assert ids(outbox) == ["before", "after"]
        assert outbox.put([item("later")])[0].new
        assert shown(outbox) == {"before": b"picture", "after": None, "later": None}


def test_a_rescue_that_fails_half_way_loses_nothing(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox.put([item("before")])
    outbox.path.unlink()

    def no_descriptors(self: Outbox) -> sqlite3.Connection:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(Outbox, "_open", no_descriptors)
        with pytest.raises(SpoolError):
            outbox.put([item("lost")])
    with contextlib.suppress(SpoolError):  # finds the closed database, and opens it
        outbox.put([item("after")])
    outbox.put([item("after")])
    assert ids(outbox) == ["before", "after"]


def test_a_row_that_rots_is_noticed(outbox: Outbox) -> None:
    outbox.put([item("a", b"hello", b"picture"), item("b", b"hello", b"picture")])
    mails = outbox.freeze([Draft((row.seq,), ("x@y.z",)) for row in outbox.waiting()], 0.0)
    with outbox.transaction() as db:
        db.execute("UPDATE items SET payload = ? WHERE id = 'a'", (b"hellO",))
    rot(outbox.path, b"picture", b"picturE")
    with pytest.raises(smtp.Damaged):
        outbox.load(mails[0])
    (loaded,) = outbox.load(mails[1])
    assert loaded.picture() is None


# pictures


def test_a_picture_dropped_in_flight_is_no_damage(outbox: Outbox, caplog: pytest.LogCaptureFixture) -> None:
    outbox.put([item("a", b"hello", b"picture")])
    (mail,) = outbox.freeze([Draft((row.seq,), ("x@y.z",)) for row in outbox.waiting()], 0.0)
    (loaded,) = outbox.load(mail)
    outbox.drop("a")
    outbox.put([item("b", picture=b"another")])
    assert loaded.picture() is None and not caplog.records


def test_a_place_is_used_again_only_when_the_end_of_its_row_is_surely_on_disk(outbox: Outbox) -> None:
    outbox.put([item("a", picture=b"a" * 100), item("b", picture=b"b" * 100)])
    send(outbox, "a")
    outbox.put([item("c", picture=b"c" * 100)])  # a power cut before its commit brings a back
    file = Path(f"{outbox.path}.pictures")
    assert file.read_bytes() == b"a" * 100 + b"b" * 100 + b"c" * 100
    outbox.put([item("d", picture=b"d" * 30), item("e", picture=b"e" * 70), item("f", picture=b"f")])
    assert file.read_bytes() == b"d" * 30 + b"e" * 70 + b"b" * 100 + b"c" * 100 + b"f"


def test_the_file_of_pictures_is_cut_off_behind_what_waits(outbox: Outbox) -> None:
    file = Path(f"{outbox.path}.pictures")
    outbox.put([item(name, picture=name.encode() * 100) for name in "abcd"])
    send(outbox, "b", "d")
    outbox.put([item("e")])
    assert file.read_bytes() == b"a" * 100 + b"b" * 100 + b"c" * 100
    send(outbox, "c")
    outbox.put([item("f")])
    assert file.read_bytes() == b"a" * 100
    outbox.drop()
    assert file.read_bytes() == b""


def test_the_places_of_failures_are_kept_and_those_of_duplicates_are_not(outbox: Outbox) -> None:
    outbox.put([item("a", picture=b"picture")])
    (mail,) = outbox.freeze([Draft((1,), ("x@y.z",))], 0.0)
    outbox.settle(smtp.conclude(mail, {"x@y.z": smtp.Outcome(smtp.Verdict.REFUSED, 550)}, 0.0, 1.0, 9.0), 0.0)
    assert [receipt.new for receipt in outbox.put([item("a", picture=b"picture")])] == [False]
    outbox.put([item("b", picture=b"another")])
    assert Path(f"{outbox.path}.pictures").read_bytes() == b"pictureanother"
    outbox.retry()
    assert shown(outbox) == {"a": b"picture", "b": b"another"}


def test_pictures_that_do_not_fit_on_the_disk_keep_nothing(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, file: int, at: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(smtp.Pictures, "_write", full)
        with pytest.raises(smtp.DiskFull):
            outbox.put([item("a", picture=b"picture")])
    outbox.put([item("b", picture=b"another")])
    assert shown(outbox) == {"b": b"another"}
    assert Path(f"{outbox.path}.pictures").read_bytes() == b"another"


def test_pictures_that_no_row_names_in_the_end_keep_no_room(outbox: Outbox) -> None:
    with pytest.raises(UnicodeEncodeError):
        outbox.put([item("bad\ud800", picture=b"picture")])
    assert os.path.getsize(f"{outbox.path}.pictures") == 0


def test_a_lost_file_of_pictures_costs_no_more_than_the_pictures(spool: Path, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(Outbox(spool)) as outbox:
        outbox.put([item("a", picture=b"picture")])
    Path(f"{spool}.pictures").unlink()
    with contextlib.closing(Outbox(spool)) as outbox:
        assert shown(outbox) == {"a": None}
    assert "the picture of row 1 is left out: damaged on disk" in caplog.text


@pytest.mark.parametrize("what", ["", ".pictures"])
def test_a_file_that_vanishes_while_it_is_written_anew_is_noticed(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    outbox.put([item("a", picture=b"picture")])
    path = Path(f"{outbox.path}{what}")
    path.unlink()
    owner, name = (smtp.Pictures, "_rescue") if what else (Outbox, "_recount")
    real = getattr(owner, name)

    def gone_again(*args: Any) -> None:
        real(*args)
        path.unlink()

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, gone_again)
        outbox.put([item("b")])
    outbox.put([item("c")])
    assert {row["id"] for row in smtp.read_queue(outbox.path)} == {"a", "b", "c"}
    assert Path(f"{outbox.path}.pictures").read_bytes() == b"picture"


def test_duplicates_keep_no_room(outbox: Outbox) -> None:
    for _ in range(5):
        outbox.put([item("a", picture=b"picture")])
    assert Path(f"{outbox.path}.pictures").read_bytes() == b"picture"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_a_file_of_pictures_that_cannot_grow_is_reclaimed_though_nothing_else_arrives(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def limited(file: int, data: bytes, at: int) -> int:
        if at + len(data) > 100:
            raise OSError(number, os.strerror(number))
        return os.pwrite(file, data, at)

    monkeypatch.setattr(smtp, "pwrite", limited)
    outbox.put([item("a", picture=b"a" * 100)])
    with pytest.raises(smtp.DiskFull):
        outbox.put([item("b", picture=b"b" * 100)])
    send(outbox, "a")
    assert outbox.put([item("b", picture=b"b" * 100)])[0].new


def test_what_a_killed_owner_left_behind_its_pictures_is_free(spool: Path) -> None:
    with contextlib.closing(Outbox(spool)) as outbox:
        outbox.put([item("a", picture=b"a" * 100)])
    with Path(f"{spool}.pictures").open("ab") as file:
        file.write(bytes(1000))
    with contextlib.closing(Outbox(spool)) as outbox:
        assert outbox._pictures.used() == 100
        outbox._reclaim()
        assert os.path.getsize(f"{spool}.pictures") == 100


def test_a_row_that_may_come_back_keeps_its_place(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit whose sync failed stands in the log, and counts after the end of the process."""
    outbox.put([item("a")])

    class NoSync:
        """The database, with a disk that fails at each COMMIT and checkpoint."""

        def __init__(self, db: sqlite3.Connection) -> None:
            self._db = db

        def __getattr__(self, name: str) -> Any:
            return getattr(self._db, name)

        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if "COMMIT" in sql or "checkpoint" in sql:
                raise sqlite3.OperationalError("disk I/O error")
            return self._db.execute(sql, *values)

    with monkeypatch.context() as patched:
        patched.setattr(outbox, "_db", NoSync(outbox._db))
        for name in "bc":
            with pytest.raises(SpoolError):
                outbox.put([item(name, picture=name.encode() * 100)])
    file = Path(f"{outbox.path}.pictures")
    assert file.read_bytes() == b"b" * 100 + b"c" * 100
    outbox.put([item("d", picture=b"d" * 100)])
    assert outbox._pictures.used() == 100
    assert kept(outbox) == {"a": None, "d": b"d" * 100}


def test_a_file_of_pictures_that_cannot_be_made_anew_costs_no_descriptor_and_no_room(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox.put([item("a", picture=b"picture")])
    file = Path(f"{outbox.path}.pictures")
    file.unlink()

    def full(source: object, copy: Any) -> None:
        copy.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfileobj", full)
        before = os.open(file.parent, os.O_RDONLY)
        for _ in range(3):
            with pytest.raises(smtp.DiskFull):
                outbox.put([item("b")])
        after = os.open(file.parent, os.O_RDONLY)
        for number in (before, after):
            os.close(number)
        assert after == before + 1 and not file.exists()
    outbox.put([item("b")])
    assert file.read_bytes() == b"picture"


@pytest.mark.parametrize("how", ["folder", "file", "replaced"])
def test_a_file_of_pictures_that_was_moved_away_is_written_anew(spool: Path, how: str) -> None:
    with contextlib.closing(Outbox(spool)) as outbox:
        outbox.put([item("a", picture=b"picture")])
        file = Path(f"{spool}.pictures")
        if how == "folder":
            spool.parent.rename(spool.parent.parent / "elsewhere")
        else:
            file.rename(spool.parent / "elsewhere")
        if how == "replaced":
            file.write_bytes(b"another")
        outbox.put([item("b", picture=b"more")])
    with contextlib.closing(Outbox(spool)) as outbox:
        assert shown(outbox) == {"a": b"picture", "b": b"more"}


@pytest.mark.parametrize("fails", [False, True])
def test_one_sync_does_for_all_pictures_that_were_written_and_so_does_its_failure(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    synced: list[int] = []
    said: list[object] = []
    real, pictures = smtp.sync, outbox._pictures

    def sync(file: int) -> None:
        synced.append(pictures._written)
        while len(synced) == 2 and pictures._written < 5:  # all others are written, while the second one syncs
            time.sleep(0.001)
        if fails and len(synced) == 3:
            raise OSError(5, "Input/output error")
        real(file)

    def put(name: str) -> None:
        try:
            said.append(outbox.put([item(name, picture=name.encode())])[0].new)
        except SpoolError:
            said.append("refused")

    monkeypatch.setattr(smtp, "sync", sync)
    put("first")
    threads = [threading.Thread(target=put, args=(name,)) for name in "bcde"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(synced) == 3
    assert sorted(map(str, said)) == ["True"] * 2 + ["refused"] * 3 if fails else ["True"] * 5
    put("later")
    assert said[-1] is True


def test_housekeeping_gives_back_the_room_of_pictures_though_nothing_comes(outbox: Outbox) -> None:
    outbox.put([item("a", picture=b"picture")])
    send(outbox, "a")
    outbox.prune(time.time())
    assert os.path.getsize(f"{outbox.path}.pictures") == 0


def leave_free(monkeypatch: pytest.MonkeyPatch, total: int, free: int) -> None:
    usage = shutil.disk_usage("/")._replace(total=total, free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_the_last_room_is_not_for_pictures_that_need_more_of_the_disk(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that failed may stand at the end of the file for ever, and keep the room before it from the rows."""
    outbox.put([item(name, picture=name.encode() * 10_000) for name in "ab"])
    leave_free(monkeypatch, 1_000_000, 90_000)  # 50,000 are kept for bookkeeping
    with pytest.raises(smtp.DiskFull):
        outbox.put([item("c", picture=b"c" * 10_000)])
    assert outbox.put([item("d")])[0].new
    send(outbox, "a")
    assert outbox.put([item("c", picture=b"c" * 10_000)])[0].new
    assert kept(outbox) == {"b": b"b" * 10_000, "c": b"c" * 10_000, "d": None}


def test_what_waits_goes_out_though_its_pictures_cannot_be_written_anew(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who runs out of disk removes the largest file; its room is free when the relay lets go of it."""
    outbox.put([item("a", picture=b"a" * 100_000)])
    Path(f"{outbox.path}.pictures").unlink()
    with monkeypatch.context() as full:
        leave_free(full, 1_000_000, 140_000)
        with pytest.raises(smtp.DiskFull):
            outbox.put([item("b")])
        assert shown(outbox) == {"a": b"a" * 100_000}
    assert outbox.put([item("b")])[0].new
    assert os.path.getsize(f"{outbox.path}.pictures") == 100_000


def test_who_reads_the_spool_delays_nobody(outbox: Outbox) -> None:
    outbox.put([item("a", picture=b"a" * 100)])
    with contextlib.closing(sqlite3.connect(outbox.path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM items").fetchall()
        send(outbox, "a")
        began = time.monotonic()
        outbox.prune(time.time())
        assert time.monotonic() - began < smtp.BUSY_S / 2
        assert os.path.getsize(f"{outbox.path}.pictures") == 100  # the end of its row is not surely on disk
    assert smtp.pragma(outbox._db, "busy_timeout") == smtp.BUSY_S * 1000
    outbox.prune(time.time())
    assert os.path.getsize(f"{outbox.path}.pictures") == 0


def test_the_log_leaves_room_for_the_database_on_a_small_disk(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that has taken the last of the disk cannot be written into the database, which has to grow for it."""
    leave_free(monkeypatch, 12 << 20, 4 << 20)
    with contextlib.closing(Outbox(spool)) as outbox:
        for number in range(100):
            outbox.put([item(str(number))])
            outbox.note(number=number)
        assert os.path.getsize(f"{spool}-wal") < (12 << 20) // 20 // 2


def test_every_picture_is_its_own_whatever_comes_goes_and_starts_anew(spool: Path) -> None:
    rng = random.Random(5)
    there: dict[str, bytes | None] = {}
    numbers = itertools.count()
    for _ in range(10):
        with contextlib.closing(Outbox(spool)) as outbox:
            for _ in range(20):
                new = {f"n{next(numbers)}": rng.randbytes(rng.choice((0, 10, 500))) or None for _ in range(4)}
                outbox.put([item(name, picture=picture) for name, picture in new.items()])
                there |= new
                gone = rng.sample(sorted(there), rng.randrange(len(there)))
                send(outbox, *gone[1:])
                for name in gone[:1]:
                    outbox.drop(name)
                there = {name: picture for name, picture in there.items() if name not in gone}
            assert kept(outbox) == there


# planning and settling


def test_what_was_dropped_after_planning_is_not_revived(outbox: Outbox) -> None:
    outbox.put([item("a"), item("b"), item("c")])
    a, b, c = outbox.waiting()
    outbox.drop("a")
    outbox.drop("c")
    mails = outbox.freeze([Draft((a.seq, b.seq), ("x@y.z",)), Draft((c.seq,), ("x@y.z",))], 0.0)
    assert [mail.items for mail in mails] == [(b.seq,)]
    assert outbox.counts() == {"queued": 1, "sent": 0, "failed": 0}


def test_waiting_pages_through_everything_in_order(outbox: Outbox) -> None:
    outbox.put([item(str(n)) for n in range(1001)])
    assert ids(outbox) == [str(n) for n in range(1001)]
    assert [row.id for row in outbox.waiting(after=999)] == ["999", "1000"]


def test_taken_recipients_add_up_over_the_lives_of_an_alert(outbox: Outbox) -> None:
    outbox.put([item("a")])
    no = smtp.Outcome(smtp.Verdict.REFUSED, 550)
    yes = smtp.Outcome(smtp.Verdict.SENT, 250)
    for recipients, outcomes, taken in (
        (("a@x.y", "b@x.y"), {"a@x.y": yes, "b@x.y": no}, {"a@x.y"}),
        (("b@x.y", "c@x.y"), {"b@x.y": no, "c@x.y": no}, {"a@x.y"}),
        (("b@x.y", "c@x.y"), {"b@x.y": no, "c@x.y": yes}, {"a@x.y", "c@x.y"}),
    ):
        (row,) = outbox.waiting()
        (mail,) = outbox.freeze([Draft((row.seq,), recipients)], 0.0)
        outbox.settle(smtp.conclude(mail, outcomes, 0.0, 1.0, 9.0), 0.0)
        outbox.flush()
        assert outbox.counts()["failed"] == 1
        assert outbox.retry("a") == 1
        (row,) = outbox.waiting()
        assert row.taken == taken


def test_counts_are_what_a_recount_says(outbox: Outbox) -> None:
    outbox.put([item(str(n)) for n in range(6)])
    rows = list(outbox.waiting())
    mails = outbox.freeze([Draft((row.seq,), ("x@y.z",)) for row in rows[:4]], 0.0)
    for mail, verdict in zip(mails, ("SENT", "REFUSED", "TRY_LATER"), strict=False):
        outbox.settle(smtp.conclude(mail, {"x@y.z": smtp.Outcome(smtp.Verdict[verdict], 1)}, 0.0, 1.0, 9.0), 0.0)
        outbox.flush()
    outbox.drop("5")
    expected = {"queued": 3, "sent": 1, "failed": 1}
    assert outbox.counts() == expected
    outbox._recount(outbox._db)
    assert outbox.counts() == expected


def test_failures_are_told_once_and_again_when_the_telling_mail_failed(outbox: Outbox) -> None:
    outbox.put([item(str(n)) for n in range(4)])
    rows = list(outbox.waiting())
    for row in rows[:2]:
        (mail,) = outbox.freeze([Draft((row.seq,), ("x@y.z",))], 0.0)
        refused = {"x@y.z": smtp.Outcome(smtp.Verdict.REFUSED, 550, "no")}
        outbox.settle(smtp.conclude(mail, refused, 0.0, 1.0, 9.0), 0.0)
        outbox.flush()
    # the second told of the first, and failed itself: both are untold
    assert outbox.untold() == (2, "x@y.z: 550 no")
    third, fourth = outbox.freeze([Draft((row.seq,), ("x@y.z",)) for row in rows[2:]], 0.0)
    assert (third.failed, third.why, fourth.failed) == (2, "x@y.z: 550 no", 0)
    outbox.settle(smtp.conclude(third, {"x@y.z": smtp.Outcome(smtp.Verdict.SENT, 250)}, 0.0, 1.0, 9.0), 0.0)
    outbox.flush()
    assert outbox.untold() == (0, "")


# what was sent, and not settled yet

OWNER = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import smtp_module as smtp
outbox = smtp.Outbox(sys.argv[1])
outbox.put([smtp.NewItem(name, "lane", b"x") for name in "abc"])
mails = outbox.freeze([smtp.Draft((row.seq,), ("x@y.z", "v@w.z")) for row in outbox.waiting()], 0.0)
said = {{name: smtp.Outcome(smtp.Verdict.SENT, 250) for name in mails[0].recipients}}
for mail in mails[:2]:
    outbox.settle(smtp.conclude(mail, said, 0.0, 1.0, 9.0), 5.0)
os._exit(9)
"""


def test_the_end_of_the_process_repeats_nothing_that_was_ticked_off(spool: Path) -> None:
    subprocess.run([sys.executable, "-c", OWNER, str(spool)], check=False)
    for _ in range(2):
        with contextlib.closing(Outbox(spool)) as outbox:
            assert outbox.counts() == {"queued": 1, "sent": 2, "failed": 0}
            assert [mail.number for mail in outbox.due(1.0, 9.0, (), 9)] == [3]
            assert outbox.rows("SELECT taken FROM mails WHERE mail = 1") == [('["x@y.z", "v@w.z"]',)]
    assert Path(f"{spool}.sent").read_bytes() == b""


def test_ticks_that_are_rubbish_or_of_other_mails_do_nothing(spool: Path) -> None:
    subprocess.run([sys.executable, "-c", OWNER, str(spool)], check=False)
    Path(f"{spool}.sent").write_bytes(
        b"\0\xff-\n77\n\n%015d\n%015d\n%015d\n%b\n%015d" % (1, 1, 10**15 - 1, b"2" * 5000, 2)  # the last is torn off
    )
    with contextlib.closing(Outbox(spool)) as outbox:
        assert outbox.counts() == {"queued": 2, "sent": 1, "failed": 0}


def test_a_disk_that_is_full_at_the_start_repeats_nothing_either(
    spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run([sys.executable, "-c", OWNER, str(spool)], check=False)
    with monkeypatch.context() as full:
        full.setattr(Outbox, "transaction", lambda *_, **__: (_ for _ in ()).throw(smtp.DiskFull("full")))
        outbox = Outbox(spool)
    with contextlib.closing(outbox):
        assert [mail.number for mail in outbox.due(1.0, 9.0, (), 9)] == [3]
        outbox.put([item("later")])
        assert outbox.counts() == {"queued": 2, "sent": 2, "failed": 0}


def test_the_file_of_ticks_does_not_grow(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp, "TICK_SLOTS", 8)
    outbox.put([item(str(n)) for n in range(50)])
    send_all(outbox)
    assert Path(f"{outbox.path}.sent").stat().st_size == 8 * smtp.TICK_BYTES


def test_ticks_go_on_in_a_file_anew_when_theirs_was_removed(spool: Path) -> None:
    with contextlib.closing(Outbox(spool)) as outbox:
        outbox.put([item("a")])
        Path(f"{spool}.sent").unlink()
        (mail,) = outbox.freeze([Draft((row.seq,), ("x@y.z",)) for row in outbox.waiting()], 0.0)
        assert outbox.settle(smtp.conclude(mail, {"x@y.z": smtp.Outcome(smtp.Verdict.SENT, 250)}, 0.0, 1.0, 9.0), 0.0)
        assert Path(f"{spool}.sent").read_bytes() == b"%015d\n" % mail.number


def test_ticks_after_a_hole_are_read_and_a_power_cut_tears_none(tmp_path: Path) -> None:
    path = tmp_path / "sent"
    with contextlib.closing(smtp.Ticks(str(path))) as ticks:
        ticks.add(smtp.Mail(1, "", (), (), state=smtp.SENT), 0.0)
        path.unlink()
        ticks.renew()
        ticks.add(smtp.Mail(2, "", (), (), state=smtp.SENT), 0.0)
        assert ticks.numbers() == [2]
    assert 512 % smtp.TICK_BYTES == 0  # bytes of a sector


def test_one_commit_settles_all_that_was_ticked_off(outbox: Outbox) -> None:
    outbox.put([item(str(n)) for n in range(20)])
    said: list[str] = []
    mails = outbox.freeze([Draft((row.seq,), ("x@y.z",)) for row in outbox.waiting()], 0.0)
    outbox._db.set_trace_callback(said.append)
    for mail in mails:
        outbox.settle(smtp.conclude(mail, {"x@y.z": smtp.Outcome(smtp.Verdict.SENT, 250)}, 0.0, 1.0, 9.0), 0.0)
    assert said == []
    assert [receipt.new for receipt in outbox.put([item("3"), item("new")])] == [False, True]
    assert said.count("COMMIT") == 1 and outbox.counts() == {"queued": 1, "sent": 20, "failed": 0}


def test_a_drop_does_not_undo_what_was_ticked_off(outbox: Outbox) -> None:
    outbox.put([item("a"), item("b")])
    mail, _ = outbox.freeze([Draft((row.seq,), ("x@y.z",)) for row in outbox.waiting()], 0.0)
    outbox.settle(smtp.conclude(mail, {"x@y.z": smtp.Outcome(smtp.Verdict.SENT, 250)}, 0.0, 1.0, 9.0), 0.0)
    assert outbox.drop() == 1
    assert outbox.counts() == {"queued": 0, "sent": 1, "failed": 0}


def test_who_cannot_tick_a_mail_off_is_told_to_flush(outbox: Outbox) -> None:
    outbox.put([item("a")])
    (mail,) = outbox.freeze([Draft((row.seq,), ("x@y.z",)) for row in outbox.waiting()], 0.0)
    sent = smtp.conclude(mail, {"x@y.z": smtp.Outcome(smtp.Verdict.SENT, 250)}, 0.0, 1.0, 9.0)
    sound, outbox._ticks._file = outbox._ticks._file, os.open(os.devnull, os.O_RDONLY)
    assert not outbox.settle(sent, 0.0)
    os.close(outbox._ticks._file)
    outbox._ticks._file = sound
    outbox.flush()
    assert outbox.counts() == {"queued": 0, "sent": 1, "failed": 0}
    assert outbox.settle(sent, 0.0)


# the queue as others see it


def test_the_queue_is_read_without_writing_while_in_use_and_after(spool: Path) -> None:
    with contextlib.closing(Outbox(spool)) as outbox:
        outbox.put([item("a")])
        assert [row["id"] for row in smtp.read_queue(spool)] == ["a"]
    before = sorted(path.name for path in spool.parent.iterdir())
    assert [row["id"] for row in smtp.read_queue(spool)] == ["a"]
    assert sorted(path.name for path in spool.parent.iterdir()) == before == [
        "alerts.db", "alerts.db.lock", "alerts.db.pictures", "alerts.db.sent",
    ]  # fmt: skip


def test_the_queue_of_a_killed_owner_can_be_read(spool: Path) -> None:
    code = f"import sys, os; sys.path.insert(0, {str(ROOT)!r}); import smtp_module as s\n"
    code += f"s.Outbox({str(spool)!r}).put([s.NewItem('a', 'lane', b'x')]); os._exit(9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    assert [row["id"] for row in smtp.read_queue(spool)] == ["a"]


def test_reading_a_queue_that_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SpoolError, match="no such spool"):
        smtp.read_queue(tmp_path / "nothing.db")
    (tmp_path / "text.db").write_text("not a database, but long enough to be looked at" * 20)
    with pytest.raises(SpoolError):
        smtp.read_queue(tmp_path / "text.db")
