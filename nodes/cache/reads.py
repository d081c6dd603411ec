"""The read path: near cache, shared tier, loader.

R1  What ``decide`` says is done; the code here only obeys.
R2  At most one load of a key runs in this process, and, by the lease, in the cluster.
R3  A caller who comes after a notice for the key, or for one of its tags, never gets what a
    flight brings that began before (Flights F2).
R4  Bytes that cannot be read are a miss and a count.
R5  While Valkey does not answer, or refuses: ``bypass`` asks the source and stores nothing;
    ``stale`` serves what the near cache has and does not know to be wrong, flagged, and then
    bypasses; ``fail`` raises what happened. A loader's own errors are never taken for that.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Generic, TypeVar, assert_never

import anyio
import structlog

from ...schemas.entry import Entry, read_entry, version_of
from ...schemas.errors import ForebayError, InvalidEntry, ServerRefused, Unavailable
from ...schemas.jobs import RefreshJob
from ...schemas.settings import Limits
from .flights import Flights
from .loads import Core, Hit, Lease, LoadCall, LoadPath
from .near import NearEntry, Reservation
from .policy import Load, Serve, ServeStale, decide
from .shared import Held, Newer, Stamp

__all__ = ["ReadPath"]

log = structlog.get_logger(__name__)

T = TypeVar("T")
_AWAY = -2  #: as ``seen``: Valkey could not be asked
_POLL_MS = 250
_ASK_AGAIN_S = 1.0
_REFRESHES_ASKED_MAX = 1_000


class ReadPath(Generic[T]):
    """The reads of one cache."""

    def __init__(
        self, core: Core, loads: LoadPath[T], *, limits: Limits, staleness_ms: int
    ) -> None:
        self.name = loads.name
        self.policy = loads.policy
        self.codec = loads.codec
        self.near = loads.near
        self.loads = loads
        self.shared = core.shared
        self.waits = core.waits
        self.clock = core.clock
        self.flights: Flights[LoadCall[T], Hit[T]] = Flights(
            core.tasks,
            cache=loads.name,
            look=self._look,
            load=self._load,
            heard_since=self._heard_since,
            clock=core.clock,
            loads_max=limits.loads_max,
            waiters_max=limits.waiters_max,
        )
        self._core = core
        self._staleness_s = staleness_ms / 1000
        self._refreshes: dict[str, float] = {}
        self._asking = 0

    def __repr__(self) -> str:
        return f"<ReadPath {self.name}: {len(self.near)} near, {len(self.flights)} loads>"

    def hit_of(self, entry: NearEntry, *, stale: bool = False) -> Hit[T]:
        age_s = self._core.clock.monotonic() - entry.written_at
        return Hit(
            value=entry.value,
            tier="near",
            version=entry.version,
            age_ms=max(0, int(age_s * 1000)),
            stale=stale,
            size=entry.size,
        )

    async def read(self, key: str, call: LoadCall[T]) -> Hit[T]:
        """The value of a key that the near cache did not give.

        Raises:
            Unavailable, ServerRefused: by policy ``fail``. Backpressure: too many loads.
            Whatever the loader raised.
        """
        return await self.flights.join(key, call)

    async def invalidate(self, key: str) -> None:
        """Forget the key everywhere; here before this returns."""
        await self._core.invalidate((key,), ())

    def noticed(self, key: str, version: int) -> None:
        """A notice for this key: what is older is old, flights under way are not joined (R3)."""
        self.near.drop(key, version)
        self.flights.detach(key)

    def tag_noticed(self, tag: str) -> None:
        self.flights.detach_where(lambda call: tag in call.tags)

    def _heard_since(self, moment: float) -> bool:
        """Whether a change acknowledged after that moment, and due here by now, was heard of."""
        return self.loads.live or self._core.clock.monotonic() - moment < self._staleness_s

    async def _look(self, key: str, call: LoadCall[T]) -> Hit[T] | int:
        """What the shared tier has to serve; or the version that will not do."""
        reservation = self.near.reserve(key)
        try:
            raw = await self._core.shared.get(key)
            found = await self._usable(key, raw, reservation)
        except (Unavailable, ServerRefused) as error:
            hit = self._disconnected(key, error)
            return _AWAY if hit is None else hit
        finally:
            self.near.release(reservation)
        if isinstance(found, int):
            self.loads.count("shared", "miss")
        return found

    async def _usable(self, key: str, raw: bytes | None, reservation: Reservation) -> Hit[T] | int:
        """A hit, or the version that will not do."""
        try:
            entry = None if raw is None else read_entry(raw, bytes_max=self.codec.bytes_max)
        except InvalidEntry as error:
            self._unreadable(error)
            return version_of(raw or b"")
        decision = decide(
            entry,
            now_ms=self._core.server_clock.now_ms(),
            tags_hold=entry is None or not entry.meta.tags or await self._tags_hold(entry),
        )
        match decision:
            case Load(seen=seen):
                return seen
            case Serve(entry=entry, keep=keep):
                hit = self._hit(entry, stale=False)
                if hit is not None and keep and entry.version:
                    stamp = Stamp(entry.version, entry.soft_at_ms, entry.hard_at_ms)
                    self.loads.keep_stamped(
                        reservation, stamp, hit.value, entry.meta.tags, hit.size
                    )
            case ServeStale(entry=entry):
                hit = self._hit(entry, stale=True)
                if hit is not None:
                    self._have_refreshed(key, entry)
            case _:
                assert_never(decision)
        return entry.version if hit is None else hit

    async def _load(self, key: str, call: LoadCall[T], seen: int) -> Hit[T]:
        """Load under the lease, or take what the one brings who has it."""
        if seen == _AWAY:
            return await self.loads.bypass(key, call)
        reservation = self.near.reserve(key)
        try:
            try:
                found = await self._lease(key, call, seen, reservation)
            except (Unavailable, ServerRefused) as error:
                found = self._disconnected(key, error)
            if isinstance(found, Lease):
                return await self.loads.load_and_fill(found, call, reservation)
        finally:
            self.near.release(reservation)
        return await self.loads.bypass(key, call) if found is None else found

    async def _lease(
        self, key: str, call: LoadCall[T], seen: int, reservation: Reservation
    ) -> Lease | Hit[T] | None:
        """The lease, or a hit; None if neither is to be had."""
        core = self._core
        token, give_up_at = core.ids(), core.clock.monotonic() + 2 * self.policy.lease_ms / 1000
        while core.clock.monotonic() < give_up_at:
            with core.waits.watch(key) as said:
                outcome = await self.loads.begin(key, token, call.tags, seen=seen)
                match outcome:
                    case Lease():
                        return outcome
                    case Newer(entry=raw):
                        found = await self._usable(key, raw, reservation)
                        if isinstance(found, Hit):
                            return found
                        if found == seen:
                            return None  # a pending write that cannot be read here
                        seen = found
                    case Held(left_ms=left_ms):
                        poll_ms = _POLL_MS * (1 - core.rng.random() / 2)
                        with anyio.move_on_after(min(left_ms, poll_ms) / 1000):
                            await said.wait()
                    case _:
                        assert_never(outcome)
        return None

    def _disconnected(self, key: str, error: Unavailable | ServerRefused) -> Hit[T] | None:
        """What the policy has to serve; None for the source."""
        if isinstance(error, ServerRefused):
            log.error("shared_tier.refused", cache=self.name, error=str(error))
        if self.policy.on_disconnected == "fail":
            raise error
        if self.policy.on_disconnected == "stale":
            entry = self.near.presumable(key)
            if entry is not None:
                self.loads.count("near", "stale")
                return self.hit_of(entry, stale=True)
        return None

    def _hit(self, entry: Entry, *, stale: bool) -> Hit[T] | None:
        try:
            value = self.codec.value(entry)
        except InvalidEntry as error:
            self._unreadable(error)
            return None
        self.loads.count("shared", "stale" if stale else "negative" if entry.negative else "hit")
        age_ms = self._core.server_clock.now_ms() - entry.version // 1000 if entry.version else 0
        return Hit(
            value=value,  # type: ignore[arg-type]  # None is T's own when negatives are cached
            tier="shared",
            version=entry.version,
            age_ms=max(0, age_ms),
            stale=stale,
            size=len(entry.payload),
        )

    def _unreadable(self, error: InvalidEntry) -> None:
        self._core.instruments.counts["cache_decode_errors", self.name, error.fault] += 1

    async def _tags_hold(self, entry: Entry) -> bool:
        embedded, tags, live = entry.meta.tags, self._core.tags, self.loads.live
        if live and (known := tags.hold_as_known(embedded)) is not None:
            return known
        return tags.hold(embedded, await tags.versions(tuple(embedded), trust=live))

    def _have_refreshed(self, key: str, entry: Entry) -> None:
        now = self._core.clock.monotonic()
        if now < self._refreshes.get(key, 0.0):
            return
        if self._asking >= _REFRESHES_ASKED_MAX:
            self._core.instruments.counts["refreshes", "shed"] += 1
            return
        if len(self._refreshes) > 10_000:
            self._refreshes.clear()
        self._refreshes[key] = now + _ASK_AGAIN_S
        with suppress(RuntimeError):  # the task group is closed: another node will refresh
            self._core.tasks.start_soon(self._publish_refresh, key, entry.version)
            self._asking += 1

    async def _publish_refresh(self, key: str, seen: int) -> None:
        job = RefreshJob(cache=self.name, key=key, token=self._core.ids())
        try:
            done = await self._core.shared.refresh(job, lease_ms=self.policy.lease_ms, seen=seen)
        except ForebayError as error:
            log.debug("refresh.failed", cache=self.name, key=key, error=str(error))
            return
        finally:
            self._asking -= 1
        result = {1: "published", 0: "not_needed", -1: "shed"}[done]
        self._core.instruments.counts["refreshes", result] += 1
