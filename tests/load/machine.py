"""What a machine says about its processes (`/proc`) and about itself. Linux only."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path

from steward.load.processes import cpu_seconds

__all__ = [
    "cpu_by_name",
    "cpu_seconds",
    "facts",
    "load",
    "memory_by_name",
    "pin",
    "resident_kib",
    "two_cpus",
]


def resident_kib(pid: int) -> int:
    """Resident memory of a process in KiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


def cpu_by_name(pids: Mapping[str, int]) -> dict[str, float]:
    """CPU seconds of several processes, by name."""
    return {name: cpu_seconds(pid) for name, pid in pids.items()}


def memory_by_name(pids: Mapping[str, int]) -> dict[str, int]:
    """Resident KiB of several processes, by name."""
    return {name: resident_kib(pid) for name, pid in pids.items()}


def pin(pid: int, cpu: int) -> None:
    """Keep every thread of a process, and those it will make, on one CPU."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {cpu})


def two_cpus() -> tuple[int, int]:
    """A CPU for what is measured and one for the load; the same one where there is one only."""
    cpus = sorted(os.sched_getaffinity(0))
    return cpus[0], cpus[-1]


def facts() -> str:
    """CPU count and model, kernel, Python: what a figure means nothing without. No names."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = f" ({line.partition(':')[2].strip()})"
            break
    kernel = ".".join(platform.release().split("-")[0].split(".")[:2])
    python = platform.python_version()
    return f"{os.cpu_count()} CPUs{model}, Linux {kernel}, Python {python}"


def load() -> float:
    """How many processes wanted a CPU in the last minute, on average: what else goes on here."""
    return os.getloadavg()[0]
