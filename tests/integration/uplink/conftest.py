"""Node sessions against a real registry, whose rig is that of the registry's own tests."""

import asyncio
import importlib.util
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

_spec = importlib.util.spec_from_file_location(
    "registry_rig", Path(__file__).parents[1] / "registry" / "conftest.py"
)
assert _spec is not None and _spec.loader is not None
rig = importlib.util.module_from_spec(_spec)
sys.modules["registry_rig"] = rig
_spec.loader.exec_module(rig)

from agent_service.uplink.registry import NodeSession, new_nonce  # noqa: E402
from steward.model.keys import Epoch, NodeId, NodeIncarnation, UserKey  # noqa: E402
from steward.model.placement import Placement  # noqa: E402
from steward.rpc.keys import CONTROL_KEY, load_or_create_key  # noqa: E402
from steward.rpc.roles import Role, RoleCredentials  # noqa: E402
from steward.v1 import registry_service_pb2 as pb  # noqa: E402

registry = rig.registry
clients = rig.clients


class SessionNode:
    """A `NodeSession` that runs, and what it told its node, in order."""

    def __init__(self, address: str, data: Path, node_id: str, cluster: str = rig.CLUSTER) -> None:
        # Nobody accepts but the kernel; enough to be no refused dial.
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.node_id = node_id
        self.incarnation: NodeIncarnation | None = None
        self.granted: list[tuple[UserKey, Epoch, bool]] = []
        self.handed_off: list[tuple[UserKey, Epoch, str]] = []
        self.evicted: list[tuple[UserKey, Epoch]] = []
        self.members: list[tuple[NodeId, ...]] = []
        self.asked = 0
        self.lease: list[str] = []
        self.log_reachable = True
        hello = pb.NodeHello(
            cluster=cluster,
            node_id=node_id,
            boot_id="boot",
            nonce=new_nonce(),
            address=f"127.0.0.1:{self._listener.getsockname()[1]}",
            capacity=1000,
            version="1",
            pid=os.getpid(),
        )
        key = load_or_create_key(data, CONTROL_KEY)
        self.session = NodeSession(
            address,
            RoleCredentials(key, Role.AGENT, cluster, node_id),
            hello,
            joined=self._joined,
            granted=self._granted,
            hand_off=self._hand_off,
            evict=self.evicted.extend,
            members=lambda node_ids: self.members.append(tuple(node_ids)),
            asked_log_head=self._asked,
            lease_uncertain=lambda tenants: self.lease.append(",".join(sorted(tenants))),
            lease_certain=lambda: self.lease.append("certain"),
            beat=lambda: pb.NodeBeat(log_reachable=self.log_reachable),
        )
        self.task = asyncio.create_task(self.session.run())

    def _joined(self, incarnation: NodeIncarnation) -> None:
        assert self.incarnation is None, "told once"
        self.incarnation = incarnation

    def _granted(self, placements: Sequence[Placement], activate: bool) -> None:
        self.granted += [(p.user, p.epoch, activate) for p in placements]

    def _hand_off(self, users: Sequence[tuple[UserKey, Epoch]], cause: str) -> None:
        self.handed_off += [(user, epoch, cause) for user, epoch in users]

    def _asked(self) -> None:
        self.asked += 1
        self.session.report_log_head(Epoch(0))

    async def close(self) -> None:
        self._listener.close()
        self.task.cancel()
        await asyncio.wait({self.task})


@pytest_asyncio.fixture
async def make_node(registry: Any) -> AsyncIterator[Callable[..., SessionNode]]:
    """Makes nodes that talk to the registry, directly or by another `address`."""
    made: list[SessionNode] = []

    def make(node_id: str, address: str = "", cluster: str = rig.CLUSTER) -> SessionNode:
        made.append(SessionNode(address or registry.address, registry.data, node_id, cluster))
        return made[-1]

    yield make
    for node in made:
        await node.close()


@pytest.fixture
def strict_registry(registry: Any) -> Any:
    """The registry with a short lease, and one strict tenant."""
    registry.stop()
    registry.start(**{"ttl-ms": "1500", "strict-tenants": "careful"})
    return registry
