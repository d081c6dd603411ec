"""Entries that others set or deleted past the scripts: finding them, and telling of them.

B1  An entry of ours, by its magic, was told by the script that stored it; it is left alone.
B2  Whatever else stands where an entry should, and an absence that nothing explains, is told:
    near copies of that key are dropped, and a load under way cannot fill. The entry itself is
    not touched, so what others set is there to be read. Keys that no cache can have are not told.
B3  An absence is judged when every notice was applied here that can explain it; a log that
    cannot be followed so far explains nothing.
B4  A shard that refuses costs the others nothing: its keys come back as undone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress

import anyio
import msgspec
from msgspec import Struct

from ...coordinator.clock import Clock, ServerClock
from ...coordinator.log.follower import Follower
from ...coordinator.valkey.link import Arg, Commands, Reply
from ...coordinator.valkey.scripting import Call, Scripts, run_many
from ...schemas.entry import FOREVER_MS, MAGIC, version_of
from ...schemas.errors import ForebayError, InvalidKey, ServerRefused
from ...schemas.keys import Names, check_key
from ...schemas.notices import Dropped, Notice, Position, write_notice
from ..cache.shared import TAG_KEEP_MS
from .lifetimes import Lifetimes

__all__ = ["RESET", "ForeignEntries", "Outcome"]

#: A notice of a kind that no version reads, which therefore resets the shard on all of them.
RESET = msgspec.msgpack.encode(["r"])

_TOGETHER = 200
_NUMBERS = 62  #: bytes of an envelope up to the end of its numbers
_CATCH_UP_S = 0.5
_LOOK_S = 0.02


class Outcome(Struct, frozen=True, kw_only=True):
    """What became of a batch of keys."""

    set: int = 0
    deleted: int = 0
    undone: Sequence[str] = ()
    fault: ForebayError | None = None  #: why


class ForeignEntries:
    def __init__(
        self,
        commands: Commands,
        names: Names,
        scripts: Scripts,
        follower: Follower,
        *,
        clock: Clock,
        server_clock: ServerClock,
        lifetimes: Lifetimes | None = None,
    ) -> None:
        self.lifetimes = Lifetimes() if lifetimes is None else lifetimes
        self._commands = commands
        self._names = names
        self._scripts = scripts
        self._follower = follower
        self._clock = clock
        self._server_clock = server_clock
        self._heard = anyio.Event()

    def __repr__(self) -> str:
        return f"<ForeignEntries of {self._names.namespace}, {self.lifetimes!r}>"

    def noticed(self, version: int, notice: Notice) -> None:
        self.lifetimes.notice(version, notice)
        self._heard.set()

    async def tell(self, keys: Sequence[str]) -> Outcome:
        """Look at the entries of these keys, which were changed; tell of what others did.

        Raises:
            Unavailable, ServerRefused: nothing may have been told; repeat it.
        """
        foreign, absent = map(_possible, await self._look(keys))
        gone = await self._unexplained(absent) if absent else []
        parts = list(self._by_shard([*foreign, *gone]))
        undone: list[str] = []
        fault = None
        replies = await run_many(self._commands, [self._touch(*part) for part in parts])
        for (_, part), reply in zip(parts, replies, strict=True):
            if isinstance(reply, ForebayError):
                fault = reply
                undone += part
        failed = set(undone)
        return Outcome(
            set=sum(key not in failed for key in foreign),
            deleted=sum(key not in failed for key in gone),
            undone=undone,
            fault=fault,
        )

    async def reset(self, shards: Iterable[int]) -> tuple[list[int], ForebayError | None]:
        """Have every node ask again for what it remembers; returns the shards that refused.

        Raises:
            Unavailable: it may have been done or not; repeat it.
        """
        wanted = list(shards)
        calls = [
            self._call("entries_invalidate", each, (), RESET, "", 0, TAG_KEEP_MS) for each in wanted
        ]
        replies = await run_many(self._commands, calls)
        faults = [
            (shard, reply)
            for shard, reply in zip(wanted, replies, strict=True)
            if isinstance(reply, ForebayError)
        ]
        return [shard for shard, _ in faults], faults[0][1] if faults else None

    async def _look(self, keys: Sequence[str]) -> tuple[list[str], list[str]]:
        """Those that hold what others stored; those that hold nothing."""
        foreign, absent = [], []
        entry = self._names.entry
        replies = await self._commands.call_many(
            [("GETRANGE", entry(key), 0, _NUMBERS - 1) for key in keys]
        )
        for key, reply in zip(keys, replies, strict=True):
            if isinstance(reply, ForebayError):
                if not isinstance(reply, ServerRefused) or reply.code != "WRONGTYPE":
                    raise reply
                foreign.append(key)  # a list, a hash ...
            elif not reply:
                absent.append(key)
            elif bytes(reply[:2]) == MAGIC[:2]:  # the third byte is the format
                self.lifetimes.entry(key, *_lifetime(bytes(reply)))
            else:
                foreign.append(key)
        return foreign, absent

    async def _unexplained(self, absent: Sequence[str]) -> list[str]:
        behind = await self._behind(await self._ends({self._names.shard(key) for key in absent}))
        now_ms = self._server_clock.now_ms()
        return [
            key
            for key in absent
            if self._names.shard(key) in behind or not self.lifetimes.explain(key, now_ms)
        ]

    async def _ends(self, shards: Collection[int]) -> Mapping[int, Position | None]:
        """Where the logs end now: an absence that was seen before was explained before."""
        logs = [self._names.part(shard, "log") for shard in shards]
        replies = await self._commands.call_many(
            [("XREVRANGE", log, "+", "-", "COUNT", 1) for log in logs]
        )
        return {shard: _end(reply) for shard, reply in zip(shards, replies, strict=True)}

    async def _behind(self, ends: Mapping[int, Position | None]) -> Collection[int]:
        """Wait until the logs were followed up to there; returns the shards that were not."""
        views, unknown = self._follower.views, {n for n, end in ends.items() if end is None}
        with anyio.move_on_after(_CATCH_UP_S):
            while True:
                self._heard = anyio.Event()
                behind = {n for n, end in ends.items() if end and views[n].position < end}
                if not behind:
                    return unknown
                with anyio.move_on_after(_LOOK_S):
                    await self._heard.wait()
        return behind | unknown

    def _touch(self, shard: int, keys: Sequence[str]) -> Call:
        names = [name for key in keys for name in self._names.of_key(key)]
        notice = write_notice(Dropped(tuple(keys)))
        return self._call("entry_touch", shard, names, notice, TAG_KEEP_MS)

    def _call(
        self, script: str, shard: int, names: Sequence[str], notice: bytes, *more: Arg
    ) -> Call:
        part = self._names.part
        return Call(
            script=self._scripts[script],
            keys=[part(shard, "head"), part(shard, "log"), *names],
            args=[notice, self._names.bell, shard, *more],
        )

    def _by_shard(self, keys: Iterable[str]) -> Iterable[tuple[int, Sequence[str]]]:
        shards: dict[int, list[str]] = defaultdict(list)
        for key in keys:
            shards[self._names.shard(key)].append(key)
        for shard, each in sorted(shards.items()):
            for start in range(0, len(each), _TOGETHER):
                yield shard, each[start : start + _TOGETHER]


def _possible(keys: Sequence[str]) -> list[str]:
    """Those that a cache can have; of the others there are no copies."""
    found = []
    for key in keys:
        with suppress(InvalidKey):
            found.append(check_key(key))
    return found


def _lifetime(numbers: bytes) -> tuple[int, int]:
    """Version of an entry of ours, and when it ends."""
    version, ends = version_of(numbers), numbers[33:46]
    if numbers[:3] != MAGIC or not numbers[4:].isdigit() or len(numbers) < _NUMBERS:
        return 0, FOREVER_MS
    return version, FOREVER_MS if int(numbers[46:]) else int(ends)


def _end(reply: Reply) -> Position | None:
    if isinstance(reply, ForebayError):
        return None
    return Position.parse(bytes(reply[0][0])) if reply else Position(0, 0)
