"""Runs the `Registry` machine: one task owns it, there are no locks.

The rules of order, which the simulation's driver keeps too:

1. Commands are handled one by one, in the order in which they were submitted.
2. The effects of a command are performed in their order before the next command is handled:
   transactions are started first, then messages go to their peers.
3. A message that depends on a write is made only by the command that brings the outcome of that
   write, so nothing is told before it is durable.
4. Then the timer is set to `next_deadline()`; when it comes, a `Tick` is submitted like any other.

What waits in the queue of commands is bounded by the peers: each reads on only after it
submitted, and what waits for the store is bounded in the machine.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from registry_service.core.commands import (
    Command,
    DialId,
    FinishDial,
    FinishTransaction,
    PeerId,
    Recover,
    Tick,
    TransactionId,
)
from registry_service.core.effects import (
    Close,
    Commit,
    Dial,
    Effect,
    GenerationRaised,
    GraceBegun,
    Halt,
    ManagersResolved,
    Message,
    NodeDraining,
    NodeLost,
    NodeUp,
    PlacementEnded,
    Send,
    ViolationSeen,
)
from registry_service.core.registry import Registry, RegistrySnapshot
from registry_service.core.transactions import (
    Committed,
    Outcome,
    RecordViolation,
    StoreOperation,
    TermLost,
)
from registry_service.recorder import ViolationRecorder
from registry_service.store.port import LeadershipOver, PlacementStore, StoreFailed
from registry_service.uplink import Dialer
from registry_service.watch import Tails
from steward.model.keys import NodeIncarnation
from steward.model.placement import Placement
from steward.model.violations import Severity, Violation
from steward.telemetry.catalog import RegistryMetrics
from steward.telemetry.logs import BUG, fields

_log = logging.getLogger(__name__)


class Peer(Protocol):
    """The outgoing side of a stream or a call. Neither method waits or raises."""

    def deliver(self, message: Message) -> None: ...

    def end(self) -> None:
        """Nothing more will come; end after what was delivered."""
        ...


class RegistryDriver:
    """Owns one machine, its store and its timer. `clock` is boot time in milliseconds."""

    def __init__(
        self,
        machine: Registry,
        store: PlacementStore,
        dialer: Dialer,
        metrics: RegistryMetrics,
        clock: Callable[[], int],
    ) -> None:
        self._machine = machine
        self.store = store
        # What watchers of violations and placements wait on, and the way of reports to the store.
        self.tails = Tails()
        self.recorder = ViolationRecorder(store, self._committed)
        self._dialer = dialer
        self._metrics = _Counters(metrics)
        metrics.waiting_commands.set_function(lambda: len(self._commands))
        self._clock = clock
        self._commands: deque[Command] = deque()
        self._peers: dict[PeerId, Peer] = {}
        self._last_peer = 0
        self._dials: set[asyncio.Task[None]] = set()
        self._waker: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ms: int | None = None
        self._task: asyncio.Task[None] | None = None
        self._failure: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        """Open the store and begin. Raises EnvironmentUnusable."""
        view = await self.store.open()
        opened = fields(generation=view.generation, revision=view.revision)
        _log.info("store opened", extra=opened)
        self.tails.advance(self.store.mark)
        self.submit(Recover(view))
        self._task = asyncio.create_task(self._run(), name="registry-driver")

    async def stop(self) -> None:
        """Stop handling commands, end all peers, close the store. Safe to call twice."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        if self._timer is not None:
            self._timer.cancel()
        dials = set(self._dials)
        for dial in dials:
            dial.cancel()
        if dials:
            await asyncio.wait(dials)
        for peer in list(self._peers.values()):
            peer.end()
        self.tails.end()
        await self.store.close()

    async def failed(self) -> str:
        """Returns why, when this process must end: the store is broken, or somebody else's."""
        return await asyncio.shield(self._failure)

    def connect(self, peer: Peer) -> PeerId:
        """Give a stream or call its number; messages to that number go to `peer`."""
        self._last_peer += 1
        number = PeerId(self._last_peer)
        self._peers[number] = peer
        return number

    def disconnect(self, number: PeerId) -> None:
        """Forget a peer; later messages to it are dropped. Safe to call twice."""
        self._peers.pop(number, None)

    def submit(self, command: Command) -> None:
        """Hand a command to the machine; never waits. It is handled in a later turn of the loop."""
        self._commands.append(command)
        if self._waker is not None and not self._waker.done():
            self._waker.set_result(None)

    async def _run(self) -> None:
        try:
            while True:
                while self._commands:
                    command = self._commands.popleft()
                    for effect in self._machine.handle(self._clock(), command):
                        self._perform(effect)
                self._set_timer()
                self._waker = asyncio.get_running_loop().create_future()
                await self._waker
        except LeadershipOver as over:
            # It stood still, or etcd was away, for longer than its lease: nothing is wrong with it.
            _log.warning("the registry says nothing more and ends: another may serve")
            self._fail(str(over))
        except Exception:
            # A bug in the machine: its state can't be trusted, and the store holds the truth.
            _log.exception("the registry machine failed", extra=fields(do=BUG))
            self._fail("the registry machine failed")

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Send(number, message):
                if isinstance(message, ManagersResolved):
                    self._metrics.resolved(message)
                peer = self._peers.get(number)
                if peer is not None:
                    peer.deliver(message)
            case Commit(transaction, operations):
                began = time.perf_counter()
                future = self.store.commit(operations)
                future.add_done_callback(
                    lambda done: self._finish(transaction, operations, began, done)
                )
            case Close(number):
                peer = self._peers.get(number)
                if peer is not None:
                    peer.end()
            case Dial(dial, address):
                task = asyncio.create_task(self._dial(dial, address))
                self._dials.add(task)
                task.add_done_callback(self._dials.discard)
            case Halt(cause):
                self._fail(cause)
            case NodeUp(incarnation, address, resumed):
                _log.info(
                    "node joined",
                    extra=fields(**_node(incarnation), address=address, resumed=resumed),
                )
            case NodeDraining(incarnation):
                _log.info("node drains", extra=fields(**_node(incarnation)))
            case NodeLost(incarnation, cause, evidence, detail):
                self._metrics.fenced(evidence.value)
                _log.warning(
                    "node fenced",
                    extra=fields(
                        **_node(incarnation), cause=cause, evidence=evidence.value, detail=detail
                    ),
                )
            case ViolationSeen():
                pass  # Counted when its transaction came back, like those that came by a call.
            case PlacementEnded(_, cause, took_ms):
                _log.info("placement ended", extra=fields(cause=cause, took_ms=took_ms))
            case GenerationRaised(generation, cause):
                _log.warning("generation raised", extra=fields(generation=generation, cause=cause))
            case GraceBegun(cause, _):
                _log.info("grace begins", extra=fields(cause=cause))

    def _finish(
        self,
        transaction: TransactionId,
        operations: tuple[StoreOperation, ...],
        began: float,
        done: "asyncio.Future[Outcome]",
    ) -> None:
        outcome = self._committed(operations, done)
        if outcome is not None:
            self._metrics.committed(time.perf_counter() - began)
            self.submit(FinishTransaction(transaction, outcome))

    def _committed(
        self, operations: tuple[StoreOperation, ...], done: "asyncio.Future[Outcome]"
    ) -> Outcome | None:
        """The outcome of any transaction, after watchers were told and violations counted.

        None when there is no outcome: then this process must end.
        """
        if done.cancelled():
            return None
        error = done.exception()
        if error is not None:
            if not isinstance(error, StoreFailed):
                _log.error(
                    "the store failed in a way that it should not",
                    exc_info=error,
                    extra=fields(do=BUG),
                )
            self._fail(str(error))
            return None
        outcome = done.result()
        if isinstance(outcome, TermLost):
            self._fail(f"another registry process holds the store (term {outcome.term})")
        if isinstance(outcome, Committed):
            self.tails.advance(self.store.mark)
            for operation in operations:
                if isinstance(operation, RecordViolation):
                    self._recorded(operation.violation, operation.reporter)
        return outcome

    def _recorded(self, violation: Violation, reporter: str) -> None:
        self._metrics.violated(violation)
        breach = violation.severity is Severity.BREACH
        _log.log(
            logging.ERROR if breach else logging.WARNING,
            "breach" if breach else "refusal",
            extra=fields(
                kind=violation.kind.value,
                reporter=reporter,
                detail=violation.evidence,
                trace=violation.traceparent,
            ),
        )

    async def _dial(self, dial: DialId, address: str) -> None:
        outcome = await self._dialer.dial(address)
        self.submit(FinishDial(dial, outcome))

    def _set_timer(self) -> None:
        self._metrics.observe(self._machine.snapshot())
        deadline = self._machine.next_deadline()
        if deadline == self._timer_ms:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_ms = deadline
        if deadline is not None:
            delay_s = max(0, deadline - self._clock()) / 1000
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._due)

    def _due(self) -> None:
        self._timer, self._timer_ms = None, None
        self.submit(Tick())

    def _fail(self, cause: str) -> None:
        if not self._failure.done():
            self._failure.set_result(cause)


def _node(incarnation: NodeIncarnation) -> dict[str, str | int]:
    return {"node": incarnation.node_id, "node_rev": incarnation.node_rev}


class _Counters:
    """The metrics of the registry with their labels resolved."""

    def __init__(self, metrics: RegistryMetrics) -> None:
        self._metrics = metrics
        self._cached = metrics.resolves.labels("cached")
        self._placed = metrics.resolves.labels("placed")
        self._refused = metrics.resolves.labels("refused")
        self._up = metrics.nodes.labels("up")
        self._away = metrics.nodes.labels("away")
        self._draining = metrics.nodes.labels("draining")

    def resolved(self, message: ManagersResolved) -> None:
        total = len(message.results)
        if message.cached:
            self._cached.inc(message.cached)
        if total > message.cached:
            placed = sum(isinstance(result, Placement) for result in message.results)
            self._placed.inc(placed - message.cached)
            self._refused.inc(total - placed)

    def committed(self, seconds: float) -> None:
        self._metrics.commit_seconds.observe(seconds)

    def fenced(self, evidence: str) -> None:
        self._metrics.fences.labels(evidence).inc()

    def violated(self, violation: Violation) -> None:
        labels = (violation.severity.value, violation.kind.value)
        self._metrics.violations.labels(*labels).inc(violation.count)

    def observe(self, snapshot: RegistrySnapshot) -> None:
        nodes = [node for node in snapshot.nodes if not node.fencing]
        draining = sum(node.draining for node in nodes)
        up = sum(node.up and not node.draining for node in nodes)
        self._up.set(up)
        self._draining.set(draining)
        self._away.set(len(nodes) - up - draining)
        self._metrics.placements.set(sum(node.placements for node in nodes))
        self._metrics.edges.set(snapshot.edges)
