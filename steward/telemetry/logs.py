"""Logs on stderr: a static message, fields beside it, and never a flood.

    log = logging.getLogger(__name__)
    log.warning("peer is away", extra=fields(peer=address, trace=traceparent))

Messages are constants, so that they can be counted and searched; everything that varies
is a field. A field `trace` takes a traceparent and is shown as the trace id. An error has a field
`do`: what whoever reads it can do. Each
message is written at most `BURST` times per `WINDOW_MS`; the first one after that says how many
were left out in `suppressed`. Standard output stays free for results.

Not guaranteed: that a log line survives a crash, or that writing never waits when the
reader of stderr does not read. Nobody may put a token, a ticket, or user content in a field.
"""

import logging
import sys
import time
from typing import Any, TextIO

import orjson

from steward.config.settings import ServiceSettings, SettingsError
from steward.model.stamps import rfc3339

BURST = 10
WINDOW_MS = 10_000
MAX_MESSAGES = 1024

BUG = "an error of this program: report it, with the exception and the lines before it"
"""What to `do` about what should not happen; whoever reads it can't mend it."""

_FIELDS = "steward_fields"


def fields(**values: Any) -> dict[str, Any]:
    """What to pass as `extra`. Values are strings, numbers, booleans or None."""
    return {_FIELDS: values}


def configure(settings: ServiceSettings, service: str) -> None:
    """Send all logs of this process to stderr, in the format and from the level of the settings.

    Replaces what was configured before. Raises SettingsError for an unknown format or level.
    """
    levels = logging.getLevelNamesMapping()
    level = levels.get(settings.log_level.upper())
    if level is None or settings.log_level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise SettingsError("log_level is `debug`, `info`, `warning` or `error`")
    if settings.log_format not in ("json", "text", "auto"):
        raise SettingsError("log_format is `json`, `text` or `auto`")
    handler = make_handler(
        sys.stderr,
        service=service,
        instance=settings.id,
        as_json=settings.log_format == "json"
        or (settings.log_format == "auto" and not sys.stderr.isatty()),
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # What a library says for its own makers would bury what is asked for: a line for every call.
    for library in ("grpc", "asyncio", "aiohttp"):
        logging.getLogger(library).setLevel(max(level, logging.INFO))


def make_handler(
    stream: TextIO, *, service: str, instance: str, as_json: bool
) -> logging.StreamHandler[TextIO]:
    """A handler with the format and the rate limit of Steward, for `stream`."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines(service, instance) if as_json else TextLines(service, instance))
    handler.addFilter(RateLimit())
    return handler


class RateLimit(logging.Filter):
    """Lets a message through `BURST` times per window. Errors with a stack count the same."""

    def __init__(self) -> None:
        super().__init__()
        self._windows: dict[tuple[str, str], _Window] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now = _now_ms()
        key = (record.name, str(record.msg))
        window = self._windows.get(key)
        if window is None:
            # Messages are constants, so there are few; a library that formats its own
            # text into them must not make this grow.
            if len(self._windows) >= MAX_MESSAGES:
                self._windows.clear()
            window = self._windows[key] = _Window(now)
        if now - window.since_ms >= WINDOW_MS:
            left_out = window.seen - BURST
            window.since_ms, window.seen = now, 0
            if left_out > 0:
                values = {**getattr(record, _FIELDS, {}), "suppressed": left_out}
                setattr(record, _FIELDS, values)
        window.seen += 1
        return window.seen <= BURST


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000


class _Window:
    __slots__ = ("seen", "since_ms")

    def __init__(self, since_ms: int) -> None:
        self.since_ms = since_ms
        self.seen = 0


class _Lines(logging.Formatter):
    def __init__(self, service: str, instance: str) -> None:
        super().__init__()
        self._service = service
        self._instance = instance

    def _line(self, record: logging.LogRecord) -> dict[str, Any]:
        values = dict(getattr(record, _FIELDS, {}))
        trace = values.pop("trace", "")
        line: dict[str, Any] = {
            "time": rfc3339(int(record.created * 1000)),
            "level": record.levelname.lower(),
            "service": self._service,
            "id": self._instance,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if trace:
            # The trace id of a traceparent; anything else as it is.
            line["trace_id"] = trace[3:35] if len(trace) == 55 else trace
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # What the line itself says can't be overwritten by a field.
        return {**values, **line}


class JsonLines(_Lines):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        return orjson.dumps(self._line(record), default=str).decode()


class TextLines(_Lines):
    """For people: time, level, process, message, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = self._line(record)
        head = (
            f"{line.pop('time')[11:]} {line.pop('level'):<7} "
            f"{line.pop('id') or line['service']}: {line.pop('message')}"
        )
        stack = line.pop("exception", "")
        del line["service"], line["logger"]
        pairs = "".join(f"  {name}={_shown(value)}" for name, value in line.items())
        return head + pairs + (f"\n{stack}" if stack else "")


def _shown(value: Any) -> str:
    text = str(value)
    # A value must not be able to forge a second line, or a second field.
    return text if text.isprintable() and " " not in text and text else repr(text)
