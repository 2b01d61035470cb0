"""One trace joins the services: who came, what the agent did, what was stored, who has seen it."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from steward.client.client import Client
from steward.model.keys import StreamPosition
from steward.telemetry import conventions as names
from steward.testing.collector import SeenSpan, SpanCollector, span_collector
from steward.testing.local_cluster import LocalCluster
from steward.testing.tab import open_tab
from steward.testing.waiting import wait_for

AGENTS = '''
import asyncio

async def golden(run):
    """Thinks, looks something up, and answers."""
    await run.think("let me see")
    await run.tool("look_up", {"what": run.input.text}, look_up)
    return "the answer to " + run.input.text

async def look_up(what):
    return "found " + what

async def failing(run):
    await run.think("this will not do")
    raise RuntimeError("no")

async def clumsy(run):
    """One of its tools fails; the run does not."""
    await run.think("trying")
    await run.say("before ")
    try:
        await run.tool("look_up", {}, broken)
    except Exception:
        await run.say("after")
    return "done"

async def broken():
    raise ValueError("broken")

async def counting(run):
    await run.think("counting")
    for number in range(200):
        await run.say(f"{number} ")
        await asyncio.sleep(0.02)
    return "counted"
'''
AGENT_NAMES = ("golden", "failing", "clumsy", "counting")
ROLES = ("REGISTRY", "AUTH", "LOG", "AGENT", "EDGE")

EDGE, AUTH, REGISTRY = "steward-edge", "steward-auth", "steward-registry"
AGENT, LOG = "steward-agent", "steward-log"
RECEIVE, RUN = (EDGE, "edge.receive"), (AGENT, "invoke_agent golden")
TOOL = (AGENT, "execute_tool look_up")

# What an event is appended under: the child -> parent of each of the five.
MADE_IN = {
    "agent_started": RUN,
    "agent_thinking": RUN,
    "tool_executing": TOOL,
    "tool_completed": TOOL,
    "agent_completed": RUN,
}
# Child -> parent, each as (service, name), of what comes before the first event.
BEFORE = {
    (AUTH, "auth.validate"): (EDGE, "edge.connect"),
    (REGISTRY, "registry.resolve"): (EDGE, "edge.connect"),
    (AGENT, "manager.activate"): (EDGE, "edge.connect"),
    (LOG, "log.seal"): (AGENT, "manager.activate"),
    (AGENT, "manager.admit"): RECEIVE,
    (AGENT, "append user_message"): (AGENT, "manager.admit"),
    RUN: RECEIVE,
    TOOL: RUN,
}

Traced = Callable[..., tuple[LocalCluster, SpanCollector]]


def names_of(span: SeenSpan) -> tuple[str, str]:
    return span.service, span.name


class Seen:
    """What the collector has, to be asked."""

    def __init__(self, collector: SpanCollector) -> None:
        self.spans = collector.spans()
        self._by_id = {(span.trace_id, span.span_id): span for span in self.spans}

    def parent(self, span: SeenSpan) -> SeenSpan | None:
        return self._by_id.get((span.trace_id, span.parent_id))

    def linked(self, span: SeenSpan, why: str) -> set[tuple[str, str]]:
        """The spans that this one is joined with for this reason."""
        found = {
            self._by_id.get((trace_id, span_id))
            for trace_id, span_id, attributes in span.links
            if attributes[names.LINK] == why
        }
        return {names_of(other) for other in found if other is not None}

    def of(self, name: str, **attributes: Any) -> list[SeenSpan]:
        """The spans of this name that have these attributes of Steward."""
        wanted = {f"steward.{key}": value for key, value in attributes.items()}
        return [
            span
            for span in self.spans
            if span.name == name and wanted.items() <= span.attributes.items()
        ]

    def edges(self) -> set[tuple[tuple[str, str], tuple[str, str]]]:
        parents = ((span, self.parent(span)) for span in self.spans)
        return {(names_of(span), names_of(parent)) for span, parent in parents if parent}


@pytest.fixture
def traced(start_cluster: Any, tmp_path: Path) -> Iterator[Traced]:
    """Start a cluster whose traces come here; settings beyond that as `ROLE_NAME="value"`."""
    agents = tmp_path / "traced_agents.py"
    agents.write_text(AGENTS)
    with span_collector() as (collector, endpoint):

        def start(ratio: float, **settings: str) -> tuple[LocalCluster, SpanCollector]:
            environ = {f"STEWARD_{role}_OTLP_ENDPOINT": endpoint for role in ROLES}
            environ |= {f"STEWARD_{role}_TRACE_RATIO": str(ratio) for role in ROLES}
            environ |= {f"STEWARD_{name}": value for name, value in settings.items()}
            options = [f"--agent={agents}:{name}" for name in AGENT_NAMES]
            cluster: LocalCluster = start_cluster(*options, environ=environ).wait_ready()
            return cluster, collector

        yield start


def shown(collector: SpanCollector, what: str, holds: Callable[[Seen], object]) -> Seen:
    """What was seen, as soon as `holds`."""
    try:
        wait_for(lambda: bool(holds(Seen(collector))), 10, what)
    except TimeoutError:
        lines = sorted(str(edge) for edge in Seen(collector).edges())
        pytest.fail(f"not seen: {what}; edges:\n" + "\n".join(lines))
    return Seen(collector)


async def ask(cluster: LocalCluster, text: str, agent: str, **options: Any) -> Any:
    """One run by the client SDK: all of its events, and where the stream was left."""
    token = await asyncio.to_thread(cluster.token, "alice")
    async with Client(cluster.url, token=token, **options) as client:
        run = await client.ask(text, agent=agent)
        events = [event async for event in run]
        await asyncio.sleep(0.1)  # The last acknowledgement is at most 50 ms behind.
        return events, client.position


def test_each_golden_event_is_traced_from_the_message_to_its_acknowledgement(
    traced: Traced,
) -> None:
    cluster, collector = traced(1.0)
    events, _ = asyncio.run(ask(cluster, "which region sold the most?", "golden"))
    by_type = {event.type: event for event in events}
    assert set(MADE_IN) <= set(by_type)
    wanted = set(BEFORE.items()) | {
        ((AGENT, names.append_span(kind)), parent) for kind, parent in MADE_IN.items()
    }
    last = {"sequence": by_type["agent_completed"].sequence}
    ends = ("edge.acknowledge", "log.commit", "append agent_completed")
    seen = shown(
        collector,
        "every edge of the table",
        lambda seen: wanted <= seen.edges() and all(seen.of(name, **last) for name in ends),
    )
    for kind in MADE_IN:
        place = {"sequence": by_type[kind].sequence, "epoch": by_type[kind].epoch}
        (append,) = seen.of(names.append_span(kind), **place)
        (commit,) = seen.of(names.LOG_COMMIT, **place)
        (deliver,) = seen.of(names.EDGE_DELIVER, **place)
        (acknowledge,) = seen.of(names.EDGE_ACKNOWLEDGE, sequence=place["sequence"])
        assert append.attributes[names.EVENT_TYPE] == kind
        assert commit.service == LOG and seen.parent(commit) == append
        assert deliver.service == EDGE and seen.parent(deliver) == append
        assert acknowledge.service == EDGE and seen.parent(acknowledge) == deliver
        assert by_type[kind].trace[3:35] == append.trace_id
    (run,) = seen.of("invoke_agent golden")
    assert run.attributes[names.OPERATION_NAME] == "invoke_agent"
    assert run.attributes[names.AGENT_NAME] == "golden" and not run.failed
    (receive,) = seen.of("edge.receive")
    assert receive.parent_id == "" and seen.linked(receive, "attach") == {(EDGE, "edge.connect")}


def test_the_trace_of_the_application_goes_on_in_the_cluster(traced: Traced) -> None:
    cluster, collector = traced(0.0)
    mine = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

    async def send() -> None:
        token = await asyncio.to_thread(cluster.token, "alice")
        async with Client(cluster.url, token=token) as client:
            async for _ in await client.ask("x", agent="golden", trace=mine):
                pass

    asyncio.run(send())
    seen = shown(
        collector,
        "the message and the run",
        lambda seen: seen.of("edge.receive") and seen.of("invoke_agent golden"),
    )
    assert {span.trace_id for span in seen.spans} == {mine[3:35]}
    (receive,) = seen.of("edge.receive")
    assert receive.parent_id == mine[36:52]


@pytest.mark.parametrize("agent", ["failing", "clumsy"])
def test_a_failure_in_a_trace_that_is_not_sampled_is_seen_from_there_on(
    agent: str, traced: Traced
) -> None:
    cluster, collector = traced(0.0)
    events, _ = asyncio.run(ask(cluster, "x", agent))
    assert all(event.trace.endswith("-00") for event in events)
    seen = shown(
        collector,
        "the end of the run, delivered",
        lambda seen: (
            seen.of(f"invoke_agent {agent}")
            and seen.of("edge.deliver", sequence=events[-1].sequence)
        ),
    )
    (run,) = seen.of(f"invoke_agent {agent}", upgraded=True)
    assert run.failed is (agent == "failing")
    failed = run if agent == "failing" else seen.of("execute_tool look_up")[0]
    assert failed.failed and failed.attributes[names.ERROR_TYPE] in ("RuntimeError", "ValueError")
    # What came before it is not there.
    kinds = {span.attributes.get(names.EVENT_TYPE) for span in seen.spans} - {None}
    told = ["agent_completed"] if agent == "failing" else ["tool_completed", "agent_completed"]
    assert set(told) <= kinds and not kinds & {"agent_started", "agent_thinking"}


def test_a_run_without_a_failure_in_a_trace_that_is_not_sampled_leaves_no_span(
    traced: Traced,
) -> None:
    cluster, collector = traced(0.0)
    asyncio.run(ask(cluster, "x", "golden"))
    asyncio.run(ask(cluster, "x", "failing"))
    seen = shown(collector, "the run that failed", lambda seen: seen.of("invoke_agent failing"))
    assert not seen.of("invoke_agent golden") and not seen.of("edge.receive")


def test_a_violation_is_always_recorded(traced: Traced) -> None:
    cluster, collector = traced(0.0)

    async def offend() -> None:
        token = await asyncio.to_thread(cluster.token, "alice")
        async with aiohttp.ClientSession() as session:
            async with await open_tab(session, cluster.url, token) as tab:
                await tab.socket.send_json(
                    {"type": "user_message", "id": "m", "content": "x", "user_id": "bob"}
                )
                assert (await tab.socket.receive_json(timeout=5))["type"] == "error"

    asyncio.run(offend())
    seen = shown(collector, "the violation", lambda seen: seen.of("violation"))
    (violation,) = seen.of("violation")
    assert violation.failed and violation.service == EDGE
    assert violation.attributes[names.KIND] == "foreign_user"
    wait_for(lambda: "foreign_user" in cluster.steward("violations").stdout, 10, "the record")
    listed = cluster.steward("violations", "--json").stdout
    assert violation.trace_id in listed


def test_a_resumed_connection_is_joined_with_what_it_missed(traced: Traced) -> None:
    cluster, collector = traced(1.0)
    events, _ = asyncio.run(ask(cluster, "x", "golden"))
    after = StreamPosition(events[0].stream_id, events[0].sequence)

    async def come_again() -> None:
        token = await asyncio.to_thread(cluster.token, "alice")
        async with Client(cluster.url, token=token, after=after) as client:
            assert (await anext(client)).sequence == after.sequence + 1

    asyncio.run(come_again())
    seen = shown(
        collector,
        "the resume, below its connection",
        lambda seen: any(seen.parent(resume) for resume in seen.of("edge.resume")),
    )
    (resume,) = seen.of("edge.resume")
    assert {why[names.LINK] for _, _, why in resume.links} == {"resume"}
    assert {trace for trace, _, _ in resume.links} == {events[0].trace[3:35]}
    assert names_of(seen.parent(resume)) == (EDGE, "edge.connect")  # type: ignore[arg-type]


# A planned move is recorded only where something of it is sampled.
@pytest.mark.parametrize("cause, ratio", [("failover", 0.0), ("failover", 1.0), ("handoff", 1.0)])
def test_a_run_that_goes_on_elsewhere_is_joined_with_the_take_over(
    cause: str, ratio: float, traced: Traced
) -> None:
    cluster, collector = traced(ratio)

    async def move() -> str:
        token = await asyncio.to_thread(cluster.token, "alice")
        async with aiohttp.ClientSession() as session:
            tab = await open_tab(session, cluster.url, token)
            await tab.send("m1", "x", agent="counting")
            for _ in range(3):
                await tab.until("agent_text", 10)
            how = signal.SIGKILL if cause == "failover" else signal.SIGTERM
            await asyncio.to_thread(cluster.kill, tab.ready["manager"]["node_id"], how)
            await tab.until("manager_moved", 15)
            ended = await tab.until("agent_completed", 30)
            await tab.close()
            assert ended["data"]["outcome"] == "success"
            return str(ended["trace"])

    trace = asyncio.run(move())
    seen = shown(
        collector, "the second execution", lambda seen: seen.of("invoke_agent counting", attempt=2)
    )
    (again,) = seen.of("invoke_agent counting", attempt=2)
    assert again.trace_id == trace[3:35]
    assert bool(again.attributes.get(names.UPGRADED)) is not bool(ratio)
    (taken_over,) = seen.of("manager.activate", cause=cause)
    assert {trace_id for trace_id, _, _ in taken_over.links} == {trace[3:35]}
    assert seen.linked(again, cause) == {(AGENT, "manager.activate")}
    # The edge looked for the manager anew, in a trace of its own; of one that is not sampled that
    # is kept only if it heard of the fencing before the registry had an answer for it.
    searched = seen.of("edge.reattach")
    assert searched or not ratio
    for span in searched if ratio else ():
        assert seen.linked(span, span.attributes[names.CAUSE]) == {(EDGE, "edge.connect")}


@pytest.mark.parametrize("content", [False, True])
def test_what_users_and_agents_wrote_is_recorded_only_when_it_is_wanted(
    content: bool, traced: Traced
) -> None:
    cluster, collector = traced(1.0, AGENT_TRACE_CONTENT=str(content).lower())
    canary = "canary-4f1d9c"
    asyncio.run(ask(cluster, canary, "golden"))
    seen = shown(collector, "the run", lambda seen: seen.of("invoke_agent golden"))
    shown(collector, "the last event", lambda seen: seen.of("append agent_completed"))
    found = {key for s in seen.spans for key, value in s.attributes.items() if canary in str(value)}
    assert found == (set(names.CONTENT) if content else set())
    raw = b"".join(spans.SerializeToString() for spans in collector.received)
    assert (canary.encode() in raw) is content


def test_without_an_endpoint_no_event_is_marked_as_sampled(cluster: LocalCluster) -> None:
    events, _ = asyncio.run(ask(cluster, "Which region sold the most?", "demo"))
    assert all(event.trace.endswith("-00") for event in events)
