"""Asking the cluster for a refresh of what this node serves: a job for whoever has the loader.

V1  This node asks for one version to be replaced once a second at most, however many read it.
V2  At most a thousand questions are under way; what goes beyond is shed, and counted.
V3  A question that fails is not repeated by itself: the first reader after that second asks again.
"""

from __future__ import annotations

from contextlib import suppress

import structlog

from ...schemas.errors import ForebayError, Unavailable
from ...schemas.jobs import RefreshJob
from .core import Core

__all__ = ["RefreshRequests"]

log = structlog.get_logger(__name__)

_ASK_AGAIN_S = 1.0
_ASKED_MAX = 1_000
_REMEMBERED_MAX = 10_000


class RefreshRequests:
    """Of one cache."""

    def __init__(self, core: Core, cache: str, *, lease_ms: int) -> None:
        self._core = core
        self._cache = cache
        self._lease_ms = lease_ms
        self._asked: dict[str, tuple[int, float]] = {}  #: for which version, and until when
        self._asking = 0

    def __repr__(self) -> str:
        return f"<RefreshRequests of {self._cache}, {self._asking} under way>"

    def ask(self, key: str, seen: int) -> None:
        """Have what is newer than this version loaded, unless that was asked for just now."""
        now = self._core.clock.monotonic()
        asked_for, until = self._asked.get(key, (-1, 0.0))
        if seen <= asked_for and now < until:
            return
        if self._asking >= _ASKED_MAX:
            self._core.instruments.counts["refresh_requests", "shed"] += 1
            return
        if len(self._asked) > _REMEMBERED_MAX:
            self._asked.clear()
        self._asked[key] = seen, now + _ASK_AGAIN_S
        with suppress(Unavailable):  # the node is stopped: another one will refresh
            self._core.tasks.start_soon(self._publish, key, seen)
            self._asking += 1

    async def _publish(self, key: str, seen: int) -> None:
        job = RefreshJob(cache=self._cache, key=key, token=self._core.ids())
        try:
            done = await self._core.shared.refresh(job, lease_ms=self._lease_ms, seen=seen)
        except ForebayError as error:
            log.debug("refresh.failed", cache=self._cache, key=key, error=str(error))
            return
        finally:
            self._asking -= 1
        result = {1: "published", 0: "not_needed", -1: "shed"}[done]
        self._core.instruments.counts["refresh_requests", result] += 1
