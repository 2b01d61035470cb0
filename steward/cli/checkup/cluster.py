"""The processes of a running cluster, each asked on its ops port: ready, which version, what time.

`/healthz` of every process tells its version and its clock. The clock is compared with the middle
of the question, so that a slow answer is not taken for a wrong clock.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from steward.cli.checkup.finding import Finding, failed, good, warning
from steward.cli.probe import http_get, metric_sums, readiness

AREA = "processes"
MOST_SKEW_MS, FATAL_SKEW_MS = 500, 5000
BREACHES = "steward_breaches_total"


@dataclass(frozen=True, slots=True)
class Process:
    """A process by name, and the `host:port` of its ops port."""

    id: str
    ops: str


async def look(processes: Sequence[Process]) -> list[Finding]:
    """Findings of all of them, asked side by side."""
    own = metadata.version("steward")
    found = await asyncio.gather(*(_look(process, own) for process in processes))
    return [finding for findings in found for finding in findings]


async def _look(process: Process, own: str) -> list[Finding]:
    name = process.id
    asked_ns = time.time_ns()
    try:
        _, body = await http_get(process.ops, "/healthz")
        answer = json.loads(body)
    except (OSError, TimeoutError, ValueError):
        return [
            failed(
                AREA,
                name,
                f"{process.ops} does not answer",
                "look at its log; start it again if it is gone",
            )
        ]
    answered_ns = time.time_ns()
    findings = []
    ready = await readiness(process.ops)
    if not ready.ready:
        findings.append(failed(AREA, name, f"not ready: {ready.why}", "mend what it names"))
    findings.append(version(name, str(answer.get("version")), own))
    middle_ms = (asked_ns + answered_ns) // 2_000_000
    findings.append(skew(name, int(answer.get("unix_ms", 0)) - middle_ms))
    breaches = (await metric_sums(process.ops)).get(BREACHES, 0)
    if breaches:
        findings.append(
            failed(
                AREA,
                name,
                f"{breaches:.0f} breaches of ownership since its start",
                "read `steward violations` and docs/violations.md",
            )
        )
    return findings


def version(name: str, theirs: str, own: str) -> Finding:
    """Neighbouring versions work together while a cluster is upgraded, and no longer."""
    if theirs != own:
        return warning(
            AREA, name, f"is version {theirs}, this is {own}", "finish the upgrade of all processes"
        )
    return good(AREA, name, f"version {own}")


def skew(name: str, ahead_ms: int) -> Finding:
    """A clock that is `ahead_ms` of ours."""
    if abs(ahead_ms) <= MOST_SKEW_MS:
        return good(AREA, name, "its clock is right")
    found = f"its clock is {abs(ahead_ms):,} ms {'ahead' if ahead_ms > 0 else 'behind'}"
    mend = "run chrony or ntpd on both machines: tokens end, and events are dated, by the clock"
    if abs(ahead_ms) > FATAL_SKEW_MS:
        return failed(AREA, name, found, mend)
    return warning(AREA, name, found, mend)
