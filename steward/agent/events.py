"""What one execution of a run says, shows and changes: verbs in, events out, in order.

`EventRecorder` makes message ids, keeps the text of the answer and notices changes of the
state. In a later attempt it asks `Replay` first, and what an earlier one has stored is not
put again. `Recorder` adds tool calls and steps; no other class is made of this one.

Not here: the window of unacknowledged verbs (`RunPort`). All methods are for the loop
that runs agent code.
"""

import asyncio
from typing import Any

import orjson

from steward.agent.patch import apply, diff
from steward.agent.port import RunPort
from steward.agent.replay import CHANGES, STATE_STEP, Replay
from steward.agent.values import MAX_EVENT_BYTES, encode, fraction_of, text_of
from steward.model.kept_json import kept_json
from steward.model.verbs import EventType, RunJournal

MAX_DELTA_CHARS = 32_768
"""A longer text is said in several events."""


class EventRecorder:
    """The verbs of one execution that are an event each. `state` is the agent's to change."""

    __slots__ = (
        "_last",
        "_message",
        "_message_open",
        "_port",
        "_replay",
        "_run_id",
        "_said",
        "_said_bytes",
        "_start_state",
        "_state_text",
        "state",
    )

    def __init__(
        self,
        run_id: str,
        state: dict[str, Any],
        port: RunPort,
        journal: RunJournal | None = None,
    ) -> None:
        """`state` is the latest one that is stored; `journal` what earlier attempts have done."""
        self._run_id = run_id
        self._port = port
        self._state_text = kept_json(state)
        self._replay: Replay | None = None
        if journal is not None and (journal.events or journal.steps):
            self._replay = Replay(run_id, journal, self._state_text)
            # The attempt begins with the state that the first one saw, and changes it again.
            self._state_text = self._replay.start_state or self._state_text
        # What is still to be kept for later attempts, before the first change is.
        self._start_state = b"" if self._replay and self._replay.start_state else self._state_text
        self.state: dict[str, Any] = orjson.loads(self._state_text)
        self._said: list[str] = []
        self._said_bytes = 0
        self._message = 0
        if self._replay is not None:
            self._said.append(self._replay.text)
            self._said_bytes = len(self._replay.text.encode())
            self._message = self._replay.message
        self._message_open = False
        self._last = 0

    @property
    def said(self) -> str:
        """All text that was said so far, by this attempt and those before it: each piece once."""
        return "".join(self._said)

    async def think(
        self,
        thought: str,
        delta: bool,
        step: int | None,
        total_steps: int | None,
        progress: float | None,
    ) -> None:
        data: dict[str, Any] = {"thought": text_of(thought, "a thought"), "delta": bool(delta)}
        if step is not None:
            data["step"] = step
        if total_steps is not None:
            data["total_steps"] = total_steps
        if progress is not None:
            data["progress"] = fraction_of(progress)
        self._message_open = False
        await self._append(EventType.AGENT_THINKING, encode(data, "the thought"))

    async def say(self, piece: str) -> None:
        """One piece of the answer; nothing for an empty one."""
        text = text_of(piece, "what an agent says")
        if self._replay is not None and text and not self._replay.all_told:
            text = await self._skip_told(text, self._replay)
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

    async def _skip_told(self, text: str, replay: Replay) -> str:
        """What of `text` is new. It goes on in the stored message only as long as it is equal."""
        await self._flush_state()
        await self._port.acknowledged(0)
        skipped, differs = replay.skip(text)
        self._message_open = not differs
        return text[skipped:]

    async def progress(self, fraction: float, label: str) -> None:
        data = {"fraction": fraction_of(fraction), "label": text_of(label, "a label")}
        await self._append(EventType.PROGRESS, encode(data, "the progress"))

    async def emit(self, name: str, value: Any) -> None:
        data = {"name": text_of(name, "the name of an event"), "value": value}
        await self._append(EventType.CUSTOM, encode(data, f"event {name!r:.140}"))

    async def _settle(self) -> None:
        await self._flush_state()
        await self._port.acknowledged(self._last)

    async def _append(self, type: EventType, data: bytes, tool_call_id: str = "") -> int:
        if self.state or self._state_text != b"{}":
            await self._flush_state()
        if self._replay is not None and self._replay.met(type, data):
            await self._port.acknowledged(0)
            return self._last
        number = await self._port.append(type, data, tool_call_id)
        self._last = max(self._last, number)
        return number

    async def _flush_last_state(self, undo: bool) -> None:
        if self._replay is not None and undo:
            self._state_text = self._replay.unmet_state() or self._state_text
        await self._flush_state()

    async def _redo_changes(self, call_id: str, replay: Replay) -> None:
        """Change the state as the function of a finished call did, which is not called again."""
        await self._flush_state()
        try:
            apply(replay.changes_of(call_id), self.state)
        except (KeyError, TypeError):
            # This attempt has made another state of it: what it ends with is sent as a difference.
            return
        await self._flush_state()

    async def _flush_state(self, owner: str = "") -> None:
        """Append a change of the state, if there is one, as that of the call `owner`."""
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
        patch = made = diff(orjson.loads(before), orjson.loads(text))
        if not patch:
            return
        if self._replay is not None:
            stored = self._replay.changed(patch)
            if stored is None:
                return
            if stored:
                before = stored
                patch = diff(orjson.loads(stored), orjson.loads(text))
                if not patch:
                    return
        steps = [(STATE_STEP, self._start_state)] if self._start_state else []
        if owner:
            steps.append((f"{owner}{CHANGES}", orjson.dumps(made)))
        try:
            data = orjson.dumps({"patch": patch})
            # At once: the changes of branches must be stored in the order in which they were made.
            number = await self._port.append(EventType.STATE_DELTA, data, "", text, steps)
        except asyncio.CancelledError:
            if self._state_text is text:
                self._state_text = before
            raise
        self._start_state = b""
        self._last = max(self._last, number)
