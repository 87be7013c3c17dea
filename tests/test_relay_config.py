"""Every ALERT_* variable: its default, good values, and bad ones, which are named with the part that is wrong."""

import dataclasses
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import server
import smtp_module as smtp

REAL = {"SMTP_HOST": "mail.example.com", "SMTP_SECURITY": "none", "ALERT_RECIPIENT": "a@example.com"}
VARIABLES = {entry.metadata["name"] for entry in dataclasses.fields(server.RelayConfig) if entry.metadata}


def load(**values: str) -> server.RelayConfig:
    settings = smtp.Settings({**REAL, **values})
    return server.RelayConfig.from_settings(settings, smtp.SMTPConfig.from_settings(settings))


def minutes(*windows: tuple[Iterable[int], int, int]) -> set[int]:
    """The minutes of the week from one hour of these weekdays to another, which may be one of the next day."""
    week = 7 * 24 * 60
    return {
        ((day * 24 + start) * 60 + minute) % week
        for days, start, end in windows
        for day in days
        for minute in range((end - start) * 60)
    }


EVERY, WORK = range(7), range(5)

GOOD: list[tuple[str, str, str, Any]] = [
    # variable, value, field, what it becomes; an empty value is the default
    ("HOST", "", "host", "127.0.0.1"),
    ("HOST", "::1", "host", "::1"),
    ("HOST", "[fe80::1%eth0]", "host", "fe80::1%eth0"),
    ("HOST", "relay.lan", "host", "relay.lan"),
    ("PORT", "", "port", 5000),
    ("PORT", "0", "port", 0),
    ("PORT", "65535", "port", 65535),
    ("RECIPIENT", "a@x.org", "recipients", ("a@x.org",)),
    ("RECIPIENT", " a@x.org , b@y.org,a@x.org ", "recipients", ("a@x.org", "b@y.org")),
    ("SPOOL", "", "spool", "spool/alerts.db"),
    ("SPOOL", "/var/spool/a b.db", "spool", "/var/spool/a b.db"),
    ("TOKEN", "", "token", ""),
    ("TOKEN", " s3cret ", "token", "s3cret"),
    ("MAX_LINE", "", "max_line", 16 << 20),
    ("MAX_LINE", "500000", "max_line", 500_000),
    ("MAX_LINE", "1MiB", "max_line", 1 << 20),
    ("MAX_CONNECTIONS", "", "max_connections", 4096),
    ("MAX_CONNECTIONS", "1", "max_connections", 1),
    ("IDLE_TIMEOUT", "", "idle_timeout_s", 300.0),
    ("IDLE_TIMEOUT", "90", "idle_timeout_s", 90.0),
    ("IDLE_TIMEOUT", "5m", "idle_timeout_s", 300.0),
    ("SENDERS", "", "senders", 2),
    ("SENDERS", "8", "senders", 8),
    ("COOLDOWN", "", "cooldown_s", 0.0),
    ("COOLDOWN", "0", "cooldown_s", 0.0),
    ("COOLDOWN", "60", "cooldown_s", 60.0),
    ("COOLDOWN", "1h", "cooldown_s", 3600.0),
    ("RETRY_FIRST", "", "retry_first_s", 5.0),
    ("RETRY_FIRST", "0.5", "retry_first_s", 0.5),
    ("RETRY_MAX", "", "retry_max_s", 3600.0),
    ("RETRY_MAX", "10m", "retry_max_s", 600.0),
    ("MAX_AGE", "", "max_age_s", 432_000.0),
    ("MAX_AGE", "5d", "max_age_s", 432_000.0),
    ("REFUSED_AFTER", "", "refused_after_s", 86_400.0),
    ("REFUSED_AFTER", "0", "refused_after_s", 0.0),
    ("REFUSED_AFTER", "2h", "refused_after_s", 7200.0),
    ("DAILY_MAX", "", "daily_max", 0),
    ("DAILY_MAX", "500", "daily_max", 500),
    ("PRIORITY", "", "priority", ("DOOR_OPENED", "TAMPER_DETECTED", "CAMERA_*")),
    ("PRIORITY", "PANIC, cam[12]_*", "priority", ("PANIC", "cam[12]_*")),
    ("QUIET", "", "quiet", set()),
    ("QUIET", "22:00-07:00", "quiet", minutes((EVERY, 22, 31))),
    ("QUIET", " 22:00 - 7:00 ; ", "quiet", minutes((EVERY, 22, 31))),
    ("QUIET", "Mon-Fri 22:00-07:00; Sat,Sun 23:00-09:00", "quiet", minutes((WORK, 22, 31), ((5, 6), 23, 33))),
    ("QUIET", "fri - mon 01:00-02:00", "quiet", minutes(((4, 5, 6, 0), 1, 2))),
    ("QUIET", "Monday,Wednesday 01:00-02:00", "quiet", minutes(((0, 2), 1, 2))),
    ("QUIET", "Mon 08:30-08:31; Mon 08:29-08:30", "quiet", {8 * 60 + 29, 8 * 60 + 30}),
    ("QUIET", "Sun 00:00-24:00", "quiet", minutes(((6,), 0, 24))),
    ("ROUTES", "", "routes", ()),
    ("ROUTES", "cam1,DOOR_*=a@x.org,b@y.org; garage*=c@z.org", "routes",
     (server.Route(("cam1", "DOOR_*"), ("a@x.org", "b@y.org")), server.Route(("garage*",), ("c@z.org",)))),
    ("ROUTES", "back door=a@x.org;", "routes", (server.Route(("back door",), ("a@x.org",)),)),
    ("EXPECT", "", "expect", ()),
    ("EXPECT", "cam1=5m, garage=1h,*=10m", "expect", (("cam1", 300.0), ("garage", 3600.0), ("*", 600.0))),
    ("EXPECT", "a=b=90", "expect", (("a=b", 90.0),)),
    ("SUMMARY_AT", "", "summary_at", None),
    ("SUMMARY_AT", "08:00", "summary_at", 8 * 60),
    ("SUMMARY_AT", "8:05", "summary_at", 8 * 60 + 5),
    ("SUMMARY_AT", "00:00", "summary_at", 0),
    ("LANG", "", "lang", "en"),
    ("LANG", "FA", "lang", "fa"),
    ("LANG", "zh", "lang", "zh"),
    ("SPOOL_MAX", "", "spool_max", 2 << 30),
    ("SPOOL_MAX", "500MB", "spool_max", 500 << 20),
]  # fmt: skip


@pytest.mark.parametrize(("variable", "text", "field", "value"), GOOD, ids=[f"{row[0]}={row[1]}" for row in GOOD])
def test_good_value_of_the_table(variable: str, text: str, field: str, value: Any) -> None:
    assert getattr(load(**{f"ALERT_{variable}": text}), field) == value


BAD: list[tuple[str, str, str]] = [
    # variable, value, a part of the sentence that says what is wrong
    ("HOST", "127.0.0.1:5000", "without a port"),
    ("HOST", "my relay", "'my relay'"),
    ("PORT", "http", "'http'"),
    ("PORT", "65536", "'65536'"),
    ("PORT", "-1", "'-1'"),
    ("RECIPIENT", "a@x.org,nobody", "'nobody'"),
    ("RECIPIENT", ",", "name@example.com"),
    ("RECIPIENT", "a@x.org> SIZE=1", "mail address"),
    ("MAX_LINE", "0", "more than 0"),
    ("MAX_LINE", "16 MiBs", "'16 MiBs'"),
    ("MAX_CONNECTIONS", "0", "from 1"),
    ("MAX_CONNECTIONS", "many", "'many'"),
    ("IDLE_TIMEOUT", "0", "more than 0"),
    ("IDLE_TIMEOUT", "5 minutes", "'5 minutes'"),
    ("SENDERS", "0", "from 1 to 64"),
    ("SENDERS", "65", "from 1 to 64"),
    ("COOLDOWN", "-5", "'-5'"),
    ("COOLDOWN", "1w", "'1w'"),
    ("RETRY_FIRST", "0", "more than 0"),
    ("RETRY_MAX", "soon", "'soon'"),
    ("MAX_AGE", "0d", "more than 0"),
    ("REFUSED_AFTER", "-1", "'-1'"),
    ("REFUSED_AFTER", "never", "'never'"),
    ("DAILY_MAX", "1.5", "'1.5'"),
    ("DAILY_MAX", "-1", "'-1'"),
    ("PRIORITY", "DOOR_*,,CAM", "pattern"),
    ("PRIORITY", "cam[1", "'cam[1'"),
    ("QUIET", "always", "'always'"),
    ("QUIET", "22:00", "two times"),
    ("QUIET", "22:00-25:00", "'25:00'"),
    ("QUIET", "22:00-07:60", "'07:60'"),
    ("QUIET", "22:00-07:00; Mon-Fri 9-17", "'9'"),
    ("QUIET", "Mon-Fri 22:00-07:00; Funday 23:00-09:00", "'Fun'"),
    ("QUIET", "Mon-Fry 22:00-07:00", "'Fry'"),
    ("QUIET", "07:00-07:00", "two times"),
    ("QUIET", "00:00-24:00", "never ends"),
    ("QUIET", "00:00-12:00; 11:00-00:00", "never ends"),
    ("QUIET", "Mon-Sat 00:00-24:00; Sun 00:00-12:00; Sun 12:00-24:00", "never ends"),
    ("ROUTES", "cam1", "'cam1'"),
    ("ROUTES", "cam1=a@x.org; garage", "'garage'"),
    ("ROUTES", "cam1=a@x.org; garage=nobody", "'nobody'"),
    ("ROUTES", "cam1,,cam2=a@x.org", "pattern"),
    ("ROUTES", "=a@x.org", "pattern"),
    ("ROUTES", "cam1=", "no address"),
    ("ROUTES", "cam[1=a@x.org", "'cam[1'"),
    ("EXPECT", "cam1", "'cam1'"),
    ("EXPECT", "cam1=5m,=1h", "'=1h'"),
    ("EXPECT", "cam1=5x", "'5x'"),
    ("EXPECT", "cam1=0", "more than 0"),
    ("EXPECT", "cam1=", "'cam1='"),
    ("SUMMARY_AT", "8", "'8'"),
    ("SUMMARY_AT", "24:00", "'24:00'"),
    ("SUMMARY_AT", "08:00:00", "'08:00:00'"),
    ("SUMMARY_AT", "8 Uhr", "08:00"),
    ("LANG", "de", "en, fa, zh"),
    ("SPOOL_MAX", "0", "more than 0"),
    ("SPOOL_MAX", "-1GiB", "'-1GiB'"),
]


@pytest.mark.parametrize(("variable", "text", "part"), BAD, ids=[f"{row[0]}={row[1]}" for row in BAD])
def test_bad_value_is_named_with_the_part_that_is_wrong(variable: str, text: str, part: str) -> None:
    with pytest.raises(smtp.ConfigError) as caught:
        load(**{f"ALERT_{variable}": text})
    sentence = str(caught.value)
    assert sentence.startswith(f"ALERT_{variable}: ") and part in sentence
    assert "\n" not in sentence and smtp.printable(sentence, 1000) == sentence


@pytest.mark.parametrize("variable", sorted(VARIABLES - {"ALERT_SPOOL"}))
def test_bad_value_stops_the_program_with_78(
    variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in REAL.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(variable, "=;no\x1b[2J such\nthing;=")
    with pytest.raises(SystemExit) as caught:
        server.main([])
    error = capsys.readouterr().err
    assert caught.value.code == 78 and variable in error and "\x1b" not in error
    assert not list(tmp_path.iterdir())


def test_every_variable_is_in_the_tables() -> None:
    assert {f"ALERT_{row[0]}" for row in GOOD} == VARIABLES | {"ALERT_TOKEN"}


def test_recipient_is_needed_where_a_mail_server_is_configured() -> None:
    with pytest.raises(smtp.ConfigError, match="ALERT_RECIPIENT: missing"):
        load(ALERT_RECIPIENT="")


def test_debug_fallback_needs_nothing_and_sends_one_mail_at_a_time() -> None:
    settings = smtp.Settings({})
    config = server.RelayConfig.from_settings(settings, smtp.SMTPConfig.from_settings(settings))
    assert config.recipients == ("alerts@localhost",) and config.senders == 1
    settings = smtp.Settings({"ALERT_SENDERS": "3", "ALERT_RECIPIENT": "me@x.org"})
    config = server.RelayConfig.from_settings(settings, smtp.SMTPConfig.from_settings(settings))
    assert config.recipients == ("me@x.org",) and config.senders == 3


@pytest.mark.parametrize(
    "values",
    [
        {"ALERT_RECIPIENT": "a@x.org,b@y.org,c@z.org"},
        {"ALERT_ROUTES": "cam1=a@x.org,b@y.org,c@z.org"},
        {"ALERT_RECIPIENT": "a@x.org,b@y.org", "ALERT_ROUTES": "cam1=a@x.org; cam2=a@x.org,b@y.org,c@z.org"},
    ],
)
def test_daily_limit_below_the_longest_list_of_recipients_is_an_error(values: dict[str, str]) -> None:
    with pytest.raises(smtp.ConfigError, match=r"ALERT_DAILY_MAX: .* 3 recipients"):
        load(ALERT_DAILY_MAX="2", **values)
    assert load(ALERT_DAILY_MAX="3", **values).daily_max == 3
    assert load(ALERT_DAILY_MAX="0", **values).daily_max == 0


def test_token_is_in_no_repr() -> None:
    assert "s3cret" not in repr(load(ALERT_TOKEN="s3cret"))


@pytest.mark.parametrize("name", ["ALERT_TLS_KEY", "ALERT_TLS_CLIENT_CA"])
def test_tls_without_a_certificate_is_an_error_and_not_a_plain_port(name: str) -> None:
    with pytest.raises(smtp.ConfigError, match=f"ALERT_TLS_CERT: missing, though {name}"):
        load(**{name: "x.pem"})


def test_certificate_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(smtp.ConfigError, match="ALERT_TLS_CERT"):
        load(ALERT_TLS_CERT=str(tmp_path / "no.pem"))


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_certificate_with_its_key_switches_tls_on(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    subprocess.run([*make.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    with pytest.raises(smtp.ConfigError, match=rf"{cert.name} \(certificate and key\): cannot be used"):
        load(ALERT_TLS_CERT=str(cert))
    config = load(ALERT_TLS_CERT=str(cert), ALERT_TLS_KEY=str(key), ALERT_TLS_CLIENT_CA=str(cert))
    assert config.tls and config.client_ca


EXPOSED = [
    ("127.0.0.1", "", False),
    ("::1", "", False),
    ("localhost", "", False),
    ("0.0.0.0", "", True),
    ("::", "", True),
    ("192.168.1.2", "", True),
    ("0.0.0.0", "secret", False),
]


@pytest.mark.parametrize(("host", "token", "exposed"), EXPOSED)
def test_listening_beyond_this_machine_needs_a_token_or_certificates(host: str, token: str, exposed: bool) -> None:
    assert load(ALERT_HOST=host, ALERT_TOKEN=token).exposed() is exposed


def test_flag_wins_over_the_environment_and_the_environment_over_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ALERT_HOST", "ALERT_PORT", "ALERT_SPOOL", "ALERT_LANG"):
        monkeypatch.delenv(name, raising=False)
    lines = ("# comment", "export ALERT_PORT='1'", 'ALERT_SPOOL="f.db"', "ALERT_LANG=fa", "ALERT_HOST=file")
    Path(".env").write_text("\n".join(lines))
    monkeypatch.setenv("ALERT_PORT", "2")
    monkeypatch.setenv("ALERT_HOST", "environment")
    settings = smtp.Settings.load({"ALERT_PORT": 3})
    config = server.RelayConfig.from_settings(settings, smtp.SMTPConfig.from_settings(settings))
    assert (config.port, config.host, config.spool, config.lang) == (3, "environment", "f.db", "fa")
