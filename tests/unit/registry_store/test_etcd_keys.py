"""Keys of the store on etcd: every name has its own, and comes back from it."""

from hypothesis import given
from hypothesis import strategies as st

from registry_service.store.etcd_client import prefix_end
from registry_service.store.etcd_keys import Keys, number_of
from steward.model.keys import NodeId, UserKey

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
HOSTILE = st.sampled_from(["a/b", "a%2Fb", "..", "/", "%", "ü", "a\x00b", "leader", "head"])
ANY = NAMES | HOSTILE


@given(ANY, ANY)
def test_a_user_comes_back_from_the_key_of_his_placement(tenant: str, user: str) -> None:
    keys, key_of = Keys("blue"), UserKey(tenant, user)
    key = keys.placement(key_of)
    assert keys.user_of(key) == key_of
    assert keys.placements < key < prefix_end(keys.placements)


@given(st.tuples(ANY, ANY), st.tuples(ANY, ANY))
def test_two_users_never_share_a_key(one: tuple[str, str], other: tuple[str, str]) -> None:
    keys = Keys("blue")
    same = keys.placement(UserKey(*one)) == keys.placement(UserKey(*other))
    assert same == (one == other)


@given(ANY, ANY)
def test_no_cluster_reaches_into_another(one: str, other: str) -> None:
    first, second = Keys(one), Keys(other)
    assert second.node(NodeId("n")).startswith(first.prefix) == (one == other)


@given(ANY)
def test_a_nonce_comes_back_from_its_tomb(nonce: str) -> None:
    assert Keys("blue").nonce_of(Keys("blue").tomb(nonce)) == nonce


@given(st.integers(0, 10**15), st.integers(0, 10**15))
def test_rows_are_ordered_by_their_numbers(one: int, other: int) -> None:
    keys = Keys("blue")
    assert number_of(keys.row(one)) == one
    assert (keys.row(one) < keys.row(other)) == (one < other)
