"""How events lie in a row: a chunk is a run of consecutive events of one append and one thread.

One row for several events is what makes a row store fast enough; one thread per row is
what lets the index answer for threads. Each event is a little-endian word, its length
doubled plus one if it belongs to the conversation, and then its bytes. Pure.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from agent_service.core.journal import StoredEvent

_WORD = struct.Struct("<I")


class ChunkCorrupt(Exception):
    """A stored chunk does not hold what its row says."""


class Chunk(NamedTuple):
    """`number` events of one thread; `conversation` if any of them belongs to it."""

    number: int
    thread_id: str
    conversation: bool
    packed: bytes


def pack(events: Sequence[StoredEvent]) -> list[Chunk]:
    """Cut the events of an append into chunks, in order."""
    if len(events) == 1:
        event = events[0]
        word = _WORD.pack(len(event.payload) << 1 | event.conversation)
        return [Chunk(1, event.thread_id, event.conversation, word + event.payload)]
    chunks: list[Chunk] = []
    begin = 0
    for end in range(1, len(events) + 1):
        if end < len(events) and events[end].thread_id == events[begin].thread_id:
            continue
        parts: list[bytes] = []
        conversation = False
        for event in events[begin:end]:
            parts.append(_WORD.pack(len(event.payload) << 1 | event.conversation))
            parts.append(event.payload)
            conversation = conversation or event.conversation
        chunks.append(Chunk(end - begin, events[begin].thread_id, conversation, b"".join(parts)))
        begin = end
    return chunks


def unpack(count: int, packed: bytes) -> Iterator[tuple[bytes, bool]]:
    """Payload and conversation flag of each event. Raises ChunkCorrupt before a wrong one."""
    at = 0
    for _ in range(count):
        if at + 4 > len(packed):
            raise ChunkCorrupt("a chunk ends before its last event")
        (word,) = _WORD.unpack_from(packed, at)
        begin = at + 4
        at = begin + (word >> 1)
        if at > len(packed):
            raise ChunkCorrupt("an event is longer than its chunk")
        yield packed[begin:at], bool(word & 1)
    if at != len(packed):
        raise ChunkCorrupt("a chunk goes on after its last event")
