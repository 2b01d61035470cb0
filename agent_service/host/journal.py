"""What earlier attempts of a run have stored, read back from the log for the next one.

All of it or nothing: a journal with a hole would make an agent repeat what it has done.
So a journal that is too long, or whose beginning was compacted away, is a clear failure.
"""

import orjson

from agent_service.core.effects import StartRun
from agent_service.host.history import read_patiently
from agent_service.log.port import EventLog, ReadRange
from steward.model.kept_json import kept_json
from steward.model.keys import UserKey
from steward.model.verbs import EventType, JournalEntry, RunJournal

MOST_EVENTS = 50_000
MOST_BYTES = 32 * 1024 * 1024
PAGE_EVENTS = 250
PAGE_BYTES = 1024 * 1024
"""A page is parsed in one step of the loop that serves all managers: a millisecond or two."""

_NOT_OF_AN_ATTEMPT = frozenset({EventType.USER_MESSAGE, EventType.AGENT_STARTED})


class JournalUnreadable(Exception):
    """The journal can't be had; the text says why, for the user of the run."""


async def read_journal(log: EventLog, user: UserKey, start: StartRun) -> RunJournal:
    """The journal for this execution. Waits while the log is away. Raises JournalUnreadable."""
    entries: list[JournalEntry] = []
    after, size, more = int(start.since), 0, True
    while more:
        wanted = ReadRange(
            after=after,
            until=start.until,
            limit=PAGE_EVENTS,
            max_bytes=PAGE_BYTES,
            thread_id=start.thread_id,
        )
        page = await read_patiently(log, user, wanted)
        if page.oldest_sequence > start.since + 1:
            raise JournalUnreadable("The beginning of this run is not kept any more.")
        for payload in page.events:
            event = orjson.loads(payload)
            if event["run_id"] != start.key.run_id or event["type"] in _NOT_OF_AN_ATTEMPT:
                continue
            size += len(payload)
            entries.append(JournalEntry(EventType(event["type"]), kept_json(event["data"])))
        if len(entries) > MOST_EVENTS or size > MOST_BYTES:
            raise JournalUnreadable("This run has stored more than can be read back.")
        more = page.more and bool(page.sequences)
        after = page.sequences[-1] if page.sequences else after
    return RunJournal(tuple(entries), dict(start.steps))


def has_thought(journal: RunJournal) -> bool:
    """Whether an earlier attempt has emitted an agent_thinking."""
    return any(entry.type is EventType.AGENT_THINKING for entry in journal.events)
