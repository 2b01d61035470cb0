"""The tables of the SQLite store, and the rows of it that are values.

`meta` has one row: `rev` grows by one per operation that changes something, so that an
epoch belongs to one placement; `term` says who may write. `identity` names the file for its
witness. Tables are only ever added.
"""

from typing import Any

from registry_service.core.transactions import NodeClaim, NodeRecord
from steward.model.keys import NodeRev

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    rev INTEGER NOT NULL,
    generation INTEGER NOT NULL,
    term INTEGER NOT NULL
);
INSERT OR IGNORE INTO meta (id, rev, generation, term) VALUES (1, 0, 0, 0);
CREATE TABLE IF NOT EXISTS identity (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    instance TEXT NOT NULL
);
INSERT OR IGNORE INTO identity (id, instance) VALUES (1, lower(hex(randomblob(8))));
CREATE TABLE IF NOT EXISTS node (
    node_id TEXT PRIMARY KEY,
    node_rev INTEGER NOT NULL,
    boot_id TEXT NOT NULL,
    nonce TEXT NOT NULL,
    address TEXT NOT NULL,
    zone TEXT NOT NULL,
    capacity INTEGER NOT NULL,
    version TEXT NOT NULL,
    pid INTEGER NOT NULL,
    draining INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tomb (
    nonce TEXT PRIMARY KEY,
    node_id TEXT NOT NULL,
    node_rev INTEGER NOT NULL,
    cause TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS hold (
    node_id TEXT NOT NULL,
    node_rev INTEGER NOT NULL,
    pid INTEGER NOT NULL,
    PRIMARY KEY (node_id, node_rev)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS placement (
    tenant TEXT NOT NULL,
    user TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    node_id TEXT NOT NULL,
    node_rev INTEGER NOT NULL,
    address TEXT NOT NULL,
    PRIMARY KEY (tenant, user)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ledger (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    rev INTEGER NOT NULL,
    at_ms INTEGER NOT NULL,
    kind TEXT NOT NULL,
    tenant TEXT NOT NULL,
    user TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    node_id TEXT NOT NULL,
    node_rev INTEGER NOT NULL,
    cause TEXT NOT NULL,
    evidence TEXT NOT NULL,
    traceparent TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS ledger_part (
    part INTEGER PRIMARY KEY,
    marks BLOB NOT NULL
);
"""

NODE = "node_id, node_rev, boot_id, nonce, address, zone, capacity, version, pid, draining"
LEDGER = "rev, at_ms, kind, tenant, user, epoch, node_id, node_rev, cause, evidence, traceparent"


def node_record(row: tuple[Any, ...]) -> NodeRecord:
    """A row of `NODE` columns."""
    node_id, node_rev, boot_id, nonce, address, zone, capacity, version, pid, draining = row
    claim = NodeClaim(node_id, boot_id, nonce, address, zone, capacity, version, pid)
    return NodeRecord(claim, NodeRev(node_rev), bool(draining))
