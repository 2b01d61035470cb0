"""Waiting to be the one registry process that writes, with all that the store holds in memory.

Any number of processes may be started; one leads, the others follow the store by watch and are
ready when its key goes. The key of the leader is bound to a lease that only the leader renews. It
goes when that process stops, when the lease is over, or when a process that has the same data
directory (and its lock) finds the key of the one before it, which is therefore dead.

Being the leader by this key is never what makes a write safe: each transaction compares it.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from registry_service.store.etcd_client import (
    TXN,
    EtcdAway,
    EtcdClient,
    EtcdCompacted,
    delete,
    is_made_at,
    prefix_end,
    put,
    read,
)
from registry_service.store.etcd_keys import Keys
from registry_service.store.etcd_lease import grant, new_lease, revoke
from registry_service.store.etcd_state import State
from registry_service.store.etcd_watch import follow, list_range
from registry_service.store.etcdpb import steward_etcd_pb2 as pb
from steward.telemetry.logs import fields

LEADER_TTL_S = 5
"""Out of the box. A shorter one is followed sooner, and lost sooner when etcd or a machine is slow.
etcd itself grants none below one and a half times its election timeout."""
_WAIT_S = 5.0
_PAUSE_S = 0.2
_CATCH_UP_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lead:
    """This process leads: its key was made at this revision, and is bound to this lease.

    `asked_ms` is when the lease was asked for: it lasts for `ttl_s` at least from then.
    """

    made_at: int
    lease: int
    asked_ms: int
    ttl_s: int


class Follower:
    """The contents of the store, listed and then followed. `run` it as a task."""

    def __init__(self, client: EtcdClient, keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._changed = asyncio.Condition()
        self.state = State(keys)
        # 0: nothing is known yet.
        self.revision = 0
        self.leader: pb.KeyValue | None = None

    async def run(self) -> None:
        """Without end. Raises EtcdError when etcd refuses."""
        while True:
            try:
                await self.list()
                prefix = self._keys.prefix
                changes = follow(self._client, prefix, prefix_end(prefix), self.revision)
                async for each in changes:
                    for event in each.events:
                        self._take(event)
                    await self._move_to(each.revision)
            except EtcdCompacted:
                _log.warning("etcd has compacted what this process would follow: listing anew")
            except EtcdAway as error:
                _log.warning("waiting for etcd", extra=fields(cause=str(error)))
                await asyncio.sleep(_PAUSE_S)

    async def until(self, holds: Callable[[], bool], within_s: float) -> bool:
        """Wait for a change after which this holds; whether it did within that time."""
        try:
            async with asyncio.timeout(within_s), self._changed:
                await self._changed.wait_for(holds)
        except TimeoutError:
            return False
        return True

    async def list(self) -> None:
        """Read all of it, as of one revision. Raises EtcdError, EtcdAway."""
        keys, client = self._keys, self._client
        state, leader = State(keys), None
        revision = 0
        # Rows of the ledger are no part of the state, and of violations only the numbers are.
        parts = (
            (keys.prefix, keys.ledger, False),
            (prefix_end(keys.ledger), keys.violations, False),
            (keys.violations, prefix_end(keys.violations), True),
        )
        for start, end, keys_only in parts:
            pages = list_range(
                client, start, end, revision=revision, keys_only=keys_only, within_s=_WAIT_S
            )
            async for page in pages:
                revision = revision or page.header.revision
                for kv in page.kvs:
                    if kv.key == keys.leader:
                        leader = kv
                    else:
                        state.load(kv.key, kv.value, kv.lease)
        self.state, self.leader = state, leader
        await self._move_to(revision)

    def _take(self, event: pb.Event) -> None:
        kv = event.kv
        gone = event.type == pb.Event.DELETE
        if kv.key == self._keys.leader:
            self.leader = None if gone else kv
        elif gone:
            self.state.unload(kv.key)
        else:
            self.state.load(kv.key, kv.value, kv.lease)

    async def _move_to(self, revision: int) -> None:
        async with self._changed:
            self.revision = revision
            self._changed.notify_all()


async def stand_by(
    client: EtcdClient,
    keys: Keys,
    who: dict[str, Any],
    clock_ms: Callable[[], int],
    ttl_s: int = LEADER_TTL_S,
) -> tuple[Lead, State | None]:
    """Wait until this process leads; then what the store holds, if following it has told that.

    `who` is kept in the leader's key; its `home` names a data directory that only this process
    uses. Raises EtcdError when etcd refuses.
    """
    follower = Follower(client, keys)
    following = asyncio.create_task(follower.run(), name="etcd-follower")
    leading = asyncio.create_task(_lead(client, keys, follower, who, clock_ms, ttl_s))
    try:
        await asyncio.wait({following, leading}, return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            following.result()
        lead = leading.result()
        caught_up = await follower.until(lambda: follower.revision >= lead.made_at, _CATCH_UP_S)
        if caught_up and follower.state.whole:
            return lead, follower.state
        _log.warning("what was followed is not what is in the store: listing it")
        return lead, None
    finally:
        tasks = {following, leading}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.exception()


async def _lead(
    client: EtcdClient,
    keys: Keys,
    follower: Follower,
    who: dict[str, Any],
    clock_ms: Callable[[], int],
    ttl_s: int,
) -> Lead:
    while True:
        if not await follower.until(lambda: follower.revision > 0, _WAIT_S):
            continue
        leader = follower.leader
        if leader is not None and orjson.loads(leader.value).get("home") == who["home"]:
            await _clear(client, keys, leader)
        elif leader is not None:
            _log.info("standing by", extra=fields(leader=leader.value.decode(errors="replace")))
        while not await follower.until(lambda: follower.leader is None, _WAIT_S):
            pass
        try:
            lead = await take_lead(client, keys, who, clock_ms, ttl_s)
        except EtcdAway as error:
            _log.warning("waiting for etcd", extra=fields(cause=str(error)))
            continue
        if lead is not None:
            return lead
        # Another was faster: its key is on its way here.
        await follower.until(lambda: follower.leader is not None, _WAIT_S)


async def listed(client: EtcdClient, keys: Keys) -> State:
    """What the store holds, read by the process that leads, which alone could change it.

    Raises EtcdError, EtcdAway.
    """
    follower = Follower(client, keys)
    await follower.list()
    if not follower.state.whole:
        # By hand, or by another tool. A user who is missing is placed anew, under a higher epoch.
        _log.error(
            "placements are missing in etcd that no registry removed, or too many are there",
            extra=fields(do="see who else writes to this etcd; docs/stores.md tells what follows"),
        )
    return follower.state


async def take_lead(
    client: EtcdClient,
    keys: Keys,
    who: dict[str, Any],
    clock_ms: Callable[[], int],
    ttl_s: int = LEADER_TTL_S,
) -> Lead | None:
    """Make the leader's key, unless it is there. Sent twice it finds its own."""
    lease, asked_ms = new_lease(), clock_ms()
    await grant(client, lease, ttl_s, _WAIT_S)
    request = pb.TxnRequest(
        compare=[is_made_at(keys.leader, 0)],
        success=[put(keys.leader, orjson.dumps(who), lease)],
        failure=[read(keys.leader)],
    )
    answer = await client.call(TXN, request, within_s=ttl_s / 2)
    if answer.succeeded:
        return Lead(answer.header.revision, lease, asked_ms, ttl_s)
    kvs = answer.responses[0].response_range.kvs
    if kvs and kvs[0].lease == lease:
        return Lead(kvs[0].create_revision, lease, asked_ms, ttl_s)
    await revoke(client, lease, _WAIT_S)
    return None


async def _clear(client: EtcdClient, keys: Keys, leader: pb.KeyValue) -> None:
    """Remove the key that a process with this data directory left, which is dead."""
    request = pb.TxnRequest(
        compare=[is_made_at(keys.leader, leader.create_revision)], success=[delete(keys.leader)]
    )
    try:
        await client.call(TXN, request, within_s=_WAIT_S)
    except EtcdAway as error:
        _log.warning("waiting for etcd", extra=fields(cause=str(error)))
