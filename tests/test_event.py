"""Lines of the wire protocol, as a table: bytes in, an event or the code of a refusal out. No socket, no file."""

import base64
import hashlib
import json
import random
import struct
import sys
import threading
import time
import tracemalloc
import zlib
from typing import Any

import pytest

import server
import smtp_module as smtp

NOW = 1_700_000_000.0
TOKEN = "s3cret-ключ"
GOOD: dict[str, Any] = {"event": "MOTION_DETECTED", "camera": "cam1"}
HEAD = b'{"event": "MOTION_DETECTED", "camera": "cam1"'


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(length: int) -> bytes:
    """A real PNG, `length` bytes and more."""
    noise = random.Random(1).randbytes(length)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)),
            chunk(b"tEXt", noise),
            chunk(b"IDAT", zlib.compress(b"\0\0\0\0")),
            chunk(b"IEND", b""),
        )
    )


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


SMALL, LARGE = b64(png(20)), b64(png(30_000))


def parse(line: bytes, token: str = "") -> Any:
    return server.parse_line(line, hashlib.sha256(token.encode()).digest() if token else b"", NOW)


def outcome(line: bytes, token: str = "") -> str:
    """The code of the refusal, or what came of the line."""
    try:
        parsed = parse(line, token)
    except server.Refusal as refusal:
        assert refusal.closes == (refusal.code == "unauthorized")
        answer = json.loads(server.refusal_line(refusal))
        assert answer == {"ok": False, "error": refusal.code, "detail": refusal.detail}
        assert refusal.detail and smtp.printable(refusal.detail, 1000) == refusal.detail
        return refusal.code
    return {server.Event: "event", server.Heartbeat: "heartbeat", server.Ping: "ping"}[type(parsed)]


def event(**fields: Any) -> Any:
    return parse(json.dumps(GOOD | fields, ensure_ascii=False).encode())


def content(parsed: Any) -> dict[str, Any]:
    kept = json.loads(parsed.entry.payload)
    assert isinstance(kept, dict)
    return kept


def with_camera(camera: str) -> bytes:
    return json.dumps({"event": "E", "camera": camera}).encode()


LINES: list[tuple[str, bytes, str]] = [
    # what json itself cannot survive, or takes though it should not
    ("J1 1,000 open brackets", b"[" * 1_000, "bad_json"),
    ("J1 1,000,000 open brackets", b"[" * 1_000_000, "bad_json"),
    ("J1 100,000 nested objects", b'{"a":' * 100_000, "bad_json"),
    ("J1 balanced, 20,000 deep", HEAD + b', "x": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "bad_json"),
    ("J1 as deep as is allowed", HEAD + b', "x": ' + b"[" * 15 + b"]" * 15 + b"}", "event"),
    ("J1 one deeper", HEAD + b', "x": ' + b"[" * 16 + b"]" * 16 + b"}", "bad_json"),
    ("J1 many brackets side by side", HEAD + b', "x": [' + b"[]," * 5_000 + b"{}]}", "event"),
    ("J1 brackets in strings are no nesting", HEAD + b', "x": "' + b"[{" * 500 + b'"}', "event"),
    ("J1 a million values", HEAD + b', "x": [' + b"0," * 1_000_000 + b"0]}", "bad_json"),
    ("J1 brackets behind escapes", HEAD + b', "x": "\\\\\\"' + b"[" * 40 + b'\\\\"}', "event"),
    ("J1 nested behind escapes", HEAD + b', "x": "\\\\", "y": ' + b"[" * 40 + b"]" * 40 + b"}", "bad_json"),
    ("J1 four million empty strings", HEAD + b', "x": [' + b'"",' * 4_000_000 + b"0]}", "bad_json"),
    ("J1 sixteen million open braces", b"{" * (16 << 20), "bad_json"),
    ("J1 a million fields of meta", HEAD + b', "meta": {' + b'"k":1,' * 1_000_000 + b'"k":1}}', "bad_json"),
    ("J2 a number of 5,000 digits", b'{"n": ' + b"9" * 5_000 + b"}", "bad_json"),
    ("J2 a number of a million digits", HEAD + b', "n": ' + b"9" * 1_000_000 + b"}", "bad_json"),
    ("J2 an id that is a number", HEAD + b', "id": 1e3}', "bad_event"),
    ("J3 NaN", HEAD + b', "meta": {"a": NaN}}', "bad_json"),
    ("J3 Infinity in an unknown field", HEAD + b', "x": Infinity}', "bad_json"),
    ("J3 -Infinity", HEAD + b', "x": -Infinity}', "bad_json"),
    ("J3 1e400 in meta", HEAD + b', "meta": {"a": 1e400}}', "bad_event"),
    ("J3 1e400 in an unknown field", HEAD + b', "x": 1e400}', "event"),
    ("J4 the last of two keys counts", HEAD + b', "camera": 5}', "bad_event"),
    ("J5 half a surrogate pair as camera", b'{"event": "E", "camera": "\\ud800"}', "bad_event"),
    ("J5 half a surrogate pair in meta", HEAD + b', "meta": {"a": "\\udfff"}}', "bad_event"),
    ("J5 half a surrogate pair as a key of meta", HEAD + b', "meta": {"\\ud800": 1}}', "bad_event"),
    ("J5 half a surrogate pair in image_url", HEAD + b', "image_url": "http://a/\\ud800"}', "bad_event"),
    ("J5 half a surrogate pair inside a timestamp", HEAD + b', "timestamp": "2026-05-01\\ud80010:00:00"}', "event"),
    ("J5 half a surrogate pair in an unknown field", HEAD + b', "x": "\\ud800"}', "event"),
    ("J5 a whole pair", b'{"event": "E", "camera": "\\ud83d\\udcf7"}', "event"),
    ("J6 surrogates as bytes", b'{"event": "E", "camera": "\xed\xa0\x80"}', "bad_json"),
    ("J6 UTF-16", '{"event": "E", "camera": "c"}'.encode("utf-16"), "bad_json"),
    ("J6 UTF-16 big-endian", '{"event": "E", "camera": "c"}'.encode("utf-16-be"), "bad_json"),
    ("J6 UTF-32", '{"event": "E", "camera": "c"}'.encode("utf-32"), "bad_json"),
    ("J7 a byte order mark", b"\xef\xbb\xbf" + HEAD + b"}", "bad_json"),
    ("J8 no UTF-8", b'{"event": "E", "camera": "\xff"}', "bad_json"),
    ("J8 Latin-1", '{"event": "E", "camera": "é"}'.encode("latin-1"), "bad_json"),
    ("J8 an overlong slash", b'{"event": "E", "camera": "\xc0\xaf"}', "bad_json"),
    ("J9 NUL, escaped", b'{"event": "E", "camera": "a\\u0000b"}', "bad_event"),
    ("J9 NUL, raw", b'{"event": "E", "camera": "a\x00b"}', "bad_json"),
    ("J10 CRLF", HEAD + b"}\r", "event"),
    ("J10 spaces around", b"  \t" + HEAD + b"}   ", "event"),
    ("J10 a vertical tab before", b"\x0b" + HEAD + b"}", "bad_json"),
    ("J10 a no-break space before", b"\xc2\xa0" + HEAD + b"}", "bad_json"),
    ("J11 cut off", HEAD, "bad_json"),
    ("J12 two objects", HEAD + b"}" + HEAD + b"}", "bad_json"),
    *[(f"J13 {text!r} is no object", text, "bad_json") for text in (b"5", b'"x"', b"[]", b"null", b"true", b"{", b"x")],
    ("J13 an empty object", b"{}", "bad_event"),
    # types
    ("J14 event is a list", b'{"event": ["x"], "camera": "c"}', "bad_event"),
    ("J14 event is a number", b'{"event": 5, "camera": "c"}', "bad_event"),
    ("J14 event is false", b'{"event": false, "camera": "c"}', "bad_event"),
    ("J14 event is null", b'{"event": null, "camera": "c"}', "bad_event"),
    ("J14 camera is an object", b'{"event": "E", "camera": {}}', "bad_event"),
    ("J14 camera is null", b'{"event": "E", "camera": null}', "bad_event"),
    ("J14 camera is missing", b'{"event": "E"}', "bad_event"),
    ("J14 id is true", HEAD + b', "id": true}', "bad_event"),
    ("J14 timestamp is a number", HEAD + b', "timestamp": 1700000000}', "bad_event"),
    ("J14 meta is a list", HEAD + b', "meta": [1]}', "bad_event"),
    ("J14 every optional field is null",
     HEAD + b', "id": null, "timestamp": null, "image_filename": null, "image_b64": null, "image_url": null,'
     b' "meta": null, "token": null, "heartbeat": null, "ping": null}', "event"),
    ("unknown fields", HEAD + b', "zone": [1, {"a": null}], "": 0, "score": 0.5}', "event"),
    # names
    ("event of 64", json.dumps(GOOD | {"event": "e" * 64}).encode(), "event"),
    ("event of 65", json.dumps(GOOD | {"event": "e" * 65}).encode(), "bad_event"),
    ("event is empty", json.dumps(GOOD | {"event": ""}).encode(), "bad_event"),
    ("event with every sign", json.dumps(GOOD | {"event": "aZ09_.-"}).encode(), "event"),
    ("event with a colon, as our own have", json.dumps(GOOD | {"event": server.SUMMARY}).encode(), "bad_event"),
    ("event ends with a line break", json.dumps(GOOD | {"event": "E\n"}).encode(), "bad_event"),
    ("event in Arabic digits", json.dumps(GOOD | {"event": "E٣"}).encode(), "bad_event"),
    ("camera of 128", with_camera("ک" * 128), "event"),
    ("camera of 129", with_camera("c" * 129), "bad_event"),
    ("camera is empty", with_camera(""), "bad_event"),
    ("camera is white space", with_camera(" \t　 "), "bad_event"),
    *[(f"camera that shows nothing: {name!a}", with_camera(name), "bad_event")
      for name in ("\u200c\u200d", "\u3164", "\u2800", "\u00ad", "\u2003", "\u115f\u1160", "\u180e", "\ufff9", "\uffa0", "\u034f",
                   "\ufe0f", "\u2060\u2064", "\U000e0041\U000e007f", "\U000e0100", "\U0001d173", " \u3164\u200d ", "\u2800" * 128)],
    *[(f"camera that shows something: {name!a}", with_camera(name), "event")
      for name in ("\u3164a", "\u2801", "cam\u00ad1", "\u0301", "\U0001f3f4\U000e0067\U000e0062\U000e007f", "\u2764\ufe0f", "=1+1", "\ufffd")],
    ("camera of 129 that show nothing", with_camera("\u2800" * 129), "bad_event"),
    ("camera of a million spaces", with_camera(" " * 1_000_000), "bad_event"),
    ("camera is one emoji with a joiner", with_camera("👩‍🚒"), "event"),
    ("camera with Persian half-space", with_camera("دوربین‌ها"), "event"),
    ("camera with an ideographic space", with_camera("前门　摄像头"), "event"),
    ("camera with a thousand accents", with_camera("e" + "\u0301" * 1_000), "bad_event"),
    *[(f"camera with U+{ord(char):04X}", with_camera(f"a{char}b"), "bad_event")
      for char in "\n\r\t\0\x0b\x0c\x1b\x1c\x1d\x1e\x7f\x85\x9b\u2028\u2029\u061c\u200e\u200f\u202a\u202b\u202c\u202d"
      "\u202e\u2066\u2067\u2068\u2069"],
    ("H1 a header in the camera", with_camera("a\r\nBcc: x@y.org"), "bad_event"),
    ("H2 a line break at its end", with_camera("cam\n"), "bad_event"),
    ("H5 an encoded word is a name like any", with_camera("=?utf-8?q?=0ABcc:x?="), "event"),
    ("X1 markup is a name like any", with_camera('<script>alert("x")</script>'), "event"),
    ("id of 128", json.dumps(GOOD | {"id": "i" * 128}).encode(), "event"),
    ("D2 id of 129", json.dumps(GOOD | {"id": "i" * 129}).encode(), "bad_event"),
    ("D2 id is empty", json.dumps(GOOD | {"id": ""}).encode(), "bad_event"),
    ("D2 id with every sign", json.dumps(GOOD | {"id": "aZ09._:-"}).encode(), "event"),
    ("D2 id with a slash", json.dumps(GOOD | {"id": "a/b"}).encode(), "bad_event"),
    ("D2 id with a space", json.dumps(GOOD | {"id": "a b"}).encode(), "bad_event"),
    ("D2 id with an accent", json.dumps(GOOD | {"id": "é"}).encode(), "bad_event"),
    ("D2 id with a line break", json.dumps(GOOD | {"id": "a\n"}).encode(), "bad_event"),
    # times
    *[(f"timestamp {text!r}", json.dumps(GOOD | {"timestamp": text}).encode(), "event")
      for text in ("2026-05-01T22:15:00Z", "2026-05-01T22:15:00+03:30", "2026-05-01 22:15:00",
                   "2026-05-01T22:15:00.123456", "2026-05-01T22:15:00.123456789Z",
                   "20260501T221500Z", "2026-05-01", "1970-01-01T00:00:00Z",
                   "1938-04-24T22:13:20Z")],
    *[(f"C1 timestamp {text!r}", json.dumps(GOOD | {"timestamp": text}).encode(), "bad_event")
      for text in ("", " 2026-05-01T22:15:00Z", "2026-05-01T22:15:00Z\n",
                   "yesterday", "1700000000.5.5", "2026-13-01T00:00:00Z", "2026-02-30", "2026-05-01T25:00:00Z",
                   "22:15",
                   "2026-05-01T22:15:00+99:00", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "∞",
                   "2026-05-01T22:15:00Z\nBcc: x", "٢٠٢٦-٠٥-٠١", "-2026-05-01T00:00:00Z",
                   "2026-05-01T22:15:00Z" * 500, "2026-05-01T22:15:00." + "1" * 60 + "Z")],
    # links
    *[(f"image_url {text!r}", json.dumps(GOOD | {"image_url": text}).encode(), "event")
      for text in ("http://nas.lan/a.jpg", "https://x.org/a?b=c&d=(e)#f", "HTTPS://X.ORG/", "http://[fe80::1]:8080/a'b",
                   "https://例え.jp/画像.jpg", "http://me:secret@cam.lan:8080/snap", "http://x/" + "a" * 3991)],
    *[(f"X1 image_url {text[:40]!r}", json.dumps(GOOD | {"image_url": text}).encode(), "bad_event")
      for text in ("", "nas.lan/a.jpg", "javascript:alert(1)", "data:text/html,x", "file:///etc/passwd", "ftp://x/a.jpg",
                   "//x/a.jpg", "http://", "http:/x",
                   "https:///x", "http://[::1", "http://:80/", "http://?x", "http://a:b/", " http://x/", "http://x/a b", "http://x/\n", 'http://x/"><b>',
                   "http://x/<", "http://x/\u202egpj", "http://x/\0", "http://x/" + "a" * 3992, "http://x\\y",
                   "http://" + "a" * 4000, "http://" + "a" * 1_000_000, "http://" + "a" * 1_000_000 + "@x/", "http://x?" + "a" * 1_000_000)],
    ("image_url is a number", HEAD + b', "image_url": 5}', "bad_event"),
    # meta
    ("meta of 32", json.dumps(GOOD | {"meta": {str(n): n for n in range(32)}}).encode(), "event"),
    ("meta of 33", json.dumps(GOOD | {"meta": {str(n): n for n in range(33)}}).encode(), "bad_event"),
    ("meta of every kind",
     json.dumps(GOOD | {"meta": {"s": "x", "i": -1, "f": 0.5, "b": True, "": ""}}).encode(), "event"),
    ("meta of 32 and a null", json.dumps(GOOD | {"meta": {str(n): n or None for n in range(33)}}).encode(), "event"),
    ("meta with null", json.dumps(GOOD | {"meta": {"a": None}}).encode(), "event"),
    ("meta with a list", json.dumps(GOOD | {"meta": {"a": []}}).encode(), "bad_event"),
    ("meta with an object", json.dumps(GOOD | {"meta": {"a": {}}}).encode(), "bad_event"),
    ("meta with a huge whole number", HEAD + b', "meta": {"a": ' + b"9" * 299 + b"}}", "event"),
    ("meta with a whole number of 4,300 digits", HEAD + b', "meta": {"a": ' + b"9" * 4300 + b"}}", "event"),
    ("meta with a whole number of 4,301 digits", HEAD + b', "meta": {"a": ' + b"9" * 4301 + b"}}", "bad_json"),
    ("meta with a long value", json.dumps(GOOD | {"meta": {"a": "x" * 1_000_000}}).encode(), "event"),
    ("meta with a long key", json.dumps(GOOD | {"meta": {"x" * 1_000_000: 1}}).encode(), "event"),
    ("meta with a long key and a list", json.dumps(GOOD | {"meta": {"x" * 1_000_000: []}}).encode(), "bad_event"),
    ("meta with half a surrogate pair behind the cut", HEAD + b', "meta": {"a": "' + b"x" * 2000 + b'\\ud800"}}', "event"),
    # the other lines
    ("heartbeat", b'{"heartbeat": "cam1"}', "heartbeat"),
    ("heartbeat is a number", b'{"heartbeat": 1}', "bad_event"),
    ("heartbeat is empty", b'{"heartbeat": ""}', "bad_event"),
    ("heartbeat with a control character", b'{"heartbeat": "a\\nb"}', "bad_event"),
    ("event wins over heartbeat and ping", HEAD + b', "heartbeat": 5, "ping": 1}', "event"),
    ("heartbeat wins over ping", b'{"heartbeat": "c", "ping": 1}', "heartbeat"),
    *[(f"ping {value}", b'{"ping": %b}' % value, "ping") for value in (b"1", b"0", b"false", b'"x"', b"{}")],
    ("ping null", b'{"ping": null}', "bad_event"),
    ("N6 HTTP", b"GET / HTTP/1.1\r", "bad_json"),
    ("N6 a TLS ClientHello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "bad_json"),
    ("N6 SSH", b"SSH-2.0-OpenSSH_9.6\r", "bad_json"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), [row[1:] for row in LINES], ids=[row[0] for row in LINES])
def test_line_of_the_table_gets_its_answer(line: bytes, expected: str) -> None:
    assert outcome(line) == expected


def test_no_line_holds_the_others_up() -> None:
    """The parser holds the interpreter's lock: whatever a stranger sends, before any token is looked at."""
    slowest = 0.0
    for _, line, _ in LINES:
        began = time.thread_time()
        outcome(line)
        slowest = max(slowest, time.thread_time() - began)
    assert slowest < 0.5


def test_the_hostile_lines_cost_no_deep_stack() -> None:
    """The relay's threads have small stacks; a C recursion beyond them would end the process."""
    found: list[str] = []
    before = threading.stack_size(server.THREAD_STACK_BYTES)
    try:
        thread = threading.Thread(target=lambda: found.extend(outcome(line) for _, line, _ in LINES))
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert found == [expected for _, _, expected in LINES]


# the token

TOKENS: list[tuple[str, dict[str, Any], str]] = [
    ("right", {**GOOD, "token": TOKEN}, "event"),
    ("missing", GOOD, "unauthorized"),
    ("null", {**GOOD, "token": None}, "unauthorized"),
    ("wrong", {**GOOD, "token": "x"}, "unauthorized"),
    ("empty", {**GOOD, "token": ""}, "unauthorized"),
    ("wrong, of the right length", {**GOOD, "token": TOKEN[:-1] + "x"}, "unauthorized"),
    ("half a surrogate pair", {**GOOD, "token": "\ud800"}, "unauthorized"),
    ("a number", {**GOOD, "token": 5}, "unauthorized"),
    ("a list", {**GOOD, "token": [TOKEN]}, "unauthorized"),
    ("missing, and the event is wrong", {"event": 5}, "unauthorized"),
    ("right, and the event is wrong", {"event": 5, "token": TOKEN}, "bad_event"),
    ("heartbeat without", {"heartbeat": "c"}, "unauthorized"),
    ("heartbeat with", {"heartbeat": "c", "token": TOKEN}, "heartbeat"),
    ("ping without", {"ping": 1}, "ping"),
    ("ping with a wrong one is a guess like any", {"ping": 1, "token": "x"}, "unauthorized"),
    ("neither event nor ping, with a wrong one", {"token": "x"}, "unauthorized"),
    ("neither event nor ping", {}, "bad_event"),
]


@pytest.mark.parametrize(("fields", "expected"), [row[1:] for row in TOKENS], ids=[row[0] for row in TOKENS])
def test_token_of_the_table_gets_its_answer(fields: dict[str, Any], expected: str) -> None:
    assert outcome(json.dumps(fields).encode(), TOKEN) == expected


def test_ping_may_know_the_counts_only_with_the_token() -> None:
    assert parse(b'{"ping": 1}').trusted
    assert not parse(b'{"ping": 1}', TOKEN).trusted
    assert parse(json.dumps({"ping": 1, "token": TOKEN}).encode(), TOKEN).trusted


def test_a_token_longer_than_any_is_wrong_without_being_read_whole() -> None:
    longest = "t" * server.TOKEN_MAX
    assert outcome(json.dumps({**GOOD, "token": longest}).encode(), longest) == "event"
    assert outcome(json.dumps({**GOOD, "token": longest + "t"}).encode(), longest) == "unauthorized"
    assert outcome(json.dumps({**GOOD, "token": "t" * 5_000_000}).encode(), longest) == "unauthorized"


def test_token_is_kept_nowhere() -> None:
    assert TOKEN not in parse(json.dumps({**GOOD, "token": TOKEN}).encode(), TOKEN).entry.payload.decode()


# what is kept


def test_event_without_an_id_gets_a_fresh_one() -> None:
    first, second = event(), event()
    assert first.entry.unique and first.entry.id != second.entry.id and server.EVENT_ID.fullmatch(first.entry.id)
    assert not event(id="x").entry.unique


def test_event_keeps_its_fields_and_its_lane() -> None:
    parsed = event(camera="باغ", meta={"zone": 2, "hot": True, "none": None}, image_url="http://x/a.jpg", extra=[1])
    assert (parsed.entry.kind, parsed.entry.source) == ("MOTION_DETECTED", "باغ")
    assert parsed.entry.arrived == NOW
    assert content(parsed) == {
        "event": "MOTION_DETECTED",
        "camera": "باغ",
        "image_url": "http://x/a.jpg",
        "meta": {"zone": 2, "hot": True},
    }


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"note": "x" * 2000}, {"note": "x" * 2000}),
        ({"note": "x" * 2001}, {"note": "x" * 2000}),
        ({"note": "é" * 3_000_000, "zone": 2}, {"note": "é" * 2000, "zone": 2}),
        ({"count": 10**3999}, {"count": "1" + "0" * 1999}),
        ({"count": -(10**1998)}, {"count": -(10**1998)}),
        ({"k" * 100: 1}, {"k" * 100: 1}),
        ({"k" * 101: 1}, {"k" * 100: 1}),
        ({"k" * 101: 1, "k" * 102: "2"}, {"k" * 100: "2"}),
        ({str(n) * 2000: "v" * 9000 for n in range(10, 42)}, {str(n) * 50: "v" * 2000 for n in range(10, 42)}),
    ],
)
def test_too_long_keys_and_values_of_meta_are_cut_and_the_answer_says_so(
    given: dict[str, Any], kept: dict[str, Any]
) -> None:
    parsed = event(meta=given)
    assert content(parsed)["meta"] == kept
    said = "meta cut: a key has at most 100 characters, a value 2000"
    assert parsed.warning == ("" if kept == given else said)
    assert json.loads(server.answer(smtp.PutResult(parsed.entry.id, new=True), parsed)).get("warning", "") == parsed.warning


def test_one_answer_warns_of_a_cut_value_and_of_a_dropped_picture() -> None:
    assert event(meta={"a": "x" * 3000}, image_b64="!").warning == (
        "meta cut: a key has at most 100 characters, a value 2000; image dropped: not valid Base64"
    )


def test_what_is_kept_of_the_largest_event_without_a_picture_is_small() -> None:
    """Of a line of 16 MiB, whatever its fields: digests and caches hold thousands of these."""
    long = "\U0001f4f7" * 1_000_000
    meta = {f"{n}{long}": long for n in range(10)} | {f"n{n}": 10**4200 for n in range(22)}
    parsed = event(meta=meta, image_url="http://x/" + "é" * 3991, camera="\U0001f4f7" * 128, id="i" * 128, x=long)
    assert len(parsed.entry.payload) < 300_000


@pytest.mark.parametrize(
    ("given", "utc"),
    [
        ("2026-05-01T22:15:00", "2026-05-01T22:15:00+00:00"),
        ("2026-05-01T22:15:00Z", "2026-05-01T22:15:00+00:00"),
        ("2026-05-01T22:15:00+03:30", "2026-05-01T18:45:00+00:00"),
        ("2026-05-01T22:15:00-05:00", "2026-05-02T03:15:00+00:00"),
    ],
)
def test_timestamp_without_an_offset_is_utc(given: str, utc: str) -> None:
    assert utc == content(event(timestamp=given))["timestamp"]


def test_absent_timestamp_stays_absent() -> None:
    assert "timestamp" not in content(event())
    assert event(id="a").entry.payload == parse(json.dumps({**GOOD, "id": "a"}).encode()).entry.payload


@pytest.mark.parametrize(
    "change", [{"camera": "cam2"}, {"meta": {"a": 1}}, {"timestamp": "2026-05-01"}, {"image_b64": SMALL}]
)
def test_other_content_is_another_payload_or_picture(change: dict[str, Any]) -> None:
    first, second = event(id="a").entry, event(id="a", **change).entry
    assert (first.payload, first.picture) != (second.payload, second.picture)


def test_unknown_fields_spacing_and_order_are_no_content() -> None:
    line = b'{ "x":1,"id" : "a", "camera":"c\\u0061m1", "event":"MOTION_DETECTED"}'
    assert parse(line).entry.payload == event(id="a").entry.payload


def test_same_id_with_other_content_is_queued_under_another_id(tmp_path: Any) -> None:
    outbox = smtp.Outbox(tmp_path / "spool.db")
    first, again, other = event(id="a"), event(id="a"), event(id="a", image_b64=SMALL)
    answers = []
    for parsed in (first, again, other, other, first):
        (receipt,) = outbox.put([parsed.entry])
        answers.append(json.loads(server.answer(receipt, parsed)))
    outbox.close()
    assert [answer["status"] for answer in answers] == ["queued", "duplicate", "queued", "duplicate", "duplicate"]
    assert answers[0] == {"ok": True, "id": "a", "status": "queued"}
    assert answers[2]["id"] == answers[3]["id"] != "a" and answers[2]["id"].startswith("a-") and answers[2]["warning"]
    assert len(answers[2]["id"]) <= 128


# pictures

BASES = {
    "JPEG": (b"\xff\xd8\xff\xe0" + bytes(50), ".jpg"),
    "PNG": (png(20), ".png"),
    "GIF87": (b"GIF87a" + bytes(50), ".gif"),
    "GIF89": (b"GIF89a" + bytes(50), ".gif"),
    "WebP": (b"RIFF\x10\0\0\nWEBPVP8 " + bytes(50), ".webp"),
    "BMP": (b"BM" + bytes(50), ".bmp"),
}


@pytest.mark.parametrize(("picture", "suffix"), BASES.values(), ids=BASES)
def test_picture_is_known_by_its_first_bytes(picture: bytes, suffix: str) -> None:
    for tail in (b"", b"1", b"12", bytes(9000)):
        parsed = event(image_b64=b64(picture + tail))
        assert not parsed.warning
        assert base64.b64decode(parsed.entry.picture) == picture + tail
        assert content(parsed)["image"] == f"picture{suffix}"


WRONG_PICTURES: list[tuple[str, Any]] = [
    ("B1 no Base64 at all", "!!!!"),
    ("B1 a space", SMALL[:6] + " " + SMALL[7:]),
    ("B1 a line break", SMALL[:76] + "\n" + SMALL[76:]),
    ("B1 a stray sign", SMALL[:5] + "$" + SMALL[6:]),
    ("B1 too much padding", SMALL.rstrip("=")[:8] + "===="),
    ("B1 padding in the middle", "iVBORw0KGg==" + SMALL),
    ("B1 three signs of padding", "A==="),
    ("B1 URL-safe alphabet", SMALL[:8] + "-_-_" + SMALL[12:]),
    ("B1 cut off", SMALL.rstrip("=")[:-1] if len(SMALL.rstrip("=")) % 4 != 1 else SMALL.rstrip("=")[:-2]),
    ("B1 bits that are cut off", b64(b"BMx" + b"\0").replace("AA==", "AB==")),
    ("B1 a data: link", "data:image/png;base64," + SMALL),
    ("B2 not ASCII", SMALL[:4] + "é" + SMALL[5:]),
    ("B2 half a surrogate pair", SMALL[:4] + "\ud800" + SMALL[5:]),
    ("B3 nothing", ""),
    ("B3 one byte", b64(b"x")),
    ("B4 text", b64(b"hello, world")),
    ("B4 HTML", b64(b"<html><script>")),
    ("B4 SVG", b64(b"<svg xmlns='http://www.w3.org/2000/svg'/>")),
    ("B4 ELF", b64(b"\x7fELF" + bytes(60))),
    ("B4 a sound in RIFF", b64(b"RIFF\0\0\0\0WAVEfmt " + bytes(60))),
    *[(f"of the wrong type: {value!r}", value) for value in (5, 0.5, True, False, [], {}, ["x"], {"a": "b"}, 0)],
    ("large, no Base64", LARGE[:5000] + "!" + LARGE[5001:]),
    ("large, padding in the middle", LARGE[:8000] + "====" + LARGE[8000:]),
    ("large, cut off", LARGE[:8001]),
    ("large, no picture", b64(b"hello" * 5000)),
    ("large, with a control character", LARGE[:4000] + "\n" + LARGE[4000:]),
]


@pytest.mark.parametrize("value", [row[1] for row in WRONG_PICTURES], ids=[row[0] for row in WRONG_PICTURES])
def test_wrong_picture_costs_only_the_picture(value: Any) -> None:
    parsed = parse(json.dumps(GOOD | {"image_b64": value}).encode())
    assert parsed.entry.picture is None
    assert parsed.warning.startswith("image dropped: ")
    assert content(parsed)["dropped"] and "image" not in content(parsed)
    answer = json.loads(server.answer(smtp.PutResult(parsed.entry.id, new=True), parsed))
    assert answer == {"ok": True, "id": parsed.entry.id, "status": "queued", "warning": parsed.warning}


@pytest.mark.parametrize("name", [5, True, [], {}, 0.5, False])
def test_wrong_file_name_costs_only_the_picture(name: Any) -> None:
    parsed = event(image_b64=SMALL, image_filename=name)
    assert parsed.entry.picture is None and "image_filename" in parsed.warning
    assert not event(image_filename=name).warning


def test_picture_may_have_ten_mebibytes_and_not_a_byte_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.PICTURE_MAX_BYTES == 10 << 20
    monkeypatch.setattr(server, "PICTURE_MAX_BYTES", 10_000)
    for length in (9_998, 9_999, 10_000):
        assert event(image_b64=b64(b"BM" + bytes(length - 2))).entry.picture
    for length in (10_001, 10_002, 10_003, 20_000):
        assert event(image_b64=b64(b"BM" + bytes(length - 2))).warning.startswith("image dropped: larger than")


FILE_NAMES = [
    ("cam1.jpg", "cam1.jpg"),
    ("C:\\snaps\\cam1.JPG", "cam1.JPG"),
    ("../../etc/passwd", "passwd.png"),
    ("/etc/cron.d/x.png", "x.png"),
    ("..", "picture.png"),
    ("", "picture.png"),
    (None, "picture.png"),
    (".htaccess", "htaccess.png"),
    ("-rf.png", "rf.png"),
    ("a\u202egpj.exe", "agpj.exe.png"),
    ("a\0b\n.jpg", "ab.jpg"),
    ('a"b<c>:d|e?f*.jpg', "a_b_c_d_e_f_.jpg"),
    ("باغ ۱.jpg", "باغ_۱.jpg"),
    ("x" * 300 + ".jpg", "x" * 100 + ".png"),
    ("half \ud800.png", "half_.png"),
    ("archive.tar", "archive.tar.png"),
    ("/" * 4_000_000 + "a.jpg", "a.jpg"),
    ("\\" * 4_000_000, "picture.png"),
    ("a/" * 2_000_000 + "a.jpg", "a.jpg"),
    ("x" * 4_000_000, "x" * 100 + ".png"),
    ("\0" * 4_000_000 + "a.jpg", "picture.png"),
]


@pytest.mark.parametrize(("wished", "kept"), FILE_NAMES, ids=[ascii(wished)[:40] for wished, _ in FILE_NAMES])
def test_only_the_last_component_of_a_file_name_is_used_and_cleaned(wished: Any, kept: str) -> None:
    line = json.dumps(GOOD | {"image_b64": SMALL, "image_filename": wished}).encode()
    assert content(parse(line))["image"] == kept


def test_a_file_name_of_millions_of_slashes_takes_the_memory_of_its_text() -> None:
    tracemalloc.start()
    try:
        for name in ("/" * 8_000_000, "\\" * 8_000_000, "a/" * 4_000_000):
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            server.picture_name(name, "png")
            assert tracemalloc.get_traced_memory()[1] - before < 10 << 20
    finally:
        tracemalloc.stop()


# where the picture stands

JPEG = b64(b"\xff\xd8\xff" + bytes(6000))
KEYS: list[tuple[str, str, str | None]] = [
    ("twice: the last counts", f'{{"image_b64": "{LARGE}", "event": "E", "camera": "c", "image_b64": "{JPEG}"}}', JPEG),
    ("twice, the last is null", f'{{"image_b64": "{LARGE}", "event": "E", "camera": "c", "image_b64": null}}', None),
    ("nested", f'{{"event": "E", "camera": "c", "x": {{"image_b64": "{LARGE}"}}}}', None),
    ("in a string", json.dumps({"event": "E", "camera": "c", "x": f'"image_b64": "{LARGE}"'}), None),
    ("key escaped", f'{{"event": "E", "camera": "c", "image\\u005fb64": "{LARGE}"}}', LARGE),
    ("slashes escaped", f'{{"event": "E", "camera": "c", "image_b64": "{LARGE.replace("/", chr(92) + "/")}"}}', LARGE),
    ("a letter escaped", f'{{"event": "E", "camera": "c", "image_b64": "\\u{ord(LARGE[0]):04x}{LARGE[1:]}"}}', LARGE),
]  # fmt: skip


@pytest.mark.parametrize(("line", "picture"), [row[1:] for row in KEYS], ids=[row[0] for row in KEYS])
def test_picture_is_the_value_that_json_finds(line: str, picture: str | None) -> None:
    found = parse(line.encode()).entry.picture
    assert found == (picture.encode() if picture else None)


# a seeded fuzz: whatever comes, an answer or a refusal


def mutate(line: bytes, chance: random.Random) -> bytes:
    data = bytearray(line)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(8):
            case 0:
                data[at:at] = chance.randbytes(chance.randint(1, 8))
            case 1:
                del data[at : at + chance.randint(1, 30)]
            case 2 if data:
                data[at % len(data)] ^= 1 << chance.randrange(8)
            case 3:
                data[at:at] = bytes(data[at : at + chance.randint(1, 40)])
            case 4:
                data[at:at] = chance.choice(SPICE)
            case 5:
                data[at:at] = chance.choice(LINES)[1][:400]
            case 6:
                data[:] = data[:at]
            case _:
                data[at:at] = b'"' + chance.choice(WORDS) + b'": ' + chance.choice(VALUES) + b", "
    return bytes(data)


def exchange(fields: dict[str, Any], chance: random.Random) -> bytes:
    """The fields with some of their values changed, still JSON."""
    changed = dict(fields)
    for name in chance.sample(list(changed), chance.randint(1, 3)):
        text = "".join(chance.choices('aA0é\u200c\u202e\ud800\x00\n"\\<>:/.-_=+ 漢\U0001f4f7', k=chance.randint(0, 12)))
        value = changed[name]
        kept = value if isinstance(value, str) else ""
        changed[name] = chance.choice(
            [None, 5, True, [], {}, {text: text}, text, kept + text, kept[:-1], kept * 2, 0.5]
        )
    return json.dumps(changed, ensure_ascii=chance.random() < 0.9).encode("utf-8", "surrogatepass")


SPICE = [
    b"\\",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\u",
    b"\\ud800",
    b"\x00",
    b"\xff",
    b"\xe2\x80\xae",
    b"=",
    b"\r",
]
WORDS = [name.encode() for name in (*server.FIELDS, "meta", "image_b64", "image_filename", "token", "ping", "heartbeat")]
VALUES = [
    b"null",
    b"true",
    b"0",
    b"-1e999",
    b'""',
    b'"x"',
    b"[]",
    b"{}",
    b"NaN",
    b'"' + SMALL.encode() + b'"',
    b"9" * 400,
]


def fuzz(rounds: int, seed: int) -> dict[str, int]:
    """Changed lines through the parser, the answer and the payload; counts what came of them."""
    chance = random.Random(seed)
    everything = {**GOOD, "id": "a:1", "timestamp": "2026-05-01T22:15:00Z", "image_url": "http://x/a.jpg", "token": "t"}
    everything |= {"meta": {"zone": 2, "name": "باغ"}, "image_filename": "a/b.png", "image_b64": SMALL, "ping": 1}
    seeds = [json.dumps(everything).encode(), json.dumps(everything, ensure_ascii=False).encode(), HEAD + b"}"]
    seeds += [json.dumps({**GOOD, "image_b64": LARGE[:4000]}).encode(), b'{"heartbeat": "cam1"}', b'{"ping": 1}']
    counts: dict[str, int] = {}
    for _ in range(rounds):
        line = mutate(chance.choice(seeds), chance) if chance.random() < 0.5 else exchange(everything, chance)
        try:
            found = outcome(line)
        except Exception as error:
            raise AssertionError(f"seed {seed}, line {line!r}") from error
        counts[found] = counts.get(found, 0) + 1
        if found == "event":
            parsed = parse(line)
            json.loads(server.answer(smtp.PutResult(parsed.entry.id, new=True), parsed))
            view = server.EventView.of(smtp.Entry(1, parsed.entry.id, parsed.entry.kind, parsed.entry.source, NOW, parsed.entry.payload))
            assert view.camera == parsed.entry.source and view.local and server.utc_time(view.happened)
    return counts


def test_fuzzed_lines_raise_nothing_but_refusals() -> None:
    counts = fuzz(4_000, seed=20_260_501)
    assert counts["event"] > 300 and counts["bad_json"] > 300 and counts["bad_event"] > 100, counts


if __name__ == "__main__":  # the long run: python -m tests.test_event 100000 [SEED]
    number, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(2**32)
    print(f"seed {seed}: {fuzz(number, seed)}")
