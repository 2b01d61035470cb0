"""Events on their way from a node to the sockets of an edge: how they are framed and named.

A node frames each event once, as a WebSocket text frame of a server; an edge writes the bytes as
they are. Beside the frames goes one head per delivery. Its channel is what the edge calls the
user; the check is made of the user by either side for itself, the node's from the manager that
sends: a node that mixes channels up, by whatever error, meets an edge that finds out.
"""

from collections.abc import Sequence
from struct import Struct
from typing import Final
from zlib import crc32

from steward.model.keys import UserKey

HEAD: Final = Struct("<QQQIII")
"""Channel, epoch of the sender, first sequence, number of events, bytes of frames, check."""

_FIN_TEXT: Final = 0x81
_SHORT: Final = tuple(bytes((_FIN_TEXT, size)) for size in range(126))
# First byte, and 126 for "the length is in the next two".
_MEDIUM: Final = _FIN_TEXT << 8 | 126
_LONG: Final = bytes((_FIN_TEXT, 127))
_pack_medium: Final = Struct(">HH").pack


def user_check(user: UserKey) -> int:
    """32 bits of a user's name. Tells errors apart, not attackers: it is no secret."""
    return crc32(f"{user.tenant}\0{user.user}".encode())


def encode_text(payload: bytes) -> bytes:
    """A whole text message of a server: header and payload joined."""
    size = len(payload)
    if size < 126:
        return _SHORT[size] + payload
    if size < 65_536:
        return _pack_medium(_MEDIUM, size) + payload
    return _LONG + size.to_bytes(8, "big") + payload


def encode_texts(payloads: Sequence[bytes]) -> bytes:
    """Whole text messages, one after the other. Nothing is copied twice."""
    if len(payloads) == 1:
        payload = payloads[0]
        size = len(payload)
        if 126 <= size < 65_536:
            return _pack_medium(_MEDIUM, size) + payload
        return encode_text(payload)
    parts: list[bytes] = []
    for payload in payloads:
        size = len(payload)
        if 126 <= size < 65_536:
            parts += (_pack_medium(_MEDIUM, size), payload)
        else:
            parts.append(encode_text(payload))
    return b"".join(parts)


def decode_texts(frames: bytes) -> list[bytes]:
    """The payloads of what `encode_texts` made."""
    payloads: list[bytes] = []
    at, end = 0, len(frames)
    while at < end:
        size = frames[at + 1]
        at += 2
        if size == 126:
            size = int.from_bytes(frames[at : at + 2], "big")
            at += 2
        elif size == 127:
            size = int.from_bytes(frames[at : at + 8], "big")
            at += 8
        payloads.append(frames[at : at + size])
        at += size
    return payloads
