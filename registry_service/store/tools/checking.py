"""Whether a registry's store holds together: what epochs and the ownership of users rely on."""

from collections import defaultdict
from collections.abc import Callable, Iterator

from registry_service.store.etcd_keys import (
    Keys,
    load_hold,
    load_node,
    load_placement,
    load_rows,
    load_tomb,
    load_violation,
)
from registry_service.store.tools.contents import Contents, Entry, Header, Part
from steward.model.keys import GENERATION_SHIFT, UserKey
from steward.runtime.store_tool import Step

MOST_FINDINGS = 100

_PUTS = ("place", "takeover")
_KEYS = Keys("check")


async def check(contents: Contents, step: Step) -> tuple[list[str], int, dict[Part, int]]:
    """What is wrong, at most MOST_FINDINGS texts, how many things it are, and what there is."""
    header = contents.header
    checked = _Checker(header) if header is not None else None
    found = await contents.findings()
    counts: dict[Part, int] = defaultdict(int)
    number, done = len(found), 0
    async for entry in contents.entries():
        counts[entry.part] += 1
        done += 1
        if done % 500 == 0:
            step(500)
        texts = checked.entry(entry) if checked else iter([f"{entry.part}, and no head"])
        for text in texts:
            number += 1
            if len(found) < MOST_FINDINGS:
                found.append(text)
    for text in checked.end(counts) if checked else ():
        number += 1
        found.append(text)
    return found[:MOST_FINDINGS], number, counts


class _Checker:
    """Takes the entries of one store, in the order of the parts."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._mark = header.generation << GENERATION_SHIFT | header.revision
        self._row = 0
        self._revision = 0
        # What the ledger tells of a user at last.
        self._told: dict[UserKey, tuple[str, int]] = {}
        self._epochs: set[int] = set()
        self._of_part: dict[Part, Callable[[Entry], Iterator[str]]] = {
            Part.HOLDS: self._hold,
            Part.LEDGER: self._ledger,
            Part.NODES: self._node,
            Part.PLACEMENTS: self._placement,
            Part.TOMBS: self._tomb,
            Part.VIOLATIONS: self._violation,
        }

    def entry(self, entry: Entry) -> Iterator[str]:
        name = f"{entry.part}/{entry.key.decode(errors='replace')}"
        try:
            for text in self._of_part[entry.part](entry):
                yield f"{name} {text}"
        except (ValueError, KeyError, TypeError):
            yield f"{name} can't be read"

    def end(self, counts: dict[Part, int]) -> Iterator[str]:
        header = self._header
        if self._row and self._row != header.ledger:
            yield f"the last row of the ledger is {self._row}, and the head says {header.ledger}"
        said = header.placements
        if said is not None and said != counts[Part.PLACEMENTS]:
            yield f"the head says {said} placements, and there are {counts[Part.PLACEMENTS]}"
        for user, (kind, epoch) in self._told.items():
            if kind in _PUTS:
                yield f"{user.tenant}/{user.user} was placed under {epoch}, and is nowhere"

    def _ledger(self, entry: Entry) -> Iterator[str]:
        (row,) = load_rows(entry.value)
        if self._row and row.number != self._row + 1:
            yield f"is row {row.number}, after {self._row}"
        if row.revision < self._revision or row.revision > self._header.revision:
            yield f"is of revision {row.revision}, between {self._revision} and the head's"
        self._row, self._revision = row.number, row.revision
        if row.kind in (*_PUTS, "release"):
            self._told[UserKey(row.tenant, row.user)] = (row.kind, row.epoch)

    def _placement(self, entry: Entry) -> Iterator[str]:
        placement = load_placement(_KEYS.user_of(_KEYS.placements + entry.key), entry.value)
        epoch = placement.epoch
        if not 0 < epoch <= self._mark:
            yield f"has epoch {epoch}, and the head is at {self._mark}"
        if epoch in self._epochs:
            yield f"has epoch {epoch}, as somebody else"
        if placement.node_rev >= epoch:
            yield f"has epoch {epoch}, before its node {placement.node_rev} joined"
        self._epochs.add(epoch)
        kind, told = self._told.pop(placement.user, ("place", epoch))
        if kind not in _PUTS or told != epoch:
            yield f"has epoch {epoch}, and the ledger says {kind} of {told}"

    def _node(self, entry: Entry) -> Iterator[str]:
        record = load_node(entry.value)
        if _KEYS.node(record.claim.node_id) != _KEYS.nodes + entry.key:
            yield f"is about {record.claim.node_id}"
        if not 0 < record.node_rev <= self._mark:
            yield f"has revision {record.node_rev}, and the head is at {self._mark}"

    def _hold(self, entry: Entry) -> Iterator[str]:
        incarnation = load_hold(entry.value).incarnation
        if _KEYS.hold(incarnation) != _KEYS.holds + entry.key:
            yield f"is about {incarnation.node_id}/{incarnation.node_rev}"

    def _tomb(self, entry: Entry) -> Iterator[str]:
        incarnation, _ = load_tomb(entry.value)
        if not 0 < incarnation.node_rev <= self._mark:
            yield f"is of revision {incarnation.node_rev}, and the head is at {self._mark}"

    def _violation(self, entry: Entry) -> Iterator[str]:
        row = load_violation(entry.value)
        if _KEYS.violation(row.severity, row.number) != _KEYS.violations + entry.key:
            yield f"is about {row.number}"
        if not 0 < row.number <= self._header.violations:
            yield f"is above the last one, {self._header.violations}"
