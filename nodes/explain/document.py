"""What there is to know about one key: the document that is collected, sent, and put into words.

X1  It never holds a value, nor anything of one but its size.
X2  It is bounded: ``TAGS_SHOWN_MAX`` tags, ``NOTICES_SHOWN_MAX`` notices, one line per node.

Ages and lifetimes are in milliseconds, by the server's clock, or by a node's own for its near
copy. What is not known is None, or an empty text. Fields may be added.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

__all__ = [
    "NOTICES_SHOWN_MAX",
    "TAGS_SHOWN_MAX",
    "EntryState",
    "Explanation",
    "LeaseState",
    "LogState",
    "NearState",
    "NodesState",
    "NoticeKind",
    "NoticeLine",
    "TagState",
]

TAGS_SHOWN_MAX = 100
NOTICES_SHOWN_MAX = 10

NearVerdict = Literal[
    "no_cache", "absent", "fresh", "past", "behind", "unknown_tag", "not_current", "reset"
]
TagVerdict = Literal["holds", "stale", "invalid", "lost"]
EntryVerdict = Literal[
    "absent", "unreadable", "fresh", "stale", "kept", "expired", "outdated", "doomed"
]
NoticeKind = Literal["changed", "dropped", "bumped", "extended"]
LeaseVerdict = Literal["free", "held", "failing"]


class NearState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one node says of its own part. ``state`` tells why its near copy is served, or not."""

    node: str
    state: NearVerdict
    cache: str = ""
    template: str = ""
    ttl_ms: int = 0
    stale_ms: int = 0
    on_disconnected: str = ""
    cache_version: str = "0"
    sink: str = ""
    declared_tags: tuple[str, ...] = ()  #: those of the template, for this key
    tag: str = ""  #: that the copy is behind on, or of which no version is known
    version: int = 0
    age_ms: int | None = 0  #: None: unknown
    left_ms: int = 0  #: of its fresh time; negative: since when that is over
    size: int = 0
    reserved: int = 0  #: reads or writes under way whose result may be kept
    loading: bool = False
    connected: bool = True
    breaker: str = "closed"  #: of the connection
    loader: str = "closed"  #: of the cache's loader


class NodesState(Struct, frozen=True, kw_only=True):
    """Who was asked. ``unasked`` says why nobody was."""

    answers: tuple[NearState, ...] = ()
    silent: int = 0  #: nodes that did not answer in time
    unasked: str = ""


class TagState(Struct, frozen=True, kw_only=True):
    tag: str
    embedded: int
    version: int | None  #: None: lost, so that a new one will be drawn
    hard_version: int | None
    state: TagVerdict


class EntryState(Struct, frozen=True, kw_only=True):
    """The entry in the shared tier, and what a reader would make of it."""

    state: EntryVerdict = "absent"
    why: str = ""  #: it cannot be read
    negative: bool = False
    version: int = 0
    age_ms: int | None = None
    error_ms: int = 0  #: the end of that, when only a failing loader makes it be served
    fresh_ms: int | None = None  #: left; negative: since when that is over; None: for ever
    left_ms: int | None = None  #: until it may not be served at all
    kept_ms: int | None = None  #: until the server forgets it
    soft_dropped: bool = False  #: made stale by an invalidation
    size: int = 0
    codec: str = ""
    pending: int = 0  #: version of a write-behind under way
    doomed: bool = False
    tags: tuple[TagState, ...] = ()
    tags_omitted: int = 0


class LeaseState(Struct, frozen=True, kw_only=True):
    state: LeaseVerdict = "free"
    left_ms: int = 0
    token: str = ""


class NoticeLine(Struct, frozen=True, kw_only=True):
    """One change in a shard's log. ``about``: the key, or the tags of it that are meant."""

    shard: int
    id: str
    version: int
    age_ms: int
    kind: NoticeKind
    about: tuple[str, ...]
    soft: bool = False
    origin: str = ""


class LogState(Struct, frozen=True, kw_only=True):
    notices: tuple[NoticeLine, ...] = ()  #: newest first
    looked_at: int = 0  #: entries of the logs that were read for them
    more: bool = False  #: the logs hold older entries, which were not read
    refused: tuple[str, ...] = ()  #: what the server said of logs that it does not read


class Explanation(Struct, frozen=True, kw_only=True):
    verdict: str = ""
    key: str
    namespace: str
    shard: int
    shards: int
    cache_version: str
    server: str
    entry: EntryState
    lease: LeaseState
    log: LogState
    nodes: NodesState
