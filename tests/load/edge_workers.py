"""Do workers add up? `edge --workers N`, each worker with the same small part of a core.

    python -m tests.load.edge_workers [--rounds 3] [--quick]

On a machine with two CPUs, two edges and what loads them would fight for the CPUs, and the figure
would be of the fight. So each worker gets a fixed budget of CPU time (a cgroup of its own with a
quota), small enough that the load beside it never lacks any: what N workers push can then be
compared with what one pushes. That they share nothing shows in the other figures: CPU per event
stays, and the kernel spreads connections evenly (SO_REUSEPORT). Tokens, users and epochs are
checked as anywhere, and the client (client.c) checks every sequence.

Needs the right to make cgroups; without it the budget's rows are not measured.
"""

import os
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.load import machine
from tests.load.alone import run_alone
from tests.load.edge_rig import Rig
from tests.load.peers.contender import compiled
from tests.load.peers.server import StewardEdge, end, handshake, hear, spawn, tell
from tests.load.rows import Row

WORKERS, WORKERS_QUICK = (1, 2, 4), (1, 2)
CONNECTIONS, CONNECTIONS_QUICK = 1_000, 400
AT_ONCE = 64
SIZE = 200
TURNS = 4
"""Events per connection in one order; the next order waits until all of them have come."""

SPAN_S, SPAN_QUICK_S = 3.0, 1.0
BUDGET = 0.10
"""Of a core, for each worker."""

PERIOD_US = 10_000
LINEAR = 0.85
EVEN = 1.3
CPU_GROUPS = Path("/sys/fs/cgroup/cpu")
UNIFIED_GROUPS = Path("/sys/fs/cgroup")
PEERS = Path(__file__).parent / "peers"


@dataclass(slots=True)
class Found:
    """What was measured with so many workers, round by round."""

    per_cpu_s: list[float] = field(default_factory=list)
    within_budget: list[float] = field(default_factory=list)
    fullest: list[float] = field(default_factory=list)


def figures(rounds: int, quick: bool) -> list[Row]:
    """Rows for `make bench`."""
    numbers = WORKERS_QUICK if quick else WORKERS
    connections = CONNECTIONS_QUICK if quick else CONNECTIONS
    span_s = SPAN_QUICK_S if quick else SPAN_S
    found = {number: Found() for number in numbers}
    why = ""
    with tempfile.TemporaryDirectory(prefix="steward-workers-") as folder, ExitStack() as stack:
        client = compiled(Path(folder), PEERS / "client.c")
        crowds = {
            number: stack.enter_context(_crowd(number, connections, client)) for number in numbers
        }
        for number, crowd in crowds.items():
            found[number].fullest.append(max(crowd.shares()) * number / connections)
        for _ in range(rounds):
            for number, crowd in crowds.items():
                found[number].per_cpu_s.append(crowd.push(span_s / 2)[1])
        try:
            for crowd in crowds.values():
                stack.enter_context(_budgets(crowd.workers))
        except OSError as error:
            why = f"no cgroup can be made: {error.strerror}"
        for _ in range(0 if why else rounds):
            for number, crowd in crowds.items():
                found[number].within_budget.append(crowd.push(span_s)[0])
    return list(_rows(found, connections, why))


def _rows(found: dict[int, Found], connections: int, why: str) -> Iterator[Row]:
    one = found[1]
    each = f"each with {BUDGET:.0%} of a core"
    for number, seen in found.items():
        what = f"edge --workers {number}, {each}: push to {connections:,} connections"
        yield Row(what, "/s", seen.within_budget, missing=why)
    for number, seen in found.items():
        if number == 1:
            continue
        pairs = zip(seen.within_budget, one.within_budget, strict=True)
        what = f"edge --workers {number}, {each}: as a multiple of one worker"
        goal = LINEAR * number
        yield Row(what, "times", [many / few for many, few in pairs], goal, missing=why)
        pairs = zip(seen.per_cpu_s, one.per_cpu_s, strict=True)
        what = f"edge --workers {number}: events per CPU second, to those of one worker"
        yield Row(what, "times", [many / few for many, few in pairs], LINEAR)
        what = f"edge --workers {number}: connections of the fullest, to an even share"
        yield Row(what, "times", seen.fullest, EVEN, lower_is_better=True)


class _Crowd:
    """One edge with its workers, and its clients."""

    def __init__(self, rig: Rig, workers: Sequence[int], client: Path, connections: int) -> None:
        self.workers = workers
        self._rig = rig
        self._connections = connections
        requests = rig.data / "handshakes"
        tokens = rig.tokens([f"user-{number}" for number in range(connections)])
        path, how = StewardEdge.dialect.path, StewardEdge.dialect
        texts = [
            handshake(path, rig.port, f"Authorization: Bearer {token}\r\n") for _, token in tokens
        ]
        requests.write_bytes(b"".join(text.encode() + b"\0" for text in texts))
        options = [str(rig.port), str(requests), how.mark, how.ready, how.hello]
        log = rig.data / "client.log"
        self._client = spawn([str(client), *options], machine.two_cpus()[1], log)
        os.sched_setaffinity(self._client.pid, os.sched_getaffinity(0))
        tell(self._client, f"connect {connections} {AT_ONCE}")
        self._wait("up")

    def shares(self) -> list[int]:
        """Connections of each worker."""
        if len(self.workers) == 1:
            return [self._connections]
        ports = range(self._rig.ops + 1, self._rig.ops + 1 + len(self.workers))
        return [_connections_of(port) for port in ports]

    def push(self, span_s: float) -> tuple[float, float]:
        """Events per second of wall time, and per second of the workers' CPU time."""
        count = TURNS * self._connections
        events = 0
        before, began = self._cpu(), time.monotonic()
        while (took := time.monotonic() - began) < span_s:
            tell(self._client, f"expect {count}")
            self._rig.tell(push=TURNS, burst=1, size=SIZE)
            self._wait("got")
            self._rig.answer()
            events += count
        return events / took, events / (self._cpu() - before)

    def close(self) -> None:
        end(self._client)

    def _cpu(self) -> float:
        return sum(map(machine.cpu_seconds, self.workers))

    def _wait(self, word: str) -> None:
        said = hear(self._client)
        assert said == word, f"the client said {said or 'nothing'!r}, not {word!r}"


@contextmanager
def _crowd(number: int, connections: int, client: Path) -> Iterator[_Crowd]:
    with Rig(("--workers", str(number))) as rig:
        parent, *children = rig.edge_pids()
        assert len(children) == (number if number > 1 else 0), children
        crowd = _Crowd(rig, children or [parent], client, connections)
        try:
            yield crowd
            rig.check()
        finally:
            crowd.close()


@contextmanager
def _budgets(pids: Sequence[int]) -> Iterator[None]:
    """Each of the processes has its budget of CPU within. Raises OSError."""
    legacy = CPU_GROUPS.is_dir()
    groups: list[Path] = []
    root = CPU_GROUPS if legacy else UNIFIED_GROUPS
    home = root / "cgroup.procs"
    quota = round(BUDGET * PERIOD_US)
    try:
        for pid in pids:
            group = root / f"steward-bench-{pid}"
            group.mkdir()
            groups.append(group)
            if legacy:
                (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (group / "cpu.cfs_quota_us").write_text(str(quota))
            else:
                (group / "cpu.max").write_text(f"{quota} {PERIOD_US}")
            (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        for pid, group in zip(pids, groups, strict=False):
            home.write_text(str(pid))
            group.rmdir()


def _connections_of(ops_port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{ops_port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    name = 'steward_edge_connections{kind="websocket"}'
    return sum(int(float(line.split()[1])) for line in lines if line.startswith(name))


if __name__ == "__main__":
    run_alone(figures, __doc__)
