"""A server with the client in client.c on the other core, and what can be measured of the pair.

Measured is the CPU time of the server's process, not how long it takes: what the client does,
and what else runs, is not in it. An order is small enough for all socket buffers, and the next
one waits until the client has counted every frame of the one before: no server meets a slow
client, and a frame that is missing ends the measurement.
"""

import subprocess
from pathlib import Path

from tests.load import machine
from tests.load.peers.server import SIZE, NotMeasured, Server, end, hear, spawn, tell

HANDSHAKES_AT_ONCE = 64
MOST_TURNS = 20
MOST_BYTES = 32_000
"""Per socket and order: must fit into its buffers."""


class Contender:
    """One server under one name. Frames and messages are per second of the server's CPU."""

    def __init__(
        self, name: str, server: Server, program: Path, folder: Path, connections: int
    ) -> None:
        self.name = name
        self._server = server
        self._connections = connections
        self._cost_s: dict[int, float] = {}
        requests = folder / f"handshakes-{server.port}"
        handshakes = server.handshakes(connections)
        requests.write_bytes(b"".join(text.encode() + b"\0" for text in handshakes))
        how = server.dialect
        options = [str(server.port), str(requests), how.mark, how.ready, how.hello]
        log = requests.with_suffix(".log")
        self._client = spawn([str(program), *options], machine.two_cpus()[1], log)

    def connect(self) -> tuple[float, float]:
        """Open all connections: handshakes per second, and KiB that each one costs."""
        # The first ones pay for code and buffers that are made on demand.
        first = self._connections // 10
        self._open(first)
        kib = machine.resident_kib(self._server.pid)
        began = self._cpu()
        rest = self._connections - first
        self._open(rest)
        took = self._cpu() - began
        return rest / took, (machine.resident_kib(self._server.pid) - kib) / rest

    def push(self, burst: int, span_s: float) -> float:
        """Frames per second, pushing for about `span_s` seconds of CPU time."""
        most = min(MOST_TURNS, MOST_BYTES // (burst * SIZE))
        if burst not in self._cost_s:
            self._cost_s[burst] = self._push(2, burst) / 2
        turns = max(round(span_s / self._cost_s[burst]), 1)
        took, left = 0.0, turns
        while left:
            took += self._push(min(most, left), burst)
            left -= min(most, left)
        self._cost_s[burst] = took / turns
        return turns * burst * self._connections / took

    def echo(self, span_s: float) -> float:
        """Client messages per second, each answered; one per connection is under way."""
        if 0 not in self._cost_s:
            self._cost_s[0] = self._echo(self._connections) / self._connections
        messages = max(round(span_s / self._cost_s[0]), self._connections)
        took = self._echo(messages)
        self._cost_s[0] = took / messages
        return messages / took

    def close(self) -> None:
        """End both. Safe to call twice."""
        self._server.close()
        end(self._client)

    def _cpu(self) -> float:
        return machine.cpu_seconds(self._server.pid)

    def _open(self, count: int) -> None:
        tell(self._client, f"connect {count} {HANDSHAKES_AT_ONCE}")
        self._wait("up")

    def _push(self, turns: int, burst: int) -> float:
        tell(self._client, f"expect {turns * burst * self._connections}")
        began = self._cpu()
        self._server.begin_push(turns, burst)
        self._wait("got")
        self._server.end_push()
        return self._cpu() - began

    def _echo(self, messages: int) -> float:
        began = self._cpu()
        at_once = min(messages, self._connections)
        tell(self._client, f"echo {messages} {at_once} {self._server.dialect.message}")
        self._wait("got")
        return self._cpu() - began

    def _wait(self, word: str) -> None:
        if (said := hear(self._client)) != word:
            raise AssertionError(
                f"{self.name}: the client said {said or 'nothing'!r}, not {word!r}"
            )


def compiled(folder: Path, source: Path) -> Path:
    """A C program of this folder, ready to run. Raises NotMeasured without a compiler."""
    program = folder / source.stem
    command = ["gcc", "-O2", "-o", str(program), str(source)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise NotMeasured("there is no gcc") from None
    except subprocess.CalledProcessError as error:
        raise NotMeasured(f"gcc failed: {error.stderr.strip().splitlines()[-1]}") from None
    return program
