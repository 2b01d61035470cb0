"""Clocks: one that never jumps or stops, for deadlines, and one for stamps that people read.

Deadlines use CLOCK_BOOTTIME: CLOCK_MONOTONIC stands still while a machine is
suspended, and a lease must not. Wall clocks decide nothing.
"""

import time


def boot_ms() -> int:
    """Milliseconds since boot, suspended time included. Never goes back."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def wall_ms() -> int:
    """Unix time in milliseconds. May be stepped; for stamps and token expiry alone."""
    return time.time_ns() // 1_000_000


def wall_us() -> int:
    """Unix time in microseconds. May be stepped; for measures alone."""
    return time.time_ns() // 1000
