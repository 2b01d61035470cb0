"""`LogState` as simulations use it: snapshots, and stream ids from outside."""

from agent_service.core.journal import (
    Append,
    Committed,
    Conflict,
    Fenced,
    Record,
    RecordKind,
    Seal,
    Sealed,
    StoredEvent,
)
from agent_service.log.memory import LogState
from agent_service.log.port import ReadRange
from steward.model.keys import Epoch, Sequence, StreamId, UserKey

ALICE = UserKey("default", "alice")


def make_state() -> LogState:
    return LogState(lambda: StreamId("stream"))


def append_of(number: int, *records: Record) -> Append:
    event = StoredEvent(str(number).encode(), "main")
    return Append(ALICE, Epoch(1), number, Sequence(number), (event,), records)


def test_restore_goes_back_to_the_snapshot_as_often_as_wanted() -> None:
    state = make_state()
    state.seal(Seal(ALICE, Epoch(1), "a"))
    state.append(append_of(1, Record(RecordKind.RUN, "r", b"1")))
    snapshot = state.snapshot()
    for _ in range(2):
        assert state.append(append_of(2)) == Committed(Sequence(3))
        assert isinstance(state.seal(Seal(ALICE, Epoch(2), "b")), Sealed)
        assert state.append(append_of(3)) == Fenced(Epoch(2))
        state.restore(snapshot)
        assert state.read(ALICE, ReadRange()).events == (b"1",)
        assert state.append(append_of(1)) == Committed(Sequence(2))
        sealed = state.seal(Seal(ALICE, Epoch(1), "a"))
        assert isinstance(sealed, Sealed)
        assert sealed.last_append_number == 1


def test_snapshot_is_restored_into_another_state() -> None:
    state = make_state()
    assert state.seal(Seal(ALICE, Epoch(1), "a")) == Sealed(
        StreamId("stream"), Sequence(1), Sequence(1), ()
    )
    state.append(append_of(1))
    other = LogState(lambda: StreamId("never used"))
    other.restore(state.snapshot())
    assert other.append(append_of(3)) == Conflict(Sequence(2))
    assert other.append(append_of(2)) == Committed(Sequence(3))
    assert state.read(ALICE, ReadRange()).head == 1
    assert other.read(ALICE, ReadRange()).stream_id == "stream"
