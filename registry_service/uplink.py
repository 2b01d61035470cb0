"""Dialling a node's address: the second half of evidence B.

Only a refusal by the other machine means that nothing listens there. A connection that
is accepted proves little, since the kernel accepts for a paused process, and a time-out
proves nothing.
"""

import asyncio
from typing import Protocol

from registry_service.core.commands import DialOutcome

DIAL_TIMEOUT_S = 0.3


class Dialer(Protocol):
    """Tries an address once. Never raises for what the network does."""

    async def dial(self, address: str) -> DialOutcome: ...


class TcpDialer:
    """Opens a TCP connection and closes it at once."""

    async def dial(self, address: str) -> DialOutcome:
        """Dial `host:port`, at most 300 ms. A name that does not resolve is a time-out."""
        host, _, port = address.rpartition(":")
        try:
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except ConnectionRefusedError:
            return DialOutcome.REFUSED
        except OSError:  # TimeoutError is one.
            return DialOutcome.TIMED_OUT
        writer.transport.abort()
        return DialOutcome.ACCEPTED
