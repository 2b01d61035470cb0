"""What agents hand over is JSON, strictly, or an error that names the place."""

import datetime
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steward.agent.values import MAX_EVENT_BYTES, clean_text, describe_error, encode, to_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text() | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def _has_no_number(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_no_number(item) for item in value.values())
    if isinstance(value, list):
        return any(_has_no_number(item) for item in value)
    return isinstance(value, float) and not math.isfinite(value)


@given(JSON)
def test_json_is_kept_as_it_is_and_nan_is_refused(value: Any) -> None:
    if _has_no_number(value):
        with pytest.raises(TypeError):
            to_json(value, "it")
    else:
        assert to_json(value, "it")[1] is value


def test_a_tuple_comes_back_as_a_list_like_from_the_log() -> None:
    assert to_json({"rows": [(1, "a")]}, "it") == (b'{"rows":[[1,"a"]]}', {"rows": [[1, "a"]]})


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"rows": [{"at": datetime.date(2026, 1, 1)}]}, "['rows'][0]['at']: date"),
        ({"a": {1: 2}}, "['a']: the key 1"),
        ([{1}], "[0]: set"),
        ([b"x"], "[0]: bytes"),
        (math.inf, "inf is no JSON number"),
        (object(), "object is no JSON type"),
        (2**64, "64-bit"),
        ("\ud800", "UTF-8"),
    ],
)
def test_an_error_names_the_place(value: Any, where: str) -> None:
    with pytest.raises(TypeError) as error:
        encode(value, "the result of tool 'x'")
    assert "the result of tool 'x' is not JSON" in str(error.value)
    assert where in str(error.value)


def test_a_value_that_contains_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(TypeError, match="nested"):
        encode(value, "it")


def test_a_value_over_the_limit_is_refused() -> None:
    encode("x" * (MAX_EVENT_BYTES - 2), "it")
    with pytest.raises(ValueError, match="at most"):
        encode("x" * (MAX_EVENT_BYTES - 1), "it")


def test_text_without_valid_unicode_is_cleaned() -> None:
    assert clean_text("a\ud800b") == "a?b"
    assert clean_text("grüße") == "grüße"


def test_an_exception_that_can_not_be_read_is_described() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert describe_error(Broken())["type"] == "Broken"
    assert describe_error(KeyError("k")) == {"type": "KeyError", "message": "'k'"}
