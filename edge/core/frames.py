"""RFC 6455 framing for the server side of a WebSocket, without I/O.

`FrameReader` takes bytes as they arrive and gives whole messages and control frames one
by one, so that its owner may stop between any two. It guarantees: client frames are
masked, reserved bits and opcodes are refused, control frames are short and whole, lengths
are minimal, a message (fragmented or not) never grows over the limit and is refused
before its bytes are kept, text is UTF-8. It does not answer pings, keep close
handshakes or negotiate extensions: there are none.

The `encode_*` functions make control frames of a server; those of text messages are made by
`steward.model.deliveries`.
"""

from typing import Final, NamedTuple

CONTINUATION: Final = 0
TEXT: Final = 1
BINARY: Final = 2
CLOSE: Final = 8
PING: Final = 9
PONG: Final = 10

CLOSE_NORMAL: Final = 1000
CLOSE_PROTOCOL_ERROR: Final = 1002
CLOSE_NO_STATUS: Final = 1005
CLOSE_BAD_TEXT: Final = 1007
CLOSE_TOO_LARGE: Final = 1009

MAX_CONTROL_BYTES: Final = 125

_FIN: Final = 0x80
_WHOLE_TEXT: Final = _FIN | TEXT
_RESERVED: Final = 0x70
_MASKED: Final = 0x80
_ZERO_MASK: Final = b"\0\0\0\0"


class FrameViolation(Exception):
    """The peer broke the framing rules: the connection can only be closed, with `code`."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Frame(NamedTuple):
    """A whole message (TEXT, BINARY) or a control frame (CLOSE, PING, PONG), unmasked."""

    opcode: int
    payload: bytes


def _broken(message: str) -> FrameViolation:
    return FrameViolation(CLOSE_PROTOCOL_ERROR, message)


def unmask(data: bytes | bytearray, mask: bytes | bytearray) -> bytes:
    """XOR `data` with the repeated 4-byte `mask`, as one operation on two long integers."""
    size = len(data)
    if not size or mask == _ZERO_MASK:
        return bytes(data)
    key = (bytes(mask) * (size // 4 + 1))[:size]
    mixed = int.from_bytes(data, "little") ^ int.from_bytes(key, "little")
    return mixed.to_bytes(size, "little")


class FrameReader:
    """Turns a byte stream into frames. `receive` adds bytes, `next` takes one frame out."""

    __slots__ = ("_buffer", "_limit", "_message", "_opcode", "_position")

    def __init__(self, max_message_bytes: int) -> None:
        self._limit = max_message_bytes
        self._buffer: bytes | bytearray = b""
        self._position = 0
        # The fragmented message in progress, if any.
        self._message: bytearray | None = None
        self._opcode = 0

    def receive(self, data: bytes) -> None:
        """Add bytes from the network. The owner stops reading to bound what is kept."""
        if self._position == len(self._buffer):
            self._buffer = data
            self._position = 0
            return
        if self._position or not isinstance(self._buffer, bytearray):
            self._buffer = bytearray(self._buffer[self._position :])
            self._position = 0
        self._buffer += data

    def alone(self, data: bytes) -> bytes | None:
        """The payload of a text message, if `data` is exactly that and nothing waits before it.

        None: `receive` it instead. Nothing of it is kept either way, and whether it is UTF-8 is
        for the caller to see.
        """
        have = len(data)
        if have < 6 or data[0] != _WHOLE_TEXT or self._message is not None or self._buffer:
            return None
        size = data[1] - _MASKED
        start = 6
        if size == 126:
            size = data[2] << 8 | data[3]
            start = 8
            if size < 126:
                return None
        if have != start + size or size > self._limit:
            return None
        return unmask(data[start:], data[start - 4 : start])

    @property
    def empty(self) -> bool:
        """Whether every byte that came was taken out."""
        return not self._buffer

    def next(self) -> Frame | None:
        """The next frame; None when more bytes are needed. Raises FrameViolation."""
        while True:
            frame = self._take()
            if frame is None:
                return None
            final, opcode, payload = frame
            if opcode >= CLOSE:
                return Frame(opcode, payload)
            if self._message is not None:
                self._message += payload
                if not final:
                    continue
                opcode, payload = self._opcode, bytes(self._message)
                self._message = None
            elif not final:
                self._opcode = opcode
                self._message = bytearray(payload)
                continue
            if opcode == TEXT and not payload.isascii():
                try:
                    payload.decode()
                except UnicodeDecodeError:
                    raise FrameViolation(CLOSE_BAD_TEXT, "text that is not UTF-8") from None
            return Frame(opcode, payload)

    def _take(self) -> tuple[int, int, bytes] | None:
        """One raw frame, checked and unmasked: (fin bit, opcode, payload)."""
        buffer, at = self._buffer, self._position
        have = len(buffer) - at
        if have < 2:
            return None
        first, second = buffer[at], buffer[at + 1]
        opcode, final = first & 0x0F, first & _FIN
        size = second & 0x7F
        if first != _WHOLE_TEXT or second < _MASKED or self._message is not None:
            self._check_start(first, second, opcode, final, size)
        head = 6
        if size == 126:
            if have < 4:
                return None
            size = buffer[at + 2] << 8 | buffer[at + 3]
            head = 8
            if size < 126:
                raise _broken("a length that is not in its shortest form")
        elif size == 127:
            if have < 10:
                return None
            size = int.from_bytes(buffer[at + 2 : at + 10], "big")
            head = 14
            if size < 65_536 or size >> 63:
                raise _broken("a length that is not in its shortest form")
        if opcode < CLOSE:
            kept = len(self._message) if self._message is not None else 0
            if kept + size > self._limit:
                raise FrameViolation(CLOSE_TOO_LARGE, f"a message over {self._limit} bytes")
        start = at + head
        if have < head + size:
            return None
        end = start + size
        payload = unmask(buffer[start:end], buffer[start - 4 : start])
        if end == len(buffer):
            self._buffer = b""
            self._position = 0
        else:
            self._position = end
        return final, opcode, payload

    def _check_start(self, first: int, second: int, opcode: int, final: int, size: int) -> None:
        if first & _RESERVED:
            raise _broken("reserved bits are set, and no extension was agreed")
        if not second & _MASKED:
            raise _broken("a client frame without a mask")
        if opcode >= CLOSE:
            if opcode > PONG:
                raise _broken("an unknown opcode")
            if not final or size > MAX_CONTROL_BYTES:
                raise _broken("a control frame that is fragmented or too long")
        elif opcode > BINARY:
            raise _broken("an unknown opcode")
        elif (opcode == CONTINUATION) is (self._message is None):
            raise _broken("a continuation out of place")


def parse_close(payload: bytes) -> tuple[int, str]:
    """Code and reason of a close frame; 1005 when it has none. Raises FrameViolation."""
    if not payload:
        return CLOSE_NO_STATUS, ""
    if len(payload) == 1:
        raise _broken("a close frame of one byte")
    code = int.from_bytes(payload[:2], "big")
    if not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):
        raise _broken("a close code that may not be sent")
    try:
        return code, payload[2:].decode()
    except UnicodeDecodeError:
        raise FrameViolation(CLOSE_BAD_TEXT, "a close reason that is not UTF-8") from None


def encode_control(opcode: int, payload: bytes = b"") -> bytes:
    """A PING or PONG; `payload` is at most 125 bytes."""
    return bytes((_FIN | opcode, len(payload))) + payload


def encode_close(code: int, reason: str = "") -> bytes:
    """A close frame; the reason is cut to what fits, at a character."""
    text = reason.encode()[: MAX_CONTROL_BYTES - 2].decode(errors="ignore").encode()
    return encode_control(CLOSE, code.to_bytes(2, "big") + text)
