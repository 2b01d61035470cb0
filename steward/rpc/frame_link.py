"""The client's end of a framed connection: preface, hello, welcome, then messages both ways.

`hold` runs one connection to its end. What is sent goes to the socket at once, and what
comes is handed on where it was read: no task and no thread stands in between
(docs/decisions/0007). A refusal comes as a last message with its reason. What was sent on a
link that broke is lost; the owner sends it again. What was sent and the peer does not read
is bounded by the owner, who looks at `choked` and is told when it ends.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from google.protobuf.message import DecodeError

from steward.errors import Reason, StewardError
from steward.rpc.factory import MAX_MESSAGE_BYTES
from steward.rpc.frames import BUFFER_BYTES, FrameConnection


class Serverward(Protocol):
    """A message of a peer that is a server: it may be a welcome, or a refusal."""

    @property
    def refused(self) -> Any: ...

    def HasField(self, field_name: Any) -> bool: ...


MessageT = TypeVar("MessageT", bound=Serverward)


class Unspoken(StewardError):
    """Who listens at this address ended the connection before a welcome, and without a reason.

    It may be away, or one that does not know this kind of connection.
    """


class FrameLink(Generic[MessageT]):
    """One connection. One event loop; used once."""

    def __init__(
        self,
        preface: bytes,
        parse: Callable[[bytes], MessageT],
        on_welcome: Callable[[MessageT], None],
        on_message: Callable[[MessageT], None],
        on_drained: Callable[[], None] | None = None,
        on_tailed: Callable[[MessageT, memoryview], None] | None = None,
        most_per_turn: int = 0,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        """The callbacks do not block. What they raise ends the connection.

        `parse` raises DecodeError. `on_tailed` is for messages with a tail, whose bytes are good
        until it returns; without it they end the connection. Behind so many bytes as
        `most_per_turn`, if any, whatever else this process has to do has its turn before more
        is handed on.
        """
        self._preface = preface
        self._parse = parse
        self._on_welcome = on_welcome
        self._on_message = on_message
        self._on_drained = on_drained
        self._on_tailed = on_tailed
        self._most_per_turn = most_per_turn
        self._left = most_per_turn
        self._loop = asyncio.get_running_loop()
        self._welcomed = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._connection = FrameConnection(
            self,
            MAX_MESSAGE_BYTES,
            buffer_bytes=buffer_bytes,
            on_tailed=None if on_tailed is None else self._received_tailed,
        )
        self._given_up = False

    async def hold(self, address: str, hello: bytes, welcome_s: float) -> None:
        """Connect, and serve until either side ends it. Raises StewardError; never returns.

        A peer that has not said welcome after `welcome_s` is given up.
        """
        host, _, port = address.rpartition(":")
        try:
            async with asyncio.timeout(welcome_s):
                await self._loop.create_connection(
                    lambda: self._connection, host.strip("[]"), int(port)
                )
                self._connection.start(self._preface)
                self.send(hello)
                await asyncio.wait({self._welcomed, self._ended}, return_when="FIRST_COMPLETED")
            await self._ended
        except TimeoutError:
            raise _away("no welcome in time") from None
        except OSError as error:
            raise _away(error.strerror or str(error)) from None
        finally:
            self._connection.abort("closed here")

    @property
    def welcomed(self) -> bool:
        return self._welcomed.done()

    @property
    def choked(self) -> bool:
        """Whether more waits for the peer than should."""
        return self._connection.choked

    def send(self, message: bytes) -> None:
        """Send a message. Never waits; what is sent on a link that is over is lost."""
        self._connection.send(message)

    def give_up(self, why: str) -> None:
        """End the connection: `hold` raises StewardError with `why`. Safe to call twice."""
        self._given_up = True
        self._connection.abort(why)

    # What the connection calls.

    def received(self, frame: bytes) -> None:
        try:
            self._take(self._parse(frame))
        except DecodeError:
            self._end(self._foreign())
        except Exception as error:
            self._end(error)
        if self._most_per_turn:
            self._spend(len(frame))

    def drained(self) -> None:
        if self._on_drained is not None:
            self._on_drained()

    def lost(self, why: str) -> None:
        if self._welcomed.done() or self._given_up:
            self._end(_away(why))
        else:
            self._end(Unspoken(Reason.MANAGER_UNAVAILABLE, why))

    def _received_tailed(self, frame: bytes, tail: memoryview) -> None:
        try:
            if not self._welcomed.done() or self._on_tailed is None:
                raise self._foreign()
            self._on_tailed(self._parse(frame), tail)
        except DecodeError:
            self._end(self._foreign())
        except Exception as error:
            self._end(error)
        if self._most_per_turn:
            self._spend(len(frame) + len(tail))

    def _spend(self, size: int) -> None:
        self._left -= size
        if self._left <= 0:
            self._connection.pause()
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._left = self._most_per_turn
        self._connection.resume()

    def _take(self, message: MessageT) -> None:
        if self._welcomed.done() and not message.HasField("refused"):
            self._on_message(message)
        elif message.HasField("refused"):
            refused = message.refused
            known = refused.reason in Reason.__members__
            reason = Reason(refused.reason) if known else Reason.INTERNAL
            self._end(StewardError(reason, refused.message))
        elif message.HasField("welcome"):
            self._welcomed.set_result(None)
            self._on_welcome(message)
        else:
            self._end(self._foreign())

    def _foreign(self) -> StewardError:
        """What came is no message of such a peer, or not the one that has to come first."""
        if self._welcomed.done():
            return StewardError(Reason.PROTOCOL_VIOLATION, "no message of such a peer")
        return Unspoken(Reason.PROTOCOL_VIOLATION, "no welcome came first")

    def _end(self, error: Exception) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)
            # `hold` may have been cancelled, and then nobody asks.
            self._ended.exception()
        self._connection.abort("closed here")


def _away(why: str) -> StewardError:
    return StewardError(Reason.MANAGER_UNAVAILABLE, why)
