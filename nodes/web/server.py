"""The HTTP endpoint: its routes, the error middleware, its start and its stop.

S1  ``serve`` yields when the port is bound, and has stopped ``stop_ms`` after its end; requests
    that still run then are cut off.
S2  Every answer passes ``error_middleware``: it turns errors into JSON responses, and counts
    answers by route template, never by path.
S3  An unexpected error is a 500 without details, and a traceback in the log.
S4  Between ``error_middleware`` and the routes a request passes, in this order:
    ``spare_for_probes`` (is there room?), ``host_middleware`` (does it name this node?), and
    ``token_middleware`` (is it authorized?).
S5  /metrics reads memory only: a scrape is answered while Valkey is unavailable. It answers in
    Prometheus text or OpenMetrics, plain or gzip, by the Accept headers.

B1  A body longer than ``body_bytes_max`` gets a 413; one that is incomplete after
    ``body_timeout_ms`` gets a 408.
B2  All bodies that are being read hold at most ``ALL_BYTES_MAX`` together: a further one gets a
    503. A slow sender occupies the bytes that it has sent, so it does not block others.
B3  No body is decompressed: a Content-Encoding is refused before its first byte.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, nullcontext
from random import Random

import anyio
import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from msgspec import Struct
from prometheus_client.aiohttp import make_aiohttp_handler

from ... import __version__
from ...coordinator.clock import Clock
from ...coordinator.instruments import Instruments
from ...schemas.errors import ConfigError, ForebayError
from ...schemas.settings import Http
from . import cache, events, health, limits, locks, openapi
from .access import host_middleware, token_middleware
from .aiohttp_internals import GuardedRunner, count_request, spare_for_probes
from .error_responses import SECURITY_HEADERS, RequestRefused, answer, of_error, of_http, refuse
from .health import Heartbeat
from .protocols import CONTEXT, Context, Coordination, Served

log = structlog.get_logger(__name__)

STOP_MS = 5_000
ALL_BYTES_MAX = 67_108_864
_UNMATCHED = "unmatched"


class EndpointAddress(Struct, frozen=True):
    """Where the endpoint listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


class _Route(Struct, frozen=True):
    method: str
    path: str
    purpose: str
    handler: Handler


@asynccontextmanager
async def serve(
    served: Served,
    http: Http,
    *,
    instruments: Instruments,
    coordination: Coordination | None = None,
    event_bytes_max: int,
    clock: Clock,
    random: Random,
    origin_of: Callable[[str], str] = lambda _setting: "the settings",
    stop_ms: int = STOP_MS,
) -> AsyncIterator[EndpointAddress]:
    """Answer HTTP for this node while the body runs.

    Raises:
        ConfigError: the address cannot be listened on, or its token file contains no token.
    """
    require_token = token_middleware(http.token_file, clock, origin_of("http.token_file"))
    require_host = host_middleware(http, socket.gethostname())
    heartbeat = Heartbeat(clock)
    context = Context(
        served=served,
        instruments=instruments,
        http=http,
        event_bytes_max=event_bytes_max,
        read_body=Bodies(http, instruments).read,
        event_loop_check=heartbeat.check,
        random=random,
        clock=clock,
        coordination=coordination,
    )

    # aiohttp waits this long for handlers, then as long again for their cancellation.
    runner = GuardedRunner(
        make_app(context, spare_for_probes, require_host, require_token),
        http=http,
        instruments=instruments,
        stop_s=stop_ms / 3_000,
    )

    def gauges() -> Iterator[tuple[str, tuple[str, ...], float]]:
        yield "event_loop_lag_max_seconds", (), heartbeat.lag_max_s()
        yield "http_connections", (), float(runner.connections)
        yield "http_connections_max", (), float(runner.connections_max)

    instruments.add_source(gauges)
    try:
        with heartbeat.beating(), coordination.locks.listening() if coordination else nullcontext():
            address = await _bind(runner, http, origin_of)
            log.info("http.listening", url=address.url, connections_max=runner.connections_max)
            _warn_if_open(http, address)
            yield address
    finally:
        instruments.remove_source(gauges)
        with anyio.move_on_after(stop_ms / 1000, shield=True):
            await runner.cleanup()


def make_app(context: Context, *checks: Middleware) -> web.Application:
    """``checks`` decide in this order whether a request reaches its route."""
    app = web.Application(middlewares=[error_middleware, *checks])
    app[CONTEXT] = context
    app.on_response_prepare.append(_add_headers)

    async def describe(_request: web.Request) -> web.StreamResponse:
        return answer(described)

    about_api = _Route("GET", "/openapi.json", "this API, as OpenAPI 3.1", describe)
    routes = (*_routes(context), about_api)
    listed = [{"method": r.method, "path": r.path, "purpose": r.purpose} for r in routes]

    async def index(_request: web.Request) -> web.StreamResponse:
        served = context.served
        about = {"name": "forebay", "instance": served.instance, "namespace": served.namespace}
        return answer({**about, "routes": listed})

    about = [(r.method, r.path, r.purpose) for r in routes]
    described = openapi.document(about, version=__version__, guarded=bool(context.http.token_file))

    app.router.add_get("/", index)
    for each in routes:
        path = each.path.replace("{key}", "{key:.+}").replace("{name}", "{name:[^/]+}")
        if each.method == "GET":
            app.router.add_get(path, each.handler)
        else:
            app.router.add_route(each.method, path, each.handler)
    for resource in app.router.resources():
        context.instruments.declare("route", resource.canonical)
    context.instruments.declare("route", _UNMATCHED, {"code": ("4xx", "5xx")})
    return app


def _routes(context: Context) -> tuple[_Route, ...]:
    coordination = _COORDINATION if context.coordination else ()
    return (*_own_routes(context.served), *coordination)


def _own_routes(served: Served) -> tuple[_Route, ...]:
    return (
        _Route("GET", "/livez", "200 while the process is alive", health.probe("live")),
        _Route("GET", "/readyz", "200 when the node can work", health.probe("ready")),
        _Route("GET", "/readyz/{check}", "one check of /readyz", health.probe("ready")),
        _Route("GET", "/startupz", "200 once the node has started", health.probe("start")),
        _Route("GET", "/healthz", "all checks, with the status of /readyz", health.health),
        _Route("GET", "/stats", "statistics of this node, as JSON", health.stats),
        _Route("GET", "/metrics", "for Prometheus", make_aiohttp_handler(served.registry)),
        _Route("POST", "/v1/events", "publish events", events.post_events),
        _Route("GET", cache.READ_MANY, "read many keys through the cache", cache.read_many),
        _Route("GET", cache.READ_PREFIX + "{key}", "read through the cache", cache.read_one),
        _Route("GET", cache.EXPLAIN_PREFIX + "{key}", "why a read hits or misses", cache.explain),
    )


_COORDINATION = (
    _Route("GET", "/v1/locks", "the held locks", locks.list_all),
    _Route("GET", "/v1/locks/{name}", "holder and waiters of a lock", locks.show),
    _Route("POST", "/v1/locks/{name}", "acquire a lock, or wait for it", locks.acquire),
    _Route("POST", "/v1/locks/{name}/renew", "renew a lock", locks.renew),
    _Route("DELETE", "/v1/locks/{name}", "release a lock", locks.release),
    _Route("GET", "/v1/limits", "the rate limits", limits.list_all),
    _Route("POST", "/v1/limits/{name}/take", "take tokens of a limit", limits.take),
    _Route("POST", "/v1/limits/{name}/reserve", "reserve an estimate", limits.reserve),
    _Route("POST", "/v1/limits/{name}/settle", "settle a reservation", limits.settle),
)


@web.middleware
async def error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn errors into answers, and count the answers."""
    response = await _answered(request, handler)
    resource = request.match_info.route.resource
    template = resource.canonical if resource is not None else _UNMATCHED
    count_request(request.app[CONTEXT].instruments, template, response.status)
    return response


async def _answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return of_http(error)
    except web.RequestPayloadError:
        response = refuse(400, "malformed", "the body is not framed as HTTP/1.1 specifies")
        response.force_close()
        return response
    except ConnectionError:
        raise  # the client is gone
    except RequestRefused as error:
        return error.response
    except ForebayError as error:
        answered = of_error(error, request.app[CONTEXT].random)
        if answered is not None:
            return answered
        log.exception("http.failed")
    except Exception:
        log.exception("http.failed")
    return refuse(500, "internal", "the node failed", fix="its log says more")


async def _add_headers(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(SECURITY_HEADERS)
    response.headers.setdefault("Cache-Control", "no-store")


def _warn_if_open(http: Http, address: EndpointAddress) -> None:
    if http.reachable and not http.token_file:
        problem = "every client that reaches it may publish, invalidate, and take locks"
        fix = "set http.token_file, or let only trusted clients reach it"
        log.warning("http.open", url=address.url, problem=problem, fix=fix)


async def _bind(
    runner: GuardedRunner, http: Http, origin_of: Callable[[str], str]
) -> EndpointAddress:
    await runner.setup()
    site = web.TCPSite(runner, http.host, http.port)
    try:
        await site.start()
    except (OSError, OverflowError) as error:
        raise _not_bound(error, http, origin_of) from error
    host, port = runner.addresses[0][:2]
    return EndpointAddress(host, port)


def _not_bound(
    error: OSError | OverflowError, http: Http, origin_of: Callable[[str], str]
) -> ConfigError:
    setting, value = "http.port", str(http.port)
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.EADDRINUSE:
        problem, fix = "another process listens there", "set a free port, or 0 for any free one"
    elif code == errno.EACCES:
        problem, fix = "this user may not listen there", "set a port above 1023"
    else:
        setting, value = "http.host", http.host
        problem = "this machine has no such address"
        fix = "set 127.0.0.1, 0.0.0.0 or an address of this machine"
    return ConfigError(
        setting=setting, value=value, origin=origin_of(setting), problem=problem, fix=fix
    )


class Bodies:
    """Reads request bodies: see B1 to B3."""

    __slots__ = ("_bytes_max", "_held", "_instruments", "_timeout_s")

    def __init__(self, http: Http, instruments: Instruments) -> None:
        self._bytes_max = http.body_bytes_max
        self._timeout_s = http.body_timeout_ms / 1000
        self._instruments = instruments
        self._held = 0

    def __repr__(self) -> str:
        return f"<Bodies: {self._held} bytes held>"

    async def read(self, request: web.Request) -> bytes | web.Response:
        """The body, or the error response.

        Raises:
            ConnectionResetError: the client is gone.
            web.RequestPayloadError: the body is malformed.
        """
        if encoding := request.headers.get("Content-Encoding"):
            return self._unread(
                415, "encoded", f"{encoding[:20]!r} is not accepted", "send it uncompressed"
            )
        if (request.content_length or 0) > self._bytes_max:
            return self._too_big()
        body = bytearray()
        with anyio.move_on_after(self._timeout_s):
            try:
                return await self._fill(body, request)
            except TimeoutError as error:  # of the socket; the limit above cancels
                raise ConnectionResetError("the client is gone") from error
            finally:
                self._held -= len(body)
        self._instruments.counts["limit_reached", "http_body_time"] += 1
        return self._unread(
            408,
            "body_timeout",
            f"the body was not complete after {self._timeout_s:g} s",
            "send it faster, or in smaller parts",
        )

    async def _fill(self, body: bytearray, request: web.Request) -> bytes | web.Response:
        while chunk := await request.content.readany():
            body += chunk
            self._held += len(chunk)
            if len(body) > self._bytes_max:
                return self._too_big()
            if self._held > max(ALL_BYTES_MAX, self._bytes_max):
                self._instruments.counts["limit_reached", "http_bodies"] += 1
                response = self._unread(503, "busy", "the node reads too many bodies", "try again")
                response.headers["Retry-After"] = "1"
                return response
        return bytes(body)

    def _too_big(self) -> web.Response:
        self._instruments.counts["limit_reached", "http_body_bytes"] += 1
        problem = f"the body has more than {self._bytes_max} bytes"
        return self._unread(413, "too_large", problem, "send smaller requests")

    @staticmethod
    def _unread(status: int, code: str, problem: str, fix: str) -> web.Response:
        response = refuse(status, code, problem, fix=fix)
        response.force_close()
        return response
