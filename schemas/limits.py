"""What a rate limit is, and what is said to those who ask.

I1  A limit is the token bucket of ``rate`` tokens in ``per`` seconds with room for ``burst``;
    ``terms`` are its exact whole numbers: a token weighs ``weight`` units, and ``drain`` units
    are paid off in each microsecond. ``rate`` counts to a millionth, ``per`` to a microsecond.
I2  A limit whose numbers could not be reckoned with exactly, in a script, is refused.
I3  Bad input is an InvalidLimit with the limit, the field, its value, and what to do.

Deciding is ``coordinator.limits.gcra``.
"""

from __future__ import annotations

import math
import re
from typing import Literal, NamedTuple

from msgspec import Struct, structs

from .errors import InvalidKey
from .errors_limits import InvalidLimit
from .keys import check_key

__all__ = [
    "UNITS_MAX",
    "Limit",
    "Source",
    "StoreDown",
    "Terms",
    "Verdict",
    "check_cost",
    "check_limit",
    "terms_of",
]

StoreDown = Literal["local", "closed", "open"]
Source = Literal["server", "deny_cache", "lease", "local"]

UNITS_MAX = 2**51  #: of a full bucket: sums and quotients of these are exact in a double
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
_RATE_MAX, _PER_MAX_S, _BURST_MAX = 1e9, 366 * 86_400.0, 10**9
_MILLION = 1_000_000


class Limit(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A named limit. Times in seconds."""

    name: str
    rate: float  #: tokens in every ``per``
    per: float = 1.0
    burst: int = 0  #: tokens at once; 0: as many as ``rate``
    shadow: bool = False  #: charged and counted, but refuses nothing
    store_down: StoreDown = "local"  #: without Valkey: a fair share, nothing, or all is let in
    lease: bool = False  #: tokens are fetched ahead, and spent without asking
    lease_hold: float = 1.0  #: how long fetched tokens are kept
    concurrency: int = 0  #: slots at a time, for ``slot``; 0: it has none


class Terms(NamedTuple):
    """A limit in whole numbers; see I1."""

    drain: int  #: units in a microsecond
    weight: int  #: units of a token
    burst: int

    @property
    def capacity(self) -> int:
        return self.weight * self.burst


class Verdict(Struct, frozen=True):
    """The answer to one ask. Times in milliseconds, rounded up.

    Attributes:
        allowed: whether all that was asked for, or with ``partial`` anything, was granted.
        granted: tokens charged, of ``limit``.
        limit: the one that refused, or else has least left.
        remaining: tokens that were left of it after those who asked at the same time.
        retry_after_ms: when the same ask could be granted, at the earliest; 0 if it was.
        reset_after_ms: when the limit would be full again.
        source: who decided.
    """

    allowed: bool
    granted: int
    limit: str
    remaining: int
    retry_after_ms: int
    reset_after_ms: int
    source: Source


def check_limit(limit: Limit) -> Limit:
    """The limit, with its burst filled in.

    Raises:
        InvalidLimit: a number is out of bounds. InvalidKey: the name is no name.
    """
    _check_name(limit.name)
    _check_number(limit, "rate", _RATE_MAX, 1 / _MILLION)
    _check_number(limit, "per", _PER_MAX_S, 1 / _MILLION)
    _check_number(limit, "lease_hold", 60.0, 0.01)
    if limit.store_down not in ("local", "closed", "open"):
        raise _invalid(limit, "store_down", "is no policy", "write local, closed or open")
    for field in ("burst", "concurrency"):
        value = getattr(limit, field)
        if type(value) is not int or not 0 <= value <= _BURST_MAX:
            fix = f"give a whole number from 1 to {_BURST_MAX}"
            raise _invalid(limit, field, "is no number of tokens", fix)
    filled = structs.replace(limit, burst=limit.burst or max(1, math.ceil(limit.rate)))
    if terms_of(filled).capacity > UNITS_MAX:
        fix = "lower burst, or write the rate with fewer digits, such as rate=1, per=3"
        raise _invalid(filled, "burst", f"is too much for {limit.rate} per {limit.per} s", fix)
    return filled


def check_cost(limit: Limit, cost: object) -> int:
    """The cost of one ask.

    Raises:
        InvalidLimit: it is not from 1 to ``burst``: it could never be granted. A shadow
            refuses nothing, so to that it is no reason.
    """
    most = _BURST_MAX if limit.shadow else limit.burst
    if type(cost) is not int or not 1 <= cost <= most:
        fix = f"give a whole number from 1 to {most}"
        raise InvalidLimit(limit.name, "cost", repr(cost)[:40], "can never be granted", fix)
    return cost


def terms_of(limit: Limit) -> Terms:
    drain = round(limit.rate * _MILLION)
    weight = round(limit.per * _MILLION) * _MILLION
    common = math.gcd(drain, weight)
    return Terms(drain // common, weight // common, limit.burst)


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise InvalidKey("limit", repr(name), "is no text")
    check_key(name, name="limit")
    if not _NAME.match(name):
        problem = "must be 1 to 63 letters, digits, '.', '_' or '-', first a letter or a digit"
        raise InvalidKey("limit", name, problem)


def _check_number(limit: Limit, field: str, most: float, least: float) -> None:
    value = getattr(limit, field)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= most:  # NaN is not within either
        raise _invalid(
            limit, field, "is out of bounds", f"give a number from {least:g} to {most:g}"
        )


def _invalid(limit: Limit, field: str, problem: str, fix: str) -> InvalidLimit:
    return InvalidLimit(limit.name, field, repr(getattr(limit, field))[:40], problem, fix)
