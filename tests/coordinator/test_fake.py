"""fakeredis behind the interfaces of Link and PubSub: coordinator/valkey/fake.py.

The first part holds on every kind of backend: there the fake must do as the others do.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from inspect import Parameter, signature

import anyio
import pytest

from forebay.coordinator.valkey.backend import Backend
from forebay.coordinator.valkey.fake import FakeLink, FakePubSub, shared_server
from forebay.coordinator.valkey.link import Link
from forebay.coordinator.valkey.pubsub import PubSub
from forebay.schemas.errors import Disconnected, NotShareable, ServerRefused
from forebay.schemas.settings import Valkey


@pytest.fixture
async def backend(backend_settings: Valkey) -> AsyncIterator[Backend]:
    async with Backend(backend_settings, client_name="test") as backend:
        yield backend


@asynccontextmanager
async def fake(name: str) -> AsyncIterator[Backend]:
    async with Backend(Valkey(fake=True), client_name="test", fake_name=name) as backend:
        yield backend


# The same everywhere


@pytest.mark.parametrize(
    "commands, reply",
    [
        ([["GET", "{n}"]], None),
        ([["SET", "{n}", b"\xff\x00"], ["GET", "{n}"]], b"\xff\x00"),
        ([["SET", "{n}", 7, "NX", "PX", 60_000]], b"OK"),
        ([["SET", "{n}", 1], ["SET", "{n}", 2, "NX"]], None),
        ([["HSET", "{n}", "a", 1], ["HGETALL", "{n}"]], [b"a", b"1"]),
        ([["HMGET", "{n}", "a", "b"]], [None, None]),
        ([["ZADD", "{n}", 1.5, "m"], ["ZRANGE", "{n}", 0, -1, "WITHSCORES"]], [b"m", b"1.5"]),
        ([["XADD", "{n}", "7-*", "a", "b"], ["XADD", "{n}", "7-*", "a", "b"]], b"7-1"),
        (
            [["XADD", "{n}", "7-*", "a", "b"], ["XREAD", "COUNT", 9, "STREAMS", "{n}", "0-0"]],
            [["{n}", [[b"7-0", [b"a", b"b"]]]]],
        ),
        ([["XREAD", "STREAMS", "{n}", "0-0"]], None),
        ([["XREVRANGE", "{n}", "+", "-", "COUNT", 1]], []),
        ([["EVAL", "return {1, false, 'x', {ARGV[1]}}", 0, b"\xfe"]], [1, None, b"x", [b"\xfe"]]),
        ([["PUBLISH", "{n}", "nobody"]], 0),
    ],
)
async def test_replies_are_raw_and_the_same(
    backend: Backend, namespace: str, commands: list[list[object]], reply: object
) -> None:
    """Bytes, integers, lists and None, as RESP2 has them."""

    def named(value: object) -> object:
        if isinstance(value, list):
            return [named(each) for each in value]
        return namespace if value == "{n}" else value

    got = None
    for command in commands:
        got = await backend.link.call(*named(command))  # type: ignore[misc]
    expected = named(reply)
    if commands[-1][0] == "XREAD" and isinstance(expected, list):
        expected[0][0] = expected[0][0].encode()
    assert got == expected


@pytest.mark.parametrize(
    "command, code",
    [
        (["NOSUCHCOMMAND", "x"], "ERR"),
        (["GET"], "ERR"),
        (["EVALSHA", "0" * 40, 0], "NOSCRIPT"),
        (["INCR", "{n}"], "WRONGTYPE"),
        (["XGROUP", "CREATE", "{n}", "g", "0"], "BUSYGROUP"),
        (["XREADGROUP", "GROUP", "h", "c", "STREAMS", "{n}", ">"], "NOGROUP"),
        (["EVAL", "return redis.error_reply('MYCODE at home')", 0], "MYCODE"),
        (["EVAL", "return redis.call('INCR', KEYS[1])", 1, "{n}"], "WRONGTYPE"),
    ],
)
async def test_refusals_have_the_server_s_code(
    backend: Backend, namespace: str, command: list[object], code: str
) -> None:
    """Raised by ``call``, awaited of ``call_nowait``, in its place in ``call_many``."""
    words = [namespace if word == "{n}" else word for word in command]
    await backend.link.call("XGROUP", "CREATE", namespace, "g", "0", "MKSTREAM")

    with pytest.raises(ServerRefused) as caught:
        await backend.link.call(*words)  # type: ignore[arg-type]
    assert caught.value.code == code
    assert not caught.value.message.startswith(code)
    with pytest.raises(ServerRefused):
        await backend.link.call_nowait(*words)  # type: ignore[arg-type]
    before, refused, after = await backend.link.call_many(
        [["ECHO", "a"], words, ["ECHO", "b"]]  # type: ignore[list-item]
    )
    assert (before, after) == (b"a", b"b")
    assert isinstance(refused, ServerRefused)
    assert refused.code == code


@pytest.mark.parametrize(
    "command", [["XREAD", "BLOCK", 0, "STREAMS", "x", "$"], ["SUBSCRIBE", "x"], ["MULTI"]]
)
async def test_commands_that_cannot_share_are_refused(
    backend: Backend, command: list[str | int]
) -> None:
    """What would hold up others on a real link does not go through a fake one either."""
    with pytest.raises(NotShareable):
        await backend.link.call(*command)
    with pytest.raises(NotShareable):
        backend.link.call_nowait(*command)
    with pytest.raises(NotShareable):
        await backend.link.call_many([command])


async def test_calls_keep_their_order(backend: Backend, namespace: str) -> None:
    """Whatever the way of calling, what is called first runs first."""
    futures = [backend.link.call_nowait("RPUSH", namespace, n) for n in range(50)]
    assert [await future for future in futures] == list(range(1, 51))
    listed = await backend.link.call("LRANGE", namespace, 0, -1)
    assert listed == [str(n).encode() for n in range(50)]
    assert await backend.link.call_many([]) == []


async def test_a_blocking_read_waits_for_entries(backend: Backend, namespace: str) -> None:
    """On a link of its own: what is there at once, what comes later, None at the end."""
    read = ["XREAD", "COUNT", 10, "BLOCK", 2_000, "STREAMS", namespace]
    async with backend.blocking_link("reader") as link, anyio.create_task_group() as tasks:
        first = await backend.link.call("XADD", namespace, "*", "n", 1)
        found = await link.call(*read, "0-0", timeout_ms=5_000)
        assert found == [[namespace.encode(), [[first, [b"n", b"1"]]]]]
        assert await link.call("XREAD", "BLOCK", 10, "STREAMS", namespace, first) is None

        async def add_later() -> None:
            await anyio.sleep(0.02)
            await backend.link.call("XADD", namespace, "*", "n", 2)

        tasks.start_soon(add_later)
        ((_, ((second, fields),)),) = await link.call(*read, first, timeout_ms=5_000)
        assert second > first
        assert fields == [b"n", b"2"]

        with anyio.move_on_after(0.03) as given_up:
            await link.call("XREAD", "BLOCK", 60_000, "STREAMS", namespace, second)
        assert given_up.cancelled_caught


async def test_the_doorbell_rings(backend: Backend, namespace: str) -> None:
    """Subscribed while running, confirmed by ``live``, heard in order, then no more."""
    bell, channel = backend.pubsub, namespace.encode()
    heard: list[tuple[bytes, bytes]] = []
    bell.on_message(lambda *message: heard.append(message))
    bell.subscribe(channel, b"other-" + channel)
    await bell.ready()
    assert bell.channels == (channel, b"other-" + channel)

    for n in range(20):
        assert await backend.link.call("PUBLISH", channel, b"\xff%d" % n) == 1
    with anyio.fail_after(5):
        while len(heard) < 20:
            await anyio.sleep(0.001)
    assert heard == [(channel, b"\xff%d" % n) for n in range(20)]
    assert bell.statistics().messages == 20

    bell.unsubscribe(channel)
    with anyio.fail_after(5):
        while await backend.link.call("PUBLISH", channel, "late"):
            await anyio.sleep(0.001)
    assert len(heard) == 20


async def test_state_listeners_are_told(backend_settings: Valkey) -> None:
    """The pubsub tells when it becomes live and when it ends."""
    states: list[bool] = []
    async with Backend(backend_settings, client_name="test") as backend:
        await backend.pubsub.ready()
        backend.pubsub.on_state(states.append)
        backend.pubsub.subscribe(b"test-states")
        await backend.pubsub.ready()
    assert states[:2] == [False, True]
    assert not backend.pubsub.live
    assert not backend.link.connected
    with pytest.raises(Disconnected):
        await backend.link.call("PING")


def faces(kind: type) -> dict[str, tuple[str, ...]]:
    """The public methods of a class, with the names of their parameters."""
    found = {}
    for name, member in vars(kind).items():
        if not name.startswith("_"):
            parameters = signature(member).parameters.values() if callable(member) else ()
            named = [p.name for p in parameters if p.kind is not Parameter.VAR_POSITIONAL]
            found[name] = tuple(named)
    return found


@pytest.mark.parametrize("real, stand_in", [(Link, FakeLink), (PubSub, FakePubSub)])
def test_the_faces_are_the_same(real: type, stand_in: type) -> None:
    """Whoever works with the real one works with the fake one."""
    assert faces(stand_in) == faces(real)


# Only here


async def test_nodes_of_one_name_share_the_data() -> None:
    """I3: and others do not."""
    async with fake("one") as first, fake("one") as second, fake("two") as other:
        await first.link.call("SET", "key", "value")
        assert await second.link.call("GET", "key") == b"value"
        assert await other.link.call("GET", "key") is None
        assert first.facts.run_id == second.facts.run_id == await second.run_id()
        assert first.facts.run_id != other.facts.run_id

        heard: list[bytes] = []
        second.pubsub.on_message(lambda _, payload: heard.append(payload))
        second.pubsub.subscribe(b"bell")
        await second.pubsub.ready()
        await first.link.call("PUBLISH", "bell", "ring")
        with anyio.fail_after(5):
            while not heard:
                await anyio.sleep(0.001)
        assert heard == [b"ring"]


async def test_the_data_go_with_the_last_user() -> None:
    """I3: a later server of the same name is empty, and another run."""
    async with fake("gone") as backend:
        await backend.link.call("SET", "key", "value")
        run_id = backend.facts.run_id
    async with fake("gone") as again:  # though ``backend`` still refers to the old one
        assert await again.link.call("GET", "key") is None
        assert again.facts.run_id != run_id


async def test_an_outage_can_be_played() -> None:
    """I2: calls fail while it lasts; afterwards the pubsub is live again by itself."""
    server = shared_server("outage")
    async with fake("outage") as backend:
        backend.pubsub.subscribe(b"bell")
        await backend.pubsub.ready()
        states: list[bool] = []
        backend.pubsub.on_state(states.append)

        server.connected = False
        with pytest.raises(Disconnected):
            await backend.link.call("PING")
        with pytest.raises(Disconnected):
            await backend.link.call_many([["PING"]])
        assert not backend.link.connected
        with anyio.fail_after(5):
            while backend.pubsub.live:
                await anyio.sleep(0.005)
        server.connected = True
        await backend.pubsub.ready()

        heard: list[bytes] = []
        backend.pubsub.on_message(lambda _, payload: heard.append(payload))
        for payload in (b"1", b"2"):
            await backend.link.call("PUBLISH", "bell", payload)
        with anyio.fail_after(5):
            while len(heard) < 2:
                await anyio.sleep(0.001)
        assert heard == [b"1", b"2"]
        assert states == [False, True]


async def test_a_fake_is_warned_of() -> None:
    """Nobody takes it for a server by mistake."""
    async with fake("warned") as backend:
        assert [each.name for each in backend.findings] == ["fake"]
        assert backend.url == ""
        assert "connected" in repr(backend.link)


def test_fakeredis_is_not_imported_unless_used() -> None:
    """It is an extra, and slow to import."""
    program = "import sys, forebay.coordinator.valkey.backend; sys.exit('fakeredis' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
