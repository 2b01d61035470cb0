"""Logs of a real cluster: JSON where nobody looks at a terminal, and nothing that users write."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from steward import Client
from steward.testing.local_cluster import LocalCluster

AGENT = Path(__file__).parent / "log_agents.py"
CANARY = "canary-7f3a9c51"

StartCluster = Callable[..., LocalCluster]
TokenOf = Callable[[LocalCluster, str], str]


@pytest.mark.asyncio
async def test_logs_are_json_and_hold_nothing_that_a_user_wrote(
    start_cluster: StartCluster, token_of: TokenOf
) -> None:
    levels = {
        f"STEWARD_{role}_LOG_LEVEL": "debug"
        for role in ("REGISTRY", "AUTH", "LOG", "AGENT", "EDGE")
    }
    cluster = start_cluster(f"--agent={AGENT}:leaky", environ=levels).wait_ready()
    async with Client(cluster.url, token=token_of(cluster, "sam")) as client:
        run = await client.ask(CANARY, agent="leaky")
        seen = [event async for event in run]
    assert CANARY in str(seen), "the user's own stream has it"
    cluster.kill("node-0")
    cluster.kill("node-1")
    cluster.wait_healed()
    assert cluster.stop(signal.SIGTERM) == 0

    lines = [
        line
        for file in sorted((cluster.data / "logs").glob("*.log*"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    assert CANARY not in "\n".join(lines)
    said = [json.loads(line) for line in lines]
    assert all({"time", "level", "service", "id", "message"} <= set(one) for one in said)
    assert any(one["message"] == "an agent's own line" for one in said)
    failures = [one for one in said if one["message"] == "a run failed"]
    assert len(failures) == 1
    assert len(failures[0]["trace_id"]) == 32
    assert failures[0]["error"] == "RuntimeError"
    assert all(one["do"] for one in said if one["level"] == "error")
