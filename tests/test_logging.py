"""The log is written in a thread of its own: who reads it can stop nothing, and at the end of a program nothing is missing."""

import io
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import smtp_module as smtp

ROOT = Path(__file__).resolve().parent.parent
TALK = """
import logging, smtp_module
smtp_module.start_logging("debug")
for number in range(3000):
    logging.getLogger("x").debug("line %d %s", number, "é\\u202e\\n")
"""


class Stalled(io.StringIO):
    """Who reads this has stopped, until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.blocked = threading.Event(), threading.Event()

    def write(self, text: str) -> int:
        self.blocked.set()
        assert self.reads.wait(10)
        return super().write(text)


@pytest.fixture
def stalled() -> Iterator[tuple[Stalled, smtp.BackgroundHandler]]:
    stream = Stalled()
    handler = smtp.BackgroundHandler(stream)
    yield stream, handler
    stream.reads.set()
    handler.close()


def record(number: int, text: str = "line %d") -> logging.LogRecord:
    return logging.LogRecord("x", logging.INFO, "", 0, text, (number,), None)


def test_what_a_stalled_reader_leaves_no_room_for_is_dropped_and_counted(
    stalled: tuple[Stalled, smtp.BackgroundHandler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smtp, "LOG_LINES_MAX", 5)
    stream, handler = stalled
    handler.handle(record(0))
    assert stream.blocked.wait(10)
    for number in range(1, 13):
        handler.handle(record(number))
    stream.reads.set()
    while handler._lines.qsize():
        pass
    handler.handle(record(13))
    handler.close()
    assert stream.getvalue().splitlines() == [
        *(f"line {number}" for number in range(6)),
        "line 13 (lines dropped before this one, because nobody read the log: 7)",
    ]


def test_the_end_does_not_wait_for_a_stalled_reader(
    stalled: tuple[Stalled, smtp.BackgroundHandler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smtp, "LOG_END_S", 0.05)
    stream, handler = stalled
    handler.handle(record(0))
    assert stream.blocked.wait(10)
    handler.close()
    assert stream.getvalue() == ""


def test_a_line_that_cannot_be_formatted_or_written_costs_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            if "1" in text:
                raise OSError(28, "No space left on device")
            return super().write(text)

    monkeypatch.setattr(logging, "raiseExceptions", False)
    stream = Full()
    handler = smtp.BackgroundHandler(stream)
    for entry in (record(0), record(1), record(2, "no number"), record(3)):
        handler.handle(entry)
    handler.close()
    assert stream.getvalue() == "line 0\nline 3\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_program_that_ends_has_written_its_whole_log(unbuffered: str) -> None:
    environ = os.environ | {"PYTHONUNBUFFERED": unbuffered, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", TALK], cwd=ROOT, env=environ, capture_output=True, check=True)
    said = done.stderr.decode("ascii").splitlines()
    assert [line.partition(" DEBUG ")[2] for line in said] == [
        f"x: line {number} \\xe9\\u202e\\n" for number in range(3000)
    ]


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_a_closed_standard_error_costs_nothing() -> None:
    command = 'exec "$0" -c "$1" 2>&-'
    done = subprocess.run(["sh", "-c", command, sys.executable, TALK], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
