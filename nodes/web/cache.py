"""GET /v1/cache/{key}: a value through this node's cache, for programs in any language.

GET /v1/cache?key=A&key=B: many keys at once, each with the status of its own.

    200  the value as JSON, with X-Forebay-Tier, -Age-Ms, -Stale and -Version
    404  no_cache: no cache of this node declares the key;  absent: the source has no such value
    406  no_json: the value is more than JSON can hold: NaN, or keys that are not strings
    400  the key is not valid    504  its loader failed    503  Valkey is needed and away

The key stands in the path percent-encoded once, so ``a%3Ab`` inside a key is ``a%253Ab`` here.
In the query too: there ``+`` is a plus. An answer has at most ``KEYS_MAX`` keys, and about
``BYTES_MAX`` of values: keys beyond get 413, and can be asked for by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from urllib.parse import unquote

import msgspec
from aiohttp import web

from ...schemas.errors import ForebayError, InvalidKey
from ...schemas.keys import check_key
from .context import CONTEXT, Context
from .error_responses import answer, of_error, refuse
from .openapi import ReadKey, ReadKeys, Refusal
from .protocols import Read

__all__ = ["BYTES_MAX", "KEYS_MAX", "MANY", "PREFIX", "key_in", "read", "read_many"]

MANY = "/v1/cache"
PREFIX = "/v1/cache/"
KEYS_MAX = 200
BYTES_MAX = 8_388_608


async def read(request: web.Request) -> web.StreamResponse:
    key = check_key(key_in(request, PREFIX))
    found = await request.app[CONTEXT].served.read(key)
    if found is None or found.negative:
        return _nothing(found)
    return web.Response(body=found.json, content_type="application/json", headers=_headers(found))


async def read_many(request: web.Request) -> web.StreamResponse:
    keys = [check_key(key) for key in _keys_in(request.rel_url.raw_query_string)]
    if not 0 < len(keys) <= KEYS_MAX:
        problem, fix = f"the query names {len(keys)} keys", f"write ?key=A&key=B, 1 to {KEYS_MAX}"
        return refuse(400, "wrong_field", problem, field="key", fix=fix)
    context = request.app[CONTEXT]
    found = await context.served.read_many(keys)
    return answer(ReadKeys(keys=list(_entries(context, keys, found))))


def key_in(request: web.Request, prefix: str) -> str:
    """The key at the end of the path, decoded once."""
    # aiohttp's own match leaves bytes that are not UTF-8 as they are: two spellings of one key.
    return _decoded(request.rel_url.raw_path.removeprefix(prefix))


def _keys_in(query: str) -> Iterator[str]:
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
            yield _error_of(key, _refused(context, each))
        elif len(each.json) > left:
            context.served.instruments.counts["limit_reached", "http_read_bytes"] += 1
            problem, fix = "the values before fill the answer", "ask for fewer keys at once"
            yield _error_of(key, refuse(413, "too_large", problem, field="key", fix=fix))
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


def _refused(context: Context, found: Read | ForebayError | None) -> web.Response:
    if isinstance(found, ForebayError):
        told = of_error(found, context.random)
        return told or refuse(500, "internal", "this node failed", fix="its log says why")
    return _nothing(found)


def _error_of(key: str, refused: web.Response) -> ReadKey:
    """The body of the answer that this key alone would get."""
    assert isinstance(refused.body, bytes)
    fault = msgspec.json.decode(refused.body, type=Refusal).error
    return ReadKey(key=key, status=refused.status, error=fault)


def _nothing(found: Read | None) -> web.Response:
    if found is None:
        problem = "no cache of this node declares this key"
        return refuse(404, "no_cache", problem, field="key", fix="ask a node that has its cache")
    problem, fix = "the source has no such value", "when it has it, invalidate the key"
    return refuse(404, "absent", problem, field="key", fix=fix, headers=_headers(found))


def _headers(found: Read) -> dict[str, str]:
    age = {} if found.age_ms is None else {"X-Forebay-Age-Ms": str(found.age_ms)}
    return {
        "X-Forebay-Tier": found.tier,
        **age,
        "X-Forebay-Stale": "true" if found.stale else "false",
        "X-Forebay-Version": str(found.version),
    }
