"""What one execution of a run has opened: tool calls and steps, each with its one end.

Both faces of a run, `Run` for coroutines and `BlockingRun` for plain functions, stand on
one `Recorder`. It makes call ids and sees to it that each announced tool call is completed
exactly once, also when the code is cancelled in the middle of it by its own timeout. In a later
attempt a call or step that an earlier one has completed is answered from the journal.

Not here: running functions, and threads. All methods are for the loop that runs agent code.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from steward.agent.events import EventRecorder
from steward.agent.failures import recorded_error
from steward.agent.port import Branch, RunPort
from steward.agent.replay import StoredStep, mark_of
from steward.agent.values import describe_error, encode, kind_of, text_of, to_json
from steward.model.verbs import EventType, RunJournal

MAX_NAME_CHARS = 128
MAX_STEPS_BYTES = 32 * 1024 * 1024

GIVEN_UP = {"type": "CancelledError", "message": "the agent gave this call up"}
LEFT_OPEN = {"type": "Interrupted", "message": "the run ended before this call did"}
LOST = "CallLost"
"""Error type of a call that was in flight when its node was lost, and is not to be repeated."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call that was announced by verb `announced`; `started` is on `time.monotonic()`.

    `completion` is what an earlier attempt has recorded: then the tool does not run.
    """

    id: str
    name: str
    announced: int
    started: float
    completion: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A step that has begun, or that an earlier attempt has `finished`.

    `key` is what its value is kept under: the id, and in a branch the mark of its arguments.
    """

    id: str
    name: str
    key: str = ""
    finished: StoredStep | None = None


class Recorder(EventRecorder):
    """Turns all verbs of one execution into events and records."""

    __slots__ = ("_call_ids", "_calls", "_counts", "_kept")

    def __init__(
        self,
        run_id: str,
        state: dict[str, Any],
        port: RunPort,
        journal: RunJournal | None = None,
    ) -> None:
        super().__init__(run_id, state, port, journal)
        self._counts: Counter[str] = Counter()
        self._call_ids: set[str] = set()
        self._calls: dict[str, ToolCall] = {}
        # Bytes of the steps that are kept: a later attempt gets all of them at once.
        self._kept = sum(map(len, journal.steps.values())) if journal is not None else 0

    @property
    def unmet_calls(self) -> list[str]:
        """Ids of stored tool calls for which this attempt did not ask again."""
        return self._replay.unmet_calls if self._replay is not None else []

    async def open_call(
        self,
        name: str,
        args: Mapping[str, Any],
        fn: Callable[..., Any],
        call_id: str | None,
        on_crash: str,
        purpose: str | None,
        branch: Branch,
    ) -> ToolCall:
        """Announce a tool call. `fn` may start after `announced(call)` returned.

        One that an earlier attempt has completed comes with its `completion` and must not start;
        one that was in flight then is announced once more, or completed and raised as failed.
        """
        if not isinstance(args, Mapping):
            raise TypeError(f"the arguments of tool {name!r:.140} are a dict, not {kind_of(args)}")
        if not callable(fn):
            raise TypeError(f"the function of tool {name!r:.140} is not callable: {kind_of(fn)}")
        if on_crash not in ("retry", "ask", "fail"):
            raise ValueError(f"on_crash is 'retry', 'ask' or 'fail', not {on_crash!r:.80}")
        arguments = encode(dict(args), f"the arguments of tool {name!r:.140}")
        _check_name(name)
        if call_id is not None:
            _check_name(call_id)
        if purpose is not None:
            purpose = text_of(purpose, "a purpose")
        self._message_open = False
        call = await self._stored_call(name, arguments, fn, call_id, on_crash, branch)
        if call is not None:
            return call
        data: dict[str, Any] = {
            "tool_call_id": self._new_id(name, call_id),
            "tool_name": name,
            "arguments": orjson.Fragment(arguments),
        }
        if purpose is not None:
            data["purpose"] = purpose
        number = await self._append(
            EventType.TOOL_EXECUTING, orjson.dumps(data), data["tool_call_id"]
        )
        return self._open(ToolCall(data["tool_call_id"], name, number, time.monotonic()))

    async def _stored_call(
        self,
        name: str,
        arguments: bytes,
        fn: Callable[..., Any],
        call_id: str | None,
        on_crash: str,
        branch: Branch,
    ) -> ToolCall | None:
        """The call as an earlier attempt left it: completed, or announced once more."""
        self._counts[name] += 1
        if self._replay is None:
            return None
        own_id = call_id or f"{self._run_id}.{name}.{self._counts[name]}"
        if call_id in self._call_ids:
            return None
        stored = self._replay.call(name, own_id, call_id is not None, arguments, branch)
        if stored is None:
            return None
        self._call_ids.add(stored.id)
        if stored.completion is not None:
            await self._redo_changes(stored.id, self._replay)
            return ToolCall(stored.id, name, 0, time.monotonic(), stored.completion)
        await self._flush_state()
        if on_crash == "retry":
            number = await self._port.repeat_call(stored.id)
            self._last = max(self._last, number)
            return self._open(ToolCall(stored.id, name, number, time.monotonic()))
        call = self._open(ToolCall(stored.id, name, 0, time.monotonic()))
        asked = "; asking the user comes later" if on_crash == "ask" else ""
        message = (
            f"the node was lost while this call ran, and whether it took effect is not known "
            f"(on_crash={on_crash!r}{asked})"
        )
        await self._complete(call, False, {"error": {"type": LOST, "message": message}})
        raise recorded_error(LOST, message, fn)

    async def repeat_completion(self, call: ToolCall, fn: Callable[..., Any]) -> Any:
        """What a call of an earlier attempt has returned; raises what it raised.

        A call that the agent itself cut short (a timeout, a sibling that won) waits to be cut
        short again.
        """
        completion = call.completion
        assert completion is not None
        await self._port.acknowledged(0)
        if completion["success"]:
            return completion["result"]
        error = completion["error"]
        if error in (GIVEN_UP, LEFT_OPEN):
            await asyncio.get_running_loop().create_future()
        raise recorded_error(error["type"], error["message"], fn)

    async def announced(self, call: ToolCall) -> None:
        """Wait until the announcement is in the log."""
        await self._port.acknowledged(call.announced)

    async def complete_call(self, call: ToolCall, value: Any) -> Any:
        """Record the value of a call; returns it as JSON reads back, once it is in the log.

        Raises TypeError or ValueError for a value (or a state) that can't be kept, recorded as
        the failure of the call.
        """
        try:
            result, value = to_json(value, f"the result of tool {call.name!r}")
            await self._flush_state(call.id)
        except BaseException as error:
            await self.fail_call(call, error)
            raise
        await self._complete(call, True, {"result": orjson.Fragment(result)})
        return value

    async def fail_call(self, call: ToolCall, error: BaseException) -> None:
        """Record that a call failed; returns once it is in the log, but at once when cancelled."""
        outcome = {"error": describe_error(error)}
        if not isinstance(error, asyncio.CancelledError):
            try:
                await self._flush_state(call.id)
            except (TypeError, ValueError):
                # The state can't be kept: the next verb of the agent says so.
                pass
            except asyncio.CancelledError:
                self._complete_now(call, outcome)
                raise
            await self._complete(call, False, outcome)
        else:
            # The code around is being cancelled itself and must not wait for anything.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                # By the agent, and not by the tool from within: a later attempt must know.
                outcome = {"error": GIVEN_UP}
            self._complete_now(call, outcome)

    async def open_step(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], branch: Branch
    ) -> Step:
        """Begin a step; its function may run when this returned, unless it is `finished`.

        All that the run did before is then in the log.
        """
        _check_name(name)
        self._counts[name] += 1
        alone = branch is Branch.ALONE
        mark = "" if alone and self._replay is None else mark_of(args, kwargs)
        if self._replay is not None:
            stored = self._replay.step(name, self._counts[name], mark, branch)
            if stored is not None:
                self._call_ids.add(stored.id)
                await self._redo_changes(stored.id, self._replay)
                await self._port.acknowledged(0)
                return Step(stored.id, name, finished=stored)
        step_id = self._new_id(name, None)
        await self._settle()
        # Branches may come in another order the next time: their steps are known by arguments.
        return Step(step_id, name, step_id if alone else f"{step_id}#{mark}")

    async def complete_step(self, step: Step, value: Any) -> Any:
        """Keep the value of a step; returns it as JSON reads back, once it is in the log.

        Raises TypeError, ValueError for a value that can't be kept: the step did not finish.
        """
        text, value = to_json(value, f"the result of step {step.name!r}")
        if self._kept + len(text) > MAX_STEPS_BYTES:
            raise ValueError(f"the steps of a run keep at most {MAX_STEPS_BYTES} bytes in all")
        self._kept += len(text)
        await self._flush_state(step.id)
        number = await self._port.record_step(step.key, text)
        self._last = max(self._last, number)
        await self._port.acknowledged(number)
        return value

    async def end(self, *, failed: bool = False) -> None:
        """End what the agent left open and append the last change of the state.

        Changes of earlier attempts that this one did not make again are undone, but not when it
        failed: then it may not have come to them.
        """
        for call in list(self._calls.values()):
            await self._complete(call, False, {"error": LEFT_OPEN})
        await self._flush_last_state(undo=not failed)

    def _new_id(self, name: str, given: str | None) -> str:
        """The id of a call that no attempt has made: the given one, or `<run_id>.<name>.<n>`.

        Raises ValueError for a given one that was used before.
        """
        number = self._counts[name]
        call_id = given if given is not None else f"{self._run_id}.{name}.{number}"
        if given is None and self._replay is not None:
            while call_id in self._call_ids or self._replay.knows(call_id):
                number += 1
                call_id = f"{self._run_id}.{name}.{number}"
        if call_id in self._call_ids:
            raise ValueError(f"the tool call id {call_id!r} was used before in this run")
        self._call_ids.add(call_id)
        return call_id

    def _open(self, call: ToolCall) -> ToolCall:
        self._calls[call.id] = call
        return call

    def _complete_now(self, call: ToolCall, outcome: dict[str, Any]) -> None:
        if self._calls.pop(call.id, None) is not None:
            data = _completion(call, False, outcome)
            self._port.append_now(EventType.TOOL_COMPLETED, data, call.id)

    async def _complete(self, call: ToolCall, success: bool, outcome: dict[str, Any]) -> None:
        # Whoever takes the call out ends it: none is completed twice.
        if self._calls.pop(call.id, None) is None:
            return
        data = _completion(call, success, outcome)
        try:
            number = await self._port.append(EventType.TOOL_COMPLETED, data, call.id)
        except asyncio.CancelledError:
            self._port.append_now(EventType.TOOL_COMPLETED, data, call.id)
            raise
        self._last = max(self._last, number)
        await self._port.acknowledged(number)


def _completion(call: ToolCall, success: bool, outcome: dict[str, Any]) -> bytes:
    duration_ms = round((time.monotonic() - call.started) * 1000)
    head = {"tool_call_id": call.id, "tool_name": call.name, "success": success}
    return orjson.dumps({**head, **outcome, "duration_ms": duration_ms})


def _check_name(value: str) -> None:
    if not 0 < len(text_of(value, "a name or call id")) <= MAX_NAME_CHARS:
        raise ValueError(f"a name or call id has 1 to {MAX_NAME_CHARS} characters")
