"""Old events go, whichever engine holds them: the last append of each user stays."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from agent_service.core.journal import (
    Append,
    Committed,
    Record,
    RecordKind,
    Seal,
    Sealed,
    StoredEvent,
)
from agent_service.log.port import LogEngine, ReadRange
from steward.model.keys import Epoch, Sequence, UserKey

pytestmark = pytest.mark.asyncio

USERS = [UserKey(f"t{n % 3}", f"u{n}") for n in range(300)]
ALICE = USERS[0]


@pytest_asyncio.fixture(params=["sqlite", "postgres", "pgbouncer"])
async def rig(request: pytest.FixtureRequest, tmp_path: Path, engine_rig) -> AsyncIterator:
    rig = engine_rig(request.param)
    await rig.start()
    yield rig
    await rig.stop()


def append(user: UserKey, number: int, first: int, *texts: str, threads: int = 1) -> Append:
    events = tuple(
        StoredEvent(text.encode(), f"thread-{at % threads}") for at, text in enumerate(texts)
    )
    return Append(user, Epoch(1), number, Sequence(first), events, ())


async def seal_all(log: LogEngine, users: list[UserKey], epoch: int = 1) -> list[Sealed]:
    seals = [log.seal(Seal(user, Epoch(epoch), f"a{epoch}")) for user in users]
    outcomes = await asyncio.gather(*seals)
    assert all(isinstance(outcome, Sealed) for outcome in outcomes)
    return outcomes


async def write_all(log: LogEngine, users: list[UserKey], *arguments, **named) -> None:
    outcomes = await asyncio.gather(
        *(log.append(append(user, *arguments, **named)) for user in users)
    )
    assert all(isinstance(outcome, Committed) for outcome in outcomes)


async def moment() -> int:
    """A wall time after all that was written, and before all that will be."""
    await asyncio.sleep(0.005)  # Clocks of both sides tick in milliseconds.
    now = time.time_ns() // 1_000_000
    await asyncio.sleep(0.005)
    return now


async def sweep(log: LogEngine, before_ms: int) -> tuple[int, int]:
    """Events removed by a whole sweep, and its steps."""
    removed = steps = after = 0
    while True:
        step = await log.compact(before_ms, after)
        removed += step.removed
        steps += 1
        if step.after is None:
            return removed, steps
        assert step.after > after
        after = step.after


async def page(log: LogEngine, user: UserKey, **wanted):
    return await log.read(user, ReadRange(**wanted))


async def test_events_of_before_go_and_later_ones_stay(rig) -> None:
    log = rig.log
    await seal_all(log, USERS)
    await write_all(log, USERS, 1, 1, "1", "2")
    before = await moment()
    await write_all(log, USERS[:200], 2, 3, "3")
    removed, steps = await sweep(log, before)
    assert removed == 2 * 200 and steps > 2, "in steps"
    read = await page(log, ALICE)
    assert (read.events, read.sequences) == ((b"3",), (3,))
    assert (read.oldest_sequence, read.head) == (3, 3)
    assert (await log.describe()).events == 200 + 2 * 100


async def test_the_last_append_of_a_user_stays_however_old_it_is(rig) -> None:
    log = rig.log
    await seal_all(log, USERS[:2])
    await write_all(log, USERS[:2], 1, 1, "1", "2", "3")
    await write_all(log, USERS[:2], 2, 4, "4", "5", "6", threads=2)
    assert (await sweep(log, await moment()))[0] == 6
    for _ in range(2):
        read = await page(log, ALICE)
        assert (read.sequences, read.oldest_sequence, read.head) == ((4, 5, 6), 4, 6)
        await rig.crash()
        log = rig.log
    assert (await sweep(log, await moment()))[0] == 0, "nothing is left to go"
    # Who writes on goes on where the stream was, and what was kept may go then.
    assert await log.append(append(ALICE, 3, 7, "7")) == Committed(Sequence(8))
    assert (await sweep(log, await moment()))[0] == 3
    (sealed,) = await seal_all(log, [ALICE], epoch=2)
    assert (sealed.oldest_sequence, sealed.next_sequence) == (7, 8)


async def test_an_append_that_was_the_last_goes_with_the_others_when_a_newer_one_is_there(
    rig,
) -> None:
    """Also where the newest chunks are found elsewhere than those of before."""
    await seal_all(rig.log, [ALICE])
    for number in range(1, 17):
        await write_all(rig.log, [ALICE], number, number, str(number))
    before = await moment()
    await write_all(rig.log, [ALICE], 17, 17, "17")
    assert (await sweep(rig.log, before))[0] == 16
    assert (await page(rig.log, ALICE)).sequences == (17,)


async def test_a_seal_after_a_sweep_knows_the_new_beginning(rig) -> None:
    await seal_all(rig.log, [ALICE])
    for number in range(1, 5):
        await write_all(rig.log, [ALICE], number, number, str(number))
    await sweep(rig.log, await moment())
    for epoch in (2, 3):
        (sealed,) = await seal_all(rig.log, [ALICE], epoch)
        assert (sealed.oldest_sequence, sealed.next_sequence) == (4, 5)
        await rig.crash()


async def test_records_and_threads_are_not_events_and_stay(rig) -> None:
    await seal_all(rig.log, [ALICE])
    run = Record(RecordKind.RUN, "r1", b"{}")
    thread = Record(RecordKind.THREAD, "main", b'{"title":"t","sequence":1,"updated_at":"x"}')
    event = StoredEvent(b"1", "main")
    await rig.log.append(Append(ALICE, Epoch(1), 1, Sequence(1), (event,), (run, thread)))
    await write_all(rig.log, [ALICE], 2, 2, "2")
    assert (await sweep(rig.log, await moment()))[0] == 1
    assert (await rig.log.open_runs(None, 10)).users == (ALICE,)
    assert [t.thread_id for t in (await rig.log.threads(ALICE, 10, ""))[0]] == ["main"]
    (sealed,) = await seal_all(rig.log, [ALICE], epoch=2)
    assert [record.key for record in sealed.records] == ["r1"]


@pytest.mark.parametrize("newest", [False, True])
async def test_reads_across_the_new_beginning_give_what_is_left(rig, newest: bool) -> None:
    await seal_all(rig.log, [ALICE])
    for number in range(1, 41):
        if number == 31:
            before = await moment()
        await write_all(rig.log, [ALICE], number, number, str(number))
    await sweep(rig.log, before)
    read = await page(rig.log, ALICE, newest=newest)
    assert (read.sequences, read.oldest_sequence) == (tuple(range(31, 41)), 31)
    read = await page(rig.log, ALICE, after=5, until=20, newest=newest)
    assert (read.events, read.oldest_sequence, read.head) == ((), 31, 40)
    read = await page(rig.log, ALICE, thread_id="thread-0", limit=3, newest=newest)
    assert read.sequences == ((38, 39, 40) if newest else (31, 32, 33))


async def test_writers_and_readers_go_on_while_a_sweep_runs(rig) -> None:
    """Nothing is lost or repeated from the beginning that a page names."""
    log = rig.log
    users = USERS[:20]
    await seal_all(log, users)
    stop = False
    written = dict.fromkeys(users, 0)

    async def write(user: UserKey) -> None:
        while not stop:
            number = written[user] + 1
            outcome = await log.append(append(user, number, number, str(number)))
            assert outcome == Committed(Sequence(number + 1))
            written[user] = number

    async def read(user: UserKey) -> None:
        while not stop:
            head = written[user]
            read = await page(log, user, limit=1000)
            assert read.head >= head
            assert list(read.sequences) == list(range(read.oldest_sequence, read.head + 1))
            assert [int(payload) for payload in read.events] == list(read.sequences)

    tasks = [asyncio.create_task(do(user)) for user in users for do in (write, read)]
    removed = 0
    ends = time.monotonic() + 1.5
    while time.monotonic() < ends:
        removed += (await sweep(log, await moment()))[0]
    stop = True
    await asyncio.gather(*tasks)
    assert removed > 100
    assert (await log.describe()).events == sum(written.values()) - removed
