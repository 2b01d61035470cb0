"""Settings of the log process."""

from dataclasses import dataclass
from typing import ClassVar

from steward.config.settings import ServiceSettings, setting


@dataclass(frozen=True, slots=True)
class LogSettings(ServiceSettings):
    """`log.*`: the process between nodes and the event database."""

    SECTION: ClassVar[str] = "log"

    registry: str = setting(
        "", help="host:port of the registry, for refused writes. Empty: they are only counted."
    )
    store: str = setting(
        "",
        help="postgresql://… for the event log. Empty: SQLite in the data directory.",
        secret=True,
    )
    pooled: bool = setting(False, help="The store is behind PgBouncer in transaction mode.")
    writers: int = setting(4, help="Groups that are written side by side. PostgreSQL only.")
    commit_appends: int = setting(
        1000, help="Most appends in one transaction; fewer travel when fewer wait."
    )
    keep_days: float = setting(
        0.0, help="How long events are kept; 0: for ever. A user's last append always stays."
    )
    readers: int = setting(2, help="Reads of stored events that run side by side.")
