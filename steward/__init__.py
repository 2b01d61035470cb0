"""Steward: the real-time home of AI agents.

The public facade of the Python client: `from steward import Client`. Importing this
package loads nothing else until a name is used: the services are parts of it too, and
must not pay for a client. Agent authors import from `steward.agent`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steward.client.client import Client

__all__ = ["Client"]


def __getattr__(name: str) -> Any:
    if name == "Client":
        from steward.client.client import Client

        return Client
    raise AttributeError(f"module 'steward' has no attribute {name!r}")
