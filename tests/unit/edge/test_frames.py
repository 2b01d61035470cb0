"""The WebSocket codec: what RFC 6455 allows of a client, and what it forbids."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.core.frames import (
    BINARY,
    CLOSE,
    CLOSE_BAD_TEXT,
    CLOSE_PROTOCOL_ERROR,
    CLOSE_TOO_LARGE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    Frame,
    FrameReader,
    FrameViolation,
    encode_close,
    encode_control,
    parse_close,
    unmask,
)
from steward.model.deliveries import encode_text, encode_texts

MASK = b"\x11\x22\x33\x44"
LIMIT = 1000


def xor(data: bytes, mask: bytes = MASK) -> bytes:
    return bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))


def frame(opcode: int, payload: bytes, *, fin: bool = True, reserved: int = 0) -> bytes:
    """A client frame, made without the code under test."""
    first = (0x80 if fin else 0) | reserved | opcode
    size = len(payload)
    if size < 126:
        head = bytes((first, 0x80 | size))
    elif size < 65536:
        head = bytes((first, 0xFE)) + struct.pack("!H", size)
    else:
        head = bytes((first, 0xFF)) + struct.pack("!Q", size)
    return head + MASK + xor(payload)


def read_all(*chunks: bytes, limit: int = LIMIT) -> list[Frame]:
    reader = FrameReader(limit)
    frames = []
    for chunk in chunks:
        reader.receive(chunk)
        while (got := reader.next()) is not None:
            frames.append(got)
    return frames


def violation(*chunks: bytes, limit: int = LIMIT) -> int:
    with pytest.raises(FrameViolation) as caught:
        read_all(*chunks, limit=limit)
    return caught.value.code


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 125, 126, 127, 65535, 65536, 70001])
def test_a_message_of_any_length_form_is_read(size: int) -> None:
    payload = b"x" * size
    assert read_all(frame(TEXT, payload), limit=100_000) == [Frame(TEXT, payload)]


@given(st.binary(max_size=300), st.binary(min_size=4, max_size=4))
def test_unmask_is_the_bytewise_xor(data: bytes, mask: bytes) -> None:
    assert unmask(data, mask) == xor(data, mask)


@settings(max_examples=60)
@given(
    messages=st.lists(
        st.tuples(st.sampled_from([TEXT, BINARY]), st.text(max_size=200), st.integers(1, 4)),
        max_size=6,
    ),
    cuts=st.lists(st.integers(1, 50), min_size=1, max_size=40),
)
def test_any_segmentation_and_fragmentation_gives_the_same_messages(
    messages: list[tuple[int, str, int]], cuts: list[int]
) -> None:
    wire = b""
    expected = []
    for opcode, text, parts in messages:
        payload = text.encode()
        step = max(len(payload) // parts, 1)
        pieces = [payload[i : i + step] for i in range(0, len(payload), step)] or [b""]
        for i, piece in enumerate(pieces):
            last = i == len(pieces) - 1
            wire += frame(opcode if i == 0 else CONTINUATION, piece, fin=last)
            # A control frame may come between the fragments of a message.
            wire += frame(PING, b"between")
            expected += [Frame(opcode, payload)] if last else []
            expected.append(Frame(PING, b"between"))
    chunks = []
    at = 0
    for i in range(len(wire)):
        size = cuts[i % len(cuts)]
        chunks.append(wire[at : at + size])
        at += size
        if at >= len(wire):
            break
    assert read_all(*chunks, limit=10_000) == expected


@settings(max_examples=100)
@given(st.binary(max_size=400))
def test_no_bytes_raise_anything_but_a_violation(data: bytes) -> None:
    try:
        read_all(data)
    except FrameViolation as refused:
        assert refused.code in (CLOSE_PROTOCOL_ERROR, CLOSE_BAD_TEXT, CLOSE_TOO_LARGE)


def test_frames_before_a_violation_are_given_first() -> None:
    reader = FrameReader(LIMIT)
    reader.receive(frame(TEXT, b"good") + b"\x81\x05plain")
    assert reader.next() == Frame(TEXT, b"good")
    with pytest.raises(FrameViolation):
        reader.next()


def test_unmasked_client_frame_is_refused() -> None:
    assert violation(b"\x81\x02hi") == CLOSE_PROTOCOL_ERROR


@pytest.mark.parametrize("reserved", [0x10, 0x20, 0x40, 0x70])
def test_reserved_bits_are_refused(reserved: int) -> None:
    assert violation(frame(TEXT, b"hi", reserved=reserved)) == CLOSE_PROTOCOL_ERROR


@pytest.mark.parametrize("opcode", [3, 4, 5, 6, 7, 11, 12, 13, 14, 15])
def test_reserved_opcodes_are_refused(opcode: int) -> None:
    assert violation(frame(opcode, b"")) == CLOSE_PROTOCOL_ERROR


@pytest.mark.parametrize("opcode", [CLOSE, PING, PONG])
def test_control_frames_are_whole_and_short(opcode: int) -> None:
    assert violation(frame(opcode, b"", fin=False)) == CLOSE_PROTOCOL_ERROR
    assert violation(frame(opcode, b"x" * 126)) == CLOSE_PROTOCOL_ERROR


def test_continuation_without_a_start_is_refused() -> None:
    assert violation(frame(CONTINUATION, b"x")) == CLOSE_PROTOCOL_ERROR


def test_a_new_message_inside_a_fragmented_one_is_refused() -> None:
    assert violation(frame(TEXT, b"a", fin=False), frame(TEXT, b"b")) == CLOSE_PROTOCOL_ERROR


def test_text_that_is_not_utf8_is_refused_also_across_fragments() -> None:
    assert violation(frame(TEXT, b"\xff")) == CLOSE_BAD_TEXT
    euro = "€".encode()
    good = (frame(TEXT, euro[:1], fin=False), frame(CONTINUATION, euro[1:]))
    assert read_all(*good) == [Frame(TEXT, euro)]
    assert violation(frame(TEXT, euro[:1], fin=False), frame(CONTINUATION, b"a")) == CLOSE_BAD_TEXT
    assert read_all(frame(BINARY, b"\xff")) == [Frame(BINARY, b"\xff")]


def test_a_message_over_the_limit_is_refused_by_its_header_alone() -> None:
    assert read_all(frame(TEXT, b"x" * LIMIT)) == [Frame(TEXT, b"x" * LIMIT)]
    assert violation(frame(TEXT, b"x" * (LIMIT + 1))[:8]) == CLOSE_TOO_LARGE
    head = b"\x81\xff" + struct.pack("!Q", 1 << 40)
    assert violation(head) == CLOSE_TOO_LARGE


def test_fragments_count_together_against_the_limit() -> None:
    half = b"x" * (LIMIT // 2 + 1)
    assert violation(frame(TEXT, half, fin=False), frame(CONTINUATION, half)) == CLOSE_TOO_LARGE


def test_empty_fragments_keep_nothing() -> None:
    reader = FrameReader(LIMIT)
    reader.receive(frame(TEXT, b"", fin=False) + frame(CONTINUATION, b"", fin=False) * 1000)
    assert reader.next() is None
    reader.receive(frame(CONTINUATION, b"end"))
    assert reader.next() == Frame(TEXT, b"end")


@pytest.mark.parametrize(
    "head",
    [
        b"\x81\xfe" + struct.pack("!H", 125),
        b"\x81\xff" + struct.pack("!Q", 65535),
        b"\x81\xff" + struct.pack("!Q", 1 << 63),
    ],
)
def test_lengths_are_in_their_shortest_form(head: bytes) -> None:
    assert violation(head, limit=1 << 62) == CLOSE_PROTOCOL_ERROR


@pytest.mark.parametrize("size", [0, 125, 126, 65535, 65536])
def test_server_text_has_the_header_of_its_size(size: int) -> None:
    wire = encode_text(b"y" * size)
    if size < 126:
        assert wire[:2] == bytes((0x81, size))
    elif size < 65536:
        assert wire[:4] == b"\x81\x7e" + struct.pack("!H", size)
    else:
        assert wire[:10] == b"\x81\x7f" + struct.pack("!Q", size)
    assert wire.endswith(b"y" * size) and len(wire) - size in (2, 4, 10)


def test_close_frames_carry_code_and_a_reason_that_fits() -> None:
    wire = encode_close(4001, "é" * 100)
    assert len(wire) <= 127 and wire[1] == len(wire) - 2
    code, reason = parse_close(wire[2:])
    assert code == 4001 and reason == "é" * 61
    assert parse_close(b"") == (1005, "")
    assert encode_control(PONG, b"abc") == b"\x8a\x03abc"


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 2999, 5000])
def test_close_codes_that_may_not_be_sent_are_refused(code: int) -> None:
    with pytest.raises(FrameViolation):
        parse_close(struct.pack("!H", code))


def test_malformed_close_payloads_are_refused() -> None:
    for payload in (b"x", b"\x03\xe8\xff"):
        with pytest.raises(FrameViolation):
            parse_close(payload)


def test_several_texts_are_the_frames_of_each_in_a_row() -> None:
    sizes = (0, 1, 125, 126, 127, 65_535, 65_536)
    payloads = [bytes([65 + n]) * size for n, size in enumerate(sizes)]
    assert encode_texts(payloads) == b"".join(map(encode_text, payloads))
    for payload in payloads:
        assert encode_texts([payload]) == encode_text(payload)


def test_a_reader_is_empty_when_every_byte_was_taken_out() -> None:
    reader = FrameReader(1000)
    assert reader.empty
    reader.receive(frame(TEXT, b"one") + frame(TEXT, b"two")[:-1])
    assert reader.next() == (TEXT, b"one") and not reader.empty
    assert reader.next() is None and not reader.empty
    reader.receive(frame(TEXT, b"two")[-1:])
    assert reader.next() == (TEXT, b"two") and reader.empty


@pytest.mark.parametrize("size", [0, 1, 125, 126, LIMIT])
def test_a_text_message_that_came_alone_is_taken_at_once(size: int) -> None:
    reader = FrameReader(LIMIT)
    data = frame(TEXT, b"x" * size)
    assert reader.alone(data) == b"x" * size
    assert reader.empty


def test_what_is_not_one_whole_text_message_is_not_taken_alone() -> None:
    data = frame(TEXT, b"x" * 200)
    unmasked = bytes((0x81, 5)) + b"hello"
    others = [
        b"",
        data[:1],
        data[:5],
        data[:-1],
        data + b"\x81",
        data + data,
        frame(TEXT, b"x", fin=False),
        frame(BINARY, b"x"),
        frame(PING, b""),
        unmasked,
        bytes((0xC1, data[1])) + data[2:],
        # Not the shortest form of its length.
        bytes((0x81, 0xFE, 0, 3, 0, 0, 0, 0)) + b"abc",
        frame(TEXT, b"x" * (LIMIT + 1)),
    ]
    for other in others:
        reader = FrameReader(LIMIT)
        assert reader.alone(other) is None, other[:8]
        assert reader.empty


def test_nothing_is_taken_alone_while_something_waits_before_it() -> None:
    data = frame(TEXT, b"x")
    reader = FrameReader(LIMIT)
    reader.receive(data)
    assert reader.alone(data) is None
    assert reader.next() == Frame(TEXT, b"x")
    assert reader.alone(data) == b"x"
    reader.receive(frame(TEXT, b"begin", fin=False))
    assert reader.next() is None
    assert reader.alone(data) is None
