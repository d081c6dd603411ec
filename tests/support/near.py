"""A near cache with all that it looks at in the test's hands."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from forebay.coordinator.log.follower import ShardView
from forebay.nodes.cache.near import NearCache, NearEntry
from forebay.nodes.cache.tags import TagTable
from forebay.schemas.keys import Names

SHARDS = 2
OVERHEAD = NearEntry("", 0, version=0, size=0, fresh_until=0, gone_at=0, written_at=0,
                     view=ShardView(0), tags=()).size  # fmt: skip
NAMES = Names("near", SHARDS)
TAGS = ["red", "blue", "green"]
FOREVER = float("inf")


class Near:
    def __init__(
        self,
        *,
        made: Callable[..., NearCache] = NearCache,
        entries_max: int = 100,
        bytes_max: int = 10**6,
        negatives_max: int = 100,
        value_bytes_max: int = 10**6,
        **options: Any,
    ) -> None:
        self.now = 1_000.0
        self.follower: Any = SimpleNamespace(
            views=tuple(ShardView(number) for number in range(SHARDS)), live_until=FOREVER
        )
        nobody: Any = None  # no tag is asked for: it is told by ``bump``
        self.tags = TagTable(NAMES, nobody)
        self.states = {tag: self.tags.state(tag) for tag in TAGS}
        for tag in TAGS:
            self.tags.bump(tag, 1)
        clock: Any = SimpleNamespace(monotonic=lambda: self.now)
        self.cache = made(
            self.follower,
            entries_max=entries_max,
            bytes_max=bytes_max,
            negatives_max=negatives_max,
            value_bytes_max=value_bytes_max,
            **{"policy": "sieve", **options},
            clock=clock,
        )

    def view(self, key: str) -> ShardView:
        view: ShardView = self.follower.views[NAMES.shard(key)]
        return view

    def entry(
        self,
        key: str,
        version: int,
        *,
        size: int = 0,
        ttl: float = 1e9,
        ahead: float = 0.0,
        tags: dict[str, int] | None = None,
        negative: bool = False,
    ) -> NearEntry:
        """It is ripe for the last ``ahead`` seconds of its time to live."""
        return NearEntry(
            key,
            None if negative else f"{key}@{version}",
            version=version,
            size=size,
            fresh_until=self.now + ttl - ahead,
            soft_until=self.now + ttl,
            gone_at=self.now + 2 * ttl,
            written_at=self.now,
            view=self.view(key),
            tags=tuple((self.states[tag], at) for tag, at in (tags or {}).items()),
            negative=negative,
        )

    def put(self, key: str, version: int = 1, **options: Any) -> bool:
        reservation = self.cache.reserve(key)
        try:
            return self.cache.keep(reservation, self.entry(key, version, **options))
        finally:
            self.cache.release(reservation)

    def reset(self, shard: int) -> None:
        self.follower.views[shard].generation += 1
        self.tags.reset(shard)
