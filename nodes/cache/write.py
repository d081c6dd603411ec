"""The write path of one cache: put, write-through, write-around, write-behind.

P   put           entry and notice; the caller knows the value to be the newest
T   write-through the sink, then entry and notice
A   write-around  the sink, then an invalidation
B   write-behind  entry, notice and job at once; the sink soon

X1  When a write returns, this node reads what it wrote, and serves nothing that depends on what
    was there before; so does every other after the notice. A negative entry is replaced too.
X2  T and A hold the key's fill lease from before the sink is written (see ``WriteLeases``), so a
    load of the row that is about to be old cannot be stored, and of two writes one comes after
    the other. The row's version is drawn under the lease: the sink's guard keeps late ones out.
X3  T fills under its lease. If that is refused (lost, or invalidated meanwhile), the key is
    invalidated, after the commit: nobody keeps an older value.
X4  A sink that fails has changed nothing here, and its error is raised as it is. If it says that
    the outcome is unknown, or the caller is cancelled from the sink's write on, the key is
    invalidated, within a second: the next reader asks the source.
X5  No lease stays: it is used, deleted or given back. What takes longer than its lease is given
    up as a transient failure with unknown outcome.
X6  A value that no entry can hold is refused before anything is written.
X7  A sink gets the same value as readers: the one decoded from the stored form.

Not covered: a process that dies between the sink and the entry leaves the old entry until it
expires, or is written again; so may a sink that stores a row after it was cancelled. B has no
such gap.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Literal, TypeVar

import anyio
import structlog
from msgspec import Struct

from ...schemas.errors import (
    Backpressure,
    ConfigError,
    FatalSinkError,
    ForebayError,
    InvalidEntry,
    InvalidValue,
    KeyBusy,
    Level,
    SinkError,
    TransientSinkError,
)
from ...schemas.jobs import Invalidates, WriteJob
from ...schemas.notices import Changed
from .. import request_scope as scope
from ..sinks.base import SinkBatch, Write
from ..sinks.serialized import Outlet
from ..strays import asked_to_stop
from ..values.packing import Packed
from .confirmations import Confirmations
from .core import Core
from .near import Reservation
from .read import ReadPath
from .shared import Receipt, Stamp
from .write_leases import Turn, WriteLease, WriteLeases

__all__ = ["WriteParts", "WritePath"]

log = structlog.get_logger(__name__)

T = TypeVar("T")
Way = Literal["put", "through", "around", "behind"]

_REFUSALS = (Backpressure, InvalidValue, KeyBusy)
_OF_LEASE = 0.9  #: what the sink may use of the lease; the rest is for the fill
_FIXES: Mapping[str, str] = {
    "oversized": "store less, or raise cache.value_bytes_max",
    "wrong_type": "give what the loader is declared to return, or correct its annotation",
}
_ENCODABLE = "give what msgpack can hold, such as a Struct, dataclass, dict or str"


class WriteParts(Struct, kw_only=True):
    """What the writes of all caches of a node share."""

    outlet_of: Callable[[str], tuple[Outlet, Mapping[str, str]] | None]  #: with the key's fields
    leases: WriteLeases
    fill: Callable[[WriteLease, Packed], Awaitable[Stamp | None]]  #: None: the lease is gone
    confirmations: Confirmations


class _Written(Struct, frozen=True):
    """A value on its way: made once, since its owner, or the sink, may change it meanwhile."""

    kept: Any  #: what the near cache has of it
    tags: Mapping[str, int]
    packed: Packed


class WritePath(Generic[T]):
    """The writes of one cache. ``labels_of(key)`` names the tags that its entry carries."""

    def __init__(
        self,
        core: Core,
        parts: WriteParts,
        reads: ReadPath[T],
        *,
        labels_of: Callable[[str], Sequence[str]],
    ) -> None:
        self.name = reads.name
        self.check_loop = core.tasks.check_loop
        self._core = core
        self._parts = parts
        self._reads = reads
        self._loads = reads.loads
        self._policy = reads.policy
        self._labels_of = labels_of

    def __repr__(self) -> str:
        return f"<WritePath {self.name}>"

    async def put(
        self,
        key: str,
        value: T | None,
        *,
        ttl_ms: int | None,
        until: Level,
        timeout_ms: int,
        token: int = 0,
    ) -> Receipt:
        """Store a value that is the newest; None for a known absence.

        Raises:
            StaleToken: a put under a later token was there before.
            Unavailable: it may have been stored. Unconfirmed: it was, here.
            InvalidValue: no entry can hold it. ConfigError: ``until`` is no level of this.
        """
        self._check_level("put", until, ("accepted", "replicated"))
        since, stamp = self._parts.confirmations.since, None
        with self._writing("put", key) as reservation:
            if value is None and not self._policy.negative_ms:
                await self._core.invalidate((key,), ())
            else:
                made = await self._made(key, value, ttl_ms)
                packed = made.packed
                stamp = await self._core.shared.put(
                    key,
                    soft_ms=packed.soft_ms,
                    hard_ms=packed.hard_ms,
                    tail=packed.tail,
                    token=token,
                )
                self._keep(reservation, stamp, made)
        receipt = Receipt(stamp=stamp, shard=self._core.shared.names.shard(key))
        return await self._parts.confirmations.reached(
            key, receipt, until, since=since, sink="", timeout_ms=timeout_ms
        )

    async def behind(
        self, key: str, value: T | None, after: Invalidates, *, until: Level, timeout_ms: int
    ) -> Receipt:
        """Store a value, and have the shard's owner bring it to the sink; None deletes the row.

        Raises:
            Backpressure: the shard's stream is full. Unavailable: the outcome may be unknown.
            Unconfirmed: accepted, and not yet as far as ``until``. DeadLettered: refused by the
            sink. ConfigError: no sink takes the key. InvalidValue: no entry can hold the value.
        """
        self._check_level("write_behind", until, ("accepted", "replicated", "sink"))
        sink = self._outlet_of(key)[0].name
        since = self._parts.confirmations.since
        with self._writing("behind", key) as reservation:
            made = await self._made(key, value)
            packed = made.packed
            job = WriteJob(key=key, value=packed.payload, invalidates=after)
            receipt = await self._core.shared.write(
                job, soft_ms=packed.soft_ms, hard_ms=packed.hard_ms, tail=packed.tail
            )
            if receipt.stamp is not None:
                if value is None:
                    self._written(key, receipt.stamp)
                else:
                    self._keep(reservation, receipt.stamp, made)
        return await self._parts.confirmations.reached(
            key, receipt, until, since=since, sink=sink, timeout_ms=timeout_ms
        )

    async def through(self, key: str, value: T | None, *, timeout_ms: int) -> Receipt:
        """Store a value in the source, then in the cache; None deletes the row.

        Raises:
            SinkError: as the sink raised it. KeyBusy: others had the key for ``timeout_ms``.
            ConfigError: no sink takes the key. InvalidValue: no entry can hold the value.
            Unavailable: before, or after the source took it; write it again.
        """
        fills = value is not None or self._policy.negative_ms > 0
        return await self._past_sink("through", key, value, fills=fills, timeout_ms=timeout_ms)

    async def around(self, key: str, value: T | None, *, timeout_ms: int) -> Receipt:
        """Store a value in the source, and have all forget the entry. Raises as ``through``."""
        return await self._past_sink("around", key, value, fills=False, timeout_ms=timeout_ms)

    async def pack_published(self, key: str, raw_json: bytes, ttl_ms: int | None) -> Packed:
        """A published value, checked against the declared type; JSON null deletes.

        Raises:
            msgspec.ValidationError: it is not of that type. InvalidEntry: it is too large.
        """
        kept = self._published(raw_json)
        tags = await self._loads.tags_of(self._labels_of(key))
        return self._loads.pack(kept, tags, ttl_ms=ttl_ms)

    def check_published(self, raw_json: bytes) -> None:
        """Raises as ``pack_published``, if that would."""
        if (value := self._published(raw_json)) is not None:
            self._reads.codec.pack(value)

    def _published(self, raw_json: bytes) -> T | None:
        return None if raw_json.strip() == b"null" else self._reads.codec.convert(raw_json)

    async def _past_sink(
        self, way: Way, key: str, value: T | None, *, fills: bool, timeout_ms: int
    ) -> Receipt:
        outlet, params = self._outlet_of(key)
        with self._writing(way, key) as reservation:
            made = await self._made(key, value)
            give_back, lease_ms = self._loads.leases.give_back, self._policy.lease_ms
            lease = await self._parts.leases.take(Turn(key, lease_ms, timeout_ms, give_back))
            touched = True
            try:
                try:
                    own = self._loads.own(made.kept)
                    write = Write(key=key, params=params, value=own, version=lease.version)
                    await self._sink(outlet, write, lease)
                except SinkError as error:
                    touched = error.outcome_unknown
                    raise
                stamp = await self._fill(lease, made.packed) if fills else None
                if stamp is None:
                    await self._core.invalidate((key,), ())
            except BaseException:
                await self._let_go(lease, touched=touched)
                raise
            if stamp is not None:
                self._keep(reservation, stamp, made)
        shard = self._core.shared.names.shard(key)
        return Receipt(stamp=stamp, shard=shard, reached="sink")

    async def _sink(self, outlet: Outlet, write: Write[Any], lease: WriteLease) -> None:
        limit_s = _OF_LEASE * self._policy.lease_ms / 1000
        left_s = lease.taken_at + limit_s - self._core.clock.monotonic()
        with anyio.move_on_after(left_s):
            try:
                return await outlet.write_beside(SinkBatch(writes=(write,)))
            except SinkError:
                raise
            except BaseException as error:
                if asked_to_stop(error):
                    raise
                problem = f"the sink raised {type(error).__name__}: {error}"
                raise FatalSinkError(problem, outcome_unknown=True) from error
        problem = f"{outlet.name} took longer than the lease of {limit_s:g} s"
        raise TransientSinkError(problem, outcome_unknown=True)

    async def _fill(self, lease: WriteLease, packed: Packed) -> Stamp | None:
        stamp = await self._parts.fill(lease, packed)
        if stamp is None:
            self._core.instruments.counts["fills_refused", self.name] += 1
        return stamp

    async def _let_go(self, lease: WriteLease, *, touched: bool) -> None:
        """Give the lease back; where the source may have the value, by an invalidation."""
        if not touched:
            await self._loads.leases.give_back(lease.key, lease.token)
            return
        problem = "no answer within a second"
        with anyio.move_on_after(1, shield=True):
            try:
                await self._core.invalidate((lease.key,), ())
            except ForebayError as error:
                problem = str(error)
            else:
                return
        log.error("write.not_invalidated", cache=self.name, key=lease.key, error=problem)

    async def _made(self, key: str, value: T | None, ttl_ms: int | None = None) -> _Written:
        tags = await self._loads.tags_of(self._labels_of(key))
        try:
            made = None if value is None else self._reads.codec.made(value)
            payload = None if made is None else made.payload
            packed = self._loads.envelope(payload, tags, ttl_ms=ttl_ms)
        except InvalidEntry as error:
            fix = _FIXES.get(error.fault, _ENCODABLE)
            raise InvalidValue(self.name, key, str(error), fix=fix) from error
        return _Written(None if made is None else made.kept, tags, packed)

    def _written(self, key: str, stamp: Stamp) -> None:
        """Known here before its notice comes; so is that what depends on it is old (X1)."""
        self._core.hear(stamp.version, Changed(key, self._core.node_id, outdates=True))

    def _keep(self, reservation: Reservation, stamp: Stamp, made: _Written) -> None:
        packed = made.packed
        self._written(reservation.key, stamp)
        size, lifetime_ms = len(packed.payload or b""), packed.meta.soft_ms
        self._loads.keep(reservation, stamp, made.kept, made.tags, size, lifetime_ms)

    @contextmanager
    def _writing(self, way: Way, key: str) -> Iterator[Reservation]:
        near, end = self._reads.near, "unknown"
        reservation = near.reserve(key)
        try:
            yield reservation
            end = "stored"
        except _REFUSALS:
            end = "refused"
            raise
        except SinkError as error:
            end = "unknown" if error.outcome_unknown else "refused"
            raise
        finally:
            near.release(reservation)
            # Also if the outcome is unknown.
            scope.forget((key,), more=self._loads.is_depended_on(key))
            self._core.instruments.counts["writes", self.name, way, end] += 1

    def _outlet_of(self, key: str) -> tuple[Outlet, Mapping[str, str]]:
        found = self._parts.outlet_of(key)
        if found is None:
            raise ConfigError(
                setting="the sink",
                value=key,
                origin=f"a write of {self.name}",
                problem="no sink takes this key",
                fix=f"declare one with @node.sink, of the template of {self.name}, also where only "
                "others work: all nodes of a namespace run the same application",
            )
        return found

    def _check_level(self, what: str, until: Level, levels: Sequence[Level]) -> None:
        if until not in levels:
            raise ConfigError(
                setting="until",
                value=repr(until),
                origin=f"a {what} of {self.name}",
                problem="it has no such level",
                fix=f"give one of {', '.join(levels)}",
            )
