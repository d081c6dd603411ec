"""Jobs: work that one node of the cluster does, kept in a stream until it is done.

A stream entry has the field ``j``, the msgpack of a job; a write also ``v``, its version.

I1  A ``WriteJob`` carries the value: the stream, not the entry, is what must not be lost.
I2  A ``RefreshJob`` carries the token of the fill lease: whoever does it fills with that
    token, and is refused when the lease is gone.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

__all__ = ["Invalidates", "RefreshJob", "WriteJob", "read_refresh", "read_write", "write_job"]

Keys = Annotated[tuple[str, ...], Meta(max_length=1_000)]


class Invalidates(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What to invalidate once a write has reached the source."""

    keys: Keys = ()
    tags: Keys = ()

    def __bool__(self) -> bool:
        return bool(self.keys or self.tags)


class WriteJob(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="w"):
    key: str
    value: bytes | None  #: msgpack; None deletes the row
    hard_ms: int = 0  #: lifetime of the entry after the write was sunk; 0: it is dropped
    invalidates: Invalidates = Invalidates()
    event_id: str = ""
    traceparent: str = ""


class RefreshJob(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="r"):
    cache: str
    key: str
    token: str
    traceparent: str = ""


_encoder = msgspec.msgpack.Encoder()
_writes = msgspec.msgpack.Decoder(WriteJob)
_refreshes = msgspec.msgpack.Decoder(RefreshJob)
write_job = _encoder.encode
read_write = _writes.decode
read_refresh = _refreshes.decode
