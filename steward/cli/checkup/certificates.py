"""Certificates and their keys: can they be read, do they fit each other, how long are they good."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from steward.cli.checkup.finding import Finding, failed, good, warning

AREA = "certificates"
SOON = timedelta(days=14)


def look(
    authorities: Path | None, certificate: Path | None, key: Path | None, now: datetime
) -> Iterator[Finding]:
    """Findings of what is set. `now` has a time zone."""
    if authorities is not None:
        yield lifetime(authorities, now)
    if certificate is not None:
        yield lifetime(certificate, now)
        yield pair(certificate, key)


def lifetime(path: Path, now: datetime) -> Finding:
    """How long the first certificate of a file to end is still good."""
    try:
        certificates = x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        return failed(AREA, str(path), f"can't be read: {error.strerror}", "give the right path")
    except ValueError:
        return failed(AREA, str(path), "is no PEM certificate", "give a file of certificates")
    begin = max(each.not_valid_before_utc for each in certificates)
    end = min(each.not_valid_after_utc for each in certificates)
    day = end.astimezone(UTC).date().isoformat()
    if now < begin:
        return failed(
            AREA,
            str(path),
            f"is good from {begin.date().isoformat()} on",
            "wait, set the clock right, or issue it anew",
        )
    if now >= end:
        return failed(AREA, str(path), f"ended on {day}", "issue it anew")
    if end - now < SOON:
        return warning(AREA, str(path), f"ends on {day}", "renew it now")
    return good(AREA, str(path), f"good until {day}")


def pair(certificate: Path, key: Path | None) -> Finding:
    """Whether a key is the one of a certificate."""
    mend = f"give the private key of {certificate}"
    if key is None:
        return failed(AREA, str(certificate), "has no key beside it", mend)
    try:
        private = load_pem_private_key(key.read_bytes(), password=None)
        shown = x509.load_pem_x509_certificates(certificate.read_bytes())[0].public_key()
    except OSError as error:
        return failed(AREA, str(key), f"can't be read: {error.strerror}", mend)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return failed(AREA, str(key), "is no PEM private key without a password", mend)
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if private.public_key().public_bytes(*form) != shown.public_bytes(*form):
        return failed(AREA, str(key), f"is not the key of {certificate}", mend)
    return good(AREA, str(key), f"fits {certificate}")


def now() -> datetime:
    """The time of this machine."""
    return datetime.now(UTC)
