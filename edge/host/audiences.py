"""Who is here: the audiences of an edge, by user and by channel, and who left not long ago.

A channel is what nodes call a user in packed deliveries; no number comes twice. What comes for
somebody who left may be late and no offence, so the last epoch of the last `MOST_DEPARTED` is
kept, and whose their channels were.
"""

from typing import TypeVar

from edge.host.audience import Audience
from steward.model.keys import UserKey

MOST_DEPARTED = 4096

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


class Audiences:
    """Those who are here may be looked up in `by_user` and `by_channel`; only this changes them."""

    __slots__ = ("_departed", "_departed_channels", "by_channel", "by_user")

    def __init__(self) -> None:
        self.by_user: dict[UserKey, Audience] = {}
        self.by_channel: dict[int, Audience] = {}
        self._departed: dict[UserKey, int] = {}
        self._departed_channels: dict[int, UserKey] = {}

    def __len__(self) -> int:
        return len(self.by_user)

    def add(self, audience: Audience) -> None:
        """Of a user who is not here yet."""
        self.by_user[audience.user] = audience
        self.by_channel[audience.channel] = audience

    def remove(self, audience: Audience) -> bool:
        """Nobody needs it any more. Whether it was here."""
        user, channel = audience.user, audience.channel
        if self.by_user.get(user) is not audience:
            return False
        del self.by_user[user]
        del self.by_channel[channel]
        _remember(self._departed, user, audience.attachment.max_epoch)
        _remember(self._departed_channels, channel, user)
        return True

    def departed_epoch(self, user: UserKey) -> int:
        """The last epoch that somebody who left had here; 0 for anybody else."""
        return self._departed.get(user, 0)

    def departed_from(self, channel: int) -> UserKey | None:
        """Whose this channel was, of those who left."""
        return self._departed_channels.get(channel)


def _remember(what: dict[KeyT, ValueT], key: KeyT, value: ValueT) -> None:
    """As the newest entry; the oldest one gives way."""
    what.pop(key, None)
    what[key] = value
    if len(what) > MOST_DEPARTED:
        del what[next(iter(what))]
