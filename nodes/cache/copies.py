"""Between what a cache keeps and what its callers have: the same object, or a copy for each.

J1  Of a ``mutable`` cache only bytes are kept and shared: near cache, flights and request scopes
    hold the msgpack, and every caller decodes a value of its own.
J2  Other caches pay nothing for it.
J3  The near copy is the value that other nodes decode, so all callers get the same (``values``).
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar, cast

from msgspec.structs import replace

from ...schemas.settings import CacheDefaults
from ..values.codec import PackedCodec, ValueCodec
from .core import Hit

__all__ = ["Copies"]

T = TypeVar("T")


class Copies(Generic[T]):
    """``codec`` is for what is kept."""

    def __init__(self, of: Any, defaults: CacheDefaults, *, mutable: bool) -> None:
        packed: PackedCodec[T] | None = None
        if mutable:
            packed = PackedCodec[T].from_defaults(of, defaults)
            self.codec = cast(ValueCodec[T], packed)
        else:
            self.codec = ValueCodec[T].from_defaults(of, defaults)
        self._packed = packed

    def own(self, kept: Any) -> T:
        """What one caller gets."""
        packed = self._packed
        return cast(T, kept) if packed is None or kept is None else packed.own(kept)

    def own_hit(self, hit: Hit[T]) -> Hit[T]:
        return hit if self._packed is None else replace(hit, value=self.own(hit.value))
