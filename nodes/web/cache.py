"""GET /v1/cache/{key}: a value through this node's cache, for programs in any language.

    200  the value as JSON, with X-Forebay-Tier, -Age-Ms, -Stale and -Version
    404  no_cache: no cache of this node declares the key;  absent: the source has no such value
    406  no_json: the value is more than JSON can hold: NaN, or keys that are not strings
    400  the key is not valid    504  its loader failed    503  Valkey is needed and away

The key stands in the path percent-encoded once, so ``a%3Ab`` inside a key is ``a%253Ab`` here.
"""

from __future__ import annotations

from urllib.parse import unquote

from aiohttp import web

from ...schemas.errors import InvalidKey
from ...schemas.keys import check_key
from .context import CONTEXT
from .face import Read
from .refusals import refuse

__all__ = ["PREFIX", "key_in", "read"]

PREFIX = "/v1/cache/"


async def read(request: web.Request) -> web.StreamResponse:
    key = check_key(key_in(request, PREFIX))
    found = await request.app[CONTEXT].served.read(key)
    if found is None:
        problem = "no cache of this node declares this key"
        return refuse(404, "no_cache", problem, field="key", fix="ask a node that has its cache")
    headers = _headers(found)
    if found.negative:
        problem, fix = "the source has no such value", "when it has it, invalidate the key"
        return refuse(404, "absent", problem, field="key", fix=fix, headers=headers)
    return web.Response(body=found.json, content_type="application/json", headers=headers)


def key_in(request: web.Request, prefix: str) -> str:
    """The key at the end of the path, decoded once."""
    # aiohttp's own match leaves bytes that are not UTF-8 as they are: two spellings of one key.
    raw = request.rel_url.raw_path.removeprefix(prefix)
    try:
        return unquote(raw, errors="strict")
    except UnicodeDecodeError:
        raise InvalidKey("key", raw, "is not valid UTF-8") from None


def _headers(found: Read) -> dict[str, str]:
    age = {} if found.age_ms is None else {"X-Forebay-Age-Ms": str(found.age_ms)}
    return {
        "X-Forebay-Tier": found.tier,
        **age,
        "X-Forebay-Stale": "true" if found.stale else "false",
        "X-Forebay-Version": str(found.version),
    }
