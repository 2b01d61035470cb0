"""The bundled agent resumes wherever it is cut."""

from collections.abc import Callable
from typing import Any

import pytest

from agent_service.agents.demo import demo

Tell = Callable[..., Any]

QUESTIONS = [
    "Compare tents and stoves",
    "What share of revenue came from South?",
    "What is 9 ** 9 ** 9 ** 9?",
    "What is 17 * (3 + 4)?",
    "What is 3000000 days after 2026-01-01?",
    "Hello",
]


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_demo_cut_at_any_verb_gives_the_same_answer(tell: Tell, question: str) -> None:
    whole = tell(demo, content=question).attempt()
    assert whole.end["outcome"] == "success" and whole.said
    for cut in range(whole.committed):
        story = tell(demo, content=question).told([cut])
        assert story.events == whole.events and story.end == whole.end, f"cut at {cut}"


def test_the_demo_looks_at_the_clock_once(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1, 1000))

    def now() -> dict[str, str]:
        return {"date": f"2026-01-{next(ticks):02}", "time": "10:00:00", "weekday": "Monday"}

    monkeypatch.setattr("agent_service.agents.clock.now", now)
    story = tell(demo, content="What date is it today?")
    whole = story.attempt(6).attempt()
    seen = [data["result"]["date"] for _, data in whole.of("tool_completed")]
    assert seen == ["2026-01-01"] and "2026-01-01" in whole.end["response"] == whole.said
