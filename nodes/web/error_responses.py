"""Error responses: a status, and one JSON object with the problem and its fix.

    {"error": {"code": "wrong_field", "problem": "...", "field": "data.keys", "fix": "..."}}

I1  ``code`` is stable, for programs; ``problem`` and ``fix`` are for people.
I2  The response describes the client's request only. Internals (addresses, texts of foreign
    errors, tracebacks) go to the log, never into a response.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from random import Random

import msgspec
from aiohttp import web

from ...schemas.errors import (
    Backpressure,
    BreakerOpen,
    CoordinationError,
    ForebayError,
    InvalidEvent,
    InvalidKey,
    LoaderError,
    NoJsonForm,
    ServerRefused,
    Unavailable,
)
from ...schemas.errors_limits import InvalidLimit, RateLimited, UnknownReservation
from ...schemas.errors_locks import InvalidLock, LockNotAcquired, LockNotHeld

SECURITY_HEADERS = {
    "Server": "forebay",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}
RETRY_AFTER_S = (1, 3)

_EVENT_STATUS = {"undecodable": 400, "oversized": 413}
_HTTP_CODES = {
    404: ("not_found", "GET / lists the routes"),
    405: ("method_not_allowed", "use a method that the Allow header names"),
    417: ("expectation_failed", "expect nothing but 100-continue"),
}


class RequestRefused(ForebayError):
    """Raised by a handler to answer with this error response."""

    def __init__(
        self, status: int, code: str, problem: str, *, field: str = "", fix: str = ""
    ) -> None:
        super().__init__(problem)
        self.response = refuse(status, code, problem, field=field, fix=fix)

    @classmethod
    def of_response(cls, response: web.Response) -> RequestRefused:
        """Wrap an existing response."""
        made = cls(response.status, "", "")
        made.response = response
        return made


def answer(
    value: object, *, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value),
        status=status,
        content_type="application/json",
        headers=headers,
    )


def refuse(
    status: int,
    code: str,
    problem: str,
    *,
    field: str = "",
    fix: str = "",
    headers: dict[str, str] | None = None,
    more: Mapping[str, object] | None = None,
) -> web.Response:
    """``more``: fields beside the error."""
    error = {"code": code, "problem": problem, "field": field, "fix": fix}
    return answer({"error": error, **(more or {})}, status=status, headers=headers)


def of_http(error: web.HTTPException) -> web.Response:
    """The response to an error that aiohttp raised."""
    code, fix = _HTTP_CODES.get(error.status, ("refused", "GET / lists the routes"))
    allow = error.headers.get("Allow")
    headers = {"Allow": allow} if allow else None
    return refuse(error.status, code, error.reason, fix=fix, headers=headers)


def of_error(error: ForebayError, random: Random) -> web.Response | None:
    """The response to an error of Forebay; None: a client cannot fix it."""
    match error:
        case InvalidEvent():
            status = _EVENT_STATUS.get(error.fault, 422)
            return refuse(status, error.fault, error.problem, field=error.field, fix=error.fix)
        case InvalidKey():
            fix = "write the key as its template forms it, percent-encoded once in a path"
            return refuse(400, "invalid_key", str(error), field=error.name, fix=fix)
        case Backpressure():
            problem = f"the stream holds {error.length} of {error.bound} entries"
            return _later(429, "backpressure", problem, random)
        case NoJsonForm():
            fix = "read it in Python, or let its loader return a value that JSON can hold"
            return refuse(406, "no_json", str(error), field="key", fix=fix)
        case LoaderError():
            problem = f"the loader of {error.cache} failed"
            return refuse(504, "loader_failed", problem, fix="the log of this node says why")
        case ServerRefused() | Unavailable():
            return _unavailable(error, random)
        case CoordinationError():
            return _of_coordination(error, random)
    return None


def _of_coordination(error: CoordinationError, random: Random) -> web.Response | None:
    match error:
        case InvalidLock():
            problem = f"invalid {error.field}={error.value!r}"
            return refuse(400, "invalid_lock", problem, field=error.field, fix=error.fix)
        case LockNotAcquired():
            return _not_acquired(error, random)
        case LockNotHeld():
            problem = "this nonce does not hold the lock, or its lease has expired"
            return refuse(
                409, "not_held", problem, field="nonce", fix="stop the work that the lock protected"
            )
        case InvalidLimit():
            unknown = error.field == "name"
            problem = f"{error.field} = {error.value} {error.problem}"
            status, code = (404, "no_limit") if unknown else (400, "invalid_limit")
            return refuse(status, code, problem, field=error.field, fix=error.fix)
        case RateLimited():
            problem = f"limit {error.limit} is reached"
            return _later(429, "rate_limited", problem, random, wait_ms=error.retry_after_ms)
        case UnknownReservation():
            problem = "unknown reservation: it was settled, or has expired"
            return refuse(404, "unknown_reservation", problem, field="id")
    return None


def _not_acquired(error: LockNotAcquired, random: Random) -> web.Response:
    """423: another holder has the lock; ``reason`` tells whether a retry may help."""
    if error.reason == "queue_full":
        return _later(429, "queue_full", "too many requests wait for this lock", random)
    more = {"holder": error.holder, "waited_ms": error.waited_ms}
    return _later(423, error.reason, "another holder has this lock", random, more=more)


def _unavailable(error: ServerRefused | Unavailable, random: Random) -> web.Response:
    if isinstance(error, ServerRefused):
        full = error.code == "OOM"
        problem = "Valkey's memory is full" if full else "Valkey refused the command"
        return _later(503, "valkey_refused", problem, random)
    if error.outcome_unknown:
        problem = "Valkey did not answer in time; the outcome is unknown"
        return _later(
            503,
            "outcome_unknown",
            problem,
            random,
            again="with the same event ids, or the same nonce",
        )
    wait_ms = error.retry_after_ms if isinstance(error, BreakerOpen) else 0
    return _later(503, "unavailable", "Valkey is not reachable", random, wait_ms=wait_ms)


def _later(
    status: int,
    code: str,
    problem: str,
    random: Random,
    *,
    again: str = "",
    wait_ms: int = 0,
    more: Mapping[str, object] | None = None,
) -> web.Response:
    # Random, so that clients which were refused together do not retry together.
    wait_s = math.ceil(wait_ms / 1000) + random.randint(*RETRY_AFTER_S)
    fix = " ".join(filter(None, ("try again after the time in Retry-After", again)))
    headers = {"Retry-After": str(wait_s)}
    return refuse(status, code, problem, fix=fix, headers=headers, more=more)
