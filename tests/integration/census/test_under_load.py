"""The part under load against real processes: kept as it is, red with a gap in a stream."""

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from steward.cli import cheats
from steward.cli.cluster_file import CLUSTER_NAME, read_cluster
from steward.cli.report.load_part import cheats_line, streams_line
from steward.cli.target import Target
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.testing.local_cluster import LocalCluster

NTH = 7


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    directory = tmp_path_factory.mktemp("load")
    cluster = LocalCluster.start(directory, "--agent", "steward.load.agent:load")
    try:
        yield cluster.wait_ready()
    finally:
        cluster.end()


@pytest.fixture
def target(cluster: LocalCluster) -> Target:
    local = read_cluster(cluster.data)
    key = load_or_create_key(cluster.data, CONTROL_KEY)
    return Target(local.address("registry"), CLUSTER_NAME, key, cluster.data, local)


def test_a_running_cluster_keeps_every_line_and_writes_its_page(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    words = ("--no-code", "--json", "--load", "--html", str(page))
    answer = cluster.try_steward("compliance", *words)
    said = json.loads(answer.stdout)
    verdicts = {line["id"]: line["verdict"] for line in said["lines"]}
    # A cluster that has just begun may have taken no census by itself yet.
    verdicts.pop("census-runs")
    assert set(verdicts.values()) == {"kept"}, said
    assert answer.returncode == 0
    text = page.read_text()
    assert "http://" not in text.replace(said["registry"], "") and "src=" not in text
    assert all(f'id="{line}"' in text for line in verdicts)


@pytest.mark.asyncio
async def test_a_gap_in_a_stream_turns_its_line_red(target: Target) -> None:
    """Between clients and the edge is somebody who keeps one event back."""
    assert target.local is not None
    edge = next(e.http for e in target.local.processes if e.http is not None)

    async def between(request: web.Request) -> web.WebSocketResponse:
        asked = request.headers.get("Sec-WebSocket-Protocol", "")
        protocols = [name.strip() for name in asked.split(",") if name.strip()]
        ours = web.WebSocketResponse(protocols=protocols[:1])
        await ours.prepare(request)
        kept = {"Authorization": request.headers.get("Authorization", "")}
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(
                f"http://{edge}{request.rel_url}", protocols=protocols, headers=kept
            ) as theirs,
        ):

            async def up() -> None:
                async for message in ours:
                    await theirs.send_str(message.data)

            sending = asyncio.create_task(up())
            events = 0
            async for message in theirs:
                events += '"name":"load"' in message.data
                if events >= NTH:
                    events = -1_000_000
                    continue
                await ours.send_str(message.data)
            sending.cancel()
        return ours

    app = web.Application()
    app.router.add_get("/{path:.*}", between)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        processes = tuple(
            replace(e, http=f"{host}:{port}") if e.http is not None else e
            for e in target.local.processes
        )
        through = replace(target, local=replace(target.local, processes=processes))
        line = await asyncio.to_thread(streams_line, through)
    finally:
        await runner.cleanup()
    assert line.verdict == "broken", line
    assert re.fullmatch(r"load-\d+ got \d+ after \d+", line.evidence[0]), line


@pytest.mark.asyncio
async def test_a_cheat_that_works_or_leaves_no_record_turns_its_line_red(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def works(_: cheats.Field) -> str:
        """Nothing stops it."""
        raise cheats.CheatWorked("planted")

    async def leaves_nothing(_: cheats.Field) -> str:
        """It is refused, and nobody writes it down."""
        return "refused by nobody"

    planted = (
        cheats.Cheat("works", works, frozenset({"stale_seal"})),
        cheats.Cheat("leaves-nothing", leaves_nothing, frozenset({"foreign_release"})),
    )
    monkeypatch.setattr(cheats, "CHEATS", planted)
    line = await cheats_line(target)
    assert line.verdict == "broken"
    assert line.evidence[:3] == (
        "0 of 2 cheats were refused and recorded",
        "works: IT WORKED: planted",
        "leaves-nothing: refused (refused by nobody), but not on record as foreign_release",
    )
