"""GET /v1/explain/{key}: why a read of this key hits or misses, on every node that runs.

    200  the document of nodes/explain as JSON; as text with ?words, or Accept: text/plain
    400  the key is not valid    429  too many ask this node    503  Valkey is needed and away

The key stands in the path as it does for GET /v1/cache/{key}.
"""

from __future__ import annotations

from aiohttp import web

from ...schemas.keys import check_key
from ..explain.renderer import words
from .cache import key_in
from .context import CONTEXT
from .error_responses import answer

__all__ = ["PREFIX", "explain"]

PREFIX = "/v1/explain/"


async def explain(request: web.Request) -> web.StreamResponse:
    key = check_key(key_in(request, PREFIX))
    document = await request.app[CONTEXT].served.explain(key)
    if _wants_words(request):
        return web.Response(text="\n".join(words(document)) + "\n")
    return answer(document)


def _wants_words(request: web.Request) -> bool:
    accepted = request.headers.get("Accept", "")
    return "words" in request.query or accepted.split(";")[0].strip() == "text/plain"
