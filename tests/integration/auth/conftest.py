"""A real auth process, and an edge's and an operator's side of its contract."""

import asyncio
import contextlib
import itertools
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import pytest_asyncio

from steward.model.keys import UserKey
from steward.rpc.factory import call_metadata, make_channel
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials
from steward.v1 import auth_service_pb2 as pb
from steward.v1.auth_service_pb2_grpc import AuthServiceStub
from steward.v1.placement_pb2 import UserKey as UserMessage

CLUSTER = "test"
DEADLINE_S = 10.0


def free_ports(count: int) -> list[int]:
    """Different ports: all are held until the last one is found."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def user_message(user: UserKey) -> UserMessage:
    return UserMessage(tenant_id=user.tenant, user_id=user.user)


class AuthUnderTest:
    """`python -m auth_service` on a data directory; may be killed and started again."""

    def __init__(self, data: Path, store: str = "") -> None:
        self.data = data
        self.environment = {**os.environ, "STEWARD_AUTH_STORE": store}
        self.grpc_port, self.ops_port = free_ports(2)
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self.process = await self.spawn(self.grpc_port, self.ops_port)
        async with asyncio.timeout(2 * DEADLINE_S), aiohttp.ClientSession() as http:
            while True:
                assert self.process.returncode is None, "auth ended while starting"
                try:
                    async with http.get(f"http://127.0.0.1:{self.ops_port}/readyz") as answer:
                        if answer.status == 200:
                            return
                except aiohttp.ClientConnectionError:
                    pass
                await asyncio.sleep(0.02)

    async def spawn(self, grpc_port: int, ops_port: int) -> asyncio.subprocess.Process:
        command = [sys.executable, "-m", "auth_service", "--data", str(self.data)]
        command += ["--cluster", CLUSTER, "--id", "auth-1", "--log-level", "warning"]
        command += ["--grpc-port", str(grpc_port), "--ops-port", str(ops_port)]
        return await asyncio.create_subprocess_exec(
            *command, stderr=asyncio.subprocess.PIPE, env=self.environment
        )

    async def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.communicate()

    async def unready(self) -> str:
        """Why it is not ready; empty when it is."""
        async with aiohttp.ClientSession() as http:
            async with http.get(f"http://127.0.0.1:{self.ops_port}/readyz") as answer:
                return str((await answer.json()).get("why", ""))

    async def metrics(self) -> str:
        async with aiohttp.ClientSession() as http:
            async with http.get(f"http://127.0.0.1:{self.ops_port}/metrics") as answer:
                return await answer.text()

    def credentials(self, role: Role, cluster: str = CLUSTER) -> RoleCredentials:
        key = load_or_create_key(self.data, CONTROL_KEY)
        return RoleCredentials(key, role, cluster, f"{role}-test")

    def caller(self, role: Role, cluster: str = CLUSTER) -> "Caller":
        return Caller(f"127.0.0.1:{self.grpc_port}", self.credentials(role, cluster))


class Caller:
    """A process with a role, connected to auth. Use as an async context manager."""

    def __init__(self, address: str, credentials: RoleCredentials) -> None:
        self._channel = make_channel(address)
        self.stub: Any = AuthServiceStub(self._channel)
        self.metadata = call_metadata(credentials)
        self._edges: list[Edge] = []

    async def __aenter__(self) -> "Caller":
        return self

    async def __aexit__(self, *_: object) -> None:
        for edge in self._edges:
            await edge.close()
        await self._channel.close()

    async def edge(self, edge_id: str = "edge-1") -> "Edge":
        """Open the stream of an edge; returns after the welcome."""
        edge = Edge(self.stub.HoldAuthStream(metadata=self.metadata))
        self._edges.append(edge)
        hello = pb.AuthHello(cluster=CLUSTER, edge_id=edge_id)
        await edge.call.write(pb.HoldAuthStreamRequest(hello=hello))
        welcome = await edge.read()
        assert welcome.welcome.auth_id == "auth-1"
        edge.listen()
        return edge

    async def revoke(self, user: UserKey) -> int:
        request = pb.RevokeUserRequest(user=user_message(user))
        answer = await self.stub.RevokeUser(request, metadata=self.metadata, timeout=DEADLINE_S)
        return int(answer.issued_before_ms)

    async def create_login(self, user: UserKey, scopes: tuple[str, ...] = ()) -> str:
        request = pb.CreateLoginRequest(user=user_message(user), scopes=scopes)
        answer = await self.stub.CreateLogin(request, metadata=self.metadata, timeout=DEADLINE_S)
        assert answer.expires_in_seconds == 600
        return str(answer.code)


class Edge:
    """The edge's end of `HoldAuthStream`."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.revoked: asyncio.Queue[pb.UserRevoked] = asyncio.Queue()
        self._ids = itertools.count(1)
        self._open: dict[int, asyncio.Future[pb.AuthAnswer]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def read(self) -> pb.HoldAuthStreamResponse:
        async with asyncio.timeout(DEADLINE_S):
            message = await self.call.read()
        assert isinstance(message, pb.HoldAuthStreamResponse)
        return message

    def listen(self) -> None:
        self._reader = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        # grpc.aio does not let `read` and iteration be mixed on one call.
        while (message := await self.call.read()) is not grpc.aio.EOF:
            if message.WhichOneof("body") == "revoked":
                self.revoked.put_nowait(message.revoked)
            for answer in message.answers.answers:
                self._open.pop(answer.request_id).set_result(answer)

    async def ask_all(self, *questions: pb.AuthQuestion) -> list[pb.AuthAnswer]:
        """Send the questions as one batch; the answers in the order of the questions."""
        futures = []
        for question in questions:
            question.request_id = next(self._ids)
            future = asyncio.get_running_loop().create_future()
            self._open[question.request_id] = future
            futures.append(future)
        await self.call.write(
            pb.HoldAuthStreamRequest(batch=pb.AuthBatch(questions=list(questions)))
        )
        async with asyncio.timeout(DEADLINE_S):
            return list(await asyncio.gather(*futures))

    async def check(self, token: str) -> pb.AuthAnswer:
        question = pb.AuthQuestion(check_token=pb.CheckToken(token=token))
        return (await self.ask_all(question))[0]

    async def issue(self, token: str, origin: str = "") -> pb.AuthAnswer:
        body = pb.IssueTicket(token=token, origin=origin)
        return (await self.ask_all(pb.AuthQuestion(issue_ticket=body)))[0]

    async def redeem(self, ticket: str, origin: str = "") -> pb.AuthAnswer:
        body = pb.RedeemTicket(ticket=ticket, origin=origin)
        return (await self.ask_all(pb.AuthQuestion(redeem_ticket=body)))[0]

    async def log_in(self, code: str) -> pb.AuthAnswer:
        question = pb.AuthQuestion(redeem_login=pb.RedeemLogin(code=code))
        return (await self.ask_all(question))[0]

    async def next_revocation(self) -> pb.UserRevoked:
        async with asyncio.timeout(DEADLINE_S):
            return await self.revoked.get()

    async def close(self) -> None:
        self.call.cancel()
        if self._reader is not None:
            await asyncio.wait({self._reader})
            if not self._reader.cancelled():
                self._reader.exception()


@pytest_asyncio.fixture
async def auth(tmp_path: Path) -> AsyncIterator[AuthUnderTest]:
    running = AuthUnderTest(tmp_path)
    try:
        await running.start()
        yield running
    finally:
        await running.kill()


@pytest.fixture
def auth_process() -> type[AuthUnderTest]:
    """Makes processes that are not started yet: of a data directory, and a store."""
    return AuthUnderTest
