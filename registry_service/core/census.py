"""The census: what nodes hold and edges are attached to, compared with placements and fences.

`PlacementIndex` is the registry's side: who is placed where, kept from the ledger's rows, with the
same counts and sums per bucket that nodes send, so that a comparison costs what has changed.
`findings_of` holds the rules, for one user. `Confirmation` keeps what is only in motion from being
a finding: a release on its way, a manager in the making, an edge that has not heard of a move yet.
All of these end or change an epoch soon; what two looks find with the same evidence, some time
apart, does not.

Pure. Times are of one clock, in milliseconds.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from steward.model.census import SUM_MASK, Digest, bucket_of, weight_of
from steward.model.keys import Epoch, NodeIncarnation, UserKey
from steward.model.violations import Violation, ViolationKind

_EMPTY: Mapping[int, tuple[int, int]] = {}


class Placed(NamedTuple):
    """Where a user is, by the registry."""

    node: NodeIncarnation
    epoch: Epoch


class PlacementIndex:
    """All placements on living nodes, by user and by bucket."""

    def __init__(self) -> None:
        self._placed: dict[UserKey, Placed] = {}
        self._digests: dict[NodeIncarnation, dict[int, tuple[int, int]]] = {}
        self._users: dict[int, set[UserKey]] = {}

    def __len__(self) -> int:
        return len(self._placed)

    def get(self, user: UserKey) -> Placed | None:
        return self._placed.get(user)

    def users_of(self, bucket: int) -> Collection[UserKey]:
        """Everybody of a bucket who is placed."""
        return self._users.get(bucket, ())

    def users(self) -> list[UserKey]:
        """Everybody who is placed, now."""
        return list(self._placed)

    def digest(self, node: NodeIncarnation) -> Digest:
        """What this node should hold, as it is now; not to be kept."""
        return self._digests.get(node, _EMPTY)

    def stamp(self, bucket: int) -> tuple[int, int]:
        """Changes whenever a placement of the bucket does."""
        count = total = 0
        for digest in self._digests.values():
            more, weight = digest.get(bucket, (0, 0))
            count += more
            total += weight
        return count, total & SUM_MASK

    def put(self, user: UserKey, placed: Placed) -> None:
        """The user is placed there, and nowhere else."""
        if user in self._placed:
            self.remove(user)
        self._placed[user] = placed
        bucket = bucket_of(user)
        self._users.setdefault(bucket, set()).add(user)
        self._weigh(placed.node, bucket, 1, weight_of(user, placed.epoch))

    def remove(self, user: UserKey, epoch: Epoch | None = None) -> None:
        """The user is placed nowhere; with `epoch`, if that is the one of its placement."""
        placed = self._placed.get(user)
        if placed is None or epoch not in (None, placed.epoch):
            return
        del self._placed[user]
        bucket = bucket_of(user)
        here = self._users[bucket]
        here.discard(user)
        if not here:
            del self._users[bucket]
        self._weigh(placed.node, bucket, -1, -weight_of(user, placed.epoch))

    def drop(self, node: NodeIncarnation) -> None:
        """The node is over: its placements count no more."""
        for bucket in list(self._digests.get(node, ())):
            for user in [u for u in self.users_of(bucket) if self._placed[u].node == node]:
                self.remove(user)
        self._digests.pop(node, None)

    def apply(self, kind: str, user: UserKey, epoch: Epoch, node: NodeIncarnation) -> None:
        """A row of the ledger; rows come in their order."""
        match kind:
            case "place" | "takeover":
                self.put(user, Placed(node, epoch))
            case "release":
                self.remove(user, epoch)
            case "fence":
                self.drop(node)

    def _weigh(self, node: NodeIncarnation, bucket: int, count: int, weight: int) -> None:
        digest = self._digests.setdefault(node, {})
        before, total = digest.get(bucket, (0, 0))
        if before + count:
            digest[bucket] = (before + count, (total + weight) & SUM_MASK)
        else:
            del digest[bucket]


def differing(one: Digest, other: Digest) -> set[int]:
    """The buckets that are not the same on both sides."""
    return {bucket for bucket in {*one, *other} if one.get(bucket) != other.get(bucket)}


class Holder(NamedTuple):
    """A manager that a node says it has."""

    node: NodeIncarnation
    epoch: Epoch
    making: bool


class Tie(NamedTuple):
    """An edge that has a user attached."""

    edge_id: str
    node: NodeIncarnation
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class UserView:
    """All that one look found of a user.

    `fence` is the highest epoch that was ever sealed: 0 for never, None when it was not asked for.
    `ties` are those that were looked at. `alive`: the placement's node answered.
    """

    user: UserKey
    placed: Placed | None
    holders: tuple[Holder, ...]
    ties: tuple[Tie, ...] = ()
    fence: Epoch | None = None
    alive: bool = True


class Sighting(NamedTuple):
    """One disagreement in one look. Equal ones are the same, seen again."""

    kind: ViolationKind
    user: UserKey
    epoch: Epoch
    node: NodeIncarnation | None
    evidence: str

    def violation(self) -> Violation:
        """As a row of the violations."""
        return Violation(self.kind, self.evidence, self.user, self.epoch, self.node)


def looks_odd(view: UserView) -> bool:
    """Whether something of this user is not as it should be, fences aside."""
    there = (view.placed,) if view.placed is not None else ()
    live = tuple(Placed(holder.node, holder.epoch) for holder in view.holders if not holder.making)
    return live != there or any((tie.node, tie.epoch) != view.placed for tie in view.ties)


def findings_of(view: UserView, living: Collection[NodeIncarnation]) -> list[Sighting]:
    """What disagrees about one user, by the rules."""
    found = _of_managers(view)
    found += _of_placement(view)
    for tie in view.ties:
        if (tie.node, tie.epoch) != view.placed:
            over = "" if tie.node in living else ", whose process is over"
            text = (
                f"edge {tie.edge_id} is attached to {_at(tie.node, tie.epoch)}{over};"
                f" the registry has {_placed(view)}"
            )
            kind = ViolationKind.MISATTACHED_EDGE
            found.append(Sighting(kind, view.user, tie.epoch, tie.node, text))
    return found


def _of_managers(view: UserView) -> list[Sighting]:
    live = sorted(holder for holder in view.holders if not holder.making)
    if len(live) > 1:
        where = " and ".join(_at(holder.node, holder.epoch) for holder in live)
        text = f"managers on {where}; the registry has {_placed(view)}, the log {_fence(view)}"
        newest = max(live, key=lambda holder: holder.epoch)
        kind = ViolationKind.DUPLICATE_MANAGER
        return [Sighting(kind, view.user, newest.epoch, newest.node, text)]
    found = []
    for node, epoch, _ in live:
        wrong = _wrong_with(node, epoch, view)
        if wrong is not None:
            where = _at(node, epoch)
            text = f"a manager on {where}; the registry has {_placed(view)}, the log {_fence(view)}"
            found.append(Sighting(wrong, view.user, epoch, node, text))
    return found


def _wrong_with(node: NodeIncarnation, epoch: Epoch, view: UserView) -> ViolationKind | None:
    placed, fence = view.placed, view.fence
    if placed is None or epoch > placed.epoch:
        return ViolationKind.ORPHAN_MANAGER
    if (node, epoch) != placed or (fence is not None and fence > epoch):
        return ViolationKind.STALE_MANAGER
    if fence is not None and fence < epoch:
        return ViolationKind.UNSEALED_MANAGER
    return None


def _of_placement(view: UserView) -> list[Sighting]:
    """A placement that nobody serves, though somebody needs it or could not have it any more."""
    placed, fence = view.placed, view.fence
    if placed is None or not view.alive or fence is None:
        return []
    if any((holder.node, holder.epoch) == placed for holder in view.holders):
        return []  # There, or in the making.
    needed = any((tie.node, tie.epoch) == placed for tie in view.ties)
    # A manager is made when it is asked for, so a placement alone says nothing. But one that was
    # sealed had its manager, and one below the fence can't get one.
    if not needed and fence < placed.epoch:
        return []
    edges = "; an edge is attached there" if needed else ""
    text = f"no manager on {_at(placed.node, placed.epoch)}; the log has {_fence(view)}{edges}"
    kind = ViolationKind.UNREACHABLE_USER
    return [Sighting(kind, view.user, placed.epoch, placed.node, text)]


def _at(node: NodeIncarnation, epoch: Epoch) -> str:
    return f"{node.node_id}/{node.node_rev} under {epoch}"


def _placed(view: UserView) -> str:
    return _at(*view.placed) if view.placed is not None else "no placement"


def _fence(view: UserView) -> str:
    if view.fence is None:
        return "was not asked"
    return f"fence {view.fence}" if view.fence else "never sealed it"


class Confirmation:
    """Sightings that come back. `least_ms`: how long one must last; for ties `ties_ms`."""

    def __init__(self, least_ms: int, ties_ms: int) -> None:
        self._least_ms = least_ms
        self._ties_ms = ties_ms
        self._since: dict[Sighting, int] = {}
        self._confirmed: dict[Sighting, int] = {}

    @property
    def confirmed(self) -> Mapping[Sighting, int]:
        """What is a finding now, and since when it was seen."""
        return self._confirmed

    @property
    def waiting(self) -> Collection[Sighting]:
        """What was seen in the last look, and is no finding yet."""
        return self._since.keys() - self._confirmed.keys()

    @property
    def users(self) -> set[UserKey]:
        """Everybody of whom something was seen: to be looked at again."""
        return {sighting.user for sighting in self._since}

    def look(self, now_ms: int, seen: Iterable[Sighting], complete: bool) -> list[Sighting]:
        """Take in one look; the findings that are new with it.

        After a look that is not complete, what was not seen again may still be there: it stays
        as it was.
        """
        before = self._since
        since = {sighting: before.get(sighting, now_ms) for sighting in seen}
        fresh = []
        confirmed: dict[Sighting, int] = {}
        for sighting, first_ms in since.items():
            tie = sighting.kind is ViolationKind.MISATTACHED_EDGE
            least_ms = self._ties_ms if tie else self._least_ms
            if sighting in before and now_ms - first_ms >= least_ms:
                confirmed[sighting] = first_ms
                if sighting not in self._confirmed:
                    fresh.append(sighting)
        if not complete:
            since = before | since
            confirmed = {**self._confirmed, **confirmed}
        self._since, self._confirmed = since, confirmed
        return fresh
