#!/usr/bin/env python3
"""smtp_module: everything about getting a mail out for certain.

    settings ─▶ compose ─▶ outbox ─▶ courier ─▶ transport ──SMTP──▶ the mail server
                              (SQLite)   plan, freeze, render, deliver, settle

As a library, `send_email` sends one mail with the configuration of the environment.
As a program it sends, checks the configuration, and looks after a queue:

    python3 smtp_module.py send --to you@example.com --subject Hello --body -
    python3 smtp_module.py check --to you@example.com
    python3 smtp_module.py queue | retry ID|all | drop ID|all
    python3 smtp_module.py sendmail [-t] [-i] [-f FROM] [TO…]

The promise of the outbox: what `put` has returned for is on disk, synchronously. It is delivered; at worst,
after a crash at the wrong moment, twice. It is never delivered zero times without the queue saying so.

This file knows nothing of events, cameras or devices: whoever owns an outbox says which mails are due (`plan`)
and what they look like (`render`), both pure functions.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import difflib
import email.header
import email.utils
import encodings.idna  # noqa: F401  a lazy import fails when file descriptors have run out
import enum
import errno
import functools
import glob
import hashlib
import io
import ipaddress
import itertools
import json
import logging
import math
import mimetypes
import os
import queue
import random
import re
import shutil
import smtplib
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, TextIO, TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

__version__ = "1.0.0"

EX_OK, EX_DATAERR, EX_UNAVAILABLE, EX_TEMPFAIL, EX_NOPERM, EX_CONFIG = 0, 65, 69, 75, 77, 78

DEBUG_HOST, DEBUG_PORT = "localhost", 1025  # where mail goes while nothing is configured
SUBMISSION_PORT, SUBMISSIONS_PORT = 587, 465  # RFC 6409, RFC 8314
TIMEOUT_S = 30.0
FINAL_DOT_TIMEOUT_S = 600.0  # RFC 5321 4.5.3.2.6: a shorter wait makes duplicates
ATTEMPT_S, SLOWEST_BYTES_S = 600.0, 10_000  # a login, or a mail up to its dot, is given up after this and its size
REPLY_MAX_BYTES, REPLY_MAX_LINES = 64 * 1024, 1000  # a reply that goes on for ever must not fill the memory
LINGER_S = 1.0  # a connection is kept this long after the last mail: the next server may serve one at a time
PROBE_MAX_S = 60.0  # an unreachable server is tried at least once a minute: a router comes back unannounced
TICK_S = 0.5  # requests of the command line and retries are noticed within this
HOUSEKEEPING_S = 60.0
BRISK_S, BATCH_S = 0.25, 1.0  # a batch that goes out within this is quick; after this others may take what is left
BATCH_MAILS = 64  # mails frozen by one commit
TOLD = 20  # mails that one line of the log tells of
BUSY_S = 5  # what another program does with the database is waited for
ROOM_S = 0.25  # the room on the disk is looked at no more often, while there is plenty
PAGE_ROWS = 40  # read at once: a batch and a little more, for what is not used is read again
TICK_SLOTS, TICK_BYTES = 4096, 16  # as many as 64 senders can have sent and not settled; none lies in two sectors
DAY_S = 86400.0
LONGEST_S = 20 * DAY_S  # a socket cannot wait longer than 24 days
MEMORY_S = 7 * DAY_S  # how long settled ids are remembered
CHECKED_MAX_BYTES = 256 << 20  # a larger spool is not read through at every start
DISK_RESERVE_BYTES = 16 << 20  # nothing new is accepted when less is free: deliveries must be written down, too
LOG_LINES_MAX, LOG_END_S = 10_000, 0.5  # lines that wait to be written; how long the end of the program waits for them
PIECE = 76 * 1000  # Base64 is cut in pieces of so many bytes, a thousand lines: a larger buffer may have to be mapped

T = TypeVar("T")
log = logging.getLogger("mail")


# ───────────────────────────────────────────── Settings ─────────────────────────────────────────────
# Flags win over the environment, the environment over .env. Nothing else in the toolkit reads os.environ.

SETTINGS = tuple(  # of all the programs, for one .env may serve them all
    """
    ALERT_COOLDOWN ALERT_DAILY_MAX ALERT_EXPECT ALERT_HOST ALERT_IDLE_TIMEOUT ALERT_LANG ALERT_MAX_AGE
    ALERT_MAX_CONNECTIONS ALERT_MAX_LINE ALERT_PORT ALERT_PRIORITY ALERT_QUIET ALERT_RECIPIENT ALERT_RETRY_FIRST
    ALERT_RETRY_MAX ALERT_ROUTES ALERT_SENDERS ALERT_SPOOL ALERT_SPOOL_MAX ALERT_SUMMARY_AT ALERT_TLS_CERT
    ALERT_TLS_CLIENT_CA ALERT_TLS_KEY ALERT_TOKEN
    SMTP_AUTH SMTP_CAFILE SMTP_FROM SMTP_HOST SMTP_PASS SMTP_PASS_COMMAND SMTP_PASS_FILE SMTP_PORT SMTP_SECURITY
    SMTP_TIMEOUT SMTP_USER SMTP_USE_TLS
    DEVICE_ADDRESS DEVICE_ALLOW DEVICE_HOST DEVICE_MAX_MAIL DEVICE_OPERATORS DEVICE_PASS DEVICE_PORT DEVICE_READONLY
    DEVICE_REPORT_TO DEVICE_SECRET DEVICE_STATE DEVICE_TIMEOUT DEVICE_TLS_CERT DEVICE_TLS_KEY DEVICE_USER
    """.split()  # noqa: SIM905  a name a line would be a page
)


class ConfigError(Exception):
    """A setting is wrong. The text names the variable, what is wrong and what is right, and no secret."""


class Settings:
    """The merged settings; `read` converts one by name."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(values)

    @classmethod
    def load(cls, flags: Mapping[str, object] | None = None, env_file: str | None = None) -> Settings:
        """Merge `.env` (or `env_file`, which must then exist), the environment and the flags that are not None."""
        values = read_env_file(env_file)
        values.update(os.environ)
        values.update({name: str(value) for name, value in (flags or {}).items() if value is not None})
        return cls(values)

    def read(self, name: str, convert: Callable[[str], T], default: T) -> T:
        """The converted value, or `default` where the variable is absent or empty. Raises ConfigError."""
        text = self.secret(name).strip()
        if not text:
            return default
        try:
            return convert(text)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None

    def secret(self, name: str) -> str:
        """The value as it stands, "" where absent; for passwords and keys."""
        return self._values.get(name, "")

    def tell_misspelled(self) -> None:
        """Warn of each name that looks like a setting and is none: it would be ignored in silence."""
        for name in sorted(self._values.keys() - set(SETTINGS)):
            if name.upper().startswith(("ALERT_", "SMTP_", "SMPT_", "DEVICE_")):
                near = difflib.get_close_matches(name.upper(), SETTINGS, 1, 0.81)
                hint = f"did you mean {near[0]}?" if near else "README.md lists them all"
                log.warning("%s is no setting and has no effect; %s", name, hint)


def read_env_file(path: str | None) -> dict[str, str]:
    """`KEY=value` lines; `#` comments, optional quotes and `export`. Without `path`: ./.env, if it is there."""
    try:
        text = Path(path or ".env").read_text("utf-8-sig")
    except FileNotFoundError:
        if path is None:
            return {}
        raise ConfigError(f"--env-file: there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "save it as UTF-8"
        raise ConfigError(f"{path or '.env'}: cannot be read: {why}") from None
    values: dict[str, str] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = re.sub(r"^export\s+", "", raw.strip())
        if not line or line.startswith("#"):
            continue
        name, equals, value = (part.strip() for part in line.partition("="))
        if not equals or len(name.split()) != 1:
            raise ConfigError(f"{path or '.env'} line {number}: not KEY=value")
        quoted = re.match(r"""(["'])(.*?)\1""", value)
        values[name] = quoted[2] if quoted else re.split(r"(?:^|\s)#", value, maxsplit=1)[0].rstrip()
    return values


def duration(text: str) -> float:
    """`90`, `5m`, `1h`, `5d` -> seconds."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)\s*([smhd]?)", text.strip(), re.ASCII | re.IGNORECASE)
    if not match:
        raise ValueError(f"'{printable(text)}' is not a duration; write 90 (seconds), 5m, 1h or 5d")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2].lower()]


def size(text: str) -> int:
    """`500000`, `16MiB`, `2GiB` -> bytes."""
    match = re.fullmatch(r"(\d{1,15})\s*([kmg]?)(?:i?b)?", text.strip(), re.ASCII | re.IGNORECASE)
    if not match:
        raise ValueError(f"'{printable(text)}' is not a size; write 500000 (bytes), 16MiB or 2GiB")
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[match[2].lower()]


def whole(low: int, high: int) -> Callable[[str], int]:
    """A converter for whole numbers from `low` to `high`."""

    def convert(text: str) -> int:
        if not re.fullmatch(r"\d{1,12}", text.strip(), re.ASCII) or not low <= int(text) <= high:
            raise ValueError(f"'{printable(text)}' is wrong; give a whole number from {low} to {high}")
        return int(text)

    return convert


port = whole(0, 65535)


def host_name(text: str) -> str:
    """A name or an address, without the brackets that an IPv6 address may have."""
    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if not re.fullmatch(r"[\w.:%-]{1,255}", host) or host.count(":") == 1:
        raise ValueError(f"'{printable(text)}' is not a host; give a name or an IPv4 or IPv6 address, without a port")
    return host


def one_of(*words: str) -> Callable[[str], str]:
    """A converter for one of some words, in any case."""

    def convert(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(f"'{printable(text)}' is unknown; write one of {', '.join(words)}")
        return text.lower()

    return convert


_ADDRESS = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,64}@(?:[A-Za-z0-9_.-]{1,255}|\[[0-9A-Fa-f.:]+\])", re.ASCII)


def address(text: str) -> str:
    """One mail address, its domain in ASCII (IDNA). The pattern lets nothing through that could end a command."""
    match = re.fullmatch(r"[^<>]*<([^<>]+)>|([^<>]+)", text.strip())
    local, _, domain = (match[1] or match[2] if match else "").strip().rpartition("@")
    with contextlib.suppress(UnicodeError):
        domain = domain if domain.isascii() else domain.encode("idna").decode("ascii")
    plain = f"{local}@{domain}"
    if not _ADDRESS.fullmatch(plain) or UNPRINTABLE.search(text):
        more = ", several with commas between" if text.count("@") > 1 else ""
        raise ValueError(f"'{printable(text)}' is not a mail address; write name@example.com{more}")
    return plain


def addresses(text: str) -> tuple[str, ...]:
    """Mail addresses, comma-separated, each once, in order."""
    found = dict.fromkeys(address(part) for part in text.split(",") if part.strip())
    if not found:
        raise ValueError("no address is given; write name@example.com")
    return tuple(found)


def add_common_flags(parser: argparse.ArgumentParser, *, logs: bool = True) -> None:
    """--version, --env-file and --log-level, the same for every program."""
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--env-file", metavar="FILE", help="settings file (default: .env, if it is there)")
    if logs:
        parser.add_argument(
            "--log-level", default="info", type=str.lower, choices=["debug", "info", "warning", "error"]
        )


# ───────────────────────────────────────────── Logging ──────────────────────────────────────────────

# Controls, line and paragraph separators, and the characters that reorder or hide text. U+200C and U+200D stay:
# Persian and emoji need them.
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: object, limit: int = 300) -> str:
    """`text` on one line, harmless to a terminal and bounded: for logs and error texts."""
    shown = str(text)
    if len(shown) > limit:
        shown = shown[:limit] + "…"
    if shown.isprintable():
        return shown
    return UNPRINTABLE.sub(lambda m: m[0].encode("unicode_escape").decode("ascii"), shown)


class OneLine(logging.Formatter):
    """A record is one line, whatever a peer put into it."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), limit=4000)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return f"{_clock(int(record.created))},{record.msecs:03.0f}"


@functools.lru_cache(maxsize=4)  # a busy relay logs thousands of lines a second
def _clock(second: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))


class BackgroundHandler(logging.Handler):
    """Write lines in a thread of its own, so that a reader of the log that stalls stops nothing else.

    At most LOG_LINES_MAX lines wait. More are dropped, and the next line that is not says how many.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Let a record wait to be written; logging calls this for one record at a time."""
        if self._lines.qsize() >= LOG_LINES_MAX:
            self._dropped += 1
            return
        try:
            line = self.format(record)
        except Exception:
            self.handleError(record)
            return
        if self._dropped:
            line += f" (lines dropped before this one, because nobody read the log: {self._dropped})"
            self._dropped = 0
        self._lines.put(line)

    def close(self) -> None:
        """Wait a moment for what is left to be written; logging calls this when the program ends."""
        self._lines.put(None)
        self._thread.join(LOG_END_S)
        super().close()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            with contextlib.suppress(OSError, ValueError):  # a closed standard error must not cost anything
                self._stream.write(f"{line}\n")
                self._stream.flush()


def _stderr_handler() -> logging.Handler:
    if not sys.stderr:  # it was closed
        return logging.NullHandler()
    try:
        number = sys.stderr.fileno()
    except io.UnsupportedOperation:  # it is caught in memory
        return logging.StreamHandler()
    # A second stream, because Python at its end would wait for a thread that is stuck in a write to sys.stderr.
    stream = os.fdopen(number, "w", encoding=sys.stderr.encoding, errors="backslashreplace", closefd=False)
    return BackgroundHandler(stream)


def start_logging(level: str = "info") -> None:
    """Log to standard error, one line a record."""
    logging.raiseExceptions = False  # an error in a log line must not cost anything
    # what no line shows need not be found out: docs.python.org/3/howto/logging.html#optimization
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    handler = _stderr_handler()
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


# ───────────────────────────────────────────── Compose ──────────────────────────────────────────────
# Pure: values in, bytes out. Written by hand because the email package takes 9 ms for a 200 KB picture;
# tests hold the result against the package.


@dataclass(frozen=True)
class Attachment:
    """A file in a mail. With `cid` it is also shown in the HTML, through `cid:…`, and still there only once."""

    filename: str
    content_type: str = "application/octet-stream"
    data: bytes = b""
    base64: bytes | None = None  # the same, already strict Base64 in one line
    cid: str = ""

    def lines(self) -> list[bytes]:
        return wrap_base64(self.base64 if self.base64 is not None else base64.b64encode(self.data))


_THOUSAND_LINES = struct.Struct("76s" * 1000)


def wrap_base64(text: bytes) -> list[bytes]:
    """Base64 in lines of 76 characters (RFC 2045 6.8), as pieces of whole lines, each ended by CRLF."""
    whole_pieces = len(text) - len(text) % PIECE
    pieces = [b"\r\n".join((*_THOUSAND_LINES.unpack_from(text, at), b"")) for at in range(0, whole_pieces, PIECE)]
    rest = [text[at : at + 76] for at in range(whole_pieces, len(text), 76)]
    return [*pieces, b"\r\n".join((*rest, b""))] if rest else pieces


def one_line(text: str) -> str:
    """Header text: no controls, no line breaks of any kind, no lone surrogates (CVE-2024-6923 and its like)."""
    return UNPRINTABLE.sub(" ", text).strip()


@functools.lru_cache(maxsize=1024)
def header_text(name: str, value: str) -> str:
    """An unstructured header's value, encoded (RFC 2047) and folded where that is needed."""
    value = one_line(value)
    if not value.isascii() or "=?" in value or max(map(len, value.split(" "))) > 900:
        return email.header.Header(value, "utf-8", header_name=name).encode(linesep="\r\n")
    return value if len(value) < 900 else re.sub(r"(.{1,900}) (?=\S)", r"\1\r\n ", value)


@functools.lru_cache(maxsize=1024)
def header_address(value: str) -> str:
    """`Name <a@b>` or `a@b` for an address header, the name encoded."""
    value = one_line(value)
    try:  # parseaddr takes `Door, yard <a@b>` for an address `Door`
        name, plain = email.utils.unquote(value.rpartition("<")[0].strip()), address(value)
    except ValueError:
        name, plain = email.utils.parseaddr(value)
    if name.isascii():
        return email.utils.formataddr((name[:200], plain)) if name else (plain or value)[:900]
    return f"{email.header.Header(name, 'utf-8', header_name='From').encode(linesep=chr(13) + chr(10))} <{plain}>"


def header_addresses(values: Iterable[str]) -> str:
    """Addresses for a header, one a line."""
    return ",\r\n ".join(map(header_address, values))


def _file_name(attribute: str, name: str) -> str:
    name = one_line(name).replace("/", "_").replace("\\", "_") or "file"
    if len(name) > 70:
        stem, dot, suffix = name.rpartition(".")
        name = f"{stem[:60]}.{suffix[:9]}" if dot else name[:70]
    if name.isascii():
        return f'{attribute}="{name.replace(chr(34), "_")}"'
    return f"{attribute}*={email.utils.encode_rfc2231(name, 'utf-8')}"  # RFC 2231


@functools.lru_cache(maxsize=64)
def _date(second: int) -> str:
    return email.utils.formatdate(second, localtime=True)


@functools.lru_cache(maxsize=64)
def _domain(sender: str) -> str:
    domain = email.utils.parseaddr(sender)[1].rpartition("@")[2]
    return re.sub(r"[^A-Za-z0-9.-]", "", domain) or "localhost"


def message_id(key: str, sender: str) -> str:
    """A Message-ID that is a function of `key`, so that a mail sent twice is recognisably the same."""
    return f"<{hashlib.sha256(key.encode('utf-8', 'replace')).hexdigest()[:40]}@{_domain(sender)}>"


def _text_part(subtype: str, text: str) -> list[bytes]:
    if "\r" in text:
        text = re.sub("\r\n|\r", "\n", text)
    lines = text.removesuffix("\n").split("\n")
    text = "\r\n".join((*lines, ""))
    plain = text.isascii() and "\0" not in text and "\x7f" not in text and "--=_" not in text
    head = f"Content-Type: text/{subtype}; charset=utf-8\r\nContent-Transfer-Encoding: "
    if plain and max(map(len, lines)) < 900:
        return [f"{head}7bit\r\n\r\n{text}".encode("ascii")]
    encoded = base64.b64encode(text.encode("utf-8", "replace"))
    return [f"{head}base64\r\n\r\n".encode("ascii"), *wrap_base64(encoded)]


def _file_part(part: Attachment) -> list[bytes]:
    cid = f"Content-ID: <{part.cid}>\r\n" if part.cid else ""
    head = (
        f"Content-Type: {part.content_type}; {_file_name('name', part.filename)}\r\n"
        f"Content-Transfer-Encoding: base64\r\n{cid}"
        f"Content-Disposition: attachment; {_file_name('filename', part.filename)}\r\n\r\n"
    )
    return [head.encode("ascii"), *part.lines()]


def _multipart(subtype: bytes, parts: Sequence[list[bytes]]) -> list[bytes]:
    if len(parts) == 1:
        return parts[0]
    boundary = b"=_%024x" % random.getrandbits(96)  # in no text that is not encoded, and Base64 has no "_"
    pieces = [b'Content-Type: multipart/%b; boundary="%b"\r\n\r\n' % (subtype, boundary)]
    for part in parts:
        pieces += [b"--%b\r\n" % boundary, *part, b"\r\n"]
    return [*pieces, b"--%b--\r\n" % boundary]


def compose_pieces(
    *,
    subject: str,
    sender: str,
    to: Sequence[str],
    cc: Sequence[str] = (),
    text: str = "",
    html: str = "",
    attachments: Sequence[Attachment] = (),
    date: float | None = None,
    message_id: str = "",
    headers: Mapping[str, str] | None = None,
) -> list[bytes]:
    """A whole mail as pieces of whole lines, 7-bit, CRLF, not yet dot-stuffed.

    multipart/mixed( related( alternative(text, html), shown files ), other files ), less what is not needed.
    """
    alternatives = [_text_part("plain", text)] + ([_text_part("html", html)] if html else [])
    shown = [_file_part(part) for part in attachments if part.cid and html]
    others = [_file_part(part) for part in attachments if not (part.cid and html)]
    related = _multipart(b"related", [_multipart(b"alternative", alternatives), *shown])
    lines = [
        f"Date: {_date(int(time.time() if date is None else date))}",
        f"From: {header_address(sender)}",
        f"To: {header_addresses(to) or 'undisclosed-recipients:;'}",
        *([f"Cc: {header_addresses(cc)}"] if cc else []),
        f"Subject: {header_text('Subject', subject)}",
        f"Message-ID: {message_id or email.utils.make_msgid(domain=_domain(sender))}",
        *(f"{name}: {header_text(name, value)}" for name, value in (headers or {}).items()),
        "MIME-Version: 1.0\r\n",
    ]
    return ["\r\n".join(lines).encode("ascii", "replace"), *_multipart(b"mixed", [related, *others])]


def compose(**parts: Any) -> bytes:
    """`compose_pieces` as one string of bytes."""
    return b"".join(compose_pieces(**parts))


# ───────────────────────────────────────────── Outcome ──────────────────────────────────────────────
# Whatever happens to a mail ends as one of three verdicts a recipient. Decided here, acted on in the courier.


class Verdict(enum.Enum):
    """What became of a mail for one recipient."""

    SENT = "sent"
    TRY_LATER = "try later"
    REFUSED = "refused"


@dataclass(frozen=True)
class Outcome:
    """A verdict with the server's code and words.

    `ours`: the trouble is about us and not about the mail, so everything waits. `too_big`: it may go without
    pictures. `step` is where it happened: resolve connect tls greeting ehlo login mail rcpt data dot.
    """

    verdict: Verdict
    code: int = 0
    detail: str = ""
    step: str = ""
    ours: bool = False
    too_big: bool = False

    @property
    def said(self) -> str:
        return f"{self.code or ''} {self.detail}".strip()

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.step, self.said)))


class Unavailable(Exception):
    """The server cannot be used now; `outcome` says why."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(str(outcome))
        self.outcome = outcome


HUNG_UP = (ConnectionError, smtplib.SMTPServerDisconnected, ssl.SSLEOFError)  # SSLEOFError: TLS says it so in a write
OUR_STEPS = frozenset({"resolve", "connect", "tls", "greeting", "ehlo", "login", "mail"})


def judge(step: str, code: int, reply: bytes | str) -> Outcome:
    """The verdict for a reply code at a step. Anything that is not a clear yes or no is a later."""
    if 200 <= code < 400:
        return _yes(step, code)
    words = reply.decode("utf-8", "replace") if isinstance(reply, bytes) else reply
    detail = printable(" ".join(words.split()))
    enhanced = re.match(r"[245]\.\d{1,3}\.\d{1,3}\b", detail)
    status = enhanced[0] if enhanced else ""
    if code == 552 and step == "rcpt" and not status:  # old servers mean "too many recipients" (RFC 5321 4.5.3.1.10)
        return Outcome(Verdict.TRY_LATER, code, detail, step)
    if status == "5.3.4" or (code == 552 and status != "5.2.2"):
        return Outcome(Verdict.REFUSED, code, detail, step, too_big=True)
    ours = step in OUR_STEPS or code in (530, 534, 535) or status == "5.4.5"
    refused = 500 <= code < 600 and not ours
    return Outcome(Verdict.REFUSED if refused else Verdict.TRY_LATER, code, detail, step, ours)


@functools.lru_cache(maxsize=64)
def _yes(step: str, code: int) -> Outcome:
    return Outcome(Verdict.SENT, code, "", step)


def judge_error(step: str, error: Exception) -> Outcome:
    """The verdict for an exception at a step: a later, with words that a person understands."""
    if isinstance(error, smtplib.SMTPResponseException):
        return judge(step, error.smtp_code, error.smtp_error)
    if isinstance(error, ssl.SSLCertVerificationError):
        step, detail = "tls", f"certificate: {error.verify_message}"
    elif isinstance(error, HUNG_UP):
        detail = "refused" if isinstance(error, ConnectionRefusedError) else "the server closed the connection"
    elif isinstance(error, ssl.SSLError):
        step, detail = "tls", str(getattr(error, "reason", None) or error)
    elif isinstance(error, TimeoutError):
        detail = "timed out"
    elif isinstance(error, socket.gaierror):
        step, detail = "resolve", f"name not found ({error.strerror})"
    else:
        detail = f"{getattr(error, 'strerror', None) or error}"
    return Outcome(Verdict.TRY_LATER, 0, printable(detail), step, ours=step in OUR_STEPS)


# What a person should do about it: step, host, what the reply says -> a sentence. The first that fits is said.
ADVICE = (
    ("login", "gmail|google", r"53[45]|5\.7\.[89]",
     "Gmail wants an app password in SMTP_PASS, not the account's own: turn on 2-step verification, then make one"
     " under Google account, Security, App passwords."),
    ("login", "", r"5\.7\.139|basic auth",
     "Outlook has switched password login off: set SMTP_AUTH=xoauth2 and put an access token in SMTP_PASS"
     " (SMTP_PASS_COMMAND can fetch it)."),
    ("login", "", r"534|5\.7\.9|5\.7\.14",
     "The provider wants an app password or a stronger way to log in; look in the account's security settings."),
    ("login", "", "not supported|no suitable",
     "The server offers no login here: use port 587 or 465, or leave SMTP_USER empty."),
    ("", "", r"5\.4\.5|quota exceeded|daily.*limit",
     "The provider's daily limit is used up; ALERT_DAILY_MAX and ALERT_COOLDOWN make fewer mails."),
    ("", "", "^530",
     "The server wants a login (or TLS) first: set SMTP_USER and SMTP_PASS, and leave SMTP_SECURITY on auto."),
    ("login", "", "^(?!4|timed out)", "The server refused the login: check SMTP_USER and SMTP_PASS."),
    ("", "", "^53[45]", "The server is not content with the login: check SMTP_USER and SMTP_PASS."),
    ("tls", "", "mismatch|doesn't match|not valid for",
     "The certificate is for another name: set SMTP_HOST to the name that stands in it."),
    ("tls", "", "expired",
     "The server's certificate has expired; its owner must renew it (or this machine's clock is wrong)."),
    ("tls", "", "certificate",
     "The certificate is signed by nobody this machine trusts: put the signer's certificate in a file and name it"
     " in SMTP_CAFILE."),
    ("tls|greeting", "", "wrong.version|not offered|record.layer|timed out",
     "The server does not speak TLS in this way on this port: 465 is SMTP_SECURITY=ssl, 587 is starttls."),
    ("resolve", "", "",
     "The name in SMTP_HOST was not found: check its spelling, and whether this machine's DNS works."),
    ("connect", "", "timed out", "Nobody answers. Providers often block port 25: use 587 or 465."),
    ("connect", r"localhost|127\.|::1", "refused",
     "Nothing listens there. For a test, start: python3 embedded_smtpd.py --debug"),
    ("connect", "", "refused", "Nothing listens on that port: check SMTP_HOST and SMTP_PORT."),
    ("connect", "", "unreachable|no route", "This machine has no way to the server: check its network."),
    ("", "", r"5\.3\.4|^552", "The mail is too big for the server, or the mailbox is full."),
    ("mail", "", "^5", "The server takes no mail from this sender: set SMTP_FROM to an address of the account."),
    ("greeting|ehlo", "", "^5",
     "The server turns this machine away: port 25 of a provider is for servers; use 587 or 465 with a login."),
    ("greeting|ehlo|login|mail", "", "^4|timed out",
     "The server is busy or wants us to come back later; that happens by itself."),
    ("rcpt", "", "relay",
     "The server takes no mail for others from us: log in (SMTP_USER, SMTP_PASS), or check the recipient's address."),
    ("rcpt", "", "^55[013]", "The server does not take mail for this recipient: check the address."),
)  # fmt: skip


def advice(outcome: Outcome, host: str) -> str:
    """One sentence on what to do, or ""."""
    for step, where, what, sentence in ADVICE:
        if re.search(step, outcome.step) and re.search(where, host, re.I) and re.search(what, outcome.said, re.I):
            return sentence
    return ""


# ───────────────────────────────────────────── SMTP configuration ───────────────────────────────────


@dataclass(frozen=True)
class SMTPConfig:
    """How to reach the mail server. The password is fetched anew for each login and never shown."""

    host: str = DEBUG_HOST
    port: int = DEBUG_PORT
    security: str = "none"  # ssl, starttls or none
    user: str = ""
    password: Callable[[], str] = field(default=str, repr=False)
    auth: str = "auto"
    sender: str = "alerts@localhost"
    cafile: str = ""
    timeout_s: float = TIMEOUT_S
    debug: bool = True  # nothing is configured: the local debug receiver
    trace: Callable[[str], None] | None = field(default=None, repr=False)

    @classmethod
    def from_settings(cls, settings: Settings) -> SMTPConfig:
        """Read the SMTP_* variables. Raises ConfigError."""
        host = settings.read("SMTP_HOST", host_name, "")
        user = settings.secret("SMTP_USER").strip()
        if user and not host:
            raise ConfigError("SMTP_HOST: missing, though SMTP_USER is set; name your mail server")
        number = settings.read("SMTP_PORT", whole(1, 65535), SUBMISSION_PORT if host else DEBUG_PORT)
        config = cls(
            host=host or DEBUG_HOST,
            port=number,
            security=_security(settings, host or DEBUG_HOST, number),
            user=user,
            password=functools.partial(_password, settings, host),
            auth=settings.read("SMTP_AUTH", one_of("auto", "xoauth2"), "auto"),
            sender=settings.read("SMTP_FROM", _sender, _default_sender(user)),
            cafile=settings.read("SMTP_CAFILE", str, ""),
            timeout_s=settings.read("SMTP_TIMEOUT", duration, TIMEOUT_S),
            debug=not host,
        )
        config._check()
        return config

    def _check(self) -> None:
        if not 0 < self.timeout_s <= DAY_S:
            raise ConfigError("SMTP_TIMEOUT: must be more than 0 and not more than 1d; 30 (seconds) is usual")
        if self.user and self.security == "none" and not is_loopback(self.host):
            raise ConfigError(
                f"SMTP_SECURITY: none sends the password in the clear to {self.host}; use starttls or ssl"
            )
        password = self.password() if self.user else ""
        if self.user and not password:
            raise ConfigError("SMTP_PASS: missing for SMTP_USER; set it, SMTP_PASS_FILE or SMTP_PASS_COMMAND")
        if not f"{self.user}{password}".isascii():
            raise ConfigError("SMTP_PASS: holds a character outside ASCII, which no SMTP login carries; choose another")
        self.tls()

    def tls(self) -> ssl.SSLContext | None:
        """A context that verifies certificate and host name; None without TLS. Raises ConfigError."""
        if self.security == "none" and not self.cafile:
            return None
        try:
            context = ssl.create_default_context(cafile=self.cafile or None)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"SMTP_CAFILE: {self.cafile}: no usable certificates: {error}") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # 3.13 sets it; home-made signers lack extensions that it wants
        return None if self.security == "none" else context


def _sender(text: str) -> str:
    address(text)  # refuses what must not stand in a header, too
    return text


def _default_sender(user: str) -> str:
    with contextlib.suppress(ValueError):
        return address(user)
    return f"alerts@{hostname()}"


def hostname() -> str:
    """This machine's name, fit for an address, without asking DNS."""
    return re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()).strip("-.") or "localhost"


def is_loopback(host: str) -> bool:
    """Does this name or address mean this machine?"""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def _security(settings: Settings, host: str, number: int) -> str:
    chosen = settings.read("SMTP_SECURITY", one_of("ssl", "starttls", "none", "auto"), "auto")
    wants_tls = settings.read("SMTP_USE_TLS", one_of("true", "false", "yes", "no", "on", "off", "1", "0"), "true")
    if chosen != "auto":
        return chosen
    if wants_tls in ("false", "no", "off", "0"):
        return "none"
    if number == SUBMISSIONS_PORT:
        return "ssl"
    return "none" if is_loopback(host) else "starttls"


def _password(settings: Settings, host: str) -> str:
    password, fetched = settings.secret("SMTP_PASS"), b""
    path, command = settings.secret("SMTP_PASS_FILE").strip(), settings.secret("SMTP_PASS_COMMAND").strip()
    try:
        if not password and path:
            fetched = Path(path).read_bytes()
        elif not password and command:
            fetched = subprocess.run(command, shell=True, capture_output=True, timeout=30, check=True).stdout
        password = password or fetched.decode("utf-8").partition("\n")[0].rstrip("\r")
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as error:
        name = f"SMTP_PASS_FILE: {path}" if path else "SMTP_PASS_COMMAND"
        code = getattr(error, "returncode", None)
        what = f"exit code {code}" if code else getattr(error, "strerror", None) or type(error).__name__
        # the error itself may show what was read
        raise ConfigError(f"{name}: gives no password ({what})") from None
    if re.search(r"(^|\.)(gmail|googlemail|google)\.com$", host, re.I):
        password = re.sub(r"\s", "", password)  # Google shows app passwords in four groups
    return password


# ───────────────────────────────────────────── Listening ────────────────────────────────────────────
# What every server needs, whatever it serves.


def listen(host: str, port: int, backlog: int, tries: int = 9) -> list[socket.socket]:
    """Listen on every address of `host`; `::` is both families. The same free port on all when `port` is 0.

    An address family that this machine only has by name is passed over. Raises OSError when nothing is left.
    """
    sockets: list[socket.socket] = []
    missing = OSError("it has no address")
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, address in dict.fromkeys((item[0], item[4]) for item in found):
        where = (address[0], sockets[0].getsockname()[1] if sockets else port, *address[2:])
        both = address[0] == "::" and socket.has_dualstack_ipv6()
        try:
            sockets.append(socket.create_server(where, family=family, backlog=backlog, dualstack_ipv6=both))
        except OSError as error:
            if error.errno in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
                missing = error
                continue
            for sock in sockets:
                sock.close()
            if error.errno == errno.EADDRINUSE and sockets and not port and tries:
                return listen(host, port, backlog, tries - 1)  # it was free on some addresses only
            raise
    if not sockets:
        raise missing
    return sockets


Address = tuple[str, int] | tuple[str, int, int, int]  # of a socket, IPv4 or IPv6


def show_address(address: Address) -> str:
    """`192.0.2.1:25` or `[2001:db8::1]:25`. An IPv4 peer of a socket for both families is shown as IPv4."""
    host, number = address[0].removeprefix("::ffff:"), address[1]
    return f"[{host}]:{number}" if ":" in host else f"{host}:{number}"


def log_listening(logger: logging.Logger, sockets: Iterable[socket.socket]) -> None:
    """Log where the sockets listen, whatever the level: whoever started the program waits for these lines."""
    always = max(logging.INFO, logger.getEffectiveLevel())
    for sock in sockets:
        logger.log(always, "listening on %s", show_address(sock.getsockname()))


def server_tls(cert: str, key: str, client_ca: str = "", *, names: str = "TLS_CERT and TLS_KEY") -> ssl.SSLContext:
    """A server's context, TLS 1.2 and later; with `client_ca`, clients must show a certificate. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # a stream that ends can still be answered; OpenSSL 3 would break it off with an alert
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    used = f"{cert} and {key}" if key else f"{cert} (certificate and key)"
    try:
        for path in filter(None, (cert, key, client_ca)):
            Path(path).open("rb").close()  # the errors of ssl name no file
        context.load_cert_chain(cert, key or None, password="")  # an encrypted key is an error, not a prompt
        if client_ca:
            used = client_ca
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except ssl.SSLError as error:
        raise ConfigError(f"{names}: {used}: cannot be used as PEM: {error}") from None
    except OSError as error:
        raise ConfigError(f"{names}: {error.filename}: {error.strerror}") from None
    return context


def wait_at_most(sock: socket.socket, receive_s: float, send_s: float) -> None:
    """Timeouts by the kernel where that works: settimeout would cost a poll for every read."""
    if isinstance(sock, ssl.SSLSocket) or os.name != "posix":
        sock.settimeout(min(receive_s, LONGEST_S))
        return
    sock.settimeout(None)
    for option, seconds in ((socket.SO_RCVTIMEO, min(receive_s, LONGEST_S)), (socket.SO_SNDTIMEO, send_s)):
        size = len(sock.getsockopt(socket.SOL_SOCKET, option, 16))  # 32-bit systems may have a 64-bit time_t or not
        value = struct.pack("qq" if size == 16 else "ii", int(seconds), int(seconds % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, option, value)


def close_gently(sock: socket.socket, linger_s: float) -> None:
    """Close so that the last answer arrives: unread input would turn the end into a reset that destroys it.

    So a peer that does not end the connection itself may go on talking for `linger_s` seconds. Over TLS it is told the
    end, which it could not tell from a cut otherwise (RFC 8446 6.1); its answer is not waited for.
    """
    with contextlib.suppress(OSError, MemoryError, ValueError):  # ValueError: gone before the handshake
        sock.settimeout(0)
        if isinstance(sock, ssl.SSLSocket):
            sock.unwrap()
    with contextlib.suppress(OSError, MemoryError):
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(linger_s)
        ends = time.monotonic() + linger_s
        while time.monotonic() < ends and sock.recv(1 << 16):
            pass
    with contextlib.suppress(OSError):
        sock.close()


# ───────────────────────────────────────────── Transport ────────────────────────────────────────────


class Envelope(NamedTuple):
    """One transaction: who sends ("" is the null sender), who receives, and the mail in pieces of whole lines.

    `eight_bit`: it is not all ASCII, as what this module composes is.
    """

    sender: str
    recipients: tuple[str, ...]
    data: Sequence[bytes]
    eight_bit: bool = False


class Transport(Protocol):
    """What a courier delivers through."""

    def open(self) -> None:
        """Connect, if not connected. Raises Unavailable."""

    def deliver(self, envelopes: Iterable[Envelope], wanted: Callable[[], bool]) -> Iterator[dict[str, Outcome]]:
        """One transaction each, in order; for each an outcome a recipient. Trouble of network or server is an outcome,
        never raised. `wanted` is asked when an envelope's turn comes; one that is not is left out, with no outcome."""

    def close(self) -> None:
        """End the connection politely, if there is one."""


class Dialogue(smtplib.SMTP):
    """smtplib's EHLO and login, with every reply bounded in size, and in time from its first wait to its last byte.

    smtplib's own time-out starts anew with each byte, and its replies have no end. `step` says how far it came.
    """

    def __init__(self, config: SMTPConfig, report: Callable[[str, str], None]) -> None:
        super().__init__(local_hostname="localhost", timeout=config.timeout_s)  # without a host it does not connect
        self.step = "resolve"
        self.patience_s = config.timeout_s  # for one reply
        self.deadline = time.monotonic() + ATTEMPT_S  # for all of them, and for what is sent
        self.dirty = False  # a transaction was left open: RSET comes first
        self._config, self._report = config, report
        self._lines: deque[bytes] = deque()  # received, whole
        self._rest = b""  # and the beginning of the next one
        self._masked = False

    def begin(self) -> None:
        """Connect, EHLO, TLS and login, as configured. Raises what smtplib, ssl and socket raise."""
        self.sock = self._connected()
        if self._config.security == "ssl":
            self._start_tls()
        self.step = "greeting"
        code, words = self.getreply()
        if code != 220:
            raise smtplib.SMTPConnectError(code, words)
        self._report("greeting", words.decode("utf-8", "replace"))
        self._hello()
        if self._config.security == "starttls":
            self.step = "tls"
            if not self.has_extn("starttls"):
                raise ssl.SSLError(1, "STARTTLS is not offered by the server")
            code, words = self.docmd("STARTTLS")
            if code != 220:
                raise smtplib.SMTPResponseException(code, words)
            self._lines.clear()  # nothing said in the clear counts after the handshake (CVE-2011-0411)
            self._rest = b""
            self._start_tls()
            self._hello()
        self._report("ehlo", " ".join(sorted(name.upper() for name in self.esmtp_features)) or "HELO")
        if self._config.user:
            self._login()

    def _connected(self) -> socket.socket:
        config = self._config
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        self._report("resolve", ", ".join(sorted({str(info[4][0]) for info in found})))
        self.step = "connect"
        sock = socket.create_connection((config.host, config.port), config.timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        here, peer = sock.getsockname()[0], sock.getpeername()[0]
        self.local_hostname = hostname() if "." in hostname() else f"[{'IPv6:' * (':' in here)}{here}]"
        self._report("connect", f"{peer} port {config.port}")
        if config.user and config.security == "none" and not is_loopback(peer):
            sock.close()
            raise OSError(f"the password would go in the clear to {peer}; use SMTP_SECURITY=starttls or ssl")
        return sock

    def _start_tls(self) -> None:
        self.step = "tls"
        context, sock = self._config.tls(), self.sock
        assert context is not None and sock is not None
        sock.settimeout(self._config.timeout_s)
        self.sock = wrapped = context.wrap_socket(sock, server_hostname=self._config.host)
        self._report("tls", f"{wrapped.version()}, certificate valid for {self._config.host}")

    def _hello(self) -> None:
        self.step = "ehlo"
        self.does_esmtp, self.helo_resp, self.ehlo_resp, self.esmtp_features = False, None, None, {}
        self.ehlo_or_helo_if_needed()

    def _login(self) -> None:
        self.step = "login"
        user, password = self._config.user, self._config.password()
        self._masked = True
        try:
            if self._config.auth == "xoauth2":  # developers.google.com/workspace/gmail/imap/xoauth2-protocol
                token = f"user={user}\1auth=Bearer {password}\1\1"
                self.auth("XOAUTH2", lambda challenge=None: token if challenge is None else "")
            else:
                self.login(user, password)
        finally:
            self._masked = False
        self._report("login", user)

    def write(self, pieces: Sequence[bytes]) -> None:
        """Send pieces; small ones as one packet."""
        assert self.sock is not None
        if sum(map(len, pieces)) < PIECE:
            pieces = [b"".join(pieces)]
        try:
            for piece in pieces:
                self.sock.settimeout(max(0.001, min(self._config.timeout_s, self.deadline - time.monotonic())))
                self.sock.sendall(piece)
        except HUNG_UP:  # a server that hangs up in the middle of a mail has often said why
            self.patience_s = 1.0

    def putcmd(self, cmd: str, args: str = "") -> None:
        if self._config.trace:
            shown = f"{cmd} {args}".strip()
            masked = re.sub(r"^(AUTH +[^ ]+)?.*", r"\1 ****", shown).strip()
            self._config.trace(f"C: {masked if self._masked else shown}")
        super().putcmd(cmd, args)

    def getreply(self) -> tuple[int, bytes]:
        """One whole reply. What is no reply raises SMTPResponseException, and so does 421, which ends a connection."""
        until = min(time.monotonic() + self.patience_s, self.deadline)
        lines: list[bytes] = []
        for _ in range(REPLY_MAX_LINES):
            while not self._lines:
                self._receive(until)
            line = self._lines.popleft()
            lines.append(line[4:].strip())
            if self._config.trace:
                self._config.trace(f"S: {line.decode('utf-8', 'replace').rstrip()}")
            if not line[:3].isdigit():
                raise smtplib.SMTPResponseException(-1, f"not an SMTP reply: {line[:80]!r}")
            if line[3:4] != b"-":
                code, words = int(line[:3]), b"\n".join(lines)
                if code == 421:
                    raise smtplib.SMTPResponseException(code, words)
                return code, words
        raise smtplib.SMTPResponseException(-1, "a reply without end")

    def _receive(self, until: float) -> None:
        if self.sock is None:
            raise smtplib.SMTPServerDisconnected("not connected")
        if (left := until - time.monotonic()) <= 0:
            raise TimeoutError
        self.sock.settimeout(left)
        chunk = self.sock.recv(8192)
        if not chunk:
            raise smtplib.SMTPServerDisconnected("closed")
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        self._lines.extend(lines)
        if len(self._rest) > REPLY_MAX_BYTES:
            raise smtplib.SMTPResponseException(-1, "a reply without end")


class OutOfStep(OSError):
    """The server has lost what came together with a final dot, or answers what it was not asked."""


TROUBLE = (OSError, smtplib.SMTPException, ValueError)  # all that a dialogue raises


class Parcel:
    """An envelope made ready for the wire: dot-stuffed, its length known."""

    def __init__(self, envelope: Envelope) -> None:
        self.envelope = envelope
        small = sum(map(len, envelope.data)) < PIECE
        self.pieces = dot_stuffed([b"".join(envelope.data)] if small else envelope.data)
        self.length = sum(map(len, self.pieces))

    def commands(self, smtp: Dialogue) -> list[str]:
        """MAIL with what the server understands, RCPT… and DATA."""
        parameters = f" SIZE={self.length}" * smtp.has_extn("size")
        parameters += " BODY=8BITMIME" * (self.envelope.eight_bit and smtp.has_extn("8bitmime"))
        recipients = [f"RCPT TO:<{name}>" for name in self.envelope.recipients]
        return [f"MAIL FROM:<{self.envelope.sender}>{parameters}", *recipients, "DATA"]


class Lookahead:
    """Parcels, made one or two before their turn: while the server works on another."""

    def __init__(self, envelopes: Iterable[Envelope]) -> None:
        self._source = map(Parcel, envelopes)
        self._made: deque[Parcel] = deque()
        self._trouble: Exception | None = None

    def see(self, number: int) -> Parcel | None:
        """The next parcel (1), or the one after it (2)."""
        try:
            if len(self._made) < number and not self._trouble:  # else they were no longer in step with their owner's
                self._made.extend(itertools.islice(self._source, number - len(self._made)))
        except Exception as error:  # another mail is under way, whose outcome must be heard first
            self._trouble = error
        return self._made[number - 1] if len(self._made) >= number else None

    def take(self) -> Parcel | None:
        """The next parcel, which is no longer ahead."""
        if self.see(1):
            return self._made.popleft()
        if self._trouble:
            raise self._trouble
        return None


class SMTPTransport:
    """One connection to the configured server, kept while there is work."""

    def __init__(self, config: SMTPConfig, report: Callable[[str, str], None] = lambda step, words: None) -> None:
        self._config, self._report = config, report
        self._smtp: Dialogue | None = None
        self._begun: Parcel | None = None  # its commands went with the dot of the one before
        self._begins_early = True

    def open(self) -> None:
        """Connect and log in, unless connected. Raises Unavailable."""
        if self._smtp is not None:
            return
        smtp = Dialogue(self._config, self._report)
        try:
            smtp.begin()
        except (*TROUBLE, ConfigError) as error:  # ConfigError: the password's file or command failed just now
            smtp.close()
            raise Unavailable(replace(judge_error(smtp.step, error), ours=True)) from None
        self._smtp = smtp

    def deliver(
        self, envelopes: Iterable[Envelope], wanted: Callable[[], bool] = lambda: True
    ) -> Iterator[dict[str, Outcome]]:
        """One transaction each. The commands of the next mail go with the final dot of this one where the server
        offers PIPELINING (RFC 2920 3.1), and the mail after it is asked for while the server works."""
        ahead = Lookahead(envelopes)
        try:
            while parcel := ahead.take():
                if wanted():
                    yield self._delivered(parcel, ahead)
                else:
                    self._give_up()
                    yield {}
        finally:
            self._give_up()

    def _give_up(self) -> None:
        """What was begun early is not wanted any more, and the server waits for its content."""
        if self._begun:
            self._drop()

    def _delivered(self, parcel: Parcel, ahead: Lookahead) -> dict[str, Outcome]:
        """A kept connection that the server has closed meanwhile is opened anew, once."""
        kept = self._smtp is not None
        try:
            self.open()
            return self._transaction(parcel, ahead)
        except Unavailable as error:
            outcome = error.outcome
        except TROUBLE as error:
            assert self._smtp is not None
            step = self._smtp.step
            if self._begun is parcel and isinstance(error, TimeoutError | OutOfStep):
                self._begins_early = False
            self._drop()
            if kept and step == "mail":
                return self._delivered(parcel, ahead)
            outcome = judge_error(step, error)
        except BaseException:  # replies may be under way that belong to nobody
            self._drop()
            raise
        return dict.fromkeys(parcel.envelope.recipients, outcome)

    def _transaction(self, parcel: Parcel, ahead: Lookahead) -> dict[str, Outcome]:
        smtp = self._smtp
        assert smtp is not None
        smtp.step, smtp.patience_s = "mail", self._config.timeout_s
        smtp.deadline = time.monotonic() + ATTEMPT_S + parcel.length / SLOWEST_BYTES_S
        if too_big := self._too_big(parcel):
            return dict.fromkeys(parcel.envelope.recipients, too_big)
        if smtp.dirty:
            smtp.docmd("RSET")
        smtp.dirty = True
        if self._begun is not parcel and smtp.has_extn("pipelining"):
            smtp.write([self._packet(parcel)])
        ahead.see(1)
        outcomes, data = self._addressed(smtp, parcel)
        if self._begun is parcel and smtp.step == "mail" and data.code in (500, 503):
            raise OutOfStep("commands were lost")
        self._begun = None
        taken = [name for name, outcome in outcomes.items() if outcome.verdict is Verdict.SENT]
        if data.code == 354 and not taken:
            data = judge("dot", *smtp.docmd("."))
            smtp.dirty = False
        elif data.code == 354:
            data = self._content(smtp, parcel, ahead)
        return outcomes | dict.fromkeys(taken, data)

    def _too_big(self, parcel: Parcel) -> Outcome | None:
        assert self._smtp is not None
        limit = self._smtp.esmtp_features.get("size", "")
        if not limit.isdigit() or not 0 < int(limit[:18]) < parcel.length:
            return None
        return judge("mail", 552, f"5.3.4 {parcel.length} bytes, the server takes {limit[:18]}")

    def _packet(self, parcel: Parcel) -> bytes:
        """All the commands that begin a transaction."""
        assert self._smtp is not None
        commands = parcel.commands(self._smtp)
        if trace := self._config.trace:
            for command in commands:
                trace(f"C: {command}")
        return "".join(f"{command}\r\n" for command in commands).encode("ascii")

    def _content(self, smtp: Dialogue, parcel: Parcel, ahead: Lookahead) -> Outcome:
        """The mail, the dot, and with it what begins the next transaction; the outcome of the dot."""
        if self._config.trace:
            self._config.trace(f"C: ({parcel.length} bytes of mail, then the dot)")
        following = ahead.see(1) if self._begins_early and smtp.has_extn("pipelining") else None
        if following and not self._too_big(following):
            self._begun = following
        last = b".\r\n" + (self._packet(following) if self._begun and following else b"")
        smtp.step, smtp.patience_s = "dot", FINAL_DOT_TIMEOUT_S
        smtp.write([*parcel.pieces, last])
        ahead.see(2)
        smtp.deadline = math.inf  # the answer to the dot has a patience of its own
        code, words = smtp.getreply()
        if 300 <= code < 400:
            raise OutOfStep(f"{code} after the mail")
        smtp.dirty = False
        return judge("dot", code, words)

    def _addressed(self, smtp: Dialogue, parcel: Parcel) -> tuple[dict[str, Outcome], Outcome]:
        """The outcome of MAIL and RCPT for each recipient, and that of DATA; 354: the server waits for the mail.

        After a refusal the rest is only asked if it is under way already.
        """
        names, together = parcel.envelope.recipients, smtp.has_extn("pipelining")
        there = itertools.islice(iter(smtp.getreply, None), len(names) + 2)
        replies = there if together else map(smtp.docmd, parcel.commands(smtp))
        mail = judge("mail", *next(replies))
        if mail.verdict is not Verdict.SENT:
            rest = [mail]
            try:
                rest += [judge("data", *reply) for reply in replies] if together else []
            except TROUBLE:  # a server that hangs up after its no has said enough
                self._drop()
            return dict.fromkeys(names, mail), rest[-1]
        smtp.step = "rcpt"
        outcomes = {name: judge("rcpt", *next(replies)) for name in names}
        if not together and all(outcome.verdict is not Verdict.SENT for outcome in outcomes.values()):
            return outcomes, mail
        smtp.step = "data"
        code, words = next(replies)
        if code != 354 and code < 400:
            raise OutOfStep(f"{code} to DATA")
        return outcomes, judge("data", code, words)

    def verify(self, recipient: str = "") -> Outcome:
        """Would the server take a mail from us (to `recipient`)? Nothing is sent. Raises Unavailable."""
        self.open()
        smtp = self._smtp
        assert smtp is not None
        smtp.dirty = True
        sender = address(self._config.sender)
        steps = [("mail", "sender", f"MAIL FROM:<{sender}>", sender)]
        steps += [("rcpt", "recipient", f"RCPT TO:<{recipient}>", recipient)] if recipient else []
        for smtp.step, name, command, words in steps:
            try:
                outcome = judge(smtp.step, *smtp.docmd(command))
            except TROUBLE as error:
                outcome = judge_error(smtp.step, error)
            if outcome.verdict is not Verdict.SENT:
                break
            self._report(name, words)
        return outcome

    def close(self) -> None:
        """QUIT. Whatever the server makes of it changes nothing that it has accepted."""
        if self._smtp is not None:
            self._smtp.patience_s = min(2.0, self._config.timeout_s)
            with contextlib.suppress(*TROUBLE):
                self._smtp.docmd("QUIT")
            self._drop()

    def _drop(self) -> None:
        if self._smtp is not None:
            self._smtp.close()
            self._smtp = self._begun = None


def dot_stuffed(pieces: Sequence[bytes]) -> list[bytes]:
    """RFC 5321 4.5.2: a line that begins with a dot gets another. The last line gets its end."""
    # Base64 has no dots, and looking for one byte is quick
    stuffed = [piece.replace(b"\r\n.", b"\r\n..") if b"." in piece else piece for piece in pieces]
    stuffed = [b"." + piece if piece.startswith(b".") else piece for piece in stuffed]
    if not stuffed or not stuffed[-1].endswith(b"\r\n"):
        stuffed.append(b"\r\n")
    return stuffed


# ───────────────────────────────────────────── Outbox ───────────────────────────────────────────────
# A durable queue in one SQLite file that does not know what it carries. One process owns a file, one connection
# does every write and checkpoint (SQLite before 3.51.3 can corrupt a WAL file that two connections write).
# Beside it lie its lock, the pictures and, for a moment, the numbers of mails that were sent and are not settled yet.

WAITING, FROZEN, SENT, FAILED, DROPPED = range(5)  # of an item; a mail is FROZEN, then SENT or FAILED

SCHEMA = """
CREATE TABLE IF NOT EXISTS items(     -- one row a life; what is settled keeps its id and loses its payload
  seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, lane TEXT NOT NULL, arrived REAL NOT NULL,
  state INTEGER NOT NULL DEFAULT 0, settled REAL, error TEXT,
  taken TEXT,                         -- who has it already, though it failed for others
  told INTEGER NOT NULL DEFAULT 0,    -- the mail that tells of this failure
  sum BLOB NOT NULL, payload BLOB,
  picture_sum BLOB, picture_at INTEGER, picture_size INTEGER);  -- in the file of pictures
CREATE INDEX IF NOT EXISTS items_open ON items(state, seq) WHERE settled IS NULL;
CREATE INDEX IF NOT EXISTS items_settled ON items(settled, state) WHERE settled IS NOT NULL;
CREATE INDEX IF NOT EXISTS items_untold ON items(seq) WHERE state = 3 AND told = 0;
CREATE TABLE IF NOT EXISTS mails(     -- a mail whose sending has begun: it stays the same mail
  mail INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, items TEXT NOT NULL, recipients TEXT NOT NULL,
  failed INTEGER NOT NULL, why TEXT NOT NULL, begun REAL NOT NULL, next REAL NOT NULL,
  state INTEGER NOT NULL DEFAULT 1, tries INTEGER NOT NULL DEFAULT 0, waited REAL NOT NULL DEFAULT 0,
  bare INTEGER NOT NULL DEFAULT 0, taken TEXT NOT NULL DEFAULT '[]', refused TEXT NOT NULL DEFAULT '{}',
  error TEXT, settled REAL);
CREATE INDEX IF NOT EXISTS mails_due ON mails(next) WHERE state = 1;
CREATE INDEX IF NOT EXISTS mails_settled ON mails(settled) WHERE settled IS NOT NULL;
CREATE TABLE IF NOT EXISTS notes(name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
SHOWN = "SELECT picture_sum, picture_at, picture_size FROM items WHERE settled IS NULL AND picture_size"
UNTOLD = """SELECT count(*), max(seq), (SELECT group_concat(error, '; ') FROM
  (SELECT DISTINCT error FROM items WHERE state = 3 AND told = 0 LIMIT 3)) FROM items WHERE state = 3 AND told = 0"""
SEQS = "seq IN (SELECT value FROM json_each(?))"
NO_ROOM = re.compile("is full|No space left|too large|quota exceeded")  # as SQLite and the system say it


class SpoolError(Exception):
    """The disk failed or the file is damaged; nothing was accepted."""


# No file can be made there, today or tomorrow: the cause of a SpoolError at the start that is about its setting.
WRONG_PLACE = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


class SpoolFull(SpoolError):
    """No room is left in the spool."""


class DiskFull(SpoolFull):
    """No room is left on the disk."""


class SpoolBusy(SpoolError):
    """Another process owns the file."""


class Damaged(Exception):
    """A row does not match its checksum; `seq` says which."""

    def __init__(self, seq: int) -> None:
        super().__init__(f"row {seq} is damaged")
        self.seq = seq


@dataclass(frozen=True)
class NewItem:
    """Something to carry. `lane` is what its owner groups by; `fresh` ids were made just now and need no look-up."""

    id: str
    lane: str
    payload: bytes
    picture: bytes | None = None
    arrived: float = field(default_factory=time.time)
    fresh: bool = False


class Receipt(NamedTuple):
    """What became of a put: `new` is False for a duplicate; `id` differs where the wished one meant something else."""

    id: str
    new: bool


class Waiting(NamedTuple):
    """A light row of what waits, for planning. `taken`: recipients who have it already."""

    seq: int
    id: str
    lane: str
    arrived: float
    taken: frozenset[str] = frozenset()


class Item(NamedTuple):
    """A row with its payload, for rendering. `picture()` loads the picture when it is needed; None: there is none (any
    more)."""

    seq: int
    id: str
    lane: str
    arrived: float
    payload: bytes
    picture: Callable[[], bytes | None] = lambda: None


class Draft(NamedTuple):
    """A mail that is due: which items, to whom, and its owner's own word for how to render it."""

    items: tuple[int, ...]
    recipients: tuple[str, ...]
    kind: str = ""
    lanes: tuple[str, ...] = ()


class Mail(NamedTuple):
    """A frozen mail. `bare`: without pictures. `failed`, `why`: alerts that failed, which this mail tells of.

    `recipients` are those who are left, `taken` and `refused` those who are done; `waited` is the sum of its own
    delays in seconds: its age, which no jump of the clock changes.
    """

    number: int
    kind: str
    items: tuple[int, ...]
    recipients: tuple[str, ...]
    failed: int = 0
    why: str = ""
    tries: int = 0
    waited: float = 0.0
    bare: bool = False
    taken: tuple[str, ...] = ()
    refused: Mapping[str, str] = {}
    state: int = FROZEN
    next: float = 0.0
    error: str | None = None


@dataclass
class History:
    """What was sent: when mails of the last day went, how many are under way, when a lane or kind last began."""

    times: deque[float] = field(default_factory=deque)
    pending: int = 0
    lanes: dict[str, float] = field(default_factory=dict)
    kinds: dict[str, float] = field(default_factory=dict)


class Place(NamedTuple):
    """A picture's SHA-256, and where it lies in the file of pictures; the size is 0 where there is none."""

    sum: bytes | None = None
    at: int = 0
    size: int = 0


@dataclass(eq=False)
class _Ticket:
    items: Sequence[NewItem]
    places: Sequence[Place]  # one an item
    receipts: list[Receipt] | None = None
    error: Exception | None = None


class SideFile:
    """A file beside the database, held open; one that was removed or moved is made anew."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()  # never held during a commit
        self._file = self._opened()

    def _opened(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)

    def renew(self) -> None:
        """Make the file anew if it was removed, moved or replaced. Raises OSError; then it is tried again next time."""
        if file_identity(self._path) != file_identity(self._file):
            with self._lock:
                anew = self._opened()
                try:
                    self._rescue(anew)
                except BaseException:
                    os.close(anew)
                    os.unlink(self._path)  # half of it keeps the room that the log needs
                    raise
                os.close(self._file)
                self._file = anew

    def _rescue(self, anew: int) -> None:
        """Copy what is worth it."""

    def _write(self, file: int, at: int, data: bytes) -> None:
        while data:
            written = pwrite(file, data, at)
            data, at = data[written:], at + written

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            os.close(self._file)
            self._file = -1  # the number may soon be another file's


def _seek_and_write(file: int, data: bytes, at: int) -> int:
    os.lseek(file, at, os.SEEK_SET)
    return os.write(file, data)


pwrite: Callable[[int, bytes, int], int] = getattr(os, "pwrite", _seek_and_write)  # Windows has none


class Ticks(SideFile):
    """Mails that are over, until the next commit settles them.

    Those that everybody has are also ticked off in a file, so that the end of the process repeats none of them. Its
    slots are written again and again: what stood there was settled long ago, and no mail's number is given twice.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._slot = -1
        self._waiting: deque[tuple[Mail, float]] = deque()

    def add(self, mail: Mail, now: float) -> bool:
        """Remember it; True if it could be ticked off."""
        with self._lock:
            self._waiting.append((mail, now))
            if mail.state != SENT:
                return False
            with contextlib.suppress(OSError):
                self._slot = (self._slot + 1) % TICK_SLOTS
                self._write(self._file, self._slot * TICK_BYTES, b"%015d\n" % mail.number)
                return True
        return False

    def waiting(self) -> tuple[tuple[Mail, float], ...]:
        """Mails to settle, and when they were over, oldest first."""
        with self._lock:
            return tuple(self._waiting)

    def settled(self, number: int) -> None:
        """So many of them, the oldest, are settled."""
        with self._lock:
            for _ in range(number):
                self._waiting.popleft()

    def numbers(self) -> list[int]:
        """The mails that were ticked off before this start, settled or not."""
        return [int(number) for number in re.findall(rb"(\d{15})\n", Path(self._path).read_bytes())]

    def clear(self) -> None:
        """Forget what is in the file."""
        os.ftruncate(self._file, 0)


class Pictures(SideFile):
    """The pictures of what waits. SQLite would write each of them twice, page by page.

    A row says where its picture lies. The place is free again once the end of that row is on disk, and no earlier: a
    power cut could bring the row back.
    """

    def __init__(self, path: str, used: Iterable[Place]) -> None:
        super().__init__(path)
        sync_folder(path)
        self._syncing = threading.Lock()
        self._written = self._synced = self._failed = 0  # numbers of the last write, the last on disk, the last lost
        self._end = 0
        self._gaps: list[tuple[int, int]] = []  # start and end of what is free before the end
        for place in sorted(used, key=lambda place: place.at):
            if place.at > self._end:
                self._gaps.append((self._end, place.at))
            self._end = max(self._end, place.at + place.size)
        if (size := os.fstat(self._file).st_size) > self._end:  # what a killed owner had no time to cut off
            self._gaps.append((self._end, size))
            self._end = size

    def _opened(self) -> int:
        """Locked: who removes the spool's lock to start a second relay shall not have two that know of free places."""
        return lock_file(Path(self._path)) if fcntl else super()._opened()

    def write(self, pictures: Sequence[bytes | None]) -> list[Place]:
        """Put them where there is room; they are on disk when this returns. Raises OSError; then nothing was kept."""
        if not any(pictures):
            return [Place()] * len(pictures)
        sums = [hashlib.sha256(picture).digest() if picture else None for picture in pictures]
        places: list[Place] = []
        try:
            with self._lock:
                for picture, digest in zip(pictures, sums, strict=True):
                    places.append(Place(digest, self._reserved(len(picture)), len(picture)) if picture else Place())
                    self._write(self._file, places[-1].at, picture or b"")
                self._written += 1
                number = self._written
            self._sync(number)
        except BaseException:
            self.free(places)
            raise
        return places

    def _sync(self, number: int) -> None:
        """One sync does for all that was written before it began. So does its failure: the next one would succeed, and
        what the first has lost would stay lost (wiki.postgresql.org/wiki/Fsync_Errors)."""
        with self._syncing:
            if self._failed < number and self._synced < number:
                upto = self._written
                try:
                    sync(self._file)
                except OSError:
                    self._failed = upto
                    raise
                self._synced = upto
            if self._failed >= number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _reserved(self, size: int) -> int:
        """Where so many bytes have room: in the first gap that is large enough, or at the end. Raises OSError."""
        for number, (start, end) in enumerate(self._gaps):
            if end - start >= size:
                self._gaps[number] = (start + size, end)
                return start
        self._check_disk(size)
        self._end += size
        return self._end - size

    def _check_disk(self, size: int) -> None:
        """Raises OSError unless there is room for so many bytes more, and to spare: rows may use more of the disk.

        A picture that waits at the end of the file keeps all that is free before it from the rows.
        """
        with contextlib.suppress(FileNotFoundError):  # the folder was removed, which is noticed elsewhere
            disk = shutil.disk_usage(os.path.dirname(self._path) or ".")
            if disk.free - size < 2 * reserve(disk):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read(self, place: Place) -> bytes:
        """The picture. Raises OSError, also if it is not the one that was written there."""
        with self._lock, open(self._file, "rb", closefd=False) as file:  # os.read may stop early
            file.seek(place.at)
            picture = file.read(place.size)
        if hashlib.sha256(picture).digest() != place.sum:
            raise OSError(errno.EIO, "damaged on disk")
        return picture

    def free(self, places: Iterable[Place]) -> None:
        """These places may be used again."""
        with self._lock:
            gaps: list[tuple[int, int]] = []
            for start, end in sorted((*self._gaps, *((place.at, place.at + place.size) for place in places))):
                if gaps and gaps[-1][1] == start:
                    gaps[-1] = gaps[-1][0], end
                elif start < end:
                    gaps.append((start, end))
            if gaps and gaps[-1][1] == self._end:
                self._end = gaps.pop()[0]
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._end)
            self._gaps = gaps

    def used(self) -> int:
        """Bytes in use."""
        with self._lock:
            return self._end - sum(end - start for start, end in self._gaps)

    def _rescue(self, anew: int) -> None:
        self._check_disk(self._end)
        with open(self._file, "rb", closefd=False) as source, open(anew, "wb", closefd=False) as copy:
            source.seek(0)
            shutil.copyfileobj(source, copy)
        sync(anew)
        sync_folder(self._path)


def sync(file: int) -> None:
    """What was written to the file is on disk when this returns. Raises OSError."""
    getattr(os, "fdatasync", os.fsync)(file)


def sync_folder(path: str) -> None:
    """The name of the file is on disk when this returns."""
    with contextlib.suppress(OSError):  # Windows opens no folder
        folder = os.open(Path(path).parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class Outbox:
    """The durable queue. Every method is safe to call from any thread, and raises SpoolError when the disk fails."""

    def __init__(self, path: str | Path, *, schema: str = "", size_max: int | None = None) -> None:
        """Open or make the file, 0600, and lock it; `schema` makes tables of its owner. Raises SpoolError."""
        self.path = Path(path)
        self._schema, self._size_max = SCHEMA + schema, size_max
        self._lock = threading.RLock()
        self._gathered: deque[_Ticket] = deque()
        self._over: list[Place] = []  # of rows that have ended, which is not surely on disk
        self._room = self._room_until = 0.0
        self.closed = False
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._owned = lock_file(Path(f"{self.path}.lock"))
        except OSError as error:
            raise SpoolError(f"{self.path}: {error.strerror}") from error
        try:
            with contextlib.ExitStack() as undo:
                undo.callback(os.close, self._owned)
                self._db = self._open_sound()
                undo.callback(self._db.close)
                self._pictures = Pictures(f"{self.path}.pictures", itertools.starmap(Place, self._db.execute(SHOWN)))
                undo.callback(self._pictures.close)
                self._ticks = Ticks(f"{self.path}.sent")
                undo.callback(self._ticks.close)
                self._read_ticks()
                undo.pop_all()
        except (sqlite3.Error, OSError) as error:
            raise SpoolError(f"{self.path}: {getattr(error, 'strerror', None) or error}") from error

    def close(self) -> None:
        """Close the database and let go of the lock."""
        with self._lock:
            if not self.closed:
                self.closed = True
                self._db.close()
                self._ticks.close()
                self._pictures.close()
                os.close(self._owned)

    # opening, damage, loss

    def _open_sound(self) -> sqlite3.Connection:
        """The database, if it is sound; else it is moved aside, what can be read is saved, and the log says so."""
        existed = self.path.exists()
        if existed and not self.path.stat().st_size:
            log.error("the spool %s was empty: what it held is lost", self.path)
        try:
            return self._open()
        except sqlite3.DatabaseError as error:
            if not existed or isinstance(error, sqlite3.OperationalError):
                raise
        aside = self._move_aside("damaged")
        db = self._open()
        salvage(aside, db)
        self._recount(db)
        found = f"{self._counts[WAITING]} alerts that wait and {self._counts[FAILED]} that failed were saved"
        log.error("the spool %s was damaged and moved to %s; %s", self.path, aside, found)
        return db

    def _move_aside(self, why: str) -> Path:
        aside = Path(f"{self.path}.{why}-{time.time_ns()}")
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self.path}{suffix}", f"{aside}{suffix}")
        return aside

    def _open(self) -> sqlite3.Connection:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        identity = file_identity(file)  # before SQLite opens it: what takes its place from here on is noticed
        os.close(file)
        db = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            small = self.path.stat().st_size < CHECKED_MAX_BYTES
            if small and db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("damaged")
            db.execute("PRAGMA secure_delete=OFF")  # Debian's default writes zeros over all that was sent
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            log_pages = reserve(shutil.disk_usage(self.path.parent)) // 4 // pragma(db, "page_size")
            db.execute(f"PRAGMA wal_autocheckpoint={min(1000, max(1, log_pages))}")  # it grows on a full disk, too
            if pragma(db, "synchronous") != 2:
                raise sqlite3.OperationalError("synchronous=FULL was not taken")
            db.executescript(self._schema)
            db.execute(f"SELECT count(*) FROM ({SHOWN})")  # reads what waits, in a large spool too
            with contextlib.suppress(sqlite3.OperationalError):  # a full disk
                db.execute("PRAGMA wal_checkpoint")  # what a killed owner has settled is on disk from here on
            self._recount(db)
        except BaseException:
            db.close()
            raise
        self._durable, self._identity = True, identity
        return db

    def _rescue(self) -> None:
        """The file was removed or replaced under us; our connection still has it all: write it out anew."""
        log.error("the spool %s was removed while in use; it is written anew", self.path)
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = Path(f"{self.path}.lock")
        if file_identity(lock) is None:
            held, self._owned = self._owned, lock_file(lock)
            os.close(held)
        anew = Path(f"{self.path}.rescued")
        anew.unlink(missing_ok=True)
        os.close(os.open(anew, os.O_RDWR | os.O_CREAT, 0o600))
        with contextlib.closing(sqlite3.connect(anew)) as copy:
            self._db.backup(copy)
        self._move_aside("removed")
        os.replace(anew, self.path)
        self._identity = file_identity(self.path)
        self._db.close()  # before the new one opens: closing removes the -wal file by its name
        self._db = self._open()

    # the one way to the database

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """BEGIN IMMEDIATE … COMMIT, one thread at a time; on disk when it is left, all or nothing.

        With `durable=False` the commit survives the end of the process, but a power cut may undo it (until
        the next durable one). Raises SpoolError; then nothing was done.
        """
        with self._lock:
            known = len(self._over)
            try:
                if durable:
                    if file_identity(self.path) != self._identity:  # never acknowledge into an unlinked file
                        self._rescue()
                    with contextlib.suppress(OSError):  # what waits may go out; `put` takes no more
                        self._pictures.renew()
                    self._ticks.renew()
                if durable != self._durable:
                    self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                    self._durable = durable
                changes = self._db.total_changes
                self._db.execute("BEGIN IMMEDIATE")
                over = self._ticks.waiting()
                self._settle(over)
                yield self._db
                self._db.execute("COMMIT")
                self._ticks.settled(len(over))
                if durable and self._over and self._db.total_changes > changes:  # else nothing was synced
                    self._pictures.free(self._over)
                    self._over = []
            except BaseException as error:
                del self._over[known:]
                with contextlib.suppress(sqlite3.Error):
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    self._recount(self._db)
                if isinstance(error, sqlite3.Error | OSError):
                    self._fail(error)
                raise

    def rows(self, sql: str, *values: object) -> list[Any]:
        """The rows of a query, outside any transaction. Raises SpoolError."""
        with self._lock:
            try:
                return self._db.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                self._fail(error)

    def _fail(self, error: Exception) -> NoReturn:
        """What the database raises becomes a SpoolError; after damage it is opened anew."""
        if re.search("malformed|not a database|closed database", str(error)) and not self.closed:
            with contextlib.suppress(sqlite3.Error, OSError):
                self._db.close()
                self._db = self._open_sound()
                self._ticks.clear()  # it may count from 1 again
        full = bool(NO_ROOM.search(str(error)))
        if full or "disk I/O" in str(error):  # so says SQLite of a log that may not grow
            self._reclaim()
        raise (DiskFull if full else SpoolError)(f"{self.path}: {error}") from error

    # putting

    def put(self, items: Sequence[NewItem]) -> list[Receipt]:
        """Add items; when this returns they are on disk. Threads that arrive meanwhile share the next commit.

        The same id with the same content is a duplicate; with other content it gets a suffix. Raises SpoolError.
        """
        ticket = _Ticket(items, self._laid_down([item.picture for item in items]))
        self._gathered.append(ticket)
        with self._lock:  # whoever gets it commits all that gathered; the others find their tickets done
            if ticket.receipts is None and ticket.error is None:
                self._commit([self._gathered.popleft() for _ in range(len(self._gathered))])
        if ticket.receipts is None:
            if any(place.size for place in ticket.places):
                with self._lock:
                    self._over += ticket.places  # its rows may stand in the log, and come back with it
                    self._reclaim()
            try:
                raise ticket.error or SpoolError("interrupted")
            finally:
                ticket.error = None  # else the two keep each other alive, and all that stands on the stack
        shown = zip(ticket.places, ticket.receipts, strict=True)
        if unused := [place for place, receipt in shown if place.size and not receipt.new]:
            self._pictures.free(unused)
        return ticket.receipts

    def _laid_down(self, pictures: Sequence[bytes | None], again: bool = True) -> Sequence[Place]:
        """The pictures on disk, each by the thread that brings it."""
        if size := sum(len(picture or b"") for picture in pictures):
            self.check_room(0, size)
        try:
            return self._pictures.write(pictures)
        except OSError as error:
            with self._lock:
                if again and NO_ROOM.search(str(error)):
                    self._reclaim()
                    return self._laid_down(pictures, again=False)
                self._fail(error)

    def _commit(self, tickets: Sequence[_Ticket]) -> None:
        try:
            self.check_room(sum(len(item.payload) for ticket in tickets for item in ticket.items))
            with self.transaction() as db:
                self._pictures.renew()
                done = [list(map(self.add, itertools.repeat(db), one.items, one.places)) for one in tickets]
        except Exception as error:
            alone = len(tickets) == 1 or (isinstance(error, SpoolError) and not isinstance(error, SpoolFull))
            for ticket in tickets:
                ticket.error = error
                if not alone:  # what is wrong with one costs only itself
                    self._commit([ticket])
        else:
            for ticket, receipts in zip(tickets, done, strict=True):
                ticket.receipts = receipts

    def check_room(self, rows: int, pictures: int = 0) -> None:
        """Raises SpoolFull unless there is room for so many bytes, and for writing down what becomes of them.

        An eighth of what was found may be used up, and ROOM_S may pass, before the next look.
        """
        self._room -= 4 * (rows + pictures)  # rows take more than what they hold
        if self._room > 0 and time.monotonic() < self._room_until:
            return
        spare, disk = self._spare(rows, pictures)
        if min(spare, disk) < 0:
            self._reclaim()
            spare, disk = self._spare(rows, pictures)
        if spare < 0:
            raise SpoolFull(f"{self.path}: no more than {self._size_max} bytes are allowed, and they are used")
        if disk < 0:
            raise DiskFull(f"{self.path}: the disk is full")
        self._room, self._room_until = min(spare, disk) / 8, time.monotonic() + ROOM_S

    def _spare(self, rows: int, pictures: int) -> tuple[float, float]:
        """Bytes left after so many more: of what the spool may take, and of the disk.

        Rows are written twice, into the log and then into the database, which may have unused room. Pictures see to
        the disk themselves.
        """
        pages, free, page = (
            self.rows(f"PRAGMA {name}")[0][0] for name in ("page_count", "freelist_count", "page_size")
        )
        used = (pages - free) * page + self._pictures.used()
        spare = math.inf if self._size_max is None else self._size_max - used - rows - pictures
        try:
            disk, waits = shutil.disk_usage(self.path.parent), os.path.getsize(f"{self.path}-wal")
        except FileNotFoundError:  # nothing was written yet, or the folder was removed, which is noticed elsewhere
            return spare, 0
        return spare, disk.free - reserve(disk) - rows - max(0, waits + rows - free * page)

    def _reclaim(self) -> None:
        """Free what the log holds for nothing, and the places of pictures whose end is on disk when it is empty.

        Who reads the database meanwhile is not waited for: everybody would wait for him.
        """
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA busy_timeout=0")
            try:
                busy, _, _ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            finally:
                self._db.execute(f"PRAGMA busy_timeout={BUSY_S * 1000}")
            if not busy:
                self._pictures.free(self._over)
                self._over = []

    def add(self, db: sqlite3.Connection, item: NewItem, place: Place = Place()) -> Receipt:  # noqa: B008
        """Add an item inside a transaction; `place` is where its picture lies."""
        sums = hashlib.sha256(item.payload).digest(), place.sum
        name = item.id
        while not item.fresh:
            known = db.execute("SELECT sum, picture_sum FROM items WHERE id = ?", (name,)).fetchone()
            if known is None:
                break
            if known == sums or name != item.id:
                return Receipt(name, new=False)
            name = f"{item.id[:115]}-{hashlib.sha256(sums[0] + (sums[1] or b'')).hexdigest()[:12]}"
        db.execute(
            "INSERT INTO items(id, lane, arrived, payload, sum, picture_sum, picture_at, picture_size)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (name, item.lane, item.arrived, item.payload, sums[0], *place),
        )  # fmt: skip
        self._counts[WAITING] += 1
        return Receipt(name, new=True)

    # planning

    def waiting(self, after: int = 0) -> Iterator[Waiting]:
        """What waits and is in no mail yet, oldest first, page by page, without payloads."""
        sql = "SELECT seq, id, lane, arrived, taken FROM items WHERE settled IS NULL AND state = 0 AND seq > ?"
        while True:
            page = self.rows(f"{sql} ORDER BY seq LIMIT {PAGE_ROWS}", after)
            for seq, name, lane, arrived, taken in page:
                yield Waiting(seq, name, lane, arrived, frozenset(json.loads(taken) if taken else ()))
                after = seq
            if len(page) < PAGE_ROWS:
                return

    def newest(self) -> int:
        """The row number of the newest item."""
        return int(self.rows("SELECT max(seq) FROM items")[0][0] or 0)

    def begun(self, since: float) -> History:
        """When mails of each lane and kind last began, since then."""
        history = History()
        for kind, lane, when in self.rows(
            "SELECT mails.kind, items.lane, mails.begun FROM mails, json_each(mails.items) AS one"
            " JOIN items ON items.seq = one.value WHERE mails.begun > ? ORDER BY mails.begun", since,
        ):  # fmt: skip
            history.kinds[kind] = history.lanes[lane] = when
        return history

    def budget(self, now: float, limit: int) -> tuple[deque[float], int]:
        """When the newest `limit` mails of the last day went, and how many are under way.

        Some may be over since `now`, or the clock was set back: those of the next day count, too.
        """
        sql = "SELECT settled FROM mails WHERE settled > ? AND settled <= ? AND taken != '[]'"
        with self._lock:  # a commit between the two would count its mails in neither
            rows = self.rows(f"{sql} ORDER BY settled DESC LIMIT ?", now - DAY_S, now + DAY_S, limit)
            pending = self.rows("SELECT count(*) FROM mails WHERE state = 1")[0][0]
        return deque(when for (when,) in reversed(rows)), pending

    def freeze(self, drafts: Sequence[Draft], now: float) -> list[Mail]:
        """Make each draft a mail, durably: from now on, whatever happens, it is the same mail.

        What waits no longer is left out. The first of them tells of the failures that nobody was told of.
        """
        mails: list[Mail] = []
        with self.transaction() as db:
            failed, _, why = db.execute(UNTOLD).fetchone()
            wanted = json.dumps([seq for draft in drafts for seq in draft.items])
            mark = f"UPDATE items SET state = 1 WHERE state = 0 AND {SEQS} RETURNING seq"
            marked = {seq for (seq,) in db.execute(mark, (wanted,))}
            for draft in drafts:
                items = tuple(seq for seq in draft.items if seq in marked)
                marked.difference_update(items)
                if not items:
                    continue
                number = db.execute(
                    "INSERT INTO mails(kind, items, recipients, failed, why, begun, next) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (draft.kind, json.dumps(items), json_list(draft.recipients), failed, why or "", now, now),
                ).lastrowid
                if failed:
                    db.execute("UPDATE items SET told = ? WHERE state = 3 AND told = 0", (number,))
                mails.append(Mail(number or 0, draft.kind, items, draft.recipients, failed, why or ""))
                failed, why = 0, ""
        return mails

    def due(self, now: float, latest: float, busy: Collection[int], most: int) -> list[Mail]:
        """Frozen mails to try again now. One that is due later than `latest` is due now: the clock was set back."""
        taken = {*busy, *(mail.number for mail, _ in self._ticks.waiting())}
        found = self._mails("(next <= ? OR next > ?) ORDER BY next LIMIT ?", now, latest, most + len(taken))
        return [mail for mail in found if mail.number not in taken][:most]

    def _mails(self, which: str, *values: object) -> list[Mail]:
        sql = "SELECT mail, kind, items, recipients, failed, why, tries, waited, bare, taken, refused FROM mails"
        return [
            Mail(number, kind, tuple(json.loads(items)), tuple(json.loads(to)), failed, why, tries, waited, bool(bare),
                 tuple(json.loads(taken)), json.loads(refused))
            for number, kind, items, to, failed, why, tries, waited, bare, taken, refused
            in self.rows(f"{sql} WHERE state = 1 AND {which}", *values)
        ]  # fmt: skip

    # rendering and settling

    def load(self, mail: Mail) -> list[Item]:
        """The items of a mail that are still in it, each verified against its checksum. Raises Damaged."""
        sql = "SELECT id, lane, arrived, payload, sum, picture_sum, picture_at, picture_size FROM items"
        sql += " WHERE seq = ? AND state = 1"
        items = []
        for seq in mail.items:
            for name, lane, arrived, payload, wanted, *shown in self.rows(sql, seq):
                if type(payload) is not bytes or hashlib.sha256(payload).digest() != wanted:
                    raise Damaged(seq)
                load = functools.partial(self._picture, seq, Place(*shown)) if shown[0] else lambda: None
                items.append(Item(seq, name, lane, arrived, payload, load))
        return items

    def _picture(self, seq: int, place: Place) -> bytes | None:
        """The picture; None if it cannot be read any more: its mail goes without it."""
        try:
            return self._pictures.read(place)
        except OSError as error:
            if self.rows("SELECT 1 FROM items WHERE seq = ? AND state = 1", seq):  # else it was dropped meanwhile
                log.error("%s: the picture of row %d is left out: %s", self.path, seq, error.strerror)
        return None

    def untold(self) -> tuple[int, str]:
        """How many alerts failed without anybody having been told, and why (the first three reasons)."""
        ((number, _, why),) = self.rows(UNTOLD)
        return number, why or ""

    def settle(self, mail: Mail, now: float) -> bool:
        """How an attempt ended: the next commit writes it down. Needs no disk sync: a power cut at worst makes the
        attempt happen again.

        True: everybody has the mail, and it is ticked off in a file beside the spool, so that the end of this
        process repeats nothing. Else `flush` should follow.
        """
        return self._ticks.add(mail, now)

    def flush(self) -> None:
        """Write down what was settled. Raises SpoolError; then it stays noted."""
        if self._ticks.waiting():
            with self.transaction(durable=False):
                pass

    def _read_ticks(self) -> None:
        """What the last owner had no time to settle."""
        for number in self._ticks.numbers():
            for mail in self._mails("mail = ?", number):
                sent = mail._replace(state=SENT, recipients=(), taken=(*mail.taken, *mail.recipients))
                self._ticks.add(sent, time.time())
        with contextlib.suppress(SpoolError):  # a full disk; then the next commit that succeeds settles them
            self.flush()
            self._ticks.clear()

    def _settle(self, over: Sequence[tuple[Mail, float]]) -> None:
        for mail, when in over:
            self._settle_mail(mail, when)
        if sent := [seq for mail, _ in over if mail.state == SENT for seq in mail.items]:
            self._end(SENT, sent, "state = 2, settled = ?, error = NULL, payload = NULL", over[-1][1])

    def _settle_mail(self, mail: Mail, now: float) -> None:
        over = None if mail.state == FROZEN else now
        row = (mail.state, mail.next, mail.tries, mail.waited, mail.bare, mail.error, over)
        lists = json_list(mail.recipients), json_list(mail.taken), json.dumps(mail.refused) if mail.refused else "{}"
        self._db.execute(
            "UPDATE mails SET state = ?, next = ?, tries = ?, waited = ?, bare = ?, error = ?, settled = ?,"
            " recipients = ?, taken = ?, refused = ? WHERE mail = ?", (*row, *lists, mail.number),
        )  # fmt: skip
        if mail.failed and not mail.taken:  # nobody has read what it tells of: another mail shall
            undo = "UPDATE items SET told = 0 WHERE settled IS NULL AND state = 3 AND told = ?"
            self._db.execute(undo, (mail.number,))
            self._db.execute("UPDATE mails SET failed = 0, why = '' WHERE mail = ?", (mail.number,))
        if mail.state == FAILED:  # who has it is added to those who had it in an earlier life
            change = "state = 3, error = ?, taken = (SELECT json_group_array(DISTINCT value) FROM (SELECT value FROM"
            change += " json_each(coalesce(items.taken, '[]')) UNION ALL SELECT value FROM json_each(?)))"
            self._end(FAILED, mail.items, change, mail.error, json.dumps(mail.taken))

    def _end(self, state: int, items: Sequence[int], change: str, *values: object) -> None:
        """Change items of mails that are over."""
        number = self._update(self._db, f"{change} WHERE state = 1 AND {SEQS}", *values, json.dumps(items))
        self._counts[WAITING] -= number
        self._counts[state] += number

    def _update(self, db: sqlite3.Connection, change: str, *values: object) -> int:
        """Change rows; the number of them. The places of pictures that nobody needs any more are free after this."""
        returned = "RETURNING settled, picture_sum, picture_at, picture_size"
        rows = db.execute(f"UPDATE items SET {change} {returned}", values).fetchall()
        self._over += [Place(*shown) for settled, *shown in rows if settled is not None and shown[0]]
        return len(rows)

    def note(self, **remarks: object) -> None:
        """Leave remarks for `queue`."""
        with self.transaction(durable=False) as db:
            rows = [(name, json.dumps(value)) for name, value in remarks.items()]
            db.executemany("INSERT OR REPLACE INTO notes VALUES (?, ?)", rows)

    # looking after it

    def retry(self, name: str = "all") -> int:
        """Failed alerts (or one) wait again and are planned anew, and what was put off is due; the number of them."""
        with self.transaction() as db:
            db.execute("UPDATE mails SET next = 0 WHERE state = 1")
        change = "state = 0, error = NULL, told = 0 WHERE settled IS NULL AND state = 3 AND ? IN (id, 'all')"
        return self._change(change, name)

    def drop(self, name: str = "all") -> int:
        """What waits, is held or failed (or one) is not sent and its payload is forgotten; the number of them."""
        change = "state = 4, settled = ?, payload = NULL WHERE settled IS NULL AND ? IN (id, 'all')"
        return self._change(change, time.time(), name)

    def lanes(self) -> list[str]:
        """The lanes of what waits or has failed, as far as the first 2000 rows show."""
        sql = "SELECT DISTINCT lane FROM (SELECT lane FROM items WHERE settled IS NULL LIMIT 2000)"
        return [lane for (lane,) in self.rows(sql)]

    def expire(self, newest: int, why: str) -> int:
        """What was there when row `newest` came and is not sent yet has failed; the number of them."""
        known = self._counts[FAILED]
        self.flush()
        for mail in self._mails("1"):
            if max(mail.items) <= newest:
                self._ticks.add(mail._replace(state=FAILED, error=why), time.time())
        self._change("state = 3, error = ? WHERE settled IS NULL AND state = 0 AND seq <= ?", why, newest)
        return self._counts[FAILED] - known

    def quarantine(self, seq: int, why: str = "damaged on disk") -> None:
        """A row cannot go out: it has failed; the others of its mail go on."""
        self._change("state = 3, error = ? WHERE state = 1 AND seq = ?", why, seq)

    def _change(self, change: str, *values: object) -> int:
        with self.transaction() as db:
            number = self._update(db, change, *values)
            self._recount(db)
        return number

    def prune(self, now: float) -> int:
        """Forget what was settled more than MEMORY_S ago, a little at a time; the number of items forgotten."""
        old = "DELETE FROM {0} WHERE rowid IN (SELECT rowid FROM {0} WHERE settled < ? LIMIT 2000)"
        with self.transaction(durable=False) as db:
            db.execute(old.format("mails"), (now - MEMORY_S,))
            gone = db.execute(old.format("items") + " RETURNING state", (now - MEMORY_S,)).fetchall()
            for (state,) in gone:
                self._counts[state] -= 1
        if self._over:  # nothing came since that would have freed their places
            self._reclaim()
        return len(gone)

    def counts(self) -> dict[str, int]:
        """How many items wait (in a mail or not), were sent (and are remembered), failed."""
        return {"queued": self._counts[WAITING], "sent": self._counts[SENT], "failed": self._counts[FAILED]}

    def _recount(self, db: sqlite3.Connection) -> None:
        counts = dict.fromkeys(range(5), 0)
        for which in ("IS NULL", "IS NOT NULL"):
            counts |= dict(db.execute(f"SELECT state, count(*) FROM items WHERE settled {which} GROUP BY state"))
        counts[WAITING] += counts[FROZEN]
        self._counts = counts


@functools.lru_cache(maxsize=256)
def json_list(recipients: tuple[str, ...]) -> str:
    """Recipients as JSON; they are mostly the same ones."""
    return json.dumps(recipients)


def lock_file(path: Path) -> int:
    """Lock `path` for this process until it ends; the kernel lets go even after kill -9. Raises SpoolBusy."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError:
        os.close(handle)
        raise SpoolBusy(f"{path}: another process owns this spool; is the program running already?") from None
    return handle


def pragma(db: sqlite3.Connection, name: str) -> int:
    """The value of a numeric pragma."""
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])


def reserve(disk: Any) -> int:
    """Bytes of it that are kept free for bookkeeping; `disk` is what shutil.disk_usage says."""
    return min(DISK_RESERVE_BYTES, int(disk.total) // 20)


def file_identity(path: str | Path | int) -> tuple[int, int] | None:
    """Device and inode, by which a file that was removed or replaced is noticed; None: there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def salvage(damaged: Path, into: sqlite3.Connection) -> None:
    """Copy every row of every table that can still be read, from both ends, since a bad page stops a reader."""
    ours = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    tables = [name for (name,) in into.execute(ours)]
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(damaged)) as db:
        into.execute("BEGIN")
        for table, order in itertools.product(tables, ("", "DESC")):
            with contextlib.suppress(sqlite3.Error):
                for row in db.execute(f"SELECT * FROM {table} ORDER BY rowid {order}"):
                    with contextlib.suppress(sqlite3.Error):
                        into.execute(f"INSERT OR IGNORE INTO {table} VALUES ({', '.join('?' * len(row))})", row)
        into.execute(  # what lay in a mail that could not be read waits again
            "UPDATE items SET state = 0 WHERE state = 1 AND seq NOT IN"
            " (SELECT one.value FROM mails, json_each(mails.items) AS one WHERE mails.state = 1)"
        )
        into.execute("COMMIT")


def read_queue(path: Path) -> list[dict[str, Any]]:
    """Every item that waits, is held or failed, read without writing to the file. Raises SpoolError."""
    if not os.access(path, os.R_OK):
        raise SpoolError(f"{path}: there is no such spool, or you may not read it; --spool FILE names another")
    # without a log nobody writes, and the file can be read without making one
    mode = "mode=ro" if Path(f"{path}-wal").exists() else "mode=ro&immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, timeout=5)) as db:
            db.row_factory = sqlite3.Row
            items = db.execute(
                "SELECT seq, id, lane, arrived, state, error FROM items WHERE settled IS NULL"
            ).fetchall()
            mails = db.execute(
                "SELECT items, recipients, refused, next, tries, error FROM mails WHERE state IN (1, 3) ORDER BY mail"
            ).fetchall()
            notes = {name: json.loads(value) for name, value in db.execute("SELECT name, value FROM notes")}
    except sqlite3.Error as error:
        raise SpoolError(f"{path}: {error}") from None
    last = {seq: mail for mail in mails for seq in json.loads(mail["items"])}
    items.sort(key=lambda item: item["seq"])
    return [_queue_row(item, None if item["state"] == WAITING else last.get(item["seq"]), notes) for item in items]


def _queue_row(item: sqlite3.Row, mail: sqlite3.Row | None, notes: Mapping[str, Any]) -> dict[str, Any]:
    hold = notes.get("hold") or {"upto": 0}
    failed = item["state"] == FAILED
    held = not failed and bool(hold.get("all") or (mail is None and item["seq"] <= hold["upto"]))
    due = max(mail["next"] if mail else 0.0, hold["until"] if held else 0.0)
    recipients = mail and (json.loads(mail["recipients"]) or list(json.loads(mail["refused"])))
    return {
        "id": item["id"],
        "lane": item["lane"],
        "state": "failed" if failed else "held" if held else "waiting",
        "since": iso(item["arrived"]),
        "next": iso(due) if due and not failed else None,
        "tries": mail["tries"] if mail else 0,
        "error": hold["why"] if held else item["error"] or (mail and mail["error"]),
        "recipients": recipients or notes.get("lanes", {}).get(item["lane"], []),
    }


def iso(when: float) -> str:
    """Wall-clock seconds -> ISO 8601, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(max(0.0, when)))


# ───────────────────────────────────────────── Courier ──────────────────────────────────────────────
# plan (pure) ─▶ connect ─▶ freeze ─▶ render (pure) ─▶ deliver ─▶ settle. The stages share the outbox and a
# doorbell, nothing else; the bell is cleared before anyone looks.


@dataclass(frozen=True)
class Plan:
    """The mails that are due now; `wake`: when to plan again though nothing arrives; `why` the rest is held."""

    drafts: list[Draft]
    wake: float | None = None
    why: str = ""


class Owner(Protocol):
    """Who owns an outbox. Its methods are pure. `window` (seconds) and `limit` (mails) say how much of what was
    sent the plan looks at; an owner with 0 and 0 plans each item alone, in any order."""

    window: float
    limit: int

    def plan(self, waiting: Iterable[Waiting], sent: History, now: float, most: int) -> Plan:
        """Which mails are due. Pulls from `waiting` only until it has `most` drafts."""

    def recipients(self, lane: str) -> tuple[str, ...]:
        """Who gets what waits in this lane, as things are now."""

    def render(self, mail: Mail, items: Sequence[Item]) -> Envelope:
        """The mail as it goes out."""


class _Batch:
    """Mails that one sender has taken: those still `left`, those that were `begun`, which nobody else may take, and
    what was `sent` to whom, which the log has yet to be told."""

    def __init__(self, mails: Iterable[Mail]) -> None:
        self.left = {mail.number: mail for mail in mails}
        self.begun: set[int] = set()
        self.sent: dict[str, list[str]] = {}
        self.taken_at = time.monotonic()


def conclude(mail: Mail, outcomes: Mapping[str, Outcome], now: float, delay: float, max_age: float) -> Mail:
    """Pure: the mail after an attempt, with its next state. No outcomes: nobody is left who should get it."""
    taken, refused, again = [*mail.taken], {**mail.refused}, set()
    later: dict[str, str] = {}
    for name, outcome in outcomes.items():
        if outcome.verdict is Verdict.SENT:
            taken.append(name)
        elif outcome.too_big and not mail.bare:
            again.add(name)
        else:
            kept = later if outcome.verdict is Verdict.TRY_LATER else refused
            kept[name] = str(outcome)
    waited = mail.waited + delay * bool(later)
    if later and waited > max_age:
        refused |= {name: f"given up after {mail.tries + 1} tries; last: {said}" for name, said in later.items()}
        later = {}
    left = tuple(name for name in mail.recipients if name in later or name in again)
    error = "; ".join(f"{name}: {said}" for name, said in (refused | later).items())
    return mail._replace(
        recipients=left, taken=tuple(taken), refused=refused, tries=mail.tries + 1, waited=waited,
        bare=mail.bare or bool(again), state=FROZEN if left else FAILED if refused else SENT,
        next=now if again else now + delay, error=error or None,
    )  # fmt: skip


def backoff(tries: int, first: float, most: float) -> float:
    """Seconds to wait after attempt `tries` (from 0): doubling from `first` up to `most`, a fifth of it jitter."""
    return min(most, first * 2.0 ** min(tries, 40)) * random.uniform(0.8, 1.0)


class Courier:
    """Carries what waits in an outbox to a transport, with `senders` threads of one connection each."""

    def __init__(
        self,
        outbox: Outbox,
        owner: Owner,
        transport: Callable[[], Transport],
        *,
        senders: int = 1,
        retry_first: float = 5.0,
        retry_max: float = 3600.0,
        max_age: float = 5 * DAY_S,
        clock: Callable[[], float] = time.time,
        advise: Callable[[Outcome], str] = lambda outcome: "",
    ) -> None:
        self._outbox, self._owner, self._transport = outbox, owner, transport
        self._clock, self._advise, self._senders = clock, advise, senders
        self._first, self._most, self._max_age = retry_first, max(retry_max, retry_first), max_age
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._ringing = threading.Lock()  # guards the next three
        self._bells = {kept: threading.Condition(self._ringing) for kept in (True, False)}  # by: has a connection
        self._idle = {True: 0, False: 0}
        self._rings = 1
        self._lock = threading.Lock()  # guards all that follows
        self._batches: list[_Batch] = []  # what the senders have
        self._most_at_once = 1  # mails in a batch
        self._history = outbox.begun(clock() - owner.window) if owner.window else History()
        self._fresh: int | None = None  # the newest row at the last look, while there is a backlog
        self._replan()
        self._hold: Outcome | None = None  # why everything waits
        self._held_at_open = False  # a connection ends the hold; else only a delivery does
        self._hold_tries = 0
        self._hold_until = self._succeeded = 0.0  # monotonic
        self._hold_marks: deque[tuple[float, int]] = deque()  # since the hold began: when, and the newest row then
        self._kept_house = -math.inf
        self._remarked: object = None
        self._complaint = ""  # of the disk, said once

    # life

    def start(self) -> None:
        """Start the sender threads and the keeper."""
        for number in range(self._senders):
            self._threads.append(threading.Thread(target=self._send_loop, name=f"sender-{number + 1}", daemon=True))
        self._threads.append(threading.Thread(target=self._keep_loop, name="keeper", daemon=True))
        for thread in self._threads:
            thread.start()

    def ring(self) -> None:
        """There is something new in the outbox."""
        with self._ringing:
            self._rings += 1
            if time.monotonic() >= self._hold_until:  # while everything is held, nobody need wake for more of it
                self._nudge()

    def stop(self, timeout: float = 4.0) -> None:
        """End the threads; a mail that is under way gets `timeout` seconds, then it is left for the next start."""
        self._stopping.set()
        with self._ringing:
            for bell in self._bells.values():
                bell.notify_all()
        until = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _nudge(self) -> None:
        """Wake one idle sender, rather one that has a connection."""
        self._bells[self._idle[True] > 0].notify()

    def _wait(self, rings: int, connected: bool, seconds: float) -> None:
        with self._ringing:
            if self._rings == rings and not self._stopping.is_set():
                self._idle[connected] += 1
                try:
                    self._bells[connected].wait(seconds)
                finally:
                    self._idle[connected] -= 1

    def _send_loop(self) -> None:
        transport = self._transport()
        used, connected = 0.0, False
        while not self._stopping.is_set():
            rings = self._rings
            with self._stumbling(pause=TICK_S):
                if self.step(transport):
                    used, connected = time.monotonic(), True
                    continue
                left = used + LINGER_S - time.monotonic()
                if connected and left <= 0:
                    transport.close()
                    connected = False
                self._wait(rings, connected, min(left, TICK_S) if connected else TICK_S)
        transport.close()

    def _keep_loop(self) -> None:
        while not self._stopping.is_set():
            with self._stumbling(pause=TICK_S):
                if not self._stopping.wait(TICK_S):
                    self.tick()

    @contextlib.contextmanager
    def _stumbling(self, pause: float = 0.0) -> Iterator[None]:
        """Whatever fails is logged, and the thread goes on."""
        try:
            yield
        except (SpoolError, MemoryError) as error:
            self._complain(error)
            self._stopping.wait(pause)
        except Exception:
            log.exception("%s stumbled; it goes on", threading.current_thread().name)
            self._stopping.wait(pause)

    def _complain(self, error: SpoolError | MemoryError) -> None:
        words = str(error) or "out of memory"
        if words != self._complaint and not self._stopping.is_set():
            self._complaint = words
            log.error("%s", words)

    # a few mails

    def step(self, transport: Transport) -> bool:
        """Carry what is due, a few mails at a time; False if there was nothing to do.

        The connection comes before anything is frozen: what waits for a server that is away stays free to be
        planned anew.
        """
        with self._lock:
            if self._brisk() or not self._due():
                return False
        if not self._opened(transport):
            return False
        with self._lock:
            if not self._due():  # another sender was quicker
                return True
            batch = _Batch(self._freeze())
            self._batches.append(batch)
        try:
            self._carry(batch, transport)
        finally:
            with self._lock:
                self._batches.remove(batch)
        return True

    def _brisk(self) -> bool:
        """Do full batches go out so quickly that a second sender would only take the interpreter from the first?"""
        since = time.monotonic() - BRISK_S
        return self._most_at_once == BATCH_MAILS and any(batch.taken_at > since for batch in self._batches)

    def _opened(self, transport: Transport) -> bool:
        began = time.monotonic()
        try:
            transport.open()
        except Unavailable as error:
            at_work = any(batch.taken_at > began - PROBE_MAX_S for batch in self._batches)
            if self._succeeded < began and not at_work:  # else another sender shows that the server is there
                self._hold_back(error.outcome)
                self._held_at_open = True
            return False
        if self._held_at_open:
            self._release()
        return True

    # planning

    def _replan(self) -> None:
        """Plan from the first row again: something changed under the plan."""
        self._drafts: list[Draft] = []  # due, not frozen yet
        self._retries: list[Mail] = []  # frozen, and due again
        self._seen = 0  # rows up to this one are held until _wake
        self._wake = self._looked = 0.0
        self._heard = 0
        self._why = ""

    def _due(self) -> bool:
        """Is anything due? While everything is held, one mail at a time finds out whether that is over."""
        if self._drafts or self._retries:
            return True
        if self._hold and time.monotonic() < self._hold_until:
            return False
        now = self._clock()
        most = 1 if self._hold else self._most_at_once
        busy = {number for batch in self._batches for number in (*batch.left, *batch.begun)}
        self._retries = self._outbox.due(now, now + 2 * self._most, busy, most)
        if not (self._hold and self._retries):
            self._plan(now, most)
        if self._hold and (self._drafts or self._retries):
            self._hold_until = time.monotonic() + self._pause()  # nobody else tries meanwhile
        return bool(self._drafts or self._retries or self._late())

    def _plan(self, now: float, most: int) -> None:
        """Ask the owner. Rows that the plan has held are not looked at again before their time."""
        if not self._looked <= now < self._wake:  # their time has come, or the clock was set back
            self._seen, self._wake, self._why = 0, math.inf, ""
        elif self._heard == self._rings:
            return
        rings = self._rings  # before looking: what comes meanwhile rings again
        if self._owner.limit:
            self._history.times, self._history.pending = self._outbox.budget(now, self._owner.limit)
        exhausted, last = False, self._seen

        def rows() -> Iterator[Waiting]:
            nonlocal exhausted, last
            for row in self._outbox.waiting(self._seen):
                last = row.seq
                yield row
            exhausted = True

        plan = self._owner.plan(rows(), self._history, now, most)
        self._drafts, self._seen = plan.drafts, last
        if plan.wake is not None and plan.wake < self._wake:
            self._wake, self._why = plan.wake, plan.why
        self._heard, self._looked = rings if exhausted else 0, now  # 0: look again at once
        if not self._owner.window:
            self._favour_fresh(exhausted, now, most)

    def _favour_fresh(self, exhausted: bool, now: float, most: int) -> None:
        """A backlog drains oldest first, but what has come since the last look goes before it, a few at a time."""
        since, self._fresh = self._fresh, None if exhausted else self._outbox.newest()
        if not exhausted and since is not None:
            rows = self._outbox.waiting(max(self._seen, since))
            self._drafts = self._owner.plan(rows, self._history, now, max(1, most // 4)).drafts + self._drafts

    def _freeze(self) -> list[Mail]:
        """Freeze what is due and take it."""
        now = self._clock()
        frozen = self._outbox.freeze(self._drafts, now) if self._drafts else []
        for draft in self._drafts if self._owner.window else ():
            self._history.kinds[draft.kind] = now
            self._history.lanes.update(dict.fromkeys(draft.lanes, now))
        mails = [*frozen, *self._retries]
        self._drafts, self._retries = [], []
        for batch in self._late() if not mails else ():
            for number in list(batch.left)[len(batch.left) // 2 :]:  # its sender may have begun the next one already
                mails += filter(None, [batch.left.pop(number, None)])
        return mails

    def _late(self) -> list[_Batch]:
        """Batches that hang: what their senders have not begun is there for others."""
        late = -math.inf if self._hold else time.monotonic() - BATCH_S
        return [batch for batch in self._batches if batch.left and batch.taken_at < late]

    # delivering

    def _carry(self, batch: _Batch, transport: Transport) -> None:
        """Deliver a batch; batches grow while full ones go out briskly."""
        with self._ringing:
            self._nudge()
        under_way: deque[tuple[Mail, Sequence[Item]]] = deque()

        def wanted() -> bool:
            return not self._stopping.is_set() and self._claim(batch, under_way[0][0])

        try:
            for outcomes in transport.deliver(self._envelopes(batch, under_way), wanted):
                mail, items = under_way.popleft()
                if outcomes and not self._conclude(batch, mail, items, outcomes):
                    break
                if time.monotonic() - batch.taken_at > BRISK_S:
                    self._write_down(batch)
        finally:
            self._write_down(batch)
            took = time.monotonic() - batch.taken_at
            with self._lock:
                if took < BRISK_S and len(batch.begun) >= self._most_at_once:
                    self._most_at_once = min(BATCH_MAILS, self._most_at_once * 2)
                elif took > BATCH_S:
                    self._most_at_once = max(1, self._most_at_once // 2)

    def _claim(self, batch: _Batch, mail: Mail) -> bool:
        """Is it still ours? From now on nobody else may take it."""
        with self._lock:
            if batch.left.pop(mail.number, None):
                batch.begun.add(mail.number)
            return mail.number in batch.begun

    def _envelopes(self, batch: _Batch, under_way: deque[tuple[Mail, Sequence[Item]]]) -> Iterator[Envelope]:
        """The mails of a batch, made as they are asked for."""
        for mail in tuple(batch.left.values()):
            if self._stopping.is_set():
                return
            if mail.number not in batch.left:
                continue
            if made := self._made(batch, mail):
                items, envelope = made
                under_way.append((mail, items))
                yield envelope
            else:
                batch.left.pop(mail.number, None)

    def _made(self, batch: _Batch, mail: Mail) -> tuple[Sequence[Item], Envelope] | None:
        """The mail as it goes out; None: it does not. Never raises: another mail may be under way."""
        items: Sequence[Item] = ()
        try:
            items = self._outbox.load(mail)
            if items and mail.recipients:
                return items, self._owner.render(mail, items)
            if self._claim(batch, mail):
                self._settle(mail, {})  # all of it was dropped meanwhile, or everybody has it
                with self._lock:
                    self._hold_until = 0.0  # the server was not asked
        except Damaged as error:
            log.error("%s: %s; it counts as failed", self._outbox.path, error)
            with self._stumbling():
                self._outbox.quarantine(error.seq)
        except (SpoolError, MemoryError) as error:  # about us, not about the mail
            self._complain(error)
            self._stopping.wait(TICK_S)
        except Exception as error:  # one that cannot be composed must not stop the others
            if len(items) > 1 and self._sorted_out(mail, items):
                return None
            log.exception("a mail cannot be composed; it counts as failed")
            poison = Outcome(Verdict.REFUSED, 0, f"cannot be composed: {type(error).__name__}", "compose")
            self._settle(mail, dict.fromkeys(mail.recipients, poison))
        return None

    def _sorted_out(self, mail: Mail, items: Sequence[Item]) -> bool:
        """Fail those that cannot be composed alone; if there are any, the mail is due again without them."""
        found = False
        for item in items:
            try:
                self._owner.render(mail, [item])
            except MemoryError:
                return True
            except Exception as error:
                log.exception("%s cannot be composed; it counts as failed", item.id)
                with self._stumbling():
                    self._outbox.quarantine(item.seq, f"cannot be composed: {type(error).__name__}")
                    found = True
        return found

    def _conclude(self, batch: _Batch, mail: Mail, items: Sequence[Item], outcomes: Mapping[str, Outcome]) -> bool:
        """Settle and tell what became of a mail; False: everything waits."""
        ours = [outcome for outcome in outcomes.values() if outcome.ours]
        if len(ours) < len(outcomes):
            self._settle(mail, outcomes)
            self._tell(batch, items, outcomes)
        if ours:
            self._hold_back(ours[0])
        else:
            self._release()
        return not ours

    def _settle(self, mail: Mail, outcomes: Mapping[str, Outcome]) -> None:
        now = self._clock()
        after = conclude(mail, outcomes, now, backoff(mail.tries, self._first, self._most), self._max_age)
        if not self._outbox.settle(after, now):
            self._insist_on_flush()
        if after.state == FAILED and self._owner.limit:
            with self._lock:
                self._wake = 0.0  # its place in the budget is free

    def _insist_on_flush(self) -> None:
        """What was sent must be written down before anything else, or it is sent twice."""
        while True:
            try:
                return self._outbox.flush()
            except SpoolError as error:
                if self._stopping.is_set():
                    return
                log.error("%s", error)
                self._stopping.wait(TICK_S)

    def _tell(self, batch: _Batch, items: Sequence[Item], outcomes: Mapping[str, Outcome]) -> None:
        """Trouble is said at once, what was sent together with the rest of its batch."""
        what = items[0].id if len(items) == 1 else f"{len(items)} items"
        for name, outcome in outcomes.items():
            if outcome.verdict is Verdict.SENT:
                batch.sent.setdefault(name, []).append(what)
            else:
                log.warning("%s to %s: %s (%s)", what, name, outcome, outcome.verdict.value)

    def _write_down(self, batch: _Batch) -> None:
        self._insist_on_flush()
        for name, sent in batch.sent.items():
            for at in range(0, len(sent), TOLD):
                log.info("sent %s to %s", ", ".join(sent[at : at + TOLD]), name)
        batch.sent.clear()

    # what is about us holds everything

    def _pause(self) -> float:
        """Seconds until the next look whether a hold is over. A server that is away may be back any minute."""
        away = self._hold is not None and self._hold.code == 0
        return backoff(self._hold_tries, self._first, min(PROBE_MAX_S, self._most) if away else self._most)

    def _hold_back(self, outcome: Outcome) -> None:
        """Everything waits, no tries are burned, and the log says loudly, once, what to do."""
        with self._lock:
            same = self._hold is not None and (self._hold.step, self._hold.code) == (outcome.step, outcome.code)
            self._hold_tries = self._hold_tries + 1 if same else 0
            self._hold, self._held_at_open = outcome, False
            pause = self._pause()
            self._hold_until = time.monotonic() + pause
            self._most_at_once = 1
            self._replan()
        say = log.debug if same else log.error
        say("all mail waits; %s. %s Next try in %.0f s", outcome, self._advise(outcome), pause)

    def _release(self) -> None:
        self._succeeded = time.monotonic()
        if self._hold is not None:
            with self._lock:
                self._hold, self._held_at_open, self._hold_tries, self._hold_until = None, False, 0, 0.0
            log.info("the mail server is back")

    # the keeper

    def tick(self) -> None:
        """Twice a second: requests of the command line, housekeeping, the remark for `queue`."""
        if self._requests():
            with self._lock:
                self._hold_until, self._hold_tries = 0.0, 0
                self._hold_marks.clear()  # what waits again has a new life
                self._replan()
            self.ring()
        hold = self._hold
        if time.monotonic() - self._kept_house >= min(HOUSEKEEPING_S, self._max_age / 8):
            self._kept_house = time.monotonic()
            self._keep_house(hold)
        self._remark(hold)

    def _keep_house(self, hold: Outcome | None) -> None:
        now = self._clock()
        while self._outbox.prune(now) and not self._stopping.is_set():
            pass
        with self._lock:
            for began in (self._history.lanes, self._history.kinds):
                for name in [name for name, when in began.items() if when < now - self._owner.window]:
                    del began[name]
        if hold is None:
            return self._hold_marks.clear()
        self._hold_marks.append((time.monotonic(), self._outbox.newest()))
        born = time.monotonic() - self._max_age  # by a clock that does not jump
        while self._hold_marks and self._hold_marks[0][0] < born:
            age = f"{self._max_age / 3600:.0f} h" if self._max_age >= 7200 else f"{self._max_age:.0f} s"
            why = f"given up after {age}; last: {hold}"
            if number := self._outbox.expire(self._hold_marks.popleft()[1], why):
                log.error("%d alerts have failed: %s", number, why)
                self._remarked = None

    def _requests(self) -> int:
        """Carry out what the command line asks for; the number of requests. All are answered in one file, so that
        nothing grows where nobody waits any more."""
        spool = self._outbox.path
        paths = sorted(spool.parent.glob(f"{glob.escape(spool.name)}.request-*[0-9]"))
        done: dict[str, int] = {}
        for path in paths:
            try:
                what, name = json.loads(path.read_text("utf-8"))
                done[path.suffix] = number = self._outbox.retry(name) if what == "retry" else self._outbox.drop(name)
                log.info("%s %s: %d alerts", what, name, number)
            except (ValueError, TypeError, OSError) as error:
                log.error("%s: not a request: %s", path, error)
        if done:
            with contextlib.suppress(OSError):
                Path(f"{spool}.answer").write_text(json.dumps(done), "ascii")
        for path in paths:
            path.unlink(missing_ok=True)
        return len(paths)

    def _remark(self, hold: Outcome | None) -> None:
        """Leave for `queue` what is held, why and until when; only when that has changed."""
        with self._lock:
            if hold:
                until = self._clock() + max(0.0, self._hold_until - time.monotonic())
                mark: object = (str(hold), self._hold_until)
                remark = {"all": True, "why": str(hold), "until": until, "upto": 0}
            else:
                mark = (self._why, self._wake, self._seen) if self._why and self._wake < math.inf else None
                remark = {"why": self._why, "until": self._wake, "upto": self._seen} if mark else {}
        if mark != self._remarked:
            lanes = {lane: self._owner.recipients(lane) for lane in self._outbox.lanes()}
            self._outbox.note(hold=remark, lanes=lanes)
            self._remarked = mark


def keep_buffers() -> None:
    """Have malloc keep buffers as large as pictures: glibc maps anew what is larger than all that was ever freed."""
    bytes(8 << 20)


def notify(state: str) -> None:
    """Tell systemd (Type=notify) READY=1 or STOPPING=1; without systemd nothing happens. See sd_notify(3)."""
    if path := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode("ascii"), f"\0{path[1:]}" if path.startswith("@") else path)


# ───────────────────────────────────────────── Sending one mail ─────────────────────────────────────


class SendError(Exception):
    """A mail was not sent, or not to everybody; `outcomes` says what became of each recipient."""

    def __init__(self, outcomes: Mapping[str, Outcome], sentence: str = "") -> None:
        failed = [f"{n}: {outcome}" for n, outcome in outcomes.items() if outcome.verdict is not Verdict.SENT]
        super().__init__(". ".join(filter(None, ("; ".join(failed), sentence))))
        self.outcomes = dict(outcomes)


def send_email(  # noqa: PLR0917  people call it with what they need, by place
    subject: str,
    body: str,
    to_addrs: str | Sequence[str],
    from_addr: str | None = None,
    attachment_filename: str | None = None,
    attachment_bytes: bytes | None = None,
    *,
    html: str = "",
    cc: Sequence[str] = (),
    attachments: Sequence[Attachment] = (),
    headers: Mapping[str, str] | None = None,
    config: SMTPConfig | None = None,
) -> None:
    """Send one mail, now, with the configuration of the environment (and ./.env).

    Returns when the server has taken it for every recipient. Raises ConfigError, ValueError (an address is
    wrong) or SendError.
    """
    config = config or SMTPConfig.from_settings(Settings.load())
    to = addresses(to_addrs if isinstance(to_addrs, str) else ",".join(to_addrs))
    copies = addresses(",".join(cc)) if cc else ()
    if attachment_bytes is not None:
        attachments = [*attachments, attached(attachment_filename or "attachment", attachment_bytes)]
    sender = from_addr or config.sender
    data = compose_pieces(
        subject=subject, sender=sender, to=to, cc=copies, text=body, html=html, attachments=attachments, headers=headers
    )
    send_now(Envelope(address(sender), tuple(dict.fromkeys((*to, *copies))), data), config)


def attached(name: str, data: bytes) -> Attachment:
    """An attachment whose type is guessed by its name."""
    return Attachment(name, mimetypes.guess_type(name)[0] or "application/octet-stream", data)


def send_now(envelope: Envelope, config: SMTPConfig) -> None:
    """One transaction over a connection of its own. Raises SendError."""
    with contextlib.closing(SMTPTransport(config)) as transport:
        (outcomes,) = transport.deliver([envelope])
    wrong = [outcome for outcome in outcomes.values() if outcome.verdict is not Verdict.SENT]
    if wrong:
        raise SendError(outcomes, advice(wrong[0], config.host))


# ───────────────────────────────────────────── Command line ─────────────────────────────────────────


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """The sysexits code for what became of the recipients: what is about us wins, then what may be tried again."""
    codes = [EX_OK]
    for outcome in outcomes:
        if outcome.code in (530, 534, 535) or (outcome.step == "login" and 500 <= outcome.code < 600):
            codes.append(EX_NOPERM)
        elif outcome.verdict is Verdict.REFUSED or 500 <= outcome.code < 600:
            codes.append(EX_UNAVAILABLE)
        elif outcome.verdict is Verdict.TRY_LATER:
            codes.append(EX_TEMPFAIL)
    return max(codes)  # their numbers happen to rise as they matter


def fail(code: int, sentence: str) -> NoReturn:
    """End the program: one sentence on standard error, and its exit code."""
    print(f"{Path(sys.argv[0]).name}: {printable(sentence, 1000)}", file=sys.stderr)
    raise SystemExit(code)


def _configured(args: argparse.Namespace) -> SMTPConfig:
    settings = Settings.load(env_file=args.env_file)
    settings.tell_misspelled()
    config = SMTPConfig.from_settings(settings)
    return replace(config, trace=_trace) if args.trace else config


def _trace(line: str) -> None:
    with contextlib.suppress(OSError):  # a reader that has gone (`2>&1 | head`) stops no mail
        print(printable(line, 2000), file=sys.stderr, flush=True)


def _read_bytes(path: str) -> bytes:
    """A file's content, or that of standard input, which is empty where it is closed."""
    try:
        if path == "-":
            return sys.stdin.buffer.read() if sys.stdin else b""
        return Path(path).read_bytes()
    except OSError as error:
        fail(EX_DATAERR, f"{path}: cannot be read: {error.strerror}")


def command_send(args: argparse.Namespace) -> int:
    """`send`: one mail from the command line."""
    send_email(
        args.subject,
        _read_bytes("-").decode("utf-8", "replace") if args.body == "-" else args.body,
        args.to,
        args.sender,
        html=_read_bytes(args.html).decode("utf-8", "replace") if args.html else "",
        cc=args.cc,
        attachments=[attached(Path(path).name, _read_bytes(path)) for path in args.attach],
        config=_configured(args),
    )
    return EX_OK


def command_check(args: argparse.Namespace) -> int:
    """`check`: every step on the way to the mail server, and what to do about the one that failed."""
    config = _configured(args)
    recipient = address(args.to) if args.to else ""
    if config.debug:
        print(
            f"SMTP_HOST is not set: mail goes to the debug receiver on {DEBUG_HOST}:{config.port}, without TLS or login"
        )
    transport = SMTPTransport(config, lambda step, words: print(f"ok    {step:<10} {printable(words)}", flush=True))
    try:
        outcome = transport.verify(recipient)
    except Unavailable as error:
        outcome = error.outcome
    transport.close()
    if outcome.verdict is Verdict.SENT:
        print("all is well" + ("" if recipient else "; --to ADDRESS asks about a recipient too"))
    else:
        step = {"mail": "sender", "rcpt": "recipient"}.get(outcome.step, outcome.step)
        print(f"FAIL  {step:<10} {outcome.said}")
        if sentence := advice(outcome, config.host):
            print(f"      {sentence}")
    return exit_code([outcome])


def _spool(args: argparse.Namespace) -> Path:
    return Path(args.spool or Settings.load(env_file=args.env_file).read("ALERT_SPOOL", str, "spool/alerts.db"))


def command_queue(args: argparse.Namespace) -> int:
    """`queue`: what waits, is held or failed."""
    rows = read_queue(_spool(args))
    if args.json:
        print(json.dumps([{key: row[key] for key in row if key != "lane"} for row in rows]))
        return EX_OK
    for row in rows:
        to = ", ".join(row["recipients"]) or "whom the routes say"
        print(f"{row['state']:<8} {row['id']}  {printable(row['lane'])}  since {row['since']}  to {to}")
        if row["next"] or row["error"]:
            due = f"next try {row['next']}" if row["next"] else "no more tries"
            print(f"         tries {row['tries']}, {due}  {printable(row['error'] or '')}".rstrip())
    states = [row["state"] for row in rows]
    sums = ", ".join(f"{states.count(state)} {state}" for state in ("waiting", "held", "failed"))
    print(sums if rows else "nothing waits")
    return EX_OK


def command_change(args: argparse.Namespace) -> int:
    """`retry` and `drop`: the running owner does it within a second; without one it is done here."""
    path = _spool(args)
    if all(row["id"] != args.id for row in read_queue(path)) and args.id != "all":
        fail(EX_DATAERR, f"{args.id}: no such alert waits or has failed; `queue` lists them")
    try:
        with contextlib.closing(Outbox(path)) as outbox:
            number = outbox.retry(args.id) if args.command == "retry" else outbox.drop(args.id)
    except SpoolBusy:
        try:
            number = _request(path, args.command, args.id)
        except OSError as error:
            fail(EX_TEMPFAIL, f"the request cannot be left beside {path}: {error.strerror}")
    print(f"{args.command}: {number}")
    return EX_OK


def _request(path: Path, what: str, name: str) -> int:
    """Leave a request beside the spool, and wait until its owner has carried it out; how many alerts it was."""
    request, answer = Path(f"{path}.request-{time.time_ns()}"), Path(f"{path}.answer")
    draft = Path(f"{request}.tmp")
    draft.write_text(json.dumps([what, name]), "ascii")
    draft.chmod(0o644)  # root may ask, and another user own the spool
    os.replace(draft, request)
    until = time.monotonic() + 5.0
    while request.exists():
        if time.monotonic() > until:
            fail(EX_TEMPFAIL, "the running program has not answered yet; the request stays")
        time.sleep(0.05)
    done = json.loads(answer.read_text("ascii") or "{}") if answer.exists() else {}
    if request.suffix not in done:
        fail(EX_TEMPFAIL, "the running program has not said that it is done; see its log, and `queue`")
    return int(done[request.suffix])


def _sendmail_flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sendmail", description="Send the mail on standard input.", allow_abbrev=False
    )
    parser.add_argument("-t", action="store_true", help="recipients from To, Cc and Bcc")
    parser.add_argument("-i", action="store_true", help="a line with a single dot does not end the mail")
    parser.add_argument("-f", metavar="FROM", help="envelope sender")
    parser.add_argument("-o", action="append", default=[], help="-oi is -i; others are taken and ignored")
    for ignored in ("-F", "-B", "-N", "-r"):
        parser.add_argument(ignored, help="taken and ignored")
    for ignored in ("-v", "-bm", "-em", "-ep", "-eq"):
        parser.add_argument(ignored, action="store_true", help="taken and ignored")
    parser.add_argument("--env-file", metavar="FILE")
    parser.add_argument("recipients", nargs="*", metavar="TO")
    return parser.parse_intermixed_args(argv)


def command_sendmail(argv: Sequence[str]) -> int:
    """`sendmail`: a whole mail on standard input, as cron, smartd and mdadm hand it over."""
    args = _sendmail_flags(argv)
    settings = Settings.load(env_file=args.env_file)
    config = SMTPConfig.from_settings(settings)
    raw = _read_bytes("-")
    if not args.i and "i" not in args.o:
        raw = re.split(rb"(?m)^\.\r?$", raw, maxsplit=1)[0]
    default: tuple[str, ...] = ("alerts@localhost",) if config.debug else ()
    owner = settings.read("ALERT_RECIPIENT", addresses, default)
    fields, body = split_fields(raw)
    names = [part.strip() for name in args.recipients for part in name.split(",") if part.strip()]
    if args.t:
        found = [value for name, value in fields if name.lower() in ("to", "cc", "bcc")]
        names += [plain for _, plain in email.utils.getaddresses(found) if plain]
    if not owner and any("@" not in name for name in names):
        raise ConfigError("ALERT_RECIPIENT: missing; it gets the mail for names without @, like root")
    to = tuple(dict.fromkeys(plain for name in names for plain in ([address(name)] if "@" in name else owner)))
    if not to:
        raise ValueError("no recipient: name one, or use -t with a To header")
    null = args.f is not None and args.f.strip("<> ") == ""
    sender = "" if null else address(args.f if args.f and "@" in args.f else config.sender)
    shown = "undisclosed-recipients:;" if args.t else header_addresses(to)
    data = completed(fields, body, shown, config.sender)
    send_now(Envelope(sender, to, data, eight_bit=not all(map(bytes.isascii, data))), config)
    return EX_OK


_FIELD = rb"([!-9;-~]+)[ \t]*:([^\r]*(?:\r\n[ \t][^\r]*)*)\r\n"  # RFC 5322 2.2


def split_fields(raw: bytes) -> tuple[list[tuple[str, str]], bytes]:
    """The header fields of a mail as a local program writes it, unfolded nowhere, and its body; lines end in CRLF."""
    raw = re.sub(rb"\AFrom [^\r\n]*\r?\n", b"", raw)  # the line that separates mails in a mailbox file
    raw = re.sub(rb"\r\n|\r|\n", b"\r\n", raw.replace(b"\0", b""))
    raw += b"" if raw.endswith(b"\r\n") else b"\r\n"
    head = re.match(b"(?:%s)*" % _FIELD, raw)
    assert head  # it matches nothing, too
    fields = [
        (name.decode(), value.strip().decode("utf-8", "surrogateescape")) for name, value in re.findall(_FIELD, head[0])
    ]
    return fields, raw[head.end() :].removeprefix(b"\r\n")


def completed(fields: Sequence[tuple[str, str]], body: bytes, to: str, sender: str) -> list[bytes]:
    """A mail with what it lacks: a sender with a domain, To, Date, Message-ID, a charset; Bcc is taken out."""
    shown = next((value for name, value in fields if name.lower() == "from"), "")
    writer, plain = email.utils.parseaddr(one_line(shown))
    wanted = {"To": to, "Date": email.utils.formatdate(localtime=True), "MIME-Version": "1.0"}
    wanted["Message-ID"] = email.utils.make_msgid(domain=hostname())
    unwanted = {"bcc"}
    if "@" not in plain:
        known = email.utils.formataddr((writer or plain, address(sender))) if writer or plain else sender
        wanted["From"] = header_address(known)
        unwanted.add("from")
    # Strict servers refuse a line of over 998 bytes (RFC 5322 2.1.1). Broken as by Postfix, but between letters.
    body = re.sub(rb"[^\r\n]{990}[\x80-\xbf]{0,3}+(?=[^\r\n]{4})", rb"\g<0>\r\n ", body)
    if not body.isascii():
        wanted |= {"Content-Type": "text/plain; charset=utf-8", "Content-Transfer-Encoding": "8bit"}
    fields = [field for field in fields if field[0].lower() not in unwanted]
    there = {name.lower() for name, _ in fields}
    fields += [(name, value) for name, value in wanted.items() if name.lower() not in there]
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields)
    return [lines.encode("utf-8", "surrogateescape"), b"\r\n", body]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="smtp_module.py", description="Send mail, check the configuration, look after the queue."
    )
    add_common_flags(parser, logs=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("sendmail", help="send the mail on standard input", add_help=False)

    def command(name: str, run: Callable[[argparse.Namespace], int], words: str) -> Callable[..., argparse.Action]:
        made = commands.add_parser(name, help=words)
        made.add_argument("--env-file", metavar="FILE", default=argparse.SUPPRESS)
        made.set_defaults(run=run)
        return made.add_argument

    send = command("send", command_send, "send one mail")
    send("--to", action="append", required=True, metavar="ADDRESS", help="may be given more than once")
    send("--cc", action="append", default=[], metavar="ADDRESS")
    send("--subject", required=True)
    send("--body", default="", metavar="TEXT", help="- reads standard input")
    send("--html", metavar="FILE")
    send("--attach", action="append", default=[], metavar="FILE")
    send("--from", dest="sender", metavar="ADDRESS")
    check = command("check", command_check, "try every step up to the mail server")
    check("--to", metavar="ADDRESS", help="ask about this recipient too; nothing is sent")
    for add in (send, check):
        add("--trace", action="store_true", help="show the dialogue, secrets masked")
    queue = command("queue", command_queue, "what waits, is held or failed")
    queue("--json", action="store_true", help="one array of objects")
    retry = command("retry", command_change, "send failed alerts again")
    drop = command("drop", command_change, "give alerts up")
    for add in (retry, drop):
        add("id", metavar="ID|all")
    for add in (queue, retry, drop):
        add("--spool", metavar="FILE", help="default: ALERT_SPOOL or spool/alerts.db")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name in any script, on a terminal in any encoding
    if Path(sys.argv[0]).name == "sendmail":
        argv.insert(0, "sendmail")
    try:
        if argv[:1] == ["sendmail"]:
            return command_sendmail(argv[1:])
        args = _parser().parse_args(argv)
        code = int(args.run(args))
        print(end="", flush=True)
        return code
    except BrokenPipeError:  # the reader has gone (`queue | head -1`); what it did not take is flushed at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EX_OK
    except ConfigError as error:
        fail(EX_CONFIG, str(error))
    except SendError as error:
        fail(exit_code(error.outcomes.values()), str(error))
    except (SpoolError, ValueError) as error:  # ValueError: an address is wrong
        fail(EX_DATAERR, str(error))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
