"""The mails, word for word against what is promised: of one alert, of many, of the day; in three languages."""

import csv
import datetime as dt
import email
import email.message
import email.policy
import html.parser
import io
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import mails
import pytest
from mails import item, own, summary

import server
import smtp_module as smtp

NOW = mails.NOW
PLAIN = server.RelayConfig(sender="Relay <alerts@relay.example.org>")
JPEG, PNG = b"\xff\xd8\xff\xe0" + bytes(range(256)) * 40, b"\x89PNG\r\n\x1a\n" + bytes(range(255, -1, -1)) * 9


@pytest.fixture(autouse=True)
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def envelope(items: Sequence[smtp.Entry], config: server.RelayConfig = PLAIN, **mail: Any) -> smtp.Message:
    return mails.envelope(items, config, **mail)


def render(items: Sequence[smtp.Entry], config: server.RelayConfig = PLAIN, **mail: Any) -> email.message.EmailMessage:
    data = b"".join(envelope(items, config, **mail).data)
    assert data.isascii() and b"\n" not in data.replace(b"\r\n", b"") and b"\r" not in data.replace(b"\r\n", b"")
    message = email.message_from_bytes(data, policy=email.policy.default)
    assert not message.defects and not any(part.defects for part in message.walk())
    return message  # type: ignore[return-value]


def text(message: email.message.EmailMessage) -> str:
    body = message.get_body(("plain",))
    assert body is not None
    return str(body.get_content()).replace("\r\n", "\n")


class Page(html.parser.HTMLParser):
    """What a mail program sees in the page: its tags, its links, its pictures, its words."""

    VOID = frozenset({"meta", "img", "br"})
    SHAPE = frozenset({"role", "align", "width", "cellpadding", "cellspacing", "colspan", "class", "style", "bgcolor"})
    ATTRIBUTES = SHAPE | {"lang", "dir", "charset", "name", "content", "src", "alt", "href"}

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.markup, self.words, self.direction = markup, "", ""
        self.links: list[Any] = []
        self.images: list[dict[str, Any]] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.feed(markup)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        self.links += [values["href"]] if "href" in values else []
        self.images += [values] if tag == "img" else []
        assert set(values) <= self.ATTRIBUTES
        self.direction = values.get("dir") or self.direction
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data if self.open and self.open[-1] != "style" else ""


def page(message: email.message.EmailMessage) -> Page:
    body = message.get_body(("html",))
    assert body is not None
    found = Page(str(body.get_content()).replace("\r\n", "\n"))
    assert found.tags <= {"html", "head", "meta", "body", "table", "tr", "td", "div", "bdi", "br", "img", "a", "p", "style"}
    return found


def files(message: email.message.EmailMessage) -> dict[str, bytes]:
    """The attachments by name; each has one, once."""
    named = [(part.get_filename(), part.get_content()) for part in message.walk() if part.get_filename()]
    assert len(dict(named)) == len(named)
    return {name: data if isinstance(data, bytes) else data.encode() for name, data in named}


# one alert


def test_headers_of_one_alert() -> None:
    message = render([item(id="abc", picture=JPEG)])
    assert message["Subject"] == "DVR ALERT: MOTION_DETECTED - garage"
    assert message["From"] == "Relay <alerts@relay.example.org>"
    assert message["To"] == "a@x.org, b@y.org"
    assert message["X-Alert-Id"] == "abc"
    assert message["Auto-Submitted"] == "auto-generated"
    assert abs(message["Date"].datetime.timestamp() - time.time()) < 60
    assert re.fullmatch(r"<[0-9a-f]{40}@relay\.example\.org>", message["Message-ID"])
    assert all(len(values) == 1 for values in map(message.get_all, set(message.keys())) if values)


def test_envelope_has_the_plain_address_and_the_words_for_the_log() -> None:
    found = envelope([item()])
    assert (found.sender, found.about) == ("alerts@relay.example.org", "MOTION_DETECTED garage")


def test_message_id_is_a_function_of_the_id() -> None:
    first = render([item(id="abc")])["Message-ID"]
    assert first == render([item(7, id="abc", camera="other", picture=PNG)], recipients=("c@z.org",))["Message-ID"]
    assert first == render([item(id="abc", picture=JPEG)], max_bytes=0, tries=5)["Message-ID"]
    assert first != render([item(id="abd")])["Message-ID"]


def test_id_that_is_used_again_much_later_is_another_mail() -> None:
    first, later = (render([item(id="smoke", picture=JPEG, arrived=when)]) for when in (NOW, NOW + 8 * smtp.DAY_S))
    assert first["Message-ID"] != later["Message-ID"] and first["X-Alert-Id"] == later["X-Alert-Id"]
    assert page(first).images[0]["src"] != page(later).images[0]["src"]


def test_picture_is_known_by_its_alert_and_by_no_other() -> None:
    """A phone that keeps pictures by their Content-ID must not show that of another alert."""
    alone = [page(render([item(n, JPEG)])).images[0]["src"] for n in range(3)]
    together = [image["src"] for image in page(render([item(n, JPEG, NOW + n) for n in range(3)])).images]
    assert len({*alone, *together}) == 5 and together[-1] == alone[0]
    assert alone[0] == page(render([item(0, JPEG)], tries=3)).images[0]["src"]


def test_thread_is_of_a_camera_and_a_day() -> None:
    def thread(**fields: Any) -> str:
        return str(render([item(**fields)])["References"])

    first = thread(arrived=NOW - 14 * 3600)
    assert first == thread(arrived=NOW - 60 * 16, event="DOOR_OPENED", id="other")
    assert first != thread(arrived=NOW - 60 * 14)  # after midnight in Berlin
    assert first != thread(arrived=NOW - 14 * 3600, camera="attic")
    assert first == thread(arrived=NOW - 14 * 3600, timestamp="1970-01-01T00:00:01Z")  # a wrong clock changes nothing


def test_bodies_hold_event_camera_both_times_meta_and_link() -> None:
    meta, link = {"zone": 3, "score": 0.5, "night": True, "note": "x<y"}, "https://nas.lan/a?b=1&c='2'"
    message = render([item(timestamp="2026-05-01T22:15:00Z", meta=meta, image_url=link)])
    for body in (text(message), page(message).words):
        assert "Motion detected" in body and "MOTION_DETECTED" in body and "garage" in body
        assert "2026-05-02 00:15:00 +0200" in body and "2026-05-01T22:15:00Z" in body
        for word in ("zone", "3", "score", "0.5", "night", "true", "x<y", link):
            assert word in body
    assert page(message).links == [link]


def test_what_where_and_when_come_first() -> None:
    message = render([item(timestamp="2026-05-01T22:15:00Z")])
    assert text(message).split("\n")[:3] == ["Motion detected", "garage", "00:15:00, 2026-05-02"]
    assert page(message).words.strip().startswith("Motion detected\ngarage\n00:15:00, 2026-05-02\n")


def test_alert_is_told_in_a_sentence() -> None:
    message = render([item(timestamp="2026-05-01T22:15:00Z", picture=JPEG, image_filename="snap.jpg")])
    for body in (text(message), page(message).words):
        assert "On Saturday 2026-05-02 00:15:00 the camera garage reported: Motion detected." in body
        assert "The picture is attached as snap.jpg." in body
        assert f"Sent by the alert relay on {smtp.hostname()}, which does not read answers" in body


@pytest.mark.parametrize("zone", ["UTC", "Europe/London"])
def test_where_local_time_is_utc_one_time_is_enough(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    winter = item(arrived=dt.datetime(2026, 1, 5, 22, 15, tzinfo=dt.UTC).timestamp())
    assert "Time: 2026-01-05T22:15:00Z (UTC)\n\n" in text(render([winter]))
    assert ("2026-05-01 23:15:00 +0100" in text(render([item()]))) == (zone == "Europe/London")


# a camera's clock


@pytest.mark.parametrize("told", ["1970-01-01T00:02:11Z", "2026-05-01T22:13:59Z", "2026-05-01T22:17:00Z", "2031-01-01"])
def test_arrival_stands_beside_a_clock_that_is_off(told: str) -> None:
    message = render([item(timestamp=told)])
    for body in (text(message), page(message).words):
        assert told[:10] in body and "Arrived: 00:15:00, 2026-05-02" in body
        assert "2026-05-02 00:15:00 +0200" in body and "2026-05-01T22:15:00Z (UTC)" in body
        assert "the alert arrived at 2026-05-02 00:15:00" in body


@pytest.mark.parametrize("told", ["2026-05-01T22:14:01Z", "2026-05-01T22:15:59Z", "2026-05-02T00:15:10+02:00"])
def test_clock_that_is_right_needs_no_arrival_beside_it(told: str) -> None:
    assert "rrived" not in text(render([item(timestamp=told)]))


def wrong_clocks() -> list[smtp.Entry]:
    """Alerts with a picture each in the order in which they arrive; two of the cameras are in 2031 and in 1970."""
    told = {1: "2031-01-01T00:00:00Z", 2: "2031-01-01T00:00:01Z", 6: "1970-01-01T00:00:09Z"}
    return [
        item(n, JPEG, NOW + 60 * n, image_filename=f"{n}.jpg", timestamp=told.get(n, smtp.iso(NOW + 60 * n)))
        for n in range(8)
    ]


def test_digest_is_in_the_order_of_arrival_whatever_the_clocks_say() -> None:
    message = render(wrong_clocks()[::-1])
    assert list(files(message))[:4] == ["7.jpg", "6.jpg", "5.jpg", "4.jpg"]
    body = text(message)
    assert body.split("\n")[2] == "2026-05-02 00:15:00 - 2026-05-02 00:22:00"
    times = re.findall(r"^05-02 (\d\d:\d\d):00\s", body, re.MULTILINE)
    assert times == [f"00:{15 + n}" for n in range(8)]
    assert "05-02 00:21:00  Motion detected  garage\n  Camera's clock: 1970-01-01 01:00:09\n" in body
    rows = list(csv.reader(io.StringIO(files(message)["events.csv"].decode("utf-8-sig"))))
    assert [row[0] for row in rows[1:]] == [f"id{n}" for n in range(8)]
    assert rows[7][3:5] == ["1970-01-01T00:00:09Z", "2026-05-01T22:21:00Z"]


UNKNOWN_ZONES = ["Europe/Berln", "Mars", "/etc/nothing", ":Nowhere/At_all"]
KNOWN_ZONES = ["", "UTC", "Europe/Berlin", ":Europe/Berlin", "CET-1CEST,M3.5.0,M10.5.0/3", "<+0330>-3:30", "UTC0"]


@pytest.mark.parametrize("name", UNKNOWN_ZONES)
def test_unknown_time_zone_is_named(name: str) -> None:
    assert repr(name) in server.unknown_time_zone(name) and "Europe/Berlin" in server.unknown_time_zone(name)


def test_machine_without_a_time_zone_database_knows_utc_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoneinfo.TZPATH", ())
    assert server.unknown_time_zone("Europe/Berlin") and not server.unknown_time_zone("UTC")


@pytest.mark.parametrize("name", KNOWN_ZONES)
def test_known_time_zone_is_no_trouble(name: str) -> None:
    assert server.unknown_time_zone(name) == ""


def test_english_mail_can_be_read_in_its_source() -> None:
    data = b"".join(envelope([item(meta={"zone": 3})]).data)
    assert data.count(b"MOTION_DETECTED") >= 3 and b"Content-Transfer-Encoding: base64" not in data


def test_without_a_timestamp_the_time_of_arrival_counts() -> None:
    assert "2026-05-01T22:15:00Z" in text(render([item()]))


def test_only_the_link_is_a_link() -> None:
    message = render([item(camera="http://evil.example/", meta={"a": "javascript:alert(1)", "b": "http://c/"})])
    assert page(message).links == []


@pytest.mark.parametrize(
    ("picture", "kind", "name"), [(JPEG, "image/jpeg", "my snap.jpg"), (PNG, "image/png", "باغ.png")]
)
def test_picture_is_shown_in_the_page_and_there_once_byte_for_byte(picture: bytes, kind: str, name: str) -> None:
    message = render([item(picture=picture, image_filename=f"/x/{name}")])
    (part,) = [part for part in message.walk() if part.get_content_type() == kind]
    assert part.get_content() == picture
    assert part.get_filename() == name.replace(" ", "_") and part.get_content_disposition() == "attachment"
    assert [image["src"] for image in page(message).images] == [f"cid:{part['Content-ID'][1:-1]}"]
    assert [one.get_content_type() for one in message.walk()] == [
        "multipart/related",
        "multipart/alternative",
        "text/plain",
        "text/html",
        kind,
    ]


def test_alert_without_a_picture_has_no_attachment() -> None:
    message = render([item()])
    assert files(message) == {} and page(message).images == []
    assert message.get_content_type() == "multipart/alternative"


def test_picture_that_was_left_out_is_said_with_the_reason() -> None:
    message = render([item(image_b64="!!")])
    assert "Picture left out: not valid Base64" in text(message)
    assert "not valid Base64" in page(message).words


def test_mail_that_goes_without_its_picture_repeats_what_the_server_said() -> None:
    for items in ([item(picture=JPEG)], sixty()):
        message = render(items, max_bytes=0, error="552 5.3.4 <too> big")
        assert "Picture left out: the mail server said: 552 5.3.4 <too> big\n" in text(message)
        assert "the mail server said: 552 5.3.4 <too> big" in page(message).words


def test_next_mail_ends_with_how_many_alerts_failed_and_why() -> None:
    message = render([item()], reports=(7, 8, 9), why="550 5.1.1 no <such> user\n")
    assert text(message).rstrip().endswith("could not be delivered before: 3\n550 5.1.1 no <such> user")
    assert "550 5.1.1 no <such> user" in page(message).words
    assert "delivered" not in text(render([item()]))


# hostile names

NAMES = [
    "<script>alert(1)</script>",
    '"><img src=http://evil/x>',
    "a&lt;b&amp;c",
    "{{7*7}} {0} {what} %s %(x)s ${x}",
    "=?utf-8?q?=0ABcc:x?=",
    "</bdi></td></table>",
    "دوربین‌های باغ",
    "摄像头 一",
    "👩‍🚒 кухня",
    "n" * 128,
    "é" * 128,
    "𝕏" * 128,
    "'; DROP TABLE items; --",
    "a, b <c@d.e>",
    "tab-free  two spaces",
]


@pytest.mark.parametrize("name", NAMES)
def test_name_arrives_intact_and_is_never_markup(name: str) -> None:
    message = render([item(camera=name, meta={name: name})])
    assert message["Subject"] == f"DVR ALERT: MOTION_DETECTED - {name}"
    assert f"Camera: {name}\n" in text(message)
    assert page(message).words.count(name) >= 3
    assert page(message).images == []


@pytest.mark.parametrize("name", NAMES)
def test_name_arrives_intact_in_a_digest(name: str) -> None:
    message = render([item(1, camera=name, picture=JPEG), item(2, camera=name)])
    assert name in message["Subject"]
    assert name in text(message) and name in page(message).words
    assert page(message).images[0]["alt"].endswith(name)
    assert name.lstrip("=") in files(message)["events.csv"].decode()


def test_every_name_stands_in_an_isolate_of_its_own() -> None:
    """So that a right-to-left name cannot reorder the line it stands in."""
    markup = page(render([item(camera="حیاط", meta={"محل": "پشت"})])).markup
    for name in ("حیاط", "محل", "پشت"):
        assert markup.count(name) == markup.count(f"<bdi>{name}</bdi>") > 0


def test_control_characters_of_meta_reach_no_reader() -> None:
    message = render([item(meta={"a\u202e": "x\u202ey\x00z\x1b[2J", "two": "one\ntwo\r\nthree"})])
    for body in (text(message), page(message).words):
        assert not smtp.UNPRINTABLE.search(body.replace("\n", ""))
    assert "two: one\n  two \n  three\n" in text(message) and "onetwo three" in page(message).words


def test_event_named_like_one_of_our_words_is_an_event() -> None:
    for name in ("event", "failed", "more", "units", "alerts"):
        assert text(render([item(event=name)])).startswith(f"{name}\n")


def test_huge_values_make_no_huge_mail() -> None:
    message = render([item(meta={f"{n}" + "k" * 5000: "v" * 100_000 for n in range(30)})])
    assert len(text(message)) < 70_000
    assert all(len(line) < 998 for line in b"".join(envelope([item(meta={"a": "v" * 5000})]).data).split(b"\r\n"))


# the relay's own alerts


def test_silent_camera_says_when_it_was_last_seen_and_a_return_how_long_it_was_gone() -> None:
    gone = text(render([own("CAMERA_DISCONNECTED", last_seen="2026-05-01T21:00:00Z")]))
    assert gone.startswith("Camera disconnected\ngarage\n") and "Last seen: 2026-05-01 23:00:00\n" in gone
    assert "Was gone: 67 min\n" in text(render([own("CAMERA_RECONNECTED", gone_s=4000)]))


SPANS = [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (172_799, "48 h"), (8e5, "9 d")]


@pytest.mark.parametrize(("seconds", "words"), SPANS)
def test_length_of_time_is_said_in_a_unit_that_fits(seconds: float, words: str) -> None:
    assert f"Was gone: {words}\n" in text(render([own("CAMERA_RECONNECTED", gone_s=seconds)]))


# many alerts


def sixty() -> list[smtp.Entry]:
    """An hour of alerts from three cameras, every fifth with a picture, handed over out of order."""
    cameras, events = ("garage", "باغ", "=cmd"), ("MOTION_DETECTED", "DOOR_OPENED")
    items = [
        item(n, JPEG + bytes([n]) if n % 5 == 0 else None, NOW + 60 * n, camera=cameras[n % 3], event=events[n % 2],
             image_filename=f"{n}.jpg")
        for n in range(60)
    ]  # fmt: skip
    return items[30:] + items[:30]


def test_headers_of_a_digest() -> None:
    message = render(sixty())
    assert message["Subject"].startswith("DVR ALERT: 60 alerts - ")
    assert "MOTION_DETECTED" in message["Subject"] and "garage" in message["Subject"]
    assert message["X-Alert-Id"] is None
    assert message["Auto-Submitted"] == "auto-generated"
    assert message["To"] == "a@x.org, b@y.org"


def test_message_id_of_a_digest_is_a_function_of_the_set() -> None:
    first = render(sixty())["Message-ID"]
    assert first == render(sixty()[::-1], max_bytes=0, recipients=("c@z.org",))["Message-ID"]
    assert first != render(sixty()[1:])["Message-ID"]
    same_second = [item(1), item(2), item(3)]
    assert render(same_second)["Message-ID"] == render(same_second[::-1])["Message-ID"]


def test_digest_has_the_count_the_first_and_the_last_time() -> None:
    message = render(sixty())
    for body in (text(message), page(message).words):
        assert "60 alerts" in body and "2026-05-02 00:15:00" in body and "2026-05-02 01:14:00" in body
    assert text(message).split("\n")[2] == "2026-05-02 00:15:00 - 2026-05-02 01:14:00"


def test_digest_has_a_table_of_the_first_fifty() -> None:
    message = render(sixty())
    rows = re.findall(r"^(\d\d-\d\d \d\d:\d\d:\d\d)  (.*)  (.*)$", text(message), re.MULTILINE)
    assert len(rows) == 50 and rows[0] == ("05-02 00:15:00", "Motion detected", "garage")
    assert rows == sorted(rows) and rows[-1][0] == "05-02 01:04:00"
    assert len(re.findall(r"\d\d-\d\d \d\d:\d\d:\d\d</bdi></td>", page(message).markup)) == 50
    assert "The first 50 of 60; all of them are in events.csv." in page(message).words
    assert "The first" not in text(render(sixty()[:50]))


def test_digest_shows_the_newest_four_pictures_newest_first() -> None:
    message = render(sixty())
    assert [name for name in files(message) if name != "events.csv"] == ["55.jpg", "50.jpg", "45.jpg", "40.jpg"]
    assert files(message)["55.jpg"] == JPEG + bytes([55])
    cids = {f"cid:{part['Content-ID'][1:-1]}" for part in message.walk() if part["Content-ID"]}
    images = page(message).images
    assert len(cids) == 4 and {image["src"] for image in images} == cids
    assert images[0]["alt"] == "01:10:00, Door opened, باغ"


def test_digest_loads_no_more_pictures_than_it_shows() -> None:
    loaded: list[int] = []
    items = [item(n, JPEG, NOW + n) for n in range(40)]
    counted = [one._replace(picture=lambda one=one: loaded.append(one.seq) or one.picture()) for one in items]  # type: ignore[misc]
    render(counted)
    assert loaded == [39, 38, 37, 36]


def test_digest_has_every_event_in_a_csv() -> None:
    message = render(sixty())
    (part,) = [part for part in message.walk() if part.get_filename() == "events.csv"]
    assert part.get_content_type() == "text/csv" and part.get_content_disposition() == "attachment"
    data = files(message)["events.csv"]
    assert data.startswith(b"\xef\xbb\xbfid,event,camera,time,arrived,meta\r\n")  # Excel knows UTF-8 by this mark
    rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"))))
    when = ["2026-05-01T22:15:00Z", "2026-05-01T22:16:00Z"]
    assert len(rows) == 61
    assert rows[1] == ["id0", "MOTION_DETECTED", "garage", when[0], when[0], ""]
    assert rows[2] == ["id1", "DOOR_OPENED", "باغ", when[1], when[1], ""]


FORMULAS = ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "＝1+1", "＋1", "－1", "＠SUM(A1)", " =1+1", "\u3000=1+1"]


@pytest.mark.parametrize("name", FORMULAS)
def test_nothing_is_a_formula_to_a_spreadsheet(name: str) -> None:
    message = render([item(1, camera=name, meta={name: 1}), item(2, event="-x", id="-2:3")])
    rows = list(csv.reader(io.StringIO(files(message)["events.csv"].decode("utf-8-sig"))))
    assert rows[1][2] == f"'{name}" and rows[1][5] == f"'{name.strip()}=1"
    assert rows[2][:2] == ["'-2:3", "'-x"]


def test_digest_has_the_meta_in_the_csv_and_as_far_as_there_is_room_in_the_text() -> None:
    meta = {"zone": 4, "night": True, "plate": "B-XY 1", "note": "one\ntwo"}
    message = render([item(1, meta=meta), item(2)])
    told = "night=true; note=one two; plate=B-XY 1; zone=4"
    for body in (text(message), page(message).words):
        assert told in body
    rows = list(csv.reader(io.StringIO(files(message)["events.csv"].decode("utf-8-sig"))))
    assert rows[1][5] == told and rows[2][5] == ""
    long = {f"k{n}": "v" * 2000 for n in range(32)}
    message = render([item(n, meta=long) for n in range(60)])
    assert len(text(message)) < 12_000 and len(page(message).markup.encode()) < 102_000  # Gmail cuts a longer page
    assert all("v" * 2000 in row[5] for row in csv.reader(io.StringIO(files(message)["events.csv"].decode())) if row[1] != "event")


def test_digest_is_made_within_a_budget_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alert is a line of the table, but not with all of its meta."""
    monkeypatch.setattr(server, "CSV_MAX_BYTES", 100_000)
    long = {f"k{n}": "v" * 2000 for n in range(32)}
    rows = list(csv.reader(io.StringIO(files(render([item(n, meta=long) for n in range(60)]))["events.csv"].decode())))
    assert len(rows) == 61 and [bool(row[5]) for row in rows[1:]] == [True] * 2 + [False] * 58


def test_mail_whose_picture_is_damaged_on_the_disk_goes_without_it_and_says_so() -> None:
    message = render([item(picture=JPEG)._replace(picture=lambda: None)])
    assert files(message) == {}
    assert "Picture left out: damaged on the relay's disk" in text(message)


SIZES = {"a.jpg": 90_000, "b.jpg": 200_000, "c.jpg": 30_000, "d.jpg": 60_000}  # the last one is the newest


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(700_000, "dcba"), (460_000, "dcb"), (310_000, "dca"), (170_000, "dc"), (120_000, "d"), (80_000, "c"), (20_000, "")],
)
def test_of_a_digest_that_is_too_big_the_newest_pictures_that_fit_stay(limit: int, kept: str) -> None:
    items = [
        item(n, JPEG + bytes(size), NOW + n, image_filename=name) for n, (name, size) in enumerate(SIZES.items())
    ]
    sent = b"".join(envelope(items, max_bytes=limit).data)
    message = email.message_from_bytes(sent, policy=email.policy.default)
    assert len(sent) <= limit
    assert [name[0] for name in files(message) if name != "events.csv"] == list(kept)  # type: ignore[arg-type]
    assert len(page(message).images) == len(kept)  # type: ignore[arg-type]
    assert ("Picture left out: too big for the mail server" in text(message)) == (kept != "dcba")  # type: ignore[arg-type]


def test_picture_of_one_alert_that_does_not_fit_is_left_out_and_said() -> None:
    message = render([item(picture=JPEG + bytes(90_000))], max_bytes=50_000)
    assert files(message) == {} and "Picture left out: too big for the mail server" in page(message).words
    assert list(files(render([item(picture=JPEG)], max_bytes=50_000))) == ["picture.jpg"]
    assert "left out" not in text(render([item()], max_bytes=100))  # nothing can be done about a mail of words


def test_digest_of_ten_thousand_stays_small_and_quick() -> None:
    items = [item(n, arrived=NOW + n, camera=f"cam{n % 9}") for n in range(server.DIGEST_MAX)]
    began = time.perf_counter()
    data = b"".join(envelope(items).data)
    assert len(data) < 1_500_000 and time.perf_counter() - began < 5


@pytest.mark.parametrize(("event", "urgent"), [("SMOKE", True), ("FIRE_2", True), ("DOOR_OPENED", False)])
def test_colour_follows_the_priority(event: str, urgent: bool) -> None:
    config = replace(PLAIN, priority=("SMOKE", "FIRE_*"))
    for items in ([item(event=event)], [item(1), item(2, event=event)]):
        assert (f'bgcolor="{smtp.RED}"' in page(render(items, config)).markup) == urgent


def test_urgent_alert_among_others_colours_the_digest() -> None:
    assert smtp.RED in page(render([item(1), item(2, event="TAMPER_DETECTED")])).markup
    assert smtp.RED not in page(render([item(1), item(2)])).markup


# the daily mail


def test_daily_mail_has_the_counts_what_waits_what_failed_and_who_is_silent() -> None:
    message = render([summary(silent=["attic", "باغ"], failed=1, why="550 no such user")])
    assert message["Subject"] == "DVR summary: 2026-05-02 - 7 alerts, 2 waiting, 1 failed, 2 silent"
    body = text(message)
    assert "Alerts in 24 hours: 7\nWaiting: 2\nFailed: 1\n  550 no such user\nSilent cameras: attic, باغ\n" in body
    assert "Motion detected, garage: 5\nX.y, باغ: 2\n" in body
    assert "If it does not come, look after the relay." in body and "attic" in page(message).words
    assert "In the 24 hours before Saturday 2026-05-02 00:15:00 7 alerts arrived; 2 wait, and 1 failed." in body
    assert message["Message-ID"] == render([summary()])["Message-ID"] and message["Auto-Submitted"] == "auto-generated"


def test_daily_mails_of_two_machines_are_two_mails(monkeypatch: pytest.MonkeyPatch) -> None:
    first = render([summary()])["Message-ID"]
    assert first != render([summary(NOW + 1)])["Message-ID"]
    monkeypatch.setattr("socket.gethostname", lambda: "another-machine")
    assert first != render([summary()])["Message-ID"]


def test_daily_mail_stays_small_whatever_it_has_to_tell() -> None:
    silent, lanes = [f"{n}{'摄' * 120}" for n in range(10_000)], [[f"X.y {n}{'摄' * 120}", n] for n in range(20)]
    message = render([summary(silent=silent, lanes=lanes, why="x" * 100_000)])
    assert "10000 silent" in message["Subject"] and "+9950" in text(message)
    assert len(page(message).markup.encode()) < 102_000


def test_daily_mail_is_green_only_where_nothing_is_wrong() -> None:
    assert smtp.GREEN in page(render([summary()])).markup and "Silent cameras: none" in text(render([summary()]))
    assert smtp.RED in page(render([summary(failed=1)])).markup
    assert smtp.RED in page(render([summary(silent=["attic"])])).markup


# languages

FIXED = {"en": ("Door opened", "Camera"), "fa": ("در باز شد", "دوربین"), "zh": ("门已打开", "摄像机")}


@pytest.mark.parametrize("lang", FIXED)
def test_fixed_words_are_in_the_language(lang: str) -> None:
    config = replace(PLAIN, lang=lang)
    message = render([item(event="DOOR_OPENED")], config)
    assert message["Subject"] == "DVR ALERT: DOOR_OPENED - garage"  # what filters look for stays
    for body in (text(message), page(message).words):
        assert all(word in body for word in FIXED[lang])
    markup = page(message).markup
    assert f'<html lang="{lang}" dir="{"rtl" if lang == "fa" else "ltr"}">' in markup
    assert page(message).direction == ("rtl" if lang == "fa" else "ltr")
    side = "right" if lang == "fa" else "left"
    assert f"text-align:{side};" in markup  # else Evolution puts a line of digits to the left


def test_every_word_is_there_in_every_language_with_the_same_places() -> None:
    for words in (*server.WORDS.values(), *server.EVENT_WORDS.values()):
        assert len(words) == len(server.LANGS) and all(words)
        assert len({frozenset(re.findall(r"{(\w+)}", word)) for word in words}) == 1
        assert len(set(words)) == len(words)


def test_date_after_a_persian_label_keeps_its_order_in_plain_text_and_names_stay_as_they_are() -> None:
    told = item(camera="گاراژ", meta={"یادداشت": "-5", "zone": "4"})
    mark, persian = "\u200e", text(render([told], replace(PLAIN, lang="fa")))
    assert f"زمان: {mark}2026-" in persian and f"یادداشت: {mark}-5\n" in persian
    assert f"شنبه {mark}2026-" in persian
    assert persian.count(mark) == 3 and "دوربین: گاراژ\n" in persian
    assert text(render([told])).count(mark) == 1


@pytest.mark.parametrize("lang", ["fa", "zh"])
def test_no_english_word_is_left(lang: str) -> None:
    config = replace(PLAIN, lang=lang)
    everything = [
        render([item(picture=JPEG)], config, max_bytes=0, error="552 5.3.4", reports=(7,), why="x"),
        render(sixty(), config, max_bytes=0, error="552 5.3.4"),
        render([summary(silent=["x"], failed=1)], config),
        render([own("CAMERA_RECONNECTED", gone_s=4000)], config),
        render([own("CAMERA_DISCONNECTED", last_seen="2026-05-01T21:00:00Z")], config),
    ]
    for message in everything:
        words = re.sub(r"events\.csv|[A-Z]+_[A-Z]+|X\.y|cmd|garage|\d\dT\d\d|\(UTC\)|Z\b", "", text(message))
        assert set(re.findall(r"[A-Za-z]{2,}", words)) <= {"x", "CMD", *re.findall(r"\w+", smtp.hostname())}
