"""The real cores of registry, managers and log in one seeded world with faults (level S1).

`Simulation(seed).run()` plays a cluster of nodes, users who send messages and agents that
answer, while nodes are killed and paused, the registry and the log process restart, and
store results are lost. Invariants are checked at every step, and liveness at the end:
after the faults, every message has its run and every run exactly one end.

What is real: `Registry` on `MemoryDisk`, `GrantBook` and `Manager`, `LogState`. What is
played: the host (activation, appends, resends), the edge (attach, catch-up, epoch
check) and the agents. A guard can be taken away by replacing a part (see `LogState`
subclasses in the tests): then some seed must break an invariant.

It is long because the played parts share the state of one world: a fault of a node touches
its host, its edges and its agents in one step, and that step is to be read in one place.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import orjson

from agent_service.core.commands import ApplyVerbs, AttachEdge, FinishAppend, SubmitMessage
from agent_service.core.commands import Command as ManagerCommand
from agent_service.core.effects import (
    AnswerAccepted,
    AnswerAttached,
    AnswerRefused,
    Deliver,
    EndManager,
    StartRun,
    StopRun,
    WriteAppend,
)
from agent_service.core.effects import Effect as ManagerEffect
from agent_service.core.grants import GrantBook, GrantRefused
from agent_service.core.journal import (
    Append,
    AppendOutcome,
    Committed,
    Fenced,
    Seal,
    Sealed,
    SealOutcome,
)
from agent_service.core.manager import Manager
from agent_service.core.policy import AgentPolicy, ManagerPolicy
from agent_service.host.activation import make_manager
from agent_service.log.memory import LogState
from agent_service.log.port import ReadRange
from registry_service.core import commands as to_registry
from registry_service.core import effects as from_registry
from registry_service.core.config import RegistryConfig
from registry_service.core.registry import Registry
from registry_service.core.transactions import Committed as StoreCommitted
from registry_service.core.transactions import NodeClaim, Unknown, UserPlaced
from registry_service.store.memory import MemoryDisk
from steward.client.checks import check_stream
from steward.errors import Reason
from steward.model.keys import EdgeId, Epoch, NodeId, NodeIncarnation, StreamId, ThreadId, UserKey
from steward.model.placement import Placement
from steward.model.verbs import EmitEvent, EventType, FinishRun, Outcome, RunKey, Verb
from steward.testing.invariants import InvariantBroken, Invariants
from steward.testing.world import Link, World

POLICY = ManagerPolicy((AgentPolicy("played", "queue"),), messages_per_minute=1_000_000)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
EDGE = EdgeId("edge-0")
WALL_MS = 1_700_000_000_000


@dataclass(frozen=True, slots=True)
class Faults:
    """How often what goes wrong, as mean milliseconds between two; 0 means never."""

    kill_ms: int = 1_500
    pause_ms: int = 2_500
    longest_pause_ms: int = 9_000
    registry_restart_ms: int = 6_000
    log_restart_ms: int = 4_000
    unknown_store_result: float = 0.05


@dataclass(slots=True)
class _Hosted:
    """A manager on a played node."""

    manager: Manager
    waiting: Append | None = None


class SimulatedLog:
    """The log process: requests reach it late, answers return late, a restart loses both."""

    def __init__(self, world: World, state: LogState, invariants: Invariants) -> None:
        self._world = world
        self.state = state
        self._invariants = invariants
        self._life = 0
        self._heads: dict[UserKey, int] = {}
        self.listeners: list[Callable[[], None]] = []
        self.fenced = 0

    def append(self, append: Append, answer: Callable[[AppendOutcome], None]) -> None:
        life = self._life
        self._world.after(self._delay(), lambda: self._append(life, append, answer))

    def seal(self, seal: Seal, answer: Callable[[SealOutcome], None]) -> None:
        life = self._life
        self._world.after(self._delay(), lambda: self._seal(life, seal, answer))

    def read(self, user: UserKey, after: int, until: int) -> tuple[bytes, ...]:
        wanted = ReadRange(after=after, until=until, limit=1000, max_bytes=1 << 22)
        return self.state.read(user, wanted).events

    def restart(self) -> None:
        """Lose what is under way, in both directions, and start again."""
        self._life += 1
        self._world.after(200, self._reconnect)

    def _reconnect(self) -> None:
        for resend in self.listeners:
            resend()

    def _while(self, life: int, action: Callable[[], None]) -> Callable[[], None]:
        """`action`, unless the process was restarted before it happens."""
        return lambda: action() if life == self._life else None

    def _append(self, life: int, append: Append, answer: Callable[[AppendOutcome], None]) -> None:
        if life != self._life:
            return
        before = self._heads.get(append.user, 0)
        outcome = self.state.append(append)
        if isinstance(outcome, Committed) and outcome.next_sequence - 1 != before:
            self._heads[append.user] = outcome.next_sequence - 1
            self._invariants.stored(append, before)
        if isinstance(outcome, Fenced):
            self.fenced += 1
        self._world.after(self._delay(), self._while(life, lambda: answer(outcome)))

    def _seal(self, life: int, seal: Seal, answer: Callable[[SealOutcome], None]) -> None:
        if life == self._life:
            outcome = self.state.seal(seal)
            if isinstance(outcome, Sealed):
                self._invariants.sealed(seal.user, seal.epoch)
            self._world.after(self._delay(), self._while(life, lambda: answer(outcome)))

    def _delay(self) -> int:
        return self._world.random.choice((0, 1, 1, 2, 5, 30))


class SimulatedRegistry:
    """The registry process over its disk. Peers are numbers; what is sent to a lost one is lost."""

    def __init__(self, world: World, invariants: Invariants, faults: Faults) -> None:
        self._world = world
        self._invariants = invariants
        self._faults = faults
        self._disk = MemoryDisk(lambda: WALL_MS + world.now_ms)
        self._peers = 0
        self._life = 0
        self._receivers: dict[to_registry.PeerId, Callable[[from_registry.Message], None]] = {}
        self._links: dict[to_registry.PeerId, Link] = {}
        self.dial: Callable[[str], to_registry.DialOutcome] = lambda _: (
            to_registry.DialOutcome.ACCEPTED
        )
        self.restarted: list[Callable[[], None]] = []
        self.fences = 0
        self._start()

    def connect(self, receive: Callable[[from_registry.Message], None]) -> to_registry.PeerId:
        self._peers += 1
        peer = to_registry.PeerId(self._peers)
        self._receivers[peer] = receive
        self._links[peer] = Link(self._world, 0, 8)
        return peer

    def tell(self, command: to_registry.Command) -> None:
        """A command on its way; lost when the registry restarts meanwhile."""
        life = self._life
        self._world.after(
            self._world.random.randint(0, 6), self._while(life, lambda: self._handle(command))
        )

    def restart(self) -> None:
        self._receivers.clear()
        self._start()
        for reconnect in self.restarted:
            self._world.after(self._world.random.randint(50, 400), reconnect)

    def _while(self, life: int, action: Callable[[], None]) -> Callable[[], None]:
        """`action`, unless the process was restarted before it happens."""
        return lambda: action() if life == self._life else None

    def _start(self) -> None:
        self._life += 1
        self._machine = Registry(RegistryConfig())
        self._term, view = self._disk.open()
        self._handle(to_registry.Recover(view))

    def _handle(self, command: to_registry.Command) -> None:
        for effect in self._machine.handle(self._world.now_ms, command):
            self._perform(effect)
        deadline = self._machine.next_deadline()
        if deadline is not None:
            life = self._life
            self._world.at(deadline, lambda: self._tick(life))

    def _tick(self, life: int) -> None:
        deadline = self._machine.next_deadline()
        if life == self._life and deadline is not None and deadline <= self._world.now_ms:
            self._handle(to_registry.Tick())

    def _perform(self, effect: from_registry.Effect) -> None:
        life = self._life
        match effect:
            case from_registry.Commit():
                self._world.after(
                    self._world.random.randint(0, 5), lambda: self._commit(life, effect)
                )
            case from_registry.Send(peer, message):
                receiver = self._receivers.get(peer)
                if receiver is not None:
                    self._links[peer].send(self._while(life, lambda: receiver(message)))
            case from_registry.Close(peer):
                self._receivers.pop(peer, None)
            case from_registry.Dial(dial, address):
                outcome = self.dial(address)
                self._world.after(
                    2,
                    self._while(life, lambda: self._handle(to_registry.FinishDial(dial, outcome))),
                )
            case from_registry.NodeLost():
                self.fences += 1
            case _:
                pass

    def _commit(self, life: int, effect: from_registry.Commit) -> None:
        luck = self._world.random.random()
        lost = luck < self._faults.unknown_store_result
        if life != self._life or (lost and luck < self._faults.unknown_store_result / 2):
            outcome: object = Unknown()  # It never got there.
        else:
            outcome = self._disk.apply(self._term, effect.operations)
            if isinstance(outcome, StoreCommitted):
                for result in outcome.results:
                    if isinstance(result, UserPlaced) and result.created:
                        self._invariants.created(result.placement)
            if lost:
                outcome = Unknown()  # It was done, and the answer is lost.
        if life == self._life:
            self._handle(
                to_registry.FinishTransaction(effect.transaction, outcome)  # type: ignore[arg-type]
            )


class SimulatedNode:
    """A node process: its grants, its managers, its agents. Killed, paused, and started again."""

    def __init__(
        self, name: str, world: World, registry: SimulatedRegistry, log: SimulatedLog
    ) -> None:
        self.name = NodeId(name)
        self.address = f"{name}:1"
        self._world = world
        self._registry = registry
        self._log = log
        self.alive = False
        self.life = 0
        self.incarnation: NodeIncarnation | None = None
        self._paused_until = 0
        self._last_tick_ms = 0
        self._edge: Callable[[NodeIncarnation, str, object], None] = lambda *_: None
        self.broke: Callable[[SimulatedNode, NodeIncarnation | None], None] = lambda *_: None
        self._hosted: dict[UserKey, _Hosted] = {}
        log.listeners.append(lambda: self.later(self._resend))
        registry.restarted.append(lambda: self.later(self._join))
        self.start()

    def start(self) -> None:
        self.life += 1
        self.alive = True
        self._nonce = f"{self.name}/{self.life}"
        self.incarnation = None
        self._book: GrantBook | None = None
        self._peer: to_registry.PeerId | None = None
        self._hosted = {}
        self._making: dict[UserKey, list[AttachEdge]] = {}
        self._stopped: set[RunKey] = set()
        self._last_tick_ms = self._world.now_ms
        self._join()
        self._tick(self.life)

    def kill(self) -> None:
        """SIGKILL; the supervisor starts it again after a second."""
        if not self.alive:
            return
        self.alive = False
        incarnation, self.incarnation = self.incarnation, None
        peer = self._peer
        if peer is not None:
            end = to_registry.CloseNodeSession(peer, to_registry.StreamEnd.RESET)
            self._world.after(8, lambda: self._registry.tell(end))
        self._world.after(8, lambda: self.broke(self, incarnation))
        self._world.after(1_000, self.start)

    def pause(self, for_ms: int) -> None:
        """SIGSTOP: everything that reaches it waits, its own timers too."""
        self._paused_until = max(self._paused_until, self._world.now_ms + for_ms)

    def later(self, action: Callable[[], None], delay_ms: int = 0) -> None:
        """Something for this process: lost if it died, late if it is paused."""
        life = self.life

        def arrive() -> None:
            if life != self.life or not self.alive:
                return
            if self._world.now_ms < self._paused_until:
                self._world.at(self._paused_until, arrive)
            else:
                action()

        self._world.after(delay_ms, arrive)

    def connect_edge(self, receive: Callable[[NodeIncarnation, str, object], None]) -> None:
        self._edge = receive

    def command(self, user: UserKey, epoch: Epoch, command: AttachEdge | SubmitMessage) -> None:
        """What `ManagerHost.command` decides."""
        hosted = self._hosted.get(user)
        if hosted is not None and hosted.manager.epoch == epoch:
            self._handle(hosted, command)
        elif not isinstance(command, AttachEdge) or (
            hosted is not None and epoch < hosted.manager.epoch
        ):
            self._answer(user, AnswerRefused(EDGE, command.command_id, Reason.EPOCH_STALE, ""))
        elif user in self._making:
            self._making[user].append(command)
        else:
            self._activate(user, epoch, command)

    def _join(self) -> None:
        claim = NodeClaim(self.name, "boot", self._nonce, self.address, capacity=10_000)
        life = self.life
        peer = self._registry.connect(
            lambda message: (
                self.later(lambda: self._receive(message)) if life == self.life else None
            )
        )
        self._peer = peer
        self._registry.tell(to_registry.OpenNodeSession(peer, claim))

    def _receive(self, message: from_registry.Message) -> None:
        match message:
            case from_registry.NodeWelcome(node_rev):
                incarnation = NodeIncarnation(self.name, node_rev)
                if self._book is None:
                    self.incarnation = incarnation
                    self._book = GrantBook(incarnation)
                elif incarnation != self.incarnation:
                    self.kill()
            case from_registry.PlacementsGranted(placements):
                for placement in placements:
                    self._learn(placement)
            case from_registry.PlacementsConfirmed(_, placements):
                for placement in placements:
                    self._learn(placement)
            case from_registry.NodeFenced():
                self.kill()
            case from_registry.Refused(reason):
                if reason is Reason.NODE_ID_IN_USE:
                    self.later(self._join, 200)
                else:
                    self.kill()
            case _:
                pass

    def _learn(self, placement: Placement) -> None:
        if self._book is None:
            return
        self._book.learn(placement)
        hosted = self._hosted.get(placement.user)
        if hosted is not None and hosted.manager.epoch < placement.epoch:
            self._end(hosted)

    def _activate(self, user: UserKey, epoch: Epoch, command: AttachEdge) -> None:
        refused = AnswerRefused(EDGE, command.command_id, Reason.PLACEMENT_UNKNOWN, "")
        if self._book is None:
            self._answer(user, refused)
            return
        try:
            grant = self._book.take(user, epoch)
        except GrantRefused:
            if self._peer is not None:
                self._registry.tell(to_registry.ConfirmPlacements(self._peer, 1, (user,)))
            self._answer(user, refused)
            return
        self._making[user] = [command]
        seal = Seal(user, epoch, f"{self._nonce}/{epoch}")

        def sealed(outcome: SealOutcome) -> None:
            waiting = self._making.pop(user, [])
            if isinstance(outcome, Fenced):
                self._release(user, epoch)
                self._answer(user, refused)
                return
            before = self._hosted.get(user)
            if before is not None:
                self._end(before)
            hosted = _Hosted(make_manager(grant, outcome, POLICY))
            self._hosted[user] = hosted
            manager = hosted.manager
            self._perform(hosted, manager.begin(self._world.now_ms, self._wall(), 1, TRACE))
            for attach in waiting:
                self._handle(hosted, attach)

        self._seal(user, seal, sealed)

    def _seal(self, user: UserKey, seal: Seal, answer: Callable[[SealOutcome], None]) -> None:
        """Send a seal, and the identical one again until it is answered."""
        open_ = [True]

        def arrived(outcome: SealOutcome) -> None:
            if open_[0]:
                open_[0] = False
                answer(outcome)

        def send() -> None:
            if open_[0]:
                self._log.seal(seal, lambda outcome: self.later(lambda: arrived(outcome)))
                self.later(send, 500)

        send()

    def _handle(self, hosted: _Hosted, command: ManagerCommand) -> None:
        effects = hosted.manager.handle(self._world.now_ms, command, self._wall())
        self._perform(hosted, effects)

    def _perform(self, hosted: _Hosted, effects: list[ManagerEffect]) -> None:
        user = hosted.manager.user
        for effect in effects:
            match effect:
                case WriteAppend(append):
                    hosted.waiting = append
                    self._append(hosted, append)
                case Deliver():
                    self._answer(user, (hosted.manager.epoch, effect))
                case AnswerAttached():
                    self._answer(user, (hosted.manager.epoch, effect))
                case AnswerAccepted() | AnswerRefused():
                    self._answer(user, effect)
                case StartRun():
                    self._play(hosted, effect)
                case StopRun(key):
                    self._stopped.add(key)
                case EndManager():
                    self._drop(hosted)
                case _:
                    pass

    def _append(self, hosted: _Hosted, append: Append) -> None:
        def answered(outcome: AppendOutcome) -> None:
            if hosted.waiting is append:
                hosted.waiting = None
                self._handle(hosted, FinishAppend(append.append_number, outcome))

        self._log.append(append, lambda outcome: self.later(lambda: answered(outcome)))

    def _resend(self) -> None:
        for hosted in list(self._hosted.values()):
            if hosted.waiting is not None:
                self._append(hosted, hosted.waiting)

    def _end(self, hosted: _Hosted) -> None:
        hosted.manager.over = True
        self._drop(hosted)

    def _drop(self, hosted: _Hosted) -> None:
        user, epoch = hosted.manager.user, hosted.manager.epoch
        if self._hosted.get(user) is hosted:
            del self._hosted[user]
        hosted.waiting = None
        if self._book is not None:
            self._book.forget(user, epoch)
        self._release(user, epoch)
        self._answer(user, epoch)

    def _release(self, user: UserKey, epoch: Epoch) -> None:
        if self._peer is not None:
            release = to_registry.Release(user, epoch, "over")
            self._registry.tell(to_registry.ReleasePlacements(self._peer, 1, (release,)))

    def _play(self, hosted: _Hosted, start: StartRun) -> None:
        """An agent: a thought, a tool, some text, an end, each after its own time."""
        key = start.key
        tool: dict[str, object] = {
            "tool_call_id": f"{key.run_id}.t.1",
            "tool_name": "t",
            "arguments": {},
        }
        done: dict[str, object] = {
            **{name: tool[name] for name in ("tool_call_id", "tool_name")},
            "success": True,
            "result": 1,
            "duration_ms": 1,
        }
        text: dict[str, object] = {"message_id": f"{key.run_id}.m1", "delta": "word "}
        script: list[tuple[EventType, dict[str, object]]] = [
            (EventType.AGENT_THINKING, {"thought": "hm", "delta": False}),
            (EventType.TOOL_EXECUTING, tool),
            (EventType.TOOL_COMPLETED, done),
            *[(EventType.AGENT_TEXT, text)] * self._world.random.randint(1, 4),
        ]
        if self._world.random.random() < 0.2:
            script = script[3:]  # An agent that never thinks.
        verbs: list[Verb] = []
        for number, (kind, data) in enumerate(script, 1):
            call = str(data.get("tool_call_id", ""))
            verbs.append(EmitEvent(key, number, kind, orjson.dumps(data), call))
        end = orjson.dumps({"outcome": "success", "response": "word"})
        verbs.append(FinishRun(key, len(verbs) + 1, Outcome.SUCCESS, end))
        self._speak(hosted, verbs)

    def _speak(self, hosted: _Hosted, verbs: list[Verb]) -> None:
        if not verbs or verbs[0].key in self._stopped:
            return
        count = self._world.random.randint(1, 3)

        def say() -> None:
            self._handle(hosted, ApplyVerbs(tuple(verbs[:count])))
            self._speak(hosted, verbs[count:])

        self.later(say, self._world.random.randint(0, 60))

    def _answer(self, user: UserKey, answer: object) -> None:
        if self.incarnation is not None:
            self._edge(self.incarnation, user.user, (user, answer))

    def _tick(self, life: int) -> None:
        def tick() -> None:
            if life != self.life:
                return
            stood_ms = self._world.now_ms - self._last_tick_ms
            self._last_tick_ms = self._world.now_ms
            if stood_ms > RegistryConfig().ttl_ms:
                self.kill()  # Whoever stood still for longer than its lease is over.
                return
            if self._peer is not None and self.incarnation is not None:
                self._registry.tell(to_registry.ReceiveBeat(self._peer))
                self._registry.tell(to_registry.RenewLease(self._peer, 1))
            self.later(tick, 250)

        self.later(tick, 250)

    def _wall(self) -> int:
        return WALL_MS + self._world.now_ms


@dataclass(slots=True)
class _Attachment:
    """One user at the edge."""

    user: UserKey
    placement: Placement | None = None
    attached: bool = False
    resolving: bool = False
    min_epoch: int = 0
    max_epoch: int = 0
    position: int = 0
    pending: dict[str, SubmitMessage] = field(default_factory=dict)
    accepted: dict[str, str] = field(default_factory=dict)


class SimulatedEdge:
    """One edge with one client per user: resolve, attach, catch up, drop what is stale."""

    def __init__(
        self,
        world: World,
        registry: SimulatedRegistry,
        log: SimulatedLog,
        nodes: dict[str, SimulatedNode],
        invariants: Invariants,
    ) -> None:
        self._world = world
        self._registry = registry
        self._log = log
        self._nodes = nodes
        self._invariants = invariants
        self._links: dict[tuple[str, int], Link] = {}
        self.attachments: dict[UserKey, _Attachment] = {}
        self.dropped = 0
        for node in nodes.values():
            node.connect_edge(self._from_node)
            node.broke = self._broke
        registry.restarted.append(self._connect)
        self._connect()

    def send(self, user: UserKey, message: SubmitMessage) -> None:
        attachment = self.attachments.setdefault(user, _Attachment(user))
        attachment.pending[message.id] = message
        if attachment.attached:
            self._to_node(attachment, message)
        else:
            self._resolve(attachment)

    def poke(self) -> None:
        """Retry whatever is stuck: what the edge's backoff timers do."""
        for attachment in self.attachments.values():
            if not attachment.attached:
                attachment.resolving = False
                self._resolve(attachment)

    def _connect(self) -> None:
        self._peer = self._registry.connect(self._from_registry)
        self._registry.tell(to_registry.OpenEdgeSession(self._peer, EDGE))

    def _resolve(self, attachment: _Attachment) -> None:
        if not attachment.resolving:
            attachment.resolving = True
            query = to_registry.UserQuery(attachment.user, Epoch(attachment.min_epoch))
            self._registry.tell(to_registry.ResolveManagers(self._peer, 1, (query,)))

    def _from_registry(self, message: from_registry.Message) -> None:
        match message:
            case from_registry.ManagersResolved(_, results):
                for result in results:
                    if isinstance(result, Placement):
                        self._placed(result)
                    else:
                        self.attachments[result.user].resolving = False
            case from_registry.NodeFenced(incarnation):
                for attachment in self.attachments.values():
                    placed = attachment.placement
                    if placed is not None and placed.incarnation == incarnation:
                        self._lose(attachment)
            case _:
                pass

    def _placed(self, placement: Placement) -> None:
        attachment = self.attachments[placement.user]
        attachment.resolving = False
        if placement.epoch < attachment.min_epoch:
            return
        attachment.placement = placement
        attachment.attached = False
        self._to_node(attachment, AttachEdge(EDGE, 1, 1))

    def _to_node(self, attachment: _Attachment, command: AttachEdge | SubmitMessage) -> None:
        placement = attachment.placement
        assert placement is not None
        node = self._nodes[placement.node_id]
        if node.incarnation != placement.incarnation:
            report = to_registry.ReportUnreachable(self._peer, placement.incarnation, "refused")
            self._registry.tell(report)
            self._lose(attachment)
            return
        user, epoch = attachment.user, placement.epoch
        self._link("to", node).send(
            lambda: (
                node.later(lambda: node.command(user, epoch, command))
                if node.incarnation == placement.incarnation
                else None
            )
        )

    def _link(self, direction: str, node: SimulatedNode) -> Link:
        key = (f"{direction} {node.name}", node.life)
        if key not in self._links:
            self._links[key] = Link(self._world, 0, 10)
        return self._links[key]

    def _from_node(self, incarnation: NodeIncarnation, _: str, message: object) -> None:
        node = self._nodes[incarnation.node_id]
        self._link("from", node).send(lambda: self._receive(incarnation, message))

    def _receive(self, incarnation: NodeIncarnation, message: object) -> None:
        assert isinstance(message, tuple)
        user, answer = message
        attachment = self.attachments[user]
        match answer:
            case (epoch, AnswerAttached() as attached):
                self._attached(attachment, epoch, attached)
            case (epoch, Deliver() as deliver):
                self._delivered(attachment, epoch, deliver)
            case AnswerAccepted():
                attachment.pending.pop(answer.id, None)
                earlier = attachment.accepted.setdefault(answer.id, answer.run_id)
                if earlier != answer.run_id:
                    raise InvariantBroken(f"{answer.id} was accepted as two runs")
            case AnswerRefused() | int():
                placed = attachment.placement
                if placed is not None and placed.incarnation == incarnation:
                    self._lose(attachment)

    def _attached(self, attachment: _Attachment, epoch: Epoch, attached: AnswerAttached) -> None:
        placed = attachment.placement
        if placed is None or placed.epoch != epoch or epoch < attachment.max_epoch:
            return
        attachment.attached = True
        attachment.max_epoch = epoch
        missing = self._log.read(attachment.user, attachment.position, attached.sequence)
        self._show(attachment, epoch, attachment.position + 1, missing)
        for message in attachment.pending.values():
            self._to_node(attachment, message)

    def _delivered(self, attachment: _Attachment, epoch: Epoch, deliver: Deliver) -> None:
        if epoch < attachment.max_epoch or not attachment.attached:
            self.dropped += 1
            return
        skip = max(attachment.position + 1 - deliver.first, 0)
        if skip < len(deliver.payloads):
            self._show(attachment, epoch, deliver.first + skip, deliver.payloads[skip:])

    def _show(
        self, attachment: _Attachment, epoch: Epoch, first: int, payloads: tuple[bytes, ...]
    ) -> None:
        self._invariants.shown("client", attachment.user, epoch, first, payloads)
        attachment.position = max(attachment.position, first + len(payloads) - 1)

    def _broke(self, node: SimulatedNode, incarnation: NodeIncarnation | None) -> None:
        if incarnation is None:
            return
        self._registry.tell(to_registry.ReportUnreachable(self._peer, incarnation, "reset"))
        for attachment in self.attachments.values():
            placed = attachment.placement
            if placed is not None and placed.incarnation == incarnation:
                self._lose(attachment)

    def _lose(self, attachment: _Attachment) -> None:
        attachment.attached = False
        attachment.resolving = False
        self._world.after(20, lambda: self._resolve(attachment))


class Simulation:
    """One seed. `run` raises InvariantBroken with the step at which something was seen broken."""

    def __init__(
        self,
        seed: int,
        *,
        users: int = 4,
        nodes: int = 3,
        faults: Faults | None = None,
        log: Callable[[Callable[[], StreamId]], LogState] = LogState,
    ) -> None:
        self.seed = seed
        self.world = World(seed)
        self.invariants = Invariants()
        self.faults = faults or Faults()
        numbers = iter(range(1, 1_000_000))
        state = log(lambda: StreamId(f"stream-{next(numbers):08d}"))
        self.log = SimulatedLog(self.world, state, self.invariants)
        self.registry = SimulatedRegistry(self.world, self.invariants, self.faults)
        self.nodes = {
            f"node-{i}": SimulatedNode(f"node-{i}", self.world, self.registry, self.log)
            for i in range(nodes)
        }
        by_address = {node.address: node for node in self.nodes.values()}

        def dial(address: str) -> to_registry.DialOutcome:
            alive = by_address[address].alive
            outcome = to_registry.DialOutcome
            return outcome.ACCEPTED if alive else outcome.REFUSED

        self.registry.dial = dial
        self.edge = SimulatedEdge(self.world, self.registry, self.log, self.nodes, self.invariants)
        self.users = [UserKey("default", f"user-{i}") for i in range(users)]
        self.sent: dict[UserKey, int] = dict.fromkeys(self.users, 0)

    def trace(self) -> str:
        """What happened, as one line: equal for equal seeds."""
        digest = hashlib.blake2b(digest_size=8)
        for user in self.users:
            for payload in self.invariants.events(user):
                digest.update(payload)
        return (
            f"steps={self.world.steps} checks={self.invariants.checked} "
            f"fences={self.registry.fences} refused={self.log.fenced} {digest.hexdigest()}"
        )

    def run(self, *, busy_ms: int = 15_000, quiet_ms: int = 25_000) -> None:
        """Play: messages and faults for `busy_ms`, then only recovery for `quiet_ms`, then look."""
        end_ms = self.world.now_ms + busy_ms
        for user in self.users:
            self._message_at(user, end_ms)
        self._poke_until(end_ms + quiet_ms)
        self._every(self.faults.kill_ms, end_ms, self._kill)
        self._every(self.faults.pause_ms, end_ms, self._pause)
        self._every(self.faults.registry_restart_ms, end_ms, self.registry.restart)
        self._every(self.faults.log_restart_ms, end_ms, self.log.restart)
        try:
            self.world.run(end_ms + quiet_ms, lambda: None)
            self._check_end()
        except InvariantBroken as broken:
            raise InvariantBroken(f"seed {self.seed}, step {self.world.steps}: {broken}") from None

    def _message_at(self, user: UserKey, end_ms: int) -> None:
        def send() -> None:
            if self.world.now_ms >= end_ms:
                return
            self.sent[user] += 1
            number = self.sent[user]
            thread = ThreadId(self.world.random.choice(("main", "main", "side")))
            self.edge.send(
                user,
                SubmitMessage(EDGE, number, f"m{number}", b'"hello"', thread, "", "", TRACE),
            )
            self.world.after(self.world.random.randint(50, 900), send)

        self.world.after(self.world.random.randint(0, 300), send)

    def _poke_until(self, end_ms: int) -> None:
        def poke() -> None:
            self.edge.poke()
            if self.world.now_ms < end_ms - 2_000:
                self.world.after(400, poke)

        self.world.after(400, poke)

    def _every(self, mean_ms: int, end_ms: int, fault: Callable[[], None]) -> None:
        if not mean_ms:
            return

        def strike() -> None:
            if self.world.now_ms < end_ms:
                fault()
                self.world.after(self.world.random.randint(1, 2 * mean_ms), strike)

        self.world.after(self.world.random.randint(1, 2 * mean_ms), strike)

    def _kill(self) -> None:
        self.world.random.choice(list(self.nodes.values())).kill()

    def _pause(self) -> None:
        node = self.world.random.choice(list(self.nodes.values()))
        node.pause(self.world.random.randint(10, self.faults.longest_pause_ms))

    def _check_end(self) -> None:
        """L1: after the faults every message is accepted and every run has one end."""
        for user in self.users:
            attachment = self.edge.attachments.get(user)
            if attachment is None:
                continue
            if attachment.pending:
                raise InvariantBroken(f"L1: {user} waits for {sorted(attachment.pending)}")
            events = [orjson.loads(payload) for payload in self.invariants.events(user)]
            ids = [e["data"]["id"] for e in events if e["type"] == "user_message"]
            if sorted(ids) != sorted(attachment.accepted):
                raise InvariantBroken(f"L1: {user} has {len(ids)} messages for {len(set(ids))} ids")
            ended = sum(event["type"] == "agent_completed" for event in events)
            if ended != len(ids):
                raise InvariantBroken(f"L1: {user} has {len(ids)} messages and {ended} ends")
            if attachment.position != len(events):
                raise InvariantBroken(f"L1: {user} saw {attachment.position} of {len(events)}")
            findings = check_stream(events)
            if findings:
                raise InvariantBroken(f"order: {user}: {findings[0]}")
