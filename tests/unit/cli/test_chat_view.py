"""What `steward chat` prints of a run."""

import io
from typing import Any

import pytest

from steward.cli.chat_view import RunView
from steward.client.events import Event


def event(type: str, **data: Any) -> Event:
    return Event(type, "s", 1, 1, "e", "main", "r", "demo", "", "", "", data, "", 1)


def shown(*events: Event) -> str:
    out = io.StringIO()
    view = RunView(out)
    for each in events:
        view.show(each)
    return out.getvalue()


def said(*deltas: str) -> list[Event]:
    return [event("agent_text", message_id="r.m1", delta=delta) for delta in deltas]


@pytest.mark.parametrize(
    ("deltas", "response", "printed"),
    [
        ((), "Done.", "Done.\n"),
        (("Rome ", "weighs 400 g. "), "Rome weighs 400 g. ", "Rome weighs 400 g. \n"),
        (("Rome weighs 400 g. ",), "Done.", "Rome weighs 400 g. \nDone.\n"),
        (("Rome ",), "Rome weighs 400 g.", "Rome weighs 400 g.\n"),
        (("Rome",), "", "Rome\n"),
    ],
)
def test_a_response_is_shown_once_whether_it_was_said_before_or_not(
    deltas: tuple[str, ...], response: str, printed: str
) -> None:
    end = event("agent_completed", outcome="success", response=response)
    assert shown(*said(*deltas), end) == printed


def test_a_response_that_repeats_the_last_message_is_not_shown_again() -> None:
    events = [
        event("agent_text", message_id="r.m1", delta="Looking. "),
        event("agent_thinking", thought="Found it", delta=False),
        event("agent_text", message_id="r.m2", delta="It is 400 g."),
        event("agent_completed", outcome="success", response="It is 400 g."),
    ]
    assert shown(*events).count("It is 400 g.") == 1


def test_control_characters_of_an_agent_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in shown(*said("\x1b[2J", "plain"))
