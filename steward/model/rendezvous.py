"""Rendezvous hashing: every (user, node) pair has a score that depends on nothing else.

Who knows the same nodes names the same favourite of a user, without asking anybody; a node
that comes or goes moves only its own share. The registry places by it, nodes divide work by it.
The hash is BLAKE2b and the same in every process, unlike Python's `hash`. Its input begins with
the node, so that who scores many users hashes each node once (`node_half`).
"""

from collections.abc import Iterable
from hashlib import blake2b

from steward.model.keys import NodeId, UserKey


def node_half(node_id: NodeId) -> blake2b:
    """The hash of a node's half of a pair; its length is part of it."""
    return blake2b(f"{len(node_id)}:{node_id}".encode(), digest_size=8)


def user_half(user: UserKey) -> bytes:
    """A user's half of a pair. With the lengths in both halves, no two pairs read the same."""
    tenant, name = user
    return f"{len(tenant)}:{tenant}{name}".encode()


def join_halves(node: blake2b, user: bytes) -> bytes:
    """The score of a pair, most significant byte first: 8 bytes compare as their number does."""
    pair = node.copy()
    pair.update(user)
    return pair.digest()


def score(user: UserKey, node_id: NodeId) -> int:
    """The weight of a pair, 64 bits."""
    return int.from_bytes(join_halves(node_half(node_id), user_half(user)), "big")


def favourite(user: UserKey, node_ids: Iterable[NodeId]) -> NodeId:
    """The node with the highest score for this user. ValueError when there is none."""
    return max(node_ids, key=lambda node_id: (score(user, node_id), node_id))
