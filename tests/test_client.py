"""The DVR against a scripted relay: real sockets on free ports, and real processes where only those show the truth."""

from __future__ import annotations

import ast
import base64
import contextlib
import json
import os
import pty
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Certificates, wait_for

import client

sys.path.insert(0, str(ROOT / "tests" / "bench"))

import client_nemesis

PROGRAM = Path(client.__file__)
PNG = b"\x89PNG\r\n\x1a\n and so on"
PATIENCE_S = 20.0  # for what must happen; nothing waits this long when all is well


# ───────────────────────────────────────── The scripted relay ─────────────────────────────────────────


class Peer:
    """One connection as the script of a relay sees it."""

    def __init__(self, relay: Relay, connection: socket.socket, number: int) -> None:
        self.relay, self.connection, self.number = relay, connection, number
        self.file = connection.makefile("rb")

    def read(self) -> dict[str, Any]:
        """The next line; raises EOFError when the client has closed."""
        raw = self.file.readline()
        if not raw:
            raise EOFError
        line: dict[str, Any] = json.loads(raw)
        with self.relay.changed:
            self.relay.lines.append(line)
            self.relay.raw.append(raw)
            self.relay.changed.notify_all()
        return line

    def say(self, answer: dict[str, Any] | bytes) -> None:
        self.connection.sendall(answer if isinstance(answer, bytes) else json.dumps(answer).encode() + b"\n")

    def accept(self, line: dict[str, Any]) -> None:
        """What a relay with a memory for ids answers."""
        if "heartbeat" in line:
            self.say({"ok": True, "status": "alive"})
            return
        with self.relay.changed:
            known = line["id"] in self.relay.accepted
            if not known:
                self.relay.accepted.append(line["id"])
        self.say({"ok": True, "id": line["id"], "status": "duplicate" if known else "queued"})


Script = Callable[[Peer], None]


def accept_all(peer: Peer) -> None:
    while True:
        peer.accept(peer.read())


def accept(count: int) -> Script:
    """Accepts so many lines and closes."""

    def script(peer: Peer) -> None:
        for _ in range(count):
            peer.accept(peer.read())

    return script


def close_at_once(peer: Peer) -> None:
    pass


def close_after_reading(peer: Peer) -> None:
    peer.read()


def read_all(peer: Peer) -> None:
    """Never answers."""
    while True:
        peer.read()


def refuse(code: str, *, close: bool = False) -> Script:
    """Answers the first line with an error, accepts the others."""

    def script(peer: Peer) -> None:
        peer.read()
        peer.say({"ok": False, "error": code, "detail": f"because of {code}"})
        if not close:
            accept_all(peer)

    return script


class Relay:
    """A TCP server whose n-th connection follows the n-th script, later ones the last."""

    def __init__(self, *scripts: Script, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        self.scripts = scripts or (accept_all,)
        self.tls = tls
        self.changed = threading.Condition()
        self.lines: list[dict[str, Any]] = []
        self.raw: list[bytes] = []
        self.accepted: list[str] = []
        self.connections = 0
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.create_server((host, 0), family=family)
        self.port = self.listener.getsockname()[1]
        self.threads = [threading.Thread(target=self.listen)]
        self.threads[0].start()

    def listen(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            script = self.scripts[min(self.connections, len(self.scripts) - 1)]
            with self.changed:
                self.connections += 1
                self.changed.notify_all()
            thread = threading.Thread(target=self.serve, args=(connection, script, self.connections))
            self.threads.append(thread)
            thread.start()

    def serve(self, connection: socket.socket, script: Script, number: int) -> None:
        with contextlib.suppress(OSError, EOFError), connection:
            connection.settimeout(PATIENCE_S)
            if self.tls:
                connection = self.tls.wrap_socket(connection, server_side=True)
            with connection:
                peer = Peer(self, connection, number)
                with peer.file:
                    script(peer)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE_S)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No settings but the test's own, waits of milliseconds, and the signal handlers as they were."""
    for _, variable, _, _ in client.SETTINGS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(client, "BACKOFF_FIRST_S", 0.01)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def start_relay() -> Iterator[Callable[..., Relay]]:
    relays: list[Relay] = []

    def start(*scripts: Script, **more: Any) -> Relay:
        relays.append(Relay(*scripts, **more))
        return relays[-1]

    yield start
    for relay in relays:
        relay.close()


@pytest.fixture
def relay(start_relay: Callable[..., Relay]) -> Relay:
    return start_relay()


@pytest.fixture
def closed_port() -> int:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def send(relay: Relay | int, *flags: str) -> int:
    port = relay if isinstance(relay, int) else relay.port
    return client.main([f"--port={port}", *flags])


def start_process(relay: Relay | int, *flags: str, **more: Any) -> subprocess.Popen[str]:
    port = relay if isinstance(relay, int) else relay.port
    command = [sys.executable, str(PROGRAM), f"--port={port}", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True}
    return subprocess.Popen(command, **(pipes | more))


def wait_until_blocked(process: subprocess.Popen[str]) -> None:
    """Until the process sleeps in a call of the system: a signal a moment before the call would not end it."""
    wait_for(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "S")


def kept_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


# ────────────────────────────────────────────── One event ─────────────────────────────────────────────


def test_one_event_goes_with_the_defaults_and_an_id_and_a_time(
    relay: Relay, capsys: pytest.CaptureFixture[str]
) -> None:
    assert send(relay) == 0
    (line,) = relay.lines
    assert set(line) == {"event", "camera", "id", "timestamp"}
    assert (line["event"], line["camera"]) == ("MOTION_DETECTED", "cam1")
    assert re.fullmatch(r"[0-9a-f]{24}", line["id"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["timestamp"])
    assert capsys.readouterr() == (f"queued     MOTION_DETECTED cam1  {line['id']}\n", "")


def test_every_flag_of_an_event_arrives(relay: Relay, tmp_path: Path) -> None:
    (tmp_path / "door.png").write_bytes(PNG)
    flags = ["--event", "DOOR_OPENED", "--camera=حیاط 🏠", "--timestamp", "2025-01-02T03:04:05+03:30", "--id", "a:1"]
    flags += ["--image", "./door.png", "--image-url", "http://nvr/1.jpg", "--token", "s3cret"]
    flags += ["--meta", "zone=4", "--meta", "gate=north=east"]
    assert send(relay, *flags) == 0
    assert relay.lines == [
        {
            "event": "DOOR_OPENED",
            "camera": "حیاط 🏠",
            "timestamp": "2025-01-02T03:04:05+03:30",
            "id": "a:1",
            "image_filename": "door.png",
            "image_b64": base64.b64encode(PNG).decode(),
            "image_url": "http://nvr/1.jpg",
            "meta": {"zone": 4, "gate": "north=east"},
            "token": "s3cret",
        }
    ]


def test_a_repeated_call_with_the_same_id_is_the_same_event(relay: Relay, capsys: pytest.CaptureFixture[str]) -> None:
    assert send(relay, "--id", "job-7") == send(relay, "--id", "job-7") == 0
    assert relay.raw[0] == relay.raw[1]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["queued", "duplicate"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("-3", -3),
        ("21.5", 21.5),
        ("true", True),
        ("false", False),
        ("007", "007"),
        ("21.50", "21.50"),
        ("1e400", "1e400"),
        ("NaN", "NaN"),
        ("null", "null"),
        ('"x"', '"x"'),
        ("[1]", "[1]"),
        ("12345678901234567890123", "12345678901234567890123"),
        ("", ""),
        ("north", "north"),
    ],
)
def test_meta_is_a_number_only_where_nothing_is_lost(text: str, value: object) -> None:
    key, converted = client.key_value(f"k={text}")
    assert (key, converted, type(converted)) == ("k", value, type(value))


def test_arguments_that_are_no_text_are_sent_with_replacement_characters(relay: Relay) -> None:
    assert send(relay, "--camera", "T\udcfcr", "--meta", "k\udcff=\ud83d\ude00") == 0
    assert (relay.lines[0]["camera"], relay.lines[0]["meta"]) == ("T\ufffdr", {"k\ufffd": "😀"})


@pytest.mark.parametrize("quote", ["'", '"'])
def test_one_pair_of_literal_quotes_is_stripped(relay: Relay, quote: str) -> None:
    def quoted(text: str) -> str:
        return f"{quote}{text}{quote}"

    assert send(relay, "--camera", quoted("front door"), f"--event={quoted('X')}", "--meta", quoted("k=v")) == 0
    assert send(relay, quoted("--camera=cam2"), "--id", quoted(quoted("a")), "--meta", "k=it's") == 0
    first, second = relay.lines
    assert (first["camera"], first["event"], first["meta"]) == ("front door", "X", {"k": "v"})
    assert (second["camera"], second["id"], second["meta"]) == ("cam2", quoted("a"), {"k": "it's"})


def test_a_picture_from_standard_input_is_read_once(relay: Relay) -> None:
    process = start_process(relay, "--image", "-", "--count", "2", stdin=subprocess.PIPE, text=False)
    process.communicate(PNG, timeout=PATIENCE_S)
    assert process.returncode == 0
    assert [line["image_b64"] for line in relay.lines] == [base64.b64encode(PNG).decode()] * 2
    assert "image_filename" not in relay.lines[0]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "directory"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_bytes(b"x" * 101), "too big"),
    ],
)
def test_a_picture_that_cannot_be_had_is_a_warning_and_the_event_goes(
    relay: Relay,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    *,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], object],
    reason: str,
) -> None:
    monkeypatch.setattr(client, "IMAGE_MAX_BYTES", 100)
    make(tmp_path / "a.jpg")
    assert send(relay, "--image", "a.jpg") == 0
    assert "image_b64" not in relay.lines[0] and "image_filename" not in relay.lines[0]
    error = capsys.readouterr().err
    assert "--image a.jpg" in error and reason in error


def test_json_prints_the_answers_as_they_came(
    start_relay: Callable[..., Relay], capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [b'{"ok":true,  "status":"queued","id":"x"}', b'{"ok":false,"error":"bad_event","detail":"d"}']

    def script(peer: Peer) -> None:
        for answer in answers:
            peer.read()
            peer.say(answer + b"\r\n")

    assert send(start_relay(script), "--count", "2", "--json") == 65
    assert capsys.readouterr().out.splitlines() == [answer.decode() for answer in answers]


def test_a_warning_of_the_relay_is_shown_and_control_characters_are_not_obeyed(
    start_relay: Callable[..., Relay], capsys: pytest.CaptureFixture[str]
) -> None:
    def script(peer: Peer) -> None:
        peer.read()
        peer.say({"ok": True, "id": "x", "status": "queued", "warning": "dropped\x1b[2J\nqueued \u202e می\u200cرود"})

    assert send(start_relay(script)) == 0
    assert capsys.readouterr().out == (
        "queued     MOTION_DETECTED cam1  x  warning: dropped\\x1b[2J\\nqueued \\u202e می\u200cرود\n"
    )


def test_one_event_loads_nothing_that_only_other_runs_need(relay: Relay) -> None:
    code = f"import client, sys; client.main(['--port={relay.port}']); print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-S", "-c", code], cwd=PROGRAM.parent, text=True).split()
    slow = {"dataclasses", "typing", "ssl", "random", "pathlib", "datetime", "logging", "threading", "shutil", "shlex"}
    assert "socket" in loaded and slow & set(loaded) == set()


@pytest.mark.parametrize("version", ["3, 6, 8", "3, 10, 12"])
def test_an_older_python_is_told_in_one_sentence_what_is_needed(version: str) -> None:
    ast.parse(PROGRAM.read_text("utf-8"), feature_version=(3, 6))  # or it would answer with a SyntaxError
    code = f"import runpy, sys; sys.version_info = ({version}); runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (78, "")
    assert re.fullmatch(r"client\.py needs Python 3\.11 or later; this is Python \S+\.\n", done.stderr)


# ──────────────────────────────────────── Settings and exit codes ─────────────────────────────────────


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--evnt", "X"], "--evnt is not a flag"),
        (["--even", "X"], "--even is not a flag"),
        (["-x"], "-x is not a flag"),
        (["cam1"], "a word has no flag before it"),
        (["--camera"], "--camera: expected one argument"),
        (["--camera", "--json"], "--camera: expected one argument"),
        (["--camera", "-x"], "--flag=VALUE"),
        (["--json=1"], "--json"),
        (["--host", "localhost:5000"], "--host: 'localhost:5000' holds a port"),
        (["--host", "[::1]:5000"], "--host: '[::1]:5000' holds a port"),
        (["--host", "straße.example"], "xn--"),
        (["--port", "0"], "from 1 to 65535"),
        (["--port", "http"], "from 1 to 65535"),
        (["--count", "0"], "--count"),
        (["--count", "٣"], "--count"),
        (["--retries", "-1"], "--retries"),
        (["--loop", "soon"], "5m"),
        (["--loop", "-1"], "--loop"),
        (["--loop", "nan"], "--loop"),
        (["--loop", "21d"], "up to 20d"),
        (["--timeout", "0"], "--timeout"),
        (["--heartbeat", "0"], "--heartbeat"),
        (["--meta", "novalue"], "KEY=VALUE"),
        (["--meta", "=v"], "KEY=VALUE"),
        (["--key", "k.pem"], "--cert"),
        (["--heartbeat", "5", "--event", "X"], "--loop"),
        (["--camera", ""], "--camera"),
        (["--camera", "''", "--heartbeat", "5"], "--camera"),
        (["--event="], "--event"),
        (["--cafile", "missing.pem"], "missing.pem"),
        (["--cert", "missing.pem"], "missing.pem"),
    ],
)
def test_wrong_usage_is_exit_2_and_names_the_flag(
    capsys: pytest.CaptureFixture[str], flags: list[str], told: str
) -> None:
    assert client.main(flags) == 2
    output = capsys.readouterr()
    assert told in output.err and output.out == ""


def test_a_part_of_the_token_that_was_typed_as_its_own_word_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--token", "my", "s3cret"], ["--tokn", "s3cret"], ["--tokn=s3cret"], ["--token", "-s3cret"]):
        assert client.main(flags) == 2
    assert "s3cret" not in "".join(capsys.readouterr())


def test_help_fits_a_screen_and_names_every_flag_and_variable_and_the_calls_used_most() -> None:
    for flag in ("--help", "-h"):
        text = subprocess.check_output([sys.executable, str(PROGRAM), flag], text=True)
        lines = text.splitlines()
        assert len(lines) < 24 and max(map(len, lines)) < 80
        flags = {flag for action in client.make_parser()._actions for flag in action.option_strings if flag != "-h"}
        assert set(re.findall(r"--[a-z-]+", text)) == flags
        assert all(variable in text for _, variable, _, _ in client.SETTINGS)
        assert "MOTION_DETECTED" in text and text.count("  client.py --") == 2


def test_the_calls_that_help_shows_are_right(relay: Relay, tmp_path: Path) -> None:
    for picture in ("door.jpg", "now.jpg"):
        (tmp_path / picture).write_bytes(PNG)
    for call in re.findall(r"(?m)^  client\.py (.*)", client.HELP):
        assert send(relay, "--count", "1", *call.split()) == 0
    assert len(relay.accepted) == 2 and all("image_b64" in line for line in relay.lines)


@pytest.mark.parametrize(
    ("text", "value"),
    [("90", 90), ("0.5", 0.5), (".5", 0.5), ("2 s", 2), ("5m", 300), ("1h", 3600), ("5D", 432000), ("0", 0)],
)
def test_durations_have_units(text: str, value: float) -> None:
    assert client.seconds(text) == value


def test_flags_win_over_the_environment_and_that_over_the_env_file(
    relay: Relay, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = f"\ufeff# ours\n\nexport ALERT_PORT='{relay.port}' # here\nALERT_TOKEN=file #1\nX=\n"
    (tmp_path / ".env").write_text(text, "utf-8")
    assert client.main([]) == 0
    monkeypatch.setenv("ALERT_TOKEN", "environment")
    monkeypatch.setenv("ALERT_HOST", "")  # empty is absent
    assert client.main([]) == 0
    assert client.main(["--token", "flag"]) == 0
    assert [line["token"] for line in relay.lines] == ["file", "environment", "flag"]


@pytest.mark.parametrize("nothing", ["", " "])
def test_a_variable_that_is_set_to_nothing_hides_the_one_of_the_env_file(
    relay: Relay, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nothing: str
) -> None:
    (tmp_path / ".env").write_text(f"ALERT_PORT={relay.port}\nALERT_HOST=192.0.2.1\nALERT_TOKEN=file\n")
    monkeypatch.setenv("ALERT_TOKEN", nothing)
    monkeypatch.setenv("ALERT_HOST", nothing)
    assert client.main(["--retries", "0"]) == 0
    assert "token" not in relay.lines[0]


def test_another_env_file_is_read_instead(relay: Relay, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("ALERT_TOKEN=wrong\n")
    (tmp_path / "cam.env").write_text(f'ALERT_PORT={relay.port}\nALERT_TOKEN="a#b c "\n')
    assert client.main(["--env-file", "cam.env"]) == 0
    assert relay.lines[0]["token"] == "a#b c"  # the relay takes the blanks off, too


@pytest.mark.parametrize(
    ("variables", "file", "told"),
    [
        ({"ALERT_PORT": "abc"}, None, "ALERT_PORT"),
        ({"ALERT_PORT": "0"}, None, "ALERT_PORT"),
        ({}, b"ALERT_PORT=99999\n", "ALERT_PORT"),
        ({"ALERT_TLS": "perhaps"}, None, "ALERT_TLS: 'perhaps' is wrong; write true or false"),
        ({"ALERT_CAFILE": "missing.pem"}, None, "ALERT_CAFILE: missing.pem: No such file"),
        ({"ALERT_CERT": "missing.pem"}, None, "ALERT_CERT: missing.pem"),
        ({"ALERT_KEY": "k.pem"}, None, "ALERT_KEY: it needs a certificate"),
    ],
)
def test_a_wrong_setting_is_exit_78_and_names_the_variable(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    *,
    variables: dict[str, str],
    file: bytes | None,
    told: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if file is not None:
        (tmp_path / ".env").write_bytes(file)
    assert client.main([]) == 78
    assert told in capsys.readouterr().err


def test_a_missing_env_file_is_exit_78(capsys: pytest.CaptureFixture[str]) -> None:
    assert client.main(["--env-file", "nowhere.env"]) == 78
    assert "nowhere.env" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "setting"),
    [
        ("K=v", {"K": "v"}),
        (" export\tK = v \r\n", {"K": "v"}),
        ("K=", {"K": ""}),
        ("K=a=b", {"K": "a=b"}),
        ("K=it's # comment", {"K": "it's"}),
        ("K=a#b", {"K": "a#b"}),
        ("K=# comment", {"K": ""}),
        ("K=پارک", {"K": "پارک"}),
        ("# K=v", {}),
        (" ", {}),
    ],
)
def test_lines_of_a_settings_file(line: str, setting: dict[str, str]) -> None:
    assert client.read_env_line(line) == setting


SHELL_WORDS = [
    *("''", '""', "'a b'", '"a b"', r"'it'\''s'", r"""'it'"'"'s'""", r'"a\"b"', r'"a\\b"', r'"a\nb"', r"'a\b'", r'"pa\$\$w"'),
    *(r'"a\`b"', r"'$HOME'", '"a"b', '"a"#b', "'a # b' # it's", '"a"\t# "x', r'"a"\ b', '"سلام"', r'"\""', "'\"'", "'' "),
]


def test_a_value_in_quotes_is_read_as_a_shell_reads_a_word() -> None:
    shown = "".join(f"K={word}\nprintf '%s\\0' \"$K\"\n" for word in SHELL_WORDS)
    expected = subprocess.run(["sh"], input=shown.encode(), capture_output=True, check=True).stdout.decode().split("\0")
    assert [client.read_env_line(f"K={word}")["K"] for word in SHELL_WORDS] == expected[:-1]


@pytest.mark.parametrize("value", ["'a", '"a', "'a' b", '"a" "b" # c', "'a'b'", '"a\\"', "'it's'", "'a'\\"])
def test_what_is_left_over_behind_the_quotes_is_an_error(value: str) -> None:
    with pytest.raises(ValueError, match="a value in quotes must end with its quote"):
        client.read_env_line(f"K={value}")


BAD_LINES = [
    (b"ALERT_HOST\n", "line 2: not KEY=value"),
    (b"if true; then X=1; fi\n", "line 2: not KEY=value"),
    (b"KEY='s3cret\n", "line 2: a value in quotes must end with its quote; only a # comment may follow"),
    (b"KEY='s3cret' more\n", "line 2: a value in quotes must end with its quote; only a # comment may follow"),
    (b"KEY=s3cret\xff\n", "line 2: not UTF-8; save the file as UTF-8"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_line_that_cannot_be_read_is_exit_78_in_a_file_that_was_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes, reason: str
) -> None:
    (tmp_path / "cam.env").write_bytes(b"ALERT_TOKEN=t\n" + line)
    assert client.main(["--env-file", "cam.env"]) == 78
    assert capsys.readouterr().err == f"client.py: settings file cam.env: {reason}\n"


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_line_that_cannot_be_read_costs_only_itself_in_a_file_that_nobody_named(
    relay: Relay, tmp_path: Path, *, capsys: pytest.CaptureFixture[str], line: bytes, reason: str
) -> None:
    (tmp_path / ".env").write_bytes(b"ALERT_TOKEN=t\n" + line + b"MIIE\nALERT_PORT=%d\n" % relay.port)
    assert client.main([]) == 0
    assert relay.lines[0]["token"] == "t"
    assert capsys.readouterr().err == f"client.py: warning: settings file .env: {reason} (and 1 more)\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as somebody else")
@pytest.mark.parametrize(
    ("owner", "mode", "warned", "used"),
    [
        (0, 0o644, "", True),
        (65534, 0o644, "", True),
        (65534, 0o000, "Permission denied", False),
        (0, 0o600, "Permission denied", False),
        (1000, 0o644, "it belongs to another user and is not used", False),
    ],
)
def test_an_env_file_that_cannot_be_read_or_trusted_is_a_warning_unless_it_was_named(
    relay: Relay, tmp_path: Path, *, owner: int, mode: int, warned: str, used: bool
) -> None:
    """As the user 65534."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / ".env").write_text("ALERT_TOKEN=t\n")
        (folder / ".env").chmod(mode)
        os.chown(folder / ".env", owner, owner)

        def run(*flags: str) -> subprocess.CompletedProcess[str]:
            # What is imported late is imported before, for Python itself may lie where that user cannot read.
            code = "import client, encodings.utf_8_sig, locale, os, sys; os.setuid(65534); sys.exit(client.main(sys.argv[1:]))"
            command = [sys.executable, "-c", code, f"--port={relay.port}", *flags]
            path = {"PYTHONPATH": str(PROGRAM.parent)}
            return subprocess.run(command, cwd=folder, env=path, capture_output=True, text=True, check=False)

        done = run()
        assert done.returncode == 0, done.stderr
        assert ("token" in relay.lines[0]) == used
        assert done.stderr == (f"client.py: warning: settings file .env: {warned}\n" if warned else "")
        assert run("--env-file", ".env").returncode == (78 if warned.startswith("Permission") else 0)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_called_env_and_is_no_file_is_left_alone(
    relay: Relay, tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(tmp_path / ".env")
    assert send(relay) == 0


@pytest.mark.parametrize("code", ["bad_json", "bad_event", "too_large"])
def test_a_refused_event_is_exit_65_and_is_not_tried_again(
    start_relay: Callable[..., Relay], capsys: pytest.CaptureFixture[str], tmp_path: Path, code: str
) -> None:
    relay = start_relay(refuse(code))
    assert send(relay, "--outbox", "kept") == 65
    assert len(relay.lines) == 1 and kept_in(tmp_path / "kept") == []
    assert f"refused: MOTION_DETECTED cam1 {relay.lines[0]['id']}: {code}: because of {code}" in capsys.readouterr().err


def test_a_wrong_token_is_exit_77_at_once_and_the_event_is_kept_without_it(
    start_relay: Callable[..., Relay], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    relay = start_relay(refuse("unauthorized", close=True))
    assert send(relay, "--token", "wr0ng", "--outbox", "kept") == 77
    assert relay.connections == 1
    (event,) = kept_in(tmp_path / "kept")
    assert event["id"] == relay.lines[0]["id"] and "token" not in event
    said = "".join(capsys.readouterr())
    assert "set ALERT_TOKEN to the relay's" in said and "wr0ng" not in said


def test_a_wrong_token_ends_a_loop(start_relay: Callable[..., Relay]) -> None:
    relay = start_relay(refuse("unauthorized", close=True))
    assert send(relay, "--loop", "0.01", "--count", "5") == 77
    assert relay.connections == 1


def test_lost_heartbeat_is_named_as_one(closed_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert send(closed_port, "--heartbeat", "1", "--count", "1", "--camera", "cam7", "--retries", "0") == 75
    assert "client.py: lost: heartbeat cam7" in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("code", ["busy", "spool_full", "spool_error", "shutting_down", "new_in_a_later_version"])
def test_what_may_pass_is_waited_for(
    start_relay: Callable[..., Relay], capsys: pytest.CaptureFixture[str], code: str
) -> None:
    relay = start_relay(refuse(code, close=True), accept_all)
    assert send(relay) == 0
    assert len(relay.raw) == 2 and relay.raw[0] == relay.raw[1]
    assert f"{code}: because of {code}; next try in" in capsys.readouterr().err


@pytest.mark.parametrize("code", ["busy", "spool_full", "spool_error", "shutting_down"])
def test_what_does_not_pass_is_exit_75_after_the_retries(start_relay: Callable[..., Relay], code: str) -> None:
    relay = start_relay(refuse(code, close=True))
    assert send(relay, "--retries", "2") == 75
    assert relay.connections == 3


def test_nobody_there_is_exit_75_and_says_what_was_lost(closed_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert send(closed_port, "--retries", "1", "--id", "a1") == 75
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith(f"client.py: 127.0.0.1 port {closed_port}: Connection refused; next try in ")
    assert errors[1:] == [
        f"client.py: 127.0.0.1 port {closed_port}: not handed over: Connection refused; is server.py running there?",
        "client.py: lost: MOTION_DETECTED cam1 a1",
    ]


@pytest.mark.parametrize("host", ["no.such.host.invalid", "bad..name", "x" * 70, "ü" * 70, "a\x00b"])
def test_a_name_without_an_address_is_exit_75(host: str) -> None:
    assert client.main(["--host", host, "--retries", "0"]) == 75


def test_waiting_doubles_with_jitter_up_to_a_limit(
    closed_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(client, "BACKOFF_FIRST_S", 1.0)
    monkeypatch.setattr(client, "BACKOFF_MAX_S", 4.0)
    slept: list[float] = []
    clock = time.monotonic
    monkeypatch.setattr(client.time, "sleep", slept.append)
    monkeypatch.setattr(client.time, "monotonic", lambda: clock() + sum(slept))
    assert send(closed_port, "--retries", "5") == 75
    waits = [float(wait) for wait in re.findall(r"next try in (\S+) s", capsys.readouterr().err)]
    for wait, whole in zip(waits, [1, 2, 4, 4, 4], strict=True):
        assert 0.7 * whole < wait <= 1.25 * whole + 0.05
    assert sum(slept) == pytest.approx(sum(waits), abs=0.5)


@pytest.mark.parametrize(
    "said",
    [b"220 mail.example.com\r\n", b"\xff\n", b"5\n", b'{"status":"queued"}\n', b'{"ok":1}\n', b"[" * 5000 + b"\n"],
)
def test_who_does_not_answer_like_a_relay_is_exit_75(
    start_relay: Callable[..., Relay], capsys: pytest.CaptureFixture[str], said: bytes
) -> None:
    def script(peer: Peer) -> None:
        peer.read()
        peer.say(said)

    assert send(start_relay(script), "--retries", "0") == 75
    assert "is it the right port?" in capsys.readouterr().err


def test_an_answer_without_an_end_is_given_up(
    start_relay: Callable[..., Relay], capsys: pytest.CaptureFixture[str]
) -> None:
    def script(peer: Peer) -> None:
        peer.read()
        while True:
            peer.say(b"x" * 10_000)

    assert send(start_relay(script), "--retries", "0") == 75
    assert "has no end" in capsys.readouterr().err


def test_the_time_out_is_for_the_whole_answer_and_not_for_each_byte(start_relay: Callable[..., Relay]) -> None:
    done = threading.Event()

    def script(peer: Peer) -> None:
        peer.read()
        while not done.wait(0.02):
            peer.say(b" ")

    relay = start_relay(script)
    start = time.monotonic()
    assert send(relay, "--timeout", "0.3", "--retries", "0") == 75
    done.set()
    assert 0.3 <= time.monotonic() - start < 5


def test_a_relay_that_does_not_read_is_given_up(
    start_relay: Callable[..., Relay], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()
    monkeypatch.setattr(client, "SLOWEST_BYTES_S", 1 << 30)
    (tmp_path / "big.jpg").write_bytes(bytes(12_000_000))
    relay = start_relay(lambda peer: done.wait(PATIENCE_S) and None)
    assert send(relay, "--image", "big.jpg", "--timeout", "0.3", "--retries", "0") == 75
    done.set()


def test_a_slow_relay_has_longer_for_a_big_picture(start_relay: Callable[..., Relay], tmp_path: Path) -> None:
    (tmp_path / "big.jpg").write_bytes(bytes(300_000))

    def script(peer: Peer) -> None:
        line = peer.read()
        threading.Event().wait(0.5)
        peer.accept(line)

    assert send(start_relay(script), "--image", "big.jpg", "--timeout", "0.1", "--retries", "0") == 0
    assert send(start_relay(script), "--timeout", "0.1", "--retries", "0") == 75


def test_the_reason_of_a_relay_that_stops_reading_is_heard(start_relay: Callable[..., Relay], tmp_path: Path) -> None:
    (tmp_path / "big.jpg").write_bytes(bytes(12_000_000))

    def script(peer: Peer) -> None:
        peer.connection.recv(1000)
        peer.say({"ok": False, "error": "too_large", "detail": "too long"})
        peer.connection.shutdown(socket.SHUT_WR)

    assert send(start_relay(script), "--image", "big.jpg", "--retries", "0") == 65


def test_0000_and_double_colon_mean_this_machine(start_relay: Callable[..., Relay], relay: Relay) -> None:
    assert send(relay, "--host", "0.0.0.0") == 0
    try:
        six = start_relay(host="::1")
    except OSError:
        pytest.skip("no IPv6 here")
    assert send(six, "--host", "::") == send(six, "--host", "::1") == send(six, "--host", "[::1]") == 0


def test_each_address_of_a_name_is_tried(relay: Relay, closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(host: bytes, port: int, *more: Any, **named: Any) -> list[Any]:
        assert host == b"relay.example"
        good = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port))
        return [(*good[:4], ("127.0.0.1", closed_port)), good]

    monkeypatch.setattr(client.socket, "getaddrinfo", resolve)
    assert send(relay, "--host", "relay.example", "--retries", "0") == 0


def test_an_address_that_swallows_packets_leaves_time_for_the_next_one(
    start_relay: Callable[..., Relay], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(peer: Peer) -> None:
        line = peer.read()
        threading.Event().wait(0.1)  # as long as a disk takes
        peer.accept(line)

    relay = start_relay(script)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.create_connection(full.getsockname()):

        def resolve(host: bytes, port: int, *more: Any, **named: Any) -> list[Any]:
            good = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port))
            return [(*good[:4], full.getsockname()), good]

        monkeypatch.setattr(client.socket, "getaddrinfo", resolve)
        assert send(relay, "--host", "relay.example", "--timeout", "1", "--retries", "0") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_full_disk_below_what_is_printed_stops_nothing(relay: Relay, stream: str) -> None:
    with open("/dev/full", "wb") as full:
        process = start_process(relay, "--count", "3", "--image", "missing", **{stream: full})
        process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0 and len(relay.accepted) == 3


def test_a_reader_that_has_gone_stops_nothing(relay: Relay) -> None:
    process = start_process(relay, "--count", "50")
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(PATIENCE_S) == 0, errors
    assert len(relay.accepted) == 50 and "Traceback" not in errors


# ─────────────────────────────────────── Exactly once, reconnecting ───────────────────────────────────


@pytest.mark.parametrize("drop", [close_at_once, close_after_reading], ids=["before reading", "after reading"])
def test_a_dropped_connection_is_made_again_with_the_same_bytes(
    start_relay: Callable[..., Relay], drop: Script
) -> None:
    relay = start_relay(drop, drop, accept_all)
    assert send(relay) == 0
    assert relay.connections == 3
    assert len(set(relay.raw)) == 1 and len(relay.accepted) == 1


def test_an_event_whose_answer_was_lost_is_taken_once(
    start_relay: Callable[..., Relay], capsys: pytest.CaptureFixture[str]
) -> None:
    def accept_and_lose_the_answer(peer: Peer) -> None:
        peer.relay.accepted.append(peer.read()["id"])

    relay = start_relay(accept_and_lose_the_answer, accept_all)
    assert send(relay) == 0
    assert len(relay.accepted) == 1
    assert capsys.readouterr().out.startswith("duplicate ")


def test_half_an_answer_is_no_answer(start_relay: Callable[..., Relay]) -> None:
    def script(peer: Peer) -> None:
        peer.read()
        peer.say(b'{"ok": true, "id": "x", "status": "queued"}')

    relay = start_relay(script, accept_all)
    assert send(relay) == 0
    assert relay.raw[0] == relay.raw[1]


def test_many_events_go_over_one_connection_each_after_the_answer_to_the_one_before(
    start_relay: Callable[..., Relay],
) -> None:
    arrived: list[bytes] = []

    def script(peer: Peer) -> None:
        while data := peer.connection.recv(65536):
            arrived.append(data)
            peer.accept(json.loads(data.partition(b"\n")[0]))

    relay = start_relay(script)
    assert send(relay, "--loop", "0", "--count", "300", "--id", "job") == 0
    assert relay.connections == 1 and [data.count(b"\n") for data in arrived] == [1] * 300
    assert relay.accepted == [f"job-{number}" for number in range(1, 301)]


@pytest.mark.parametrize("unasked", [{"ok": True, "id": "x", "status": "queued"}, b"hello"])
def test_what_the_relay_says_unasked_is_taken_for_no_answer(
    start_relay: Callable[..., Relay], unasked: dict[str, Any] | bytes
) -> None:
    def script(peer: Peer) -> None:
        line = peer.read()
        answer = b'{"ok": true, "id": "x", "status": "queued"}\n'
        more = unasked if isinstance(unasked, bytes) else json.dumps(unasked).encode() + b"\n"
        peer.relay.accepted.append(line["id"])
        peer.say(answer + more)
        peer.read()

    relay = start_relay(script, accept_all)
    assert send(relay, "--count", "3", "--id", "e") == 0
    assert relay.accepted == ["e-1", "e-2", "e-3"] and relay.connections == 2


@pytest.mark.parametrize("seed", [1, 2])
def test_however_the_connections_break_each_event_is_taken_once_and_in_order(
    start_relay: Callable[..., Relay], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(client, "BACKOFF_FIRST_S", 0.0001)
    dice = random.Random(seed)

    def unreliable(peer: Peer) -> None:
        """Some lines with an answer, then the end: at once, after a line that was read, or accepted without an answer."""
        for _ in range(dice.randrange(40)):
            peer.accept(peer.read())
        end = dice.randrange(3)
        if end:
            line = peer.read()
            if end == 2 and line["id"] not in peer.relay.accepted:
                peer.relay.accepted.append(line["id"])

    relay = start_relay(unreliable)
    assert send(relay, "--count", "500", "--id", "e", "--retries", "50") == 0
    assert relay.accepted == [f"e-{number}" for number in range(1, 501)]
    assert relay.connections > 10


def test_an_error_in_the_middle_costs_only_its_event(
    start_relay: Callable[..., Relay], capsys: pytest.CaptureFixture[str]
) -> None:
    def script(peer: Peer) -> None:
        peer.accept(peer.read())
        refuse("bad_event")(peer)

    relay = start_relay(script)
    assert send(relay, "--count", "3", "--id", "e") == 65
    assert relay.accepted == ["e-1", "e-3"]
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 2
    assert "2 accepted, 1 refused, 0 kept, 0 lost" in output.err


def test_an_event_with_a_temporary_error_goes_again_before_the_next_one(start_relay: Callable[..., Relay]) -> None:
    def script(peer: Peer) -> None:
        peer.accept(peer.read())
        refuse("spool_full")(peer)

    relay = start_relay(script, accept_all)
    assert send(relay, "--count", "3", "--id", "e") == 0
    assert relay.accepted == ["e-1", "e-2", "e-3"]


def test_the_fast_loop_ends_when_the_relay_stays_away(
    start_relay: Callable[..., Relay], capsys: pytest.CaptureFixture[str]
) -> None:
    relay = start_relay(accept(5), close_at_once)
    assert send(relay, "--loop", "0", "--retries", "1") == 75
    assert "5 accepted, 0 refused, 0 kept, 1 lost" in capsys.readouterr().err


# ──────────────────────────────────────────── Loops, heartbeats ───────────────────────────────────────


def test_deadlines_do_not_drift_and_missed_ones_are_skipped() -> None:
    timer = client.IntervalTimer(interval=0.1, left=100, start=5.0)
    assert timer.due == 5.0
    for now, due in [(5.03, 5.1), (5.1, 5.2), (5.2999, 5.3), (5.31, 5.4), (7.234, 7.3), (7.3, 7.4)]:
        timer.advance(now)
        assert timer.due == pytest.approx(due)
    for number in range(4, 97):  # advanced exactly when due: never the same time twice
        before = timer.due
        timer.advance(before)
        assert timer.due == pytest.approx(before + 0.1) or number > 96
    timer.advance(timer.due)
    assert timer.due == float("inf")


def test_a_loop_keeps_one_connection_and_its_pace_though_each_answer_is_late(start_relay: Callable[..., Relay]) -> None:
    times: list[float] = []

    def script(peer: Peer) -> None:
        while True:
            line = peer.read()
            times.append(time.monotonic())
            threading.Event().wait(0.02)
            peer.accept(line)

    relay = start_relay(script)
    assert send(relay, "--loop", "0.05", "--count", "9") == 0
    assert relay.connections == 1 and len(set(relay.accepted)) == 9
    assert times[-1] - times[0] == pytest.approx(8 * 0.05, abs=0.045)  # adding the 20 ms up would make it 0.56


def test_a_loop_reads_its_picture_anew(start_relay: Callable[..., Relay], tmp_path: Path) -> None:
    picture = tmp_path / "now.jpg"
    picture.write_bytes(b"first")

    def script(peer: Peer) -> None:
        while True:
            line = peer.read()
            picture.write_bytes(b"second")
            peer.accept(line)

    relay = start_relay(script)
    assert send(relay, "--loop", "0.05", "--count", "2", "--image", "now.jpg") == 0
    assert [base64.b64decode(line["image_b64"]) for line in relay.lines] == [b"first", b"second"]


def test_a_loop_goes_on_after_a_relay_that_closed_while_nothing_was_on_its_way(
    start_relay: Callable[..., Relay], capsys: pytest.CaptureFixture[str]
) -> None:
    relay = start_relay(accept(1))
    assert send(relay, "--loop", "0.05", "--count", "3", "--retries", "0") == 0
    assert relay.connections == 3 and len(relay.accepted) == 3
    assert "closed" not in capsys.readouterr().err


def test_a_timed_loop_goes_on_after_events_that_were_lost(start_relay: Callable[..., Relay]) -> None:
    relay = start_relay(close_at_once, accept_all)
    assert send(relay, "--loop", "0.05", "--count", "3", "--retries", "0", "--id", "e") == 75
    assert relay.accepted == ["e-2", "e-3"]


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_loop_with_a_summary_and_exit_0(relay: Relay, signal_number: int) -> None:
    process = start_process(relay, "--loop", "0")
    relay.wait_for(lambda: len(relay.accepted) > 700)
    process.send_signal(signal_number)
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    answered = [line.split()[-1] for line in output.splitlines()]
    assert sorted(answered) == sorted(relay.accepted)
    assert f"{len(answered)} accepted, 0 refused, 0 kept, 0 lost" in errors and "Traceback" not in errors


def test_a_second_signal_does_not_wait_for_the_answer(start_relay: Callable[..., Relay], tmp_path: Path) -> None:
    (tmp_path / "big.jpg").write_bytes(bytes(5_000_000))  # the answer to it would be waited for for minutes
    relay = start_relay(read_all)
    process = start_process(relay, "--loop", "0", "--image", "big.jpg")
    relay.wait_for(lambda: len(relay.lines) > 0)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75 and "1 lost" in errors and "Traceback" not in errors


def test_after_a_signal_the_answer_is_waited_for_only_a_little(start_relay: Callable[..., Relay]) -> None:
    relay = start_relay(read_all)
    process = start_process(relay, "--loop", "0", "--timeout", "1h")
    relay.wait_for(lambda: len(relay.lines) == 1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75 and "no answer in time" in errors and "1 lost" in errors
    assert len(relay.lines) == 1 and relay.connections == 1


def test_an_answer_that_comes_soon_after_a_signal_is_heard(start_relay: Callable[..., Relay], tmp_path: Path) -> None:
    signalled = threading.Event()

    def script(peer: Peer) -> None:
        line = peer.read()
        assert signalled.wait(PATIENCE_S)
        peer.accept(line)

    relay = start_relay(script)
    process = start_process(relay, "--outbox", "kept", "--timeout", "1h")
    relay.wait_for(lambda: len(relay.lines) == 1)
    process.send_signal(signal.SIGTERM)
    signalled.set()
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, "") and output.startswith("queued")
    assert kept_in(tmp_path / "kept") == []


def test_a_signal_ends_a_connection_that_does_not_come_about(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        address = full.getsockname()
        stack.enter_context(socket.create_connection(address))  # nobody accepts it: the queue is full
        process = start_process(address[1], "--outbox", "kept", "--timeout", "1h")
        stack.callback(process.kill)
        trying, end = f":{address[1]:04X} 02 ", time.monotonic() + PATIENCE_S  # 02: SYN_SENT
        while trying not in Path("/proc/net/tcp").read_text():
            assert process.poll() is None and time.monotonic() < end
        wait_until_blocked(process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75 and "interrupted" in errors
    assert len(kept_in(tmp_path / "kept")) == 1


@pytest.mark.parametrize("outbox", [[], ["--outbox", "kept"]])
def test_an_event_whose_picture_does_not_come_goes_without_it_after_a_signal(
    relay: Relay, tmp_path: Path, outbox: list[str]
) -> None:
    os.mkfifo(tmp_path / "camera")
    process = start_process(relay, "--image", "camera", *outbox)
    writer = os.open(tmp_path / "camera", os.O_WRONLY)  # returns when the client has opened it, too
    wait_until_blocked(process)
    process.terminate()
    _, errors = process.communicate(timeout=PATIENCE_S)
    os.close(writer)
    assert process.returncode == 0 and "--image camera: interrupted; the event goes without it" in errors
    assert len(relay.accepted) == 1 and "image_b64" not in relay.lines[0]


def test_after_a_signal_what_is_kept_waits_for_the_next_time(
    start_relay: Callable[..., Relay], closed_port: int, tmp_path: Path
) -> None:
    for number in range(2):
        send(closed_port, "--event", f"e{number}", "--outbox", "kept", "--retries", "0")
    signalled = threading.Event()

    def script(peer: Peer) -> None:
        line = peer.read()
        assert signalled.wait(PATIENCE_S)
        peer.accept(line)
        accept_all(peer)

    relay = start_relay(script)
    process = start_process(relay, "--event", "new", "--outbox", "kept")
    relay.wait_for(lambda: len(relay.lines) == 1)
    process.terminate()
    signalled.set()
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75 and errors == "client.py: kept in kept: 2; first to go next time\n"
    assert [event["event"] for event in kept_in(tmp_path / "kept")] == ["e1", "new"]
    assert send(relay, "--heartbeat", "1", "--count", "1", "--outbox", "kept") == 0
    assert [line.get("event") for line in relay.lines] == ["e0", None, "e1", "new"]


def test_a_signal_before_there_is_an_event_is_no_success(relay: Relay) -> None:
    process = start_process(relay, "--image", "-", stdin=subprocess.PIPE)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0


def test_a_heartbeat_alone_sends_no_event(relay: Relay, capsys: pytest.CaptureFixture[str]) -> None:
    assert send(relay, "--heartbeat", "0.02", "--count", "3", "--camera", "cam7", "--token", "t") == 0
    assert relay.lines == [{"heartbeat": "cam7", "token": "t"}] * 3
    assert relay.connections == 1
    assert capsys.readouterr().out == "alive      heartbeat cam7\n" * 3


def test_heartbeats_and_events_share_one_connection(relay: Relay) -> None:
    assert send(relay, "--heartbeat", "0.03", "--loop", "0.05", "--count", "3") == 0
    assert len(relay.accepted) == 3 and relay.connections == 1
    assert 3 <= sum("heartbeat" in line for line in relay.lines) <= 5


def test_heartbeats_do_not_pile_up_and_are_never_kept(start_relay: Callable[..., Relay], tmp_path: Path) -> None:
    relay = start_relay(read_all)
    flags = ["--heartbeat", "0.01", "--count", "4", "--timeout", "0.1", "--retries", "0", "--outbox", "kept"]
    assert send(relay, *flags) == 75
    assert len(relay.lines) == relay.connections == 4  # one at a time, however many were due meanwhile
    assert all(set(line) == {"heartbeat"} for line in relay.lines)
    assert kept_in(tmp_path / "kept") == []


def test_the_progress_line_is_for_terminals_only(relay: Relay) -> None:
    ours, theirs = pty.openpty()
    process = start_process(relay, "--loop", "0", "--count", "300", stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux ends a terminal with EIO
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    assert process.wait(PATIENCE_S) == 0
    assert re.search(rb"\r\x1b\[Kclient.py: \d+ of 300 accepted, \d+/s", shown)
    assert b"queued" not in shown and b"300 accepted, 0 refused" in shown

    piped = start_process(relay, "--loop", "0", "--count", "300")
    output, errors = piped.communicate(timeout=PATIENCE_S)
    assert output.count("queued") == 300 and "\r" not in errors and " of 300" not in errors


# ─────────────────────────────────────────────── Outbox ───────────────────────────────────────────────


def test_an_event_that_could_not_be_handed_over_goes_first_next_time(
    relay: Relay, closed_port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    for name in ("first", "second"):
        flags = ["--event", name, "--image", "a.png", "--outbox", "kept", "--retries", "0", "--token", "s3cret"]
        assert send(closed_port, *flags) == 75
    first, second = kept_in(tmp_path / "kept")
    assert "s3cret" not in "".join(path.read_text() for path in (tmp_path / "kept").iterdir())
    assert "kept in kept: 2; first to go next time" in capsys.readouterr().err

    (tmp_path / "a.png").write_bytes(b"another picture")
    assert send(relay, "--event", "third", "--outbox", "kept", "--token", "t") == 0
    assert [line["event"] for line in relay.lines] == ["first", "second", "third"]
    assert relay.lines[:2] == [{**first, "token": "t"}, {**second, "token": "t"}]
    assert list((tmp_path / "kept").iterdir()) == []


def test_what_is_kept_is_private_to_its_owner_and_durable_before_the_first_wait(
    closed_port: int, tmp_path: Path
) -> None:
    process = start_process(closed_port, "--outbox", "kept/deeper", "--retries", "1000")
    assert process.stderr
    process.stderr.readline()  # the first try has failed
    process.kill()
    process.communicate()
    (file,) = (tmp_path / "kept/deeper").iterdir()
    assert json.loads(file.read_text())["event"] == "MOTION_DETECTED"
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700


def test_writing_is_synced_before_the_name_is_given_and_the_folder_after(
    closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def traced_fsync(handle: int) -> None:
        done.append("fsync folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "fsync file")
        fsync(handle)

    def traced_replace(old: str, new: str) -> None:
        done.append("rename")
        replace(old, new)

    monkeypatch.setattr(client.os, "fsync", traced_fsync)
    monkeypatch.setattr(client.os, "replace", traced_replace)
    assert send(closed_port, "--outbox", "kept", "--retries", "0") == 75
    assert done == ["fsync folder", "fsync file", "rename", "fsync folder"]


def test_a_signal_during_the_wait_leaves_the_event_in_the_outbox(closed_port: int, tmp_path: Path) -> None:
    process = start_process(closed_port, "--outbox", "kept", "--retries", "1000")
    assert process.stderr
    process.stderr.readline()
    process.terminate()
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75 and "kept in kept: 1" in errors
    assert len(kept_in(tmp_path / "kept")) == 1


@pytest.mark.parametrize("signals", [1, 2, 3])
def test_signals_while_an_event_is_written_do_not_lose_it(
    closed_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: int
) -> None:
    fsync = os.fsync

    def interrupted(handle: int) -> None:
        monkeypatch.setattr(client.os, "fsync", fsync)
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
        fsync(handle)

    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(client.os, "fsync", interrupted)
    assert send(closed_port, "--outbox", "kept", "--id", "a1", "--retries", "1000") == 75
    assert [event["id"] for event in kept_in(tmp_path / "kept")] == ["a1"]


def test_an_event_that_a_retry_hands_over_leaves_nothing_behind(
    start_relay: Callable[..., Relay], tmp_path: Path
) -> None:
    relay = start_relay(close_after_reading, accept_all)
    assert send(relay, "--outbox", "kept") == 0
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_kept_event_that_is_refused_is_moved_aside_and_blocks_nothing(
    start_relay: Callable[..., Relay], closed_port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        send(closed_port, "--event", name, "--outbox", "kept", "--retries", "0")
    (tmp_path / "kept" / f"{1:020d}-aa.json").write_text('{"event": "dama')
    relay = start_relay(refuse("bad_event"), accept_all)
    assert send(relay, "--event", "third", "--outbox", "kept") == 65
    assert [line["event"] for line in relay.lines] == ["first", "second", "third"]
    damaged, refused = sorted((tmp_path / "kept").iterdir())
    assert damaged.name == f"{1:020d}-aa.json.refused" and refused.name.endswith(".json.refused")
    errors = capsys.readouterr().err
    assert f"moved aside: kept/{damaged.name}" in errors and f"moved aside: kept/{refused.name}" in errors
    assert send(relay, "--outbox", "kept") == 0


def test_a_kept_event_that_cannot_be_read_now_goes_next_time(
    relay: Relay, closed_port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert send(closed_port, "--event", "first", "--outbox", "kept", "--retries", "0") == 75
    (file,) = (tmp_path / "kept").iterdir()
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(file)
    assert send(relay, "--event", "second", "--outbox", "kept") == 0
    assert f"{file.name} cannot be read now: Too many levels of symbolic links" in capsys.readouterr().err
    (tmp_path / "elsewhere").rename(file)
    assert send(relay, "--event", "third", "--outbox", "kept") == 0
    assert [line["event"] for line in relay.lines] == ["second", "first", "third"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"[]", b"7", b"\xff", b"[" * 100_000, b'{"x": %s}' % (b"9" * 5000), b" " * 2000 + b"{}"]
)
def test_a_file_that_holds_no_event_is_moved_aside_and_blocks_nothing(
    relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(client, "KEPT_MAX_BYTES", 1000 if content.startswith(b" ") else client.KEPT_MAX_BYTES)
    folder = tmp_path / "kept"
    folder.mkdir()
    name = f"{1:020d}-aa.json"
    (folder / name).write_bytes(content)
    (folder / f"{2:020d}-aa.json").mkdir()
    (folder / "readme.json").write_text("{}")
    assert send(relay, "--event", "new", "--outbox", "kept") == 0
    assert [line["event"] for line in relay.lines] == ["new"]
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.refused", f"{2:020d}-aa.json", "readme.json"]


def test_a_new_event_is_kept_at_once_where_older_ones_cannot_be_handed_over(
    start_relay: Callable[..., Relay], closed_port: int, tmp_path: Path
) -> None:
    for number in range(5):
        send(closed_port, "--event", f"e{number}", "--outbox", "kept", "--retries", "0")
    assert len(kept_in(tmp_path / "kept")) == 5
    relay = start_relay(close_at_once, accept(3), accept_all)
    assert send(relay, "--event", "last", "--outbox", "kept") == 0
    order = {line["id"]: line["event"] for line in relay.lines}
    assert [order[name] for name in relay.accepted] == ["e0", "e1", "e2", "e3", "e4", "last"]
    assert kept_in(tmp_path / "kept") == []


def test_a_new_event_is_on_disk_before_the_older_ones_are_handed_over(
    start_relay: Callable[..., Relay], closed_port: int, tmp_path: Path
) -> None:
    send(closed_port, "--event", "old", "--outbox", "kept", "--retries", "0")
    relay = start_relay(read_all)
    process = start_process(relay, "--event", "new", "--outbox", "kept")
    relay.wait_for(lambda: len(relay.lines) == 1)
    process.kill()
    process.communicate()
    assert [event["event"] for event in kept_in(tmp_path / "kept")] == ["old", "new"]

    # As fast as the relay acknowledges: the new ones are not made before the older ones are acknowledged.
    process = start_process(relay, "--loop", "0", "--outbox", "kept")
    relay.wait_for(lambda: len(relay.lines) == 2)
    process.kill()
    process.communicate()
    assert len(kept_in(tmp_path / "kept")) == 2


def test_a_loop_keeps_its_events_through_an_outage_and_hands_them_over_in_order(
    start_relay: Callable[..., Relay], tmp_path: Path
) -> None:
    relay = start_relay(accept(2), *[close_at_once] * 7, accept_all)
    assert send(relay, "--loop", "0.02", "--count", "12", "--outbox", "kept", "--retries", "1", "--id", "e") == 0
    assert relay.accepted == [f"e-{number}" for number in range(1, 13)]
    assert kept_in(tmp_path / "kept") == []


def test_a_loop_makes_its_events_on_time_while_the_relay_is_away_however_often_one_is_tried(
    closed_port: int, tmp_path: Path
) -> None:
    process = start_process(closed_port, "--loop", "0.05", "--outbox", "kept", "--retries", "1000000")
    wait_for(lambda: len(list((tmp_path / "kept").glob("*.json"))) >= 5)
    process.terminate()
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75 and "0 lost" in errors


def test_names_stay_in_order_when_the_clock_is_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = client.Outbox("kept")
    first = outbox.keep({"event": "a"})
    monkeypatch.setattr(client.time, "time_ns", lambda: 1000)
    second = outbox.keep({"event": "b"})
    other = client.Outbox("kept")
    assert other.claim() == [first, second]
    assert other.keep({"event": "c"}) > second


def test_a_kept_event_that_another_client_has_handed_over_is_no_trouble(capsys: pytest.CaptureFixture[str]) -> None:
    outbox = client.Outbox("kept")
    assert outbox.claim() == []
    assert outbox.load("00000000000000000001-aa.json") == {}
    outbox.remove("00000000000000000001-aa.json")
    outbox.release()
    assert capsys.readouterr().err == ""


def test_two_clients_at_one_outbox_hand_everything_over_once(
    start_relay: Callable[..., Relay], closed_port: int, tmp_path: Path
) -> None:
    for number in range(20):
        send(closed_port, "--event", f"kept{number}", "--outbox", "kept", "--retries", "0")
    both = threading.Barrier(2, timeout=PATIENCE_S)

    def script(peer: Peer) -> None:
        line = peer.read()
        both.wait()  # both are at it now
        peer.accept(line)
        accept_all(peer)

    relay = start_relay(script)
    processes = [start_process(relay, "--event", f"new{number}", "--outbox", "kept") for number in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, errors
    assert len(relay.lines) == len(relay.accepted) == 22  # the lock: nothing was even sent twice
    assert list((tmp_path / "kept").iterdir()) == []


def test_an_outbox_that_cannot_be_used_costs_no_event(
    relay: Relay, closed_port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert send(relay, "--outbox", "file/kept") == 0
    assert "nothing can be kept there" in capsys.readouterr().err
    assert send(closed_port, "--outbox", "file/kept", "--retries", "0") == 75
    assert "lost, for it could not be kept either: MOTION_DETECTED" in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_written_event(
    closed_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(client.os, "fsync", full)
    (tmp_path / "kept").mkdir()
    assert send(closed_port, "--outbox", "kept", "--retries", "0") == 75
    assert list((tmp_path / "kept").iterdir()) == []
    errors = capsys.readouterr().err
    assert "No space left on device; cannot keep MOTION_DETECTED cam1" in errors
    assert "lost, for it could not be kept either: MOTION_DETECTED" in errors


def test_nothing_that_the_client_took_on_is_lost_when_it_is_killed_over_and_over() -> None:
    client_nemesis.run(ROOT, seed=4, kills=5)


# ──────────────────────────────────────────────── TLS ─────────────────────────────────────────────────


def test_tls_verifies_against_the_given_authority(
    start_relay: Callable[..., Relay], certificates: Certificates
) -> None:
    relay = start_relay(tls=certificates.context("good"))
    assert send(relay, "--tls", "--cafile", certificates.ca) == 0
    assert send(relay, "--cafile", certificates.ca, "--host", "localhost", "--count", "600") == 0
    assert len(relay.accepted) == 601


@pytest.mark.parametrize("tls", [None, "true", "ON", "1"])
def test_tls_is_set_up_by_the_environment_too(
    start_relay: Callable[..., Relay], certificates: Certificates, monkeypatch: pytest.MonkeyPatch, tls: str | None
) -> None:
    context = certificates.context("good")
    context.load_verify_locations(certificates.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    cert, key = certificates.pair("good")
    variables = {"ALERT_CAFILE": certificates.ca, "ALERT_CERT": cert, "ALERT_KEY": key, "ALERT_TLS": tls}
    for variable, value in variables.items():
        if value:
            monkeypatch.setenv(variable, value)
    relay = start_relay(tls=context)
    assert send(relay, "--count", "2") == 0
    assert len(relay.accepted) == 2


def test_alert_tls_alone_trusts_only_the_authorities_of_the_system(
    start_relay: Callable[..., Relay],
    certificates: Certificates,
    *,
    monkeypatch: pytest.MonkeyPatch,
    relay: Relay,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ALERT_TLS", "yes")
    assert send(start_relay(tls=certificates.context("good")), "--retries", "0") == 75
    assert "does not verify" in capsys.readouterr().err
    monkeypatch.setenv("ALERT_TLS", "off")
    assert send(relay) == 0


@pytest.mark.parametrize(("name", "with_ca"), [("good", False), ("wrong", True), ("expired", True)])
def test_a_certificate_that_does_not_verify_is_exit_75_without_retries(
    start_relay: Callable[..., Relay],
    certificates: Certificates,
    capsys: pytest.CaptureFixture[str],
    *,
    tmp_path: Path,
    name: str,
    with_ca: bool,
) -> None:
    relay = start_relay(tls=certificates.context(name))
    trust = ["--cafile", certificates.ca] if with_ca else []
    assert send(relay, "--tls", *trust, "--outbox", "kept") == 75
    assert relay.connections == 1 and relay.lines == []
    assert len(kept_in(tmp_path / "kept")) == 1
    errors = capsys.readouterr().err
    assert "does not verify" in errors and "--cafile" in errors


def test_a_client_certificate_is_shown(
    start_relay: Callable[..., Relay], certificates: Certificates, capsys: pytest.CaptureFixture[str]
) -> None:
    context = certificates.context("good")
    context.load_verify_locations(certificates.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    relay = start_relay(tls=context)
    trust = ["--cafile", certificates.ca, "--retries", "0"]
    cert, key = certificates.pair("good")
    assert send(relay, *trust, "--cert", cert, "--key", key) == 0
    assert send(relay, *trust) == 75
    assert "--cert" in capsys.readouterr().err


def test_an_encrypted_key_is_an_error_and_not_a_question(certificates: Certificates, tmp_path: Path) -> None:
    cert, key = certificates.pair("good")
    locked = str(tmp_path / "locked.key")
    lock = ["openssl", "ec", "-in", key, "-aes256", "-passout", "pass:secret", "-out", locked]
    subprocess.run(lock, check=True, capture_output=True)
    assert client.main(["--cert", cert, "--key", locked]) == 2


def test_the_time_out_is_for_the_whole_tls_handshake(
    start_relay: Callable[..., Relay], capsys: pytest.CaptureFixture[str]
) -> None:
    done = threading.Event()

    def script(peer: Peer) -> None:
        peer.say(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc")  # the beginning of a long ServerHello
        while not done.wait(0.02):
            peer.say(b"\0")

    relay = start_relay(script)
    start = time.monotonic()
    assert send(relay, "--tls", "--timeout", "0.3", "--retries", "0") == 75
    done.set()
    assert 0.3 <= time.monotonic() - start < 5
    assert "not handed over: no answer in time" in capsys.readouterr().err


def test_tls_to_a_plain_port_and_plain_to_a_tls_port_say_so(
    start_relay: Callable[..., Relay], certificates: Certificates, capsys: pytest.CaptureFixture[str]
) -> None:
    def greet(peer: Peer) -> None:
        peer.say(b"220 hello\r\n")

    assert send(start_relay(greet), "--tls", "--retries", "0") == 75
    assert "leave out --tls" in capsys.readouterr().err
    assert send(start_relay(tls=certificates.context("good")), "--retries", "0") == 75
    assert "not handed over" in capsys.readouterr().err
