"""A node's host with everything real but the wires: a log in memory, and peers that record."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from agent_service.core.commands import AttachEdge, SubmitMessage
from agent_service.core.effects import AnswerAttached, Deliver
from agent_service.core.policy import AgentPolicy, ManagerPolicy
from agent_service.host.agent_loop import AgentLoop
from agent_service.host.host import ManagerHost
from agent_service.host.ports import EdgeAnswer
from agent_service.log.memory import MemoryLog
from agent_service.log.port import EventLog
from steward.agent.loading import load_agents
from steward.errors import Reason
from steward.model.keys import (
    EdgeId,
    Epoch,
    NodeId,
    NodeIncarnation,
    NodeRev,
    ThreadId,
    UserKey,
)
from steward.model.placement import Placement
from steward.model.violations import Violation
from steward.telemetry.catalog import AgentMetrics
from steward.telemetry.tracing import Tracing

ALICE = UserKey("default", "alice")
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
AGENTS = """
import time
async def echo(run):
    for word in run.input.text.split():
        yield word + " "
async def history(run):
    return " | ".join(f"{m['role']}:{m['content']}" for m in run.messages)
async def forever(run):
    import asyncio
    await run.think("waiting")
    await asyncio.Event().wait()
async def block(run):
    time.sleep(1.0)
    return "awake"
GATES = {}
DONE = []
async def tools(run):
    # Three tools in a row; each waits for its gate, if there is one, and notes that it ran.
    await run.think("three tools")
    got = []
    for name in ("a", "b", "c"):
        async def work(name=name):
            if name in GATES:
                await GATES[name].wait()
            DONE.append((name, run.attempt))
            return name
        await run.say(f"before {name}. ")
        got.append(await run.tool(name, {}, work))
    return "".join(got)
"""


class Edge:
    """Records what an edge's stream would carry."""

    def __init__(self, name: str = "edge-0#1") -> None:
        self.edge_id = EdgeId(name)
        self.answers: list[tuple[EdgeAnswer, Epoch]] = []
        self.events: list[dict[str, Any]] = []
        self.lost: list[tuple[Reason, Epoch]] = []
        self.taken: list[str] = []
        self.aborted = False

    def answer(self, user: UserKey, epoch: Epoch, answer: EdgeAnswer, known: Epoch) -> None:
        self.answers.append((answer, known))

    def deliver(self, user: UserKey, epoch: Epoch, events: Deliver) -> None:
        self.events.extend(orjson.loads(payload) for payload in events.payloads)

    def manager_lost(self, user: UserKey, epoch: Epoch, reason: Reason, known: Epoch) -> None:
        self.lost.append((reason, known))

    def client_taken(self, user: UserKey, epoch: Epoch, client_id: str) -> None:
        self.taken.append(client_id)

    def abort(self) -> None:
        self.aborted = True

    def of(self, kind: type) -> list[Any]:
        return [answer for answer, _ in self.answers if isinstance(answer, kind)]

    def types(self) -> list[str]:
        return [event["type"] for event in self.events]


class Registry:
    """The registry's answers for this node, from a table of placements."""

    def __init__(self) -> None:
        self.placed: dict[UserKey, Placement] = {}
        self.asked: list[UserKey] = []
        self.released: list[tuple[UserKey, Epoch, str]] = []
        self.handed_on: list[tuple[UserKey, Epoch, bool]] = []
        self.log_heads: list[Epoch] = []
        self.refusals: list[tuple[str, Epoch]] = []
        self.violations: list[Violation] = []

    async def confirm(self, user: UserKey) -> Placement | None:
        self.asked.append(user)
        return self.placed.get(user)

    def release(
        self,
        user: UserKey,
        epoch: Epoch,
        cause: str,
        handoff: bool = False,
        activate: bool = False,
    ) -> None:
        self.released.append((user, epoch, cause))
        if handoff:
            self.handed_on.append((user, epoch, activate))

    def report_log_head(self, fence: Epoch) -> None:
        self.log_heads.append(fence)

    def report(self, violation: Violation) -> None:
        self.violations.append(violation)
        self.refusals.append((violation.kind.value, violation.epoch))


class Node:
    """One host with everything real but the wires."""

    def __init__(
        self, log: EventLog, path: Path, incarnation: NodeIncarnation, lease_ms: int
    ) -> None:
        path.write_text(AGENTS)
        names = re.findall(r"^async def (\w+)\(run\)", AGENTS, re.MULTILINE)
        catalog = load_agents([f"{path}:{name}" for name in names])
        self.metrics = AgentMetrics(CollectorRegistry())
        policy = ManagerPolicy(
            tuple(AgentPolicy(spec.name, spec.overlap, spec.on_crash) for spec in catalog.agents)
        )
        self.registry = Registry()
        self.incarnation = incarnation
        self.host = ManagerHost(log, self.registry, policy, self.metrics, Tracing(), self.registry)
        self.agents = AgentLoop(catalog, self.host.verbs, self.metrics)
        self.host.run_on(self.agents)
        self.host.joined(incarnation, lease_ms)
        self.agents.start()
        self.edge = Edge()
        self.host.edge_opened(self.edge)

    def place(
        self,
        epoch: int,
        *,
        push: bool = True,
        node: NodeIncarnation | None = None,
        activate: bool = False,
    ) -> None:
        placement = Placement(ALICE, Epoch(epoch), *(node or self.incarnation), "a:1")
        self.registry.placed[ALICE] = placement
        if push:
            self.host.granted([placement], activate)

    async def attached(self, epoch: int) -> None:
        """Place alice here, attach, and wait for the answer."""
        before = len(self.edge.of(AnswerAttached))
        self.place(epoch)
        self.attach(epoch)
        await until(lambda: len(self.edge.of(AnswerAttached)) > before, "attached")

    async def close(self) -> None:
        await self.host.close()
        await self.agents.stop(0.2)

    def attach(self, epoch: int) -> None:
        self.host.command(ALICE, Epoch(epoch), AttachEdge(self.edge.edge_id, 1, 0), TRACE)

    def send(self, epoch: int, id: str, text: str, agent: str = "echo") -> None:
        message = SubmitMessage(
            self.edge.edge_id, 2, id, orjson.dumps(text), ThreadId("main"), agent, "", TRACE
        )
        self.host.command(ALICE, Epoch(epoch), message, TRACE)


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 5.0) -> None:
    """Wait for a condition with a deadline."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.005)


@pytest_asyncio.fixture
async def make_node(tmp_path: Path) -> AsyncIterator[Callable[..., Node]]:
    """`make_node(log, name="node-0", lease_ms=0)`: a node on this log, closed after the test."""
    nodes: list[Node] = []

    def make(log: EventLog, name: str = "node-0", lease_ms: int = 0) -> Node:
        path = tmp_path / f"agents_of_{name.replace('-', '_')}.py"
        incarnation = NodeIncarnation(NodeId(name), NodeRev(3 + len(nodes)))
        nodes.append(Node(log, path, incarnation, lease_ms))
        return nodes[-1]

    yield make
    for node in nodes:
        await node.close()


@pytest_asyncio.fixture
async def node(make_node: Callable[..., Node]) -> Node:
    return make_node(MemoryLog())


@pytest.fixture
def wait_until() -> Callable[..., Any]:
    return until
