"""Refresh events: they become refresh jobs, which any node does.

Q1  Nothing here fails, and nothing waits long: a key that no cache knows, that is loaded
    already, or for which a shard has no room is passed over.
"""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import structlog

from ...schemas.errors import ForebayError
from ...schemas.events import Body, Refresh
from ...schemas.jobs import RefreshJob
from ..cache.core import Core
from .routes import Routes

__all__ = ["RefreshRequests"]

log = structlog.get_logger(__name__)

_ANY = 1 << 62  #: whatever version there is, a newer one is wanted
_TOGETHER = 64


class RefreshRequests:
    def __init__(self, routes: Routes, core: Core) -> None:
        self._routes = routes
        self._shared = core.shared
        self._shard_of = core.shared.names.shard
        self._counts = core.instruments.counts
        self._ids = core.ids

    async def carry_out(self, bodies: Sequence[Body]) -> None:
        """Publish the jobs of all refreshes among these, each key once."""
        wanted = [body for body in bodies if isinstance(body, Refresh)]
        keys = list(dict.fromkeys(key for body in wanted for key in body.keys))
        full: set[int] = set()
        for start in range(0, len(keys), _TOGETHER):
            async with anyio.create_task_group() as tasks:
                for key in keys[start : start + _TOGETHER]:
                    if self._shard_of(key) not in full:
                        tasks.start_soon(self._publish, key, full)
        self._counts["events_processed", "refresh", "applied"] += len(wanted)

    async def _publish(self, key: str, full: set[int]) -> None:
        cached = self._routes.cache_of(key)
        if cached is None:
            return
        job = RefreshJob(cache=cached.name, key=key, token=self._ids())
        try:
            lease_ms = cached.path.policy.lease_ms
            reply = await self._shared.refresh(job, lease_ms=lease_ms, seen=_ANY)
        except ForebayError as error:
            log.debug("refresh.not_published", error=str(error))
            return
        if reply < 0:
            self._counts["limit_reached", "refreshes"] += 1
            full.add(self._shard_of(key))
