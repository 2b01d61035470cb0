"""One long bidirectional stream to a peer: hello, welcome, then batches both ways.

`hold` runs one stream to its end; `keep` opens it again, with a backoff from 50 ms to 1 s,
for as long as it is not cancelled. What waits in the outbox travels together. A stream
whose peer does not read overflows its outbox and is closed by the owner. Not guaranteed:
that what was put in the outbox arrived; the owners repeat what may be repeated.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any, Generic, Protocol, TypeVar

import grpc

from steward.errors import Reason, StewardError
from steward.rpc.outbox import Outbox
from steward.rpc.status import error_of
from steward.telemetry.logs import BUG, fields

WELCOME_S = 5.0
FIRST_BACKOFF_S = 0.05
MOST_BACKOFF_S = 1.0

ItemT = TypeVar("ItemT")
RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
WrittenT = TypeVar("WrittenT", contravariant=True)

_log = logging.getLogger(__name__)


class Call(Protocol[WrittenT]):
    """The part of grpc.aio.StreamStreamCall that is used."""

    async def write(self, request: WrittenT) -> None: ...

    async def read(self) -> Any: ...

    def cancel(self) -> bool: ...


class PeerStream(Generic[ItemT, RequestT, ResponseT]):
    """How to talk on one kind of stream."""

    def __init__(
        self,
        open_call: Callable[[], Call[RequestT]],
        hello: RequestT,
        pack: Callable[[list[ItemT]], RequestT],
        most: int,
        on_welcome: Callable[[ResponseT], None],
        on_message: Callable[[ResponseT], None],
        welcome_s: float = WELCOME_S,
    ) -> None:
        """`pack` makes one message of at most `most` items. The callbacks do not block.

        A peer that has not sent its welcome after `welcome_s` is given up.
        """
        self._open_call = open_call
        self._hello = hello
        self._pack = pack
        self._most = most
        self._on_welcome = on_welcome
        self._on_message = on_message
        self._welcome_s = welcome_s
        self._call: Call[RequestT] | None = None
        self._given_up = ""

    def give_up(self, why: str) -> None:
        """End the stream that is held now: `hold` raises StewardError with `why`.

        For peers that don't read, or say nothing any more. Does nothing when none is held.
        """
        if self._call is not None:
            self._given_up = why
            self._call.cancel()

    async def hold(self, outbox: Outbox[ItemT]) -> None:
        """Open the stream and run it until either side ends it.

        Raises StewardError when it breaks. Always closes the outbox.
        """
        call = self._call = self._open_call()
        writer: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(self._welcome_s):
                await call.write(self._hello)
                welcome = await call.read()
            if welcome is grpc.aio.EOF:
                raise StewardError(Reason.MANAGER_UNAVAILABLE, "the peer ended the stream")
            self._on_welcome(welcome)
            writer = asyncio.create_task(self._write(call, outbox))
            while (message := await call.read()) is not grpc.aio.EOF:
                self._on_message(message)
        except grpc.RpcError as failure:
            raise error_of(failure) from None
        except TimeoutError:
            raise StewardError(Reason.MANAGER_UNAVAILABLE, "no welcome in time") from None
        except asyncio.InvalidStateError:
            raise StewardError(Reason.MANAGER_UNAVAILABLE, "the stream is over") from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Not this task but the call was cancelled: by the writer, or given up.
            why = self._given_up or "the peer does not read"
            raise StewardError(Reason.MANAGER_UNAVAILABLE, why) from None
        finally:
            self._call = None
            call.cancel()
            outbox.close()
            if writer is not None:
                writer.cancel()
                await asyncio.wait({writer})
                if not writer.cancelled():
                    writer.exception()  # the reader has seen the same failure

    async def _write(self, call: Call[RequestT], outbox: Outbox[ItemT]) -> None:
        while items := await outbox.take(self._most):
            await call.write(self._pack(items))
        # The owner closed the outbox: the reader has to end as well.
        call.cancel()


async def keep(
    attempt: Callable[[], Awaitable[None]],
    opened: Callable[[], bool],
    on_down: Callable[[StewardError], None],
    most_backoff_s: float = MOST_BACKOFF_S,
) -> None:
    """Run `attempt` again and again. `opened` tells whether the last one got its welcome."""
    backoff = FIRST_BACKOFF_S
    while True:
        try:
            await attempt()
            error = StewardError(Reason.MANAGER_UNAVAILABLE, "the peer ended the stream")
        except StewardError as failure:
            error = failure
        except Exception:
            _log.exception("a stream ended by an error of this process", extra=fields(do=BUG))
            error = StewardError(Reason.INTERNAL, "an error of this process")
        if opened():
            backoff = FIRST_BACKOFF_S
        on_down(error)
        # Its traceback keeps the call, and so a connection that gRPC would go on to dial.
        del error
        await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
        backoff = min(backoff * 2, most_backoff_s)
