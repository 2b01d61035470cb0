"""Users to placements: the cache, the waiting, and who is told.

Guarantees: an answer was granted by the store, is on an incarnation that lives as far as
this process knows, and is not below the caller's `min_epoch`; a user has one operation of
placing at a time, however many ask. A resolve that can't be answered waits for a node,
a release or a fence until its deadline and is then refused with the reason. What it does
not guarantee is that the answer is still true when it arrives: the epoch is for that.
"""

from collections import deque

from registry_service.core.commands import ResolveManagers
from registry_service.core.config import RegistryConfig
from registry_service.core.effects import ManagersResolved, UserRefused
from registry_service.core.nodes import Node, Nodes
from registry_service.core.pipeline import Answer, StorePipeline
from registry_service.core.transactions import (
    PlacementRead,
    PlaceUser,
    ReadPlacement,
    TargetRefused,
    UserPlaced,
)
from registry_service.core.turn import Turn
from steward.errors import Reason
from steward.model.keys import GENERATION_SHIFT, Epoch, NodeIncarnation, UserKey
from steward.model.placement import Placement

_REVISION_MASK = (1 << GENERATION_SHIFT) - 1


class _Request:
    """One ResolveManagers that has users without an answer."""

    __slots__ = ("as_ready", "cached", "open", "peer", "ready", "request_id", "results", "split")

    def __init__(self, command: ResolveManagers) -> None:
        self.peer = command.peer
        self.request_id = command.request_id
        self.results: list[Placement | UserRefused | None] = [None] * len(command.queries)
        self.open = 0
        self.cached = 0
        self.as_ready = command.as_ready
        # Places of the users that have an answer which was not sent yet.
        self.ready: list[int] = []
        self.split = False


class _Query:
    """One user of a request that waits.

    `asked` says that the operation in flight was made after this query came, so that its result
    is fresh enough; `below` that the store's placement was below `min_epoch`.
    """

    __slots__ = ("asked", "below", "deadline_ms", "done", "index", "min_epoch", "request", "user")

    def __init__(
        self, request: _Request, index: int, user: UserKey, min_epoch: Epoch, deadline_ms: int
    ) -> None:
        self.request = request
        self.index = index
        self.user = user
        self.min_epoch = min_epoch
        self.deadline_ms = deadline_ms
        self.asked = False
        self.below = False
        self.done = False


class Resolver:
    """Answers ResolveManagers. One operation per user at a time, one cache, two waiting rooms."""

    def __init__(
        self, config: RegistryConfig, turn: Turn, store: StorePipeline, nodes: Nodes
    ) -> None:
        self._config = config
        self._turn = turn
        self._store = store
        self._nodes = nodes
        self._cache: dict[UserKey, Placement] = {}
        # Users whose operation is queued or in flight, and users that wait for a change.
        self._asking: dict[UserKey, list[_Query]] = {}
        self._parked: dict[UserKey, list[_Query]] = {}
        # All queries that waited, oldest first: their deadlines are in that order too.
        self._deadlines: deque[_Query] = deque()
        self._open = 0
        # Requests with something to send at the end of this turn.
        self._answerable: dict[_Request, None] = {}

    @property
    def waiting(self) -> int:
        """Users whose resolve has no answer yet."""
        return self._open

    def cached(self, user: UserKey) -> Placement | None:
        """The remembered placement, if its incarnation lives."""
        placement = self._cache.get(user)
        if placement is None or not self._nodes.lives(placement.node_id, placement.node_rev):
            return None
        return placement

    def resolve(self, command: ResolveManagers) -> None:
        request = _Request(command)
        deadline = self._turn.now_ms + self._config.resolve_wait_ms
        for index, query in enumerate(command.queries):
            placement = self.cached(query.user)
            if placement is not None and placement.epoch >= query.min_epoch:
                request.results[index] = placement
                request.ready.append(index)
                request.cached += 1
            elif self._open >= self._config.most_waiting:
                request.results[index] = self._refusal(
                    query.user, Reason.STORE_UNAVAILABLE, "too many users wait for a placement"
                )
                request.ready.append(index)
            else:
                request.open += 1
                self._open += 1
                waiting = _Query(request, index, query.user, query.min_epoch, deadline)
                self._deadlines.append(waiting)
                self._ask(query.user, [waiting])
        self._mark(request)

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

    def released(self, user: UserKey, epoch: Epoch) -> None:
        """The placement with this epoch was deleted."""
        placement = self._cache.get(user)
        if placement is not None and placement.epoch == epoch:
            del self._cache[user]
        for query in self._asking.get(user, ()):
            # What is in flight may have read the placement before it was deleted.
            query.asked = False
        self.wake(user)
        if self._parked:
            # Its node has room for one more than before.
            self.wake(next(iter(self._parked)))

    # Asking the store

    def _ask(self, user: UserKey, queries: list[_Query]) -> None:
        asking = self._asking.get(user)
        if asking is not None:
            asking.extend(queries)
            return
        self._asking[user] = queries
        self._submit(user)

    def _submit(self, user: UserKey) -> None:
        # The target is chosen when the batch is made: by then a node may have been lost.
        self._store.submit_late(
            lambda: self._operation(user), lambda answer: self._told(user, answer)
        )

    def _operation(self, user: UserKey) -> PlaceUser | ReadPlacement | None:
        queries = [query for query in self._asking[user] if not query.done]
        if not queries:
            del self._asking[user]
            return None
        self._asking[user] = queries
        for query in queries:
            query.asked = True
        target = self._nodes.choose(user)
        if target is None:
            # Nobody takes new users, but the user's own node may live.
            return ReadPlacement(user)
        target.placing += 1
        return PlaceUser(user, target.incarnation, "resolve")

    def _told(self, user: UserKey, answer: Answer) -> None:
        if isinstance(answer.operation, PlaceUser):
            target = self._nodes.get(answer.operation.target)
            if target is not None:
                target.placing -= 1
        match answer.result:
            case UserPlaced(placement, created):
                since = answer.repeated_since
                if since is not None and placement.epoch & _REVISION_MASK > since:
                    # An earlier attempt, whose result was lost, had placed the user.
                    created = True
                self._placed(placement, created)
            case PlacementRead(placement, alive) if placement is not None and alive:
                self._placed(placement, created=False)
            case TargetRefused(draining):
                assert isinstance(answer.operation, PlaceUser)
                self._target_refused(answer.operation.target, draining)
                self._submit(user)
            case _ if self._nodes.choose(user) is not None:
                # A node came while the store was asked.
                self._submit(user)
            case _:
                self._park(user, self._asking.pop(user))

    def _placed(self, placement: Placement, created: bool) -> None:
        user = placement.user
        node = self._nodes.get(placement.incarnation)
        if node is None or node.fencing:
            # Lost while the answer was under way. Once the fence is in the store, ask again.
            if node is None:
                self._submit(user)
            else:
                self._park(user, self._asking.pop(user))
            return
        self._remember(placement)
        if created:
            self._granted(node, placement)
        read: list[_Query] = []
        unread: list[_Query] = []
        for query in self._asking.pop(user):
            if query.done:
                continue
            if placement.epoch >= query.min_epoch:
                query.request.results[query.index] = placement
                self._settle(query)
            elif query.asked:
                query.below = True
                read.append(query)
            else:
                unread.append(query)
        self._park(user, read)
        if unread:
            # They came after the operation was sent: its result may be older than they are.
            self._ask(user, unread)

    def _granted(self, node: Node, placement: Placement) -> None:
        node.placements += 1
        if node.session is not None:
            self._turn.grant(node.session, placement)

    def _target_refused(self, target: NodeIncarnation, draining: bool) -> None:
        node = self._nodes.get(target)
        if node is not None and draining:
            node.draining = True
        elif node is not None:
            self._nodes.gone(target)

    def _remember(self, placement: Placement) -> None:
        cache = self._cache
        if placement.user not in cache and len(cache) >= self._config.cached_placements:
            del cache[next(iter(cache))]
        cache[placement.user] = placement

    # Waiting and answering

    def _park(self, user: UserKey, queries: list[_Query]) -> None:
        for query in queries:
            query.asked = False
        waiting = [query for query in queries if not query.done]
        if waiting:
            self._parked.setdefault(user, []).extend(waiting)

    def _settle(self, query: _Query) -> None:
        query.done = True
        self._open -= 1
        query.request.open -= 1
        query.request.ready.append(query.index)
        self._mark(query.request)

    def _mark(self, request: _Request) -> None:
        if request.open == 0 or (request.as_ready and request.ready):
            self._answerable[request] = None

    def _answer(self, request: _Request) -> None:
        indexes = tuple(sorted(request.ready))
        results = tuple(
            result for index in indexes if (result := request.results[index]) is not None
        )
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

    def _late(self, query: _Query) -> UserRefused:
        parked = self._parked.get(query.user)
        if parked is None or query not in parked:
            return self._refusal(query.user, Reason.STORE_UNAVAILABLE, "the store did not answer")
        parked.remove(query)
        if not parked:
            del self._parked[query.user]
        if query.below:
            return self._refusal(
                query.user,
                Reason.MANAGER_UNAVAILABLE,
                f"no placement of epoch {query.min_epoch} or above yet: its node still holds it",
            )
        return self._refusal(query.user, Reason.NO_CAPACITY, "no node takes users")

    def next_deadline(self) -> int | None:
        while self._deadlines and self._deadlines[0].done:
            self._deadlines.popleft()
        return self._deadlines[0].deadline_ms if self._deadlines else None
