"""RFC 3339 times as text, without reading a clock."""

from datetime import UTC, datetime, timedelta

_UNIX = datetime(1970, 1, 1, tzinfo=UTC)


def rfc3339(unix_ms: int) -> str:
    """`2026-11-23T21:00:00.123Z` for Unix milliseconds."""
    moment = _UNIX + timedelta(milliseconds=unix_ms)
    # A quarter of what strftime costs, and every event has a stamp.
    return moment.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


class StampCache:
    """Formats a millisecond once, however many events carry it."""

    __slots__ = ("_ms", "_text")

    def __init__(self) -> None:
        self._ms = -1
        self._text = ""

    def text(self, unix_ms: int) -> str:
        if unix_ms != self._ms:
            self._ms = unix_ms
            self._text = rfc3339(unix_ms)
        return self._text
