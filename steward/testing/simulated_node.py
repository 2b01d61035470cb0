"""A node process in the simulation: real grants and managers; host and agents are played."""

from collections.abc import Callable
from dataclasses import dataclass

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
    Fenced,
    Seal,
    SealOutcome,
)
from agent_service.core.manager import Manager
from agent_service.host.activation import make_manager
from registry_service.core import commands as to_registry
from registry_service.core import effects as from_registry
from registry_service.core.config import RegistryConfig
from registry_service.core.transactions import NodeClaim
from steward.errors import Reason
from steward.model.keys import Epoch, NodeId, NodeIncarnation, UserKey
from steward.model.placement import Placement
from steward.model.verbs import EmitEvent, EventType, FinishRun, Outcome, RunKey, Verb
from steward.testing.faults import EDGE, POLICY, TRACE, WALL_MS
from steward.testing.simulated_log import SimulatedLog
from steward.testing.simulated_registry import SimulatedRegistry
from steward.testing.world import World


@dataclass(slots=True)
class _Hosted:
    """A manager on a played node."""

    manager: Manager
    waiting: Append | None = None


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
