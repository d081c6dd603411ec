"""fakeredis behind the face of the pubsub: for trying out, never for work.

I1  ``live`` means that the fake server has confirmed every subscription asked for.
I2  While ``server.connected`` is false it is not live; once it is true again, the wanted
    channels are subscribed anew. Between the two, messages are lost, as with a real one.
I3  Messages reach every listener synchronously, in the order in which they came.

fakeredis is imported when it starts to listen.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import TaskStatus
from valkey import exceptions as foreign

from ...schemas.errors import Disconnected, ServerRefused, Unavailable
from .listeners import Listeners
from .pubsub import PubSubStatistics

if TYPE_CHECKING:
    from fakeredis import FakeServer

__all__ = ["FakePubSub"]

_RETRY_S = 0.02
_LOOK_S = 0.1  # how soon an outage that is played gets noticed


class FakePubSub:
    """A ``PubSub`` whose server is in this process."""

    def __init__(self, server: FakeServer) -> None:
        self._server = server
        self._wanted: dict[bytes, None] = {}
        self._confirmed: set[bytes] = set()
        self._listening = False
        self._live = False
        self._changed = anyio.Event()  # what is wanted
        self._messages = self._connects = 0
        self._messages_to = Listeners[bytes, bytes]("pubsub")
        self._state_to = Listeners[bool]("pubsub")
        self._scope: anyio.CancelScope | None = None
        self._closed = False

    def subscribe(self, *channels: bytes) -> None:
        self._wanted.update(dict.fromkeys(channels))
        self._refresh()

    def redial(self, reason: str) -> None:
        """The fake has no connection."""

    def unsubscribe(self, *channels: bytes) -> None:
        for channel in channels:
            self._wanted.pop(channel, None)
        self._refresh()

    def on_message(self, listener: Callable[[bytes, bytes], None]) -> Callable[[], None]:
        return self._messages_to.add(listener)

    def on_state(self, listener: Callable[[bool], None]) -> Callable[[], None]:
        return self._state_to.add(listener)

    @property
    def live(self) -> bool:
        return self._live

    @property
    def channels(self) -> tuple[bytes, ...]:
        return tuple(self._wanted)

    @property
    def failure(self) -> Unavailable | ServerRefused | None:
        return None if self._server.connected else Disconnected("the fake server is away")

    async def ready(self) -> None:
        while not self._live:
            if self._closed:
                raise Disconnected("the pubsub is closed")
            await self._state_to.changed()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        with anyio.CancelScope() as self._scope:
            task_status.started()
            try:
                while not self._closed:
                    await self._listen_while_connected()
                    await anyio.sleep(_RETRY_S)
            finally:
                self._closed = True
                self._lose()
                self._state_to.wake()

    async def aclose(self) -> None:
        """End ``run``."""
        self._closed = True
        if self._scope is not None:
            self._scope.cancel()
        self._lose()
        self._state_to.wake()

    async def _listen_while_connected(self) -> None:
        from fakeredis import FakeAsyncValkey

        with suppress(foreign.ConnectionError):
            async with FakeAsyncValkey(server=self._server).pubsub() as pubsub:
                await pubsub.connect()
                self._listening = True
                self._connects += 1
                try:
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(self._ask, pubsub, tasks.cancel_scope)
                        tasks.start_soon(self._take, pubsub, tasks.cancel_scope)
                finally:
                    self._lose()

    async def _ask(self, pubsub: Any, scope: anyio.CancelScope) -> None:
        """Have the server's subscriptions follow what is wanted."""
        asked: set[bytes] = set()
        with suppress(foreign.ConnectionError):
            while True:
                self._changed = changed = anyio.Event()
                wanted = set(self._wanted)
                if new := wanted - asked:
                    await pubsub.subscribe(*new)
                if gone := asked - wanted:
                    await pubsub.unsubscribe(*gone)
                asked = wanted
                self._refresh(ask=False)
                await changed.wait()
        scope.cancel()

    async def _take(self, pubsub: Any, scope: anyio.CancelScope) -> None:
        with suppress(foreign.ConnectionError):
            while self._server.connected:
                message = await pubsub.get_message(timeout=_LOOK_S)
                if message is not None:
                    self._deliver(message["type"], message["channel"], message["data"])
        scope.cancel()

    def _deliver(self, kind: str, channel: bytes, data: Any) -> None:
        if kind == "message":
            self._messages += 1
            if channel in self._wanted:
                self._messages_to.tell(channel, data)
        elif kind == "subscribe":
            self._confirmed.add(channel)
        elif kind == "unsubscribe":
            self._confirmed.discard(channel)
        self._refresh(ask=False)

    def _lose(self) -> None:
        self._listening = False
        self._confirmed.clear()
        self._refresh(ask=False)

    def _refresh(self, *, ask: bool = True) -> None:
        if ask:
            self._changed.set()
        live = self._listening and self._wanted.keys() <= self._confirmed
        if live != self._live:
            self._live = live
            self._state_to.tell(live)

    def statistics(self) -> PubSubStatistics:
        return PubSubStatistics(
            live=self._live,
            channels=len(self._wanted),
            connects=self._connects,
            messages=self._messages,
            silences=0,
            round_trip_ms=0.0,
        )

    def __repr__(self) -> str:
        return f"<FakePubSub {'live' if self._live else 'not live'} {len(self._wanted)} channels>"
