"""Framed connections: whole messages in order, however the network cuts them, and their bounds."""

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steward.rpc.frames import LENGTH_BYTES, TAILED, FrameConnection

MOST = 1000


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.reading = True
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True


class Owner:
    """Keeps what it gets; pauses after so many."""

    def __init__(self, pause_after: int = 0) -> None:
        self.connection = FrameConnection(self, MOST)
        self.wire = Wire()
        self.connection.connection_made(self.wire)
        self.got: list[bytes] = []
        self.drained_times = 0
        self.why: list[str] = []
        self._pause_after = pause_after

    def received(self, frame: bytes) -> None:
        self.got.append(frame)
        if len(self.got) == self._pause_after:
            self.connection.pause()

    def drained(self) -> None:
        self.drained_times += 1

    def lost(self, why: str) -> None:
        self.why.append(why)


def framed(frames: list[bytes]) -> bytes:
    return b"".join(len(frame).to_bytes(LENGTH_BYTES, "big") + frame for frame in frames)


@given(
    st.lists(st.binary(max_size=40), max_size=12),
    st.lists(st.integers(0, 400), max_size=20),
    st.integers(0, 12),
)
def test_messages_arrive_whole_and_in_order_however_the_bytes_are_cut(
    frames: list[bytes], cuts: list[int], pause_after: int
) -> None:
    owner = Owner(pause_after)
    data = framed(frames)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    for begin, end in pairwise(edges):
        owner.connection.data_received(data[begin:end])
    if pause_after and pause_after <= len(frames):
        assert owner.got == frames[:pause_after], "a paused owner is given nothing"
        assert not owner.wire.reading
        owner.connection.resume()
        assert owner.wire.reading
    assert owner.got == frames


def test_what_is_sent_is_what_the_other_end_receives() -> None:
    one, other = Owner(), Owner()
    for frame in (b"", b"a", b"bc" * 200):
        one.connection.send(frame)
    other.connection.data_received(one.wire.written)
    assert other.got == [b"", b"a", b"bc" * 200]


def test_a_message_over_the_bound_ends_the_connection_before_it_is_read() -> None:
    owner = Owner()
    owner.connection.data_received(framed([b"x" * MOST]))
    assert owner.got == [b"x" * MOST]
    owner.connection.data_received((MOST + 1).to_bytes(LENGTH_BYTES, "big") + b"x")
    assert owner.wire.closed
    owner.connection.connection_lost(None)
    assert len(owner.got) == 1
    assert owner.why == [f"a message of {MOST + 1} bytes; at most {MOST} are taken"]


@pytest.mark.parametrize("cut", range(1, LENGTH_BYTES + 2))
def test_a_message_over_the_bound_is_not_collected_however_its_length_is_cut(cut: int) -> None:
    owner = Owner()
    data = (MOST + 1).to_bytes(LENGTH_BYTES, "big") + b"x"
    owner.connection.data_received(data[:cut])
    owner.connection.data_received(data[cut:])
    assert owner.wire.closed
    owner.connection.connection_lost(None)
    assert owner.why == [f"a message of {MOST + 1} bytes; at most {MOST} are taken"]


def test_nothing_is_handed_over_of_a_connection_that_ended_while_it_was_paused() -> None:
    owner = Owner(pause_after=1)
    owner.connection.data_received(framed([b"1", b"2"]))
    owner.connection.close()
    owner.connection.resume()
    assert owner.got == [b"1"]


def test_nothing_is_handed_over_after_the_owner_ended_the_connection() -> None:
    owner = Owner()

    def refuse(frame: bytes) -> None:
        owner.got.append(frame)
        owner.connection.close()

    owner.received = refuse  # type: ignore[method-assign]
    owner.connection.data_received(framed([b"1", b"2"]))
    assert owner.got == [b"1"]


def test_nothing_is_sent_on_a_connection_that_is_over() -> None:
    owner = Owner()
    owner.connection.abort("enough")
    owner.connection.send(b"late")
    assert owner.wire.written == b""
    owner.connection.connection_lost(ConnectionResetError("reset"))
    owner.connection.send(b"later")
    assert owner.why == ["enough"]


def test_the_owner_is_told_when_a_peer_that_did_not_read_reads_again() -> None:
    owner = Owner()
    owner.connection.pause_writing()
    assert owner.connection.choked
    owner.connection.resume_writing()
    assert not owner.connection.choked
    assert owner.drained_times == 1


@pytest.mark.parametrize("error", [None, ConnectionResetError("reset by peer")])
def test_the_end_is_told_once_with_its_cause(error: Exception | None) -> None:
    owner = Owner()
    owner.connection.connection_lost(error)
    assert owner.why == [str(error) if error else "the peer ended the connection"]


class TailedOwner(Owner):
    """Takes tails as well."""

    def __init__(self, buffer_bytes: int = 64) -> None:
        super().__init__()
        self.connection = FrameConnection(
            self, MOST, buffer_bytes=buffer_bytes, on_tailed=self.received_tailed
        )
        self.wire = Wire()
        self.connection.connection_made(self.wire)

    def received_tailed(self, frame: bytes, tail: memoryview) -> None:
        self.got += [frame, bytes(tail)]


@given(
    st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=300)), max_size=8),
    st.lists(st.integers(0, 3000), max_size=20),
)
def test_a_tail_arrives_with_its_message_however_the_bytes_are_cut(
    frames: list[tuple[bytes, bytes]], cuts: list[int]
) -> None:
    sender, owner = Owner(), TailedOwner()
    for frame, tail in frames:
        sender.connection.send(frame, [tail[:7], tail[7:]])
        sender.connection.send(frame)
    data = sender.wire.written
    for begin, end in pairwise(sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})):
        owner.connection.data_received(data[begin:end])
    assert owner.got == [part for frame, tail in frames for part in (frame, tail, frame)]


def test_who_takes_no_tails_ends_a_connection_that_brings_one() -> None:
    owner, sender = Owner(), Owner()
    sender.connection.send(b"a", [b"b"])
    owner.connection.data_received(sender.wire.written)
    assert owner.wire.closed
    assert not owner.got


@pytest.mark.parametrize("inner", [MOST, 6, (1 << 32) - 1])
def test_a_message_longer_than_its_frame_ends_the_connection(inner: int) -> None:
    owner = TailedOwner()
    frame = inner.to_bytes(LENGTH_BYTES, "big") + b"abcde"
    owner.connection.data_received((TAILED | len(frame)).to_bytes(LENGTH_BYTES, "big") + frame)
    assert owner.wire.closed
    assert not owner.got
