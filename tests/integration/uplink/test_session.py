"""The node's session with a real registry: every message of it, both ways, across breaks."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from steward.model.keys import Epoch, UserKey
from steward.rpc.roles import Role
from steward.testing.proxy import CutProxy
from steward.testing.waiting import eventually
from steward.v1 import placement_pb2
from steward.v1 import registry_service_pb2 as pb

pytestmark = pytest.mark.asyncio
Make = Callable[..., Any]
ANN = UserKey("acme", "ann")


def key(user: UserKey) -> placement_pb2.UserKey:
    return placement_pb2.UserKey(tenant_id=user.tenant, user_id=user.user)


async def joined(make_node: Make, *node_ids: str, address: str = "") -> list[Any]:
    nodes = [make_node(node_id, address) for node_id in node_ids]
    await eventually(lambda: all(node.incarnation for node in nodes), "all have joined")
    await eventually(
        lambda: all(node.members and set(node.members[-1]) >= set(node_ids) for node in nodes),
        "all know each other",
    )
    return nodes


async def place(clients: Any, user: UserKey, *nodes: Any) -> tuple[Any, Epoch]:
    """Resolve a user; the node that got it, and its epoch."""
    operator = clients.of(Role.OPERATOR)
    request = pb.ResolveManagersRequest(users=[pb.UserQuery(user=key(user))])
    answer = await operator.stub.ResolveManagers(request, metadata=operator.metadata())
    placement = answer.results[0].placement
    node = next(node for node in nodes if node.node_id == placement.node_id)
    epoch = Epoch(placement.epoch)
    await eventually(lambda: (user, epoch) in pairs(node.granted), "it is granted")
    return node, epoch


async def find(clients: Any, user: UserKey) -> Any:
    operator = clients.of(Role.OPERATOR)
    request = pb.FindPlacementRequest(user=key(user))
    return (await operator.stub.FindPlacement(request, metadata=operator.metadata())).placement


def pairs(items: list[Any]) -> list[tuple[UserKey, Epoch]]:
    return [(item[0], item[1]) for item in items]


async def test_nodes_learn_who_else_takes_users_and_who_does_not_any_more(
    make_node: Make, clients: Any
) -> None:
    first, second = await joined(make_node, "n1", "n2")
    second.session.announce_drain()
    await eventually(lambda: first.members[-1] == ("n1",), "a draining node is none of them")
    operator = clients.of(Role.OPERATOR)
    third = (await joined(make_node, "n3"))[0]
    await eventually(lambda: set(first.members[-1]) == {"n1", "n3"}, "a newcomer is")
    fence = pb.FenceNodeRequest(node_id="n3", cause="test")
    await operator.stub.FenceNode(fence, metadata=operator.metadata())
    await eventually(lambda: first.members[-1] == ("n1",), "a fenced one is not")
    assert await asyncio.wait_for(third.session.fenced, 5) == "test"


async def test_a_move_is_a_handoff_that_is_released_and_activated_elsewhere(
    make_node: Make, clients: Any
) -> None:
    nodes = await joined(make_node, "n1", "n2")
    old, epoch = await place(clients, ANN, *nodes)
    new = next(node for node in nodes if node is not old)
    operator = clients.of(Role.OPERATOR)
    request = pb.MoveUserRequest(user=key(ANN), node_id=new.node_id)
    moving = operator.stub.MoveUser(request, metadata=operator.metadata())
    await eventually(lambda: old.handed_off, "the old node is asked")
    assert old.handed_off == [(ANN, epoch, "move")]
    old.session.release(ANN, epoch, "handoff", handoff=True, activate=True)
    moved = (await moving).placement
    assert (moved.node_id, moved.epoch > epoch) == (new.node_id, True)
    await eventually(lambda: new.granted, "the new node has it")
    assert new.granted == [(ANN, moved.epoch, True)]
    await old.session.flush(5)
    assert not old.session._releases


async def test_an_evicted_user_is_named_with_its_epoch(make_node: Make, clients: Any) -> None:
    nodes = await joined(make_node, "n1")
    node, epoch = await place(clients, ANN, *nodes)
    operator = clients.of(Role.OPERATOR)
    request = pb.EvictUserRequest(user=key(ANN), cause="test")
    evicting = operator.stub.EvictUser(request, metadata=operator.metadata())
    await eventually(lambda: node.evicted, "the node is told")
    assert node.evicted == [(ANN, epoch)]
    node.session.release(ANN, epoch, "evicted")
    assert (await evicting).epoch == epoch


async def test_an_adopted_user_is_placed_once_and_activated_wherever_it_is(
    make_node: Make, clients: Any
) -> None:
    nodes = await joined(make_node, "n1", "n2")
    owner, epoch = await place(clients, ANN, *nodes)
    bob = UserKey("acme", "bob")
    for node in nodes:
        assert node.session.adopt([ANN, bob])
    await eventually(
        lambda: (
            (ANN, epoch, True) in owner.granted
            and sum((bob in (g[0] for g in node.granted)) for node in nodes) == 1
        ),
        "ann is activated where she is, bob somewhere",
    )
    placement = await find(clients, bob)
    home = next(node for node in nodes if node.node_id == placement.node_id)
    assert {g for g in home.granted if g[0] == bob} == {(bob, placement.epoch, True)}
    assert pairs(owner.granted).count((ANN, epoch)) >= 2


async def test_releases_are_repeated_in_the_same_words_on_the_next_stream(
    make_node: Make, clients: Any, registry: Any
) -> None:
    async with CutProxy(registry.address) as proxy:
        node = (await joined(make_node, "n1", address=proxy.address))[0]
        _, epoch = await place(clients, ANN, node)
        bob = UserKey("acme", "bob")
        _, bobs = await place(clients, bob, node)
        proxy.cut()
        node.session.release(ANN, epoch, "passivated")
        node.session.release(ANN, epoch, "said again, and ignored")
        await proxy.break_off()
        await eventually(lambda: not node.session.connected, "the stream is gone")
        node.session.release(bob, bobs, "passivated")
        proxy.mend()
        await eventually(lambda: node.session.connected, "the session is back")
        await node.session.flush(5)
        assert not node.session._releases
    for user in (ANN, bob):
        assert not (await find(clients, user)).node_id
    operator = clients.of(Role.OPERATOR)
    ledger = await operator.stub.ReadLedger(
        pb.ReadLedgerRequest(user=key(ANN), limit=10), metadata=operator.metadata()
    )
    released = [entry.cause for entry in ledger.entries if entry.kind == "release"]
    assert released == ["passivated"]


async def test_a_registry_that_restarts_finds_the_same_incarnation_and_asks_for_the_log_head(
    make_node: Make, clients: Any, registry: Any
) -> None:
    node = (await joined(make_node, "n1"))[0]
    registry.kill()
    await eventually(lambda: not node.session.connected, "the stream is gone")
    asked = node.asked
    await asyncio.to_thread(registry.start, **{"log-floor": "true"})
    await eventually(lambda: node.session.connected, "the session is back")
    await eventually(lambda: node.asked > asked, "it is asked")
    # Grants begin with the answer.
    await place(clients, ANN, node)
    assert node.incarnation is not None
    assert not node.session.fenced.done()


async def test_a_fence_above_all_grants_ends_who_reports_it_and_lifts_what_is_granted_next(
    make_node: Make, clients: Any
) -> None:
    node = (await joined(make_node, "n1"))[0]
    _, epoch = await place(clients, ANN, node)
    high = Epoch(epoch + 1_000_000)
    node.session.report_log_head(high)
    # The registry's store has lost its past, and this node with it: it comes as a new process.
    assert await asyncio.wait_for(node.session.fenced, 5) == "generation raised"
    again = (await joined(make_node, "n2"))[0]
    bob = UserKey("acme", "bob")
    _, bobs = await place(clients, bob, again)
    assert bobs > high


async def test_a_silent_registry_is_dialled_anew_long_before_the_lease_is_over(
    make_node: Make, clients: Any, registry: Any
) -> None:
    async with CutProxy(registry.address) as proxy:
        node = (await joined(make_node, "n1", address=proxy.address))[0]
        proxy.cut()
        await eventually(lambda: not node.session.connected, "silence is noticed", 4.5)
        proxy.mend()
        await eventually(lambda: node.session.connected, "the session is back")
        assert not node.session.fenced.done()
        assert node.lease == ["certain"]


async def test_without_answers_the_lease_is_uncertain_and_certain_again_with_the_next_one(
    make_node: Make, strict_registry: Any
) -> None:
    async with CutProxy(strict_registry.address) as proxy:
        node = (await joined(make_node, "n1", address=proxy.address))[0]
        assert node.lease == ["certain"]
        strict_registry.stop()
        stopped = time.monotonic()
        await eventually(lambda: len(node.lease) == 2, "the lease is uncertain")
        assert time.monotonic() - stopped < 0.9 * 1.5 + 0.5
        assert node.lease == ["certain", "careful"]
        assert not node.session.lease_is_certain
        await asyncio.to_thread(
            strict_registry.start, **{"ttl-ms": "1500", "strict-tenants": "careful"}
        )
        await eventually(lambda: len(node.lease) == 3, "the lease is certain again")
        assert node.lease == ["certain", "careful", "certain"]
        assert not node.session.fenced.done(), "uncertain is not over"


@pytest.mark.parametrize("stream", ["held", "broken"])
async def test_a_node_that_was_fenced_while_it_was_cut_off_learns_it_when_it_is_back(
    make_node: Make, strict_registry: Any, stream: str
) -> None:
    async with CutProxy(strict_registry.address) as proxy:
        node = (await joined(make_node, "n1", address=proxy.address))[0]
        other = (await joined(make_node, "n2"))[0]
        proxy.cut()
        await eventually(lambda: other.members[-1] == ("n2",), "its lease is over")
        assert not node.session.fenced.done()
        if stream == "broken":
            # Then it is the answer to its next hello that tells it.
            await proxy.break_off()
        proxy.mend()
        assert await asyncio.wait_for(node.session.fenced, 10) == "lease over"
        assert await asyncio.wait_for(asyncio.shield(node.task), 5) is None


async def test_a_name_that_is_in_use_is_refused_with_its_reason_and_taken_when_it_is_free(
    make_node: Make, clients: Any
) -> None:
    first = (await joined(make_node, "n1"))[0]
    second = make_node("n1")
    await eventually(lambda: "in use" in (second.session.unready() or ""), "it is refused")
    assert second.incarnation is None
    assert first.session.connected
    operator = clients.of(Role.OPERATOR)
    listed = await operator.stub.ListViolations(
        pb.ListViolationsRequest(), metadata=operator.metadata()
    )
    assert [v.kind for v in listed.violations] == ["node_id_in_use"]
    await first.close()
    await eventually(lambda: second.incarnation, "the name is free")
    assert first.incarnation is not None
    assert second.incarnation > first.incarnation


async def test_confirm_says_who_is_here_and_fails_while_the_registry_is_away(
    make_node: Make, clients: Any, registry: Any
) -> None:
    node = (await joined(make_node, "n1"))[0]
    _, epoch = await place(clients, ANN, node)
    placement = await node.session.confirm(ANN)
    assert placement is not None
    assert placement.epoch == epoch
    assert await node.session.confirm(UserKey("acme", "nobody")) is None
    registry.kill()
    with pytest.raises(Exception, match="registry"):
        await node.session.confirm(ANN)


async def test_a_node_of_another_cluster_never_joins_and_says_why(make_node: Make) -> None:
    stranger = make_node("n1", cluster="other")
    await eventually(lambda: "cluster" in (stranger.session.unready() or ""), "it is refused")
    assert not stranger.session.connected


async def test_a_registry_that_is_not_there_is_named(make_node: Make) -> None:
    node = make_node("n1", "127.0.0.1:1")
    assert "127.0.0.1:1" in (node.session.unready() or "")
    assert not node.session.connected
