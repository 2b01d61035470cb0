"""Memory, CPU and files of this process, as Prometheus names them, at the cost of three reads.

The collector of prometheus-client lists all open files to count them, which takes a millisecond for
every thousand connections of an edge. Linux since 6.2 keeps that number as the size of
`/proc/self/fd`; an older one has to list them.
"""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

_SELF = Path("/proc/self")
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class ProcessFigures(Collector):
    """Reads `/proc` at every scrape."""

    def collect(self) -> Iterator[Metric]:
        """The families; see the module."""
        # Behind the name, which may hold anything: state is field 3 of proc(5).
        fields = (_SELF / "stat").read_text().rpartition(")")[2].split()
        user, kernel, started, resident = (int(fields[n - 3]) for n in (14, 15, 22, 24))
        yield GaugeMetricFamily(
            "process_resident_memory_bytes", "Resident memory size in bytes.", resident * _PAGE
        )
        yield CounterMetricFamily(
            "process_cpu_seconds", "User and system CPU time in seconds.", (user + kernel) / _TICKS
        )
        yield GaugeMetricFamily(
            "process_start_time_seconds",
            "Start of the process in seconds of Unix time.",
            _booted_s() + started / _TICKS,
        )
        yield GaugeMetricFamily("process_open_fds", "Open file descriptors.", open_files())
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        yield GaugeMetricFamily("process_max_fds", "Most file descriptors that may be open.", most)


def open_files() -> int:
    """How many files this process has open."""
    return os.stat(_SELF / "fd").st_size or len(os.listdir(_SELF / "fd"))


def _booted_s() -> float:
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith("btime "):
            return float(line.split()[1])
    return 0.0
