"""Every name that Forebay uses in Valkey, and the grammar of the keys inside them.

    {shop:07}:head      hash    epoch and newest version of the shard, cache versions in use
    {shop:07}:log       stream  notices, ids dense: <epoch>-<seq>
    {shop:07}:e0:KEY    string  entry (0: the cache version, CACHE_VER)
    {shop:07}:l:KEY     string  fill lease: the token of the one who may fill
    {shop:07}:t:TAG     string  tag version; *KEY is the tag of what depends on a key, in its shard
    {shop:07}:seen      zset    event ids seen lately      :f:KEY  string  highest fencing token
    {shop:07}:writes    stream  write-behind jobs         :refreshes  stream  refresh jobs
    {shop:07}:own       hash    owner of the ordered work  :done  hash  its checkpoints
    {shop:07}:dead      stream  dead letters of the shard's writes; :before, once it was full
    {shop:07}:held      stream  jobs that wait for a member with their sink
    {shop:07}:tried     hash    id in held -> tokens of the members that could not decode it
    {shop:07}:k:NAME    hash    a lock and its holders     :kq:NAME, :kw:NAME  who waits for it
    {shop:07}:legacy    zset    keys (*KEY) and tags for which no entry of another service is used
    {shop:07}:locks     zset    locks in use lately        :era  hash  run of the server meant
    {shop:07}:r:LIMIT:SUBJECT    string  a rate limit's state, in the shard of SUBJECT
    {shop:07}:rr:SUBJECT:ID      string  a reservation not yet settled
    {shop:07}:rs:LIMIT:SUBJECT   zset    slots in use: nonce -> until
    forebay:shop:events stream  ingress; {forebay:shop:events}:own, :done, :dead, :held beside it;
                                :before  events published up to an exhausted id
    forebay:shop:meta   hash    facts fixed at birth       forebay:shop:nodes  zset  last beats
    {forebay:shop:nodes}:members  hash  the roster
    forebay:shop:wake:PROCESS   channel  a lock is yours, or is so no more
    forebay:shop:failing:CACHE  string, expires  who tries the failing source of a cache
    forebay:shop:bell   channel notices as they happen     forebay:shop:work   channel  jobs
    forebay:shop:limits channel subjects that were refunded
    forebay:shop:reply:HEX  channel  answers to one who asked all nodes on :work
    forebay:shop:mark:ID    string, expires  written by the node ID to see what is replicated
    forebay:shop:db3:bell   the channels of database 3; pub/sub knows no databases
    forebay:shop:none       never exists: asked for to learn whether writes are accepted
    {KEY}:fence         string  highest token of a key that is written through guards

I1  All names of a shard share one hash tag, so one script may touch them all.
I2  ``shard_of``, which alone decides, is crc32(key) % shards: any language can compute it.
I3  A key never contains what Valkey, a glob or a template reads as more than a letter:
    such a key is refused by ``check_key``; values put into a template are escaped.
I4  Values of different text never give the same key of a template, and ``match`` gives back
    the text of each; a key that the template would have spelt otherwise is none of its keys.
I5  ``type_of`` knows the type of every key above: ``TYPES`` lists the kinds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Literal
from urllib.parse import quote, unquote
from zlib import crc32

from .errors import InvalidKey

__all__ = [
    "EVENTS",
    "KEY_BYTES_MAX",
    "PLAIN_INT_MAX",
    "TYPES",
    "KeyTemplate",
    "Names",
    "Part",
    "check_key",
    "depended_on",
    "dependents_of",
    "refuse_one_string",
    "shard_of",
    "type_of",
]

KEY_BYTES_MAX = 512
_DEPENDENTS = "*"
EVENTS = -1  #: stands for the ingress stream where a shard number is asked for

_FORBIDDEN = re.compile(r"[\x00-\x20\x7f-\x9f{}*?\[\]\\\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_FIELD = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_NONCE = re.compile(rb"[0-9a-f]{16,64}")
_SAFE = "-._~@/"
_NOT_TEXT = (bytes, bytearray, memoryview, list, tuple, dict, set, frozenset)
PLAIN_INT_MAX = 10**18  #: so short that no key gets too long by it

Type = Literal["string", "hash", "stream", "zset"]
Part = Literal[
    "head", "log", "seen", "writes", "refreshes", "own", "done", "dead", "held", "tried",
    "locks", "era", "before", "legacy",
]  #: what a shard, or the ingress stream, has once  # fmt: skip
_PARTS: Mapping[str, Type] = {
    "head": "hash", "log": "stream", "seen": "zset", "writes": "stream", "refreshes": "stream",
    "own": "hash", "done": "hash", "dead": "stream", "held": "stream", "tried": "hash",
    "locks": "zset", "era": "hash", "before": "stream", "legacy": "zset",
    "members": "hash", "fence": "string",
}  # fmt: skip
_NAMED: Mapping[str, Type] = {
    "e": "string", "l": "string", "t": "string", "f": "string", "k": "hash", "kq": "zset",
    "kw": "hash", "r": "string", "rr": "string", "rs": "zset",
}  #: with a name behind it  # fmt: skip
_WHOLE: Mapping[str, Type] = {
    "events": "stream", "meta": "hash", "nodes": "zset", "failing": "string", "mark": "string",
    "none": "string",
}  #: of a namespace  # fmt: skip
TYPES: Mapping[str, Type] = {**_PARTS, **_NAMED, **_WHOLE}


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


def refuse_one_string(name: str, given: Iterable[object]) -> None:
    """Whose characters would be taken for names; raises InvalidKey."""
    if isinstance(given, str | bytes):
        raise InvalidKey(name, str(given), "is one string; write a list of them")


def dependents_of(key: str) -> str:
    """The tag that whatever depends on a key carries; no key or tag of an application is so."""
    return _DEPENDENTS + key


def depended_on(tag: str) -> str | None:
    """The key, if this is the tag of what depends on one."""
    return tag[1:] if tag.startswith(_DEPENDENTS) else None


def shard_of(key: str, shards: int) -> int:
    """The shard of a key or of a tag; the tag of a key's dependents lies in the key's shard."""
    return crc32(key.removeprefix(_DEPENDENTS).encode()) % shards


def type_of(key: str) -> Type | None:
    """The type that Forebay gives this key in Valkey; None for a key of others."""
    tag, _, rest = key.partition("}:")
    name, named, _ = rest.partition(":")
    if not tag.startswith("{"):
        space, _, rest = key.partition(":")
        return _WHOLE.get(rest.split(":")[1]) if space == "forebay" and ":" in rest else None
    if not named or rest == "dead:before":
        return _PARTS.get(name)
    return _NAMED.get("e" if name.startswith("e") else name)


class KeyTemplate:
    """A pattern such as ``product:{id}``: makes keys from values, and values from keys.

    In a value, everything but letters, digits and ``-._~@/`` is percent-encoded; and of
    these, what stands between two fields.
    """

    __slots__ = ("_encoded", "_literals", "_pattern", "_safe", "fields", "text")

    def __init__(self, text: str, *, name: str = "key template") -> None:
        """``name`` is what an error calls it.

        Raises:
            InvalidKey: no keys could be made of it, or not told apart.
        """
        if not isinstance(text, str):
            raise InvalidKey(name, repr(text), "is no text")
        literals, fields = _FIELD.split(text)[::2], _FIELD.findall(text)
        if problem := _problem_of(literals, fields):
            raise InvalidKey(name, text, problem)
        self.text = text
        self.fields = tuple(fields)
        self._literals = tuple(literals)
        between = set("".join(literals[1:-1]))
        self._safe = "".join(each for each in _SAFE if each not in between)
        # quote() leaves some characters as they are, whatever it is told.
        self._encoded = {ord(each): f"%{ord(each):02X}" for each in between & set(_SAFE)}
        groups = [re.escape(literals[0])]
        for field, literal in zip(fields, literals[1:], strict=True):
            groups += [f"(?P<{field}>[A-Za-z0-9%{re.escape(self._safe)}]+)", re.escape(literal)]
        self._pattern = re.compile("".join(groups))

    def __repr__(self) -> str:
        return f"KeyTemplate({self.text!r})"

    @property
    def shape(self) -> str:
        """The text without the names of the fields: two of one shape make the same keys."""
        return "{}".join(self._literals)

    def format(self, values: Mapping[str, object]) -> str:
        """The key of these values.

        Raises:
            InvalidKey: a value is missing, empty, or of a kind that has no text of its own; or
                the key is too long.
        """
        return self.of_texts([_text_of(field, values.get(field)) for field in self.fields])

    def of_texts(self, texts: Iterable[str]) -> str:
        """The key of these texts, one for each field in its order; raises InvalidKey."""
        parts = [self._literals[0]]
        for field, text, literal in zip(self.fields, texts, self._literals[1:], strict=True):
            parts += [self._escaped(field, text), literal]
        key = "".join(parts)
        if len(key) > KEY_BYTES_MAX or len(key.encode()) > KEY_BYTES_MAX:
            raise InvalidKey("key", key, f"has over {KEY_BYTES_MAX} bytes")
        return key

    def plain(self, fields: Mapping[str, str]) -> str:
        """These fields put in as they are, without escaping: a name that another program made."""
        parts = [self._literals[0]]
        for field, literal in zip(self.fields, self._literals[1:], strict=True):
            parts += [fields[field], literal]
        return "".join(parts)

    @property
    def ends(self) -> tuple[str, str]:
        """What stands before and behind the only field."""
        head, tail = self._literals
        return head, tail

    def formatter(self) -> Callable[[object], str]:
        """A fast ``format`` for a template with one field."""
        (field,) = self.fields
        head, tail = self._literals

        def of_one(value: object) -> str:
            if type(value) is int and -PLAIN_INT_MAX < value < PLAIN_INT_MAX:
                return f"{head}{value}{tail}"
            return self.format({field: value})

        return of_one

    def match(self, key: str) -> dict[str, str] | None:
        """The fields of a key made by this template; None if it was made by another."""
        found = self._pattern.fullmatch(key)
        if found is None:
            return None
        fields = {field: unquote(value) for field, value in found.groupdict().items()}
        return fields if "%" not in key or self._respelt(fields) == key else None

    def _respelt(self, fields: Mapping[str, str]) -> str | None:
        try:
            return self.format(fields)
        except InvalidKey:
            return None

    def _escaped(self, field: str, text: str) -> str:
        if not text:
            raise InvalidKey(field, text, "is empty, and cannot be part of a key")
        if text.isascii() and text.isalnum():
            return text
        try:
            escaped = quote(text, safe=self._safe)
        except UnicodeEncodeError:
            raise InvalidKey(field, ascii(text), "is not valid Unicode") from None
        return escaped.translate(self._encoded) if self._encoded else escaped


def _problem_of(literals: Sequence[str], fields: Sequence[str]) -> str:
    """Why they make no template; nothing if they do."""
    if len(set(fields)) != len(fields):
        return "names a field twice"
    if "{" in (rest := "".join(literals)) or "}" in rest:
        return "holds a brace that is part of no field; write {name}, without a format"
    if any(all(map(_alike, part)) for part in literals[1:-1]):
        return "needs something like ':' or '-' between two fields"
    try:
        check_key(rest or "x")
    except InvalidKey as error:
        return error.problem
    return ""


def _alike(character: str) -> bool:
    """Whether it may stand in a value that was escaped."""
    return character == "%" or (character.isascii() and character.isalnum())


def _text_of(field: str, value: object) -> str:
    if isinstance(value, Enum):
        value = value.value
    kind = type(value)
    nameless = kind.__str__ is object.__str__ and kind.__repr__ is object.__repr__
    if value is None or nameless or isinstance(value, _NOT_TEXT):
        raise InvalidKey(field, repr(value), "cannot be part of a key")
    try:
        return str(value)
    except ValueError:
        raise InvalidKey(field, "the number", "has too many digits") from None


class Names:
    """The names of one namespace; see the table above."""

    __slots__ = (
        "_entry_prefixes",
        "_lease_prefixes",
        "_reply",
        "bell",
        "cache_version",
        "database",
        "events",
        "limits",
        "members",
        "meta",
        "namespace",
        "nodes",
        "none",
        "prefixes",
        "shards",
        "wake",
        "work",
    )

    def __init__(
        self, namespace: str, shards: int, cache_version: str = "0", database: int = 0
    ) -> None:
        self.namespace = namespace
        self.database = database
        self.shards = shards
        width = max(2, len(str(shards - 1)))
        self.prefixes = tuple(f"{{{namespace}:{n:0{width}}}}:" for n in range(shards))
        self.cache_version = cache_version
        self._entry_prefixes = tuple(f"{prefix}e{cache_version}:" for prefix in self.prefixes)
        self._lease_prefixes = tuple(f"{prefix}l:" for prefix in self.prefixes)
        self.events = f"forebay:{namespace}:events"
        self.meta = f"forebay:{namespace}:meta"
        self.none = f"forebay:{namespace}:none"
        self.nodes = f"forebay:{namespace}:nodes"
        self.members = f"{{{self.nodes}}}:members"
        channels = f"forebay:{namespace}:db{database}:" if database else f"forebay:{namespace}:"
        self.bell = f"{channels}bell"
        self.work = f"{channels}work"
        self.wake = f"forebay:{namespace}:wake:"  # see ``process``
        self.limits = f"{channels}limits"
        self._reply = f"{channels}reply:"

    @property
    def key_patterns(self) -> dict[str, str]:
        """All keys of the namespace as ACL patterns, each with a key that it allows."""
        return {
            f"~forebay:{self.namespace}:*": self.meta,
            f"~{{forebay:{self.namespace}:*": self.members,
            f"~{{{self.namespace}:*": f"{self.prefixes[0]}head",
        }

    @property
    def channel_patterns(self) -> dict[str, str]:
        """All channels of the namespace as ACL patterns, each with a channel that it allows."""
        return {f"&forebay:{self.namespace}:*": self.bell}

    def process(self, id: str) -> str:
        """A process as it stands in nonces and, put there by scripts, in its channel."""
        return f"db{self.database}-{id}" if self.database else id

    def with_shards(self, shards: int) -> Names:
        return Names(self.namespace, shards, self.cache_version, self.database)

    def shard(self, name: str) -> int:
        """The shard of a key or a tag."""
        return shard_of(name, self.shards)

    def marker(self, node_id: str) -> str:
        return f"forebay:{self.namespace}:mark:{node_id}"

    def entry(self, key: str) -> str:
        return self._entry_prefixes[shard_of(key, self.shards)] + key

    def lease(self, key: str) -> str:
        return self._lease_prefixes[shard_of(key, self.shards)] + key

    def of_key(self, key: str) -> tuple[str, str, str]:
        """Entry, fill lease, and the tag that whatever depends on the key carries."""
        return self.entry(key), self.lease(key), self.tag(dependents_of(key))

    def fence(self, key: str) -> str:
        """The highest fencing token under which the entry was put."""
        return f"{self.prefixes[self.shard(key)]}f:{key}"

    def failing(self, cache: str) -> str:
        """Who of the cluster may try the failing source of this cache."""
        return f"forebay:{self.namespace}:failing:{cache}"

    def lock(self, name: str) -> tuple[str, str, str, str, str]:
        """Record, queue and waiters of a lock; index and era of its shard."""
        prefix = self.prefixes[shard_of(name, self.shards)]
        return (
            f"{prefix}k:{name}",
            f"{prefix}kq:{name}",
            f"{prefix}kw:{name}",
            f"{prefix}locks",
            f"{prefix}era",
        )

    def tag(self, tag: str) -> str:
        return f"{self.prefixes[self.shard(tag)]}t:{tag}"

    def limit(self, kind: str, limit: str, subject: str, within: str = "") -> str:
        """State (r), slots (rs) or reservations (rr) of a subject; ``within`` says the shard."""
        return f"{self.prefixes[self.shard(within or subject)]}{kind}:{limit}:{subject}"

    def reply(self, nonce: str) -> str:
        """The channel of one who asks; ``nonce`` is random, in hexadecimal digits."""
        return self._reply + nonce

    def is_reply(self, channel: bytes) -> bool:
        """Whether it is such a channel of this namespace."""
        head, nonce = channel[: len(self._reply)], channel[len(self._reply) :]
        return head == self._reply.encode() and _NONCE.fullmatch(nonce) is not None

    def part(self, shard: int, name: Part) -> str:
        """A name that a shard, or the ingress stream (EVENTS), has once: head, log, own ..."""
        if shard == EVENTS:
            return f"{{{self.events}}}:{name}"
        return self.prefixes[shard] + name
