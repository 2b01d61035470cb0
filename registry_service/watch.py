"""Watching what the store records: violations, and the ledger's changes of ownership.

A watcher remembers the last number that it wrote, and reads the next page when the driver says
that something was committed. Nothing is kept per watcher, so a slow one costs nobody anything: it
reads later. After a restart of the registry it goes on from its number.

Guarantees: rows come in the order of their numbers, each once, none left out, except violations
that retention dropped before a slow watcher came to them. Placements with `include_current`: what
was there at one moment, less what changed since, and then every change after that moment.
"""

import asyncio
from asyncio import Future
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from registry_service.store.port import LedgerRow, PlacementStore, StoreMark
from registry_service.store.violation_table import ViolationRow
from steward.errors import Reason, StewardError
from steward.model.keys import UserKey
from steward.model.placement import Placement

PAGE = 500
MOST_WATCHERS = 64


class Tail:
    """The number of the last durable row of one table; watchers wait for the next."""

    def __init__(self) -> None:
        self._last = 0
        self._ended = False
        self._waiters: set[Future[None]] = set()

    @property
    def last(self) -> int:
        return self._last

    def advance(self, number: int) -> None:
        """Rows up to this number are durable."""
        if number > self._last:
            self._last = number
            self._wake()

    def end(self) -> None:
        """The registry stops: nobody waits any more."""
        self._ended = True
        self._wake()

    async def beyond(self, number: int) -> int:
        """Wait for a row after `number`; the last one. Raises STORE_UNAVAILABLE at the end."""
        while self._last <= number or self._ended:
            if self._ended:
                raise StewardError(
                    Reason.STORE_UNAVAILABLE, "the registry is stopping; go on from your number"
                )
            waiter: Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)
        return self._last

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


class Tails:
    """The tails of a store, and how many watch them."""

    def __init__(self) -> None:
        self.ledger = Tail()
        self.violations = Tail()
        self._watchers = 0

    def advance(self, mark: StoreMark) -> None:
        self.ledger.advance(mark.ledger)
        self.violations.advance(mark.violations)

    def end(self) -> None:
        self.ledger.end()
        self.violations.end()

    @contextmanager
    def watcher(self) -> Iterator[None]:
        """Be one of the watchers. Raises StewardError(NO_CAPACITY) when there are too many."""
        if self._watchers >= MOST_WATCHERS:
            raise StewardError(
                Reason.NO_CAPACITY, f"{MOST_WATCHERS} watches are open; end one, or try later"
            )
        self._watchers += 1
        try:
            yield
        finally:
            self._watchers -= 1


async def watch_violations(
    store: PlacementStore, tail: Tail, after: int
) -> AsyncGenerator[list[ViolationRow], None]:
    """Pages of violations after a number, without end; the first page is empty: it is set up.

    Raises StewardError: POSITION_COMPACTED for a number that was never given, STORE_UNAVAILABLE
    when the registry stops.
    """
    _check_number(after, store.mark.violations)
    yield []
    while True:
        last = await tail.beyond(after)
        rows = await store.violations(after, PAGE)
        # All of them may have been dropped meanwhile.
        after = rows[-1].number if rows else last
        if rows:
            yield rows


@dataclass(frozen=True, slots=True)
class Created:
    """The watch is set up; changes after this mark will follow. `number` is the ledger's."""

    number: int
    revision: int


@dataclass(frozen=True, slots=True)
class CurrentPage:
    """Placements that are there; the last page says that no more come."""

    placements: list[Placement]
    more: bool


@dataclass(frozen=True, slots=True)
class Changes:
    rows: list[LedgerRow]


async def watch_placements(
    store: PlacementStore, tail: Tail, after: int, include_current: bool
) -> AsyncGenerator[Created | CurrentPage | Changes, None]:
    """The changes of the ledger after a number (0: from now on), without end.

    Raises StewardError: PROTOCOL_VIOLATION, POSITION_COMPACTED for a number that was never given,
    STORE_UNAVAILABLE when the registry stops.
    """
    mark = store.mark
    if include_current and after:
        raise StewardError(
            Reason.PROTOCOL_VIOLATION, "include_current begins now: give no number with it"
        )
    _check_number(after, mark.ledger)
    number = after or mark.ledger
    yield Created(number, mark.revision)
    user: UserKey | None = None
    more = include_current
    while more:
        found = await store.placements(user, PAGE + 1, mark.epoch)
        page, more = found[:PAGE], len(found) > PAGE
        user = page[-1].user if page else None
        yield CurrentPage(page, more)
    while True:
        last = await tail.beyond(number)
        rows = await store.ledger_after(number, PAGE)
        number = rows[-1].number if rows else last
        if rows:
            yield Changes(rows)


def _check_number(after: int, last: int) -> None:
    if after > last:
        raise StewardError(
            Reason.POSITION_COMPACTED,
            f"the last number is {last}: this is a store of before; watch from its end",
        )
