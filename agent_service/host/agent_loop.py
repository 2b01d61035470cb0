"""The thread in which agent code runs, and the way in and out of it.

Agent code is somebody else's: it may block, raise anything, stop the loop, swallow
cancellation. None of that reaches the host's loop: both directions cross by a batch per
wake-up, neither side ever waits for the other, and after `cancel_run` returned no verb
of that run is handed over, whatever is in flight.

Not promised: that a blocked agent leaves other *agents* alone (they share its loop; a
watchdog tells), nor that a thread which never returns can be ended.
"""

import asyncio
import logging
import sys
import threading
from collections.abc import Callable

import uvloop

from agent_service.host.agent_crossing import Crossing
from agent_service.host.agent_runs import AgentRuns, CancelRun, Command, RunSilenced
from agent_service.host.agent_watchdog import AgentWatchdog
from steward.agent.loading import AgentCatalog
from steward.model.verbs import EmitEvent, RunKey, RunStart, Verb, VerbsAcknowledged
from steward.telemetry.catalog import AgentMetrics
from steward.telemetry.logs import fields

CANCEL_GRACE_S = 5.0
MAX_THREADS = 64
SWITCH_S = 0.0005
"""Longest that agent code which computes may keep the interpreter from the host's loop at a time.

Python's own 5 ms would add up: the host gives the interpreter away at each read and write.
"""

JOIN_S = 1.0
"""Most that the agent thread may take to end when it has nothing left to do."""

_log = logging.getLogger(__name__)


class AgentLoop:
    """Runs agents in a thread of its own. All methods are called on the host's loop.

    `on_verbs` is called on the host's loop with what agents asked for, in order per run,
    batched by what waits; the host answers with `acknowledge`.
    """

    def __init__(
        self,
        catalog: AgentCatalog,
        on_verbs: Callable[[list[Verb]], None],
        metrics: AgentMetrics,
        *,
        cancel_grace_s: float = CANCEL_GRACE_S,
        max_threads: int = MAX_THREADS,
    ) -> None:
        """`cancel_grace_s`: how long the code of a cancelled run may take to end.

        `max_threads`: how many plain agents, and apart from them plain tools, run at once.
        """
        self._catalog = catalog
        self._on_verbs = on_verbs
        self._metrics = metrics
        self._cancel_grace_s = cancel_grace_s
        self._max_threads = max_threads
        self._silenced: set[RunKey] = set()
        self._stopping = False
        self._stopped: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Start the thread. Commands may follow at once. Call once.

        Shortens the switch interval of the interpreter to `SWITCH_S`.
        """
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
        host_loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = host_loop.create_future()
        self._loop = uvloop.new_event_loop()
        self._commands: Crossing[Command] = Crossing(self._loop, self._handle)
        self._verbs: Crossing[Verb | RunSilenced] = Crossing(host_loop, self._receive)
        self._runs = AgentRuns(
            self._loop,
            self._catalog,
            self._put,
            self,
            self._metrics,
            cancel_grace_s=self._cancel_grace_s,
            max_threads=self._max_threads,
        )
        self._closing = False
        self._thread = threading.Thread(
            target=self._run_thread, args=(host_loop,), name="agents", daemon=True
        )
        self._thread.start()
        watchdog = AgentWatchdog(self._loop, self._thread, self._metrics)
        self._watching = host_loop.create_task(watchdog.watch(), name="agent watchdog")

    @property
    def thread_loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that runs agent code, after `start`."""
        return self._loop

    def start_run(self, start: RunStart) -> None:
        """Run an agent. Ends with one FinishRun, unless it is cancelled first. Never blocks.

        An unknown agent is a run that failed; an empty name means the default agent.
        """
        self._commands.put(start)

    def cancel_run(self, key: RunKey) -> None:
        """End a run: no verb of it is handed over any more. Never blocks; safe to call twice."""
        self._silenced.add(key)
        self._commands.put(CancelRun(key))

    def acknowledge(self, acknowledged: list[VerbsAcknowledged]) -> None:
        """Tell runs what is in the log. Never blocks; unknown runs are ignored.

        As long as no run waits for its verbs, this wakes nobody.
        """
        self._commands.put_quietly(acknowledged)

    async def stop(self, grace_s: float) -> None:
        """Cancel all runs, give their code `grace_s` seconds to end, and end the thread.

        No verb is handed over from now on. A thread that does not end is left behind with a
        warning. Safe to call twice.
        """
        self._stopping = True
        if self._stopped is None:
            self._stopped = asyncio.ensure_future(self._stop(grace_s))
        await asyncio.shield(self._stopped)

    async def _stop(self, grace_s: float) -> None:
        self._loop.call_soon_threadsafe(self._begin_stop, grace_s)
        await asyncio.wait({self._ended}, timeout=grace_s + JOIN_S)
        self._watching.cancel()
        await asyncio.wait({self._watching})
        if not self._ended.done():
            _log.warning(
                "agent code did not end in time; its thread is left behind",
                extra=fields(grace_s=grace_s),
            )

    def _receive(self, items: list[Verb | RunSilenced]) -> None:
        """On the host's loop: what the agent loop put, in order."""
        if self._stopping:
            return
        verbs: list[Verb] = []
        silenced = self._silenced
        for item in items:
            if isinstance(item, RunSilenced):
                silenced.discard(item.key)
            elif not silenced or item.key not in silenced:
                verbs.append(item)
        if verbs:
            self._on_verbs(verbs)

    # The rest runs in the agent thread.

    def _put(self, item: Verb | RunSilenced) -> None:
        """What nobody waits for may cross together with what comes next."""
        if type(item) is EmitEvent and not item.tool_call_id:
            self._verbs.put_soon(item)
        else:
            self._verbs.put(item)

    def _handle(self, commands: list[Command]) -> None:
        self._runs.handle(commands)

    def begin_wait(self) -> None:
        """A run waits for the log, or for room: its verbs go now, and answers are wanted."""
        self._verbs.hurry()
        self._commands.begin_wait()

    def end_wait(self) -> None:
        self._commands.end_wait()

    def _begin_stop(self, grace_s: float) -> None:
        self._last_task = self._loop.create_task(self._end_loop(grace_s), name="stop agents")

    async def _end_loop(self, grace_s: float) -> None:
        try:
            await self._runs.stop(grace_s)
        finally:
            self._closing = True
            self._loop.stop()

    def _run_thread(self, host_loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            while not self._closing:
                try:
                    self._loop.run_forever()
                except BaseException as error:
                    # SystemExit and KeyboardInterrupt of a task pass through the loop.
                    _log.warning(
                        "agent code raised; ignored", extra=fields(error=type(error).__name__)
                    )
            self._close_loop()
        finally:
            try:
                host_loop.call_soon_threadsafe(_resolve, self._ended)
            except RuntimeError:
                _log.debug("the host's loop ended before the agent thread")

    def _close_loop(self) -> None:
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        if left:
            waiting = self._loop.create_task(asyncio.wait(left, timeout=JOIN_S / 2))
            self._run_until(waiting)
        self._run_until(self._loop.create_task(self._loop.shutdown_asyncgens()))
        self._loop.close()

    def _run_until(self, task: "asyncio.Task[object]") -> None:
        try:
            self._loop.run_until_complete(task)
        except BaseException as error:
            _log.warning(
                "agent code raised while it was ended", extra=fields(error=type(error).__name__)
            )


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
