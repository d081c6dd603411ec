"""The calls of a running node inside a service."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import msgspec
import pytest
import structlog
from structlog.testing import capture_logs

import forebay
from conftest import MakeServer
from forebay.schemas.settings import Http, NodeSettings, Settings, Valkey
from support.node_process import environ
from support.valkey_server import ValkeyServer

MakeNode = Callable[..., forebay.Node]


class Oops(Exception):
    """Raised by the application."""


async def squared(id: int) -> int:
    return id * id


@pytest.fixture
async def node(make_node: MakeNode) -> AsyncIterator[forebay.Node]:
    node = make_node()
    node.cached("a:{id}", ttl=60, tags=["all"])(squared)

    @node.cached("bad:{id}", ttl=60)
    async def bad(id: int) -> int:
        raise Oops("database")

    async with node:
        yield node


async def test_read_goes_through_the_cache_of_the_key(node: forebay.Node) -> None:
    """A key is read through its cache; a key that no cache declares is None."""
    first, second = await node.read("a:4"), await node.read("a:4")

    assert first is not None
    assert second is not None
    assert (first.json, first.tier, first.negative) == (b"16", "source", False)
    assert (second.json, second.tier, second.version) == (b"16", "near", first.version)
    assert await node.read("nobodys:4") is None


async def test_read_tells_whose_fault_it_is(node: forebay.Node) -> None:
    """An exception of a loader becomes a LoaderError that names the cache, and is logged."""
    with capture_logs() as lines, pytest.raises(forebay.LoaderError) as caught:
        await node.read("bad:1")

    assert (caught.value.cache, caught.value.key) == ("bad", "bad:1")
    assert isinstance(caught.value.__cause__, Oops)
    assert [line["event"] for line in lines if line["log_level"] == "error"] == ["loader.failed"]


@pytest.mark.parametrize("how", [{"keys": ["a:4"]}, {"tags": ["all"]}])
async def test_invalidation_is_seen_by_the_next_read(
    node: forebay.Node, how: dict[str, list[str]]
) -> None:
    """When ``invalidate`` returns, this node has dropped the entry; the new entry is newer."""
    first = await node.read("a:4")
    await node.invalidate(**how)
    second = await node.read("a:4")

    assert first is not None
    assert second is not None
    assert second.tier == "source"
    assert second.version > first.version


@pytest.mark.parametrize(
    "how",
    [{"keys": "a:4"}, {"tags": "all"}, {"keys": ["a 4"]}, {"tags": ["{all}"]}, {"keys": [""]}],
)
async def test_what_cannot_be_a_key_is_not_invalidated(
    node: forebay.Node, how: dict[str, Any]
) -> None:
    """A string instead of a list is refused: it would be read letter by letter."""
    with pytest.raises(forebay.InvalidKey):
        await node.invalidate(**how)


async def test_published_events_are_stored_in_order(
    node: forebay.Node, valkey_server: ValkeyServer
) -> None:
    """publish: all events are stored unchanged, under rising ids."""
    events = [f'{{"type":"refresh","keys":["a:{n}"]}}'.encode() for n in range(3)]
    ids = await node.publish(events)
    stored = valkey_server.execute("XRANGE", f"forebay:{node.namespace}:events", "-", "+")

    assert [(entry.decode(), fields[1]) for entry, fields in stored] == list(
        zip(ids, events, strict=True)
    )
    assert node._instruments.counts["events_published", "refresh"] == 3
    assert await node.publish([]) == []


async def test_nothing_to_invalidate_is_a_mistake(node: forebay.Node) -> None:
    """Empty lists are accepted, and do nothing."""
    with pytest.raises(forebay.InvalidKey, match="pass at least one of them"):
        await node.invalidate()
    await node.invalidate([], tags=[])


async def test_events_may_be_text_or_dicts(node: forebay.Node, valkey_server: ValkeyServer) -> None:
    """publish: dicts are stored as JSON."""
    event = {"type": "refresh", "keys": ["a:1"]}
    await node.publish([event, msgspec.json.encode(event).decode(), msgspec.json.encode(event)])
    stored = valkey_server.execute("XRANGE", f"forebay:{node.namespace}:events", "-", "+")
    assert [msgspec.json.decode(fields[1]) for _, fields in stored] == [event] * 3


@pytest.mark.parametrize(
    "given",
    [
        b'{"type": "refresh", "keys": ["a:1"]}',
        '{"type": "refresh", "keys": ["a:1"]}',
        {"type": "refresh", "keys": ["a:1"]},
        [7],
        [{"type": object()}],
        ["\ud800"],
    ],
)
async def test_one_event_is_no_list_of_events(node: forebay.Node, given: Any) -> None:
    """publish: a string instead of a list is refused, and not read letter by letter."""
    with pytest.raises(forebay.InvalidEvent, match=r"write a list|give JSON"):
        await node.publish(given)


async def test_one_bad_event_keeps_all_out(node: forebay.Node, valkey_server: ValkeyServer) -> None:
    """publish: an invalid event is refused with the reason, and nothing is stored."""
    good = b'{"type":"refresh","keys":["a:1"]}'
    for bad in (b"{", b"[]", b'{"type":"juggle"}', b'{"type":"refresh"}', b" " * 70_000):
        with pytest.raises(forebay.InvalidEvent):
            await node.publish([good, bad])

    assert valkey_server.execute("EXISTS", f"forebay:{node.namespace}:events") == 0


async def test_events_of_a_newer_version_are_published(node: forebay.Node) -> None:
    """publish: events of an unknown type are stored, and counted as unknown."""
    event = b'{"specversion":"1.0","type":"dev.forebay.cache.write.v2","id":"1","source":"x"}'

    assert len(await node.publish([event])) == 1
    assert node._instruments.counts["events_published", "unknown"] == 1


async def test_two_nodes_in_one_process_share_one_server(make_node: MakeNode) -> None:
    """Each node has its own caches, metrics and near cache; an invalidation reaches the other."""
    loads: list[str] = []

    def shop(name: str) -> forebay.Node:
        node = make_node()

        @node.cached("a:{id}", ttl=60)
        async def loaded(id: int) -> int:
            loads.append(name)
            return len(loads)

        return node

    async with shop("one") as one, shop("two") as two:
        tiers = []
        for node in (one, two, one, two):
            hit = await node.read("a:1")
            assert hit is not None
            tiers.append((hit.tier, hit.json))
        assert tiers == [("source", b"1"), ("shared", b"1"), ("near", b"1"), ("near", b"1")]

        await one.invalidate(["a:1"])
        with anyio.fail_after(5):
            while (hit := await two.read("a:1")) is None or hit.json == b"1":
                await anyio.sleep(0.005)
        counts = [
            node._instruments.counts["cache_requests", "loaded", "source", "miss"]
            for node in (one, two)
        ]
    assert loads == ["one", "two"]
    assert counts == [1, 1]
    assert one.instance != two.instance


async def test_two_namespaces_on_one_server_do_not_meet(
    make_node: MakeNode, namespace: str
) -> None:
    """One key in two namespaces is two entries."""
    one, two = make_node(f"{namespace}-1"), make_node(f"{namespace}-2")
    cached = [node.cached("a:{id}", ttl=60)(squared) for node in (one, two)]
    async with one, two:
        assert [(await each.get_with_info(3)).tier for each in cached] == ["source", "source"]
        await one.invalidate(["a:3"])
        assert [(await each.get_with_info(3)).tier for each in cached] == ["source", "near"]


async def test_node_without_logging_configured_keeps_quiet_about_secrets(
    make_server: MakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """A service that configures no logs gets no password on its terminal."""
    structlog.reset_defaults()
    server = make_server(config={"requirepass": "hunter2"})
    url = server.url.replace("//", "//:hunter2@")
    async with forebay.Node("shop", settings=Settings(valkey=Valkey(url=url))) as node:
        assert node.is_running
    out, err = capsys.readouterr()

    assert "node.running" in err
    assert "hunter2" not in out + err


async def test_embedded_node_serves_http_while_asked_to(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """serving: the endpoint answers like `forebay run`, and can be opened again."""
    settings = Settings(
        node=NodeSettings(namespace=namespace),
        valkey=Valkey(url=valkey_server.socket_url),
        http=Http(port=0),
    )
    node = forebay.Node(settings=settings)
    for _ in range(2):
        async with node, node.serving() as url, aiohttp.ClientSession() as client:
            async with client.get(f"{url}/livez") as answer:
                assert answer.status == 200
            async with client.get(f"{url}/metrics") as answer:
                text = await answer.text()
            assert text.count("\nforebay_event_loop_lag_max_seconds ") == 1
    with pytest.raises(forebay.ForebayError, match="not running"):
        async with node.serving():
            pass


async def test_endpoint_that_is_switched_off_is_not_served(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """serving: http.enabled=false yields an empty URL, without a check in the code."""
    settings = Settings(
        node=NodeSettings(namespace=namespace),
        valkey=Valkey(url=valkey_server.socket_url),
        http=Http(enabled=False),
    )
    async with forebay.Node(settings=settings) as node, node.serving() as url:
        assert url == ""


async def test_port_of_an_embedded_node_that_is_taken_is_told(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """serving: the error has the setting, its origin and the fix; the node stops in order."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = Settings(
            node=NodeSettings(namespace=namespace),
            valkey=Valkey(url=valkey_server.socket_url),
            http=Http(port=taken.getsockname()[1]),
        )
        node = forebay.Node(settings=settings)
        with pytest.raises(forebay.ConfigError, match=r"http.port = .* \(from the code\)"):
            async with node, node.serving():
                pass
    assert not node.is_running


def test_a_running_loop_waits_for_no_import(valkey_server: ValkeyServer, tmp_path: Path) -> None:
    """Slow imports (web server, driver, compression) do not block the event loop."""
    program = Path(__file__).parents[1] / "support/late_imports.py"
    done = subprocess.run(
        [sys.executable, str(program), valkey_server.socket_url, str(tmp_path / "shop.db")],
        capture_output=True,
        text=True,
        env=environ(),
        timeout=50,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
