"""The runs of a node, as the agent loop sees them: started, acknowledged, cancelled, ended.

Everything here is called on the agent loop. Each run is one task; tasks that its code
starts are known by a context variable, end with it, and are cancelled with it.
"""

import asyncio
import contextvars
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent_service.host.agent_execution import AgentExecution, Waits
from agent_service.host.agent_threads import AgentThreads
from steward.agent.loading import AgentCatalog
from steward.model.verbs import RunKey, RunStart, Verb, VerbsAcknowledged
from steward.telemetry.catalog import AgentMetrics
from steward.telemetry.logs import fields

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CancelRun:
    """End a run from outside. Answered by RunSilenced."""

    key: RunKey


@dataclass(frozen=True, slots=True)
class RunSilenced:
    """No verb of this run comes after this."""

    key: RunKey


Command = RunStart | VerbsAcknowledged | CancelRun


class AgentRuns:
    """Runs agents on one event loop. `put` hands verbs to the host, `waits` hears of who waits."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        catalog: AgentCatalog,
        put: Callable[[Verb | RunSilenced], None],
        waits: Waits,
        metrics: AgentMetrics,
        *,
        cancel_grace_s: float,
        max_threads: int,
    ) -> None:
        self._loop = loop
        self._catalog = catalog
        self._put = put
        self._waits = waits
        self._abandoned = metrics.abandoned_runs
        self._grace_s = cancel_grace_s
        # Apart, so that plain agents which wait can't keep the tools of others from running.
        self._threads = AgentThreads(loop, max_threads, "agent")
        self._tool_threads = AgentThreads(loop, max_threads, "tool")
        self._runs: dict[RunKey, AgentExecution] = {}
        self._cancelled: set[AgentExecution] = set()
        self._current: contextvars.ContextVar[AgentExecution | None] = contextvars.ContextVar(
            "steward_run", default=None
        )
        self._stopping = False
        loop.set_task_factory(self._make_task)
        loop.set_exception_handler(self._on_exception)

    def handle(self, commands: list[Command]) -> None:
        """Carry out what the host asked for, in order."""
        for command in commands:
            if isinstance(command, VerbsAcknowledged):
                run = self._runs.get(command.key)
                if run is not None:
                    run.acknowledge(command.number)
            elif isinstance(command, RunStart):
                self._start(command)
            else:
                self._cancel(command.key)
                self._put(RunSilenced(command.key))

    async def stop(self, grace_s: float) -> None:
        """Cancel all runs and wait for their code to end, at most `grace_s` seconds."""
        self._stopping = True
        for key in tuple(self._runs):
            self._cancel(key)
        tasks = {task for run in self._cancelled for task in run.tasks}
        if tasks:
            await asyncio.wait(tasks, timeout=grace_s)
        for run in tuple(self._cancelled):
            self._enforce(run)
        self._threads.close()
        self._tool_threads.close()

    def _start(self, start: RunStart) -> None:
        if start.key in self._runs or self._stopping:
            _log.warning(
                "a run is not started: active already, or stopping",
                extra=fields(run=start.key.run_id),
            )
            return
        agent = self._catalog.get(start.agent)
        run = AgentExecution(
            start,
            agent or self._catalog.default,
            self._threads,
            self._tool_threads,
            self._put,
            self._waits,
        )
        if agent is None:
            run.finish_unknown()
            return
        self._runs[start.key] = run
        context = contextvars.copy_context()
        context.run(self._current.set, run)
        task = self._loop.create_task(
            run.execute(), name=f"run {start.key.run_id} of {agent.name}", context=context
        )
        run.main = task
        self._own(run, task)
        task.add_done_callback(lambda _: self._ended(run))

    def _ended(self, run: AgentExecution) -> None:
        self._runs.pop(run.key, None)

    def _cancel(self, key: RunKey) -> None:
        run = self._runs.pop(key, None)
        if run is None:
            return
        run.cancel()
        self._cancelled.add(run)
        self._loop.call_later(self._grace_s, self._enforce, run)

    def _enforce(self, run: AgentExecution) -> None:
        """The grace of a cancelled run is over."""
        if run not in self._cancelled:
            return
        self._cancelled.discard(run)
        if run.abandon():
            self._abandoned.inc()
            _log.warning(
                "a run was cancelled and its code did not end in time; it is abandoned and can do "
                "nothing any more",
                extra=fields(run=run.key.run_id),
            )

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any
    ) -> "asyncio.Task[Any]":
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, **options)
        run = self._current.get()
        if run is not None:
            self._own(run, task)
            if run.over:
                task.cancel()
        return task

    @staticmethod
    def _own(run: AgentExecution, task: "asyncio.Task[Any]") -> None:
        run.tasks.add(task)
        task.add_done_callback(run.tasks.discard)

    def _on_exception(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # Where it happened, not what it says: a message may hold what a user wrote.
        error = context.get("exception")
        _log.warning(
            "agent code left an error unhandled",
            extra=fields(
                what=context.get("message", ""),
                error=type(error).__name__ if error is not None else "",
            ),
        )
