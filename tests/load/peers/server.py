"""Servers that take part in the comparison, and how they are told what to do.

A peer is a program of this folder, on a core of its own. It takes `push TURNS BURST` on
stdin (BURST frames of 200 bytes to each client, one client after the other, TURNS times, with a
turn of its event loop between), says `pushed` when it is done, sends every text back that it
gets, and ends with its stdin. The edge is told the same through its node.
"""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.load import machine
from tests.load.edge_rig import Rig

SIZE = 200
"""Bytes of a text, before what a protocol puts around it."""

TEXT = "x" * SIZE
STOP_S = 10.0


class NotMeasured(Exception):
    """A contender can't take part. Says why, in a few words."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How the client talks to a server: see client.c. `message` is what it sends for an answer."""

    path: str = "/"
    mark: str = "xxxx"
    ready: str = ""
    hello: str = ""
    message: str = TEXT


PLAIN = Dialect()
SOCKETIO = Dialect(
    path="/socket.io/?EIO=4&transport=websocket",
    mark='42["m","x',
    ready="40{",
    hello="40",
    message=f'42["m","{TEXT}"]',
)


class Server(Protocol):
    """A running server. `pid` is the process whose CPU time and memory count."""

    dialect: Dialect
    port: int

    @property
    def pid(self) -> int: ...

    def handshakes(self, count: int) -> list[str]:
        """The requests of so many clients."""
        ...

    def begin_push(self, turns: int, burst: int) -> None: ...

    def end_push(self) -> None:
        """Wait until the server has written all."""
        ...

    def close(self) -> None:
        """End it. Safe to call twice."""
        ...


class Peer:
    """A program of this folder."""

    def __init__(self, command: Sequence[str], dialect: Dialect, folder: Path) -> None:
        """Start it; its stderr is kept in `folder`. Raises NotMeasured when it fails."""
        self.dialect = dialect
        log = folder / f"{Path(command[-1]).name}.log"
        self._process = spawn([*command, TEXT], machine.two_cpus()[0], log)
        word, _, port = hear(self._process).partition(" ")
        if word != "port":
            end(self._process)
            said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise NotMeasured(f"it did not start: {said[-1]}")
        self.port = int(port)

    @property
    def pid(self) -> int:
        return self._process.pid

    def handshakes(self, count: int) -> list[str]:
        return [handshake(self.dialect.path, self.port)] * count

    def begin_push(self, turns: int, burst: int) -> None:
        tell(self._process, f"push {turns} {burst}")

    def end_push(self) -> None:
        if (said := hear(self._process)) != "pushed":
            raise AssertionError(f"a peer said {said!r} and not 'pushed'")

    def close(self) -> None:
        end(self._process)


class StewardEdge:
    """A real edge behind the stream of a node, with auth and every check on: `tests.load.edge_rig`.

    Every connection is a user of its own, so that every frame has had its user and epoch
    checked for itself. What the edge has to do for the uplink counts as its own; a peer only makes
    up what it pushes.
    """

    _head = '{"type":"ping","t":1,"more":"'
    dialect = Dialect(
        path="/v1/connect",
        mark='{"type":"text_delta"|{"type":"pong"',
        ready='{"type":"ready"',
        message=_head + "x" * (SIZE - len(_head) - 2) + '"}',
    )

    def __init__(self) -> None:
        measured, beside = machine.two_cpus()
        with _on_cpu(beside):
            self._rig = Rig()
        self.port = self._rig.port
        machine.pin(self.pid, measured)

    @property
    def pid(self) -> int:
        return self._rig.edge.pid

    def handshakes(self, count: int) -> list[str]:
        tokens = self._rig.tokens([f"user-{number}" for number in range(count)])
        return [
            handshake(self.dialect.path, self.port, f"Authorization: Bearer {token}\r\n")
            for _, token in tokens
        ]

    def begin_push(self, turns: int, burst: int) -> None:
        self._rig.tell(push=turns, burst=burst, size=SIZE)

    def end_push(self) -> None:
        self._rig.answer()

    def close(self) -> None:
        self._rig.close()


def handshake(path: str, port: int, more: str = "") -> str:
    """The request of a WebSocket; `more` are further header lines."""
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{more}\r\n"
    )


def spawn(command: Sequence[str], cpu: int, log: Path) -> "subprocess.Popen[str]":
    """Start a program that lives on one CPU and is told what to do on stdin.

    `log` gets its stderr. Raises NotMeasured.
    """
    pipe = subprocess.PIPE
    try:
        with log.open("w") as stderr, _on_cpu(cpu):
            return subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=stderr, text=True, bufsize=1
            )
    except OSError as error:
        raise NotMeasured(f"{command[0]} can't be started: {error.strerror}") from None


@contextmanager
def _on_cpu(cpu: int) -> Iterator[None]:
    """What is started within lives on this CPU."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


def tell(process: "subprocess.Popen[str]", line: str) -> None:
    """Give it a line."""
    assert process.stdin is not None
    process.stdin.write(line + "\n")


def hear(process: "subprocess.Popen[str]") -> str:
    """Its next line; empty when it has ended."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: "subprocess.Popen[str]") -> None:
    """End it by the end of its stdin, or at last by force. Safe to call twice."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
