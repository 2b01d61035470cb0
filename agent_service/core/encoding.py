"""Events as bytes: encoded once, as the exact text of the WebSocket message.

The envelope is joined by hand from parts that are JSON already, since most of them
do not change within a run; only ids that clients chose are escaped, once per run.
"""

from dataclasses import dataclass
from typing import Final

import orjson

from steward.model.kept_json import kept_json
from steward.model.keys import Epoch, RunId, Sequence, StreamId, ThreadId
from steward.model.stamps import StampCache
from steward.model.verbs import EventType

TITLE_CHARS = 80

_TYPES: Final = {type: type.encode() for type in EventType}


@dataclass(frozen=True, slots=True)
class RunEnvelope:
    """The parts of an event's text that are the same for a whole run.

    `head` goes before the time, `trace` between it and the data.
    """

    thread_id: ThreadId
    head: bytes
    trace: bytes


def run_envelope(thread_id: ThreadId, run_id: RunId, agent: str, traceparent: str) -> RunEnvelope:
    head = b'"thread_id":%b,"run_id":%b,"agent":%b,' % (
        orjson.dumps(thread_id),
        orjson.dumps(run_id),
        orjson.dumps(agent),
    )
    return RunEnvelope(thread_id, head, kept_json(traceparent))


class EventEncoder:
    """Encodes the events of one manager: one stream under one epoch."""

    __slots__ = ("_behind", "_between", "_stamps", "_stream", "_suffix")

    def __init__(self, stream_id: StreamId, epoch: Epoch) -> None:
        self._stream = kept_json(stream_id)
        self._suffix = f"{epoch:x}-{stream_id[:12]}"
        # What does not change between two sequences, and behind the second one.
        self._between = b',"epoch":%d,"event_id":"e' % epoch
        self._behind = b'-%b",' % self._suffix.encode()
        self._stamps = StampCache()

    def run_id(self, sequence: Sequence) -> RunId:
        """Id of the run that the message at `sequence` causes; unique across users and epochs."""
        return RunId(f"r{sequence}-{self._suffix}")

    def time(self, wall_ms: int) -> str:
        return self._stamps.text(wall_ms)

    def encode(
        self,
        type: EventType,
        sequence: Sequence,
        wall_ms: int,
        data: bytes,
        envelope: RunEnvelope | None,
        trace: bytes = b"",
    ) -> bytes:
        """The text of one event. Without an envelope it belongs to no run, and `trace` is given."""
        return (
            b'{"type":"%b","stream_id":%b,"sequence":%d%b%d%b%b"time":"%b","trace":%b,"data":%b}'
            % (
                _TYPES[type],
                self._stream,
                sequence,
                self._between,
                sequence,
                self._behind,
                envelope.head if envelope else b"",
                self._stamps.text(wall_ms).encode(),
                envelope.trace if envelope else trace,
                data,
            )
        )


def title_of(content: bytes) -> str:
    """The first line of the text of a message, for listings."""
    value = orjson.loads(content)
    if isinstance(value, list):
        texts = (part.get("text") for part in value if isinstance(part, dict))
        value = next((text for text in texts if isinstance(text, str)), "")
    lines = str(value).strip().splitlines()
    return lines[0][:TITLE_CHARS] if lines else ""
