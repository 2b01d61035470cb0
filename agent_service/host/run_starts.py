"""The way of runs to the agent loop: history and journal are read, then the agent is called.

Guarantees: a run that was stopped while it was prepared is never started; an agent is
called only with all of what earlier attempts have stored, and one whose journal can't be
had ends as failed. Acknowledgements cross to the agent thread once per turn.
"""

import asyncio
from collections.abc import Callable
from functools import partial

from agent_service.core.commands import AbandonRun, Command, RecallThought
from agent_service.core.effects import AcknowledgeVerbs, StartRun
from agent_service.core.manager import Manager
from agent_service.host.history import read_history
from agent_service.host.journal import JournalUnreadable, has_thought, read_journal
from agent_service.host.ports import RunPort
from agent_service.host.turn import Turn
from agent_service.log.port import EventLog
from steward.model.verbs import RunJournal, RunKey, RunStart, VerbsAcknowledged


class RunStarts:
    """Starts and stops runs for all managers of a node."""

    def __init__(
        self,
        log: EventLog,
        turn: Turn,
        tell: Callable[[Manager, Command], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """`tell` gives a manager a command; `failed` ends the node."""
        self._log = log
        self._tell = tell
        self._failed = failed
        self._runs: RunPort | None = None
        self._preparing: dict[RunKey, asyncio.Task[None]] = {}
        self._turn = turn
        self._acks: list[VerbsAcknowledged] = []
        turn.ends_with(self._send_acks)

    def use(self, runs: RunPort) -> None:
        """Where agent code runs. Called once, before the first start."""
        self._runs = runs

    def start(self, manager: Manager, effect: StartRun) -> None:
        """Prepare a run and start it."""
        task = asyncio.ensure_future(self._prepare(manager, effect))
        self._preparing[effect.key] = task
        task.add_done_callback(partial(self._prepared, effect.key))

    def stop(self, key: RunKey) -> None:
        """End an execution, wherever it is. Safe to call twice."""
        preparing = self._preparing.get(key)
        if preparing is not None and preparing.cancel():
            return
        if self._runs is not None:
            self._runs.cancel_run(key)

    def acknowledge(self, _: Manager, effect: AcknowledgeVerbs) -> None:
        """Tell a run what is in the log."""
        self._acks.append(effect.acknowledged)
        self._turn.collected()

    def silence(self) -> None:
        """Drop what is on its way to runs: no tool may start on it any more."""
        self._acks.clear()

    async def close(self) -> None:
        """Cancel what is being prepared. Safe to call twice."""
        tasks = list(self._preparing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _prepare(self, manager: Manager, effect: StartRun) -> None:
        content, messages, state = await read_history(self._log, manager, effect)
        journal = RunJournal()
        if effect.since:
            try:
                journal = await read_journal(self._log, manager.user, effect)
            except JournalUnreadable as error:
                run_id = effect.key.run_id
                self._tell(manager, AbandonRun(run_id, "JournalUnreadable", str(error)))
                return
            if has_thought(journal):
                self._tell(manager, RecallThought(effect.key.run_id))
        if self._runs is None:
            raise RuntimeError("run_on was not called")
        self._runs.start_run(
            RunStart(
                effect.key,
                effect.agent,
                effect.thread_id,
                content,
                messages,
                state,
                effect.attempt,
                effect.traceparent,
                journal=journal,
            )
        )

    def _prepared(self, key: RunKey, task: asyncio.Task[None]) -> None:
        if self._preparing.get(key) is task:
            del self._preparing[key]
        failure = None if task.cancelled() else task.exception()
        if failure is not None:
            self._failed(failure)

    def _send_acks(self) -> None:
        if self._acks and self._runs is not None:
            acks, self._acks = self._acks, []
            self._runs.acknowledge(acks)
