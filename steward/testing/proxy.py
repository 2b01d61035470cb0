"""A TCP proxy that can be cut like a network: connections stay open, and nothing comes through.

For tests of what a process does when it can't reach a peer that lives. `cut` holds every byte
both ways, and new connections too; `mend` lets it all pass again, as TCP does after a
partition. `break_off` resets what is connected. Runs on the caller's event loop.
"""

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self

CHUNK = 65_536


class CutProxy:
    """Forwards `address` to `target` (both `host:port`); `async with`, or `open` and `close`."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._whole = asyncio.Event()
        self._whole.set()
        self._pipes: set[asyncio.Task[None]] = set()
        self.address = ""

    async def open(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def cut(self) -> None:
        """From now on nothing comes through."""
        self._whole.clear()

    def mend(self) -> None:
        """Let what was held, and all that comes, through."""
        self._whole.set()

    async def break_off(self) -> None:
        """Close what is connected; new connections are taken as before."""
        pipes = list(self._pipes)
        for pipe in pipes:
            pipe.cancel()
        await asyncio.gather(*pipes, return_exceptions=True)

    async def close(self) -> None:
        """Stop. Safe to call twice."""
        self._server.close()
        await self.break_off()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pipes.add(task)
        far_writer: asyncio.StreamWriter | None = None
        # A pipe that is broken off, or whose end went away, is simply over.
        with suppress(OSError, asyncio.CancelledError):
            await self._whole.wait()
            far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(reader, far_writer))
                both.create_task(self._pump(far_reader, writer))
        for end in (writer, far_writer):
            if end is not None:
                end.close()
        self._pipes.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(CHUNK):
                await self._whole.wait()
                writer.write(data)
                await writer.drain()
        writer.close()
