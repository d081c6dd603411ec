"""Access to the endpoint: the host that a request names, and the bearer token.

A web page may resolve its own name to this machine (DNS rebinding). To the browser the node is
then part of that page's site, and the page may read and publish. Its requests carry its name.

N1  An IP literal is served: rebinding needs a name. The served names are localhost, the name of
    this machine, ``http.host`` and ``http.hosts``. Any other name gets a 421.
N2  Probes and /metrics are served under any name.
N3  A request without exactly one valid Host gets a 400, on every route; in HTTP/1.0 the Host may
    be missing. An HTTP/1.0 request with Transfer-Encoding gets a 400 too: its end is ambiguous.
N4  A target that is a URL must name this node as well.

B1  With ``http.token_file`` set, every request below /v1 needs the token, also on routes that are
    added later; without the token nothing is read or changed. Probes and metrics need none.
B2  The token is compared in constant time, and appears in no answer, no log, and no ``repr``.
B3  A replaced file takes effect within ``LOOK_S``. A file that is lost or invalid leaves the
    previous token in force, and a line in the log. At the start it is a ConfigError.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Iterable
from pathlib import Path

import structlog
from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler, Middleware

from ...coordinator.clock import Clock
from ...coordinator.files import open_to_others, read_file
from ...coordinator.log_once import LogOnce
from ...schemas.errors import ConfigError, ForebayError
from ...schemas.settings import Http
from .error_responses import refuse
from .health import is_probe

log = structlog.get_logger(__name__)

_SHOWN_MAX = 80
_AUTHORITY = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]{2,45})\]|(?P<name>[A-Za-z0-9._~!$&'()*+,;=%-]*))(?::[0-9]{0,5})?"
)
LOOK_S = 1.0
_TOKEN = re.compile(rb"[A-Za-z0-9._~+/-]{16,1024}=*")
_BYTES_MAX = 4_096
_SETTING = "http.token_file"


def host_middleware(http: Http, machine: str) -> Middleware:
    """Refuse requests that are not for this node. ``machine`` is the name of the machine."""
    names = ServedNames(["localhost", machine, machine.partition(".")[0], http.host, *http.hosts])

    @web.middleware
    async def addressed(request: web.Request, handler: Handler) -> web.StreamResponse:
        if problem := host_problem(request):
            return _closing(
                refuse(400, "malformed", problem, fix="send a request as HTTP/1.1 specifies")
            )
        if not (is_probe(request) or _is_metrics(request)):
            for authority in _authorities(request):
                if not names.serves(authority):
                    return _misdirected(authority)
        return await handler(request)

    return addressed


def host_problem(request: web.BaseRequest) -> str:
    """Why the Host or framing of this request is invalid; empty: it is valid."""
    given = request.headers.getall("Host", [])
    if len(given) > 1:
        return "the request has more than one Host header"
    if request.version < HttpVersion11:
        if "Transfer-Encoding" in request.headers:
            return "HTTP/1.0 has no Transfer-Encoding"
    elif not given:
        return "the request has no Host header"
    if given and not _AUTHORITY.fullmatch(given[0]):
        return "the Host header is not a host with an optional port"
    return ""


class ServedNames:
    """The served names, case-insensitive; ``*.x`` matches every name that ends in ``.x``."""

    __slots__ = ("_below", "_exact")

    def __init__(self, names: Iterable[str]) -> None:
        plain = [name.lower().rstrip(".") for name in names]
        self._exact = frozenset(filter(None, plain))
        self._below = tuple(name[1:] for name in plain if name.startswith("*."))

    def serves(self, authority: str) -> bool:
        """Whether this host, with or without a port, is served."""
        found = _AUTHORITY.fullmatch(authority)
        if found is None:
            return False
        name = (found["v6"] or found["name"]).lower().removesuffix(".")
        return _is_address(name) or name in self._exact or name.endswith(self._below)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _authorities(request: web.Request) -> list[str]:
    given = request.headers.getall("Host", [])
    _, slashes, rest = request.raw_path.partition("://")
    is_url = slashes and not request.raw_path.startswith("/")
    return [*given, re.split(r"[/?#]", rest, maxsplit=1)[0]] if is_url else given


def _is_metrics(request: web.Request) -> bool:
    resource = request.match_info.route.resource
    return resource is not None and resource.canonical == "/metrics"


def _misdirected(authority: str) -> web.Response:
    problem = f"this node is not {authority[:_SHOWN_MAX]!r}"
    fix = "use an IP address or a name of the node's machine, or add this name to its http.hosts"
    return _closing(refuse(421, "wrong_host", problem, field="Host", fix=fix))


def _closing(response: web.Response) -> web.Response:
    response.force_close()  # a body that may follow is not read
    return response


def token_middleware(path: str, clock: Clock, origin: str) -> Middleware:
    """Require the token in this file; with an empty path, require nothing.

    Raises:
        ConfigError: the file cannot be read, or contains no token.
    """
    bearer = None
    if path:
        try:
            bearer = BearerToken(Path(path), clock)
        except (OSError, ValueError) as error:
            problem = f"the file contains no token: {_why(error)}"
            fix = "write one to it: openssl rand -hex 32"
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


class BearerToken:
    def __init__(self, path: Path, clock: Clock) -> None:
        """Raises OSError or ValueError: the file contains no valid token."""
        self._path = path
        self._clock = clock
        self._failing = LogOnce(clock)
        self._checked_at = clock.monotonic()
        self._stamp = self._stamped()
        self._token = self._read()

    def __repr__(self) -> str:
        return f"<BearerToken of {self._path}>"

    def accepts(self, headers: list[str]) -> bool:
        """Whether ``headers`` is one Authorization header with the token."""
        self._reload()
        scheme, _, token = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
        given = token.strip().encode(errors="replace")
        return hmac.compare_digest(given, self._token) and scheme.lower() == "bearer"

    def _reload(self) -> None:
        """Read the file again if it has changed."""
        now = self._clock.monotonic()
        if now < self._checked_at + LOOK_S:
            return
        self._checked_at = now
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
    problem = "the token is wrong" if given else "a token is needed"
    fault = ', error="invalid_token"' if given else ""
    response = refuse(
        401,
        "unauthorized",
        problem,
        field="Authorization",
        fix="send Authorization: Bearer TOKEN, with the token of http.token_file",
        headers={"WWW-Authenticate": f'Bearer realm="forebay"{fault}'},
    )
    response.force_close()  # the body is not read
    return response
