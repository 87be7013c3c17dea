"""What becomes of a mail: from a step and a reply code to a verdict, to the next state, and to advice for a person."""

from __future__ import annotations

import errno
import smtplib
import socket
import ssl

import pytest

from smtp_module import FAILED, FROZEN, SENT, Mail, Outcome, Verdict, conclude, judge, judge_error

YES, LATER, NO = Verdict.SENT, Verdict.TRY_LATER, Verdict.REFUSED
OURS = ("resolve", "connect", "tls", "greeting", "ehlo", "login", "mail")


@pytest.mark.parametrize("step", [*OURS, "rcpt", "data", "dot"])
@pytest.mark.parametrize("code", [-1, 0, 100, 199, 400, 421, 450, 451, 452, 499, 500, 550, 554, 599, 600, 999])
def test_a_no_at_any_step(step: str, code: int) -> None:
    found = judge(step, code, "words")
    ours = step in OURS
    assert found.verdict is (NO if 500 <= code < 600 and not ours else LATER)
    assert (found.ours, found.too_big) == (ours, False)


@pytest.mark.parametrize("code", [200, 220, 235, 250, 251, 252, 354])
def test_a_yes(code: int) -> None:
    assert judge("rcpt", code, b"ok").verdict is YES


@pytest.mark.parametrize(
    ("step", "code", "words", "verdict", "ours", "too_big"),
    [
        ("rcpt", 530, "5.7.0 Must issue a STARTTLS command first", LATER, True, False),
        ("dot", 535, "5.7.8", LATER, True, False),
        ("data", 534, "5.7.9 application-specific password required", LATER, True, False),
        ("dot", 550, "5.4.5 Daily user sending quota exceeded", LATER, True, False),
        ("rcpt", 550, "5.4.5 Daily SMTP relay limit exceeded", LATER, True, False),
        ("rcpt", 452, "4.5.3 too many recipients", LATER, False, False),
        ("rcpt", 552, "too many recipients", LATER, False, False),
        ("rcpt", 552, "5.2.2 mailbox full", NO, False, False),
        ("dot", 552, "5.2.2 mailbox full", NO, False, False),
        ("rcpt", 552, "5.3.4 message too big", NO, False, True),
        ("mail", 552, "message size exceeds fixed limit", NO, False, True),
        ("mail", 552, "5.3.4 too big", NO, False, True),
        ("dot", 552, "5.3.4 too big", NO, False, True),
        ("dot", 552, "too big", NO, False, True),
        ("data", 554, "5.3.4 message too big for system", NO, False, True),
        ("dot", 523, "5.3.4 the message is too big", NO, False, True),
        ("dot", 550, "5.7.1 spam", NO, False, False),
        ("dot", 550, "see 5.4.5 of the manual", NO, False, False),
        ("greeting", 554, "5.7.1 no", LATER, True, False),
    ],
)
def test_special_codes(  # noqa: PLR0917
    step: str, code: int, words: str, verdict: Verdict, ours: bool, too_big: bool
) -> None:
    found = judge(step, code, words)
    assert (found.verdict, found.ours, found.too_big) == (verdict, ours, too_big)


def test_a_reply_is_one_harmless_line() -> None:
    assert judge("rcpt", 550, b"5.1.1 a\r\n5.1.1 b\x1b[31m \xff").detail == "5.1.1 a 5.1.1 b\\x1b[31m \ufffd"
    assert len(judge("rcpt", 550, b"x" * 60_000).detail) < 400


@pytest.mark.parametrize(
    ("step", "error", "where", "words"),
    [
        ("connect", TimeoutError(), "connect", "timed out"),
        ("connect", ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "connect", "refused"),
        ("connect", OSError(errno.ENETUNREACH, "Network is unreachable"), "connect", "Network is unreachable"),
        ("resolve", socket.gaierror(-2, "Name or service not known"), "resolve", "name not found"),
        ("mail", BrokenPipeError(), "mail", "closed the connection"),
        ("dot", smtplib.SMTPServerDisconnected("x"), "dot", "closed the connection"),
        ("dot", TimeoutError(), "dot", "timed out"),
        ("tls", ssl.SSLError(1, "made by hand"), "tls", "made by hand"),
        ("tls", ssl.SSLZeroReturnError(), "tls", ""),
        ("dot", ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), "dot", "closed the connection"),
        (
            "login",
            smtplib.SMTPNotSupportedError("SMTP AUTH extension not supported by server."),
            "login",
            "not supported",
        ),
        ("login", UnicodeEncodeError("ascii", "ü", 0, 1, "x"), "login", "ascii"),
        ("ehlo", smtplib.SMTPHeloError(502, b"what?"), "ehlo", "what?"),
        ("dot", smtplib.SMTPResponseException(-1, "garbage"), "dot", "garbage"),
    ],
)
def test_every_error_is_a_later_with_words(step: str, error: Exception, where: str, words: str) -> None:
    found = judge_error(step, error)
    assert (found.verdict, found.step, found.ours) == (LATER, where, where in OURS)
    assert words in found.detail


# the next state of a mail

MAIL = Mail(1, "alert", (1,), ("a@x", "b@x"))


def after(mail: Mail, *outcomes: Outcome, delay: float = 10.0, max_age: float = 100.0) -> Mail:
    return conclude(mail, dict(zip(mail.recipients, outcomes, strict=True)), 1000.0, delay, max_age)


def test_sent_to_all() -> None:
    found = after(MAIL, judge("dot", 250, ""), judge("dot", 250, ""))
    assert (found.state, found.recipients, found.taken, found.error, found.tries) == (SENT, (), ("a@x", "b@x"), None, 1)


def test_some_now_some_later_some_never() -> None:
    first = after(MAIL, judge("dot", 250, ""), judge("rcpt", 450, "busy"))
    assert (first.state, first.next, first.recipients, first.taken) == (FROZEN, 1010.0, ("b@x",), ("a@x",))
    second = after(first, judge("rcpt", 550, "gone"))
    assert (second.state, second.refused, second.taken) == (FAILED, {"b@x": "rcpt: 550 gone"}, ("a@x",))
    assert second.error == "b@x: rcpt: 550 gone"


def test_given_up_when_its_own_delays_add_up_to_its_life() -> None:
    mail = MAIL
    for _ in range(10):
        mail = after(mail, *[judge("rcpt", 450, "busy")] * 2)
        assert mail.state == FROZEN
    mail = after(mail, *[judge("rcpt", 450, "busy")] * 2)
    assert mail.state == FAILED and "given up after 11 tries" in mail.refused["a@x"]


def test_too_big_goes_at_once_and_bare_and_then_is_a_refusal() -> None:
    first = after(MAIL, judge("dot", 250, ""), judge("dot", 552, ""))
    assert (first.state, first.next, first.bare, first.recipients) == (FROZEN, 1000.0, True, ("b@x",))
    second = after(first, judge("dot", 552, ""))
    assert (second.state, second.taken) == (FAILED, ("a@x",))


def test_nobody_left() -> None:
    assert conclude(MAIL, {}, 1000.0, 10.0, 100.0).state == SENT
