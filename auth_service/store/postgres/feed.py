"""How an auth process learns what other ones revoked.

Revocations come with every answer of the database, and are asked for each `POLL_S`. Who has not
heard all of them for `SURE_S` is unsure, and lets nobody in. So whoever revokes waits as
long after its commit before it says that it is done: from then on no process that is sure goes by
an older state. Time is measured from before the question was sent.

A server that was started since may have lost changes and given their numbers to others: then
all are told again.
"""

import asyncio
import logging
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

import asyncpg

from auth_service.store.port import Told
from auth_service.store.postgres.connecting import Database
from steward.model.keys import UserKey
from steward.postgres.connecting import Backoff, is_passing
from steward.postgres.texts import original
from steward.runtime.clock import boot_ms

POLL_S = 0.5
SURE_S = 1.5
ASK_S = 1.0
"""The longest that an answer is waited for; then its connection is given up."""
MOST_MARKS = 1000
"""Revocations in one answer."""
SWEEP_S = 30.0
MOST_SWEPT = 10_000

_MARKS = "SELECT * FROM steward_auth.marks_v1($1, $2, $3)"
_SWEEP = "SELECT steward_auth.sweep_v1($1)"

_logger = logging.getLogger("steward.auth")


class Place(NamedTuple):
    """Up to where the revocations are known: a start of the server, and a number of that."""

    server: datetime | None
    change: int


class Feed:
    """What is known of the revocations of all processes. `run` asks for them as long as it runs."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._told: Told | None = None
        self._sure_until_ms = 0
        self._away = f"{database.USE.what} has not answered yet"
        self._reachable: bool | None = None
        self.place = Place(None, 0)

    def unsure(self) -> str | None:
        """Why one that was acknowledged elsewhere may be unknown here; None: all are known."""
        if boot_ms() < self._sure_until_ms:
            return None
        return self._away or f"{self._database.USE.what} was not heard of in time"

    def is_away(self, error: BaseException) -> None:
        """Note why the database can't be asked."""
        self._away = self._database.away(error)
        if self._reachable is not False:
            _logger.warning(self._away)
        self._reachable = False

    async def run(self, told: Told, known: asyncio.Event) -> None:
        """Tell all, set `known`, and go on with what is new. Raises what does not pass by itself.

        Also removes secrets that expired long ago.
        """
        self._told = told
        loop = asyncio.get_running_loop()
        sweep_at = loop.time() + SWEEP_S
        connection: asyncpg.Connection | None = None
        backoff = Backoff()
        try:
            while True:
                try:
                    if connection is None:
                        connection = await self._database.connect()
                    await self.learn_all(connection)
                    known.set()
                    if loop.time() >= sweep_at:
                        sweep_at = loop.time() + SWEEP_S
                        async with asyncio.timeout(ASK_S):
                            await self._database.ask(connection, _SWEEP, MOST_SWEPT)
                except Exception as error:
                    if connection is not None:
                        connection.terminate()
                        connection = None
                    if not is_passing(error):
                        raise
                    self.is_away(error)
                    await backoff.pause()
                else:
                    if self._reachable is False:
                        _logger.info("%s is back", self._database.USE.what)
                    self._reachable, self._away = True, ""
                    backoff = Backoff()
                    await asyncio.sleep(POLL_S)
        finally:
            if connection is not None:
                connection.terminate()

    async def learn_all(self, connection: asyncpg.Connection) -> None:
        """Ask page after page, until nothing more is new."""
        while True:
            began_ms = boot_ms()
            async with asyncio.timeout(ASK_S):
                rows = await self._database.ask(connection, _MARKS, *self.place, MOST_MARKS)
            if self.learn(rows, began_ms):
                return

    def learn(self, rows: Sequence[Any], began_ms: int) -> bool:
        """Tell what came on a question of then; whether that was all there is."""
        if self._told is None:
            return True
        if rows:
            marks = {}
            for row in rows:
                user = UserKey(original(row["tenant"]), original(row["user_id"]))
                marks[user] = row["issued_before_ms"]
            self._told(marks)
            last = Place(rows[-1]["server"], rows[-1]["change"])
            # Answers that were under way together may come in any order.
            if last.server != self.place.server or last.change > self.place.change:
                self.place = last
        everything = len(rows) < MOST_MARKS
        if everything:
            self._sure_until_ms = max(self._sure_until_ms, began_ms + int(SURE_S * 1000))
        return everything
