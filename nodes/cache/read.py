"""The read path: near cache, shared tier, loader.

R1  Each caller looks at the shared tier (see ``Looks``); where there is nothing to serve, one
    loads for all.
R2  At most one load of a key runs in this process, and, by the lease, in the cluster.
R3  A caller who comes after a notice for the key, or for a tag that is declared, never gets what
    a flight brings that began before (Flights F2). Which tags the loader names is known only when
    it has run; a bump meanwhile makes it run once more (Loads L6).
R4  Where the loader fails, what was kept for that is served, flagged as stale.
R5  A key without an entry that has one at its ``legacy_key`` is not loaded; see ``legacy``.
R6  While Valkey does not answer, or refuses: ``bypass`` asks the source and stores nothing;
    ``stale`` serves what the near cache has and does not know to be wrong, flagged, and then
    bypasses; ``fail`` raises what happened. A loader's own errors are never taken for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, assert_never

import anyio
import structlog

from ...coordinator.log_once import LogOnce
from ...schemas.errors import ForebayError, ServerRefused, SourceFailing, Unavailable
from ...schemas.notices import Extended
from ...schemas.settings import Limits
from .batched_lookups import Wanted
from .core import Core, Hit, Lease, LoadCall
from .flights import Flights, Todo
from .legacy import LegacyEntries
from .load import LoadPath
from .near import NearEntry, Reservation
from .policy import ahead_ms
from .read_metrics import Asked, ReadMetrics
from .refreshing import RefreshRequests
from .shared import Held, Newer
from .shared_lookup import Beside, Looks

log = structlog.get_logger(__name__)

T = TypeVar("T")
_ABSENT = -1  #: as ``seen``: there is no entry
_AWAY = -2  #: as ``seen``: Valkey could not be asked
_POLL_MS = 250
_SHARED: Asked = "shared"
_SOURCE: Asked = "source"


class ReadPath(Generic[T]):
    """The reads of one cache."""

    def __init__(
        self,
        core: Core,
        loads: LoadPath[T],
        *,
        limits: Limits,
        legacy_name: Callable[[str], str] | None = None,
    ) -> None:
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
            full=self._count_full,
        )
        self.metrics = ReadMetrics(core.instruments, loads.name, core.clock)
        self.check_loop = core.tasks.check_loop
        self._core = core
        self._refused = LogOnce(core.clock)
        self._staleness_s = loads.policy.staleness_ms / 1000
        self._refreshes = RefreshRequests(core, loads.name, lease_ms=loads.policy.lease_ms)
        self._looks: Looks[T] = Looks(core, loads, self._refreshes)
        self.legacy: LegacyEntries[T] | None = None
        if legacy_name is not None:
            self.legacy = LegacyEntries(core, loads, self._refreshes, legacy_name)

    def __repr__(self) -> str:
        return f"<ReadPath {self.name}: {len(self.near)} near, {len(self.flights)} loads>"

    def hit_of(self, entry: NearEntry, *, stale: bool = False) -> Hit[T]:
        return Hit(
            value=entry.value,
            tier="near",
            version=entry.version,
            age_ms=entry.age_ms(self._core.clock.monotonic()),
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
            self._refreshes.ask(key, entry.version)
            return self.hit_of(entry)
        began, asked = self.metrics.now(), _SHARED
        try:
            found = await self._look(key, self._core.shared.get(key), self.near.reserve(key))
            if isinstance(found, Todo):
                asked = _SOURCE
                found = await self.load(key, call(), found)
        except BaseException as error:
            self.metrics.failed(asked, error)
            raise
        finally:
            self.metrics.took(began)
        self.metrics.answered(found)
        return found

    async def look_at(self, keys: Sequence[str]) -> dict[str, Hit[T] | Todo[Hit[T]] | Exception]:
        """What the shared tier has of these keys, asked for together."""
        asked = [(key, self._core.shared.get(key), self.near.reserve(key)) for key in keys]
        beside = Beside(asked)
        found: dict[str, Hit[T] | Todo[Hit[T]] | Exception] = {}
        try:
            for key, wanted, reservation in asked:
                try:
                    found[key] = await self._look(key, wanted, reservation, beside=beside)
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
            lease = await self.loads.leases.take_over(key, token, call.tags)
            if lease is None:
                return False
            with self.flights.alone(key, call):
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

    def extended(self, notice: Extended, version: int, soft_until: float) -> None:
        """The value lives on, until then on this node's clock."""
        ripe_at_ms = ahead_ms(soft_until * 1000, notice.soft_ms, self.policy.refresh_ahead)
        self.near.extend(notice.key, notice.since, version, ripe_at_ms / 1000, soft_until)

    def tag_noticed(self, tag: str) -> None:
        self.flights.detach_where(lambda call: tag in call.tags)

    def _count_full(self, bound: str) -> None:
        self._core.instruments.counts["limit_reached", bound] += 1

    def _heard_since(self, moment: float) -> bool:
        """Whether a change acknowledged after that moment, and due here by now, was heard of."""
        return self.loads.live or self._core.clock.monotonic() - moment < self._staleness_s

    async def _look(
        self, key: str, wanted: Wanted, reservation: Reservation, beside: Beside | None = None
    ) -> Hit[T] | Todo[Hit[T]]:
        """What the shared tier has to serve; or what will not do."""
        try:
            return await self._looks.look(key, await wanted, reservation, beside)
        except (Unavailable, ServerRefused) as error:
            hit = self._disconnected(key, error)
            return self._looks.todo(_AWAY) if hit is None else hit
        finally:
            self.near.release(reservation)

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
                if (hit := await self._brought_over(found, call, reservation)) is not None:
                    return hit
                return await self.loads.load_and_fill(found, call, reservation)
            except Exception as error:
                return self._instead(todo, error)
        finally:
            self.near.release(reservation)

    async def _brought_over(
        self, lease: Lease, call: LoadCall[T], reservation: Reservation
    ) -> Hit[T] | None:
        """What another service has stored for a key without an entry."""
        if self.legacy is None or lease.previous is not None:
            return None
        hit = await self.legacy.import_entry(lease, reservation)
        if hit is not None and call.waits is not None:
            call.waits()
        return hit

    async def import_old(self, key: str, tags: Sequence[str], *, dry_run: bool) -> str:
        """Bring over the old value of a key without an entry, and load nothing: what came of it."""
        legacy, leases, core = self.legacy, self.loads.leases, self._core
        assert legacy is not None
        if dry_run:
            return "present" if await core.shared.get(key) else await legacy.check_import(key, tags)
        token, reservation = core.ids(), self.near.reserve(key)
        try:
            lease = await leases.begin(key, token, tags, seen=_ABSENT)
            if not isinstance(lease, Lease):
                return "present" if isinstance(lease, Newer) else "held"
            result, hit = await legacy.try_import(lease, reservation)
            if hit is None:
                await leases.give_back(key, token)
            return result
        finally:
            self.near.release(reservation)

    async def _found_or_leased(
        self, key: str, call: LoadCall[T], todo: Todo[Hit[T]], reservation: Reservation
    ) -> Lease | Hit[T] | None:
        try:
            if self.legacy is None or todo.seen != _ABSENT:
                self.loads.source.refuse(key)
            return await self._lease(key, call, todo, reservation)
        except SourceFailing as error:
            self.loads.count("refused")
            return self._instead(todo, error)
        except (Unavailable, ServerRefused) as error:
            return self._disconnected(key, error)

    def _instead(self, todo: Todo[Hit[T]], error: Exception) -> Hit[T]:
        """What is served if the source fails; otherwise its error is raised."""
        if todo.fallback is None:
            raise error
        return todo.fallback

    async def _lease(
        self, key: str, call: LoadCall[T], todo: Todo[Hit[T]], reservation: Reservation
    ) -> Lease | Hit[T] | None:
        """The lease, or a hit; None if neither is to be had."""
        core, seen, patient = self._core, todo.seen, todo.fallback is not None
        token, give_up_at = core.ids(), core.clock.monotonic() + 2 * self.policy.lease_ms / 1000
        while core.clock.monotonic() < give_up_at:
            with core.waits.watch(key) as said:
                outcome = await self.loads.leases.begin(
                    key, token, call.tags, seen=seen, patient=patient
                )
                match outcome:
                    case Lease():
                        return outcome
                    case Newer(entry=raw):
                        found = await self._looks.look(key, raw, reservation)
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
            self._refused.say(log, "shared_tier.refused", error, level="error", cache=self.name)
        if self.policy.on_disconnected == "fail":
            raise error
        if self.policy.on_disconnected == "stale":
            entry = self.near.presumable(key)
            if entry is not None:
                return self.hit_of(entry, stale=True)
        return None
