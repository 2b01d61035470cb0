"""Reads of the SQLite store that are no part of a transaction of the machine: for operators.

Used on the store's writer thread, between transactions.
"""

import sqlite3

from registry_service.store.port import LedgerRow
from registry_service.store.schema import LEDGER
from steward.model.keys import Epoch, UserKey
from steward.model.placement import Placement


def read_ledger(db: sqlite3.Connection, user: UserKey | None, limit: int) -> list[LedgerRow]:
    """The newest rows, newest first."""
    where = ""
    parameters: tuple[str | int, ...] = (limit,)
    if user is not None:
        where, parameters = "WHERE user <> '' AND tenant = ? AND user = ?", (*user, limit)
    rows = db.execute(
        f"SELECT number, {LEDGER} FROM ledger {where} ORDER BY number DESC LIMIT ?", parameters
    )
    return [LedgerRow(*row) for row in rows]


def read_ledger_after(db: sqlite3.Connection, number: int, limit: int) -> list[LedgerRow]:
    """The first rows after a number, ascending."""
    rows = db.execute(
        f"SELECT number, {LEDGER} FROM ledger WHERE number > ? ORDER BY number LIMIT ?",
        (number, limit),
    )
    return [LedgerRow(*row) for row in rows]


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
