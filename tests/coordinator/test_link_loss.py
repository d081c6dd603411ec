"""The link and its losses: of replies, connections and servers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import anyio
import pytest
from anyio.lowlevel import checkpoint

from forebay.coordinator.valkey.link import Link
from forebay.schemas.errors import (
    BreakerOpen,
    Disconnected,
    TimedOut,
)
from support.clock import ManualClock
from support.links import link_to, running
from support.valkey_server import ValkeyServer, free_port

MakeServer = Callable[..., ValkeyServer]


async def until(link: Link, condition: Callable[[], bool]) -> None:
    """Wait for a change of the link's state that makes it so."""
    while not condition():
        await link._state.changed()


async def reconnected(link: Link, connects: int) -> None:
    await until(link, lambda: link.connected and link.connects > connects)


async def test_a_frozen_server_is_dropped_and_found_again(make_server: MakeServer) -> None:
    """I4: calls time out, the silent connection is given up, a thawed server is used again."""
    server, clock = make_server(), ManualClock()
    link = link_to(server.url, command_timeout_ms=100, connect_timeout_ms=200, clock=clock)
    states: list[bool] = []
    async with running(link):
        link.on_state(states.append)
        server.sigstop()
        sent = link.call_nowait("PING")
        clock.now_s += 0.15
        with pytest.raises(TimedOut):
            await sent
        assert link.connected
        clock.now_s += 0.1
        await until(link, lambda: not link.connected)
        assert "nothing was heard" in str(link.failure)
        server.sigcont()
        await reconnected(link, 1)
        assert await link.call("PING") == b"PONG"
    assert states == [False, True, False]


async def test_a_killed_connection_is_made_anew(make_server: MakeServer, namespace: str) -> None:
    """CLIENT KILL costs a reconnect, not the link."""
    server = make_server()
    link = link_to(server.url)
    async with running(link):
        for connects in (1, 2, 3):
            server.execute("CLIENT", "KILL", "TYPE", "NORMAL", "SKIPME", "YES")
            await reconnected(link, connects)
            assert await link.call("PING") == b"PONG"
        assert link.statistics().reconnects == 3


async def test_a_restarted_server_is_found_again(make_server: MakeServer) -> None:
    """kill -9 while calls are on their way: they fail as unknown, later ones work."""
    server = make_server()
    link = link_to(server.url, breaker_failures=1_000)
    async with running(link):
        server.sigstop()
        sent = [link.call_nowait("PING") for _ in range(20)]
        await checkpoint()
        await checkpoint()
        server.kill9()
        errors = await asyncio.gather(*sent, return_exceptions=True)
        assert all(isinstance(e, Disconnected) and e.outcome_unknown for e in errors)
        waiting = link.call_nowait("PING")  # waits for the connection to come back
        server.start()
        assert await waiting == b"PONG"


async def test_what_was_not_written_is_known_not_to_have_happened(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """I2: a loss within the tick tells sent calls from unsent ones."""
    link = link_to(valkey_server.socket_url)
    async with running(link):
        valkey_server.sigstop()
        try:
            sent = link.call_nowait("PING")
            await checkpoint()
            await checkpoint()
            unsent = [link.call_nowait("SET", namespace, "x"), *[link.call_nowait("PING")] * 2]
            link._wire.drop("the test")  # type: ignore[union-attr]
            errors = await asyncio.gather(sent, *unsent, return_exceptions=True)
        finally:
            valkey_server.sigcont()
        assert all(isinstance(error, Disconnected) for error in errors)
        assert [error.outcome_unknown for error in errors] == [True, False, False, False]
        assert await link.call("GET", namespace) is None


async def test_no_command_is_sent_twice(make_server: MakeServer, namespace: str) -> None:
    """I2: over many lost connections a counter never counts more than it was told to."""
    server = make_server()
    link = link_to(server.socket_url, breaker_failures=1_000)
    acknowledged = unknown = 0
    async with running(link):
        for attempt in range(60):
            future = link.call_nowait("INCR", namespace)
            await checkpoint()
            await checkpoint()
            if attempt % 3:
                link._wire.drop("the test")  # type: ignore[union-attr]
            try:
                await future
                acknowledged += 1
            except Disconnected as error:
                unknown += error.outcome_unknown
                await link.ready()
        counted = int(await link.call("GET", namespace))
    assert acknowledged == 20
    assert acknowledged <= counted <= acknowledged + unknown


async def test_calls_wait_for_the_first_connection(make_server: MakeServer) -> None:
    """I3: what is called before the link is up goes out once it is."""
    link = link_to(make_server().socket_url)
    early = link.call_nowait("ECHO", "early")
    async with running(link, ready=False):
        assert await early == b"early"


async def test_a_call_given_up_while_waiting_is_never_sent(
    make_server: MakeServer, namespace: str
) -> None:
    """Cancelled before there was a connection, it has no effect."""
    server = make_server()
    link = link_to(server.socket_url)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(link.call, "SET", namespace, "x")
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    async with running(link):
        assert await link.call("GET", namespace) is None
        assert link.statistics().calls == 1


async def test_without_a_server_calls_fail_by_their_deadline() -> None:
    """I3: the error says why there is no connection, and that nothing happened."""
    port = free_port()
    link = link_to(f"valkey://127.0.0.1:{port}", breaker_failures=1_000)
    async with running(link, ready=False):
        while link.failure is None:
            await anyio.sleep(0.001)
        with pytest.raises(Disconnected) as caught:
            await link.call("PING", timeout_ms=50)
    assert f"127.0.0.1:{port} refused the connection" in str(caught.value)
    assert not caught.value.outcome_unknown


async def test_the_breaker_opens_on_failed_dials_and_closes_on_a_good_one(
    make_server: MakeServer,
) -> None:
    """Open, waiting and new calls fail at once; the dial that succeeds is the probe."""
    server = make_server()
    server.kill9()
    link = link_to(server.url, breaker_recovery_ms=50, command_timeout_ms=20_000)
    waiting = link.call_nowait("PING")
    async with running(link, ready=False):
        with pytest.raises(BreakerOpen):
            await waiting
        assert link.breaker.statistics().failures == 5
        with pytest.raises(BreakerOpen):
            link.call_nowait("PING")
        server.start()
        await link.ready()
        assert link.breaker.state == "closed"
        assert await link.call("PING") == b"PONG"


async def test_the_breaker_probes_on_a_living_connection(valkey_server: ValkeyServer) -> None:
    """Open while connected: calls fail at once; after the recovery one of them is the probe."""
    clock = ManualClock()
    link = link_to(
        valkey_server.socket_url, breaker_failures=1, breaker_recovery_ms=60, clock=clock
    )
    async with running(link):
        sent = asyncio.ensure_future(link.call("DEBUG", "SLEEP", "0.1", timeout_ms=10))
        await checkpoint()
        clock.now_s += 0.02
        with pytest.raises(TimedOut):
            await sent
        with pytest.raises(BreakerOpen) as caught:
            await link.call("PING")
        clock.now_s += caught.value.retry_after_ms / 1000
        probe = link.call_nowait("PING")
        with pytest.raises(BreakerOpen):
            link.call_nowait("PING")
        assert await probe == b"PONG"
        assert await link.call("PING") == b"PONG"
        assert (link.breaker.state, link.connects) == ("closed", 1)


async def test_stalls_count_once_however_many_calls_they_catch(
    valkey_server: ValkeyServer,
) -> None:
    """A hundred calls late at the same time are one failure, not a hundred."""
    clock = ManualClock()
    link = link_to(valkey_server.socket_url, command_timeout_ms=50, clock=clock)
    async with running(link):
        valkey_server.sigstop()
        try:
            calls = [link.call_nowait("PING") for _ in range(101)]
            clock.now_s += 0.06
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
        finally:
            valkey_server.sigcont()
        assert all(isinstance(outcome, TimedOut) for outcome in outcomes)
        assert link.breaker.statistics().failures == 1


async def test_closing_tells_everybody(make_server: MakeServer) -> None:
    """Pending calls get Disconnected as unknown, later ones as known; nothing hangs."""
    server = make_server()
    link = link_to(server.url)
    async with anyio.create_task_group() as tasks:
        await tasks.start(link.run)
        await link.ready()
        server.sigstop()
        pending = link.call_nowait("PING")
        await checkpoint()
        await checkpoint()
        await link.aclose()
        server.sigcont()
        with pytest.raises(Disconnected, match="was closed") as caught:
            await pending
        assert caught.value.outcome_unknown
    with pytest.raises(Disconnected, match="is closed"):
        await link.call("PING")
    with pytest.raises(Disconnected, match="is closed"):
        await link.ready()
    assert repr(link) == f"<Link test 127.0.0.1:{server.port} closed in_flight=0>"


async def test_cancelled_while_connecting_it_leaves_nothing_behind(
    make_server: MakeServer,
) -> None:
    """Cancelling ``run`` in the handshake and ``ready`` in its wait ends both."""
    server = make_server()
    server.sigstop()
    link = link_to(server.url, connect_timeout_ms=30_000)
    async with anyio.create_task_group() as tasks:
        await tasks.start(link.run)
        tasks.start_soon(link.ready)
        await anyio.sleep(0.05)
        tasks.cancel_scope.cancel()
    server.sigcont()
    assert not link.connected
    with anyio.fail_after(20):
        while b" name=forebay-test " in server.execute("CLIENT", "LIST"):
            await checkpoint()  # until the server has seen the end of it
    assert link.breaker.check() is False


async def test_a_reply_that_nobody_asked_for_ends_the_connection(
    valkey_server: ValkeyServer,
) -> None:
    """After that no reply could be trusted, so the connection is made anew."""
    link = link_to(valkey_server.socket_url)
    async with running(link):
        link._wire.data_received(b"+OK\r\n")  # type: ignore[union-attr]
        assert not link.connected
        assert "nobody asked for" in str(link.failure)
        await reconnected(link, 1)
        link._wire.data_received(b"HTTP/1.1 400 Bad Request\r\n")  # type: ignore[union-attr]
        assert "does not speak RESP2" in str(link.failure)
        await reconnected(link, 2)
        assert await link.call("PING") == b"PONG"
