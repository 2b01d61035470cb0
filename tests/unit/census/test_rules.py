"""The registry's side of a census: its index, its rules, and what it takes for a finding."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry_service.core.census import (
    Confirmation,
    Holder,
    Placed,
    PlacementIndex,
    Sighting,
    Tie,
    UserView,
    differing,
    findings_of,
)
from steward.model.census import SUM_MASK, bucket_of, weight_of
from steward.model.keys import Epoch, NodeId, NodeIncarnation, NodeRev, UserKey
from steward.model.violations import ViolationKind

N1 = NodeIncarnation(NodeId("n1"), NodeRev(1))
N2 = NodeIncarnation(NodeId("n2"), NodeRev(2))
ALICE = UserKey("acme", "alice")
USERS = [UserKey("acme", f"u{number}") for number in range(6)]


def digest_of(held: dict[UserKey, Placed], node: NodeIncarnation) -> dict[int, tuple[int, int]]:
    """As a node makes it."""
    found: dict[int, tuple[int, int]] = {}
    for user, placed in held.items():
        if placed.node == node:
            count, total = found.get(bucket_of(user), (0, 0))
            weight = weight_of(user, placed.epoch)
            found[bucket_of(user)] = (count + 1, (total + weight) & SUM_MASK)
    return found


ROWS = st.lists(
    st.tuples(
        st.sampled_from(["place", "takeover", "release", "fence"]),
        st.sampled_from(USERS),
        st.integers(1, 5),
        st.sampled_from([N1, N2]),
    ),
    max_size=40,
)


@given(ROWS)
@settings(deadline=None)
def test_the_index_says_what_nodes_would_say(
    rows: list[tuple[str, UserKey, int, NodeIncarnation]],
) -> None:
    index = PlacementIndex()
    model: dict[UserKey, Placed] = {}
    for kind, user, epoch, node in rows:
        index.apply(kind, user, Epoch(epoch), node)
        if kind in ("place", "takeover"):
            model[user] = Placed(node, Epoch(epoch))
        elif kind == "release" and user in model and model[user].epoch == epoch:
            del model[user]
        elif kind == "fence":
            model = {u: placed for u, placed in model.items() if placed.node != node}
    assert {user: index.get(user) for user in index.users()} == model
    for node in (N1, N2):
        assert differing(index.digest(node), digest_of(model, node)) == set()
    for user, placed in model.items():
        assert user in index.users_of(bucket_of(user))
        changed = {**model, user: Placed(placed.node, Epoch(placed.epoch + 1))}
        found = differing(index.digest(placed.node), digest_of(changed, placed.node))
        assert found == {bucket_of(user)}


K = ViolationKind
HERE = Placed(N1, Epoch(5))


@pytest.mark.parametrize(
    ("placed", "holders", "fence", "ties", "expected"),
    [
        (HERE, [(N1, 5, False)], 5, [], []),
        (HERE, [], 3, [], []),
        (HERE, [(N1, 5, True)], 5, [], []),
        (None, [], 9, [], []),
        (HERE, [(N1, 5, False), (N2, 9, False)], 9, [], [K.DUPLICATE_MANAGER]),
        (HERE, [(N1, 5, False), (N1, 5, False)], 5, [], [K.DUPLICATE_MANAGER]),
        (None, [(N2, 9, False)], 9, [], [K.ORPHAN_MANAGER]),
        (HERE, [(N1, 6, False)], 6, [], [K.ORPHAN_MANAGER, K.UNREACHABLE_USER]),
        (HERE, [(N2, 4, False)], 4, [], [K.STALE_MANAGER]),
        (HERE, [(N1, 5, False)], 6, [], [K.STALE_MANAGER]),
        (HERE, [(N1, 5, False)], 4, [], [K.UNSEALED_MANAGER]),
        (HERE, [(N1, 5, False)], 0, [], [K.UNSEALED_MANAGER]),
        (HERE, [], 5, [], [K.UNREACHABLE_USER]),
        (HERE, [], 6, [], [K.UNREACHABLE_USER]),
        (HERE, [], 0, [(N1, 5)], [K.UNREACHABLE_USER]),
        (HERE, [(N1, 5, False)], 5, [(N2, 4)], [K.MISATTACHED_EDGE]),
        (HERE, [(N1, 5, False)], None, [(N1, 5)], []),
    ],
)
def test_each_disagreement_has_its_name(
    placed: Placed | None,
    holders: list[tuple[NodeIncarnation, int, bool]],
    fence: int | None,
    ties: list[tuple[NodeIncarnation, int]],
    expected: list[ViolationKind],
) -> None:
    view = UserView(
        ALICE,
        placed,
        tuple(Holder(node, Epoch(epoch), making) for node, epoch, making in holders),
        tuple(Tie("edge-0", node, Epoch(epoch)) for node, epoch in ties),
        None if fence is None else Epoch(fence),
    )
    found = findings_of(view, {N1, N2})
    assert [sighting.kind for sighting in found] == expected
    assert all(sighting.evidence and sighting.user == ALICE for sighting in found)


def test_of_a_node_that_was_not_heard_nothing_is_said() -> None:
    view = UserView(ALICE, HERE, (), (), Epoch(5), alive=False)
    assert findings_of(view, {N1}) == []


def sighting(epoch: int, kind: ViolationKind = K.STALE_MANAGER) -> Sighting:
    return Sighting(kind, ALICE, Epoch(epoch), N1, f"under {epoch}")


def test_a_sighting_is_a_finding_when_it_comes_back_unchanged_after_its_time() -> None:
    kept = Confirmation(least_ms=1000, ties_ms=3000)
    assert kept.look(0, [sighting(1)], True) == []
    assert kept.look(900, [sighting(1)], True) == [], "too soon"
    assert kept.look(1000, [sighting(1)], True) == [sighting(1)]
    assert kept.look(2000, [sighting(1)], True) == [], "it is known"
    assert dict(kept.confirmed) == {sighting(1): 0}
    assert kept.look(3000, [], True) == [] and not kept.confirmed


def test_another_epoch_is_another_sighting_and_a_gap_begins_anew() -> None:
    kept = Confirmation(least_ms=1000, ties_ms=3000)
    for now_ms in range(0, 10_000, 1000):
        assert kept.look(now_ms, [sighting(now_ms)], True) == []
    kept.look(20_000, [sighting(1)], True)
    kept.look(21_000, [], True)
    assert kept.look(22_000, [sighting(1)], True) == []


def test_an_edge_gets_longer_to_hear_of_a_move() -> None:
    kept = Confirmation(least_ms=1000, ties_ms=3000)
    tie = sighting(1, K.MISATTACHED_EDGE)
    kept.look(0, [tie], True)
    assert kept.look(2000, [tie], True) == []
    assert kept.look(3000, [tie], True) == [tie]


def test_a_look_that_is_not_complete_takes_nothing_back() -> None:
    kept = Confirmation(least_ms=0, ties_ms=0)
    kept.look(0, [sighting(1)], True)
    kept.look(1, [sighting(1)], True)
    kept.look(2, [], False)
    assert set(kept.confirmed) == {sighting(1)} and kept.users == {ALICE}
