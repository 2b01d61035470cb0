"""An event log at rest, whichever engine holds it: what is copied and checked, stream by stream.

Both adapters read and write the engine's own tables, with nobody else at work: this is for an
operator who has stopped the log. What a `Store` gives out is the same for all engines, so that a
digest of a stream in one can be compared with that of its copy in another.
"""

import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import orjson

from steward.model.keys import UserKey


@dataclass(frozen=True, slots=True)
class StoredStream:
    """One user's stream, but for what is in it. `number` is that of the last append."""

    row: int
    user: UserKey
    stream_id: str
    fence: int
    activation: str
    oldest: int
    next: int
    number: int


class StoredChunk(NamedTuple):
    """A run of events. `at_us` is when it was written at the latest, as a wall time.

    Chunks of one append have the same `epoch` and `number`; the last append's is the true number,
    those of earlier ones need only tell appends apart.
    """

    first: int
    events: int
    epoch: int
    number: int
    at_us: int
    thread_id: str
    conversation: bool
    packed: bytes


class StoredRecord(NamedTuple):
    """A record that is no thread."""

    kind: int
    key: str
    value: bytes


class StoredThread(NamedTuple):
    """A thread, under its first title."""

    thread_id: str
    sequence: int
    value: bytes


class Totals(NamedTuple):
    """What the store itself says that it holds."""

    streams: int
    events: int


class Store(Protocol):
    """A log at rest. Methods raise StoreProblem, or what the engine raises when it fails."""

    name: str
    log_id: str

    async def open(self) -> None:
        """Open it, and bring its tables up to date. Raises EnvironmentUnusable as well."""
        ...

    async def close(self) -> None: ...

    async def totals(self) -> Totals: ...

    def streams(self) -> AsyncIterator[StoredStream]:
        """All streams, in the order of their first seals."""
        ...

    async def stream(self, user: UserKey) -> StoredStream | None: ...

    def chunks(self, stream: StoredStream) -> AsyncIterator[StoredChunk]:
        """The chunks of a stream in order."""
        ...

    async def records(self, stream: StoredStream) -> list[StoredRecord]: ...

    async def threads(self, stream: StoredStream) -> list[StoredThread]: ...

    async def adopt(self, log_id: str) -> None:
        """Make an empty store that of another identity."""
        ...

    async def write(
        self,
        stream: StoredStream,
        chunks: AsyncIterator[StoredChunk],
        records: Sequence[StoredRecord],
        threads: Sequence[StoredThread],
    ) -> None:
        """Store a whole stream, in place of what there is of it, in one transaction."""
        ...

    async def findings(self) -> list[str]:
        """What is wrong with the engine's tables that can't be seen stream by stream."""
        ...


class Digest(NamedTuple):
    """What a stream holds, to compare it with its copy."""

    events: int
    chunks: int
    hash: str


async def digest_of(store: Store, stream: StoredStream) -> Digest:
    """Read a stream whole, and sum it up."""
    hashed = hashlib.blake2b(digest_size=16)

    def add(*values: object) -> None:
        for value in values:
            text = str(value).encode("utf-8", "surrogatepass")
            part = value if isinstance(value, bytes) else text
            hashed.update(len(part).to_bytes(8, "little") + part)

    add(*stream.user, stream.stream_id, stream.fence, stream.activation)
    add(stream.oldest, stream.next, stream.number)
    events = chunks = 0
    async for chunk in store.chunks(stream):
        add(chunk.first, chunk.events, chunk.epoch, chunk.thread_id, chunk.conversation)
        add(chunk.packed)
        events += chunk.events
        chunks += 1
    for record in sorted(await store.records(stream)):
        add(*record)
    for thread in sorted(await store.threads(stream)):
        value = orjson.dumps(orjson.loads(thread.value), option=orjson.OPT_SORT_KEYS)
        add(thread.thread_id, thread.sequence, value)
    return Digest(events, chunks, hashed.hexdigest())
