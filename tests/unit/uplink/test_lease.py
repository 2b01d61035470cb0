"""When a node may believe in its lease."""

from hypothesis import given
from hypothesis import strategies as st

from agent_service.core.lease import LeaseChange, NodeLease

TTL_MS = 5_000


def welcomed(sent_ms: int = 1_000) -> NodeLease:
    lease = NodeLease()
    lease.welcomed(sent_ms, TTL_MS)
    assert lease.look(sent_ms) is LeaseChange.CERTAIN
    return lease


def test_a_lease_is_uncertain_before_the_first_welcome() -> None:
    lease = NodeLease()
    assert not lease.certain
    assert lease.look(0) is None
    assert lease.look(1 << 40) is None


def test_a_lease_without_answers_is_uncertain_after_nine_tenths_of_the_ttl_since_the_sending() -> (
    None
):
    lease = welcomed(1_000)
    assert lease.until_ms == 1_000 + 4_500
    assert lease.look(5_499) is None
    assert lease.look(5_500) is LeaseChange.UNCERTAIN
    assert lease.look(5_501) is None
    assert not lease.certain


def test_what_counts_is_when_a_renewal_was_sent_and_not_when_it_was_answered() -> None:
    lease = welcomed(1_000)
    lease.renewing(1, 2_000)
    assert lease.look(5_400) is None
    lease.renewed(1)
    assert lease.until_ms == 6_500


def test_an_answer_makes_the_lease_certain_again_if_it_was_sent_late_enough() -> None:
    lease = welcomed(1_000)
    lease.renewing(1, 2_000)
    lease.renewing(2, 6_000)
    assert lease.look(7_000) is LeaseChange.UNCERTAIN
    lease.renewed(1)
    assert lease.look(7_000) is None
    lease.renewed(2)
    assert lease.look(7_000) is LeaseChange.CERTAIN
    assert lease.until_ms == 10_500


def test_an_answer_to_an_older_renewal_never_takes_time_away() -> None:
    lease = welcomed(1_000)
    lease.renewing(1, 2_000)
    lease.renewing(2, 3_000)
    lease.renewed(2)
    lease.renewed(1)
    assert lease.until_ms == 7_500


def test_an_answer_to_a_renewal_that_was_never_sent_changes_nothing() -> None:
    lease = welcomed(1_000)
    lease.renewed(99)
    assert lease.until_ms == 5_500


def test_an_answer_of_the_stream_before_does_not_count_after_a_welcome() -> None:
    lease = welcomed(1_000)
    lease.renewing(1, 5_000)
    lease.welcomed(4_000, TTL_MS)
    lease.renewed(1)
    assert lease.until_ms == 8_500


def test_a_welcome_that_took_longer_than_the_lease_leaves_it_uncertain() -> None:
    lease = NodeLease()
    lease.welcomed(1_000, TTL_MS)
    assert lease.look(6_000) is None
    assert not lease.certain


def test_renewals_that_nobody_answers_are_not_kept_for_ever() -> None:
    lease = welcomed(0)
    for renewal in range(1, 10_001):
        lease.renewing(renewal, renewal)
    lease.renewed(1)
    assert lease.until_ms == 4_500
    lease.renewed(10_000)
    assert lease.until_ms == 14_500


@given(
    st.lists(
        st.tuples(st.sampled_from(["renew", "answer", "look", "welcome"]), st.integers(0, 2_000)),
        max_size=60,
    )
)
def test_a_lease_is_never_certain_longer_than_the_registry_counts_it(
    steps: list[tuple[str, int]],
) -> None:
    """The registry counts the TTL from when it gets a message, which is after its sending."""
    lease, now_ms, registry_until_ms, last_change = NodeLease(), 0, 0, None
    sent: list[tuple[int, int]] = []
    for number, (step, took_ms) in enumerate(steps, 1):
        now_ms += took_ms
        match step:
            case "renew":
                lease.renewing(number, now_ms)
                sent.append((number, now_ms))
            case "answer" if sent:
                renewal, sent_ms = sent.pop(took_ms % len(sent))
                registry_until_ms = max(registry_until_ms, sent_ms + TTL_MS)
                lease.renewed(renewal)
            case "welcome":
                lease.welcomed(now_ms - took_ms, TTL_MS)
                sent.clear()
                registry_until_ms = max(registry_until_ms, now_ms - took_ms + TTL_MS)
            case _:
                change = lease.look(now_ms)
                assert change is None or change is not last_change
                last_change = change or last_change
                if lease.certain:
                    assert now_ms < registry_until_ms - TTL_MS // 10
