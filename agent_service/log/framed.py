"""Framed connections of nodes, at the log's end: hello, welcome, then batches and answers.

The same contract as `LogService.HoldLogStream`, checked by the same role tokens, without a
thread or a task for each message (docs/decisions/0007). A node that breaks the contract is
told why in a last message. One that does not read its answers is not read either, once
`MOST_IN_FLIGHT` operations have no answer on its way; an answer that a node did not get is
lost here: the node sends the same operation again, and the engine recognises it.
"""

import asyncio
from collections.abc import Callable

from google.protobuf.message import DecodeError

from agent_service.log.answers import Answered, responses
from agent_service.log.intake import Intake
from agent_service.log.port import LogEngine
from agent_service.log.spans import UNTRACED
from steward.errors import Reason, StewardError
from steward.model.violations import Violation
from steward.rpc.factory import MAX_MESSAGE_BYTES
from steward.rpc.frame_guard import MOST_HELLO_BYTES, SILENT_S, FrameGuard
from steward.rpc.frames import FrameConnection
from steward.rpc.roles import Role, RoleVerifier
from steward.telemetry.tracing import Tracing
from steward.v1 import log_service_pb2 as pb
from steward.v1 import registry_service_pb2

HELLO_S = 5.0


class FramedNodes:
    """All framed connections of a log process."""

    def __init__(
        self,
        log: LogEngine,
        cluster: str,
        verifier: RoleVerifier,
        report: Callable[[Violation], None],
        tracing: Tracing = UNTRACED,
    ) -> None:
        self.tracing = tracing
        self.log = log
        self.cluster = cluster
        self.verifier = verifier
        self.report = report
        self._nodes: set[_FramedNode] = set()

    def accept(self) -> FrameConnection:
        """The protocol of a connection that has begun with the preface."""
        node = _FramedNode(self)
        self._nodes.add(node)
        return node.connection

    def gone(self, node: "_FramedNode") -> None:
        self._nodes.discard(node)

    def end(self) -> None:
        """End every connection after the answers that are there. Nodes come back by themselves."""
        for node in list(self._nodes):
            node.connection.close()


class _FramedNode:
    """One connection, and the `FrameOwner` of it."""

    def __init__(self, nodes: FramedNodes) -> None:
        self.connection = FrameConnection(self, MOST_HELLO_BYTES)
        self._nodes = nodes
        self._intake: Intake | None = None
        # A message that came when too much had no answer; nothing is read until it is taken.
        self._held: pb.LogBatch | None = None
        self._answered: list[Answered] = []
        self._ping = 0
        self._flushing = False
        self._loop = asyncio.get_running_loop()
        self._guard = FrameGuard(self.connection, HELLO_S, self._too_late)

    # What the connection calls.

    def received(self, frame: bytes) -> None:
        self._guard.heard = True
        try:
            self._take(pb.HoldLogStreamRequest.FromString(frame))
        except DecodeError:
            self._refuse(StewardError(Reason.PROTOCOL_VIOLATION, "no message of a node"))
        except StewardError as error:
            self._refuse(error)

    def drained(self) -> None:
        self._flush()

    def lost(self, why: str) -> None:
        self._guard.over()
        self._held = None
        self._nodes.gone(self)

    # Messages of the node.

    def _take(self, request: pb.HoldLogStreamRequest) -> None:
        if self._intake is None:
            self._greet(request)
        elif request.HasField("batch"):
            self._submit(request.batch)
        elif request.HasField("ping"):
            self._ping = request.ping.number
            self._flush()
        else:
            raise StewardError(Reason.PROTOCOL_VIOLATION, "batches and pings follow the hello")

    def _greet(self, request: pb.HoldLogStreamRequest) -> None:
        if not request.HasField("hello"):
            raise StewardError(Reason.PROTOCOL_VIOLATION, "a log stream begins with a hello")
        hello, nodes = request.hello, self._nodes
        role = nodes.verifier.role_of(hello.role_token)
        if role is not Role.AGENT:
            raise StewardError(Reason.PERMISSION_DENIED, f"role {role} may not append")
        if hello.cluster != nodes.cluster:
            raise StewardError(
                Reason.PERMISSION_DENIED, f"this is cluster {nodes.cluster!r}; check --cluster"
            )
        self.connection.most_bytes = MAX_MESSAGE_BYTES
        self._guard.welcomed(SILENT_S, "the node is silent")
        told = (nodes.report, self._done, self._refuse)
        self._intake = Intake(nodes.log, hello.node_id, *told, nodes.tracing)
        welcome = pb.LogWelcome(log_id=nodes.log.log_id)
        self._send(pb.HoldLogStreamResponse(welcome=welcome))

    def _submit(self, batch: pb.LogBatch) -> None:
        assert self._intake is not None
        if self._intake.has_room(batch):
            self._intake.submit(batch)
        else:
            self._held = batch
            self.connection.pause()

    # Answers.

    def _done(self, answered: Answered) -> None:
        self._answered.append(answered)
        if not self._flushing:
            # Behind the other messages of this node that were committed in the same group.
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Send what is there, unless the node does not read: then all of it when it does."""
        self._flushing = False
        if self.connection.choked:
            return
        if self._ping:
            number, self._ping = self._ping, 0
            self._send(pb.HoldLogStreamResponse(pong=pb.LogPong(number=number)))
        if not self._answered or self._intake is None:
            return
        answered, self._answered = self._answered, []
        for message in responses(answered):
            self._send(message)
        self._intake.sent(answered)
        if self._held is not None and self._intake.has_room(self._held):
            batch, self._held = self._held, None
            try:
                self._intake.submit(batch)
            except StewardError as error:
                self._refuse(error)
            self.connection.resume()

    def _send(self, message: pb.HoldLogStreamResponse) -> None:
        self.connection.send(message.SerializeToString())

    # The end.

    def _too_late(self) -> None:
        self._refuse(StewardError(Reason.PROTOCOL_VIOLATION, "no hello in time"))

    def _refuse(self, error: StewardError) -> None:
        refused = registry_service_pb2.Refusal(reason=error.reason.value, message=error.message)
        self._send(pb.HoldLogStreamResponse(refused=refused))
        self._guard.end(error.message)
