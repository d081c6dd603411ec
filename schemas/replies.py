"""Checked parsers of replies from Valkey, where anybody may have written anything.

V1  Each parser checks type and size before it decodes, in linear time; any other value raises
    ``UnreadableRecord``, and no other exception.
V2  The error names the record and shows a part of it; the caller decides whether to skip one
    record among others or the whole reply.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import UnreadableRecord

__all__ = [
    "ID_MAX",
    "INTEGER_MAX",
    "LAST_ID",
    "SHARDS_MAX",
    "WHOLE_MAX",
    "array",
    "digits",
    "field_map",
    "following",
    "integer",
    "order",
    "pairs",
    "raw_bytes",
    "stream_id",
    "text",
]

INTEGER_MAX = 2**63 - 1  #: the largest that Valkey itself can say
ID_MAX = 2**64 - 1  #: the largest part of an id
SHARDS_MAX = 1_024  #: as in the settings
WHOLE_MAX = 2**53 - 2  #: the largest that scripts can count with, see _numbers.lua
LAST_ID = f"{ID_MAX}-{ID_MAX}"  #: a stream that has given this id gives no other
TEXT_BYTES_MAX = 65_536
_INTEGER = re.compile(rb"-?[0-9]{1,20}")
_DIGITS = re.compile(rb"[0-9]{1,20}")
_ID = re.compile(rb"([0-9]{1,20})-([0-9]{1,20})")


def integer(reply: Any, name: str, *, low: int = 0, high: int = INTEGER_MAX) -> int:
    """A whole number, as an integer reply or as decimal digits."""
    if isinstance(reply, int):
        number = int(reply)
    else:
        raw = reply.encode() if isinstance(reply, str) else reply
        if not isinstance(raw, bytes) or not _INTEGER.fullmatch(raw):
            raise UnreadableRecord(name, reply, "is no whole number")
        number = int(raw)
    if not low <= number <= high:
        raise UnreadableRecord(name, reply, f"is not between {low} and {high}")
    return number


def digits(raw: bytes) -> int | None:
    """The number that these bytes spell in at most 20 decimal digits; None if they do not."""
    return int(raw) if _DIGITS.fullmatch(raw) else None


def raw_bytes(reply: Any, name: str) -> bytes:
    if not isinstance(reply, bytes):
        raise UnreadableRecord(name, reply, "is no string")
    return reply


def text(reply: Any, name: str, *, bytes_max: int = TEXT_BYTES_MAX) -> str:
    """UTF-8 of at most ``bytes_max`` bytes."""
    raw = reply.encode() if isinstance(reply, str) else raw_bytes(reply, name)
    if len(raw) > bytes_max:
        raise UnreadableRecord(name, raw, f"has {len(raw)} bytes, {bytes_max} are allowed")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise UnreadableRecord(name, raw, "is not UTF-8") from None


def array(reply: Any, name: str, *, length: int | None = None) -> Sequence[Any]:
    """A list, of at least ``length`` parts if that is given."""
    if not isinstance(reply, list) or len(reply) < (length or 0):
        raise UnreadableRecord(name, reply, f"is no list of {length or 'parts'}")
    return reply


def pairs(reply: Any, name: str) -> list[tuple[Any, Any]]:
    """A flat list of names and values; a last one without a value is left out."""
    found = array(reply, name)
    return list(zip(found[::2], found[1::2], strict=False))


def field_map(fields: Any) -> Mapping[bytes, bytes]:
    """The fields of a stream's entry; empty for an entry that is gone."""
    found = fields or ()
    return {
        name: value
        for name, value in zip(found[::2], found[1::2], strict=False)
        if isinstance(name, bytes) and isinstance(value, bytes)
    }


def stream_id(reply: Any, name: str) -> str:
    """The id of a stream's entry."""
    raw = reply.encode() if isinstance(reply, str) else reply
    found = _ID.fullmatch(raw) if isinstance(raw, bytes) else None
    if found is None or max(int(found[1]), int(found[2])) >= 2**64:
        raise UnreadableRecord(name, reply, "is no id of a stream")
    return found[0].decode()


def order(entry_id: str | bytes) -> tuple[int, int]:
    """The sort key of an id: milliseconds and number."""
    ms, _, seq = stream_id(entry_id, "the id").partition("-")
    return int(ms), int(seq)


def following(entry_id: str) -> str:
    """The id after this one; empty after the last."""
    ms, seq = order(entry_id)
    if entry_id == LAST_ID:
        return ""
    return f"{ms}-{seq + 1}" if seq < 2**64 - 1 else f"{ms + 1}-0"
