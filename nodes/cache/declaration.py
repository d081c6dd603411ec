"""The declaration of a cache, and the policy that follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from msgspec import Struct

from ...schemas.errors import ConfigError
from ...schemas.settings import CacheDefaults
from .policy import OnDisconnected, Policy

LONGEST_S = 366 * 86_400
_NEGATIVE_S_MAX = 10.0
_STALENESS_MS_MIN = 10
_ORIGIN = "the declaration of a cache"


class Declaration(Struct, frozen=True, kw_only=True):
    """The arguments of ``node.cached``. Times in seconds."""

    template: str
    ttl: float
    stale_for: float = 0.0
    stale_if_error: float = 0.0
    negative_ttl: float | None = None  #: None: like ttl, at most ten seconds
    refresh_ahead: float | None = None
    soft_timeout: float | None = None
    hard_timeout: float | None = None
    tags: Sequence[str] = ()
    depends_on: Sequence[str] = ()
    max_staleness: float | None = None
    on_disconnected: OnDisconnected | None = None
    harmless: tuple[type[Exception], ...] = ()
    mutable: bool = False
    legacy_key: str = ""  #: template of the names under which another service stored its values
    name: str = ""


@contextmanager
def declaring(template: object) -> Iterator[None]:
    """Name the template in the origin of a ConfigError about a declaration."""
    try:
        yield
    except ConfigError as error:
        if error.origin != _ORIGIN:
            raise
        raise ConfigError(
            setting=error.setting,
            value=error.value,
            origin=f"{_ORIGIN}, {template}",
            problem=error.problem,
            fix=error.fix,
        ) from None


def lifetime_ms(name: str, seconds: float, *, zero: bool = False, origin: str = _ORIGIN) -> int:
    """Check a time in seconds; returns milliseconds.

    Raises:
        ConfigError: it is not a number, not positive, or over a year.
    """
    low = 0.0 if zero else 0.001
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        problem = "is not a number"
    elif math.isnan(seconds) or not low <= seconds <= LONGEST_S:
        problem = f"must be between {low:g} and {LONGEST_S} s"
    else:
        return int(seconds * 1000)
    raise ConfigError(
        setting=name,
        value=repr(seconds),
        origin=origin,
        problem=problem,
        fix="give seconds, such as 60",
    )


def exceptions(name: str, given: object) -> tuple[type[Exception], ...]:
    """Check an exception class, or several, as an except clause takes them; raises ConfigError."""
    found = tuple(given) if isinstance(given, Iterable) else (given,)
    if all(isinstance(each, type) and issubclass(each, Exception) for each in found):
        return found
    raise _refusal(
        name, given, "must hold only exception classes", "give classes, such as [KeyError]"
    )


def policy_of(declared: Declaration, defaults: CacheDefaults) -> Policy:
    """The policy of a declaration, with the defaults of the settings.

    Raises:
        ConfigError: an argument is invalid.
    """
    ttl_ms = lifetime_ms("ttl", declared.ttl)
    stale_ms = lifetime_ms("stale_for", declared.stale_for, zero=True)
    error_ms = lifetime_ms("stale_if_error", declared.stale_if_error, zero=True)
    negative = declared.negative_ttl
    if negative is None:
        negative = min(declared.ttl, _NEGATIVE_S_MAX)
    soft_timeout_ms = _timeout_ms("soft_timeout", declared.soft_timeout, defaults.lease_ms)
    hard_timeout_ms = _timeout_ms("hard_timeout", declared.hard_timeout, defaults.lease_ms)
    if soft_timeout_ms > hard_timeout_ms > 0:
        problem = f"must not be over hard_timeout={declared.hard_timeout!r}"
        raise _refusal("soft_timeout", declared.soft_timeout, problem, "give a shorter timeout")
    return Policy(
        ttl_ms=ttl_ms,
        stale_ms=stale_ms,
        error_ms=max(0, error_ms - stale_ms),
        negative_ms=lifetime_ms("negative_ttl", negative, zero=True),
        lease_ms=defaults.lease_ms,
        jitter=defaults.jitter,
        refresh_ahead=_fraction("refresh_ahead", declared.refresh_ahead),
        soft_timeout_ms=soft_timeout_ms,
        hard_timeout_ms=hard_timeout_ms,
        throttle_ms=defaults.throttle_ms,
        staleness_ms=_staleness_ms(declared, defaults),
        on_disconnected=_on_disconnected(declared, defaults),
    )


def _on_disconnected(declared: Declaration, defaults: CacheDefaults) -> OnDisconnected:
    given = declared.on_disconnected
    if given is None:
        return defaults.on_disconnected
    if given not in ("bypass", "stale", "fail"):
        problem = "must be bypass, stale or fail"
        raise _refusal("on_disconnected", given, problem, "give one of them")
    return given


def _staleness_ms(declared: Declaration, defaults: CacheDefaults) -> int:
    if declared.max_staleness is None:
        return defaults.max_staleness_ms
    given_ms = lifetime_ms("max_staleness", declared.max_staleness)
    if given_ms < _STALENESS_MS_MIN:
        problem = "is shorter than nodes need to notify each other"
        raise _refusal("max_staleness", declared.max_staleness, problem, "give at least 0.01")
    return given_ms


def _timeout_ms(name: str, seconds: float | None, lease_ms: int) -> int:
    if seconds is None:
        return 0
    given_ms = lifetime_ms(name, seconds)
    if given_ms > lease_ms:
        problem = f"must not be over cache.lease_ms={lease_ms}, the time limit of a load"
        raise _refusal(name, seconds, problem, "give a shorter timeout, or raise cache.lease_ms")
    return given_ms


def _fraction(name: str, given: object) -> float:
    if given is None:
        return 0.0
    if not isinstance(given, float) or not 0 < given < 1:
        problem = "must be a fraction between 0 and 1"
        raise _refusal(name, given, problem, "give one such as 0.8")
    return given


def _refusal(name: str, value: object, problem: str, fix: str) -> ConfigError:
    return ConfigError(setting=name, value=repr(value), origin=_ORIGIN, problem=problem, fix=fix)
