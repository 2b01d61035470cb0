"""The registry on gRPC: streams and calls in, commands to the driver, messages out.

A broken stream is reported to the machine at once. A peer that does not read what it is
sent is cut off when its outbox is full: a session is cheap to open again, and the
machine must not wait for anybody.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import grpc

from registry_service import convert
from registry_service.core.commands import (
    CloseEdgeSession,
    CloseNodeSession,
    Command,
    DescribeCluster,
    FindPlacement,
    OpenEdgeSession,
    OpenNodeSession,
    PeerId,
    ReportDeath,
    ResolveManagers,
    StreamEnd,
)
from registry_service.core.effects import (
    ClusterDescribed,
    DeathRecorded,
    ManagersResolved,
    Message,
    PlacementFound,
    Refused,
)
from registry_service.driver import RegistryDriver
from steward.errors import Reason, StewardError
from steward.model.keys import NodeId
from steward.rpc.outbox import Outbox, OutboxClosed, OutboxFull
from steward.rpc.roles import Role
from steward.rpc.status import abort
from steward.telemetry.catalog import RegistryMetrics
from steward.telemetry.tracing import Tracing
from steward.v1 import registry_service_pb2, registry_service_pb2_grpc

_SERVICE = "/steward.v1.RegistryService/"

ALLOWED: Mapping[str, frozenset[Role]] = {
    _SERVICE + "HoldNodeSession": frozenset({Role.AGENT}),
    _SERVICE + "HoldEdgeSession": frozenset({Role.EDGE}),
    _SERVICE + "ResolveManagers": frozenset({Role.EDGE, Role.OPERATOR, Role.AGENT}),
    _SERVICE + "FindPlacement": frozenset({Role.OPERATOR}),
    _SERVICE + "DescribeCluster": frozenset({Role.OPERATOR}),
    _SERVICE + "ReportDeath": frozenset({Role.OPERATOR}),
}
"""Who may call what; a method that is not here may be called by nobody."""

HELLO_TIMEOUT_S = 5.0
CALL_TIMEOUT_S = 5.0
OUTBOX_MESSAGES = 8_192
WRITE_AT_ONCE = 64

Request = TypeVar("Request")
Response = TypeVar("Response")
MessageT = TypeVar("MessageT")


class _Stream:
    """The outgoing side of one long stream, as the driver sees it."""

    def __init__(self) -> None:
        self.outbox: Outbox[Message] = Outbox(OUTBOX_MESSAGES)
        self.error: StewardError | None = None

    def deliver(self, message: Message) -> None:
        try:
            self.outbox.put(message)
        except OutboxFull:
            self.fail(StewardError(Reason.SLOW_CONSUMER, "read the session's stream faster"))
        except OutboxClosed:
            pass  # It is ending; its close is on the way to the machine.

    def end(self) -> None:
        self.outbox.close()

    def fail(self, error: StewardError) -> None:
        """End the stream with a refusal."""
        self.error = self.error or error
        self.outbox.close()


class _Call(Generic[MessageT]):
    """The outgoing side of a unary call: one message."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

    def deliver(self, message: Message) -> None:
        if not self.answer.done():
            self.answer.set_result(message)

    def end(self) -> None:
        if not self.answer.done():
            self.answer.set_exception(
                StewardError(Reason.STORE_UNAVAILABLE, "the registry is stopping; try again")
            )


class RegistryServicer(registry_service_pb2_grpc.RegistryServiceServicer):
    """One object serves all streams; what it knows is in the driver."""

    def __init__(
        self, driver: RegistryDriver, cluster: str, metrics: RegistryMetrics, tracing: Tracing
    ) -> None:
        self._driver = driver
        self._cluster = cluster
        self._resolve_seconds = metrics.resolve_seconds
        self._tracing = tracing

    # Sessions

    # Written with read and write on the context: the stub's type knows only generators.
    async def HoldNodeSession(  # type: ignore[override]
        self, _: Any, context: Any
    ) -> None:
        hello = await self._hello(context)
        try:
            self._check_cluster(hello.cluster)
            claim = convert.claim_in(hello)
        except StewardError as error:
            await abort(context, error)
        stream = _Stream()
        peer = self._driver.connect(stream)
        self._driver.submit(OpenNodeSession(peer, claim))

        def command(request: registry_service_pb2.HoldNodeSessionRequest) -> Command:
            return convert.node_command(peer, request)

        end = StreamEnd.RESET
        try:
            end = await self._hold(context, stream, command, convert.node_response)
        finally:
            self._driver.disconnect(peer)
            self._driver.submit(CloseNodeSession(peer, end))
        if stream.error is not None:
            await abort(context, stream.error)

    async def HoldEdgeSession(  # type: ignore[override]
        self, _: Any, context: Any
    ) -> None:
        hello = await self._hello(context)
        try:
            self._check_cluster(hello.cluster)
            edge_id = convert.edge_id_in(hello)
        except StewardError as error:
            await abort(context, error)
        stream = _Stream()
        peer = self._driver.connect(stream)
        self._driver.submit(OpenEdgeSession(peer, edge_id))
        asked: dict[int, float] = {}
        traced: dict[int, tuple[int, list[str]]] = {}

        def command(request: registry_service_pb2.HoldEdgeSessionRequest) -> Command:
            made = convert.edge_command(peer, request)
            if isinstance(made, ResolveManagers):
                asked[made.request_id] = time.perf_counter()
                if self._tracing.enabled:
                    traces = [q.traceparent for q in request.resolve.users if q.traceparent]
                    traced[made.request_id] = (time.time_ns(), traces)
            return made

        def response(message: Message) -> registry_service_pb2.HoldEdgeSessionResponse:
            if isinstance(message, ManagersResolved):
                began = None if message.more else asked.pop(message.request_id, None)
                if began is not None:
                    self._resolve_seconds.observe(time.perf_counter() - began)
                    start_ns, traces = traced.pop(message.request_id, (0, []))
                    for trace in traces:
                        self._tracing.record("registry.resolve", trace, start_ns, {})
            return convert.edge_response(message)

        try:
            await self._hold(context, stream, command, response)
        finally:
            self._driver.disconnect(peer)
            self._driver.submit(CloseEdgeSession(peer))
        if stream.error is not None:
            await abort(context, stream.error)

    async def _hello(self, context: Any) -> Any:
        """The hello that a session begins with; ends the call if something else comes."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await context.read()
        except TimeoutError:
            await abort(context, convert.violation("the hello did not come"))
        if first is grpc.aio.EOF or first.WhichOneof("body") != "hello":
            await abort(context, convert.violation("a session begins with its hello"))
        return first.hello

    def _check_cluster(self, cluster: str) -> None:
        if cluster != self._cluster:
            raise StewardError(
                Reason.PERMISSION_DENIED, f"this is cluster {self._cluster!r}; check --cluster"
            )

    async def _hold(
        self,
        context: Any,
        stream: _Stream,
        command: Callable[[Request], Command],
        response: Callable[[Message], Response],
    ) -> StreamEnd:
        """Carry a session both ways until one side ends it; returns how."""
        reading = asyncio.create_task(self._read(context, stream, command))
        try:
            while messages := await stream.outbox.take(WRITE_AT_ONCE):
                for message in messages:
                    if isinstance(message, Refused):
                        stream.fail(StewardError(message.reason, message.message))
                        return StreamEnd.EOF
                    await context.write(response(message))
            return StreamEnd.EOF
        finally:
            reading.cancel()
            await asyncio.wait({reading})

    async def _read(
        self, context: Any, stream: _Stream, command: Callable[[Request], Command]
    ) -> None:
        """Submit what the peer says; ends the stream when the peer does, or breaks a rule."""
        try:
            while (request := await context.read()) is not grpc.aio.EOF:
                self._driver.submit(command(request))
        except StewardError as error:
            stream.fail(error)
        finally:
            stream.end()

    # Calls

    async def _ask(
        self, context: Any, kind: type[MessageT], command: Callable[[PeerId], Command]
    ) -> MessageT:
        """Submit a command and wait for its one answer; ends the call when there is none."""
        call = _Call[MessageT]()
        peer = self._driver.connect(call)
        try:
            self._driver.submit(command(peer))
            async with asyncio.timeout(CALL_TIMEOUT_S):
                answer = await call.answer
            if not isinstance(answer, kind):
                raise StewardError(Reason.INTERNAL, "the registry gave another answer")
            return answer
        except TimeoutError:
            await abort(
                context, StewardError(Reason.STORE_UNAVAILABLE, "the store did not answer in time")
            )
        except StewardError as error:
            await abort(context, error)
        finally:
            self._driver.disconnect(peer)

    async def ResolveManagers(
        self, request: registry_service_pb2.ResolveManagersRequest, context: Any
    ) -> registry_service_pb2.ResolveManagersResponse:
        with self._resolve_seconds.time():
            resolved = await self._ask(
                context,
                ManagersResolved,
                lambda peer: ResolveManagers(peer, request.request_id, convert.queries_in(request)),
            )
        return convert.resolved_out(resolved)

    async def FindPlacement(
        self, request: registry_service_pb2.FindPlacementRequest, context: Any
    ) -> registry_service_pb2.FindPlacementResponse:
        found = await self._ask(
            context,
            PlacementFound,
            lambda peer: FindPlacement(peer, convert.user_in(request.user)),
        )
        if found.placement is None:
            return registry_service_pb2.FindPlacementResponse()
        return registry_service_pb2.FindPlacementResponse(
            placement=convert.placement_out(found.placement), node_alive=found.alive
        )

    async def DescribeCluster(
        self, _: registry_service_pb2.DescribeClusterRequest, context: Any
    ) -> registry_service_pb2.DescribeClusterResponse:
        described = await self._ask(context, ClusterDescribed, DescribeCluster)
        return convert.cluster_out(self._cluster, described)

    async def ReportDeath(
        self, request: registry_service_pb2.ReportDeathRequest, context: Any
    ) -> registry_service_pb2.ReportDeathResponse:
        recorded = await self._ask(
            context,
            DeathRecorded,
            lambda peer: ReportDeath(peer, NodeId(request.node_id), request.pid, request.evidence),
        )
        return registry_service_pb2.ReportDeathResponse(fenced=recorded.fenced)
