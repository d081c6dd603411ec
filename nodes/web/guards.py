"""Guards of the connections: nobody holds one without using it, and none costs much.

G1  A request's headers are complete within ``header_timeout_ms`` of the connection's start,
    or of their first byte on a kept one; otherwise the connection is closed. Silent ones too.
G2  Never more than ``connections_max`` connections. When there would be, the one that has
    waited longest for its headers makes room; if all are at work, the new one gets a 503.
G3  Who does not read the answer is cut off after ``body_timeout_ms``.
G4  What is no valid HTTP/1.1 gets a 400 and is counted. It leaves one line at debug level,
    without a byte of what was sent.

Bodies have their own guard, in bodies.py.
"""

from __future__ import annotations

import asyncio
from typing import Any

import structlog
from aiohttp import web

from ...coordinator.instruments import Instruments
from ...schemas.settings import Http
from .refusals import SECURITY_HEADERS, refuse

__all__ = ["GuardedHandler", "GuardedRunner", "GuardedServer", "client_gone", "count_request"]

log = structlog.get_logger(__name__)

KEPT_IDLE_S = 60.0
_MALFORMED = "malformed"  #: as a route: what is no HTTP
LINGER_S = 2.0  #: how long an unread body is thrown away after the answer
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n"
    b"Content-Length: 0\r\nConnection: close\r\n\r\n"
)
_CLIENTS_FAULT = (web.RequestPayloadError, web.PayloadAccessError, OSError)


def count_request(instruments: Instruments, route: str, status: int) -> None:
    """Count an answer of a route, by the class of its status code."""
    code = {4: "4xx", 5: "5xx"}.get(status // 100, "2xx")
    instruments.counts["http_requests", route, code] += 1


async def client_gone(request: web.Request) -> None:
    """Return when the client has closed its connection, for whoever works long for it."""
    assert isinstance(request.protocol, GuardedHandler)
    await request.protocol.gone.wait()


class GuardedHandler(web.RequestHandler):
    """One connection."""

    __slots__ = ("_guard", "_header_timer", "_write_timer", "gone")

    def __init__(self, guard: GuardedServer, **settings: Any) -> None:
        super().__init__(guard, **settings)
        self.gone = asyncio.Event()
        self._guard = guard
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not self._guard.admit():
            assert isinstance(transport, asyncio.Transport)
            transport.write(_FULL)
            transport.close()
            return
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.gone.set()
        self._headers_done()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        requests, idle = self._request_count, self._waiter is not None
        super().data_received(data)
        if self._request_count != requests:
            self._headers_done()
            self._fail_unfinished()
        elif idle and data and self._header_timer is None:
            self._expect_headers()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self._loop.call_later(self._guard.write_timeout_s, self._cut_off)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def give_way(self) -> None:
        """Close the connection, which is waiting for headers."""
        self._headers_done()
        self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if isinstance(exc, ConnectionError):
            raise exc  # aiohttp forgets the connection then, without a word
        if status == 400:
            log.debug("http.malformed", remote=request.remote, fault=type(exc).__name__)
            response = refuse(400, "malformed", "this is no valid HTTP/1.1 request")
        else:
            log.error("http.failed", exc_info=exc)
            response = refuse(500, "internal", "the answer could not be made")
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun, there is no room for an error")
        self._guard.count(response.status)
        response.headers.update(SECURITY_HEADERS)
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        exc = kwargs.get("exc_info")
        if isinstance(exc, _CLIENTS_FAULT):
            log.debug("http.broken_off", fault=type(exc).__name__)
        else:
            log.error("http.connection_failed", exc_info=exc)

    def _expect_headers(self) -> None:
        self._guard.waiting[self] = None
        timeout_s = self._guard.header_timeout_s
        self._header_timer = self._loop.call_later(timeout_s, self._headers_late)

    def _headers_done(self) -> None:
        self._guard.waiting.pop(self, None)
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _headers_late(self) -> None:
        self._guard.reached("http_headers")
        self.give_way()

    def _fail_unfinished(self) -> None:
        # Another message while a body is unfinished is the parser's error about that body, and
        # aiohttp would tell it only to the next request.
        current = self._current_request
        if current is not None and not current.content.is_eof():
            current.content.set_exception(web.RequestPayloadError("the body is broken"))

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _cut_off(self) -> None:
        self._guard.reached("http_unread_answer")
        if self.transport is not None:
            self.transport.abort()


class GuardedServer(web.Server):
    """Makes the connections, and knows which of them still owe their headers."""

    def __init__(self, inner: web.Server, http: Http, instruments: Instruments) -> None:
        super().__init__(inner.request_handler, request_factory=inner.request_factory)
        self.header_timeout_s = http.header_timeout_ms / 1000
        self.write_timeout_s = http.body_timeout_ms / 1000
        self.waiting: dict[GuardedHandler, None] = {}  # the oldest first
        self._connections_max = http.connections_max
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

    def admit(self) -> bool:
        if len(self._connections) < self._connections_max:
            return True
        self.reached("http_connections")
        oldest = next(iter(self.waiting), None)
        if oldest is None:
            return False
        oldest.give_way()
        return True

    def reached(self, limit: str) -> None:
        self._instruments.counts["limit_reached", limit] += 1

    def count(self, status: int) -> None:
        count_request(self._instruments, _MALFORMED, status)


class GuardedRunner(web.AppRunner):
    __slots__ = ("_http", "_instruments")

    def __init__(
        self, app: web.Application, *, http: Http, instruments: Instruments, stop_s: float
    ) -> None:
        super().__init__(app, shutdown_timeout=stop_s)
        self._http = http
        self._instruments = instruments

    async def _make_server(self) -> web.Server:
        return GuardedServer(await super()._make_server(), self._http, self._instruments)
