"""Counts of connections as an operator reads them: what nobody answered is never a number."""

import pytest

from steward.cli.counting import Counts, all_of, of_user
from steward.v1 import registry_service_pb2 as pb

RESPONSE = pb.CountConnectionsResponse(
    edges=[
        pb.EdgeConnections(edge_id="edge-0", answered=True, open=9, of_users=[2, 0]),
        pb.EdgeConnections(edge_id="edge-1", answered=False),
    ]
)


def test_an_answer_is_read_by_edge_and_user() -> None:
    assert all_of(RESPONSE).by_edge == {"edge-0": 9, "edge-1": None}
    assert of_user(RESPONSE, 0).by_edge == {"edge-0": 2, "edge-1": None}
    assert of_user(RESPONSE, 1).by_edge == {"edge-0": 0, "edge-1": None}


@pytest.mark.parametrize(
    ("by_edge", "total", "text"),
    [
        ({}, 0, "no connections"),
        ({"e": 0, "f": 0}, 0, "no connections"),
        ({"e": 1, "f": 0}, 1, "1 connection: 1 at e"),
        ({"e": 2, "f": 3}, 5, "5 connections: 2 at e, 3 at f"),
        ({"e": 2, "f": None}, None, "at least 2 connections: 2 at e, unknown at f"),
        ({"e": 0, "f": None}, None, "at least 0 connections: unknown at f"),
    ],
)
def test_the_total_is_known_when_every_edge_answered(
    by_edge: dict[str, int | None], total: int | None, text: str
) -> None:
    counts = Counts(by_edge)
    assert (counts.total, str(counts)) == (total, text)
