"""Which cluster an operator's command is about, and the key that makes the caller an operator.

On the machine of a `steward up`, `--data DIR` is enough: the address is in its `cluster.json`,
the key beside it. Any other cluster is named by `--registry HOST:PORT` (the registry's gRPC
address), `--key-file` (its control key) and `--cluster` (its name), or by
`STEWARD_OPERATOR_REGISTRY`, `STEWARD_OPERATOR_KEY_FILE` and `STEWARD_OPERATOR_CLUSTER`; the command
line wins, so that `--data` means that directory whatever the environment says.

Keys are read and never made: a new one would be of no cluster. Whoever can read the control key
is an operator; the registry checks the token that is signed by it, its cluster and its role.
"""

import argparse
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steward.cli.cluster_file import CLUSTER_NAME, ClusterFile, read_cluster
from steward.cli.layout import data_path

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

DEFAULT_DATA = ".steward"
ENV_REGISTRY = "STEWARD_OPERATOR_REGISTRY"
ENV_KEY_FILE = "STEWARD_OPERATOR_KEY_FILE"
ENV_CLUSTER = "STEWARD_OPERATOR_CLUSTER"
ENVIRONMENT = frozenset({ENV_REGISTRY, ENV_KEY_FILE, ENV_CLUSTER})

_ADDRESS = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")
_HIGHEST_PORT = 65_535


class WrongTarget(Exception):
    """The options, or the environment, name no cluster. One line that says what to do."""


@dataclass(frozen=True, slots=True)
class Target:
    """A cluster and the right to operate it. `local` is its file, None for one elsewhere."""

    registry: str
    cluster: str
    key: "Ed25519PrivateKey"
    data: Path
    local: ClusterFile | None


def add_target(parser: argparse.ArgumentParser) -> None:
    """The options that say which cluster is meant."""
    group = parser.add_argument_group("which cluster")
    group.add_argument(
        "--data",
        type=data_path,
        metavar="DIR",
        help=f"that of a `steward up` on this machine ({DEFAULT_DATA})",
    )
    group.add_argument(
        "--registry", metavar="HOST:PORT", help=f"the registry of another one [{ENV_REGISTRY}]"
    )
    group.add_argument(
        "--key-file",
        type=Path,
        metavar="FILE",
        help=f"the control key (keys/control.key of the data directory) [{ENV_KEY_FILE}]",
    )
    group.add_argument("--cluster", metavar="NAME", help=f"({CLUSTER_NAME}) [{ENV_CLUSTER}]")


def target_of(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Target:
    """What the options of `add_target` mean.

    Raises NoCluster, WrongTarget, and KeyUnusable of `steward.rpc.keys`.
    """
    from steward.rpc.keys import CONTROL_KEY, KeyUnusable, load_key

    registry = args.registry or ("" if args.data else environ.get(ENV_REGISTRY, ""))
    data: Path = args.data or data_path(DEFAULT_DATA)
    local = None if registry else read_cluster(data)
    if registry:
        address_of(registry, "--registry")
    named = args.key_file or ("" if local else environ.get(ENV_KEY_FILE, ""))
    path = Path(named) if named else data / "keys" / CONTROL_KEY
    try:
        key = load_key(path)
    except KeyUnusable as error:
        if named or local:
            raise
        hint = f"name the control key of the cluster: --key-file, or {ENV_KEY_FILE}"
        raise KeyUnusable(f"{error}; {hint}") from None
    cluster = args.cluster or ("" if local else environ.get(ENV_CLUSTER, "")) or CLUSTER_NAME
    address = local.address("registry") if local else registry
    return Target(address, cluster, key, data, local)


def address_of(text: str, option: str) -> str:
    """`text` if it is HOST:PORT. Raises WrongTarget, which names the option."""
    found = _ADDRESS.fullmatch(text)
    if found is None or not 0 < int(found[2]) <= _HIGHEST_PORT:
        raise WrongTarget(f"{option}: {text!r} is not HOST:PORT")
    return text
