"""Answers to what cannot be done: a status and one JSON object that says why, and what to do.

    {"error": {"code": "wrong_field", "problem": "...", "field": "data.keys", "fix": "..."}}

I1  ``code`` is stable, programs may decide on it; ``problem`` and ``fix`` are for people.
I2  The answer tells the client about the client's request. What went on inside (addresses,
    texts of foreign errors, tracebacks) goes to the log, never into an answer.
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
    """Raised where a handler finds that there will be nothing but this refusal."""

    def __init__(
        self, status: int, code: str, problem: str, *, field: str = "", fix: str = ""
    ) -> None:
        super().__init__(problem)
        self.response = refuse(status, code, problem, field=field, fix=fix)

    @classmethod
    def already(cls, response: web.Response) -> RequestRefused:
        """For a response that says it already."""
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
    """``more`` stands beside the error."""
    error = {"code": code, "problem": problem, "field": field, "fix": fix}
    return answer({"error": error, **(more or {})}, status=status, headers=headers)


def of_http(error: web.HTTPException) -> web.Response:
    """For what aiohttp refuses by itself."""
    code, fix = _HTTP_CODES.get(error.status, ("refused", "GET / lists the routes"))
    allow = error.headers.get("Allow")
    headers = {"Allow": allow} if allow else None
    return refuse(error.status, code, error.reason, fix=fix, headers=headers)


def of_error(error: ForebayError, random: Random) -> web.Response | None:
    """For an error of ours; None: no client can do anything about it."""
    match error:
        case InvalidEvent():
            status = _EVENT_STATUS.get(error.fault, 422)
            return refuse(status, error.fault, error.problem, field=error.field, fix=error.fix)
        case InvalidKey():
            fix = "write the key as its template makes it, percent-encoded once in a path"
            return refuse(400, "invalid_key", str(error), field=error.name, fix=fix)
        case Backpressure():
            problem = f"the stream holds {error.length} of {error.bound} entries"
            return _later(429, "backpressure", problem, random)
        case NoJsonForm():
            fix = "read it in Python, or have its loader return what JSON can hold"
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
            problem = f"{error.field} = {error.value!r} cannot be"
            return refuse(400, "invalid_lock", problem, field=error.field, fix=error.fix)
        case LockNotAcquired():
            return _not_acquired(error, random)
        case LockNotHeld():
            problem = "it is not held with this nonce, or not any more"
            return refuse(409, "not_held", problem, field="nonce", fix="stop what it was held for")
        case InvalidLimit():
            unknown = error.field == "name"
            problem = f"{error.field} = {error.value} {error.problem}"
            status, code = (404, "no_limit") if unknown else (400, "invalid_limit")
            return refuse(status, code, problem, field=error.field, fix=error.fix)
        case RateLimited():
            problem = f"limit {error.limit} is reached"
            return _later(429, "rate_limited", problem, random, wait_ms=error.retry_after_ms)
        case UnknownReservation():
            problem = "there is no such reservation: it was settled, or has expired"
            return refuse(404, "unknown_reservation", problem, field="id")
    return None


def _not_acquired(error: LockNotAcquired, random: Random) -> web.Response:
    """423, as others have it; and whether asking again may help, and when."""
    if error.reason == "queue_full":
        return _later(429, "queue_full", "too many wait for this lock", random)
    more = {"holder": error.holder, "waited_ms": error.waited_ms}
    return _later(423, error.reason, "others have this lock", random, more=more)


def _unavailable(error: ServerRefused | Unavailable, random: Random) -> web.Response:
    if isinstance(error, ServerRefused):
        full = error.code == "OOM"
        problem = "Valkey's memory is full" if full else "Valkey refused the command"
        return _later(503, "valkey_refused", problem, random)
    if error.outcome_unknown:
        problem = "Valkey did not answer in time; it may have been done"
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
    # Spread, so that those who were refused together do not come back together.
    wait_s = math.ceil(wait_ms / 1000) + random.randint(*RETRY_AFTER_S)
    fix = " ".join(filter(None, ("try again after the time in Retry-After", again)))
    headers = {"Retry-After": str(wait_s)}
    return refuse(status, code, problem, fix=fix, headers=headers, more=more)
