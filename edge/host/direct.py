"""Writing to a socket without going through its transport, where that changes nothing.

The transport's own write costs a microsecond per frame more than the system call. As long
as the transport holds nothing back, the bytes may go to the socket directly; what the socket
does not take is given to the transport, which sends it when there is room, before anything
that comes later. So the order is kept, and unsent bytes are always the transport's: its
buffer size is still the measure of a slow reader.

Safe on these conditions, which the caller keeps: the transport was not told to close, its
`connection_lost` has not come (until then the descriptor is its own), and it holds no bytes.
Errors are left to the transport too: it meets the same one and ends the connection.
"""

import asyncio
import os

NONE = -1
"""No descriptor: everything goes through the transport."""


def descriptor_of(transport: asyncio.BaseTransport) -> int:
    """The descriptor of a plain TCP transport; NONE for TLS and for what is no socket."""
    if transport.get_extra_info("sslcontext") is not None:
        return NONE
    sock = transport.get_extra_info("socket")
    return NONE if sock is None else int(sock.fileno())


def write_through(transport: asyncio.WriteTransport, descriptor: int, data: bytes) -> bool:
    """Write `data` to the socket now; the transport gets what is left. Never raises OSError.

    True: the socket took all of it.
    """
    try:
        taken = os.write(descriptor, data)
    except OSError:
        taken = 0
    if taken == len(data):
        return True
    transport.write(data[taken:] if taken else data)
    return False
