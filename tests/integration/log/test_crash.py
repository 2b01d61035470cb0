"""A log process that is killed or breaks under load: nothing acknowledged is lost or doubled."""

import asyncio
import resource
import signal
from pathlib import Path

import pytest
from logprocess import eventually

from agent_service.core.journal import (
    Append,
    Committed,
    Record,
    RecordKind,
    Seal,
    Sealed,
    StoredEvent,
)
from agent_service.log.port import EventLog, ReadRange
from steward.model.keys import Epoch, Sequence, UserKey

pytestmark = pytest.mark.asyncio


class Appender:
    """One user's manager: appends one event after the other, and keeps what was acknowledged."""

    def __init__(self, log: EventLog, name: str, payload: bytes = b"") -> None:
        self._log = log
        self._payload = payload
        self.user = UserKey("crash", name)
        self.acknowledged: list[bytes] = []
        self.stopping = False

    async def run(self) -> None:
        sealed = await self._log.seal(Seal(self.user, Epoch(1), self.user.user))
        assert isinstance(sealed, Sealed)
        while not self.stopping:
            number = len(self.acknowledged) + 1
            payload = f"{self.user.user}:{number}".encode() + self._payload
            state = Record(RecordKind.STATE, "state", payload)
            append = Append(
                self.user,
                Epoch(1),
                number,
                Sequence(number),
                (StoredEvent(payload, "main"),),
                (state,),
            )
            outcome = await self._log.append(append)
            assert outcome == Committed(Sequence(number + 1))
            self.acknowledged.append(payload)

    async def stored(self) -> list[bytes]:
        events: list[bytes] = []
        while True:
            page = await self._log.read(self.user, ReadRange(after=len(events)))
            events += page.events
            if not page.more:
                return events


async def total_reaches(appenders: list[Appender], number: int) -> None:
    await eventually(lambda: sum(len(a.acknowledged) for a in appenders) >= number, 30)


async def test_kill_in_the_middle_of_load_loses_and_doubles_nothing(remote_rig) -> None:
    appenders = [Appender(remote_rig.log, f"u{n}") for n in range(60)]
    running = [asyncio.create_task(appender.run()) for appender in appenders]
    for round_ in range(1, 4):
        await total_reaches(appenders, 700 * round_)
        await remote_rig.child.end(signal.SIGKILL)
        assert not all(task.done() for task in running)
        await remote_rig.child.start()
    await total_reaches(appenders, 2800)
    for appender in appenders:
        appender.stopping = True
    await asyncio.wait_for(asyncio.gather(*running), 20)
    for appender in appenders:
        assert await appender.stored() == appender.acknowledged
        sealed = await remote_rig.log.seal(Seal(appender.user, Epoch(2), "next"))
        assert isinstance(sealed, Sealed)
        assert [record.value for record in sealed.records] == appender.acknowledged[-1:]


async def test_appends_are_pending_while_the_log_is_away_and_committed_when_it_is_back(
    remote_rig,
) -> None:
    log = remote_rig.remote
    user = UserKey("crash", "away")
    assert isinstance(await log.seal(Seal(user, Epoch(1), "a")), Sealed)
    await remote_rig.child.end()
    await eventually(lambda: not log.connected)
    assert "no stream to the log" in log.unready()
    append = Append(user, Epoch(1), 1, Sequence(1), (StoredEvent(b"1", "main"),), ())
    future = log.append(append)
    sealing = asyncio.ensure_future(log.seal(Seal(UserKey("crash", "new"), Epoch(1), "b")))
    done, _ = await asyncio.wait({future, sealing}, timeout=0.2)
    assert not done
    await remote_rig.child.start()
    assert await asyncio.wait_for(future, 5) == Committed(Sequence(2))
    assert isinstance(await asyncio.wait_for(sealing, 5), Sealed)
    assert log.unready() is None


async def test_read_waits_for_a_log_that_comes_back_within_its_deadline(remote_rig) -> None:
    await remote_rig.child.end()
    reading = asyncio.ensure_future(remote_rig.log.read(UserKey("crash", "nobody"), ReadRange()))
    await remote_rig.child.start()
    assert (await asyncio.wait_for(reading, 10)).head == 0


async def test_cancelled_waiter_does_not_undo_an_append(remote_rig) -> None:
    user = UserKey("crash", "cancelled")
    assert isinstance(await remote_rig.log.seal(Seal(user, Epoch(1), "a")), Sealed)
    append = Append(user, Epoch(1), 1, Sequence(1), (StoredEvent(b"1", "main"),), ())
    remote_rig.log.append(append).cancel()
    assert await remote_rig.log.append(append) == Committed(Sequence(2))
    assert (await remote_rig.log.read(user, ReadRange())).events == (b"1",)


async def test_write_error_ends_the_process_and_nothing_acknowledged_is_lost(
    remote_rig, tmp_path: Path
) -> None:
    """The kernel refuses to let the files grow: the process must end with 1, as if killed."""
    child = remote_rig.child
    appenders = [Appender(remote_rig.log, f"u{n}", b"x" * 2000) for n in range(20)]
    running = [asyncio.create_task(appender.run()) for appender in appenders]
    await total_reaches(appenders, 100)
    limit = (tmp_path / "events.db-wal").stat().st_size + 500_000
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (limit, limit))
    process = child.process
    assert await asyncio.wait_for(process.wait(), 30) == 1
    assert "event log failed" in await child.errors()
    acknowledged = sum(len(appender.acknowledged) for appender in appenders)
    await child.start()
    await total_reaches(appenders, acknowledged + 100)
    for appender in appenders:
        appender.stopping = True
    await asyncio.wait_for(asyncio.gather(*running), 20)
    for appender in appenders:
        assert await appender.stored() == appender.acknowledged
