"""CLIENT TRACKING: the server tells which keys were changed, by whomever.

One connection of its own, in RESP2: it asks for everything under one prefix (BCAST), redirects
that to itself, and subscribes. Tracking and subscription so have one fate.

T1  ``lost`` is said whenever telling begins, the first time too: what was changed before may
    never have been told, and what is changed from then on is told, until the next ``lost``.
T2  ``changed`` gives the names as the server had them, at least once for each change; several
    changes of one key within a turn of the server's loop are told once. Expired and evicted
    keys are told like deleted ones, and the changes of our own scripts like all others.
T3  ``flushed`` says that all keys may be gone.
T4  A connection that looks alive but is not is found out: the server owes a PONG every
    ``interval_s``; after two that did not come the connection is made anew.
T5  ``run`` returns only if the server refuses to track for us; ``refused`` then says why. It
    may be run again after it was cancelled.

One prefix, not one for each shard: the server compares every key that anybody changes with
every prefix. Per change of an entry, 64 of them cost it 4.3 microseconds, 1,024 cost 59, and
the one they have in common 1.1, though it brings the names of leases and logs as well. NOLOOP
is not asked for: nothing is changed through this connection, and the server would write each
message twice. Key patterns of an ACL are not applied to what is told, and neither is the
database: a key of the same name in another one is told too, and a FLUSHDB of another one as a
flush. Only keys of the server
that was dialed are told: in a cluster, each primary wants a connection.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import anyio
import structlog
from anyio.abc import TaskStatus
from libvalkey import pack_command
from msgspec import Struct

from ...schemas.errors import Disconnected, ServerRefused, Unavailable
from ...schemas.settings import Valkey
from ..clock import Clock
from ..log_once import LogOnce
from .dialer import Backoff, Dialed, Dialer
from .wire import MORE, Wire

__all__ = ["Told", "Tracking", "TrackingStatistics"]

log = structlog.get_logger(__name__)

_LASTED_S = 10.0  #: a connection that held so long; the next loss is another outage

_CHANNEL = b"__redis__:invalidate"  #: Valkey's name for it, too
_PONGS_MISSING_MAX = 2
_PING = pack_command(("PING",))
_WHO_AM_I = pack_command(("CLIENT", "ID"))


class Told(Protocol):
    """Who is told. Called synchronously; must not block."""

    def changed(self, names: Sequence[bytes]) -> None: ...

    def flushed(self) -> None: ...

    def lost(self) -> None: ...


class TrackingStatistics(Struct, frozen=True, kw_only=True):
    live: bool
    connects: int
    names: int  #: told so far
    silences: int  #: connections given up since no PONG came


class _TrackingWire(Wire):
    """A connection that goes through: its id, tracking on, subscribed, told."""

    def __init__(
        self, dialed: Dialed, *, prefix: bytes, told: Told, on_live: Callable[[], None]
    ) -> None:
        self.live = False
        self.names = 0
        self.pongs_missing = 0
        self.refused: ServerRefused | None = None
        self._prefix = prefix
        self._told = told
        self._on_live = on_live
        super().__init__(dialed)
        self.transport.write(_WHO_AM_I)

    def ping(self) -> None:
        self.pongs_missing += 1
        self.transport.write(_PING)

    def take_replies(self) -> None:
        while (reply := self.parser.gets()) is not MORE and not self.lost.is_set():
            self._take(reply)

    def _take(self, reply: Any) -> None:
        match reply:
            case [b"message", _, None]:
                self._told.flushed()
            case [b"message", _, names]:
                self.names += len(names)
                self._told.changed(names)
            case b"PONG" | [b"pong", _]:  # the former before it subscribed
                self.pongs_missing = 0
            case int():
                self._track(reply)
            case [b"subscribe", *_]:
                self.live = True
                self._on_live()
            case ServerRefused():
                self.refused = reply
                self.drop(f"the server refused: {reply.code} {reply.message}")

    def _track(self, own_id: int) -> None:
        track = ("CLIENT", "TRACKING", "ON", "REDIRECT", own_id, "BCAST", "PREFIX", self._prefix)
        self.transport.write(pack_command(track) + pack_command((b"SUBSCRIBE", _CHANNEL)))

    def ended(self) -> None:
        self.live = False


class Tracking:
    """Follows the keys that begin with ``prefix``."""

    def __init__(
        self,
        dialer: Dialer,
        options: Valkey,
        *,
        prefix: bytes,
        told: Told,
        clock: Clock,
        rng: random.Random,
        interval_s: float = 1.0,
    ) -> None:
        self.refused: ServerRefused | None = None
        self._dialer = dialer
        self._prefix = prefix
        self._told = told
        self._clock = clock
        self._interval_s = interval_s
        self._backoff = Backoff(
            rng, jitter_ms=options.reconnect_jitter_ms, max_ms=options.reconnect_max_ms
        )
        self._wire: _TrackingWire | None = None
        self._failing = LogOnce(clock, connection=True)
        self._connects = self._names = self._silences = 0

    def __repr__(self) -> str:
        state = "live" if self.live else "refused" if self.refused else "not live"
        return f"<Tracking {self._prefix.decode()} at {self._dialer.address} {state}>"

    @property
    def live(self) -> bool:
        return self._wire is not None and self._wire.live

    def statistics(self) -> TrackingStatistics:
        return TrackingStatistics(
            live=self.live,
            connects=self._connects,
            names=self._names + (self._wire.names if self._wire else 0),
            silences=self._silences,
        )

    def redial(self, reason: str) -> None:
        """Close the connection, if open, and make another."""
        if self._wire is not None:
            self._wire.drop(reason)

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Keep the connection up until cancelled, or refused (T5)."""
        task_status.started()
        while True:
            await self._connect_and_watch()
            if self.refused is not None:
                return
            await anyio.sleep(self._backoff.next_s())

    async def _connect_and_watch(self) -> None:
        try:
            wire = _TrackingWire(
                await self._dialer.dial(),
                prefix=self._prefix,
                told=self._told,
                on_live=self._told.lost,
            )
        except (Unavailable, ServerRefused) as error:
            self._failing.say(log, "tracking.connect_failed", error)
            return
        self._wire, since = wire, self._clock.monotonic()
        self._connects += 1
        try:
            await self._watch(wire)
        finally:
            await wire.aclose("tracking was ended")
            self._wire, self._names = None, self._names + wire.names
        lasted_s = self._clock.monotonic() - since
        self._backoff.lasted(lasted_s)
        self.refused = wire.refused
        if lasted_s >= _LASTED_S:
            self._failing.over()
        if self.refused is None:
            self._failing.say(log, "tracking.lost", Disconnected(wire.fault))

    async def _watch(self, wire: _TrackingWire) -> None:
        """Return when the connection is lost, which it also is without PONGs."""
        while not wire.lost.is_set():
            if wire.pongs_missing >= _PONGS_MISSING_MAX:
                self._silences += 1
                wire.drop(f"no PONG for {_PONGS_MISSING_MAX * self._interval_s:g} s")
                return
            wire.ping()
            with anyio.move_on_after(self._interval_s):
                await wire.lost.wait()
