"""A run that is cut anywhere and resumed is the run that was never cut."""

import asyncio
import contextlib
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steward.agent import BlockingRun, Run

Tell = Callable[..., Any]


class Tools:
    """Tools that count how often they ran."""

    def __init__(self) -> None:
        self.ran: Counter[str] = Counter()

    def add(self, a: int, b: int) -> int:
        self.ran[f"add {a} {b}"] += 1
        return a + b

    async def later(self, n: int) -> dict[str, int]:
        self.ran[f"later {n}"] += 1
        await asyncio.sleep(0.001 * n)
        return {"n": n}

    def fails(self, why: str) -> None:
        self.ran[f"fails {why}"] += 1
        raise LookupError(why)

    async def forever(self) -> None:
        self.ran["forever"] += 1
        await asyncio.Event().wait()

    def step(self, n: int) -> list[int]:
        self.ran[f"step {n}"] += 1
        return [n]


def ten_events(tools: Tools) -> Callable[..., Any]:
    async def agent(run: Run) -> dict[str, Any]:
        await run.think("first", step=1)
        total = await run.tool("add", {"a": 1, "b": 2}, tools.add)
        await run.say("The sum ")
        await run.say(f"is {total}. ")
        try:
            await run.tool("fails", {"why": "no table"}, tools.fails)
        except LookupError as error:
            await run.say(f"But {error}.")
        picked = await run.step("pick", tools.step, 7)
        await run.progress(0.5, "half")
        again = await run.tool("add", {"a": 3, "b": 4}, tools.add)
        await run.emit("chart", {"points": picked, "again": again})
        return {"total": total}

    return agent


def stateful(tools: Tools) -> Callable[..., Any]:
    async def agent(run: Run) -> str:
        run.state["n"] = run.state.get("n", 0) + 1
        await run.tool("add", {"a": run.state["n"], "b": 0}, tools.add)
        run.state.setdefault("seen", []).append(run.state["n"])
        await run.think("counted")
        run.state["seen"].append("end")
        return f"n is {run.state['n']}"

    return agent


def generator(tools: Tools) -> Callable[..., Any]:
    async def agent(run: Run) -> AsyncIterator[str]:
        yield "a "
        yield "b "
        value = await run.tool("later", {"n": 1}, tools.later)
        yield f"{value['n']} "
        await run.think("more", delta=True)
        await run.think("and more", delta=True)
        yield "d"

    return agent


def plain(tools: Tools) -> Callable[..., Any]:
    def agent(run: BlockingRun) -> Iterator[str]:
        yield "one "
        run.state["k"] = run.state.get("k", 0) + 1
        value = run.tool("add", {"a": 2, "b": 2}, tools.add)
        run.think("plain thought")
        yield f"{value} "
        value = run.step("s", tools.step, 3)
        yield f"{value[0]} {run.tool('later', {'n': 1}, tools.later)['n']}"
        try:
            run.tool("fails", {"why": "always"}, tools.fails)
        except LookupError:
            yield " caught"

    return agent


def fails_at_the_end(tools: Tools) -> Callable[..., Any]:
    async def agent(run: Run) -> None:
        await run.say("so far")
        await run.tool("fails", {"why": "for good"}, tools.fails)

    return agent


def times_out(tools: Tools) -> Callable[..., Any]:
    async def agent(run: Run) -> str:
        try:
            async with asyncio.timeout(0.03):
                await run.tool("forever", {}, tools.forever)
        except TimeoutError:
            await run.think("too slow")
        value = await run.tool("add", {"a": 0, "b": 1}, tools.add)
        return f"late {value}"

    return agent


def tools_that_change_the_state(tools: Tools) -> Callable[..., Any]:
    async def agent(run: Run) -> str:
        async def count(n: int) -> int:
            tools.add(n, 0)
            run.state["n"] = run.state.get("n", 0) + n
            return n

        def note(n: int) -> list[int]:
            run.state.setdefault("list", []).append(n)
            return tools.step(n)

        def breaks(n: int) -> None:
            run.state["broken"] = n
            tools.fails(str(n))

        run.state["mine"] = "a"
        await run.tool("add", {"a": 1, "b": 0}, lambda a, b: count(a))
        await run.step("note#x", note, 2)
        await run.tool("add", {"a": 3, "b": 0}, lambda a, b: count(a))
        run.state["mine"] += "b"
        with contextlib.suppress(LookupError):
            await run.tool("fails", {"n": 4}, breaks)
        await run.step("note#x", note, 5)
        return str(run.state)

    return agent


SEQUENTIAL = [
    ten_events,
    stateful,
    generator,
    plain,
    fails_at_the_end,
    times_out,
    tools_that_change_the_state,
]


def _cut_and_resumed(tell: Tell, make: Any, cut: int) -> Any:
    """One crash. In the second attempt nothing ran that the first one had finished."""
    tools = Tools()
    story = tell(make(tools)).attempt(cut)
    assert max(tools.ran.values(), default=1) == 1
    finished = _finished(story)
    tools.ran.clear()
    stored = story.events
    story.attempt()
    assert not finished & tools.ran.keys(), f"cut at {cut}"
    assert max(tools.ran.values(), default=1) == 1
    assert finished | tools.ran.keys() == _finished(story)
    assert story.events[: len(stored)] == stored
    return story


def _finished(story: Any) -> set[str]:
    calls = {data["tool_call_id"]: data for _, data in story.of("tool_executing")}
    values = [value for key, value in story.steps.items() if "state" not in key]
    found = {f"step {json.loads(value)[0]}" for value in values}
    for _, data in story.of("tool_completed"):
        call = calls[data["tool_call_id"]]
        found.add(" ".join([call["tool_name"], *map(str, call["arguments"].values())]))
    return found


@pytest.mark.parametrize("make", SEQUENTIAL)
def test_a_run_cut_at_any_verb_and_resumed_is_as_if_never_cut(tell: Tell, make: Any) -> None:
    whole = tell(make(Tools())).attempt()
    assert whole.end is not None and whole.committed >= 4
    for cut in range(whole.committed):
        story = _cut_and_resumed(tell, make, cut)
        assert story.events == whole.events, f"cut at {cut}"
        assert story.end == whole.end, f"cut at {cut}"
        assert story.state == whole.state, f"cut at {cut}"


@pytest.mark.parametrize("make", SEQUENTIAL)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cuts=st.lists(st.integers(0, 12), min_size=1, max_size=5))
def test_a_run_cut_several_times_is_as_if_never_cut(tell: Tell, make: Any, cuts: list[int]) -> None:
    whole = tell(make(Tools())).attempt()
    story = tell(make(Tools())).told(cuts)
    assert story.events == whole.events
    assert story.end == whole.end and story.state == whole.state


def overlapping(tools: Tools) -> Callable[..., Any]:
    async def branch(run: Run, n: int) -> int:
        value = await run.tool("later", {"n": n}, tools.later)
        await run.think(f"branch {n} has {value['n']}")
        mapped: list[int] = await run.step("map", tools.step, n)
        assert mapped == [n], "the step of another branch"
        total: int = await run.tool("add", {"a": n, "b": mapped[0]}, tools.add)
        await run.emit("branch", {"n": n, "total": total})
        return total

    async def agent(run: Run) -> dict[str, Any]:
        await run.think("three at once")
        return {"totals": await asyncio.gather(*(branch(run, n) for n in (3, 2, 1)))}

    return agent


def overlapping_threads(tools: Tools) -> Callable[..., Any]:
    def agent(run: BlockingRun) -> dict[str, Any]:
        barrier = threading.Barrier(3, timeout=5)

        def branch(n: int) -> int:
            barrier.wait()
            run.tool("later", {"n": n}, tools.later)
            run.think(f"branch {n}")
            value: list[int] = run.step("map", tools.step, n)
            assert value == [n], "the step of another branch"
            total: int = run.tool("add", {"a": n, "b": value[0]}, tools.add)
            return total

        with ThreadPoolExecutor(3) as pool:
            return {"totals": list(pool.map(branch, (3, 2, 1)))}

    return agent


@pytest.mark.parametrize("make", [overlapping, overlapping_threads])
def test_branches_cut_at_any_verb_repeat_nothing_that_is_finished(tell: Tell, make: Any) -> None:
    whole = tell(make(Tools())).attempt()
    for cut in range(whole.committed):
        story = _cut_and_resumed(tell, make, cut)
        result = {"totals": [6, 4, 2]}
        assert story.end == {"outcome": "success", "response": "", "result": result}
        for type in ("tool_executing", "tool_completed"):
            assert len({data["tool_call_id"] for _, data in story.of(type)}) == 6
            assert len(story.of(type)) == 6
        # Events are at worst repeated.
        assert not Counter(map(repr, whole.events)) - Counter(
            map(repr, _without_call_ids(story.events, whole.events))
        )


def _without_call_ids(events: list[Any], like: list[Any]) -> list[Any]:
    """Calls renamed as in another run, by tool and arguments: their numbers may differ."""
    names: dict[str, str] = {}
    known = {
        (data["tool_name"], repr(data["arguments"])): data["tool_call_id"]
        for type, data in like
        if type == "tool_executing"
    }
    found = []
    for type, data in events:
        if type == "tool_executing":
            names[data["tool_call_id"]] = known[data["tool_name"], repr(data["arguments"])]
        if "tool_call_id" in data:
            data = {**data, "tool_call_id": names[data["tool_call_id"]]}
        found.append((type, data))
    return found
