"""What may be kept of an evidence: one line, bounded, no secrets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steward.model.evidence import MOST_BYTES, REDACTED, clean

JWT = "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJhbm4ifQ.c2lnbmF0dXJlLW9mLTMyLWJ5dGVz"
TICKET = "q3Zr0gJ5mUo1t7Yh2kLw9xVbNc4dFs6aPeRiTuYoQ1A"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"came with {JWT} from 10.0.0.1", f"came with {REDACTED} from 10.0.0.1"),
        (f"Authorization: Bearer {JWT}", None),
        ("GET /ws?ticket=abc123&client=tab", f"GET /ws?ticket={REDACTED}&client=tab"),
        ("ticket abc", "ticket abc"),
        (f"replayed {TICKET} again", f"replayed {REDACTED} again"),
        ('{"password": "hunter2", "user": "ann"}', None),
        ("was on node-1/17 under 23", "was on node-1/17 under 23"),
        (
            "trace 4bf92f3577b34da6a3ce929d0e0e4736 of nonce 0123456789abcdef0123456789abcdef",
            "trace 4bf92f3577b34da6a3ce929d0e0e4736 of nonce 0123456789abcdef0123456789abcdef",
        ),
    ],
)
def test_what_looks_like_a_secret_is_left_out_and_nothing_else(text: str, kept: str | None) -> None:
    cleaned = clean(text)
    for secret in (JWT, TICKET, "abc123", "hunter2", JWT.split(".")[2]):
        assert secret not in cleaned
    if kept is not None:
        assert cleaned == kept


def test_a_secret_at_the_cut_is_left_out_too() -> None:
    cleaned = clean("x " * (MOST_BYTES // 2 - 8) + JWT)
    assert "eyJ" not in cleaned


@given(st.text(max_size=6000))
def test_it_is_one_printable_line_within_bounds_and_cleaning_twice_changes_nothing(
    text: str,
) -> None:
    cleaned = clean(text)
    assert len(cleaned.encode()) <= MOST_BYTES
    assert cleaned.isprintable()
    assert clean(cleaned) == cleaned
