"""Settings of an agent node (`STEWARD_AGENT_*`)."""

from dataclasses import dataclass
from typing import ClassVar

from steward.config.settings import ServiceSettings, setting


@dataclass(frozen=True, slots=True)
class AgentSettings(ServiceSettings):
    """One node: hosts managers and runs agents."""

    SECTION: ClassVar[str] = "agent"

    registry: str = setting("", help="host:port of the registry.")
    log: str = setting(
        "", help="host:port of the log process. Empty: this node opens the event database itself."
    )
    entrypoints: tuple[str, ...] = setting(
        (), help="Agents to serve, `file.py:attr` or `module:attr`. Empty: the bundled demo."
    )
    trace_content: bool = setting(
        False, help="Record messages, answers, tool arguments and results in traces."
    )
    zone: str = setting("", help="Failure zone of this node, for placement.")
    capacity: int = setting(10_000, help="Managers that this node takes.", unit="managers")
    max_waiting_runs: int = setting(32, help="Runs of one user that may wait.", unit="runs")
    messages_per_minute: int = setting(600, help="Messages of one user.", unit="1/min")
    passivate_after_ms: int = setting(
        60_000, help="A manager that nobody needs for so long is put away.", unit="ms"
    )
    drain_runs_ms: int = setting(
        10_000,
        help="Time that open tool calls get when their user moves to another node.",
        unit="ms",
    )
    drain_stop_ms: int = setting(
        2500, help="Time that open runs get at a stop without another node.", unit="ms"
    )
    drain_appends_ms: int = setting(1500, help="Time for the last appends at a stop.", unit="ms")
