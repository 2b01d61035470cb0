"""What the host needs of its surroundings: edges, the registry, and the loop that runs agents.

Two implementations each: gRPC (or a thread) in the service, plain objects in tests and in the
simulation.
"""

from typing import Protocol

from agent_service.core.effects import (
    AnswerAccepted,
    AnswerAttached,
    AnswerCancelled,
    AnswerRefused,
    Deliver,
)
from steward.errors import Reason
from steward.model.keys import EdgeId, Epoch, UserKey
from steward.model.placement import Placement
from steward.model.verbs import RunKey, RunStart, VerbsAcknowledged
from steward.model.violations import Violation

EdgeAnswer = AnswerAttached | AnswerAccepted | AnswerCancelled | AnswerRefused


class EdgePort(Protocol):
    """One edge's stream. Nothing here blocks or raises; a stream that can't keep up ends itself."""

    edge_id: EdgeId

    def answer(self, user: UserKey, epoch: Epoch, answer: EdgeAnswer, known: Epoch) -> None:
        """Answer a command. `known`: the epoch that the node knows, for refusals; else 0."""
        ...

    def deliver(self, user: UserKey, epoch: Epoch, events: Deliver) -> None: ...

    def manager_lost(self, user: UserKey, epoch: Epoch, reason: Reason, known: Epoch) -> None: ...

    def client_taken(self, user: UserKey, epoch: Epoch, client_id: str) -> None: ...

    def abort(self) -> None:
        """End the stream now, without what waits in it: this node may say nothing any more."""
        ...


class RegistryPort(Protocol):
    """The node's session with the registry."""

    async def confirm(self, user: UserKey) -> Placement | None:
        """The placement of a user on this incarnation, asked for once. None: not here."""
        ...

    def release(
        self,
        user: UserKey,
        epoch: Epoch,
        cause: str,
        handoff: bool = False,
        activate: bool = False,
    ) -> None:
        """Give a placement back (compare-and-delete). Kept and sent again until answered.

        `handoff`: place the user on another node in the same step; with `activate` that one makes
        the manager at once.
        """
        ...

    def report_log_head(self, fence: Epoch) -> None:
        """The log has this fence, which is above a grant of this node."""
        ...


class ViolationPort(Protocol):
    """Where refusals and breaches go. Never blocks, never raises."""

    def report(self, violation: Violation) -> None: ...


class RunPort(Protocol):
    """Where agent code runs: never on the host's loop."""

    def start_run(self, start: RunStart) -> None: ...

    def cancel_run(self, key: RunKey) -> None: ...

    def acknowledge(self, acknowledged: list[VerbsAcknowledged]) -> None: ...
