"""The stream checker finds what the vectors say is broken, and nothing in the legal ones."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from steward.client.checks import check_stream

TESTDATA = Path(__file__).parents[3] / "protos/testdata"
STREAMS = json.loads((TESTDATA / "streams.json").read_text("utf-8"))


def events_of(case: dict[str, Any]) -> list[dict[str, Any]]:
    full = [
        STREAMS["defaults"] | {"event_id": f"e{event['sequence']}"} | event
        for event in case["events"]
    ]
    return [{key: value for key, value in event.items() if value is not None} for event in full]


@pytest.mark.parametrize("case", STREAMS["cases"], ids=lambda case: case["name"])
def test_checker_finds_exactly_what_is_broken(case: dict[str, Any]) -> None:
    findings = check_stream(
        events_of(case),
        complete=case.get("complete", True),
        interleaving=case.get("interleaving", ()),
    )
    found = [{"kind": f.kind, "sequence": f.sequence} for f in findings]
    assert found == case["findings"], [str(f) for f in findings]


def test_every_kind_of_finding_is_documented_and_has_a_case() -> None:
    readme = (TESTDATA / "README.md").read_text("utf-8")
    kinds = {finding["kind"] for case in STREAMS["cases"] for finding in case["findings"]}
    rows = readme.split("| kind |")[1].split("\n\n")[0].splitlines()
    documented = {kind for row in rows for kind in re.findall(r"`(\w+)`", row.split("|")[1:2][0])}
    assert kinds == documented


def test_a_finding_says_what_and_where() -> None:
    case = next(c for c in STREAMS["cases"] if c["name"] == "a tool is never completed")
    (finding,) = check_stream(events_of(case))
    assert str(finding) == "tool_not_completed at 4 of run r1: r1.sql.1 was never completed"
