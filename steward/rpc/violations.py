"""The way of violations to the registry: reported by whoever sees them, never waited for.

`report` returns at once and never fails. Equal ones (same kind, user, epoch, node) within a
second travel as one with a count; the first goes at once. While the registry is away they wait,
in a bounded queue: when it is full the oldest refusal is dropped (a breach only when there is
nothing else), and the next report's evidence says how many were.

Not guaranteed: that a report arrives when this process dies, or that it arrives once: an
answer that was lost makes it be recorded twice. A process that must stop calls `close`, which
gives what waits one second.
"""

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import grpc
from prometheus_client import Counter

from steward.errors import StewardError
from steward.model.evidence import clean
from steward.model.keys import Epoch, NodeIncarnation, UserKey
from steward.model.violations import Severity, Violation, ViolationKind
from steward.rpc.factory import call_metadata, make_channel
from steward.rpc.roles import RoleCredentials
from steward.rpc.status import error_of
from steward.rpc.stream import FIRST_BACKOFF_S, MOST_BACKOFF_S
from steward.telemetry import conventions as names
from steward.telemetry.logs import BUG, fields
from steward.telemetry.tracing import Attribute, Tracing
from steward.v1 import placement_pb2, registry_service_pb2, registry_service_pb2_grpc

MOST_WAITING = 1024
MOST_IN_REPORT = 256
EQUAL_WITHIN_S = 1.0
CALL_TIMEOUT_S = 2.0
FLUSH_S = 1.0

Key = tuple[ViolationKind, UserKey | None, Epoch, NodeIncarnation | None]

_log = logging.getLogger(__name__)


class Counters(Protocol):
    """The part of `steward.telemetry.catalog.ServiceMetrics` that is used."""

    refusals: Counter
    breaches: Counter


@dataclass(slots=True)
class _Waiting:
    """What waits under one key: the first violation, how many there were, and when it may go."""

    violation: Violation
    count: int
    due_at: float


class ViolationReporter:
    """Reports to the registry at `address` (`host:port`). One event loop; no locks.

    Needs no start: the channel is made with the first report. With `metrics`, each report also
    counts in this process' `steward_refusals_total` or `steward_breaches_total`. With `tracing`,
    each is a span, also where nothing else is sampled, and names it. From another
    thread: `loop.call_soon_threadsafe(reporter.report, violation)`.
    """

    def __init__(
        self,
        address: str,
        credentials: RoleCredentials,
        metrics: Counters | None = None,
        *,
        most_waiting: int = MOST_WAITING,
        tracing: Tracing | None = None,
    ) -> None:
        self._tracing = tracing
        self._address = address
        self._credentials = credentials
        self._metrics = metrics
        self._most_waiting = most_waiting
        self._waiting: dict[Key, _Waiting] = {}
        # When an equal one may go again; those in the past are forgotten.
        self._quiet_until: dict[Key, float] = {}
        self._dropped = 0
        self._wake = asyncio.Event()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Reports that wait, equal ones counted once."""
        return len(self._waiting)

    def report(self, violation: Violation) -> None:
        """Send this to the registry soon. Never waits, never raises; ignored after `close`."""
        key: Key = (violation.kind, violation.user, violation.epoch, violation.node)
        present = self._waiting.get(key)
        if present is None and self._tracing is not None and self._tracing.enabled:
            violation = _traced(violation, self._tracing)
        self._count(violation)
        if self._closing.is_set():
            return
        if present is not None:
            present.count += violation.count
            return
        now = asyncio.get_running_loop().time()
        due_at = self._quiet_until.get(key, now)
        self._waiting[key] = _Waiting(violation, violation.count, due_at)
        self._keep_bound()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="violation-reporter")
        self._wake.set()

    async def close(self) -> None:
        """Give what waits at most one second, then stop. Safe to call twice."""
        self._closing.set()
        self._wake.set()
        task, self._task = self._task, None
        if task is None:
            return
        try:
            await asyncio.wait({task}, timeout=FLUSH_S)
        finally:
            task.cancel()
        await asyncio.wait({task})
        lost = self._dropped + sum(item.count for item in self._waiting.values())
        if lost:
            _log.warning("violations were not reported", extra=fields(lost=lost))

    def _count(self, violation: Violation) -> None:
        breach = violation.severity is Severity.BREACH
        if self._metrics is not None:
            metrics = self._metrics
            counter = metrics.breaches if breach else metrics.refusals
            counter.labels(violation.kind.value).inc(violation.count)
        if breach:
            # Also here, since the registry may be what is broken.
            _log.error(
                "breach",
                extra=fields(
                    kind=violation.kind.value,
                    evidence=clean(violation.evidence),
                    trace=violation.traceparent,
                    do="read docs/violations.md and `steward violations --breaches`",
                ),
            )

    def _keep_bound(self) -> None:
        while len(self._waiting) > self._most_waiting:
            oldest = next(iter(self._waiting))
            victim = next(
                (
                    key
                    for key, item in self._waiting.items()
                    if item.violation.severity is not Severity.BREACH
                ),
                oldest,
            )
            self._dropped += self._waiting.pop(victim).count

    # The task

    async def _run(self) -> None:
        channel = make_channel(self._address)
        stub = registry_service_pb2_grpc.RegistryServiceStub(channel)
        backoff = FIRST_BACKOFF_S
        try:
            while batch := await self._take():
                try:
                    error = await self._send(stub, batch)
                except asyncio.CancelledError:
                    self._put_back(batch)
                    raise
                except Exception:
                    # What can't be said must not end the saying of all that comes later.
                    _log.exception("a report of violations can't be made", extra=fields(do=BUG))
                    self._dropped += sum(item.count for item in batch)
                    continue
                if error is None:
                    backoff = FIRST_BACKOFF_S
                    continue
                if not error.row.retry:
                    # It would be refused again, and hold up all that come after it.
                    _log.error(
                        "violations are refused",
                        extra=fields(
                            why=error.message,
                            do="let this process have the key and cluster name of the registry",
                        ),
                    )
                    self._dropped += sum(item.count for item in batch)
                    continue
                self._put_back(batch)
                _log.warning("violations wait", extra=fields(why=error.message))
                await self._rest(backoff * random.uniform(0.5, 1.0))
                backoff = min(backoff * 2, MOST_BACKOFF_S)
        finally:
            await channel.close()

    async def _rest(self, seconds: float) -> None:
        """Let the registry come back; `close` cuts this short once, since time is short then."""
        if self._closing.is_set():
            await asyncio.sleep(min(seconds, FIRST_BACKOFF_S))
            return
        try:
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        except TimeoutError:
            pass

    async def _take(self) -> list[_Waiting]:
        """What is due, at most a report's worth; waits for the first. Empty when closed."""
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            due = [
                key
                for key, item in self._waiting.items()
                if item.due_at <= now or self._closing.is_set()
            ]
            if due:
                quiet = {key: until for key, until in self._quiet_until.items() if until > now}
                batch = []
                for key in due[:MOST_IN_REPORT]:
                    batch.append(self._waiting.pop(key))
                    quiet[key] = now + EQUAL_WITHIN_S
                self._quiet_until = quiet
                return batch
            if self._closing.is_set():
                return []
            self._wake.clear()
            next_at = min((item.due_at for item in self._waiting.values()), default=None)
            try:
                async with asyncio.timeout_at(next_at):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def _put_back(self, batch: Sequence[_Waiting]) -> None:
        """Before all others again, together with equal ones that came meanwhile."""
        later = self._waiting
        self._waiting = {}
        for item in batch:
            violation = item.violation
            key: Key = (violation.kind, violation.user, violation.epoch, violation.node)
            newer = later.pop(key, None)
            if newer is not None:
                item.count += newer.count
            self._waiting[key] = item
        self._waiting |= later
        self._keep_bound()

    async def _send(
        self, stub: "registry_service_pb2_grpc.RegistryServiceAsyncStub", batch: list[_Waiting]
    ) -> StewardError | None:
        dropped = self._dropped
        request = registry_service_pb2.ReportViolationsRequest(
            violations=[violation_out(item.violation, item.count) for item in batch]
        )
        if dropped:
            first = request.violations[0]
            first.evidence += f" (before this, {dropped} reports were dropped)"
        try:
            await stub.ReportViolations(
                request, timeout=CALL_TIMEOUT_S, metadata=call_metadata(self._credentials)
            )
        except grpc.aio.AioRpcError as failure:
            return error_of(failure)
        self._dropped -= dropped
        return None


def _traced(violation: Violation, tracing: Tracing) -> Violation:
    """With the span of it, in its own trace if it has none."""
    attributes: dict[str, Attribute] = {
        names.KIND: violation.kind.value,
        names.SEVERITY: violation.severity.value,
        names.EPOCH: violation.epoch,
    }
    parent = violation.traceparent
    context = "" if parent else tracing.new_root()
    context = tracing.record(
        names.VIOLATION,
        parent,
        time.time_ns(),
        attributes,
        context=context,
        failed=True,
        upgraded=True,
    )
    return replace(violation, traceparent=context)


def violation_out(violation: Violation, count: int) -> registry_service_pb2.Violation:
    """A violation as the registry takes it; number, time and reporter are given there."""
    out = registry_service_pb2.Violation(
        kind=violation.kind.value,
        epoch=violation.epoch,
        evidence=clean(violation.evidence),
        traceparent=violation.traceparent,
        count=min(count, (1 << 32) - 1),
    )
    if violation.user is not None:
        tenant, user = violation.user
        out.user.CopyFrom(placement_pb2.UserKey(tenant_id=tenant, user_id=user))
    if violation.node is not None:
        out.node_id, out.node_rev = violation.node
    return out
