"""Legacy entries: values that another service stored as JSON, imported at their first read.

    @node.cached("product:{id}", ttl=60, legacy_key="v1:product:{id}")

Y1  Only on a miss, the holder of the key's fill lease reads the value at the old name, its lifetime
    and the marks, in one round trip. The value is stored as the key's entry.
Y2  Each invalidation and each write marks its keys and tags, and so does each value stored for a
    key of such a cache (``_change.lua`` C8). If the key, or a tag that the entry would carry, has a
    mark, the old value may be outdated and is not used. Tags are captured before marks are read.
Y3  Marks are kept for longer than ``WINDOW_S`` after a node first declared the cache with a
    ``legacy_key``. After that time, and in a shard that had too many marks, old values are not
    used. Changes before that first start have no mark.
Y4  The entry expires when the old value would have; without a lifetime, after the cache's own. It
    is fresh until ``stale_at`` or, without one, until it expires. Its age is unknown.
Y5  A value at the old name is never changed and never an error. An unusable value is a miss; it is
    counted, and logged once a minute.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar, cast

import structlog
from msgspec import Struct

from ...coordinator.log_once import LogOnce
from ...coordinator.valkey.link import Commands, Reply
from ...coordinator.valkey.scripting import Call, Scripts, granted, run, run_many
from ...schemas.entry import FOREVER_MS, Entry, read_legacy
from ...schemas.errors import ForebayError, InvalidEntry, ServerRefused
from ...schemas.keys import Names, dependents_of
from ...schemas.replies import INTEGER_MAX, integer
from ..values.packing import Packed
from .core import Core, Hit, Lease
from .declaration import LONGEST_S
from .load import LoadPath
from .near import Reservation
from .policy import Policy
from .refreshing import RefreshRequests

log = structlog.get_logger(__name__)

T = TypeVar("T")
Result = Literal["used", "absent", "outdated", "unreadable", "refused", "closed"]

WINDOW_S = 30 * 86_400  #: less than LEGACY_MARK_MS in _change.lua
_UNTIL = re.compile(rb"[0-9]{1,16}")
_GONE = -2  #: PTTL of a missing key
_ABSENCE = b"null"


class LegacyValue(Struct, frozen=True):
    """The value at the old name; ``payload`` is its msgpack, None for a known absence."""

    value: Any
    payload: bytes | None
    soft_ms: int
    hard_ms: int


class LegacyEntries(Generic[T]):
    """The legacy entries of one cache. ``name_of(key)`` is the old name of a key."""

    def __init__(
        self,
        core: Core,
        loads: LoadPath[T],
        refreshes: RefreshRequests,
        name_of: Callable[[str], str],
    ) -> None:
        self.name_of = name_of
        self.late = 0  #: number of shards with changes from before marks began
        self.until_ms = 0  #: old values are used until then, in milliseconds of the server's clock
        self._core = core
        self._names = core.shared.names
        self._loads = loads
        self._refreshes = refreshes
        self._trouble = LogOnce(core.clock)
        core.instruments.declare("legacy", loads.name)

    def __repr__(self) -> str:
        return f"<LegacyEntries of {self._loads.name}>"

    async def import_entry(self, lease: Lease, reservation: Reservation) -> Hit[T] | None:
        """Store the old value as the key's entry, under the lease.

        Returns None if there is no usable value; the lease is then still held.
        """
        return (await self.try_import(lease, reservation))[1]

    async def try_import(
        self, lease: Lease, reservation: Reservation
    ) -> tuple[Result, Hit[T] | None]:
        """As ``import_entry``, with the outcome."""
        hit = None
        try:
            found, tags = await self._found(lease)
            if isinstance(found, LegacyValue):
                hit = await self._stored(lease, found, tags, reservation)
                result: Result = "outdated" if hit is None else "used"
            else:
                result = found
        except ForebayError as error:
            result = "refused"
            self._say(lease.key, result, error)
        except BaseException:
            await self._loads.leases.give_back(lease.key, lease.token)
            raise
        self._core.instruments.counts["legacy_entries", self._loads.name, result] += 1
        return result, hit

    async def check_import(self, key: str, tags: Sequence[str]) -> Result:
        """The outcome that ``import_entry`` would have; stores nothing."""
        found = await self._read(key, tags)
        return found if isinstance(found, str) else "used"

    async def _found(self, lease: Lease) -> tuple[LegacyValue | Result, Mapping[str, int]]:
        more = await self._loads.inherited_tags(lease)
        if more is None:
            return "outdated", {}
        tags = {**lease.tags, **more}
        return await self._read(lease.key, tuple(tags)), tags

    async def _read(self, key: str, tags: Sequence[str]) -> LegacyValue | Result:
        if self._core.server_clock.now_ms() >= self.until_ms:
            return "closed"
        name, bytes_max = self.name_of(key), self._loads.codec.bytes_max
        marks = self._mark_commands([dependents_of(key), *tags])
        # The lifetime comes first: a value stored in between expires too early, never too late.
        left, raw, *marked = await self._core.commands.call_many(
            [("PTTL", name), ("GETRANGE", name, 0, bytes_max), *marks]
        )
        if left == _GONE or raw == b"":
            return "absent"
        if (barrier := _barrier(marked)) is not None:
            return barrier
        try:
            entry = read_legacy(_text(raw), bytes_max=bytes_max)
            return self._usable(entry, int(granted([left])[0]))
        except InvalidEntry as error:
            self._say(key, "unreadable", error)
            return "unreadable"

    def _mark_commands(self, labels: Iterable[str]) -> list[tuple[str, ...]]:
        by_shard: dict[int, list[str]] = defaultdict(list)
        for label in dict.fromkeys(labels):
            by_shard[self._names.shard(label)].append(label)
        commands: list[tuple[str, ...]] = []
        for shard, found in by_shard.items():
            commands.append(("HGET", self._names.part(shard, "head"), "l"))
            commands.append(("ZMSCORE", self._names.part(shard, "legacy"), *found))
        return commands

    def _usable(self, entry: Entry, left_ms: int) -> LegacyValue | Result:
        policy, codec = self._loads.policy, self._loads.codec
        soft_ms, hard_ms = lifetimes(entry, left_ms, self._core.server_clock.now_ms(), policy)
        if hard_ms <= 0:
            return "absent"
        if entry.payload.strip() == _ABSENCE:
            if not policy.negative_ms:
                return "absent"
            hard_ms = min(hard_ms, policy.negative_ms)
            return LegacyValue(None, None, min(soft_ms, hard_ms), hard_ms)
        made = codec.encoded_in(entry)
        return LegacyValue(made.kept, codec.check_size(made.payload), soft_ms, hard_ms)

    async def _stored(
        self, lease: Lease, found: LegacyValue, tags: Mapping[str, int], reservation: Reservation
    ) -> Hit[T] | None:
        loads, key = self._loads, lease.key
        packed = loads.imported(found.payload, tags, soft_ms=found.soft_ms, hard_ms=found.hard_ms)
        stamp = await self._core.shared.fill(
            key,
            lease.token,
            soft_ms=packed.soft_ms,
            hard_ms=packed.hard_ms,
            tail=packed.tail,
            mark=True,
        )
        if stamp is None:
            return None
        entry = _entry(packed, stamp.version, stamp.soft_at_ms, stamp.hard_at_ms)
        size, is_stale = len(packed.payload or b""), found.soft_ms <= 0
        if is_stale:
            self._refreshes.ask(key, entry.version)
        else:
            loads.keep(reservation, entry, found.value, tags, size, packed.meta.soft_ms)
        return Hit(cast(T, found.value), "shared", entry.version, None, is_stale, size)

    def _say(self, key: str, result: Result, error: ForebayError) -> None:
        fix = (
            "check which service stores this name"
            if result == "unreadable"
            else "grant this user the right to read it"
        )
        self._trouble.say(
            log,
            f"legacy.{result}",
            error,
            cache=self._loads.name,
            key=key,
            name=self.name_of(key),
            fix=fix,
        )


def lifetimes(entry: Entry, left_ms: int, now_ms: int, policy: Policy) -> tuple[int, int]:
    """How long the entry is fresh and how long it is kept; ``left_ms`` is a reply of PTTL."""
    if left_ms >= 0:
        fresh_ms = hard_ms = min(left_ms, LONGEST_S * 1000)
    else:
        fresh_ms, hard_ms = policy.ttl_ms, policy.ttl_ms + policy.stale_ms
    if entry.soft_at_ms < FOREVER_MS:
        fresh_ms = min(fresh_ms, max(entry.soft_at_ms, 1) - now_ms)
    return fresh_ms, hard_ms


def _text(reply: Reply) -> bytes:
    """Raises InvalidEntry if it is not a string, ServerRefused if the user may not read it."""
    if isinstance(reply, ServerRefused):
        if reply.code != "WRONGTYPE":
            raise reply
        raise InvalidEntry("bad_magic", "it is not a string")
    return bytes(reply)


def _barrier(marked: Sequence[Reply]) -> Result | None:
    """Why no old value may be used, from the heads and marks of the shards; None if it may."""
    for until, scores in zip(marked[::2], marked[1::2], strict=True):
        for reply in (until, scores):
            if isinstance(reply, ServerRefused) and reply.code != "WRONGTYPE":
                raise reply
        is_open = isinstance(until, bytes) and _UNTIL.fullmatch(until) and int(until) > 0
        if not is_open or not isinstance(scores, list):
            return "closed"
        if any(score is not None for score in scores):
            return "outdated"
    return None


def _entry(packed: Packed, version: int, soft_at_ms: int, hard_at_ms: int) -> Entry:
    return Entry(
        version=version,
        soft_at_ms=soft_at_ms,
        hard_at_ms=hard_at_ms,
        kind="n" if packed.payload is None else "v",
        codec="m",
        payload=packed.payload or b"",
        meta=packed.meta,
    )


async def begin_marks(
    commands: Commands,
    names: Names,
    scripts: Scripts,
    entries: Mapping[str, LegacyEntries[Any]],
) -> None:
    """Start marking changes for these caches, by the shape of their templates.

    A cache's window begins at the first start of a node that declares its ``legacy_key``.
    """
    seconds, _ = await commands.call("TIME")
    until_ms = 0
    for shape, each in entries.items():
        field, now_ms = f"legacy:{shape}", int(seconds) * 1000
        reply = await run(commands, scripts["meta_set"], [names.meta], [field, now_ms])
        first_ms = integer(reply, f"the field {field} of {names.meta}", high=INTEGER_MAX)
        each.until_ms = min(first_ms, now_ms) + WINDOW_S * 1000
        until_ms = max(until_ms, each.until_ms)
        if each.until_ms <= now_ms:
            fix = "remove legacy_key: values at old names are no longer used"
            log.warning("legacy.over", template=shape, fix=fix)
    heads = [names.part(shard, "head") for shard in range(names.shards)]
    calls = [Call(script=scripts["legacy_begin"], keys=[head], args=[until_ms]) for head in heads]
    late = sum(int(reply[1]) for reply in granted(await run_many(commands, calls)))
    for each in entries.values():
        each.late = late
    if late:
        reason = "keys changed before marks began: their old values may be used"
        log.warning("legacy.late", shards=late, reason=reason)
