"""`Client`: a user's live stream of events, through any reconnect, and the messages into it.

The shell around `steward.client.core.ClientSession`: it gives the machine time, random
numbers and what the sockets say, and does what the machine asks. It guarantees an event
order without gap or repeat and messages that are accepted once; it keeps no history and
nothing on disk, so a program that restarts passes the position it got to as `after`.
One event loop, no threads, no grpc.
"""

import asyncio
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self
from weakref import WeakValueDictionary, finalize

import aiohttp
import orjson

from steward.client import commands
from steward.client.buffer import EventBuffer
from steward.client.commands import Command, Effect, SessionState
from steward.client.connection import Connection, check_upgrade
from steward.client.core import ClientSession
from steward.client.events import Accepted, ClientClosed, Event, event_of
from steward.client.run import Run
from steward.client.tracing import current_trace
from steward.errors import Reason, StewardError
from steward.model.keys import StreamPosition

Content = str | Sequence[Mapping[str, Any]]
TokenProvider = Callable[[], Awaitable[str]]

BUFFERED_EVENTS = 1024
READER_S = 20.0
"""How long a full buffer may hold up the connection; below two heartbeats."""

OPEN_S = 30.0
SEND_S = 60.0
TOKEN_S = 10.0
CLOSE_S = 3.0


class Client:
    """One session of one user, for use with `async with`.

    `url` is the edge's (`http://host:port`); several where no balancer stands before the edges:
    each connection after the first goes to the next one. Give a `token`, or a `token_provider`
    that returns a new one each time it is awaited; only with the latter does the session outlive
    a token.
    `client_id` names this tab or device: the same id connecting again takes over from the one
    before. `after` resumes: a StreamPosition, a sequence, or 0 for the whole stream; without it
    only what happens from now on is seen. `merge` lets the server send neighbouring deltas of one
    text as one event while this client reads too slowly (see `Event`); whether it does is the
    `merge` of `ready`.

    Iterating over the client gives every event of the user, next in order, once. At most
    `buffer` of them wait for the reader (see `EventBuffer`). `on_opened` is called at every
    `ready`, `on_problem` for refusals that belong to no message.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        token: str | None = None,
        token_provider: TokenProvider | None = None,
        client_id: str | None = None,
        after: StreamPosition | int | None = None,
        merge: bool = False,
        buffer: int = BUFFERED_EVENTS,
        on_opened: Callable[[commands.Opened], None] | None = None,
        on_problem: Callable[[commands.Problem], None] | None = None,
    ) -> None:
        if (token is None) == (token_provider is None):
            raise ValueError("give either token or token_provider")
        stream = after.stream_id if isinstance(after, StreamPosition) else ""
        sequence = after.sequence if isinstance(after, StreamPosition) else after
        urls = (url,) if isinstance(url, str) else tuple(url)
        if not urls:
            raise ValueError("give at least one url")
        self._connect_urls = tuple(f"{one.rstrip('/')}/v1/connect" for one in urls)
        self._dials = 0
        self._token = token
        self._provider = token_provider
        self._client_id = client_id
        self._merge = merge
        self._on_opened = on_opened
        self._on_problem = on_problem
        self._session = ClientSession(
            after=sequence, stream=stream, renewable=token_provider is not None
        )
        self._buffer_size = buffer
        self._events = EventBuffer(buffer)
        self._raw = ""
        self._rng = random.Random()
        self._clock_ms = time.time_ns() // 1_000_000 - time.monotonic_ns() // 1_000_000
        self._http: aiohttp.ClientSession | None = None
        self._connection: Connection | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ms = 0
        self._opened: asyncio.Future[commands.Opened] | None = None
        self._trouble = "the server did not answer"
        self._sends: dict[str, asyncio.Future[Accepted]] = {}
        self._asks = False
        # By message id until the run is known, then by run id until it is over. Weak: a run that
        # the application forgot must hold up nobody.
        self._asked: WeakValueDictionary[str, Run] = WeakValueDictionary()
        self._runs: WeakValueDictionary[str, Run] = WeakValueDictionary()

    async def __aenter__(self) -> Self:
        """Connect and wait for the first `ready`.

        Raises StewardError when the server refuses, or can't be reached within 30 s.
        """
        if self._http is not None:
            raise RuntimeError("a client can be opened once")
        self._http = aiohttp.ClientSession(raise_for_status=check_upgrade)
        self._opened = asyncio.get_running_loop().create_future()
        try:
            self._handle(commands.Start())
            async with asyncio.timeout(OPEN_S):
                await self._opened
        except TimeoutError:
            await self.close()
            raise StewardError(
                Reason.MANAGER_UNAVAILABLE, f"not connected in {OPEN_S:g} s: {self._trouble}"
            ) from None
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the session. What was written is sent first. Safe to call twice."""
        self._handle(commands.Close())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=CLOSE_S)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        if self._http is not None:
            await self._http.close()

    @property
    def state(self) -> SessionState:
        return self._session.state

    @property
    def position(self) -> StreamPosition | None:
        """Where the stream was delivered up to; give it as `after` to go on from here."""
        stream, sequence = self._session.position
        return StreamPosition(stream, sequence) if stream and sequence is not None else None  # type: ignore[arg-type]

    def __aiter__(self) -> Self:
        """Every event of the user, for one reader. Ends when the client is closed.

        Raises StewardError when the server ended the session, or when events were not read in time.
        """
        return self

    async def __anext__(self) -> Event:
        event = await self._events.get()
        if event is None:
            raise StopAsyncIteration
        return event

    async def send(
        self,
        content: Content,
        *,
        thread_id: str | None = None,
        agent: str | None = None,
        overlap: str | None = None,
        id: str | None = None,
        trace: str | None = None,
    ) -> Accepted:
        """Send a message; returns when it is in the user's log.

        Sent again under the same `id` after a lost connection; giving an `id` makes it safe to
        repeat over restarts too. Raises StewardError when it is refused, and after 60 s
        without an answer (it may still be accepted: ask again with the same id).
        `trace` is the `traceparent` of what it is sent for; by default that of the application's
        current OpenTelemetry span, if it has one.
        """
        message_id = uuid.uuid4().hex if id is None else id
        frame: dict[str, Any] = {"type": "user_message", "id": message_id, "content": content}
        for name, value in (("thread_id", thread_id), ("agent", agent), ("overlap", overlap)):
            if value is not None:
                frame[name] = value
        if trace := (current_trace() if trace is None else trace):
            frame["trace"] = trace
        size = len(orjson.dumps(frame))
        waiting = self._sends.get(message_id)
        if waiting is None:
            waiting = asyncio.get_running_loop().create_future()
            self._sends[message_id] = waiting
            # An answer that comes when nobody waits any more is no error.
            waiting.add_done_callback(_look_at)
            self._handle(commands.Send(frame, size))
        try:
            async with asyncio.timeout(SEND_S):
                return await asyncio.shield(waiting)
        except TimeoutError:
            raise StewardError(
                Reason.MANAGER_UNAVAILABLE,
                f"message {message_id} was not answered in {SEND_S:g} s; repeat it with this id",
            ) from None

    async def ask(
        self,
        content: Content,
        *,
        thread_id: str | None = None,
        agent: str | None = None,
        overlap: str | None = None,
        id: str | None = None,
        trace: str | None = None,
    ) -> Run:
        """Send a message and get its run: iterate over its events, then look at `response`.

        Raises what `send` raises, and StewardError(NOT_FOUND) for a repeated `id` whose run began
        before this client's position.
        """
        message_id = uuid.uuid4().hex if id is None else id
        if message_id in self._asked:
            raise ValueError(f"message {message_id} is being asked already")
        self._asks = True
        seen = self._session.position[1] or 0
        run = Run(message_id, EventBuffer(self._buffer_size), self.cancel)
        # The connection may be waiting for a reader that does not exist any more.
        finalize(run, run.buffer.end).atexit = False
        self._asked[message_id] = run
        try:
            accepted = await self.send(
                content,
                thread_id=thread_id,
                agent=agent,
                overlap=overlap,
                id=message_id,
                trace=trace,
            )
        except BaseException:
            self._asked.pop(message_id, None)
            raise
        if not run.run_id and accepted.run_id in self._runs:
            self._asked.pop(message_id, None)
            return self._runs[accepted.run_id]
        if not run.run_id and accepted.duplicate and accepted.sequence <= seen:
            self._asked.pop(message_id, None)
            raise StewardError(
                Reason.NOT_FOUND,
                f"run {accepted.run_id} began at {accepted.sequence}, before this client's "
                f"position; connect with after={accepted.sequence - 1}",
            )
        run.accepted = accepted
        self._bind(message_id, accepted.run_id)
        return run

    async def cancel(self, run_id: str | None = None, *, thread_id: str | None = None) -> None:
        """Ask to stop one run, or those of a thread; its `agent_completed` tells the outcome.

        Returns when it is on its way: written once, now or at the next connection.
        """
        if (run_id is None) == (thread_id is None):
            raise ValueError("give either run_id or thread_id")
        where = {"run_id": run_id} if run_id is not None else {"thread_id": thread_id}
        self._handle(commands.Post({"type": "cancel", **where}))

    async def answer(self, request_id: str, value: Any) -> None:
        """Answer an `input_requested`. Written once, now or at the next connection."""
        self._handle(
            commands.Post({"type": "user_input", "request_id": request_id, "value": value})
        )

    async def ack(self, sequence: int, digest: str = "") -> None:
        """Tell the server that all events up to `sequence` were used. Optional; may be lost."""
        self._handle(commands.Ack(sequence, digest))

    # -- driving the session ------------------------------------------------------------

    def _now_ms(self) -> int:
        return self._clock_ms + time.monotonic_ns() // 1_000_000

    def _handle(self, command: Command) -> None:
        for effect in self._session.handle(self._now_ms(), command):
            self._do(effect)
        self._arm()

    def _arm(self) -> None:
        """Have a timer at or before the session's deadline; one that is early just looks again."""
        deadline = self._session.next_deadline()
        if deadline is None or (self._timer is not None and self._timer_ms <= deadline):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_ms = deadline
        delay = max(0, deadline - self._now_ms()) / 1000
        self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._handle(commands.Tick(self._rng.random()))

    def _on_report(
        self, command: commands.Received | commands.Closed | commands.Refused, raw: str
    ) -> None:
        if isinstance(command, commands.Refused):
            self._trouble = command.message or f"HTTP {command.status}"
        elif isinstance(command, commands.Closed):
            self._trouble = f"closed with {command.code} {command.reason}".rstrip()
        self._raw = raw
        self._handle(command)

    def _do(self, effect: Effect) -> None:
        match effect:
            case commands.Deliver():
                self._deliver(event_of(effect.frame, self._raw))
            case commands.Write():
                if self._connection is not None:
                    self._connection.write(orjson.dumps(effect.frame).decode())
            case commands.Open():
                self._dial(effect)
            case commands.Shut():
                self._trouble = effect.why
                if self._connection is not None:
                    self._connection.shut(effect.code)
                    self._connection = None
            case commands.Opened():
                self._on_ready(effect)
            case commands.MessageAccepted():
                accepted = Accepted(
                    effect.id,
                    effect.run_id,
                    effect.sequence,
                    effect.duplicate,
                    effect.queue_position,
                )
                self._settle(effect.id, accepted)
            case commands.MessageFailed():
                self._settle(
                    effect.id, _error(effect.reason, effect.message, effect.retry_after_ms)
                )
            case commands.Problem():
                if self._on_problem is not None:
                    asyncio.get_running_loop().call_soon(self._on_problem, effect)
            case commands.RefreshToken():
                self._keep(asyncio.create_task(self._refresh(), name="steward-refresh"))
            case commands.Ended():
                self._on_ended(effect)

    def _dial(self, effect: commands.Open) -> None:
        assert self._http is not None
        query: dict[str, str] = {}
        if effect.after is not None:
            query["after"] = str(effect.after)
            if effect.stream:
                query["stream"] = effect.stream
        if self._client_id is not None:
            query["client"] = self._client_id
        if self._merge:
            query["merge"] = "1"
        if effect.new_token:
            self._token = None
        url = self._connect_urls[self._dials % len(self._connect_urls)]
        self._dials += 1
        self._connection = Connection(
            self._http,
            url,
            query,
            self._current_token,
            self._on_report,
            self._room,
            self._rng,
        )
        self._keep(self._connection.task)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_ready(self, opened: commands.Opened) -> None:
        if opened.resume == "reset":
            self._events.clear()
            text = "the stream was reset while this run was watched; read the thread's history"
            for run in (*self._asked.values(), *self._runs.values()):
                run.buffer.end(StewardError(Reason.POSITION_COMPACTED, text))
            self._runs.clear()
        if self._opened is not None and not self._opened.done():
            self._opened.set_result(opened)
        if self._on_opened is not None:
            # Not from in here: what the application's code raises must not break the session.
            asyncio.get_running_loop().call_soon(self._on_opened, opened)

    def _on_ended(self, ended: commands.Ended) -> None:
        error = _error(ended.reason, ended.message)
        # The connection may still have its close to do; it is in `_tasks`.
        self._connection = None
        if self._opened is not None and not self._opened.done():
            self._opened.set_exception(error)
        self._events.end(None if ended.reason is None else error)
        for run in (*self._asked.values(), *self._runs.values()):
            run.buffer.end(error)
        self._asked.clear()
        self._runs.clear()

    # -- messages and events --------------------------------------------------------------

    def _settle(self, message_id: str, answer: Accepted | Exception) -> None:
        waiting = self._sends.pop(message_id, None)
        if waiting is None or waiting.done():
            return
        if isinstance(answer, Accepted):
            waiting.set_result(answer)
        else:
            waiting.set_exception(answer)

    def _bind(self, message_id: str, run_id: str) -> None:
        run = self._asked.pop(message_id, None)
        if run is not None:
            run.run_id = run_id
            self._runs[run_id] = run

    def _deliver(self, event: Event) -> None:
        self._events.put(event)
        if event.type == "user_message":
            # The run's events follow this one, whether or not its `accepted` came before.
            self._bind(str(event.data.get("id", "")), event.run_id)
            return
        run = self._runs.get(event.run_id)
        if run is not None:
            run.buffer.put(event)
            if event.type == "agent_completed":
                run.buffer.end()
                del self._runs[event.run_id]

    async def _room(self) -> None:
        """Wait for slow readers, each for a bounded time, between two reads of the socket."""
        for buffer in (self._events, *(run.buffer for run in self._runs.values())):
            if buffer.full:
                # An application that only asks has no use for the events of everything else.
                unused = buffer is self._events and self._asks and not buffer.was_read
                await buffer.room(0.0 if unused else READER_S)

    # -- tokens -----------------------------------------------------------------------------

    async def _current_token(self) -> str:
        if self._token is None:
            self._token = await self._new_token()
        return self._token

    async def _new_token(self) -> str:
        assert self._provider is not None
        async with asyncio.timeout(TOKEN_S):
            return await self._provider()

    async def _refresh(self) -> None:
        try:
            token = await self._new_token()
        except Exception as error:
            # The old one lives until it expires; then the server closes, and we dial anew.
            self._trouble = f"no new token: {error!r}"
            return
        self._token = token
        self._handle(commands.NewToken(token))


def _error(reason: Reason | None, message: str, retry_after_ms: int | None = None) -> Exception:
    if reason is None:
        return ClientClosed(message)
    return StewardError(reason, message, retry_after_ms=retry_after_ms)


def _look_at(future: "asyncio.Future[Accepted]") -> None:
    if not future.cancelled():
        future.exception()
