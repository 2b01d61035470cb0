"""Keys and values of the store on etcd: what an operator sees with `etcdctl`, and its meaning.

Under `/steward/v1/<cluster>/`:

| key | value |
|---|---|
| `leader` | who may write; bound to that process's lease |
| `head` | how far the store is; every transaction compares it and writes the next |
| `nodes/<node id>` | a living node; bound to a lease of its own |
| `placements/<tenant>/<user>` | where a user's manager is, and under which epoch |
| `tombs/<nonce>` | a process that was fenced |
| `holds/<node id>/<node rev>` | a fenced incarnation whose strict users wait |
| `ledger/<number>` | the rows of one transaction; the number is that of the last of them |
| `violations/<severity>/<number>` | one violation |

Values are JSON with names. Parts of keys are escaped as in a URL: no name can forge another's key.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from sys import intern
from typing import Any
from urllib.parse import quote, unquote

import orjson

from registry_service.core.transactions import Hold, NodeClaim, NodeRecord
from registry_service.store.port import LedgerRow
from registry_service.store.violation_table import ViolationRow
from steward.model.keys import Epoch, NodeId, NodeIncarnation, NodeRev, UserKey
from steward.model.placement import Placement
from steward.model.violations import Severity

ROOT = "/steward/v1"
_SAFE = "-_.~@:+"
# Most names need no escaping, and `quote` takes ten times as long to see that.
_PLAIN = re.compile(r"[A-Za-z0-9_.~@:+-]+").fullmatch


@dataclass(slots=True)
class Head:
    """How far the store is. One process writes it, and each value once: `transaction` grows.

    Changed in place by the operations of a transaction, and written at its end.

    `instance` is random, made with the store. `refusals` and `breaches` count all violations ever,
    `violations` is the number of the last, `ledger` that of the last row; `placements` says how
    many there are, so that a reader can tell that it has all.
    """

    instance: str
    term: int = 0
    transaction: int = 0
    generation: int = 0
    revision: int = 0
    ledger: int = 0
    violations: int = 0
    refusals: int = 0
    breaches: int = 0
    placements: int = 0


class Keys:
    """The keys of one cluster."""

    def __init__(self, cluster: str) -> None:
        self.prefix = f"{ROOT}/{quote(cluster, safe=_SAFE)}/".encode()
        self.leader = self.prefix + b"leader"
        self.head = self.prefix + b"head"
        self.nodes = self.prefix + b"nodes/"
        self.placements = self.prefix + b"placements/"
        self.tombs = self.prefix + b"tombs/"
        self.holds = self.prefix + b"holds/"
        self.ledger = self.prefix + b"ledger/"
        self.violations = self.prefix + b"violations/"

    def node(self, node_id: NodeId) -> bytes:
        return self.nodes + _part(node_id)

    def placement(self, user: UserKey) -> bytes:
        return self.placements + _part(user.tenant) + b"/" + _part(user.user)

    def tomb(self, nonce: str) -> bytes:
        return self.tombs + _part(nonce)

    def hold(self, incarnation: NodeIncarnation) -> bytes:
        return self.holds + _part(incarnation.node_id) + f"/{incarnation.node_rev}".encode()

    def row(self, number: int) -> bytes:
        return self.ledger + _number(number)

    def violation(self, severity: Severity, number: int) -> bytes:
        return self.of_severity(severity) + _number(number)

    def of_severity(self, severity: Severity) -> bytes:
        return self.violations + severity.value.encode() + b"/"

    def user_of(self, key: bytes) -> UserKey:
        """The user of a key of a placement."""
        tenant, user = key[len(self.placements) :].split(b"/")
        return UserKey(intern(unquote(tenant.decode())), unquote(user.decode()))

    def nonce_of(self, key: bytes) -> str:
        return unquote(key[len(self.tombs) :].decode())


def number_of(key: bytes) -> int:
    """The number at the end of a key of the ledger or of a violation."""
    return int(key.rpartition(b"/")[2])


def dump_head(head: Head) -> bytes:
    return orjson.dumps(head)


def load_head(value: bytes) -> Head:
    return Head(**orjson.loads(value))


def dump_placement(placement: Placement) -> bytes:
    fields = {
        "epoch": placement.epoch,
        "node_id": placement.node_id,
        "node_rev": placement.node_rev,
        "address": placement.address,
    }
    return orjson.dumps(fields)


def load_placement(user: UserKey, value: bytes) -> Placement:
    fields = orjson.loads(value)
    return Placement(
        user,
        Epoch(fields["epoch"]),
        # Few texts for all placements: read from etcd, each would have its own.
        NodeId(intern(fields["node_id"])),
        NodeRev(fields["node_rev"]),
        intern(fields["address"]),
    )


def dump_node(record: NodeRecord) -> bytes:
    fields = {**asdict(record.claim), "node_rev": record.node_rev, "draining": record.draining}
    return orjson.dumps(fields)


def load_node(value: bytes) -> NodeRecord:
    fields = orjson.loads(value)
    node_rev, draining = fields.pop("node_rev"), fields.pop("draining")
    return NodeRecord(NodeClaim(**fields), NodeRev(node_rev), draining)


def dump_tomb(incarnation: NodeIncarnation, cause: str) -> bytes:
    return orjson.dumps({**_incarnation(incarnation), "cause": cause})


def load_tomb(value: bytes) -> tuple[NodeIncarnation, str]:
    fields = orjson.loads(value)
    return _load_incarnation(fields), fields["cause"]


def dump_hold(hold: Hold) -> bytes:
    return orjson.dumps({**_incarnation(hold.incarnation), "pid": hold.pid})


def load_hold(value: bytes) -> Hold:
    fields = orjson.loads(value)
    return Hold(_load_incarnation(fields), fields["pid"])


_EMPTY_ROW = LedgerRow(0, 0, 0, "")


def dump_rows(rows: Sequence[LedgerRow]) -> bytes:
    """Rows of one transaction, in the order of their numbers; empty fields are left out."""
    return orjson.dumps(
        [{name: value for name, value in _row_fields(row) if value} for row in rows]
    )


def load_rows(value: bytes) -> list[LedgerRow]:
    return [replace(_EMPTY_ROW, **fields) for fields in orjson.loads(value)]


def _row_fields(row: LedgerRow) -> list[tuple[str, Any]]:
    return [
        ("number", row.number),
        ("revision", row.revision),
        ("at_ms", row.at_ms),
        ("kind", row.kind),
        ("tenant", row.tenant),
        ("user", row.user),
        ("epoch", row.epoch),
        ("node_id", row.node_id),
        ("node_rev", row.node_rev),
        ("cause", row.cause),
        ("evidence", row.evidence),
        ("traceparent", row.traceparent),
    ]


def dump_violation(row: ViolationRow) -> bytes:
    return orjson.dumps(row)


def load_violation(value: bytes) -> ViolationRow:
    fields = orjson.loads(value)
    return ViolationRow(**{**fields, "severity": Severity(fields["severity"])})


def _incarnation(incarnation: NodeIncarnation) -> dict[str, Any]:
    return {"node_id": incarnation.node_id, "node_rev": incarnation.node_rev}


def _load_incarnation(fields: dict[str, Any]) -> NodeIncarnation:
    return NodeIncarnation(NodeId(fields["node_id"]), NodeRev(fields["node_rev"]))


def _part(text: str) -> bytes:
    if _PLAIN(text):
        return text.encode()
    return quote(text, safe=_SAFE).encode()


def _number(number: int) -> bytes:
    return b"%020d" % number
