"""Dispatches notices of the logs, and pub/sub messages of the work channel, to the caches.

E1  A notice reaches every cache of this node before the next notice is applied.
E2  A write or drop of a key invalidates its copies, and in the same way, soft or not, the entries
    that depend on the key.
E3  A fill by a load only replaces an expired entry: it invalidates nothing.
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
        """Apply a notice."""
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
        """Forget the tags and loads that may have missed notices of this shard."""
        self._tags.reset(shard)
        for path in self.paths:
            path.flights.detach_all()

    def dispatch_message(
        self, payload: bytes, handlers: Mapping[bytes, Callable[[int], None]]
    ) -> None:
        """A message of the work channel: about the source of a cache, or about a job in a shard.
        ``handlers`` are called with the shard, by the kind of job.
        """
        kind, _, rest = payload.partition(b" ")
        if kind in (b"f", b"o"):
            for path in self.paths:
                if path.name.encode() == rest:
                    path.loads.source.heard(failing=kind == b"f")
        elif kind in handlers and rest in self._shards:
            handlers[kind](self._shards[rest])

    def _noticed(self, key: str, version: int) -> None:
        for path in self.paths:
            path.noticed(key, version)
        self._waits.wake(key)

    def _outdated(self, tag: str, version: int, *, soft: bool) -> None:
        if tag not in self._tags:
            return  # no entry of this node has the tag, and no load has captured it
        self._tags.bump(tag, version, soft=soft)
        for path in self.paths:
            path.tag_noticed(tag)

    def _extended(self, version: int, notice: Extended) -> None:
        # The earlier one by this node's clock and by the server's.
        extended_at = version / 1e6 - self._server_clock.offset_s
        soft_until = min(extended_at, self._clock.monotonic()) + notice.soft_ms / 1000
        for path in self.paths:
            path.extended(notice, version, soft_until)
        self._waits.wake(notice.key)
