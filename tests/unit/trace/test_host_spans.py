"""What a node records: messages, runs, tools and appends, of real managers on a real log."""

from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from agent_service.core.commands import (
    ApplyVerbs,
    AttachEdge,
    Command,
    Fence,
    FinishAppend,
    SubmitMessage,
)
from agent_service.core.effects import (
    AnswerAccepted,
    AnswerRefused,
    CountRun,
    Deliver,
    Effect,
    EndManager,
    StartRun,
    WriteAppend,
)
from agent_service.core.grants import GrantBook
from agent_service.core.journal import Seal, Sealed
from agent_service.core.manager import FAILOVER, Manager
from agent_service.core.policy import AgentPolicy, ManagerPolicy
from agent_service.host.spans import HostSpans
from agent_service.log.memory import LogState
from steward.model.keys import (
    EdgeId,
    Epoch,
    NodeId,
    NodeIncarnation,
    NodeRev,
    StreamId,
    ThreadId,
    UserKey,
)
from steward.model.placement import Placement
from steward.model.verbs import EmitEvent, EventType, FinishRun, Outcome, RunKey, Verb
from steward.telemetry import conventions as names
from steward.telemetry.tracing import FinishedSpan, Kind, Tracing, is_sampled
from steward.testing.spans import KeptSpans

EDGE = EdgeId("edge-0#1")
ALICE = UserKey("default", "alice")
SAMPLED = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
UNSAMPLED = SAMPLED[:-2] + "00"
POLICY = ManagerPolicy((AgentPolicy("echo", "queue"),))
ERROR = {"type": "ValueError", "message": "secret-of-alice"}


class Node:
    """Managers of alice, one after the other, each stepped by hand as the host steps it."""

    def __init__(self, *, content: bool = False, enabled: bool = True) -> None:
        self.kept = KeptSpans()
        tracing = Tracing(self.kept, 0.0, content=content) if enabled else Tracing()
        self.log = LogState(lambda: StreamId("stream-of-alice"))
        self.written: list[WriteAppend] = []
        self.delivered: list[Deliver] = []
        self.started: list[StartRun] = []
        self._numbers: dict[RunKey, int] = {}
        self._use(HostSpans(tracing))
        self._tracing = tracing

    def _use(self, spans: HostSpans) -> None:
        self.spans = spans
        self._write = spans.writing(self._append)
        self._deliver = spans.delivering(lambda _, effect: self.delivered.append(effect))
        self._tell = spans.telling(self._step)

    def manager(self, epoch: int, trace: str = "") -> Manager:
        """A new one, on another node as far as spans go."""
        self._use(HostSpans(self._tracing))
        incarnation = NodeIncarnation(NodeId(f"node-{epoch}"), NodeRev(epoch))
        book = GrantBook(incarnation)
        book.learn(Placement(ALICE, Epoch(epoch), incarnation.node_id, incarnation.node_rev, "a:1"))
        span = self.spans.activating(trace)
        sealed = self.log.seal(Seal(ALICE, Epoch(epoch), f"activation-{epoch}"))
        assert isinstance(sealed, Sealed)
        manager = Manager(book.take(ALICE, Epoch(epoch)), sealed, POLICY)
        context = self.spans.activated(manager, sealed, span)
        self._perform(manager, manager.begin(1, 1_700_000_000_000, 0, context))
        self.tell(manager, AttachEdge(EDGE, 1, 0))
        return manager

    def tell(self, manager: Manager, command: Command) -> None:
        if isinstance(command, SubmitMessage):
            self.spans.message(ALICE, command)
        self._tell(manager, command)

    def say(self, manager: Manager, trace: str, id: str = "m1") -> RunKey:
        """A message that starts a run."""
        text = orjson.dumps("canary of alice")
        message = SubmitMessage(EDGE, 2, id, text, ThreadId("main"), "", "", trace)
        self.tell(manager, message)
        return self.started[-1].key

    def emit(self, manager: Manager, key: RunKey, type: EventType, **data: Any) -> None:
        call = data.get("tool_call_id", "")
        self._verb(manager, EmitEvent(key, self._next(key), type, orjson.dumps(data), call))

    def tool(self, manager: Manager, key: RunKey, id: str, **completion: Any) -> None:
        call = {"tool_call_id": id, "tool_name": "query"}
        self.emit(manager, key, EventType.TOOL_EXECUTING, **call, arguments={"q": "canary"})
        self.emit(manager, key, EventType.TOOL_COMPLETED, **call, duration_ms=0, **completion)

    def end(
        self, manager: Manager, key: RunKey, outcome: Outcome = Outcome.SUCCESS, **more: Any
    ) -> None:
        data = orjson.dumps({"outcome": outcome.value, "response": "canary answer", **more})
        self._verb(manager, FinishRun(key, self._next(key), outcome, data))

    def _next(self, key: RunKey) -> int:
        self._numbers[key] = self._numbers.get(key, 0) + 1
        return self._numbers[key]

    def _verb(self, manager: Manager, verb: Verb) -> None:
        self.tell(manager, ApplyVerbs((verb,)))

    def _step(self, manager: Manager, command: Command) -> None:
        self._perform(manager, manager.handle(1, command, 1_700_000_000_000))

    def _append(self, manager: Manager, effect: WriteAppend) -> None:
        self.written.append(effect)

    def _perform(self, manager: Manager, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case WriteAppend():
                    self._write(manager, effect)
                case Deliver():
                    self._deliver(manager, effect)
                case StartRun():
                    self.started.append(self.spans.run_started(manager, effect))
                case AnswerAccepted():
                    self.spans.accepted(ALICE, manager.epoch, effect)
                case AnswerRefused():
                    self.spans.refused(manager.epoch, effect)
                case CountRun():
                    self.spans.run_ended(effect.key, effect.outcome)
                case EndManager():
                    self.spans.manager_over(manager, effect)
                    continue
            if isinstance(effect, WriteAppend):
                append = self.written[-1].append
                outcome = self.log.append(append)
                self._tell(manager, FinishAppend(append.append_number, outcome))


def own(span: FinishedSpan, *keys: str) -> Mapping[str, Any]:
    return {key: span.attributes.get(key) for key in keys}


def test_a_run_of_a_sampled_message_is_one_tree_of_spans() -> None:
    node = Node()
    manager = node.manager(1)
    key = node.say(manager, SAMPLED)
    node.emit(manager, key, EventType.AGENT_THINKING, text="hm")
    node.tool(manager, key, "c1", success=True, result=1)
    node.end(manager, key, usage={"input_tokens": 3, "output_tokens": 5, "cost": "x"})
    kept = node.kept
    assert all(span.context[3:35] == SAMPLED[3:35] for span in kept.spans)
    admit, run, tool = (
        kept.one(name) for name in ("manager.admit", "invoke_agent echo", "execute_tool query")
    )
    assert admit.parent == run.parent == SAMPLED and tool.parent == run.context
    parents = {s.name: s.parent for s in kept.spans if s.name.startswith("append ")}
    assert parents == {
        "append user_message": admit.context,
        "append agent_started": run.context,
        "append agent_thinking": run.context,
        "append tool_executing": tool.context,
        "append tool_completed": tool.context,
        "append agent_completed": run.context,
    }
    assert not any(span.failed for span in kept.spans)
    assert all(s.kind is Kind.PRODUCER for s in kept.spans if s.name.startswith("append "))
    assert own(run, names.OPERATION_NAME, names.AGENT_NAME, names.OUTCOME, names.ATTEMPT) == {
        names.OPERATION_NAME: names.INVOKE_AGENT,
        names.AGENT_NAME: "echo",
        names.OUTCOME: "success",
        names.ATTEMPT: 1,
    }
    usage = {value: run.attributes[value] for value in names.USAGE.values()}
    assert sorted(usage.values()) == [3, 5]
    assert names.UPGRADED not in run.attributes
    # What the agent calls belongs to the run.
    assert node.started[0].traceparent == run.context


def test_the_log_and_the_edges_are_given_the_context_of_each_append_by_its_sequence() -> None:
    node = Node()
    manager = node.manager(1)
    key = node.say(manager, SAMPLED)
    node.end(manager, key)
    spans = {
        (int(span.attributes[names.SEQUENCE]), span.context)
        for span in node.kept.spans
        if span.name.startswith("append ")
    }
    logged = {trace for write in node.written for trace in write.append.traces}
    announced = {trace for delivery in node.delivered for trace in delivery.traces}
    assert spans == logged == announced and len(spans) >= 3
    for delivery in node.delivered:
        assert all(delivery.first <= at <= delivery.last for at, _ in delivery.traces)


def test_a_run_of_an_unsampled_message_leaves_nothing() -> None:
    node = Node()
    manager = node.manager(1)
    key = node.say(manager, UNSAMPLED)
    node.tool(manager, key, "c1", success=True, result=1)
    node.end(manager, key)
    assert node.kept.spans == []
    assert not any(write.append.traces for write in node.written)
    assert not any(delivery.traces for delivery in node.delivered)
    assert node.started[0].traceparent == UNSAMPLED


def test_a_tool_that_fails_brings_the_run_into_view_from_there_on() -> None:
    node = Node()
    manager = node.manager(1)
    key = node.say(manager, UNSAMPLED)
    node.tool(manager, key, "c1", success=True, result=1)
    node.tool(manager, key, "c2", success=False, error=ERROR)
    node.tool(manager, key, "c3", success=True, result=2)
    node.end(manager, key)
    kept = node.kept
    first, second = (span for span in kept.spans if span.name == "execute_tool query")
    run = kept.one("invoke_agent echo")
    assert (first.failed, second.failed, run.failed) == (True, False, False)
    assert first.attributes[names.ERROR_TYPE] == "ValueError"
    assert [s.attributes.get(names.UPGRADED) for s in (first, second, run)] == [True] * 3
    assert run.attributes[names.ATTEMPT] == 1 and run.parent == UNSAMPLED
    assert is_sampled(run.context) and run.start_ns <= first.start_ns
    appended = [name for name in kept.names() if name.startswith("append ")]
    assert appended == [
        "append tool_completed",
        "append tool_executing",
        "append tool_completed",
        "append agent_completed",
    ]


@pytest.mark.parametrize("outcome", list(Outcome))
def test_only_a_run_that_failed_or_was_interrupted_is_kept_for_how_it_ended(
    outcome: Outcome,
) -> None:
    node = Node()
    manager = node.manager(1)
    key = node.say(manager, UNSAMPLED)
    failed = outcome in (Outcome.FAILED, Outcome.INTERRUPTED)
    node.end(manager, key, outcome, **({"error": ERROR} if failed else {}))
    if not failed:
        assert node.kept.spans == []
        return
    run = node.kept.one("invoke_agent echo")
    assert run.failed and run.attributes[names.ERROR_TYPE] == "ValueError"
    assert run.attributes[names.OUTCOME] == outcome.value
    assert node.kept.one("append agent_completed").parent == run.context


def test_what_users_wrote_cannot_pass_for_a_failure_or_a_trace() -> None:
    node = Node()
    manager = node.manager(1)
    key = node.say(manager, UNSAMPLED)
    lies = {"success": False, "outcome": "failed", "trace": SAMPLED}
    node.emit(manager, key, EventType.CUSTOM, name="x", value=lies)
    node.tool(manager, key, "c1", success=True, result=lies)
    node.end(manager, key, usage=lies)
    assert node.kept.spans == []


@pytest.mark.parametrize("content", [False, True])
def test_content_is_recorded_only_when_it_is_wanted_and_under_its_own_keys(content: bool) -> None:
    node = Node(content=content)
    manager = node.manager(1)
    key = node.say(manager, SAMPLED)
    node.tool(manager, key, "c1", success=True, result="canary")
    node.tool(manager, key, "c2", success=False, error=ERROR)
    node.end(manager, key)
    texts = {k for s in node.kept.spans for k, v in s.attributes.items() if "canary" in str(v)}
    assert texts == (set(names.CONTENT) if content else set())
    everything = repr(node.kept.spans)
    # Neither who it was nor what an error said.
    assert "secret" not in everything and "'alice'" not in everything


def test_a_failover_is_recorded_and_joined_with_the_run_that_goes_on() -> None:
    node = Node()
    before = node.say(node.manager(1), UNSAMPLED)
    assert node.kept.spans == []
    second = node.manager(2)
    activate = node.kept.one("manager.activate")
    assert activate.attributes == {
        names.EPOCH: 2,
        names.CAUSE: FAILOVER,
        names.UPGRADED: True,
    }
    assert [(link.context, link.attributes) for link in activate.links] == [
        (UNSAMPLED, {names.LINK: FAILOVER})
    ]
    key = node.started[-1].key
    assert key == before._replace(epoch=Epoch(2)) and node.started[-1].attempt == 2
    node.end(second, key)
    run = node.kept.one("invoke_agent echo")
    assert run.context[3:35] == UNSAMPLED[3:35] and not run.failed
    assert own(run, names.ATTEMPT, names.UPGRADED) == {names.ATTEMPT: 2, names.UPGRADED: True}
    assert [(link.context, link.attributes) for link in run.links] == [
        (activate.context, {names.LINK: FAILOVER})
    ]


def test_the_first_manager_of_somebody_whose_trace_is_not_sampled_is_not_recorded() -> None:
    node = Node()
    node.manager(1, UNSAMPLED)
    assert node.kept.spans == []
    traced = Node()
    traced.manager(1, SAMPLED)
    span = traced.kept.one("manager.activate")
    assert (span.parent, span.attributes, span.links) == (SAMPLED, {names.EPOCH: 1}, ())


def test_a_manager_that_is_fenced_ends_its_open_runs_and_tools_as_failed() -> None:
    node = Node()
    manager = node.manager(1)
    key = node.say(manager, SAMPLED)
    call = {"tool_call_id": "c1", "tool_name": "query", "arguments": {}}
    node.emit(manager, key, EventType.TOOL_EXECUTING, **call)
    assert "invoke_agent echo" not in node.kept.names()
    node.tell(manager, Fence(Epoch(2)))
    run, tool = node.kept.one("invoke_agent echo"), node.kept.one("execute_tool query")
    assert run.failed and tool.failed and tool.parent == run.context
    assert run.attributes[names.CAUSE] == "fenced"


def test_an_append_that_the_log_refuses_failed_and_is_not_announced() -> None:
    node = Node()
    manager = node.manager(1)
    key = node.say(manager, SAMPLED)
    deliveries = len(node.delivered)
    node.log.seal(Seal(ALICE, Epoch(2), "elsewhere"))
    node.emit(manager, key, EventType.AGENT_THINKING, text="hm")
    assert node.kept.one("append agent_thinking").failed
    assert len(node.delivered) == deliveries


def test_a_message_that_is_refused_says_why() -> None:
    node = Node()
    manager = node.manager(1)
    message = SubmitMessage(EDGE, 2, "m1", b'"x"', ThreadId("main"), "nobody", "", SAMPLED)
    node.tell(manager, message)
    (admit,) = node.kept.spans
    assert (admit.name, admit.failed) == ("manager.admit", False)
    assert admit.attributes == {names.EPOCH: 1, names.REASON: "NOT_FOUND"}


def test_where_traces_are_off_nothing_stands_in_the_way() -> None:
    node = Node(enabled=False)
    manager = node.manager(1)
    key = node.say(manager, SAMPLED)
    node.end(manager, key, Outcome.FAILED, error=ERROR)
    assert node.started[0].traceparent == SAMPLED
    assert not any(write.append.traces for write in node.written)
    spans = HostSpans(Tracing())

    def plain(*_: object) -> None: ...

    assert spans.writing(plain) is plain
    assert spans.delivering(plain) is plain
    assert spans.telling(plain) is plain
