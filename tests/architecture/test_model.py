"""The model of ownership and what runs it agree on the guards. SPIN itself is `make model`."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "docs/model"
MODEL = (FOLDER / "ownership.pml").read_text(encoding="utf-8")
README = (FOLDER / "README.md").read_text(encoding="utf-8")

# The guards that ownership names, and what the model calls them.
NAMED = {
    "fence at log": "FENCE",
    "expected sequence": "EXPECTED",
    "atomic seal-and-read": "ATOMIC_SEAL",
    "append before deliver": "APPEND_FIRST",
    "intent before tool": "INTENT_FIRST",
    "edge epoch check": "EDGE_EPOCH",
    "self-fencing": "SELF_FENCE",
    "guarded commit": "GUARDED_COMMIT",
    "unknown-result re-read": "REREAD",
    "compare-and-delete": "COMPARE_DELETE",
}


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / "check.py"))


def guards_of_the_model() -> set[str]:
    return set(re.findall(r"^#ifndef NO_(\w+)", MODEL, re.MULTILINE))


def taken_away(flags: str) -> set[str]:
    return set(re.findall(r"-DNO_(\w+)", flags))


def test_every_named_guard_has_a_counter_example_of_its_own(script: dict[str, Any]) -> None:
    alone = {
        guard
        for check in script["CHECKS"]
        if check.expected not in (script["HOLDS"], script["REACHED"])
        and "-DIGNORE" not in check.flags
        and len(taken_away(check.flags)) == 1
        for guard in taken_away(check.flags)
    }
    assert set(NAMED.values()) - alone == set()
    assert set(NAMED.values()) - guards_of_the_model() == set()


def test_every_guard_of_the_model_is_taken_away_by_some_check(script: dict[str, Any]) -> None:
    """And a guard is a macro that changes something: a name with a typo would change nothing."""
    checked = {guard for check in script["CHECKS"] for guard in taken_away(check.flags)}
    assert checked == guards_of_the_model()
    for guard in checked:
        assert len(re.findall(rf"\b{guard}\b", MODEL)) >= 4, f"{guard} guards nothing"


def test_every_switch_of_a_check_is_one_of_the_model(script: dict[str, Any]) -> None:
    known = set(re.findall(r"^#if(?:n?def) (\w+)", MODEL, re.MULTILINE))
    used = {name for check in script["CHECKS"] for name in re.findall(r"-D(\w+)", check.flags)}
    assert used - known == set()


def test_every_expected_breach_is_an_invariant_that_the_model_asserts(
    script: dict[str, Any],
) -> None:
    asserted = set(re.findall(r"\bMUST(?:\(|_)(\w+?)(?:,|\()", MODEL))
    expected = {check.expected for check in script["CHECKS"]} - {"holds", "reached"}
    assert expected - asserted == set()


def test_all_guards_are_on_where_the_whole_protocol_must_hold(script: dict[str, Any]) -> None:
    whole = [c for c in script["CHECKS"] if c.expected == "holds" and not taken_away(c.flags)]
    assert len(whole) >= 5
    assert [c.name for c in whole if "-DIGNORE" in c.flags or "-DREACH" in c.flags] == []


def test_the_page_explains_every_guard_and_lists_every_check(script: dict[str, Any]) -> None:
    for name, guard in NAMED.items():
        assert re.search(rf"\| {name} \| `{guard}` \|", README), name
    assert [g for g in guards_of_the_model() if f"`{g}`" not in README] == []
    assert [c.name for c in script["CHECKS"] if f"| {c.name} |" not in README] == []


def test_a_machine_without_spin_is_told_so_and_gets_exit_code_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "check.py")],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert "NOT CHECKED" in done.stderr


def verdict(script: dict[str, Any], said: str, trail: tuple[str, ...] = ()) -> str:
    found: str = script["_found"](said, trail)
    return found


def test_a_search_that_met_a_limit_is_no_proof(script: dict[str, Any]) -> None:
    assert verdict(script, "State-vector 9 byte, errors: 0\n") == "holds"
    assert verdict(script, "errors: 0\nerror: max search depth too small\n") != "holds"
    assert verdict(script, "pan: reached -DMEMLIM bound\nerrors: 0\n") != "holds"
    assert verdict(script, "Search not completed\nerrors: 0\n") != "holds"
    assert verdict(script, "") != "holds"
    assert verdict(script, "errors: 1\n") != "holds"
    assert verdict(script, "errors: 1\n", ("node 1: x", "BROKEN I4")) == "I4"
