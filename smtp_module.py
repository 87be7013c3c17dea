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
import email.header
import email.message
import email.parser
import email.policy
import email.utils
import encodings.idna  # noqa: F401  a lazy import fails when file descriptors have run out
import enum
import functools
import hashlib
import ipaddress
import itertools
import json
import logging
import mimetypes
import os
import random
import re
import secrets
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

__version__ = "1.0.0"

EX_OK, EX_USAGE, EX_DATAERR, EX_UNAVAILABLE, EX_TEMPFAIL, EX_NOPERM, EX_CONFIG = 0, 2, 65, 69, 75, 77, 78

DEBUG_HOST, DEBUG_PORT = "localhost", 1025  # where mail goes while nothing is configured
SUBMISSION_PORT, SUBMISSIONS_PORT = 587, 465  # RFC 6409, RFC 8314
TIMEOUT_S = 30.0
FINAL_DOT_TIMEOUT_S = 600.0  # RFC 5321 4.5.3.2.6: a shorter wait makes duplicates
SLOWEST_UPLOAD_BYTES_S = 2000  # a server that takes a mail more slowly than this is given up
REPLY_MAX_BYTES = 64 * 1024  # a reply that goes on for ever must not fill the memory
LINGER_S = 1.0  # a connection is kept this long after the last mail: the next server may serve one at a time
PROBE_MAX_S = 60.0  # an unreachable server is tried at least once a minute: a router comes back unannounced
TICK_S = 0.5  # requests of the command line and a vanished spool are noticed within this
BATCH_MAILS = 32  # mails frozen by one commit
MEMORY_S = 7 * 86400.0  # how long settled ids are remembered
DAY_S = 86400.0
CHECKED_MAX_BYTES = 256 << 20  # a larger spool is not read through at every start
PIECE = 76 * 1000  # Base64 is cut in pieces below malloc's 128 KiB mmap threshold: mapping costs more than the work

T = TypeVar("T")
log = logging.getLogger("mail")


# ───────────────────────────────────────────── Settings ─────────────────────────────────────────────
# Flags win over the environment, the environment over .env. Nothing else in the toolkit reads os.environ.


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


def read_env_file(path: str | None) -> dict[str, str]:
    """`KEY=value` lines; `#` comments, optional quotes and `export`. Without `path`: ./.env, if it is there."""
    try:
        text = Path(path or ".env").read_text("utf-8-sig")
    except FileNotFoundError:
        if path is None:
            return {}
        raise ConfigError(f"--env-file: there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path or '.env'}: cannot be read: {error}") from None
    values: dict[str, str] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip().removeprefix("export ").strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"{path or '.env'} line {number}: not KEY=value")
        values[name.strip()] = _unquote(value.strip())
    return values


def _unquote(value: str) -> str:
    if value[:1] in ("'", '"') and (end := value.find(value[0], 1)) > 0:
        return value[1:end]
    return re.split(r"(?:^|\s)#", value, maxsplit=1)[0].rstrip()


def duration(text: str) -> float:
    """`90`, `5m`, `1h`, `5d` -> seconds."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)\s*([smhd]?)", text.strip(), re.ASCII | re.IGNORECASE)
    if not match:
        raise ValueError(f"{printable(text)!r} is not a duration; write 90 (seconds), 5m, 1h or 5d")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2].lower()]


def size(text: str) -> int:
    """`500000`, `16MiB`, `2GiB` -> bytes."""
    match = re.fullmatch(r"(\d{1,15})\s*([kmg]?)(?:i?b)?", text.strip(), re.ASCII | re.IGNORECASE)
    if not match:
        raise ValueError(f"{printable(text)!r} is not a size; write 500000 (bytes), 16MiB or 2GiB")
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[match[2].lower()]


def whole(low: int, high: int) -> Callable[[str], int]:
    """A converter for whole numbers from `low` to `high`."""

    def convert(text: str) -> int:
        if not re.fullmatch(r"\d{1,12}", text.strip(), re.ASCII) or not low <= int(text) <= high:
            raise ValueError(f"{printable(text)!r} is wrong; give a whole number from {low} to {high}")
        return int(text)

    return convert


port = whole(0, 65535)


def one_of(*words: str) -> Callable[[str], str]:
    """A converter for one of some words, in any case."""

    def convert(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(f"{printable(text)!r} is unknown; write one of {', '.join(words)}")
        return text.lower()

    return convert


_ADDRESS = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,64}@(?:[A-Za-z0-9_.-]{1,255}|\[[0-9A-Fa-f.:]+\])", re.ASCII)


def address(text: str) -> str:
    """One mail address, its domain in ASCII (IDNA). The pattern lets nothing through that could end a command."""
    plain = email.utils.parseaddr(text)[1] if "<" in text else text.strip()
    local, _, domain = plain.rpartition("@")
    if not domain.isascii():
        with contextlib.suppress(UnicodeError):
            plain = f"{local}@{domain.encode('idna').decode('ascii')}"
    if not _ADDRESS.fullmatch(plain):
        raise ValueError(f"{printable(text)!r} is not a mail address; write name@example.com")
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
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


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


def start_logging(level: str = "info") -> None:
    """Log to standard error, one line a record."""
    logging.raiseExceptions = False  # a closed standard error must not cost anything
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
    if value.isascii() and "=?" not in value and len(value) < 200:
        return value
    return email.header.Header(value, "utf-8", header_name=name).encode(linesep="\r\n")


def header_address(value: str) -> str:
    """`Name <a@b>` or `a@b` for an address header, the name encoded."""
    name, plain = email.utils.parseaddr(one_line(value))
    return email.utils.formataddr((name, plain)) if name else plain or one_line(value)


def _file_name(attribute: str, name: str) -> str:
    name = one_line(name).replace("/", "_").replace("\\", "_") or "file"
    stem, dot, suffix = name.rpartition(".")
    name = f"{stem[:70]}{dot}{suffix[:20]}" if dot else name[:90]
    if name.isascii():
        return f'{attribute}="{name.replace(chr(34), "_")}"'
    return f"{attribute}*={email.utils.encode_rfc2231(name, 'utf-8')}"  # RFC 2231


@functools.lru_cache(maxsize=64)
def _date(second: int) -> str:
    return email.utils.formatdate(second, localtime=True)


def message_id(key: str, sender: str) -> str:
    """A Message-ID that is a function of `key`, so that a mail sent twice is recognisably the same."""
    domain = email.utils.parseaddr(sender)[1].rpartition("@")[2] or "localhost"
    return f"<{hashlib.sha256(key.encode('utf-8', 'replace')).hexdigest()[:40]}@{domain}>"


def _text_part(subtype: str, text: str) -> list[bytes]:
    text = re.sub("\r\n|\r|\n", "\r\n", text)
    head = f"Content-Type: text/{subtype}; charset=utf-8\r\nContent-Transfer-Encoding: "
    if text.isascii() and "\0" not in text and max(map(len, text.split("\r\n"))) < 900:
        return [f"{head}7bit\r\n\r\n{text}\r\n".encode("ascii")]
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


def _multipart(subtype: str, parts: Sequence[list[bytes]]) -> list[bytes]:
    if len(parts) == 1:
        return parts[0]
    boundary = f"=_{secrets.token_hex(12)}"  # not to be guessed, so that no text can pretend to be a part
    pieces = [f'Content-Type: multipart/{subtype}; boundary="{boundary}"\r\n\r\n'.encode("ascii")]
    for part in parts:
        pieces += [f"--{boundary}\r\n".encode("ascii"), *part, b"\r\n"]
    return [*pieces, f"--{boundary}--\r\n".encode("ascii")]


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
    related = _multipart("related", [_multipart("alternative", alternatives), *shown])
    lines = [
        f"Date: {_date(int(time.time() if date is None else date))}",
        f"From: {header_address(sender)}",
        f"To: {', '.join(map(header_address, to)) or 'undisclosed-recipients:;'}",
        *([f"Cc: {', '.join(map(header_address, cc))}"] if cc else []),
        f"Subject: {header_text('Subject', subject)}",
        f"Message-ID: {message_id or email.utils.make_msgid(domain=sender.rpartition('@')[2].strip('>') or None)}",
        *(f"{name}: {header_text(name, value)}" for name, value in (headers or {}).items()),
        "MIME-Version: 1.0\r\n",
    ]
    return ["\r\n".join(lines).encode("ascii", "replace"), *_multipart("mixed", [related, *others])]


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

    def __str__(self) -> str:
        return f"{self.step}: {self.code or ''} {self.detail}".replace(":  ", ": ").strip(": ")


class Unavailable(Exception):
    """The server cannot be used now; `outcome` says why."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(str(outcome))
        self.outcome = outcome


OUR_STEPS = frozenset({"resolve", "connect", "tls", "greeting", "ehlo", "login", "mail"})


def judge(step: str, code: int, reply: bytes | str) -> Outcome:
    """The verdict for a reply code at a step. Anything that is not a clear yes or no is a later."""
    words = reply.decode("utf-8", "replace") if isinstance(reply, bytes) else reply
    detail = printable(" ".join(words.split()))
    if 200 <= code < 400:
        return Outcome(Verdict.SENT, code, detail, step)
    enhanced = re.match(r"[245]\.\d{1,3}\.\d{1,3}\b", detail)
    status = enhanced[0] if enhanced else ""
    if status == "5.3.4" or (code == 552 and status != "5.2.2"):
        # 552 to RCPT alone means "too many recipients" in old servers: later (RFC 5321 4.5.3.1.10)
        verdict = Verdict.TRY_LATER if step == "rcpt" and not status else Verdict.REFUSED
        return Outcome(verdict, code, detail, step, too_big=True)
    ours = step in OUR_STEPS or code in (530, 534, 535) or status == "5.4.5"
    refused = 500 <= code < 600 and not ours
    return Outcome(Verdict.REFUSED if refused else Verdict.TRY_LATER, code, detail, step, ours)


def judge_error(step: str, error: Exception) -> Outcome:
    """The verdict for an exception at a step: a later, with words that a person understands."""
    if isinstance(error, smtplib.SMTPResponseException):
        return judge(step, error.smtp_code, error.smtp_error)
    if isinstance(error, ssl.SSLCertVerificationError):
        step, detail = "tls", f"certificate: {error.verify_message}"
    elif isinstance(error, ssl.SSLError):
        step, detail = "tls", str(error.reason or error)
    elif isinstance(error, TimeoutError):
        detail = "timed out"
    elif isinstance(error, smtplib.SMTPServerDisconnected | ConnectionError | EOFError):
        detail = "refused" if isinstance(error, ConnectionRefusedError) else "the server closed the connection"
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
    ("", "", r"5\.4\.5|quota|daily.*limit",
     "The provider's daily limit is used up; ALERT_DAILY_MAX and ALERT_COOLDOWN make fewer mails."),
    ("", "", "^530",
     "The server wants a login (or TLS) first: set SMTP_USER and SMTP_PASS, and leave SMTP_SECURITY on auto."),
    ("login", "", "", "The server refused the login: check SMTP_USER and SMTP_PASS."),
    ("tls", "", "hostname mismatch|doesn't match|not valid for",
     "The certificate is for another name: set SMTP_HOST to the name that stands in it."),
    ("tls", "", "expired",
     "The server's certificate has expired; its owner must renew it (or this machine's clock is wrong)."),
    ("tls", "", "certificate",
     "The certificate is signed by nobody this machine trusts: put the signer's certificate in a file and name it"
     " in SMTP_CAFILE."),
    ("tls", "", "wrong.version|not offered|record.layer",
     "The server does not speak TLS in this way on this port: 465 is SMTP_SECURITY=ssl, 587 is starttls."),
    ("resolve", "", "", "The name in SMTP_HOST was not found: check its spelling, and whether this machine's DNS works."),
    ("connect", "", "timed out", "Nobody answers. Providers often block port 25: use 587 or 465."),
    ("connect", r"localhost|127\.|::1", "refused",
     "Nothing listens there. For a test, start: python3 embedded_smtpd.py --debug"),
    ("connect", "", "refused", "Nothing listens on that port: check SMTP_HOST and SMTP_PORT."),
    ("mail", "", "^5", "The server takes no mail from this sender: set SMTP_FROM to an address of the account."),
    ("", "", "5\\.3\\.4|^552", "The mail is too big for the server or the mailbox is full."),
)  # fmt: skip


def advice(outcome: Outcome, host: str) -> str:
    """One sentence on what to do, or ""."""
    said = f"{outcome.code or ''} {outcome.detail}".strip()
    for step, where, what, sentence in ADVICE:
        if step in ("", outcome.step) and re.search(where, host, re.I) and re.search(what, said, re.I):
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
        host = settings.read("SMTP_HOST", _host, "")
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
        if self.timeout_s <= 0:
            raise ConfigError("SMTP_TIMEOUT: must be more than 0; 30 (seconds) is usual")
        if self.user and self.security == "none" and not is_loopback(self.host):
            raise ConfigError(f"SMTP_SECURITY: none would send the password in the clear to {self.host}; use starttls or ssl")
        if self.user and not self.password():
            raise ConfigError("SMTP_PASS: missing, though SMTP_USER is set; set it, SMTP_PASS_FILE or SMTP_PASS_COMMAND")
        if not f"{self.user}{self.password() if self.user else ''}".isascii():
            raise ConfigError("SMTP_PASS: holds a character outside ASCII, which SMTP logins do not carry; choose another")
        self.tls()

    def tls(self) -> ssl.SSLContext | None:
        """A context that verifies certificate and host name; None without TLS. Raises ConfigError."""
        if self.security == "none":
            return None
        try:
            context = ssl.create_default_context(cafile=self.cafile or None)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"SMTP_CAFILE: {self.cafile}: no usable certificates: {error}") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context


def _host(text: str) -> str:
    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if not re.fullmatch(r"[\w.:%-]{1,255}", host):
        raise ValueError(f"{printable(text)!r} is not a host; give a name or an IPv4 or IPv6 address")
    return host


def _sender(text: str) -> str:
    address(text)
    return one_line(text)


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
    password = settings.secret("SMTP_PASS")
    if not password and (path := settings.secret("SMTP_PASS_FILE").strip()):
        try:
            password = Path(path).read_text("utf-8").partition("\n")[0].rstrip("\r")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"SMTP_PASS_FILE: {path} cannot be read: {getattr(error, 'strerror', error)}") from None
    if not password and (command := settings.secret("SMTP_PASS_COMMAND").strip()):
        password = _command_output(command)
    if re.search(r"(^|\.)(gmail|googlemail|google)\.com$", host, re.I):
        password = re.sub(r"\s", "", password)  # Google shows app passwords in four groups
    return password


def _command_output(command: str) -> str:
    try:
        done = subprocess.run(command, shell=True, capture_output=True, timeout=30, check=True)
        return done.stdout.decode("utf-8").partition("\n")[0].rstrip("\r")
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as error:
        raise ConfigError(f"SMTP_PASS_COMMAND: failed ({type(error).__name__}); it must print the password") from None


def server_tls(cert: str, key: str, client_ca: str = "", *, names: str = "TLS_CERT and TLS_KEY") -> ssl.SSLContext:
    """A server's context, TLS 1.2 and later; with `client_ca`, clients must show a certificate. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key or None, password="")  # an encrypted key is an error, not a prompt
        if client_ca:
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{names}: cannot be used: {error}") from None
    return context


# ───────────────────────────────────────────── Transport ────────────────────────────────────────────


@dataclass(frozen=True)
class Envelope:
    """One transaction: who sends ("" is the null sender), who receives, and the mail in pieces of whole lines."""

    sender: str
    recipients: tuple[str, ...]
    data: Sequence[bytes]


class Transport(Protocol):
    """What a courier delivers through."""

    def open(self) -> None:
        """Connect, if not connected. Raises Unavailable."""

    def deliver(self, envelope: Envelope) -> dict[str, Outcome]:
        """One transaction; an outcome for each recipient. Trouble of network or server is an outcome, never raised."""

    def close(self) -> None:
        """End the connection politely, if there is one."""


class Dialogue(smtplib.SMTP):
    """smtplib's EHLO, STARTTLS and login, with every reply bounded in size and every wait by a deadline.

    smtplib's own timeout starts anew with each byte, and its replies have no end.
    """

    def __init__(self, config: SMTPConfig, report: Callable[[str, str], None]) -> None:
        self.step = "connect"
        self._config, self._report = config, report
        self._received = bytearray()
        self._masked = False
        self.deadline = time.monotonic() + 4 * config.timeout_s
        super().__init__(config.host, config.port, "localhost", config.timeout_s)
        self._report("greeting", "220")

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        """Called by smtplib to connect; each address of the name is tried."""
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        self._report("resolve", ", ".join(sorted(found)))
        sock = socket.create_connection((host, port), timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        here, peer = sock.getsockname()[0], sock.getpeername()[0]
        self.local_hostname = hostname() if "." in hostname() else f"[{'IPv6:' * (':' in here)}{here}]"
        self._report("connect", f"{peer} port {port}")
        if self._config.user and self._config.security == "none" and not is_loopback(peer):
            sock.close()
            raise OSError(f"the password would go in the clear to {peer}; use SMTP_SECURITY=starttls or ssl")
        if self._config.security == "ssl":
            self.step = "tls"
            sock = self._wrap(sock)
        self.step = "greeting"
        return sock

    def _wrap(self, sock: socket.socket) -> socket.socket:
        context = self._config.tls()
        assert context is not None
        try:
            wrapped = context.wrap_socket(sock, server_hostname=self._config.host)
        except BaseException:
            sock.close()
            raise
        self._report("tls", f"{wrapped.version()}, certificate valid for {self._config.host}")
        return wrapped

    def prepare(self) -> None:
        """EHLO, TLS and login, as configured. Raises what smtplib, ssl and socket raise."""
        self.step = "ehlo"
        self.ehlo_or_helo_if_needed()
        if self._config.security == "starttls":
            self.step = "tls"
            if not self.has_extn("starttls"):
                raise ssl.SSLError(1, "STARTTLS is not offered by the server")
            code, words = self.docmd("STARTTLS")
            if code != 220:
                raise smtplib.SMTPResponseException(code, words)
            self._received.clear()  # nothing said in the clear counts after the handshake (CVE-2011-0411)
            assert self.sock is not None
            self.sock = self._wrap(self.sock)
            self.does_esmtp, self.helo_resp, self.ehlo_resp, self.esmtp_features = False, None, None, {}
            self.step = "ehlo"
            self.ehlo_or_helo_if_needed()
        self._report("ehlo", " ".join(sorted(name.upper() for name in self.esmtp_features)) or "HELO")
        if self._config.user:
            self._login()

    def _login(self) -> None:
        self.step = "login"
        user, password = self._config.user, self._config.password()
        self._masked = True
        try:
            if self._config.auth == "xoauth2":
                token = f"user={user}\1auth=Bearer {password}\1\1"
                self.auth("XOAUTH2", lambda challenge=None: token if challenge is None else "")
            else:
                self.login(user, password)
        except smtplib.SMTPNotSupportedError as error:
            raise smtplib.SMTPAuthenticationError(535, f"{error}".encode()) from None
        finally:
            self._masked = False
        self._report("login", user)

    def putcmd(self, cmd: str, args: str = "") -> None:
        if self._config.trace:
            shown = f"{cmd} {args}".strip()
            if self._masked:
                shown = re.sub(r"^(AUTH +\S+)?.*", r"\1 ****", shown).strip()
            self._config.trace(f"C: {shown}")
        super().putcmd(cmd, args)

    def getreply(self) -> tuple[int, bytes]:
        """One whole reply. A reply that is not SMTP has code -1."""
        lines: list[bytes] = []
        total = 0
        while True:
            line = self._line()
            total += len(line)
            lines.append(line[4:].strip())
            if self._config.trace:
                self._config.trace(f"S: {line.decode('utf-8', 'replace').rstrip()}")
            if not line[:3].isdigit() or total > REPLY_MAX_BYTES:
                return -1, b"not an SMTP reply: " + line[:80]
            if line[3:4] != b"-":
                return int(line[:3]), b"\n".join(lines)

    def _line(self) -> bytes:
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > REPLY_MAX_BYTES:
                raise smtplib.SMTPServerDisconnected("endless reply")
            if self.sock is None:
                raise smtplib.SMTPServerDisconnected("not connected")
            if time.monotonic() > self.deadline:
                raise TimeoutError
            chunk = self.sock.recv(8192)
            if not chunk:
                raise smtplib.SMTPServerDisconnected("closed")
            self._received += chunk
        line = bytes(self._received[: end + 1])
        del self._received[: end + 1]
        return line


class SMTPTransport:
    """One connection to the configured server, kept while there is work."""

    def __init__(self, config: SMTPConfig, report: Callable[[str, str], None] = lambda step, words: None) -> None:
        self._config, self._report = config, report
        self._smtp: Dialogue | None = None
        self._dirty = False  # a transaction was left open: RSET comes first
        self._step = "connect"

    def open(self) -> None:
        """Connect and log in, unless connected. Raises Unavailable."""
        if self._smtp is not None:
            return
        smtp = Dialogue.__new__(Dialogue)  # kept at hand, because its step says how far the constructor came
        try:
            smtp.__init__(self._config, self._report)  # type: ignore[misc]
            smtp.prepare()
        except ConfigError as error:  # SMTP_PASS_COMMAND or SMTP_PASS_FILE failed just now
            smtp.close()
            raise Unavailable(Outcome(Verdict.TRY_LATER, 0, str(error), "login", ours=True)) from None
        except (OSError, smtplib.SMTPException, ValueError) as error:
            smtp.close()
            raise Unavailable(replace(judge_error(smtp.step, error), ours=True)) from None
        self._smtp, self._dirty = smtp, False

    def deliver(self, envelope: Envelope) -> dict[str, Outcome]:
        """One transaction. A kept connection that the server has closed meanwhile is opened anew, once."""
        kept = self._smtp is not None
        while True:
            try:
                self.open()
                return self._transaction(envelope)
            except Unavailable as error:
                return dict.fromkeys(envelope.recipients, error.outcome)
            except (OSError, smtplib.SMTPException, ValueError) as error:
                self._abort()
                if not (kept and self._step == "mail"):
                    return dict.fromkeys(envelope.recipients, judge_error(self._step, error))
                kept = False

    def _transaction(self, envelope: Envelope) -> dict[str, Outcome]:
        smtp = self._smtp
        assert smtp is not None and smtp.sock is not None
        self._step = "mail"
        pieces, length = dot_stuffed(envelope.data)
        limit = smtp.esmtp_features.get("size", "")
        if limit.isdigit() and 0 < int(limit[:18]) < length:
            too_big = judge("mail", 552, f"5.3.4 {length} bytes, the server takes {limit}")
            return dict.fromkeys(envelope.recipients, too_big)
        smtp.sock.settimeout(self._config.timeout_s)
        smtp.deadline = time.monotonic() + 4 * self._config.timeout_s
        if self._dirty:
            smtp.docmd("RSET")
        self._dirty = True
        outcomes, go = self._envelope(smtp, envelope, length if limit else 0)
        if go:
            self._step = "dot"
            smtp.deadline = time.monotonic() + FINAL_DOT_TIMEOUT_S + length / SLOWEST_UPLOAD_BYTES_S
            code, words = self._content(smtp, pieces, length)
            self._dirty = False
            verdict = judge("dot", code, words)
            outcomes |= {name: verdict for name, outcome in outcomes.items() if outcome.verdict is Verdict.SENT}
        if any(outcome.code in (421, -1) for outcome in outcomes.values()):
            self._abort()
        return outcomes

    def _envelope(self, smtp: Dialogue, envelope: Envelope, length: int) -> tuple[dict[str, Outcome], bool]:
        """MAIL, RCPT… and DATA, in one write where the server offers PIPELINING (RFC 2920); True: it waits for data."""
        parameters = f" SIZE={length}" * bool(length)
        if smtp.has_extn("8bitmime") and not all(piece.isascii() for piece in envelope.data):
            parameters += " BODY=8BITMIME"
        commands = [f"MAIL FROM:<{envelope.sender}>{parameters}"]
        commands += [f"RCPT TO:<{name}>" for name in envelope.recipients]
        together = smtp.has_extn("pipelining")
        if together:
            smtp.send("".join(f"{command}\r\n" for command in (*commands, "DATA")))

        def reply(command: str) -> tuple[int, bytes]:
            if not together:
                smtp.putcmd(command)
            elif self._config.trace:
                self._config.trace(f"C: {command}")
            return smtp.getreply()

        first = judge("mail", *reply(commands[0]))
        if first.code == 421:
            raise smtplib.SMTPResponseException(421, first.detail)
        outcomes = dict.fromkeys(envelope.recipients, first)
        if first.verdict is Verdict.SENT or together:
            self._step = "rcpt"
            said = {name: judge("rcpt", *reply(line)) for name, line in zip(outcomes, commands[1:], strict=True)}
            outcomes = said if first.verdict is Verdict.SENT else outcomes
        taken = any(outcome.verdict is Verdict.SENT for outcome in outcomes.values())
        if not taken and not together:
            return outcomes, False
        self._step = "data"
        code, words = reply("DATA")
        if not taken and code == 354:
            smtp.send(".\r\n")  # nobody is left to receive it; the server answers 554
            smtp.getreply()
        elif taken and code != 354:
            refused = judge("data", code if code >= 400 else -1, words)
            outcomes = {n: refused if o.verdict is Verdict.SENT else o for n, o in outcomes.items()}
        return outcomes, taken and code == 354

    def _content(self, smtp: Dialogue, pieces: list[bytes], length: int) -> tuple[int, bytes]:
        assert smtp.sock is not None
        if length < PIECE:
            smtp.sock.sendall(b"".join((*pieces, b".\r\n")))
        else:
            for piece in pieces[:-1]:
                smtp.sock.sendall(piece)
            smtp.sock.sendall(pieces[-1] + b".\r\n")
        if self._config.trace:
            self._config.trace(f"C: ({length} bytes of mail, then the dot)")
        smtp.sock.settimeout(FINAL_DOT_TIMEOUT_S)
        return smtp.getreply()

    def verify(self, recipient: str = "") -> Outcome:
        """Would the server take a mail from us (to `recipient`)? Nothing is sent. Raises Unavailable."""
        self.open()
        assert self._smtp is not None
        outcome = Outcome(Verdict.SENT)
        sender = address(self._config.sender)
        for step, command in (("mail", f"MAIL FROM:<{sender}>"), ("rcpt", f"RCPT TO:<{recipient}>")):
            if step == "mail" or recipient:
                outcome = judge(step, *self._smtp.docmd(command))
                if outcome.verdict is not Verdict.SENT:
                    return outcome
                self._report("sender" if step == "mail" else "recipient", sender if step == "mail" else recipient)
        self._dirty = True
        return outcome

    def close(self) -> None:
        """QUIT. Whatever the server makes of it changes nothing that it has accepted."""
        if self._smtp is not None:
            with contextlib.suppress(OSError, smtplib.SMTPException, ValueError):
                if self._smtp.sock is not None:
                    self._smtp.sock.settimeout(min(2.0, self._config.timeout_s))
                self._smtp.deadline = time.monotonic() + 2.0
                self._smtp.docmd("QUIT")
            self._abort()

    def _abort(self) -> None:
        if self._smtp is not None:
            self._smtp.close()
            self._smtp = None


def dot_stuffed(pieces: Sequence[bytes]) -> tuple[list[bytes], int]:
    """RFC 5321 4.5.2: a line that begins with a dot gets another. Also their length."""
    stuffed = [piece.replace(b"\r\n.", b"\r\n..") if b"\r\n." in piece else piece for piece in pieces]
    stuffed = [b"." + piece if piece.startswith(b".") else piece for piece in stuffed]
    if not stuffed or not stuffed[-1].endswith(b"\r\n"):
        stuffed.append(b"\r\n")
    return stuffed, sum(map(len, stuffed))


# ───────────────────────────────────────────── Outbox ───────────────────────────────────────────────
# A durable queue in one SQLite file that does not know what it carries. One process owns a file, one connection
# does every write and checkpoint (SQLite before 3.51.3 can corrupt a WAL file that two connections write).

WAITING, FROZEN, SENT, FAILED, DROPPED = range(5)

SCHEMA = """
CREATE TABLE IF NOT EXISTS items(            -- one row a life: settled rows keep their id and lose their payload
  seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, lane TEXT NOT NULL, arrived REAL NOT NULL,
  state INTEGER NOT NULL DEFAULT 0, taken TEXT, settled REAL, error TEXT,
  sum BLOB NOT NULL, picture_sum BLOB, payload BLOB, picture BLOB);
CREATE INDEX IF NOT EXISTS items_waiting ON items(seq) WHERE state = 0;
CREATE INDEX IF NOT EXISTS items_settled ON items(settled) WHERE settled IS NOT NULL;
CREATE TABLE IF NOT EXISTS mails(            -- a mail whose sending has begun: it stays the same mail
  mail INTEGER PRIMARY KEY, kind TEXT NOT NULL, items TEXT NOT NULL, recipients TEXT NOT NULL,
  begun REAL NOT NULL, next REAL NOT NULL, state INTEGER NOT NULL DEFAULT 1, tries INTEGER NOT NULL DEFAULT 0,
  waited REAL NOT NULL DEFAULT 0, bare INTEGER NOT NULL DEFAULT 0, taken TEXT NOT NULL DEFAULT '[]',
  refused TEXT NOT NULL DEFAULT '{}', error TEXT, settled REAL, told INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS mails_due ON mails(next) WHERE state = 1;
CREATE INDEX IF NOT EXISTS mails_untold ON mails(mail) WHERE state = 3 AND told = 0;
CREATE TABLE IF NOT EXISTS notes(name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class SpoolError(Exception):
    """The disk failed or the file is damaged; nothing was accepted."""


class SpoolFull(SpoolError):
    """No room is left."""


class SpoolBusy(SpoolError):
    """Another process owns the file."""


@dataclass(frozen=True)
class NewItem:
    """Something to carry. `lane` is what its owner groups by; `fresh` ids were made just now and need no look-up."""

    id: str
    lane: str
    payload: bytes
    picture: bytes | None = None
    arrived: float = field(default_factory=time.time)
    fresh: bool = False


@dataclass(frozen=True)
class Receipt:
    """What became of a put: `new` is False for a duplicate; `id` differs where the wished one meant something else."""

    id: str
    new: bool


@dataclass(frozen=True)
class Waiting:
    """A light row of what waits, for planning. `taken`: recipients who have it already."""

    seq: int
    id: str
    lane: str
    arrived: float
    taken: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Item:
    """A row with its payload, for rendering. `picture()` loads the picture when it is needed; None: there is none."""

    seq: int
    id: str
    lane: str
    arrived: float
    payload: bytes
    picture: Callable[[], bytes | None] = lambda: None


@dataclass(frozen=True)
class Draft:
    """A mail that is due: which items, to whom, and its owner's own word for how to render it."""

    items: tuple[int, ...]
    recipients: tuple[str, ...]
    kind: str = ""
    lanes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mail:
    """A frozen mail. `bare`: without pictures. `failed`, `why`: alerts that failed and nobody has been told of."""

    number: int
    kind: str
    items: tuple[int, ...]
    recipients: tuple[str, ...]
    tries: int = 0
    waited: float = 0.0
    bare: bool = False
    taken: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    failed: int = 0
    why: str = ""


@dataclass
class _Ticket:
    items: Sequence[NewItem]
    receipts: list[Receipt] | None = None
    error: Exception | None = None


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
        raise SpoolBusy(f"{path}: another process owns this spool") from None
    return handle


class Outbox:
    """The durable queue. Every method is safe to call from any thread."""

    def __init__(self, path: str | Path, *, schema: str = "", size_max: int | None = None) -> None:
        """Open or make the file, 0600, and lock it. Raises SpoolBusy and SpoolError."""
        self.path = Path(path)
        self._schema, self._size_max = SCHEMA + schema, size_max
        self._lock = threading.Lock()
        self._gathered: deque[_Ticket] = deque()
        self._durable: bool | None = None
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._owned = lock_file(Path(f"{self.path}.lock"))
        except OSError as error:
            raise SpoolError(f"{self.path}: {error.strerror}") from None
        try:
            self._db = self._open_sound()
        except sqlite3.Error as error:
            os.close(self._owned)
            raise SpoolError(f"{self.path}: {error}") from None

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
        aside = Path(f"{self.path}.damaged-{int(time.time())}")
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self.path}{suffix}", f"{aside}{suffix}")
        db = self._open()
        saved = salvage(aside, db)
        log.error("the spool %s was damaged: moved to %s, %d waiting items saved from it", self.path, aside, saved)
        return db

    def _open(self) -> sqlite3.Connection:
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        db = sqlite3.connect(self.path, timeout=5, isolation_level=None, check_same_thread=False)
        try:
            small = self.path.stat().st_size < CHECKED_MAX_BYTES
            if small and db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("damaged")
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            if db.execute("PRAGMA synchronous").fetchone() != (2,):
                raise sqlite3.OperationalError("synchronous=FULL was not taken")
            db.executescript(self._schema)
            self._recount(db)
            self._page_size = pragma(db, "page_size")
            self._identity = self._stat()
        except BaseException:
            db.close()
            raise
        self._durable = True
        return db

    def _stat(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _begin(self, durable: bool) -> sqlite3.Connection:
        if self._stat() != self._identity:
            self._rescue()
        if durable != self._durable:
            self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self._durable = durable
        self._db.execute("BEGIN IMMEDIATE")
        return self._db

    def _rescue(self) -> None:
        """The file was deleted or replaced under us; our connection still has it all: write it out anew."""
        log.error("the spool %s was removed while in use; it is written anew", self.path)
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self.path}{suffix}", f"{self.path}.removed-{int(time.time())}{suffix}")
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        with contextlib.closing(sqlite3.connect(self.path)) as anew:
            self._db.backup(anew)
        self._db.close()
        self._db = self._open()

    # putting

    def put(self, items: Sequence[NewItem]) -> list[Receipt]:
        """Add items; when this returns they are on disk. Threads that arrive meanwhile share the next commit.

        The same id with the same content is a duplicate; with other content it gets a suffix. Raises SpoolError.
        """
        ticket = _Ticket(items)
        self._gathered.append(ticket)
        with self._lock:  # whoever gets it commits all that gathered; the others find their tickets done
            if ticket.receipts is None and ticket.error is None:
                self._commit_gathered()
        if ticket.error is not None:
            raise ticket.error
        assert ticket.receipts is not None
        return ticket.receipts

    def _commit_gathered(self) -> None:
        tickets: list[_Ticket] = []
        while self._gathered:
            tickets.append(self._gathered.popleft())
        try:
            with self._work(durable=True) as db:
                self._check_room(db, sum(len(i.payload) + len(i.picture or b"") for t in tickets for i in t.items))
                done = [[self._add(db, item) for item in ticket.items] for ticket in tickets]
        except SpoolError as error:
            for ticket in tickets:
                ticket.error = error
        else:
            for ticket, receipts in zip(tickets, done, strict=True):
                self._counts[WAITING] += sum(receipt.new for receipt in receipts)
                ticket.receipts = receipts

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """BEGIN IMMEDIATE … COMMIT, one thread at a time; on disk when it is left, all or nothing.

        With `durable=False` the commit survives the end of the process, but a power cut may undo it (until
        the next durable one). Raises SpoolError; then nothing was done.
        """
        with self._lock, self._work(durable) as db:
            yield db

    @contextlib.contextmanager
    def _work(self, durable: bool) -> Iterator[sqlite3.Connection]:
        try:
            yield self._begin(durable)
            self._db.execute("COMMIT")
        except BaseException as error:
            with contextlib.suppress(sqlite3.Error):
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.DatabaseError) and re.search("malformed|not a database", str(error)):
                self._db.close()
                self._db = self._open_sound()
            if isinstance(error, sqlite3.Error | OSError):
                kind = SpoolFull if "full" in str(error) else SpoolError
                raise kind(f"{self.path}: {error}") from error
            raise

    def _check_room(self, db: sqlite3.Connection, more: int) -> None:
        if self._size_max is not None:
            used = (pragma(db, "page_count") - pragma(db, "freelist_count")) * self._page_size
            if used + more > self._size_max:
                raise SpoolFull(f"{self.path}: {used} bytes are used, no more than {self._size_max} are allowed")

    def add(self, db: sqlite3.Connection, item: NewItem) -> bool:
        """Add an item inside a transaction of the owner's. False: it was there before."""
        new = self._add(db, item).new
        self._counts[WAITING] += new
        return new

    def _add(self, db: sqlite3.Connection, item: NewItem) -> Receipt:
        sums = hashlib.sha256(item.payload).digest(), item.picture and hashlib.sha256(item.picture).digest()
        name = item.id
        while not item.fresh:
            known = db.execute("SELECT sum, picture_sum FROM items WHERE id = ?", (name,)).fetchone()
            if known is None:
                break
            if known == sums or name != item.id:
                return Receipt(name, new=False)
            name = f"{item.id[:119]}-{hashlib.sha256(sums[0] + (sums[1] or b'')).hexdigest()[:8]}"
        db.execute(
            "INSERT INTO items(id, lane, arrived, sum, picture_sum, payload, picture) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (name, item.lane, item.arrived, *sums, item.payload, item.picture),
        )
        return Receipt(name, new=True)

    # planning

    def waiting(self, after: int = 0) -> Iterator[Waiting]:
        """What waits and is in no mail yet, oldest first, page by page, without payloads."""
        while True:
            with self._lock:
                page = self._db.execute(
                    "SELECT seq, id, lane, arrived, taken FROM items WHERE state = 0 AND seq > ? ORDER BY seq LIMIT 200",
                    (after,),
                ).fetchall()
            for seq, name, lane, arrived, taken in page:
                yield Waiting(seq, name, lane, arrived, frozenset(json.loads(taken)) if taken else frozenset())
                after = seq
            if len(page) < 200:
                return

    def newest(self) -> int:
        """The row number of the newest item."""
        with self._lock:
            return self._db.execute("SELECT max(seq) FROM items").fetchone()[0] or 0

    def freeze(self, drafts: Sequence[Draft], now: float) -> list[Mail]:
        """Make each draft a mail, durably: from now on, whatever happens, it is the same mail."""
        mails = []
        with self.transaction() as db:
            for draft in drafts:
                row = (draft.kind, json.dumps(draft.items), json.dumps(draft.recipients), now, now)
                number = db.execute(
                    "INSERT INTO mails(kind, items, recipients, begun, next) VALUES (?, ?, ?, ?, ?)", row
                ).lastrowid
                db.executemany("UPDATE items SET state = 1 WHERE seq = ?", [(seq,) for seq in draft.items])
                mails.append(Mail(number or 0, draft.kind, draft.items, draft.recipients))
        return mails

    def due(self, now: float, latest: float, busy: set[int]) -> list[Mail]:
        """Frozen mails to try again now. One that is due later than `latest` is due now: the clock was set back."""
        with self._lock:
            rows = self._db.execute(
                "SELECT mail, kind, items, recipients, tries, waited, bare, taken, refused FROM mails"
                " WHERE state = 1 AND (next <= ? OR next > ?) ORDER BY next LIMIT ?",
                (now, latest, BATCH_MAILS + len(busy)),
            ).fetchall()
        return [
            Mail(number, kind, tuple(json.loads(items)), tuple(json.loads(to)), tries, waited, bool(bare),
                 tuple(json.loads(taken)), json.loads(refused))
            for number, kind, items, to, tries, waited, bare, taken, refused in rows if number not in busy
        ][:BATCH_MAILS]  # fmt: skip

    def next_due(self) -> float | None:
        """When the next frozen mail is to be tried again, or None."""
        with self._lock:
            found = self._db.execute("SELECT min(next) FROM mails WHERE state = 1").fetchone()[0]
        return None if found is None else float(found)

    def history(self, now: float, window: float, limit: int) -> History:
        """What was sent: the newest `limit` times of a day, and when mails of a lane or kind last began (in `window`)."""
        lanes: dict[str, float] = {}
        kinds: dict[str, float] = {}
        with self._lock:
            times = self._db.execute(
                "SELECT settled FROM mails WHERE state = 2 AND settled > ? ORDER BY settled DESC LIMIT ?",
                (now - DAY_S, limit),
            ).fetchall()
            pending = self._db.execute("SELECT count(*) FROM mails WHERE state = 1").fetchone()[0]
            for items, kind, begun in self._db.execute(
                "SELECT items, kind, begun FROM mails WHERE begun > ? ORDER BY begun", (now - window if window else now,)
            ).fetchall():
                kinds[kind] = begun
                for seq in json.loads(items):
                    for (lane,) in self._db.execute("SELECT lane FROM items WHERE seq = ?", (seq,)):
                        lanes[lane] = begun
        return History(deque((when for (when,) in reversed(times)), maxlen=max(1, limit)), pending, lanes, kinds)

    # rendering and settling

    def load(self, mail: Mail) -> list[Item]:
        """The items of a mail that are still in it, each verified against its checksum. Raises Damaged."""
        items = []
        for seq in mail.items:
            with self._lock:
                row = self._db.execute(
                    "SELECT id, lane, arrived, payload, sum, picture_sum FROM items WHERE seq = ? AND state = 1", (seq,)
                ).fetchone()
            if row is None:
                continue
            if hashlib.sha256(row[3] or b"").digest() != row[4]:
                raise Damaged(seq)
            name, lane, arrived, payload, _, picture = row
            load = functools.partial(self._picture, seq, picture) if picture else lambda: None
            items.append(Item(seq, name, lane, arrived, payload, load))
        return items

    def _picture(self, seq: int, wanted: bytes) -> bytes | None:
        with self._lock:
            picture = self._db.execute("SELECT picture FROM items WHERE seq = ?", (seq,)).fetchone()[0]
        if picture is None or hashlib.sha256(picture).digest() != wanted:
            raise Damaged(seq)
        return bytes(picture)

    def untold(self) -> tuple[int, str]:
        """How many alerts failed without anybody having been told, and why the last one did."""
        with self._lock:
            rows = self._db.execute("SELECT items, error FROM mails WHERE state = 3 AND told = 0").fetchall()
        return sum(len(json.loads(items)) for items, _ in rows), rows[-1][1] if rows else ""

    def settle(self, mail: Mail, now: float, settlement: Settlement) -> None:
        """Write down how an attempt ended. Needs no disk sync: a power cut at worst makes the attempt happen again."""
        state = settlement.state
        row = (
            *(state, settlement.next, mail.tries + 1, settlement.waited, settlement.bare),
            *map(json.dumps, (settlement.taken, settlement.recipients, settlement.refused)),
            *(settlement.error, None if state == FROZEN else now, mail.number),
        )
        with self.transaction(durable=False) as db:
            db.execute(
                "UPDATE mails SET state = ?, next = ?, tries = ?, waited = ?, bare = ?, taken = ?, recipients = ?,"
                " refused = ?, error = ?, settled = ? WHERE mail = ?",
                row,
            )
            if state == SENT:
                done = db.executemany(
                    "UPDATE items SET state = 2, settled = ?, payload = NULL, picture = NULL WHERE seq = ? AND state = 1",
                    [(now, seq) for seq in mail.items],
                )
                self._moved(SENT, done.rowcount)
                if mail.failed:
                    db.execute("UPDATE mails SET told = 1 WHERE state = 3 AND told = 0")
            elif state == FAILED:
                taken = json.dumps(settlement.taken) if settlement.taken else None
                done = db.executemany(
                    "UPDATE items SET state = 3, error = ?, taken = ? WHERE seq = ? AND state = 1",
                    [(settlement.error, taken, seq) for seq in mail.items],
                )
                self._moved(FAILED, done.rowcount)

    def quarantine(self, seq: int, mail: Mail, now: float) -> None:
        """A row does not match its checksum: it fails, the others of its mail wait again."""
        with self.transaction() as db:
            db.execute("UPDATE items SET state = 3, error = 'damaged on disk' WHERE seq = ?", (seq,))
            db.executemany("UPDATE items SET state = 0 WHERE seq = ? AND state = 1", [(other,) for other in mail.items])
            db.execute("UPDATE mails SET state = 3, settled = ?, items = ?, error = 'damaged on disk' WHERE mail = ?",
                       (now, json.dumps([seq]), mail.number))  # fmt: skip
            self._recount(db)

    def note(self, name: str, value: object) -> None:
        """Leave a remark for `queue`."""
        with self.transaction(durable=False) as db:
            db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, json.dumps(value)))

    # looking after it

    def retry(self, name: str = "all") -> int:
        """Failed alerts (or one) wait again and are planned anew; the number of them."""
        which, parameters = ("", ()) if name == "all" else (" AND id = ?", (name,))
        with self.transaction() as db:
            found = db.execute(f"UPDATE items SET state = 0, error = NULL WHERE state = 3{which}", parameters).rowcount
            db.execute("UPDATE mails SET told = 1 WHERE state = 3")
            db.execute("UPDATE mails SET next = 0 WHERE state = 1")
            self._recount(db)
            return found

    def drop(self, name: str = "all") -> int:
        """What waits, is held or failed (or one) is not sent and its payload is forgotten; the number of them."""
        which, parameters = ("", ()) if name == "all" else (" AND id = ?", (name,))
        with self.transaction() as db:
            found = db.execute(
                "UPDATE items SET state = 4, settled = ?, payload = NULL, picture = NULL"
                f" WHERE state IN (0, 1, 3){which}",
                (time.time(), *parameters),
            ).rowcount
            self._recount(db)
            return found

    def expire(self, before: float, reason: str) -> int:
        """What arrived before a time and waits has failed; the number of them."""
        with self.transaction() as db:
            found = db.execute("UPDATE items SET state = 3, error = ? WHERE state = 0 AND arrived < ?", (reason, before))
            self._recount(db)
            return found.rowcount

    def prune(self, now: float) -> None:
        """Forget what was settled more than MEMORY_S ago, a little at a time."""
        with self.transaction(durable=False) as db:
            for table in ("items", "mails"):
                db.execute(
                    f"DELETE FROM {table} WHERE rowid IN (SELECT rowid FROM {table} WHERE settled < ? LIMIT 2000)",
                    (now - MEMORY_S,),
                )
            self._recount(db)

    def counts(self) -> dict[str, int]:
        """How many items wait (in a mail or not), were sent (and are remembered), failed."""
        with self._lock:
            return {"queued": self._counts[WAITING], "sent": self._counts[SENT], "failed": self._counts[FAILED]}

    def _recount(self, db: sqlite3.Connection) -> None:
        self._counts = dict.fromkeys(range(5), 0) | dict(db.execute("SELECT state, count(*) FROM items GROUP BY state"))
        self._counts[WAITING] += self._counts[FROZEN]

    def _moved(self, state: int, number: int) -> None:
        self._counts[WAITING] -= number
        self._counts[state] += number

    def close(self) -> None:
        """Close the database and let go of the lock."""
        with self._lock:
            self._db.close()
            os.close(self._owned)


class Damaged(Exception):
    """A row does not match its checksum; `seq` says which."""

    def __init__(self, seq: int) -> None:
        super().__init__(f"row {seq} is damaged")
        self.seq = seq


def pragma(db: sqlite3.Connection, name: str) -> int:
    """The value of a numeric pragma."""
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])


def salvage(damaged: Path, into: sqlite3.Connection) -> int:
    """Copy every unsettled row that can still be read; their number."""
    saved = 0
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(damaged)) as db:
        for row in db.execute("SELECT id, lane, arrived, taken, sum, picture_sum, payload, picture FROM items WHERE state < 2"):
            with contextlib.suppress(sqlite3.Error):
                into.execute(
                    "INSERT INTO items(id, lane, arrived, taken, sum, picture_sum, payload, picture) VALUES (?,?,?,?,?,?,?,?)",
                    row,
                )
                saved += 1
    return saved


def read_queue(path: Path) -> list[dict[str, Any]]:
    """Every item that waits, is held or failed, read without writing to the file. Raises SpoolError."""
    if not path.exists():
        raise SpoolError(f"{path}: there is no such spool")
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5)) as db:
            items = db.execute(
                "SELECT seq, id, lane, arrived, state, error FROM items WHERE state IN (0, 1, 3) ORDER BY seq"
            ).fetchall()
            mails = db.execute(
                "SELECT items, recipients, refused, next, tries, error FROM mails WHERE state IN (1, 3) ORDER BY mail"
            ).fetchall()
            notes = {name: json.loads(value) for name, value in db.execute("SELECT name, value FROM notes")}
    except sqlite3.Error as error:
        raise SpoolError(f"{path}: {error}") from None
    frozen = {seq: mail[1:] for mail in mails for seq in json.loads(mail[0])}
    return [_queue_row(item, frozen.get(item[0], ("[]", "{}", 0.0, 0, None)), notes) for item in items]


def _queue_row(item: Sequence[Any], mail: Sequence[Any], notes: Mapping[str, Any]) -> dict[str, Any]:
    seq, name, lane, arrived, state, complaint = item
    recipients, refused, due, tries, words = mail
    hold = notes.get("hold") or {"upto": 0}
    held = state != FAILED and bool(hold.get("all") or (state == WAITING and seq <= hold["upto"]))
    due = max(due, hold["until"]) if held else due
    return {
        "id": name,
        "state": "failed" if state == FAILED else "held" if held else "waiting",
        "since": iso(arrived),
        "next": iso(due) if due and state != FAILED else None,
        "tries": tries,
        "error": hold["why"] if held else words or complaint,
        "recipients": json.loads(recipients) or list(json.loads(refused)) or notes.get("lanes", {}).get(lane, []),
    }


def iso(when: float) -> str:
    """Wall-clock seconds -> ISO 8601, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(max(0.0, when)))


# ───────────────────────────────────────────── Courier ──────────────────────────────────────────────
# plan (pure) ─▶ connect ─▶ freeze ─▶ render (pure) ─▶ deliver ─▶ settle. The stages share the outbox and a
# doorbell, nothing else; the bell is cleared before anyone looks.


@dataclass
class History:
    """What was sent, for planning: settle times of a day, mails under way, and when lanes and kinds last began."""

    times: deque[float] = field(default_factory=deque)
    pending: int = 0
    lanes: dict[str, float] = field(default_factory=dict)
    kinds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The mails that are due now; `wake`: when to plan again though nothing arrives; `why` the rest is held."""

    drafts: list[Draft]
    wake: float | None = None
    why: str = ""


class Owner(Protocol):
    """Who owns an outbox. Both methods are pure; `window` and `limit` say how much history the plan looks at."""

    window: float
    limit: int

    def plan(self, waiting: Iterable[Waiting], sent: History, now: float, most: int) -> Plan:
        """Which mails are due. Pulls from `waiting` only until it has `most` drafts."""

    def recipients(self, lane: str) -> tuple[str, ...]:
        """Who gets what waits in this lane, as things are now."""

    def render(self, mail: Mail, items: Sequence[Item]) -> Envelope:
        """The mail as it goes out."""


@dataclass(frozen=True)
class Settlement:
    """How an attempt ended: what the mail's row says next."""

    state: int
    next: float
    waited: float
    bare: bool
    recipients: tuple[str, ...]
    taken: tuple[str, ...]
    refused: Mapping[str, str]
    error: str | None


def conclude(mail: Mail, outcomes: Mapping[str, Outcome], now: float, delay: float, max_age: float) -> Settlement:
    """Pure: from the outcomes of an attempt to the next state of the mail.

    Its age is the sum of its own delays, so that a jump of the clock expires nothing.
    """
    taken = (*mail.taken, *(name for name, outcome in outcomes.items() if outcome.verdict is Verdict.SENT))
    smaller = [name for name, outcome in outcomes.items() if outcome.too_big and not mail.bare]
    later = [name for name, outcome in outcomes.items() if outcome.verdict is Verdict.TRY_LATER and name not in smaller]
    refused = dict(mail.refused)
    refused |= {n: str(o) for n, o in outcomes.items() if o.verdict is Verdict.REFUSED and n not in smaller}
    words = next((str(o) for o in outcomes.values() if o.verdict is not Verdict.SENT), None)
    waited = mail.waited
    if later and not smaller:
        waited += delay
        if waited > max_age:
            refused |= {name: f"given up after {mail.tries + 1} tries; last: {outcomes[name]}" for name in later}
            later = []
    left = (*smaller, *later)
    if left:
        due = now if smaller else now + delay
        return Settlement(FROZEN, due, waited, bool(smaller) or mail.bare, left, taken, refused, words)
    words = "; ".join(f"{name}: {said}" for name, said in refused.items()) or None
    return Settlement(FAILED if refused else SENT, now, waited, mail.bare, (), taken, refused, words)


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
        self._outbox, self._owner, self._transport, self._clock, self._advise = outbox, owner, transport, clock, advise
        self._senders, self._first, self._most, self._max_age = senders, retry_first, max(retry_max, retry_first), max_age
        self._bell = threading.Condition()
        self._rings = 1
        self._stopping = False
        self._threads: list[threading.Thread] = []
        self._planning = threading.Lock()
        self.history = outbox.history(clock(), owner.window, owner.limit)
        self._ready: deque[Mail] = deque()
        self._busy: set[int] = set()
        self._connected = 0
        self._replan()
        self._fresh = outbox.newest()
        self._batch, self._batch_began = 1, 0.0
        self._hold: Outcome | None = None
        self._hold_until = self._hold_since = 0.0
        self._hold_tries = 0
        self._pruned = 0.0
        self._remarked: object = None

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
        with self._bell:
            self._rings += 1
            self._bell.notify()

    def stop(self, timeout: float = 4.0) -> None:
        """End the threads; a mail that is under way gets `timeout` seconds, then it is left for the next start."""
        with self._bell:
            self._stopping = True
            self._bell.notify_all()
        until = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _wait(self, rings: int, seconds: float) -> None:
        with self._bell:
            if self._rings == rings and not self._stopping:
                self._bell.wait(seconds)

    def _send_loop(self) -> None:
        transport = self._transport()
        idle_since = time.monotonic()
        connected = False
        while not self._stopping:
            rings = self._rings
            try:
                worked = self.step(transport)
            except Exception:
                log.exception("a sender stumbled; it goes on")
                worked = False
                self._wait(rings, 1.0)
            if worked:
                idle_since, connected = time.monotonic(), True
                continue
            if connected and time.monotonic() - idle_since >= LINGER_S:
                transport.close()
                connected = False
            self._wait(rings, LINGER_S if connected else TICK_S)
        transport.close()

    def _keep_loop(self) -> None:
        while not self._stopping:
            try:
                self.tick()
            except Exception as error:
                log.error("%s", error)
            with self._bell:
                self._bell.wait_for(lambda: self._stopping, TICK_S)

    # one mail

    def step(self, transport: Transport) -> bool:
        """Carry one mail that is due, if there is one; True if there was."""
        mail = self._take(transport)
        if mail is None:
            return False
        try:
            self._carry(mail, transport)
        finally:
            with self._planning:
                self._busy.discard(mail.number)
        return True

    def _take(self, transport: Transport) -> Mail | None:
        with self._planning:
            if self._ready:
                return self._ready.popleft()
            if time.monotonic() < self._hold_until or not self._look():
                return None
        if not self._opened(transport):
            return None
        with self._planning:
            if not self._ready:
                self._fill()
            if len(self._ready) > 1:
                with self._bell:
                    self._bell.notify()
            return self._ready.popleft() if self._ready else None

    def _opened(self, transport: Transport) -> bool:
        """Connect before anything is frozen: what waits for a server that is away stays free to be planned anew."""
        try:
            transport.open()
        except Unavailable as error:
            if not self._busy:  # another sender that is at work shows that the server is there
                self._hold_back(error.outcome)
            return False
        self._release()
        return True

    # planning

    def _replan(self) -> None:
        """Plan from the first row again: something changed under the plan."""
        self._drafts: list[Draft] = []  # due, not frozen yet: frozen only once a connection stands
        self._retries: list[Mail] = []
        self._seen = 0  # rows up to this one are held until _wake
        self._wake = self._looked = 0.0
        self._heard = 0
        self._why = ""

    def _look(self) -> bool:
        """Is anything due? Rows that the plan has held are not looked at again before their time."""
        if self._drafts or self._retries:
            return True
        now = self._clock()
        if self._heard == self._rings and self._looked <= now < self._wake:
            return False
        if not self._looked <= now < self._wake:
            self._seen, self._wake = 0, float("inf")
        self._heard, self._looked = self._rings, now  # the bell is cleared before looking
        self._retries = self._outbox.due(now, now + 2 * self._most, self._busy)
        rows = _Counted(self._outbox.waiting(self._seen))
        plan = self._owner.plan(rows, self.history, now, self._batch)
        self._drafts, self._seen, self._why = plan.drafts, max(self._seen, rows.last), plan.why or self._why
        if not rows.exhausted:
            self._heard = 0  # look again at once
            if not self._owner.window:
                self._drafts = self._newest(now) + self._drafts
        self._wake = min(self._wake, plan.wake or float("inf"), self._outbox.next_due() or float("inf"))
        return bool(self._drafts or self._retries)

    def _newest(self, now: float) -> list[Draft]:
        """While a backlog drains oldest first, what has arrived since the last look goes before it."""
        since, self._fresh = max(self._seen, self._fresh), self._outbox.newest()
        return self._owner.plan(self._outbox.waiting(since), self.history, now, max(1, self._batch // 4)).drafts

    def _fill(self) -> None:
        """Freeze what is due; batches grow while they go out quickly, and shrink when they do not."""
        if not self._look():
            return
        took = time.monotonic() - self._batch_began
        self._batch = min(BATCH_MAILS, self._batch * 2) if took < 0.25 else max(1, self._batch // 2) if took > 1 else self._batch
        self._batch_began = time.monotonic()
        now = self._clock()
        frozen = self._outbox.freeze(self._drafts, now) if self._drafts else []
        for draft in self._drafts if self._owner.window else ():
            self.history.kinds[draft.kind] = now
            self.history.lanes.update(dict.fromkeys(draft.lanes, now))
        self._ready.extend((*frozen, *self._retries))
        self._busy.update(mail.number for mail in self._ready)
        self.history.pending += len(frozen)
        self._drafts, self._retries = [], []

    # delivering

    def _carry(self, mail: Mail, transport: Transport) -> None:
        failed, why = self._outbox.untold()
        mail = replace(mail, failed=failed, why=why)
        try:
            items = self._outbox.load(mail)
            envelope = self._owner.render(mail, items) if items else None
        except Damaged as error:
            log.error("%s: %s; it counts as failed", self._outbox.path, error)
            self._outbox.quarantine(error.seq, mail, self._clock())
            with self._planning:
                self.history.pending -= 1
                self._replan()
            return
        except Exception as error:  # one that cannot be composed must not stop the others
            log.exception("a mail cannot be composed; it counts as failed")
            poison = Outcome(Verdict.REFUSED, 0, f"cannot be composed: {type(error).__name__}", "compose")
            return self._settle(mail, dict.fromkeys(mail.recipients, poison))
        if envelope is None:  # all of it was dropped meanwhile
            return self._settle(mail, {})
        began = time.monotonic()
        outcomes = transport.deliver(envelope)
        ours = next((outcome for outcome in outcomes.values() if outcome.ours), None)
        counted = {name: outcome for name, outcome in outcomes.items() if not outcome.ours}
        if counted:
            self._settle(mail, counted | {name: Outcome(Verdict.TRY_LATER) for name in outcomes.keys() - counted.keys()})
        if ours:
            self._hold_back(ours)
        else:
            self._tell(mail, items, outcomes, time.monotonic() - began)
            self._release()

    def _settle(self, mail: Mail, outcomes: Mapping[str, Outcome]) -> None:
        now = self._clock()
        delay = backoff(mail.tries, self._first, self._most)
        settlement = conclude(mail, outcomes, now, delay, self._max_age)
        while True:  # what was sent must be written down before anything else, or it is sent twice
            try:
                self._outbox.settle(mail, now, settlement)
                break
            except SpoolError as error:
                log.error("%s", error)
                if self._stopping:
                    return
                time.sleep(TICK_S)
        with self._planning:
            if settlement.state == FROZEN:
                self._wake = min(self._wake, settlement.next)
            else:
                self.history.pending -= 1
            if settlement.state == SENT and outcomes:
                self.history.times.append(now)

    def _tell(self, mail: Mail, items: Sequence[Item], outcomes: Mapping[str, Outcome], seconds: float) -> None:
        what = items[0].id if len(items) == 1 else f"{len(items)} items"
        for name, outcome in outcomes.items():
            if outcome.verdict is Verdict.SENT:
                log.info("sent %s to %s in %.3f s", what, name, seconds)
            else:
                log.warning("%s to %s: %s (%s)", what, name, outcome, outcome.verdict.value)

    # what is about us holds everything

    def _hold_back(self, outcome: Outcome) -> None:
        """Everything waits, no tries are burned, and the log says loudly, once, what to do."""
        with self._planning:
            first = self._hold is None or (self._hold.step, self._hold.code) != (outcome.step, outcome.code)
            self._hold_tries = 0 if first else self._hold_tries + 1
            if self._hold is None:
                self._hold_since = time.monotonic()
            most = min(PROBE_MAX_S, self._most) if outcome.code == 0 and outcome.step != "tls" else self._most
            pause = backoff(self._hold_tries, self._first, most)
            self._hold, self._hold_until = outcome, time.monotonic() + pause
            self._ready.clear()
            self._busy.clear()
            self._replan()
        say = log.error if first else log.debug
        say("all mail waits; %s. %s Next try in %.0f s", outcome, self._advise(outcome), pause)

    def _release(self) -> None:
        if self._hold is not None:
            with self._planning:
                self._hold, self._hold_tries = None, 0
            log.info("the mail server is back")

    # the keeper

    def tick(self) -> None:
        """Twice a second: requests of the command line, expiry, housekeeping, the remark for `queue`."""
        if self._requests():
            with self._planning:
                self._hold_until = 0.0
                self._replan()
            self.ring()
        hold = self._hold
        if hold and time.monotonic() - self._hold_since > self._max_age:  # by a clock that does not jump
            reason = f"given up after {self._max_age / 3600:.0f} h; last: {hold}"
            if number := self._outbox.expire(self._clock() - self._max_age, reason):
                log.error("%d alerts have failed: %s", number, reason)
        if not self._pruned or time.monotonic() - self._pruned > 60:
            self._pruned = time.monotonic()
            self._outbox.prune(self._clock())
        self._remark(hold)

    def _requests(self) -> int:
        done = 0
        for path in sorted(self._outbox.path.parent.glob(f"{self._outbox.path.name}.request-*[0-9]")):
            try:
                what, name = json.loads(path.read_text("utf-8"))
                number = self._outbox.retry(name) if what == "retry" else self._outbox.drop(name)
                log.info("%s %s: %d alerts", what, name, number)
            except (ValueError, TypeError, OSError) as error:
                log.error("%s: not a request: %s", path, error)
            path.unlink(missing_ok=True)
            done += 1
        return done

    def _remark(self, hold: Outcome | None) -> None:
        now = self._clock()
        if hold:
            until = now + max(0.0, self._hold_until - time.monotonic())
            remark = {"all": True, "why": str(hold), "until": until, "upto": 0}
            mark: object = (str(hold), self._hold_until)
        else:
            held = self._why and self._wake < float("inf")
            remark = {"why": self._why, "until": self._wake, "upto": self._seen} if held else {}
            mark = (self._why, self._wake, self._seen) if held else None
        if mark != self._remarked:
            self._remarked = mark
            self._outbox.note("hold", remark)
            lanes = {row.lane for row in itertools.islice(self._outbox.waiting(), 2000)} if remark else ()
            self._outbox.note("lanes", {lane: self._owner.recipients(lane) for lane in lanes})


class _Counted:
    """An iterable that remembers how far it was pulled."""

    def __init__(self, rows: Iterator[Waiting]) -> None:
        self._rows, self.last, self.exhausted = rows, 0, False

    def __iter__(self) -> Iterator[Waiting]:
        for row in self._rows:
            self.last = row.seq
            yield row
        self.exhausted = True


def backoff(tries: int, first: float, most: float) -> float:
    """Seconds to wait after attempt `tries` (from 0): doubling from `first` up to `most`, a fifth of it jitter."""
    return min(most, first * 2.0 ** min(tries, 40)) * random.uniform(0.8, 1.0)


# ───────────────────────────────────────────── Sending one mail ─────────────────────────────────────


class SendError(Exception):
    """A mail was not sent, or not to everybody; `outcomes` says what became of each recipient."""

    def __init__(self, outcomes: Mapping[str, Outcome], sentence: str = "") -> None:
        failed = {name: outcome for name, outcome in outcomes.items() if outcome.verdict is not Verdict.SENT}
        super().__init__("; ".join(f"{name}: {outcome}" for name, outcome in failed.items()) + (f". {sentence}" if sentence else ""))
        self.outcomes = dict(outcomes)


def send_email(
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
    to = addresses(to_addrs) if isinstance(to_addrs, str) else tuple(map(address, to_addrs))
    copies = tuple(map(address, cc))
    if attachment_bytes is not None:
        name = attachment_filename or "attachment"
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        attachments = [*attachments, Attachment(name, kind, attachment_bytes)]
    sender = from_addr or config.sender
    data = compose_pieces(
        subject=subject, sender=sender, to=to, cc=copies, text=body, html=html, attachments=attachments, headers=headers
    )
    send_now(Envelope(address(sender), tuple(dict.fromkeys((*to, *copies))), data), config)


def send_now(envelope: Envelope, config: SMTPConfig) -> None:
    """One transaction over a connection of its own. Raises SendError."""
    transport = SMTPTransport(config)
    try:
        outcomes = transport.deliver(envelope)
    finally:
        transport.close()
    wrong = [outcome for outcome in outcomes.values() if outcome.verdict is not Verdict.SENT]
    if wrong:
        raise SendError(outcomes, advice(wrong[0], config.host))


# ───────────────────────────────────────────── Command line ─────────────────────────────────────────


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """The sysexits code for what became of the recipients: the worst wins."""
    codes = {EX_OK}
    for outcome in outcomes:
        if outcome.code in (530, 534, 535) or (outcome.step == "login" and 500 <= outcome.code < 600):
            codes.add(EX_NOPERM)
        elif outcome.verdict is Verdict.REFUSED or 500 <= outcome.code < 600:
            codes.add(EX_UNAVAILABLE)
        elif outcome.verdict is Verdict.TRY_LATER:
            codes.add(EX_TEMPFAIL)
    return next(code for code in (EX_NOPERM, EX_TEMPFAIL, EX_UNAVAILABLE, EX_OK) if code in codes)


def fail(code: int, sentence: str) -> NoReturn:
    """End the program: one sentence on standard error, and its exit code."""
    print(f"{Path(sys.argv[0]).name}: {printable(sentence, 1000)}", file=sys.stderr)
    raise SystemExit(code)


def _configured(args: argparse.Namespace) -> tuple[Settings, SMTPConfig]:
    settings = Settings.load(env_file=args.env_file)
    config = SMTPConfig.from_settings(settings)
    if getattr(args, "trace", False):
        config = replace(config, trace=lambda line: print(printable(line, 2000), file=sys.stderr, flush=True))
    return settings, config


def _read_bytes(path: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        fail(EX_DATAERR, f"{path}: cannot be read: {error.strerror}")


def command_send(args: argparse.Namespace) -> int:
    """`send`: one mail from the command line."""
    _, config = _configured(args)
    try:
        send_email(
            args.subject,
            _read_bytes("-").decode("utf-8", "replace") if args.body == "-" else args.body,
            [a for text in args.to for a in addresses(text)],
            args.sender,
            html=_read_bytes(args.html).decode("utf-8", "replace") if args.html else "",
            cc=[a for text in args.cc for a in addresses(text)],
            attachments=[
                Attachment(Path(path).name, mimetypes.guess_type(path)[0] or "application/octet-stream", _read_bytes(path))
                for path in args.attach
            ],
            config=config,
        )
    except ValueError as error:
        fail(EX_DATAERR, str(error))
    return EX_OK


def command_check(args: argparse.Namespace) -> int:
    """`check`: every step on the way to the mail server, and what to do about the one that failed."""
    settings, config = _configured(args)
    if config.debug:
        print(f"SMTP_HOST is not set: mail goes to the debug receiver on {DEBUG_HOST}:{config.port}, without TLS and login")
    recipient = address(args.to) if args.to else ""
    transport = SMTPTransport(config, lambda step, words: print(f"ok    {step:<10} {printable(words)}", flush=True))
    try:
        outcome = transport.verify(recipient)
    except Unavailable as error:
        outcome = error.outcome
    except (OSError, smtplib.SMTPException) as error:
        outcome = judge_error("mail", error)
    transport.close()
    if outcome.verdict is Verdict.SENT:
        print("all is well" + ("" if recipient else "; --to ADDRESS asks about a recipient too"))
    else:
        print(f"FAIL  {outcome.step:<10} {outcome.code or ''} {outcome.detail}".rstrip())
        print(f"      {advice(outcome, config.host)}".rstrip())
    return exit_code([outcome])


def _spool(args: argparse.Namespace) -> Path:
    return Path(args.spool or Settings.load(env_file=args.env_file).read("ALERT_SPOOL", str, "spool/alerts.db"))


def command_queue(args: argparse.Namespace) -> int:
    """`queue`: what waits, is held or failed."""
    rows = read_queue(_spool(args))
    if args.json:
        print(json.dumps(rows, ensure_ascii=False))
        return EX_OK
    for row in rows:
        to = ", ".join(row["recipients"]) or "by the routes"
        print(f"{row['state']:<8} {row['id']}  since {row['since']}  to {to}")
        if row["next"] or row["error"]:
            due = f"next try {row['next']}" if row["next"] else "no more tries"
            print(f"         tries {row['tries']}, {due}  {printable(row['error'] or '')}".rstrip())
    states = [row["state"] for row in rows]
    print(", ".join(f"{states.count(state)} {state}" for state in ("waiting", "held", "failed")) if rows else "nothing waits")
    return EX_OK


def command_change(args: argparse.Namespace) -> int:
    """`retry` and `drop`: the running owner does it within a second; without one it is done here."""
    path = _spool(args)
    if args.id != "all" and all(row["id"] != args.id for row in read_queue(path)):
        fail(EX_DATAERR, f"{args.id}: no such alert waits or has failed; `queue` lists them")
    if not path.exists():
        fail(EX_DATAERR, f"{path}: there is no such spool")
    try:
        outbox = Outbox(path)
    except SpoolBusy:
        return _request(path, args.command, args.id)
    number = outbox.retry(args.id) if args.command == "retry" else outbox.drop(args.id)
    outbox.close()
    print(f"{args.command}: {number}")
    return EX_OK


def _request(path: Path, what: str, name: str) -> int:
    """Leave a request beside the spool and wait until its owner has carried it out."""
    request = Path(f"{path}.request-{time.time_ns()}")
    draft = Path(f"{request}.tmp")
    draft.write_text(json.dumps([what, name]), "utf-8")
    os.replace(draft, request)
    for _ in range(100):
        if not request.exists():
            print(f"{what}: done by the running relay")
            return EX_OK
        time.sleep(0.05)
    fail(EX_TEMPFAIL, "the running relay has not answered yet; the request stays")


def command_sendmail(argv: Sequence[str]) -> int:
    """`sendmail`: a whole mail on standard input, as cron, smartd and mdadm hand it over."""
    parser = argparse.ArgumentParser(prog="sendmail", description="Send the mail on standard input.", allow_abbrev=False)
    parser.add_argument("-t", action="store_true", help="recipients from To, Cc and Bcc")
    parser.add_argument("-i", action="store_true", help="a line with a single dot does not end the mail")
    parser.add_argument("-f", metavar="FROM", help="envelope sender")
    for ignored in ("-F", "-B", "-o"):
        parser.add_argument(ignored, help="taken and ignored")
    parser.add_argument("-v", action="store_true", help="taken and ignored")
    parser.add_argument("--env-file", metavar="FILE")
    parser.add_argument("recipients", nargs="*", metavar="TO")
    args = parser.parse_intermixed_args(argv)
    settings, config = _configured(args)
    raw = sys.stdin.buffer.read()
    if not args.i and "-oi" not in argv:
        raw = re.split(rb"(?m)^\.\r?$", raw, maxsplit=1)[0]
    try:
        envelope = sendmail_envelope(raw, args.recipients, args.t, args.f, config.sender, settings)
    except ValueError as error:
        fail(EX_DATAERR, str(error))
    send_now(envelope, config)
    return EX_OK


def sendmail_envelope(
    raw: bytes, recipients: Sequence[str], from_headers: bool, sender: str | None, default: str, settings: Settings
) -> Envelope:
    """The envelope for a mail as a local program writes it: missing headers added, Bcc taken out, names completed."""
    message = email.parser.BytesParser(policy=email.policy.compat32).parsebytes(raw)
    names = list(recipients)
    if from_headers:
        headers = [str(value) for name in ("To", "Cc", "Bcc") for value in message.get_all(name, [])]
        names += [plain for _, plain in email.utils.getaddresses(headers) if plain]
    to: list[str] = []
    for name in names:
        to += [address(name)] if "@" in name else settings.read("ALERT_RECIPIENT", addresses, ())
    if not to:
        raise ValueError("no recipient: name one, use -t with a To header, or set ALERT_RECIPIENT for names without @")
    del message["Bcc"]
    writer, plain = email.utils.parseaddr(str(message.get("From", "")))
    if "@" not in plain:
        del message["From"]
        message["From"] = email.utils.formataddr((one_line(writer or plain), address(default))) if writer or plain else default
    for name, value in (("Date", email.utils.formatdate(localtime=True)), ("Message-ID", email.utils.make_msgid(domain=hostname())),
                        ("To", ", ".join(to))):  # fmt: skip
        if name not in message:
            message[name] = value
    data = message.as_bytes(policy=email.policy.compat32.clone(linesep="\r\n", max_line_length=None))
    data = re.sub(rb"\r\n|\r|\n", b"\r\n", data)
    null = sender is not None and sender.strip("<> ") == ""
    return Envelope("" if null else address(sender if sender and "@" in sender else default), tuple(dict.fromkeys(to)), [data])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="smtp_module.py", description="Send mail, check the configuration, look after the queue.")
    add_common_flags(parser, logs=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    send = commands.add_parser("send", help="send one mail")
    send.add_argument("--to", action="append", required=True, metavar="ADDRESS", help="may be given more than once")
    send.add_argument("--cc", action="append", default=[], metavar="ADDRESS")
    send.add_argument("--subject", required=True)
    send.add_argument("--body", default="", metavar="TEXT", help="- reads standard input")
    send.add_argument("--html", metavar="FILE")
    send.add_argument("--attach", action="append", default=[], metavar="FILE")
    send.add_argument("--from", dest="sender", metavar="ADDRESS")
    check = commands.add_parser("check", help="try every step up to the mail server")
    check.add_argument("--to", metavar="ADDRESS", help="ask about this recipient too; nothing is sent")
    queue = commands.add_parser("queue", help="what waits, is held or failed")
    queue.add_argument("--json", action="store_true")
    retry = commands.add_parser("retry", help="send failed alerts again")
    drop = commands.add_parser("drop", help="give alerts up")
    commands.add_parser("sendmail", help="send the mail on standard input", add_help=False)
    for command in (send, check):
        command.add_argument("--trace", action="store_true", help="show the dialogue, secrets masked")
    for command in (retry, drop):
        command.add_argument("id", metavar="ID|all")
    for command in (queue, retry, drop):
        command.add_argument("--spool", metavar="FILE", help="default: ALERT_SPOOL or spool/alerts.db")
    for command in (send, check, queue, retry, drop):
        command.add_argument("--env-file", metavar="FILE", default=argparse.SUPPRESS)
    return parser


COMMANDS = {
    "send": command_send,
    "check": command_check,
    "queue": command_queue,
    "retry": command_change,
    "drop": command_change,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    named_sendmail = Path(sys.argv[0]).name == "sendmail"
    try:
        if named_sendmail or argv[:1] == ["sendmail"]:
            return command_sendmail(argv if named_sendmail else argv[1:])
        args = _parser().parse_args(argv)
        return COMMANDS[args.command](args)
    except ConfigError as error:
        fail(EX_CONFIG, str(error))
    except SendError as error:
        fail(exit_code(error.outcomes.values()), str(error))
    except SpoolError as error:
        fail(EX_DATAERR, str(error))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
