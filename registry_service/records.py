"""The calls about what is recorded: reports, lists and watches of violations, and the ledger.

They read the store beside the machine, since records decide nothing. A report is answered when it
is durable. What these calls do not give: the truth about who owns a user now; `FindPlacement` does.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from registry_service import convert, convert_records
from registry_service.driver import RegistryDriver
from registry_service.store.port import StoreFailed
from registry_service.watch import (
    Changes,
    Created,
    CurrentPage,
    watch_placements,
    watch_violations,
)
from steward.errors import Reason, StewardError
from steward.rpc.roles import caller_of
from steward.v1 import registry_service_pb2 as pb

STORE_TIMEOUT_S = 5.0


class Records:
    """Answers the calls; raises StewardError for what must end a call."""

    def __init__(self, driver: RegistryDriver) -> None:
        self._store = driver.store
        self._tails = driver.tails
        self._recorder = driver.recorder

    async def report(
        self, request: pb.ReportViolationsRequest, context: Any
    ) -> pb.ReportViolationsResponse:
        violations = await convert_records.violations_in(request)
        if not violations:
            return pb.ReportViolationsResponse(last_number=self._store.mark.violations)
        kept = self._recorder.record(violations, convert_records.reporter_in(caller_of(context)))
        async with _answered():
            return pb.ReportViolationsResponse(last_number=await asyncio.shield(kept))

    async def list_violations(self, request: pb.ListViolationsRequest) -> pb.ListViolationsResponse:
        limit = convert_records.limit_in(request.limit)
        after = convert_records.number_in(request.after)
        severity = convert_records.severity_in(request.severity)
        async with _answered():
            rows = await self._store.violations(after, limit, severity, request.newest)
            totals = await self._store.violation_totals()
        return pb.ListViolationsResponse(
            violations=convert_records.violations_out(rows),
            refusals=totals.refusals,
            breaches=totals.breaches,
        )

    async def read_ledger(self, request: pb.ReadLedgerRequest) -> pb.ReadLedgerResponse:
        limit = convert_records.limit_in(request.limit)
        user = convert.user_in(request.user) if request.HasField("user") else None
        async with _answered():
            rows = await self._store.ledger(user, limit)
        return pb.ReadLedgerResponse(entries=convert_records.ledger_out(rows))

    async def watch_violations(
        self, request: pb.WatchViolationsRequest
    ) -> AsyncGenerator[pb.WatchViolationsResponse, None]:
        after = convert_records.number_in(request.after)
        with self._tails.watcher():
            pages = watch_violations(self._store, self._tails.violations, after)
            async with aclosing(pages):
                async for rows in pages:
                    yield pb.WatchViolationsResponse(
                        violations=convert_records.violations_out(rows)
                    )

    async def watch_placements(
        self, request: pb.WatchPlacementsRequest
    ) -> AsyncGenerator[pb.WatchPlacementsResponse, None]:
        after = convert_records.number_in(request.after)
        with self._tails.watcher():
            steps = watch_placements(
                self._store, self._tails.ledger, after, request.include_current
            )
            async with aclosing(steps):
                async for step in steps:
                    yield _watched(step)


@asynccontextmanager
async def _answered() -> AsyncIterator[None]:
    """The store answers in time, or the call is refused."""
    try:
        async with asyncio.timeout(STORE_TIMEOUT_S):
            yield
    except (TimeoutError, StoreFailed):
        raise StewardError(
            Reason.STORE_UNAVAILABLE, "the store did not answer; try again"
        ) from None


def _watched(step: Created | CurrentPage | Changes) -> pb.WatchPlacementsResponse:
    response = pb.WatchPlacementsResponse
    match step:
        case Created(number, revision):
            return response(created=response.Created(number=number, revision=revision))
        case CurrentPage(placements, more):
            found = [convert.placement_out(placement) for placement in placements]
            return response(current=response.Current(placements=found, more=more))
        case Changes(rows):
            return response(changes=response.Changes(entries=convert_records.ledger_out(rows)))
