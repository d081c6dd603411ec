"""Values as bytes: msgpack, compressed when that pays.

V1  Whatever the bytes are, decoding gives a value of the declared type or InvalidEntry.
V2  A value larger than ``bytes_max`` is refused when it is encoded, not when it is read.
"""

from __future__ import annotations

import zlib
from typing import Any, Generic, TypeVar

import msgspec

from ...schemas.entry import Codec, Entry, EntryMeta, decompressed, make_tail
from ...schemas.errors import InvalidEntry

__all__ = ["ValueCodec"]

T = TypeVar("T")


class ValueCodec(Generic[T]):
    """Encodes and decodes the values of one cache."""

    def __init__(self, of: Any, *, bytes_max: int, compress_over_bytes: int) -> None:
        self._type = of
        self._bytes_max = bytes_max
        self._compress_over_bytes = compress_over_bytes
        self._encode = msgspec.msgpack.Encoder().encode
        self._packed = msgspec.msgpack.Decoder(of)
        self._json = msgspec.json.Decoder(of)

    @property
    def bytes_max(self) -> int:
        return self._bytes_max

    def pack(self, value: T) -> bytes:
        """The msgpack of a value.

        Raises:
            InvalidEntry: it is too large, or no value that can be encoded.
        """
        try:
            payload = self._encode(value)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise InvalidEntry("bad_value", str(error)) from error
        if len(payload) > self._bytes_max:
            raise InvalidEntry("oversized", f"{len(payload)} bytes, {self._bytes_max} are allowed")
        return payload

    def unpack(self, payload: bytes) -> T:
        """The value of msgpack bytes; raises InvalidEntry."""
        try:
            value: T = self._packed.decode(payload)
        except Exception as error:  # a type's own __post_init__ may raise anything
            raise InvalidEntry("bad_value", str(error)) from error
        return value

    def tail(self, payload: bytes, meta: EntryMeta) -> bytes:
        """The envelope's part that the node makes."""
        codec: Codec = "m"
        if len(payload) > self._compress_over_bytes:
            smaller = zlib.compress(payload, 1)
            if len(smaller) < len(payload):
                payload, codec = smaller, "z"
        return make_tail(payload, kind="v", codec=codec, meta=meta)

    @staticmethod
    def negative_tail(meta: EntryMeta) -> bytes:
        return make_tail(b"", kind="n", codec="m", meta=meta)

    def convert(self, raw_json: bytes) -> T:
        """The value in a published event.

        Raises:
            msgspec.ValidationError: it is not of the declared type.
        """
        value: T = self._json.decode(raw_json)
        return value

    def value(self, entry: Entry) -> T | None:
        """The value of an entry; None for a negative one.

        Raises:
            InvalidEntry: the bytes are not a value of this cache's type.
        """
        if entry.negative:
            return None
        payload = decompressed(entry, bytes_max=self._bytes_max)
        if entry.codec != "j":
            return self.unpack(payload)
        try:
            return self.convert(payload)
        except Exception as error:  # see unpack
            raise InvalidEntry("bad_value", str(error)) from error
