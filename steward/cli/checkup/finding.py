"""What `steward doctor` says of one thing that it looked at.

A finding that is not good says how to mend it: one that can't would only worry people.
"""

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How a thing is. Only FAILED makes the exit code 1."""

    GOOD = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """`found` is what was seen, with its unit; `mend` what to do, empty when nothing is to do."""

    area: str
    what: str
    verdict: Verdict
    found: str
    mend: str = ""

    def __post_init__(self) -> None:
        if self.verdict in (Verdict.WARNING, Verdict.FAILED) and not self.mend:
            raise ValueError(f"{self.area}: {self.what}: nobody says how to mend it")


def good(area: str, what: str, found: str) -> Finding:
    """All is well."""
    return Finding(area, what, Verdict.GOOD, found)


def warning(area: str, what: str, found: str, mend: str) -> Finding:
    """It works, and will hurt some day."""
    return Finding(area, what, Verdict.WARNING, found, mend)


def failed(area: str, what: str, found: str, mend: str) -> Finding:
    """It does not work, or must not be used so."""
    return Finding(area, what, Verdict.FAILED, found, mend)


def skipped(area: str, what: str, why: str) -> Finding:
    """It was not looked at."""
    return Finding(area, what, Verdict.SKIPPED, why)
