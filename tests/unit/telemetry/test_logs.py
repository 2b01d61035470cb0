"""Log lines: one per record, fields beside a constant message, and never a flood."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from steward.config.settings import ServiceSettings, SettingsError
from steward.telemetry import logs
from steward.telemetry.logs import BURST, MAX_MESSAGES, WINDOW_MS, configure, fields, make_handler

TRACE = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


class Output:
    """A logger of its own that writes with Steward's handler into memory."""

    def __init__(self, as_json: bool) -> None:
        self.stream = io.StringIO()
        handler = make_handler(self.stream, service="edge", instance="edge-1", as_json=as_json)
        self.log = logging.Logger("steward.test")
        self.log.addHandler(handler)

    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()

    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines()]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    now = [1_000_000]
    monkeypatch.setattr(logs, "_now_ms", lambda: now[0])
    return now


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    yield root
    root.handlers[:], root.level = before


def test_a_json_line_has_message_fields_process_and_trace_id() -> None:
    out = Output(as_json=True)
    out.log.warning("peer is away", extra=fields(peer="127.0.0.1:7", tries=3, trace=TRACE))
    [line] = out.objects()
    assert line["message"] == "peer is away" and line["level"] == "warning"
    assert (line["service"], line["id"], line["logger"]) == ("edge", "edge-1", "steward.test")
    assert (line["peer"], line["tries"]) == ("127.0.0.1:7", 3)
    assert line["trace_id"] == TRACE[3:35] and "trace" not in line
    assert line["time"].endswith("Z")


def test_a_field_can_not_overwrite_what_the_line_itself_says() -> None:
    out = Output(as_json=True)
    out.log.info("x", extra=fields(level="fatal", message="forged", service="other"))
    [line] = out.objects()
    assert (line["level"], line["message"], line["service"]) == ("info", "x", "edge")


@pytest.mark.parametrize("as_json", [True, False])
def test_a_value_can_not_forge_a_line_or_a_field(as_json: bool) -> None:
    out = Output(as_json)
    out.log.info("x", extra=fields(path="/a\n00:00 error edge-1: forged", other="b  peer=c"))
    [line] = out.lines()
    assert line.count("peer=c") == 1 and ("'b  peer=c'" in line or '"b  peer=c"' in line)


def test_a_text_line_is_for_people() -> None:
    out = Output(as_json=False)
    out.log.info("edge stream opened", extra=fields(edge="edge-2"))
    [line] = out.lines()
    assert line[8] == "." and line.endswith("info    edge-1: edge stream opened  edge=edge-2")


@pytest.mark.parametrize("as_json", [True, False])
def test_a_stack_is_kept(as_json: bool) -> None:
    out = Output(as_json)
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        out.log.exception("it broke")
    assert "RuntimeError: boom" in out.stream.getvalue()
    assert not as_json or "Traceback" in out.objects()[0]["exception"]


def test_a_value_that_is_no_json_is_shown_and_loses_no_line() -> None:
    out = Output(as_json=True)
    out.log.info("x", extra=fields(value=object()))
    assert out.objects()[0]["value"].startswith("<object")


def test_a_repeated_message_is_held_back_and_the_rest_is_counted(clock: list[int]) -> None:
    out = Output(as_json=True)
    for number in range(BURST + 7):
        out.log.warning("flood", extra=fields(number=number))
    out.log.warning("another message")
    assert [line["message"] for line in out.objects()] == ["flood"] * BURST + ["another message"]
    clock[0] += WINDOW_MS
    out.log.warning("flood", extra=fields(number=99))
    assert out.objects()[-1]["number"] == 99
    assert out.objects()[-1]["suppressed"] == 7
    clock[0] += WINDOW_MS
    out.log.warning("flood")
    assert "suppressed" not in out.objects()[-1]


def test_messages_that_are_no_constants_do_not_make_memory_grow(clock: list[int]) -> None:
    limit = logs.RateLimit()
    for number in range(MAX_MESSAGES * 3):
        limit.filter(logging.LogRecord("n", 20, "p", 1, f"message {number}", None, None))
    assert len(limit._windows) <= MAX_MESSAGES


def test_configure_writes_to_stderr_alone_from_the_level_set(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(ServiceSettings(id="e", log_format="json", log_level="warning"), "edge")
    configure(ServiceSettings(id="e", log_format="json", log_level="warning"), "edge")
    logging.getLogger("steward.x").info("quiet")
    logging.getLogger("steward.x").warning("loud")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [json.loads(line)["message"] for line in printed.err.splitlines()] == ["loud"]


def test_auto_is_json_when_nobody_watches(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not sys.stderr.isatty()
    configure(ServiceSettings(), "edge")
    logging.getLogger("steward.x").info("hello")
    assert json.loads(capsys.readouterr().err)["message"] == "hello"


@pytest.mark.parametrize(
    "bad", [ServiceSettings(log_level="loud"), ServiceSettings(log_format="xml")]
)
def test_a_setting_that_is_not_known_is_refused(
    root_logger: logging.Logger, bad: ServiceSettings
) -> None:
    with pytest.raises(SettingsError):
        configure(bad, "edge")
