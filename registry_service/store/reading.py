"""Reads of the SQLite store that are no part of a transaction of the machine: for operators.

Used on the store's writer thread, between transactions.
"""

import sqlite3

from steward.model.keys import Epoch, UserKey
from steward.model.placement import Placement


def read_placements(
    db: sqlite3.Connection, after: UserKey | None, limit: int, newest: Epoch
) -> list[Placement]:
    """Placements on living nodes with an epoch of at most `newest`, by user."""
    rows = db.execute(
        "SELECT p.tenant, p.user, p.epoch, p.node_id, p.node_rev, p.address FROM placement p"
        " JOIN node n ON n.node_id = p.node_id AND n.node_rev = p.node_rev"
        " WHERE (p.tenant, p.user) > (?, ?) AND p.epoch <= ? ORDER BY p.tenant, p.user LIMIT ?",
        (*(after or ("", "")), newest, limit),
    )
    return [Placement(UserKey(row[0], row[1]), *row[2:]) for row in rows]
