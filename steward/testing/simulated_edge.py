"""An edge process in the simulation: real attachments and sessions, the rules of its host.

One attachment per user with somebody connected, one session per connection, one stream per node
incarnation, one session with the registry. What is live is compared with the attached epoch
before anything else; what is missing is read from the log through a node.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from agent_service.core import commands as to_manager
from agent_service.core import effects as from_manager
from edge.core import attachment_values as att
from edge.core import commands as words
from edge.core import session_values as val
from edge.core.attachment import Attachment
from edge.core.batch import EventBatch
from edge.core.resume import ResumePoint, StreamHead, is_ahead
from edge.core.server_messages import Limits
from edge.core.session import EdgeSession, SessionState
from registry_service.core import commands as to_registry
from registry_service.core import effects as from_registry
from steward.errors import Reason
from steward.model.keys import (
    ConnectionId,
    EdgeId,
    Epoch,
    NodeIncarnation,
    RunId,
    ThreadId,
    UserKey,
)
from steward.model.placement import Placement
from steward.testing.faults import TRACE
from steward.testing.invariants import Invariants
from steward.testing.simulated_network import End, Network, Process, Uplink
from steward.testing.simulated_node import SimulatedNode
from steward.testing.simulated_registry import SimulatedRegistry
from steward.testing.world import World

LIMITS = Limits(65_536, 1_000_000, 16, 25_000)
RESOLVE_MS = 3_000
READ_MS = 5_000
FOR_EVER_MS = 1 << 40


class Connection:
    """One client's connection at this edge."""

    def __init__(self, audience: "Audience", end: End, session: EdgeSession, name: str) -> None:
        self.audience = audience
        self.edge = audience.edge
        self.end = end
        self.session = session
        self.name = name
        self._timer: int | None = None
        end.on_message = self._received
        end.on_end = self._gone

    def deliver(self, batch: EventBatch) -> None:
        if self.session.offer(batch):
            self.end.send(("events", batch))
        else:
            self.apply(self.session.repair(self.edge.clock.now(), batch))

    def handle(self, command: val.Command) -> None:
        self.apply(self.session.handle(self.edge.clock.now(), command))

    def apply(self, effects: list[val.Effect]) -> None:
        for effect in effects:
            match effect:
                case val.SendEvents(batch):
                    self.end.send(("events", batch))
                case val.Send(kind, payload):
                    self.end.send((kind, payload))
                case val.SendPing():
                    self.end.send(("ping", b""))
                case val.ReadPage():
                    self.edge.read_page(self, effect)
                case val.SubmitCommand(ref, command):
                    self.audience.submit(self, ref, command)
                case val.Close() | val.Abort():
                    self.audience.leave(self)
                    self.end.close()
                case _:
                    pass
        if not self.session.closing:
            self._set_timer(self.session.next_deadline())

    def _set_timer(self, deadline: int) -> None:
        if self._timer is None or deadline < self._timer:
            self._timer = deadline
            wait_ms = max(deadline - self.edge.clock.now(), 0)
            self.edge.after(wait_ms, partial(self._tick, deadline))

    def _tick(self, due: int) -> None:
        if self._timer == due and self.end.open and not self.session.closing:
            self._timer = None
            self.handle(val.Tick())

    def _received(self, payload: bytes) -> None:
        self.session.last_in = self.edge.clock.now()
        if payload:
            self.handle(val.TextReceived(payload))

    def _gone(self) -> None:
        if not self.session.closing:
            self.handle(val.PeerLeft())
        self.audience.leave(self)


class Audience:
    """All connections of one user at this edge, and their tie to the manager."""

    def __init__(self, edge: "SimulatedEdge", user: UserKey) -> None:
        self.edge = edge
        self.user = user
        # What the edge knows of a user, it knows as long as somebody is connected.
        self.name = f"{edge.process}#{next(edge.numbers)}"
        spread = edge.world.between(0, 1000)
        now = edge.clock.now()
        self.attachment = Attachment(now, user, 1_000_000, edge.numbers, spread)
        self.connections: tuple[Connection, ...] = ()
        self.sequence = 0
        self._tickets = itertools.count(1)
        self._outcomes: dict[int, Callable[[words.CommandOutcome], None]] = {}
        self._timer: int | None = None

    def join(self, connection: Connection) -> None:
        self.connections = (*self.connections, connection)
        head = self.attachment.head(self.sequence)
        if head is not None and is_ahead(connection.session.point, head):
            self.handle(att.Behind())
        elif head is not None:
            connection.handle(val.StreamAttached(head))
        self.handle(att.Occupied(TRACE))

    def leave(self, connection: Connection) -> None:
        if connection in self.connections:
            self.connections = tuple(c for c in self.connections if c is not connection)
            if not self.connections:
                self.handle(att.Vacated())

    def submit(self, connection: Connection, ref: str, command: words.UserCommand) -> None:
        ticket = next(self._tickets)
        self._outcomes[ticket] = lambda outcome: connection.handle(val.CommandSettled(ref, outcome))
        self.handle(att.Submit(ticket, TRACE, command))

    def deliver(self, source: NodeIncarnation, epoch: int, batch: EventBatch) -> None:
        if not self.edge.takes(self.attachment, source, epoch):
            self.edge.dropped += 1
            return
        self.edge.invariants.heard(self.name, self.user, epoch)
        self.sequence = max(self.sequence, batch.last)
        for connection in self.connections:
            connection.deliver(batch)

    def handle(self, command: att.Command) -> None:
        for effect in self.attachment.handle(self.edge.clock.now(), command):
            self._do(effect)
        deadline = self.attachment.next_deadline()
        if deadline is not None and (self._timer is None or deadline < self._timer):
            self._timer = deadline
            wait_ms = max(deadline - self.edge.clock.now(), 0)
            self.edge.after(wait_ms, partial(self._tick, deadline))

    def _tick(self, due: int) -> None:
        if self._timer == due:
            self._timer = None
            self.handle(att.Tick())

    def _do(self, effect: att.Effect) -> None:
        match effect:
            case att.ResolveManager(min_epoch):
                self.edge.resolve(self.user, min_epoch, self.handle)
            case att.SendCommand(placement, command):
                self.edge.send(placement, command)
            case att.HeadKnown(head):
                self.edge.invariants.heard(self.name, self.user, head.epoch)
                self.sequence = max(self.sequence, head.sequence)
                self._attached(head)
            case att.HeadRefreshed(head):
                self.sequence = max(self.sequence, head.sequence)
                for connection in self.connections:
                    if connection.session.state is SessionState.ATTACHING:
                        connection.handle(val.StreamAttached(head))
            case att.SearchFailed(reason):
                for connection in self.connections:
                    if connection.session.state is SessionState.ATTACHING:
                        connection.handle(val.AttachFailed(reason))
            case att.EndSessions(reason):
                for connection in self.connections:
                    connection.handle(val.End(reason))
            case att.Settle(ticket, outcome):
                waiting = self._outcomes.pop(ticket, None)
                if waiting is not None:
                    waiting(outcome)
            case att.Over():
                self._outcomes.clear()
                self.edge.forget(self)

    def _attached(self, head: StreamHead) -> None:
        for connection in self.connections:
            connection.handle(val.StreamAttached(head))


class _NodeLink:
    """The stream to one incarnation: opened by the first command, over when it ends."""

    def __init__(self, edge: "SimulatedEdge", node: SimulatedNode, wanted: NodeIncarnation) -> None:
        self.wanted = wanted
        self.waiting: list[Any] = []
        self.end: End | None = None
        self.reached = False
        self._edge = edge
        hello = ("stream", wanted, edge.name)
        edge.network.connect(edge, node, hello, self._opened, self._over)

    def send(self, message: Any) -> None:
        if self.reached and self.end is not None:
            self.end.send(message)
        else:
            self.waiting.append(message)

    def _opened(self, end: End) -> None:
        self.end = end
        end.on_message = self._message
        end.on_end = self._over

    def _message(self, message: Any) -> None:
        match message:
            case ("welcome",):
                self.reached = True
                assert self.end is not None
                for waiting in self.waiting:
                    self.end.send(waiting)
                self.waiting.clear()
            case ("stale",):
                pass  # Another incarnation answers at this address; the end follows.
            case _:
                self._edge.from_node(self.wanted, message)

    def _over(self) -> None:
        self._edge.link_over(self)


class SimulatedEdge(Process):
    """One edge process. Clients open streams with (user, name, resume point)."""

    def __init__(
        self,
        name: str,
        world: World,
        network: Network,
        registry: SimulatedRegistry,
        nodes: dict[str, SimulatedNode],
        invariants: Invariants,
        rate: int,
    ) -> None:
        super().__init__(world, network, name, rate)
        self.invariants = invariants
        self.dropped = 0
        self._registry = registry
        self._nodes = nodes

    def begin(self) -> None:
        self.process = f"{self.name}/{self.life}"
        self.numbers: Iterator[int] = itertools.count(1)
        self._audiences: dict[UserKey, Audience] = {}
        self._links: dict[NodeIncarnation, _NodeLink] = {}
        self._asked: dict[int, tuple[UserKey, int, Callable[[att.Command], None]]] = {}
        self._questions = itertools.count(1)
        self._uplink = Uplink(
            self,
            lambda: (self._registry, "edge"),
            up=self._up,
            message=self._from_registry,
        )

    def crash(self, *, silent: bool = False) -> None:
        if self.alive:
            super().crash(silent=silent)
            self.world.after(self.world.between(200, 1_500), self.start)

    # ---- clients

    def accepted(self, end: End, hello: tuple[UserKey, str, ResumePoint]) -> None:
        user, name, point = hello
        audience = self._audiences.get(user)
        if audience is None:
            audience = self._audiences[user] = Audience(self, user)
        connection_id = ConnectionId(f"{name}@{self.process}")
        now = self.clock.now()
        start = val.SessionStart(connection_id, user, point, LIMITS, 0, FOR_EVER_MS, "", heard=True)
        connection = Connection(audience, end, EdgeSession(now, start), name)
        audience.join(connection)
        connection.apply([])

    def forget(self, audience: Audience) -> None:
        if self._audiences.get(audience.user) is audience:
            del self._audiences[audience.user]

    def takes(self, attachment: Attachment, source: NodeIncarnation, epoch: int) -> bool:
        """P15: whether a delivery is of the manager that counts here."""
        return epoch == attachment.live_epoch and source == attachment.live_node

    # ---- the registry

    def resolve(self, user: UserKey, min_epoch: int, answer: Callable[[att.Command], None]) -> None:
        number = next(self._questions)
        self._asked[number] = (user, min_epoch, answer)
        self._ask(number)

        def late() -> None:
            if self._asked.pop(number, None) is not None:
                answer(att.ResolveFailed(Reason.MANAGER_UNAVAILABLE, 1_000))

        self.after(RESOLVE_MS, late)

    def _ask(self, number: int) -> None:
        user, min_epoch, _ = self._asked[number]
        query = to_registry.UserQuery(user, Epoch(min_epoch))
        self._uplink.send(lambda peer: to_registry.ResolveManagers(peer, number, (query,)))

    def _up(self) -> None:
        edge_id = EdgeId(self.name)
        self._uplink.send(lambda peer: to_registry.OpenEdgeSession(peer, edge_id))
        self._uplink.settled()
        for number in list(self._asked):
            self._ask(number)

    def _from_registry(self, message: Any) -> None:
        match message:
            case from_registry.ManagersResolved(request_id, results):
                asked = self._asked.pop(request_id, None)
                if asked is not None:
                    result = results[0]
                    if isinstance(result, Placement):
                        asked[2](att.Resolved(result))
                    else:
                        asked[2](att.ResolveFailed(result.reason, result.retry_after_ms))
            case from_registry.NodeFenced(incarnation):
                self._tell(incarnation, fenced=True)
            case from_registry.PlacementMoved(placement):
                audience = self._audiences.get(placement.user)
                if audience is not None:
                    audience.handle(att.PlacementMoved(placement))
            case from_registry.EvictSessions(user):
                audience = self._audiences.get(user)
                if audience is not None:
                    audience.handle(att.Evicted())
            case _:
                pass

    def _tell(self, incarnation: NodeIncarnation, *, fenced: bool) -> None:
        for audience in list(self._audiences.values()):
            placement = audience.attachment.placement
            if placement is not None and placement.incarnation == incarnation:
                audience.handle(att.NodeLost(incarnation, fenced))

    # ---- nodes

    def send(self, placement: Placement, command: words.EdgeCommand) -> None:
        link = self._link(placement.incarnation)
        link.send((command.user, command.epoch, _manager_command(command)))

    def _link(self, incarnation: NodeIncarnation) -> _NodeLink:
        link = self._links.get(incarnation)
        if link is None:
            node = self._nodes[incarnation.node_id]
            link = self._links[incarnation] = _NodeLink(self, node, incarnation)
        return link

    def link_over(self, link: _NodeLink) -> None:
        if self._links.get(link.wanted) is not link:
            return
        del self._links[link.wanted]
        if not link.reached:
            wanted = link.wanted
            self._uplink.send(
                lambda peer: to_registry.ReportUnreachable(peer, wanted, "out of reach")
            )
        self._tell(link.wanted, fenced=False)

    def from_node(self, source: NodeIncarnation, message: Any) -> None:
        kind, user, epoch, *rest = message
        audience = self._audiences.get(user)
        if audience is None:
            return
        if kind == "deliver":
            first, payloads = rest
            audience.deliver(source, epoch, EventBatch(first, payloads))
        elif kind == "lost":
            reason, fence = rest
            lost = words.ManagerLost(reason, fence)
            audience.handle(att.Answered(words.Answer(user, epoch, 0, lost)))
        else:
            answer, known = rest
            body = _answer_body(answer, known)
            audience.handle(att.Answered(words.Answer(user, epoch, answer.command_id, body)))

    # ---- reading what is missing

    def read_page(self, connection: Connection, page: val.ReadPage, wait_ms: int = 20) -> None:
        """Read until there is something or the connection is gone; another node each time."""
        done = [False]

        def again() -> None:
            if not done[0] and connection.end.open and not connection.session.closing:
                done[0] = True
                longer = min(wait_ms * 2, 1_000)
                self.after(wait_ms, lambda: self.read_page(connection, page, longer))

        def arrived(read: Any) -> None:
            if done[0] or not connection.end.open or connection.session.closing:
                return
            if not read.events:
                again()
                return
            done[0] = True
            first = page.after + 1
            same = read.stream_id == connection.session.stream_id
            whole = read.sequences == tuple(range(first, first + len(read.events)))
            found = val.PageRead(EventBatch(first, read.events))
            connection.handle(found if same and whole else val.ReadFailed())

        def opened(end: End) -> None:
            end.on_message = arrived
            end.on_end = again

        node = self.world.random.choice(tuple(self._nodes.values()))
        hello = ("read", None, (connection.audience.user, page.after, page.until))
        self.network.connect(self, node, hello, opened, again)
        self.after(READ_MS, again)


def _manager_command(command: words.EdgeCommand) -> Callable[[EdgeId], Any]:
    """The same command as the manager takes it, once the node has named the stream."""
    number = command.command_id
    match command.body:
        case words.Attach(gap_ms):
            return lambda edge: to_manager.AttachEdge(edge, number, gap_ms)
        case words.Detach():
            return to_manager.DetachEdge
        case words.SubmitMessage(id, content, thread, agent, overlap):
            trace = command.traceparent
            return lambda edge: to_manager.SubmitMessage(
                edge, number, id, content, ThreadId(thread), agent, overlap, trace
            )
        case words.CancelRun(run_id, thread):
            return lambda edge: to_manager.CancelRun(
                edge,
                number,
                RunId(run_id),
                ThreadId(thread),
            )
        case body:
            raise TypeError(f"clients of the simulation send no {type(body).__name__}")


def _answer_body(answer: Any, known: Epoch) -> words.AnswerBody:
    match answer:
        case from_manager.AnswerAttached():
            return words.Attached(answer.stream_id, answer.sequence, answer.oldest_sequence)
        case from_manager.AnswerAccepted():
            return words.Accepted(
                answer.id,
                answer.run_id,
                answer.sequence,
                answer.duplicate,
                answer.queue_position,
            )
        case from_manager.AnswerCancelled():
            return words.CancelAccepted(answer.run_id)
        case _:
            return words.Refused(answer.reason, answer.message, answer.retry_after_ms, known)
