"""A cached function: what ``@node.cached`` makes of a loader.

    @node.cached("product:{id}", ttl=60, stale_for=300, tags=["catalog"])
    async def product(id: int) -> Product: ...

    @product.batch
    async def products(ids: list[int]) -> dict[int, Product]: ...

    await product(42)                                   # typed as before
    await product.get_with_info(42)                     # with tier, age, stale, version
    await product.many([1, 2, 3])                       # one look, one load
    await product.put(42, value)                        # a value known to be the newest
    await product.write_through(42, value)              # the sink, then the entry
    await product.write_around(42, value)               # the sink, and no entry
    await product.write_behind(42, value)               # the entry now, the sink soon
    await product.invalidate(42)

Values are shared between callers: treat them as immutable, or declare the cache ``mutable``;
then each caller gets a copy of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, ParamSpec, TypeVar, Unpack, overload

import structlog
from msgspec import structs

from ...schemas.errors import ConfigError, ForebayError, InvalidEntry, NoJsonForm, PartialFailure
from ...schemas.jobs import RefreshJob
from ...schemas.keys import dependents_of, refuse_one_string
from ...schemas.settings import CacheDefaults, Limits
from .. import request_scope as scope
from .async_functions import name_of_function, refuse_sync
from .batches import Batches, BatchLoader, Member
from .bulk import BulkReads
from .copies import Copies
from .core import Core, Hit, LoadCall
from .declaration import Declaration, policy_of
from .keying import Keying
from .load import LoadPath
from .near import NearCache, NearEntry
from .policy import Policy
from .read import ReadPath
from .source import source_of
from .warming import How, Items, WarmReport, warm
from .writable import NOT_RUNNING, Takes1, Takes2, Takes3, Writable
from .write import WriteParts, WritePath

__all__ = ["Cached"]

log = structlog.get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
B = TypeVar("B", bound=BatchLoader)
A1 = TypeVar("A1")
A2 = TypeVar("A2")
A3 = TypeVar("A3")
Wide = tuple[Any, Any, Any, Any, *tuple[Any, ...]]  #: the arguments of a loader of more than three

_BATCH_OF_LEASE = 0.9


class Cached(Writable[T], Generic[P, T]):
    """Callable like the loader it wraps; must be used while its node runs."""

    def __init__(self, loader: Callable[P, Awaitable[T]], declared: Declaration) -> None:
        refuse_sync("the loader", loader)
        functools.update_wrapper(self, loader)
        self.name = declared.name or name_of_function(loader)
        self.declared = declared
        self.keying = Keying(loader, declared, self.name)
        self.template = self.keying.template
        self.value_type = self.keying.value_type
        self.key = self.keying.key
        self._loader = loader
        self._batch_loader: BatchLoader | None = None
        self._batches: Batches | None = None
        self._behind: Callable[[Sequence[str]], Sequence[str]] = list
        self._copies: Copies[T] = Copies(self.value_type, CacheDefaults(), mutable=declared.mutable)
        self._own: Callable[[Any], T] | None = None
        self._near_hits_before = 0
        self._near_negative_hits_before = 0
        self._path: ReadPath[T] | None = None
        self._near_get: Callable[[str], NearEntry | None] = _not_running
        if not self.keying.annotated:
            fix = "annotate what the loader returns, or all get dicts, lists and the like"
            log.warning("cache.untyped", cache=self.name, fix=fix)

    def __repr__(self) -> str:
        return f"<Cached {self.name} {self.template.text}>"

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """The value: from the near cache, the shared tier, or the loader.

        Raises:
            Unavailable, ServerRefused: Valkey does not answer, or refuses, and the cache is
            declared to fail then.
            SourceFailing: nothing is stored, and the loader is known to fail.
            LoaderError: it took too long, asks for itself, or returned no value of its type.
            Backpressure: too many loads or callers who wait. Whatever the loader raises.
        """
        key = self.key(*args, **kwargs)
        if scope.opened and (seen := scope.current()) is not None:
            return self._copies.own((await self._read_in(seen, key)).value)
        entry = self._near_get(key)
        if entry is None:
            hit = await self.path.read(key, functools.partial(self._call_of, key))
            kept: Any = hit.value
        else:
            kept = entry.value
        value: T = kept if self._own is None else self._own(kept)
        return value

    async def get_with_info(self, *args: P.args, **kwargs: P.kwargs) -> Hit[T]:
        """The value with its tier, age, version, and whether it is stale."""
        key = self.key(*args, **kwargs)
        if (seen := scope.current()) is not None:
            hit = await self._read_in(seen, key)
        else:
            hit = await self._read(key)
        return self._copies.own_hit(hit)

    async def _read_in(self, seen: scope.RequestScope, key: str) -> Hit[T]:
        self._count_repeated(seen, key)
        return await seen.read(self, key, functools.partial(self._read, key))

    def _count_repeated(self, seen: scope.RequestScope, key: str) -> None:
        """Count a read that its request scope answers."""
        if self._path is not None and (hit := seen.get(self, key)) is not None:
            self._path.metrics.repeated(hit)

    async def _read(self, key: str) -> Hit[T]:
        entry = self._near_get(key)
        if entry is not None:
            return self.path.hit_of(entry)
        return await self.path.read(key, functools.partial(self._call_of, key))

    @overload
    async def many(self: Takes1[A1, Any], items: Iterable[A1]) -> list[T]: ...

    @overload
    async def many(self: Takes2[A1, A2, Any], items: Iterable[tuple[A1, A2]]) -> list[T]: ...

    @overload
    async def many(
        self: Takes3[A1, A2, A3, Any], items: Iterable[tuple[A1, A2, A3]]
    ) -> list[T]: ...

    @overload
    async def many(self, items: Iterable[Wide]) -> list[T]: ...

    async def many(self, items: Iterable[Any]) -> list[T]:
        """The values of many items, in their order: one look, and one load for the misses.

        An item is the loader's one argument, or the tuple of its arguments.

        Raises:
            PartialFailure: some could not be had; it holds the values of the others.
        """
        refuse_one_string("items", items)
        asked = list(items)
        hits = await self.many_with_info(asked)
        errors = {
            item: hit for item, hit in zip(asked, hits, strict=True) if isinstance(hit, Exception)
        }
        if errors:
            values = {
                item: hit.value
                for item, hit in zip(asked, hits, strict=True)
                if isinstance(hit, Hit)
            }
            raise PartialFailure(self.name, values, errors)
        return [hit.value for hit in hits if isinstance(hit, Hit)]

    @overload
    async def many_with_info(
        self: Takes1[A1, Any], items: Iterable[A1]
    ) -> list[Hit[T] | Exception]: ...

    @overload
    async def many_with_info(
        self: Takes2[A1, A2, Any], items: Iterable[tuple[A1, A2]]
    ) -> list[Hit[T] | Exception]: ...

    @overload
    async def many_with_info(
        self: Takes3[A1, A2, A3, Any], items: Iterable[tuple[A1, A2, A3]]
    ) -> list[Hit[T] | Exception]: ...

    @overload
    async def many_with_info(self, items: Iterable[Wide]) -> list[Hit[T] | Exception]: ...

    async def many_with_info(self, items: Iterable[Any]) -> list[Hit[T] | Exception]:
        """As ``many``, with tiers and ages; in place of what failed stands its exception."""
        refuse_one_string("items", items)
        return await self.read_keys([self.keying.of_item(item) for item in items])

    async def read_keys(self, keys: Sequence[str]) -> list[Hit[T] | Exception]:
        """As ``many_with_info``, for keys of this cache's template."""
        wanted = {key: functools.partial(self._call_of, key) for key in keys}
        reads = BulkReads(self.path, self._batches)
        seen = scope.current()
        if seen is None:
            found = await reads.read(wanted)
        else:
            for key in wanted:
                self._count_repeated(seen, key)
            found = await seen.read_many(self, wanted, reads.read)
        own = self._copies.own_hit
        return [own(hit) if isinstance(hit := found[key], Hit) else hit for key in keys]

    @property
    def batched(self) -> bool:
        """Whether there is a loader for many items at once."""
        return self._batch_loader is not None

    def batch(self, loader: B) -> B:
        """Declare a loader for many items at once: it gets a list, and returns a mapping."""
        if self._batch_loader is not None or self._path is not None:
            raise ConfigError(
                setting=f"the batch loader of {self.name}",
                value=getattr(loader, "__name__", repr(loader)),
                origin="the declaration of a cache",
                problem="there is one already" if self._batch_loader else "the node runs already",
                fix="declare one for each cache, before `async with node:`",
            )
        refuse_sync(f"the batch loader of {self.name}", loader)
        self._batch_loader = loader
        return loader

    async def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Have every node forget the entry, before this returns on this node."""
        await self.path.invalidate(self.key(*args, **kwargs))

    async def warm(self, items: Items, **how: Unpack[How]) -> WarmReport:
        """Load what is not fresh in the shared tier, ahead of the readers; see ``warming.warm``."""
        return await warm(self, items, **how)

    async def read_key(self, key: str) -> Hit[T]:
        """As ``get_with_info``, for a key of this cache's template."""
        return self._copies.own_hit(await self._read(key))

    def value_of(self, payload: bytes) -> T:
        """The value of msgpack bytes; raises InvalidEntry."""
        return self._copies.own(self._copies.codec.unpack(payload))

    def json_of(self, key: str, value: T) -> bytes:
        """A value that ``read_key`` gave, as JSON; raises NoJsonForm."""
        try:
            return self._copies.codec.json(value)
        except InvalidEntry as error:
            raise NoJsonForm(self.name, key, error.problem) from error

    def bring_over_from(self, legacy_key: str) -> None:
        """Declare the old names afterwards, before the node starts; raises ConfigError."""
        self.declared = structs.replace(self.declared, legacy_key=legacy_key)
        self.keying = Keying(self._loader, self.declared, self.name)

    async def import_key(self, key: str, *, dry_run: bool) -> str:
        """Bring over the old value of this key: what came of it; see ``imports``."""
        return await self.path.import_old(key, self._call_of(key).tags, dry_run=dry_run)

    async def do_refresh(self, job: RefreshJob) -> bool:
        """Load a key again under the lease that the job carries; false: it was refused."""
        try:
            call = self._call_of(job.key)
        except Exception:
            await self.path.loads.leases.give_back(job.key, job.token)
            raise
        return await self.path.refresh(job.key, job.token, call)

    @property
    def near_hits(self) -> int:
        """Since the declaration, over all starts of the node."""
        return self._near_hits_before + (self._path.near.hits if self._path else 0)

    @property
    def near_negative_hits(self) -> int:
        """Of these hits, those of known absences."""
        now = self._path.near.negative_hits if self._path else 0
        return self._near_negative_hits_before + now

    @property
    def path(self) -> ReadPath[T]:
        if self._path is None:
            raise ForebayError(f"{self.name}: {NOT_RUNNING}")
        self._path.check_loop()
        return self._path

    def bind(self, core: Core, defaults: CacheDefaults, limits: Limits) -> ReadPath[T]:
        """Called by the node when it starts."""
        policy = self.policy(defaults)
        slack_s = max(0.0, policy.staleness_ms / 1000 - core.follower.promise_s)
        near = NearCache.from_defaults(core.follower, defaults, slack_s=slack_s, clock=core.clock)
        self._copies = Copies(self.value_type, defaults, mutable=self.declared.mutable)
        self._own = self._copies.own if self.declared.mutable else None
        codec = self._copies.codec
        source = source_of(core, self.name, self.declared, defaults)
        old_name = self.keying.legacy_name if self.declared.legacy_key else None
        loads = LoadPath(
            core,
            self.name,
            policy,
            codec,
            near,
            source,
            self._copies.own,
            marks=old_name is not None,
        )
        self._path = ReadPath(core, loads, limits=limits, legacy_name=old_name)
        if self._batch_loader is not None:
            limit_s = _BATCH_OF_LEASE * policy.lease_ms / 1000
            self._batches = Batches(self.name, self._batch_loader, core.tasks, limit_s=limit_s)
        self._behind = core.behind
        self._near_get = near.get
        return self._path

    def bind_writes(self, core: Core, parts: WriteParts) -> None:
        """Called by the node after ``bind``."""
        self._writes = WritePath(
            core,
            parts,
            self.path,
            labels_of=lambda key: self._labels_of(self.keying.fields(key)),
        )

    def unbind(self) -> None:
        self._near_hits_before = self.near_hits
        self._near_negative_hits_before = self.near_negative_hits
        self._path = self._batches = self._writes = None
        self._near_get = _not_running

    def policy(self, defaults: CacheDefaults) -> Policy:
        return policy_of(self.declared, defaults)

    def labels_of(self, key: str) -> tuple[Sequence[str], Sequence[str]]:
        """The tags that this key's value carries, and the keys that it depends on."""
        return self.keying.labels(self.keying.fields(key))

    def _call_of(self, key: str, member: Member | None = None) -> LoadCall[T]:
        """The call that loads a key, with arguments parsed from it; raises InvalidKey."""
        keying = self.keying
        values = keying.arguments(key)
        labels = self._labels_of(keying.fields(key)) if keying.labelled else ()
        if self._batches is not None:
            run = functools.partial(self._batches.load, keying.item(values), member)
            leave = member.leave if member else None
            return LoadCall(run, labels, leave)
        args, kwargs = keying.call(values)
        return LoadCall(functools.partial(self._loader, *args, **kwargs), labels)

    def _labels_of(self, fields: Mapping[str, Any]) -> Sequence[str]:
        """All tags that a value carries: its own, those of what it depends on."""
        tags, keys = self.keying.labels(fields)
        if not keys:
            return tags
        found = dict.fromkeys([*tags, *self._behind(keys)])
        found.pop(dependents_of(self.template.format(fields)), None)  # it is not behind itself
        return list(found)


def _not_running(key: str) -> NearEntry | None:
    return None
