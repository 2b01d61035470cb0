"""Spans of messages, runs and tool calls, for sampled traces alone.

The host looks at the sampled bit first; for all others nothing here is called but a
dictionary look-up. Names follow OpenTelemetry's conventions for agents (`invoke_agent`,
`execute_tool`); no content of users is ever an attribute. What is open is bounded: a span whose end
never came is dropped, oldest first.
"""

import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import orjson

from agent_service.core.commands import SubmitMessage
from agent_service.core.effects import AnswerAccepted, StartRun
from steward.model.keys import Epoch, UserKey
from steward.model.verbs import EmitEvent, EventType, Outcome, RunKey, Verb
from steward.telemetry.tracing import Attribute, Tracing, is_sampled

MOST_OPEN = 10_000


@dataclass(frozen=True, slots=True)
class _Open:
    """A span that has begun."""

    name: str
    parent: str
    context: str
    start_ns: int


class HostSpans:
    """Open spans of one node, by what will end them."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self._open: OrderedDict[object, _Open] = OrderedDict()

    def message(self, user: UserKey, command: SubmitMessage) -> None:
        """A message arrived; its span ends when it is accepted."""
        if is_sampled(command.traceparent):
            self._begin((user, command.id), "manager.accept", command.traceparent)

    def accepted(self, user: UserKey, epoch: Epoch, answer: AnswerAccepted) -> None:
        if self._open:
            self._end(
                (user, answer.id), {"steward.epoch": epoch, "steward.sequence": answer.sequence}
            )

    def run_started(self, start: StartRun) -> None:
        if is_sampled(start.traceparent):
            self._begin(start.key, f"invoke_agent {start.agent}", start.traceparent)

    def run_ended(self, key: RunKey, outcome: Outcome) -> None:
        if self._open:
            attributes: dict[str, Attribute] = {
                "gen_ai.operation.name": "invoke_agent",
                "steward.run_id": key.run_id,
                "steward.epoch": key.epoch,
                "steward.outcome": outcome.value,
            }
            self._end(key, attributes, failed=outcome is not Outcome.SUCCESS)

    def verb(self, verb: Verb) -> None:
        """Tool calls of a run that has a span."""
        if not self._open or not isinstance(verb, EmitEvent) or not verb.tool_call_id:
            return
        key = (verb.key, verb.tool_call_id)
        if verb.type is EventType.TOOL_EXECUTING:
            run = self._open.get(verb.key)
            if run is not None:
                tool = orjson.loads(verb.data)["tool_name"]
                self._begin(key, f"execute_tool {tool}", run.context)
        elif key in self._open:
            success = orjson.loads(verb.data)["success"]
            attributes = {
                "gen_ai.operation.name": "execute_tool",
                "steward.tool_call_id": verb.tool_call_id,
            }
            self._end(key, attributes, failed=not success)

    def _begin(self, key: object, name: str, parent: str) -> None:
        if not self._tracing.enabled:
            return
        self._open[key] = _Open(name, parent, self._tracing.child(parent), time.time_ns())
        if len(self._open) > MOST_OPEN:
            self._open.popitem(last=False)

    def _end(
        self, key: object, attributes: Mapping[str, Attribute], *, failed: bool = False
    ) -> None:
        span = self._open.pop(key, None)
        if span is not None:
            self._tracing.record(
                span.name,
                span.parent,
                span.start_ns,
                attributes,
                context=span.context,
                failed=failed,
            )
