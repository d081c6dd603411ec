"""The bearer token: once there is one, whoever reads or changes anything has to show it.

B1  With ``http.token_file`` set, every request below /v1 needs the token, also one for a route
    that is added later; without it nothing is told or changed. Probes and metrics are free.
B2  It is compared in constant time, and is in no answer, no log, and no ``repr``.
B3  A file that is replaced counts within ``LOOK_S``; one that is lost or spoilt then leaves
    the token that there was, and a line in the log. At the start it is a ConfigError.
"""

from __future__ import annotations

import hmac
import re
from pathlib import Path

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from ...coordinator.clock import Clock
from ...coordinator.files import open_to_others, read_file
from ...coordinator.log_once import LogOnce
from ...schemas.errors import ConfigError, ForebayError
from .error_responses import refuse

__all__ = ["Bearer", "bearer_of"]

log = structlog.get_logger(__name__)

LOOK_S = 1.0
_TOKEN = re.compile(rb"[A-Za-z0-9._~+/-]{16,1024}=*")
_BYTES_MAX = 4_096
_SETTING = "http.token_file"


def bearer_of(path: str, clock: Clock, origin: str) -> Middleware:
    """Asks for the token in this file; for nothing, where none is named.

    Raises:
        ConfigError: the file cannot be read, or holds no token.
    """
    bearer = None
    if path:
        try:
            bearer = Bearer(Path(path), clock)
        except (OSError, ValueError) as error:
            problem = f"it holds no token: {_why(error)}"
            fix = "write one there: openssl rand -hex 32"
            raise ConfigError(
                setting=_SETTING, value=path, origin=origin, problem=problem, fix=fix
            ) from None

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        if bearer is not None and _is_guarded(request):
            given = request.headers.getall("Authorization", [])
            if not bearer.accepts(given):
                return _unauthorized(bool(given))
        return await handler(request)

    return guarded


class Bearer:
    def __init__(self, path: Path, clock: Clock) -> None:
        """Raises OSError or ValueError: there is no token."""
        self._path = path
        self._clock = clock
        self._failing = LogOnce(clock)
        self._looked_at = clock.monotonic()
        self._stamp = self._stamped()
        self._token = self._read()

    def __repr__(self) -> str:
        return f"<Bearer of {self._path}>"

    def accepts(self, headers: list[str]) -> bool:
        """Whether this is one Authorization header, with the token."""
        self._look()
        scheme, _, token = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
        given = token.strip().encode(errors="replace")
        return hmac.compare_digest(given, self._token) and scheme.lower() == "bearer"

    def _look(self) -> None:
        """Read the file again, if it is another than before."""
        now = self._clock.monotonic()
        if now < self._looked_at + LOOK_S:
            return
        self._looked_at = now
        try:
            stamp = self._stamped()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            self._token = self._read()
        except (OSError, ValueError) as error:
            failed = ForebayError(_why(error))
            self._failing.say(
                log, "http.token_not_read", failed, level="error", path=str(self._path)
            )
        else:
            self._failing.over()
            log.info("http.token_replaced", path=str(self._path))
            if may := open_to_others(self._path):
                fix = "chmod o-rw, or mount it with such a mode"
                log.warning("http.token_exposed", path=str(self._path), may=may, fix=fix)

    def _stamped(self) -> tuple[int, int, int]:
        found = self._path.stat()
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> bytes:
        content = read_file(self._path, _BYTES_MAX).strip()
        if not _TOKEN.fullmatch(content):
            raise ValueError("write 16 to 1024 letters, digits or ._~+/- on one line")
        return content


def _is_guarded(request: web.Request) -> bool:
    return request.path.startswith("/v1/")


def _why(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _unauthorized(given: bool) -> web.Response:
    problem = "this is not the token" if given else "a token is needed"
    fault = ', error="invalid_token"' if given else ""
    response = refuse(
        401,
        "unauthorized",
        problem,
        field="Authorization",
        fix="send Authorization: Bearer TOKEN, with the token of http.token_file",
        headers={"WWW-Authenticate": f'Bearer realm="forebay"{fault}'},
    )
    response.force_close()  # whatever body comes with it is not read
    return response
