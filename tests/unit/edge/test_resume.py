"""The resume table against the shared wire vectors."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from edge.core.resume import (
    ResumePoint,
    StreamHead,
    decide_resume,
    parse_last_event_id,
    parse_merge,
    parse_resume,
)
from steward.errors import StewardError
from steward.model.keys import Epoch, NodeId, StreamId

CASES = json.loads((Path(__file__).parents[3] / "protos" / "testdata" / "resume.json").read_text())[
    "cases"
]


def head_of(stream: dict[str, Any]) -> StreamHead:
    return StreamHead(
        StreamId(stream["stream_id"]), stream["sequence"], stream["oldest"], NodeId("n"), Epoch(7)
    )


def is_of_the_table(case: dict[str, Any]) -> bool:
    """Repeated fields and client ids are the HTTP server's affair, and tested with it."""
    query = parse_qs(case["query"], keep_blank_values=True)
    return "client" not in query and all(len(values) == 1 for values in query.values())


@pytest.mark.parametrize(
    "case", list(filter(is_of_the_table, CASES)), ids=lambda case: case["name"]
)
def test_resume_vectors_hold(case: dict[str, Any]) -> None:
    query = {name: v[0] for name, v in parse_qs(case["query"], keep_blank_values=True).items()}
    if "http" in case["expect"]:
        with pytest.raises(StewardError):
            parse_resume(query.get("after"), query.get("stream"))
            parse_merge(query.get("merge"))
        return
    point = parse_resume(query.get("after"), query.get("stream"))
    resume, first = decide_resume(point, head_of(case["stream"]))
    assert {"resume": resume.value, "first": first} == case["expect"]
    assert parse_merge(query.get("merge")) is (query.get("merge") == "1")


def test_last_event_id_is_a_position() -> None:
    assert parse_last_event_id("s1:42") == ResumePoint(42, StreamId("s1"))
    for text in ("42", "s1:", "s1:x", ":4", "s1:-1"):
        with pytest.raises(StewardError):
            parse_last_event_id(text)
