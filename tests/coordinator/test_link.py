"""The link against a real server: replies, refusals, deadlines, limits."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from anyio.lowlevel import checkpoint

from forebay.coordinator.valkey.breaker import Breaker
from forebay.schemas.errors import (
    Disconnected,
    NotShareable,
    ServerRefused,
    TimedOut,
    Unavailable,
)
from support.links import link_to, running
from support.valkey_server import ValkeyServer, free_port

MakeServer = Callable[..., ValkeyServer]


async def test_replies_come_to_their_callers(valkey_server: ValkeyServer, namespace: str) -> None:
    """I1: each kind of reply arrives as it is, each at whoever asked."""
    link = link_to(valkey_server.socket_url)
    key = f"{namespace}:k"
    async with running(link):
        assert await link.call("SET", key, b"\x00\xff") == b"OK"
        futures = [link.call_nowait("GET", key), link.call_nowait("STRLEN", key)]
        assert await asyncio.gather(*futures) == [b"\x00\xff", 2]
        assert await link.call("GET", f"{namespace}:none") is None
        assert await link.call("MGET", key, f"{namespace}:none") == [b"\x00\xff", None]
        assert await link.call("INCRBYFLOAT", f"{namespace}:f", 2.5) == b"2.5"


async def test_it_works_over_tcp(valkey_server: ValkeyServer) -> None:
    """A URL with host and port leads to the same server."""
    link = link_to(valkey_server.url)
    async with running(link):
        assert await link.call("PING") == b"PONG"


async def test_the_client_is_named_and_in_its_database(valkey_server: ValkeyServer) -> None:
    """The server's own list of clients tells who we are."""
    link = link_to(f"{valkey_server.socket_url}?db=3")
    async with running(link):
        info = (await link.call("CLIENT", "INFO")).decode().split()
    assert {"name=forebay-test", "db=3", "lib-name=forebay", "resp=2"} <= set(info)


async def test_a_refusal_is_raised_with_code_and_command(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """A refused command raises at its caller; the connection is none the worse."""
    link = link_to(valkey_server.socket_url)
    async with running(link):
        await link.call("SET", namespace, "text")
        with pytest.raises(ServerRefused) as caught:
            await link.call(b"LPUSH", namespace, "x")
        assert (caught.value.code, caught.value.command) == ("WRONGTYPE", "LPUSH")
        assert await link.call("GET", namespace) == b"text"
        assert link.connects == 1


async def test_many_keep_their_order_and_their_refusals(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """A refused command of many is an error in its place; the rest is carried out."""
    link = link_to(valkey_server.socket_url)
    async with running(link):
        replies = await link.call_many(
            [("SET", namespace, "1"), ("LPUSH", namespace, "x"), ("INCR", namespace)]
        )
        assert replies[0] == b"OK"
        assert isinstance(replies[1], ServerRefused)
        assert (replies[1].code, replies[1].command) == ("WRONGTYPE", "LPUSH")
        assert replies[2] == 2
        assert await link.call_many([]) == []


async def test_huge_arguments_and_replies_pass(valkey_server: ValkeyServer, namespace: str) -> None:
    """24 MB there and back, through a paused transport, with small calls behind it."""
    link = link_to(valkey_server.socket_url, command_timeout_ms=20_000)
    blob = random.Random(1).randbytes(1 << 20) * 24
    async with running(link):
        done = link.call_nowait("SET", namespace, blob)
        await checkpoint()
        await checkpoint()
        behind = [link.call_nowait("ECHO", i) for i in range(100)]
        assert await done == b"OK"
        assert [int(await future) for future in behind] == list(range(100))
        assert await link.call("GET", namespace) == blob
        await link.call("DEL", namespace)


@pytest.mark.parametrize(
    "command",
    [
        ("SUBSCRIBE", "c"),
        ("subscribe", "c"),
        (b"MONITOR",),
        ("MULTI",),
        ("EXEC",),
        ("WATCH", "k"),
        ("SELECT", 1),
        ("BLPOP", "k", 0),
        ("WAIT", 1, 0),
        ("CLIENT", "REPLY", "OFF"),
        ("XREAD", "BLOCK", 0, "STREAMS", "s", "$"),
        ("XREAD", "COUNT", 1, "block", 0, "STREAMS", "s", "$"),
        ("XREADGROUP", "GROUP", "g", "c", "BLOCK", 0, "STREAMS", "s", ">"),
    ],
)
async def test_what_cannot_share_a_connection_is_refused(
    valkey_server: ValkeyServer, command: tuple[Any, ...]
) -> None:
    """Neither alone nor among many does such a command get to the server."""
    link = link_to(valkey_server.socket_url)
    async with running(link):
        with pytest.raises(NotShareable):
            await link.call(*command)
        with pytest.raises(NotShareable):
            await link.call_many([("PING",), command])
        assert link.statistics().calls == 0
        assert await link.call("XREAD", "STREAMS", "no-such-stream", "0") is None
        assert await link.call("CLIENT", "GETNAME") == b"forebay-test"


async def test_an_argument_of_a_wrong_type_harms_nobody(valkey_server: ValkeyServer) -> None:
    """A programming error is raised before anything is queued."""
    link = link_to(valkey_server.socket_url)
    async with running(link):
        good = link.call_nowait("ECHO", "good")
        with pytest.raises(TypeError):
            await link.call("SET", "k", None)  # type: ignore[arg-type]
        assert await good == b"good"


async def test_a_late_reply_is_dropped_and_the_connection_lives(
    valkey_server: ValkeyServer,
) -> None:
    """I3: the caller gets TimedOut, the next caller its own reply, on the same connection."""
    link = link_to(valkey_server.socket_url)
    async with running(link):
        with pytest.raises(TimedOut) as caught:
            await link.call("DEBUG", "SLEEP", "0.2", timeout_ms=30)
        assert (caught.value.timeout_ms, caught.value.outcome_unknown) == (30, True)
        assert await link.call("ECHO", "mine") == b"mine"
        statistics = link.statistics()
    assert (statistics.connects, statistics.timeouts, statistics.dropped_replies) == (1, 1, 1)
    assert (statistics.calls, statistics.replies, statistics.in_flight) == (2, 2, 0)


async def test_a_batch_has_one_deadline(valkey_server: ValkeyServer) -> None:
    """I3: a batch that is late fails as one; its replies are dropped one by one."""
    link = link_to(valkey_server.socket_url)
    async with running(link):
        with pytest.raises(TimedOut):
            await link.call_many(
                [("DEBUG", "SLEEP", "0.2"), ("ECHO", "a"), ("ECHO", "b")], timeout_ms=30
            )
        assert await link.call("ECHO", "mine") == b"mine"
        assert link.statistics().dropped_replies == 3
        assert link.statistics().timeouts == 1


async def test_the_in_flight_limit_refuses_one_more(valkey_server: ValkeyServer) -> None:
    """I5: at the limit a call is refused at once; once replies are in, calls pass again."""
    link = link_to(valkey_server.socket_url, in_flight_max=10)
    async with running(link):
        calls = [link.call_nowait("PING") for _ in range(10)]
        with pytest.raises(Unavailable, match="in-flight limit of 10"):
            link.call_nowait("PING")
        with pytest.raises(Unavailable, match="in-flight limit of 10"):
            await link.call_many([("PING",)] * 11)
        assert await asyncio.gather(*calls) == [b"PONG"] * 10
        assert await link.call("PING") == b"PONG"
        assert link.statistics().in_flight_max_seen == 10


async def test_the_in_flight_limit_holds_without_a_connection() -> None:
    """I5: waiting for a connection counts as being under way."""
    link = link_to(f"valkey://127.0.0.1:{free_port()}", in_flight_max=3)
    waiting = [link.call_nowait("PING") for _ in range(3)]
    with pytest.raises(Unavailable, match="in-flight limit"):
        link.call_nowait("PING")
    await link.aclose()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(outcome, Disconnected) for outcome in outcomes)


async def test_a_listener_that_raises_costs_the_others_nothing(
    valkey_server: ValkeyServer,
) -> None:
    """I6: listeners are told in order, whatever one of them does."""
    link = link_to(valkey_server.socket_url)
    heard: list[bool] = []

    def broken(_: bool) -> None:
        raise LookupError("planted")

    link.on_state(broken)
    stop = link.on_state(heard.append)
    async with running(link):
        assert heard == [True]
        stop()
    assert heard == [True]


@pytest.mark.parametrize(
    "password, code", [("wrong", "WRONGPASS"), ("", "NOAUTH")], ids=["wrong", "none"]
)
async def test_a_refused_password_is_told_at_once(
    make_server: MakeServer, password: str, code: str
) -> None:
    """``ready`` does not wait for what waiting cannot mend; the secret stays out of it."""
    server = make_server(config={"requirepass": "right-secret"})
    link = link_to(server.url, password=password)
    async with running(link, ready=False):
        with pytest.raises(ServerRefused) as caught:
            await link.ready()
    assert caught.value.code == code
    assert "right-secret" not in str(caught.value)


async def test_an_acl_user_is_bound_by_its_rights(make_server: MakeServer) -> None:
    """NOPERM is raised at the caller of just that command."""
    acl = ("user default on nopass ~* &* +@all", "user app on >pw ~app:* +@all -flushall")
    server = make_server(acl=acl)
    link = link_to(server.url, username="app", password="pw")
    async with running(link):
        assert await link.call("ACL", "WHOAMI") == b"app"
        with pytest.raises(ServerRefused) as caught:
            await link.call("GET", "other")
        assert caught.value.code == "NOPERM"


def test_the_breaker_is_the_callers(tmp_path: Path) -> None:
    """Whoever makes the link can watch its breaker."""
    link = link_to(f"unix://{tmp_path}/s")
    assert isinstance(link.breaker, Breaker)
    assert link.statistics().breaker == "closed"
    assert repr(link).endswith("disconnected in_flight=0>")
