"""A registry's store at rest, whichever engine holds it: what is copied and checked.

All that a store holds is a header and entries, and an entry is the same bytes for all engines:
the key and the value by which it is kept in etcd (`etcd_keys`), but that each row of the ledger is
one of its own. So a copy can be compared with what it is a copy of.
"""

import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

from steward.runtime.store_tool import Step


class Part(StrEnum):
    """What entries are kept in, in the order in which they are read."""

    HOLDS = "holds"
    LEDGER = "ledger"
    NODES = "nodes"
    PLACEMENTS = "placements"
    TOMBS = "tombs"
    VIOLATIONS = "violations"


@dataclass(frozen=True, slots=True)
class Header:
    """How far a store is. `instance` is random, made with the store, and moves with it.

    `ledger` and `violations` are the numbers of the newest rows; `refusals` and `breaches` count
    all violations ever. `placements` is how many there are, as far as the engine itself says that;
    None: it does not.
    """

    instance: str
    term: int
    generation: int
    revision: int
    ledger: int
    violations: int
    refusals: int
    breaches: int
    placements: int | None = field(default=None, compare=False)

    @property
    def used(self) -> bool:
        """Whether anything was ever granted or recorded."""
        return bool(self.revision or self.ledger or self.violations)


class Entry(NamedTuple):
    """One thing that is kept. `key` is below the part, escaped; `value` is JSON."""

    part: Part
    key: bytes
    value: bytes


class Contents(Protocol):
    """A store at rest. Methods raise StoreProblem, or what the engine raises when it fails."""

    name: str
    most_rows: int | None
    """How many rows of the ledger it keeps, the newest; None: all."""

    async def open(self) -> None:
        """Take it, so that no registry can serve it meanwhile. Raises EnvironmentUnusable too."""
        ...

    async def close(self) -> None:
        """Let go. Safe to call twice."""
        ...

    @property
    def header(self) -> Header | None:
        """What was found; None: no registry has ever used it."""
        ...

    @property
    def copied_from(self) -> str:
        """The instance of which this is a copy, or the beginning of one; empty: it is none.

        Not of a store that was written to since.
        """
        ...

    async def count(self) -> int:
        """About how many entries there are."""
        ...

    def entries(self) -> AsyncIterator[Entry]:
        """All of them, part by part."""
        ...

    async def replace(self, header: Header, entries: AsyncIterator[Entry], step: Step) -> int:
        """Hold exactly these; returns how many had to be written.

        If it is interrupted, `copied_from` tells, and the same call goes on.
        """
        ...

    async def findings(self) -> list[str]:
        """What is wrong with the engine's own structures."""
        ...


@dataclass(slots=True)
class Sum:
    """Count and digest of the entries of a part, in whatever order they come."""

    number: int = 0
    digest: int = 0

    def add(self, entry: Entry) -> None:
        hashed = hashlib.blake2b(len(entry.key).to_bytes(8, "little"), digest_size=16)
        hashed.update(entry.key + entry.value)
        self.number += 1
        self.digest = (self.digest + int.from_bytes(hashed.digest(), "little")) % (1 << 128)


async def sums_of(entries: AsyncIterator[Entry], step: Step) -> dict[Part, Sum]:
    """Read entries to their end, and sum them up."""
    sums = {part: Sum() for part in Part}
    done = 0
    async for entry in entries:
        sums[entry.part].add(entry)
        done += 1
        if done % 500 == 0:
            step(500)
    step(done % 500)
    return sums
