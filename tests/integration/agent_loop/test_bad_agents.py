"""Agents are somebody else's code: nothing that they do ends the thread, or delays the host."""

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from steward.agent import BlockingRun, Run

pytestmark = pytest.mark.asyncio

Serve = Callable[..., Any]


async def well(run: Run) -> str:
    return "well"


async def test_a_blocked_agent_does_not_delay_the_host_and_is_seen(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async def blocks(run: Run) -> str:
        await run.think("now I block")
        time.sleep(2.0)  # noqa: ASYNC251 (that is the test)
        return "done"

    async with serve(blocks) as host:
        with caplog.at_level(logging.WARNING):
            key = host.start()
            await host.until(lambda: host.of(key))
            worst = turns = 0.0
            began = last = time.monotonic()
            while time.monotonic() - began < 1.7:
                # One turn of the host's loop per millisecond, as beats and deliveries would be.
                await asyncio.sleep(0.001)
                worst = max(worst, time.monotonic() - last)
                last = time.monotonic()
                turns += 1
            assert len(host.of(key)) == 1
            assert (await host.finished(key))["response"] == "done"
            await host.until(lambda: "goes on" in caplog.text)
    assert worst < 0.5 and turns > 100
    assert "blocks the agent loop" in caplog.text
    assert "time.sleep(2.0)" in caplog.text
    assert key.run_id in caplog.text
    sample = host.metrics.registry.get_sample_value
    in_time = sample("steward_agent_loop_lag_seconds_bucket", {"le": "1.0"})
    total = sample("steward_agent_loop_lag_seconds_count")
    assert in_time is not None and total is not None and total > in_time


@pytest.mark.parametrize("kind", ["coroutine", "plain", "tool", "thread tool"])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit, BaseException])
async def test_the_worst_exceptions_are_outcomes(
    serve: Serve, error: type[BaseException], kind: str
) -> None:
    def fail() -> None:
        raise error("bad")

    async def fail_async() -> None:
        fail()

    async def coroutine(run: Run) -> None:
        if kind == "coroutine":
            fail()
        await run.tool("t", {}, fail_async if kind == "tool" else fail)

    def plain(run: BlockingRun) -> None:
        fail()

    async with serve(plain if kind == "plain" else coroutine) as host:
        end = (await host.run()).end
        assert end["outcome"] == "failed" and end["error"]["type"] == error.__name__
        assert host.loop._thread.is_alive()


async def test_a_task_that_exits_and_a_stopped_loop_end_nothing(serve: Serve) -> None:
    async def leaves(run: Run) -> str:
        async def exits() -> None:
            sys.exit(3)

        if run.input.text == "exit":
            tasks = [asyncio.create_task(exits()) for _ in range(3)]
            await asyncio.wait(tasks)
            for task in tasks:
                task.exception()
        elif run.input.text == "stop":
            asyncio.get_running_loop().stop()
            await asyncio.sleep(0)
        return "on"

    async with serve(leaves) as host:
        for text in ("exit", "stop", "exit", "again"):
            assert (await host.run(text)).end["response"] == "on"
        assert host.loop._thread.is_alive()


async def test_tasks_that_an_agent_leaves_are_cancelled_before_its_end(serve: Serve) -> None:
    ended = threading.Event()
    left: list[asyncio.Task[Any]] = []

    async def leaves(run: Run) -> str:
        left.append(asyncio.create_task(run.tool("slow", {}, forever)))
        await opened.wait()
        return "gone"

    opened = asyncio.Event()

    async def forever() -> None:
        opened.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with serve(leaves) as host:
        run = await host.run()
    assert ended.is_set() and left[0].cancelled()
    assert run.types == ["tool_executing", "tool_completed"]
    assert run.data("tool_completed")[0]["success"] is False


async def test_a_call_that_refuses_to_end_is_completed_as_interrupted(serve: Serve) -> None:
    async def leaves(run: Run) -> str:
        opened = asyncio.Event()

        async def stubborn() -> None:
            opened.set()
            for _ in range(3):
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    continue

        task = asyncio.create_task(run.tool("slow", {}, stubborn))
        await opened.wait()
        return "gone" if not task.done() else "impossible"

    async with serve(leaves) as host:
        run = await host.run()
    assert run.end["response"] == "gone"
    assert run.types == ["tool_executing", "tool_completed"]
    assert run.data("tool_completed")[0]["error"]["type"] == "Interrupted"


async def test_a_run_that_is_over_can_say_nothing_more(serve: Serve) -> None:
    kept: list[Run] = []
    results: list[str] = []

    async def agent(run: Run) -> str:
        if kept:
            try:
                await kept[0].say("from the past")
            except asyncio.CancelledError:
                results.append("refused")
        kept.append(run)
        return "ok"

    async with serve(agent) as host:
        first = await host.run()
        await host.run()
        assert results == ["refused"]
        assert len(host.of(first.key)) == 1


async def test_tasks_of_one_run_do_not_belong_to_the_next(serve: Serve) -> None:
    async def agent(run: Run) -> str:
        value = await asyncio.create_task(asyncio.sleep(0, "from a task"))
        return str(await run.tool("t", {}, lambda: value))

    async with serve(agent) as host:
        ends = [(await host.run()).end["response"] for _ in range(20)]
    assert ends == ["from a task"] * 20


async def test_an_error_that_nobody_awaits_is_logged_without_its_text(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async def agent(run: Run) -> str:
        asyncio.get_running_loop().call_soon(fail)
        await asyncio.sleep(0)
        return "ok"

    def fail() -> None:
        raise ValueError("what alice wrote")

    async with serve(agent) as host:
        with caplog.at_level(logging.WARNING):
            await host.run()
    assert "ValueError" in caplog.text and "what alice wrote" not in caplog.text


async def test_the_log_of_a_failed_run_shows_where_and_not_what(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async def agent(run: Run) -> None:
        raise ValueError(run.input.text)

    async with serve(agent) as host:
        with caplog.at_level(logging.WARNING):
            run = await host.run("a secret of alice")
    assert run.end["error"]["message"] == "a secret of alice"
    assert "raise ValueError(run.input.text)" in caplog.text
    assert "a secret of alice" not in caplog.text
