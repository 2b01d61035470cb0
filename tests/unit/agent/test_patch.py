"""A patch, applied by an independent reader of RFC 6902, gives the new state."""

import copy
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from steward.agent.patch import apply, diff

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.0, 1.0]) | st.text("ab/~"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("ab/~", max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)
STATES = st.dictionaries(st.text("ab/~", max_size=2), VALUES, max_size=4)


def _apply(document: Any, patch: list[dict[str, Any]]) -> Any:
    document = copy.deepcopy(document)
    for operation in patch:
        *parents, last = [
            part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]
        ]
        target = document
        for part in parents:
            target = target[part]
        if operation["op"] == "remove":
            del target[last]
        elif operation["op"] == "replace":
            assert last in target
            target[last] = operation["value"]
        elif isinstance(target, list):
            assert operation["op"] == "add" and last == "-"
            target.append(operation["value"])
        else:
            assert operation["op"] == "add"
            target[last] = operation["value"]
    return document


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


@given(STATES, STATES)
def test_a_patch_turns_the_old_state_into_the_new(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert _text(_apply(old, diff(old, new))) == _text(new)


@given(STATES, STATES)
def test_applied_in_place_it_does_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    apply(diff(old, new), old)
    assert _text(old) == _text(new)


@given(STATES)
def test_equal_states_have_no_patch(state: dict[str, Any]) -> None:
    assert diff(state, copy.deepcopy(state)) == []


def test_a_list_that_grew_is_appended_to() -> None:
    assert diff({"a": [1]}, {"a": [1, 2, 3]}) == [
        {"op": "add", "path": "/a/-", "value": 2},
        {"op": "add", "path": "/a/-", "value": 3},
    ]


def test_true_and_one_are_different_values() -> None:
    assert diff({"a": 1}, {"a": True}) == [{"op": "replace", "path": "/a", "value": True}]
