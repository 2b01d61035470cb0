"""Every frame and event in the vectors conforms to `protos/steward/v1/event.proto`.

A message of the schema is found by name: `user_message` is UserMessageFrame, the data of
`agent_started` is AgentStartedData. Parsing is strict: a field that the schema lacks fails.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.message import Message

from steward.model.verbs import EventType
from steward.v1 import event_pb2

Vectors = Callable[[str], dict[str, Any]]

CLIENT_FRAMES = {"user_message", "cancel", "user_input", "ack", "auth", "ping"}
SERVER_FRAMES = {
    "ready",
    "accepted",
    "error",
    "authenticated",
    "going_away",
    "pong",
    "heartbeat",
}


def message_for(kind: str, suffix: str) -> Message:
    name = "".join(part.title() for part in kind.split("_")) + suffix
    made: Message = getattr(event_pb2, name)()
    return made


def check_frame(frame: dict[str, Any]) -> None:
    message = json_format.ParseDict(frame, message_for(frame["type"], "Frame"))
    back = json_format.MessageToDict(message, preserving_proto_field_name=True)
    assert set(back) <= set(frame)


def check_event(event: dict[str, Any]) -> None:
    json_format.ParseDict(event, event_pb2.EventFrame())
    json_format.ParseDict(event["data"], message_for(event["type"], "Data"))


def test_valid_client_frames_conform(vectors: Vectors) -> None:
    means = [case["means"] for case in vectors("frames")["cases"] if "means" in case]
    assert {frame["type"] for frame in means} == CLIENT_FRAMES
    for frame in means:
        check_frame(frame)


def test_legal_events_conform(vectors: Vectors) -> None:
    file = vectors("streams")
    seen = set()
    for case in file["cases"]:
        if any(f["kind"] in ("missing_field", "wrong_type") for f in case["findings"]):
            continue
        for event in case["events"]:
            if event["type"] == "agent_humming":
                continue
            whole = file["defaults"] | {"event_id": "e"} | event
            check_event({key: value for key, value in whole.items() if value is not None})
            seen.add(event["type"])
    assert seen == {kind.value for kind in EventType}


def session_frames(file: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for case in file["cases"]:
        for step in case["steps"]:
            on = step["on"]
            if "ready" in on:
                yield file["ready"] | on["ready"]
            elif isinstance(on.get("frame"), dict) and on["frame"]["type"] != "weather":
                yield on["frame"]
            yield from (e["frame"] for e in step["effects"] if e["type"] == "write")


def test_frames_of_the_session_vectors_conform(vectors: Vectors) -> None:
    file = vectors("client_session")
    frames = [f for f in session_frames(file) if f["type"] not in set(EventType) or "id" in f]
    kinds = {frame["type"] for frame in frames}
    assert kinds >= SERVER_FRAMES | {"user_message", "cancel", "user_input", "ack", "auth"}
    for frame in frames:
        check_frame(frame)
    check_event(file["event"] | {"sequence": 1, "event_id": "e1"})


def test_schema_describes_every_event_and_every_frame() -> None:
    names = set(event_pb2.DESCRIPTOR.message_types_by_name)
    wanted = {"".join(p.title() for p in kind.split("_")) + "Data" for kind in EventType}
    wanted |= {
        "".join(p.title() for p in kind.split("_")) + "Frame"
        for kind in CLIENT_FRAMES | SERVER_FRAMES | {"event"}
    }
    assert wanted <= names
    assert names - wanted == {"ErrorInfoData", "ManagerInfo", "Limits"}


@pytest.mark.parametrize(
    ("event", "why"),
    [
        ({"type": "agent_text", "data": {"message_id": "m", "delta": "d", "colour": 1}}, "colour"),
        ({"type": "tool_executing", "data": {"tool_call_id": 7}}, "tool_call_id"),
    ],
)
def test_a_field_outside_of_the_schema_is_seen(event: dict[str, Any], why: str) -> None:
    with pytest.raises(json_format.ParseError, match=why):
        check_event(event)


@pytest.mark.parametrize("name", ["frames", "resume", "streams", "client_session"])
def test_cases_have_unique_names(vectors: Vectors, name: str) -> None:
    names = [case["name"] for case in vectors(name)["cases"]]
    assert len(names) == len(set(names)) > 0


def test_event_schema_keeps_one_byte_tags_for_what_every_event_has() -> None:
    fields = event_pb2.EventFrame.DESCRIPTOR.fields
    assert all(field.number <= 15 for field in fields)


def test_vectors_are_plain_json() -> None:
    for path in (Path(__file__).parents[3] / "protos/testdata").glob("*.json"):
        text = path.read_text("utf-8")
        json.loads(text, parse_constant=pytest.fail)
        assert re.fullmatch(r"[\x00-\x7f]*", text), f"{path} is not ASCII"
