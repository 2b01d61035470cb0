"""`python -m registry_service.store.tools`: copy or check registries' stores at rest.

`steward store` calls it. What is needed to reach etcd beside its URL is taken from the settings
of the registry in the environment (`STEWARD_REGISTRY_STORE_CA` and the like).

Exit codes: 0 done and well, 1 something is wrong with what a store holds, or it failed on the
way, 2 wrong use or a store that can't be used.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from registry_service.settings import RegistrySettings
from registry_service.store.choice import ETCD, etcd_access
from registry_service.store.etcd_client import EtcdAway, EtcdError
from registry_service.store.tools.checking import check
from registry_service.store.tools.contents import Contents, Part
from registry_service.store.tools.copying import copy, differences
from registry_service.store.tools.etcd_contents import EtcdContents
from registry_service.store.tools.sqlite_contents import SqliteContents
from steward.config.settings import load
from steward.runtime.clock import boot_ms
from steward.runtime.store_tool import WRONG, StoreProblem, bar, run, tell_faults


def contents_of(text: str, *, make: bool, alone: bool) -> Contents:
    """The store that `sqlite:DIR` or `etcd://…` names. Raises StoreProblem, SettingsError."""
    if text.startswith(ETCD):
        settings = load(RegistrySettings, ["--store", text], os.environ)
        access, cluster = etcd_access(settings)
        return EtcdContents(access, cluster, boot_ms, alone=alone)
    scheme, colon, path = text.partition(":")
    if scheme == "sqlite" and colon and path:
        return SqliteContents(Path(path), make=make)
    raise StoreProblem("name a registry's store as sqlite:DIR or etcd://host,host/cluster")


async def _copy(from_: str, to: str) -> int:
    source = contents_of(from_, make=False, alone=True)
    destination = contents_of(to, make=True, alone=True)
    try:
        await source.open()
        await destination.open()
        entries = await source.count()
        with bar("copying", entries) as step:
            written = await copy(source, destination, step)
        with bar("comparing", 2 * entries) as step:
            found, sums = await differences(source, destination, step)
    finally:
        await source.close()
        await destination.close()
    if found:
        for text in found:
            print(f"steward: {text}", file=sys.stderr)
        return WRONG
    total = sum(each.number for each in sums.values())
    print(
        f"{destination.name} has all of {source.name}: {sums[Part.PLACEMENTS].number} placements,"
        f" {total} entries, compared by digest ({written} were written)"
    )
    return 0


async def _check(name: str) -> int:
    contents = contents_of(name, make=False, alone=False)
    try:
        await contents.open()
        with bar("checking", await contents.count()) as step:
            found, number, counts = await check(contents, step)
    finally:
        await contents.close()
    total = sum(counts.values())
    whole = f"{counts[Part.PLACEMENTS]} placements, {total} entries"
    return tell_faults(contents.name, found, number, whole)


def main(words: Sequence[str]) -> int:
    """Do what the words say; the exit code."""
    return run(words, __doc__, _check, _copy, (EtcdError, EtcdAway))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
