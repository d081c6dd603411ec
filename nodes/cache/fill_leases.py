"""The right to load a key and to fill its entry: taken, taken over, given back.

Y1  With a lease come the versions that the tags had before the load, and what is stored now.
Y2  A lease of which it is not known whether it was granted is given back; giving back takes no
    longer than a second, also when the caller is cancelled, and touches nobody else's lease.

What writes need of the same lease: ``write_leases``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

import anyio
import structlog

from ...schemas.entry import read_entry
from ...schemas.errors import ForebayError, InvalidEntry
from .core import Lease
from .policy import Policy
from .shared import Granted, Held, Newer, SharedTier

__all__ = ["FillLeases"]

log = structlog.get_logger(__name__)


class FillLeases:
    """Of one cache. ``tags_of(tags)`` gives their current versions."""

    def __init__(
        self,
        shared: SharedTier,
        cache: str,
        policy: Policy,
        *,
        bytes_max: int,
        tags_of: Callable[[Sequence[str]], Awaitable[Mapping[str, int]]],
    ) -> None:
        self._shared = shared
        self._cache = cache
        self._policy = policy
        self._bytes_max = bytes_max
        self._tags_of = tags_of

    def __repr__(self) -> str:
        return f"<FillLeases of {self._cache}>"

    async def begin(
        self, key: str, token: str, tags: Sequence[str], *, seen: int, patient: bool = False
    ) -> Lease | Newer | Held:
        """Take the fill lease of a key, or learn what stands in the way.

        Raises:
            Unavailable, ServerRefused: the lease is not held.
        """
        lease_ms = self._policy.lease_ms
        try:
            outcome = await self._shared.begin(
                key, token, lease_ms=lease_ms, seen=seen, patient=patient
            )
            if isinstance(outcome, Granted):
                return await self._leased(key, token, tags, outcome)
        except BaseException:
            await self.give_back(key, token)  # it may have been granted
            raise
        return outcome

    async def take_over(self, key: str, token: str, tags: Sequence[str]) -> Lease | None:
        """The lease that a refresh job carries; None if it is over.

        Raises:
            Unavailable, ServerRefused: it is not known.
        """
        try:
            if granted := await self._shared.holds(key, token):
                return await self._leased(key, token, tags, granted)
        except BaseException:
            await self.give_back(key, token)
            raise
        return None

    async def give_back(self, key: str, token: str) -> bool:
        """Let the next one load; costs nothing if the lease is gone already, and is false then."""
        with anyio.move_on_after(1, shield=True):
            try:
                return await self._shared.release(key, token)
            except ForebayError as error:
                log.debug("lease.kept", cache=self._cache, key=key, error=str(error))
        return False

    async def failed(self, lease: Lease) -> None:
        """Give it back, and have the source left alone for a while, if there is an entry."""
        with anyio.move_on_after(1, shield=True):
            try:
                throttle_ms = self._policy.throttle_ms
                await self._shared.failed(lease.key, lease.token, throttle_ms=throttle_ms)
            except ForebayError as error:
                log.debug("lease.kept", cache=self._cache, key=lease.key, error=str(error))

    async def _leased(self, key: str, token: str, tags: Sequence[str], granted: Granted) -> Lease:
        try:
            raw = granted.entry
            previous = read_entry(raw, bytes_max=self._bytes_max) if raw else None
        except InvalidEntry:
            previous = None  # counted where it was read
        return Lease(key, token, await self._tags_of(tags), granted.since, previous)
