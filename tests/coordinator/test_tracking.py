"""Tracking against real servers: T1-T5 of coordinator.tracking."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from structlog.testing import capture_logs

from conftest import MakeServer, require
from forebay.coordinator.clock import SystemClock
from forebay.coordinator.valkey.scripting import load_scripts
from forebay.coordinator.valkey.tracking import Tracking
from forebay.schemas.settings import Valkey
from support.links import SPEEDY, dialer_to
from support.valkey_server import ValkeyServer, pings_of


class Journal:
    """What was told, in order: a name, or a word for what is not about one."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.when_lost: Callable[[], object] | None = None
        self._told = anyio.Event()

    def changed(self, names: Sequence[bytes]) -> None:
        self._say(*(name.decode() for name in names))

    def flushed(self) -> None:
        self._say("flushed")

    def lost(self) -> None:
        self._say("lost")
        if self.when_lost is not None:
            self.when_lost()

    def _say(self, *words: str) -> None:
        self.said += words
        self._told.set()
        self._told = anyio.Event()

    async def heard(self, word: str, times: int = 1) -> list[str]:
        while self.said.count(word) < times:
            await self._told.wait()
        return self.said


def tracking_to(url: str, journal: Journal, *, prefix: str, **options: Any) -> Tracking:
    interval_s = options.pop("interval_s", 1.0)
    return Tracking(
        dialer_to(url, **options),
        Valkey(**SPEEDY),
        prefix=prefix.encode(),
        told=journal,
        clock=SystemClock(),
        rng=random.Random(1),
        interval_s=interval_s,
    )


@asynccontextmanager
async def followed(tracking: Tracking) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        await tasks.start(tracking.run)
        try:
            yield
        finally:
            tasks.cancel_scope.cancel()


@pytest.fixture(params=["valkey", "redis7"])
def server(request: pytest.FixtureRequest) -> ValkeyServer:
    require(request.param)
    found: ValkeyServer = request.getfixturevalue(f"{request.param}_server")
    return found


async def test_each_change_under_the_prefix_is_told(server: ValkeyServer, namespace: str) -> None:
    """T2: set, changed in a transaction or a script, deleted, expired; and nothing else's."""
    journal, prefix = Journal(), f"{{{namespace}:"
    a, other = f"{prefix}00}}:e0:a", f"{{{namespace}x:00}}:e0:a"
    async with followed(tracking_to(server.socket_url, journal, prefix=prefix)):
        await journal.heard("lost")
        server.execute("SET", other, "1")
        server.execute("GET", a)
        server.execute("SET", a, "1")
        await journal.heard(a)
        server.execute("EVAL", "redis.call('APPEND', KEYS[1], 'x')", 1, a)
        await journal.heard(a, 2)
        server.execute("DEL", a)
        await journal.heard(a, 3)
        server.execute("DEL", a)
        server.execute("SET", a, "1", "PX", 1)
        await journal.heard(a, 5)
        server.execute("SET", f"{a}b", "end")
        said = await journal.heard(f"{a}b")
    assert said == ["lost", *[a] * 5, f"{a}b"]


async def test_many_changes_come_in_one_message(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """T2: all keys of one command are told, whatever their shards."""
    journal, prefix = Journal(), f"{{{namespace}:"
    names = [f"{prefix}{n % 64:02}}}:e0:{n}" for n in range(20_000)]
    tracking = tracking_to(valkey_server.socket_url, journal, prefix=prefix)
    async with followed(tracking):
        await journal.heard("lost")
        valkey_server.execute("MSET", *(word for name in names for word in (name, "1")))
        while len(journal.said) <= len(names):
            await journal._told.wait()
        assert tracking.statistics().names == len(names)
    assert sorted(journal.said[1:]) == sorted(names)


async def test_from_the_moment_of_lost_everything_is_told(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """T1: what is changed inside the very call of ``lost`` is told, each time of twenty."""
    journal, prefix = Journal(), f"{{{namespace}:"
    name = f"{prefix}00}}:e0:a"
    journal.when_lost = lambda: valkey_server.execute("INCR", name)
    tracking = tracking_to(valkey_server.socket_url, journal, prefix=prefix)
    for times in range(1, 21):
        async with followed(tracking):
            await journal.heard(name, times)
    assert tracking.statistics().connects == 20
    assert journal.said == ["lost", name] * 20


async def test_a_killed_connection_is_made_anew_and_says_so(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """T1: after the loss there is another ``lost``, and changes are told again."""
    journal, prefix = Journal(), f"{{{namespace}:"
    name = f"{prefix}00}}:e0:a"
    with capture_logs() as lines:
        async with followed(tracking_to(valkey_server.socket_url, journal, prefix=prefix)):
            for times in (1, 2, 3):
                await journal.heard("lost", times)
                valkey_server.execute("SET", name, "1")
                await journal.heard(name, times)
                if times < 3:
                    assert valkey_server.execute("CLIENT", "KILL", "TYPE", "PUBSUB") == 1
    assert journal.said == ["lost", name] * 3
    assert [line["event"] for line in lines] == ["tracking.lost"] * 2


async def test_a_flush_is_told(make_server: MakeServer) -> None:
    """T3: the server says it without names."""
    server, journal = make_server(), Journal()
    async with followed(tracking_to(server.url, journal, prefix="{shop:")):
        await journal.heard("lost")
        server.execute("SET", "{shop:00}:e0:a", "1")
        await journal.heard("{shop:00}:e0:a")
        server.execute("FLUSHDB")
        await journal.heard("flushed")
        server.execute("FLUSHALL", "ASYNC")
        said = await journal.heard("flushed", 2)
    assert said == ["lost", "{shop:00}:e0:a", "flushed", "flushed"]


async def test_an_evicted_key_is_told(make_server: MakeServer) -> None:
    """T2: what the server drops for want of memory is told like what is deleted."""
    server, journal = make_server(config={"maxmemory-policy": "allkeys-lru"}), Journal()
    async with followed(tracking_to(server.url, journal, prefix="{shop:")):
        await journal.heard("lost")
        server.execute("SET", "{shop:00}:e0:a", "1")
        await journal.heard("{shop:00}:e0:a")
        server.execute("CONFIG", "SET", "maxmemory", "1")
        said = await journal.heard("{shop:00}:e0:a", 2)
    assert said == ["lost", "{shop:00}:e0:a", "{shop:00}:e0:a"]


async def test_a_silent_server_is_found_out(make_server: MakeServer) -> None:
    """T4: a frozen server keeps the socket open; that counts as lost, and is told."""
    server, journal = make_server(), Journal()
    tracking = tracking_to(
        server.url, journal, prefix="{shop:", interval_s=0.05, connect_timeout_ms=300
    )
    async with followed(tracking):
        await journal.heard("lost")
        server.sigstop()
        while tracking.statistics().silences < 1:
            await anyio.sleep(0.01)
        server.sigcont()
        said = await journal.heard("lost", 2)
    assert said == ["lost", "lost"]


async def test_a_quiet_connection_stays(make_server: MakeServer, namespace: str) -> None:
    """T4: PONGs are counted in both forms, so nothing to tell is no reason to reconnect."""
    server, journal = make_server(), Journal()
    tracking = tracking_to(server.socket_url, journal, prefix=f"{{{namespace}:", interval_s=0.1)
    async with followed(tracking):
        while pings_of(server) < 8:
            await anyio.sleep(0.01)
        assert tracking.live
    assert (tracking.statistics().connects, journal.said) == (1, ["lost"])
    assert not tracking.live


async def test_a_restarted_server_is_tracked_again(make_server: MakeServer) -> None:
    """T1, T5: a server that is away is no refusal."""
    server, journal = make_server(), Journal()
    async with followed(tracking_to(server.url, journal, prefix="{shop:")):
        await journal.heard("lost")
        server.kill9()
        server.start()
        await journal.heard("lost", 2)
        server.execute("SET", "{shop:00}:e0:a", "1")
        said = await journal.heard("{shop:00}:e0:a")
    assert said == ["lost", "lost", "{shop:00}:e0:a"]


@pytest.mark.parametrize("rights", ["-client|tracking", "-client|id", "resetchannels"])
async def test_a_refusal_ends_it(make_server: MakeServer, rights: str) -> None:
    """T5: without the rights ``run`` returns, says why, and leaves no connection."""
    acl = ("user default on nopass ~* &* +@all", f"user app on >pw ~* &* +@all {rights}")
    server, journal = make_server(acl=acl), Journal()
    tracking = tracking_to(server.url, journal, prefix="{shop:", username="app", password="pw")
    await tracking.run()
    assert tracking.refused is not None
    assert tracking.refused.code == "NOPERM"
    assert journal.said == []
    while b"user=app" in server.execute("CLIENT", "LIST"):
        await anyio.sleep(0.005)


async def test_keys_that_the_user_may_not_read_are_told(make_server: MakeServer) -> None:
    """Names under the prefix come whatever the key patterns of the user say."""
    acl = ("user default on nopass ~* &* +@all", "user app on >pw ~mine:* &* +@all")
    server, journal = make_server(acl=acl), Journal()
    options = {"username": "app", "password": "pw"}
    async with followed(tracking_to(server.url, journal, prefix="{shop:", **options)):
        await journal.heard("lost")
        server.execute("SET", "{shop:00}:e0:a", "1")
        said = await journal.heard("{shop:00}:e0:a")
    assert said == ["lost", "{shop:00}:e0:a"]


async def test_cancelling_closes_the_connection(make_server: MakeServer) -> None:
    """After ``run`` was cancelled the server tracks for nobody, and nothing more is told."""
    server, journal = make_server(), Journal()
    tracking = tracking_to(server.url, journal, prefix="{shop:")
    async with followed(tracking):
        await journal.heard("lost")
        assert b"tracking_clients:1" in server.execute("INFO", "clients")
    while b"tracking_clients:0" not in server.execute("INFO", "clients"):
        await anyio.sleep(0.005)
    server.execute("SET", "{shop:00}:e0:a", "1")
    assert journal.said == ["lost"]
    assert repr(tracking).endswith("not live>")


ENTRY = b"\xfbE1c" + b"%016d" % 5 + b"9" * 26 + b"0" * 16 + b"vm\x00\x00"


@pytest.fixture
def shard(server: ValkeyServer, namespace: str) -> Callable[..., list[Any]]:
    """Runs entry_touch for keys of shard 0: ``shard("touch", "a", "b")``."""
    script = load_scripts()["entry_touch"].source

    def run(*keys: str) -> list[Any]:
        prefix = f"{{{namespace}:00}}:"
        names = [f"{prefix}{part}:{key}" for key in keys for part in ("e0", "l", "t")]
        all_names = [f"{prefix}head", f"{prefix}log", *names]
        found: list[Any] = server.execute(
            "EVAL", script, len(all_names), *all_names, b"notice", "bell", 0, 60_000
        )
        return found

    return run


def test_touch_tells_of_what_is_not_ours(
    server: ValkeyServer, namespace: str, shard: Callable[..., list[Any]]
) -> None:
    """I1, I2 of entry_touch: one notice for all; what others set stays; their leases go."""
    prefix = f"{{{namespace}:00}}:"
    server.execute("MSET", f"{prefix}e0:json", "[1]", f"{prefix}e0:ours", ENTRY)
    server.execute("RPUSH", f"{prefix}e0:list", "x")
    for key in ("json", "ours", "list", "none"):
        server.execute("SET", f"{prefix}l:{key}", "token")

    count, version = shard("json", "ours", "list", "none")

    ((_, fields),) = server.execute("XRANGE", f"{prefix}log", "-", "+")
    assert (count, fields) == (3, [b"v", version, b"n", b"notice"])
    assert server.execute("GET", f"{prefix}e0:json") == b"[1]"
    assert server.execute("GET", f"{prefix}e0:ours") == ENTRY
    assert server.execute("LLEN", f"{prefix}e0:list") == 1
    leases = [server.execute("EXISTS", f"{prefix}l:{k}") for k in ("json", "ours", "list", "none")]
    assert leases == [0, 1, 0, 0]


@pytest.mark.parametrize("magic", [b"\xfbE1", b"\xfbE2"])
def test_touch_writes_nothing_for_our_own(
    server: ValkeyServer, namespace: str, shard: Callable[..., list[Any]], magic: bytes
) -> None:
    """An entry of any format of ours is left alone, with its lease; the log stays as it is."""
    prefix = f"{{{namespace}:00}}:"
    server.execute("SET", f"{prefix}e0:a", magic + ENTRY[3:])
    server.execute("SET", f"{prefix}l:a", "token")
    assert shard("a") == [0]
    assert server.execute("EXISTS", f"{prefix}log", f"{prefix}head", f"{prefix}l:a") == 1
