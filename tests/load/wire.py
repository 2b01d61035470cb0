"""The client of `steward load`, under the name that measurements here know it by."""

from steward.load.wire import LoadSocket, StreamBroken, connect

__all__ = ["LoadSocket", "StreamBroken", "connect"]
