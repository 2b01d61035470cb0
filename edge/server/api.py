"""The plain HTTP part of the protocol: messages, cancel, tickets, login, history.

Every call but login carries a bearer token of its own; nothing is remembered between two
calls. Commands go to the user's manager by the same way as those of a socket.
"""

import asyncio
from typing import Any

from aiohttp import web

from edge.core import server_messages as say
from edge.core.client_messages import MessageRefused, parse_object, parse_user_message
from edge.core.commands import (
    Accepted,
    CancelAccepted,
    CancelRun,
    CommandOutcome,
    Refused,
    UserCommand,
)
from edge.core.resume import is_id, parse_resume
from edge.host.hub import Hub
from edge.host.spans import Arrival
from edge.server.answers import json_answer
from edge.server.connect import TRACEPARENT, identify, one
from edge.server.credentials import BearerToken, parse_credential
from edge.uplink.port import EventRange
from steward.errors import Reason, StewardError
from steward.model.keys import UserKey
from steward.model.stamps import rfc3339
from steward.model.violations import ViolationKind

BODY_S = 10.0
MOST_EVENTS = 1000
DEFAULT_EVENTS = 100
MAX_PAGE_CHARACTERS = 1024


class Api:
    """Handlers over one hub."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/messages", self.send_message),
            web.post("/v1/runs/{run_id}/cancel", self.cancel_run),
            web.post("/v1/tickets", self.issue_ticket),
            web.post("/v1/login", self.login),
            web.get("/v1/threads", self.list_threads),
            web.get("/v1/threads/{thread_id}/events", self.read_thread),
        ]

    async def send_message(self, request: web.Request) -> web.Response:
        """`POST /v1/messages`: 202 with the `accepted` body, also for a duplicate."""
        arrival = Arrival.of(request.headers.get(TRACEPARENT, ""))
        self._hub.spans.arrive(arrival)
        identity = await identify(self._hub, request, arrival)
        try:
            message = parse_user_message(await _body(request))
        except MessageRefused as refused:
            if refused.names_user:
                self._hub.report(ViolationKind.FOREIGN_USER, refused.message, identity.user)
            raise StewardError(Reason.PROTOCOL_VIOLATION, refused.message) from None
        if not arrival.parent and message.trace:
            arrival = Arrival.of(message.trace)
        outcome = await self._command(identity.user, message, arrival)
        if not isinstance(outcome, Accepted):
            raise StewardError(Reason.INTERNAL, "the manager gave another answer")
        return json_answer(say.accepted(outcome), 202)

    async def cancel_run(self, request: web.Request) -> web.Response:
        """`POST /v1/runs/{run_id}/cancel`: 202, also when the run is over already."""
        arrival = Arrival.of(request.headers.get(TRACEPARENT, ""))
        self._hub.spans.arrive(arrival)
        identity = await identify(self._hub, request, arrival)
        run_id = request.match_info["run_id"]
        if not is_id(run_id):
            raise StewardError(Reason.NOT_FOUND, "no run of this name")
        outcome = await self._command(identity.user, CancelRun(run_id=run_id), arrival)
        named = outcome.run_id if isinstance(outcome, CancelAccepted) else ""
        return json_answer({"run_id": named or run_id}, 202)

    async def issue_ticket(self, request: web.Request) -> web.Response:
        """`POST /v1/tickets`: a one-use ticket for the holder of the token."""
        credential = parse_credential(request.headers.getall("Authorization", ()), (), ())
        if not isinstance(credential, BearerToken):
            raise StewardError(Reason.TOKEN_INVALID, "a bearer token is needed")
        origin = request.headers.get("Origin", "")
        issued = await self._hub.auth.issue_ticket(credential.token, origin)
        return json_answer({"ticket": issued.ticket, "expires_in": issued.expires_in_s})

    async def login(self, request: web.Request) -> web.Response:
        """`POST /v1/login`: a token for a one-use code."""
        try:
            code = parse_object(await _body(request)).get("code")
        except MessageRefused as refused:
            raise StewardError(Reason.PROTOCOL_VIOLATION, refused.message) from None
        if not isinstance(code, str) or not is_id(code):
            raise StewardError(Reason.PROTOCOL_VIOLATION, "code is missing")
        logged_in = await self._hub.auth.redeem_login(code)
        return json_answer(
            {
                "token": logged_in.token,
                "token_expires_at": rfc3339(logged_in.expires_at_ms),
            }
        )

    async def list_threads(self, request: web.Request) -> web.Response:
        """`GET /v1/threads?limit=&next=`: the user's threads, newest first."""
        identity = await identify(self._hub, request)
        page = one(request.query, "next") or ""
        if len(page) > MAX_PAGE_CHARACTERS:
            raise StewardError(Reason.PROTOCOL_VIOLATION, "next is not what an answer said")
        threads = await self._hub.threads(identity.user, _limit(request), page)
        body: dict[str, Any] = {
            "threads": [
                {
                    "thread_id": thread.thread_id,
                    "title": thread.title,
                    "sequence": thread.sequence,
                    "updated_at": thread.updated_at,
                }
                for thread in threads.threads
            ]
        }
        if threads.next:
            body["next"] = threads.next
        return json_answer(body)

    async def read_thread(self, request: web.Request) -> web.Response:
        """`GET /v1/threads/{id}/events?after=&limit=`: ascending; the newest without `after`."""
        identity = await identify(self._hub, request)
        thread_id = request.match_info["thread_id"]
        if not is_id(thread_id):
            raise StewardError(Reason.NOT_FOUND, "no thread of this name")
        after = parse_resume(one(request.query, "after"), None).after
        wanted = EventRange(
            after=after or 0,
            limit=_limit(request),
            thread_id=thread_id,
            newest=after is None,
        )
        page = await self._hub.history(identity.user, wanted)
        # The events are JSON already: joined, never parsed.
        body = b'{"stream_id":"%b","events":[%b]' % (
            page.stream_id.encode(),
            b",".join(page.events),
        )
        if page.more and page.sequences and after is not None:
            body += b',"next":%d' % page.sequences[-1]
        return json_answer(body + b"}")

    async def _command(
        self, user: UserKey, command: UserCommand, arrival: Arrival
    ) -> CommandOutcome:
        """The outcome of a command that was not refused. Raises StewardError."""
        outcome = await self._hub.command(user, command, arrival)
        if isinstance(outcome, Refused):
            raise StewardError(
                outcome.reason, outcome.message, retry_after_ms=outcome.retry_after_ms or None
            )
        return outcome


async def _body(request: web.Request) -> bytes:
    """The whole body, bounded in size and time. Raises StewardError."""
    try:
        async with asyncio.timeout(BODY_S):
            return await request.read()
    except TimeoutError:
        raise StewardError(Reason.PROTOCOL_VIOLATION, "the body did not come") from None


def _limit(request: web.Request) -> int:
    text = one(request.query, "limit")
    if text is None:
        return DEFAULT_EVENTS
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MOST_EVENTS):
        raise StewardError(Reason.PROTOCOL_VIOLATION, f"limit is not 1 to {MOST_EVENTS}")
    return int(text)
