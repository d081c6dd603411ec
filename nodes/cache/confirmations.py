"""Waiting until a write that was accepted has got further: to replicas, or into its sink.

P1  ``sink`` is reached when the checkpoint of the sink's lane has passed the job, and the job is
    no dead letter and is not held; an older job counts as stored when a newer one of its key was.
P2  Who waits for a sink is woken by the commit, and looks at least every quarter of a second.
P3  What cannot be known in time is Unconfirmed, also while Valkey does not answer.
P4  A server that may have lost the job (another history) confirms nothing: a checkpoint passes a
    job that is gone, too.
"""

from __future__ import annotations

import anyio
from msgspec.structs import replace

from ...coordinator.clock import Clock
from ...coordinator.log.replication import Replication
from ...coordinator.valkey.link import Commands
from ...schemas.errors import DeadLettered, ForebayError, Level, Unconfirmed
from ...schemas.keys import Names
from ...schemas.replies import field_map, order
from .shared import Receipt
from .waits import KeyWaits

__all__ = ["Confirmations"]

_POLL_MS = 250
_LETTERS_TOGETHER = 50


class Confirmations:
    def __init__(
        self,
        commands: Commands,
        names: Names,
        replication: Replication,
        checkpoints: KeyWaits,
        *,
        clock: Clock,
    ) -> None:
        self._commands = commands
        self._names = names
        self._replication = replication
        self._checkpoints = checkpoints
        self._clock = clock

    @property
    def since(self) -> int:
        """To be taken before the write."""
        return self._replication.since

    async def reached(
        self, key: str, receipt: Receipt, until: Level, *, since: int, sink: str, timeout_ms: int
    ) -> Receipt:
        """The receipt, once the write has got as far as ``until``.

        Raises:
            Unconfirmed: not in time. DeadLettered: it will never get into the sink.
        """
        match until:
            case "accepted":
                return receipt
            case "replicated":
                await self._replication.confirm(since=since, timeout_ms=timeout_ms)
            case "sink":
                await self._sunk(key, receipt, sink, timeout_ms, since)
        return replace(receipt, reached=until)

    async def _sunk(
        self, key: str, receipt: Receipt, sink: str, timeout_ms: int, since: int
    ) -> None:
        done, began = self._names.part(receipt.shard, "done"), self._clock.monotonic()
        while True:
            with self._checkpoints.watch(done) as moved:
                passed = await self._passed(key, receipt, done, sink)
                kept = self._replication.kept(since)
                if passed and kept:
                    return
                waited_ms = int((self._clock.monotonic() - began) * 1000)
                if waited_ms >= timeout_ms or not kept:
                    raise Unconfirmed("sink", "accepted", waited_ms)
                with anyio.move_on_after(min(_POLL_MS, timeout_ms - waited_ms) / 1000):
                    await moved.wait()

    async def _passed(self, key: str, receipt: Receipt, done: str, sink: str) -> bool:
        try:
            position = await self._commands.call("HGET", done, f"writes:{sink}")
            if position is None or order(position) < order(receipt.job_id):
                return False
            await self._refuse_buried(key, receipt)
            return not await self._is_held(receipt)
        except DeadLettered:
            raise
        except ForebayError:
            return False

    async def _is_held(self, receipt: Receipt) -> bool:
        """Whether it waits for a member that can store it; it is held after it was accepted."""
        held, job_id = self._names.part(receipt.shard, "held"), receipt.job_id
        start = job_id.partition("-")[0]
        while page := await self._commands.call(
            "XRANGE", held, start, "+", "COUNT", _LETTERS_TOGETHER
        ):
            if any(field_map(fields).get(b"f") == job_id.encode() for _, fields in page):
                return True
            start = f"({bytes(page[-1][0]).decode()}"
        return False

    async def _refuse_buried(self, key: str, receipt: Receipt) -> None:
        """Letters are buried before the checkpoint passes, and after the job was accepted."""
        dead, job_id = self._names.part(receipt.shard, "dead"), receipt.job_id
        start = job_id.partition("-")[0]
        while letters := await self._commands.call(
            "XRANGE", dead, start, "+", "COUNT", _LETTERS_TOGETHER
        ):
            for _, fields in letters:
                letter = field_map(fields)
                if letter.get(b"from") == job_id.encode():
                    reason, problem = (letter.get(n, b"") for n in (b"reason", b"problem"))
                    raise DeadLettered(
                        key,
                        job_id,
                        reason.decode(errors="replace"),
                        problem.decode(errors="replace"),
                    )
            start = f"({bytes(letters[-1][0]).decode()}"
