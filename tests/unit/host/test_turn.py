"""Turns: what leaves together, when, and what never leaves."""

import asyncio

import pytest

from agent_service.host.turn import Turn

pytestmark = pytest.mark.asyncio


class Collecting:
    """Two kinds of things that leave at the end of a turn."""

    def __init__(self) -> None:
        self.silent = False
        self.left: list[str] = []
        self.waiting: list[str] = []
        self.turn = Turn(lambda: self.silent)
        self.turn.ends_with(self._leave)
        self.turn.ends_with(lambda: self.left.append("."))

    def collect(self, what: str) -> None:
        self.waiting.append(what)
        self.turn.collected()

    def _leave(self) -> None:
        self.left += self.waiting
        self.waiting.clear()


async def test_what_a_batch_collects_leaves_at_its_end_in_the_order_of_the_ways() -> None:
    it = Collecting()
    with it.turn:
        it.collect("a")
        it.collect("b")
        assert it.left == []
    assert it.left == ["a", "b", "."]
    await asyncio.sleep(0)
    assert it.left == ["a", "b", "."], "no further turn of the loop was asked for"


async def test_what_is_collected_alone_leaves_once_at_the_end_of_the_loops_turn() -> None:
    it = Collecting()
    it.collect("a")
    it.collect("b")
    assert it.left == []
    await asyncio.sleep(0)
    assert it.left == ["a", "b", "."]


async def test_a_batch_within_a_batch_ends_with_the_outer_one() -> None:
    it = Collecting()
    with it.turn:
        with it.turn:
            it.collect("a")
        assert it.left == []
    assert it.left == ["a", "."]


async def test_a_batch_that_fails_lets_go_what_was_collected_before() -> None:
    it = Collecting()
    with pytest.raises(ValueError, match="of this step"), it.turn:
        it.collect("a")
        raise ValueError("of this step")
    assert it.left == ["a", "."]


async def test_nothing_leaves_a_node_that_became_silent_meanwhile() -> None:
    it = Collecting()
    with it.turn:
        it.collect("a")
        it.silent = True
    it.collect("b")
    await asyncio.sleep(0)
    assert it.left == []
