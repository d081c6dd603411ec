"""The scripts at hand for tests: each as a method that names its arguments.

A desk has a namespace of its own. Its default key is ``k``; entries, logs and records are
read back as the rest of the project reads them.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from forebay.coordinator.valkey.link import Arg, Commands, Reply
from forebay.coordinator.valkey.scripting import load_scripts, run
from forebay.schemas.entry import Entry, EntryMeta, make_tail, read_entry
from forebay.schemas.keys import EVENTS, Names, dependents_of
from forebay.schemas.notices import (
    Bumped,
    Changed,
    Dropped,
    Extended,
    Notice,
    Position,
    read_notice,
    write_notice,
)
from forebay.schemas.replies import following

SCRIPTS = load_scripts()
MINUTE_MS = 60_000


def tail_of(value: str) -> bytes:
    return make_tail(value.encode(), kind="v", codec="m", meta=EntryMeta())


class Logged(Struct, frozen=True):
    """A log entry, read."""

    position: Position
    version: int
    notice: Notice | None


class Desk:
    def __init__(
        self, commands: Commands, namespace: str, *, shards: int = 4, cache_version: str = "0"
    ) -> None:
        self.commands = commands
        self.names = Names(namespace, shards, cache_version)
        self.shard = self.names.shard("k")

    async def run(self, script: str, keys: Sequence[str], *args: Arg) -> Any:
        return await run(self.commands, SCRIPTS[script], keys, args)

    def part(self, name: str, shard: int | None = None) -> str:
        return self.names.part(self.shard if shard is None else shard, name)

    # Entries

    def entry_keys(self, key: str) -> list[str]:
        names, shard = self.names, self.names.shard(key)
        return [
            names.entry(key),
            names.lease(key),
            self.part("head", shard),
            self.part("log", shard),
        ]

    def _said(self, notice: Notice, shard: int) -> list[Arg]:
        return [write_notice(notice), self.names.bell, shard]

    async def begin(
        self,
        token: str,
        *,
        key: str = "k",
        lease_ms: int = MINUTE_MS,
        seen: int = -1,
        patient: bool = False,
    ) -> list[Reply]:
        keys = self.entry_keys(key)[:2]
        reply = await self.run("entry_begin", keys, token, lease_ms, seen, int(patient))
        self.begun = reply[2:]  # the server's clock; or time left, and whether the source fails
        return list(reply[: 2 if reply[0] else 3])

    async def fail(self, token: str, *, key: str = "k", throttle_ms: int = MINUTE_MS) -> int:
        return int(await self.run("lease_fail", self.entry_keys(key)[:2], token, throttle_ms))

    async def extend(
        self,
        token: str,
        since: int,
        *,
        key: str = "k",
        soft_ms: int = MINUTE_MS,
        hard_ms: int = 2 * MINUTE_MS,
        meta: EntryMeta | None = None,
    ) -> list[Reply]:
        said = self._said(Extended(key, since, soft_ms, hard_ms), self.names.shard(key))
        middle = make_tail(b"", kind="v", codec="m", meta=meta or EntryMeta())
        args: list[Arg] = [token, since, soft_ms, hard_ms, middle, *said]
        return list(await self.run("entry_extend", self.entry_keys(key), *args))

    async def fill(
        self,
        token: str,
        value: str = "filled",
        *,
        key: str = "k",
        soft_ms: int = MINUTE_MS,
        hard_ms: int = 2 * MINUTE_MS,
        label: str = "",
    ) -> list[Reply]:
        said = self._said(Changed(key), self.names.shard(key))
        args: list[Arg] = [token, soft_ms, hard_ms, tail_of(value), *said, label]
        return list(await self.run("entry_fill", self.entry_keys(key), *args))

    async def put(
        self,
        value: str = "put",
        *,
        key: str = "k",
        token: int = 0,
        soft_ms: int = MINUTE_MS,
        hard_ms: int = 2 * MINUTE_MS,
    ) -> int:
        said = self._said(Changed(key, outdates=True), self.names.shard(key))
        args: list[Arg] = [soft_ms, hard_ms, tail_of(value), *said, MINUTE_MS, token]
        keys = [*self.entry_keys(key), self.names.tag(dependents_of(key)), self.names.fence(key)]
        reply = await self.run("entry_put", keys, *args)
        return int(reply[1]) if reply[0] else -int(reply[1])

    async def write(
        self,
        value: str = "written",
        *,
        key: str = "k",
        soft_ms: int = MINUTE_MS,
        hard_ms: int = 2 * MINUTE_MS,
        bound: int = 100,
        mark: str = "",
        event_id: str = "",
        published_ms: int = 0,
        seen_ms: int = MINUTE_MS,
        seen_max: int = 100,
        at_full: bool = False,
    ) -> list[Reply]:
        shard = self.names.shard(key)
        keys = [*self.entry_keys(key), self.part("writes", shard), self.part("seen", shard)]
        keys.append(self.names.tag(dependents_of(key)))
        args: list[Arg] = [soft_ms, hard_ms, tail_of(value)]
        args += self._said(Changed(key, outdates=True), shard)
        args += [f"job of {value}", bound, self.names.work, mark, seen_ms if event_id else 0]
        args += [MINUTE_MS, event_id, published_ms, seen_max, int(at_full)]
        return list(await self.run("entry_write", keys, *args))

    async def fill_write(
        self, token: str, value: str = "written", *, key: str = "k"
    ) -> list[Reply]:
        said = self._said(Changed(key, outdates=True), self.names.shard(key))
        args: list[Arg] = [token, MINUTE_MS, 2 * MINUTE_MS, tail_of(value), *said, MINUTE_MS]
        keys = [*self.entry_keys(key), self.names.tag(dependents_of(key))]
        return list(await self.run("write_fill", keys, *args))

    async def begin_write(self, token: str, *, key: str = "k") -> list[Reply]:
        return list(await self.run("write_begin", self.entry_keys(key), token, MINUTE_MS))

    async def release(self, token: str, *, key: str = "k") -> int:
        return int(await self.run("lease_release", [self.names.lease(key)], token))

    async def invalidate(self, *keys: str, soft: bool = False, mark: str = "") -> list[Reply]:
        """Keys of one shard, by default ``k``."""
        keys = keys or ("k",)
        names, shard = self.names, self.names.shard(keys[0])
        slots = [self.part("head", shard), self.part("log", shard)]
        slots += [name for key in keys for name in names.of_key(key)]
        args: list[Arg] = [*self._said(Dropped(keys, soft), shard), mark, int(soft), MINUTE_MS]
        return list(await self.run("entries_invalidate", slots, *args))

    async def touch(self, *keys: str) -> list[Reply]:
        """Keys of one shard, by default ``k``."""
        keys = keys or ("k",)
        names, shard = self.names, self.names.shard(keys[0])
        slots = [self.part("head", shard), self.part("log", shard)]
        slots += [name for key in keys for name in names.of_key(key)]
        said = self._said(Dropped(keys, soft=True), shard)
        return list(await self.run("entry_touch", slots, *said, MINUTE_MS))

    async def refresh(self, token: str, *, key: str = "k", seen: int = -1, bound: int = 100) -> int:
        shard = self.names.shard(key)
        keys = [*self.entry_keys(key)[:2], self.part("refreshes", shard)]
        args: list[Arg] = [token, MINUTE_MS, seen, f"job {token}", bound, self.names.work, shard]
        return int(await self.run("refresh_publish", keys, *args))

    # Entries of another service

    async def begin_legacy(self, until_ms: int) -> list[int]:
        """The time in force, and whether the shard of ``k`` had changes before."""
        reply = await self.run("legacy_begin", [self.part("head")], until_ms)
        return [int(each) for each in reply]

    async def marks(self) -> set[bytes]:
        """Of the shard of ``k``."""
        return set(await self.commands.call("ZRANGE", self.part("legacy"), 0, -1))

    # Tags

    async def bump(
        self, *tags: str, mark: str = "", keep_ms: int = MINUTE_MS, soft: bool = False
    ) -> list[Reply]:
        shard = self.names.shard(tags[0])
        keys = [self.part("head", shard), self.part("log", shard), *map(self.names.tag, tags)]
        args: list[Arg] = [*self._said(Bumped(tags), shard), mark, keep_ms, int(soft)]
        return list(await self.run("tags_bump", keys, *args))

    async def capture(self, *tags: str, keep_ms: int = MINUTE_MS) -> list[int]:
        shard = self.names.shard(tags[0])
        keys = [self.part("head", shard), *map(self.names.tag, tags)]
        return [int(version) for version in (await self.run("tags_capture", keys, keep_ms))[::3]]

    async def captured(self, *tags: str) -> list[tuple[int, int, int]]:
        """Version, hard version, and whether it was made now, of each."""
        shard = self.names.shard(tags[0])
        keys = [self.part("head", shard), *map(self.names.tag, tags)]
        found = [int(each) for each in await self.run("tags_capture", keys, MINUTE_MS)]
        self.changed = found[2::3]  # when a key of the shard was last changed, if it was made
        return [(v, hard, int(made > 0)) for v, hard, made in zip(*[iter(found)] * 3, strict=True)]

    # Logs, owners, streams

    async def log_begin(self, shard: int | None = None) -> bytes | None:
        keys = [self.part("head", shard), self.part("log", shard)]
        number = self.shard if shard is None else shard
        reply: bytes | None = await self.run("log_begin", keys, *self._said(Dropped(()), number))
        return reply

    async def claim(
        self,
        owner: str,
        *,
        token: str = "t",
        ttl_ms: int = MINUTE_MS,
        forced_ms: int = MINUTE_MS,
        fresh_ms: int = MINUTE_MS,
    ) -> list[Reply]:
        keys = [self.part("own")]
        return list(await self.run("owner_claim", keys, owner, ttl_ms, token, forced_ms, fresh_ms))

    async def give_up(self, owner: str, epoch: int) -> int:
        return int(await self.run("owner_release", [self.part("own")], owner, epoch))

    async def end_lease(self) -> None:
        await self.commands.call("HSET", self.part("own"), "u", 1)

    async def commit(
        self,
        owner: str,
        epoch: int,
        position: str,
        sunk: Sequence[tuple[str, int]] = (),
        *,
        follows: str = "",
        last: str = "",
    ) -> list[Reply]:
        ms, _, seq = position.partition("-")
        keys = [self.part("own"), self.part("done"), self.part("writes"), self.part("head")]
        for key, _ in sunk:
            keys += [self.names.entry(key), self.names.lease(key)]
        args: list[Arg] = [owner, epoch, "writes", position, f"{ms}-{int(seq) + 1}"]
        args += [self.names.work, self.shard, follows, last]
        args += [version for _, version in sunk]
        return list(await self.run("checkpoint_commit", keys, *args))

    async def trim(self, following: str, *checkpoints: str) -> int:
        keys = [self.part("done"), self.part("writes")]
        return int(await self.run("writes_trim", keys, following, *checkpoints))

    async def hold(
        self,
        owner: str,
        epoch: int,
        *ids: str,
        source: str = "writes",
        held_max: int = 10,
        token: str = "",
    ) -> list[Reply]:
        keys = [self.part(name) for name in ("own", source, "held", "tried")]
        return list(await self.run("writes_hold", keys, owner, epoch, held_max, token, *ids))

    async def beat(
        self,
        member: str,
        state: str = "active",
        *,
        beat_ms: int = MINUTE_MS,
        grace_ms: int = 0,
        profile: str = "{}",
        known: int = 0,
    ) -> tuple[int, bool, dict[str, str]]:
        """The version, whether it is the whole roster, and the state of each member told."""
        keys = [self.names.nodes, self.names.members]
        reply = await self.run(
            "roster_beat", keys, member, state, beat_ms, grace_ms, profile, known
        )
        told = dict(zip(reply[2::2], reply[3::2], strict=True))
        states = {bytes(k).decode(): bytes(v).split(b" ")[1].decode() for k, v in told.items()}
        return int(reply[0]), bool(reply[1]), states

    def _ingress(self) -> list[str]:
        own, done, before = [self.names.part(EVENTS, name) for name in ("own", "done", "before")]
        return [own, done, self.names.events, before]

    async def claim_ingress(self, owner: str) -> int:
        args: list[Arg] = [owner, MINUTE_MS, "t", MINUTE_MS, MINUTE_MS]
        return int((await self.run("owner_claim", self._ingress()[:1], *args))[1])

    async def take_batch(
        self,
        owner: str,
        epoch: int,
        first: str = "",
        last: str = "",
        *,
        mark: str = "0 0-0",
        digest: str = "0a",
    ) -> list[Reply]:
        args: list[Arg] = [owner, epoch, first, last, digest, *mark.split()]
        return list(await self.run("ingress_take", self._ingress(), *args))

    async def commit_batch(self, owner: str, epoch: int, last: str) -> list[Reply]:
        keys = self._ingress()
        return list(await self.run("ingress_commit", keys, owner, epoch, last, following(last)))

    async def publish(self, *events: str, bound: int = 100) -> list[Reply]:
        keys = [self.names.events, self.names.part(EVENTS, "before")]
        return list(await self.run("event_publish", keys, bound, *events))

    async def append(
        self, name: str, *fields: str, entry_id: str = "*", bound: int = 0
    ) -> list[Reply]:
        return list(await self.run("stream_append", [self.part(name)], entry_id, bound, *fields))

    # Reading back

    async def raw(self, key: str = "k") -> bytes | None:
        reply = await self.commands.call("GET", self.names.entry(key))
        return None if reply is None else bytes(reply)

    async def entry(self, key: str = "k") -> Entry:
        raw = await self.raw(key)
        assert raw is not None, f"there is no entry of {key}"
        return read_entry(raw, bytes_max=1_000)

    async def ttl_ms(self, key: str = "k") -> int:
        return int(await self.commands.call("PTTL", self.names.entry(key)))

    async def lease(self, key: str = "k") -> bytes | None:
        reply: bytes | None = await self.commands.call("GET", self.names.lease(key))
        return reply

    async def log(self, shard: int | None = None) -> list[Logged]:
        entries = await self.commands.call("XRANGE", self.part("log", shard), "-", "+")
        return [
            Logged(Position.parse(entry_id), int(fields[1]), read_notice(fields[3]))
            for entry_id, fields in entries
        ]

    async def length(self, name: str) -> int:
        return int(await self.commands.call("XLEN", self.part(name)))

    async def everything(self) -> dict[bytes, object]:
        """All that the namespace holds, to see whether anything was changed."""
        found: dict[bytes, object] = {}
        keys = await self.commands.call("KEYS", f"*{self.names.namespace}*")
        for key in sorted(bytes(key) for key in keys):
            match await self.commands.call("TYPE", key):
                case b"string":
                    found[key] = await self.commands.call("GET", key)
                case b"hash":
                    found[key] = await self.commands.call("HGETALL", key)
                case b"stream":
                    found[key] = await self.commands.call("XRANGE", key, "-", "+")
                case b"zset":
                    found[key] = await self.commands.call("ZRANGE", key, 0, -1)
        return found

    async def now_us(self) -> int:
        seconds, micros = await self.commands.call("TIME")
        return int(seconds) * 1_000_000 + int(micros)

    def keys_of(self, shard: int, count: int) -> list[str]:
        """So many keys that lie in this shard."""
        keys, number = [], 0
        while len(keys) < count:
            if zlib.crc32(f"key-{number}".encode()) % self.names.shards == shard:
                keys.append(f"key-{number}")
            number += 1
        return keys
