"""One execution of a run on the agent loop: the window of its verbs, its tasks, its end.

Guarantees: at most `WINDOW` verbs (and `WINDOW_BYTES`) of it are unacknowledged, but for
completions of tool calls that were cancelled; verbs are numbered from 1 without gaps in
the order in which they are put; it ends with exactly one `FinishRun`, unless it was
cancelled: then nothing of it is put any more. Whatever agent code raises is an outcome.
"""

import asyncio
import logging
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any, NoReturn, Protocol

from agent_service.host.agent_threads import AgentThreads
from steward.agent import BlockingRun, Run, RunCancelled
from steward.agent.definition import AgentDefinition
from steward.agent.outcome import RunOutcome, failed, succeeded
from steward.agent.port import Branch
from steward.agent.recorder import Recorder
from steward.model.verbs import (
    EmitEvent,
    EventType,
    FinishRun,
    RecordStep,
    RepeatCall,
    RunStart,
    Verb,
)
from steward.telemetry.logs import fields

WINDOW = 64
WINDOW_BYTES = 4 * 1024 * 1024

LEAK_GRACE_S = 1.0
"""How long tasks that an agent left behind may take to end, before the run ends without them."""

PATIENCE = 8
"""Refused verbs that are answered at once; one more and the caller loops: it is slowed down."""

_log = logging.getLogger(__name__)


class Waits(Protocol):
    """Told of each run that waits for the log or for room, and of the end of it."""

    def begin_wait(self) -> None:
        """What the log has said by now is handed over before this returns."""
        ...

    def end_wait(self) -> None: ...


class AgentExecution:
    """A `RunPort` for one run. All methods are called on the agent loop."""

    def __init__(
        self,
        start: RunStart,
        agent: AgentDefinition,
        threads: AgentThreads,
        tool_threads: AgentThreads,
        put: Callable[[Verb], None],
        waits: Waits,
    ) -> None:
        self.start = start
        self.key = start.key
        self.over = False
        self.main: asyncio.Task[None] | None = None
        self.tasks: set[asyncio.Task[Any]] = set()
        self._agent = agent
        self._threads = threads
        self._tool_threads = tool_threads
        self._put = put
        self._waits = waits
        self._loop = asyncio.get_running_loop()
        self._number = 0
        self._acknowledged = 0
        self._bytes = 0
        self._unacknowledged: deque[tuple[int, int]] = deque()
        self._room_waiters: deque[tuple[int, int, asyncio.Future[None]]] = deque()
        self._granted = 0
        self._granted_bytes = 0
        self._log_waiters: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._refusals = 0

    # The port of the run.

    async def append(
        self,
        type: EventType,
        data: bytes,
        tool_call_id: str = "",
        state: bytes = b"",
        steps: Sequence[tuple[str, bytes]] = (),
    ) -> int:
        size = len(data) + len(state)
        if steps:
            await self._enter(size + sum(len(value) for _, value in steps), 1 + len(steps))
            for step_id, value in steps:
                number = self._take_number(len(value))
                self._put(RecordStep(self.key, number, step_id, value))
        elif self.over or self._room_waiters or not self._has_room(size, 1):
            await self._enter(size)
        number = self._take_number(size)
        self._put(EmitEvent(self.key, number, type, data, tool_call_id, state))
        return number

    def append_now(self, type: EventType, data: bytes, tool_call_id: str = "") -> None:
        if not self.over:
            number = self._take_number(len(data))
            self._put(EmitEvent(self.key, number, type, data, tool_call_id))

    async def record_step(self, step_id: str, value: bytes) -> int:
        await self._enter(len(value))
        number = self._take_number(len(value))
        self._put(RecordStep(self.key, number, step_id, value))
        return number

    async def repeat_call(self, tool_call_id: str) -> int:
        await self._enter(0)
        number = self._take_number(0)
        self._put(RepeatCall(self.key, number, tool_call_id))
        return number

    async def acknowledged(self, number: int) -> None:
        if self.over:
            await self._refuse()
        if number <= self._acknowledged:
            return
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._log_waiters.append((number, waiter))
        await self._wait(waiter)

    async def in_thread(self, call: Callable[[], Any]) -> Any:
        return await self._tool_threads.run(call)

    def branch(self) -> Branch:
        if asyncio.current_task() is not self.main:
            return Branch.OTHER
        return Branch.ALONE if len(self.tasks) == 1 else Branch.MAIN

    # What the loop does with it.

    async def execute(self) -> None:
        """Run the agent to its end and put `FinishRun`; returns silently when it was cancelled.

        Never raises but CancelledError, and that only when the run is over.
        """
        recorder = Recorder(self.key.run_id, {}, self)
        try:
            recorder = self._recorder()
            returned = await self._call(recorder)
            await self._end_tasks()
            await recorder.end()
            self._log_unmet(recorder)
            outcome = succeeded(returned, recorder.said)
        except BaseException as error:
            if self.over:
                raise RunCancelled from None
            self._log_failure(error)
            outcome = await self._fail(recorder, error)
        await self._finish(outcome)

    def acknowledge(self, number: int) -> None:
        """All verbs up to `number` are in the log: let go who waited for that."""
        if number <= self._acknowledged:
            return
        self._acknowledged = number
        unacknowledged = self._unacknowledged
        while unacknowledged and unacknowledged[0][0] <= number:
            self._bytes -= unacknowledged.popleft()[1]
        waiters = self._log_waiters
        while waiters and waiters[0][0] <= number:
            _release(waiters.popleft()[1])
        if self._room_waiters:
            self._let_in()

    def cancel(self) -> None:
        """End the run from outside: nothing of it is put from now on. Safe to call twice."""
        self.over = True
        for _, _, waiter in self._room_waiters:
            waiter.cancel()
        for _, waiter in self._log_waiters:
            waiter.cancel()
        self._room_waiters.clear()
        self._log_waiters.clear()
        for task in tuple(self.tasks):
            # A thread can't be cancelled: its next verb raises, and then it is done.
            if task is not self.main or self._agent.kind != "plain":
                task.cancel()

    def abandon(self) -> bool:
        """Cancel once more what did not end after `cancel`; whether there was any."""
        left = [task for task in self.tasks if not task.done()]
        for task in left:
            task.cancel()
        return bool(left)

    def finish_unknown(self) -> None:
        """End a run whose agent is not served here, without running anything."""
        error = LookupError(f"no agent {self.start.agent!r:.80} is served by this node")
        self._put_finish(failed(error, self._recorder().said))

    def _recorder(self) -> Recorder:
        start = self.start
        return Recorder(start.key.run_id, start.state, self, start.journal)

    async def _call(self, recorder: Recorder) -> Any:
        if self.over:
            raise RunCancelled
        function = self._agent.function
        if self._agent.kind == "plain":
            blocking = BlockingRun(self.start, recorder, self._loop, lambda: self.over)
            return await self._threads.run(lambda: _call_plain(function, blocking))
        run = Run(self.start, recorder, self)
        if self._agent.kind == "coroutine":
            return await function(run)
        async with aclosing(function(run)) as pieces:
            async for piece in pieces:
                await recorder.say(piece)
        return None

    async def _fail(self, recorder: Recorder, error: BaseException) -> RunOutcome:
        try:
            await self._end_tasks()
            await recorder.end(failed=True)
        except BaseException as second:
            if self.over:
                raise RunCancelled from None
            # The first error is the one that counts; this one is what it left behind.
            self._log_failure(second)
        return failed(error, recorder.said)

    async def _finish(self, outcome: RunOutcome) -> None:
        while self._room_waiters or not self._has_room(len(outcome.data), 1):
            try:
                await self._room(len(outcome.data), 1)
                break
            except asyncio.CancelledError:
                if self.over:
                    raise
        # An agent may swallow its cancellation and return as if nothing had been.
        if self.over:
            raise RunCancelled
        self._put_finish(outcome)

    def _put_finish(self, outcome: RunOutcome) -> None:
        self._number += 1
        self._put(FinishRun(self.key, self._number, outcome.outcome, outcome.data))
        self.over = True

    async def _end_tasks(self) -> None:
        """Cancel what the agent started and did not wait for."""
        left = {task for task in self.tasks if task is not self.main}
        if not left:
            return
        _log.info(
            "a run ended and left tasks, which are cancelled",
            extra=fields(run=self.key.run_id, tasks=len(left)),
        )
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=LEAK_GRACE_S)

    async def _enter(self, size: int, count: int = 1) -> None:
        """Wait for room in the window; the caller puts its verbs at once."""
        if self.over:
            await self._refuse()
        if self._room_waiters or not self._has_room(size, count):
            await self._room(size, count)

    def _take_number(self, size: int) -> int:
        self._number += 1
        self._unacknowledged.append((self._number, size))
        self._bytes += size
        return self._number

    def _has_room(self, size: int, count: int) -> bool:
        held = len(self._unacknowledged) + self._granted
        size += self._bytes + self._granted_bytes
        return held + count <= WINDOW and (held == 0 or size <= WINDOW_BYTES)

    async def _room(self, size: int, count: int) -> None:
        """Wait for room in the window, in the order of asking; the caller puts at once."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        entry = (size, count, waiter)
        self._room_waiters.append(entry)
        try:
            await self._wait(waiter)
        except asyncio.CancelledError:
            if entry in self._room_waiters:
                self._room_waiters.remove(entry)
            elif not self.over:
                # The room that was given to this caller is the next one's.
                self._take_grant(size, count)
                self._let_in()
            raise
        self._take_grant(size, count)

    def _take_grant(self, size: int, count: int) -> None:
        self._granted -= count
        self._granted_bytes -= size

    def _let_in(self) -> None:
        waiters = self._room_waiters
        while waiters and self._has_room(waiters[0][0], waiters[0][1]):
            size, count, waiter = waiters.popleft()
            self._granted += count
            self._granted_bytes += size
            _release(waiter)

    async def _wait(self, waiter: "asyncio.Future[None]") -> None:
        self._waits.begin_wait()
        try:
            await waiter
        except asyncio.CancelledError:
            if self.over:
                raise RunCancelled from None
            raise
        finally:
            self._waits.end_wait()
        if self.over:
            raise RunCancelled

    async def _refuse(self) -> NoReturn:
        self._refusals += 1
        if self._refusals > PATIENCE:
            # Code that swallows every refusal must not keep the loop busy.
            await asyncio.sleep(1.0)
        raise RunCancelled

    def _log_failure(self, error: BaseException) -> None:
        # Where it happened, not what it says: a message may hold what a user wrote.
        _log.warning(
            "a run failed",
            extra=fields(
                run=self.key.run_id,
                agent=self._agent.name,
                error=type(error).__name__,
                where="".join(traceback.format_tb(error.__traceback__)).rstrip(),
                trace=self.start.traceparent,
            ),
        )

    def _log_unmet(self, recorder: Recorder) -> None:
        unmet = recorder.unmet_calls
        if unmet:
            _log.warning(
                "an attempt did not come to all tool calls that an earlier one made",
                extra=fields(
                    run=self.key.run_id,
                    agent=self._agent.name,
                    attempt=self.start.attempt,
                    calls=len(unmet),
                    first=unmet[0],
                ),
            )


def _call_plain(function: Callable[[Any], Any], run: BlockingRun) -> Any:
    run.enter()
    returned = function(run)
    if hasattr(returned, "__next__") and hasattr(returned, "close"):
        try:
            for piece in returned:
                run.say(piece)
        finally:
            returned.close()
        return None
    if asyncio.iscoroutine(returned):
        returned.close()
        raise TypeError("a plain function returned a coroutine; declare the agent async def")
    return returned


def _release(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
