"""Planned ends and new beginnings: handoff, eviction, activation without an edge, draining."""

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from agent_service.core.commands import AnnounceClient, AttachEdge
from agent_service.core.effects import AnswerAttached, AnswerRefused
from agent_service.core.journal import Seal, SealOutcome
from agent_service.log.memory import MemoryLog
from agent_service.log.port import ReadRange
from steward.client.checks import check_stream
from steward.errors import Reason, StewardError
from steward.model.keys import EdgeId, Epoch, NodeId, UserKey
from steward.model.placement import Placement

ALICE = UserKey("default", "alice")
BOB = UserKey("default", "bob")
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
Until = Callable[..., Any]


def stored(log: MemoryLog) -> list[dict[str, Any]]:
    page = log.state.read(ALICE, ReadRange(limit=1000))
    return [orjson.loads(payload) for payload in page.events]


def agents_of(node: Any) -> Any:
    """The module that this node has loaded its agents from."""
    name = node.incarnation.node_id.replace("-", "_")
    return next(m for n, m in sys.modules.items() if n.endswith(f"agents_of_{name}"))


@pytest.mark.asyncio
async def test_a_user_moves_with_its_run_and_every_tool_runs_once(
    make_node: Any, wait_until: Until
) -> None:
    log = MemoryLog()
    old, new = make_node(log), make_node(log, "node-1")
    await old.attached(7)
    gate = agents_of(old).GATES["b"] = asyncio.Event()
    old.send(7, "m1", "go", "tools")
    await wait_until(lambda: old.edge.types().count("tool_executing") == 2, "the second tool runs")
    old.host.hand_off([(ALICE, Epoch(7))], "move")
    await asyncio.sleep(0.05)
    assert old.host.managers == 1, "a tool is open"
    loop = old.agents.thread_loop
    loop.call_soon_threadsafe(gate.set)
    await wait_until(lambda: old.host.managers == 0, "it has let go")
    assert old.registry.handed_on == [(ALICE, 7, True)]
    assert old.edge.lost == [(Reason.MANAGER_MOVED, 0)]
    new.place(8, activate=True)
    await wait_until(lambda: stored(log)[-1]["type"] == "agent_completed", "it ends there")
    events = stored(log)
    assert check_stream(events) == []
    assert events[-1]["data"]["response"] == "abc"
    assert [e["data"]["cause"] for e in events if e["type"] == "manager_moved"] == ["handoff"]
    assert agents_of(old).DONE == [("a", 1), ("b", 1)]
    assert agents_of(new).DONE == [("c", 2)]
    said = "".join(e["data"]["delta"] for e in events if e["type"] == "agent_text")
    assert said == "before a. before b. before c. "
    value = new.metrics.registry.get_sample_value
    assert value("steward_agent_handoff_gap_seconds_count") == 1
    assert value("steward_agent_failover_gap_seconds_count") == 0


@pytest.mark.asyncio
async def test_a_call_that_does_not_end_in_time_is_repeated_by_the_next_manager(
    make_node: Any, wait_until: Until
) -> None:
    log = MemoryLog()
    old, new = make_node(log), make_node(log, "node-1")
    old.host._handoff_ms = 100
    await old.attached(7)
    agents_of(old).GATES["b"] = asyncio.Event()
    old.send(7, "m1", "go", "tools")
    await wait_until(lambda: old.edge.types().count("tool_executing") == 2, "the second tool runs")
    old.host.hand_off([(ALICE, Epoch(7))], "move")
    await wait_until(lambda: old.host.managers == 0, "the bound is over")
    new.place(8, activate=True)
    await wait_until(lambda: stored(log)[-1]["type"] == "agent_completed", "it ends there")
    assert check_stream(stored(log)) == []
    assert agents_of(old).DONE == [("a", 1)]
    assert agents_of(new).DONE == [("b", 2), ("c", 2)]


@pytest.mark.asyncio
async def test_a_killed_nodes_run_goes_on_where_it_was(make_node: Any, wait_until: Until) -> None:
    log = MemoryLog()
    old, new = make_node(log), make_node(log, "node-1")
    await old.attached(7)
    agents_of(old).GATES["c"] = asyncio.Event()
    old.send(7, "m1", "go", "tools")
    await wait_until(lambda: old.edge.types().count("tool_executing") == 3, "the last tool runs")
    new.host.members([NodeId("node-0"), NodeId("node-1")])
    new.host.members([NodeId("node-1")])
    await asyncio.sleep(0.05)
    new.place(8, activate=True)
    await wait_until(lambda: stored(log)[-1]["type"] == "agent_completed", "it ends there")
    assert check_stream(stored(log)) == []
    assert agents_of(new).DONE == [("c", 2)]
    assert [e["type"] for e in stored(log)].count("agent_thinking") == 1
    (moved,) = [e["data"] for e in stored(log) if e["type"] == "manager_moved"]
    assert (moved["cause"], moved["from_node"]) == ("failover", "node-0")
    assert moved["gap_ms"] >= 50, "since the node left the cluster"


@pytest.mark.asyncio
async def test_a_placement_without_a_manager_is_handed_on_at_once(node: Any) -> None:
    node.place(7)
    node.host.hand_off([(ALICE, Epoch(7)), (BOB, Epoch(7))], "drain")
    assert node.registry.handed_on == [(ALICE, 7, False), (BOB, 7, False)]
    # An edge that has not heard of it yet is told, and nobody calls it an intruder.
    node.attach(7)
    assert node.edge.of(AnswerRefused)[0].reason is Reason.EPOCH_STALE
    assert node.registry.violations == []
    # Asked again it says so again: a registry that asks has not understood, and would wait.
    node.host.hand_off([(ALICE, Epoch(7))], "drain")
    assert node.registry.handed_on[2:] == [(ALICE, 7, False)]


class SlowSealLog(MemoryLog):
    """Seals wait for a gate, and fail if told to."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.fails = False

    async def seal(self, seal: Seal) -> SealOutcome:
        await self.gate.wait()
        if self.fails:
            raise StewardError(Reason.STORE_UNAVAILABLE, "no")
        return await super().seal(seal)


@pytest.mark.asyncio
@pytest.mark.parametrize("fails", [False, True])
async def test_a_manager_in_the_making_is_handed_on_when_it_is_made_or_failed(
    make_node: Any, wait_until: Until, fails: bool
) -> None:
    log = SlowSealLog()
    log.fails = fails
    node = make_node(log)
    node.place(7)
    node.attach(7)
    node.host.hand_off([(ALICE, Epoch(7))], "drain")
    assert node.registry.released == []
    log.gate.set()
    await wait_until(lambda: bool(node.registry.released), "let go")
    assert node.registry.released == [(ALICE, 7, "drain")]
    assert node.registry.handed_on == [(ALICE, 7, False)]
    assert bool(node.edge.of(AnswerAttached)) != fails
    assert node.host.managers == 0


@pytest.mark.asyncio
async def test_a_handoff_of_another_epoch_ends_nothing(node: Any) -> None:
    await node.attached(7)
    node.host.hand_off([(ALICE, Epoch(6))], "drain")
    assert node.host.managers == 1
    assert node.registry.released == [(ALICE, 6, "drain")]


@pytest.mark.asyncio
async def test_an_evicted_user_is_told_and_its_runs_are_cancelled(
    node: Any, wait_until: Until
) -> None:
    await node.attached(7)
    node.send(7, "m1", "x", "forever")
    await wait_until(lambda: "agent_thinking" in node.edge.types(), "it runs")
    node.host.evict([(ALICE, Epoch(7))])
    await wait_until(lambda: bool(node.edge.lost), "the edge is told")
    assert node.edge.lost == [(Reason.USER_EVICTED, 0)]
    assert node.edge.events[-1]["data"]["outcome"] == "cancelled"
    assert node.registry.released == [(ALICE, 7, "evicted")]
    assert node.registry.handed_on == []


@pytest.mark.asyncio
async def test_an_evicted_user_without_a_manager_has_its_open_runs_cancelled_too(
    make_node: Any, wait_until: Until
) -> None:
    log = MemoryLog()
    dead, node = make_node(log), make_node(log, "node-1")
    await dead.attached(7)
    dead.send(7, "m1", "x", "forever")
    await wait_until(lambda: "agent_thinking" in dead.edge.types(), "it runs")
    node.place(8)
    node.host.evict([(ALICE, Epoch(8))])
    await wait_until(lambda: bool(node.registry.released), "evicted")
    assert stored(log)[-1]["data"]["outcome"] == "cancelled"
    assert check_stream(stored(log)) == []


@pytest.mark.asyncio
async def test_a_client_at_another_edge_is_told_to_the_first(node: Any, wait_until: Until) -> None:
    await node.attached(7)
    other = type(node.edge)("edge-1#1")
    node.host.edge_opened(other)
    node.host.command(ALICE, Epoch(7), AttachEdge(EdgeId("edge-1#1"), 9, 0), TRACE)
    node.host.command(ALICE, Epoch(7), AnnounceClient(EdgeId("edge-1#1"), "phone"), TRACE)
    assert (node.edge.taken, other.taken) == (["phone"], [])


@pytest.mark.asyncio
async def test_a_drain_waits_for_the_registry_to_move_managers(
    node: Any, wait_until: Until
) -> None:
    node.host.members([NodeId("node-0"), NodeId("node-1")])
    await node.attached(7)
    node.send(7, "m1", "x", "forever")
    await wait_until(lambda: "agent_thinking" in node.edge.types(), "it runs")
    draining = asyncio.ensure_future(node.host.drain(runs_s=5.0, appends_s=2.0, moves_s=5.0))
    await asyncio.sleep(0.1)
    assert not draining.done()
    node.host.hand_off([(ALICE, Epoch(7))], "drain")
    await asyncio.wait_for(draining, 2.0)
    assert node.registry.handed_on == [(ALICE, 7, True)]


@pytest.mark.asyncio
@pytest.mark.parametrize("others", [True, False])
async def test_a_drain_with_nobody_to_move_to_stops_by_itself(
    node: Any, wait_until: Until, others: bool
) -> None:
    """Also when there are other nodes, and the registry says nothing."""
    node.host.members([NodeId("node-0"), *([NodeId("node-1")] if others else [])])
    await node.attached(7)
    node.send(7, "m1", "x", "forever")
    await wait_until(lambda: "agent_thinking" in node.edge.types(), "it runs")
    began = asyncio.get_running_loop().time()
    await node.host.drain(runs_s=0.1, appends_s=2.0, moves_s=30.0)
    took = asyncio.get_running_loop().time() - began
    assert took < 3.0
    assert (took > 1.0) == others
    assert node.registry.released == [(ALICE, 7, "stopped")]
    assert node.registry.handed_on == []


@pytest.mark.asyncio
async def test_a_stopped_clusters_run_goes_on_at_the_next_start(
    make_node: Any, wait_until: Until
) -> None:
    log = MemoryLog()
    first = make_node(log)
    await first.attached(7)
    agents_of(first).GATES["b"] = asyncio.Event()
    first.send(7, "m1", "go", "tools")
    await wait_until(lambda: first.edge.types().count("tool_executing") == 2, "a tool runs")
    await first.host.drain(runs_s=0.05, appends_s=2.0)
    second = make_node(log, "node-1")
    second.place(8, activate=True)
    await wait_until(lambda: stored(log)[-1]["type"] == "agent_completed", "it ends")
    events = stored(log)
    assert check_stream(events) == []
    assert "manager_moved" not in [event["type"] for event in events]
    assert agents_of(second).DONE == [("b", 2), ("c", 2)]


@pytest.mark.asyncio
async def test_a_stop_without_another_node_waits_for_an_open_tool_call_and_begins_no_other(
    make_node: Any, wait_until: Until
) -> None:
    log = MemoryLog()
    node = make_node(log)
    await node.attached(7)
    gates = agents_of(node).GATES
    gates["b"], gates["c"] = asyncio.Event(), asyncio.Event()
    node.send(7, "m1", "go", "tools")
    await wait_until(lambda: node.edge.types().count("tool_executing") == 2, "a tool runs")
    loop = asyncio.get_running_loop()
    over_half = loop.time() + 1.2
    draining = asyncio.ensure_future(node.host.drain(runs_s=2.0, appends_s=2.0))
    await wait_until(lambda: loop.time() > over_half, "the time for runs is over")
    assert not draining.done(), "the call is not cut off"
    gates["b"].set()
    await draining
    assert node.host.managers == 0
    types = [event["type"] for event in stored(log)]
    assert (types.count("tool_executing"), types.count("tool_completed")) == (2, 2)


@pytest.mark.asyncio
async def test_without_a_certain_lease_strict_tenants_stop_and_nobody_new_begins(
    node: Any, wait_until: Until
) -> None:
    await node.attached(7)
    node.send(7, "m1", "x", "forever")
    await wait_until(lambda: "agent_thinking" in node.edge.types(), "it runs")
    node.host.lease_uncertain(frozenset({"another"}))
    assert node.host.managers == 1, "the log alone decides about a fast tenant's"
    other = Placement(BOB, Epoch(8), *node.incarnation, "a:1")
    node.host.granted([other], activate=True)
    node.host.command(BOB, Epoch(8), AttachEdge(node.edge.edge_id, 5, 0), TRACE)
    assert len(node.edge.of(AnswerRefused)) == 1
    node.host.lease_uncertain(frozenset({"default"}))
    await wait_until(lambda: node.host.managers == 0, "the strict tenant's has let go")
    assert node.registry.released == [(ALICE, 7, "the lease is uncertain")]
    node.host.lease_certain()
    node.host.command(BOB, Epoch(8), AttachEdge(node.edge.edge_id, 6, 0), TRACE)
    await wait_until(lambda: node.host.managers == 1, "made again")


@pytest.mark.asyncio
async def test_the_next_manager_tells_that_one_had_to_stop_for_its_lease(
    make_node: Any, wait_until: Until
) -> None:
    log = MemoryLog()
    old, new = make_node(log), make_node(log, "node-1")
    await old.attached(7)
    gate = agents_of(old).GATES["b"] = asyncio.Event()
    old.send(7, "m1", "go", "tools")
    await wait_until(lambda: old.edge.types().count("tool_executing") == 2, "the second tool runs")
    old.host.lease_uncertain(frozenset({"default"}))
    await wait_until(lambda: old.host.managers == 0, "it has let go")
    gate.set()
    assert "manager_moved" not in old.edge.types(), "it does not know who is the next"
    await new.attached(8)
    await wait_until(lambda: stored(log)[-1]["type"] == "agent_completed", "it ends there")
    (moved,) = [e["data"] for e in stored(log) if e["type"] == "manager_moved"]
    assert (moved["from_node"], moved["to_node"]) == ("node-0", "node-1")
    assert moved["cause"] == "failover"
    assert moved["gap_ms"] >= 0
    assert check_stream(stored(log)) == []
