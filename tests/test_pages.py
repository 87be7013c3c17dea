"""The pages of all mails: how they are drawn, and how a browser shows them on a phone and on a desk."""

from __future__ import annotations

import email
import email.policy
import re
from collections.abc import Iterator
from email.message import EmailMessage

import browser
import mails
import pytest

import smtp_module as smtp
from smtp_module import Attachment, Bar, Button, Link, Page, Picture, Table, draw_html, draw_text, sentence

ALL = mails.every_mail()


def parsed(name: str) -> EmailMessage:
    message = email.message_from_bytes(ALL[name], policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    return message


def html_of(name: str) -> str:
    body = parsed(name).get_body(("html",))
    assert body is not None
    return str(body.get_content())


# The builder


def test_page_is_drawn_in_its_order_in_text_and_in_html() -> None:
    page = Page(
        ["what", "where", "when"],
        pictures=[Picture("seen", Attachment("a.png", "image/png", b"x", cid="c@x"))],
        sentences=[sentence("It was {name}.", {"name": "<b> {x}"})],
        buttons=[Button("Press", "mailto:a@b.c?subject=x&y")],
        tables=[Table([("one", "1"), ("two", Bar("2 V", 0.25)), ("", Link("http://x/?a&b"))], "Heading")],
        notes=[sentence("{why}", {"why": "first\nsecond"}, bad=True)],
    )
    assert draw_text(page) == (
        "what\nwhere\nwhen\n\nIt was <b> {x}.\n\none: 1\ntwo: 2 V\n: http://x/?a&b\n\nfirst\nsecond\n"
    )
    found = draw_html(page)
    shown = [
        "<bdi>what<", "<bdi>where<", "<bdi>when<", "cid:c@x", 'alt="seen"', "<bdi>It was &lt;b&gt; {x}.</bdi>", "subject=x&amp;y", "Press",
        "Heading", "<bdi>1</bdi>", "2 V", 'width="25%"', 'width="75%"', 'href="http://x/?a&amp;b"',
        "<bdi>first</bdi><br><bdi>second</bdi>",
    ]  # fmt: skip
    places = [found.index(words) for words in shown]
    assert places == sorted(places)


def test_value_of_a_sentence_cannot_reorder_it() -> None:
    assert sentence("Camera {name}, <1>.", {"name": "حیاط <2>"}).html == "Camera <bdi>حیاط &lt;2&gt;</bdi>, &lt;1&gt;."
    assert sentence("دوربین {name}", {"name": "yard {x}"}).html == "دوربین <bdi>yard {x}</bdi>"


@pytest.mark.parametrize(("level", "widths"), [(-1, [100]), (0, [100]), (0.004, [100]), (0.5, [50, 50]), (2, [100])])
def test_bar_stays_on_its_scale(level: float, widths: list[int]) -> None:
    drawn = draw_html(Page(["x"], tables=[Table([("a", Bar("b", level))])]))
    assert [int(width) for width in re.findall(r'width="(\d+)%" bgcolor', drawn)] == widths


@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_columns_take_the_whole_width_and_a_short_row_takes_it_too(columns: int) -> None:
    rows = [tuple("abcd"[:columns]), ("", "x")[-columns:]]
    drawn = draw_html(Page(["x"], tables=[Table(rows)]))
    for row in re.findall(r"<tr><td class=.*", drawn):
        assert sum(map(int, re.findall(r'<td [^>]*width="(\d+)%"', row))) == 100
        assert sum(int(span or 1) for span in re.findall(r'<td class="\w*"(?: colspan="(\d)")?', row)) == columns


def test_direction_is_that_of_the_language() -> None:
    for lang, direction, side in (("en", "ltr", "left"), ("zh", "ltr", "left"), ("fa", "rtl", "right")):
        drawn = draw_html(Page(["x"], lang))
        assert f'<html lang="{lang}" dir="{direction}">' in drawn and f"text-align:{side};" in drawn


MARK = "\u200e"  # keeps the order of the digits that follow


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("دریافت: 05:38:56, 2026-12-01", f"دریافت: {MARK}05:38:56, 2026-12-01"),
        ("سه‌شنبه 2026-12-01 05:38:56", f"سه‌شنبه {MARK}2026-12-01 05:38:56"),
        ("Tuesday 2026-12-01", "Tuesday 2026-12-01"), ("دوربین 2", "دوربین 2"),
        ("a\u202eb\u200e\0c\u2028d\ne\r", "a b  c d\ne "), ("می\u200cشود 👩\u200d🚒", "می\u200cشود 👩\u200d🚒"),
    ],
)  # fmt: skip
def test_text_is_cleaned_and_times_keep_their_order(text: str, clean: str) -> None:
    assert smtp.clean(text) == clean


# All mails


@pytest.mark.parametrize("name", ALL)
def test_page_can_give_way_where_no_style_sheet_is_read(name: str) -> None:
    inline = re.sub(r"<style>.*?</style>", "", html_of(name), flags=re.DOTALL)
    assert "nowrap" not in inline and "overflow-wrap:anywhere;word-break:break-word" in inline
    tables = re.findall(r"<table[^>]*>", inline)
    assert all('width="100%"' in table or "max-width:640px" in table for table in tables)
    assert not re.search(r"width:\d{3,}px", inline.replace("max-width:640px", ""))


@pytest.mark.parametrize("name", ALL)
def test_page_has_colours_for_dark_screens_wherever_it_has_some_for_light_ones(name: str) -> None:
    found = html_of(name)
    assert '<meta name="color-scheme" content="light dark">' in found and "prefers-color-scheme:dark" in found
    for tag in re.findall(r"<(?:p|td|div|a|body|table) [^>]*>", found):
        if re.search(r"[;\"](?:color|background):#", tag) and "bgcolor" not in tag:
            assert re.search(r'class="(back|page|soft|bad|link|button)"', tag), tag


@pytest.mark.parametrize("name", ALL)
def test_page_is_shown_whole_by_gmail(name: str) -> None:
    assert len(html_of(name).encode()) < 102_000


@pytest.mark.parametrize("name", ALL)
def test_pictures_of_a_page_are_parts_of_the_mail(name: str) -> None:
    message = parsed(name)
    shown = re.findall(r'src="cid:([^"]+)"', html_of(name))
    assert [part["Content-ID"][1:-1] for part in message.walk() if part["Content-ID"]] == shown
    for part in message.walk():
        if part.get_content_type() == "multipart/related":
            assert part["Content-Type"].params["type"] == next(part.iter_parts()).get_content_type()


def test_no_two_mails_share_a_content_id() -> None:
    for lang in mails.LANGS:
        names = [name for name in ALL if name.startswith((lang, "device"))]
        found = [cid for name in names for cid in re.findall(r'src="cid:([^"]+)"', html_of(name))]
        assert len(found) > 8 and len(set(found)) == len(found)


# In a browser


@pytest.fixture(scope="module")
def window() -> Iterator[browser.Browser]:
    if not browser.CHROMIUM:
        pytest.skip("there is no Chromium")
    with browser.Browser() as opened:
        yield opened


CONTRAST = """
[...document.querySelectorAll('bdi,p,a')].map(element => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  let behind = element;
  while (behind && (rgb(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
  const [low, high] = [light(rgb(getComputedStyle(element).color)),
    light(behind ? rgb(getComputedStyle(behind).backgroundColor) : [255, 255, 255])].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}).reduce((a, b) => Math.min(a, b), 21)"""


@pytest.mark.parametrize("styled", [True, False], ids=["", "without its style sheet"])
@pytest.mark.parametrize("width", [360, 390, 1000])
def test_no_page_is_wider_than_the_screen(window: browser.Browser, width: int, styled: bool) -> None:
    wider = {}
    for name in ALL:
        page = browser.page_with_pictures(parsed(name))
        window.show(page if styled else re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL), width)
        widest = window.evaluate("Math.max(...[...document.all].map(e => e.getBoundingClientRect().right))")
        if window.evaluate("document.documentElement.scrollWidth") > width or widest > width:
            wider[name] = widest
    assert wider == {}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_letters_stand_out_from_what_is_behind_them(window: browser.Browser, dark: bool) -> None:
    faint = {}
    for name in ALL:
        window.show(browser.page_with_pictures(parsed(name)), 360, dark=dark)
        if (contrast := window.evaluate(CONTRAST)) < 4.5:  # WCAG 2.2, 1.4.3
            faint[name] = contrast
    assert faint == {}
