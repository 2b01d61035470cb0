"""Between the node's values and the generated types of its gRPC peers."""

from collections.abc import Iterable

from agent_service.core.commands import (
    AnnounceClient,
    AttachEdge,
    CancelRun,
    DetachEdge,
    SubmitInput,
    SubmitMessage,
)
from agent_service.core.effects import (
    AnswerAccepted,
    AnswerAttached,
    AnswerCancelled,
    AnswerRefused,
    Deliver,
)
from steward.model.keys import (
    DEFAULT_THREAD,
    EdgeId,
    Epoch,
    NodeId,
    NodeRev,
    RunId,
    ThreadId,
    UserKey,
)
from steward.model.placement import Placement
from steward.v1 import agent_service_pb2 as pb
from steward.v1 import placement_pb2, registry_service_pb2


def user_to_proto(user: UserKey) -> placement_pb2.UserKey:
    return placement_pb2.UserKey(tenant_id=user.tenant, user_id=user.user)


def user_from_proto(user: placement_pb2.UserKey) -> UserKey:
    return UserKey(user.tenant_id, user.user_id)


def placement_from_proto(placement: placement_pb2.Placement) -> Placement:
    return Placement(
        user_from_proto(placement.user),
        Epoch(placement.epoch),
        NodeId(placement.node_id),
        NodeRev(placement.node_rev),
        placement.address,
    )


def command_from_proto(
    edge_id: EdgeId, command: pb.EdgeCommand
) -> AttachEdge | DetachEdge | SubmitMessage | CancelRun | SubmitInput | AnnounceClient | None:
    """The command of an edge; None for a body that this version does not know."""
    match command.WhichOneof("body"):
        case "submit_message":
            message = command.submit_message
            return SubmitMessage(
                edge_id,
                command.command_id,
                message.id,
                message.content,
                ThreadId(message.thread_id) or DEFAULT_THREAD,
                message.agent,
                message.overlap,
                command.traceparent,
            )
        case "attach":
            return AttachEdge(edge_id, command.command_id, command.attach.gap_ms)
        case "detach":
            return DetachEdge(edge_id)
        case "cancel_run":
            cancel = command.cancel_run
            return CancelRun(
                edge_id, command.command_id, RunId(cancel.run_id), ThreadId(cancel.thread_id)
            )
        case "submit_input":
            given = command.submit_input
            return SubmitInput(edge_id, command.command_id, given.request_id, given.value)
        case "announce_client":
            return AnnounceClient(edge_id, command.announce_client.client_id)
    return None


def answer_to_proto(
    user: UserKey,
    epoch: Epoch,
    answer: AnswerAttached | AnswerAccepted | AnswerCancelled | AnswerRefused,
    known: Epoch,
) -> pb.Answer:
    message = pb.Answer(user=user_to_proto(user), epoch=epoch, command_id=answer.command_id)
    match answer:
        case AnswerAttached():
            message.attached.stream_id = answer.stream_id
            message.attached.sequence = answer.sequence
            message.attached.oldest_sequence = answer.oldest_sequence
            message.attached.messages_per_minute = answer.messages_per_minute
        case AnswerAccepted():
            message.accepted.id = answer.id
            message.accepted.run_id = answer.run_id
            message.accepted.sequence = answer.sequence
            message.accepted.duplicate = answer.duplicate
            message.accepted.queue_position = answer.queue_position
        case AnswerCancelled():
            message.cancel_accepted.run_id = answer.run_id
        case AnswerRefused():
            message.refused.CopyFrom(
                pb.CommandRefused(
                    refusal=registry_service_pb2.Refusal(
                        reason=answer.reason.value,
                        message=answer.message,
                        retry_after_ms=answer.retry_after_ms,
                    ),
                    known_epoch=known,
                )
            )
    return message


def delivery_to_proto(user: UserKey, epoch: Epoch, events: Deliver) -> pb.Delivery:
    return pb.Delivery(
        user=user_to_proto(user),
        epoch=epoch,
        first_sequence=events.first,
        last_sequence=events.last,
        events=events.payloads,
    )


def traces_to_proto(
    user: UserKey, channel: int | None, traces: Iterable[tuple[int, str]]
) -> list[pb.EventTrace]:
    """Sequences and contexts of sampled events, named as their delivery is."""
    whose = user_to_proto(user) if channel is None else None
    return [
        pb.EventTrace(channel=channel or 0, user=whose, sequence=sequence, traceparent=trace)
        for sequence, trace in traces
    ]
