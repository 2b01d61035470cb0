"""What every event log does: the one suite that each engine and adapter passes."""

import asyncio
import json

import pytest

from agent_service.core.journal import (
    Append,
    Committed,
    Conflict,
    Fenced,
    Record,
    RecordKind,
    Seal,
    Sealed,
    StoredEvent,
)
from agent_service.log.port import EventLog, EventPage, ReadRange
from steward.errors import Reason, StewardError
from steward.model.keys import Epoch, Sequence, UserKey

ALICE = UserKey("default", "alice")
pytestmark = pytest.mark.asyncio


def event(text: str, thread_id: str = "main", conversation: bool = False) -> StoredEvent:
    return StoredEvent(text.encode(), thread_id, conversation)


def thread(thread_id: str, sequence: int, title: str = "") -> Record:
    value = {"title": title or thread_id, "sequence": sequence, "updated_at": f"t{sequence}"}
    return Record(RecordKind.THREAD, thread_id, json.dumps(value).encode())


class Writer:
    """A manager as the log sees it: seals once, then numbers its appends."""

    def __init__(
        self, rig, user: UserKey = ALICE, epoch: int = 1, activation: str = "first"
    ) -> None:
        self.rig = rig
        self.seal_request = Seal(user, Epoch(epoch), activation)
        self.number = 0
        self.next = 0

    async def seal(self) -> Sealed:
        sealed = await self.rig.log.seal(self.seal_request)
        assert isinstance(sealed, Sealed), sealed
        self.number = sealed.last_append_number
        self.next = sealed.next_sequence
        return sealed

    def request(self, *events: StoredEvent, records: tuple[Record, ...] = ()) -> Append:
        seal = self.seal_request
        return Append(seal.user, seal.epoch, self.number + 1, Sequence(self.next), events, records)

    async def write(self, *events: StoredEvent, records: tuple[Record, ...] = ()) -> Append:
        """Append and be sure that it was committed."""
        request = self.request(*events, records=records)
        outcome = await self.rig.log.append(request)
        assert outcome == Committed(Sequence(self.next + len(events)))
        self.number += 1
        self.next += len(events)
        return request


async def sealed_writer(
    rig, user: UserKey = ALICE, epoch: int = 1, activation: str = "first"
) -> Writer:
    writer = Writer(rig, user, epoch, activation)
    await writer.seal()
    return writer


async def texts(log: EventLog, wanted: ReadRange | None = None, user: UserKey = ALICE) -> list[str]:
    page = await log.read(user, wanted or ReadRange())
    return [payload.decode() for payload in page.events]


async def test_first_seal_starts_an_empty_stream(rig) -> None:
    sealed = await Writer(rig).seal()
    assert sealed.stream_id
    assert (sealed.next_sequence, sealed.oldest_sequence) == (1, 1)
    assert (sealed.records, sealed.last_append_number) == ((), 0)


async def test_events_are_read_in_the_order_of_their_appends(rig) -> None:
    writer = await sealed_writer(rig)
    await writer.write(event("1"))
    await writer.write(event("2"), event("3", "other"), event("4"))
    await writer.write(event("5"))
    page = await rig.log.read(ALICE, ReadRange())
    assert page.events == (b"1", b"2", b"3", b"4", b"5")
    assert page.sequences == (1, 2, 3, 4, 5)
    assert (page.head, page.oldest_sequence, page.more) == (5, 1, False)


async def test_what_is_submitted_together_is_told_together_and_in_its_order(rig) -> None:
    users = [UserKey("default", name) for name in ("ann", "ben", "cem")]
    writers = [await sealed_writer(rig, user) for user in users]
    appends = [writer.request(event("1")) for writer in writers]
    stale = writers[1].request(event("2"))._replace(expected_sequence=Sequence(9))
    told: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    rig.log.submit([appends[0], stale, appends[2]], 3, told.set_result)
    assert not told.done(), "never within the call"
    one, two = Committed(Sequence(2)), Conflict(Sequence(1))
    assert await asyncio.wait_for(told, 10) == [one, two, one]


async def test_payload_bytes_come_back_unchanged(rig) -> None:
    writer = await sealed_writer(rig)
    payloads = (b"", bytes(range(256)), "é漢\U0001f600".encode(), b"x" * 100_000)
    await writer.write(*(StoredEvent(payload, "main") for payload in payloads))
    assert (await rig.log.read(ALICE, ReadRange())).events == payloads


async def test_user_never_sealed_reads_as_empty(rig) -> None:
    assert await rig.log.read(ALICE, ReadRange()) == EventPage("", (), (), 0, 1, False)
    assert await rig.log.threads(ALICE, 10, "") == ([], "")


async def test_stale_epoch_append_is_refused(rig) -> None:
    old = await sealed_writer(rig, epoch=3, activation="old")
    await old.write(event("1"))
    await sealed_writer(rig, epoch=5, activation="new")
    assert await rig.log.append(old.request(event("zombie"))) == Fenced(Epoch(5))
    assert await texts(rig.log) == ["1"]


async def test_higher_epoch_append_without_a_seal_is_refused(rig) -> None:
    writer = await sealed_writer(rig, epoch=3)
    writer.seal_request = Seal(ALICE, Epoch(4), "first")
    assert await rig.log.append(writer.request(event("1"))) == Fenced(Epoch(3))
    assert await texts(rig.log) == []


async def test_append_of_a_user_never_sealed_is_refused(rig) -> None:
    append = Append(ALICE, Epoch(1), 1, Sequence(1), (event("1"),), ())
    assert await rig.log.append(append) == Fenced(Epoch(0))


async def test_lower_epoch_seal_is_refused(rig) -> None:
    await sealed_writer(rig, epoch=5, activation="five")
    assert await rig.log.seal(Seal(ALICE, Epoch(4), "four")) == Fenced(Epoch(5))
    assert await rig.log.seal(Seal(ALICE, Epoch(4), "five")) == Fenced(Epoch(5))


async def test_same_epoch_under_another_activation_is_refused(rig) -> None:
    writer = await sealed_writer(rig, epoch=5, activation="five")
    assert await rig.log.seal(Seal(ALICE, Epoch(5), "another")) == Fenced(Epoch(5))
    await writer.write(event("1"))


async def test_repeated_seal_gets_the_same_answer(rig) -> None:
    writer = Writer(rig)
    sealed = await writer.seal()
    assert await rig.log.seal(writer.seal_request) == sealed
    await writer.write(event("1"))
    again = await rig.log.seal(writer.seal_request)
    assert isinstance(again, Sealed)
    assert (again.next_sequence, again.last_append_number) == (2, 1)


async def test_stream_identity_outlives_takeover_and_crash(rig) -> None:
    first = await Writer(rig, epoch=1).seal()
    second = await Writer(rig, epoch=2).seal()
    await rig.crash()
    third = await Writer(rig, epoch=3).seal()
    assert first.stream_id == second.stream_id == third.stream_id


async def test_new_activation_counts_its_appends_from_one(rig) -> None:
    old = await sealed_writer(rig, epoch=1)
    await old.write(event("1"))
    await old.write(event("2"))
    new = Writer(rig, epoch=2, activation="second")
    sealed = await new.seal()
    assert (sealed.next_sequence, sealed.last_append_number) == (3, 0)
    await rig.crash()
    await new.write(event("3"))
    assert await texts(rig.log) == ["1", "2", "3"]


async def test_fence_outlives_a_crash(rig) -> None:
    old = await sealed_writer(rig, epoch=4, activation="old")
    await sealed_writer(rig, epoch=7, activation="new")
    await rig.crash()
    assert await rig.log.append(old.request(event("zombie"))) == Fenced(Epoch(7))
    assert await rig.log.seal(Seal(ALICE, Epoch(7), "third")) == Fenced(Epoch(7))
    assert isinstance(await rig.log.seal(Seal(ALICE, Epoch(7), "new")), Sealed)


async def test_append_at_another_sequence_is_a_conflict(rig) -> None:
    writer = await sealed_writer(rig)
    await writer.write(event("1"), event("2"))
    for expected in (1, 2, 4, 5):
        append = Append(ALICE, Epoch(1), 2, Sequence(expected), (event("x"),), ())
        assert await rig.log.append(append) == Conflict(Sequence(3))
    assert await texts(rig.log) == ["1", "2"]


async def test_repeated_append_is_committed_and_written_once(rig) -> None:
    writer = await sealed_writer(rig)
    request = await writer.write(event("1"), event("2"))
    assert await rig.log.append(request) == Committed(Sequence(3))
    assert await texts(rig.log) == ["1", "2"]


@pytest.mark.parametrize("events", [(), (event("2"),)], ids=["records alone", "with events"])
async def test_repeated_append_is_recognised_after_a_crash(
    rig, events: tuple[StoredEvent, ...]
) -> None:
    writer = await sealed_writer(rig)
    await writer.write(event("1"))
    request = await writer.write(*events, records=(Record(RecordKind.STATE, "state", b'{"n": 1}'),))
    head = Sequence(2 + len(events))
    await rig.crash()
    assert await rig.log.append(request) == Committed(head)
    assert len(await texts(rig.log)) == head - 1
    again = await writer.seal()
    assert again.last_append_number == 2
    await writer.write(event("3"))


async def test_late_duplicate_of_records_alone_is_not_applied(rig) -> None:
    writer = await sealed_writer(rig)
    late = await writer.write(records=(Record(RecordKind.STATE, "state", b"old"),))
    await writer.write(records=(Record(RecordKind.STATE, "state", b"new"),))
    assert await rig.log.append(late) == Conflict(Sequence(1))
    await rig.crash()
    assert await rig.log.append(late) == Conflict(Sequence(1))
    assert [record.value for record in (await writer.seal()).records] == [b"new"]


async def test_append_number_that_skips_one_is_a_conflict(rig) -> None:
    await sealed_writer(rig)
    append = Append(ALICE, Epoch(1), 2, Sequence(1), (event("x"),), ())
    assert await rig.log.append(append) == Conflict(Sequence(1))


async def test_refused_append_writes_no_record(rig) -> None:
    writer = await sealed_writer(rig, epoch=2)
    record = Record(RecordKind.STATE, "state", b"{}")
    stale = Append(ALICE, Epoch(1), 1, Sequence(1), (), (record,))
    ahead = Append(ALICE, Epoch(2), 1, Sequence(9), (), (record,))
    assert await rig.log.append(stale) == Fenced(Epoch(2))
    assert await rig.log.append(ahead) == Conflict(Sequence(1))
    assert (await writer.seal()).records == ()


async def test_records_are_put_replaced_deleted_and_returned_at_the_next_seal(rig) -> None:
    writer = await sealed_writer(rig)
    await writer.write(
        event("1"),
        records=(
            Record(RecordKind.MESSAGE, "m1", b'{"run_id": "r1"}'),
            Record(RecordKind.RUN, "r1", b"open"),
            Record(RecordKind.RUN, "r2", b"queued"),
            Record(RecordKind.OWNER, "owner", b"n1"),
            thread("main", 1),
        ),
    )
    await writer.write(
        records=(
            Record(RecordKind.RUN, "r1", deleted=True),
            Record(RecordKind.RUN, "r2", b"open"),
            Record(RecordKind.RUN, "r3", b"queued"),
            Record(RecordKind.STATE, "state", b'{"a": 1}'),
            Record(RecordKind.STATE, "state", b'{"a": 2}'),
            Record(RecordKind.RUN, "absent", deleted=True),
        )
    )
    await rig.crash()
    sealed = await Writer(rig, epoch=2).seal()
    assert {(r.kind, r.key, r.value) for r in sealed.records} == {
        (RecordKind.MESSAGE, "m1", b'{"run_id": "r1"}'),
        (RecordKind.RUN, "r2", b"open"),
        (RecordKind.RUN, "r3", b"queued"),
        (RecordKind.STATE, "state", b'{"a": 2}'),
        (RecordKind.OWNER, "owner", b"n1"),
    }
    assert (await rig.log.describe()).open_runs == 2


def run_record(run_id: str, deleted: bool = False) -> Record:
    return Record(RecordKind.RUN, run_id, b"" if deleted else b"{}", deleted)


async def open_runs(rig, after: UserKey | None = None, limit: int = 500) -> tuple[list[str], bool]:
    page = await rig.log.open_runs(after, limit)
    return [user.user for user in page.users], page.more


async def test_a_user_is_listed_as_long_as_it_has_an_open_run(rig) -> None:
    assert await open_runs(rig) == ([], False)
    writer = await sealed_writer(rig)
    assert await open_runs(rig) == ([], False)
    await writer.write(event("1"), records=(run_record("r1"), run_record("r2")))
    assert await open_runs(rig) == (["alice"], False)
    await writer.write(records=(run_record("r1"),))
    await writer.write(event("2"), records=(run_record("r1", deleted=True),))
    assert await open_runs(rig) == (["alice"], False)
    await writer.write(records=(run_record("r2", deleted=True), run_record("r9", deleted=True)))
    assert await open_runs(rig) == ([], False)
    await writer.write(records=(run_record("r3"), run_record("r3", deleted=True)))
    assert await open_runs(rig) == ([], False)


async def test_only_run_records_make_an_open_run(rig) -> None:
    writer = await sealed_writer(rig)
    kinds = [kind for kind in RecordKind if kind not in (RecordKind.RUN, RecordKind.THREAD)]
    await writer.write(event("1"), records=tuple(Record(kind, "k", b"{}") for kind in kinds))
    assert await open_runs(rig) == ([], False)


async def test_a_refused_append_opens_no_run_and_ends_none(rig) -> None:
    old = await sealed_writer(rig)
    await old.write(event("1"), records=(run_record("r1"),))
    bob = await sealed_writer(rig, UserKey("default", "bob"))
    await sealed_writer(rig, epoch=2, activation="second")
    stale = old.request(event("2"), records=(run_record("r1", deleted=True),))
    assert await rig.log.append(stale) == Fenced(Epoch(2))
    bob.next += 1
    assert await rig.log.append(bob.request(records=(run_record("r2"),))) == Conflict(Sequence(1))
    assert await open_runs(rig) == (["alice"], False)


async def test_open_runs_come_in_pages_each_user_once_in_the_order_of_the_first_seals(rig) -> None:
    users = [UserKey("t" + str(i % 2), f"u{(i * 7) % 10}") for i in range(10)]
    for i, user in enumerate(users):
        writer = await sealed_writer(rig, user)
        records = tuple(run_record(f"r{n}") for n in range(1 + i % 3)) if i != 4 else ()
        await writer.write(event("1"), records=records)
    expected = [user for i, user in enumerate(users) if i != 4]
    found: list[UserKey] = []
    more, after = True, None
    while more:
        page = await rig.log.open_runs(after, 4)
        assert len(page.users) <= 4
        found.extend(page.users)
        more, after = page.more, page.users[-1]
    assert found == expected
    # A page may go on after a user who has no open run any more, or never had one.
    assert list((await rig.log.open_runs(users[4], 100)).users) == expected[4:]
    assert (await rig.log.open_runs(users[9], 100)).users == ()


async def test_open_runs_after_a_user_nobody_sealed_are_refused(rig) -> None:
    with pytest.raises(StewardError) as refused:
        await rig.log.open_runs(UserKey("default", "nobody"), 10)
    assert refused.value.reason is Reason.PROTOCOL_VIOLATION


async def test_fences_are_the_highest_sealed_epochs_and_those_of_nobody_are_missing(rig) -> None:
    bob, carol = UserKey("default", "bob"), UserKey("other\0 tenant", "carol")
    await sealed_writer(rig, epoch=3)
    await sealed_writer(rig, bob, epoch=4)
    await sealed_writer(rig, carol, epoch=5)
    await sealed_writer(rig, epoch=7, activation="second")
    assert await rig.log.seal(Seal(bob, Epoch(2), "late")) == Fenced(Epoch(4))
    nobody = UserKey("default", "nobody")
    asked = await rig.log.fences_of([carol, nobody, ALICE, carol])
    assert (dict(asked.fences), len(asked.fences)) == ({ALICE: 7, carol: 5}, 2)
    assert (await rig.log.fences_of([])).fences == ()
    page = await rig.log.fences(None, 1000)
    assert (page.fences, page.more) == (((ALICE, 7), (bob, 4), (carol, 5)), False)


async def test_fences_come_in_pages_in_the_order_of_the_first_seals(rig) -> None:
    users = [UserKey("t" + str(i % 2), f"u{(i * 7) % 10}") for i in range(10)]
    for i, user in enumerate(users):
        await sealed_writer(rig, user, epoch=i + 1)
    found: list[tuple[UserKey, int]] = []
    more, after = True, None
    while more:
        page = await rig.log.fences(after, 4)
        assert 1 <= len(page.fences) <= 4
        found.extend(page.fences)
        more, after = page.more, page.fences[-1][0]
    assert found == [(user, i + 1) for i, user in enumerate(users)]
    assert (await rig.log.fences(users[9], 4)).fences == ()
    with pytest.raises(StewardError) as refused:
        await rig.log.fences(UserKey("default", "nobody"), 10)
    assert refused.value.reason is Reason.PROTOCOL_VIOLATION
    with pytest.raises(StewardError) as refused:
        await rig.log.fences_of([UserKey("default", str(i)) for i in range(1001)])
    assert refused.value.reason is Reason.PROTOCOL_VIOLATION


async def test_fences_are_there_after_a_crash(rig) -> None:
    await sealed_writer(rig, epoch=3)
    await rig.crash()
    assert (await rig.log.fences_of([ALICE])).fences == ((ALICE, 3),)


async def test_open_runs_are_there_after_a_crash(rig) -> None:
    writer = await sealed_writer(rig)
    await writer.write(event("1"), records=(run_record("r1"),))
    bob = await sealed_writer(rig, UserKey("default", "bob"))
    await bob.write(event("1"), records=(run_record("r1"),))
    await bob.write(event("2"), records=(run_record("r1", deleted=True),))
    await rig.crash()
    assert await open_runs(rig) == (["alice"], False)


async def test_steps_are_returned_by_a_seal_until_they_are_deleted(rig) -> None:
    writer = await sealed_writer(rig)
    steps = tuple(Record(RecordKind.STEP, f"r1.{n}", b'{"result":%d}' % n) for n in range(3))
    await writer.write(event("1"), records=(run_record("r1"), *steps))
    sealed = await Writer(rig, epoch=2, activation="second").seal()
    assert sealed.records == (run_record("r1"), *steps)
    writer = await sealed_writer(rig, epoch=3, activation="third")
    gone = tuple(Record(RecordKind.STEP, step.key, deleted=True) for step in steps)
    await writer.write(event("2"), records=(run_record("r1", deleted=True), *gone))
    assert (await Writer(rig, epoch=4, activation="fourth").seal()).records == ()


async def test_record_deleted_and_put_in_one_append_stays(rig) -> None:
    writer = await sealed_writer(rig)
    await writer.write(records=(Record(RecordKind.RUN, "r", b"1"),))
    await writer.write(
        records=(Record(RecordKind.RUN, "r", deleted=True), Record(RecordKind.RUN, "r", b"2"))
    )
    assert [record.value for record in (await writer.seal()).records] == [b"2"]


async def test_many_records_are_returned_by_one_seal(rig) -> None:
    writer = await sealed_writer(rig)
    records = tuple(Record(RecordKind.MESSAGE, f"m{n}", b"v" * 100) for n in range(10_000))
    await writer.write(event("1"), records=records)
    await writer.write(records=tuple(Record(r.kind, r.key, deleted=True) for r in records[:700]))
    assert len((await writer.seal()).records) == 9_300


class Story:
    """Ten events of one user: two threads, conversation and not, several appends."""

    EVENTS = (
        event("1", "main", True),
        event("2"),
        event("3", "side", True),
        event("4"),
        event("5", "main", True),
        event("6", "side"),
        event("7", "side", True),
        event("8"),
        event("9", "main", True),
        event("10", "main", True),
    )
    CUTS = ((0, 1), (1, 3), (3, 4), (4, 9), (9, 10))

    @classmethod
    async def write(cls, rig) -> None:
        writer = await sealed_writer(rig)
        for begin, end in cls.CUTS:
            await writer.write(*cls.EVENTS[begin:end])


RANGES = [
    (ReadRange(), "1 2 3 4 5 6 7 8 9 10", False),
    (ReadRange(after=3), "4 5 6 7 8 9 10", False),
    (ReadRange(after=5), "6 7 8 9 10", False),
    (ReadRange(after=5, until=7), "6 7", False),
    (ReadRange(after=10), "", False),
    (ReadRange(after=99), "", False),
    (ReadRange(until=2), "1 2", False),
    (ReadRange(limit=3), "1 2 3", True),
    (ReadRange(limit=3, after=7), "8 9 10", False),
    (ReadRange(limit=3, until=3), "1 2 3", False),
    (ReadRange(limit=3, newest=True), "8 9 10", True),
    (ReadRange(limit=3, newest=True, until=6), "4 5 6", True),
    (ReadRange(limit=3, newest=True, after=7), "8 9 10", False),
    (ReadRange(newest=True), "1 2 3 4 5 6 7 8 9 10", False),
    (ReadRange(thread_id="side"), "3 6 7", False),
    (ReadRange(thread_id="side", after=3), "6 7", False),
    (ReadRange(thread_id="side", limit=1), "3", True),
    (ReadRange(thread_id="side", limit=1, newest=True), "7", True),
    (ReadRange(thread_id="absent"), "", False),
    (ReadRange(conversation=True), "1 3 5 7 9 10", False),
    (ReadRange(conversation=True, thread_id="main"), "1 5 9 10", False),
    (ReadRange(conversation=True, thread_id="main", limit=2, newest=True), "9 10", True),
    (ReadRange(conversation=True, thread_id="side", after=3), "7", False),
    (ReadRange(max_bytes=1), "1", True),
    (ReadRange(max_bytes=3), "1 2 3", True),
    (ReadRange(max_bytes=3, newest=True), "9 10", True),
    (ReadRange(max_bytes=1, newest=True), "10", True),
]


async def test_read_returns_the_asked_range(rig) -> None:
    await Story.write(rig)
    for wanted, found, more in RANGES:
        page = await rig.log.read(ALICE, wanted)
        assert [payload.decode() for payload in page.events] == found.split(), wanted
        assert [str(sequence) for sequence in page.sequences] == found.split(), wanted
        assert (page.head, page.more) == (10, more), wanted


async def test_pages_put_together_are_the_whole_stream(rig) -> None:
    writer = await sealed_writer(rig)
    for n in range(0, 60, 3):
        await writer.write(event(f"{n}"), event(f"{n + 1}"), event(f"{n + 2}"))
    seen: list[str] = []
    after = 0
    while True:
        page = await rig.log.read(ALICE, ReadRange(after=after, limit=7))
        seen += [payload.decode() for payload in page.events]
        if not page.more:
            break
        after = page.sequences[-1]
    assert seen == [str(n) for n in range(60)]


async def test_threads_are_listed_newest_first_in_pages(rig) -> None:
    writer = await sealed_writer(rig)
    await writer.write(event("1"), event("2"), records=(thread("a", 1), thread("b", 2)))
    await writer.write(event("3"), records=(thread("c", 3, "third"),))
    await writer.write(event("4"), records=(thread("a", 4, "a later title"),))
    first, following = await rig.log.threads(ALICE, 2, "")
    assert [(t.thread_id, t.title, t.sequence, t.updated_at) for t in first] == [
        ("a", "a", 4, "t4"),
        ("c", "third", 3, "t3"),
    ]
    second, end = await rig.log.threads(ALICE, 2, following)
    assert [t.thread_id for t in second] == ["b"]
    assert end == ""
    await writer.write(records=(Record(RecordKind.THREAD, "c", deleted=True),))
    assert [t.thread_id for t in (await rig.log.threads(ALICE, 9, ""))[0]] == ["a", "b"]


async def test_a_thread_keeps_the_title_of_its_first_record(rig) -> None:
    writer = await sealed_writer(rig)
    await writer.write(event("1"), records=(thread("a", 1, "first"),))
    await writer.write(event("2"), event("3"), records=(thread("a", 2, "x"), thread("a", 3, "y")))
    await writer.write(records=(Record(RecordKind.THREAD, "b", b'{"title":"","sequence":3}'),))
    await writer.write(records=(thread("b", 4, "named later"),))
    listed, _ = await rig.log.threads(ALICE, 9, "")
    assert [(t.thread_id, t.title, t.sequence) for t in listed] == [
        ("b", "named later", 4),
        ("a", "first", 3),
    ]


async def test_thread_page_that_no_listing_gave_is_refused(rig) -> None:
    await sealed_writer(rig)
    for page in ("x", "!!", "W10", "WyJhIiwgMV0", "bnVsbA", "é"):
        with pytest.raises(StewardError) as refused:
            await rig.log.threads(ALICE, 10, page)
        assert refused.value.reason is Reason.PROTOCOL_VIOLATION


TRICKY = [
    UserKey("a", "b/c"),
    UserKey("a/b", "c"),
    UserKey("a/b/c", "c"),
    UserKey("default", "alice"),
    UserKey("other", "alice"),
    UserKey("default", "Alice"),
    UserKey("default", "alice "),
    UserKey("default", "alice%"),
    UserKey("default", "é"),
    UserKey("default", "e\u0301"),
    UserKey("default", "\U0001f600' OR 1=1 --"),
    UserKey("default", "nul\x00a"),
    UserKey("default", "nul\x00b"),
]


async def test_no_user_sees_anything_of_another(rig) -> None:
    for n, user in enumerate(TRICKY):
        writer = await sealed_writer(rig, user, epoch=n + 1, activation=f"act-{n}")
        state = Record(RecordKind.STATE, "state", f"state-{n}".encode())
        await writer.write(event(f"of-{n}", f"t{n}"), records=(state, thread(f"t{n}", 1)))
    await rig.crash()
    streams = set()
    for n, user in enumerate(TRICKY):
        assert await texts(rig.log, user=user) == [f"of-{n}"]
        assert [t.thread_id for t in (await rig.log.threads(user, 10, ""))[0]] == [f"t{n}"]
        sealed = await rig.log.seal(Seal(user, Epoch(100), "new"))
        assert isinstance(sealed, Sealed)
        assert sealed.next_sequence == 2
        assert [record.value for record in sealed.records] == [f"state-{n}".encode()]
        streams.add(sealed.stream_id)
    assert len(streams) == len(TRICKY)


async def test_of_two_racing_activations_one_wins_and_the_other_is_fenced(rig) -> None:
    for round_ in range(20):
        user = UserKey("race", f"user-{round_}")
        epoch = Epoch(round_ + 1)
        outcomes = await asyncio.gather(
            rig.log.seal(Seal(user, epoch, "left")), rig.log.seal(Seal(user, epoch, "right"))
        )
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Fenced", "Sealed"]


async def test_seal_is_atomic_against_a_writer_in_full_flight(rig) -> None:
    """What the old manager got committed is in the new one's answer; nothing is after it."""
    for round_ in range(15):
        user = UserKey("race", f"user-{round_}")
        old = await sealed_writer(rig, user, epoch=1, activation="old")
        committed = 0
        enough = asyncio.Event()

        async def pump(
            old: Writer = old, enough: asyncio.Event = enough, least: int = 3 + round_ % 4
        ) -> None:
            nonlocal committed
            while True:
                outcome = await rig.log.append(
                    old.request(
                        event(f"{old.next}"),
                        records=(Record(RecordKind.STATE, "state", str(old.next).encode()),),
                    )
                )
                if outcome == Fenced(Epoch(2)):
                    return
                assert outcome == Committed(Sequence(old.next + 1))
                committed = old.next
                old.number += 1
                old.next += 1
                if committed >= least:
                    enough.set()
                await asyncio.sleep(0)

        pumping = asyncio.create_task(pump())
        await asyncio.wait_for(enough.wait(), 10)
        new = Writer(rig, user, epoch=2, activation="new")
        sealed = await new.seal()
        await asyncio.wait_for(pumping, 10)
        assert sealed.next_sequence == committed + 1
        assert [record.value for record in sealed.records] == [str(committed).encode()]
        await new.write(event("new"))
        page = await rig.log.read(user, ReadRange())
        assert page.head == committed + 1
        assert page.events[-1] == b"new"


async def test_many_users_in_flight_each_get_their_own_outcome(rig) -> None:
    writers = [Writer(rig, UserKey("many", f"u{n}"), epoch=2) for n in range(200)]
    await asyncio.gather(*(writer.seal() for writer in writers))
    for _ in range(3):
        bad = [
            Append(UserKey("many", f"u{n}"), Epoch(1), 1, Sequence(1), (event("bad"),), ())
            for n in range(0, 200, 5)
        ]
        written = asyncio.gather(*(w.write(event(str(w.next))) for w in writers))
        refused = await asyncio.gather(*(rig.log.append(append) for append in bad))
        await written
        assert set(refused) == {Fenced(Epoch(2))}
    for writer in writers:
        assert await texts(rig.log, user=writer.seal_request.user) == ["1", "2", "3"]


async def test_totals_describe_the_whole_log(rig) -> None:
    empty = await rig.log.describe()
    assert (empty.streams, empty.events, empty.largest_fence, empty.open_runs) == (0, 0, 0, 0)
    for n in range(3):
        writer = await sealed_writer(rig, UserKey("t", f"u{n}"), epoch=10 + n)
        await writer.write(event("1"), event("2"), records=(Record(RecordKind.RUN, "r", b"{}"),))
    full = await rig.log.describe()
    assert (full.streams, full.events, full.largest_fence, full.open_runs) == (3, 6, 12, 3)
    await rig.crash()
    after = await rig.log.describe()
    assert (after.streams, after.events, after.largest_fence, after.open_runs) == (3, 6, 12, 3)


MALFORMED = [
    Append(ALICE, Epoch(0), 1, Sequence(1), (), ()),
    Append(ALICE, Epoch(1 << 53), 1, Sequence(1), (), ()),
    Append(ALICE, Epoch(1), 0, Sequence(1), (), ()),
    Append(ALICE, Epoch(1), 1, Sequence(0), (), ()),
    Append(ALICE, Epoch(1), 1, Sequence(1 << 63), (), ()),
    Append(ALICE, Epoch(1), 1, Sequence(1), (StoredEvent(b"x" * (9 << 20), "main"),), ()),
    Append(ALICE, Epoch(1), 1, Sequence(1), (), (Record(RecordKind.THREAD, "t", b"[]"),)),
    Append(ALICE, Epoch(1), 1, Sequence(1), (), (Record(RecordKind.THREAD, "t", b"{"),)),
    # What can be read but not written again would stop the engine that has to.
    Append(
        ALICE,
        Epoch(1),
        1,
        Sequence(1),
        (),
        (Record(RecordKind.THREAD, "t", b'{"sequence":1,"x":' + b"[" * 300 + b"]" * 300 + b"}"),),
    ),
]


async def test_malformed_append_is_an_error_of_its_caller_alone(rig) -> None:
    writer = await sealed_writer(rig)
    for append in MALFORMED:
        with pytest.raises(ValueError):
            rig.log.append(append)
    await writer.write(event("1"))


async def test_close_is_safe_to_call_twice(rig) -> None:
    writer = await sealed_writer(rig)
    await writer.write(event("1"))
    await rig.log.close()
    assert await rig.log.close() is None


async def test_seal_returns_all_that_a_user_has_stored_however_much_it_is(rig) -> None:
    log, bob = rig.log, UserKey("default", "bob")
    # More than a gRPC message takes, and no trouble for another user of the same node.
    await log.seal(Seal(ALICE, Epoch(1), "a"))
    await log.seal(Seal(bob, Epoch(1), "b"))
    value = json.dumps("x" * 1024 * 1024).encode()
    steps = [Record(RecordKind.STEP, f"r/{number:02}", value) for number in range(40)]
    for number, first in enumerate(range(0, 40, 5), 1):
        append = Append(ALICE, Epoch(1), number, Sequence(1), (), tuple(steps[first : first + 5]))
        assert isinstance(await log.append(append), Committed)
    sealing = asyncio.ensure_future(log.seal(Seal(ALICE, Epoch(2), "c")))
    async with asyncio.timeout(10):
        append = Append(bob, Epoch(1), 1, Sequence(1), (event("hello"),), ())
        assert isinstance(await log.append(append), Committed)
        sealed = await sealing
    assert isinstance(sealed, Sealed)
    assert list(sealed.records) == steps
