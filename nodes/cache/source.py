"""The source behind one cache: when it is asked, and when it is left alone.

A circuit breaker, shared by the nodes of a cluster:

O1  After ``failures`` failed loads in a row, of which no two neighbours were of the same key,
    or of one call of a batch loader, the source counts as failing; every node is told, and
    asks it nothing for a while.
O2  While it fails, one load in the whole cluster is let through in each recovery time.
O3  When that one succeeds, every node is told, and loads go on.
O4  What says nothing of the source (``harmless`` errors, cancellation) changes nothing; nor
    does a load that began before the source counted as failing, whatever comes of it.

Words between nodes only make it fast: a node that missed one finds out by a probe of its own.
Without Valkey each node probes for itself; so it does while the key that is shared was set by
others: it does not expire.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

import anyio
import structlog

from ...coordinator.background import BackgroundTasks
from ...coordinator.log_once import LogOnce
from ...coordinator.valkey.breaker import Breaker
from ...coordinator.valkey.link import Commands
from ...schemas.errors import BreakerOpen, ForebayError, SourceFailing, Unavailable
from ...schemas.keys import Names
from ...schemas.settings import CacheDefaults
from .core import Core
from .declaration import Declaration
from .failures import CallFailed

__all__ = ["Source", "source_of"]

log = structlog.get_logger(__name__)

T = TypeVar("T")
_NEVER = -1


class Source:
    def __init__(
        self,
        cache: str,
        breaker: Breaker,
        commands: Commands,
        names: Names,
        tasks: BackgroundTasks,
        *,
        node_id: str,
        recovery_ms: int,
        harmless: tuple[type[Exception], ...] = (),
    ) -> None:
        self.cache = cache
        self.breaker = breaker
        self._commands = commands
        self._names = names
        self._tasks = tasks
        self._node_id = node_id
        self._recovery_ms = recovery_ms
        self._harmless = harmless
        self._failed_key = ""
        self._failed_call: BaseException | None = None
        self._foreign = LogOnce()

    def __repr__(self) -> str:
        return f"<Source of {self.cache} {self.breaker.state}>"

    def refuse(self, key: str) -> None:
        """Raises SourceFailing if it would not be asked now; costs and promises nothing."""
        if self.breaker.state == "open":
            raise SourceFailing(self.cache, key, self.breaker.retry_after_ms)

    async def ask(self, key: str, load: Callable[[], Awaitable[T]]) -> T:
        """What ``load`` returns.

        Raises:
            SourceFailing: it was not asked. Whatever ``load`` raised.
        """
        if await self._admitted(key):
            return await self._probe(key, load)
        try:
            value = await load()
        except Exception as error:
            self._failed(key, error)
            raise
        self._failed_key, self._failed_call = "", None
        if self.breaker.closed:
            self.breaker.succeeded()
        return value

    def heard(self, *, failing: bool) -> None:
        """Another node told how the source is."""
        if not failing:
            self._failed_key, self._failed_call = "", None
            self.breaker.reset()
        elif self.breaker.closed:
            self.breaker.trip()

    async def _admitted(self, key: str) -> bool:
        """True for the probe."""
        try:
            if not self.breaker.check():
                return False
        except BreakerOpen as error:
            raise SourceFailing(self.cache, key, error.retry_after_ms) from None
        try:
            ours = await self._may_probe()
        except BaseException:
            self.breaker.abandoned()
            raise
        if ours or self.breaker.closed:  # another node found out meanwhile
            return ours
        self.breaker.failed()  # another node finds out
        raise SourceFailing(self.cache, key, self.breaker.retry_after_ms)

    async def _probe(self, key: str, load: Callable[[], Awaitable[T]]) -> T:
        try:
            value = await load()
        except Exception as error:
            if isinstance(error, self._harmless):
                self._recovered()
            else:
                self.breaker.failed()
            raise
        except BaseException:
            self.breaker.abandoned()
            raise
        self._recovered()
        return value

    async def _may_probe(self) -> bool:
        """Whether this node is the one of the cluster that tries it again."""
        name = self._names.failing(self.cache)
        take = ("SET", name, self._node_id, "NX", "PX", self._recovery_ms)
        try:
            if await self._commands.call(*take) is not None:
                return True
            if await self._commands.call("PTTL", name) != _NEVER:
                return False
        except ForebayError:
            return True
        self._foreign.say(log, "source.not_shared", ForebayError("it does not expire"), key=name)
        return True

    def _failed(self, key: str, error: Exception) -> None:
        before = self.breaker.closed
        if not before or isinstance(error, self._harmless) or key == self._failed_key:
            return
        if isinstance(error.__cause__, CallFailed) and error.__cause__ is self._failed_call:
            return
        self._failed_key, self._failed_call = key, error.__cause__
        self.breaker.failed()
        if not self.breaker.closed:
            log.warning("source.failing", cache=self.cache, error=f"{type(error).__name__}")
            self._tell("f")

    def _recovered(self) -> None:
        self.breaker.succeeded()
        self._failed_key, self._failed_call = "", None
        log.info("source.recovered", cache=self.cache)
        self._tell("o")

    def _tell(self, word: str) -> None:
        with suppress(Unavailable):  # the node is stopped: the others find out by themselves
            self._tasks.start_soon(self._publish, word)

    async def _publish(self, word: str) -> None:
        with anyio.move_on_after(1), suppress(ForebayError):
            await self._commands.call("PUBLISH", self._names.work, f"{word} {self.cache}")


def source_of(core: Core, cache: str, declared: Declaration, defaults: CacheDefaults) -> Source:
    """The source of a cache that was declared so."""
    recovery_ms = defaults.breaker_recovery_ms
    breaker = Breaker(
        f"loader {cache}",
        failures=defaults.breaker_failures,
        recovery_ms=recovery_ms,
        clock=core.clock,
    )
    return Source(
        cache,
        breaker,
        core.commands,
        core.shared.names,
        core.tasks,
        node_id=core.node_id,
        recovery_ms=recovery_ms,
        harmless=declared.harmless,
    )
