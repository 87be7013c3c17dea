"""Settings: where they come from, what they may be, and errors that name the variable and what is right."""

from __future__ import annotations

import ast
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Certificates

import client
import smtp_module as smtp
from smtp_module import ConfigError, Settings, SMTPConfig


def configured(**values: str) -> SMTPConfig:
    return SMTPConfig.from_settings(Settings(values))


# where settings come from


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("A=file\nB=file\nC=file\n")
    monkeypatch.setenv("B", "environment")
    monkeypatch.setenv("C", "environment")
    settings = Settings.load({"C": "flag", "A": None})
    assert [settings.read(name, str, "") for name in "ABC"] == ["file", "environment", "flag"]


def test_without_a_file_there_is_none_but_a_named_one_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings.load().read("NOTHING_SET", str, "default") == "default"
    with pytest.raises(ConfigError, match=r"other\.env"):
        Settings.load(env_file="other.env")


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("K=v", "v"), ("  K = v  ", "v"), ("export K=v", "v"), ("export\tK=v", "v"), ("K=", ""), ("K=a=b", "a=b"),
        ("K='a b'", "a b"), ('K="a b"', "a b"), ('K=" a b "', " a b "), ('K="it\'s"', "it's"),
        ("K='say \"x\"'", 'say "x"'),
        ("K=a # comment", "a"), ("K=a#b", "a#b"), ("K='a # b' # comment", "a # b"), ("K=# comment", ""),
        ("K='#x'", "#x"), ("K='unfinished", "'unfinished"), ("K=''", ""),
        ("\ufeffK=v", "v"), ("K=v\r", "v"), ("K=پارک", "پارک"),
    ],
)  # fmt: skip
def test_lines_of_the_file(tmp_path: Path, line: str, value: str) -> None:
    path = tmp_path / "settings"
    path.write_bytes(f"{line}\n# a comment\n\n".encode())
    assert smtp.read_env_file(str(path)) == client.read_env_file(str(path)) == {"K": value}


def test_a_settings_file_of_windows_says_how_to_save_it(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes("SMTP_HOST=x.org\n".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"\.env: cannot be read: save it as UTF-8$"):
        Settings.load(env_file=str(tmp_path / ".env"))


@pytest.mark.parametrize("content", [b"just words\n", b"=value\n", b"SMTP_PASS abc=d\n", b"K=\xff\n"])
def test_a_file_that_is_none_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "settings"
    path.write_bytes(b"A=1\n" + content)
    for read in (smtp.read_env_file, client.read_env_file):
        with pytest.raises((ConfigError, client.Stop), match="settings") as caught:
            read(str(path))
        assert "abc" not in str(caught.value)


def test_a_wrong_value_names_its_variable() -> None:
    with pytest.raises(ConfigError, match=r"^SMTP_PORT: 'x\\n2' is wrong; give a whole number from 1 to 65535$"):
        Settings({"SMTP_PORT": "x\n2"}).read("SMTP_PORT", smtp.whole(1, 65535), 0)
    assert Settings({"SMTP_PORT": "  "}).read("SMTP_PORT", smtp.whole(1, 65535), 7) == 7


PREFIXED = r"(?:ALERT|SMTP|DEVICE)_[A-Z_]+"


def test_the_known_names_are_those_of_the_tables_and_all_that_is_read() -> None:
    rows = [line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.startswith("| `")]
    in_tables = {name for row in rows for name in re.findall(f"`({PREFIXED})`", row.rpartition("|")[0])}
    programs = ("client.py", "server.py", "smtp_module.py", "embedded_smtpd.py")
    trees = [ast.walk(ast.parse((ROOT / program).read_text("utf-8"))) for program in programs]
    texts = [node.value for tree in trees for node in tree if isinstance(node, ast.Constant)]
    read = {text for text in texts if isinstance(text, str) and re.fullmatch(PREFIXED, text)}
    assert set(smtp.SETTINGS) == in_tables == read


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ALERT_RECIPENT", "ALERT_RECIPIENT"), ("ALERT_RECIPIENTS", "ALERT_RECIPIENT"), ("SMTP_PASSWORD", "SMTP_PASS"),
        ("SMTP_USERNAME", "SMTP_USER"), ("SMTP_SERVER", ""), ("DEVICE_OPERATOR", "DEVICE_OPERATORS"), ("ALERT_X", ""),
        ("SMPT_HOST", "SMTP_HOST"), ("smtp_host", "SMTP_HOST"), ("DEVICE_POTR", "DEVICE_PORT"),
    ],
)  # fmt: skip
def test_a_misspelled_setting_is_told_of_with_the_right_name_and_never_its_value(
    name: str, meant: str, caplog: pytest.LogCaptureFixture
) -> None:
    Settings({name: "hidden", "PATH": "hidden", "SERVICE_HOST": "hidden", "--port": "1"}).tell_misspelled()
    (sentence,) = caplog.messages
    assert sentence.startswith(f"{name} is no setting and has no effect")
    assert sentence.endswith(f"; did you mean {meant}?" if meant else "; README.md lists them all")


def test_a_setting_of_any_of_the_programs_is_no_mistake(caplog: pytest.LogCaptureFixture) -> None:
    Settings(dict.fromkeys(smtp.SETTINGS, "x")).tell_misspelled()
    assert not caplog.messages


# converters


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("5m", 300), ("1h", 3600), ("5d", 432000), ("0", 0), (" 1.5 H ", 5400)],
)
def test_durations(text: str, seconds: float) -> None:
    assert smtp.duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "count"),
    [("500000", 500000), ("16MiB", 16 << 20), ("2GiB", 2 << 30), ("2g", 2 << 30), ("1 kb", 1024), ("7B", 7), ("0", 0)],
)
def test_sizes(text: str, count: int) -> None:
    assert smtp.size(text) == count


@pytest.mark.parametrize(
    ("convert", "text"),
    [
        *((smtp.duration, text) for text in ("", "x", "-5", "5 minutes", "1e3", "nan", "٥", "9" * 5000)),
        *((smtp.size, text) for text in ("", "x", "-5", "1.5MiB", "5 TiB", "9" * 5000)),
        *((smtp.whole(1, 9), text) for text in ("", "0", "10", "1.0", "+1", "٣", "9" * 5000)),
        *((smtp.port, text) for text in ("65536", "-1", "http")),
        *((smtp.one_of("a", "b"), text) for text in ("", "c", "a b")),
    ],
)
def test_what_is_wrong_says_what_is_right(convert: Callable[[str], Any], text: str) -> None:
    with pytest.raises(ValueError, match=r"write|give|one of") as caught:
        convert(text)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("ann@example.com", "ann@example.com"), (" ann@example.com ", "ann@example.com"), ("ann+cam@example.com",) * 2,
        ("Ann <ann@example.com>", "ann@example.com"), ("ann@[192.0.2.1]",) * 2, ("ann@localhost",) * 2,
        ("ann@bücher.example", "ann@xn--bcher-kva.example"), ("o'hara@example.com",) * 2,
    ],
)  # fmt: skip
def test_addresses(text: str, plain: str) -> None:
    assert smtp.address(text) == plain


@pytest.mark.parametrize(
    "text",
    ["", "ann", "@x", "ann@", "a@b\r\nRCPT TO:<x@y>", "a@b, c@d", "a@b SIZE=1", "a b@c", "<a@b> SIZE=1@c\0", "a@b\0",
     "ä@b.c", "a@b>", "x" * 65 + "@b.c", "a@" + "ü" * 300],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a mail address"):
        smtp.address(text)


def test_lists_of_addresses() -> None:
    assert smtp.addresses("a@x.y, b@x.y,,a@x.y") == ("a@x.y", "b@x.y")
    with pytest.raises(ValueError, match="no address"):
        smtp.addresses(" , ")
    with pytest.raises(ValueError, match="with commas between"):
        smtp.addresses("a@x.y; b@x.y")


# the mail server


def test_nothing_configured_is_the_debug_receiver() -> None:
    config = configured()
    assert (config.host, config.port, config.security, config.user) == ("localhost", 1025, "none", "")
    assert config.debug
    assert smtp.address(config.sender)


def test_a_host_alone_is_submission_with_starttls() -> None:
    config = configured(SMTP_HOST="mail.example.com")
    assert (config.port, config.security, config.timeout_s, config.debug) == (587, "starttls", 30.0, False)


@pytest.mark.parametrize(
    ("host", "values", "security"),
    [
        ("x.org", {"SMTP_PORT": "465"}, "ssl"), ("x.org", {"SMTP_PORT": "25"}, "starttls"),
        *((host, {}, "none") for host in ("localhost", "LOCALHOST.", "127.0.0.5", "::1", "[::1]", "::ffff:127.0.0.1")),
        ("localhost", {"SMTP_PORT": "465"}, "ssl"), ("localhost.evil.org", {}, "starttls"),
        ("x.org", {"SMTP_SECURITY": "SSL"}, "ssl"), ("127.0.0.1", {"SMTP_SECURITY": "starttls"}, "starttls"),
        ("x.org", {"SMTP_USE_TLS": "false"}, "none"), ("x.org", {"SMTP_USE_TLS": "true"}, "starttls"),
        ("x.org", {"SMTP_USE_TLS": "false", "SMTP_SECURITY": "ssl"}, "ssl"),
    ],
)  # fmt: skip
def test_security(host: str, values: dict[str, str], security: str) -> None:
    assert configured(SMTP_HOST=host, **values).security == security


LOGIN = {"SMTP_HOST": "mail.example.com", "SMTP_USER": "ann@example.com", "SMTP_PASS": "secret-word"}


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"SMTP_HOST": "", "SMTP_USER": "ann"}, "SMTP_HOST"),
        *(({"SMTP_HOST": text}, "SMTP_HOST") for text in ("a b", "a\r\nb", "smtp.gmail.com:465")),
        ({"SMTP_PORT": "0"}, "SMTP_PORT"), ({"SMTP_PORT": "smtp"}, "SMTP_PORT"),
        ({"SMTP_SECURITY": "tls"}, "SMTP_SECURITY"), ({"SMTP_USE_TLS": "maybe"}, "SMTP_USE_TLS"),
        ({"SMTP_AUTH": "plain"}, "SMTP_AUTH"), ({"SMTP_FROM": "nobody"}, "SMTP_FROM"),
        *(({"SMTP_TIMEOUT": text}, "SMTP_TIMEOUT") for text in ("0", "soon", "999999d")),
        ({"SMTP_CAFILE": "/nowhere.pem"}, "SMTP_CAFILE"), ({"SMTP_USER": "ann"}, "SMTP_PASS"),
        ({**LOGIN, "SMTP_SECURITY": "none"}, "SMTP_SECURITY"), ({**LOGIN, "SMTP_USE_TLS": "no"}, "SMTP_SECURITY"),
        ({**LOGIN, "SMTP_PASS": "geheimwört"}, "SMTP_PASS"),
        ({"SMTP_USER": "a", "SMTP_PASS_FILE": "/nowhere"}, "SMTP_PASS_FILE"),
        ({"SMTP_USER": "a", "SMTP_PASS_COMMAND": "exit 3"}, "SMTP_PASS_COMMAND"),
    ],
)  # fmt: skip
def test_a_wrong_setting_stops_the_start_naming_it_and_no_secret(values: dict[str, str], names: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(**{"SMTP_HOST": "x.org", **values})
    assert str(caught.value).startswith(f"{names}:")
    assert not any(secret in str(caught.value) for secret in ("secret-word", "geheimwört"))


def test_a_password_in_the_clear_is_allowed_to_this_machine_only() -> None:
    assert configured(SMTP_HOST="127.0.0.1", SMTP_USER="ann", SMTP_PASS="x").security == "none"


@pytest.mark.parametrize(
    ("host", "password", "used"),
    [
        ("smtp.gmail.com", "abcd efgh ijkl mnop", "abcdefghijklmnop"),
        ("SMTP.GoogleMail.com", "ab\u00a0cd ef", "abcdef"),
        ("mail.example.com", " two words ", " two words "), ("notgmail.com", "a b", "a b"),
        ("mail.example.com", "#'\"=", "#'\"="),
    ],
)  # fmt: skip
def test_only_gmails_passwords_lose_their_blanks(host: str, password: str, used: str) -> None:
    assert configured(SMTP_HOST=host, SMTP_USER="ann", SMTP_PASS=password).password() == used


def test_a_password_command_that_fails_is_told_by_its_exit_code_and_not_by_what_it_printed() -> None:
    with pytest.raises(ConfigError, match=r"gives no password \(exit code 3\)$"):
        configured(SMTP_HOST="x.org", SMTP_USER="ann", SMTP_PASS_COMMAND="echo secret-word; exit 3")


def test_the_password_from_a_file_or_command_is_its_first_line_and_fetched_anew(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_bytes(b" first word \r\nsecond\n")
    config = configured(SMTP_HOST="x.org", SMTP_USER="ann", SMTP_PASS_FILE=str(path))
    assert config.password() == " first word "
    path.write_text("rotated")
    assert config.password() == "rotated"
    command = f'"{sys.executable}" -c "print(1); print(2)"'
    assert configured(SMTP_HOST="x.org", SMTP_USER="ann", SMTP_PASS_COMMAND=command).password() == "1"


def test_the_password_is_in_no_repr() -> None:
    config = configured(**LOGIN)
    assert config.password() == "secret-word"
    assert "secret-word" not in f"{config!r} {Settings(LOGIN)!r}"


def test_the_sender() -> None:
    assert configured(**LOGIN).sender == "ann@example.com"
    assert configured(**LOGIN, SMTP_FROM="Relay <relay@example.com>").sender == "Relay <relay@example.com>"
    assert configured(SMTP_HOST="x.org", SMTP_USER="ann", SMTP_PASS="x").sender == f"alerts@{smtp.hostname()}"


def test_certificates_are_verified_and_tls_is_1_2_or_later(certificates: Certificates) -> None:
    import ssl

    for config in (configured(SMTP_HOST="x.org"), configured(SMTP_HOST="x.org", SMTP_CAFILE=certificates.ca)):
        context = config.tls()
        assert context and context.check_hostname and context.verify_mode is ssl.CERT_REQUIRED
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_a_server_context_that_cannot_be_made_names_the_variables_and_the_file(
    certificates: Certificates, tmp_path: Path
) -> None:
    cert, key = certificates.pair("good")
    smtp.server_tls(cert, key, certificates.ca)
    (text := tmp_path / "text").write_text("no certificate")
    nowhere, folder = str(tmp_path / "nowhere"), str(tmp_path)
    for arguments, wrong in (
        ((nowhere, ""), nowhere), ((cert, nowhere), nowhere), ((cert, key, nowhere), nowhere),
        ((cert, folder), folder), ((str(text), key), str(text)), ((cert, key, str(text)), str(text)),
        ((cert, certificates.pair("wrong")[1]), certificates.pair("wrong")[1]),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=r"^X_CERT") as caught:
            smtp.server_tls(*arguments, names="X_CERT")
        assert wrong in str(caught.value), arguments


# logging


def test_a_log_record_is_one_line_whatever_it_holds(caplog: pytest.LogCaptureFixture) -> None:
    record = logging.LogRecord("x", logging.INFO, "", 1, "a\nb\x1b[31m\u202ec %s", ("\ud800" * 9999,), None)
    line = smtp.OneLine("%(message)s").format(record)
    assert line.isprintable() and len(line) < 30_000 and line.startswith("a\\nb\\x1b[31m\\u202ec")


@pytest.mark.parametrize("text", ["plain", "پارکینگ", "车库", "👨\u200d👩\u200d👧", "می\u200cشود"])
def test_what_people_write_stays_as_it_is(text: str) -> None:
    assert smtp.printable(text) == text
