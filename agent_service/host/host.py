"""The host: makes, feeds and drops the managers of one node incarnation.

It is the only importer of `Manager`, and it makes one only from a grant: seal, then
read, then run. All of it runs on one event loop; a manager is touched by nobody else.

Guarantees: commands of a stale epoch are refused and reported; a manager that ended is
never made again under its epoch (its placement is given back); effects are carried out in order.
A log that fails for good ends the process through `failed`. It does not decide who owns a user.
"""

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from agent_service.core.commands import (
    ApplyVerbs,
    AttachEdge,
    CancelRun,
    Command,
    DetachEdge,
    Fence,
    FinishAppend,
    Release,
    SubmitInput,
    SubmitMessage,
)
from agent_service.core.effects import (
    AcknowledgeVerbs,
    AnswerAccepted,
    AnswerAttached,
    AnswerCancelled,
    AnswerRefused,
    CountRun,
    Deliver,
    Effect,
    EndManager,
    StartRun,
    StopRun,
    WriteAppend,
)
from agent_service.core.grants import Grant, GrantBook, GrantRefused
from agent_service.core.journal import AppendOutcome, Fenced, Seal
from agent_service.core.manager import Manager
from agent_service.core.policy import ManagerPolicy
from agent_service.host.activation import make_manager
from agent_service.host.history import read_history
from agent_service.host.ports import EdgePort, RegistryPort, RunPort
from agent_service.host.spans import HostSpans
from agent_service.log.port import EventLog, LogFailed, LogFull
from steward.errors import Reason, StewardError
from steward.model.keys import EdgeId, Epoch, NodeIncarnation, UserKey
from steward.model.placement import Placement
from steward.model.verbs import EventType, RunKey, RunStart, Verb, VerbsAcknowledged
from steward.runtime.clock import boot_ms, wall_ms
from steward.telemetry.catalog import AgentMetrics
from steward.telemetry.tracing import Tracing

_log = logging.getLogger(__name__)

EdgeCommand = AttachEdge | DetachEdge | SubmitMessage | CancelRun | SubmitInput

SWEEP_S = 0.5
MOST_WAITING_COMMANDS = 256
"""Commands of one user that may wait for its manager; the edge repeats what is refused."""


@dataclass(slots=True)
class _Live:
    """A manager, and the tasks that prepare its runs."""

    manager: Manager
    preparing: dict[RunKey, asyncio.Task[None]] = field(default_factory=dict)


@dataclass(slots=True)
class _Activation:
    """A manager in the making, and the commands that wait for it, in order."""

    epoch: Epoch
    task: asyncio.Task[None]
    waiting: list[EdgeCommand] = field(default_factory=list)


class ManagerHost:
    """All managers of a node. `joined` gives it an incarnation; before that it takes nothing."""

    def __init__(
        self,
        log: EventLog,
        registry: RegistryPort,
        policy: ManagerPolicy,
        metrics: AgentMetrics,
        tracing: Tracing,
    ) -> None:
        self._log = log
        self._registry = registry
        self._policy = policy
        self._metrics = metrics
        self._tracing = tracing
        self._spans = HostSpans(tracing)
        self._runs: RunPort | None = None
        # Managers that nobody needed when it was last looked at, longest first, and since when.
        self._unneeded: OrderedDict[UserKey, tuple[_Live, int]] = OrderedDict()
        self._sweep: asyncio.TimerHandle | None = None
        self._book: GrantBook | None = None
        self._live: dict[UserKey, _Live] = {}
        self._activations: dict[UserKey, _Activation] = {}
        self._edges: dict[EdgeId, EdgePort] = {}
        self._acks: list[VerbsAcknowledged] = []
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()
        self._idle = asyncio.Event()
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        metrics.managers.set_function(lambda: len(self._live))
        metrics.runs.set_function(lambda: self.open_runs)
        metrics.queued.set_function(
            lambda: sum(live.manager.waiting_runs for live in self._live.values())
        )
        self._count_event = {type: metrics.events.labels(type=type.value) for type in EventType}
        self._perform_by_type: dict[type, Callable[[_Live, Effect], None]] = {
            WriteAppend: self._write,  # type: ignore[dict-item]
            Deliver: self._deliver,  # type: ignore[dict-item]
            AnswerAttached: self._answer,  # type: ignore[dict-item]
            AnswerAccepted: self._answer,  # type: ignore[dict-item]
            AnswerCancelled: self._answer,  # type: ignore[dict-item]
            AnswerRefused: self._answer,  # type: ignore[dict-item]
            StartRun: self._start_run,  # type: ignore[dict-item]
            StopRun: self._stop_run,  # type: ignore[dict-item]
            CountRun: self._count_run,  # type: ignore[dict-item]
            AcknowledgeVerbs: self._acknowledge,  # type: ignore[dict-item]
            EndManager: self._end_manager,  # type: ignore[dict-item]
        }

    # What the rest of the node tells the host.

    def run_on(self, runs: RunPort) -> None:
        """Where agent code runs. Called once, before the first attach."""
        self._runs = runs

    def joined(self, incarnation: NodeIncarnation) -> None:
        """The registry has given this process its incarnation."""
        self._book = GrantBook(incarnation)

    def granted(self, placements: Iterable[Placement]) -> None:
        """The registry placed users here. A higher epoch than a live manager's ends that one."""
        if self._book is None:
            return
        for placement in placements:
            self._book.learn(placement)
            live = self._live.get(placement.user)
            if live is not None and live.manager.epoch < placement.epoch:
                self._handle(live, Fence(placement.epoch))

    def edge_opened(self, edge: EdgePort) -> None:
        self._edges[edge.edge_id] = edge

    def edge_closed(self, edge_id: EdgeId) -> None:
        """An edge's stream broke: it attaches again on the next one."""
        self._edges.pop(edge_id, None)
        for live in list(self._live.values()):
            self._handle(live, DetachEdge(edge_id))
            self._note_unneeded(live)

    def command(self, user: UserKey, epoch: Epoch, command: EdgeCommand, trace: str) -> None:
        """A command of an edge, under the epoch that the edge believes in."""
        if isinstance(command, SubmitMessage):
            self._spans.message(user, command)
        live = self._live.get(user)
        if live is not None and epoch == live.manager.epoch:
            self._handle(live, command)
            if isinstance(command, DetachEdge):
                self._note_unneeded(live)
            return
        activation = self._activations.get(user)
        if activation is not None and epoch == activation.epoch:
            if len(activation.waiting) < MOST_WAITING_COMMANDS:
                activation.waiting.append(command)
            else:
                self._refuse(user, epoch, command, Reason.MANAGER_UNAVAILABLE, Epoch(0))
        elif live is not None and epoch < live.manager.epoch:
            self._count_refusal("stale_epoch_command", user, epoch, "edge command")
            self._refuse(user, epoch, command, Reason.EPOCH_STALE, live.manager.epoch)
        elif activation is not None and isinstance(command, AttachEdge):
            self._refuse(user, epoch, command, Reason.EPOCH_STALE, activation.epoch)
        elif not isinstance(command, AttachEdge):
            self._refuse(user, epoch, command, Reason.PLACEMENT_UNKNOWN, Epoch(0))
        elif self._draining or self._book is None:
            self._refuse(user, epoch, command, Reason.NODE_DRAINING, Epoch(0))
        else:
            self._activate(user, epoch, command, trace)

    def verbs(self, verbs: Sequence[Verb]) -> None:
        """A batch of what agents asked for, over all users, in order per run."""
        by_user: dict[UserKey, list[Verb]] = {}
        for verb in verbs:
            self._spans.verb(verb)
            by_user.setdefault(verb.key.user, []).append(verb)
        for user, mine in by_user.items():
            live = self._live.get(user)
            if live is not None:
                self._handle(live, ApplyVerbs(tuple(mine)))

    @property
    def managers(self) -> int:
        return len(self._live)

    @property
    def open_runs(self) -> int:
        return sum(live.manager.open_runs for live in self._live.values())

    def construction_refused(self, how: str) -> None:
        """Somebody in this process tried to make a manager by hand; see `ConstructionWatch`."""
        self._count_refusal("direct_construction", None, Epoch(0), how)

    def passivate_after(self, idle_ms: int) -> None:
        """From now on, put managers away that nobody needed for `idle_ms`. Call once."""
        loop = asyncio.get_running_loop()

        def sweep() -> None:
            self._put_away(boot_ms() - idle_ms)
            self._sweep = loop.call_later(SWEEP_S, sweep)

        sweep()

    def _put_away(self, before_ms: int) -> None:
        while self._unneeded:
            user, (live, since_ms) = next(iter(self._unneeded.items()))
            if since_ms > before_ms:
                return
            del self._unneeded[user]
            if self._live.get(user) is live and live.manager.idle:
                self._handle(live, Release("passivated"))

    def _note_unneeded(self, live: _Live) -> None:
        if live.manager.idle:
            user = live.manager.user
            self._unneeded.pop(user, None)
            self._unneeded[user] = (live, boot_ms())

    async def drain(self, runs_s: float, appends_s: float) -> None:
        """Take no new manager; give runs `runs_s` to end, then release every manager."""
        self._draining = True
        if self.open_runs:
            try:
                await asyncio.wait_for(self._idle.wait(), runs_s)
            except TimeoutError:
                _log.info("runs were still open at the stop", extra={"runs": self.open_runs})
        for live in list(self._live.values()):
            self._handle(live, Release("stopped"))
        try:
            await asyncio.wait_for(self._empty.wait(), appends_s)
        except TimeoutError:
            _log.warning("managers did not let go in time", extra={"managers": len(self._live)})

    async def close(self) -> None:
        """Cancel what is being prepared. Safe to call twice."""
        if self._sweep is not None:
            self._sweep.cancel()
        tasks = [activation.task for activation in self._activations.values()]
        for live in self._live.values():
            tasks.extend(live.preparing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Activation: grant, seal, read, run.

    def _activate(self, user: UserKey, epoch: Epoch, command: AttachEdge, trace: str) -> None:
        task = asyncio.ensure_future(self._make_manager(user, epoch, command.gap_ms, trace))
        self._activations[user] = _Activation(epoch, task, [command])
        task.add_done_callback(partial(self._activated, user))

    def _activated(self, user: UserKey, task: asyncio.Task[None]) -> None:
        activation = self._activations.pop(user)
        if task.cancelled():
            return
        failure = task.exception()
        live = self._live.get(user)
        if failure is None and live is not None:
            for command in activation.waiting:
                self._handle(live, command)
            self._note_unneeded(live)
            return
        reason, known = Reason.MANAGER_UNAVAILABLE, Epoch(0)
        match failure:
            case GrantRefused(kind, known):
                reason = Reason.PLACEMENT_UNKNOWN if not known else Reason.EPOCH_STALE
                self._count_refusal(kind, user, activation.epoch, "attach")
            case StewardError():
                reason = failure.reason
            case LogFailed():
                self._fail(failure)
            case None:
                pass  # Made and over again at once; the edge resolves anew.
            case _:
                _log.error("a manager could not be made", exc_info=failure)
        for command in activation.waiting:
            self._refuse(user, activation.epoch, command, reason, known)

    async def _make_manager(self, user: UserKey, epoch: Epoch, gap_ms: int, trace: str) -> None:
        started = time.monotonic()
        started_ns = time.time_ns()
        grant = await self._grant(user, epoch)
        try:
            sealed = await self._log.seal(Seal(user, epoch, secrets.token_hex(8)))
            if isinstance(sealed, Fenced):
                raise GrantRefused("stale_epoch_seal", sealed.fence)
            manager = make_manager(grant, sealed, self._policy)
        except BaseException:
            # The grant is spent: whoever comes next needs a new placement.
            self._give_back(user, epoch, "activation failed")
            raise
        before = self._live.get(user)
        if before is not None:
            self._handle(before, Fence(epoch))
        live = _Live(manager)
        self._live[user] = live
        self._empty.clear()
        took_s = time.monotonic() - started
        gap_ms = gap_ms + int(took_s * 1000) if gap_ms else 0
        trace = self._tracing.record(
            "manager.activate", trace or self._tracing.new_root(), started_ns, {"epoch": epoch}
        )
        self._metrics.activate_seconds.observe(took_s)
        if gap_ms:
            self._metrics.failover_gap_seconds.observe(gap_ms / 1000)
        self._perform(live, manager.begin(boot_ms(), wall_ms(), gap_ms, trace))

    async def _grant(self, user: UserKey, epoch: Epoch) -> Grant:
        assert self._book is not None
        try:
            return self._book.take(user, epoch)
        except GrantRefused as refused:
            if refused.kind not in ("unknown_placement", "forged_epoch"):
                raise
        # The push may be behind the edge's attach: ask once.
        placement = await self._registry.confirm(user)
        if placement is not None:
            self._book.learn(placement)
        return self._book.take(user, epoch)

    # Carrying out effects.

    def _handle(self, live: _Live, command: Command) -> None:
        self._perform(live, live.manager.handle(boot_ms(), command, wall_ms()))

    def _perform(self, live: _Live, effects: list[Effect]) -> None:
        for effect in effects:
            self._perform_by_type[type(effect)](live, effect)

    def _write(self, live: _Live, effect: WriteAppend) -> None:
        for type in effect.types:
            self._count_event[type].inc()
        try:
            future = self._log.append(effect.append)
        except LogFull:
            # It was never sent, so ending this manager loses nothing that was promised.
            _log.error("the event log takes no more work; a manager is ended")
            self._handle(live, Fence(Epoch(0)))
            return
        future.add_done_callback(
            partial(self._appended, live, effect.append.append_number, time.monotonic())
        )

    def _appended(
        self, live: _Live, number: int, started: float, future: "asyncio.Future[AppendOutcome]"
    ) -> None:
        if future.cancelled():
            return
        failure = future.exception()
        if failure is not None:
            self._fail(failure)
            return
        self._metrics.append_seconds.observe(time.monotonic() - started)
        outcome = future.result()
        if isinstance(outcome, Fenced):
            manager = live.manager
            evidence = f"append {number} met fence {outcome.fence}"
            self._count_refusal("stale_append", manager.user, manager.epoch, evidence)
        self._handle(live, FinishAppend(number, outcome))
        self._note_unneeded(live)

    def _deliver(self, live: _Live, effect: Deliver) -> None:
        for edge_id in effect.edges:
            edge = self._edges.get(edge_id)
            if edge is not None:
                edge.deliver(live.manager.user, live.manager.epoch, effect)

    def _answer(
        self,
        live: _Live,
        effect: AnswerAttached | AnswerAccepted | AnswerCancelled | AnswerRefused,
    ) -> None:
        manager = live.manager
        if isinstance(effect, AnswerAccepted):
            self._spans.accepted(manager.user, manager.epoch, effect)
        edge = self._edges.get(effect.edge_id)
        if edge is not None:
            edge.answer(manager.user, manager.epoch, effect, Epoch(0))

    def _refuse(
        self, user: UserKey, epoch: Epoch, command: EdgeCommand, reason: Reason, known: Epoch
    ) -> None:
        edge = self._edges.get(command.edge_id)
        if edge is not None and not isinstance(command, DetachEdge):
            message = "no manager here under this epoch"
            answer = AnswerRefused(command.edge_id, command.command_id, reason, message)
            edge.answer(user, epoch, answer, known)

    def _start_run(self, live: _Live, effect: StartRun) -> None:
        self._spans.run_started(effect)
        task = asyncio.ensure_future(self._prepare_run(live, effect))
        live.preparing[effect.key] = task
        task.add_done_callback(partial(self._prepared, live, effect.key))

    async def _prepare_run(self, live: _Live, effect: StartRun) -> None:
        content, messages, state = await read_history(self._log, live.manager, effect)
        if self._runs is None:
            raise RuntimeError("run_on was not called")
        self._runs.start_run(
            RunStart(
                effect.key,
                effect.agent,
                effect.thread_id,
                content,
                messages,
                state,
                effect.attempt,
                effect.traceparent,
            )
        )

    def _prepared(self, live: _Live, key: RunKey, task: asyncio.Task[None]) -> None:
        live.preparing.pop(key, None)
        failure = None if task.cancelled() else task.exception()
        if failure is not None:
            self._fail(failure)

    def _stop_run(self, live: _Live, effect: StopRun) -> None:
        preparing = live.preparing.get(effect.key)
        if preparing is not None:
            preparing.cancel()
        elif self._runs is not None:
            self._runs.cancel_run(effect.key)

    def _count_run(self, live: _Live, effect: CountRun) -> None:
        self._spans.run_ended(effect.key, effect.outcome)
        self._metrics.runs_total.labels(outcome=effect.outcome.value).inc()
        if self._draining and not self.open_runs:
            self._idle.set()

    def _acknowledge(self, live: _Live, effect: AcknowledgeVerbs) -> None:
        # One crossing to the agent thread per loop turn, whatever the number of managers.
        if not self._acks:
            asyncio.get_running_loop().call_soon(self._send_acks)
        self._acks.append(effect.acknowledged)

    def _send_acks(self) -> None:
        acks, self._acks = self._acks, []
        if self._runs is not None:
            self._runs.acknowledge(acks)

    def _end_manager(self, live: _Live, effect: EndManager) -> None:
        manager = live.manager
        if self._live.get(manager.user) is live:
            del self._live[manager.user]
        self._unneeded.pop(manager.user, None)
        for key in live.preparing:
            live.preparing[key].cancel()
        if self._runs is not None:
            for key in manager.active_keys():
                self._runs.cancel_run(key)
        # Never again under this epoch: whoever comes next needs a new placement.
        self._give_back(manager.user, manager.epoch, effect.cause)
        for edge_id in manager.edges:
            edge = self._edges.get(edge_id)
            if edge is not None:
                edge.manager_lost(manager.user, manager.epoch, effect.reason, effect.fence)
        if not self._live:
            self._empty.set()

    def _give_back(self, user: UserKey, epoch: Epoch, cause: str) -> None:
        if self._book is not None:
            self._book.forget(user, epoch)
        self._registry.release(user, epoch, cause)

    def _count_refusal(self, kind: str, user: UserKey | None, epoch: Epoch, evidence: str) -> None:
        self._metrics.refusals.labels(kind=kind).inc()
        self._registry.report_refusal(kind, user, epoch, evidence)

    def _fail(self, failure: BaseException) -> None:
        if not self.failed.done():
            _log.error("the node can't go on", exc_info=failure)
            self.failed.set_result(str(failure))
