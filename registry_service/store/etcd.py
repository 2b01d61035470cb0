"""The placement store on etcd: for registries on several machines, one of which serves at a time.

One process leads and is the only one that writes (`etcd_standby`); it has the whole state in
memory (`etcd_state`), decides each operation there, and every transaction compares in etcd that
nobody else has written since (`etcd_chain`). What was answered is in etcd. Processes that stand by
follow by watch, so that taking over costs the lease of the leader and no reading.

A process whose tenure is over (its lease could not be renewed in time) must end: it says nothing
more, since another may lead. `guarded` gives a clock that stops with the tenure, so that not even
a process that stood still for a while tells a node anything after it.

Not guaranteed, and no part of it: a witness that came with the machine. A process on a new machine
has none and takes the store as it is; the floor of the event log is what tells a restored one.
"""

import asyncio
import fcntl
import logging
import os
import secrets
import socket
from asyncio import Future
from collections.abc import Callable
from functools import partial
from pathlib import Path

from registry_service.core.transactions import Committed, Outcome, StoreOperation, StoreView
from registry_service.store.etcd_chain import Chain
from registry_service.store.etcd_client import EtcdAccess, EtcdAway, EtcdClient, EtcdError
from registry_service.store.etcd_kept import KEEP_ROWS
from registry_service.store.etcd_keys import Head, Keys
from registry_service.store.etcd_lease import new_lease
from registry_service.store.etcd_reading import EtcdReader
from registry_service.store.etcd_standby import LEADER_TTL_S, Lead, listed, stand_by
from registry_service.store.etcd_state import State
from registry_service.store.etcd_tenure import NODES_EVERY_S, Tenure, Upkeep
from registry_service.store.etcd_writes import Writes
from registry_service.store.port import (
    START,
    LeadershipOver,
    LedgerRow,
    StoreFailed,
    StoreMark,
)
from registry_service.store.violation_table import KEEP, ViolationRow, ViolationTotals
from registry_service.store.witness import Witness, WitnessFile, needed_generation
from steward.model.keys import Epoch, NodeIncarnation, UserKey
from steward.model.placement import Placement
from steward.model.violations import Severity
from steward.runtime.service import EnvironmentUnusable
from steward.telemetry.logs import fields

DRAIN_S = 2.0

_log = logging.getLogger(__name__)


class EtcdStore:
    """A `PlacementStore` on etcd, under the name `cluster`.

    `home` is a directory that only this process uses: a lock, and the witness. `clock_ms` counts
    time asleep; `wall_ms` stamps rows. A generation below `least_generation` is raised to it.
    `lease_s` is after what time another process leads when this one is killed.
    """

    def __init__(
        self,
        access: EtcdAccess,
        cluster: str,
        home: Path,
        wall_ms: Callable[[], int],
        clock_ms: Callable[[], int],
        *,
        name: str = "registry",
        keep_violations: int = KEEP,
        keep_rows: int = KEEP_ROWS,
        least_generation: int = 0,
        nodes_every_s: float = NODES_EVERY_S,
        lease_s: int = LEADER_TTL_S,
    ) -> None:
        self._access = access
        self._cluster = cluster
        self._keys = Keys(cluster)
        self._home = Home(home / "registry.etcd")
        self._witness = WitnessFile(home / "registry.etcd.witness")
        self._wall_ms = wall_ms
        self._clock_ms = clock_ms
        self._name = name
        self._keep_violations = keep_violations
        self._keep_rows = keep_rows
        self._least_generation = least_generation
        self._nodes_every_s = nodes_every_s
        self._lease_s = lease_s
        self._client: EtcdClient | None = None
        self._tenure: Tenure | None = None
        self._chain: Chain | None = None
        self._reader: EtcdReader | None = None
        self._upkeep: asyncio.Task[None] | None = None
        self._mark = START
        self._head = Head("")
        self._witnessing = False
        self._lost = False

    async def open(self) -> StoreView:
        """Wait until this process leads. Raises EnvironmentUnusable; waits while etcd is away."""
        self._home.take()
        self._client = client = EtcdClient(self._access)
        who = {
            "id": self._name,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "home": self._home.name,
        }
        try:
            while True:
                lead, state = await stand_by(client, self._keys, who, self._clock_ms, self._lease_s)
                try:
                    return await self._begin(client, lead, state)
                except (StoreFailed, EtcdAway) as error:
                    _log.warning("not the leader after all", extra=fields(cause=str(error)))
                await self._step_down()
        except (EtcdError, ValueError) as error:
            await self.close()
            raise EnvironmentUnusable(f"the store on etcd can't be used: {error}") from None
        except OSError as error:
            await self.close()
            raise EnvironmentUnusable(f"{self._home.path} can't be used: {error}") from None
        except asyncio.CancelledError:
            await self.close()
            raise

    async def _begin(self, client: EtcdClient, lead: Lead, found: State | None) -> StoreView:
        """The first transaction of this term: the generation that is needed, and the term."""
        self._lost = False
        self._tenure = tenure = Tenure(
            client, lead, self._keys.leader, self._clock_ms, self._tenure_over
        )
        self._state = state = found or await listed(client, self._keys)
        state.kept.most_violations = self._keep_violations
        state.kept.most_rows = self._keep_rows
        head = state.head
        head.instance = head.instance or secrets.token_hex(8)
        was = _witness_of(head)
        # None is no reason for doubt: any machine may run a registry, and a new one has none.
        witness = self._witness.read() or was
        generation, raised = needed_generation(was, witness, self._least_generation)
        self._chain = chain = Chain(
            client, state, lead.made_at, self._make_writes, tenure.left_s, self._durable
        )

        def begin(writes: Writes) -> None:
            writes.opening = True
            state.raise_generation(generation, raised, writes)
            head.term = max(head.term, witness.term) + 1

        outcome = await chain.submit((begin,))
        if not isinstance(outcome, Committed):
            raise StoreFailed("another process leads")
        # Killed before this, the next one to start finds what this one found.
        self._witness.start(_witness_of(self._head))
        self._witnessing = True
        self._reader = EtcdReader(client, self._keys, state)
        upkeep = Upkeep(client, state, self._bind_anew, self._nodes_every_s)
        self._upkeep = asyncio.create_task(upkeep.run(), name="etcd-upkeep")
        return state.view(raised)

    def commit(self, operations: tuple[StoreOperation, ...]) -> "Future[Outcome]":
        if self._chain is None:
            future: Future[Outcome] = asyncio.get_running_loop().create_future()
            future.set_exception(StoreFailed("the store is closed"))
            return future
        apply = self._state.apply
        return self._chain.submit(tuple(partial(apply, operation) for operation in operations))

    @property
    def mark(self) -> StoreMark:
        return self._mark

    def guarded(self, clock: Callable[[], int]) -> Callable[[], int]:
        """This clock while this process leads; after that it raises LeadershipOver."""

        def now() -> int:
            if self._lost or (self._tenure is not None and not self._tenure.left_s()):
                raise LeadershipOver("another registry process may lead")
            return clock()

        return now

    async def ledger(self, user: UserKey | None, limit: int) -> list[LedgerRow]:
        return await self._read.ledger(user, limit, self._mark.ledger)

    async def ledger_after(self, number: int, limit: int) -> list[LedgerRow]:
        return await self._read.ledger_after(number, limit)

    async def placements(self, after: UserKey | None, limit: int, newest: Epoch) -> list[Placement]:
        return await self._read.placements(after, limit, newest)

    async def violations(
        self, after: int, limit: int, severity: Severity | None = None, newest: bool = False
    ) -> list[ViolationRow]:
        return await self._read.violations(after, limit, severity, newest)

    async def violation_totals(self) -> ViolationTotals:
        return ViolationTotals(self._head.refusals, self._head.breaches)

    async def close(self) -> None:
        await self._step_down()
        self._lost = True
        client, self._client = self._client, None
        if client is not None:
            await client.close()
            self._witness.close()
            self._home.leave()

    async def _step_down(self) -> None:
        """Finish what was committed, and let another process lead."""
        chain, self._chain = self._chain, None
        upkeep, self._upkeep = self._upkeep, None
        tenure, self._tenure = self._tenure, None
        if upkeep is not None:
            upkeep.cancel()
            await asyncio.wait({upkeep})
        if chain is not None:
            try:
                async with asyncio.timeout(DRAIN_S):
                    await chain.drain()
            except TimeoutError:
                # As if killed: it is not known, and nobody is told, what becomes of the rest.
                chain.fail(StoreFailed("the registry stops, and etcd does not answer"))
        if tenure is not None:
            await tenure.end(give_up=True)

    @property
    def _read(self) -> EtcdReader:
        if self._reader is None or self._client is None:
            raise StoreFailed("the store is closed")
        return self._reader

    def _make_writes(self) -> Writes:
        return Writes(self._keys, self._wall_ms(), new_lease)

    def _durable(self, mark: StoreMark, head: Head) -> None:
        self._mark, self._head = mark, head
        if self._witnessing:
            self._witness.write(_witness_of(head))

    def _tenure_over(self, why: str) -> None:
        self._lost = True
        # Expected where machines and networks fail: an operator has nothing to do about it.
        _log.warning("another registry may lead: this one ends", extra=fields(cause=why))
        if self._chain is not None:
            self._chain.fail(StoreFailed(why))

    def _bind_anew(self, incarnation: NodeIncarnation) -> None:
        if self._chain is not None:
            bound = self._chain.submit((partial(self._state.bind_anew, incarnation),))
            # A failure is everybody's, and told by the next commit.
            bound.add_done_callback(lambda done: done.exception())


def _witness_of(head: Head) -> Witness:
    return Witness(head.instance, head.term, head.generation, head.revision)


def _boot_id() -> str:
    """What the kernel calls this boot; never the same where it has no name for it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return secrets.token_hex(16)


class Home:
    """The directory of one process: its lock, and a name for it.

    Whoever has the lock knows that the process which had it before is dead. That is said of the
    locked file alone: a copy of the directory has another name, and so has the directory after the
    machine was started again or the volume has moved to another one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = ""
        self._file: int | None = None

    def take(self) -> None:
        """Raises EnvironmentUnusable when another process has it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise EnvironmentUnusable(f"{self.path} can't be used: {error}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            why = "another registry process uses it; stop that one, or use another --data"
            raise EnvironmentUnusable(f"{self.path} can't be used: {why}") from None
        self._file = file
        made = os.pread(file, 64, 0).decode()
        if not made:
            made = secrets.token_hex(16)
            os.pwrite(file, made.encode(), 0)
            os.fsync(file)
        there = os.fstat(file)
        self.name = f"{made}.{_boot_id()}.{there.st_dev:x}.{there.st_ino:x}"

    def leave(self) -> None:
        """Let another process have it. Safe to call twice."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)
