"""Composed mails, held against the email package: what went in comes out, and nothing else gets in."""

from __future__ import annotations

import base64
import email
import email.header
import email.message
import email.policy
import random
import re
from typing import Any

import pytest
from conftest import PNG

import smtp_module as smtp
from smtp_module import Attachment

NAMES = {
    "plain": "cam1",
    "persian": "پارکینگ می\u200cشود",
    "chinese": "车库摄像头",
    "emoji": "👨\u200d👩\u200d👧 Garten",
    "umlaut": "Hühnerställe",
    "long": "x" * 2000,
    "long words": "one word after another " * 100,
    "long chinese": "摄" * 500,
    "combining": "e" + "\u0301" * 1000,
    "encoded word": "=?utf-8?q?=0ABcc:x?=",
    "quotes": "a \"quoted\" \\ 'name' (comment) <b@c>",
    "empty": "",
}
HOSTILE = {
    "H1 lf": "cam\nBcc: x@y.z",
    "H1 cr": "cam\rBcc: x@y.z",
    "H1 crlf": "cam\r\nBcc: x@y.z\r\n\r\nbody",
    "H2 trailing lf": "cam\n",
    "H2 trailing cr": "cam\r",
    "H3 line separators": "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei",
    "H4 nul": "a\0b",
    "H4 escape": "a\x1b[31mb",
    "H4 bidi": "a\u202eb\u2066c\u200fd",
    "H4 surrogate": "a\ud800b",
    "H5 encoded": "=?utf-8?q?=0D=0ABcc:x@y.z?=",
    "tab": "a\tb",
}


def compose(**parts: Any) -> bytes:
    return b"".join(smtp.compose_pieces(**parts))


def parsed(**parts: Any) -> email.message.EmailMessage:
    """Compose, check the bytes, parse with the email package."""
    given = {"subject": "s", "sender": "relay@example.com", "to": ["ann@example.com"], "text": "t", **parts}
    data = compose(**given)
    assert data.endswith(b"\r\n") and data.isascii() and b"\0" not in data
    assert not re.search(rb"\r(?!\n)|(?<!\r)\n", data), "only CRLF ends a line"
    assert max(map(len, data.split(b"\r\n"))) <= 998, "RFC 5322 2.1.1"
    message = email.message_from_bytes(data, policy=email.policy.default)
    assert isinstance(message, email.message.EmailMessage)
    assert [defect for part in message.walk() for defect in part.defects] == []
    return message


def structure(message: email.message.Message) -> Any:
    kind = message.get_content_type()
    return (kind, [structure(part) for part in message.iter_parts()]) if message.is_multipart() else kind  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", NAMES.values(), ids=NAMES)
def test_subjects_and_names_of_any_script_arrive(value: str) -> None:
    message = parsed(subject=f"DVR ALERT: {value}", headers={"X-Alert": value})
    assert message["Subject"] == f"DVR ALERT: {value}".strip()
    assert str(message["X-Alert"]).strip() == value.strip()


@pytest.mark.parametrize("value", [*NAMES.values(), "a" + "摄" * 60, "é" * 61, "👍" * 40, "aé摄👍" * 20])
def test_each_encoded_word_can_be_read_alone(value: str) -> None:
    """Whole characters, no padding: what follows a padded word in Base64 is lost on readers that use GMime."""
    for sender in ("relay@example.com", f"{value} <relay@example.com>"):
        data = compose(subject=f"DVR ALERT: {value}", sender=sender, to=["ann@example.com"], text="t")
        for line in data.partition(b"\r\n\r\n")[0].split(b"\r\n"):
            assert len(line) <= 76 or b"=?" not in line
        for word in re.findall(rb"=\?utf-8\?.\?[^?]*\?=", data):
            ((raw, charset),) = email.header.decode_header(word.decode())
            assert isinstance(raw, bytes) and charset and raw.decode(charset)
            assert word[7:10] == b"?q?" and len(word) <= 75


def test_plain_beginning_of_a_subject_stays_plain() -> None:
    data = compose(subject="DVR ALERT: DOOR_OPENED - حیاط 2", sender="a@b.c", to=["d@e.f"])
    assert b"\r\nSubject: DVR ALERT: DOOR_OPENED - =?utf-8?q?=D8=AD=DB=8C=D8=A7=D8=B7_2?=\r\n" in data
    assert b"\r\nSubject: two  blanks stay\r\n" in compose(subject="two  blanks stay", sender="a@b.c", to=["d@e.f"])


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_nothing_gets_out_of_a_header(value: str) -> None:
    message = parsed(
        subject=value, sender=f"{value} <relay@example.com>", to=[f"{value} <ann@example.com>"],
        headers={"X-Alert": value},
        attachments=[Attachment(value, "image/png", PNG, cid="p")], html="<b>x</b>", text=value,
    )  # fmt: skip
    assert sorted(message.keys()) == sorted(
        ["Date", "From", "To", "Subject", "Message-ID", "X-Alert", "MIME-Version", "Content-Type"]
    )
    assert not re.search("[\x00-\x08\x0a-\x1f\u2028\u2029\u202a-\u202e]", message["Subject"])
    assert len(list(message.walk())) == 5


@pytest.mark.parametrize("value", [*HOSTILE.values(), "a@b.c\0", "a@b, c@d", "<a@b> SIZE=1"])
def test_an_address_header_holds_one_line(value: str) -> None:
    parsed(to=[value], cc=[value], sender=value)


@pytest.mark.parametrize(
    "name", [name for key, name in NAMES.items() if key not in ("long", "combining", "quotes", "encoded word")]
)
def test_names_in_address_headers_arrive(name: str) -> None:
    message = parsed(
        sender=f"{name[:60]} <relay@example.com>", to=[f"{name[:60]} <ann@example.com>", "bob@example.com"]
    )
    (sender,) = message["From"].addresses
    # the package leaves blanks between encoded words in names, against RFC 2047 6.2
    assert sender.display_name.replace(" ", "") == name[:60].replace(" ", "")
    assert sender.addr_spec == "relay@example.com"
    assert [person.addr_spec for person in message["To"].addresses] == ["ann@example.com", "bob@example.com"]


@pytest.mark.parametrize(
    ("given", "name", "plain"),
    [
        ("Door, yard <a@b.org>", "Door, yard", "a@b.org"), ('"Door, yard" <a@b.org>', "Door, yard", "a@b.org"),
        ("Home; [1] <a@b.org>", "Home; [1]", "a@b.org"), ("Alerts: home <a@b.org>", "Alerts: home", "a@b.org"),
        ("me@home <a@b.org>", "me@home", "a@b.org"), ("前门，1, 2 <a@b.org>", "前门，1, 2", "a@b.org"),
        ("Wächter <a@bücher.example>", "Wächter", "a@xn--bcher-kva.example"),
        ("a@bücher.example", "", "a@xn--bcher-kva.example"), ('"a \\"b\\"" <a@b.org>', 'a "b"', "a@b.org"),
    ],
)  # fmt: skip
def test_sender_that_the_settings_take_is_the_one_in_the_header(given: str, name: str, plain: str) -> None:
    (person,) = parsed(sender=given)["From"].addresses
    assert (person.display_name, person.addr_spec) == (name, plain) and smtp.address(given) == plain


def test_a_hundred_recipients_keep_their_lines_short() -> None:
    to = [f"somebody.with.a.long.name.{n}@department.example.com" for n in range(100)]
    assert [person.addr_spec for person in parsed(to=to)["To"].addresses] == to


TEXTS = {
    "plain": "one\ntwo\n", "crlf": "one\r\ntwo\r\n", "cr": "one\rtwo", "no end": "one", "empty": "",
    "dots": ".\n..\n.x\n\n.\n",
    "boundary": "--=_0123\nContent-Type: text/html\n\nhello\n--=_0123--",
    "nul": "a\0b", "script": "می\u200cشود 车库 👍\n",
    "long": "x" * 5000, "from": "From here\nFrom there\n", "separators": "a\u2028b\x85c",
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_texts_arrive_as_they_are_but_for_line_ends(text: str) -> None:
    message = parsed(text=text, html=f"<p>{text}</p>", attachments=[Attachment("a.bin", data=b"x")])
    expected = re.sub("\r\n|\r", "\n", text)
    plain = message.get_body(("plain",))
    rich = message.get_body(("html",))
    assert plain and rich
    found = plain.get_content().replace("\r\n", "\n")
    assert found == (expected if expected.endswith("\n") else f"{expected}\n")
    assert rich.get_content().replace("\r\n", "\n") == f"<p>{expected}</p>\n"


def test_the_structure() -> None:
    picture, file = Attachment("a.png", "image/png", PNG, cid="p"), Attachment("a.csv", "text/csv", b"a,b")
    both = {"text": "t", "html": "<img src=cid:p>"}
    alternative = ("multipart/alternative", ["text/plain", "text/html"])
    assert structure(parsed(text="t")) == "text/plain"
    assert structure(parsed(**both)) == alternative
    assert structure(parsed(**both, attachments=[picture])) == ("multipart/related", [alternative, "image/png"])
    assert structure(parsed(**both, attachments=[file, picture])) == (
        "multipart/mixed", [("multipart/related", [alternative, "image/png"]), "text/csv"],
    )  # fmt: skip
    assert structure(parsed(text="t", attachments=[picture])) == ("multipart/mixed", ["text/plain", "image/png"])


@pytest.mark.parametrize("length", [0, 1, 56, 57, 58, 56_999, 57_000, 57_001, 200_000])
@pytest.mark.parametrize("encoded", [False, True])
def test_a_picture_arrives_byte_for_byte_and_once(length: int, encoded: bool) -> None:
    picture = random.Random(length).randbytes(length)
    given = {"base64": base64.b64encode(picture)} if encoded else {"data": picture}
    message = parsed(
        html="<img src='cid:p@x'>", attachments=[Attachment("garage.jpg", "image/jpeg", cid="p@x", **given)]
    )
    found = [part for part in message.walk() if part.get_content_type() == "image/jpeg"]
    assert len(found) == 1
    assert found[0].get_content() == picture
    assert (found[0].get_filename(), found[0]["Content-ID"]) == ("garage.jpg", "<p@x>")
    assert found[0].get_content_disposition() == "attachment"


@pytest.mark.parametrize("length", [0, 1, 75, 76, 77, 75_999, 76_000, 76_001, 152_000, 200_003])
def test_base64_lines_are_those_of_the_standard_library(length: int) -> None:
    raw = random.Random(length).randbytes(length)
    assert b"".join(smtp.wrap_base64(base64.b64encode(raw))) == base64.encodebytes(raw).replace(b"\n", b"\r\n")


@pytest.mark.parametrize(
    ("name", "arrives"),
    [
        ("a.jpg", "a.jpg"), ("با دوربین.jpg", "با دوربین.jpg"), ("车库.png", "车库.png"),
        ('a"b;c=d.jpg', "a_b;c=d.jpg"),
        ("../../etc/passwd", ".._.._etc_passwd"), ("C:\\x\\y.jpg", "C:_x_y.jpg"), ("a b.jpg", "a b.jpg"), ("", "file"),
        ("x" * 500 + ".jpg", "x" * 60 + ".jpg"), ("摄" * 500 + ".jpg", "摄" * 60 + ".jpg"), ("👍" * 100, "👍" * 70),
    ],
)  # fmt: skip
def test_file_names(name: str, arrives: str) -> None:
    message = parsed(attachments=[Attachment(name, "image/jpeg", b"x")])
    (part,) = message.iter_attachments()
    assert part.get_filename() == arrives


def test_the_same_mail_as_the_email_package_makes() -> None:
    subject, text, rich = "DVR ALERT: باز شد - 车库", "سلام\nدنیا\n", "<p>سلام</p>\n"
    ours = parsed(
        subject=subject, sender="Relay <relay@example.com>", to=["ann@example.com"], cc=["bob@example.com"],
        text=text, html=rich,
        attachments=[Attachment("车库.png", "image/png", PNG, cid="p@x"), Attachment("events.csv",
        "text/csv", b"a,b\r\n")],
        date=1_700_000_000.0, message_id="<1@x>", headers={"Auto-Submitted": "auto-generated"},
    )  # fmt: skip
    theirs = email.message.EmailMessage(policy=email.policy.SMTP)
    theirs["Date"] = email.utils.formatdate(1_700_000_000, localtime=True)
    theirs["From"], theirs["To"], theirs["Cc"] = "Relay <relay@example.com>", "ann@example.com", "bob@example.com"
    theirs["Subject"], theirs["Message-ID"], theirs["Auto-Submitted"] = subject, "<1@x>", "auto-generated"
    theirs.set_content(text)
    theirs.add_alternative(rich, subtype="html")
    theirs.get_payload()[1].add_related(PNG, "image", "png", cid="<p@x>", filename="车库.png", disposition="attachment")
    theirs.add_attachment(b"a,b\r\n", "text", "csv", filename="events.csv")
    again = email.message_from_bytes(theirs.as_bytes(), policy=email.policy.default)
    assert isinstance(again, email.message.EmailMessage)

    def leaves(message: email.message.EmailMessage) -> list[object]:
        return [(part.get_content_type(), part.get_filename(), part["Content-ID"],
                 bytes(part.get_payload(decode=True) or b"")
                 .replace(b"\r\n", b"\n")) for part in message.walk() if not part.is_multipart()]  # fmt: skip

    assert leaves(ours) == leaves(again)
    for name in ("Date", "From", "To", "Cc", "Subject", "Message-ID", "Auto-Submitted", "MIME-Version"):
        assert ours[name] == again[name], name


def test_related_names_the_type_of_its_first_part() -> None:
    message = parsed(html="<img src=cid:p>", attachments=[Attachment("a.png", "image/png", PNG, cid="p")])
    assert message["Content-Type"].params["type"] == "multipart/alternative"  # RFC 2387 3.1


def test_content_id_is_a_function_of_its_key() -> None:
    one = smtp.content_id("key", "Relay <relay@example.com>")
    assert one == smtp.content_id("key", "other@example.com") != smtp.content_id("key2", "relay@example.com")
    assert re.fullmatch(r"[0-9a-f]{40}@example\.com", one)


def test_a_message_id_is_a_function_of_its_key() -> None:
    one = smtp.message_id("key", "Relay <relay@example.com>")
    assert one == smtp.message_id("key", "other@example.com") != smtp.message_id("key2", "relay@example.com")
    assert re.fullmatch(r"<[0-9a-f]{40}@example\.com>", one)
    assert smtp.message_id("\ud800", "").endswith("@localhost>")


def test_without_a_message_id_each_mail_gets_its_own() -> None:
    first, second = parsed()["Message-ID"], parsed()["Message-ID"]
    assert first != second and first.endswith("@example.com>")


def test_long_references_are_not_encoded() -> None:
    references = " ".join(f"<{n}.{'x' * 30}@example.com>" for n in range(60))
    data = compose(subject="s", sender="a@b.c", to=["d@e.f"], headers={"References": references})
    assert b"=?" not in data
    assert parsed(headers={"References": references})["References"] == references
