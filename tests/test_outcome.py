"""What becomes of a delivery: from a step and a reply to an outcome, to its next state, and to advice for a person."""

from __future__ import annotations

import errno
import socket
import ssl
from typing import Any

import pytest

import smtp_module as smtp
from smtp_module import DAY_S, Delivery, Outcome, ReplyError, RetryRules, Verdict, after_attempt, judge, judge_error

SENT, LATER, REFUSED = Verdict.SENT, Verdict.TRY_LATER, Verdict.REFUSED
ABOUT_US = ("resolve", "connect", "tls", "greeting", "ehlo", "login", "mail")


@pytest.mark.parametrize("step", [*ABOUT_US, "rcpt", "data", "dot"])
@pytest.mark.parametrize("code", [-1, 0, 100, 199, 400, 421, 450, 451, 452, 499, 500, 550, 554, 599, 600, 999])
def test_a_no_is_a_refusal_only_as_a_5xx_after_mail(step: str, code: int) -> None:
    found = judge(step, code, "words")
    about_us = step in ABOUT_US
    assert found.verdict is (REFUSED if 500 <= code < 600 and not about_us else LATER)
    assert (found.about_us, found.too_big) == (about_us, False)


@pytest.mark.parametrize("code", [200, 220, 235, 250, 251, 252, 354])
def test_a_yes_is_sent(code: int) -> None:
    assert judge("rcpt", code, "ok").verdict is SENT


@pytest.mark.parametrize(
    ("step", "code", "words", "verdict", "about_us", "too_big"),
    [
        ("rcpt", 530, "5.7.0 Must issue a STARTTLS command first", LATER, True, False),
        ("dot", 535, "5.7.8", LATER, True, False),
        ("data", 534, "5.7.9 application-specific password required", LATER, True, False),
        ("dot", 550, "5.4.5 Daily user sending quota exceeded", LATER, True, False),
        ("rcpt", 550, "5.4.5 Daily SMTP relay limit exceeded", LATER, True, False),
        ("dot", 550, "see 5.4.5 of the manual", REFUSED, False, False),
        ("rcpt", 452, "4.5.3 too many recipients", LATER, False, False),
        ("rcpt", 552, "too many recipients", LATER, False, False),
        ("rcpt", 552, "5.2.2 mailbox full", REFUSED, False, False),
        ("dot", 552, "5.2.2 mailbox full", REFUSED, False, False),
        ("rcpt", 552, "5.3.4 message too big", REFUSED, False, True),
        ("mail", 552, "message size exceeds fixed limit", REFUSED, False, True),
        ("dot", 552, "too big", REFUSED, False, True),
        ("data", 554, "5.3.4 message too big for system", REFUSED, False, True),
        ("dot", 523, "5.3.4 the message is too big", REFUSED, False, True),
        ("dot", 550, "5.7.1 spam", REFUSED, False, False),
        ("greeting", 554, "5.7.1 no", LATER, True, False),
        # What is about us in words alone is judged as it stands: three in a row pause the recipient.
        ("rcpt", 553, "5.7.1 Sender address rejected: not owned by user", REFUSED, False, False),
        ("rcpt", 554, "5.7.1 Client host blocked using zen.spamhaus.org", REFUSED, False, False),
        ("dot", 550, "5.7.1 has exceeded its 24-hour sending limit", REFUSED, False, False),
    ],
)
def test_codes_that_mean_more_than_their_first_digit(  # noqa: PLR0917
    step: str, code: int, words: str, verdict: Verdict, about_us: bool, too_big: bool
) -> None:
    found = judge(step, code, words)
    assert (found.verdict, found.about_us, found.too_big) == (verdict, about_us, too_big)


def test_a_reply_becomes_one_harmless_line() -> None:
    assert judge("rcpt", 550, "5.1.1 a\r\n5.1.1 b\x1b[31m").detail == "5.1.1 a 5.1.1 b\\x1b[31m"
    assert len(judge("rcpt", 550, "x" * 60_000).detail) < 400


@pytest.mark.parametrize(
    ("step", "error", "where", "words"),
    [
        ("connect", TimeoutError(), "connect", "timed out"),
        ("connect", ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "connect", "refused"),
        ("connect", OSError(errno.ENETUNREACH, "Network is unreachable"), "connect", "Network is unreachable"),
        ("resolve", socket.gaierror(-2, "Name or service not known"), "resolve", "name not found"),
        ("mail", BrokenPipeError(), "mail", "closed the connection"),
        ("dot", ConnectionResetError("closed"), "dot", "closed the connection"),
        ("dot", TimeoutError(), "dot", "timed out"),
        ("tls", ssl.SSLError(1, "made by hand"), "tls", "made by hand"),
        ("tls", ssl.SSLZeroReturnError(), "tls", ""),
        ("dot", ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), "dot", "closed the connection"),
        ("login", ReplyError(-1, "no suitable login"), "login", "no suitable login"),
        ("login", UnicodeEncodeError("ascii", "\xfc", 0, 1, "x"), "login", "ascii"),
        ("ehlo", ReplyError(502, "what?"), "ehlo", "what?"),
        ("rcpt", ReplyError(421, "closing"), "rcpt", "closing"),
        ("dot", ReplyError(-1, "not an SMTP reply"), "dot", "not an SMTP reply"),
    ],
)
def test_every_error_is_a_later_with_words(step: str, error: Exception, where: str, words: str) -> None:
    found = judge_error(step, error)
    assert (found.verdict, found.step, found.about_us) == (LATER, where, where in ABOUT_US)
    assert words in found.detail


# The delivery after an attempt. The table's times are seconds since its first try, which failed at 0.

START = 1_700_000_000.0
RULES = RetryRules(first=10.0, longest=3600.0, max_age=5 * DAY_S, refused_after=DAY_S)
YES = judge("dot", 250, "taken")
LATER_AT_RCPT, LATER_AT_DOT = judge("rcpt", 450, "4.2.0 busy"), judge("dot", 451, "4.7.1 greylisted")
NO_AT_RCPT, NO_AT_DOT = judge("rcpt", 550, "5.1.1 unknown"), judge("dot", 554, "5.7.1 no")
CUT, SILENT = judge_error("dot", ConnectionResetError()), judge_error("dot", TimeoutError())
TOO_BIG = judge("dot", 552, "5.3.4 too big")
BEYOND_SIZE = Outcome(REFUSED, 552, "5.3.4 9000000 bytes", "mail", too_big=True, size_limit=1_000_000)


def after(*outcomes: Outcome, at: float = 0.0, accepted: float = -1.0, rules: RetryRules = RULES, **how: Any) -> Delivery:
    """The delivery after these outcomes, the last of them at `at`; the server accepted another one at `accepted`."""
    found = Delivery(1, "alert", (1,), "a@x", ("a@x", "b@x"))
    for number, outcome in enumerate(outcomes, 1):
        now = START + (at if number == len(outcomes) else 0.0)
        found = after_attempt(found, outcome, now, rules, accepted_at=START + accepted, **how)
    return found


def test_a_delivery_that_was_accepted_is_sent() -> None:
    found = after(LATER_AT_RCPT, YES, at=60.0)
    assert (found.state, found.tries, found.tried_at) == ("sent", 2, START + 60.0)


@pytest.mark.parametrize(
    ("outcome", "tries", "shortest", "longest"),
    [
        (LATER_AT_RCPT, 1, 8, 10), (LATER_AT_RCPT, 2, 16, 20), (LATER_AT_RCPT, 4, 64, 80), (LATER_AT_RCPT, 20, 2880, 3600),
        (NO_AT_RCPT, 1, 300, 300), (NO_AT_RCPT, 20, 2880, 3600),  # A refused one is not tried before 5 minutes.
        (CUT, 1, 8, 10), (SILENT, 1, 8, 10), (CUT, 2, 3600, 3600), (SILENT, 2, 3600, 3600),  # The server may have it.
    ],
)  # fmt: skip
def test_the_next_try_waits(outcome: Outcome, tries: int, shortest: float, longest: float) -> None:
    found = after(*[outcome] * tries)
    assert (found.state, found.tries, found.error) == ("open", tries, str(outcome))
    assert shortest <= found.next_try - START <= longest


def test_a_probe_costs_no_try() -> None:
    assert after(LATER_AT_RCPT, probe=True).tries == 0


LIFETIMES = [
    # outcomes, seconds since the first failure, when the server accepted another one, state
    ([NO_AT_RCPT] * 2, DAY_S, 1.0, "failed"),
    ([NO_AT_RCPT] * 2, DAY_S - 1, 1.0, "open"),  # ALERT_REFUSED_AFTER is not over.
    ([NO_AT_RCPT] * 2, 30 * DAY_S, -1.0, "open"),  # Nothing was accepted since: nothing ages.
    ([LATER_AT_RCPT] * 2, 5 * DAY_S, 1.0, "failed"),
    ([LATER_AT_RCPT] * 2, 5 * DAY_S - 1, 1.0, "open"),
    ([LATER_AT_RCPT] * 2, 30 * DAY_S, -1.0, "open"),
    ([LATER_AT_RCPT, NO_AT_RCPT], DAY_S, 1.0, "failed"),
    ([NO_AT_RCPT, LATER_AT_RCPT], DAY_S, 1.0, "open"),
    ([SILENT] * 2, 5 * DAY_S, 1.0, "failed"),
    ([NO_AT_RCPT], 0.0, 1.0, "open"),
]


@pytest.mark.parametrize(("outcomes", "at", "accepted", "state"), LIFETIMES)
def test_a_delivery_fails_only_when_its_time_is_over_and_another_was_accepted_since(
    outcomes: list[Outcome], at: float, accepted: float, state: str
) -> None:
    assert after(*outcomes, at=at, accepted=accepted).state == state


def test_a_refusal_is_final_at_once_where_that_is_wanted() -> None:
    at_once = RetryRules(refused_after=0.0)
    assert after(NO_AT_RCPT, rules=at_once).state == "failed"
    assert after(LATER_AT_RCPT, rules=at_once).state == "open"


PICTURES = [
    # outcomes, seconds since the first failure, whether the next try goes at once without pictures
    ([TOO_BIG], 0.0, True),
    ([judge("mail", 552, "too big")], 0.0, True),
    ([judge("dot", 552, "5.2.2 mailbox full")], 0.0, False),
    ([NO_AT_DOT], 0.0, False),
    ([NO_AT_DOT, NO_AT_DOT], 60.0, True),
    ([judge("data", 554, "no"), CUT], 60.0, True),
    ([SILENT, CUT], 60.0, True),
    ([LATER_AT_DOT] * 9, 3599.0, False),
    ([LATER_AT_DOT] * 9, 3600.0, True),
    ([NO_AT_RCPT] * 9, 60.0, False),  # That was before DATA: it is not about the content.
    ([LATER_AT_RCPT] * 9, 7200.0, False),
]


@pytest.mark.parametrize(("outcomes", "at", "stripped"), PICTURES)
def test_pictures_are_left_out_when_they_may_be_what_is_refused(
    outcomes: list[Outcome], at: float, stripped: bool
) -> None:
    found = after(*outcomes, at=at, has_pictures=True)
    assert found.max_bytes == (0 if stripped else None)
    assert (found.next_try == START + at) == stripped
    assert after(*outcomes, at=at).max_bytes is None


def test_a_refusal_of_the_content_is_tried_again_soon_while_the_pictures_may_be_what_is_refused() -> None:
    assert after(NO_AT_DOT, has_pictures=True).next_try <= START + 10
    assert after(NO_AT_DOT, NO_AT_DOT, NO_AT_DOT, at=60.0, has_pictures=True).next_try >= START + 60 + 300


def test_a_size_that_the_server_tells_keeps_the_pictures_that_fit_and_then_none() -> None:
    assert after(BEYOND_SIZE, has_pictures=True).max_bytes == 1_000_000
    assert after(BEYOND_SIZE, BEYOND_SIZE, has_pictures=True).max_bytes == 0


def test_a_message_that_is_refused_without_its_pictures_too_fails_in_its_time() -> None:
    found = after(TOO_BIG, TOO_BIG, at=DAY_S, accepted=1.0, has_pictures=True)
    assert (found.state, found.max_bytes) == ("failed", 0)


def test_pictures_are_left_out_before_a_delivery_fails() -> None:
    assert after(TOO_BIG, rules=RetryRules(refused_after=0.0), has_pictures=True).state == "open"
    found = after(NO_AT_DOT, NO_AT_DOT, at=DAY_S, accepted=1.0, has_pictures=True)
    assert (found.state, found.max_bytes) == ("open", 0)


# advice


def test_no_advice_where_there_is_none() -> None:
    assert smtp.advice(Outcome(LATER, 0, "the server closed the connection", "dot"), "mail.example.com") == ""


def test_real_certificate_errors_are_understood() -> None:
    error = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")
    error.verify_message = "certificate has expired"
    assert "expired" in smtp.advice(judge_error("tls", error), "mail.example.com")
