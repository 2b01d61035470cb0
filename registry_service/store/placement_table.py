"""The table of placements as one transaction sees it: read once, decided upon, written once.

`load` reads all users of a batch in one step; what the operations of the batch change is kept
here, so that each sees what was changed before it, and `write` brings it into the table, within
the same transaction. There is one writer, so nobody else can change a row in between.
"""

import sqlite3
from collections.abc import Collection

import orjson

from registry_service.store.statements import insert_rows
from steward.model.keys import UserKey
from steward.model.placement import Placement

# Not `->>`, which SQLite has since 3.38 only: systems that have Python 3.11 come with older ones.
_READ = (
    "SELECT json_group_array(json_array(a.key, p.epoch, p.node_id, p.node_rev, p.address))"
    " FROM json_each(?) a CROSS JOIN placement p"
    " ON p.tenant = json_extract(a.value, '$[0]') AND p.user = json_extract(a.value, '$[1]')"
)
_REPLACE = "INSERT OR REPLACE INTO placement (tenant, user, epoch, node_id, node_rev, address)"
_DELETE = (
    "DELETE FROM placement WHERE (tenant, user) IN"
    " (SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]') FROM json_each(?))"
)


class PlacementTable:
    """Rows of one connection, used on the store's writer thread, inside its transaction."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection
        self._known: dict[UserKey, Placement | None] = {}
        self._changed: set[UserKey] = set()

    def begin(self) -> None:
        """A transaction begins: nothing is known of before."""
        self._known = {}
        self._changed = set()

    def load(self, users: Collection[UserKey]) -> None:
        """Read the rows of these users, of whom nothing is known yet."""
        keys = list(users)
        self._known |= dict.fromkeys(keys)
        (found,) = self._db.execute(_READ, (_json(keys),)).fetchone()
        for index, epoch, node_id, node_rev, address in orjson.loads(found):
            user = keys[index]
            self._known[user] = Placement(user, epoch, node_id, node_rev, address)

    def get(self, user: UserKey) -> Placement | None:
        """Where the user is, after what this transaction did."""
        if user not in self._known:
            self.load((user,))
        return self._known[user]

    def put(self, placement: Placement) -> None:
        """Make or replace the placement of its user."""
        self._known[placement.user] = placement
        self._changed.add(placement.user)

    def delete(self, user: UserKey) -> None:
        self._known[user] = None
        self._changed.add(user)

    def write(self) -> None:
        """Bring the changes into the table."""
        if not self._changed:
            return
        rows: list[tuple[str, str, int, str, int, str]] = []
        gone: list[UserKey] = []
        # In the order of the table, so that neighbours are written together.
        for user in sorted(self._changed):
            placement = self._known[user]
            if placement is None:
                gone.append(user)
            else:
                node_id, node_rev = placement.node_id, placement.node_rev
                rows.append((*user, placement.epoch, node_id, node_rev, placement.address))
        insert_rows(self._db, _REPLACE, 6, rows)
        if gone:
            self._db.execute(_DELETE, (_json(gone),))
        self._changed = set()


def _json(users: list[UserKey]) -> str:
    return orjson.dumps([tuple(user) for user in users]).decode()
