"""A lane: one sink's way through the writes of the shards that this node owns.

W1  A lane reads each shard's writes from its own checkpoint on, and moves that only past what
    the sink has stored, the dead letters hold, or other lanes take. A crash anywhere repeats
    work; the version guard of the sink makes the repetition harmless.
W2  Of a stretch the newest write of each key goes to the sink (see ``Coalescer``).
W3  What a write invalidates is invalidated after the sink has it, before the checkpoint; so
    is a key whose write will never get there.
W4  Work is handed out only while the tenure is in force and not yielding; commits carry its
    epoch. What a sink refuses as fenced holds up its own shard only.
W5  Before a shard's writes a lane reads the held writes of its sink, which are older. The first
    lane holds the writes that no sink of this node takes. It reads a shard's writes from the first
    one on, regardless of its checkpoint, so that none of them is trimmed unseen.
W6  A value that this node cannot decode is held for a member that has not tried (see ``Held``).
    A newer write of the key that is stored first takes its place.
W7  A round reads at most ``flush_rows_max`` entries, of about ``_BYTES_MAX`` bytes.
W8  A row that another transaction has locked holds up its own shard: the others are flushed one by
    one, and the shard is parked, that is flushed beside the rounds until the row is stored.
W9  Positions are remembered only to spare a round trip: each read asks for the checkpoint, too, and
    each commit and trim names it. If the server has lost the checkpoint or the writes that were
    read (a lost tail, a failover), nothing is moved or trimmed, and the lane reads from the
    server's checkpoint on. A key whose write comes a second time is invalidated: the sink may
    have a newer one.
W10 A shard whose keys the server refuses waits by itself, until the next sweep (``RefusedShards``).

All shards share one flush, so that a slow trickle over many shards makes few transactions. A
bell starts a round; a sweep finds what bells missed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial

import anyio
import structlog
from anyio.abc import TaskGroup

from ...coordinator.instruments import Instruments
from ...coordinator.log.ownership import Claim, Ownership
from ...coordinator.log_once import LogOnce
from ...coordinator.valkey.link import Arg, Commands, Reply
from ...coordinator.valkey.scripting import Call, Scripts, ask_many, run, run_many
from ...schemas.errors import BusySinkError, Fenced, ForebayError, ServerRefused
from ...schemas.keys import Names
from ...schemas.replies import LAST_ID, order
from ...schemas.settings import Workers
from ..sinks.base import SinkBatch
from .coalescer import Coalescer, Queued, Range, queued
from .commits import checkpoint_call, checkpoint_in, trim_call
from .dead_letters import DeadLetters
from .delivery import Delivery
from .owned_shards import Cursor, OwnedShard, latest
from .refused_shards import RefusedShards
from .routes import Routes

__all__ = ["Invalidate", "Lane"]

log = structlog.get_logger(__name__)

Invalidate = Callable[[Sequence[str], Sequence[str]], Awaitable[None]]
_SWEEP_S = 0.25
_BYTES_MAX = 16_777_216
_ENTRY_BYTES = 4_096  # until some were seen
_NAMES_TOGETHER = 1_000
_LOST = 2  #: checkpoint_commit's reply if the stream differs from the one that was read


class Lane:
    def __init__(
        self,
        index: int,
        delivery: Delivery | None,
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
        held_max: int,
        instruments: Instruments,
        invalidate: Invalidate,
        settled: Callable[[], None],
    ) -> None:
        """``settled`` is called after every round. The first lane also holds the writes without a
        sink; without a delivery it holds only those.
        """
        self.name = delivery.sink.name if delivery else "no sink"
        self.backlog = 0  #: entries read in the last round
        self._index = index
        self._delivery = delivery
        self._sink = delivery.sink.name if delivery else None
        self._holdings = holdings
        self._commands = commands
        self._names = names
        self._scripts = scripts
        self._ownership = ownership
        self._routes = routes
        self._dead_letters = dead_letters
        self._node_id = node_id
        self._options = options
        self._held_max = held_max
        self._counts = instruments.counts
        self._invalidate = invalidate
        self._settled = settled
        self._wake = anyio.Event()
        self._rounds = 0
        self._entry_bytes = _ENTRY_BYTES
        self.failing = LogOnce()
        self.refused = RefusedShards(self._sink)
        self._parked: TaskGroup | None = None

    def __repr__(self) -> str:
        return f"<Lane to {self._sink} {self._rounds} rounds, {self.backlog} entries in the last>"

    def wake(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        """Flush until cancelled."""
        async with anyio.create_task_group() as self._parked:
            while True:
                try:
                    await self._work_until_sweep()
                except ForebayError as error:
                    self.failing.say(log, "round.failed", error, sink=self._sink)
                    await anyio.sleep(_SWEEP_S)
                for holding in self._holdings.values():
                    self._place(holding).rung = True

    async def _work_until_sweep(self) -> None:
        sweep_at = anyio.current_time() + _SWEEP_S
        while (left := sweep_at - anyio.current_time()) > 0:
            self._wake = anyio.Event()
            if await self.round():
                continue
            with anyio.move_on_after(left) as swept:
                await self._wake.wait()
            if not swept.cancelled_caught:
                await anyio.sleep(self._options.flush_delay_ms / 1000)

    async def empty(self, settled: Callable[[], Awaitable[None]]) -> None:
        """Wait until every shard was found empty in a round that began after now."""
        asked = self._rounds
        while full := [h for h in self._holdings.values() if self._place(h).emptied <= asked]:
            for holding in full:
                self._place(holding).rung = True
            self._wake.set()
            await settled()

    async def round(self) -> bool:
        """Read what waits, flush and commit it; false when nothing more can wait."""
        self._rounds += 1
        number, ready = self._rounds, self._ready()
        held = ready[: self._options.flush_rows_max]
        if not held:
            return False
        for holding in held:
            place = self._place(holding)
            place.busy, place.turn = True, number
        try:
            await self._locate([each for each in held if not self._place(each).position])
            stretches = await self._read([each for each in held if self._place(each).position])
            if stretches:
                await self._flush_ours(stretches)
            self.failing.over()
        finally:
            for holding in held:
                self._place(holding).busy = False
            self._settled()
        return bool(stretches) or len(ready) > len(held)

    def _ready(self) -> list[OwnedShard]:
        """What may be read now, the longest unread first."""
        ready = [
            holding
            for holding in self._holdings.values()
            if self._place(holding).rung
            and not self._place(holding).parked
            and not holding.yielding
            and self._in_force(holding.tenure)
        ]
        return sorted(ready, key=lambda holding: self._place(holding).turn)

    async def _locate(self, held: Sequence[OwnedShard]) -> None:
        """Where to begin: the checkpoint."""
        replies = await ask_many(
            self._commands,
            [("HGET", self._names.part(each.shard, "done"), self.checkpoint) for each in held],
        )
        for holding, reply in zip(held, replies, strict=True):
            if self.refused.has(holding.shard, reply):
                continue
            place = self._place(holding)
            place.committed = checkpoint_in(reply, self._names, holding.shard, self.checkpoint)
            place.position = "0-0" if self._index == 0 else place.committed

    async def _read(self, held: Sequence[OwnedShard]) -> list[Range]:
        rows = min(self._options.flush_rows_max, _BYTES_MAX // self._entry_bytes)
        count = max(1, rows // max(1, len(held)))
        commands = [command for each in held for command in self._reads(each, count)]
        replies = iter(await ask_many(self._commands, commands))
        stretches = []
        for holding in held:
            place, older = self._place(holding), None
            stored = next(replies)
            if place.held is not None:
                older = next(replies)
            entries = next(replies)
            if self.refused.has(holding.shard, stored, older, entries):
                continue
            committed = checkpoint_in(stored, self._names, holding.shard, self.checkpoint)
            if committed != place.committed:
                self._begin_again(holding)
            elif older:
                place.rung = True
                stretches += await self._held_stretch(holding, older)
            elif entries:
                place.held = None
                place.rung |= len(entries) >= count
                found = [queued(*entry) for entry in entries]
                stretches.append(Range(holding.tenure, found, place.committed))
            else:
                place.held, place.emptied = None, self._rounds
                self.refused.over(holding.shard)
        self.backlog = sum(len(stretch.entries) for stretch in stretches)
        if stretches:
            self._entry_bytes = max(64, sum(each.size for each in stretches) // self.backlog)
        return stretches

    def _reads(self, holding: OwnedShard, count: int) -> Iterator[Sequence[Arg]]:
        """The checkpoint, the next of those held unless all were read, the next of the writes."""
        place = self._place(holding)
        place.rung = False  # before reading: a later bell may mean a write that was not read
        yield "HGET", self._names.part(holding.shard, "done"), self.checkpoint
        part = self._names.part
        streams = [(part(holding.shard, "held"), place.held)] if place.held is not None else []
        for name, position in [*streams, (part(holding.shard, "writes"), place.position)]:
            yield "XRANGE", name, f"({position}", "+", "COUNT", count

    async def _held_stretch(self, holding: OwnedShard, entries: Sequence[Reply]) -> list[Range]:
        ids = [raw_id for raw_id, _ in entries]
        tried = self._names.part(holding.shard, "tried")
        (tokens,) = await ask_many(self._commands, [("HMGET", tried, *ids)])
        if self.refused.has(holding.shard, tokens):
            return []
        found = [
            queued(raw_id, fields, by) for (raw_id, fields), by in zip(entries, tokens, strict=True)
        ]
        return [Range(holding.tenure, found, self._place(holding).committed, held=True)]

    def _begin_again(self, holding: OwnedShard | None) -> None:
        """The checkpoint has moved, or the writes that were read are gone: see W9."""
        if holding is not None:
            log.warning("writes.read_again", sink=self._sink, shard=holding.shard)
            self._place(holding).begin_again()

    async def _flush_ours(self, stretches: Sequence[Range], *, alone: bool = False) -> None:
        """Flush; if shards are refused as fenced (W4) or busy (W8), flush the others."""
        try:
            await self._flush(stretches, alone=alone)
        except (BusySinkError, ServerRefused) as error:
            if len(stretches) == 1:
                return self._leave(stretches[0], error)
            for stretch in stretches:
                await self._flush_ours([stretch])
        except Fenced as error:
            ours = [stretch for stretch in stretches if self._ours([stretch])]
            if len(ours) < len(stretches):
                log.info("round.given_up", sink=self._sink, shards=len(stretches) - len(ours))
                parts = [ours] if ours else []
            elif len(ours) > 1:
                parts = [[stretch] for stretch in ours]
            else:
                log.error("sink.fenced", sink=self._sink, error=str(error))
                return self._ownership.fenced(ours[0].tenure)
            for part in parts:
                await self._flush_ours(part, alone=alone)
        return None

    def _leave(self, stretch: Range, error: ForebayError) -> None:
        """Its shard waits by itself: for a row (W8), or for its keys (W10)."""
        if isinstance(error, BusySinkError):
            self._park(stretch)
        else:
            self.refused.note(stretch.shard, error)

    def _park(self, stretch: Range) -> None:
        """Flush this beside the rounds."""
        holding = self._holdings.get(stretch.shard)
        if holding is None or self._parked is None:
            return
        place = self._place(holding)
        place.parked = True
        self._parked.start_soon(self._flush_parked, stretch, place)

    async def _flush_parked(self, stretch: Range, place: Cursor) -> None:
        try:
            await self._flush_ours([stretch], alone=True)
        except ForebayError as error:
            self.failing.say(log, "round.failed", error, sink=self._sink, shard=stretch.shard)
            await anyio.sleep(_SWEEP_S)
        finally:
            place.parked, place.rung = False, True
            self._settled()
            self.wake()

    async def _flush(self, stretches: Sequence[Range], *, alone: bool) -> None:
        versions = Coalescer(
            self._routes,
            self._sink,
            strays=self._index == 0,
            token=self._ownership.token,
            others=self._ownership.publishes_sinks,
        )
        versions.take(stretches)
        versions.doubtful.update(self._repeated(versions))
        for stretch in stretches:
            await self._hold(stretch, versions.strays, versions)
        progress = [stretch.progress for stretch in stretches]
        while (writes := versions.writes()) and self._delivery is not None:
            batch = SinkBatch(writes=writes, progress=progress)
            refused = await self._delivery.deliver(
                batch, ours=lambda: self._ours(stretches), alone=alone
            )
            versions.delivered(refused)
        for stretch in stretches:  # only now: the writes before them are stored
            await self._hold(stretch, versions.undecodable, versions, self._ownership.token)
        for shard, letters in versions.letters.items():
            await self._dead_letters.bury(shard, letters)
        await self._invalidate_all(*versions.after())
        await self._commit(stretches, versions)

    async def _hold(
        self,
        stretch: Range,
        held: Mapping[int, Sequence[Queued]],
        versions: Coalescer,
        token: str = "",
    ) -> None:
        """Set these writes of a stretch aside; ``token`` is of the member that has tried."""
        part, entries = partial(self._names.part, stretch.shard), held.get(stretch.shard, ())
        if not entries:
            return
        source = part("held" if stretch.held else "writes")
        reply = await run(
            self._commands,
            self._scripts["writes_hold"],
            [part("own"), source, part("held"), part("tried")],
            [
                self._node_id,
                stretch.tenure.epoch,
                self._held_max,
                token,
                *(entry.id for entry in entries),
            ],
        )
        if not reply[0]:
            raise Fenced(f"the writes of shard {stretch.shard}", stretch.tenure.epoch, 0)
        reason = "undecodable" if token else "no_sink"
        for entry, raw_id in zip(list(entries), reply[1:], strict=True):
            if not raw_id:
                self._counts["limit_reached", "held"] += 1
                versions.no_room(stretch.shard, entry)
            elif raw_id != b"-":
                self._counts["writebehind_held", reason] += 1
                if token and (holding := self._holdings.get(stretch.shard)) is not None:
                    self._place(holding).not_decoded(entry.key, entry.version, raw_id.decode())

    def _repeated(self, versions: Coalescer) -> Iterator[str]:
        """Keys of writes that this node has sunk before; the sink may have newer ones (W9)."""
        for shard, entry in versions.taken():
            holding = self._holdings.get(shard)
            sunk = self._place(holding).sunk if holding else "0-0"
            if entry.job is not None and order(entry.origin) <= order(sunk):
                yield entry.job.key

    async def _invalidate_all(self, keys: Sequence[str], tags: Sequence[str]) -> None:
        for start in range(0, max(len(keys), len(tags)), _NAMES_TOGETHER):
            end = start + _NAMES_TOGETHER
            await self._invalidate(keys[start:end], tags[start:end])

    async def _commit(self, stretches: Sequence[Range], versions: Coalescer) -> None:
        newest = versions.newest()
        calls = [
            self._commit_call(each, newest.get(each.shard, {}), versions) for each in stretches
        ]
        replies, moved = await run_many(self._commands, calls), []
        for stretch, reply in zip(stretches, replies, strict=True):
            if self.refused.has(stretch.shard, reply):
                continue
            self.refused.over(stretch.shard)
            holding = self._holdings.get(stretch.shard)
            if not reply[0]:
                self._ownership.fenced(stretch.tenure)
            elif reply[0] == _LOST:
                self._begin_again(holding)
            elif holding is not None and holding.tenure is stretch.tenure:
                moved.append((holding, stretch))
        await self._forget_held(moved, versions)
        for holding, stretch in moved:
            self._moved(holding, stretch, newest.get(stretch.shard, {}))
        await self._trim(
            [each for each, stretch in moved if len(each.places) > 1 and not stretch.held]
        )

    def _moved(self, holding: OwnedShard, stretch: Range, newest: Mapping[str, Queued]) -> None:
        place = self._place(holding)
        place.moved(self._reached(stretch, newest))
        if stretch.held:
            place.held = stretch.last_id
            return
        place.position = stretch.last_id
        if stretch.last_id == LAST_ID:
            self._begin_anew(holding)

    def _commit_call(
        self, stretch: Range, newest: Mapping[str, Queued], versions: Coalescer
    ) -> Call:
        holding = self._holdings.get(stretch.shard)
        only = not stretch.held and holding is not None and len(holding.places) == 1
        return checkpoint_call(
            self._scripts,
            self._names,
            self._node_id,
            stretch.tenure,
            checkpoint=self.checkpoint,
            follows=stretch.follows,
            last=versions.last_left(stretch),
            position=self._reached(stretch, newest),
            stream="held" if stretch.held else "writes",
            trimmed_to=stretch.last_id if only else "0-0",
            newest=newest,
        )

    def _reached(self, stretch: Range, newest: Mapping[str, Queued]) -> str:
        """The checkpoint, which never goes back; for held writes it counts their former ids."""
        holding = self._holdings.get(stretch.shard)
        ids = [each.origin for each in newest.values()] if stretch.held else [stretch.last_id]
        return latest([self._place(holding).committed if holding else "0-0", *ids])

    async def _forget_held(
        self, moved: Sequence[tuple[OwnedShard, Range]], versions: Coalescer
    ) -> None:
        """Delete held writes that are done or were replaced by newer writes."""
        done: dict[int, list[str]] = {}
        held = {stretch.shard for _, stretch in moved if stretch.held}
        for shard, entry in versions.finished():
            if shard in held:
                done.setdefault(shard, []).append(entry.id)
        for holding, _ in moved:
            older = self._place(holding).undecodable
            for key, newest in versions.newest().get(holding.shard, {}).items() if older else ():
                gone = [(v, held_id) for v, held_id in older.get(key, ()) if v < newest.version]
                done.setdefault(holding.shard, []).extend(held_id for _, held_id in gone)
                older[key] = [each for each in older.get(key, ()) if each not in gone]
        if done:
            names = self._names
            await self._commands.call_many(
                [("XDEL", names.part(shard, "held"), *ids) for shard, ids in done.items() if ids]
                + [("HDEL", names.part(shard, "tried"), *ids) for shard, ids in done.items() if ids]
            )

    async def _trim(self, moved: Sequence[OwnedShard]) -> None:
        """With several lanes the last of them to pass an entry trims it."""
        calls = [trim_call(self._scripts, self._names, each) for each in moved]
        await run_many(self._commands, calls)
        for each in moved:
            if each.passed == LAST_ID:
                for place in each.places:
                    place.begin_anew()

    def _begin_anew(self, holding: OwnedShard) -> None:
        """Nothing can follow the last id; until now writes were refused as by a full stream."""
        stream = self._names.part(holding.shard, "writes")
        log.warning("writes.last_id", shard=holding.shard, stream=stream)
        if len(holding.places) == 1:
            self._place(holding).begin_anew()

    def _place(self, holding: OwnedShard) -> Cursor:
        return holding.places[self._index]

    def _ours(self, stretches: Sequence[Range]) -> bool:
        return all(self._in_force(stretch.tenure) for stretch in stretches) and not any(
            holding.yielding
            for stretch in stretches
            if (holding := self._holdings.get(stretch.shard)) is not None
        )

    def _in_force(self, tenure: Claim) -> bool:
        return self._ownership.in_force(tenure.resource) is tenure

    @property
    def checkpoint(self) -> str:
        """The name of the sink."""
        return f"writes:{self._sink}" if self._sink else "writes"
