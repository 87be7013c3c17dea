"""The device behind the sessions: commands, their effects and their replies, in a real SQLite file."""

from __future__ import annotations

import contextlib
import email
import email.policy
import functools
import hashlib
import itertools
import json
import re
import shutil
import sqlite3
import struct
import urllib.parse
import zlib
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path

import pytest

import embedded_smtpd as emb
import smtp_module
from embedded_smtpd import Access, Device, Mail, Maildir, Policy, Refused, networks
from smtp_module import DiskFull, Outbox, SpoolError

OPS, SECRET = "ops@example.com", b"correct horse"
LAN, OFFICE, WORLD = "192.168.1.2", "10.9.9.9", "8.8.8.8"
NOW = 1_790_000_000.0
serial = itertools.count()
BROKEN = b"Subject: CMD UPDATE fw\r\nContent-Type: application/x\r\nContent-Transfer-Encoding: base64\r\n\r\n!!\r\n"


class Bench:
    """A device with a clock to turn, and what it wants to send."""

    def __init__(self, folder: Path, policy: Policy, **options: object):
        self.now = NOW
        self.outbox = Outbox(folder / "device.db", schema=emb.TABLES)
        self.device = Device(self.outbox, policy, ("device@localhost", "device@dev"), clock=lambda: self.now,
                             random_bytes=lambda count: hashlib.sha256(b"%d" % next(serial)).digest()[:count],
                             maildir=Maildir(folder / "mail", 3), **options)  # type: ignore[arg-type]  # fmt: skip

    def send(
        self,
        subject: str,
        *,
        sender: str = OPS,
        envelope: str = OPS,
        peer: str = LAN,
        data: bytes | None = None,
        message_id: str = "",
        headers: dict[str, str] | None = None,
    ) -> str:
        message = EmailMessage(policy=email.policy.SMTP)
        message["From"], message["Subject"] = sender, subject
        message["Message-ID"] = message_id or f"<{next(serial)}@test>"
        for name, value in (headers or {}).items():
            message[name] = value
        message.set_content("hello\n")
        if data is not None:
            message.add_attachment(data, maintype="application", subtype="octet-stream", filename="x.bin")
        return self.deliver(message.as_bytes(), envelope, peer)

    def deliver(self, content: bytes, envelope: str = OPS, peer: str = LAN) -> str:
        mail = Mail(envelope, ["device@localhost"], content)
        try:
            return self.device.deliver(mail, peer).decode().strip()
        except Refused as refusal:
            return str(refusal)

    def replies(self) -> list[EmailMessage]:
        """What waits to be sent, oldest first, and forgotten with this look."""
        with self.outbox.transaction() as db:
            rows = db.execute("SELECT source, payload FROM entries ORDER BY seq").fetchall()
            db.execute("DELETE FROM entries")
        messages = [email.message_from_bytes(payload, policy=email.policy.default) for _, payload in rows]
        assert [message["To"] for message in messages] == [to for to, _ in rows]
        return messages  # type: ignore[return-value]

    def ask(self, subject: str, **options: object) -> str:
        """The text of the one reply."""
        assert self.send(subject, **options) == emb.ACCEPTED.decode().strip()  # type: ignore[arg-type]
        (reply,) = self.replies()
        return text_of(reply)

    def value(self, name: str) -> object:
        with self.outbox.transaction() as db:
            return self.device.parameters(db, self.now)[name]


def text_of(message: EmailMessage, kind: str = "plain") -> str:
    body = message.get_body((kind,))
    assert body is not None
    return str(body.get_content()).replace("\r\n", "\n").strip()


def files_of(message: EmailMessage) -> dict[str, bytes]:
    return {part.get_filename(): part.get_payload(decode=True) for part in message.walk() if part.get_filename()}  # type: ignore[misc]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def bench(folder: Path) -> Iterator[Bench]:
    made = Bench(folder, Policy(allow=networks(emb.PRIVATE), readonly=networks("10.9.9.9")))
    yield made
    made.outbox.close()


# Commands


@pytest.mark.parametrize(
    "subject, answer, name, value",
    [
        ("CMD SET relay1=on", "relay1: off -> on", "relay1", "on"),
        ("cmd set RELAY1 = ON", "relay1: off -> on", "relay1", "on"),
        ("CMD SET threshold=80", "threshold: 50 -> 80", "threshold", 80),
        ("CMD SET name=دروازه 北門", "name: device -> دروازه 北門", "name", "دروازه 北門"),
        ("CMD SET report_every=3600", "report_every: 0 -> 3600", "report_every", 3600),
        ("CMD ARM", "armed: off -> on", "armed", "on"),
        ("CMD DISARM", "armed: off -> off", "armed", "off"),
        ("CMD RECORD ON", "recording: off -> on", "recording", "on"),
        ("CMD RELAY 3 on", "relay3: off -> on", "relay3", "on"),
    ],
)
def test_control_command_changes_one_parameter_and_says_what(
    bench: Bench, subject: str, answer: str, name: str, value: object
) -> None:
    assert bench.ask(subject) == answer
    assert bench.value(name) == value


@pytest.mark.parametrize(
    "subject, says",
    [
        ("CMD SET relay1=maybe", "relay1: 'maybe' is unknown; write one of on, off"),
        ("CMD SET relay5=on", "there is no parameter 'relay5'"),
        ("CMD SET temperature=3", "temperature can only be read"),
        ("CMD SET threshold=101", "from 0 to 100"),
        ("CMD SET threshold=-1", "from 0 to 100"),
        ("CMD SET threshold=" + "9" * 5000, "from 0 to 100"),
        ("CMD SET name=", "1 to 64"),
        ("CMD SET name=" + "x" * 65, "1 to 64"),
        ("CMD SET relay1", "CMD SET name=value"),
        ("CMD SET", "CMD SET name=value"),
        ("CMD ARM now", "CMD ARM"),
        ("CMD RELAY 5 ON", "relay1, relay2, relay3, relay4"),
        ("CMD RELAY 1", "RELAY n ON|OFF"),
        ("CMD RECORD maybe", "on, off"),
        ("CMD GET volume", "'volume' is unknown; write one of name, armed"),
        ("CMD SNAPSHOT cam9", "cam1, cam2, cam3, cam4"),
        ("CMD UPDATE ../x", "does not start with a dot"),
        ("CMD UPDATE .x", "does not start with a dot"),
        ("CMD UPDATE fw", "exactly one"),
        ("CMD READ fw", "none yet"),
        ("CMD REBOOT tomorrow", "CMD REBOOT"),
        ("CMD STATUS cam1", "CMD STATUS"),
        ("CMD LOG 50", "CMD LOG"),
    ],
)
def test_wrong_argument_gets_a_reply_that_says_what_is_right(bench: Bench, subject: str, says: str) -> None:
    bench.now += 60
    with bench.outbox.transaction() as db:
        before = bench.device.status(db, bench.now)
    answer = bench.ask(subject)
    assert says in answer and "The form is: CMD" in answer
    with bench.outbox.transaction() as db:
        assert bench.device.status(db, bench.now) == before


def test_status_says_the_same_in_text_html_and_json(bench: Bench) -> None:
    bench.ask("CMD UPDATE fw", data=b"hello")
    bench.ask("CMD SET name=<b>دروازه</b>")
    bench.send("CMD STATUS")
    (reply,) = bench.replies()
    status = json.loads(files_of(reply)["status.json"])
    for name in emb.PARAMETERS:
        assert f"{name} = {status[name]}" in text_of(reply)
    assert set(status["cameras"]) == set(emb.CAMERAS)
    assert status["blocks"]["fw"]["sha256"] == hashlib.sha256(b"hello").hexdigest()
    page = text_of(reply, "html")
    assert "<bdi>&lt;b&gt;دروازه&lt;/b&gt;</bdi>" in page and "<b>" not in page and "bgcolor" in page
    assert all(f"<bdi>{name}</bdi>" in page for name in (*emb.PARAMETERS, *emb.CAMERAS, "fw"))


def test_simulated_values_are_smooth_and_a_function_of_the_time(bench: Bench) -> None:
    def series() -> list[dict[str, float]]:
        with bench.outbox.transaction() as db:
            return [bench.device.parameters(db, NOW + second) for second in range(0, 7200, 10)]

    values = series()
    assert values == series()
    for one, two in itertools.pairwise(values):
        assert abs(one["temperature"] - two["temperature"]) < 0.5 and abs(one["voltage"] - two["voltage"]) < 0.1
        assert abs(one["disk_free"] - two["disk_free"]) < 0.5
    assert len({value["temperature"] for value in values}) > 10 and values[-1]["uptime"] == 7190


def test_block_is_replaced_and_read_byte_for_byte(bench: Bench) -> None:
    data = bytes(range(256)) * 100
    for content in (b"old", data):
        assert bench.ask("CMD UPDATE fw-1.2", data=content) == (
            f"fw-1.2: {len(content)} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}"
        )
    bench.send("CMD READ fw-1.2")
    (reply,) = bench.replies()
    assert files_of(reply) == {"fw-1.2": data}


def test_snapshot_is_a_png_that_moves(bench: Bench) -> None:
    pictures, cids = [], set()
    for bench.now in (NOW, NOW + 1):
        bench.send("CMD SNAPSHOT CAM1", peer=OFFICE)
        (reply,) = bench.replies()
        (picture,) = files_of(reply).values()
        (cid,) = [part["Content-ID"][1:-1] for part in reply.walk() if part["Content-ID"]]
        assert picture.startswith(b"\x89PNG\r\n\x1a\n") and f"cid:{cid}" in text_of(reply, "html")
        cids.add(cid)
        assert struct.unpack(">II", picture[16:24]) == (320, 240)
        length = int.from_bytes(picture[33:37], "big")
        assert picture[37:41] == b"IDAT" and len(zlib.decompress(picture[41 : 41 + length])) == 240 * (1 + 320 * 3)
        pictures.append(picture)
    assert pictures[0] != pictures[1]
    assert len(cids) == 2  # a mail program that keeps pictures by it must not show the older one


def test_reboot_replies_first_starts_the_uptime_anew_and_is_logged(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    bench.now += 500
    assert bench.value("uptime") == 500
    assert bench.ask("CMD REBOOT") == "restarting now"
    assert bench.value("uptime") == 0
    assert caplog.messages[-1].startswith("restarted (simulated)")


def test_log_holds_the_last_twenty(bench: Bench) -> None:
    for number in range(25):
        bench.ask(f"CMD SET threshold={number}")
    lines = bench.ask("CMD LOG").splitlines()
    assert len(lines) == 20 and "SET threshold=24" in lines[0] and f"{OPS} from {LAN}" in lines[0]


def test_log_holds_refused_commands_and_a_flood_of_them_hides_nothing(bench: Bench) -> None:
    for number in range(12):
        bench.ask(f"CMD SET threshold={number}")
    for number in range(100):
        assert bench.send(f"CMD SET threshold={number}", peer=OFFICE).startswith("550 5.7.1")
    assert bench.deliver(BROKEN).startswith("550 5.6.0")
    lines = bench.ask("CMD LOG").splitlines()
    assert "UPDATE fw  refused: 550 5.6.0" in lines[0]
    assert f"{OPS} from {OFFICE}  SET threshold=99  refused: 550 5.7.1 your network may only read" in lines[1]
    assert ["refused" in line for line in lines] == [True] * 10 + [False] * 10
    with bench.outbox.transaction() as db:
        assert db.execute("SELECT count(*) FROM commands WHERE refused").fetchone() == (10,)


def test_mail_that_the_maildir_cannot_take_is_still_answered_with_what_was_done(bench: Bench, folder: Path) -> None:
    shutil.rmtree(folder / "mail")
    assert bench.ask("CMD ARM") == "armed: off -> on"


def test_help_says_how_the_device_sees_the_sender(bench: Bench) -> None:
    here, office = bench.ask("CMD HELP"), bench.ask("CMD HELP", peer=OFFICE)
    assert OPS in here and LAN in here and "all commands" in here
    assert "only read" in office and "read access" in office
    assert all(f"CMD {verb}" in here for verb in emb.COMMANDS)


def test_page_says_what_was_done_which_device_says_so_and_how_to_go_on(bench: Bench) -> None:
    bench.ask("CMD SET name=دروازه")
    bench.send("CMD SET threshold=<80>")
    bench.send("CMD ARM")
    wrong, armed = (text_of(reply, "html") for reply in bench.replies())
    for page, colour in ((wrong, smtp_module.RED), (armed, smtp_module.BLUE)):
        assert f'bgcolor="{colour}"' in page and "<bdi>دروازه</bdi>" in page and "CMD HELP" in page
    assert "armed: off -&gt; on" in armed and "<bdi>The form is: CMD SET name=value</bdi>" in wrong


def test_plain_text_is_nothing_but_the_answer(bench: Bench) -> None:
    assert bench.ask("CMD GET threshold") == "threshold = 50"
    assert bench.ask("CMD STATUS").startswith("name = device\narmed = off\n")


@pytest.mark.parametrize("subject", ["", "hello", "CMD", "CMD DANCE", "Re: CMD ARM", "AW: CMD ARM", "STATUS"])
def test_mail_without_a_command_is_accepted_and_does_nothing(bench: Bench, subject: str) -> None:
    assert bench.send(subject).startswith("250")
    assert bench.replies() == [] and bench.value("armed") == "off"


def test_unreadable_mail_is_refused_for_good_and_changes_nothing(bench: Bench) -> None:
    assert bench.deliver(b"Subject: CMD ARM\r\nSubject: hello\r\n\r\nx\r\n").startswith("550 5.5.2")
    assert bench.deliver(BROKEN).startswith("550 5.6.0")
    assert bench.replies() == [] and bench.value("armed") == "off"


# Exactly once


def test_mail_that_comes_again_is_not_carried_out_again(bench: Bench) -> None:
    bench.ask("CMD RELAY 1 ON", message_id="<one@x>")
    bench.ask("CMD RELAY 1 OFF")
    bench.now += 6 * 86400
    assert bench.send("CMD RELAY 1 ON", message_id="<one@x>").startswith("250")
    assert bench.replies() == [] and bench.value("relay1") == "off"
    bench.now += 2 * 86400
    assert bench.ask("CMD RELAY 1 ON", message_id="<one@x>") == "relay1: off -> on"


def test_mail_that_was_submitted_twice_to_a_mail_relay_is_one_command(bench: Bench) -> None:
    content = b"From: %s\r\nMessage-ID: <one@x>\r\nSubject: CMD RELAY 1 %s\r\n\r\n"
    for trace, what, value in ((b"", b"ON", "on"), (b"", b"OFF", "off"), (b"Received: from b\r\n", b"ON", "off")):
        assert bench.deliver(trace + content % (OPS.encode(), what)).startswith("250")
        assert bench.value("relay1") == value


def test_same_message_id_with_other_content_is_another_command(bench: Bench) -> None:
    bench.ask("CMD RELAY 1 ON", message_id="<one@x>")
    assert bench.ask("CMD RELAY 2 ON", message_id="<one@x>") == "relay2: off -> on"
    for data in (b"old", b"new"):
        assert hashlib.sha256(data).hexdigest() in bench.ask("CMD UPDATE fw", message_id="<two@x>", data=data)


def test_effect_journal_and_reply_are_one_transaction(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench.outbox, "add", lambda *_: (_ for _ in ()).throw(sqlite3.OperationalError("disk I/O error"))
    )
    with pytest.raises(SpoolError):
        bench.send("CMD ARM", message_id="<one@x>")
    monkeypatch.undo()
    assert bench.value("armed") == "off" and bench.replies() == []
    assert bench.ask("CMD ARM", message_id="<one@x>") == "armed: off -> on"


@pytest.mark.parametrize("error, reply", [(SpoolError, emb.FAILED), (DiskFull, emb.DISK_FULL)])
def test_disk_that_fails_is_one_line_in_the_log(
    error: type[SpoolError], reply: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> bytes:
        raise error("device.db: disk I/O error")

    assert emb.safely(fail) == reply
    assert [record.getMessage() for record in caplog.records] == ["device.db: disk I/O error"]


def test_last_of_the_disk_is_kept_for_sending_the_replies(
    bench: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage("/")._replace(total=10**9, free=16 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(DiskFull):
        bench.send("CMD ARM")
    assert bench.value("armed") == "off" and not bench.replies()
    assert bench.send("hello").startswith("250") and not list((folder / "mail" / "new").iterdir())


def test_state_survives_a_restart(folder: Path) -> None:
    first = Bench(folder, Policy(allow=networks(emb.PRIVATE)))
    first.ask("CMD ARM", message_id="<one@x>")
    first.outbox.close()
    second = Bench(folder, Policy(allow=networks(emb.PRIVATE)))
    assert second.value("armed") == "on"
    assert second.send("CMD ARM", message_id="<one@x>").startswith("250") and second.replies() == []
    second.outbox.close()


def test_state_of_an_older_version_is_taken_over(folder: Path) -> None:
    with contextlib.closing(sqlite3.connect(folder / "device.db")) as db:
        db.executescript("""
            CREATE TABLE parameters(name TEXT PRIMARY KEY, value TEXT NOT NULL);
            INSERT INTO parameters VALUES ('threshold', '77');
            CREATE TABLE signatures(nonce BLOB PRIMARY KEY, expiry INTEGER NOT NULL);
            CREATE TABLE journal(seq INTEGER PRIMARY KEY, at REAL NOT NULL, who TEXT NOT NULL, network TEXT NOT NULL,
              command TEXT NOT NULL, result TEXT NOT NULL, mail BLOB, answered TEXT);
        """)
    bench = Bench(folder, Policy(allow=networks(emb.PRIVATE)))
    assert bench.value("threshold") == 77
    assert bench.ask("CMD ARM") == "armed: off -> on" and "ARM" in bench.ask("CMD LOG")
    bench.outbox.close()


def test_mail_without_a_from_line_is_discarded_and_the_log_says_why(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(folder, Policy(networks(emb.PRIVATE), operators=(OPS,)))
    with caplog.at_level("INFO"):
        assert bench.deliver(b"Subject: CMD ARM\r\n\r\n").startswith("250") and bench.value("armed") == "off"
    assert f"discarded a mail of <{OPS}> without exactly one From address" in caplog.text
    bench.outbox.close()


def test_maildir_keeps_the_newest(bench: Bench, folder: Path) -> None:
    for number in range(5):
        bench.send(f"hello {number}")
    bench.deliver(b"Subject: a\r\nSubject: b\r\n\r\n")
    kept = sorted((folder / "mail" / "new").iterdir())
    assert [re.search(r"hello \d", path.read_text()).group() for path in kept] == ["hello 2", "hello 3", "hello 4"]  # type: ignore[union-attr]


def test_maildir_keeps_no_half_of_a_mail_that_found_no_room(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    maildir, before = Maildir(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError):
            maildir.add(Mail(OPS, ["device@localhost"], bytes(5000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_maildir_has_the_line_ends_that_mail_programs_expect(bench: Bench, folder: Path) -> None:
    bench.deliver(b"Subject: a\r\n\r\none\r\n..two\r\n")
    (kept,) = (folder / "mail" / "new").iterdir()
    assert kept.read_bytes().endswith(b"\nSubject: a\n\none\n.two\n") and b"\r" not in kept.read_bytes()


# Policy: who x network x signature x command

CONTROL = [verb for verb, rule in emb.COMMANDS.items() if rule.needs is Access.CONTROL]
READ = [verb for verb, rule in emb.COMMANDS.items() if rule.needs is Access.READ]
ARGUMENTS = {
    "SET": " relay1=on",
    "RELAY": " 1 ON",
    "RECORD": " ON",
    "GET": " name",
    "SNAPSHOT": " cam1",
    "READ": " fw",
    "UPDATE": " fw",
}
CELLS = [
    (secret, peer, signature, kind, verdict)
    for secret, peer, signature, control in [
        (False, LAN, "none", "done"),
        (False, LAN, "wrong", "done"),
        (False, OFFICE, "none", "refused"),
        (False, OFFICE, "wrong", "refused"),
        (True, LAN, "none", "refused"),
        (True, LAN, "wrong", "refused"),
        (True, LAN, "late", "refused"),
        (True, LAN, "used", "refused"),
        (True, LAN, "right", "done"),
        (True, OFFICE, "none", "refused"),
        (True, OFFICE, "wrong", "refused"),
        (True, OFFICE, "right", "done"),
    ]
    for kind, verdict in (("control", control), ("read", "done"))
]


@pytest.mark.parametrize("who", ["operator", "stranger", "anybody"])
@pytest.mark.parametrize("cell", CELLS)
def test_policy_cell(folder: Path, who: str, cell: tuple[bool, str, str, str, str]) -> None:
    """`anybody`: no operators are named. `stranger`: some are, and the sender is none of them."""
    secret, peer, signature, kind, verdict = cell
    policy = Policy(
        networks(emb.PRIVATE), networks("10.9.9.9"), () if who == "anybody" else (OPS,), SECRET if secret else b""
    )
    bench = Bench(folder, policy)
    sender = "evil@example.com" if who == "stranger" else OPS
    for verb in CONTROL if kind == "control" else READ:
        words = verb + ARGUMENTS.get(verb, "")
        data = b"hello" if verb == "UPDATE" else None
        expiry = int(NOW) + (-1 if signature == "late" else 60)
        signer = Policy(secret=b"other" if signature == "wrong" else SECRET)
        token = signer.sign(words, sender, expiry, hashlib.sha256(verb.encode()).digest()[:6], data)
        subject = f"CMD {words}" + (f" ~{token}" if signature != "none" else "")
        if signature == "used":
            bench.send(subject, sender=sender, peer=peer, data=data)
            bench.replies()
        with bench.outbox.transaction() as db:
            before = db.execute("SELECT count(*) FROM commands WHERE NOT refused").fetchone()
        said = bench.send(subject, sender=sender, peer=peer, data=data)
        with bench.outbox.transaction() as db:
            done = db.execute("SELECT count(*) FROM commands WHERE NOT refused").fetchone() != before
        if who == "stranger":
            assert said.startswith("250") and not done, verb
        else:
            assert said.startswith("250" if verdict == "done" else "550 5.7.1"), verb
            assert done is (verdict == "done"), verb
        assert len(bench.replies()) == done
    bench.outbox.close()


def test_refused_signature_is_not_used_up(folder: Path) -> None:
    bench = Bench(folder, Policy(networks(emb.PRIVATE), secret=SECRET))
    token = bench.device.policy.sign("ARM", OPS, int(NOW) + 60, b"123456")
    assert bench.send(f"CMD DISARM ~{token}").startswith("550")
    assert bench.send(f"CMD ARM ~{token}", sender="evil@x.y").startswith("550")
    assert bench.send(f"CMD ARM ~{token}", sender=f"{OPS}, evil@x.y").startswith("550")
    bench.now = 1_000_000.0
    assert bench.send(f"CMD ARM ~{token}").startswith("550")
    bench.now = NOW
    assert bench.ask(f"CMD ARM ~{token}") == "armed: off -> on"
    assert bench.send(f"CMD ARM ~{token}").startswith("550")
    bench.outbox.close()


def test_signature_is_known_again_by_all_of_it_and_not_by_its_nonce(folder: Path) -> None:
    bench = Bench(folder, Policy(networks(emb.PRIVATE), secret=SECRET))
    arm = "CMD SET relay1=on ~nne5eaabencwpcnliwpaq7b4zmtmkyz4"
    update = "CMD UPDATE firmware ~nne5eaabencwpcnllgeqymtmmfx4asje"
    assert bench.ask(arm) == "relay1: off -> on"
    assert bench.ask(update, data=b"hello").startswith("firmware: 5 bytes")
    assert bench.send(arm).startswith("550") and bench.send(update, data=b"hello").startswith("550")
    bench.outbox.close()


def test_command_with_an_attachment_is_obeyed_when_signed_over_it(folder: Path) -> None:
    bench = Bench(folder, Policy(networks(emb.PRIVATE), secret=SECRET))
    token = bench.device.policy.sign("RELAY 2 ON", OPS, int(NOW) + 60, b"123456", b"dat")
    assert bench.send(f"CMD RELAY 2 ON ~{token}", data=b"tad").startswith("550")
    assert bench.ask(f"CMD RELAY 2 ON ~{token}", data=b"dat") == "relay2: off -> on"
    bench.outbox.close()


CARD = ("application/octet-stream", "base64", "QkVHSU46VkNBUkQ=", "card.vcf")


@pytest.mark.parametrize(
    "file, sections",
    [
        (b"one\ntwo\n", [("text/plain", "7bit", "one\ntwo\n", "s.txt")]),
        (b"one\r\ntwo\r\n", [("text/plain", "7bit", "one\ntwo\n", "s.txt")]),
        ("é\n".encode(), [("text/plain; charset=utf-8", "quoted-printable", "=C3=A9\n", "s.txt")]),
        (b"dat", [CARD, ("application/octet-stream", "base64", "ZGF0", "x.bin")]),
        (b"dat", [("application/octet-stream", "base64", "ZGF0", "x.bin"), CARD]),
    ],
)
def test_signature_says_which_file_was_sent_whatever_the_mail_program_made_of_it(
    folder: Path, file: bytes, sections: list[tuple[str, str, str, str]]
) -> None:
    bench = Bench(folder, Policy(networks(emb.PRIVATE), secret=SECRET))
    token = bench.device.policy.sign("UPDATE fw", OPS, int(NOW) + 60, b"123456", file)
    lines = [f"From: {OPS}", f"Subject: CMD UPDATE fw ~{token}", 'Content-Type: multipart/mixed; boundary="b"', ""]
    for kind, encoding, text, name in sections:
        lines += ["--b", f"Content-Type: {kind}", f"Content-Transfer-Encoding: {encoding}"]
        lines += [f'Content-Disposition: attachment; filename="{name}"', "", text]
    content = "\n".join([*lines, "--b--", ""]).replace("\n", "\r\n").encode()
    assert bench.deliver(content).startswith("250")
    digest = hashlib.sha256(file).hexdigest()
    assert text_of(bench.replies()[0]) == f"fw: {len(file)} bytes, SHA-256 {digest}"
    bench.send("CMD READ fw")
    assert files_of(bench.replies()[0]) == {"fw": file}
    assert bench.deliver(content.replace(b"From:", b"X-Again: 1\r\nFrom:")).startswith("550 5.7.1")
    bench.outbox.close()


# Replies


def test_reply_hangs_in_the_thread_and_hides_the_token(folder: Path) -> None:
    bench = Bench(folder, Policy(networks(emb.PRIVATE), operators=("Ops@example.com",), secret=SECRET))
    token = bench.device.policy.sign("ARM", OPS, int(NOW) + 60, b"123456")
    bench.send(
        f"CMD ARM ~{token}", envelope="bounce@elsewhere", message_id="<one@x>", headers={"References": "<zero@x>"}
    )
    (reply,) = bench.replies()
    assert reply["Subject"] == "Re: CMD ARM" and token not in reply.as_string().lower()
    assert reply["To"] == "Ops@example.com"
    assert reply["In-Reply-To"] == "<one@x>" and reply["References"] == "<zero@x> <one@x>"
    assert reply["Auto-Submitted"] == "auto-replied" and reply["From"] == "device@localhost"
    bench.outbox.close()


@pytest.mark.parametrize(
    "envelope, headers",
    [
        ("", {}),
        ("a@b.c", {"Auto-Submitted": "auto-generated"}),
        ("a@b.c", {"Precedence": "list"}),
        ("a@b.c", {"List-Unsubscribe": "<mailto:x@y>"}),
        ("MAILER-DAEMON@b.c", {}),
        ("Device@localhost", {}),
        ("nobody", {}),
    ],
)
def test_automatic_mail_is_carried_out_and_not_answered(bench: Bench, envelope: str, headers: dict[str, str]) -> None:
    assert bench.send("CMD ARM", envelope=envelope, headers=headers).startswith("250")
    assert bench.replies() == [] and bench.value("armed") == "on"


def test_address_gets_a_hundred_replies_an_hour(bench: Bench) -> None:
    for _ in range(103):
        bench.send("CMD GET name")
    assert len(bench.replies()) == 100
    bench.send("CMD GET name", envelope="other@example.com")
    bench.now += 3601
    bench.send("CMD GET name")
    assert [reply["To"] for reply in bench.replies()] == ["other@example.com", OPS]


def links(page: str) -> list[str]:
    return [urllib.parse.unquote(link.partition("subject=")[2]) for link in re.findall(r'href="(mailto:[^"]+)"', page)]


def test_buttons_are_signed_for_the_operator_alone_and_work_once(folder: Path) -> None:
    bench = Bench(
        folder, Policy(networks(emb.PRIVATE), networks("10.9.9.9"), (OPS,), SECRET), report_to=(OPS, "boss@example.com")
    )
    bench.send("CMD STATUS", peer=OFFICE)
    (reply,) = bench.replies()
    subjects = links(text_of(reply, "html"))
    assert len(subjects) == 11 and all(re.search(r" ~[a-z2-7]{32}$", subject) for subject in subjects)
    arm = next(subject for subject in subjects if "CMD ARM" in subject)
    bench.now += 86000
    assert bench.ask(arm, peer=OFFICE) == "armed: off -> on"
    assert bench.send(arm, peer=OFFICE).startswith("550")
    late = next(subject for subject in subjects if "CMD DISARM" in subject)
    bench.now += 1000
    assert bench.send(late, peer=OFFICE).startswith("550")
    bench.device.report_every = 60
    bench.device.idle()
    mine, other = bench.replies()
    assert "~" in links(text_of(mine, "html"))[0] and "~" not in other.as_string().replace("~}", "")
    bench.outbox.close()


def test_buttons_without_a_secret_fit_what_the_sender_may_do(bench: Bench) -> None:
    bench.send("CMD STATUS")
    bench.send("CMD STATUS", peer=OFFICE)
    full, reading = [links(text_of(reply, "html")) for reply in bench.replies()]
    assert "CMD ARM" in full and "CMD RELAY 1 ON" in full
    assert reading == ["CMD STATUS", *(f"CMD SNAPSHOT {camera}" for camera in emb.CAMERAS)]


def test_signature_stays_used_when_the_clock_is_set_back(folder: Path) -> None:
    policy = Policy(networks(emb.PRIVATE), secret=SECRET)
    bench = Bench(folder, policy)
    late = policy.sign("ARM", OPS, int(NOW) + 200_000, b"nonce1")
    soon = policy.sign("REBOOT", OPS, int(NOW) + 3600, b"nonce2")
    assert bench.send(f"CMD REBOOT ~{soon}").startswith("250")
    bench.now += 86400  # wrong, for a while
    assert bench.send(f"CMD ARM ~{late}").startswith("250")
    bench.now = NOW + 60
    assert bench.send(f"CMD REBOOT ~{soon}").startswith("550 5.7.1")
    bench.outbox.close()


def test_report_comes_every_so_often_to_everyone_on_the_list(folder: Path) -> None:
    bench = Bench(folder, Policy(networks(emb.PRIVATE)), report_to=(OPS, "boss@example.com"))
    bench.device.idle()
    bench.ask("CMD SET report_every=60")
    for _ in range(150):
        bench.now += 1
        bench.device.idle()
    bench.outbox.close()
    bench = Bench(folder, Policy(networks(emb.PRIVATE)), report_to=(OPS, "boss@example.com"))
    bench.now = NOW + 150
    bench.device.idle()
    reports = bench.replies()
    assert [report["To"] for report in reports] == [OPS, "boss@example.com"] * 2
    assert reports[0]["Auto-Submitted"] == "auto-generated" and "status.json" in files_of(reports[0])
    bench.ask("CMD SET report_every=0")
    bench.now += 1000
    bench.device.idle()
    assert bench.replies() == []
    bench.outbox.close()


def test_report_comes_though_the_device_restarts_more_often(folder: Path) -> None:
    reports = []
    for hour in range(30):
        with contextlib.closing(Outbox(folder / "device.db", schema=emb.TABLES)) as outbox:
            clock = functools.partial(float, NOW + 3600 * hour)
            device = Device(outbox, Policy(), ("device@localhost",), report_to=(OPS,), clock=clock)
            with outbox.transaction() as db:
                db.execute("INSERT OR REPLACE INTO parameters VALUES ('report_every', '86400')")
            device.idle()
            reports.append(len(list(outbox.pending())))
    assert reports == [0] * 24 + [1] * 6


def test_reports_that_cannot_be_sent_do_not_pile_up(folder: Path) -> None:
    bench = Bench(folder, Policy(networks(emb.PRIVATE)), report_to=(OPS, "boss@example.com"))
    bench.ask("CMD SET report_every=1")
    for _ in range(50):
        bench.now += 1
        bench.device.idle()
    assert len(bench.replies()) == 2 * emb.REPORTS_WAITING
    bench.now += 1
    bench.device.idle()
    assert len(bench.replies()) == 2
    bench.outbox.close()


def test_a_signed_update_that_outlook_packed_is_refused_with_what_to_do(folder: Path) -> None:
    bench = Bench(folder, Policy(networks(emb.PRIVATE), (), (OPS,), SECRET))
    token = bench.device.policy.sign("UPDATE firmware", OPS, int(bench.now) + 60, b"123456", b"the file itself")
    packed = emb.TNEF + b"the file itself"
    assert "winmail.dat" in bench.send(f"CMD UPDATE firmware ~{token}", data=packed)
    assert "winmail.dat" in bench.send("CMD UPDATE firmware", data=packed)
