"""The pubsub against a real server: confirmation, order, loss, silence."""

from __future__ import annotations

import random

import anyio
import pytest

from forebay.coordinator.valkey.pubsub import PubSub
from forebay.schemas.errors import Disconnected, ServerRefused
from support.links import doorbell_to, link_to, running
from support.valkey_server import ValkeyServer, free_port, pings_of


class Recorder:
    """What a pubsub told, and a way to wait for it."""

    def __init__(self, pubsub: PubSub) -> None:
        self.messages: list[tuple[bytes, bytes]] = []
        self.states: list[bool] = []
        self._told = anyio.Event()
        pubsub.on_message(self._message)
        pubsub.on_state(self._state)

    def _message(self, channel: bytes, payload: bytes) -> None:
        self.messages.append((channel, payload))
        self._tell()

    def _state(self, live: bool) -> None:
        self.states.append(live)
        self._tell()

    def _tell(self) -> None:
        self._told.set()
        self._told = anyio.Event()

    async def messages_to(self, count: int) -> list[tuple[bytes, bytes]]:
        while len(self.messages) < count:
            await self._told.wait()
        return self.messages

    async def states_to(self, *states: bool) -> None:
        while self.states != list(states):
            await self._told.wait()


async def test_messages_arrive_in_order(valkey_server: ValkeyServer, namespace: str) -> None:
    """I3: 5,000 messages on three channels come in the order of publishing, byte for byte."""
    names = [f"{namespace}:{i}".encode() for i in range(3)]
    pubsub, link = doorbell_to(valkey_server.socket_url), link_to(valkey_server.socket_url)
    pubsub.subscribe(*names)
    recorder = Recorder(pubsub)
    rng = random.Random(1)
    sent = [(rng.choice(names), b"%d \x00\xff\r\n" % i) for i in range(5_000)]
    async with running(pubsub, link):
        await link.call_many([("PUBLISH", *message) for message in sent])
        assert await recorder.messages_to(5_000) == sent
        assert pubsub.statistics().messages == 5_000


async def test_live_means_that_the_server_has_subscribed_us(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """I2: from ``ready`` on, each publish finds us, among 2,500 channels as among one."""
    names = [f"{namespace}:{i}".encode() for i in range(2_500)]
    pubsub, link = doorbell_to(valkey_server.socket_url), link_to(valkey_server.socket_url)
    pubsub.subscribe(*names)
    async with running(pubsub, link):
        assert await link.call_many([("PUBLISH", name, "x") for name in names]) == [1] * 2_500


async def test_channels_change_while_live(valkey_server: ValkeyServer, namespace: str) -> None:
    """I1, I2: a new channel is not live until confirmed; one that is gone rings no more."""
    first, second = f"{namespace}:1".encode(), f"{namespace}:2".encode()
    pubsub, link = doorbell_to(valkey_server.socket_url), link_to(valkey_server.socket_url)
    pubsub.subscribe(first)
    recorder = Recorder(pubsub)
    async with running(pubsub, link):
        pubsub.subscribe(second, second)
        assert not pubsub.live
        await pubsub.ready()
        pubsub.unsubscribe(first)
        pubsub.subscribe(first)
        pubsub.unsubscribe(first)
        await pubsub.ready()
        replies = await link.call_many([("PUBLISH", first, "x"), ("PUBLISH", second, "y")])
        assert replies == [0, 1]
        assert await recorder.messages_to(1) == [(second, b"y")]
        assert pubsub.channels == (second,)


async def pings(server: ValkeyServer, more: int) -> None:
    """Wait for so many; the third is sent only where the first was answered."""
    at_first = pings_of(server)
    while pings_of(server) < at_first + more:
        await anyio.sleep(0.01)


async def test_without_channels_it_lives_and_can_get_some(make_server, namespace: str) -> None:
    """PINGs are answered before any subscription and after the last one is gone."""
    server = make_server()
    pubsub = doorbell_to(server.socket_url, interval_s=0.1)
    name = namespace.encode()
    async with running(pubsub):
        await pings(server, 3)
        pubsub.subscribe(name)
        await pubsub.ready()
        await pings(server, 3)
        pubsub.unsubscribe(name)
        await pings(server, 3)
        statistics = pubsub.statistics()
    assert (statistics.connects, statistics.silences) == (1, 0)
    assert statistics.round_trip_ms > 0


async def test_a_killed_connection_is_made_anew_with_its_channels(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """I1, I4: listeners hear False and True, then messages flow again."""
    name = namespace.encode()
    pubsub, link = doorbell_to(valkey_server.socket_url), link_to(valkey_server.socket_url)
    pubsub.subscribe(name)
    recorder = Recorder(pubsub)
    async with running(pubsub, link):
        assert await link.call("CLIENT", "KILL", "TYPE", "PUBSUB") == 1
        await recorder.states_to(True, False, True)
        assert await link.call("PUBLISH", name, "after") == 1
        assert await recorder.messages_to(1) == [(name, b"after")]


async def test_what_changed_while_away_is_subscribed_on_return(make_server, namespace: str) -> None:
    """I1: the wanted channels are those of now, not those of the lost connection."""
    server = make_server()
    old, new = b"old", b"new"
    pubsub, link = doorbell_to(server.url), link_to(server.url)
    pubsub.subscribe(old)
    recorder = Recorder(pubsub)
    async with running(pubsub):
        server.kill9()
        await recorder.states_to(True, False)
        pubsub.unsubscribe(old)
        pubsub.subscribe(new)
        assert not pubsub.live
        server.start()
        await recorder.states_to(True, False, True)
        async with running(link):
            replies = await link.call_many([("PUBLISH", old, ""), ("PUBLISH", new, "")])
            assert replies == [0, 1]


async def test_a_silent_connection_is_found_out(make_server) -> None:
    """I5: a frozen server keeps the socket open and says nothing; that counts as lost."""
    server = make_server()
    pubsub = doorbell_to(server.url, interval_s=0.05, connect_timeout_ms=300)
    pubsub.subscribe(b"c")
    recorder = Recorder(pubsub)
    async with running(pubsub):
        server.sigstop()
        await recorder.states_to(True, False)
        assert "no PONG" in str(pubsub.failure)
        assert pubsub.statistics().silences == 1
        server.sigcont()
        await recorder.states_to(True, False, True)


async def test_a_refused_subscription_is_never_live(make_server) -> None:
    """NOPERM for a channel shows as the reason why it is not live."""
    acl = ("user default on nopass ~* &* +@all", "user app on >pw ~* resetchannels &mine +@all")
    pubsub = doorbell_to(make_server(acl=acl).url, username="app", password="pw")
    pubsub.subscribe(b"theirs")
    recorder = Recorder(pubsub)
    async with running(pubsub, ready=False):
        while pubsub.statistics().connects < 2:
            await pubsub._state_to.changed()
        assert recorder.states == []
        pubsub.unsubscribe(b"theirs")
        pubsub.subscribe(b"mine")
        await pubsub.ready()


async def test_a_wrong_password_is_told_by_ready(make_server) -> None:
    """What waiting cannot mend is raised at once."""
    server = make_server(config={"requirepass": "x"})
    pubsub = doorbell_to(server.url, password="wrong")
    async with running(pubsub, ready=False):
        with pytest.raises(ServerRefused) as caught:
            await pubsub.ready()
    assert caught.value.code == "WRONGPASS"


async def test_closing_ends_it(valkey_server: ValkeyServer, namespace: str) -> None:
    """After ``aclose`` the listeners have heard False, and nobody waits for ever."""
    pubsub = doorbell_to(valkey_server.socket_url)
    pubsub.subscribe(namespace.encode())
    recorder = Recorder(pubsub)
    async with running(pubsub):
        pass
    assert recorder.states == [True, False]
    assert repr(pubsub).endswith("closed channels=1>")
    with pytest.raises(Disconnected):
        await pubsub.ready()


async def test_no_server_is_no_error_for_the_doorbell() -> None:
    """It is a hint: it goes on trying, and says why it is not live."""
    port = free_port()
    pubsub = doorbell_to(f"valkey://127.0.0.1:{port}")
    async with running(pubsub, ready=False):
        while pubsub.failure is None:
            await pubsub._state_to.changed()
        assert "refused the connection" in str(pubsub.failure)
        assert not pubsub.live
