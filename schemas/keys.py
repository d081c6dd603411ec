"""Every name that Forebay uses in Valkey, and the grammar of the keys inside them.

    {shop:07}:head      hash    epoch and newest version of the shard
    {shop:07}:log       stream  notices, ids dense: <epoch>-<seq>
    {shop:07}:e0:KEY    string  entry (0: the cache version, CACHE_VER)
    {shop:07}:l:KEY     string  fill lease: the token of the one who may fill
    {shop:07}:t:TAG     string  tag version
    {shop:07}:i:ID      string  an event id seen lately
    {shop:07}:writes    stream  write-behind jobs         :refreshes  stream  refresh jobs
    {shop:07}:own       hash    owner of the ordered work  :done  hash  its checkpoints
    {shop:07}:dead      stream  dead letters of the shard's writes
    forebay:shop:events stream  ingress; {forebay:shop:events}:own, :done, :dead, :held beside it
    forebay:shop:meta   hash    facts fixed at birth       forebay:shop:nodes  zset  roster
    forebay:shop:bell   channel notices as they happen     forebay:shop:work   channel  new jobs

I1  All names of a shard share one hash tag, so one script may touch them all.
I2  ``shard_of`` is crc32(key) % shards: any language can compute it.
I3  A key never contains what Valkey, a glob or a template reads as more than a letter:
    such a key is refused by ``check_key``; values put into a template are escaped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from urllib.parse import quote, unquote
from zlib import crc32

from .errors import InvalidKey

__all__ = ["EVENTS", "KEY_BYTES_MAX", "KeyTemplate", "Names", "check_key", "shard_of"]

KEY_BYTES_MAX = 512
EVENTS = -1  #: stands for the ingress stream where a shard number is asked for

_FORBIDDEN = re.compile(r"[\x00-\x20\x7f-\x9f{}*?\[\]\\\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_FIELD = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SAFE = "-._~@/"


def check_key(key: str, *, name: str = "key") -> str:
    """The key itself, if the grammar allows it.

    Raises:
        InvalidKey: it is empty, too long, or holds a character that is refused.
    """
    if not key:
        raise InvalidKey(name, key, "is empty")
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise InvalidKey(name, ascii(key), "is not valid Unicode") from None
    if size > KEY_BYTES_MAX:
        raise InvalidKey(name, key, f"has {size} bytes, at most {KEY_BYTES_MAX} are allowed")
    if bad := _FORBIDDEN.search(key):
        raise InvalidKey(name, key, f"holds {bad.group()!a}, which must be percent-encoded")
    return key


def shard_of(key: str, shards: int) -> int:
    """The shard of a key or of a tag."""
    return crc32(key.encode()) % shards


class KeyTemplate:
    """A pattern such as ``product:{id}``: makes keys from values, and values from keys.

    A value is escaped so that it never looks like the literal parts; ``:`` is escaped too.
    """

    __slots__ = ("_literals", "_pattern", "fields", "text")

    def __init__(self, text: str) -> None:
        literals, fields = _FIELD.split(text)[::2], _FIELD.findall(text)
        if len(set(fields)) != len(fields):
            raise InvalidKey("key template", text, "names a field twice")
        check_key("".join(literals) or "x", name="key template")
        if any(not part for part in literals[1:-1]):
            raise InvalidKey("key template", text, "has two fields with nothing between them")
        self.text = text
        self.fields = tuple(fields)
        self._literals = tuple(literals)
        groups = [re.escape(literals[0])]
        for field, literal in zip(fields, literals[1:], strict=True):
            groups += [f"(?P<{field}>[^:]+)", re.escape(literal)]
        self._pattern = re.compile("".join(groups))

    def __repr__(self) -> str:
        return f"KeyTemplate({self.text!r})"

    def format(self, values: Mapping[str, object]) -> str:
        """The key of these values.

        Raises:
            InvalidKey: a value is missing, None, bytes or empty, or the key is too long.
        """
        parts = [self._literals[0]]
        for field, literal in zip(self.fields, self._literals[1:], strict=True):
            parts += [_escaped(field, values.get(field)), literal]
        key = "".join(parts)
        if len(key) > KEY_BYTES_MAX:
            raise InvalidKey("key", key, f"has over {KEY_BYTES_MAX} bytes")
        return key

    def formatter(self) -> Callable[[object], str]:
        """A fast ``format`` for a template with one field."""
        (field,) = self.fields
        head, tail = self._literals

        def of_one(value: object) -> str:
            if type(value) is int:
                return f"{head}{value}{tail}"
            return self.format({field: value})

        return of_one

    def match(self, key: str) -> dict[str, str] | None:
        """The fields of a key made by this template; None if it was made by another."""
        found = self._pattern.fullmatch(key)
        if found is None:
            return None
        return {field: unquote(value) for field, value in found.groupdict().items()}


def _escaped(field: str, value: object) -> str:
    if value is None or isinstance(value, bytes | bytearray | memoryview):
        raise InvalidKey(field, repr(value), "cannot be part of a key")
    text = str(value)
    if not text:
        raise InvalidKey(field, text, "is empty, and cannot be part of a key")
    if text.isascii() and text.isalnum():
        return text
    try:
        return quote(text, safe=_SAFE)
    except UnicodeEncodeError:
        raise InvalidKey(field, ascii(text), "is not valid Unicode") from None


class Names:
    """The names of one namespace; see the table above."""

    __slots__ = (
        "_cache_version",
        "_entry_prefixes",
        "_lease_prefixes",
        "bell",
        "events",
        "meta",
        "namespace",
        "nodes",
        "prefixes",
        "shards",
        "work",
    )

    def __init__(self, namespace: str, shards: int, cache_version: int = 0) -> None:
        self.namespace = namespace
        self.shards = shards
        width = max(2, len(str(shards - 1)))
        self.prefixes = tuple(f"{{{namespace}:{n:0{width}}}}:" for n in range(shards))
        self._cache_version = cache_version
        self._entry_prefixes = tuple(f"{prefix}e{cache_version}:" for prefix in self.prefixes)
        self._lease_prefixes = tuple(f"{prefix}l:" for prefix in self.prefixes)
        self.events = f"forebay:{namespace}:events"
        self.meta = f"forebay:{namespace}:meta"
        self.nodes = f"forebay:{namespace}:nodes"
        self.bell = f"forebay:{namespace}:bell"
        self.work = f"forebay:{namespace}:work"

    def shard(self, key: str) -> int:
        return crc32(key.encode()) % self.shards

    def entry(self, key: str) -> str:
        return self._entry_prefixes[crc32(key.encode()) % self.shards] + key

    def lease(self, key: str) -> str:
        return self._lease_prefixes[crc32(key.encode()) % self.shards] + key

    def tag(self, tag: str) -> str:
        return f"{self.prefixes[self.shard(tag)]}t:{tag}"

    def seen(self, shard: int, event_id: str) -> str:
        return f"{self.prefixes[shard]}i:{event_id}"

    def part(self, shard: int, name: str) -> str:
        """A name that a shard, or the ingress stream (EVENTS), has once: head, log, own ..."""
        if shard == EVENTS:
            return f"{{{self.events}}}:{name}"
        return self.prefixes[shard] + name
