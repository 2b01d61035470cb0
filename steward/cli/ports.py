"""Addresses that stay ours: ports reserved for as long as the cluster runs.

A child that is started again must come back under the address that its peers know.
So `steward up` binds every port with SO_REUSEPORT without listening on it, keeps those
sockets, and the children (same user, SO_REUSEPORT too) bind and listen beside them. A
bound socket that does not listen gets no connections. It guards against everybody who
does not set SO_REUSEPORT, which is what "in use" means here; a port that somebody else
has is found before anything is started.
"""

import errno
import socket


class PortInUse(Exception):
    """A port that can't be had. Says which, and why."""


class PortReservations:
    """Holds ports on one host until `close`. Safe to close twice."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host = host
        self._held: list[socket.socket] = []

    def reserve(self, port: int = 0) -> int:
        """Reserve `port`, or a free one for 0, and return it. Raises PortInUse."""
        if port:
            self._check_free(port)
        holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            holder.bind((self._host, port))
        except (OSError, OverflowError) as error:
            holder.close()
            raise PortInUse(self._complaint(port, error)) from None
        self._held.append(holder)
        return int(holder.getsockname()[1])

    def close(self) -> None:
        """Give all ports back."""
        while self._held:
            self._held.pop().close()

    def _check_free(self, port: int) -> None:
        # SO_REUSEADDR alone passes over connections in TIME_WAIT, and over nothing else:
        # a listener or another cluster's reservation is refused.
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self._host, port))
            except (OSError, OverflowError) as error:
                raise PortInUse(self._complaint(port, error)) from None

    def _complaint(self, port: int, error: Exception) -> str:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            return f"port {self._host}:{port} is in use; stop what listens there, or give another"
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return f"port {self._host}:{port} can't be used: {reason}"
