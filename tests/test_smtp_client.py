"""One transaction against real and scripted mail servers: what was taken, by whom, and what went wrong."""

from __future__ import annotations

import base64
import hmac
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiosmtpd.smtp import AuthResult
from conftest import CLOSE, PNG, STALL, Certificates, Scripted

import smtp_module as smtp
from smtp_module import Envelope, Outcome, SMTPConfig, SMTPTransport, Unavailable, Verdict

SENT, LATER, REFUSED = Verdict.SENT, Verdict.TRY_LATER, Verdict.REFUSED
MAIL = [b"Subject: hello\r\n\r\n", b"one\r\n.two\r\n", b".\r\nthree\r\n"]
TO = ("ann@example.com",)


def config(port: int, **settings: Any) -> SMTPConfig:
    return SMTPConfig(
        **{"host": "127.0.0.1", "port": port, "sender": "relay@example.com", "timeout_s": 5.0, **settings}
    )


def deliver(port: int, *recipients: str, data: list[bytes] | None = None, **settings: Any) -> dict[str, Outcome]:
    transport = SMTPTransport(config(port, **settings))
    try:
        return next(transport.deliver([Envelope("relay@example.com", recipients or TO, data or MAIL)]))
    finally:
        transport.close()


def one(outcomes: dict[str, Outcome]) -> Outcome:
    (outcome,) = outcomes.values()
    return outcome


# real servers


def test_a_mail_arrives_byte_for_byte(mailbox: Callable[..., Any]) -> None:
    box = mailbox()
    assert one(deliver(box.port)).verdict is SENT
    (mail,) = box.mails
    assert (mail.sender, mail.recipients, mail.content) == ("relay@example.com", list(TO), b"".join(MAIL))


@pytest.mark.parametrize("length", [0, 1, 75_999, 76_000, 76_001, 300_000])
def test_mails_of_every_length_arrive_whole(mailbox: Callable[..., Any], length: int) -> None:
    box = mailbox()
    body = [b"." * 70 + b"\r\n"] * (length // 72 + 1)
    assert one(deliver(box.port, data=[b"Subject: long\r\n\r\n", *body])).verdict is SENT
    assert box.mails[0].content == b"Subject: long\r\n\r\n" + b"".join(body)


def test_a_mail_without_a_final_line_end_gets_one(mailbox: Callable[..., Any]) -> None:
    box = mailbox()
    deliver(box.port, data=[b"Subject: x\r\n\r\nend"])
    assert box.mails[0].content == b"Subject: x\r\n\r\nend\r\n"


def test_one_connection_carries_many_mails(scripted: Callable[..., Scripted]) -> None:
    server = scripted()
    transport = SMTPTransport(config(server.port))
    for _ in range(3):
        assert one(next(transport.deliver([Envelope("", TO, MAIL)]))).verdict is SENT
    transport.close()
    assert (server.connections, len(server.mails)) == (1, 3)
    assert server.verbs()[-1] == "QUIT"
    assert server.mails[0].sender == ""


@pytest.mark.parametrize("extensions", [(), ("PIPELINING",), ("PIPELINING", "8BITMIME", "SIZE 1000000")])
def test_the_dialogue_is_the_same_with_and_without_pipelining(
    scripted: Callable[..., Scripted], extensions: tuple[str, ...]
) -> None:
    server = scripted(extensions=extensions)
    envelope = Envelope("relay@example.com", TO, [b"Subject: x\r\n\r\n\xff\r\n"], eight_bit=True)
    smtp.send_now(envelope, config(server.port))
    assert server.verbs() == ["EHLO", "MAIL", "RCPT", "DATA", "QUIT"]
    size, eight = " SIZE=" in server.commands[1], " BODY=8BITMIME" in server.commands[1]
    assert (size, eight) == (len(extensions) == 3, len(extensions) == 3)


def test_helo_serves_where_ehlo_is_unknown(scripted: Callable[..., Scripted]) -> None:
    server = scripted(answers={"EHLO": b"502 what?\r\n"})
    assert one(deliver(server.port)).verdict is SENT
    assert server.verbs()[:2] == ["EHLO", "HELO"]


@pytest.mark.parametrize("security", ["ssl", "starttls"])
def test_tls_with_a_verified_certificate(
    mailbox: Callable[..., Any], certificates: Certificates, security: str
) -> None:
    box = mailbox(tls=certificates.context("good"), implicit=security == "ssl", require_starttls=security == "starttls")
    for host in ("localhost", "127.0.0.1"):
        assert one(deliver(box.port, host=host, security=security, cafile=certificates.ca)).verdict is SENT
    assert len(box.mails) == 2


@pytest.mark.parametrize("security", ["ssl", "starttls"])
@pytest.mark.parametrize(
    ("name", "words"), [("wrong", "mismatch|not valid for"), ("expired", "expired"), ("selfsigned", "self.signed")]
)
def test_a_bad_certificate_ends_the_attempt_and_never_falls_back_to_clear_text(
    scripted: Callable[..., Scripted], certificates: Certificates, security: str, name: str, words: str
) -> None:
    server = scripted(tls=certificates.context(name), extensions=("STARTTLS",), implicit=security == "ssl")
    found = one(deliver(server.port, security=security, cafile=certificates.ca, user="ann", password=lambda: "secret"))
    assert (found.verdict, found.step, found.ours) == (LATER, "tls", True)
    assert re.search(words, found.detail, re.I), found.detail
    assert set(server.verbs()) <= {"EHLO", "STARTTLS"}
    assert smtp.advice(found, "mail.example.com")


def test_an_unknown_signer_is_refused(mailbox: Callable[..., Any], certificates: Certificates) -> None:
    box = mailbox(tls=certificates.context("good"))
    found = one(deliver(box.port, security="starttls"))
    assert (found.verdict, found.step) == (LATER, "tls")
    assert box.mails == []


@pytest.mark.parametrize("answer", [b"454 not now\r\n", b"500 what?\r\n", None, b"220 go\r\n250 injected\r\n", CLOSE])
def test_starttls_stripped_or_refused_sends_nothing_in_the_clear(
    scripted: Callable[..., Scripted], answer: bytes | None
) -> None:
    server = scripted(extensions=("STARTTLS",) if answer is not None else (), answers={"STARTTLS": answer or b""})
    found = one(deliver(server.port, security="starttls", user="ann", password=lambda: "secret", timeout_s=1.0))
    assert (found.verdict, found.step, found.ours) == (LATER, "tls", True)
    assert not {"AUTH", "MAIL"} & set(server.verbs())


def authenticator(server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
    good = (data.login, data.password) == (b"ann", b"pass word")
    return AuthResult(success=good, handled=False)


@pytest.mark.parametrize(("excluded", "used"), [((), "PLAIN"), (("PLAIN",), "LOGIN")])
def test_login(mailbox: Callable[..., Any], excluded: tuple[str, ...], used: str) -> None:
    box = mailbox(
        authenticator=authenticator, auth_required=True, auth_require_tls=False, auth_exclude_mechanism=excluded
    )
    lines: list[str] = []
    found = deliver(box.port, user="ann", password=lambda: "pass word", trace=lines.append)
    assert one(found).verdict is SENT
    assert f"AUTH {used}" in "\n".join(lines)


def test_cram_md5(scripted: Callable[..., Scripted]) -> None:
    server = scripted(extensions=("AUTH CRAM-MD5 PLAIN",))
    server.answers["AUTH"] = b"334 " + base64.b64encode(b"<1@mail.test>") + b"\r\n"
    digest = hmac.new(b"secret", b"<1@mail.test>", "md5").hexdigest()
    expected = base64.b64encode(f"ann {digest}".encode()).decode()
    server.answers[expected.upper()] = b"235 welcome\r\n"
    assert one(deliver(server.port, user="ann", password=lambda: "secret")).verdict is SENT
    assert expected in server.commands


def test_xoauth2_sends_user_and_token(scripted: Callable[..., Scripted]) -> None:
    server = scripted(extensions=("AUTH LOGIN XOAUTH2",), answers={"AUTH": b"235 welcome\r\n"})
    assert (
        one(deliver(server.port, user="ann@example.com", password=lambda: "ya29.token", auth="xoauth2")).verdict is SENT
    )
    _, mechanism, response = next(line for line in server.commands if line.startswith("AUTH")).split()
    assert mechanism == "XOAUTH2"
    assert base64.b64decode(response) == b"user=ann@example.com\1auth=Bearer ya29.token\1\1"


def test_a_refused_token_is_answered_with_an_empty_line_and_the_servers_words_are_kept(
    scripted: Callable[..., Scripted],
) -> None:
    server = scripted(extensions=("AUTH XOAUTH2",))
    server.answers |= {"AUTH": b"334 eyJzdGF0dXMiOiI0MDAifQ==\r\n", "": b"535 5.7.8 not accepted\r\n"}
    found = one(deliver(server.port, user="ann", password=lambda: "old", auth="xoauth2"))
    assert (found.code, found.step, found.ours) == (535, "login", True)
    assert "not accepted" in found.detail


def test_a_wrong_password_is_about_us_and_not_shown(mailbox: Callable[..., Any]) -> None:
    box = mailbox(authenticator=authenticator, auth_required=True, auth_require_tls=False)
    lines: list[str] = []
    found = one(deliver(box.port, user="ann", password=lambda: "wrong-secret", trace=lines.append))
    assert (found.verdict, found.code, found.step, found.ours) == (LATER, 535, "login", True)
    said = "\n".join([*lines, str(found), repr(config(1, user="ann", password=lambda: "wrong-secret"))])
    assert "wrong-secret" not in said
    assert not any(base64.b64encode(text).decode()[:12] in said for text in (b"wrong-secret", b"\0ann\0wrong-secret"))


def test_a_server_without_login_says_so(scripted: Callable[..., Scripted]) -> None:
    server = scripted()
    found = one(deliver(server.port, user="ann", password=lambda: "secret"))
    assert (found.verdict, found.step, found.ours) == (LATER, "login", True)
    assert "MAIL" not in server.verbs()


def test_a_password_command_that_fails_later_is_about_us(scripted: Callable[..., Scripted]) -> None:
    def password() -> str:
        raise smtp.ConfigError("SMTP_PASS_COMMAND: failed")

    server = scripted(extensions=("AUTH PLAIN",))
    found = one(deliver(server.port, user="ann", password=password))
    assert (found.step, found.ours, found.detail) == ("login", True, "SMTP_PASS_COMMAND: failed")


# recipients one by one


@pytest.mark.parametrize("extensions", [(), ("PIPELINING",)])
def test_recipients_count_one_by_one(scripted: Callable[..., Scripted], extensions: tuple[str, ...]) -> None:
    replies = {"a@x.org": b"250 ok\r\n", "b@x.org": b"550 5.1.1 unknown\r\n", "c@x.org": b"450 4.2.0 greylisted\r\n"}
    server = scripted(extensions=extensions, answers={"RCPT": lambda line: replies[line[9:-1]]})
    outcomes = deliver(server.port, *replies)
    assert {name: outcome.verdict for name, outcome in outcomes.items()} == {
        "a@x.org": SENT, "b@x.org": REFUSED, "c@x.org": LATER,
    }  # fmt: skip
    assert server.mails[0].recipients == ["a@x.org"]


@pytest.mark.parametrize("extensions", [(), ("PIPELINING",)])
@pytest.mark.parametrize("data", [b"554 no valid recipients\r\n", b"354 go on anyway\r\n"])
def test_when_nobody_is_taken_nothing_is_sent_and_the_connection_serves_on(
    scripted: Callable[..., Scripted], extensions: tuple[str, ...], data: bytes
) -> None:
    server = scripted(extensions=extensions, answers={"RCPT": [b"550 5.1.1 unknown\r\n"], "DATA": [data]})
    if not extensions:
        server.answers["DATA"] = []  # it is never asked
    transport = SMTPTransport(config(server.port))
    assert one(next(transport.deliver([Envelope("", TO, MAIL)]))).verdict is REFUSED
    assert one(next(transport.deliver([Envelope("", TO, MAIL)]))).verdict is SENT
    transport.close()
    assert len(server.mails) == 1 and server.connections == 1
    assert ("RSET" in server.verbs()) != (bool(extensions) and data.startswith(b"354"))  # else the dot has ended it


# every place where a server can say no


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize("code", ["450", "550"])
@pytest.mark.parametrize(
    ("place", "step", "ours"),
    [
        ("greeting", "greeting", True), ("EHLO", "ehlo", True), ("STARTTLS", "tls", True), ("AUTH", "login", True),
        ("MAIL", "mail", True), ("RCPT", "rcpt", False), ("DATA", "data", False), (".", "dot", False),
    ],
)  # fmt: skip
def test_the_verdict_for_a_no_at_every_place(  # noqa: PLR0917
    scripted: Callable[..., Scripted], place: str, step: str, ours: bool, code: str, pipelining: bool
) -> None:
    names = ("PIPELINING",) * pipelining
    server = scripted(extensions=(*names, "STARTTLS", "AUTH PLAIN"), answers={place: f"{code} no\r\n".encode()})
    if place == "EHLO":
        server.answers["HELO"] = f"{code} no\r\n".encode()
    settings = {"security": "starttls"} if place == "STARTTLS" else {"user": "ann", "password": lambda: "secret"}
    found = one(deliver(server.port, **settings))
    refused = code == "550" and not ours
    assert (found.verdict, found.code, found.step, found.ours) == (REFUSED if refused else LATER, int(code), step, ours)
    assert server.mails == []


@pytest.mark.parametrize("place", ["greeting", "EHLO", "MAIL", "RCPT", "DATA", "."])
@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize(
    "answer",
    [CLOSE, b"hello\r\n", b"\x15\x03\x01\x00\x02\x02\x28\r\n", b"2\r\n", b"\0" * 50 + b"\r\n", b"999 what\r\n"],
)
def test_what_is_no_answer_is_a_later(
    scripted: Callable[..., Scripted], place: str, answer: bytes, pipelining: bool
) -> None:
    server = scripted(extensions=("PIPELINING",) * pipelining, answers={place: answer, "HELO": answer})
    found = one(deliver(server.port))
    assert found.verdict is LATER
    assert found.ours == (place in ("greeting", "EHLO", "MAIL"))


def test_421_on_a_kept_connection_is_tried_once_more_on_a_new_one(scripted: Callable[..., Scripted]) -> None:
    server = scripted(answers={"MAIL": [b"250 ok\r\n", b"421 too many mails on this connection\r\n"]})
    transport = SMTPTransport(config(server.port))
    assert one(next(transport.deliver([Envelope("", TO, MAIL)]))).verdict is SENT
    assert one(next(transport.deliver([Envelope("", TO, MAIL)]))).verdict is SENT
    transport.close()
    assert (server.connections, len(server.mails)) == (2, 2)


def test_a_kept_connection_that_the_server_closed_is_opened_anew(scripted: Callable[..., Scripted]) -> None:
    server = scripted()
    transport = SMTPTransport(config(server.port))
    next(transport.deliver([Envelope("", TO, MAIL)]))
    server.open[0].shutdown(2)
    assert one(next(transport.deliver([Envelope("", TO, MAIL)]))).verdict is SENT
    transport.close()
    assert server.connections == 2


def test_a_server_that_refuses_the_sender_and_hangs_up_has_said_enough(scripted: Callable[..., Scripted]) -> None:
    server = scripted(answers={"MAIL": b"550 5.7.1 not you\r\n", "RCPT": CLOSE})
    found = one(deliver(server.port))
    assert (found.verdict, found.code, found.step, found.ours) == (LATER, 550, "mail", True)


def test_421_on_a_new_connection_is_not_tried_for_ever(scripted: Callable[..., Scripted]) -> None:
    server = scripted(answers={"MAIL": b"421 go away\r\n"})
    found = one(deliver(server.port))
    assert (found.verdict, found.code, found.ours) == (LATER, 421, True)
    assert server.connections == 1


@pytest.mark.parametrize("security", ["none", "ssl"])
def test_a_connection_dropped_in_the_mail_is_a_later(
    scripted: Callable[..., Scripted], certificates: Certificates, security: str
) -> None:
    for hears in (0, 1, 100_000):
        server = scripted(hears=hears, tls=certificates.context("good"), implicit=security == "ssl")
        data = [b"x" * 70 + b"\r\n"] * 100_000
        found = one(deliver(server.port, data=data, security=security, cafile=certificates.ca))
        assert (found.verdict, found.step, found.ours) == (LATER, "dot", False)


@pytest.mark.parametrize("security", ["none", "ssl"])
def test_a_reply_in_the_middle_of_the_mail_is_heard(
    scripted: Callable[..., Scripted], certificates: Certificates, security: str
) -> None:
    def refuse(line: str) -> bytes:
        return b"354 go on\r\n552 5.3.4 too big\r\n"

    tls = certificates.context("good")
    server = scripted(answers={"DATA": refuse}, hears=200_000, tls=tls, implicit=security == "ssl")
    data = [b"x" * 70 + b"\r\n"] * 200_000
    found = one(deliver(server.port, data=data, security=security, cafile=certificates.ca))
    assert (found.code, found.too_big) == (552, True)


def test_the_dot_taken_but_not_answered_is_a_later(scripted: Callable[..., Scripted]) -> None:
    server = scripted(answers={".": CLOSE})
    found = one(deliver(server.port))
    assert (found.verdict, found.step) == (LATER, "dot")


def test_whatever_quit_is_answered_the_mail_counts_as_sent(scripted: Callable[..., Scripted]) -> None:
    for answer in (CLOSE, b"500 no\r\n", b"garbage\r\n"):
        assert one(deliver(scripted(answers={"QUIT": answer}).port)).verdict is SENT


# many mails over one connection


def letters(*names: str) -> list[Envelope]:
    return [Envelope("relay@example.com", (f"{name}@example.com",), [b"Subject: %b\r\n\r\nx\r\n" % name.encode()])
            for name in names]  # fmt: skip


def deliver_all(port: int, *names: str, **settings: Any) -> list[Outcome]:
    transport = SMTPTransport(config(port, **settings))
    try:
        return [one(outcomes) for outcomes in transport.deliver(letters(*names))]
    finally:
        transport.close()


@pytest.mark.parametrize("pipelining", [True, False])
def test_many_mails_go_in_order_over_one_connection(scripted: Callable[..., Scripted], pipelining: bool) -> None:
    server = scripted(extensions=("PIPELINING",) * pipelining)
    assert [outcome.code for outcome in deliver_all(server.port, "a", "b", "c")] == [250, 250, 250]
    assert [(mail.recipients, mail.content) for mail in server.mails] == [
        ([f"{name}@example.com"], b"Subject: %b\r\n\r\nx\r\n" % name.encode()) for name in "abc"
    ]
    assert server.verbs() == ["EHLO", *["MAIL", "RCPT", "DATA"] * 3, "QUIT"] and server.connections == 1


def test_the_next_mail_begins_in_the_packet_of_the_dot_only_where_that_is_allowed(
    scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    for extensions, early in ((("PIPELINING",), 2), ((), 0)):
        packets: list[bytes] = []
        real = smtp.Dialogue.write

        def write(self: smtp.Dialogue, pieces: Any, real: Any = real, packets: list[bytes] = packets) -> None:
            packets.append(b"".join(pieces))
            real(self, pieces)

        monkeypatch.setattr(smtp.Dialogue, "write", write)
        deliver_all(scripted(extensions=extensions).port, "a", "b", "c")
        monkeypatch.setattr(smtp.Dialogue, "write", real)
        assert sum(b"\r\n.\r\nMAIL FROM" in packet for packet in packets) == early


def test_the_mail_after_the_next_is_made_while_the_server_works(scripted: Callable[..., Scripted]) -> None:
    made: list[str] = []
    seen: list[int] = []

    def envelopes() -> Iterator[Envelope]:
        for envelope in letters("a", "b", "c", "d"):
            made.append(envelope.recipients[0])
            yield envelope

    server = scripted()
    transport = SMTPTransport(config(server.port))
    for _ in transport.deliver(envelopes()):
        seen.append(len(made))
    transport.close()
    assert seen == [3, 4, 4, 4]


@pytest.mark.parametrize("place", ["MAIL", "RCPT", "DATA", "."])
def test_what_is_refused_in_the_middle_costs_only_itself(scripted: Callable[..., Scripted], place: str) -> None:
    usual = {"MAIL": b"250 ok\r\n", "RCPT": b"250 ok\r\n", "DATA": b"354 go\r\n", ".": b"250 ok\r\n"}[place]
    server = scripted(answers={place: [usual, b"550 5.7.1 no\r\n"]})
    assert [outcome.code for outcome in deliver_all(server.port, "a", "b", "c", "d")] == [250, 550, 250, 250]
    assert [mail.recipients for mail in server.mails] == [["a@example.com"], ["c@example.com"], ["d@example.com"]]
    assert server.connections == 1


@pytest.mark.parametrize("place", ["MAIL", "RCPT", "DATA", "."])
@pytest.mark.parametrize("fault", [CLOSE, b"421 enough\r\n"])
def test_a_connection_that_ends_between_two_mails_loses_none(
    scripted: Callable[..., Scripted], place: str, fault: bytes
) -> None:
    usual = {"MAIL": b"250 ok\r\n", "RCPT": b"250 ok\r\n", "DATA": b"354 go\r\n", ".": b"250 ok\r\n"}[place]
    server = scripted(answers={place: [usual, fault]})
    found = [outcome.verdict for outcome in deliver_all(server.port, "a", "b", "c")]
    assert found == [SENT, SENT if place == "MAIL" else LATER, SENT]
    assert len(server.mails) == found.count(SENT) and server.connections == 2


def test_a_server_that_loses_what_comes_with_the_dot_is_no_longer_hurried(scripted: Callable[..., Scripted]) -> None:
    server = scripted(swallows=1)
    found = deliver_all(server.port, "a", "b", "c", "d", timeout_s=0.3)
    assert [outcome.code for outcome in found] == [250] * 4
    assert [mail.recipients[0][0] for mail in server.mails] == ["a", "b", "c", "d"]
    assert server.connections == 2


@pytest.mark.parametrize("pipelining", [True, False])
def test_trouble_with_the_next_mail_comes_after_the_outcome_of_this_one(
    scripted: Callable[..., Scripted], pipelining: bool
) -> None:
    server = scripted(extensions=("PIPELINING",) * pipelining)

    def envelopes() -> Iterator[Envelope]:
        yield from letters("a", "b")
        raise MemoryError

    transport = SMTPTransport(config(server.port))
    delivering = transport.deliver(envelopes())
    assert [one(next(delivering)).verdict for _ in "ab"] == [SENT, SENT]
    with pytest.raises(MemoryError):
        next(delivering)
    assert [one(outcomes).verdict for outcomes in transport.deliver(letters("c"))] == [SENT]
    transport.close()
    assert [mail.recipients[0][0] for mail in server.mails] == ["a", "b", "c"]


def test_a_server_out_of_step_after_the_dot_is_no_longer_hurried(scripted: Callable[..., Scripted]) -> None:
    server = scripted(answers={"MAIL": [b"250 ok\r\n", b"500 what\r\n"], "RCPT": [b"250 ok\r\n", b"503 MAIL first\r\n"],
                               "DATA": [b"354 go\r\n", b"503 MAIL first\r\n"]})  # fmt: skip
    assert [outcome.code for outcome in deliver_all(server.port, "a", "b", "c")] == [250, 250, 250]
    assert [mail.recipients[0][0] for mail in server.mails] == ["a", "b", "c"]
    assert server.connections == 2


@pytest.mark.parametrize(("place", "answer"), [("DATA", b"250 ok\r\n"), (".", b"354 what\r\n")])
def test_an_answer_that_does_not_belong_there_is_a_later_and_ends_the_connection(
    scripted: Callable[..., Scripted], place: str, answer: bytes
) -> None:
    server = scripted(answers={place: [answer]})
    assert [outcome.verdict for outcome in deliver_all(server.port, "a", "b")] == [LATER, SENT]
    assert server.connections == 2


def test_who_stops_in_the_middle_leaves_no_mail_half_begun(scripted: Callable[..., Scripted]) -> None:
    server = scripted()
    transport = SMTPTransport(config(server.port))
    delivering = transport.deliver(letters("a", "b", "c"))
    assert one(next(delivering)).verdict is SENT
    delivering.close()  # type: ignore[attr-defined]
    assert [one(outcomes).verdict for outcomes in transport.deliver(letters("d"))] == [SENT]
    transport.close()
    assert [mail.recipients[0][0] for mail in server.mails] == ["a", "d"]
    assert server.connections == 2


@pytest.mark.parametrize("pipelining", [True, False])
def test_a_mail_that_is_not_wanted_when_its_turn_comes_is_left_out(
    scripted: Callable[..., Scripted], pipelining: bool
) -> None:
    server = scripted(extensions=("PIPELINING",) * pipelining)
    answers = iter((True, False, True, False))
    transport = SMTPTransport(config(server.port))
    found = [len(outcomes) for outcomes in transport.deliver(letters("a", "b", "c", "d"), lambda: next(answers))]
    transport.close()
    assert found == [1, 0, 1, 0]
    assert [mail.recipients[0][0] for mail in server.mails] == ["a", "c"]


def test_a_mail_too_big_for_the_server_is_not_begun(scripted: Callable[..., Scripted]) -> None:
    server = scripted(extensions=("PIPELINING", "SIZE 1000"))
    big = Envelope("", TO, [b"x" * 900 + b"\r\n", b"y" * 900 + b"\r\n"])
    transport = SMTPTransport(config(server.port))
    found = [one(outcomes) for outcomes in transport.deliver([*letters("a"), big, *letters("c")])]
    transport.close()
    assert [(outcome.code, outcome.too_big) for outcome in found] == [(250, False), (552, True), (250, False)]
    assert len(server.mails) == 2 and server.connections == 1


# time and size


def test_an_attempt_has_a_deadline_though_each_answer_comes_in_time(
    scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smtp, "ATTEMPT_S", 0.3)

    def slowly(line: str) -> bytes:
        time.sleep(0.05)
        return b"250 ok\r\n"

    server = scripted(answers={"RCPT": slowly})
    began = time.monotonic()
    found = deliver(server.port, *(f"u{number}@example.com" for number in range(50)))
    assert {(outcome.verdict, outcome.step, outcome.detail) for outcome in found.values()} == {(LATER, "rcpt", "timed out")}
    assert time.monotonic() - began < 2 and not server.mails


def test_a_mail_that_is_not_read_has_a_deadline(
    scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smtp, "ATTEMPT_S", 0.3)
    monkeypatch.setattr(smtp, "SLOWEST_BYTES_S", 1 << 30)
    go = threading.Event()

    def silent(line: str) -> Iterator[bytes]:
        yield b"354 go on\r\n"
        go.wait(20)

    began = time.monotonic()
    found = one(deliver(scripted(answers={"DATA": silent}).port, data=[b"x" * 70 + b"\r\n"] * 500_000, timeout_s=20.0))
    go.set()
    assert (found.verdict, found.step, found.detail) == (LATER, "dot", "timed out")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("place", ["greeting", "EHLO", "MAIL", "RCPT", "DATA"])
def test_silence_ends_with_the_timeout(scripted: Callable[..., Scripted], place: str) -> None:
    server = scripted(answers={place: STALL})
    began = time.monotonic()
    found = one(deliver(server.port, timeout_s=0.2))
    assert (found.verdict, found.detail) == (LATER, "timed out")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("place", ["greeting", "MAIL"])
def test_a_reply_that_trickles_or_never_ends_is_given_up_in_time(scripted: Callable[..., Scripted], place: str) -> None:
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
        assert one(deliver(server.port, timeout_s=0.4)).verdict is LATER
        assert time.monotonic() - began < 2


def test_the_answer_to_the_final_dot_has_more_time(scripted: Callable[..., Scripted]) -> None:
    def slowly(line: str) -> bytes:
        time.sleep(0.6)
        return b"250 taken\r\n"

    assert one(deliver(scripted(answers={".": slowly}).port, timeout_s=0.2)).verdict is SENT


def test_connecting_is_bounded_by_the_timeout() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        filled = [socket.socket() for _ in range(4)]
        for sock in filled:
            sock.setblocking(False)
            sock.connect_ex(deaf.getsockname())
        began = time.monotonic()
        found = one(deliver(deaf.getsockname()[1], timeout_s=0.3))
        for sock in filled:
            sock.close()
    assert (found.verdict, found.detail, found.ours) == (LATER, "timed out", True)
    assert time.monotonic() - began < 2


def test_nothing_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found = one(deliver(free.getsockname()[1]))
    assert (found.verdict, found.step, found.detail, found.ours) == (LATER, "connect", "refused", True)


def test_a_name_that_does_not_exist() -> None:
    found = one(deliver(25, host="nowhere.invalid"))
    assert (found.verdict, found.step, found.ours) == (LATER, "resolve", True)


def test_a_mail_beyond_the_servers_size_is_not_even_tried(scripted: Callable[..., Scripted]) -> None:
    server = scripted(extensions=("SIZE 100",))
    found = one(deliver(server.port, data=[b"x" * 98 + b"\r\n", b"\r\n"]))
    assert (found.verdict, found.too_big, found.ours) == (REFUSED, True, False)
    assert "MAIL" not in server.verbs()


@pytest.mark.parametrize("size", ["SIZE", "SIZE 0", "SIZE x", "SIZE " + "9" * 5000])
def test_a_size_without_a_limit_limits_nothing(scripted: Callable[..., Scripted], size: str) -> None:
    assert one(deliver(scripted(extensions=(size,)).port)).verdict is SENT


# check


def test_verify_asks_about_sender_and_recipient_and_sends_nothing(scripted: Callable[..., Scripted]) -> None:
    server = scripted()
    steps: list[str] = []
    transport = SMTPTransport(config(server.port), lambda step, words: steps.append(step))
    assert transport.verify("ann@example.com").verdict is SENT
    transport.close()
    assert steps == ["resolve", "connect", "greeting", "ehlo", "sender", "recipient"]
    assert server.verbs() == ["EHLO", "MAIL", "RCPT", "QUIT"]


def test_verify_says_where_it_failed(scripted: Callable[..., Scripted]) -> None:
    server = scripted(answers={"RCPT": b"550 5.1.1 unknown\r\n"})
    transport = SMTPTransport(config(server.port))
    found = transport.verify("ann@example.com")
    assert (found.step, found.code) == ("rcpt", 550)
    transport.close()
    with pytest.raises(Unavailable, match="greeting"):
        SMTPTransport(config(scripted(answers={"greeting": b"554 no\r\n"}).port)).verify()


def test_the_trace_shows_the_dialogue_and_masks_the_secrets(scripted: Callable[..., Scripted]) -> None:
    server = scripted(extensions=("AUTH LOGIN",), answers={"AUTH": b"334 UGFzc3dvcmQ6\r\n"})
    server.answers["C2VJCMV0"] = b"235 ok\r\n"
    lines: list[str] = []
    deliver(
        server.port, user="ann", password=lambda: "secret", trace=lines.append, data=[PNG[:8].hex().encode() + b"\r\n"]
    )
    text = "\n".join(lines)
    assert "c2VjcmV0" not in text and "YW5u" not in text
    for shown in (
        "C: EHLO",
        "C: AUTH LOGIN ****",
        "S: 235 ok",
        "C: MAIL FROM:<relay@example.com>",
        "S: 250 taken",
        "C: QUIT",
    ):
        assert shown.lower() in text.lower(), text
