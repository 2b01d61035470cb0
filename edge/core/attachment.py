"""`Attachment`: how one user's manager is found, followed and spoken to from this edge.

One machine per user with somebody connected. It resolves the placement, attaches, and
when the manager is lost (fenced, moved, passivated, its node or stream gone) it begins
again with a `min_epoch` that keeps it from coming back to the same stale answer. It goes
on for as long as somebody is connected, with a backoff from 50 ms to 1 s; how long a
connection waits for its first `ready` is the session's affair.

It guarantees: deliveries of an epoch that is not the attached one are not accepted (P15);
`max_epoch` never goes down; every command is kept until it is answered and sent again to
the next manager, which de-duplicates; the buffer is bounded, and what does not fit is
refused at once. Commands of a user go out in the order in which they came.

Pure: the driver numbers commands and spreads backoffs (`spread`, 0 to 1000).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final

from edge.core.announcements import Announcements
from edge.core.attachment_values import (
    Answered,
    Behind,
    ClientCame,
    ClientLeft,
    Command,
    Effect,
    EndClient,
    EndSessions,
    Evicted,
    HeadKnown,
    HeadRefreshed,
    NodeLost,
    Occupied,
    Over,
    PlacementMoved,
    Resolved,
    ResolveFailed,
    ResolveManager,
    SearchFailed,
    SendCommand,
    Settle,
    Submit,
    Tick,
    Trimmed,
    Vacated,
)
from edge.core.commands import (
    Accepted,
    AnnounceClient,
    Answer,
    Attach,
    Attached,
    ClientTaken,
    CommandOutcome,
    Detach,
    EdgeCommand,
    ManagerLost,
    Refused,
    UserCommand,
)
from edge.core.rate import Allowance
from edge.core.resume import StreamHead
from steward.errors import Reason
from steward.model.keys import Epoch, NodeIncarnation, StreamId, UserKey
from steward.model.placement import Placement

MOST_PENDING: Final = 256
ATTACH_ANSWER_MS: Final = 3_000
FIRST_BACKOFF_MS: Final = 50
MOST_BACKOFF_MS: Final = 1_000
LINGER_MS: Final = 2_000
ABANDON_MS: Final = 30_000


class AttachmentState(Enum):
    """How far the search for the manager is."""

    IDLE = auto()
    RESOLVING = auto()
    ATTACHING = auto()
    LIVE = auto()
    WAITING = auto()


@dataclass(slots=True)
class _Pending:
    ticket: int
    traceparent: str
    body: UserCommand


class Attachment:
    """One user's tie to its manager, as this edge holds it."""

    __slots__ = (
        "_allowance",
        "_attach_id",
        "_attempt",
        "_channel",
        "_clients",
        "_due_ms",
        "_empty_since",
        "_head",
        "_ids",
        "_lost_ms",
        "_min_epoch",
        "_pending",
        "_refresh_id",
        "_spread",
        "live_epoch",
        "live_node",
        "max_epoch",
        "placement",
        "state",
        "trace",
        "user",
    )

    def __init__(
        self,
        now_ms: int,
        user: UserKey,
        messages_per_minute: int,
        ids: Iterator[int],
        spread: int,
        channel: int = 0,
    ) -> None:
        """`ids` gives numbers that no other user of this edge uses, from 1.

        `channel` goes with every attach.
        """
        self.user = user
        self.state = AttachmentState.IDLE
        self.placement: Placement | None = None
        # The epoch whose deliveries are accepted; 0 while there is none.
        self.live_epoch = 0
        # The node that they have to come from, while there is one.
        self.live_node: NodeIncarnation | None = None
        self.max_epoch = 0
        self._clients = Announcements()
        self._head: StreamHead | None = None
        self._allowance = Allowance(messages_per_minute, now_ms)
        self._ids = ids
        self._spread = spread
        self._channel = channel
        self._pending: dict[int, _Pending] = {}
        self._attach_id = 0
        # The question how far the stream is, while it has no answer; 0 for none.
        self._refresh_id = 0
        self._attempt = 0
        self._min_epoch = 0
        self._due_ms = 0
        self._empty_since = 0
        # When the manager was lost that this edge had; 0 while it has one, or never had.
        self._lost_ms = 0
        # What finding the manager belongs to, while no command waits for it.
        self.trace = ""

    @property
    def waiting(self) -> int:
        """How many commands have no answer yet."""
        return len(self._pending)

    def head(self, sequence: int) -> StreamHead | None:
        """The head for one more session, `sequence` being the last delivered; None if not live."""
        head = self._head
        if head is None or not self.live_epoch:
            return None
        if sequence <= head.sequence:
            return head
        return StreamHead(head.stream_id, sequence, head.oldest, head.node_id, head.epoch)

    def next_deadline(self) -> int | None:
        """When the next `Tick` is due; None when nothing waits for time."""
        due = self._due_ms or None
        if self._empty_since:
            wait = ABANDON_MS if self._pending else LINGER_MS
            gone = self._empty_since + wait
            return gone if due is None else min(due, gone)
        return due

    def handle(self, now_ms: int, command: Command) -> list[Effect]:
        """Apply one command; the effects are to be done in order."""
        was_live = bool(self.live_epoch)
        effects = self._step(now_ms, command)
        if was_live and not self.live_epoch and not self._lost_ms:
            self._lost_ms = now_ms
        return effects

    def _step(self, now_ms: int, command: Command) -> list[Effect]:
        match command:
            case Occupied(traceparent):
                self._empty_since = 0
                self.trace = traceparent
                return self._resolve() if self.state is AttachmentState.IDLE else []
            case Vacated():
                self._empty_since = now_ms
                return []
            case Resolved(placement):
                return self._on_resolved(now_ms, placement)
            case ResolveFailed(reason, retry_after_ms):
                if self.state is not AttachmentState.RESOLVING:
                    return []
                return self._wait(now_ms, reason, retry_after_ms)
            case Answered(answer):
                return self._on_answer(now_ms, answer)
            case NodeLost(incarnation, fenced, wait_ms):
                return self._on_node_lost(now_ms, incarnation, fenced, wait_ms)
            case PlacementMoved(placement):
                if self.state is AttachmentState.IDLE or placement.epoch <= self._floor():
                    return []
                return self._attach(now_ms, placement)
            case Evicted():
                return self._evict()
            case Behind():
                return self._refresh()
            case Trimmed(stream_id, oldest):
                self._on_trimmed(stream_id, oldest)
                return []
            case ClientCame(client_id):
                self._clients.begin(client_id)
                live = self.placement if self.live_epoch else None
                return [] if live is None else self._announce(live, client_id)
            case ClientLeft(client_id):
                self._clients.end(client_id)
                return []
            case Submit(ticket, traceparent, body):
                return self._on_submit(now_ms, ticket, traceparent, body)
            case Tick():
                return self._on_tick(now_ms)

    # ---- finding the manager

    def _floor(self) -> int:
        """An epoch that is known already, or known to be over."""
        known = self.placement.epoch if self.placement is not None else 0
        return max(known, self.max_epoch, self._min_epoch - 1)

    def _resolve(self) -> list[Effect]:
        self.state = AttachmentState.RESOLVING
        self.live_epoch = 0
        self._due_ms = 0
        return [ResolveManager(max(self._min_epoch, self.max_epoch), self._waiting_trace())]

    def _waiting_trace(self) -> str:
        """The trace of what waits for the manager: a message, or else who came last."""
        return next((pending.traceparent for pending in self._pending.values()), self.trace)

    def _wait(self, now_ms: int, reason: Reason, least_ms: int = 0) -> list[Effect]:
        """Back off, then resolve again."""
        self.state = AttachmentState.WAITING
        self.live_epoch = 0
        backoff = min(FIRST_BACKOFF_MS << min(self._attempt, 8), MOST_BACKOFF_MS)
        self._attempt += 1
        # Between a half and the whole: users that were lost together come back apart.
        spread_ms = max(backoff * (1000 + self._spread) // 2000, 1)
        self._due_ms = now_ms + max(spread_ms, min(least_ms, MOST_BACKOFF_MS))
        return [SearchFailed(reason)]

    def _on_resolved(self, now_ms: int, placement: Placement) -> list[Effect]:
        if self.state is not AttachmentState.RESOLVING:
            return []
        if placement.epoch < max(self._min_epoch, self.max_epoch):
            return self._wait(now_ms, Reason.MANAGER_UNAVAILABLE)
        return self._attach(now_ms, placement)

    def _attach(self, now_ms: int, placement: Placement) -> list[Effect]:
        self.state = AttachmentState.ATTACHING
        if self.live_epoch:
            self._lost_ms = now_ms
        self.live_epoch = 0
        gap_ms = max(now_ms - self._lost_ms, 1) if self._lost_ms else 0
        self.placement = placement
        self.max_epoch = max(self.max_epoch, placement.epoch)
        self._attach_id = next(self._ids)
        self._refresh_id = 0
        self._due_ms = now_ms + ATTACH_ANSWER_MS
        command = EdgeCommand(
            self.user, placement.epoch, self._attach_id, self._waiting_trace(), self._hello(gap_ms)
        )
        return [SendCommand(placement, command)]

    def _hello(self, gap_ms: int = 0) -> Attach:
        return Attach(gap_ms, self._channel)

    def _refresh(self) -> list[Effect]:
        """Attach once more, where this edge is attached: the answer tells the head."""
        placement = self.placement
        if placement is None or not self.live_epoch or self._refresh_id:
            return []
        self._refresh_id = next(self._ids)
        command = EdgeCommand(
            self.user, placement.epoch, self._refresh_id, self._waiting_trace(), self._hello()
        )
        return [SendCommand(placement, command)]

    def _on_refreshed(self, attached: Attached) -> list[Effect]:
        self._refresh_id = 0
        head = self._head
        if head is None or not self.live_epoch:
            return []
        self._head = head = replace(head, sequence=max(head.sequence, attached.sequence))
        return [HeadRefreshed(head)]

    def _on_answer(self, now_ms: int, answer: Answer) -> list[Effect]:
        match answer.body:
            case Attached() as attached if answer.command_id == self._refresh_id:
                return self._on_refreshed(attached)
            case Attached() if answer.command_id != self._attach_id:
                self._clients.came_back(answer.command_id, answer.epoch)
                return []
            case Attached() as attached:
                return self._on_attached(attached)
            case ManagerLost(reason, known_epoch):
                return self._on_lost(
                    now_ms, answer.epoch, known_epoch, evicted=reason == Reason.USER_EVICTED
                )
            case ClientTaken(client_id):
                return (
                    [EndClient(client_id)] if self._clients.loses(client_id, answer.epoch) else []
                )
            case Refused() as refused if answer.command_id == self._attach_id:
                return self._on_attach_refused(now_ms, answer.epoch, refused)
            case Refused() as refused if refused.inside_only:
                if answer.command_id not in self._pending:
                    return []
                return self._on_lost(now_ms, answer.epoch, refused.known_epoch, gone=False)
            case outcome:
                return self._settle(answer.command_id, outcome)

    def _on_trimmed(self, stream_id: StreamId, oldest: int) -> None:
        """Sessions that come from now on begin no earlier."""
        head = self._head
        if head is not None and head.stream_id == stream_id and oldest > head.oldest:
            self._head = replace(head, oldest=oldest)

    def _on_attached(self, attached: Attached) -> list[Effect]:
        placement = self.placement
        if self.state is not AttachmentState.ATTACHING or placement is None:
            return []
        self.state = AttachmentState.LIVE
        self.live_epoch = placement.epoch
        self._attempt = 0
        self._due_ms = 0
        self._lost_ms = 0
        known = self._head
        # A manager knows what was kept when it was made; a page of the log may have told more.
        known_oldest = known.oldest if known and known.stream_id == attached.stream_id else 1
        self._head = StreamHead(
            attached.stream_id,
            attached.sequence,
            max(attached.oldest, known_oldest),
            placement.node_id,
            Epoch(placement.epoch),
        )
        self.live_node = placement.incarnation
        effects: list[Effect] = [HeadKnown(self._head)]
        for client_id in self._clients.open():
            effects += self._announce(placement, client_id)
        for command_id, pending in self._pending.items():
            effects.append(self._command(placement, command_id, pending))
        return effects

    def _on_attach_refused(self, now_ms: int, epoch: int, refused: Refused) -> list[Effect]:
        if self.state is not AttachmentState.ATTACHING:
            return []
        if refused.known_epoch > epoch:
            self._min_epoch = max(self._min_epoch, refused.known_epoch)
        elif refused.reason is Reason.EPOCH_STALE and not refused.known_epoch:
            self._min_epoch = max(self._min_epoch, epoch + 1)
        else:
            self._min_epoch = max(self._min_epoch, epoch)
        return self._wait(now_ms, refused.reason, refused.retry_after_ms)

    def _on_lost(
        self,
        now_ms: int,
        epoch: int,
        known_epoch: int,
        *,
        gone: bool = True,
        evicted: bool = False,
    ) -> list[Effect]:
        """The manager of `epoch` is no more (`gone`), or is not the one that counts.

        After a planned move this resolves at once, too: the registry answers when the next
        placement is there, if its push did not come before.
        """
        placement = self.placement
        if placement is None or epoch < placement.epoch:
            return []
        if evicted:
            return self._evict()
        least = epoch + 1 if gone else epoch
        self._min_epoch = max(self._min_epoch, least, known_epoch)
        match self.state:
            case AttachmentState.LIVE:
                return self._resolve()
            case AttachmentState.ATTACHING:
                return self._wait(now_ms, Reason.MANAGER_UNAVAILABLE)
            case _:
                return []

    def _on_node_lost(
        self, now_ms: int, incarnation: NodeIncarnation, fenced: bool, wait_ms: int
    ) -> list[Effect]:
        placement = self.placement
        if placement is None or placement.incarnation != incarnation:
            return []
        self._min_epoch = max(self._min_epoch, placement.epoch + 1 if fenced else placement.epoch)
        match self.state:
            case AttachmentState.ATTACHING if not fenced:
                return self._wait(now_ms, Reason.MANAGER_UNAVAILABLE)
            case AttachmentState.WAITING if not fenced:
                return []
            case AttachmentState.LIVE | AttachmentState.ATTACHING | AttachmentState.WAITING:
                return self._pause(now_ms, wait_ms) if wait_ms else self._resolve()
            case _:
                return []

    def _pause(self, now_ms: int, wait_ms: int) -> list[Effect]:
        """Resolve a little later: others that were lost at the same time go first."""
        self.state = AttachmentState.WAITING
        self.live_epoch = 0
        self._due_ms = now_ms + wait_ms
        return []

    # ---- commands of clients

    def _on_submit(
        self, now_ms: int, ticket: int, traceparent: str, body: UserCommand
    ) -> list[Effect]:
        wait_ms = self._allowance.take(now_ms)
        if wait_ms:
            text = "too many messages; wait before the next one"
            return [Settle(ticket, Refused(Reason.RATE_LIMITED, text, wait_ms))]
        if len(self._pending) >= MOST_PENDING:
            text = "too many messages wait for the manager"
            return [Settle(ticket, Refused(Reason.RATE_LIMITED, text, MOST_BACKOFF_MS))]
        command_id = next(self._ids)
        pending = _Pending(ticket, traceparent, body)
        self._pending[command_id] = pending
        if self.state is AttachmentState.LIVE and self.placement is not None:
            return [self._command(self.placement, command_id, pending)]
        return self._resolve() if self.state is AttachmentState.IDLE else []

    def _command(self, placement: Placement, command_id: int, pending: _Pending) -> SendCommand:
        command = EdgeCommand(
            self.user, placement.epoch, command_id, pending.traceparent, pending.body
        )
        return SendCommand(placement, command)

    def _announce(self, placement: Placement, client_id: str) -> list[Effect]:
        """The announcement, and behind it an attach, which changes nothing and is answered."""
        number, marker = next(self._ids), next(self._ids)
        self._clients.sent(client_id, marker)
        return [
            SendCommand(placement, EdgeCommand(self.user, placement.epoch, which, "", body))
            for which, body in ((number, AnnounceClient(client_id)), (marker, self._hello()))
        ]

    def _settle(self, command_id: int, outcome: CommandOutcome) -> list[Effect]:
        pending = self._pending.get(command_id)
        if pending is None:
            return []
        if isinstance(outcome, Accepted) and not _is_for(outcome, pending.body):
            return []
        del self._pending[command_id]
        return [Settle(pending.ticket, outcome)]

    # ---- time

    def _on_tick(self, now_ms: int) -> list[Effect]:
        if self._empty_since and self._may_end(now_ms):
            return self._end()
        if not self._due_ms or now_ms < self._due_ms:
            return []
        match self.state:
            case AttachmentState.WAITING:
                return self._resolve()
            case AttachmentState.ATTACHING:
                # Silent: it may be stopped. The registry knows whether it lives.
                placement = self.placement
                if placement is not None:
                    self._min_epoch = max(self._min_epoch, placement.epoch)
                return [SearchFailed(Reason.MANAGER_UNAVAILABLE), *self._resolve()]
            case _:
                return []

    def _may_end(self, now_ms: int) -> bool:
        wait = ABANDON_MS if self._pending else LINGER_MS
        return now_ms >= self._empty_since + wait

    def _evict(self) -> list[Effect]:
        refused = Refused(Reason.USER_EVICTED, "an operator ended the sessions of this user")
        effects: list[Effect] = [
            Settle(pending.ticket, refused) for pending in self._pending.values()
        ]
        return [*effects, EndSessions(Reason.USER_EVICTED), *self._end()]

    def _end(self) -> list[Effect]:
        effects: list[Effect] = []
        placement = self.placement
        if placement is not None and self.state in (
            AttachmentState.LIVE,
            AttachmentState.ATTACHING,
        ):
            detach = EdgeCommand(self.user, placement.epoch, next(self._ids), "", Detach())
            effects.append(SendCommand(placement, detach))
        self.state = AttachmentState.IDLE
        self.live_epoch = 0
        self._due_ms = 0
        self._empty_since = 0
        self._pending.clear()
        return [*effects, Over()]


def _is_for(outcome: Accepted, body: UserCommand) -> bool:
    return getattr(body, "id", None) == outcome.id
