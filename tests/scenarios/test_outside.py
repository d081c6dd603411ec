"""Programs that know nothing of Forebay publish events; every node shows what they did.

Three node processes; the publishers are redis-cli, Node.js with a plain socket, and curl.
"""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.eventually import wait_until
from support.node_process import Answer, NodeProcess, Shop
from support.programs import tool
from support.valkey_server import ValkeyServer

Publish = Callable[[dict[str, Any]], None]
PROMISE_S = 1.0  #: from the publisher's return to the last node
#: XADD in the protocol of Valkey, over a socket: all that Node.js needs is in Node.js.
NODE_JS = """
const [port, stream, event] = process.argv.slice(1);
const words = ["XADD", stream, "*", "event", event];
const socket = require("net").connect(port, "127.0.0.1", () => socket.write(
  `*${words.length}\\r\\n` + words.map((w) => `$${Buffer.byteLength(w)}\\r\\n${w}\\r\\n`).join("")
));
socket.on("data", (reply) => {
  console.log(String(reply));
  process.exit(reply[0] === 36 ? 0 : 1);
});
"""
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def shop(valkey_server: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    directory = tmp_path_factory.mktemp("outside")
    with Shop(directory, f"outside-{directory.name}", valkey__url=valkey_server.url) as shop:
        yield shop


@pytest.fixture(scope="module")
def nodes(shop: Shop) -> list[NodeProcess]:
    nodes = [shop.node(f"node-{number}").spawn() for number in (1, 2, 3)]
    for node in nodes:
        node.until_ready()
    return nodes


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, (command[0], done.stdout, done.stderr)
    return done.stdout


def cloud_event(event: dict[str, Any]) -> dict[str, Any]:
    data = {name: value for name, value in event.items() if name != "type"}
    return {
        "specversion": "1.0",
        "id": f"{next(_numbers)}",
        "source": "/tests/outside",
        "type": f"dev.forebay.cache.{event['type']}.v1",
        "data": data,
    }


@pytest.fixture(params=["redis-cli", "node", "curl", "curl-cloudevents"])
def publish(
    request: pytest.FixtureRequest,
    shop: Shop,
    nodes: list[NodeProcess],
    valkey_server: ValkeyServer,
) -> Publish:
    """Publishes an event with a program of Debian's."""
    way: str = request.param
    program, port = tool(way.partition("-cloud")[0]), str(valkey_server.port)
    url = f"{nodes[0].url}/v1/events"

    def redis_cli(event: dict[str, Any]) -> None:
        run(program, "-p", port, "XADD", shop.stream, "*", "event", json.dumps(event))

    def node(event: dict[str, Any]) -> None:
        run(program, "-e", NODE_JS, port, shop.stream, json.dumps(event))

    def curl(event: dict[str, Any], kind: str = "application/json") -> None:
        header = f"Content-Type: {kind}"
        told = run(program, "-sS", "--fail", "-H", header, "-d", json.dumps(event), url)
        assert json.loads(told)["accepted"][0]["level"] == "accepted"

    def curl_cloudevents(event: dict[str, Any]) -> None:
        curl(cloud_event(event), "application/cloudevents+json")

    ways = {"redis-cli": redis_cli, "node": node, "curl": curl}
    return ways.get(way, curl_cloudevents)


def all_of(nodes: list[NodeProcess], number: int) -> list[Answer]:
    return [node.get(f"/v1/cache/product:{number}") for node in nodes]


def prices(answers: list[Answer]) -> list[int]:
    return [answer.json["price"] for answer in answers]


def versions(answers: list[Answer]) -> list[int]:
    return [int(answer.headers["X-Forebay-Version"]) for answer in answers]


@pytest.mark.parametrize("what", ["key", "tag"])
def test_invalidation_from_outside_shows_on_every_node_in_a_second(
    shop: Shop, nodes: list[NodeProcess], publish: Publish, what: str
) -> None:
    """The source has changed: after the event every node reads it anew, under a newer version."""
    number = next(_numbers)
    shop.price(number, 100)
    before = all_of(nodes, number)
    assert prices(before) == [100] * 3
    shop.price(number, 200)
    assert prices(all_of(nodes, number)) == [100] * 3

    keys = {"keys": [f"product:{number}"]} if what == "key" else {"tags": ["catalog"]}
    publish({"type": "invalidate", **keys})
    wait_until(
        lambda: prices(all_of(nodes, number)) == [200] * 3, limit_s=PROMISE_S, what="the new price"
    )

    assert min(versions(all_of(nodes, number))) > max(versions(before))


def test_write_from_outside_shows_on_every_node_and_reaches_the_sink(
    shop: Shop, nodes: list[NodeProcess], publish: Publish
) -> None:
    """The value of the event is what every node serves within a second; the sink gets it too."""
    number = next(_numbers)
    shop.price(number, 1)
    before = all_of(nodes, number)
    assert prices(before) == [1] * 3

    publish({"type": "write", "key": f"product:{number}", "value": {"id": number, "price": 7}})
    wait_until(
        lambda: prices(all_of(nodes, number)) == [7] * 3, limit_s=PROMISE_S, what="the new price"
    )

    assert min(versions(all_of(nodes, number))) > max(versions(before))
    wait_until(lambda: shop.stored().get(f"product:{number}") == 7, what="the write in the sink")


def test_what_can_never_be_applied_stops_nobody(
    shop: Shop, nodes: list[NodeProcess], publish: Publish, valkey_server: ValkeyServer
) -> None:
    """Garbage goes to the dead letters with its bytes and the reason; the next event works."""
    number = next(_numbers)
    letters = f"{{{shop.stream}}}:dead"
    valkey_server.execute("DEL", letters)
    for fields in (["event", b'{"type":\xff'], ["event", '{"type":"juggle"}'], ["events", "{}"]):
        valkey_server.execute("XADD", shop.stream, "*", *fields)
    publish({"type": "write", "key": f"product:{number}", "value": {"id": number, "price": 7}})

    wait_until(lambda: shop.stored().get(f"product:{number}") == 7, what="the write in the sink")
    found = [
        dict(zip(fields[::2], fields[1::2], strict=True))
        for _, fields in valkey_server.execute("XRANGE", letters, "-", "+")
    ]
    assert [(each[b"reason"], each[b"event"]) for each in found] == [
        (b"undecodable", b'{"type":\xff'),
        (b"unknown_type", b'{"type":"juggle"}'),
        (b"wrong_field", b"events {}"),
    ]
