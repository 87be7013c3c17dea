#!/usr/bin/env python3
"""embedded_smtpd: an embedded device that is commanded by mail, through an SMTP server written by hand.

    mail ──▶ socket communication ──▶ SMTP/ESMTP protocol ──▶ e-mail parsing ──▶ attachment parsing ──▶ device
    reply ◀──────────────────────────────────── e-mail encoding ◀─────────────────────────────────────────┘

One connection is served at a time, five may wait in the kernel, nothing is relayed onwards. It is lock-step: what
comes before its turn ends the session, so that no mail can be smuggled in behind another.

The promise: 250 after the final dot means that the command is journalled and carried out exactly once, its reply is
on disk, and the same mail coming again changes nothing. A mail that was refused, or cut off, has changed nothing.

    python3 embedded_smtpd.py                          the device, on port 2525
    python3 embedded_smtpd.py --debug                  shows every mail that it is sent, on port 1025
    python3 embedded_smtpd.py --to-relay HOST:PORT     mails of real cameras become events of the alert relay
    python3 embedded_smtpd.py --sign "SET relay1=on" --operator you@example.com

The protocol follows RFC 5321 (SMTP), 4954 (AUTH), 3207 (STARTTLS) and 3834 (automatic replies).
"""

from __future__ import annotations

import argparse
import base64
import binascii
import collections
import contextlib
import email.header
import email.message
import enum
import functools
import hashlib
import hmac
import html
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import re
import secrets
import select
import signal
import socket
import sqlite3
import ssl
import struct
import sys
import time
import urllib.parse
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import smtp_module as smtp
from smtp_module import UNPRINTABLE, Attachment, ConfigError, Outbox, Settings, addresses, iso, printable

log = logging.getLogger("device")
give_way = getattr(os, "sched_yield", lambda: None)  # Windows has none

BACKLOG = 5  # connections that wait in the kernel: the paper's number
RECV_BYTES = 65536  # at once
LOOKS = 50  # for about 50 us: a peer on this machine answers within that, and to be woken takes as long again
TICK_SECONDS = 1.0  # how often a wait looks at its deadlines
SESSION_SECONDS = 600.0  # a session ends then, whatever happens
CROWDED_SECONDS = 10.0  # longest silence while others wait, and for a TLS handshake
LINGER_SECONDS = 1.0  # how long a refused peer may go on talking, so that it gets to read its answer
LINE_BYTES = 2048  # RFC 5321 asks for 512; Postfix has 2048
AUTH_LINE_BYTES = 12288  # RFC 4954 section 4
SKIPPED_BYTES = 1 << 20  # a line that is longer than this is no mistake any more
RECIPIENTS = 1000  # RFC 5321 asks for 100
ERRORS = 20  # the session ends with this one; Postfix has 20 too
HEADER_BYTES = 65536  # more is a bomb
HEADER_LINES = 1000
SUBJECT_LENGTH = 4096
PARAMETER_LENGTH = 2048  # of one structured header
PARTS = 100  # of one mail
SAID_LENGTH = 1 << 18  # of a camera's text that is looked at
DEPTH = 10  # of parts within parts
CLOCK_IS_SET = 1_704_067_200  # 2024-01-01: a clock before it was never set, and cannot judge a signature's time
MEMORY_SECONDS = 7 * 86400.0  # how long a mail is known again
DAY_SECONDS = 86400  # how long a button is valid
LOG_LINES = 20
REFUSED_LINES = 10  # of the journal: a flood of refused commands must not fill the disk nor hide the others
REPLIES_PER_HOUR = 100  # to one address
REPORTS_WAITING = 10  # for one address: while none can be sent they must not fill the disk
STATE = Path("device-state")  # where everything durable lies


# ─────────────────────────────────────── Socket communication ───────────────────────────────────────
# TCP or standard input and output; knows of bytes, lines, deadlines and turns, not of SMTP.


class Server:
    """Listens, and serves one peer at a time until `stop`, the handler of SIGTERM and SIGINT, is called."""

    def __init__(self, listeners: Sequence[socket.socket] = (), timeout: float = 60.0):
        self.listeners = listeners
        self.timeout = timeout  # seconds: the longest silence of a peer
        self.stopping = False
        self.bell, self.ringer = socket.socketpair()  # becomes readable and so ends a `select`

    def stop(self, *_: object) -> None:
        self.stopping = True
        self.ringer.send(b"!")

    def crowded(self) -> bool:
        """Whether others wait for their turn."""
        return bool(self.listeners) and bool(select.select(self.listeners, [], [], 0)[0])

    def serve(self, attend: Callable[[Link], None], idle: Callable[[], object]) -> None:
        """Attend to one peer after the other; `idle` is called about every second.

        No trouble of one peer ends it, nor does running out of file descriptors.
        """
        while not self.stopping:
            for listener in select.select([self.bell, *self.listeners], [], [], TICK_SECONDS)[0]:
                if self.stopping:
                    return
                try:
                    sock, address = listener.accept()
                    set_tick(sock)
                except (BlockingIOError, ConnectionError):
                    continue  # it hung up while it waited
                except OSError as error:
                    log.error("cannot accept: %s", error)
                    time.sleep(TICK_SECONDS / 10)
                    continue
                attend(Link(sock, address[0], self))
            idle()

    def close(self) -> None:
        for sock in (*self.listeners, self.bell, self.ringer):
            sock.close()


def set_tick(sock: socket.socket) -> None:
    """Let reads and writes come back every TICK_SECONDS."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    smtp.wait_at_most(sock, TICK_SECONDS, TICK_SECONDS)


class Stdio:
    """Standard input and output in place of a socket."""

    def fileno(self) -> int:
        return 0

    def recv(self, count: int) -> bytes:
        if sys.platform != "win32" and not select.select([0], [], [], TICK_SECONDS)[0]:
            raise TimeoutError
        return os.read(0, count)

    def send(self, data: bytes) -> int:
        return os.write(1, data)

    def settimeout(self, seconds: float) -> None: ...


class Link:
    """One peer: reads and writes that keep to deadlines of the clock, however slowly the bytes drip.

    They raise TimeoutError past a deadline or when the program is to end, OSError when the peer is gone.
    """

    def __init__(
        self, sock: socket.socket | Stdio, address: str, server: Server, clock: Callable[[], float] = time.monotonic
    ):
        self.sock, self.address, self.server, self.clock = sock, address, server, clock
        self.looks = sys.platform != "win32" or isinstance(sock, socket.socket)  # `select` knows no files there
        self.since = clock()  # the last line came, or the present answer was ready
        self.ends = self.since + SESSION_SECONDS

    def check(self, longest: float) -> None:
        """Raise TimeoutError when this wait is longer than that, or the session, or others wait too."""
        now = self.clock()
        waited = now - self.since
        late = now > self.ends or waited > longest or (waited > CROWDED_SECONDS and self.server.crowded())
        if late or self.server.stopping:
            raise TimeoutError

    def receive(self) -> bytes:
        """The next bytes, b"" at the end."""
        while True:
            self.check(self.server.timeout)
            for _ in range(LOOKS):
                if self.ready():
                    break
                give_way()
            try:
                data = self.sock.recv(RECV_BYTES)
            except (BlockingIOError, TimeoutError):
                continue
            if b"\n" in data:
                self.since = self.clock()
            return data

    def ready(self) -> bool:
        """Whether something has come."""
        return self.looks and bool(select.select([self.sock], [], [], 0)[0])

    def early(self) -> bytes:
        """What the peer has sent before its turn, mostly b""."""
        if self.ready():
            with contextlib.suppress(BlockingIOError, TimeoutError):
                return self.sock.recv(RECV_BYTES)
        return b""

    def send(self, data: bytes) -> None:
        """Send all."""
        self.since = self.clock()
        while data:
            try:
                data = data[self.sock.send(data) :]
            except (BlockingIOError, TimeoutError):
                self.check(self.server.timeout)
        self.since = self.clock()

    def start_tls(self, context: ssl.SSLContext) -> None:
        """Shake hands."""
        assert isinstance(self.sock, socket.socket)
        self.sock.settimeout(TICK_SECONDS)
        self.sock = secure = context.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
        while True:
            try:
                return secure.do_handshake()
            except TimeoutError:
                self.check(CROWDED_SECONDS)

    def close(self, last_words: bytes) -> None:
        """Send what the peer takes at once, and close. Only who is talking is waited for."""
        linger = 0.0
        with contextlib.suppress(OSError):
            self.sock.settimeout(0)
            linger = LINGER_SECONDS if self.ready() else 0.0
            if last_words:
                self.sock.send(last_words)
        if isinstance(self.sock, socket.socket):
            smtp.close_gently(self.sock, linger)


def converse(link: Link, session: Session, deliver: Callable[[Mail], bytes]) -> None:
    """Carry one session from its greeting to its end."""
    try:
        while (due := session.due) is not None or session.state is not CLOSED:
            if due is None:
                session.receive(link.receive())
            elif not session.stands and (early := link.early()):
                session.receive(early)
            elif isinstance(due, Mail):
                session.complete(deliver(due))
            else:
                link.send(session.take_reply())
                if session.state is HANDSHAKE and session.rules.tls:
                    link.start_tls(session.rules.tls)
                    session.tls_started()
    except TimeoutError:
        session.abort(SHUTTING_DOWN if link.server.stopping else TIMED_OUT)
    except OSError as error:
        log.info("%s is gone: %s", link.address, error)
    except Exception:  # such as CRAM-MD5 where the system forbids MD5: it costs this session only
        log.exception("the session of %s went wrong", link.address)
        session.abort(FAILED)
    link.close(session.take_reply())


# ───────────────────────────────────────── E-mail encoding ──────────────────────────────────────────
# Pure: what the device has to say, as values that smtp_module draws.


class Answer(NamedTuple):
    """What the device says to a command: `result` in one line for the journal, the rest for the sender."""

    result: str
    title: str = ""  # default: the result
    sentences: tuple[str, ...] = ()
    tables: tuple[smtp.Table, ...] = ()
    buttons: tuple[smtp.Button, ...] = ()
    files: tuple[Attachment, ...] = ()  # those with a Content-ID are shown
    failed: bool = False


FOOTER = (
    "A command is a mail to {mailbox} with CMD and the command as its Subject, for example CMD STATUS; CMD HELP lists"
    " all commands. A Subject that begins with Re: does nothing."
)


def answer_text(answer: Answer) -> str:
    """The plain text of an answer: nothing but the answer, so that a program can read it."""
    lines = answer.sentences if answer.title else (answer.result, *answer.sentences)
    return smtp.draw_text(smtp.Page(lines, tables=answer.tables))


def answer_page(answer: Answer, name: str, mailbox: str, now: float) -> smtp.Page:
    """The page of an answer: what was done, which device says so, when, and how to go on."""
    return smtp.Page(
        [answer.title or answer.result, name, time.strftime("%H:%M:%S, %Y-%m-%d", time.localtime(now))],
        colour=smtp.RED if answer.failed else smtp.BLUE,
        pictures=[smtp.Picture(answer.result, file) for file in answer.files if file.cid],
        sentences=[smtp.sentence("{words}", {"words": words}) for words in answer.sentences],
        buttons=answer.buttons,
        tables=answer.tables,
        notes=[smtp.sentence(FOOTER, {"mailbox": mailbox})],
    )


def status_tables(status: Mapping[str, Any]) -> tuple[smtp.Table, ...]:
    """The status as tables: the parameters, the cameras, the data blocks."""
    values = [(name, status_cell(name, value)) for name, value in status.items() if not isinstance(value, dict)]
    cameras = [(name, camera_cell(seen)) for name, seen in status["cameras"].items()]
    blocks = [(name, f"{b['size']} bytes\nSHA-256 {b['sha256']}") for name, b in status["blocks"].items()]
    return (
        smtp.Table(values, "Parameters", " = "),
        smtp.Table(cameras, "Cameras"),
        *([smtp.Table(blocks, "Data blocks")] if blocks else []),
    )


def camera_cell(seen: Mapping[str, Any]) -> smtp.Bar:
    """What a camera does, and how much moves before it."""
    return smtp.Bar(f"{seen['state']}, motion {seen['motion']} %", seen["motion"] / 100)


def status_cell(name: str, value: Any) -> str | smtp.Bar:
    """The value of a parameter with its unit, on its scale if it has one."""
    kind = PARAMETERS.get(name, Parameter())
    text = f"{value} {kind.unit}".rstrip()
    if name == "uptime":
        text += f" ({timedelta(seconds=value)})"
    if kind.bar is None:
        return text
    low, high = kind.bar
    return smtp.Bar(text, (value - low) / (high - low))


def test_card(camera: int, now: float) -> bytes:
    """The picture of a simulated camera, a PNG: colour bars, of each camera others, and a light that moves."""
    width, height = 320, 240
    colours = list(itertools.product((200, 30), repeat=3))
    bars = b"".join(bytes(colours[x * (camera + 4) // width]) for x in range(width))
    left = 3 * (int(now * 8) % (width - 40))
    lit = bars[:left] + b"\xff" * 120 + bars[left + 120 :]
    rows = b"".join(b"\0" + (lit if 180 <= y < 220 else bars) for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        png += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return png


# ─────────────────────────────────────── SMTP/ESMTP protocol ────────────────────────────────────────
# No input or output: bytes in, replies and events out (RFC 5321, 4954, 3207). States, moves, verbs and
# replies are tables; a refused command changes nothing.


class State(enum.IntEnum):
    START = enum.auto()  # greeted, no HELO yet
    READY = enum.auto()
    SENDER = enum.auto()
    RECIPIENT = enum.auto()
    CREDENTIALS = enum.auto()  # in the middle of AUTH
    CONTENT = enum.auto()  # between 354 and the answer to the final dot
    HANDSHAKE = enum.auto()
    CLOSED = enum.auto()


START, READY, SENDER, RECIPIENT, CREDENTIALS, CONTENT, HANDSHAKE, CLOSED = State

READY_FOR_TLS = b"220 2.0.0 ready for TLS\r\n"
GOODBYE = b"221 2.0.0 goodbye\r\n"
LOGGED_IN = b"235 2.7.0 logged in\r\n"
OK = b"250 2.0.0 OK\r\n"
SENDER_OK = b"250 2.1.0 sender OK\r\n"
RECIPIENT_OK = b"250 2.1.5 recipient OK\r\n"
ACCEPTED = b"250 2.6.0 accepted\r\n"
CANNOT_VERIFY = b"252 2.5.0 cannot verify, send it and see\r\n"
HELP = b"214 2.0.0 HELO EHLO AUTH STARTTLS MAIL RCPT DATA RSET NOOP VRFY HELP QUIT\r\n"
ASK_USER = b"334 VXNlcm5hbWU6\r\n"
ASK_PASSWORD = b"334 UGFzc3dvcmQ6\r\n"
ASK_PLAIN = b"334 \r\n"
START_MAIL = b"354 end the mail with <CRLF>.<CRLF>\r\n"
SHUTTING_DOWN = b"421 4.3.2 shutting down\r\n"
TIMED_OUT = b"421 4.4.2 too slow, goodbye\r\n"
TOO_MANY_ERRORS = b"421 4.7.0 too many errors, goodbye\r\n"
ENDLESS_LINE = b"421 4.7.0 that line does not end, goodbye\r\n"
FAILED = b"451 4.3.0 that went wrong here, try again later\r\n"
DISK_FULL = b"452 4.3.1 no room left here, try again later\r\n"
TOO_MANY_RECIPIENTS = b"452 4.5.3 no more recipients, please\r\n"
NO_TLS = b"454 4.7.0 TLS is not available\r\n"
LINE_TOO_LONG = b"500 5.5.2 line too long\r\n"
BARE_LF = b"500 5.5.2 lines end with CR LF, not with LF alone\r\n"
UNKNOWN_COMMAND = b"500 5.5.2 command not recognised\r\n"
ANSWER_TOO_LONG = b"500 5.5.6 answer too long\r\n"
BAD_ADDRESS = b"501 5.1.7 an address looks like <name@example.com>\r\n"
BAD_CHARACTERS = b"501 5.5.2 no control or 8-bit characters in commands\r\n"
BAD_BASE64 = b"501 5.5.2 that is not Base64\r\n"
BAD_ARGUMENT = b"501 5.5.4 wrong argument\r\n"
CANCELLED = b"501 5.7.0 login cancelled\r\n"
NOT_IMPLEMENTED = b"502 5.5.1 not implemented\r\n"
OUT_OF_ORDER = b"503 5.5.1 not now: HELO or EHLO, then MAIL, RCPT, DATA\r\n"
ALREADY = b"503 5.5.1 that was done already\r\n"
UNKNOWN_MECHANISM = b"504 5.5.4 LOGIN, PLAIN or CRAM-MD5\r\n"
LOGIN_FIRST = b"530 5.7.0 log in first\r\n"
WRONG_LOGIN = b"535 5.7.8 user or password is wrong\r\n"
TLS_FIRST = b"538 5.7.11 this login needs TLS\r\n"
NO_MAILBOX = b"550 5.1.1 no such mailbox, and nothing is relayed\r\n"
BARE_BYTES = b"550 5.5.2 a bare CR, bare LF or NUL in the mail\r\n"
TWO_SUBJECTS = b"550 5.5.2 more than one Subject\r\n"
CANNOT_PARSE = b"550 5.6.0 the mail cannot be read\r\n"
READ_ONLY = b"550 5.7.1 your network may only read\r\n"
NOT_SIGNED = b"550 5.7.1 this command needs a signature\r\n"
BAD_SIGNATURE = b"550 5.7.1 the signature is wrong, used or out of date, or the attachment is another\r\n"
TOO_BIG = b"552 5.3.4 the mail is too big\r\n"
EIGHT_BIT_ADDRESS = b"553 5.6.7 an address is plain ASCII here\r\n"
TOO_EARLY = b"554 5.5.0 input before its turn, goodbye\r\n"
NO_SERVICE = b"554 5.7.1 this device does not talk to your network\r\n"
UNKNOWN_PARAMETER = b"555 5.5.4 parameter not recognised\r\n"


@dataclass(frozen=True)
class Rules:
    """What a receiver allows; one for all its sessions."""

    hostname: str
    max_mail: int  # bytes
    timeout: float = 60.0  # seconds: the longest silence of a peer
    mailbox: Callable[[str], bool] = lambda address: True  # whether mail for this address is taken
    user: bytes = b""  # set: AUTH before MAIL
    password: bytes = field(default=b"", repr=False)
    any_login: bool = False  # every login passes
    tls: ssl.SSLContext | None = None  # STARTTLS is offered
    lenient: bool = False  # for old cameras: bare CR and LF in a mail, AUTH after HELO, an early QUIT


class Mail(NamedTuple):
    """A mail that has arrived whole."""

    sender: str  # "" is the null sender
    recipients: list[str]
    data: bytes | bytearray  # as it came, without the final dot
    mend: bool = False  # bare CR and LF are to be read as line ends

    def content(self) -> bytes:
        """The content, dots unstuffed."""
        data = bytes(self.data).removeprefix(b".").replace(b"\r\n.", b"\r\n")
        return re.sub(rb"\r\n|\r|\n", b"\r\n", data) if self.mend else data


Exchange = Generator[bytes, bytes, bytes]


class Session:
    """One SMTP session without input or output.

    `due` is what is to be done next: a reply to send (`take_reply`), a Mail to deliver (`complete`), or None: read
    on (`receive`). In the state HANDSHAKE, with nothing due, it is TLS's turn (`tls_started`).
    """

    def __init__(self, rules: Rules, private: bool = True, trace: Callable[[str], None] | None = None):
        self.rules = rules
        self.private = private  # over loopback or TLS: a password may be said
        self.trace = trace
        self.user: bytes | None = None
        self._secure = self._esmtp = False
        self._buffer = b""
        self._skipped = self._errors = 0
        self._exchange: Exchange
        self._said = b""
        self._forget_mail()
        self.state = START
        self.due: bytes | Mail | None = b"220 %s ESMTP\r\n" % rules.hostname.encode("ascii", "replace")
        self.stands = False  # what is due is said, whatever comes in: it tells what was done

    # What the socket side calls

    def receive(self, data: bytes) -> None:
        """Take the next bytes, b"" at the end. Bytes before their turn end the session."""
        if self.due is not None:
            self._take_early(data)
        elif not data:
            self.state = CLOSED
        elif self.state is CONTENT:
            self._read_content(data)
        elif self.state is not CLOSED:
            self._read_line(self._buffer + data)

    def take_reply(self) -> bytes:
        """The reply to send now, b"" when none is due; then it is the peer's turn."""
        self._said = reply = self.due if isinstance(self.due, bytes) else b""
        self.due, self.stands = None, False
        if self.trace:
            for line in reply.splitlines():
                self.trace(f"S: 334 {shown(line[4:])}" if line[:4] == b"334 " else f"S: {line.decode('ascii')}")
        if self._buffer and self.state is not CLOSED:
            self._read_line(self._buffer)  # a QUIT that came with the final dot
        return reply

    def complete(self, reply: bytes) -> None:
        """Give the application's answer to the mail; MAIL is needed before the next one."""
        self._forget_mail()
        self._settle(reply, READY)
        self.stands = True

    def tls_started(self) -> None:
        """Everything that was said in the clear is forgotten (RFC 3207 section 4.2)."""
        self._esmtp = False
        self.user = None
        self._secure = self.private = True
        self.state = START

    def abort(self, reply: bytes) -> None:
        """End the session with `reply`, unless one is due that must be heard."""
        if not self.stands:
            self.due = reply
        self._buffer = b""
        self.stands = True
        self.state = CLOSED

    # Lines and content

    def _read_line(self, data: bytes) -> None:
        line, end, self._buffer = data.partition(b"\n")
        answering = self.state is CREDENTIALS
        longest = AUTH_LINE_BYTES if answering or line[:4].upper() == b"AUTH" else LINE_BYTES
        too_long = self._skipped or len(line) > longest + 1
        if not end:
            if too_long:
                self._skipped += len(line)
                line = line[-1:]
            self._buffer = line
            if self._skipped > SKIPPED_BYTES:
                self.abort(ENDLESS_LINE)
            return
        self._skipped = 0
        if too_long and answering:
            self._settle(ANSWER_TOO_LONG, READY)
        elif too_long:
            self._settle(LINE_TOO_LONG, self.state)
        elif not line.endswith(b"\r"):
            self._settle(BARE_LF, self.state)
        else:
            self._settle(*self._obey(line[:-1]))
        if self._buffer:
            self._take_early()

    def _read_content(self, data: bytes) -> None:
        content, known = self._content, max(0, len(self._content) - 4)
        content += data
        end = content.find(b"\r\n.\r\n", known)
        if end < 0:
            if len(content) > self.rules.max_mail * 4 // 3 + 8:  # ends and stuffed dots, one in four, do not count
                self._lost += len(content) - 4
                del content[:-4]
                if self._lost > 4 * self.rules.max_mail + SKIPPED_BYTES:
                    self.abort(TOO_BIG)
            return
        early = bytes(content[end + 5 :])
        del content[end + 2 :]
        size = len(content) - 2
        if size > self.rules.max_mail:
            size -= content.count(b"\r\n.")  # stuffed dots do not count (RFC 1870 section 3)
        del content[:2]
        if self.trace:
            self.trace(f"C: ({len(content)} bytes of mail)")
        if early:
            self._take_early(early)
        if self.state is CLOSED:
            return
        bare = has_bare_ends(content)
        if self._lost or size > self.rules.max_mail:
            self.complete(TOO_BIG)
        elif b"\0" in content or (bare and not self.rules.lenient):
            self.complete(BARE_BYTES)
        else:
            self.due = Mail(self._sender, self._recipients, content, bare)

    def _take_early(self, data: bytes = b"") -> None:
        """Input before its turn ends the session; but some cameras send QUIT with the final dot."""
        self._buffer += data
        patient = self.rules.lenient and self.state not in {CREDENTIALS, HANDSHAKE}
        if not (patient and self._buffer.upper() == b"QUIT\r\n"):
            self.abort(TOO_EARLY)

    def _settle(self, reply: bytes, state: State) -> None:
        """The one place where the state moves and a reply becomes due."""
        if reply >= b"4":
            self._errors += 1
            if self._errors >= ERRORS:
                reply, state = TOO_MANY_ERRORS, CLOSED
        self.due = reply
        self.state = state
        self.stands = state is CLOSED

    def _forget_mail(self) -> None:
        self._sender = ""
        self._recipients: list[str] = []
        self._content = bytearray(b"\r\n")  # the end of DATA's line: a mail may begin with its final dot
        self._lost = 0  # bytes of a mail that is too big

    def _obey(self, line: bytes) -> tuple[bytes, State]:
        """The reply to one line and the state after it."""
        state = self.state
        verb, _, argument = line.partition(b" ")
        verb = verb.upper()
        if self.trace:
            self._trace_line(line, verb, argument)
        if state is CREDENTIALS:
            reply = self._proceed(line)
            return reply, state if reply.startswith(b"334") else READY
        if verb not in VERBS:
            return UNKNOWN_COMMAND, state
        if line.translate(None, COMMAND_BYTES):
            eight_bit = verb in {b"MAIL", b"RCPT"} and not line.isascii()
            return EIGHT_BIT_ADDRESS if eight_bit else BAD_CHARACTERS, state
        act, moves = VERBS[verb]
        after = moves.get(state)
        if after is None:
            return OUT_OF_ORDER, state
        reply = act(self, argument)
        if reply.startswith(b"334"):
            return reply, CREDENTIALS
        return reply, after if reply < b"4" else state

    def _trace_line(self, line: bytes, verb: bytes, argument: bytes) -> None:
        assert self.trace is not None
        mechanism, _, initial = argument.partition(b" ")
        if self.state is CREDENTIALS:
            self.trace("C: " + shown(line, secret=self._said != ASK_USER))
        elif verb == b"AUTH" and initial:
            said = shown(initial, secret=mechanism.upper() != b"LOGIN")
            self.trace(f"C: AUTH {mechanism.decode('ascii', 'replace')} {said}")
        else:
            self.trace("C: " + line.decode("ascii", "backslashreplace"))

    # The verbs: each returns its reply, and changes something only when that is positive

    def _greet(self, argument: bytes, esmtp: bool) -> bytes:
        if not argument.strip() and not self.rules.lenient:
            return BAD_ARGUMENT
        self._forget_mail()
        self._esmtp = esmtp
        words = [self.rules.hostname]
        if esmtp:
            words += [f"SIZE {self.rules.max_mail}", "8BITMIME", "ENHANCEDSTATUSCODES"]
            words += ["AUTH " + " ".join(self._mechanisms())] if self._mechanisms() else []
            words += ["STARTTLS"] if self.rules.tls and not self._secure else []
            words += ["HELP"]
        *first, last = words
        return ("".join(f"250-{word}\r\n" for word in first) + f"250 {last}\r\n").encode("ascii")

    def _mechanisms(self) -> list[str]:
        if not (self.rules.user or self.rules.any_login):
            return []
        return ["LOGIN", "PLAIN", "CRAM-MD5"] if self.private or self.rules.lenient else ["CRAM-MD5"]

    def _starttls(self, argument: bytes) -> bytes:
        if argument:
            return BAD_ARGUMENT
        return NO_TLS if not self.rules.tls else ALREADY if self._secure else READY_FOR_TLS

    def _mail(self, argument: bytes) -> bytes:
        if self.rules.user and self.user is None:
            return LOGIN_FIRST
        path = MAIL_PATH.fullmatch(argument)
        if path is None:
            return BAD_ADDRESS
        if path[3] and (refusal := self._check_parameters(path[3])):
            return refusal
        self._sender = (path[1] or path[2] or b"").decode("ascii")
        return SENDER_OK

    def _check_parameters(self, text: bytes) -> bytes:
        """The refusal that the parameters of MAIL deserve, or b""."""
        seen = set()
        for name, _, value in (word.partition(b"=") for word in text.upper().split()):
            if name not in MAIL_PARAMETERS or (name == b"AUTH" and not self._mechanisms()):
                return UNKNOWN_PARAMETER
            if name in seen or not MAIL_PARAMETERS[name].fullmatch(value):
                return BAD_ARGUMENT
            if name == b"SIZE" and int(value) > self.rules.max_mail:
                return TOO_BIG
            seen.add(name)
        return b""

    def _rcpt(self, argument: bytes) -> bytes:
        path = RCPT_PATH.fullmatch(argument)
        if path is None:
            return BAD_ADDRESS
        if path[3]:
            return UNKNOWN_PARAMETER
        address = (path[1] or path[2] or b"").decode("ascii")
        if not self.rules.mailbox(address):
            return NO_MAILBOX
        if len(self._recipients) >= RECIPIENTS:
            return TOO_MANY_RECIPIENTS
        self._recipients.append(address)
        return RECIPIENT_OK

    def _rset(self, argument: bytes) -> bytes:
        if argument:
            return BAD_ARGUMENT
        self._forget_mail()
        return OK

    # AUTH (RFC 4954): a mechanism yields what it asks, gets the answers decoded, and returns its verdict

    def _auth(self, argument: bytes) -> bytes:
        if not self._mechanisms():
            return NOT_IMPLEMENTED
        if not (self._esmtp or self.rules.lenient):
            return OUT_OF_ORDER
        if self.user is not None:
            return ALREADY
        mechanism, _, initial = argument.partition(b" ")
        begin = MECHANISMS.get(mechanism.upper())
        if begin is None:
            return UNKNOWN_MECHANISM if mechanism else BAD_ARGUMENT
        if mechanism.upper().decode() not in self._mechanisms():
            return TLS_FIRST
        self._exchange = begin(self)
        asked = next(self._exchange)
        if not initial:
            return asked
        return self._proceed(initial) if begin is not Session._cram else BAD_ARGUMENT

    def _proceed(self, line: bytes) -> bytes:
        if line == b"*":
            return CANCELLED
        try:
            return self._exchange.send(b"" if line == b"=" else strict_base64(line))
        except binascii.Error:
            return BAD_BASE64
        except StopIteration as verdict:
            reply: bytes = verdict.value
            return reply

    def _login(self) -> Exchange:
        user = yield ASK_USER
        return self._enter(user, (yield ASK_PASSWORD))

    def _plain(self) -> Exchange:
        _, *login = (yield ASK_PLAIN).split(b"\0")
        return self._enter(*login) if len(login) == 2 else BAD_ARGUMENT

    def _cram(self) -> Exchange:
        challenge = f"<{secrets.token_hex(8)}@{self.rules.hostname}>".encode()
        user, _, digest = (yield b"334 " + base64.b64encode(challenge) + b"\r\n").rpartition(b" ")
        proof = hmac.new(self.rules.password, challenge, "md5").hexdigest().encode()
        return self._enter(user, digest.lower(), proof)

    def _enter(self, user: bytes, proof: bytes, expected: bytes | None = None) -> bytes:
        """Compare without telling by the time it takes which of the two was wrong."""
        expected = self.rules.password if expected is None else expected
        right = hmac.compare_digest(user, self.rules.user) & hmac.compare_digest(proof, expected)
        if not (right or self.rules.any_login):
            return WRONG_LOGIN
        self.user = user
        return LOGGED_IN


MECHANISMS = {b"LOGIN": Session._login, b"PLAIN": Session._plain, b"CRAM-MD5": Session._cram}
MAIL_PARAMETERS = {
    b"SIZE": re.compile(rb"[0-9]{1,20}"), b"BODY": re.compile(rb"7BIT|8BITMIME"), b"AUTH": re.compile(rb".+")
}  # fmt: skip

_ANY = (START, READY, SENDER, RECIPIENT)
_STAY = {state: state for state in _ANY}
_TO_READY = dict.fromkeys(_ANY, READY)
# what it does, and from the states in which it is allowed the way to the one after a positive reply
VERBS: dict[bytes, tuple[Callable[[Session, bytes], bytes], dict[State, State]]] = {
    b"HELO": (lambda session, argument: session._greet(argument, False), _TO_READY),
    b"EHLO": (lambda session, argument: session._greet(argument, True), _TO_READY),
    b"AUTH": (Session._auth, {READY: READY}),
    b"STARTTLS": (Session._starttls, {READY: HANDSHAKE}),
    b"MAIL": (Session._mail, {READY: SENDER}),
    b"RCPT": (Session._rcpt, {SENDER: RECIPIENT, RECIPIENT: RECIPIENT}),
    b"DATA": (lambda session, argument: BAD_ARGUMENT if argument else START_MAIL, {RECIPIENT: CONTENT}),
    b"RSET": (Session._rset, _TO_READY | {START: START}),
    b"NOOP": (lambda session, argument: OK, _STAY),
    b"VRFY": (lambda session, argument: CANNOT_VERIFY if argument else BAD_ARGUMENT, _STAY),
    b"EXPN": (lambda session, argument: NOT_IMPLEMENTED, _STAY),
    b"HELP": (lambda session, argument: HELP, _STAY),
    b"QUIT": (lambda session, argument: GOODBYE, dict.fromkeys(_ANY, CLOSED)),
}
COMMAND_BYTES = b"\t" + bytes(range(0x20, 0x7F))
# a source route before the address is left out (RFC 5321 appendix C)
_PATH = rb"""[ \t]*(?:<(?:@[^<>\s:]*:)?((?:[^<>"\s]++|"(?:[^"\\]|\\.)*+")*+)>|([^<>"\s]++))(?:[ \t]+(.*?))?[ \t]*"""
MAIL_PATH = re.compile(rb"FROM:" + _PATH, re.IGNORECASE)
RCPT_PATH = re.compile(rb"TO:(?!<>)" + _PATH, re.IGNORECASE)


def has_bare_ends(content: bytearray) -> bool:
    """Whether a CR or LF stands alone. The decoder of text files notes the line ends that it meets, and is quick."""
    decoder = io.IncrementalNewlineDecoder(None, translate=False)
    decoder.decode(content.decode("latin-1"), final=True)
    return decoder.newlines not in {None, "\r\n"}


def strict_base64(text: bytes) -> bytes:
    """Base64 in one line, without junk, every group whole. Raises binascii.Error."""
    if len(text) % 4:
        raise binascii.Error("length is not a multiple of four")
    return base64.b64decode(text, validate=True)


def shown(text: bytes, secret: bool = False) -> str:
    """A word of the AUTH dialogue for the trace: decoded; masked when it tells a password."""
    if secret:
        return "********"
    with contextlib.suppress(binascii.Error):
        return f"{text.decode('ascii', 'replace')} ({strict_base64(text).decode('utf-8', 'replace')})"
    return "(not Base64)"


# ────────────────────────────────────────── E-mail parsing ──────────────────────────────────────────
# The headers, bounded before anything is looked at, and the command in the Subject.


class Refused(Exception):
    """A mail that cannot be read, or a command that the policy forbids."""

    def __init__(self, reply: bytes):
        super().__init__(reply.decode("ascii").strip())
        self.reply = reply


class Letter(NamedTuple):
    """A mail whose headers have been read."""

    headers: email.message.Message
    content: bytes
    subject: str

    @property
    def message_id(self) -> str:
        """The Message-ID when it looks like one, else "": it goes into headers of ours."""
        found = MESSAGE_ID.fullmatch(self.headers.get("message-id", ""))
        return found[0] if found else ""

    @property
    def identity(self) -> bytes:
        """The same for the same mail, whatever mail relays wrote above it; b"" without a Message-ID."""
        if not self.message_id:
            return b""
        written = "\n".join(self.headers.get(name, "") for name in (*SINGLE, "date", "to"))
        return hashlib.sha256(written.encode() + self.content.partition(b"\r\n\r\n")[2]).digest()

    @property
    def sender(self) -> str:
        """The From address in lower case, "" unless there is exactly one (RFC 5322 section 3.6.2 allows more)."""
        text = self.headers.get("from", "")[:PARAMETER_LENGTH]
        found = ONE_ADDRESS.fullmatch(re.sub(r'"(?:[^"\\]|\\.)*+"', "", text))
        return (found[1] or found[2]).lower() if found else ""

    @property
    def automatic(self) -> bool:
        """Whether a program wrote it or a list sent it, so that it is not answered (RFC 3834 section 2)."""
        get = self.headers.get
        return (
            get("auto-submitted", "no").partition(";")[0].strip().lower() not in {"", "no"}
            or get("precedence", "").lower() in {"bulk", "list", "junk"}
            or get("return-path") == "<>"
            or any(name.lower().startswith("list-") for name in self.headers)
        )


MESSAGE_ID = re.compile(r"<[!-;=?-~]{1,250}>")
_ADDRESS = r"([!-'*+\--9=?A-~]++@[!-'*+\--9=?A-~]++)"
ONE_ADDRESS = re.compile(rf"\s*(?:[^<>,;:@()]*+<\s*{_ADDRESS}\s*>|{_ADDRESS})\s*(?:\([^()]*+\))?\s*")
SINGLE = ("subject", "from", "message-id", "content-type", "content-transfer-encoding")  # two of these are a trick
FOLD = re.compile(r"\r\n(?=[ \t])")
HEADER = re.compile(r"^([!-9;-~]+)[ \t]*:(.*)", re.MULTILINE)


def read_letter(content: bytes, lenient: bool = False) -> Letter:
    """Read the headers. Raises Refused for what a person and a program would read differently, and for bombs."""
    headers, _ = read_headers(content, 0, len(content))
    names = [name.lower() for name in headers]
    twice = [name for name in SINGLE if names.count(name) > 1]
    if twice and not lenient:
        raise Refused(TWO_SUBJECTS if "subject" in twice else CANNOT_PARSE)
    subject = decode_words(headers.get("subject", ""), lenient)
    if UNPRINTABLE.search(subject.replace("\t", " ")) and not lenient:
        raise Refused(CANNOT_PARSE)
    return Letter(headers, content, printed(subject))


def read_headers(content: bytes, start: int, end: int) -> tuple[email.message.Message, int]:
    """The headers of a mail or of a part, unfolded, and where its body begins. Raises Refused for too many."""
    headers = email.message.Message()
    if content.startswith(b"\r\n", start, end):
        return headers, start + 2
    stop = content.find(b"\r\n\r\n", start, min(end, start + HEADER_BYTES))
    if stop < 0 and end - start > HEADER_BYTES:
        raise Refused(CANNOT_PARSE)
    text = FOLD.sub(" ", content[start : stop if stop >= 0 else end].decode("utf-8", "replace"))
    if text.count("\r\n") >= HEADER_LINES:
        raise Refused(CANNOT_PARSE)
    for name, value in HEADER.findall(text):
        headers[name] = value.strip()
    return headers, stop + 4 if stop >= 0 else end


def decode_words(value: str, lenient: bool = False) -> str:
    """Header text with its encoded words (RFC 2047) decoded; what cannot be decoded stays or raises Refused."""
    text = value[:SUBJECT_LENGTH]
    if "=?" not in text:
        return text
    try:
        found = email.header.decode_header(text)
        return "".join(
            part if isinstance(part, str) else part.decode(charset or "ascii", "replace") for part, charset in found
        )
    except Exception as error:  # unknown charsets, broken Base64, and what else a stranger can think of
        if lenient:
            return text
        raise Refused(CANNOT_PARSE) from error


def printed(text: str, limit: int = SUBJECT_LENGTH) -> str:
    """Text without control characters, its words with one space between, bounded."""
    return " ".join(UNPRINTABLE.sub(" ", text).split())[:limit]


class Command(NamedTuple):
    """What a Subject asks for. `words` is what a signature covers, in the case that it came in."""

    verb: str
    argument: str
    words: str
    token: str


def read_command(subject: str) -> Command | None:
    """The command of a Subject; None (the paper's -1) when it holds none: the mail is discarded."""
    words = subject.split()
    if len(words) < 2 or words[0].upper() != "CMD" or words[1].upper() not in COMMANDS:
        return None
    token = words.pop()[1:].lower() if words[-1].startswith("~") else ""
    return Command(words[1].upper(), " ".join(words[2:]), " ".join(words[1:]), token)


# ──────────────────────────────────────── Attachment parsing ────────────────────────────────────────
# MIME (RFC 2045, 2046) read by offsets into the content: no copies, bounded depth and number of parts; the email
# package reads the headers of a part, once they are known to be short. Whole mails would cost it too much.


class Part(NamedTuple):
    """A leaf of a mail."""

    kind: str  # type/subtype
    filename: str  # a label, cleaned; never a path
    is_attachment: bool
    charset: str
    encoding: str
    raw: bytes

    def data(self) -> bytes:
        """The decoded bytes. Raises Refused for anything that is not exactly in its encoding."""
        if self.encoding == "base64":
            try:
                return strict_base64(self.raw.translate(None, b"\r\n \t"))
            except binascii.Error:
                raise Refused(CANNOT_PARSE) from None
        if self.encoding == "quoted-printable":
            return binascii.a2b_qp(self.raw)
        if self.encoding in {"", "7bit", "8bit", "binary"}:
            return self.raw
        raise Refused(CANNOT_PARSE)

    def text(self) -> str:
        charset = "utf-8" if self.charset in SLOW_CHARSETS else self.charset
        try:
            return self.data().decode(charset, "replace")
        except (LookupError, ValueError):  # there is no such charset, or it has no replacements
            return self.data().decode("utf-8", "replace")


SLOW_CHARSETS = {"idna", "punycode"}  # no mail is written in them; they take time that grows with the square


def parts(content: bytes, cut: bool = False) -> list[Part]:
    """The leaves of a mail in order; `cut`: also of one that ends before its last delimiter. Raises Refused."""
    found: list[Part] = []
    todo = [(0, len(content), 0)]
    while todo:
        start, end, depth = todo.pop()
        headers, body = read_headers(content, start, end)
        long = any(len(headers.get(name, "")) > PARAMETER_LENGTH for name in ("content-type", "content-disposition"))
        if long or len(found) + len(todo) >= PARTS or depth > DEPTH:
            raise Refused(CANNOT_PARSE)
        try:
            if headers.get_content_maintype() == "multipart":
                inner = sections(content, body, end, headers.get_boundary("").encode(), cut)
                todo += [(at, to, depth + 1) for at, to in reversed(inner)]
            else:
                attached = headers.get_content_disposition() == "attachment"
                name, charset = clean_name(headers.get_filename("")), headers.get_content_charset("utf-8")
                encoding = headers.get("content-transfer-encoding", "").lower()
                kind = headers.get_content_type()
                found.append(Part(kind, name, attached, charset, encoding, content[body:end]))
        except (TypeError, ValueError, LookupError) as error:  # the email package, of parameters that make no sense
            raise Refused(CANNOT_PARSE) from error
    return found


def sections(content: bytes, start: int, end: int, boundary: bytes, cut: bool) -> list[tuple[int, int]]:
    """Where the parts of a multipart begin and end: between two delimiters, of which the last is marked as such.

    Raises Refused when there is no last one, unless `cut`: then the last part goes on to the end.
    """
    delimiter = re.compile(rb"\r\n--" + re.escape(boundary) + rb"(--)?[ \t]*(?=\r\n|$)")
    found = list(itertools.islice(delimiter.finditer(content, start - 2, end), PARTS + 2))
    last = next((number for number, mark in enumerate(found) if mark[1]), None)
    if not 0 < len(boundary) <= 70 or (last is None and not cut):
        raise Refused(CANNOT_PARSE)
    begins = [min(mark.end() + 2, end) for mark in found[:last]]
    ends = [mark.start() for mark in found[1:]] + [end]
    return [(begin, max(begin, stop)) for begin, stop in zip(begins, ends, strict=False)]


def clean_name(name: str) -> str:
    """A file name as a harmless label: the last path component, safe characters, at most 100."""
    last = re.split(r"[/\\]", decode_words(name, lenient=True))[-1]
    return re.sub(r"[^\w. -]", "_", last).strip(". -")[:100]


ENCLOSURES = {  # what mail programs add to an attachment
    "text/vcard", "text/x-vcard", "application/pgp-keys", "application/pgp-signature",
    "application/pkcs7-signature", "application/x-pkcs7-signature",
}  # fmt: skip


def attachments(content: bytes) -> list[Part]:
    """The parts that were attached; where none says so, whatever is no text. Raises Refused."""
    found = parts(content)
    chosen = [part for part in found if part.is_attachment]
    return chosen or [part for part in found if part.filename or not part.kind.startswith("text/")]


def the_attachment(content: bytes) -> bytes | None:
    """The data of the one attachment; None when there is none, or several. Raises Refused."""
    found = attachments(content)
    found = [part for part in found if part.kind not in ENCLOSURES] or found
    return found[0].data() if len(found) == 1 else None


def signed_files(content: bytes) -> Iterator[bytes | None]:
    """What a signature may be meant for: each attachment, of which mail programs add some; None where there are none.

    A text of Unix got CRLF on its way (RFC 2046 section 4.1.1). Raises Refused.
    """
    attached = attachments(content)
    if not attached:
        yield None
    for part in attached:
        data = part.data()
        yield data
        if b"\r\n" in data:
            yield data.replace(b"\r\n", b"\n")


# ────────────────────────────────────────────── Policy ──────────────────────────────────────────────
# Who may do what: the paper's three policies. A network gives an access, operators narrow the senders, a
# signature stands above both.


class Access(enum.IntEnum):
    NONE = 0
    READ = 1
    CONTROL = 2


@dataclass(frozen=True)
class Policy:
    """The configuration of who may do what."""

    allow: tuple[Network, ...] = ()
    readonly: tuple[Network, ...] = ()
    operators: tuple[str, ...] = ()
    secret: bytes = field(default=b"", repr=False)

    def access(self, host: str) -> Access:
        """What a peer may do by its address: the most specific network wins; of equals, the stricter one."""
        try:
            ip = ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            return Access.NONE
        ip = getattr(ip, "ipv4_mapped", None) or ip
        named = [(net, Access.READ) for net in self.readonly] + [(net, Access.CONTROL) for net in self.allow]
        fits = [(net.prefixlen, -access, access) for net, access in named if ip in net]
        return max(fits)[2] if fits else Access.NONE

    def operator(self, sender: str) -> str | None:
        """The operator's address as it is configured, None for a stranger; "" where nobody is named."""
        if not self.operators:
            return ""
        return next((name for name in self.operators if name.lower() == sender), None)

    def sign(self, words: str, operator: str, expiry: int, nonce: bytes, attachment: bytes | None = None) -> str:
        """The token for a command: `attachment` is the data that goes with it."""
        digest = "" if attachment is None else hashlib.sha256(attachment).hexdigest()
        signed = "\n".join((words, operator.lower(), str(expiry), nonce.hex(), digest))
        mac = hmac.digest(self.secret, signed.encode("utf-8", "surrogateescape"), "sha256")[:10]
        return base64.b32encode(struct.pack(">I", expiry) + nonce + mac).decode("ascii").lower()

    def verify(self, command: Command, sender: str, now: float, attachment: bytes | None) -> int | None:
        """The expiry of a command's signature when it is genuine and of this time, else None; used or not."""
        if not self.secret or not sender or now < CLOCK_IS_SET:
            return None
        try:
            token = base64.b32decode(command.token.upper())
        except ValueError:
            return None
        expiry, nonce = int.from_bytes(token[:4], "big"), token[4:10]
        # A mail program may have added a card: to a command that makes no use of it, a signature over nothing counts.
        signed = {attachment} if command.verb == "UPDATE" else {attachment, None}
        rights = [self.sign(command.words, sender, expiry, nonce, data) for data in signed]
        genuine = any(hmac.compare_digest(right.encode(), command.token.encode()) for right in rights)
        return expiry if genuine and now <= expiry else None


Network = ipaddress.IPv4Network | ipaddress.IPv6Network
PRIVATE = "127.0.0.0/8,::1,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,169.254.0.0/16,fc00::/7,fe80::/10"


def networks(text: str) -> tuple[Network, ...]:
    """Comma-separated networks or addresses. Raises ValueError."""
    try:
        return tuple(ipaddress.ip_network(word.strip(), strict=False) for word in text.split(",") if word.strip())
    except ValueError as error:
        raise ValueError(f"{error}; write 192.168.1.0/24 or an address, comma-separated") from None


# ────────────────────────────────────────────── Device ──────────────────────────────────────────────
# One SQLite file. A command, its effect, its used signature, its line in the journal and its reply are one
# transaction, durable before the 250: exactly once follows from that.

# A table whose columns change gets a new name: IF NOT EXISTS leaves one of an older version as it is.
TABLES = """
CREATE TABLE IF NOT EXISTS parameters(name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS blocks(
  name TEXT PRIMARY KEY, data BLOB NOT NULL, sha256 TEXT NOT NULL, stored REAL NOT NULL);
CREATE TABLE IF NOT EXISTS used(token TEXT PRIMARY KEY, expiry INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS commands(seq INTEGER PRIMARY KEY, at REAL NOT NULL, who TEXT NOT NULL, network TEXT NOT NULL,
  command TEXT NOT NULL, result TEXT NOT NULL, refused INTEGER NOT NULL, mail BLOB, answered TEXT);
CREATE INDEX IF NOT EXISTS commands_refused ON commands(refused, seq);
CREATE INDEX IF NOT EXISTS commands_mail ON commands(mail) WHERE mail IS NOT NULL;
CREATE INDEX IF NOT EXISTS commands_answered ON commands(answered, at) WHERE answered IS NOT NULL;
"""
PRUNE = """DELETE FROM commands WHERE refused = :refused AND at < :before AND seq <
  (SELECT seq FROM commands WHERE refused = :refused ORDER BY seq DESC LIMIT 1 OFFSET :keep - 1)"""


class Parameter(NamedTuple):
    default: str = ""
    convert: Callable[[str], object] | None = None  # raises ValueError that says what is right; None: read-only
    unit: str = ""
    bar: tuple[float, float] | None = None  # the ends of the scale on which it is drawn
    simulate: Callable[[float], float] = lambda now: 0.0  # what a read-only one is at a time, smoothly


def label(text: str) -> str:
    if not 1 <= len(text) <= 64 or UNPRINTABLE.search(text):
        raise ValueError("give 1 to 64 printable characters")
    return text


SWITCHES = ("armed", "recording", "relay1", "relay2", "relay3", "relay4")
PARAMETERS = {
    "name": Parameter("device", label),
    **dict.fromkeys(SWITCHES, Parameter("off", smtp.one_of("on", "off"))),
    "threshold": Parameter("50", smtp.whole(0, 100), "%", (0, 100)),
    "report_every": Parameter("0", smtp.whole(0, 366 * 86400), "s"),
    "temperature": Parameter(unit="°C", bar=(0, 60), simulate=lambda now: round(24 + 5 * math.sin(now / 13751), 1)),
    "voltage": Parameter(unit="V", bar=(10, 14), simulate=lambda now: round(12.2 + 0.3 * math.sin(now / 900), 2)),
    "disk_free": Parameter(unit="%", bar=(0, 100), simulate=lambda now: round(60 - 30 * (now / 604800 % 1), 1)),
    "uptime": Parameter(unit="s"),
}
CAMERAS = ("cam1", "cam2", "cam3", "cam4")


class Request(NamedTuple):
    """A command on its way through the device."""

    now: float
    command: Command
    mail: Mail
    letter: Letter
    peer: str
    access: Access
    operator: str  # "" where nobody is named
    attached: bytes | None = None  # what an UPDATE stores
    reply_to: str = ""  # nobody

    @property
    def who(self) -> str:
        return self.letter.sender or self.mail.sender


@dataclass
class Device:
    """The device behind the sessions. `clock` gives Unix time, `random_bytes` the nonces of buttons."""

    outbox: Outbox
    policy: Policy
    mailboxes: Sequence[str]
    maildir: Maildir | None = None
    sender: str = "device@localhost"
    report_to: Sequence[str] = ()
    clock: Callable[[], float] = time.time
    random_bytes: Callable[[int], bytes] = secrets.token_bytes
    ring: Callable[[], None] = lambda: None  # there is something to send

    def __post_init__(self) -> None:
        self.booted = self.clock()
        with self.outbox.transaction() as db:
            self.report_every = self.parameters(db, self.booted)["report_every"]
            db.execute("INSERT OR IGNORE INTO parameters VALUES ('reported', ?)", (str(self.booted),))
            (last,) = db.execute("SELECT value FROM parameters WHERE name = 'reported'").fetchone()
        self.reported = float(last)

    # From a mail to its reply code

    def deliver(self, mail: Mail, peer: str) -> bytes:
        """Deal with a mail. The reply says for certain what was done; after Refused and SpoolError that is nothing."""
        letter = read_letter(mail.content())
        operator = self.policy.operator(letter.sender)
        command = read_command(letter.subject)
        if command is None or operator is None:
            who = f"<{letter.sender}>" if letter.sender else f"<{mail.sender}> without exactly one From address"
            log.info("discarded a mail of %s from %s: %s", who, peer, letter.subject)
        else:
            self.obey(Request(self.clock(), command, mail, letter, peer, self.policy.access(peer), operator))
        if self.maildir:
            try:
                self.outbox.check_room(len(mail.data))
                self.maildir.add(mail)
            except (OSError, smtp.SpoolError) as error:  # what was done stands: it must not be sent again
                log.error("a mail of <%s> is not in the Maildir: %s", mail.sender, error)
        return ACCEPTED

    def obey(self, request: Request) -> None:
        """Carry a command out, once, with its reply. Raises Refused; then nothing was done."""
        command = f"{request.command.words} of {request.who} from {request.peer}"
        self.outbox.check_room(len(request.mail.data))
        try:
            with self.outbox.transaction() as db:
                answer = self.carry_out(db, request)
        except Refused as refusal:
            log.warning("refused %s", command)
            with contextlib.suppress(smtp.SpoolError), self.outbox.transaction() as db:
                self.journal(db, request, f"refused: {refusal}", refused=True)
            raise
        log.info("%s: %s", command, answer.result if answer else "came again, not carried out twice")
        if answer is RESTARTING:
            self.booted = request.now
            log.info("restarted (simulated); the uptime begins anew")
        self.ring()

    def carry_out(self, db: sqlite3.Connection, request: Request) -> Answer | None:
        """Effect, journal and reply of a command, None when the same mail was obeyed before. Raises Refused."""
        key = request.letter.identity or None
        known = "SELECT 1 FROM commands WHERE mail = ? AND at > ?"
        if db.execute(known, (key, request.now - MEMORY_SECONDS)).fetchone():
            return None
        request = request._replace(attached=self.check(db, request), reply_to=self.reply_address(db, request))
        rule = COMMANDS[request.command.verb]
        try:
            answer = rule.act(self, db, request, rule.read(request.command.argument))
        except ValueError as error:
            hint = (f"The form is: CMD {rule.usage}", "Nothing was changed.")
            answer = Answer(f"not done: {error}", sentences=hint, failed=True)
        to = request.reply_to
        seq = self.journal(db, request, answer.result, mail=key, answered=to.lower() or None)
        if to:
            data = self.reply(db, request, answer)
            self.outbox.check_room(len(data))
            self.outbox.add(db, smtp.NewEntry(f"reply-{seq}", "reply", to, data))
        self.report_every = self.parameters(db, request.now)["report_every"]
        return answer

    def journal(
        self, db: sqlite3.Connection, request: Request, result: str,
        *, refused: bool = False, mail: bytes | None = None, answered: str | None = None,
    ) -> int:  # fmt: skip
        """Note a command; its number. A flood of refused ones pushes out refused ones alone."""
        row = (request.now, request.who, request.peer, request.command.words, result, refused, mail, answered)
        seq = db.execute("INSERT INTO commands VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)", row).lastrowid or 0
        keep, before = (REFUSED_LINES, math.inf) if refused else (LOG_LINES, request.now - MEMORY_SECONDS)
        db.execute(PRUNE, {"refused": refused, "before": before, "keep": keep})
        return seq

    def check(self, db: sqlite3.Connection, request: Request) -> bytes | None:
        """The attachment that is meant: the one that the signature covers, else the only one. Uses the signature up.

        Raises Refused when the policy does not allow the command.
        """
        command, content = request.command, request.letter.content
        if command.token:
            db.execute("DELETE FROM used WHERE expiry < ?", (request.now - MEMORY_SECONDS,))  # clocks are set back, too
            for data in signed_files(content):
                expiry = self.policy.verify(command, request.letter.sender, request.now, data)
                first_use = "INSERT OR IGNORE INTO used VALUES (?, ?)"
                if expiry and db.execute(first_use, (command.token, expiry)).rowcount:
                    return data
        if COMMANDS[command.verb].needs is Access.CONTROL:
            if self.policy.secret:
                raise Refused(BAD_SIGNATURE if command.token else NOT_SIGNED)
            if request.access < Access.CONTROL:
                raise Refused(READ_ONLY)
        return the_attachment(content) if command.verb == "UPDATE" else None

    # The commands: each changes the database inside the transaction, or raises ValueError that says what is right

    def parameters(self, db: sqlite3.Connection, now: float) -> dict[str, Any]:
        """Every parameter by its name."""
        stored = dict(db.execute("SELECT name, value FROM parameters"))
        values = {
            name: kind.convert(stored.get(name, kind.default)) if kind.convert else kind.simulate(now)
            for name, kind in PARAMETERS.items()
        }
        return values | {"uptime": max(0, int(now - self.booted))}

    def status(self, db: sqlite3.Connection, now: float) -> dict[str, Any]:
        """Everything there is to know, as in status.json."""
        values = self.parameters(db, now)
        cameras = {}
        for at, camera in enumerate(CAMERAS):
            motion = round(50 + 50 * math.sin(now / (37 + 11 * at) + at))
            alarm = values["armed"] == "on" and motion > values["threshold"]
            state = "alarm" if alarm else "recording" if values["recording"] == "on" else "live"
            cameras[camera] = {"state": state, "motion": motion}
        rows = db.execute("SELECT name, length(data), sha256, stored FROM blocks ORDER BY name")
        blocks = {name: {"size": length, "sha256": digest, "stored": iso(at)} for name, length, digest, at in rows}
        return {**values, "time": iso(now), "cameras": cameras, "blocks": blocks}

    def do_help(self, db: sqlite3.Connection, request: Request, _: str) -> Answer:
        commands = smtp.Table([(f"CMD {rule.usage}", rule.purpose) for rule in COMMANDS.values()], separator="  ")
        rights = "all commands" if self.may_control(request) else "the commands that only read"
        if self.policy.secret:
            rights = "the commands that only read; with a signature all"
        named = "an operator" if request.operator else "nobody is named as operator"
        who = request.letter.sender or "a sender without exactly one From address"
        network = f"{request.peer}, a network with {request.access.name.lower()} access"
        seen = f"You are {who} ({named}); your mail came from {network}. You may use {rights}."
        return Answer("told the commands", "The commands", (seen,), (commands,))

    def do_status(self, db: sqlite3.Connection, request: Request, _: str) -> Answer:
        return self.tell_status(db, request.now, request.reply_to, self.may_control(request))

    def do_get(self, db: sqlite3.Connection, request: Request, name: str) -> Answer:
        return Answer(f"{name} = {self.parameters(db, request.now)[name]}")

    def do_log(self, db: sqlite3.Connection, request: Request, _: str) -> Answer:
        newest = "SELECT at, who, network, command, result FROM commands ORDER BY seq DESC LIMIT ?"
        rows = db.execute(newest, (LOG_LINES,))
        lines = [(iso(at), f"{who} from {network}", command, result) for at, who, network, command, result in rows]
        title = f"The last {len(lines)} commands" if lines else "No command yet"
        return Answer(f"told {len(lines)} commands", title, tables=(smtp.Table(lines, separator="  "),))

    def do_set(self, db: sqlite3.Connection, request: Request, setting: tuple[str, str]) -> Answer:
        name, value = setting
        old = self.parameters(db, request.now)[name]
        db.execute("INSERT OR REPLACE INTO parameters VALUES (?, ?)", setting)
        return Answer(f"{name}: {old} -> {value}")

    def do_snapshot(self, db: sqlite3.Connection, request: Request, camera: str) -> Answer:
        picture = test_card(CAMERAS.index(camera) + 1, request.now)
        cid = smtp.content_id(f"{camera} {request.now}", self.sender)
        file = Attachment(f"{camera}.png", "image/png", picture, cid=cid)
        seen = self.status(db, request.now)["cameras"][camera]
        rows: list[tuple[str | smtp.Bar, str | smtp.Bar]] = [
            ("Camera", camera),
            ("State", camera_cell(seen)),
            ("File", f"{file.filename}, {len(picture)} bytes, attached to this mail"),
        ]
        return Answer(f"a picture of {camera}, {iso(request.now)}", tables=(smtp.Table(rows),), files=(file,))

    def do_update(self, db: sqlite3.Connection, request: Request, name: str) -> Answer:
        data = request.attached
        if data is None:
            raise ValueError("the data comes as the mail's attachment, exactly one")
        digest = hashlib.sha256(data).hexdigest()
        db.execute("INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?)", (name, data, digest, request.now))
        return Answer(f"{name}: {len(data)} bytes, SHA-256 {digest}")

    def do_read(self, db: sqlite3.Connection, request: Request, name: str) -> Answer:
        row = db.execute("SELECT data, sha256 FROM blocks WHERE name = ?", (name,)).fetchone()
        if row is None:
            names = [name for (name,) in db.execute("SELECT name FROM blocks ORDER BY name LIMIT 50")]
            raise ValueError(f"there is no block {name!r}; there are {', '.join(names) or 'none yet'}")
        return Answer(f"{name}: {len(row[0])} bytes, SHA-256 {row[1]}", files=(Attachment(name, data=row[0]),))

    # Replies and reports

    def reply_address(self, db: sqlite3.Connection, request: Request) -> str:
        """Who gets the reply, "" for nobody: RFC 3834, and a cap, so that no two machines talk for ever."""
        to = request.operator or request.mail.sender
        if not request.mail.sender or request.letter.automatic or not re.fullmatch(r"[^@\s]+@[^@\s]+", to):
            return ""
        if to.lower() in map(str.lower, self.mailboxes) or to.lower().startswith(("mailer-daemon@", "postmaster@")):
            return ""
        recent = "SELECT count(*) FROM commands WHERE answered = ? AND at > ? AND at <= ?"
        (told,) = db.execute(recent, (to.lower(), request.now - 3600, request.now)).fetchone()
        return to if told < REPLIES_PER_HOUR else ""

    def may_control(self, request: Request) -> bool:
        return not self.policy.secret and request.access is Access.CONTROL

    def buttons(self, status: Mapping[str, Any], to: str, control: bool, now: float) -> tuple[smtp.Button, ...]:
        """Links that write the common commands; with a secret signed, for the operator `to` alone."""
        signed = bool(self.policy.secret) and to in self.policy.operators and now >= CLOCK_IS_SET
        relays = (f"RELAY {n} {'OFF' if status[f'relay{n}'] == 'on' else 'ON'}" for n in range(1, 5))
        changes = ("ARM", "DISARM", *relays) if control or signed else ()
        made = []
        for words in ("STATUS", *changes, *map("SNAPSHOT {}".format, CAMERAS)):
            token = self.policy.sign(words, to, int(now) + DAY_SECONDS, self.random_bytes(6)) if signed else ""
            subject = urllib.parse.quote(f"CMD {words} ~{token}" if token else f"CMD {words}")
            address = urllib.parse.quote(self.mailboxes[0], safe="@")
            made.append(smtp.Button(words.capitalize(), f"mailto:{address}?subject={subject}"))
        return tuple(made)

    def reply(self, db: sqlite3.Connection, request: Request, answer: Answer) -> bytes:
        """The whole reply mail."""
        letter, ours = request.letter, request.letter.message_id
        subject = letter.subject.rpartition(" ~")[0] if request.command.token else letter.subject
        headers = {"Auto-Submitted": "auto-replied"}
        if ours:
            before = MESSAGE_ID.findall(letter.headers.get("references", ""))[-10:]
            headers |= {"In-Reply-To": ours, "References": " ".join([*before, ours])}
        return self.write(db, request.now, request.reply_to, f"Re: {subject}", answer, headers=headers)

    def tell_status(self, db: sqlite3.Connection, now: float, to: str, control: bool) -> Answer:
        """The whole status for `to`; `control`: with buttons that change something."""
        status = self.status(db, now)
        file = Attachment("status.json", "application/json", json.dumps(status, ensure_ascii=False, indent=1).encode())
        return Answer(
            "told the status",
            f"Status: {'armed' if status['armed'] == 'on' else 'disarmed'}",
            tables=status_tables(status),
            buttons=self.buttons(status, to, control, now),
            files=(file,),
        )

    def write(
        self, db: sqlite3.Connection, now: float, to: str, subject: str, answer: Answer, *, headers: Mapping[str, str]
    ) -> bytes:
        """A whole mail of the device."""
        page = answer_page(answer, self.parameters(db, now)["name"], self.mailboxes[0], now)
        files = [file for file in answer.files if not file.cid]
        pieces = smtp.compose_page(
            page, text=answer_text(answer), files=files,
            subject=subject, sender=self.sender, to=[to], date=now, headers=headers,
        )  # fmt: skip
        return b"".join(pieces)

    def idle(self) -> None:
        """The periodic report, when it is due. Called about every second."""
        now = self.clock()
        if not self.report_every or not self.report_to or abs(now - self.reported) < self.report_every:
            return
        self.reported = now
        with self.outbox.transaction() as db:
            db.execute("INSERT OR REPLACE INTO parameters VALUES ('reported', ?)", (str(now),))
            subject, headers = f"{self.parameters(db, now)['name']}: report", {"Auto-Submitted": "auto-generated"}
            waiting = "SELECT count(*) FROM entries WHERE finished_at IS NULL AND kind = 'report' AND source = ?"
            for to in (to for to in self.report_to if db.execute(waiting, (to,)).fetchone()[0] < REPORTS_WAITING):
                answer = self.tell_status(db, now, to, not self.policy.secret)
                data = self.write(db, now, to, subject, answer, headers=headers)
                self.outbox.add(db, smtp.NewEntry(f"report-{int(now * 1000)}-{to}", "report", to, data))
        self.ring()


# What a command's argument may be: pure, and ValueError says what is right


def setting(text: str) -> tuple[str, str]:
    """`name=value` as a parameter and the value that it takes."""
    name, equals, value = text.partition("=")
    name = name.strip().lower()
    if not equals:
        raise ValueError("the value is missing")
    convert = PARAMETERS[name].convert if name in PARAMETERS else None
    if convert is None:
        known = f"{name} can only be read" if name in PARAMETERS else f"there is no parameter {name!r}"
        raise ValueError(f"{known}; these can be set: {', '.join(n for n in PARAMETERS if PARAMETERS[n].convert)}")
    try:
        return name, str(convert(value.strip()))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def nothing(text: str) -> str:
    if text:
        raise ValueError(f"{text!r} means nothing here")
    return text


def block(text: str) -> str:
    if not re.fullmatch(r"(?!\.)[A-Za-z0-9._-]{1,64}", text):
        raise ValueError("a block's name is 1 to 64 of A-Z a-z 0-9 . _ - and does not start with a dot")
    return text


RESTARTING = Answer("restarting now")


class Rule(NamedTuple):
    usage: str
    needs: Access
    act: Callable[[Device, sqlite3.Connection, Request, Any], Answer]
    purpose: str
    read: Callable[[str], object] = str  # the argument, from the rest of the Subject


COMMANDS = {
    rule.usage.partition(" ")[0]: rule
    for rule in (
        Rule("HELP", Access.READ, Device.do_help, "this list, and how the device sees you"),
        Rule("STATUS", Access.READ, Device.do_status, "all parameters, cameras and data blocks", nothing),
        Rule("GET name", Access.READ, Device.do_get, "one parameter", smtp.one_of(*PARAMETERS)),
        Rule("LOG", Access.READ, Device.do_log, f"the last {LOG_LINES} commands", nothing),
        Rule("SET name=value", Access.CONTROL, Device.do_set, "set a parameter", setting),
        Rule("ARM", Access.CONTROL, Device.do_set, "SET armed=on", lambda rest: setting(f"armed=on {rest}")),
        Rule("DISARM", Access.CONTROL, Device.do_set, "SET armed=off", lambda rest: setting(f"armed=off {rest}")),
        Rule("RECORD ON|OFF", Access.CONTROL, Device.do_set, "SET recording=…",
             lambda rest: setting(f"recording={rest}")),
        Rule("RELAY n ON|OFF", Access.CONTROL, Device.do_set, "SET relay1=… to relay4",
             lambda rest: setting("relay" + rest.replace(" ", "=", 1))),
        Rule("SNAPSHOT camera", Access.READ, Device.do_snapshot, "a picture of cam1 to cam4", smtp.one_of(*CAMERAS)),
        Rule("UPDATE block", Access.CONTROL, Device.do_update, "the attachment becomes the data block", block),
        Rule("READ block", Access.READ, Device.do_read, "the data block as an attachment", block),
        Rule("REBOOT", Access.CONTROL, lambda *_: RESTARTING, "restart", nothing),
    )
}  # fmt: skip


class Replies:
    """The owner of the outbox of replies: every entry is one mail to its source, at once."""

    window, limit = 0.0, 0

    def plan(
        self, waiting: Iterable[smtp.PendingEntry], sent: smtp.History, now: float, most: int
    ) -> smtp.Plan:
        free = (entry for entry in waiting if entry.source not in sent.paused)
        return smtp.Plan([smtp.DueMessage((entry.seq,), (entry.source,)) for entry in itertools.islice(free, most)])

    def recipients(self, kind: str, source: str) -> tuple[str, ...]:
        return (source,)

    def render(self, delivery: smtp.Delivery, entries: Sequence[smtp.Entry]) -> smtp.Message:
        return smtp.Message("", [entry.payload for entry in entries], entries[0].kind)


# ────────────────────────────────────────── Debug receiver ──────────────────────────────────────────


class Maildir:
    """A Maildir (https://cr.yp.to/proto/maildir.html) of the newest `keep` mails; 0 keeps all."""

    def __init__(self, path: Path, keep: int = 0):
        for name in ("tmp", "new", "cur"):
            (path / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path, self.keep = path, keep
        self.names = collections.deque(sorted(os.listdir(path / "new")) if keep else ())
        self.numbers = itertools.count(1)

    def add(self, mail: Mail) -> None:
        """Store the mail under its envelope, lines ended by LF as in every Maildir; in `new` whole or not at all."""
        now = time.time()
        name = f"{int(now)}.M{int(now % 1 * 1e6):06}P{os.getpid()}Q{next(self.numbers)}.{smtp.hostname()}"
        envelope = [f"Return-Path: <{mail.sender}>", *(f"Delivered-To: {who}" for who in mail.recipients), ""]
        try:
            with open(f"{self.path}/tmp/{name}", "xb", opener=functools.partial(os.open, mode=0o600)) as file:
                file.write("\n".join(envelope).encode() + mail.content().replace(b"\r\n", b"\n"))
            os.rename(f"{self.path}/tmp/{name}", f"{self.path}/new/{name}")
        except OSError:  # a full disk: the half of a mail would fill it for ever
            with contextlib.suppress(OSError):
                os.unlink(f"{self.path}/tmp/{name}")
            raise
        if self.keep:
            self.names.append(name)
        while len(self.names) > self.keep:
            with contextlib.suppress(FileNotFoundError):  # somebody read it and moved it to cur
                os.unlink(f"{self.path}/new/{self.names.popleft()}")


class DebugReceiver:
    """Takes every mail and shows it."""

    def __init__(self, out: TextIO, maildir: Maildir | None = None, quiet: bool = False):
        self.out, self.maildir, self.quiet = out, maildir, quiet
        self.mails = self.bytes = self.said = 0
        self.said_at = 0.0

    def deliver(self, mail: Mail, peer: str) -> bytes:
        """Show the mail. Raises Refused for two Subjects, as the device does."""
        head = b"\n" + mail.data[: mail.data.find(b"\r\n\r\n") + 1 or None]
        if len(SUBJECT.findall(head)) > 1:
            raise Refused(TWO_SUBJECTS)
        if self.maildir:
            self.maildir.add(mail)
        self.mails += 1
        self.bytes += len(mail.data)
        if not self.quiet:
            print(shown_mail(mail, self.mails), file=self.out, flush=True)
        return ACCEPTED

    def idle(self, last: bool = False) -> None:
        """With --quiet: the counts, once a second while something comes."""
        now = time.monotonic()
        if self.quiet and self.mails > self.said and (last or now - self.said_at >= TICK_SECONDS):
            self.said, self.said_at = self.mails, now
            print(f"{self.mails} mails, {self.bytes} bytes", file=self.out, flush=True)


SUBJECT = re.compile(rb"\n\.?subject[ \t]*:", re.IGNORECASE)  # a dot at the start of a line is stuffing


def shown_mail(mail: Mail, number: int) -> str:
    """A mail as a person reads it, safe for a terminal: headers, text, and what is attached."""
    content = mail.content()
    title = f"mail {number} from <{mail.sender}> to <{'>, <'.join(mail.recipients)}>, {len(mail.data)} bytes"
    lines = [f"---------- {title} ----------"]
    try:
        headers, _ = read_headers(content, 0, len(content))
        lines += [f"{name}: {decode_words(value, lenient=True)}" for name, value in headers.items()] + [""]
        for part in parts(content, cut=True):
            if part.kind == "text/plain" and not part.is_attachment:
                lines += part.text().splitlines()
            else:
                lines.append(f"[{part.kind} {part.filename} {len(part.data())} bytes]")
    except Refused:
        lines += ["[not to be parsed; as it came:]", *content.decode("utf-8", "replace").splitlines()]
    return "\n".join(printable(line, 10_000) for line in lines) + "\n"


# ─────────────────────────────────────────── Camera mails ───────────────────────────────────────────
# What recorders say in their alarm mails, and what it means to the relay. The tables hold what was seen of
# Dahua and its brands, Reolink and Hikvision; a mail that fits none of them is still an alert.

FIELDS = {
    "event": ("alarm event", "event type"),
    "name": ("alarm input channel name", "channel name", "alarm camera name"),
    "number": ("alarm input channel no.", "alarm input channel", "channel number"),
    "device": ("alarm device name", "dvr name", "ipc name"),
}
EVENTS = [  # the first that fits
    (r"tamper|mask|blind|\bcover|obstruct|occlu|scene change|defocus", "TAMPER_DETECTED"),
    (r"reconnect|video (signal )?(recover|restor)", "CAMERA_RECONNECTED"),
    (r"video\s*(signal\s*)?los[st]|no video|signal lost|disconnect|offline|lost connection", "CAMERA_DISCONNECTED"),
    (r"\bdoor\b", "DOOR_OPENED"),
    (r"restart|reboot|power.?on|start.?up", "SYSTEM_RESTARTED"),
    (r"\btest(ing)?\b", "TEST"),
    (r"", "MOTION_DETECTED"),
]
INVISIBLE = " \u200b\u200c\u200d\u2060"  # a name of these alone is none
FIELD = re.compile(r"((?:\([^()]*\)|[^:])*+):(.*)")  # Dahua: `Alarm Start Time(D/M/Y H:M:S): …`
ENDED = re.compile(r"\b(stop|stopped|end|ended)[.!]?$", re.IGNORECASE)
PICTURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF.{4}WEBP|BM.{12}[\x0c\x28\x40\x6c\x7c]\0\0\0", re.DOTALL
)


def camera_event(mail: Mail, letter: Letter, now: float) -> dict[str, Any] | None:
    """The event for the relay that a mail tells of; None when it says that an alarm ended. Pure."""
    text, picture = text_and_picture(letter.content)
    said = text_fields(text)
    facts = {fact: next((said[name] for name in names if name in said), "") for fact, names in FIELDS.items()}
    title = facts["event"] or letter.subject
    if ENDED.search(title):
        return None
    date = letter.headers.get("date", "")
    meta = {"subject": letter.subject, "from": letter.sender or mail.sender, "date": date} | said
    # the relay takes 32 fields; longer lines nobody reads in a mail
    cleaned = ((printed(name, 64), printed(value, 300)) for name, value in list(meta.items())[:32])
    event = {
        "event": next(event for pattern, event in EVENTS if re.search(pattern, title, re.IGNORECASE)),
        "camera": camera_name(mail.recipients[0], facts),
        "timestamp": datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds"),
        "meta": {name: value for name, value in cleaned if name and value},
    }
    if picture:
        event["image_filename"] = picture.filename or "picture"
        event["image_b64"] = base64.b64encode(picture.data()).decode("ascii")
    return event


def camera_name(recipient: str, facts: Mapping[str, str]) -> str:
    """The first name that the relay takes: up to 128 characters, and something to be seen."""
    local, _, detail = recipient.partition("@")[0].partition("+")
    device = f"{facts['device']} {facts['number']}".strip() if facts["device"] else ""
    names = (printed(name, 128) for name in (detail, facts["name"], device, local))
    return next((name for name in names if name.strip(INVISIBLE)), "camera")


def text_fields(text: str) -> dict[str, str]:
    """What the lines `name: value` of a text say, by the name in lower case."""
    split = (match.groups() for match in map(FIELD.match, text[:SAID_LENGTH].splitlines()) if match)
    fields = ((name.strip().lower(), value.strip()[:400]) for name, value in split)
    return {name: value for name, value in fields if 0 < len(name) <= 60 and value.strip(INVISIBLE)}


def text_and_picture(content: bytes) -> tuple[str, Part | None]:
    """The first text of a mail and its first picture, whatever its label says. What cannot be read is passed over."""
    text, html_text, picture = "", "", None
    try:
        found = parts(content, cut=True)
    except Refused:
        return content.partition(b"\r\n\r\n")[2].decode("utf-8", "replace"), None
    for part in found:
        with contextlib.suppress(Refused, ValueError):  # ValueError: html.unescape, of a number of 5,000 digits
            if PICTURES.match(part.data()):
                picture = picture or part
            elif part.kind == "text/plain":
                text = text or part.text()
            elif part.kind == "text/html":
                html_text = html_text or html.unescape(re.sub(r"<[^<>]*>", "\n", part.text()))
    return text or html_text, picture


@dataclass
class CameraMails(Replies):
    """Takes mails of cameras and keeps them as events until the relay has them."""

    outbox: Outbox
    clock: Callable[[], float] = time.time
    ring: Callable[[], None] = lambda: None

    def deliver(self, mail: Mail, peer: str) -> bytes:
        """Keep the event of a mail. Raises Refused when it cannot be read, SpoolError when it cannot be kept."""
        letter = read_letter(mail.content(), lenient=True)
        event = camera_event(mail, letter, self.clock())
        if event is None:
            log.info("dropped a mail of <%s> from %s: the alarm ended", mail.sender, peer)
            return ACCEPTED
        known = letter.identity[:16].hex()
        event["id"] = f"mail-{known or secrets.token_hex(16)}"
        payload = json.dumps(event).encode("ascii")
        self.outbox.check_room(len(payload))  # a disk that is full to the brim could not note what was handed over
        with self.outbox.transaction() as db:
            if known and db.execute("SELECT 1 FROM entries WHERE id = ?", (event["id"],)).fetchone():
                return ACCEPTED
            self.outbox.add(db, smtp.NewEntry(event["id"], event["event"], "relay", payload, unique=True))
        log.info("%s of %s from %s", event["event"], event["camera"], peer)
        self.ring()
        return ACCEPTED

    def idle(self) -> None:
        """Nothing is due by the clock alone."""


@dataclass
class RelayTransport:
    """Hands events to the relay (smtp_module's Transport), one line and one answer each."""

    host: str
    port: int
    token: str = field(repr=False)
    file: io.BufferedRWPair | None = None

    def open(self) -> None:
        if self.file is None:
            try:
                with socket.create_connection((self.host, self.port), timeout=30) as sock:
                    self.file = sock.makefile("rwb")
            except OSError as error:
                raise smtp.Unavailable(self._later("connect", error)) from None

    def send(self, prepared: smtp.PreparedMessage, following: object = None) -> smtp.Outcome:
        event = json.loads(b"".join(prepared.message.data)) | ({"token": self.token} if self.token else {})
        try:
            said = self._ask(event)
            if said.get("error") == "too_large" and event.pop("image_b64", None):
                log.warning("%(event)s of %(camera)s is too large for the relay: it goes without its picture", event)
                said = self._ask(event)
        except (OSError, ValueError) as error:
            return self._later("data", error)
        if said.get("ok") is True:
            return smtp.Outcome(smtp.Verdict.SENT)
        words = printable(f"{said.get('error')}: {said.get('detail')}")
        if said.get("error") not in {"bad_event", "too_large"}:
            return self._later("data", words)
        log.error("the relay refused an event, it is dropped: %s", words)
        return smtp.Outcome(smtp.Verdict.REFUSED, detail=words, step="data")

    def _ask(self, event: Mapping[str, Any]) -> dict[str, Any]:
        assert self.file is not None  # trouble ends a delivery, and the next one begins with `open`
        self.file.write(json.dumps(event).encode("ascii") + b"\n")
        self.file.flush()
        answer = self.file.readline(RECV_BYTES)
        said = None
        with contextlib.suppress(ValueError):
            said = json.loads(answer) if answer.endswith(b"\n") else None
        if not isinstance(said, dict):
            raise ValueError("this is no answer of an alert relay (is it the right port?)")
        return said

    def _later(self, step: str, why: object) -> smtp.Outcome:
        """The relay is in trouble: what comes next goes over a new connection."""
        self.close()
        words = f"relay {self.host}:{self.port}: {why}"
        return smtp.Outcome(smtp.Verdict.TRY_LATER, detail=words, step=step, about_us=True)

    def close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # what was not written yet is written again on the next connection
                self.file.close()
            self.file = None


# ─────────────────────────────────────────── Command line ───────────────────────────────────────────


def run(
    settings: Settings, args: argparse.Namespace, policy: Policy, rules: Rules,
    app: Device | DebugReceiver | CameraMails, *, courier: smtp.Courier | None = None,
) -> None:  # fmt: skip
    """Serve until the stop signal, with the courier at work."""
    server = Server(timeout=rules.timeout)
    trace = (lambda line: print(printable(line, LINE_BYTES), file=sys.stderr, flush=True)) if args.trace else None

    def attend(link: Link) -> None:
        if policy.access(link.address) is Access.NONE:
            log.warning("%s is in no network that may talk to this device", link.address)
            link.close(NO_SERVICE)
        else:
            session = Session(rules, smtp.is_loopback(link.address), trace)
            converse(link, session, lambda mail: safely(app.deliver, mail, link.address))

    with contextlib.ExitStack() as stack:
        stack.callback(server.close)
        on_stop_signals(server.stop)
        stack.callback(on_stop_signals, signal.SIG_IGN)  # nobody listens any more, and the interpreter would die of one
        if not args.stdio:
            server.listeners = listen_as_set(settings, args.debug, server.bell)
        if courier:
            courier.start()
            stack.callback(courier.stop)
        smtp.systemd_notify("READY=1")
        stack.callback(smtp.systemd_notify, "STOPPING=1")
        if args.stdio:
            attend(Link(Stdio(), "127.0.0.1", server))
        else:
            server.serve(attend, functools.partial(safely, app.idle))


def on_stop_signals(act: Callable[..., object] | signal.Handlers) -> None:
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, act)


def listen_as_set(settings: Settings, debug: bool, stopping: socket.socket) -> list[socket.socket]:
    """Listen where the settings say; on nothing if `stopping` becomes readable first. Raises ConfigError."""
    variable, default = ("--port", 1025) if debug else ("DEVICE_PORT", 2525)
    host = settings.read("DEVICE_HOST", smtp.host_name, "localhost")
    number = settings.read(variable, smtp.port, default)
    try:
        sockets = smtp.when_possible(lambda: smtp.listen(host, number, BACKLOG), stopping, "DEVICE_HOST") or []
    except (OSError, UnicodeError) as error:  # UnicodeError: no name looks like that
        where = f"cannot listen on '{printable(host)}' port {number}"
        raise ConfigError(f"DEVICE_HOST, {variable}: {where}: {getattr(error, 'strerror', error)}") from None
    for sock in sockets:
        sock.setblocking(False)  # who was waiting may be gone when it is its turn
    smtp.log_listening(log, sockets)
    return sockets


def safely(act: Callable[..., bytes | None], *values: object) -> bytes:
    """The application's reply to a mail; its own trouble is a 4xx, never a dead server."""
    try:
        return act(*values) or b""
    except Refused as refusal:
        log.warning("refused a mail: %s", refusal)
        return refusal.reply
    except smtp.SpoolError as error:
        log.error("%s", error)
        return DISK_FULL if isinstance(error, smtp.SpoolFull) else FAILED
    except Exception:
        log.exception("that went wrong")
        return FAILED


def run_debug(settings: Settings, args: argparse.Namespace, policy: Policy, rules: Rules) -> None:
    """--debug: every mail for any mailbox is shown."""
    path = settings.read("--maildir", folder, None)
    maildir = Maildir(path) if path else None
    app = DebugReceiver(sys.stderr if args.stdio else sys.stdout, maildir, args.quiet)
    run(settings, args, policy, replace(rules, user=b"", password=b"", any_login=True), app)
    app.idle(last=True)


def run_device(settings: Settings, args: argparse.Namespace, policy: Policy, rules: Rules) -> None:
    """The device itself."""
    default = f"device@{smtp.hostname()},device@localhost"
    mailboxes = settings.read("DEVICE_ADDRESS", addresses, addresses(default))
    known = {"postmaster"}  # RFC 5321 section 4.5.1
    for address in mailboxes:
        known |= {address.lower(), f"postmaster@{address.rpartition('@')[2]}".lower()}
    config = smtp.SMTPConfig.from_settings(settings)
    state = settings.read("DEVICE_STATE", folder, STATE)
    with contextlib.closing(Outbox(state / "device.db", schema=TABLES)) as outbox:
        device = Device(outbox, policy, mailboxes, maildir=Maildir(state / "mail", keep=1000))
        device.sender = settings.read("SMTP_FROM", str, mailboxes[0])
        device.report_to = settings.read("DEVICE_REPORT_TO", addresses, policy.operators)
        advise = functools.partial(smtp.advice, host=config.host)
        keep_open_s = 1.0 if config.debug else smtp.KEEP_OPEN_S
        courier = smtp.Courier(
            outbox, Replies(), lambda: smtp.SMTPClient(config), keep_open_s=keep_open_s, advise=advise
        )
        device.ring = courier.notify
        rules = replace(rules, mailbox=lambda address: address.lower() in known)
        run(settings, args, policy, rules, device, courier=courier)


def run_to_relay(settings: Settings, args: argparse.Namespace, policy: Policy, rules: Rules) -> None:
    """--to-relay: mails of cameras become events."""
    try:
        host, number = host_and_port(args.to_relay)
    except ValueError as error:
        raise ConfigError(f"--to-relay: {error}") from None
    relay = functools.partial(RelayTransport, host, number, settings.secret("ALERT_TOKEN").strip())
    with contextlib.closing(Outbox(settings.read("DEVICE_STATE", folder, STATE) / "to-relay.db")) as outbox:
        app = CameraMails(outbox)
        retry = smtp.RetryRules(first=1, longest=30, max_age=math.inf, refused_after=0, pause_recipients=False)
        courier = smtp.Courier(outbox, app, relay, rules=retry)
        app.ring = courier.notify
        session_rules = replace(rules, lenient=True, any_login=not rules.user)
        run(settings, args, policy, session_rules, app, courier=courier)


def run_sign(settings: Settings, args: argparse.Namespace, policy: Policy) -> None:
    """--sign: print the Subject of a signed command."""
    words = " ".join(args.sign.split())
    words = words[4:] if words.upper().startswith("CMD ") else words
    operator = settings.read("--operator", smtp.address, policy.operators[0] if len(policy.operators) == 1 else "")
    if not policy.secret:
        raise ConfigError("DEVICE_SECRET: missing; a signature needs the secret that the device has")
    if not operator:
        raise ConfigError("--operator: missing; give the From address that the mail will have")
    command = read_command(f"CMD {words}")
    if command is None:
        raise ConfigError(f"--sign: {printable(words)!r} is no command; {', '.join(COMMANDS)} are")
    rule = COMMANDS[command.verb]
    try:
        rule.read(command.argument)
    except ValueError as error:
        raise ConfigError(f"--sign: {printable(error)}; the form is {rule.usage}") from None
    if command.verb == "UPDATE" and not args.file:
        raise ConfigError("--file: missing; give the attachment that the mail will have, UPDATE is signed over it")
    try:
        data = Path(args.file).read_bytes() if args.file else None
    except OSError as error:
        raise ConfigError(f"--file: {args.file}: {error.strerror}") from None
    if policy.operator(operator.lower()) is None:
        log.warning("--operator: %s is not among DEVICE_OPERATORS; a device set like this discards the mail", operator)
    expiry = int(time.time() + args.ttl)
    print(f"CMD {words} ~{policy.sign(words, operator, expiry, secrets.token_bytes(6), data)}")


def folder(text: str) -> Path:
    """A folder, made where it is missing. Raises ValueError."""
    path = Path(text)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"'{printable(text)}' is no folder that can be used: {error.strerror}") from None
    return path


def lifetime(text: str) -> float:
    """How long a signature is valid, in seconds. Raises ValueError."""
    seconds = smtp.duration(text)
    if not 1 <= seconds <= 3650 * DAY_SECONDS:
        raise ValueError(f"'{printable(text)}' is wrong; give 1s to 3650d")
    return seconds


def host_and_port(text: str) -> tuple[str, int]:
    """`localhost:5000`, `10.0.0.1:5000` or `[::1]:5000`. Raises ValueError."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\]|([\w.-]+)):([0-9]{1,5})", text.strip(), re.ASCII)
    if not found or not 0 < int(found[3]) < 65536:
        raise ValueError(f"'{printable(text)}' is wrong; write HOST:PORT, an IPv6 address as [::1]:5000")
    return found[1] or found[2], int(found[3])


def raw(secret: str) -> bytes:
    """A secret as it stands in the environment, in whatever encoding."""
    return secret.encode("utf-8", "surrogateescape")


def policy_from(settings: Settings) -> Policy:
    """The DEVICE_* variables of the policy. Raises ConfigError."""
    return Policy(
        allow=settings.read("DEVICE_ALLOW", networks, networks(PRIVATE)),
        readonly=settings.read("DEVICE_READONLY", networks, ()),
        operators=settings.read("DEVICE_OPERATORS", addresses, ()),
        secret=raw(settings.secret("DEVICE_SECRET")),
    )


def rules_from(settings: Settings, stdio: bool) -> Rules:
    """What a session allows. Raises ConfigError."""
    user, password = settings.secret("DEVICE_USER"), settings.secret("DEVICE_PASS")
    if bool(user) != bool(password):
        raise ConfigError("DEVICE_USER and DEVICE_PASS: set both or neither")
    limit = settings.read("DEVICE_MAX_MAIL", smtp.size, 16 << 20)
    timeout = settings.read("DEVICE_TIMEOUT", smtp.duration, 60.0)
    for name, value in (("DEVICE_MAX_MAIL", limit), ("DEVICE_TIMEOUT", timeout)):
        if value <= 0:
            raise ConfigError(f"{name}: {value:g} is wrong; it must be more than 0")
    cert, key = settings.read("DEVICE_TLS_CERT", str, ""), settings.read("DEVICE_TLS_KEY", str, "")
    if key and not cert:
        raise ConfigError("DEVICE_TLS_CERT: missing, though DEVICE_TLS_KEY is set")
    tls = smtp.server_tls(cert, key, names="DEVICE_TLS_CERT and DEVICE_TLS_KEY") if cert else None
    return Rules(
        smtp.hostname(), limit, timeout=timeout, user=raw(user), password=raw(password),
        tls=None if stdio else tls,
    )  # fmt: skip


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="An embedded device that is commanded by mail.")
    add = parser.add_argument
    add("--host", help="name or address to listen on (DEVICE_HOST, default localhost)")
    add("--port", help="0 takes a free one (DEVICE_PORT, default 2525; with --debug 1025)")
    add("--state", metavar="DIR", help="where everything durable lies (DEVICE_STATE, default device-state)")
    mode = parser.add_mutually_exclusive_group().add_argument
    mode("--debug", action="store_true", help="show every mail, for any mailbox; nothing is commanded")
    mode("--to-relay", metavar="HOST:PORT", help="make events of the mails of cameras, for the alert relay")
    mode("--sign", metavar="COMMAND", help='print the signed Subject of a command, for example "SET relay1=on"')
    add("--maildir", metavar="DIR", help="with --debug: keep the mails there, too")
    add("--quiet", action="store_true", help="with --debug: print counts in place of the mails")
    add("--operator", metavar="ADDRESS", help="with --sign: the From address of the mail")
    add("--file", help="with --sign: the attachment of the mail")
    add("--ttl", metavar="SECONDS", help="with --sign: how long it is valid (1h)")
    add("--stdio", action="store_true", help="speak SMTP on standard input and output")
    add("--trace", action="store_true", help="show the dialogue, passwords masked")
    smtp.add_common_flags(parser)
    args = parser.parse_args(argv)
    for mode_flag, others in (("debug", ("maildir", "quiet")), ("sign", ("operator", "file", "ttl"))):
        for other in others:
            if getattr(args, mode_flag) in (None, False) and getattr(args, other) not in (None, False):
                parser.error(f"--{other} goes with --{mode_flag}")
    try:
        args.ttl = lifetime(args.ttl or "1h")
    except ValueError as error:
        parser.error(f"--ttl: {error}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit code."""
    args = arguments(argv)
    smtp.start_logging(args.log_level)
    smtp.keep_buffers()
    log.name = "receiver" if args.debug else "gateway" if args.to_relay is not None else "device"
    flags = {"DEVICE_HOST": args.host, "DEVICE_PORT": args.port, "--port": args.port, "DEVICE_STATE": args.state}
    flags |= {"--maildir": args.maildir, "--operator": args.operator}
    try:
        settings = Settings.load(flags, args.env_file)
        settings.tell_misspelled()
        policy = policy_from(settings)
        if args.sign is not None:
            run_sign(settings, args, policy)
        else:
            mode = run_debug if args.debug else run_to_relay if args.to_relay is not None else run_device
            mode(settings, args, policy, rules_from(settings, args.stdio))
    except smtp.SpoolError as error:
        log.error("DEVICE_STATE: %s", error)
        return smtp.EX_CONFIG if isinstance(error.__cause__, smtp.WRONG_PLACE) else smtp.EX_TEMPFAIL
    except (ConfigError, OSError) as error:
        log.error("%s", error)
        return smtp.EX_CONFIG
    return smtp.EX_OK


if __name__ == "__main__":
    sys.exit(main())
