"""Changes of ownership as a tool sees them, from a real registry process."""

import asyncio
from typing import Any

import grpc
import pytest

from steward.errors import Reason
from steward.rpc.roles import Role
from steward.rpc.status import error_of
from steward.v1 import placement_pb2
from steward.v1 import registry_service_pb2 as pb

pytestmark = pytest.mark.asyncio

WITHIN_S = 15.0


class Watch:
    """A watch of placements. `owners` is what a tool would know: user → (node, epoch)."""

    def __init__(self, operator: Any, **request: Any) -> None:
        self._call = operator.stub.WatchPlacements(
            pb.WatchPlacementsRequest(**request), metadata=operator.metadata()
        )
        self.owners: dict[str, tuple[str, int]] = {}
        self.entries: list[Any] = []
        self.pages = 0
        self.created: Any = None

    async def set_up(self) -> "Watch":
        response = await self._read()
        assert response.WhichOneof("body") == "created"
        self.created = response.created
        return self

    async def current(self) -> None:
        more = True
        while more:
            response = await self._read()
            assert response.WhichOneof("body") == "current"
            for placement in response.current.placements:
                assert placement.user.user_id not in self.owners
                self.owners[placement.user.user_id] = (placement.node_id, placement.epoch)
            self.pages += 1
            more = response.current.more

    async def until(self, kind: str, count: int = 1) -> list[Any]:
        """Read until there were `count` entries of this kind; all entries ever."""
        while sum(entry.kind == kind for entry in self.entries) < count:
            response = await self._read()
            assert response.WhichOneof("body") == "changes"
            for entry in response.changes.entries:
                expected = (self.entries[-1].number if self.entries else self.created.number) + 1
                assert entry.number == expected
                self.entries.append(entry)
                self._apply(entry)
        return self.entries

    def _apply(self, entry: Any) -> None:
        match entry.kind:
            case "place" | "takeover":
                self.owners[entry.user.user_id] = (entry.node_id, entry.epoch)
            case "release":
                self.owners.pop(entry.user.user_id, None)
            case "fence":
                lost = [u for u, (node, _) in self.owners.items() if node == entry.node_id]
                for user in lost:
                    del self.owners[user]

    async def _read(self) -> Any:
        async with asyncio.timeout(WITHIN_S):
            response = await self._call.read()
        assert response is not grpc.aio.EOF
        return response


async def release(node: Any, user: str, epoch: int) -> None:
    placement = pb.ReleasedPlacement(
        user=placement_pb2.UserKey(tenant_id="acme", user_id=user), epoch=epoch, cause="idle"
    )
    await node.open.send(
        pb.HoldNodeSessionRequest(
            release=pb.ReleasePlacements(request_id=1, placements=[placement])
        )
    )
    await node.open.next("released", "granted", "renewed")


async def test_place_release_fence_and_takeover_come_in_order(clients: Any) -> None:
    operator = clients.of(Role.OPERATOR)
    watch = await Watch(operator).set_up()
    first = clients.node("n1")
    await first.join()
    edge = clients.edge("e1")
    await edge.connect()
    (ann,) = await edge.resolve("ann")
    (bob,) = await edge.resolve("bob")
    await release(first, "bob", bob.placement.epoch)
    second = clients.node("n2")
    await second.join()
    await first.die()
    await edge.open.expect("node_fenced")
    (after,) = await edge.resolve("ann")
    entries = [e for e in await watch.until("takeover") if e.kind != "generation"]
    assert [(e.kind, e.user.user_id, e.node_id) for e in entries] == [
        ("join", "", "n1"),
        ("place", "ann", "n1"),
        ("place", "bob", "n1"),
        ("release", "bob", "n1"),
        ("join", "", "n2"),
        ("fence", "", "n1"),
        ("takeover", "ann", "n2"),
    ]
    assert watch.owners == {"ann": ("n2", after.placement.epoch)}
    assert entries[1].epoch == ann.placement.epoch < after.placement.epoch
    assert all(e.revision and e.at_ms for e in entries)


async def test_a_watch_goes_on_from_its_number_over_a_restart(clients: Any, registry: Any) -> None:
    operator = clients.of(Role.OPERATOR)
    watch = await Watch(operator).set_up()
    node = clients.node("n1")
    await node.join()
    edge = clients.edge("e1")
    await edge.connect()
    await edge.resolve("ann", "bob")
    last = (await watch.until("place", 2))[-1].number
    registry.kill()
    await asyncio.to_thread(registry.start)
    again = await Watch(operator, after=last - 1).set_up()
    assert again.created.number == last - 1
    await node.join()
    edge = clients.edge("e2")
    await edge.connect()
    await edge.resolve("cyd")
    users = [e.user.user_id for e in await again.until("place", 2) if e.kind == "place"]
    assert users == ["bob", "cyd"]


async def test_what_is_there_comes_in_pages_and_then_every_change(clients: Any) -> None:
    node = clients.node("n1")
    await node.join()
    edge = clients.edge("e1")
    await edge.connect()
    before: dict[str, tuple[str, int]] = {}
    for start in range(0, 1200, 400):
        for result in await edge.resolve(*(f"u{n:04}" for n in range(start, start + 400))):
            before[result.user.user_id] = ("n1", result.placement.epoch)
    watch = await Watch(clients.of(Role.OPERATOR), include_current=True).set_up()
    # Changes while the pages are read.
    await release(node, "u1199", before.pop("u1199")[1])
    await edge.resolve("u9999")
    await watch.current()
    assert watch.pages >= 3
    await watch.until("place")
    (late,) = await edge.resolve("u9999")
    assert watch.owners == {**before, "u9999": ("n1", late.placement.epoch)}
    (ended,) = [e for e in watch.entries if e.kind == "release"]
    assert ended.user.user_id == "u1199"


async def test_an_empty_cluster_has_one_empty_page(clients: Any) -> None:
    watch = await Watch(clients.of(Role.OPERATOR), include_current=True).set_up()
    await watch.current()
    assert (watch.pages, watch.owners) == (1, {})


async def test_numbers_that_make_no_sense_are_refused(clients: Any) -> None:
    operator = clients.of(Role.OPERATOR)
    for request, reason in (
        ({"after": 1 << 40}, Reason.POSITION_COMPACTED),
        ({"after": 1 << 63}, Reason.PROTOCOL_VIOLATION),
        ({"after": 1, "include_current": True}, Reason.PROTOCOL_VIOLATION),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await Watch(operator, **request).set_up()
        assert error_of(refused.value).reason is reason


async def test_the_ledger_is_read_newest_first_of_all_or_of_one_user(clients: Any) -> None:
    node = clients.node("n1")
    await node.join()
    edge = clients.edge("e1")
    await edge.connect()
    await edge.resolve("ann")
    await edge.resolve("bob")
    operator = clients.of(Role.OPERATOR)

    async def ledger(**request: Any) -> list[tuple[str, str]]:
        answer = await operator.stub.ReadLedger(
            pb.ReadLedgerRequest(**request), metadata=operator.metadata()
        )
        return [(entry.kind, entry.user.user_id) for entry in answer.entries]

    assert (await ledger(limit=2)) == [("place", "bob"), ("place", "ann")]
    ann = placement_pb2.UserKey(tenant_id="acme", user_id="ann")
    assert (await ledger(user=ann)) == [("place", "ann")]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ledger(limit=1001)
    assert error_of(refused.value).reason is Reason.PROTOCOL_VIOLATION
