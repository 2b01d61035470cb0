"""A network of its own for the members of an etcd: each in a namespace, on one bridge.

So a test can pull the cable of one member: it runs on, and neither its peers nor any client reach
it. Needs root and `ip` (Debian: iproute2); `missing()` says what is not there. Addresses are of the
range that is kept for tests of networks, and none of them is ever reached from elsewhere.
"""

import os
import random
import shutil
import subprocess
from types import TracebackType
from typing import Self

SKIPPED = "skipped: no network namespaces (root, and iproute2)"
_RANGE = "198.18"


def missing() -> str:
    """Why no namespaces can be made here; empty when they can."""
    return SKIPPED if os.geteuid() != 0 or shutil.which("ip") is None else ""


class Network:
    """Hosts 0 to `size` - 1. Use as a context manager; all is removed at its end."""

    def __init__(self, size: int = 3) -> None:
        self._size = size
        self._name = f"stw{random.randrange(16**5):05x}"
        self._subnet = f"{_RANGE}.{random.randrange(256)}"

    def address(self, host: int) -> str:
        return f"{self._subnet}.{host + 2}"

    def command(self, host: int) -> list[str]:
        """What a command line begins with that runs on this host."""
        return ["ip", "netns", "exec", f"{self._name}n{host}"]

    def cut(self, host: int) -> None:
        """Nothing reaches this host any more, nor comes from it."""
        _ip("link", "set", f"{self._name}h{host}", "down")

    def mend(self, host: int) -> None:
        _ip("link", "set", f"{self._name}h{host}", "up")

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _make(self) -> None:
        bridge = f"{self._name}b"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{self._subnet}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for host in range(self._size):
            space, here, there = (f"{self._name}{kind}{host}" for kind in "nhg")
            _ip("netns", "add", space)
            _ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", space)
            _ip("link", "set", here, "master", bridge, "up")
            for words in (
                ("addr", "add", f"{self.address(host)}/24", "dev", there),
                ("link", "set", there, "up"),
                ("link", "set", "lo", "up"),
            ):
                _ip("-n", space, *words)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for host in range(self._size):
            # With the namespace go its ends of cables.
            subprocess.run(
                ["ip", "netns", "del", f"{self._name}n{host}"], capture_output=True, check=False
            )
        subprocess.run(["ip", "link", "del", f"{self._name}b"], capture_output=True, check=False)


def _ip(*words: str) -> None:
    """Raises CalledProcessError."""
    subprocess.run(["ip", *words], capture_output=True, check=True)
