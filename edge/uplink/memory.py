"""The edge's peers in memory: a small cluster with the rules that an edge relies on.

For tests, simulation and load measurements, on any event loop, the virtual one too. A
`MemoryCluster` places users on nodes under growing epochs, keeps one stream per user,
appends before it delivers, de-duplicates messages by id and refuses stale epochs. Nodes
can be lost, users moved, the registry cut off. It runs no agents and keeps nothing.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import orjson

from edge.core.commands import (
    Accepted,
    AnnounceClient,
    Answer,
    AnswerBody,
    Attach,
    Attached,
    CancelAccepted,
    CancelRun,
    ClientTaken,
    Delivery,
    Detach,
    EdgeCommand,
    InputAccepted,
    ManagerLost,
    Refused,
    SubmitInput,
    SubmitMessage,
)
from edge.uplink.port import (
    EventPage,
    EventRange,
    LoggedIn,
    NodeListener,
    RegistryListener,
    ThreadPage,
    ThreadSummary,
    TicketIssued,
)
from steward.errors import Reason, StewardError
from steward.model.identity import Identity
from steward.model.keys import Epoch, NodeId, NodeIncarnation, NodeRev, StreamId, UserKey
from steward.model.placement import Placement
from steward.model.violations import Violation

MOST_PAGE_BYTES = 256 * 1024
T = TypeVar("T")


class EdgePort(Protocol):
    """An edge as a node sees it."""

    def answer(self, answer: Answer) -> None: ...

    def deliver(self, delivery: Delivery) -> None: ...


@dataclass(slots=True)
class MemoryStream:
    """One user's events; `oldest` is the first that is kept."""

    stream_id: StreamId
    events: list[bytes] = field(default_factory=list)
    accepted: dict[str, Accepted] = field(default_factory=dict)
    oldest: int = 1


@dataclass(slots=True)
class MemoryNode:
    """One incarnation of a node, with the edges that are attached to its users."""

    incarnation: NodeIncarnation
    address: str
    attached: dict[UserKey, list[EdgePort]] = field(default_factory=dict)


class MemoryCluster:
    """Registry, nodes and log in one object. Everything happens at once, in order."""

    def __init__(self) -> None:
        self.nodes: dict[NodeIncarnation, MemoryNode] = {}
        self.placements: dict[UserKey, Placement] = {}
        self.streams: dict[UserKey, MemoryStream] = {}
        self.resolves = 0
        self.unreachable: list[NodeIncarnation] = []
        self.commands: list[EdgeCommand] = []
        self.registry_listeners: list[RegistryListener] = []
        # Says whether a command is swallowed instead of handled (a stopped node).
        self.swallow: Callable[[EdgeCommand], bool] = lambda command: False
        self._revision = 0

    # ---- the cluster's side

    def add_node(self, name: str, address: str = "") -> MemoryNode:
        """A new incarnation of the node `name`."""
        self._revision += 1
        incarnation = NodeIncarnation(NodeId(name), NodeRev(self._revision))
        node = self.nodes[incarnation] = MemoryNode(incarnation, address)
        self._tell_nodes()
        return node

    def addresses(self) -> dict[NodeIncarnation, str]:
        """The list of nodes, as the registry gives it."""
        return {incarnation: node.address for incarnation, node in self.nodes.items()}

    def _tell_nodes(self) -> None:
        for listener in self.registry_listeners:
            listener.cluster_nodes(self.addresses())

    def place(self, user: UserKey, node: MemoryNode) -> Placement:
        """Put a user on a node, under a higher epoch than ever before."""
        self._revision += 1
        placement = Placement(
            user,
            Epoch(self._revision),
            node.incarnation.node_id,
            node.incarnation.node_rev,
            node.address,
        )
        self.placements[user] = placement
        return placement

    def move(self, user: UserKey, node: MemoryNode) -> Placement:
        """Move a user, and tell edges as the registry does."""
        placement = self.place(user, node)
        for listener in self.registry_listeners:
            listener.placement_moved(placement)
        return placement

    def lose_manager(self, user: UserKey, reason: str = "LEASE_EXPIRED") -> None:
        """The node drops the user's manager, and says so to the edges."""
        placement = self.placements.pop(user)
        node = self.nodes[placement.incarnation]
        lost = Answer(user, placement.epoch, 0, ManagerLost(reason, 0))
        for edge in node.attached.pop(user, []):
            edge.answer(lost)

    def fence(self, node: MemoryNode) -> None:
        """The node is over; the registry tells every edge once."""
        self.nodes.pop(node.incarnation, None)
        node.attached.clear()
        for listener in self.registry_listeners:
            listener.node_fenced(node.incarnation, "test")
        self._tell_nodes()

    def evict(self, user: UserKey) -> None:
        """An operator ends the user's sessions; the registry tells every edge."""
        self.placements.pop(user, None)
        for listener in self.registry_listeners:
            listener.user_evicted(user, "test")

    def stream(self, user: UserKey) -> MemoryStream:
        stream = self.streams.get(user)
        if stream is None:
            stream = self.streams[user] = MemoryStream(StreamId(f"s-{user.user}"))
        return stream

    def emit(self, user: UserKey, payloads: Sequence[bytes]) -> None:
        """Append events, then deliver them in one batch to whoever is attached."""
        stream = self.stream(user)
        first = len(stream.events) + 1
        stream.events.extend(payloads)
        placement = self.placements.get(user)
        node = self.nodes.get(placement.incarnation) if placement is not None else None
        if placement is None or node is None:
            return
        delivery = Delivery(user, placement.epoch, first, list(payloads))
        for edge in node.attached.get(user, ()):
            edge.deliver(delivery)

    def emit_numbered(self, user: UserKey, count: int, **fields: object) -> None:
        """Append `count` events of type `custom` that say their own sequence."""
        stream = self.stream(user)
        start = len(stream.events)
        self.emit(user, [_event(stream, start + n, "custom", fields) for n in range(1, count + 1)])

    # ---- what peers ask

    def resolve(self, user: UserKey, min_epoch: int) -> Placement | StewardError:
        self.resolves += 1
        placement = self.placements.get(user)
        if placement is not None and placement.incarnation in self.nodes:
            return placement
        if not self.nodes:
            return StewardError(Reason.NO_CAPACITY, "no node is up")
        return self.place(user, next(iter(self.nodes.values())))

    def command(self, node: MemoryNode, edge: EdgePort, command: EdgeCommand) -> None:
        """Handle one command, as the node that got it."""
        self.commands.append(command)
        if self.swallow(command):
            return
        user = command.user
        placement = self.placements.get(user)
        if node.incarnation not in self.nodes or placement is None:
            body: AnswerBody = Refused(Reason.PLACEMENT_UNKNOWN, "not here")
        elif placement.incarnation != node.incarnation or placement.epoch != command.epoch:
            body = Refused(Reason.EPOCH_STALE, "stale", known_epoch=placement.epoch)
        else:
            answer = self._do(node, edge, command)
            if answer is None:
                return
            body = answer
        edge.answer(Answer(user, command.epoch, command.command_id, body))

    def _do(self, node: MemoryNode, edge: EdgePort, command: EdgeCommand) -> AnswerBody | None:
        stream = self.stream(command.user)
        edges = node.attached.setdefault(command.user, [])
        match command.body:
            case Attach():
                if edge not in edges:
                    edges.append(edge)
                return Attached(stream.stream_id, len(stream.events), stream.oldest)
            case Detach():
                if edge in edges:
                    edges.remove(edge)
                return None
            case AnnounceClient(client_id):
                taken = ClientTaken(client_id)
                for other in edges:
                    if other is not edge:
                        other.answer(Answer(command.user, command.epoch, 0, taken))
                return None
            case SubmitMessage(id, content):
                known = stream.accepted.get(id)
                if known is not None:
                    return Accepted(id, known.run_id, known.sequence, True, 0)
                sequence = len(stream.events) + 1
                accepted = stream.accepted[id] = Accepted(id, f"r-{id}", sequence, False, 0)
                data = {"id": id, "content": orjson.Fragment(content)}
                self.emit(
                    command.user,
                    [_event(stream, sequence, "user_message", data, command.traceparent)],
                )
                return accepted
            case CancelRun(run_id):
                if any(run.run_id == run_id for run in stream.accepted.values()):
                    return CancelAccepted(run_id)
                return Refused(Reason.NOT_FOUND, "no such run")
            case SubmitInput(request_id):
                return InputAccepted(request_id)

    def read(self, user: UserKey, wanted: EventRange) -> EventPage:
        """A page of the log. Raises StewardError(POSITION_COMPACTED)."""
        stream = self.stream(user)
        last = min(wanted.until or len(stream.events), len(stream.events))
        sequences = list(range(wanted.after + 1, last + 1))
        if sequences and sequences[0] < stream.oldest and not wanted.newest:
            raise StewardError(Reason.POSITION_COMPACTED, "compacted")
        page = sequences[-wanted.limit :] if wanted.newest else sequences[: wanted.limit]
        while len(page) > 1 and sum(len(stream.events[n - 1]) for n in page) > MOST_PAGE_BYTES:
            page = page[: len(page) // 2]
        return EventPage(
            stream.stream_id,
            [stream.events[n - 1] for n in page],
            page,
            len(stream.events),
            stream.oldest,
            len(page) < len(sequences),
        )

    def threads(self, user: UserKey) -> ThreadPage:
        stream = self.stream(user)
        summary = ThreadSummary("main", "", len(stream.events), "2026-11-24T00:00:00.000Z")
        return ThreadPage([summary] if stream.events else [], "")


def _event(
    stream: MemoryStream, sequence: int, kind: str, data: object, traceparent: str = ""
) -> bytes:
    return orjson.dumps(
        {
            "type": kind,
            "stream_id": stream.stream_id,
            "sequence": sequence,
            "epoch": 1,
            "event_id": f"e{sequence}",
            "trace": traceparent,
            "data": data,
        }
    )


class MemoryRegistry:
    """`edge.uplink.port.Registry` on a `MemoryCluster`."""

    def __init__(self, cluster: MemoryCluster, listener: RegistryListener) -> None:
        self.connected = True
        self._cluster = cluster
        cluster.registry_listeners.append(listener)

    def resolve(
        self, user: UserKey, min_epoch: int, traceparent: str = ""
    ) -> "asyncio.Future[Placement]":
        future: asyncio.Future[Placement] = asyncio.get_running_loop().create_future()
        result = self._cluster.resolve(user, min_epoch)
        if isinstance(result, StewardError):
            future.set_exception(result)
        else:
            future.set_result(result)
        return future

    def report_unreachable(self, incarnation: NodeIncarnation, evidence: str) -> None:
        self._cluster.unreachable.append(incarnation)


class _NodeStream:
    """The `EdgePort` of one edge at one node."""

    def __init__(self, incarnation: NodeIncarnation, listener: NodeListener) -> None:
        self._incarnation = incarnation
        self._listener = listener

    def answer(self, answer: Answer) -> None:
        self._listener.answered([answer])

    def deliver(self, delivery: Delivery) -> None:
        self._listener.delivered(self._incarnation, [delivery])


class MemoryNodes:
    """`edge.uplink.port.Nodes` on a `MemoryCluster`: every node that is there is reached."""

    def __init__(self, cluster: MemoryCluster, listener: NodeListener) -> None:
        self._cluster = cluster
        self._listener = listener
        self._streams: dict[NodeIncarnation, _NodeStream] = {}
        # Nodes that live and can't be reached from this edge.
        self.out_of_reach: set[NodeIncarnation] = set()

    @property
    def listed(self) -> int:
        return len(self._cluster.nodes)

    @property
    def proven(self) -> int:
        return len(self._cluster.nodes.keys() - self.out_of_reach)

    def is_given_up(self, incarnation: NodeIncarnation) -> bool:
        return incarnation in self.out_of_reach

    def keep(self, nodes: Mapping[NodeIncarnation, str]) -> None:
        """Nothing is to be opened."""

    def drop(self, incarnation: NodeIncarnation) -> None:
        self._streams.pop(incarnation, None)

    def send(self, placement: Placement, command: EdgeCommand) -> None:
        asyncio.get_running_loop().call_soon(self._send, placement, command)

    def _send(self, placement: Placement, command: EdgeCommand) -> None:
        incarnation = placement.incarnation
        node = self._cluster.nodes.get(incarnation)
        if node is None or incarnation in self.out_of_reach:
            self._listener.node_lost(incarnation, "not there", reached=False)
            return
        stream = self._streams.get(incarnation)
        if stream is None:
            stream = self._streams[incarnation] = _NodeStream(incarnation, self._listener)
        self._cluster.command(node, stream, command)

    async def read_events(
        self, user: UserKey, wanted: EventRange, near: Placement | None
    ) -> EventPage:
        return self._cluster.read(user, wanted)

    async def list_threads(
        self, user: UserKey, limit: int, page: str, near: Placement | None
    ) -> ThreadPage:
        return self._cluster.threads(user)


class MemoryViolations:
    """`edge.uplink.port.Violations` that keeps what it was told."""

    def __init__(self) -> None:
        self.reported: list[Violation] = []

    def report(self, violation: Violation) -> None:
        self.reported.append(violation)


class MemoryAuth:
    """`edge.uplink.port.Auth` that knows the identities it was given, by token."""

    def __init__(self) -> None:
        self.connected = True
        self.tokens: dict[str, Identity] = {}
        self.tickets: dict[str, Identity] = {}

    def check_token(self, token: str, traceparent: str = "") -> "asyncio.Future[Identity]":
        return _settled(self.tokens.get(token))

    def redeem_ticket(
        self, ticket: str, origin: str, traceparent: str = ""
    ) -> "asyncio.Future[Identity]":
        return _settled(self.tickets.pop(ticket, None))

    def issue_ticket(self, token: str, origin: str) -> "asyncio.Future[TicketIssued]":
        identity = self.tokens.get(token)
        if identity is None:
            return _settled(None)
        ticket = f"ticket-{len(self.tickets)}"
        self.tickets[ticket] = identity
        return _settled(TicketIssued(ticket, 30))

    def redeem_login(self, code: str) -> "asyncio.Future[LoggedIn]":
        return _settled(None)


def _settled(value: T | None) -> "asyncio.Future[T]":
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    if value is None:
        future.set_exception(StewardError(Reason.TOKEN_INVALID, "not known"))
    else:
        future.set_result(value)
    return future
