"""`steward doctor` from outside: real files, real ports, real engines, real exit codes."""

import asyncio
import json
import os
import socket
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.testing.command import run_steward
from steward.testing.etcd import EtcdCluster, missing
from steward.testing.local_cluster import LocalCluster, free_ports
from steward.testing.postgres import ROLE, PostgresServer


def doctor(data: Path, *words: str, **environ: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and the findings by area and what."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STEWARD_")}
    answer = run_steward(
        *("doctor", "--json", "--data", data, *words),
        environ={**clean, "STEWARD_EDGE_PORT": str(free_ports(1)), **environ},
        within_s=90,
    )
    assert answer.returncode in (0, 1), answer.stderr
    return answer.returncode, {
        f"{finding['area']}: {finding['what']}": finding for finding in json.loads(answer.stdout)
    }


def test_a_machine_that_is_well_is_told_so(tmp_path: Path) -> None:
    code, findings = doctor(tmp_path / "new")
    assert code == 0
    assert findings["settings: edge"]["verdict"] == "ok"
    assert findings["machine: packages"]["verdict"] == "ok"
    assert findings[f"data: {tmp_path / 'new'}"]["verdict"] == "skipped"
    assert not (tmp_path / "new").exists()


def test_what_is_wrong_on_a_machine_is_told_with_how_to_mend_it(tmp_path: Path) -> None:
    load_or_create_key(tmp_path, CONTROL_KEY)
    (tmp_path / "keys" / CONTROL_KEY).chmod(0o644)
    with sqlite3.connect(tmp_path / "registry.db") as database:
        database.execute("CREATE TABLE placements(user)")
    (tmp_path / "events.db").write_bytes(b"SQLite format 3\0" + b"\1" * 8000)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        code, findings = doctor(
            tmp_path,
            STEWARD_EDGE_PORT=str(holder.getsockname()[1]),
            STEWARD_LOG_READERS="many",
            STEWARD_EGDE_PORT="1",
        )
    broken = {name for name, finding in findings.items() if finding["verdict"] == "failed"}
    assert broken == {
        "settings: log",
        "settings: environment",
        "machine: port",
        f"data: {CONTROL_KEY}",
        "data: events.db",
    }
    assert findings["data: registry.db"]["verdict"] == "ok"
    assert all(findings[name]["mend"] for name in broken)
    assert code == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_process_that_is_away_is_told(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_ports(1)}"
    code, findings = doctor(tmp_path, "--ops", address)
    assert code == 1
    assert findings[f"processes: {address}"]["verdict"] == "failed"


def test_a_running_cluster_is_looked_at(tmp_path: Path) -> None:
    cluster = LocalCluster.start(tmp_path)
    try:
        cluster.wait_ready()
        code, findings = doctor(cluster.data)
        told = [finding for finding in findings.values() if finding["area"] == "processes"]
        assert {finding["what"] for finding in told} == set(cluster.processes)
        assert {finding["verdict"] for finding in told} == {"ok"}
        assert findings["data: events.db"]["verdict"] == "skipped"
        assert code == 0
    finally:
        cluster.end()


def test_each_member_of_etcd_is_asked(tmp_path: Path) -> None:
    if why := missing():
        pytest.skip(why)
    with EtcdCluster(tmp_path / "etcd", size=3) as etcd:
        url = f"etcd://{','.join(etcd.endpoints)}/steward"
        code, findings = doctor(tmp_path, STEWARD_REGISTRY_STORE=url)
        told = {name: each for name, each in findings.items() if name.startswith("stores: etcd")}
        assert len(told) == 3
        assert {each["verdict"] for each in told.values()} <= {"ok", "warning"}
        assert code == 0
        etcd.members[0].kill()
        code, findings = doctor(tmp_path, STEWARD_REGISTRY_STORE=url)
        assert findings[f"stores: etcd {etcd.endpoints[0]}"]["verdict"] == "failed"
        assert code == 1


def test_a_database_is_asked_what_a_service_would_ask_of_it(
    tmp_path: Path, postgres_server: PostgresServer
) -> None:
    database = asyncio.run(postgres_server.make_database())
    try:
        _, findings = doctor(
            tmp_path,
            STEWARD_LOG_STORE=postgres_server.url(database),
            STEWARD_AUTH_STORE=postgres_server.url(database, role="postgres"),
        )
    finally:
        asyncio.run(postgres_server.drop_database(database))
    assert findings["stores: log.store"]["verdict"] == "ok"
    assert findings["stores: log.store"]["found"].startswith("PostgreSQL")
    assert findings["stores: auth.store"]["verdict"] == "failed"
    assert "row-level security" in findings["stores: auth.store"]["found"]
    assert postgres_server.url(database, role=ROLE) not in json.dumps(findings)


def test_a_database_that_is_away_is_told_once(tmp_path: Path) -> None:
    url = f"postgresql://steward:hush@127.0.0.1:{free_ports(1)}/none"
    code, findings = doctor(tmp_path, STEWARD_LOG_STORE=url)
    assert findings["stores: log.store"]["verdict"] == "failed"
    assert "hush" not in json.dumps(findings)
    assert code == 1
