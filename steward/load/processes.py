"""What the kernel says of other processes of this machine. Linux only."""

import time


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used, in user and kernel, all threads; to a microsecond.

    Raises OSError when there is no such process.
    """
    # The number of a process's CPU clock, as clock_getcpuclockid(3) makes it.
    return time.clock_gettime(~pid << 3 | 2)
