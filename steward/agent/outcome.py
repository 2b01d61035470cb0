"""What became of a run, as the data of `agent_completed` (without `duration_ms`).

A returned str is the response; a dict is the result, with all text said as response;
None means all text said. Anything else, and a dict that is not JSON, is the author's
mistake and fails the run with TypeError.
"""

from dataclasses import dataclass
from typing import Any

import orjson

from steward.agent.values import MAX_EVENT_BYTES, clean_text, describe_error, encode
from steward.model.verbs import Outcome


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """`data` is the JSON object of the event."""

    outcome: Outcome
    data: bytes


def succeeded(returned: Any, said: str) -> RunOutcome:
    """The outcome of an agent that returned. Raises TypeError, ValueError if that can't be kept."""
    if returned is None:
        return _outcome(Outcome.SUCCESS, said)
    if isinstance(returned, str):
        response = clean_text(returned)
        if len(response.encode()) > MAX_EVENT_BYTES:
            raise ValueError(f"the response of a run is at most {MAX_EVENT_BYTES} bytes of text")
        return _outcome(Outcome.SUCCESS, response)
    if isinstance(returned, dict):
        result = encode(returned, "the result of the agent")
        return _outcome(Outcome.SUCCESS, said, result=orjson.Fragment(result))
    raise TypeError(f"an agent returns str, dict or None, not {type(returned).__name__}")


def failed(error: BaseException, said: str) -> RunOutcome:
    """The outcome of an agent that raised."""
    return _outcome(Outcome.FAILED, said, error=describe_error(error))


def _outcome(outcome: Outcome, response: str, **more: Any) -> RunOutcome:
    data = {"outcome": outcome.value, "response": response, **more}
    return RunOutcome(outcome, orjson.dumps(data))
