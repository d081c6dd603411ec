"""The cluster's own figures: one node gives them, the leader, which holds an ordinary lock.

C1  Nothing depends on a leader: without one, these gauges are missing, and nothing else.
C2  A node that is not the leader, or is not any more, gives none of them.
C3  A round asks for a bounded number of figures; one that fails is told once, and tried again.
    A stream that the server refuses, being a key of another type, is named and left out.

The lock is called ``forebay.leader``, and can be looked at and released like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import anyio
import structlog
from anyio.abc import TaskStatus
from msgspec import Struct

from ...coordinator.clock import ServerClock
from ...coordinator.locks.handles import LockHandle
from ...coordinator.log_once import LogOnce
from ...coordinator.valkey.link import Arg, Commands, Reply
from ...coordinator.valkey.scripting import ask_many
from ...schemas.errors import CoordinationError, ForebayError, ServerRefused
from ...schemas.keys import EVENTS, Names

__all__ = ["LEADER", "LeaderMetrics", "Lockable"]

log = structlog.get_logger(__name__)

LEADER = "forebay.leader"
_ROUND_S = 5.0
_LEASE_S = 6.0
_OVERGROWN = 4  #: times ``log_retain``; the owner of a shard trims it long before


class Lockable(Protocol):
    def lock(self, name: str, *, lease: float) -> LockHandle: ...


class Figures(Struct, frozen=True, kw_only=True):
    """Of one kind of stream, over all shards."""

    entries: int
    oldest_age_s: float


class LeaderMetrics:
    def __init__(
        self,
        commands: Commands,
        names: Names,
        locks: Lockable,
        server_clock: ServerClock,
        *,
        log_retain: int,
        round_s: float = _ROUND_S,
    ) -> None:
        self._commands = commands
        self._names = names
        self._locks = locks
        self._server_clock = server_clock
        self._overgrown = _OVERGROWN * log_retain
        self._round_s = round_s
        self._streams: dict[str, Figures] = {}
        self._dead: int | None = None
        self._failing, self._overgrowing, self._leading = LogOnce(), LogOnce(), LogOnce()
        self._refused: list[ServerRefused] = []  # in this round

    def __repr__(self) -> str:
        return f"<LeaderMetrics, {'leading' if self.leading else 'not leading'}>"

    @property
    def leading(self) -> bool:
        return self._dead is not None

    def gauges(self) -> Iterator[tuple[str, tuple[str, ...], float]]:
        """What the last round found; nothing from a node that does not lead."""
        for kind, found in self._streams.items():
            yield "stream_lag_events", (kind,), float(found.entries)
            yield "stream_oldest_undelivered_age_seconds", (kind,), found.oldest_age_s
        if self._dead is not None:
            yield "dead_letter_entries", (), float(self._dead)

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Lead whenever nobody else does, until cancelled."""
        task_status.started()
        while True:
            try:
                async with self._locks.lock(LEADER, lease=_LEASE_S):
                    await self._lead()
            except CoordinationError as error:
                self._leading.say(log, "leader.lost", error, level="info")
            except ForebayError as error:
                self._tell(error)
            finally:
                self._streams, self._dead = {}, None
            await anyio.sleep(self._round_s)

    async def _lead(self) -> None:
        while True:
            try:
                await self.round()
            except CoordinationError:
                raise
            except ForebayError as error:
                self._tell(error)
            else:
                if not self._refused:
                    self._failing.over()
            await anyio.sleep(self._round_s)

    async def round(self) -> None:
        """Ask for all figures once.

        Raises:
            Unavailable: what was found before stays.
        """
        self._refused = []
        names, shards = self._names, range(self._names.shards)
        streams = {
            "events": [names.events],
            "writes": [names.part(shard, "writes") for shard in shards],
            "refreshes": [names.part(shard, "refreshes") for shard in shards],
        }
        found = {kind: await self._figures(each) for kind, each in streams.items()}
        found["events"] = await self._less_done(found["events"])
        dead = [names.part(shard, "dead") for shard in (EVENTS, *shards)]
        self._dead, self._streams = sum(await self._lengths(dead)), found
        logs = await self._lengths([names.part(shard, "log") for shard in shards])
        self._tell_of_overgrown(logs)
        if self._refused:
            self._failing.say(
                log, "leader_metrics.refused", self._refused[0], keys=len(self._refused)
            )

    def _tell_of_overgrown(self, lengths: Sequence[int]) -> None:
        grown = {shard: n for shard, n in enumerate(lengths) if n > self._overgrown}
        if not grown:
            return self._overgrowing.over()
        error = ForebayError(f"{len(grown)} shards have logs of over {self._overgrown} entries")
        shard, entries = max(grown.items(), key=lambda each: each[1])
        self._overgrowing.say(log, "log.overgrown", error, shard=shard, entries=entries)
        return None

    async def _figures(self, streams: Sequence[str]) -> Figures:
        lengths = await self._lengths(streams)
        firsts = await self._asked([("XRANGE", name, "-", "+", "COUNT", 1) for name in streams])
        now_ms = self._server_clock.now_ms()
        began_ms = [_ms(reply[0][0]) for reply in firsts if reply]
        age_ms = max(0, now_ms - min(began_ms)) if began_ms else 0
        return Figures(entries=sum(lengths), oldest_age_s=age_ms / 1000)

    async def _less_done(self, events: Figures) -> Figures:
        """The last entry done stays in the ingress stream; it does not wait."""
        done, last = await self._asked(
            [
                ("HGET", self._names.part(EVENTS, "done"), "events"),
                ("XREVRANGE", self._names.events, "+", "-", "COUNT", 1),
            ]
        )
        if last and done is not None and bytes(last[0][0]) == bytes(done):
            return Figures(entries=0, oldest_age_s=0.0)
        return events

    async def _lengths(self, streams: Sequence[str]) -> list[int]:
        lengths = await self._asked([("XLEN", name) for name in streams])
        return [int(reply or 0) for reply in lengths]

    async def _asked(self, commands: Sequence[Sequence[Arg]]) -> Sequence[Reply]:
        """The replies; None where the server refused."""
        replies = await ask_many(self._commands, commands)
        self._refused += [reply for reply in replies if isinstance(reply, ServerRefused)]
        return [None if isinstance(reply, ServerRefused) else reply for reply in replies]

    def _tell(self, error: ForebayError) -> None:
        self._failing.say(log, "leader_metrics.failed", error)


def _ms(entry_id: Any) -> int:
    return int(bytes(entry_id).partition(b"-")[0])
