"""Packs a value into an entry: payload, lifetimes, and the part of the envelope the node writes.

P1  Lifetimes come from the policy unless the loader or an event sets them. Jitter spreads them, so
    that entries stored together do not expire together.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Generic, TypeVar

from msgspec import Struct

from ...schemas.entry import Entry, EntryMeta, decompressed, make_tail
from ...schemas.errors import InvalidEntry
from .codec import ValueCodec

T = TypeVar("T")


class EntryLifetimes(Struct, frozen=True, kw_only=True):
    """How long the entries of a cache live, in milliseconds; 0: not at all."""

    ttl_ms: int
    stale_ms: int = 0  #: how long after its lifetime an entry may still be served
    error_ms: int = 0  #: how much longer, if its loader fails
    negative_ms: int = 0  #: lifetime of a known absence; 0: absences are not cached
    jitter: float = 0.0  #: the fraction of the lifetime that is random


class Packed(Struct, frozen=True):
    """A value, ready to be stored. ``payload`` is its msgpack; None for a known absence."""

    payload: bytes | None
    soft_ms: int
    hard_ms: int
    tail: bytes
    meta: EntryMeta = EntryMeta()

    def middle(self, previous: Entry) -> bytes:
        """The tail of an entry that keeps the stored payload of the previous one."""
        return make_tail(b"", kind="v", codec=previous.codec, meta=self.meta)


class Packer(Generic[T]):
    def __init__(self, policy: EntryLifetimes, codec: ValueCodec[T], rng: random.Random) -> None:
        self._policy = policy
        self._codec = codec
        self._rng = rng

    def pack(
        self,
        value: T | None,
        tags: Mapping[str, int],
        *,
        ttl_ms: int | None = None,
        stale_ms: int | None = None,
        etag: str = "",
    ) -> Packed:
        """The envelope of a value, with its lifetimes.

        Raises:
            InvalidEntry: the value is too large, or cannot be encoded.
        """
        payload = None if value is None else self._codec.pack(value)
        return self.envelope(payload, tags, ttl_ms=ttl_ms, stale_ms=stale_ms, etag=etag)

    def envelope(
        self,
        payload: bytes | None,
        tags: Mapping[str, int],
        *,
        ttl_ms: int | None = None,
        stale_ms: int | None = None,
        etag: str = "",
    ) -> Packed:
        """As ``pack``, for msgpack that the codec has made; None for a known absence."""
        policy = self._policy
        if payload is None:
            meta = EntryMeta(tags=dict(tags), soft_ms=policy.negative_ms)
            lifetime_ms = policy.negative_ms or 1
            return Packed(None, lifetime_ms, lifetime_ms, self._codec.negative_tail(meta), meta)
        asked_ms = ttl_ms or policy.ttl_ms
        stale_ms = policy.stale_ms if stale_ms is None else stale_ms
        # stale_if_error counts from the end of ttl, also if the loader has set ``stale_ms``.
        error_ms = max(0, policy.stale_ms + policy.error_ms - stale_ms) if policy.error_ms else 0
        soft_ms = self._jittered(asked_ms)
        payload = self._codec.check_size(payload)
        meta = EntryMeta(
            tags=dict(tags),
            etag=etag,
            soft_ms=asked_ms,
            stale_ms=stale_ms,
            error_ms=error_ms,
        )
        hard_ms = soft_ms + stale_ms + error_ms
        return Packed(payload, soft_ms, hard_ms, self._codec.tail(payload, meta), meta)

    def imported(
        self, payload: bytes | None, tags: Mapping[str, int], *, soft_ms: int, hard_ms: int
    ) -> Packed:
        """The envelope of a value that another service stored, with its remaining lifetimes."""
        policy = self._policy
        asked_ms = policy.negative_ms if payload is None else policy.ttl_ms
        meta = EntryMeta(tags=dict(tags), soft_ms=asked_ms, stale_ms=policy.stale_ms, imported=True)
        if payload is None:
            return Packed(None, soft_ms, hard_ms, self._codec.negative_tail(meta), meta)
        return Packed(payload, soft_ms, hard_ms, self._codec.tail(payload, meta), meta)

    def same(self, packed: Packed, previous: Entry | None) -> bool:
        """Whether the previous entry holds the same bytes and at least the same tags.

        The near copies of the previous entry live on, and its tags invalidate them.
        """
        if previous is None or previous.negative or not previous.version or packed.payload is None:
            return False
        if packed.meta.tags.keys() - previous.meta.tags.keys():
            return False
        try:
            stored = decompressed(previous, bytes_max=self._codec.bytes_max)
        except InvalidEntry:
            return False
        return stored == packed.payload

    def _jittered(self, ttl_ms: int) -> int:
        return max(1, int(ttl_ms * (1 - self._policy.jitter * self._rng.random())))
