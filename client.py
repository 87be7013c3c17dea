#!/usr/bin/env python3
"""client: the DVR. Hands events to the relay over TCP, one JSON object a line.

    settings --> event --> send the line, read its answer --JSON lines--> the relay
                  |  ^
                  v  |  what could not be handed over
                 outbox

One event is made, sent and answered, then the next one, all over one connection. What fails is tried again with
growing pauses. When the tries are used up, the event stays in the outbox and goes first next time; without an outbox
it is lost, and the client says so. Heartbeats go the same way and are never kept.

What is promised: exit code 0 means that the relay has every event on disk. An event keeps its id and its content
however often it is sent, so the relay accepts it once. With an outbox, an event that failed is on disk here before the
client waits to try again.

A camera starts one process for each event. So modules that only some runs need (ssl, random) are imported where they
are used, and typing is not loaded at all.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  All that follows keeps to the syntax of Python 3.6, which can say this.
    sys.stderr.write(f"client.py needs Python 3.11 or later; this is Python {sys.version.split()[0]}.\n")
    sys.exit(78)

import argparse
import binascii
import json
import os
import re
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

TYPE_CHECKING = False  # typing.TYPE_CHECKING without loading typing
if TYPE_CHECKING:
    import ssl
    from typing import Any, NoReturn, TextIO

__version__ = "1.0.0"

EX_OK, EX_USAGE, EX_DATAERR, EX_TEMPFAIL, EX_NOPERM, EX_CONFIG = 0, 2, 65, 75, 77, 78

INFINITE = float("inf")

ANSWER_MAX_BYTES = 64 * 1024  # A longer line is no answer of a relay.
IMAGE_MAX_BYTES = (12 << 20) - (64 << 10)  # In Base64 a larger one exceeds the 16 MiB of a line and costs the alert.
KEPT_MAX_BYTES = 64 << 20  # A larger file in the outbox was not written by this program.
SLOWEST_BYTES_S = 32 * 1024  # Each of these makes a try a second longer: slow uplinks get pictures through.
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.5, 30.0  # The pause doubles from one to the other; a relay restarts in a second.
CLOSING_S = 2.0  # After a signal, the answer to what is on its way is waited for this long.
LONGEST_S = 20 * 86400.0  # The longest duration of a setting: poll(2) cannot wait longer than 24 days.
SIGNAL_CHECK_S = 0.2  # The longest single wait, because Python resumes a call that a signal interrupts (PEP 475).
PROGRESS_S = 0.2  # The time between two progress lines.

REFUSED = ("bad_json", "bad_event", "too_large")  # Errors about the line itself: it is of no use to send it again.


class StartupError(Exception):
    """The program cannot start: (exit code, a sentence)."""


class PermanentError(ConnectionError):
    """The message was not handed over, and it is of no use to try again now."""


# ────────────────────────────────────────────── Output ──────────────────────────────────────────────


def explain(error: BaseException) -> str:
    """What went wrong, in one sentence, with what to do about it where that is known."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, TimeoutError):
        return "no answer in time"
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


def print_line(text: str, *, end: str = "\n", stream: "TextIO | None" = None) -> None:
    """Print at once, on standard output or on `stream`. A reader that has gone or a full disk stops no alert."""
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError:
        pass


def warn(text: str, *, end: str = "\n") -> None:
    """Print a sentence on standard error; on a terminal it replaces the progress line."""
    if sys.stderr is not None:
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""
        print_line(f"{clear}client.py: {printable(text)}", end=end, stream=sys.stderr)


# ───────────────────────────────────────────── Settings ─────────────────────────────────────────────
# A flag wins over the environment, the environment over .env. A converter raises ArgumentTypeError, whose text says
# what is wrong and what is right.

HELP = """\
usage: client.py [flags]        hands events to the alert relay, as a DVR would
  client.py --event DOOR_OPENED --camera garage --image door.jpg
  client.py --camera cam2 --image now.jpg --loop 60 --outbox kept

event  --event NAME (MOTION_DETECTED)  --camera NAME (cam1)  --id ID (random)
       --image FILE (-: standard input)  --image-url URL  --timestamp WHEN
       --meta KEY=VALUE         shown in the mail; may be repeated
relay  --host HOST (127.0.0.1)  --port PORT (5000)  --token SECRET
       --tls                    speak TLS; the certificate is always verified
       --cafile FILE            trust these certificates, not the system's
       --cert FILE --key FILE   show this certificate to the relay
       --timeout SECONDS        how long a try may take (10)
       --retries N              how often to try again, with growing pauses (3)
       --outbox DIR             keep what was not sent; it goes first next time
run    --loop SECONDS           an event every so often; 0: without a pause
       --count N                end after N events, without waiting for Ctrl-C
       --heartbeat SECONDS      say that the camera lives; alone: no events
       --json                   print each answer line as it came
       --env-file FILE (.env)   settings: ALERT_HOST ALERT_PORT ALERT_TOKEN
                                ALERT_TLS ALERT_CAFILE ALERT_CERT ALERT_KEY
       --version, --help
exit   0 all accepted, 2 usage, 65 refused, 77 wrong token, 78 wrong setting,
       75 not handed over: try again (what is in the outbox goes next time)
"""


class Parser(argparse.ArgumentParser):
    """A parser whose help fits a screen of 24 lines, and whose errors fit a line."""

    def format_help(self) -> str:
        return HELP

    def error(self, message: str) -> "NoReturn":
        if message.endswith("expected one argument"):
            message += " (one that begins with - as --flag=VALUE)"
        raise StartupError(EX_USAGE, f"{message}; --help shows all flags")


def seconds(text: str) -> float:
    """`90`, `.5`, `5m`, `1h`, `5d` -> seconds."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([smhd]?)", text.strip().lower())
    value = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]] if match else INFINITE
    if value > LONGEST_S:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration up to 20d; write 90 (seconds), .5, 5m, 1h or 5d")
    return value


def whole(low: int, high: int) -> Callable[[str], int]:
    """A converter for whole numbers from `low` to `high`."""

    def convert(text: str) -> int:
        if not re.fullmatch("[0-9]{1,12}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is wrong; give a whole number from {low} to {high}")
        return int(text)

    return convert


def yes_or_no(text: str) -> bool:
    """`true`, `yes`, `on`, `1` -> True; `false`, `no`, `off`, `0` -> False."""
    if text.lower() not in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is wrong; write true or false")
    return text.lower() in ("true", "yes", "on", "1")


def host_name(text: str) -> str:
    """A name or an address without brackets; "", 0.0.0.0 and :: mean this machine."""
    if text.count(":") == 1 or "]:" in text:
        raise argparse.ArgumentTypeError(f"{text!r} holds a port, which is given apart from the host")
    if set(text) & set("\u00df\u03c2\u200c\u200d"):  # IDNA 2003, as in Python, makes another domain of them than 2008.
        raise argparse.ArgumentTypeError(f"{text!r} is ambiguous; give the name in its ASCII form, xn--...")
    host = text.strip().removeprefix("[").removesuffix("]")
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def valid_text(text: str) -> str:
    """The text, with U+FFFD for the bytes of the command line that are not UTF-8: the alert must get through."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def key_value(text: str) -> "tuple[str, str | float]":
    """`KEY=VALUE`. What JSON would write the same way (21.5, 7, true) is that number or boolean, all else is text."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    is_json = re.fullmatch(r"true|false|-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,15})?", value)
    if is_json and json.dumps(json.loads(value)) == value:
        return valid_text(key), json.loads(value)
    return valid_text(key), valid_text(value)


# The flags that a variable can stand in for: flag, variable, converter, default.
SETTINGS: "tuple[tuple[str, str, Callable[[str], Any], Any], ...]" = (
    ("host", "ALERT_HOST", host_name, "127.0.0.1"),
    ("port", "ALERT_PORT", whole(1, 65535), 5000),
    ("token", "ALERT_TOKEN", valid_text, ""),
    ("tls", "ALERT_TLS", yes_or_no, False),
    ("cafile", "ALERT_CAFILE", str, ""),
    ("cert", "ALERT_CERT", str, ""),
    ("key", "ALERT_KEY", str, ""),
)


def unquoted(text: str) -> str:
    """The text without one pair of literal quotes around it: Motion 5 passes them along."""
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"" else text


def make_parser() -> Parser:
    """The parser of the command line. A flag of SETTINGS that is not given is None."""
    # Without a width, the formatter loads shutil to find out that of the terminal.
    parser = Parser(allow_abbrev=False, formatter_class=lambda prog: argparse.HelpFormatter(prog, width=80))

    def add(name: str, convert: "Callable[[str], Any]", default: object = None, action: str = "store") -> None:
        parser.add_argument(f"--{name}", type=lambda text: convert(unquoted(text)), default=default, action=action)

    for name, _, convert, _ in SETTINGS:
        if name != "tls":
            add(name, convert)
    parser.add_argument("--tls", action="store_true", default=None)
    add("event", valid_text)
    add("camera", valid_text, "cam1")
    add("timestamp", valid_text, "")
    add("image", str, "")
    add("image-url", valid_text, "")
    add("meta", key_value, [], action="append")
    add("id", valid_text, "")
    add("loop", seconds)
    add("count", whole(1, 10**11), 0)
    add("timeout", seconds, 10.0)
    add("retries", whole(0, 10**6), 3)
    add("outbox", str, "")
    add("heartbeat", seconds)
    parser.add_argument("--json", action="store_true")
    add("env-file", str, "")
    parser.add_argument("--version", action="version", version=f"client.py {__version__}")
    return parser


def parse_flags(argv: Iterable[str]) -> argparse.Namespace:
    """The values of the flags. Raises StartupError."""
    parser = make_parser()
    words = [unquoted(word) if unquoted(word).startswith("--") else word for word in argv]
    options, unknown = parser.parse_known_args(words)
    if unknown:  # Only a flag is shown: any other word may be a part of the token.
        flag = unknown[0].partition("=")[0]
        parser.error(f"{flag} is not a flag" if flag.startswith("-") else "a word has no flag before it")
    return options


def read_env_line(line: str) -> dict[str, str]:
    """The setting of one line of a settings file; none for a comment. Raises ValueError, which shows no value."""
    line = re.sub(r"^export\s+", "", line.strip())
    if not line or line.startswith("#"):
        return {}
    if "\ufffd" in line:
        raise ValueError("not UTF-8; save the file as UTF-8")
    key, equals, value = (part.strip() for part in line.partition("="))
    if not equals or len(key.split()) != 1:
        raise ValueError("not KEY=value")
    return {key: shell_word(value) if value.startswith(("'", '"')) else re.split(r"(?:^|\s)#", value)[0].rstrip()}


def shell_word(text: str) -> str:
    """The word in quotes at the beginning, as a POSIX shell reads it but for `$`, which stands for itself here.

    The module shlex keeps the backslash of `"\\$"`, which a shell takes away (POSIX.1-2017, Shell Command Language,
    2.2.3). Raises ValueError where more than a comment follows.
    """
    piece = r"""'([^']*)'|"((?:[^"\\]|\\.)*)"|\\(.)|([^'"\\\s])"""  # in single quotes, in double quotes, escaped, bare
    end = next(re.finditer(f"(?:{piece})*", text)).end()
    if not re.fullmatch(r"(\s+#.*|\s*)", text[end:]):
        raise ValueError("a value in quotes must end with its quote; only a # comment may follow")
    return "".join(
        single + re.sub(r'\\([$`"\\])', r"\1", double) + escaped + bare
        for single, double, escaped, bare in re.findall(piece, text[:end])
    )


def read_env_file(path: str) -> dict[str, str]:
    """The settings in a file of `KEY=value` lines, with `#` comments, optional quotes and `export`.

    What is wrong with a file that was named raises StartupError. Without a name it is ./.env, if that is there. What
    is wrong with that one is a warning and costs only its line: the event must get through. If it belongs to another
    user it is not used, because it would decide who gets the events.
    """
    if not path and not os.path.isfile(".env"):
        return {}
    values: dict[str, str] = {}
    faults: list[str] = []
    try:
        with open(path or ".env", encoding="utf-8-sig", errors="replace") as file:
            if not path and hasattr(os, "geteuid") and os.fstat(file.fileno()).st_uid not in (0, os.geteuid()):
                raise PermissionError("it belongs to another user and is not used")
            for number, line in enumerate(file, 1):
                try:
                    values.update(read_env_line(line))
                except ValueError as error:
                    faults.append(f"line {number}: {error}")
    except OSError as error:
        faults.append(explain(error))
    if faults and path:
        raise StartupError(EX_CONFIG, f"settings file {path}: {faults[0]}")
    if faults:
        warn(f"warning: settings file .env: {faults[0]}{f' (and {len(faults) - 1} more)' if faults[1:] else ''}")
    return values


def read_options(argv: Iterable[str], environ: Mapping[str, str]) -> argparse.Namespace:
    """Flags, environment and .env in one. Raises StartupError, which names the flag or variable that is wrong."""
    options = parse_flags(argv)
    from_file = read_env_file(options.env_file)
    options.variables = {}  # By flag, the variable that stood in for it.
    for name, variable, convert, default in SETTINGS:
        text = environ.get(variable, from_file.get(variable, "")).strip()
        if getattr(options, name) is None:
            try:
                setattr(options, name, convert(text) if text else default)
            except argparse.ArgumentTypeError as error:
                raise StartupError(EX_CONFIG, f"{variable}: {error}") from None
            options.variables[name] = variable
    if options.event == "" or not options.camera:
        raise StartupError(EX_USAGE, "--event and --camera must not be empty; say what happened, and where")
    if 0 in (options.timeout, options.heartbeat):
        raise StartupError(EX_USAGE, "--timeout and --heartbeat must be more than 0")
    if options.loop is None and options.heartbeat and options.event:
        raise StartupError(EX_USAGE, "--heartbeat alone sends no event; add --loop SECONDS, or leave --event out")
    if options.loop is None and not options.heartbeat:  # One event is a loop of one.
        options.loop, options.count = (0.0, options.count) if options.count else (INFINITE, 1)
    options.event, options.meta = options.event or "MOTION_DETECTED", dict(options.meta)
    return options


def setting_error(options: argparse.Namespace, name: str, reason: str) -> StartupError:
    """The error that a flag is wrong, or the variable that stood in for it."""
    if name in options.variables:
        return StartupError(EX_CONFIG, f"{options.variables[name]}: {reason}")
    return StartupError(EX_USAGE, f"--{name}: {reason}")


def tls_context(options: argparse.Namespace) -> "ssl.SSLContext | None":
    """A context that verifies certificate and host name, or None for a plain connection. Raises StartupError."""
    if options.key and not options.cert:
        raise setting_error(options, "key", "it needs a certificate, too, as --cert or ALERT_CERT")
    if not (options.tls or options.cafile or options.cert):
        return None
    import ssl  # noqa: PLC0415

    name, files = "cafile", options.cafile
    try:
        context = ssl.create_default_context(cafile=options.cafile or None)
        if options.cafile:  # Python 3.13 asks for extensions that a CA made with `openssl req -x509` does not have.
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if options.cert:
            name, files = "cert", f"{options.cert} with the key in {options.key or 'it'}"
            # With an empty password, an encrypted key is an error here and not a question on the terminal.
            context.load_cert_chain(options.cert, options.key or None, password="")
    except OSError as error:
        advice = "; give PEM files, and a key without a password" if isinstance(error, ssl.SSLError) else ""
        raise setting_error(options, name, f"{files}: {explain(error)}{advice}") from None
    return context


# ────────────────────────────────────────────── Events ──────────────────────────────────────────────


def make_event(options: argparse.Namespace, picture: bytes, number: int, now: float) -> "dict[str, Any]":
    """Event `number` (from 1) of this call; `now` in Unix time. Fields that were not asked for are left out."""
    # With an id of the caller's, nothing in the event may differ when the call is repeated: no time of our own.
    given_id = options.id if options.count == 1 else options.id and f"{options.id}-{number}"
    event = {
        "event": options.event,
        "camera": options.camera,
        "id": given_id or os.urandom(12).hex(),
        "timestamp": options.timestamp or (not given_id and utc(now)),
        "image_url": options.image_url,
        "meta": options.meta,
    }
    if picture:
        event["image_filename"] = options.image != "-" and valid_text(os.path.basename(options.image))
        event["image_b64"] = binascii.b2a_base64(picture, newline=False).decode("ascii")
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
        warn(f"warning: --image {path}: {explain(error)}; the event goes without it")
        return b""
    return data


def describe(content: "Mapping[str, Any]") -> str:
    """What and where, for a person."""
    return f"{content.get('event', 'heartbeat')} {content.get('camera') or content.get('heartbeat')}"


class IntervalTimer:
    """The times start, start + interval, and so on, `left` of them. Missed ones are skipped: no drift and no burst."""

    def __init__(self, interval: float, left: float, start: float) -> None:
        self.interval, self.left = interval, left
        self.due = start if left else INFINITE

    def advance(self, now: float) -> None:
        """What was due by `now` is done."""
        self.left -= 1
        missed = (now - self.due) // self.interval if self.interval else 0.0
        self.due = self.due + (1 + missed) * self.interval if self.left else INFINITE


# ────────────────────────────────────────────── Outbox ──────────────────────────────────────────────


class Outbox:
    """A folder of events that could not be handed over, one JSON object a file, in the order of their names.

    Any number of clients may share a folder. A lock lets one at a time hand over what is kept, which only saves work:
    an event that two clients send has one id and is accepted once. The token is never written. Trouble with the
    folder is a warning and stops nothing: the event can still be sent. The folder "" keeps nothing.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.mine: set[str] = set()  # What this process kept and has not handed over yet.
        self.newest = 0
        self.lock: int | None = None
        try:
            if folder and not os.path.isdir(folder):
                os.makedirs(folder, 0o700, exist_ok=True)
                sync_folder(os.path.dirname(os.path.abspath(folder)))
        except OSError as error:
            warn(f"--outbox {folder}: {explain(error)}; nothing can be kept there")
            self.folder = ""

    def keep(self, event: "Mapping[str, Any]") -> str:
        """The name under which the event is on disk, durably, when this returns; "" where that failed."""
        if not self.folder:
            return ""
        self.newest = max(time.time_ns(), self.newest + 1)  # In order even where the clock was set back.
        name = f"{self.newest:020d}-{os.urandom(4).hex()}.json"
        path = os.path.join(self.folder, name)
        try:
            with open(os.open(path + ".tmp", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(json.dumps(event).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(path + ".tmp", path)
            sync_folder(self.folder)
        except OSError as error:
            warn(f"--outbox {self.folder}: {explain(error)}; cannot keep {describe(event)}")
            if os.path.lexists(path + ".tmp"):
                self.remove(name + ".tmp")
            return ""
        self.mine.add(name)
        return name

    def claim(self) -> list[str]:
        """The names of what is kept, oldest first, for this process alone until `release`; none if another has them."""
        if not self.folder:
            return []
        try:
            import fcntl  # noqa: PLC0415

            self.lock = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return []
        except (ImportError, OSError):
            pass  # Windows, network file systems: two clients may send the same, and the relay accepts it once.
        try:
            names = sorted(n for n in os.listdir(self.folder) if n.endswith(".json") and n[:20].isdecimal())
        except OSError as error:
            warn(f"--outbox {self.folder}: {explain(error)}")
            return []
        self.newest = int(names[-1][:20]) if names else 0
        return names

    def release(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def load(self, name: str) -> "dict[str, Any]":
        """The event of a file; empty where there is none any more, or none to be had. A damaged one is moved aside."""
        try:
            with open(os.path.join(self.folder, name), "rb") as file:
                event = json.loads(file.read(KEPT_MAX_BYTES))
            if not event or not isinstance(event, dict):
                raise ValueError("not the JSON of an event")
        except FileNotFoundError:
            return {}  # Another client has handed it over.
        except OSError as error:
            warn(f"--outbox {self.folder}: {name} cannot be read now: {explain(error)}")
            return {}
        except (ValueError, RecursionError) as error:
            warn(f"--outbox {self.folder}: {name} is damaged: {explain(error)}")
            self.remove(name, refused=True)
            return {}
        return event

    def remove(self, name: str, *, refused: bool = False) -> None:
        """Forget an event that the relay has. One that it will never accept is moved aside, so it blocks nothing."""
        path = os.path.join(self.folder, name)
        self.mine.discard(name)
        try:  # If a power cut undoes this, the event goes again and the relay answers `duplicate`.
            if refused:
                os.replace(path, path + ".refused")
                warn(f"moved aside: {path}.refused")
            else:
                os.unlink(path)
        except FileNotFoundError:
            pass  # Another client was faster.
        except OSError as error:
            warn(f"--outbox {path}: {explain(error)}")

    def count_mine(self) -> int:
        """How many events this process kept and nobody has handed over since."""
        return sum(os.path.lexists(os.path.join(self.folder, name)) for name in self.mine)


def sync_folder(folder: str) -> None:
    """Make the names in a folder durable. Windows cannot open one."""
    if sys.platform != "win32":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ──────────────────────────────────────────── Connection ────────────────────────────────────────────
# Whatever ends a connection is an OSError.


class Connection:
    """One connection to the relay, at the first of its addresses that accepts one."""

    def __init__(self, options: argparse.Namespace, tls: "ssl.SSLContext | None", deadline: float) -> None:
        """Connect by `deadline` (monotonic), the TLS handshake included."""
        # A host as bytes: for a str, Python would load its tables of international names first.
        host: Any = options.host.encode() if options.host.isascii() else options.host
        try:
            # An equal share of the time for each address: one that swallows packets leaves some for the next.
            shares = len(socket.getaddrinfo(host, options.port, type=socket.SOCK_STREAM))
            self.socket = socket.create_connection((host, options.port), seconds_until(deadline) / shares)
        except ValueError as error:
            raise ConnectionError(f"this is no name of a host: {error}") from None
        try:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls:
                self.socket.settimeout(seconds_until(deadline))
                self.socket = tls.wrap_socket(self.socket, server_hostname=options.host)
        except OSError as error:
            self.socket.close()
            if hasattr(error, "verify_message"):  # ssl.SSLCertVerificationError, without loading ssl
                advice = "give its CA as --cafile, its name as --host"
                raise PermanentError(f"its certificate does not verify ({error.verify_message}); {advice}") from None
            raise
        self.received = b""  # What came after the last answer.
        self.hint = "" if tls else " without an answer (does it want --tls?)"

    def is_idle(self) -> bool:
        """False if the relay has closed the connection, or has sent what nobody asked for."""
        return not self.received and not select.select([self.socket], [], [], 0)[0]

    def request(self, line: bytes, wait_at_most: Callable[[], float]) -> bytes:
        """Send a line and return the line that the relay answers.

        `wait_at_most` gives the seconds that one call may block, and raises TimeoutError at the deadline.
        """
        unsent = memoryview(line)
        try:
            while unsent:
                unsent = unsent[self._call(self.socket.send, unsent, wait_at_most) :]
        except OSError:
            pass  # The relay may have said why it does not read on. If it has not, reading will fail as well.
        while b"\n" not in self.received:
            try:
                data = self._call(self.socket.recv, ANSWER_MAX_BYTES, wait_at_most)
            except ConnectionResetError as error:
                raise ConnectionError(f"{error.strerror}{self.hint}") from None
            if not data:
                raise ConnectionError(f"the relay closed the connection{self.hint}")
            self.received += data
            self.hint = ""
            if len(self.received) > ANSWER_MAX_BYTES:
                raise ConnectionError("the relay's answer has no end")
        answer, _, self.received = self.received.partition(b"\n")
        return answer

    def _call(self, call: "Callable[[Any], Any]", argument: object, wait_at_most: Callable[[], float]) -> "Any":
        """What a method of the socket returns as soon as it can do anything."""
        while True:
            self.socket.settimeout(wait_at_most())
            try:
                return call(argument)
            except TimeoutError:
                pass


def seconds_until(deadline: float) -> float:
    """For a socket, to which 0 would mean not to wait at all."""
    return max(0.001, deadline - time.monotonic())


def parse_answer(raw: bytes) -> "dict[str, Any]":
    """The answer in a line of the relay. Raises ConnectionError: who says anything else is no relay."""
    try:
        answer = json.loads(raw.decode())
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or not isinstance(answer.get("ok"), bool):
        said = raw[:80].decode("utf-8", "replace").rstrip()
        raise ConnectionError(f"this is no answer of an alert relay (is it the right port?): {said}")
    return answer


# ────────────────────────────────────────────── Sending ─────────────────────────────────────────────


class Sender:
    """Makes what is due and hands it over, one message (an event or a heartbeat) after the other."""

    connection: Connection | None = None
    deadline = 0.0  # When the try that is under way must have its answer.
    transfer_s = 0.0  # How much longer than others it may take, because of its size.
    stop_deadline = INFINITE  # When the run must be over, set by a signal.
    stopping = False  # Nothing new is begun.
    interruptible = False  # A signal raises KeyboardInterrupt.
    made = accepted = refused = lost = 0
    unauthorized = False
    progress_due = 0.0

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.tls, self.outbox = options, tls_context(options), Outbox(options.outbox)
        self.peer = f"{options.host} port {options.port}"
        self.stdin_picture = read_picture("-") if options.image == "-" else b""
        self.backlog: deque[str] = deque()  # The names of kept events, to be handed over before new ones.

        self.start = time.monotonic()
        count, only_heartbeats = options.count or INFINITE, options.loop is None
        beats = count if only_heartbeats else INFINITE if options.heartbeat else 0
        self.events = IntervalTimer(options.loop or 0.0, 0 if only_heartbeats else count, self.start)
        self.heartbeats = IntervalTimer(options.heartbeat or 0.0, beats, self.start)
        self.counted = self.heartbeats if only_heartbeats else self.events  # The run ends with these.
        self.unpaced = options.loop == 0  # Events are made as fast as the relay acknowledges.

        self.shows_progress = self.unpaced and sys.stderr is not None and sys.stderr.isatty()
        # A line an event would tear the progress line where both appear on one terminal.
        self.shows_events = not (options.json or (self.shows_progress and sys.stdout and sys.stdout.isatty()))

    def run(self) -> int:
        """Until everything is answered or given up. Returns the exit code."""
        while not self.stopping and (self.counted.left or self.backlog):
            self.step()
        self.disconnect()
        self.outbox.release()
        kept = self.outbox.count_mine()
        if kept and self.backlog:  # A signal has ended the run.
            self.warn_kept(len(self.backlog))
        if self.options.loop != INFINITE:
            took = time.monotonic() - self.start
            counts = f"{self.accepted} accepted, {self.refused} refused, {kept} kept, {self.lost} lost"
            warn(f"{counts} in {took:.1f} s ({self.accepted / max(took, 1e-3):.1f}/s)")
        if self.unauthorized:
            return EX_NOPERM
        return EX_TEMPFAIL if kept or self.lost else EX_DATAERR if self.refused else EX_OK

    def step(self) -> None:
        """Wait until something is due and hand it over: a heartbeat, a new event, or the oldest of the kept ones."""
        if not self.backlog:
            self.outbox.release()
            self.sleep_until(min(self.events.due, self.heartbeats.due))
            if self.stopping:
                return
            self.backlog.extend(self.outbox.claim())
        now = time.monotonic()
        if now >= self.heartbeats.due:
            self.heartbeats.advance(now)
            self.deliver({"heartbeat": self.options.camera})
        elif now >= self.events.due and not (self.backlog and self.unpaced):
            self.events.advance(now)
            event = self.next_event()
            # Behind others it may have to wait for long, so it is kept before.
            kept = self.outbox.keep(event) if self.backlog else ""
            if kept:
                self.backlog.append(kept)
            else:
                self.deliver(event)
        elif self.backlog:
            name = self.backlog.popleft()
            event = self.outbox.load(name)
            if event:
                self.deliver(event, name)

    def next_event(self) -> "dict[str, Any]":
        """The event that is due now, with the picture of now."""
        self.made += 1
        now, image, picture = time.time(), self.options.image, self.stdin_picture
        if image not in ("", "-"):
            try:
                picture = self.interrupt_in(read_picture, image)
            except KeyboardInterrupt:
                warn(f"warning: --image {image}: interrupted; the event goes without it")
        return make_event(self.options, picture, self.made, now)

    def deliver(self, content: "dict[str, Any]", kept: str = "") -> None:
        """Try until the relay answers, or give up. `kept` is the name of the event in the outbox, if it is there."""
        tries = 0
        while True:
            try:
                answer = self.exchange(content)
            except (OSError, KeyboardInterrupt) as failure:
                error = failure
            else:
                self.handle_answer(content, kept, answer)
                return
            self.disconnect()
            if tries == 0 and not kept and "event" in content:
                kept = self.outbox.keep(content)
            import random  # noqa: PLC0415

            pause = min(BACKOFF_FIRST_S * 2.0 ** min(tries, 30), BACKOFF_MAX_S) * random.uniform(0.75, 1.25)
            next_try = time.monotonic() + pause
            tries += 1
            # What is kept goes first when the next event of a loop is due, so it need not be tried any longer now.
            goes_then = kept and not self.unpaced and next_try >= self.events.due
            hopeless = isinstance(error, (PermanentError, KeyboardInterrupt))
            if tries > self.options.retries or goes_then or hopeless or self.stopping:
                self.give_up(content, kept, error)
                return
            warn(f"{self.peer}: {explain(error)}; next try in {pause:.1f} s")
            self.sleep_until(next_try)

    def exchange(self, content: "dict[str, Any]") -> "dict[str, Any]":
        """Send a message and return the answer that accepts or refuses it. Raises OSError if it must be sent again."""
        options = self.options
        line = json.dumps({**content, "token": options.token} if options.token else content).encode() + b"\n"
        self.transfer_s = len(line) / SLOWEST_BYTES_S
        self.deadline = time.monotonic() + options.timeout + self.transfer_s
        if self.connection and not self.connection.is_idle():
            self.disconnect()  # A connection that ends while nothing is on its way costs no try.
        if not self.connection:
            self.connection = self.interrupt_in(Connection, options, self.tls, min(self.deadline, self.stop_deadline))
        raw = self.connection.request(line, self.wait_at_most)
        answer = parse_answer(raw)
        if options.json:
            print_line(raw.decode("utf-8", "replace").rstrip("\r"))
        error = answer.get("error")
        if answer["ok"] or error in REFUSED:
            return answer
        reason = f"the relay says {error}: {answer.get('detail', '')}"
        if error == "unauthorized":
            self.unauthorized = True
            raise PermanentError(f"{reason}; set ALERT_TOKEN to the relay's")
        raise ConnectionError(reason)

    def handle_answer(self, content: "dict[str, Any]", kept: str, answer: "dict[str, Any]") -> None:
        """Count and show an answer that accepts or refuses a message; take an event out of the outbox."""
        if kept:
            self.outbox.remove(kept, refused=not answer["ok"])
        if not answer["ok"]:
            self.refused += 1
            about = f"{describe(content)} {content.get('id', '')}"
            warn(f"refused: {about}: {answer['error']}: {answer.get('detail', '')}")
            return
        self.accepted += 1
        if self.shows_events:
            warning = f"  warning: {answer['warning']}" if answer.get("warning") else ""
            about = f"{describe(content)}  {answer.get('id', '')}{warning}"
            print_line(printable(f"{answer.get('status')!s:<10} {about}".rstrip()))
        now = time.monotonic()
        if self.shows_progress and now >= self.progress_due:
            self.progress_due = now + PROGRESS_S
            total = f" of {self.options.count}" if self.options.count else ""
            warn(f"{self.accepted}{total} accepted, {self.accepted / max(now - self.start, 1e-3):.0f}/s", end="")

    def give_up(self, content: "dict[str, Any]", kept: str, error: BaseException) -> None:
        """Say what becomes of a message that was not handed over. A timed loop goes on, where that may help."""
        away = "; is server.py running there?" if isinstance(error, ConnectionRefusedError) else ""
        warn(f"{self.peer}: not handed over: {explain(error)}{away}")
        if kept:
            self.warn_kept(1 + len(self.backlog))
        else:
            self.lost += 1
            outbox_failed = ", for it could not be kept either" if self.options.outbox and "event" in content else ""
            warn(f"lost{outbox_failed}: {describe(content)} {content.get('id', '')}".rstrip())
        self.backlog.clear()
        if self.unpaced or self.unauthorized:
            self.stopping = True

    def warn_kept(self, count: int) -> None:
        warn(f"kept in {self.outbox.folder}: {count}; first to go next time")

    def disconnect(self) -> None:
        if self.connection:
            self.connection.socket.close()
            self.connection = None

    # Waiting, and signals. Python resumes a call that a signal interrupts, so no call blocks for longer than
    # SIGNAL_CHECK_S but those of `interrupt_in`.

    def sleep_until(self, moment: float) -> None:
        """Until `moment` (monotonic), or a signal."""
        left = moment - time.monotonic()
        while left > 0 and not self.stopping:
            time.sleep(min(left, SIGNAL_CHECK_S))
            left = moment - time.monotonic()

    def wait_at_most(self) -> float:
        """How many seconds a call on the socket may block now. Raises TimeoutError at the deadline."""
        left = min(self.deadline, self.stop_deadline) - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return min(left, SIGNAL_CHECK_S)

    def interrupt_in(self, call: "Callable[..., Any]", *arguments: object) -> "Any":
        """What a call returns that may block for long; a signal ends it with KeyboardInterrupt."""
        self.interruptible = True
        try:
            return call(*arguments)
        finally:
            self.interruptible = False

    def on_signal(self, number: int, frame: object) -> None:
        """Begin nothing new. What is on its way has a little time for its answer; after a second signal it has none."""
        self.stop_deadline = time.monotonic() + (0.0 if self.stopping else CLOSING_S + self.transfer_s)
        self.stopping = True
        if self.interruptible:
            raise KeyboardInterrupt("interrupted")


# ─────────────────────────────────────────── Command line ───────────────────────────────────────────


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns the exit code."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name in any script, on a terminal in any encoding
    try:
        sender = Sender(read_options(sys.argv[1:] if argv is None else argv, os.environ))
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # as a shell sets it for what runs in the background
                signal.signal(number, sender.on_signal)
        return sender.run()
    except StartupError as error:
        code, reason = error.args
        warn(reason)
        return int(code)
    except KeyboardInterrupt:
        warn("interrupted")
        return EX_TEMPFAIL


if __name__ == "__main__":
    sys.exit(main())
