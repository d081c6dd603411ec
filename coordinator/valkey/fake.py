"""fakeredis behind the interfaces of ``Link`` and ``PubSub``: for trials and tests only.

I1  Commands run at once and in the order of the calls. Each one completes before the next.
I2  Errors are those of the link: ServerRefused with the server's code, and Disconnected while
    ``server.connected`` is false (to simulate an outage).
I3  Nodes of one process that use the same name share the same data; other processes do not. The
    data are deleted when the last of these nodes ends.

There are no deadlines, since no call waits, and no breaker that could open.

P1  ``live`` means that the fake server has confirmed all requested subscriptions.
P2  While ``server.connected`` is false, ``live`` is false. When it is true again, the channels are
    subscribed again. Messages sent in between are lost, as with a real server.
P3  Messages reach every listener synchronously, in the order in which they arrived.

fakeredis is imported when the first server is made.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import anyio
import anyio.lowlevel
from anyio.abc import TaskStatus
from valkey import exceptions as foreign

from ...schemas.errors import Disconnected, ServerRefused, StartupError, Unavailable
from ...schemas.extras import pip_install
from .breaker import Breaker
from .dialer import ASK_HISTORY
from .link import LinkStatistics
from .pubsub import PubSubStatistics
from .shareable import BLOCKING_READS, GUARDED, check_shareable
from .waiting import Arg, Listeners, Reply

if TYPE_CHECKING:
    from fakeredis import FakeServer


_READ_POLL_S = 0.005  # interval at which a blocking read looks again
_servers: WeakValueDictionary[str, Any] = WeakValueDictionary()
_run_ids: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_users: Counter[str] = Counter()
_numbers = count(1)

#: valkey-py drops the code of those errors that it has a class for
_CODES: tuple[tuple[type[Exception], str], ...] = (
    (foreign.NoScriptError, "NOSCRIPT"),
    (foreign.ReadOnlyError, "READONLY"),
    (foreign.NoPermissionError, "NOPERM"),
    (foreign.ExecAbortError, "EXECABORT"),
    (foreign.OutOfMemoryError, "OOM"),
)


def shared_server(name: str = "forebay", *, origin: str = "in code") -> FakeServer:
    """The fake server of that name in this process; made if nobody uses it now."""
    server = _servers.get(name)
    if server is None:
        try:
            from fakeredis import FakeServer
        except ImportError as error:
            raise StartupError(
                setting="valkey.fake",
                value="true",
                origin=origin,
                problem="fakeredis is not installed",
                fix=f"{pip_install('fake')}; or unset it, for a real server",
            ) from error
        server = _servers[name] = FakeServer(server_type="valkey", version=(8, 0))
    found: FakeServer = server
    return found


@contextmanager
def used_server(name: str = "forebay", *, origin: str = "in code") -> Iterator[FakeServer]:
    """The same, for as long as the block lasts; the data go with the last block."""
    server = shared_server(name, origin=origin)
    _users[name] += 1
    try:
        yield server
    finally:
        _users[name] -= 1
        if not _users[name]:
            del _users[name]
            _servers.pop(name, None)


def users_of(name: str = "forebay") -> int:
    """The number of users of the server of that name; its data are deleted with the last one."""
    return _users[name]


def fake_run_id(server: FakeServer) -> str:
    """One for as long as the data live."""
    return _run_ids.setdefault(server, f"fake-{next(_numbers)}")


class FakeLink:
    """A ``Link`` whose server is in this process."""

    def __init__(
        self, server: FakeServer, *, name: str, breaker: Breaker, blocking: bool = False
    ) -> None:
        """``blocking``: it has one user, whose reads may wait for entries."""
        from fakeredis import FakeValkey

        self.name = name
        self.breaker = breaker
        self._blocking = blocking
        self._server = server
        self._client: Any = FakeValkey(server=server)
        self._client.response_callbacks.clear()
        self._state = Listeners[bool](f"link {name}")
        self._ended = anyio.Event()
        self._calls = self._replies = 0

    async def call(self, *args: Arg, timeout_ms: int | None = None) -> Reply:
        if self._blocking and args[0] in BLOCKING_READS:
            return await self._read_patiently(args)
        reply = self._execute(args)
        await anyio.lowlevel.checkpoint()
        return reply

    async def _read_patiently(self, args: Sequence[Arg]) -> Reply:
        """An XREAD that may have BLOCK; fakeredis cannot block without losing entries."""
        words = [str(arg).upper() for arg in args]
        at = words.index("BLOCK") if "BLOCK" in words else len(words)
        block_s = int(words[at + 1]) / 1000 if at < len(words) else 0.0
        reply = self._execute([*args[:at], *args[at + 2 :]])
        with anyio.move_on_after(block_s or None):
            while reply is None and at < len(words):
                await anyio.sleep(_READ_POLL_S)
                reply = self._execute([*args[:at], *args[at + 2 :]])
        await anyio.lowlevel.checkpoint()
        return reply

    def call_nowait(self, *args: Arg) -> asyncio.Future[Reply]:
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        if args[0] in GUARDED:
            check_shareable(args)
        try:
            future.set_result(self._execute(args))
        except (ServerRefused, Unavailable) as error:
            future.set_exception(error)
        return future

    async def call_many(
        self, commands: Sequence[Sequence[Arg]], *, timeout_ms: int | None = None
    ) -> list[Reply]:
        """One write, replies in order; a refused command is a ServerRefused in its place."""
        replies: list[Reply] = []
        for args in commands:
            try:
                replies.append(self._execute(args))
            except ServerRefused as refused:
                replies.append(refused)
        await anyio.lowlevel.checkpoint()
        return replies

    def _execute(self, args: Sequence[Arg]) -> Reply:
        if args[0] in GUARDED:
            check_shareable(args)
        if self._ended.is_set():
            raise Disconnected(f"the link {self.name} was closed")
        self._calls += 1
        if tuple(args) == ASK_HISTORY:
            return b"role:master\r\n"  # fakeredis has no INFO
        try:
            reply = self._client.execute_command(*args)
        except foreign.ConnectionError as error:
            raise Disconnected(str(error)) from error
        except foreign.ResponseError as error:
            self._replies += 1
            raise _refused(error, str(args[0])) from error
        self._replies += 1
        empty_read = reply == [] and args[0] in BLOCKING_READS
        return None if empty_read else reply  # as a server says it

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Be connected until cancelled or closed."""
        task_status.started()
        self._state.tell(True)
        try:
            await self._ended.wait()
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        if not self._ended.is_set():
            self._ended.set()
            self._state.tell(False)

    async def ready(self) -> None:
        if self._ended.is_set():
            raise Disconnected(f"the link {self.name} is closed")

    def on_state(self, listener: Callable[[bool], None]) -> Callable[[], None]:
        return self._state.add(listener)

    @property
    def connected(self) -> bool:
        return not self._ended.is_set() and bool(self._server.connected)

    @property
    def connects(self) -> int:
        return 1

    @property
    def generation(self) -> int:
        return 1

    @property
    def history(self) -> str:
        return "fake"

    def check_primary(self, reply: bytes) -> None:
        """There is one server, and it is in charge."""

    def same_history(self, since: int) -> bool:
        return True

    def redial(self, reason: str) -> None:
        """The fake has no connection."""

    @property
    def failure(self) -> Unavailable | ServerRefused | None:
        return None if self.connected else Disconnected("the fake server is away")

    @property
    def in_flight(self) -> int:
        return 0

    def statistics(self) -> LinkStatistics:
        return LinkStatistics(
            name=self.name,
            connected=self.connected,
            connects=1,
            reconnects=0,
            calls=self._calls,
            replies=self._replies,
            timeouts=0,
            dropped_replies=0,
            in_flight=0,
            in_flight_max_seen=min(1, self._calls),
            breaker=self.breaker.state,
        )

    def __repr__(self) -> str:
        return f"<FakeLink {self.name} {'connected' if self.connected else 'away'}>"


def _refused(error: foreign.ResponseError, command: str) -> ServerRefused:
    text = str(error)
    for kind, code in _CODES:
        if isinstance(error, kind):
            return ServerRefused(code, text, command)
    if command.upper() == "XREADGROUP" and "XGROUP" in text:
        return ServerRefused("NOGROUP", text, command)  # as a server says of a missing key
    code, _, rest = text.partition(" ")
    known = code.isupper() and code.isalpha() and len(code) > 1
    return ServerRefused(code if known else "ERR", rest if known else text, command)


_RETRY_S = 0.02
_OUTAGE_POLL_S = 0.1  # delay until a simulated outage is noticed


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
                message = await pubsub.get_message(timeout=_OUTAGE_POLL_S)
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
