"""/stats: one JSON object about this node, for people and for scripts.

    instance, namespace  text
    version, uptime_s    of the program; seconds since the node started
    backend, connection  which server, why that one; state of the connection, in flight
    keys, memory, backlog, dead_letters
                         what only the server knows: null while it does not answer, and
                         ``unavailable`` says why; keys of another type are left out, and
                         named there
    namespace_keys       of those keys, the ones of the namespace; an estimate in a large database,
                         null where they cannot be counted
    log                  how far the node follows the shard logs
    caches               {name: {"entries": n, "bytes": n, "evictions": n, "loading": n, ...}}
    workers              shards owned, dead letters, sinks; null on a node without workers
    counters             every counter above zero, by name and labels

Fields may be added; one that is there keeps its name and its meaning. ``instance`` and
``namespace`` are put here, all others are the node's.
"""

from __future__ import annotations

from aiohttp import web

from .context import CONTEXT
from .error_responses import answer

__all__ = ["stats"]


async def stats(request: web.Request) -> web.StreamResponse:
    served = request.app[CONTEXT].served
    always = {"instance": served.instance, "namespace": served.namespace}
    return answer({**always, **await served.stats()})
