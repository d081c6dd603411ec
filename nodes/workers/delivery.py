"""Getting a batch into a sink, whatever the sink says.

V1  A transient failure is tried again for ever, with full jitter, as long as the work is ours:
    ``ours`` is asked before every try.
V2  A batch that is poison is halved down to the writes at fault; the others are stored
    meanwhile. A write at fault is tried ``attempts_max`` times, then handed back.
V3  Progress is stored only with, or after, the last write it covers.
V4  A fatal failure stops the sink loudly; it is tried again every ten seconds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import anyio
import structlog
from msgspec import Struct

from ...coordinator.clock import Clock
from ...coordinator.instruments import Instruments
from ...schemas.errors import FatalSinkError, Fenced, PoisonSinkError, TransientSinkError
from ..sinks.base import Sink, SinkBatch, Write

__all__ = ["Delivery", "Refused"]

log = structlog.get_logger(__name__)

_FIRST_DELAY_S = 0.05
_DELAY_S_MAX = 5.0
_STOPPED_S = 10.0


class Refused(Struct, frozen=True):
    """A write that the sink will never take."""

    write: Write[object]
    problem: str


class Delivery:
    """Deliveries to one sink."""

    def __init__(
        self,
        sink: Sink,
        *,
        attempts_max: int,
        clock: Clock,
        rng: random.Random,
        instruments: Instruments,
    ) -> None:
        self.sink = sink
        self.stopped = ""  #: why, while the failure is fatal
        self._attempts_max = attempts_max
        self._clock = clock
        self._rng = rng
        self._instruments = instruments
        self._opened = False

    async def deliver(self, batch: SinkBatch, *, ours: Callable[[], bool]) -> list[Refused]:
        """Store the batch; returns the writes that the sink refused for good.

        Raises:
            Fenced: the work is not ours any more; what was stored stays.
        """
        try:
            await self._store(batch, ours)
            return []
        except PoisonSinkError as error:
            refused = await self._halve(batch.writes, error, ours)
        if batch.progress:
            await self._store(SinkBatch(writes=(), progress=batch.progress), ours)
        return refused

    async def aclose(self) -> None:
        if self._opened:
            await self.sink.aclose()

    async def progress(self, shards: Sequence[int]) -> dict[int, str]:
        """Where the sink knows the shards to be; {} while it cannot be asked."""
        try:
            await self._open()
            return dict(await self.sink.progress(shards))
        except (TransientSinkError, FatalSinkError) as error:
            log.warning("sink.unreachable", sink=self.sink.name, error=str(error))
            return {}

    async def _open(self) -> None:
        if not self._opened:
            await self.sink.open()
            self._opened = True

    async def _halve(
        self,
        writes: Sequence[Write[object]],
        error: PoisonSinkError,
        ours: Callable[[], bool],
    ) -> list[Refused]:
        if len(writes) == 1:
            return await self._insist(writes[0], error, ours)
        refused: list[Refused] = []
        for half in (writes[: len(writes) // 2], writes[len(writes) // 2 :]):
            try:
                await self._store(SinkBatch(writes=half), ours)
            except PoisonSinkError as still:
                refused += await self._halve(half, still, ours)
        return refused

    async def _insist(
        self, write: Write[object], error: PoisonSinkError, ours: Callable[[], bool]
    ) -> list[Refused]:
        for attempt in range(1, self._attempts_max):
            await anyio.sleep(self._delay_s(attempt))
            try:
                await self._store(SinkBatch(writes=(write,)), ours)
                return []
            except PoisonSinkError as again:
                error = again
        return [Refused(write, str(error))]

    async def _store(self, batch: SinkBatch, ours: Callable[[], bool]) -> None:
        attempt = 0
        while True:
            if not ours():
                raise Fenced(self.sink.name, 0, 0)
            try:
                await self._open()
                await self._write(batch)
                self.stopped = ""
                return
            except TransientSinkError as error:
                attempt += 1
                log.warning("sink.paused", sink=self.sink.name, attempt=attempt, error=str(error))
                await anyio.sleep(self._delay_s(attempt))
            except FatalSinkError as error:
                self.stopped = str(error)
                log.error("sink.stopped", sink=self.sink.name, error=str(error))
                await anyio.sleep(_STOPPED_S)

    async def _write(self, batch: SinkBatch) -> None:
        started, result = self._clock.monotonic(), "error"
        try:
            await self.sink.write(batch)
            result = "stored"
        finally:
            took_s, name = self._clock.monotonic() - started, self.sink.name
            self._instruments.observe("writebehind_flush_seconds", took_s, name, result)
            self._instruments.counts["writebehind_rows", name, result] += len(batch.writes)

    def _delay_s(self, attempt: int) -> float:
        return self._rng.uniform(0, min(_DELAY_S_MAX, _FIRST_DELAY_S * 2**attempt))
