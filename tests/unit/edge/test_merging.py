"""Deltas merged for a client that is behind: whole texts, in order, bounded; only true neighbours.

First the `Backlog` alone, then `MergingConnection` on a model of a transport, which takes
bytes when the test says so, tells its protocol to pause over the high mark, and to go on
when it is nearly empty.
"""

import asyncio
from collections import defaultdict
from typing import Any, cast

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.core.backlog import MOST_MERGED_BYTES, Backlog, merged
from edge.core.batch import EventBatch
from edge.core.frames import CLOSE, TEXT
from edge.core.resume import ResumePoint, StreamHead
from edge.core.server_messages import Limits
from edge.core.session import EdgeSession, SessionState
from edge.core.session_values import End, PageRead, ReadPage, SessionStart, StreamAttached
from edge.host.connection import Owner
from edge.host.flush import Flusher
from edge.host.merging import MergingConnection
from edge.host.wheel import TimerWheel
from steward.client.checks import StreamChecker
from steward.errors import Reason
from steward.model.keys import ConnectionId, Epoch, NodeId, StreamId, UserKey
from steward.runtime.clock import boot_ms

STREAM = StreamId("s1")


def event(sequence: int, kind: str = "agent_text", **changes: Any) -> bytes:
    """An event as a manager writes it."""
    data = {"message_id": changes.pop("message", "r1.m1"), "delta": changes.pop("delta", "x")}
    envelope = {
        "type": kind,
        "stream_id": STREAM,
        "sequence": sequence,
        "epoch": changes.pop("epoch", 7),
        "event_id": f"e{sequence}-7",
        "thread_id": "main",
        "run_id": changes.pop("run", "r1"),
        "agent": "demo",
        "time": f"2026-11-23T21:00:00.{sequence % 1000:03d}Z",
        "trace": changes.pop("trace", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"),
        "data": data if kind == "agent_text" else {"name": "n", "value": sequence},
    }
    return orjson.dumps(envelope | changes)


def texts(items: list[EventBatch | bytes]) -> list[bytes]:
    found: list[bytes] = []
    for item in items:
        found.extend([item] if isinstance(item, bytes) else item.events)
    return found


def through(*events: bytes, first: int = 1, most: int = MOST_MERGED_BYTES) -> list[dict[str, Any]]:
    """What a client that is behind gets of these events."""
    return [
        orjson.loads(text)
        for batch in merged(EventBatch(first, events), most)
        for text in batch.events
    ]


# ---- what merges


def test_adjacent_deltas_become_one_event_of_the_last_with_the_sequence_of_the_first() -> None:
    (one,) = through(event(1, delta="Nor"), event(2, delta="th "), event(3, delta='"1"'))
    expected = orjson.loads(event(3, delta='North "1"'))
    assert one == expected | {"from_sequence": 1}
    assert list(one)[:4] == ["type", "stream_id", "sequence", "from_sequence"]


def test_a_delta_alone_stays_byte_for_byte_what_it_was() -> None:
    text = event(5, delta="caf\u00e9").replace(b'"data":', b'"data": ')
    (batch,) = merged(EventBatch(5, [text]), MOST_MERGED_BYTES)
    assert (batch.first, list(batch.events)) == (5, [text])


def test_deltas_of_several_batches_merge() -> None:
    backlog = Backlog(MOST_MERGED_BYTES)
    for sequence in range(1, 5):
        backlog.add(EventBatch(sequence, [event(sequence, delta=str(sequence))]))
    (batch,) = backlog.take(1)
    assert isinstance(batch, EventBatch) and batch.first == batch.last == 4
    one = orjson.loads(batch.events[0])
    assert (one["data"]["delta"], one["from_sequence"]) == ("1234", 1)
    assert not backlog and backlog.size == 0


def test_server_sent_events_name_the_last_sequence_of_a_merged_event() -> None:
    (batch,) = merged(EventBatch(1, [event(1), event(2)]), MOST_MERGED_BYTES)
    assert batch.text(STREAM).startswith(b"id: s1:2\n")


@pytest.mark.parametrize(
    "change",
    [
        {"message": "r1.m2"},
        {"run": "r2"},
        {"epoch": 8},
        {"trace": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"},
        {"thread_id": "other"},
        {"agent": "other"},
        {"parent_run_id": "r0"},
        {"stream_id": "s2"},
        {"novelty": 1},
        {"data": {"message_id": "r1.m1", "delta": "b", "novelty": 1}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_deltas_that_differ_in_anything_else_do_not_merge(change: dict[str, Any]) -> None:
    events = [event(1, delta="a"), event(2, delta="b", **change)]
    assert texts(list(merged(EventBatch(1, events), MOST_MERGED_BYTES))) == events


def test_nothing_merges_across_another_event() -> None:
    events = [event(1), event(2, "custom"), event(3)]
    assert texts(list(merged(EventBatch(1, events), MOST_MERGED_BYTES))) == events


def test_nothing_merges_across_a_frame_of_the_edge() -> None:
    backlog = Backlog(MOST_MERGED_BYTES)
    backlog.add(EventBatch(1, [event(1)]))
    backlog.add_frame(b"pong")
    backlog.add(EventBatch(2, [event(2)]))
    assert texts(backlog.take(10_000)) == [event(1), b"pong", event(2)]


def test_nothing_merges_across_a_hole() -> None:
    backlog = Backlog(MOST_MERGED_BYTES)
    backlog.add(EventBatch(1, [event(1)]))
    backlog.add(EventBatch(3, [event(3)]))
    assert texts(backlog.take(10_000)) == [event(1), event(3)]


@pytest.mark.parametrize(
    "odd",
    [
        b'{"type":"agent_text"',
        b'{"type":"agent_text","sequence":1}',
        event(1).replace(b'"delta":"x"', b'"delta":5'),
        event(1).replace(b'"delta":"x"', b'"delta":"\\ud800"'),
        event(1, data=[]),
        event(1, data="delta"),
        event(9),
        b" " + event(1),
    ],
)
def test_an_event_that_is_not_what_it_has_to_be_passes_as_it_is(odd: bytes) -> None:
    events = [odd, event(2), event(3)]
    first, rest = merged(EventBatch(1, events), MOST_MERGED_BYTES)
    assert list(first.events) == [odd] and orjson.loads(rest.events[0])["from_sequence"] == 2


def test_what_was_taken_grows_no_more() -> None:
    backlog = Backlog(MOST_MERGED_BYTES)
    backlog.add(EventBatch(1, [event(1), event(2)]))
    backlog.take(1)
    backlog.add(EventBatch(3, [event(3)]))
    assert texts(backlog.take(1)) == [event(3)]


def test_what_grows_is_taken_last_and_grows_while_it_waits() -> None:
    backlog = Backlog(MOST_MERGED_BYTES)
    backlog.add(EventBatch(1, [event(1, "custom"), event(2)]))
    assert texts(backlog.take(1)) == [event(1, "custom")]
    backlog.add(EventBatch(3, [event(3)]))
    (text,) = texts(backlog.take(1))
    assert orjson.loads(text)["from_sequence"] == 2


# ---- bounds


def test_a_merged_event_stays_within_its_bound_and_a_longer_one_passes_as_it_is() -> None:
    long = event(1, delta="y" * 3000)
    got = merged(
        EventBatch(1, [long, *(event(n, delta="\u00fc" * 9) for n in range(2, 400))]), 2000
    )
    sizes = [len(batch.events[0]) for batch in got]
    assert got[0].events[0] == long
    assert max(sizes[1:]) <= 2000 and sum(sizes[1:-1]) / len(sizes[1:-1]) > 1800


def test_a_stalled_message_costs_its_text_and_no_envelopes() -> None:
    backlog = Backlog(MOST_MERGED_BYTES)
    for sequence in range(1, 5001):
        backlog.add(EventBatch(sequence, [event(sequence, delta="0123456789")]))
    assert 50_000 < backlog.size < 52_000


# ---- whatever comes


DELTA = st.text(st.sampled_from('ab"\\\n\u00e9\U0001f600\x00'), max_size=12)
PIECE = st.one_of(
    st.tuples(st.just("text"), DELTA, st.sampled_from(["m1", "m2"]), st.integers(0, 9)),
    st.tuples(st.just("custom"), st.just(""), st.just(""), st.just(1)),
    st.tuples(st.just("frame"), st.just(""), st.just(""), st.just(1)),
    st.tuples(st.just("take"), st.just(""), st.just(""), st.sampled_from([1, 500, 5000])),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(PIECE, st.integers(1, 9)), max_size=60),
    st.sampled_from([400, 700, MOST_MERGED_BYTES]),
)
def test_texts_and_sequences_are_whole_for_any_events_and_any_reader(
    pieces: list[tuple[tuple[str, str, str, int], int]], most: int
) -> None:
    backlog = Backlog(most)
    given_events: list[bytes] = []
    got: list[EventBatch | bytes] = []
    frames = epoch = 0
    for (kind, delta, message, number), count in pieces:
        if kind == "take":
            got += backlog.take(number)
            continue
        if kind == "frame":
            frames += 1
            backlog.add_frame(b"frame %d" % frames)
            continue
        epoch += number == 0
        first = len(given_events) + 1
        batch = [
            event(n, delta=delta, message=message, epoch=1 + epoch)
            if kind == "text"
            else event(n, "custom", epoch=1 + epoch)
            for n in range(first, first + count)
        ]
        given_events += batch
        backlog.add(EventBatch(first, batch))
    while backlog:
        before = backlog.size
        got += (piece := backlog.take(300))
        assert piece and backlog.size < before
    assert backlog.size == 0
    check_whole(given_events, texts(got), most)


def check_whole(given_events: list[bytes], got: list[bytes], most: int) -> None:
    """`got` says what `given_events` say: texts whole, sequences 1 to n, frames in order."""
    originals = {text: n for n, text in enumerate(given_events, 1)}
    said: dict[tuple[int, str], str] = defaultdict(str)
    wanted: dict[tuple[int, str], str] = defaultdict(str)
    for text in given_events:
        fields = orjson.loads(text)
        if fields["type"] == "agent_text":
            wanted[fields["epoch"], fields["data"]["message_id"]] += fields["data"]["delta"]
    expected, frame = 1, 0
    checker = StreamChecker()
    for text in got:
        if text.startswith(b"frame"):
            frame += 1
            assert text == b"frame %d" % frame
            continue
        fields = orjson.loads(text)
        checker.see(fields)
        first = fields.get("from_sequence", fields["sequence"])
        assert first == expected, (first, expected)
        expected = fields["sequence"] + 1
        if "from_sequence" in fields:
            assert fields["type"] == "agent_text" and first < fields["sequence"]
            assert len(text) <= most
            last = orjson.loads(given_events[fields["sequence"] - 1])
            assert (fields["event_id"], fields["time"]) == (last["event_id"], last["time"])
        else:
            assert originals[text] == fields["sequence"]
        if fields["type"] == "agent_text":
            said[fields["epoch"], fields["data"]["message_id"]] += fields["data"]["delta"]
    assert expected == len(given_events) + 1
    assert said == wanted
    wrong = {"gap", "repeat", "epoch_down", "wrong_type", "stream_changed", "missing_field"}
    assert not [finding for finding in checker.findings if finding.kind in wrong]


# ---- a connection


LIMIT = 300_000


class Pipe(asyncio.Transport):
    """A transport whose peer reads when told to; `kernel` bytes go through unasked."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.protocol: Any = None
        self.high, self.low = 64 * 1024, 16 * 1024
        self.sent = bytearray()
        self.unsent = bytearray()
        self.room = kernel
        self.paused = False
        self.aborted = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high is not None
        self.high, self.low = high, high // 4

    def get_write_buffer_size(self) -> int:
        return len(self.unsent)

    def is_closing(self) -> bool:
        return self.aborted

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.unsent += data
        self._push()
        if len(self.unsent) > self.high and not self.paused:
            self.paused = True
            self.protocol.pause_writing()

    def read(self, size: int) -> None:
        """The peer reads so many bytes."""
        self.room += size
        self._push()
        if self.paused and len(self.unsent) <= self.low:
            self.paused = False
            self.protocol.resume_writing()

    def _push(self) -> None:
        taken = self.unsent[: self.room]
        del self.unsent[: len(taken)]
        self.sent += taken
        self.room -= len(taken)

    def abort(self) -> None:
        self.aborted = True


class Around:
    """What a connection needs of its edge: marks are flushed by the test, pages are noted."""

    def __init__(self) -> None:
        self.pages: list[ReadPage] = []
        self.dirty: list[Any] = []
        self.codes: list[int] = []

    def mark(self, connection: Any) -> None:
        self.dirty.append(connection)

    def schedule(self, *_: Any) -> None:
        """No time passes here."""

    def read_page(self, _: Any, page: ReadPage) -> None:
        self.pages.append(page)

    def leaving(self, _: Any, code: int) -> None:
        self.codes.append(code)

    def received(self) -> None: ...

    def sent(self, *_: Any) -> None: ...

    def gap(self, *_: Any) -> None: ...

    def lost(self, *_: Any) -> None: ...

    def end_turn(self) -> None:
        dirty, self.dirty = self.dirty, []
        for connection in dirty:
            connection.flush(boot_ms())


class Peer:
    """One merging connection, what it is given, and what its peer got."""

    def __init__(self, kernel: int = 0, after: int | None = None, stored: int = 0) -> None:
        self.around = Around()
        self.pipe = Pipe(kernel)
        start = SessionStart(
            connection_id=ConnectionId("c-1"),
            user=UserKey("default", "alice"),
            point=ResumePoint(after),
            limits=Limits(262_144, 60, 8, 15_000),
            issued_at_ms=0,
            expires_ms=boot_ms() + 10_000_000,
            expires_text="2026-11-24T00:00:00.000Z",
            merge=True,
        )
        self.connection = MergingConnection(
            cast(Owner, self.around),
            EdgeSession(boot_ms(), start),
            cast(Flusher, self.around),
            cast(TimerWheel, self.around),
            LIMIT,
            "",
            262_144,
        )
        self.pipe.protocol = self.connection
        self.connection.connection_made(self.pipe)
        head = StreamHead(STREAM, stored, 1, NodeId("node-1"), Epoch(7))
        self.connection.handle(StreamAttached(head))
        self.end_turn()

    @property
    def waiting(self) -> int:
        """Bytes in the backlog."""
        backlog = self.connection._backlog
        return backlog.size if backlog is not None else 0

    def end_turn(self) -> None:
        self.around.end_turn()

    def deliver(self, *events: bytes, first: int) -> None:
        self.connection.deliver(EventBatch(first, events))
        self.end_turn()

    def read_all(self) -> None:
        for _ in range(10_000):
            if not self.pipe.unsent and not self.around.dirty:
                return
            self.pipe.read(4096)
            self.end_turn()
        raise AssertionError("the peer reads and reads, and it is never all")

    def frames(self) -> list[tuple[int, bytes]]:
        """Whole frames that the peer has got, without `ready`."""
        found, data = [], bytes(self.pipe.sent)
        while len(data) >= 2:
            size, begin = data[1], 2
            if size == 126:
                size, begin = int.from_bytes(data[2:4], "big"), 4
            elif size == 127:
                size, begin = int.from_bytes(data[2:10], "big"), 10
            if len(data) < begin + size:
                break
            found.append((data[0] & 15, data[begin : begin + size]))
            data = data[begin + size :]
        assert not found or orjson.loads(found[0][1])["merge"] is True
        return found[1:]

    def events(self) -> list[bytes]:
        return [text for opcode, text in self.frames() if opcode == TEXT and b"event_id" in text]


def deltas(first: int, last: int, size: int = 10) -> list[bytes]:
    return [event(n, delta=f"{n:0{size}}") for n in range(first, last + 1)]


def test_a_client_that_keeps_up_gets_every_event_byte_for_byte() -> None:
    peer = Peer(kernel=10_000_000)
    events = deltas(1, 1_000)
    for n, text in enumerate(events, 1):
        peer.deliver(text, first=n)
    assert peer.events() == events


def test_a_client_that_fell_behind_gets_merged_events_and_then_single_ones_again() -> None:
    peer = Peer(kernel=1_000)
    events = deltas(1, 2_000)
    for n, text in enumerate(events, 1):
        peer.deliver(text, first=n)
    peer.read_all()
    late = deltas(2_001, 2_010)
    peer.pipe.read(1_000_000)
    for n, text in enumerate(late, 2_001):
        peer.deliver(text, first=n)
    got = peer.events()
    assert got[-10:] == late and len(got) < 150
    check_whole(events + late, got, 64 * 1024)


def test_frames_of_the_edge_keep_their_place_between_events() -> None:
    peer = Peer(kernel=0)
    for n in range(1, 101):
        peer.deliver(*deltas(n, n, 1000), first=n)
    assert peer.pipe.paused
    peer.connection.data_received(ping(b'{"type":"ping","t":5}'))
    peer.deliver(*deltas(101, 102), first=101)
    peer.read_all()
    kinds = [orjson.loads(text)["type"] for _, text in peer.frames()]
    assert kinds[-2:] == ["pong", "agent_text"] and kinds.count("pong") == 1
    check_whole([*deltas(1, 100, 1000), *deltas(101, 102)], peer.events(), 64 * 1024)


def ping(payload: bytes) -> bytes:
    return bytes((0x80 | TEXT, 0x80 | len(payload))) + b"\0\0\0\0" + payload


def test_unsent_bytes_are_bounded_and_over_the_bound_is_slow_consumer() -> None:
    peer = Peer(kernel=0)
    n = 0
    while not peer.around.codes:
        n += 1
        peer.deliver(event(n, "custom"), first=n)
        waiting = peer.pipe.get_write_buffer_size() + peer.waiting
        assert waiting <= LIMIT + 1_000
    assert peer.around.codes == [4004]
    assert not peer.waiting
    peer.end_turn()
    peer.read_all()
    opcode, payload = peer.frames()[-1]
    assert (opcode, payload) == (CLOSE, (4004).to_bytes(2, "big") + b"SLOW_CONSUMER")
    whole = [orjson.loads(text)["sequence"] for text in peer.events()]
    assert whole == list(range(1, len(whole) + 1)), "what was sent before is whole"


def test_merging_is_worth_it_a_stalled_text_lasts_many_times_longer() -> None:
    peer = Peer(kernel=0)
    for n in range(1, 10_001):
        peer.deliver(*deltas(n, n), first=n)
    assert not peer.around.codes
    peer.read_all()
    check_whole(deltas(1, 10_000), peer.events(), 64 * 1024)


def test_a_close_does_not_wait_behind_what_waits() -> None:
    peer = Peer(kernel=0)
    for n in range(1, 200):
        peer.deliver(*deltas(n, n, 1000), first=n)
    sent = peer.pipe.get_write_buffer_size()
    peer.connection.handle(End(Reason.TOKEN_EXPIRED))
    peer.end_turn()
    assert sent < peer.pipe.get_write_buffer_size() < sent + 100
    assert not peer.waiting


def test_a_replay_is_byte_for_byte_as_long_as_the_socket_takes_it() -> None:
    peer = Peer(kernel=10_000_000, after=0, stored=300)
    peer.connection.handle(PageRead(EventBatch(1, deltas(1, 200))))
    peer.end_turn()
    peer.connection.handle(PageRead(EventBatch(201, deltas(201, 300))))
    peer.end_turn()
    assert peer.around.pages == [ReadPage(0, 300), ReadPage(200, 300)]
    assert peer.events() == deltas(1, 300)


def test_a_replay_that_filled_the_socket_is_merged_to_its_end_and_live_events_are_not() -> None:
    peer = Peer(kernel=0, after=0, stored=300)
    peer.connection.handle(PageRead(EventBatch(1, deltas(1, 200))))
    peer.end_turn()
    assert peer.around.pages == [ReadPage(0, 300)]
    peer.read_all()
    assert peer.around.pages == [ReadPage(0, 300), ReadPage(200, 300)]
    peer.connection.handle(PageRead(EventBatch(201, deltas(201, 300))))
    peer.end_turn()
    peer.read_all()
    got = peer.events()
    assert got[:200] == deltas(1, 200) and len(got) == 201
    assert peer.connection.session.state is SessionState.LIVE
    peer.pipe.read(1_000_000)
    peer.deliver(*deltas(301, 302), first=301)
    peer.deliver(*deltas(302, 305), first=302)
    assert peer.events()[201:] == deltas(301, 305)
    check_whole(deltas(1, 305), peer.events(), 64 * 1024)


def test_a_page_over_the_bound_is_sent_and_ends_nothing() -> None:
    peer = Peer(kernel=0, after=0, stored=400)
    events = deltas(1, 400, 1000)
    peer.connection.handle(PageRead(EventBatch(1, events)))
    peer.end_turn()
    assert peer.pipe.get_write_buffer_size() > LIMIT and not peer.around.codes
    peer.read_all()
    assert peer.events() == events


def test_no_page_is_read_while_something_waits_for_the_socket() -> None:
    peer = Peer(kernel=0, after=0, stored=300)
    peer.connection.handle(PageRead(EventBatch(1, deltas(1, 100))))
    peer.end_turn()
    for n in range(6_000):
        peer.connection.data_received(ping(b'{"type":"ping","t":%d}' % n))
    peer.end_turn()
    while peer.pipe.paused:
        peer.pipe.read(1024)
        assert not peer.waiting or len(peer.around.pages) == 1
    assert not peer.waiting, "all that waited went out before the socket was empty"
    assert peer.around.pages == [ReadPage(0, 300), ReadPage(100, 300)]
    peer.connection.handle(PageRead(EventBatch(101, deltas(101, 300))))
    peer.end_turn()
    peer.read_all()
    check_whole(deltas(1, 300), peer.events(), 64 * 1024)


def test_a_lost_connection_keeps_nothing() -> None:
    peer = Peer(kernel=0)
    for n in range(1, 100):
        peer.deliver(*deltas(n, n, 1000), first=n)
    peer.connection.connection_lost(None)
    assert not peer.waiting and peer.around.codes == [1006]


STEP = st.one_of(
    st.tuples(st.just("text"), st.integers(1, 60), st.sampled_from([1, 10, 3000])),
    st.tuples(st.just("custom"), st.integers(1, 3), st.just(0)),
    st.tuples(st.just("read"), st.sampled_from([1, 3_000, 20_000, 200_000]), st.just(0)),
    st.tuples(st.just("ping"), st.just(0), st.just(0)),
    st.tuples(st.just("turn"), st.just(0), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(STEP, max_size=60), st.sampled_from([0, 500, 40_000]))
def test_any_events_at_any_pace_come_whole_or_the_client_is_told_that_it_is_too_slow(
    steps: list[tuple[str, int, int]], kernel: int
) -> None:
    peer = Peer(kernel)
    written: list[bytes] = []
    pings = 0
    for kind, number, size in steps:
        first = len(written) + 1
        match kind:
            case "read":
                peer.pipe.read(number)
            case "ping":
                pings += 1
                peer.connection.data_received(ping(b'{"type":"ping","t":%d}' % pings))
            case "turn":
                peer.end_turn()
            case "text":
                events = deltas(first, first + number - 1, size)
                written += events
                peer.connection.deliver(EventBatch(first, events))
            case "custom":
                events = [event(n, "custom") for n in range(first, first + number)]
                written += events
                peer.connection.deliver(EventBatch(first, events))
    peer.end_turn()
    peer.read_all()
    got = peer.events()
    if peer.around.codes:
        assert peer.around.codes == [4004] and peer.frames()[-1][0] == CLOSE
        last = orjson.loads(got[-1])["sequence"] if got else 0
        check_whole(written[:last], got, 64 * 1024)
        return
    check_whole(written, got, 64 * 1024)
    pongs = [orjson.loads(t) for op, t in peer.frames() if op == TEXT and b'"pong"' in t]
    assert [pong["t"] for pong in pongs] == list(range(1, pings + 1))
