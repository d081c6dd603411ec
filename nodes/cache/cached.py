"""A cached function: what ``@node.cached`` makes of a loader.

    @node.cached("product:{id}", ttl=60, stale_for=300, tags=["catalog"])
    async def product(id: int) -> Product: ...

    await product(42)                                   # typed as before
    await product.get_with_info(42)                     # with tier, age, stale, version
    await product.put(42, value)                        # a value known to be the newest
    await product.write_through(42, value)              # the sink, then the entry
    await product.write_around(42, value)               # the sink, and no entry
    await product.write_behind(42, value)               # the entry now, the sink soon
    await product.invalidate(42)

Every parameter of the function is a field of the key template, and the other way round:
otherwise two different calls would share an entry. Values are shared between callers:
treat them as immutable.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Generic, ParamSpec, TypeVar, get_type_hints

import msgspec

from ...schemas.errors import ConfigError, ForebayError, InvalidKey
from ...schemas.jobs import RefreshJob
from ...schemas.keys import KeyTemplate
from ...schemas.settings import CacheDefaults, Limits
from . import scope
from .durations import lifetime_ms
from .loads import Core, Hit, LoadCall, LoadPath
from .near import NearCache, NearEntry
from .policy import Policy
from .reads import ReadPath
from .values import ValueCodec
from .writable import Writable
from .writes import WriteParts, WritePath

__all__ = ["Cached", "Declaration", "lifetime_ms"]

P = ParamSpec("P")
T = TypeVar("T")

_NEGATIVE_S_MAX = 10.0


class Declaration(msgspec.Struct, frozen=True, kw_only=True):
    """What was said of a cache where it was declared. Times in seconds."""

    template: str
    ttl: float
    stale_for: float = 0.0
    negative_ttl: float | None = None  #: unset: like ttl, at most ten seconds
    tags: Sequence[str] = ()
    name: str = ""


class Cached(Writable[T], Generic[P, T]):
    """Callable like the loader it wraps; must be used while its node runs."""

    def __init__(self, loader: Callable[P, Awaitable[T]], declared: Declaration) -> None:
        functools.update_wrapper(self, loader)
        self.name = declared.name or loader.__name__
        self.declared = declared
        self.template = KeyTemplate(declared.template)
        self._near_hits_before = 0
        self._loader = loader
        tags = [KeyTemplate(tag) for tag in declared.tags]
        self._tags = [_tag_of(tag) for tag in tags]
        self._signature = inspect.signature(loader)
        self._parameters = tuple(self._signature.parameters)
        self._plain = all(
            each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            for each in self._signature.parameters.values()
        )
        hints = get_type_hints(loader, include_extras=True)
        self._types = {name: hints.get(name, str) for name in self._parameters}
        self.value_type: Any = hints.get("return", Any)
        _check_fields(self.template, tags, self._parameters, self.name)
        self.key = self._fast_key() or self._slow_key
        self._path: ReadPath[T] | None = None
        self._near_get: Callable[[str], NearEntry | None] = _not_running

    def __repr__(self) -> str:
        return f"<Cached {self.name} {self.template.text}>"

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """The value: from the near cache, the shared tier, or the loader.

        Raises:
            Unavailable: Valkey does not answer, and the cache is declared to fail then.
            Whatever the loader raises.
        """
        key = self.key(*args, **kwargs)
        if scope.opened and (seen := scope.current()) is not None:
            read = functools.partial(self._read, key, args, kwargs)
            return (await seen.read(self, key, read)).value
        entry = self._near_get(key)
        if entry is not None:
            value: T = entry.value
            return value
        hit = await self.path.read(key, self._call(args, kwargs))
        return hit.value

    async def get_with_info(self, *args: P.args, **kwargs: P.kwargs) -> Hit[T]:
        """The value with its tier, age, version, and whether it is stale."""
        key = self.key(*args, **kwargs)
        if (seen := scope.current()) is not None:
            return await seen.read(self, key, functools.partial(self._read, key, args, kwargs))
        return await self._read(key, args, kwargs)

    async def _read(self, key: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hit[T]:
        entry = self._near_get(key)
        if entry is not None:
            return self.path.hit_of(entry)
        return await self.path.read(key, self._call(args, kwargs))

    async def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Have every node forget the entry, before this returns on this node."""
        await self.path.invalidate(self.key(*args, **kwargs))

    async def read_key(self, key: str) -> Hit[T]:
        """As ``get_with_info``, for a key of this cache's template."""
        entry = self._near_get(key)
        if entry is not None:
            return self.path.hit_of(entry)
        return await self.path.read(key, self._call_of(key))

    async def do_refresh(self, job: RefreshJob) -> bool:
        """Load a key again under the lease that the job carries; false: it was refused."""
        near, loads = self.path.near, self.path.loads
        try:
            call = self._call_of(job.key)
        except Exception:
            await loads.give_back(job.key, job.token)
            raise
        reservation = near.reserve(job.key)
        try:
            lease = await loads.taken_over(job.key, job.token, call.tags)
            if lease is None:
                return False
            hit = await loads.load_and_fill(lease, call, reservation)
        finally:
            near.release(reservation)
        return hit.version > 0

    @property
    def near_hits(self) -> int:
        """Since the declaration, over all starts of the node."""
        return self._near_hits_before + (self._path.near.hits if self._path else 0)

    @property
    def path(self) -> ReadPath[T]:
        if self._path is None:
            raise ForebayError(f"{self.name} is used before its node was started")
        return self._path

    def bind(self, core: Core, defaults: CacheDefaults, limits: Limits) -> ReadPath[T]:
        """Called by the node when it starts."""
        near = NearCache(
            core.follower,
            entries_max=defaults.near_entries_max,
            bytes_max=defaults.near_bytes_max,
            clock=core.clock,
        )
        codec: ValueCodec[T] = ValueCodec(
            self.value_type,
            bytes_max=defaults.value_bytes_max,
            compress_over_bytes=defaults.compress_over_bytes,
        )
        loads = LoadPath(core, self.name, self.policy(defaults), codec, near)
        self._path = ReadPath(core, loads, limits=limits, staleness_ms=defaults.max_staleness_ms)
        self._near_get = near.get
        return self._path

    def bind_writes(self, core: Core, parts: WriteParts) -> None:
        """Called by the node after ``bind``."""
        self._writes = WritePath(
            core, parts, self.path, lambda key: self._tags_of(self._fields_of(key))
        )

    def unbind(self) -> None:
        self._near_hits_before = self.near_hits
        self._path = self._writes = None
        self._near_get = _not_running

    def policy(self, defaults: CacheDefaults) -> Policy:
        declared = self.declared
        negative = declared.negative_ttl
        if negative is None:
            negative = min(declared.ttl, _NEGATIVE_S_MAX)
        return Policy(
            ttl_ms=lifetime_ms("ttl", declared.ttl),
            stale_ms=lifetime_ms("stale_for", declared.stale_for, zero=True),
            negative_ms=lifetime_ms("negative_ttl", negative, zero=True),
            lease_ms=defaults.lease_ms,
            jitter=defaults.jitter,
            on_disconnected=defaults.on_disconnected,
        )

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LoadCall[T]:
        run = functools.partial(self._loader, *args, **kwargs)
        tags = self._tags_of(self._bound(args, kwargs)) if self._tags else ()
        return LoadCall(run, tags)

    def _call_of(self, key: str) -> LoadCall[T]:
        fields = self._fields_of(key)
        try:
            values = {
                name: msgspec.convert(text, self._types[name], strict=False)
                for name, text in fields.items()
            }
        except msgspec.ValidationError as error:
            raise InvalidKey("key", key, f"is no key of {self.template.text}: {error}") from error
        return LoadCall(functools.partial(self._loader, **values), self._tags_of(fields))

    def _fields_of(self, key: str) -> Mapping[str, Any]:
        fields = self.template.match(key)
        if fields is None:
            raise InvalidKey("key", key, f"is no key of {self.template.text}")
        return fields

    def _tags_of(self, fields: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple([tag(fields) for tag in self._tags])

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._plain and not kwargs and len(args) == len(self._parameters):
            return dict(zip(self._parameters, args, strict=True))
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def _slow_key(self, *args: Any, **kwargs: Any) -> str:
        return self.template.format(self._bound(args, kwargs))

    def _fast_key(self) -> Callable[..., str] | None:
        if len(self._parameters) != 1:
            return None
        of_one = self.template.formatter()

        def key(*args: Any, **kwargs: Any) -> str:
            if len(args) == 1 and not kwargs:
                return of_one(args[0])
            return self._slow_key(*args, **kwargs)

        return key


def _tag_of(template: KeyTemplate) -> Callable[[Mapping[str, Any]], str]:
    if len(template.fields) != 1:
        return template.format
    (field,), of_one = template.fields, template.formatter()
    return lambda fields: of_one(fields[field])


def _check_fields(
    template: KeyTemplate, tags: Sequence[KeyTemplate], parameters: Sequence[str], name: str
) -> None:
    missing = set(parameters) ^ set(template.fields)
    unknown = {field for tag in tags for field in tag.fields} - set(parameters)
    if not missing and not unknown:
        return
    raise ConfigError(
        setting=f"the key template of {name}",
        value=template.text,
        origin="the declaration of a cache",
        problem=f"fields and parameters differ in {', '.join(sorted(missing | unknown))}",
        fix="name every parameter of the function in the template, and no other",
    )


def _not_running(key: str) -> NearEntry | None:
    return None
