"""fakeredis behind the face of the link: for trying out, never for work.

I1  Commands run at once and in the order of the calls; each is whole before the next.
I2  Errors are those of the link: ServerRefused with the server's code, Disconnected while
    ``server.connected`` is false (so that an outage can be played).
I3  Nodes of one process that use the same name have the same data; no other process has.
    The data go when the last of them has ended.

There are no deadlines, since nothing is waited for, and no breaker that could open.
fakeredis is imported when the first server is made.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from .link import LinkStatistics
from .listeners import Listeners
from .server_info import ASK_HISTORY
from .shareable import BLOCKING_READS, GUARDED, check_shareable
from .waiting import Arg, Reply

if TYPE_CHECKING:
    from fakeredis import FakeServer

__all__ = ["FakeLink", "fake_run_id", "shared_server", "used_server", "users_of"]

_LOOK_S = 0.005  # how often a read that blocks looks again
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
                await anyio.sleep(_LOOK_S)
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
