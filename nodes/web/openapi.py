"""GET /openapi.json: the API of this node as an OpenAPI 3.1 document.

O1  It lists exactly the routes of this node. Its schemas are generated from the types that the
    handlers decode and encode, so that they cannot differ.
O2  Every error response has the schema ``ErrorResponse``, and a stable ``code``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec
from msgspec import Struct

from ...schemas.events import Invalidate, Refresh, Write
from ...schemas.limits import Verdict
from ..explain.document import Explanation
from .coordination import (
    Acquire,
    Granted,
    Release,
    Released,
    Renew,
    Reserve,
    Reserved,
    Settle,
    Settled,
    ShownLimits,
    ShownLock,
    ShownLocks,
    Take,
)
from .health import ROUTES

Schema = dict[str, Any]
JSON, CLOUD_EVENT, CLOUD_EVENTS = (
    "application/json",
    "application/cloudevents+json",
    "application/cloudevents-batch+json",
)
FREE = ROUTES | {"/metrics"}  #: answered under any Host
_REF = "#/components/schemas/{name}"


class Fault(Struct, frozen=True, kw_only=True):
    code: str  #: stable, for programs
    problem: str
    field: str
    fix: str


class ErrorResponse(Struct, frozen=True, kw_only=True):
    """An error response: the error, and details of its lock or limit."""

    error: Fault
    holder: str = ""  #: the node that holds the lock, if known
    waited_ms: int = 0  #: time spent waiting for the lock
    verdict: Verdict | None = None  #: the decision of the limit that refused


class Accepted(Struct, frozen=True, kw_only=True):
    id: str  #: id of the stream entry
    level: Literal["accepted"]
    held: bool = False  #: held for a node that knows this newer type


class Published(Struct, frozen=True, kw_only=True):
    accepted: list[Accepted]


class ReadKey(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One key: a value with status 200, or an error."""

    key: str
    status: int  #: the status of ``GET /v1/cache/{key}``
    value: msgspec.Raw | None = None
    tier: str = ""
    age_ms: int | None = None
    stale: bool | None = None
    version: int | None = None
    error: Fault | None = None


class ReadKeys(Struct, frozen=True, kw_only=True):
    keys: list[ReadKey]  #: in the order of the request


class Shape(Struct, frozen=True, kw_only=True):
    """Request and response types of a route."""

    name: str
    asks: type | None = None
    answers: type | None = None
    status: int = 200
    refusals: tuple[int, ...] = ()
    query: tuple[str, ...] = ()


_LOCK_FAULTS = (400, 408, 413, 415, 503)
_LIMIT_FAULTS = (400, 404, 408, 413, 415, 503)
SHAPES: Mapping[tuple[str, str], Shape] = {
    ("POST", "/v1/events"): Shape(
        name="publish",
        answers=Published,
        status=202,
        refusals=(400, 408, 413, 415, 422, 429, 503),
    ),
    ("GET", "/v1/cache"): Shape(name="readMany", answers=ReadKeys, refusals=(400,), query=("key",)),
    ("GET", "/v1/cache/{key}"): Shape(name="read", refusals=(400, 404, 503, 504)),
    ("GET", "/v1/explain/{key}"): Shape(
        name="explain", answers=Explanation, refusals=(400, 429, 503), query=("words",)
    ),
    ("GET", "/v1/locks"): Shape(name="listLocks", answers=ShownLocks, refusals=(503,)),
    ("GET", "/v1/locks/{name}"): Shape(name="showLock", answers=ShownLock, refusals=(400, 503)),
    ("POST", "/v1/locks/{name}"): Shape(
        name="acquireLock", asks=Acquire, answers=Granted, refusals=(*_LOCK_FAULTS, 423, 429)
    ),
    ("POST", "/v1/locks/{name}/renew"): Shape(
        name="renewLock", asks=Renew, answers=Granted, refusals=(*_LOCK_FAULTS, 409)
    ),
    ("DELETE", "/v1/locks/{name}"): Shape(
        name="releaseLock",
        asks=Release,
        answers=Released,
        refusals=(*_LOCK_FAULTS, 409),
        query=("nonce",),
    ),
    ("GET", "/v1/limits"): Shape(name="listLimits", answers=ShownLimits, refusals=(503,)),
    ("POST", "/v1/limits/{name}/take"): Shape(
        name="take", asks=Take, answers=Verdict, refusals=(*_LIMIT_FAULTS, 429)
    ),
    ("POST", "/v1/limits/{name}/reserve"): Shape(
        name="reserve", asks=Reserve, answers=Reserved, refusals=(*_LIMIT_FAULTS, 429)
    ),
    ("POST", "/v1/limits/{name}/settle"): Shape(
        name="settle", asks=Settle, answers=Settled, refusals=_LIMIT_FAULTS
    ),
}
_EVENTS: Mapping[str, type] = {"invalidate": Invalidate, "write": Write, "refresh": Refresh}
_REASONS = {
    400: "the request is invalid; ``field`` names the field",
    401: "the bearer token is missing or wrong",
    404: "not found",
    408: "the body was sent too slowly",
    409: "this nonce does not hold the lock",
    413: "the body is too large",
    415: "the content type is not supported",
    421: "the name in Host is not one of this node",
    422: "the event can never be applied",
    423: "another holder has the lock",
    429: "too many requests; see Retry-After",
    503: "Valkey is unavailable, or the node is busy; see Retry-After",
    504: "the loader failed",
}


def document(
    routes: Iterable[tuple[str, str, str]], *, version: str, guarded: bool
) -> dict[str, Any]:
    """The document of these routes, each given as method, path and purpose.

    ``guarded``: the endpoint requires a token.
    """
    types = {each for s in SHAPES.values() for each in (s.asks, s.answers) if each}
    _, schemas = msgspec.json.schema_components(
        [*sorted(types, key=lambda each: each.__name__), *_EVENTS.values(), ErrorResponse],
        ref_template=_REF,
    )
    paths: dict[str, Schema] = {}
    for method, path, purpose in routes:
        shape = SHAPES.get((method, path)) or Shape(name=_plain_name(path))
        operation = _operation(method, path, purpose, shape, guarded=guarded)
        paths.setdefault(path, {})[method.lower()] = operation
    components: Schema = {"schemas": {**schemas, "Event": _event(), "CloudEvent": _cloud_event()}}
    if guarded:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Forebay", "version": version},
        "paths": paths,
        "components": components,
    }


def _operation(method: str, path: str, purpose: str, shape: Shape, *, guarded: bool) -> Schema:
    refusals = {*shape.refusals, *(() if path in FREE else (400, 421, 503))}
    made: Schema = {"operationId": shape.name, "summary": purpose}
    if guarded and path.startswith("/v1/"):
        refusals.add(401)
        made["security"] = [{"bearer": []}]
    if parameters := [*_in_path(path), *map(_in_query, shape.query)]:
        made["parameters"] = parameters
    if (body := _body(shape)) is not None:
        made["requestBody"] = body
    made["responses"] = {
        str(shape.status): _answer(shape.answers),
        **{str(status): _refused(status) for status in sorted(refusals)},
    }
    return made


def _body(shape: Shape) -> Schema | None:
    if shape.name == "publish":
        content = {
            JSON: {"schema": _one_or_many(_ref("Event"), _ref("CloudEvent"))},
            CLOUD_EVENT: {"schema": _ref("CloudEvent")},
            CLOUD_EVENTS: {"schema": {"type": "array", "items": _ref("CloudEvent")}},
        }
        return {"required": True, "content": content}
    if shape.asks is None:
        return None
    content = {JSON: {"schema": _ref(shape.asks.__name__)}}
    return {"required": not shape.query, "content": content}


def _answer(answers: type | None) -> Schema:
    schema = _ref(answers.__name__) if answers else {}
    return {"description": "done", "content": {JSON if answers else "*/*": {"schema": schema}}}


def _refused(status: int) -> Schema:
    return {"description": _REASONS[status], "content": {JSON: {"schema": _ref("ErrorResponse")}}}


def _in_path(path: str) -> list[Schema]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", path)
    ]


def _in_query(name: str) -> Schema:
    return {"name": name, "in": "query", "required": False, "schema": {"type": "string"}}


def _ref(name: str) -> Schema:
    return {"$ref": _REF.format(name=name)}


def _one_or_many(*schemas: Schema) -> Schema:
    one = {"anyOf": list(schemas)}
    return {"anyOf": [*schemas, {"type": "array", "items": one}]}


def _event() -> Schema:
    """An event outside a CloudEvents envelope: its short type, and the fields of that type."""
    return {
        "anyOf": [
            {
                "allOf": [_ref(kind.__name__)],
                "type": "object",
                "required": ["type"],
                "properties": {"type": {"const": name}, "id": {"type": "string"}},
            }
            for name, kind in _EVENTS.items()
        ]
    }


def _cloud_event() -> Schema:
    text = {"type": "string", "minLength": 1}
    known = "|".join(_EVENTS)
    return {
        "type": "object",
        "required": ["specversion", "id", "source", "type"],
        "properties": {
            "specversion": {"const": "1.0"},
            "id": text,
            "source": text,
            "type": {"type": "string", "examples": [f"dev.forebay.cache.({known}).v1"]},
            "data": {"anyOf": [_ref(kind.__name__) for kind in _EVENTS.values()]},
        },
    }


def _plain_name(path: str) -> str:
    first, *rest = (str(word) for word in re.findall(r"\w+", path))
    return first + "".join(word.title() for word in rest)
