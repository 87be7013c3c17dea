"""What a person is told to do about a failure: one sentence that fits, and none where the cause is not known."""

from __future__ import annotations

import ssl

import pytest

import smtp_module as smtp
from smtp_module import Outcome, Verdict, judge_error

GMAIL, OUTLOOK, OTHER = "smtp.gmail.com", "smtp.office365.com", "mail.example.com"

# step, host, code, what was said, words of the sentence
SAID = [
    # the way to the server
    ("resolve", OTHER, 0, "name not found (Name or service not known)", "check its spelling"),
    ("resolve", OTHER, 0, "name not found (Temporary failure in name resolution)", "whether its DNS answers"),
    ("connect", OTHER, 0, "timed out", "block port 25"),
    ("connect", "localhost", 0, "refused", "embedded_smtpd.py --debug"),
    ("connect", OTHER, 0, "refused", "SMTP_PORT"),
    ("connect", OTHER, 0, "Network is unreachable", "check its network"),
    ("connect", OTHER, 0, "No route to host", "check its network"),
    ("greeting", OTHER, 0, "timed out", "did not greet in time: on port 465 it waits for TLS"),
    ("greeting", OTHER, 554, "5.7.1 no service for you", "turns this machine away"),
    ("greeting", OTHER, 554, "5.7.1 Service unavailable; Client host blocked using zen.spamhaus.org", "senders of spam"),
    ("greeting", OTHER, 421, "4.7.0 busy", "asked again later"),
    ("greeting", OTHER, 421, "Too many concurrent SMTP connections; please try again later", "ALERT_SENDERS=1"),
    # TLS
    ("tls", OTHER, 0, "certificate: certificate is not yet valid", "this machine's clock"),
    ("tls", OTHER, 0, "certificate: certificate has expired", "owner must renew it"),
    ("tls", OTHER, 0, "certificate: Hostname mismatch, certificate is not valid for 'x'", "another name"),
    ("tls", "192.0.2.1", 0, "certificate: IP address mismatch, certificate is not valid for '192.0.2.1'.", "another name"),
    ("tls", OTHER, 0, "certificate: EE certificate key too weak", "too weak"),
    ("tls", OTHER, 0, "certificate: CA certificate key too weak", "too weak"),
    ("tls", OTHER, 0, "certificate: CA signature digest algorithm too weak", "too weak"),
    ("tls", OTHER, 0, "DH_KEY_TOO_SMALL", "too weak"),
    ("tls", OTHER, 0, "certificate: self-signed certificate", "SMTP_CAFILE"),
    ("tls", OTHER, 0, "certificate: self-signed certificate in certificate chain", "SMTP_CAFILE"),
    ("tls", OTHER, 0, "certificate: unable to get local issuer certificate", "ca-certificates"),
    ("tls", OTHER, 0, "TLSV1_ALERT_PROTOCOL_VERSION", "old form of TLS"),
    ("tls", OTHER, 0, "UNSUPPORTED_PROTOCOL", "old form of TLS"),
    ("tls", OTHER, 0, "SSLV3_ALERT_HANDSHAKE_FAILURE", "old form of TLS"),
    ("tls", OTHER, 0, "WRONG_VERSION_NUMBER", "or 465 with ssl"),
    ("tls", OTHER, 0, "STARTTLS is not offered by the server", "use port 587"),
    ("tls", OTHER, 454, "4.7.0 TLS not available due to local problem", "asked again later"),
    ("tls", OTHER, 0, "timed out", "SMTP_TIMEOUT"),
    # EHLO
    ("ehlo", GMAIL, 421, "4.7.0 Try again later, closing connection. (EHLO) x - gsmtp", "SMTP_EHLO"),
    ("ehlo", OTHER, 550, "5.7.1 Invalid HELO/EHLO; must be a fully qualified domain name", "SMTP_EHLO"),
    ("ehlo", OTHER, 504, "5.5.2 <[127.0.0.1]>: Helo command rejected: need fully-qualified hostname", "SMTP_EHLO"),
    ("ehlo", OTHER, 501, "Syntactically invalid EHLO argument(s)", "SMTP_EHLO"),
    ("ehlo", OTHER, 550, "Access denied - Invalid HELO name (See RFC2821 4.1.1.1)", "SMTP_EHLO"),
    ("rcpt", OTHER, 450, "4.7.1 <vm>: Helo command rejected: Host not found", "SMTP_EHLO"),
    ("ehlo", OTHER, 554, "5.7.1 no", "turns this machine away"),
    # login
    ("login", OTHER, 538, "5.7.11 Encryption required for requested authentication mechanism", "only over TLS"),
    ("mail", GMAIL, 530, "5.7.0 Must issue a STARTTLS command first", "only over TLS"),
    ("login", OTHER, -1, "no suitable login: the server offers none before STARTTLS", "only over TLS"),
    ("login", GMAIL, 454, "4.7.0 Too many login attempts, please try again later.", "ALERT_SENDERS=1"),
    ("login", GMAIL, 535, "5.7.8 Username and Password not accepted", "app password in SMTP_PASS"),
    ("login", GMAIL, 534, "5.7.9 Application-specific password required", "app password in SMTP_PASS"),
    ("login", OUTLOOK, 535, "5.7.139 Authentication unsuccessful, basic authentication is disabled", "only access tokens"),
    ("login", OUTLOOK, 535, "5.7.3 Authentication unsuccessful", "check SMTP_USER and SMTP_PASS"),
    ("login", OTHER, -1, "no suitable login: the server offers XOAUTH2 OAUTHBEARER", "only access tokens"),
    ("login", OTHER, -1, "no suitable login: the server offers NTLM GSSAPI", "Windows logins"),
    ("login", OTHER, -1, "no suitable login: the server offers none", "offers no such login here"),
    ("login", OTHER, 0, "SMTP AUTH extension not supported by server.", "offers no such login here"),
    ("login", OTHER, 503, "5.5.1 AUTH command used when not advertised", "offers no such login here"),
    ("login", OTHER, 504, "5.7.4 Unrecognized authentication type", "SMTP_AUTH on auto"),
    ("login", OTHER, 535, "5.7.8 bad", "check SMTP_USER and SMTP_PASS"),
    ("login", OTHER, 534, "5.7.9 stronger", "app password in SMTP_PASS"),
    ("login", OTHER, 454, "4.7.0 temporary authentication failure", "asked again later"),
    ("login", OTHER, 0, "timed out", "SMTP_TIMEOUT"),
    ("login", OTHER, 0, "SMTP_PASS_COMMAND: gives no password (exit code 6)", "run the command by hand"),
    ("mail", OTHER, 530, "5.7.0 Authentication Required", "only after a login"),
    # limits
    ("mail", OTHER, 534, "SIZE=Message too big.", "too big"),
    ("data", OTHER, 523, "Message length (9000000 bytes) exceeds administrative limit.", "too big"),
    ("mail", OTHER, 552, "5.3.4 Message size exceeds fixed limit", "too big"),
    ("dot", OTHER, 552, "5.3.4 Message size exceeds limit", "too big"),
    ("rcpt", OTHER, 552, "5.2.2 mailbox full", "mailbox is full"),
    ("rcpt", GMAIL, 452, "4.2.2 The email account that you tried to reach is over quota", "mailbox is full"),
    ("dot", OTHER, 552, "5.2.2 <ann@x.org> Quota exceeded (mailbox for user is full)", "mailbox is full"),
    ("rcpt", OTHER, 452, "4.5.3 Too many recipients", "ALERT_DAILY_MAX"),
    ("rcpt", OTHER, 552, "too many recipients", "ALERT_DAILY_MAX"),
    ("mail", OUTLOOK, 432, "4.3.2 Concurrent connections limit exceeded", "fewer connections"),
    ("dot", GMAIL, 550, "5.4.5 Daily user sending limit exceeded", "ALERT_DAILY_MAX"),
    ("dot", OUTLOOK, 550, "5.7.233 your tenant exceeded its daily limit", "ALERT_DAILY_MAX"),
    ("rcpt", OTHER, 550, "Domain x.org has exceeded the max emails per hour (200/200 (100%)) allowed.", "ALERT_DAILY_MAX"),
    ("mail", OTHER, 450, "4.7.1 Error: too many mails from you", "ALERT_DAILY_MAX"),
    ("rcpt", GMAIL, 450, "4.2.1 The user you are trying to contact is receiving mail too quickly", "ALERT_DAILY_MAX"),
    # who may send to whom
    ("rcpt", OTHER, 554, "5.7.1 <ann@x.org>: Relay access denied", "only after a login"),
    ("rcpt", OTHER, 454, "4.7.1 <ann@x.org>: Relay access denied", "only after a login"),
    ("rcpt", OTHER, 550, "relay not permitted", "only after a login"),
    ("rcpt", OTHER, 503, "5.7.1 Relay not allowed", "only after a login"),
    ("rcpt", OTHER, 550, "5.1.2 Relay not allowed.", "only after a login"),
    ("rcpt", OTHER, 550, "5.7.1 <ann@x.org>... Relaying denied", "only after a login"),
    ("rcpt", OUTLOOK, 550, "5.7.54 SMTP; Unable to relay recipient in non-accepted domain", "only after a login"),
    ("rcpt", OTHER, 553, "sorry, that domain isn't in my list of allowed rcpthosts (#5.7.1)", "only after a login"),
    ("rcpt", "smtp.zoho.com", 553, "Relaying disallowed as alerts@nas", "SMTP_FROM"),
    ("rcpt", OTHER, 553, "5.7.1 <a@x.org>: Sender address rejected: not logged in", "only after a login"),
    ("rcpt", OTHER, 553, "5.7.1 <a@x.org>: Sender address rejected: not owned by user ann", "SMTP_FROM"),
    ("mail", OTHER, 550, "Sender address is not allowed.", "SMTP_FROM"),
    ("mail", OTHER, 550, "5.7.1 sender not allowed", "SMTP_FROM"),
    ("mail", OTHER, 504, "5.5.2 <root@vm>: Sender address rejected: need fully-qualified address", "SMTP_FROM"),
    ("dot", OUTLOOK, 550, "5.7.60 SMTP; Client does not have permissions to send as this sender", "SMTP_FROM"),
    ("dot", OUTLOOK, 554, "5.2.252 SendAsDenied; a@x.org not allowed to send as b@x.org", "SMTP_FROM"),
    ("mail", OTHER, 501, "mail from address must be same as authorization user", "SMTP_FROM"),
    ("mail", OTHER, 553, "Mail from must equal authorized user", "SMTP_FROM"),
    ("dot", OTHER, 550, "The from address does not match a verified Sender Identity.", "SMTP_FROM"),
    ("dot", OTHER, 554, "Message rejected: Email address is not verified.", "SMTP_FROM"),
    ("rcpt", OTHER, 554, "5.7.1 Service unavailable; Client host [192.0.2.1] blocked using dnsbl.example", "of spam"),
    ("dot", OTHER, 554, "5.7.1 spam", "holds the content"),
    ("dot", GMAIL, 552, "5.7.0 This message was blocked because its content presents a potential security issue",
     "holds the content"),
    ("dot", GMAIL, 550, "5.7.1 Our system has detected that this message is likely unsolicited mail", "holds the content"),
    ("rcpt", OTHER, 550, "5.1.1 no such user", "check the address"),
    ("rcpt", OTHER, 550, "5.1.1 <relay@x.org>: Recipient address rejected: User unknown", "check the address"),
    ("rcpt", OTHER, 550, "No such user here", "check the address"),
    ("rcpt", OTHER, 550, "5.2.1 mailbox disabled", "check the address"),
    ("rcpt", OTHER, 450, "4.2.0 Greylisted", "asked again later"),
]  # fmt: skip


@pytest.mark.parametrize(("step", "host", "code", "words", "sentence"), SAID)
def test_what_to_do_about_it(step: str, host: str, code: int, words: str, sentence: str) -> None:
    assert sentence in smtp.advice(Outcome(Verdict.TRY_LATER, code, words, step), host)


def test_every_sentence_is_given_by_a_case() -> None:
    given = {smtp.advice(Outcome(Verdict.TRY_LATER, code, words, step), host) for step, host, code, words, _ in SAID}
    assert given == {sentence for *_, sentence in smtp.ADVICE}


@pytest.mark.parametrize(
    ("step", "code", "words"),
    [
        ("login", 0, "the server closed the connection"), ("tls", 0, "the server closed the connection"),
        ("connect", 0, "the password would go in the clear to 192.0.2.1; use SMTP_SECURITY=starttls or ssl"),
        ("tls", 0, "certificate: unsuitable certificate purpose"),
        ("mail", 554, "5.7.1 no"), ("rcpt", 550, "no"), ("rcpt", 550, "5.7.1 rejected by policy"), ("dot", 554, "5.6.0 no"),
        ("rcpt", 550, "5.7.1 <relay@x.org>: denied by policy"), ("rcpt", 550, "relay.denied@x.org is not for you"),
        ("rcpt", 550, "5.7.1 mail-relay.example.com says no"), ("data", 503, "5.5.1 bad sequence of commands"),
        ("dot", 554, "5.7.1 rejected, ask spam@x.org"), ("ehlo", 0, "the server closed the connection"),
    ],
)  # fmt: skip
def test_no_advice_where_the_cause_is_not_known(step: str, code: int, words: str) -> None:
    assert smtp.advice(Outcome(Verdict.REFUSED, code, words, step), OTHER) == ""


def test_real_certificate_errors_are_understood() -> None:
    error = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")
    error.verify_message = "certificate has expired"
    assert "expired" in smtp.advice(judge_error("tls", error), OTHER)
