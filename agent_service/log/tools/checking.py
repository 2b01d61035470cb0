"""Whether an event log holds together: what a manager, a reader and the fence rely on."""

from collections.abc import AsyncIterator, Callable, Iterator

import orjson

from agent_service.core.journal import RecordKind
from agent_service.log.packing import ChunkCorrupt, unpack
from agent_service.log.rules import thread_sequence
from agent_service.log.tools.store import Store, StoredChunk, StoredStream

MOST_FINDINGS = 100

_KINDS = frozenset(kind.value for kind in RecordKind) - {RecordKind.THREAD.value}


async def check(store: Store, step: Callable[[int], None]) -> tuple[list[str], int]:
    """What is wrong, at most MOST_FINDINGS texts for operators, and how many things it are.

    `step` is told how many events were checked.
    """
    found = await store.findings()
    number = len(found)
    streams = events = 0
    async for stream in store.streams():
        who = f"{stream.user.tenant}/{stream.user.user}"
        streams += 1
        held = 0
        async for text in _check_stream(store, stream):
            number += 1
            if len(found) < MOST_FINDINGS:
                found.append(f"{who}: {text}")
        held = stream.next - stream.oldest
        events += held
        step(held)
    totals = await store.totals()
    for what, said, counted in (
        ("users", totals.streams, streams),
        ("events", totals.events, events),
    ):
        if said != counted:
            number += 1
            found.append(f"the totals say {said} {what}, and there are {counted}")
    return found[:MOST_FINDINGS], number


async def _check_stream(store: Store, stream: StoredStream) -> AsyncIterator[str]:
    if stream.fence < 1 or not stream.activation or not stream.stream_id:
        yield "it has no fence, activation or stream id"
    expected, epoch = stream.oldest, 0
    async for chunk in store.chunks(stream):
        if chunk.first != expected:
            yield f"event {expected} should follow, and {chunk.first} does"
        if chunk.epoch < epoch:
            yield f"event {chunk.first} is of epoch {chunk.epoch}, after one of {epoch}"
        expected, epoch = chunk.first + chunk.events, chunk.epoch
        for text in _check_chunk(chunk):
            yield text
    if expected != stream.next:
        yield f"its last event is {expected - 1}, and its head says {stream.next - 1}"
    if epoch > stream.fence:
        yield f"it has events of epoch {epoch}, and its fence is {stream.fence}"
    for record in await store.records(stream):
        if record.kind not in _KINDS or not _is_json(record.value):
            yield f"record {record.key!r} of kind {record.kind} can't be read"
    for thread in await store.threads(stream):
        try:
            sequence = thread_sequence(thread.value)
        except ValueError:
            yield f"thread {thread.thread_id!r} can't be read"
            continue
        if sequence != thread.sequence:
            yield f"thread {thread.thread_id!r} is listed by {thread.sequence}, not {sequence}"
        if sequence >= stream.next:
            yield f"thread {thread.thread_id!r} is of event {sequence}, which there is not"


def _check_chunk(chunk: StoredChunk) -> Iterator[str]:
    try:
        events = list(unpack(chunk.events, chunk.packed))
    except ChunkCorrupt as error:
        yield f"event {chunk.first} and those with it can't be read: {error}"
        return
    if not events:
        yield f"an empty run of events at {chunk.first}"
    if any(conversation for _, conversation in events) != chunk.conversation:
        yield f"event {chunk.first} and those with it are marked wrongly"
    for sequence, (payload, _) in enumerate(events, chunk.first):
        try:
            event = orjson.loads(payload)
        except ValueError:
            yield f"event {sequence} is no JSON"
            continue
        said = event.get("sequence", sequence) if isinstance(event, dict) else sequence
        if said != sequence:
            yield f"event {sequence} says that it is {said}"


def _is_json(value: bytes) -> bool:
    try:
        orjson.loads(value)
    except ValueError:
        return False
    return True
