"""Settings: where they come from, what they may be, and errors that name the variable and what is right."""

from __future__ import annotations

import ast
import contextlib
import errno
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Certificates

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
        ("K='#x'", "#x"), ("K=''", ""), ('K=""', ""), ("K=it's", "it's"), ('K=a"b" c', 'a"b" c'), ("K=a\\nb", "a\\nb"),
        ("\ufeffK=v", "v"), ("K=v\r", "v"), ("K='v'\r", "v"), ("K=پارک", "پارک"), ("K=a\u2028b\x0cc", "a\u2028b\x0cc"),
    ],
)  # fmt: skip
def test_lines_of_the_file(tmp_path: Path, line: str, value: str) -> None:
    path = tmp_path / "settings"
    path.write_bytes(f"{line}\n# a comment\n\n".encode())
    assert smtp.read_env_file(str(path)) == {"K": value}


SHELL_WORDS = [
    "'a b'", '"a b"', "''", '""', r""""a\"b" """, r"""'it'\''s'""", r"""'it'"'"'s'""", r'"a\\b"', r'"a\nb"', r"'a\b'",
    r'"pa\$\$word"', r'"a\`b"', r"'$HOME'", '"a"b', '"a"#b', "'a # b' # comment", '"a" # it\'s "one" of these',
    r""""a"\ b""", '"سلام"', '"a"\t#', r'"\\"', r'"\""', "'\"'",
]  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="a shell is asked")
def test_a_value_in_quotes_is_read_as_a_shell_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "settings"
    path.write_text("".join(f"K{number}={word}\n" for number, word in enumerate(SHELL_WORDS)), "utf-8")
    shown = "; ".join(f'printf "%s\\0" "$K{number}"' for number in range(len(SHELL_WORDS)))
    asked = subprocess.run(["sh", "-c", f". {path}; {shown}"], capture_output=True, check=True, timeout=30)
    expected = asked.stdout.decode("utf-8").split("\0")[:-1]
    assert list(smtp.read_env_file(str(path)).values()) == expected


@pytest.mark.parametrize("value", ["'unfinished", '"unfinished', "'a' b", '"a" b # c', "'a' 'b'", "'a'b'", '"a\\"', "'it's'"])
def test_what_is_left_over_behind_the_quotes_is_an_error_that_names_the_line(tmp_path: Path, value: str) -> None:
    path = tmp_path / "settings"
    path.write_text(f"A=1\nK={value}\n")
    with pytest.raises(ConfigError, match=r"settings line 2: a value in quotes must end with its quote"):
        smtp.read_env_file(str(path))


def owned_by(uid: int, path: Path) -> None:
    try:
        os.chown(path, uid, -1)
    except (PermissionError, AttributeError):
        pytest.skip("only root gives files away")


def test_a_settings_file_of_somebody_else_is_refused_unless_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ".env"
    path.write_text("ALERT_LANG=fa\n")
    path.chmod(0o644)
    owned_by(os.geteuid() + 1000, path)
    with pytest.raises(ConfigError, match=r"^\.env: belongs to another user, .*--env-file"):
        Settings.load()
    assert Settings.load(env_file=".env").read("ALERT_LANG", str, "") == "fa"


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such bits")
@pytest.mark.parametrize(("mode", "refused"), [(0o600, False), (0o640, False), (0o664, False), (0o666, True)])
def test_a_settings_file_that_everybody_may_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, refused: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ".env"
    path.write_text("ALERT_LANG=fa\n")
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600") if refused else contextlib.nullcontext():
        Settings.load()


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such bits")
@pytest.mark.parametrize(
    ("line", "mode", "warned"),
    [
        ("SMTP_PASS=secret-word", 0o644, True), ("ALERT_TOKEN=secret-word", 0o604, True),
        ("DEVICE_SECRET=secret-word", 0o644, True), ("DEVICE_PASS=secret-word", 0o644, True),
        ("SMTP_PASS=secret-word", 0o640, False), ("SMTP_PASS=secret-word", 0o600, False),
        ("SMTP_PASS=", 0o644, False), ("SMTP_USER=ann", 0o644, False),
    ],
)  # fmt: skip
def test_a_password_that_everybody_can_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: str, mode: int, warned: bool
) -> None:
    path = tmp_path / "settings"
    path.write_text(line)
    path.chmod(mode)
    Settings.load(env_file=str(path))
    assert ("every user of this machine can read it: chmod 600" in caplog.text) == warned
    assert "secret-word" not in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "warned"),
    [
        ("SMTP_PASS", '"secret-word"', True), ("SMTP_HOST", "'mail.example.com'", True), ("ALERT_TOKEN", '""', True),
        ("SMTP_PASS", '"', False), ("SMTP_PASS", "'secret\"", False), ("SMTP_PASS", "secret-word", False),
        ("SMTP_FROM", '"Ann" <ann@example.com>', False), ("SMTP_PASS_COMMAND", '"/a b/c" "x"', False),
        ("OTHER", '"x"', False),
    ],
)  # fmt: skip
def test_quotes_that_docker_leaves_around_a_value_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, value: str, warned: bool
) -> None:
    monkeypatch.setenv(name, value)
    assert Settings.load().secret(name) == value
    assert (f"{name}: take away the quotes" in caplog.text) == warned
    assert "secret-word" not in caplog.text


def test_a_settings_file_of_windows_says_how_to_save_it(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes("SMTP_HOST=x.org\n".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"\.env: cannot be read: save it as UTF-8$"):
        Settings.load(env_file=str(tmp_path / ".env"))


@pytest.mark.parametrize("content", [b"just words\n", b"=value\n", b"SMTP_PASS abc=d\n", b"K=\xff\n"])
def test_a_file_that_is_none_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "settings"
    path.write_bytes(b"A=1\n" + content)
    with pytest.raises(ConfigError, match="settings") as caught:
        smtp.read_env_file(str(path))
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
    [("90", 90), ("90s", 90), (".5", 0.5), (".5h", 1800), ("5m", 300), ("1h", 3600), ("5d", 432000), ("0", 0), (" 1.5 H ", 5400)],
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
        *((smtp.duration, text) for text in ("", "x", "-5", "5.", ".", "5 minutes", "1e3", "nan", "٥", "9" * 5000)),
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


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("faß.de", "xn--fa-hia.de"), ("βόλος.com", "xn--nxasmm1c.com"), ("www.FAẞ.de", "www.xn--fa-hia.de"),
        ("نامه\u200cای.com", "xn--mgba3gch31f060k.com"), ("ශ්\u200dරී.com", "xn--10cl1a0b660p.com"),
        ("ΒΌΛΟς。COM", "xn--nxasmm1c.com"),
    ],
)  # fmt: skip
def test_a_domain_that_is_another_by_idna_2008_is_refused_with_its_right_form(name: str, right: str) -> None:
    for read in (smtp.host_name, smtp.ehlo_name, lambda text: smtp.addresses(f"a@x.org, ann@{text}")):
        with pytest.raises(ValueError, match=rf"write {re.escape(right)} "):
            read(name)  # type: ignore[operator]
    for setting in ("SMTP_HOST", "SMTP_FROM", "SMTP_ENVELOPE_FROM"):
        with pytest.raises(ConfigError, match=rf"^{setting}: .*{re.escape(right)}"):
            configured(**{"SMTP_HOST": "x.org", setting: name if setting == "SMTP_HOST" else f"a@{name}"})
    assert smtp.address(f"ann@{right}") == f"ann@{right}" and smtp.host_name(right) == right


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("mail.example.com", "mail.example.com"), ("[::1]", "::1"), ("fe80::1%eth0", "fe80::1%eth0"),
        ("bücher.example", "xn--bcher-kva.example"), ("例え.テスト", "xn--r8jz45g.xn--zckzah"),
        ("mail.example.com.", "mail.example.com"), ("localhost.", "localhost"), ("my_nas", "my_nas"),
    ],
)  # fmt: skip
def test_hosts(text: str, host: str) -> None:
    assert smtp.host_name(text) == host


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("mail.example.com", "mail.example.com"), ("nas", "nas"), ("[192.0.2.1]", "[192.0.2.1]"),
        ("192.0.2.1", "[192.0.2.1]"), ("[IPv6:2001:db8::1]", "[IPv6:2001:db8::1]"), ("2001:db8::1", "[IPv6:2001:db8::1]"),
        ("bücher.example", "xn--bcher-kva.example"),
    ],
)  # fmt: skip
def test_names_for_ehlo(text: str, name: str) -> None:
    assert configured(SMTP_HOST="x.org", SMTP_EHLO=text).ehlo == name


@pytest.mark.parametrize("text", ["a b", "a\r\nQUIT", "-a.org", "a..org", "a.org.", "a_b", "fe80::1%eth0", "x" * 64, "ü" * 300])
def test_a_wrong_name_for_ehlo_says_what_is_right(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^SMTP_EHLO: .* write mail.example.com or \[192.0.2.1\]"):
        configured(SMTP_HOST="x.org", SMTP_EHLO=text)


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
        ({"SMTP_AUTH": "ntlm"}, "SMTP_AUTH"), ({"SMTP_ENVELOPE_FROM": "ann"}, "SMTP_ENVELOPE_FROM"), ({"SMTP_FROM": "nobody"}, "SMTP_FROM"),
        *(({"SMTP_TIMEOUT": text}, "SMTP_TIMEOUT") for text in ("0", "soon", "999999d")),
        ({"SMTP_CAFILE": "/nowhere.pem"}, "SMTP_CAFILE"), ({"SMTP_USER": "ann"}, "SMTP_PASS"),
        ({**LOGIN, "SMTP_SECURITY": "none"}, "SMTP_SECURITY"), ({**LOGIN, "SMTP_USE_TLS": "no"}, "SMTP_SECURITY"),
        ({"SMTP_USER": "a", "SMTP_PASS_FILE": "/nowhere"}, "SMTP_PASS_FILE"),
        ({"SMTP_USER": "a", "SMTP_PASS_FILE": "/dev/null"}, "SMTP_PASS_FILE"),
    ],
)  # fmt: skip
def test_a_wrong_setting_stops_the_start_naming_it_and_no_secret(values: dict[str, str], names: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(**{"SMTP_HOST": "x.org", **values})
    assert str(caught.value).startswith(f"{names}:")
    assert "secret-word" not in str(caught.value)


def test_a_password_in_the_clear_is_allowed_to_this_machine_only() -> None:
    assert configured(SMTP_HOST="127.0.0.1", SMTP_USER="ann", SMTP_PASS="x").security == "none"


@pytest.mark.parametrize(
    ("host", "password", "used"),
    [
        ("smtp.gmail.com", "abcd efgh ijkl mnop", "abcdefghijklmnop"),
        ("SMTP.GoogleMail.com", "ab\u00a0cd ef", "abcdef"),
        ("mail.example.com", " two words ", " two words "), ("notgmail.com", "a b", "a b"),
        ("mail.example.com", "#'\"=", "#'\"="), ("mail.example.com", "geheimwört", "geheimwört"),
        ("mail.example.com", "secret\n", "secret"), ("mail.example.com", "\ufeffsecret\r\n", "secret"),
    ],
)  # fmt: skip
def test_only_gmails_passwords_lose_their_blanks(host: str, password: str, used: str) -> None:
    assert configured(SMTP_HOST=host, SMTP_USER="ann", SMTP_PASS=password).password() == used


@pytest.mark.parametrize(
    ("command", "why"), [("echo secret-word; exit 3", "exit code 3"), ("exit 0", "the first line is empty")]
)
def test_a_password_command_is_run_at_the_login_and_tells_why_it_failed_and_not_what_it_printed(
    command: str, why: str
) -> None:
    config = configured(SMTP_HOST="x.org", SMTP_USER="ann", SMTP_PASS_COMMAND=command)
    with pytest.raises(ConfigError, match=rf"^SMTP_PASS_COMMAND: gives no password \({why}\)$"):
        config.password()


@pytest.mark.skipif(os.name != "posix", reason="written for a POSIX shell")
def test_a_password_command_gets_nothing_of_the_standard_input() -> None:
    code = "import smtp_module as s; print(s.SMTPConfig.from_settings(s.Settings.load()).password(), input())"
    login = {"SMTP_HOST": "x.org", "SMTP_USER": "ann", "SMTP_PASS_COMMAND": "cat; echo pw"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **login}, input=b"the mail\n", capture_output=True,
        check=False, timeout=30,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (b"pw the mail\n", b"")


@pytest.mark.parametrize(
    ("content", "password"),
    [
        (b"secret", "secret"), (b"secret\n", "secret"), (b"\xef\xbb\xbfsecret\r\nmore\r\n", "secret"),
        ("geheimwört\n".encode(), "geheimwört"), (b" se cret \n", " se cret "), (b'"secret"\n', '"secret"'),
    ],
)  # fmt: skip
def test_a_password_file_as_editors_write_it(tmp_path: Path, content: bytes, password: str) -> None:
    (tmp_path / "password").write_bytes(content)
    config = configured(SMTP_HOST="x.org", SMTP_USER="ann", SMTP_PASS_FILE=str(tmp_path / "password"))
    assert config.password() == password


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "the first line is empty"), (b"\nsecret-word\n", "the first line is empty"),
        ("secret-word".encode("utf-16"), "it is not UTF-8"), (None, "Is a directory"),
    ],
)  # fmt: skip
def test_a_password_file_that_is_none_says_why(tmp_path: Path, content: bytes | None, why: str) -> None:
    if content is not None:
        (tmp_path / "password").write_bytes(content)
    path = tmp_path if content is None else tmp_path / "password"
    with pytest.raises(ConfigError, match=rf"^SMTP_PASS_FILE: {path}: gives no password \({why}\)$") as caught:
        configured(SMTP_HOST="x.org", SMTP_USER="ann", SMTP_PASS_FILE=str(path))
    assert "secret-word" not in str(caught.value)


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


# what heals itself


@pytest.mark.parametrize(
    "error",
    [
        socket.gaierror(socket.EAI_NONAME, "Name or service not known"), OSError(errno.EADDRNOTAVAIL, "Cannot assign"),
        smtp.SpoolError("/mnt/usb/alerts.db: No such file or directory"),
    ],
)  # fmt: skip
def test_what_a_machine_gets_later_is_waited_for_and_said_once(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(smtp, "START_RETRY_S", 0.001)
    if isinstance(error, smtp.SpoolError):
        error.__cause__ = FileNotFoundError(errno.ENOENT, "No such file or directory")
    troubles = [error] * 3

    def start() -> str:
        if troubles:
            raise troubles.pop()
        return "started"

    stopping, other = socket.socketpair()
    with stopping, other:
        assert smtp.when_possible(start, stopping, "ALERT_HOST") == "started"
        assert [line.partition(": ")[2].partition(":")[0] for line in caplog.messages] == ["ALERT_HOST"]
        troubles += [error] * 1000
        other.send(b"!")
        assert smtp.when_possible(start, stopping, "ALERT_HOST") is None


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EADDRINUSE, "in use"), PermissionError(errno.EACCES, "no"), smtp.SpoolBusy("another process has it")],
)
def test_what_does_not_heal_itself_ends_the_start(error: Exception) -> None:
    def start() -> None:
        raise error

    stopping, other = socket.socketpair()
    with stopping, other, pytest.raises(type(error)):
        smtp.when_possible(start, stopping, "ALERT_HOST")


# logging


def test_a_log_record_is_one_line_whatever_it_holds(caplog: pytest.LogCaptureFixture) -> None:
    record = logging.LogRecord("x", logging.INFO, "", 1, "a\nb\x1b[31m\u202ec %s", ("\ud800" * 9999,), None)
    line = smtp.OneLine("%(message)s").format(record)
    assert line.isprintable() and len(line) < 30_000 and line.startswith("a\\nb\\x1b[31m\\u202ec")


@pytest.mark.parametrize("text", ["plain", "پارکینگ", "车库", "👨\u200d👩\u200d👧", "می\u200cشود"])
def test_what_people_write_stays_as_it_is(text: str) -> None:
    assert smtp.printable(text) == text
