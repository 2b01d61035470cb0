"""The host of managers in the simulation: real grants and managers, the rules of `ManagerHost`.

Seal, then read, then run; commands of a stale epoch are refused; a manager that ended is
never made again under its epoch; effects are carried out in order.
"""

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from agent_service.core import commands as to_manager
from agent_service.core import effects as from_manager
from agent_service.core.grants import Grant, GrantRefused
from agent_service.core.journal import AppendOutcome, Committed, Fenced, Seal, SealOutcome
from agent_service.core.manager import Manager
from agent_service.host.activation import make_manager
from steward.errors import Reason
from steward.model.keys import EdgeId, Epoch, UserKey
from steward.model.placement import Placement
from steward.model.verbs import RunKey, Verb
from steward.testing.faults import POLICY, TRACE, WALL_MS
from steward.testing.simulated_agent import PlayedRun
from steward.testing.simulated_network import End

if TYPE_CHECKING:
    from steward.testing.simulated_node import SimulatedNode

SWEEP_MS = 250
IDLE_MS = 300


@dataclass(slots=True)
class Live:
    """A manager and what its agents do."""

    manager: Manager
    runs: dict[RunKey, PlayedRun] = field(default_factory=dict)
    unneeded_ms: int | None = None


@dataclass(slots=True)
class _Activation:
    """A manager in the making, and the commands that wait for it."""

    epoch: Epoch
    waiting: list[Any]


class SimulatedHost:
    """All managers of one node process."""

    run: type[PlayedRun] = PlayedRun

    def __init__(self, node: "SimulatedNode") -> None:
        self.node = node
        self.live: dict[UserKey, Live] = {}
        self._activations: dict[UserKey, _Activation] = {}
        self._edges: dict[EdgeId, End] = {}
        self._streams = itertools.count(1)
        self._seals = itertools.count(1)
        node.after(SWEEP_MS, self._sweep)

    @property
    def open_runs(self) -> int:
        return sum(live.manager.open_runs for live in self.live.values())

    # ---- what the rest of the node tells the host

    def granted(self, placements: tuple[Placement, ...]) -> None:
        book = self.node.book
        if book is None:
            return
        for placement in placements:
            book.learn(placement)
            live = self.live.get(placement.user)
            if live is not None and live.manager.epoch < placement.epoch:
                self.fence(live, placement.epoch, "a higher epoch was granted")

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
        live = self.live.get(user)
        activation = self._activations.get(user)
        attach = isinstance(command, to_manager.AttachEdge)
        if live is not None and epoch == live.manager.epoch:
            self.handle(live, command)
        elif activation is not None and epoch == activation.epoch:
            activation.waiting.append(command)
        elif live is not None and epoch < live.manager.epoch:
            self._refuse(user, epoch, command, Reason.EPOCH_STALE, live.manager.epoch)
        elif activation is not None and attach:
            self._refuse(user, epoch, command, Reason.EPOCH_STALE, activation.epoch)
        elif not attach:
            self._refuse(user, epoch, command, Reason.PLACEMENT_UNKNOWN, Epoch(0))
        elif self.node.book is None:
            self._refuse(user, epoch, command, Reason.NODE_DRAINING, Epoch(0))
        else:
            self._activations[user] = _Activation(epoch, [command])
            self._grant(user, epoch, command.gap_ms)

    def verbs(self, user: UserKey, verbs: tuple[Verb, ...]) -> None:
        live = self.live.get(user)
        if live is not None:
            self.handle(live, to_manager.ApplyVerbs(verbs))

    # ---- activation: grant, seal, read, run

    def _grant(self, user: UserKey, epoch: Epoch, gap_ms: int) -> None:
        book = self.node.book
        assert book is not None
        try:
            self._seal(book.take(user, epoch), user, epoch, gap_ms)
            return
        except GrantRefused as refused:
            if refused.kind not in ("unknown_placement", "forged_epoch"):
                self._failed(user, Reason.EPOCH_STALE, refused.known)
                return

        def confirmed(placement: Placement | None) -> None:
            # The push may be behind the edge's attach: it was asked for once.
            if placement is None:
                self._failed(user, Reason.MANAGER_UNAVAILABLE, Epoch(0))
                return
            book.learn(placement)
            try:
                grant = book.take(user, epoch)
            except GrantRefused as refused:
                stale = Reason.EPOCH_STALE if refused.known else Reason.PLACEMENT_UNKNOWN
                self._failed(user, stale, refused.known)
            else:
                self._seal(grant, user, epoch, gap_ms)

        self.node.confirm(user, confirmed)

    def _seal(self, grant: Grant, user: UserKey, epoch: Epoch, gap_ms: int) -> None:
        began_ms = self.node.clock.now()
        seal = Seal(user, epoch, f"{self.node.process}.{next(self._seals)}")

        def sealed(outcome: SealOutcome) -> None:
            if isinstance(outcome, Fenced):
                # The grant is spent: whoever comes next needs a new placement.
                self._give_back(user, epoch, "activation failed")
                self._failed(user, Reason.EPOCH_STALE, outcome.fence)
                return
            before = self.live.get(user)
            manager = make_manager(grant, outcome, POLICY)
            if before is not None:
                self.fence(before, epoch, "a higher epoch was sealed")
            live = self.live[user] = Live(manager)
            took_ms = self.node.clock.now() - began_ms
            self.began(live)
            self._perform(live, self.begin(live, gap_ms + took_ms if gap_ms else 0))
            activation = self._activations.pop(user)
            for command in activation.waiting:
                self.handle(live, command)

        self.node.log.write(seal, sealed)

    def begin(self, live: Live, gap_ms: int) -> list[from_manager.Effect]:
        now, wall = self.node.clock.now(), WALL_MS + self.node.clock.now()
        return live.manager.begin(now, wall, gap_ms, TRACE)

    def began(self, live: Live) -> None:
        self.node.world.note(
            "{}: manager of {} begins under {}",
            self.node.process,
            live.manager.user,
            live.manager.epoch,
        )

    def _failed(self, user: UserKey, reason: Reason, known: Epoch) -> None:
        activation = self._activations.pop(user)
        for command in activation.waiting:
            self._refuse(user, activation.epoch, command, reason, known)

    # ---- carrying out effects

    def handle(self, live: Live, command: Any) -> None:
        now = self.node.clock.now()
        self._perform(live, live.manager.handle(now, command, WALL_MS + now))
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
        self._give_back(manager.user, manager.epoch, effect.cause)
        for edge_id in manager.edges:
            end = self._edges.get(edge_id)
            if end is not None:
                end.send(("lost", manager.user, manager.epoch, effect.reason, effect.fence))

    def _give_back(self, user: UserKey, epoch: Epoch, cause: str) -> None:
        if self.node.book is not None:
            self.node.book.forget(user, epoch)
        self.node.release(user, epoch, cause)

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
