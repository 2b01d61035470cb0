"""`steward attack`: every cheat ends as a recorded refusal; and the command is able to fail.

The tests share one cluster, but for the one that puts a breach on record.
"""

import asyncio
import json
from argparse import ArgumentParser, Namespace
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from steward.cli import attack
from steward.cli.cheats import CHEATS, Cheat, CheatWorked, Field
from steward.cli.target import target_of
from steward.testing.local_cluster import LocalCluster

RefusalsOf = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def running(start_shared: Any) -> LocalCluster:
    cluster: LocalCluster = start_shared()
    return cluster


@pytest.fixture
def cluster(running: LocalCluster, clusters_to_show: list[LocalCluster]) -> LocalCluster:
    clusters_to_show.append(running)
    return running


def test_every_cheat_is_refused_and_recorded_and_none_is_a_breach(
    cluster: LocalCluster, refusals_of: RefusalsOf
) -> None:
    before = refusals_of(cluster)
    answer = cluster.try_steward("attack", "--all")
    *lines, summary = answer.stdout.splitlines()
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert summary == f"{len(CHEATS)} of {len(CHEATS)} cheats were refused and recorded"
    assert [line.split()[:2] for line in lines] == [["refused", cheat.name] for cheat in CHEATS]

    recorded = refusals_of(cluster)[len(before) :]
    for cheat in CHEATS:
        of_it = [one for one in recorded if one["kind"] in cheat.kinds]
        assert of_it, f"{cheat.name} is not on record"
        assert all(one["evidence"] and one["reporter"] and one["time"] for one in of_it)
    victims = {one["user_id"] for one in recorded if one.get("tenant_id") == "attack"}
    assert len(victims) >= 7, "who was to be harmed is on record too"

    breaches = cluster.try_steward("violations", "--breaches")
    assert (breaches.returncode, breaches.stdout) == (0, "")
    assert breaches.stderr.endswith(" 0 breaches\n")
    # The cluster is as it was: no node of the attacker is left, and all is ready.
    status = json.loads(cluster.steward("status", "--json").stdout)
    assert sorted(node["node_id"] for node in status["nodes"]) == ["node-0", "node-1"]
    assert not any(node["draining"] for node in status["nodes"])
    assert status["breaches"] == 0 and status["refusals"] >= len(CHEATS)


def test_one_cheat_can_be_played_and_the_list_names_all(cluster: LocalCluster) -> None:
    listed = cluster.steward("attack", "--list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == [cheat.name for cheat in CHEATS]
    assert all(len(line.split()) > 3 for line in listed)
    played = cluster.steward("attack", "foreign-origin").stdout.splitlines()
    assert played[0].startswith("refused foreign-origin ")
    assert played[1:] == ["1 of 1 cheats were refused and recorded"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("no-such-cheat",), "no cheat is called 'no-such-cheat'"),
        (("foreign-origin", "no-such-cheat"), "no cheat is called 'no-such-cheat'"),
        ((), "name cheats, or say --all"),
        (("--all", "foreign-origin"), "name cheats, or say --all"),
    ],
)
def test_wrong_use_plays_nothing(cluster: LocalCluster, words: tuple[str, ...], says: str) -> None:
    answer = cluster.try_steward("attack", *words)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert says in answer.stderr and answer.stderr.count("\n") == 1


# The command can fail.


@asynccontextmanager
async def field_of(cluster: LocalCluster) -> AsyncIterator[Field]:
    async with aiohttp.ClientSession() as http:
        args = arguments(cluster.data)
        target = target_of(args)
        field = Field(target, attack.doors_of(args, target), http)
        try:
            yield field
        finally:
            await field.close()


def cheat(play: Any, *kinds: str) -> Cheat:
    return Cheat("a-cheat", play, frozenset(kinds))


@pytest.mark.asyncio
async def test_a_cheat_that_works_or_leaves_no_record_is_a_failure(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attack, "RECORDED_S", 0.2)

    async def works(field: Field) -> str:
        await field.operator.report_violation(field.registry, "foreign_user", "on record")
        raise CheatWorked("the stream grew")

    async def is_unseen(field: Field) -> str:
        return "refused"

    async def is_seen_as_something_else(field: Field) -> str:
        await field.operator.report_violation(field.registry, "foreign_user", "on record")
        return "refused"

    async def breaks(field: Field) -> str:
        raise OSError("no such host")

    async def is_refused(field: Field) -> str:
        await field.operator.report_violation(field.registry, "stale_append", "on record")
        return "fenced by 7"

    async with field_of(cluster) as field:
        # A record from before does not count for it.
        assert await attack._play(field, cheat(is_refused, "stale_append")) == (
            "",
            "fenced by 7; recorded as stale_append",
        )
        for play, says in (
            (works, "IT WORKED: the stream grew"),
            (is_unseen, "not on record as stale_append"),
            (is_seen_as_something_else, "not on record as stale_append"),
            (breaks, "could not be played: OSError: no such host"),
        ):
            trouble, _ = await attack._play(field, cheat(play, "stale_append"))
            assert says in trouble


def test_a_failure_is_exit_code_1(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def works(field: Field) -> str:
        raise CheatWorked("the stream grew")

    monkeypatch.setattr("steward.cli.cheats.CHEATS", (cheat(works, "stale_append"),))
    assert attack.run(arguments(cluster.data)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["FAILED", "a-cheat", "IT", "WORKED:", "the", "stream", "grew"]
    assert lines[1] == "0 of 1 cheats were refused and recorded"


def arguments(data: Path) -> Namespace:
    """As the command line makes them."""
    parser = ArgumentParser()
    attack.add_parser(parser.add_subparsers())
    return parser.parse_args(["attack", "--data", str(data), "--all"])


def test_a_breach_is_a_failure_of_every_command_that_looks(start_cluster: Any) -> None:
    cluster = start_cluster("--agents", "1").wait_ready()

    async def is_refused_too_late(field: Field) -> str:
        for kind in ("stale_append", "two_effective_managers"):
            await field.operator.report_violation(field.registry, kind, "seen by a test")
        return "refused"

    async def play() -> str:
        async with field_of(cluster) as field:
            return (await attack._play(field, cheat(is_refused_too_late, "stale_append")))[0]

    assert "a breach was recorded" in asyncio.run(play())
    breaches = cluster.try_steward("violations", "--breaches", "--json")
    assert breaches.returncode == 1
    (breach,) = map(json.loads, breaches.stdout.splitlines())
    assert (breach["kind"], breach["severity"]) == ("two_effective_managers", "breach")
    assert breach["evidence"] == "seen by a test"
    assert cluster.try_steward("violations").returncode == 1
    status = cluster.steward("status").stdout
    assert "1 refusals, 1 breaches: see `steward violations`" in status
