"""What one transaction of the store on etcd changes, and the request that does it.

The request compares that the leader's key is this process's, that the head is the one that the
transaction was decided on, and that every placement that it was decided on is what it was. All of
it or nothing is written, the next head with it. So a request that arrives twice does nothing the
second time, and its answer then says where the head is: asking again is reading.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from registry_service.store.etcd_client import (
    delete,
    has_value,
    in_turn,
    is_made_at,
    put,
    read,
)
from registry_service.store.etcd_keys import Keys, dump_rows
from registry_service.store.etcdpb import steward_etcd_pb2 as pb
from registry_service.store.port import LedgerRow

MOST_OPERATIONS = 128
"""What a server takes (`--max-txn-ops`) in one transaction with all that is nested in it on the
way down: operations of one level, those of a transaction inside, and so on."""
MOST_GUARDS = 100
_CHUNKS = 64
MOST_CHANGES = 2_000


@dataclass(slots=True)
class Writes:
    """Collected by the operations of one transaction. `at_ms` stamps rows.

    `puts` are the keys with their new values and leases, None for a key that is deleted.
    """

    keys: Keys
    at_ms: int
    new_lease: Callable[[], int]
    puts: dict[bytes, tuple[bytes, int] | None] = field(default_factory=dict)
    guards: dict[bytes, bytes | None] = field(default_factory=dict)
    rows: list[LedgerRow] = field(default_factory=list)
    # Keys from one to before another, which go.
    cuts: list[tuple[bytes, bytes]] = field(default_factory=list)
    # Leases that must be there before, and those that are of no use after.
    granted: list[int] = field(default_factory=list)
    spent: list[int] = field(default_factory=list)
    # The head changes whatever the operations do.
    opening: bool = False

    @property
    def full(self) -> bool:
        """Whether no further operation may be added."""
        return len(self.guards) >= MOST_GUARDS or len(self.puts) >= MOST_CHANGES

    @property
    def empty(self) -> bool:
        """Whether nothing changes: then the transaction only reads."""
        return not (self.puts or self.rows or self.cuts or self.opening)

    def guard(self, key: bytes, value: bytes | None) -> None:
        """The operation was decided on this value (None: absent); the first that says so counts."""
        if key not in self.guards and key not in self.puts:
            self.guards[key] = value

    def put(self, key: bytes, value: bytes, lease: int = 0) -> None:
        self.puts[key] = (value, lease)

    def delete(self, key: bytes) -> None:
        self.puts[key] = None

    def grant(self) -> int:
        """A lease that will be there."""
        lease = self.new_lease()
        self.granted.append(lease)
        return lease

    def request(self, leader_made_at: int, before: bytes, after: bytes) -> pb.TxnRequest:
        """The transaction of the leader whose key was made at that revision; heads as values.

        With an empty `before` there must be no head yet.
        """
        keys = self.keys
        compares = [
            is_made_at(keys.leader, leader_made_at),
            has_value(keys.head, before) if before else is_made_at(keys.head, 0),
        ]
        for key, value in self.guards.items():
            compares.append(is_made_at(key, 0) if value is None else has_value(key, value))
        changes = [delete(key) if new is None else put(key, *new) for key, new in self.puts.items()]
        if self.rows:
            changes.append(put(keys.row(self.rows[-1].number), dump_rows(self.rows)))
        changes += [delete(start, end) for start, end in self.cuts]
        if len(changes) >= MOST_OPERATIONS - 1:
            # The levels share what a server takes: so many beside the compares, so many in each.
            chunk = MOST_OPERATIONS - max(len(compares), _CHUNKS)
            starts = range(0, len(changes), chunk)
            changes = [in_turn(changes[start : start + chunk]) for start in starts]
        if not self.empty:
            changes.append(put(keys.head, after))
        return pb.TxnRequest(
            compare=compares, success=changes, failure=[read(keys.head), read(keys.leader)]
        )
