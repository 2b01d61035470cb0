"""New placements per second on an etcd of three members on this machine.

    .venv/bin/python -m tests.load.etcd_placements [--quick]

Two figures: the store alone, used as the registry uses it (batches of 100 users, two on their way),
and a whole registry process that an edge asks over gRPC. Every answer is durable on a majority, and
checked: each user is placed once, under a number of its own. The three members, the registry, and
this process share the processors of this machine.
"""

import asyncio
import tempfile
import time
from pathlib import Path

import uvloop

from registry_service.core.config import RegistryConfig
from registry_service.core.transactions import (
    Committed,
    JoinNode,
    NodeClaim,
    NodeJoined,
    PlaceUser,
    UserPlaced,
)
from registry_service.store.etcd import EtcdStore
from registry_service.store.etcd_client import EtcdAccess
from steward.model.keys import NodeId, NodeIncarnation, UserKey
from steward.runtime.clock import boot_ms, wall_ms
from steward.testing.etcd import EtcdCluster, missing
from tests.load.alone import run_alone
from tests.load.registry_stand import RegistryStand
from tests.load.rows import Row

GOAL = 5_000
USERS = 20_000
QUICK_USERS = 8_000
NODES = 3


async def _round(store: EtcdStore, nodes: list[NodeIncarnation], first: int, users: int) -> float:
    """Placements per second of users that nobody placed before."""
    config = RegistryConfig()
    waiting = list(range(first, first + users))
    epochs: set[int] = set()

    async def worker() -> None:
        while waiting:
            batch = [waiting.pop() for _ in range(min(config.batch_operations, len(waiting)))]
            outcome = await store.commit(
                tuple(
                    PlaceUser(UserKey("tenant", f"user-{n}"), nodes[n % len(nodes)], "resolve")
                    for n in batch
                )
            )
            assert isinstance(outcome, Committed), outcome
            for result in outcome.results:
                assert isinstance(result, UserPlaced) and result.created, result
                epochs.add(result.placement.epoch)

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(config.batches_in_flight)))
    took = time.perf_counter() - began
    assert len(epochs) == users, "two placements have one number"
    return users / took


async def _measure(endpoints: tuple[str, ...], home: Path, rounds: int, users: int) -> list[float]:
    store = EtcdStore(EtcdAccess(endpoints), "bench", home, wall_ms, boot_ms)
    await store.open()
    try:
        nodes: list[NodeIncarnation] = []
        for number in range(NODES):
            claim = NodeClaim(NodeId(f"n{number}"), "boot", f"nonce-{number}", "127.0.0.1:1")
            outcome = await store.commit((JoinNode(claim),))
            assert isinstance(outcome, Committed)
            (joined,) = outcome.results
            assert isinstance(joined, NodeJoined)
            nodes.append(joined.record.incarnation)
        await _round(store, nodes, 0, 1_000)
        return [
            await _round(store, nodes, 1_000 + number * users, users) for number in range(rounds)
        ]
    finally:
        await store.close()


async def _whole(endpoints: tuple[str, ...], data: Path, rounds: int, users: int) -> list[float]:
    """The same by a process, with its nodes and an edge."""
    store = f"--store=etcd://{','.join(endpoints)}/whole"
    async with RegistryStand(data, store) as stand:
        await stand.resolve(range(1_000))
        values: list[float] = []
        for number in range(rounds):
            first = 1_000 + number * users
            cost = await stand.resolve(range(first, first + users))
            values.append(cost.users / cost.wall_s)
        return values


def figures(rounds: int, quick: bool) -> list[Row]:
    """The row of the benchmark; none where there is no etcd, which is said loudly."""
    why = missing()
    if why:
        print(f"etcd placements: {why}")
        return []
    users = QUICK_USERS if quick else USERS
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        with EtcdCluster(root / "etcd") as etcd:
            alone = uvloop.run(_measure(etcd.endpoints, root / "home", rounds, users))
            whole = uvloop.run(_whole(etcd.endpoints, root / "data", rounds, users))
    return [
        Row("new placements, etcd of three members, store alone", "1/s", alone, GOAL),
        Row("new placements, etcd of three members, whole registry", "1/s", whole, GOAL),
    ]


if __name__ == "__main__":
    run_alone(figures, __doc__)
