"""The chain of transactions of the one writer of the store on etcd.

Every transaction compares the leader's key and the head that the one before it wrote, and writes
the next head. So they are carried out in the order in which they were decided, each once, and not
at all after another process has become the leader; a few may be on their way at the same time.

An answer that was lost is asked for again: the same request, whose second arrival changes nothing
and reads the head. The number in the head says then whether the first one was carried out. A
transaction is sent until it is answered or the tenure of this process is over; then the process
must end, and the next reads what is there.
"""

import asyncio
from asyncio import Future
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from registry_service.core.transactions import Committed, Outcome, StoreResult, TermLost
from registry_service.store.etcd_client import TXN, EtcdAway, EtcdClient, EtcdError
from registry_service.store.etcd_keys import Head, load_head
from registry_service.store.etcd_lease import grant, revoke
from registry_service.store.etcd_state import State
from registry_service.store.etcd_writes import Writes
from registry_service.store.etcdpb import steward_etcd_pb2 as pb
from registry_service.store.port import StoreFailed, StoreMark
from steward.model.keys import Revision

IN_FLIGHT = 3
NODE_TTL_S = 600
"""Lease of a node's key. It ends by itself only when no registry was there for that long."""
_LEASE_S = 2.0

Decide = Callable[[Writes], Any]


@dataclass(slots=True)
class _Commit:
    """What was given as one batch. Its operations may travel in more than one transaction."""

    operations: tuple[Decide, ...]
    answer: "Future[Outcome]"
    results: list[StoreResult] = field(default_factory=list)
    revision: int = 0


@dataclass(slots=True)
class _Transaction:
    """One transaction on its way. `number` is that of the head after it."""

    number: int
    writes: Writes
    request: pb.TxnRequest
    after: Head
    mark: StoreMark
    # Those whose last operation is in it.
    ended: list[_Commit] = field(default_factory=list)
    sent: "asyncio.Task[None] | None" = None
    done: bool = False
    settled: asyncio.Event = field(default_factory=asyncio.Event)


class Chain:
    """Transactions of the leader whose key was made at `made_at`. `state` is its own from now on.

    `tenure_s` gives the seconds that this process may still be the leader. `durable` is called
    after each transaction, in order, before its outcomes are given.
    """

    def __init__(
        self,
        client: EtcdClient,
        state: State,
        made_at: int,
        make_writes: Callable[[], Writes],
        tenure_s: Callable[[], float],
        durable: Callable[[StoreMark, Head], None],
    ) -> None:
        self._client = client
        self._state = state
        self._made_at = made_at
        self._make_writes = make_writes
        self._tenure_s = tenure_s
        self._durable = durable
        self._waiting: deque[_Commit] = deque()
        self._in_flight: deque[_Transaction] = deque()
        self._over: TermLost | StoreFailed | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._revoking: set[asyncio.Task[None]] = set()

    def submit(self, operations: tuple[Decide, ...]) -> "Future[Outcome]":
        """Start a batch; never waits."""
        answer: Future[Outcome] = asyncio.get_running_loop().create_future()
        if self._over is not None:
            self._settle(answer, self._over)
            return answer
        self._waiting.append(_Commit(operations, answer))
        self._pump()
        return answer

    def fail(self, failure: TermLost | StoreFailed) -> None:
        """Nothing of this process is written any more; all that waits is told. Once."""
        if self._over is not None:
            return
        self._over = failure
        waiting = [commit for each in self._in_flight for commit in each.ended]
        for transaction in self._in_flight:
            if transaction.sent is not None:
                transaction.sent.cancel()
            transaction.settled.set()
        for commit in (*waiting, *self._waiting):
            self._settle(commit.answer, failure)
        self._in_flight.clear()
        self._waiting.clear()
        self._idle.set()

    async def drain(self) -> None:
        """Returns when nothing is on its way."""
        await self._idle.wait()
        if self._revoking:
            await asyncio.wait(self._revoking)

    # Deciding

    def _pump(self) -> None:
        while self._waiting and len(self._in_flight) < IN_FLIGHT and self._over is None:
            self._idle.clear()
            try:
                transaction = self._decide()
            except ValueError as error:
                # No epoch is left: nothing more can be granted by this store.
                self.fail(StoreFailed(str(error)))
                return
            self._in_flight.append(transaction)
            before = self._in_flight[-2] if len(self._in_flight) > 1 else None
            transaction.sent = asyncio.create_task(self._send(transaction, before))
            transaction.sent.add_done_callback(self._sent)

    def _decide(self) -> _Transaction:
        state, writes = self._state, self._make_writes()
        before, rows = state.written, state.head.ledger
        ended: list[_Commit] = []
        while self._waiting and not writes.full:
            commit = self._waiting[0]
            while len(commit.results) < len(commit.operations) and not writes.full:
                commit.results.append(commit.operations[len(commit.results)](writes))
            if len(commit.results) == len(commit.operations):
                commit.revision = state.head.revision
                ended.append(self._waiting.popleft())
        after = state.finish(rows, writes)
        request = writes.request(self._made_at, before, after)
        head = load_head(after)
        return _Transaction(head.transaction, writes, request, head, state.mark, ended)

    # Sending

    async def _send(self, transaction: _Transaction, before: _Transaction | None) -> None:
        try:
            while not await self._attempt(transaction, before):
                # It overtook the one before it.
                if before is not None:
                    await before.settled.wait()
        except (EtcdAway, EtcdError) as error:
            self.fail(StoreFailed(str(error)))
        else:
            transaction.done = True
            self._finish()

    def _sent(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(StoreFailed(f"a transaction could not be sent: {error!r}"))

    async def _attempt(self, transaction: _Transaction, before: _Transaction | None) -> bool:
        """Send it until it is answered. False: it came before its time."""
        while True:
            try:
                for lease in transaction.writes.granted:
                    await grant(self._client, lease, NODE_TTL_S, self._tenure_s())
                in_turn = before is None or before.settled.is_set()
                return await self._carried_out(transaction, in_turn)
            except EtcdAway:
                # The tenure may have been renewed meanwhile: a full quota refuses writes alone.
                if not self._tenure_s():
                    raise

    async def _carried_out(self, transaction: _Transaction, in_turn: bool) -> bool:
        try:
            answer = await self._client.call(TXN, transaction.request, within_s=self._tenure_s())
        except EtcdError as error:
            if "lease not found" not in str(error):
                raise
            # A lease of a node that etcd has lost, though it lives: it is made again.
            for new in transaction.writes.puts.values():
                if new is not None and new[1]:
                    await grant(self._client, new[1], NODE_TTL_S, self._tenure_s())
            return False
        if answer.succeeded:
            return True
        heads = answer.responses[0].response_range.kvs
        leaders = answer.responses[1].response_range.kvs
        head = load_head(heads[0].value) if heads else Head("")
        if not leaders or leaders[0].create_revision != self._made_at:
            self._lose(head, transaction.after)
        elif (head.instance, head.term) != (transaction.after.instance, transaction.after.term):
            self._lose(head, transaction.after)
        changing = not transaction.writes.empty
        if head.transaction > transaction.number or (
            changing and head.transaction == transaction.number
        ):
            return True
        if head.transaction == transaction.number - changing:
            raise EtcdError("the store was changed by something that is no registry")
        if in_turn:
            # What this process was told to be written is not there: a backup was put back under it.
            raise EtcdError("the store is not as new as it was: it was restored")
        return False

    def _lose(self, head: Head, mine: Head) -> None:
        if head.term > mine.term:
            self.fail(TermLost(head.term))
        raise EtcdError("this process is no longer the leader of the store")

    def _finish(self) -> None:
        """Give the outcomes of all that is durable, in order, and go on."""
        while self._in_flight and self._in_flight[0].done and self._over is None:
            transaction = self._in_flight.popleft()
            self._durable(transaction.mark, transaction.after)
            self._state.coming.difference_update(transaction.writes.granted)
            transaction.settled.set()
            for commit in transaction.ended:
                outcome = Committed(tuple(commit.results), Revision(commit.revision))
                self._settle(commit.answer, outcome)
            for lease in transaction.writes.spent:
                task = asyncio.create_task(revoke(self._client, lease, _LEASE_S))
                self._revoking.add(task)
                task.add_done_callback(self._revoking.discard)
        if not self._in_flight and not self._waiting:
            self._idle.set()
        self._pump()

    @staticmethod
    def _settle(answer: "Future[Outcome]", outcome: Outcome | StoreFailed) -> None:
        if answer.done():
            return
        if isinstance(outcome, StoreFailed):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)
