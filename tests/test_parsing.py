"""From the bytes of a mail to its command and its attachment: tables of what strangers send."""

from __future__ import annotations

import base64
import time
import tracemalloc

import pytest

import embedded_smtpd as device
from embedded_smtpd import Refused, parts, read_command, read_letter, the_attachment


def letter(headers: bytes, body: bytes = b"x\r\n") -> device.Letter:
    return read_letter(headers + b"\r\n\r\n" + body)


SUBJECTS = [
    (b"Subject: CMD STATUS", "CMD STATUS"),
    (b"subject:CMD STATUS", "CMD STATUS"),
    (b"Subject : CMD STATUS", "CMD STATUS"),
    (b"Subject: CMD\r\n SET\r\n\tname=a", "CMD SET name=a"),
    (b"Subject: =?utf-8?q?CMD_STATUS?=", "CMD STATUS"),
    (b"Subject: =?utf-8?b?Q01EIFNUQVRVUw==?=", "CMD STATUS"),
    (b"Subject: =?utf-8?q?CMD_SET?=\r\n =?utf-8?q?_name=3Dx?=", "CMD SET name=x"),
    (b"Subject: =?iso-8859-1?q?caf=E9?=", "café"),
    ("Subject: CMD SET name=دروازه 北門".encode(), "CMD SET name=دروازه 北門"),
    (b"Subject: \xff\xfe", "\ufffd\ufffd"),
    (b"Subject:", ""),
    (b"From: a@b", ""),
    (b"no colon\r\nSubject: CMD STATUS", "CMD STATUS"),
]


@pytest.mark.parametrize("headers, subject", SUBJECTS)
def test_subject_is_read_as_a_person_reads_it(headers: bytes, subject: str) -> None:
    assert letter(headers).subject == subject


REFUSED = [
    (b"Subject: a\r\nSubject: b", device.TWO_SUBJECTS),
    (b"Subject: a\r\nsubject : b", device.TWO_SUBJECTS),
    (b"From: a@b\r\nFrom: c@d", device.CANNOT_PARSE),
    (b"Message-ID: <a@b>\r\nMessage-ID: <c@d>", device.CANNOT_PARSE),
    (b"Content-Type: text/plain\r\nContent-Type: text/html", device.CANNOT_PARSE),
    (b"Subject: =?utf-8?q?STATUS=0AREBOOT?=", device.CANNOT_PARSE),
    (b"Subject: =?utf-8?q?STATUS=00?=", device.CANNOT_PARSE),
    (b"Subject: =?utf-8?q?a=E2=80=AEb?=", device.CANNOT_PARSE),
    (b"Subject: a\x1b[2Jb", device.CANNOT_PARSE),
    (b"Subject: =?x-evil?q?CMD?=", device.CANNOT_PARSE),
    (b"Subject: =?utf-8?b?Q?=", device.CANNOT_PARSE),
    (b"\r\n".join(b"X-%d: y" % n for n in range(1001)), device.CANNOT_PARSE),
    (b"X: " + b"y" * 70_000, device.CANNOT_PARSE),
]


@pytest.mark.parametrize("headers, reply", REFUSED)
def test_headers_that_mislead_are_refused_for_good(headers: bytes, reply: bytes) -> None:
    with pytest.raises(Refused) as refused:
        letter(headers)
    assert refused.value.reply == reply and reply.startswith(b"550")


@pytest.mark.parametrize(
    "subject, expected",
    [
        ("CMD STATUS", ("STATUS", "", "STATUS", "")),
        ("cmd status", ("STATUS", "", "status", "")),
        ("CMD SET relay1=on ~ABC", ("SET", "relay1=on", "SET relay1=on", "abc")),
        ("CMD RELAY 1 ON", ("RELAY", "1 ON", "RELAY 1 ON", "")),
        ("CMD", None),
        ("", None),
        ("STATUS", None),
        ("CMD DANCE", None),
        ("CMD ~abc", None),
        ("Re: CMD STATUS", None),
        ("Fwd: CMD STATUS", None),
        ("Quoted: CMD REBOOT", None),
        ("CMDSTATUS", None),
    ],
)
def test_command_is_the_head_and_a_known_verb(subject: str, expected: tuple[str, ...] | None) -> None:
    assert read_command(subject) == expected


@pytest.mark.parametrize(
    "header, address",
    [
        ("a@b.c", "a@b.c"),
        ("A <A@B.c>", "a@b.c"),
        ('"Doe, John" <a@b.c>', "a@b.c"),
        ("=?utf-8?q?=D8=A7?= <a@b.c>", "a@b.c"),
        ("a@b.c (me)", "a@b.c"),
        ("a@b.c, d@e.f", ""),
        ("alice@ok.org]<evil@x>", ""),
        ("Alice <alice@ok.org> <evil@x>", ""),
        ("group: a@b.c;", ""),
        ("", ""),
        ("(" * 300 + "a@b.c", ""),
        ('"ops@example.com" <evil@x.y>', "evil@x.y"),
    ],
)
def test_sender_is_exactly_one_address_or_nobody(header: str, address: str) -> None:
    assert letter(b"From: " + header.encode()).sender == address


@pytest.mark.parametrize(
    "header, automatic",
    [
        (b"Auto-Submitted: no", False),
        (b"Auto-Submitted: auto-replied", True),
        (b"Auto-Submitted: auto-generated; x=y", True),
        (b"Precedence: bulk", True),
        (b"Precedence: first-class", False),
        (b"List-Id: <l.x>", True),
        (b"Return-Path: <>", True),
        (b"Return-Path: <a@b>", False),
    ],
)
def test_automatic_mail_is_recognised(header: bytes, automatic: bool) -> None:
    assert letter(header).automatic is automatic


def mixed(*sections: bytes, boundary: bytes = b"bb") -> bytes:
    head = b'Subject: x\r\nContent-Type: multipart/mixed; boundary="' + boundary + b'"\r\n\r\npreamble\r\n'
    marked = b"".join(b"--" + boundary + b"\r\n" + section + b"\r\n" for section in sections)
    return head + marked + b"--" + boundary + b"--\r\nepilogue\r\n"


def attached(data: bytes, encoding: bytes, name: bytes = b'; filename="x.bin"') -> bytes:
    head = b"Content-Type: application/octet-stream\r\nContent-Disposition: attachment" + name
    return head + b"\r\nContent-Transfer-Encoding: " + encoding + b"\r\n\r\n" + data


TEXT = b"Content-Type: text/plain\r\n\r\nhello"


@pytest.mark.parametrize(
    "section, data",
    [
        (attached(b"aGVs\r\n bG8=\r\n", b"base64"), b"hello"),
        (attached(b"aGVsbG8=", b"BASE64"), b"hello"),
        (attached(b"h=65llo=\r\n!", b"quoted-printable"), b"hello!"),
        (attached(b"hello", b"7bit"), b"hello"),
        (attached(b"\xff\xfe", b"8bit"), b"\xff\xfe"),
        (attached(b"", b"base64"), b""),
        (b"Content-Disposition: attachment\r\n\r\nhello", b"hello"),
        (b"Content-Type: application/x; name=f\r\n\r\nhello", b"hello"),
    ],
)
def test_attachment_is_decoded_byte_for_byte(section: bytes, data: bytes) -> None:
    assert the_attachment(mixed(TEXT, section)) == data
    assert the_attachment(mixed(section, TEXT)) == data


def test_parts_of_a_mail_that_was_cut_off_can_still_be_looked_at() -> None:
    content = mixed(TEXT, attached(b"aGVsbG8=", b"base64")).partition(b"\r\n--bb--")[0]
    assert [part.data() for part in parts(content, cut=True)] == [b"hello"] * 2


def test_attachment_inside_nested_parts_is_found() -> None:
    inner = mixed(TEXT, attached(b"aGVsbG8=", b"base64"), boundary=b"in")
    assert the_attachment(mixed(inner)) == b"hello"


def test_mail_that_is_one_attachment_counts_as_it() -> None:
    assert the_attachment(b"Content-Type: application/octet-stream\r\n\r\nhello") == b"hello"


@pytest.mark.parametrize("sections", [(), (TEXT,), (attached(b"", b"7bit"), attached(b"", b"7bit"))])
def test_none_or_several_attachments_are_none(sections: tuple[bytes, ...]) -> None:
    assert the_attachment(mixed(*sections)) is None


@pytest.mark.parametrize("kind", sorted(device.ENCLOSURES))
def test_cards_keys_and_signatures_of_a_mail_program_are_not_the_attachment_unless_they_are_alone(kind: str) -> None:
    added = f"Content-Type: {kind}; name=x\r\nContent-Disposition: attachment\r\n\r\nadded".encode()
    assert the_attachment(mixed(TEXT, attached(b"aGVsbG8=", b"base64"), added)) == b"hello"
    assert the_attachment(mixed(TEXT, added)) == b"added"


@pytest.mark.parametrize(
    "content",
    [
        mixed(attached(b"!!!!", b"base64")),
        mixed(attached(b"YQ", b"base64")),
        mixed(attached(b"YQ==YQ==", b"base64")),
        mixed(attached(b"YWJj=", b"base64")),
        mixed(attached(b"x", b"x-uuencode")),
        b"Content-Type: multipart/mixed\r\n\r\n",
        mixed(TEXT, boundary=b"x" * 71),
        mixed(*[TEXT] * 101),
        mixed(attached(b"aGVsbG8=", b"base64")).partition(b"--bb--")[0],
        mixed(attached(b"hello", b"7bit")).partition(b"\r\n--bb--")[0],
        mixed(mixed(TEXT, boundary=b"in").partition(b"--in--")[0], attached(b"hello", b"7bit")),
    ],
)
def test_attachment_that_is_not_exact_is_refused(content: bytes) -> None:
    with pytest.raises(Refused):
        the_attachment(content)


def test_file_that_outlook_packed_is_refused_with_what_to_do() -> None:
    packed = base64.b64encode(b"\x78\x9f\x3e\x22" + bytes(100))
    with pytest.raises(Refused, match=r"winmail\.dat: send the mail as HTML or plain text"):
        the_attachment(mixed(TEXT, attached(packed, b"base64")))


def test_line_ends_that_are_refused_are_refused_with_the_cure() -> None:
    assert b"end each line with CR LF" in device.BARE_BYTES and len(device.BARE_BYTES) <= 512


def test_parts_that_only_hold_others_count_too() -> None:
    empty = [mixed(boundary=b"in%d" % number) for number in range(60)]
    assert len(parts(mixed(TEXT, *empty[:40]))) == 1
    with pytest.raises(Refused):
        parts(mixed(mixed(*empty, boundary=b"a"), mixed(*empty, boundary=b"b")))


@pytest.mark.parametrize("charset", [b"=x-none", b"=undefined", b"=idna", b"=punycode", b"=hex", b"=utf-8*", b"*=us-ascii''%00"])
def test_text_of_an_odd_charset_is_read_as_utf_8_and_quickly(charset: bytes) -> None:
    began = time.perf_counter()
    (part,) = parts(b"Content-Type: text/plain; charset" + charset + b"\r\n\r\n" + "café ".encode() * 50_000)
    assert part.text() == "café " * 50_000
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize(
    "given, cleaned",
    [
        ('filename="../../etc/passwd"', "passwd"),
        ('filename="/etc/cron.d/x"', "x"),
        (r'filename="C:\\win\\x.exe"', "x.exe"),
        ("filename*=utf-8''..%2f..%2fx", "x"),
        ('filename*0="../"; filename*1="../x"', "x"),
        ('filename="=?utf-8?b?Li4vLi4veA==?="', "x"),
        ("filename*=utf-8''a%E2%80%AEgpj.exe", "a_gpj.exe"),
        ('filename=".."', ""),
        ('filename="x%00y"', "x_00y"),
        ("filename*=utf-8''%D8%B9%DA%A9%D8%B3.jpg", "عکس.jpg"),
        ('filename="' + "x" * 500 + '"', "x" * 100),
    ],
)
def test_file_name_is_a_label_and_never_a_path(given: str, cleaned: str) -> None:
    (part,) = parts(mixed(attached(b"", b"7bit", b"; " + given.encode())))
    assert part.filename == cleaned


def nested(depth: int) -> bytes:
    content = TEXT
    for level in range(depth):
        content = mixed(content, boundary=b"b%d" % level)
    return content


BOMBS = {
    "deep nesting": nested(300),
    "many parts": mixed(*[b"\r\nx"] * 50_000),
    "many headers": b"X: y\r\n" * 100_000 + b"\r\n",
    "parentheses": b"From: " + b"(" * 60_000 + b"\r\nContent-Type: multipart/mixed\r\n\r\n",
    "semicolons": b"Content-Type: multipart/mixed" + b";" * 60_000 + b"\r\n\r\n",
    "parameters": b"Content-Type: multipart/mixed" + b'; x="' * 10_000 + b"\r\n\r\n",
    "quotes": b'From: "' + b'\\"' * 30_000 + b"\r\nContent-Type: multipart/mixed\r\n\r\n",
    "huge boundary": mixed(TEXT, boundary=b"x" * 60_000),
    "part header": mixed(b"X: " + b"y" * 1_000_000),
    "encoded words": b"Subject: " + b"=?utf-8?q?a?= " * 4_000 + b"\r\nContent-Type: multipart/mixed\r\n\r\n",
    "folded lines": b"Subject: a" + b"\r\n b" * 900 + b"\r\nContent-Type: multipart/mixed\r\n\r\n",
    "a tree of multiparts": mixed(*[mixed(*[mixed(*[mixed(boundary=b"d")] * 30, boundary=b"c")] * 30, boundary=b"b")] * 30, boundary=b"a"),
    "delimiters": b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"\r\n--b" * 300_000,
    "base64": mixed(attached(b"A\r\n" * 1_000_001, b"base64")),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_costs_less_than_a_second_and_is_refused_for_good(name: str) -> None:
    began = time.perf_counter()
    with pytest.raises(Refused) as refused:
        read = read_letter(BOMBS[name])
        assert read.sender == ""
        the_attachment(BOMBS[name])
    assert refused.value.reply.startswith(b"550")
    assert time.perf_counter() - began < 1


def test_bomb_costs_a_few_megabytes() -> None:
    tracemalloc.start()
    with pytest.raises(Refused):
        the_attachment(BOMBS["many parts"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20  # other threads of this process count, too


def test_large_attachment_is_read_quickly() -> None:
    data = bytes(range(256)) * 40_000
    content = mixed(TEXT, attached(base64.encodebytes(data).replace(b"\n", b"\r\n"), b"base64"))
    began = time.perf_counter()
    assert the_attachment(content) == data
    assert time.perf_counter() - began < 1
