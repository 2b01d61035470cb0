"""Which cluster an operator's command is about: options, environment, and the key that is read."""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from steward.cli.cluster_file import ClusterFile, NoCluster, ProcessEntry, write_cluster
from steward.cli.target import Target, WrongTarget, add_target, target_of
from steward.rpc.keys import CONTROL_KEY, KeyUnusable, load_or_create_key

REGISTRY = "registry.example:9000"
LOCAL = "127.0.0.1:4242"


def target(*words: str, environ: Mapping[str, str] | None = None) -> Target:
    parser = argparse.ArgumentParser()
    add_target(parser)
    return target_of(parser.parse_args(words), environ or {})


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    """The control key of a cluster elsewhere."""
    load_or_create_key(tmp_path / "elsewhere", CONTROL_KEY)
    return str(tmp_path / "elsewhere" / "keys" / CONTROL_KEY)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """The directory of a cluster that runs here."""
    directory = tmp_path / "here"
    load_or_create_key(directory, CONTROL_KEY)
    entry = ProcessEntry("registry", "registry", os.getpid(), LOCAL, None, None)
    write_cluster(directory, ClusterFile(os.getpid(), "http://127.0.0.1:1", (entry,)))
    return str(directory)


def test_a_directory_gives_address_key_and_processes(data: str) -> None:
    found = target("--data", data)
    assert (found.registry, found.cluster) == (LOCAL, "steward")
    assert found.local is not None and len(found.local.processes) == 1


def test_a_registry_and_a_key_file_need_no_directory(key_file: str) -> None:
    found = target("--registry", REGISTRY, "--key-file", key_file, "--cluster", "eu-1")
    assert (found.registry, found.cluster, found.local) == (REGISTRY, "eu-1", None)


def test_the_environment_names_all_of_it_and_options_win(key_file: str, data: str) -> None:
    environ = {
        "STEWARD_OPERATOR_REGISTRY": REGISTRY,
        "STEWARD_OPERATOR_KEY_FILE": key_file,
        "STEWARD_OPERATOR_CLUSTER": "eu-1",
    }
    found = target(environ=environ)
    assert (found.registry, found.cluster, found.local) == (REGISTRY, "eu-1", None)
    found = target("--registry", "other:1", "--cluster", "eu-2", environ=environ)
    assert (found.registry, found.cluster) == ("other:1", "eu-2")
    # A key of the environment is of that registry, and not of a directory that is named.
    environ["STEWARD_OPERATOR_KEY_FILE"] = "/nowhere"
    found = target("--data", data, environ=environ)
    assert (found.registry, found.cluster) == (LOCAL, "steward")


def test_an_empty_variable_says_nothing(key_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {
        "STEWARD_OPERATOR_REGISTRY": "",
        "STEWARD_OPERATOR_KEY_FILE": "",
        "STEWARD_OPERATOR_CLUSTER": "",
    }
    found = target("--registry", REGISTRY, "--key-file", key_file, environ=environ)
    assert found.cluster == "steward"
    monkeypatch.chdir(Path(key_file).parent)
    with pytest.raises(NoCluster):
        target(environ=environ)


def test_a_registry_with_a_directory_takes_the_key_of_the_directory(data: str) -> None:
    found = target("--registry", REGISTRY, "--data", data)
    assert (found.registry, found.local) == (REGISTRY, None)
    assert found.key.private_bytes_raw() == target("--data", data).key.private_bytes_raw()


def test_a_missing_key_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyUnusable, match="--key-file, or STEWARD_OPERATOR_KEY_FILE"):
        target("--registry", REGISTRY)
    with pytest.raises(KeyUnusable, match="No such file or directory"):
        target("--registry", REGISTRY, "--key-file", str(tmp_path / "absent"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "address",
    ["localhost", ":1", "host:", "host:0", "host:65536", "a b:1", "http://h:1", "h:1/x", "h:1\n"],
)
def test_an_address_that_is_none_is_refused_by_name(key_file: str, address: str) -> None:
    for words, environ in (
        (("--registry", address), {}),
        ((), {"STEWARD_OPERATOR_REGISTRY": address}),
    ):
        with pytest.raises(WrongTarget, match="is not HOST:PORT") as refused:
            target(*words, "--key-file", key_file, environ=environ)
        assert str(refused.value).count("\n") == 0


@pytest.mark.parametrize("address", ["h:1", "10.0.0.7:9000", "[::1]:9000", "a-b.c_d.svc:65535"])
def test_an_address_is_a_name_or_an_ip_and_a_port(key_file: str, address: str) -> None:
    assert target("--registry", address, "--key-file", key_file).registry == address


def test_a_cluster_file_of_a_dead_supervisor_is_no_cluster(data: str) -> None:
    path = Path(data) / "cluster.json"
    content = json.loads(path.read_bytes())
    content["pid"] = 2**22 + 1
    path.write_text(json.dumps(content))
    with pytest.raises(NoCluster, match="is dead"):
        target("--data", data)
