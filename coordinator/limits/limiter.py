"""Rate limits that a cluster shares: the entry point of the package.

F1  Limits have names. A second ``define`` of a name takes effect at the next request and keeps the
    present state. It changes this process only: each node has its own configuration.
F2  ``of(a, b)`` always returns the same set, so all requests for a subject share scripts.
F3  A refund in any process arrives by pub/sub, and clears cached denials of the subject. While
    pub/sub is down, no denial is cached.
F4  Local tokens are returned when their time has passed, and when the limiter closes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import anyio
import structlog

from ...schemas.errors_limits import InvalidLimit
from ...schemas.keys import Names
from ...schemas.limits import Limit, check_limit
from ..background import BackgroundTasks
from ..clock import Clock
from ..instruments import Instruments
from ..valkey.link import Commands
from ..valkey.scripting import Scripts
from .limit_set import LimitSet
from .reservations import Reservations
from .shared_state import LimiterState
from .slots import Slots
from .store import LimitStore

__all__ = ["Limiter"]

log = structlog.get_logger(__name__)

_SWEEP_S = 0.1
_CLOSE_S = 1.0


class Limiter:
    def __init__(
        self,
        commands: Commands,
        names: Names,
        scripts: Scripts,
        *,
        clock: Clock,
        tasks: BackgroundTasks,
        instruments: Instruments,
        ids: Callable[[], str],
        budget_ms: int = 50,
        members: Callable[[], int] = lambda: 1,
        test_clock_us: Callable[[], int] | None = None,
    ) -> None:
        store = LimitStore(
            commands, names, scripts, budget_ms=budget_ms, test_clock_us=test_clock_us
        )
        self.check_loop = tasks.check_loop
        self.state = LimiterState(
            store, clock=clock, tasks=tasks, instruments=instruments, members=members
        )
        self.reservations = Reservations(self.state, ids=ids)
        self.slots = Slots(self.state, scripts, ids=ids)
        self._commands = commands
        self._channel = names.limits.encode()
        self._counts = instruments.counts
        self._declare = instruments.declare
        self._clock = clock
        self._limits: dict[str, Limit] = {}
        self._sets: dict[tuple[str, ...], LimitSet] = {}

    def __repr__(self) -> str:
        return f"<Limiter of {len(self._limits)} limits, {self.state.outage!r}>"

    def define(self, limits: Iterable[Limit]) -> list[str]:
        """Add or change limits, and return the names of the changed ones.

        Raises:
            InvalidLimit, InvalidKey: a limit is invalid; none was changed.
        """
        checked = {limit.name: limit for limit in map(check_limit, limits)}
        changed = [name for name, limit in checked.items() if self._limits.get(name) != limit]
        self._limits |= checked
        for name in checked:
            self._declare("limit", name)
        for names, found in self._sets.items():
            if not set(names).isdisjoint(changed):
                found.change([self._limits[name] for name in names])
        if changed:
            log.debug("limits.defined", limits=changed)
        return changed

    @property
    def limits(self) -> dict[str, Limit]:
        return dict(self._limits)

    def limit(self, name: str) -> Limit:
        """The limit of this name; raises InvalidLimit if there is none."""
        if name not in self._limits:
            known = ", ".join(sorted(self._limits)) or "none"
            raise InvalidLimit(name, "name", repr(name), "is no limit", f"known are: {known}")
        return self._limits[name]

    def of(self, *names: str) -> LimitSet:
        """The set of the limits of these names."""
        found = self._sets.get(names)
        if found is None:
            if not names or len(set(names)) != len(names):
                fix = "name each limit once"
                raise InvalidLimit("+".join(names), "names", repr(names)[:80], "are no set", fix)
            found = LimitSet(self.state, [self.limit(name) for name in names])
            self._sets[names] = found
        return found

    def heard(self, channel: bytes, payload: bytes) -> None:
        """Handle a pub/sub message."""
        if channel == self._channel:
            subject = payload.decode(errors="replace")
            for found in self._sets.values():
                found.forget(subject)

    def doorbell_changed(self, live: bool) -> None:
        self.state.hears = live
        # Also after a reconnect: a denial in flight may be older than a lost refund message.
        for found in self._sets.values():
            found.forget("")

    async def run(self) -> None:
        """Return local tokens whose time has passed, until cancelled."""
        while True:
            await anyio.sleep(_SWEEP_S)
            for found in self._sets.values():
                found.return_tokens(self._clock.monotonic())

    async def aclose(self) -> None:
        """Return all local tokens within one second; further requests raise Unavailable."""
        if self.state.closed:
            return
        with anyio.move_on_after(_CLOSE_S, shield=True):
            giving = [
                queue
                for found in self._sets.values()
                for queue in found.return_tokens(float("inf"))
            ]
            # A request behind the refunds is answered after them.
            for answer in [queue.join("p", 1, (1,)) for queue in giving]:
                await answer
        self.state.closed = True
        for found in self._sets.values():
            found.close()

    def gauges(self) -> Iterator[tuple[str, tuple[str, ...], float]]:
        """Gauges for a scrape; also transfers counters that are kept locally for speed."""
        denied = sum((found.denied_locally for found in self._sets.values()), Counter[str]())
        for name, count in denied.items():
            self._counts["limiter_decisions", name, "deny_cache", "refused"] = count
        for name in self._limits:
            found = self._sets.get((name,))
            if found is not None:
                self._counts["limiter_decisions", name, "lease", "allowed"] = found.leased
            yield "limiter_leased_tokens", (name,), float(found.outstanding if found else 0)
