"""`steward config`: the settings of all services, as the services themselves declare them.

The command imports no service: it starts each with `--print-settings`, which makes
`steward.config.settings.load` print what it knows and exit. So the list can't differ
from what a service takes.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from steward.cli.layout import MODULES, service_command
from steward.cli.target import ENVIRONMENT
from steward.config.settings import PREFIX, PRINT_OPTION

TIMEOUT_S = 30.0
NOT_OF_SERVICES = ENVIRONMENT | {"STEWARD_CI", "STEWARD_E2E_URL", "STEWARD_E2E_TOKEN"}
"""Names of the environment that belong to operators and tests, and not to a service."""


class ConfigError(Exception):
    """A service refused its settings, or would not tell them. One line."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "config",
        help="list and check the settings of all services",
        description="List and check the settings of all services.",
    )
    parser.add_argument(
        "action",
        choices=("defaults", "docs", "check"),
        help="defaults: NAME=value lines; docs: a Markdown table; check: the environment",
    )


def run(args: argparse.Namespace) -> int:
    """Print defaults or docs, or check the environment; 2 when it has a mistake."""
    environ = dict(os.environ) if args.action == "check" else _without_settings(os.environ)
    try:
        with ThreadPoolExecutor(max_workers=len(MODULES)) as pool:
            answers = pool.map(lambda role: settings_of(role, environ), MODULES)
            sections = list(zip(MODULES, answers, strict=True))
        if args.action == "check":
            refuse_unknown(os.environ)
    except ConfigError as error:
        print(f"steward: {error}", file=sys.stderr)
        return 2
    lines = {"defaults": _defaults, "docs": _docs, "check": _checked}[args.action]
    for line in lines(sections):
        print(line)
    return 0


Sections = list[tuple[str, list[dict[str, Any]]]]


def settings_of(role: str, environ: Mapping[str, str]) -> list[dict[str, Any]]:
    """The settings of a service in an environment, as `describe` gives them. Raises ConfigError."""
    try:
        answer = subprocess.run(
            [*service_command(role), PRINT_OPTION],
            env=dict(environ),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{role}: no answer within {TIMEOUT_S:.0f} s") from None
    if answer.returncode != 0:
        words = answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"]
        raise ConfigError(words[-1].removeprefix("steward: "))
    settings: list[dict[str, Any]] = json.loads(answer.stdout)
    return settings


def _without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if not name.startswith(PREFIX)}


def refuse_unknown(environ: Mapping[str, str]) -> None:
    """Raise ConfigError for a name with our prefix that is of no service."""
    sections = tuple(f"{PREFIX}{role.upper()}_" for role in MODULES)
    for name in environ:
        if (
            name.startswith(PREFIX)
            and name not in NOT_OF_SERVICES
            and not name.startswith(sections)
        ):
            raise ConfigError(f"{name}: no such setting; `steward config docs` lists them")


def _defaults(sections: Sections) -> Iterator[str]:
    for _, settings in sections:
        for one in settings:
            yield f"{one['env']}={one['default']}"


def _checked(sections: Sections) -> Iterator[str]:
    """What differs from the defaults."""
    for _, settings in sections:
        for one in settings:
            if one["value"] != one["default"]:
                yield f"{one['env']}={one['value']}"


def _docs(sections: Sections) -> Iterator[str]:
    for role, settings in sections:
        yield from (
            f"## {role}",
            "",
            "| environment | option | default | what |",
            "|---|---|---|---|",
        )
        for one in settings:
            unit = f" [{one['unit']}]" if one["unit"] else ""
            default = f"`{one['default']}`" if one["default"] else ""
            yield f"| `{one['env']}` | `{one['option']}` | {default} | {one['help']}{unit} |"
        yield ""
