"""What the doctor makes of what it sees: each thing that is wrong is told, with how to mend it."""

import resource
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from steward.cli.checkup import certificates, cluster, files, machine
from steward.cli.checkup.finding import Finding, Verdict

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def test_what_is_not_good_can_be_mended() -> None:
    with pytest.raises(ValueError, match="how to mend"):
        Finding("machine", "Python", Verdict.FAILED, "3.9")


@pytest.mark.parametrize(
    ("version", "expected"),
    [("3.5.13", (3, 5, 13)), ("1.10rc1", (1, 10)), ("7", (7,)), ("2.0.post1", (2, 0)), ("x", ())],
)
def test_versions_are_compared_by_their_numbers(version: str, expected: tuple[int, ...]) -> None:
    assert machine.numbers(version) == expected


def test_a_package_that_is_missing_or_too_old_is_named() -> None:
    (finding,) = machine.packages(["no-such-package>=1", "pytest>=900", "aiohttp>=3; extra=='x'"])
    assert finding.verdict is Verdict.FAILED
    assert "no-such-package is missing" in finding.found
    assert "older than 900" in finding.found


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1024, Verdict.WARNING),
        (18_511, Verdict.WARNING),
        (18_512, Verdict.GOOD),
        (resource.RLIM_INFINITY, Verdict.GOOD),
    ],
)
def test_an_edge_needs_a_file_for_every_connection(limit: int, expected: Verdict) -> None:
    assert machine.open_files(limit, 18_000).verdict is expected


def test_the_smaller_of_memory_and_its_limit_counts(tmp_path: Path) -> None:
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text("MemTotal: 9000000 kB\nMemAvailable: 4096000 kB\n")
    assert machine.memory(meminfo, limit).found == "4,000 MiB to be had"
    limit.write_text("max\n")
    assert machine.memory(meminfo, limit).verdict is Verdict.GOOD
    limit.write_text(f"{256 * 1024 * 1024}\n")
    assert machine.memory(meminfo, limit).verdict is Verdict.WARNING


def test_a_short_accept_queue_is_told(tmp_path: Path) -> None:
    (tmp_path / "somaxconn").write_text("128\n")
    assert machine.backlog(tmp_path / "somaxconn").verdict is Verdict.WARNING
    (tmp_path / "somaxconn").write_text("4096\n")
    assert machine.backlog(tmp_path / "somaxconn").verdict is Verdict.GOOD


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("nfs4", Verdict.FAILED), ("tmpfs", Verdict.WARNING), ("ext4", Verdict.GOOD)],
)
def test_a_store_belongs_on_a_disk_of_this_machine(
    tmp_path: Path, kind: str, expected: Verdict
) -> None:
    mounts = f"disk / ext4 rw 0 0\nother {tmp_path}/elsewhere nfs rw 0 0\nit {tmp_path} {kind} rw\n"
    finding = files.filesystem(tmp_path / "data", mounts)
    assert finding.verdict is expected
    assert finding.found.startswith(kind)


@pytest.mark.parametrize(
    ("mib", "expected"), [(63, Verdict.FAILED), (500, Verdict.WARNING), (9000, Verdict.GOOD)]
)
def test_little_room_is_told_before_there_is_none(mib: int, expected: Verdict) -> None:
    assert files.room(mib * 1024 * 1024).verdict is expected


def test_a_store_that_is_no_database_is_broken(tmp_path: Path) -> None:
    (tmp_path / "events.db").write_bytes(b"not a database" * 100)
    finding = files.store(tmp_path / "events.db", running=False)
    assert finding.verdict is Verdict.FAILED
    assert "restore" in finding.mend


@pytest.mark.parametrize(
    ("ahead_ms", "expected"),
    [
        (0, Verdict.GOOD),
        (-400, Verdict.GOOD),
        (700, Verdict.WARNING),
        (-9000, Verdict.FAILED),
    ],
)
def test_a_clock_that_is_wrong_is_told(ahead_ms: int, expected: Verdict) -> None:
    finding = cluster.skew("edge-0", ahead_ms)
    assert finding.verdict is expected
    assert ("behind" in finding.found) is (ahead_ms < -500)


def test_another_version_is_told() -> None:
    assert cluster.version("node-0", "0.0.9", "0.1.0").verdict is Verdict.WARNING
    assert cluster.version("node-0", "0.1.0", "0.1.0").verdict is Verdict.GOOD


def certificate(path: Path, ends: datetime) -> tuple[Path, Path]:
    """A self-signed certificate that begins 90 days before its end, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "etcd")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(ends - timedelta(days=90))
        .not_valid_after(ends)
        .sign(key, hashes.SHA256())
    )
    path.mkdir()
    (path / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (path / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path / "cert.pem", path / "key.pem"


@pytest.mark.parametrize(
    ("days", "expected"),
    [
        (-1, Verdict.FAILED),
        (3, Verdict.WARNING),
        (60, Verdict.GOOD),
        (91, Verdict.FAILED),
    ],
)
def test_the_end_of_a_certificate_is_told_in_time(
    tmp_path: Path, days: int, expected: Verdict
) -> None:
    cert, _ = certificate(tmp_path / "one", NOW + timedelta(days=days))
    assert certificates.lifetime(cert, NOW).verdict is expected


def test_a_certificate_needs_its_own_key(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path / "one", NOW + timedelta(days=60))
    _, other = certificate(tmp_path / "other", NOW + timedelta(days=60))
    assert certificates.pair(cert, key).verdict is Verdict.GOOD
    assert certificates.pair(cert, other).verdict is Verdict.FAILED
    assert certificates.pair(cert, None).verdict is Verdict.FAILED
    assert certificates.pair(cert, cert).verdict is Verdict.FAILED
    assert certificates.pair(cert, tmp_path / "absent").verdict is Verdict.FAILED
