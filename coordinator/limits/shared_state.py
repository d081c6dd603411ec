"""State that all limit sets of a process share: server, clock, outage, tasks and metrics."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from ...schemas.errors import ServerRefused, Unavailable
from ..background import BackgroundTasks
from ..clock import Clock
from ..instruments import Instruments
from .outage import Outage
from .store import LimitStore

__all__ = ["LimiterState"]

log = structlog.get_logger(__name__)

_OF_ONE_KEY = frozenset(
    {"WRONGTYPE", "ERR"}
)  #: the state of this limit is invalid; the other limits work


class LimiterState:
    def __init__(
        self,
        store: LimitStore,
        *,
        clock: Clock,
        tasks: BackgroundTasks,
        instruments: Instruments,
        members: Callable[[], int],
    ) -> None:
        self.store = store
        self.clock = clock
        self.members = members  #: processes that share the limits
        self.outage = Outage(clock)
        self.hears = False  #: whether refund messages can arrive
        self.closed = False
        self._tasks = tasks
        self._counts = instruments.counts
        self._refusal = ""  #: last reported value

    def __repr__(self) -> str:
        return f"<LimiterState {self.outage!r}{'' if self.hears else ' deaf'}>"

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self.closed:
            raise Unavailable("the limiter is closed")
        self._tasks.start_soon(work)

    def answered(self) -> None:
        if self.outage.known:
            self.outage.over()
            log.info("limiter.server_back")

    def failed(self, why: Exception) -> None:
        if isinstance(why, ServerRefused) and why.code in _OF_ONE_KEY:
            self.answered()
            if str(why) != self._refusal:  # it comes with each ask of that subject
                log.error("limiter.state_refused", reason=str(why))
            self._refusal = str(why)
            return
        if not self.outage.known:
            log.warning("limiter.server_away", reason=str(why))
        self.outage.failed()

    def count(self, name: str, limit: str, *, by: int) -> None:
        self._counts[name, limit] += by

    def limit_reached(self, what: str) -> None:
        self._counts["limit_reached", what] += 1

    def decided(self, limit: str, source: str, allowed: int, refused: int) -> None:
        if allowed:
            self._counts["limiter_decisions", limit, source, "allowed"] += allowed
        if refused:
            self._counts["limiter_decisions", limit, source, "refused"] += refused
