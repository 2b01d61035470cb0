"""Users to placements: who asks, who waits, and who is told.

Guarantees: an answer was granted by the store, is on an incarnation that lives as far as
this process knows, and is not below the caller's `min_epoch`; a user has one operation of
placing at a time, however many ask. A resolve that can't be answered waits for a node,
a release, a move or a fence until its deadline and is then refused with the reason. What it
does not guarantee is that the answer is still true when it arrives: the epoch is for that.
"""

from collections import deque
from collections.abc import Callable

from registry_service.core.commands import PeerId, ResolveManagers, UserQuery
from registry_service.core.config import RegistryConfig
from registry_service.core.effects import ManagersResolved, UserRefused
from registry_service.core.fencing import Fencing
from registry_service.core.node import Node, NodeTable
from registry_service.core.pipeline import Answer, StorePipeline
from registry_service.core.placements import Placements
from registry_service.core.queries import Query, Request, Result
from registry_service.core.transactions import (
    PlacementRead,
    PlaceUser,
    ReadPlacement,
    TargetRefused,
    UserHeld,
    UserPlaced,
)
from registry_service.core.turn import Turn
from steward.errors import Reason
from steward.model.keys import GENERATION_SHIFT, NodeIncarnation, UserKey
from steward.model.placement import Placement

_REVISION_MASK = (1 << GENERATION_SHIFT) - 1
_NO_REQUEST = ResolveManagers(PeerId(0), 0, ())
_HELD_BY_NODE = "no placement of epoch {} or above yet: its node still holds it"
_STRICT = "its node is suspected and may still be executing; its tenant waits for the lease"


class Resolver:
    """Answers ResolveManagers. One operation per user at a time, two waiting rooms."""

    def __init__(
        self,
        config: RegistryConfig,
        turn: Turn,
        store: StorePipeline,
        nodes: NodeTable,
        placements: Placements,
        fencing: Fencing,
    ) -> None:
        self._config = config
        self._turn = turn
        self._store = store
        self._nodes = nodes
        self._placements = placements
        self._fencing = fencing
        # Users whose operation is queued or in flight, and users that wait for a change.
        self._asking: dict[UserKey, list[Query]] = {}
        self._parked: dict[UserKey, list[Query]] = {}
        # All queries that waited, oldest first: their deadlines are in that order too.
        self._deadlines: deque[Query] = deque()
        self._open = 0
        # Requests with something to send at the end of this turn.
        self._answerable: dict[Request, None] = {}

    @property
    def waiting(self) -> int:
        """Users whose resolve has no answer yet."""
        return self._open

    def resolve(self, command: ResolveManagers) -> None:
        request = Request(command)
        deadline = self._turn.now_ms + self._config.resolve_wait_ms
        for index, query in enumerate(command.queries):
            placement = self._placements.living(query.user)
            if placement is not None and placement.epoch >= query.min_epoch:
                request.results[index] = placement
                request.ready.append(index)
                request.cached += 1
                self._placements.ask(query.user, request.peer)
            elif self._open >= self._config.most_waiting:
                request.results[index] = self._refusal(
                    query.user, Reason.STORE_UNAVAILABLE, "too many users wait for a placement"
                )
                request.ready.append(index)
            else:
                request.open += 1
                self._open += 1
                waiting = Query(request, index, query, deadline)
                self._deadlines.append(waiting)
                self._ask(query.user, [waiting])
        self._mark(request)

    def place(self, user: UserKey, then: Callable[[Result], None]) -> None:
        """Resolve for the machine itself: `then` is called when the user is placed or refused."""
        placement = self._placements.living(user)
        if placement is not None:
            then(placement)
            return
        request = Request(_NO_REQUEST, then)
        request.open += 1
        self._open += 1
        deadline_ms = self._turn.now_ms + self._config.resolve_wait_ms
        query = Query(request, 0, UserQuery(user), deadline_ms)
        self._deadlines.append(query)
        self._ask(user, [query])

    def answer(self) -> None:
        """Send what became known in this turn. The last thing of a turn."""
        answerable, self._answerable = self._answerable, {}
        for request in answerable:
            self._answer(request)

    def wake_all(self) -> None:
        """A node came, or one was fenced: whoever waits may try again."""
        parked, self._parked = self._parked, {}
        for user, queries in parked.items():
            self._ask(user, queries)

    def wake(self, user: UserKey) -> None:
        queries = self._parked.pop(user, None)
        if queries is not None:
            self._ask(user, queries)

    def moved(self, placement: Placement) -> None:
        """The user was moved by plan: whoever waits for a higher epoch is answered at once."""
        user = placement.user
        for query in self._parked.pop(user, ()):
            if query.done:
                continue
            if placement.epoch >= query.min_epoch:
                self._answered(query, placement)
            else:
                self._park(user, [query])

    def released(self, user: UserKey) -> None:
        """A placement of this user was deleted."""
        for query in self._asking.get(user, ()):
            # What is in flight may have read the placement before it was deleted.
            query.asked = False
        self.wake(user)
        if self._parked:
            # Its node has room for one more than before.
            self.wake(next(iter(self._parked)))

    # Asking the store

    def _ask(self, user: UserKey, queries: list[Query]) -> None:
        asking = self._asking.get(user)
        if asking is not None:
            asking.extend(queries)
            return
        self._asking[user] = queries
        self._submit(user)

    def _submit(self, user: UserKey) -> None:
        # The target is chosen when the batch is made: by then a node may have been lost.
        self._store.submit_late(self._operation, user, self._told)

    def _operation(self, user: UserKey) -> PlaceUser | ReadPlacement | None:
        queries = self._asking[user]
        queries[:] = [query for query in queries if not query.done]
        if not queries:
            del self._asking[user]
            return None
        for query in queries:
            query.asked = True
        target = self._choose(user)
        if target is None:
            # Nobody takes new users, but the user's own node may live.
            return ReadPlacement(user)
        target.placing += 1
        strict = user.tenant in self._config.strict_tenants
        return PlaceUser(user, target.incarnation, "resolve", strict, queries[0].traceparent)

    def _choose(self, user: UserKey) -> Node | None:
        last = self._placements.last(user)
        lost_zone = self._nodes.lost_zone(last.incarnation) if last is not None else ""
        return self._nodes.choose(user, not_zone=lost_zone)

    def _told(self, answer: Answer) -> None:
        user: UserKey = answer.subject
        operation = answer.operation
        if isinstance(operation, PlaceUser):
            target = self._nodes.get(operation.target)
            if target is not None:
                target.placing -= 1
        match answer.result:
            case UserPlaced(placement, created):
                assert isinstance(operation, PlaceUser)
                since = answer.repeated_since
                if (
                    since is not None
                    and placement.epoch & _REVISION_MASK > since
                    and placement.incarnation == operation.target
                    and placement != self._placements.last(user)
                ):
                    # An earlier attempt, whose result was lost, had placed the user.
                    created = True
                self._placed(placement, created)
            case UserHeld():
                for query in self._asking[user]:
                    query.why = _STRICT
                self._park(user, self._asking.pop(user))
            case PlacementRead(placement, alive) if placement is not None and alive:
                self._placed(placement, created=False)
            case TargetRefused(draining):
                assert isinstance(operation, PlaceUser)
                self._target_refused(operation.target, draining)
                self._submit(user)
            case _ if self._choose(user) is not None:
                # A node came while the store was asked.
                self._submit(user)
            case _:
                self._park(user, self._asking.pop(user))

    def _placed(self, placement: Placement, created: bool) -> None:
        user = placement.user
        # Something newer may be known already: answers of two batches come in any order.
        if created:
            self._placements.forget_interest(user)
            placement = self._placements.begin(placement)
        else:
            placement = self._placements.learn(placement)
        node = self._nodes.holder(placement)
        if node is None or node.fencing:
            # Lost while the answer was under way. Once the fence is in the store, ask again.
            if node is None:
                self._submit(user)
            else:
                self._park(user, self._asking.pop(user))
            return
        below: list[Query] = []
        for query in self._asking.pop(user):
            if query.done:
                continue
            if placement.epoch >= query.min_epoch:
                self._answered(query, placement)
            else:
                below.append(query)
        if below:
            self._want_more(user, below)

    def _want_more(self, user: UserKey, queries: list[Query]) -> None:
        """The user is placed, but these want a higher epoch."""
        read = [query for query in queries if query.asked]
        unread = [query for query in queries if not query.asked]
        for query in read:
            query.why = _HELD_BY_NODE.format(query.min_epoch)
        self._park(user, read)
        if unread:
            # They came after the operation was sent: its result may be older than they are.
            self._ask(user, unread)

    def _target_refused(self, target: NodeIncarnation, draining: bool) -> None:
        node = self._nodes.get(target)
        if node is not None and draining:
            node.draining = True
        elif node is not None:
            self._fencing.gone(target)

    # Waiting and answering

    def _park(self, user: UserKey, queries: list[Query]) -> None:
        for query in queries:
            query.asked = False
        waiting = [query for query in queries if not query.done]
        if waiting:
            self._parked.setdefault(user, []).extend(waiting)

    def _answered(self, query: Query, placement: Placement) -> None:
        query.request.results[query.index] = placement
        self._placements.ask(query.user, query.request.peer)
        self._settle(query)

    def _settle(self, query: Query) -> None:
        query.done = True
        self._open -= 1
        query.request.open -= 1
        query.request.ready.append(query.index)
        self._mark(query.request)

    def _mark(self, request: Request) -> None:
        if request.open == 0 or (request.as_ready and request.ready):
            self._answerable[request] = None

    def _answer(self, request: Request) -> None:
        indexes = tuple(sorted(request.ready))
        results = tuple(
            result for index in indexes if (result := request.results[index]) is not None
        )
        if request.then is not None:
            request.then(results[0])
            return
        more = request.open > 0
        if not more and not request.split:
            indexes = ()  # The whole request at once.
        resolved = ManagersResolved(request.request_id, results, request.cached, indexes, more)
        request.split, request.cached = True, 0
        request.ready.clear()
        self._turn.send(request.peer, resolved)

    def _refusal(self, user: UserKey, reason: Reason, message: str) -> UserRefused:
        return UserRefused(user, reason, message, self._config.retry_after_ms)

    def tick(self) -> None:
        """Refuse the queries whose time is over."""
        while self._deadlines and (
            self._deadlines[0].done or self._deadlines[0].deadline_ms <= self._turn.now_ms
        ):
            query = self._deadlines.popleft()
            if query.done:
                continue
            query.request.results[query.index] = self._late(query)
            self._settle(query)

    def _late(self, query: Query) -> UserRefused:
        parked = self._parked.get(query.user)
        if parked is None or query not in parked:
            return self._refusal(query.user, Reason.STORE_UNAVAILABLE, "the store did not answer")
        parked.remove(query)
        if not parked:
            del self._parked[query.user]
        if query.why:
            return self._refusal(query.user, Reason.MANAGER_UNAVAILABLE, query.why)
        if not self._turn.may_place and self._nodes.any_up:
            unknown = "no node has said yet how far the event log is"
            return self._refusal(query.user, Reason.STORE_UNAVAILABLE, unknown)
        return self._refusal(query.user, Reason.NO_CAPACITY, "no node takes users")

    def next_deadline(self) -> int | None:
        while self._deadlines and self._deadlines[0].done:
            self._deadlines.popleft()
        return self._deadlines[0].deadline_ms if self._deadlines else None
