#!/usr/bin/env python3
"""smtp_module: everything about getting a mail out for certain.

    put(entry) --> waiting --plan--> deliveries, one a recipient --deliver--> sent
                      ^                     |  ^-- later --+                    |
                      +------ retry ----- failed                        entry finished

How a mail moves. Everything durable lies in one SQLite file: entries, their pictures, deliveries, and a few status
values for `queue`.

1. `put` stores entries, and returns when they are on disk. Threads that arrive meanwhile share the next commit.
2. The owner of the outbox plans: a pure function says which mails are due, and to whom. No plan is stored, so a changed
   configuration counts for what waits, too.
3. What is due becomes deliveries, in one commit: a message (one entry, or the entries of a digest) to one recipient
   each. From then on a delivery is the same message, whatever happens; its Message-ID is a function of its entries.
4. A delivery is one SMTP transaction with one recipient, and has one outcome: SENT, TRY_LATER or REFUSED.
5. Outcomes are written together, with the next commit: after 16 of them, after a second, or when nothing more is due.
6. An entry is finished when its last delivery has ended: failed if one of them failed, else sent.

What goes wrong pauses either all mail or one recipient. Trouble about us (the server cannot be reached, refuses the
login or the sender) pauses all mail; three failures in a row after that pause the recipient. While a pause lasts, one
delivery at a time finds out whether it is over. A delivery fails for good only when its time is over and the server has
accepted another one since its first failure, so nothing fails while nothing gets through.

The promise: what `put` has returned for is delivered, or `queue` shows it as failed. A kill or a power cut repeats at
most the outcomes that were not written and the two deliveries that a sender has in hand, with the same Message-ID.

As a library, `send_email` sends one mail with the configuration of the environment. As a program:

    python3 smtp_module.py send --to you@example.com --subject Hello --body -
    python3 smtp_module.py check --send
    python3 smtp_module.py queue | retry ID|all | drop ID|all
    python3 smtp_module.py sendmail [-t] [-i] [-f FROM] [TO...]

This file knows nothing of events, cameras or devices.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
import datetime as dt
import difflib
import email.charset
import email.header
import email.message
import email.policy
import email.utils
import encodings.idna  # a lazy import fails when file descriptors have run out
import enum
import errno
import functools
import glob
import hashlib
import hmac
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
import select
import shutil
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import textwrap
import threading
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape as escape_markup
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
SMALL_MAIL_BYTES = 10_000  # a server that refuses a MAIL with this SIZE does not do so because of the size
PIECE_BYTES = 76 * 1000  # Base64 is cut in pieces of a thousand lines: a larger buffer may have to be mapped

DAY_S = 86400.0
LONGEST_S = 20 * DAY_S  # a socket cannot wait longer than 24 days
MEMORY_S = 7 * DAY_S  # the deduplication window: how long the ids of what has ended are remembered
PAGE_BYTES = 8192  # of the database
COMMIT_MAX_BYTES = 16 << 20  # what threads put together
CHECKPOINT_BYTES = 4 << 20  # the write-ahead log is copied into the database when it is longer
VACUUM_MIN_BYTES = 64 << 20  # more unused room than this is given back at the start
CHECKED_MAX_BYTES = 256 << 20  # a larger spool is not read through at every start
DISK_RESERVE_BYTES = 16 << 20  # nothing new is accepted when less is free: outcomes must be written, too
BUSY_S = 5  # what another program does with the database is waited for
PAGE_ROWS = 40  # read at once; what a plan does not use is read again

FILL = 16  # deliveries that are created at once, if each has one recipient
UNWRITTEN_MAX, UNWRITTEN_S = 16, 1.0  # outcomes are written when they are so many, or so old
JOIN_AFTER_S = 0.25  # another sender joins when no delivery has gone for so long
KEEP_OPEN_S = 30.0  # a connection is kept so long after its last mail
FAILURES_TO_PAUSE, SUCCESSES_TO_FORGET = 3, 10
LOGIN_PAUSE_S = 60.0  # the first pause after a refused login: providers lock accounts that try too often
PROBE_MAX_S = 60.0  # a server that does not answer is tried at least this often: a router comes back unannounced
REFUSED_PAUSE_S = 300.0  # a refused delivery is not tried sooner
UNANSWERED_PAUSE_S = 3600.0  # nor is one whose final dot was twice not answered: the server may have it
STRIP_AFTER_S = 3600.0  # pictures are left out of what is deferred at or after DATA for so long
TICK_S = 0.5  # requests of the command line are noticed within this
HOUSEKEEPING_S = 60.0
CLOCK_STEP_S = 60.0  # a clock that moves by more against the monotonic one was set
LOG_LINES_MAX, LOG_END_S = 10_000, 0.5  # lines that wait to be written; how long the end of the program waits for them

T = TypeVar("T")
log = logging.getLogger("mail")


# ───────────────────────────────────────────── Settings ─────────────────────────────────────────────
# Flags win over the environment, the environment over .env.

SETTINGS = tuple(  # of all the programs, for one .env may serve them all
    """
    ALERT_COOLDOWN ALERT_DAILY_MAX ALERT_EXPECT ALERT_HOST ALERT_IDLE_TIMEOUT ALERT_LANG ALERT_MAX_AGE
    ALERT_CAFILE ALERT_CERT ALERT_KEY ALERT_MAX_CONNECTIONS ALERT_MAX_LINE ALERT_PORT ALERT_PRIORITY ALERT_QUIET
    ALERT_RECIPIENT ALERT_REFUSED_AFTER ALERT_RETRY_FIRST ALERT_RETRY_MAX ALERT_ROUTES ALERT_SENDERS ALERT_SPOOL
    ALERT_SPOOL_MAX ALERT_SUMMARY_AT ALERT_TLS ALERT_TLS_CERT ALERT_TLS_CLIENT_CA ALERT_TLS_KEY ALERT_TOKEN
    SMTP_AUTH SMTP_CAFILE SMTP_EHLO SMTP_ENVELOPE_FROM SMTP_FROM SMTP_HOST SMTP_PASS SMTP_PASS_COMMAND SMTP_PASS_FILE
    SMTP_PORT SMTP_SECURITY SMTP_TIMEOUT SMTP_USER SMTP_USE_TLS
    DEVICE_ADDRESS DEVICE_ALLOW DEVICE_HOST DEVICE_MAX_MAIL DEVICE_OPERATORS DEVICE_PASS DEVICE_PORT DEVICE_READONLY
    DEVICE_REPORT_TO DEVICE_SECRET DEVICE_STATE DEVICE_TIMEOUT DEVICE_TLS_CERT DEVICE_TLS_KEY DEVICE_USER
    """.split()  # noqa: SIM905  a name a line would be a page
)
SECRETS = ("ALERT_TOKEN", "DEVICE_PASS", "DEVICE_SECRET", "SMTP_PASS")


class ConfigError(Exception):
    """A setting is wrong. The text names the variable, what is wrong and what is right, and no secret."""


class Settings:
    """The merged settings; `read` converts one by name."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(values)

    @classmethod
    def load(cls, flags: Mapping[str, object] | None = None, env_file: str | None = None) -> Settings:
        """Merge `.env` (or `env_file`, which must then exist), the environment and the flags that are not None."""
        for name in SETTINGS:
            if re.fullmatch(r"""(["'])(?:(?!\1).)*\1""", os.environ.get(name, "").strip(), re.DOTALL):
                log.warning("%s: take away the quotes, which count as part of the value (Docker keeps them)", name)
        given = {name: str(value) for name, value in (flags or {}).items() if value is not None}
        return cls({**read_env_file(env_file), **os.environ, **given})

    def read(self, name: str, convert: Callable[[str], T], default: T) -> T:
        """The converted value, or `default` where the variable is absent or empty. Raises ConfigError."""
        text = self.secret(name).strip()
        try:
            return convert(text) if text else default
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None

    def secret(self, name: str) -> str:
        """The value of a password or key: its blanks count, a byte order mark and line ends do not. "" where absent.

        Whoever makes a secret with `echo` or an editor of Windows puts these around it, and nobody types them.
        """
        return self._values.get(name, "").removeprefix("\ufeff").rstrip("\r\n")

    def tell_misspelled(self) -> None:
        """Warn of each name that looks like a setting and is none: it would be ignored in silence."""
        for name in sorted(self._values.keys() - set(SETTINGS)):
            if name.upper().startswith(("ALERT_", "SMTP_", "SMPT_", "DEVICE_")):
                near = difflib.get_close_matches(name.upper(), SETTINGS, 1, 0.81)
                hint = f"did you mean {near[0]}?" if near else "README.md lists them all"
                log.warning("%s is no setting and has no effect; %s", name, hint)


def read_env_file(path: str | None) -> dict[str, str]:
    """The settings in a file: `KEY=value` lines with `#` comments and an optional `export`.

    Without `path` it is ./.env, which may be missing. Raises ConfigError, which shows no value.
    """
    name = path or ".env"
    try:
        with open(name, encoding="utf-8-sig") as file:
            status = os.fstat(file.fileno())
            text = file.read()
    except FileNotFoundError:
        if path is None:
            return {}
        raise ConfigError(f"--env-file: there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "save it as UTF-8"
        raise ConfigError(f"{name}: cannot be read: {why}") from None
    posix = os.name == "posix"
    if posix and path is None and (status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o002):
        # An SMTP_PASS_COMMAND in it would run as this user.
        raise ConfigError(
            ".env: belongs to another user, or everybody may write to it, so it is not read unasked;"
            " make it yours with chown and chmod 600, or name it with --env-file"
        )
    values: dict[str, str] = {}
    for number, raw in enumerate(text.split("\n"), 1):
        line = re.sub(r"^export\s+", "", raw.strip())
        key, equals, value = (part.strip() for part in line.partition("="))
        try:
            if line and not line.startswith("#"):
                if not equals or len(key.split()) != 1:
                    raise ValueError("not KEY=value")
                values[key] = _env_value(value)
        except ValueError as error:
            raise ConfigError(f"{name} line {number}: {error}") from None
    if posix and status.st_mode & 0o004 and any(map(values.get, SECRETS)):
        log.warning("%s holds a password, and every user of this machine can read it: chmod 600 %s", name, name)
    return values


_SHELL_PIECE = re.compile(r"""'([^']*)'|"((?:[^"\\]|\\.)*)"|\\(.)|([^\s'"\\])""")


def _env_value(text: str) -> str:
    """The value of a line without its comment; one that begins with a quote as a POSIX shell reads one word.

    A dollar sign stands for itself. The module shlex does not fit: it keeps a backslash before a dollar sign in double
    quotes, which a shell takes away (POSIX.1-2017, Shell Command Language, 2.2.3). Raises ValueError.
    """
    if not text.startswith(("'", '"')):
        return re.split(r"(?:^|\s)#", text, maxsplit=1)[0].rstrip()
    value, at = "", 0
    while piece := _SHELL_PIECE.match(text, at):
        single, double, escaped, plain = piece.groups("")
        value += single + re.sub(r"""\\([$`"\\])""", r"\1", double) + escaped + plain
        at = piece.end()
    if not re.fullmatch(r"(\s+#.*)?", text[at:]):
        raise ValueError("a value in quotes must end with its quote; only a # comment may follow")
    return value


def duration(text: str) -> float:
    """`90`, `.5`, `5m`, `1h`, `5d` -> seconds."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?|\.\d{1,6})\s*([smhd]?)", text.strip(), re.ASCII | re.IGNORECASE)
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


def one_of(*words: str) -> Callable[[str], str]:
    """A converter for one of some words, in any case."""

    def convert(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(f"'{printable(text)}' is unknown; write one of {', '.join(words)}")
        return text.lower()

    return convert


def ascii_domain(name: str) -> str:
    """A host or mail domain in ASCII, by IDNA 2003 as Python has it; what is no domain stays as it is.

    IDNA 2008 keeps four letters that 2003 changes or drops (RFC 5894 section 7.2), and so means another domain, whose
    owner may be somebody else. Registries and mail programs follow 2008; such a name must be given in its ASCII form.
    Raises ValueError.
    """
    if re.search("[\u00df\u1e9e\u03c2\u200c\u200d]", name):  # sharp s, small and capital; final sigma; joiners
        # Letter by letter: the lower case of a whole word would make a final sigma of another letter.
        lower = unicodedata.normalize("NFKC", "".join(map(str.lower, name)))
        labels = encodings.idna.dots.split(lower)
        right = ".".join(x if x.isascii() else f"xn--{x.encode('punycode').decode('ascii')}" for x in labels)
        raise ValueError(f"'{printable(name)}' means different domains in IDNA 2003 and 2008; write {right} (2008)")
    try:
        return name if name.isascii() else name.encode("idna").decode("ascii")
    except UnicodeError:
        return name


def host_name(text: str) -> str:
    """A name or an address, without the brackets that an IPv6 address may have, and without a dot at its end.

    A name with that dot stands neither in certificates nor in /etc/hosts.
    """
    host = ascii_domain(text[1:-1] if text.startswith("[") and text.endswith("]") else text.removesuffix("."))
    if not re.fullmatch(r"[A-Za-z0-9_.:%-]{1,255}", host) or host.count(":") == 1:
        raise ValueError(f"'{printable(text)}' is not a host; give a name or an IPv4 or IPv6 address, without a port")
    return host


def ehlo_name(text: str) -> str:
    """What EHLO says: a domain, or an address literal (RFC 5321 section 4.1.3); a bare address gets its brackets."""
    try:
        ip = ipaddress.ip_address(text.removeprefix("[").removesuffix("]").removeprefix("IPv6:"))
        name = f"[{'IPv6:' * (ip.version == 6)}{ip}]"
    except ValueError:
        name = ascii_domain(text)
    label = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    if len(name) > 255 or not re.fullmatch(rf"{label}(?:\.{label})*|\[[IPv0-9A-Fa-f.:]+\]", name):
        raise ValueError(f"'{printable(text)}' is no name for EHLO; write mail.example.com or [192.0.2.1]")
    return name


_ADDRESS = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,64}@(?:[A-Za-z0-9_.-]{1,255}|\[[0-9A-Fa-f.:]+\])", re.ASCII)


def address(text: str) -> str:
    """One mail address, its domain in ASCII. The pattern lets nothing through that could end a command."""
    match = re.fullmatch(r"[^<>]*<([^<>]+)>|([^<>]+)", text.strip())
    local, _, domain = (match[1] or match[2] if match else "").strip().rpartition("@")
    plain = f"{local}@{ascii_domain(domain)}"
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
        levels = ["debug", "info", "warning", "error"]
        parser.add_argument("--log-level", default="info", type=str.lower, choices=levels)


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
    return UNPRINTABLE.sub(lambda m: m[0].encode("unicode_escape").decode("ascii"), shown)


class OneLine(logging.Formatter):
    """A record is one line, whatever a peer put into it."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), limit=4000)


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
        with contextlib.suppress(Exception):  # an error in a log line must not cost anything
            line = self.format(record)
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


def start_logging(level: str = "info") -> None:
    """Log to standard error, one line a record."""
    logging.raiseExceptions = False  # an error in a log line must not cost anything
    handler: logging.Handler = logging.NullHandler()  # where standard error is closed
    if sys.stderr:
        try:
            number = sys.stderr.fileno()
            # A second stream, because Python at its end would wait for a thread that is stuck in a write to sys.stderr.
            handler = BackgroundHandler(
                os.fdopen(number, "w", encoding=sys.stderr.encoding, errors="backslashreplace", closefd=False)
            )
        except io.UnsupportedOperation:  # it is caught in memory
            handler = logging.StreamHandler()
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


_THOUSAND_LINES = struct.Struct("76s" * 1000)


def wrap_base64(text: bytes) -> list[bytes]:
    """Base64 in lines of 76 characters (RFC 2045 6.8), as pieces of whole lines, each ended by CRLF."""
    whole_pieces = len(text) - len(text) % PIECE_BYTES
    pieces = [b"\r\n".join((*_THOUSAND_LINES.unpack_from(text, at), b"")) for at in range(0, whole_pieces, PIECE_BYTES)]
    rest = [text[at : at + 76] for at in range(whole_pieces, len(text), 76)]
    return [*pieces, b"\r\n".join((*rest, b""))] if rest else pieces


def one_line(text: str) -> str:
    """Header text: no controls, no line breaks of any kind, no lone surrogates (CVE-2024-6923 and its like)."""
    return UNPRINTABLE.sub(" ", text).strip()


PLAIN_WORDS = re.compile(r"(?:(?:(?!=\?)[!-~]){1,900}(?: +|$))*")  # these need no encoding
# Encoded words in quoted-printable (RFC 2047): a word in Base64 ends with padding unless its bytes are a multiple of
# three, and programs that use GMime drop what follows a padded word.
UTF8_WORDS = email.charset.Charset("utf-8")
UTF8_WORDS.header_encoding = email.charset.QP


def is_fit(data: bytes) -> bool:
    """ASCII, and no line longer than 998 bytes (RFC 5322 section 2.1.1)? Then any server can carry it as it is."""
    return data.isascii() and max(map(len, data.split(b"\r\n"))) <= 998


@functools.lru_cache(maxsize=1024)
def header_text(name: str, value: str) -> str:
    """An unstructured header's value, encoded and folded where that is needed.

    What is plain at its beginning stays so, for programs that look at a Subject without decoding it.
    """
    value = one_line(value)
    plain = PLAIN_WORDS.match(value)[0].rstrip(" ")  # type: ignore[index]  # it matches nothing, too
    rest = value[len(plain) + 1 :] if plain else value
    if not rest and len(plain) < 900:
        return plain
    header = email.header.Header(plain, maxlinelen=75, header_name=name)
    if rest:
        header.append(rest, UTF8_WORDS)
    return header.encode(linesep="\r\n")


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
    words = email.header.Header(name, UTF8_WORDS, 75, "Reply-To").encode(linesep="\r\n")
    return f"{words}\r\n <{plain}>"


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
def _domain(sender: str) -> str:
    domain = email.utils.parseaddr(sender)[1].rpartition("@")[2]
    return re.sub(r"[^A-Za-z0-9.-]", "", domain) or "localhost"


def content_id(key: str, sender: str) -> str:
    """The Content-ID of a shown picture (RFC 2392), a function of `key`: mail programs keep pictures by it."""
    return f"{hashlib.sha256(key.encode('utf-8', 'replace')).hexdigest()[:40]}@{_domain(sender)}"


def message_id(key: str, sender: str) -> str:
    """A Message-ID that is a function of `key`, so that a mail sent twice is recognisably the same."""
    return f"<{content_id(key, sender)}>"


def _text_part(subtype: str, text: str) -> list[bytes]:
    data = re.sub("\r\n|\r|\n", "\r\n", text).encode("utf-8", "replace")
    data = data if data.endswith(b"\r\n") else data + b"\r\n"
    plain = is_fit(data) and b"\0" not in data
    head = f"Content-Type: text/{subtype}; charset=utf-8\r\nContent-Transfer-Encoding: "
    head += "7bit\r\n\r\n" if plain else "base64\r\n\r\n"
    return [head.encode("ascii"), *([data] if plain else wrap_base64(base64.b64encode(data)))]


def _file_part(part: Attachment) -> list[bytes]:
    cid = f"Content-ID: <{part.cid}>\r\n" if part.cid else ""
    head = (
        f"Content-Type: {part.content_type}; {_file_name('name', part.filename)}\r\n"
        f"Content-Transfer-Encoding: base64\r\n{cid}"
        f"Content-Disposition: attachment; {_file_name('filename', part.filename)}\r\n\r\n"
    )
    return [head.encode("ascii"), *wrap_base64(base64.b64encode(part.data) if part.base64 is None else part.base64)]


def _multipart(subtype: bytes, parts: Sequence[list[bytes]]) -> list[bytes]:
    if len(parts) == 1:
        return parts[0]
    boundary = b"=_%b" % os.urandom(12).hex().encode("ascii")  # nobody can foresee it and write it into a part
    pieces = [b'Content-Type: multipart/%b;\r\n boundary="%b"\r\n\r\n' % (subtype, boundary)]
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
    body = _multipart(b"alternative", alternatives)
    related = _multipart(b'related; type="multipart/alternative"', [body, *shown])  # RFC 2387 3.1 asks for the type
    lines = [
        f"Date: {email.utils.formatdate(date, localtime=True)}",
        f"From: {header_address(sender)}",
        f"To: {header_addresses(to) or 'undisclosed-recipients:;'}",
        *([f"Cc: {header_addresses(cc)}"] if cc else []),
        f"Subject: {header_text('Subject', subject)}",
        f"Message-ID: {message_id or email.utils.make_msgid(domain=_domain(sender))}",
        *(f"{name}: {header_text(name, value)}" for name, value in (headers or {}).items()),
        "MIME-Version: 1.0\r\n",
    ]
    return ["\r\n".join(lines).encode("ascii", "replace"), *_multipart(b"mixed", [related, *others])]


# The page of a mail. A Page is plain values; `draw_text` and `draw_html` draw it, so that all mails look alike. Nothing
# in a value is ever markup, and each value stands in a <bdi>, so that a right-to-left name cannot reorder its line.
# Outlook shows nothing but tables and inline styles; the style sheet is for dark and for narrow screens.

RED, BLUE, GREEN = "#b3261e", "#1f4e79", "#2e6b3f"  # behind white letters; red ones say what went wrong
GREY = "#5f6b76"  # letters of what matters less
RIGHT_TO_LEFT = ("fa",)
COLUMNS = {1: (100,), 2: (31, 69), 3: (32, 34, 34), 4: (20, 26, 26, 28)}  # widths in percent by their number
LONG_TITLE = 60  # a longer line of a title is written smaller
# Digits after right-to-left letters are turned round at each hyphen unless a left-to-right mark stands before them.
RTL_LABEL = re.compile(r"^[\u0590-\u08ff][^:\n]*: (?=[-+0-9])", re.MULTILINE)
HIDDEN = re.compile(f"{UNPRINTABLE.pattern}(?<!\n)")
RTL_BEFORE_TIME = re.compile(r"[\u0590-\u08ff]:? (?=\d{4}-\d\d-\d\d|\d\d:\d\d:\d\d)")
STYLE = """<style>:root{color-scheme:light dark;supported-color-schemes:light dark}
@media (prefers-color-scheme:dark){.back{background:#0f1419!important}
.page{background:#1a2129!important;color:#e5eaef!important}.page td{border-color:#36424e!important}
.soft{color:#a5b2be!important}.bad{color:#ff9a8f!important}.page .link{color:#8cc2f2!important}
.button{background:#26333f!important;border-color:#4a5a69!important;color:#d5e6f5!important}.rest{background:#36424e}}
@media (max-width:480px){.stack tr{display:block;padding:6px 0;border-top:1px solid #8a97a3}
.stack td{display:block;width:auto!important;padding:1px 6px!important;border:0!important}}</style>"""


class Sentence(NamedTuple):
    """Words to be read, as plain text and as HTML. `bad`: they are about something that went wrong."""

    text: str
    html: str
    bad: bool = False


class Bar(NamedTuple):
    """A cell with a bar below its text, filled from 0 to 1."""

    text: str
    level: float


class Link(NamedTuple):
    """A cell that is a link to itself."""

    text: str


class Table(NamedTuple):
    """Rows of one to four cells; the last cell of a row that is shorter than the first row is wider. `separator`
    stands between the cells in plain text."""

    rows: Sequence[tuple[str | Bar | Link, ...]]
    heading: str = ""
    separator: str = ": "


class Picture(NamedTuple):
    """A picture in the page, whose file has a Content-ID, and what it shows in words."""

    caption: str
    file: Attachment


class Button(NamedTuple):
    """A link that looks like a button."""

    label: str
    url: str


@dataclass
class Page:
    """What a mail shows to its reader, in the order in which it is drawn.

    The first line of `title` says what happened, the others where and when.
    """

    title: Sequence[str]
    lang: str = "en"
    colour: str = BLUE
    pictures: list[Picture] = field(default_factory=list)  # the first one over the whole width
    sentences: Sequence[Sentence] = ()
    buttons: Sequence[Button] = ()  # in the HTML alone
    tables: Sequence[Table] = ()
    notes: list[Sentence] = field(default_factory=list)


def sentence(template: str, values: Mapping[str, object], *, bad: bool = False) -> Sentence:
    """The template with each `{name}` replaced by a value, which may hold anything."""
    text = template.format_map(values)
    if text.isascii():  # all of it runs from left to right
        return Sentence(text, f"<bdi>{escape(text)}</bdi>", bad)
    drawn = {name: f"<bdi>{escape(str(value))}</bdi>" for name, value in values.items()}
    return Sentence(text, escape_markup(template).format_map(drawn), bad)


def compose_page(page: Page, *, text: str = "", files: Sequence[Attachment] = (), **parts: Any) -> list[bytes]:
    """The mail that shows a page, with its pictures and with other files.

    `text` stands for the page where no HTML is shown, by default all of it; `parts` are those of `compose_pieces`.
    """
    shown = [picture.file for picture in page.pictures]
    text = text or draw_text(page)
    return compose_pieces(text=text, html=draw_html(page), attachments=[*shown, *files], **parts)


def draw_text(page: Page) -> str:
    """The plain text of a page."""
    parts = ["\n".join(page.title), "\n".join([one.text for one in page.sentences])]
    parts += ["\n".join([_text_row(row, table.separator) for row in table.rows]) for table in page.tables]
    text = clean("\n\n".join(filter(None, [*parts, *[note.text for note in page.notes]]))) + "\n"
    return RTL_LABEL.sub("\\g<0>\u200e", text)


def _text_row(row: Sequence[str | Bar | Link], separator: str) -> str:
    return separator.join([cell if isinstance(cell, str) else cell.text for cell in row]).replace("\n", "\n  ")


def draw_html(page: Page) -> str:
    """The HTML of a page."""
    direction, side = ("rtl", "right") if page.lang in RIGHT_TO_LEFT else ("ltr", "left")
    what, *more = map(escape, page.title)
    size = 17 if len(page.title[0]) > LONG_TITLE else 22
    subtitle = "".join([f'<div style="font-size:17px;line-height:1.4"><bdi>{line}</bdi></div>\n' for line in more])
    buttons = "".join([_button(*button) for button in page.buttons])
    return f"""<!DOCTYPE html>
<html lang="{page.lang}" dir="{direction}"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">
{STYLE}</head>
<body class="back" style="margin:0;padding:0;background:#eef1f4">
<table class="page" role="presentation" dir="{direction}" align="center" width="640" cellpadding="0" cellspacing="0"
 style="width:100%;max-width:640px;margin:0 auto;table-layout:fixed;background:#ffffff;color:#1c2733;text-align:{side};
font-family:-apple-system,'Segoe UI',Roboto,Tahoma,'Noto Sans',Arial,sans-serif;
overflow-wrap:anywhere;word-break:break-word">
<tr><td bgcolor="{page.colour}" style="padding:14px 16px;background:{page.colour};color:#ffffff">
<div style="font-size:{size}px;line-height:1.3;font-weight:bold"><bdi>{what}</bdi></div>
{subtitle}</td></tr>
{_picture_rows(page.pictures)}<tr><td style="padding:10px 10px 16px">
{"".join(map(_paragraph, page.sentences))}{buttons}
{"".join([_html_table(table) for table in page.tables])}{"".join([_paragraph(note, True) for note in page.notes])}\
</td></tr></table></body></html>
"""


def _picture_rows(pictures: Sequence[Picture]) -> str:
    """The first over the whole width, the others side by side below it; where there are several, with captions."""
    drawn = ""
    for row in filter(None, (pictures[:1], pictures[1:])):
        drawn += '<tr><td><table role="presentation" width="100%" cellpadding="0" cellspacing="0"><tr>\n'
        for caption, file in row:
            words = escape(caption)
            drawn += f"""<td width="{100 // len(row)}%" style="vertical-align:top">
<img src="cid:{file.cid}" alt="{words}" width="{640 // len(row)}" style="display:block;width:100%;height:auto;border:0">
"""
            if len(pictures) > 1:
                style = f"padding:3px 6px;font-size:13px;color:{GREY}"
                drawn += f'<div class="soft" style="{style}"><bdi>{words}</bdi></div>'
            drawn += "</td>"
        drawn += "</tr></table></td></tr>\n"
    return drawn


def _paragraph(words: Sentence, note: bool = False) -> str:
    name, colour = ("bad", RED) if words.bad else ("soft", GREY) if note else ("", "inherit")
    style = f"margin:6px 6px 10px;font-size:{13 if note else 15}px;line-height:1.5;color:{colour}"
    return f'<p class="{name}" style="{style}">{words.html}</p>\n'


def _button(label: str, url: str) -> str:
    style = "display:inline-block;margin:0 0 8px 6px;padding:10px 14px;border:1px solid #b9cbd9;background:#e8eff5;"
    style += "color:#1f3a52;font-size:15px;font-weight:bold;text-decoration:none"
    return f'<a class="button" href="{escape_markup(url)}" style="{style}">{escape(label)}</a>\n'


def _html_table(table: Table) -> str:
    style = f"margin:14px 6px 4px;font-size:13px;font-weight:bold;color:{GREY}"
    heading = f'<p class="soft" style="{style}"><bdi>{escape(table.heading)}</bdi></p>\n' if table.heading else ""
    columns = len(table.rows[0]) if table.rows else 1
    name = "stack" if columns > 3 else ""
    return f"""{heading}<table class="{name}" width="100%" cellpadding="0" cellspacing="0"
 style="table-layout:fixed;font-size:15px;line-height:1.4">
{"".join([_html_row(row, columns) for row in table.rows])}</table>
"""


@functools.lru_cache(maxsize=256)  # most rows of a mail stood in the one before it, too
def _html_row(row: tuple[str | Bar | Link, ...], columns: int) -> str:
    drawn, name, colour = "", "soft", GREY
    line = "border-top:1px solid #e3e8ec" if row[0] else "border:0"  # without a first cell it belongs to the row above
    for number, cell in enumerate(row):
        text = escape(cell if isinstance(cell, str) else cell.text)
        inside = f"<bdi>{text}</bdi>"
        if isinstance(cell, Link):
            inside = f'<bdi><a class="link" href="{text}" style="color:{BLUE}">{text}</a></bdi>'
        elif isinstance(cell, Bar):
            inside += _bar(cell.level)
        last = number == len(row) - 1
        width = sum(COLUMNS[columns][number:]) if last else COLUMNS[columns][number]
        span = f' colspan="{columns - number}"' if last and columns > len(row) else ""
        style = f"padding:5px 6px;{line};vertical-align:top;color:{colour}"
        drawn += f'<td class="{name}"{span} width="{width}%" style="{style}">{inside}</td>'
        name, colour = "", "inherit"
    return f"<tr>{drawn}</tr>\n"


def _bar(level: float) -> str:
    filled, cells = round(100 * min(1.0, max(0.0, level))), ""
    for name, width, colour in (("", filled, "#2f7fb8"), ("rest", 100 - filled, "#dfe6ec")):
        style = f'width="{width}%" bgcolor="{colour}" style="height:8px;line-height:8px;font-size:1px"'
        cells += f'<td class="{name}" {style}>&nbsp;</td>' if width else ""
    return f'<table role="presentation" width="100%" cellpadding="0" cellspacing="0"><tr>{cells}</tr></table>'


def escape(text: str) -> str:
    """What stands in a <bdi>: no markup, and each line with a direction of its own."""
    return escape_markup(clean(text)).replace("\n", "</bdi><br><bdi>")


def clean(text: str) -> str:
    """Line breaks stay; what hides or reorders text does not."""
    return RTL_BEFORE_TIME.sub("\\g<0>\u200e", HIDDEN.sub(" ", text))


# ───────────────────────────────────────────── Outcome ──────────────────────────────────────────────
# Whatever happens to a delivery ends in one of three verdicts. They are decided here and acted on in the courier.


class Verdict(enum.Enum):
    """What became of a delivery."""

    SENT = "sent"
    TRY_LATER = "try later"
    REFUSED = "refused"


@dataclass(frozen=True)
class Outcome:
    """A verdict with the server's code (0: it gave none) and its words.

    `step` is where it happened: resolve connect tls greeting ehlo login mail rcpt data dot.
    `about_us`: the trouble is about this machine, its account or the server, not about one mail or recipient.
    `too_big`: a smaller mail may be accepted, one of up to `size_limit` bytes if the server has named a limit.
    """

    verdict: Verdict
    code: int = 0
    detail: str = ""
    step: str = ""
    about_us: bool = False
    too_big: bool = False
    size_limit: int = 0

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


class ReplyError(Exception):
    """A reply that ends the dialogue: a refusal on the way in, a 421, or something that is no reply (code -1)."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code} {text}")
        self.code, self.text = code, text


STEPS_BEFORE_MAIL = frozenset({"resolve", "connect", "tls", "greeting", "ehlo", "login"})
STEPS_ABOUT_US = STEPS_BEFORE_MAIL | {"mail"}
HUNG_UP = (ConnectionError, ssl.SSLEOFError)  # a write over TLS reports the end of the connection as SSLEOFError


def judge(step: str, code: int, text: str) -> Outcome:
    """The verdict for a reply at a step. Anything that is not a clear yes or no is TRY_LATER."""
    if 200 <= code < 400:
        return _accepted(step, code)
    detail = printable(" ".join(text.split()))
    enhanced = re.match(r"[245]\.\d{1,3}\.\d{1,3}\b", detail)
    status = enhanced[0] if enhanced else ""
    if code == 552 and step == "rcpt" and not status:  # old servers mean "too many recipients" (RFC 5321 4.5.3.1.10)
        return Outcome(Verdict.TRY_LATER, code, detail, step)
    if status == "5.3.4" or (code == 552 and status != "5.2.2"):
        return Outcome(Verdict.REFUSED, code, detail, step, too_big=True)
    about_us = step in STEPS_ABOUT_US or code in (530, 534, 535) or status == "5.4.5"
    refused = 500 <= code < 600 and not about_us
    return Outcome(Verdict.REFUSED if refused else Verdict.TRY_LATER, max(code, 0), detail, step, about_us)


@functools.lru_cache(maxsize=64)
def _accepted(step: str, code: int) -> Outcome:
    return Outcome(Verdict.SENT, code, "", step)


def judge_error(step: str, error: Exception) -> Outcome:
    """The verdict for an exception at a step: TRY_LATER, with words that a person understands."""
    if isinstance(error, ReplyError):
        return judge(step, error.code, error.text)
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
    return Outcome(Verdict.TRY_LATER, 0, printable(detail), step, about_us=step in STEPS_ABOUT_US)


# What a person can do about a failure: (step and host, what was said) -> a sentence. The first row that fits is shown.
# Both are regular expressions; an empty one fits everything. Where the cause is not known, no row fits.
_TRANSACTION = "mail|rcpt|data|dot"
ADVICE = (
    # the way to the server
    ("resolve", "",
     "The name in SMTP_HOST was not found: check its spelling, this machine's network, and whether its DNS answers."),
    (r"connect (localhost|127\.|::1)", "refused",
     "Nothing listens there. For a test, start: python3 embedded_smtpd.py --debug"),
    ("connect", "refused",
     "Nothing listens on that port: check SMTP_HOST and SMTP_PORT."),
    ("connect", "timed out",
     "Nobody answers. Providers often block port 25: use 587 or 465."),
    ("connect", "unreachable|no route",
     "This machine has no way to the server: check its network."),
    ("greeting", "timed out",
     "The server did not greet in time: on port 465 it waits for TLS (SMTP_SECURITY=ssl); a slow one needs a longer"
     " SMTP_TIMEOUT."),
    # TLS
    ("tls", "not yet valid",
     "The certificate is not valid yet, so this machine's clock is probably wrong: set it."),
    ("tls", "expired",
     "The server's certificate has expired; its owner must renew it (or this machine's clock is wrong)."),
    ("tls", "mismatch|doesn't match|not valid for",
     "The certificate is for another name: set SMTP_HOST to the name that stands in it."),
    ("tls", "(key|md|algorithm).too.(weak|small)",
     "The key or signature of the server's certificate is too weak; its owner must make a new one (RSA of 2048 bits or"
     " more, SHA-256)."),
    ("tls", "self.signed|issuer",
     "Nobody whom this machine trusts has signed the certificate: install the system's certificates (package"
     " ca-certificates), or name a file with the signer's certificate in SMTP_CAFILE."),
    ("tls", "protocol.version|unsupported.protocol|no.protocols|version.too.low|handshake.failure|legacy",
     "The server speaks only an old form of TLS that is not safe any more; its owner must update it."),
    ("tls", "wrong.version|record.layer|unexpected.message|starttls is not offered",
     "The server does not speak TLS in this way on this port: use port 587 with SMTP_SECURITY=starttls, or"
     " 465 with ssl."),
    # EHLO and login
    (f"ehlo|{_TRANSACTION}",
     r"(helo|ehlo)\b.{0,50}(reject|denied|invalid|qualified|argument)|(invalid|bad|wrong).{0,20}(helo|ehlo)|\(ehlo\)",
     "The server does not accept the name in EHLO: set SMTP_EHLO to a full name of this machine, like"
     " relay.example.com."),
    ("", r"^538|must issue a starttls|encryption required|before starttls",
     "The server takes a login only over TLS: set SMTP_SECURITY=starttls (or leave it on auto)."),
    ("", "concurrent|too many (failed )?(login|auth|connections|sessions)",
     "The server allows fewer connections or logins at a time: set ALERT_SENDERS=1, and see what else uses the"
     " account."),
    ("login", r"\b5\.7\.139\b|basic auth|offers.*(xoauth2|oauthbearer)",
     "The server takes no passwords, only access tokens: set SMTP_AUTH=xoauth2 and put a token in SMTP_PASS"
     " (SMTP_PASS_COMMAND can fetch it)."),
    ("login", "offers.*(ntlm|gssapi)",
     "The server takes only Windows logins (NTLM, GSSAPI), which are not supported here: its owner must allow PLAIN or"
     " LOGIN over TLS."),
    ("login", "^504|unrecogni[sz]ed auth|not supported|no suitable|offers none|not advertised",
     "The server offers no such login here: leave SMTP_AUTH on auto and use port 587 or 465, or leave"
     " SMTP_USER empty."),
    ("login", r"^534|\b5\.7\.(9|14)\b|username and password not accepted",  # the last are Gmail's words
     "The provider wants an app password in SMTP_PASS, not the account's own: turn on 2-step verification, then make"
     " one in the account's security settings (Gmail: Google account, Security, App passwords)."),
    ("login", "^5",
     "The server refused the login: check SMTP_USER and SMTP_PASS (Gmail and others want an app password)."),
    ("login", "smtp_pass_command",
     "The password could not be fetched: run the command by hand, as the user of this program."),
    # limits
    (_TRANSACTION, r"\b5\.3\.4\b|too (big|large)|(size|length).{0,40}exceeds",
     "The mail is too big for the server."),
    (_TRANSACTION, r"\b[45]\.2\.2\b|over ?quota|mailbox.{0,20}full",
     "The recipient's mailbox is full."),
    ("", r"\b5\.4\.5\b|\b5\.7\.233\b|\b[45]\.5\.3\b|(limit|quota) (exceeded|reached)|rate limit"
     "|exceed(ed|s) .{0,40}(limit|max|quota|threshold)|too many (messages|e?mails|recipients)|per (minute|hour|day)"
     "|receiving mail (at a rate|too)",
     "The limit on the number of mails is reached, of the account or of the mailbox; ALERT_DAILY_MAX and ALERT_COOLDOWN"
     " make fewer mails."),
    # who may send to whom
    ("", "^530|not logged in|authentication (is )?required|must authenticate"
     r"|relay(ing)? (access )?(is )?(denied|disallowed(?! as)|not (allowed|permitted)|prohibited)"
     r"|(unable|not permitted) to relay|\b5\.7\.54\b|rcpthosts",
     "The server takes this mail only after a login: set SMTP_USER and SMTP_PASS, on port 587 or 465."),
    (_TRANSACTION, r"not owned|disallowed as|sender.{0,40}(reject|not allowed|denied|refused)|send ?as\b"
     "|not (allowed|authori[sz]ed|permitted) to send|from address.{0,40} not|(equal|match|same as) .{0,12}auth"
     "|address is not verified",
     "The account may not send from this address: set SMTP_FROM to an address of the account, or SMTP_ENVELOPE_FROM,"
     " where only the envelope matters."),
    (f"greeting|ehlo|{_TRANSACTION}", r"spamhaus|\b(dns|r)bl\b|(block|black) ?list|blocked using",
     "This machine's address is on a list of senders of spam, as those of homes are: send through your provider's"
     " server with a login (port 587 or 465)."),
    ("data|dot", "spam|unsolicited|virus|malware|phish|content.{0,40}(block|reject|denied|security)",
     "The server holds the content for spam or a danger: tell the mailbox or its owner that these mails are wanted."),
    ("rcpt", r"\b5\.1\.[0-36]\b|(unknown|invalid|no such) (user|recipient|mailbox)|not exist"
     "|(user|recipient|mailbox).{0,30}(unknown|not found|unavailable|reject|invalid|disabled)",
     "The server does not take mail for this recipient: check the address."),
    ("greeting|ehlo", "^5",
     "The server turns this machine away: port 25 of a provider is for servers; use 587 or 465 with a login."),
    # what passes by itself
    ("", "^4",
     "The server wants to be asked again later; the relay does so by itself."),
    (f"tls|ehlo|login|{_TRANSACTION}", "timed out",
     "The server did not answer in time; the relay tries again by itself, and a slow server needs a longer"
     " SMTP_TIMEOUT."),
)  # fmt: skip


def advice(outcome: Outcome, host: str) -> str:
    """One sentence on what to do, or "". Addresses in what the server said are not looked at."""
    said = re.sub(r"<[^>]*@[^>]*>|\S*@\S*", "", outcome.said)
    for where, what, sentence in ADVICE:
        if re.match(where, f"{outcome.step} {host}", re.I) and re.search(what, said, re.I):
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
    auth: str = "auto"  # auto, plain, login, cram-md5 or xoauth2
    ehlo: str = ""  # "" is this machine's name where it has a dot, else its address in brackets
    sender: str = "alerts@localhost"
    envelope_from: str = ""  # takes the place of every envelope sender, for providers that take the account's alone
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
            password=lambda: _password(settings, host),
            auth=settings.read("SMTP_AUTH", one_of("auto", "plain", "login", "cram-md5", "xoauth2"), "auto"),
            ehlo=settings.read("SMTP_EHLO", ehlo_name, ""),
            envelope_from=settings.read("SMTP_ENVELOPE_FROM", address, ""),
            sender=settings.read("SMTP_FROM", _sender, _default_sender(user)),
            cafile=settings.read("SMTP_CAFILE", str, ""),
            timeout_s=settings.read("SMTP_TIMEOUT", duration, TIMEOUT_S),
            debug=not host,
        )
        if not 0 < config.timeout_s <= DAY_S:
            raise ConfigError("SMTP_TIMEOUT: must be more than 0 and not more than 1d; 30 (seconds) is usual")
        if user and config.security == "none" and not is_loopback(config.host):
            raise ConfigError(f"SMTP_SECURITY: none sends the password in the clear to {host}; use starttls or ssl")
        config.tls()  # raises where SMTP_CAFILE cannot be used
        if user and (settings.secret("SMTP_PASS").strip() or not settings.secret("SMTP_PASS_COMMAND").strip()):
            config.password()  # A wrong file is found at the start. A command may need a network that comes later.
        return config

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
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host.lower() == "localhost"
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def _security(settings: Settings, host: str, number: int) -> str:
    chosen = settings.read("SMTP_SECURITY", one_of("ssl", "starttls", "none", "auto"), "auto")
    use_tls = settings.read("SMTP_USE_TLS", one_of("true", "false", "yes", "no", "on", "off", "1", "0"), "true")
    if chosen != "auto":
        return chosen
    if use_tls in ("false", "no", "off", "0"):
        return "none"
    return "ssl" if number == SUBMISSIONS_PORT else "none" if is_loopback(host) else "starttls"


def _password(settings: Settings, host: str) -> str:
    """SMTP_PASS, or the first line of SMTP_PASS_FILE or of what SMTP_PASS_COMMAND prints. Raises ConfigError."""
    password = settings.secret("SMTP_PASS")
    if not password.strip():
        password = _fetched_password(settings)
    if re.search(r"(^|\.)(gmail|googlemail|google)\.com$", host, re.I):
        password = re.sub(r"\s", "", password)  # Google shows app passwords in four groups
    return password


def _fetched_password(settings: Settings) -> str:
    path, command = settings.secret("SMTP_PASS_FILE").strip(), settings.secret("SMTP_PASS_COMMAND").strip()
    if not path and not command:
        raise ConfigError("SMTP_PASS: missing for SMTP_USER; set it, SMTP_PASS_FILE or SMTP_PASS_COMMAND")
    try:
        if path:
            fetched = Path(path).read_bytes()
        else:  # Its standard input is empty, for that of this program may be the mail to be sent.
            fetched = subprocess.run(
                command, shell=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=True
            ).stdout
        if line := fetched.decode("utf-8-sig").partition("\n")[0].rstrip("\r"):
            return line
        why = "the first line is empty"
    except UnicodeDecodeError:
        why = "it is not UTF-8"
    except subprocess.CalledProcessError as error:  # its text may show what was read
        why = f"exit code {error.returncode}"
    except (OSError, subprocess.SubprocessError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
    raise ConfigError(f"{f'SMTP_PASS_FILE: {path}' if path else 'SMTP_PASS_COMMAND'}: gives no password ({why})")


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


START_RETRY_S = 2.0


def when_possible(start: Callable[[], T], stopping: socket.socket, setting: str) -> T | None:
    """What `start` returns, once it does not raise what heals itself after a machine has booted.

    That is an address that DHCP has not given yet, a name that no name server tells yet, and a folder on a disk that
    is mounted later. Logged once, with the name of the setting. None when `stopping` becomes readable meanwhile; any
    other error is raised.
    """
    waiting = False
    while True:
        try:
            return start()
        except (OSError, SpoolError) as error:
            cause = error.__cause__ or error
            later = isinstance(cause, socket.gaierror | FileNotFoundError)
            if not later and getattr(cause, "errno", 0) != errno.EADDRNOTAVAIL:
                raise
            if not waiting:
                log.warning("cannot start yet: %s: %s; trying again until it works", setting, error)
            waiting = True
        if select.select([stopping], [], [], START_RETRY_S)[0]:
            return None


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


# ───────────────────────────────────────────── SMTP client ──────────────────────────────────────────
# Written by hand: every reply is bounded in size, and in time from the first wait to its last byte, which smtplib's
# are not. One transaction has one recipient, and so one outcome.


class Message(NamedTuple):
    """A mail as it goes out. `sender` is the envelope's ("" is the null sender), `data` 7-bit text in pieces of whole
    lines, `about` what the log calls it."""

    sender: str
    data: Sequence[bytes]
    about: str = ""


class PreparedMessage:
    """A message to one recipient, ready for the wire: dot-stuffed, its length known."""

    def __init__(self, message: Message, recipient: str) -> None:
        self.message, self.sender, self.recipient = message, message.sender, recipient
        small = sum(map(len, message.data)) < PIECE_BYTES
        self.pieces = dot_stuffed([b"".join(message.data)] if small else message.data)
        self.length = sum(map(len, self.pieces))


def dot_stuffed(pieces: Sequence[bytes]) -> list[bytes]:
    """RFC 5321 4.5.2: a line that begins with a dot gets another. The last line gets its end."""
    # Base64 has no dots, and looking for one byte is quick.
    stuffed = [piece.replace(b"\r\n.", b"\r\n..") if b"." in piece else piece for piece in pieces]
    stuffed = [b"." + piece if piece.startswith(b".") else piece for piece in stuffed]
    if not stuffed or not stuffed[-1].endswith(b"\r\n"):
        stuffed.append(b"\r\n")
    return stuffed


class Reply(NamedTuple):
    """A reply of the server; the lines of its text are joined by LF."""

    code: int
    text: str


class SMTPConnection:
    """One connection: commands out, replies in. Raises OSError (TimeoutError past a deadline) and ReplyError."""

    def __init__(self, sock: socket.socket, timeout_s: float, trace: Callable[[str], None] | None) -> None:
        self.sock, self._timeout_s, self._trace = sock, timeout_s, trace
        self.reply_timeout = timeout_s  # for one reply
        self.deadline = time.monotonic() + ATTEMPT_S  # for all replies, and for what is sent
        self.extensions: dict[str, str] = {}  # of EHLO, by their keywords in upper case
        self.needs_rset = False  # a transaction was left open: RSET comes first
        self.mails = 0  # that it has carried
        self._lines: deque[bytes] = deque()  # received whole
        self._rest = b""  # the beginning of the next line

    def start_tls(self, context: ssl.SSLContext, host: str) -> str:
        """Shake hands and verify the certificate; the version of TLS. What was received in the clear is forgotten
        (CVE-2011-0411)."""
        self._lines.clear()
        self._rest = b""
        self.sock.settimeout(self._timeout_s)
        self.sock = wrapped = context.wrap_socket(self.sock, server_hostname=host)
        return str(wrapped.version())

    def trace(self, line: str) -> None:
        """Show a line of the dialogue, if somebody wants to see it."""
        if self._trace:
            self._trace(line)

    def command(self, line: str, shown: str = "") -> Reply:
        """Send a command and wait for its reply; `shown` stands in the trace for a line that holds a secret."""
        self.write([self.line(line, shown)])
        return self.reply()

    def line(self, line: str, shown: str = "") -> bytes:
        """A command as it goes over the wire. Raises ValueError where it would be more than one."""
        if re.search(r"[\r\n\0]", line):
            raise ValueError("a command holds a line break")
        self.trace(f"C: {shown or line}")
        return f"{line}\r\n".encode("ascii", "strict")

    def write(self, pieces: Sequence[bytes]) -> None:
        """Send pieces; small ones as one packet."""
        if sum(map(len, pieces)) < PIECE_BYTES:
            pieces = [b"".join(pieces)]
        try:
            for piece in pieces:
                self.sock.settimeout(max(0.001, min(self._timeout_s, self.deadline - time.monotonic())))
                self.sock.sendall(piece)
        except HUNG_UP:  # A server that hangs up in the middle of a mail has often said why.
            self.reply_timeout = 1.0

    def reply(self) -> Reply:
        """One whole reply. What is no reply raises ReplyError, and so does 421, which ends a connection."""
        until = min(time.monotonic() + self.reply_timeout, self.deadline)
        texts: list[bytes] = []
        for _ in range(REPLY_MAX_LINES):
            while not self._lines:
                self._receive(until)
            line = self._lines.popleft()
            texts.append(line[4:].strip())
            if self._trace:
                self._trace(f"S: {line.decode('utf-8', 'replace').rstrip()}")
            if not line[:3].isdigit():
                raise ReplyError(-1, f"not an SMTP reply: {line[:80]!r}")
            if line[3:4] != b"-":
                code, text = int(line[:3]), b"\n".join(texts).decode("utf-8", "replace")
                if code == 421:
                    raise ReplyError(code, text)
                return Reply(code, text)
        raise ReplyError(-1, "a reply without end")

    def _receive(self, until: float) -> None:
        if (left := until - time.monotonic()) <= 0:
            raise TimeoutError
        self.sock.settimeout(left)
        chunk = self.sock.recv(8192)
        if not chunk:
            raise ConnectionResetError("closed")
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        self._lines.extend(lines)
        if len(self._rest) > REPLY_MAX_BYTES:
            raise ReplyError(-1, "a reply without end")

    def close(self) -> None:
        """Close the socket, without a word."""
        with contextlib.suppress(OSError):
            self.sock.close()


TROUBLE = (OSError, ReplyError, ValueError)  # all that a dialogue raises
ENVELOPE_STEPS = ("mail", "rcpt", "data")


class Transport(Protocol):
    """What a courier delivers through."""

    def open(self) -> None:
        """Connect, unless connected. Raises Unavailable."""

    def send(self, message: PreparedMessage, following: Callable[[], PreparedMessage | None]) -> Outcome:
        """Deliver one message. Trouble of network or server is an outcome, never raised. `following` may be called
        once, for the message that will be sent next."""

    def close(self) -> None:
        """End the connection politely, if there is one."""


class SMTPClient:
    """Delivers to the configured server, over one connection that is kept while there is work.

    What it learns of the server it keeps for the next connection: the address that greeted, the mechanism of AUTH that
    worked, and whether commands may be sent in groups (RFC 2920).
    """

    def __init__(self, config: SMTPConfig, report: Callable[[str, str], None] = lambda step, words: None) -> None:
        self._config, self._report = config, report
        self._connection: SMTPConnection | None = None
        self._step = ""  # how far the dialogue has come
        self._begun: PreparedMessage | None = None  # its commands went with the final dot of the one before
        self._lock_step = False  # a group of commands went wrong with this server
        self._grouped = self._out_of_step = False  # of the last attempt: see there
        self._good_address: Any = None
        self._good_mechanism = ""

    # opening a connection

    def open(self) -> None:
        """Connect and log in, unless connected. Raises Unavailable."""
        if self._connection is not None:
            return
        self._step = "resolve"
        try:
            self._connection = self._logged_in()
        except (*TROUBLE, ConfigError) as error:  # ConfigError: the password's file or command failed just now
            outcome = judge_error(self._step, error)
            raise Unavailable(replace(outcome, verdict=Verdict.TRY_LATER, about_us=True, too_big=False)) from None

    def _logged_in(self) -> SMTPConnection:
        """A connection on which mail can be sent. Where the server hangs up on one mechanism of AUTH, the next one is
        tried on a new connection."""
        refused: dict[str, Exception] = {}
        while True:
            connection = self._greeted()
            try:
                self._hello(connection)
                if self._config.security == "starttls":
                    self._start_tls(connection)
                    self._hello(connection)
                self._report("ehlo", " ".join(sorted(connection.extensions)) or "HELO")
                if not self._config.user or self._log_in(connection, refused):
                    return connection
            except BaseException:
                connection.close()
                raise
            connection.close()

    def _greeted(self) -> SMTPConnection:
        """A connection to the first address of the host that greets with 220; the one that did last time comes first.

        The addresses share the time for connecting, so that one that swallows packets does not cost the others'.
        """
        config = self._config
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        found = list(dict.fromkeys(found))
        found.sort(key=lambda info: info[4] != self._good_address)
        self._report("resolve", ", ".join(sorted({str(info[4][0]) for info in found})))
        trouble: Exception = OSError("the name has no address")
        step = "connect"
        for family, kind, protocol, _, where in found:
            self._step = "connect"
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(config.timeout_s / len(found))
                sock.connect(where)
                connection = SMTPConnection(sock, config.timeout_s, config.trace)
                self._greet(connection)
            except TROUBLE as error:
                sock.close()
                if not isinstance(trouble, ReplyError):  # a server's own words say the most
                    trouble, step = error, self._step
            except BaseException:
                sock.close()
                raise
            else:
                self._good_address = where
                return connection
        self._step = step
        raise trouble

    def _greet(self, connection: SMTPConnection) -> None:
        config, sock = self._config, connection.sock
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = sock.getpeername()[0]
        self._report("connect", f"{peer} port {config.port}")
        if config.user and config.security == "none" and not is_loopback(peer):
            raise OSError(f"the password would go in the clear to {peer}; use SMTP_SECURITY=starttls or ssl")
        if config.security == "ssl":
            self._shake_hands(connection)
        self._step = "greeting"
        greeting = connection.reply()
        if greeting.code != 220:
            raise ReplyError(*greeting)
        self._report("greeting", greeting.text)

    def _start_tls(self, connection: SMTPConnection) -> None:
        self._step = "tls"
        if "STARTTLS" not in connection.extensions:
            raise ssl.SSLError(1, "STARTTLS is not offered by the server")
        reply = connection.command("STARTTLS")
        if reply.code != 220:
            raise ReplyError(*reply)
        self._shake_hands(connection)

    def _shake_hands(self, connection: SMTPConnection) -> None:
        self._step = "tls"
        context = self._config.tls()
        assert context is not None
        version = connection.start_tls(context, self._config.host)
        self._report("tls", f"{version}, certificate valid for {self._config.host}")

    def _hello(self, connection: SMTPConnection) -> None:
        """EHLO, or HELO where that is unknown; notes the extensions."""
        self._step = "ehlo"
        here = connection.sock.getsockname()[0]
        literal = f"[{'IPv6:' * (':' in here)}{here.partition('%')[0]}]"
        name = self._config.ehlo or (hostname() if "." in hostname() else literal)
        connection.extensions = {}
        reply = connection.command(f"EHLO {name}")
        if reply.code == 250:
            for line in reply.text.split("\n")[1:]:
                keyword, _, parameters = line.replace("=", " ", 1).partition(" ")  # `AUTH=LOGIN` is an old spelling
                known = connection.extensions.get(keyword.upper(), "")
                connection.extensions[keyword.upper()] = f"{known} {parameters.upper()}".strip()
        elif (reply := connection.command(f"HELO {name}")).code != 250:
            raise ReplyError(*reply)

    # AUTH (RFC 4954)

    def _log_in(self, connection: SMTPConnection, refused: dict[str, Exception]) -> bool:
        """Log in with the first mechanism that works. False: the server hung up on one, and others are left to be
        tried on a new connection. Raises what the server said to the last one."""
        self._step = "login"
        user, password = self._config.user, self._config.password()
        wanted = [name for name in self._mechanisms(connection) if name not in refused]
        for mechanism in wanted:
            try:
                reply = self._authenticate(connection, mechanism, user, password)
            except (*HUNG_UP, ReplyError) as error:
                refused[mechanism] = error
                if mechanism == wanted[-1]:
                    raise
                return False
            if reply.code == 235:
                self._good_mechanism = mechanism
                self._report("login", f"{user} ({mechanism})")
                return True
            refused[mechanism] = ReplyError(*reply)
            wrong_password = reply.code in (534, 535) and mechanism != "CRAM-MD5"
            if wrong_password or not 500 <= reply.code < 600:  # Each further guess could lock the account.
                break
        raise list(refused.values())[-1]

    def _mechanisms(self, connection: SMTPConnection) -> list[str]:
        """Those to try, in order: what worked before, then the simplest. CRAM-MD5 comes last, because servers that
        store hashes of passwords offer it and cannot do it. Raises ReplyError where there are none."""
        if self._config.auth != "auto":
            return [self._config.auth.upper()]
        offered = connection.extensions.get("AUTH", "").split()
        known = [name for name in ("PLAIN", "LOGIN", "CRAM-MD5") if name in offered]
        if not known:
            none = "none before STARTTLS" if "STARTTLS" in connection.extensions else "none"
            raise ReplyError(-1, f"no suitable login: the server offers {' '.join(offered) or none}")
        return sorted(known, key=lambda name: name != self._good_mechanism)

    def _authenticate(self, connection: SMTPConnection, mechanism: str, user: str, password: str) -> Reply:
        """The last reply to one mechanism. PLAIN and XOAUTH2 send their answer with the command, unless the server
        refuses it there; LOGIN never does, because some servers ask for the name all the same."""
        whole = {"PLAIN": f"\0{user}\0{password}", "XOAUTH2": f"user={user}\1auth=Bearer {password}\1\1"}
        if mechanism in whole:
            initial = base64.b64encode(whole[mechanism].encode("utf-8", "surrogateescape")).decode("ascii")
            reply = connection.command(f"AUTH {mechanism} {initial}", f"AUTH {mechanism} ****")
            if reply.code == 334:  # XOAUTH2 tells with 334 why a token is refused; an empty answer ends it.
                return connection.command("")
            if not 500 <= reply.code <= 504:
                return reply
        reply = connection.command(f"AUTH {mechanism}")
        for number in range(2):
            if reply.code != 334:
                break
            challenge = base64.b64decode(reply.text)
            if mechanism == "CRAM-MD5":  # RFC 2195
                answer = f"{user} {hmac.new(password.encode('utf-8'), challenge, 'md5').hexdigest()}"
            else:
                answer = whole.get(mechanism) or (password if number or b"pass" in challenge.lower() else user)
            encoded = base64.b64encode(answer.encode("utf-8", "surrogateescape")).decode("ascii")
            reply = connection.command(encoded, "****")
        return reply

    # transactions

    def send(
        self, message: PreparedMessage, following: Callable[[], PreparedMessage | None] = lambda: None
    ) -> Outcome:
        """One transaction. The commands of the message that `following` gives go with the final dot of this one where
        the server offers PIPELINING (RFC 2920 3.1).

        It is begun again, once, where a kept connection has come to its end (some servers limit the mails of one by a
        4xx to MAIL), and in lock step where what was sent in a group went wrong.
        """
        if self._begun not in (None, message):  # The server waits for the content of another mail.
            self._drop()
        kept, begun = self._connection, self._begun is not None
        worn = kept is not None and kept.mails > 0
        outcome = self._attempt(message, following)
        if outcome.verdict is Verdict.SENT:
            return outcome
        at_mail = kept is not None and self._step == "mail" and not outcome.too_big
        again = at_mail and (worn or outcome.code in (0, 421))
        if self._out_of_step and (self._grouped if self._step == "dot" else begun):
            self._lock_step = True
            again = self._step != "dot" or outcome.code >= 500  # else the server may have the mail
        if again:
            self._drop()
            outcome = self._attempt(message, lambda: None)
        return outcome

    def _attempt(self, message: PreparedMessage, following: Callable[[], PreparedMessage | None]) -> Outcome:
        """One transaction. Notes whether the server is out of step with what it was sent: silence, nonsense, or a 5xx
        that is not about a recipient."""
        self._out_of_step = self._grouped = False
        try:
            self.open()
            self._step = "mail"
            if too_big := self._beyond_size(message):
                return too_big
            outcome = self._transaction(message, following)
            self._out_of_step = outcome.code >= 500 and (self._step, outcome.code // 10) != ("rcpt", 55)
        except Unavailable as error:
            return error.outcome
        except TROUBLE as error:
            outcome = judge_error(self._step, error)
            self._out_of_step = isinstance(error, TimeoutError) or (isinstance(error, ReplyError) and error.code != 421)
            self._drop()
        except BaseException:  # Replies may be under way that belong to nobody.
            self._drop()
            raise
        return outcome

    def _beyond_size(self, message: PreparedMessage) -> Outcome | None:
        """The refusal of a message that is larger than the server's SIZE (RFC 1870)."""
        assert self._connection is not None
        limit = self._connection.extensions.get("SIZE", "")
        if not limit.isdigit() or not 0 < int(limit[:18]) < message.length:
            return None
        outcome = judge("mail", 552, f"5.3.4 {message.length} bytes, the server takes {limit[:18]}")
        return replace(outcome, size_limit=int(limit[:18]))

    def _mail_command(self, sender: str, size: int) -> str:
        """MAIL. SMTP_ENVELOPE_FROM takes the place of every other sender, also of the null sender."""
        assert self._connection is not None
        parameter = f" SIZE={size}" if "SIZE" in self._connection.extensions else ""
        return f"MAIL FROM:<{self._config.envelope_from or sender}>{parameter}"

    def _envelope_commands(self, message: PreparedMessage) -> list[str]:
        return [self._mail_command(message.sender, message.length), f"RCPT TO:<{message.recipient}>", "DATA"]

    def _transaction(self, message: PreparedMessage, following: Callable[[], PreparedMessage | None]) -> Outcome:
        connection, begun = self._connection, self._begun is not None
        assert connection is not None
        self._begun = None
        connection.reply_timeout = self._config.timeout_s
        connection.deadline = time.monotonic() + ATTEMPT_S + message.length / SLOWEST_BYTES_S
        if connection.needs_rset:
            connection.command("RSET")
        connection.needs_rset = True
        for left, step, command in zip((2, 1, 0), ENVELOPE_STEPS, self._envelope_commands(message), strict=True):
            self._step = step
            reply = connection.reply() if begun else connection.command(command)
            if reply.code < 400 and reply.code // 100 != (3 if step == "data" else 2):
                raise ReplyError(-1, f"{reply.code} to {command[:4]}")
            if reply.code >= 400:
                outcome = judge(step, *reply)
                if begun:
                    self._read_rest(left)
                if step == "mail" and (reply.code < 500 or not begun):
                    return self._about_size(message, outcome)
                return outcome
        return self._content(message, following)

    def _read_rest(self, number: int) -> None:
        """Read the replies to the rest of a group. A server that hangs up after its no has said enough."""
        assert self._connection is not None
        try:
            for _ in range(number):
                if self._connection.reply().code == 354:  # It waits for a mail without recipients: this is its end.
                    self._connection.command(".")
        except TROUBLE:
            self._drop()

    def _about_size(self, message: PreparedMessage, outcome: Outcome) -> Outcome:
        """A MAIL that tells a SIZE was refused, in whatever words (Courier's are `534 SIZE=Message too big`). Whether
        that was about the size is found out by the MAIL of a small one."""
        if message.length <= SMALL_MAIL_BYTES:
            return outcome
        for _ in range(2):  # The server may have hung up.
            try:
                self.open()
                assert self._connection is not None
                command = self._mail_command(message.sender, SMALL_MAIL_BYTES)
                if not command.endswith(">") and self._connection.command(command).code == 250:
                    verdict = Verdict.REFUSED if outcome.code >= 500 else Verdict.TRY_LATER
                    return replace(outcome, verdict=verdict, about_us=False, too_big=verdict is Verdict.REFUSED)
                break
            except (Unavailable, *TROUBLE):
                self._drop()
        self._step = "mail"
        return outcome

    def _content(self, message: PreparedMessage, following: Callable[[], PreparedMessage | None]) -> Outcome:
        """The mail, the dot, and with it what begins the next transaction; the outcome of the dot."""
        connection = self._connection
        assert connection is not None
        connection.trace(f"C: ({message.length} bytes of mail, then the dot)")
        last = b".\r\n"
        may_group = "PIPELINING" in connection.extensions and not self._lock_step
        if may_group and (next_one := following()) and not self._beyond_size(next_one):
            self._begun, self._grouped = next_one, True
            last += b"".join(map(connection.line, self._envelope_commands(next_one)))
        self._step, connection.reply_timeout = "dot", FINAL_DOT_TIMEOUT_S
        connection.write([*message.pieces, last])
        connection.deadline = math.inf  # The answer to the dot has a time of its own.
        reply = connection.reply()
        if reply.code < 400 and reply.code // 100 != 2:
            raise ReplyError(-1, f"{reply.code} after the mail")
        connection.needs_rset = False
        connection.mails += 1
        return judge("dot", *reply)

    def verify(self, recipient: str) -> Outcome:
        """Would the server take a mail from us to this recipient? Nothing is sent. Raises Unavailable."""
        self.open()
        connection = self._connection
        assert connection is not None
        sender = self._config.envelope_from or address(self._config.sender)
        outcome = Outcome(Verdict.SENT)
        steps = [("mail", "sender", f"MAIL FROM:<{sender}>", sender)]
        steps += [("rcpt", "recipient", f"RCPT TO:<{recipient}>", recipient)]
        for self._step, name, command, words in steps:
            try:
                if connection.needs_rset and self._step == "mail":
                    connection.command("RSET")
                connection.needs_rset = True
                outcome = judge(self._step, *connection.command(command))
            except TROUBLE as error:
                self._drop()
                return judge_error(self._step, error)
            if outcome.verdict is not Verdict.SENT:
                break
            self._report(name, words)
        return outcome

    def close(self) -> None:
        """QUIT. Whatever the server makes of it changes nothing that it has accepted."""
        if self._connection is not None:
            if self._begun is None:
                self._connection.reply_timeout = min(2.0, self._config.timeout_s)
                self._connection.deadline = time.monotonic() + ATTEMPT_S
                with contextlib.suppress(*TROUBLE):
                    self._connection.command("QUIT")
            self._drop()

    def _drop(self) -> None:
        """Close the connection without a word."""
        if self._connection is not None:
            self._connection.close()
        self._connection = self._begun = None


# ───────────────────────────────────────────── Outbox ───────────────────────────────────────────────
# A durable queue in one SQLite file that does not know what it carries. One process owns a file, and one connection
# does every write and checkpoint (SQLite before 3.51.3 can corrupt a WAL file that two connections write). Beside the
# database lie SQLite's own files and the lock.
#
# An entry:     waiting --create--> sending --its last delivery has ended--> sent, or failed if one of them failed
#               failed --retry--> waiting            waiting, sending, failed --drop--> dropped
# A delivery:   open --finish--> sent, failed or dropped

SCHEMA_VERSION = 2
SCHEMA = """
CREATE TABLE IF NOT EXISTS entries(  -- what has ended keeps its id for the deduplication window, without its payload
  seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, source TEXT NOT NULL,
  arrived REAL NOT NULL, state TEXT NOT NULL DEFAULT 'waiting', finished_at REAL,
  open INTEGER NOT NULL DEFAULT 0,      -- deliveries of it that have not ended
  failed INTEGER NOT NULL DEFAULT 0,    -- deliveries of it that failed since it last waited
  served TEXT,                          -- recipients who have it, or have an open delivery of it, since a retry
  error TEXT, reported INTEGER NOT NULL DEFAULT 0,  -- why it was refused or failed; whether a mail has said so
  checksum BLOB NOT NULL, picture_checksum BLOB, payload BLOB);
CREATE INDEX IF NOT EXISTS entries_state ON entries(state);
CREATE INDEX IF NOT EXISTS entries_finished ON entries(finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS entries_unreported ON entries(seq) WHERE error IS NOT NULL AND reported = 0;
CREATE TABLE IF NOT EXISTS pictures(seq INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS deliveries(  -- one message to one recipient
  number INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, entries TEXT NOT NULL, recipient TEXT NOT NULL,
  recipients TEXT NOT NULL,             -- all of the message, for its To header
  created_at REAL NOT NULL, state TEXT NOT NULL DEFAULT 'open', finished_at REAL,
  next_try REAL NOT NULL, tries INTEGER NOT NULL DEFAULT 0, tried_at REAL NOT NULL DEFAULT 0,
  first_failed REAL,                    -- when its first try failed
  data_failures INTEGER NOT NULL DEFAULT 0,  -- at or after DATA, by a 5xx, a cut or silence
  max_bytes INTEGER,                    -- the mail may not be larger; 0: it goes without pictures
  error TEXT);
CREATE INDEX IF NOT EXISTS deliveries_open ON deliveries(next_try) WHERE state = 'open';
CREATE INDEX IF NOT EXISTS deliveries_finished ON deliveries(finished_at) WHERE finished_at IS NOT NULL;
CREATE TABLE IF NOT EXISTS status(name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
UNREPORTED = "error IS NOT NULL AND reported = 0 AND state IN ('waiting', 'sending', 'failed')"
SEQS = "seq IN (SELECT value FROM json_each(?))"
NO_ROOM = re.compile("is full|No space left|too large|quota exceeded")  # as SQLite and the system say it


class SpoolError(Exception):
    """The disk failed, or the file is damaged or gone; nothing was accepted."""


# No file can be made there, today or tomorrow: the cause of a SpoolError at the start that is about its setting.
WRONG_PLACE = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


class SpoolFull(SpoolError):
    """No room is left in the spool."""


class DiskFull(SpoolFull):
    """No room is left on the disk."""


class SpoolBusy(SpoolError):
    """Another process owns the file."""


class Damaged(Exception):
    """An entry does not match its checksum; `seq` says which."""

    def __init__(self, seq: int) -> None:
        super().__init__(f"entry {seq} is damaged")
        self.seq = seq


@dataclass(frozen=True)
class NewEntry:
    """Something to deliver. Its group, which an owner plans by, is its `kind` and its `source`: of an alert, the event
    and the camera. `unique`: its id was made just now, so that no duplicate is looked for."""

    id: str
    kind: str
    source: str
    payload: bytes
    picture: bytes | None = None
    arrived: float = field(default_factory=time.time)
    unique: bool = False


class PutResult(NamedTuple):
    """`new` is False for a duplicate; `id` differs from the wished one where that meant something else."""

    id: str
    new: bool


class PendingEntry(NamedTuple):
    """What a plan sees of an entry that waits. `served`: recipients who have it already."""

    seq: int
    id: str
    kind: str
    source: str
    arrived: float
    served: frozenset[str] = frozenset()


class Entry(NamedTuple):
    """An entry with its payload, for rendering. `picture()` loads the picture; None: there is none, or none that can be
    read any more."""

    seq: int
    id: str
    kind: str
    source: str
    arrived: float
    payload: bytes
    picture: Callable[[], bytes | None] = lambda: None
    has_picture: bool = False


class DueMessage(NamedTuple):
    """A mail that is due: which entries, to whom, and its owner's own word for what kind of mail it is. `groups` are
    those of its entries."""

    entries: tuple[int, ...]
    recipients: tuple[str, ...]
    kind: str = ""
    groups: tuple[tuple[str, str], ...] = ()


class Delivery(NamedTuple):
    """One message to one recipient. `recipients` are all of the message. Times are Unix time.

    `max_bytes`: the mail may not be larger (None: no limit; 0: it goes without pictures), because of `error`, the
    server's last words. `refused`: they were a 5xx. `reports`, `why`: entries that were refused or failed, which this
    mail reports.
    """

    number: int
    kind: str
    entries: tuple[int, ...]
    recipient: str
    recipients: tuple[str, ...]
    tries: int = 0
    tried_at: float = 0.0
    first_failed: float | None = None
    data_failures: int = 0
    max_bytes: int | None = None
    error: str | None = None
    state: str = "open"
    next_try: float = 0.0
    refused: bool = False
    reports: tuple[int, ...] = ()
    why: str = ""


DELIVERY_COLUMNS = (
    "number, kind, entries, recipient, recipients, tries, tried_at, first_failed, data_failures, max_bytes, error"
)


@dataclass
class History:
    """What was sent: when deliveries of the last day were accepted, how many open ones go next without being planned
    (`untried`), and when a message of each group and kind was last created. `paused` are the recipients to whom nothing
    can go now."""

    times: Sequence[float] = ()
    untried: int = 0
    groups: dict[tuple[str, str], float] = field(default_factory=dict)
    kinds: dict[str, float] = field(default_factory=dict)
    paused: frozenset[str] = frozenset()


@dataclass(eq=False)
class _Put:
    """What one thread wants to put, and what became of it."""

    entries: Sequence[NewEntry]
    size: int
    results: list[PutResult] | None = None
    error: Exception | None = None


class Outbox:
    """The durable queue. Every method is safe to call from any thread, and raises SpoolError when the disk fails."""

    def __init__(self, path: str | Path, *, schema: str = "", size_max: int | None = None) -> None:
        """Open or make the file, 0600, and lock it; `schema` makes tables of its owner. Raises SpoolError."""
        self.path = Path(path)
        self._schema, self._size_max = SCHEMA + schema, size_max
        self._lock = threading.RLock()
        self._puts: deque[_Put] = deque()
        self._ended: list[tuple[Delivery, float]] = []  # attempts whose outcome is not written yet, and when they ended
        self._gone = False  # the file was removed or replaced
        self.closed = False
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_file = lock_file(Path(f"{self.path}.lock"))
        except OSError as error:
            raise SpoolError(f"{self.path}: {error.strerror}") from error
        try:
            self._db = self._open_sound()
        except BaseException as error:
            os.close(self._lock_file)
            if isinstance(error, sqlite3.Error | OSError):
                raise SpoolError(f"{self.path}: {getattr(error, 'strerror', None) or error}") from error
            raise

    def close(self) -> None:
        """Close the database and release the lock."""
        with self._lock:
            if not self.closed:
                self.closed = True
                self._db.close()
                os.close(self._lock_file)

    # opening

    def _open_sound(self) -> sqlite3.Connection:
        """The database, if it is sound; else it is moved aside, what can be read is copied, and the log says so."""
        existed = self.path.exists()
        if existed and not self.path.stat().st_size:
            log.error("the spool %s was empty: what it held is lost", self.path)
        try:
            return self._open()
        except sqlite3.DatabaseError as error:
            if not existed or isinstance(error, sqlite3.OperationalError):
                raise
        aside = Path(f"{self.path}.damaged-{time.time_ns()}")
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self.path}{suffix}", f"{aside}{suffix}")
        db = self._open()
        salvage(aside, db)
        states = dict(db.execute("SELECT state, count(*) FROM entries GROUP BY state"))
        waiting = states.get("waiting", 0) + states.get("sending", 0)
        found = f"{waiting} alerts that wait and {states.get('failed', 0)} that failed were saved"
        log.error("the spool %s was damaged and moved to %s; %s", self.path, aside, found)
        return db

    def _open(self) -> sqlite3.Connection:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        self._identity = file_identity(file)  # before SQLite opens it: what takes its place from here on is noticed
        os.close(file)
        db = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            small = self.path.stat().st_size < CHECKED_MAX_BYTES
            if small and db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("damaged")
            db.execute(f"PRAGMA page_size={PAGE_BYTES}")  # of a new file
            db.execute("PRAGMA secure_delete=OFF")  # Debian's default writes zeros over all that was sent.
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            if pragma(db, "synchronous") != 2:
                raise sqlite3.OperationalError("synchronous=FULL was not taken")
            page = pragma(db, "page_size")
            log_pages = min(CHECKPOINT_BYTES, reserve(shutil.disk_usage(self.path.parent)) // 4) // page
            db.execute(f"PRAGMA wal_autocheckpoint={max(1, log_pages)}")
            self._replace_old_tables(db)
            db.executescript(self._schema)
            db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            db.execute("SELECT sum(length(checksum)) FROM entries WHERE finished_at IS NULL").fetchone()  # reads them
            waits = db.execute("SELECT 1 FROM entries WHERE finished_at IS NULL LIMIT 1").fetchone()
            if not waits and pragma(db, "freelist_count") * page > VACUUM_MIN_BYTES:
                with contextlib.suppress(sqlite3.OperationalError):  # A full disk has no room for the copy.
                    db.execute("VACUUM")
        except BaseException:
            db.close()
            raise
        return db

    def _replace_old_tables(self, db: sqlite3.Connection) -> None:
        """Drop the tables of version 1.0 of this file, if nothing waits in them. Raises SpoolError."""
        if not db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'items'").fetchone():
            return
        (number,) = db.execute("SELECT count(*) FROM items WHERE settled IS NULL").fetchone()
        if number:
            raise SpoolError(
                f"{self.path}: made by version 1.0, which has {number} mails in it that are not sent; let that version"
                " send or drop them, or move the file away"
            )
        for table in ("items", "mails", "notes"):
            db.execute(f"DROP TABLE IF EXISTS {table}")
        for suffix in (".pictures", ".sent", ".answer"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    # the one way to the database

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """BEGIN IMMEDIATE ... COMMIT for the owner's changes, one thread at a time; on disk when it is left, all or
        nothing. Raises SpoolError; then nothing was done."""
        with self._transaction() as db:
            self._check_file()
            yield db

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction that also writes the outcomes that are not written yet."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                ended = len(self._ended)
                self._write_outcomes()
                yield self._db
                self._db.execute("COMMIT")
                del self._ended[:ended]
            except BaseException as error:
                with contextlib.suppress(sqlite3.Error):
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error | OSError):
                    self._fail(error)
                raise

    def _check_file(self) -> None:
        """Raises SpoolError when the file was removed or replaced: what is put into it would end with this process."""
        if file_identity(self.path) != self._identity:
            if not self._gone:
                self._gone = True
                words = "the spool %s was removed or replaced: nothing new is accepted, but what waits still goes out:"
                log.error(words + " start this program anew only when `ping` says that nothing is queued", self.path)
            raise SpoolError(f"{self.path}: the file was removed or replaced")

    def rows(self, sql: str, *values: object) -> list[Any]:
        """The rows of a query, outside any transaction. Raises SpoolError."""
        with self._lock:
            try:
                return self._db.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                self._fail(error)

    def _fail(self, error: Exception) -> NoReturn:
        """What the database raises becomes a SpoolError; after damage it is opened anew."""
        if re.search("malformed|not a database|closed database", str(error)) and not (self.closed or self._gone):
            with contextlib.suppress(sqlite3.Error, OSError):
                self._db.close()
                self._db = self._open_sound()
        full = bool(NO_ROOM.search(str(error)))
        if full or "disk I/O" in str(error):  # so says SQLite of a log that may not grow
            self._empty_log()
        raise (DiskFull if full else SpoolError)(f"{self.path}: {error}") from error

    def _empty_log(self) -> None:
        """Free the room that the write-ahead log takes. Who reads the database meanwhile is not waited for: everybody
        would wait for him."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA busy_timeout=0")
            try:
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            finally:
                self._db.execute(f"PRAGMA busy_timeout={BUSY_S * 1000}")

    # putting

    def put(self, entries: Sequence[NewEntry]) -> list[PutResult]:
        """Add entries; when this returns they are on disk. Threads that arrive meanwhile share the next commit.

        The same id with the same content is a duplicate; with other content it gets a suffix. Raises SpoolError.
        """
        mine = _Put(entries, sum(len(entry.payload) + len(entry.picture or b"") for entry in entries))
        self._puts.append(mine)
        while mine.results is None and mine.error is None:
            with self._lock:  # Whoever gets it commits for all; the others find that theirs is done.
                if mine.results is None and mine.error is None:
                    self._commit(self._gathered())
        if mine.error:
            try:
                raise mine.error
            finally:
                mine.error = None  # Else the two keep each other alive, and all that stands on the stack.
        assert mine.results is not None
        return mine.results

    def _gathered(self) -> list[_Put]:
        """What has gathered, oldest first, up to COMMIT_MAX_BYTES."""
        puts = [self._puts.popleft()]
        size = puts[0].size
        while self._puts and size + self._puts[0].size <= COMMIT_MAX_BYTES:
            puts.append(self._puts.popleft())
            size += puts[-1].size
        return puts

    def _commit(self, puts: Sequence[_Put]) -> None:
        """Store them in one transaction, or note why not. What is wrong with one costs only itself."""
        try:
            self.check_room(sum(put.size for put in puts))
            with self.transaction() as db:
                done = [[self.add(db, entry) for entry in put.entries] for put in puts]
        except BaseException as error:
            alone = len(puts) == 1 or (isinstance(error, SpoolError) and not isinstance(error, SpoolFull))
            for put in puts:
                if alone or not isinstance(error, Exception):
                    put.error = error if isinstance(error, Exception) else SpoolError("interrupted")
                else:
                    self._commit([put])
            if not isinstance(error, Exception):
                raise
        else:
            for put, results in zip(puts, done, strict=True):
                put.results = results

    def add(self, db: sqlite3.Connection, entry: NewEntry) -> PutResult:
        """Add an entry inside a transaction."""
        checksum = hashlib.sha256(entry.payload).digest()
        picture_checksum = hashlib.sha256(entry.picture).digest() if entry.picture else None
        name = entry.id
        while not entry.unique:
            known = db.execute("SELECT checksum, picture_checksum FROM entries WHERE id = ?", (name,)).fetchone()
            if known is None:
                break
            if known == (checksum, picture_checksum) or name != entry.id:
                return PutResult(name, new=False)
            digest = hashlib.sha256(checksum + (picture_checksum or b"")).hexdigest()
            name = f"{entry.id[:115]}-{digest[:12]}"
        row = (name, entry.kind, entry.source, entry.arrived, checksum, picture_checksum, entry.payload)
        seq = db.execute(
            "INSERT INTO entries(id, kind, source, arrived, checksum, picture_checksum, payload)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)", row,
        ).lastrowid  # fmt: skip
        if entry.picture:
            db.execute("INSERT INTO pictures VALUES (?, ?)", (seq, entry.picture))
        return PutResult(name, new=True)

    def check_room(self, size: int) -> None:
        """Raises SpoolFull unless there is room for so many bytes, and for writing down what becomes of them."""
        spare, disk = self._spare(size)
        if min(spare, disk) < 0:
            self._empty_log()
            spare, disk = self._spare(size)
        if spare < 0:
            raise SpoolFull(f"{self.path}: no more than {self._size_max} bytes are allowed, and they are used")
        if disk < 0:
            raise DiskFull(f"{self.path}: the disk is full")

    def _spare(self, size: int) -> tuple[float, float]:
        """Bytes left after so many more: of what the spool may take, and of the disk.

        What is put is written twice, into the log and then into the database, which may have unused room.
        """
        names = ("page_count", "freelist_count", "page_size")
        pages, free, page = (self.rows(f"PRAGMA {name}")[0][0] for name in names)
        spare = math.inf if self._size_max is None else self._size_max - (pages - free) * page - size
        try:
            disk, in_log = shutil.disk_usage(self.path.parent), os.path.getsize(f"{self.path}-wal")
        except FileNotFoundError:  # Nothing was written yet, or the folder was removed, which is noticed elsewhere.
            return spare, 0
        return spare, disk.free - reserve(disk) - size - max(0, in_log + size - free * page)

    def half_full(self) -> bool:
        """Is more than half of what the spool may take in use?"""
        return self._size_max is not None and self._spare(0)[0] < self._size_max / 2

    # planning

    def pending(self, after: int = 0) -> Iterator[PendingEntry]:
        """What waits, oldest first, page by page, without payloads."""
        sql = "SELECT seq, id, kind, source, arrived, served FROM entries WHERE state = 'waiting' AND seq > ?"
        while True:
            page = self.rows(f"{sql} ORDER BY seq LIMIT {PAGE_ROWS}", after)
            yield from map(_pending, page)
            if len(page) < PAGE_ROWS:
                return
            after = page[-1][0]

    def newest(self, number: int) -> list[PendingEntry]:
        """The newest that wait, newest first."""
        sql = "SELECT seq, id, kind, source, arrived, served FROM entries WHERE state = 'waiting'"
        return [_pending(row) for row in self.rows(f"{sql} ORDER BY seq DESC LIMIT ?", number)]

    def history(self, since: float) -> History:
        """When a message of each group and kind was last created, since then."""
        history = History()
        for kind, group_kind, source, when in self.rows(
            "SELECT deliveries.kind, entries.kind, source, created_at FROM deliveries,"
            " json_each(deliveries.entries) AS one JOIN entries ON seq = one.value"
            " WHERE created_at > ? ORDER BY created_at", since,
        ):  # fmt: skip
            history.kinds[kind] = history.groups[group_kind, source] = when
        return history

    def budget(self, now: float, limit: int, under_way: Collection[int] = ()) -> tuple[list[float], int]:
        """When the newest `limit` deliveries of the last day were accepted, and how many open ones were never tried or
        are `under_way`.

        Some may have ended since `now`, or the clock was set back: those of the next day count, too.
        """
        sql = "SELECT finished_at FROM deliveries WHERE finished_at > ? AND finished_at <= ? AND state = 'sent'"
        with self._lock:
            self.flush()
            rows = self.rows(f"{sql} ORDER BY finished_at DESC LIMIT ?", now - DAY_S, now + DAY_S, limit)
            which = "state = 'open' AND (tried_at = 0 OR number IN (SELECT value FROM json_each(?)))"
            sql = f"SELECT count(*) FROM deliveries WHERE {which}"
            reserved = self.rows(sql, json.dumps(list(under_way)))[0][0]
        return [when for (when,) in reversed(rows)], reserved

    def create(self, due: Sequence[DueMessage], now: float) -> list[Delivery]:
        """Make deliveries of what is due, durably: from now on each is the same message, whatever happens.

        Entries that wait no longer are left out.
        """
        created: list[Delivery] = []
        with self._transaction() as db:
            for message in due:
                number = len(message.recipients)
                sql = f"UPDATE entries SET state = 'sending', open = open + ? WHERE state = 'waiting' AND {SEQS}"
                found = {seq for (seq,) in db.execute(f"{sql} RETURNING seq", (number, json.dumps(message.entries)))}
                entries = tuple(seq for seq in message.entries if seq in found)
                lists = json.dumps(entries), json.dumps(message.recipients)
                for recipient in message.recipients if entries else ():
                    row = (message.kind, lists[0], recipient, lists[1], now, now)
                    sql = "INSERT INTO deliveries(kind, entries, recipient, recipients, created_at, next_try)"
                    cursor = db.execute(f"{sql} VALUES (?, ?, ?, ?, ?, ?)", row)
                    created.append(
                        Delivery(cursor.lastrowid or 0, message.kind, entries, recipient, message.recipients)
                    )
                if not number:
                    self._end_entries(db, entries, now)  # Nobody is left who should get them.
        return created

    def due(
        self, now: float, known: Collection[int], troubled: Collection[str], most: int, room: float
    ) -> tuple[list[Delivery], float]:
        """Open deliveries whose time has come, and when to ask again: not those that are `known`, not those of
        `troubled` recipients, and of those that were tried before no more than there is `room` for."""
        others = "FROM deliveries WHERE state = 'open' AND recipient NOT IN (SELECT value FROM json_each(?))"
        names, limit = json.dumps(list(troubled)), most + len(known)
        with self._lock:
            self.flush()
            sql = f"SELECT {DELIVERY_COLUMNS} {others} AND next_try <= ? ORDER BY tried_at > 0, next_try LIMIT ?"
            rows = self.rows(sql, names, now, limit)
            ((later,),) = self.rows(f"SELECT min(next_try) {others} AND next_try > ?", names, now)
        found = [delivery for delivery in map(_delivery, rows) if delivery.number not in known][:most]
        untried = [delivery for delivery in found if not delivery.tried_at]
        tried = [delivery for delivery in found if delivery.tried_at]
        allowed = tried[: int(max(0, min(room, most)))]
        more = now if len(rows) == limit else math.inf  # As soon as these are sent, or a place is free.
        more = now + TICK_S if len(allowed) < len(tried) else more
        return untried + allowed, min(later or math.inf, more)

    def least_recently_tried(self, recipient: str, now: float) -> Delivery | None:
        """The open delivery to a recipient that has waited longest for a try, of those whose time has come by `now`."""
        sql = f"SELECT {DELIVERY_COLUMNS} FROM deliveries WHERE state = 'open' AND recipient = ? AND next_try <= ?"
        with self._lock:
            self.flush()
            rows = self.rows(f"{sql} ORDER BY tried_at, number LIMIT 1", recipient, now)
        return _delivery(rows[0]) if rows else None

    # delivering

    def load(self, delivery: Delivery) -> list[Entry]:
        """The entries of a delivery that are still in it, each verified against its checksum. Raises Damaged."""
        sql = "SELECT id, kind, source, arrived, payload, checksum, picture_checksum FROM entries"
        sql += " WHERE seq = ? AND state IN ('sending', 'waiting')"
        entries = []
        for seq in delivery.entries:
            for name, kind, source, arrived, payload, checksum, shown in self.rows(sql, seq):
                if type(payload) is not bytes or hashlib.sha256(payload).digest() != checksum:
                    raise Damaged(seq)
                load = functools.partial(self._picture, seq, shown) if shown else lambda: None
                entries.append(Entry(seq, name, kind, source, arrived, payload, load, shown is not None))
        return entries

    def _picture(self, seq: int, checksum: bytes) -> bytes | None:
        """The picture; None if it cannot be read any more: its mail goes without it."""
        try:
            for (data,) in self.rows("SELECT data FROM pictures WHERE seq = ?", seq):
                if hashlib.sha256(data).digest() == checksum:
                    return bytes(data)
                log.error("%s: the picture of entry %d is damaged and is left out", self.path, seq)
        except SpoolError as error:
            log.error("the picture of entry %d is left out: %s", seq, error)
        return None

    def unreported(self, but: Collection[int] = ()) -> tuple[tuple[int, ...], str]:
        """The entries that were refused or failed without a mail that said so, and why (the first three reasons)."""
        rows = [row for row in self.rows(f"SELECT seq, error FROM entries WHERE {UNREPORTED}") if row[0] not in but]
        reasons = dict.fromkeys(error for _, error in rows)
        return tuple(seq for seq, _ in rows), "; ".join(list(reasons)[:3])

    def finish(self, delivery: Delivery, now: float) -> None:
        """Note how an attempt ended; the next commit writes it. `flush` should follow soon."""
        with self._lock:
            self._ended.append((delivery, now))

    def unwritten(self) -> int:
        """How many outcomes are not written yet."""
        return len(self._ended)

    def flush(self) -> None:
        """Write the outcomes. Raises SpoolError; then they stay noted."""
        if self._ended:
            with self._transaction():
                pass

    def _write_outcomes(self) -> None:
        db = self._db
        for delivery, now in self._ended:
            row = (
                delivery.state, delivery.next_try, delivery.tries, delivery.tried_at, delivery.first_failed,
                delivery.data_failures, delivery.max_bytes, delivery.error, None if delivery.state == "open" else now,
            )  # fmt: skip
            changed = db.execute(
                "UPDATE deliveries SET state = ?, next_try = ?, tries = ?, tried_at = ?, first_failed = ?,"
                " data_failures = ?, max_bytes = ?, error = ?, finished_at = ? WHERE number = ? AND state = 'open'",
                (*row, delivery.number),
            ).rowcount
            if not changed:  # It was dropped meanwhile.
                continue
            entries, who = json.dumps(delivery.entries), f"{delivery.recipient}: "
            if delivery.refused or delivery.state == "failed":
                db.execute(f"UPDATE entries SET error = ? WHERE {SEQS}", (who + (delivery.error or ""), entries))
            elif delivery.state == "sent" and delivery.error:  # What it was refused for is over.
                db.execute(f"UPDATE entries SET error = NULL WHERE substr(error, 1, ?) = ? AND {SEQS}",
                           (len(who), who, entries))
            if delivery.state != "open":
                failed = delivery.state == "failed"
                db.execute(f"UPDATE entries SET open = open - 1, failed = failed + ? WHERE {SEQS}", (failed, entries))
                self._end_entries(db, delivery.entries, now)
            if delivery.state == "sent" and delivery.reports:
                db.execute(f"UPDATE entries SET reported = 1 WHERE {SEQS}", (json.dumps(delivery.reports),))

    def _end_entries(self, db: sqlite3.Connection, seqs: Sequence[int], now: float) -> None:
        """Finish those of the entries whose deliveries have all ended."""
        names = json.dumps(seqs)
        which = f"state = 'sending' AND open = 0 AND {SEQS}"
        db.execute(f"UPDATE entries SET state = 'failed' WHERE failed AND {which}", (names,))
        sql = f"UPDATE entries SET state = 'sent', finished_at = ?, error = NULL, payload = NULL WHERE {which}"
        rows = db.execute(f"{sql} RETURNING seq, picture_checksum", (now, names)).fetchall()
        if shown := [seq for seq, picture in rows if picture]:
            db.execute(f"DELETE FROM pictures WHERE {SEQS}", (json.dumps(shown),))

    # looking after it

    def retry(self, name: str = "all") -> tuple[int, int]:
        """Failed entries (or one) wait again and are planned anew, and open deliveries are due now; how many entries
        that is of each."""
        with self._transaction() as db:
            which = "(state = 'failed' OR (state = 'sending' AND failed)) AND ? IN (id, 'all')"
            failed = [seq for (seq,) in db.execute(f"SELECT seq FROM entries WHERE {which}", (name,))]
            sql = "SELECT count(*) FROM entries WHERE state IN ('waiting', 'sending') AND seq > ? AND ? IN (id, 'all')"
            held = self.status().get("hold", {}).get("upto", 0)
            (others,) = db.execute(sql, (held, name)).fetchone()
            self._wait_again(db, failed)
            db.execute(
                "UPDATE deliveries SET next_try = 0 WHERE state = 'open' AND EXISTS (SELECT 1 FROM"
                " json_each(deliveries.entries) AS one JOIN entries ON seq = one.value"
                " WHERE ? IN (entries.id, 'all'))", (name,),
            )  # fmt: skip
        return len(failed), others

    def void_changed(self, recipients: Callable[[str, str], Collection[str]]) -> int:
        """Void the open deliveries to somebody who gets none of their entries any more, so that these are planned anew;
        the number of deliveries. `recipients` tells who gets a group."""
        number = 0
        with self._transaction() as db:
            rows = db.execute(f"SELECT {DELIVERY_COLUMNS} FROM deliveries WHERE state = 'open'").fetchall()
            for delivery in map(_delivery, rows):
                entries = json.dumps(delivery.entries)
                groups = db.execute(f"SELECT DISTINCT kind, source FROM entries WHERE {SEQS}", (entries,)).fetchall()
                if not any(delivery.recipient in recipients(*group) for group in groups):
                    db.execute("DELETE FROM deliveries WHERE number = ?", (delivery.number,))
                    db.execute(f"UPDATE entries SET open = open - 1 WHERE {SEQS}", (entries,))
                    self._wait_again(db, delivery.entries)
                    number += 1
        return number

    def _wait_again(self, db: sqlite3.Connection, seqs: Sequence[int]) -> None:
        """Let entries wait again, with who is served noted; deliveries of them that failed are theirs no longer."""
        served: dict[int, set[str]] = {seq: set() for seq in seqs}
        for number, entries in db.execute("SELECT number, entries FROM deliveries WHERE state = 'failed'").fetchall():
            if served.keys() & set(json.loads(entries)):
                left = [seq for seq in json.loads(entries) if seq not in served]
                db.execute("UPDATE deliveries SET entries = ? WHERE number = ?", (json.dumps(left), number))
        sql = "SELECT recipient, entries FROM deliveries WHERE state IN ('sent', 'open')"
        for recipient, entries in db.execute(sql) if seqs else ():
            for seq in served.keys() & set(json.loads(entries)):
                served[seq].add(recipient)
        db.executemany(
            "UPDATE entries SET state = 'waiting', failed = 0, error = NULL, reported = 0, served = ?"
            " WHERE seq = ? AND finished_at IS NULL",
            [(json.dumps(sorted(names)), seq) for seq, names in served.items()],
        )  # fmt: skip

    def drop(self, name: str = "all") -> tuple[int, int]:
        """What failed or waits (or one) is not sent, and its payload is forgotten; how many entries that is of each."""
        now = time.time()
        with self._transaction() as db:
            which = "state IN ('waiting', 'sending', 'failed') AND ? IN (id, 'all')"
            rows = db.execute(f"SELECT seq, state FROM entries WHERE {which}", (name,)).fetchall()
            change = "state = 'dropped', finished_at = ?, payload = NULL, error = NULL"
            db.execute(f"UPDATE entries SET {change} WHERE {which}", (now, name))
            db.execute(f"DELETE FROM pictures WHERE {SEQS}", (json.dumps([seq for seq, _ in rows]),))
            db.execute(
                "UPDATE deliveries SET state = 'dropped', finished_at = ? WHERE state = 'open' AND NOT EXISTS (SELECT 1"
                " FROM json_each(deliveries.entries) AS one JOIN entries ON seq = one.value"
                " WHERE entries.state IN ('waiting', 'sending'))", (now,),
            )  # fmt: skip
        failed = sum(state == "failed" for _, state in rows)
        return failed, len(rows) - failed

    def fail_entry(self, seq: int, why: str) -> None:
        """An entry cannot go out: it has failed; the others of its mail go on."""
        with self._transaction() as db:
            sql = "UPDATE entries SET state = 'failed', error = ? WHERE state IN ('waiting', 'sending') AND seq = ?"
            db.execute(sql, (why, seq))

    def shift_times(self, since: float, until: float, seconds: float) -> None:
        """The clock was set by so many seconds: the times that were noted from `since` to `until` move with it."""
        moved = [("deliveries", "next_try", "max(created_at, tried_at)"), ("entries", "finished_at", "finished_at")]
        moved += [("deliveries", name, name) for name in ("created_at", "tried_at", "first_failed", "finished_at")]
        with self._transaction() as db:
            for table, name, noted in moved:
                sql = f"UPDATE {table} SET {name} = {name} + ? WHERE {noted} BETWEEN ? AND ?"
                db.execute(sql, (seconds, since, until))

    def limit_times(self, now: float, longest: float) -> None:
        """No open delivery waits longer than `longest`, or has failed in the future: another clock may have said so."""
        with self._transaction() as db:
            latest = "CASE WHEN tried_at = 0 THEN :now ELSE :now + :longest END"
            sql = f"UPDATE deliveries SET next_try = min(next_try, {latest}), first_failed = min(first_failed, :now)"
            sql += f" WHERE state = 'open' AND (next_try > {latest} OR first_failed > :now)"
            db.execute(sql, {"now": now, "longest": longest})

    def prune(self, now: float) -> int:
        """Forget what ended more than MEMORY_S ago, a little at a time; the number of entries forgotten. A delivery is
        remembered as long as one of its entries is."""
        with self._transaction() as db:
            old = "DELETE FROM entries WHERE seq IN (SELECT seq FROM entries WHERE finished_at < ? LIMIT 2000)"
            gone = db.execute(old, (now - MEMORY_S,)).rowcount
            db.execute(
                "DELETE FROM deliveries WHERE number IN (SELECT number FROM deliveries WHERE finished_at < ?"
                " AND NOT EXISTS (SELECT 1 FROM json_each(deliveries.entries) AS one JOIN entries ON seq = one.value)"
                " LIMIT 2000)",
                (now - MEMORY_S,),
            )
        return gone

    def last_accepted(self) -> float:
        """When a delivery was last accepted by the server; 0: none that is remembered."""
        return float(self.rows("SELECT max(finished_at) FROM deliveries WHERE state = 'sent'")[0][0] or 0.0)

    def counts(self) -> dict[str, int]:
        """How many entries wait (created or not), were sent (and are remembered), failed."""
        states = dict(self.rows("SELECT state, count(*) FROM entries GROUP BY state"))
        queued = states.get("waiting", 0) + states.get("sending", 0)
        return {"queued": queued, "sent": states.get("sent", 0), "failed": states.get("failed", 0)}

    def groups(self) -> list[tuple[str, str]]:
        """The groups of what waits, as far as the first 2000 entries show."""
        sql = "SELECT DISTINCT kind, source FROM (SELECT kind, source FROM entries WHERE state = 'waiting' LIMIT 2000)"
        return self.rows(sql)

    def status(self) -> dict[str, Any]:
        """The status values."""
        return {name: json.loads(value) for name, value in self.rows("SELECT name, value FROM status")}

    def publish_status(self, **values: object) -> None:
        """Store status values, as JSON: for `queue`, and for the owner's next start."""
        with self._transaction() as db:
            self.store_status(db, **values)

    def store_status(self, db: sqlite3.Connection, **values: object) -> None:
        """The same inside a transaction."""
        rows = [(name, json.dumps(value)) for name, value in values.items()]
        db.executemany("INSERT OR REPLACE INTO status VALUES (?, ?)", rows)


def _pending(row: Sequence[Any]) -> PendingEntry:
    seq, name, kind, source, arrived, served = row
    return PendingEntry(seq, name, kind, source, arrived, frozenset(json.loads(served) if served else ()))


def _delivery(row: Sequence[Any]) -> Delivery:
    number, kind, entries, recipient, recipients, *rest = row
    return Delivery(number, kind, tuple(json.loads(entries)), recipient, tuple(json.loads(recipients)), *rest)


def lock_file(path: Path) -> int:
    """Lock `path` for this process until it ends; the kernel releases it even after kill -9. Raises SpoolBusy."""
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
    """Copy every row of every table that can still be read, pictures last, from both ends, since a damaged page stops
    a reader."""
    ours = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY name = 'pictures'"
    tables = [name for (name,) in into.execute(ours)]
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(damaged)) as db:
        into.execute("BEGIN")
        db.execute("PRAGMA writable_schema=ON")  # Else SQLite reads nothing of a file that is shorter than it was.
        for table, order in itertools.product(tables, ("", "DESC")):
            with contextlib.suppress(sqlite3.Error):
                for row in db.execute(f"SELECT * FROM {table} ORDER BY rowid {order}"):
                    with contextlib.suppress(sqlite3.Error):
                        into.execute(f"INSERT OR IGNORE INTO {table} VALUES ({', '.join('?' * len(row))})", row)
        into.execute("DELETE FROM pictures WHERE seq NOT IN (SELECT seq FROM entries)")
        # No new entry takes a number that something salvaged refers to.
        numbers = "SELECT seq FROM entries UNION SELECT value FROM deliveries, json_each(deliveries.entries)"
        numbers += " UNION SELECT 0"
        into.execute("DELETE FROM sqlite_sequence WHERE name = 'entries'")
        into.execute(f"INSERT INTO sqlite_sequence SELECT 'entries', max(seq) FROM ({numbers})")
        lists = into.execute("SELECT entries FROM deliveries WHERE state = 'open'").fetchall()
        open_ones = Counter(seq for (entries,) in lists for seq in json.loads(entries))
        into.execute("UPDATE entries SET open = 0")
        rows = [(number, seq) for seq, number in open_ones.items()]
        into.executemany("UPDATE entries SET open = ? WHERE seq = ?", rows)
        # What was in deliveries that could not be read waits again.
        into.execute("UPDATE entries SET state = 'waiting' WHERE state = 'sending' AND open = 0")
        into.execute("COMMIT")


def read_queue(path: Path) -> list[dict[str, Any]]:
    """Every entry that waits, is held or failed, read without writing to the file. Raises SpoolError."""
    if not os.access(path, os.R_OK):
        raise SpoolError(f"{path}: there is no such spool, or you may not read it; --spool FILE names another")
    # Without a log nobody writes, and the file can be read without making one.
    mode = "mode=ro" if Path(f"{path}-wal").exists() else "mode=ro&immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, timeout=5)) as db:
            db.row_factory = sqlite3.Row
            db.execute("BEGIN")  # one moment for all that is read
            entries = db.execute(
                "SELECT seq, id, kind, source, arrived, state, served, error FROM entries WHERE finished_at IS NULL"
                " ORDER BY seq"
            ).fetchall()
            deliveries = db.execute(
                "SELECT entries, recipient, state, next_try, tried_at, tries, error FROM deliveries"
                " WHERE state IN ('open', 'failed') ORDER BY number"
            ).fetchall()
            status = {name: json.loads(value) for name, value in db.execute("SELECT name, value FROM status")}
    except sqlite3.Error as error:
        raise SpoolError(f"{path}: {error}") from None
    of_entry: dict[int, list[sqlite3.Row]] = {}
    for delivery in deliveries:
        for seq in json.loads(delivery["entries"]):
            of_entry.setdefault(seq, []).append(delivery)
    return [_queue_row(entry, of_entry.get(entry["seq"], []), status) for entry in entries]


def _queue_row(entry: sqlite3.Row, deliveries: Sequence[sqlite3.Row], status: Mapping[str, Any]) -> dict[str, Any]:
    """What `queue` shows of an entry: its open deliveries and, while it waits, who else would get it; when it has
    failed, the deliveries that failed."""
    waits, failed = entry["state"] == "waiting", entry["state"] == "failed"
    mine = [delivery for delivery in deliveries if delivery["state"] == ("failed" if failed else "open")]
    group = f"{entry['kind']} {entry['source']}"
    planned, served = status.get("recipients", {}).get(group, []), json.loads(entry["served"] or "[]")
    others = [name for name in planned if name not in served] if waits else []
    recipients = list(dict.fromkeys([*(one["recipient"] for one in mine), *others]))
    pauses, hold = status.get("pauses", {}), status.get("hold") or {"upto": 0}
    held = [pauses[EVERYTHING]] if EVERYTHING in pauses else []
    if waits and entry["seq"] <= hold["upto"]:
        held.append(hold)
    next_try = dict.fromkeys(recipients, 0.0) | {one["recipient"]: one["next_try"] for one in mine}
    next_try |= {name: pauses[name]["until"] for name in recipients if name in pauses}  # whatever is tried then
    if (full := status.get("full")) and mine and all(one["tried_at"] for one in mine):  # A retry needs a place, too.
        held.append(full)
    due = max([min(next_try.values(), default=0.0), *(one["until"] for one in held)])
    if all(name in pauses for name in recipients):
        held += [pauses[name] for name in recipients]
    error = entry["error"] or "; ".join(dict.fromkeys(one["error"] for one in mine if one["error"]))
    return {
        "id": entry["id"],
        "group": group,
        "state": "failed" if failed else "held" if held else "waiting",
        "since": iso(entry["arrived"]),
        "next": iso(due) if due and not failed else None,
        "tries": max((one["tries"] for one in mine), default=0),
        "error": held[0]["why"] if held and not failed else error or None,
        "recipients": recipients,
    }


def iso(when: float) -> str:
    """Unix time as ISO 8601, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(max(0.0, when)))


def from_iso(text: str) -> float:
    """What `iso` wrote, as Unix time."""
    return dt.datetime.fromisoformat(text).timestamp()


def local_time(when: float) -> str:
    """Unix time as people here read it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(max(0.0, when)))


# ───────────────────────────────────────────── Courier ──────────────────────────────────────────────
# plan (pure) > connect > create > render (pure) > deliver > finish. One Condition guards all that the threads share,
# and wakes them. A pause has a key: EVERYTHING, or one recipient. While it lasts, one delivery at a time (the probe)
# finds out whether its trouble is over.

EVERYTHING = "*"  # the key of the pause of all mail; no address looks like that


@dataclass(frozen=True)
class Plan:
    """The messages that are due now; `wake`: when to plan again though nothing arrives; `why` the rest is held."""

    due: list[DueMessage]
    wake: float | None = None
    why: str = ""


class MailPolicy(Protocol):
    """The owner of an outbox decides what is mailed. Its methods are pure.

    `window` (seconds) and `limit` (deliveries in any 24 hours, 0: none) say how much of what was sent the plan looks
    at. An owner with 0 and 0 plans each entry alone, in any order.
    """

    window: float
    limit: int

    def plan(self, waiting: Iterable[PendingEntry], sent: History, now: float, most: int) -> Plan:
        """Which messages are due. Pulls from `waiting` only until it has `most` of them."""

    def recipients(self, kind: str, source: str) -> tuple[str, ...]:
        """Who gets what waits in this group, as things are now."""

    def render(self, delivery: Delivery, entries: Sequence[Entry]) -> Message:
        """The mail as it goes out."""


@dataclass(frozen=True)
class RetryRules:
    """How a delivery is retried. Times are in seconds.

    A refusal (5xx) is final after `refused_after`, all other trouble after `max_age`, and only if the server has
    accepted another delivery since the first failure. `pause_recipients`: three failures in a row pause a recipient.
    """

    first: float = 5.0
    longest: float = 3600.0
    max_age: float = 5 * DAY_S
    refused_after: float = DAY_S
    pause_recipients: bool = True


def after_attempt(  # noqa: PLR0917
    delivery: Delivery, outcome: Outcome, now: float, rules: RetryRules,
    has_pictures: bool = False, probe: bool = False, accepted_at: float = 0.0,
) -> Delivery:  # fmt: skip
    """Pure: the delivery after an attempt that was not about us. `accepted_at` is when the server last accepted another
    delivery; a probe costs no try."""
    if outcome.verdict is Verdict.SENT:
        return delivery._replace(state="sent", tries=delivery.tries + 1, tried_at=now)
    first_failed = delivery.first_failed or now
    refused, at_data = outcome.verdict is Verdict.REFUSED, outcome.step in ("data", "dot")
    data_failures = delivery.data_failures + (at_data and not 400 <= outcome.code < 500)
    tries, aged = delivery.tries + (not probe), now - first_failed
    strip = has_pictures and delivery.max_bytes != 0
    strip = strip and (outcome.too_big or data_failures >= 2 or (at_data and aged >= STRIP_AFTER_S))
    delay = backoff(tries - 1, rules.first, rules.longest)
    pictures_refused = at_data and has_pictures and delivery.max_bytes != 0  # Without them it may be accepted.
    if refused and not pictures_refused:
        delay = max(delay, min(REFUSED_PAUSE_S, rules.refused_after))
    if outcome.step == "dot" and not outcome.code and data_failures >= 2:  # The server may have it each time.
        delay = max(delay, UNANSWERED_PAUSE_S)
    over = aged >= (rules.refused_after if refused else rules.max_age) and accepted_at > first_failed
    over = over or (refused and not rules.refused_after)
    return delivery._replace(
        state="failed" if over and not strip else "open",
        tries=tries, tried_at=now, first_failed=first_failed, data_failures=data_failures, refused=refused,
        max_bytes=delivery.max_bytes if not strip else outcome.size_limit if delivery.max_bytes is None else 0,
        next_try=now if strip else now + delay, error=str(outcome),
    )  # fmt: skip


def backoff(tries: int, first: float, most: float) -> float:
    """Seconds to wait after attempt `tries` (from 0): doubling from `first` up to `most`, a fifth of it jitter."""
    return min(most, first * 2.0 ** min(max(tries, 0), 40)) * random.uniform(0.8, 1.0)


@dataclass
class Trouble:
    """Failures with one key. It is remembered until ten deliveries went through since the last pause began, so that a
    server that lets one through now and then does not start it all again: after a success the next pause is a minute
    at most, so that all that waits gets through such a server."""

    outcome: Outcome
    failures: int = 0  # in a row
    successes: int = 0  # since the last pause began
    paused: bool = False
    length: float = 0.0  # of the last pause, seconds
    since: float = 0.0  # when it began, monotonic
    until: float = 0.0  # when the next probe goes, monotonic


class _Work(NamedTuple):
    """A delivery that a sender has, ready for the wire."""

    delivery: Delivery
    message: PreparedMessage
    about: str
    has_pictures: bool
    began: float  # monotonic
    clock_offset: float  # from the monotonic clock to the other one


def write_request(path: Path, content: object, mode: int = 0o600) -> None:
    """Write a request to the owner of a spool, or its answer, whole or not at all. Raises OSError."""
    draft = path.with_name(f".{path.name}")
    draft.unlink(missing_ok=True)
    with open(draft, "x", encoding="utf-8", opener=functools.partial(os.open, mode=mode)) as file:
        os.chmod(draft, mode)  # whatever the umask
        json.dump(content, file)
    os.replace(draft, path)


class Courier:
    """Delivers what waits in an outbox through a transport, with `senders` threads of one connection each."""

    def __init__(
        self,
        outbox: Outbox,
        policy: MailPolicy,
        transport: Callable[[], Transport],
        *,
        senders: int = 1,
        rules: RetryRules = RetryRules(),
        keep_open_s: float = KEEP_OPEN_S,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        advise: Callable[[Outcome], str] = lambda outcome: "",
    ) -> None:
        """`keep_open_s`: a connection is kept so long after its last mail. Raises SpoolError."""
        self._outbox, self._policy, self._transport = outbox, policy, transport
        self._senders, self._rules, self._keep_open_s = senders, rules, keep_open_s
        self._clock, self._monotonic, self._advise = clock, monotonic, advise
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()  # guards all that follows
        self._queue: deque[Delivery] = deque()  # created and due, with no sender yet
        self._with_senders: dict[int, Delivery] = {}  # those that senders have, by number
        self._troubles: dict[str, Trouble] = {}
        self._history = self._read_history()
        self._active = 0  # senders at work
        self._taken_at = -math.inf  # when a sender last took a delivery, monotonic
        self._accepted_at = min(outbox.last_accepted(), clock())  # when the server last accepted a delivery
        self._unreported = True  # there may be failures to report
        self._reporting = 0  # the delivery that reports them
        self._started, self._clock_offset = monotonic(), clock() - monotonic()
        self._kept_house = -math.inf
        self._published: object = None
        self._groups: set[str] = set()  # those whose recipients `queue` can show
        self._last_error = ""  # of the machine, logged once
        self._retry_at = 0.0  # when the next open delivery is due
        self._why = ""  # the last plan held something
        self._full_until = 0.0  # the daily limit is used up
        self._planned: list[DueMessage] = []  # due, not created yet
        self._retries: list[Delivery] = []  # due, not in the queue yet
        self._look_again()
        self._outbox.limit_times(clock(), max(rules.longest, UNANSWERED_PAUSE_S))
        self._void_changed()

    # life

    def start(self) -> None:
        """Start the threads."""
        for number in range(self._senders):
            name = f"sender-{number + 1}"
            self._threads.append(threading.Thread(target=self._send_loop, args=(number == 0,), name=name, daemon=True))
        self._threads.append(threading.Thread(target=self._tick_loop, name="courier", daemon=True))
        for thread in self._threads:
            thread.start()

    def notify(self) -> None:
        """There is something new in the outbox."""
        with self._changed:
            self._news = True
            if not (self._all_paused() or self._busy()):  # else nobody need wake for more of the same
                self._changed.notify_all()

    def stop(self, timeout: float = 4.0) -> None:
        """End the threads; what is under way gets `timeout` seconds, then it is left for the next start."""
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        until = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _send_loop(self, first: bool) -> None:
        transport, used = self._transport(), math.inf  # when the connection was last used; infinity: there is none
        while not self._stopping.is_set():
            try:
                if self.run(transport, first):
                    used = self._monotonic()
                if self._monotonic() - used >= self._keep_open_s:
                    transport.close()
                    used = math.inf
                with self._changed:
                    if not (self._stopping.is_set() or self._may_begin(first)):
                        self._changed.wait(self._seconds_to_wait())
            except Exception as error:
                self._log_trouble(error)
                self._stopping.wait(TICK_S)
        transport.close()

    def _seconds_to_wait(self) -> float:
        """How long an idle sender waits before it looks again though nobody wakes it."""
        next_one = math.inf if self._all_paused() else min(self._wake, self._retry_at) - self._clock()
        return max(0.01, min(TICK_S, JOIN_AFTER_S if self._active else TICK_S, next_one))

    def _tick_loop(self) -> None:
        while not self._stopping.wait(TICK_S):
            try:
                self.tick()
            except Exception as error:
                self._log_trouble(error)

    def _log_trouble(self, error: Exception) -> None:
        """A thread goes on whatever fails. Trouble of the machine is logged once, until another one comes."""
        if not isinstance(error, SpoolError | MemoryError):
            log.error("%s failed; it goes on", threading.current_thread().name, exc_info=error)
        elif str(error) != self._last_error and not self._stopping.is_set():
            self._last_error = str(error)
            log.error("%s", error or "out of memory")

    # one sender's work

    def run(self, transport: Transport, first: bool = True) -> bool:
        """Deliver until nothing is due; False if nothing was. Of several senders the `first` one begins."""
        with self._changed:
            if not self._may_begin(first):
                return False
            self._active += 1
            self._taken_at = self._monotonic()  # Nobody joins this sender before it has had its time.
        held: list[_Work] = []  # what this sender has: a delivery, and one that follows it
        try:
            while held or self._begin(transport, held):
                outcome = transport.send(held[0].message, functools.partial(self._look_ahead, held))
                self._conclude(held.pop(0), outcome)
                if held and not self._may_follow(held[0]):
                    self._release(held.pop().delivery)
                    transport.close()
        finally:
            for work in held:
                self._release(work.delivery)
            with self._changed:
                self._active -= 1
            self._flush()
        return True

    def _may_begin(self, first: bool) -> bool:
        """May an idle sender begin? The first one does the work; another joins when deliveries wait and none has gone
        for JOIN_AFTER_S."""
        if self._busy() or not (first or self._active):
            return False
        return not self._all_paused() and self._find_due()

    def _busy(self) -> bool:
        """Do the senders at work keep up?"""
        return bool(self._active) and self._monotonic() - self._taken_at < JOIN_AFTER_S

    def _begin(self, transport: Transport, held: list[_Work]) -> bool:
        """Take the next delivery; False if none is due. The connection comes before anything is created, so that what
        waits for a server that is away stays free to be planned anew."""
        while not self._stopping.is_set():
            began = self._monotonic()
            with self._changed:
                if self._all_paused() or not self._find_due():
                    return False
                self._taken_at = began
                if probing := self._paused(EVERYTHING):
                    probing.until = began + probing.length  # Nobody else tries meanwhile.
            try:
                transport.open()
            except Unavailable as error:
                self._note_failure(EVERYTHING, error.outcome, began)
                return False
            with self._changed:
                if probing and probing.outcome.step in STEPS_BEFORE_MAIL:
                    self._resume(EVERYTHING, probing)
                delivery = self._take()
            if delivery and self._prepare(delivery, held):
                return True
            if probing:
                probing.until = 0.0  # The server was not asked.
        return False

    def _look_ahead(self, held: list[_Work]) -> PreparedMessage | None:
        """The next message, if one is due: for the transport, which begins it together with the end of this one."""
        with self._changed:
            if self._stopping.is_set() or self._paused(EVERYTHING) or not self._find_due():
                return None
            delivery = self._take()
        return held[-1].message if delivery and self._prepare(delivery, held) else None

    def _may_follow(self, work: _Work) -> bool:
        """May a delivery still go that was begun before the outcome of the last one was known? A probe may."""
        with self._changed:
            paused = self._paused(work.delivery.recipient)
            paused_meanwhile = self._paused(EVERYTHING) or (paused and work.began < paused.since)
            return not (self._stopping.is_set() or paused_meanwhile)

    def _take(self) -> Delivery | None:
        """The next delivery. Who finds the queue empty fills it with what is due; what was planned is created."""
        if not self._queue:
            now = self._clock()
            created = self._outbox.create(self._planned, now) if self._planned else ()
            self._queue.extend(self._retries)
            self._queue.extend(one for one in created if one.recipient not in self._troubles_now())
            for message in self._planned if self._policy.window else ():
                self._history.kinds[message.kind] = now
                self._history.groups.update(dict.fromkeys(message.groups, now))
            self._retries, self._planned = [], []
        if not self._queue:
            return None
        delivery = self._queue.popleft()
        self._with_senders[delivery.number] = delivery
        self._taken_at = self._monotonic()
        if probed := self._paused(delivery.recipient):
            probed.until = self._taken_at + probed.length  # Nobody else tries meanwhile.
        return delivery

    def _release(self, delivery: Delivery, tried: bool = False) -> None:
        """A sender has it no longer. If it is open in the database, it will be found there at its time."""
        with self._changed:
            probed = self._paused(delivery.recipient)
            if probed and not tried:
                probed.until = 0.0  # Nothing was found out about its recipient.
            self._with_senders.pop(delivery.number, None)
            if delivery.state == "open":
                self._retry_at = min(self._retry_at, delivery.next_try)
            if self._reporting == delivery.number:
                self._reporting = 0

    # what is due

    def _look_again(self) -> None:
        """Look for everything anew, because something has changed."""
        self._planned, self._retries = [], []
        self._retry_at = 0.0  # when the next open delivery is due
        self._wake = self._planned_at = 0.0  # the last plan holds until _wake ...
        self._planned_to = 0  # ... the entries up to this one
        self._news = True  # there may be entries that no plan has seen

    def _find_due(self) -> bool:
        """Is anything due? While all mail waits, one message finds out whether that is over."""
        if not (self._queue or self._retries or self._planned):
            now, most = self._clock(), 1 if self._paused(EVERYTHING) else FILL
            if self._policy.limit:
                budget = self._outbox.budget(now, self._policy.limit, self._with_senders)
                self._history.times, self._history.untried = budget
                full = len(self._history.times) >= self._policy.limit
                self._full_until = self._history.times[0] + DAY_S if full else 0.0
            self._find_retries(now, most)
            if len(self._retries) < most:
                self._plan(now, most)
        return bool(self._queue or self._retries or self._planned)

    def _troubles_now(self) -> set[str]:
        """The recipients whose last delivery failed."""
        return {name for name, trouble in self._troubles.items() if trouble.failures and name != EVERYTHING}

    def _find_retries(self, now: float, most: int) -> None:
        """Find open deliveries that are due; to a recipient in trouble the one least recently tried, and only while no
        other is with a sender. Those that were tried before need a free place in the daily limit."""
        limit, with_senders = self._policy.limit, self._with_senders.values()
        room = limit - len(self._history.times) - self._history.untried if limit else math.inf
        troubled = self._troubles_now()
        if now >= self._retry_at:
            self._retries, self._retry_at = self._outbox.due(now, self._with_senders, troubled, most, room)
            room -= sum(one.tried_at > 0 for one in self._retries)
        for name in sorted(troubled - {one.recipient for one in with_senders}):
            paused = self._paused(name)
            if not paused or self._monotonic() >= paused.until:
                found = self._outbox.least_recently_tried(name, math.inf if paused else now)
                if found and (room > 0 or not found.tried_at):
                    self._retries.append(found)
                    room -= found.tried_at > 0
                if paused and not found:  # Nothing is left to try: the next new message finds out.
                    paused.paused, paused.failures = False, FAILURES_TO_PAUSE - 1
                    self._wake = 0.0  # What waits for this recipient is planned now.
        if limit:  # What is tried again takes a place as what was never tried does.
            self._history.untried = int(limit - len(self._history.times) - room)

    def _plan(self, now: float, most: int) -> None:
        """Ask the policy. Entries that the plan has held are not looked at again before their time."""
        if not self._planned_at <= now < self._wake:  # Their time has come, or the clock was set back.
            self._planned_to, self._wake, self._news = 0, math.inf, True
        if not self._news:
            return
        self._history.paused = frozenset(name for name in self._troubles if self._paused(name))
        seen = _Seen(self._outbox.pending(self._planned_to), self._planned_to)
        plan = self._policy.plan(seen, self._history, now, most)
        self._planned, self._planned_to, self._planned_at = plan.due, seen.last, now
        self._news = not seen.exhausted
        if plan.wake is not None and plan.wake < self._wake:
            self._wake = plan.wake
            if plan.why != self._why:
                self._why = plan.why
                log.warning("alerts are held until %s: %s", local_time(plan.wake), plan.why)
        if not (seen.exhausted or self._policy.window):  # In a backlog the newest do not wait behind all the others.
            newest = [entry for entry in self._outbox.newest(max(1, most // 4)) if entry.seq > seen.last]
            self._planned[:0] = self._policy.plan(newest, self._history, now, most).due

    # making a mail of a delivery

    def _prepare(self, delivery: Delivery, held: list[_Work]) -> bool:
        """Render the mail and add it to what the sender has; False: it does not go out now."""
        began = self._monotonic()
        entries: Sequence[Entry] = ()
        try:
            entries = self._outbox.load(delivery)
            if not entries:  # All of it was dropped meanwhile.
                self._finish(delivery._replace(state="dropped"))
                return False
            delivery = self._with_report(delivery)
            message = self._policy.render(delivery, entries)
            prepared = PreparedMessage(message, delivery.recipient)
            pictures = any(entry.has_picture for entry in entries)
            held.append(_Work(delivery, prepared, message.about, pictures, began, self._clock_offset))
            return True
        except Damaged as error:
            log.error("%s: %s; it counts as failed", self._outbox.path, error)
            self._fail_entry(error.seq, "damaged on disk")
        except (SpoolError, MemoryError) as error:  # That is about us, not about the mail.
            self._log_trouble(error)
            self._stopping.wait(TICK_S)
        except Exception as error:  # One that cannot be composed must not stop the others.
            log.exception("a mail cannot be composed")
            bad = [one for one in entries if len(entries) == 1 or not self._can_render(delivery, one)] or entries
            for entry in bad:
                self._fail_entry(entry.seq, f"cannot be composed: {type(error).__name__}")
        self._release(delivery)
        return False

    def _can_render(self, delivery: Delivery, entry: Entry) -> bool:
        try:
            self._policy.render(delivery, [entry])
        except Exception as error:
            return isinstance(error, MemoryError)
        return True

    def _fail_entry(self, seq: int, why: str) -> None:
        try:
            self._outbox.fail_entry(seq, why)
            self._unreported = True
        except SpoolError as error:
            self._log_trouble(error)
            self._stopping.wait(TICK_S)

    def _with_report(self, delivery: Delivery) -> Delivery:
        """The delivery, with the failures that it shall report: one mail at a time does."""
        with self._changed:
            if not self._unreported or self._reporting:
                return delivery
            found, why = self._outbox.unreported()
            self._unreported = bool(found)
            others = tuple(seq for seq in found if seq not in delivery.entries)
            self._reporting = delivery.number if others else 0
        return delivery._replace(reports=others, why=why if others else "")

    # what became of it

    def _conclude(self, work: _Work, outcome: Outcome) -> None:
        """Note an outcome, and what it says about the server and the recipient."""
        delivery, now = work.delivery, self._clock()
        if outcome.about_us:
            self._note_failure(EVERYTHING, outcome, work.began)
            self._release(delivery)
            return
        first_failed, step = delivery.first_failed, self._clock_offset - work.clock_offset
        if first_failed and (step > 0 or first_failed >= self._started + work.clock_offset):
            delivery = delivery._replace(first_failed=first_failed + step)  # The clock may have been set meanwhile.
        with self._changed:
            paused = self._paused(delivery.recipient)
            probe, accepted_at = bool(paused and work.began >= paused.since), self._accepted_at
        after = after_attempt(delivery, outcome, now, self._rules, work.has_pictures, probe, accepted_at)
        self._note_success(EVERYTHING)
        if outcome.verdict is Verdict.SENT:
            self._accepted_at = now
            self._note_success(delivery.recipient)
            log.info("sent %s to %s", work.about, delivery.recipient)
        else:
            then = "tried again" if after.max_bytes == delivery.max_bytes else "tried again without pictures"
            then = "it has failed" if after.state == "failed" else f"it is {then}"
            log.warning("%s to %s: %s (%s; %s)", work.about, delivery.recipient, outcome, outcome.verdict.value, then)
            self._note_failure(delivery.recipient, outcome, work.began)
        self._finish(after)
        if self._outbox.unwritten() >= UNWRITTEN_MAX:
            self._flush()

    def _finish(self, delivery: Delivery) -> None:
        self._outbox.finish(delivery, self._clock())
        with self._changed:
            self._release(delivery, tried=True)
            self._unreported |= delivery.refused or delivery.state == "failed"
            if self._policy.limit and delivery.state != "open":
                self._planned_at = math.inf  # Its place in the daily limit may be free: plan anew.

    def _flush(self) -> None:
        """Write the outcomes. While they cannot be written nothing new is begun, or it would be sent twice."""
        while True:
            try:
                return self._outbox.flush()
            except SpoolError as error:
                self._log_trouble(error)
                if self._stopping.wait(TICK_S):
                    return

    # pauses

    def _paused(self, key: str) -> Trouble | None:
        trouble = self._troubles.get(key)
        return trouble if trouble and trouble.paused else None

    def _all_paused(self) -> bool:
        """Does all mail wait, and is it not yet time to find out whether it must?"""
        paused = self._paused(EVERYTHING)
        return paused is not None and self._monotonic() < paused.until

    def _note_failure(self, key: str, outcome: Outcome, began: float) -> None:
        """A failure about us, or of a recipient. It pauses the key, or makes its pause longer, unless the attempt had
        begun before that."""
        with self._changed:
            trouble = self._troubles.setdefault(key, Trouble(outcome))
            news = trouble.failures == 0 or (trouble.outcome.step, trouble.outcome.code) != (outcome.step, outcome.code)
            trouble.outcome = outcome
            trouble.failures += 1
            self._queue = deque(one for one in self._queue if one.recipient != key)  # One at a time from now on.
            enough = key == EVERYTHING or (self._rules.pause_recipients and trouble.failures >= FAILURES_TO_PAUSE)
            if enough and not (trouble.paused and began < trouble.since):
                self._pause(trouble)
                news |= not trouble.paused
                if not trouble.paused:
                    trouble.paused, trouble.successes = True, 0
                    self._look_again()
            if not news:
                return
        what = f"mail to {key}" if key != EVERYTHING else "all mail"
        then = f"waits; next try in {trouble.length:.0f} s" if trouble.paused else "is in trouble"
        log.error("%s %s: %s. %s", what, then, outcome, self._advise(outcome))

    def _pause(self, trouble: Trouble) -> None:
        """Set when the next probe goes: the pause doubles, from one that fits the trouble."""
        outcome, rules = trouble.outcome, self._rules
        away = outcome.code == 0 and outcome.step in STEPS_BEFORE_MAIL
        longest = min(PROBE_MAX_S, rules.longest) if away else rules.longest
        shortest = LOGIN_PAUSE_S if outcome.step == "login" and outcome.code >= 500 else rules.first
        trouble.length = min(longest, max(shortest, 2 * trouble.length))
        trouble.since = self._monotonic()
        trouble.until = trouble.since + trouble.length * random.uniform(0.8, 1.0)

    def _note_success(self, key: str) -> None:
        with self._changed:
            if trouble := self._troubles.get(key):
                self._resume(key, trouble)
                trouble.successes += 1
                if trouble.successes >= SUCCESSES_TO_FORGET:
                    del self._troubles[key]

    def _resume(self, key: str, trouble: Trouble) -> None:
        """The trouble with a key is over."""
        if trouble.paused:
            log.info("%s", "the mail server is back" if key == EVERYTHING else f"mail to {key} goes again")
        trouble.length = min(trouble.length, PROBE_MAX_S / 2)  # The next one is twice as long.
        if trouble.failures:
            trouble.failures, trouble.paused = 0, False
            self._look_again()
            self._changed.notify_all()

    # every half second

    def tick(self) -> None:
        """Outcomes that are not written, requests of the command line, steps of the clock, what `queue` shows."""
        self._outbox.flush()
        self._follow_clock()
        if self._answer_requests():
            self._void_changed()
            with self._changed:
                for trouble in self._troubles.values():
                    trouble.until = trouble.length = 0.0
                self._look_again()
                self._changed.notify_all()
        if self._monotonic() - self._kept_house >= HOUSEKEEPING_S:
            self._kept_house = self._monotonic()
            self._keep_house()
        self._publish()

    def _read_history(self) -> History:
        window = self._policy.window
        return self._outbox.history(self._clock() - window) if window else History()

    def _void_changed(self) -> None:
        if number := self._outbox.void_changed(self._policy.recipients):
            log.info("%d deliveries to somebody who is no longer a recipient are planned anew", number)

    def _follow_clock(self) -> None:
        """When the clock was set, times that were noted before move with it, so that nothing ages by that. Set back, it
        may have been right before this program began: what was noted then stays."""
        step = self._clock() - self._monotonic() - self._clock_offset
        if abs(step) > CLOCK_STEP_S:
            began = self._started + self._clock_offset if step < 0 else -math.inf
            until = self._monotonic() + self._clock_offset
            self._outbox.shift_times(began, until, step)
            self._outbox.limit_times(self._clock(), max(self._rules.longest, UNANSWERED_PAUSE_S))
            self._clock_offset += step
            self._published = None
            with self._changed:
                self._history = self._read_history()
                self._accepted_at += step if self._accepted_at >= began else 0.0
                self._queue.clear()  # It is found again, with its times moved.
                self._look_again()

    def _keep_house(self) -> None:
        now, oldest = self._clock(), self._clock() - self._policy.window
        while self._outbox.prune(now) and not self._stopping.is_set():
            pass
        with self._changed:
            history = self._history
            history.groups = {group: when for group, when in history.groups.items() if when >= oldest}
            history.kinds = {kind: when for kind, when in history.kinds.items() if when >= oldest}
        if self._outbox.half_full():
            counts = self._outbox.counts()
            words = "the spool is more than half full: %d alerts wait, %d have failed; see `smtp_module.py queue`"
            log.error(words, counts["queued"], counts["failed"])

    def _answer_requests(self) -> bool:
        """Carry out what the command line asks for in files beside the spool, and answer in the same files."""
        spool, changed = self._outbox.path, False
        for path in filter(Path.is_file, sorted(spool.parent.glob(f"{glob.escape(spool.name)}.request-*"))):
            try:
                request = json.loads(path.read_text("utf-8"))
                if type(request) is dict:  # It is answered, but perhaps nobody waits for the answer any more.
                    if time.time() - path.stat().st_mtime > HOUSEKEEPING_S:
                        path.unlink()
                    continue
                what, name = map(str, request)
                if what not in ("retry", "drop"):
                    raise ValueError(f"there is no request {what!r}")
                failed, others = self._outbox.retry(name) if what == "retry" else self._outbox.drop(name)
                write_request(path, {"failed": failed, "others": others})
                log.info("%s %s: %d that had failed, %d others", what, name, failed, others)
                changed = True
            except (ValueError, TypeError, OSError, RecursionError) as error:
                log.error("%s: not a request: %s", path, error)
                with contextlib.suppress(OSError):
                    path.unlink()
        return changed

    def _publish(self) -> None:
        """Store for `queue` what is held, why and until when; only when that has changed."""
        with self._changed:
            ahead = self._clock() - self._monotonic()
            paused = {key: trouble for key, trouble in self._troubles.items() if trouble.paused}
            pauses = {key: {"why": str(one.outcome), "until": one.until + ahead} for key, one in paused.items()}
            holds = self._why and self._wake < math.inf and self._planned_to
            hold = {"why": self._why, "until": self._wake, "upto": self._planned_to} if holds else {"upto": 0}
            full = {"why": "the daily limit is used up", "until": self._full_until} if self._full_until else None
            published = [(key, str(one.outcome), one.until) for key, one in paused.items()], hold, full
        recipients = {" ".join(group): self._policy.recipients(*group) for group in self._outbox.groups()}
        if published != self._published or not self._groups.issuperset(recipients):
            self._outbox.publish_status(pauses=pauses, hold=hold, full=full, recipients=recipients)
            self._published, self._groups = published, set(recipients)


class _Seen:
    """Entries for a plan, which remembers how far it has read them."""

    def __init__(self, entries: Iterator[PendingEntry], last: int) -> None:
        self._entries, self.last, self.exhausted = entries, last, False

    def __iter__(self) -> Iterator[PendingEntry]:
        for entry in self._entries:
            self.last = entry.seq
            yield entry
        self.exhausted = True


def keep_buffers() -> None:
    """Have malloc keep buffers as large as pictures: glibc maps anew what is larger than all that was ever freed."""
    bytes(8 << 20)


def systemd_notify(state: str) -> None:
    """Tell systemd (Type=notify) READY=1 or STOPPING=1; without systemd nothing happens. See sd_notify(3)."""
    if path := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode("ascii"), f"\0{path[1:]}" if path.startswith("@") else path)


# ───────────────────────────────────────────── Sending one mail ─────────────────────────────────────


class SendError(Exception):
    """A mail was not sent, or not to everybody; `outcomes` says what became of each recipient."""

    def __init__(self, outcomes: Mapping[str, Outcome], sentence: str = "") -> None:
        failed = [f"{n}: {outcome}" for n, outcome in outcomes.items() if outcome.verdict is not Verdict.SENT]
        has_it = ", ".join(name for name, outcome in outcomes.items() if outcome.verdict is Verdict.SENT)
        parts = ("; ".join(failed), f"Sent to {has_it}" if has_it else "", sentence)
        super().__init__(". ".join(filter(None, parts)))
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

    Returns when the server has accepted it for every recipient. Raises ConfigError, ValueError (an address is wrong)
    or SendError, which says who has it.
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
    send_now(Message(address(sender), data), (*to, *copies), config)


def attached(name: str, data: bytes) -> Attachment:
    """An attachment whose type is guessed by its name."""
    return Attachment(name, mimetypes.guess_type(name)[0] or "application/octet-stream", data)


def send_now(message: Message, recipients: Sequence[str], config: SMTPConfig) -> None:
    """One transaction a recipient, over one connection. Trouble about us ends the round for the rest, anything else
    goes on. Raises SendError."""
    outcomes: dict[str, Outcome] = {}
    with contextlib.closing(SMTPClient(config)) as client:
        for recipient in dict.fromkeys(recipients):
            last = next(reversed(outcomes.values()), None)
            if last and last.about_us:
                outcomes[recipient] = last
            else:
                outcomes[recipient] = client.send(PreparedMessage(message, recipient))
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
    body = args.body
    if body is None:
        body = "" if sys.stdin and sys.stdin.isatty() else "-"
    send_email(
        args.subject,
        _read_bytes("-").decode("utf-8", "replace") if body == "-" else body,
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
    recipients = _to_check(args, config)
    outcomes: dict[str, Outcome] = {}
    with contextlib.closing(SMTPClient(config, _show_step)) as client:
        for recipient in recipients:
            outcomes[recipient] = outcome = _checked(client, config, recipients, recipient, args.send)
            if outcome.verdict is not Verdict.SENT:
                step = {"mail": "sender", "rcpt": "recipient"}.get(outcome.step, outcome.step)
                print(f"FAIL  {step:<10} {outcome.said}" + (f" ({recipient})" if step == "recipient" else ""))
                if sentence := advice(outcome, config.host):
                    print(f"      {sentence}")
            if outcome.about_us:
                break
    code = exit_code(outcomes.values())
    if code == EX_OK:
        accepted, more = "the mail was accepted: look into the mailbox", "only --send tries the rest, with a real mail"
        print(f"all is well; {accepted if args.send else more}")
    return code


def _to_check(args: argparse.Namespace, config: SMTPConfig) -> tuple[str, ...]:
    recipients: tuple[str, ...] = ()
    if args.to:
        recipients = addresses(args.to)
    else:
        recipients = Settings.load(env_file=args.env_file).read("ALERT_RECIPIENT", addresses, recipients)
    if config.debug:
        where = f"{DEBUG_HOST}:{config.port}, without TLS or login"
        print(f"SMTP_HOST is not set: mail goes to the debug receiver on {where}")
        recipients = recipients or ("alerts@localhost",)
    if not recipients:
        raise ConfigError("ALERT_RECIPIENT: missing; set it, or name a recipient with --to ADDRESS")
    return recipients


def _checked(
    client: SMTPClient, config: SMTPConfig, recipients: Sequence[str], recipient: str, send: bool
) -> Outcome:
    try:
        outcome = client.verify(recipient)
    except Unavailable as error:
        return error.outcome
    if send and outcome.verdict is Verdict.SENT:
        outcome = client.send(PreparedMessage(_test_mail(config, recipients), recipient))
        if outcome.verdict is Verdict.SENT:
            _show_step("sent", recipient)
    return outcome


def _show_step(step: str, words: str) -> None:
    print(f"ok    {step:<10} {printable(words)}", flush=True)


def _test_mail(config: SMTPConfig, recipients: Sequence[str]) -> Message:
    """A mail like an alert, with a picture."""
    text = f"This is a test mail from {hostname()}. Alerts will arrive like this one, with their picture.\n"
    data = compose_pieces(
        subject="Test mail", sender=config.sender, to=recipients, text=text,
        attachments=[attached("test.png", TEST_PNG)], headers={"Auto-Submitted": "auto-generated"},
    )  # fmt: skip
    return Message(address(config.sender), data, "a test mail")


TEST_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAFklEQVR42mNk+M9AEmAiTfmohlENQ1QDAD2mAR/yTe1dAAAAAElFTkSuQmCC"
)


def _spool(args: argparse.Namespace) -> Path:
    return Path(args.spool or Settings.load(env_file=args.env_file).read("ALERT_SPOOL", str, "spool/alerts.db"))


def command_queue(args: argparse.Namespace) -> int:
    """`queue`: what waits, is held or failed."""
    rows = read_queue(_spool(args))
    if args.json:
        print(json.dumps(rows))
        return EX_OK
    for row in rows:
        to = ", ".join(row["recipients"]) or "whom the routes say"
        since = local_time(from_iso(row["since"]))
        print(f"{row['state']:<8} {row['id']}  {printable(row['group'])}  since {since}  to {to}")
        if row["next"] or row["error"]:
            due = f"next try {local_time(from_iso(row['next']))}" if row["next"] else "no more tries"
            tries = "1 try" if row["tries"] == 1 else f"{row['tries']} tries"
            print(f"         {tries}, {due}  {printable(row['error'] or '')}".rstrip())
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
            failed, others = outbox.retry(args.id) if args.command == "retry" else outbox.drop(args.id)
    except SpoolBusy:
        try:
            failed, others = _request(path, args.command, args.id)
        except OSError as error:
            fail(EX_TEMPFAIL, f"the request cannot be left beside {path}: {error.strerror}")
    if args.command == "retry":
        print(f"retry: {failed} failed wait again, {others} held are tried now")
    else:
        print(f"drop: {failed + others}")
    return EX_OK


def _request(path: Path, what: str, name: str) -> tuple[int, int]:
    """Leave a request beside the spool, and wait until its owner has answered it; how many had failed, and how many
    others there were. Raises OSError."""
    request = Path(f"{path}.request-{time.time_ns()}")
    write_request(request, [what, name], 0o644)  # root may ask, and another user own the spool
    until = time.monotonic() + 5.0
    while time.monotonic() < until:
        time.sleep(0.05)
        if not request.exists():
            fail(EX_TEMPFAIL, "the running program did not accept the request; see its log")
        if type(done := json.loads(request.read_text("utf-8"))) is dict:
            request.unlink()
            return done["failed"], done["others"]
    fail(EX_TEMPFAIL, "the running program has not answered yet; the request stays")


# sendmail: what local programs write goes out as strict servers want it: domains in all addresses, ASCII alone, lines
# of at most 998 bytes. A mail that is right already keeps every byte of its body.


def _sendmail_flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sendmail", description="Send the mail on standard input.", allow_abbrev=False
    )
    add = parser.add_argument
    add("-t", action="store_true", help="recipients from To, Cc and Bcc, or from Resent-To, Resent-Cc and Resent-Bcc")
    add("-i", action="store_true", help="a line with a single dot does not end the mail")
    add("-f", "-r", dest="sender", metavar="FROM", help="envelope sender")
    add("-F", dest="name", metavar="NAME", default="", help="the sender's name, where the mail has none")
    add("-o", action="append", default=[], help="-oi is -i; others are taken and ignored")
    add("-b", dest="mode", default="m", metavar="m", help="-bm is how it always works; other modes are refused")
    for ignored in "BLNORVXe":
        add(f"-{ignored}", help="taken and ignored")
    for ignored in "GUmnv":
        add(f"-{ignored}", action="store_true", help="taken and ignored")
    add("--env-file", metavar="FILE")
    add("recipients", nargs="*", metavar="TO")
    args = parser.parse_intermixed_args(argv)
    if args.mode != "m":
        parser.error(f"-b{args.mode} is not supported: give a whole mail on standard input, or speak SMTP to SMTP_HOST")
    return args


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
        resent = [value for name, value in fields if name.lower() in ("resent-to", "resent-cc", "resent-bcc")]
        found = resent or [value for name, value in fields if name.lower() in ("to", "cc", "bcc")]
        names += [plain for _, plain in email.utils.getaddresses(found) if plain]
    if not owner and any(is_local(name, owner) for name in names):
        raise ConfigError("ALERT_RECIPIENT: missing; it gets the mail for users of this machine, like root")
    meant = [owner if is_local(name, owner) else (address(name),) for name in names]
    to = tuple(dict.fromkeys(itertools.chain(*meant)))
    if not to:
        raise ValueError("no recipient: name one, or use -t with a To header")
    sender = config.sender if args.sender is None or is_local(args.sender, owner) else args.sender
    null = args.sender is not None and args.sender.strip("<> ") == ""
    envelope_sender = "" if null else address(sender)
    shown = "undisclosed-recipients:;" if args.t else header_addresses(to)
    data = completed(fields, body, to=shown, sender=config.sender, writer=args.name, owner=owner)
    send_now(Message(envelope_sender, data), to, config)
    return EX_OK


def is_local(text: str, owner: Collection[str]) -> bool:
    """Does this address mean a user of this machine: without a domain, at localhost, or at this machine's name?

    A machine may be named like the domain of its owner's mail; that domain's mailboxes are elsewhere.
    """
    domain = (email.utils.parseaddr(text)[1] or text).rpartition("@")[2].lower().rstrip(".")
    if "@" not in text or domain == "localhost.localdomain" or is_loopback(domain.strip("[]")):
        return True
    if domain in {name.rpartition("@")[2].lower() for name in owner}:
        return False
    here = socket.gethostname().lower()
    short = here.partition(".")[0]
    # The full name may have to be asked of a name server, so it is the last to be looked at.
    return domain in (here, short) or (domain.startswith(f"{short}.") and domain == socket.getfqdn().lower())


_FIELD = rb"([!-9;-~]{1,200})[ \t]*:([^\r]*(?:\r\n[ \t][^\r]*)*)\r\n"  # RFC 5322 2.2


def split_fields(raw: bytes) -> tuple[list[tuple[str, str]], bytes]:
    """The header fields of a mail as a local program writes it, unfolded nowhere, and its body; lines end in CRLF."""
    raw = re.sub(rb"\AFrom [^\r\n]*\r?\n", b"", raw)  # the line that separates mails in a mailbox file
    raw = re.sub(rb"\r\n|\r|\n", b"\r\n", raw.replace(b"\0", b""))
    raw += b"" if raw.endswith(b"\r\n") else b"\r\n"
    head = re.match(b"(?:%s)*" % _FIELD, raw)
    assert head  # it matches nothing, too
    fields = [(name.decode(), _guessed(value.strip())) for name, value in re.findall(_FIELD, head[0])]
    return fields, raw[head.end() :].removeprefix(b"\r\n")


def _guessed(text: bytes) -> str:
    """Text whose charset nobody says: UTF-8, or else the Latin-1 of old programs."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("latin-1")


WRITER_FIELDS = frozenset({"from", "sender", "resent-from", "resent-sender"})
READER_FIELDS = frozenset({"to", "cc", "reply-to", "resent-to", "resent-cc"})
LEFT_OUT = frozenset({"bcc", "resent-bcc", "return-path"})  # nobody is to see these, or the last server writes them
ONCE = frozenset({"to", "cc", "subject", "date", "message-id", "in-reply-to", "references", "mime-version"}) | (
    {"from", "sender", "reply-to", "content-type", "content-transfer-encoding"}
)  # RFC 5322 section 3.6 and RFC 2045 section 3; Gmail refuses a second one


def completed(
    fields: Sequence[tuple[str, str]], body: bytes, *, to: str, sender: str, writer: str, owner: Sequence[str]
) -> list[bytes]:
    """The mail as it goes out, with what it lacks: From, To, Date, Message-ID, domains in its addresses.

    `to` and `sender` take the place of missing ones, `writer` that of a missing name of the sender.
    """
    account = address(sender)
    known: set[str] = set()
    head: list[tuple[str, str]] = []
    mime = ""
    for name, value in fields:
        key = name.lower()
        if key in LEFT_OUT or (key in known and key in ONCE):
            continue
        shown = value
        if key in WRITER_FIELDS:
            shown = with_domains(value, [account], owner, writer)
        elif key in READER_FIELDS:
            shown = with_domains(value, owner or [account], owner)
        if key in WRITER_FIELDS | READER_FIELDS and not re.search("[@:]", shown):  # it names nobody
            continue
        known.add(key)
        if key.startswith("content-"):
            mime += f"{name}: {shown}\r\n"
        else:
            head.append((name, shown))
    wanted = {
        "From": header_address(f"{writer} <{account}>" if writer else sender),
        "To": to,
        "Date": email.utils.formatdate(localtime=True),
        "MIME-Version": "1.0",
        "Message-ID": email.utils.make_msgid(domain=hostname()),
    }
    head += [(name, value) for name, value in wanted.items() if name.lower() not in known]
    lines = "".join(field_line(name, value) for name, value in head)
    return [lines.encode("ascii", "replace"), seven_bit(mime.encode("utf-8") + b"\r\n" + body)]


def with_domains(value: str, instead: Sequence[str], owner: Sequence[str], writer: str = "") -> str:
    """An address header in which the addresses `instead` stand for each local one, whose name stays as the name.

    A header that needs no change, or holds no address (`undisclosed-recipients:;`), stays as it is.
    """
    found = [pair for pair in email.utils.getaddresses([value]) if pair[1]]
    if not found or (is_fit(value.encode("utf-8")) and not any(is_local(plain, owner) for _, plain in found)):
        return value
    entries = []
    for name, plain in found:
        local = is_local(plain, owner)
        label = name or (local and (writer or plain.partition("@")[0]))
        entries += [f"{label} <{one}>" if label else one for one in (instead if local else [plain])]
    return header_addresses(entries)


UNCHANGED = email.policy.compat32.clone(linesep="\r\n", max_line_length=900)  # for mails that the email package read


def field_line(name: str, value: str) -> str:
    """A header field with its CRLF: as it is where that is fit, else folded, with encoded words where it needs them."""
    line = f"{name}: {value}"
    if not is_fit(line.encode("utf-8")):
        value = re.sub(r"\r\n(?=[ \t])", "", value)
        words = textwrap.wrap(value, 76, break_long_words=False, break_on_hyphens=False)
        short = value.isascii() and max(map(len, words)) < 900
        line = f"{name}: " + ("\r\n ".join(words) if short else header_text(name, value))
    return f"{line}\r\n"


def seven_bit(content: bytes) -> bytes:
    """MIME fields, an empty line and a body, where necessary with a body encoded so that any server can carry it.

    Texts become quoted-printable, all else Base64, each part of a multipart for itself (RFC 2045 section 6.4).
    """
    if is_fit(content):
        return content
    message = email.message_from_bytes(content)
    for part in message.walk():
        _encode_fields(part)
        if part.is_multipart():
            part.preamble = part.epilogue = None
            if str(part.get("Content-Transfer-Encoding", "")).lower() in ("8bit", "binary"):
                part.replace_header("Content-Transfer-Encoding", "7bit")
        else:
            _encode_body(part)
    made = message.as_bytes(policy=UNCHANGED)
    return made if made.endswith(b"\r\n") else made + b"\r\n"


def _encode_fields(part: email.message.Message) -> None:
    """Turn raw letters in the fields of a part into RFC 2231 parameters or encoded words."""
    for name, raw in list(part.raw_items()):
        if raw.isascii():
            continue
        value = re.sub(r"\r?\n(?=[ \t])", "", _guessed(raw.encode("ascii", "surrogateescape")))
        if name.lower() not in ("content-type", "content-disposition"):
            part.replace_header(name, header_text(name, value))
            continue
        part.replace_header(name, value)
        for key, word in part.get_params([], name)[1:]:
            if isinstance(word, str) and not word.isascii():
                part.set_param(key, word, name, charset="utf-8")


def _encode_body(part: email.message.Message) -> None:
    """Encode the content of a part that has no parts, unless it is fit already."""
    if part.get_content_maintype() in ("multipart", "message"):  # It has no parts: its boundary is missing or wrong.
        del part["Content-Type"]
    content = part.get_payload(decode=True)
    if is_fit(part.as_bytes(policy=UNCHANGED)) or not isinstance(content, bytes):
        return
    text = part.get_content_maintype() == "text"
    if text and part.get_content_charset("us-ascii") in ("us-ascii", "ascii", "ansi_x3.4-1968", "unknown-8bit"):
        part.set_param("charset", "utf-8" if _guessed(content).encode("utf-8") == content else "iso-8859-1")
    encode = binascii.b2a_qp if text else base64.encodebytes
    del part["Content-Transfer-Encoding"]
    part["Content-Transfer-Encoding"] = "quoted-printable" if text else "base64"
    part.set_payload(encode(content).decode("ascii"))


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
    send("--body", metavar="TEXT", help="- or nothing: standard input, unless it is a terminal")
    send("--html", metavar="FILE")
    send("--attach", action="append", default=[], metavar="FILE")
    send("--from", dest="sender", metavar="ADDRESS")
    check = command("check", command_check, "try every step up to the mail server")
    check("--to", metavar="ADDRESS", help="ask about this recipient (default: ALERT_RECIPIENT)")
    check("--send", action="store_true", help="also send a real test mail")
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
    except RecursionError:  # The email package reads parts and comments by recursion.
        fail(EX_DATAERR, "the parts or comments of the mail are nested too deeply")
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
