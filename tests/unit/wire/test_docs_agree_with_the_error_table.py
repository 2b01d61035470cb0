"""`docs/wire-protocol.md` and `steward/errors.py` say the same about every reason, both ways."""

import re
from pathlib import Path

import pytest

from steward.errors import ERRORS, Reason

PAGE = (Path(__file__).parents[3] / "docs/wire-protocol.md").read_text("utf-8")


def table(header: str) -> dict[str, list[str]]:
    """The rows of the table under `header`, by the first cell, without backquotes."""
    _, found, rest = PAGE.partition(header + "\n")
    assert found, f"no table {header}"
    rows = [line for line in rest.split("\n\n", 1)[0].splitlines() if not line.startswith("|--")]
    cells = [[c.strip().strip("`") for c in row.strip("|").split("|")] for row in rows]
    names = [row[0] for row in cells]
    assert len(names) == len(set(names)), f"a reason twice in {header}"
    return {row[0]: row[1:] for row in cells}


CLOSING = table("| reason | gRPC code | close code | client does |")
REFUSING = table("| reason | gRPC code | HTTP status | client does |")
INSIDE = table("| inside only | gRPC code |")


def test_every_reason_is_on_the_page_once_and_nothing_else_is() -> None:
    on_page = [*CLOSING, *REFUSING, *INSIDE]
    assert sorted(on_page) == sorted(reason.value for reason in Reason)
    assert set(ERRORS) == set(Reason)


@pytest.mark.parametrize("reason", list(Reason))
def test_codes_agree(reason: Reason) -> None:
    row = ERRORS[reason]
    if row.close_code is not None:
        assert CLOSING[reason][:2] == [row.grpc_code, str(row.close_code)]
    elif reason in REFUSING:
        assert REFUSING[reason][:2] == [row.grpc_code, str(row.http_status)]
    else:
        assert INSIDE[reason] == [row.grpc_code]


@pytest.mark.parametrize("reason", [r for r in Reason if ERRORS[r].close_code is not None])
def test_what_a_client_does_follows_from_the_number_alone(reason: Reason) -> None:
    code = ERRORS[reason].close_code
    assert code is not None
    stops = 4500 <= code <= 4999 or code == 1009
    assert CLOSING[reason][2].startswith("stops") == stops
    assert ERRORS[reason].retry == (not stops)


def test_the_page_names_every_event_and_frame_of_the_schema() -> None:
    schema = (Path(__file__).parents[3] / "protos/steward/v1/event.proto").read_text("utf-8")
    names = re.findall(r"^message (\w+)(?:Frame|Data) ", schema, re.MULTILINE)
    kinds = {re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() for name in names}
    missing = {kind for kind in kinds - {"event", "error_info"} if f"| `{kind}` |" not in PAGE}
    assert not missing
