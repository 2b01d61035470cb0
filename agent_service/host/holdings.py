"""What this node really holds: the manager objects that were made in it, as long as they live.

A census must not be told what the registry told this node, nor what a table here says that
could be wrong in the same way; so it walks over the objects themselves. An object counts from
the moment it is made until it is over, whether or not the host still feeds it: one that was
lost from the host's table, and lives, is just what a census is there to find.

Kept beside each object is its entry, made of it once (neither user nor epoch of a manager ever
changes), so that a walk makes nothing and hashes nothing.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import count

from agent_service.core.manager import Manager
from steward.model.census import Held, bucket_of, weight_of
from steward.model.keys import Epoch, UserKey


class Holdings:
    """Manager objects of this process. `making`: (user, epoch) of those in the making."""

    def __init__(self, making: Callable[[], Iterable[tuple[UserKey, Epoch]]]) -> None:
        self._making = making
        self._numbers = count()
        self._made: dict[int, tuple[weakref.ref[Manager], Held]] = {}

    def made(self, manager: Manager) -> None:
        """A manager was made; it is forgotten when nobody holds the object any more."""
        number = next(self._numbers)
        made = self._made

        def gone(_: "weakref.ref[Manager]") -> None:
            made.pop(number, None)

        user, epoch = manager.user, manager.epoch
        entry = Held(bucket_of(user), weight_of(user, epoch), user, epoch)
        made[number] = (weakref.ref(manager, gone), entry)

    def walk(self) -> Iterator[Held]:
        """All that live, each as it is when the walk comes to it; then those in the making."""
        for kept, entry in list(self._made.values()):
            manager = kept()
            if manager is not None and not manager.over:
                yield entry
        for user, epoch in list(self._making()):
            yield Held(bucket_of(user), 0, user, epoch, making=True)
