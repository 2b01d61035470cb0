"""Copying a registry's store to another engine, and comparing the two.

A copy is refused into a store that was used, unless it is a copy of this one that nobody has
written to since. An interrupted copy is started again and goes on. Who serves the copy must not
serve the source any more: both would grant the same epochs.
"""

from collections.abc import AsyncIterator

from registry_service.store.etcd_keys import number_of
from registry_service.store.tools.contents import (
    Contents,
    Entry,
    Header,
    Part,
    Sum,
    sums_of,
)
from steward.runtime.store_tool import Step, StoreProblem


async def copy(source: Contents, destination: Contents, step: Step) -> int:
    """Bring the destination to what the source holds; how many entries had to be written."""
    header = source.header
    if header is None:
        raise StoreProblem(f"{source.name} holds no registry's store")
    refusal = _refusal(source, header, destination)
    if refusal:
        raise StoreProblem(refusal)
    return await destination.replace(header, _kept(source, header, destination), step)


def _refusal(source: Contents, header: Header, destination: Contents) -> str:
    """Why the destination must not be replaced; empty if it may be."""
    held, copied_from = destination.header, destination.copied_from
    if copied_from == header.instance:
        return ""
    if copied_from or (held is not None and held.used and held.instance != header.instance):
        return f"{destination.name} holds another registry's store"
    if held is not None and held.used:
        return (
            f"{destination.name} has been written to since it was copied, or it is what"
            f" {source.name} is a copy of: it is not replaced"
        )
    return ""


async def _kept(source: Contents, header: Header, destination: Contents) -> AsyncIterator[Entry]:
    """What the destination keeps of the source: of the ledger the newest rows, if not all."""
    most = destination.most_rows
    after = header.ledger - most if most is not None else 0
    async for entry in source.entries():
        if entry.part is not Part.LEDGER or number_of(entry.key) > after:
            yield entry


async def differences(
    source: Contents, destination: Contents, step: Step
) -> tuple[list[str], dict[Part, Sum]]:
    """Read both sides whole; what differs, for an operator, and what the destination holds."""
    header, found = source.header, []
    assert header is not None, "it was copied"
    if header != destination.header:
        found.append(f"{destination.name} is at {destination.header}, not at {header}")
    mine = await sums_of(_kept(source, header, destination), step)
    theirs = await sums_of(destination.entries(), step)
    for part in Part:
        if mine[part].number != theirs[part].number:
            found.append(f"{part}: {theirs[part].number}, not {mine[part].number}")
        elif mine[part] != theirs[part]:
            found.append(f"{part}: the digest is another")
    return found, theirs
