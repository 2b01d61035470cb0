"""What one execution of a run has said, opened and changed: verbs in, events out, in order.

Both faces of a run, `Run` for coroutines and `BlockingRun` for plain functions, stand on
one `Recorder`. It makes call ids and message ids, keeps the text of the answer, notices
changes of the state, and sees to it that each announced tool call is completed exactly
once, also when the code is cancelled in the middle of it by its own timeout.

Not here: running functions, threads, and the window of unacknowledged verbs (`RunPort`).
All methods are for the loop that runs agent code.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from steward.agent.patch import diff
from steward.agent.port import RunPort
from steward.agent.values import MAX_EVENT_BYTES, clean_text, describe_error, encode, to_json
from steward.model.verbs import EventType

MAX_DELTA_CHARS = 32_768
"""A longer text is said in several events."""

MAX_NAME_CHARS = 128


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call that was announced by verb `announced`; `started` is on `time.monotonic()`."""

    id: str
    name: str
    announced: int
    started: float


class Recorder:
    """Turns the verbs of one execution into events. `state` is the agent's to change."""

    __slots__ = (
        "_call_ids",
        "_calls",
        "_counts",
        "_last",
        "_message",
        "_message_open",
        "_port",
        "_run_id",
        "_said",
        "_said_bytes",
        "_state_text",
        "state",
    )

    def __init__(self, run_id: str, state: dict[str, Any], port: RunPort) -> None:
        self._run_id = run_id
        self._port = port
        self._state_text = orjson.dumps(state)
        self.state: dict[str, Any] = orjson.loads(self._state_text)
        self._counts: Counter[str] = Counter()
        self._call_ids: set[str] = set()
        self._calls: dict[str, ToolCall] = {}
        self._said: list[str] = []
        self._said_bytes = 0
        self._message = 0
        self._message_open = False
        self._last = 0

    @property
    def said(self) -> str:
        """All text of the answer so far."""
        return "".join(self._said)

    async def think(
        self,
        thought: str,
        delta: bool,
        step: int | None,
        total_steps: int | None,
        progress: float | None,
    ) -> None:
        data: dict[str, Any] = {"thought": _text(thought, "a thought"), "delta": bool(delta)}
        if step is not None:
            data["step"] = step
        if total_steps is not None:
            data["total_steps"] = total_steps
        if progress is not None:
            data["progress"] = _fraction(progress)
        self._message_open = False
        await self._append(EventType.AGENT_THINKING, encode(data, "the thought"))

    async def say(self, piece: str) -> None:
        """One piece of the answer; nothing for an empty one."""
        text = _text(piece, "what an agent says")
        for begin in range(0, len(text), MAX_DELTA_CHARS):
            delta = text[begin : begin + MAX_DELTA_CHARS]
            size = len(delta) if delta.isascii() else len(delta.encode())
            if self._said_bytes + size > MAX_EVENT_BYTES:
                raise ValueError(f"the answer of a run is at most {MAX_EVENT_BYTES} bytes of text")
            if not self._message_open:
                self._message += 1
                self._message_open = True
            data = {"message_id": f"{self._run_id}.m{self._message}", "delta": delta}
            await self._append(EventType.AGENT_TEXT, orjson.dumps(data))
            self._said_bytes += size
            self._said.append(delta)

    async def progress(self, fraction: float, label: str) -> None:
        data = {"fraction": _fraction(fraction), "label": _text(label, "a label")}
        await self._append(EventType.PROGRESS, encode(data, "the progress"))

    async def emit(self, name: str, value: Any) -> None:
        data = {"name": _text(name, "the name of an event"), "value": value}
        await self._append(EventType.CUSTOM, encode(data, f"event {name!r:.140}"))

    async def open_call(
        self,
        name: str,
        args: Mapping[str, Any],
        fn: Callable[..., Any],
        call_id: str | None,
        on_crash: str,
        purpose: str | None,
    ) -> ToolCall:
        """Announce a tool call. `fn` may start after `announced(call)` returned."""
        if not isinstance(args, Mapping):
            raise TypeError(f"the arguments of tool {name!r:.140} are a dict, not {_kind(args)}")
        if not callable(fn):
            raise TypeError(f"the function of tool {name!r:.140} is not callable: {_kind(fn)}")
        if on_crash not in ("retry", "ask", "fail"):
            raise ValueError(f"on_crash is 'retry', 'ask' or 'fail', not {on_crash!r:.80}")
        arguments = encode(dict(args), f"the arguments of tool {name!r:.140}")
        data: dict[str, Any] = {
            "tool_call_id": self.next_id(name, call_id),
            "tool_name": name,
            "arguments": orjson.Fragment(arguments),
        }
        if purpose is not None:
            data["purpose"] = _text(purpose, "a purpose")
        self._message_open = False
        number = await self._append(
            EventType.TOOL_EXECUTING, orjson.dumps(data), data["tool_call_id"]
        )
        call = ToolCall(data["tool_call_id"], name, number, time.monotonic())
        self._calls[call.id] = call
        return call

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
            await self._flush_state()
        except BaseException as error:
            await self.fail_call(call, error)
            raise
        await self._complete(call, True, {"result": orjson.Fragment(result)})
        return value

    async def fail_call(self, call: ToolCall, error: BaseException) -> None:
        """Record that a call failed; returns once it is in the log, but at once when cancelled."""
        outcome = {"error": describe_error(error)}
        if not isinstance(error, asyncio.CancelledError):
            await self._complete(call, False, outcome)
        elif self._calls.pop(call.id, None) is not None:
            # The code around is being cancelled itself and must not wait for anything.
            self._port.append_now(
                EventType.TOOL_COMPLETED, _completion(call, False, outcome), call.id
            )

    async def settle(self) -> None:
        """Wait until all that the run did so far is in the log."""
        await self._flush_state()
        await self._port.acknowledged(self._last)

    async def complete_step(self, name: str, value: Any) -> Any:
        """Check a step's value; returns it as JSON reads back, once all before is in the log."""
        _, value = to_json(value, f"the result of step {name!r}")
        await self.settle()
        return value

    async def end(self) -> None:
        """End what the agent left open and append the last change of the state."""
        for call in list(self._calls.values()):
            error = {"type": "Interrupted", "message": "the run ended before this call did"}
            await self._complete(call, False, {"error": error})
        await self._flush_state()

    def next_id(self, name: str, given: str | None = None) -> str:
        """The id of the next call of this name: `<run_id>.<name>.<n>`, or the one given.

        Raises TypeError, ValueError for a name or id that can't be one, or was used before.
        """
        for value in (name, given) if given is not None else (name,):
            if not 0 < len(_text(value, "a name or call id")) <= MAX_NAME_CHARS:
                raise ValueError(f"a name or call id has 1 to {MAX_NAME_CHARS} characters")
        self._counts[name] += 1
        call_id = given if given is not None else f"{self._run_id}.{name}.{self._counts[name]}"
        if call_id in self._call_ids:
            raise ValueError(f"the tool call id {call_id!r} was used before in this run")
        self._call_ids.add(call_id)
        return call_id

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

    async def _append(self, type: EventType, data: bytes, tool_call_id: str = "") -> int:
        await self._flush_state()
        number = await self._port.append(type, data, tool_call_id)
        self._last = max(self._last, number)
        return number

    async def _flush_state(self) -> None:
        if not self.state and self._state_text == b"{}":
            return
        try:
            text = orjson.dumps(self.state)
        except TypeError:
            text = b""
        if text == self._state_text:
            return
        text = encode(self.state, "the state")
        before, self._state_text = self._state_text, text
        patch = diff(orjson.loads(before), orjson.loads(text))
        if not patch:
            return
        try:
            data = orjson.dumps({"patch": patch})
            number = await self._port.append(EventType.STATE_DELTA, data, state=text)
        except asyncio.CancelledError:
            if self._state_text is text:
                self._state_text = before
            raise
        self._last = max(self._last, number)


def _completion(call: ToolCall, success: bool, outcome: dict[str, Any]) -> bytes:
    duration_ms = round((time.monotonic() - call.started) * 1000)
    head = {"tool_call_id": call.id, "tool_name": call.name, "success": success}
    return orjson.dumps({**head, **outcome, "duration_ms": duration_ms})


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{what} is text, not {_kind(value)}")
    return clean_text(value)


def _fraction(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"a fraction is a number, not {_kind(value)}")
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise ValueError(f"a fraction is from 0 to 1, not {value}")
    return value


def _kind(value: Any) -> str:
    return type(value).__name__
