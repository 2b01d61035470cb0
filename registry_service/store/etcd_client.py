"""A thin client of etcd v3: endpoints with failover, deadlines, TLS, authentication.

Every request here may be sent to one endpoint after the other until one answers: reads, and
transactions that are guarded so that a second arrival changes nothing and reads what the first
one did. Nothing else may be sent with it: an answer that is lost says nothing about the request.
Requests ask for a member with a leader (`hasleader`), so that one that is cut off refuses at once
and the next is asked.

It does not know keys or values, does not hedge (leases do), and keeps no request of its own alive
after the caller is gone.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import grpc
from google.protobuf.message import Message

from registry_service.store.etcdpb import steward_etcd_pb2 as pb

ATTEMPT_S = 0.3
"""How long one endpoint has for a small request before the next one is asked."""
READ_ATTEMPT_S = 2.0
"""The same for a page of keys."""
_PAUSE_S = 0.05
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # A member that comes back under its address must be found at once.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
]

Request = TypeVar("Request", bound=Message)
Answer = TypeVar("Answer", bound=Message)
Metadata = tuple[tuple[str, str], ...]


class EtcdError(Exception):
    """etcd answered, and the answer is no: it would be the same from every member."""


class EtcdAway(Exception):
    """No endpoint answered in time: whether the request was carried out is not known."""


class EtcdCompacted(EtcdError):
    """The revision that was asked for is no longer kept."""


@dataclass(frozen=True, slots=True)
class EtcdAccess:
    """Where etcd is, and who asks. Files of `ca`, `cert` and `key` are given by their contents.

    With `ca` (or `cert` and `key`) connections are TLS; with `user` every request carries a token.
    """

    endpoints: tuple[str, ...]
    ca: bytes = b""
    cert: bytes = b""
    key: bytes = field(default=b"", repr=False)
    user: str = ""
    password: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Method(Generic[Request, Answer]):
    """One unary method: its path, and how its answer is read."""

    path: str
    answer: Callable[[bytes], Answer]


RANGE: Method[pb.RangeRequest, pb.RangeResponse] = Method(
    "/etcdserverpb.KV/Range", pb.RangeResponse.FromString
)
TXN: Method[pb.TxnRequest, pb.TxnResponse] = Method(
    "/etcdserverpb.KV/Txn", pb.TxnResponse.FromString
)
COMPACT: Method[pb.CompactionRequest, pb.CompactionResponse] = Method(
    "/etcdserverpb.KV/Compact", pb.CompactionResponse.FromString
)
LEASE_GRANT: Method[pb.LeaseGrantRequest, pb.LeaseGrantResponse] = Method(
    "/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantResponse.FromString
)
LEASE_REVOKE: Method[pb.LeaseRevokeRequest, pb.LeaseRevokeResponse] = Method(
    "/etcdserverpb.Lease/LeaseRevoke", pb.LeaseRevokeResponse.FromString
)
STATUS: Method[pb.StatusRequest, pb.StatusResponse] = Method(
    "/etcdserverpb.Maintenance/Status", pb.StatusResponse.FromString
)
_AUTHENTICATE: Method[pb.AuthenticateRequest, pb.AuthenticateResponse] = Method(
    "/etcdserverpb.Auth/Authenticate", pb.AuthenticateResponse.FromString
)
KEEP_ALIVE = "/etcdserverpb.Lease/LeaseKeepAlive"
WATCH = "/etcdserverpb.Watch/Watch"

# The same request may succeed elsewhere, or later. RESOURCE_EXHAUSTED is also a full quota: what
# waits goes on when an operator has made room.
_ELSEWHERE = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
    }
)
# Words of etcd's errors after which a new token helps.
_STALE_TOKENS = ("invalid auth token", "revision of auth store is old")


class Member:
    """One endpoint: its channel, and the token that it was given."""

    def __init__(self, access: EtcdAccess, endpoint: str) -> None:
        self.endpoint = endpoint
        if access.ca or access.cert:
            credentials = grpc.ssl_channel_credentials(
                access.ca or None, access.key or None, access.cert or None
            )
            self.channel = grpc.aio.secure_channel(endpoint, credentials, options=_OPTIONS)
        else:
            self.channel = grpc.aio.insecure_channel(endpoint, options=_OPTIONS)
        self._access = access
        self._token: str | None = None
        self._renewing = asyncio.Lock()

    async def metadata(self, timeout_s: float) -> Metadata:
        """What every call carries. Raises AioRpcError when no token can be had."""
        if not self._access.user:
            return (("hasleader", "true"),)
        async with self._renewing:
            if self._token is None:
                request = pb.AuthenticateRequest(
                    name=self._access.user, password=self._access.password
                )
                answer = await self._unary(_AUTHENTICATE, request, timeout_s, ())
                self._token = answer.token
            return (("hasleader", "true"), ("token", self._token))

    def forget_token(self) -> None:
        """It is over, or was made before users and roles changed."""
        self._token = None

    async def call(
        self, method: Method[Request, Answer], request: Request, timeout_s: float
    ) -> Answer:
        """One attempt, and one more with a new token. Raises AioRpcError."""
        metadata = await self.metadata(timeout_s)
        try:
            return await self._unary(method, request, timeout_s, metadata)
        except grpc.aio.AioRpcError as error:
            if not token_is_stale(error):
                raise
            self.forget_token()
        return await self._unary(method, request, timeout_s, await self.metadata(timeout_s))

    async def _unary(
        self, method: Method[Request, Answer], request: Request, timeout_s: float, meta: Metadata
    ) -> Answer:
        call = self.channel.unary_unary(
            method.path,
            request_serializer=_serialize,
            response_deserializer=method.answer,
        )
        answer: Awaitable[Answer] = call(request, timeout=timeout_s, metadata=meta)
        return await answer


class EtcdClient:
    """All endpoints of one etcd. Used on one event loop; `close` ends the connections."""

    def __init__(self, access: EtcdAccess) -> None:
        self.members = [Member(access, endpoint) for endpoint in access.endpoints]
        self._current = 0

    @property
    def current(self) -> Member:
        """The endpoint that answered last, or that is to be asked next."""
        return self.members[self._current]

    def turn_from(self, member: Member) -> None:
        """This one does not answer: the next is asked first from now on."""
        if self.current is member:
            self._current = (self._current + 1) % len(self.members)

    async def call(
        self,
        method: Method[Request, Answer],
        request: Request,
        *,
        within_s: float,
        attempt_s: float = ATTEMPT_S,
    ) -> Answer:
        """Ask one endpoint after the other until one answers.

        Raises EtcdError for a refusal that holds everywhere, EtcdAway after `within_s`.
        """
        until = time.monotonic() + within_s
        why = "no time"
        tried = 0
        while (left := until - time.monotonic()) > 0:
            member = self.current
            try:
                return await member.call(method, request, min(attempt_s, left))
            except grpc.aio.AioRpcError as error:
                refusal = refusal_of(error)
                if refusal is not None:
                    raise refusal from None
                why = f"{member.endpoint}: {error.code().name}: {error.details()}"
            self.turn_from(member)
            tried += 1
            if tried % len(self.members) == 0:
                await asyncio.sleep(min(_PAUSE_S, max(0.0, until - time.monotonic())))
        raise EtcdAway(f"etcd does not answer ({why})")

    async def close(self) -> None:
        """End all connections. Safe to call twice."""
        for member in self.members:
            await member.channel.close()


def refusal_of(error: grpc.aio.AioRpcError) -> EtcdError | None:
    """What an error of a call means for the request: None when another endpoint may do better."""
    if error.code() in _ELSEWHERE or token_is_stale(error):
        return None
    text = f"etcd refuses: {error.code().name}: {error.details()}"
    if error.code() is grpc.StatusCode.OUT_OF_RANGE:
        # A future revision is one that this member has not heard of yet.
        future = "future revision" in (error.details() or "")
        return None if future else EtcdCompacted(text)
    return EtcdError(text)


def token_is_stale(error: grpc.aio.AioRpcError) -> bool:
    """Whether the call failed because of its token alone."""
    details = error.details() or ""
    return any(words in details for words in _STALE_TOKENS)


def prefix_end(prefix: bytes) -> bytes:
    """The first key after all that begin with `prefix`, which must not end in 0xff."""
    return prefix[:-1] + bytes((prefix[-1] + 1,))


def put(key: bytes, value: bytes, lease: int = 0) -> pb.RequestOp:
    return pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease))


def delete(key: bytes, end: bytes = b"") -> pb.RequestOp:
    return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key, range_end=end))


def read(key: bytes) -> pb.RequestOp:
    return pb.RequestOp(request_range=pb.RangeRequest(key=key))


def in_turn(operations: Sequence[pb.RequestOp]) -> pb.RequestOp:
    """Operations as one: a transaction in the transaction, without a condition of its own."""
    return pb.RequestOp(request_txn=pb.TxnRequest(success=operations))


def is_made_at(key: bytes, revision: int) -> pb.Compare:
    """The key was created at this revision; 0: it is not there."""
    return pb.Compare(target=pb.Compare.CREATE, key=key, create_revision=revision)


def has_value(key: bytes, value: bytes) -> pb.Compare:
    return pb.Compare(target=pb.Compare.VALUE, key=key, value=value)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
