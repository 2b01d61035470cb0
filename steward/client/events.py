"""What an application gets: events, acceptances, and the error of a closed client."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class ClientClosed(Exception):
    """The client was closed by the application before this was done."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event of the user's stream, next in order. `(stream_id, sequence)` is its position.

    `data` belongs to `type` (see `docs/wire-protocol.md`); types that this version does not know
    arrive as well. What does not apply is an empty string. `raw` is the text as it came, the
    same for every tab and device that does not merge.

    With `merge`, an `agent_text` may stand for several: for those from `from_sequence` to
    `sequence`. Else the two are equal.
    """

    type: str
    stream_id: str
    sequence: int
    epoch: int
    event_id: str
    thread_id: str
    run_id: str
    agent: str
    time: str
    trace: str
    parent_run_id: str
    data: Mapping[str, Any]
    raw: str
    from_sequence: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """A message is in the log at `sequence`; `run_id` is the run that answers it.

    `duplicate`: the id was known, and this is the answer to the first one. `queue_position` n:
    it is the n-th that waits in its thread; 0: it started or is over.
    """

    id: str
    run_id: str
    sequence: int
    duplicate: bool
    queue_position: int


def event_of(frame: Mapping[str, Any], raw: str) -> Event:
    """The event in a frame that the session delivered."""
    data = frame.get("data")
    return Event(
        type=str(frame.get("type", "")),
        stream_id=str(frame.get("stream_id", "")),
        sequence=int(frame["sequence"]),
        epoch=int(frame["epoch"]),
        event_id=str(frame.get("event_id", "")),
        thread_id=str(frame.get("thread_id", "")),
        run_id=str(frame.get("run_id", "")),
        agent=str(frame.get("agent", "")),
        time=str(frame.get("time", "")),
        trace=str(frame.get("trace", "")),
        parent_run_id=str(frame.get("parent_run_id", "")),
        data=data if isinstance(data, dict) else {},
        raw=raw,
        from_sequence=int(frame.get("from_sequence", frame["sequence"])),
    )
