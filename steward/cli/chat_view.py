"""How `steward chat` shows a run on a terminal: a line for each event, the answer as it streams.

Text from agents and tools is shown without its control characters: a terminal takes
them for commands.
"""

import json
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from steward.client.events import Event
from steward.client.run import Run

LABEL_WIDTH = 10
MOST_SHOWN = 240


def printable(text: str) -> str:
    """`text` without control characters, line ends and tabs excepted."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)


def short(value: Any) -> str:
    """A JSON value on one line, cut where it gets long."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(printable(text).split())
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."


def call(data: Mapping[str, Any]) -> str:
    """`sql(query="select 1")`: a tool call as people write it."""
    arguments = data.get("arguments")
    if not isinstance(arguments, dict):
        arguments = {}
    inside = ", ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in arguments.items())
    return short(f"{data.get('tool_name', '')}({inside})")


def milliseconds(value: Any) -> str:
    """A duration as people read it."""
    if not isinstance(value, int | float):
        return ""
    return f"{value:.0f} ms" if value < 10_000 else f"{value / 1000:.1f} s"


class RunView:
    """Shows the events of one run, in order. `file` is where results go."""

    def __init__(self, file: TextIO) -> None:
        self._console = Console(file=file, highlight=False, soft_wrap=True)
        self._inline = ""  # What the last line is being continued with: a style, or nothing.
        self._said = ""
        self._message = ("", "")  # The last message: its id, and its text so far.

    def show(self, event: Event) -> None:
        """Show one event; those without a form of their own are left out."""
        data = event.data
        match event.type:
            case "agent_started":
                again = f" (attempt {data['attempt']})" if data.get("attempt", 1) != 1 else ""
                self._line("started", f"{event.agent}{again}", "dim")
            case "agent_thinking":
                self._think(data)
            case "tool_executing":
                purpose = f"  ({short(data['purpose'])})" if data.get("purpose") else ""
                self._line("tool", call(data) + purpose, "cyan")
            case "tool_completed":
                self._tool_end(data)
            case "agent_text":
                self._say(str(data.get("message_id", "")), str(data.get("delta", "")))
            case "progress":
                share = data.get("fraction")
                percent = f"{share:.0%} " if isinstance(share, int | float) else ""
                self._line("progress", f"{percent}{short(data.get('label', ''))}", "dim")
            case "custom":
                self._line(short(data.get("name", "")), short(data.get("value")), "dim")
            case "input_requested":
                self._line("asks", short(data.get("prompt", "")), "yellow")
            case "agent_completed":
                self._end(data)

    def summary(self, run: Run) -> None:
        """The last line: which run, how it ended, how long it took, where it is in the stream."""
        end = run.completed
        if end is None or run.accepted is None:
            return
        style = "green" if run.outcome == "success" else "red"
        line = Text.assemble(
            (f"run {run.run_id}", "dim"),
            ("  ", ""),
            (run.outcome, style),
            (f"  {milliseconds(end.data.get('duration_ms'))}", "dim"),
            (f"  events {run.accepted.sequence} to {end.sequence}", "dim"),
        )
        self._break()
        self._console.print(line)

    def _think(self, data: Mapping[str, Any]) -> None:
        thought = str(data.get("thought", ""))
        if data.get("delta"):
            if self._inline != "dim italic":
                self._break()
                self._label("thinking", "dim")
            self._stream(thought, "dim italic")
            return
        step = ""
        if "step" in data:
            total = f"/{data['total_steps']}" if "total_steps" in data else ""
            step = f"  ({data['step']}{total})"
        self._line("thinking", short(thought) + step, "dim italic")

    def _tool_end(self, data: Mapping[str, Any]) -> None:
        took = milliseconds(data.get("duration_ms"))
        if data.get("success"):
            self._line("result", f"{short(data.get('result'))}  ({took})", "green")
        else:
            self._line("failed", f"{_error(data.get('error'))}  ({took})", "red")

    def _say(self, message_id: str, delta: str) -> None:
        before = self._message[1] if message_id == self._message[0] else ""
        self._message = (message_id, before + delta)
        self._said += delta
        self._stream(delta, "bold")

    def _end(self, data: Mapping[str, Any]) -> None:
        response = str(data.get("response", ""))
        # What an agent returns may repeat what it said, continue it, or be another text.
        if response.strip() not in ("", self._said.strip(), self._message[1].strip()):
            if not response.startswith(self._said):
                self._break()
                self._said = ""
            self._stream(response.removeprefix(self._said), "bold")
        self._break()
        if "result" in data:
            self._line("result", short(data["result"]), "green")
        if "error" in data:
            self._line("error", _error(data["error"]), "red")

    def _line(self, label: str, text: str, style: str) -> None:
        self._break()
        self._label(label, "dim")
        self._console.print(Text(printable(text), style=style))

    def _label(self, label: str, style: str) -> None:
        self._console.print(Text(f"{label:<{LABEL_WIDTH}}", style=style), end="")

    def _stream(self, text: str, style: str) -> None:
        """Continue the running text of this style, or begin one."""
        if self._inline != style:
            self._break()
        self._inline = style
        self._console.print(Text(printable(text), style=style), end="")
        self._console.file.flush()

    def _break(self) -> None:
        if self._inline:
            self._inline = ""
            self._console.print()


def _error(error: Any) -> str:
    if not isinstance(error, dict):
        return "without a reason"
    return f"{error.get('type', 'Error')}: {short(str(error.get('message', '')))}"
