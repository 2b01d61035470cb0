"""What a one-use secret stands for, as bytes. Stores are full of them: only add."""

import orjson

from auth_service.core.grants import Grant, Login, Ticket
from steward.model.identity import Identity
from steward.model.keys import UserKey


def pack(grant: Grant) -> bytes:
    """What is stored for a grant, under the digest of its secret."""
    if isinstance(grant, Login):
        return orjson.dumps(
            {
                "kind": "login",
                "user": [*grant.user],
                "scopes": grant.scopes,
                "created_at_ms": grant.created_at_ms,
                "expires_at_ms": grant.expires_at_ms,
            }
        )
    identity = grant.identity
    return orjson.dumps(
        {
            "kind": "ticket",
            "user": [*identity.user],
            "scopes": identity.scopes,
            "token_id": identity.token_id,
            "issued_at_ms": identity.issued_at_ms,
            "token_expires_at_ms": identity.expires_at_ms,
            "origin": grant.origin,
            "expires_at_ms": grant.expires_at_ms,
        }
    )


def unpack(body: bytes) -> Grant:
    """The grant that `pack` made this of."""
    value = orjson.loads(body)
    user, scopes = UserKey(*value["user"]), tuple(value["scopes"])
    if value["kind"] == "login":
        return Login(user, scopes, value["created_at_ms"], value["expires_at_ms"])
    identity = Identity(
        user,
        scopes,
        value["token_expires_at_ms"],
        value["issued_at_ms"],
        value["token_id"],
    )
    return Ticket(identity, value["origin"], value["expires_at_ms"])
