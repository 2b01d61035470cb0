"""The registry's store on etcd, at rest: with the key of the leader, which a registry would take.

A check needs no rest: it reads all as of one revision, beside a registry that serves.
"""

import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import fields as fields_of
from hashlib import blake2b

import orjson

from registry_service.store.etcd_chain import NODE_TTL_S
from registry_service.store.etcd_client import (
    RANGE,
    TXN,
    EtcdAccess,
    EtcdClient,
    EtcdError,
    delete,
    is_made_at,
    prefix_end,
    put,
)
from registry_service.store.etcd_kept import KEEP_ROWS
from registry_service.store.etcd_keys import (
    Head,
    Keys,
    dump_head,
    dump_rows,
    load_head,
    load_rows,
    number_of,
)
from registry_service.store.etcd_lease import grant, new_lease
from registry_service.store.etcd_standby import take_lead
from registry_service.store.etcd_tenure import Tenure
from registry_service.store.etcd_watch import list_range
from registry_service.store.etcdpb import steward_etcd_pb2 as pb
from registry_service.store.port import LedgerRow
from registry_service.store.tools.contents import Entry, Header, Part
from steward.runtime.store_tool import Step, StoreProblem

WITHIN_S = 10.0
_CHANGES = 100
_BYTES = 512 * 1024
_ROWS = 50
"""Rows of the ledger in one key: those from one multiple of it to before the next."""


class EtcdContents:
    """`Contents` under the name `cluster`. `alone`: refuse to open while a registry leads."""

    most_rows: int | None = KEEP_ROWS

    def __init__(
        self, access: EtcdAccess, cluster: str, clock_ms: Callable[[], int], *, alone: bool
    ) -> None:
        self.name = f"etcd:{cluster}"
        self._access = access
        self._keys = Keys(cluster)
        self._copy = self._keys.prefix + b"copy"
        self._clock_ms = clock_ms
        self._alone = alone
        self._client: EtcdClient | None = None
        self._tenure: Tenure | None = None
        self._made_at = 0
        self._revision = 0
        self._head = b""
        self._noted = b""

    async def open(self) -> None:
        """As in the port. Raises StoreProblem while a registry leads; EtcdError, EtcdAway."""
        self._client = client = EtcdClient(self._access)
        if self._alone:
            who = {
                "id": "steward store copy",
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "home": "",
            }
            lead = await take_lead(client, self._keys, who, self._clock_ms)
            if lead is None:
                raise StoreProblem(f"{self.name} is served by a registry; stop all of them")
            self._made_at = lead.made_at
            # What is written compares the key: who lost it by time writes nothing more.
            self._tenure = Tenure(client, lead, self._keys.leader, self._clock_ms, lambda _: None)
        await self._look()

    async def _look(self) -> None:
        """Read head and note, as of the revision that everything is read of from now on."""
        head = await self._opened.call(
            RANGE, pb.RangeRequest(key=self._keys.head), within_s=WITHIN_S
        )
        self._revision = head.header.revision
        self._head = head.kvs[0].value if head.kvs else b""
        request = pb.RangeRequest(key=self._copy, revision=self._revision)
        note = await self._opened.call(RANGE, request, within_s=WITHIN_S)
        self._noted = note.kvs[0].value if note.kvs else b""

    async def close(self) -> None:
        tenure, self._tenure = self._tenure, None
        if tenure is not None:
            await tenure.end(give_up=True)
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    @property
    def _opened(self) -> EtcdClient:
        assert self._client is not None, "opened before"
        return self._client

    @property
    def header(self) -> Header | None:
        if not self._head:
            return None
        head = load_head(self._head)
        return Header(**{field.name: getattr(head, field.name) for field in fields_of(Header)})

    @property
    def copied_from(self) -> str:
        if not self._noted:
            return ""
        noted = orjson.loads(self._noted)
        return str(noted["instance"]) if noted["head"] == self._head.decode() else ""

    async def count(self) -> int:
        others = 0
        for start, end in (
            (self._keys.prefix, self._keys.ledger),
            (prefix_end(self._keys.ledger), prefix_end(self._keys.prefix)),
        ):
            request = pb.RangeRequest(
                key=start, range_end=end, count_only=True, revision=self._revision
            )
            others += (await self._opened.call(RANGE, request, within_s=WITHIN_S)).count
        header = self.header
        return others + (min(header.ledger, KEEP_ROWS) if header is not None else 0)

    async def entries(self) -> AsyncIterator[Entry]:
        for part in Part:
            prefix = self._keys.prefix + part.encode() + b"/"
            async for key, value in self._kvs(prefix):
                if part is Part.LEDGER:
                    for row in load_rows(value):
                        number = self._keys.row(row.number)[len(prefix) :]
                        yield Entry(part, number, dump_rows([row]))
                else:
                    yield Entry(part, key[len(prefix) :], value)

    async def _kvs(self, prefix: bytes) -> AsyncIterator[tuple[bytes, bytes]]:
        async for page in list_range(
            self._opened, prefix, prefix_end(prefix), revision=self._revision, within_s=WITHIN_S
        ):
            for kv in page.kvs:
                yield kv.key, kv.value

    async def replace(self, header: Header, entries: AsyncIterator[Entry], step: Step) -> int:
        """What is there already is left. The head comes last, and with it the note of the copy."""
        if self.copied_from != header.instance:
            await self._commit([put(self._copy, _note(header.instance, self._head))])
        keep = {self._keys.leader, self._keys.head, self._copy}
        there = {
            key: _digest(value)
            async for key, value in self._kvs(self._keys.prefix)
            if key not in keep
        }
        writer = _Writer(self._commit)
        placements = 0
        async for key, value, number in self._grouped(entries):
            is_node = key.startswith(self._keys.nodes)
            placements += key.startswith(self._keys.placements)
            if there.pop(key, b"") != _digest(value) or is_node:
                lease = 0
                if is_node:
                    lease = new_lease()
                    await grant(self._opened, lease, NODE_TTL_S, WITHIN_S)
                await writer.add(put(key, value, lease), len(key) + len(value))
            step(number)
        for key in there:
            await writer.add(delete(key), len(key))
        await writer.flush()
        transaction = load_head(self._head).transaction + 1 if self._head else 1
        head = Head(
            header.instance,
            header.term,
            transaction,
            header.generation,
            header.revision,
            header.ledger,
            header.violations,
            header.refusals,
            header.breaches,
            placements,
        )
        written = dump_head(head)
        note = _note(header.instance, written)
        await self._commit([put(self._keys.head, written), put(self._copy, note)])
        await self._look()
        return writer.written

    async def _grouped(
        self, entries: AsyncIterator[Entry]
    ) -> AsyncIterator[tuple[bytes, bytes, int]]:
        """Keys and values as the registry has them, and how many entries each is."""
        rows: list[LedgerRow] = []
        async for entry in entries:
            if entry.part is not Part.LEDGER:
                yield self._keys.prefix + entry.part.encode() + b"/" + entry.key, entry.value, 1
                continue
            if rows and number_of(entry.key) // _ROWS != rows[-1].number // _ROWS:
                yield self._keys.row(rows[-1].number), dump_rows(rows), len(rows)
                rows = []
            rows += load_rows(entry.value)
        if rows:
            yield self._keys.row(rows[-1].number), dump_rows(rows), len(rows)

    async def _commit(self, changes: list[pb.RequestOp]) -> None:
        """Sent twice it writes the same."""
        request = pb.TxnRequest(
            compare=[is_made_at(self._keys.leader, self._made_at)], success=changes
        )
        answer = await self._opened.call(TXN, request, within_s=WITHIN_S)
        if not answer.succeeded:
            raise EtcdError("this process lost the store on the way; start it again")

    async def findings(self) -> list[str]:
        """Keys of the ledger that are not those of their last rows."""
        found = []
        async for key, value in self._kvs(self._keys.ledger):
            try:
                last = load_rows(value)[-1].number
            except (ValueError, KeyError, TypeError, IndexError):
                continue  # The row is told of by who reads it.
            if key != self._keys.row(last):
                found.append(f"{key.decode(errors='replace')} ends with row {last}")
        return found


class _Writer:
    """Changes in transactions of a fair size, one after the other."""

    def __init__(self, commit: Callable[[list[pb.RequestOp]], Awaitable[None]]) -> None:
        self._commit = commit
        self._changes: list[pb.RequestOp] = []
        self._bytes = 0
        self.written = 0

    async def add(self, change: pb.RequestOp, size: int) -> None:
        self._changes.append(change)
        self._bytes += size
        self.written += 1
        if len(self._changes) == _CHANGES or self._bytes >= _BYTES:
            await self.flush()

    async def flush(self) -> None:
        changes, self._changes, self._bytes = self._changes, [], 0
        if changes:
            await self._commit(changes)


def _note(instance: str, head: bytes) -> bytes:
    return orjson.dumps({"instance": instance, "head": head.decode()})


def _digest(value: bytes) -> bytes:
    return blake2b(value, digest_size=16).digest()
