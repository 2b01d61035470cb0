"""A real Prometheus for tests and for `make observe`: it scrapes the processes of a `steward up`.

It needs the programs `prometheus` and `promtool` (Debian: prometheus); `missing()` says what is
not there. It scrapes with exemplars, evaluates the committed rules, keeps its data where the
caller says, listens on loopback, and dies with the process that started it. What it scrapes is
in a file that may be written anew at any time, since processes come and go.
"""

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from steward.telemetry.promql import JOB
from steward.testing.local_cluster import free_ports
from steward.testing.waiting import wait_for

RULES = ("recordings.yml", "alerts.yml")
INSTALL = "Debian and Ubuntu: `apt-get install --no-install-recommends prometheus`"
TARGETS = "targets.json"
READY_S = 30.0
STOP_S = 10.0
ASK_S = 10.0
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def missing() -> str:
    """Why no Prometheus can be started here; empty when one can."""
    absent = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
    return f"skipped: no {' and no '.join(absent)} ({INSTALL})" if absent else ""


def targets_of(processes: Iterable[Mapping[str, Any]]) -> str:
    """The content of the file of targets, from the entries of `cluster.json`."""
    return json.dumps(
        [
            {
                "targets": [process["ops"]],
                "labels": {"service": process["role"], "instance": process["id"]},
            }
            for process in processes
            if process["ops"]
        ]
    )


def write_config(directory: Path, rules: Path, every_s: float) -> Path:
    """Write the configuration: the rules of the directory `rules`, targets from the file beside it.

    `every_s` is the time between two scrapes, and between two evaluations of the rules.
    """
    files = "".join(f"  - {rules.absolute() / name}\n" for name in RULES)
    every = f"{int(every_s * 1000)}ms"
    config = directory / "prometheus.yml"
    config.write_text(
        f"global:\n  scrape_interval: {every}\n  scrape_timeout: {every}\n"
        f"  evaluation_interval: {every}\n"
        f"rule_files:\n{files}"
        f"scrape_configs:\n  - job_name: {JOB}\n    file_sd_configs:\n"
        f"      - files: [{directory.absolute() / TARGETS}]\n        refresh_interval: 2s\n"
    )
    return config


class Prometheus:
    """One Prometheus process."""

    def __init__(self, directory: Path, process: "subprocess.Popen[bytes]", port: int) -> None:
        self.directory = directory
        self.process = process
        self.url = f"http://127.0.0.1:{port}"

    @classmethod
    def start(
        cls, directory: Path, rules: Path, every_s: float = 1.0, port: int | None = None
    ) -> Self:
        """Start one, and wait until it answers. Targets are what `scrape` says.

        Raises RuntimeError with the end of its log when it ends instead.
        """
        directory.mkdir(parents=True, exist_ok=True)
        port = port or free_ports(1)
        if not (directory / TARGETS).exists():
            (directory / TARGETS).write_text("[]")
        log = directory / "prometheus.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-c", _DIE_WITH_PARENT, "prometheus"),
                    f"--config.file={write_config(directory, rules, every_s)}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                    "--enable-feature=exemplar-storage",
                    "--log.level=warn",
                ],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        made = cls(directory, process, port)
        wait_for(lambda: made.is_up() or process.poll() is not None, READY_S, "Prometheus answers")
        if process.poll() is not None:
            raise RuntimeError(f"Prometheus ended: {log.read_text()[-2000:]}")
        return made

    def is_up(self) -> bool:
        """Whether it takes queries."""
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=ASK_S) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def scrape(self, processes: Iterable[Mapping[str, Any]]) -> None:
        """Scrape these from now on: entries of `cluster.json`."""
        target = self.directory / TARGETS
        written = target.with_suffix(".new.json")
        written.write_text(targets_of(processes))
        os.replace(written, target)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression gives now. Raises ValueError for one that is wrong."""
        answer = self._ask("query", query=expression)
        if answer["resultType"] == "scalar":
            return [{"metric": {}, "value": answer["result"]}]
        result: list[dict[str, Any]] = answer["result"]
        return result

    def exemplars(self, expression: str, start: float, end: float) -> list[dict[str, Any]]:
        """The exemplars of the series of an expression between two Unix times."""
        query = {"query": expression, "start": str(start), "end": str(end)}
        result: list[dict[str, Any]] = self._ask("query_exemplars", **query)
        return result

    def rules(self) -> list[dict[str, Any]]:
        """All rules, with their health and their last error."""
        return [rule for group in self._ask("rules")["groups"] for rule in group["rules"]]

    def targets(self) -> list[dict[str, Any]]:
        """What it scrapes, with its health, its last error and its duration in seconds."""
        found: list[dict[str, Any]] = self._ask("targets")["activeTargets"]
        return found

    def _ask(self, what: str, **parameters: str) -> Any:
        url = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=ASK_S) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(error.read().decode(errors="replace")) from None

    def end(self) -> None:
        """Stop it. Safe to call twice."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(STOP_S)
