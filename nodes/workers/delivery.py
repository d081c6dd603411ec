"""Getting a batch into a sink, whatever the sink says.

V1  A transient failure is tried again for ever, with full jitter, as long as the work is ours:
    ``ours`` is asked before every try, and while waiting for it.
V2  A batch that is poison is halved down to the writes at fault, and the others are stored
    before anything else. A write at fault is tried ``attempts_max`` times, then handed back.
V3  Progress is stored only with, or after, the last write it covers. Parts of a halved batch
    carry the epochs without a position, so that the sink can refuse those of a late owner.
V4  A fatal failure stops the sink loudly; it is tried again every ten seconds. A sink that
    raises what no sink should, or cancels itself, has failed fatally.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence

import anyio
import structlog
from msgspec import Struct

from ...coordinator.clock import Clock
from ...coordinator.instruments import Instruments
from ...schemas.errors import FatalSinkError, Fenced, PoisonSinkError, TransientSinkError
from ..sinks.base import Progress, Sink, SinkBatch, Write
from ..strays import asked_to_stop

__all__ = ["Delivery", "Refused"]

log = structlog.get_logger(__name__)

_FIRST_DELAY_S = 0.05
_DOUBLINGS_MAX = 10
_DELAY_S_MAX = 5.0
_STOPPED_S = 10.0
_LOOK_S = 0.25
_CLOSE_S = 10.0

Ours = Callable[[], bool]


class Refused(Struct, frozen=True):
    """A write that the sink will never take."""

    write: Write[object]
    problem: str


class Delivery:
    """Deliveries to one sink, one at a time."""

    def __init__(
        self,
        sink: Sink,
        *,
        namespace: str = "",
        attempts_max: int,
        clock: Clock,
        rng: random.Random,
        instruments: Instruments,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        self.sink = sink
        self.stopped = ""  #: why, while the failure is fatal
        self._namespace = namespace
        self._attempts_max = attempts_max
        self._clock = clock
        self._rng = rng
        self._instruments = instruments
        self._sleep = sleep
        self._opened = False

    def __repr__(self) -> str:
        return f"<Delivery to {self.sink.name} {self.stopped or 'ok'}>"

    async def deliver(self, batch: SinkBatch, *, ours: Ours) -> list[Refused]:
        """Store the batch; returns the writes that the sink refused for good.

        Raises:
            Fenced: the work is not ours any more; what was stored stays.
        """
        try:
            await self._store(batch, ours)
            return []
        except PoisonSinkError as error:
            fence = [Progress(shard=p.shard, epoch=p.epoch, position="0-0") for p in batch.progress]
            suspects = await self._halve(batch.writes, fence, error, ours)
        refused = await self._insist(suspects, fence, ours)
        if batch.progress:
            await self._store(SinkBatch(writes=(), progress=batch.progress), ours)
        return refused

    async def aclose(self) -> None:
        if not self._opened:
            return
        try:
            with anyio.move_on_after(_CLOSE_S, shield=True):
                await self.sink.aclose()
        except Exception as error:  # the sink's own; there is nobody who could do more
            log.warning("sink.not_closed", sink=self.sink.name, error=repr(error))

    async def _halve(
        self,
        writes: Sequence[Write[object]],
        fence: Sequence[Progress],
        error: PoisonSinkError,
        ours: Ours,
    ) -> list[Refused]:
        """Store what can be stored of a poisoned batch; returns what is at fault."""
        if len(writes) == 1:
            return [Refused(writes[0], str(error))]
        suspects: list[Refused] = []
        for half in (writes[: len(writes) // 2], writes[len(writes) // 2 :]):
            try:
                await self._store(SinkBatch(writes=half, progress=fence), ours)
            except PoisonSinkError as still:
                suspects += await self._halve(half, fence, still, ours)
        return suspects

    async def _insist(
        self, suspects: Sequence[Refused], fence: Sequence[Progress], ours: Ours
    ) -> list[Refused]:
        """Try those at fault again, together, so that many cost no more waiting than one."""
        for attempt in range(1, self._attempts_max):
            if not suspects:
                break
            await self._pause(self._delay_s(attempt), ours)
            still = []
            for each in suspects:
                try:
                    await self._store(SinkBatch(writes=(each.write,), progress=fence), ours)
                except PoisonSinkError as again:
                    still.append(Refused(each.write, str(again)))
            suspects = still
        return list(suspects)

    async def _store(self, batch: SinkBatch, ours: Ours) -> None:
        attempt = 0
        while ours():
            try:
                await self._try(batch)
            except TransientSinkError as error:
                attempt += 1
                say = log.warning if attempt == 1 else log.debug
                say("sink.paused", sink=self.sink.name, attempt=attempt, error=str(error))
                await self._pause(self._delay_s(attempt), ours)
            except FatalSinkError as error:
                say = log.debug if str(error) == self.stopped else log.error
                self.stopped = str(error)
                say("sink.stopped", sink=self.sink.name, error=str(error))
                await self._pause(_STOPPED_S, ours)
            else:
                if attempt or self.stopped:
                    log.info("sink.resumed", sink=self.sink.name)
                self.stopped = ""
                return
        raise Fenced(self.sink.name, 0, 0)

    async def _try(self, batch: SinkBatch) -> None:
        """Raises TransientSinkError, FatalSinkError, Fenced; PoisonSinkError of a write."""
        try:
            if not self._opened:
                await self.sink.open(self._namespace)
                self._opened = True
            await self._write(batch)
        except (TransientSinkError, FatalSinkError, Fenced):
            raise
        except PoisonSinkError as error:
            if batch.writes:
                raise
            raise FatalSinkError(f"poison without a write: {error}") from error
        except BaseException as error:
            if asked_to_stop(error):
                raise
            raise FatalSinkError(f"the sink raised {type(error).__name__}: {error}") from error

    async def _write(self, batch: SinkBatch) -> None:
        started, result = self._clock.monotonic(), "error"
        try:
            await self.sink.write(batch)
            result = "stored"
        finally:
            took_s, name = self._clock.monotonic() - started, self.sink.name
            self._instruments.observe("writebehind_flush_seconds", took_s, name, result)
            self._instruments.counts["writebehind_rows", name, result] += len(batch.writes)

    async def _pause(self, seconds: float, ours: Ours) -> None:
        until = self._clock.monotonic() + seconds
        while ours() and (left := until - self._clock.monotonic()) > 0:
            await self._sleep(min(left, _LOOK_S))

    def _delay_s(self, attempt: int) -> float:
        longest = _FIRST_DELAY_S * 2 ** min(attempt, _DOUBLINGS_MAX)
        return self._rng.uniform(0, min(_DELAY_S_MAX, longest))
