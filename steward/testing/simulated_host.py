"""The host of managers in the simulation: real grants and managers, the rules of `ManagerHost`.

Seal, then read, then run; commands of a stale epoch are refused; a manager that ended is
never made again under its epoch; effects are carried out in order.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from agent_service.core import commands as to_manager
from agent_service.core import effects as from_manager
from agent_service.core.grants import Grant, GrantBook, GrantRefused
from agent_service.core.journal import AppendOutcome, Committed, Fenced, Seal, SealOutcome
from agent_service.core.manager import Manager
from agent_service.host.activation import make_manager
from registry_service.core import commands as to_registry
from steward.errors import Reason
from steward.model.keys import EdgeId, Epoch, NodeIncarnation, UserKey
from steward.model.placement import Placement
from steward.model.verbs import RunKey, Verb
from steward.testing.faults import POLICY, TRACE, WALL_MS
from steward.testing.invariants import Invariants
from steward.testing.simulated_agent import PlayedRun
from steward.testing.simulated_log import LogUplink, SimulatedLog
from steward.testing.simulated_network import End
from steward.testing.world import Action, Clock, World

SWEEP_MS = 250
IDLE_MS = 300
HANDOFF_MS = 3_000


class Home(Protocol):
    """The node process around a host: its life, its session with the registry, its log."""

    world: World
    clock: Clock
    invariants: Invariants
    log: LogUplink
    log_process: SimulatedLog
    process: str
    life: int
    incarnation: NodeIncarnation | None
    book: GrantBook | None
    strict: frozenset[str]

    @property
    def running(self) -> bool: ...

    def after(self, delay_ms: int, action: Action) -> None: ...

    def is_silent(self) -> bool: ...

    def lease_over(self) -> bool: ...

    def confirm(self, user: UserKey, answer: Callable[[Placement | None], None]) -> None: ...

    def release(self, release: to_registry.Release) -> None: ...


@dataclass(slots=True)
class Live:
    """A manager and what its agents do."""

    manager: Manager
    runs: dict[RunKey, PlayedRun] = field(default_factory=dict)
    unneeded_ms: int | None = None


@dataclass(slots=True, eq=False)
class _Activation:
    """A manager in the making, what waits for it, and how it is to end at once."""

    user: UserKey
    epoch: Epoch
    gap_ms: int
    waiting: list[Any]
    departure: Any = None
    granted: bool = False


class SimulatedHost:
    """All managers of one node process."""

    run: type[PlayedRun] = PlayedRun

    def __init__(self, node: Home) -> None:
        self.node = node
        self.live: dict[UserKey, Live] = {}
        self._activations: dict[UserKey, _Activation] = {}
        self._gone: dict[UserKey, Epoch] = {}
        self._edges: dict[EdgeId, End] = {}
        self._streams = itertools.count(1)
        self._seals = itertools.count(1)
        node.after(SWEEP_MS, self._sweep)

    @property
    def open_runs(self) -> int:
        return sum(live.manager.open_runs for live in self.live.values())

    # ---- what the rest of the node tells the host

    def granted(self, placements: tuple[Placement, ...], activate: bool = False) -> None:
        """The registry placed users here. A higher epoch than a live manager's ends that one."""
        book = self.node.book
        if book is None or self.node.is_silent():
            return
        for placement in placements:
            user, epoch = placement.user, placement.epoch
            book.learn(placement)
            live = self.live.get(user)
            if live is not None and live.manager.epoch < epoch:
                self.fence(live, epoch, "a higher epoch was granted")
            activation = self._activations.get(user)
            known = live.manager.epoch if live is not None else Epoch(0)
            if live is None and activation is not None:
                known = activation.epoch
            if activate and known < epoch:
                self._activate(user, epoch, None)

    def hand_off(self, users: tuple[Any, ...], cause: str) -> None:
        """The registry moves these users: let go of each as soon as its runs allow."""
        until_ms = self.node.clock.now() + HANDOFF_MS
        for user, epoch in users:
            self._depart(user, epoch, to_manager.HandOff(cause, until_ms))

    def evict(self, users: tuple[Any, ...]) -> None:
        """An operator evicts these users: cancel their runs, and let go."""
        for user, epoch in users:
            self._depart(user, epoch, to_manager.Evict("evicted"))

    def edge_opened(self, end: End) -> None:
        # A number of its own for each stream: a late end of an old one detaches only its own.
        edge_id = EdgeId(f"{end.peer.process.name}#{next(self._streams)}")
        self._edges[edge_id] = end
        end.on_message = lambda message: self._command(edge_id, *message)
        end.on_end = lambda: self._edge_closed(edge_id)

    def _edge_closed(self, edge_id: EdgeId) -> None:
        self._edges.pop(edge_id, None)
        for live in list(self.live.values()):
            self.handle(live, to_manager.DetachEdge(edge_id))

    def _command(self, edge_id: EdgeId, user: UserKey, epoch: Epoch, command: Any) -> None:
        """`command` is made by the edge from the number that its stream has here."""
        self.command(user, epoch, command(edge_id))

    def command(self, user: UserKey, epoch: Epoch, command: Any) -> None:
        if self.node.is_silent():
            return
        live = self.live.get(user)
        activation = self._activations.get(user)
        attach = isinstance(command, to_manager.AttachEdge)
        if live is not None and epoch == live.manager.epoch:
            self.handle(live, command)
        elif activation is not None and epoch == activation.epoch:
            activation.waiting.append(command)
        elif live is not None and epoch < live.manager.epoch:
            self._refuse(user, epoch, command, Reason.EPOCH_STALE, live.manager.epoch)
        elif activation is not None and attach and epoch < activation.epoch:
            self._refuse(user, epoch, command, Reason.EPOCH_STALE, activation.epoch)
        elif self._gone.get(user) == epoch:
            self._refuse(user, epoch, command, Reason.EPOCH_STALE, Epoch(0))
        elif not attach:
            self._refuse(user, epoch, command, Reason.PLACEMENT_UNKNOWN, Epoch(0))
        elif self.node.book is None:
            self._refuse(user, epoch, command, Reason.NODE_DRAINING, Epoch(0))
        else:
            self._activate(user, epoch, command)

    def verbs(self, user: UserKey, verbs: tuple[Verb, ...]) -> None:
        live = self.live.get(user)
        if live is not None:
            self.handle(live, to_manager.ApplyVerbs(verbs))

    # ---- activation: grant, seal, read, run

    def _activate(self, user: UserKey, epoch: Epoch, command: Any) -> _Activation:
        waiting = [command] if command is not None else []
        activation = _Activation(user, epoch, waiting[0].gap_ms if waiting else 0, waiting)
        self._activations[user] = activation
        self._grant(activation)
        return activation

    def _grant(self, activation: _Activation) -> None:
        book, user, epoch = self.node.book, activation.user, activation.epoch
        assert book is not None
        try:
            self._seal(book.take(user, epoch), activation)
            return
        except GrantRefused as refused:
            if refused.kind not in ("unknown_placement", "forged_epoch"):
                self._failed(activation, Reason.EPOCH_STALE, refused.known)
                return

        def confirmed(placement: Placement | None) -> None:
            # The push may be behind the edge's attach: it was asked for once.
            if placement is None:
                self._failed(activation, Reason.MANAGER_UNAVAILABLE, Epoch(0))
                return
            book.learn(placement)
            try:
                grant = book.take(user, epoch)
            except GrantRefused as refused:
                stale = Reason.EPOCH_STALE if refused.known else Reason.PLACEMENT_UNKNOWN
                self._failed(activation, stale, refused.known)
            else:
                self._seal(grant, activation)

        self.node.confirm(user, confirmed)

    def _seal(self, grant: Grant, activation: _Activation) -> None:
        began_ms = self.node.clock.now()
        activation.granted = True
        user, epoch = activation.user, activation.epoch
        seal = Seal(user, epoch, f"{self.node.process}.{next(self._seals)}")

        def sealed(outcome: SealOutcome) -> None:
            if self.node.is_silent():
                return
            if isinstance(outcome, Fenced):
                self._failed(activation, Reason.EPOCH_STALE, outcome.fence)
                return
            before = self.live.get(user)
            manager = make_manager(grant, outcome, POLICY)
            if before is not None:
                self.fence(before, epoch, "a higher epoch was sealed")
            live = self.live[user] = Live(manager)
            took_ms = self.node.clock.now() - began_ms
            gap_ms = activation.gap_ms
            self.began(live)
            self._perform(live, self.begin(live, gap_ms + took_ms if gap_ms else 0))
            self._activated(activation, live)

        self.node.log.write(seal, sealed)

    def _activated(self, activation: _Activation, live: Live) -> None:
        user, epoch = activation.user, activation.epoch
        if self._activations.get(user) is activation:
            del self._activations[user]
        if self.live.get(user) is not live:
            # Made and over again at once; the edge resolves anew.
            for command in activation.waiting:
                self._refuse(user, epoch, command, Reason.MANAGER_UNAVAILABLE, Epoch(0))
            return
        for command in activation.waiting:
            self.handle(live, command)
        if activation.departure is not None:
            self._depart(user, epoch, activation.departure)

    def begin(self, live: Live, gap_ms: int) -> list[from_manager.Effect]:
        now, wall = self.node.clock.now(), WALL_MS + self.node.clock.now()
        return live.manager.begin(now, wall, gap_ms, TRACE)

    def began(self, live: Live) -> None:
        manager, node = live.manager, self.node
        text = "{}: manager of {} begins under {}"
        node.world.note(text, node.process, manager.user, manager.epoch)
        node.invariants.begins(manager.user, manager.epoch)
        if manager.user.tenant in node.strict:
            life = node.life

            def executing() -> bool:
                here = life == node.life and node.running and not manager.over
                return here and not node.lease_over()

            assert node.incarnation is not None
            node.invariants.executes(manager.user, manager.epoch, node.incarnation, executing)

    def _failed(self, activation: _Activation, reason: Reason, known: Epoch) -> None:
        user, epoch, departure = activation.user, activation.epoch, activation.departure
        if self._activations.get(user) is activation:
            del self._activations[user]
        if departure is not None:
            handoff = isinstance(departure, to_manager.HandOff)
            self._let_go(user, epoch, departure.cause, handoff, False)
        elif activation.granted:
            # The grant is spent: whoever comes next needs a new placement.
            self._give_back(user, epoch, "activation failed")
        for command in activation.waiting:
            self._refuse(user, epoch, command, reason, known)

    # ---- departure: by plan, one user at a time

    def _depart(self, user: UserKey, epoch: Epoch, departure: Any) -> None:
        """End the manager of (user, epoch), or the one in the making, or let the placement go."""
        if self.node.is_silent():
            return
        live, activation = self.live.get(user), self._activations.get(user)
        if live is not None and live.manager.epoch == epoch:
            self._send_off(live, departure)
        elif activation is not None and activation.epoch == epoch:
            if not isinstance(activation.departure, to_manager.Evict):
                activation.departure = departure
        elif self._gone.get(user) == epoch:
            pass  # It went before, and the registry has been told.
        elif isinstance(departure, to_manager.Evict):
            # Its runs are to be cancelled, and only a manager can say so in the log.
            self._activate(user, epoch, None).departure = departure
        else:
            handoff = isinstance(departure, to_manager.HandOff)
            self._let_go(user, epoch, departure.cause, handoff, False)

    def _send_off(self, live: Live, departure: Any) -> None:
        self.handle(live, departure)
        until_ms = live.manager.next_deadline()
        if not live.manager.over and until_ms is not None:
            wait_ms = max(until_ms - self.node.clock.now(), 0) + 1
            self.node.after(wait_ms, lambda: self._send_off(live, departure))

    def _let_go(
        self, user: UserKey, epoch: Epoch, cause: str, handoff: bool, activate: bool
    ) -> None:
        """Give a placement back by plan."""
        self._gone[user] = epoch
        self._give_back(user, epoch, cause, handoff, activate)

    # ---- carrying out effects

    def handle(self, live: Live, command: Any) -> None:
        if self.node.is_silent():
            return
        manager = live.manager
        if manager.user.tenant in self.node.strict and self.node.lease_over() and not manager.over:
            # Somebody else may be executing by now: X is promised, so this manager is over (P3).
            command = to_manager.Fence(Epoch(0))
        now = self.node.clock.now()
        self._perform(live, manager.handle(now, command, WALL_MS + now))
        live.unneeded_ms = None if not live.manager.idle else live.unneeded_ms or now

    def fence(self, live: Live, fence: Epoch, cause: str) -> None:
        """Something is known that ends this manager."""
        manager = live.manager
        self.node.invariants.knows_over(self.node.process, manager.user, manager.epoch, cause)
        self.handle(live, to_manager.Fence(fence))

    def _perform(self, live: Live, effects: list[from_manager.Effect]) -> None:
        for effect in effects:
            self.perform(live, effect)

    def perform(self, live: Live, effect: Any) -> None:
        match effect:
            case from_manager.WriteAppend():
                self.write(live, effect)
            case from_manager.Deliver():
                self.deliver(live, effect)
            case from_manager.AnswerAttached() | from_manager.AnswerAccepted():
                self._answer(live.manager.user, live.manager.epoch, effect, Epoch(0))
            case from_manager.AnswerRefused() | from_manager.AnswerCancelled():
                self._answer(live.manager.user, live.manager.epoch, effect, Epoch(0))
            case from_manager.StartRun():
                self._start_run(live, effect)
            case from_manager.StopRun(key):
                self._stop_run(live, key)
            case from_manager.AcknowledgeVerbs(acknowledged):
                run = live.runs.get(acknowledged.key)
                if run is not None:
                    run.acknowledged(acknowledged.number)
            case from_manager.EndManager():
                self.end_manager(live, effect)
            case _:
                pass

    def acted(self, live: Live, what: str) -> None:
        manager = live.manager
        self.node.invariants.acted(self.node.process, manager.user, manager.epoch, what)

    def write(self, live: Live, effect: from_manager.WriteAppend) -> None:
        self.acted(live, "append")
        append = effect.append
        self.node.log.write(
            append, lambda outcome: self.appended(live, append.append_number, outcome)
        )

    def appended(self, live: Live, number: int, outcome: AppendOutcome) -> None:
        manager = live.manager
        if not isinstance(outcome, Committed):
            cause = f"append {number} was refused"
            self.node.invariants.knows_over(self.node.process, manager.user, manager.epoch, cause)
        self.handle(live, to_manager.FinishAppend(number, outcome))

    def deliver(self, live: Live, effect: from_manager.Deliver) -> None:
        self.acted(live, "delivery")
        manager = live.manager
        for edge_id in effect.edges:
            end = self._edges.get(edge_id)
            if end is not None:
                end.send(("deliver", manager.user, manager.epoch, effect.first, effect.payloads))

    def _answer(self, user: UserKey, epoch: Epoch, answer: Any, known: Epoch) -> None:
        end = self._edges.get(answer.edge_id)
        if end is not None:
            end.send(("answer", user, epoch, answer, known))

    def _refuse(
        self, user: UserKey, epoch: Epoch, command: Any, reason: Reason, known: Epoch
    ) -> None:
        if not isinstance(command, to_manager.DetachEdge):
            refused = from_manager.AnswerRefused(command.edge_id, command.command_id, reason, "")
            self._answer(user, epoch, refused, known)

    def end_manager(self, live: Live, effect: from_manager.EndManager) -> None:
        manager = live.manager
        self.node.world.note(
            "{}: manager of {} under {} is over: {}",
            self.node.process,
            manager.user,
            manager.epoch,
            effect.cause,
        )
        if self.live.get(manager.user) is live:
            del self.live[manager.user]
        for run in live.runs.values():
            run.stop()
        user, epoch = manager.user, manager.epoch
        if effect.reason is Reason.EPOCH_STALE:
            self._give_back(user, epoch, effect.cause)
        else:
            self._let_go(user, epoch, effect.cause, effect.handoff, effect.activate)
        for edge_id in manager.edges:
            end = self._edges.get(edge_id)
            if end is not None:
                end.send(("lost", user, epoch, effect.reason, effect.fence))

    def _give_back(
        self,
        user: UserKey,
        epoch: Epoch,
        cause: str,
        handoff: bool = False,
        activate: bool = False,
    ) -> None:
        if self.node.book is not None:
            self.node.book.forget(user, epoch)
        self.node.release(to_registry.Release(user, epoch, cause, handoff, activate))

    # ---- runs

    def _start_run(self, live: Live, effect: from_manager.StartRun) -> None:
        self.acted(live, "run")
        run = live.runs[effect.key] = self.run(self, live, effect)
        run.prepare()

    def _stop_run(self, live: Live, key: RunKey) -> None:
        run = live.runs.pop(key, None)
        if run is not None:
            run.stop()

    def stored_events(self, user: UserKey, run_id: str) -> list[dict[str, Any]]:
        """The events of a run, as its journal shows them."""
        page = self.node.log_process.state._streams[user].events
        wanted = b'"run_id":"%b"' % run_id.encode()
        return [orjson.loads(e.payload) for e in page if wanted in e.payload]

    # ---- passivation

    def _sweep(self) -> None:
        before = self.node.clock.now() - IDLE_MS
        for live in list(self.live.values()):
            since = live.unneeded_ms
            if since is not None and since <= before and live.manager.idle:
                self.handle(live, to_manager.Release("passivated"))
        self.node.after(SWEEP_MS, self._sweep)
