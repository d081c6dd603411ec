"""What a lock is asked for, and what can be seen of it: names, limits, and the terms of a lease.

    mutex            capacity 1        each takes 1
    semaphore        capacity N        each takes its weight
    read-write lock  capacity 2^20     a reader takes 1, a writer all of it

T1  Terms outside their limits are refused where they are made, as an InvalidLock or InvalidKey
    that names the field, the value and what to do; nothing was sent then.
T2  ``deadline_s`` is shorter than the lease by a margin: who stops then, has stopped before
    the server can give the lock to another, if the two clocks run equally fast to 2 %.

Durations are seconds at the surface; inside, microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import msgspec
from msgspec import Struct

from .errors_locks import InvalidLock
from .json_form import json_form
from .keys import check_key

__all__ = [
    "LEASE_DEFAULT_S",
    "LEASE_MAX_S",
    "LEASE_MIN_S",
    "META_BYTES_MAX",
    "PERMITS_MAX",
    "Holder",
    "Kind",
    "LockLevel",
    "LockView",
    "OnLoss",
    "Terms",
    "Waiting",
    "about_of",
    "check_capacity",
    "check_timeout",
    "make_terms",
]

LEASE_DEFAULT_S = 10.0
LEASE_MIN_S = 2.0
LEASE_MAX_S = 30.0  #: and the longest grace after a failover
META_BYTES_MAX = 1_024
PERMITS_MAX = 1 << 20
TIMEOUT_MAX_S = 86_400.0

Kind = Literal["m", "s", "r"]
LockLevel = Literal["fast", "replicated"]
OnLoss = Literal["cancel", "event"]
KINDS: Mapping[str, str] = {"m": "a lock", "s": "a semaphore", "r": "a read-write lock"}

_encode = msgspec.json.encode


class Terms(Struct, frozen=True, kw_only=True):
    """What a lease is asked for."""

    name: str
    kind: Kind = "m"
    capacity: int = 1
    weight: int = 1
    lease_us: int = 10_000_000
    level: LockLevel = "fast"
    on_loss: OnLoss = "cancel"
    fair: bool = True
    about: bytes = b"{}"  #: who and what for, as JSON

    @property
    def lease_s(self) -> float:
        return self.lease_us / 1e6

    @property
    def deadline_s(self) -> float:
        """How long after it was asked for it may be relied on."""
        lease_s = self.lease_us / 1e6
        return lease_s - max(0.05, 0.02 * lease_s)


class Holder(Struct, frozen=True, kw_only=True):
    """Who holds a lock."""

    nonce: str
    by: str  #: the node
    meta: dict[str, object]
    token: int
    weight: int
    since_ms: int  #: on the server's clock
    left_ms: int  #: until it ends, unless it is renewed


class Waiting(Struct, frozen=True, kw_only=True):
    """Who waits for a lock."""

    nonce: str
    by: str
    meta: dict[str, object]
    weight: int
    waited_ms: int
    silent_ms: int  #: since it was heard of


class LockView(Struct, frozen=True, kw_only=True):
    """A lock as it was a moment ago."""

    name: str
    kind: str
    capacity: int
    live: bool  #: whether the capacity was set while in use
    token: int  #: the last that was given
    holders: tuple[Holder, ...]
    queue: tuple[Waiting, ...]
    waiting: int  #: how many; the queue shows the first of them


def make_terms(
    name: str,
    *,
    about: bytes,
    lease: float = LEASE_DEFAULT_S,
    kind: Kind = "m",
    capacity: int = 1,
    weight: int = 1,
    level: LockLevel = "fast",
    on_loss: OnLoss = "cancel",
    fair: bool = True,
) -> Terms:
    """Terms within their limits.

    Raises:
        InvalidKey, InvalidLock: see T1.
    """
    check_key(name, name="lock")
    if type(lease) not in (int, float) or not LEASE_MIN_S <= lease <= LEASE_MAX_S:
        raise InvalidLock(
            name, "lease", lease, f"give {LEASE_MIN_S:g} to {LEASE_MAX_S:g} s; it is renewed"
        )
    if type(weight) is not int or not 1 <= weight <= capacity:
        raise InvalidLock(name, "weight", weight, f"give a whole number from 1 to {capacity}")
    if level not in ("fast", "replicated"):
        raise InvalidLock(name, "level", level, "give 'fast' or 'replicated'")
    if on_loss not in ("cancel", "event"):
        raise InvalidLock(name, "on_loss", on_loss, "give 'cancel' or 'event'")
    return Terms(
        name=name,
        kind=kind,
        capacity=capacity,
        weight=weight,
        lease_us=int(lease * 1e6),
        level=level,
        on_loss=on_loss,
        fair=fair,
        about=about,
    )


def check_capacity(name: str, capacity: int) -> int:
    if type(capacity) is not int or not 1 <= capacity <= PERMITS_MAX:
        raise InvalidLock(name, "capacity", capacity, f"give a whole number, 1 to {PERMITS_MAX}")
    return capacity


def check_timeout(name: str, timeout: float | None) -> float:
    """Seconds to wait; infinite for None."""
    if timeout is None:
        return math.inf
    if type(timeout) not in (int, float) or not 0 <= timeout <= TIMEOUT_MAX_S:
        raise InvalidLock(name, "timeout", timeout, f"give 0 to {TIMEOUT_MAX_S:g} s, or None")
    return timeout


def about_of(name: str, by: str, meta: Mapping[str, object] | None) -> bytes:
    """What is kept beside a lease for those who look."""
    try:
        raw = json_form({"by": by, "meta": meta}) if meta else _encode({"by": by})
    except ValueError as error:
        raise InvalidLock(name, "meta", "the given", f"{error}; give JSON") from None
    if len(raw) > META_BYTES_MAX:
        raise InvalidLock(name, "meta", f"{len(raw)} bytes", f"keep it below {META_BYTES_MAX}")
    return raw
