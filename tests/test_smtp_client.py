"""One transaction after another against real and scripted mail servers: what was accepted, and what went wrong."""

from __future__ import annotations

import base64
import contextlib
import hmac
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiosmtpd.smtp import AuthResult
from conftest import CLOSE, PNG, STALL, Certificates, Scripted

import smtp_module as smtp
from smtp_module import Message, Outcome, PreparedMessage, SMTPClient, SMTPConfig, Unavailable, Verdict

SENT, LATER, REFUSED = Verdict.SENT, Verdict.TRY_LATER, Verdict.REFUSED
MAIL = [b"Subject: hello\r\n\r\n", b"one\r\n.two\r\n", b".\r\nthree\r\n"]
TO = "ann@example.com"
PATIENCE = 0.7  # seconds to wait for a server that is silent, and long enough for one on a busy machine
USUAL = {"MAIL": b"250 ok\r\n", "RCPT": b"250 ok\r\n", "DATA": b"354 go\r\n", ".": b"250 ok\r\n"}
Start = Callable[..., Scripted]


def config(port: int, **settings: Any) -> SMTPConfig:
    return SMTPConfig(
        **{"host": "127.0.0.1", "port": port, "sender": "relay@example.com", "timeout_s": 5.0, **settings}
    )


def prepared(to: str = TO, data: list[bytes] | None = None) -> PreparedMessage:
    return PreparedMessage(Message("relay@example.com", MAIL if data is None else data), to)


def named(*names: str) -> list[PreparedMessage]:
    """Small messages, each to a recipient of its name."""
    return [prepared(f"{name}@example.com", [b"Subject: %b\r\n\r\nx\r\n" % name.encode()]) for name in names]


def send_all(client: SMTPClient, *messages: PreparedMessage) -> list[Outcome]:
    """Send them as a courier does: each tells the client which one follows."""
    outcomes, waiting, held = list[Outcome](), deque(messages), list[PreparedMessage]()

    def following() -> PreparedMessage | None:
        assert not held, "only one follows"
        if waiting:
            held.append(waiting.popleft())
        return held[0] if held else None

    while held or waiting:
        message = held.pop() if held else waiting.popleft()
        outcomes.append(client.send(message, following))
    return outcomes


def send(port: int, *messages: PreparedMessage, **settings: Any) -> list[Outcome]:
    """Send them over one client, and close it."""
    client = SMTPClient(config(port, **settings))
    try:
        return send_all(client, *messages)
    finally:
        client.close()


def send_one(port: int, data: list[bytes] | None = None, **settings: Any) -> Outcome:
    return send(port, prepared(TO, data), **settings)[0]


def recipients(server: Scripted) -> str:
    """The first letters of those who were sent a mail, in order."""
    return "".join(mail.recipients[0][0] for mail in server.mails)


# Real servers


def test_a_mail_arrives_byte_for_byte(mailbox: Callable[..., Any]) -> None:
    box = mailbox()
    assert send_one(box.port).verdict is SENT
    (mail,) = box.mails
    assert (mail.sender, mail.recipients, mail.content) == ("relay@example.com", [TO], b"".join(MAIL))


@pytest.mark.parametrize("length", [0, 1, 75_999, 76_000, 76_001, 300_000])
def test_mails_of_every_length_arrive_whole(mailbox: Callable[..., Any], length: int) -> None:
    box = mailbox()
    body = [b"." * 70 + b"\r\n"] * (length // 72 + 1)
    assert send_one(box.port, [b"Subject: long\r\n\r\n", *body]).verdict is SENT
    assert box.mails[0].content == b"Subject: long\r\n\r\n" + b"".join(body)


def test_a_mail_without_a_final_line_end_gets_one(mailbox: Callable[..., Any]) -> None:
    box = mailbox()
    send_one(box.port, [b"Subject: x\r\n\r\nend"])
    assert box.mails[0].content == b"Subject: x\r\n\r\nend\r\n"


def test_the_null_sender(scripted: Start) -> None:
    server = scripted()
    send(server.port, PreparedMessage(Message("", MAIL), TO))
    assert server.commands[1].startswith("MAIL FROM:<>")


@pytest.mark.parametrize("extensions", [(), ("PIPELINING",), ("PIPELINING", "8BITMIME", "SIZE 1000000")])
def test_the_dialogue_is_the_same_with_and_without_pipelining(scripted: Start, extensions: tuple[str, ...]) -> None:
    server = scripted(extensions=extensions)
    assert send_one(server.port).verdict is SENT
    assert server.verbs() == ["EHLO", "MAIL", "RCPT", "DATA", "QUIT"]
    assert (" SIZE=" in server.commands[1]) == (len(extensions) == 3)


def test_helo_serves_where_ehlo_is_unknown(scripted: Start) -> None:
    server = scripted(answers={"EHLO": b"502 what?\r\n"})
    assert send_one(server.port).verdict is SENT
    assert server.verbs()[:2] == ["EHLO", "HELO"]


@pytest.mark.parametrize(
    ("machine", "wanted", "name"),
    [("nas", "", "[127.0.0.1]"), ("nas.example.com", "", "nas.example.com"), ("nas", "mail.me", "mail.me")],
)
def test_the_name_in_ehlo_is_one_that_servers_accept(
    scripted: Start, monkeypatch: pytest.MonkeyPatch, machine: str, wanted: str, name: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: machine)
    server = scripted()
    send_one(server.port, ehlo=wanted)
    assert server.commands[0] == f"EHLO {name}"


# TLS


@pytest.mark.parametrize("security", ["ssl", "starttls"])
def test_tls_with_a_verified_certificate(
    mailbox: Callable[..., Any], certificates: Certificates, security: str
) -> None:
    box = mailbox(tls=certificates.context("good"), implicit=security == "ssl", require_starttls=security == "starttls")
    for host in ("localhost", "127.0.0.1"):
        assert send_one(box.port, host=host, security=security, cafile=certificates.ca).verdict is SENT
    assert len(box.mails) == 2


@pytest.mark.parametrize("security", ["ssl", "starttls"])
@pytest.mark.parametrize(
    ("name", "words"), [("wrong", "mismatch|not valid for"), ("expired", "expired"), ("selfsigned", "self.signed")]
)
def test_a_bad_certificate_ends_the_attempt_and_never_falls_back_to_clear_text(
    scripted: Start, certificates: Certificates, security: str, name: str, words: str
) -> None:
    server = scripted(tls=certificates.context(name), extensions=("STARTTLS",), implicit=security == "ssl")
    found = send_one(server.port, security=security, cafile=certificates.ca, user="ann", password=lambda: "secret")
    assert (found.verdict, found.step, found.about_us) == (LATER, "tls", True)
    assert re.search(words, found.detail, re.I), found.detail
    assert set(server.verbs()) <= {"EHLO", "STARTTLS"}
    assert smtp.advice(found, "mail.example.com")


def test_an_unknown_signer_is_refused(mailbox: Callable[..., Any], certificates: Certificates) -> None:
    box = mailbox(tls=certificates.context("good"))
    found = send_one(box.port, security="starttls")
    assert (found.verdict, found.step, box.mails) == (LATER, "tls", [])


@pytest.mark.parametrize("answer", [b"454 not now\r\n", b"500 what?\r\n", None, b"220 go\r\n250 injected\r\n", CLOSE])
def test_starttls_stripped_or_refused_sends_nothing_in_the_clear(scripted: Start, answer: bytes | None) -> None:
    server = scripted(extensions=("STARTTLS",) if answer is not None else (), answers={"STARTTLS": answer or b""})
    found = send_one(server.port, security="starttls", user="ann", password=lambda: "secret", timeout_s=1.0)
    assert (found.verdict, found.step, found.about_us) == (LATER, "tls", True)
    assert not {"AUTH", "MAIL"} & set(server.verbs())


def test_what_came_before_the_handshake_is_forgotten(scripted: Start, certificates: Certificates) -> None:
    """Else somebody in the middle could put words into the server's mouth (CVE-2011-0411)."""
    injected = b"220 go\r\n250-scripted\r\n250 SIZE 10\r\n"
    server = scripted(tls=certificates.context("good"), extensions=("STARTTLS",), answers={"STARTTLS": injected})
    assert send_one(server.port, security="starttls", cafile=certificates.ca).verdict is SENT


# AUTH


def authenticator(server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
    good = (data.login.decode(), data.password.decode()) == ("ann", "pass wörd")
    return AuthResult(success=good, handled=False)


@pytest.mark.parametrize(("excluded", "used"), [((), "PLAIN"), (("PLAIN",), "LOGIN")])
def test_login_with_a_password_in_utf_8(mailbox: Callable[..., Any], excluded: tuple[str, ...], used: str) -> None:
    box = mailbox(
        authenticator=authenticator, auth_required=True, auth_require_tls=False, auth_exclude_mechanism=excluded
    )
    lines: list[str] = []
    found = send_one(box.port, user="ann", password=lambda: "pass wörd", trace=lines.append)
    assert found.verdict is SENT and f"C: AUTH {used}" in "\n".join(lines)


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


PLAIN_ANSWER = encoded("\0ann\0secret")


def cram_server(scripted: Start, **more: Any) -> tuple[Scripted, str]:
    """A server that offers CRAM-MD5, and the answer that it expects (RFC 2195)."""
    server = scripted(**more)
    digest = hmac.new(b"secret", b"<1@mail.test>", "md5").hexdigest()
    answer = encoded(f"ann {digest}")
    server.answers[answer.upper()] = b"235 welcome\r\n"
    return server, answer


def test_cram_md5(scripted: Start) -> None:
    challenge = b"334 " + encoded("<1@mail.test>").encode() + b"\r\n"
    server, answer = cram_server(scripted, extensions=("AUTH CRAM-MD5",), answers={"AUTH": challenge})
    assert send_one(server.port, user="ann", password=lambda: "secret").verdict is SENT
    assert answer in server.commands


MECHANISMS = [
    # offered, answers to AUTH by mechanism (the usual one accepts), the mechanisms that are tried, connections
    ("PLAIN LOGIN CRAM-MD5", {}, ["PLAIN"], 1),
    ("CRAM-MD5 LOGIN", {}, ["LOGIN"], 1),
    ("PLAIN LOGIN", {"PLAIN": b"504 5.5.4 not that one\r\n"}, ["PLAIN", "LOGIN"], 1),
    ("PLAIN LOGIN", {"PLAIN": b"538 5.7.11 encryption needed\r\n"}, ["PLAIN", "LOGIN"], 1),
    ("PLAIN LOGIN", {"PLAIN": CLOSE}, ["PLAIN", "LOGIN"], 2),
    ("PLAIN LOGIN", {"PLAIN": b"421 go away\r\n"}, ["PLAIN", "LOGIN"], 2),
    ("PLAIN LOGIN", {"PLAIN": b"what?\r\n"}, ["PLAIN", "LOGIN"], 2),
]


def by_mechanism(answers: dict[str, bytes]) -> Callable[[str], bytes]:
    return lambda line: answers.get(line.split()[1], b"235 welcome\r\n")


def mechanisms(server: Scripted) -> list[str]:
    tried = [line.split()[1] for line in server.commands if line.startswith("AUTH")]
    return [name for number, name in enumerate(tried) if tried[number - 1 : number] != [name]]


@pytest.mark.parametrize(("offered", "answers", "tried", "connections"), MECHANISMS)
def test_mechanisms_are_tried_in_turn_and_what_worked_comes_first_next_time(
    scripted: Start, offered: str, answers: dict[str, bytes], tried: list[str], connections: int
) -> None:
    server = scripted(extensions=(f"AUTH {offered}",), answers={"AUTH": by_mechanism(answers)})
    client = SMTPClient(config(server.port, user="ann", password=lambda: "secret"))
    assert client.send(prepared()).verdict is SENT
    client.close()
    assert (mechanisms(server), server.connections) == (tried, connections)
    server.commands.clear()
    assert client.send(prepared()).verdict is SENT
    client.close()
    assert mechanisms(server) == tried[-1:]


@pytest.mark.parametrize("refusal", [b"500 line too long\r\n", b"501 5.5.2 no initial response\r\n", b"504 what?\r\n"])
def test_an_initial_response_that_is_refused_is_sent_by_itself(scripted: Start, refusal: bytes) -> None:
    server = scripted(extensions=("AUTH PLAIN",))
    server.answers["AUTH"] = lambda line: refusal if len(line.split()) == 3 else b"334 \r\n"
    server.answers[PLAIN_ANSWER.upper()] = b"235 welcome\r\n"
    assert send_one(server.port, user="ann", password=lambda: "secret").verdict is SENT
    assert server.commands[1:4] == [f"AUTH PLAIN {PLAIN_ANSWER}", "AUTH PLAIN", PLAIN_ANSWER]


@pytest.mark.parametrize("code", [535, 534])
def test_a_wrong_password_ends_the_round_of_mechanisms(scripted: Start, code: int) -> None:
    server = scripted(extensions=("AUTH PLAIN LOGIN CRAM-MD5",), answers={"AUTH": f"{code} 5.7.8 no\r\n".encode()})
    found = send_one(server.port, user="ann", password=lambda: "secret")
    assert (found.verdict, found.code, found.step, found.about_us) == (LATER, code, "login", True)
    assert len(mechanisms(server)) == server.connections == 1


@pytest.mark.parametrize("auth", ["plain", "login", "cram-md5"])
def test_a_mechanism_that_is_wanted_is_the_only_one(scripted: Start, auth: str) -> None:
    server = scripted(extensions=("AUTH PLAIN LOGIN CRAM-MD5",), answers={"AUTH": b"504 no\r\n"})
    found = send_one(server.port, user="ann", password=lambda: "secret", auth=auth)
    assert (found.code, found.step, mechanisms(server)) == (504, "login", [auth.upper()])


def test_xoauth2_sends_user_and_token(scripted: Start) -> None:
    server = scripted(extensions=("AUTH LOGIN XOAUTH2",))
    found = send_one(server.port, user="ann@example.com", password=lambda: "ya29.token", auth="xoauth2")
    assert found.verdict is SENT
    _, mechanism, response = next(line for line in server.commands if line.startswith("AUTH")).split()
    assert mechanism == "XOAUTH2"
    assert base64.b64decode(response) == b"user=ann@example.com\1auth=Bearer ya29.token\1\1"


def test_a_refused_token_is_answered_with_an_empty_line_and_the_servers_words_are_kept(scripted: Start) -> None:
    server = scripted(extensions=("AUTH XOAUTH2",))
    server.answers |= {"AUTH": b"334 eyJzdGF0dXMiOiI0MDAifQ==\r\n", "": b"535 5.7.8 not accepted\r\n"}
    found = send_one(server.port, user="ann", password=lambda: "old", auth="xoauth2")
    assert (found.code, found.step, found.about_us) == (535, "login", True)
    assert "not accepted" in found.detail


def test_a_wrong_password_is_about_us_and_not_shown(mailbox: Callable[..., Any]) -> None:
    box = mailbox(authenticator=authenticator, auth_required=True, auth_require_tls=False)
    lines: list[str] = []
    found = send_one(box.port, user="ann", password=lambda: "wrong-secret", trace=lines.append)
    assert (found.verdict, found.code, found.step, found.about_us) == (LATER, 535, "login", True)
    said = "\n".join([*lines, str(found), repr(config(1, user="ann", password=lambda: "wrong-secret"))])
    assert "wrong-secret" not in said
    assert not any(encoded(text)[:12] in said for text in ("wrong-secret", "\0ann\0wrong-secret"))


@pytest.mark.parametrize("extensions", [(), ("AUTH GSSAPI NTLM",)])
def test_a_server_without_a_login_that_we_know_says_so(scripted: Start, extensions: tuple[str, ...]) -> None:
    server = scripted(extensions=extensions)
    found = send_one(server.port, user="ann", password=lambda: "secret")
    assert (found.verdict, found.step, found.about_us) == (LATER, "login", True)
    assert "MAIL" not in server.verbs() and smtp.advice(found, "mail.example.com")


def test_a_password_command_that_fails_later_is_about_us(scripted: Start) -> None:
    def password() -> str:
        raise smtp.ConfigError("SMTP_PASS_COMMAND: failed")

    found = send_one(scripted(extensions=("AUTH PLAIN",)).port, user="ann", password=password)
    assert (found.step, found.about_us, found.detail) == ("login", True, "SMTP_PASS_COMMAND: failed")


# Several addresses of a host


class Silent:
    """It listens, and its backlog is full: a connection is not refused and not made, as behind a bad route."""

    def __init__(self, host: str, port: int = 0) -> None:
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind((host, port))
        self.listener.listen(0)
        self.port = self.listener.getsockname()[1]
        self.filling = [socket.socket() for _ in range(4)]
        for sock in self.filling:
            sock.setblocking(False)
            sock.connect_ex((host, self.port))

    def stop(self) -> None:
        for sock in (self.listener, *self.filling):
            sock.close()


def resolve_to(monkeypatch: pytest.MonkeyPatch, port: int, *hosts: str) -> None:
    """Let every name have these addresses."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in hosts]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


@pytest.mark.parametrize("first", [CLOSE, b"421 busy\r\n", b"554 not here\r\n", b"hello\r\n", STALL, "nobody", "silent"])
def test_every_address_is_tried_until_one_greets_and_what_worked_comes_first_next_time(
    scripted: Start, monkeypatch: pytest.MonkeyPatch, first: bytes | str
) -> None:
    good = scripted()
    if isinstance(first, bytes):
        bad = scripted(host="127.0.0.2", port=good.port, answers={"greeting": first})
    elif first == "silent":
        bad = Silent("127.0.0.2", good.port)
    resolve_to(monkeypatch, good.port, "127.0.0.2", "127.0.0.1")
    client = SMTPClient(config(good.port, host="mail.test", timeout_s=2 * PATIENCE))
    began = time.monotonic()
    for _ in range(3):
        assert client.send(prepared()).verdict is SENT
        client.close()
    if first == "silent":
        assert time.monotonic() - began < 2 * PATIENCE, "the addresses share the time for connecting"
    assert len(good.mails) == 3
    if first != "nobody":
        assert getattr(bad, "connections", 1) == 1
        bad.stop()


def test_when_no_address_greets_the_servers_own_words_are_kept(
    scripted: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = scripted(host="127.0.0.2", answers={"greeting": b"554 5.7.1 you are on a list\r\n"})
    resolve_to(monkeypatch, server.port, "127.0.0.2", "127.0.0.3")
    found = send_one(server.port, host="mail.test")
    assert (found.verdict, found.code, found.step, found.about_us) == (LATER, 554, "greeting", True)
    assert "on a list" in found.detail


# Every place where a server can say no


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize("code", ["450", "550"])
@pytest.mark.parametrize(
    ("place", "step", "about_us"),
    [
        ("greeting", "greeting", True), ("EHLO", "ehlo", True), ("STARTTLS", "tls", True), ("AUTH", "login", True),
        ("MAIL", "mail", True), ("RCPT", "rcpt", False), ("DATA", "data", False), (".", "dot", False),
    ],
)  # fmt: skip
def test_the_outcome_of_a_no_at_every_place(  # noqa: PLR0917
    scripted: Start, place: str, step: str, about_us: bool, code: str, pipelining: bool
) -> None:
    names = ("PIPELINING",) * pipelining
    server = scripted(extensions=(*names, "STARTTLS", "AUTH PLAIN"), answers={place: f"{code} no\r\n".encode()})
    if place == "EHLO":
        server.answers["HELO"] = f"{code} no\r\n".encode()
    settings = {"security": "starttls"} if place == "STARTTLS" else {"user": "ann", "password": lambda: "secret"}
    found = send_one(server.port, **settings)
    verdict = REFUSED if code == "550" and not about_us else LATER
    assert (found.verdict, found.code, found.step, found.about_us) == (verdict, int(code), step, about_us)
    assert server.mails == []


@pytest.mark.parametrize("place", ["greeting", "EHLO", "MAIL", "RCPT", "DATA", "."])
@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize(
    "answer",
    [CLOSE, b"hello\r\n", b"\x15\x03\x01\x00\x02\x02\x28\r\n", b"2\r\n", b"\0" * 50 + b"\r\n", b"999 what\r\n"],
)
def test_what_is_no_answer_is_a_later(scripted: Start, place: str, answer: bytes, pipelining: bool) -> None:
    server = scripted(extensions=("PIPELINING",) * pipelining, answers={place: answer, "HELO": answer})
    found = send_one(server.port)
    assert found.verdict is LATER
    assert found.about_us == (place in ("greeting", "EHLO", "MAIL"))


@pytest.mark.parametrize(("place", "answer"), [("DATA", b"250 ok\r\n"), (".", b"354 what\r\n"), ("RCPT", b"354 go\r\n")])
@pytest.mark.parametrize("pipelining", [True, False])
def test_an_answer_that_does_not_belong_there_is_a_later(
    scripted: Start, place: str, answer: bytes, pipelining: bool
) -> None:
    server = scripted(extensions=("PIPELINING",) * pipelining, answers={place: answer})
    assert send_one(server.port).verdict is LATER


def test_a_server_that_hangs_up_after_its_no_has_said_enough(scripted: Start) -> None:
    server = scripted(answers={"MAIL": b"550 5.7.1 not you\r\n", "RCPT": CLOSE})
    found = send_one(server.port)
    assert (found.verdict, found.code, found.step, found.about_us) == (LATER, 550, "mail", True)


@pytest.mark.parametrize("extensions", [(), ("PIPELINING",)])
@pytest.mark.parametrize("data", [b"554 no valid recipients\r\n", b"354 go on anyway\r\n"])
def test_after_a_refusal_the_connection_serves_on(scripted: Start, extensions: tuple[str, ...], data: bytes) -> None:
    answers = {"RCPT": [USUAL["RCPT"], b"550 5.1.1 unknown\r\n"], "DATA": [USUAL["DATA"], data]}
    server = scripted(extensions=extensions, answers=answers)
    if not extensions:
        server.answers["DATA"] = []  # It is not asked after the refusal.
    assert [outcome.verdict for outcome in send(server.port, *named("a", "b", "c"))] == [SENT, REFUSED, SENT]
    assert recipients(server) == "ac" and server.connections == 1


@pytest.mark.parametrize("security", ["none", "ssl"])
def test_a_connection_dropped_in_the_mail_is_a_later(
    scripted: Start, certificates: Certificates, security: str
) -> None:
    for hears in (0, 1, 100_000):
        server = scripted(hears=hears, tls=certificates.context("good"), implicit=security == "ssl")
        data = [b"x" * 70 + b"\r\n"] * 100_000
        found = send_one(server.port, data, security=security, cafile=certificates.ca)
        assert (found.verdict, found.code, found.step, found.about_us) == (LATER, 0, "dot", False)


@pytest.mark.parametrize("security", ["none", "ssl"])
def test_a_reply_in_the_middle_of_the_mail_is_heard(scripted: Start, certificates: Certificates, security: str) -> None:
    def refuse(line: str) -> bytes:
        return b"354 go on\r\n552 5.3.4 too big\r\n"

    tls = certificates.context("good")
    server = scripted(answers={"DATA": refuse}, hears=200_000, tls=tls, implicit=security == "ssl")
    data = [b"x" * 70 + b"\r\n"] * 200_000
    found = send_one(server.port, data, security=security, cafile=certificates.ca)
    assert (found.code, found.too_big) == (552, True)


def test_a_dot_that_is_not_answered_is_a_later_and_the_mail_is_not_sent_again_here(scripted: Start) -> None:
    server = scripted(answers={".": [CLOSE]})
    found = send_one(server.port)
    assert (found.verdict, found.code, found.step) == (LATER, 0, "dot")
    assert server.verbs().count("DATA") == 1


def test_whatever_quit_is_answered_the_mail_counts_as_sent(scripted: Start) -> None:
    for answer in (CLOSE, b"500 no\r\n", b"garbage\r\n"):
        assert send_one(scripted(answers={"QUIT": answer}).port).verdict is SENT


# SIZE


def test_a_mail_beyond_the_servers_size_is_not_tried_and_the_limit_is_told(scripted: Start) -> None:
    server = scripted(extensions=("PIPELINING", "SIZE 1000"))
    big = prepared(TO, [b"x" * 900 + b"\r\n", b"y" * 900 + b"\r\n"])
    found = send(server.port, *named("a"), big, *named("c"))
    assert [(outcome.code, outcome.too_big, outcome.size_limit) for outcome in found] == [
        (250, False, 0), (552, True, 1000), (250, False, 0),
    ]  # fmt: skip
    assert recipients(server) == "ac" and server.connections == 1


@pytest.mark.parametrize("size", ["SIZE", "SIZE 0", "SIZE x", "SIZE " + "9" * 5000])
def test_a_size_without_a_limit_limits_nothing(scripted: Start, size: str) -> None:
    assert send_one(scripted(extensions=(size,)).port).verdict is SENT


BIG = [b"x" * 70 + b"\r\n"] * 1000


def limited_to(size: int, refusal: bytes, bare: bytes = b"250 ok\r\n") -> Callable[[str], bytes]:
    """The answer to a MAIL that tells its size."""
    return lambda line: refusal if int(line.partition("SIZE=")[2] or 0) > size else bare


@pytest.mark.parametrize("extensions", [("SIZE",), ("SIZE", "PIPELINING")])
@pytest.mark.parametrize("refusal", [b"534 SIZE=Message too big\r\n", b"550 5.2.3 too large\r\n", b"554 no\r\n"])
def test_a_refusal_of_a_mail_that_tells_its_size_is_first_about_that_size(
    scripted: Start, extensions: tuple[str, ...], refusal: bytes
) -> None:
    server = scripted(extensions=extensions, answers={"MAIL": limited_to(50_000, refusal)})
    big, small = send(server.port, prepared(TO, BIG), prepared())
    assert (big.verdict, big.too_big, big.about_us) == (REFUSED, True, False)
    assert big.detail in refusal.decode() and small.verdict is SENT


@pytest.mark.parametrize("extensions", [("SIZE",), ("SIZE", "PIPELINING"), ()])
def test_when_the_bare_mail_is_refused_too_it_is_about_us(scripted: Start, extensions: tuple[str, ...]) -> None:
    refusal = b"534 5.7.9 application-specific password required\r\n"
    server = scripted(extensions=extensions, answers={"MAIL": refusal})
    found = send_one(server.port, BIG)
    assert (found.verdict, found.code, found.too_big, found.about_us) == (LATER, 534, False, True)


def test_a_server_that_is_too_full_for_this_size_is_a_later_that_is_not_about_us(scripted: Start) -> None:
    server = scripted(extensions=("SIZE",), answers={"MAIL": limited_to(50_000, b"452 4.3.1 insufficient storage\r\n")})
    found = send_one(server.port, BIG)
    assert (found.verdict, found.code, found.too_big, found.about_us) == (LATER, 452, False, False)


# Many mails over one connection


@pytest.mark.parametrize("pipelining", [True, False])
def test_many_mails_go_in_order_over_one_connection(scripted: Start, pipelining: bool) -> None:
    server = scripted(extensions=("PIPELINING",) * pipelining)
    assert [outcome.code for outcome in send(server.port, *named("a", "b", "c"))] == [250, 250, 250]
    assert [(mail.recipients, mail.content) for mail in server.mails] == [
        ([f"{name}@example.com"], b"Subject: %b\r\n\r\nx\r\n" % name.encode()) for name in "abc"
    ]
    assert server.verbs() == ["EHLO", *["MAIL", "RCPT", "DATA"] * 3, "QUIT"] and server.connections == 1


def test_the_next_mail_begins_in_the_packet_of_the_dot_only_where_that_is_allowed(
    scripted: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = smtp.SMTPConnection.write
    for extensions, early in ((("PIPELINING",), 2), ((), 0)):
        packets: list[bytes] = []

        def write(self: smtp.SMTPConnection, pieces: Any, packets: list[bytes] = packets) -> None:
            packets.append(b"".join(pieces))
            real(self, pieces)

        monkeypatch.setattr(smtp.SMTPConnection, "write", write)
        send(scripted(extensions=extensions).port, *named("a", "b", "c"))
        assert sum(b"\r\n.\r\nMAIL FROM" in packet for packet in packets) == early


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize("place", ["MAIL", "RCPT", "DATA", "."])
@pytest.mark.parametrize("code", [450, 550])
def test_what_is_refused_in_the_middle_costs_only_itself(
    scripted: Start, place: str, code: int, pipelining: bool
) -> None:
    # A MAIL is asked for again on a new connection, and what came in a group in lock step, except a plain 550 to RCPT.
    again = place == "MAIL" or (pipelining and code == 550 and place != "RCPT")
    server = scripted(extensions=("PIPELINING",) * pipelining)
    server.answers[place] = [USUAL[place], *[f"{code} no\r\n".encode()] * (1 + again)]
    assert [outcome.code for outcome in send(server.port, *named(*"abcd"))] == [250, code, 250, 250]
    assert recipients(server) == "acd" and server.connections == 1 + again


@pytest.mark.parametrize("place", ["MAIL", "RCPT", "DATA", "."])
@pytest.mark.parametrize("fault", [CLOSE, b"421 enough\r\n"])
def test_a_connection_that_ends_between_two_mails_loses_none(scripted: Start, place: str, fault: bytes) -> None:
    server = scripted(answers={place: [USUAL[place], fault]})
    found = [outcome.verdict for outcome in send(server.port, *named("a", "b", "c"))]
    assert found == [SENT, SENT if place == "MAIL" else LATER, SENT]
    assert len(server.mails) == found.count(SENT) and server.connections == 2


@pytest.mark.parametrize("fault", [b"452 4.5.3 too many mails\r\n", b"421 too many mails\r\n", CLOSE])
@pytest.mark.parametrize("pipelining", [True, False])
def test_a_server_that_limits_the_mails_of_a_connection_gets_a_new_one(
    scripted: Start, fault: bytes, pipelining: bool
) -> None:
    server = scripted(extensions=("PIPELINING",) * pipelining)
    server.answers["MAIL"] = [USUAL["MAIL"], USUAL["MAIL"], fault] * 3
    assert [outcome.verdict for outcome in send(server.port, *named(*"abcdef"))] == [SENT] * 6
    assert recipients(server) == "abcdef" and server.connections == 3


@pytest.mark.parametrize("fault", [b"452 4.5.3 too many mails\r\n", b"421 go away\r\n"])
def test_a_new_connection_is_tried_once_and_then_it_is_about_us(scripted: Start, fault: bytes) -> None:
    server = scripted(answers={"MAIL": [USUAL["MAIL"], *[fault] * 9]})
    found = send(server.port, *named("a", "b"))
    assert (found[1].verdict, found[1].about_us, server.connections) == (LATER, True, 2)
    server = scripted(answers={"MAIL": fault})
    assert (send_one(server.port).about_us, server.connections) == (True, 1)


def test_a_kept_connection_that_the_server_closed_is_opened_anew(scripted: Start) -> None:
    server = scripted()
    client = SMTPClient(config(server.port))
    client.send(prepared())
    server.open[0].shutdown(2)
    assert client.send(prepared()).verdict is SENT
    client.close()
    assert server.connections == 2 and server.verbs()[-1] == "QUIT"


def test_who_stops_in_the_middle_leaves_no_mail_half_begun(scripted: Start) -> None:
    server = scripted()
    client = SMTPClient(config(server.port))
    a, b, c = named("a", "b", "c")
    assert client.send(a, lambda: b).verdict is SENT
    assert client.send(c).verdict is SENT, "another one than what was begun"
    assert client.send(a, lambda: b).verdict is SENT
    client.close()
    assert recipients(server) == "aca" and server.connections == 2


@pytest.mark.parametrize("pipelining", [True, False])
def test_trouble_with_the_next_mail_does_not_leave_the_dialogue_out_of_step(scripted: Start, pipelining: bool) -> None:
    def following() -> None:
        raise MemoryError

    server = scripted(extensions=("PIPELINING",) * pipelining)
    client = SMTPClient(config(server.port))
    a, b = named("a", "b")
    with contextlib.suppress(MemoryError):
        client.send(a, following)
    assert client.send(b).verdict is SENT
    client.close()
    assert recipients(server)[-1] == "b"


# PIPELINING that is offered and broken: lock step with this server from then on


@pytest.mark.parametrize("loses", ["command", "dot"])
def test_commands_that_are_lost_in_a_group_cost_one_timeout_and_no_mail(scripted: Start, loses: str) -> None:
    server = scripted(loses=loses)
    client = SMTPClient(config(server.port, timeout_s=PATIENCE))
    began = time.monotonic()
    assert [outcome.code for outcome in send_all(client, *named(*"abcd"))] == [250] * 4
    client.close()
    assert [outcome.code for outcome in send_all(client, *named("e"))] == [250]
    client.close()
    assert recipients(server) == "abcde" and server.connections == 3
    assert time.monotonic() - began < 4 * PATIENCE


@pytest.mark.parametrize("place", ["MAIL", "RCPT", "DATA"])
@pytest.mark.parametrize("answer", [b"503 5.5.1 bad sequence\r\n", b"hello\r\n", STALL])
def test_nonsense_to_what_came_with_the_dot_is_put_down_to_the_group(
    scripted: Start, place: str, answer: bytes
) -> None:
    server = scripted(answers={place: [USUAL[place], answer]})
    patience = PATIENCE if answer == STALL else 5.0
    assert [outcome.code for outcome in send(server.port, *named("a", "b", "c"), timeout_s=patience)] == [250] * 3
    assert recipients(server) == "abc" and server.connections == 2


def test_all_of_a_group_refused_after_a_dot_is_sent_again_in_lock_step(scripted: Start) -> None:
    server = scripted(answers={"MAIL": [USUAL["MAIL"], b"500 what\r\n"], "RCPT": [USUAL["RCPT"], b"503 MAIL first\r\n"],
                               "DATA": [USUAL["DATA"], b"503 MAIL first\r\n"]})  # fmt: skip
    assert [outcome.code for outcome in send(server.port, *named("a", "b", "c"))] == [250, 250, 250]
    assert recipients(server) == "abc" and server.connections == 2


@pytest.mark.parametrize("code", [450, 451, 452, 550, 551, 552, 553])
def test_a_proper_refusal_of_a_recipient_is_asked_for_once(scripted: Start, code: int) -> None:
    server = scripted(answers={"RCPT": [f"{code} no\r\n".encode()] * 2})
    assert send(server.port, *named("a"))[0].code == code
    assert server.verbs().count("RCPT") == 1


@pytest.mark.parametrize("answer", [CLOSE, b"421 closing\r\n"])
def test_a_dot_with_the_next_mail_that_ends_the_connection_is_sent_again_by_nobody_here(
    scripted: Start, answer: bytes
) -> None:
    server = scripted(answers={".": [answer]})
    assert [outcome.verdict for outcome in send(server.port, *named("a", "b"))] == [LATER, SENT]
    assert recipients(server) == "b"


# Time and size


def test_an_attempt_has_a_deadline_though_each_answer_comes_in_time(
    scripted: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smtp, "ATTEMPT_S", 0.3)

    def slowly(line: str) -> bytes:
        time.sleep(0.2)
        return b"250 ok\r\n"

    server = scripted(extensions=(), answers={"MAIL": slowly, "RCPT": slowly})
    began = time.monotonic()
    found = send_one(server.port)
    assert (found.verdict, found.step, found.detail) == (LATER, "rcpt", "timed out")
    assert time.monotonic() - began < 2 and not server.mails


def test_a_mail_that_is_not_read_has_a_deadline(scripted: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp, "ATTEMPT_S", 0.3)
    monkeypatch.setattr(smtp, "SLOWEST_BYTES_S", 1 << 30)
    go = threading.Event()

    def silent(line: str) -> Iterator[bytes]:
        yield b"354 go on\r\n"
        go.wait(20)

    began = time.monotonic()
    found = send_one(scripted(answers={"DATA": silent}).port, [b"x" * 70 + b"\r\n"] * 200_000, timeout_s=20.0)
    go.set()
    assert (found.verdict, found.step, found.detail) == (LATER, "dot", "timed out")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("place", ["greeting", "EHLO", "MAIL", "RCPT", "DATA"])
def test_silence_ends_with_the_timeout(scripted: Start, place: str) -> None:
    server = scripted(answers={place: STALL})
    began = time.monotonic()
    found = send_one(server.port, timeout_s=0.2)
    assert (found.verdict, found.detail) == (LATER, "timed out")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("place", ["greeting", "MAIL"])
def test_a_reply_that_trickles_or_never_ends_is_given_up_in_time(scripted: Start, place: str) -> None:
    def trickle(line: str) -> Iterator[bytes]:
        while True:
            yield b"2"
            time.sleep(0.05)

    def flood(line: str) -> Iterator[bytes]:
        while True:
            yield b"250-more\r\n" * 1000

    for way in (trickle, flood):
        server = scripted(answers={place: way})
        began = time.monotonic()
        assert send_one(server.port, timeout_s=0.3).verdict is LATER
        assert time.monotonic() - began < 2


def test_the_answer_to_the_final_dot_has_more_time(scripted: Start) -> None:
    def slowly(line: str) -> bytes:
        time.sleep(0.4)
        return b"250 taken\r\n"

    assert send_one(scripted(answers={".": slowly}).port, timeout_s=0.2).verdict is SENT


def test_connecting_is_bounded_by_the_timeout() -> None:
    silent = Silent("127.0.0.1")
    began = time.monotonic()
    found = send_one(silent.port, timeout_s=0.3)
    silent.stop()
    assert (found.verdict, found.detail, found.about_us) == (LATER, "timed out", True)
    assert time.monotonic() - began < 2


def test_nothing_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found = send_one(free.getsockname()[1])
    assert (found.verdict, found.step, found.detail, found.about_us) == (LATER, "connect", "refused", True)


def test_a_name_that_does_not_exist() -> None:
    found = send_one(25, host="nowhere.invalid")
    assert (found.verdict, found.step, found.about_us) == (LATER, "resolve", True)


# Check


def test_verify_asks_about_sender_and_recipient_and_sends_nothing(scripted: Start) -> None:
    server = scripted()
    steps: list[str] = []
    client = SMTPClient(config(server.port), lambda step, words: steps.append(step))
    assert client.verify("ann@example.com").verdict is SENT
    client.close()
    assert steps == ["resolve", "connect", "greeting", "ehlo", "sender", "recipient"]
    assert server.verbs() == ["EHLO", "MAIL", "RCPT", "QUIT"]


def test_verify_says_where_it_failed(scripted: Start) -> None:
    client = SMTPClient(config(scripted(answers={"RCPT": [b"550 5.1.1 unknown\r\n"]}).port))
    found = client.verify("ann@example.com")
    assert (found.step, found.code) == ("rcpt", 550)
    assert client.verify("bob@example.com").verdict is SENT
    client.close()
    with pytest.raises(Unavailable, match="greeting"):
        SMTPClient(config(scripted(answers={"greeting": b"554 no\r\n"}).port)).verify("ann@example.com")


def test_the_trace_shows_the_dialogue_and_masks_the_secrets(scripted: Start) -> None:
    server = scripted(extensions=("AUTH LOGIN",), answers={"AUTH": b"334 VXNlcm5hbWU6\r\n"})
    server.answers |= {"YW5U": b"334 UGFzc3dvcmQ6\r\n", "C2VJCMV0": b"235 ok\r\n"}
    lines: list[str] = []
    send_one(server.port, [PNG[:8].hex().encode() + b"\r\n"], user="ann", password=lambda: "secret", trace=lines.append)
    assert "c2VjcmV0" in server.commands and "YW5u" in server.commands
    text = "\n".join(lines)
    assert "c2VjcmV0" not in text and "YW5u" not in text and PNG[:8].hex() not in text
    for shown in ("C: EHLO", "C: AUTH LOGIN", "C: ****", "S: 235 ok", "C: MAIL FROM:<relay@example.com>",
                  "S: 250 taken", "C: QUIT"):  # fmt: skip
        assert shown in text, text
