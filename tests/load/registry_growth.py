"""What a registry process costs when its store holds many placements.

    .venv/bin/python -m tests.load.registry_growth [--rounds 3] [--quick]

Stores of 1,000, 100,000 and 1,000,000 placements, each with its ledger, are made once, and a
registry process is started on each of them in turn. Measured: the start until it serves; resolves
of users whom it remembers; new placements; memory; idling. Then, by a process that remembers
nobody, so that each answer is read from the store: resolves, and what a node asks when an edge
attaches. The figures that have a goal compare CPU per user in the largest store with that in the
smallest, and the start. Quick: the largest has 50,000.
"""

import socket
import sqlite3
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import uvloop

from registry_service.store.schema import LEDGER
from tests.load.alone import run_alone
from tests.load.machine import resident_kib
from tests.load.registry_stand import NODES, TENANT, Cost, RegistryStand
from tests.load.rows import Row

FEW = 1_000
SIZES, SIZES_QUICK = (FEW, 100_000, 1_000_000), (FEW, 20_000)
RESOLVES, RESOLVES_QUICK = 40_960, 5_120
NEW, NEW_QUICK = 20_480, 2_560
IDLE_S, IDLE_QUICK_S = 5.0, 0.5
START_GOAL_MS = 10_000
FLAT = 1.5
REMEMBERS_NOBODY = "--cached-placements=1"
KNOWN, READ = "resolve, remembered", "resolve, read from the store"
ATTACH, PLACED = "attach, read from the store", "new placement, durable"

# The id of user n, as `user_id` makes it.
_USERS = (
    "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < :count),"
    " users AS (SELECT i, printf('%08x', i * 2654435761 % 4294967296) AS user FROM n)"
)


class Store:
    """One store, and what was measured with it, round by round."""

    def __init__(self, data: Path, size: int, address: str) -> None:
        self.data = data
        self.address = address
        self.size = size
        # The next user who is in no store yet.
        self.unused = size
        self.start_ms: list[float] = []
        self.start_cpu_ms: list[float] = []
        self.memory_mib: list[float] = []
        self.idle: list[float] = []
        self.costs: dict[str, list[Cost]] = defaultdict(list)

    async def fill(self) -> None:
        """Let the nodes join, and then put all users on them, behind the back of the registry."""
        async with RegistryStand(self.data, address=self.address) as stand:
            await stand.resolve(range(self.size, self.size + 1))
        with sqlite3.connect(self.data / "registry.db") as db:
            nodes = db.execute("SELECT node_id, node_rev, address FROM node").fetchall()
            assert len(nodes) == NODES
            (rev,) = db.execute("SELECT rev FROM meta").fetchone()
            db.execute("CREATE TEMP TABLE taker (i, node_id, node_rev, address)")
            db.executemany(
                "INSERT INTO taker VALUES (?, ?, ?, ?)",
                [(index, *node) for index, node in enumerate(nodes)],
            )
            numbers = {"count": self.size, "rev": rev + 1, "nodes": NODES, "tenant": TENANT}
            db.execute(
                f"INSERT INTO placement {_USERS} SELECT :tenant, user, :rev + users.i, node_id,"
                " node_rev, address FROM users JOIN taker ON taker.i = users.i % :nodes"
                " ORDER BY user",
                numbers,
            )
            db.execute(
                f"INSERT INTO ledger ({LEDGER}) SELECT epoch, 0, 'place', tenant, user, epoch,"
                " node_id, node_rev, 'resolve', '', '' FROM placement ORDER BY tenant, user"
            )
            db.execute("UPDATE meta SET rev = ?", (rev + self.size,))
        db.close()
        self.unused += 1
        # The first start marks the rows of the ledger.
        async with RegistryStand(self.data, address=self.address):
            pass

    async def round(self, resolves: int, new: int, idle_s: float) -> None:
        """Two starts: with the usual memory, and with none."""
        # Spread over all users, as the ids are.
        step = max(1, self.size // resolves)
        numbers = [number * step % self.size for number in range(resolves)]
        # As many users in each store, or the processor's caches would be what is compared.
        few = [number % FEW * (self.size // FEW) for number in range(4 * resolves)]
        async with RegistryStand(self.data, address=self.address) as stand:
            self.start_ms.append(stand.start_s * 1000)
            self.start_cpu_ms.append(stand.start_cpu_s * 1000)
            await stand.resolve(few)
            self.costs[KNOWN].append(await stand.resolve(few))
            self.idle.append(await stand.idle(idle_s) * 100)
            self.costs[PLACED].append(await stand.resolve(range(self.unused, self.unused + new)))
            self.unused += new
            self.memory_mib.append(resident_kib(stand.process.pid) / 1024)
        async with RegistryStand(self.data, REMEMBERS_NOBODY, address=self.address) as stand:
            self.costs[READ].append(await stand.resolve(numbers))
            cost, own = await stand.confirm(numbers)
            assert own == sum(stand.nodes[number] == "node-0" for number in numbers)
            self.costs[ATTACH].append(cost)

    def rows(self) -> list[Row]:
        of = f"{self.size:,} placements"
        rows = [
            Row(f"{of}: start", "ms", self.start_ms, START_GOAL_MS, True),
            Row(f"{of}: CPU of the start", "ms", self.start_cpu_ms, None, True),
            Row(f"{of}: memory", "MiB", self.memory_mib, None, True),
            Row(f"{of}: idle, of a core", "%", self.idle, 5, True),
        ]
        for what, costs in self.costs.items():
            rows.append(Row(f"{of}: {what}", "/s", [cost.per_second for cost in costs]))
            rows.append(Row(f"{of}: CPU of {what}", "µs", [c.cpu_us for c in costs], None, True))
        return rows


def compared(small: Store, large: Store) -> list[Row]:
    """How much more CPU one takes in the large store."""
    rows = []
    for what, costs in large.costs.items():
        ratios = [
            many.cpu_us / few.cpu_us for many, few in zip(costs, small.costs[what], strict=True)
        ]
        name = f"CPU of {what}, {large.size:,} against {small.size:,}"
        rows.append(Row(name, "x", ratios, FLAT, True))
    return rows


async def measure(folder: Path, sizes: Sequence[int], rounds: int, quick: bool) -> list[Store]:
    # Nodes whose address refuses would be fenced by a registry that starts again.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        stores = [Store(folder / str(size), size, address) for size in sizes]
        for store in stores:
            await store.fill()
        for _ in range(rounds):
            for store in stores:
                if quick:
                    await store.round(RESOLVES_QUICK, NEW_QUICK, IDLE_QUICK_S)
                else:
                    await store.round(RESOLVES, NEW, IDLE_S)
    return stores


def figures(rounds: int, quick: bool) -> list[Row]:
    """The comparisons first, then each store."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = SIZES_QUICK if quick else SIZES
        stores = uvloop.run(measure(Path(folder), sizes, rounds, quick))
    rows = compared(stores[0], stores[-1])
    for store in stores:
        rows += store.rows()
    return rows


if __name__ == "__main__":
    run_alone(figures, __doc__)
