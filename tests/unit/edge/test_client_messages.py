"""Client messages against the shared wire vectors, and the promise that nothing raises."""

import base64
import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.core.client_messages import (
    MAX_DEPTH,
    Acknowledge,
    Authenticate,
    ClientMessage,
    MessageRefused,
    Ping,
    parse_message,
    parse_object,
    parse_ping,
    parse_user_message,
)
from edge.core.commands import CancelRun, SubmitInput, SubmitMessage

TESTDATA = Path(__file__).parents[3] / "protos" / "testdata"
FRAMES = json.loads((TESTDATA / "frames.json").read_text())["cases"]
TEXTS = [case for case in FRAMES if "text" in case and "close" not in case]


def payload_of(case: dict[str, Any]) -> bytes:
    if "binary" in case:
        return base64.b64decode(case["binary"])
    text = case["text"]
    if isinstance(text, dict):
        text = "".join(part * times for part, times in text["repeat"])
    return str(text).encode("utf-8", "surrogatepass")


def meaning(message: ClientMessage) -> dict[str, Any]:
    """The message as the vectors write it."""
    match message:
        case SubmitMessage():
            fields = {
                "type": "user_message",
                "id": message.id,
                "content": orjson.loads(message.content),
                "thread_id": message.thread_id,
                "agent": message.agent,
                "overlap": message.overlap,
            }
        case CancelRun(run_id, thread_id):
            fields = {"type": "cancel", "run_id": run_id, "thread_id": thread_id}
        case SubmitInput(request_id, value):
            return {"type": "user_input", "request_id": request_id, "value": orjson.loads(value)}
        case Acknowledge(sequence, digest):
            fields = {"type": "ack", "sequence": sequence, "digest": digest}
        case Authenticate(token):
            fields = {"type": "auth", "token": token}
        case Ping(t):
            fields = {"type": "ping", "t": t}
    return {name: value for name, value in fields.items() if value != ""}


@pytest.mark.parametrize("case", TEXTS, ids=lambda case: case["name"])
def test_wire_vectors_hold(case: dict[str, Any]) -> None:
    if "means" in case:
        assert meaning(parse_message(payload_of(case))) == case["means"]
        return
    with pytest.raises(MessageRefused) as refused:
        parse_message(payload_of(case))
    assert refused.value.ref == case.get("ref", "")


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_refusal(data: bytes) -> None:
    try:
        parse_message(data)
    except MessageRefused as refused:
        assert refused.message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


@settings(max_examples=100)
@given(
    st.sampled_from(["user_message", "cancel", "user_input", "ack", "auth", "ping", "x"]),
    st.dictionaries(
        st.sampled_from(
            "id content thread_id agent overlap run_id request_id value sequence digest token t"
            " user_id other".split()
        ),
        json_values,
    ),
)
def test_no_object_raises_anything_but_a_refusal(kind: str, fields: dict[str, Any]) -> None:
    payload = json.dumps({"type": kind, **fields}).encode("utf-8", "surrogatepass")
    try:
        parse_message(payload)
    except MessageRefused as refused:
        assert "user_id" not in refused.message or "user_id" in fields


def nested(depth: int) -> bytes:
    inner = b'{"a":' * (depth - 2) + b"1" + b"}" * (depth - 2)
    return b'{"type":"user_input","request_id":"q","value":%b}' % inner


def test_nesting_is_bounded_exactly() -> None:
    assert parse_object(nested(MAX_DEPTH + 1))
    with pytest.raises(MessageRefused, match="nested"):
        parse_object(nested(MAX_DEPTH + 2))


@pytest.mark.parametrize("name", ["user_id", "tenant_id"])
def test_identity_in_a_body_is_refused(name: str) -> None:
    body = {"type": "ping", "t": 1, name: "bob"}
    with pytest.raises(MessageRefused, match=name):
        parse_message(orjson.dumps(body))


def test_post_body_may_leave_out_its_type() -> None:
    assert parse_user_message(b'{"id":"m","content":"x"}').id == "m"
    with pytest.raises(MessageRefused):
        parse_user_message(b'{"type":"cancel","run_id":"r"}')


@pytest.mark.parametrize(
    ("payload", "t"),
    [
        (b'{"type":"ping","t":1}', 1),
        (b'{"type":"ping","t":1.5,"more":{"x":[1]}}', 1.5),
        (b'{"t":1,"type":"ping"}', None),
        (b'{"type":"ping"}', None),
        (b'{"type":"ping","t":true}', None),
        (b'{"type":"ping","t":"1"}', None),
        (b'{"type":"ping","t":1,"user_id":"bob"}', None),
        (b'{"type":"ping","t":1,"tenant_id":"other"}', None),
        (b'{"type":"ping","t":1,"type":"cancel","run_id":"r"}', None),
        (b'{"type":"pingpong","t":1}', None),
        (b'{"type":"ping"', None),
        (b'{"type":"ping","t":1,"x":' + b"[" * 64 + b"]" * 64 + b"}", None),
        (b'{"type":"ack","sequence":1}', None),
        (b"", None),
    ],
)
def test_the_short_way_takes_good_pings_and_nothing_else(payload: bytes, t: float | None) -> None:
    assert parse_ping(payload) == t
    if t is not None:
        assert parse_message(payload) == Ping(t)
