"""Operator's commands for a cluster that is not on this machine: an address and a key are enough.

Each runs in a directory without `cluster.json`, and so has nothing but its options or the
environment. What is refused is one line, and changes nothing.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from steward.cli.cheats import CHEATS
from steward.rpc.keys import CONTROL_KEY, USER_KEY, load_or_create_key
from steward.testing.local_cluster import STEWARD, LocalCluster, free_ports
from steward.testing.tab import many_sockets, open_tab
from steward.testing.waiting import eventually

pytestmark = pytest.mark.asyncio

TokenOf = Callable[[LocalCluster, str], str]
COMMAND_S = 60.0
AT_ONCE = 3


@pytest.fixture(scope="module")
def running(start_shared: Any) -> LocalCluster:
    cluster: LocalCluster = start_shared(edges=2)
    return cluster


@pytest.fixture
def cluster(running: LocalCluster, clusters_to_show: list[LocalCluster]) -> LocalCluster:
    clusters_to_show.append(running)
    return running


class Elsewhere:
    """A shell in an empty directory, which knows the cluster's address and key."""

    def __init__(self, cluster: LocalCluster, directory: Path) -> None:
        self.address = str(cluster.processes["registry"]["grpc"])
        self.key = str(cluster.data / "keys" / CONTROL_KEY)
        self.directory = directory

    async def steward(self, *words: str, **environ: str) -> "subprocess.CompletedProcess[str]":
        """Run a command with these words alone."""

        def run() -> "subprocess.CompletedProcess[str]":
            return subprocess.run(
                [STEWARD, *words],
                env={**os.environ, **environ},
                cwd=self.directory,
                capture_output=True,
                text=True,
                timeout=COMMAND_S,
                check=False,
            )

        return await asyncio.to_thread(run)

    async def steward_at_once(
        self, commands: Iterable[tuple[str, ...]]
    ) -> "list[subprocess.CompletedProcess[str]]":
        """Commands that change nothing, a few at a time: each takes a second to start."""
        turns = asyncio.Semaphore(AT_ONCE)

        async def one(words: tuple[str, ...]) -> "subprocess.CompletedProcess[str]":
            async with turns:
                return await self.steward(*words)

        return await asyncio.gather(*map(one, commands))

    async def operate(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """Run a command against the cluster, by its options."""
        return await self.steward(*words, "--registry", self.address, "--key-file", self.key)

    async def done(self, *words: str) -> str:
        """Run a command that has to succeed; what it printed."""
        answer = await self.operate(*words)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    async def facts(self, user: str) -> Any:
        """What no refusal may change."""
        status = json.loads(await self.done("status", "--json"))
        nodes = [(node["node_id"], node["node_rev"], node["draining"]) for node in status["nodes"]]
        return nodes, status["placements"], json.loads(await self.done("where", user, "--json"))


@pytest.fixture
def elsewhere(cluster: LocalCluster, tmp_path: Path) -> Elsewhere:
    return Elsewhere(cluster, tmp_path)


async def test_every_command_works_by_address_and_key(
    cluster: LocalCluster, elsewhere: Elsewhere, token_of: TokenOf
) -> None:
    async with many_sockets() as http:
        async with await open_tab(http, cluster.url, token_of(cluster, "ann")):
            found = json.loads(await elsewhere.done("where", "ann", "--json"))
            other = next(n for n in ("node-0", "node-1") if n != found["node_id"])
            moved = await elsewhere.done("move", "ann", other)
            assert moved.startswith(f"default/ann: {found['node_id']} -> {other} epoch ")
            assert (await elsewhere.done("where", "ann")).startswith(f"{other} epoch ")
            status = await elsewhere.done("status")
            assert "steward  " in status and "node-0" in status and "node-1" in status
            assert "pid" not in status, "there is no list of processes to read"
            assert (await elsewhere.operate("violations")).stderr.endswith(" 0 breaches\n")
            assert "default/ann evicted: epoch " in await elsewhere.done("evict", "ann")
        drained = await elsewhere.done("drain", "node-0")
        assert drained.startswith("node-0 is drained: ")
        fenced = await elsewhere.done("drain", "node-0", "--now")
        assert fenced.startswith("node-0 fenced: incarnation ")
        # `steward up` starts the fenced node again.
        await eventually(cluster.all_ready, "the node is back", 45)


async def test_the_environment_names_a_cluster_and_options_win(
    cluster: LocalCluster, elsewhere: Elsewhere, tmp_path: Path
) -> None:
    environ = {
        "STEWARD_OPERATOR_REGISTRY": elsewhere.address,
        "STEWARD_OPERATOR_KEY_FILE": elsewhere.key,
        "STEWARD_OPERATOR_CLUSTER": "steward",
    }
    answer = await elsewhere.steward("status", "--json", **environ)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["cluster"] == "steward"
    other = {**environ, "STEWARD_OPERATOR_CLUSTER": "other"}
    assert (await elsewhere.steward("status", **other)).returncode == 1
    answer = await elsewhere.steward("status", "--cluster", "steward", **other)
    assert answer.returncode == 0, answer.stderr
    # A directory that is named is meant, whatever the environment says.
    answer = await elsewhere.steward("status", "--data", str(tmp_path / "none"), **environ)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "no cluster runs on" in answer.stderr
    data = str(cluster.data)
    answer = await elsewhere.steward("status", "--json", "--data", data, **other)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["processes"]


# What is refused


@asynccontextmanager
async def settled(cluster: LocalCluster, token_of: TokenOf) -> AsyncIterator[None]:
    """A user with one connection, which is read all the time: unread, it would be ended as dead."""
    async with many_sockets() as http:
        async with await open_tab(http, cluster.url, token_of(cluster, "settled")) as tab:

            async def read() -> None:
                while True:
                    await tab.read(10 * COMMAND_S)

            reading = asyncio.create_task(read())
            yield
            assert not reading.done(), "the connection was open to the end"
            reading.cancel()
            await asyncio.wait({reading})


COMMANDS = (
    ("where", "settled"),
    ("status",),
    ("move", "settled"),
    ("drain", "node-0"),
    ("drain", "node-0", "--now"),
    ("evict", "settled"),
    ("violations",),
)


def assert_one_line(answer: "subprocess.CompletedProcess[str]", code: int, says: str) -> None:
    assert (answer.returncode, answer.stdout) == (code, ""), answer.stdout + answer.stderr
    assert answer.stderr.startswith("steward: ") and answer.stderr.count("\n") == 1, answer.stderr
    assert says in answer.stderr


async def test_a_wrong_key_cluster_or_address_is_one_line_and_changes_nothing(
    cluster: LocalCluster, elsewhere: Elsewhere, token_of: TokenOf, tmp_path: Path
) -> None:
    address = ("--registry", elsewhere.address)
    load_or_create_key(tmp_path, CONTROL_KEY)
    wrong_key = str(tmp_path / "keys" / CONTROL_KEY)
    nobody = f"127.0.0.1:{free_ports(1)}"
    no_key = "PERMISSION_DENIED: no valid role token; use the cluster's control key"
    no_cluster = "PERMISSION_DENIED: this is cluster 'steward'; check --cluster"
    no_answer = f"MANAGER_UNAVAILABLE: no answer from {nobody}: check the address"
    async with settled(cluster, token_of):
        before = await elsewhere.facts("settled")
        answers = elsewhere.steward_at_once(
            (*command, *address, "--key-file", wrong_key) for command in COMMANDS
        )
        for answer in await answers:
            assert_one_line(answer, 1, no_key)
        mine = (*address, "--key-file", elsewhere.key)
        answers = elsewhere.steward_at_once(
            (*command, *mine, "--cluster", "other") for command in COMMANDS
        )
        for answer in await answers:
            assert_one_line(answer, 1, no_cluster)
        away = ("--registry", nobody, "--key-file", elsewhere.key)
        for answer in await elsewhere.steward_at_once((*each, *away) for each in COMMANDS[:3]):
            assert_one_line(answer, 1, no_answer)
        assert await elsewhere.facts("settled") == before


async def test_a_key_that_is_none_is_wrong_use(
    cluster: LocalCluster, elsewhere: Elsewhere, tmp_path: Path
) -> None:
    address = ("--registry", elsewhere.address)
    public = tmp_path / "public.key"
    await asyncio.to_thread(shutil.copy, elsewhere.key, public)
    public.chmod(0o644)
    text = tmp_path / "text.key"
    text.write_text("not a key\n")
    text.chmod(0o600)
    for name, says in (
        (str(tmp_path / "absent.key"), "can't be read: No such file"),
        (str(public), "may be read by others"),
        (str(text), "is not a PEM private key"),
        (str(tmp_path), "can't be read: Is a directory"),
    ):
        assert_one_line(await elsewhere.steward("status", *address, "--key-file", name), 2, says)
    # Without one the message says how to name it, and none is made.
    answer = await elsewhere.steward("status", *address)
    assert_one_line(answer, 2, "--key-file, or STEWARD_OPERATOR_KEY_FILE")
    assert not (tmp_path / ".steward").exists()


async def test_another_server_than_a_registry_is_said_to_be_one(
    cluster: LocalCluster, elsewhere: Elsewhere
) -> None:
    key = ("--key-file", elsewhere.key)
    auth = cluster.processes["auth"]["grpc"]
    assert_one_line(
        await elsewhere.steward("status", "--registry", auth, *key), 1, "PERMISSION_DENIED"
    )
    edge = cluster.processes["edge-0"]["http"]
    answer = await elsewhere.steward("status", "--registry", edge, *key)
    assert_one_line(answer, 1, f"no answer from {edge}")


REFUSED = (
    (("where", "nobody"), "default/nobody is nowhere"),
    (("move", "nobody"), "NOT_FOUND: user default/nobody is on no node"),
    (("move", "settled", "node-9"), "NOT_FOUND: there is no node 'node-9'"),
    (("evict", "nobody"), "NOT_FOUND: user default/nobody is on no node"),
    (("evict", "nobody", "--cause", "\udcff\n"), "NOT_FOUND: user default/nobody"),
    (("drain", "node-9"), "NOT_FOUND: there is no node 'node-9'"),
    (("drain", "node-9", "--now"), "NOT_FOUND: there is no node 'node-9'"),
    (("where", "bad\nname"), "PROTOCOL_VIOLATION: user_id must have 1 to 128 printable"),
    (("where", "x" * 129), "PROTOCOL_VIOLATION: user_id must have 1 to 128 printable"),
    # What can't be sent at all: bytes of a shell that are no text.
    (("where", "\udcff"), "PROTOCOL_VIOLATION: user_id must have 1 to 128 printable"),
    (("evict", "settled", "--tenant", "\udcff"), "PROTOCOL_VIOLATION: tenant_id must have"),
    (("move", "settled", "\udcff"), "PROTOCOL_VIOLATION: node_id must have 1 to 128"),
    (("drain", "x" * 129), "PROTOCOL_VIOLATION: node_id must have 1 to 128 printable"),
)


async def test_what_is_not_there_and_what_is_no_id_change_nothing(
    cluster: LocalCluster, elsewhere: Elsewhere, token_of: TokenOf
) -> None:
    async with settled(cluster, token_of):
        before = await elsewhere.facts("settled")
        mine = ("--registry", elsewhere.address, "--key-file", elsewhere.key)
        answers = await elsewhere.steward_at_once((*command, *mine) for command, _ in REFUSED)
        for answer, (_, says) in zip(answers, REFUSED, strict=True):
            assert_one_line(answer, 1, says)
        assert await elsewhere.facts("settled") == before


# Connections and sequences


async def test_connections_are_counted_by_edge_and_sequences_are_read(
    cluster: LocalCluster, elsewhere: Elsewhere, token_of: TokenOf
) -> None:
    first, second = cluster.urls
    async with many_sockets() as http:
        token = token_of(cluster, "counted")
        async with (
            await open_tab(http, first, token) as tab,
            await open_tab(http, first, token),
            await open_tab(http, second, token),
            await open_tab(http, second, token_of(cluster, "other")),
        ):
            await tab.send("m1", "hello")
            while not any(event["type"] == "agent_completed" for event in tab.events):
                await tab.read(15)
            last = tab.sequence
            told = json.loads(await elsewhere.done("where", "counted", "--json"))
            assert told["connections_by_edge"] == {"edge-0": 2, "edge-1": 1}
            assert (told["connections"], told["sequence"]) == (3, last)
            text = (await elsewhere.done("where", "counted")).splitlines()[1]
            assert text == f"last sequence {last}; 3 connections: 2 at edge-0, 1 at edge-1"
            status = json.loads(await elsewhere.done("status", "--json", "--users"))
            assert status["connections_by_edge"] == {"edge-0": 2, "edge-1": 2}
            assert (status["connections"], status["edges"]) == (4, 2)
            users = {user["user_id"]: user for user in status["users"]}
            assert users["counted"]["connections_by_edge"] == told["connections_by_edge"]
            assert users["counted"]["sequence"] == last
            assert users["counted"]["epoch"] == told["epoch"]
            assert users["counted"]["node_id"] == told["node_id"]
            assert users["other"]["connections_by_edge"] == {"edge-0": 0, "edge-1": 1}
            one = json.loads(await elsewhere.done("status", "--json", "--users", "1"))
            assert len(one["users"]) == 1

    async def nobody() -> bool:
        return "no connections" in await elsewhere.done("where", "counted")

    await eventually(nobody, "the sockets are closed")


async def test_an_edge_that_does_not_answer_is_unknown_and_not_zero(
    cluster: LocalCluster, elsewhere: Elsewhere, token_of: TokenOf
) -> None:
    first, second = cluster.urls
    paused = cluster.processes["edge-1"]["pid"]
    async with many_sockets() as http:
        token = token_of(cluster, "half")
        async with await open_tab(http, first, token), await open_tab(http, second, token):
            os.kill(paused, signal.SIGSTOP)
            try:
                told = json.loads(await elsewhere.done("where", "half", "--json"))
            finally:
                os.kill(paused, signal.SIGCONT)
            assert told["connections_by_edge"] == {"edge-0": 1, "edge-1": None}
            assert told["connections"] is None

            async def answers() -> bool:
                text = await elsewhere.done("where", "half")
                return "2 connections: 1 at edge-0, 1 at edge-1" in text

            await eventually(answers, "the edge answers again")


# Cheats


async def test_cheats_are_played_against_a_cluster_elsewhere(
    cluster: LocalCluster, elsewhere: Elsewhere
) -> None:
    answer = await elsewhere.operate("attack", "--all")
    assert_one_line(answer, 2, "attack with --registry needs --log, --url, --user-key-file too")
    doors = (
        *("--log", cluster.processes["log"]["grpc"], "--url", cluster.url),
        *("--user-key-file", str(cluster.data / "keys" / USER_KEY)),
    )
    played = (await elsewhere.done("attack", "--all", *doors)).splitlines()
    assert played[-1] == f"{len(CHEATS)} of {len(CHEATS)} cheats were refused and recorded"
    wrong = await elsewhere.operate("attack", "foreign-origin", *doors, "--cluster", "other")
    assert_one_line(wrong, 1, "PERMISSION_DENIED: this is cluster 'steward'")
