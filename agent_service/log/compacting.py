"""Removing old events from the event database, in steps that are part of group commits.

A chunk has no time of its own; `clock` notes now and then which chunks are older than a
moment. A sweep walks the chunks in order of arrival, which within a stream is the order of its
events, so that what is gone of a stream is always its beginning. The events of a user's
last append stay: a stream's head is derived from them.

Times are wall times. A clock that runs ahead keeps events for longer; one that is set back
changes nothing until it has caught up with the last moment that was noted. The file does not
shrink: freed pages are used for what comes.
"""

import sqlite3
from dataclasses import dataclass

from agent_service.log.port import Compaction
from agent_service.log.tail import Tail
from steward.model.keys import UserKey

STEP_CHUNKS = 256
"""Chunks that one step looks at, and removes at most: a few milliseconds of the writer's time."""

CLOCK_MS = 60_000

_LAST_INDEXED = (
    "SELECT epoch, number FROM chunk WHERE id ="
    " (SELECT chunk FROM chunk_index WHERE stream = ? ORDER BY first DESC LIMIT 1)"
)


@dataclass(frozen=True, slots=True)
class CompactionStep:
    """Look at the chunks after id `after`, and remove those from before `before_ms`."""

    before_ms: int
    after: int


@dataclass(frozen=True, slots=True)
class _Old:
    """A row of `chunk` that is old enough to go."""

    id: int
    stream: int
    first: int
    count: int
    epoch: int
    number: int


class Compactor:
    """The writer's part that knows how old chunks are, and removes them. Blocking."""

    def __init__(self, connection: sqlite3.Connection, tail: Tail, clock_ms: int) -> None:
        self._db = connection
        self._tail = tail
        self._clock_ms = clock_ms
        self._noted_chunk, self._noted_ms = connection.execute(
            "SELECT ifnull(max(chunk), 0), ifnull(max(at_ms), 0) FROM clock"
        ).fetchone()
        self._found: list[_Old] = []

    def note_time(self, now_ms: int) -> None:
        """Note, from time to time, that all there is was written by now.

        At the end of a group.
        """
        following = self._tail.last_id + 1
        if following == self._noted_chunk or now_ms < self._noted_ms + self._clock_ms:
            return
        self._db.execute("INSERT INTO clock VALUES (?, ?)", (following, now_ms))
        self._noted_chunk, self._noted_ms = following, now_ms

    def find(self, step: CompactionStep) -> None:
        """Look for what may go; lets it leave the tail. Before the tail is indexed."""
        (upto,) = self._db.execute(
            "SELECT ifnull(max(chunk), 0) FROM clock WHERE at_ms <= ?", (step.before_ms,)
        ).fetchone()
        self._found = [
            _Old(*row)
            for row in self._db.execute(
                "SELECT id, stream, first, count, epoch, number FROM chunk"
                " WHERE id > ? AND id < ? ORDER BY id LIMIT ?",
                (step.after, upto, STEP_CHUNKS),
            )
        ]
        if self._found:
            self._tail.expire(self._found[-1].id)
        else:
            self._db.execute("DELETE FROM clock WHERE chunk < ?", (upto,))

    def remove(self) -> tuple[Compaction, list[tuple[UserKey, int]]]:
        """Remove what was found, and say which users' streams begin later now. After the index.

        What is gone is out of the totals only when the writer has counted it.
        """
        found, self._found = self._found, []
        of_stream: dict[int, list[_Old]] = {}
        for old in found:
            of_stream.setdefault(old.stream, []).append(old)
        gone: list[_Old] = []
        begins: list[tuple[UserKey, int]] = []
        for row, chunks in of_stream.items():
            user = UserKey(
                *self._db.execute("SELECT tenant, user FROM stream WHERE id = ?", (row,)).fetchone()
            )
            last = self._last_append(row, user)
            going = [chunk for chunk in chunks if (chunk.epoch, chunk.number) != last]
            if going:
                gone += going
                begins.append((user, going[-1].first + going[-1].count))
        self._db.executemany("DELETE FROM chunk WHERE id = ?", [(old.id,) for old in gone])
        self._db.executemany(
            "DELETE FROM chunk_index WHERE stream = ? AND first = ?",
            [(old.stream, old.first) for old in gone],
        )
        self._db.executemany(
            "UPDATE stream SET oldest = ? WHERE tenant = ? AND user = ?",
            [(oldest, *user) for user, oldest in begins],
        )
        removed = sum(old.count for old in gone)
        return Compaction(removed, found[-1].id if found else None), begins

    def _last_append(self, row: int, user: UserKey) -> tuple[int, int]:
        """Epoch and number of the stream's last append that has events."""
        newest = self._tail.last(user)
        if newest is None:
            epoch, number = self._db.execute(_LAST_INDEXED, (row,)).fetchone()
        else:
            epoch, number = self._db.execute(
                "SELECT epoch, number FROM chunk WHERE id = ?", (newest.id,)
            ).fetchone()
        return epoch, number
