"""One declared cache, as its node holds it: keys, loader and, while the node runs, the paths.

``Cached`` is its public face. The node binds the cache at its start and unbinds it at its stop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from msgspec import structs

from ...schemas.errors import ConfigError, ForebayError, InvalidEntry, NoJsonForm
from ...schemas.jobs import RefreshJob
from ...schemas.keys import dependents_of
from ...schemas.settings import CacheDefaults, Limits
from .. import request_scope as scope
from ..values.introspection import name_of_function, refuse_sync
from ..values.keying import Keying
from .batches import Batches, BatchLoader, Member
from .bulk import BulkReads
from .copies import Copies
from .core import Core, Hit, LoadCall
from .declaration import Declaration, policy_of
from .load import LoadPath
from .near import NearCache, NearEntry
from .node_writes import NodeWrites
from .policy import Policy
from .read import ReadPath
from .source import source_of
from .write import WritePath

T = TypeVar("T")

_BATCH_SHARE = 0.9  #: of the lease, for the batch loader


class Cache(Generic[T]):
    def __init__(self, loader: Callable[..., Awaitable[T]], declared: Declaration) -> None:
        refuse_sync("the loader", loader)
        self.name = declared.name or name_of_function(loader)
        self.declared = declared
        self.keying = self._keying(loader)
        self.template = self.keying.template
        self.value_type = self.keying.value_type
        self.near_get: Callable[[str], NearEntry | None] = _not_running
        self.own: Callable[[Any], T] | None = None  #: copies a kept value, if it is mutable
        self._loader = loader
        self._batch_loader: BatchLoader | None = None
        self._batches: Batches | None = None
        self._dependency_tags: Callable[[Sequence[str]], Sequence[str]] = list
        self._copies: Copies[T] = Copies(self.value_type, CacheDefaults(), mutable=declared.mutable)
        self._near_hits_before = 0
        self._near_negative_hits_before = 0
        self._path: ReadPath[T] | None = None
        self._writes: WritePath[T] | None = None

    def __repr__(self) -> str:
        return f"<Cache {self.name} {self.template.text}>"

    def _keying(self, loader: Callable[..., Awaitable[T]]) -> Keying:
        declared = self.declared
        return Keying(
            loader,
            self.name,
            declared.template,
            tags=declared.tags,
            depends_on=declared.depends_on,
            legacy_key=declared.legacy_key,
        )

    # The node's start and stop

    def bind(self, core: Core, defaults: CacheDefaults, limits: Limits) -> ReadPath[T]:
        """Build the read path when the node starts."""
        policy = self.policy(defaults)
        slack_s = max(0.0, policy.staleness_ms / 1000 - core.follower.promise_s)
        near = NearCache.from_defaults(core.follower, defaults, slack_s=slack_s, clock=core.clock)
        self._copies = Copies(self.value_type, defaults, mutable=self.declared.mutable)
        self.own = self._copies.own if self.declared.mutable else None
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
            limit_s = _BATCH_SHARE * policy.lease_ms / 1000
            self._batches = Batches(self.name, self._batch_loader, core.tasks, limit_s=limit_s)
        self._dependency_tags = core.behind
        self.near_get = near.get
        return self._path

    def bind_writes(self, core: Core, node: NodeWrites) -> None:
        """Build the write path, after ``bind``."""
        self._writes = WritePath(core, node, self.path, labels_of=self._tags_of_key)

    def unbind(self) -> None:
        """Drop the paths when the node stops."""
        self._near_hits_before = self.near_hits
        self._near_negative_hits_before = self.near_negative_hits
        self._path = self._batches = self._writes = None
        self.near_get = _not_running

    @property
    def path(self) -> ReadPath[T]:
        """The read path; raises ForebayError if the node does not run in this event loop."""
        if self._path is None:
            raise self._not_bound()
        self._path.check_loop()
        return self._path

    @property
    def writes(self) -> WritePath[T]:
        """The write path; raises ForebayError if the node does not run in this event loop."""
        if self._writes is None:
            raise self._not_bound()
        self._writes.check_loop()
        return self._writes

    def _not_bound(self) -> ForebayError:
        return ForebayError(
            f"{self.name}: the node is not running; use it inside `async with node:`"
        )

    # Reads

    async def read_in_scope(self, seen: scope.RequestScope, key: str) -> Hit[T]:
        """As ``read_kept``, through an open request scope."""
        self._count_scope_hit(seen, key)
        return await seen.read(self, key, partial(self.read_kept, key))

    async def read_kept(self, key: str) -> Hit[T]:
        """Read a key; the value is the shared one, before ``own_hit`` copies it."""
        entry = self.near_get(key)
        if entry is not None:
            return self.path.hit_of(entry)
        return await self.path.read(key, partial(self.call_of, key))

    def own_hit(self, hit: Hit[T]) -> Hit[T]:
        """The hit for one caller: a copy of the value if the cache is mutable."""
        return self._copies.own_hit(hit)

    async def read_key(self, key: str) -> Hit[T]:
        """As ``Cached.get_with_info``, by key and outside of request scopes."""
        return self.own_hit(await self.read_kept(key))

    async def read_keys(self, keys: Sequence[str]) -> list[Hit[T] | Exception]:
        """As ``Cached.many_with_info``, by key."""
        wanted = {key: partial(self.call_of, key) for key in keys}
        reads = BulkReads(self.path, self._batches)
        seen = scope.current()
        if seen is None:
            found = await reads.read(wanted)
        else:
            for key in wanted:
                self._count_scope_hit(seen, key)
            found = await seen.read_many(self, wanted, reads.read)
        return [self.own_hit(hit) if isinstance(hit := found[key], Hit) else hit for key in keys]

    def _count_scope_hit(self, seen: scope.RequestScope, key: str) -> None:
        """Count a read that the request scope answers."""
        if self._path is not None and (hit := seen.get(self, key)) is not None:
            self._path.metrics.repeated(hit)

    # Loads

    def set_batch_loader(self, loader: BatchLoader) -> None:
        """Declare the loader for many items; raises ConfigError."""
        if self._batch_loader is not None or self._path is not None:
            raise ConfigError(
                setting=f"the batch loader of {self.name}",
                value=getattr(loader, "__name__", repr(loader)),
                origin="the declaration of a cache",
                problem="a batch loader is already declared"
                if self._batch_loader
                else "the node is already running",
                fix="declare one for each cache, before `async with node:`",
            )
        refuse_sync(f"the batch loader of {self.name}", loader)
        self._batch_loader = loader

    @property
    def batched(self) -> bool:
        """Whether a batch loader is declared."""
        return self._batch_loader is not None

    def call_of(self, key: str, member: Member | None = None) -> LoadCall[T]:
        """The call that loads a key, with arguments parsed from it; raises InvalidKey."""
        keying = self.keying
        values = keying.arguments(key)
        tags = self._tags_of(keying.fields(key)) if keying.labelled else ()
        if self._batches is not None:
            run = partial(self._batches.load, keying.item(values), member)
            leave = member.leave if member else None
            return LoadCall(run, tags, leave)
        args, kwargs = keying.call(values)
        return LoadCall(partial(self._loader, *args, **kwargs), tags)

    async def refresh(self, job: RefreshJob) -> bool:
        """Load a key again under the lease of the job; false if the fill was refused."""
        try:
            call = self.call_of(job.key)
        except Exception:
            await self.path.loads.leases.give_back(job.key, job.token)
            raise
        return await self.path.refresh(job.key, job.token, call)

    # Tags and dependencies

    def labels_of(self, key: str) -> tuple[Sequence[str], Sequence[str]]:
        """The tags of this key's value and the keys it depends on; raises InvalidKey."""
        return self.keying.labels(self.keying.fields(key))

    def _tags_of_key(self, key: str) -> Sequence[str]:
        return self._tags_of(self.keying.fields(key))

    def _tags_of(self, fields: Mapping[str, Any]) -> Sequence[str]:
        """All tags of a value: its own and those of its dependencies."""
        tags, keys = self.keying.labels(fields)
        if not keys:
            return tags
        found = dict.fromkeys([*tags, *self._dependency_tags(keys)])
        found.pop(dependents_of(self.template.format(fields)), None)  # not its own dependent
        return list(found)

    # Values, policy, statistics

    def value_of(self, payload: bytes) -> T:
        """The value of msgpack bytes; raises InvalidEntry."""
        return self._copies.own(self._copies.codec.unpack(payload))

    def json_of(self, key: str, value: T) -> bytes:
        """A value that ``read_key`` returned, as JSON; raises NoJsonForm."""
        try:
            return self._copies.codec.to_json(value)
        except InvalidEntry as error:
            raise NoJsonForm(self.name, key, error.problem) from error

    def policy(self, defaults: CacheDefaults) -> Policy:
        """The declared policy with the settings' defaults; raises ConfigError."""
        return policy_of(self.declared, defaults)

    @property
    def near_hits(self) -> int:
        """Hits in the near cache since the declaration, over all starts of the node."""
        return self._near_hits_before + (self._path.near.hits if self._path else 0)

    @property
    def near_negative_hits(self) -> int:
        """The part of ``near_hits`` that were known absences."""
        now = self._path.near.negative_hits if self._path else 0
        return self._near_negative_hits_before + now

    # Legacy entries

    def declare_legacy_key(self, legacy_key: str) -> None:
        """Set ``legacy_key`` before the node starts; raises ConfigError."""
        self.declared = structs.replace(self.declared, legacy_key=legacy_key)
        self.keying = self._keying(self._loader)

    async def import_key(self, key: str, *, dry_run: bool) -> str:
        """Import the old value of this key; returns the outcome (see ``legacy``)."""
        return await self.path.import_old(key, self.call_of(key).tags, dry_run=dry_run)


def _not_running(key: str) -> NearEntry | None:
    return None
