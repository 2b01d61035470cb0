"""The data directory: one holder, one clear line for each way in which it can't be used."""

from pathlib import Path

import pytest

from steward.cli.datadir import DataDirectory, DataDirectoryUnusable


def test_a_second_holder_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with DataDirectory(tmp_path), pytest.raises(DataDirectoryUnusable) as refusal:
        DataDirectory(tmp_path).__enter__()
    assert "in use by another `steward up` (pid " in str(refusal.value)


def test_the_lock_is_free_after_its_holder(tmp_path: Path) -> None:
    with DataDirectory(tmp_path):
        pass
    with DataDirectory(tmp_path) as again:
        assert again.logs.is_dir()


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataDirectoryUnusable, match="can't be used"):
        DataDirectory(tmp_path / "file" / "data").__enter__()


def test_logs_of_the_last_run_are_kept_aside(tmp_path: Path) -> None:
    with DataDirectory(tmp_path) as directory:
        directory.log_of("node-0").write_text("first run")
    with DataDirectory(tmp_path) as directory:
        assert not directory.log_of("node-0").exists()
        assert (directory.logs / "node-0.log.1").read_text() == "first run"


def test_a_log_that_grew_is_cut_while_it_is_written(tmp_path: Path) -> None:
    with DataDirectory(tmp_path) as directory:
        log = directory.log_of("node-0")
        with log.open("ab", buffering=0) as writer:
            writer.write(b"x" * 100)
            directory.cut_logs(max_bytes=50)
            writer.write(b"after")
        assert log.read_bytes() == b"after"
        assert (directory.logs / "node-0.log.1").read_bytes() == b"x" * 100
