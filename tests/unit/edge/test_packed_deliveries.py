"""Deliveries on channels: each user's bytes reach that user's sockets, and nobody else's.

A real hub with peers in memory, on real loopback sockets.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Self, cast

import pytest
import uvloop
from prometheus_client import CollectorRegistry

from edge.core.attachment_values import Tick
from edge.core.batch import EventBatch
from edge.core.commands import Delivery
from edge.core.resume import ResumePoint
from edge.core.server_messages import Limits
from edge.core.session import SessionState
from edge.host.connection import Connection
from edge.host.hub import Hub, HubSettings
from edge.uplink.memory import MemoryAuth, MemoryCluster, MemoryNodes, MemoryRegistry
from steward.errors import Reason, StewardError
from steward.model.deliveries import HEAD, decode_texts, encode_texts, user_check
from steward.model.identity import Identity
from steward.model.keys import Epoch, NodeIncarnation, NodeRev, UserKey
from steward.model.violations import Violation, ViolationKind
from steward.runtime.clock import wall_ms
from steward.telemetry.catalog import EdgeMetrics
from steward.telemetry.tracing import Tracing

ALICE, BOB = UserKey("default", "alice"), UserKey("default", "bob")
DEADLINE_S = 10.0
SIZES = [0, 1, 125, 126, 127, 65_535, 65_536, 70_000]


class Client:
    """One connection of a user, and the client's end of it."""

    def __init__(self, user: UserKey, connection: Connection, reader: asyncio.StreamReader) -> None:
        self.user = user
        self.connection = connection
        self._reader = reader

    @property
    def next(self) -> int:
        return self.connection.session.next

    async def read(self, size: int) -> bytes:
        """The next so many bytes that the client gets."""
        return await self._reader.readexactly(size)

    async def texts(self, count: int) -> list[bytes]:
        """The texts of the next so many frames; long ones have up to 64 KiB."""
        texts: list[bytes] = []
        for _ in range(count):
            head = await self.read(2)
            more = await self.read(2) if head[1] == 126 else b""
            size = int.from_bytes(more, "big") if more else head[1]
            texts += decode_texts(head + more + await self.read(size))
        return texts


class World:
    """A hub with a node, and everybody who connects."""

    def __init__(self) -> None:
        self.metrics = CollectorRegistry()
        self.hub = Hub(
            HubSettings(Limits(65_536, 600, 10, 60_000), 10, 1 << 20, 0, 0),
            EdgeMetrics(self.metrics),
            Tracing(),
        )
        self.cluster = MemoryCluster()
        self.cluster.add_node("node-1")
        self.hub.registry = MemoryRegistry(self.cluster, self.hub)
        self.hub.auth = MemoryAuth()
        self.hub.nodes = MemoryNodes(self.cluster, self.hub)
        self.hub.violations = self
        self.violations: list[Violation] = []
        self._writers: list[asyncio.StreamWriter] = []

    def report(self, violation: Violation) -> None:
        self.violations.append(violation)

    async def __aenter__(self) -> Self:
        self.hub.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for writer in self._writers:
            writer.close()
        await self.hub.close()

    @property
    def source(self) -> NodeIncarnation:
        (source,) = self.cluster.nodes
        return source

    async def connect(
        self, user: UserKey, *, websocket: bool = True, merge: bool = False
    ) -> Client:
        loop = asyncio.get_running_loop()
        made: asyncio.Future[asyncio.Transport] = loop.create_future()

        class Held(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                made.set_result(cast(asyncio.Transport, transport))

        server = await loop.create_server(Held, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        self._writers.append(writer)
        transport = await made
        server.close()
        identity = Identity(user, (), wall_ms() + 3_600_000, wall_ms(), "t")
        connection = self.hub.connect(
            transport, identity, ResumePoint(), "", websocket=websocket, merge=merge
        )
        while connection.session.state is not SessionState.LIVE:
            await asyncio.sleep(0)
        client = Client(user, connection, reader)
        ready = await reader.readuntil(
            b"}\n\n"
            if not websocket
            else b'"merge":true}'
            if merge
            else b'"heartbeat_seconds":60}}'
        )
        assert b"ready" in ready
        return client

    def channel(self, user: UserKey) -> int:
        return self.hub._audiences.by_user[user].channel

    def head(
        self,
        user: UserKey,
        first: int,
        events: list[bytes],
        *,
        channel: int = 0,
        epoch: int = 0,
        size: int | None = None,
    ) -> bytes:
        """As a node writes it that holds the manager of `user`."""
        return HEAD.pack(
            channel or self.channel(user),
            epoch or self.cluster.placements[user].epoch,
            first,
            len(events),
            len(encode_texts(events)) if size is None else size,
            user_check(user),
        )

    def deliver(self, heads: bytes, events: list[bytes]) -> None:
        self.hub.delivered_packed(self.source, heads, encode_texts(events))


Work = Callable[[World], Awaitable[None]]
Run = Callable[[Work], None]


@pytest.fixture
def run() -> Run:
    """Runs something in a world of its own, within a deadline."""

    async def bounded(work: Work) -> None:
        async with asyncio.timeout(DEADLINE_S), World() as world:
            await work(world)

    def run(work: Work) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(bounded(work))

    return run


@pytest.mark.parametrize("size", SIZES)
def test_framed_events_are_taken_apart_as_they_were(size: int) -> None:
    events = [b"a" * size, b"b", b"c" * size]
    batch = EventBatch.framed(7, 3, encode_texts(events))
    assert (batch.first, batch.last) == (7, 9)
    assert list(batch.tail(8).events) == events[1:]
    assert decode_texts(encode_texts(events)) == events
    assert batch.frames() == encode_texts(events)


def test_events_of_each_user_reach_the_sockets_of_that_user(run: Run) -> None:
    async def work(world: World) -> None:
        alice, bob = await world.connect(ALICE), await world.connect(BOB)
        second = await world.connect(ALICE)
        ours, theirs = [b'{"a":1}', b'{"a":2}'], [b'{"b":' + b"1" * 200 + b"}"]
        heads = world.head(ALICE, alice.next, ours) + world.head(BOB, bob.next, theirs)
        world.deliver(heads, ours + theirs)
        assert await alice.texts(len(ours)) == ours
        assert await second.texts(len(ours)) == ours
        assert await bob.texts(len(theirs)) == theirs
        assert not world.violations

    run(work)


def test_an_event_stream_and_a_merging_client_get_the_same_events(run: Run) -> None:
    async def work(world: World) -> None:
        sse = await world.connect(ALICE, websocket=False)
        merging = await world.connect(ALICE, merge=True)
        events = [b'{"a":1}', b'{"a":2}']
        first, stream = sse.next, sse.connection.session.stream_id.encode()
        world.deliver(world.head(ALICE, first, events), events)
        expected = b"".join(
            b"id: %b:%d\ndata: %b\n\n" % (stream, first + n, e) for n, e in enumerate(events)
        )
        assert await sse.read(len(expected)) == expected
        assert await merging.texts(len(events)) == events

    run(work)


def test_what_waited_before_an_event_stays_before_it(run: Run) -> None:
    async def work(world: World) -> None:
        alice = await world.connect(ALICE)
        first = alice.next
        alice.connection.write(b"before")
        world.deliver(world.head(ALICE, first, [b"one"]), [b"one"])
        world.deliver(world.head(ALICE, first + 1, [b"two"]), [b"two"])
        assert await alice.read(6) == b"before"
        assert await alice.texts(2) == [b"one", b"two"]

    run(work)


def test_a_repeated_event_is_not_sent_twice(run: Run) -> None:
    async def work(world: World) -> None:
        alice = await world.connect(ALICE)
        first = alice.next
        world.deliver(world.head(ALICE, first, [b"one"]), [b"one"])
        world.deliver(world.head(ALICE, first, [b"one", b"two"]), [b"one", b"two"])
        assert await alice.texts(2) == [b"one", b"two"]

    run(work)


def test_a_node_that_mixes_up_channels_gives_nobody_anything(run: Run) -> None:
    async def work(world: World) -> None:
        alice, bob = await world.connect(ALICE), await world.connect(BOB)
        secret = [b'{"secret":1}']
        # The manager of bob, and the channel of alice. Epochs and sequences fit by accident.
        epoch = world.cluster.placements[ALICE].epoch
        wrong = world.head(BOB, alice.next, secret, channel=world.channel(ALICE), epoch=epoch)
        world.deliver(wrong, secret)
        (violation,) = world.violations
        assert (violation.kind, violation.user) == (ViolationKind.FOREIGN_DELIVERY, ALICE)
        for client in (alice, bob):
            event = [b'{"mine":1}']
            world.deliver(world.head(client.user, client.next, event), event)
            assert await client.texts(len(event)) == event

    run(work)


def test_a_channel_of_nobody_is_reported(run: Run) -> None:
    async def work(world: World) -> None:
        await world.connect(ALICE)
        world.deliver(world.head(ALICE, 1, [b"one"], channel=999), [b"one"])
        assert [v.kind for v in world.violations] == [ViolationKind.FOREIGN_DELIVERY]

    run(work)


def test_the_channel_of_a_user_who_left_is_given_to_nobody_and_is_no_offence(run: Run) -> None:
    async def work(world: World) -> None:
        alice = await world.connect(ALICE)
        channel, first = world.channel(ALICE), alice.next
        world.hub.user_evicted(ALICE, "test")
        late = world.head(ALICE, first, [b"late"], channel=channel)
        world.deliver(late, [b"late"])
        bob = await world.connect(BOB)
        assert world.channel(BOB) != channel
        world.deliver(late, [b"late"])
        assert not world.violations
        world.deliver(world.head(BOB, bob.next, [b"late"], channel=channel), [b"late"])
        assert [v.kind for v in world.violations] == [ViolationKind.FOREIGN_DELIVERY]

    run(work)


def test_a_batch_that_nobody_takes_is_not_timed_until_the_next_one(run: Run) -> None:
    async def work(world: World) -> None:
        await world.connect(ALICE)
        nobodys = Delivery(BOB, Epoch(1), 1, [b"one"])
        for batches in (1, 2):
            world.hub.delivered(world.source, [nobodys])
            name = "steward_edge_delivery_seconds_count"
            assert world.metrics.get_sample_value(name) == batches

    run(work)


def test_an_older_epoch_and_another_node_are_refused_and_reported(run: Run) -> None:
    async def work(world: World) -> None:
        alice = await world.connect(ALICE)
        first, epoch = alice.next, world.cluster.placements[ALICE].epoch
        world.deliver(world.head(ALICE, first, [b"old"], epoch=epoch - 1 or 1 << 40), [b"old"])
        thief = NodeIncarnation(world.source.node_id, NodeRev(world.source.node_rev + 1))
        heads = world.head(ALICE, first, [b"stolen"])
        world.hub.delivered_packed(thief, heads, encode_texts([b"stolen"]))
        # A second one, after good deliveries of the right node.
        world.deliver(world.head(ALICE, first, [b"good"]), [b"good"])
        heads = world.head(ALICE, first + 1, [b"stolen"])
        world.hub.delivered_packed(thief, heads, encode_texts([b"stolen"]))
        assert await alice.texts(1) == [b"good"]
        assert len(world.violations) == 3
        assert alice.next == first + 1

    run(work)


def test_nothing_of_the_last_epoch_is_taken_once_the_manager_is_lost(run: Run) -> None:
    async def work(world: World) -> None:
        alice = await world.connect(ALICE)
        first, epoch = alice.next, world.cluster.placements[ALICE].epoch
        world.hub._audiences.by_user[ALICE].attachment.live_epoch = 0
        world.hub._audiences.by_user[ALICE].handle(Tick())
        for claimed in (epoch, 0):
            head = HEAD.pack(world.channel(ALICE), claimed, first, 1, 5, user_check(ALICE))
            world.hub.delivered_packed(world.source, head, encode_texts([b"old"]))
        assert alice.next == first

    run(work)


def test_heads_that_do_not_fit_their_frames_end_the_stream(run: Run) -> None:
    async def work(world: World) -> None:
        alice = await world.connect(ALICE)
        head = world.head(ALICE, alice.next, [b"one"])
        for heads in (head[:-1], world.head(ALICE, alice.next, [b"one"], size=6)):
            with pytest.raises(StewardError) as error:
                world.hub.delivered_packed(world.source, heads, encode_texts([b"one"]))
            assert error.value.reason is Reason.PROTOCOL_VIOLATION

    run(work)
