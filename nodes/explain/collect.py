"""Collecting what there is to know about a key: from the server, and from all nodes that run.

C1  Nothing is changed: no lease is taken, no tag made, nobody's copy counts as read.
C2  What is read is bounded: one entry of at most the allowed size, the values of its tags, and
    at most ``LOOK_BACK`` entries of each log, of at most ``LOGS_MAX`` logs.
C3  Without a node that runs, or a way to hear one, the shared part is told all the same.
C4  A key of another type is named in its part; the others are told all the same.

The parts are read one after the other, so that they may differ by what happened meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog
from msgspec import Struct, structs

from ...coordinator.valkey.backend import Backend
from ...coordinator.valkey.link import Commands, Reply
from ...coordinator.valkey.scripting import ask_many, granted
from ...schemas.entry import Entry
from ...schemas.errors import ForebayError, InvalidEntry, ServerRefused
from ...schemas.keys import Names
from ...schemas.replies import SHARDS_MAX, digits, field_map, integer
from .document import (
    NOTICES_SHOWN_MAX,
    EntryState,
    Explanation,
    LeaseState,
    LogState,
    NodesState,
    NoticeLine,
)
from .questions import WAIT_S, ask
from .renderer import verdict
from .shared_state import entry_state, lease_state, notice_line, read_stored, tag_state

__all__ = ["LOGS_MAX", "LOOK_BACK", "explain", "names_at"]

log = structlog.get_logger(__name__)

LOOK_BACK = 1_000
LOGS_MAX = 8
_PAGE = 250
_HEADER_MAX = 66 + 65_535  #: of an entry, beside its payload


class _Stored(Struct, frozen=True):
    raw: Reply
    size: int
    kept_ms: int
    lease: LeaseState
    now_ms: int


async def names_at(commands: Commands, names: Names) -> Names:
    """The names as the namespace has them, which was perhaps born with other shards."""
    (born_with,) = await ask_many(commands, [("HGET", names.meta, "shards")])
    if isinstance(born_with, ServerRefused) and born_with.of_type:
        log.warning("meta.refused", error=str(born_with), shards=names.shards)
        return names
    (born_with,) = granted([born_with])
    shards = None if born_with is None else digits(bytes(born_with))
    if shards is None or not 1 <= shards <= SHARDS_MAX:
        return names
    return names.with_shards(shards)


async def explain(
    backend: Backend,
    names: Names,
    key: str,
    *,
    nonce: str,
    bytes_max: int,
    wait_s: float = WAIT_S,
) -> Explanation:
    """Everything about this key; ``bytes_max`` is the largest value that is allowed.

    Raises:
        Unavailable, ServerRefused: the server could not be asked.
    """
    link = backend.link
    nodes = await ask(link, backend.pubsub, names, key, nonce=nonce, wait_s=wait_s)
    stored = await _stored(link, names, key, bytes_max)
    entry, tags = await _entry(link, names, stored, bytes_max)
    document = Explanation(
        key=key,
        namespace=names.namespace,
        shard=names.shard(key),
        shards=names.shards,
        cache_version=names.cache_version,
        server=f"{backend.facts.kind} {backend.facts.version}",
        entry=entry,
        lease=stored.lease,
        log=await _log(link, names, key, _tags_known(tags, nodes), stored.now_ms),
        nodes=nodes,
    )
    return structs.replace(document, verdict=verdict(document))


async def _stored(link: Commands, names: Names, key: str, bytes_max: int) -> _Stored:
    entry, lease = names.entry(key), names.lease(key)
    (length,) = await link.call_many([("STRLEN", entry)])
    size = length if isinstance(length, int) else 0
    raw, kept_ms, token, left_ms, time = await link.call_many(
        [
            ("GET", entry) if size <= bytes_max + _HEADER_MAX else ("ECHO", ""),
            ("PTTL", entry),
            ("GET", lease),
            ("PTTL", lease),
            ("TIME",),
        ]
    )
    if size > bytes_max + _HEADER_MAX:
        raw = InvalidEntry("oversized", f"{size} bytes, {bytes_max} are allowed")
    for reply in (kept_ms, left_ms, time):
        if isinstance(reply, ForebayError):
            raise reply
    now_ms = integer(time[0], "TIME") * 1000 + integer(time[1], "TIME") // 1000
    return _Stored(raw, size, int(kept_ms), lease_state(token, left_ms), now_ms)


async def _entry(
    link: Commands, names: Names, stored: _Stored, bytes_max: int
) -> tuple[EntryState, Sequence[str]]:
    """The state of the entry, and the tags that it carries."""
    found = read_stored(stored.raw, bytes_max)
    if found is None:
        return EntryState(), ()
    if isinstance(found, str):
        return EntryState(state="unreadable", why=found, size=stored.size), ()
    return await _readable(link, names, stored, found), tuple(found.meta.tags)


async def _readable(link: Commands, names: Names, stored: _Stored, entry: Entry) -> EntryState:
    embedded = entry.meta.tags
    values = await link.call_many([("GET", names.tag(tag)) for tag in embedded]) if embedded else []
    return entry_state(
        entry,
        size=stored.size,
        now_ms=stored.now_ms,
        kept_ms=stored.kept_ms,
        tags=[
            tag_state(tag, version, value)
            for (tag, version), value in zip(embedded.items(), values, strict=True)
        ],
    )


def _tags_known(embedded: Sequence[str], nodes: NodesState) -> list[str]:
    """Those of the entry, then what the caches declare: of an entry that is gone, too."""
    declared = [tag for node in nodes.answers for tag in node.declared_tags]
    return [*dict.fromkeys([*embedded, *declared])]


async def _log(
    link: Commands, names: Names, key: str, tags: Sequence[str], now_ms: int
) -> LogState:
    shards = [*dict.fromkeys([names.shard(key), *map(names.shard, tags)])]
    found: list[NoticeLine] = []
    refused: list[str] = []
    looked_at, more = 0, len(shards) > LOGS_MAX
    for shard in shards[:LOGS_MAX]:
        about = [tag for tag in tags if names.shard(tag) == shard]
        part = await _notices(link, names, shard, key, about, now_ms)
        found += part.notices
        refused += part.refused
        looked_at += part.looked_at
        more = more or part.more
    found.sort(key=lambda each: each.version, reverse=True)
    return LogState(
        notices=tuple(found[:NOTICES_SHOWN_MAX]),
        looked_at=looked_at,
        more=more,
        refused=tuple(refused),
    )


async def _notices(
    link: Commands, names: Names, shard: int, key: str, tags: Sequence[str], now_ms: int
) -> LogState:
    """The newest of one log, page by page, until there are enough."""
    found: list[NoticeLine] = []
    looked_at, before = 0, "+"
    while looked_at < LOOK_BACK and len(found) < NOTICES_SHOWN_MAX:
        read = ("XREVRANGE", names.part(shard, "log"), before, "-", "COUNT", _PAGE)
        (page,) = await ask_many(link, [read])
        if isinstance(page, ServerRefused) and page.of_type:
            return LogState(notices=tuple(found), looked_at=looked_at, refused=(str(page),))
        granted([page])
        for raw_id, fields in page:
            named = field_map(fields)
            line = notice_line(shard, raw_id, named, key=key, tags=tags, now_ms=now_ms)
            found += [line] if line else []
        looked_at += len(page)
        if len(page) < _PAGE:
            return LogState(notices=tuple(found), looked_at=looked_at)
        before = f"({bytes(page[-1][0]).decode()}"
    return LogState(notices=tuple(found), looked_at=looked_at, more=True)
