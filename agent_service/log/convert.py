"""Between the values of the log and the messages of `log_service.proto`, both ways.

Nothing else in the log knows generated types and values at once. `*_from` functions take
what a peer sent and raise StewardError(PROTOCOL_VIOLATION) for what can't be right.
"""

from collections.abc import Iterable

from agent_service.core.journal import (
    Append,
    AppendOutcome,
    Committed,
    Conflict,
    Fenced,
    Record,
    RecordKind,
    Seal,
    Sealed,
    SealOutcome,
    StoredEvent,
)
from agent_service.log.port import (
    EventPage,
    FencePage,
    LogSummary,
    OpenRunPage,
    ReadRange,
    ThreadSummary,
)
from agent_service.log.rules import check_append, check_seal
from steward.errors import Reason, StewardError
from steward.model.keys import Epoch, Sequence, StreamId, UserKey
from steward.v1 import agent_service_pb2, log_service_pb2, placement_pb2, registry_service_pb2

_KINDS = {int(kind): kind for kind in RecordKind}


def user_from(message: placement_pb2.UserKey) -> UserKey:
    """A user key; both parts must be there."""
    if not message.tenant_id or not message.user_id:
        raise StewardError(Reason.PROTOCOL_VIOLATION, "a user key has a tenant and a user id")
    return UserKey(message.tenant_id, message.user_id)


def user_to(user: UserKey) -> placement_pb2.UserKey:
    """A user key as a message."""
    return placement_pb2.UserKey(tenant_id=user.tenant, user_id=user.user)


def seal_from(message: log_service_pb2.SealStream) -> Seal:
    """A checked seal."""
    user, epoch = user_from(message.user), Epoch(message.epoch)
    seal = Seal(user, epoch, message.activation, message.traceparent)
    try:
        check_seal(seal)
    except ValueError as error:
        raise StewardError(Reason.PROTOCOL_VIOLATION, str(error)) from None
    return seal


def fill_seal(message: log_service_pb2.SealStream, request_id: int, seal: Seal) -> None:
    """Write a seal into a batch's message."""
    message.request_id = request_id
    message.user.tenant_id, message.user.user_id = seal.user
    message.epoch = seal.epoch
    message.activation = seal.activation
    message.traceparent = seal.traceparent


def append_from(message: log_service_pb2.AppendEvents) -> tuple[Append, int]:
    """A checked append, and the bytes it carries."""
    traces = message.traces
    append = Append(
        user=user_from(message.user),
        epoch=Epoch(message.epoch),
        append_number=message.append_number,
        expected_sequence=Sequence(message.expected_sequence),
        events=tuple([StoredEvent(e.payload, e.thread_id, e.conversation) for e in message.events]),
        records=records_from(message.records) if message.records else (),
        traces=tuple([(t.sequence, t.traceparent) for t in traces]) if traces else (),
    )
    try:
        return append, check_append(append)
    except ValueError as error:
        raise StewardError(Reason.PROTOCOL_VIOLATION, str(error)) from None


def fill_append(message: log_service_pb2.AppendEvents, request_id: int, append: Append) -> None:
    """Write an append into a batch's message."""
    message.request_id = request_id
    message.user.tenant_id, message.user.user_id = append.user
    message.epoch = append.epoch
    message.append_number = append.append_number
    message.expected_sequence = append.expected_sequence
    add = message.events.add
    for event in append.events:
        if event.conversation:
            add(payload=event.payload, thread_id=event.thread_id, conversation=True)
        else:
            add(payload=event.payload, thread_id=event.thread_id)
    for record in append.records:
        fill_record(message.records.add(), record)
    for sequence, trace in append.traces:
        message.traces.add(sequence=sequence, traceparent=trace)


def records_from(messages: Iterable[log_service_pb2.Record]) -> tuple[Record, ...]:
    """Records of known kinds."""
    records: list[Record] = []
    for message in messages:
        kind = _KINDS.get(message.kind)
        if kind is None:
            raise StewardError(Reason.PROTOCOL_VIOLATION, f"no record kind {message.kind}")
        records.append(Record(kind, message.key, message.value, message.deleted))
    return tuple(records)


def fill_record(message: log_service_pb2.Record, record: Record) -> None:
    """Write a record into a message."""
    message.kind = log_service_pb2.RecordKind.ValueType(record.kind.value)
    message.key = record.key
    if record.deleted:
        message.deleted = True
    else:
        message.value = record.value


def fill_seal_answer(
    message: log_service_pb2.SealAnswer,
    request_id: int,
    outcome: SealOutcome,
    *,
    more: bool = False,
) -> None:
    """Write the outcome of a seal into an answer; with `more`, its other records follow."""
    message.request_id = request_id
    if isinstance(outcome, Fenced):
        message.fenced.fence = outcome.fence
        return
    sealed = message.sealed
    sealed.stream_id = outcome.stream_id
    sealed.next_sequence = outcome.next_sequence
    sealed.oldest_sequence = outcome.oldest_sequence
    sealed.last_append_number = outcome.last_append_number
    sealed.more = more
    for record in outcome.records:
        fill_record(sealed.records.add(), record)


def seal_outcome_from(message: log_service_pb2.SealAnswer) -> SealOutcome:
    """The outcome of a seal."""
    match message.WhichOneof("result"):
        case "sealed":
            sealed = message.sealed
            return Sealed(
                stream_id=StreamId(sealed.stream_id),
                next_sequence=Sequence(sealed.next_sequence),
                oldest_sequence=Sequence(sealed.oldest_sequence),
                records=records_from(sealed.records),
                last_append_number=sealed.last_append_number,
            )
        case "fenced":
            return Fenced(Epoch(message.fenced.fence))
        case _:
            raise StewardError(Reason.PROTOCOL_VIOLATION, "a seal was answered with nothing")


def fill_append_answer(
    message: log_service_pb2.AppendAnswer, request_id: int, outcome: AppendOutcome
) -> None:
    """Write the outcome of an append into an answer."""
    message.request_id = request_id
    if type(outcome) is Committed:
        message.committed.next_sequence = outcome.next_sequence
    elif type(outcome) is Fenced:
        # Also set when the fence is 0 (a user that was never sealed).
        message.fenced.SetInParent()
        message.fenced.fence = outcome.fence
    elif type(outcome) is Conflict:
        message.conflict.next_sequence = outcome.next_sequence


def append_outcome_from(message: log_service_pb2.AppendAnswer) -> AppendOutcome:
    """The outcome of an append."""
    match message.WhichOneof("result"):
        case "committed":
            return Committed(Sequence(message.committed.next_sequence))
        case "fenced":
            return Fenced(Epoch(message.fenced.fence))
        case "conflict":
            return Conflict(Sequence(message.conflict.next_sequence))
        case _:
            raise StewardError(Reason.PROTOCOL_VIOLATION, "an append was answered with nothing")


def range_from(message: agent_service_pb2.ReadEventsRequest) -> ReadRange:
    """The range of a read; unset limits are the defaults."""
    default = ReadRange()
    return ReadRange(
        after=message.after,
        until=message.until,
        limit=message.limit or default.limit,
        max_bytes=message.max_bytes or default.max_bytes,
        thread_id=message.thread_id,
        newest=message.newest,
        conversation=message.conversation,
    )


def range_to(user: UserKey, wanted: ReadRange) -> agent_service_pb2.ReadEventsRequest:
    """A read as a request."""
    return agent_service_pb2.ReadEventsRequest(
        user=user_to(user),
        after=wanted.after,
        until=wanted.until,
        limit=max(wanted.limit, 1),
        max_bytes=max(wanted.max_bytes, 1),
        thread_id=wanted.thread_id,
        newest=wanted.newest,
        conversation=wanted.conversation,
    )


def page_from(message: agent_service_pb2.ReadEventsResponse) -> EventPage:
    """A page of events."""
    return EventPage(
        stream_id=StreamId(message.stream_id),
        events=tuple(message.events),
        sequences=tuple(message.sequences),
        head=message.head,
        oldest_sequence=message.oldest_sequence,
        more=message.more,
    )


def page_to(page: EventPage) -> agent_service_pb2.ReadEventsResponse:
    """A page of events as a response."""
    return agent_service_pb2.ReadEventsResponse(
        stream_id=page.stream_id,
        events=page.events,
        sequences=page.sequences,
        head=page.head,
        oldest_sequence=page.oldest_sequence,
        more=page.more,
    )


def threads_from(
    message: agent_service_pb2.ListThreadsResponse,
) -> tuple[list[ThreadSummary], str]:
    """A page of threads and the next one."""
    threads = [
        ThreadSummary(t.thread_id, t.title, t.sequence, t.updated_at) for t in message.threads
    ]
    return threads, message.next


def threads_to(
    threads: list[ThreadSummary], following: str
) -> agent_service_pb2.ListThreadsResponse:
    """A page of threads as a response."""
    return agent_service_pb2.ListThreadsResponse(
        threads=[
            agent_service_pb2.Thread(
                thread_id=thread.thread_id,
                title=thread.title,
                sequence=thread.sequence,
                updated_at=thread.updated_at,
            )
            for thread in threads
        ],
        next=following,
    )


def open_runs_from(message: log_service_pb2.ListOpenRunsResponse) -> OpenRunPage:
    """A page of users."""
    return OpenRunPage(tuple(user_from(user) for user in message.users), message.more)


def open_runs_to(page: OpenRunPage) -> log_service_pb2.ListOpenRunsResponse:
    """A page of users as a response."""
    return log_service_pb2.ListOpenRunsResponse(
        users=[user_to(user) for user in page.users], more=page.more
    )


def fences_from(message: log_service_pb2.ReadFencesResponse) -> FencePage:
    """A page of fences."""
    found = tuple((user_from(owned.user), Epoch(owned.epoch)) for owned in message.fences)
    return FencePage(found, message.more)


def fences_to(page: FencePage) -> log_service_pb2.ReadFencesResponse:
    """A page of fences as a response."""
    return log_service_pb2.ReadFencesResponse(
        fences=[
            registry_service_pb2.OwnedUser(user=user_to(user), epoch=fence)
            for user, fence in page.fences
        ],
        more=page.more,
    )


def summary_from(message: log_service_pb2.DescribeLogResponse) -> LogSummary:
    """Totals."""
    return LogSummary(
        log_id=message.log_id,
        streams=message.streams,
        events=message.events,
        largest_fence=message.largest_fence,
        open_runs=message.open_runs,
    )


def summary_to(summary: LogSummary) -> log_service_pb2.DescribeLogResponse:
    """Totals as a response."""
    return log_service_pb2.DescribeLogResponse(
        log_id=summary.log_id,
        streams=summary.streams,
        events=summary.events,
        largest_fence=summary.largest_fence,
        open_runs=summary.open_runs,
    )
