"""A recorder on a port that is a list."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from steward.agent.port import Branch
from steward.agent.recorder import Recorder, Step
from steward.model.verbs import EventType, JournalEntry, RunJournal

pytestmark = pytest.mark.asyncio


class Port:
    """Takes everything at once. While `full`, whoever asks for room is cancelled."""

    def __init__(self) -> None:
        self.put: list[tuple[str, Any]] = []
        self.full = False

    async def append(
        self,
        type: EventType,
        data: bytes,
        tool_call_id: str = "",
        state: bytes = b"",
        steps: Sequence[tuple[str, bytes]] = (),
    ) -> int:
        if self.full:
            raise asyncio.CancelledError
        self.put.extend((step_id, json.loads(value)) for step_id, value in steps)
        self.put.append((type.value, json.loads(data)))
        return len(self.put)

    def append_now(self, type: EventType, data: bytes, tool_call_id: str = "") -> None:
        self.put.append((type.value, json.loads(data)))

    async def record_step(self, step_id: str, value: bytes) -> int:
        self.put.append((step_id, json.loads(value)))
        return len(self.put)

    async def repeat_call(self, tool_call_id: str) -> int:
        self.put.append(("repeat", tool_call_id))
        return len(self.put)

    async def acknowledged(self, number: int) -> None:
        return

    def branch(self) -> Branch:
        return Branch.ALONE

    async def in_thread(self, call: Callable[[], Any]) -> Any:
        return call()


def _journal(*patches: list[dict[str, Any]]) -> RunJournal:
    events = tuple(
        JournalEntry(EventType.STATE_DELTA, json.dumps({"patch": patch}).encode())
        for patch in patches
    )
    return RunJournal(events, {"$state": b'{"n":0}'})


async def test_a_change_that_differs_and_could_not_be_put_leads_from_what_is_stored() -> None:
    port = Port()
    stored = _journal([{"op": "replace", "path": "/n", "value": 1}])
    recorder = Recorder("r1", {"n": 1}, port, stored)
    assert recorder.state == {"n": 0}
    recorder.state["other"] = True
    port.full = True
    with pytest.raises(asyncio.CancelledError):
        await recorder.emit("x", 1)
    port.full = False
    await recorder.emit("x", 1)
    assert port.put[0] == (
        "state_delta",
        {
            "patch": [
                {"op": "replace", "path": "/n", "value": 0},
                {"op": "add", "path": "/other", "value": True},
            ]
        },
    )


async def test_what_a_failing_tool_did_to_the_state_is_appended_before_its_end() -> None:
    port = Port()
    recorder = Recorder("r1", {}, port)
    call = await recorder.open_call("t", {}, int, None, "retry", None, Branch.ALONE)
    recorder.state["x"] = 1
    await recorder.fail_call(call, LookupError("no"))
    kinds = [kind for kind, _ in port.put]
    assert kinds == ["tool_executing", "$state", "r1.t.1~state", "state_delta", "tool_completed"]


async def test_a_failing_tool_is_completed_also_when_the_state_is_no_json() -> None:
    port = Port()
    recorder = Recorder("r1", {}, port)
    call = await recorder.open_call("t", {}, int, None, "retry", None, Branch.ALONE)
    recorder.state["x"] = {1}
    await recorder.fail_call(call, LookupError("no"))
    assert [kind for kind, _ in port.put] == ["tool_executing", "tool_completed"]
    with pytest.raises(TypeError):
        await recorder.emit("x", 1)


async def test_a_failing_tool_that_is_cancelled_meanwhile_is_completed_once() -> None:
    port = Port()
    recorder = Recorder("r1", {}, port)
    call = await recorder.open_call("t", {}, int, None, "retry", None, Branch.ALONE)
    recorder.state["x"] = 1
    port.full = True
    with pytest.raises(asyncio.CancelledError):
        await recorder.fail_call(call, LookupError("no"))
    port.full = False
    await recorder.end()
    ends = [data["error"] for kind, data in port.put if kind == "tool_completed"]
    assert ends == [{"type": "LookupError", "message": "no"}]


async def test_the_steps_of_a_run_are_bounded_in_all_also_over_attempts() -> None:
    kept = {f"r.s.{number}": b'"%b"' % (b"x" * 1_000_000) for number in range(33)}
    recorder = Recorder("r", {}, Port(), RunJournal((), kept))
    step = Step("r.s.34", "s", "r.s.34")
    with pytest.raises(ValueError, match="in all"):
        await recorder.complete_step(step, "y" * 1_000_000)
    assert await recorder.complete_step(step, "small") == "small"
