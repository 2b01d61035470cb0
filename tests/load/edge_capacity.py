"""What one edge can do: handshakes, memory, push, inbound.

    python -m tests.load.edge_capacity [--rounds 3] [--quick]

The edge is the real process behind real gRPC (`edge_rig`): tokens are verified by auth, each user
is resolved and attached, user and epoch are checked with every delivery, and each client
checks the sequence of every event. Figures are per second of the edge's own CPU time, all its
threads, user and kernel; clients and stand-in are other processes. Comparisons with other
servers are in `tests/load/peers`, several workers in `tests.load.edge_workers`.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from tests.load import machine
from tests.load.alone import run_alone
from tests.load.edge_clients import Client, Clients
from tests.load.edge_rig import Rig
from tests.load.rows import Row

EVENT_BYTES = 200
T = TypeVar("T")
WARM_USERS = 50
SETTLED_S = 1.5
"""After the last `ready`: what handshakes leave behind is gone by then."""


def figures(rounds: int, quick: bool) -> list[Row]:
    """All rows. `quick` measures less of each, in about 10 s."""
    if quick:
        return [*_alone(1, 400, 12_000), *_memory(1_000)]
    return [*_alone(rounds, 1_000, 48_000), *_memory(10_000)]


def _alone(rounds: int, connections: int, events: int) -> Iterator[Row]:
    """One edge, round by round: connect, push, push in bursts, pings, all with the same users."""
    handshakes, verify, single, bursts, inbound = [], [], [], [], []
    with Rig() as rig, Clients(rig.port) as clients:
        _leave(rig, clients, clients.open(rig.tokens(_users(WARM_USERS, "warm"))))
        for number in range(rounds):
            tokens = rig.tokens(_users(connections, f"r{number}-"))
            auth_before = machine.cpu_seconds(rig.auth.pid)
            opened, spent = _cpu_of(rig, partial(clients.open, tokens))
            handshakes.append(connections / spent)
            verify.append((machine.cpu_seconds(rig.auth.pid) - auth_before) * 1000 / connections)
            single.append(_push(rig, clients, events, 1))
            bursts.append(_push(rig, clients, events * 4, 8))
            inbound.append(_pings(rig, clients, events))
            if number + 1 < rounds:
                _leave(rig, clients, opened)
        rig.check()
    yield Row("edge: handshakes to `ready`, token verified", "/CPU-s", handshakes, goal=1500)
    yield Row("auth: CPU per token", "ms", verify, lower_is_better=True)
    what = f"edge: push to {connections:,} connections, {EVENT_BYTES}-byte events"
    yield Row(f"{what}, one each", "/CPU-s", single)
    yield Row(f"{what}, eight each", "/CPU-s", bursts)
    yield Row("edge: client messages (ping, pong)", "/CPU-s", inbound)


def _memory(connections: int) -> Iterator[Row]:
    """RSS per idle connection, each of a user of its own and attached."""
    with Rig() as rig, Clients(rig.port) as clients:
        clients.open(rig.tokens(_users(WARM_USERS, "warm")))
        time.sleep(SETTLED_S)
        before = rig.edge_kib()
        clients.open(rig.tokens(_users(connections, "m")))
        time.sleep(SETTLED_S)
        each = (rig.edge_kib() - before) / connections
        attached = rig.ask(ask=1)["attached"]
        assert attached == connections + WARM_USERS, attached
        rig.check()
    what = f"edge: memory per idle connection, {connections:,} of them"
    yield Row(what, "KiB", [each], goal=8, lower_is_better=True)


def _push(rig: Rig, clients: Clients, events: int, burst: int) -> float:
    """Events per CPU second of a push to all that are attached."""
    rounds = max(events // len(clients) // burst, 1)
    count = rounds * burst * len(clients)

    def push() -> None:
        rig.tell(push=rounds, burst=burst, size=EVENT_BYTES)
        clients.read(count)

    _, spent = _cpu_of(rig, push)
    pushed = rig.answer()["pushed"]
    assert pushed == count, (pushed, count)
    return count / spent


def _pings(rig: Rig, clients: Clients, messages: int) -> float:
    each = max(messages // len(clients), 1)
    ping = b'{"type":"ping","t":1,"note":"'.ljust(EVENT_BYTES - 2, b"x") + b'"}'
    _, spent = _cpu_of(rig, lambda: clients.ping(ping, each))
    return each * len(clients) / spent


def _leave(rig: Rig, clients: Clients, opened: list[Client]) -> None:
    """Close, and wait until the stand has heard that these users are gone."""
    clients.leave(opened)
    deadline = time.monotonic() + 30
    while rig.ask(ask=1)["attached"] > len(clients):
        assert time.monotonic() < deadline, "the edge did not detach those who left"
        time.sleep(0.2)


def _cpu_of(rig: Rig, work: Callable[[], T]) -> tuple[T, float]:
    with rig.cpu() as spent:
        result = work()
    return result, spent()


def _users(count: int, prefix: str) -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


if __name__ == "__main__":
    run_alone(figures, __doc__)
