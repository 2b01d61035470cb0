"""The bookkeeping of `Resolver`: requests with their users, each of whom may have to wait."""

from collections.abc import Callable

from registry_service.core.commands import ResolveManagers, UserQuery
from registry_service.core.effects import UserRefused
from steward.model.placement import Placement

Result = Placement | UserRefused


class Request:
    """One ResolveManagers that has users without an answer.

    With `then` it is the machine's own, for one user: `then` gets the result, nobody is sent one.
    """

    __slots__ = (
        "as_ready",
        "cached",
        "open",
        "peer",
        "ready",
        "request_id",
        "results",
        "split",
        "then",
    )

    def __init__(
        self, command: ResolveManagers, then: Callable[[Result], None] | None = None
    ) -> None:
        self.then = then
        self.peer = command.peer
        self.request_id = command.request_id
        self.results: list[Result | None] = [None] * max(len(command.queries), 1)
        self.open = 0
        self.cached = 0
        self.as_ready = command.as_ready
        # Places of the users that have an answer which was not sent yet.
        self.ready: list[int] = []
        self.split = False


class Query:
    """One user of a request that waits.

    `asked` says that the operation in flight was made after this query came, so that its result
    is fresh enough; `why` it waits for its user's node, if it does.
    """

    __slots__ = (
        "asked",
        "deadline_ms",
        "done",
        "index",
        "min_epoch",
        "request",
        "traceparent",
        "user",
        "why",
    )

    def __init__(self, request: Request, index: int, query: UserQuery, deadline_ms: int) -> None:
        self.request = request
        self.index = index
        self.user = query.user
        self.min_epoch = query.min_epoch
        self.traceparent = query.traceparent
        self.deadline_ms = deadline_ms
        self.asked = False
        self.why = ""
        self.done = False
