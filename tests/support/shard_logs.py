"""Shard logs for tests: numbered notices, followers that keep a journal, and its checker.

Notices of a shard are numbered 0, 1, 2 ... in the order in which they were written; the
number stands in place of a key. ``Journal.check`` is the rule that a follower has to keep:
each notice is applied once and in order, or the shard was reset after it had been written.
After a reset order begins anew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry

from forebay.coordinator.clock import Clock, SystemClock
from forebay.coordinator.instruments import Instruments
from forebay.coordinator.log.follower import Follower
from forebay.coordinator.valkey.dialer import read_info
from forebay.coordinator.valkey.link import Arg, Commands, Reply
from forebay.coordinator.valkey.scripting import load_scripts, run
from forebay.schemas.keys import Names
from forebay.schemas.notices import Dropped, Notice, read_notice, write_notice

SCRIPTS = load_scripts()


class Broken(AssertionError):
    """The rule of the journal is broken."""


def instruments() -> Instruments:
    return Instruments(CollectorRegistry())


class Between:
    """Commands on which something may happen between the server's doing and our hearing."""

    def __init__(self, inner: Commands) -> None:
        self.inner = inner
        self.then: Callable[[Sequence[Sequence[Arg]]], Awaitable[None]] | None = None

    async def call(self, *args: Arg, timeout_ms: int | None = None) -> Reply:
        reply = await self.inner.call(*args, timeout_ms=timeout_ms)
        if self.then is not None:
            await self.then([args])
        return reply

    async def call_many(
        self, commands: Sequence[Sequence[Arg]], *, timeout_ms: int | None = None
    ) -> list[Reply]:
        replies = await self.inner.call_many(commands, timeout_ms=timeout_ms)
        if self.then is not None:
            await self.then(commands)
        return replies


class Shelf:
    """The logs of one namespace, and who writes to them."""

    def __init__(self, commands: Commands, namespace: str, shards: int) -> None:
        self.commands = commands
        self.names = Names(namespace, shards)
        self.written: dict[int, int] = defaultdict(int)
        self.versions: dict[int, list[int]] = defaultdict(list)
        self.lost: dict[int, set[int]] = defaultdict(set)  #: as if they had never been

    async def write(self, shard: int, notice: bytes | None = None) -> bytes:
        """Write the shard's next notice; returns what its bell says."""
        part, number = self.names.part, self.written[shard]
        raw = write_notice(Dropped((str(number),))) if notice is None else notice
        if notice is None:
            self.written[shard] += 1
        keys = [part(shard, name) for name in ("head", "log", "e0:x", "l:x", "t:x")]
        args: list[Arg] = [raw, self.names.bell, shard, "", 0, 60_000]
        _, version = await run(self.commands, SCRIPTS["entries_invalidate"], keys, args)
        self.versions[shard].append(int(version))
        return await self.last_bell(shard)

    async def last_bell(self, shard: int) -> bytes:
        ((entry_id, fields),) = await self.commands.call(
            "XREVRANGE", self.names.part(shard, "log"), "+", "-", "COUNT", 1
        )
        epoch, seq = bytes(entry_id).split(b"-")
        return b" ".join([str(shard).encode(), epoch, seq, fields[1], fields[3]])

    async def trim(self, shard: int, left: int) -> None:
        await self.commands.call("XTRIM", self.names.part(shard, "log"), "MAXLEN", left)

    async def rewind(self, shard: int, left: int) -> None:
        """As after a failover: the end is lost, and its ids will be given again."""
        name = self.names.part(shard, "log")
        entries = await self.commands.call("XRANGE", name, "-", "+")
        add = [("XADD", name, entry_id, *fields) for entry_id, fields in entries[:left]]
        await self.commands.call_many([("DEL", name), *add])
        for _, fields in entries[left:]:
            notice = read_notice(fields[3])
            assert isinstance(notice, Dropped)
            self.lost[shard].update(map(int, notice.keys))

    async def lose(self, shard: int, *parts: str) -> None:
        await self.commands.call("DEL", *(self.names.part(shard, part) for part in parts))


class Journal:
    """What a follower said, in order: notices applied, and shards reset."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.applied: dict[int, list[int]] = defaultdict(list)
        self.versions: dict[int, list[int]] = defaultdict(list)
        self.resets: list[int] = []
        self.broken = False  #: applying raises
        self._covered: dict[int, int] = defaultdict(int)
        self._last: dict[int, int] = {}  # since the last reset
        self._said: list[str] = []

    def follower(
        self,
        commands: Commands,
        *,
        clock: Clock | None = None,
        staleness_ms: int = 500,
        run_id: Callable[[], Awaitable[str]] | None = None,
        kind: type[Follower] = Follower,
    ) -> Follower:
        async def asked() -> str:
            return read_info(await commands.call("INFO", "server"))["run_id"]

        return kind(
            commands,
            self.shelf.names,
            clock=clock or SystemClock(),
            staleness_ms=staleness_ms,
            instruments=instruments(),
            run_id=run_id or asked,
            apply=self.apply,
            reset=self.reset,
            scripts=SCRIPTS,
        )

    def apply(self, shard: int, version: int, notice: Notice) -> None:
        if self.broken:
            raise ValueError("this notice cannot be applied")
        assert isinstance(notice, Dropped)
        for key in notice.keys:  # none: the one that began a log
            number = int(key)
            if number in self.shelf.lost[shard]:
                continue  # a bell that came late: nobody can apply it in its place any more
            if number <= self._last.get(shard, -1):
                self._said.append(f"{shard}: {number} after {self._last[shard]}")
            if number > self._covered[shard]:
                self._said.append(f"{shard}: {number}, {self._covered[shard]} was skipped")
            self._covered[shard] = max(self._covered[shard], number + 1)
            self._last[shard] = number
            self.applied[shard].append(number)
            self.versions[shard].append(version)

    def reset(self, shard: int) -> None:
        """Whatever was written until now is asked for again, so none of it can be missed."""
        self.resets.append(shard)
        self._last.pop(shard, None)
        self._covered[shard] = max(self._covered[shard], self.shelf.written[shard])

    def check(self) -> None:
        """To be called when the follower has read everything.

        Raises:
            Broken: a notice was skipped in silence, repeated, or out of order.
        """
        for shard, written in self.shelf.written.items():
            if self._covered[shard] != written:
                self._said.append(f"{shard}: {self._covered[shard]} to {written} are missing")
        if self._said:
            raise Broken("; ".join(self._said))

    @property
    def count(self) -> int:
        return sum(map(len, self.applied.values()))

    def __repr__(self) -> str:
        found: dict[str, Any] = {"applied": dict(self.applied), "resets": self.resets}
        return f"<Journal {found}>"
