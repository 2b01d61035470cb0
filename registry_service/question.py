"""A question to the machine that has one answer, for who holds no stream to it."""

import asyncio
from collections.abc import Callable

from registry_service.core.commands import Command, PeerId
from registry_service.core.effects import Message
from registry_service.driver import RegistryDriver
from steward.errors import Reason, StewardError


async def ask(
    driver: RegistryDriver, command: Callable[[PeerId], Command], within_s: float
) -> Message:
    """The answer to a command of a peer that is there for it alone.

    Raises TimeoutError, and StewardError(STORE_UNAVAILABLE) when the registry stops meanwhile.
    """
    asker = _Asker()
    peer = driver.connect(asker)
    try:
        driver.submit(command(peer))
        async with asyncio.timeout(within_s):
            return await asker.answer
    finally:
        driver.disconnect(peer)


class _Asker:
    """The outgoing side: one message."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

    def deliver(self, message: Message) -> None:
        if not self.answer.done():
            self.answer.set_result(message)

    def end(self) -> None:
        if not self.answer.done():
            text = "the registry is stopping; try again"
            self.answer.set_exception(StewardError(Reason.STORE_UNAVAILABLE, text))
