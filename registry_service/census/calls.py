"""The operator's calls about the census and the ledger, on the wire."""

from collections.abc import AsyncGenerator
from dataclasses import replace

from registry_service import convert
from registry_service.census.ledger import Checked, check_ledger
from registry_service.census.rounds import Census, Round
from registry_service.store.port import PlacementStore, StoreFailed
from steward.errors import Reason, StewardError
from steward.runtime.clock import boot_ms, wall_ms
from steward.v1 import registry_service_pb2 as pb

MOST_LISTED = 1_000


async def take_census(census: Census, request: pb.TakeCensusRequest) -> pb.TakeCensusResponse:
    """A census of now, or the last one. Raises StewardError(STORE_UNAVAILABLE)."""
    try:
        seen = census.last if request.last else await census.settle()
    except StoreFailed:
        raise StewardError(Reason.STORE_UNAVAILABLE, "the store failed; try again") from None
    return census_out(census, seen)


def census_out(census: Census, seen: Round) -> pb.TakeCensusResponse:
    """The round, and what is a finding after it."""
    confirmed = census.confirmation.confirmed
    ordered = sorted(confirmed.items(), key=lambda item: item[1])
    age_ms = boot_ms() - census.complete_ms if census.complete_ms is not None else None
    now_ms, clock_ms = wall_ms(), boot_ms()
    return pb.TakeCensusResponse(
        at_ms=seen.at_ms,
        complete=bool(seen.at_ms) and seen.complete,
        missing=seen.missing if seen.at_ms else ["no census was taken yet"],
        nodes=seen.nodes,
        edges=seen.edges,
        placements=seen.placements,
        managers=seen.managers,
        attachments=seen.attachments,
        fences=seen.fences,
        took_ms=seen.took_ms,
        findings=[
            pb.CensusFinding(
                kind=sighting.kind.value,
                user=convert.user_out(sighting.user),
                epoch=sighting.epoch,
                node_id=sighting.node.node_id if sighting.node is not None else "",
                node_rev=sighting.node.node_rev if sighting.node is not None else 0,
                evidence=sighting.evidence,
                since_ms=now_ms - (clock_ms - since_ms),
            )
            for sighting, since_ms in ordered[:MOST_LISTED]
        ],
        interval_ms=census.config.interval_ms,
        complete_age_ms=age_ms,
        found=len(confirmed),
    )


async def checking(
    store: PlacementStore, census: Census
) -> AsyncGenerator[pb.CheckLedgerResponse, None]:
    """The check of the ledger, with what it found so far; the last answer is `done`."""
    last = Checked()
    async for checked in check_ledger(store, census.read_fences):
        last = replace(checked)
        yield _checked_out(last, done=False)
    response = _checked_out(last, done=True)
    response.disagreements.extend(last.disagreements)
    yield response


def _checked_out(checked: Checked, *, done: bool) -> pb.CheckLedgerResponse:
    return pb.CheckLedgerResponse(
        rows=checked.rows,
        fences=checked.fences,
        not_kept=checked.not_kept,
        found=checked.found,
        done=done,
    )
