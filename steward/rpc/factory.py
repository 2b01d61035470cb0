"""How gRPC servers and channels are made: one place for options, limits and credentials."""

from collections.abc import Callable, Mapping

import grpc

from steward.rpc.roles import (
    ForeignCluster,
    Role,
    RoleCredentials,
    RoleInterceptor,
    RoleVerifier,
)

MAX_MESSAGE_BYTES = 32 * 1024 * 1024

_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # A process that comes back under its old address must be found at once.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Probing for the bandwidth costs a ping and its answer for most messages that come alone, a
    # tenth of what such a message costs; a fixed window is wide enough for what is carried here.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1024 * 1024),
    # Two channels to one address must not share a broken connection's backoff.
    ("grpc.use_local_subchannel_pool", 1),
]


def make_server(
    verifier: RoleVerifier,
    allowed: Mapping[str, frozenset[Role]],
    on_foreign: Callable[[ForeignCluster], None] | None = None,
) -> grpc.aio.Server:
    """A server that checks the role of every call. `allowed`: `/package.Service/Method` → roles.

    `on_foreign` is told of callers whose good token is of another cluster.
    """
    return grpc.aio.server(
        interceptors=[RoleInterceptor(verifier, allowed, on_foreign)],
        options=[*_OPTIONS, ("grpc.so_reuseport", 1)],
    )


def make_channel(address: str) -> grpc.aio.Channel:
    """A channel to `host:port`. Credentials travel per call: `metadata=call_metadata(...)`."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)


def call_metadata(credentials: RoleCredentials) -> tuple[tuple[str, str], ...]:
    """The metadata that every call carries."""
    return (("authorization", f"Bearer {credentials.token()}"),)
