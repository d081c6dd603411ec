"""Reads request bodies, bounded in size, in time, and in total.

I1  A body longer than ``body_bytes_max`` gets a 413; one that is incomplete after
    ``body_timeout_ms`` gets a 408.
I2  All bodies that are being read hold at most ``ALL_BYTES_MAX`` together: a further one gets a
    503. A slow sender occupies the bytes that it has sent, so it does not block others.
I3  No body is decompressed: a Content-Encoding is refused before its first byte.
"""

from __future__ import annotations

import anyio
from aiohttp import web

from ...coordinator.instruments import Instruments
from ...schemas.settings import Http
from .error_responses import refuse

ALL_BYTES_MAX = 67_108_864


class Bodies:
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
