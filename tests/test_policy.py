"""Who may do what: networks, operators and signatures, cell by cell."""

from __future__ import annotations

import ipaddress

import pytest

from embedded_smtpd import PRIVATE, Access, Command, Policy, networks, read_command

SECRET = b"correct horse"
OPS = "ops@example.com"
EXPIRY, NONCE = 1_800_000_000, bytes.fromhex("0123456789ab")
NOW = float(EXPIRY - 10)
SIGNED = Policy(secret=SECRET)


@pytest.mark.parametrize(
    "words, attachment, token",
    [
        ("SET relay1=on", None, "nne5eaabencwpcnliwpaq7b4zmtmkyz4"),
        ("UPDATE firmware", b"hello", "nne5eaabencwpcnllgeqymtmmfx4asje"),
    ],
)
def test_signature_is_the_published_one(words: str, attachment: bytes | None, token: str) -> None:
    assert SIGNED.sign(words, OPS, EXPIRY, NONCE, attachment) == token
    command = read_command(f"CMD {words} ~{token}")
    assert command and SIGNED.verify(command, OPS, NOW, attachment) == EXPIRY


def command(words: str = "SET relay1=on", **changes: str) -> Command:
    found = read_command(f"CMD {words} ~{SIGNED.sign('SET relay1=on', OPS, EXPIRY, NONCE)}")
    assert found
    return found._replace(**changes)


@pytest.mark.parametrize(
    "tried, sender, now, attachment",
    [
        (command("SET relay1=off"), OPS, NOW, None),
        (command("set relay1=on"), OPS, NOW, None),
        (command(), "evil@example.com", NOW, None),
        (command(), "", NOW, None),
        (command(), OPS, EXPIRY + 1.0, None),
        (command(), OPS, 1_600_000_000.0, None),
        (command(), OPS, 0.0, None),
        (command(token=""), OPS, NOW, None),
        (command(token="nne5eaabencwpcnliwpaq7b4zmtmkyz5"), OPS, NOW, None),
        (command(token="é" * 32), OPS, NOW, None),
        (command(token="1" * 32), OPS, NOW, None),
    ],
)
def test_signature_counts_for_nothing_but_what_was_signed(
    tried: Command, sender: str, now: float, attachment: bytes | None
) -> None:
    assert SIGNED.verify(tried, sender, now, attachment) is None


@pytest.mark.parametrize(
    "words, signed, came, counts",
    [
        ("RELAY 2 ON", b"dat", b"dat", True),
        ("RELAY 2 ON", None, b"a card that the mail program added", True),
        ("RELAY 2 ON", b"dat", b"other", False),
        ("RELAY 2 ON", b"dat", None, False),
        ("UPDATE fw", b"dat", b"dat", True),
        ("UPDATE fw", None, b"dat", False),
        ("UPDATE fw", b"dat", None, False),
        ("UPDATE fw", b"dat", b"other", False),
    ],
)
def test_attachment_is_what_was_signed_and_only_an_update_needs_its_signature(
    words: str, signed: bytes | None, came: bytes | None, counts: bool
) -> None:
    found = read_command(f"CMD {words} ~{SIGNED.sign(words, OPS, EXPIRY, NONCE, signed)}")
    assert found and (SIGNED.verify(found, OPS, NOW, came) == EXPIRY) is counts


def test_signature_may_come_in_capitals_and_with_more_space() -> None:
    token = SIGNED.sign("SET relay1=on", OPS, EXPIRY, NONCE).upper()
    found = read_command(f"cmd   SET   relay1=on  ~{token}")
    assert found and SIGNED.verify(found, OPS, NOW, None)


def test_without_a_secret_no_signature_is_genuine() -> None:
    nobody = Policy()
    found = read_command(f"CMD ARM ~{nobody.sign('ARM', OPS, EXPIRY, NONCE)}")
    assert found and nobody.verify(found, OPS, NOW, None) is None


DEFAULT = Policy(allow=networks(PRIVATE))
SPLIT = Policy(allow=networks("192.168.0.0/16, 10.0.0.7"), readonly=networks("0.0.0.0/0,::/0,192.168.1.25,10.0.0.7"))


@pytest.mark.parametrize(
    "policy, host, access",
    [
        (DEFAULT, "127.0.0.1", Access.CONTROL),
        (DEFAULT, "::1", Access.CONTROL),
        (DEFAULT, "192.168.1.2", Access.CONTROL),
        (DEFAULT, "::ffff:10.1.2.3", Access.CONTROL),
        (DEFAULT, "fe80::1%eth0", Access.CONTROL),
        (DEFAULT, "fd00::1", Access.CONTROL),
        (DEFAULT, "8.8.8.8", Access.NONE),
        (DEFAULT, "::ffff:8.8.8.8", Access.NONE),
        (DEFAULT, "2001:db8::1", Access.NONE),
        (DEFAULT, "not an address", Access.NONE),
        (SPLIT, "192.168.1.2", Access.CONTROL),
        (SPLIT, "192.168.1.25", Access.READ),
        (SPLIT, "::ffff:192.168.1.25", Access.READ),
        (SPLIT, "10.0.0.7", Access.READ),
        (SPLIT, "8.8.8.8", Access.READ),
        (SPLIT, "2001:db8::1", Access.READ),
    ],
)
def test_most_specific_network_gives_the_access(policy: Policy, host: str, access: Access) -> None:
    assert policy.access(host) is access


def test_networks_are_read_leniently_and_refused_with_the_right_form() -> None:
    assert networks("10.0.0.1/24") == (ipaddress.ip_network("10.0.0.0/24"),)
    with pytest.raises(ValueError, match=r"192\.168\.1\.0/24"):
        networks("10.0.0.0/99")


def test_operators_are_compared_without_case_and_answered_as_configured() -> None:
    policy = Policy(operators=("Ops@Example.com",))
    assert policy.operator("ops@example.com") == "Ops@Example.com"
    assert policy.operator("evil@example.com") is None and policy.operator("") is None
    assert Policy().operator("anybody@x") == ""


def test_secret_is_not_shown() -> None:
    assert "horse" not in repr(SIGNED)
