"""Other people's programs, run for real, with the lines of the README; skipped where a program is missing."""

from __future__ import annotations

import email
import email.policy
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Certificates, Mailbox
from neighbours import (
    PATIENCE_S,
    ROOT,
    SBIN,
    Postfix,
    Program,
    adapted,
    environment,
    free_port,
    open_folder,
    readme_block,
    until,
)

import client

OWNER = "owner@example.com"
SYSTEM_PYTHON = shutil.which("python3", path="/usr/bin:/bin")


def needs(*programs: str) -> pytest.MarkDecorator:
    lacking = [program for program in programs if not shutil.which(program, path=SBIN)]
    return pytest.mark.skipif(bool(lacking), reason=f"not installed: {', '.join(lacking)}")


def shell(text: str, folder: Path, *, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a block as a shell would, in a folder, with its whole output."""
    done = subprocess.run(
        ["sh", "-e", "-c", text], cwd=folder, env=environment(**variables), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout
    return done


def arrived(mailbox: Mailbox, subject: str) -> Any:
    """The first mail whose Subject holds this, once it is there, parsed; `envelope` is what the server saw."""

    def look() -> Any:
        for received in list(mailbox.mails):
            message: Any = email.message_from_bytes(received.content, policy=email.policy.default)
            if subject in str(message["Subject"]):
                message.envelope = received
                return message
        return None

    return until(f"a mail with {subject!r} in its Subject", look)


def text_of(message: Any) -> str:
    return str(message.get_body(("plain",)).get_content())


def is_null(message: Any) -> bool:
    """From the null sender? (The library keeps the brackets where a parameter follows.)"""
    return message.envelope.sender in {"", "<>"}


def attached(message: Any, name: str) -> bytes:
    """The attachment of this name, decoded."""
    (found,) = [part.get_payload(decode=True) for part in message.walk() if part.get_filename() == name]
    return bytes(found)


def pictures(message: Any) -> list[bytes]:
    return [bytes(part.get_payload(decode=True)) for part in message.walk() if part.get_content_maintype() == "image"]


@contextmanager
def serving(box: Mailbox) -> Iterator[Mailbox]:
    box.start()
    try:
        yield box
    finally:
        box.stop()


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    with serving(Mailbox()) as box:
        yield box


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    running: list[Program] = []

    def run(*words: str, **variables: str) -> Program:
        running.append(Program(tmp_path, *words, name=str(len(running)), **variables))
        return running[-1]

    yield run
    for program in reversed(running):
        program.end(signal.SIGKILL)


def relay(start: Callable[..., Program], mail_server: Mailbox | Postfix, **variables: str) -> Program:
    mail = {"SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(mail_server.port), "ALERT_RECIPIENT": OWNER}
    return start("server.py", **({"ALERT_PORT": "0"} | mail | variables))


def device(start: Callable[..., Program], smtp_port: int, **variables: str) -> Program:
    mail = {"SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(smtp_port), "DEVICE_HOST": "127.0.0.1", "DEVICE_PORT": "0"}
    return start("embedded_smtpd.py", **(mail | variables))


# motion
# One motion with two cameras, a film and one that is not there, started with the first test of this file: motion
# itself waits 30 s before it says that a camera is lost, while the other tests run.


@dataclass
class Motion:
    mailbox: Mailbox
    folder: Path


def film(path: Path, seconds: int = 60) -> Path:
    """A film in which much moves."""
    source = f"testsrc=size=320x240:rate=5:duration={seconds}"
    subprocess.run(
        ["ffmpeg", "-loglevel", "error", "-y", "-f", "lavfi", "-i", source, "-c:v", "mpeg4", str(path)],
        check=True, stdin=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip
    return path


@pytest.fixture(scope="session")
def motion() -> Iterator[Motion]:
    if not (shutil.which("motion") and shutil.which("ffmpeg")):
        pytest.skip("not installed: motion, ffmpeg")
    with serving(Mailbox()) as mailbox, open_folder() as folder:
        lines = adapted(readme_block("# /etc/motion/motion.conf"), **{"/var/lib/motion": folder})
        common = "daemon off\nwidth 320\nheight 240\nframerate 5\nminimum_motion_frames 1\nmovie_max_time 2\n"
        (folder / "motion.conf").write_text(
            f"{common}target_dir {folder}\n{lines}camera {folder}/film.conf\ncamera {folder}/none.conf\n"
        )
        moving = film(folder / "film.mp4")
        (folder / "film.conf").write_text(f"camera_id 1\ncamera_name front door\nnetcam_url file://{moving}\n")
        (folder / "none.conf").write_text(f"camera_id 2\ncamera_name cellar\nnetcam_url file://{folder}/none.mp4\n")
        smtp = {"SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(mailbox.port), "ALERT_RECIPIENT": OWNER}
        alerts = Program(folder, "server.py", "--port", "0", **smtp)
        with (folder / "motion.log").open("wb") as log:
            process = subprocess.Popen(
                ["motion", "-n", "-c", "motion.conf"], cwd=folder, env=environment(ALERT_PORT=str(alerts.port)),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        yield Motion(mailbox, folder)
        process.kill()  # it would take seconds to stop
        process.wait(PATIENCE_S)
        alerts.end()


@pytest.fixture(scope="module", autouse=True)
def motion_is_ahead(request: pytest.FixtureRequest) -> None:
    """Start motion before the first test, if one of the tests that are run wants it."""
    ours = (item for item in request.session.items if item.path == request.path)
    wanted = any("motion" in getattr(item, "fixturenames", ()) for item in ours)
    if wanted and shutil.which("motion") and shutil.which("ffmpeg"):
        request.getfixturevalue("motion")


def test_motion_5_passes_quotes_along_and_they_are_taken_off(start: Any, mailbox: Mailbox, tmp_path: Path) -> None:
    (tmp_path / "a picture.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(100))
    lines = readme_block("# /etc/motion/motion.conf")
    (line,) = re.findall(r"(?m)^on_picture_save (.*)$", adapted(lines, **{"/var/lib/motion": tmp_path}))
    words = [word.replace("%$", "front door").replace("%f", f"{tmp_path}/a picture.jpg") for word in line.split()]
    assert '"front door"' in words
    port = str(relay(start, mailbox).port)
    subprocess.run(words, env=environment(ALERT_PORT=port), check=True, timeout=60, stdout=subprocess.DEVNULL)
    assert pictures(arrived(mailbox, "MOTION_DETECTED - front door")) == [b"\xff\xd8\xff\xe0" + bytes(100)]


# ffmpeg


@needs("ffmpeg")
def test_ffmpeg_pipes_one_frame_into_an_alert(start: Any, mailbox: Mailbox, tmp_path: Path) -> None:
    block = adapted(readme_block("ffmpeg "), **{"rtsp://192.168.1.20/stream": film(tmp_path / "film.mp4", 1)})
    said = shell(block, tmp_path, ALERT_PORT=str(relay(start, mailbox).port)).stdout
    assert said.startswith("queued"), said
    assert [picture[:3] for picture in pictures(arrived(mailbox, "SNAPSHOT - gate"))] == [b"\xff\xd8\xff"]


@needs("ffmpeg")
def test_ffmpeg_without_a_picture_still_raises_the_alert(start: Any, mailbox: Mailbox, tmp_path: Path) -> None:
    block = adapted(readme_block("ffmpeg "), **{"rtsp://192.168.1.20/stream": tmp_path / "none.mp4"})
    assert "the event goes without it" in shell(block, tmp_path, ALERT_PORT=str(relay(start, mailbox).port)).stdout
    assert arrived(mailbox, "SNAPSHOT - gate")


# cron and smartd, through sendmail


def write_program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def write_sendmail(folder: Path) -> Path:
    """The README's two lines of shell, for the settings in `folder`."""
    block = adapted(readme_block("#!/bin/sh\n# /usr/sbin/sendmail"), **{"/etc/dvr/mail.env": folder / "mail.env"})
    return write_program(folder / "sendmail", block)


def mail_env(mailbox: Mailbox) -> str:
    return f"SMTP_HOST=127.0.0.1\nSMTP_PORT={mailbox.port}\nSMTP_FROM=home@example.com\nALERT_RECIPIENT={OWNER}\n"


def own_mounts() -> bool:
    """May we have a mount namespace of our own?"""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode == 0


def run_cron(folder: Path, crontab: str, done: Callable[[], Any]) -> Any:
    """Debian's cron over a crontab of ours until `done` holds, with what `folder/sbin` holds as `sendmail`.

    Its places are fixed in the program, so ours cover them, in a mount namespace. @reboot jobs run at once.
    """
    for name in ("tabs", "cron.d", "run"):
        (folder / name).mkdir()
    (folder / "crontab").write_text(crontab)
    shutil.copy(str(shutil.which("cron", path=SBIN)), folder / "sbin" / "cron")
    covers = {"/var/spool/cron/crontabs": "tabs", "/etc/cron.d": "cron.d", "/run": "run", "/etc/crontab": "crontab"}
    mounts = [f"mount --bind {folder / ours} {theirs}" for theirs, ours in (covers | {"/usr/sbin": "sbin"}).items()]
    with (folder / "cron.log").open("wb") as log:
        process = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", " && ".join([*mounts, "exec /usr/sbin/cron -f"])],
            env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            return until(f"cron's mail ({log.name})", done)
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


class TestCron:
    pytestmark = [  # noqa: RUF012
        needs("cron"),
        pytest.mark.skipif(not own_mounts(), reason="a private mount namespace needs root"),
        pytest.mark.skipif(not SYSTEM_PYTHON, reason="cron finds no python3 in /usr/bin"),
    ]

    def test_cron_mails_what_a_job_prints(self, mailbox: Mailbox) -> None:
        with open_folder() as folder:
            (folder / "mail.env").write_text(mail_env(mailbox))
            (folder / "sbin").mkdir()
            write_sendmail(folder).rename(folder / "sbin" / "sendmail")
            job = {"0 3 * * *": "@reboot", "/usr/local/bin/backup": "echo 'the disk is full ✓'"}
            run_cron(folder, adapted(readme_block("# /etc/cron.d/backup"), **job), lambda: mailbox.mails)
        mail = arrived(mailbox, "Cron <root@")
        assert text_of(mail).strip() == "the disk is full ✓"
        assert mail.envelope.recipients == [OWNER] and mail.envelope.sender == "home@example.com"
        assert mail["From"].addresses[0].addr_spec == "home@example.com"
        assert mail["Date"] and mail["Message-ID"]

    def test_cron_uses_a_link_named_sendmail_with_the_settings_in_the_crontabs_home(self, mailbox: Mailbox) -> None:
        with open_folder() as folder:
            (folder / ".env").write_text(mail_env(mailbox))
            (folder / "sbin").mkdir()
            (folder / "sbin" / "sendmail").symlink_to(ROOT / "smtp_module.py")
            crontab = f"HOME={folder}\nMAILTO=partner@example.com,root\n@reboot root echo linked\n"
            run_cron(folder, crontab, lambda: len(mailbox.mails) == 2)
        mail = arrived(mailbox, "Cron <root@")
        assert text_of(mail).strip() == "linked"
        assert [one.recipients for one in mailbox.mails] == [["partner@example.com"], [OWNER]]


PRETEND_DISK = r"""
/* An NVMe disk in front of smartd: /dev/null, answering the two commands that smartd asks for. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ioctl.h>
#include <linux/nvme_ioctl.h>
int ioctl(int fd, unsigned long request, ...) {
    va_list more;
    va_start(more, request);
    void *argument = va_arg(more, void *);
    va_end(more);
    if (request == NVME_IOCTL_ADMIN_CMD) {
        struct nvme_admin_cmd *command = argument;
        char *data = (char *)(unsigned long)command->addr;
        memset(data, 0, command->data_len);
        if (command->opcode == 6) {
            memcpy(data + 4, "SERIAL1", 7);
            memcpy(data + 24, "PRETEND DISK", 12);
        }
        command->result = 0;
        return 0;
    }
    int (*real)(int, unsigned long, ...) = (int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl");
    return real(fd, request, argument);
}
"""


@needs("smartd", "cc")
def test_smartd_mails_its_warning_through_sendmail(mailbox: Mailbox, tmp_path: Path) -> None:
    (tmp_path / "disk.c").write_text(PRETEND_DISK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "disk.so", "disk.c", "-ldl"], cwd=tmp_path, check=True, timeout=60)
    (tmp_path / "mail.env").write_text(mail_env(mailbox))
    alert = readme_block("#!/bin/sh\n# /usr/local/sbin/smart-alert")
    write_program(tmp_path / "smart-alert", adapted(alert, **{"/usr/sbin/sendmail": write_sendmail(tmp_path)}))
    disk = {"DEVICESCAN -d removable -n standby": "/dev/null -d nvme,0x1 -M test", "/usr/local/sbin": tmp_path}
    (tmp_path / "smartd.conf").write_text(adapted(readme_block("# /etc/smartd.conf"), **disk))
    check = "smartd -q onecheck -d -c smartd.conf -s '' -A ''"
    done = shell(check, tmp_path, check=False, PATH=SBIN, LD_PRELOAD=str(tmp_path / "disk.so"))
    assert "successful" in done.stdout, done.stdout
    mail = arrived(mailbox, "SMART error (EmailTest) detected on host")
    assert "PRETEND DISK" in text_of(mail) and mail.envelope.recipients == [OWNER]


# swaks and curl


@pytest.fixture
def commanded(start: Any, mailbox: Mailbox) -> Program:
    """A device as the README's swaks and curl lines expect it."""
    return device(start, mailbox.port, DEVICE_USER="operator", DEVICE_PASS="secret")


def replies(mailbox: Mailbox, *subjects: str) -> list[Any]:
    found = [arrived(mailbox, f"Re: {subject}") for subject in subjects]
    assert all(mail.envelope.recipients == ["you@example.com"] and is_null(mail) for mail in found)
    return found


@needs("swaks")
def test_swaks_asks_controls_and_replaces_a_block_with_each_login(
    commanded: Program, mailbox: Mailbox, tmp_path: Path
) -> None:
    (tmp_path / "firmware.bin").write_bytes(random.Random(8).randbytes(5000))
    shell(adapted(readme_block("# swaks: ask"), **{"127.0.0.1:2525": f"127.0.0.1:{commanded.port}"}), tmp_path)
    status, control, update = replies(mailbox, "CMD STATUS", "CMD SET relay1=on", "CMD UPDATE firmware")
    assert json.loads(attached(status, "status.json"))["relay1"] == "off"
    assert "relay1: off -> on" in text_of(control)
    assert "5000" in text_of(update)
    wrong = "--auth LOGIN --auth-user operator --auth-password wrong --to device@localhost"
    assert "535" in shell(f"swaks --server 127.0.0.1:{commanded.port} {wrong}", tmp_path, check=False).stdout


@needs("curl")
def test_curl_asks_controls_and_replaces_a_block(commanded: Program, mailbox: Mailbox, tmp_path: Path) -> None:
    logo = random.Random(9).randbytes(70_000)
    (tmp_path / "logo.bin").write_bytes(logo)
    here = {"smtp://127.0.0.1:2525": f"smtp://127.0.0.1:{commanded.port}"}
    shell(adapted(readme_block("# curl: the same"), **here), tmp_path)
    asked, control, update = replies(mailbox, "CMD GET relay1", "CMD RELAY 2 ON", "CMD UPDATE logo")
    assert "relay1 = off" in text_of(asked) and "relay2: off -> on" in text_of(control) and "70000" in text_of(update)
    for command in ("READ logo", "SNAPSHOT cam2", "LOG"):
        line = readme_block("# curl: the same").splitlines()[1].replace("CMD GET relay1", f"CMD {command}")
        shell(adapted(line, **here), tmp_path)
    read, snapshot, journal = replies(mailbox, "CMD READ logo", "CMD SNAPSHOT cam2", "CMD LOG")
    assert attached(read, "logo") == logo
    assert any(part.get_content_type() == "image/png" for part in snapshot.walk())
    assert "SNAPSHOT" in text_of(journal) and "UPDATE" in text_of(journal)


@needs("swaks")
def test_swaks_sends_a_cameras_picture_which_becomes_an_alert(start: Any, mailbox: Mailbox, tmp_path: Path) -> None:
    picture = b"\xff\xd8\xff\xe0" + random.Random(1).randbytes(30_000)
    (tmp_path / "picture.jpg").write_bytes(picture)
    to = f"127.0.0.1:{relay(start, mailbox).port}"
    gateway = start("embedded_smtpd.py", "--to-relay", to, "--port", "0", "--host", "127.0.0.1")
    here = {"127.0.0.1:2526": f"127.0.0.1:{gateway.port}"}
    shell(adapted(readme_block("# swaks: what a camera sends"), **here), tmp_path)
    assert attached(arrived(mailbox, "MOTION_DETECTED - garage"), "picture.jpg") == picture


# Postfix


needs_postfix = pytest.mark.skipif(bool(Postfix.missing()), reason=Postfix.missing() or "-")


def provider(certificates: Certificates, logins: list[tuple[bytes, bytes]]) -> Mailbox:
    """A mail provider: STARTTLS and a login, both required."""
    from aiosmtpd.smtp import AuthResult, LoginPassword

    def check(server: Any, session: Any, envelope: Any, mechanism: str, data: LoginPassword) -> AuthResult:
        logins.append((data.login, data.password))
        return AuthResult(success=data.password == b"abcdefghijklmnop")

    return Mailbox(tls=certificates.context("good"), require_starttls=True, auth_required=True, authenticator=check)


def assignments(block: str) -> dict[str, str]:
    """`name = value` lines of a main.cf."""
    return dict(re.findall(r"(?m)^(\w+) = (.*)$", block))


@needs_postfix
@pytest.mark.skipif(not list(Path("/usr/lib").glob("*/sasl2/libplain.so")), reason="not installed: libsasl2-modules")
def test_postfix_takes_the_relays_mail_to_a_provider_with_tls_and_login(start: Any, certificates: Certificates) -> None:
    logins: list[tuple[bytes, bytes]] = []
    with serving(provider(certificates, logins)) as box, open_folder() as folder:
        here = f"[localhost]:{box.port}"
        logins_file = adapted(readme_block("# /etc/postfix/sasl_passwd"), **{"[smtp.gmail.com]:587": here})
        (folder / "sasl_passwd").write_text(logins_file)
        (folder / "ca.pem").write_bytes(Path(certificates.ca).read_bytes())
        places: dict[str, Any] = {
            "/etc/postfix/sasl_passwd": folder / "sasl_passwd",
            "/etc/ssl/certs/ca-certificates.crt": folder / "ca.pem",
        }
        block = adapted(readme_block("# /etc/postfix/main.cf\n"), **({"[smtp.gmail.com]:587": here} | places))
        with Postfix(folder, smtp_host_lookup="native", **assignments(block)) as postfix:
            alerts = relay(start, postfix, SMTP_FROM="you@gmail.com")
            sent = [sys.executable, str(ROOT / "client.py"), "--port", str(alerts.port), "--id", "through-postfix"]
            subprocess.run(sent, check=True, env=environment(), timeout=60, stdout=subprocess.DEVNULL)
            mail = arrived(box, "MOTION_DETECTED - cam1")
    assert mail["X-Alert-Id"] == "through-postfix" and mail.envelope.sender == "you@gmail.com"
    assert any("mx.test" in line for line in mail.get_all("Received"))
    assert logins and set(logins) == {(b"you@gmail.com", b"abcdefghijklmnop")}


def submit(port: int, subject: str, sender: str = "ops@example.com", to: str = "device@device.example.com") -> None:
    """Hand a command to Postfix, as the operator's mail program would."""
    import smtplib

    with smtplib.SMTP("127.0.0.1", port, timeout=PATIENCE_S) as smtp:
        head = f"From: {sender}\r\nTo: {to}\r\nSubject: {subject}\r\n"
        smtp.sendmail(sender, [to], f"{head}Message-ID: <{random.getrandbits(64)}@x>\r\n\r\n")


def signed(folder: Path, command: str, secret: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "embedded_smtpd.py"), "--sign", command, "--operator", "ops@example.com"],
        cwd=folder, env=environment(DEVICE_SECRET=secret), capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return done.stdout.strip().removeprefix("Subject: ")


@needs_postfix
def test_postfix_before_the_device_may_read_and_only_signed_commands_control(
    start: Any, mailbox: Mailbox, tmp_path: Path
) -> None:
    values = dict(re.findall(r"(?m)^(\w+)=(.*)$", readme_block("# .env of the device")))
    local = {"DEVICE_HOST": "127.0.0.1", "DEVICE_READONLY": "127.0.0.1", "SMTP_HOST": "127.0.0.1"}
    assert {name: values[name] for name in local} == {
        "DEVICE_HOST": "192.168.1.60", "DEVICE_READONLY": "192.168.1.25", "SMTP_HOST": "192.168.1.25"
    }  # fmt: skip
    port = free_port()
    transport = {"192.168.1.60": "127.0.0.1", ":2525}": f":{port}}}"}
    main = assignments(adapted(readme_block("# /etc/postfix/main.cf, in front of the device"), **transport))
    master = readme_block("# /etc/postfix/master.cf")
    with open_folder() as folder, Postfix(folder, f"[127.0.0.1]:{mailbox.port}", master, **main) as postfix:
        ports = {"DEVICE_PORT": str(port), "SMTP_PORT": str(postfix.port)}
        start("embedded_smtpd.py", **(values | local | ports))
        submit(postfix.port, "CMD STATUS")
        submit(postfix.port, "CMD SET relay1=on")
        submit(postfix.port, signed(tmp_path, "SET relay2=on", values["DEVICE_SECRET"]))
        status = arrived(mailbox, "Re: CMD STATUS")
        bounce = arrived(mailbox, "Undelivered Mail")
        obeyed = arrived(mailbox, "Re: CMD SET relay2=on")
        submit(postfix.port, "CMD GET relay1")
        asked = arrived(mailbox, "Re: CMD GET relay1")
        until("nothing is left in Postfix's queue", lambda: postfix.waiting() == 0)
    assert json.loads(attached(status, "status.json"))["relay1"] == "off"
    assert bounce.envelope.recipients == ["ops@example.com"] and re.search(r"550[ -]5\.7\.\d", text_of(bounce))
    assert "relay2: off -> on" in text_of(obeyed)
    assert "relay1 = off" in text_of(asked)
    assert is_null(asked) and any("mx.test" in line for line in asked.get_all("Received"))


# Home Assistant


def shell_command(name: str, **values: str) -> list[str]:
    """What Home Assistant runs for a shell_command with templates: rendered, split as a shell would, no shell."""
    block = adapted(readme_block("# configuration.yaml"), **{"/config/client.py": ROOT / "client.py"})
    (folded,) = re.findall(rf"(?m)^  {name}: >-\n((?:    .*\n)+)", block)
    command = re.sub(r"\{\{ (\w+) \}\}", lambda found: values[found[1]], " ".join(folded.split()))
    return shlex.split(command)


def test_home_assistants_command_raises_the_alert(start: Any, mailbox: Mailbox, tmp_path: Path) -> None:
    words = shell_command("dvr_alert", event="DOOR_OPENED", camera="Tür zum Hof", note="left open")
    places = {"192.168.1.10": "127.0.0.1", "/config/dvr-outbox": str(tmp_path / "outbox")}
    words = [places.get(word, word) for word in words]
    port = str(relay(start, mailbox).port)
    subprocess.run(words, env=environment(ALERT_PORT=port), check=True, timeout=60, stdout=subprocess.DEVNULL)
    assert "left open" in text_of(arrived(mailbox, "DOOR_OPENED - Tür zum Hof"))


def longest_s(timeout: float, retries: int) -> float:
    """The longest that client.py takes for one small event with a relay that never answers."""
    pauses = sum(min(client.BACKOFF_FIRST_S * 2**n, client.BACKOFF_MAX_S) * 1.25 for n in range(retries))
    return timeout * (retries + 1) + pauses


def test_a_shell_command_ends_within_home_assistants_60_seconds(tmp_path: Path) -> None:
    defaults = client.make_parser().parse_args([])
    assert longest_s(defaults.timeout, defaults.retries) < 60
    words = shell_command("dvr_alert", event="E", camera="c", note="n")
    readme_timeout = float(words[words.index("--timeout") + 1])
    assert longest_s(2 * readme_timeout, defaults.retries) < 45  # when connecting takes as long as the answer would

    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never says a word
        places = {"192.168.1.10": "127.0.0.1", "/config/dvr-outbox": "outbox", f"{readme_timeout:g}": "0.4"}
        scaled = [*(places.get(word, word) for word in words), "--retries", "1"]
        began = time.monotonic()
        environ = environment(ALERT_PORT=str(silent.getsockname()[1]))
        done = subprocess.run(scaled, cwd=tmp_path, env=environ, check=False, timeout=60, capture_output=True)
        took = time.monotonic() - began
    assert done.returncode == 75 and len(list((tmp_path / "outbox").glob("*.json"))) == 1
    assert 2 * 0.4 < took < longest_s(0.4, 1) + 2


# systemd


@needs("systemd-analyze")
@pytest.mark.parametrize("unit", ["dvr-relay.service", "dvr-device.service"])
def test_systemd_finds_nothing_wrong_with_the_unit_and_little_exposed(unit: str, tmp_path: Path) -> None:
    (tmp_path / unit).write_text(readme_block(f"# /etc/systemd/system/{unit}"))
    (tmp_path / "dvr-.service.d").mkdir()
    (tmp_path / "dvr-.service.d/locked.conf").write_text(readme_block("# /etc/systemd/system/dvr-.service.d/locked.conf"))
    verify = shell(f"systemd-analyze verify ./{unit}", tmp_path)
    assert verify.stdout == ""
    security = shell(f"systemd-analyze security --offline=yes ./{unit}", tmp_path, check=False).stdout
    level = re.search(r"Overall exposure level for \S+: ([\d.]+)", security)
    assert level and float(level[1]) < 2, security


# Beyond one machine: HAProxy before two relays, Postfix as the queue towards the world


@pytest.fixture
def haproxy(tmp_path: Path) -> Iterator[Callable[[int, int], int]]:
    """HAProxy with the README's configuration before two ports; gives its own."""
    running: list[subprocess.Popen[bytes]] = []

    def run(first: int, second: int) -> int:
        port = free_port()
        places = {"192.168.1.10:5000": f"127.0.0.1:{port}", "192.168.1.11:5000": f"127.0.0.1:{first}",
                  "192.168.1.12:5000": f"127.0.0.1:{second}", "maxconn 8000": "maxconn 100"}  # fmt: skip
        (tmp_path / "haproxy.cfg").write_text(adapted(readme_block("# /etc/haproxy/haproxy.cfg"), **places))
        with (tmp_path / "haproxy.log").open("wb") as log:
            process = subprocess.Popen(
                ["haproxy", "-db", "-f", "haproxy.cfg"], cwd=tmp_path, env=environment(PATH=SBIN),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        running.append(process)
        assert until("HAProxy ends or answers a ping", lambda: process.poll() or ping(port)) == PONG, log.name
        return port

    yield run
    for process in running:
        process.kill()
        process.wait(PATIENCE_S)


PONG = {"ok": True, "status": "pong", "queued": 0, "sent": 0, "failed": 0}


def ping(port: int) -> dict[str, Any]:
    """The answer of the relay behind this port; empty where there is none."""
    try:
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as sock, sock.makefile("rb") as answers:
            sock.sendall(b'{"ping":1}\n')
            return dict(json.loads(answers.readline() or b"{}"))
    except OSError:
        return {}


class Cameras:
    """Four cameras, each a client.py that sends so many events, one every 20 ms, and prints the answers."""

    def __init__(self, folder: Path, port: int, number: int) -> None:
        flags = ["--port", str(port), "--loop", "0.02", "--count", str(number), "--json"]
        self.answers: list[dict[str, Any]] = []
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(ROOT / "client.py"), "--camera", name, "--id", name, *flags],
                cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )
            for name in ("north", "east", "south", "west")
        ]  # fmt: skip
        self.readers = [threading.Thread(target=self._read, args=(process,)) for process in self.processes]
        for reader in self.readers:
            reader.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self.answers.append(json.loads(line))

    def wait(self) -> list[int]:
        """Their exit codes, when all have ended."""
        codes = [process.wait(60) for process in self.processes]
        for reader in self.readers:
            reader.join(PATIENCE_S)
        return codes

    def acknowledged(self) -> set[str]:
        return {str(answer["id"]) for answer in self.answers if answer.get("ok")}


def waiting(folder: Path, spool: str) -> set[str]:
    """The ids that a relay holds, running or dead."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "smtp_module.py"), "queue", "--json", "--spool", spool],
        cwd=folder, env=environment(), capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return {str(row["id"]) for row in json.loads(done.stdout)}


def message_ids(mailbox: Mailbox) -> dict[str, set[str]]:
    """By alert id, the Message-IDs with which it came."""
    found: dict[str, set[str]] = defaultdict(set)
    for received in list(mailbox.mails):
        head = email.message_from_bytes(received.content.partition(b"\r\n\r\n")[0], policy=email.policy.default)
        found[str(head["X-Alert-Id"])].add(str(head["Message-ID"]))
    return found


@pytest.fixture
def sleeping() -> Iterator[Mailbox]:
    """A mail server that takes no connection before it is started."""
    box = Mailbox()
    yield box
    if box._thread is None:
        box.start()
    box.stop()


@needs("haproxy")
def test_a_relay_is_killed_under_load_and_nothing_acknowledged_is_lost(
    start: Any, haproxy: Callable[[int, int], int], sleeping: Mailbox, tmp_path: Path
) -> None:
    box = sleeping
    with open_folder() as folder:
        queue = None if Postfix.missing() else Postfix(folder, f"[127.0.0.1]:{box.port}")
        mail = {
            "SMTP_FROM": "dvr@example.com", "ALERT_RETRY_FIRST": "0.2", "ALERT_RETRY_MAX": "0.5",
        }  # fmt: skip
        fixed = [{"ALERT_PORT": str(free_port()), "ALERT_SPOOL": f"{n}.db"} for n in (0, 1)]
        relays = [relay(start, queue or box, **mail, **own) for own in fixed]
        front = haproxy(relays[0].port, relays[1].port)
        cameras = Cameras(tmp_path, front, 60)
        try:
            until("a quarter is acknowledged", lambda: len(cameras.answers) >= 60)
            dead = max((0, 1), key=lambda n: ping(relays[n].port).get("queued", 0))
            relays[dead].end(signal.SIGKILL)
            assert cameras.wait() == [0, 0, 0, 0]
            names = {f"{camera}-{n}" for camera in ("north", "east", "south", "west") for n in range(1, 61)}
            assert cameras.acknowledged() == names
            kept = [waiting(tmp_path, f"{n}.db") for n in (0, 1)]
            assert kept[0] | kept[1] == names and len(kept[dead]) >= 60 and kept[1 - dead]

            box.start()
            if queue:
                queue.start()
            until("the other relay's mails are out", lambda: set(message_ids(box)) >= kept[1 - dead])
            assert set(message_ids(box)) == kept[1 - dead]
            relays[dead].start()
            until("the dead relay's mails are out", lambda: set(message_ids(box)) == names)

            for one in relays:
                sent = [sys.executable, str(ROOT / "client.py"), "--port", str(one.port), "--id", "twice"]
                subprocess.run(sent, check=True, env=environment(), timeout=60, stdout=subprocess.DEVNULL)
            until("both mails of one id", lambda: sum(b"X-Alert-Id: twice\r\n" in m.content for m in box.mails) == 2)
            assert all(len(ids) == 1 for ids in message_ids(box).values())
        finally:
            for process in cameras.processes:
                process.kill()
            if queue:
                queue.stop()


# The end of what began with the first test


def test_motion_mails_the_picture_of_what_moved(motion: Motion) -> None:
    (picture,) = pictures(arrived(motion.mailbox, "MOTION_DETECTED - front door"))
    assert picture[:3] == b"\xff\xd8\xff" and picture in [path.read_bytes() for path in motion.folder.glob("*.jpg")]
    movie = re.search(r"/\S+\.mkv", text_of(arrived(motion.mailbox, "MOVIE_SAVED - front door")))
    assert movie and Path(movie[0]).parent == motion.folder


def test_motion_reports_a_lost_camera(motion: Motion) -> None:
    until("motion's own 30 s", lambda: any(b"CAMERA_DISCONNECTED" in m.content for m in motion.mailbox.mails), 45)
    assert arrived(motion.mailbox, "CAMERA_DISCONNECTED - cellar")
