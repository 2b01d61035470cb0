"""At most 64 verbs of a run are unacknowledged; what crosses, crosses in batches."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from agent_service.host.agent_execution import WINDOW, WINDOW_BYTES
from steward.agent import Run

pytestmark = pytest.mark.asyncio

Serve = Callable[..., Any]


async def test_a_run_waits_after_64_unacknowledged_verbs(serve: Serve) -> None:
    async def analyst(run: Run) -> None:
        for n in range(200):
            await run.think(str(n))

    async with serve(analyst) as host:
        host.hold = True
        key = host.start()
        await host.until(lambda: len(host.of(key)) == WINDOW)
        for _ in range(10):
            await host.run_probe()
        assert len(host.of(key)) == 64
        host.acknowledge(host.of(key)[:10])
        await host.until(lambda: len(host.of(key)) == 74)
        for _ in range(10):
            await host.run_probe()
        assert len(host.of(key)) == 74
        host.hold = False
        host.acknowledge()
        await host.finished(key)
        thoughts = [data["thought"] for _, data in host.events(key)]
        assert thoughts == [str(n) for n in range(200)]


async def test_a_full_window_of_one_run_holds_up_no_other(serve: Serve) -> None:
    async def analyst(run: Run) -> str:
        for _ in range(100 if run.input.text == "long" else 1):
            await run.think("x")
        return "done"

    async with serve(analyst) as host:
        host.hold = True
        blocked = host.start("long")
        await host.until(lambda: len(host.of(blocked)) == WINDOW)
        assert (await host.run("short", user="bob")).end["response"] == "done"
        assert len(host.of(blocked)) == WINDOW


async def test_the_window_is_bounded_in_bytes_too(serve: Serve) -> None:
    async def analyst(run: Run) -> None:
        for _ in range(20):
            await run.emit("blob", "x" * 1_000_000)

    async with serve(analyst) as host:
        host.hold = True
        key = host.start()
        await host.until(lambda: len(host.of(key)) == WINDOW_BYTES // 1_000_000)
        for _ in range(10):
            await host.run_probe()
        assert sum(len(verb.data) for verb in host.of(key)) <= WINDOW_BYTES
        host.hold = False
        host.acknowledge()
        await host.finished(key)
        assert len(host.events(key)) == 20


async def test_many_tasks_of_one_run_share_one_window(serve: Serve) -> None:
    async def analyst(run: Run) -> None:
        await asyncio.gather(*(run.think(str(n)) for n in range(500)))

    async with serve(analyst) as host:
        host.hold = True
        key = host.start()
        await host.until(lambda: len(host.of(key)) == WINDOW)
        for _ in range(10):
            await host.run_probe()
        assert len(host.of(key)) == WINDOW
        host.hold = False
        host.acknowledge()
        await host.finished(key)
        assert [data["thought"] for _, data in host.events(key)] == [str(n) for n in range(500)]


async def test_a_small_verb_does_not_overtake_a_large_one_that_waits(serve: Serve) -> None:
    async def analyst(run: Run) -> None:
        for _ in range(4):
            await run.emit("blob", "x" * 1_000_000)
        large = asyncio.create_task(run.emit("large", "x" * 1_000_000))
        await asyncio.sleep(0)
        await run.emit("small", "x")
        await large

    async with serve(analyst) as host:
        host.hold = True
        key = host.start()
        await host.until(lambda: len(host.of(key)) == 4)
        for _ in range(10):
            await host.run_probe()
        assert len(host.of(key)) == 4
        host.hold = False
        host.acknowledge()
        await host.finished(key)
        assert [data["name"] for _, data in host.events(key)][4:] == ["large", "small"]


async def test_a_verb_that_gives_up_waiting_passes_its_place_on(serve: Serve) -> None:
    async def analyst(run: Run) -> str:
        waiting = [asyncio.create_task(run.think(str(n))) for n in range(WINDOW + 10)]
        await asyncio.wait(waiting[:WINDOW])
        for task in waiting[WINDOW : WINDOW + 5]:
            task.cancel()
        await asyncio.wait(waiting)
        return str(sum(task.cancelled() for task in waiting))

    async with serve(analyst) as host:
        host.hold = True
        key = host.start()
        await host.until(lambda: len(host.of(key)) == WINDOW)
        for _ in range(10):
            await host.run_probe()
        host.hold = False
        host.acknowledge()
        assert (await host.finished(key))["response"] == "5"
        assert len(host.events(key)) == WINDOW + 5


async def test_what_waits_crosses_in_one_batch(serve: Serve) -> None:
    async def analyst(run: Run) -> None:
        for _ in range(640):
            await run.think("x")

    async with serve(analyst) as host:
        await host.run()
        assert max(host.batches) > 1
        assert len(host.batches) < 640


async def test_acknowledgements_of_nobody_are_ignored(serve: Serve) -> None:
    async def analyst(run: Run) -> str:
        return "ok"

    async with serve(analyst) as host:
        first = await host.run()
        host.acknowledge(first.verbs)
        host.acknowledge(first.verbs)
        assert (await host.run()).end["response"] == "ok"


async def test_what_is_kept_with_a_change_of_the_state_takes_room_too(serve: Serve) -> None:
    async def thinks(run: Run) -> None:
        for _ in range(WINDOW):
            await run.think("x")

        async def change() -> None:
            run.state["n"] = 1
            await run.think("a")

        await asyncio.gather(change(), run.think("b"), run.think("c"))

    async with serve(thinks) as host:
        host.hold = True
        key = host.start()
        await host.until(lambda: len(host.of(key)) == WINDOW)
        host.acknowledge(host.of(key)[:1])
        for _ in range(5):
            await host.run_probe()
        # One place is not enough for the state before the change and the change.
        assert len(host.of(key)) == WINDOW
        host.acknowledge(host.of(key)[:2])
        for _ in range(5):
            await host.run_probe()
        kinds = [type(verb).__name__ for verb in host.of(key)[WINDOW:]]
        assert kinds == ["RecordStep", "EmitEvent"]
        host.hold = False
        host.acknowledge()
        assert (await host.finished(key))["outcome"] == "success"
