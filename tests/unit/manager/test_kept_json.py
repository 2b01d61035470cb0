"""JSON that is kept costs its own size: the reason why it is copied once."""

import tracemalloc

from agent_service.core.encoding import EventEncoder
from steward.model.kept_json import kept_json
from steward.model.keys import Epoch, StreamId

MANY = 500


def test_kept_json_holds_no_buffer() -> None:
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        kept = [kept_json({"number": number}) for number in range(MANY)]
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept[7] == b'{"number":7}'
    assert (after - before) / MANY < 200


def test_encoder_of_an_idle_manager_is_small() -> None:
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        kept = [EventEncoder(StreamId(f"stream-{number}"), Epoch(1)) for number in range(MANY)]
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(kept) == MANY
    assert (after - before) / MANY < 600
