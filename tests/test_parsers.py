"""The mails as programs read them that have nothing to do with Python: four parsers and a spam filter.

Debian has them in libemail-mime-perl, mblaze, mpack, ripmime and spamassassin; what is missing is skipped.
"""

from __future__ import annotations

import email
import email.policy
import email.utils
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from email.message import EmailMessage
from pathlib import Path

import mails
import pytest

ALL = mails.every_mail()
Found = tuple[str, list[tuple[str, str]]]  # the Subject; each part by its file name, "" for none, and its digest


def run(folder: Path, *command: str, data: bytes = b"") -> bytes:
    environment = os.environ | {"LC_ALL": "C.UTF-8", "MBLAZE": str(folder)}
    done = subprocess.run(
        command, cwd=folder, input=data, capture_output=True, env=environment, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def needs(program: str) -> None:
    """Skip the test where the program, or the module of Perl, is missing."""
    command = ["perl", f"-M{program}", "-e", "1"] if "::" in program else ["which", program]
    if not shutil.which(command[0]) or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"{program} is not installed")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def of_unix(data: bytes) -> bytes:
    """With the line ends that munpack gives to texts."""
    return data.replace(b"\r\n", b"\n")


def parsed(data: bytes) -> EmailMessage:
    message = email.message_from_bytes(data, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    return message


def read_by_python(data: bytes) -> Found:
    """What Python's package finds; other tests hold this against what was put in."""
    message = parsed(data)
    leaves = [part for part in message.walk() if not part.is_multipart()]
    parts = [(part.get_filename() or "", digest(part.get_payload(decode=True))) for part in leaves]  # type: ignore[arg-type]
    return str(message["Subject"]), sorted(parts)


EMAIL_MIME = r"""
use Email::MIME; use Digest::SHA qw(sha256_hex); binmode STDOUT, ":utf8"; local $/;
my $mail = Email::MIME->new(<STDIN>);
print $mail->header_str("Subject"), "\n";
$mail->walk_parts(sub {
  my ($part) = @_;
  print $part->filename // "", "\t", sha256_hex($part->body), "\n" unless $part->subparts;
});
"""


def read_by_perl(data: bytes, folder: Path) -> Found:
    subject, *parts = run(folder, "perl", "-e", EMAIL_MIME, data=data).decode().splitlines()
    return subject, sorted((name, content) for name, _, content in (part.partition("\t") for part in parts))


def read_by_mblaze(data: bytes, folder: Path) -> Found:
    (folder / "seq").touch()
    (folder / "mail.eml").write_bytes(data)
    subject = run(folder, "mhdr", "-d", "-h", "subject", "./mail.eml").decode().rstrip("\n")
    listed = run(folder, "mshow", "-t", "./mail.eml").decode()
    found = re.findall(r'^\s+(\d+): (?!multipart/)\S+ size=\d+(?: name="(.*)")?$', listed, re.MULTILINE)
    parts = [(name, digest(run(folder, "mshow", "-O", "./mail.eml", number))) for number, name in found]
    return subject, sorted(parts)


PARSERS: dict[str, Callable[[bytes, Path], Found]] = {"Email::MIME": read_by_perl, "mshow": read_by_mblaze}


@pytest.mark.parametrize("parser", PARSERS)
def test_subject_and_every_part_arrive_whole(parser: str, tmp_path: Path) -> None:
    needs(parser)
    for name, data in ALL.items():
        assert PARSERS[parser](data, tmp_path) == read_by_python(data), name


@pytest.mark.parametrize("command", [("munpack", "-q", "-t", "-f"), ("ripmime", "-d", ".", "-i")], ids=lambda c: c[0])
def test_files_are_unpacked_byte_for_byte(command: tuple[str, ...], tmp_path: Path) -> None:
    needs(command[0])
    for number, (name, data) in enumerate(ALL.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (tmp_path / "mail.eml").write_bytes(data)
        run(folder, *command, str(tmp_path / "mail.eml"))
        found = {digest(of_unix(file.read_bytes())) for file in folder.iterdir()}
        files = [part.get_payload(decode=True) for part in parsed(data).walk() if part.get_filename()]
        assert {digest(of_unix(file)) for file in files} <= found, name  # type: ignore[arg-type]


RECEIVED = """Received: from smtp.provider.example (smtp.provider.example [81.2.69.160])\r
 by mx.example.com (Postfix) with ESMTPS id 4ABC for <owner@example.com>; {date}\r
Received: from nas (p5b0.dip0.t-ipconnect.de [91.0.12.34])\r
 by smtp.provider.example with ESMTPSA id x1 for <owner@example.com>; {date}\r
"""
SPAMASSASSIN = r"""
use Mail::SpamAssassin; local $/;
my $filter = Mail::SpamAssassin->new({local_tests_only => 1, dont_copy_prefs => 1});
foreach my $name (@ARGV) {
  open my $file, "<:raw", $name or die $!; my $mail = $filter->parse(<$file>); my $status = $filter->check($mail);
  print $name, "\t", $status->get_score(), "\t", $status->get_names_of_tests_hit(), "\n";
  $status->finish(); $mail->finish();
}
"""


def spam_scores(named: Iterable[tuple[str, bytes]], folder: Path) -> dict[str, tuple[float, str]]:
    """The points of each mail, as it comes through a provider from a home, without tests over the network."""
    received = RECEIVED.format(date=email.utils.formatdate()).encode()
    for name, data in named:
        (folder / f"{name}.eml").write_bytes(received + data)
    files = sorted(file.name for file in folder.glob("*.eml"))
    lines = run(folder, "perl", "-e", SPAMASSASSIN, *files).decode().splitlines()
    return {name: (float(score), tests) for name, score, tests in (line.split("\t") for line in lines)}


def test_no_mail_looks_like_spam(tmp_path: Path) -> None:
    """Five points make a mail spam; half a point goes to a Subject in capitals, which filters rely on."""
    needs("Mail::SpamAssassin")
    scores = spam_scores(ALL.items(), tmp_path)
    assert len(scores) == len(ALL)
    assert {name: found for name, found in scores.items() if found[0] >= 1.5} == {}
