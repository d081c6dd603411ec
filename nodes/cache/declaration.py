"""What is said of a cache where it is declared, and the policy that follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from msgspec import Struct

from ...schemas.errors import ConfigError
from ...schemas.settings import CacheDefaults
from .policy import OnDisconnected, Policy

__all__ = ["LONGEST_S", "Declaration", "declaring", "exceptions", "lifetime_ms", "policy_of"]

LONGEST_S = 366 * 86_400
_NEGATIVE_S_MAX = 10.0
_ORIGIN = "the declaration of a cache"


class Declaration(Struct, frozen=True, kw_only=True):
    """Times in seconds."""

    template: str
    ttl: float
    stale_for: float = 0.0
    stale_if_error: float = 0.0
    negative_ttl: float | None = None  #: unset: like ttl, at most ten seconds
    refresh_ahead: float | None = None
    soft_timeout: float | None = None
    hard_timeout: float | None = None
    tags: Sequence[str] = ()
    depends_on: Sequence[str] = ()
    max_staleness: float | None = None
    on_disconnected: OnDisconnected | None = None
    harmless: tuple[type[Exception], ...] = ()
    mutable: bool = False
    legacy_key: str = ""  #: template of the names under which another service stored its entries
    name: str = ""


@contextmanager
def declaring(template: object) -> Iterator[None]:
    """Says in a ConfigError about a declaration which one it is."""
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
    """Checked, in milliseconds.

    Raises:
        ConfigError: it is no number, not positive, or over a year.
    """
    low = 0.0 if zero else 0.001
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        problem = "is not a number"
    elif math.isnan(seconds) or not low <= seconds <= LONGEST_S:
        problem = f"must lie between {low:g} and {LONGEST_S} seconds"
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
    """Checked: what an except clause takes; raises ConfigError."""
    found = tuple(given) if isinstance(given, Iterable) else (given,)
    if all(isinstance(each, type) and issubclass(each, Exception) for each in found):
        return found
    raise _refusal(name, given, "holds what is no exception", "give classes, such as [KeyError]")


def policy_of(declared: Declaration, defaults: CacheDefaults) -> Policy:
    """What a cache does that was declared so.

    Raises:
        ConfigError: something cannot be meant so.
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
        problem = f"is over hard_timeout = {declared.hard_timeout!r}, which is for any caller"
        raise _refusal("soft_timeout", declared.soft_timeout, problem, "wait for less")
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
    asked = declared.on_disconnected
    if asked is None:
        return defaults.on_disconnected
    if asked not in ("bypass", "stale", "fail"):
        problem = "is none of bypass, stale, fail"
        raise _refusal("on_disconnected", asked, problem, "write one of them")
    return asked


def _staleness_ms(declared: Declaration, defaults: CacheDefaults) -> int:
    if declared.max_staleness is None:
        return defaults.max_staleness_ms
    asked_ms = lifetime_ms("max_staleness", declared.max_staleness)
    if asked_ms < 10:
        problem = "is less than nodes can tell each other"
        raise _refusal("max_staleness", declared.max_staleness, problem, "give at least 0.01")
    return asked_ms


def _timeout_ms(name: str, seconds: float | None, lease_ms: int) -> int:
    if seconds is None:
        return 0
    asked_ms = lifetime_ms(name, seconds)
    if asked_ms > lease_ms:
        problem = f"is over cache.lease_ms = {lease_ms}, when the loader is ended"
        raise _refusal(name, seconds, problem, "wait for less, or raise cache.lease_ms")
    return asked_ms


def _fraction(name: str, asked: object) -> float:
    if asked is None:
        return 0.0
    if not isinstance(asked, float) or not 0 < asked < 1:
        problem = "is no fraction of the lifetime"
        raise _refusal(name, asked, problem, "give one between 0 and 1, such as 0.8")
    return asked


def _refusal(name: str, value: object, problem: str, fix: str) -> ConfigError:
    return ConfigError(setting=name, value=repr(value), origin=_ORIGIN, problem=problem, fix=fix)
