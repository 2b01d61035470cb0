"""The data directory: room, speed and kind of its disk, its keys, its embedded stores."""

import os
import shutil
import sqlite3
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from steward.cli.backup_file import STORES
from steward.cli.checkup.finding import Finding, failed, good, skipped, warning
from steward.rpc.keys import CONTROL_KEY, USER_KEY, KeyUnusable, load_key

AREA = "data"
LEAST_FREE_MIB, FEW_FREE_MIB = 64, 2048
SLOW_SYNC_MS = 10.0
SYNCS = 20
MOST_CHECKED_BYTES = 1 << 30
"""Stores that are larger are for `steward store check`, which shows how far it is."""
_SHARED = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "fuse.sshfs"})
_FLEETING = frozenset({"tmpfs", "ramfs"})


def look(data: Path, running: bool) -> Iterator[Finding]:
    """All findings of a data directory. `running`: a cluster has its stores open."""
    if not data.exists():
        yield skipped(AREA, str(data), "not there; `steward up` makes it")
        return
    if not os.access(data, os.R_OK | os.W_OK | os.X_OK):
        yield failed(
            AREA, str(data), "may not be written by this user", "chown it, or give another --data"
        )
        return
    yield filesystem(data, Path("/proc/self/mounts").read_text())
    yield room(shutil.disk_usage(data).free)
    yield sync_time(data)
    for name in (CONTROL_KEY, USER_KEY):
        yield key(data / "keys" / name)
    for name in STORES:
        if (data / name).exists():
            yield store(data / name, running)


def filesystem(data: Path, mounts: str) -> Finding:
    """SQLite's locks and shared memory need a disk of this machine."""
    where = str(data.resolve())
    kind, longest = "unknown", -1
    for line in mounts.splitlines():
        _, point, name = line.split(" ")[:3]
        below = where == point or where.startswith(point.rstrip("/") + "/")
        if below and len(point) >= longest:
            kind, longest = name, len(point)
    if kind in _SHARED:
        return failed(
            AREA,
            "file system",
            f"{kind}, which is shared between machines",
            "put the data directory on a local disk, or use etcd and PostgreSQL",
        )
    if kind in _FLEETING:
        return warning(
            AREA,
            "file system",
            f"{kind}: all is lost when the machine stops",
            "put the data directory on a disk, unless this is a trial",
        )
    return good(AREA, "file system", kind)


def room(free_bytes: int) -> Finding:
    """A log that can't write stops its cluster."""
    mib = free_bytes // (1024 * 1024)
    mend = "make room, set log.keep_days, or move the data directory to a larger disk"
    if mib < LEAST_FREE_MIB:
        return failed(AREA, "free space", f"{mib:,} MiB", mend)
    if mib < FEW_FREE_MIB:
        return warning(AREA, "free space", f"{mib:,} MiB", mend)
    return good(AREA, "free space", f"{mib:,} MiB")


def sync_time(data: Path) -> Finding:
    """What a commit costs: 4 KiB and fdatasync, the median of a few."""
    path = data / f".doctor.{os.getpid()}"
    block = b"\0" * 4096
    times = []
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            for _ in range(SYNCS):
                os.write(descriptor, block)
                begin = time.perf_counter()
                os.fdatasync(descriptor)
                times.append(1000 * (time.perf_counter() - begin))
        finally:
            os.close(descriptor)
            path.unlink()
    except OSError as error:
        return failed(
            AREA, "durable writes", f"{error.strerror}", "give a directory that can be written"
        )
    median = statistics.median(times)
    if median > SLOW_SYNC_MS:
        return warning(
            AREA,
            "durable writes",
            f"{median:.1f} ms each",
            "use an SSD: every event waits for one of these (others share it)",
        )
    return good(AREA, "durable writes", f"{median:.2f} ms each")


def key(path: Path) -> Finding:
    """A key file. One that is not there yet is made by the first service that needs it."""
    if not path.exists():
        return skipped(AREA, path.name, "not there; the first service makes it")
    try:
        load_key(path)
    except KeyUnusable as error:
        return failed(AREA, path.name, str(error), f"chmod 600 {path}, or restore it of a backup")
    return good(AREA, path.name, "Ed25519, of this user alone")


def store(path: Path, running: bool) -> Finding:
    """An embedded store, read without changing it."""
    size = path.stat().st_size
    found = f"{size / (1024 * 1024):,.1f} MiB"
    if running:
        return skipped(AREA, path.name, f"{found}; in use by the cluster")
    if size > MOST_CHECKED_BYTES:
        return skipped(AREA, path.name, f"{found}; look with `steward store check`")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            answer = str(database.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            return skipped(AREA, path.name, f"{found}; another process has it open")
        answer = str(error)
    except sqlite3.DatabaseError as error:
        answer = str(error)
    if answer != "ok":
        return failed(
            AREA, path.name, f"{found}; {answer}", "restore a backup: `steward restore --help`"
        )
    return good(AREA, path.name, f"{found}, whole")
