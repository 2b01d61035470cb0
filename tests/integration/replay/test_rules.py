"""What a later attempt repeats, what it does not, and what happens where it differs."""

import asyncio
import builtins
import contextlib
import logging
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steward.agent import BlockingRun, NonDeterministic, Run, RunCancelled, ToolFailed
from steward.agent.failures import recorded_error

Tell = Callable[..., Any]
QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class OwnError(Exception):
    """Known to this module, and so to the functions in it."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


def _pieces(text: str, places: list[int]) -> list[str]:
    ends = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in pairwise(ends)]


# Text.

PLACES = st.lists(st.integers(0, 60), max_size=6)


@QUICK
@given(first=PLACES, second=PLACES, cut=st.integers(0, 6))
def test_text_is_never_said_twice_however_it_is_cut_into_pieces(
    tell: Tell, first: list[int], second: list[int], cut: int
) -> None:
    text = "Süd hat am meisten verkauft, 東 am wenigsten."

    async def agent(run: Run) -> None:
        for piece in _pieces(text, first if run.attempt == 1 else second):
            await run.say(piece)

    story = tell(agent).told([cut])
    assert story.said == text == story.end["response"]
    assert {data["message_id"] for _, data in story.of("agent_text")} == {"r1.m1"}


@QUICK
@given(
    texts=st.tuples(st.text("ab", max_size=12), st.text("ab", max_size=12)),
    places=PLACES,
    cut=st.integers(0, 6),
)
def test_where_the_text_differs_a_new_message_begins_and_the_response_is_what_was_seen(
    tell: Tell, texts: tuple[str, str], places: list[int], cut: int
) -> None:
    async def agent(run: Run) -> None:
        for piece in _pieces(texts[run.attempt - 1], places):
            await run.say(piece)

    story = tell(agent).attempt(cut)
    stored = story.said
    if story.end is None:
        story.attempt()
        new = texts[1]
        pairs = enumerate(zip(stored, new, strict=False))
        equal = next((i for i, (a, b) in pairs if a != b), min(len(stored), len(new)))
        assert story.said == stored + new[equal:]
        last = story.of("agent_text")[-1][1] if story.said else {"message_id": "r1.m1"}
        differs = equal < min(len(stored), len(new))
        assert last["message_id"] == ("r1.m2" if differs else "r1.m1")
    assert story.end["response"] == story.said


def test_messages_go_on_where_they_were_and_new_ones_count_on(tell: Tell) -> None:
    async def agent(run: Run) -> None:
        await run.say("one ")
        await run.say("two ")
        await run.think("between")
        await run.say("three ")
        await run.say("four")

    whole = tell(agent).attempt()
    for cut in range(whole.committed):
        assert tell(agent).told([cut]).events == whole.events


def test_an_attempt_that_says_less_leaves_what_was_seen_in_the_response(tell: Tell) -> None:
    async def agent(run: Run) -> None:
        await run.say("a long answer" if run.attempt == 1 else "a")
        await run.progress(1)

    story = tell(agent).attempt(1).attempt()
    assert story.said == story.end["response"] == "a long answer"


# Other events.


def test_where_a_thought_differs_the_rest_of_the_thoughts_is_new(tell: Tell) -> None:
    async def agent(run: Run) -> None:
        await run.think("a")
        await run.think("b" if run.attempt == 1 else "c")
        await run.emit("x", 1)
        await run.think("d")
        await run.progress(0.5)

    story = tell(agent).attempt(4).attempt()
    thoughts = [data["thought"] for _, data in story.of("agent_thinking")]
    # The custom event was stored, and another kind: it is not sent again.
    assert thoughts == ["a", "b", "d", "c", "d"] and len(story.of("custom")) == 1


def test_pieces_of_a_thought_count_in_their_order(tell: Tell) -> None:
    async def agent(run: Run) -> None:
        for piece in "the cat" if run.attempt == 1 else "cat":
            await run.think(piece, delta=True)

    story = tell(agent).attempt(5).attempt()
    assert "".join(data["thought"] for _, data in story.of("agent_thinking")) == "the ccat"


def test_events_of_branches_may_come_in_another_order(tell: Tell) -> None:
    async def agent(run: Run) -> None:
        for name in "abc" if run.attempt == 1 else "cab":
            await run.think(name)
            await run.emit(name, {"v": [1.0]})
            await run.emit("all", name)
        await run.progress(1)

    story = tell(agent).attempt(9).attempt()
    assert len(story.events) == 10


def test_equal_events_are_swallowed_once_each(tell: Tell) -> None:
    async def agent(run: Run) -> None:
        for _ in range(5):
            await run.emit("tick", {"b": 1, "a": None})

    assert len(tell(agent).told([2, 1]).events) == 5


def test_one_and_true_are_not_the_same_value(tell: Tell) -> None:
    async def agent(run: Run) -> None:
        await run.emit("x", 1 if run.attempt == 1 else True)

    assert [data["value"] for _, data in tell(agent).attempt(1).attempt().events] == [1, True]


def test_the_thought_that_the_manager_made_is_not_in_the_way(tell: Tell) -> None:
    async def agent(run: Run) -> None:
        await run.say("x")
        await run.think("a")
        await run.think("b")

    whole = tell(agent).attempt()
    assert [type for type, _ in whole.events][:2] == ["agent_thinking", "agent_text"]
    for cut in range(whole.committed):
        assert tell(agent).told([cut]).events == whole.events


def test_a_replayed_verb_of_a_run_that_is_over_raises(tell: Tell) -> None:
    refused: list[str] = []

    async def agent(run: Run) -> None:
        verbs: dict[str, Callable[[], Any]] = {
            "think": lambda: run.think("a"),
            "say": lambda: run.say("b"),
            "tool": lambda: run.tool("t", {}, int),
            "step": lambda: run.step("s", int),
        }
        if run.attempt == 1:
            for verb in verbs.values():
                await verb()
        await run.emit("crash here", run.attempt)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            for name, verb in verbs.items():
                try:
                    await verb()
                except RunCancelled:
                    refused.append(name)
            raise

    story = tell(agent).attempt(5)
    refused.clear()
    story.attempt(0)
    assert refused == ["think", "say", "tool", "step"]


# Tools.


def test_a_call_in_flight_is_announced_again_and_then_repeated_under_its_id(tell: Tell) -> None:
    ran: list[int] = []

    async def agent(run: Run) -> str:
        return str(await run.tool("send", {"to": "x"}, lambda to: ran.append(run.attempt)))

    story = tell(agent).attempt(1)
    assert [type for type, _ in story.events] == ["agent_thinking", "tool_executing"]
    ran.clear()
    story.attempt(0)
    assert ran == [] and story.repeated == [], "it started before its intent was renewed"
    story.attempt()
    assert ran == [3] and story.repeated == ["r1.send.1"]
    assert [type for type, _ in story.events][1:] == ["tool_executing", "tool_completed"]
    assert story.end["outcome"] == "success"


@pytest.mark.parametrize("on_crash", ["fail", "ask"])
def test_a_call_in_flight_that_must_not_be_repeated_fails(tell: Tell, on_crash: Any) -> None:
    ran: list[int] = []

    async def agent(run: Run) -> str:
        try:
            await run.tool("send", {}, lambda: ran.append(run.attempt), on_crash=on_crash)
        except ToolFailed as lost:
            await run.think("lost")
            return f"{type(lost).__name__} {lost.type}: {lost}"
        return "sent"

    story = tell(agent).attempt(1).attempt(2).attempt()
    assert 2 not in ran and 3 not in ran and story.repeated == []
    assert story.end["response"].startswith("CallLost CallLost: the node was lost while this call")
    assert f"on_crash='{on_crash}'" in story.end["response"]
    assert ("asking the user comes later" in story.end["response"]) == (on_crash == "ask")
    completed = story.of("tool_completed")[0][1]
    assert completed["success"] is False and completed["error"]["type"] == "CallLost"
    assert len(story.of("tool_completed")) == 1 == len(story.of("agent_thinking")) - 1


def _raises_own() -> None:
    raise OwnError(7, "no")


def _raises_key() -> None:
    raise KeyError("k")


async def _raises_timeout() -> None:
    raise TimeoutError


@pytest.mark.parametrize(
    ("tool", "caught"),
    [(_raises_own, OwnError), (_raises_key, KeyError), (_raises_timeout, TimeoutError)],
)
@pytest.mark.parametrize("kind", ["coroutine", "plain"])
def test_a_recorded_error_is_caught_as_the_first_one_was(
    tell: Tell, tool: Any, caught: type[Exception], kind: str
) -> None:
    async def agent(run: Run) -> str:
        try:
            await run.tool("t", {}, tool)
        except caught as error:
            await run.progress(1)
            return f"{type(error).__name__} {error}"
        return "nothing raised"

    def plain(run: BlockingRun) -> str:
        try:
            run.tool("t", {}, tool)
        except caught as error:
            run.progress(1)
            return f"{type(error).__name__} {error}"
        return "nothing raised"

    function = agent if kind == "coroutine" else plain
    whole = tell(function).attempt()
    assert tell(function).attempt(2).attempt().end == whole.end


ERRORS = [
    value
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, BaseException) and value.__name__ == name
]


@pytest.mark.parametrize("original", ERRORS)
def test_any_error_of_python_can_be_raised_again(original: type[BaseException]) -> None:
    name = original.__name__
    error = recorded_error(name, "the message", _raises_own)
    assert type(error).__name__ == name and str(error) == error.message == "the message"
    assert isinstance(error, ToolFailed) and error.type == name
    # The others pass through what catches exceptions, or can't be made without their parts.
    same = issubclass(original, Exception) and not issubclass(original, BaseExceptionGroup)
    assert isinstance(error, original) or not same
    with pytest.raises(ToolFailed):
        raise error


def test_an_error_of_an_unknown_class_is_tool_failed_and_ends_the_run_the_same(tell: Tell) -> None:
    async def agent(run: Run) -> None:
        class Local(Exception):
            pass

        def fails() -> None:
            raise Local("gone")

        await run.tool("t", {}, fails)

    whole = tell(agent).attempt()
    assert whole.end["error"] == {"type": "Local", "message": "gone"}
    assert tell(agent).attempt(2).attempt().end == whole.end


@pytest.mark.parametrize("call_id", [None, "model-1"])
def test_other_arguments_under_the_same_id_are_an_error(tell: Tell, call_id: Any) -> None:
    ran: list[int] = []

    async def agent(run: Run) -> None:
        await run.tool("t", {"n": run.attempt}, lambda n: ran.append(n), id=call_id)
        await run.progress(1)

    story = tell(agent).attempt(2).attempt()
    assert ran == [1]
    assert story.end["error"]["type"] == NonDeterministic.__name__
    assert f"{call_id or 'r1.t.1'}' had" in story.end["error"]["message"] or call_id
    assert "run.step" in story.end["error"]["message"]
    assert len(story.of("tool_executing")) == 1


def test_a_call_of_another_tool_is_new_and_what_does_not_come_again_is_logged(
    tell: Tell, caplog: pytest.LogCaptureFixture
) -> None:
    async def agent(run: Run) -> None:
        await run.tool(f"t{run.attempt}", {}, int)
        await run.progress(1)

    with caplog.at_level(logging.WARNING):
        story = tell(agent).attempt(2).attempt()
    ids = [data["tool_call_id"] for _, data in story.of("tool_completed")]
    assert ids == ["r1.t1.1", "r1.t2.1"] and story.end["outcome"] == "success"
    assert "r1.t1.1" in caplog.text


def test_calls_of_other_names_and_given_ids_are_not_taken_for_a_call(tell: Tell) -> None:
    ran: list[str] = []

    async def agent(run: Run) -> None:
        if run.attempt == 1:
            await run.tool("a.b", {}, lambda: ran.append("a.b"))
            await run.tool("a", {}, lambda: ran.append("given"), id="model-7")
        await run.tool("a", {}, lambda: ran.append(f"a {run.attempt}"))

    story = tell(agent).attempt(4).attempt()
    assert ran[-1] == "a 2" and len(story.of("tool_completed")) == 3


def test_a_given_id_of_another_tool_is_an_error(tell: Tell) -> None:
    async def agent(run: Run) -> None:
        await run.tool(f"t{run.attempt}", {}, int, id="model-7")
        await run.progress(1)

    story = tell(agent).attempt(2).attempt()
    assert story.end["error"]["type"] == NonDeterministic.__name__
    assert "'t1'" in story.end["error"]["message"]


def test_nothing_is_logged_when_all_calls_come_again(
    tell: Tell, caplog: pytest.LogCaptureFixture
) -> None:
    async def agent(run: Run) -> None:
        for n in (1, 1, 2):
            await run.tool("t", {"n": n}, lambda n: n)

    with caplog.at_level(logging.WARNING):
        assert tell(agent).attempt(5).attempt().end["outcome"] == "success"
    assert caplog.text == ""


@pytest.mark.parametrize("where", ["task", "agent itself"])
def test_a_call_of_a_branch_that_comes_before_a_stored_one_is_a_new_one(
    tell: Tell, where: str
) -> None:
    ran: list[str] = []

    async def agent(run: Run) -> dict[str, Any]:
        async def branch(name: str, wait_s: float) -> str:
            await asyncio.sleep(wait_s)
            return str(await run.tool("t", {"name": name}, tool))

        order = ("ab", "ba")[run.attempt - 1]
        waits = {name: 0.005 + 0.02 * place for place, name in enumerate(order)}
        background = asyncio.ensure_future(branch("a", waits["a"]))
        task: Any = branch("b", waits["b"])
        b = await (asyncio.ensure_future(task) if where == "task" else task)
        return {"a": await background, "b": b}

    def tool(name: str) -> str:
        ran.append(name)
        return name * 2

    story = tell(agent).attempt(2).attempt()
    assert story.end["result"] == {"a": "aa", "b": "bb"} and ran == ["a", "b"]
    ids = {
        data["arguments"]["name"]: data["tool_call_id"] for _, data in story.of("tool_executing")
    }
    assert ids == {"a": "r1.t.1", "b": "r1.t.2"}


def test_a_call_that_a_sibling_cut_short_is_cut_short_again(tell: Tell) -> None:
    ran: list[str] = []

    async def slow() -> None:
        ran.append("slow")
        await asyncio.Event().wait()

    async def quick() -> str:
        ran.append("quick")
        await asyncio.sleep(0.005)
        return "quick"

    async def agent(run: Run) -> str:
        tasks = [
            asyncio.ensure_future(run.tool("slow", {}, slow)),
            asyncio.ensure_future(run.tool("quick", {}, quick)),
        ]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.wait(pending)
        await run.progress(1)
        return str([task.result() for task in done])

    whole = tell(agent).attempt()
    ran.clear()
    story = tell(agent).attempt(4).attempt()
    assert story.end == whole.end and story.events == whole.events and len(ran) == 2


def test_a_tool_that_cancels_itself_does_not_hang_the_next_attempt(tell: Tell) -> None:
    async def cancels() -> None:
        raise asyncio.CancelledError

    async def agent(run: Run) -> str:
        try:
            await run.tool("t", {}, cancels)
        except (asyncio.CancelledError, ToolFailed):
            await run.progress(1)
        return "on"

    assert tell(agent).attempt(2).attempt().end["response"] == "on"


# Steps.


def test_a_finished_step_returns_its_value_and_is_not_repeated(tell: Tell) -> None:
    ran: list[int] = []

    def make(n: int) -> tuple[int, None]:
        ran.append(n)
        return n, None

    async def agent(run: Run) -> dict[str, Any]:
        values = [await run.step("make", make, n) for n in range(3)]
        assert all(isinstance(value, list) for value in values)
        return {"values": values}

    story = tell(agent).told([2])
    assert ran.count(0) == ran.count(1) == 1 and len(ran) <= 4
    assert story.end["result"] == {"values": [[0, None], [1, None], [2, None]]}
    assert story.steps == {
        f"r1.make.{n + 1}": value for n, value in enumerate([b"[0,null]", b"[1,null]", b"[2,null]"])
    }


def test_a_step_that_raised_or_gave_no_json_is_done_again(tell: Tell) -> None:
    ran: list[int] = []

    async def agent(run: Run) -> str:
        def make() -> Any:
            ran.append(run.attempt)
            if run.attempt == 1:
                raise LookupError("not yet")
            return object() if run.attempt == 2 else "x" * 2_000_000 if run.attempt == 3 else "ok"

        try:
            value = await run.step("make", make)
        except (LookupError, TypeError, ValueError) as error:
            await run.emit("error", type(error).__name__)
            await run.progress(1)
            return "failed"
        return str(value)

    story = tell(agent).attempt(1).attempt(1).attempt(1).attempt()
    assert ran == [1, 2, 3, 4] and story.end["response"] == "ok"
    assert [data["value"] for _, data in story.of("custom")] == [
        "LookupError",
        "TypeError",
        "ValueError",
    ]


def test_a_step_that_failed_does_not_get_the_value_of_the_next_one(tell: Tell) -> None:
    async def agent(run: Run) -> dict[str, Any]:
        def make(n: int) -> str:
            if n == 0 and run.attempt == 1:
                raise LookupError
            return f"value {n}"

        values = []
        for n in range(2):
            try:
                values.append(await run.step("make", make, n))
            except LookupError:
                values.append("failed")
        await run.progress(1)
        return {"values": values}

    story = tell(agent).attempt(1)
    assert story.steps == {"r1.make.2": b'"value 1"'}
    assert story.attempt().end["result"] == {"values": ["value 0", "value 1"]}


def test_equal_steps_of_branches_have_a_value_each(tell: Tell) -> None:
    async def agent(run: Run) -> dict[str, Any]:
        drawn = iter((1, 2) if run.attempt == 1 else (3, 4))

        async def branch() -> Any:
            return await run.step("draw", lambda: next(drawn))

        values = await asyncio.gather(branch(), branch())
        await run.progress(1)
        return {"values": sorted(values)}

    story = tell(agent).attempt(2)
    assert len(story.steps) == 2 and all("#" in step_id for step_id in story.steps)
    assert story.attempt().end["result"] == {"values": [1, 2]}


@pytest.mark.parametrize("stored", [1, 2])
def test_threads_of_a_plain_agent_never_get_each_others_steps(tell: Tell, stored: int) -> None:
    def agent(run: BlockingRun) -> dict[str, Any]:
        main_done, other_done = threading.Event(), threading.Event()
        values: dict[str, str] = {}

        def other() -> None:
            if run.attempt == 1:
                assert main_done.wait(5)
            with contextlib.suppress(RunCancelled):
                values["other"] = run.step("make", make, "other")
            other_done.set()

        def make(name: str) -> str:
            return f"{name} of attempt {run.attempt}"

        thread = threading.Thread(target=other)
        thread.start()
        if run.attempt == 2:
            assert other_done.wait(5)
        try:
            values["main"] = run.step("make", make, "main")
        finally:
            main_done.set()
            thread.join()
        run.progress(1)
        return values

    story = tell(agent).attempt(stored)
    assert len(story.steps) == stored
    assert story.attempt().end["result"] == {
        "main": "main of attempt 1",
        "other": f"other of attempt {1 if stored == 2 else 2}",
    }


def test_a_step_returns_only_after_its_value_is_in_the_log(tell: Tell) -> None:
    went_on: list[int] = []

    async def agent(run: Run) -> None:
        await run.step("make", int)
        went_on.append(run.attempt)

    story = tell(agent).attempt(0)
    assert went_on == [] and story.steps == {}
    assert story.attempt().end["outcome"] == "success"


def test_a_step_and_a_tool_of_one_name_count_together(tell: Tell) -> None:
    async def agent(run: Run) -> dict[str, Any]:
        first = await run.tool("x", {"n": 1}, lambda n: n)
        second = await run.step("x", lambda: 2)
        third = await run.tool("x", {"n": 3}, lambda n: n)
        return {"values": [first, second, third]}

    whole = tell(agent).attempt()
    assert list(whole.steps) == ["r1.x.2"]
    for cut in range(whole.committed):
        story = tell(agent).told([cut])
        assert story.events == whole.events and story.end == whole.end


# State.


def test_the_state_a_run_began_with_is_kept_once_and_before_its_first_change(tell: Tell) -> None:
    async def agent(run: Run) -> str:
        before = run.state["n"]
        run.state["n"] += 1
        await run.think("counted")
        run.state["n"] += 1
        await run.think("again")
        return f"from {before} to {run.state['n']}"

    assert tell(agent, state={"n": 5}).attempt().recorded == ["$state"]
    for cut in range(6):
        story = tell(agent, state={"n": 5}).told([cut, 1])
        assert story.recorded == ["$state"]
        assert story.end["response"] == "from 5 to 7" and story.state == {"n": 7}
        assert story.steps == {"$state": b'{"n":5}'}
        patches = [data["patch"] for _, data in story.of("state_delta")]
        assert [patch[0]["value"] for patch in patches] == [6, 7]


def test_a_run_that_changes_nothing_keeps_nothing(tell: Tell) -> None:
    async def agent(run: Run) -> None:
        await run.think(str(run.state))

    assert tell(agent, state={"n": 5}).attempt().steps == {}


def test_where_the_state_differs_the_change_leads_from_what_is_stored(tell: Tell) -> None:
    async def agent(run: Run) -> None:
        run.state["mine"] = run.attempt
        await run.think("a")
        if run.attempt == 1:
            run.state["only first"] = True
        await run.think("b")
        await run.progress(1)

    story = tell(agent, state={"n": 0}).attempt(5)
    assert story.state == {"n": 0, "mine": 1, "only first": True}
    story.attempt()
    assert story.state == {"n": 0, "mine": 2}
    patch = story.of("state_delta")[-1][1]["patch"]
    assert patch == [
        {"op": "remove", "path": "/only first"},
        {"op": "replace", "path": "/mine", "value": 2},
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_changes_that_are_not_made_again_are_undone_unless_the_run_failed(
    tell: Tell, fails: bool
) -> None:
    async def agent(run: Run) -> None:
        if run.attempt == 1:
            run.state["n"] += 1
        await run.think("a")
        if run.attempt == 2 and fails:
            raise LookupError("before it came to that")
        await run.progress(1)

    story = tell(agent, state={"n": 0}).attempt(3).attempt()
    assert story.state == {"n": 1 if fails else 0}
