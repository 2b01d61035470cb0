"""What an agent gets to know of the past: the thread's messages, from the log.

Only user_message and agent_completed events count. A message whose run has not ended
(it waits behind this one) is left out; the current input comes last, also when it waited in the
queue while other runs ended.

A log that is away is waited for, as an append waits: the run begins late, and nothing is lost.
"""

import asyncio
from typing import Any

import orjson

from agent_service.core.effects import StartRun
from agent_service.core.manager import Manager
from agent_service.log.port import EventLog, EventPage, ReadRange
from steward.errors import Reason, StewardError
from steward.model.keys import UserKey
from steward.model.verbs import EventType

MOST_EVENTS = 400
MOST_BYTES = 4 * 1024 * 1024
RETRY_S = 0.25


async def read_history(
    log: EventLog, manager: Manager, start: StartRun
) -> tuple[Any, tuple[dict[str, Any], ...], dict[str, Any]]:
    """Content of the input, messages (`{role, content, run_id}`, oldest first), and the state."""
    content = orjson.loads(start.content)
    state: dict[str, Any] = orjson.loads(manager.state)
    wanted = ReadRange(
        until=start.until,
        limit=MOST_EVENTS,
        max_bytes=MOST_BYTES,
        thread_id=start.thread_id,
        newest=True,
        conversation=True,
    )
    page = await read_patiently(log, manager.user, wanted)
    asked: dict[str, dict[str, Any]] = {}
    messages: list[dict[str, Any]] = []
    for payload in page.events:
        event = orjson.loads(payload)
        run_id, data = event["run_id"], event["data"]
        if event["type"] == EventType.USER_MESSAGE:
            asked[run_id] = {"role": "user", "content": data["content"], "run_id": run_id}
        else:
            question = asked.pop(run_id, None)
            if question is not None:
                messages.append(question)
            if data.get("response"):
                messages.append(
                    {"role": "assistant", "content": data["response"], "run_id": run_id}
                )
    messages.append({"role": "user", "content": content, "run_id": start.key.run_id})
    return content, tuple(messages), state


async def read_patiently(log: EventLog, user: UserKey, wanted: ReadRange) -> EventPage:
    """Read until the log is there; ends earlier only by being cancelled."""
    while True:
        try:
            return await log.read(user, wanted)
        except StewardError as error:
            if error.reason is not Reason.STORE_UNAVAILABLE:
                raise
        await asyncio.sleep(RETRY_S)
