"""One RESP2 connection: ``Wire``, and ``CommandWire``, which many callers share.

I1  Replies are matched to commands by order alone. A waiter that gave up stays in the queue; its
    reply is read and dropped, and the connection stays open.
I2  Commands added in one tick of the loop leave in one write, or as soon as they reach
    ``EAGER_BYTES``: then the server works on them while the rest of the tick adds more.
I3  When the connection ends, every waiter gets Disconnected: with ``outcome_unknown`` if its
    command had been written, without it otherwise.
I4  An unexpected reply, or bytes that are not RESP, end the connection: after them no reply can be
    matched reliably.
I5  READONLY on a connection to a primary ends the connection after the callers got the error.

A wire never connects, retries or measures time; the link and the pub/sub connection do.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

import anyio
from libvalkey import ProtocolError, Reader

from ...schemas.errors import Disconnected, ServerRefused
from ..clock import Clock
from .dialer import Dialed
from .waiting import Arg, Slot

__all__ = ["EAGER_BYTES", "MORE", "CommandWire", "Tally", "Wire"]

MORE: Any = object()  #: the parser returns it when it needs more bytes
CLOSE_S = 1.0
EAGER_BYTES = 4_096
#: Valkey and Redis 7.0 refuse with the code ERR what an ACL does not allow to a script.
_NOT_ALLOWED = ("ACL failure in script", "The user executing the script can't")


class Tally:
    """Counters that all wires of one link share."""

    __slots__ = ("calls", "dropped_replies", "in_flight_max_seen", "replies", "timeouts")

    def __init__(self) -> None:
        self.calls = 0
        self.replies = 0
        self.dropped_replies = 0
        self.timeouts = 0
        self.in_flight_max_seen = 0


class Wire(asyncio.Protocol, ABC):
    """A parser on a transport, with the reason of its end."""

    def __init__(self, dialed: Dialed) -> None:
        self.lost = anyio.Event()
        self.fault = ""
        self.parser = Reader(replyError=_refused, notEnoughData=MORE)
        self._gone = anyio.Event()
        self._dialed = dialed
        self.transport = dialed.attach(self)

    @abstractmethod
    def take_replies(self) -> None:
        """Process all replies that the parser holds."""

    @abstractmethod
    def ended(self) -> None:
        """Called once, as soon as the connection counts as lost."""

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed(data)
            self.take_replies()
        except ProtocolError as error:
            self.drop(f"the server does not speak RESP2: {error}")

    def drop(self, reason: str) -> None:
        """End the connection now. Only the first reason counts."""
        self._end(reason)
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(str(exc) if exc else "the server closed the connection")
        self._gone.set()

    async def aclose(self, reason: str) -> None:
        """Close the connection after the written bytes have left."""
        self._end(reason)
        self.transport.close()
        with anyio.move_on_after(CLOSE_S, shield=True):
            await self._gone.wait()
        self.transport.abort()

    def _end(self, reason: str) -> None:
        if not self.lost.is_set():
            self.fault = reason
            self.lost.set()
            self.ended()


class CommandWire(Wire):
    def __init__(
        self,
        dialed: Dialed,
        *,
        clock: Clock,
        tally: Tally,
        on_replies: Callable[[], None],
        on_change: Callable[[], None],
        primary: bool = False,
    ) -> None:
        """``primary``: a server that answers READONLY is disconnected (I5)."""
        self._primary = primary
        self.out: list[bytes] = []  #: packed commands of this tick
        self.out_bytes = 0  #: of those in ``out`` that may leave early
        self.waiting: deque[Slot] = deque()  #: one per command, those in ``out`` are the last
        self.paused = False
        self.heard_at = clock.monotonic()
        self.loop = asyncio.get_running_loop()
        self.create_future = self.loop.create_future
        self._clock = clock
        self._tally = tally
        self._on_replies = on_replies
        self._on_change = on_change
        super().__init__(dialed)

    def flush(self) -> None:
        out = self.out
        if not out:
            return  # the connection was lost before the tick ended; the waiters have the error
        self.out, self.out_bytes = [], 0
        tally = self._tally
        tally.calls += len(out)
        tally.in_flight_max_seen = max(tally.in_flight_max_seen, len(self.waiting))
        self.transport.write(out[0] if len(out) == 1 else b"".join(out))

    def take_replies(self) -> None:
        self.heard_at = self._clock.monotonic()
        taken = dropped = 0
        readonly = False
        gets, next_slot = self.parser.gets, self.waiting.popleft
        try:
            while (reply := gets()) is not MORE:
                waiter, _, command = next_slot()
                taken += 1
                if type(reply) is ServerRefused and reply.code == "READONLY":
                    readonly = True
                if waiter.done():
                    dropped += 1
                elif type(reply) is ServerRefused:
                    waiter.set_exception(ServerRefused(reply.code, reply.message, name_of(command)))
                else:
                    waiter.set_result(reply)
        except IndexError:
            self.drop("the server sent a reply that nobody asked for")
        self._tally.replies += taken
        self._tally.dropped_replies += dropped
        if readonly and self._primary:
            self.drop("the server is a replica by now (READONLY)")
        self._on_replies()

    def pause_writing(self) -> None:
        self.paused = True
        self._on_change()

    def resume_writing(self) -> None:
        self.paused = False
        self._on_change()

    def ended(self) -> None:
        slots = list(self.waiting)
        written = len(slots) - len(self.out)
        self.waiting.clear()
        self.out.clear()
        self.out_bytes = 0
        self._on_change()
        for at, (waiter, _, _) in enumerate(slots):
            if not waiter.done():
                waiter.set_exception(Disconnected(self.fault, outcome_unknown=at < written))


def name_of(command: Arg) -> str:
    return command.decode("ascii", "replace") if isinstance(command, bytes) else str(command)


def _refused(line: str) -> ServerRefused:
    code, _, message = line.partition(" ")
    if message.startswith(_NOT_ALLOWED):
        code = "NOPERM"
    return ServerRefused(code, message)
