"""Rendezvous hashing: every (user, node) pair has a score that depends on nothing else.

Who knows the same nodes names the same favourite of a user, without asking anybody; a node
that comes or goes moves only its own share. The registry places by it, nodes divide work by it.
The hash is BLAKE2b and the same in every process, unlike Python's `hash`.
"""

from collections.abc import Iterable
from hashlib import blake2b

from steward.model.keys import NodeId, UserKey


def score(user: UserKey, node_id: NodeId) -> int:
    """The weight of a pair, 64 bits. Lengths are part of the input: no two pairs read the same."""
    tenant, name = user
    pair = f"{len(node_id)}:{node_id}{len(tenant)}:{tenant}{name}"
    return int.from_bytes(blake2b(pair.encode(), digest_size=8).digest(), "big")


def favourite(user: UserKey, node_ids: Iterable[NodeId]) -> NodeId:
    """The node with the highest score for this user. ValueError when there is none."""
    return max(node_ids, key=lambda node_id: (score(user, node_id), node_id))
