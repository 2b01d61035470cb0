"""Rules of choosing a node."""

from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b

from hypothesis import given
from hypothesis import strategies as st

from registry_service.core.rendezvous import choose
from steward.model.keys import NodeId, UserKey
from steward.model.rendezvous import favourite, node_half, score


@dataclass(frozen=True, slots=True)
class Node:
    node_id: NodeId
    load: int
    most: int = 1 << 30

    @property
    def half(self) -> blake2b:
        return node_half(self.node_id)


def users(count: int) -> list[UserKey]:
    return [UserKey("t", f"user-{number}") for number in range(count)]


def nodes(count: int) -> list[NodeId]:
    return [NodeId(f"node-{number}") for number in range(count)]


def test_the_hash_is_the_same_in_every_process() -> None:
    assert score(UserKey("t", "ann"), NodeId("n1")) == 2723141824531415246


def test_two_keys_with_the_same_letters_have_different_scores() -> None:
    node = NodeId("n")
    assert score(UserKey("ab", "c"), node) != score(UserKey("a", "bc"), node)
    assert score(UserKey("a", "b"), NodeId("nx")) != score(UserKey("xa", "b"), node)


def test_the_choice_among_idle_nodes_is_the_favourite_of_everybody() -> None:
    names = nodes(6)
    idle = [Node(node, 0) for node in names]
    for user in users(200):
        chosen = choose(user, idle)
        assert chosen is not None and chosen.node_id == favourite(user, names)


def test_users_spread_evenly_before_the_bound_has_to_see_to_it() -> None:
    idle = [Node(node, 0) for node in nodes(7)]
    shares = Counter(choose(user, idle) for user in users(14_000))
    assert len(shares) == 7
    # 2,000 each; five standard deviations are 207.
    assert all(1_793 <= share <= 2_207 for share in shares.values()), shares


def test_no_node_ever_carries_more_than_one_and_a_quarter_of_the_mean() -> None:
    loads = dict.fromkeys(nodes(7), 0)
    for placed, user in enumerate(users(3_000), start=1):
        chosen = choose(user, [Node(node, load) for node, load in loads.items()])
        assert chosen is not None
        loads[chosen.node_id] += 1
        assert loads[chosen.node_id] <= -(-placed * 5 // (4 * len(loads)))


def test_a_node_that_goes_moves_only_its_own_users() -> None:
    # Without the bound: loads of zero never reach it.
    everybody = [Node(node, 0) for node in nodes(5)]
    before = {user: choose(user, everybody) for user in users(500)}
    gone = everybody[3]
    left = [node for node in everybody if node != gone]
    moved = [user for user in before if choose(user, left) != before[user]]
    assert moved
    assert all(before[user] == gone for user in moved)


def test_full_nodes_get_nobody() -> None:
    full = Node(NodeId("a"), 10, most=10)
    other = Node(NodeId("b"), 11, most=12)
    assert {choose(user, [full, other]) for user in users(50)} == {other}
    assert choose(UserKey("t", "ann"), [full]) is None
    assert choose(UserKey("t", "ann"), []) is None


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=12))
def test_there_is_always_a_node_below_the_bound(loads: list[int]) -> None:
    chosen = choose(
        UserKey("t", "ann"), [Node(NodeId(f"n{i}"), load) for i, load in enumerate(loads)]
    )
    assert chosen is not None
    assert chosen.load < -(-(sum(loads) + 1) * 5 // (4 * len(loads)))
