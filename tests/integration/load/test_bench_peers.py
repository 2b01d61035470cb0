"""The comparison with other servers, short: everybody takes part or is said to be missing."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.load import bench_peers
from tests.load.bench_peers import CASES, GOALS, LIMIT, PEERS, STEWARD, figures, starters
from tests.load.peers.contender import Contender, compiled
from tests.load.peers.server import PLAIN, Peer

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no C compiler")


@needs_gcc
def test_who_is_not_installed_is_in_the_table_as_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_peers, "PYTHON", tmp_path / "nothing")
    monkeypatch.setattr(bench_peers, "NODE_PACKAGES", tmp_path / "nothing")
    monkeypatch.setattr(bench_peers, "QUICK_SPAN_S", 0.02)
    rows = {row.what: row for row in figures(1, True, connections=40)}
    for case in (*CASES, "handshakes", "memory"):
        for name in starters(tmp_path):
            row = rows[f"{case}: {name}"]
            if name in (STEWARD, LIMIT):
                assert row.median > 0
            else:
                assert "make peers" in row.missing and not row.values
    for case, goals in GOALS.items():
        for name, goal in goals.items():
            row = rows[f"{case}: an edge, as a multiple of {name}"]
            assert row.goal == goal
            assert bool(row.values) == (name == LIMIT)


def test_without_a_compiler_nothing_is_measured_and_every_case_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    rows = figures(1, True, connections=10)
    assert len(rows) == len(CASES)
    assert all("gcc" in row.missing for row in rows)


@pytest.fixture
def sender(tmp_path: Path) -> Iterator[Callable[[], Contender]]:
    """Starts the C sender with 20 connections."""
    started: list[Contender] = []

    def start() -> Contender:
        server = Peer([str(compiled(tmp_path, PEERS / "sender.c"))], PLAIN, tmp_path)
        client = compiled(tmp_path, PEERS / "client.c")
        started.append(Contender("C", server, client, tmp_path, 20))
        started[-1].connect()
        return started[-1]

    yield start
    for contender in started:
        contender.close()


@needs_gcc
def test_a_server_is_measured_by_the_cpu_time_it_uses(sender: Callable[[], Contender]) -> None:
    contender = sender()
    assert contender.push(1, 0.01) > 1000
    # Eight frames in one write are much cheaper, on any machine.
    assert contender.push(8, 0.01) > contender.push(1, 0.01)
    assert contender.echo(0.01) > 1000


@needs_gcc
def test_a_sequence_that_comes_twice_ends_the_comparison(
    sender: Callable[[], Contender], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.load.peers.server.TEXT", 'xxxx"sequence":5,')
    contender = sender()
    with pytest.raises(AssertionError, match="5 came after 5"):
        contender.push(1, 0.01)
