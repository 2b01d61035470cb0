"""`steward chat` as a process, against an edge on a real WebSocket."""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import jwt
import pytest

from steward.rpc.keys import USER_KEY, load_or_create_key
from steward.testing.command import STEWARD

pytestmark = pytest.mark.asyncio

Edge = Any  # ScriptedEdge of conftest.py

STEPS = [
    ("agent_thinking", {"thought": "I need the sales table.", "delta": False}),
    (
        "tool_executing",
        {"tool_call_id": "c1", "tool_name": "sql", "arguments": {"query": "select 1"}},
    ),
    (
        "tool_completed",
        {
            "tool_call_id": "c1",
            "tool_name": "sql",
            "success": True,
            "result": [["South", 41]],
            "duration_ms": 4,
        },
    ),
]


async def start(*args: str, stdin: bytes | None = None) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        *STEWARD,
        "chat",
        *args,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert process.stdin is not None
    process.stdin.write(stdin or b"")
    process.stdin.close()
    return process


async def chat(*args: str, stdin: bytes | None = None) -> tuple[int, str, str]:
    process = await start(*args, stdin=stdin)
    async with asyncio.timeout(20):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def cluster(data: Path, url: str) -> None:
    """What `steward up` leaves for others; our own process is the supervisor that lives."""
    process = {"role": "edge", "id": "edge-0", "pid": os.getpid()}
    process |= {"grpc": None, "http": url.removeprefix("http://"), "ops": None}
    file = {"pid": os.getpid(), "url": url, "processes": [process]}
    (data / "cluster.json").write_text(json.dumps(file))


async def test_chat_shows_the_five_events_and_the_answer(edge: Edge, tmp_path: Path) -> None:
    edge.tokens, edge.steps = set(), STEPS
    cluster(tmp_path, edge.url)
    code, out, err = await chat("--data", str(tmp_path), "--user", "alice", "Which region?")
    assert (code, err) == (0, "")
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines == [
        "started   demo",
        "thinking  I need the sales table.",
        'tool      sql(query="select 1")',
        'result    [["South", 41]]  (4 ms)',
        "South sold the most.",
        "run r1  success  3 ms  events 1 to 9",
    ]
    key = load_or_create_key(tmp_path, USER_KEY).public_key()
    claims = jwt.decode(edge.upgrades[0].token, key, ["EdDSA"], audience="steward")
    assert (claims["sub"], claims.get("tid", "default")) == ("alice", "default")


async def test_chat_json_prints_the_events_as_they_came(edge: Edge) -> None:
    edge.steps = STEPS
    code, out, _ = await chat(
        "--url", edge.url, "--token", "good", "--json", "--thread", "t2", "--agent", "demo", "hi"
    )
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == edge.events[1:]
    message = await edge.wait_for("user_message")
    assert (message["content"], message["thread_id"], message["agent"]) == ("hi", "t2", "demo")


async def test_chat_takes_a_question_a_line(edge: Edge) -> None:
    code, out, err = await chat("--url", edge.url, "--token", "good", stdin=b"one\n\ntwo")
    assert (code, err) == (0, "")
    assert out.count("South sold the most.") == 2
    asked = [f["content"] for f in edge.received if f["type"] == "user_message"]
    assert asked == ["one", "two"]
    assert len(edge.upgrades) == 1


async def test_a_failed_run_is_exit_code_1(edge: Edge) -> None:
    edge.outcome = {"outcome": "failed", "error": {"type": "ValueError", "message": "no table"}}
    code, out, _ = await chat("--url", edge.url, "--token", "good", "hi")
    assert code == 1
    assert "ValueError: no table" in out


async def test_a_refused_message_is_exit_code_1(edge: Edge) -> None:
    code, out, err = await chat("--url", edge.url, "--token", "good", "refuse me")
    assert (code, out, err) == (1, "", "steward: RATE_LIMITED: slower\n")


async def test_a_bad_token_is_exit_code_1(edge: Edge) -> None:
    code, _, err = await chat("--url", edge.url, "--token", "bad", "hi")
    assert (code, err) == (1, "steward: TOKEN_EXPIRED: the token expired\n")


async def test_no_cluster_is_exit_code_2(tmp_path: Path) -> None:
    code, out, err = await chat("--data", str(tmp_path), "--user", "alice", "hi")
    assert (code, out) == (2, "")
    assert "steward up" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [
        ("hi",),
        ("--user", "alice", "--token", "good", "hi"),
        ("--user", "alice", "--url", "http://127.0.0.1:1", " "),
        ("--user", "a\nb", "--url", "http://127.0.0.1:1", "hi"),
        ("--nonsense",),
    ],
)
async def test_wrong_use_is_one_line_and_exit_code_2(tmp_path: Path, args: tuple[str, ...]) -> None:
    code, out, err = await chat("--data", str(tmp_path), *args)
    assert (code, out, err.count("\n")) == (2, "", 1)


async def test_control_characters_of_an_answer_do_not_reach_the_terminal(edge: Edge) -> None:
    edge.answer = ["\x1b]0;owned\x07", "done\x9b2J"]
    code, out, _ = await chat("--url", edge.url, "--token", "good", "hi")
    assert code == 0
    assert "done" in out and not any(c in out for c in "\x1b\x07\x9b")


async def test_interrupt_stops_the_run_and_then_chat(edge: Edge) -> None:
    edge.hold_runs = True
    process = await start("--url", edge.url, "--token", "good", "hi")
    assert process.stdout is not None
    async with asyncio.timeout(20):
        while b"thinking" not in await process.stdout.readline():
            pass
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
    assert (await edge.wait_for("cancel"))["run_id"] == "r1"
    assert process.returncode == 1
    assert b"run r1  cancelled" in out
    assert err == b"steward: stopping the run; once more to leave\n"
