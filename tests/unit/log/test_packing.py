"""Chunks: what is packed comes back, and damage is noticed before a wrong event is returned."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_service.core.journal import StoredEvent
from agent_service.log.packing import ChunkCorrupt, pack, unpack

events = st.lists(
    st.builds(StoredEvent, st.binary(max_size=40), st.sampled_from(["a", "b"]), st.booleans()),
    min_size=1,
    max_size=8,
)


@given(events)
def test_chunks_hold_the_events_in_order_each_of_one_thread(written: list[StoredEvent]) -> None:
    chunks = pack(written)
    found = [
        StoredEvent(payload, chunk.thread_id, conversation)
        for chunk in chunks
        for payload, conversation in unpack(chunk.number, chunk.packed)
    ]
    assert found == written
    threads = [chunk.thread_id for chunk in chunks]
    assert all(left != right for left, right in pairwise(threads))


@given(events)
def test_chunk_is_marked_if_any_event_belongs_to_the_conversation(
    written: list[StoredEvent],
) -> None:
    for chunk in pack(written):
        flags = [conversation for _, conversation in unpack(chunk.number, chunk.packed)]
        assert chunk.conversation == any(flags)


def test_no_events_are_no_chunks() -> None:
    assert pack([]) == []


@pytest.mark.parametrize(
    ("number", "packed"),
    [
        (1, b""),
        (1, b"\x02\x00\x00"),
        (1, b"\x08\x00\x00\x00abc"),
        (2, b"\x02\x00\x00\x00a"),
        (1, b"\x02\x00\x00\x00ab"),
        (0, b"\x00"),
    ],
)
def test_damaged_chunk_is_noticed(number: int, packed: bytes) -> None:
    with pytest.raises(ChunkCorrupt):
        list(unpack(number, packed))
