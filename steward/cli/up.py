"""`steward up`: the whole cluster on this machine, as real processes under one supervisor.

Registry, auth, log, agent nodes and edges run as on many machines, with embedded stores
in the data directory. `up` holds a lock on that directory, reserves the ports, starts
everything at once, writes `cluster.json` when all are ready, prints one URL with a
one-use login, and keeps the processes alive until it is told to stop.

Exit codes: 0 stopped as asked, 1 failed, 2 wrong use or environment, 130 stopped at once by
a second signal. When this process dies, by whatever cause, the kernel kills its children.
"""

import argparse
import asyncio
import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from steward.cli.cluster_file import ClusterFile, ProcessEntry, remove_cluster, write_cluster
from steward.cli.datadir import DataDirectory, DataDirectoryUnusable
from steward.cli.layout import DEFAULT_PORT, ClusterPlan, LayoutError, data_path, lay_out
from steward.cli.ports import PortInUse, PortReservations
from steward.cli.probe import metric_sums
from steward.cli.screen import EVENTS_METRIC, EventRate, Screen, make_screen, totals_of
from steward.cli.supervisor import (
    EXIT_WRONG_USE,
    Child,
    Death,
    ProcessSpec,
    StartFailed,
    Supervisor,
)
from steward.cli.terminal import foreground
from steward.errors import StewardError
from steward.model.keys import DEFAULT_TENANT, UserKey
from steward.rpc.keys import KeyUnusable

if TYPE_CHECKING:
    from steward.cli.operator_calls import Operator

REFRESH_S = 1.0
SLOW_START_S = 3.0
REPORT_FOR_S = 10.0
REPORT_AGAIN_S = 0.2
MOST_REPORTS = 256
EXIT_AT_ONCE = 130


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "up",
        help="start the whole cluster on this machine",
        description="Start registry, auth, log, agent nodes and edges on this machine.",
    )
    parser.add_argument("--data", type=data_path, default=".steward", metavar="DIR")
    parser.add_argument(
        "--port", type=int, metavar="N", help=f"edge i listens on N + i (default {DEFAULT_PORT})"
    )
    parser.add_argument("--agents", type=int, default=2, metavar="N", help="agent nodes (2)")
    parser.add_argument("--edges", type=int, default=1, metavar="N", help="edges (1)")
    parser.add_argument(
        "--agent",
        action="append",
        default=[],
        metavar="FILE_OR_MODULE:ATTR",
        help="serve this agent instead of the bundled demo; repeatable, the first is the default",
    )
    parser.add_argument(
        "--user", default="me", metavar="U", help="who the printed login is for (me)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the cluster until it is stopped; the exit code."""
    plan = ClusterPlan(args.agents, args.edges, args.port, tuple(args.agent))
    ports = PortReservations()
    try:
        with DataDirectory(args.data) as directory:
            specs = lay_out(plan, directory, ports, os.environ)
            with foreground(os.environ):
                user = UserKey(DEFAULT_TENANT, args.user)
                return asyncio.run(_Cluster(directory, specs, user).run())
    except (DataDirectoryUnusable, PortInUse, LayoutError) as error:
        print(f"steward: {error}", file=sys.stderr)
        return EXIT_WRONG_USE
    finally:
        ports.close()


class _Cluster:
    """One run of the cluster, from start to stop."""

    def __init__(
        self, directory: DataDirectory, specs: Sequence[ProcessSpec], user: UserKey
    ) -> None:
        self._directory = directory
        self._user = user
        self._screen: Screen = make_screen()
        self._supervisor = Supervisor(
            specs, os.environ, on_ready=self._on_ready, on_death=self._on_death
        )
        self._operator: Operator | None = None
        self._up = False
        self._at_once = False
        self._stopping = asyncio.Event()
        self._reports: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        children = self._supervisor.start()
        serving = asyncio.create_task(self._serve())
        told = asyncio.create_task(self._stopping.wait())
        code = 0
        try:
            await asyncio.wait({serving, told, *children}, return_when=asyncio.FIRST_COMPLETED)
            if not told.done():
                code = self._explain(serving)
        finally:
            serving.cancel()
            told.cancel()
            await asyncio.wait({serving, told})
            await self._shut_down()
        return EXIT_AT_ONCE if self._at_once else code

    async def _serve(self) -> None:
        """Bring the cluster up, then show it, forever. Raises StartFailed, StewardError."""
        began = time.monotonic()
        self._operator = await self._make_operator()
        ready = asyncio.create_task(self._supervisor.wait_ready())
        try:
            while not (await asyncio.wait({ready}, timeout=SLOW_START_S))[0]:
                waiting = ", ".join(f"{name} ({why})" for name, why in self._supervisor.unready())
                self._screen.say(f"waiting for {waiting}")
            ready.result()
        finally:
            ready.cancel()
        self._write_cluster_file()
        self._up = True
        code = await self._operator.create_login(self._address("auth"), self._user)
        self._screen.announce(f"{self._url()}/#login={code}")
        self._screen.say(f"ready after {time.monotonic() - began:.1f} s; Ctrl-C drains and stops")
        await self._keep_showing()

    async def _make_operator(self) -> "Operator":
        # In a thread: while gRPC is imported the loop goes on watching the children.
        await asyncio.to_thread(importlib.import_module, "steward.cli.operator_calls")
        from steward.cli.operator_calls import Operator

        return Operator.of_data(self._directory.path)

    async def _keep_showing(self) -> None:
        rate = EventRate()
        children = self._supervisor.children
        while True:
            pages = await asyncio.gather(*(metric_sums(child.spec.ops) for child in children))
            by_id = {child.spec.id: page for child, page in zip(children, pages, strict=True)}
            counts = {name: page.get(EVENTS_METRIC, 0.0) for name, page in by_id.items() if page}
            per_second = rate.update(time.monotonic(), counts)
            self._screen.show(children, totals_of(by_id, per_second))
            # Of no consequence when the disk is full: the next look tries again.
            with suppress(OSError):
                self._directory.cut_logs()
            await asyncio.sleep(REFRESH_S)

    async def _shut_down(self) -> None:
        self._screen.close()
        if self._stopping.is_set() and not self._at_once:
            self._screen.say("stopping; Ctrl-C again stops at once")
        killed = await self._supervisor.stop()
        for report in self._reports:
            report.cancel()
        if self._reports:
            await asyncio.wait(self._reports)
        if self._operator is not None:
            await self._operator.close()
        remove_cluster(self._directory.path)
        if killed and not self._at_once:
            self._screen.say(f"killed, because they did not stop in time: {', '.join(killed)}")

    def _explain(self, serving: "asyncio.Task[None]") -> int:
        """Say why the cluster ended by itself; the exit code."""
        if not serving.done():
            raise RuntimeError("a supervised process was given up")
        try:
            serving.result()
        except StartFailed as failure:
            wrong_use = failure.code == EXIT_WRONG_USE
            for line in failure.words[-1:] if wrong_use else failure.words:
                self._screen.say(line.removeprefix("steward: "))
            if wrong_use:
                return EXIT_WRONG_USE
            self._screen.say(f"{failure}; its output is in {failure.spec.log}")
        except StewardError as error:
            self._screen.say(f"no login could be made: {error.message} ({error.reason})")
        except KeyUnusable as error:
            self._screen.say(str(error))
            return EXIT_WRONG_USE
        return 1

    def _on_signal(self) -> None:
        if self._stopping.is_set():
            self._at_once = True
            self._supervisor.kill()
        self._stopping.set()

    def _on_ready(self, child: Child) -> None:
        if self._up:
            self._screen.say(f"{child.spec.id} is ready again (pid {child.pid})")
            self._write_cluster_file()

    def _on_death(self, death: Death) -> None:
        spec = death.spec
        if spec.role == "agent" and death.pid and len(self._reports) < MOST_REPORTS:
            report = asyncio.create_task(self._report(death))
            self._reports.add(report)
            report.add_done_callback(self._reports.discard)
        if not self._up:
            return
        how = f"signal {-death.code}" if death.code < 0 else f"code {death.code}"
        self._screen.say(f"{spec.id} ended by {how}; starts again in {death.restart_in_s:g} s")
        for line in death.words if death.code > 0 else ():
            self._screen.say(f"  {spec.id}: {line}")

    async def _report(self, death: Death) -> None:
        """Evidence A: this supervisor has reaped the process. Told until the registry hears it."""
        evidence = f"reaped by the supervisor, exit code {death.code}"
        until = time.monotonic() + REPORT_FOR_S
        while time.monotonic() < until:
            if self._operator is not None:
                try:
                    await self._operator.report_death(
                        self._address("registry"), death.spec.id, death.pid, evidence
                    )
                    return
                except StewardError as error:
                    if not error.row.retry:
                        self._screen.say(f"the death of {death.spec.id} was refused: {error}")
                        return
            await asyncio.sleep(REPORT_AGAIN_S)

    def _write_cluster_file(self) -> None:
        entries = tuple(
            ProcessEntry(spec.role, spec.id, child.pid, spec.grpc, spec.http, spec.ops)
            for child in self._supervisor.children
            for spec in (child.spec,)
        )
        try:
            write_cluster(self._directory.path, ClusterFile(os.getpid(), self._url(), entries))
        except OSError as error:
            self._screen.say(f"cluster.json can't be written: {error.strerror}")

    def _url(self) -> str:
        return f"http://{self._first('edge').http}"

    def _address(self, role: str) -> str:
        address = self._first(role).grpc
        if address is None:
            raise LookupError(f"{role} has no gRPC address")
        return address

    def _first(self, role: str) -> ProcessSpec:
        return next(c.spec for c in self._supervisor.children if c.spec.role == role)
