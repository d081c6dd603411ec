"""What ``node.publish`` makes of objects, and what it refuses: nodes/publishing.py."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import aiohttp
import anyio
import msgspec
import pytest

import forebay
from forebay.coordinator.clock import SystemClock
from forebay.coordinator.log.ownership import Ownership
from forebay.coordinator.log.roster import Profile
from forebay.schemas.settings import Http, Workers

MakeNode = Callable[..., forebay.Node]
WORKS = Workers(enabled=True)


class Price(msgspec.Struct):
    cents: int

    def __post_init__(self) -> None:
        if self.cents < 0:
            raise ValueError("cents below zero")


def write(key: str, value: object = 1) -> dict[str, object]:
    return {"type": "write", "key": key, "value": value}


def in_cloud_event(event: dict[str, object]) -> dict[str, object]:
    attributes = {"specversion": "1.0", "source": "/t", "id": "1"}
    return {**attributes, "type": f"dev.forebay.cache.{event['type']}.v1", "data": event}


async def beats(node: forebay.Node, name: str, profile: Profile) -> Ownership:
    """Another live member of the namespace."""
    parts = node._parts
    made = Ownership(
        parts.backend.link,
        parts.names,
        parts.scripts,
        node_id=name,
        options=Workers(ownership_ttl_ms=60_000, beat_ms=20_000),
        clock=SystemClock(),
        rng=random.Random(name),
        instruments=node._instruments,
        profile=profile,
    )
    await made.beat()
    return made


async def stored(node: forebay.Node) -> int:
    parts = node._parts
    counts = [("XLEN", parts.names.events), ("XLEN", parts.names.part(-1, "dead"))]
    return sum(await parts.backend.link.call_many(counts))


@pytest.mark.parametrize("value", [math.nan, {"price": [1.0, -math.inf]}, {(1, 2): 3}])
async def test_an_event_that_json_cannot_express_is_not_published(
    make_node: Callable[..., forebay.Node], value: object
) -> None:
    """A NaN would become a null, and a null in a write event deletes."""
    async with make_node() as node:
        good = {"type": "write", "key": "price:1", "value": 1.0}
        with pytest.raises(forebay.InvalidEvent, match=r"events\[1\]"):
            await node.publish([good, {**good, "value": value}])
        assert await node._parts.backend.link.call("XLEN", node._parts.names.events) == 0


async def test_a_write_without_a_sink_is_refused_with_its_place(make_node: MakeNode) -> None:
    """E2: nothing of the list is stored, and the error tells which event and which field."""
    async with make_node() as node:
        await beats(node, "worker", Profile(sinks=("order:{id}",)))
        invalidate = {"type": "invalidate", "keys": ["nobody:1"]}
        for event, field in ((write("nobody:1"), "key"), (write("order:1:x"), "key")):
            with pytest.raises(forebay.InvalidEvent) as caught:
                await node.publish([write("order:1"), invalidate, event])
            assert (caught.value.fault, caught.value.field) == ("no_sink", f"events[2].{field}")
        with pytest.raises(forebay.InvalidEvent) as caught:
            await node.publish([in_cloud_event(write("nobody:1"))])
        assert caught.value.field == "events[0].data.key"
        assert await stored(node) == 0
        assert len(await node.publish([write("order:1"), invalidate])) == 2


async def test_the_sink_of_another_member_counts_as_soon_as_it_beats(make_node: MakeNode) -> None:
    """D1: the roster is asked, and not this node, which declares no sink at all."""
    async with make_node(workers=WORKS) as node:
        with pytest.raises(forebay.InvalidEvent, match="no_sink"):
            await node.publish([write("order:1")])
        await beats(node, "worker", Profile(sinks=("order:{id}",)))
        assert await node.publish([write("order:1")])
        with pytest.raises(forebay.InvalidEvent, match="no_sink"):
            await node.publish([write("order:1"), write("nobody:1")])


@pytest.mark.parametrize(
    "profile",
    [
        Profile(),
        Profile(sinks=("a:{id}",), more_sinks=True),
        Profile(sinks=("order:{id:hex}",)),
    ],
    ids=["older release", "more than it publishes", "newer grammar"],
)
async def test_a_member_that_may_have_the_sink_is_enough(
    make_node: MakeNode, profile: Profile
) -> None:
    """D1: what a member does not tell, or this release cannot read, is no reason to refuse."""
    async with make_node() as node:
        await beats(node, "sinkless", Profile(sinks=()))
        with pytest.raises(forebay.InvalidEvent, match="no_sink"):
            await node.publish([write("order:1")])
        await beats(node, "worker", profile)
        assert await node.publish([write("order:1")])


async def test_without_a_live_member_a_write_waits_in_the_stream(make_node: MakeNode) -> None:
    """D1: nobody beats, or has left, or has fallen silent: a worker with the sink may start."""
    async with make_node() as node:
        assert await node.publish([write("order:1")])
        member = await beats(node, "worker", Profile(sinks=()))
        with pytest.raises(forebay.InvalidEvent, match="no_sink"):
            await node.publish([write("order:1")])
        await member.leave()
        assert await node.publish([write("order:1")])
        await beats(node, "crashed", Profile(sinks=()))
        link, names = node._parts.backend.link, node._parts.names
        await link.call("ZINCRBY", names.nodes, -200_000, "crashed")
        assert await node.publish([write("order:1")])


@pytest.mark.parametrize("spoilt", ["nodes", "members", "record"])
async def test_a_roster_that_cannot_be_read_refuses_nothing(
    make_node: MakeNode, spoilt: str
) -> None:
    """D1: a record that somebody else wrote there does not stop publishers."""
    async with make_node() as node:
        link, names = node._parts.backend.link, node._parts.names
        if spoilt == "record":
            await link.call("HSET", names.members, "m", b"1 active 1000 0 {\xff")
            await link.call("ZADD", names.nodes, "inf", "m")
        else:
            await link.call("SET", getattr(names, spoilt), "x")
        assert await node.publish([write("order:1")])


async def test_a_value_that_its_cache_cannot_hold_is_refused(make_node: MakeNode) -> None:
    """E2: by the node that declares the cache; any other takes it, since it cannot know."""
    node = make_node()

    @node.cached("price:{id}", ttl=60)
    async def price(id: int) -> Price | None:
        return None

    large: Any = {"cents": 1, "note": "x" * 5}
    async with node, make_node() as other:
        await beats(node, "worker", Profile(sinks=("price:{id}",)))
        for wrong, said in (({"cents": "7"}, "Expected `int`"), ({"cents": -1}, "below zero")):
            with pytest.raises(forebay.InvalidEvent, match=said) as caught:
                await node.publish([write("price:1", large), write("price:2", wrong)])
            assert (caught.value.fault, caught.value.field) == ("wrong_field", "events[1].value")
            with pytest.raises(forebay.InvalidEvent) as caught:
                await node.publish([in_cloud_event(write("price:2", wrong))])
            assert caught.value.field == "events[0].data.value"
        assert await stored(node) == 0
        assert await node.publish([write("price:1", large), write("price:1", None)])
        assert await other.publish([write("price:2", {"cents": "7"})])


async def test_many_publishers_share_the_reads_of_the_roster(make_node: MakeNode) -> None:
    """D3: 200 at a time cost two reads of it, and not 200."""
    async with make_node() as node:
        await beats(node, "worker", Profile(sinks=("order:{id}",)))
        link = node._parts.backend.link
        await link.call("CONFIG", "RESETSTAT")

        async def publish(key: str) -> None:
            with suppress(forebay.InvalidEvent):
                await node.publish([write(key)])

        async with anyio.create_task_group() as tasks:
            for n in range(200):
                tasks.start_soon(publish, f"{'order' if n % 2 else 'nobody'}:{n}")
        asked = await link.call("INFO", "commandstats")
        calls = [
            line for line in asked.decode().splitlines() if line.startswith("cmdstat_hgetall:")
        ]
        assert int(calls[0].split("calls=")[1].split(",")[0]) <= 4


async def test_the_endpoint_answers_422_with_the_place_in_the_array(make_node: MakeNode) -> None:
    """POST /v1/events: nothing of an array with such an event is stored."""
    node = make_node(http=Http(port=0))

    @node.cached("price:{id}", ttl=60)
    async def price(id: int) -> Price | None:
        return None

    good, wrong = write("price:1", {"cents": 1}), write("price:2", {"cents": "7"})
    async with node, node.serving() as url, aiohttp.ClientSession(url) as client:
        await beats(node, "worker", Profile(sinks=("price:{id}",)))

        async def post(event: object) -> tuple[int, dict[str, str]]:
            async with client.post("/v1/events", json=event) as response:
                answer = await response.json()
                return response.status, answer.get("error", {})

        for event, code, field in (
            ([good, wrong], "wrong_field", "[1].value"),
            (wrong, "wrong_field", "value"),
            (in_cloud_event(wrong), "wrong_field", "data.value"),
            ([good, write("nobody:1")], "no_sink", "[1].key"),
            (write("nobody:1"), "no_sink", "key"),
        ):
            status, error = await post(event)
            assert (status, error["code"], error["field"]) == (422, code, field)
            assert error["fix"]
        assert await stored(node) == 0
        assert await post([good, {"type": "invalidate", "keys": ["nobody:1"]}]) == (202, {})
