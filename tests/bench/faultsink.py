#!/usr/bin/env python3
"""faultsink: an SMTP server that never dies and fails on command.

It writes down what it takes (alert ids, Message-ID, hashes of the pictures) before it says 250, so that its log
is the truth about what was delivered. Faults are scripted by step and kind:

    STEP[@WORD]:WHAT[*TIMES][%PERCENT]      rcpt@bob:450*3   dot:die*2   body:drop=4096   mail:421%30

STEP is greeting ehlo starttls tls auth mail rcpt data body dot quit; WORD must stand in the command. WHAT is a reply
(`550`, `450 4.7.1 later`; 421 also hangs up) or one of
    drop[=N]  hang up (in the body: after N bytes)       reset    say 250, then reset the connection
    die       take it, then hang up without a word       garbage  say what is no SMTP
    slow[=S]  say it byte by byte, S seconds apart       endless  250-… for ever
    stall     say nothing until the peer leaves
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GARBAGE = (b"hello\r\n", b"\x15\x03\x01\x00\x02\x02\x46", b"2\r\n", b"9" * 9000 + b"\r\n", b"\0\0\0\0\r\n", b"\r\n")
NOTATION = re.compile(r"(\w+)(?:@([^:]+))?:([^*%]+)(?:\*(\d+))?(?:%(\d+))?")
EVER = 1 << 60
REPLIES = {
    "helo": "250 faultsink", "starttls": "220 go", "auth": "235 2.7.0 welcome", "mail": "250 2.1.0 ok",
    "rcpt": "250 2.1.5 ok", "rset": "250 2.0.0 ok", "noop": "250 2.0.0 ok", "quit": "221 2.0.0 bye",
}  # fmt: skip


@dataclass
class Fault:
    """One scripted failure; see the head of this file."""

    step: str
    what: str
    word: str = ""
    times: int = EVER
    chance: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Fault:
        """`dot:die*2` -> the fault. Raises ValueError."""
        match = NOTATION.fullmatch(text)
        if not match:
            raise ValueError(f"{text!r} is no fault; write STEP:WHAT[*TIMES][%PERCENT]")
        step, word, what, times, percent = match.groups()
        return cls(step, what, word or "", int(times or EVER), int(percent or 100) / 100)

    def number(self, default: float) -> float:
        """The N of `drop=N`."""
        return float(self.what.partition("=")[2] or default)


class HangUp(Exception):
    """This session is over."""


class Sink:
    """The server. `log` gets a line of JSON a mail before its 250; `mails` holds the same."""

    def __init__(self, log: Path, *, seed: int = 0, pipelining: bool = True, tls: ssl.SSLContext | None = None,
                 auth: bool = False, size: int = 0) -> None:  # fmt: skip
        self.pipelining, self.tls, self.auth, self.size = pipelining, tls, auth, size
        self.mails: list[dict[str, Any]] = []
        self.fired: dict[str, int] = {}  # how often a fault struck, by "step:what"
        self.early = 0  # times a peer without PIPELINING spoke before its turn
        self.sessions = 0
        self.outlasted = 0  # stalls and endless replies that are over
        self._faults: list[Fault] = []
        self._rng = random.Random(seed)
        self._log = log.open("ab", buffering=0)
        self._lock = threading.Lock()
        self.peers: set[socket.socket] = set()
        self.stuck: set[socket.socket] = set()
        self.port = 0
        self.resume()

    def resume(self) -> None:
        """Listen, on the same port as before."""
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=256)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def pause(self) -> None:
        """Be away: connections are refused, peers are let go."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._let_go(self.peers)

    def script(self, *faults: str) -> None:
        """Replace what fails from now on; without faults everything is well, and stuck peers are let go."""
        parsed = [Fault.parse(fault) for fault in faults]
        with self._lock:
            self._faults = parsed
        if not faults:
            self._let_go(self.stuck)

    @staticmethod
    def _let_go(peers: set[socket.socket]) -> None:
        for sock in tuple(peers):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def strike(self, step: str, text: str) -> Fault | None:
        """The fault that hits this step, counted, or None."""
        with self._lock:
            for fault in self._faults:
                if fault.step == step and fault.word in text and fault.times > 0 and self._rng.random() < fault.chance:
                    fault.times -= 1
                    name = f"{fault.step}:{fault.what}"
                    self.fired[name] = self.fired.get(name, 0) + 1
                    return fault
        return None

    def garbage(self) -> bytes:
        """Something that is no SMTP."""
        with self._lock:
            return self._rng.choice(GARBAGE)

    def keep(self, mail: dict[str, Any]) -> None:
        """Write a mail down; when this returns it counts as taken."""
        with self._lock:
            self._log.write(json.dumps(mail).encode() + b"\n")
            self.mails.append(mail)

    def close(self) -> None:
        """The end."""
        self.pause()
        self._log.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            self.sessions += 1
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        self.peers.add(sock)
        session = Session(self, sock)
        with contextlib.suppress(HangUp, OSError, ValueError):
            session.run()
        self.peers.discard(session.sock)
        self.stuck.discard(session.sock)
        session.sock.close()


class Session:
    """One peer."""

    def __init__(self, sink: Sink, sock: socket.socket) -> None:
        self.sink, self.sock = sink, sock
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray()
        self._begun, self._recipients = False, list[str]()

    def run(self) -> None:
        """Greeting to QUIT. Raises HangUp and OSError."""
        self._reply("greeting", "220 faultsink ESMTP")
        while True:
            line = self._line()
            step = line.lower().partition(" ")[0]
            if step == "data":
                self._data()
                continue
            text = self._capabilities() if step == "ehlo" else REPLIES.get(step, "500 what?")
            if step == "rcpt" and not self._begun:
                text = "503 5.5.1 MAIL first"
            code = self._reply(step, text, line)
            if step == "starttls" and code == 220 and self.sink.tls:
                self._start_tls(self.sink.tls)
            elif step == "mail":
                self._begun, self._recipients = code == 250, []
            elif step == "rcpt" and code == 250:
                self._recipients.append(line[line.find("<") + 1 : line.rfind(">")])
            elif step == "quit":
                raise HangUp

    def _start_tls(self, tls: ssl.SSLContext) -> None:
        self._buffer.clear()
        if fault := self.sink.strike("tls", ""):
            self._misbehave(fault.what)
            raise HangUp
        self.sink.peers.discard(self.sock)
        self.sock = tls.wrap_socket(self.sock, server_side=True)
        self.sink.peers.add(self.sock)

    def _capabilities(self) -> str:
        sink = self.sink
        words = ["faultsink", "8BITMIME", "ENHANCEDSTATUSCODES"]
        words += ["PIPELINING"] * sink.pipelining + [f"SIZE {sink.size}"] * bool(sink.size)
        words += ["STARTTLS"] * bool(sink.tls and not isinstance(self.sock, ssl.SSLSocket)) + ["AUTH PLAIN"] * sink.auth
        return "\r\n".join(f"250{' ' if word is words[-1] else '-'}{word}" for word in words)

    def _data(self) -> None:
        if not self._recipients:
            return self._send(b"554 5.5.1 no valid recipients\r\n")
        if self._reply("data", "354 go") != 354:
            return None
        fault = self.sink.strike("body", "")
        mail = self._body(int(fault.number(0)) if fault else EVER)
        if fault:
            raise HangUp
        return self._reply("dot", "250 2.0.0 taken", mail=describe(mail) | {"to": self._recipients}) and None

    def _body(self, most: int) -> bytes:
        seen = 0
        while (end := self._buffer.find(b"\r\n.\r\n", max(0, seen - 4))) < 0 and not self._buffer.startswith(b".\r\n"):
            if len(self._buffer) >= most:
                raise HangUp
            seen = len(self._buffer)
            self._receive()
        mail = bytes(self._buffer[: end + 2]).replace(b"\r\n..", b"\r\n.")
        del self._buffer[: end + 5]
        return mail

    def _reply(self, step: str, text: str, command: str = "", mail: dict[str, Any] | None = None) -> int:
        """Say it, or do what the script wants instead; the code that was said.

        A mail is kept when its 250 is about to be said ("yes"), or when nobody will know whether it was ("unknown").
        """
        if self._buffer and not self.sink.pipelining:
            self.sink.early += 1
        fault = self.sink.strike(step, command)
        what = fault.what.partition("=")[0] if fault else ""
        if what[:1].isdigit():
            text = what if " " in what else f"{what} scripted"
        elif mail is not None and what != "drop":
            self.sink.keep(mail | {"answered": "yes" if what in ("", "slow", "reset") else "unknown", "fault": what})
        if fault and what in ("drop", "die", "garbage", "stall", "endless"):
            return self._misbehave(what)
        line = text.encode() + b"\r\n"
        for at in range(len(line)) if what == "slow" and fault else ():
            self._send(line[at : at + 1])
            time.sleep(fault.number(0.05))
        if what != "slow":
            self._send(line)
        if what == "reset":
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if what == "reset" or text.startswith("421"):
            raise HangUp
        return int(text[:3])

    def _misbehave(self, what: str) -> int:
        self.sink.stuck.add(self.sock)  # the peer may wait for the rest
        if what == "garbage":
            self._send(self.sink.garbage())
            return 0
        try:
            while what in ("stall", "endless"):  # until the peer leaves
                if what == "stall":
                    self._receive()
                else:
                    self._send(b"250-more\r\n" * 1000)
        finally:
            self.sink.outlasted += 1
        raise HangUp

    def _send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def _receive(self) -> None:
        chunk = self.sock.recv(1 << 16)
        if not chunk:
            raise HangUp
        self._buffer += chunk

    def _line(self) -> str:
        while (end := self._buffer.find(b"\n")) < 0:
            self._receive()
        line = self._buffer[:end].decode("latin-1").strip()
        del self._buffer[: end + 1]
        return line


def describe(mail: bytes) -> dict[str, Any]:
    """What is remembered of a mail: the alerts in it as [id, camera], Message-ID, SHA-256 of each picture, the time."""
    head = mail[: mail.find(b"\r\n\r\n")].decode("latin-1")
    headers = dict(re.findall(r"^(X-Alert-Id|Message-ID|Subject): *(\S.*?)\r?$", head, re.M | re.I))
    alerts = [[headers["X-Alert-Id"], headers["Subject"].rpartition(" - ")[2]]] if "X-Alert-Id" in headers else []
    if not alerts and b"events.csv" in mail:
        for part in email.message_from_bytes(mail).walk():
            if part.get_filename() == "events.csv":
                table = csv.DictReader(io.StringIO(part.get_payload(decode=True).decode("utf-8-sig")))
                alerts = [[row["id"], row["camera"]] for row in table]
    pictures = [
        hashlib.sha256(base64.b64decode(text)).hexdigest()
        for text in re.findall(rb"Content-Type: image/.*?\r\n\r\n(.*?)\r\n--", mail, re.S | re.I)
    ]
    return {"alerts": alerts, "message_id": headers.get("Message-ID", ""), "pictures": pictures,
            "bytes": len(mail), "time": time.time()}  # fmt: skip


class Resolver:
    """A DNS server on port 53 of a loopback address: every name is 127.0.0.1, or what `fault` says. Raises OSError."""

    FAULTS = ("silence", "servfail", "nxdomain")
    address = "127.0.0.200"

    def __init__(self) -> None:
        self.fault, self.asked = "", 0
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.bind((self.address, 53))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                query, peer = self._sock.recvfrom(512)
                if not query:  # closed
                    return
                self.asked += 1
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
        """The end."""
        with contextlib.suppress(OSError):  # it is not connected, but this wakes the thread
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
