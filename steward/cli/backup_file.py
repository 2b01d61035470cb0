"""What `steward backup` writes and `steward restore` reads: the embedded stores in one tar file.

In it are `manifest.json`, the databases and the keys. The manifest has the size and SHA-256 of each
file, and of each database which layout it has.

**How a store is read while it is in use.** `events.db` is read on one snapshot, by SQLite's own
backup. `registry.db` and `auth.db` are locked for good by their services, so their files are
copied: first the database, then its write-ahead log. SQLite writes to a database only what is in
its log, and the log is written from its beginning again only under a new header. So if the header
is the same before and after, the log that was copied repairs every page of the database that
changed meanwhile, and what was copied last and only in part is a transaction that SQLite ignores.
If it is not the same, the copy is made again.

**The order** is log, auth, registry. A fence of the log is an epoch that the registry had stored
before; so the registry of a backup knows every epoch that its log knows, and a restored log never
shows one "that was never granted". The other way round it might. Epochs that were given out after
the backup are in neither: they are out in the world, and must never be given out again. For this,
the registry's witness is *not* in a backup: a store without one is raised to a new generation
before it is served, which makes each later epoch higher than all before and fences every node of
before (`docs/ownership.md`). Auth comes after the log since a revocation must not be older than
what the revoked user did; keys never change.

Not guaranteed: that a client which saw more than the backup has is told so. It is, by `reset`, if
it comes back while its stream is shorter than what it saw.
"""

import hashlib
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"
EVENTS, AUTH, REGISTRY = "events.db", "auth.db", "registry.db"
STORES = (EVENTS, AUTH, REGISTRY)
"""In the order in which they are read."""
KEYS = "keys"

MOST_MANIFEST_BYTES = 1024 * 1024
WAL_HEADER_BYTES = 32
COPY_S = 60.0
"""How long it is tried to copy a store between two turns of its log. One turn is 4 MiB of writes
of auth, 16 MiB of the registry."""
PIECE = 1024 * 1024


class BackupProblem(Exception):
    """Why there is no backup, or why one is not restored. One line for an operator."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a backup. `layout`: the `user_version` of a database, 0 for other files."""

    name: str
    bytes: int
    sha256: str
    layout: int


def back_up(data: Path, target: Path, say: Callable[[str], None]) -> list[Entry]:
    """Write the stores and keys in `data` into `target`, which must not exist. Whole or not at all.

    Raises BackupProblem.
    """
    if not data.is_dir():
        raise BackupProblem(f"{data} is no data directory")
    if target.exists():
        raise BackupProblem(f"{target} exists; give another name")
    with _reported(), _directory_beside(target) as work:
        staged = work / "staged"
        staged.mkdir(mode=0o700)
        for name in STORES:
            if (data / name).exists():
                say(f"reading {name}")
                (_snapshot if name == EVENTS else _copy_locked)(data / name, staged / name)
        (staged / KEYS).mkdir(mode=0o700)
        for key in sorted((data / KEYS).glob("*.key")):
            shutil.copyfile(key, staged / KEYS / key.name)
        entries = [_entry(staged, path) for path in sorted(staged.rglob("*")) if path.is_file()]
        if not entries:
            raise BackupProblem(f"{data} has neither stores nor keys")
        manifest = {
            "format": FORMAT,
            "made_at_ms": time.time_ns() // 1_000_000,
            "files": [asdict(entry) for entry in entries],
        }
        (staged / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        say("writing the file")
        part = work / "backup.tar"
        with open(part, "xb", opener=_private) as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                # The manifest comes first: who restores reads it before all else.
                for name in (MANIFEST, *(entry.name for entry in entries)):
                    tar.add(staged / name, arcname=name, recursive=False)
            file.flush()
            os.fsync(file.fileno())
        # Unlike a rename this never replaces a file that came meanwhile.
        os.link(part, target)
        _sync(target.parent)
    return entries


def restore(source: Path, data: Path, say: Callable[[str], None]) -> list[Entry]:
    """Make the data directory `data`, absent or empty before, of a backup. Whole or not at all.

    Raises BackupProblem.
    """
    if data.exists() and (not data.is_dir() or any(data.iterdir())):
        raise BackupProblem(f"{data} is not empty; a backup is restored into a new directory")
    with _reported(), _directory_beside(data) as work, tarfile.open(source, "r:") as tar:
        entries = _manifest(tar)
        made = work / "data"
        made.mkdir(mode=0o700)
        for entry in entries:
            say(f"restoring {entry.name}")
            path = made / entry.name
            path.parent.mkdir(mode=0o700, exist_ok=True)
            _extract(tar, entry, path)
        for entry in entries:
            if entry.name in STORES:
                _check_database(made / entry.name)
        if data.exists():
            data.rmdir()
        os.rename(made, data)
        _sync(data.parent)
    return entries


# ---- reading stores


def _snapshot(source: Path, target: Path) -> None:
    """A database that others may read, on one snapshot; its writer goes on meanwhile."""
    uri = f"{source.absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True)) as reader, closing(_create(target)) as copy:
        # In one go: between steps the snapshot would be given up.
        reader.backup(copy, pages=-1)
    _fold(target)


def _copy_locked(source: Path, target: Path) -> None:
    """A database that its service has locked for itself, and what its log adds to it."""
    log, copied_log = Path(f"{source}-wal"), Path(f"{target}-wal")
    ends = time.monotonic() + COPY_S
    while True:
        before = _state(source, log)
        _copy(source, target)
        copied_log.unlink(missing_ok=True)
        if log.exists():
            _copy(log, copied_log)
        if _state(source, log) == before:
            _fold(target)
            return
        if time.monotonic() > ends:
            raise BackupProblem(f"{source} changes too fast to be copied; try again later")


def _state(source: Path, log: Path) -> object:
    """What changes when the log begins anew; without a log, when the database is written to."""
    try:
        with open(log, "rb") as file:
            header = file.read(WAL_HEADER_BYTES)
    except FileNotFoundError:
        header = b""
    if header:
        return header
    at = source.stat()
    return at.st_mtime_ns, at.st_size, at.st_ino


def _copy(source: Path, target: Path) -> None:
    try:
        with open(source, "rb") as reader, open(target, "wb", opener=_private) as writer:
            shutil.copyfileobj(reader, writer, PIECE)
    except FileNotFoundError:
        # The log of a service that has just ended: then the state is another one as well.
        target.unlink(missing_ok=True)


def _fold(path: Path) -> None:
    """Put what is in the log of a copied database into it, and see that it is sound."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    _check_database(path)


def _check_database(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise BackupProblem(f"{path.name} is damaged: {verdict}")


def _create(path: Path) -> sqlite3.Connection:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    return sqlite3.connect(path)


# ---- the file


def _entry(staged: Path, path: Path) -> Entry:
    layout = 0
    if path.name in STORES:
        with closing(sqlite3.connect(path)) as database:
            (layout,) = database.execute("PRAGMA user_version").fetchone()
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Entry(path.relative_to(staged).as_posix(), path.stat().st_size, digest, layout)


def _manifest(tar: tarfile.TarFile) -> list[Entry]:
    """The files of a backup. Raises BackupProblem for what is none, or could do harm."""
    member = tar.next()
    if member is None or member.name != MANIFEST or member.size > MOST_MANIFEST_BYTES:
        raise BackupProblem("this is no backup of a data directory")
    file = tar.extractfile(member)
    try:
        manifest: dict[str, Any] = json.loads(file.read()) if file is not None else {}
        if manifest["format"] != FORMAT:
            raise BackupProblem(f"the backup has format {manifest['format']}; this knows {FORMAT}")
        entries = [Entry(**entry) for entry in manifest["files"]]
    except (ValueError, KeyError, TypeError):
        raise BackupProblem("the manifest of this backup can't be read") from None
    for entry in entries:
        parts = PurePosixPath(entry.name).parts
        is_key = len(parts) == 2 and parts[0] == KEYS and parts[1].endswith(".key")
        if entry.name not in STORES and not is_key:
            raise BackupProblem(f"the backup names {entry.name!r}, which is no part of one")
    return entries


def _extract(tar: tarfile.TarFile, entry: Entry, path: Path) -> None:
    try:
        member = tar.getmember(entry.name)
    except KeyError:
        raise BackupProblem(f"{entry.name} is missing in the backup") from None
    source = tar.extractfile(member) if member.isreg() else None
    if source is None:
        raise BackupProblem(f"{entry.name} is no file in the backup")
    hashed = hashlib.sha256()
    with open(path, "xb", opener=_private) as file:
        while piece := source.read(PIECE):
            hashed.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    if hashed.hexdigest() != entry.sha256:
        raise BackupProblem(f"{entry.name} is not what was backed up: its digest differs")


@contextmanager
def _directory_beside(target: Path) -> Iterator[Path]:
    """A private directory on the file system of `target`; it is gone afterwards."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as work:
        yield Path(work)


@contextmanager
def _reported() -> Iterator[None]:
    """Errors of files and databases as what an operator is told."""
    try:
        yield
    except (OSError, sqlite3.Error, tarfile.TarError) as error:
        raise BackupProblem(str(error)) from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
