"""POST /v1/events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec
import pytest
from cloudevents.core.bindings.http import to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from forebay.schemas.errors import Backpressure, BreakerOpen, Disconnected, Fenced, TimedOut
from forebay.schemas.events import Invalidate, Write, read_event

if TYPE_CHECKING:
    from tests.nodes.web.conftest import FakeNode

PATH = "/v1/events"
JSON = {"Content-Type": "application/json"}
GOOD = b'{"type":"invalidate","keys":["product:1"]}'


async def post(
    client: aiohttp.ClientSession, body: bytes, headers: dict[str, str] = JSON
) -> tuple[int, Any]:
    async with client.post(PATH, data=body, headers=headers) as response:
        return response.status, await response.json()


def cloud_event(key: str, **attributes: Any) -> CloudEvent:
    defaults = {
        "type": "dev.forebay.cache.invalidate.v1",
        "source": "/orders",
        "id": f"event-{key}",
        "specversion": "1.0",
        "datacontenttype": "application/json",
    }
    return CloudEvent(attributes=defaults | attributes, data={"keys": [key]})


async def test_a_bare_event_is_published_as_it_was_sent(
    client: aiohttp.ClientSession, fake_node: FakeNode
) -> None:
    """E2: the stream gets the very bytes, and the reply says which level was reached."""
    status, body = await post(client, GOOD)

    assert (status, body) == (202, {"accepted": [{"id": "7-0", "level": "accepted"}]})
    assert fake_node.published == [GOOD]


async def test_an_array_is_published_in_its_order(
    client: aiohttp.ClientSession, fake_node: FakeNode
) -> None:
    """A batch gives one id for each event."""
    second = b'{"type":"write","key":"a","value":1}'
    status, body = await post(client, b" [" + GOOD + b", " + second + b"]")

    assert status == 202
    assert [each["id"] for each in body["accepted"]] == ["7-0", "7-1"]
    assert fake_node.published == [GOOD, second]


async def test_one_wrong_event_refuses_its_whole_batch(
    client: aiohttp.ClientSession, fake_node: FakeNode
) -> None:
    """E1: the answer names the event and the field; nothing of the batch is published."""
    status, body = await post(client, b"[" + GOOD + b',{"type":"invalidate","keys":[7]}]')

    assert (status, body["error"]["code"]) == (422, "wrong_field")
    assert body["error"]["field"] == "[1].keys[0]"
    assert fake_node.published == []


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "undecodable"),
        (b"hello", 400, "undecodable"),
        (b"[{]", 400, "undecodable"),
        (b"[" * 50_000, 400, "undecodable"),
        (b'{"type":"invalidate","keys":["\xff"]}', 400, "undecodable"),
        (b'{"type":"flush"}', 422, "unknown_type"),
        (b'{"type":"invalidate"}', 422, "wrong_field"),
        (b'{"type":"invalidate","keys":["a b"]}', 422, "wrong_field"),
        (b'{"type":"write","key":"a","value":1,"ttl":-1}', 422, "wrong_field"),
        (b'{"type":"write","key":"a","value":"' + b"x" * 70_000 + b'"}', 413, "oversized"),
        (b"x" * 100_001, 413, "too_large"),
        (b"[" + b",".join([GOOD] * 101) + b"]", 413, "too_many_events"),
    ],
)
async def test_bad_bodies_are_refused_with_the_reason(
    client: aiohttp.ClientSession, fake_node: FakeNode, body: bytes, status: int, code: str
) -> None:
    """What cannot be applied is refused, and the next good event is taken."""
    answered, error = await post(client, body)

    assert (answered, error["error"]["code"]) == (status, code)
    assert error["error"]["problem"]
    assert (await post(client, GOOD))[0] == 202
    assert fake_node.published == [GOOD]


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/cloudevents+avro"},
        {"Content-Type": "application/json; charset=utf-16"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
        {"Content-Type": "application/avro", "ce-specversion": "1.0", "ce-type": "a"},
    ],
)
async def test_other_types_and_encodings_are_415(
    client: aiohttp.ClientSession, fake_node: FakeNode, headers: dict[str, str]
) -> None:
    """What a browser's form can send, and what would have to be unpacked, is not read."""
    status, body = await post(client, GOOD, headers)

    assert status == 415
    assert body["error"]["fix"]
    assert fake_node.published == []


async def test_the_cloudevents_sdk_publishes_in_every_mode(
    client: aiohttp.ClientSession, fake_node: FakeNode
) -> None:
    """Structured, binary and batch mode of an independent publisher mean the same event."""
    codec, event = JSONFormat(), cloud_event("product:ü")
    structured, binary = to_structured(event, codec), to_binary(event, codec)
    batch = {"Content-Type": "application/cloudevents-batch+json; charset=utf-8"}

    for message in (structured, binary):
        assert (await post(client, message.body, dict(message.headers)))[0] == 202
    assert (await post(client, b"[" + structured.body + b"]", batch))[0] == 202

    read = [read_event(raw, bytes_max=65_536) for raw in fake_node.published]
    assert len(read) == 3
    assert all(each == read[0] for each in read)
    assert read[0].body == Invalidate(keys=("product:ü",))
    assert read[0].id == "/orders#event-product:ü"


async def test_binary_mode_keeps_the_data_as_it_was_sent(
    client: aiohttp.ClientSession, fake_node: FakeNode
) -> None:
    """The body becomes ``data`` byte for byte, the headers become attributes."""
    headers = {
        "Content-Type": "application/json",
        "ce-specversion": "1.0",
        "ce-type": "dev.forebay.cache.write.v1",
        "ce-source": "/orders%20desk",
        "ce-id": "1",
        "ce-traceparent": "00-ab-cd-01",
    }
    status, _ = await post(client, b'{"key":"a","value":1.50}', headers)

    event = read_event(fake_node.published[0], bytes_max=65_536)
    assert status == 202
    assert (event.id, event.traceparent) == ("/orders desk#1", "00-ab-cd-01")
    assert isinstance(event.body, Write)
    assert bytes(event.body.value) == b"1.50"


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"ce-id": "%ff"}, "ce-id"),
        ({"ce-data": "{}"}, "ce-data"),
        ({"ce-specversion": "0.3"}, "specversion"),
    ],
)
async def test_wrong_headers_of_binary_mode_are_named(
    client: aiohttp.ClientSession, extra: dict[str, str], field: str
) -> None:
    """A header that cannot be an attribute refuses the event."""
    message = to_binary(cloud_event("a"), JSONFormat())
    status, body = await post(client, message.body, {**message.headers, **extra})

    assert (status, body["error"]["field"]) == (422, field)


async def test_binary_mode_needs_its_version(client: aiohttp.ClientSession) -> None:
    """Headers without ``ce-specversion`` are no CloudEvent, and the answer says so."""
    status, body = await post(client, GOOD, {**JSON, "ce-type": "invalidate"})

    assert (status, body["error"]["field"]) == (422, "ce-specversion")


async def test_a_newer_schema_is_accepted_and_held(
    client: aiohttp.ClientSession, fake_node: FakeNode
) -> None:
    """E3: a newer service may publish through an older node."""
    newer = cloud_event("a", type="dev.forebay.cache.invalidate.v2")
    message = to_structured(newer, JSONFormat())
    status, body = await post(client, message.body, dict(message.headers))

    assert (status, body["accepted"][0]["held"]) == (202, True)
    assert len(fake_node.published) == 1


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (Backpressure("events", 10, 10), 429, "backpressure"),
        (Disconnected("connection refused by 10.0.0.7:6379"), 503, "unavailable"),
        (BreakerOpen("link", 1_500), 503, "unavailable"),
        (TimedOut(1_000), 503, "outcome_unknown"),
    ],
)
async def test_what_may_work_later_says_when(
    client: aiohttp.ClientSession, fake_node: FakeNode, failure: Exception, status: int, code: str
) -> None:
    """Retry-After is whole seconds, not the same for all, and never below the breaker's time."""
    fake_node.failure = failure
    waits = set()
    for _ in range(20):
        async with client.post(PATH, data=GOOD, headers=JSON) as response:
            body = await response.text()
            waits.add(int(response.headers["Retry-After"]))
            assert response.status == status

    assert msgspec.json.decode(body)["error"]["code"] == code
    assert "10.0.0.7" not in body
    assert len(waits) > 1
    assert min(waits) >= (2 if isinstance(failure, BreakerOpen) else 1)


@pytest.mark.parametrize("failure", [Fenced("events", 1, 2), ZeroDivisionError("secret")])
async def test_a_fault_of_the_node_tells_nothing(
    client: aiohttp.ClientSession, fake_node: FakeNode, failure: Exception
) -> None:
    """S3: an unexpected error is a 500 without a word of it."""
    fake_node.failure = failure
    status, body = await post(client, GOOD)

    assert (status, body["error"]["code"]) == (500, "internal")
    assert "secret" not in str(body)
    assert "epoch" not in str(body)
