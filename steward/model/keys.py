"""Identities and numbers that every part of Steward shares.

Pure value types: nothing here does I/O, and nothing here is mutable. A key of two
parts is a type of its own and never a joined string, so that no tenant or user id
can forge another's by containing a separator. `UserKey` is a named tuple because it
is a dictionary key on the hot path, where C-speed hashing counts.
"""

from typing import NamedTuple, NewType

NodeId = NewType("NodeId", str)
EdgeId = NewType("EdgeId", str)
RunId = NewType("RunId", str)
ThreadId = NewType("ThreadId", str)
StreamId = NewType("StreamId", str)
ConnectionId = NewType("ConnectionId", str)

Epoch = NewType("Epoch", int)
"""Fencing number of a placement: `generation << 48 | revision`, below 2**53."""

Revision = NewType("Revision", int)
"""Version of the whole registry; one per command that changed something."""

NodeRev = NewType("NodeRev", int)
"""Incarnation of a node: `generation << 48 | revision`, as its process joined."""

Sequence = NewType("Sequence", int)
"""Number of an event in its user's stream, from 1, without gaps."""

DEFAULT_TENANT = "default"
DEFAULT_THREAD = ThreadId("main")

GENERATION_SHIFT = 48
MAX_GENERATION = 31


class UserKey(NamedTuple):
    """A user of a tenant: the owner of exactly one manager."""

    tenant: str
    user: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.user}"


class NodeIncarnation(NamedTuple):
    """One life of a node: its name, and the number under which this process joined."""

    node_id: NodeId
    node_rev: NodeRev


class StreamPosition(NamedTuple):
    """A place in a user's stream: `(stream_id, sequence)`."""

    stream_id: StreamId
    sequence: Sequence


def make_epoch(generation: int, revision: int) -> Epoch:
    """Combine generation (0 to 31) and revision (below 2**48) into an epoch.

    Raises ValueError outside of those ranges: an epoch that JavaScript could not
    hold exactly must never leave the registry.
    """
    if not 0 <= generation <= MAX_GENERATION:
        raise ValueError(f"generation {generation} is not in 0..{MAX_GENERATION}")
    if not 0 < revision < 1 << GENERATION_SHIFT:
        raise ValueError(f"revision {revision} is not in 1..2**{GENERATION_SHIFT}-1")
    return Epoch(generation << GENERATION_SHIFT | revision)
