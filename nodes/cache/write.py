"""The write path of one cache: put, write-through, write-around, write-behind.

P   put           the entry and its notice; the caller knows the value to be the newest
T   write-through the sink, then the entry and its notice
A   write-around  the sink, then an invalidation
B   write-behind  the entry, its notice and a write job at once; the sink soon after

X1  When a write returns, this node reads the written value and serves no dependent that was
    computed from the old one. Other nodes do so after the notice. A negative entry is replaced too.
X2  T and A hold the key's fill lease from before the sink is written (E1), so a concurrent load of
    the old row cannot be stored, and two writes run one after the other. The row's version is drawn
    under the lease; the sink refuses rows with an older version.
X3  T fills the entry under its lease. If the fill is refused (the lease was lost, or the key was
    invalidated meanwhile), the key is invalidated after the commit: no node keeps an older value.
X4  A sink that fails has changed nothing in the cache, and its error is raised unchanged. If its
    outcome is unknown, or the caller is cancelled after the sink's write began, the key is
    invalidated within a second: the next reader asks the source.
X5  No lease stays behind: it is used, deleted or released. A sink that takes longer than the lease
    is a transient failure with unknown outcome.
X6  A value that no entry can hold is refused before anything is written.
X7  A sink gets the same value as readers: the one decoded from the stored form.

The write lease is the key's fill lease:

E1  It is also granted if the key has an entry, but not while a write-behind is pending: the sink
    stores that write first.
E2  A waiting write is woken by the notice of the holder's fill or by the sink's checkpoint, and
    polls at least every 250 ms.
E3  With the lease comes a version for the row, later than any version the key had before.
E4  A write that gives up or is cancelled while it waits releases the lease within a second.

Not covered: a process that dies between the sink and the entry leaves the old entry until it
expires or is written again; so may a sink that stores a row after it was cancelled. B has no such
gap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from ..cancellation import asked_to_stop
from ..sinks.base import SinkBatch, Write
from ..sinks.serialized import Outlet
from ..values.packing import Packed
from .core import Core
from .near import Reservation
from .node_writes import NodeWrites
from .read import ReadPath
from .shared import Receipt, Stamp

log = structlog.get_logger(__name__)

T = TypeVar("T")
Way = Literal["put", "through", "around", "behind"]

_POLL_MS = 250
_LEASE_HELD, _LEASE_GRANTED = 0, 1  # 2: a write-behind is pending
_SINK_SHARE = 0.9  #: of the lease; the rest is for the fill
_REFUSALS = (Backpressure, InvalidValue, KeyBusy)
_FIXES: Mapping[str, str] = {
    "oversized": "store less, or raise cache.value_bytes_max",
    "wrong_type": "return the loader's declared type, or correct its annotation",
}
_ENCODABLE = "give a value that msgpack can encode, such as a Struct, dataclass, dict or str"


class WriteLease(Struct, frozen=True):
    """The right to write a key's row to the sink and to fill its entry afterwards."""

    key: str
    token: str
    version: int  #: of the row
    requested_at: float  #: monotonic seconds, before the request was sent


class _NewValue(Struct, frozen=True):
    """A value to write, encoded once: its owner or the sink may change the object meanwhile."""

    kept: Any  #: for the near cache
    tags: Mapping[str, int]
    packed: Packed


class WritePath(Generic[T]):
    """The writes of one cache. ``labels_of(key)`` gives the tags that its entry carries."""

    def __init__(
        self,
        core: Core,
        node: NodeWrites,
        reads: ReadPath[T],
        *,
        labels_of: Callable[[str], Sequence[str]],
    ) -> None:
        self.name = reads.name
        self.check_loop = core.tasks.check_loop
        self._core = core
        self._node = node
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
        """Store a value that is the newest; None stores a known absence.

        Raises:
            StaleToken: the entry was put under a later token.
            Unavailable: the value may have been stored. Unconfirmed: it was stored on this server.
            InvalidValue: no entry can hold it. ConfigError: ``until`` is not a level of put.
        """
        self._check_level("put", until, ("accepted", "replicated"))
        history, stamp = self._node.history, None
        with self._writing("put", key) as reservation:
            if value is None and not self._policy.negative_ms:
                await self._core.invalidate((key,), ())
            else:
                new = await self._encode(key, value, ttl_ms)
                packed = new.packed
                stamp = await self._core.shared.put(
                    key,
                    soft_ms=packed.soft_ms,
                    hard_ms=packed.hard_ms,
                    tail=packed.tail,
                    token=token,
                )
                self._keep(reservation, stamp, new)
        receipt = Receipt(stamp=stamp, shard=self._core.shared.names.shard(key))
        return await self._node.confirm(
            key, receipt, until, history=history, sink="", timeout_ms=timeout_ms
        )

    async def write_behind(
        self, key: str, value: T | None, after: Invalidates, *, until: Level, timeout_ms: int
    ) -> Receipt:
        """Store a value and a job for the shard's owner to write it to the sink; None deletes.

        Raises:
            Backpressure: the shard's stream is full. Unavailable: the outcome may be unknown.
            Unconfirmed: accepted, but ``until`` is not confirmed. DeadLettered: the sink refused
            the write. ConfigError: no sink takes the key. InvalidValue: no entry can hold it.
        """
        self._check_level("write_behind", until, ("accepted", "replicated", "sink"))
        sink = self._sink_of(key)[0].name
        history = self._node.history
        with self._writing("behind", key) as reservation:
            new = await self._encode(key, value)
            packed = new.packed
            job = WriteJob(key=key, value=packed.payload, invalidates=after)
            receipt = await self._core.shared.write(
                job, soft_ms=packed.soft_ms, hard_ms=packed.hard_ms, tail=packed.tail
            )
            if receipt.stamp is not None:
                if value is None:
                    self._apply_change(key, receipt.stamp)
                else:
                    self._keep(reservation, receipt.stamp, new)
        return await self._node.confirm(
            key, receipt, until, history=history, sink=sink, timeout_ms=timeout_ms
        )

    async def write_through(self, key: str, value: T | None, *, timeout_ms: int) -> Receipt:
        """Store a value in the source, then in the cache; None deletes the row.

        Raises:
            SinkError: as the sink raised it. KeyBusy: the key was busy for ``timeout_ms``.
            ConfigError: no sink takes the key. InvalidValue: no entry can hold the value.
            Unavailable: before or after the source stored the value; write it again.
        """
        fills = value is not None or self._policy.negative_ms > 0
        return await self._write_source("through", key, value, fills=fills, timeout_ms=timeout_ms)

    async def write_around(self, key: str, value: T | None, *, timeout_ms: int) -> Receipt:
        """Store a value in the source, then invalidate the entry. Raises as ``write_through``."""
        return await self._write_source("around", key, value, fills=False, timeout_ms=timeout_ms)

    async def _write_source(
        self, way: Way, key: str, value: T | None, *, fills: bool, timeout_ms: int
    ) -> Receipt:
        sink, params = self._sink_of(key)
        with self._writing(way, key) as reservation:
            new = await self._encode(key, value)
            lease = await self._acquire_lease(key, timeout_ms)
            changed = True
            try:
                try:
                    own = self._loads.own(new.kept)
                    write = Write(key=key, params=params, value=own, version=lease.version)
                    await self._write_sink(sink, write, lease)
                except SinkError as error:
                    changed = error.outcome_unknown
                    raise
                stamp = await self._fill(lease, new.packed) if fills else None
                if stamp is None:
                    await self._core.invalidate((key,), ())
            except BaseException:
                await self._release_lease(lease, changed=changed)
                raise
            if stamp is not None:
                self._keep(reservation, stamp, new)
        shard = self._core.shared.names.shard(key)
        return Receipt(stamp=stamp, shard=shard, reached="sink")

    async def _acquire_lease(self, key: str, timeout_ms: int) -> WriteLease:
        """Wait for the key's lease.

        Raises:
            KeyBusy: not within ``timeout_ms``. Unavailable, ServerRefused: the lease is not held.
        """
        core, node, token = self._core, self._node, self._core.ids()
        began = core.clock.monotonic()
        try:
            while True:
                with core.waits.watch(key) as noticed, node.watch_checkpoint(key) as stored:
                    requested_at = core.clock.monotonic()
                    code, *rest = await node.begin_write(key, token, self._policy.lease_ms)
                    if code == _LEASE_GRANTED:
                        return WriteLease(key, token, int(rest[0]), requested_at)
                    left_ms = self._left_ms(key, code, began, timeout_ms)
                    if code == _LEASE_HELD:
                        await self._sleep(noticed, min(left_ms, max(int(rest[0]), 1)))
                    else:
                        await self._sleep(stored, left_ms)
        except BaseException:
            await self._loads.leases.give_back(key, token)  # it may have been granted
            raise

    def _left_ms(self, key: str, code: int, began: float, timeout_ms: int) -> int:
        waited_ms = int((self._core.clock.monotonic() - began) * 1000)
        if waited_ms >= timeout_ms:
            raise KeyBusy(key, "lease" if code == _LEASE_HELD else "write_behind", waited_ms)
        return timeout_ms - waited_ms

    async def _sleep(self, event: anyio.Event, longest_ms: int) -> None:
        poll_ms = _POLL_MS * (1 - self._core.rng.random() / 2)
        with anyio.move_on_after(min(longest_ms, poll_ms) / 1000):
            await event.wait()

    async def _write_sink(self, sink: Outlet, write: Write[Any], lease: WriteLease) -> None:
        limit_s = _SINK_SHARE * self._policy.lease_ms / 1000
        left_s = lease.requested_at + limit_s - self._core.clock.monotonic()
        with anyio.move_on_after(left_s):
            try:
                return await sink.write_beside(SinkBatch(writes=(write,)))
            except SinkError:
                raise
            except BaseException as error:
                if asked_to_stop(error):
                    raise
                problem = f"the sink raised {type(error).__name__}: {error}"
                raise FatalSinkError(problem, outcome_unknown=True) from error
        problem = f"sink {sink.name} took longer than its share of the lease, {limit_s:g} s"
        raise TransientSinkError(problem, outcome_unknown=True)

    async def _fill(self, lease: WriteLease, packed: Packed) -> Stamp | None:
        stamp = await self._node.fill(lease.key, lease.token, packed)
        if stamp is None:
            self._core.instruments.counts["fills_refused", self.name] += 1
        return stamp

    async def _release_lease(self, lease: WriteLease, *, changed: bool) -> None:
        """Release the lease; if the source may have changed, by invalidating the key."""
        if not changed:
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

    async def _encode(self, key: str, value: T | None, ttl_ms: int | None = None) -> _NewValue:
        tags = await self._loads.tags_of(self._labels_of(key))
        try:
            encoded = None if value is None else self._reads.codec.encode(value)
            payload = None if encoded is None else encoded.payload
            packed = self._loads.envelope(payload, tags, ttl_ms=ttl_ms)
        except InvalidEntry as error:
            fix = _FIXES.get(error.fault, _ENCODABLE)
            raise InvalidValue(self.name, key, str(error), fix=fix) from error
        return _NewValue(None if encoded is None else encoded.kept, tags, packed)

    def _apply_change(self, key: str, stamp: Stamp) -> None:
        """Apply the change here before its notice arrives; dependents become stale too (X1)."""
        self._core.hear(stamp.version, Changed(key, self._core.node_id, outdates=True))

    def _keep(self, reservation: Reservation, stamp: Stamp, new: _NewValue) -> None:
        packed = new.packed
        self._apply_change(reservation.key, stamp)
        size, lifetime_ms = len(packed.payload or b""), packed.meta.soft_ms
        self._loads.keep(reservation, stamp, new.kept, new.tags, size, lifetime_ms)

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

    def _sink_of(self, key: str) -> tuple[Outlet, Mapping[str, str]]:
        found = self._node.sink_of(key)
        if found is None:
            raise ConfigError(
                setting="the sink",
                value=key,
                origin=f"a write of {self.name}",
                problem="no sink is declared for this key",
                fix=f"declare one with @node.sink for the template of {self.name}, also on nodes "
                "without workers: all nodes of a namespace run the same application",
            )
        return found

    def _check_level(self, write: str, until: Level, levels: Sequence[Level]) -> None:
        if until not in levels:
            raise ConfigError(
                setting="until",
                value=repr(until),
                origin=f"a {write} of {self.name}",
                problem="is not a level of this write",
                fix=f"give one of {', '.join(levels)}",
            )

    # Values published as events

    async def pack_published(self, key: str, raw_json: bytes, ttl_ms: int | None) -> Packed:
        """A published value, checked against the declared type; JSON null deletes.

        Raises:
            msgspec.ValidationError: it is not of that type. InvalidEntry: it is too large.
        """
        value = self._published(raw_json)
        tags = await self._loads.tags_of(self._labels_of(key))
        return self._loads.pack(value, tags, ttl_ms=ttl_ms)

    def check_published(self, raw_json: bytes) -> None:
        """Check that ``pack_published`` accepts the value; raises the same errors."""
        if (value := self._published(raw_json)) is not None:
            self._reads.codec.pack(value)

    def _published(self, raw_json: bytes) -> T | None:
        return None if raw_json.strip() == b"null" else self._reads.codec.from_json(raw_json)
