"""Looking at what the shared tier has of a key: a hit, or what is left to do.

Q1  What ``decide`` says is done; the code here only obeys.
Q2  Bytes that cannot be read are a miss and a count.
Q3  A fresh value goes to the near cache, if the reservation made before the read still holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Generic, TypeVar, assert_never

from ...schemas.entry import Entry, read_entry, version_of
from ...schemas.errors import InvalidEntry
from .batched_lookups import Wanted
from .core import Core, Hit
from .flights import Todo
from .load import LoadPath
from .near import Reservation
from .policy import Load, Serve, ServeStale, decide
from .refreshing import RefreshRequests
from .tags import Standing, TagVersions, standing

__all__ = ["Asked", "Beside", "Looks"]

T = TypeVar("T")
Asked = tuple[str, Wanted, Reservation]


class Looks(Generic[T]):
    """For one cache."""

    def __init__(self, core: Core, loads: LoadPath[T], refreshes: RefreshRequests) -> None:
        self._loads = loads
        self._codec = loads.codec
        self._policy = loads.policy
        self._refreshes = refreshes
        self._tags = core.tags
        self._now_ms = core.server_clock.now_ms
        self._counts = core.instruments.counts

    async def look(
        self,
        key: str,
        raw: bytes | None,
        reservation: Reservation,
        beside: Beside | None = None,
    ) -> Hit[T] | Todo[Hit[T]]:
        """A hit, or what will not do, of these stored bytes; ``beside`` is asked for with them."""
        try:
            entry = None if raw is None else read_entry(raw, bytes_max=self._codec.bytes_max)
        except InvalidEntry as error:
            self._unreadable(error)
            return self.todo(version_of(raw or b""))
        now_ms = self._now_ms()
        decision = decide(
            entry,
            now_ms,
            "fresh"
            if entry is None or not entry.meta.tags
            else await self._standing(entry, beside),
            self._policy.refresh_ahead,
        )
        match decision:
            case Serve(entry=entry):
                hit = self._hit(entry, now_ms)
                if hit is not None:
                    self._serve(key, decision, hit, reservation)
            case ServeStale(entry=entry):
                hit = self._hit(entry, now_ms, stale=True)
                if hit is not None:
                    self._refreshes.ask(key, entry.version)
            case Load(seen=seen, fallback=fallback):
                return self.todo(seen, fallback)
            case _:
                assert_never(decision)
        return self.todo(entry.version) if hit is None else hit

    def todo(self, seen: int, fallback: Entry | None = None) -> Todo[Hit[T]]:
        """What is left to do about this version; what may be served if that fails, or is late."""
        hit = None if fallback is None else self._hit(fallback, self._now_ms(), stale=True)
        patience_ms = self._policy.hard_timeout_ms
        if hit is not None:
            patience_ms = self._policy.soft_timeout_ms or patience_ms
        return Todo(seen, hit, patience_ms / 1000 if patience_ms else None)

    def _serve(self, key: str, decision: Serve, hit: Hit[T], reservation: Reservation) -> None:
        entry = decision.entry
        if decision.refresh:
            self._refreshes.ask(key, entry.version)
        if decision.keep and entry.version:
            lifetime_ms = 0 if decision.refresh else entry.meta.soft_ms
            self._loads.keep(reservation, entry, hit.value, entry.meta.tags, hit.size, lifetime_ms)

    def _hit(self, entry: Entry, now_ms: int, *, stale: bool = False) -> Hit[T] | None:
        try:
            value, size = self._codec.value_and_size(entry)
        except InvalidEntry as error:
            self._unreadable(error)
            return None
        # None is T's own when negatives are cached.
        return Hit(value, "shared", entry.version, entry.age_ms(now_ms), stale, size)  # type: ignore[arg-type]

    def _unreadable(self, error: InvalidEntry) -> None:
        self._counts["cache_decode_errors", self._loads.name] += 1
        self._counts["entry_faults", error.fault] += 1

    async def _standing(self, entry: Entry, beside: Beside | None) -> Standing:
        embedded, tags, live = entry.meta.tags, self._tags, self._loads.live
        if live and (known := tags.stand_as_known(embedded)) is not None:
            return known
        if beside is None:
            return standing(embedded, await tags.versions(tuple(embedded), trust=live))
        if not beside.versions.keys() >= embedded.keys():
            beside.versions |= await tags.versions(beside.tags(), trust=live)
        return standing(embedded, beside.versions)


class Beside:
    """Reads that were asked for together: one question about tags does for all that have come.

    Versions asked for while the reads are under way are new enough for each of them.
    """

    def __init__(self, asked: Sequence[Asked]) -> None:
        self.versions: dict[str, TagVersions] = {}
        self._asked = asked

    def tags(self) -> Sequence[str]:
        """Those of all entries that have come and can be read."""
        tags: dict[str, int] = {}
        for _, wanted, _ in self._asked:
            came = wanted.done() and not wanted.cancelled() and wanted.exception() is None
            if came and (raw := wanted.result()):
                with suppress(InvalidEntry):
                    tags |= read_entry(raw, bytes_max=len(raw)).meta.tags
        return list(tags)
