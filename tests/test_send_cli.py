"""The command line as people and programs call it: exit codes, words, and the mail that arrives."""

from __future__ import annotations

import contextlib
import email
import email.policy
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CLOSE, PNG, ROOT, Scripted, wait_for
from test_courier import ANN, AWAY, BOB, REFUSED, Bench, Policy

import smtp_module as smtp

pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.fixture
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("SMTP_", "ALERT_")):
            monkeypatch.delenv(name)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call main() as the shell would: exit code, standard output, standard error."""

    def call(
        *argv: str, stdin: bytes = b"", named: str = "smtp_module.py", **environment: object
    ) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [named])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        try:
            code = smtp.main(argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


Run = Callable[..., tuple[int, str, str]]
Start = Callable[..., Scripted]


def at(server: Any, **more: str) -> dict[str, str]:
    """The environment in which mail goes to this server."""
    mail = {"SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(server.port), "SMTP_TIMEOUT": "5"}
    return {**mail, "SMTP_FROM": "relay@example.com", **more}


def message(server: Any, number: int = -1) -> Any:
    wait_for(lambda: server.mails)
    return email.message_from_bytes(server.mails[number].content, policy=email.policy.default)


def recipients(server: Any) -> list[str]:
    """Who got a mail, each one of their own."""
    assert all(len(mail.recipients) == 1 for mail in server.mails)
    return [mail.recipients[0] for mail in server.mails]


# The library


def test_send_email_with_the_configuration_of_the_environment(
    scripted: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = scripted()
    for name, value in at(server).items():
        monkeypatch.setenv(name, value)
    smtp.send_email("Hello", "text", ["ann@example.com", "bob@example.com"], None, "a.png", PNG)
    mail = message(server)
    assert (mail["Subject"], mail["From"]) == ("Hello", "relay@example.com")
    assert [part.get_filename() for part in mail.iter_attachments()] == ["a.png"]
    assert next(mail.iter_attachments()).get_content() == PNG
    assert recipients(server) == ["ann@example.com", "bob@example.com"] and server.connections == 1
    smtp.send_email("Hello", "text", "ann@example.com", "Me <me@example.com>")
    assert (message(server)["From"], server.mails[-1].sender) == ("Me <me@example.com>", "me@example.com")


def test_send_email_goes_on_to_the_others_and_says_who_has_it(scripted: Start) -> None:
    server = scripted(answers={"RCPT": [b"250 ok\r\n", b"550 5.1.1 unknown\r\n"]})
    config = smtp.SMTPConfig(host="127.0.0.1", port=server.port, sender="relay@example.com")
    to = ["ann@example.com", "bob@example.com", "eve@example.com"]
    with pytest.raises(smtp.SendError, match=r"bob@example.com: rcpt: 550 5\.1\.1 unknown") as caught:
        smtp.send_email("s", "t", to, config=config)
    assert "Sent to ann@example.com, eve@example.com" in str(caught.value)
    assert recipients(server) == ["ann@example.com", "eve@example.com"]
    assert {name: outcome.verdict.name for name, outcome in caught.value.outcomes.items()} == {
        "ann@example.com": "SENT", "bob@example.com": "REFUSED", "eve@example.com": "SENT",
    }  # fmt: skip


def test_send_email_refuses_addresses_that_are_none(scripted: Start) -> None:
    config = smtp.SMTPConfig(host="127.0.0.1", port=scripted().port, sender="relay@example.com")
    with pytest.raises(ValueError, match="not a mail address"):
        smtp.send_email("s", "t", ["ann@example.com\r\nRCPT TO:<x@y.z>"], config=config)
    with pytest.raises(ValueError, match="not a mail address"):
        smtp.send_email("s", "t", ["ann@example.com"], "nobody", config=config)


@pytest.mark.parametrize("answers", [{"MAIL": [b"250 ok\r\n", *[b"550 not you\r\n"] * 9]}, {"greeting": b"554 no\r\n"}])
def test_trouble_about_us_ends_the_round(scripted: Start, answers: dict[str, Any]) -> None:
    server = scripted(answers=answers, extensions=())
    config = smtp.SMTPConfig(host="127.0.0.1", port=server.port, sender="relay@example.com")
    with pytest.raises(smtp.SendError) as caught:
        smtp.send_email("s", "t", [f"u{number}@example.com" for number in range(9)], config=config)
    assert len(caught.value.outcomes) == 9 and server.verbs().count("MAIL") <= 3 and server.connections <= 2
    assert all(f"u{number}@example.com" in str(caught.value) for number in range(9)), "it says who has not got it"


# send


def test_send(run: Run, scripted: Start, tmp_path: Path) -> None:
    server = scripted()
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.html").write_text("<b>سلام</b>")
    code, out, err = run(
        "send", "--to", "ann@example.com,carl@example.com", "--to", "bob@example.com", "--cc", "dora@example.com",
        "--subject", "باز شد",
        "--body", "-", "--html", "b.html", "--attach", "a.png", "--from", "Me <me@example.com>", stdin="متن".encode(),
        **at(server),
    )  # fmt: skip
    assert (code, out, err) == (0, "", "")
    mail = message(server)
    assert (mail["Subject"], mail["To"], mail["Cc"]) == (
        "باز شد", "ann@example.com, carl@example.com, bob@example.com", "dora@example.com",
    )  # fmt: skip
    assert mail.get_body(("plain",)).get_content().strip() == "متن"
    assert mail.get_body(("html",)).get_content().strip() == "<b>سلام</b>"
    assert recipients(server) == [f"{name}@example.com" for name in ("ann", "carl", "bob", "dora")]
    assert len({mail.content for mail in server.mails}) == 1 and server.mails[0].sender == "me@example.com"


@pytest.mark.parametrize(("terminal", "text"), [(False, "from a pipe"), (True, "")])
def test_without_a_body_standard_input_is_read_unless_it_is_a_terminal(
    scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch, terminal: bool, text: str
) -> None:
    class Input(io.TextIOWrapper):
        def isatty(self) -> bool:
            return terminal

    server = scripted()
    for name, value in at(server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdin", Input(io.BytesIO(b"from a pipe")))
    assert smtp.main(["send", "--to", "a@x.org", "--subject", "s"]) == 0
    assert message(server).get_content().strip() == text


@pytest.mark.parametrize(
    ("extensions", "sentence"),
    [
        (("STARTTLS",), "only over TLS"), ((), "offers no such login here"), (("AUTH XOAUTH2",), "only access tokens"),
        (("STARTTLS", "AUTH NTLM GSSAPI"), "Windows logins"),
    ],
)  # fmt: skip
def test_a_login_that_the_server_does_not_offer(
    run: Run, scripted: Callable[..., Scripted], extensions: tuple[str, ...], sentence: str
) -> None:
    login = {"SMTP_USER": "ann", "SMTP_PASS": "secret-word"}
    code, _, err = run("send", "--to", "a@x.org", "--subject", "s", **at(scripted(extensions=extensions), **login))
    assert code == 75 and sentence in err and "secret-word" not in err


def test_a_password_command_that_fails_is_asked_again_later(run: Run, scripted: Callable[..., Scripted]) -> None:
    login = {"SMTP_USER": "ann", "SMTP_PASS_COMMAND": "exit 6"}
    code, _, err = run("send", "--to", "a@x.org", "--subject", "s", **at(scripted(extensions=("AUTH PLAIN",)), **login))
    assert code == 75 and "SMTP_PASS_COMMAND: gives no password (exit code 6)" in err


@pytest.mark.parametrize(
    ("answers", "code"),
    [
        ({"RCPT": b"550 5.1.1 unknown\r\n"}, 69), ({".": b"554 5.7.1 spam\r\n"}, 69), ({"RCPT": b"450 later\r\n"}, 75),
        ({"greeting": b"421 busy\r\n"}, 75), ({"MAIL": b"530 5.7.0 login first\r\n"}, 77),
        ({"AUTH": b"535 5.7.8 no\r\n"}, 77),
        ({"AUTH": b"454 4.7.0 later\r\n"}, 75), ({"RCPT": [b"250 ok\r\n", b"550 no\r\n"]}, 69), ({}, 0),
        ({"RCPT": [b"450 later\r\n", b"550 no\r\n"]}, 75), ({"RCPT": [b"250 ok\r\n", b"450 later\r\n"]}, 75),
    ],
)  # fmt: skip
def test_exit_codes(run: Run, scripted: Start, answers: dict[str, Any], code: int) -> None:
    server = scripted(answers=answers, extensions=("AUTH PLAIN",))
    login = {"SMTP_USER": "ann", "SMTP_PASS": "secret-word"}
    found, _, err = run("send", "--to", "a@x.org", "--to", "b@x.org", "--subject", "s", **at(server, **login))
    assert found == code
    assert bool(err) == bool(code) and err.count("\n") <= 1 and ("Sent to a@x.org" in err) == (len(server.mails) == 1) and "secret-word" not in err


def test_an_unreachable_server_is_75_and_says_what_to_do(run: Run) -> None:
    code, _, err = run("send", "--to", "a@x.org", "--subject", "s", SMTP_HOST="nowhere.invalid")
    assert code == 75 and "DNS" in err


@pytest.mark.parametrize(
    ("argv", "environment", "code", "words"),
    [
        (["send", "--to", "a@x.org", "--subject", "s"], {"SMTP_PORT": "0"}, 78, "SMTP_PORT"),
        (["send", "--to", "a@x.org", "--subject", "s"],
         {"SMTP_HOST": "x.org", "SMTP_USER": "a", "SMTP_PASS": "b", "SMTP_SECURITY": "none"}, 78, "in the clear"),
        (["send", "--to", "nobody", "--subject", "s"], {}, 65, "not a mail address"),
        (["send", "--to", "a@x.org", "--subject", "s", "--attach", "nothing.png"], {}, 65, "nothing.png"),
        (["check", "--to", "nobody"], {}, 65, "not a mail address"),
        (["send", "--subject", "s"], {}, 2, "--to"),
        (["queue", "--env-file", "nothing"], {}, 78, "nothing"),
        (["--env-file", "nothing", "queue"], {}, 78, "nothing"),
        (["queue"], {}, 65, "no such spool"),
        (["queue", "--spool", "x" * 300], {}, 65, "no such spool"),
        (["fly"], {}, 2, "fly"),
        ([], {}, 2, "COMMAND"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_call(
    run: Run, argv: list[str], environment: dict[str, str], code: int, words: str
) -> None:
    found, _, err = run(*argv, **environment)
    assert found == code and words in err and "Traceback" not in err


def test_trace_shows_the_dialogue_without_the_secret(run: Run, scripted: Start) -> None:
    server = scripted(extensions=("AUTH PLAIN",))
    code, _, err = run(
        "send", "--to", "a@x.org", "--subject", "s", "--trace", **at(server, SMTP_USER="ann", SMTP_PASS="secret")
    )
    assert code == 0 and "C: MAIL FROM:<relay@example.com>" in err and "AUTH PLAIN ****" in err
    assert "AGFubgBzZWNyZXQ=" not in err and "secret" not in err


def test_a_reader_of_the_trace_that_has_gone_stops_no_mail(
    run: Run, scripted: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    server = scripted()
    monkeypatch.setattr(sys, "stderr", Gone())
    assert run("send", "--to", "a@x.org", "--subject", "s", "--trace", **at(server))[0] == 0
    assert len(server.mails) == 1


# check


def test_check_goes_step_by_step_and_ends_before_data(run: Run, scripted: Start) -> None:
    server = scripted(extensions=("AUTH PLAIN",))
    code, out, _ = run("check", "--to", "ann@example.com", **at(server, SMTP_USER="ann", SMTP_PASS="secret"))
    assert code == 0
    steps = [line.split()[1] for line in out.splitlines() if line.startswith("ok")]
    assert steps == ["resolve", "connect", "greeting", "ehlo", "login", "sender", "recipient"]
    assert "only --send tries the rest" in out.splitlines()[-1]
    assert "DATA" not in server.verbs()


def test_check_asks_about_every_recipient_and_sends_each_a_mail_where_that_is_wanted(run: Run, scripted: Start) -> None:
    server = scripted(answers={"RCPT": [b"550 5.1.1 unknown\r\n"]})
    owners = {"ALERT_RECIPIENT": "ann@example.com,bob@example.com"}
    code, out, _ = run("check", "--send", **at(server, **owners))
    assert code == 69 and re.search(r"^FAIL  recipient +550 5\.1\.1 unknown \(ann@example\.com\)", out, re.M)
    assert "all is well" not in out
    assert recipients(server) == ["bob@example.com"]
    assert run("check", "--send", **at(server, **owners))[0] == 0
    assert recipients(server)[1:] == ["ann@example.com", "bob@example.com"]
    assert [part.get_content_type() for part in message(server).iter_attachments()] == ["image/png"]


@pytest.mark.parametrize(
    ("answers", "code", "step", "words"),
    [
        ({"AUTH": b"535 5.7.139 basic authentication is disabled\r\n"}, 77, "login", "SMTP_AUTH=xoauth2"),
        ({"MAIL": b"553 5.7.1 sender address rejected: not yours\r\n"}, 69, "sender", "SMTP_FROM"),
        ({"RCPT": b"553 5.7.1 <a@x.org>: Sender address rejected: not owned by user ann\r\n"}, 69, "recipient", "SMTP_FROM"),
        ({"RCPT": b"554 5.7.1 <a@x.org>: Relay access denied\r\n"}, 69, "recipient", "after a login"),
        ({"RCPT": b"450 4.2.0 greylisted, come back\r\n"}, 75, "recipient", "by itself"),
        ({"DATA": b"554 5.7.1 only 10 messages per day\r\n"}, 69, "data", "ALERT_COOLDOWN"),
        ({".": b"550 5.7.60 not permitted to send as this sender\r\n"}, 69, "dot", "SMTP_FROM"),
        ({".": b"554 5.7.1 virus found\r\n"}, 69, "dot", "content"),
        ({".": CLOSE}, 75, "dot", ""),
    ],
)
def test_check_says_what_failed_and_what_to_do(  # noqa: PLR0917
    run: Run, scripted: Start, answers: dict[str, bytes], code: int, step: str, words: str
) -> None:
    server = scripted(answers=answers, extensions=("AUTH LOGIN PLAIN",))
    settings = at(server, SMTP_USER="ann", SMTP_PASS="secret", ALERT_RECIPIENT="a@x.org")
    found, out, _ = run("check", "--send", **settings)
    assert found == code
    assert re.search(rf"^FAIL  {step} ", out, re.M) and words in out and "all is well" not in out


def test_check_tells_of_a_misspelled_setting(
    run: Run, scripted: Start, caplog: pytest.LogCaptureFixture
) -> None:
    run("check", **at(scripted(), SMTP_PASSWORD="secret"))
    assert "SMTP_PASSWORD is no setting and has no effect; did you mean SMTP_PASS?" in caplog.text


def test_check_in_debug_mode_says_so(run: Run, scripted: Start) -> None:
    code, out, _ = run("check", SMTP_PORT=scripted(answers={"greeting": b"554 no\r\n"}).port)
    assert code == 69 and "debug receiver" in out and "FAIL  greeting" in out


# queue, retry, drop


@pytest.fixture
def bench(spool: Path) -> Any:
    made = Bench(spool, Policy(ANN, BOB), rules=smtp.RetryRules(10.0, 3600.0, refused_after=0.0))
    yield made
    made.outbox.close()


def fail(bench: Bench, *names: str) -> None:
    """Put these, and have the server refuse them for Bob."""
    bench.server.answer = lambda ids, to: REFUSED if to == BOB else smtp.judge("dot", 250, "taken")
    bench.put(*names)
    bench.run()


def test_the_queue_shows_what_waits_is_held_and_failed(run: Run, bench: Bench) -> None:
    fail(bench, "failed-1")
    bench.server.away = AWAY
    bench.put("held-1")
    bench.run()
    bench.courier.tick()
    code, out, _ = run("queue", "--json", ALERT_SPOOL=bench.spool)
    rows = {row["id"]: row for row in json.loads(out)}
    keys = {"id", "group", "state", "since", "next", "tries", "error", "recipients"}
    assert code == 0 and set(rows) == {"failed-1", "held-1"} and all(set(row) == keys for row in rows.values())
    assert [rows["failed-1"][key] for key in ("state", "tries", "next", "recipients", "group")] == [
        "failed", 1, None, [BOB], "MOTION f",
    ]  # fmt: skip
    assert [rows["held-1"][key] for key in ("state", "tries", "recipients", "error")] == [
        "held", 0, [ANN, BOB], str(AWAY),
    ]  # fmt: skip
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", rows["held-1"][key]) for key in ("since", "next"))
    code, out, _ = run("queue", "--spool", str(bench.spool))
    assert code == 0 and out.endswith("0 waiting, 1 held, 1 failed\n") and "no more tries" in out


def test_an_empty_queue(run: Run, bench: Bench) -> None:
    assert run("queue", "--spool", str(bench.spool), "--json")[:2] == (0, "[]\n")
    assert run("queue", "--spool", str(bench.spool))[:2] == (0, "nothing waits\n")


def queue_as_a_process(bench: Bench, *flags: str, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "smtp_module.py"), "queue", "--spool", str(bench.spool), *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, env={**os.environ, **environment})


@pytest.mark.parametrize("number", [1, 500], ids=["less than a buffer", "more"])
def test_a_reader_that_has_gone_ends_the_list_without_a_word(bench: Bench, number: int) -> None:
    bench.put(*(f"a{n}" for n in range(number)))
    process = queue_as_a_process(bench)
    assert process.stdout and process.stderr
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(30) == 0


def test_letters_that_the_terminal_lacks_are_shown_as_codes_and_json_stays_json(bench: Bench) -> None:
    bench.outbox.put([smtp.NewEntry("é😀", "MOTION", "حیاط", b"x")])
    out, err = queue_as_a_process(bench, PYTHONIOENCODING="ascii").communicate(timeout=30)
    assert (rb"\xe9\U0001f600  MOTION \u062d\u06cc\u0627\u0637  since" in out, err) == (True, b"")
    out, err = queue_as_a_process(bench, "--json", PYTHONIOENCODING="ascii").communicate(timeout=30)
    assert (json.loads(out)[0]["id"], err) == ("é😀", b"")


def test_retry_and_drop_without_a_running_owner(run: Run, bench: Bench) -> None:
    fail(bench, "a", "b", "c")
    bench.server.away = AWAY
    bench.put("held")
    bench.outbox.close()
    at_spool = ("--spool", str(bench.spool))
    assert run("retry", "a", *at_spool)[:2] == (0, "retry: 1 failed wait again, 0 held are tried now\n")
    assert run("drop", "b", *at_spool)[:2] == (0, "drop: 1\n")
    assert {row["id"]: row["state"] for row in smtp.read_queue(bench.spool)} == {
        "a": "waiting", "c": "failed", "held": "waiting",
    }  # fmt: skip
    assert run("retry", "all", *at_spool)[:2] == (0, "retry: 1 failed wait again, 2 held are tried now\n")
    code, _, err = run("retry", "b", *at_spool)
    assert code == 65 and "no such alert" in err
    assert run("drop", "all", *at_spool)[:2] == (0, "drop: 3\n")


def test_retry_and_drop_are_done_by_the_running_owner(run: Run, bench: Bench) -> None:
    fail(bench, "a", "b")
    stop = threading.Event()

    def owner() -> None:
        while not stop.wait(0.01):
            bench.courier.tick()

    thread = threading.Thread(target=owner)
    thread.start()
    try:
        before = set(bench.spool.parent.iterdir())
        assert run("drop", "a", "--spool", str(bench.spool))[:2] == (0, "drop: 1\n")
        assert run("retry", "all", "--spool", str(bench.spool))[1].startswith("retry: 1 failed wait again")
        assert set(bench.spool.parent.iterdir()) == before, "nothing is left behind"
    finally:
        stop.set()
        thread.join()
    assert bench.counts() == (1, 0, 0)


def test_what_the_running_owner_does_not_answer_is_no_success(
    run: Run, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.put("a")

    def cannot_read(_: float) -> None:
        for path in bench.spool.parent.glob("*.request-*[0-9]"):
            assert path.stat().st_mode & 0o777 == 0o644
            path.write_text("damaged")
        bench.courier.tick()

    monkeypatch.setattr(time, "sleep", cannot_read)
    code, out, err = run("drop", "a", "--spool", str(bench.spool))
    assert (code, out) == (75, "") and "its log" in err
    assert bench.outbox.counts()["queued"] == 1


def test_a_request_that_cannot_be_left_is_said(run: Run, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    bench.put("a")
    monkeypatch.setattr(os, "replace", full)
    code, out, err = run("drop", "a", "--spool", str(bench.spool))
    assert (code, out) == (75, "") and "No space left on device" in err


# sendmail

CRONS_MAIL = b"""From: root (Cron Daemon)
To: root
Subject: Cron <root@nas> /usr/bin/backup
MIME-Version: 1.0
Content-Type: text/plain; charset=UTF-8
Content-Transfer-Encoding: 8bit
X-Cron-Env: <SHELL=/bin/sh>

backup failed: \xc3\xbc
"""


def test_a_mail_of_cron(run: Run, scripted: Start) -> None:
    server = scripted()
    code, _, err = run(
        "-FCronDaemon", "-i", "-B8BITMIME", "-oem", "root", stdin=CRONS_MAIL, named="/usr/sbin/sendmail",
        **at(server, ALERT_RECIPIENT="ann@example.com, bob@example.com"),
    )  # fmt: skip
    assert (code, err) == (0, "")
    mail = message(server)
    assert server.mails[0].sender == "relay@example.com"
    assert recipients(server) == ["ann@example.com", "bob@example.com"]
    (writer,) = mail["From"].addresses
    assert (writer.addr_spec, writer.display_name) == ("relay@example.com", "Cron Daemon")
    assert mail["Subject"] == "Cron <root@nas> /usr/bin/backup"
    assert mail["To"] == "root <ann@example.com>, root <bob@example.com>"
    assert mail["Date"] and mail["Message-ID"] and mail.get_content() == "backup failed: ü\r\n"
    assert server.mails[0].content.isascii()


def test_recipients_in_one_argument_with_commas(run: Run, scripted: Start) -> None:
    server = scripted()
    code, *_ = run(
        "sendmail", "ann@example.com,root", stdin=CRONS_MAIL, **at(server, ALERT_RECIPIENT="bob@example.com")
    )
    assert code == 0
    assert recipients(server) == ["ann@example.com", "bob@example.com"]


def test_recipients_from_the_headers_and_bcc_is_taken_out(run: Run, scripted: Start) -> None:
    server = scripted()
    stdin = b"To: Ann <ann@example.com>,\n bob@example.com\nCc: carl@example.com\n"
    stdin += b"BCC: dora@example.com\nSubject: x\n\ntext\n"
    assert run("sendmail", "-t", "-f", "me@example.com", stdin=stdin, **at(server))[0] == 0
    assert recipients(server) == [f"{name}@example.com" for name in ("ann", "bob", "carl", "dora")]
    assert server.mails[0].sender == "me@example.com"
    assert b"dora" not in server.mails[0].content
    assert message(server)["From"] == "relay@example.com"


def test_a_blind_copy_alone_is_not_shown(run: Run, scripted: Start) -> None:
    server = scripted()
    assert run("sendmail", "-ti", stdin=b"Bcc: dora@example.com\nSubject: x\n\ntext\n", **at(server))[0] == 0
    assert b"dora" not in server.mails[0].content


@pytest.mark.parametrize("flags", [["-i"], ["-oi"], ["-ti"], ["-t", "-oi"]])
def test_with_i_a_dot_does_not_end_the_mail(run: Run, scripted: Start, flags: list[str]) -> None:
    server = scripted()
    stdin = b"To: a@x.org\nSubject: x\n\none\n.\ntwo\n"
    assert run("sendmail", *flags, "a@x.org", stdin=stdin, **at(server))[0] == 0
    assert message(server).get_content() == "one\r\n.\r\ntwo\r\n"


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_without_i_a_dot_ends_the_mail(run: Run, scripted: Start, end: bytes) -> None:
    server = scripted()
    stdin = end.join([b"Subject: x", b"", b"one", b".", b"two", b""])
    assert run("sendmail", "a@x.org", stdin=stdin, **at(server))[0] == 0
    assert message(server).get_content() == "one\r\n"


@pytest.mark.parametrize(
    ("stdin", "text"),
    [
        (b"", ""), (b"just a line\n", "just a line\r\n"), (b"\nno headers\n", "no headers\r\n"), (b"Subject: x", ""),
        (b"Subject: x\nnot a header\n", "not a header\r\n"), (b"Subject: x\n\na\rb\n", "a\r\nb\r\n"),
        (b"Subject: x\n\nno end", "no end\r\n"),
        (b"Subject: x\n\n\xc3\xbc\n", "ü\r\n"), (b"Subject: x\n\na\0b\n", "ab\r\n"),
        (b"x" * 1200 + b": y\n", "x" * 1200 + ": y"),
    ],
)  # fmt: skip
def test_odd_mails_arrive(run: Run, scripted: Start, stdin: bytes, text: str) -> None:
    server = scripted()
    assert run("sendmail", "-i", "a@x.org", stdin=stdin, **at(server))[0] == 0
    mail = message(server)
    assert mail.get_content().rstrip() == text.rstrip()
    assert mail["To"] and mail["From"] and mail["Date"]
    assert b"\0" not in server.mails[0].content


@pytest.fixture
def sent(run: Run, scripted: Callable[..., Scripted]) -> Callable[..., Any]:
    """Send through a server without extensions, hold the mail against what strict servers want, and return it."""

    def send(stdin: bytes | str, *flags: str, **environment: str) -> Any:
        server = scripted(extensions=())
        stdin = stdin.encode() if isinstance(stdin, str) else stdin
        environment = {"ALERT_RECIPIENT": "ann@example.com"} | environment
        code, _, err = run("sendmail", "-i", *flags, stdin=stdin, **at(server, **environment))
        assert (code, err) == (0, "")
        content = server.mails[0].content
        assert content.isascii() and max(map(len, content.split(b"\r\n"))) <= 998
        head = email.message_from_bytes(content.partition(b"\r\n\r\n")[0], policy=email.policy.default)
        for name, value in head.items():
            if name in ("From", "Sender", "Reply-To", "To", "Cc", "Resent-From", "Resent-To"):
                assert not value.defects and all("." in one.domain for one in value.addresses), value
        assert len(set(map(str.lower, head))) == len(head)
        mail = message(server)
        mail.sender, mail.recipients = server.mails[0].sender, recipients(server)
        return mail

    return send


def test_a_line_longer_than_smtp_allows_arrives_whole(sent: Callable[..., Any]) -> None:
    lines = ["y" * 990, "abü" * 1000, "z" * 3000, "end"]
    mail = sent("Subject: x\n\n" + "\n".join(lines), "a@x.org")
    assert mail.get_content().split() == lines


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("To", "root", "root <ann@example.com>"), ("To", "root@localhost", "root <ann@example.com>"),
        ("To", "Root <root>, bob@x.org", "Root <ann@example.com>, bob@x.org"), ("Cc", "root", "root <ann@example.com>"),
        ("Reply-To", "ops@localhost", "ops <ann@example.com>"), ("Resent-To", "root", "root <ann@example.com>"),
        ("From", "root (Cron Daemon)", "Cron Daemon <relay@example.com>"), ("From", "root", "root <relay@example.com>"),
        ("From", "root@localhost.localdomain", "root <relay@example.com>"), ("From", "<>", "relay@example.com"),
        ("From", "", "relay@example.com"), ("Sender", "root", "root <relay@example.com>"),
        ("From", "Jörg <j@x.org>", "Jörg <j@x.org>"), ("To", "Jörg Müller <j@x.org>, 车库 <g@x.org>",
         "Jörg Müller <j@x.org>, 车库 <g@x.org>"), ("From", '"Door, yard" <d@x.org>', '"Door, yard" <d@x.org>'),
        ("From", "=?utf-8?q?J=C3=B6rg?= <j@x.org>", "Jörg <j@x.org>"), ("To", "undisclosed-recipients:;",
         "undisclosed-recipients:;"), ("Subject", "Tür offen", "Tür offen"), ("Subject", "x" * 3000, "x" * 3000),
        ("Subject", "word " * 400 + "end", "word " * 400 + "end"), ("X-Note", "سلام " * 300 + "end", "سلام " * 300 + "end"),
        ("Subject", "=?utf-8?q?T=C3=BCr?= " * 60, "Tür" * 60), ("Subject", "=?utf-8?q?T=C3=BCr?=", "Tür"),
    ],
)  # fmt: skip
def test_header_fields_as_strict_servers_want_them(
    sent: Callable[..., Any], field: str, value: str, expected: str
) -> None:
    assert sent(f"{field}: {value}\n\ntext\n", "a@x.org")[field] == expected


def test_a_field_in_latin_1_is_read_as_that(sent: Callable[..., Any]) -> None:
    mail = sent(b"From: root (M\xfcller)\nSubject: T\xfcr\n\ntext\n", "a@x.org")
    (writer,) = mail["From"].addresses
    assert (writer.addr_spec, writer.display_name, mail["Subject"]) == ("relay@example.com", "Müller", "Tür")


def test_a_to_field_with_hundreds_of_addresses_in_one_line(sent: Callable[..., Any]) -> None:
    for comma in (",", ", "):
        names = [f"somebody.{number}@example.com" for number in range(300)]
        assert [one.addr_spec for one in sent(f"To: {comma.join(names)}\n\n", "a@x.org")["To"].addresses] == names


def test_of_fields_that_may_stand_once_the_first_stands(sent: Callable[..., Any]) -> None:
    mail = sent("Subject: a\nSubject: b\nTo: x@x.org\nto: y@x.org\nDate: Mon, 1 Jan 2024 00:00:00 +0000\nDate: x\n\n", "a@x.org")
    assert (mail["Subject"], mail["To"], len(mail.get_all("Date"))) == ("a", "x@x.org", 1)


@pytest.mark.parametrize(
    ("head", "body", "text"),
    [
        ("", "Grüße\n".encode(), "Grüße\r\n"), ("", "Gr\xfc\xdfe\n".encode("latin-1"), "Grüße\r\n"),
        ("Content-Type: text/plain", "Grüße\n".encode(), "Grüße\r\n"),
        ("Content-Type: text/plain; charset=US-ASCII", "Grüße\n".encode(), "Grüße\r\n"),
        ("Content-Type: text/plain; charset=ANSI_X3.4-1968", "Grüße\n".encode(), "Grüße\r\n"),
        ("Content-Type: text/plain; charset=gb2312", "车库\n".encode("gb2312"), "车库\r\n"),
        ("Content-Type: text/plain; charset*=us-ascii''utf-8", "Grüße\n".encode(), "Grüße\r\n"),
        ("Content-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: 8bit", "Grüße\n".encode(), "Grüße\r\n"),
        ("Content-Transfer-Encoding: base64", b"R3LDvMOfZQo=\n", "Gr\ufffd\ufffd\ufffd\ufffde\n"),
        ("Content-Transfer-Encoding: quoted-printable\nContent-Type: text/plain; charset=utf-8",
         ("=C3=BC" * 500).encode(), "ü" * 500 + "\r\n"),
        ("Content-Type: multipart/mixed", "Grüße\n".encode(), "Grüße\r\n"),
        ("Content-Type: multipart/mixed; boundary=b", "Grüße\n".encode(), "Grüße\r\n"),
    ],
)  # fmt: skip
def test_bodies_arrive_in_seven_bits(sent: Callable[..., Any], head: str, body: bytes, text: str) -> None:
    mail = sent(f"Subject: x\n{head}\n\n".replace("\n\n\n", "\n\n").encode() + body, "a@x.org")
    assert mail.get_content() == text


PARTS = """Subject: x
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary="b"
Content-Transfer-Encoding: 8bit

Ein mehrteiliger Text für alte Programme
--b
Content-Type: text/html; charset=utf-8
Content-Transfer-Encoding: 8bit

<p>Grüße</p>
--b
Content-Type: text/x-log; name="Übersicht.log"
Content-Description: Überwachung
Content-Disposition: attachment; filename="Übersicht.log"

{long}
--b
Content-Type: message/rfc822
Content-Transfer-Encoding: 8bit

Subject: Weitergeleitet: Tür
Content-Type: text/plain; charset=utf-8

Tür
--b
Content-Type: application/octet-stream; name=a.bin
Content-Transfer-Encoding: binary

\u0080ü
--b
Content-Type: image/png
Content-Transfer-Encoding: base64

iVBORw0KGgo=
--b--
"""


def test_each_part_of_a_multipart_is_encoded_for_itself(sent: Callable[..., Any]) -> None:
    mail = sent(PARTS.format(long="z" * 2000), "a@x.org")
    html, log, forwarded, binary, image = mail.iter_parts()
    assert html.get_content() == "<p>Grüße</p>\r\n"[:-2]
    assert (log.get_filename(), log.get_param("name"), log["Content-Description"], log.get_content()) == (
        "Übersicht.log", "Übersicht.log", "Überwachung", "z" * 2000,
    )  # fmt: skip
    inner = forwarded.get_content()
    assert (inner["Subject"], inner.get_content()) == ("Weitergeleitet: Tür", "Tür")
    assert (binary.get_content(), binary["Content-Transfer-Encoding"]) == ("\u0080ü".encode(), "base64")
    assert image.get_content() == b"\x89PNG\r\n\x1a\n"
    assert mail["Content-Transfer-Encoding"] == forwarded["Content-Transfer-Encoding"] == "7bit"


def test_a_mail_that_is_right_keeps_every_byte_of_its_body(run: Run, scripted: Callable[..., Scripted]) -> None:
    body = b"preamble\r\n--b\r\nX-Odd:  1\r\n\r\n signed  \r\n\r\n--b\r\n\r\n=3D\r\n--b--\r\nepilogue\r\n"
    mime = b"Content-Type: multipart/signed;\r\n\tboundary=b; protocol=x\r\n"
    server = scripted()
    stdin = b"From: a@x.org\r\nTo: b@x.org\r\nSubject: a\r\n  b\r\n" + mime + b"\r\n" + body
    assert run("sendmail", "-ti", stdin=stdin, **at(server))[0] == 0
    content = server.mails[0].content
    assert content.endswith(mime + b"\r\n" + body) and b"\r\nSubject: a\r\n  b\r\n" in content


def test_a_bomb_of_parts_is_unusable_input(run: Run, scripted: Callable[..., Scripted]) -> None:
    nested = "".join(f"Content-Type: multipart/mixed; boundary={n}\n\n--{n}\n" for n in range(2000)) + "ü"
    server = scripted()
    code, _, err = run("sendmail", "-i", "a@x.org", stdin=nested.encode(), **at(server))
    assert (code, server.mails) == (65, []) and "nested too deeply" in err


def test_local_addresses_are_the_owner(sent: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp.socket, "gethostname", lambda: "nas")
    monkeypatch.setattr(smtp.socket, "getfqdn", lambda: "nas.home.lan")
    for name in ("root", "root@localhost", "root@LOCALHOST.", "root@nas", "root@nas.home.lan", "<root@nas>"):
        assert sent("To: x@x.org\n\n", name).recipients == ["ann@example.com"], name
        assert sent(f"To: {name}\n\n", "-t").recipients == ["ann@example.com"], name
        assert sent("To: x@x.org\n\n", "-f", name, "a@x.org").sender == "relay@example.com", name
    for name in ("root@nas.example.com", "root@nas2", "root@localhost.evil.org"):
        assert sent("To: x@x.org\n\n", name).recipients == [name]
    monkeypatch.setattr(smtp.socket, "gethostname", lambda: "example.com")
    assert sent("To: x@x.org\n\n", "bob@example.com").recipients == ["bob@example.com"]


@pytest.mark.parametrize(
    "flags",
    [
        ["-r", "me@example.com"], ["-rme@example.com"], ["-fme@example.com", "-F", "Me", "-N", "never", "-R", "hdrs"],
        ["-f", "Me <me@example.com>", "-m", "-G", "-v", "-oem", "-odb", "-L", "tag", "-V", "id", "-X", "/dev/null"],
        ["-OIgnoreDots=yes", "-f", "me@example.com", "-em", "-bm", "-B", "8BITMIME", "-Nfailure,delay", "-U", "-n"],
        ["-tvi", "-fme@example.com"],
    ],
)  # fmt: skip
def test_flags_of_sendmail(sent: Callable[..., Any], flags: list[str]) -> None:
    assert sent("To: a@x.org\nFrom: x@x.org\n\n", *flags, "--", "a@x.org").sender == "me@example.com"


@pytest.mark.parametrize(
    ("head", "shown"),
    [
        ("", "Backup job <relay@example.com>"), ("From: root\n", "Backup job <relay@example.com>"),
        ("From: root (Cron)\n", "Cron <relay@example.com>"), ("From: a@x.org\n", "a@x.org"),
    ],
)  # fmt: skip
def test_the_name_of_a_sender_that_has_none(sent: Callable[..., Any], head: str, shown: str) -> None:
    assert sent(f"{head}Subject: x\n\n", "-F", "Backup job", "a@x.org")["From"] == shown


def test_a_mode_other_than_a_mail_on_standard_input_is_refused_with_a_sentence(run: Run) -> None:
    for mode in "sdpit":
        code, _, err = run("sendmail", f"-b{mode}", stdin=b"EHLO x\r\n")
        assert code == 2 and f"-b{mode} is not supported: give a whole mail on standard input" in err


def test_a_mail_that_is_resent_goes_to_whom_it_is_resent(sent: Callable[..., Any]) -> None:
    mail = sent(
        "Resent-To: bob@x.org\nResent-Cc: root\nResent-Bcc: dora@x.org\nTo: old@x.org\nCc: older@x.org\n\ntext\n", "-t"
    )
    assert mail.recipients == ["bob@x.org", "ann@example.com", "dora@x.org"]
    assert (mail["To"], mail["Resent-Cc"], mail["Resent-Bcc"]) == ("old@x.org", "root <ann@example.com>", None)


@pytest.mark.parametrize("flags", [["-f", "root@nas.lan"], ["-f", ""], ["-f", "<>"], []])
def test_the_envelope_sender_of_the_account_takes_the_place_of_every_other(
    sent: Callable[..., Any], flags: list[str]
) -> None:
    mail = sent("From: a@x.org\n\n", *flags, "a@x.org", SMTP_ENVELOPE_FROM="Me <me@gmx.example>")
    assert (mail.sender, mail["From"]) == ("me@gmx.example", "a@x.org")


def test_send_has_the_envelope_sender_of_the_account_too(run: Run, scripted: Callable[..., Scripted]) -> None:
    server = scripted()
    flags = ("send", "--to", "a@x.org", "--from", "b@x.org", "--subject", "s", "--body", "")
    assert run(*flags, **at(server, SMTP_ENVELOPE_FROM="me@gmx.example"))[0] == 0
    assert (server.mails[0].sender, message(server)["From"]) == ("me@gmx.example", "b@x.org")


@pytest.mark.parametrize("sender", ["", "<>"])
def test_the_null_sender(run: Run, scripted: Start, sender: str) -> None:
    server = scripted()
    assert run("sendmail", "-f", sender, "a@x.org", stdin=b"Subject: x\n\n", **at(server))[0] == 0
    assert server.mails[0].sender == ""


def test_names_without_a_domain_need_somebody(run: Run, scripted: Start) -> None:
    code, _, err = run("sendmail", "root", stdin=CRONS_MAIL, **at(scripted()))
    assert code == 78 and "ALERT_RECIPIENT" in err
    code, _, err = run("sendmail", stdin=CRONS_MAIL, **at(scripted()))
    assert code == 65 and "no recipient" in err


def test_called_by_the_name_sendmail(scripted: Start, tmp_path: Path) -> None:
    server = scripted()
    link = tmp_path / "sendmail"
    link.symlink_to(ROOT / "smtp_module.py")
    environment = {**os.environ, **at(server, ALERT_RECIPIENT="ann@example.com")}
    command = [sys.executable, str(link), "-t"]
    done = subprocess.run(command, input=CRONS_MAIL, env=environment, capture_output=True, check=False, timeout=30)
    assert (done.returncode, done.stderr) == (0, b"")
    assert recipients(server) == ["ann@example.com"]


@pytest.mark.skipif(os.name != "posix", reason="a shell closes the standard input")
@pytest.mark.parametrize(
    "call", [["sendmail", "a@x.org"], ["send", "--to", "a@x.org", "--subject", "s", "--body", "-"]]
)
def test_a_closed_standard_input_is_an_empty_one(scripted: Start, call: list[str]) -> None:
    server = scripted()
    environment = {**os.environ, **at(server)}
    command = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, str(ROOT / "smtp_module.py"), *call]
    done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=30)
    assert (done.returncode, done.stderr) == (0, b"")
    assert message(server).get_content().strip() == ""


def test_the_programs_can_be_called_directly() -> None:
    if os.name == "posix":
        assert os.access(ROOT / "smtp_module.py", os.X_OK)


def test_nothing_is_read_at_import(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("not a settings file")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import smtp_module"
    environment = {**os.environ, "SMTP_PORT": "wrong"}
    with contextlib.chdir(tmp_path):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, check=False, timeout=30
        )
    assert (done.returncode, done.stderr) == (0, b"")
