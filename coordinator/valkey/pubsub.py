"""The pub/sub connection: it notifies a node that there may be something new.

A message is a hint. It may be lost at any time, by Valkey or by this module, while ``live`` and
while not. Silence proves nothing: the logs hold the truth.

I1  The subscribed channels survive reconnects and may change at any time.
I2  ``live`` means that the server has confirmed all subscriptions in this connection. A new channel
    makes it false for a round trip.
I3  Messages reach every listener synchronously, in the order in which they arrived.
I4  State listeners receive False as soon as the loss is known, then True once live again. Messages
    sent in between are lost.
I5  A dead connection that looks alive is detected: the server owes a PONG every ``interval_s``;
    after two missing PONGs a new connection is made.

There is no message queue: if a listener is slow, the server's output buffer grows until the server
closes the connection, and I4 applies.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from itertools import islice

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
from .waiting import Listeners
from .wire import MORE, Wire

__all__ = ["PubSub", "PubSubStatistics"]

log = structlog.get_logger(__name__)

_LASTED_S = 10.0  #: after a connection of this duration, the next loss is a new outage

_CHANNELS_PER_COMMAND = 1_000
_PONGS_MISSING_MAX = 2
_PING = pack_command(("PING",))


class PubSubStatistics(Struct, frozen=True, kw_only=True):
    live: bool
    channels: int
    connects: int
    messages: int
    silences: int  #: connections closed because no PONG arrived
    round_trip_ms: float  #: of the last PING


class _PubSubWire(Wire):
    """A connection in pub/sub mode that counts the outstanding replies of the server."""

    def __init__(
        self,
        dialed: Dialed,
        *,
        on_message: Callable[[bytes, bytes], None],
        on_change: Callable[[], None],
        clock: Clock,
    ) -> None:
        self.unconfirmed = 0
        self.pongs_missing = 0
        self.round_trip_s = 0.0
        self._pinged_at = 0.0
        self._on_message = on_message
        self._on_change = on_change
        self._clock = clock
        super().__init__(dialed)

    def send_names(self, command: bytes, channels: Iterable[bytes]) -> None:
        names = iter(channels)
        while chunk := tuple(islice(names, _CHANNELS_PER_COMMAND)):
            self.unconfirmed += len(chunk)
            self.transport.write(pack_command((command, *chunk)))

    def ping(self) -> None:
        if not self.pongs_missing:
            self._pinged_at = self._clock.monotonic()
        self.pongs_missing += 1
        self.transport.write(_PING)

    def take_replies(self) -> None:
        while (push := self.parser.gets()) is not MORE and not self.lost.is_set():
            if isinstance(push, ServerRefused):
                self.drop(f"the server refused: {push.code} {push.message}")
            elif push == b"PONG" or push[0] == b"pong":  # the former before any SUBSCRIBE
                self.pongs_missing = 0
                self.round_trip_s = self._clock.monotonic() - self._pinged_at
            elif push[0] == b"message":
                self._on_message(push[1], push[2])
            elif push[0] in (b"subscribe", b"unsubscribe"):
                self.unconfirmed -= 1
                if not self.unconfirmed:
                    self._on_change()

    def ended(self) -> None:
        self._on_change()


class PubSub:
    def __init__(
        self,
        dialer: Dialer,
        options: Valkey,
        *,
        clock: Clock,
        rng: random.Random,
        interval_s: float = 1.0,
    ) -> None:
        self._dialer = dialer
        self._clock = clock
        self._interval_s = interval_s
        self._backoff = Backoff(
            rng, jitter_ms=options.reconnect_jitter_ms, max_ms=options.reconnect_max_ms
        )
        self._wanted: dict[bytes, None] = {}  # a set that keeps its order
        self._wire: _PubSubWire | None = None
        self._live = False
        self._connects = self._messages = self._silences = 0
        self._connected_at = 0.0
        self._failing = LogOnce(clock, connection=True)
        self._failure: Unavailable | ServerRefused | None = None
        self._messages_to = Listeners[bytes, bytes]("pubsub")
        self._state_to = Listeners[bool]("pubsub")
        self._scope: anyio.CancelScope | None = None
        self._closed = False

    def subscribe(self, *channels: bytes) -> None:
        """Add these channels. They are confirmed once ``live``."""
        new = [channel for channel in dict.fromkeys(channels) if channel not in self._wanted]
        self._wanted.update(dict.fromkeys(new))
        self._send(b"SUBSCRIBE", new)

    def unsubscribe(self, *channels: bytes) -> None:
        gone = [channel for channel in dict.fromkeys(channels) if channel in self._wanted]
        for channel in gone:
            del self._wanted[channel]
        self._send(b"UNSUBSCRIBE", gone)

    def on_message(self, listener: Callable[[bytes, bytes], None]) -> Callable[[], None]:
        """Call ``listener(channel, payload)`` per message; returns a function that removes it."""
        return self._messages_to.add(listener)

    def on_state(self, listener: Callable[[bool], None]) -> Callable[[], None]:
        """Call ``listener(live)`` at each change; returns a function that removes it."""
        return self._state_to.add(listener)

    @property
    def live(self) -> bool:
        return self._live

    @property
    def channels(self) -> tuple[bytes, ...]:
        return tuple(self._wanted)

    @property
    def failure(self) -> Unavailable | ServerRefused | None:
        """The reason why there is no connection, if known."""
        return self._failure

    async def ready(self) -> None:
        """Wait until live. Raises ServerRefused if the server refuses the connection."""
        while not self._live:
            if self._closed:
                raise Disconnected("the pubsub is closed")
            if isinstance(refused := self._failure, ServerRefused):
                raise ServerRefused(refused.code, refused.message, refused.command)
            await self._state_to.changed()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Keep the connection up until cancelled or closed. Call it once."""
        with anyio.CancelScope() as self._scope:
            task_status.started()
            try:
                while not self._closed:
                    await self._connect_and_watch()
                    await anyio.sleep(self._backoff.next_s())
            finally:
                await self._shut()

    def redial(self, reason: str) -> None:
        """Close the connection, if open, and make a new one."""
        if self._wire is not None:
            self._wire.drop(reason)

    async def aclose(self) -> None:
        """End ``run``."""
        if self._scope is not None:
            self._scope.cancel()
        await self._shut()

    async def _shut(self) -> None:
        self._closed = True
        if self._wire is not None:
            await self._wire.aclose("the pubsub was closed")
        self._state_to.wake()

    async def _connect_and_watch(self) -> None:
        try:
            wire = _PubSubWire(
                await self._dialer.dial(),
                on_message=self._deliver,
                on_change=self._refresh,
                clock=self._clock,
            )
        except (Unavailable, ServerRefused) as error:
            self._failing.say(log, "pubsub.connect_failed", error)
            self._failure = error
            self._state_to.wake()
            return
        self._wire, self._failure = wire, None
        self._connects += 1
        self._connected_at = self._clock.monotonic()
        self._send(b"SUBSCRIBE", self._wanted)
        self._refresh()
        since = self._clock.monotonic()
        await self._watch(wire)
        self._backoff.lasted(self._clock.monotonic() - since)

    async def _watch(self, wire: _PubSubWire) -> None:
        """Return when the connection is lost; missing PONGs count as a loss."""
        while not wire.lost.is_set():
            if wire.pongs_missing >= _PONGS_MISSING_MAX:
                self._silences += 1
                wire.drop(f"no PONG for {_PONGS_MISSING_MAX * self._interval_s:g} s")
                return
            wire.ping()
            with anyio.move_on_after(self._interval_s):
                await wire.lost.wait()

    def _send(self, command: bytes, channels: Iterable[bytes]) -> None:
        if self._wire is not None:
            self._wire.send_names(command, channels)
            self._refresh()

    def _deliver(self, channel: bytes, payload: bytes) -> None:
        self._messages += 1
        if channel in self._wanted:  # it may have been unsubscribed since
            self._messages_to.tell(channel, payload)

    def _refresh(self) -> None:
        wire = self._wire
        if wire is not None and wire.lost.is_set():
            lost = Disconnected(wire.fault)
            if not self._closed:
                if self._clock.monotonic() - self._connected_at >= _LASTED_S:
                    self._failing.over()
                self._failing.say(log, "pubsub.lost", lost)
            self._wire, self._failure, wire = None, lost, None
            self._state_to.wake()
        live = wire is not None and not wire.unconfirmed
        if live != self._live:
            self._live = live
            self._state_to.tell(live)

    def statistics(self) -> PubSubStatistics:
        return PubSubStatistics(
            live=self._live,
            channels=len(self._wanted),
            connects=self._connects,
            messages=self._messages,
            silences=self._silences,
            round_trip_ms=self._wire.round_trip_s * 1000 if self._wire else 0.0,
        )

    def __repr__(self) -> str:
        state = "live" if self._live else "closed" if self._closed else "not live"
        return f"<PubSub {self._dialer.address} {state} channels={len(self._wanted)}>"
