"""The lines of a compliance report: what was looked at, what came out, how it was obtained.

A line is made by looking, now; there is no line that says a thing without having looked, and one
that could not look says so. The order of verdicts matters: a report is as good as its worst line.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

MOST_EVIDENCE = 20


class Verdict(StrEnum):
    """What came out."""

    KEPT = "kept"
    BROKEN = "broken"
    NOT_CHECKED = "not checked"


class Part(StrEnum):
    """Of what a line speaks."""

    STATIC = "the code"
    RUNNING = "the running cluster"
    LOAD = "under load"


@dataclass(frozen=True, slots=True)
class Line:
    """One line. `at_ms` is Unix time; `evidence` has what was counted, or what is wrong."""

    id: str
    part: Part
    what: str
    verdict: Verdict
    how: str
    evidence: tuple[str, ...] = ()
    at_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)

    def as_json(self) -> dict[str, Any]:
        """The line as a JSON object."""
        return {
            "id": self.id,
            "part": self.part.value,
            "what": self.what,
            "verdict": self.verdict.value,
            "how": self.how,
            "at": stamp(self.at_ms),
            "evidence": list(self.evidence),
        }


@dataclass(frozen=True, slots=True)
class Report:
    """All lines about one cluster."""

    cluster: str
    registry: str
    version: str
    lines: tuple[Line, ...]
    at_ms: int

    @property
    def verdict(self) -> Verdict:
        """Broken if anything is; kept if everything is."""
        verdicts = {line.verdict for line in self.lines}
        for worst in (Verdict.BROKEN, Verdict.NOT_CHECKED):
            if worst in verdicts:
                return worst
        return Verdict.KEPT if verdicts else Verdict.NOT_CHECKED

    def count(self, verdict: Verdict) -> int:
        return sum(line.verdict is verdict for line in self.lines)

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {
            "cluster": self.cluster,
            "registry": self.registry,
            "version": self.version,
            "at": stamp(self.at_ms),
            "verdict": self.verdict.value,
            "counts": {verdict.value: self.count(verdict) for verdict in Verdict},
            "lines": [line.as_json() for line in self.lines],
        }


def some(evidence: Iterable[str], most: int = MOST_EVIDENCE) -> tuple[str, ...]:
    """The first of what is wrong, and how many more there are."""
    found = list(evidence)
    more = (f"and {len(found) - most} more",) if len(found) > most else ()
    return (*found[:most], *more)


def stamp(at_ms: int) -> str:
    """A time for people and for JSON: RFC 3339, UTC, milliseconds."""
    at = datetime.fromtimestamp(at_ms / 1000, UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
