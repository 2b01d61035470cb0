"""Settings of the log process."""

from dataclasses import dataclass
from typing import ClassVar

from steward.config.settings import ServiceSettings, setting


@dataclass(frozen=True, slots=True)
class LogSettings(ServiceSettings):
    """`log.*`: the process that alone opens the event database of a machine."""

    SECTION: ClassVar[str] = "log"

    registry: str = setting(
        "", help="host:port of the registry, for refused writes. Empty: they are only counted."
    )
    commit_appends: int = setting(
        1000, help="Most appends in one transaction; fewer travel when fewer wait."
    )
    readers: int = setting(2, help="Reads of stored events that run side by side.")
