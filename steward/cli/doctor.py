"""`steward doctor`: looks at a machine and at its cluster, and says how to mend what is wrong.

It changes nothing but for one small file that it writes and removes, to see how fast the disk is.
Settings are those of the environment. The processes are those of the `steward up` on `--data`, or
any whose ops ports are named. Exit code 1 when something is broken; warnings alone are 0.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steward.cli.cluster_file import NoCluster, read_cluster
from steward.cli.layout import DEFAULT_PORT, HOST, data_path
from steward.cli.target import DEFAULT_DATA, WrongTarget, address_of

if TYPE_CHECKING:
    from steward.cli.checkup.finding import Finding

Values = Mapping[str, Mapping[str, str]]
"""Role → setting → value, as it would be written in the environment."""

_MARKS = {"ok": "ok", "warning": "warn", "failed": "FAIL", "skipped": "-"}
_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "doctor",
        help="check a machine and its cluster, and say how to mend what is wrong",
        description="Check a machine and its cluster, and say how to mend what is wrong.",
    )
    parser.add_argument(
        "--data", type=data_path, default=data_path(DEFAULT_DATA), metavar="DIR", help="(.steward)"
    )
    parser.add_argument(
        "--ops",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="ops port of a process to ask as well; may be given often",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--all", action="store_true", help="also what is as it should be")


def run(args: argparse.Namespace) -> int:
    """Print what was found; 1 when something is broken, 2 when an option is wrong."""
    try:
        named = [address_of(text, "--ops") for text in args.ops]
    except WrongTarget as error:
        print(f"steward: {error}", file=sys.stderr)
        return 2
    findings = list(_examine(args.data, named, os.environ))
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings, everything=args.all)
    return 1 if any(finding.verdict == "failed" for finding in findings) else 0


def _examine(data: Path, named: Sequence[str], environ: Mapping[str, str]) -> "Iterator[Finding]":
    from steward.cli.checkup import cluster, files, machine
    from steward.cli.checkup.cluster import Process

    values, broken = _settings(environ)
    yield from broken
    edge = values.get("edge", {})
    yield from machine.look(int(edge.get("max_connections") or 0))
    processes = [Process(address, address) for address in named]
    try:
        local = read_cluster(data)
        processes += [Process(each.id, each.ops) for each in local.processes if each.ops]
    except NoCluster:
        local = None
    yield from files.look(data, running=local is not None)
    if local is None and not named:
        yield _port(int(edge.get("port") or DEFAULT_PORT))
    yield from _elsewhere(values, environ)
    yield from asyncio.run(cluster.look(processes))


def _settings(environ: Mapping[str, str]) -> "tuple[Values, list[Finding]]":
    """What the services make of the environment, and what they refuse of it."""
    from concurrent.futures import ThreadPoolExecutor

    from steward.cli.checkup.finding import failed, good
    from steward.cli.config import ConfigError, refuse_unknown, settings_of
    from steward.cli.layout import MODULES

    def ask(role: str) -> list[dict[str, Any]] | ConfigError:
        try:
            return settings_of(role, environ)
        except ConfigError as error:
            return error

    area, mend = "settings", "correct the environment; `steward config docs` lists all settings"
    values: dict[str, dict[str, str]] = {}
    findings = []
    with ThreadPoolExecutor(max_workers=len(MODULES)) as pool:
        for role, answer in zip(MODULES, pool.map(ask, MODULES), strict=True):
            if isinstance(answer, ConfigError):
                findings.append(failed(area, role, str(answer), mend))
                continue
            values[role] = {one["name"].partition(".")[2]: one["value"] for one in answer}
            changed = sum(one["value"] != one["default"] for one in answer)
            findings.append(good(area, role, f"{changed} of {len(answer)} are set"))
    try:
        refuse_unknown(environ)
    except ConfigError as error:
        findings.append(failed(area, "environment", str(error), mend))
    return values, findings


def _port(port: int) -> "Finding":
    from steward.cli.checkup.finding import failed, good
    from steward.cli.ports import PortInUse, PortReservations

    ports = PortReservations(HOST)
    try:
        ports.reserve(port)
    except PortInUse as error:
        return failed("machine", "port", str(error), "`steward up --port N` takes another one")
    finally:
        ports.close()
    return good("machine", "port", f"{HOST}:{port} is free")


def _elsewhere(values: Values, environ: Mapping[str, str]) -> "Iterator[Finding]":
    """Stores of a cluster of machines. A secret is hidden in `values`, and read where it is set."""
    from steward.cli.checkup import certificates, engines
    from steward.cli.store import ETCD
    from steward.config.settings import env_name

    registry = values.get("registry", {})
    store = registry.get("store", "")
    if store.startswith(ETCD):
        ca, cert, key = (_path(registry.get(f"store_{name}")) for name in ("ca", "cert", "key"))
        yield from certificates.look(ca, cert, key, certificates.now())
        yield from engines.etcd(store, ca, cert, key)
    for role in ("log", "auth"):
        url = environ.get(env_name(role, "store"), "")
        if url and role in values:
            pooled = values[role].get("pooled") == "true"
            yield engines.postgres(f"{role}.store", url, pooled)


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def _print(findings: "Sequence[Finding]", *, everything: bool) -> None:
    """A table of what matters, and one line that counts the rest."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = [each for each in findings if everything or each.verdict in ("warning", "failed")]
    console = Console(highlight=False)
    if shown:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("", "what", "found", "how to mend it"):
            table.add_column(title, overflow="fold")
        for each in shown:
            table.add_row(
                Text(_MARKS[each.verdict], style=_STYLES[each.verdict]),
                Text(f"{each.area}: {each.what}"),
                Text(each.found),
                Text(each.mend),
            )
        console.print(table)
    counted = [
        f"{name} {sum(each.verdict == verdict for each in findings)}"
        for verdict, name in (
            ("ok", "good"),
            ("warning", "warnings"),
            ("failed", "broken"),
            ("skipped", "not looked at"),
        )
    ]
    print(", ".join(counted) + ("" if everything else "; --all shows each"))
