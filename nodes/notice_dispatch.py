"""What a node does about what it is told: notices of the logs, words on the working channel.

E1  A notice reaches every cache of this node before the next one is looked at.
E2  Copies of a key that was written or dropped are old; and so is, as softly, what depends on it.
E3  What was loaded only replaces what has ended: it outdates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..coordinator.clock import Clock, ServerClock
from ..schemas.keys import dependents_of
from ..schemas.notices import Bumped, Changed, Dropped, Extended, Notice
from .cache.read import ReadPath
from .cache.tags import TagTable
from .cache.waits import KeyWaits

__all__ = ["NoticeDispatcher"]


class NoticeDispatcher:
    def __init__(
        self,
        tags: TagTable,
        waits: KeyWaits,
        clock: Clock,
        server_clock: ServerClock,
        *,
        shards: int,
    ) -> None:
        self.paths: Sequence[ReadPath[Any]] = ()
        self._tags = tags
        self._waits = waits
        self._clock = clock
        self._server_clock = server_clock
        self._shards = {str(shard).encode(): shard for shard in range(shards)}

    def apply(self, version: int, notice: Notice) -> None:
        """Take in what a notice says."""
        match notice:
            case Changed(key=key, outdates=outdates):
                self._noticed(key, version)
                if outdates:
                    self._outdated(dependents_of(key), version, soft=False)
            case Dropped(keys=keys, soft=soft):
                for key in keys:
                    self._noticed(key, version)
                    self._outdated(dependents_of(key), version, soft=soft)
            case Bumped(tags=tags, soft=soft):
                for tag in tags:
                    self._outdated(tag, version, soft=soft)
            case Extended():
                self._extended(version, notice)

    def reset(self, shard: int) -> None:
        """Notices of this shard may have been missed."""
        self._tags.reset(shard)
        for path in self.paths:
            path.flights.detach_all()

    def word(self, payload: bytes, told: Mapping[bytes, Callable[[int], None]]) -> None:
        """A word on the working channel, of the source of a cache, or of a job in a shard:
        ``told`` says who is to know, by the kind of job.
        """
        kind, _, rest = payload.partition(b" ")
        if kind in (b"f", b"o"):
            for path in self.paths:
                if path.name.encode() == rest:
                    path.loads.source.heard(failing=kind == b"f")
        elif kind in told and rest in self._shards:
            told[kind](self._shards[rest])

    def _noticed(self, key: str, version: int) -> None:
        for path in self.paths:
            path.noticed(key, version)
        self._waits.wake(key)

    def _outdated(self, tag: str, version: int, *, soft: bool) -> None:
        if tag not in self._tags:
            return  # no entry here carries it, and no load captured it
        self._tags.bump(tag, version, soft=soft)
        for path in self.paths:
            path.tag_noticed(tag)

    def _extended(self, version: int, notice: Extended) -> None:
        # By this node's clock, as by the server's: whichever comes first.
        told_at = version / 1e6 - self._server_clock.offset_s
        soft_until = min(told_at, self._clock.monotonic()) + notice.soft_ms / 1000
        for path in self.paths:
            path.extended(notice, version, soft_until)
        self._waits.wake(notice.key)
