#!/usr/bin/env python3
"""client: the DVR. Hands events to the relay over TCP, one JSON object a line.

    settings ─▶ event ─▶ window of unanswered lines ──JSON lines──▶ the relay
                             │  ▲
                             ▼  │  what could not be handed over
                            outbox

    python3 client.py --event DOOR_OPENED --camera garage --image door.jpg
    python3 client.py --loop 10 --camera cam2 --image /run/cam2.jpg --outbox /var/spool/cam2
    python3 client.py --loop 0 --count 10000          as fast as the relay acknowledges
    python3 client.py --heartbeat 60 --camera cam2    says that the camera lives

The promise: exit 0 means that the relay has every event on disk. An event keeps its id and its content over every
reconnection, so the relay takes it once, however often it had to be sent. With --outbox, an event that could not be
handed over is on disk here before the client first waits, and goes first next time.

Cameras start one process an event, so one event must cost little more than the start of an interpreter that has json
and socket. Hence a table of our own reads the flags (argparse would add a tenth), and what only some runs need (ssl,
random, signal) is imported where it is needed.
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # imports leave no garbage; looking for it would cost 1.3 ms; loops turn it on again

import json
import os
import re
import socket
import sys
import time
from collections import deque
from types import SimpleNamespace as Options

TYPE_CHECKING = False  # typing.TYPE_CHECKING without loading typing
if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any, TextIO

__version__ = "1.0.0"

EX_OK, EX_USAGE, EX_DATAERR, EX_TEMPFAIL, EX_NOPERM, EX_CONFIG = 0, 2, 65, 75, 77, 78

INFINITE = float("inf")

WINDOW_LINES = 512  # lines on their way at once: their answers fit into the socket buffers, so nobody blocks
WINDOW_BYTES = 4 * 1024 * 1024  # the same in bytes: a backlog of pictures must not fill the memory
ANSWER_MAX_BYTES = 64 * 1024  # one read; a longer line is no answer of a relay
IMAGE_MAX_BYTES = (12 << 20) - (64 << 10)  # in Base64 a larger one is over the 16 MiB of a line, and costs the alert
SLOWEST_BYTES_S = 128 * 1024  # each of these makes a deadline a second longer: slow uplinks get pictures through
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.5, 30.0  # doubled from one to the other: a relay restarts within a second or two
CLOSING_S = 2.0  # after Ctrl-C, outstanding answers are waited for this long
LONGEST_S = 20 * 86400.0  # of any setting: a socket cannot wait longer than 24 days
LOOK_S = 0.2  # between two progress lines, and between two looks whether a signal has come

REFUSED = ("bad_json", "bad_event", "too_large")  # about the line: sending it again would not help


class Stop(Exception):
    """The program cannot start: (exit code, a sentence)."""


# ────────────────────────────────────────────── Words ───────────────────────────────────────────────


def explain(error: Exception) -> str:
    """What went wrong in one sentence, with what to do about it where that is known."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if hasattr(error, "verify_message"):  # ssl.SSLCertVerificationError, without loading ssl
        return f"its certificate does not verify ({error.verify_message}); give its CA as --cafile, its name as --host"
    if "CERTIFICATE_REQUIRED" in text:
        return "the relay wants to see a certificate; give one with --cert and --key"
    if "WRONG_VERSION_NUMBER" in text:
        return "no TLS is spoken on this port; leave out --tls, --cafile and --cert"
    return text


def printable(text: str) -> str:
    """Text of others on one line, harmless to a terminal, bounded. Persian and emoji need U+200C and U+200D."""
    return "".join(
        c if c.isprintable() or c in "\u200c\u200d" else c.encode("unicode_escape").decode("ascii") for c in text[:500]
    )


def say(text: str, *, end: str = "\n", stream: TextIO | None = None) -> None:
    """On standard output, at once. A reader that has gone (`| head -1`) or a full disk stops no alert."""
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError:
        pass


def tell(text: str, *, end: str = "\n") -> None:
    """A sentence on standard error; on a terminal in place of the progress line."""
    if sys.stderr:
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""
        say(f"{clear}client.py: {printable(text)}", end=end, stream=sys.stderr)


# ───────────────────────────────────────────── Settings ─────────────────────────────────────────────
# A flag wins over the environment, the environment over .env.


def seconds(text: str) -> float:
    """`90`, `0.5`, `5m`, `1h`, `5d` -> seconds."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)", text.strip().lower())
    value = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]] if match else INFINITE
    if value > LONGEST_S:
        raise ValueError(f"{text!r} is not a duration up to 20d; write 90 (seconds), 0.5, 5m, 1h or 5d")
    return value


def whole(low: int, high: int) -> Callable[[str], int]:
    """A converter for whole numbers from `low` to `high`."""

    def convert(text: str) -> int:
        if not (text.isdecimal() and len(text) <= 12 and low <= int(text) <= high):
            raise ValueError(f"{text!r} is wrong; give a whole number from {low} to {high}")
        return int(text)

    return convert


def host_name(text: str) -> str:
    """A name or an address without brackets; "", 0.0.0.0 and :: mean this machine."""
    if text.count(":") == 1 or "]:" in text:
        raise ValueError(f"{text!r} holds a port, which is given apart from the host")
    host = text.strip().removeprefix("[").removesuffix("]")
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def key_value(text: str) -> dict[str, str | float]:
    """`KEY=VALUE`. What JSON would write the same way (21.5, 7, true) is that number or boolean, all else is text."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ValueError(f"{text!r} is not KEY=VALUE")
    is_json = re.fullmatch(r"true|false|-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,15})?", value)
    if is_json and json.dumps(json.loads(value)) == value:
        return {clean(key): json.loads(value)}
    return {clean(key): clean(value)}


def clean(text: str) -> str:
    """What the command line held that is no text (lone surrogates) becomes U+FFFD: the alert must get through."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# Flag: the word for its value ("": a switch), default, converter, what --help says. An option has its flag's name.
FLAGS: dict[str, tuple[str, Any, Callable[[str], Any], str]] = {
    "host": ("H", "127.0.0.1", host_name, "the relay (ALERT_HOST); 0.0.0.0 and :: mean this machine"),
    "port": ("P", 5000, whole(1, 65535), "its port (ALERT_PORT)"),
    "event": ("E", "MOTION_DETECTED", clean, "what happened: any name of A-Z a-z 0-9 _ . -"),
    "camera": ("C", "cam1", clean, "where: a name in any script"),
    "timestamp": ("T", "", clean, "when, ISO 8601 (default: now; with --id, when the relay gets it)"),
    "image": ("FILE", "", str, "the picture, read anew for each event; -: standard input, read once"),
    "image_url": ("U", "", clean, "a link to the picture"),
    "meta": ("KEY=VALUE", {}, key_value, "shown in the mail; may be repeated"),
    "id": ("ID", "", clean, "calls with the same id are one alert; a loop adds -1, -2, … (default: random)"),
    "token": ("T", "", clean, "the relay's secret; in ALERT_TOKEN other users do not see it"),
    "loop": ("SECONDS", None, seconds, "an event every so often until Ctrl-C; 0: as fast as the relay answers"),
    "count": ("N", 0, whole(1, 10**11), "end after N events, or heartbeats where there are no events"),
    "timeout": ("S", 10.0, seconds, "how long a try may take: connecting and the answer"),
    "retries": ("N", 3, whole(0, 10**6), "how often to try again, waiting longer each time"),
    "outbox": ("DIR", "", str, "keep there what could not be handed over; it goes first next time"),
    "heartbeat": ("SECONDS", 0.0, seconds, "say so often that the camera lives; without --loop, no events"),
    "tls": ("", False, bool, "speak TLS; certificate and host name are verified"),
    "cafile": ("F", "", str, "trust these certificates (PEM), not the system's; implies --tls"),
    "cert": ("F", "", str, "show this certificate (PEM) to the relay; implies --tls"),
    "key": ("F", "", str, "its private key (PEM), unless --cert holds it"),
    "json": ("", False, bool, "print each answer line as it came"),
    "env_file": ("FILE", "", str, "settings file (default: .env, if it is there)"),
    "version": ("", False, bool, "print the version"),
    "help": ("", False, bool, "print this"),
}
VARIABLES = {"host": "ALERT_HOST", "port": "ALERT_PORT", "token": "ALERT_TOKEN"}

EXIT_CODES = """
exit: 0 all accepted; 2 usage; 65 refused by the relay; 75 not handed over, try again (also when kept in
      the outbox); 77 unauthorized; 78 a setting is wrong"""


def help_text() -> str:
    """--help, made from the table that reads the flags."""
    lines = ["usage: client.py [flags]", "", "Hands events to the alert relay, as a DVR would.", ""]
    for flag, (word, default, _, text) in FLAGS.items():
        usage = f"--{flag.replace('_', '-')} {word}"
        lines.append(f"  {usage:<20} {text}{f' (default: {default})' if default else ''}")
    return "\n".join([*lines, EXIT_CODES])


def unquoted(text: str) -> str:
    """Without one pair of literal quotes around it: Motion 5 passes them along."""
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"" else text


def read_flags(argv: Iterable[str]) -> dict[str, Any]:
    """The converted values of `--flag value`, `--flag=value` and `--switch` by flag. Raises Stop."""
    given: dict[str, Any] = {}
    words = iter(argv)
    for word in words:
        flag, equals, text = unquoted(word).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in FLAGS:
            raise Stop(EX_USAGE, f"{flag!r} is not a flag; --help shows them all")
        value_word, _, convert, _ = FLAGS[name]
        if value_word and not equals:
            text = next(words, "--")
            if text.startswith("--"):
                raise Stop(EX_USAGE, f"{flag} needs a value: {flag} {value_word}")
        elif equals and not value_word:
            raise Stop(EX_USAGE, f"{flag} takes no value")
        try:
            value = convert(unquoted(text)) if value_word else True
        except ValueError as error:
            raise Stop(EX_USAGE, f"{flag}: {error}") from None
        given[name] = given.get("meta", {}) | value if name == "meta" else value
    return given


def read_env_file(path: str) -> dict[str, str]:
    """`KEY=value` lines; `#` comments, optional quotes and `export`. "": ./.env, if it is there. Raises Stop."""
    if not path and not os.path.exists(".env"):
        return {}
    path, values = path or ".env", {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().splitlines()
    except (OSError, ValueError) as error:
        why = "cannot be read: save it as UTF-8" if isinstance(error, UnicodeError) else explain(error)
        raise Stop(EX_CONFIG, f"settings file {path}: {why}") from None
    for number, raw in enumerate(lines, 1):
        line = re.sub(r"^export\s+", "", raw.strip())
        if not line or line.startswith("#"):
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or len(key.split()) != 1:
            raise Stop(EX_CONFIG, f"settings file {path}, line {number}: not KEY=value")
        quoted = re.match(r"""(["'])(.*?)\1""", value)
        values[key] = quoted[2] if quoted else re.split(r"(?:^|\s)#", value, maxsplit=1)[0].rstrip()
    return values


def read_options(argv: Sequence[str], environ: Mapping[str, str]) -> Options:
    """Flags, environment and .env in one. Raises Stop, naming the flag or variable that is wrong."""
    given = read_flags(argv)
    from_file = read_env_file(given.get("env_file", ""))
    for name, variable in VARIABLES.items():
        text = environ.get(variable, from_file.get(variable, "")).strip()
        if text and name not in given:
            try:
                given[name] = FLAGS[name][2](text)
            except ValueError as error:
                raise Stop(EX_CONFIG, f"{variable}: {error}") from None
    options = Options(**{name: row[1] for name, row in FLAGS.items()} | given)
    if not (options.event and options.camera):
        raise Stop(EX_USAGE, "--event and --camera must not be empty; say what happened, and where")
    if options.key and not options.cert:
        raise Stop(EX_USAGE, "--key needs --cert")
    if 0 in (options.timeout, given.get("heartbeat")):
        raise Stop(EX_USAGE, "--timeout and --heartbeat must be more than 0")
    if options.loop is None and options.heartbeat and "event" in given:
        raise Stop(EX_USAGE, "--heartbeat alone sends no event; add --loop SECONDS, or leave --event out")
    if options.loop is None and not options.heartbeat:  # one event is a loop of one
        options.loop, options.count = (0.0, options.count) if options.count else (INFINITE, 1)
    return options


# ────────────────────────────────────────────── Events ──────────────────────────────────────────────


class Line:
    """An event or a heartbeat on its way to the relay; `kept` names the file that keeps it, if one does."""

    def __init__(self, content: dict[str, Any], token: str, kept: str) -> None:
        self.content, self.kept = content, kept
        self.wire = json.dumps({**content, "token": token} if token else content).encode() + b"\n"

    def __str__(self) -> str:
        """What and where, for a person."""
        content = self.content
        return f"{content['event']} {content.get('camera')}" if "event" in content else str(content.get("heartbeat"))


def make_event(options: Options, picture: bytes, number: int, now: float) -> dict[str, Any]:
    """Event `number` (from 1) of this call; `now` in Unix time. Fields that were not asked for are left out."""
    # With an id of the caller's, nothing in the event may differ when the call is repeated: no time of our own.
    name = options.id if options.count == 1 else options.id and f"{options.id}-{number}"
    event = {
        "event": options.event,
        "camera": options.camera,
        "id": name or os.urandom(12).hex(),
        "timestamp": options.timestamp or (not name and utc(now)),
        "image_url": options.image_url,
        "meta": options.meta,
    }
    if picture:
        from binascii import b2a_base64  # noqa: PLC0415

        event["image_filename"] = options.image != "-" and clean(os.path.basename(options.image))
        event["image_b64"] = b2a_base64(picture, newline=False).decode("ascii")
    return {field: value for field, value in event.items() if value}


def utc(now: float) -> str:
    """ISO 8601 in UTC, to the millisecond."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"


def read_picture(path: str) -> bytes:
    """The picture as it is now (-: standard input); empty, with a warning, where there is none to be had."""
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            data = file.read(IMAGE_MAX_BYTES + 1)
        if not 0 < len(data) <= IMAGE_MAX_BYTES:
            raise ValueError("it is too big" if data else "it is empty")
    except (OSError, ValueError) as error:
        tell(f"warning: --image {path}: {explain(error)}; the event goes without it")
        return b""
    return data


class Ticker:
    """The deadlines start, start + interval, …, `left` of them; missed ones are skipped: no drift and no burst."""

    def __init__(self, interval: float, left: float, start: float) -> None:
        self.interval, self.left = interval, left
        self.due = start if left else INFINITE

    def take(self, now: float) -> None:
        """The tick that was due by `now` is done."""
        self.left -= 1
        missed = (now - self.due) // self.interval if self.interval else 0.0
        self.due = self.due + (1 + missed) * self.interval if self.left else INFINITE

    def stop(self) -> None:
        self.left, self.due = 0, INFINITE


# ──────────────────────────────────────────── Connection ────────────────────────────────────────────
# Whatever ends a connection is an OSError.


def tls_context(options: Options) -> ssl.SSLContext | None:
    """A context that verifies, or None for a plain connection. Raises Stop where a file cannot be used."""
    if not (options.tls or options.cafile or options.cert):
        return None
    import ssl  # noqa: PLC0415

    used = f"--cafile {options.cafile}"
    try:
        context = ssl.create_default_context(cafile=options.cafile or None)
        if options.cafile:  # Python 3.13 asks for extensions that a CA made with `openssl req -x509` does not have
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if options.cert:
            used = f"--cert {options.cert}, --key {options.key}"
            # the empty password makes an encrypted key an error here instead of a question on the terminal
            context.load_cert_chain(options.cert, options.key or None, password="")
    except OSError as error:
        raise Stop(EX_USAGE, f"{used}: {explain(error)}") from None
    return context


class Connection:
    """One connection to the relay, at the first of its addresses that takes one."""

    def __init__(self, options: Options, tls: ssl.SSLContext | None) -> None:
        # A host as bytes: for a str, Python would load its tables of international names first.
        host: Any = options.host.encode() if options.host.isascii() else options.host
        try:
            # An equal share of the time for each address: one that swallows packets leaves some for the next.
            shares = len(socket.getaddrinfo(host, options.port, 0, socket.SOCK_STREAM))
            self.socket = socket.create_connection((host, options.port), options.timeout / shares)
        except ValueError as error:
            raise ConnectionError(f"this is no name of a host: {error}") from None
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_hostname=options.host)
        self.rest = b""  # of an answer that has not ended yet
        self.hint = "" if tls else " without an answer (does it want --tls?)"

    def send(self, data: bytes, deadline: float) -> None:
        """Everything, by `deadline` (monotonic)."""
        view = memoryview(data)
        while view:
            self.socket.settimeout(max(0.001, deadline - time.monotonic()))
            view = view[self.socket.send(view) :]

    def receive(self, wait: float) -> list[bytes]:
        """The answer lines that come within `wait` seconds, as soon as there are any; none is no error."""
        self.socket.settimeout(max(0.001, wait))
        try:
            data = self.socket.recv(ANSWER_MAX_BYTES)
        except TimeoutError:
            return []
        except ConnectionResetError as error:
            raise ConnectionError(f"{error.strerror}{self.hint}") from None
        if not data:
            raise ConnectionError(f"the relay closed the connection{self.hint}")
        *lines, self.rest = (self.rest + data).split(b"\n")
        if lines:
            self.hint = ""
        if len(self.rest) > ANSWER_MAX_BYTES:
            raise ConnectionError("the relay's answer has no end")
        return lines


def parse_answer(raw: bytes) -> dict[str, Any]:
    """The answer in a line of the relay. Raises ConnectionError: who says anything else is no relay."""
    try:
        answer = json.loads(raw.decode())
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or not isinstance(answer.get("ok"), bool):
        said = raw[:80].decode("utf-8", "replace")
        raise ConnectionError(f"this is no answer of an alert relay (is it the right port?): {said}")
    return answer


# ────────────────────────────────────────────── Outbox ──────────────────────────────────────────────


class Outbox:
    """A folder of events that could not be handed over: a complete JSON line a file, the oldest name first.

    Any number of clients may share a folder. A lock lets one at a time hand over what is kept, which only saves work:
    an event that two clients send has one id and is taken once. The token is never written. Trouble with the folder is
    told and stops nothing: the event can still be sent. The folder "" keeps nothing.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.mine: set[str] = set()  # kept by this process and not handed over yet
        self.newest = 0
        self.lock: int | None = None
        try:
            if folder and not os.path.isdir(folder):
                os.makedirs(folder, 0o700, exist_ok=True)
                sync_folder(os.path.dirname(os.path.abspath(folder)))
        except OSError as error:
            tell(f"--outbox {folder}: {explain(error)}; nothing will be kept")
            self.folder = ""

    def names(self) -> list[str]:
        """The files that hold an event, oldest first."""
        try:
            found = os.listdir(self.folder) if self.folder else []
        except OSError as error:
            tell(f"--outbox {self.folder}: {explain(error)}")
            return []
        return sorted(name for name in found if name.endswith(".json") and name[:20].isdecimal())

    def keep(self, content: Mapping[str, Any]) -> str:
        """The name under which the event is on disk, durably, when this returns; "" where that failed."""
        if not self.folder:
            return ""
        self.newest = max(time.time_ns(), self.newest + 1)  # in order even where the clock was set back
        name = f"{self.newest:020d}-{os.urandom(4).hex()}.json"
        path = os.path.join(self.folder, name)
        try:
            with open(os.open(path + ".tmp", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(json.dumps(content).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(path + ".tmp", path)
            sync_folder(self.folder)
        except OSError as error:
            tell(f"--outbox {self.folder}: cannot keep an event: {explain(error)}")
            self.done(name + ".tmp")
            return ""
        self.mine.add(name)
        return name

    def claim(self) -> list[str]:
        """What is kept, for this process to hand over until it calls `release`; nothing where another one is at it."""
        try:
            import fcntl  # noqa: PLC0415

            self.lock = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return []
        except (ImportError, OSError):
            pass  # Windows, network file systems: two clients may send the same, and the relay takes it once
        names = self.names()
        self.newest = int(names[-1][:20]) if names else 0
        return names

    def release(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def load(self, name: str) -> dict[str, Any]:
        """The event of a file; empty where there is none any more, or none to be had. A damaged one is moved aside."""
        try:
            with open(os.path.join(self.folder, name), encoding="utf-8") as file:
                content = json.load(file)
            if not isinstance(content, dict):
                raise ValueError("not a JSON object")
        except FileNotFoundError:
            return {}  # another client has handed it over
        except OSError as error:
            tell(f"--outbox {self.folder}: {name} cannot be read now: {explain(error)}")
            return {}
        except (ValueError, RecursionError) as error:
            tell(f"--outbox {self.folder}: {name} is damaged: {explain(error)}")
            self.done(name, refused=True)
            return {}
        return content

    def done(self, name: str, *, refused: bool = False) -> None:
        """Forget an event that the relay has. One that it will never take is moved aside, so that it blocks nothing."""
        path = os.path.join(self.folder, name)
        self.mine.discard(name)
        try:  # should a power cut undo this, the event goes again and the relay answers `duplicate`
            if refused:
                os.replace(path, path + ".refused")
                tell(f"moved aside: {path}.refused")
            else:
                os.unlink(path)
        except FileNotFoundError:
            pass  # another client was faster
        except OSError as error:
            tell(f"--outbox {path}: {explain(error)}")


def sync_folder(folder: str) -> None:
    """Make the names in a folder durable. Windows cannot open one."""
    if sys.platform != "win32":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ────────────────────────────────────────────── Sending ─────────────────────────────────────────────


class Sender:
    """Makes what is due, keeps a window of lines on their way, matches the answers in order.

    After a lost connection the unanswered lines go again as they were: the relay knows their ids. A line is given up
    only when the retries are used up, and with an outbox it is in there before the first wait.
    """

    connection: Connection | None = None
    sent = 0  # how many lines of the window this connection was given
    window_bytes = 0
    failures = 0  # in a row
    retry_at = deadline = 0.0  # when to connect again; when the next answer must be here
    made = accepted = refused = lost = 0
    unauthorized = False
    signals = 0

    def __init__(self, options: Options) -> None:
        self.options, self.tls, self.outbox = options, tls_context(options), Outbox(options.outbox)
        self.peer = f"{options.host} port {options.port}"
        self.stdin_picture = read_picture("-") if options.image == "-" else b""
        self.backlog: deque[str] = deque()  # names of kept events, to be handed over before new ones
        self.window: list[Line] = []  # on their way, the oldest first

        self.start = time.monotonic()
        count = options.count or INFINITE
        alone = options.loop is None  # heartbeats, and no events
        self.events = Ticker(options.loop or 0, 0 if alone else count, self.start)
        self.beats = Ticker(options.heartbeat, options.heartbeat and (count if alone else INFINITE), self.start)
        self.leading = self.beats if alone else self.events  # the run ends with these
        self.elastic = options.loop == 0  # events are made as fast as the relay acknowledges

        progress = self.elastic and bool(sys.stderr) and sys.stderr.isatty()
        self.looks = Ticker(LOOK_S, INFINITE if progress else 0, self.start)
        self.quiet = progress and bool(sys.stdout) and sys.stdout.isatty()  # no line an event under the progress line

    def run(self) -> int:
        """Until everything is answered or given up. Returns the exit code."""
        try:
            self.fill()
            while self.leading.left or self.backlog or self.window:
                try:
                    self.step()
                except OSError as error:
                    self.recover(error)
                except KeyboardInterrupt:
                    self.recover(InterruptedError("interrupted"))
                if self.signals:
                    self.stop()
                self.fill()
        finally:
            self.disconnect()  # an event that a second signal caught half-written is kept now
        self.outbox.release()
        kept = len(self.outbox.mine.intersection(self.outbox.names()))
        if self.options.loop != INFINITE:
            took = time.monotonic() - self.start
            counts = f"{self.accepted} accepted, {self.refused} refused, {kept} kept, {self.lost} lost"
            tell(f"{counts} in {took:.1f} s ({self.accepted / max(took, 1e-3):.1f}/s)")
        if self.unauthorized:
            return EX_NOPERM
        return EX_TEMPFAIL if kept or self.lost else EX_DATAERR if self.refused else EX_OK

    def fill(self) -> None:
        """Put into the window what is due: kept events first, for they are older."""
        now = time.monotonic()
        if not (self.backlog or self.window):
            self.outbox.release()
            if self.outbox.folder and now >= min(self.events.due, self.beats.due):
                self.backlog.extend(self.outbox.claim())
        while self.backlog and self.has_room():
            name = self.backlog.popleft()
            if content := self.outbox.load(name):
                self.enqueue(content, kept=name)
        if now >= self.beats.due:
            self.beats.take(now)
            if not any("heartbeat" in line.content for line in self.window):
                self.enqueue({"heartbeat": self.options.camera})
        while now >= self.events.due and self.may_make():
            self.events.take(now)
            self.make()

    def has_room(self) -> bool:
        return len(self.window) < WINDOW_LINES and self.window_bytes < WINDOW_BYTES

    def may_make(self) -> bool:
        """Timed events are made at their time and wait in the outbox, if there is one; others wait for room."""
        return (self.has_room() and not self.backlog) or (bool(self.outbox.folder) and not self.elastic)

    def make(self) -> None:
        """A new event, in order behind the kept ones."""
        self.made += 1
        image = self.options.image
        picture = read_picture(image) if image not in ("", "-") else self.stdin_picture
        event = make_event(self.options, picture, self.made, time.time())
        must_wait = self.backlog or self.failures or not self.has_room()
        if must_wait and (kept := self.outbox.keep(event)):
            self.backlog.append(kept)
        else:
            self.enqueue(event)

    def enqueue(self, content: dict[str, Any], kept: str = "") -> None:
        line = Line(content, self.options.token, kept)
        self.window.append(line)
        self.window_bytes += len(line.wire)

    def step(self) -> None:
        """Send what is unsent, settle what is answered, show how far it is. Raises OSError."""
        if self.sent < len(self.window) and time.monotonic() >= self.retry_at:
            self.send()
        for raw in self.wait():
            self.settle(raw)
        now = time.monotonic()
        if now >= self.looks.due:
            self.looks.take(now)
            total = f" of {self.options.count}" if self.options.count else ""
            tell(f"{self.accepted}{total} accepted, {self.accepted / max(now - self.start, 1e-3):.0f}/s", end="")
        if self.sent and now >= self.deadline:
            raise TimeoutError(f"no answer within {self.options.timeout:g} s")

    def send(self) -> None:
        """Connect, where that is to be done, and send all unsent lines."""
        if not self.sent:  # connecting counts: a try takes no longer than --timeout
            self.deadline = time.monotonic() + self.options.timeout
        data = b"".join(line.wire for line in self.window[self.sent :])
        self.deadline += len(data) / SLOWEST_BYTES_S
        self.sent = len(self.window)
        if self.connection is None:
            self.connection = Connection(self.options, self.tls)
        try:
            self.connection.send(data, self.deadline)
        except OSError:
            for raw in self.connection.receive(0):  # it may have said why it closed
                self.settle(raw)
            raise

    def wait(self) -> list[bytes]:
        """The answers that come before something else is to be done."""
        wake = min(self.beats.due, self.events.due if self.may_make() else INFINITE)
        if self.window:
            wake = min(wake, self.deadline if self.sent else self.retry_at)
        wait = min(max(0.0, wake - time.monotonic()), LOOK_S)
        if self.connection:
            return self.connection.receive(wait)
        time.sleep(wait)
        return []

    def settle(self, raw: bytes) -> None:
        """Match one answer to the oldest unanswered line. Raises OSError where the lines must go again later."""
        answer = parse_answer(raw)
        if self.options.json:
            say(raw.decode("utf-8", "replace").rstrip("\r"))
        error = "" if answer["ok"] else str(answer.get("error"))
        told = f"{error}: {answer.get('detail', '')}"
        self.unauthorized = error == "unauthorized"
        if (error and error not in REFUSED) or not self.sent:
            raise ConnectionError(f"the relay says {told if error else 'yes, without being asked'}")
        line = self.window.pop(0)
        self.sent -= 1
        self.window_bytes -= len(line.wire)
        self.failures = 0
        self.deadline = time.monotonic() + self.options.timeout + self.window_bytes / SLOWEST_BYTES_S
        if error:
            self.refused += 1
            tell(f"refused: {line} {line.content.get('id', '')}: {told}")
        else:
            self.accepted += 1
            if not (self.quiet or self.options.json):
                warning = f"  warning: {answer['warning']}" if answer.get("warning") else ""
                say(printable(f"{answer.get('status')!s:<10} {line}  {answer.get('id', '')}{warning}".rstrip()))
        if line.kept:
            self.outbox.done(line.kept, refused=bool(error))

    # What goes wrong.

    def disconnect(self) -> None:
        """What was on its way has to go again; in the outbox no wait and no kill can lose it."""
        self.sent = 0
        if self.connection:
            self.connection.socket.close()
            self.connection = None
        for line in self.window:
            if "event" in line.content and not line.kept:
                line.kept = self.outbox.keep(line.content)

    def recover(self, error: OSError) -> None:
        """Try again later, or give up, what was on its way. A connection that ends when nothing was costs nothing."""
        self.disconnect()
        if not self.window:
            return
        self.failures += 1
        hopeless = self.unauthorized or hasattr(error, "verify_message") or isinstance(error, InterruptedError)
        if hopeless or self.failures > self.options.retries:
            away = "; is server.py running there?" if isinstance(error, ConnectionRefusedError) else ""
            self.give_up(explain(error) + (away or "; set ALERT_TOKEN to the relay's" * self.unauthorized))
            return
        import random  # noqa: PLC0415

        pause = min(BACKOFF_FIRST_S * 2.0 ** min(self.failures - 1, 30), BACKOFF_MAX_S) * random.uniform(0.75, 1.25)
        self.retry_at = time.monotonic() + pause
        tell(f"{self.peer}: {explain(error)}; next try in {pause:.1f} s")

    def give_up(self, reason: str) -> None:
        """What is kept stays for the next time, the rest is lost. A timed loop goes on, where that may help."""
        tell(f"{self.peer}: not handed over: {reason}")
        if kept := len(self.backlog) + sum(bool(line.kept) for line in self.window):
            tell(f"kept in {self.options.outbox}: {kept}; first to go next time")
        for line in self.window:
            if not line.kept:
                self.lost += 1
                if not self.elastic:
                    tell(f"lost: {line} {line.content.get('id', 'heartbeat')}")
        self.window.clear()
        self.backlog.clear()
        self.window_bytes = self.failures = 0
        if self.elastic or self.unauthorized:
            self.stop()

    def on_signal(self, number: int, frame: object) -> None:
        """Ends the run in order; the second one, or one while the connection is made, at once."""
        self.signals += 1
        if self.signals > 1 or (self.sent and not self.connection):
            raise KeyboardInterrupt

    def stop(self) -> None:
        """No new events; the lines on their way have a little time, or one last try."""
        self.events.stop()
        self.beats.stop()
        self.backlog.clear()
        self.options.timeout, self.options.retries = min(self.options.timeout, CLOSING_S), 0
        self.retry_at = 0.0
        self.deadline = min(self.deadline, time.monotonic() + CLOSING_S + self.window_bytes / SLOWEST_BYTES_S)


# ─────────────────────────────────────────── Command line ───────────────────────────────────────────


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name in any script, on a terminal in any encoding
    if {"-h", "--help", "--version"} & set(words):
        say(f"client.py {__version__}" if "--version" in words else help_text())
        return EX_OK
    try:
        options = read_options(words, os.environ)
        sender = Sender(options)
        if options.outbox or options.loop != INFINITE:
            import signal  # noqa: PLC0415

            gc.enable()
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # as a shell sets it for what runs in the background
                    signal.signal(number, sender.on_signal)
        return sender.run()
    except Stop as stop:
        code, reason = stop.args
        tell(reason)
        return int(code)
    except KeyboardInterrupt:
        tell("interrupted")
        return EX_TEMPFAIL


if __name__ == "__main__":
    os._exit(main())  # Python's own clean-up would be a tenth of the whole run; all output is flushed
