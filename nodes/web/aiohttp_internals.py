"""Connection limits that need internals of aiohttp; no other module uses these.

G1  The headers of a request must be complete within ``header_timeout_ms`` of the connection's
    start, or of their first byte on a kept-alive connection; else the connection is closed. This
    holds for a silent connection too.
G2  At most ``connections_max`` connections are served. A further one replaces the connection that
    has been without a request for longest: silent, slow with its headers, or kept alive. If all
    are busy, ``SPARE`` more are served, for one probe each; any other request on these gets a 503.
G3  A client that does not read its answer is disconnected after ``body_timeout_ms``, also for a
    small answer, and also while the connection is being closed.
G4  Input that is not valid HTTP/1.1 gets a 400 and is counted. It leaves one log line at debug
    level, without any byte of the input.
G5  These limits hold on the event loop of asyncio and on uvloop.

The limits of bodies are in server.py. ``make test-newest-aiohttp`` tests this file with the newest
aiohttp.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any, cast

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from ...coordinator.instruments import Instruments
from ...schemas.settings import Http
from .error_responses import SECURITY_HEADERS, refuse
from .health import is_probe

log = structlog.get_logger(__name__)

SPARE = 8  #: connections beyond the limit, for probes
KEPT_IDLE_S = 60.0
_MALFORMED = "malformed"  #: the route label of input that is not HTTP
LINGER_S = 2.0  #: how long an unread body is discarded after the answer
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n"
    b"Content-Length: 0\r\nConnection: close\r\n\r\n"
)
_CLIENT_ERRORS = (web.RequestPayloadError, web.PayloadAccessError, OSError)


def count_request(instruments: Instruments, route: str, status: int) -> None:
    """Count an answer of a route, by the class of its status code."""
    code = {4: "4xx", 5: "5xx"}.get(status // 100, "2xx")
    instruments.counts["http_requests", route, code] += 1


async def client_gone(request: web.Request) -> None:
    """Return when the client has closed its connection."""
    assert isinstance(request.protocol, GuardedHandler)
    await request.protocol.gone.wait()


def connections_within(connections_max: int, open_files: int) -> int:
    """``connections_max``, or the number that the limit of open files allows.

    Without a free file the loop could not accept a connection, and so could not close another one
    for it. A quarter of the files, at least 64, is left to the rest of the process.
    """
    room = open_files - max(64, open_files // 4) - SPARE
    return connections_max if open_files < 0 else max(1, min(connections_max, room))


@web.middleware
async def spare_for_probes(request: web.Request, handler: Handler) -> web.StreamResponse:
    """On a connection beyond the limit, serve one probe and no other request."""
    assert isinstance(request.protocol, GuardedHandler)
    if not request.protocol.spare:
        return await handler(request)
    if is_probe(request):
        response = await handler(request)
    else:
        problem, fix = "all connections are busy", "try again after the time in Retry-After"
        response = refuse(503, "busy", problem, fix=fix, headers={"Retry-After": "1"})
    response.force_close()
    return response


class GuardedHandler(web.RequestHandler):
    """One connection; ``spare``: it is beyond the limit."""

    __slots__ = ("_guard", "_header_timer", "_link", "_write_timer", "gone", "spare")

    def __init__(self, guard: GuardedServer, **settings: Any) -> None:
        super().__init__(guard, **settings)
        self.gone = asyncio.Event()
        self.spare = False
        self._guard = guard
        self._link: asyncio.Transport  # aiohttp drops its reference in force_close
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # The transport of uvloop has these methods without being a subclass.
        self._link = cast(asyncio.Transport, transport)
        if not self._guard.admit(self):
            self.close()
            self._link.write(_FULL)
            self._link.close()
            return
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.gone.set()
        self._headers_done()
        self._stop_write_timer()
        self._guard.spare.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        requests, idle = self._request_count, self._waiter is not None
        super().data_received(data)
        if self._request_count != requests:
            self._headers_done()
            self._fail_unfinished()
        elif idle and data and self._header_timer is None:
            self._expect_headers()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        finished = await super().finish_response(request, resp, start_time)
        if self.transport is not None:
            if not self._messages:
                self._guard.unused[self] = None
            self._expect_reader()
        return finished

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reader()

    def resume_writing(self) -> None:
        self._stop_write_timer()
        self._expect_reader()
        super().resume_writing()

    def give_way(self) -> None:
        """Close this connection, which has no request."""
        self._headers_done()
        self._guard.spare.pop(self, None)
        if self.spare and not self._request_count:
            self._link.write(_FULL)
            self.force_close()
            return
        self.force_close()
        if self._link.get_write_buffer_size():
            self._link.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if isinstance(exc, ConnectionError):
            raise exc  # aiohttp then drops the connection silently
        if status == 400:
            log.debug("http.malformed", remote=request.remote, fault=type(exc).__name__)
            response = refuse(400, "malformed", "the request is not valid HTTP/1.1")
        else:
            log.error("http.failed", exc_info=exc)
            response = refuse(500, "internal", "the answer could not be made")
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun, so no error can be sent")
        self._guard.count(response.status)
        response.headers.update(SECURITY_HEADERS)
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        exc = kwargs.get("exc_info")
        if isinstance(exc, _CLIENT_ERRORS):
            log.debug("http.client_disconnected", fault=type(exc).__name__)
        else:
            log.error("http.connection_failed", exc_info=exc)

    def _expect_headers(self) -> None:
        self._guard.unused.pop(self, None)
        self._guard.unused[self] = None
        timeout_s = self._guard.header_timeout_s
        self._header_timer = self._loop.call_later(timeout_s, self._headers_late)

    def _headers_done(self) -> None:
        self._guard.unused.pop(self, None)
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _headers_late(self) -> None:
        self._guard.reached("http_headers")
        self.give_way()

    def _fail_unfinished(self) -> None:
        # A message that follows an unfinished body is the parser's error about that body; aiohttp
        # would raise it only in the next request.
        current = self._current_request
        if current is not None and not current.content.is_eof():
            current.content.set_exception(web.RequestPayloadError("the body is broken"))

    def _expect_reader(self) -> None:
        if self._write_timer is None and self._link.get_write_buffer_size():
            self._write_timer = self._loop.call_later(self._guard.write_timeout_s, self._cut_off)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _cut_off(self) -> None:
        self._write_timer = None
        if self._link.get_write_buffer_size():
            self._guard.reached("http_unread_answer")
            self._link.abort()


class GuardedServer(web.Server):
    """Creates the connections, and tracks the ones without a request."""

    def __init__(
        self, inner: web.Server, http: Http, instruments: Instruments, connections_max: int
    ) -> None:
        super().__init__(inner.request_handler, request_factory=inner.request_factory)
        self.header_timeout_s = http.header_timeout_ms / 1000
        self.write_timeout_s = http.body_timeout_ms / 1000
        self.unused: dict[GuardedHandler, None] = {}  # ordered by time without a request
        self.spare: dict[GuardedHandler, None] = {}  # oldest first
        self._connections_max = connections_max
        self._instruments = instruments
        instruments.declare("route", _MALFORMED, {"code": ("4xx", "5xx")})

    def __call__(self) -> GuardedHandler:
        return GuardedHandler(
            self,
            loop=self._loop,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=KEPT_IDLE_S,
            lingering_time=LINGER_S,
        )

    @property
    def taken(self) -> int:
        """Connections that count against the bound; spare ones do not."""
        return len(self._connections) - len(self.spare)

    def admit(self, new: GuardedHandler) -> bool:
        """Make room for a new connection; false: there is none."""
        if self.taken < self._connections_max:
            return True
        self.reached("http_connections")
        oldest = next((each for each in self.unused if not each.spare), None)
        if oldest is not None:
            oldest.give_way()
            return True
        if len(self.spare) >= SPARE:
            oldest = next((each for each in self.spare if each in self.unused), None)
            if oldest is None:
                return False
            oldest.give_way()
        new.spare = True
        self.spare[new] = None
        return True

    def reached(self, limit: str) -> None:
        self._instruments.counts["limit_reached", limit] += 1

    def count(self, status: int) -> None:
        count_request(self._instruments, _MALFORMED, status)


class GuardedRunner(web.AppRunner):
    __slots__ = ("_http", "_instruments", "connections_max")

    def __init__(
        self, app: web.Application, *, http: Http, instruments: Instruments, stop_s: float
    ) -> None:
        super().__init__(app, shutdown_timeout=stop_s)
        self._http = http
        self._instruments = instruments
        open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.connections_max = connections_within(http.connections_max, open_files)

    @property
    def connections(self) -> int:
        """The connections that count against the bound."""
        return self.server.taken if isinstance(self.server, GuardedServer) else 0

    async def _make_server(self) -> web.Server:
        inner = await super()._make_server()
        return GuardedServer(inner, self._http, self._instruments, self.connections_max)
