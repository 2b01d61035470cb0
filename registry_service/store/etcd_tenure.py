"""What the leader keeps alive in etcd: its own lease, those of the nodes, and a bounded history.

The tenure of a leader ends 0.9 times to live after the last renewal that was acknowledged was sent,
on a clock that counts time asleep. After that the process says nothing more, whether or not etcd
has ended its lease: whoever leads next counts from that end. A leader's key that is gone though
its lease is there (by hand, or by a copy of this data directory) is noticed with the next renewal.
"""

import asyncio
import logging
from collections.abc import Callable

from registry_service.store.etcd_client import COMPACT, RANGE, EtcdAway, EtcdClient, EtcdError
from registry_service.store.etcd_lease import renew, revoke
from registry_service.store.etcd_standby import Lead
from registry_service.store.etcd_state import State
from registry_service.store.etcdpb import steward_etcd_pb2 as pb
from steward.model.keys import NodeIncarnation
from steward.telemetry.logs import fields

NODES_EVERY_S = 30.0
HISTORY_S = 300.0
_SHORT_S = 1.0

_log = logging.getLogger(__name__)


class Tenure:
    """Renews the lease of the leader. `over` is called once, with the reason, when it has ended."""

    def __init__(
        self,
        client: EtcdClient,
        lead: Lead,
        leader_key: bytes,
        clock_ms: Callable[[], int],
        over: Callable[[str], None],
    ) -> None:
        self._client = client
        self.lease = lead.lease
        self._made_at = lead.made_at
        self._leader_key = leader_key
        self._clock_ms = clock_ms
        self._over = over
        self._ttl_s = lead.ttl_s
        self._until_ms = lead.asked_ms + self._ttl_s * 900
        self._gone = False
        self._renewing = asyncio.create_task(self._renew(), name="etcd-tenure")

    def left_s(self) -> float:
        """Seconds that this process may still be the leader; 0 when it is over."""
        return 0.0 if self._gone else max(0, self._until_ms - self._clock_ms()) / 1000

    async def _renew(self) -> None:
        beginning = asyncio.get_running_loop().time
        while True:
            began, sent_ms = beginning(), self._clock_ms()
            renewed = await renew(self._client, self.lease)
            if renewed:
                self._until_ms = max(self._until_ms, sent_ms + self._ttl_s * 900)
            why = ""
            if renewed is False:
                why = "its lease is gone"
            elif not self.left_s():
                why = "etcd did not renew its lease"
            elif renewed and not await self._is_leader():
                why = "the leader's key is not its own"
            if why:
                self._gone = True
                self._over(f"this process no longer leads: {why}")
                return
            # Without an answer at once: the next may come through, and there is little time.
            pause_s = self._ttl_s / 5 - (beginning() - began) if renewed else 0.05
            await asyncio.sleep(max(0.05, min(pause_s, self.left_s())))

    async def _is_leader(self) -> bool:
        """Whether the leader's key is this process's; without an answer there is no doubt of it.

        Within what is left until the next renewal: a lease matters more.
        """
        request = pb.RangeRequest(key=self._leader_key)
        try:
            answer = await self._client.call(RANGE, request, within_s=self._ttl_s / 10)
        except (EtcdError, EtcdAway):
            return True
        return any(kv.create_revision == self._made_at for kv in answer.kvs)

    async def end(self, *, give_up: bool) -> None:
        """Stop renewing; with `give_up` another may lead at once. Safe to call twice."""
        self._renewing.cancel()
        await asyncio.wait({self._renewing})
        if give_up and not self._gone:
            self._gone = True
            await revoke(self._client, self.lease, _SHORT_S)


class Upkeep:
    """Renews the leases of nodes, and lets etcd forget what nobody needs. `run` it as a task.

    `bind_anew` is called for a node whose lease is gone: it lives, as far as anybody knows, since a
    fence would have taken it out of the state.
    """

    def __init__(
        self,
        client: EtcdClient,
        state: State,
        bind_anew: Callable[[NodeIncarnation], None],
        nodes_every_s: float = NODES_EVERY_S,
    ) -> None:
        self._client = client
        self._state = state
        self._bind_anew = bind_anew
        self._every_s = nodes_every_s

    async def run(self) -> None:
        compact_at, kept = 0.0, 0
        now = asyncio.get_running_loop().time
        while True:
            await self._renew_nodes()
            if now() >= compact_at:
                compact_at, kept = now() + HISTORY_S, await self._compact(kept)
            await asyncio.sleep(self._every_s)

    async def _renew_nodes(self) -> None:
        for node in list(self._state.nodes.values()):
            lease = self._state.leases.get(node.claim.node_id)
            if lease is None or lease in self._state.coming:
                continue
            if await renew(self._client, lease) is False:
                incarnation = node.incarnation
                # It may have been fenced, or bound anew, while this was asked.
                if self._state.leases.get(node.claim.node_id) == lease:
                    lost = fields(node=incarnation.node_id, node_rev=incarnation.node_rev)
                    _log.warning("etcd lost the lease of a node that lives", extra=lost)
                    self._bind_anew(incarnation)

    async def _compact(self, until: int) -> int:
        """Drop the history before this revision (0: none); the revision of now, as far as known."""
        try:
            if until:
                # Sent twice it is refused, which is as good; so it is if somebody went further.
                request = pb.CompactionRequest(revision=until)
                await self._client.call(COMPACT, request, within_s=_SHORT_S)
        except (EtcdError, EtcdAway) as error:
            _log.info("etcd was not compacted", extra=fields(cause=str(error)))
        try:
            head = pb.RangeRequest(key=self._state.head_key, count_only=True)
            answer = await self._client.call(RANGE, head, within_s=_SHORT_S)
        except (EtcdError, EtcdAway):
            return until
        return int(answer.header.revision)
