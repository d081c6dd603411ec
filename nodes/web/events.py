"""POST /v1/events: events over HTTP, bare or as CloudEvents 1.0.

    application/json                    one bare event or CloudEvent, or an array of them
    application/cloudevents+json        one CloudEvent
    application/cloudevents-batch+json  an array of CloudEvents
    any JSON type and ``ce-`` headers   one CloudEvent in binary mode: the body is its data

E1  All events are read, and checked as by ``node.publish``, before the first is published: one
    that can never be applied refuses them all, and the answer names its place in the array.
E2  The stream gets the bytes that were sent; in binary mode, the structured form of them.
E3  A newer schema than this node's is accepted, and marked ``held``: it waits in the stream
    for a node that can read it, as it would had it come by XADD.
E4  A browser's page cannot get here: these types make it ask first, and the answer is 405.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

import msgspec
from aiohttp import web

from ...schemas.errors import InvalidEvent
from ...schemas.events import NewerSchema, read_event
from .error_responses import answer, refuse
from .protocols import CONTEXT, Context

__all__ = ["post_events", "read_bodies"]

_STRUCTURED = "application/cloudevents+json"
_BATCH = "application/cloudevents-batch+json"
_JSON = re.compile(r"(application|text)/([a-z0-9!#$&^_.-]+\+)?json")
_ATTRIBUTE = re.compile(r"[a-z0-9]{1,64}")
_UNDECODABLE = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError, MemoryError)
_arrays = msgspec.json.Decoder(list[msgspec.Raw])
_any_json = msgspec.json.Decoder(msgspec.Raw)


async def post_events(request: web.Request) -> web.StreamResponse:
    context = request.app[CONTEXT]
    if (refused := _refused_type(request)) is not None:
        return refused
    body = await context.read_body(request)
    if isinstance(body, web.Response):
        return body
    events, is_array = read_bodies(request, body)
    if len(events) > context.http.batch_events_max:
        problem = f"{len(events)} events, {context.http.batch_events_max} are allowed"
        return refuse(413, "too_many_events", problem, fix="send them in smaller batches")
    held = [
        _is_newer(raw, context.event_bytes_max, f"[{index}]" if is_array else "")
        for index, raw in enumerate(events)
    ]
    ids = await _published(context, events, is_array) if events else []
    accepted = [
        {"id": each, "level": "accepted"} | ({"held": True} if newer else {})
        for each, newer in zip(ids, held, strict=True)
    ]
    return answer({"accepted": accepted}, status=202)


async def _published(context: Context, events: Sequence[bytes], is_array: bool) -> Sequence[str]:
    try:
        return await context.served.publish(events)
    except InvalidEvent as error:
        field = error.field.removeprefix("events")
        if not is_array:
            field = field.removeprefix("[0]").removeprefix(".")
        raise InvalidEvent(error.fault, error.problem, field=field, fix=error.fix) from error


def read_bodies(request: web.Request, body: bytes) -> tuple[Sequence[bytes], bool]:
    """The events of a request as they go into the stream, and whether they came as an array.

    Raises:
        InvalidEvent: the body is no JSON, or an attribute in the headers is wrong.
    """
    if "cloudevents" not in request.content_type and _is_binary(request):
        return [_structured(request, body)], False
    if request.content_type == _BATCH or (
        request.content_type != _STRUCTURED and body.lstrip()[:1] == b"["
    ):
        return [bytes(each) for each in _decoded(_arrays, body)], True
    return [body], False


def _refused_type(request: web.Request) -> web.Response | None:
    kind, charset = request.content_type, (request.charset or "utf-8").lower()
    known = kind in (_STRUCTURED, _BATCH) or (
        "cloudevents" not in kind
        and (_JSON.fullmatch(kind) if _is_binary(request) else kind == "application/json")
    )
    if known and charset in ("utf-8", "utf8", "us-ascii"):
        return None
    return refuse(
        415,
        "media_type",
        f"events of the type {request.headers.get('Content-Type', '')[:80]!r} are not taken",
        field="Content-Type",
        fix=f"send application/json, {_STRUCTURED} or {_BATCH}, in UTF-8",
    )


def _is_binary(request: web.Request) -> bool:
    return "ce-specversion" in request.headers or "ce-type" in request.headers


def _structured(request: web.Request, body: bytes) -> bytes:
    """The structured form of a CloudEvent in binary mode."""
    event: dict[str, object] = {}
    for header, value in request.headers.items():
        name = header.lower()
        if not name.startswith("ce-"):
            continue
        attribute = name.removeprefix("ce-")
        if attribute in event or attribute == "data" or not _ATTRIBUTE.fullmatch(attribute):
            raise InvalidEvent("wrong_field", "is there twice, or no attribute", field=name[:80])
        event[attribute] = _attribute(name, value)
    if "specversion" not in event:
        raise InvalidEvent("wrong_field", "is missing", field="ce-specversion", fix="send 1.0")
    event["datacontenttype"] = request.content_type
    if body:
        event["data"] = _decoded(_any_json, body)
    return msgspec.json.encode(event)


def _attribute(name: str, value: str) -> str:
    try:
        text = unquote(value, errors="strict")
        text.encode()
    except UnicodeError:
        raise InvalidEvent("wrong_field", "is not valid UTF-8", field=name[:80]) from None
    return text


def _decoded(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise InvalidEvent("wrong_field", str(error), fix="send an array of events") from error
    except _UNDECODABLE as error:
        raise InvalidEvent("undecodable", f"not JSON: {error}") from error


def _is_newer(raw: bytes, bytes_max: int, place: str) -> bool:
    try:
        read_event(raw, bytes_max=bytes_max)
    except NewerSchema:
        return True
    except InvalidEvent as error:
        if not place:
            raise
        field = ".".join(filter(None, (place, error.field)))
        raise InvalidEvent(error.fault, error.problem, field=field, fix=error.fix) from error
    return False
