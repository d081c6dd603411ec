"""/stats: one JSON object about this node, for people and for scripts.

These fields are always there, in this form; the node may add others beside them:

    instance, namespace, version   text
    uptime_s                       seconds since the node started
    keys, memory                   of the server: {"entries": n}, {"used_bytes": n}
    connection                     {"state": ..., "address": ..., "in_flight": n, ...}
    caches                         {name: {"hits": n, "misses": n, "entries": n, ...}}
    workers                        {"owned_shards": n, "queue_entries": n, ...}

What is not known now, since Valkey does not answer, is null; the rest is still told.
"""

from __future__ import annotations

from aiohttp import web

from .context import CONTEXT
from .refusals import answer

__all__ = ["stats"]


async def stats(request: web.Request) -> web.StreamResponse:
    served = request.app[CONTEXT].served
    always = {"instance": served.instance, "namespace": served.namespace}
    return answer({**always, **await served.stats()})
