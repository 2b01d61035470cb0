"""The newest chunks of the event database: durable, and not in its index yet.

An index entry costs a page of the file, and the pages of many users are many. So a
stream's chunks are indexed some at a time, when they lie in one page; until then they are
found here. What an append costs is then the same however many streams there are.

Guarantees: a chunk is in the index or here, so that whoever takes `of` first and then begins
a snapshot sees every event that was committed before; it may find a chunk in both. Less
than `window` chunks are not indexed, and of a stream less than `together`: so much is
made good at the next start (`database.py`). One writer thread; `of` is for any thread.
"""

from collections import OrderedDict
from typing import NamedTuple

from steward.model.keys import UserKey

WINDOW = 32_768
TOGETHER = 16


class TailChunk(NamedTuple):
    """A row of `chunk` without its events, as the index has it."""

    id: int
    stream: int
    first: int
    thread_id: str
    conversation: bool


class Tail:
    """What the index of one opened database does not have. `last_id` is that of the last chunk."""

    __slots__ = ("_due", "_known", "_leaving", "_new", "_together", "_window", "last_id")

    def __init__(self, last_id: int, *, window: int = WINDOW, together: int = TOGETHER) -> None:
        self.last_id = last_id
        self._window = window
        self._together = together
        # In the order of their first chunks. Lists only grow: readers copy them as they are.
        self._known: OrderedDict[UserKey, list[TailChunk]] = OrderedDict()
        # Of the group that is being written: nobody sees them yet.
        self._new: dict[UserKey, list[TailChunk]] = {}
        self._leaving: dict[UserKey, None] = {}
        self._due = 0

    def of(self, user: UserKey) -> tuple[TailChunk, ...]:
        """The committed chunks of a user that were not indexed at this moment, in order."""
        return tuple(self._known.get(user, ()))

    def last(self, user: UserKey) -> TailChunk | None:
        """The user's newest chunk, if it is here, or is of the group under way. For the writer."""
        chunks = self._new.get(user) or self._known.get(user)
        return chunks[-1] if chunks else None

    def expire(self, upto: int) -> None:
        """Let all chunks up to this id leave with the group under way. Before `leave`."""
        self._due = max(self._due, upto)

    def add(
        self, user: UserKey, stream: int, first: int, thread_id: str, conversation: bool
    ) -> int:
        """A chunk of the group under way; its id."""
        self.last_id += 1
        chunk = TailChunk(self.last_id, stream, first, thread_id, conversation)
        self._new.setdefault(user, []).append(chunk)
        return self.last_id

    def leave(self) -> list[TailChunk]:
        """What the group under way has to put into the index, in its order. Once per group."""
        leaving = self._leaving
        for user, new in self._new.items():
            if len(new) + len(self._known.get(user, ())) >= self._together:
                leaving[user] = None
        oldest = max(self.last_id - self._window, self._due)
        for user, known in self._known.items():
            if known[0].id > oldest:
                break
            leaving[user] = None
        chunks = [
            chunk
            for user in leaving
            for chunk in (*self._known.get(user, ()), *self._new.get(user, ()))
        ]
        chunks.sort(key=_place)
        return chunks

    def indexed(self) -> int:
        """All chunks up to this id are indexed once the group is committed. After `leave`."""
        for chunks in (self._known, self._new):
            for user, its_chunks in chunks.items():
                if user not in self._leaving:
                    return its_chunks[0].id - 1
        return self.last_id

    def committed(self) -> None:
        """The group is durable: what it brought is seen from here on, or from the index."""
        for user in self._leaving:
            self._known.pop(user, None)
            self._new.pop(user, None)
        for user, new in self._new.items():
            known = self._known.get(user)
            if known is None:
                self._known[user] = new
            else:
                known.extend(new)
        self._new = {}
        self._leaving = {}


def _place(chunk: TailChunk) -> tuple[int, int]:
    return chunk.stream, chunk.first
