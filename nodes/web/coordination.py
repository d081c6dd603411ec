"""What is asked and answered over HTTP about locks and limits: the shapes.

Durations that are given are seconds, those that are told are milliseconds.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from aiohttp import web
from msgspec import Struct

from ...schemas.limits import Limit, Verdict
from ...schemas.locks import LEASE_DEFAULT_S
from .error_responses import RequestRefused
from .protocols import CONTEXT, Coordination

__all__ = [
    "Acquire",
    "Granted",
    "Release",
    "Released",
    "Renew",
    "Reserve",
    "Reserved",
    "Settle",
    "Settled",
    "ShownHolder",
    "ShownLimits",
    "ShownLock",
    "ShownLocks",
    "ShownWaiting",
    "Take",
    "asked",
    "decoder",
    "serving",
]

T = TypeVar("T")


class Acquire(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ask for a lock."""

    lease: float = LEASE_DEFAULT_S  #: seconds until it ends, unless it is renewed; 2 to 30
    timeout: float = 0.0  #: seconds to wait for it; 0 to 60
    meta: dict[str, Any] | None = None  #: shown to those who look; up to 1 kB
    nonce: str | None = None  #: drawn by the client: asked again, the same lease


class Released(Struct, frozen=True, kw_only=True):
    name: str
    released: bool = True


class Renew(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    nonce: str
    lease: float = LEASE_DEFAULT_S


class Release(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    nonce: str


class Granted(Struct, frozen=True, kw_only=True):
    """A lease."""

    name: str
    nonce: str  #: what it is renewed and released with
    token: int  #: for guards: larger than that of each holder before
    lease_ms: int
    left_ms: int  #: of it, when this was sent


class ShownHolder(Struct, frozen=True, kw_only=True):
    """As ``schemas.locks.Holder``, without what it is released with."""

    by: str
    meta: dict[str, Any]
    token: int
    weight: int
    since_ms: int
    left_ms: int


class ShownWaiting(Struct, frozen=True, kw_only=True):
    by: str
    meta: dict[str, Any]
    weight: int
    waited_ms: int
    silent_ms: int


class ShownLock(Struct, frozen=True, kw_only=True):
    """A lock as it was a moment ago."""

    name: str
    kind: str
    capacity: int
    live: bool
    token: int
    holders: tuple[ShownHolder, ...]
    queue: tuple[ShownWaiting, ...]
    waiting: int


class ShownLocks(Struct, frozen=True, kw_only=True):
    locks: list[ShownLock]


class Take(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ask a limit."""

    subject: str  #: who or what is limited
    cost: int = 1
    partial: bool = False  #: take as much of it as there is


class Reserve(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    subject: str
    cost: int = 1  #: the estimate
    ttl: float = 60.0  #: seconds in which it is to be settled; then the estimate stands


class Settle(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    subject: str
    id: str
    actual: int  #: what it was, 0 or more


class Reserved(Struct, frozen=True, kw_only=True):
    id: str  #: empty: the server was away, there is nothing to settle
    verdict: Verdict


class Settled(Struct, frozen=True, kw_only=True):
    settled: bool = True


class ShownLimits(Struct, frozen=True, kw_only=True):
    limits: list[Limit]


def serving(request: web.Request) -> Coordination:
    """Its routes are there only if this is."""
    found = request.app[CONTEXT].coordination
    assert found is not None
    return found


def decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    return msgspec.json.Decoder(kind)


async def asked(request: web.Request, decode: msgspec.json.Decoder[T]) -> T:
    """The body of a request.

    Raises:
        RequestRefused: it is not of this shape.
    """
    if request.content_type != "application/json":  # a browser's page has to ask first for this
        kind = request.headers.get("Content-Type", "")[:80]
        problem, fix = f"{kind!r} is not taken", "send application/json"
        raise RequestRefused(415, "media_type", problem, field="Content-Type", fix=fix)
    body = await request.app[CONTEXT].read_body(request)
    if isinstance(body, web.Response):
        raise RequestRefused.of_response(body)
    try:
        return decode.decode(body)
    except msgspec.ValidationError as error:
        problem, _, where = str(error).partition(" - at `$")
        field = where.strip("`.")[:80]
        raise RequestRefused(400, "wrong_field", problem[:200], field=field) from None
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise RequestRefused(400, "undecodable", f"not JSON: {error}"[:200]) from None
