"""The thin client against real members: failover, TLS, users and roles, tokens, leases."""

import asyncio
import datetime
import ipaddress
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from registry_service.core.transactions import PlaceUser
from registry_service.store.etcd import EtcdStore
from registry_service.store.etcd_client import (
    RANGE,
    TXN,
    EtcdAccess,
    EtcdAway,
    EtcdClient,
    EtcdCompacted,
    EtcdError,
    is_made_at,
    put,
    read,
)
from registry_service.store.etcd_lease import grant, new_lease, renew, revoke
from registry_service.store.etcdpb import steward_etcd_pb2 as pb
from steward.model.keys import UserKey
from steward.runtime.clock import boot_ms, wall_ms
from steward.runtime.service import EnvironmentUnusable
from steward.testing.etcd import EtcdCluster, missing
from steward.testing.etcd_life import committed, join, place
from steward.testing.proxy import CutProxy

pytestmark = pytest.mark.asyncio

ANN = UserKey("acme", "ann")


@pytest_asyncio.fixture
async def client(etcd: EtcdCluster) -> AsyncIterator[EtcdClient]:
    opened = EtcdClient(EtcdAccess(etcd.endpoints))
    yield opened
    await opened.close()


def make_once(key: bytes, value: bytes) -> pb.TxnRequest:
    return pb.TxnRequest(
        compare=[is_made_at(key, 0)], success=[put(key, value)], failure=[read(key)]
    )


async def test_a_guarded_transaction_that_is_sent_twice_reads_what_the_first_did(
    client: EtcdClient,
) -> None:
    request = make_once(b"twice", b"one")
    assert (await client.call(TXN, request, within_s=5)).succeeded
    again = await client.call(TXN, request, within_s=5)
    assert not again.succeeded
    assert again.responses[0].response_range.kvs[0].value == b"one"


async def test_a_member_that_does_not_answer_costs_one_attempt(own_etcd: EtcdCluster) -> None:
    client = EtcdClient(EtcdAccess(own_etcd.endpoints))
    await client.call(TXN, make_once(b"a", b"1"), within_s=5)
    leader = own_etcd.leader()
    follower = next(each for each in own_etcd.members if each is not leader)
    while client.current.endpoint != follower.endpoint:
        client.turn_from(client.current)
    follower.signal(signal.SIGSTOP)
    clock = asyncio.get_running_loop().time
    began = clock()
    await client.call(TXN, make_once(b"b", b"1"), within_s=5)
    assert clock() - began < 2
    # And the next none: another is asked first from then on.
    assert client.current.endpoint != follower.endpoint
    await client.close()


async def test_no_endpoint_at_all_is_told_after_the_time_that_was_given() -> None:
    client = EtcdClient(EtcdAccess(("127.0.0.1:1", "127.0.0.1:2")))
    with pytest.raises(EtcdAway, match="does not answer"):
        await client.call(RANGE, pb.RangeRequest(key=b"a"), within_s=0.5)
    await client.close()


async def test_a_compacted_revision_is_refused_as_such(
    etcd: EtcdCluster, client: EtcdClient
) -> None:
    for number in range(3):
        etcd.control("put", "compacted", str(number))
    now = (await client.call(RANGE, pb.RangeRequest(key=b"compacted"), within_s=5)).header.revision
    etcd.control("compact", str(now))
    with pytest.raises(EtcdCompacted):
        await client.call(RANGE, pb.RangeRequest(key=b"compacted", revision=now - 1), within_s=5)


async def test_a_lease_is_granted_once_renewed_by_any_member_and_gone_when_revoked(
    etcd: EtcdCluster, client: EtcdClient
) -> None:
    lease = new_lease()
    await grant(client, lease, 5, 5)
    await grant(client, lease, 5, 5)
    assert await renew(client, lease) is True
    async with CutProxy(etcd.endpoints[0]) as first, CutProxy(etcd.endpoints[1]) as second:
        hedged = EtcdClient(EtcdAccess((first.address, second.address, etcd.endpoints[2])))
        first.cut()
        second.cut()
        assert await renew(hedged, lease) is True
        await hedged.close()
    await revoke(client, lease, 5)
    assert await renew(client, lease) is False
    away = EtcdClient(EtcdAccess(("127.0.0.1:1",)))
    assert await renew(away, lease) is None
    await away.close()


# TLS


class Authority:
    """Signs certificates for this machine; files are in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("test authority")
        certificate = self._sign(self._name, self._key.public_key(), authority=True)
        self.ca = self._write("ca.crt", certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str) -> tuple[Path, Path]:
        """Files of certificate and key."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(_name(name), key.public_key(), authority=False)
        secret = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        public = certificate.public_bytes(serialization.Encoding.PEM)
        return self._write(f"{name}.crt", public), self._write(f"{name}.key", secret)

    def _sign(
        self, name: x509.Name, key: ec.EllipticCurvePublicKey, *, authority: bool
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )

    def _write(self, name: str, content: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(content)
        return path


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


async def test_a_store_is_reached_by_tls_with_certificates_of_both_sides(
    tmp_path: Path, cluster_name: str
) -> None:
    if why := missing():
        pytest.skip(why)
    authority = Authority(tmp_path)
    server, client = authority.issue("server"), authority.issue("client")
    options = [
        f"--cert-file={server[0]}",
        f"--key-file={server[1]}",
        "--client-cert-auth",
        f"--trusted-ca-file={authority.ca}",
    ]
    with EtcdCluster(tmp_path / "etcd", 1, options, tls=True) as etcd:
        ca, cert, key = (path.read_bytes() for path in (authority.ca, *client))
        store = _store(EtcdAccess(etcd.endpoints, ca, cert, key), cluster_name, tmp_path / "a")
        await store.open()
        assert (await place(store, ANN, await join(store))).epoch > 0
        await store.close()
        # Without a certificate of its own nobody is let in.
        nobody = EtcdClient(EtcdAccess(etcd.endpoints, ca))
        with pytest.raises(EtcdAway):
            await nobody.call(RANGE, pb.RangeRequest(key=b"a"), within_s=1)
        await nobody.close()
        # Nor does this side talk to one that its authority does not know.
        (tmp_path / "other").mkdir()
        other = Authority(tmp_path / "other").ca.read_bytes()
        deceived = EtcdClient(EtcdAccess(etcd.endpoints, other, cert, key))
        with pytest.raises(EtcdAway):
            await deceived.call(RANGE, pb.RangeRequest(key=b"a"), within_s=1)
        await deceived.close()


# Users and roles


def _store(access: EtcdAccess, cluster: str, home: Path) -> EtcdStore:
    return EtcdStore(access, cluster, home, wall_ms, boot_ms)


def _use_users(etcd: EtcdCluster) -> None:
    etcd.control("user", "add", "root:secret")
    etcd.control("user", "grant-role", "root", "root")
    etcd.control("role", "add", "steward")
    etcd.control("role", "grant-permission", "steward", "--prefix=true", "readwrite", "/steward/")
    etcd.control("user", "add", "registry:word")
    etcd.control("user", "grant-role", "registry", "steward")
    etcd.control("auth", "enable")
    etcd.use_control("--user=root:secret")


async def test_a_user_with_a_role_for_the_keys_is_enough_and_tokens_are_renewed(
    own_etcd: EtcdCluster, cluster_name: str, tmp_path: Path
) -> None:
    _use_users(own_etcd)
    access = EtcdAccess(own_etcd.endpoints, user="registry", password="word")
    store = _store(access, cluster_name, tmp_path / "a")
    await store.open()
    opening = _store(access, cluster_name, tmp_path / "b")
    standing_by = asyncio.create_task(opening.open())
    node = await join(store)
    # Permissions change: every token that was given before is refused.
    own_etcd.control("user", "add", "another:word")
    await place(store, ANN, node)
    # Members forget the tokens that they gave when they start again.
    for member in own_etcd.members:
        member.kill()
        own_etcd.restart(member)
        # Not on the loop, where the leader has a lease to renew.
        await asyncio.to_thread(own_etcd.wait_healthy)
    for number in range(5):
        await committed(store, PlaceUser(UserKey("acme", f"u{number}"), node, "resolve"))
    await store.close()
    view = await asyncio.wait_for(standing_by, 10)
    assert view.placements == ((node, 6),)
    await opening.close()


async def test_a_wrong_password_or_a_missing_role_is_told_at_the_start(
    own_etcd: EtcdCluster, cluster_name: str, tmp_path: Path
) -> None:
    _use_users(own_etcd)
    own_etcd.control("user", "add", "guest:word")
    for user, password, why in (
        ("registry", "wrong", "authentication failed"),
        ("guest", "word", "permission denied"),
        ("", "", "user name is empty"),
    ):
        access = EtcdAccess(own_etcd.endpoints, user=user, password=password)
        with pytest.raises(EnvironmentUnusable, match=why):
            await asyncio.wait_for(_store(access, cluster_name, tmp_path / "a").open(), 10)
    client = EtcdClient(EtcdAccess(own_etcd.endpoints, user="guest", password="word"))
    with pytest.raises(EtcdError, match="permission denied"):
        await client.call(RANGE, pb.RangeRequest(key=b"a"), within_s=5)
    await client.close()
