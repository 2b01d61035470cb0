"""The outgoing box of a node's stream: commands keep their order, probes their place."""

import pytest

from edge.core.commands import Detach, EdgeCommand
from edge.core.reach import SendProbe
from edge.uplink.carriers import Box, Item
from steward.model.keys import Epoch, UserKey

pytestmark = pytest.mark.asyncio


def command(number: int) -> EdgeCommand:
    return EdgeCommand(UserKey("default", "alice"), Epoch(1), number, "", Detach())


async def test_a_probe_travels_alone_and_nothing_overtakes_it() -> None:
    box = Box()
    put: list[Item] = [SendProbe(1), command(1), command(2), SendProbe(2), SendProbe(3), command(3)]
    for item in put:
        box.put(item)
    taken = [await box.take(10) for _ in range(5)]
    assert taken == [put[:1], put[1:3], put[3:4], put[4:5], put[5:]]


async def test_what_is_put_meanwhile_comes_behind_what_was_given_back() -> None:
    box = Box()
    box.put(SendProbe(1))
    for number in range(1, 6):
        box.put(command(number))
    assert await box.take(3) == [SendProbe(1)]
    box.put(command(6))
    assert await box.take(10) == [command(number) for number in range(1, 7)]
