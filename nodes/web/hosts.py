"""The name by which a request asks for this node: the authority of its target, and its Host.

A web page may let its own name resolve to this machine (DNS rebinding). To the browser the node is
then part of that page's site, and the page may read and publish. Its requests carry its name.

N1  An IP literal is served: rebinding needs a name. The names that are served are localhost, the
    name of this machine, ``http.host`` and ``http.hosts``. Any other is a 421.
N2  Probes and /metrics are served under any name.
N3  A request that has not exactly one valid Host is a 400, on every route; in HTTP/1.0 it may
    have none. So is an HTTP/1.0 request with Transfer-Encoding, of which nobody can tell the end.
N4  A target that is a URL has to name this node as well.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler, Middleware

from ...schemas.settings import Http
from .error_responses import refuse
from .health import is_probe

__all__ = ["Names", "hosts_of", "malformed"]

_SHOWN_MAX = 80
_AUTHORITY = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]{2,45})\]|(?P<name>[A-Za-z0-9._~!$&'()*+,;=%-]*))(?::[0-9]{0,5})?"
)


def hosts_of(http: Http, machine: str) -> Middleware:
    """Refuses requests that are not for this node. ``machine`` is the name of the machine."""
    names = Names(["localhost", machine, machine.partition(".")[0], http.host, *http.hosts])

    @web.middleware
    async def addressed(request: web.Request, handler: Handler) -> web.StreamResponse:
        if problem := malformed(request):
            return _closing(refuse(400, "malformed", problem, fix="send what HTTP/1.1 demands"))
        if not (is_probe(request) or _is_metrics(request)):
            for authority in _authorities(request):
                if not names.serve(authority):
                    return _misdirected(authority)
        return await handler(request)

    return addressed


def malformed(request: web.BaseRequest) -> str:
    """Why no request may be like this one, or nothing."""
    given = request.headers.getall("Host", [])
    if len(given) > 1:
        return "it has more than one Host"
    if request.version < HttpVersion11:
        if "Transfer-Encoding" in request.headers:
            return "HTTP/1.0 has no Transfer-Encoding"
    elif not given:
        return "it has no Host"
    if given and not _AUTHORITY.fullmatch(given[0]):
        return "its Host is no host with an optional port"
    return ""


class Names:
    """Names that are served, in any case; ``*.x`` is every name that ends in ``.x``."""

    __slots__ = ("_below", "_exact")

    def __init__(self, names: Iterable[str]) -> None:
        plain = [name.lower().rstrip(".") for name in names]
        self._exact = frozenset(filter(None, plain))
        self._below = tuple(name[1:] for name in plain if name.startswith("*."))

    def serve(self, authority: str) -> bool:
        """Whether this is a host of ours, with or without a port."""
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
    response.force_close()  # the body that may follow is not read
    return response
