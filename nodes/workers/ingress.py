"""Ingress: one owner at a time applies what services publish, in the order published.

G1  The checkpoint moves past an event when it was applied, is a dead letter, or is held.
G2  After a crash a batch is applied again; marks make the repetition harmless (plan P2).
G3  No event stops the ones behind it: what can never be applied goes to the dead letters.
    A write without a sink does not: the owner of its shard holds it (see ``Held``);
    what a newer node can read is held and published again when one takes over (twice, if it
    dies in the midst of it). Of held events there is a bound; one more is a dead letter.
G4  A write is refused by a full stream only as long as it is full: ingress waits, and so,
    by the bound of its own stream, do the publishers.
G5  Refreshes are hints: they are applied last, and dropped where anything stands against it.
G6  No event is discarded for its id. Ids grow within a generation of the stream; where they went
    back, a new one begins (``ingress_take``). Reads begin at the stream's start, since applied
    events are deleted with the checkpoint. Only the largest possible id is a dead letter: it is
    set aside with the events before it, so that publishers can continue.
G7  An id ahead of the server's clock is reported, and forgotten when the stream is drained.

Reading blocks, so it has a connection of its own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence

import anyio
import structlog
from anyio.abc import TaskStatus

from ...coordinator.log.ownership import Claim, Ownership
from ...coordinator.log_once import LogOnce
from ...coordinator.valkey.link import Arg, Commands, Reply
from ...coordinator.valkey.scripting import Scripts, ask_many, granted, run
from ...schemas.errors import (
    Fenced,
    ForebayError,
    InvalidEvent,
    NewerSchema,
    ServerRefused,
    UnreadableRecord,
)
from ...schemas.events import read_event
from ...schemas.keys import EVENTS, Names
from ...schemas.replies import LAST_ID, field_map, following, integer, order, stream_id
from ...schemas.settings import Durable
from ..cache.core import Core
from .applier import Applier
from .dead_letters import DeadLetter, DeadLetters
from .plan import Taken, plan
from .requests import RefreshRequests
from .routes import Routes

__all__ = ["Ingress"]

log = structlog.get_logger(__name__)

Fields = Sequence[bytes] | None
Mark = tuple[int, tuple[int, int]]  #: generation; milliseconds and number of the id

_BATCH = 500
_RETRY_S = 0.2
_YIELD_S = 2.0
_LOOK_S = 0.25
_PAGE = 100
_AHEAD_MS = 1_000  # less is between two looks at the clock
_NO_MARK: Mark = (0, (0, 0))
_MARK = re.compile(rb"([0-9]{16})-([0-9]{20})-([0-9]{20})-[0-9]{5}")
_GENERATION_MAX = 2**52 - 1  # as in _ingress.lua
_NO_FIELD = InvalidEvent(
    "wrong_field",
    "the entry has no field 'event'",
    field="event",
    fix="XADD ... * event '<json>'",
)
_IS_LAST = InvalidEvent(
    "last_id",
    "a stream can have no larger id, so nothing could be published after it",
    field="id",
    fix="publish it again with '*' as the id",
)


class Ingress:
    def __init__(
        self,
        commands: Commands,
        blocking: Commands,
        names: Names,
        scripts: Scripts,
        ownership: Ownership,
        routes: Routes,
        dead_letters: DeadLetters,
        core: Core,
        *,
        durable: Durable,
        block_ms: int = 500,
    ) -> None:
        """``block_ms``: shorter than what the blocking connection takes for silence."""
        self._commands = commands
        self._blocking = blocking
        self._names = names
        self._scripts = scripts
        self._ownership = ownership
        self._routes = routes
        self._dead_letters = dead_letters
        self._durable = durable
        self._block_ms = block_ms
        self._node_id = core.node_id
        self._clock = core.clock
        self._server_clock = core.server_clock
        self._instruments = core.instruments
        self._follower = core.follower
        self._applier = Applier(commands, routes, core)
        self._requests = RefreshRequests(routes, core)
        self._owner = anyio.Event()
        self._idle = anyio.Event()
        self._busy = False
        self._yielding = False
        self.failing = LogOnce(core.clock)
        self._before = names.part(EVENTS, "before")
        self._newest = _NO_MARK  # of the events known to be applied
        self.ahead_ms = 0  #: how far the newest id is ahead of the server's clock, if far

    def __repr__(self) -> str:
        state = "yielding" if self._yielding else "busy" if self._busy else "idle"
        return f"<Ingress of {self._names.events} {state}>"

    def gained(self, tenure: Claim) -> None:
        if tenure.resource == EVENTS:
            self._yielding = False
            self._owner.set()

    def lost(self, tenure: Claim) -> None:
        """Seen by itself: the tenure is looked at before every step."""

    async def yielding(self, tenures: Sequence[Claim]) -> None:
        """Take no further batch, and wait for the one under way, unless that waits itself."""
        if any(tenure.resource == EVENTS for tenure in tenures):
            self._yielding = True
            with anyio.move_on_after(_YIELD_S):
                while self._busy:
                    await self._idle.wait()

    async def empty(self) -> None:
        """Wait until all that was published by now is applied, as long as this node is the owner.

        Raises:
            Unavailable: it is not known.
        """
        newest = await self._commands.call("XREVRANGE", self._names.events, "+", "-", "COUNT", 1)
        last_id = _id(newest[0]) if newest else "-"
        while self._ownership.in_force(EVENTS) is not None:
            before, rest = granted(
                await self._commands.call_many(
                    [
                        ("XLEN", self._before),
                        ("XRANGE", self._names.events, "-", last_id, "COUNT", 1),
                    ]
                )
            )
            if not before and not rest:
                return
            with anyio.move_on_after(_LOOK_S):
                await self._idle.wait()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Apply events, whenever this node is the owner, until cancelled."""
        task_status.started()
        while True:
            tenure = self._ownership.in_force(EVENTS)
            if tenure is None or self._yielding:
                self._owner = anyio.Event()
                with anyio.move_on_after(_LOOK_S):
                    await self._owner.wait()
                continue
            try:
                await self._serve(tenure)
            except Fenced as error:
                log.info("ingress.given_up", error=str(error))
            except ForebayError as error:
                self.failing.say(log, "ingress.interrupted", error)
                await anyio.sleep(_RETRY_S)

    async def _serve(self, tenure: Claim) -> None:
        """Apply batch after batch as long as the tenure is in force."""
        await self._take_over(tenure, ())  # so that there is room behind the last id
        await self._try_to_publish_held(tenure)
        doubts = None
        while self._ours(tenure):
            entries = await self._read()
            if not self._ours(tenure):
                continue
            if doubts != self._follower.doubts:  # marks may be lost, too
                doubts = self._follower.doubts
                self._newest = await self._newest_mark()
            self._busy = True
            try:
                generation = await self._take_over(tenure, entries)
                if entries:
                    await self._apply(tenure, entries, generation)
                self.failing.over()
            finally:
                self._busy = False
                self._idle.set()
                self._idle = anyio.Event()

    async def _read(self) -> Sequence[Sequence[Reply]]:
        """The first entries; of the stream set aside, if it exists."""
        reply = await self._blocking.call(
            "XREAD", "COUNT", _BATCH, "BLOCK", self._block_ms,
            "STREAMS", self._before, self._names.events, "0-0", "0-0",
            timeout_ms=self._block_ms + 2_000,
        )  # fmt: skip
        entries: Sequence[Sequence[Reply]] = reply[0][1] if reply else ()
        return entries

    async def _newest_mark(self) -> Mark:
        """Generation and id of the newest mark that a shard has."""
        heads = [self._names.part(shard, "head") for shard in range(self._names.shards)]
        replies = await self._commands.call_many([("HGET", head, "i") for head in heads])
        return max(
            [read_mark(reply) for reply in replies if isinstance(reply, bytes)] or [_NO_MARK]
        )

    async def _take_over(self, tenure: Claim, entries: Sequence[Sequence[Reply]]) -> int:
        """Announce that these are applied next; returns the generation of the stream."""
        first, last = (_id(entries[0]), _id(entries[-1])) if entries else ("", "")
        highest, (ms, seq) = self._newest
        reply = await self._run(
            "ingress_take", tenure, first, last, _digest(entries), highest, f"{ms}-{seq}"
        )
        generation = integer(reply[1], "the generation of ingress")
        self._report(generation, integer(reply[2], "the id of ingress"), reply[3])
        return generation

    def _report(self, generation: int, ahead_ms: int, why: bytes) -> None:
        stream = self._names.events
        if why:
            reason = why.decode()
            self._instruments.counts["ingress_generations", reason] += 1
            say = log.info if reason in ("begun", "drained") else log.warning
            say("ingress.generation_begun", stream=stream, generation=generation, reason=reason)
        if (ahead_ms > _AHEAD_MS) != (self.ahead_ms > _AHEAD_MS):
            if ahead_ms > _AHEAD_MS:
                fix = "publish with '*' as the id; check the clock of the one who gave the id"
                log.warning("ingress.id_ahead", stream=stream, ahead_s=ahead_ms / 1000, fix=fix)
            else:
                log.info("ingress.id_current", stream=stream)
        self.ahead_ms = ahead_ms if ahead_ms > _AHEAD_MS else 0

    def _ours(self, tenure: Claim) -> bool:
        return self._ownership.in_force(EVENTS) is tenure and not self._yielding

    def _check(self, tenure: Claim, waiting: bool) -> None:
        """A batch under way is finished before yielding, but not if it has to wait."""
        if self._ownership.in_force(EVENTS) is not tenure or (waiting and self._yielding):
            raise Fenced("the ingress stream", tenure.epoch, 0)

    async def _apply(
        self, tenure: Claim, entries: Sequence[Sequence[Reply]], generation: int
    ) -> None:
        started = self._clock.monotonic()
        batch: list[Taken] = []
        letters: list[DeadLetter] = []
        for raw_id, fields in entries:
            entry_id = bytes(raw_id).decode()
            try:
                batch.append(self._take(entry_id, fields, generation))
            except NewerSchema as error:
                await self._hold(entry_id, fields, error, letters)
            except InvalidEvent as error:
                self._set_aside(entry_id, fields, error, letters)
        steps, unread = plan(batch, self._names), len(letters)
        dead = await self._applier.apply(steps, lambda waiting: self._check(tenure, waiting))
        await self._dead_letters.bury(EVENTS, [*letters, *dead])
        await self._requests.carry_out([taken.event.body for taken in batch])
        last_id = _id(entries[-1])
        await self._commit(tenure, last_id)
        self._newest = max(self._newest, (generation, order(last_id)))
        self._instruments.counts["events_processed", "unknown", "dead"] += unread
        self._measure(batch, {letter.entry_id for letter in dead}, started)

    def _take(self, entry_id: str, fields: Fields, generation: int) -> Taken:
        if entry_id == LAST_ID:
            raise _IS_LAST
        raw = _event_in(fields)
        if raw is None:
            raise _NO_FIELD
        event = read_event(raw, bytes_max=self._durable.event_bytes_max)
        return Taken(entry_id, event, raw, generation, _held_as(fields))

    def _set_aside(
        self, entry_id: str, fields: Fields, error: InvalidEvent, letters: list[DeadLetter]
    ) -> None:
        raw = _event_in(fields)
        original = b" ".join(fields or ()) if raw is None else raw
        letters.append(DeadLetter(entry_id, original, error))

    async def _hold(
        self, entry_id: str, fields: Fields, error: NewerSchema, letters: list[DeadLetter]
    ) -> None:
        """Keep it for a newer node, once, under the id that it had."""
        held, raw = self._names.part(EVENTS, "held"), _event_in(fields) or b""
        try:
            (count,) = granted(await ask_many(self._commands, [("XLEN", held)]))
            if count >= self._durable.dead_letters_max:
                self._instruments.counts["limit_reached", "held"] += 1
                fix = "upgrade a node, so that what is held is applied"
                fault = InvalidEvent("unknown_type", f"{error}; too many are held", fix=fix)
                return self._set_aside(entry_id, fields, fault, letters)
            if not await self._append(held, entry_id, "event", raw, "held", entry_id):
                return None  # it was held before the crash
        except ServerRefused as refused:
            if "exhausted" not in str(refused) and not refused.of_type:
                raise
            fault = InvalidEvent("unknown_type", f"{error}; it cannot be held: {refused}")
            return self._set_aside(entry_id, fields, fault, letters)
        self._instruments.counts["events_processed", "unknown", "held"] += 1
        log.error("event.held", entry=entry_id, error=str(error))
        return None

    async def _try_to_publish_held(self, tenure: Claim) -> None:
        """Events that the server refuses stay held: new events must not wait for them."""
        try:
            await self._publish_held(tenure)
        except ServerRefused as error:
            log.warning("event.still_held", error=str(error))

    async def _publish_held(self, tenure: Claim) -> None:
        """Give events that this node can read, and an older one could not, another try."""
        held, start = self._names.part(EVENTS, "held"), "-"
        while page := await self._held_page(held, start):
            for raw_id, fields in page:
                self._check(tenure, waiting=True)
                await self._publish_again(held, raw_id, field_map(fields))
            start = f"({bytes(page[-1][0]).decode()}"

    async def _held_page(self, held: str, start: str) -> Sequence[Sequence[Reply]]:
        read = ("XRANGE", held, start, "+", "COUNT", _PAGE)
        (page,) = granted(await ask_many(self._commands, [read]))
        entries: Sequence[Sequence[Reply]] = page
        return entries

    async def _publish_again(self, held: str, raw_id: bytes, fields: Mapping[bytes, bytes]) -> None:
        raw, held_as = fields.get(b"event", b""), fields.get(b"held", raw_id)
        try:
            read_event(raw, bytes_max=self._durable.event_bytes_max)
        except NewerSchema:
            return
        except InvalidEvent as error:
            log.warning("event.unheld", entry=bytes(raw_id).decode(), error=str(error))
        await self._append(self._names.events, "*", "event", raw, "held", held_as)
        await self._commands.call("XDEL", held, raw_id)

    async def _append(self, stream: str, entry_id: str, *fields: Arg) -> bool:
        """Move an event there, also when memory is full; false if that id exists already."""
        script = self._scripts["stream_append"]
        reply = await run(self._commands, script, [stream], [entry_id, 0, *fields])
        return bool(reply[0])

    async def _commit(self, tenure: Claim, last_id: str) -> None:
        reply = await self._run("ingress_commit", tenure, last_id, following(last_id))
        if reply[1] == b"drained":
            log.info("ingress.stream_renewed", stream=self._names.events, last_id=last_id)
            self._instruments.counts["ingress_generations", "drained"] += 1

    async def _run(self, script: str, tenure: Claim, *args: Arg) -> Sequence[Reply]:
        """Run a script that only the owner may run.

        Raises:
            Fenced: another owner is in force.
        """
        part = self._names.part
        keys = [part(EVENTS, "own"), part(EVENTS, "done"), self._names.events, self._before]
        given = [self._node_id, tenure.epoch, *args]
        reply: Sequence[Reply] = await run(self._commands, self._scripts[script], keys, given)
        if not reply[0]:
            self._ownership.fenced(tenure)
            raise Fenced("the ingress stream", tenure.epoch, integer(reply[1], "the owner's epoch"))
        return reply

    def _measure(self, batch: Sequence[Taken], dead: Collection[str], started: float) -> None:
        """Count each event once, now that its batch will not be applied again; writes that were
        applied are counted by the applier, which knows duplicates.
        """
        now_ms, instruments = self._server_clock.now_ms(), self._instruments
        took_s = (self._clock.monotonic() - started) / max(1, len(batch))
        for taken in batch:
            name = taken.event.name
            if taken.id in dead:
                instruments.counts["events_processed", name, "dead"] += 1
                continue
            if name == "invalidate":
                instruments.counts["events_processed", name, "applied"] += 1
            if published_ms := taken.published_ms:
                delay_ms = max(0, now_ms - published_ms)
                instruments.observe("event_delay_seconds", delay_ms / 1000, name)
            instruments.observe("event_processing_seconds", took_s)


def _event_in(fields: Fields) -> bytes | None:
    """The event in an entry's fields; None if there is no such field."""
    if fields and len(fields) == 2:
        return fields[1] if fields[0] == b"event" else None
    return field_map(fields).get(b"event")


def _id(entry: Sequence[Reply]) -> str:
    return stream_id(entry[0], "the id of an event")


def _held_as(fields: Fields) -> str:
    """The id that it had before it was held; empty if it was not."""
    try:
        return stream_id(field_map(fields).get(b"held"), "the field held")
    except UnreadableRecord:
        return ""


def _digest(entries: Sequence[Sequence[Reply]]) -> str:
    """A digest of the first entry: distinguishes it from another entry with the same id."""
    fields = field_map(entries[0][1]) if entries else {}
    parts = [part for pair in fields.items() for part in pair]
    return hashlib.blake2b(b"\0".join(parts), digest_size=8).hexdigest()


def read_mark(raw: bytes) -> Mark:
    """The parsed mark of a shard; the oldest possible mark if it cannot be parsed."""
    found = _MARK.fullmatch(raw)
    mark = _NO_MARK if found is None else (int(found[1]), (int(found[2]), int(found[3])))
    return mark if mark[0] < _GENERATION_MAX else _NO_MARK
