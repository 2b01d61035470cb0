"""`docs/violations.md` has every kind in the part of its severity, with something to do."""

from pathlib import Path

from steward.model.violations import KINDS, Severity, ViolationKind
from steward.telemetry.observability import GENERATED
from steward.telemetry.runbook import LOOK, render_runbook

ROOT = Path(__file__).parents[3]


def test_the_page_is_current() -> None:
    page = (ROOT / "docs/violations.md").read_text(encoding="utf-8")
    assert page == render_runbook(GENERATED)


def test_every_kind_has_its_meaning_and_its_line() -> None:
    assert set(KINDS) == set(LOOK) == set(ViolationKind)
    breaches, _, refusals = render_runbook("").partition("## Refusals")
    for kind, row in KINDS.items():
        part = breaches if row.severity is Severity.BREACH else refusals
        other = refusals if row.severity is Severity.BREACH else breaches
        line = f"| `{kind.value}` | {row.meaning} | {LOOK[kind]} |"
        assert line in part and f"| `{kind.value}` |" not in other
