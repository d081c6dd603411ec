"""The value codec of one cache: msgpack, compressed when that makes the payload smaller.

V1  Decoding any bytes gives a value of the declared type or raises InvalidEntry.
V2  A value larger than ``bytes_max`` is refused when it is encoded, not when it is read.
V3  A value that is not of the declared type is refused when it is encoded: by its class, and by
    decoding the encoded bytes, as every other node will. None always passes; an int passes for a
    float. The check costs 0.6 us for 50 bytes and 7 us for 1.4 kB, next to network round trips.
V4  All compression formats are read, regardless of the one that is written.
V5  Callers of a ``PackedCodec`` cannot change the shared value: ``own`` decodes a copy for each
    caller. Bytes that the codec has packed itself can always be decoded.
V6  The decoded value is kept and returned from the first call on: a datetime in UTC, a float where
    the loader returned an int, the declared class where it returned a subclass.
V7  A type whose values can never be stored is refused when the cache is declared.
V8  ``to_json`` encodes a value or raises InvalidEntry if JSON cannot represent it: NaN never
    becomes null.
C1  A missing compression library is reported when the node starts, not at the first large value.
C2  Compressors may be used from several threads.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any, Generic, Protocol, Self, TypeVar, cast

import msgspec
from msgspec import Struct

from ...schemas.entry import Codec, Entry, EntryMeta, decompressed, make_tail
from ...schemas.errors import ConfigError, EntryFault, InvalidEntry
from ...schemas.extras import pip_install
from ...schemas.json_form import not_finite
from ...schemas.settings import CacheDefaults, Compression
from .introspection import classes_of, fits, name_of, refused, undecodable_in
from .pydantic_form import PydanticForm, has_pydantic

T = TypeVar("T")

_LEVEL = 1  #: of zlib and zstd: values are read soon and stored for minutes


class Encoded(Struct, Generic[T], frozen=True):
    """A value that was encoded and decoded again."""

    kept: T  #: the decoded value, for the near cache and the waiting callers
    payload: bytes  #: its msgpack


class ValueCodec(Generic[T]):
    """Encodes and decodes the values of one cache."""

    def __init__(
        self,
        of: Any,
        *,
        bytes_max: int,
        compress_over_bytes: int,
        compression: Compression = "zlib",
    ) -> None:
        """Build the encoder and the decoder.

        Raises:
            ConfigError: the type cannot be decoded, or the compression is not installed.
        """
        self._type = of
        self.bytes_max = bytes_max
        self._compress_over_bytes = compress_over_bytes
        self._compressor = compressor(compression)
        try:
            self._classes = classes_of(of)
            # A model that pydantic cannot decode again is still of the declared type.
            fault: EntryFault = "bad_value" if of is Any or has_pydantic(of) else "wrong_type"
            self._fault = fault
            self._form = _form_of(of)
            self._packed = self._form.stored
        except ConfigError:
            raise
        except Exception as error:  # ambiguous unions, unresolved names, ...
            problem = " ".join(str(error).split())
            raise refused(of, problem, "declare a type that can be decoded") from error

    @classmethod
    def from_defaults(cls, of: Any, defaults: CacheDefaults) -> Self:
        """Build the codec from the settings; raises ConfigError."""
        return cls(
            of,
            bytes_max=defaults.value_bytes_max,
            compress_over_bytes=defaults.compress_over_bytes,
            compression=defaults.compression,
        )

    def pack(self, value: T) -> bytes:
        """The msgpack of a value.

        Raises:
            InvalidEntry: the value is too large, of another type, or cannot be encoded.
        """
        return self.check_size(self.encode(value).payload)

    def encode(self, value: T) -> Encoded[T]:
        """Encode a value and decode it as every reader will; the size is not checked.

        Raises:
            InvalidEntry: the value is of another type, or cannot be encoded and decoded.
        """
        payload = self._to_msgpack(value)
        return Encoded(self._decode_own(payload), payload)

    def encoded_in(self, entry: Entry) -> Encoded[T]:
        """The value and the msgpack of a stored entry that is not negative.

        Raises:
            InvalidEntry: the bytes are not a value of this cache's type.
        """
        value = cast(T, self.value(entry))
        if entry.codec == "j":
            return Encoded(value, self.pack(value))
        return Encoded(value, decompressed(entry, bytes_max=self.bytes_max))

    def check_size(self, payload: bytes) -> bytes:
        """The same payload; raises InvalidEntry if it is too large."""
        if len(payload) > self.bytes_max:
            raise InvalidEntry("oversized", f"{len(payload)} bytes, {self.bytes_max} are allowed")
        return payload

    def unpack(self, payload: bytes) -> T:
        """The value of msgpack bytes; raises InvalidEntry."""
        try:
            value: T = self._packed.decode(payload)
        except Exception as error:  # the type's own code may raise anything
            raise InvalidEntry("bad_value", str(error)) from error
        return value

    def tail(self, payload: bytes, meta: EntryMeta) -> bytes:
        """The part of the envelope that the node writes, with the payload compressed."""
        codec: Codec = "m"
        if self._compressor is not None and len(payload) > self._compress_over_bytes:
            letter, compress = self._compressor
            smaller = compress(payload)
            if len(smaller) < len(payload):
                payload, codec = smaller, letter
        return make_tail(payload, kind="v", codec=codec, meta=meta)

    @staticmethod
    def negative_tail(meta: EntryMeta) -> bytes:
        """The part of a negative entry's envelope that the node writes."""
        return make_tail(b"", kind="n", codec="m", meta=meta)

    def from_json(self, raw_json: bytes) -> T:
        """The value of a published event.

        Raises:
            msgspec.ValidationError: it is not of the declared type.
        """
        value: T = self._form.published.decode(raw_json)
        return value

    def to_json(self, value: Any) -> bytes:
        """A value as a caller received it, as JSON; raises InvalidEntry."""
        try:
            raw = self._form.to_json(value)
            simple = self._form.simple(value) if b"null" in raw else None
        except Exception as error:  # the type's own code may raise anything
            raise InvalidEntry("bad_value", str(error)) from error
        if problem := not_finite(simple):
            raise InvalidEntry("bad_value", problem)
        return raw

    def value(self, entry: Entry) -> T | None:
        """The value of an entry; None for a negative one.

        Raises:
            InvalidEntry: the bytes are not a value of this cache's type.
        """
        return self.value_and_size(entry)[0]

    def value_and_size(self, entry: Entry) -> tuple[T | None, int]:
        """As ``value``, with the size of the payload before compression, in bytes."""
        if entry.negative:
            return None, 0
        payload = decompressed(entry, bytes_max=self.bytes_max)
        if entry.codec != "j":
            return self.unpack(payload), len(payload)
        try:
            return self.from_json(payload), len(payload)
        except InvalidEntry:
            raise
        except Exception as error:  # the type's own code may raise anything
            raise InvalidEntry("bad_value", str(error)) from error

    def _to_msgpack(self, value: T) -> bytes:
        if self._classes and type(value) not in self._classes:
            self._check_class(value)
        try:
            return self._form.encode(value)
        except Exception as error:  # the type's own code may raise anything
            raise InvalidEntry("bad_value", str(error)) from error

    def _decode_own(self, payload: bytes) -> T:
        try:
            value: T = self._packed.decode(payload)
        except Exception as error:  # the type's own code may raise anything
            problem = f"declared {name_of(self._type)}: {error}"
            raise InvalidEntry(self._fault, problem) from error
        return value

    def _check_class(self, value: T) -> None:
        if value is not None and not fits(value, self._classes):
            declared, got = name_of(self._type), name_of(type(value))
            raise InvalidEntry("wrong_type", f"declared {declared}, got {got}")


class PackedCodec(ValueCodec[bytes], Generic[T]):
    """The codec of a ``mutable`` cache: the msgpack of a value is kept and shared.

    ``encode`` encodes a loader's result; ``own`` decodes it for one caller.
    """

    def encode(self, value: Any) -> Encoded[bytes]:
        """As for any codec, but the msgpack is kept.

        Raises:
            InvalidEntry: the value is of another type, or cannot be encoded and decoded.
        """
        # ``super`` also decodes the payload: ``own`` is too late for InvalidEntry.
        payload = super().encode(value).payload
        return Encoded(payload, payload)

    def own(self, payload: bytes) -> T:
        """A value that no other caller shares; raises InvalidEntry."""
        return cast(T, super().unpack(payload))

    def pack(self, value: bytes) -> bytes:
        """The same bytes, made by ``encode`` or ``from_json``; raises InvalidEntry if too large."""
        return self.check_size(value)

    def unpack(self, payload: bytes) -> bytes:
        """The same bytes, if they can be decoded; raises InvalidEntry."""
        super().unpack(payload)
        return payload

    def from_json(self, raw_json: bytes) -> bytes:
        """The msgpack of a published value.

        Raises:
            msgspec.ValidationError: it is not of the declared type. InvalidEntry: it is too large.
        """
        return self.check_size(self.encode(super().from_json(raw_json)).payload)


class _Decoder(Protocol):
    """The object, not its bound method: calling ``decode`` on the object is faster."""

    def decode(self, raw: bytes, /) -> Any: ...


class _Form(Struct, frozen=True):
    encode: Callable[[Any], bytes]  #: to msgpack
    stored: _Decoder  #: from msgpack
    published: _Decoder  #: from JSON
    to_json: Callable[[Any], bytes]
    simple: Callable[[Any], Any]  #: the input of ``to_json``: dicts, lists and the like


def _form_of(of: Any) -> _Form:
    if has_pydantic(of):
        form = PydanticForm(of)
        return _Form(form.encode, form, form.published, form.to_json, form.simple)
    stored, published = msgspec.msgpack.Decoder(of), msgspec.json.Decoder(of)
    undecodable = undecodable_in(of)
    if undecodable is not None:
        problem = f"a stored {name_of(undecodable)} could not be read again"
        fix = "return a Struct, a dataclass, a pydantic model, a dict or the like"
        raise refused(of, problem, fix)
    encode = msgspec.msgpack.Encoder().encode
    return _Form(encode, stored, published, msgspec.json.encode, msgspec.to_builtins)


def compressor(chosen: Compression) -> tuple[Codec, Callable[[bytes], bytes]] | None:
    """The codec's letter and its function; None if nothing is compressed.

    Raises:
        ConfigError: the chosen compression is not installed.
    """
    match chosen:
        case "none":
            return None
        case "zlib":
            return "z", functools.partial(zlib.compress, level=_LEVEL)
        case "zstd":
            return "s", _zstd()
        case _:
            raise _unusable(chosen, "is not a compression", "choose zlib, zstd or none")


def _zstd() -> Callable[[bytes], bytes]:
    try:
        import zstandard
    except ImportError:
        raise _unusable(
            "zstd", "zstandard is not installed", f"{pip_install('zstd')}, or choose zlib"
        ) from None

    # A context is not thread-safe and takes 8 us to create: idle ones are reused.
    idle: list[Any] = []

    def compress(payload: bytes) -> bytes:
        try:
            context = idle.pop()
        except IndexError:
            context = zstandard.ZstdCompressor(level=_LEVEL)
        smaller: bytes = context.compress(payload)
        idle.append(context)
        return smaller

    return compress


def _unusable(value: str, problem: str, fix: str) -> ConfigError:
    return ConfigError(
        setting="cache.compression",
        value=value,
        origin="the settings of the cache",
        problem=problem,
        fix=fix,
    )
