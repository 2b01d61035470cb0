"""Leases of etcd: granted, renewed at all endpoints at once, revoked.

The client chooses the number of a lease, so that a grant whose answer was lost can be asked for
again: that it exists already means that it was granted. A renewal goes to every endpoint, and the
first good answer counts: one member that stands still must not cost a lease.
"""

import asyncio
import secrets
from contextlib import suppress

import grpc

from registry_service.store.etcd_client import (
    KEEP_ALIVE,
    LEASE_GRANT,
    LEASE_REVOKE,
    EtcdAway,
    EtcdClient,
    EtcdError,
    Member,
)
from registry_service.store.etcdpb import steward_etcd_pb2 as pb

RENEWAL_S = 0.5
"""How long an endpoint has for a renewal."""


def new_lease() -> int:
    """A number that no lease has."""
    return secrets.randbits(62) | 1


async def grant(client: EtcdClient, lease: int, ttl_s: int, within_s: float) -> None:
    """Have this lease be there. Raises EtcdError, EtcdAway."""
    request = pb.LeaseGrantRequest(TTL=ttl_s, ID=lease)
    try:
        answer = await client.call(LEASE_GRANT, request, within_s=within_s)
    except EtcdError as error:
        if "lease already exists" not in str(error):
            raise
        return
    if answer.error:
        raise EtcdError(f"etcd grants no lease: {answer.error}")


async def renew(client: EtcdClient, lease: int) -> bool | None:
    """Whether the lease is renewed: False says that it is gone, None that nobody answered."""
    asked = [asyncio.create_task(_renew_at(member, lease)) for member in client.members]
    gone = False
    try:
        for done in asyncio.as_completed(asked):
            ttl = await done
            if ttl is not None and ttl > 0:
                return True
            gone = gone or ttl is not None
        return False if gone else None
    finally:
        for each in asked:
            each.cancel()
        await asyncio.wait(asked)


async def _renew_at(member: Member, lease: int) -> int | None:
    """Seconds that the lease has from now, as this member says; None without an answer."""
    # InvalidStateError: the call was refused before anything was written.
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.TimeoutError):
        async with asyncio.timeout(RENEWAL_S):
            metadata = await member.metadata(RENEWAL_S)
            stream = member.channel.stream_stream(
                KEEP_ALIVE,
                request_serializer=pb.LeaseKeepAliveRequest.SerializeToString,
                response_deserializer=pb.LeaseKeepAliveResponse.FromString,
            )(metadata=metadata)
            try:
                await stream.write(pb.LeaseKeepAliveRequest(ID=lease))
                answer = await stream.read()
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                # For the next time: streams are not told apart by why they were refused.
                member.forget_token()
                raise
            finally:
                stream.cancel()
            if isinstance(answer, pb.LeaseKeepAliveResponse):
                return int(answer.TTL)
    return None


async def revoke(client: EtcdClient, lease: int, within_s: float) -> None:
    """End a lease and what is bound to it; one that is gone, or can't be reached, ends by time."""
    with suppress(EtcdError, EtcdAway):
        await client.call(LEASE_REVOKE, pb.LeaseRevokeRequest(ID=lease), within_s=within_s)
