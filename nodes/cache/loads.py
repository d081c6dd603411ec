"""Running a loader, and storing what it returns.

L1  A loader runs under the fill lease of its key, and tags are captured before it starts;
    without the lease nothing is stored, though the callers get what was loaded.
L2  The lease is given back when the loader fails or is cancelled, within a second; so is one
    of which it is not known whether it was granted or used.
L3  An error is given to the callers, never stored, and invalidates nothing.
L4  A loader may neither take longer than its lease, nor end the node by being cancelled from
    inside: both are its failure.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Generic, Literal, TypeVar

import anyio
import structlog
from anyio.abc import TaskGroup
from msgspec import Struct

from ...coordinator.clock import Clock, ServerClock
from ...coordinator.instruments import Instruments
from ...coordinator.log import Follower
from ...schemas.entry import EntryMeta
from ...schemas.errors import ForebayError, InvalidEntry, LoaderError
from .near import NearCache, NearEntry, Reservation
from .policy import Policy
from .scope import outside
from .shared import Granted, Held, Newer, SharedTier, Stamp
from .tags import TagTable
from .values import ValueCodec
from .waits import KeyWaits

__all__ = ["Core", "Hit", "Lease", "LoadCall", "LoadPath", "Packed", "Tier"]

log = structlog.get_logger(__name__)

T = TypeVar("T")
Tier = Literal["near", "shared", "source"]

_OF_LEASE = 0.9  #: what a loader may use of its lease; the rest is for the fill


class Core(Struct, kw_only=True):
    """What all caches of a node share."""

    node_id: str
    shared: SharedTier
    tags: TagTable
    follower: Follower
    waits: KeyWaits
    tasks: TaskGroup
    clock: Clock
    server_clock: ServerClock
    instruments: Instruments
    rng: random.Random
    ids: Callable[[], str]
    invalidate: Callable[[Sequence[str], Sequence[str]], Awaitable[None]]


class Hit(Struct, Generic[T], frozen=True, kw_only=True):
    """A value and where it is from."""

    value: T
    tier: Tier
    version: int
    age_ms: int
    stale: bool = False
    size: int = 0


class LoadCall(Struct, Generic[T], frozen=True):
    """A call of the loader: how to make it, and which tags its value carries."""

    run: Callable[[], Awaitable[T]]
    tags: Sequence[str] = ()


class Lease(Struct, frozen=True):
    """The right to fill a key, with the tag versions that its value will carry."""

    key: str
    token: str
    tags: Mapping[str, int]


class Packed(Struct, frozen=True):
    """A value, ready to be stored. ``payload`` is its msgpack; None for a known absence."""

    payload: bytes | None
    soft_ms: int
    hard_ms: int
    tail: bytes


class LoadPath(Generic[T]):
    """The loads of one cache."""

    def __init__(
        self, core: Core, name: str, policy: Policy, codec: ValueCodec[T], near: NearCache
    ) -> None:
        self.name = name
        self.policy = policy
        self.codec = codec
        self.near = near
        self._core = core

    async def begin(
        self, key: str, token: str, tags: Sequence[str], *, seen: int
    ) -> Lease | Newer | Held:
        """Take the fill lease of a key, or learn what stands in the way.

        Raises:
            Unavailable, ServerRefused: the lease is not held.
        """
        shared, lease_ms = self._core.shared, self.policy.lease_ms
        try:
            outcome = await shared.begin(key, token, lease_ms=lease_ms, seen=seen)
            if isinstance(outcome, Granted):
                return Lease(key, token, await self.tags_of(tags))
        except BaseException:
            await self.give_back(key, token)  # it may have been granted
            raise
        return outcome

    async def taken_over(self, key: str, token: str, tags: Sequence[str]) -> Lease | None:
        """The lease that a refresh job carries; None if it is over.

        Raises:
            Unavailable, ServerRefused: it is not known.
        """
        try:
            if await self._core.shared.holds(key, token):
                return Lease(key, token, await self.tags_of(tags))
        except BaseException:
            await self.give_back(key, token)
            raise
        return None

    async def load_and_fill(
        self, lease: Lease, call: LoadCall[T], reservation: Reservation
    ) -> Hit[T]:
        """Run the loader, and store its value if the lease is still there."""
        stamp = None
        try:
            value = await self._run_loader(lease.key, call)
            packed = self._packed(lease.key, value, lease.tags)
            if packed is not None:
                stamp = await self._fill(lease, packed)
        except BaseException:
            await self.give_back(lease.key, lease.token)
            raise
        if packed is None:
            await self.give_back(lease.key, lease.token)
        size = len(packed.payload or b"") if packed else 0
        if stamp is None:
            return Hit(value=value, tier="source", version=0, age_ms=0, size=size)
        self.keep_stamped(reservation, stamp, value, lease.tags, size)
        return Hit(value=value, tier="source", version=stamp.version, age_ms=0, size=size)

    async def tags_of(self, tags: Sequence[str]) -> Mapping[str, int]:
        """Current versions of these tags."""
        return await self._core.tags.versions(tags, trust=self.live) if tags else {}

    async def _fill(self, lease: Lease, packed: Packed) -> Stamp | None:
        core, key = self._core, lease.key
        try:
            stamp = await core.shared.fill(
                key, lease.token, soft_ms=packed.soft_ms, hard_ms=packed.hard_ms, tail=packed.tail
            )
        except ForebayError as error:
            log.warning("fill.failed", cache=self.name, key=key, error=str(error))
            # Beside the callers, who have waited long enough.
            core.tasks.start_soon(self.give_back, key, lease.token)
            return None
        if stamp is None:
            core.instruments.counts["fills_refused", self.name] += 1
        return stamp

    async def _run_loader(self, key: str, call: LoadCall[T]) -> T:
        core, started = self._core, self._core.clock.monotonic()
        result = "error"
        try:
            with outside(), anyio.move_on_after(_OF_LEASE * self.policy.lease_ms / 1000):
                value = await call.run()
                result = "loaded"
                return value
            result = "timeout"
            raise LoaderError(self.name, key, "it took longer than its lease")
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled us: it waited for something that was cancelled.
            raise LoaderError(self.name, key, "it was cancelled from inside") from error
        finally:
            core.instruments.observe(
                "loader_seconds", core.clock.monotonic() - started, self.name, result
            )
            self.count("source", "hit" if result == "loaded" else "error")

    def _packed(self, key: str, value: T, tags: Mapping[str, int]) -> Packed | None:
        """The envelope; None for what is not to be stored."""
        if value is None and not self.policy.negative_ms:
            return None
        try:
            return self.pack(value, tags)
        except InvalidEntry as error:
            if error.fault != "oversized":
                raise
            self._core.instruments.counts["limit_reached", "value_bytes"] += 1
            log.warning("value.oversized", cache=self.name, key=key, error=str(error))
            return None

    def pack(self, value: T | None, tags: Mapping[str, int], ttl_ms: int | None = None) -> Packed:
        """The envelope of a value, with its lifetimes.

        Raises:
            InvalidEntry: the value is too large, or cannot be encoded.
        """
        policy = self.policy
        if value is None:
            meta = EntryMeta(tags=dict(tags), soft_ms=policy.negative_ms)
            lifetime_ms = policy.negative_ms or 1
            return Packed(None, lifetime_ms, lifetime_ms, self.codec.negative_tail(meta))
        asked_ms = ttl_ms or policy.ttl_ms
        soft_ms = self._jittered(asked_ms)
        payload = self.codec.pack(value)
        meta = EntryMeta(tags=dict(tags), soft_ms=asked_ms, stale_ms=policy.stale_ms)
        return Packed(payload, soft_ms, soft_ms + policy.stale_ms, self.codec.tail(payload, meta))

    def _jittered(self, ttl_ms: int) -> int:
        return max(1, int(ttl_ms * (1 - self.policy.jitter * self._core.rng.random())))

    def keep_stamped(
        self,
        reservation: Reservation,
        stamp: Stamp,
        value: T,
        tags: Mapping[str, int],
        size: int,
    ) -> None:
        """Keep in the near cache what is stored under this stamp."""
        core = self._core
        offset_s = core.server_clock.offset_s
        state_of = core.tags.state
        self.near.keep(
            reservation,
            NearEntry(
                reservation.key,
                value,
                version=stamp.version,
                size=size,
                fresh_until=stamp.soft_at_ms / 1000 - offset_s,
                gone_at=stamp.hard_at_ms / 1000 - offset_s,
                written_at=stamp.version / 1e6 - offset_s,
                view=reservation.view,
                tags=tuple([(state_of(tag), version) for tag, version in tags.items()]),
            ),
        )

    async def give_back(self, key: str, token: str) -> None:
        """Let the next one load; costs nothing if the lease is gone already."""
        with anyio.move_on_after(1, shield=True):
            try:
                await self._core.shared.release(key, token)
            except ForebayError as error:
                log.debug("lease.kept", cache=self.name, key=key, error=str(error))

    async def bypass(self, key: str, call: LoadCall[T]) -> Hit[T]:
        """Ask the source and store nothing."""
        value = await self._run_loader(key, call)
        return Hit(value=value, tier="source", version=0, age_ms=0)

    def count(self, tier: Tier, result: str) -> None:
        self._core.instruments.counts["cache_requests", self.name, tier, result] += 1

    @property
    def live(self) -> bool:
        """Whether what the log told is known to be all of it."""
        return self._core.clock.monotonic() < self._core.follower.live_until
