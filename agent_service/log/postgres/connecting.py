"""Which PostgreSQL database an event log is in."""

from dataclasses import dataclass
from typing import ClassVar

from steward.postgres import connecting
from steward.postgres.connecting import Use


@dataclass(frozen=True, slots=True)
class Database(connecting.Database):
    """The database of an event log."""

    USE: ClassVar[Use] = Use("the event log's database", "log.store", "steward-log")
