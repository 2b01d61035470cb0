"""`Run`: the events of one question, as `Client.ask` returns it."""

from collections.abc import Awaitable, Callable
from typing import Any, Self

from steward.client.buffer import EventBuffer
from steward.client.events import Accepted, Event


class Run:
    """Iterate over it once: every event of the run, in order, the last is `agent_completed`.

    `accepted` says where the message is in the log. After the end `completed` is the last event,
    and `outcome`, `response`, `result` and `error` are what it says. The iteration raises
    StewardError when the session ended or was reset before the run did.
    """

    def __init__(
        self, message_id: str, buffer: EventBuffer, cancel: Callable[[str], Awaitable[None]]
    ) -> None:
        self.message_id = message_id
        self.run_id = ""
        self.accepted: Accepted | None = None
        self.completed: Event | None = None
        self.buffer = buffer
        self._cancel = cancel

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        event = await self.buffer.get()
        if event is None:
            raise StopAsyncIteration
        if event.type == "agent_completed":
            self.completed = event
        return event

    async def wait(self) -> str:
        """Read to the end without looking; returns `response`."""
        async for _ in self:
            pass
        return self.response

    async def cancel(self) -> None:
        """Ask to stop; the run still ends with `agent_completed`."""
        await self._cancel(self.run_id)

    @property
    def outcome(self) -> str:
        """`success`, `failed`, `cancelled`, `interrupted`; empty while it runs."""
        return str(self._end("outcome", ""))

    @property
    def response(self) -> str:
        """The final text; empty while it runs."""
        return str(self._end("response", ""))

    @property
    def result(self) -> Any:
        """The JSON result of an agent that returned one, else None."""
        return self._end("result", None)

    @property
    def error(self) -> dict[str, str] | None:
        """`{type, message}` of a run that failed, else None."""
        error: dict[str, str] | None = self._end("error", None)
        return error

    def _end(self, name: str, otherwise: Any) -> Any:
        return otherwise if self.completed is None else self.completed.data.get(name, otherwise)
