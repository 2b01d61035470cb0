"""What an agent does and what the manager gets for it, convention by convention."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from steward.agent import NotAvailable, Run, agent
from steward.model.verbs import EmitEvent, EventType, FinishRun

pytestmark = pytest.mark.asyncio

Serve = Callable[..., Any]
"""The fixture of conftest.py: `async with serve(agent, ...) as host`."""


async def test_a_generator_of_text_says_what_it_yields(serve: Serve) -> None:
    async def echo(run: Run) -> AsyncIterator[str]:
        for word in run.input.text.split():
            yield word + " "

    async with serve(echo) as host:
        run = await host.run("one two")
    assert run.events == [
        ("agent_text", {"message_id": f"{run.key.run_id}.m1", "delta": "one "}),
        ("agent_text", {"message_id": f"{run.key.run_id}.m1", "delta": "two "}),
    ]
    assert run.end == {"outcome": "success", "response": "one two "}


async def test_a_run_knows_its_facts(serve: Serve) -> None:
    seen: dict[str, Any] = {}

    async def facts(run: Run) -> None:
        for name in ("tenant", "user", "thread_id", "run_id", "attempt", "epoch", "traceparent"):
            seen[name] = getattr(run, name)
        seen.update(text=run.input.text, parts=run.input.parts, messages=run.messages)
        seen.update(key=run.idempotency_key("send mail"), deadline=run.deadline)

    content = ["see", {"type": "text", "text": "this"}, {"type": "image", "url": "u"}]
    async with serve(facts) as host:
        run = await host.run(content, user="a/b", attempt=2)
    run_id = run.key.run_id
    assert seen == {
        "tenant": "default",
        "user": "a/b",
        "thread_id": "main",
        "run_id": run_id,
        "attempt": 2,
        "epoch": 7,
        "traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01",
        "text": "see\nthis",
        "parts": tuple(content),
        "messages": [{"role": "user", "content": content, "run_id": run_id}],
        "key": f"default/a%2Fb/{run_id}/send%20mail",
        "deadline": None,
    }


async def test_a_tool_call_is_announced_called_and_completed(serve: Serve) -> None:
    async def analyst(run: Run) -> str:
        rows = await run.tool("query", {"region": "all"}, query, purpose="the figures")
        again = await run.tool("query", {"region": "South"}, query)
        named = await run.tool("query", {"region": "West"}, query, id="model-7")
        assert rows == ["all", 1] and again == ["South", 1] and named == ["West", 1]
        return "done"

    async def query(region: str) -> tuple[str, int]:
        return region, 1

    async with serve(analyst) as host:
        run = await host.run()
    run_id = run.key.run_id
    assert run.end == {"outcome": "success", "response": "done"}
    executing, completed = run.data("tool_executing"), run.data("tool_completed")
    assert executing[0] == {
        "tool_call_id": f"{run_id}.query.1",
        "tool_name": "query",
        "arguments": {"region": "all"},
        "purpose": "the figures",
    }
    assert "purpose" not in executing[1]
    duration_ms = completed[0].pop("duration_ms")
    assert isinstance(duration_ms, int) and 0 <= duration_ms < 5000
    assert completed[0] == {
        "tool_call_id": f"{run_id}.query.1",
        "tool_name": "query",
        "success": True,
        "result": ["all", 1],
    }
    ids = [f"{run_id}.query.1", f"{run_id}.query.2", "model-7"]
    assert [data["tool_call_id"] for data in executing] == ids
    assert [verb.tool_call_id for verb in run.emitted] == [one for one in ids for _ in range(2)]
    assert run.types == ["tool_executing", "tool_completed"] * 3


async def test_the_next_call_of_a_name_counts_on_after_one_with_its_own_id(serve: Serve) -> None:
    async def analyst(run: Run) -> None:
        await run.tool("q", {}, int, id="x")
        await run.tool("q", {}, int)
        with pytest.raises(ValueError, match="used before"):
            await run.tool("q", {}, int, id="x")

    async with serve(analyst) as host:
        run = await host.run()
    assert run.end["outcome"] == "success", run.end
    ids = [data["tool_call_id"] for data in run.data("tool_executing")]
    assert ids == ["x", f"{run.key.run_id}.q.2"]


async def test_a_tool_starts_only_after_its_announcement_is_in_the_log(serve: Serve) -> None:
    started = threading.Event()

    async def analyst(run: Run) -> str:
        return str(await run.tool("q", {}, tool))

    def tool() -> int:
        started.set()
        return 1

    async with serve(analyst) as host:
        host.hold = True
        key = host.start()
        await host.until(lambda: len(host.of(key)) == 1)
        # The agent loop has turned several times, and still nothing starts.
        for _ in range(5):
            await host.run_probe()
        assert not started.is_set()
        host.acknowledge()
        await host.until(started.is_set)
        await host.until(lambda: len(host.of(key)) == 2)
        # And it returns only after its completion is in the log.
        for _ in range(5):
            await host.run_probe()
        assert len(host.of(key)) == 2
        host.acknowledge()
        assert (await host.finished(key))["response"] == "1"


async def test_a_step_returns_only_after_what_came_before_is_in_the_log(serve: Serve) -> None:
    steps: list[str] = []

    async def analyst(run: Run) -> dict[str, Any]:
        await run.think("first")
        value = await run.step("send", send, "b", subject="c")
        steps.append("returned")
        return {"value": value}

    def send(to: str, subject: str) -> str:
        steps.append("called")
        return to + subject

    async with serve(analyst) as host:
        host.hold = True
        key = host.start()
        await host.until(lambda: len(host.of(key)) == 1)
        for _ in range(5):
            await host.run_probe()
        assert steps == []
        host.hold = False
        host.acknowledge()
        assert (await host.finished(key))["result"] == {"value": "bc"}
        assert steps == ["called", "returned"]
        assert [type for type, _ in host.events(key)] == ["agent_thinking"]


@pytest.mark.parametrize("where", ["coroutine", "thread"])
async def test_an_exception_of_a_tool_is_recorded_and_raised_again(
    serve: Serve, where: str
) -> None:
    async def analyst(run: Run) -> str:
        try:
            await run.tool("q", {}, fails_async if where == "coroutine" else fails)
        except LookupError as error:
            return f"caught {error}"
        return "not raised"

    def fails() -> None:
        raise LookupError("no such table")

    async def fails_async() -> None:
        fails()

    async with serve(analyst) as host:
        run = await host.run()
    assert run.end["response"] == "caught no such table"
    completed = run.data("tool_completed")[0]
    assert completed["success"] is False and "result" not in completed
    assert completed["error"] == {"type": "LookupError", "message": "no such table"}


async def test_a_result_that_is_not_json_fails_the_call_with_type_error(serve: Serve) -> None:
    async def analyst(run: Run) -> None:
        await run.tool("q", {}, lambda: {"at": object()})

    async with serve(analyst) as host:
        run = await host.run()
    assert run.end["outcome"] == "failed"
    assert run.end["error"]["type"] == "TypeError"
    assert "result of tool 'q' is not JSON at ['at']" in run.end["error"]["message"]
    completed = run.data("tool_completed")[0]
    assert completed["success"] is False and completed["error"]["type"] == "TypeError"


@pytest.mark.parametrize(
    "arguments", [[1], {"a": object()}, {1: 2}], ids=["a list", "no JSON", "a number as key"]
)
async def test_bad_arguments_are_refused_before_anything_is_announced(
    serve: Serve, arguments: Any
) -> None:
    async def analyst(run: Run) -> None:
        await run.tool("q", arguments, int)

    async with serve(analyst) as host:
        run = await host.run()
    assert run.end["error"]["type"] == "TypeError" and run.types == []


async def test_tools_may_run_at_the_same_time(serve: Serve) -> None:
    async def analyst(run: Run) -> dict[str, Any]:
        barrier = threading.Barrier(3, timeout=5)

        def tool(n: int) -> int:
            barrier.wait()
            return n

        calls = [run.tool("q", {"n": n}, tool) for n in range(3)]
        return {"values": await asyncio.gather(*calls)}

    async with serve(analyst) as host:
        run = await host.run()
    assert run.end["result"] == {"values": [0, 1, 2]}
    assert run.types[:3] == ["tool_executing"] * 3


async def test_a_call_that_the_agent_times_out_is_completed_as_failed(serve: Serve) -> None:
    async def analyst(run: Run) -> str:
        try:
            async with asyncio.timeout(0.05):
                await run.tool("slow", {}, forever)
        except TimeoutError:
            return "timed out"
        return "finished"

    async def forever() -> None:
        await asyncio.Event().wait()

    async with serve(analyst) as host:
        run = await host.run()
    assert run.end["response"] == "timed out"
    assert run.types == ["tool_executing", "tool_completed"]
    assert run.data("tool_completed")[0]["error"]["type"] == "CancelledError"


async def test_thinking_progress_and_custom_events_have_their_fields(serve: Serve) -> None:
    async def analyst(run: Run) -> None:
        await run.think("plain")
        await run.think("whole", delta=True, step=1, total_steps=3, progress=0.5)
        await run.progress(1, "done")
        await run.progress(0.25)
        await run.emit("chart", {"points": [1, 2]})

    async with serve(analyst) as host:
        run = await host.run()
    assert run.events == [
        ("agent_thinking", {"thought": "plain", "delta": False}),
        (
            "agent_thinking",
            {"thought": "whole", "delta": True, "step": 1, "total_steps": 3, "progress": 0.5},
        ),
        ("progress", {"fraction": 1, "label": "done"}),
        ("progress", {"fraction": 0.25, "label": ""}),
        ("custom", {"name": "chart", "value": {"points": [1, 2]}}),
    ]
    assert run.end == {"outcome": "success", "response": ""}


@pytest.mark.parametrize(
    ("verb", "error"),
    [
        (lambda run: run.think(3), "TypeError"),
        (lambda run: run.say(3), "TypeError"),
        (lambda run: run.progress(2), "ValueError"),
        (lambda run: run.progress(float("nan")), "ValueError"),
        (lambda run: run.progress("half"), "TypeError"),
        (lambda run: run.emit("x", {1}), "TypeError"),
        (lambda run: run.emit("x", "y" * 2_000_000), "ValueError"),
        (lambda run: run.tool("", {}, int), "ValueError"),
        (lambda run: run.tool("x", {}, 3), "TypeError"),
        (lambda run: run.tool("x", {}, int, on_crash="perhaps"), "ValueError"),
        (lambda run: run.ask("Sure?", bool), "NotAvailable"),
        (lambda run: run.subrun("other", "x"), "NotAvailable"),
        (lambda run: run.steer(), "NotAvailable"),
    ],
)
async def test_wrong_use_of_a_verb_is_an_error_of_the_agent(
    serve: Serve, verb: Any, error: str
) -> None:
    async def analyst(run: Run) -> None:
        await verb(run)

    async with serve(analyst) as host:
        run = await host.run()
    assert run.end["outcome"] == "failed" and run.end["error"]["type"] == error
    assert run.types == []


async def test_what_comes_with_durable_runs_says_so(serve: Serve) -> None:
    async def analyst(run: Run) -> str:
        with pytest.raises(NotAvailable, match="durable runs"):
            await run.ask("Sure?")
        return "ok"

    async with serve(analyst) as host:
        assert (await host.run()).end["response"] == "ok"


async def test_a_message_is_one_contiguous_answer(serve: Serve) -> None:
    async def analyst(run: Run) -> None:
        async def pieces() -> AsyncIterator[str]:
            yield "a"
            yield ""
            yield "b"

        await run.say(pieces())
        await run.progress(0.5)
        await run.say("c")
        await run.tool("q", {}, int)
        await run.say("d")
        await run.think("hm")
        await run.say("e")

    async with serve(analyst) as host:
        run = await host.run()
    said = [(data["message_id"][-2:], data["delta"]) for data in run.data("agent_text")]
    assert said == [("m1", "a"), ("m1", "b"), ("m1", "c"), ("m2", "d"), ("m3", "e")]
    assert run.end["response"] == "abcde"


async def test_a_long_text_is_said_in_several_events(serve: Serve) -> None:
    async def analyst(run: Run) -> None:
        await run.say("x" * 100_000)

    async with serve(analyst) as host:
        run = await host.run()
    assert len(run.emitted) == 4 and run.end["response"] == "x" * 100_000


@pytest.mark.parametrize(
    ("returned", "end"),
    [
        ("text", {"outcome": "success", "response": "text"}),
        ("", {"outcome": "success", "response": ""}),
        (None, {"outcome": "success", "response": "said"}),
        ({"a": 1}, {"outcome": "success", "response": "said", "result": {"a": 1}}),
        ({}, {"outcome": "success", "response": "said", "result": {}}),
    ],
)
async def test_what_an_agent_returns_is_the_outcome(
    serve: Serve, returned: Any, end: dict[str, Any]
) -> None:
    async def analyst(run: Run) -> Any:
        await run.say("said")
        return returned

    async with serve(analyst) as host:
        assert (await host.run()).end == end


@pytest.mark.parametrize("returned", [3, True, ["a"], b"x", ("a",), {"a": object()}, {1: 2}])
async def test_any_other_return_value_is_a_failure(serve: Serve, returned: Any) -> None:
    async def analyst(run: Run) -> Any:
        await run.say("said")
        return returned

    async with serve(analyst) as host:
        end = (await host.run()).end
    assert end["outcome"] == "failed" and end["error"]["type"] == "TypeError"
    assert end["response"] == "said" and "result" not in end


async def test_an_exception_is_the_outcome_failed(serve: Serve) -> None:
    class OwnError(Exception):
        pass

    async def analyst(run: Run) -> str:
        await run.say("so far")
        raise OwnError("it broke")

    async with serve(analyst) as host:
        end = (await host.run()).end
    assert end == {
        "outcome": "failed",
        "response": "so far",
        "error": {"type": "OwnError", "message": "it broke"},
    }


async def test_a_generator_that_yields_no_text_fails(serve: Serve) -> None:
    async def numbers(run: Run) -> AsyncIterator[Any]:
        yield "a"
        yield 1

    async with serve(numbers) as host:
        end = (await host.run()).end
    assert end["outcome"] == "failed" and end["response"] == "a"
    assert end["error"]["type"] == "TypeError"


async def test_a_change_of_state_is_one_patch_with_the_next_verb(serve: Serve) -> None:
    async def counter(run: Run) -> None:
        assert run.state == {"n": 1, "list": [1]}
        run.state["n"] += 1
        run.state["list"].append(2)
        assert run.state["n"] == 2
        await run.think("next verb")
        await run.think("nothing changed")
        run.state = {"only": {"deep": True}}

    async with serve(counter) as host:
        run = await host.run(state={"n": 1, "list": [1]})
    assert run.types == ["state_delta", "agent_thinking", "agent_thinking", "state_delta"]
    first, last = run.data("state_delta")
    assert first["patch"] == [
        {"op": "replace", "path": "/n", "value": 2},
        {"op": "add", "path": "/list/-", "value": 2},
    ]
    assert {operation["op"] for operation in last["patch"]} == {"remove", "add"}
    states = [json.loads(verb.state) for verb in run.emitted if verb.state]
    assert states == [{"n": 2, "list": [1, 2]}, {"only": {"deep": True}}]
    assert run.end["outcome"] == "success"


async def test_state_that_is_changed_in_a_tool_is_appended_before_its_completion(
    serve: Serve,
) -> None:
    async def analyst(run: Run) -> None:
        async def tool() -> None:
            run.state["seen"] = True

        await run.tool("q", {}, tool)

    async with serve(analyst) as host:
        run = await host.run()
    assert run.types == ["tool_executing", "state_delta", "tool_completed"]


async def test_state_that_is_not_json_fails_the_run(serve: Serve) -> None:
    async def analyst(run: Run) -> None:
        run.state["x"] = {1, 2}

    async with serve(analyst) as host:
        run = await host.run()
    assert run.end["outcome"] == "failed" and run.end["error"]["type"] == "TypeError"
    assert "the state is not JSON at ['x']" in run.end["error"]["message"]
    assert run.types == []


async def test_what_the_manager_gave_is_never_changed_by_an_agent(serve: Serve) -> None:
    async def vandal(run: Run) -> None:
        run.state["a"].append(1)
        run.messages[0]["content"].append("forged")
        run.messages.append({"role": "user"})
        run.input.parts[0]["text"] = "forged"

    state: dict[str, Any] = {"a": []}
    content = [{"type": "text", "text": "original"}]
    messages = ({"role": "user", "content": content, "run_id": "r"},)
    async with serve(vandal) as host:
        run = await host.run(content, state=state, messages=messages)
    assert run.end["outcome"] == "success", run.end
    assert state == {"a": []} and content == [{"type": "text", "text": "original"}]
    assert len(messages) == 1


async def test_agents_are_chosen_by_name_and_the_first_is_the_default(serve: Serve) -> None:
    @agent("first")
    async def one(run: Run) -> str:
        return "one"

    @agent("second")
    async def two(run: Run) -> str:
        return "two"

    async with serve(one, two) as host:
        assert (await host.run()).end["response"] == "one"
        assert (await host.run(agent="second")).end["response"] == "two"
        unknown = (await host.run(agent="third")).end
    assert unknown["outcome"] == "failed" and unknown["error"]["type"] == "LookupError"


async def test_the_finish_is_the_last_verb_and_verbs_have_no_gaps(serve: Serve) -> None:
    async def analyst(run: Run) -> None:
        for _ in range(200):
            await run.think("x")

    async with serve(analyst) as host:
        run = await host.run()
    assert len(run.verbs) == 201 and isinstance(run.verbs[-1], FinishRun)
    kinds = {verb.type for verb in run.verbs if isinstance(verb, EmitEvent)}
    assert kinds == {EventType.AGENT_THINKING}
