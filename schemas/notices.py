"""Notices: what the shard log says of a change. They name what changed, never its value.

On the wire a log entry has two fields: ``v``, the version that the script gave to the
change (decimal), and ``n``, the msgpack of one of these. The pubsub carries the same as
``<shard> <epoch> <seq> <version> <n>``.

I1  Applying a notice twice, or one that is older than what is known, changes nothing.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from .errors import UnreadableRecord
from .replies import ID_MAX, integer, order

__all__ = [
    "Bumped",
    "Changed",
    "Dropped",
    "Extended",
    "Notice",
    "Notification",
    "Position",
    "read_notice",
    "read_notification",
    "write_notice",
]


class Position(Struct, frozen=True, order=True, array_like=True):
    """A place in a shard's log: the id of an entry."""

    epoch: int
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}"

    @classmethod
    def parse(cls, raw: bytes | str) -> Position:
        entry_id = raw if isinstance(raw, str) else raw.decode("latin-1")
        return cls(*order(entry_id if "-" in entry_id else f"{entry_id}-0"))


class Changed(Struct, frozen=True, array_like=True, tag="c"):
    """A new value was stored; older copies are old."""

    key: str
    origin: str = ""  #: node id of the writer, whose own near cache has it already
    outdates: bool = False  #: it was written, not loaded: what depends on the key is old
    published_ms: int = 0  #: when the event was published, by the server's clock; 0: no event


class Dropped(Struct, frozen=True, array_like=True, tag="d"):
    """Copies of these keys, and what depends on them, must not be served as fresh any more."""

    keys: tuple[str, ...]
    soft: bool = False  #: stale copies may still be served as such
    origin: str = ""
    published_ms: int = 0  #: as in ``Changed``; of several events, the oldest


class Bumped(Struct, frozen=True, array_like=True, tag="t"):
    """These tags have a new version: entries that carry an older one are invalid."""

    tags: tuple[str, ...]
    origin: str = ""
    soft: bool = False  #: they may still be served as stale
    published_ms: int = 0  #: as in ``Dropped``


class Extended(Struct, frozen=True, array_like=True, tag="x"):
    """The value is the same as before; only its lifetimes and version are new."""

    key: str
    since: int  #: the version that was extended
    soft_ms: int  #: lifetimes, from the moment that the new version tells
    hard_ms: int


Notice = Changed | Dropped | Bumped | Extended

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Notice)
write_notice = _encoder.encode


def read_notice(raw: bytes) -> Notice | None:
    """The notice; None for one that this version does not know."""
    try:
        notice: Notice = _decoder.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return notice


class Notification(Struct, frozen=True):
    """A pubsub message."""

    shard: int
    position: Position
    version: int
    notice: bytes


def read_notification(payload: bytes) -> Notification | None:
    """What a pubsub message says; None if it is none."""
    try:
        *numbers, notice = payload.split(b" ", 4)
        shard, epoch, seq, version = [integer(each, "a bell", high=ID_MAX) for each in numbers]
        return Notification(shard, Position(epoch, seq), version, notice)
    except (ValueError, UnreadableRecord):
        return None
