"""The machine under a cluster: Python and its packages, limits, memory, clock."""

import ctypes
import os
import platform
import resource
import sqlite3
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from steward.cli.checkup.finding import Finding, failed, good, warning

AREA = "machine"
OLDEST_PYTHON = (3, 11)
OLDEST_SQLITE = (3, 35)
"""The first one with RETURNING."""
SPARE_FILES = 512
"""Files of an edge beside its connections: stores, peers, modules."""
LEAST_MEMORY_MIB = 512
LEAST_BACKLOG = 1024
_TIME_ERROR = 5


def look(max_connections: int) -> Iterator[Finding]:
    """All findings. `max_connections`: those that an edge of this machine is set to take."""
    yield _python()
    yield from packages(metadata.requires("steward") or [])
    yield _sqlite()
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1], max_connections)
    yield backlog(Path("/proc/sys/net/core/somaxconn"))
    yield memory(Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max"))
    yield _clock()


def _python() -> Finding:
    found = f"{platform.python_implementation()} {platform.python_version()}"
    if sys.version_info < OLDEST_PYTHON:
        return failed(AREA, "Python", found, "install Python 3.11 or newer")
    return good(AREA, "Python", found)


def packages(requirements: list[str]) -> Iterator[Finding]:
    """Whether what is installed is what this version was made for (`name>=1.2; marker`)."""
    wrong = []
    needed = [text for text in requirements if ";" not in text]
    for text in needed:
        name, _, least = text.partition(">=")
        try:
            present = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        if least and numbers(present) < numbers(least):
            wrong.append(f"{name} {present} is older than {least}")
    if wrong:
        yield failed(
            AREA,
            "packages",
            "; ".join(wrong),
            "install from the lock file: pip install --require-hashes -r requirements.lock",
        )
    else:
        yield good(AREA, "packages", f"{len(needed)} as new as needed")


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, to compare by. `1.10rc1` is (1, 10)."""
    parts = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
        if digits != part:
            break
    return tuple(parts)


def _sqlite() -> Finding:
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        return failed(
            AREA, "SQLite", sqlite3.sqlite_version, "use a Python that is built with SQLite 3.35"
        )
    return good(AREA, "SQLite", sqlite3.sqlite_version)


def open_files(hard_limit: int, max_connections: int) -> Finding:
    """Services raise their own limit to the hard one; every connection is an open file."""
    needed = max_connections + SPARE_FILES
    unlimited = hard_limit == resource.RLIM_INFINITY
    found = "unlimited" if unlimited else f"{hard_limit:,} at most"
    if not unlimited and hard_limit < needed:
        return warning(
            AREA,
            "open files",
            f"{found}, and an edge may take {max_connections:,} connections",
            f"raise the hard limit to {needed:,} (ulimit -Hn, LimitNOFILE= of systemd), "
            "or lower edge.max_connections",
        )
    return good(AREA, "open files", found)


def backlog(path: Path) -> Finding:
    """How many connections may wait to be accepted: what a storm of reconnects needs."""
    try:
        length = int(path.read_text())
    except (OSError, ValueError):
        return good(AREA, "accept queue", "unknown on this system")
    if length < LEAST_BACKLOG:
        return warning(
            AREA,
            "accept queue",
            f"net.core.somaxconn is {length}",
            f"sysctl net.core.somaxconn={4 * LEAST_BACKLOG}, for storms of reconnects",
        )
    return good(AREA, "accept queue", f"{length:,} connections")


def memory(meminfo: Path, limit: Path) -> Finding:
    """What can be had, or the limit of the control group if that is less."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        mib = int(lines["MemAvailable"].split()[0]) // 1024
    except (OSError, ValueError, KeyError):
        return good(AREA, "memory", "unknown on this system")
    try:
        mib = min(mib, int(limit.read_text()) // (1024 * 1024))
    except (OSError, ValueError):
        pass  # No limit, or another kind of system.
    if mib < LEAST_MEMORY_MIB:
        return warning(
            AREA,
            "memory",
            f"{mib:,} MiB to be had",
            f"give it {LEAST_MEMORY_MIB} MiB or more: a whole cluster takes some 400 MiB idle",
        )
    return good(AREA, "memory", f"{mib:,} MiB to be had")


def _clock() -> Finding:
    """Tokens have an expiry, and events a time: both by the wall clock."""
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(512))
    except (OSError, AttributeError):
        state = -1
    if state == _TIME_ERROR:
        return warning(
            AREA,
            "clock",
            "the kernel says that nothing keeps it right",
            "run chrony, systemd-timesyncd or ntpd (in a container: on its host)",
        )
    if state < 0:
        return good(AREA, "clock", f"not asked: {os.strerror(ctypes.get_errno())}")
    return good(AREA, "clock", "kept right")
