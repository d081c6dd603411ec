"""The age of the oldest work that this node is responsible for.

L1  The server is asked, not the workers: work that they forgot, or believe to be done, counts.
L2  An entry is as old as its id says, and at least as old as the time since it was first seen
    here. An id that a publisher made up (years old, or ahead of time) counts only as the latter.
L3  Looking costs one read for each stream of the shards owned here, every ``every_s``; health and
    metrics read memory. If a look fails, the last known ages stay and grow.
L4  Work older than ``late_s`` is logged, once a minute for each kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import anyio
import structlog
from anyio.abc import TaskStatus
from msgspec import Struct

from ...coordinator.clock import Clock, ServerClock
from ...coordinator.log.ownership import Ownership
from ...coordinator.log_once import LogOnce
from ...coordinator.valkey.link import Commands
from ...schemas.errors import ForebayError
from ...schemas.keys import EVENTS, Names

__all__ = ["Backlog", "Oldest", "Work"]

log = structlog.get_logger(__name__)

Work = Literal["events", "writes", "refreshes"]

_EVERY_S = 2.0
_LATE_S = 10.0
_PLAUSIBLE_S = 30 * 86_400.0


class Oldest(Struct, frozen=True, kw_only=True):
    """The oldest entry of one kind of work."""

    stream: str
    began_at: float  #: of the monotonic clock


class _Head(Struct, frozen=True):
    entry_id: bytes
    seen_at: float


class Backlog:
    def __init__(
        self,
        commands: Commands,
        names: Names,
        ownership: Ownership,
        *,
        clock: Clock,
        server_clock: ServerClock,
        lease_ms: int,
        every_s: float = _EVERY_S,
        late_s: float = _LATE_S,
    ) -> None:
        """``lease_ms``: of a load; a refresh may take as long."""
        self._commands = commands
        self._names = names
        self._ownership = ownership
        self._clock = clock
        self._server_clock = server_clock
        self._every_s = every_s
        self._late_s: Mapping[Work, float] = {
            "events": late_s,
            "writes": late_s,
            "refreshes": late_s + lease_ms / 1000,
        }
        self._heads: dict[str, _Head] = {}
        self._oldest: dict[Work, Oldest] = {}
        self._late = {kind: LogOnce(clock) for kind in self._late_s}
        self._failing = LogOnce(clock)

    def __repr__(self) -> str:
        return f"<Backlog {dict(self.ages())}>"

    def ages(self) -> Iterator[tuple[Work, float]]:
        """Seconds since the oldest work of each kind began to wait; 0 if none waits."""
        now = self._clock.monotonic()
        for kind in self._late_s:
            oldest = self._oldest.get(kind)
            yield kind, 0.0 if oldest is None else max(0.0, now - oldest.began_at)

    def late(self, kind: Work) -> str:
        """A description of the late work of this kind; empty if none is late."""
        oldest = self._oldest.get(kind)
        if oldest is None:
            return ""
        age_s = self._clock.monotonic() - oldest.began_at
        if age_s <= self._late_s[kind]:
            return ""
        return f"the oldest entry of {oldest.stream} has waited for {age_s:.0f} s"

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Look until cancelled."""
        task_status.started()
        while True:
            await anyio.sleep(self._every_s)
            try:
                await self.look()
            except ForebayError as error:
                self._failing.say(log, "backlog.unknown", error)
            else:
                self._failing.over()

    async def look(self) -> None:
        """Ask for the first entries once.

        Raises:
            Unavailable: the server did not answer; the known ages stay.
        """
        streams = list(self._responsible_for())
        replies = await self._commands.call_many(
            [("XRANGE", name, "-", "+", "COUNT", 1) for _, name in streams]
        )
        now, heads, oldest = self._clock.monotonic(), dict[str, _Head](), dict[Work, Oldest]()
        for (kind, name), reply in zip(streams, replies, strict=True):
            if isinstance(reply, ForebayError) or not reply:
                continue  # a key of another type is reported by its worker
            entry_id = bytes(reply[0][0])
            known = self._heads.get(name)
            head = known if known and known.entry_id == entry_id else _Head(entry_id, now)
            heads[name] = head
            began_at = min(head.seen_at, now - self._age_by_id_s(entry_id))
            if kind not in oldest or began_at < oldest[kind].began_at:
                oldest[kind] = Oldest(stream=name, began_at=began_at)
        self._heads, self._oldest = heads, oldest
        self._tell()

    def _responsible_for(self) -> Iterator[tuple[Work, str]]:
        part = self._names.part
        for resource in self._ownership.tenures:
            if resource == EVENTS:
                yield "events", self._names.events
                yield "events", part(EVENTS, "before")
            else:
                yield "writes", part(resource, "writes")
                yield "refreshes", part(resource, "refreshes")

    def _age_by_id_s(self, entry_id: bytes) -> float:
        ms = entry_id.partition(b"-")[0]
        age_s = (self._server_clock.now_ms() - int(ms)) / 1000 if ms.isdigit() else 0.0
        return age_s if 0 <= age_s < _PLAUSIBLE_S else 0.0

    def _tell(self) -> None:
        for kind, once in self._late.items():
            if late := self.late(kind):
                once.say(log, "work.late", ForebayError(late), kind=kind)
            else:
                once.over()
