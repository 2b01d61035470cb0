"""The client's state machine does what the shared vectors say, step by step."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from steward.client import commands
from steward.client.core import ClientSession

VECTORS = json.loads(
    (Path(__file__).parents[3] / "protos/testdata/client_session.json").read_text("utf-8")
)

COMMANDS: dict[str, type] = {
    "start": commands.Start,
    "received": commands.Received,
    "closed": commands.Closed,
    "refused": commands.Refused,
    "send": commands.Send,
    "post": commands.Post,
    "ack": commands.Ack,
    "token": commands.NewToken,
    "tick": commands.Tick,
    "close": commands.Close,
}
EFFECTS: dict[type, str] = {
    commands.Open: "open",
    commands.Shut: "shut",
    commands.Write: "write",
    commands.Opened: "opened",
    commands.Deliver: "deliver",
    commands.MessageAccepted: "accepted",
    commands.MessageFailed: "failed",
    commands.Problem: "problem",
    commands.RefreshToken: "refresh_token",
    commands.Ended: "ended",
}


def command_of(step: dict[str, Any]) -> commands.Command:
    given = {key: value for key, value in step["on"].items() if key != "type"}
    if "ready" in given:
        given["frame"] = VECTORS["ready"] | given.pop("ready")
    if "event" in given:
        event = given.pop("event")
        given["frame"] = VECTORS["event"] | {"event_id": f"e{event.get('sequence')}"} | event
    made = COMMANDS[step["on"]["type"]]
    if "random" in {field.name for field in fields(made)}:
        given["random"] = step.get("random", 0.0)
    command: commands.Command = made(**given)
    return command


def as_json(effect: commands.Effect) -> dict[str, Any]:
    shown = {field.name: getattr(effect, field.name) for field in fields(effect)}
    return {"type": EFFECTS[type(effect)]} | shown


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["name"])
def test_session_follows_the_vector(case: dict[str, Any]) -> None:
    session = ClientSession(**case.get("config", {}))
    for number, step in enumerate(case["steps"]):
        where = f"step {number} at {step['at']}: {step['on']}"
        effects = [as_json(e) for e in session.handle(step["at"], command_of(step))]
        seen = [
            {key: effect.get(key) for key in expected}
            for effect, expected in zip(effects, step["effects"], strict=False)
        ]
        assert (len(effects), seen) == (len(step["effects"]), step["effects"]), (where, effects)
        for effect, expected in zip(effects, step["effects"], strict=True):
            if expected["type"] == "open":
                assert effect["after"] == expected.get("after"), where
                assert effect["stream"] == expected.get("stream", ""), where
        if "state" in step:
            assert session.state == step["state"], where
        if "deadline" in step:
            assert session.next_deadline() == step["deadline"], where
