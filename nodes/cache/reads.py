"""The read path: near cache, shared tier, loader.

R1  What ``decide`` says is done; the code here only obeys.
R2  At most one load of a key runs in this process, and, by the lease, in the cluster.
R3  A caller who comes after a notice for the key, or for one of its tags, never gets what a
    load brings that began before (Flights F2).
R4  Bytes that cannot be read are a miss and a count.
R5  While Valkey does not answer: ``bypass`` asks the source and stores nothing; ``stale``
    serves what the near cache has, flagged, then bypasses; ``fail`` raises Unavailable.
"""

from __future__ import annotations

from typing import Generic, TypeVar, assert_never

import anyio
import structlog

from ...schemas.entry import Entry, read_entry
from ...schemas.errors import ForebayError, InvalidEntry, Unavailable
from ...schemas.jobs import RefreshJob
from .flights import Flights
from .loads import Core, Hit, LoadCall, LoadPath
from .near import NearEntry, Reservation
from .policy import Load, Serve, ServeStale, decide
from .shared import Granted, Held, Newer, Stamp

__all__ = ["ReadPath"]

log = structlog.get_logger(__name__)

T = TypeVar("T")
_ANY = 1 << 62  #: as ``seen``: whatever is there will not do
_POLL_MS = 250
_ASK_AGAIN_S = 1.0


class ReadPath(Generic[T]):
    """The reads of one cache."""

    def __init__(self, core: Core, loads: LoadPath[T], *, loads_max: int) -> None:
        self.name = name = loads.name
        self.policy = loads.policy
        self.codec = loads.codec
        self.near = loads.near
        self.loads = loads
        self.shared = core.shared
        self.flights: Flights[Hit[T]] = Flights(core.tasks, cache=name, loads_max=loads_max)
        self._core = core
        self._refreshes: dict[str, float] = {}
        self._flown_tags: dict[str, frozenset[str]] = {}

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
            Unavailable: by policy ``fail``. Backpressure: too many loads.
            Whatever the loader raised.
        """
        self._flown_tags[key] = frozenset(call.tags)
        return await self.flights.join(key, lambda: self._fly(key, call))

    async def invalidate(self, key: str) -> None:
        """Forget the key everywhere; here before this returns."""
        await self._core.invalidate((key,), ())

    def noticed(self, key: str, version: int) -> None:
        """A notice for this key: what is older is old, loads under way are not joined (R3)."""
        self.near.drop(key, version)
        self.flights.detach(key)

    def tag_noticed(self, tag: str) -> None:
        for key in [key for key, tags in self._flown_tags.items() if tag in tags]:
            self.flights.detach(key)

    async def _fly(self, key: str, call: LoadCall[T]) -> Hit[T]:
        reservation = self.near.reserve(key)
        try:
            raw = await self._core.shared.get(key)
            return await self._obey(key, call, raw, reservation)
        except Unavailable:
            return await self._disconnected(key, call)
        finally:
            self.near.release(reservation)
            if key not in self.flights:
                self._flown_tags.pop(key, None)

    async def _obey(
        self, key: str, call: LoadCall[T], raw: bytes | None, reservation: Reservation
    ) -> Hit[T]:
        found = await self._usable(key, raw, reservation)
        if isinstance(found, Hit):
            return found
        self.loads.count("shared", "miss")
        return await self._load(key, call, found, reservation)

    async def _usable(self, key: str, raw: bytes | None, reservation: Reservation) -> Hit[T] | int:
        """A hit, or the version that will not do."""
        entry = self._read(raw)
        if raw is not None and entry is None:
            return _ANY
        decision = decide(
            entry,
            now_ms=self._core.server_clock.now_ms(),
            tags_hold=entry is None or await self._tags_hold(entry),
        )
        match decision:
            case Load(seen=seen):
                return seen
            case Serve(entry=entry, keep=keep):
                hit = self._hit(entry, stale=False)
                if hit is not None and keep and entry.version:
                    self._keep(reservation, entry, hit)
            case ServeStale(entry=entry):
                hit = self._hit(entry, stale=True)
                self._have_refreshed(key, entry)
            case _:
                assert_never(decision)
        return _ANY if hit is None else hit

    async def _load(
        self, key: str, call: LoadCall[T], seen: int, reservation: Reservation
    ) -> Hit[T]:
        """Load under the lease, or wait for the one who does."""
        core, lease_ms = self._core, self.policy.lease_ms
        token, give_up_at = core.ids(), core.clock.monotonic() + 2 * lease_ms / 1000
        while core.clock.monotonic() < give_up_at:
            with core.waits.watch(key) as said:
                outcome = await core.shared.begin(key, token, lease_ms=lease_ms, seen=seen)
                match outcome:
                    case Granted():
                        return await self.loads.load_and_fill(key, call, token, reservation)
                    case Newer(entry=raw):
                        found = await self._usable(key, raw, reservation)
                        if isinstance(found, Hit):
                            return found
                        seen = found
                    case Held(left_ms=left_ms):
                        with anyio.move_on_after(min(left_ms, _POLL_MS) / 1000):
                            await said.wait()
                    case _:
                        assert_never(outcome)
        return await self.loads.bypass(key, call)

    async def _disconnected(self, key: str, call: LoadCall[T]) -> Hit[T]:
        if self.policy.on_disconnected == "fail":
            raise Unavailable("and this cache does not serve without it")
        if self.policy.on_disconnected == "stale":
            entry = self.near.peek(key)
            if entry is not None and self._core.clock.monotonic() < entry.gone_at:
                self.loads.count("near", "stale")
                return self.hit_of(entry, stale=True)
        return await self.loads.bypass(key, call)

    def _read(self, raw: bytes | None) -> Entry | None:
        if raw is None:
            return None
        try:
            return read_entry(raw, bytes_max=self.codec.bytes_max)
        except InvalidEntry as error:
            self._unreadable(error)
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
        embedded = entry.meta.tags
        if not embedded:
            return True
        current = await self._core.tags.versions(tuple(embedded), trust=self.loads.live)
        return self._core.tags.hold(embedded, current)

    def _have_refreshed(self, key: str, entry: Entry) -> None:
        now = self._core.clock.monotonic()
        if now < self._refreshes.get(key, 0.0):
            return
        if len(self._refreshes) > 10_000:
            self._refreshes.clear()
        self._refreshes[key] = now + _ASK_AGAIN_S
        self._core.tasks.start_soon(self._publish_refresh, key, entry.version)

    async def _publish_refresh(self, key: str, seen: int) -> None:
        job = RefreshJob(cache=self.name, key=key, token=self._core.ids())
        try:
            done = await self._core.shared.refresh(job, lease_ms=self.policy.lease_ms, seen=seen)
        except ForebayError as error:
            log.debug("refresh.failed", cache=self.name, key=key, error=str(error))
            return
        result = {1: "published", 0: "not_needed", -1: "shed"}[done]
        self._core.instruments.counts["refreshes", result] += 1

    def _keep(self, reservation: Reservation, entry: Entry, hit: Hit[T]) -> None:
        stamp = Stamp(entry.version, entry.soft_at_ms, entry.hard_at_ms)
        self.loads.keep_stamped(reservation, stamp, hit.value, entry.meta.tags, hit.size)
