#!/usr/bin/env python3
"""server: the relay. Camera recorders send events as lines of JSON over TCP; the owner gets mails.

    camera ──TCP──▶ accept ──▶ journal ──▶ answer
                                  │
                                  └──▶ plan ──▶ render ──▶ deliver ──SMTP──▶ the owner's mailbox

1. Accept: a thread for each connection reads lines and checks them. A line is an event, a heartbeat, a ping or wrong.
2. Journal: the events of one read go into the spool, an SQLite database, in one commit. Then each line is answered, in
   order. The relay has events of its own, which begin here: a camera has fallen silent or is back, a day is over.
3. Plan: what waits in the spool, what was sent, the configuration and the time decide which mails are due and to whom,
   an alert alone or several as a digest, and what is held until when. A plan is not stored; it is made anew.
4. Render: a mail is written when it is about to be sent, in the language of the configuration.
5. Deliver: each recipient gets a mail of their own. What the mail server does not accept is tried again. smtp_module
   does this, and tells at its head how.

The answer `queued` promises that the event is on disk and survives a power cut. It will be mailed to its recipients, or
`smtp_module.py queue` shows that it waits or has failed. A crash at the wrong moment can send a mail twice, with the
same Message-ID.

A peer is a stranger until it has shown the token, or a client certificate where these are asked for; where neither is
set nobody is one. A stranger may only ping, and is the first to go when places, memory, files or threads are short.

    python3 server.py                  with the settings of the environment or .env
    python3 server.py --demo           the whole job on this machine, nothing to configure
"""

from __future__ import annotations

import _thread
import argparse
import base64
import contextlib
import csv
import datetime as dt
import email
import email.policy
import errno
import fnmatch
import hashlib
import hmac
import io
import itertools
import json
import logging
import math
import os
import re
import secrets
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zoneinfo
from collections import ChainMap, Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import smtp_module as smtp
from smtp_module import (
    ConfigError,
    Delivery,
    DueMessage,
    History,
    Message,
    NewEntry,
    Outbox,
    PendingEntry,
    Plan,
    Settings,
)  # fmt: skip

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

PICTURE_MAX_BYTES = 10 << 20  # decoded; most mail servers take 25 MiB, and Base64 adds a third
SEND_TIMEOUT_S = 30  # a peer that does not read its answers for so long gets no more of them
HANDSHAKE_TIMEOUT_S = 10.0
STRANGER_TIMEOUT_S = 30.0  # in place of a longer ALERT_IDLE_TIMEOUT, until a peer has shown the token
LINGER_S = 0.5  # a peer may go on talking for so long after the last answer, so that it gets to read it
BACKLOG = 4096  # a burst of connections must not wait for the kernel's retries; the kernel caps this at somaxconn
READ_BYTES = 64 << 10  # at once; the events in them are one commit
BATCH_LINES = 1000  # of very short lines no more than these are one commit
UNANSWERED_MAX_BYTES = 256 << 20  # the memory of all connections together for what is read and not answered yet
UNANSWERED_FREE_BYTES = READ_BYTES  # each connection may hold this much without being counted
LARGE_LINE_BYTES = 1 << 20  # lines from this size on are parsed one at a time: each takes many times its size
THREAD_STACK_BYTES = 512 << 10
OTHER_FILES = 512  # open files besides the connections: mail servers, the spool, peers that are being turned out
# The switch interval grows with the connections, because a thread that waits for the interpreter wakes up once in each
# interval: when 6,000 idle connections ended together, a client waited 45 s for its answer with the usual 5 ms, and
# 0.9 s with 0.1 ms for each connection (when 2,000 ended, 2.6 s and 0.3 s).
SWITCH_S, SWITCH_EACH_S = 0.005, 0.0001
SLOWEST_BYTES_S = 10_000  # a line that comes more slowly than this is given up after the idle timeout
UNAUTHORIZED_DELAY_S = 1.0  # slows guessing
LOG_AGAIN_S = 60.0  # what can happen thousands of times a second is logged once in this time
STOP_S = 2.0  # for the connections, and again for the mails that are under way
TOKEN_MAX, TIMESTAMP_MAX, LINK_MAX = 1024, 64, 4000  # characters
META_MAX, META_KEY_MAX, META_VALUE_MAX = 32, 100, 2000  # entries, and the characters of a key and of a value
NESTING_MAX = 16
VALUES_MAX = 100_000  # in one line of JSON, so that it does not become a huge tree
DIGEST_MAX = 10_000  # alerts in one digest
DIGEST_ROWS, DIGEST_PICTURES = 50, 4
LANGS = ("en", "fa", "zh")
PRIORITY = ("DOOR_OPENED", "TAMPER_DETECTED", "CAMERA_*")  # what breaks quiet hours unless ALERT_PRIORITY is set
CAMERAS_MAX = 10_000  # cameras whose silence is watched

log = logging.getLogger("relay")


# ───────────────────────────────────────────── Configuration ────────────────────────────────────────
# Converters: text in, value out; ValueError says what is wrong and what is right.


def positive(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Make a converter that refuses 0."""

    def check(text: str) -> Any:
        if not (value := convert(text)):
            raise ValueError(f"{smtp.printable(text)!r} is wrong; give more than 0")
        return value

    return check


def listed(separator: str, convert: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Make a converter for a list of values. Its error names the part that is wrong."""

    def convert_all(text: str) -> tuple[Any, ...]:
        found = []
        for part in map(str.strip, text.rstrip(f"{separator} ").split(separator)):
            try:
                found.append(convert(part))
            except ValueError as error:
                raise ValueError(f"in {smtp.printable(part)!r}: {error}") from None
        return tuple(found)

    return convert_all


def pattern(text: str) -> str:
    """A shell pattern that a name may match, such as `DOOR_*` or `cam[12]`."""
    if not text or ("[" in text and "]" not in text.partition("[")[2]):
        raise ValueError("it is no pattern; write them like DOOR_*,cam[12]")
    return text


def event_pattern(text: str) -> str:
    """A pattern that an event's name can match."""
    if not re.fullmatch(r"[A-Za-z0-9_.*?!\[\]-]+", text):
        raise ValueError("it fits no event; write patterns like DOOR_*,CAMERA_*")
    return pattern(text)


class Route(NamedTuple):
    """Who gets the alerts whose camera or event matches one of the patterns."""

    patterns: tuple[str, ...]
    recipients: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Route:
        """Read `cam1,DOOR_*=a@x.org,b@y.org`."""
        names, equals, recipients = text.partition("=")
        if not equals:
            raise ValueError("no = in it; write cam1,DOOR_*=a@example.com")
        return cls(listed(",", pattern)(names), smtp.addresses(recipients))


def expectation(text: str) -> tuple[str, float]:
    """`cam1=5m` -> the camera, or a pattern, and how often it must be heard."""
    camera, _, limit = text.rpartition("=")
    if not camera.strip():
        raise ValueError("a camera or a time is missing; write cam1=5m or *=10m")
    return pattern(camera.strip()), positive(smtp.duration)(limit)


def clock(text: str) -> int:
    """`08:00` -> minutes after midnight."""
    match = re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", text.strip(), re.ASCII)
    if not match:
        raise ValueError(f"{smtp.printable(text)!r} is not a time; write it like 08:00")
    return int(match[1]) * 60 + int(match[2])


DAY_MINUTES, WEEK_MINUTES = 24 * 60, 7 * 24 * 60
WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def weekdays(text: str) -> set[int]:
    """`Mon-Fri` or `Sat,Sun` -> their numbers, 0 is Monday; all where there is none."""
    days: set[int] = set()
    for part in filter(None, re.split(r"[,\s]+", text)):
        first, _, last = part.partition("-")
        low, high = (WEEKDAYS.index(smtp.one_of(*WEEKDAYS)(name[:3])) for name in (first, last or first))
        days.update((low + step) % 7 for step in range((high - low) % 7 + 1))
    return days or set(range(7))


def quiet_rule(text: str) -> frozenset[int]:
    """`Mon-Fri 22:00-07:00` -> the minutes of the week, from Monday on; the weekdays are those on which it begins."""
    days, _, hours = re.sub(r"\s*-\s*", "-", text).rpartition(" ")
    start, dash, end = hours.partition("-")
    if not dash or start == end:
        raise ValueError("it needs two times; write them like 22:00-07:00")
    first, last = clock(start), DAY_MINUTES if end == "24:00" else clock(end)
    length = (last - first - 1) % DAY_MINUTES + 1
    return frozenset((day * DAY_MINUTES + first + n) % WEEK_MINUTES for day in weekdays(days) for n in range(length))


def quiet_rules(text: str) -> frozenset[int]:
    """`22:00-07:00` or `Mon-Fri 22:00-07:00; Sat,Sun 23:00-09:00` -> the minutes of the week in which it is quiet."""
    minutes = frozenset[int]().union(*listed(";", quiet_rule)(text))
    if len(minutes) == WEEK_MINUTES:
        raise ValueError(f"{smtp.printable(text)!r} never ends; leave some time in which alerts may come")
    return minutes


def setting(variable: str, convert: Callable[[str], Any], default: Any) -> Any:
    """A field of RelayConfig that is read from a variable."""
    return field(default=default, metadata={"name": variable, "convert": convert})


@dataclass(frozen=True)
class RelayConfig:
    """The ALERT_* variables, and who the mails are from."""

    host: str = setting("ALERT_HOST", smtp.host_name, "127.0.0.1")
    port: int = setting("ALERT_PORT", smtp.port, 5000)
    recipients: tuple[str, ...] = setting("ALERT_RECIPIENT", smtp.addresses, ("alerts@localhost",))
    spool: str = setting("ALERT_SPOOL", str, "spool/alerts.db")
    max_line: int = setting("ALERT_MAX_LINE", positive(smtp.size), 16 << 20)
    max_connections: int = setting("ALERT_MAX_CONNECTIONS", smtp.whole(1, 1_000_000), 4096)
    idle_timeout_s: float = setting("ALERT_IDLE_TIMEOUT", positive(smtp.duration), 300.0)
    senders: int = setting("ALERT_SENDERS", smtp.whole(1, 64), 2)
    cooldown_s: float = setting("ALERT_COOLDOWN", smtp.duration, 0.0)
    retry_first_s: float = setting("ALERT_RETRY_FIRST", positive(smtp.duration), 5.0)
    retry_max_s: float = setting("ALERT_RETRY_MAX", positive(smtp.duration), 3600.0)
    max_age_s: float = setting("ALERT_MAX_AGE", positive(smtp.duration), 5 * smtp.DAY_S)
    refused_after_s: float = setting("ALERT_REFUSED_AFTER", smtp.duration, smtp.DAY_S)
    daily_max: int = setting("ALERT_DAILY_MAX", smtp.whole(0, 1_000_000), 0)
    priority: tuple[str, ...] = setting("ALERT_PRIORITY", listed(",", event_pattern), PRIORITY)
    quiet: frozenset[int] = setting("ALERT_QUIET", quiet_rules, frozenset())
    routes: tuple[Route, ...] = setting("ALERT_ROUTES", listed(";", Route.of), ())
    expect: tuple[tuple[str, float], ...] = setting("ALERT_EXPECT", listed(",", expectation), ())
    summary_at: int | None = setting("ALERT_SUMMARY_AT", clock, None)
    lang: str = setting("ALERT_LANG", smtp.one_of(*LANGS), "en")
    spool_max: int = setting("ALERT_SPOOL_MAX", positive(smtp.size), 2 << 30)
    token: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = None
    client_ca: bool = False
    sender: str = "alerts@localhost"

    @classmethod
    def from_settings(cls, settings: Settings, mail: smtp.SMTPConfig) -> RelayConfig:
        """Read the settings. Raises ConfigError."""
        named = [entry for entry in fields(cls) if entry.metadata]
        values: dict[str, Any] = {entry.name: settings.read(**entry.metadata, default=entry.default) for entry in named}
        if not settings.read("ALERT_RECIPIENT", str, "") and not mail.debug:
            raise ConfigError("ALERT_RECIPIENT: missing; give the address that gets the alerts")
        if mail.debug and not settings.read("ALERT_SENDERS", str, ""):
            values["senders"] = 1  # the debug receiver serves one session at a time
        names = ("ALERT_TLS_CERT", "ALERT_TLS_KEY", "ALERT_TLS_CLIENT_CA")
        cert, key, client_ca = (settings.read(name, str, "") for name in names)
        if (key or client_ca) and not cert:
            raise ConfigError(f"ALERT_TLS_CERT: missing, though {names[1 if key else 2]} is set")
        tls = smtp.server_tls(cert, key, client_ca, names=", ".join(names)) if cert else None
        longest = max(len(names) for names in (values["recipients"], *(one.recipients for one in values["routes"])))
        if 0 < values["daily_max"] < longest:
            raise ConfigError(f"ALERT_DAILY_MAX: an alert to {longest} recipients is {longest} mails; give as many")
        token = settings.secret("ALERT_TOKEN").strip()
        if len(token) > TOKEN_MAX:
            raise ConfigError(f"ALERT_TOKEN: too long; at most {TOKEN_MAX} characters")
        return cls(**values, token=token, tls=tls, client_ca=bool(client_ca), sender=mail.sender)

    def exposed(self) -> bool:
        """Would the relay listen beyond this machine with nothing that keeps strangers out?"""
        return not (self.token or self.client_ca or smtp.is_loopback(self.host))


# ───────────────────────────────────────────── Events ───────────────────────────────────────────────
# Pure: one line of bytes in; an event, a heartbeat or a ping out, or the refusal to tell the peer.


class Refusal(Exception):
    """What is wrong with a line: a code for programs and a sentence for people. `closes`: the connection ends."""

    def __init__(self, code: str, detail: str, *, closes: bool = False) -> None:
        super().__init__(detail)
        self.code, self.detail, self.closes = code, smtp.printable(detail), closes


class Event(NamedTuple):
    """A checked event. `entry` is what the spool keeps; `warning` says what of the event was left out or cut."""

    entry: NewEntry
    warning: str = ""


class Heartbeat(NamedTuple):
    """A camera says that it is there."""

    camera: str


class Ping(NamedTuple):
    """The peer asks how things are. `trusted`: it may know the counts."""

    trusted: bool


EVENT_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
EVENT_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
SURROGATE = re.compile("[\ud800-\udfff]")
WEB_LINK = re.compile(
    rf"""(?=.{{1,{LINK_MAX}}}\Z)"""
    r"""https?://(?:[^\s<>"\\/?#@]+@)?"""
    r"""(?:\[[0-9a-f:.]+\]|[^\s<>"\\/?#:@\[\]]+)(?::\d{1,5})?"""  # there is a host
    r"""(?:[/?#][^\s<>"\\]*)?""",
    re.IGNORECASE,
)
# White space, what Unicode calls default-ignorable, the blank Braille pattern, and the marks of interlinear annotation:
# a name must have something else, but may have these, too (Persian and emoji need some of them).
NOTHING_SHOWN = (
    r"\s\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164"
    r"\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
CAMERA = re.compile(rf"(?![{NOTHING_SHOWN}]{{0,128}}\Z).{{1,128}}", re.DOTALL)


def parse_line(line: bytes, token: bytes, now: float) -> Event | Heartbeat | Ping:
    """One line of the wire protocol. Raises Refusal.

    `token` is the SHA-256 of the relay's secret, or b"" where there is none.
    """
    values = read_json(line)
    event, heartbeat, given = values.get("event"), values.get("heartbeat"), values.get("token")
    guess = given[: TOKEN_MAX + 1].encode("utf-8", "replace") if isinstance(given, str) else b""
    trusted = not token or hmac.compare_digest(hashlib.sha256(guess).digest(), token)
    if not trusted and any(value is not None for value in (event, heartbeat, given)):  # a ping, too, may hold a guess
        raise Refusal("unauthorized", "token is missing or wrong", closes=True)
    if event is not None:
        return _event(values, now)
    if heartbeat is not None:
        return Heartbeat(FIELDS["camera"](heartbeat))
    if values.get("ping") is not None:
        return Ping(trusted)
    raise Refusal("bad_event", "the line has neither event, heartbeat nor ping")


# JSON that cannot hurt: its depth and the number of its values are bounded (the digits of a number by Python), and NaN
# is refused.

_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_decode = json.JSONDecoder(parse_constant=_no_constant).decode
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def read_json(line: bytes) -> dict[str, Any]:
    """The object on the line. Raises Refusal."""
    try:
        _check_size(line)
        values = _decode(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Refusal("bad_json", f"the line is not JSON: {error}") from None
    if type(values) is not dict:
        raise Refusal("bad_json", "the line is JSON, but not an object; write {…}")
    return values


def _check_size(line: bytes) -> None:
    """Refuse what json would make a deep recursion or a huge tree of, at the speed of memchr. Raises ValueError."""
    brackets = line.count(b"[") + line.count(b"{")
    if max(brackets, line.count(b","), line.count(b'"') // 4) > VALUES_MAX:
        raise ValueError(f"more than {VALUES_MAX} values")
    if brackets > NESTING_MAX:
        outside = b"".join(line.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
        nested = outside.translate(_BRACKETS, _NO_BRACKETS)
        for _ in range(NESTING_MAX):
            nested = nested.replace(b"[]", b"")
        if nested:
            raise ValueError(f"nested deeper than {NESTING_MAX}, or a bracket is missing")


# The fields. Each check returns the value as it is kept.


def _event(values: Mapping[str, Any], now: float) -> Event:
    content = {name: check(value) for name, check in FIELDS.items() if (value := values.get(name)) is not None}
    if "camera" not in content:
        raise Refusal("bad_event", "camera is missing")
    wished_id, picture, warnings = content.pop("id", ""), None, []
    if (meta := values.get("meta")) is not None:
        content["meta"], shortened = check_meta(meta)
        if shortened:
            warnings.append(f"meta cut: a key has at most {META_KEY_MAX} characters, a value {META_VALUE_MAX}")
    if (image := values.get("image_b64")) is not None:
        try:
            picture, kind = check_picture(image)
            content["image"] = picture_name(values.get("image_filename"), kind)
        except ValueError as error:
            content["dropped"], picture = str(error), None
            warnings.append(f"image dropped: {error}")
    return Event(new_entry(content, now, wished_id, picture), "; ".join(warnings))


def new_entry(content: Mapping[str, Any], now: float, wished_id: str = "", picture: bytes | None = None) -> NewEntry:
    """What the spool keeps of an event."""
    payload = _encode(content).encode("utf-8")
    name = wished_id or secrets.token_hex(12)
    return NewEntry(name, content["event"], content["camera"], payload, picture, now, unique=not wished_id)


def _matching(allowed: re.Pattern[str], sentence: str) -> Callable[[object], str]:
    def check(value: object) -> str:
        if type(value) is not str or not allowed.fullmatch(value) or smtp.UNPRINTABLE.search(value):
            raise Refusal("bad_event", sentence)
        return value

    return check


def _timestamp(value: object) -> str:
    """ISO 8601 in UTC; what came without an offset was UTC."""
    try:
        when = dt.datetime.fromisoformat(value if type(value) is str and len(value) <= TIMESTAMP_MAX else "")
        when = when.astimezone(dt.UTC) if when.tzinfo else when.replace(tzinfo=dt.UTC)
        when.astimezone()  # it must have a local time, too
    except (ValueError, OverflowError, OSError):
        raise Refusal("bad_event", "timestamp must be ISO 8601, like 2026-05-01T22:15:00Z") from None
    return when.isoformat()


def check_meta(value: object) -> tuple[dict[str, str | int | float | bool], bool]:
    """The keys and values as they are kept, and whether one of them was too long and is cut. Raises Refusal."""
    # null counts as absent, and the order of the keys tells nothing
    given = {key: entry for key, entry in value.items() if entry is not None} if type(value) is dict else None
    if given is None or len(given) > META_MAX:
        raise Refusal("bad_event", f"meta must be an object of at most {META_MAX} values")
    kept, shortened = {}, False
    for full_key in sorted(given):
        key, entry = full_key[:META_KEY_MAX], given[full_key]
        if type(entry) not in (str, int, float, bool) or (type(entry) is float and not math.isfinite(entry)):
            raise Refusal("bad_event", f"meta {key!r} must be a string, a number, true or false")
        text = str(entry)  # a whole number, too, may have thousands of digits
        if len(text) > META_VALUE_MAX:
            entry = text = text[:META_VALUE_MAX]
            shortened = True
        if SURROGATE.search(f"{key}{text}"):
            raise Refusal("bad_event", "meta holds half a surrogate pair, which is no character")
        shortened |= len(full_key) > META_KEY_MAX
        kept[key] = entry
    return kept, shortened


FIELDS: Mapping[str, Callable[[object], Any]] = {
    "event": _matching(EVENT_NAME, "event must be 1 to 64 characters of A-Z a-z 0-9 _ . -"),
    "camera": _matching(CAMERA, "a camera's name must be 1 to 128 printable characters"),
    "timestamp": _timestamp,
    "image_url": _matching(
        WEB_LINK, f"image_url must be an http:// or https:// link without blanks, of at most {LINK_MAX} characters"
    ),
    "id": _matching(EVENT_ID, "id must be 1 to 128 characters of A-Z a-z 0-9 . _ : -"),
}

TOO_LARGE = f"larger than {PICTURE_MAX_BYTES >> 20} MiB"
NOT_BASE64 = "not valid Base64"
NO_PICTURE = "not a JPEG, PNG, GIF, WebP or BMP picture"
NO_STRING = "image_b64 and image_filename must be strings"
BASE64_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
PICTURE_START = re.compile(
    rb"(?P<jpeg>\xff\xd8\xff)|(?P<png>\x89PNG\r\n\x1a\n)|(?P<gif>GIF8[79]a)|(?P<webp>RIFF.{4}WEBP)|(?P<bmp>BM)",
    re.DOTALL,
)


def check_picture(value: object) -> tuple[bytes, str]:
    """The strict, canonical Base64 of a picture, not decoded, which would take three times as long, and its kind.

    Raises ValueError.
    """
    if not isinstance(value, str):
        raise ValueError(NO_STRING)
    text = value.encode("ascii", "replace")
    last = text[-4:]
    padding = last.count(b"=")
    if len(text) % 4 or padding > 2 or text.rstrip(b"=").translate(None, BASE64_ALPHABET):
        raise ValueError(NOT_BASE64)
    if base64.b64encode(base64.b64decode(last)) != last:  # bits that are cut off must be 0, RFC 4648 3.5
        raise ValueError(NOT_BASE64)
    if len(text) // 4 * 3 - padding > PICTURE_MAX_BYTES:
        raise ValueError(TOO_LARGE)
    return text, picture_kind(text)


def picture_kind(text: bytes) -> str:
    """`jpeg`, `png` and so on by the first bytes of a picture in Base64. Raises ValueError."""
    start = PICTURE_START.match(base64.b64decode(text[:64]))
    if not start or not start.lastgroup:
        raise ValueError(NO_PICTURE)
    return start.lastgroup


def picture_name(name: object, kind: str) -> str:
    """The last path component of the wished name, cleaned, with the suffix of a picture. Raises ValueError."""
    if not isinstance(name, str | None):
        raise ValueError(NO_STRING)
    path = (name or "").replace("\\", "/")
    start = path.rfind("/") + 1
    last = path[start : start + 1000]
    clean = re.sub(r'[<>:"|?*\s]+', "_", smtp.UNPRINTABLE.sub("", last)).strip("._ -")[:100]
    known = re.search(r"\.(jpe?g|png|gif|webp|bmp)$", clean, re.IGNORECASE)
    return clean if known else f"{clean or 'picture'}.{kind.replace('jpeg', 'jpg')}"


def answer_line(**fields: object) -> bytes:
    """The fields as a line of JSON."""
    return json.dumps(fields).encode("ascii") + b"\n"


def answer(receipt: smtp.PutResult, event: Event) -> bytes:
    """The line that answers an accepted event."""
    warnings = [event.warning] if event.warning else []
    if receipt.id != event.entry.id:
        warnings.append("this id was used before for another event; the alert has a new id")
    more = {"warning": "; ".join(warnings)} if warnings else {}
    return answer_line(ok=True, id=receipt.id, status="queued" if receipt.new else "duplicate", **more)


def refusal_line(refusal: Refusal) -> bytes:
    """The line that answers a refused one."""
    return answer_line(ok=False, error=refusal.code, detail=refusal.detail)


# ───────────────────────────────────────────── Accept ───────────────────────────────────────────────
# Each connection has a thread, which reads what has arrived, journals its events in one commit and answers in order.
#
# Whenever places (ALERT_MAX_CONNECTIONS), memory (UNANSWERED_MAX_BYTES), open files or threads are short, the stranger
# that came first is turned out: its connection ends with `busy`, over TLS without a word. A peer that needs room when
# no stranger is left gets the `busy` itself.

BUSY = Refusal("busy", "too many connections or half-sent lines; try again later", closes=True)
STOPPING = Refusal("shutting_down", "the relay is stopping; send this again later", closes=True)
SPOOL_FULL = Refusal("spool_full", "no room is left for alerts; try again later")
SPOOL_ERROR = Refusal("spool_error", "the disk failed; try again later")
NO_MEMORY = "out of memory or threads"  # a thread needs memory for its stack


class LineReader:
    """Bytes in, whole lines out, without blank ones.

    A line beyond the limit is read past and comes out as a Refusal.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._too_large = Refusal("too_large", f"the line is longer than {limit} bytes")
        self._begin_line()

    def _begin_line(self) -> None:
        self._pieces: list[bytes] = []
        self.length = 0  # of the unfinished line, as sent
        self._began = math.inf  # monotonic; infinite while there is no unfinished line

    def feed(self, chunk: bytes) -> list[bytes | Refusal]:
        """The lines that end in this chunk. A Refusal that closes the connection comes last."""
        if b"\n" not in chunk:  # many times as quick as split
            return self._keep(chunk)
        first, *others, rest = chunk.split(b"\n")
        lines = [line.removesuffix(b"\r") for line in (self._finish(first), *others)]
        found = [self._too_large if len(line) > self._limit else line for line in lines if line.strip()]
        return found + self._keep(rest)

    def kept_bytes(self) -> int:
        """The memory that the unfinished line takes."""
        return self.length if self._pieces else 0

    def is_late(self, patience_s: float) -> bool:
        """Has the unfinished line come for longer than `patience_s`, and more slowly than a line may?"""
        return time.monotonic() - self._began > patience_s + self.length / SLOWEST_BYTES_S

    def _keep(self, piece: bytes) -> list[bytes | Refusal]:
        if not piece:
            return []
        self._began = min(self._began, time.monotonic())
        self.length += len(piece)
        if self.length > 4 * self._limit:
            sentence = f"the line goes on beyond four times {self._limit} bytes"
            return [Refusal("too_large", sentence, closes=True)]
        if self.length > self._limit + 1:  # it may be one longer: a CR before the LF does not count
            self._pieces = []
        else:
            self._pieces.append(piece)
        return []

    def _finish(self, last: bytes) -> bytes:
        """The line that ends here; one that was read past is only as long as it takes to be refused."""
        line = b"".join((*self._pieces, last)) if self.length <= self._limit + 1 else bytes(self._limit + 2)
        self._begin_line()
        return line


class Connection:
    """One peer, served by its own thread until it leaves or is turned out."""

    def __init__(self, sock: socket.socket, peer: str, relay: Relay) -> None:
        self.sock, self.peer, self._relay = sock, peer, relay
        self.trusted = not (relay.config.token or relay.config.client_ca)  # False: the peer is a stranger
        self.turned_out = False
        self.counted_bytes = 0  # what the relay counts for this connection, and guards with its lock
        self.handling = False  # its lines are parsed and journalled, and their memory cannot be freed now
        self._write_failed = False  # the peer takes no answers any more; what it has sent still counts
        self._lines = LineReader(relay.config.max_line)

    def serve(self) -> None:
        """Read, journal, answer, until the peer or the relay ends it."""
        try:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if tls := self._relay.config.tls:
                self._shake_hands(tls)
            self._set_timeouts()
            while self._serve_once():
                pass
        except OSError as error:  # reset, timed out, no TLS: this peer only
            log.debug("the connection of %s ended: %s", self.peer, error)
        except MemoryError:
            self._relay.make_room(NO_MEMORY)
        except Exception:
            log.exception("the thread of a connection failed")
        finally:
            if self.turned_out and self._lines.length:
                # The kernel takes no more of a line that is still being sent, and the peer would wait to send on. A
                # reset ends that.
                with contextlib.suppress(OSError):
                    self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            smtp.close_gently(self.sock, LINGER_S)
            self._relay.remove(self)

    def trust(self) -> None:
        """The peer has shown the token or a certificate: it is no stranger any more."""
        if not self.trusted:
            self.trusted = True
            self._set_timeouts()

    def _shake_hands(self, tls: ssl.SSLContext) -> None:
        """Begin TLS. Raises OSError."""
        self.sock.settimeout(HANDSHAKE_TIMEOUT_S)
        self.sock = wrapped = tls.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
        try:
            wrapped.do_handshake()
        except ssl.SSLError as error:
            if not isinstance(error, ssl.SSLEOFError):  # one that only looks whether the port is open
                self._relay.log_once("no TLS with %s: %s", self.peer, smtp.printable(error))
            raise
        self.trusted = self.trusted or self._relay.config.client_ca

    def _patience_s(self) -> float:
        """For how long the peer may be silent."""
        idle_s = self._relay.config.idle_timeout_s
        return idle_s if self.trusted else min(idle_s, STRANGER_TIMEOUT_S)

    def _set_timeouts(self) -> None:
        smtp.wait_at_most(self.sock, self._patience_s(), SEND_TIMEOUT_S)

    def _serve_once(self) -> bool:
        """Journal and answer the lines that end in the next chunk. False: the connection is over. Raises OSError."""
        chunk = self.sock.recv(READ_BYTES)
        lines = self._lines.feed(chunk) if chunk else self._last_line()
        last: Refusal | None = None  # what closes the connection
        while lines and not last:  # a chunk may hold very many tiny lines
            self.handling = True
            answers, last = self._relay.handle_lines(self, lines[:BATCH_LINES])
            self.handling = False
            del lines[:BATCH_LINES]
            if last and last.code == "unauthorized":
                lines.clear()
                self._relay.count_bytes(self, 0)  # nothing is kept meanwhile
                time.sleep(UNAUTHORIZED_DELAY_S)
            self._send(answers)
        if last or not chunk:
            return False
        if self._lines.is_late(self._patience_s()):
            raise TimeoutError("a line took too long")
        if self._relay.count_bytes(self, self._lines.kept_bytes()):
            return True
        self._send(refusal_line(BUSY))
        return False

    def _last_line(self) -> list[bytes | Refusal]:
        """What becomes of the unfinished line at the end: it is whole if the peer ended the connection."""
        if not self._lines.length or self.turned_out:
            return []
        return [STOPPING] if self._relay.stopping else self._lines.feed(b"\n")

    def _send(self, answers: bytes) -> None:
        if not self._write_failed:
            try:
                self.sock.sendall(answers)
            except OSError:
                self._write_failed = True


Parsed = Event | Heartbeat | Ping | Refusal


class Relay:
    """The accepting side: listeners, connections, and the way from lines to answers."""

    def __init__(
        self, config: RelayConfig, outbox: Outbox, monitor: CameraMonitor, notify: Callable[[], object]
    ) -> None:
        self.config, self._outbox, self._monitor, self._notify = config, outbox, monitor, notify
        self._token = hashlib.sha256(config.token.encode("utf-8", "replace")).digest() if config.token else b""
        self._lock = threading.RLock()  # guards the next three
        self._connections: dict[Connection, None] = {}  # in the order in which they came
        self._counted_bytes = 0  # of all connections
        self._logged_at: dict[str, float] = {}
        self._large_lines = threading.Lock()  # held while one is parsed
        self._refused: socket.socket | None = None  # the last peer that got no place
        self.stopping = False
        self._listeners: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def log_once(self, template: str, *values: object, level: int = logging.WARNING) -> None:
        """Log what may happen thousands of times a second: each template at most once a minute (LOG_AGAIN_S)."""
        with self._lock:
            now = time.monotonic()
            if now - self._logged_at.get(template, -math.inf) < LOG_AGAIN_S:
                return
            self._logged_at[template] = now
        log.log(level, template, *values)

    # From lines to answers.

    def handle_lines(self, connection: Connection, lines: Sequence[bytes | Refusal]) -> tuple[bytes, Refusal | None]:
        """Journal the events among the lines in one commit. The answers in order, and what closes the connection."""
        now = time.time()
        parsed: list[Parsed] = []
        last: Refusal | None = None
        for line in lines:
            parsed.append(one := self._parse(line, now))
            if isinstance(one, Refusal) and one.closes:
                last = one
                break
        receipts = iter(self._journal([one for one in parsed if isinstance(one, Event)]))
        answers = [self._answer(one, receipts) for one in parsed]
        if any(one.trusted if isinstance(one, Ping) else not isinstance(one, Refusal) for one in parsed):
            connection.trust()
        if last and last.code == "unauthorized":
            self.log_once("%s was refused: %s", connection.peer, last.detail)
        return b"".join(answers), last or (STOPPING if self._outbox.closed else None)

    def _parse(self, line: bytes | Refusal, now: float) -> Parsed:
        try:
            if isinstance(line, Refusal):
                return line
            with self._large_lines if len(line) >= LARGE_LINE_BYTES else contextlib.nullcontext():
                return parse_line(line, self._token, now)
        except Refusal as refusal:
            # A new one: what was raised holds its frames, and they hold the whole batch until garbage is collected.
            return Refusal(refusal.code, refusal.detail, closes=refusal.closes)
        except MemoryError:  # this is about us, not about the line: it must come again
            self.make_room(NO_MEMORY)
            return BUSY
        except Exception:
            log.exception("a line could not be read")
            return Refusal("bad_event", "the line could not be read")

    def _journal(self, events: Sequence[Event]) -> Sequence[smtp.PutResult | Refusal]:
        if not events:
            return ()
        try:
            receipts = self._outbox.put([event.entry for event in events])
        except smtp.SpoolError as error:
            if self._outbox.closed:  # a peer that sends on and on outlives the wait for it
                return [STOPPING] * len(events)
            refusal = SPOOL_FULL if isinstance(error, smtp.SpoolFull) else SPOOL_ERROR
            self.log_once(f"{refusal.code}: %s", error, level=logging.ERROR)
            return [refusal] * len(events)
        self._notify()
        accepted = []
        for (entry, _), receipt in zip(events, receipts, strict=True):
            self._monitor.heard(entry.source, entry.kind)
            accepted.append(f"{entry.kind} {entry.source} ({receipt.id}{'' if receipt.new else ', duplicate'})")
        log.info("accepted %s", summarize(accepted))
        return receipts

    def _answer(self, parsed: Parsed, receipts: Iterator[smtp.PutResult | Refusal]) -> bytes:
        if isinstance(parsed, Event):
            receipt = next(receipts)
            return refusal_line(receipt) if isinstance(receipt, Refusal) else answer(receipt, parsed)
        if isinstance(parsed, Heartbeat):
            self._monitor.heard(parsed.camera)
            return answer_line(ok=True, status="alive")
        if isinstance(parsed, Ping):
            counts = self._outbox.counts() if parsed.trusted else {}
            return answer_line(ok=True, status="pong", **counts)
        return refusal_line(parsed)

    # Places, memory, files and threads.

    def add(self, connection: Connection) -> bool:
        """Give the connection a place. False: there is none."""
        with self._lock:
            if len(self._connections) >= self.config.max_connections and not self._turn_out_first():
                return False
            self._connections[connection] = None
            return True

    def remove(self, connection: Connection) -> None:
        """The connection has ended: its place and its memory are free."""
        with self._lock:
            self._connections.pop(connection, None)
            self._counted_bytes -= connection.counted_bytes
            connection.counted_bytes = 0

    def count_bytes(self, connection: Connection, number: int) -> bool:
        """Count so many bytes for what a connection has read and not answered. False: there is no room for them."""
        number = number if number > UNANSWERED_FREE_BYTES else 0
        if number == connection.counted_bytes and not connection.turned_out:
            return True
        with self._lock:
            while not connection.turned_out:
                total = self._counted_bytes - connection.counted_bytes + number
                if total <= UNANSWERED_MAX_BYTES:
                    self._counted_bytes, connection.counted_bytes = total, number
                    return True
                if not self._turn_out_first():
                    break
        return False

    def make_room(self, why: str) -> None:
        """The system gives no more memory, threads or open files."""
        self.log_once("connections are refused, and have to come again: %s", why, level=logging.ERROR)
        self._turn_out_first()

    def _turn_out_first(self) -> bool:
        """Turn out the stranger that came first. False: there is none."""
        with self._lock:
            strangers = (one for one in self._connections if not (one.trusted or one.turned_out or one.handling))
            if not (stranger := next(strangers, None)):
                return False
            self._counted_bytes -= stranger.counted_bytes
            stranger.counted_bytes = 0
            stranger.turned_out = True
            self._say_busy(stranger.sock, socket.SHUT_RDWR)  # this wakes its thread
        words = "room is short, and peers that have shown neither token nor certificate are turned out, as %s"
        self.log_once(words, stranger.peer)
        return True

    def _say_busy(self, sock: socket.socket, direction: int) -> None:
        """Say busy, without waiting for a peer that does not read, and shut the connection down; over TLS only that."""
        with contextlib.suppress(OSError):
            sock.setblocking(False)
            if not self.config.tls:
                sock.send(refusal_line(BUSY))
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, direction)  # SSLSocket's own would end the encryption, too

    # Listeners and threads.

    def listen(self) -> None:
        """Bind the port, so that connections wait there until `start`. Raises OSError."""
        self._listeners = smtp.listen(self.config.host, self.config.port, BACKLOG)
        self.port = self._listeners[0].getsockname()[1]

    def start(self) -> None:
        """Accept connections, and log where."""
        for listener in self._listeners:
            thread = threading.Thread(target=self._accept_loop, args=(listener,), name="accept", daemon=True)
            thread.start()
            self._threads.append(thread)
        smtp.log_listening(log, self._listeners)

    def _accept_loop(self, listener: socket.socket) -> None:
        """Accept until the relay stops. Nothing that is wrong with one connection ends this loop."""
        listener.settimeout(0.5)
        while not self.stopping:
            sys.setswitchinterval(max(SWITCH_S, len(self._connections) * SWITCH_EACH_S))
            try:
                self._admit(*listener.accept())
            except TimeoutError:
                pass
            except (OSError, MemoryError) as error:
                why = getattr(error, "errno", errno.ENOMEM)
                if why in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self.make_room(os.strerror(why))
                time.sleep(0.02)  # the connection stays in the queue: trying again at once would be a busy loop

    def _admit(self, sock: socket.socket, address: smtp.Address) -> None:
        """Give the peer a place and a thread, or say busy.

        The socket of a refused peer stays open until the next one is refused. Closed at once, the peer could not read
        the answer if it has sent something: unread input turns the end into a reset.
        """
        connection = None
        try:
            connection = Connection(sock, smtp.show_address(address), self)
            if self.add(connection):
                # Thread.start would wait for a sign of life, for ever where memory is too short for one.
                _thread.start_new_thread(connection.serve, ())
                return
            self.log_once("%s was refused: too many connections", connection.peer)
        except (RuntimeError, MemoryError):
            if connection:
                self.remove(connection)
            self.make_room(NO_MEMORY)
        self._say_busy(sock, socket.SHUT_WR)
        with self._lock:
            before, self._refused = self._refused, sock
        if before:
            before.close()

    def stop(self, timeout: float) -> None:
        """Stop accepting, answer what has been read, and wait at most `timeout` seconds for the connections to end."""
        self.stopping = True
        for listener, thread in zip(self._listeners, self._threads, strict=True):
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # this wakes accept
            thread.join(1.0)
            listener.close()
        if self._refused:
            self._refused.close()
        until = time.monotonic() + timeout
        with self._lock:
            peers = [connection.sock for connection in self._connections]
        for sock in peers:
            with contextlib.suppress(OSError):
                # This wakes the thread; what has arrived is still read. SSLSocket's own would end the encryption, too.
                socket.socket.shutdown(sock, socket.SHUT_RD)
        while self._connections and time.monotonic() < until:
            time.sleep(0.01)


# ───────────────────────────────────────────── Plan ─────────────────────────────────────────────────
# Pure: what waits, what was sent, the configuration and the time in; the messages that are due out. No plan is stored,
# so a changed recipient, route or quiet hour counts for what waits, too.

SUMMARY = "daily:summary"  # the event name of the relay's own daily mail; no client can send a colon
LATE_S = 3600.0  # where mails are counted, what is later than this, and than its window, comes as a digest
OVERDUE_S = 5.0  # what has waited this much longer than its window was held up by the server, not by the window


def plan(config: RelayConfig, waiting: Iterable[PendingEntry], sent: History, now: float, most: int) -> Plan:
    """The messages that are due now, and when to look again.

    Single alerts go oldest first. Looking stops at `most` of them; then no digest is made yet, since more may
    belong to it.
    """
    planner = Planner(config, sent, now)
    for entry in waiting:
        planner.assign(entry)
        if len(planner.due) >= most:
            return Plan(planner.due, now if planner.digests else planner.wake, planner.why)
    for (kind, to), entries in planner.digests.items():
        planner.add(kind, to, entries)
    return Plan(planner.due, planner.wake, planner.why)


def route(config: RelayConfig, event: str, camera: str) -> tuple[str, ...]:
    """Who gets this alert: the first route with a pattern that matches, else ALERT_RECIPIENT."""
    for one in config.routes:
        if _matches(camera, one.patterns) or _matches(event, one.patterns):
            return one.recipients
    return config.recipients


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def quiet_hours(minutes: Container[int], now: float) -> tuple[float, float]:
    """When quiet hours last ended, and when those of now end (`now`: it is not quiet), by the clock on the wall."""
    here = dt.datetime.fromtimestamp(now).replace(second=0, microsecond=0)
    at = (here.weekday() * 24 + here.hour) * 60 + here.minute
    since = next(n for n in itertools.count() if (at - n - 1) % WEEK_MINUTES in minutes)
    left = next(n for n in itertools.count() if (at + n) % WEEK_MINUTES not in minutes)
    ended, ends = here - dt.timedelta(minutes=since), here + dt.timedelta(minutes=left)
    return ended.timestamp(), ends.timestamp() if left else now


class Planner:
    """One run of the plan: what it has decided so far."""

    def __init__(self, config: RelayConfig, sent: History, now: float) -> None:
        self._config, self._sent, self._now = config, sent, now
        self.due: list[DueMessage] = []
        self.digests: dict[tuple[str, tuple[str, ...]], list[PendingEntry]] = {}  # by kind and recipients
        self._joined: dict[tuple[str, str], str] = {}  # group: kind of the digest that its alerts go with
        self._began = ChainMap[tuple[str, str], float]({}, sent.groups)  # when the last mail of a group was created
        self._used = 0  # deliveries that this run has decided on
        self.wake: float | None = None
        self.why = ""
        self._quiet_ended, self._quiet_until = quiet_hours(config.quiet, now) if config.quiet else (-math.inf, now)
        # Deliveries of the last 24 hours; of a clock that was set back, none from further ahead than that.
        self._times = sorted(when for when in sent.times if now - smtp.DAY_S < when <= now + smtp.DAY_S)
        self._budget_resets_at = (self._times[0] if self._times else now) + smtp.DAY_S

    def assign(self, entry: PendingEntry) -> None:
        """Make the alert a mail of its own, put it into the digest that it belongs to, or hold it.

        The rules follow each other: its route, quiet hours, its cooldown, and the daily limit.
        """
        to = tuple(name for name in route(self._config, entry.kind, entry.source) if name not in entry.served)
        if to and self._sent.paused.issuperset(to):
            return  # It stays free to become part of a digest; the plan is made anew when the pause is over.
        urgent = entry.kind == SUMMARY or _matches(entry.kind, self._config.priority)
        if not urgent and self._now < self._quiet_until:
            self._hold(self._quiet_until, "quiet hours")
            return
        kind, held_until = self._kind(entry, urgent)
        if held_until > self._now:
            self._hold(held_until, "cooldown")
        elif (kind, to) in self.digests:
            self._join(kind, to, entry)
        elif kind == "paced" and not urgent and (when := self._digest_due(entry)) > self._now:
            self._hold(when, "half of the daily limit is used: digests only")
        elif self._left() < max(1, len(to)):
            self._hold(self._budget_resets_at, "the daily limit is used up")
        elif kind:
            self._join(kind, to, entry)
        else:
            self._began[entry.kind, entry.source] = self._now
            self.add("", to, [entry])

    def _kind(self, entry: PendingEntry, urgent: bool) -> tuple[str, float]:
        """The digest that the alert belongs to ("": none), and when its cooldown ends (0: it has none)."""
        if entry.kind == SUMMARY:
            return "", 0.0
        group = (entry.kind, entry.source)
        kind = self._late(entry, urgent)
        if kind == "paced":  # What its group has begun a digest with goes with that, whatever is left for others.
            kind = self._joined.get(group, kind)
        if kind or not self._config.cooldown_s:
            return kind, 0.0
        began = self._began.get(group, math.inf)
        ends = began + self._config.cooldown_s if began <= self._now else -math.inf  # or the clock was set back
        window = f"window {entry.kind} {entry.source}" if entry.arrived < ends else ""
        return self._joined.get(group) or window, ends

    def _late(self, entry: PendingEntry, urgent: bool) -> str:
        """The digest of what had to wait: for the daily limit, for the end of quiet hours, or for the server."""
        waited, cooldown = self._now - entry.arrived, self._config.cooldown_s
        night = not urgent and entry.arrived < self._quiet_ended
        if most := self._config.daily_max:
            scarce = self._left() <= most / 2
            late = waited > max(LATE_S, cooldown)
            if (scarce and late) if urgent else (scarce or late or night):
                return "paced"  # the night's, too: two kinds would be two mails
        if night:
            return "quiet"
        return "overdue" if cooldown and waited > cooldown + min(OVERDUE_S, cooldown) else ""

    # the daily limit

    def _left(self) -> float:
        """Deliveries that may still go in these 24 hours."""
        if not self._config.daily_max:
            return math.inf
        return self._config.daily_max - len(self._times) - self._sent.untried - self._used

    def _digest_due(self, entry: PendingEntry) -> float:
        """When the next digest goes: at most half of what remained at half-time, evenly over the time that is left.

        The rest stays free for priority alerts, but behind them nothing waits for more than a day.
        """
        most = self._config.daily_max
        spare = self._left() - math.ceil(most / 4)
        if self._left() > most / 2 or self._now - entry.arrived > smtp.DAY_S:
            return self._now
        if spare <= 0:
            return self._budget_resets_at
        half = math.ceil(most / 2)
        used = self._times[half - 1] if len(self._times) >= half else self._now
        began = min(self._now, max(used, self._sent.kinds.get("paced", used)))
        return began + (self._budget_resets_at - began) / spare

    # what is decided

    def _hold(self, until: float, why: str) -> None:
        if self.wake is None or until < self.wake:
            self.wake, self.why = until, why

    def _join(self, kind: str, to: tuple[str, ...], entry: PendingEntry) -> None:
        if (kind, to) not in self.digests:
            self._used += len(to)
        entries = self.digests.setdefault((kind, to), [])
        entries.append(entry)
        self._joined[entry.kind, entry.source] = kind
        if len(entries) == DIGEST_MAX:
            self.add(kind, to, self.digests.pop((kind, to)))

    def add(self, kind: str, to: tuple[str, ...], entries: Sequence[PendingEntry]) -> None:
        """A message is due."""
        self._used += 0 if kind else len(to)
        word = "paced" if kind == "paced" else "digest" if len(entries) > 1 else "alert"
        groups = tuple(dict.fromkeys((entry.kind, entry.source) for entry in entries))
        self.due.append(DueMessage(tuple(entry.seq for entry in entries), to, word, groups))


# ───────────────────────────────────────────── Monitor ──────────────────────────────────────────────
# The relay's own events: a camera has fallen silent or is back, and the daily mail. Silence is measured by the
# monotonic clock, so that setting the clock accuses no camera. The wall clock is for what people read, and for the hour
# of the daily mail.

CAMERA_SCHEMA = """
CREATE TABLE IF NOT EXISTS cameras(camera TEXT PRIMARY KEY, seen REAL NOT NULL, silent INTEGER NOT NULL);
"""
MONITOR_TICK_S = 1.0
MONITOR_SAVE_S = 5.0


@dataclass
class Camera:
    """A camera that must be heard: the longest silence allowed, and its last sign by both clocks."""

    limit: float
    heard: float  # monotonic
    seen: float  # wall clock


class CameraMonitor:
    """Who was heard when, and who is silent. Survives a restart through the spool."""

    def __init__(self, config: RelayConfig, outbox: Outbox) -> None:
        """A relay that was itself down accuses nobody: every camera's time begins anew."""
        self._expect, self._outbox = config.expect, outbox
        self._lock = threading.Lock()
        self._cameras: dict[str, Camera] = {}
        self._silent: dict[str, float] = {}  # those whose silence was raised, and when they were last seen before it
        self._unsaved: set[str] = set()
        self._ticked = self._saved = time.monotonic()
        if self._expect:
            for name, _ in self._expect:
                if not re.search(r"[*?\[]", name):
                    self._expected(name)
            for name, seen, silent in outbox.rows("SELECT camera, seen, silent FROM cameras"):
                if camera := self._expected(name):
                    camera.seen = seen
                    if silent:
                        camera.heard, self._silent[name] = -math.inf, seen

    def _expected(self, name: str) -> Camera | None:
        """The camera, if ALERT_EXPECT tells of it: by its name, else by the first pattern that matches."""
        if name not in self._cameras and len(self._cameras) < CAMERAS_MAX:
            matching = (limit for pattern, limit in self._expect if fnmatch.fnmatchcase(name, pattern))
            if limit := dict(self._expect).get(name) or next(matching, None):
                self._cameras[name] = Camera(limit, time.monotonic(), time.time())
        return self._cameras.get(name)

    def heard(self, name: str, event: str = "") -> None:
        """A sign of life. A recorder's own word that the camera is gone is none."""
        if self._expect and event != "CAMERA_DISCONNECTED":
            with self._lock:
                if camera := self._expected(name):
                    camera.heard, camera.seen = time.monotonic(), time.time()
                    self._unsaved.add(name)

    def silent(self) -> list[str]:
        """Who is silent now."""
        with self._lock:
            return sorted(self._silent)

    def tick(self, mono: float, now: float, last: bool = False) -> bool:
        """Raise alerts for who fell silent and who is back; True if there were any. At the `last` one all is saved.

        An alert and the fact that it was raised are one transaction, so that it is raised once. Raises SpoolError.
        """
        with self._lock:
            away, self._ticked = mono - self._ticked, mono
            if away > 5 * MONITOR_TICK_S:  # The relay itself was stopped: nobody could be heard meanwhile.
                for camera in self._cameras.values():
                    camera.heard = min(mono, camera.heard + away)
            late = {name for name, camera in self._cameras.items() if mono - camera.heard > camera.limit}
            gone, back = late - self._silent.keys(), self._silent.keys() - late
            raised = bool(gone or back)
            if not (raised or (self._unsaved and (last or mono - self._saved > MONITOR_SAVE_S))):
                return False
            with self._outbox.transaction() as db:
                for name in back:
                    seconds = round(self._cameras[name].seen - self._silent[name])
                    self._outbox.add(db, _relay_alert("CAMERA_RECONNECTED", name, now, gone_s=max(0, seconds)))
                for name in gone:
                    seen = smtp.iso(self._cameras[name].seen)
                    self._outbox.add(db, _relay_alert("CAMERA_DISCONNECTED", name, now, last_seen=seen))
                rows = [(name, self._cameras[name].seen, name in late) for name in gone | self._unsaved]
                db.executemany("INSERT OR REPLACE INTO cameras VALUES (?, ?, ?)", rows)
            self._silent = {name: self._silent.get(name, self._cameras[name].seen) for name in late}
            self._unsaved, self._saved = set(), mono
            return raised


def _relay_alert(event: str, camera: str, now: float, **more: object) -> NewEntry:
    return new_entry({"event": event, "camera": camera, **more}, now, f"relay-{secrets.token_hex(10)}")


class DailySummary:
    """The daily mail: once a day, also when the relay was off at the hour, but not for the day before it began."""

    def __init__(self, at: int | None, now: float, outbox: Outbox) -> None:
        self._at, self._outbox = at, outbox
        last = outbox.status().get("summary")  # the day of the last one
        self._written = dt.date.fromisoformat(last) if last else self._day(now)

    def _day(self, now: float) -> dt.date:
        """The last day whose hour has passed."""
        moment = dt.datetime.fromtimestamp(now)
        passed = self._at is not None and moment.hour * 60 + moment.minute >= self._at
        return moment.date() if passed else moment.date() - dt.timedelta(days=1)

    def tick(self, now: float, silent: Sequence[str]) -> bool:
        """Put the day's mail if it is due; True if it was. Raises SpoolError; then it is due again."""
        day = self._day(now)
        due = self._at is not None and day > self._written
        if due:
            entry = self._summary(now, silent)
            with self._outbox.transaction() as db:
                self._outbox.add(db, entry)
                self._outbox.store_status(db, summary=str(day))
        if due or self._written > day + dt.timedelta(days=1):  # the clock was ahead by days
            self._written = day
        return due

    def _summary(self, now: float, silent: Sequence[str]) -> NewEntry:
        """What was received, what waits, what failed, who is silent."""
        groups = self._outbox.rows(
            "SELECT kind, source, count(*) FROM entries WHERE arrived > ? AND kind != ? GROUP BY kind, source"
            " ORDER BY 3 DESC", now - smtp.DAY_S, SUMMARY,
        )  # fmt: skip
        meta = {"received": sum(number for *_, number in groups), "groups": groups[:20], "silent": silent}
        meta |= {"why": self._outbox.unreported()[1], **self._outbox.counts()}
        return new_entry({"event": SUMMARY, "camera": "relay", "meta": meta}, now)


# ───────────────────────────────────────────── Render ───────────────────────────────────────────────
# Pure: what is due in, a composed mail out. What, where, when and the picture come first; the rest is below.

EVENT_WORDS = {
    "MOTION_DETECTED": ("Motion detected", "حرکت دیده شد", "检测到移动"),
    "DOOR_OPENED": ("Door opened", "در باز شد", "门已打开"),
    "CAMERA_DISCONNECTED": ("Camera disconnected", "ارتباط دوربین قطع شد", "摄像机断开"),
    "CAMERA_RECONNECTED": ("Camera reconnected", "ارتباط دوربین برقرار شد", "摄像机恢复连接"),
    "TAMPER_DETECTED": ("Tampering detected", "دستکاری دوربین", "检测到破坏"),
    "SYSTEM_RESTARTED": ("System restarted", "سامانه دوباره راه‌اندازی شد", "系统已重启"),
}
WORDS = {
    "event": ("Event", "رویداد", "事件"),
    "camera": ("Camera", "دوربین", "摄像机"),
    "time": ("Time", "زمان", "时间"),
    "arrived": ("Arrived", "دریافت", "收到"),
    "clock": ("Camera's clock", "ساعت دوربین", "摄像机时钟"),
    "link": ("Link", "پیوند", "链接"),
    "last_seen": ("Last seen", "آخرین نشانه", "最后在线"),
    "gone": ("Was gone", "مدت قطعی", "离线时长"),
    "dropped": ("Picture left out", "تصویر حذف شد", "图片已略去"),
    "too_big": ("too big for the mail server", "برای سرور ایمیل بزرگ است", "超出邮件服务器限制"),
    "server_reply": ("the mail server said: {reply}", "پاسخ سرور ایمیل: {reply}", "邮件服务器的答复：{reply}"),
    "damaged": ("damaged on the relay's disk", "روی دیسک سامانه آسیب دیده است", "在警报系统的磁盘上已损坏"),
    TOO_LARGE: (TOO_LARGE, "بزرگ‌تر از ۱۰ مگابایت", "大于 10 MiB"),
    NOT_BASE64: (NOT_BASE64, "کد Base64 نادرست", "不是有效的 Base64"),
    NO_PICTURE: (NO_PICTURE, "تصویر شناخته‌شده نیست", "不是可识别的图片"),
    NO_STRING: (NO_STRING, "فیلد تصویر متن نیست", "图片字段不是字符串"),
    "reported": (
        "On {time} the camera {camera} reported: {event}.",
        "{time} دوربین {camera} گزارش داد: {event}.",
        "摄像机 {camera} 报告: {event} ({time}).",
    ),
    "nothing_heard": (
        "Nothing has been heard from the camera {camera} since {time}; it may be off, or its network may be down.",
        "از {time} از دوربین {camera} خبری نرسیده است؛ شاید خاموش باشد یا شبکهٔ آن قطع باشد.",
        "自 {time} 起没有收到摄像机 {camera} 的信号；它可能已关机，或者网络已断开。",
    ),
    "heard_again": (
        "The camera {camera} is heard again; it was gone for {gone}.",
        "دوربین {camera} دوباره در دسترس است؛ مدت قطعی {gone} بود.",
        "摄像机 {camera} 又有信号了；离线时长 {gone}。",
    ),
    "wrong_clock": (
        "The camera's clock said {clock}, but the alert arrived at {arrived}: its clock is wrong, or it was delayed.",
        "ساعت دوربین {clock} بود، ولی هشدار در {arrived} رسید: یا ساعت دوربین نادرست است یا هشدار دیر رسیده است.",
        "摄像机的时钟显示 {clock}，而警报于 {arrived} 到达：摄像机的时钟不准，或者警报被延误了。",
    ),
    "attached": (
        "The picture is attached as {name}.",
        "تصویر با نام {name} پیوست شده است.",
        "图片已作为附件附上: {name}",
    ),
    "alerts": ("{count} alerts", "{count} هشدار", "{count} 条警报"),
    "counted": (
        "{count} alerts arrived from {first} to {last}: {events}. They came from {cameras}.",
        "{count} هشدار از {first} تا {last} رسید: {events}. دوربین‌ها: {cameras}.",
        "从 {first} 到 {last} 共收到 {count} 条警报: {events}. 来自 {cameras}。",
    ),
    "csv": (
        "Each of them is a line of the attached events.csv, which spreadsheets open.",
        "هر هشدار یک سطر از فایل پیوست events.csv است که با برنامه‌های صفحه‌گسترده باز می‌شود.",
        "每条警报都是附件 events.csv 中的一行，可用电子表格软件打开。",
    ),
    "more": (
        "The first {shown} of {count}; all of them are in events.csv.",
        "{shown} مورد نخست از {count}؛ همه در events.csv هست.",
        "前 {shown} 条，共 {count} 条；全部见 events.csv。",
    ),
    "failed": (
        "Alerts that could not be delivered before: {count}",
        "هشدارهایی که پیش از این فرستاده نشد: {count}",
        "此前未能送达的警报：{count} 条",
    ),
    "summary": ("Daily summary", "خلاصهٔ روزانه", "每日摘要"),
    "day": (
        "In the 24 hours before {time} {received} alerts arrived; {queued} wait, and {failed} failed.",
        "در ۲۴ ساعت پیش از {time}، {received} هشدار رسید؛ {queued} در انتظار و {failed} ناموفق است.",
        "在 {time} 之前的 24 小时内收到 {received} 条警报；{queued} 条等待发送，{failed} 条发送失败。",
    ),
    "received": ("Alerts in 24 hours", "هشدارهای ۲۴ ساعت گذشته", "24 小时内的警报"),
    "queued": ("Waiting", "در انتظار", "等待中"),
    "failures": ("Failed", "ناموفق", "失败"),
    "silent": ("Silent cameras", "دوربین‌های خاموش", "无响应的摄像机"),
    "none": ("none", "هیچ", "无"),
    "absence": (
        "This mail comes every day. If it does not come, look after the relay.",
        "این ایمیل هر روز می‌آید. اگر نیامد، به سامانه سر بزنید.",
        "此邮件每天发送。如未收到，请检查警报系统。",
    ),
    "footer": (
        "Sent by the alert relay on {host}, which does not read answers to this mail. Who gets which alerts, and how"
        " often, is set there with ALERT_RECIPIENT, ALERT_ROUTES, ALERT_COOLDOWN and ALERT_QUIET.",
        "فرستنده: سامانهٔ هشدار روی {host}. این سامانه پاسخ ایمیل‌ها را نمی‌خواند. گیرندگان هشدارها و فاصلهٔ"
        " ارسال آن‌ها در همان سامانه تعیین می‌شود: ALERT_RECIPIENT، ALERT_ROUTES، ALERT_COOLDOWN، ALERT_QUIET.",
        "此邮件由 {host} 上的警报系统发出，系统不会读取回复。哪些人在什么时候收到哪些警报，由该系统的设置决定："
        "ALERT_RECIPIENT、ALERT_ROUTES、ALERT_COOLDOWN、ALERT_QUIET。",
    ),
    "units": ("d h min s", "روز ساعت دقیقه ثانیه", "天 小时 分钟 秒"),
    "weekdays": (
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
        "دوشنبه سه‌شنبه چهارشنبه پنجشنبه جمعه شنبه یکشنبه",
        "星期一 星期二 星期三 星期四 星期五 星期六 星期日",
    ),
}
CLOCK_OFF = dt.timedelta(minutes=1)  # a camera's clock that is further from the arrival than this gets it beside it
DIGEST_META_CHARS, ROW_META_CHARS = 6000, 200  # of all rows and of one row of a digest: Gmail cuts pages over 102 KB
CSV_MAX_BYTES = 4 << 20  # when events.csv has reached this, the meta of the remaining rows is left out
SILENT_SHOWN = 50  # names in a summary
REASON_CHARS = 1000  # of why alerts failed
FORMULA = re.compile(r"\s*[-=+@＝＋－＠]")  # a spreadsheet computes what begins so


class EventView(NamedTuple):
    """An event as its reader sees it."""

    id: str
    event: str
    camera: str
    content: Mapping[str, Any]
    picture: Callable[[], bytes | None]
    arrived: dt.datetime  # UTC
    happened: dt.datetime  # UTC, by the camera's clock if the event has a timestamp
    clock_is_off: bool  # the camera's clock is wrong, or the event was long on its way
    local: str  # local time by which it stands among others: of its arrival if the clock is off

    @classmethod
    def of(cls, entry: smtp.Entry) -> EventView:
        content = _decode(entry.payload.decode("utf-8"))
        arrived = dt.datetime.fromtimestamp(entry.arrived, dt.UTC)
        timestamp = content.get("timestamp")
        happened = dt.datetime.fromisoformat(timestamp) if timestamp else arrived
        off = abs(happened - arrived) >= CLOCK_OFF
        local = local_time(arrived if off else happened)
        return cls(entry.id, content["event"], content["camera"], content, entry.picture, arrived, happened, off, local)

    def key(self) -> str:
        """What Message-ID and Content-ID are functions of: an id that is used again years later arrives then."""
        return f"{self.id} {self.arrived.timestamp()}"

    def meta(self) -> dict[str, str]:
        """The meta as texts."""
        return {
            key[:META_KEY_MAX]: str(value).lower() if isinstance(value, bool) else str(value)[:META_VALUE_MAX]
            for key, value in self.content.get("meta", {}).items()
        }

    def meta_line(self) -> str:
        """The meta in one line."""
        return smtp.one_line("; ".join(f"{key}={value}" for key, value in self.meta().items()))


def local_time(moment: dt.datetime) -> str:
    """`2026-05-02 00:15:00 +0200`: what a clock on the wall of the relay shows."""
    written = moment.astimezone().isoformat(" ", "seconds")  # strftime takes four times as long
    return f"{written[:19]} {written[19:].replace(':', '')}"


def utc_time(moment: dt.datetime) -> str:
    return f"{moment.isoformat()[:19]}Z"


def both_times(local: str, moment: dt.datetime) -> str:
    """Local time and UTC beside it; UTC alone where that is the local time."""
    utc = f"{utc_time(moment)} (UTC)"
    return utc if local.endswith("+0000") else f"{local}\n{utc}"


def clock_and_day(local: str) -> str:
    return f"{local[11:19]}, {local[:10]}"


def unknown_time_zone(name: str) -> str:
    """A warning if the system does not know `name`, the value of TZ, as a time zone. It uses UTC then, silently."""
    zone = name.removeprefix(":")
    posix = re.match(r"(?:<[-+A-Za-z0-9]+>|[A-Za-z]{3,})[-+]?\d", zone)  # like CET-1CEST,M3.5.0,M10.5.0/3
    files = [Path(folder, zone) for folder in zoneinfo.TZPATH]
    if zone in ("", "UTC", "GMT") or posix or os.name == "nt" or any(file.is_file() for file in files):
        return ""
    return f"TZ: {name!r} is no known time zone, so UTC is used; write one like Europe/Berlin, and install tzdata"


@dataclass
class MailContent:
    """A page and what else belongs to its mail."""

    subject: str
    key: str  # the Message-ID is a function of it
    page: smtp.Page
    files: Sequence[smtp.Attachment] = ()
    headers: Mapping[str, str] = field(default_factory=dict)


class AlertMailer:
    """The policy of the relay's outbox: which mails are due, for whom, and what they say in its language."""

    def __init__(self, config: RelayConfig) -> None:
        self._config = config
        planned = config.cooldown_s or config.daily_max or config.quiet
        self.window = max(config.cooldown_s, smtp.DAY_S) if planned else 0.0
        self.limit = config.daily_max
        lang = LANGS.index(config.lang)
        self._words = {key: words[lang] for key, words in WORDS.items()}
        self._event_words = {name: words[lang] for name, words in EVENT_WORDS.items()}
        self._address = smtp.address(config.sender)

    def plan(self, waiting: Iterable[PendingEntry], sent: History, now: float, most: int) -> Plan:
        return plan(self._config, waiting, sent, now, most)

    def recipients(self, kind: str, source: str) -> tuple[str, ...]:
        return route(self._config, kind, source)

    def render(self, delivery: Delivery, entries: Sequence[smtp.Entry]) -> Message:
        """The mail as it goes out. Where its size is limited, the newest of its pictures that fit stay."""
        limit, first = delivery.max_bytes, entries[0]
        left_out = self._words["server_reply"].format(reply=delivery.error) if limit == 0 else ""
        if len(entries) > 1:
            about = f"a digest of {len(entries)} alerts"
            content = self._digest(sorted(entries, key=lambda entry: (entry.arrived, entry.seq)), left_out)
        else:
            about, view = f"{first.kind} {first.source}", EventView.of(first)
            content = self._summary(view) if view.event == SUMMARY else self._alert(view, left_out)
        content.page.notes.append(self._sentence("footer", host=smtp.hostname()))
        if delivery.reports:
            failures = f"{self._words['failed'].format(count=len(delivery.reports))}\n{delivery.why[:REASON_CHARS]}"
            content.page.notes.append(smtp.sentence("{failures}", {"failures": failures.strip()}, bad=True))
        data = self._compose(content, delivery.recipients)
        if limit and sum(map(len, data)) > limit:
            data = self._compose_within(limit, content, delivery.recipients)
        return Message(self._address, data, about)

    def _compose(self, content: MailContent, to: Sequence[str]) -> list[bytes]:
        return smtp.compose_page(
            content.page,
            files=content.files,
            sender=self._config.sender,
            to=to,
            subject=content.subject,
            message_id=smtp.message_id(content.key, self._address),
            headers={"Auto-Submitted": "auto-generated", **content.headers},
        )

    def _compose_within(self, limit: int, content: MailContent, to: Sequence[str]) -> list[bytes]:
        """The mail with the newest of its pictures that fit, and a note about the others."""
        page = content.page
        newest, kept = page.pictures, list[smtp.Picture]()
        if newest:
            page.notes.insert(0, self._picture_left_out(self._words["too_big"]))
        for picture in newest:
            page.pictures = [*kept, picture]
            if sum(map(len, self._compose(content, to))) <= limit:
                kept.append(picture)
        page.pictures = kept
        return self._compose(content, to)

    def _alert(self, view: EventView, left_out: str) -> MailContent:
        """One alert. `left_out`: why it has no picture, "" if it has one."""
        words, content, camera, event = self._words, view.content, view.camera, self._event(view.event)
        happened = local_time(view.happened)
        title = [event, camera, clock_and_day(happened)]
        rows: list[tuple[str | smtp.Link, ...]] = [
            (words["event"], view.event),
            (words["camera"], camera),
            (words["time"], both_times(happened, view.happened)),
        ]
        if "last_seen" in content:
            seen = local_time(dt.datetime.fromisoformat(content["last_seen"]))[:19]
            rows.append((words["last_seen"], seen))
            sentences = [self._sentence("nothing_heard", camera=camera, time=seen)]
        elif "gone_s" in content:
            gone = self._duration(content["gone_s"])
            rows.append((words["gone"], gone))
            sentences = [self._sentence("heard_again", camera=camera, gone=gone)]
        else:
            sentences = [self._sentence("reported", camera=camera, event=event, time=self._time(view.local))]
        if view.clock_is_off:
            title.append(f"{words['arrived']}: {clock_and_day(view.local)}")
            rows.append((words["arrived"], both_times(view.local, view.arrived)))
            sentences.append(self._sentence("wrong_clock", clock=happened[:19], arrived=view.local[:19]))
        rows += view.meta().items()
        if "image_url" in content:
            rows.append((words["link"], smtp.Link(content["image_url"])))
        pictures = [] if left_out else self._pictures([view])
        if pictures:
            sentences.append(self._sentence("attached", name=pictures[0].file.filename))
        elif "image" in content:
            rows.append((words["dropped"], left_out or words["damaged"]))
        elif "dropped" in content:
            rows.append((words["dropped"], words[content["dropped"]]))
        thread = hashlib.sha256(f"{camera}\n{view.local[:10]}".encode()).hexdigest()[:32]
        return MailContent(
            subject=f"DVR ALERT: {view.event} - {camera}",
            key=f"alert:{view.key()}",
            page=self._page(title, [view.event], pictures, sentences, smtp.Table(rows)),
            headers={"X-Alert-Id": view.id, "References": f"<{thread}@{self._address.rpartition('@')[2]}>"},
        )

    def _digest(self, entries: Sequence[smtp.Entry], left_out: str) -> MailContent:
        """Many alerts, in the order in which they arrived. Each is decoded when its turn comes, and not kept."""
        words, count, room = self._words, len(entries), DIGEST_META_CHARS
        events, cameras, keys, with_picture = Counter[str](), Counter[str](), [], []
        rows: list[tuple[str, ...]] = []
        table = io.BytesIO()
        text = io.TextIOWrapper(table, "utf-8-sig", newline="", write_through=True)  # spreadsheets need the mark
        writer = csv.writer(text)
        writer.writerow(("id", "event", "camera", "time", "arrived", "meta"))
        for number, entry in enumerate(entries):
            view = EventView.of(entry)
            meta = view.meta_line() if table.tell() < CSV_MAX_BYTES else ""
            cells = (view.id, view.event, view.camera, utc_time(view.happened), utc_time(view.arrived), meta)
            writer.writerow([f"'{cell}" if FORMULA.match(cell) else cell for cell in cells])
            keys.append(view.key())
            events[view.event] += 1
            cameras[view.camera] += 1
            if "image" in view.content:
                with_picture.append(entry)
            if number < DIGEST_ROWS:
                clock = f"{words['clock']}: {local_time(view.happened)[:19]}" if view.clock_is_off else ""
                meta = meta[: min(room, ROW_META_CHARS)]
                room -= len(meta)
                rows.append((view.local[5:19], self._event(view.event), view.camera))
                if clock or meta:
                    rows.append(("", "; ".join(filter(None, (clock, meta)))))
        first, last = (EventView.of(entry).local[:19] for entry in (entries[0], entries[-1]))
        counted = summarize(f"{self._event(event)} ({number})" for event, number in events.most_common())
        pictures = [] if left_out else self._pictures(map(EventView.of, reversed(with_picture)))
        title = [
            f"{words['alerts'].format(count=count)}: {summarize(map(self._event, events))}",
            summarize(cameras),
            f"{first} - {last}",
        ]
        sentences = [
            self._sentence("counted", first=first, last=last, count=count, events=counted, cameras=summarize(cameras)),
            self._sentence("csv"),
        ]
        page = self._page(title, events, pictures, sentences, smtp.Table(rows, separator="  "))
        if count > DIGEST_ROWS:
            page.notes.append(self._sentence("more", shown=DIGEST_ROWS, count=count))
        if left_out and with_picture:
            page.notes.append(self._picture_left_out(left_out))
        return MailContent(
            subject=f"DVR ALERT: {count} alerts - {summarize(events)} - {summarize(cameras)}",
            key="digest:" + "\n".join(sorted(keys)),
            page=page,
            files=[smtp.Attachment("events.csv", "text/csv; charset=utf-8", table.getvalue())],
        )

    def _summary(self, view: EventView) -> MailContent:
        words, meta = self._words, view.content["meta"]
        groups = meta["groups"]  # of the day: event, camera, number of alerts
        most = max([number for _, _, number in groups], default=1)
        counts = {name: meta[name] for name in ("received", "queued", "failed")}
        rows = [
            (words["received"], str(meta["received"])),
            (words["queued"], str(meta["queued"])),
            (words["failures"], f"{meta['failed']}\n{meta['why'][:REASON_CHARS]}".strip()),
            (words["silent"], summarize(meta["silent"], SILENT_SHOWN) or words["none"]),
        ]
        bars = [(f"{self._event(name)}, {camera}", smtp.Bar(str(n), n / most)) for name, camera, n in groups]
        page = smtp.Page(
            [words["summary"], smtp.hostname(), clock_and_day(view.local)],
            self._config.lang,
            smtp.RED if meta["failed"] or meta["silent"] else smtp.GREEN,
            sentences=[self._sentence("day", time=self._time(view.local), **counts), self._sentence("absence")],
            tables=[smtp.Table(rows), smtp.Table(bars)],
        )
        return MailContent(
            subject=f"DVR summary: {view.local[:10]} - {meta['received']} alerts, {meta['queued']} waiting,"
            f" {meta['failed']} failed, {len(meta['silent'])} silent",
            key=f"summary:{smtp.hostname()} {view.key()}",
            page=page,
        )

    def _page(
        self,
        title: list[str],
        events: Iterable[str],
        pictures: list[smtp.Picture],
        sentences: list[smtp.Sentence],
        table: smtp.Table,
    ) -> smtp.Page:
        """A page that is red if one of its events has priority."""
        colour = smtp.RED if any(_matches(event, self._config.priority) for event in events) else smtp.BLUE
        return smtp.Page(title, self._config.lang, colour, pictures, sentences, tables=[table])

    def _pictures(self, newest: Iterable[EventView]) -> list[smtp.Picture]:
        """The first few that there are."""
        found = ((view, picture) for view in newest if (picture := view.picture()))
        pictures = []
        for view, picture in itertools.islice(found, DIGEST_PICTURES):
            cid, kind = smtp.content_id(f"picture:{view.key()}", self._address), f"image/{picture_kind(picture)}"
            caption = f"{view.local[11:19]}, {self._event(view.event)}, {view.camera}"
            file = smtp.Attachment(view.content["image"], kind, base64=picture, cid=cid)
            pictures.append(smtp.Picture(caption, file))
        return pictures

    def _event(self, name: str) -> str:
        """The words for an event; one that is not known stands for itself."""
        return self._event_words.get(name, name)

    def _sentence(self, key: str, **values: object) -> smtp.Sentence:
        return smtp.sentence(self._words[key], values)

    def _picture_left_out(self, why: str) -> smtp.Sentence:
        return smtp.sentence("{dropped}: {why}", {"dropped": self._words["dropped"], "why": why}, bad=True)

    def _time(self, local: str) -> str:
        """A local time in a sentence."""
        weekdays = self._words["weekdays"].split()
        return f"{weekdays[dt.date.fromisoformat(local[:10]).weekday()]} {local[:19]}"

    def _duration(self, seconds: float) -> str:
        """A length of time for people, in the largest unit of which there are two."""
        units = zip(self._words["units"].split(), (86400, 3600, 60, 1), strict=True)
        unit, size = next((unit, size) for unit, size in units if seconds >= 2 * size or size == 1)
        return f"{seconds / size:.0f} {unit}"


def summarize(names: Iterable[str], most: int = 3) -> str:
    """The first different ones, and how many more there are."""
    different = list(dict.fromkeys(names))
    return ", ".join(different[:most]) + (f", +{len(different) - most}" if len(different) > most else "")


# ───────────────────────────────────────────── Wiring ───────────────────────────────────────────────


def allow_files(number: int) -> None:
    """So many open files, where the system has a lower limit (1,024 is usual) and lets us raise it so far."""
    if resource:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = number if hard == resource.RLIM_INFINITY else min(number, hard)
        if soft != resource.RLIM_INFINITY and soft < most:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def serve(config: RelayConfig, mail: smtp.SMTPConfig) -> int:
    """Run the relay until SIGTERM or Ctrl-C. What is downstream starts first and stops last."""
    stopping, woken = socket.socketpair()  # an Event's lock could be held by the very thread that the signal interrupts
    woken.setblocking(False)
    signal.set_wakeup_fd(woken.fileno())
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: None)
    threading.stack_size(THREAD_STACK_BYTES)
    allow_files(config.max_connections + OTHER_FILES)
    if words := unknown_time_zone(os.environ.get("TZ", "")):
        log.warning("%s", words)
    outbox = smtp.when_possible(
        lambda: Outbox(config.spool, schema=CAMERA_SCHEMA, size_max=config.spool_max), stopping, "ALERT_SPOOL"
    )
    if outbox is None:
        return smtp.EX_OK
    rules = smtp.RetryRules(config.retry_first_s, config.retry_max_s, config.max_age_s, config.refused_after_s)
    courier = smtp.Courier(
        outbox,
        AlertMailer(config),
        lambda: smtp.SMTPClient(mail),
        senders=config.senders,
        rules=rules,
        keep_open_s=1.0 if mail.debug else smtp.KEEP_OPEN_S,  # the debug receiver serves one at a time
        advise=lambda outcome: smtp.advice(outcome, mail.host),
    )
    monitor = CameraMonitor(config, outbox)
    relay = Relay(config, outbox, monitor, courier.notify)
    smtp.when_possible(relay.listen, stopping, "ALERT_HOST")
    courier.start()
    relay.start()
    summary = DailySummary(config.summary_at, time.time(), outbox)
    smtp.systemd_notify("READY=1")
    while not select.select([stopping], [], [], MONITOR_TICK_S)[0]:
        try:
            raised = monitor.tick(time.monotonic(), time.time())
            if summary.tick(time.time(), monitor.silent()) or raised:
                courier.notify()
        except smtp.SpoolError as error:
            log.error("%s", error)
    log.info("stopping")
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)  # a second one must not end what the first has begun
    smtp.systemd_notify("STOPPING=1")
    relay.stop(STOP_S)
    with contextlib.suppress(smtp.SpoolError):
        monitor.tick(time.monotonic(), time.time(), last=True)
    courier.stop(STOP_S)
    outbox.close()
    return smtp.EX_OK


# ───────────────────────────────────────────── Demo ─────────────────────────────────────────────────
# Real processes on free ports in a temporary folder; whatever is missing at the end is said, and the exit code is 1.

DEMO_WAIT_S = 20.0
COLOUR_BARS = base64.b64decode(  # a PNG, for want of a camera
    "iVBORw0KGgoAAAANSUhEUgAAAKAAAABaBAMAAADN6EBhAAAAGFBMVEXAwMDAwAAAwMAAwADAAMDAAAAAAMAQEBDUtV1+AAAARElEQVR42u3M"
    "0QDAMBQAsadQhSlMoQpTmEL193cSSwAyk5Urd3aevDkZoVAoFAqFQqFQKBQKhUKhUCgUCoVCoVD4v/ADXUSJy0P259UAAAAASUVORK5CYII="
)


class Demo(contextlib.ExitStack):
    """Programs of ours as processes in a folder of their own; leaving ends them, the last one first."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="dvr-demo-"))
        ours = ("ALERT_", "DEVICE_", "SMTP_")
        self._environ = {name: value for name, value in os.environ.items() if not name.startswith(ours)}

    def _command(self, program: str, *args: str) -> list[str]:
        return [sys.executable, str(Path(__file__).with_name(program)), *args]

    def start(self, name: str, *args: str, **environ: str) -> int:
        """Start a server and wait for the port that it logs."""
        logfile = self.folder / f"{name}.log"
        with logfile.open("w") as output:
            process = subprocess.Popen(
                self._command(*args), cwd=self.folder, env=self._environ | environ, stdout=output, stderr=output
            )
        self.enter_context(process)
        self.callback(process.terminate)
        port = re.compile(r"listening on \S+:(\d+)")
        found = self.until(lambda: port.search(logfile.read_text("utf-8")), f"{name} did not start")
        print(f"  {name:<9} listens on port {found[1]}")
        return int(found[1])

    def until(self, check: Callable[[], Any], complaint: str) -> Any:
        """Wait until `check` gives something. Raises TimeoutError."""
        end = time.monotonic() + DEMO_WAIT_S
        while not (found := check()):
            if time.monotonic() > end:
                raise TimeoutError(f"{complaint} (logs are in {self.folder})")
            time.sleep(0.02)
        return found

    def client(self, number: int, *args: str) -> None:
        """Run client.py and show what it says."""
        print(f"  $ python3 client.py {' '.join(args)}")
        command = self._command("client.py", f"--port={number}", *args)
        done = subprocess.run(command, cwd=self.folder, env=self._environ, capture_output=True, text=True, check=False)
        print(f"    {done.stdout.strip()}{done.stderr.strip()}")
        done.check_returncode()

    def mail(self, number: int, sender: str, to: str, subject: str, text: str = "") -> None:
        """Send a mail to one of the servers."""
        print(f"  a mail from {sender}: {subject}")
        smtp.send_email(subject, text, to, config=smtp.SMTPConfig(host="127.0.0.1", port=number, sender=sender))

    def received(self, subject: str) -> None:
        """Wait for a mail whose Subject holds this; keep it as .eml, and as a page with its pictures in it."""

        def look() -> Any:
            for path in self.folder.glob("mail/new/*"):
                message = email.message_from_bytes(path.read_bytes(), policy=email.policy.default)
                if subject in str(message["Subject"]):
                    return path, message
            return None

        path, message = self.until(look, f"no mail came with the Subject {subject!r}")
        kept = self.folder / re.sub(r"\W+", "-", str(message["Subject"])).strip("-").lower()
        shutil.copyfile(path, f"{kept}.eml")
        page = message.get_body(("html",)).get_content()
        files = [part for part in message.walk() if part.get_filename()]
        for part in files:
            if cid := part["Content-ID"]:
                encoded = base64.b64encode(part.get_content()).decode("ascii")
                page = page.replace(f"cid:{cid[1:-1]}", f"data:{part.get_content_type()};base64,{encoded}")
        Path(f"{kept}.html").write_text(page, "utf-8")
        print(f"  {message['Subject']}", *(f"  [{part.get_filename()}]" for part in files))


def demo() -> int:
    """The whole job with real processes on this machine; 0 if everything arrived."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a console that cannot show a name still shows the rest
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Demo() as show:
        try:
            _demo(show)
        except (KeyboardInterrupt, TimeoutError, subprocess.CalledProcessError, smtp.SendError) as error:
            print(f"FAILED: {str(error) or 'interrupted'}")
            return 1
    print(f"\nThe mails, each as .eml and as .html to open in a browser, are in\n  {show.folder}")
    return smtp.EX_OK


def _demo(show: Demo) -> None:
    print("1. Start a mail receiver, the relay, a device, and the gateway for cameras that only speak SMTP")
    to = show.start("receiver", "embedded_smtpd.py", "--debug", "--quiet", "--port=0", "--maildir=mail")
    relay = show.start("relay", "server.py", "--port=0", SMTP_PORT=str(to))
    device = show.start("device", "embedded_smtpd.py", "--host=127.0.0.1", "--port=0", SMTP_PORT=str(to))
    gateway = show.start("gateway", "embedded_smtpd.py", f"--to-relay=127.0.0.1:{relay}", "--port=0")

    print("\n2. A camera raises alerts")
    (show.folder / "garden.png").write_bytes(COLOUR_BARS)
    show.client(relay, "--event", "MOTION_DETECTED", "--camera", "garden", "--image", "garden.png")
    show.client(relay, "--event", "DOOR_OPENED", "--camera", "حیاط")

    print("\n3. A camera that can only send mail raises one")
    text = "Alarm Event: Motion Detection\r\nAlarm Input Channel No.: 2\r\nAlarm Device Name: porch\r\n"
    show.mail(gateway, "nvr@camera.lan", "alerts@relay.lan", "Alarm from NVR", text)

    print("\n4. The owner commands the device by mail")
    show.mail(device, "owner@example.com", "device@localhost", "CMD SET relay1=on")

    print("\n5. What the receiver got")
    for subject in ("DETECTED - garden", "DOOR_OPENED - حیاط", "DETECTED - porch", "Re: CMD SET relay1=on"):
        show.received(subject)


# ───────────────────────────────────────────── Command line ─────────────────────────────────────────


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="server.py", description="The relay: events over TCP in, mails out.")
    parser.add_argument("--host", help="address to listen on (ALERT_HOST, default 127.0.0.1)")
    parser.add_argument("--port", help="port to listen on (ALERT_PORT, default 5000; 0 takes a free one)")
    parser.add_argument("--spool", metavar="FILE", help="the journal (ALERT_SPOOL, default spool/alerts.db)")
    parser.add_argument("--allow-open", action="store_true", help="listen beyond this machine without token or TLS")
    parser.add_argument("--demo", action="store_true", help="show the whole job on this machine, and exit")
    smtp.add_common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the relay or the demo; the exit code."""
    args = _parser().parse_args(argv)
    if args.demo:
        return demo()
    smtp.start_logging(args.log_level)
    smtp.keep_buffers()
    flags = {"ALERT_HOST": args.host, "ALERT_PORT": args.port, "ALERT_SPOOL": args.spool}
    try:
        settings = Settings.load(flags, args.env_file)
        settings.tell_misspelled()
        mail = smtp.SMTPConfig.from_settings(settings)
        config = RelayConfig.from_settings(settings, mail)
        if config.exposed() and not args.allow_open:
            raise ConfigError(
                f"ALERT_HOST: {config.host} is reachable from other machines; set ALERT_TOKEN or"
                " ALERT_TLS_CLIENT_CA, or say --allow-open"
            )
        if mail.debug:
            where = os.path.abspath(args.env_file or ".env")  # started in another folder, it does not find the settings
            words = "SMTP_HOST is not set, nor in %s: mail goes to the debug receiver on %s:%d"
            log.warning(words, where, mail.host, mail.port)
        return serve(config, mail)
    except ConfigError as error:
        smtp.fail(smtp.EX_CONFIG, str(error))
    except smtp.SpoolError as error:
        wrong = isinstance(error.__cause__, smtp.WRONG_PLACE)
        smtp.fail(smtp.EX_CONFIG if wrong else smtp.EX_TEMPFAIL, f"ALERT_SPOOL: {error}")
    except (OSError, UnicodeError) as error:  # UnicodeError: no name looks like that
        why = getattr(error, "strerror", error)
        smtp.fail(smtp.EX_CONFIG, f"ALERT_HOST, ALERT_PORT: cannot listen there: {why}")


if __name__ == "__main__":
    sys.exit(main())
