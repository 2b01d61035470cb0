"""`StreamChecker`: does a recorded stream of events keep what the protocol promises?

Give it events in the order in which a client saw them, then ask for the end. It reports
every break as a `Finding`: positions and epochs, the fields that each type must have,
and the order rules 1 to 4 of `docs/wire-protocol.md`. It is pure, and cheap enough to
run beside a load test (a few microseconds an event). It does not check that two clients
saw the same bytes, nor that an answer is right; what it can't see it takes for good: of
a recording that starts in the middle it does not ask where earlier runs began.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from steward.model.verbs import EventType, Outcome

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
_TRACE = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _ordinal(value: Any) -> bool:
    return _count(value) and value >= 1


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _list(value: Any) -> bool:
    return isinstance(value, list)


def _any(_: Any) -> bool:
    return True


def _content(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(part, dict) for part in value)
    )


def _outcome(value: Any) -> bool:
    return value in tuple(Outcome)


def _rfc3339(value: Any) -> bool:
    return isinstance(value, str) and _TIME.fullmatch(value) is not None


def _traceparent(value: Any) -> bool:
    return isinstance(value, str) and _TRACE.fullmatch(value) is not None


def _merges(event: Mapping[str, Any]) -> bool:
    first, last = event["from_sequence"], event.get("sequence")
    return not (_ordinal(first) and _ordinal(last)) or first < last


@dataclass(frozen=True, slots=True)
class _Shape:
    required: Mapping[str, Check]
    optional: Mapping[str, Check] = field(default_factory=dict)


_E = EventType
_ENVELOPE = _Shape(
    {
        "type": _name,
        "stream_id": _name,
        "sequence": _ordinal,
        "epoch": _ordinal,
        "event_id": _name,
        "time": _rfc3339,
        "trace": _traceparent,
        "data": _object,
    },
    {
        "thread_id": _name,
        "run_id": _name,
        "agent": _name,
        "parent_run_id": _name,
        "from_sequence": _ordinal,
    },
)
_ERROR = _Shape({"type": _name, "message": _text})
_DATA: dict[str, _Shape] = {
    _E.AGENT_STARTED: _Shape({"input": _content, "attempt": _ordinal}),
    _E.AGENT_THINKING: _Shape(
        {"thought": _text, "delta": _flag},
        {"step": _count, "total_steps": _count, "progress": _number},
    ),
    _E.TOOL_EXECUTING: _Shape(
        {"tool_call_id": _name, "tool_name": _name, "arguments": _object}, {"purpose": _text}
    ),
    _E.TOOL_COMPLETED: _Shape(
        {"tool_call_id": _name, "tool_name": _name, "success": _flag, "duration_ms": _count},
        {"error": _object},
    ),
    _E.AGENT_COMPLETED: _Shape(
        {"outcome": _outcome, "response": _text, "duration_ms": _count},
        {"error": _object, "usage": _object},
    ),
    _E.AGENT_TEXT: _Shape({"message_id": _name, "delta": _text}),
    _E.USER_MESSAGE: _Shape({"id": _name, "content": _content}),
    _E.INPUT_REQUESTED: _Shape(
        {"request_id": _name, "prompt": _text, "schema": _object}, {"expires_at": _rfc3339}
    ),
    _E.INPUT_RECEIVED: _Shape({"request_id": _name, "value": _any}),
    _E.STATE_SNAPSHOT: _Shape({"state": _any}),
    _E.STATE_DELTA: _Shape({"patch": _list}),
    _E.PROGRESS: _Shape({"fraction": _number, "label": _text}),
    _E.CUSTOM: _Shape({"name": _name, "value": _any}),
    _E.MANAGER_MOVED: _Shape(
        {"from_node": _text, "to_node": _text, "cause": _text, "gap_ms": _count}
    ),
}
_OF_A_RUN = ("thread_id", "run_id")
_BY_AN_AGENT = (*_OF_A_RUN, "agent")
_NEEDS: dict[str, tuple[str, ...]] = {
    _E.AGENT_STARTED: _BY_AN_AGENT,
    _E.AGENT_THINKING: _BY_AN_AGENT,
    _E.TOOL_EXECUTING: _BY_AN_AGENT,
    _E.TOOL_COMPLETED: _BY_AN_AGENT,
    _E.AGENT_COMPLETED: _BY_AN_AGENT,
    _E.AGENT_TEXT: _BY_AN_AGENT,
    _E.USER_MESSAGE: _OF_A_RUN,
    _E.INPUT_REQUESTED: _OF_A_RUN,
    _E.INPUT_RECEIVED: _OF_A_RUN,
    _E.PROGRESS: _OF_A_RUN,
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One break of one rule. `kind` is for programs (`protos/testdata/README.md` lists them)."""

    kind: str
    sequence: int
    text: str
    run_id: str = ""

    def __str__(self) -> str:
        where = f" of run {self.run_id}" if self.run_id else ""
        return f"{self.kind} at {self.sequence}{where}: {self.text}"


@dataclass(slots=True)
class _Run:
    thread_id: str
    first: int
    started: bool = False
    ended: bool = False
    seen_from_start: bool = True
    thought: bool = False
    open_calls: dict[str, int] = field(default_factory=dict)
    all_calls: set[str] = field(default_factory=set)


class StreamChecker:
    """Checks one stream, event by event. `findings` grows; a repeated event is not looked into.

    `interleaving` names runs that were admitted under `parallel` or `steer`.
    """

    def __init__(self, interleaving: Collection[str] = ()) -> None:
        self.findings: list[Finding] = []
        self.events = 0
        self._interleaving = frozenset(interleaving)
        self._last: int | None = None
        self._epoch = 0
        self._stream = ""
        self._from_start = True
        self._runs: dict[str, _Run] = {}
        self._active: dict[str, dict[str, None]] = {}
        # A start inside of another run, which is right if the next event cancels it.
        self._nested: Finding | None = None

    def see(self, event: Mapping[str, Any]) -> None:
        """Check the next event as the client got it."""
        self.events += 1
        sequence = event.get("sequence")
        at = sequence if isinstance(sequence, int) else -1
        if not self._position(event, at):
            return
        self._fields(event, at)
        kind, run_id, data = event.get("type"), event.get("run_id"), event.get("data")
        data = data if isinstance(data, dict) else {}
        self._judge_nested(kind, run_id, data)
        if isinstance(kind, str) and isinstance(run_id, str):
            self._order(event, at, kind, run_id, data)

    def end(self, *, complete: bool = True) -> list[Finding]:
        """All findings. With `complete`, a run that is still open is one as well."""
        for run_id, run in self._runs.items():
            if complete and not run.ended:
                self._find("run_not_ended", run.first, "no agent_completed", run_id)
        return self.findings

    # -- sequence and epoch ---------------------------------------------------------------

    def _position(self, event: Mapping[str, Any], at: int) -> bool:
        if at >= 0:
            last, self._last = self._last, at if self._last is None else max(self._last, at)
            # A merged event stands for those from `first` on.
            first = event.get("from_sequence", at)
            if not (isinstance(first, int) and 0 <= first <= at):
                first = at
            if last is None:
                self._from_start = first <= 1
            elif first <= last:
                self._find("repeat", at, f"{last} was seen already")
                return False
            elif first > last + 1:
                self._find("gap", at, f"{last} was the one before")
                self._from_start = False
        stream, epoch = event.get("stream_id"), event.get("epoch")
        if isinstance(stream, str):
            if self._stream not in ("", stream):
                self._find("stream_changed", at, f"{stream}, after {self._stream}")
            self._stream = self._stream or stream
        if _count(epoch) and isinstance(epoch, int):
            if epoch < self._epoch:
                self._find("epoch_down", at, f"epoch {epoch}, after {self._epoch}")
            self._epoch = max(self._epoch, epoch)
        return True

    # -- fields -----------------------------------------------------------------------------

    def _fields(self, event: Mapping[str, Any], at: int) -> None:
        self._shape(event, _ENVELOPE, at, "the event")
        kind, data = event.get("type"), event.get("data")
        if not isinstance(kind, str):
            return
        if "from_sequence" in event and not (kind == _E.AGENT_TEXT and _merges(event)):
            self._find("wrong_merge", at, f"{kind} from {event['from_sequence']!r:.80}")
        for name in _NEEDS.get(kind, ()):
            if name not in event:
                self._find("missing_field", at, f"{kind} has no {name}")
        shape = _DATA.get(kind)
        if shape is None or not isinstance(data, dict):
            return
        self._shape(data, shape, at, kind)
        wanted = ""
        if kind == _E.TOOL_COMPLETED and isinstance(data.get("success"), bool):
            wanted = "result" if data["success"] else "error"
        elif kind == _E.AGENT_COMPLETED and data.get("outcome") == Outcome.FAILED:
            wanted = "error"
        if wanted and wanted not in data:
            self._find("missing_field", at, f"{kind} has no {wanted}")
        if isinstance(data.get("error"), dict) and "error" in shape.optional:
            self._shape(data["error"], _ERROR, at, f"error of {kind}")

    def _shape(self, value: Mapping[str, Any], shape: _Shape, at: int, what: str) -> None:
        for name, check in shape.required.items():
            if name not in value:
                self._find("missing_field", at, f"{what} has no {name}")
            elif not check(value[name]):
                self._find("wrong_type", at, f"{name} of {what} is {value[name]!r:.80}")
        for name, check in shape.optional.items():
            if name in value and not check(value[name]):
                self._find("wrong_type", at, f"{name} of {what} is {value[name]!r:.80}")

    # -- order --------------------------------------------------------------------------------

    def _order(
        self, event: Mapping[str, Any], at: int, kind: str, run_id: str, data: dict[str, Any]
    ) -> None:
        run = self._runs.get(run_id)
        if run is None:
            begins = kind in (_E.USER_MESSAGE, _E.AGENT_STARTED)
            if not begins and self._from_start:
                self._find("outside_run", at, f"{kind} of a run that did not start", run_id)
                return
            run = _Run(str(event.get("thread_id", "")), at)
            self._runs[run_id] = run
            if not begins:
                run.started, run.seen_from_start = True, False
        if kind == _E.USER_MESSAGE:
            if run.ended:
                self._find("outside_run", at, "a message after its run ended", run_id)
        elif kind == _E.AGENT_STARTED:
            self._start(event, at, run_id, run)
        elif kind == _E.AGENT_COMPLETED:
            self._complete(at, run_id, run, data)
        elif not run.started or run.ended:
            when = "after the end" if run.ended else "before the start"
            self._find("outside_run", at, f"{kind} {when} of its run", run_id)
        else:
            self._inside(at, kind, run_id, run, data)

    def _start(self, event: Mapping[str, Any], at: int, run_id: str, run: _Run) -> None:
        if run.started:
            self._find("start_repeated", at, f"it started at {run.first}", run_id)
            return
        run.started, run.first = True, at
        run.thread_id = str(event.get("thread_id", ""))
        active = self._active.setdefault(run.thread_id, {})
        parent = event.get("parent_run_id")
        if parent is not None:
            known = self._runs.get(str(parent))
            if self._from_start and (known is None or not known.started or known.ended):
                self._find("interleaved", at, f"its parent {parent} is not running", run_id)
        elif active and run_id not in self._interleaving and not self._interleaving & set(active):
            text = f"{', '.join(active)} runs in this thread"
            self._nested = Finding("interleaved", at, text, run_id)
        if parent is None:
            active[run_id] = None

    def _judge_nested(self, kind: object, run_id: object, data: Mapping[str, Any]) -> None:
        nested, self._nested = self._nested, None
        ends = kind == _E.AGENT_COMPLETED and data.get("outcome") == Outcome.CANCELLED
        if nested is not None and not (ends and run_id == nested.run_id):
            self.findings.append(nested)

    def _complete(self, at: int, run_id: str, run: _Run, data: dict[str, Any]) -> None:
        if not run.started and not run.ended:
            run.ended = True  # So it is found once.
            self._find("outside_run", at, "agent_completed before the start of its run", run_id)
            return
        if run.ended:
            self._find("end_repeated", at, "it had ended", run_id)
            return
        run.ended = True
        self._active.get(run.thread_id, {}).pop(run_id, None)
        for call, executed_at in run.open_calls.items():
            self._find("tool_not_completed", executed_at, f"{call} was never completed", run_id)
        run.open_calls.clear()
        success = data.get("outcome") == Outcome.SUCCESS
        if success and not run.thought and run.seen_from_start:
            self._find("no_thinking", at, "a success without agent_thinking", run_id)

    def _inside(self, at: int, kind: str, run_id: str, run: _Run, data: dict[str, Any]) -> None:
        call = data.get("tool_call_id")
        if kind == _E.AGENT_THINKING:
            run.thought = True
        elif kind == _E.TOOL_EXECUTING and isinstance(call, str):
            if call in run.all_calls:
                self._find("tool_repeated", at, f"{call} was executed before", run_id)
            run.all_calls.add(call)
            run.open_calls[call] = at
        elif kind == _E.TOOL_COMPLETED and isinstance(call, str):
            known = run.open_calls.pop(call, None) is not None
            if not known and (run.seen_from_start or call in run.all_calls):
                self._find("tool_unknown", at, f"{call} is not executing in this run", run_id)
            run.all_calls.add(call)

    def _find(self, kind: str, at: int, text: str, run_id: str = "") -> None:
        self.findings.append(Finding(kind, at, text, run_id))


def check_stream(
    events: Iterable[Mapping[str, Any]],
    *,
    complete: bool = True,
    interleaving: Collection[str] = (),
) -> list[Finding]:
    """Findings of a whole recording; empty when it keeps every rule."""
    checker = StreamChecker(interleaving)
    for event in events:
        checker.see(event)
    return checker.end(complete=complete)
