"""Writes that are held: accepted, and not to be stored by the member that owns their shard now.

They lie in a stream beside the shard's writes, so that they neither stop others nor fill that
stream's bound; an owner that has their sink stores them first (see ``Lane``).

H1  A held write of a sink that another live member has makes this member defer the shard; as long
    as some member has not tried, it becomes a dead letter only by H2.
H2  It becomes a dead letter when it was held for ``hold_ms`` and its sink is not here; or when
    no live member that may have its sink could decode its value, ``_NEWS_MS`` after it was held:
    by then a member that has just started is known.
H3  A round looks at the oldest ``_PAGE`` writes held of each shard, and at as many further ones; it
    goes through all of them over time.
H4  The number of held writes and the age of the oldest are known after the first round. They are
    logged when the first is held, every ``_TELL_S`` from then on, and when none is left.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

import anyio
import structlog
from msgspec import Struct

from ...coordinator.clock import ServerClock
from ...coordinator.log.ownership import Claim, Ownership
from ...coordinator.log_once import LogOnce
from ...coordinator.valkey.link import Commands, Reply
from ...coordinator.valkey.scripting import Scripts, ask_many, granted, run_many
from ...schemas.errors import ForebayError, InvalidEvent, ServerRefused
from ...schemas.keys import Names
from ...schemas.settings import Workers
from .coalescer import Queued, queued
from .commits import checkpoint_call
from .dead_letters import DeadLetter, DeadLetters
from .owned_shards import OwnedShard
from .routes import Routes

__all__ = ["Held", "HeldStatistics"]

log = structlog.get_logger(__name__)

_LOOK_S = 0.5
_TELL_S = 60.0
_PAGE = 100
_NEWS_MS = 5_000


class HeldStatistics(Struct, frozen=True, kw_only=True):
    """Of the shards that this node owns."""

    writes: int = 0
    oldest_age_s: float = 0.0
    example: str = ""  #: the key of the oldest


class Held:
    def __init__(
        self,
        holdings: Mapping[int, OwnedShard],
        commands: Commands,
        names: Names,
        scripts: Scripts,
        ownership: Ownership,
        routes: Routes,
        dead_letters: DeadLetters,
        *,
        node_id: str,
        options: Workers,
        server_clock: ServerClock,
        invalidate: Callable[[Sequence[str], Sequence[str]], Awaitable[None]],
    ) -> None:
        self.statistics = HeldStatistics()
        self._holdings = holdings
        self._commands = commands
        self._names = names
        self._scripts = scripts
        self._ownership = ownership
        self._routes = routes
        self._dead_letters = dead_letters
        self._node_id = node_id
        self._hold_ms = options.hold_ms
        self._server_clock = server_clock
        self._invalidate = invalidate
        self._looked_at: dict[int, str] = {}  # by shard the last id of the page before
        self._told_at = float("-inf")
        self._failing = LogOnce()

    def __repr__(self) -> str:
        return f"<Held {self.statistics.writes} writes>"

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            try:
                await self.round()
                self._failing.over()
            except ForebayError as error:
                self._failing.say(log, "held.not_read", error)
            await anyio.sleep(_LOOK_S)

    async def round(self) -> None:
        """Look at the held writes of the shards that this node owns.

        Raises:
            Unavailable, ServerRefused: some shards were not looked at.
        """
        tenures = [each.tenure for each in self._holdings.values() if not each.yielding]
        ours = [each for each in tenures if self._in_force(each)]
        lengths = await ask_many(
            self._commands, [("XLEN", self._names.part(each.resource, "held")) for each in ours]
        )
        count, oldest, refused = 0, list[Queued](), list[ForebayError]()
        for tenure, length in zip(ours, lengths, strict=True):
            try:
                (held,) = granted([length])
                page = await self._page(tenure.resource) if held else []
                await self._judge_all(tenure, page)
            except ServerRefused as error:
                refused.append(error)
            else:
                count += int(held)
                oldest += page[:1]
        self._tell(count, oldest)
        granted(refused)

    async def _page(self, shard: int) -> list[Queued]:
        """The oldest, and the next of the others."""
        name, after = self._names.part(shard, "held"), self._looked_at.get(shard, "0-0")
        oldest, further = granted(
            await ask_many(
                self._commands,
                [
                    ("XRANGE", name, "-", "+", "COUNT", _PAGE),
                    ("XRANGE", name, f"({after}", "+", "COUNT", _PAGE),
                ],
            )
        )
        self._looked_at[shard] = bytes(further[-1][0]).decode() if further else "0-0"
        entries: dict[bytes, Reply] = {bytes(raw_id): fields for raw_id, fields in oldest}
        entries |= {bytes(raw_id): fields for raw_id, fields in further}
        if not entries:
            return []
        tried = self._names.part(shard, "tried")
        (tokens,) = granted(await ask_many(self._commands, [("HMGET", tried, *entries)]))
        return [
            queued(raw_id, fields, tried)
            for (raw_id, fields), tried in zip(entries.items(), tokens, strict=True)
        ]

    async def _judge_all(self, tenure: Claim, page: Sequence[Queued]) -> None:
        now_ms, dead, deferred = self._server_clock.now_ms(), list[DeadLetter](), False
        gone: list[Queued] = []
        for entry in page:
            others = self._others(entry)
            fault = self._fault(entry, others, now_ms)
            if fault is not None:
                dead.append(DeadLetter(entry.origin, entry.raw, fault))
                gone.append(entry)
            deferred |= bool(others - entry.tried) and not self._is_for_us(entry)
        if deferred and not gone:
            self._ownership.defer([tenure.resource])
        if dead and self._in_force(tenure):
            await self._dead_letters.bury(tenure.resource, dead)
            await self._forget(tenure, gone)

    def _others(self, entry: Queued) -> frozenset[str]:
        return self._ownership.takers(entry.job.key) if entry.job is not None else frozenset()

    def _is_for_us(self, entry: Queued) -> bool:
        """Whether a lane of this node stores it, or will find that it cannot."""
        key = entry.job.key if entry.job is not None else ""
        return self._routes.sink_of(key) is not None and self._ownership.token not in entry.tried

    def _fault(self, entry: Queued, others: frozenset[str], now_ms: int) -> InvalidEvent | None:
        """Why it becomes a dead letter now; None if it does not."""
        if entry.job is None:
            fix = "entries are made by forebay alone"
            return InvalidEvent("undecodable", "this is no write job", field="j", fix=fix)
        key, mine = entry.job.key, self._routes.sink_of(entry.job.key) is not None
        able = others | {self._ownership.token} if mine else others
        held_ms = now_ms - int(entry.id.partition("-")[0])
        if entry.tried and able and able <= entry.tried and held_ms >= _NEWS_MS:
            problem = f"no live member can decode the value of {key!r}"
            return InvalidEvent("undecodable", problem, field="value", fix="see the cache")
        if held_ms < self._hold_ms:
            return None
        if entry.tried:
            problem = f"no member could decode the value of {key!r} within workers.hold_ms"
            return InvalidEvent("undecodable", problem, field="value", fix="see the cache")
        if mine:
            return None  # its sink is here; it is paused, or about to get it
        problem = f"no sink took {key!r} within workers.hold_ms"
        fix = "declare one with @node.sink, and start a worker that has it"
        return InvalidEvent("no_sink", problem, field="key", fix=fix)

    async def _forget(self, tenure: Claim, gone: Sequence[Queued]) -> None:
        """They are dead letters: reads of their keys ask the source from now on."""
        newest = {entry.job.key: entry for entry in gone if entry.job is not None}
        if newest:
            await self._invalidate(list(newest), ())
        call = checkpoint_call(
            self._scripts,
            self._names,
            self._node_id,
            tenure,
            checkpoint="held",
            position=gone[-1].id,
            stream="held",
            newest=newest,
        )
        (reply,) = granted(await run_many(self._commands, [call]))
        if not reply[0]:
            self._ownership.fenced(tenure)
            return
        ids, part = [entry.id for entry in gone], self._names.part
        await self._commands.call_many(
            [
                ("XDEL", part(tenure.resource, "held"), *ids),
                ("HDEL", part(tenure.resource, "tried"), *ids),
            ]
        )

    def _in_force(self, tenure: Claim) -> bool:
        return self._ownership.in_force(tenure.resource) is tenure

    def _tell(self, count: int, oldest: Sequence[Queued]) -> None:
        before, now = self.statistics.writes, anyio.current_time()
        if not count or not oldest:
            self.statistics = HeldStatistics()
            if before:
                log.info("writes.none_held")
            return
        first = min(oldest, key=lambda each: int(each.id.partition("-")[0]))
        age_ms = self._server_clock.now_ms() - int(first.id.partition("-")[0])
        self.statistics = HeldStatistics(
            writes=count,
            oldest_age_s=max(0, age_ms) / 1000,
            example=first.job.key if first.job is not None else "",
        )
        if not before or now - self._told_at >= _TELL_S:
            self._told_at = now
            fix = (
                "start a worker that declares the sink; after workers.hold_ms they are dead letters"
            )
            log.warning(
                "writes.held",
                count=count,
                oldest_age_s=round(self.statistics.oldest_age_s, 1),
                key=self.statistics.example,
                fix=fix,
            )
