"""A plain `def` agent gets the same verbs, which block, in a thread of a bounded set."""

import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from steward.agent import BlockingRun, Run

pytestmark = pytest.mark.asyncio

Serve = Callable[..., Any]


async def test_a_plain_agent_has_every_verb(serve: Serve) -> None:
    async def async_tool(n: int) -> int:
        return n + 1

    def plain(run: BlockingRun) -> dict[str, Any]:
        thread = threading.get_ident()
        run.think("a", step=1)
        here = run.tool("plain", {}, lambda: threading.get_ident() == thread)
        there = run.tool("async", {"n": 1}, async_tool)
        stepped = run.step("s", lambda x: x * 2, 4)
        run.progress(0.5, "half")
        run.emit("e", {"v": 1})
        run.state["n"] = run.input.text
        run.say("b")
        run.say(iter(["c", "d"]))
        return {"here": here, "there": there, "stepped": stepped, "user": run.user}

    async with serve(plain) as host:
        run = await host.run("hello")
    assert run.end == {
        "outcome": "success",
        "response": "bcd",
        "result": {"here": True, "there": 2, "stepped": 8, "user": "alice"},
    }
    assert run.types == [
        "agent_thinking",
        *["tool_executing", "tool_completed"] * 2,
        "progress",
        "custom",
        "state_delta",
        *["agent_text"] * 3,
    ]


async def test_a_plain_generator_says_what_it_yields(serve: Serve) -> None:
    def words(run: BlockingRun) -> Iterator[str]:
        run.think("x")
        yield from ("a", "b")

    async with serve(words) as host:
        run = await host.run()
    assert run.end == {"outcome": "success", "response": "ab"}
    assert run.types == ["agent_thinking", "agent_text", "agent_text"]


async def test_a_tool_error_is_recorded_and_raised_in_a_plain_agent(serve: Serve) -> None:
    def plain(run: BlockingRun) -> str:
        try:
            run.tool("t", {}, fails)
        except StopIteration:
            return "caught"
        return "not"

    def fails() -> None:
        raise StopIteration

    async with serve(plain) as host:
        run = await host.run()
    assert run.end["response"] == "caught"
    assert run.data("tool_completed")[0]["error"]["type"] == "StopIteration"


async def test_a_plain_agent_that_returns_a_coroutine_is_told(serve: Serve) -> None:
    async def inner(run: Any) -> str:
        return "x"

    def wrapper(run: BlockingRun) -> Any:
        return inner(run)

    async with serve(wrapper) as host:
        end = (await host.run()).end
    assert end["error"]["type"] == "TypeError" and "async def" in end["error"]["message"]


async def test_a_blocking_verb_on_the_agent_loop_is_an_error_and_no_deadlock(serve: Serve) -> None:
    def plain(run: BlockingRun) -> None:
        async def tool() -> None:
            run.think("from the loop")

        run.tool("t", {}, tool)

    async with serve(plain) as host:
        end = (await host.run()).end
    assert end["error"]["type"] == "RuntimeError" and "agent loop" in end["error"]["message"]


async def test_more_plain_agents_than_threads_all_end(serve: Serve) -> None:
    most = active = 0
    lock = threading.Lock()

    def plain(run: BlockingRun) -> str:
        nonlocal most, active
        with lock:
            active += 1
            most = max(most, active)
        value = run.tool("t", {}, lambda: 1)
        with lock:
            active -= 1
        return str(value)

    async with serve(plain, max_threads=3) as host:
        keys = [host.start(user=f"u{n}") for n in range(20)]
        for key in keys:
            assert (await host.finished(key))["response"] == "1"
    assert 1 <= most <= 3


async def test_a_stuck_tool_costs_a_thread_and_not_a_place(serve: Serve) -> None:
    release = threading.Event()
    stuck: list[Any] = []

    async def agent(run: Run) -> str:
        if run.input.text == "stuck":
            await run.tool("t", {}, lambda: (stuck.append(1), release.wait(20))[1])
        return str(await run.tool("t", {}, lambda: "fine"))

    async with serve(agent, max_threads=1) as host:
        try:
            key = host.start("stuck")
            await host.until(lambda: stuck)
            host.loop.cancel_run(key)
            assert (await host.run("other")).end["response"] == "fine"
        finally:
            release.set()


async def test_context_variables_of_a_run_reach_its_threads(serve: Serve) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")

    async def agent(run: Run) -> str:
        variable.set(run.input.text)
        return str(await run.tool("t", {}, variable.get))

    async with serve(agent) as host:
        assert (await host.run("carried")).end["response"] == "carried"
