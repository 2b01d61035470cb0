"""Backups of stores in use: a copy is a moment of the store, and nothing else is ever restored."""

import itertools
import json
import os
import select
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from steward.cli import backup_file
from steward.cli.backup_file import BackupProblem, back_up, restore

# Each transaction raises both numbers, far from each other in the file; checkpoints are frequent.
WRITER = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA locking_mode = EXCLUSIVE")
db.execute("PRAGMA journal_mode = WAL")
db.execute("PRAGMA synchronous = OFF")
db.execute(f"PRAGMA wal_autocheckpoint = {sys.argv[2]}")
db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, number INTEGER, filling BLOB)")
db.executemany("INSERT INTO t VALUES (?, 0, zeroblob(3000))", [(n,) for n in range(400)])
number = 0
while True:
    number += 1
    db.execute("BEGIN")
    for id in (0, number % 400, 399):
        db.execute("UPDATE t SET number = ?, filling = randomblob(3000) WHERE id = ?", (number, id))
    db.execute("COMMIT")
    print(number, flush=True)
    time.sleep(0.0005)
"""


@contextmanager
def writer(path: Path, checkpoint_pages: int) -> Iterator["subprocess.Popen[bytes]"]:
    words = [sys.executable, "-c", WRITER, str(path), str(checkpoint_pages)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def quiet(_: str) -> None:
    pass


class Acknowledged:
    """The numbers that a writer printed after their transactions."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        self._pipe = process.stdout.fileno()
        self._rest = b""

    def last(self) -> int:
        """The newest number; waits for one that was not seen before."""
        lines: list[bytes] = []
        while len(lines) < 2 or select.select([self._pipe], [], [], 0)[0]:
            self._rest += os.read(self._pipe, 65536)
            lines = self._rest.split(b"\n")
        self._rest = lines[-1]
        return int(lines[-2])


@pytest.mark.parametrize("checkpoint_pages", [200, 1000, 100_000])
def test_a_copy_of_a_locked_database_is_one_moment_of_it(
    tmp_path: Path, checkpoint_pages: int
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with writer(data / "registry.db", checkpoint_pages) as process:
        numbers = Acknowledged(process)
        for round_ in range(6):
            acknowledged = numbers.last()
            back_up(data, tmp_path / f"{round_}.tar", quiet)
            restore(tmp_path / f"{round_}.tar", tmp_path / f"{round_}", quiet)
            with closing(sqlite3.connect(tmp_path / f"{round_}" / "registry.db")) as copy:
                first, last, most = copy.execute(
                    "SELECT (SELECT number FROM t WHERE id = 0),"
                    " (SELECT number FROM t WHERE id = 399), (SELECT max(number) FROM t)"
                ).fetchone()
                assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert first == last == most >= acknowledged


@pytest.fixture
def data(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    (data / "keys").mkdir(parents=True)
    (data / "keys" / "control.key").write_text("the key")
    for name in ("events.db", "auth.db", "registry.db"):
        with closing(sqlite3.connect(data / name)) as database:
            database.execute("PRAGMA user_version = 7")
            database.execute("CREATE TABLE t (name TEXT)")
            database.execute("INSERT INTO t VALUES (?)", (name,))
            database.commit()
    (data / "registry.db.witness").write_text("the witness")
    (data / "logs").mkdir()
    return data


def test_stores_and_keys_come_back_and_the_witness_does_not(data: Path, tmp_path: Path) -> None:
    back_up(data, tmp_path / "b.tar", quiet)
    assert (tmp_path / "b.tar").stat().st_mode & 0o777 == 0o600
    entries = restore(tmp_path / "b.tar", tmp_path / "new", quiet)
    names = {
        path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*")
    }
    assert names == {"events.db", "auth.db", "registry.db", "keys", "keys/control.key"}
    assert {entry.layout for entry in entries if entry.name.endswith(".db")} == {7}
    for path in (tmp_path / "new").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    with closing(sqlite3.connect(tmp_path / "new" / "auth.db")) as database:
        assert database.execute("SELECT name FROM t").fetchone() == ("auth.db",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.tar", "data", "new"]


def test_nothing_is_written_over(data: Path, tmp_path: Path) -> None:
    back_up(data, tmp_path / "b.tar", quiet)
    with pytest.raises(BackupProblem, match="exists"):
        back_up(data, tmp_path / "b.tar", quiet)
    with pytest.raises(BackupProblem, match="not empty"):
        restore(tmp_path / "b.tar", data, quiet)
    (tmp_path / "empty").mkdir()
    restore(tmp_path / "b.tar", tmp_path / "empty", quiet)
    with pytest.raises(BackupProblem, match="no data directory"):
        back_up(tmp_path / "none", tmp_path / "c.tar", quiet)


def changed(
    source: Path, target: Path, name: str, content: bytes | None, as_name: str = ""
) -> None:
    """A copy of a backup in which one file is another one, or is missing."""
    with tarfile.open(source) as tar, tarfile.open(target, "w") as out:
        for member in tar.getmembers():
            file = tar.extractfile(member)
            assert file is not None
            body = file.read()
            if member.name == name:
                if content is None:
                    continue
                body = content
            info = tarfile.TarInfo(member.name)
            info.size = len(body)
            part = target.with_suffix(".part")
            part.write_bytes(body)
            with open(part, "rb") as reader:
                out.addfile(info, reader)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("auth.db", b"other", "digest differs"),
        ("auth.db", None, "missing"),
        ("manifest.json", None, "no backup"),
        ("manifest.json", b"{", "can't be read"),
        ("manifest.json", b'{"format": 2}', "format 2"),
    ],
)
def test_a_file_that_is_no_whole_backup_is_refused(
    data: Path, tmp_path: Path, name: str, content: bytes | None, why: str
) -> None:
    back_up(data, tmp_path / "b.tar", quiet)
    changed(tmp_path / "b.tar", tmp_path / "c.tar", name, content)
    with pytest.raises(BackupProblem, match=why):
        restore(tmp_path / "c.tar", tmp_path / "new", quiet)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "keys/../../evil.key", "cluster.json"])
def test_only_stores_and_keys_are_ever_written(data: Path, tmp_path: Path, name: str) -> None:
    manifest = {"format": 1, "files": [{"name": name, "bytes": 1, "sha256": "", "layout": 0}]}
    back_up(data, tmp_path / "b.tar", quiet)
    changed(tmp_path / "b.tar", tmp_path / "c.tar", "manifest.json", json.dumps(manifest).encode())
    with pytest.raises(BackupProblem, match="no part"):
        restore(tmp_path / "c.tar", tmp_path / "new", quiet)


def test_a_damaged_store_makes_no_backup(data: Path, tmp_path: Path) -> None:
    whole = (data / "auth.db").read_bytes()
    (data / "auth.db").write_bytes(whole[:4096] + os.urandom(len(whole) - 4096))
    with pytest.raises(BackupProblem):
        back_up(data, tmp_path / "b.tar", quiet)
    assert not (tmp_path / "b.tar").exists()


def test_a_store_that_never_holds_still_is_given_up(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup_file, "COPY_S", 0.05)
    seen = itertools.count()
    monkeypatch.setattr(backup_file, "_state", lambda *_: next(seen))
    with pytest.raises(BackupProblem, match="too fast"):
        back_up(data, tmp_path / "b.tar", quiet)
