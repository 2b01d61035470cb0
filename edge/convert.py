"""Between the edge's own values and the protos: the only module that knows both."""

from collections.abc import Iterable

from edge.core.commands import (
    Accepted,
    AnnounceClient,
    Answer,
    AnswerBody,
    Attach,
    Attached,
    CancelAccepted,
    CancelRun,
    ClientTaken,
    Delivery,
    Detach,
    EdgeCommand,
    InputAccepted,
    ManagerLost,
    Refused,
    SubmitInput,
    SubmitMessage,
    TraceAnnounced,
)
from steward.errors import Reason, StewardError
from steward.model.identity import Identity
from steward.model.keys import Epoch, NodeId, NodeIncarnation, NodeRev, StreamId, UserKey
from steward.model.placement import Placement
from steward.v1 import (
    agent_service_pb2,
    auth_service_pb2,
    placement_pb2,
    registry_service_pb2,
)

_new = tuple.__new__


def user_to_proto(user: UserKey) -> placement_pb2.UserKey:
    return placement_pb2.UserKey(tenant_id=user.tenant, user_id=user.user)


def user_of(proto: placement_pb2.UserKey) -> UserKey:
    return UserKey(proto.tenant_id, proto.user_id)


def placement_of(proto: placement_pb2.Placement) -> Placement:
    return Placement(
        user=user_of(proto.user),
        epoch=Epoch(proto.epoch),
        node_id=NodeId(proto.node_id),
        node_rev=NodeRev(proto.node_rev),
        address=proto.address,
    )


def nodes_of(proto: registry_service_pb2.ClusterNodes) -> dict[NodeIncarnation, str]:
    """The living incarnations, and the addresses of their gRPC servers."""
    return {
        NodeIncarnation(NodeId(node.node_id), NodeRev(node.node_rev)): node.address
        for node in proto.nodes
    }


def reason_of(text: str) -> Reason:
    """The row of that name; a name of a later version is INTERNAL."""
    return Reason(text) if text in Reason.__members__ else Reason.INTERNAL


def error_of_refusal(proto: registry_service_pb2.Refusal) -> StewardError:
    return StewardError(
        reason_of(proto.reason), proto.message, retry_after_ms=proto.retry_after_ms or None
    )


def identity_of(proto: auth_service_pb2.Identity) -> Identity:
    return Identity(
        user=user_of(proto.user),
        scopes=tuple(proto.scopes),
        expires_at_ms=proto.expires_at_ms,
        issued_at_ms=proto.issued_at_ms,
        token_id=proto.token_id,
    )


def command_to_proto(command: EdgeCommand) -> agent_service_pb2.EdgeCommand:
    proto = agent_service_pb2.EdgeCommand(
        user=user_to_proto(command.user),
        epoch=command.epoch,
        command_id=command.command_id,
        traceparent=command.traceparent,
    )
    match command.body:
        case Attach(gap_ms, channel):
            proto.attach.SetInParent()
            proto.attach.gap_ms = gap_ms
            proto.attach.channel = channel
        case Detach():
            proto.detach.SetInParent()
        case AnnounceClient(client_id):
            proto.announce_client.client_id = client_id
        case SubmitMessage(id, content, thread_id, agent, overlap, _):
            message = proto.submit_message
            message.id = id
            message.content = content
            message.thread_id = thread_id
            message.agent = agent
            message.overlap = overlap
        case CancelRun(run_id, thread_id):
            proto.cancel_run.run_id = run_id
            proto.cancel_run.thread_id = thread_id
            proto.cancel_run.SetInParent()
        case SubmitInput(request_id, value):
            proto.submit_input.request_id = request_id
            proto.submit_input.value = value
    return proto


def answer_of(proto: agent_service_pb2.Answer) -> Answer:
    return Answer(user_of(proto.user), Epoch(proto.epoch), proto.command_id, _answer_body_of(proto))


def _answer_body_of(proto: agent_service_pb2.Answer) -> AnswerBody:
    match proto.WhichOneof("body"):
        case "attached":
            attached = proto.attached
            return Attached(
                StreamId(attached.stream_id), attached.sequence, max(attached.oldest_sequence, 1)
            )
        case "accepted":
            accepted = proto.accepted
            return Accepted(
                accepted.id,
                accepted.run_id,
                accepted.sequence,
                accepted.duplicate,
                accepted.queue_position,
            )
        case "cancel_accepted":
            return CancelAccepted(proto.cancel_accepted.run_id)
        case "input_accepted":
            return InputAccepted(proto.input_accepted.request_id)
        case "manager_lost":
            return ManagerLost(proto.manager_lost.reason, proto.manager_lost.known_epoch)
        case "client_taken":
            return ClientTaken(proto.client_taken.client_id)
        case "refused":
            refusal = proto.refused.refusal
            return Refused(
                reason_of(refusal.reason),
                refusal.message,
                refusal.retry_after_ms,
                proto.refused.known_epoch,
            )
        case _:
            return Refused(Reason.INTERNAL, "an answer of a later version")


def traces_of(protos: Iterable[agent_service_pb2.EventTrace]) -> list[TraceAnnounced]:
    """Which events are sampled."""
    return [
        TraceAnnounced(
            proto.channel,
            None if proto.channel else user_of(proto.user),
            proto.sequence,
            proto.traceparent,
        )
        for proto in protos
    ]


def deliveries_of(protos: Iterable[agent_service_pb2.Delivery]) -> list[Delivery]:
    """The deliveries that have events. One call per message; written for speed.

    A slice copies a repeated field faster than `list`, and `tuple.__new__` makes a named
    tuple without the Python function around it: 1.4 instead of 3.0 microseconds each.
    """
    made: list[Delivery] = []
    for proto in protos:
        events = proto.events
        if events:
            user = proto.user
            key = _new(UserKey, (user.tenant_id, user.user_id))
            made.append(_new(Delivery, (key, proto.epoch, proto.first_sequence, events[:])))
    return made
