"""Crossings: what waits for company, how long, and what never does."""

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from agent_service.host import agent_crossing
from agent_service.host.agent_crossing import BUSY, ENOUGH, HOLD_S, MOST_AT_ONCE, Crossing

pytestmark = pytest.mark.asyncio
SLACK_S = 0.5
"""What a busy machine may add."""


class Receiver:
    """Consumes on this loop; knows when each batch came."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.at: list[float] = []
        self.crossing: Crossing[int] = Crossing(asyncio.get_running_loop(), self._take)

    def _take(self, batch: list[int]) -> None:
        self.batches.append(batch)
        self.at.append(time.monotonic())

    @property
    def items(self) -> list[int]:
        return [item for batch in self.batches for item in batch]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0)


async def turn() -> None:
    """What is due on this loop has run, and no timer."""
    ran = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(ran.set_result, None)
    await ran


async def test_the_first_item_after_a_quiet_time_is_not_held() -> None:
    receiver = Receiver()
    for number in range(3):
        await asyncio.sleep(5 * HOLD_S)
        receiver.crossing.put_soon(number)
        await turn()
        assert receiver.items == list(range(number + 1)), "it crossed without waiting for a timer"


async def test_what_follows_closely_travels_together_and_within_the_hold() -> None:
    receiver = Receiver()
    receiver.crossing.put_soon(0)
    await turn()
    began = receiver.at[0]
    receiver.crossing.put_soon(1)
    await turn()
    receiver.crossing.put_soon(2)
    await turn()
    if time.monotonic() - began < HOLD_S:
        assert receiver.items == [0], "they wait for company"
    await receiver.until(lambda: len(receiver.items) == 3)
    assert receiver.items == [0, 1, 2]
    assert receiver.at[-1] - began < HOLD_S + SLACK_S


async def test_an_urgent_item_takes_along_what_was_held_in_order() -> None:
    receiver = Receiver()
    receiver.crossing.put_soon(0)
    await turn()
    receiver.crossing.put_soon(1)
    await turn()
    receiver.crossing.put(2)
    await turn()
    assert receiver.items == [0, 1, 2]


async def test_items_that_have_enough_company_cross_at_once() -> None:
    receiver = Receiver()
    receiver.crossing.put_soon(0)
    await turn()
    for number in range(1, ENOUGH + 1):
        receiver.crossing.put_soon(number)
    await turn()
    assert receiver.items == list(range(ENOUGH + 1))


async def busy(receiver: Receiver) -> None:
    """A batch has crossed that shows that there will be more."""
    receiver.crossing.put_soon(0)
    await turn()
    for number in range(1, BUSY + 1):
        receiver.crossing.put_soon(number)
    await receiver.until(lambda: len(receiver.items) == BUSY + 1)


async def test_while_it_is_busy_the_receiver_looks_again_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    woken: list[object] = []
    receiver = Receiver()
    call = Crossing._call

    def count(crossing: Crossing[int], callback: Callable[[], None]) -> None:
        woken.append(callback)
        call(crossing, callback)

    monkeypatch.setattr(Crossing, "_call", count)
    await busy(receiver)
    asked = len(woken)
    receiver.crossing.put_soon(100)
    receiver.crossing.put_soon(101)
    assert len(woken) == asked, "nobody is woken"
    await receiver.until(lambda: len(receiver.items) == BUSY + 3)
    assert receiver.batches[-1] == [100, 101]


async def test_a_receiver_that_was_busy_is_woken_again_after_it_found_nothing() -> None:
    receiver = Receiver()
    await busy(receiver)
    await asyncio.sleep(10 * agent_crossing.PACE_S)
    receiver.crossing.put_soon(100)
    await turn()
    assert receiver.batches[-1] == [100]


async def test_an_urgent_item_does_not_wait_for_a_busy_receiver_to_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agent_crossing, "PACE_S", 60.0)
    receiver = Receiver()
    await busy(receiver)
    receiver.crossing.put_soon(100)
    await turn()
    assert 100 not in receiver.items
    receiver.crossing.put(101)
    await turn()
    assert receiver.batches[-1] == [100, 101]


async def test_what_is_put_quietly_waits_until_the_receiver_does() -> None:
    receiver = Receiver()
    receiver.crossing.put_quietly([0, 1])
    await asyncio.sleep(5 * HOLD_S)
    assert receiver.items == []
    receiver.crossing.begin_wait()
    assert receiver.items == [0, 1], "handed over before begin_wait returned"
    receiver.crossing.put_quietly([2])
    await turn()
    assert receiver.items == [0, 1, 2], "a receiver that waits is woken"
    receiver.crossing.end_wait()
    receiver.crossing.put_quietly([3])
    await turn()
    assert receiver.items == [0, 1, 2]
    receiver.crossing.put(4)
    await turn()
    assert receiver.items == [0, 1, 2, 3, 4], "what was put before goes first"


async def test_many_items_are_taken_in_steps_and_the_loop_has_its_turns_between() -> None:
    receiver = Receiver()
    total = 3 * MOST_AT_ONCE + 1
    for number in range(total):
        receiver.crossing.put_soon(number)
    between: list[int] = []

    def tick() -> None:
        """Something else that this loop has to do."""
        between.append(len(receiver.batches))
        if len(receiver.items) < total:
            asyncio.get_running_loop().call_soon(tick)

    tick()
    await receiver.until(lambda: len(receiver.items) == total)
    assert receiver.items == list(range(total))
    assert [len(batch) for batch in receiver.batches] == [MOST_AT_ONCE] * 3 + [1]
    assert {1, 2, 3} <= set(between), "the loop had its turn after each step"
    receiver.crossing.put_soon(total)
    await receiver.until(lambda: len(receiver.items) > total)
    assert receiver.items[-1] == total, "it is woken as before"


async def test_hurry_with_nothing_held_wakes_nobody() -> None:
    receiver = Receiver()
    receiver.crossing.hurry()
    receiver.crossing.put_soon(1)
    await turn()
    assert receiver.batches == [[1]]


async def test_nothing_is_lost_or_out_of_order_between_two_threads() -> None:
    receiver = Receiver()
    total = 30_000

    def send() -> None:
        for number in range(total):
            if number % 97 == 0:
                receiver.crossing.put(number)
            elif number % 13 == 0:
                receiver.crossing.put_quietly([number])
            else:
                receiver.crossing.put_soon(number)
            if number % 5_000 == 0:
                time.sleep(2 * HOLD_S)
        receiver.crossing.put(total)

    thread = threading.Thread(target=send)
    thread.start()
    async with asyncio.timeout(20):
        while len(receiver.items) <= total:
            receiver.crossing.begin_wait()
            await asyncio.sleep(0)
            receiver.crossing.end_wait()
    thread.join()
    assert receiver.items == list(range(total + 1))
