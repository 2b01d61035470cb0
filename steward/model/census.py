"""What a census compares: who holds which user under which epoch, as numbers that cost little.

Users fall into buckets by their name. Of a bucket two parties compare how many entries it has
and the sum of the entries' hashes; only where these differ do they name users. A sum, and not an
exclusive or: an entry that is there twice must not vanish. Hashes tell errors apart, not
attackers: who can choose names can't gain anything but a finding that comes with the next change.
"""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Final, NamedTuple

from steward.model.deliveries import user_check
from steward.model.keys import Epoch, NodeIncarnation, UserKey

BUCKETS: Final = 4096
SUM_MASK: Final = (1 << 64) - 1

MOST_LISTED: Final = 20_000
"""Entries in one answer."""
MOST_FENCES: Final = 1_000
"""Users in one question for the log's fences, and in its answer."""

Digest = Mapping[int, tuple[int, int]]
"""Bucket → (count, sum modulo 2^64); buckets without anybody are missing."""


class Held(NamedTuple):
    """One entry: a manager that a node holds, or one that an edge has a user attached to.

    `weight` is the hash of the entry. `node` is the manager's; `making` says that it is not
    there yet.
    """

    bucket: int
    weight: int
    user: UserKey
    epoch: Epoch
    node: NodeIncarnation | None = None
    making: bool = False


def bucket_of(user: UserKey) -> int:
    """The bucket of a user, the same in every process."""
    return user_check(user) % BUCKETS


def weight_of(user: UserKey, epoch: Epoch) -> int:
    """The hash of an entry, 64 bits, the same in every process."""
    text = f"{epoch}:{len(user.tenant)}:{user.tenant}{user.user}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
