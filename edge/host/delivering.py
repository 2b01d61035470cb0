"""Deliveries of nodes, to the sockets of their users: the hot path of an edge.

Each delivery goes to the audience of its user, which compares the epoch before anything
else (P15). What nobody may see is dropped, and put on record unless it can be merely late. There
is no task, log line or span per event here, unless a trace is sampled.
"""

import time
from collections.abc import Sequence
from typing import Protocol

from edge.core.commands import Delivery, TraceAnnounced
from edge.host.audience import Audience
from edge.host.audiences import Audiences
from edge.host.connection import Connection
from edge.host.flush import Flusher
from edge.host.spans import EdgeSpans
from edge.host.timing import DeliveryTimes
from steward.errors import Reason, StewardError
from steward.model.deliveries import HEAD, user_check
from steward.model.keys import Epoch, NodeIncarnation, UserKey
from steward.model.violations import ViolationKind
from steward.runtime.clock import boot_ms
from steward.telemetry.catalog import EdgeMetrics


class Surroundings(Protocol):
    """The edge around the deliveries."""

    spans: EdgeSpans
    times: DeliveryTimes

    def report(
        self,
        kind: ViolationKind,
        evidence: str,
        user: UserKey | None,
        epoch: int,
        node: NodeIncarnation,
    ) -> None: ...


class Deliveries:
    """The part of `NodeListener` that is about events. One event loop; nothing here waits."""

    __slots__ = ("_around", "_audiences", "_dropped", "_events_out", "_flusher")

    def __init__(
        self,
        around: Surroundings,
        audiences: Audiences,
        flusher: Flusher,
        metrics: EdgeMetrics,
    ) -> None:
        self._around = around
        self._audiences = audiences
        self._flusher = flusher
        self._events_out = metrics.events_out
        self._dropped = metrics.dropped

    def announced(self, traces: Sequence[TraceAnnounced]) -> None:
        for trace in traces:
            audience = self._audiences.by_channel.get(trace.channel) if trace.channel else None
            if audience is None and trace.user is not None:
                audience = self._audiences.by_user.get(trace.user)
            if audience is not None:
                audience.announced(trace.sequence, trace.traceparent)
                self._around.times.sampled(trace.traceparent)

    def delivered(self, source: NodeIncarnation, deliveries: Sequence[Delivery]) -> None:
        """The hot path: stored events to the sockets of their users."""
        self._flusher.begin()
        audiences = self._audiences.by_user
        began_ns = time.time_ns() if self._around.spans.enabled else 0
        written = 0
        for delivery in deliveries:
            audience = audiences.get(delivery.user)
            taken = None if audience is None else audience.deliver(source, delivery)
            if audience is None or taken is None:
                self._refuse(audience, source, delivery)
                continue
            written += taken * len(delivery.events)
            if audience.traces:
                first = delivery.first
                following = first + len(delivery.events)
                audience.trace(first, following, delivery.epoch, began_ns)
        if written:
            self._events_out.inc(written)
        self._around.times.batch_out(None, 0)
        self._flusher.end()

    def delivered_packed(
        self, source: NodeIncarnation, heads: bytes, frames: bytes | memoryview
    ) -> None:
        """The hot path for users with a channel. See the port."""
        channels = self._audiences.by_channel
        audience = None
        began_ns = time.time_ns() if self._around.spans.enabled else 0
        now_ms = boot_ms()
        size = len(frames)
        if len(heads) % HEAD.size:
            raise StewardError(Reason.PROTOCOL_VIOLATION, "a head of a delivery is cut off")
        self._flusher.begin()
        try:
            written = at = 0
            for channel, epoch, first, events, length, check in HEAD.iter_unpack(heads):
                end = at + length
                if end > size:
                    raise StewardError(Reason.PROTOCOL_VIOLATION, "deliveries without their frames")
                audience = channels.get(channel)
                if audience is None or audience.check != check:
                    self._refuse_channel(source, channel, epoch, first, check)
                else:
                    part = bytes(frames[at:end])
                    taken = audience.deliver_frames(now_ms, source, epoch, first, events, part)
                    if taken is None:
                        late = Delivery(audience.user, Epoch(epoch), first, [])
                        self._refuse(audience, source, late)
                    else:
                        written += taken * events
                        if audience.traces:
                            audience.trace(first, first + events, epoch, began_ns)
                at = end
            if written:
                self._events_out.inc(written)
            if audience is not None:
                self._around.times.batch_out(_who_acknowledges(audience), first + events - 1)
        finally:
            self._flusher.end()

    def _refuse_channel(
        self, source: NodeIncarnation, channel: int, epoch: int, first: int, check: int
    ) -> None:
        """A delivery on a channel that is nobody's, no longer somebody's, or somebody else's."""
        audience = self._audiences.by_channel.get(channel)
        user = self._audiences.departed_from(channel) if audience is None else audience.user
        if user is None or user_check(user) != check:
            text = f"event {first} came on channel {channel}, which is not of its user"
            self._around.report(ViolationKind.FOREIGN_DELIVERY, text, user, epoch, source)
            return
        # Of somebody who left, and may be back by now.
        again = self._audiences.by_user.get(user)
        if again is None or epoch > again.attachment.max_epoch:
            self._refuse(again, source, Delivery(user, Epoch(epoch), first, []))

    def _refuse(
        self, audience: Audience | None, source: NodeIncarnation, delivery: Delivery
    ) -> None:
        """A delivery that nobody may see. While no manager is attached late ones are expected."""
        if audience is None:
            if delivery.epoch <= self._audiences.departed_epoch(delivery.user):
                return
            text = "nobody of this user is here"
        else:
            attachment = audience.attachment
            if delivery.epoch < attachment.max_epoch:
                self._dropped.inc()
            if not attachment.live_epoch:
                return
            if delivery.epoch < attachment.live_epoch:
                text = f"event {delivery.first}, while epoch {attachment.live_epoch} is attached"
                kind = ViolationKind.STALE_DELIVERY
                self._around.report(kind, text, delivery.user, delivery.epoch, source)
                return
            text = f"the user is attached to {attachment.live_node} under {attachment.live_epoch}"
        kind = ViolationKind.FOREIGN_DELIVERY
        self._around.report(kind, text, delivery.user, delivery.epoch, source)


def _who_acknowledges(audience: Audience) -> Connection | None:
    """A connection of them that has sent acks before, if the first one is such."""
    connections = audience.connections
    if connections and connections[0].session.acknowledged:
        return connections[0]
    return None
