"""The invariants of ownership, checked on what one step changed.

Each check has the name of the invariant in the ownership protocol. A broken one raises
`InvariantBroken` with what was seen, so that a seed stops at the step that broke it.
"""

from collections.abc import Sequence

import orjson

from agent_service.core.journal import Append
from steward.model.keys import Epoch, NodeIncarnation, UserKey
from steward.model.placement import Placement


class InvariantBroken(AssertionError):
    """An invariant was seen broken."""


class Invariants:
    """What was seen so far, and the checks against it."""

    def __init__(self) -> None:
        self.checked = 0
        self._log: dict[UserKey, list[bytes]] = {}
        self._log_epoch: dict[UserKey, int] = {}
        self._sealed: dict[UserKey, Epoch] = {}
        self._holder: dict[tuple[UserKey, Epoch], NodeIncarnation] = {}
        self._placed: dict[UserKey, Epoch] = {}
        self._shown: dict[tuple[str, UserKey], int] = {}
        self._shown_epoch: dict[tuple[str, UserKey], int] = {}

    def sealed(self, user: UserKey, epoch: Epoch) -> None:
        """The log took a seal: from now on this epoch alone is effective."""
        self.checked += 1
        if epoch < self._sealed.get(user, 0):
            raise InvariantBroken(f"I1: {user} was sealed at {self._sealed[user]}, then at {epoch}")
        self._sealed[user] = epoch

    def stored(self, append: Append, before: int) -> None:
        """The log took an append whose stream had `before` events."""
        self.checked += 1
        user = append.user
        if append.epoch != self._sealed.get(user):
            effective = self._sealed.get(user)
            raise InvariantBroken(f"S: {user} wrote under {append.epoch}, {effective} is sealed")
        last = self._log_epoch.get(user, 0)
        if append.epoch < last:
            raise InvariantBroken(f"I1: {user} wrote under {append.epoch} after {last}")
        self._log_epoch[user] = append.epoch
        stream = self._log.setdefault(user, [])
        if before != len(stream):
            raise InvariantBroken(f"I3: {user} has {before} events, {len(stream)} were written")
        for event in append.events:
            stream.append(event.payload)
            sequence = orjson.loads(event.payload)["sequence"]
            if sequence != len(stream):
                raise InvariantBroken(f"I3: {user} event {sequence} is number {len(stream)}")

    def granted(self, placement: Placement) -> None:
        """A node was told that a user is placed on it."""
        self.checked += 1
        key = (placement.user, placement.epoch)
        holder = self._holder.setdefault(key, placement.incarnation)
        if holder != placement.incarnation:
            raise InvariantBroken(f"I2: {key} is on {holder} and on {placement.incarnation}")
        last = self._placed.get(placement.user, Epoch(0))
        self._placed[placement.user] = max(last, placement.epoch)

    def created(self, placement: Placement) -> None:
        """The registry made a new placement."""
        self.checked += 1
        last = self._placed.get(placement.user, Epoch(0))
        if placement.epoch <= last:
            raise InvariantBroken(f"I7: {placement.user} got {placement.epoch} after {last}")
        self.granted(placement)

    def shown(
        self, client: str, user: UserKey, epoch: Epoch, first: int, payloads: Sequence[bytes]
    ) -> None:
        """A client was shown consecutive events, sent under `epoch`."""
        self.checked += 1
        key = (client, user)
        stream = self._log.get(user, [])
        for sequence, payload in enumerate(payloads, first):
            if sequence != self._shown.get(key, 0) + 1:
                raise InvariantBroken(f"I4: {key} saw {sequence} after {self._shown.get(key, 0)}")
            if sequence > len(stream) or stream[sequence - 1] != payload:
                raise InvariantBroken(f"I4: {key} saw {sequence}, which is not what is stored")
            self._shown[key] = sequence
        if epoch < self._shown_epoch.get(key, 0):
            raise InvariantBroken(f"I5: {key} heard {epoch} after {self._shown_epoch[key]}")
        self._shown_epoch[key] = epoch

    def events(self, user: UserKey) -> list[bytes]:
        """The stored events of a user, as they were written."""
        return self._log.get(user, [])
