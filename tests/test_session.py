"""The SMTP session as transcripts: bytes in, replies and mails out, without a socket."""

from __future__ import annotations

import base64
import dataclasses
import hmac
import random
import ssl
import tracemalloc
from collections.abc import Iterator

import pytest

import embedded_smtpd as device
from embedded_smtpd import Mail, Rules, Session, State

RULES = Rules("dev", 1000, mailbox=lambda address: address.lower() in {"device@localhost", "postmaster"})
LOCKED = dataclasses.replace(RULES, user=b"ops", password="pass wörd".encode())
OLD = dataclasses.replace(RULES, mailbox=lambda address: True, any_login=True, lenient=True)
CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
B64 = {word: base64.b64encode(word.encode()).decode() for word in ("ops", "pass wörd", "wrong")}
HELLO, MAIL, RCPT = "EHLO me", "MAIL FROM:<a@b.c>", "RCPT TO:<device@localhost>"
OPEN = [HELLO, MAIL, RCPT]


class Peer:
    """Feeds a session and gathers what it says."""

    def __init__(self, rules: Rules = RULES, *, step: int = 0, answer: bytes = device.ACCEPTED, **options: bool):
        self.session = (device.LenientSession if rules.lenient else Session)(rules, **options)
        self.step = step
        self.answer = answer
        self.mails: list[Mail] = []
        self.started_tls = False
        self.greeting = self.said()

    def said(self) -> str:
        replies = b""
        while (pending := self.session.pending) is not None:
            if isinstance(pending, Mail):
                self.mails.append(pending)
                self.session.complete(self.answer)
            else:
                replies += self.session.take_reply()
        if self.session.state is State.HANDSHAKE:
            self.session.tls_started()
            self.started_tls = True
        return replies.decode("ascii")

    def send(self, data: bytes) -> str:
        pieces = [data[at : at + self.step] for at in range(0, len(data), self.step)] if self.step else [data]
        replies = ""
        for piece in pieces:
            self.session.receive(piece)
            replies += self.said()
        return replies

    def say(self, line: str) -> str:
        return self.send(line.encode() + b"\r\n")

    def open_mail(self) -> None:
        for line in [*OPEN, "DATA"]:
            self.say(line)

    @property
    def closed(self) -> bool:
        return self.session.state is State.CLOSED


@pytest.fixture(params=[0, 1], ids=["whole", "byte-by-byte"])
def step(request: pytest.FixtureRequest) -> Iterator[int]:
    yield request.param


# lines before, line, the start of its reply, state after
COMMANDS = [
    ([], "HELO me", "250", State.READY),
    ([], "EHLO me", "250", State.READY),
    ([], "EHLO", "501", State.START),
    ([], "EHLO \x01", "501", State.START),
    ([], "EHLO MÜLLER-PC", "250", State.READY),
    ([], "HELO MÜLLER\x01", "501", State.START),
    ([], "NOOP Ü", "501", State.START),
    ([], MAIL, "503", State.START),
    ([], "RSET", "250", State.START),
    ([], "NOOP", "250", State.START),
    ([], "NOOP whatever", "250", State.START),
    ([], "HELP", "214", State.START),
    ([], "VRFY x", "252", State.START),
    ([], "EXPN x", "502", State.START),
    ([], "QUIT", "221", State.CLOSED),
    ([], "quit now", "221", State.CLOSED),
    ([], "", "500", State.START),
    ([], "BDAT 5", "500", State.START),
    ([], "XCLIENT ADDR=127.0.0.1", "500", State.START),
    ([], "PROXY TCP4 1.2.3.4 5.6.7.8 1 2", "500", State.START),
    ([], "NO\0OP", "500", State.START),
    ([], "NOOP\0", "500", State.START),
    ([], "NOOP \0", "501", State.START),
    ([HELLO], "mAiL fRoM:<a@b>", "250 2.1.0", State.SENDER),
    ([HELLO], "MAIL FROM: <a@b>", "250", State.SENDER),
    ([HELLO], "MAIL FROM:a@b", "250", State.SENDER),
    ([HELLO], "MAIL FROM:<@relay:a@b>", "250", State.SENDER),
    ([HELLO], "MAIL FROM:<>", "250", State.SENDER),
    ([HELLO], 'MAIL FROM:<"a b"@c>', "250", State.SENDER),
    ([HELLO], "MAIL", "501", State.READY),
    ([HELLO], "MAIL FROM:", "501", State.READY),
    ([HELLO], "MAIL FROM:<a@b", "501", State.READY),
    ([HELLO], "MAIL FROM:<é@b>", "553 5.6.7", State.READY),
    ([HELLO], "MAIL FROM:<a@b>\rRCPT TO:<device@localhost>", "501", State.READY),
    ([HELLO], "MAIL FROM:<a@b> SIZE=1000 BODY=8BITMIME", "250", State.SENDER),
    ([HELLO], "MAIL FROM:<a@b> SIZE=1001", "552 5.3.4", State.READY),
    ([HELLO], "MAIL FROM:<a@b> SIZE=" + "9" * 1900, "501", State.READY),
    ([HELLO], "MAIL FROM:<a@b> SIZE=x", "501", State.READY),
    ([HELLO], "MAIL FROM:<a@b> SIZE=1 SIZE=2", "501", State.READY),
    ([HELLO], "MAIL FROM:<a@b> BODY=BINARYMIME", "501", State.READY),
    ([HELLO], "MAIL FROM:<a@b> FOO=BAR", "555 5.5.4", State.READY),
    ([HELLO], "MAIL FROM:<a@b> SMTPUTF8", "555", State.READY),
    ([HELLO], "MAIL FROM:<a@b> AUTH=<>", "555", State.READY),
    ([HELLO, MAIL], MAIL, "503 5.5.1", State.SENDER),
    ([HELLO], RCPT, "503", State.READY),
    ([HELLO, MAIL], "DATA", "503", State.SENDER),
    ([HELLO, MAIL], RCPT, "250 2.1.5", State.RECIPIENT),
    ([HELLO, MAIL], "RCPT TO:<postmaster>", "250", State.RECIPIENT),
    ([HELLO, MAIL], "RCPT TO:<other@localhost>", "550 5.1.1", State.SENDER),
    ([HELLO, MAIL], "RCPT TO:<device%x@localhost>", "550", State.SENDER),
    ([HELLO, MAIL], "RCPT TO:<>", "501", State.SENDER),
    ([HELLO, MAIL], RCPT + " NOTIFY=NEVER", "555", State.SENDER),
    ([HELLO, MAIL], "RCPT TO:<é@localhost>", "553", State.SENDER),
    (OPEN, "DATA x", "501", State.RECIPIENT),
    (OPEN, "DATA", "354", State.CONTENT),
    (OPEN, "RSET", "250", State.READY),
    (OPEN, "RSET x", "501", State.RECIPIENT),
    (OPEN, "EHLO again", "250", State.READY),
    (OPEN, "AUTH LOGIN", "503", State.RECIPIENT),
    (OPEN, "STARTTLS", "503", State.RECIPIENT),
    ([HELLO], "AUTH LOGIN", "502", State.READY),
    ([HELLO], "STARTTLS", "454 4.7.0", State.READY),
    ([], "X" * 2049, "500 5.5.2", State.START),
    ([], "NOOP " + "x" * 2043, "250", State.START),
]


@pytest.mark.parametrize("before, line, reply, state", COMMANDS)
def test_command_gets_its_reply_and_moves_the_state_only_when_positive(
    before: list[str], line: str, reply: str, state: State, step: int
) -> None:
    peer = Peer(step=step)
    for known in before:
        assert peer.say(known)[0] == "2"
    said = peer.say(line)
    assert said.startswith(reply) and said.endswith("\r\n")
    assert peer.session.state is state


@pytest.mark.parametrize("before, line, reply, state", COMMANDS)
def test_command_with_a_tail_out_of_turn_ends_the_session(
    before: list[str], line: str, reply: str, state: State
) -> None:
    peer = Peer()
    for known in before:
        peer.say(known)
    said = peer.send(line.encode() + b"\r\nNOOP\r\n")
    assert said.startswith("221" if state is State.CLOSED else "554 5.5.0") and said.count("\r\n") == 1
    assert peer.closed and not peer.mails


def test_input_before_the_greeting_replaces_it() -> None:
    session = Session(RULES)
    session.receive(b"EHLO x\r\n")
    assert session.take_reply().startswith(b"554 5.5.0")
    assert session.pending is None and session.state is State.CLOSED


def test_nothing_is_read_after_the_end() -> None:
    session = Session(RULES)
    session.receive(b"EHLO x\r\n")
    session.receive(b"QUIT\r\n")
    assert session.take_reply().startswith(b"554 5.5.0")
    session.receive(b"QUIT\r\n")
    assert session.pending is None and session.state is State.CLOSED
    peer = Peer(OLD)
    assert peer.send(b"QUIT\r\nNOOP\r\n").startswith("221") and peer.send(b"NOOP\r\n") == "" and peer.closed


def test_ehlo_offers_what_there_is_and_never_pipelining() -> None:
    assert Peer().say(HELLO) == "250-dev\r\n250-SIZE 1000\r\n250-8BITMIME\r\n250-ENHANCEDSTATUSCODES\r\n250 HELP\r\n"
    offered = Peer(dataclasses.replace(LOCKED, tls=CONTEXT)).say(HELLO)
    assert "250-AUTH LOGIN PLAIN CRAM-MD5\r\n" in offered and "250-STARTTLS\r\n" in offered
    assert "AUTH CRAM-MD5\r\n" in Peer(LOCKED, private=False).say(HELLO)


def test_bare_line_feed_does_not_end_a_command(step: int) -> None:
    peer = Peer(step=step)
    assert peer.send(b"NOOP\n").startswith("500 5.5.2")
    assert peer.say("NOOP").startswith("250")


def test_too_long_line_is_skipped_to_its_end_and_the_session_goes_on(step: int) -> None:
    peer = Peer(step=step * 1000)
    assert peer.send(b"EHLO " + b"x" * 100_000 + b"\r\n").startswith("500 5.5.2")
    assert peer.say(HELLO).startswith("250")


def test_line_without_end_is_cut_off_with_flat_memory() -> None:
    peer = Peer()
    said = ""
    for _ in range(40):
        said += peer.send(b"x" * 65536)
        assert len(peer.session._buffer) <= 65536
    assert said.startswith("421") and said.count("\r\n") == 1 and peer.closed


def test_twentieth_error_ends_the_session() -> None:
    peer = Peer()
    assert [peer.say("JUNK")[:3] for _ in range(20)] == ["500"] * 19 + ["421"]
    assert peer.closed


def test_hundred_recipients_pass_and_the_thousand_and_first_waits() -> None:
    peer = Peer(OLD)
    peer.say(HELLO)
    peer.say(MAIL)
    codes = [peer.say(f"RCPT TO:<r{n}@x>")[:9] for n in range(1001)]
    assert set(codes[:1000]) == {"250 2.1.5"} and codes[1000] == "452 4.5.3"


# Content

TAIL = b"MAIL FROM:<e@x>\r\nRCPT TO:<device@localhost>\r\nDATA\r\nSubject: REBOOT\r\n\r\nB\r\n.\r\n"
SMUGGLING = [
    b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r.\n", b"\r.\r\n", b"\n.\r", b"\r\n.\r", b"\r\n\0.\r\n",
    b"\r\n.\0\r\n",    b"\r\n.\r\r\n", b"\r\r\n.\r\r\n", b"\r\r\n.\r\n", b"\r\n.\r\n", b"\r\n. \r\n", b"\r\n.\t\r\n",
    b"\x85.\x85", b"\xe2\x80\xa8.\xe2\x80\xa8", b"\x0b.\x0b", b"\x0c.\x0c", b"\x1c.\x1c",
]  # fmt: skip


@pytest.mark.parametrize("rules", [RULES, OLD], ids=["strict", "lenient"])
@pytest.mark.parametrize("sequence", SMUGGLING)
@pytest.mark.parametrize("size", [0, 1, 3, 7])
def test_no_sequence_smuggles_a_second_mail(sequence: bytes, rules: Rules, size: int) -> None:
    peer = Peer(rules)
    peer.open_mail()
    data = b"Subject: ok\r\n\r\nA" + sequence + TAIL
    for at in range(0, len(data), size or len(data)):
        peer.session.receive(data[at : at + (size or len(data))])
        said = peer.said()
        if said:  # whoever waits for no answer is out of turn
            peer.session.receive(data[at + (size or len(data)) :] or b"NOOP\r\n")
            break
    peer.said()
    assert len(peer.mails) <= (1 if rules is RULES or b"\r\n.\r\n" not in sequence else 2)  # the end is the end
    bare = data.count(b"\r") != data.count(b"\r\n") or data.count(b"\n") != data.count(b"\r\n") or b"\0" in data
    if rules is RULES and bare:
        assert not peer.mails and said.startswith(("550 5.5.2", "554"))


@pytest.mark.parametrize(
    "sent, content",
    [
        (b".\r\n", b""),
        (b"a\r\n.\r\n", b"a\r\n"),
        (b"..\r\n.\r\n", b".\r\n"),
        (b".x\r\n..y\r\n.z\r\n.\r\n", b"x\r\n.y\r\nz\r\n"),
        (b"a\r\n. \r\nb\r\n.\r\n", b"a\r\n \r\nb\r\n"),
        (b"x" * 900 + b"\r\n.\r\n", b"x" * 900 + b"\r\n"),
    ],
)
def test_dots_are_unstuffed_however_the_bytes_come(sent: bytes, content: bytes) -> None:
    for size in (1, 2, 3, 4, 5, 7, len(sent)):
        peer = Peer(step=size)
        peer.open_mail()
        assert peer.send(sent).startswith("250 2.6.0")
        assert [mail.content() for mail in peer.mails] == [content]


@pytest.mark.parametrize("border", [1024, 4096, 8192, 65536])
def test_end_of_mail_is_found_across_any_border(border: int) -> None:
    for offset in range(-6, 7):
        peer = Peer(dataclasses.replace(RULES, max_mail=1 << 20), step=border)
        peer.open_mail()
        body = (b"x" * 98 + b"\r\n") * (border // 100 + 2)
        body = body[: border + offset - 2] + b"\r\n"
        body = body.replace(b"\r\r\n", b"x\r\n")
        assert peer.send(body + b".\r\n").startswith("250"), offset
        assert peer.mails[0].content() == body


def test_mail_that_drips_in_costs_little_more_than_its_bytes() -> None:
    peer = Peer(dataclasses.replace(RULES, max_mail=1 << 20))
    peer.open_mail()
    tracemalloc.start()
    for _ in range(20_000):
        peer.session.receive(b"x")
    ours = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*embedded_smtpd.py")])
    tracemalloc.stop()  # other threads of this process have memory of their own
    assert sum(trace.size for trace in ours.traces) < 100_000
    assert peer.send(b"\r\n.\r\n").startswith("250") and peer.mails[0].content() == b"x" * 20_000 + b"\r\n"


@pytest.mark.parametrize("length, reply", [(999, "250"), (1000, "250"), (1001, "552 5.3.4"), (5000, "552")])
def test_mail_over_the_limit_is_read_to_its_end_and_refused(length: int, reply: str, step: int) -> None:
    peer = Peer(step=step)
    peer.open_mail()
    assert peer.send(b"x" * (length - 2) + b"\r\n.\r\n").startswith(reply)
    assert peer.say(RCPT).startswith("503")


@pytest.mark.parametrize("lines, reply", [(333, "250"), (334, "552 5.3.4"), (2000, "552 5.3.4")])
def test_dots_that_were_stuffed_do_not_count_for_the_size(lines: int, reply: str, step: int) -> None:
    peer = Peer(step=step)
    peer.open_mail()
    assert peer.send(b"..\r\n" * lines + b".\r\n").startswith(reply)


@pytest.mark.parametrize("bad", [b"a\nb\r\n.\r\n", b"a\0b\r\n.\r\n", b"x" * 2000 + b"\r\n.\r\n"])
def test_refused_mail_needs_a_new_sender_and_the_next_mail_is_taken(bad: bytes) -> None:
    peer = Peer()
    peer.open_mail()
    assert peer.send(bad)[0] == "5"
    for line in (RCPT, "DATA"):
        assert peer.say(line).startswith("503")
    for line in (MAIL, RCPT, "DATA"):
        peer.say(line)
    assert peer.send(b"good\r\n.\r\n").startswith("250")
    assert [mail.content() for mail in peer.mails] == [b"good\r\n"]


def test_application_that_refuses_leaves_the_session_ready() -> None:
    peer = Peer(answer=device.CANNOT_PARSE)
    peer.open_mail()
    assert peer.send(b"x\r\n.\r\n").startswith("550 5.6.0")
    assert peer.session.state is State.READY and peer.say(RCPT).startswith("503")


def test_input_behind_the_final_dot_unmakes_the_mail() -> None:
    for tail in (b"QUIT\r\n", b"MAIL FROM:<a@b>\r\n", b"x"):
        peer = Peer()
        peer.open_mail()
        assert peer.send(b"Subject: CMD ARM\r\n\r\n.\r\n" + tail).startswith("554 5.5.0")
        assert not peer.mails and peer.closed


def test_input_while_the_application_thinks_unmakes_the_mail() -> None:
    peer = Peer()
    peer.open_mail()
    peer.session.receive(b"x\r\n.\r\n")
    assert isinstance(peer.session.pending, Mail)
    peer.session.receive(b"NOOP\r\n")
    assert peer.session.state is State.CLOSED
    assert peer.said().startswith("554")


@pytest.mark.parametrize("sent", [b"QUIT", b"Subject: x\r\n", b"x\r\n."])
def test_what_is_cut_off_by_the_end_of_the_connection_does_nothing(sent: bytes) -> None:
    peer = Peer()
    if sent != b"QUIT":
        peer.open_mail()
    peer.send(sent)
    peer.session.receive(b"")
    assert peer.said() == "" and not peer.mails
    assert peer.closed


def test_many_mails_in_one_session_leave_nothing_behind() -> None:
    peer = Peer()
    peer.say(HELLO)
    for number in range(100):
        for line in (f"MAIL FROM:<m{number}@x>", RCPT, "DATA"):
            peer.say(line)
        peer.send(b"%d\r\n.\r\n" % number)
    assert [(mail.sender, mail.recipients, mail.content()) for mail in peer.mails] == [
        (f"m{number}@x", ["device@localhost"], b"%d\r\n" % number) for number in range(100)
    ]


# AUTH

LOGINS = [
    (["AUTH LOGIN", B64["ops"], B64["pass wörd"]], ["334 VXNlcm5hbWU6", "334 UGFzc3dvcmQ6", "235 2.7.0"]),
    (["AUTH login " + B64["ops"], B64["pass wörd"]], ["334 UGFzc3dvcmQ6", "235"]),
    (["AUTH LOGIN =", B64["pass wörd"]], ["334 UGFzc3dvcmQ6", "535 5.7.8"]),
    (["AUTH LOGIN", B64["ops"], B64["wrong"]], ["334", "334", "535 5.7.8"]),
    (["AUTH LOGIN", B64["wrong"], B64["pass wörd"]], ["334", "334", "535 5.7.8"]),
    (["AUTH LOGIN", "*"], ["334", "501 5.7.0"]),
    (["AUTH LOGIN", B64["ops"], "*"], ["334", "334", "501 5.7.0"]),
    (["AUTH LOGIN", "!!!!"], ["334", "501 5.5.2"]),
    (["AUTH LOGIN", "YQ"], ["334", "501 5.5.2"]),
    (["AUTH LOGIN", "YQ==YQ=="], ["334", "501 5.5.2"]),
    (["AUTH LOGIN", "YWJj="], ["334", "501 5.5.2"]),
    (["AUTH LOGIN", "é"], ["334", "501 5.5.2"]),
    (["AUTH LOGIN", "A" * 12290], ["334", "500 5.5.6"]),
    (["AUTH PLAIN", base64.b64encode("\0ops\0pass wörd".encode()).decode()], ["334 \r\n", "235"]),
    (["AUTH PLAIN " + base64.b64encode("\0ops\0pass wörd".encode()).decode()], ["235"]),
    (["AUTH PLAIN " + base64.b64encode(b"\0ops\0no").decode()], ["535"]),
    (["AUTH PLAIN " + B64["ops"]], ["501"]),
    (["AUTH CRAM-MD5 " + B64["ops"]], ["501"]),
    (["AUTH"], ["501"]),
    (["AUTH LOGIN a b"], ["501"]),
    (["AUTH FOO"], ["504 5.5.4"]),
]


@pytest.mark.parametrize("lines, replies", LOGINS)
def test_login_dialogue(lines: list[str], replies: list[str], step: int) -> None:
    peer = Peer(LOCKED, step=step)
    peer.say(HELLO)
    assert peer.say(MAIL).startswith("530 5.7.0")
    for line, reply in zip(lines, replies, strict=True):
        assert peer.say(line).startswith(reply)
    passed = replies[-1].startswith("235")
    assert peer.session.state is State.READY
    assert peer.say("AUTH LOGIN").startswith("503" if passed else "334")
    if passed:
        assert peer.say("RSET").startswith("250") and peer.say(MAIL).startswith("250")


@pytest.mark.parametrize("password, reply", [("pass wörd", "235"), ("wrong", "535")])
def test_cram_md5_proves_the_password_without_saying_it(password: str, reply: str) -> None:
    peer = Peer(LOCKED, private=False)
    peer.say(HELLO)
    challenge = base64.b64decode(peer.say("AUTH CRAM-MD5")[4:])
    proof = hmac.new(password.encode(), challenge, "md5").hexdigest()
    assert peer.say(base64.b64encode(b"ops " + proof.encode()).decode()).startswith(reply)


def test_passwords_are_not_asked_for_in_the_clear() -> None:
    peer = Peer(LOCKED, private=False)
    peer.say(HELLO)
    assert peer.say("AUTH PLAIN").startswith("538 5.7.11") and peer.say("AUTH LOGIN").startswith("538")


def test_login_wants_ehlo_first() -> None:
    peer = Peer(LOCKED)
    assert peer.say("AUTH LOGIN").startswith("503")
    peer.say("HELO me")
    assert peer.say("AUTH LOGIN").startswith("503")


def test_trace_decodes_names_and_masks_passwords() -> None:
    seen: list[str] = []
    peer = Peer(LOCKED)
    peer.session.trace = seen.append
    for line in (HELLO, "AUTH LOGIN " + B64["ops"], B64["pass wörd"], MAIL):
        peer.say(line)
    text = "\n".join(seen)
    assert "(ops)" in text and "(Password:)" in text and "MAIL FROM:<a@b.c>" in text
    assert B64["pass wörd"] not in text and "pass wörd" not in text


# STARTTLS

TLS = dataclasses.replace(LOCKED, tls=CONTEXT)


def test_starttls_forgets_everything_that_was_said_before() -> None:
    peer = Peer(TLS)
    for line in (HELLO, "AUTH LOGIN " + B64["ops"], B64["pass wörd"]):
        peer.say(line)
    assert peer.say("STARTTLS x").startswith("501 5.5.4")
    assert peer.say("STARTTLS").startswith("220 2.0.0") and peer.started_tls
    assert peer.say(MAIL).startswith("503")
    assert "STARTTLS" not in peer.say(HELLO)
    assert peer.say(MAIL).startswith("530")
    assert peer.say("STARTTLS").startswith("503")


@pytest.mark.parametrize("rules", [TLS, dataclasses.replace(OLD, tls=CONTEXT)], ids=["strict", "lenient"])
@pytest.mark.parametrize("tail", [b"MAIL FROM:<evil@x>\r\n", b"QUIT\r\n"])
def test_commands_hidden_behind_starttls_end_the_session(rules: Rules, tail: bytes) -> None:
    peer = Peer(rules)
    peer.say(HELLO)
    assert peer.send(b"STARTTLS\r\n" + tail).startswith("554")
    assert peer.closed and not peer.started_tls


# Cameras: the lenient session


def test_old_cameras_get_through() -> None:
    peer = Peer(OLD, private=False)
    assert "AUTH LOGIN" in peer.say("EHLO cam") and "250-SIZE\r\n" in peer.say("EHLO cam")
    for line, reply in (("HELO", "250"), ("AUTH LOGIN", "334 VXNlcm5hbWU6"),
                        ("YQ==", "334 UGFzc3dvcmQ6"), ("YQ==", "235"),
                        ("MAIL FROM:<camera>", "250"), ("RCPT TO:<alerts>", "250"), ("DATA", "354")):  # fmt: skip
        assert peer.say(line).startswith(reply), line
    said = peer.send(b"Subject: x\n\nline\rline\n.\nmore\r\n..dot\r\n.\r\nQUIT\r\n")
    assert said.startswith("250 2.6.0") and "221" in said
    assert peer.mails[0].content_with_lf() == b"Subject: x\n\nline\nline\n.\nmore\n.dot\n"


# a whole session; the recipients and the content of the mail
DIALOGUES = [
    (b"EHLO a\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nx\r\n.\r\nQUIT\r\n", ["c@d"], b"x\n"),
    (b"EHLO a\nMAIL FROM: a@b\nRCPT TO: c@d\nDATA\nx\n..y\n.\nQUIT\n", ["c@d"], b"x\n.y\n"),
    (b"HELO a\nMAIL FROM:<a@b>\nRCPT TO:<c@d>\nDATA\nx\r\n.\r\nQUIT\n", ["c@d"], b"x\n"),
    (b"HELO a\r\r\nMAIL FROM:<a@b>\r\r\nRCPT TO:<c@d>\r\r\nDATA\r\r\nx\r\r\n.\r\r\nQUIT\r\r\n", ["c@d"], b"x\n"),
    (b"HELO a\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nx\n.\ny\r\n.\r\nQUIT\r\n", ["c@d"], b"x\n.\ny\n"),
    (b"HELO a\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\nDATA\nx\n.\ny\r\n.\r\nQUIT\n", ["c@d"], b"x\n.\ny\n"),
    (b"\r\nHELO\r\n\r\nMAIL FROM:<>\r\n\r\n\r\nRCPT TO:<c>\r\n\nDATA\r\nx\r\n.\r\n\r\nQUIT\r\n\r\n", ["c"], b"x\n"),
    (b"MAIL FROM:<a@b>\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n.\r\nQUIT\r\n", ["c@d"], b""),
    (b"ehlo\r\nmail from: <Garden <a@b>>\r\nrcpt to:John <c@d>\r\nrcpt to:<e\r\ndata\r\nx\r\n.\r\nquit\r\n", ["c@d", "e"], b"x\n"),
    (b"HELO M\xdcLLER\r\nMAIL FROM:<M\xfcller>\r\nRCPT TO:<Ty\xc5\x82@x>\r\nDATA\r\nx\0\r\n.\r\nQUIT\r\n", ["Ty\u0142@x"], b"x\0\n"),
    (b"EHLO a\r\nMAIL FROM:<a@b> RET=HDRS AUTH=<> SIZE=99999999 X\r\nRCPT TO:<c@d> NOTIFY=NEVER\r\nDATA\r\nx\r\n.\r\nQUIT\r\n", ["c@d"], b"x\n"),
    (b"EHLO a\r\nMAIL FROM a@b\r\nRCPT TO : <@x,@y:c@d>\r\nRCPT TO:<north gate@d>\r\nDATA\r\nx\r\n.\r\nQUIT\r\n", ["c@d", "north gate@d"], b"x\n"),
    (b"  EHLO\ta\r\nMAIL\tFROM:<a@[IPv6:::1]>\r\nRCPT TO:<\"c d\"@e>\r\nRCPT TO:<>\r\nDATA \r\nx\r\n.\r\nQUIT\r\n", ["c d@e", ""], b"x\n"),
    (b"HELO a\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nx\r\n.\r\nsee the recorder\r\n.\r\nQUIT\r\n", ["c@d"], b"x\n"),
    (b"HELO a\0\r\nMAIL FROM:<a@b>\0\r\nRCPT TO:<c@d>\0\r\nDATA\0\r\nx\r\n.\r\nQUIT\0\r\n", ["c@d"], b"x\n"),
    (b"HELO a\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nx\r\n.\n", ["c@d"], b"x\n\n"),
    (b"HELO a\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nx", ["c@d"], b"x"),
]  # fmt: skip


@pytest.mark.parametrize("size", [0, 1, 3, 64])
@pytest.mark.parametrize("early", [False, True], ids=["in step", "blast"])
@pytest.mark.parametrize("dialogue, recipients, content", DIALOGUES)
def test_camera_that_does_not_speak_as_it_should_is_heard(
    dialogue: bytes, recipients: list[str], content: bytes, early: bool, size: int
) -> None:
    session = device.LenientSession(OLD)
    mails = []

    def answer() -> None:
        while session.pending is not None:
            if isinstance(session.pending, Mail):
                mails.append(session.pending)
                session.complete(device.ACCEPTED)
            else:
                session.take_reply()

    if not early:
        answer()
    for at in range(0, len(dialogue), size or len(dialogue)):  # early: all is there before the greeting is sent
        session.receive(dialogue[at : at + (size or len(dialogue))])
        if not early:
            answer()
    answer()
    if session.state is not State.CLOSED:
        session.receive(b"")
    if mail := session.cut_off_mail():
        assert mail.incomplete
        mails.append(mail)
    assert [(mail.recipients, mail.content_with_lf()) for mail in mails] == [(recipients, content)]


@pytest.mark.parametrize(
    "lines",
    [
        ["AUTH PLAIN " + base64.b64encode(b"user\0pass").decode()],
        ["AUTH PLAIN " + base64.b64encode(b"\0user\0").decode()],
        ["AUTH PLAIN ="],
        ["AUTH PLAIN", ""],
        ["AUTH LOGIN", "dXNlcjE", "cGFzcw"],
        ["auth login ", "dQ==", ""],
        ["AUTH LOGIN dXNlcg==", "cA==junk!"],
        ["AUTH LOGIN", "\xff", "\0"],
        ["AUTH CRAM-MD5", "eA=="],
    ],
)
def test_login_that_is_not_quite_right_passes_where_every_login_does(lines: list[str]) -> None:
    for hello in ("EHLO x", "HELO x", "NOOP"):
        peer = Peer(OLD, private=False)
        assert [peer.say(line)[0] for line in (hello, *lines)][-1] == "2"
        assert peer.say("MAIL FROM:<a@b>").startswith("250")


def test_login_of_a_camera_is_checked_where_a_user_is_set() -> None:
    rules = dataclasses.replace(OLD, user=b"ops", password=b"secret", any_login=False)
    for password, reply in (("secret", "235"), ("wrong", "535")):
        peer = Peer(rules, private=False)
        assert peer.say(MAIL).startswith("530")
        assert peer.say("AUTH PLAIN " + base64.b64encode(f"ops\0{password}".encode()).decode().rstrip("=")).startswith(reply)
        assert peer.say(MAIL).startswith("250" if reply == "235" else "530")


def test_mail_of_a_camera_over_the_limit_is_its_first_part(step: int) -> None:
    peer = Peer(OLD, step=step * 7)
    peer.open_mail()
    assert peer.send(b"Subject: x\r\n\r\n" + b"y" * 3000 + b"\r\n.\r\n").startswith("250")
    assert peer.mails[0].incomplete and len(peer.mails[0].data) == 1000
    assert peer.mails[0].data.startswith(b"Subject: x\r\n\r\nyyy")


def test_mail_of_a_camera_that_does_not_end_is_delivered_in_bounded_memory() -> None:
    peer = Peer(OLD)
    peer.open_mail()
    said = ""
    for _ in range(40):
        said += peer.send(b"x" * 65536)
        assert len(peer.session._content) < 100_000
    assert said.startswith("552") and peer.closed
    mail = peer.session.cut_off_mail()
    assert mail is not None and bytes(mail.data) == b"x" * 1000


def test_mail_of_a_camera_is_delivered_once_and_an_empty_one_that_was_cut_off_is_not() -> None:
    peer = Peer(OLD)
    peer.open_mail()
    peer.session.receive(b"")
    assert peer.session.cut_off_mail() is None
    whole = Peer(OLD)
    whole.open_mail()
    whole.send(b"x\r\n.\r\n")
    whole.session.receive(b"")
    assert len(whole.mails) == 1 and whole.session.cut_off_mail() is None


@pytest.mark.parametrize(
    "lines",
    [
        ["AUTH NTLM", B64["ops"], B64["pass wörd"]],
        ["AUTH\tPLAIN AG9wcwBwYXNzIHfDtnJk"],
        ["AUTH LOGIN", "b3A", B64["pass wörd"]],
        ["AUTH LOGIN " + B64["ops"] + " " + B64["pass wörd"]],
        ["AUTH LOGIN", "*", B64["pass wörd"]],
        ["AUTH PLAIN", "AG9wcwBwYXNzIHfDtnJk"],
    ],
)
def test_trace_shows_no_password_in_whatever_form_it_comes(lines: list[str]) -> None:
    for rules in (LOCKED, OLD):
        shown: list[str] = []
        peer = Peer(rules)
        peer.session.trace = shown.append
        for line in (HELLO, *lines, "NOOP"):
            peer.say(line)
        assert not [line for line in shown if B64["pass wörd"] in line or "AG9wcw" in line or "pass w" in line]
        assert rules is OLD or "C: NOOP" in shown


# Whatever comes

WORDS = [
    b"EHLO x", b"HELO", b"MAIL FROM:<a@b>", b"RCPT TO:<device@localhost>", b"DATA", b"RSET", b"QUIT", b"AUTH LOGIN",
    b"b3Bz", b"AUTH PLAIN AG9wcwBwYXNzIHfDtnJk", b"STARTTLS", b"*", b".", b"..", b"\r\n", b"\r\n", b"\r\n.\r\n", b"\r",
    b"\n", b"\0", b"\xff", b" ", b"<", b'"', b"SIZE=", b"9" * 30, b"x" * 3000,
]  # fmt: skip


@pytest.mark.parametrize("rules", [RULES, TLS, OLD], ids=["plain", "locked", "lenient"])
def test_random_bytes_get_one_reply_a_line_or_the_end_and_never_an_exception(rules: Rules) -> None:
    chance = random.Random(5321)
    for _ in range(1500):
        peer = Peer(rules, private=chance.random() < 0.5)
        for _ in range(chance.randrange(1, 15)):
            words = b"".join(chance.choice(WORDS) for _ in range(chance.randrange(1, 4)))
            said = peer.send(words + chance.choice((b"\r\n", b"\r\n", b"\n", b"")))
            codes = [line[:3] for line in said.splitlines() if line[3:4] == " "]
            assert all(code.isdigit() for code in codes)
            assert len(codes) <= 1 or rules.lenient, (words, said)
            if peer.closed:
                break
        peer.session.receive(b"")
        assert isinstance(peer.said(), str)
        if mail := peer.session.cut_off_mail():
            assert rules.lenient and isinstance(mail.content_with_lf(), bytes)
        assert len(peer.mails) <= 15
