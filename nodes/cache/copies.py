"""Between what a cache keeps and what its callers have: the same object, or a copy for each.

J1  Of a ``mutable`` cache only bytes are kept and shared: near cache, flights and request scopes
    hold the msgpack, and every caller decodes a value of its own.
J2  Other caches pay nothing for it.
J3  Where no type is declared, what is kept is what other nodes decode: all get the same kind.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar, cast

from msgspec.structs import replace

from ...schemas.settings import CacheDefaults
from .core import Hit
from .loading import NOT_MODIFIED
from .values import PackedCodec, ValueCodec

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
        self._plain = packed is None and of is Any

    def own(self, kept: Any) -> T:
        """What one caller gets."""
        packed = self._packed
        return cast(T, kept) if packed is None or kept is None else packed.own(kept)

    def own_hit(self, hit: Hit[T]) -> Hit[T]:
        return hit if self._packed is None else replace(hit, value=self.own(hit.value))

    def kept(self, value: T | None) -> Any:
        """What is kept of a caller's value; raises InvalidEntry."""
        packed = self._packed
        if value is None or value is NOT_MODIFIED:
            return value
        if packed is not None:
            return packed.packed(value)
        return self.codec.plain(value) if self._plain else value

    def keeping(self, load: Callable[[], Awaitable[T]]) -> Callable[[], Awaitable[T]]:
        """A load that returns what is kept."""
        if self._packed is None and not self._plain:
            return load

        async def loaded() -> T:
            return cast(T, self.kept(await load()))

        return loaded
