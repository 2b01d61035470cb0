"""`Run` and `BlockingRun`: the whole interface between an agent and Steward.

Guarantees: a tool starts only after its `tool_executing` is in the log; `tool` and
`step` return only after what they recorded is in the log; the other verbs return when
their event is in the run's bounded window of unacknowledged verbs, and wait while that
is full. When the run is over, every verb raises `RunCancelled`.

Not here: `agent_started` and `agent_completed` (the manager makes them), and waiting for
people (`ask`), which comes with durable runs.
"""

import asyncio
import concurrent.futures
import inspect
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import orjson

from steward.agent.port import Branch, RunCancelled, RunPort
from steward.agent.recorder import Recorder
from steward.errors import Reason, StewardError
from steward.model.verbs import RunStart
from steward.runtime.clock import boot_ms

OnCrash = Literal["retry", "ask", "fail"]
Result = TypeVar("Result")


class NotAvailable(StewardError, NotImplementedError):
    """A verb that this version does not have yet."""


@dataclass(frozen=True, slots=True)
class RunInput:
    """What the user sent. `text` joins the text of all parts by newlines."""

    text: str
    parts: tuple[Any, ...]


class RunFacts:
    """What both kinds of run know.

    `messages` is the thread's history, oldest first, ending with the current input:
    `{role, content, run_id}`. `state` is the user's durable dict of JSON values: change it in
    place or assign a new one; the change is appended with the next verb, or at the end.
    `deadline` is in seconds on `time.monotonic()`, None without one.
    """

    __slots__ = ("_recorder", "_start", "deadline", "input", "messages")

    def __init__(self, start: RunStart, recorder: Recorder) -> None:
        self._start = start
        self._recorder = recorder
        # Copied, since an agent may change what it gets and the manager keeps the originals.
        self.input = _read_input(_copy(start.content))
        self.messages: list[dict[str, Any]] = _copy(list(start.messages))
        self.deadline: float | None = None
        if start.deadline_ms:
            self.deadline = time.monotonic() + (start.deadline_ms - boot_ms()) / 1000

    @property
    def tenant(self) -> str:
        return self._start.key.user.tenant

    @property
    def user(self) -> str:
        return self._start.key.user.user

    @property
    def thread_id(self) -> str:
        return self._start.thread_id

    @property
    def run_id(self) -> str:
        return self._start.key.run_id

    @property
    def attempt(self) -> int:
        """How often this run is executed, from 1."""
        return self._start.attempt

    @property
    def epoch(self) -> int:
        """The fencing number under which this execution writes."""
        return self._start.key.epoch

    @property
    def traceparent(self) -> str:
        """W3C trace context, for calls to other systems."""
        return self._start.traceparent

    @property
    def state(self) -> dict[str, Any]:
        return self._recorder.state

    @state.setter
    def state(self, value: dict[str, Any]) -> None:
        if not isinstance(value, dict):
            raise TypeError(f"state is a dict, not {type(value).__name__}")
        self._recorder.state = value

    def idempotency_key(self, name: str) -> str:
        """A key for calls to other systems, the same on every attempt of this run.

        `tenant/user/run/name`, each percent-encoded, so that no id can forge another's key.
        """
        parts = (self.tenant, self.user, self.run_id, name)
        return "/".join(quote(part, safe="") for part in parts)


class Run(RunFacts):
    """One execution of an agent, for `async def` agents."""

    __slots__ = ("_port",)

    def __init__(self, start: RunStart, recorder: Recorder, port: RunPort) -> None:
        """Made by the host."""
        super().__init__(start, recorder)
        self._port = port

    async def think(
        self,
        thought: str,
        *,
        delta: bool = False,
        step: int | None = None,
        total_steps: int | None = None,
        progress: float | None = None,
    ) -> None:
        """Show what the agent is about to do: a whole status, or a piece of one with `delta`."""
        await self._recorder.think(thought, delta, step, total_steps, progress)

    async def say(self, text: str | AsyncIterable[str]) -> None:
        """Stream a piece of the answer, or all pieces of an async iterator as they come.

        Raises TypeError for anything but text, ValueError when the answer of the run would be
        over 1 MiB.
        """
        if isinstance(text, AsyncIterable):
            async for piece in text:
                await self._recorder.say(piece)
        else:
            await self._recorder.say(text)

    async def tool(
        self,
        name: str,
        args: Mapping[str, Any],
        fn: Callable[..., Any],
        *,
        id: str | None = None,
        on_crash: OnCrash = "retry",
        purpose: str | None = None,
    ) -> Any:
        """Call `fn(**args)` as a recorded tool call and return its value, which must be JSON.

        A plain function runs in a thread. `id` replaces the call id `<run_id>.<name>.<n>` and
        must be new in this run. An exception of `fn` is recorded and raised again; a result that
        is not JSON is a TypeError, one over 1 MiB a ValueError, both recorded as failures. A
        tuple comes back as a list, as it would on a later attempt. `on_crash` says what a later
        attempt does with a call that was in flight.
        """
        call = await self._recorder.open_call(
            name, args, fn, id, on_crash, purpose, self._port.branch()
        )
        if call.completion is not None:
            return await self._recorder.repeat_completion(call, fn)
        try:
            await self._recorder.announced(call)
            value = await self._invoke(partial(fn, **args))
        except BaseException as error:
            await self._recorder.fail_call(call, error)
            raise
        return await self._recorder.complete_call(call, value)

    async def step(self, name: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `fn(*args, **kwargs)` as a step without events and return its value (JSON).

        It starts when all that the run did before is in the log, and this returns when the value
        is: on a later attempt that is returned, and `fn` not called. A step that raises has not
        finished. A value over 1 MiB is a ValueError, one that is not JSON a TypeError.
        """
        step = await self._recorder.open_step(name, args, kwargs, self._port.branch())
        if step.finished is not None:
            return orjson.loads(step.finished.value)
        value = await self._invoke(partial(fn, *args, **kwargs))
        return await self._recorder.complete_step(step, value)

    async def progress(self, fraction: float, label: str = "") -> None:
        """Show how far the run is, from 0 to 1. Raises ValueError outside of that."""
        await self._recorder.progress(fraction, label)

    async def emit(self, name: str, value: Any) -> None:
        """Append a `custom` event. Raises TypeError when `value` is not JSON."""
        await self._recorder.emit(name, value)

    async def ask(self, prompt: str, schema: Any = str) -> Any:
        """Ask the user and wait for the answer. Not yet available."""
        raise _not_available("ask")

    def steer(self) -> AsyncIterator[Any]:
        """Messages that arrive while the run is active. Not yet available."""
        raise _not_available("steer")

    async def subrun(self, agent: str, input: Any) -> Any:
        """Run another agent as part of this run. Not yet available."""
        raise _not_available("subrun")

    async def _invoke(self, call: Callable[[], Any]) -> Any:
        if is_async(call):
            return await call()
        value = await self._port.in_thread(call)
        return await value if inspect.isawaitable(value) else value


class BlockingRun(RunFacts):
    """One execution of an agent, for plain `def` agents: the same verbs, which block.

    Only for threads other than that of the agent loop. Plain tools and steps run in the
    caller's own thread, coroutine functions on the agent loop.
    """

    __slots__ = ("_branched", "_loop", "_over", "_thread")

    def __init__(
        self,
        start: RunStart,
        recorder: Recorder,
        loop: asyncio.AbstractEventLoop,
        over: Callable[[], bool],
    ) -> None:
        """Made by the host. `loop` runs agent code; `over` says whether the run has ended."""
        super().__init__(start, recorder)
        self._loop = loop
        self._over = over
        self._thread = 0
        self._branched = False

    def enter(self) -> None:
        """Called by the host in the thread of the agent, before the agent is."""
        self._thread = threading.get_ident()

    def think(
        self,
        thought: str,
        *,
        delta: bool = False,
        step: int | None = None,
        total_steps: int | None = None,
        progress: float | None = None,
    ) -> None:
        """As `Run.think`."""
        self._wait(self._recorder.think(thought, delta, step, total_steps, progress))

    def say(self, text: str | Iterable[str] | AsyncIterable[str]) -> None:
        """As `Run.say`; takes a plain iterator too, which is read in this thread."""
        if isinstance(text, str):
            self._wait(self._recorder.say(text))
        elif isinstance(text, AsyncIterable):
            self._wait(self._say_all(text))
        elif isinstance(text, Iterable):
            for piece in text:
                self._wait(self._recorder.say(piece))
        else:
            self._wait(self._recorder.say(text))

    def tool(
        self,
        name: str,
        args: Mapping[str, Any],
        fn: Callable[..., Any],
        *,
        id: str | None = None,
        on_crash: OnCrash = "retry",
        purpose: str | None = None,
    ) -> Any:
        """As `Run.tool`."""
        branch = self._branch()
        call = self._wait(self._recorder.open_call(name, args, fn, id, on_crash, purpose, branch))
        if call.completion is not None:
            return self._wait(self._recorder.repeat_completion(call, fn))
        try:
            self._wait(self._recorder.announced(call))
            value = self._invoke(partial(fn, **args))
        except BaseException as error:
            self._wait(self._recorder.fail_call(call, error))
            raise
        return self._wait(self._recorder.complete_call(call, value))

    def step(self, name: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """As `Run.step`."""
        branch = self._branch()
        step = self._wait(self._recorder.open_step(name, args, kwargs, branch))
        if step.finished is not None:
            return orjson.loads(step.finished.value)
        value = self._invoke(partial(fn, *args, **kwargs))
        return self._wait(self._recorder.complete_step(step, value))

    def progress(self, fraction: float, label: str = "") -> None:
        """As `Run.progress`."""
        self._wait(self._recorder.progress(fraction, label))

    def emit(self, name: str, value: Any) -> None:
        """As `Run.emit`."""
        self._wait(self._recorder.emit(name, value))

    def ask(self, prompt: str, schema: Any = str) -> Any:
        """Ask the user and wait for the answer. Not yet available."""
        raise _not_available("ask")

    def steer(self) -> Iterable[Any]:
        """Messages that arrive while the run is active. Not yet available."""
        raise _not_available("steer")

    def subrun(self, agent: str, input: Any) -> Any:
        """Run another agent as part of this run. Not yet available."""
        raise _not_available("subrun")

    def _branch(self) -> Branch:
        # Threads of the agent are not seen before they call something.
        if threading.get_ident() != self._thread:
            self._branched = True
            return Branch.OTHER
        return Branch.MAIN if self._branched else Branch.ALONE

    def _invoke(self, call: Callable[[], Any]) -> Any:
        value = call()
        return self._wait(_await(value)) if inspect.isawaitable(value) else value

    async def _say_all(self, pieces: AsyncIterable[str]) -> None:
        async for piece in pieces:
            await self._recorder.say(piece)

    def _wait(self, verb: Coroutine[Any, Any, Result]) -> Result:
        """Run a verb on the agent loop and block until it is done."""
        if _running_loop() is self._loop:
            verb.close()
            raise RuntimeError("a blocking verb was called on the agent loop; make the tool plain")
        try:
            future = asyncio.run_coroutine_threadsafe(verb, self._loop)
        except RuntimeError:
            # The loop is closed: the node has stopped.
            verb.close()
            raise RunCancelled from None
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            # That one is an ordinary exception, which an agent could swallow by accident.
            raise (RunCancelled if self._over() else asyncio.CancelledError) from None


def is_async(call: Callable[..., Any]) -> bool:
    """Whether calling it makes a coroutine; sees through partials and callable objects."""
    while isinstance(call, partial):
        call = call.func
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(
        getattr(call, "__call__", None)  # noqa: B004 (the method itself is asked)
    )


async def _await(value: Any) -> Any:
    return await value


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _read_input(content: Any) -> RunInput:
    if isinstance(content, str):
        return RunInput(content, ({"type": "text", "text": content},))
    parts = tuple(content) if isinstance(content, list) else (content,)
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return RunInput("\n".join(text for text in texts if isinstance(text, str)), parts)


def _copy(value: Any) -> Any:
    return orjson.loads(orjson.dumps(value))


def _not_available(verb: str) -> NotAvailable:
    return NotAvailable(Reason.INTERNAL, f"run.{verb} comes with durable runs; not available yet")
