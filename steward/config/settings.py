"""Settings declared once: names, environment, command line, defaults and docs come from one field.

A settings class is a frozen dataclass whose fields are made with `setting(...)`. The
field `drain_spread_ms` of the section `edge` is `edge.drain_spread_ms` in docs,
`STEWARD_EDGE_DRAIN_SPREAD_MS` in the environment and `--drain-spread-ms` on the
command line; the command line wins over the environment, that over the default.
Unknown names are errors in both places: a misspelt setting must not be a silent default.
"""

import argparse
import dataclasses
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

PREFIX = "STEWARD_"

PRINT_OPTION = "--print-settings"
"""Makes `load` print all settings as JSON and end the process; `steward config` asks so."""

SECRET = "(secret)"


class SettingsError(Exception):
    """A setting that can't be used. The text is one line that says what to do; exit code 2."""


def setting(default: Any, *, help: str, unit: str = "", secret: bool = False) -> Any:
    """Declare a field. `unit` is for docs (`ms`, `bytes`, `1/s`); a secret is never printed."""
    return dataclasses.field(
        default=default, metadata={"help": help, "unit": unit, "secret": secret}
    )


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """What every service has. Subclasses set `SECTION` and add their own fields."""

    id: str = setting(
        "", help="Name of this process; unique among its role. Default: role and host."
    )
    cluster: str = setting("steward", help="Cluster name; services of another cluster are refused.")
    data: Path = setting(Path(".steward"), help="Directory of keys and embedded stores.")
    host: str = setting("127.0.0.1", help="Address that servers listen on.")
    advertise: str = setting(
        "", help="host that others reach this process by. Default: the value of `host`."
    )
    grpc_port: int = setting(0, help="Port of the gRPC server; 0 takes a free one.")
    ops_port: int = setting(0, help="Port of /metrics, /healthz and /readyz; 0 takes a free one.")
    parent_pid: int = setting(0, help="Die when this process dies (set by `steward up`); 0: never.")
    log_format: str = setting("auto", help="`json`, `text`, or `auto`: text on a terminal.")
    log_level: str = setting("info", help="`debug`, `info`, `warning` or `error`.")
    otlp_endpoint: str = setting("", help="OTLP gRPC endpoint for traces; empty turns tracing off.")
    trace_ratio: float = setting(1.0, help="Share of new traces that are sampled.", unit="0..1")


SettingsT = TypeVar("SettingsT")


def section_of(cls: type) -> str:
    """The section name of a settings class, from its `SECTION` class attribute."""
    return str(getattr(cls, "SECTION"))  # noqa: B009 (the attribute is a ClassVar of subclasses)


def env_name(section: str, field: str) -> str:
    """Name in the environment: `STEWARD_EDGE_OPS_PORT`."""
    return f"{PREFIX}{section}_{field}".upper()


def _parse(text: str, kind: Any, name: str) -> Any:
    origin = typing.get_origin(kind)
    if origin is types.UnionType:
        kind = next(arm for arm in typing.get_args(kind) if arm is not type(None))
        origin = typing.get_origin(kind)
    if origin is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind is bool:
        if text.lower() in ("1", "true", "yes", "on"):
            return True
        if text.lower() in ("0", "false", "no", "off"):
            return False
        raise SettingsError(f"{name}: {text!r} is not a boolean; use true or false")
    try:
        return kind(text)
    except ValueError:
        raise SettingsError(f"{name}: {text!r} is not a valid {kind.__name__}") from None


def load(cls: type[SettingsT], argv: Sequence[str], environ: Mapping[str, str]) -> SettingsT:
    """Build `cls` from a command line and an environment.

    Raises SettingsError for a value of the wrong type and for unknown names, also in the
    environment under the section's prefix. With `--print-settings`, prints what it knows
    as JSON and raises SystemExit(0).
    """
    section = section_of(cls)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.metadata}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    known = {env_name(section, name): name for name in fields}
    for key, text in environ.items():
        if key.startswith(f"{PREFIX}{section.upper()}_"):
            if key not in known:
                raise SettingsError(f"{key}: no such setting; `steward config docs` lists them")
            values[known[key]] = _parse(text, hints[known[key]], key)
    parser = _Parser(prog=f"steward {section}", description=f"Settings of `{section}`.")
    for name, field in fields.items():
        flag = "--" + name.replace("_", "-")
        unit = f" [{field.metadata['unit']}]" if field.metadata["unit"] else ""
        parser.add_argument(flag, dest=name, help=field.metadata["help"].replace("%", "%%") + unit)
    parser.add_argument(PRINT_OPTION, action="store_true", help=argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    printing = given.pop(PRINT_OPTION.strip("-").replace("-", "_"))
    for name, text in given.items():
        if text is not None:
            values[name] = _parse(text, hints[name], "--" + name.replace("_", "-"))
    loaded = cls(**values)
    if printing:
        json.dump(describe(loaded), sys.stdout, indent=2)
        print()
        raise SystemExit(0)
    return loaded


def describe(settings: Any) -> list[dict[str, str]]:
    """All settings of an instance with names, default, value, unit and help; secrets hidden."""
    section = section_of(type(settings))
    return [
        {
            "name": f"{section}.{field.name}",
            "env": env_name(section, field.name),
            "option": "--" + field.name.replace("_", "-"),
            "default": _shown(field.default, field),
            "value": _shown(getattr(settings, field.name), field),
            "unit": field.metadata["unit"],
            "help": field.metadata["help"],
        }
        for field in dataclasses.fields(settings)
        if field.metadata
    ]


def _shown(value: Any, field: "dataclasses.Field[Any]") -> str:
    """A value as it would be written in the environment."""
    if field.metadata["secret"] and value:
        return SECRET
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise SettingsError(f"{self.prog}: {message}")
