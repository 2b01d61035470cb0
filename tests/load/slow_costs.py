"""What merging costs where nobody is slow, and where somebody is: CPU in this process, no sockets.

    python -m tests.load.slow_costs [--quick] [--rounds N]

The way of a live batch through a connection (`deliver`, then `flush`) into a transport that
takes everything and does nothing: with `merge=1` and without, in turn. And a delta that waits:
looked into, merged, and taken out again.
"""

import argparse
import asyncio
import time
from typing import Any, cast

from edge.core.backlog import MOST_MERGED_BYTES, Backlog
from edge.core.batch import EventBatch
from edge.core.resume import ResumePoint, StreamHead
from edge.core.server_messages import Limits
from edge.core.session import EdgeSession
from edge.core.session_values import SessionStart, StreamAttached
from edge.host.connection import Owner, WebSocketConnection
from edge.host.flush import Flusher
from edge.host.merging import MergingConnection
from edge.host.wheel import TimerWheel
from steward.model.keys import ConnectionId, Epoch, NodeId, StreamId, UserKey
from steward.runtime.clock import boot_ms
from tests.load.rows import Row, text_table
from tests.load.slow_stand import delta

FRAMES, QUICK_FRAMES = 100_000, 20_000
SLICE = 1000
"""Frames of one kind before those of the other: what else goes on meets both."""


class Nowhere(asyncio.Transport):
    """A transport that takes everything."""

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes | bytearray | memoryview) -> None: ...


class Around:
    """The edge around a connection, as far as a delivery needs one."""

    def mark(self, connection: Any) -> None: ...

    def schedule(self, connection: Any, at_ms: int) -> None: ...

    def sent(self, effect: Any) -> None: ...


def connection_of(kind: type[WebSocketConnection]) -> WebSocketConnection:
    """A connection that is live, at sequence 0."""
    around = Around()
    start = SessionStart(
        connection_id=ConnectionId("c-1"),
        user=UserKey("default", "u"),
        point=ResumePoint(),
        limits=Limits(262_144, 600, 8, 15_000),
        issued_at_ms=0,
        expires_ms=boot_ms() + 3_600_000,
        expires_text="",
    )
    made = kind(
        cast(Owner, around),
        EdgeSession(boot_ms(), start),
        cast(Flusher, around),
        cast(TimerWheel, around),
        1 << 20,
        "",
        262_144,
    )
    made.connection_made(Nowhere())
    made.handle(StreamAttached(StreamHead(StreamId("s-u"), 0, 1, NodeId("n"), Epoch(1))))
    made.flush(boot_ms())
    return made


def pass_through(made: WebSocketConnection, batches: list[EventBatch]) -> float:
    """CPU seconds to deliver the batches, one a turn."""
    now_ms = boot_ms()
    began = time.process_time()
    for batch in batches:
        made.deliver(batch)
        made.flush(now_ms)
    return time.process_time() - began


def keep_up(frames: int) -> tuple[float, float]:
    """Microseconds a frame without and with `merge=1`, for clients that keep up."""
    plain, merging = connection_of(WebSocketConnection), connection_of(MergingConnection)
    took = [0.0, 0.0]
    for first in range(1, frames, SLICE):
        batches = [EventBatch(n, [delta("u", n)]) for n in range(first, first + SLICE)]
        for batch in batches:
            batch.frames()
        order = [(0, plain), (1, merging)]
        for which, made in order if first // SLICE % 2 else reversed(order):
            took[which] += pass_through(made, batches)
    return took[0] / frames * 1e6, took[1] / frames * 1e6


def merge(frames: int) -> float:
    """Microseconds for a delta that waits in a backlog, until it is taken."""
    backlog = Backlog(MOST_MERGED_BYTES)
    batches = [EventBatch(n, [delta("u", n)]) for n in range(1, frames + 1)]
    began = time.process_time()
    for number, batch in enumerate(batches):
        backlog.add(batch)
        if number % 100 == 99:
            backlog.take(MOST_MERGED_BYTES)
    return (time.process_time() - began) / frames * 1e6


def figures(rounds: int, quick: bool) -> list[Row]:
    """The rows of this module."""
    frames = QUICK_FRAMES if quick else FRAMES
    kept = [keep_up(frames) for _ in range(rounds)]
    merged = [merge(frames) for _ in range(rounds)]
    added = [with_merge - without for without, with_merge in kept]
    return [
        Row("CPU of a frame through a connection", "µs", [one for one, _ in kept], None, True),
        Row("added by merge=1, as long as the client keeps up", "µs", added, None, True),
        Row("CPU of a delta that waits and is merged", "µs", merged, None, True),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.slow_costs", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="fewer frames")
    options = parser.parse_args()
    print(text_table(figures(1 if options.quick else options.rounds, options.quick)))


if __name__ == "__main__":
    main()
