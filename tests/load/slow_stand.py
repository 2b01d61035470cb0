"""The stand of `edge_stand`, at a steady pace: who is slow, and the others, on one stream.

    python -m tests.load.slow_stand --data DIR

It reads one order a line, `{"pace": {"seconds", "rate", "slow", "slow_rate"}}`: so many events a
second to the other users in turn, each with the time at which it was made, and so many deltas
of one text to the user `slow`. `{"ask": 1}` is that of `edge_stand`. It ends with its input.
"""

import asyncio
import time
from typing import Any

from tests.load.edge_stand import Node, Side, main, stream_of

TICK_S = 0.005
_ENVELOPE = (
    b'"epoch":1,"event_id":"e%d-1","thread_id":"main","run_id":"r1-1","agent":"demo",'
    b'"time":"2026-11-23T21:00:00.123Z",'
    b'"trace":"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00",'
)


def tick(user: str, sequence: int) -> bytes:
    """An event that says when it was made."""
    return (
        b'{"type":"custom","stream_id":"%b","sequence":%d,%b'
        b'"data":{"name":"tick","value":{"at":%d}}}'
        % (stream_of(user).encode(), sequence, _ENVELOPE % sequence, time.time_ns())
    )


def delta(user: str, sequence: int) -> bytes:
    """A piece of a text: its own sequence."""
    return (
        b'{"type":"agent_text","stream_id":"%b","sequence":%d,%b'
        b'"data":{"message_id":"r1-1.m1","delta":"%d "}}'
        % (stream_of(user).encode(), sequence, _ENVELOPE % sequence, sequence)
    )


class Paced:
    """One edge's stream, fed at a pace."""

    def __init__(self, side: Side) -> None:
        self._side = side

    async def run(self, seconds: float, rate: int, slow: str, slow_rate: int) -> dict[str, Any]:
        """Feed it. How many events went to the others, and the last sequence of `slow`."""
        sequences = self._side.sequences
        others = [user for user in sequences if user != slow and not user.startswith("slow")]
        loop = asyncio.get_running_loop()
        began = loop.time()
        sent = slow_sent = 0
        while (passed := loop.time() - began) < seconds:
            while sent < int(passed * rate):
                user = others[sent % len(others)]
                self._side.deliver(user, [tick(user, sequences[user] + 1)])
                sent += 1
            due = int(passed * slow_rate) - slow_sent
            if due and slow in sequences:
                first = sequences[slow] + 1
                self._side.deliver(slow, [delta(slow, first + n) for n in range(due)])
                slow_sent += due
            await asyncio.sleep(TICK_S)
        return {"sent": sent, "slow": slow_sent}


async def pace(node: Node, order: dict[str, Any]) -> dict[str, Any] | None:
    """The order of this stand."""
    if "pace" not in order:
        return None
    (side,) = node.sides
    return await Paced(side).run(**order["pace"])


if __name__ == "__main__":
    main(pace)
