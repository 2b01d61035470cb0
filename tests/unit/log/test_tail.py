"""Which chunks the index gets, and which are found in the tail until then."""

from agent_service.log.tail import Tail
from steward.model.keys import UserKey

ALICE, BOB = UserKey("t", "alice"), UserKey("t", "bob")
ROWS = {ALICE: 2, BOB: 1}


def commit(tail: Tail, *users: UserKey) -> tuple[list[int], int]:
    """A group with a chunk for each; the ids it indexes, and up to where all are indexed."""
    for user in users:
        tail.add(user, ROWS[user], tail.last_id + 1, "main", False)
    leaving = [chunk.id for chunk in tail.leave()]
    indexed = tail.indexed()
    tail.committed()
    return leaving, indexed


def ids(tail: Tail, user: UserKey) -> list[int]:
    return [chunk.id for chunk in tail.of(user)]


def test_chunks_are_numbered_after_the_last_one_of_the_file() -> None:
    tail = Tail(7)
    assert tail.add(ALICE, 2, 1, "main", True) == 8
    assert tail.last_id == 8


def test_nobody_sees_a_chunk_before_its_group_is_committed() -> None:
    tail = Tail(0)
    tail.add(ALICE, 2, 1, "main", False)
    tail.leave()
    assert tail.of(ALICE) == ()
    tail.committed()
    assert ids(tail, ALICE) == [1]


def test_stream_is_indexed_when_it_has_enough_chunks_and_then_all_of_them() -> None:
    tail = Tail(0, together=3)
    assert commit(tail, ALICE, BOB) == ([], 0)
    assert commit(tail, ALICE) == ([], 0)
    assert commit(tail, ALICE) == ([1, 3, 4], 1)
    assert ids(tail, ALICE) == []
    assert ids(tail, BOB) == [2]


def test_index_rows_are_in_the_order_of_the_index() -> None:
    tail = Tail(0, together=1)
    assert commit(tail, ALICE, BOB, ALICE) == ([2, 1, 3], 3)


def test_stream_that_went_quiet_is_indexed_when_the_window_has_passed_it() -> None:
    tail = Tail(0, window=4, together=3)
    assert commit(tail, BOB) == ([], 0)
    for last in (2, 3):
        assert commit(tail, ALICE) == ([], 0), last
    assert commit(tail, ALICE) == ([2, 3, 4], 0)
    assert commit(tail, ALICE) == ([1], 4)
    assert ids(tail, BOB) == []
    assert ids(tail, ALICE) == [5]


def test_what_a_reader_has_taken_does_not_change_under_it() -> None:
    tail = Tail(0, together=3)
    commit(tail, ALICE)
    taken = tail.of(ALICE)
    commit(tail, ALICE)
    commit(tail, ALICE)
    assert [chunk.id for chunk in taken] == [1]
