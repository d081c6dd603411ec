"""The envelope of a cached value in the shared tier.

    magic 3 | state 1 | version 16 | soft_at_ms 13 | hard_at_ms 13 | pending 16
    | kind 1 | codec 1 | meta length 2 | meta | payload

The numbers are decimal digits, so that a script reads and writes them with ``string.sub``
and ``%016.0f``. The part up to ``kind`` is made in the script, from the server's clock;
``make_tail`` makes the rest. ``pending`` is the version of the newest write-behind that has
not reached the source. ``meta`` is a msgpack map: tag versions, etag.

I1  A size is checked before what it announces is decoded or decompressed.
I2  Any bytes at all give an ``Entry`` or ``InvalidEntry``, never another exception.
I3  Both older forms are read: a bare JSON value, and ``{"value": ..., "stale_at": seconds}``.
    They have version 0, so that whatever is written next replaces them. ``read_legacy`` reads
    nothing else: under the names of another service there is no entry of ours.
I4  The age of an entry with version 0, or that was brought over (``meta.imported``), is unknown.

Values themselves are decoded by the cache that knows their type.
"""

from __future__ import annotations

import functools
import zlib
from typing import Any, Literal, get_args

import msgspec
from msgspec import Struct

from .errors import InvalidEntry
from .extras import pip_install

__all__ = [
    "FOREVER_MS",
    "MAGIC",
    "Entry",
    "EntryMeta",
    "decompressed",
    "make_tail",
    "read_entry",
    "read_legacy",
    "version_of",
]

MAGIC = b"\xfbE1"
FOREVER_MS = 9_999_999_999_999
_HEADER = 66
_BEYOND = 10**17  #: more than 16 digits can say
_ZSTD_WINDOW_MAX = 1 << 26  #: more than any value may have
_JSON_STARTS = b'{["-0123456789tfn \t\r\n'
_UNDECODABLE = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError, MemoryError)

Kind = Literal["v", "n"]  # a value; a negative entry: known absence
Codec = Literal[
    "m", "z", "s", "j"
]  # msgpack; zlib of it; zstd of it (one frame); JSON (older forms)


class EntryMeta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    tags: dict[str, int] = {}  #: tag -> its version when the loader was started
    etag: str = ""
    soft_ms: int = 0  #: lifetimes as asked for, so that an extension can repeat them
    stale_ms: int = 0
    error_ms: int = 0  #: the end of its life, when only a failing loader makes it be served
    imported: bool = False  #: another service stored it, at a time that is not known


class Entry(Struct, frozen=True):
    """An envelope, read but not yet decoded. Times are the server's, in ms since 1970."""

    version: int
    soft_at_ms: int
    hard_at_ms: int
    kind: Kind
    codec: Codec
    payload: bytes
    meta: EntryMeta
    pending: int = 0  #: version of a write-behind under way; the entry is newer than the source
    doomed: bool = False  #: dropped as soon as that write was sunk

    @property
    def negative(self) -> bool:
        return self.kind == "n"

    def age_ms(self, now_ms: int) -> int | None:
        """Since it was stored; None: unknown (I4)."""
        if not self.version or self.meta.imported:
            return None
        return max(0, now_ms - self.version // 1000)


class _Legacy(Struct):
    value: msgspec.Raw
    stale_at: float


_NO_META = EntryMeta()
_meta_encoder = msgspec.msgpack.Encoder()
_decode_meta = msgspec.msgpack.Decoder(EntryMeta).decode
_FORMS: dict[bytes, tuple[Kind, Codec]] = {
    f"{kind}{codec}".encode(): (kind, codec)
    for kind in get_args(Kind)
    for codec in get_args(Codec)
    if codec != "j"
}
_NOTHING_PENDING = b"0" * 16
_legacy_decoder = msgspec.json.Decoder(_Legacy)


def make_tail(payload: bytes, *, kind: Kind, codec: Codec, meta: EntryMeta) -> bytes:
    """What follows the script's part of the envelope."""
    packed = b"" if meta == _NO_META else _meta_encoder.encode(meta)
    if len(packed) > 0xFFFF:
        raise InvalidEntry("oversized", f"{len(packed)} bytes of tags and etag, 65535 are allowed")
    return b"%c%c%b%b%b" % (ord(kind), ord(codec), len(packed).to_bytes(2, "big"), packed, payload)


def read_entry(raw: bytes, *, bytes_max: int) -> Entry:
    """The envelope of these bytes.

    Raises:
        InvalidEntry: they are no entry, a newer format, or larger than ``bytes_max``.
    """
    if len(raw) > bytes_max + _HEADER + 0xFFFF:
        raise InvalidEntry("oversized", f"{len(raw)} bytes, {bytes_max} are allowed")
    if raw[:3] == MAGIC:
        return _read(raw)
    if raw[:2] == MAGIC[:2]:
        raise InvalidEntry("newer_format", ascii(raw[2:3]))
    if raw[:1] and raw[0] in _JSON_STARTS:
        return _read_legacy(raw)
    raise InvalidEntry("bad_magic" if len(raw) >= _HEADER else "too_short")


def read_legacy(raw: bytes, *, bytes_max: int) -> Entry:
    """The entry that another service stored as JSON, in either older form.

    Raises:
        InvalidEntry: it is no JSON, or larger than ``bytes_max``.
    """
    if len(raw) > bytes_max:
        raise InvalidEntry("oversized", f"over {bytes_max} bytes")
    if not raw or raw[0] not in _JSON_STARTS:
        raise InvalidEntry("bad_magic", "it is no JSON")
    return _read_legacy(raw)


def version_of(raw: bytes) -> int:
    """At least what the scripts take for the version of these bytes, readable or not."""
    if raw[:3] != MAGIC:
        return 0
    return int(raw[4:20]) if raw[4:20].isdigit() else _BEYOND


def _read(raw: bytes) -> Entry:
    if len(raw) < _HEADER:
        raise InvalidEntry("too_short", f"{len(raw)} bytes")
    form = _FORMS.get(raw[62:64])
    end = _HEADER + (raw[64] << 8 | raw[65])
    if form is None or raw[3] not in b"cx" or not raw[4:62].isdigit():
        raise _bad_form(raw)
    if end > len(raw):
        raise InvalidEntry("too_short", "the meta part is cut off")
    try:
        meta = _decode_meta(raw[_HEADER:end]) if end > _HEADER else _NO_META
    except _UNDECODABLE as error:
        raise InvalidEntry("bad_header", "the meta part cannot be decoded") from error
    pending = raw[46:62]
    return Entry(
        int(raw[4:20]),
        int(raw[20:33]),
        int(raw[33:46]),
        form[0],
        form[1],
        raw[end:],
        meta,
        0 if pending == _NOTHING_PENDING else int(pending),
        raw[3] == 120,
    )


def _bad_form(raw: bytes) -> InvalidEntry:
    known = raw[3] in b"cx" and raw[62] in b"vn" and raw[4:62].isdigit()
    return InvalidEntry("bad_codec", repr(chr(raw[63]))) if known else InvalidEntry("bad_header")


def _read_legacy(raw: bytes) -> Entry:
    soft_at_ms, payload = FOREVER_MS, raw
    if raw[:1] == b"{":
        try:
            wrapped = _legacy_decoder.decode(raw)
            soft_at_ms, payload = int(wrapped.stale_at * 1000), bytes(wrapped.value)
        except _UNDECODABLE:
            pass  # a bare JSON object that has other fields
    return Entry(
        version=0,
        soft_at_ms=soft_at_ms,
        hard_at_ms=FOREVER_MS,
        kind="v",
        codec="j",
        payload=payload,
        meta=_NO_META,
    )


def decompressed(entry: Entry, *, bytes_max: int) -> bytes:
    """The payload as it was before compression, at most ``bytes_max`` long.

    Raises:
        InvalidEntry: it is cut off, damaged, or would be larger.
    """
    if entry.codec in "mj":
        if len(entry.payload) > bytes_max:
            raise InvalidEntry("oversized", f"{len(entry.payload)} bytes, {bytes_max} are allowed")
        return entry.payload
    if entry.codec == "s":
        return _unzstd(entry.payload, bytes_max)
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(entry.payload, bytes_max + 1)
    except zlib.error as error:
        raise InvalidEntry("bad_value", "zlib") from error
    if len(plain) > bytes_max:
        raise _bomb(bytes_max)
    if not stream.eof or stream.unused_data:
        raise _not_whole()
    return plain


def _not_whole() -> InvalidEntry:
    return InvalidEntry("bad_value", "the compressed value is cut off or followed by garbage")


def _bomb(bytes_max: int) -> InvalidEntry:
    return InvalidEntry("oversized", f"over {bytes_max} bytes when decompressed")


class _Zstd:
    """What is used of zstandard. Contexts cost more to make than to use: idle ones are kept."""

    def __init__(self) -> None:
        import zstandard

        self.error: type[Exception] = zstandard.ZstdError
        self.size_of = zstandard.frame_content_size
        self._new = functools.partial(zstandard.ZstdDecompressor, max_window_size=_ZSTD_WINDOW_MAX)
        self.idle: list[Any] = []  # not more than threads have used at a time

    def context(self) -> Any:
        try:
            return self.idle.pop()
        except IndexError:
            return self._new()


_zstd = functools.cache(_Zstd)


def _unzstd(payload: bytes, bytes_max: int) -> bytes:
    try:
        zstd = _zstd()
    except ImportError:
        raise InvalidEntry("bad_codec", f"zstd; {pip_install('zstd')}") from None
    try:
        size = zstd.size_of(payload)
        if size > bytes_max:
            raise InvalidEntry("oversized", f"{size} bytes announced, {bytes_max} are allowed")
        context = zstd.context()
        if size < 0:  # whoever wrote it did not know
            return _unzstd_unsized(context, payload, bytes_max)
        plain: bytes = context.decompress(payload, allow_extra_data=False)
    except zstd.error as error:
        raise InvalidEntry("bad_value", "zstd") from error
    zstd.idle.append(context)
    return plain


def _unzstd_unsized(context: Any, payload: bytes, bytes_max: int) -> bytes:
    """Twice: the first way has a limit but does not see the end, the second the reverse."""
    if len(context.stream_reader(payload).read(bytes_max + 1)) > bytes_max:
        raise _bomb(bytes_max)
    stream = context.decompressobj()
    plain: bytes = stream.decompress(payload)
    if not stream.eof or stream.unused_data:
        raise _not_whole()
    return plain
