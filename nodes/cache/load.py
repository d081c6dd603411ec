"""Running a loader, and storing what it returns.

L1  A loader runs under the fill lease of its key, and tags are captured before it starts;
    without the lease nothing is stored, though the callers get what was loaded.
L2  The lease is given back when the loader fails or is cancelled, within a second; so is one
    of which it is not known whether it was granted or used. After a failure it keeps others
    from the source for ``throttle_ms``, if there is an entry.
L3  An error is given to the callers, never stored, and invalidates nothing.
L4  A loader may neither take longer than its lease, nor end the node by being cancelled from
    inside: both are its failure.
L5  A value that is there already, byte for byte, only has its life extended.
L6  Where a tag that the loader named was bumped since the load began, it is loaded once more.
L7  An absence that is not to be remembered takes the old value away all the same, if the lease
    is still there: otherwise what is stored now is newer.
L8  Callers get the loader's value in its decoded form, also where it is not stored: the same as
    from a later hit.
Y1  An entry inherits the tags of the entries it depends on, at any depth: each entry stores the
    tags that it inherited.
Y2  Only stored tags are inherited: a missing or unreadable entry passes on its declared tags only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Generic, Literal, TypeVar, cast

import anyio
import structlog

from ...coordinator.log_once import LogOnce
from ...schemas.entry import Entry, read_entry
from ...schemas.errors import (
    CancelledInside,
    ForebayError,
    InvalidEntry,
    LoaderError,
    ServerRefused,
    SourceFailing,
    Unavailable,
)
from ...schemas.keys import depended_on, dependents_of
from ..cancellation import run_apart
from ..request_scope import outside
from ..values.codec import Encoded, ValueCodec
from ..values.packing import Packed, Packer
from .core import Core, Hit, Lease, LoadCall
from .fill_leases import FillLeases
from .loading import NOT_MODIFIED, Loading, under_way
from .near import NearCache, NearEntry, Reservation
from .policy import Policy, ahead_ms
from .shared import SharedTier, Stamp
from .source import Source
from .tags import TagState

__all__ = ["LoadPath"]

log = structlog.get_logger(__name__)

T = TypeVar("T")
_OF_LEASE = 0.9  #: what a loader may use of its lease; the rest is for the fill


class LoadPath(Generic[T]):
    """The loads of one cache."""

    def __init__(
        self,
        core: Core,
        name: str,
        policy: Policy,
        codec: ValueCodec[T],
        near: NearCache,
        source: Source,
        own: Callable[[T], T],
        *,
        marks: bool = False,
    ) -> None:
        """``own`` makes a loader's own copy of what is kept. ``marks``: what is loaded replaces any
        entry of another service.
        """
        self.name = name
        self.policy = policy
        self.codec = codec
        self.near = near
        self.source = source
        self._packer = Packer(policy, codec, core.rng)
        self.pack = self._packer.pack
        self.envelope = self._packer.envelope
        self.imported = self._packer.imported
        self.own = own
        self.marks = marks
        self.leases = FillLeases(
            core.shared, name, policy, bytes_max=codec.bytes_max, tags_of=self.tags_of
        )
        self.waits = core.waits
        self.clock = core.clock
        self.pace = core.pace
        self._failing = LogOnce()
        self._core = core
        self._slack_s = max(0.0, policy.staleness_ms / 1000 - core.follower.promise_s)

    async def load_and_fill(
        self, lease: Lease, call: LoadCall[T], reservation: Reservation
    ) -> Hit[T]:
        """Run the loader, and store its value if the lease is still there."""
        load = Loading(self.name, lease.key, lease.previous, self._shown)
        hit = await self._load_once(lease, call, reservation, load)
        if not load.overtaken:
            return hit
        # Who came after the bump waits for this load too, and is not to get what is from before.
        try:
            renewed = await self.leases.take_over(lease.key, lease.token, call.tags)
        except (Unavailable, ServerRefused) as error:
            self._failing.say(log, "fill.failed", error, cache=self.name, key=lease.key)
            return hit
        if renewed is None:
            return hit
        load = Loading(self.name, lease.key, renewed.previous, self._shown)
        hit = await self._load_once(renewed, call, reservation, load)
        if load.overtaken:
            await self.leases.give_back(lease.key, lease.token)
        return hit

    async def _load_once(
        self, lease: Lease, call: LoadCall[T], reservation: Reservation, load: Loading
    ) -> Hit[T]:
        try:
            made = await self._ask(lease.key, call, load)
            if made is NOT_MODIFIED:
                assert lease.previous is not None
                made = self.codec.encoded_in(lease.previous)
            packed, tags = await self._packed(made, lease, load)
            stamp = None if packed is None else await self._store(lease, packed)
        except SourceFailing:
            await self.leases.give_back(lease.key, lease.token)
            raise
        except Exception:
            await self.leases.failed(lease)
            raise
        except BaseException:
            await self.leases.give_back(lease.key, lease.token)
            raise
        value = cast(T, None if made is None else made.kept)
        if packed is None and not load.overtaken:
            await self._not_stored(lease, gone=made is None)
        size = len(packed.payload or b"") if packed else 0
        if stamp is None:
            return Hit(value=value, tier="source", version=0, age_ms=0, size=size)
        lifetime_ms = packed.meta.soft_ms if packed else 0
        self.keep(reservation, stamp, value, tags, size, lifetime_ms)
        return Hit(value=value, tier="source", version=stamp.version, age_ms=0, size=size)

    async def tags_of(self, tags: Sequence[str]) -> Mapping[str, int]:
        """Current versions of these tags."""
        if not tags:
            return {}
        found = await self._core.tags.versions(tags, trust=self.live)
        return {tag: each.version for tag, each in found.items()}

    def _shown(self, entry: Entry) -> T:
        return self.own(self._decoded(entry))

    def is_depended_on(self, key: str) -> bool:
        """Whether something that was read here may carry the tag named after this key."""
        return dependents_of(key) in self._core.tags

    def _decoded(self, entry: Entry) -> T:
        value: T = self.codec.value(entry)  # type: ignore[assignment]  # None is T's own then
        return value

    async def _packed(
        self, made: Encoded[T] | None, lease: Lease, load: Loading
    ) -> tuple[Packed | None, Mapping[str, int]]:
        """The envelope, None for what is not to be stored, and the versions of all tags."""
        tags = lease.tags
        if not load.stored or (made is None and not self.policy.negative_ms):
            return None, tags
        more = await self._named(lease, load)
        if more is None:
            return None, tags
        tags = {**tags, **more}
        try:
            packed = self._packer.envelope(
                None if made is None else made.payload,
                tags,
                ttl_ms=load.ttl_ms,
                stale_ms=load.stale_ms,
                etag=load.new_etag or "",
            )
        except InvalidEntry as error:
            self._not_packed(lease.key, error)
            return None, tags
        return packed, tags

    async def _named(self, lease: Lease, load: Loading) -> Mapping[str, int] | None:
        """The versions of the tags that the loader named; None if one was bumped meanwhile."""
        traced = {*load.kept, *self._core.behind(load.dependencies)}
        try:
            traced |= await _inherited({*lease.tags, *traced}, self._core.shared)
            traced.discard(dependents_of(lease.key))
            more = [tag for tag in dict.fromkeys((*load.tags, *traced)) if tag not in lease.tags]
            if not more:
                return {}
            found = await self._core.tags.discovered(more, since=lease.since, traced=traced)
        except (Unavailable, ServerRefused) as error:
            self._failing.say(log, "fill.failed", error, cache=self.name, key=lease.key)
            return None
        if found is None:
            self._core.instruments.counts["fills_refused", self.name] += 1
            load.overtaken = True
        return found

    async def inherited_tags(self, lease: Lease) -> Mapping[str, int] | None:
        """The versions of the tags that an entry gets from what it depends on, beyond those of
        the lease; None if they cannot be had, or one was bumped meanwhile.
        """
        return await self._named(lease, Loading(self.name, lease.key, None, self._shown))

    def _not_packed(self, key: str, error: InvalidEntry) -> None:
        if error.fault != "oversized":
            raise LoaderError(self.name, key, error.problem) from error
        self._core.instruments.counts["limit_reached", "value_bytes"] += 1
        log.warning("value.oversized", cache=self.name, key=key, error=str(error))

    async def _store(self, lease: Lease, packed: Packed) -> Stamp | None:
        core, key = self._core, lease.key
        try:
            stamp = await self._extended(lease, packed)
            if stamp == "changed":
                stamp = await core.shared.fill(
                    key,
                    lease.token,
                    soft_ms=packed.soft_ms,
                    hard_ms=packed.hard_ms,
                    tail=packed.tail,
                    mark=self.marks,
                )
        except ForebayError as error:
            self._failing.say(log, "fill.failed", error, cache=self.name, key=key)
            # Beside the callers, who have waited long enough.
            core.tasks.start_soon(self.leases.give_back, key, lease.token)
            return None
        self._failing.over()
        if stamp is None:
            core.instruments.counts["fills_refused", self.name] += 1
        return stamp

    async def _extended(self, lease: Lease, packed: Packed) -> Stamp | Literal["changed"] | None:
        previous = lease.previous
        if previous is None or not self._packer.same(packed, previous):
            return "changed"
        return await self._core.shared.extend(
            lease.key,
            lease.token,
            since=previous.version,
            soft_ms=packed.soft_ms,
            hard_ms=packed.hard_ms,
            middle=packed.middle(previous),
        )

    async def _ask(self, key: str, call: LoadCall[T], load: Loading) -> Any:
        try:
            return await self.source.ask(key, lambda: self._run_loader(key, call, load))
        except SourceFailing:
            self.count("refused")
            raise

    async def _run_loader(self, key: str, call: LoadCall[T], load: Loading) -> Any:
        core, started = self._core, self._core.clock.monotonic()
        result: Literal["loaded", "error", "timeout"] = "error"
        try:
            limit_s = _OF_LEASE * self.policy.lease_ms / 1000
            with outside(), under_way(load), anyio.move_on_after(limit_s):
                value = await run_apart(f"the loader of {self.name}", call.run)
                result = "loaded"
                absent = value is None or value is NOT_MODIFIED
                return value if absent else self.codec.encode(value)
            result = "timeout"
            raise LoaderError(self.name, key, "it took longer than its lease")
        except InvalidEntry as error:
            raise LoaderError(self.name, key, error.problem) from error
        except CancelledInside as error:
            raise LoaderError(self.name, key, "it was cancelled from inside") from error
        finally:
            core.instruments.observe("loader_seconds", core.clock.monotonic() - started, self.name)
            self.count(result)

    def keep(
        self,
        reservation: Reservation,
        stamp: Stamp | Entry,
        value: T,
        tags: Mapping[str, int],
        size: int,
        lifetime_ms: int = 0,
    ) -> None:
        """Keep in the near cache what is stored under this stamp, for that lifetime."""
        near = self.near
        if size > near.value_bytes_max:
            near.leave(reservation.key, stamp.version)
            return
        offset_s = self._core.server_clock.offset_s
        soft_until = fresh_until = stamp.soft_at_ms / 1000 - offset_s
        if self.policy.refresh_ahead:
            ripe_at_ms = ahead_ms(stamp.soft_at_ms, lifetime_ms, self.policy.refresh_ahead)
            fresh_until = ripe_at_ms / 1000 - offset_s
        near.keep(
            reservation,
            NearEntry(
                reservation.key,
                value,
                version=stamp.version,
                size=size,
                fresh_until=fresh_until,
                soft_until=soft_until,
                gone_at=stamp.hard_at_ms / 1000 - offset_s,
                written_at=_written_at(stamp, offset_s),
                view=reservation.view,
                tags=self._stated(tags) if tags else (),
                negative=value is None,
            ),
        )

    def _stated(self, tags: Mapping[str, int]) -> tuple[tuple[TagState, int], ...]:
        state_of = self._core.tags.state
        return tuple([(state_of(tag), version) for tag, version in tags.items()])

    async def _not_stored(self, lease: Lease, *, gone: bool) -> None:
        ours = await self.leases.give_back(lease.key, lease.token)
        if ours and gone and lease.previous is not None:
            with suppress(ForebayError):
                await self._core.invalidate((lease.key,), ())

    async def bypass(self, key: str, call: LoadCall[T]) -> Hit[T]:
        """Ask the source and store nothing."""
        made = await self._ask(key, call, Loading(self.name, key, None, self._shown))
        return Hit(
            value=cast(T, None if made is None else made.kept), tier="source", version=0, age_ms=0
        )

    def count(self, result: Literal["loaded", "error", "timeout", "refused"]) -> None:
        self._core.instruments.counts["loads", self.name, result] += 1

    @property
    def live(self) -> bool:
        """Whether what the log told is known to be all of it."""
        return self._core.clock.monotonic() < self._core.follower.live_until + self._slack_s


def _written_at(stamp: Stamp | Entry, offset_s: float) -> float | None:
    """On this node's clock; None: not known."""
    if isinstance(stamp, Entry) and stamp.meta.imported:
        return None
    return stamp.version / 1e6 - offset_s


async def _inherited(tags: Iterable[str], shared: SharedTier) -> set[str]:
    """The tags of all stored entries that these tags name as dependencies.

    Raises:
        Unavailable, ServerRefused: the entries cannot be read.
    """
    keys = [key for tag in tags if (key := depended_on(tag)) is not None]
    found: set[str] = set()
    for raw in await asyncio.gather(*[shared.get(key) for key in keys]):
        if raw:
            with suppress(InvalidEntry):
                found.update(read_entry(raw, bytes_max=len(raw)).meta.tags)
    return found
