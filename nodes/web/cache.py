"""Reads over HTTP: GET /v1/cache and GET /v1/explain, for programs in any language.

GET /v1/cache/{key}: a value through this node's cache.
GET /v1/cache?key=A&key=B: many keys at once, each with a status of its own.

    200  the value as JSON, with X-Forebay-Tier, -Age-Ms, -Stale and -Version
    404  no_cache: no cache of this node declares the key;  absent: the source has no such value
    406  no_json: JSON cannot hold the value: NaN, or keys that are not strings
    400  the key is not valid    504  its loader failed    503  Valkey is needed and unavailable

GET /v1/explain/{key}: why a read of this key hits or misses, on every running node.

    200  the document of nodes/explain as JSON; as text with ?words, or Accept: text/plain
    400  the key is not valid    429  too many requests for this node    503  as above

The key stands in the path percent-encoded once, so ``a%3Ab`` inside a key is ``a%253Ab`` here.
The same holds in the query: there ``+`` is a plus. An answer has at most ``KEYS_MAX`` keys, and
about ``BYTES_MAX`` of values: further keys get 413, and can be requested on their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from urllib.parse import unquote

import msgspec
from aiohttp import web

from ...schemas.errors import ForebayError, InvalidKey
from ...schemas.keys import check_key
from ..explain.renderer import words
from .error_responses import answer, of_error, refuse
from .openapi import ErrorResponse, ReadKey, ReadKeys
from .protocols import CONTEXT, Context, Read

READ_MANY = "/v1/cache"
READ_PREFIX = "/v1/cache/"
EXPLAIN_PREFIX = "/v1/explain/"
KEYS_MAX = 200
BYTES_MAX = 8_388_608


async def read_one(request: web.Request) -> web.StreamResponse:
    key = check_key(key_in_path(request, READ_PREFIX))
    found = await request.app[CONTEXT].served.read(key)
    if found is None or found.negative:
        return _not_found(found)
    return web.Response(body=found.json, content_type="application/json", headers=_headers(found))


async def read_many(request: web.Request) -> web.StreamResponse:
    keys = [check_key(key) for key in _keys_in_query(request.rel_url.raw_query_string)]
    if not 0 < len(keys) <= KEYS_MAX:
        problem, fix = f"the query names {len(keys)} keys", f"write ?key=A&key=B, 1 to {KEYS_MAX}"
        return refuse(400, "wrong_field", problem, field="key", fix=fix)
    context = request.app[CONTEXT]
    found = await context.served.read_many(keys)
    return answer(ReadKeys(keys=list(_entries(context, keys, found))))


async def explain(request: web.Request) -> web.StreamResponse:
    key = check_key(key_in_path(request, EXPLAIN_PREFIX))
    document = await request.app[CONTEXT].served.explain(key)
    accepted = request.headers.get("Accept", "").split(";")[0].strip()
    if "words" in request.query or accepted == "text/plain":
        return web.Response(text="\n".join(words(document)) + "\n")
    return answer(document)


def key_in_path(request: web.Request, prefix: str) -> str:
    """The key at the end of the path, decoded once."""
    # The match of aiohttp keeps bytes that are not UTF-8: one key would have two spellings.
    return _decoded(request.rel_url.raw_path.removeprefix(prefix))


def _keys_in_query(query: str) -> Iterator[str]:
    for part in query.split("&"):
        name, is_given, raw = part.partition("=")
        if name == "key" and is_given:
            yield _decoded(raw)


def _decoded(raw: str) -> str:
    try:
        return unquote(raw, errors="strict")
    except UnicodeDecodeError:
        raise InvalidKey("key", raw, "is not valid UTF-8") from None


def _entries(
    context: Context, keys: Sequence[str], found: Sequence[Read | ForebayError | None]
) -> Iterator[ReadKey]:
    left = BYTES_MAX
    for key, each in zip(keys, found, strict=True):
        if not isinstance(each, Read) or each.negative:
            yield _error_entry(key, _refusal_of(context, each))
        elif len(each.json) > left:
            context.instruments.counts["limit_reached", "http_read_bytes"] += 1
            problem, fix = "the values before it fill the answer", "request fewer keys at once"
            yield _error_entry(key, refuse(413, "too_large", problem, field="key", fix=fix))
        else:
            left -= len(each.json)
            yield ReadKey(
                key=key,
                status=200,
                value=msgspec.Raw(each.json),
                tier=each.tier,
                age_ms=each.age_ms,
                stale=each.stale,
                version=each.version,
            )


def _refusal_of(context: Context, found: Read | ForebayError | None) -> web.Response:
    if isinstance(found, ForebayError):
        response = of_error(found, context.random)
        return response or refuse(500, "internal", "this node failed", fix="its log says why")
    return _not_found(found)


def _error_entry(key: str, refused: web.Response) -> ReadKey:
    """The body of the answer that this key alone would get."""
    assert isinstance(refused.body, bytes)
    fault = msgspec.json.decode(refused.body, type=ErrorResponse).error
    return ReadKey(key=key, status=refused.status, error=fault)


def _not_found(found: Read | None) -> web.Response:
    if found is None:
        problem = "no cache of this node declares this key"
        fix = "send the request to a node that declares its cache"
        return refuse(404, "no_cache", problem, field="key", fix=fix)
    problem, fix = "the source has no such value", "invalidate the key once the source has it"
    return refuse(404, "absent", problem, field="key", fix=fix, headers=_headers(found))


def _headers(found: Read) -> dict[str, str]:
    age = {} if found.age_ms is None else {"X-Forebay-Age-Ms": str(found.age_ms)}
    return {
        "X-Forebay-Tier": found.tier,
        **age,
        "X-Forebay-Stale": "true" if found.stale else "false",
        "X-Forebay-Version": str(found.version),
    }
