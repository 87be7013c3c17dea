#!/usr/bin/env python3
"""faultsink: an SMTP server for the proofs. It never stops, and it fails on command.

Before it answers a mail with 250 it writes down what was in it (the ids of the alerts, the Message-ID, hashes of the
pictures). So its record of what was delivered is complete, whatever happens to the sender.

Faults are scripted by step and kind:

    STEP[@WORD]:WHAT[*TIMES][%PERCENT]      rcpt@bob:450*3   dot:die*2   body:drop=4096   mail:421%30

STEP is greeting ehlo starttls tls auth mail rcpt data body dot quit. WORD must occur in the command, in the recipients
(steps body and dot), or be `early`: the command arrived before the reply to the one before it was sent. WHAT is a
reply (`550`, `450 4.7.1 later`; 421 also closes the connection) or one of

    drop[=N]  close the connection (step body: after N bytes)   reset    reply 250, then reset the connection
    die       store the mail, then close without a reply        garbage  send something that is not SMTP
    slow[=S]  send the reply byte by byte, S seconds apart      endless  send 250-... without end
    stall     send nothing until the peer closes                lost     discard the command and what came with it
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import email
import hashlib
import io
import json
import random
import re
import socket
import ssl
import struct
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GARBAGE = (b"hello\r\n", b"\x15\x03\x01\x00\x02\x02\x46", b"2\r\n", b"9" * 9000 + b"\r\n", b"\0\0\0\0\r\n", b"\r\n")
NOTATION = re.compile(r"(\w+)(?:@([^:]+))?:([^*%]+)(?:\*(\d+))?(?:%(\d+))?")
ALWAYS = 1 << 60
REPLIES = {
    "helo": "250 faultsink", "starttls": "220 go", "auth": "235 2.7.0 welcome", "mail": "250 2.1.0 ok",
    "rcpt": "250 2.1.5 ok", "rset": "250 2.0.0 ok", "noop": "250 2.0.0 ok", "quit": "221 2.0.0 bye",
}  # fmt: skip


@dataclass
class Fault:
    """One scripted failure, see the head of this file. `times`: how often it still happens."""

    step: str
    what: str
    word: str = ""
    times: int = ALWAYS
    chance: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Fault:
        """The fault that `dot:die*2` describes. Raises ValueError."""
        match = NOTATION.fullmatch(text)
        if not match:
            raise ValueError(f"{text!r} is no fault; write STEP:WHAT[*TIMES][%PERCENT]")
        step, word, what, times, percent = match.groups()
        return cls(step, what, word or "", int(times or ALWAYS), int(percent or 100) / 100)

    def number(self, default: float) -> float:
        """The N of `drop=N`."""
        return float(self.what.partition("=")[2] or default)


class Closed(Exception):
    """This session is over."""


class Sink:
    """The server. `mails` holds what was accepted, as `describe` returns it, with these keys added:

    `to` the recipients; `answered` "yes" when 250 was sent, "unknown" when the sender cannot know, "no" when the mail
    was refused after its dot (these are in `refused`, with their `code`); `fault`; `session` when the connection was
    accepted, Unix time. The file `log` gets `mails` as lines of JSON.
    """

    def __init__(self, log: Path, *, seed: int = 0, pipelining: bool = True, tls: ssl.SSLContext | None = None,
                 auth: bool = False, size: int = 0) -> None:  # fmt: skip
        self.pipelining, self.tls, self.auth, self.size = pipelining, tls, auth, size
        self.interval_s = 0.0  # a RCPT is deferred for so long after each mail
        self.mails_per_connection = 0  # MAIL is deferred after so many; 0: never
        self.too_big: tuple[int, str, str] | None = None  # larger mails: at "mail" or "dot" this reply
        self.mails: list[dict[str, Any]] = []
        self.refused: list[dict[str, Any]] = []
        self.commands: Counter[str] = Counter()  # received, by their verbs in lower case
        self.faults_done: Counter[str] = Counter()  # by "step:what"
        self.too_early = 0  # commands that came before their turn though PIPELINING was not offered
        self.sessions = 0
        self.peers_left = 0  # peers that gave up waiting in a stall or an endless reply
        self.peers: set[socket.socket] = set()
        self.waiting_peers: set[socket.socket] = set()  # those in a stall or an endless reply
        self.port = 0
        self._faults: list[Fault] = []
        self._random = random.Random(seed)
        self._log = log.open("ab", buffering=0)
        self._lock = threading.Lock()
        self._last_mail = 0.0
        self.open_port()

    def open_port(self) -> None:
        """Listen, on the same port as before."""
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=256)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def close_port(self) -> None:
        """Refuse connections from now on, and close those that are open."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._shut_down(self.peers)

    def script(self, *faults: str) -> None:
        """Replace what fails from now on. Without faults everything works, and stalled sessions are ended."""
        parsed = [Fault.parse(fault) for fault in faults]
        with self._lock:
            self._faults = parsed
        if not faults:
            self._shut_down(self.waiting_peers)

    @staticmethod
    def _shut_down(peers: set[socket.socket]) -> None:
        for sock in tuple(peers):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def fault(self, step: str, text: str) -> Fault | None:
        """The fault that happens at this step now, counted, or None."""
        with self._lock:
            for fault in self._faults:
                applies = fault.step == step and fault.word in text and fault.times > 0
                if applies and self._random.random() < fault.chance:
                    fault.times -= 1
                    self.faults_done[f"{fault.step}:{fault.what}"] += 1
                    return fault
        return None

    def garbage(self) -> bytes:
        """Something that is not SMTP."""
        with self._lock:
            return self._random.choice(GARBAGE)

    def store(self, mail: dict[str, Any]) -> None:
        """Write a mail down. When this returns it counts as accepted, or as refused."""
        with self._lock:
            if mail["answered"] == "no":
                self.refused.append(mail)
            else:
                self._log.write(json.dumps(mail).encode() + b"\n")
                self.mails.append(mail)
                self._last_mail = time.monotonic()

    def too_soon(self) -> bool:
        """Must a recipient be deferred because of `interval_s`?"""
        return time.monotonic() - self._last_mail < self.interval_s

    def close(self) -> None:
        """End it."""
        self.close_port()
        self._log.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            self.sessions += 1
            threading.Thread(target=self._serve, args=(sock, time.time()), daemon=True).start()

    def _serve(self, sock: socket.socket, accepted: float) -> None:
        self.peers.add(sock)
        session = Session(self, sock, accepted)
        with contextlib.suppress(Closed, OSError, ValueError):
            session.run()
        self.peers.discard(session.sock)
        self.waiting_peers.discard(session.sock)
        session.sock.close()


class Session:
    """The dialogue with one peer."""

    def __init__(self, sink: Sink, sock: socket.socket, accepted: float) -> None:
        self.sink, self.sock, self._accepted = sink, sock, accepted
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray()
        self._has_sender, self._recipients = False, list[str]()
        self._mails = 0

    def run(self) -> None:
        """Everything from the greeting to QUIT. Raises Closed and OSError."""
        self._reply("greeting", "220 faultsink ESMTP")
        while True:
            early = " early" * bool(self._buffer)
            line = self._line()
            step = line.lower().partition(" ")[0]
            self.sink.commands[step] += 1
            if step == "data":
                self._data(line + early)
                continue
            code = self._reply(step, self._answer(step, line), line + early)
            if step == "starttls" and code == 220 and self.sink.tls:
                self._start_tls(self.sink.tls)
            elif step == "mail":
                self._has_sender, self._recipients = code == 250, []
            elif step == "rcpt" and code == 250:
                self._recipients.append(line[line.find("<") + 1 : line.rfind(">")])
            elif step == "quit":
                raise Closed

    def _answer(self, step: str, line: str) -> str:
        """The reply to a command where no fault is scripted."""
        sink = self.sink
        announced = re.search(r" SIZE=(\d+)", line)
        if step == "mail" and announced and (reply := self._too_big(step, int(announced[1]))):
            return reply
        if step == "ehlo":
            return self._capabilities()
        if step == "mail" and 0 < sink.mails_per_connection <= self._mails:
            return "452 4.5.3 too many mails in this connection"
        if step == "rcpt" and not self._has_sender:
            return "503 5.5.1 MAIL first"
        if step == "rcpt" and sink.too_soon():
            return "450 4.7.1 you send too fast"
        return REPLIES.get(step, "500 what?")

    def _too_big(self, step: str, size: int) -> str:
        """The reply to a mail that is larger than the script allows, or ""."""
        limit, where, reply = self.sink.too_big or (ALWAYS, step, "")
        return reply if step == where and size > limit else ""

    def _start_tls(self, tls: ssl.SSLContext) -> None:
        self._buffer.clear()
        if fault := self.sink.fault("tls", ""):
            self._misbehave(fault.what)
            raise Closed
        self.sink.peers.discard(self.sock)
        self.sock = tls.wrap_socket(self.sock, server_side=True)
        self.sink.peers.add(self.sock)

    def _capabilities(self) -> str:
        sink = self.sink
        words = ["faultsink", "8BITMIME", "ENHANCEDSTATUSCODES"]
        words += ["PIPELINING"] * sink.pipelining + [f"SIZE {sink.size}".removesuffix(" 0")]
        words += ["STARTTLS"] * bool(sink.tls and not isinstance(self.sock, ssl.SSLSocket)) + ["AUTH PLAIN"] * sink.auth
        return "\r\n".join(f"250{' ' if word is words[-1] else '-'}{word}" for word in words)

    def _data(self, line: str) -> None:
        if not self._recipients:
            return self._send(b"554 5.5.1 no valid recipients\r\n")
        if self._reply("data", "354 go", line) != 354:
            return None
        to = " ".join(self._recipients)
        fault = self.sink.fault("body", to)
        mail = self._body(int(fault.number(0)) if fault else ALWAYS)
        if fault:
            raise Closed
        self._mails += 1
        described = describe(mail) | {"to": self._recipients, "session": self._accepted}
        return self._reply("dot", self._too_big("dot", len(mail)) or "250 2.0.0 taken", to, described) and None

    def _body(self, most: int) -> bytes:
        """Read a mail up to its final dot. Raises Closed after `most` bytes."""
        seen = 0
        while (end := self._buffer.find(b"\r\n.\r\n", max(0, seen - 4))) < 0 and not self._buffer.startswith(b".\r\n"):
            if len(self._buffer) >= most:
                raise Closed
            seen = len(self._buffer)
            self._receive()
        mail = bytes(self._buffer[: end + 2]).replace(b"\r\n..", b"\r\n.")
        del self._buffer[: end + 5]
        return mail

    def _reply(self, step: str, text: str, command: str = "", mail: dict[str, Any] | None = None) -> int:
        """Send a reply, or do what the script wants instead. Returns the code that was sent, 0 if there was none."""
        if self._buffer and not self.sink.pipelining:
            self.sink.too_early += 1
        fault = self.sink.fault(step, command)
        what = fault.what.partition("=")[0] if fault else ""
        if what[:1].isdigit():
            text = what if " " in what else f"{what} scripted"
        if mail is not None and what != "drop":
            unclear = what not in ("", "slow", "reset") and not what[:1].isdigit()
            sure = "unknown" if unclear else "yes" if text[0] == "2" else "no"
            self.sink.store(mail | {"answered": sure, "fault": what, "code": int(text[:3])})
        if fault and what in ("drop", "die", "garbage", "stall", "endless", "lost"):
            return self._misbehave(what)
        line = text.encode() + b"\r\n"
        if fault and what == "slow":
            for at in range(len(line)):
                self._send(line[at : at + 1])
                time.sleep(fault.number(0.05))
        else:
            self._send(line)
        if what == "reset":
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if what == "reset" or text.startswith("421"):
            raise Closed
        return int(text[:3])

    def _misbehave(self, what: str) -> int:
        if what == "lost":
            self._buffer.clear()
            return 0
        self.sink.waiting_peers.add(self.sock)  # The peer may wait for the rest.
        if what == "garbage":
            self._send(self.sink.garbage())
            return 0
        try:
            while what in ("stall", "endless"):
                if what == "stall":
                    self._receive()
                else:
                    self._send(b"250-more\r\n" * 1000)
        finally:
            self.sink.peers_left += 1
        raise Closed

    def _send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def _receive(self) -> None:
        chunk = self.sock.recv(1 << 16)
        if not chunk:
            raise Closed
        self._buffer += chunk

    def _line(self) -> str:
        while (end := self._buffer.find(b"\n")) < 0:
            self._receive()
        line = self._buffer[:end].decode("latin-1").strip()
        del self._buffer[: end + 1]
        return line


HEADERS = re.compile(r"^(X-Alert-Id|Message-ID|Subject|In-Reply-To): *(\S.*?)\r?$", re.MULTILINE | re.IGNORECASE)
TEXT_PART = re.compile(rb"Content-Type: text/plain.*?\r\n\r\n(.*?)(?:\r\n--|\Z)", re.DOTALL | re.IGNORECASE)
PICTURE_PART = re.compile(rb"Content-Type: image/(.*?)\r\n\r\n(.*?)\r\n--", re.DOTALL | re.IGNORECASE)
MARK = re.compile(rb"mark-[\w-]+")
LEFT_OUT = b"icture left out"  # with these words the relay says that a mail lacks its picture


def describe(mail: bytes) -> dict[str, Any]:
    """What is remembered of a mail, read without the email package, which is too slow for large pictures.

    `alerts` are [id, camera] of each; `pictures` their SHA-256; `left_out`: the text says that the picture is missing;
    `marks`: words in the text and in file names by which the long fields of an event are recognised.
    """
    head = mail[: mail.find(b"\r\n\r\n")].decode("latin-1")
    headers = {name.lower(): value for name, value in HEADERS.findall(head)}
    subject = headers.get("subject", "")
    alerts = [[headers["x-alert-id"], subject.rpartition(" - ")[2]]] if "x-alert-id" in headers else []
    if not alerts and b"events.csv" in mail:
        for part in email.message_from_bytes(mail).walk():
            if part.get_filename() == "events.csv":
                table = csv.DictReader(io.StringIO(part.get_payload(decode=True).decode("utf-8-sig")))
                alerts = [[row["id"], row["camera"]] for row in table]
    found = TEXT_PART.search(mail)
    text = found[1] if found else b""
    if found and b"base64" in found[0][: found.start(1) - found.start()]:
        text = base64.b64decode(text)
    pictures = PICTURE_PART.findall(mail)
    marks = {mark.decode() for words in (text, *(head for head, _ in pictures)) for mark in MARK.findall(words)}
    return {"alerts": alerts, "message_id": headers.get("message-id", ""), "subject": subject,
            "in_reply_to": headers.get("in-reply-to", ""), "text": "" if alerts else text.decode("utf-8", "replace"),
            "pictures": [hashlib.sha256(base64.b64decode(data)).hexdigest() for _, data in pictures],
            "left_out": LEFT_OUT in text, "marks": sorted(marks), "bytes": len(mail), "time": time.time()}  # fmt: skip


class Resolver:
    """A DNS server on port 53 of a loopback address: every name is 127.0.0.1, or what `fault` says. Raises OSError."""

    FAULTS = ("silence", "servfail", "nxdomain")
    address = "127.0.0.200"

    def __init__(self) -> None:
        self.fault, self.queries = "", 0
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.bind((self.address, 53))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                query, peer = self._sock.recvfrom(512)
                if not query:  # The socket was shut down.
                    return
                self.queries += 1
                if self.fault != "silence":
                    self._sock.sendto(self._answer(query), peer)

    def _answer(self, query: bytes) -> bytes:
        """RFC 1035 4.1: an address for type A, nothing for other types."""
        end = query.index(b"\0", 12) + 5
        found = not self.fault and query[end - 4 : end - 2] == b"\0\1"
        code = {"servfail": 2, "nxdomain": 3}.get(self.fault, 0)
        head = query[:2] + struct.pack("!HHHHH", 0x8180 | code, 1, found, 0, 0)
        record = struct.pack("!HHHIH4s", 0xC00C, 1, 1, 0, 4, socket.inet_aton("127.0.0.1"))
        return head + query[12:end] + record * found

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(OSError):  # It is not connected, but this wakes the thread.
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="STEP:WHAT", help="what fails")
    parser.add_argument("--log", default="faultsink.jsonl", type=Path, help="where the mails are written down")
    parser.add_argument("--seed", default=1, type=int, help="for faults with a %%")
    parser.add_argument("--lock-step", action="store_true", help="do not offer PIPELINING")
    parser.add_argument("--short", action="store_true", help="end after one mail")
    args = parser.parse_args()
    sink = Sink(args.log, seed=args.seed, pipelining=not args.lock_step)
    sink.script(*args.faults)
    print(f"listening on 127.0.0.1:{sink.port}, seed {args.seed}, log {args.log}", flush=True)
    shown = 0
    with contextlib.suppress(KeyboardInterrupt):
        while not (args.short and shown):
            time.sleep(0.2)
            for mail in sink.mails[shown:]:
                print(json.dumps(mail), flush=True)
                shown += 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
