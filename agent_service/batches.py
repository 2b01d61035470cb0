"""What waits for an edge, made into messages: as few as its bounds allow, each ready to send.

The events of deliveries on channels stay beside the protobuf message, as the WebSocket frames that
they are (`Batch.frames`): a framed connection carries them behind it, uncopied; in a gRPC
stream they are a field of it. The order per user is kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from steward.model.deliveries import HEAD
from steward.v1 import agent_service_pb2 as pb

MOST_BYTES_PER_BATCH = 64 * 1024
"""An edge that works on one message does nothing else: some milliseconds for this much. Above it
messages cost nothing less: each byte that is read is still in the processor's cache."""


@dataclass(frozen=True, slots=True)
class Probe:
    """An edge asks whether this stream carries anything; comes back behind what waits."""

    number: int

    def ByteSize(self) -> int:
        """As of the messages that it travels with."""
        return 10


class Packed(NamedTuple):
    """A delivery on a channel: what goes into its head, and its events as WebSocket frames."""

    channel: int
    epoch: int
    first: int
    events: int
    check: int
    frames: bytes

    def ByteSize(self) -> int:
        """As of the messages that it travels with."""
        return HEAD.size + len(self.frames)


Item = pb.Answer | pb.Delivery | pb.EventTrace | Packed | Probe


class Batch(NamedTuple):
    """A message without its `frames`, and these, in the order of its heads."""

    message: pb.NodeBatch
    frames: Sequence[bytes]

    def whole(self) -> pb.NodeBatch:
        """In one."""
        if self.frames:
            self.message.frames = b"".join(self.frames)
        return self.message


def batches_of(items: Sequence[Item]) -> Iterator[Batch]:
    """Messages of at most `MOST_BYTES_PER_BATCH`, or of one item; the order per user is kept.

    A probe is never ahead of what was put before it.
    """
    batch, size = pb.NodeBatch(), 0
    packed: list[Packed] = []
    for item in items:
        bytes_more = item.ByteSize()
        if size and size + bytes_more > MOST_BYTES_PER_BATCH:
            yield _with(batch, packed)
            batch, size = pb.NodeBatch(), 0
            packed = []
        if isinstance(item, Packed):
            packed.append(item)
        elif isinstance(item, pb.Answer):
            batch.answers.append(item)
        elif isinstance(item, Probe):
            batch.probes.append(item.number)
        elif isinstance(item, pb.EventTrace):
            batch.traces.append(item)
        else:
            batch.deliveries.append(item)
        size += bytes_more
    yield _with(batch, packed)


def _with(batch: pb.NodeBatch, packed: list[Packed]) -> Batch:
    """With these deliveries; what follows each other on one channel as one, with one head."""
    if not packed:
        return Batch(batch, ())
    heads: list[bytes] = []
    frames: list[bytes] = []
    runs: dict[int, list[Packed]] = {}
    for item in packed:
        run = runs.setdefault(item.channel, [])
        if run and (item.epoch, item.first) != (run[-1].epoch, run[-1].first + run[-1].events):
            _join(run, heads, frames)
            run.clear()
        run.append(item)
    for run in runs.values():
        _join(run, heads, frames)
    batch.heads = b"".join(heads)
    return Batch(batch, frames)


def _join(run: list[Packed], heads: list[bytes], frames: list[bytes]) -> None:
    channel, epoch, first, count, check, part = run[0]
    size = len(part)
    frames.append(part)
    for item in run[1:]:
        count += item.events
        size += len(item.frames)
        frames.append(item.frames)
    heads.append(HEAD.pack(channel, epoch, first, count, size, check))
