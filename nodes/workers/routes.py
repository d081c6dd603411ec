"""Which cache and which sink a key belongs to.

A key's template tells. All workers of a namespace run the same application, so that
whoever owns a shard knows the routes of all its keys. A sink's name is what its checkpoints
go by: two sinks never share one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ...schemas.entry import EntryMeta
from ...schemas.errors import (
    ConfigError,
    ForebayError,
    InvalidEntry,
    InvalidEvent,
    InvalidKey,
)
from ...schemas.keys import KeyTemplate, dependents_of
from ...schemas.settings import CacheDefaults
from ..cache.cache import Cache
from ..cache.write import WritePath
from ..sinks.base import Sink
from ..sinks.serialized import Outlet
from ..values.codec import ValueCodec
from ..values.packing import Packed

__all__ = ["Routes", "SinkRoute", "refused_value"]

_UNTYPED_BYTES_MAX = 1_048_576
_UNTYPED_TTL_MS = 60_000
_BEHIND_MAX = 1_000
_any = msgspec.msgpack.Decoder()


def refused_value(error: Exception) -> InvalidEvent:
    """The fault of an event whose value its cache has refused with this error.

    Raises:
        ForebayError: the error, where the value is not at fault.
    """
    if isinstance(error, ForebayError):
        if not isinstance(error, InvalidEntry | InvalidKey):
            raise error
        return InvalidEvent("wrong_field", str(error), field="value", fix="see the cache")
    # Whatever a type of the application's raises when it is made of a wrong value.
    problem, fix = f"{type(error).__name__}: {error}", "send what the cache's type demands"
    return InvalidEvent("wrong_field", problem, field="value", fix=fix)


class SinkRoute(msgspec.Struct, frozen=True):
    template: KeyTemplate
    sink: Sink


class Untyped:
    """Published values of keys that have a sink, but no cache with a type."""

    def __init__(self) -> None:
        self._codec: ValueCodec[Any] = ValueCodec(
            Any, bytes_max=_UNTYPED_BYTES_MAX, compress_over_bytes=1_024
        )

    async def pack_published(self, key: str, raw_json: bytes, ttl_ms: int | None) -> Packed:
        lifetime_ms = ttl_ms or _UNTYPED_TTL_MS
        if raw_json.strip() == b"null":
            tail = self._codec.negative_tail(EntryMeta())
            return Packed(None, lifetime_ms, lifetime_ms, tail)
        payload = self._codec.pack(self._codec.from_json(raw_json))
        tail = self._codec.tail(payload, EntryMeta(soft_ms=lifetime_ms))
        return Packed(payload, lifetime_ms, lifetime_ms, tail)


class Routes:
    def __init__(self) -> None:
        self._untyped = Untyped()
        self.caches: dict[str, Cache[Any]] = {}
        self.sinks: list[SinkRoute] = []

    def add_cache(self, cached: Cache[Any]) -> None:
        for other in self.caches.values():
            if other.name == cached.name or other.template.shape == cached.template.shape:
                raise ConfigError(
                    setting="the cache",
                    value=f"{cached.name} {cached.template.text}",
                    origin="its declaration",
                    problem=f"{other.name} {other.template.text} is declared already",
                    fix="give each cache a name and a key template of its own",
                )
        self.caches[cached.name] = cached

    def add_sink(self, template: str, sink: Sink) -> None:
        problem = fix = ""
        if any(route.template.shape == KeyTemplate(template).shape for route in self.sinks):
            problem = "there is a sink for this key template already"
            fix = "declare one sink for each template"
        elif any(s.name == sink.name and s is not sink for s in self.all_sinks()):
            problem = f"another sink has the name {sink.name}, and so its checkpoints"
            fix = "give each sink a name of its own"
        if problem:
            raise ConfigError(
                setting="the sink",
                value=template,
                origin="its declaration",
                problem=problem,
                fix=fix,
            )
        self.sinks.append(SinkRoute(KeyTemplate(template), sink))

    def cache_of(self, key: str) -> Cache[Any] | None:
        for cached in self.caches.values():
            if cached.template.match(key) is not None:
                return cached
        return None

    def staleness_ms(self, defaults: CacheDefaults) -> int:
        """The tightest bound that one of the caches asks for."""
        policies = [cached.policy(defaults) for cached in self.caches.values()]
        return min([each.staleness_ms for each in policies] or [defaults.max_staleness_ms])

    def behind(self, keys: Sequence[str]) -> Sequence[str]:
        """The tags of whatever depends on these keys: theirs, and of all that they depend on.

        Raises:
            ForebayError: they are over a thousand.
        """
        found: dict[str, None] = {}
        waiting = list(keys)
        while waiting:
            key = waiting.pop(0)
            if dependents_of(key) in found:
                continue
            cached = self.cache_of(key)
            tags, further = cached.labels_of(key) if cached is not None else ((), ())
            found |= dict.fromkeys([dependents_of(key), *tags])
            waiting += further
            if len(found) > _BEHIND_MAX:
                raise ForebayError(f"{keys[0]} depends on over {_BEHIND_MAX} keys and tags")
        return list(found)

    def check_published(self, key: str, raw_json: bytes) -> None:
        """Whether the cache that declares the key can hold this value, if this node has it.

        Raises:
            InvalidEvent: it cannot.
        """
        cached = self.cache_of(key)
        if cached is None:
            return
        try:
            cached.writes.check_published(raw_json)
        except Exception as error:
            raise refused_value(error) from error

    def packer_of(self, key: str) -> WritePath[Any] | Untyped:
        """The packer of published values of this key."""
        cached = self.cache_of(key)
        return self._untyped if cached is None else cached.writes

    def sink_of(self, key: str) -> tuple[Sink, Mapping[str, str]] | None:
        """The sink, and the fields of the key."""
        for route in self.sinks:
            params = route.template.match(key)
            if params is not None:
                return route.sink, params
        return None

    def sink_for(self, cached: Cache[Any]) -> Sink | None:
        """The sink that takes the keys of this cache."""
        found = self.sink_of(cached.template.format(dict.fromkeys(cached.template.fields, "0")))
        return None if found is None else found[0]

    def all_sinks(self) -> Sequence[Sink]:
        return list({id(route.sink): route.sink for route in self.sinks}.values())

    def outlets(self, namespace: str) -> Mapping[str, Outlet]:
        """The ways to all sinks, by their names, for one start of the node."""
        return {sink.name: Outlet(sink, namespace=namespace) for sink in self.all_sinks()}

    def value_of(self, key: str, payload: bytes | None) -> Any:
        """The value that a job carries, in the type of its cache.

        Raises:
            InvalidEntry, msgspec.MsgspecError: the bytes are no such value.
        """
        if payload is None:
            return None
        cached = self.cache_of(key)
        return _any.decode(payload) if cached is None else cached.value_of(payload)
