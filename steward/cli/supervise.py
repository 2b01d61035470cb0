"""`steward supervise agent …`: run an agent node under a process that tells of its death.

For containers and service managers, where no `steward up` watches. The supervisor
starts the node with the same settings, passes signals on, reaps it, and reports a death
that nobody asked for to the registry as proof (evidence A): its users are taken over at once
instead of at the end of a lease. Then it exits with the node's code, and whoever started it
starts it again. When it dies itself, the kernel kills the node: both end together.

It holds no gRPC while the node runs; what it needs is imported when there is a death to report.
"""

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from steward.cli.cluster_file import CLUSTER_NAME
from steward.cli.layout import MODULES
from steward.config.settings import env_name

REPORT_FOR_S = 5.0
REPORT_AGAIN_S = 0.1
SUPERVISED = ("agent",)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "supervise",
        help="run an agent node under a process that tells of its death",
        description="Run an agent node; report its death to the registry as proof.",
    )
    parser.add_argument("role", choices=SUPERVISED)
    parser.add_argument(
        "settings", nargs=argparse.REMAINDER, metavar="…", help="as for `steward agent`"
    )


def run(args: argparse.Namespace) -> int:
    """Run the node to its end; its exit code, 128 + n for signal n."""
    node_id = _setting(args.role, "id", args.settings, os.environ)
    registry = _setting(args.role, "registry", args.settings, os.environ)
    data = _setting(args.role, "data", args.settings, os.environ) or ".steward"
    cluster = _setting(args.role, "cluster", args.settings, os.environ) or CLUSTER_NAME
    if not node_id or not registry:
        print(
            "steward: supervise agent: --id and --registry are needed (or STEWARD_AGENT_ID, "
            "STEWARD_AGENT_REGISTRY), to report a death under the right name",
            file=sys.stderr,
        )
        return 2

    async def report(pid: int, code: int) -> None:
        await _report(registry, Path(data), cluster, node_id, pid, code)

    return asyncio.run(_supervise(args.role, args.settings, report))


async def _supervise(
    role: str, settings: Sequence[str], report: Callable[[int, int], Awaitable[None]]
) -> int:
    command = (sys.executable, "-P", "-m", MODULES[role], *settings)
    process = await asyncio.create_subprocess_exec(*command, "--parent-pid", str(os.getpid()))
    asked = False

    def pass_on(number: signal.Signals) -> None:
        nonlocal asked
        asked = True
        if process.returncode is None:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, pass_on, number)
    code = await process.wait()
    if not asked:
        await report(process.pid, code)
    return code if code >= 0 else 128 - code


async def _report(
    registry: str, data: Path, cluster: str, node_id: str, pid: int, code: int
) -> None:
    """Tell the registry, again and again for a while: it may be starting too."""
    from steward.cli.operator_calls import Operator
    from steward.errors import StewardError

    how = f"signal {-code}" if code < 0 else f"code {code}"
    until = time.monotonic() + REPORT_FOR_S
    async with Operator.of_data(data, cluster) as operator:
        while True:
            try:
                evidence = f"reaped by its supervisor, {how}"
                await operator.report_death(registry, node_id, pid, evidence)
                return
            except StewardError as error:
                if not error.row.retry or time.monotonic() > until:
                    print(f"steward: the death of {node_id}: {error}", file=sys.stderr)
                    return
            await asyncio.sleep(REPORT_AGAIN_S)


def _setting(role: str, field: str, settings: Sequence[str], environ: Mapping[str, str]) -> str:
    """The value of one setting of the service, by the service's own rules of precedence."""
    flag = "--" + field.replace("_", "-")
    for index, word in enumerate(settings):
        if word == flag and index + 1 < len(settings):
            return settings[index + 1]
        if word.startswith(flag + "="):
            return word.partition("=")[2]
    return environ.get(env_name(role, field), "")
