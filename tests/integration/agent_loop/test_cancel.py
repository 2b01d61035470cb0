"""A cancelled run can do nothing any more, whatever its code does about it."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from steward.agent import BlockingRun, Run, RunCancelled
from steward.model.verbs import FinishRun

pytestmark = pytest.mark.asyncio

Serve = Callable[..., Any]


async def test_a_cancelled_run_hands_over_nothing_more(serve: Serve) -> None:
    ended = threading.Event()

    async def analyst(run: Run) -> None:
        try:
            while True:
                await run.think("again")
        finally:
            ended.set()

    async with serve(analyst) as host:
        key = host.start()
        await host.until(lambda: len(host.of(key)) > 100)
        host.loop.cancel_run(key)
        seen = len(host.of(key))
        await host.until(ended.is_set)
        await host.run_probe()
        assert len(host.of(key)) == seen
        assert not any(isinstance(verb, FinishRun) for verb in host.of(key))


async def test_verbs_in_flight_of_a_cancelled_run_are_dropped(serve: Serve) -> None:
    started = threading.Event()
    go = threading.Event()

    async def analyst(run: Run) -> None:
        started.set()
        go.wait(5)
        await run.think("in flight")

    async with serve(analyst) as host:
        key = host.start()
        await host.until(started.is_set)
        # The agent blocks its loop, which hears of the cancel only after the verb was put.
        host.loop.cancel_run(key)
        go.set()
        await host.run_probe()
        await host.run_probe()
        assert host.of(key) == []
        assert host.loop._silenced == set()


async def test_an_agent_that_swallows_the_cancellation_gets_it_from_every_verb(
    serve: Serve,
) -> None:
    refused: list[str] = []
    done = threading.Event()

    async def stubborn(run: Run) -> str:
        await run.think("started")
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        verbs: list[Callable[[], Any]] = [
            lambda: run.think("x"),
            lambda: run.say("x"),
            lambda: run.tool("t", {}, lambda: refused.append("the tool ran")),
            lambda: run.step("s", lambda: refused.append("the step ran")),
            lambda: run.progress(1),
            lambda: run.emit("x", 1),
        ]
        for verb in verbs:
            try:
                await verb()
            except RunCancelled:
                refused.append("refused")
        done.set()
        return "survived"

    async with serve(stubborn) as host:
        key = host.start()
        await host.until(lambda: host.of(key))
        host.loop.cancel_run(key)
        await host.until(done.is_set)
        await host.run_probe()
        assert refused == ["refused"] * 6
        assert len(host.of(key)) == 1


async def test_a_tool_that_waits_for_its_announcement_never_starts(serve: Serve) -> None:
    started = threading.Event()
    ended = threading.Event()

    async def analyst(run: Run) -> None:
        try:
            await run.tool("q", {}, started.set)
        finally:
            ended.set()

    async with serve(analyst) as host:
        host.hold = True
        key = host.start()
        await host.until(lambda: len(host.of(key)) == 1)
        host.loop.cancel_run(key)
        host.acknowledge()
        await host.until(ended.is_set)
        await host.run_probe()
        assert not started.is_set()
        assert len(host.of(key)) == 1


async def test_code_that_does_not_end_within_the_grace_is_abandoned(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    ends = 0

    async def stubborn(run: Run) -> None:
        nonlocal ends
        await run.think("started")
        while ends < 2:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ends += 1

    async with serve(stubborn, cancel_grace_s=0.1) as host:
        key = host.start()
        await host.until(lambda: host.of(key))
        with caplog.at_level(logging.WARNING):
            host.loop.cancel_run(key)
            await host.until(lambda: ends == 2)
        assert "abandoned" in caplog.text and key.run_id in caplog.text
        assert host.metrics.abandoned_runs._value.get() == 1


async def test_an_agent_that_loops_over_its_cancellation_does_not_stop_the_others(
    serve: Serve,
) -> None:
    released = threading.Event()

    async def agent(run: Run) -> str:
        while run.input.text == "stubborn" and not released.is_set():
            with contextlib.suppress(BaseException):
                await run.think("again")
        return "fine"

    async with serve(agent, cancel_grace_s=0.1) as host:
        key = host.start("stubborn")
        await host.until(lambda: len(host.of(key)) > 3)
        host.loop.cancel_run(key)
        began = time.monotonic()
        assert (await host.run("other")).end["response"] == "fine"
        assert time.monotonic() - began < 2
        released.set()


async def test_tasks_of_a_cancelled_run_are_cancelled(serve: Serve) -> None:
    ended = threading.Event()

    async def analyst(run: Run) -> None:
        asyncio.create_task(background()).set_name("left")
        await run.think("started")
        await asyncio.Event().wait()

    async def background() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with serve(analyst) as host:
        key = host.start()
        await host.until(lambda: host.of(key))
        host.loop.cancel_run(key)
        await host.until(ended.is_set)
        assert len(host.of(key)) == 1


async def test_a_plain_agent_is_cancelled_at_its_next_verb(serve: Serve) -> None:
    ended = threading.Event()
    go = threading.Event()

    def plain(run: BlockingRun) -> None:
        run.think("started")
        go.wait(5)
        try:
            run.tool("t", {}, lambda: 1)
        except Exception:
            run.think("swallowed")
        except RunCancelled:
            ended.set()
            raise

    async with serve(plain) as host:
        key = host.start()
        await host.until(lambda: host.of(key))
        host.loop.cancel_run(key)
        go.set()
        await host.until(ended.is_set)
        assert len(host.of(key)) == 1


async def test_a_plain_agent_that_waits_for_an_acknowledgement_is_woken(serve: Serve) -> None:
    ended = threading.Event()

    def plain(run: BlockingRun) -> None:
        try:
            run.tool("t", {}, lambda: 1)
        except RunCancelled:
            ended.set()
            raise

    async with serve(plain) as host:
        host.hold = True
        key = host.start()
        await host.until(lambda: host.of(key))
        host.loop.cancel_run(key)
        await host.until(ended.is_set)
        assert len(host.of(key)) == 1


async def test_cancelling_nobody_or_twice_is_harmless(serve: Serve) -> None:
    async def analyst(run: Run) -> str:
        return "ok"

    async with serve(analyst) as host:
        first = await host.run()
        host.loop.cancel_run(first.key)
        host.loop.cancel_run(first.key)
        assert (await host.run()).end["response"] == "ok"
        await host.run_probe()
        assert host.loop._silenced == set()


async def test_a_generator_is_closed_when_its_run_is_cancelled(serve: Serve) -> None:
    closed = threading.Event()

    async def words(run: Run) -> AsyncIterator[str]:
        try:
            while True:
                yield "word "
        finally:
            closed.set()

    async with serve(words) as host:
        key = host.start()
        await host.until(lambda: len(host.of(key)) > 3)
        host.loop.cancel_run(key)
        await host.until(closed.is_set)
        assert closed.is_set()


async def test_stop_cancels_all_runs_and_ends_the_thread(serve: Serve) -> None:
    ended: list[str] = []

    async def analyst(run: Run) -> None:
        await run.think("started")
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(run.user)

    async with serve(analyst) as host:
        for user in ("alice", "bob"):
            host.start(user=user)
        await host.until(lambda: len(host.verbs) == 2)
        await host.loop.stop(5.0)
        assert sorted(ended) == ["alice", "bob"]
        host.loop._thread.join(5.0)
        assert not host.loop._thread.is_alive()
        host.start()
        host.loop.cancel_run(host.verbs[0].key)
        await host.loop.stop(5.0)


async def test_stop_leaves_a_stuck_thread_behind(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()

    async def blocked(run: Run) -> None:
        await run.think("started")
        release.wait(20)

    async with serve(blocked) as host:
        host.start()
        await host.until(lambda: host.verbs)
        began = time.monotonic()
        with caplog.at_level(logging.WARNING):
            await host.loop.stop(0.1)
        assert time.monotonic() - began < 5
        assert "left behind" in caplog.text
        release.set()
        host.loop._thread.join(10)
        assert not host.loop._thread.is_alive()
