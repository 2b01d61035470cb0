"""The pen of a manager: every event and every fact goes through here into state and append alike.

It keeps together what must not come apart: a fact is applied and recorded in one step,
an event gets the next sequence and is encoded with it, and the first thing that a manager
writes is who it is. It does not decide what is written, and sends nothing.
"""

from agent_service.core.effects import Effect
from agent_service.core.encoding import EventEncoder, RunEnvelope, run_envelope
from agent_service.core.facts import Fact, OwnerChanged, RunOpened, record_of
from agent_service.core.journal import StoredEvent
from agent_service.core.outgoing import Outgoing
from agent_service.core.state import ManagerState
from steward.model.keys import Epoch, RunId, Sequence
from steward.model.verbs import EventType


class StreamWriter:
    """Writes one user's stream under one epoch."""

    __slots__ = ("_encoder", "_envelopes", "_epoch", "_node_id", "_out", "_state")

    def __init__(
        self,
        node_id: str,
        epoch: Epoch,
        state: ManagerState,
        out: Outgoing,
        encoder: EventEncoder,
    ) -> None:
        self._node_id = node_id
        self._epoch = epoch
        self._state = state
        self._out = out
        self._encoder = encoder
        self._envelopes: dict[RunId, RunEnvelope] = {}

    @property
    def next(self) -> Sequence:
        """The sequence of the next event."""
        return self._out.next

    @property
    def full(self) -> bool:
        """Whether the append that collects should take nothing more."""
        return self._out.full

    def time(self, wall_ms: int) -> str:
        """A stamp as events carry it."""
        return self._encoder.time(wall_ms)

    def run_id(self) -> RunId:
        """The id of the run that the next event, a user_message, causes."""
        return self._encoder.run_id(self._out.next)

    def emit(
        self,
        wall_ms: int,
        type: EventType,
        data: bytes,
        envelope: RunEnvelope | None,
        *,
        conversation: bool = False,
        trace: bytes = b"",
    ) -> None:
        """Append an event. Without an envelope it is of no run, and `trace` is given."""
        self.own()
        payload = self._encoder.encode(type, self._out.next, wall_ms, data, envelope, trace)
        thread_id = envelope.thread_id if envelope else ""
        self._out.event(StoredEvent(payload, thread_id, conversation), type)

    def record(self, fact: Fact) -> None:
        """Apply a fact, and store it with the events around it."""
        self._state.evolve(fact)
        self._out.record(record_of(fact))

    def then(self, effect: Effect) -> None:
        """Release `effect` when everything before it is stored."""
        self._out.then(effect)

    def own(self) -> None:
        """Note whose stream this is now.

        With the first write and not before: who wrote nothing needs no successor's notice.
        """
        owner = self._state.owner
        if owner is None or owner.epoch != self._epoch:
            self.record(OwnerChanged(self._node_id, self._epoch, ""))

    def disown(self, wall_ms: int, released: str) -> None:
        """Note that this manager lets go by plan, if it has written anything."""
        owner = self._state.owner
        if owner is not None and owner.epoch == self._epoch:
            self.record(OwnerChanged(self._node_id, self._epoch, released, wall_ms))

    def envelope(self, opened: RunOpened) -> RunEnvelope:
        """What is the same in all events of a run."""
        envelope = self._envelopes.get(opened.run_id)
        if envelope is None:
            envelope = run_envelope(
                opened.thread_id, opened.run_id, opened.agent, opened.traceparent
            )
            self._envelopes[opened.run_id] = envelope
        return envelope

    def forget(self, run_id: RunId) -> None:
        """The run is over: its envelope is not needed any more."""
        self._envelopes.pop(run_id, None)
