"""What earlier attempts of a run have stored, and how much of it the new attempt has met again.

An agent is called anew after a crash and asks for the same things again. Whatever is in
the journal is then not done and not sent a second time. The rules, kind by kind:

- **Text** is one stream of characters over all messages, however it is cut into pieces:
  an equal prefix is skipped, from the first difference on everything is new.
- **Delta thoughts** are met in order. **Other events** (thoughts, progress, and custom
  events of each name apart) may come in any order, since branches of an agent may: each
  stored one stands for one equal event. The first that is not there ends its kind: from then
  on every one of that kind is new.
- **Tool calls** are found by name and arguments, **steps** by their number among the calls
  of their name; those that were made while branches ran, by their arguments.
- **Changes of the state** are met in order; the first that differs ends it.

So an agent that does the same repeats nothing; one whose branches overlap may repeat an
event; and a stored result is never made twice. Pure: nothing here waits or sends.
"""

import hashlib
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from steward.agent.failures import raise_non_deterministic
from steward.agent.port import Branch
from steward.model.verbs import EventType, RunJournal

STATE_STEP = "$state"
"""The step that keeps the state which a run began with, recorded before its first change."""

CHANGES = "~state"
"""Ends the id of a step that keeps how a call or step, named before it, changed the state."""

_STEP_ID = re.compile(r"(?s)(.*)\.(\d+)(?:#([0-9a-f]{16}))?")


@dataclass(frozen=True, slots=True)
class StoredCall:
    """A tool call that was announced. `arguments` is canonical JSON; `completion` the `data` of
    its tool_completed, None for a call that was in flight.
    """

    id: str
    name: str
    arguments: bytes
    completion: Mapping[str, Any] | None


class StoredStep(NamedTuple):
    """A finished step: its id, the JSON of its value, and the mark of its arguments or ''."""

    id: str
    number: int
    value: bytes
    mark: str


class Replay:
    """The journal of one run, consumed by the attempt that it was given to."""

    __slots__ = (
        "_calls",
        "_changes",
        "_events",
        "_latest_state",
        "_patches",
        "_run_id",
        "_steps",
        "_stored_ids",
        "_told",
        "message",
        "start_state",
        "text",
    )

    def __init__(self, run_id: str, journal: RunJournal, latest_state: bytes) -> None:
        """`latest_state` is the stored state of the user, as JSON text."""
        self._run_id = run_id
        self._latest_state = latest_state
        self._events: dict[str, deque[bytes]] = {}
        self._calls: dict[str, StoredCall] = {}
        self._steps: dict[str, list[StoredStep]] = {}
        self._patches: deque[bytes] = deque()
        self._told = 0
        self.text = ""
        """All text that was said."""
        self.message = 0
        """The highest number of a message that was said."""
        self.start_state = journal.steps.get(STATE_STEP)
        """The state that the first attempt began with, as JSON; None if no change was stored."""
        self._read_events(journal)
        self._changes: dict[str, bytes] = {}
        for key, value in journal.steps.items():
            if key.endswith(CHANGES):
                self._changes[key.removesuffix(CHANGES)] = value
            match = _STEP_ID.fullmatch(key)
            if match is not None:
                step = StoredStep(f"{match[1]}.{match[2]}", int(match[2]), value, match[3] or "")
                self._steps.setdefault(match[1], []).append(step)
        for steps in self._steps.values():
            steps.sort(key=lambda step: step.number)
        self._stored_ids = self._calls.keys() | {
            step.id for steps in self._steps.values() for step in steps
        }

    def _read_events(self, journal: RunJournal) -> None:
        completions: dict[str, Any] = {}
        announced: list[dict[str, Any]] = []
        said: list[str] = []
        for type, text in journal.events:
            data = orjson.loads(text)
            match type:
                case EventType.AGENT_TEXT:
                    said.append(data["delta"])
                    number = data["message_id"].rpartition(".m")[2]
                    self.message = max(self.message, int(number))
                case EventType.TOOL_EXECUTING:
                    announced.append(data)
                case EventType.TOOL_COMPLETED:
                    completions[data["tool_call_id"]] = data
                case EventType.STATE_DELTA:
                    self._patches.append(canonical(data["patch"]))
                case _:
                    self._events.setdefault(_stream(type, data), deque()).append(canonical(data))
        self.text = "".join(said)
        for data in announced:
            id = data["tool_call_id"]
            arguments = canonical(data["arguments"])
            self._calls[id] = StoredCall(id, data["tool_name"], arguments, completions.get(id))

    # Events, text, and changes of the state.

    def met(self, type: EventType, text: bytes) -> bool:
        """Whether an equal event is stored; it is then met."""
        if not self._events:
            return False
        data = orjson.loads(text)
        stream = _stream(type, data)
        left = self._events.get(stream)
        if not left:
            return False
        event = canonical(data)
        found = event in left if stream != _DELTAS else left[0] == event
        if found:
            left.remove(event)
        else:
            left.clear()
        if not left:
            del self._events[stream]
        return found

    def skip(self, piece: str) -> tuple[int, bool]:
        """How many characters of `piece` are stored, and whether it differs after them."""
        begin = self._told
        left = len(self.text) - begin
        if self.text.startswith(piece[:left], begin):
            count = min(left, len(piece))
            self._told += count
            return count, False
        count = next(i for i, char in enumerate(piece) if char != self.text[begin + i])
        self._told = len(self.text)
        return count, True

    @property
    def all_told(self) -> bool:
        """Whether what is said now is new."""
        return self._told == len(self.text)

    def changed(self, patch: list[dict[str, Any]]) -> bytes | None:
        """None when this change of the state is stored; else the state to which it is new.

        That is `b""` when every stored change was met, for whatever the agent had before.
        """
        if not self._patches:
            return b""
        if self._patches[0] == canonical(patch):
            self._patches.popleft()
            return None
        self._patches.clear()
        return self._latest_state

    def changes_of(self, call_id: str) -> list[dict[str, Any]]:
        """The patch by which a finished call or step has changed the state."""
        patch: list[dict[str, Any]] = orjson.loads(self._changes.get(call_id, b"[]"))
        return patch

    def unmet_state(self) -> bytes | None:
        """The stored state, if it holds changes that were not met; None otherwise."""
        if not self._patches:
            return None
        self._patches.clear()
        return self._latest_state

    # Calls and steps.

    def knows(self, call_id: str) -> bool:
        """Whether an earlier attempt has used this id, met or not."""
        return call_id in self._stored_ids

    def call(
        self, name: str, own_id: str, given: bool, arguments: bytes, branch: Branch
    ) -> StoredCall | None:
        """The stored call that this one is, met with that; None for a new one.

        `own_id` is the one given by the author, or that of the n-th call of the name. Raises
        NonDeterministic when it was used for something else; but while there are other branches,
        an id that was not given may be theirs, and the call is a new one.
        """
        if not self._calls:
            return None
        wanted = canonical(orjson.loads(arguments))
        stored = self._calls.get(own_id)
        if not (stored and stored.name == name and stored.arguments == wanted):
            if given and stored is not None:
                raise_non_deterministic(
                    f"the tool call {own_id!r} was {stored.name!r} with other arguments"
                )
            if given:
                return None
            own_ids = f"{self._run_id}.{name}."
            equal = (
                call
                for call in self._calls.values()
                if call.arguments == wanted and call.id.startswith(own_ids) and call.name == name
            )
            other = next(equal, None)
            if other is None and stored is not None and branch is Branch.ALONE:
                raise_non_deterministic(f"the tool call {own_id!r} had other arguments")
            stored = other
        if stored is not None:
            del self._calls[stored.id]
        return stored

    def step(self, name: str, own_number: int, mark: str, branch: Branch) -> StoredStep | None:
        """The finished step that this one is, met with that; None for one to be done.

        A step with a mark is that of equal arguments. One without was made in the agent's own task
        or thread: it is the n-th of its name, or the first that is left when others count too.
        """
        steps = self._steps.get(f"{self._run_id}.{name}", [])
        found = next((step for step in steps if step.mark == mark), None)
        if found is None and branch is not Branch.OTHER:
            unmarked = [step for step in steps if not step.mark]
            found = next((step for step in unmarked if step.number == own_number), None)
            if found is None and unmarked and branch is Branch.MAIN:
                found = unmarked[0]
        if found is not None:
            steps.remove(found)
        return found

    @property
    def unmet_calls(self) -> list[str]:
        """Ids of the stored tool calls that did not come again so far."""
        return list(self._calls)


def canonical(value: Any) -> bytes:
    """A JSON value as text that is the same for equal values; 1, 1.0 and true differ."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def mark_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """16 hex digits that are equal for equal arguments, also in another process.

    What is not JSON counts by its type alone.
    """
    values = {"args": args, "kwargs": dict(kwargs)}
    try:
        text = orjson.dumps(
            values,
            option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS,
            default=lambda value: type(value).__qualname__,
        )
    except TypeError:
        text = orjson.dumps([type(value).__qualname__ for value in (*args, *kwargs.values())])
    return hashlib.sha256(text).hexdigest()[:16]


_DELTAS = "deltas"


def _stream(type: EventType, data: Mapping[str, Any]) -> str:
    if type is EventType.AGENT_THINKING and data["delta"]:
        return _DELTAS
    if type is EventType.CUSTOM:
        return f"{type.value} {data['name']}"
    return type.value
