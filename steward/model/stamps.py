"""RFC 3339 times as text, without reading a clock."""

from datetime import UTC, datetime, timedelta

_UNIX = datetime(1970, 1, 1, tzinfo=UTC)


def rfc3339(unix_ms: int) -> str:
    """`2026-11-23T21:00:00.123Z` for Unix milliseconds."""
    moment = _UNIX + timedelta(milliseconds=unix_ms)
    # A quarter of what strftime costs, and every event has a stamp.
    return moment.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


class StampCache:
    """Formats a second once, however many events carry it: their milliseconds are put behind."""

    __slots__ = ("_prefix", "_second")

    def __init__(self) -> None:
        self._second = -1
        self._prefix = ""

    def text(self, unix_ms: int) -> str:
        """As `rfc3339`."""
        second, ms = divmod(unix_ms, 1000)
        if second != self._second:
            self._second = second
            self._prefix = rfc3339(second * 1000)[: -len("000Z")]
        return f"{self._prefix}{ms:03}Z"
