"""The host: makes, feeds and drops the managers of one node incarnation.

It is the only importer of `Manager`, and it makes one only from a grant: seal, then
read, then run. All of it runs on one event loop; a manager is touched by nobody else.

Guarantees: commands of a stale epoch are refused and reported; a manager that ended is
never made again under its epoch (its placement is given back); effects are carried out in order.
A log that fails for good ends the process through `failed`. Once it knows that this
incarnation is over (`fence`, or that the process stood still for longer than its lease, which
is asked before each step or batch of steps, and again before what they led to leaves), nothing
goes out any more: no bytes, no append, no tool.
It does not decide who owns a user.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from agent_service.core.commands import (
    ApplyVerbs,
    AttachEdge,
    Command,
    DetachEdge,
    Evict,
    Fence,
    FinishAppend,
    HandOff,
    Release,
    SubmitMessage,
)
from agent_service.core.effects import EndManager
from agent_service.core.grants import GrantRefused
from agent_service.core.journal import Fenced, Seal
from agent_service.core.manager import UNCERTAIN, Manager
from agent_service.core.policy import ManagerPolicy
from agent_service.host.activation import Activation, Departure, make_manager
from agent_service.host.appends import Appends
from agent_service.host.change import Change
from agent_service.host.edges import EdgeCommand, EdgeStreams
from agent_service.host.granted import Granted
from agent_service.host.holdings import Holdings
from agent_service.host.neighbours import Neighbours
from agent_service.host.performing import Performer
from agent_service.host.ports import EdgePort, RegistryPort, RunPort, ViolationPort
from agent_service.host.run_starts import RunStarts
from agent_service.host.spans import HostSpans
from agent_service.host.standstill import Standstill
from agent_service.host.turn import Turn
from agent_service.host.unneeded import UnneededManagers
from agent_service.log.port import EventLog, LogFailed
from steward.errors import Reason, StewardError
from steward.model.keys import EdgeId, Epoch, NodeId, NodeIncarnation, UserKey
from steward.model.placement import Placement
from steward.model.verbs import Verb
from steward.model.violations import Violation, ViolationKind
from steward.runtime.clock import boot_ms, wall_ms
from steward.telemetry.catalog import AgentMetrics
from steward.telemetry.instruments import exemplar_of
from steward.telemetry.logs import BUG, fields
from steward.telemetry.tracing import Tracing, is_sampled

_log = logging.getLogger(__name__)

SWEEP_S = 0.5
SIGN_S = 0.1
QUIET_S = 1.0
"""A draining node waits so long for the registry's next word, then stops by itself."""

HANDOFF_MS = 10_000
MOST_WAITING_COMMANDS = 256
"""Commands of one user that may wait for its manager; the edge repeats what is refused."""

NO_EPOCH = Epoch(0)
STUMBLED = "stumbled over an error"
OwnedUser = tuple[UserKey, Epoch]


class ManagerHost:
    """All managers of a node. `joined` gives it an incarnation; before that it takes nothing."""

    def __init__(
        self,
        log: EventLog,
        registry: RegistryPort,
        policy: ManagerPolicy,
        metrics: AgentMetrics,
        tracing: Tracing,
        violations: ViolationPort,
        *,
        handoff_ms: int = HANDOFF_MS,
    ) -> None:
        """`handoff_ms`: how long open tool calls may hold a manager that is to move."""
        self._log = log
        self._registry = registry
        self._granted = Granted(registry)
        self._policy = policy
        self._metrics = metrics
        self._violations = violations
        self._handoff_ms = handoff_ms
        self._spans = HostSpans(tracing)
        self._turn = Turn(self.is_silent)
        appends = Appends(
            log,
            metrics,
            self._turn,
            self.is_silent,
            self._spans.telling(self._step),
            self._append_refused,
            self._fail,
        )
        self._runs = RunStarts(log, self._turn, self._handle, self._fail)
        self._edges = EdgeStreams()
        self._change = Change()
        self._performer = Performer(
            appends,
            self._edges,
            self._runs,
            self._spans,
            metrics,
            self._end_manager,
            self._change.notify,
        )
        self._unneeded = UnneededManagers()
        self._incarnation: NodeIncarnation | None = None
        self._live: dict[UserKey, Manager] = {}
        self._activations: dict[UserKey, Activation] = {}
        self._departures: dict[UserKey, asyncio.TimerHandle] = {}
        self.holdings = Holdings(self.making)
        self._neighbours = Neighbours()
        self._certain = True
        self._draining = False
        self._drained_by_ms: int | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._standstill = Standstill(boot_ms())
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.fenced: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        metrics.managers.set_function(lambda: len(self._live))
        metrics.runs.set_function(lambda: self.open_runs)
        metrics.queued.set_function(
            lambda: sum(manager.waiting_runs for manager in self._live.values())
        )

    @property
    def managers(self) -> int:
        return len(self._live)

    @property
    def open_runs(self) -> int:
        return sum(manager.open_runs for manager in self._live.values())

    def owned(self) -> list[OwnedUser]:
        """Users who have a live manager here, with its epoch."""
        return [(user, manager.epoch) for user, manager in self._live.items()]

    def making(self) -> list[OwnedUser]:
        """Users whose manager is being made here, with its epoch."""
        return [(user, activation.epoch) for user, activation in self._activations.items()]

    def is_silent(self) -> bool:
        """Whether nothing may go out any more. Asked by whoever has something in hand to send."""
        if not self.fenced.done() and self._standstill.too_long(boot_ms()):
            self._fence_for_standstill()
        return self.fenced.done()

    # What the rest of the node tells the host.

    def run_on(self, runs: RunPort) -> None:
        """Where agent code runs. Called once, before the first attach."""
        self._runs.use(runs)

    def joined(self, incarnation: NodeIncarnation, lease_ms: int = 0) -> None:
        """The registry has given this process its incarnation.

        With `lease_ms`, a process that stood still for longer fences itself.
        """
        self._incarnation = incarnation
        self._granted.join(incarnation)
        if lease_ms:
            self._standstill.allow(boot_ms(), lease_ms)
            self._give_sign()

    def members(self, node_ids: Iterable[NodeId]) -> None:
        """The nodes that could take users over from this one, perhaps with this one among them."""
        self._neighbours.now(node_ids)
        self._change.notify()

    def granted(self, placements: Iterable[Placement], activate: bool = False) -> None:
        """The registry placed users here. A higher epoch than a live manager's ends that one.

        `activate`: make their managers now; nobody may be connected who would ask.
        """
        if not self._granted.joined or self.is_silent():
            return
        for placement in placements:
            user, epoch = placement.user, placement.epoch
            self._granted.learn(placement)
            live = self._live.get(user)
            if live is not None and live.epoch < epoch:
                self._handle(live, Fence(epoch))
            known = self._live.get(user) or self._activations.get(user)
            if activate and self._takes_managers and (known is None or known.epoch < epoch):
                self._activate(user, epoch, None, "")

    def lease_uncertain(self, strict_tenants: Iterable[str]) -> None:
        """The lease could not be renewed in time (P3): make no manager until it is certain.

        Managers of strict tenants stop executing at once, and let go as soon as the log allows.
        """
        self._certain = False
        tenants = frozenset(strict_tenants)
        for live in [live for live in self._live.values() if live.user.tenant in tenants]:
            for key in live.active_keys():
                self._runs.stop(key)
            self._depart(live.user, live.epoch, Release(UNCERTAIN))

    def lease_certain(self) -> None:
        """The lease is renewed again."""
        self._certain = True

    def hand_off(self, users: Iterable[OwnedUser], cause: str) -> None:
        """The registry moves these users: let go of each as soon as its runs allow."""
        until_ms = boot_ms() + self._handoff_ms
        if self._drained_by_ms is not None:
            until_ms = min(until_ms, self._drained_by_ms)
        for user, epoch in users:
            self._depart(user, epoch, HandOff(cause, until_ms))

    def evict(self, users: Iterable[OwnedUser], cause: str = "evicted") -> None:
        """An operator evicts these users: cancel their runs, and let go."""
        for user, epoch in users:
            self._depart(user, epoch, Evict(cause))

    def edge_opened(self, edge: EdgePort) -> None:
        self._edges.opened(edge)

    def edge_closed(self, edge_id: EdgeId) -> None:
        """An edge's stream broke: it attaches again on the next one."""
        self._edges.closed(edge_id)
        for live in list(self._live.values()):
            self._handle(live, DetachEdge(edge_id))

    def command(self, user: UserKey, epoch: Epoch, command: EdgeCommand, trace: str) -> None:
        """A command of an edge, under the epoch that the edge believes in."""
        if self.is_silent():
            return
        if isinstance(command, SubmitMessage):
            self._spans.message(user, command)
        live = self._live.get(user)
        if live is not None and epoch == live.epoch:
            self._handle(live, command)
            return
        activation = self._activations.get(user)
        if activation is not None and epoch == activation.epoch:
            if len(activation.waiting) < MOST_WAITING_COMMANDS:
                activation.waiting.append(command)
            else:
                self._edges.refuse(user, epoch, command, Reason.MANAGER_UNAVAILABLE, NO_EPOCH)
        elif live is not None and epoch < live.epoch:
            self._report(ViolationKind.STALE_EPOCH_COMMAND, user, epoch, "edge command")
            self._edges.refuse(user, epoch, command, Reason.EPOCH_STALE, live.epoch)
        elif activation is not None and epoch < activation.epoch:
            self._edges.refuse(user, epoch, command, Reason.EPOCH_STALE, activation.epoch)
        elif self._granted.was_let_go(user, epoch):
            # It was moved or put away by plan, and the edge has not heard of it yet.
            self._edges.refuse(user, epoch, command, Reason.EPOCH_STALE, NO_EPOCH)
        elif not isinstance(command, AttachEdge):
            self._edges.refuse(user, epoch, command, Reason.PLACEMENT_UNKNOWN, NO_EPOCH)
        elif self._takes_managers:
            self._activate(user, epoch, command, trace)
        else:
            self._edges.refuse(user, epoch, command, Reason.NODE_DRAINING, NO_EPOCH)

    def trimmed(self, user: UserKey, oldest: int) -> None:
        """A page of the log showed from where on a user's events are kept."""
        live = self._live.get(user)
        if live is not None:
            live.trimmed(oldest)

    def verbs(self, verbs: Sequence[Verb]) -> None:
        """A batch of what agents asked for, over all users, in order per run."""
        if self.is_silent():
            return
        by_user: dict[UserKey, list[Verb]] = {}
        for verb in verbs:
            by_user.setdefault(verb.key.user, []).append(verb)
        with self._turn:
            for user, mine in by_user.items():
                live = self._live.get(user)
                if live is not None:
                    self._step(live, ApplyVerbs(tuple(mine)))

    def construction_refused(self, how: str) -> None:
        """Somebody in this process tried to make a manager by hand; see `ConstructionWatch`."""
        self._report(ViolationKind.DIRECT_CONSTRUCTION, None, NO_EPOCH, how)

    def passivate_after(self, idle_ms: int) -> None:
        """From now on, put managers away that nobody needed for `idle_ms`. Call once."""

        def sweep() -> None:
            for live in self._unneeded.due(boot_ms() - idle_ms):
                self._handle(live, Release("passivated"))
            self._again("sweep", SWEEP_S, sweep)

        sweep()

    # The end of the node.

    async def drain(self, runs_s: float, appends_s: float, moves_s: float = 0.0) -> None:
        """Take no new manager, and let go of all.

        For `moves_s`, as long as there are other nodes, the registry moves managers to them (it was
        told of the drain). What is left then, or at once, gets `runs_s`, a half of it for its runs
        to end, the rest for open tool calls alone, and `appends_s` for the last records; the
        next start goes on from there.
        """
        self._draining = True
        loop = asyncio.get_running_loop()
        self._drained_by_ms = boot_ms() + int(moves_s * 1000)
        await self._moved_away(loop.time() + moves_s)
        half_s = runs_s / 2
        if not await self._change.until(lambda: not self.open_runs, loop.time() + half_s):
            _log.info("runs were still open at the stop", extra=fields(runs=self.open_runs))
        stop = Release("stopped", boot_ms() + int(half_s * 1000))
        for user, epoch in [*self.owned(), *((u, a.epoch) for u, a in self._activations.items())]:
            self._depart(user, epoch, stop)
        if not await self._change.until(lambda: not self._busy, loop.time() + half_s + appends_s):
            _log.warning("managers did not let go in time", extra=fields(managers=len(self._live)))

    @property
    def _busy(self) -> bool:
        return bool(self._live or self._activations)

    @property
    def _has_others(self) -> bool:
        own = self._incarnation.node_id if self._incarnation is not None else None
        return self._neighbours.others(own)

    @property
    def _takes_managers(self) -> bool:
        return self._granted.joined and self._certain and not self._draining

    async def _moved_away(self, deadline: float) -> None:
        """Wait while the registry moves managers away; give up when it is quiet."""
        loop = asyncio.get_running_loop()
        while self._busy and self._has_others and loop.time() < deadline:
            heard = await self._change.next(min(deadline, loop.time() + QUIET_S))
            if not heard and not self._departures:
                return  # The registry is away, or has nobody to move them to.

    def fence(self, cause: str) -> None:
        """This incarnation is over (P11): at once, and for good. Safe to call twice.

        Agents are cancelled, managers dropped, edges' streams ended without what waits in them.
        """
        if self.fenced.done():
            return
        self.fenced.set_result(cause)
        _log.error(
            "this incarnation is over",
            extra=fields(
                cause=cause,
                managers=len(self._live),
                do="nothing once: it is started again; if it comes often, see why it stood still",
            ),
        )
        self._edges.abort()
        self._runs.silence()
        for activation in self._activations.values():
            activation.task.cancel()
        for live in self._live.values():
            for key in live.active_keys():
                self._runs.stop(key)
            live.handle(boot_ms(), Fence(NO_EPOCH), wall_ms())
        self._live.clear()
        self._change.notify()

    def _fence_for_standstill(self) -> None:
        stood_ms, managers = self._standstill.stood_ms, len(self._live)
        self.fence(f"this process stood still for {stood_ms} ms, longer than its lease")
        evidence = f"stood_ms={stood_ms} managers={managers}"
        self._report(ViolationKind.NODE_STOOD_STILL, None, NO_EPOCH, evidence)

    def _give_sign(self) -> None:
        if self._standstill.sign(boot_ms()):
            self._again("sign", SIGN_S, self._give_sign)
        elif not self.fenced.done():
            self._fence_for_standstill()

    def _again(self, name: str, after_s: float, action: Callable[[], None]) -> None:
        self._timers[name] = asyncio.get_running_loop().call_later(after_s, action)

    async def close(self) -> None:
        """Cancel what is being prepared. Safe to call twice."""
        for timer in [*self._timers.values(), *self._departures.values()]:
            timer.cancel()
        tasks = [activation.task for activation in self._activations.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._runs.close()

    # Activation: grant, seal, read, run.

    def _activate(
        self, user: UserKey, epoch: Epoch, command: AttachEdge | None, trace: str
    ) -> Activation:
        activation = Activation(epoch, [command] if command is not None else [])
        making = self._make_manager(user, activation, trace)
        activation.task = asyncio.ensure_future(making)
        self._activations[user] = activation
        activation.task.add_done_callback(partial(self._activated, user, activation))
        return activation

    def _activated(
        self, user: UserKey, activation: Activation, task: "asyncio.Future[None]"
    ) -> None:
        # A higher grant may have begun another one meanwhile.
        if self._activations.get(user) is activation:
            del self._activations[user]
        self._change.notify()
        if self.is_silent():
            return
        live = self._live.get(user)
        failed = task.cancelled() or task.exception() is not None
        if failed or live is None or live.epoch != activation.epoch:
            self._not_activated(user, activation, None if task.cancelled() else task.exception())
            return
        for command in activation.waiting:
            self._handle(live, command)
        self._unneeded.note(live, boot_ms())
        if activation.departure is not None:
            self._depart(user, activation.epoch, activation.departure)

    def _not_activated(
        self, user: UserKey, activation: Activation, failure: BaseException | None
    ) -> None:
        epoch, departure = activation.epoch, activation.departure
        reason, known = Reason.MANAGER_UNAVAILABLE, NO_EPOCH
        match failure:
            case GrantRefused(kind, known):
                reason = Reason.PLACEMENT_UNKNOWN if not known else Reason.EPOCH_STALE
                self._report(ViolationKind(kind), user, epoch, "attach")
            case StewardError():
                reason = failure.reason
            case LogFailed():
                self._fail(failure)
            case None:
                pass  # Made and over again at once, or this node ends; the edge resolves anew.
            case _:
                _log.error("a manager could not be made", exc_info=failure, extra=fields(do=BUG))
        if departure is not None:
            handoff = isinstance(departure, HandOff)
            self._granted.let_go(user, epoch, departure.cause, handoff=handoff, activate=False)
        elif failure is not None and activation.granted:
            # The grant is spent: whoever comes next needs a new placement.
            self._granted.give_back(user, epoch, "activation failed")
        for command in activation.waiting:
            self._edges.refuse(user, epoch, command, reason, known)

    async def _make_manager(self, user: UserKey, activation: Activation, trace: str) -> None:
        started = time.monotonic()
        span = self._spans.activating(trace)
        epoch = activation.epoch
        grant = await self._granted.take(user, epoch)
        activation.granted = True
        waiting = span.context if is_sampled(span.context) else ""
        sealed = await self._log.seal(Seal(user, epoch, secrets.token_hex(8), waiting))
        if isinstance(sealed, Fenced):
            # Should the registry have lost its past, this is how it learns of it.
            self._registry.report_log_head(sealed.fence)
            raise GrantRefused(ViolationKind.STALE_SEAL, sealed.fence)
        if self.is_silent():
            raise StewardError(Reason.NODE_DRAINING, "this incarnation is over")
        before = self._live.get(user)
        if before is not None and before.epoch > epoch:
            # A later placement was quicker: the seal is over already.
            raise StewardError(Reason.EPOCH_STALE, "a later manager of this user is here")
        manager = make_manager(grant, sealed, self._policy)
        self.holdings.made(manager)
        if before is not None:
            self._handle(before, Fence(epoch))
        self._live[user] = manager
        took_s = time.monotonic() - started
        gap_ms = self._gap_ms(activation, manager, int(took_s * 1000))
        trace = self._spans.activated(manager, sealed, span)
        self._metrics.activate_seconds.observe(took_s, exemplar_of(trace))
        effects = manager.begin(boot_ms(), wall_ms(), gap_ms, trace)
        self._performer.perform(manager, effects)

    def _gap_ms(self, activation: Activation, manager: Manager, took_ms: int) -> int | None:
        """How long somebody, or an open run, waited for this manager, as far as is known here."""
        gaps = [one.gap_ms for one in activation.waiting if isinstance(one, AttachEdge)]
        if gaps:
            return max(gaps) + took_ms if max(gaps) else 0
        if not manager.lost_node:
            return None
        return self._neighbours.gone_ms(manager.lost_node)

    # Departure: by plan, one user at a time.

    def _depart(self, user: UserKey, epoch: Epoch, departure: Departure) -> None:
        """End the manager of (user, epoch), or the one in the making, or let the placement go."""
        if self.is_silent():
            return
        self._change.notify()
        live, activation = self._live.get(user), self._activations.get(user)
        if live is not None and live.epoch == epoch:
            self._send_off(live, departure)
        elif activation is not None and activation.epoch == epoch:
            if not isinstance(activation.departure, Evict):
                activation.departure = departure
        elif self._granted.was_let_go(user, epoch):
            handoff = isinstance(departure, HandOff)
            self._granted.say_again(user, epoch, departure.cause, handoff=handoff)
        elif isinstance(departure, Evict):
            # Its runs are to be cancelled, and only a manager can say so in the log.
            self._activate(user, epoch, None, "").departure = departure
        else:
            handoff = isinstance(departure, HandOff)
            self._granted.let_go(user, epoch, departure.cause, handoff=handoff, activate=False)

    def _send_off(self, live: Manager, departure: Departure) -> None:
        self._handle(live, departure)
        until_ms = live.next_deadline()
        if not live.over and until_ms is not None:
            before = self._departures.pop(live.user, None)
            if before is not None:
                before.cancel()
            loop = asyncio.get_running_loop()
            wait_s = max(until_ms - boot_ms(), 0) / 1000 + 0.001
            timer = loop.call_later(wait_s, self._send_off, live, departure)
            self._departures[live.user] = timer

    # Carrying out effects.

    def _handle(self, live: Manager, command: Command) -> None:
        if not self.is_silent():
            self._step(live, command)

    def _step(self, live: Manager, command: Command) -> None:
        """One step, of several that came together: whether any may be taken was asked for all."""
        now_ms = boot_ms()
        try:
            self._performer.perform(live, live.handle(now_ms, command, wall_ms()))
        except Exception:
            # Of one user: what came with it is of others. What this manager has in memory can't be
            # trusted any more, and all that was acknowledged is in the log.
            _log.exception("a manager stumbled and is ended", extra=fields(do=BUG))
            live.over = True
            self._end_manager(live, EndManager(NO_EPOCH, Reason.MANAGER_MOVED, STUMBLED))
            return
        kind = type(command)
        if kind is FinishAppend or kind is DetachEdge:
            self._unneeded.note(live, now_ms)

    def _end_manager(self, live: Manager, effect: EndManager) -> None:
        user, epoch = live.user, live.epoch
        if self._live.get(user) is live:
            del self._live[user]
            timer = self._departures.pop(user, None)
            if timer is not None:
                timer.cancel()
        self._unneeded.forget(user)
        self._spans.manager_over(live, effect)
        for key in live.active_keys():
            self._runs.stop(key)
        # Never again under this epoch: whoever comes next needs a new placement.
        if effect.reason is Reason.EPOCH_STALE:
            self._granted.give_back(user, epoch, effect.cause)
        else:
            handoff, activate = effect.handoff, effect.activate
            self._granted.let_go(user, epoch, effect.cause, handoff=handoff, activate=activate)
        self._edges.manager_lost(live, effect.reason, effect.fence)
        self._change.notify()

    def _append_refused(self, live: Manager, kind: ViolationKind, evidence: str) -> None:
        stood_ms = self._standstill.recent_ms(boot_ms())
        self._report(kind, live.user, live.epoch, f"{evidence} stood_ms={stood_ms}")

    def _report(
        self, kind: ViolationKind, user: UserKey | None, epoch: Epoch, evidence: str
    ) -> None:
        self._violations.report(Violation(kind, evidence, user, epoch, self._incarnation))

    def _fail(self, failure: BaseException) -> None:
        if not self.failed.done():
            _log.error("the node can't go on", exc_info=failure, extra=fields(do=BUG))
            self.failed.set_result(str(failure))
