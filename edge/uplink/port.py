"""What the edge needs of its peers, whichever transport is behind it.

Two implementations: gRPC (`registry`, `auth`, `nodes`) and in memory (`memory`). None of
these calls waits without a deadline; every future ends with a value or a `StewardError`.
What peers push arrives at the listeners, on the event loop, in order.
"""

from asyncio import Future
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from edge.core.commands import Answer, Delivery, EdgeCommand, TraceAnnounced
from steward.errors import Reason, StewardError
from steward.model.census import Held
from steward.model.identity import Identity
from steward.model.keys import NodeIncarnation, StreamId, UserKey
from steward.model.placement import Placement
from steward.model.violations import Violation


@dataclass(frozen=True, slots=True)
class TicketIssued:
    ticket: str
    expires_in_s: int


@dataclass(frozen=True, slots=True)
class LoggedIn:
    """A fresh token; Unix milliseconds."""

    token: str
    expires_at_ms: int


@dataclass(frozen=True, slots=True)
class EventPage:
    """Stored events, ascending and consecutive unless a thread was asked for."""

    stream_id: StreamId
    events: list[bytes]
    sequences: list[int]
    head: int
    oldest: int
    more: bool


@dataclass(frozen=True, slots=True)
class EventRange:
    """Which events: `after < sequence <= until` (0: no end), at most `limit`.

    `newest` takes the last `limit` instead of the first.
    """

    after: int = 0
    until: int = 0
    limit: int = 500
    thread_id: str = ""
    newest: bool = False


@dataclass(frozen=True, slots=True)
class ThreadSummary:
    thread_id: str
    title: str
    sequence: int
    updated_at: str


@dataclass(frozen=True, slots=True)
class ThreadPage:
    threads: list[ThreadSummary]
    next: str


class RegistryListener(Protocol):
    """What the registry pushes."""

    def cluster_nodes(self, nodes: Mapping[NodeIncarnation, str]) -> None:
        """The nodes that live, with their addresses; after each connect and at each change."""
        ...

    def node_fenced(self, incarnation: NodeIncarnation, cause: str) -> None: ...

    def placement_moved(self, placement: Placement) -> None: ...

    def user_evicted(self, user: UserKey, cause: str) -> None: ...

    def count_connections(self, users: Sequence[UserKey]) -> tuple[int, list[int]]:
        """How many are open here: all, and those of each of these users."""
        ...

    def attachments(self) -> Iterator[Held]:
        """Users who are attached to a manager, each as it is when the walk comes to it."""
        ...


class AuthListener(Protocol):
    """What auth pushes."""

    def user_revoked(self, user: UserKey, issued_before_ms: int) -> None: ...


class NodeListener(Protocol):
    """What agent nodes say, and how they are reached. Answers come before deliveries."""

    def batch_came(self, oldest_append_us: int) -> None:
        """Said before a batch's deliveries: since when the oldest is durable; 0 is unknown.

        In microseconds of the node's wall clock.
        """
        ...

    def answered(self, answers: Sequence[Answer]) -> None: ...

    def announced(self, traces: Sequence[TraceAnnounced]) -> None:
        """Events that are sampled, before they are delivered."""
        ...

    def delivered(self, source: NodeIncarnation, deliveries: Sequence[Delivery]) -> None:
        """Events from this node's stream. Nothing comes of one that was dropped."""
        ...

    def delivered_packed(
        self, source: NodeIncarnation, heads: bytes, frames: bytes | memoryview
    ) -> None:
        """The same for users whose attach named a channel; see `steward.model.deliveries`.

        The bytes of `frames` are good until this returns. Raises
        StewardError(PROTOCOL_VIOLATION) when heads and frames don't fit.
        """
        ...

    def node_lost(self, incarnation: NodeIncarnation, why: str, *, reached: bool) -> None:
        """The stream is over. `reached`: it had been open."""
        ...

    def node_suspected(self, incarnation: NodeIncarnation, evidence: str) -> None:
        """Nothing comes from a node of the list. Said again for as long as it is so."""
        ...

    def node_given_up(self, incarnation: NodeIncarnation) -> None:
        """For so long that its users can't be served from here. Said again likewise."""
        ...


class Registry(Protocol):
    """The single source of truth for where a user's manager is."""

    @property
    def connected(self) -> bool: ...

    def resolve(self, user: UserKey, min_epoch: int, traceparent: str = "") -> "Future[Placement]":
        """The user's placement, made if there is none. Batched with what else waits."""
        ...

    def report_unreachable(self, incarnation: NodeIncarnation, evidence: str) -> None:
        """This edge can't reach that node; the registry decides what it means."""
        ...


class TicketReplayed(StewardError):
    """A ticket that was good once came again. For the client it is like any bad one."""

    def __init__(self, message: str, user: UserKey) -> None:
        """`user` is whose it was."""
        super().__init__(Reason.TOKEN_INVALID, message)
        self.user = user


class Auth(Protocol):
    """Decides who somebody is. Away: StewardError(MANAGER_UNAVAILABLE), never a yes."""

    @property
    def connected(self) -> bool: ...

    def check_token(self, token: str, traceparent: str = "") -> "Future[Identity]":
        """Who the token is of. `traceparent`: of the request, if that is sampled."""
        ...

    def redeem_ticket(self, ticket: str, origin: str, traceparent: str = "") -> "Future[Identity]":
        """Who the ticket stands for, once; TicketReplayed when it came before."""
        ...

    def issue_ticket(self, token: str, origin: str) -> "Future[TicketIssued]": ...

    def redeem_login(self, code: str) -> "Future[LoggedIn]": ...


class Violations(Protocol):
    """Where refusals and breaches go."""

    def report(self, violation: Violation) -> None:
        """Never waits, never raises."""
        ...


class Nodes(Protocol):
    """The streams to agent nodes, one per incarnation: warm to those of the list."""

    @property
    def listed(self) -> int:
        """How many nodes live, by the registry's word."""
        ...

    @property
    def proven(self) -> int:
        """How many of them carry what they should, as far as is known."""
        ...

    def is_given_up(self, incarnation: NodeIncarnation) -> bool:
        """Whether this edge can't reach it, for a while now."""
        ...

    def keep(self, nodes: Mapping[NodeIncarnation, str]) -> None:
        """Hold a stream to each of these, by its address, and to no other in the long run."""
        ...

    def drop(self, incarnation: NodeIncarnation) -> None:
        """It is over: end its stream now. `node_lost` is not said."""
        ...

    def send(self, placement: Placement, command: EdgeCommand) -> None:
        """Send in order. If the stream breaks, `node_lost` says so: commands may be lost."""
        ...

    async def read_events(
        self, user: UserKey, wanted: EventRange, near: Placement | None
    ) -> EventPage:
        """A page of stored events from any live node, `near` first. Raises StewardError."""
        ...

    async def list_threads(
        self, user: UserKey, limit: int, page: str, near: Placement | None
    ) -> ThreadPage:
        """Threads, newest first, from any live node. Raises StewardError."""
        ...
