"""HTTP answers of the edge: JSON, errors from the one table, and the headers of every answer."""

import math
from collections.abc import Mapping
from typing import Any

import orjson
from aiohttp import web

from steward.errors import StewardError

PAGE_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "font-src 'self'",
        "connect-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
_SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": PAGE_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def json_answer(
    body: Mapping[str, Any] | bytes, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """A JSON object, or one that is encoded already. Never stored by anybody."""
    return web.Response(
        body=body if isinstance(body, bytes) else orjson.dumps(body),
        status=status,
        content_type="application/json",
        headers={"Cache-Control": "no-store", **(headers or {})},
    )


def error_answer(error: StewardError, status: int | None = None) -> web.Response:
    """A row of the error table as an HTTP answer, with `Retry-After` where it says when."""
    body: dict[str, Any] = {"reason": error.reason.value, "message": error.message}
    headers = {}
    code = status or error.row.http_status or 500
    retry_after_ms = error.retry_after_ms
    if retry_after_ms is None and code == 503:
        retry_after_ms = 1000
    if retry_after_ms:
        body["retry_after_ms"] = retry_after_ms
        headers["Retry-After"] = str(math.ceil(retry_after_ms / 1000))
    if code == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="steward"'
    return json_answer(body, code, headers)


def secure(response: web.StreamResponse) -> None:
    """Put the headers of every answer on one that has not begun."""
    if not response.prepared:
        for name, value in _SECURITY.items():
            response.headers.setdefault(name, value)
