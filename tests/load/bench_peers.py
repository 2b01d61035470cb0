"""An edge beside what people would use instead: same client, same payload, same connections.

    python -m tests.load.bench_peers [--quick] [--connections 1000]

All servers run at once and take turns, round by round, so that a ratio is of two figures that were
measured within seconds of each other. A figure is per second of the server's own CPU time (see
peers/contender.py). A peer that can't be installed or compiled is in the table as not measured.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.load.peers.contender import Contender, compiled
from tests.load.peers.server import PLAIN, SOCKETIO, Dialect, NotMeasured, Peer, Server, StewardEdge
from tests.load.rows import Row, text_table

ROOT = Path(__file__).parents[2]
PEERS = Path(__file__).parent / "peers"
NODE_PACKAGES = PEERS / "node_modules"
PYTHON = ROOT / ".venv-bench" / "bin" / "python"
CONNECTIONS = 1000
QUICK_CONNECTIONS = 250
SPAN_S, QUICK_SPAN_S = 0.5, 0.1
WARM_UP = 2
"""How many spans of each kind go before the first one that counts."""

STEWARD, LIMIT = "Steward", "C, bare `epoll` and `send`"
WS, SOCKETIO_NODE, SOCKETIO_PYTHON = "Node `ws`", "Socket.IO (Node)", "python-socketio"

CASES = ("push, 1 frame a turn", "push, 8 frames a turn", "client messages, answered")
PUSH, PUSH_8, ECHO = CASES
GOALS: Mapping[str, Mapping[str, float]] = {
    PUSH: {LIMIT: 0.70, WS: 1.0, SOCKETIO_NODE: 2.5, SOCKETIO_PYTHON: 10.0},
    PUSH_8: {LIMIT: 0.60},
    ECHO: {WS: 1.2},
}
"""How many times as fast as each of them the edge has to be."""

Found = dict[str, dict[str, list[float]]]
"""Case, then name, then a value per round."""


def starters(folder: Path) -> Mapping[str, Callable[[], Server]]:
    """How to start each contender; each raises NotMeasured when it can't take part."""

    def limit() -> Server:
        return Peer([str(compiled(folder, PEERS / "sender.c"))], PLAIN, folder)

    def node(script: str, dialect: Dialect) -> Server:
        return _with_packages("node", NODE_PACKAGES, script, dialect, folder)

    def python(script: str, dialect: Dialect) -> Server:
        return _with_packages(str(PYTHON), PYTHON, script, dialect, folder)

    return {
        STEWARD: StewardEdge,
        LIMIT: limit,
        WS: partial(node, "ws.mjs", PLAIN),
        SOCKETIO_NODE: partial(node, "socketio.mjs", SOCKETIO),
        "picows": partial(python, "picows_peer.py", PLAIN),
        "`websockets`": partial(python, "websockets_peer.py", PLAIN),
        "FastAPI on uvicorn": partial(python, "fastapi_peer.py", PLAIN),
        SOCKETIO_PYTHON: partial(python, "python_socketio_peer.py", SOCKETIO),
    }


def _with_packages(
    program: str, packages: Path, script: str, dialect: Dialect, folder: Path
) -> Server:
    if not packages.exists():
        raise NotMeasured("its packages are not here; see what `make peers` says")
    return Peer([program, str(PEERS / script)], dialect, folder)


def figures(rounds: int, quick: bool, connections: int = CONNECTIONS) -> list[Row]:
    """All of it. Without a C compiler there is no client, and nothing is measured.

    Quick: few connections, nothing warmed up.
    """
    if quick:
        connections = min(connections, QUICK_CONNECTIONS)
    found: Found = defaultdict(lambda: defaultdict(list))
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="steward-peers-") as name, ExitStack() as stack:
        folder = Path(name)
        try:
            client = compiled(folder, PEERS / "client.c")
        except NotMeasured as error:
            return [Row(f"{case}: all", "", (), missing=f"no client, {error}") for case in CASES]
        contenders = []
        for label, start in starters(folder).items():
            try:
                contender = Contender(label, start(), client, folder, connections)
            except NotMeasured as error:
                missing[label] = str(error)
                continue
            stack.callback(contender.close)
            contenders.append(contender)
        _connect(contenders, found)
        if not quick:
            _warm_up(contenders, SPAN_S)
        _measure(contenders, rounds, QUICK_SPAN_S if quick else SPAN_S, found)
        names = list(starters(folder))
    return [*_ratios(found, missing), *_absolute(found, missing, names)]


def _connect(contenders: list[Contender], found: Found) -> None:
    for contender in contenders:
        handshakes, kib = contender.connect()
        found["handshakes"][contender.name].append(handshakes)
        found["memory"][contender.name].append(kib)


def _warm_up(contenders: list[Contender], span_s: float) -> None:
    """Not counted: compilers, caches and allocators."""
    for contender in contenders:
        contender.push(1, WARM_UP * span_s)
        contender.push(8, WARM_UP * span_s / 2)
        contender.echo(WARM_UP * span_s)


def _measure(contenders: list[Contender], rounds: int, span_s: float, found: Found) -> None:
    for _ in range(rounds):
        for contender in contenders:
            found[PUSH][contender.name].append(contender.push(1, span_s))
            found[PUSH_8][contender.name].append(contender.push(8, span_s))
            found[ECHO][contender.name].append(contender.echo(span_s))


def _ratios(found: Found, missing: Mapping[str, str]) -> Iterator[Row]:
    for case, goals in GOALS.items():
        for name, goal in goals.items():
            what = f"{case}: an edge, as a multiple of {name}"
            why = missing.get(name, "")
            pairs = zip(found[case][STEWARD], found[case][name], strict=not why)
            values = [ours / theirs for ours, theirs in pairs]
            yield Row(what, "times", values, goal=goal, missing=why)


def _absolute(found: Found, missing: Mapping[str, str], names: list[str]) -> Iterator[Row]:
    units = dict.fromkeys(CASES, "/CPU s") | {"handshakes": "/CPU s", "memory": "KiB"}
    for case, unit in units.items():
        for name in names:
            what = f"{case}: {name}"
            lower = case == "memory"
            values = found[case][name]
            yield Row(what, unit, values, lower_is_better=lower, missing=missing.get(name, ""))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.bench_peers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    parser.add_argument("--quick", action="store_true", help="one short round")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    print(text_table(figures(rounds, options.quick, options.connections)))


if __name__ == "__main__":
    main()
