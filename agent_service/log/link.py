"""A node's framed connection to the log: hello, welcome, then batches and answers.

`hold` runs one connection to its end. What is sent goes to the socket at once, and what
comes is handed on where it was read: no task and no thread stands in between
(docs/decisions/0007). What was sent on a link that broke is lost; the owner sends it again.
"""

import asyncio
from collections.abc import Callable

from google.protobuf.message import DecodeError

from agent_service.log.framing import PREFACE
from steward.errors import Reason, StewardError
from steward.rpc.factory import MAX_MESSAGE_BYTES
from steward.rpc.frames import FrameConnection
from steward.v1 import log_service_pb2 as pb

OnMessage = Callable[[pb.HoldLogStreamResponse], None]


class LogLink:
    """One connection to the log at `address`. One event loop; used once."""

    def __init__(self, on_welcome: Callable[[], None], on_message: OnMessage) -> None:
        """The callbacks do not block. What they raise ends the connection."""
        self._on_welcome = on_welcome
        self._on_message = on_message
        self._welcomed = asyncio.get_running_loop().create_future()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._connection = FrameConnection(self, MAX_MESSAGE_BYTES)

    async def hold(self, address: str, hello: pb.LogHello, welcome_s: float) -> None:
        """Connect, and serve until either side ends it. Raises StewardError; never returns.

        A log that has not said welcome after `welcome_s` is given up.
        """
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(welcome_s):
                await loop.create_connection(lambda: self._connection, host.strip("[]"), int(port))
                self._connection.start(PREFACE)
                self.send(pb.HoldLogStreamRequest(hello=hello))
                await asyncio.wait({self._welcomed, self._ended}, return_when="FIRST_COMPLETED")
            await self._ended
        except TimeoutError:
            raise _away("no welcome in time") from None
        except OSError as error:
            raise _away(error.strerror or str(error)) from None
        finally:
            self._connection.abort("closed here")

    def send(self, request: pb.HoldLogStreamRequest) -> None:
        """Send a message. Never waits; what is sent on a link that is over is lost."""
        self._connection.send(request.SerializeToString())

    def give_up(self, why: str) -> None:
        """End the connection: `hold` raises StewardError with `why`. Safe to call twice."""
        self._connection.abort(why)

    # What the connection calls.

    def received(self, frame: bytes) -> None:
        try:
            self._take(pb.HoldLogStreamResponse.FromString(frame))
        except DecodeError:
            self._end(StewardError(Reason.PROTOCOL_VIOLATION, "no message of a log"))
        except Exception as error:
            self._end(error)

    def drained(self) -> None:
        pass  # What waits for the log is bounded by the window of the owner.

    def lost(self, why: str) -> None:
        self._end(_away(why))

    def _take(self, message: pb.HoldLogStreamResponse) -> None:
        if message.HasField("refused"):
            refused = message.refused
            known = refused.reason in Reason.__members__
            reason = Reason(refused.reason) if known else Reason.INTERNAL
            self._end(StewardError(reason, refused.message))
        elif self._welcomed.done():
            self._on_message(message)
        elif message.HasField("welcome"):
            self._welcomed.set_result(None)
            self._on_welcome()
        else:
            raise StewardError(Reason.PROTOCOL_VIOLATION, "a log says welcome first")

    def _end(self, error: Exception) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)
            # `hold` may have been cancelled, and then nobody asks.
            self._ended.exception()
        self._connection.abort("closed here")


def _away(why: str) -> StewardError:
    return StewardError(Reason.MANAGER_UNAVAILABLE, why)
