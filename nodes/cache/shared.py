"""The shared tier: entries, leases and tags in Valkey, by the scripts that keep them right.

S1  Reads are coalesced (see ``Lookups``).
S2  Every change goes through a script that also appends its notice; see coordinator/scripts.
S3  Versions and lifetimes are the server's; durations go in, points in time come out.

What an entry means is ``decide``'s business; what its value is, the cache's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from msgspec import Struct

from ...coordinator.valkey.link import Arg, Commands, Reply
from ...coordinator.valkey.scripting import Call, Scripts, granted, run, run_many
from ...schemas.errors import Backpressure, Level
from ...schemas.errors_locks import StaleToken
from ...schemas.jobs import RefreshJob, WriteJob, write_job
from ...schemas.keys import Names, dependents_of
from ...schemas.notices import Bumped, Changed, Dropped, Extended, Notice, write_notice
from ...schemas.settings import Durable
from .batched_lookups import Lookups
from .tags import Captured

__all__ = ["Granted", "Held", "Newer", "Receipt", "SharedTier", "Stamp"]

_TOGETHER = 200
SEEN_MAX = 100_000  #: event ids that a shard remembers
TAG_KEEP_MS = 30 * 86_400_000  #: tag versions unused for longer are made anew


class Stamp(Struct, frozen=True):
    """What the server gave to a stored entry."""

    version: int
    soft_at_ms: int
    hard_at_ms: int


class Receipt(Struct, frozen=True, kw_only=True):
    """What became of a write. ``pressure``: how full the shard's stream is, 0 to 1."""

    stamp: Stamp | None  #: of the entry; None: none was stored
    shard: int
    job_id: str = ""
    pressure: float = 0.0
    reached: Level = "accepted"
    forgotten: int = 0  #: event ids that are remembered no longer, for lack of room


class Granted(Struct, frozen=True):
    entry: bytes | None  #: what is there still, and will not do
    since: int  #: the server's clock, in microseconds


class Newer(Struct, frozen=True):
    entry: bytes


class Held(Struct, frozen=True):
    left_ms: int
    failing: bool = False  #: nobody has it: the source failed, and is left alone so long


class SharedTier:
    """``origin`` is this node's id: it marks notices, so that the node knows its own."""

    def __init__(
        self,
        commands: Commands,
        reader: Commands,
        names: Names,
        scripts: Scripts,
        *,
        origin: str,
        durable: Durable,
    ) -> None:
        self.names = names
        self._commands = commands
        self._scripts = scripts
        self._origin = origin
        self._durable = durable
        self.get = Lookups(reader, names).get

    async def begin(
        self, key: str, token: str, *, lease_ms: int, seen: int, patient: bool = False
    ) -> Granted | Newer | Held:
        """Take the fill lease of a key, or learn what stands in the way.

        ``patient``: leave a source alone that failed lately.
        """
        names = self.names
        taken, entry, *more = await run(
            self._commands,
            self._scripts["entry_begin"],
            [names.entry(key), names.lease(key)],
            [token, lease_ms, seen, int(patient)],
        )
        if taken:
            return Granted(None if entry is None else bytes(entry), int(more[0]))
        if entry is not None:
            return Newer(bytes(entry))
        return Held(max(int(more[0]), 1), failing=bool(more[1]))

    async def fill(
        self, key: str, token: str, *, soft_ms: int, hard_ms: int, tail: bytes, mark: bool = False
    ) -> Stamp | None:
        """Store what was loaded under the lease; None if the lease is gone.

        ``mark``: no entry of another service shall be brought over for the key afterwards.
        """
        args = [token, soft_ms, hard_ms, tail, *self._announcement(key, Changed(key, self._origin))]
        reply = await run(
            self._commands,
            self._scripts["entry_fill"],
            self.entry_keys(key),
            [*args, dependents_of(key) if mark else ""],
        )
        return _stamp(reply[1:]) if reply[0] else None

    async def extend(
        self, key: str, token: str, *, since: int, soft_ms: int, hard_ms: int, middle: bytes
    ) -> Stamp | Literal["changed"] | None:
        """Let the entry of this version live on; None if the lease is gone, ``changed`` if
        another entry is there.
        """
        notice = Extended(key, since, soft_ms, hard_ms)
        reply = await run(
            self._commands,
            self._scripts["entry_extend"],
            self.entry_keys(key),
            [token, since, soft_ms, hard_ms, middle, *self._announcement(key, notice)],
        )
        if reply[0] == 2:
            return "changed"
        return _stamp(reply[1:]) if reply[0] else None

    async def put(
        self, key: str, *, soft_ms: int, hard_ms: int, tail: bytes, token: int = 0
    ) -> Stamp:
        """Store a value known to be the newest; raises StaleToken under an old fencing token."""
        names, script = self.names, self._scripts["entry_put"]
        keys = [*self.entry_keys(key), names.tag(dependents_of(key)), names.fence(key)]
        args = [soft_ms, hard_ms, tail, *self.written(key), TAG_KEEP_MS, token]
        reply = await run(self._commands, script, keys, args)
        if not reply[0]:
            raise StaleToken(key, token, int(reply[1]))
        return _stamp(reply[1:])

    def write_call(
        self,
        job: WriteJob,
        *,
        soft_ms: int,
        hard_ms: int,
        tail: bytes,
        mark: str = "",
        published_ms: int = 0,
        at_full: bool = False,
    ) -> Call:
        """The script of a write-behind; ``receipt`` reads its reply.

        ``published_ms``: on the server's clock; lifetimes count from then. 0: now.
        ``at_full``: it may use memory beyond the server's limit.
        """
        names, durable, key = self.names, self._durable, job.key
        shard = names.shard(key)
        return Call(
            script=self._scripts["entry_write"],
            keys=[
                *self.entry_keys(key),
                names.part(shard, "writes"),
                names.part(shard, "seen"),
                names.tag(dependents_of(key)),
            ],
            args=[
                soft_ms,
                hard_ms,
                tail,
                *self.written(key, published_ms),
                write_job(job),
                durable.writes_max,
                names.work,
                mark,
                durable.dedupe_ms if job.event_id else 0,
                TAG_KEEP_MS,
                job.event_id,
                published_ms,
                SEEN_MAX,
                int(at_full),
            ],
        )

    def receipt(self, key: str, reply: Reply) -> Receipt:
        """What the script of ``write_call`` answered.

        Raises:
            Backpressure: the shard's stream is full; nothing was changed.
        """
        shard, bound = self.names.shard(key), self._durable.writes_max
        if reply[0] == 0:
            raise Backpressure(self.names.part(shard, "writes"), int(reply[1]), bound)
        if reply[0] == 2:
            return Receipt(stamp=None, shard=shard)
        return Receipt(
            stamp=_stamp(reply[1:4]),
            shard=shard,
            job_id=bytes(reply[4]).decode(),
            pressure=int(reply[5]) / bound,
            forgotten=sum(map(int, reply[6:])),
        )

    async def write(self, job: WriteJob, *, soft_ms: int, hard_ms: int, tail: bytes) -> Receipt:
        """Write behind: entry, notice and job at once.

        Raises:
            Backpressure: the shard's stream is full; nothing was changed.
        """
        call = self.write_call(job, soft_ms=soft_ms, hard_ms=hard_ms, tail=tail)
        return self.receipt(job.key, await run(self._commands, call.script, call.keys, call.args))

    def invalidate_calls(
        self, keys: Iterable[str], *, soft: bool = False, mark: str = "", published_ms: int = 0
    ) -> dict[int, list[Call]]:
        """Scripts that invalidate these keys, by shard; at most 200 keys each."""
        names, calls = self.names, defaultdict(list)
        for shard, part in self._by_shard(keys):
            entries = [name for key in part for name in names.of_key(key)]
            notice = Dropped(part, soft, self._origin, published_ms)
            args = [*self._notice_args(shard, notice), mark, int(soft), TAG_KEEP_MS]
            calls[shard].append(self._shard_call("entries_invalidate", shard, entries, args))
        return calls

    def bump_calls(
        self, tags: Iterable[str], *, soft: bool = False, mark: str = "", published_ms: int = 0
    ) -> dict[int, list[Call]]:
        """Scripts that give these tags new versions, by shard."""
        names, calls = self.names, defaultdict(list)
        for shard, part in self._by_shard(tags):
            notice = Bumped(part, self._origin, soft, published_ms)
            args = [*self._notice_args(shard, notice), mark, TAG_KEEP_MS, int(soft)]
            calls[shard].append(
                self._shard_call("tags_bump", shard, [names.tag(tag) for tag in part], args)
            )
        return calls

    async def invalidate(
        self, *, keys: Sequence[str] = (), tags: Sequence[str] = (), soft: bool = False
    ) -> list[tuple[Notice, int]]:
        """Invalidate; returns what was announced, with the versions, for this node's own use.

        Raises:
            Unavailable, ServerRefused: some of it may not have been carried out; repeat it.
        """
        notices: list[Notice] = [
            *(Dropped(part, soft, self._origin) for _, part in self._by_shard(keys)),
            *(Bumped(part, self._origin, soft) for _, part in self._by_shard(tags)),
        ]
        calls = [
            *_flat(self.invalidate_calls(keys, soft=soft)),
            *_flat(self.bump_calls(tags, soft=soft)),
        ]
        replies = await run_many(self._commands, calls)
        return [
            (notice, int(reply[1])) for notice, reply in zip(notices, granted(replies), strict=True)
        ]

    async def capture(self, tags: Sequence[str]) -> Mapping[str, Captured]:
        """The tags' versions; a tag without one gets one."""
        parts = list(self._by_shard(tags))
        calls = [
            Call(
                script=self._scripts["tags_capture"],
                keys=[self.names.part(shard, "head"), *map(self.names.tag, part)],
                args=[TAG_KEEP_MS],
            )
            for shard, part in parts
        ]
        versions: dict[str, Captured] = {}
        replies = granted(await run_many(self._commands, calls))
        for (_, part), reply in zip(parts, replies, strict=True):
            each = zip(reply[::3], reply[1::3], reply[2::3], strict=True)
            found = [Captured(int(version), int(hard), int(made)) for version, hard, made in each]
            versions.update(zip(part, found, strict=True))
        return versions

    async def holds(self, key: str, token: str) -> Granted | None:
        """What ``begin`` would have said, if the fill lease is there and has this token."""
        names = self.names
        holder, entry, (seconds, micros) = granted(
            await self._commands.call_many(
                [("GET", names.lease(key)), ("GET", names.entry(key)), ("TIME",)]
            )
        )
        if holder is None or bytes(holder) != token.encode():
            return None
        return Granted(entry, int(seconds) * 1_000_000 + int(micros))

    async def failed(self, key: str, token: str, *, throttle_ms: int) -> bool:
        """Give a fill lease back, and have the source left alone if there is an entry."""
        names = self.names
        keys = [names.entry(key), names.lease(key)]
        return bool(
            await run(self._commands, self._scripts["lease_fail"], keys, [token, throttle_ms])
        )

    async def release(self, key: str, token: str) -> bool:
        """Give a fill lease back; false if it was gone, or another's."""
        keys = [self.names.lease(key)]
        return bool(await run(self._commands, self._scripts["lease_release"], keys, [token]))

    async def refresh(self, job: RefreshJob, *, lease_ms: int, seen: int) -> int:
        """Hand a refresh to the cluster: 1 done, 0 not needed, -1 shed."""
        names, shard = self.names, self.names.shard(job.key)
        keys = [names.entry(job.key), names.lease(job.key), names.part(shard, "refreshes")]
        args: list[Arg] = [job.token, lease_ms, seen, write_job(job)]
        args += [self._durable.refreshes_max, names.work, shard]
        return int(
            await run(
                self._commands,
                self._scripts["refresh_publish"],
                keys,
                args,
            )
        )

    def entry_keys(self, key: str) -> list[str]:
        names, shard = self.names, self.names.shard(key)
        return [
            names.entry(key),
            names.lease(key),
            names.part(shard, "head"),
            names.part(shard, "log"),
        ]

    def written(self, key: str, published_ms: int = 0) -> list[Arg]:
        notice = Changed(key, self._origin, outdates=True, published_ms=published_ms)
        return self._announcement(key, notice)

    def _announcement(self, key: str, notice: Notice) -> list[Arg]:
        return self._notice_args(self.names.shard(key), notice)

    def _notice_args(self, shard: int, notice: Notice) -> list[Arg]:
        return [write_notice(notice), self.names.bell, shard]

    def _shard_call(self, script: str, shard: int, keys: list[str], args: Sequence[Arg]) -> Call:
        part = self.names.part
        return Call(
            script=self._scripts[script],
            keys=[part(shard, "head"), part(shard, "log"), *keys],
            args=args,
        )

    def _by_shard(self, names: Iterable[str]) -> Iterable[tuple[int, tuple[str, ...]]]:
        shards: dict[int, list[str]] = defaultdict(list)
        for name in dict.fromkeys(names):
            shards[self.names.shard(name)].append(name)
        for shard in sorted(shards):
            each = shards[shard]
            for start in range(0, len(each), _TOGETHER):
                yield shard, tuple(each[start : start + _TOGETHER])


def _stamp(reply: Sequence[Reply]) -> Stamp:
    version, soft_at_ms, hard_at_ms = map(int, reply)
    return Stamp(version, soft_at_ms, hard_at_ms)


def _flat(calls: Mapping[int, Sequence[Call]]) -> Iterable[Call]:
    return (call for shard in sorted(calls) for call in calls[shard])
