"""How the users of a load are split over its processes, and what they are told to do."""

from typing import Any

import pytest

from steward.load.plan import LoadPlan, WrongPlan, shares


def plan(count: int = 10, **changes: Any) -> LoadPlan:
    options: dict[str, Any] = {
        "addresses": ("127.0.0.1:8080",),
        "secure": False,
        "users": tuple((f"user-{n}", f"token-{n}") for n in range(count)),
        "tabs": 1,
        "rate": 100.0,
        "seconds": 2.0,
        "agent": "load",
        "workers": 3,
    }
    return LoadPlan(**(options | changes))


@pytest.mark.parametrize("users", [1, 2, 3, 10, 11])
def test_every_user_is_of_one_process_in_order(users: int) -> None:
    whole = plan(users)
    parts = shares(whole, [0, 1])
    assert tuple(user for share in parts for user in share.users) == whole.users
    assert [share.first for share in parts] == [
        sum(len(other.users) for other in parts[:index]) for index in range(len(parts))
    ]
    assert len(parts) == min(users, 3)
    assert max(len(s.users) for s in parts) - min(len(s.users) for s in parts) <= 1


def test_processes_have_cpus_of_their_own_while_one_is_left_for_the_rest() -> None:
    assert [share.cpu for share in shares(plan(), [0, 1, 2, 3])] == [1, 2, 3]
    assert [share.cpu for share in shares(plan(), [0, 1, 2])] == [None] * 3
    assert [share.cpu for share in shares(plan(workers=1), [0])] == [None]


def test_the_rate_is_shared_by_all_users_who_begin_one_after_the_other() -> None:
    messages = [
        share.message(index)
        for share in shares(plan(4, rate=8.0), [0])
        for index in range(len(share.users))
    ]
    assert messages == ["2 2 0.000", "2 2 125.000", "2 2 250.000", "2 2 375.000"]


def test_without_a_rate_everybody_begins_at_once() -> None:
    (share,) = shares(plan(2, rate=0.0, workers=1), [0])
    assert [share.message(index) for index in range(2)] == ["2 0 0.000", "2 0 0.000"]


@pytest.mark.parametrize(
    "changes",
    [
        {"users": ()},
        {"tabs": 0},
        {"tabs": 33},
        {"workers": 0},
        {"workers": 65},
        {"rate": -1.0},
        {"rate": float("nan")},
        {"rate": 1e9},
        {"seconds": 0.0},
        {"seconds": float("nan")},
        {"seconds": 1e9},
    ],
)
def test_a_plan_that_can_not_be_carried_out_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(WrongPlan):
        plan(**changes)
