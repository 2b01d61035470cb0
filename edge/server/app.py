"""The edge's public HTTP server: routes, the guard in front of them, pages, health."""

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import hdrs, web

from edge.host.hub import Hub
from edge.server.answers import error_answer, json_answer, secure
from edge.server.api import Api
from edge.server.connect import Asked, Connect
from edge.server.credentials import Doors
from edge.server.door import Doorway
from edge.server.runner import Runner
from edge.server.takeover import TakenOver
from steward.errors import Reason, StewardError
from steward.model.violations import ViolationKind
from steward.telemetry.logs import BUG, fields

IDLE_S = 30.0
MOST_QUOTED = 200
_HEALTH = frozenset({"/healthz", "/readyz"})
_log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(
    hub: Hub,
    connect: Connect,
    doors: Callable[[], Doors],
    unready: Callable[[], str | None],
    static: Path,
    max_body_bytes: int,
) -> web.Application:
    """The application. `doors` is asked per request: a port of 0 is known only later."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await _guarded(request, handler, doors(), hub)
        if not isinstance(response, TakenOver):
            secure(response)
        return response

    async def healthz(_: web.Request) -> web.Response:
        return json_answer({"status": "ok"})

    async def readyz(_: web.Request) -> web.Response:
        why = unready()
        if why is None:
            return json_answer({"status": "ready"})
        return json_answer({"status": "unready", "why": why}, 503)

    def page(name: str) -> Handler:
        async def handler(_: web.Request) -> web.StreamResponse:
            path = static / name
            if not path.is_file():
                raise web.HTTPNotFound
            return web.FileResponse(path, headers={"Cache-Control": "no-cache"})

        return handler

    app = web.Application(middlewares=[guard], client_max_size=max_body_bytes)
    app.add_routes(
        [
            web.get("/v1/connect", connect.websocket, allow_head=False),
            web.get("/v1/events", connect.events, allow_head=False),
            *Api(hub).routes(),
            web.get("/healthz", healthz),
            web.get("/readyz", readyz),
            web.get("/", page("index.html")),
            web.get("/console", page("console.html")),
        ]
    )
    if static.is_dir():
        app.router.add_static("/static/", static)
    return app


async def _guarded(
    request: web.Request, handler: Handler, doors: Doors, hub: Hub
) -> web.StreamResponse:
    """Check where the request comes from; make every failure a JSON error."""
    try:
        if request.path not in _HEALTH:
            check_entry(request, doors, hub)
        return await handler(request)
    except StewardError as error:
        return error_answer(error)
    except web.HTTPException as problem:
        if problem.status < 400:
            raise
        return _problem(problem)
    except ConnectionError:
        raise
    except Exception:
        _log.exception("a request failed by an error of this process", extra=fields(do=BUG))
        return error_answer(StewardError(Reason.INTERNAL, "an error of this edge"))


def check_entry(asked: Asked, doors: Doors, hub: Hub) -> None:
    """Raises StewardError for a request to another name, of a foreign page, or when it is late."""
    headers = asked.headers
    if not doors.admits_host(headers.get(hdrs.HOST)):
        raise StewardError(Reason.PERMISSION_DENIED, "this edge has another name")
    origins = headers.getall(hdrs.ORIGIN, ())
    if not all(map(doors.admits_origin, origins)):
        text = f"origin {', '.join(origins)[:MOST_QUOTED]!r} at {asked.path!r}"
        hub.report(ViolationKind.FOREIGN_ORIGIN, text)
        raise StewardError(Reason.PERMISSION_DENIED, "pages of this origin may not come in")
    if hub.draining and asked.path.startswith("/v1/"):
        raise hub.stopping()


def _problem(problem: web.HTTPException) -> web.Response:
    """An answer of aiohttp's own, as a row of the error table."""
    match problem.status:
        case 404:
            return error_answer(StewardError(Reason.NOT_FOUND, "nothing is here"))
        case 413:
            return error_answer(StewardError(Reason.MESSAGE_TOO_LARGE, "the body is too large"))
        case status:
            error = StewardError(Reason.PROTOCOL_VIOLATION, problem.reason)
            answer = error_answer(error, status)
            if hdrs.ALLOW in problem.headers:
                answer.headers[hdrs.ALLOW] = problem.headers[hdrs.ALLOW]
            return answer


def doors_for(
    public_url: str, port: int, allowed_origins: tuple[str, ...], *, loopback: bool
) -> Doors:
    """The allow list: the public URL, what was configured, and on loopback its three names."""
    urls = [*allowed_origins]
    if public_url:
        urls.append(public_url)
    if loopback:
        urls += [f"http://{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")]
    return Doors(urls)


def make_runner(app: web.Application, doorway: Doorway) -> web.AppRunner:
    """A runner without access log; a client that sends no whole request is cut after `IDLE_S`.

    Bodies are taken as they come: nothing unpacks what a stranger has packed.
    """
    return Runner(
        app,
        doorway,
        access_log=None,
        handle_signals=False,
        keepalive_timeout=IDLE_S,
        shutdown_timeout=0.5,
        auto_decompress=False,
        # Heartbeats find dead peers long before the kernel would.
        tcp_keepalive=False,
    )
