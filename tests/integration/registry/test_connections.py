"""Counts of connections over real gRPC: every edge is asked, and none is waited for too long."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import pytest_asyncio

from registry_service.connections import ANSWER_S
from steward.errors import Reason
from steward.rpc.roles import Role
from steward.rpc.status import error_of
from steward.v1 import placement_pb2
from steward.v1 import registry_service_pb2 as pb

pytestmark = pytest.mark.asyncio


@pytest.fixture
def registry(shared_registry: Any) -> Any:
    return shared_registry


def user_key(user: str) -> placement_pb2.UserKey:
    return placement_pb2.UserKey(tenant_id="acme", user_id=user)


async def count(client: Any, *users: str) -> Any:
    request = pb.CountConnectionsRequest(users=[user_key(user) for user in users])
    return await client.stub.CountConnections(request, metadata=client.metadata(), timeout=15)


async def answer(edge: Any, open_: int, *of_users: int, question: int = 0) -> list[str]:
    """Answer the next question as an edge does; the users that it was about."""
    asked = await edge.open.expect("ask_connections")
    report = pb.ReportConnections(
        question=question or asked.question, open=open_, of_users=of_users
    )
    await edge.open.send(pb.HoldEdgeSessionRequest(connections=report))
    return [user.user_id for user in asked.users]


@pytest_asyncio.fixture(autouse=True)
async def alone(clients: Any, until: Callable[..., Any]) -> None:
    """The edges of the test before are gone: the registry hears of that a moment later."""
    operator = clients.of(Role.OPERATOR)

    async def nobody_is_left() -> bool:
        return shown(await count(operator)) == []

    await until(nobody_is_left)


def shown(response: Any) -> list[tuple[str, bool, int, list[int]]]:
    return [
        (edge.edge_id, edge.answered, edge.open, list(edge.of_users)) for edge in response.edges
    ]


async def test_every_edge_is_asked_once_and_shown_by_name(clients: Any) -> None:
    edges = [clients.edge("e2"), clients.edge("e1")]
    for edge in edges:
        await edge.connect()
    counting = asyncio.create_task(count(clients.of(Role.OPERATOR), "ann", "bob"))
    assert await answer(edges[0], 7, 2, 0) == ["ann", "bob"]
    assert await answer(edges[1], 1, 0, 1) == ["ann", "bob"]
    assert shown(await counting) == [("e1", True, 1, [0, 1]), ("e2", True, 7, [2, 0])]


async def test_an_edge_that_is_silent_is_shown_as_one_that_did_not_answer(clients: Any) -> None:
    answering, silent = clients.edge("e1"), clients.edge("silent")
    await answering.connect()
    await silent.connect()
    began = time.monotonic()
    counting = asyncio.create_task(count(clients.of(Role.OPERATOR)))
    await answer(answering, 3)
    assert shown(await counting) == [("e1", True, 3, []), ("silent", False, 0, [])]
    assert time.monotonic() - began >= ANSWER_S
    # Its answer to another question, or one that comes late, ends nothing.
    await answer(silent, 9, question=10_000)
    await silent.resolve("ann")


async def test_an_edge_that_goes_is_not_waited_for(clients: Any) -> None:
    edge = clients.edge("e1")
    await edge.connect()
    began = time.monotonic()
    counting = asyncio.create_task(count(clients.of(Role.OPERATOR)))
    await edge.open.expect("ask_connections")
    await edge.close()
    assert shown(await counting) == [("e1", False, 0, [])]
    assert time.monotonic() - began < ANSWER_S


async def test_of_two_sessions_of_one_edge_the_newer_is_asked(clients: Any) -> None:
    older, newer = clients.edge("e1"), clients.edge("e1")
    await older.connect()
    await newer.connect()
    counting = asyncio.create_task(count(clients.of(Role.OPERATOR)))
    await answer(newer, 5)
    assert shown(await counting) == [("e1", True, 5, [])]
    await older.close()
    counting = asyncio.create_task(count(clients.of(Role.OPERATOR)))
    await answer(newer, 6)
    assert shown(await counting) == [("e1", True, 6, [])]


async def test_an_answer_that_leaves_users_out_ends_the_session(clients: Any) -> None:
    edge = clients.edge("e1")
    await edge.connect()
    counting = asyncio.create_task(count(clients.of(Role.OPERATOR), "ann", "bob"))
    await answer(edge, 5, 5)
    await edge.open.end()
    assert error_of(edge.open.error).reason is Reason.PROTOCOL_VIOLATION
    assert shown(await counting) == [("e1", False, 0, [])]


async def test_without_edges_the_answer_is_at_once_and_empty(clients: Any) -> None:
    assert shown(await count(clients.of(Role.OPERATOR), "ann")) == []


@pytest.mark.parametrize("users", [[""], ["x" * 129], [f"u{n}" for n in range(513)]])
async def test_a_question_that_can_not_be_is_refused(clients: Any, users: list[str]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await count(clients.of(Role.OPERATOR), *users)
    assert error_of(refused.value).reason is Reason.PROTOCOL_VIOLATION
