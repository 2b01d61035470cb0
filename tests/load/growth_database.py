"""An event database with many streams, made by bulk SQL in the product's own schema.

What a log of a large installation looks like: every user with a thread and some events, in
order of arrival, their names in no order. Appending a million streams one by one would
take minutes; what is measured afterwards reads and writes through the product alone.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from agent_service.log.database import open_database
from steward.model.keys import UserKey

EVENTS = 2
PAYLOAD = b'{"type":"agent_text","data":"' + b"x" * 169 + b'"}'
"""200 bytes."""

_NAMES = """
CREATE TEMP TABLE name AS
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :streams)
SELECT i, printf('user-%08x', i * 2654435761 % 4294967296) AS user FROM n
"""
_STREAMS = """
INSERT INTO stream (id, tenant, user, stream_id, fence, activation, oldest, noted)
SELECT i, 'default', user, lower(hex(randomblob(8))), 1, 'before', 1, 0 FROM name
"""
_CHUNKS = """
INSERT INTO chunk (stream, first, count, epoch, number, thread_id, conversation, packed)
SELECT i, 1, :count, 1, 1, 'main', 0, :packed FROM name
"""
_THREADS = """
INSERT INTO thread (stream, thread_id, sequence, value)
SELECT i, 'main', :count, :value FROM name
"""


def user_of(number: int) -> UserKey:
    """The user of stream `number`, 1 to the number of streams."""
    return UserKey("default", f"user-{number * 2654435761 % 4294967296:08x}")


def users_of(streams: int, count: int) -> Iterator[UserKey]:
    """`count` users spread over all streams."""
    return (user_of(1 + number * streams // count) for number in range(count))


def fill(data: Path, streams: int) -> int:
    """Make `<data>/events.db` with so many streams of `EVENTS` events. Its bytes on disk."""
    packed = b"".join((struct.pack("<I", len(PAYLOAD) << 1), PAYLOAD)) * EVENTS
    value = b'{"title":"A question","sequence":%d,"updated_at":"2026-01-01T00:00:00Z"}' % EVENTS
    values = {"streams": streams, "count": EVENTS, "packed": packed, "value": value}
    file = open_database(data)
    try:
        database = file.writer
        # Nothing to lose yet; the product sets this anew at each start.
        database.execute("PRAGMA synchronous = OFF")
        database.execute(_NAMES, values)
        for statement in (_STREAMS, _CHUNKS, _THREADS):
            database.execute("BEGIN")
            database.execute(statement, values)
            database.execute("COMMIT")
        totals = (streams * EVENTS, streams)
        database.execute("UPDATE meta SET events = ?, streams = ?, fence = 1", totals)
    finally:
        file.close()
    # Indexes what a start finds not indexed: all of it, once.
    open_database(data).close()
    return file.path.stat().st_size
