"""A lost node with many users: a `Hub` on peers in memory, and the order of its questions."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from edge.core.commands import SubmitMessage
from edge.core.server_messages import Limits
from edge.host.hub import LOOKUPS_AT_ONCE, Hub, HubSettings
from edge.host.spans import Arrival
from edge.host.wheel import TICK_MS
from edge.uplink.memory import (
    MemoryAuth,
    MemoryCluster,
    MemoryNodes,
    MemoryRegistry,
    MemoryViolations,
)
from steward.model.keys import UserKey
from steward.telemetry.catalog import EdgeMetrics
from steward.telemetry.tracing import Tracing
from steward.testing.waiting import eventually

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def hub() -> AsyncIterator[tuple[Hub, MemoryCluster]]:
    """A running hub, and its cluster with one node."""
    limits = Limits(65_536, 600, 32, 60_000)
    hub = Hub(HubSettings(limits, 100, 1 << 20, 0, 0), EdgeMetrics(CollectorRegistry()), Tracing())
    cluster = MemoryCluster()
    hub.registry, hub.auth = MemoryRegistry(cluster, hub), MemoryAuth()
    hub.nodes, hub.violations = MemoryNodes(cluster, hub), MemoryViolations()
    cluster.add_node("node-1")
    hub.start()
    yield hub, cluster
    await hub.close()


async def test_users_of_a_lost_node_are_looked_up_in_batches_those_who_wait_first(
    hub: tuple[Hub, MemoryCluster],
) -> None:
    edge, cluster = hub
    (node,) = cluster.nodes.values()
    users = [UserKey("default", f"u{n}") for n in range(LOOKUPS_AT_ONCE * 2 + 10)]
    audiences = [edge._audience(user) for user in users]
    for audience in audiences:
        audience.enter()
    await eventually(lambda: all(a.attachment.live_epoch for a in audiences), "all are attached")
    # The last of them has a message without an answer when the node is lost.
    cluster.swallow = lambda command: isinstance(command.body, SubmitMessage)
    outcomes: list[object] = []
    audiences[-1].command(Arrival(), SubmitMessage("m1", b'"x"', "main"), outcomes.append)
    cluster.add_node("node-2")
    cluster.placements.clear()
    asked_before = cluster.resolves
    cluster.fence(node)
    assert next(iter(cluster.placements)) == users[-1]
    assert cluster.resolves - asked_before == LOOKUPS_AT_ONCE
    assert not any(audience.attachment.live_epoch for audience in audiences)
    await eventually(lambda: all(a.attachment.live_epoch for a in audiences), "all are back")
    assert cluster.resolves - asked_before == len(users)
    assert len({audience.attachment.max_epoch for audience in audiences}) == len(users)
    assert TICK_MS * (len(users) // LOOKUPS_AT_ONCE) <= 100, "a few tens of ms for thousands"
