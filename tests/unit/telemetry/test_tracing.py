"""Which spans are kept, and under which context: the rules of sampling."""

import itertools
import re

import pytest

from steward.telemetry import conventions as names
from steward.telemetry.tracing import (
    Link,
    Tracing,
    is_sampled,
    is_traceparent,
    new_traceparent,
)
from steward.testing.spans import KeptSpans

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SAMPLED = f"00-{TRACE}-00f067aa0ba902b7-01"
UNSAMPLED = f"00-{TRACE}-00f067aa0ba902b7-00"


def test_a_span_of_a_sampled_trace_is_a_child_of_its_parent() -> None:
    kept = KeptSpans()
    context = Tracing(kept).record("x", SAMPLED, 1, {"a": 1}, links=(Link(UNSAMPLED),), end_ns=5)
    (span,) = kept.spans
    assert (span.parent, span.context) == (SAMPLED, context)
    assert is_traceparent(context) and context[:36] == SAMPLED[:36] and context != SAMPLED
    assert (span.start_ns, span.end_ns, span.attributes) == (1, 5, {"a": 1})
    assert span.links == (Link(UNSAMPLED),)


def test_a_span_of_another_trace_is_not_kept_and_its_parent_goes_on() -> None:
    kept = KeptSpans()
    tracing = Tracing(kept, 1.0)
    assert tracing.record("x", UNSAMPLED, 1, {}) == UNSAMPLED == tracing.child(UNSAMPLED)
    assert kept.spans == []


def test_an_upgraded_span_is_kept_and_what_follows_from_it_is_sampled() -> None:
    kept = KeptSpans()
    tracing = Tracing(kept, 0.0)
    context = tracing.record("x", UNSAMPLED, 1, {"a": 1}, upgraded=True)
    (span,) = kept.spans
    assert is_sampled(context) and context[3:35] == TRACE
    assert span.attributes == {"a": 1, names.UPGRADED: True} and span.parent == UNSAMPLED
    tracing.record("y", context, 1, {})
    assert len(kept.spans) == 2


def test_the_first_span_of_a_trace_has_the_context_that_was_given_out() -> None:
    kept = KeptSpans()
    tracing = Tracing(kept, 0.0)
    root = tracing.new_root()
    assert tracing.record("x", "", 1, {}, context=root) == root and kept.spans == []
    context = tracing.record("x", "", 1, {}, context=root, upgraded=True)
    (span,) = kept.spans
    assert span.parent == "" and span.context == context == root[:52] + "-01"
    assert is_traceparent(tracing.record("z", "", 1, {}, upgraded=True))


def test_without_an_exporter_nothing_is_sampled_or_kept() -> None:
    tracing = Tracing(None, 1.0)
    assert not tracing.enabled and not is_sampled(tracing.new_root())
    assert tracing.child(SAMPLED) == SAMPLED
    assert tracing.record("x", SAMPLED, 1, {}, upgraded=True) == SAMPLED


@pytest.mark.parametrize("ratio, least, most", [(0.0, 0, 0), (0.25, 350, 650), (1.0, 2000, 2000)])
def test_new_traces_are_sampled_with_the_ratio(ratio: float, least: int, most: int) -> None:
    tracing = Tracing(KeptSpans(), ratio)
    roots = [tracing.new_root() for _ in range(2000)]
    assert least <= sum(map(is_sampled, roots)) <= most
    assert len(set(roots)) == 2000 and all(map(is_traceparent, roots))
    assert is_sampled(new_traceparent(sampled=True)) and not is_sampled(
        new_traceparent(sampled=False)
    )


def test_names_are_unique_and_content_is_under_its_own_keys() -> None:
    texts = [
        value
        for name, value in vars(names).items()
        if name.isupper() and isinstance(value, str) and not name.startswith("_")
    ]
    assert len(texts) == len(set(texts))
    assert all(re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", text) for text in texts)
    assert all(key.startswith("gen_ai.") for key in names.CONTENT)


def test_content_is_cut_to_length() -> None:
    long = "x" * (2 * names.MOST_CONTENT_CHARS)
    assert len(names.messages("user", long)) < names.MOST_CONTENT_CHARS + 100
    assert len(names.content({"a": long})) == names.MOST_CONTENT_CHARS
    assert '"role":"user"' in names.messages("user", [{"text": "y"}])


def test_a_conversation_is_named_by_neither_user_nor_thread() -> None:
    ids = {names.conversation(s, t) for s, t in itertools.product(("s1", "s2"), ("main", "side"))}
    assert len(ids) == 4 and not any("main" in one or "s1" in one for one in ids)
