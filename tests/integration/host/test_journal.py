"""What a later attempt is given: all of what this run has stored, and nothing of another."""

import asyncio
import itertools
from typing import Any

import orjson
import pytest

from agent_service.core.effects import StartRun
from agent_service.core.journal import Append, Seal, StoredEvent
from agent_service.host import journal as journal_module
from agent_service.host.journal import JournalUnreadable, read_journal
from agent_service.host.run_starts import RunStarts
from agent_service.host.turn import Turn
from agent_service.log.memory import MemoryLog
from agent_service.log.port import EventPage, ReadRange
from steward.model.keys import Epoch, RunId, Sequence, ThreadId, UserKey
from steward.model.verbs import RunKey, RunStart, VerbsAcknowledged

ALICE = UserKey("default", "alice")
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


class Stream:
    """A stream of events of several runs, in a real log."""

    def __init__(self, log: MemoryLog) -> None:
        self.log = log
        self.numbers = itertools.count(1)
        self.next = 1
        log.state.seal(Seal(ALICE, Epoch(5), "a"))

    def put(self, run_id: str, type: str, thread: str = "main", **data: Any) -> None:
        event = {"type": type, "run_id": run_id, "data": data}
        stored = StoredEvent(orjson.dumps(event), thread)
        append = Append(ALICE, Epoch(5), next(self.numbers), Sequence(self.next), (stored,), ())
        self.log.state.append(append)
        self.next += 1


def start(run_id: str, since: int, until: int, *steps: tuple[str, bytes]) -> StartRun:
    key = RunKey(ALICE, Epoch(6), RunId(run_id))
    return StartRun(
        key, "a", ThreadId("main"), b'"x"', 2, TRACE, Sequence(until), Sequence(since), steps
    )


@pytest.mark.asyncio
@pytest.mark.parametrize("page", [1, 2, 250])
async def test_a_journal_is_this_runs_events_in_order_over_all_pages(
    page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "PAGE_EVENTS", page)
    stream = Stream(MemoryLog())
    stream.put("r1", "user_message")
    stream.put("r1", "agent_started")
    stream.put("r2", "user_message")  # It waits behind the first.
    stream.put("r1", "agent_text", delta="of the first")
    stream.put("r1", "agent_completed")
    stream.put("r2", "agent_started")
    stream.put("r3", "agent_text", thread="side", delta="of a third")
    stream.put("r2", "agent_thinking", thought="t", delta=False)
    stream.put("r2", "agent_text", delta="mine")
    stream.put("r2", "agent_text", delta="of a zombie, after the start of this attempt")
    found = await read_journal(stream.log, ALICE, start("r2", 3, 9, ("s.1", b"7")))
    assert [(entry.type, orjson.loads(entry.data)) for entry in found.events] == [
        ("agent_thinking", {"thought": "t", "delta": False}),
        ("agent_text", {"delta": "mine"}),
    ]
    assert dict(found.steps) == {"s.1": b"7"}


@pytest.mark.asyncio
@pytest.mark.parametrize("bound", ["MOST_EVENTS", "MOST_BYTES"])
async def test_a_journal_that_is_too_long_is_a_clear_failure(
    bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, bound, 3)
    stream = Stream(MemoryLog())
    stream.put("r1", "user_message")
    for _ in range(5):
        stream.put("r1", "agent_text", delta="x")
    with pytest.raises(JournalUnreadable, match="more than can be read back"):
        await read_journal(stream.log, ALICE, start("r1", 1, 6))


class CompactedLog(MemoryLog):
    """A log that has let go of its first two events."""

    async def read(self, user: UserKey, wanted: ReadRange) -> EventPage:
        page = await super().read(user, wanted)
        return EventPage(page.stream_id, (), (), page.head, 3, False)


@pytest.mark.asyncio
async def test_a_journal_without_its_beginning_is_a_clear_failure() -> None:
    stream = Stream(CompactedLog())
    stream.put("r1", "user_message")
    with pytest.raises(JournalUnreadable, match="not kept"):
        await read_journal(stream.log, ALICE, start("r1", 1, 5))


class Loop:
    """Where runs go; tells a listener in the next turn of the loop."""

    def __init__(self) -> None:
        self.started: list[RunKey] = []
        self.cancelled: list[RunKey] = []
        self.on_start: Any = None

    def start_run(self, start: RunStart) -> None:
        self.started.append(start.key)
        if self.on_start is not None:
            asyncio.get_running_loop().call_soon(self.on_start, start.key)

    def cancel_run(self, key: RunKey) -> None:
        self.cancelled.append(key)

    def acknowledge(self, acknowledged: list[VerbsAcknowledged]) -> None:
        """Nothing waits here."""


@pytest.mark.asyncio
@pytest.mark.parametrize("when", ["while it is prepared", "right after its start"])
async def test_a_run_that_is_stopped_around_its_start_does_not_go_on(node: Any, when: str) -> None:
    await node.attached(7)
    live = node.host._live[ALICE]
    failures: list[BaseException] = []
    starts = RunStarts(MemoryLog(), Turn(lambda: False), lambda *_: None, failures.append)
    runs = Loop()
    starts.use(runs)
    effect = StartRun(
        RunKey(ALICE, Epoch(7), RunId("r1")), "a", ThreadId("main"), b'"x"', 1, TRACE, Sequence(0)
    )
    if when == "right after its start":
        runs.on_start = starts.stop
    starts.start(live, effect)
    if when == "while it is prepared":
        starts.stop(effect.key)
    for _ in range(10):
        await asyncio.sleep(0)
    assert runs.started == runs.cancelled
    assert failures == []
    await starts.close()
