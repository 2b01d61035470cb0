"""Who may call what between services: short-lived role tokens, checked on every call, default deny.

Each process mints its own role token with the cluster's control key
(`<data>/keys/control.key`, mode 0600) and sends it as `authorization: Bearer`; servers
check signature, audience, cluster, expiry and the method's table of roles, on loopback
as well. It guards against strangers on the machine's ports, not against somebody who
can read the key. Mutual TLS will replace it.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import grpc
import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from steward.errors import Reason, StewardError
from steward.rpc.status import abort

AUDIENCE = "steward-control"
ALGORITHM = "EdDSA"
LIFETIME_S = 300
MOST_CACHED = 1024
FIRST_MESSAGE_S = 1.0
"""How long a refused stream is waited for to say its first message."""


class Role(StrEnum):
    """What a process is."""

    REGISTRY = "registry"
    AUTH = "auth"
    LOG = "log"
    AGENT = "agent"
    EDGE = "edge"
    OPERATOR = "operator"


@dataclass(slots=True)
class RoleCredentials:
    """Mints role tokens for one process, a new one when half of its life is over."""

    key: Ed25519PrivateKey
    role: Role
    cluster: str
    subject: str
    _token: str = ""
    _renew_at: float = 0.0

    def token(self) -> str:
        now = time.time()
        if now >= self._renew_at:
            claims = {
                "aud": AUDIENCE,
                "role": self.role.value,
                "cluster": self.cluster,
                "sub": self.subject,
                "iat": int(now),
                "exp": int(now) + LIFETIME_S,
            }
            self._token = jwt.encode(claims, self.key, algorithm=ALGORITHM)
            self._renew_at = now + LIFETIME_S / 2
        return self._token


class ForeignCluster(StewardError):
    """A token that is good, but of another cluster. `who` is `role:subject` as it says."""

    def __init__(self, ours: str, theirs: str, who: str) -> None:
        super().__init__(Reason.PERMISSION_DENIED, f"this is cluster {ours!r}; check --cluster")
        self.theirs = theirs
        self.who = who


class RoleVerifier:
    """Checks role tokens; remembers good ones until they expire (bounded)."""

    def __init__(self, key: Ed25519PrivateKey, cluster: str) -> None:
        self._public = key.public_key()
        self._cluster = cluster
        self._good: dict[str, tuple[float, Role]] = {}

    def role_of(self, token: str) -> Role:
        """The role of a valid token. Raises StewardError(PERMISSION_DENIED)."""
        now = time.time()
        known = self._good.get(token)
        if known is not None and known[0] > now:
            return known[1]
        try:
            claims = jwt.decode(
                token,
                self._public,
                algorithms=[ALGORITHM],
                audience=AUDIENCE,
                options={"require": ["exp", "aud", "role", "cluster"]},
            )
            role = Role(claims["role"])
        except (jwt.PyJWTError, ValueError):
            raise StewardError(
                Reason.PERMISSION_DENIED, "no valid role token; use the cluster's control key"
            ) from None
        if claims["cluster"] != self._cluster:
            who = f"{role}:{claims.get('sub', '')}"
            raise ForeignCluster(self._cluster, str(claims["cluster"]), who)
        if len(self._good) >= MOST_CACHED:
            self._good.clear()
        self._good[token] = (float(claims["exp"]), role)
        return role


def caller_of(context: Any) -> str:
    """`role:subject` of a call that passed the RoleInterceptor; that alone made it trustworthy."""
    metadata = dict(context.invocation_metadata() or ())
    token = str(metadata.get("authorization", "")).removeprefix("Bearer ")
    try:
        claims = jwt.decode(token, options={"verify_signature": False})
    except jwt.PyJWTError:
        raise StewardError(Reason.PERMISSION_DENIED, "no role token") from None
    return f"{claims.get('role', '')}:{claims.get('sub', '')}"


class RoleInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls whose role is not in the method's row; no row, no caller.

    `on_foreign` is told of each good token of another cluster; it must not wait or raise.
    """

    def __init__(
        self,
        verifier: RoleVerifier,
        allowed: Mapping[str, frozenset[Role]],
        on_foreign: Callable[[ForeignCluster], None] | None = None,
    ) -> None:
        self._verifier = verifier
        self._allowed = allowed
        self._on_foreign = on_foreign

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        metadata = dict(handler_call_details.invocation_metadata or ())
        header = metadata.get("authorization", "")
        try:
            role = self._verifier.role_of(str(header).removeprefix("Bearer "))
            if role not in self._allowed.get(method, frozenset()):
                raise StewardError(Reason.PERMISSION_DENIED, f"role {role} may not call {method}")
        except StewardError as error:
            if isinstance(error, ForeignCluster) and self._on_foreign is not None:
                self._on_foreign(error)
            return _refuser(handler, error)
        return handler


def _refuser(
    handler: "grpc.RpcMethodHandler[Any, Any] | None", error: StewardError
) -> "grpc.RpcMethodHandler[Any, Any]":
    """A handler of the same shape that ends every call with `error`."""

    async def refuse(_: object, context: Any) -> Any:
        await abort(context, error)

    async def refuse_stream(requests: Any, context: Any) -> Any:
        # A client whose first write meets a call that has ended sees that, and not why.
        if handler is not None and handler.request_streaming:
            try:
                await asyncio.wait_for(anext(aiter(requests)), FIRST_MESSAGE_S)
            except (TimeoutError, StopAsyncIteration):
                pass
        await abort(context, error)
        yield  # pragma: no cover: makes this an async generator

    if handler is not None and handler.response_streaming:
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(refuse_stream)
        return grpc.unary_stream_rpc_method_handler(refuse_stream)
    if handler is not None and handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(refuse)
    return grpc.unary_unary_rpc_method_handler(refuse)
