#!/usr/bin/env python3
"""An embedded device that is commanded by mail: a lock-step SMTP server written by hand.

    mail ──▶ socket communication ──▶ SMTP/ESMTP protocol ──▶ e-mail parsing ──▶ attachment parsing ──▶ device
             reply ◀── e-mail encoding ◀───────────────────────────────────────────────────────────────┘

One connection is served at a time, five may wait in the kernel, nothing is ever relayed onwards.
The promise: the 250 after the final dot means that the mail is dealt with; whatever was refused changed nothing.

    python3 embedded_smtpd.py --debug            shows every mail that it is sent, on port 1025
"""

from __future__ import annotations

import argparse
import base64
import binascii
import codecs
import collections
import contextlib
import dataclasses
import email.message
import email.policy
import enum
import functools
import hmac
import itertools
import logging
import os
import re
import secrets
import select
import signal
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TextIO

from smtp_module import (
    EX_CONFIG,
    EX_OK,
    EX_TEMPFAIL,
    ConfigError,
    Settings,
    add_common_flags,
    duration,
    hostname,
    is_loopback,
    port,
    printable,
    server_tls,
    size,
    start_logging,
)

log = logging.getLogger("device")

BACKLOG = 5  # connections that wait in the kernel: the paper's number
RECV_BYTES = 65536  # malloc maps larger buffers anew on every call
TICK_SECONDS = 1.0  # how often a wait looks at its deadlines
SESSION_SECONDS = 600.0  # a session ends then, whatever happens
CROWDED_SECONDS = 10.0  # longest silence while others wait, and for a TLS handshake
LINGER_SECONDS = 1.0  # how long a refused peer may go on talking, so that it gets to read its answer
LINE_BYTES = 2048  # RFC 5321 asks for 512; Postfix has 2048
AUTH_LINE_BYTES = 12288  # RFC 4954 section 4
SKIPPED_BYTES = 1 << 20  # a line that is longer than this is no mistake any more
RECIPIENTS = 1000  # RFC 5321 asks for 100
ERRORS = 20  # the session ends with this one; Postfix has 20 too


# ── Socket communication ────────────────────────────────────────────────────────────────────────────
# TCP or standard input and output; knows of bytes, deadlines and turns, not of SMTP.


class Stopped(BaseException):
    """The program was asked to end while it waited."""


class StopSignal:
    """The handler of SIGTERM and SIGINT: ends a wait at once, work only when it is done.

    A context manager around every wait; raises Stopped out of it.
    """

    asked = waiting = False

    def __call__(self, *_: object) -> None:
        self.asked = True
        if self.waiting:
            raise Stopped

    def __enter__(self) -> None:
        self.waiting = True
        if self.asked:
            self.waiting = False
            raise Stopped

    def __exit__(self, *_: object) -> None:
        self.waiting = False


def listen(host: str, port: int) -> list[socket.socket]:
    """Listen on every address of `host`; `::` is both families. The same free port on all when `port` is 0.

    Raises OSError when an address cannot be had.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((item[0], item[4]) for item in found):
            taken = sockets[0].getsockname()[1] if sockets else port
            both = family == socket.AF_INET6 and address[0] == "::" and socket.has_dualstack_ipv6()
            one = socket.create_server((address[0], taken, *address[2:]), family=family, backlog=BACKLOG,
                                       dualstack_ipv6=both)
            one.setblocking(False)
            sockets.append(one)
    except OSError:
        for one in sockets:
            one.close()
        raise
    return sockets


class Link:
    """One peer: reads and writes that keep to wall-clock deadlines, however slowly the bytes drip."""

    def __init__(self, sock: socket.socket, address: str, stop: StopSignal, timeout: float,
                 others_wait: Callable[[], bool]):
        self.sock = sock
        self.address = address
        self.stop = stop
        self.timeout = timeout
        self.others_wait = others_wait
        self.since = time.monotonic()  # when the wait for the present line began
        self.ends = self.since + SESSION_SECONDS
        set_tick(sock)

    def receive(self) -> bytes:
        """The next bytes, b"" at the end. Raises TimeoutError past a deadline, OSError when the peer is gone."""
        self.check()
        with self.stop:
            while True:
                try:
                    return self.sock.recv(RECV_BYTES)
                except (BlockingIOError, TimeoutError):
                    self.check()

    def send(self, data: bytes) -> None:
        """Send all. Raises like `receive`."""
        with self.stop:
            while data:
                try:
                    data = data[self.sock.send(data):]
                except (BlockingIOError, TimeoutError):
                    self.check()

    def last_words(self, data: bytes) -> None:
        """Send what the peer takes at once."""
        with contextlib.suppress(OSError):
            self.sock.settimeout(0)
            self.sock.send(data)

    def progress(self) -> None:
        """A line is complete: the wait for the next one begins."""
        self.since = time.monotonic()

    def check(self) -> None:
        """Raise TimeoutError when the line or the session has lasted too long."""
        now = time.monotonic()
        waited = now - self.since
        if now > self.ends or waited > self.timeout or (waited > CROWDED_SECONDS and self.others_wait()):
            raise TimeoutError

    def early(self) -> bool:
        """Whether the peer has sent something that has not been read."""
        return bool(select.select([self.sock], [], [], 0)[0])

    def start_tls(self, context: ssl.SSLContext) -> None:
        """Shake hands. Raises OSError when that fails or takes too long."""
        self.sock.settimeout(TICK_SECONDS)
        self.sock = secure = context.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
        ends = time.monotonic() + CROWDED_SECONDS
        with self.stop:
            while True:
                try:
                    return secure.do_handshake()
                except TimeoutError:
                    if time.monotonic() > ends:
                        raise

    def close(self, unread: bool) -> None:
        """Close; with input `unread` a plain close would reset the connection and destroy the last answer."""
        with contextlib.suppress(OSError):
            if unread:
                self.sock.shutdown(socket.SHUT_WR)
                self.sock.settimeout(LINGER_SECONDS)
                ends = time.monotonic() + LINGER_SECONDS
                while time.monotonic() < ends and self.sock.recv(RECV_BYTES):
                    pass
        self.sock.close()


class StdioLink(Link):
    """Standard input and output in place of a connection."""

    def __init__(self, stop: StopSignal):
        self.stop = stop
        self.address = "127.0.0.1"

    def receive(self) -> bytes:
        with self.stop:
            return os.read(0, RECV_BYTES)

    def send(self, data: bytes) -> None:
        with self.stop:
            while data:
                data = data[os.write(1, data):]

    def last_words(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            os.write(1, data)

    def progress(self) -> None:
        pass

    def early(self) -> bool:
        return sys.platform != "win32" and bool(select.select([0], [], [], 0)[0])

    def start_tls(self, context: ssl.SSLContext) -> None:
        raise OSError("no TLS on standard input")

    def close(self, unread: bool) -> None:
        pass


def set_tick(sock: socket.socket) -> None:
    """Let reads and writes come back every TICK_SECONDS; by the kernel's own timers, which cost no system call."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if sys.platform == "win32":
        sock.settimeout(TICK_SECONDS)
        return
    sock.setblocking(True)
    timeval = struct.pack("@ll", int(TICK_SECONDS), int(TICK_SECONDS % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


def serve(listeners: list[socket.socket], stop: StopSignal, timeout: float,
          attend: Callable[[Link], None], idle: Callable[[], None]) -> None:
    """Serve one peer after the other until the stop signal; `idle` is called about every second.

    No trouble of one peer ends it, nor does running out of file descriptors.
    """
    def others_wait() -> bool:
        return bool(select.select(listeners, [], [], 0)[0])

    with contextlib.suppress(Stopped):
        while True:
            with stop:
                ready = select.select(listeners, [], [], TICK_SECONDS)[0]
            for listener in ready:
                try:
                    sock, address = listener.accept()
                    link = Link(sock, address[0], stop, timeout, others_wait)
                except (BlockingIOError, ConnectionError):
                    continue  # it hung up while it waited
                except OSError as error:
                    log.error("cannot accept: %s", error)
                    time.sleep(TICK_SECONDS / 10)
                    continue
                attend(link)
            idle()


def converse(link: Link, session: Session, deliver: Callable[[Mail], bytes], tls: ssl.SSLContext | None) -> None:
    """Carry one session from its greeting to its end. Raises Stopped alone."""
    lines = 0
    try:
        while True:
            event = session.next_event()
            if session.lines != lines:
                lines = session.lines
                link.progress()
            if event is REPLY:
                if not session.honest and link.early():
                    session.receive(link.receive())
                link.send(session.take_reply())
            elif event is NEED_DATA:
                session.receive(link.receive())
            elif event is CLOSED:
                break
            elif event is START_TLS:
                assert tls is not None
                link.start_tls(tls)
                session.tls_started()
            elif isinstance(event, Mail):
                if link.early():
                    session.receive(link.receive())
                if session.state is State.WAITING:
                    session.complete(deliver(event))
    except TimeoutError:
        session.abort(TIMED_OUT)
    except Stopped:
        session.abort(SHUTTING_DOWN)
        raise
    except OSError as error:
        log.info("%s is gone: %s", link.address, error)
    finally:
        if session.reply_due:
            link.last_words(session.take_reply())
        link.close(session.unread)


# ── SMTP/ESMTP protocol ─────────────────────────────────────────────────────────────────────────────
# No input or output: bytes in, replies and events out (RFC 5321, 4954, 3207). States, moves, verbs and
# replies are tables; a refused command changes nothing.


class State(enum.IntEnum):
    START = enum.auto()  # greeted, no HELO yet
    READY = enum.auto()
    SENDER = enum.auto()
    RECIPIENT = enum.auto()
    CREDENTIALS = enum.auto()  # in the middle of AUTH
    CONTENT = enum.auto()  # between 354 and the final dot
    WAITING = enum.auto()  # for the application to answer a mail
    HANDSHAKE = enum.auto()
    CLOSED = enum.auto()


def _reply(text: str) -> bytes:
    return text.encode("ascii") + b"\r\n"


OK = _reply("250 2.0.0 OK")
SENDER_OK = _reply("250 2.1.0 sender OK")
RECIPIENT_OK = _reply("250 2.1.5 recipient OK")
ACCEPTED = _reply("250 2.6.0 accepted")
CANNOT_VERIFY = _reply("252 2.5.0 cannot verify, send it and see")
GOODBYE = _reply("221 2.0.0 goodbye")
HELP = _reply("214 2.0.0 HELO EHLO AUTH STARTTLS MAIL RCPT DATA RSET NOOP VRFY HELP QUIT")
READY_FOR_TLS = _reply("220 2.0.0 ready for TLS")
LOGGED_IN = _reply("235 2.7.0 logged in")
ASK_USER = _reply("334 VXNlcm5hbWU6")
ASK_PASSWORD = _reply("334 UGFzc3dvcmQ6")
ASK_PLAIN = _reply("334 ")
START_MAIL = _reply("354 end the mail with <CRLF>.<CRLF>")
TIMED_OUT = _reply("421 4.4.2 too slow, goodbye")
SHUTTING_DOWN = _reply("421 4.3.2 shutting down")
TOO_MANY_ERRORS = _reply("421 4.7.0 too many errors, goodbye")
ENDLESS_LINE = _reply("421 4.7.0 that line does not end, goodbye")
FAILED = _reply("451 4.3.0 that went wrong here, try again later")
TOO_MANY_RECIPIENTS = _reply(f"452 4.5.3 no more than {RECIPIENTS} recipients")
NO_TLS = _reply("454 4.7.0 TLS is not available")
LINE_TOO_LONG = _reply("500 5.5.2 line too long")
BARE_LF = _reply("500 5.5.2 lines end with CR LF, not with LF alone")
UNKNOWN_COMMAND = _reply("500 5.5.2 command not recognised")
ANSWER_TOO_LONG = _reply("500 5.5.6 answer too long")
BAD_CHARACTERS = _reply("501 5.5.2 no control or 8-bit characters in commands")
BAD_BASE64 = _reply("501 5.5.2 that is not Base64")
BAD_ARGUMENT = _reply("501 5.5.4 wrong argument")
BAD_ADDRESS = _reply("501 5.1.7 an address looks like <name@example.com>")
CANCELLED = _reply("501 5.7.0 login cancelled")
NOT_IMPLEMENTED = _reply("502 5.5.1 not implemented")
OUT_OF_ORDER = _reply("503 5.5.1 not now: HELO or EHLO, then MAIL, RCPT, DATA")
ALREADY = _reply("503 5.5.1 that was done already")
UNKNOWN_MECHANISM = _reply("504 5.5.4 LOGIN, PLAIN or CRAM-MD5")
LOGIN_FIRST = _reply("530 5.7.0 log in first")
WRONG_LOGIN = _reply("535 5.7.8 user or password is wrong")
TLS_FIRST = _reply("538 5.7.11 this login needs TLS")
NO_MAILBOX = _reply("550 5.1.1 no such mailbox, and nothing is relayed")
BARE_BYTES = _reply("550 5.5.2 a bare CR, bare LF or NUL in the mail")
TWO_SUBJECTS = _reply("550 5.5.2 more than one Subject")
CANNOT_PARSE = _reply("550 5.6.0 the mail cannot be read")
TOO_BIG = _reply("552 5.3.4 the mail is too big")
EIGHT_BIT_ADDRESS = _reply("553 5.6.7 an address is plain ASCII here")
NO_SERVICE = _reply("554 5.7.1 this device does not talk to your network")
TOO_EARLY = _reply("554 5.5.0 input before its turn, goodbye")
UNKNOWN_PARAMETER = _reply("555 5.5.4 parameter not recognised")


@dataclass(frozen=True)
class Rules:
    """What a receiver allows; one for all its sessions."""

    hostname: str
    max_mail: int  # bytes
    mailbox: Callable[[str], bool]  # whether mail for this address is taken
    user: bytes = b""  # set: AUTH before MAIL
    password: bytes = dataclasses.field(default=b"", repr=False)
    any_login: bool = False  # every login passes
    tls: bool = False  # STARTTLS is offered
    lenient: bool = False  # for old cameras: bare CR and LF in a mail, AUTH after HELO, an early QUIT


@dataclass(slots=True)
class Mail:
    """A mail that has arrived whole: the envelope and the content."""

    sender: str  # "" is the null sender
    recipients: list[str]
    chunks: list[bytes]  # the content as it came, with its final dot
    size: int  # bytes of it without the dot line
    mend: bool = False  # bare CR and LF are to be read as line ends

    def content(self) -> bytes:
        """The content, dots unstuffed."""
        data = b"".join(self.chunks)[:-3]
        if data.startswith(b"."):
            data = data[1:]
        data = data.replace(b"\r\n.", b"\r\n")
        return re.sub(rb"\r\n|\r|\n", b"\r\n", data) if self.mend else data


class Signal(enum.Enum):
    REPLY = enum.auto()  # send what `take_reply` gives
    NEED_DATA = enum.auto()
    START_TLS = enum.auto()
    CLOSED = enum.auto()


REPLY, NEED_DATA, START_TLS, CLOSED = Signal
END_OF_MAIL = b"\r\n.\r\n"


class Content:
    """The content of one mail on its way in: found its end, counted, gathered; no byte is looked at line by line."""

    def __init__(self, limit: int):
        self.limit = limit
        self.chunks: list[bytes] = []
        self.tail = b"\r\n"  # the last bytes so far: the end may lie across a border
        self.size = self.crs = self.lfs = self.crlfs = 0
        self.nul = False

    def feed(self, data: bytes) -> bytes | None:
        """Take `data`. Returns what follows the end of the mail, None when the end has not come."""
        tail = self.tail
        end = (tail + data[:4]).find(END_OF_MAIL)
        if end >= 0:
            end += len(END_OF_MAIL) - len(tail)
        elif (end := data.find(END_OF_MAIL)) >= 0:
            end += len(END_OF_MAIL)
        rest = None
        if end >= 0:
            data, rest = data[:end], data[end:]
        self.crlfs += data.count(b"\r\n") + (data[:1] == b"\n" and tail[-1:] == b"\r")
        self.crs += data.count(b"\r")
        self.lfs += data.count(b"\n")
        self.nul = self.nul or b"\0" in data
        self.tail = data[-4:] if len(data) >= 4 else (tail + data)[-4:]
        self.size += len(data)
        if self.size > self.limit + 3:
            self.chunks.clear()
        else:
            self.chunks.append(data)
        return rest

    def fault(self, lenient: bool) -> bytes:
        """The refusal that the whole content deserves, or b""."""
        if self.size > self.limit + 3:
            return TOO_BIG
        if self.nul or not (lenient or self.crs == self.lfs == self.crlfs):
            return BARE_BYTES
        return b""


class Session:
    """One SMTP session without input or output.

    Feed it with `receive`, ask `next_event`, send what `take_reply` gives. A Mail event wants `complete`,
    START_TLS wants `tls_started`.
    """

    def __init__(self, rules: Rules, private: bool = True, refused: bool = False,
                 trace: Callable[[str], None] | None = None):
        self.rules = rules
        self.private = private  # over loopback or TLS: a password may be said
        self.trace = trace
        self.secure = False
        self.lines = 0  # complete lines so far, of commands and of mails
        self.honest = False  # the reply that is due says what was done: it stands, whatever comes in
        self.state = State.START
        self._buffer = b""
        self._ended = False
        self._skipped = 0
        self._errors = 0
        self._hello = self._esmtp = False
        self.user: bytes | None = None
        self._answer: Step = Session._login
        self._challenge = b""
        self._forget_mail()
        self._reply = b"220 %s ESMTP\r\n" % rules.hostname.encode("ascii", "replace")
        if refused:
            self._settle(NO_SERVICE, State.CLOSED)

    # What the socket side calls

    @property
    def reply_due(self) -> bool:
        return bool(self._reply)

    @property
    def unread(self) -> bool:
        """Whether the session ended with the peer perhaps still talking."""
        return not self._ended and not self._reply.startswith(b"221")

    def take_reply(self) -> bytes:
        """The reply to send now; the turn is the peer's then."""
        reply, self._reply, self.honest = self._reply, b"", False
        if self.trace:
            for line in reply.decode("ascii").splitlines():
                self.trace("S: " + _explained(line))
        return reply

    def receive(self, data: bytes) -> None:
        """Take the next bytes, b"" at the end. Bytes before their turn end the session."""
        if not data:
            self._ended = True
        elif self.state is State.CLOSED:
            pass
        elif (self._reply or self.state is State.WAITING) and not self._may_be_early(data):
            self._refuse_early()
        else:
            self._buffer += data

    def next_event(self) -> Mail | Signal:
        """What there is to do now: send a reply, read on, answer a Mail, shake hands or close."""
        if self._reply:
            return REPLY
        if self.state is State.CLOSED:
            return CLOSED
        if self.state is State.HANDSHAKE:
            return START_TLS
        if not self._buffer:
            return CLOSED if self._ended else NEED_DATA
        return self._read_content() if self.state is State.CONTENT else self._read_line()

    def complete(self, reply: bytes) -> None:
        """Give the application's answer to the mail; MAIL is needed before the next one."""
        self._forget_mail()
        self._settle(reply, State.READY)
        self.honest = True

    def tls_started(self) -> None:
        """Everything that was said in the clear is forgotten (RFC 3207 section 4.2)."""
        self._buffer = b""
        self._hello = self._esmtp = False
        self.user = None
        self._forget_mail()
        self.secure = self.private = True
        self.state = State.START

    def abort(self, reply: bytes) -> None:
        """End the session with `reply`, unless one is due that must be heard."""
        if not self.honest:
            self._reply = reply
        self.state = State.CLOSED

    # Lines and content

    def _read_line(self) -> Signal | Mail:
        buffer = self._buffer
        end = buffer.find(b"\n") + 1
        longest = AUTH_LINE_BYTES if self.state is State.CREDENTIALS or buffer[:4].upper() == b"AUTH" else LINE_BYTES
        if not end:
            if len(buffer) > longest + 1 or self._skipped:
                self._skipped += len(buffer)
                self._buffer = buffer[-1:]
                if self._skipped > SKIPPED_BYTES:
                    self.abort(ENDLESS_LINE)
                    return self.next_event()
            return CLOSED if self._ended else NEED_DATA
        line, self._buffer = buffer[:end], buffer[end:]
        self.lines += 1
        if self._skipped or end > longest + 2:
            self._skipped = 0
            answering = self.state is State.CREDENTIALS
            self._settle(ANSWER_TOO_LONG if answering else LINE_TOO_LONG, State.READY if answering else self.state)
        elif line[-2:] != b"\r\n":
            self._settle(BARE_LF, self.state)
        else:
            self._settle(*self._obey(line[:-2]))
        if self._buffer and not self._may_be_early(self._buffer):
            self._refuse_early()
        return self.next_event()

    def _read_content(self) -> Signal | Mail:
        data, self._buffer = self._buffer, b""
        content = self._content
        before = content.lfs
        rest = content.feed(data)
        self.lines += content.lfs - before
        if rest is None:
            if content.size > 4 * self.rules.max_mail + SKIPPED_BYTES:
                self.abort(TOO_BIG)
            return self.next_event()
        if self.trace:
            self.trace(f"C: ({content.size} bytes of mail)")
        self._buffer = rest
        if rest and not self._may_be_early(rest):
            self._refuse_early()
            return REPLY
        self.state = State.WAITING
        if fault := content.fault(self.rules.lenient):
            self.complete(fault)
            return REPLY
        return Mail(self._sender, self._recipients, content.chunks, content.size - 3,
                    self.rules.lenient and not content.crs == content.lfs == content.crlfs)

    def _may_be_early(self, data: bytes) -> bool:
        """Nothing may; but some cameras send QUIT with the final dot, and everybody's QUIT is answered."""
        return self.state is State.CLOSED or (self.rules.lenient and data.upper() == b"QUIT\r\n")

    def _refuse_early(self) -> None:
        self._buffer = b""
        if not (self.honest and self._reply):
            self._reply = TOO_EARLY
        self.state = State.CLOSED

    def _settle(self, reply: bytes, state: State) -> None:
        """The one place where the state moves and a reply becomes due."""
        if reply >= b"4":
            self._errors += 1
            if self._errors >= ERRORS:
                reply, state = TOO_MANY_ERRORS, State.CLOSED
        self._reply = reply
        self.state = state

    def _forget_mail(self) -> None:
        self._sender = ""
        self._recipients: list[str] = []
        self._content = Content(self.rules.max_mail)

    def _obey(self, line: bytes) -> tuple[bytes, State]:
        """The reply to one line and the state after it."""
        state = self.state
        if state is State.CREDENTIALS:
            if self.trace:
                self.trace("C: " + _masked(line, self._answer is Session._login))
            reply = self._step(line)
            return reply, AFTER_REPLY.get(reply[:3], State.READY)
        verb, _, argument = line.partition(b" ")
        verb = verb.upper()
        if self.trace:
            self.trace("C: " + _shown(line))
        command = VERBS.get(verb)
        if line.translate(None, COMMAND_BYTES):
            eight_bit = verb in {b"MAIL", b"RCPT"} and not line.isascii()
            return (EIGHT_BIT_ADDRESS if eight_bit else BAD_CHARACTERS if command else UNKNOWN_COMMAND), state
        if command is None:
            return UNKNOWN_COMMAND, state
        after = command.moves.get(state)
        if after is None:
            return OUT_OF_ORDER, state
        reply = command.act(self, argument)
        return reply, (AFTER_REPLY.get(reply[:3], after) if reply < b"4" else state)

    # The verbs: each returns its reply, and changes something only when that is positive

    def _helo(self, argument: bytes) -> bytes:
        return self._greet(argument, False)

    def _ehlo(self, argument: bytes) -> bytes:
        return self._greet(argument, True)

    def _greet(self, argument: bytes, esmtp: bool) -> bytes:
        if not argument.strip() and not self.rules.lenient:
            return BAD_ARGUMENT
        self._forget_mail()
        self._esmtp = esmtp
        words = [self.rules.hostname]
        if esmtp:
            words += [f"SIZE {self.rules.max_mail}", "8BITMIME", "ENHANCEDSTATUSCODES"]
            if self._mechanisms():
                words.append("AUTH " + " ".join(self._mechanisms()))
            if self.rules.tls and not self.secure:
                words.append("STARTTLS")
            words.append("HELP")
        lines = [f"250-{word}" for word in words[:-1]] + [f"250 {words[-1]}"]
        return _reply("\r\n".join(lines))

    def _mechanisms(self) -> list[str]:
        if not (self.rules.user or self.rules.any_login):
            return []
        clear = self.private or self.rules.lenient
        return ["LOGIN", "PLAIN", "CRAM-MD5"] if clear else ["CRAM-MD5"]

    def _starttls(self, argument: bytes) -> bytes:
        if argument:
            return BAD_ARGUMENT
        if not self.rules.tls:
            return NO_TLS
        return ALREADY if self.secure else READY_FOR_TLS

    def _mail(self, argument: bytes) -> bytes:
        if self.rules.user and self.user is None:
            return LOGIN_FIRST
        path = MAIL_PATH.fullmatch(argument)
        if path is None:
            return BAD_ADDRESS
        if path[3] is not None and (refusal := self._check_parameters(path[3])):
            return refusal
        self._sender = _address(path)
        return SENDER_OK

    def _check_parameters(self, parameters: bytes) -> bytes:
        """The refusal that the parameters of MAIL deserve, or b""."""
        seen = set()
        for parameter in parameters.split():
            name, equals, value = parameter.upper().partition(b"=")
            if name in seen:
                return BAD_ARGUMENT
            seen.add(name)
            if name == b"SIZE":
                if not re.fullmatch(rb"[0-9]{1,20}", value):
                    return BAD_ARGUMENT
                if int(value) > self.rules.max_mail:
                    return TOO_BIG
            elif name == b"BODY":
                if value not in {b"7BIT", b"8BITMIME"}:
                    return BAD_ARGUMENT
            elif name != b"AUTH" or not equals or not self._mechanisms():
                return UNKNOWN_PARAMETER
        return b""

    def _rcpt(self, argument: bytes) -> bytes:
        path = RCPT_PATH.fullmatch(argument)
        if path is None:
            return BAD_ADDRESS
        if path[3] is not None:
            return UNKNOWN_PARAMETER
        address = _address(path)
        if not self.rules.mailbox(address):
            return NO_MAILBOX
        if len(self._recipients) >= RECIPIENTS:
            return TOO_MANY_RECIPIENTS
        self._recipients.append(address)
        return RECIPIENT_OK

    def _data(self, argument: bytes) -> bytes:
        return BAD_ARGUMENT if argument else START_MAIL

    def _rset(self, argument: bytes) -> bytes:
        if argument:
            return BAD_ARGUMENT
        self._forget_mail()
        return OK

    def _noop(self, argument: bytes) -> bytes:
        return OK

    def _vrfy(self, argument: bytes) -> bytes:
        return CANNOT_VERIFY if argument else BAD_ARGUMENT

    def _expn(self, argument: bytes) -> bytes:
        return NOT_IMPLEMENTED

    def _help(self, argument: bytes) -> bytes:
        return HELP

    def _quit(self, argument: bytes) -> bytes:
        return GOODBYE

    # AUTH (RFC 4954): a mechanism is its first step, which says what the next step is

    def _auth(self, argument: bytes) -> bytes:
        if not self._mechanisms() or not (self._esmtp or self.rules.lenient):
            return NOT_IMPLEMENTED if not self._mechanisms() else OUT_OF_ORDER
        if self.user is not None:
            return ALREADY
        mechanism, _, initial = argument.partition(b" ")
        if not mechanism:
            return BAD_ARGUMENT
        first = MECHANISMS.get(mechanism.upper())
        if first is None:
            return UNKNOWN_MECHANISM
        if mechanism.upper().decode() not in self._mechanisms():
            return TLS_FIRST
        self._answer = first
        return self._step(initial) if initial else first(self, None)

    def _step(self, line: bytes) -> bytes:
        if line == b"*":
            return CANCELLED
        try:
            return self._answer(self, b"" if line == b"=" else _strict_base64(line))
        except binascii.Error:
            return BAD_BASE64

    def _login(self, user: bytes | None) -> bytes:
        if user is None:
            return ASK_USER
        self._answer = lambda session, password: session._enter(user, password or b"")
        return ASK_PASSWORD

    def _plain(self, answer: bytes | None) -> bytes:
        if answer is None:
            return ASK_PLAIN
        parts = answer.split(b"\0")
        return self._enter(parts[1], parts[2]) if len(parts) == 3 else BAD_ARGUMENT

    def _cram(self, answer: bytes | None) -> bytes:
        if answer is None:
            self._challenge = f"<{secrets.token_hex(8)}@{self.rules.hostname}>".encode()
            return b"334 " + base64.b64encode(self._challenge) + b"\r\n"
        if not self._challenge:
            return BAD_ARGUMENT  # CRAM-MD5 has no initial response
        user, _, digest = answer.rpartition(b" ")
        proof = hmac.new(self.rules.password, self._challenge, "md5").hexdigest().encode()
        self._challenge = b""
        return self._enter(user, digest.lower(), proof)

    def _enter(self, user: bytes, proof: bytes, expected: bytes | None = None) -> bytes:
        """Compare without telling by the time it takes which of the two was wrong."""
        expected = self.rules.password if expected is None else expected
        right = hmac.compare_digest(user, self.rules.user) & hmac.compare_digest(proof, expected)
        if not (right or self.rules.any_login):
            return WRONG_LOGIN
        self.user = user
        return LOGGED_IN


Step = Callable[[Session, bytes | None], bytes]
MECHANISMS: dict[bytes, Step] = {b"LOGIN": Session._login, b"PLAIN": Session._plain, b"CRAM-MD5": Session._cram}


class Verb(NamedTuple):
    act: Callable[[Session, bytes], bytes]
    moves: dict[State, State]  # from a state in which the verb is allowed to the one after a positive reply


_ANY = (State.START, State.READY, State.SENDER, State.RECIPIENT)
_STAY = {state: state for state in _ANY}
_TO_READY = {state: State.READY for state in _ANY}
VERBS = {
    b"HELO": Verb(Session._helo, _TO_READY),
    b"EHLO": Verb(Session._ehlo, _TO_READY),
    b"AUTH": Verb(Session._auth, {State.READY: State.READY}),
    b"STARTTLS": Verb(Session._starttls, {State.READY: State.HANDSHAKE}),
    b"MAIL": Verb(Session._mail, {State.READY: State.SENDER}),
    b"RCPT": Verb(Session._rcpt, {State.SENDER: State.RECIPIENT, State.RECIPIENT: State.RECIPIENT}),
    b"DATA": Verb(Session._data, {State.RECIPIENT: State.CONTENT}),
    b"RSET": Verb(Session._rset, _TO_READY | {State.START: State.START}),
    b"NOOP": Verb(Session._noop, _STAY),
    b"VRFY": Verb(Session._vrfy, _STAY),
    b"EXPN": Verb(Session._expn, _STAY),
    b"HELP": Verb(Session._help, _STAY),
    b"QUIT": Verb(Session._quit, {state: State.CLOSED for state in _ANY}),
}
AFTER_REPLY = {b"334": State.CREDENTIALS, b"354": State.CONTENT}  # whatever the verb
COMMAND_BYTES = b"\t" + bytes(range(0x20, 0x7F))
_PATH = rb"""[ \t]*(?:<((?:[^<>"\s]++|"(?:[^"\\]|\\.)*+")*+)>|([^<>"\s]++))(?:[ \t]+(.*?))?[ \t]*"""
MAIL_PATH = re.compile(rb"FROM:" + _PATH, re.IGNORECASE)
RCPT_PATH = re.compile(rb"TO:(?!<>)" + _PATH, re.IGNORECASE)


def _address(path: re.Match[bytes]) -> str:
    """The address of a path; a source route is left out (RFC 5321 appendix C)."""
    address = (path[1] or path[2] or b"").decode("ascii")
    return address.partition(":")[2] if address.startswith("@") else address


def _strict_base64(text: bytes) -> bytes:
    if len(text) % 4:
        raise binascii.Error("length is not a multiple of four")
    return base64.b64decode(text, validate=True)


def _masked(answer: bytes, is_user: bool) -> str:
    """An answer of the AUTH dialogue for the trace: user names decoded, passwords masked."""
    if not is_user or answer == b"*":
        return "********" if answer != b"*" else "*"
    with contextlib.suppress(binascii.Error):
        return f"{answer.decode('ascii', 'replace')} ({_strict_base64(answer).decode('utf-8', 'replace')})"
    return "(not Base64)"


def _shown(line: bytes) -> str:
    """A command for the trace."""
    verb, _, argument = line.partition(b" ")
    mechanism, _, initial = argument.partition(b" ")
    if verb.upper() != b"AUTH" or not initial:
        return line.decode("ascii", "backslashreplace")
    return f"AUTH {mechanism.decode('ascii', 'replace')} {_masked(initial, mechanism.upper() == b'LOGIN')}"


def _explained(reply: str) -> str:
    """A line of a reply for the trace, with the plain text of a challenge."""
    with contextlib.suppress(binascii.Error):
        if reply.startswith("334 "):
            return f"{reply} ({_strict_base64(reply[4:].encode()).decode('utf-8', 'replace')})"
    return reply


# ── E-mail parsing ──────────────────────────────────────────────────────────────────────────────────

SUBJECT = re.compile(rb"^subject[ \t]*:", re.IGNORECASE | re.MULTILINE)


def ambiguous(mail: Mail) -> bool:
    """Whether a mail has two Subjects: a person would read one and a program the other."""
    head = mail.chunks[0]
    end = head.find(b"\r\n\r\n")
    if end < 0 and len(mail.chunks) > 1:
        head = mail.content()
        end = head.find(b"\r\n\r\n")
    return len(SUBJECT.findall(head, 0, end if end >= 0 else len(head))) > 1


# ── Debug receiver ──────────────────────────────────────────────────────────────────────────────────


class Maildir:
    """A Maildir (https://cr.yp.to/proto/maildir.html) of the newest `keep` mails; 0 keeps all."""

    def __init__(self, path: Path, keep: int = 0):
        self.path = path
        for name in ("tmp", "new", "cur"):
            (path / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        self.names = collections.deque(sorted(os.listdir(path / "new"))) if keep else collections.deque()
        self.keep = keep
        self.count = itertools.count(1)
        self.pattern = f"%d.M%06dP{os.getpid()}Q%d.{socket.gethostname().replace('/', '_')}"

    def add(self, mail: Mail) -> str:
        """Store the mail under its envelope; it is in `new` whole or not at all. Returns its name."""
        now = time.time()
        name = self.pattern % (now, now % 1 * 1e6, next(self.count))
        envelope = [f"Return-Path: <{mail.sender}>", *(f"Delivered-To: {who}" for who in mail.recipients), ""]
        handle = os.open(self.path / "tmp" / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "wb", buffering=0) as file:
            file.write("\r\n".join(envelope).encode() + mail.content())
        os.rename(self.path / "tmp" / name, self.path / "new" / name)
        if self.keep:
            self.names.append(name)
            while len(self.names) > self.keep:
                (self.path / "new" / self.names.popleft()).unlink(missing_ok=True)
        return name


class DebugReceiver:
    """Takes every mail and shows it."""

    def __init__(self, out: TextIO, maildir: Maildir | None = None, quiet: bool = False):
        self.out = out
        self.maildir = maildir
        self.quiet = quiet
        self.mails = self.bytes = self.said = 0
        self.said_at = 0.0

    def deliver(self, mail: Mail) -> bytes:
        if ambiguous(mail):
            return TWO_SUBJECTS
        if self.maildir:
            self.maildir.add(mail)
        self.mails += 1
        self.bytes += mail.size
        if not self.quiet:
            self.out.write(shown_mail(mail, self.mails))
            self.out.flush()
        return ACCEPTED

    def idle(self) -> None:
        """With --quiet: the counts, once a second while something comes."""
        now = time.monotonic()
        if self.quiet and self.mails > self.said and now - self.said_at >= TICK_SECONDS:
            self.said, self.said_at = self.mails, now
            self.out.write(f"{self.mails} mails, {self.bytes} bytes\n")
            self.out.flush()


def shown_mail(mail: Mail, number: int) -> str:
    """A mail as a person reads it, safe for a terminal: headers, text, and what is attached."""
    message = email.message_from_bytes(mail.content(), policy=email.policy.default)
    lines = [f"{name}: {value}" for name, value in message.items()]
    lines.append("")
    attached = []
    text_seen = False
    for part in message.walk():
        if part.is_multipart():
            continue
        data = part.get_payload(decode=True)
        data = data if isinstance(data, bytes) else b""
        if part.get_content_type() == "text/plain" and not text_seen and not part.get_filename():
            text_seen = True
            lines += data.decode(charset_of(part), "replace").splitlines()
        else:
            attached.append(f"[{part.get_content_type()} {part.get_filename() or ''} {len(data)} bytes]")
    title = f"mail {number} from <{mail.sender}> to <{'>, <'.join(mail.recipients)}>, {mail.size} bytes"
    body = "".join(f"{printable(line, SHOWN_LINE)}\n" for line in [*lines, *attached])
    return f"---------- {printable(title)} ----------\n{body}\n"


SHOWN_LINE = 10_000


def charset_of(part: email.message.Message) -> str:
    """The charset of a text part, one that Python knows."""
    name = str(part.get_param("charset") or "utf-8")
    try:
        codecs.lookup(name)
    except LookupError:
        return "utf-8"
    return name


# ── Command line ────────────────────────────────────────────────────────────────────────────────────


class Application(Protocol):
    """What stands behind the sessions."""

    def deliver(self, mail: Mail) -> bytes: ...
    def idle(self) -> None: ...


def run(settings: Settings, rules: Rules, app: Application, args: argparse.Namespace, default_port: int) -> int:
    """Listen and serve until the stop signal."""
    stop = StopSignal()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, stop)
    tls = tls_context(settings)
    trace = functools.partial(print, file=sys.stderr) if args.trace else None

    def attend(link: Link) -> None:
        session = Session(rules, private=is_loopback(link.address), trace=trace)
        converse(link, session, app.deliver, tls)

    if args.stdio:
        with contextlib.suppress(Stopped):
            attend(StdioLink(stop))
        return EX_OK
    host = settings.read("DEVICE_HOST", str, "localhost")
    try:
        listeners = listen(host, default_port)
    except OSError as error:
        log.error("cannot listen on %s port %d: %s", host, default_port, error)
        return EX_TEMPFAIL
    for listener in listeners:
        address = listener.getsockname()
        log.info("listening on %s:%d", f"[{address[0]}]" if ":" in address[0] else address[0], address[1])
    serve(listeners, stop, settings.read("DEVICE_TIMEOUT", duration, 60.0), attend, app.idle)
    for listener in listeners:
        listener.close()
    return EX_OK


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    cert, key = settings.read("DEVICE_TLS_CERT", str, ""), settings.read("DEVICE_TLS_KEY", str, "")
    if not cert and not key:
        return None
    return server_tls(cert, key, names="DEVICE_TLS_CERT and DEVICE_TLS_KEY")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="An embedded device that is commanded by mail.")
    parser.add_argument("--host", help="name or address to listen on (DEVICE_HOST)")
    parser.add_argument("--port", help="port, 0 takes a free one (DEVICE_PORT; with --debug 1025)")
    parser.add_argument("--debug", action="store_true", help="show every mail, for any mailbox")
    parser.add_argument("--maildir", metavar="DIR", help="with --debug: keep the mails there")
    parser.add_argument("--quiet", action="store_true", help="with --debug: print counts only")
    parser.add_argument("--stdio", action="store_true", help="speak SMTP on standard input and output")
    parser.add_argument("--trace", action="store_true", help="show the dialogue, passwords masked")
    add_common_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    start_logging(args.log_level)
    try:
        settings = Settings.load({"DEVICE_HOST": args.host, "DEVICE_PORT": args.port}, args.env_file)
        rules = Rules(hostname(), settings.read("DEVICE_MAX_MAIL", size, 16 << 20), lambda address: True,
                      any_login=True, tls=tls_context(settings) is not None)
        out = sys.stderr if args.stdio else sys.stdout
        app = DebugReceiver(out, Maildir(Path(args.maildir)) if args.maildir else None, args.quiet)
        return run(settings, rules, app, args, port(args.port) if args.port else 1025)
    except ConfigError as error:
        log.error("%s", error)
        return EX_CONFIG


if __name__ == "__main__":
    sys.exit(main())
