"""Which edge has the newest connection of a client id: decided by the order at the manager.

Every connection with a client id is announced to the user's manager, which handles
announcements one after the other and tells every other edge of each. An announcement has no
answer of its own; a marker is sent right behind it that has one. What a manager says to an
edge keeps its order, so:

- a connection whose marker came back before another edge's announcement is the older one, and
  ends;
- one whose marker is still under way is the newer one, and stays: the other edge will hear of it.

So of two that race exactly one survives, the one that the manager heard of last. What was not
marked when the manager was lost is announced again to the next one; what was is not, or an old
connection could end a newer one. Pure.
"""

from collections.abc import Iterator


class Announcements:
    """The client ids of one user that have a connection at this edge."""

    __slots__ = ("_heard", "_open")

    def __init__(self) -> None:
        # Client id -> the number of its marker, until that came back; None: not sent yet.
        self._open: dict[str, int | None] = {}
        # Client id -> the epoch of the manager that has heard of it.
        self._heard: dict[str, int] = {}

    def begin(self, client_id: str) -> None:
        """A new connection with this client id is to be announced."""
        self._heard.pop(client_id, None)
        self._open[client_id] = None

    def end(self, client_id: str) -> None:
        """No connection has this client id any more."""
        self._open.pop(client_id, None)
        self._heard.pop(client_id, None)

    def sent(self, client_id: str, marker: int) -> None:
        """It was announced to the present manager, with this marker behind it."""
        if client_id in self._open:
            self._open[client_id] = marker

    def came_back(self, marker: int, epoch: int) -> None:
        """The manager of `epoch` has answered a marker, or something else with a number."""
        for client_id, number in self._open.items():
            if number == marker:
                del self._open[client_id]
                self._heard[client_id] = epoch
                return

    def loses(self, client_id: str, epoch: int) -> bool:
        """Whether an announcement by another edge, heard of by this manager, ends the one here.

        The word of an earlier manager than the one that heard of it is older than it is.
        """
        since = self._heard.get(client_id)
        return since is not None and epoch >= since

    def open(self) -> Iterator[str]:
        """Client ids that no manager is known to have heard of, in their order."""
        return iter(tuple(self._open))
