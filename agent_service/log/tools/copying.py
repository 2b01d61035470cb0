"""Copying an event log from one store to another, stream by stream.

Each stream is written in one transaction. A second run goes on where the first one ended: streams
that are there already and have the same head are left, those that went on in the source since then
are written anew. One that is further in the destination is never touched: somebody has used the
copy, and what the source has is old. The copy has the identity of the source, by which a second run
recognises it.

At the end both sides are read whole and compared, count by count and digest by digest.
"""

from dataclasses import dataclass

from agent_service.log.tools.store import Store, StoredStream, digest_of
from steward.runtime.store_tool import Step, StoreProblem


@dataclass(slots=True)
class Copied:
    """What a run did. `differing`: users whose copy is not what the source has."""

    streams: int = 0
    events: int = 0
    kept: int = 0
    differing: int = 0
    first_difference: str = ""


def _head(stream: StoredStream) -> tuple[object, ...]:
    return (
        stream.stream_id,
        stream.fence,
        stream.activation,
        stream.oldest,
        stream.next,
        stream.number,
    )


async def copy(source: Store, destination: Store, step: Step) -> Copied:
    """Copy what is missing. Raises StoreProblem for a destination with anything else in it."""
    if destination.log_id != source.log_id:
        totals = await destination.totals()
        if totals.streams:
            raise StoreProblem(
                f"{destination.name} holds another log ({totals.streams} users); use an empty one"
            )
        await destination.adopt(source.log_id)
    done = Copied()
    async for stream in source.streams():
        there = await destination.stream(stream.user)
        if there is not None:
            if (there.fence, there.next) > (stream.fence, stream.next):
                raise StoreProblem(
                    f"{destination.name} has been written to since it was copied (user"
                    f" {stream.user.tenant}/{stream.user.user}): what {source.name} has is old"
                )
            if _head(there) == _head(stream):
                done.kept += 1
                step(stream.next - stream.oldest)
                continue
        await destination.write(
            stream,
            source.chunks(stream),
            await source.records(stream),
            await source.threads(stream),
        )
        done.streams += 1
        done.events += stream.next - stream.oldest
        step(stream.next - stream.oldest)
    return done


async def compare(source: Store, destination: Store, done: Copied, step: Step) -> None:
    """Read both sides whole; what differs is noted in `done`."""
    streams = events = 0
    async for stream in source.streams():
        there = await destination.stream(stream.user)
        digest = await digest_of(source, stream)
        if there is None or await digest_of(destination, there) != digest:
            done.differing += 1
            done.first_difference = done.first_difference or (
                f"the copy of {stream.user.tenant}/{stream.user.user} is not what the source has"
            )
        streams += 1
        events += digest.events
        step(digest.events)
    for store in (source, destination):
        totals = await store.totals()
        if totals != (streams, events):
            done.differing += 1
            done.first_difference = done.first_difference or (
                f"{store.name} says that it holds {totals.events} events of {totals.streams} users,"
                f" and the source has {events} of {streams}"
            )
