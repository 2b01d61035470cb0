"""The registry on gRPC: streams and calls in, commands to the driver, messages out.

A broken stream is reported to the machine at once. A peer that does not read what it is
sent is cut off when its outbox is full: a session is cheap to open again, and the
machine must not wait for anybody.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import grpc

from registry_service import convert
from registry_service.census.asking import fences_in, holdings_in
from registry_service.census.calls import checking, take_census
from registry_service.census.rounds import Census
from registry_service.connections import Connections
from registry_service.core.commands import (
    CloseEdgeSession,
    CloseNodeSession,
    Command,
    DescribeCluster,
    DrainNode,
    EvictUser,
    FenceNodeByOperator,
    FindPlacement,
    MoveUser,
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
    NodeDrained,
    NodeFencedByOperator,
    NodeWelcome,
    PlacementFound,
    Refused,
    UserEvicted,
    UserMoved,
)
from registry_service.driver import RegistryDriver
from registry_service.question import ask
from registry_service.records import Records
from registry_service.store.port import StoreFailed
from steward.errors import Reason, StewardError
from steward.model.evidence import clean
from steward.model.keys import NodeId
from steward.model.violations import Violation, ViolationKind
from steward.rpc.outbox import Outbox, OutboxClosed, OutboxFull
from steward.rpc.roles import ForeignCluster, Role
from steward.rpc.status import abort
from steward.telemetry.catalog import RegistryMetrics
from steward.telemetry.conventions import REGISTRY_RESOLVE
from steward.telemetry.instruments import exemplar_of
from steward.telemetry.tracing import Kind, Tracing
from steward.v1 import registry_service_pb2, registry_service_pb2_grpc

_SERVICE = "/steward.v1.RegistryService/"

ALLOWED: Mapping[str, frozenset[Role]] = {
    _SERVICE + "HoldNodeSession": frozenset({Role.AGENT}),
    _SERVICE + "HoldEdgeSession": frozenset({Role.EDGE}),
    _SERVICE + "ResolveManagers": frozenset({Role.EDGE, Role.OPERATOR, Role.AGENT}),
    _SERVICE + "FindPlacement": frozenset({Role.OPERATOR}),
    _SERVICE + "DescribeCluster": frozenset({Role.OPERATOR}),
    _SERVICE + "CountConnections": frozenset({Role.OPERATOR}),
    _SERVICE + "ReportDeath": frozenset({Role.OPERATOR}),
    _SERVICE + "DrainNode": frozenset({Role.OPERATOR}),
    _SERVICE + "FenceNode": frozenset({Role.OPERATOR}),
    _SERVICE + "MoveUser": frozenset({Role.OPERATOR}),
    _SERVICE + "EvictUser": frozenset({Role.OPERATOR}),
    _SERVICE + "ReportViolations": frozenset(
        {Role.AGENT, Role.EDGE, Role.LOG, Role.AUTH, Role.OPERATOR}
    ),
    _SERVICE + "ListViolations": frozenset({Role.OPERATOR}),
    _SERVICE + "WatchViolations": frozenset({Role.OPERATOR}),
    _SERVICE + "WatchPlacements": frozenset({Role.OPERATOR}),
    _SERVICE + "ReadLedger": frozenset({Role.OPERATOR}),
    _SERVICE + "TakeCensus": frozenset({Role.OPERATOR}),
    _SERVICE + "CheckLedger": frozenset({Role.OPERATOR}),
}
"""Who may call what; a method that is not here may be called by nobody."""

HELLO_TIMEOUT_S = 5.0
CALL_TIMEOUT_S = 5.0
MOVE_TIMEOUT_S = 38.0
"""The old node may wait for a running tool call; the machine's own limit is below this."""
OUTBOX_MESSAGES = 8_192
REPORTER = "registry:door"
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


class RegistryServicer(registry_service_pb2_grpc.RegistryServiceServicer):
    """One object serves all streams; what it knows is in the driver."""

    def __init__(
        self,
        driver: RegistryDriver,
        cluster: str,
        metrics: RegistryMetrics,
        tracing: Tracing,
        census: Census | None = None,
    ) -> None:
        self._driver = driver
        self._records = Records(driver)
        self._connections = Connections()
        self.census = census or Census(driver, metrics)
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
            self._check_cluster(hello.cluster, f"agent:{hello.node_id}", hello.address)
            claim = convert.claim_in(hello)
        except StewardError as error:
            await abort(context, error)
        stream = _Stream()
        peer = self._driver.connect(stream)
        self._driver.submit(OpenNodeSession(peer, claim))

        def command(request: registry_service_pb2.HoldNodeSessionRequest) -> Command | None:
            match request.WhichOneof("body"):
                case "holdings":
                    self.census.questions.answered(peer, holdings_in(request.holdings))
                    return None
                case "fences":
                    self.census.questions.answered(peer, fences_in(request.fences))
                    return None
            return convert.node_command(peer, request)

        def response(message: Message) -> registry_service_pb2.HoldNodeSessionResponse:
            if isinstance(message, NodeWelcome):
                # Not before: who asks for a name that is in use must not take its place here.
                self.census.nodes.opened(claim.node_id, peer, stream.deliver)
            return convert.node_response(message)

        end = StreamEnd.RESET
        try:
            end = await self._hold(context, stream, command, response)
        finally:
            self.census.node_closed(claim.node_id, peer)
            self._driver.disconnect(peer)
            self._driver.submit(CloseNodeSession(peer, end))
        if stream.error is not None:
            await abort(context, stream.error)

    async def HoldEdgeSession(  # type: ignore[override]
        self, _: Any, context: Any
    ) -> None:
        hello = await self._hello(context)
        try:
            self._check_cluster(hello.cluster, f"edge:{hello.edge_id}", "")
            edge_id = convert.edge_id_in(hello)
        except StewardError as error:
            await abort(context, error)
        stream = _Stream()
        peer = self._driver.connect(stream)
        self._driver.submit(OpenEdgeSession(peer, edge_id))
        asked: dict[int, float] = {}
        traced: dict[int, tuple[int, list[str]]] = {}

        def command(request: registry_service_pb2.HoldEdgeSessionRequest) -> Command | None:
            match request.WhichOneof("body"):
                case "connections":
                    self._connections.answered(edge_id, peer, request.connections)
                    return None
                case "holdings":
                    self.census.questions.answered(peer, holdings_in(request.holdings))
                    return None
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
                    start_ns, traces = traced.pop(message.request_id, (0, []))
                    exemplar = exemplar_of(traces[0]) if traces else None
                    self._resolve_seconds.observe(time.perf_counter() - began, exemplar)
                    for trace in traces:
                        self._tracing.record(
                            REGISTRY_RESOLVE, trace, start_ns, {}, kind=Kind.SERVER
                        )
            return convert.edge_response(message)

        self._connections.opened(edge_id, peer, stream.deliver)
        self.census.edges.opened(edge_id, peer, stream.deliver)
        try:
            await self._hold(context, stream, command, response)
        finally:
            self._connections.closed(edge_id, peer)
            self.census.edge_closed(edge_id, peer)
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

    def notice_foreign(self, caller: ForeignCluster) -> None:
        """A process with a token of another cluster was refused: keep that on record."""
        self._notice_foreign(caller.theirs, caller.who, "")

    def _notice_foreign(self, cluster: str, who: str, address: str) -> None:
        at = f" at {address}" if address else ""
        evidence = clean(f"{who}{at} is of cluster {cluster!r}, this one is {self._cluster!r}")
        self._driver.recorder.notice(Violation(ViolationKind.WRONG_CLUSTER, evidence), REPORTER)

    def _check_cluster(self, cluster: str, who: str, address: str) -> None:
        if cluster != self._cluster:
            self._notice_foreign(cluster, who, address)
            raise StewardError(
                Reason.PERMISSION_DENIED, f"this is cluster {self._cluster!r}; check --cluster"
            )

    async def _hold(
        self,
        context: Any,
        stream: _Stream,
        command: Callable[[Request], Command | None],
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
        self, context: Any, stream: _Stream, command: Callable[[Request], Command | None]
    ) -> None:
        """Submit what the peer says; ends the stream when the peer does, or breaks a rule."""
        try:
            while (request := await context.read()) is not grpc.aio.EOF:
                if (made := command(request)) is not None:
                    self._driver.submit(made)
        except StewardError as error:
            stream.fail(error)
        finally:
            stream.end()

    # Calls

    async def _ask(
        self,
        context: Any,
        kind: type[MessageT],
        command: Callable[[PeerId], Command],
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> MessageT:
        """Submit a command and wait for its one answer; ends the call when there is none."""
        try:
            answer = await ask(self._driver, command, timeout_s)
            if isinstance(answer, Refused):
                raise StewardError(answer.reason, answer.message)
            if not isinstance(answer, kind):
                raise StewardError(Reason.INTERNAL, "the registry gave another answer")
            return answer
        except TimeoutError:
            await abort(
                context, StewardError(Reason.STORE_UNAVAILABLE, "the store did not answer in time")
            )
        except StewardError as error:
            await abort(context, error)

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
            placement=convert.placement_out(found.placement),
            node_alive=found.alive,
            edges=found.edges,
        )

    async def DescribeCluster(
        self, _: registry_service_pb2.DescribeClusterRequest, context: Any
    ) -> registry_service_pb2.DescribeClusterResponse:
        described = await self._ask(context, ClusterDescribed, DescribeCluster)
        return convert.cluster_out(self._cluster, described)

    async def CountConnections(
        self, request: registry_service_pb2.CountConnectionsRequest, context: Any
    ) -> registry_service_pb2.CountConnectionsResponse:
        return await _or_abort(context, self._connections.count(request))

    async def ReportDeath(
        self, request: registry_service_pb2.ReportDeathRequest, context: Any
    ) -> registry_service_pb2.ReportDeathResponse:
        recorded = await self._ask(
            context,
            DeathRecorded,
            lambda peer: ReportDeath(
                peer, convert.node_id_in(request.node_id), request.pid, clean(request.evidence)
            ),
        )
        return registry_service_pb2.ReportDeathResponse(fenced=recorded.fenced)

    async def DrainNode(
        self, request: registry_service_pb2.DrainNodeRequest, context: Any
    ) -> registry_service_pb2.DrainNodeResponse:
        drained = await self._ask(
            context,
            NodeDrained,
            lambda peer: DrainNode(peer, convert.node_id_in(request.node_id)),
        )
        return registry_service_pb2.DrainNodeResponse(
            node_rev=drained.node_rev, placements=drained.placements
        )

    async def FenceNode(
        self, request: registry_service_pb2.FenceNodeRequest, context: Any
    ) -> registry_service_pb2.FenceNodeResponse:
        fenced = await self._ask(
            context,
            NodeFencedByOperator,
            lambda peer: FenceNodeByOperator(
                peer, convert.node_id_in(request.node_id), convert.cause_in(request.cause)
            ),
        )
        return registry_service_pb2.FenceNodeResponse(node_rev=fenced.node_rev)

    async def MoveUser(
        self, request: registry_service_pb2.MoveUserRequest, context: Any
    ) -> registry_service_pb2.MoveUserResponse:
        moved = await self._ask(
            context,
            UserMoved,
            lambda peer: MoveUser(
                peer,
                convert.user_in(request.user),
                convert.node_id_in(request.node_id) if request.node_id else NodeId(""),
            ),
            MOVE_TIMEOUT_S,
        )
        return registry_service_pb2.MoveUserResponse(
            placement=convert.placement_out(moved.placement), from_node=moved.from_node
        )

    async def EvictUser(
        self, request: registry_service_pb2.EvictUserRequest, context: Any
    ) -> registry_service_pb2.EvictUserResponse:
        evicted = await self._ask(
            context,
            UserEvicted,
            lambda peer: EvictUser(
                peer, convert.user_in(request.user), convert.cause_in(request.cause)
            ),
            MOVE_TIMEOUT_S,
        )
        return registry_service_pb2.EvictUserResponse(epoch=evicted.epoch)

    # Records

    async def ReportViolations(
        self, request: registry_service_pb2.ReportViolationsRequest, context: Any
    ) -> registry_service_pb2.ReportViolationsResponse:
        return await _or_abort(context, self._records.report(request, context))

    async def ListViolations(
        self, request: registry_service_pb2.ListViolationsRequest, context: Any
    ) -> registry_service_pb2.ListViolationsResponse:
        return await _or_abort(context, self._records.list_violations(request))

    async def ReadLedger(
        self, request: registry_service_pb2.ReadLedgerRequest, context: Any
    ) -> registry_service_pb2.ReadLedgerResponse:
        return await _or_abort(context, self._records.read_ledger(request))

    # The census

    async def TakeCensus(
        self, request: registry_service_pb2.TakeCensusRequest, context: Any
    ) -> registry_service_pb2.TakeCensusResponse:
        return await _or_abort(context, take_census(self.census, request))

    async def CheckLedger(  # type: ignore[override]
        self, _: registry_service_pb2.CheckLedgerRequest, context: Any
    ) -> None:
        await _watch(context, checking(self._driver.store, self.census))

    # Written with write on the context: a cancelled call then ends at once where it waits.
    async def WatchViolations(  # type: ignore[override]
        self, request: registry_service_pb2.WatchViolationsRequest, context: Any
    ) -> None:
        await _watch(context, self._records.watch_violations(request))

    async def WatchPlacements(  # type: ignore[override]
        self, request: registry_service_pb2.WatchPlacementsRequest, context: Any
    ) -> None:
        await _watch(context, self._records.watch_placements(request))


async def _or_abort(context: Any, answer: Awaitable[Response]) -> Response:
    """The answer; ends the call with the row of the error table when there is none."""
    try:
        return await answer
    except StewardError as error:
        await abort(context, error)


async def _watch(context: Any, responses: AsyncGenerator[Response, None]) -> None:
    """Write what comes until the client is gone; a client that does not read is waited for."""
    try:
        async with aclosing(responses):
            async for response in responses:
                await context.write(response)
    except StoreFailed:
        await abort(
            context, StewardError(Reason.STORE_UNAVAILABLE, "the store failed; watch again")
        )
    except StewardError as error:
        await abort(context, error)
