"""Ownership faults, planted for real into an in-process cluster: what a census must find.

Each takes a cluster and an edge at which the user is attached, and makes one part of them hold, or
forget, what it must not: by the ways that a bug or a restored backup would, past the guards. What
is planted lasts until the cluster ends. For tests alone.
"""

from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType

from agent_service.core.commands import Fence
from agent_service.core.journal import Seal
from agent_service.log.memory import MemoryLog
from steward.model.keys import Epoch, UserKey
from steward.model.placement import Placement
from steward.model.violations import ViolationKind
from steward.testing.cluster import EdgeProbe, InProcessCluster, NodeUnderTest
from steward.testing.waiting import eventually

Plant = Callable[[InProcessCluster, EdgeProbe, UserKey], Awaitable[frozenset[ViolationKind]]]
"""Plants a fault of this user; what a census must find after it, and nothing else."""

_K = ViolationKind


def other_node(cluster: InProcessCluster, placement: Placement) -> NodeUnderTest:
    """A node that the placement is not on."""
    return next(node for node in cluster.nodes.values() if node.name != placement.node_id)


async def duplicate(
    cluster: InProcessCluster, edge: EdgeProbe, user: UserKey
) -> frozenset[ViolationKind]:
    """Another node believes in a placement that nobody made, and makes a manager of it."""
    real = edge.placements[user]
    rogue = other_node(cluster, real)
    forged = Placement(user, Epoch(real.epoch + 1000), *rogue.incarnation, rogue.address)
    rogue.host.granted([forged])
    await cluster.edge("edge-of-the-rogue").attach(user, placement=forged)
    return frozenset({_K.DUPLICATE_MANAGER, _K.MISATTACHED_EDGE})


async def hidden_duplicate(
    cluster: InProcessCluster, edge: EdgeProbe, user: UserKey
) -> frozenset[ViolationKind]:
    """A node's own table forgets a manager that lives on, and the user gets another one."""
    real = edge.placements[user]
    node = cluster.node_of(real)
    node.lost_sight_of.append(node.host._live.pop(user))
    node.release(user, real.epoch, "forgotten")
    del edge.attached[user]
    await eventually(lambda: cluster.ledger("release", user), "it is released")
    await edge.attach(user)
    return frozenset({_K.DUPLICATE_MANAGER})


async def orphan(
    cluster: InProcessCluster, edge: EdgeProbe, user: UserKey
) -> frozenset[ViolationKind]:
    """The placement goes, behind the node's back, and the manager stays."""
    real = edge.placements[user]
    cluster.node_of(real).release(user, real.epoch, "by nobody")
    return frozenset({_K.ORPHAN_MANAGER, _K.MISATTACHED_EDGE})


async def stale(
    cluster: InProcessCluster, edge: EdgeProbe, user: UserKey
) -> frozenset[ViolationKind]:
    """The log has sealed a later epoch than the manager's, and the manager does not know."""
    await cluster.log.seal(Seal(user, Epoch(edge.placements[user].epoch + 50), "other"))
    return frozenset({_K.STALE_MANAGER})


async def unsealed(
    cluster: InProcessCluster, edge: EdgeProbe, user: UserKey
) -> frozenset[ViolationKind]:
    """The log forgets that it sealed this epoch: it was put back to a time before."""
    assert isinstance(cluster.log, MemoryLog)
    stream = cluster.log.state._streams[user]
    stream.fence = Epoch(stream.fence - 1)
    return frozenset({_K.UNSEALED_MANAGER})


async def unreachable(
    cluster: InProcessCluster, edge: EdgeProbe, user: UserKey
) -> frozenset[ViolationKind]:
    """A manager is dropped without a word; its epoch is spent, so it is never made again."""
    host = cluster.node_of(edge.placements[user]).host
    host._live.pop(user).handle(0, Fence(Epoch(0)), 0)
    del edge.attached[user]
    return frozenset({_K.UNREACHABLE_USER})


async def misattached(
    cluster: InProcessCluster, edge: EdgeProbe, user: UserKey
) -> frozenset[ViolationKind]:
    """An edge did not hear of a move."""
    before = edge.attached[user]
    placed = await cluster.move(user)
    await cluster.edge("edge-that-heard").attach(user, placement=placed)
    edge.attached[user] = before
    return frozenset({_K.MISATTACHED_EDGE})


PLANTS: Mapping[str, Plant] = MappingProxyType(
    {
        plant.__name__: plant
        for plant in (
            duplicate,
            hidden_duplicate,
            orphan,
            stale,
            unsealed,
            unreachable,
            misattached,
        )
    }
)
