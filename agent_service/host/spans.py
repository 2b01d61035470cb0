"""Spans of messages, runs, tool calls and appends, for traces that are kept.

Whether anything is to be kept is asked once for an append: is a traced run of this user open, or
can one of its events begin one? For all others nothing else is done. What is open is bounded:
spans whose end never came are dropped, oldest first.

A run of a trace that is not sampled leaves a note of when it began. When it fails, when one of
its tools does, or when it goes on after a failover, its span is kept all the same, and with it all
that comes from then on (`steward.upgraded`). What came before is not there.

Content of users and agents is recorded only with `Tracing.content`, and only under the keys
`steward.telemetry.conventions.CONTENT`.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import orjson

from agent_service.core.commands import Command, FinishAppend, SubmitMessage
from agent_service.core.effects import (
    AnswerAccepted,
    AnswerRefused,
    Deliver,
    EndManager,
    StartRun,
    WriteAppend,
)
from agent_service.core.facts import OwnerChanged, RunOpened, fact_of
from agent_service.core.journal import Committed, RecordKind, Sealed
from agent_service.core.manager import FAILOVER, HANDOFF, UNCERTAIN, Manager
from steward.errors import ERRORS
from steward.model.keys import Epoch, RunId, UserKey
from steward.model.verbs import EventType, Outcome, RunKey
from steward.telemetry import conventions as names
from steward.telemetry.tracing import Attribute, Kind, Link, Tracing, is_sampled, trace_of

MOST_OPEN = 10_000
MOST_LINKS = 32

# Types of events that begin nothing that is traced, and can't say that something failed.
_PLAIN = frozenset(EventType) - {
    EventType.USER_MESSAGE,
    EventType.AGENT_STARTED,
    EventType.TOOL_COMPLETED,
    EventType.AGENT_COMPLETED,
    EventType.MANAGER_MOVED,
}
_FAILURES = (Outcome.FAILED, Outcome.INTERRUPTED)

Write = Callable[[Manager, WriteAppend], None]
Give = Callable[[Manager, Deliver], None]
Tell = Callable[[Manager, Command], None]
K = TypeVar("K")
V = TypeVar("V")


class Opened(NamedTuple):
    """A span that has begun."""

    parent: str
    context: str
    start_ns: int


class _Made(NamedTuple):
    """An event on its way to the log, and the span of that."""

    type: EventType
    sequence: int
    span: Opened


class _Quiet(NamedTuple):
    """A run whose trace is not kept, unless it fails."""

    start: StartRun
    start_ns: int


class _Moved(NamedTuple):
    """How a manager came here: the span of its activation, and why."""

    context: str
    cause: str


@dataclass(slots=True)
class _Run:
    """An execution of a run whose trace is kept."""

    agent: str
    span: Opened
    attributes: dict[str, Attribute]
    links: tuple[Link, ...] = ()
    upgraded: bool = False
    tools: dict[str, tuple[Opened, dict[str, Attribute]]] = field(default_factory=dict)


class HostSpans:
    """Open spans of one node, by what will end them."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self._enabled = tracing.enabled
        # Messages by user and id, and these by the command that brought them.
        self._admitting: OrderedDict[tuple[UserKey, str], Opened] = OrderedDict()
        self._messages: OrderedDict[tuple[str, int], tuple[UserKey, str]] = OrderedDict()
        self._runs: OrderedDict[RunKey, _Run] = OrderedDict()
        # How many of these a user has.
        self._traced: Counter[UserKey] = Counter()
        self._quiet: OrderedDict[RunKey, _Quiet] = OrderedDict()
        self._flights: OrderedDict[tuple[UserKey, Epoch, int], list[_Made]] = OrderedDict()
        self._moved: OrderedDict[tuple[UserKey, Epoch], _Moved] = OrderedDict()
        # What has just landed, for the delivery that follows at once.
        self._landed: tuple[Manager, tuple[tuple[int, str], ...]] | None = None

    # What stands in the way of effects and commands, when traces are on.

    def writing(self, write: Write) -> Write:
        """`write`, with the traces of sampled events."""
        if not self._enabled:
            return write

        def traced(live: Manager, effect: WriteAppend) -> None:
            if live.user in self._traced or not _PLAIN.issuperset(effect.types):
                effect = self._with_traces(live, effect)
            write(live, effect)

        return traced

    def delivering(self, deliver: Give) -> Give:
        """`deliver`, with the traces of sampled events."""
        if not self._enabled:
            return deliver

        def traced(live: Manager, effect: Deliver) -> None:
            landed, self._landed = self._landed, None
            if landed is not None and landed[0] is live:
                effect = effect._replace(traces=landed[1])
            deliver(live, effect)

        return traced

    def telling(self, tell: Tell) -> Tell:
        """`tell`, which ends the spans of appends that were answered."""
        if not self._enabled:
            return tell

        def traced(live: Manager, command: Command) -> None:
            if self._flights and isinstance(command, FinishAppend):
                self._on_answer(live, command)
            tell(live, command)
            self._landed = None

        return traced

    # Messages.

    def message(self, user: UserKey, command: SubmitMessage) -> None:
        """A message arrived; its span ends when it is accepted or refused."""
        if not self._enabled or not is_sampled(command.traceparent):
            return
        key = (user, command.id)
        _put(self._admitting, key, self._begin(command.traceparent))
        _put(self._messages, (command.edge_id, command.command_id), key)

    def accepted(self, user: UserKey, epoch: Epoch, answer: AnswerAccepted) -> None:
        if self._messages:
            attributes = {names.EPOCH: epoch, names.SEQUENCE: answer.sequence}
            self._answered(answer, attributes)

    def refused(self, epoch: Epoch, answer: AnswerRefused) -> None:
        if self._messages:
            attributes = {names.EPOCH: epoch, names.REASON: answer.reason.value}
            self._answered(answer, attributes, failed=ERRORS[answer.reason].is_fault)

    def _answered(
        self,
        answer: AnswerAccepted | AnswerRefused,
        attributes: Mapping[str, Attribute],
        *,
        failed: bool = False,
    ) -> None:
        key = self._messages.pop((answer.edge_id, answer.command_id), None)
        span = self._admitting.pop(key, None) if key is not None else None
        if span is not None:
            self._end(names.MANAGER_ADMIT, span, attributes, failed=failed)

    # Managers.

    def activating(self, trace: str) -> Opened:
        """A manager is about to be made, for somebody whose trace this is; empty for nobody."""
        context = self._tracing.child(trace) if trace else self._tracing.new_root()
        return Opened(trace, context, time.time_ns())

    def activated(self, manager: Manager, sealed: Sealed, span: Opened) -> str:
        """It was made, and has not begun. The context of all that it does by itself.

        One that took over is joined with the traces of the runs that it goes on with, and after
        a failover it is always recorded.
        """
        if not self._enabled:
            return span.context
        cause, runs = _found(sealed)
        attributes: dict[str, Attribute] = {names.EPOCH: manager.epoch}
        links: tuple[Link, ...] = ()
        if cause:
            attributes[names.CAUSE] = cause
            links = tuple(Link(run.traceparent, {names.LINK: cause}) for run in runs[:MOST_LINKS])
        kept = cause == FAILOVER or any(is_sampled(link.context) for link in links)
        context = self._tracing.record(
            names.MANAGER_ACTIVATE,
            span.parent,
            span.start_ns,
            attributes,
            context=span.context if span.context != span.parent else "",
            links=links,
            upgraded=kept,
        )
        if cause:
            _put(self._moved, (manager.user, manager.epoch), _Moved(context, cause))
        return context

    def manager_over(self, live: Manager, effect: EndManager) -> None:
        """A manager is over, and with it the executions of its runs."""
        if not self._enabled:
            return
        self._moved.pop((live.user, live.epoch), None)
        for key in live.active_keys():
            self._quiet.pop(key, None)
            run = self._runs.get(key)
            if run is not None:
                run.attributes[names.CAUSE] = effect.cause
                self._end_run(key, run, failed=bool(effect.fence))

    # Runs.

    def run_started(self, live: Manager, start: StartRun) -> StartRun:
        """A run is about to be executed. With the context that calls of its agent belong to."""
        if not self._enabled:
            return start
        run = self._runs.get(start.key)
        if run is None:
            moved = self._moved.get((live.user, live.epoch)) if start.attempt > 1 else None
            upgraded = moved is not None and moved.cause == FAILOVER
            if not upgraded and not is_sampled(start.traceparent):
                _put(self._quiet, start.key, _Quiet(start, time.time_ns()))
                return start
            run = self._open_run(live, start.key, start.agent, start.traceparent, start.thread_id)
            if moved is not None:
                run.links = (Link(moved.context, {names.LINK: moved.cause}),)
        run.attributes[names.ATTEMPT] = start.attempt
        if self._tracing.content:
            said = orjson.loads(start.content)
            run.attributes[names.INPUT_MESSAGES] = names.messages("user", said)
        return replace(start, traceparent=run.span.context)

    def run_ended(self, key: RunKey, outcome: Outcome) -> None:
        """Its last event is stored."""
        if self._quiet:
            self._quiet.pop(key, None)
        run = self._runs.get(key) if self._runs else None
        if run is not None:
            run.attributes[names.OUTCOME] = outcome.value
            self._end_run(key, run, failed=outcome in _FAILURES)

    def _open_run(
        self, live: Manager, key: RunKey, agent: str, trace: str, thread: str, start_ns: int = 0
    ) -> _Run:
        attributes: dict[str, Attribute] = {
            names.OPERATION_NAME: names.INVOKE_AGENT,
            names.AGENT_NAME: agent,
            names.CONVERSATION_ID: names.conversation(live.stream_id, thread),
            names.RUN_ID: key.run_id,
            names.EPOCH: key.epoch,
        }
        span = self._begin(trace, upgraded=True, start_ns=start_ns)
        run = _Run(agent, span, attributes, upgraded=not is_sampled(trace))
        self._runs[key] = run
        self._traced[key.user] += 1
        if len(self._runs) > MOST_OPEN:
            self._forget(next(iter(self._runs)))
        return run

    def _end_run(self, key: RunKey, run: _Run, *, failed: bool) -> None:
        for span, attributes in run.tools.values():
            name = names.tool_span(str(attributes[names.TOOL_NAME]))
            self._end(name, span, attributes, failed=failed, upgraded=run.upgraded)
        self._end(
            names.run_span(run.agent),
            run.span,
            run.attributes,
            failed=failed,
            links=run.links,
            upgraded=run.upgraded,
        )
        self._forget(key)

    def _forget(self, key: RunKey) -> None:
        del self._runs[key]
        self._traced[key.user] -= 1
        if self._traced[key.user] <= 0:
            del self._traced[key.user]

    # Events, on their way into the log.

    def _with_traces(self, live: Manager, effect: WriteAppend) -> WriteAppend:
        append = effect.append
        now_ns = time.time_ns()
        made: list[_Made] = []
        sequence = append.expected_sequence - 1
        for event, type in zip(append.events, effect.types, strict=True):
            sequence += 1
            parent = self._parent_of(live, type, event.payload, now_ns)
            if is_sampled(parent):
                span = Opened(parent, self._tracing.child(parent), now_ns)
                made.append(_Made(type, sequence, span))
        if not made:
            return effect
        _put(self._flights, (live.user, live.epoch, append.append_number), made)
        traces = tuple((one.sequence, one.span.context) for one in made)
        return effect._replace(append=append._replace(traces=traces))

    def _on_answer(self, live: Manager, answer: FinishAppend) -> None:
        made = self._flights.pop((live.user, live.epoch, answer.append_number), None)
        if made is None:
            return
        failed = not isinstance(answer.outcome, Committed)
        for type, sequence, span in made:
            attributes = {
                names.EVENT_TYPE: type.value,
                names.SEQUENCE: sequence,
                names.EPOCH: live.epoch,
            }
            name = names.append_span(type.value)
            self._end(name, span, attributes, failed=failed, kind=Kind.PRODUCER)
        if not failed:
            self._landed = live, tuple((one.sequence, one.span.context) for one in made)

    def _parent_of(self, live: Manager, type: EventType, payload: bytes, now_ns: int) -> str:
        """What the append of this event is a child of; not sampled when it is not traced."""
        trace = trace_of(payload)
        if not (is_sampled(trace) or live.user in self._traced or _says_failed(type, payload)):
            return ""
        event = orjson.loads(payload)
        run_id, data = event.get("run_id"), event["data"]
        if run_id is None:
            return trace
        if type is EventType.USER_MESSAGE:
            admitting = self._admitting.get((live.user, data["id"]))
            return admitting.context if admitting is not None else trace
        key = RunKey(live.user, live.epoch, RunId(run_id))
        run = self._runs.get(key)
        if run is None:
            run = self._begin_run(live, key, event, trace, failed=_is_failed(type, data))
        if run is None:
            return ""
        match type:
            case EventType.TOOL_EXECUTING:
                return self._tool_began(run, data, now_ns).context
            case EventType.TOOL_COMPLETED:
                return self._tool_ended(run, data, now_ns).context
            case EventType.AGENT_COMPLETED:
                self._note_result(run, data)
        return run.span.context

    def _begin_run(
        self, live: Manager, key: RunKey, event: Mapping[str, Any], trace: str, *, failed: bool
    ) -> _Run | None:
        """Of a sampled trace, or since something failed just now."""
        quiet = self._quiet.get(key)
        if not is_sampled(trace):
            if not failed:
                return None
            trace = quiet.start.traceparent if quiet is not None else trace
        start_ns = quiet.start_ns if quiet is not None else 0
        run = self._open_run(live, key, event["agent"], trace, event["thread_id"], start_ns)
        if quiet is not None:
            del self._quiet[key]
            run.attributes[names.ATTEMPT] = quiet.start.attempt
        return run

    def _tool_began(self, run: _Run, data: Mapping[str, Any], now_ns: int) -> Opened:
        span = self._begin(run.span.context, start_ns=now_ns)
        attributes = _tool_attributes(data)
        if self._tracing.content:
            attributes[names.TOOL_ARGUMENTS] = names.content(data.get("arguments"))
        run.tools[data["tool_call_id"]] = span, attributes
        return span

    def _tool_ended(self, run: _Run, data: Mapping[str, Any], now_ns: int) -> Opened:
        began = run.tools.pop(data["tool_call_id"], None)
        if began is None:
            # Its beginning was not traced, or is that of an earlier attempt.
            start_ns = now_ns - int(data.get("duration_ms", 0)) * 1_000_000
            began = self._begin(run.span.context, start_ns=start_ns), _tool_attributes(data)
        span, attributes = began
        failed = _is_failed(EventType.TOOL_COMPLETED, data)
        if failed:
            attributes[names.ERROR_TYPE] = str(data["error"]["type"])
        elif self._tracing.content:
            attributes[names.TOOL_RESULT] = names.content(data.get("result"))
        name = names.tool_span(data["tool_name"])
        self._end(name, span, attributes, failed=failed, upgraded=run.upgraded)
        return span

    def _note_result(self, run: _Run, data: Mapping[str, Any]) -> None:
        error, usage = data.get("error"), data.get("usage")
        if error is not None:
            run.attributes[names.ERROR_TYPE] = str(error["type"])
        for key, name in names.USAGE.items():
            if isinstance(usage, dict) and isinstance(usage.get(key), int):
                run.attributes[name] = usage[key]
        if self._tracing.content:
            said = names.messages("assistant", data.get("response", ""))
            run.attributes[names.OUTPUT_MESSAGES] = said

    # Spans.

    def _begin(self, parent: str, *, upgraded: bool = False, start_ns: int = 0) -> Opened:
        context = self._tracing.child(parent, upgraded=upgraded)
        return Opened(parent, context, start_ns or time.time_ns())

    def _end(
        self,
        name: str,
        span: Opened,
        attributes: Mapping[str, Attribute],
        *,
        failed: bool = False,
        kind: Kind = Kind.INTERNAL,
        links: tuple[Link, ...] = (),
        upgraded: bool = False,
    ) -> None:
        if upgraded:
            attributes = {**attributes, names.UPGRADED: True}
        self._tracing.record(
            name,
            span.parent,
            span.start_ns,
            attributes,
            context=span.context,
            failed=failed,
            kind=kind,
            links=links,
        )


def _found(sealed: Sealed) -> tuple[str, list[RunOpened]]:
    """Why the manager before is not there any more, if it should be, and the runs it left open."""
    cause, runs = "", []
    for record in sealed.records:
        if record.kind not in (RecordKind.OWNER, RecordKind.RUN):
            continue
        match fact_of(record):
            case OwnerChanged(released=released):
                if not released or released == UNCERTAIN:
                    cause = FAILOVER
                elif released == HANDOFF:
                    cause = HANDOFF
            case RunOpened() as run if run.started_ms:
                runs.append(run)
    return cause, runs


def _tool_attributes(data: Mapping[str, Any]) -> dict[str, Attribute]:
    return {
        names.OPERATION_NAME: names.EXECUTE_TOOL,
        names.TOOL_NAME: str(data["tool_name"]),
        names.TOOL_TYPE: names.FUNCTION,
        names.TOOL_CALL_ID: str(data["tool_call_id"]),
    }


def _says_failed(type: EventType, payload: bytes) -> bool:
    """Whether an event may tell of a failure: a look at bytes, to be confirmed by `_is_failed`."""
    if type is EventType.TOOL_COMPLETED:
        return b'"success":false' in payload
    if type is EventType.AGENT_COMPLETED:
        return b'"outcome":"failed"' in payload or b'"outcome":"interrupted"' in payload
    return False


def _is_failed(type: EventType, data: Mapping[str, Any]) -> bool:
    if type is EventType.TOOL_COMPLETED:
        return data["success"] is False
    return type is EventType.AGENT_COMPLETED and data["outcome"] in _FAILURES


def _put(where: "OrderedDict[K, V]", key: K, value: V) -> None:
    where[key] = value
    if len(where) > MOST_OPEN:
        where.popitem(last=False)
