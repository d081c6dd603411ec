"""What this node knows of a key: its near copy and why it would be served or not.

Reads memory only, and changes nothing: a look is no hit.
"""

from __future__ import annotations

from typing import Any

from ...coordinator.valkey.backend import AnyLink
from ...schemas.errors import InvalidKey
from ..cache.cache import Cache
from ..cache.core import Core
from ..cache.near import NearEntry
from ..workers.routes import Routes
from .document import NearState, NearVerdict

__all__ = ["judged", "near_state"]

_TAGS_MAX = 20
_NAME_CHARS_MAX = 100


def near_state(
    core: Core, routes: Routes, link: AnyLink, cache_version: str, key: str
) -> NearState:
    """The answer of this node, at most some kilobytes long."""
    cached, sink = routes.cache_of(key), routes.sink_of(key)
    return NearState(
        node=core.node_id,
        cache_version=cache_version,
        sink=sink[0].name[:_NAME_CHARS_MAX] if sink else "",
        connected=link.connected,
        breaker=link.breaker.state,
        **({"state": "no_cache"} if cached is None else _of_cache(core, cached, key)),
    )


def _of_cache(core: Core, cached: Cache[Any], key: str) -> dict[str, Any]:
    path = cached.path
    entry = path.near.peek(key)
    found: dict[str, Any] = {} if entry is None else _of_entry(core, entry)
    state, tag = (
        ("absent", "") if entry is None else judged(entry, core.clock.monotonic(), path.loads.live)
    )
    return {
        "state": state,
        "tag": tag,
        "cache": cached.name[:_NAME_CHARS_MAX],
        "template": cached.template.text,
        "ttl_ms": path.policy.ttl_ms,
        "stale_ms": path.policy.stale_ms,
        "on_disconnected": path.policy.on_disconnected,
        "loader": path.loads.source.breaker.state,
        "declared_tags": _declared_tags(core, cached, key),
        "reserved": path.near.reserved(key),
        "loading": key in path.flights,
        **found,
    }


def _declared_tags(core: Core, cached: Cache[Any], key: str) -> tuple[str, ...]:
    """Those of its own, and of what it depends on."""
    try:
        tags, keys = cached.labels_of(key)
    except InvalidKey:
        return ()  # it fits the template, and no call makes it
    return tuple([*tags, *core.behind(keys)][:_TAGS_MAX])


def _of_entry(core: Core, entry: NearEntry) -> dict[str, Any]:
    now = core.clock.monotonic()
    return {
        "version": entry.version,
        "age_ms": entry.age_ms(now),
        "left_ms": int((entry.soft_until - now) * 1000),
        "size": entry.size,
    }


def judged(entry: NearEntry, now: float, live: bool) -> tuple[NearVerdict, str]:
    """Why the copy would be served now, or not, by the rules of ``NearCache.get``; and the tag
    that speaks against it.
    """
    if entry.generation != entry.view.generation:
        return "reset", ""
    for state, version in entry.tags:
        if state.version > version:
            return ("behind" if state.known else "unknown_tag"), state.tag
    if now >= entry.soft_until:
        return "past", ""
    return ("fresh" if live else "not_current"), ""
