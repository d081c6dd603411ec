"""The one connection to a primary on which all commands of a process travel.

I1  A reply reaches the caller whose command it answers, or nobody. Cancelling a caller costs only
    its reply: the connection, and everybody else's calls, go on.
I2  The link never sends a command twice. After a loss ``outcome_unknown`` tells the
    caller whether it may have been carried out.
I3  Every call ends by its deadline, give or take a step of the sweeper; while there is
    no connection it waits for one, unless the breaker is open.
I4  A connection on which nothing was heard for twice the command timeout, though replies were due,
    is dropped and made anew.
I5  At most ``in_flight_max`` commands are under way; one more is refused at once.
I6  State listeners hear False before any caller learns of the loss, and True before any command
    goes out on the new connection.
I7  If a primary is required, the connection is to one: a replica is refused when dialing, and
    READONLY ends the connection. State listeners get True once more when an open connection
    shows another history: the server was demoted and promoted in between.

The breaker counts lost connections, failed tries to connect, and stalls (calls found late at one
time are one); any reply is a success. Nothing is retried, decoded, or sent that must be alone.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Protocol

import anyio
import structlog
from anyio.abc import TaskStatus
from libvalkey import pack_command
from msgspec import Struct

from ...schemas.errors import BreakerOpen, Disconnected, ServerRefused, TimedOut, Unavailable
from ...schemas.settings import Valkey
from ..clock import Clock
from ..log_once import LogOnce
from .breaker import Breaker, BreakerState
from .dialer import Backoff, Dialed, Dialer, history_of, was_promoted
from .shareable import ALONE, GUARDED, check_shareable
from .waiting import Arg, Batch, Due, Listeners, Parked, Reply, Slot, Sweeper, Waiter, expire
from .wire import EAGER_BYTES, CommandWire, Tally

__all__ = ["Arg", "Commands", "Link", "LinkStatistics", "Reply"]

log = structlog.get_logger(__name__)

_LASTED_S = 10.0  #: a connection that held so long; the next loss is another outage


class Commands(Protocol):
    """What most of the project needs to know of a link."""

    async def call(self, *args: Arg, timeout_ms: int | None = None) -> Reply: ...

    async def call_many(
        self, commands: Sequence[Sequence[Arg]], *, timeout_ms: int | None = None
    ) -> list[Reply]:
        """One write, replies in order; a refused command is a ServerRefused in its place."""


class LinkStatistics(Struct, frozen=True, kw_only=True):
    name: str
    connected: bool
    connects: int
    reconnects: int
    calls: int  #: commands written
    replies: int
    timeouts: int
    dropped_replies: int  #: their callers had given up
    in_flight: int
    in_flight_max_seen: int
    breaker: BreakerState


class Link:
    def __init__(
        self,
        dialer: Dialer,
        options: Valkey,
        *,
        name: str,
        clock: Clock,
        rng: random.Random,
        breaker: Breaker,
        blocking: bool = False,  # it has one user, who may hold everything up
    ) -> None:
        self.name = name
        self._blocking = blocking
        self.breaker = breaker
        self._dialer = dialer
        self._clock = clock
        self._backoff = Backoff(
            rng, jitter_ms=options.reconnect_jitter_ms, max_ms=options.reconnect_max_ms
        )
        self._timeout_ms = options.command_timeout_ms
        self._silence_s = 2 * options.command_timeout_ms / 1000
        self._in_flight_max = options.in_flight_max
        self._wire: CommandWire | None = None
        self._open: CommandWire | None = None  # the wire, if calls may simply go on it
        self._due: Due = (0.0, 0)  # of this tick's calls that have the usual timeout
        self._parked = Parked()
        self._sweeper = Sweeper(clock, self._sweep)
        self._tally = Tally()
        self._connects = 0
        self._generation = 0
        self._history = ""
        self._history_since = 0  # the generation
        self._connected_at = 0.0
        self._failing = LogOnce(clock, connection=True)
        self._failure: Unavailable | ServerRefused | None = None
        self._state = Listeners[bool](f"link {name}")
        self._scope: anyio.CancelScope | None = None
        self._closed = False

    async def call(self, *args: Arg, timeout_ms: int | None = None) -> Reply:
        if timeout_ms is None:
            return await self.call_nowait(*args)
        return await self._call_carefully(args, timeout_ms)

    def call_nowait(self, *args: Arg) -> asyncio.Future[Reply]:
        """Send with the usual timeout. What forbids sending is raised, the rest is awaited."""
        wire = self._open
        if wire is None or args[0] in GUARDED or len(wire.waiting) >= self._in_flight_max:
            return self._call_carefully(args, self._timeout_ms)
        packed = pack_command(args)
        future = wire.create_future()
        if not wire.out:
            self._begin(wire)
        wire.out.append(packed)
        wire.waiting.append((future, self._due, args[0]))
        wire.out_bytes += len(packed)
        if wire.out_bytes >= EAGER_BYTES:
            wire.flush()
        return future

    async def call_many(
        self, commands: Sequence[Sequence[Arg]], *, timeout_ms: int | None = None
    ) -> list[Reply]:
        """One write, replies in order; a refused command is a ServerRefused in its place."""
        if not commands:
            return []
        batch = Batch(asyncio.get_running_loop().create_future(), len(commands))
        self._enqueue([tuple(args) for args in commands], batch, timeout_ms or self._timeout_ms)
        return await batch.future

    def _call_carefully(self, args: tuple[Arg, ...], timeout_ms: int) -> asyncio.Future[Reply]:
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._enqueue([args], future, timeout_ms)
        return future

    def _enqueue(self, commands: list[tuple[Arg, ...]], waiter: Waiter, timeout_ms: int) -> None:
        for args in commands:
            if args[0] in GUARDED and not (self._blocking and args[0] in ALONE):
                check_shareable(args)
        packed = [pack_command(args) for args in commands]
        wire = self._admit(len(commands))
        due = (self._clock.monotonic() + timeout_ms / 1000, timeout_ms)
        slots: list[Slot] = [(waiter, due, args[0]) for args in commands]
        if wire is None:
            self._parked.add(packed, slots)
        else:
            self._write(wire, packed, slots)
        self._sweeper.by(due[0])

    def _admit(self, commands: int) -> CommandWire | None:
        """The wire to write to, None if the call has to wait for one; raises if it may not."""
        if self._closed:
            raise Disconnected(f"the link {self.name} is closed")
        if self.in_flight + commands > self._in_flight_max:
            raise Unavailable(f"in-flight limit of {self._in_flight_max} commands")
        if self._wire is not None and not self._wire.paused:
            self.breaker.check()
            return self._wire
        if not self.breaker.closed:
            raise self.breaker.refusal()  # the probe is for whoever can send or dial
        return None

    def _write(self, wire: CommandWire, packed: list[bytes], slots: list[Slot]) -> None:
        if not wire.out:
            self._begin(wire)
        wire.out += packed
        wire.waiting += slots

    def _begin(self, wire: CommandWire) -> None:
        """Before the first command of a tick: one clock reading, one flush."""
        now = self._clock.monotonic()
        if not wire.waiting:
            wire.heard_at = now
        self._due = (now + self._timeout_ms / 1000, self._timeout_ms)
        self._sweeper.by(self._due[0])
        wire.loop.call_soon(wire.flush)

    def _sweep(self, now: float) -> float:
        unsent, nearest = self._parked.expire(now, self._not_sent)
        self._tally.timeouts += unsent
        if (wire := self._wire) is not None and wire.waiting:
            expired, nearest_sent = expire(wire.waiting, now)
            self._tally.timeouts += expired
            silent_at = wire.heard_at + self._silence_s
            nearest = min(nearest, nearest_sent, silent_at)
            if expired:
                self.breaker.failed()
                self._route()
            if silent_at <= now:
                wire.drop(f"nothing was heard for {self._silence_s:g} s")
        return nearest

    def _not_sent(self, timeout_ms: int) -> Unavailable:
        if self._wire is not None:
            return TimedOut(timeout_ms, outcome_unknown=False)
        cause = f": {self._failure}" if self._failure else ""
        return Disconnected(f"no connection within {timeout_ms} ms{cause}")

    def _answered(self) -> None:
        self.breaker.succeeded()
        if self._open is None:
            self._route()

    def _route(self) -> None:
        """Find out anew where calls may go, and let go of those that can stop waiting."""
        wire = self._wire
        if wire is not None and wire.lost.is_set():
            self._lose(wire)
            wire = None
        writable = wire is not None and not wire.paused
        self._open = wire if writable and self.breaker.closed else None
        if not self.breaker.closed:
            self._parked.refuse(self.breaker.refusal)
        elif wire is not None and writable and self._parked:
            for packed, slots in self._parked.take():
                self._write(wire, packed, slots)

    def _lose(self, wire: CommandWire) -> None:
        self._wire = self._open = None
        self._failure = Disconnected(wire.fault)
        if not self._closed:
            if self._clock.monotonic() - self._connected_at >= _LASTED_S:
                self._failing.over()
            self._failing.say(log, "link.lost", self._failure, link=self.name)
            self.breaker.failed()
        self._state.tell(False)

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Keep the connection up until cancelled or closed; once in a link's life."""
        with anyio.CancelScope() as self._scope:
            task_status.started()
            try:
                while not self._closed:
                    await self._connect_and_hold()
                    retry_s = self.breaker.retry_after_ms / 1000
                    await anyio.sleep(max(self._backoff.next_s(), retry_s))
            finally:
                await self._shut()

    async def _connect_and_hold(self) -> None:
        try:
            self.breaker.check()
            dialed = await self._dialer.dial()
            wire = self._attached(dialed)
        except BreakerOpen:
            return
        except (Unavailable, ServerRefused) as error:
            self._failing.say(log, "link.connect_failed", error, link=self.name)
            self._failure = error
            self.breaker.failed()
            self._route()
            self._state.wake()
            return
        except BaseException:
            self.breaker.abandoned()
            raise
        self._connected(wire, dialed.history)
        since = self._clock.monotonic()
        await wire.lost.wait()
        self._backoff.lasted(self._clock.monotonic() - since)

    def _attached(self, dialed: Dialed) -> CommandWire:
        return CommandWire(
            dialed,
            clock=self._clock,
            tally=self._tally,
            on_replies=self._answered,
            on_change=self._route,
            primary=self._dialer.primary,
        )

    def _connected(self, wire: CommandWire, history: str) -> None:
        self._wire, self._failure = wire, None
        self._connects += 1
        self._renew(history)
        self._connected_at = self._clock.monotonic()
        log.info("link.connected", link=self.name, address=self._dialer.address)
        self.breaker.succeeded()
        self._state.tell(True)
        self._route()

    async def _shut(self) -> None:
        self._closed = True
        reason = f"the link {self.name} was closed"
        self._failure = Disconnected(reason)
        self._parked.refuse(lambda: Disconnected(reason))
        self._sweeper.stop()
        if self._wire is not None:
            await self._wire.aclose(reason)
        self._state.wake()

    async def aclose(self) -> None:
        """End ``run``; whoever still waits gets Disconnected."""
        if self._scope is not None:
            self._scope.cancel()
        await self._shut()

    async def ready(self) -> None:
        """Wait for the connection; ServerRefused if the server will not have us at all."""
        while self._wire is None:
            if self._closed:
                raise Disconnected(f"the link {self.name} is closed")
            if isinstance(refused := self._failure, ServerRefused):
                raise ServerRefused(refused.code, refused.message, refused.command)
            await self._state.changed()

    def on_state(self, listener: Callable[[bool], None]) -> Callable[[], None]:
        """Have ``listener(connected)`` called as it changes; returns how to end that."""
        return self._state.add(listener)

    @property
    def connected(self) -> bool:
        return self._wire is not None

    @property
    def connects(self) -> int:
        """Connections made so far: another number, another connection."""
        return self._connects

    @property
    def generation(self) -> int:
        """Goes up whenever the server may have lost accepted writes (I7)."""
        return self._generation

    @property
    def history(self) -> str:
        """Of the data, as the primary names it; empty where it was not asked."""
        return self._history

    def check_primary(self, reply: bytes) -> None:
        """Take in the answer to ``ASK_HISTORY`` in this connection (I7).

        Raises:
            ServerRefused: a replica answers by now; the connection is given up.
        """
        try:
            history = history_of(reply)
        except ServerRefused as refused:
            self.redial(str(refused))
            raise
        if history == self._history:
            return
        if not was_promoted(reply):
            self._history = history
        else:
            self._renew(history)
            log.warning("link.history_changed", link=self.name)
            self._state.tell(True)

    def _renew(self, history: str) -> None:
        self._generation += 1
        if history != self._history:
            self._history, self._history_since = history, self._generation

    def same_history(self, since: int) -> bool:
        """Whether nothing that was accepted since this generation can have been lost."""
        return since >= self._history_since

    def redial(self, reason: str) -> None:
        """Close the connection, if open, and make another."""
        if self._wire is not None:
            self._wire.drop(reason)

    @property
    def failure(self) -> Unavailable | ServerRefused | None:
        """Why there is no connection, as far as is known."""
        return self._failure

    @property
    def in_flight(self) -> int:
        return self._parked.commands + (len(self._wire.waiting) if self._wire else 0)

    def statistics(self) -> LinkStatistics:
        tally = self._tally
        return LinkStatistics(
            name=self.name,
            connected=self.connected,
            connects=self._connects,
            reconnects=max(0, self._connects - 1),
            calls=tally.calls,
            replies=tally.replies,
            timeouts=tally.timeouts,
            dropped_replies=tally.dropped_replies,
            in_flight=self.in_flight,
            in_flight_max_seen=tally.in_flight_max_seen,
            breaker=self.breaker.state,
        )

    def __repr__(self) -> str:
        state = "connected" if self.connected else "closed" if self._closed else "disconnected"
        return f"<Link {self.name} {self._dialer.address} {state} in_flight={self.in_flight}>"
