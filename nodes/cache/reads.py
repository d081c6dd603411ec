"""The read path: near cache, shared tier, loader.

R1  What ``decide`` says is done; the code here only obeys.
R2  At most one load of a key runs in this process, and, by the lease, in the cluster.
R3  A caller who comes after a notice for the key, or for one of its tags, never gets what a
    flight brings that began before (Flights F2).
R4  Bytes that cannot be read are a miss and a count.
R5  Where the loader fails, what was kept for that is served, flagged as stale.
R6  While Valkey does not answer, or refuses: ``bypass`` asks the source and stores nothing;
    ``stale`` serves what the near cache has and does not know to be wrong, flagged, and then
    bypasses; ``fail`` raises what happened. A loader's own errors are never taken for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar, assert_never

import anyio
import structlog

from ...schemas.entry import Entry, read_entry, version_of
from ...schemas.errors import ForebayError, InvalidEntry, ServerRefused, SourceFailing, Unavailable
from ...schemas.jobs import RefreshJob
from ...schemas.settings import Limits
from .core import Core, Hit, Lease, LoadCall
from .flights import Flights, Todo
from .loads import LoadPath
from .lookups import Wanted
from .near import NearEntry, Reservation
from .policy import Load, Serve, ServeStale, decide
from .shared import Held, Newer, Stamp
from .tags import Standing, standing

__all__ = ["ReadPath"]

log = structlog.get_logger(__name__)

T = TypeVar("T")
_AWAY = -2  #: as ``seen``: Valkey could not be asked
_POLL_MS = 250
_ASK_AGAIN_S = 1.0
_REFRESHES_ASKED_MAX = 1_000


class ReadPath(Generic[T]):
    """The reads of one cache."""

    def __init__(self, core: Core, loads: LoadPath[T], *, limits: Limits) -> None:
        self.name = loads.name
        self.policy = loads.policy
        self.codec = loads.codec
        self.near = loads.near
        self.loads = loads
        self.shared = core.shared
        self.flights: Flights[LoadCall[T], Hit[T]] = Flights(
            core.tasks,
            cache=loads.name,
            load=self._load,
            heard_since=self._heard_since,
            clock=core.clock,
            loads_max=limits.loads_max,
            waiters_max=limits.waiters_max,
            served_late=lambda: loads.count("shared", "stale"),
        )
        self._core = core
        self._staleness_s = loads.policy.staleness_ms / 1000
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

    async def read(self, key: str, call: Callable[[], LoadCall[T]]) -> Hit[T]:
        """The value of a key that the near cache did not give; ``call`` if it is to be loaded.

        Raises:
            Unavailable, ServerRefused: by policy ``fail``. Backpressure: too many loads.
            Whatever the loader raised.
        """
        if self.policy.refresh_ahead and (entry := self.near.ripe(key)) is not None:
            self._have_refreshed(key, entry.version)
            return self.hit_of(entry)
        found = await self._look(key, self._core.shared.get(key), self.near.reserve(key))
        return await self.load(key, call(), found) if isinstance(found, Todo) else found

    async def look_at(self, keys: Sequence[str]) -> dict[str, Hit[T] | Todo[Hit[T]] | Exception]:
        """What the shared tier has of these keys, asked for together."""
        asked = [(key, self._core.shared.get(key), self.near.reserve(key)) for key in keys]
        found: dict[str, Hit[T] | Todo[Hit[T]] | Exception] = {}
        try:
            for key, wanted, reservation in asked:
                try:
                    found[key] = await self._look(key, wanted, reservation)
                except ForebayError as error:
                    found[key] = error
        finally:
            for _, wanted, reservation in asked[len(found) :]:
                wanted.cancel()
                self.near.release(reservation)
        return found

    async def load(self, key: str, call: LoadCall[T], todo: Todo[Hit[T]]) -> Hit[T]:
        """The value of a key that the shared tier did not give."""
        return await self.flights.join(key, call, todo)

    async def refresh(self, key: str, token: str, call: LoadCall[T]) -> bool:
        """Load a key again under the lease of a refresh job; false: it was refused."""
        reservation = self.near.reserve(key)
        try:
            lease = await self.loads.taken_over(key, token, call.tags)
            if lease is None:
                return False
            hit = await self.loads.load_and_fill(lease, call, reservation)
        finally:
            self.near.release(reservation)
        return hit.version > 0

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

    async def _look(
        self, key: str, wanted: Wanted, reservation: Reservation
    ) -> Hit[T] | Todo[Hit[T]]:
        """What the shared tier has to serve; or what will not do."""
        try:
            found = await self._usable(key, await wanted, reservation)
        except (Unavailable, ServerRefused) as error:
            hit = self._disconnected(key, error)
            return self._todo(_AWAY) if hit is None else hit
        finally:
            self.near.release(reservation)
        if isinstance(found, Todo):
            self.loads.count("shared", "miss")
        return found

    async def _usable(
        self, key: str, raw: bytes | None, reservation: Reservation
    ) -> Hit[T] | Todo[Hit[T]]:
        """A hit, or what will not do."""
        try:
            entry = None if raw is None else read_entry(raw, bytes_max=self.codec.bytes_max)
        except InvalidEntry as error:
            self._unreadable(error)
            return self._todo(version_of(raw or b""))
        decision = decide(
            entry,
            now_ms=self._core.server_clock.now_ms(),
            tags="fresh" if entry is None or not entry.meta.tags else await self._standing(entry),
            refresh_ahead=self.policy.refresh_ahead,
        )
        match decision:
            case Load(seen=seen, fallback=fallback):
                return self._todo(seen, fallback)
            case Serve(entry=entry):
                hit = self._served(key, decision, reservation)
            case ServeStale(entry=entry):
                hit = self._hit(entry, stale=True)
                if hit is not None:
                    self.loads.count("shared", "stale")
                    self._have_refreshed(key, entry.version)
            case _:
                assert_never(decision)
        return self._todo(entry.version) if hit is None else hit

    def _served(self, key: str, decision: Serve, reservation: Reservation) -> Hit[T] | None:
        entry = decision.entry
        hit = self._hit(entry, stale=False)
        if hit is None:
            return None
        self.loads.count("shared", "negative" if entry.negative else "hit")
        if decision.refresh:
            self._have_refreshed(key, entry.version)
        if decision.keep and entry.version:
            stamp = Stamp(entry.version, entry.soft_at_ms, entry.hard_at_ms)
            lifetime_ms = 0 if decision.refresh else entry.meta.soft_ms
            self.loads.keep_stamped(
                reservation, stamp, hit.value, entry.meta.tags, hit.size, lifetime_ms
            )
        return hit

    def _todo(self, seen: int, fallback: Entry | None = None) -> Todo[Hit[T]]:
        hit = None if fallback is None else self._hit(fallback, stale=True)
        patience_ms = self.policy.hard_timeout_ms
        if hit is not None:
            patience_ms = self.policy.soft_timeout_ms or patience_ms
        return Todo(seen, hit, patience_ms / 1000 if patience_ms else None)

    async def _load(self, key: str, call: LoadCall[T], todo: Todo[Hit[T]]) -> Hit[T]:
        """Load under the lease, or take what the one brings who has it."""
        if todo.seen == _AWAY:
            return await self.loads.bypass(key, call)
        reservation = self.near.reserve(key)
        try:
            found = await self._found_or_leased(key, call, todo, reservation)
            if isinstance(found, Hit):
                return found
            try:
                if found is None:
                    return await self.loads.bypass(key, call)
                return await self.loads.load_and_fill(found, call, reservation)
            except Exception as error:
                return self._instead(todo, error)
        finally:
            self.near.release(reservation)

    async def _found_or_leased(
        self, key: str, call: LoadCall[T], todo: Todo[Hit[T]], reservation: Reservation
    ) -> Lease | Hit[T] | None:
        try:
            self.loads.source.refuse(key)
            return await self._lease(key, call, todo, reservation)
        except SourceFailing as error:
            self.loads.count("source", "refused")
            return self._instead(todo, error)
        except (Unavailable, ServerRefused) as error:
            return self._disconnected(key, error)

    def _instead(self, todo: Todo[Hit[T]], error: Exception) -> Hit[T]:
        """What is served if the source fails; otherwise its error is raised."""
        if todo.fallback is None:
            raise error
        self.loads.count("shared", "stale")
        return todo.fallback

    async def _lease(
        self, key: str, call: LoadCall[T], todo: Todo[Hit[T]], reservation: Reservation
    ) -> Lease | Hit[T] | None:
        """The lease, or a hit; None if neither is to be had."""
        core, seen, patient = self._core, todo.seen, todo.fallback is not None
        token, give_up_at = core.ids(), core.clock.monotonic() + 2 * self.policy.lease_ms / 1000
        while core.clock.monotonic() < give_up_at:
            with core.waits.watch(key) as said:
                outcome = await self.loads.begin(key, token, call.tags, seen=seen, patient=patient)
                match outcome:
                    case Lease():
                        return outcome
                    case Newer(entry=raw):
                        found = await self._usable(key, raw, reservation)
                        if isinstance(found, Hit):
                            return found
                        if found.seen == seen:
                            return None  # a pending write that cannot be read here
                        seen = found.seen
                    case Held():
                        if (hit := await self._held_up(outcome, said, call, todo)) is not None:
                            return hit
                    case _:
                        assert_never(outcome)
        return None

    async def _held_up(
        self, held: Held, said: anyio.Event, call: LoadCall[T], todo: Todo[Hit[T]]
    ) -> Hit[T] | None:
        """Wait for the one who has the lease; or serve what there is while the source fails."""
        if held.failing and todo.fallback is not None:
            self.loads.count("shared", "stale")
            return todo.fallback
        if call.waits is not None:
            call.waits()
        poll_ms = _POLL_MS * (1 - self._core.rng.random() / 2)
        with anyio.move_on_after(min(held.left_ms, poll_ms) / 1000):
            await said.wait()
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

    async def _standing(self, entry: Entry) -> Standing:
        embedded, tags, live = entry.meta.tags, self._core.tags, self.loads.live
        if live and (known := tags.stand_as_known(embedded)) is not None:
            return known
        return standing(embedded, await tags.versions(tuple(embedded), trust=live))

    def _have_refreshed(self, key: str, version: int) -> None:
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
            self._core.tasks.start_soon(self._publish_refresh, key, version)
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
