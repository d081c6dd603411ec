"""Getting a batch into a sink, whatever the sink says.

V1  A transient failure is tried again for ever, with full jitter, as long as the work is ours:
    ``ours`` is asked before every try, and while waiting for it.
V2  A batch that is poison is halved down to the writes at fault, and the others are stored
    before anything else. A write at fault is tried ``attempts_max`` times, then handed back.
    A locked row is found in the same way, if the batch is ``alone``, that is of one shard; its
    write is tried until it is stored, and never handed back. A batch of several shards is given
    back with ``BusySinkError``, so that only the shard at fault waits.
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
from ...coordinator.log_once import LogOnce
from ...schemas.errors import (
    BusySinkError,
    FatalSinkError,
    Fenced,
    PoisonSinkError,
    SinkError,
    TransientSinkError,
)
from ..cancellation import asked_to_stop
from ..sinks.base import Progress, Sink, SinkBatch, Write

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


class _Suspect(Struct, frozen=True):
    """A write that failed by itself."""

    write: Write[object]
    error: SinkError
    attempts: int  #: in which it was poison

    @property
    def key(self) -> str:
        return self.write.key


class Outage(Struct, frozen=True):
    """A sink that takes no writes now, or a row that is locked now."""

    since: float  #: of the monotonic clock
    attempt: int
    error: str
    table: str = ""


class Delivery:
    """Deliveries to one sink: one at a time of several shards, and one for each shard alone."""

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
        beside: Callable[[SinkBatch], Awaitable[None]] | None = None,
    ) -> None:
        """``beside`` takes a batch of one shard that must not hold up the others."""
        self.sink = sink
        self.stopped = ""  #: why, while the failure is fatal
        self.paused: Outage | None = None  #: while no try succeeds; transient or fatal
        self.locked: dict[str, Outage] = {}  #: by key, the writes that wait for a locked row
        self._beside = beside or sink.write
        self._namespace = namespace
        self._attempts_max = attempts_max
        self._clock = clock
        self._rng = rng
        self._instruments = instruments
        self._sleep = sleep
        self._opened = False
        self._down_since = 0.0  # also while the work has gone to others
        self._failing = LogOnce(clock)
        self._locks = LogOnce(clock)
        instruments.declare("sink", sink.name)

    def __repr__(self) -> str:
        return f"<Delivery to {self.sink.name} {self.stopped or 'ok'}>"

    async def deliver(self, batch: SinkBatch, *, ours: Ours, alone: bool = False) -> list[Refused]:
        """Store the batch; returns the writes that the sink refused for good.

        Raises:
            Fenced: the work is not ours any more; what was stored stays.
            BusySinkError: a row is locked, and the batch is not ``alone``; a part may be stored.
        """
        try:
            await self._store(batch, ours, alone)
            return []
        except (PoisonSinkError, BusySinkError) as error:
            if isinstance(error, BusySinkError) and not alone:
                raise
            fence = [Progress(shard=p.shard, epoch=p.epoch, position="0-0") for p in batch.progress]
            refused = await self._one_by_one(batch.writes, fence, error, ours, alone)
        if batch.progress:
            await self._store(SinkBatch(writes=(), progress=batch.progress), ours, alone)
        return refused

    async def aclose(self) -> None:
        if not self._opened:
            return
        try:
            with anyio.move_on_after(_CLOSE_S, shield=True):
                await self.sink.aclose()
        except Exception as error:  # the sink's own; there is nobody who could do more
            log.warning("sink.not_closed", sink=self.sink.name, error=repr(error))

    async def _one_by_one(
        self,
        writes: Sequence[Write[object]],
        fence: Sequence[Progress],
        error: SinkError,
        ours: Ours,
        alone: bool,
    ) -> list[Refused]:
        try:
            suspects = await self._halve(writes, fence, error, ours, alone)
            return await self._insist(suspects, fence, ours, alone)
        finally:
            for write in writes:
                self.locked.pop(write.key, None)

    async def _halve(
        self,
        writes: Sequence[Write[object]],
        fence: Sequence[Progress],
        error: SinkError,
        ours: Ours,
        alone: bool,
    ) -> list[_Suspect]:
        """Store the good writes of a batch that failed; returns the suspects."""
        if len(writes) == 1:
            self._look_at(writes[0], error, fence)
            return [_Suspect(writes[0], error, int(isinstance(error, PoisonSinkError)))]
        suspects: list[_Suspect] = []
        for half in (writes[: len(writes) // 2], writes[len(writes) // 2 :]):
            try:
                await self._store(SinkBatch(writes=half, progress=fence), ours, alone)
            except (PoisonSinkError, BusySinkError) as still:
                if isinstance(still, BusySinkError) and not alone:
                    raise
                suspects += await self._halve(half, fence, still, ours, alone)
        return suspects

    async def _insist(
        self, suspects: Sequence[_Suspect], fence: Sequence[Progress], ours: Ours, alone: bool
    ) -> list[Refused]:
        """Try those at fault again, together, so that many cost no more waiting than one."""
        refused: list[Refused] = []
        attempt = 0
        while suspects:
            spent = [each for each in suspects if each.attempts >= self._attempts_max]
            refused += [Refused(each.write, str(each.error)) for each in spent]
            suspects = [each for each in suspects if each.attempts < self._attempts_max]
            if suspects:
                attempt += 1
                await self._pause(self._delay_s(attempt), ours)
            tried = [await self._again(each, fence, ours, alone) for each in suspects]
            suspects = [each for each in tried if each is not None]
        return refused

    async def _again(
        self, suspect: _Suspect, fence: Sequence[Progress], ours: Ours, alone: bool
    ) -> _Suspect | None:
        """Try one write by itself; None if it is stored."""
        write, attempts = suspect.write, suspect.attempts
        try:
            await self._store(SinkBatch(writes=(write,), progress=fence), ours, alone)
        except PoisonSinkError as error:
            self.locked.pop(write.key, None)
            return _Suspect(write, error, attempts + 1)
        except BusySinkError as error:
            if not alone:
                raise
            self._look_at(write, error, fence)
            return _Suspect(write, error, attempts)
        if self.locked.pop(write.key, None) is not None and not self.locked:
            self._locks.over()
            log.info("sink.row_unlocked", sink=self.sink.name, key=write.key)
        return None

    def _look_at(self, write: Write[object], error: SinkError, fence: Sequence[Progress]) -> None:
        """Remember and log which row is locked."""
        if not isinstance(error, BusySinkError):
            return
        before, now = self.locked.get(write.key), self._clock.monotonic()
        since, attempt = (before.since, before.attempt + 1) if before else (now, 1)
        self.locked[write.key] = Outage(since, attempt, str(error), error.table)
        self._locks.say(
            log,
            "sink.row_locked",
            error,
            sink=self.sink.name,
            table=error.table,
            key=write.key,
            shard=fence[0].shard if fence else None,
            waiting_s=round(now - since, 1),
            rows=len(self.locked),
        )

    async def _store(self, batch: SinkBatch, ours: Ours, alone: bool) -> None:
        attempt, since = 0, self._clock.monotonic()
        while ours():
            try:
                await self._try(batch, alone)
            except BusySinkError as error:
                if batch.writes:
                    raise
                attempt += 1  # its progress row is locked
                await self._wait_out(error, attempt, since, ours)
            except (TransientSinkError, FatalSinkError) as error:
                attempt += 1
                await self._wait_out(error, attempt, since, ours)
            else:
                self._works()
                return
        self.paused = None
        raise Fenced(self.sink.name, 0, 0)

    async def _wait_out(self, error: SinkError, attempt: int, since: float, ours: Ours) -> None:
        """Pause the sink, or stop it for ten seconds."""
        name, fatal = self.sink.name, isinstance(error, FatalSinkError)
        self._down_since = since = self._down_since or since
        self.paused = Outage(since, attempt, str(error))
        self.stopped = str(error) if fatal else ""
        event, level = ("sink.stopped", "error") if fatal else ("sink.paused", "warning")
        self._failing.say(log, event, error, level=level, sink=name, attempt=attempt)
        await self._pause(_STOPPED_S if fatal else self._delay_s(attempt), ours)

    def _works(self) -> None:
        if self._down_since:
            after_s = round(self._clock.monotonic() - self._down_since, 1)
            log.info("sink.resumed", sink=self.sink.name, after_s=after_s)
        self.paused, self.stopped, self._down_since = None, "", 0.0
        self._failing.over()

    async def _try(self, batch: SinkBatch, alone: bool) -> None:
        """Raises TransientSinkError, FatalSinkError, Fenced; PoisonSinkError of a write."""
        try:
            if not self._opened:
                await self.sink.open(self._namespace)
                self._opened = True
            await self._write(batch, alone)
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

    async def _write(self, batch: SinkBatch, alone: bool) -> None:
        started, result = self._clock.monotonic(), "error"
        try:
            await (self._beside if alone else self.sink.write)(batch)
            result = "stored"
        finally:
            took_s, name = self._clock.monotonic() - started, self.sink.name
            self._instruments.observe("writebehind_flush_seconds", took_s, name)
            self._instruments.counts["writebehind_rows", name, result] += len(batch.writes)

    async def _pause(self, seconds: float, ours: Ours) -> None:
        until = self._clock.monotonic() + seconds
        while ours() and (left := until - self._clock.monotonic()) > 0:
            await self._sleep(min(left, _LOOK_S))

    def _delay_s(self, attempt: int) -> float:
        longest = _FIRST_DELAY_S * 2 ** min(attempt, _DOUBLINGS_MAX)
        return self._rng.uniform(0, min(_DELAY_S_MAX, longest))
