"""Rate limits that a cluster shares: the face of the package.

F1  Limits have names. Whatever is said of one later (``define`` again) holds from the next
    ask on, keeps the state there is, and is told to nobody else: each node is told by its
    own configuration.
F2  ``of(a, b)`` is one set, however often it is asked for: all its asks of one subject share
    scripts.
F3  A refund anywhere is heard here by pub/sub, and denials of that subject are forgotten. While
    pub/sub is down, nothing is remembered.
F4  Tokens held are given back when their time is over, and when the limiter closes.
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
        ledger = LimitStore(
            commands, names, scripts, budget_ms=budget_ms, test_clock_us=test_clock_us
        )
        self.check_loop = tasks.check_loop
        self.desk = LimiterState(
            ledger, clock=clock, tasks=tasks, instruments=instruments, members=members
        )
        self.reservations = Reservations(self.desk, ids=ids)
        self.slots = Slots(self.desk, scripts, ids=ids)
        self._commands = commands
        self._channel = names.limits.encode()
        self._counts = instruments.counts
        self._declare = instruments.declare
        self._clock = clock
        self._limits: dict[str, Limit] = {}
        self._sets: dict[tuple[str, ...], LimitSet] = {}

    def __repr__(self) -> str:
        return f"<Limiter of {len(self._limits)} limits, {self.desk.outage!r}>"

    def define(self, limits: Iterable[Limit]) -> list[str]:
        """Add limits, or change them; the names of those that are other than before.

        Raises:
            InvalidLimit, InvalidKey: one cannot work; none was changed.
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
        """Raises InvalidLimit if there is none of the name."""
        if name not in self._limits:
            known = ", ".join(sorted(self._limits)) or "none"
            raise InvalidLimit(name, "name", repr(name), "is no limit", f"known are: {known}")
        return self._limits[name]

    def of(self, *names: str) -> LimitSet:
        """The limits of these names, as one."""
        found = self._sets.get(names)
        if found is None:
            if not names or len(set(names)) != len(names):
                fix = "name each limit once"
                raise InvalidLimit("+".join(names), "names", repr(names)[:80], "are no set", fix)
            found = LimitSet(self.desk, [self.limit(name) for name in names])
            self._sets[names] = found
        return found

    def heard(self, channel: bytes, payload: bytes) -> None:
        """A message of pub/sub."""
        if channel == self._channel:
            subject = payload.decode(errors="replace")
            for found in self._sets.values():
                found.forget(subject)

    def doorbell_changed(self, live: bool) -> None:
        self.desk.hears = live
        # Also when it is back: a refusal that is under way may be older than a refund unheard.
        for found in self._sets.values():
            found.forget("")

    async def run(self) -> None:
        """Give back tokens whose time is over, for as long as it runs."""
        while True:
            await anyio.sleep(_SWEEP_S)
            for found in self._sets.values():
                found.return_tokens(self._clock.monotonic())

    async def aclose(self) -> None:
        """Give back all tokens, in at most a second; whoever still asks gets Unavailable."""
        if self.desk.closed:
            return
        with anyio.move_on_after(_CLOSE_S, shield=True):
            giving = [
                lane for found in self._sets.values() for lane in found.return_tokens(float("inf"))
            ]
            # What is asked behind the refunds is answered after them.
            for answer in [lane.join("p", 1, (1,)) for lane in giving]:
                await answer
        self.desk.closed = True
        for found in self._sets.values():
            found.close()

    def gauges(self) -> Iterator[tuple[str, tuple[str, ...], float]]:
        """For a scrape; brings up to date what is counted where counting has to be fast."""
        denied = sum((found.denied_locally for found in self._sets.values()), Counter[str]())
        for name, count in denied.items():
            self._counts["limiter_decisions", name, "deny_cache", "refused"] = count
        for name in self._limits:
            found = self._sets.get((name,))
            if found is not None:
                self._counts["limiter_decisions", name, "lease", "allowed"] = found.leased
            yield "limiter_leased_tokens", (name,), float(found.outstanding if found else 0)
