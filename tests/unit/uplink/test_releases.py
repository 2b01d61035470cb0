"""Placements that are given back until the registry has answered."""

from agent_service.uplink import releases
from agent_service.uplink.releases import MOST_PER_MESSAGE, Release, Releases
from steward.model.keys import Epoch, UserKey


def release(name: str, epoch: int = 1, cause: str = "passivated", handoff: bool = False) -> Release:
    return Release(UserKey("t", name), Epoch(epoch), cause, handoff, False)


def said(book: Releases) -> list[Release]:
    return [item for part in book.again() for item in part]


def test_a_release_is_said_again_in_the_same_words_until_it_is_answered() -> None:
    book = Releases()
    ann, bob = release("ann", handoff=True), release("bob")
    assert book.add(ann)
    assert book.add(bob)
    book.asked(1, [ann])
    book.asked(2, [bob])
    book.answered(2)
    assert said(book) == [ann]
    assert said(book) == [ann]
    book.asked(3, [ann])
    book.answered(3)
    assert said(book) == []
    assert len(book) == 0


def test_the_first_word_about_a_placement_counts() -> None:
    book = Releases()
    first = release("ann", 3, "drain", handoff=True)
    assert book.add(first)
    assert not book.add(release("ann", 3, "failed"))
    assert book.add(release("ann", 4, "failed"))
    assert said(book) == [first, release("ann", 4, "failed")]


def test_answers_of_the_stream_before_settle_nothing() -> None:
    book = Releases()
    book.add(release("ann"))
    book.asked(1, [release("ann")])
    assert said(book) == [release("ann")]
    book.answered(1)
    assert len(book) == 1


def test_parts_are_no_larger_than_a_message() -> None:
    book = Releases()
    for number in range(2 * MOST_PER_MESSAGE + 1):
        book.add(release(f"u{number}"))
    assert [len(part) for part in book.again()] == [MOST_PER_MESSAGE, MOST_PER_MESSAGE, 1]


def test_beyond_the_bound_the_oldest_is_forgotten(monkeypatch) -> None:
    monkeypatch.setattr(releases, "MOST_RELEASES", 2)
    book = Releases()
    for name in ("a", "b", "c"):
        book.add(release(name))
    assert [item.user.user for item in said(book)] == ["b", "c"]
