"""Compression: the chosen format is written, and all formats are read."""

from __future__ import annotations

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.nodes.values.codec import PackedCodec, ValueCodec, compressor
from forebay.schemas.entry import Entry, EntryMeta, read_entry
from forebay.schemas.errors import ConfigError
from forebay.schemas.settings import CacheDefaults, Compression

LIMIT = 4_000
HEADER = b"\xfbE1c" + b"%016d%013d%013d%016d" % (7, 1, 2, 0)
LETTERS = {"zlib": "z", "zstd": "s", "none": "m"}
NOISE = random.Random(1).randbytes(300)


def codec_of(compression: Any, *, over: int = 100) -> ValueCodec[Any]:
    return ValueCodec(Any, bytes_max=LIMIT, compress_over_bytes=over, compression=compression)


def stored(codec: ValueCodec[Any], value: Any) -> Entry:
    return read_entry(HEADER + codec.tail(codec.pack(value), EntryMeta()), bytes_max=LIMIT)


@pytest.mark.parametrize("compression", get_args(Compression))
def test_the_chosen_compression_is_written(compression: str) -> None:
    """A payload over the threshold is compressed as chosen if it becomes smaller; otherwise it
    stays unchanged.
    """
    codec = codec_of(compression)
    assert stored(codec, "a" * 500).codec == LETTERS[compression]
    assert stored(codec, "a" * 50).codec == "m"
    assert stored(codec, NOISE).codec == "m"


@given(st.text(max_size=300), st.integers(1, 5), st.sampled_from(get_args(Compression)))
def test_every_choice_reads_all_formats(text: str, times: int, compression: str) -> None:
    """V4: nodes with different compression settings read each other's entries."""
    value = text * times
    entry = stored(codec_of(compression, over=0), value)
    assert [codec_of(each).value(entry) for each in get_args(Compression)] == [value] * 3


def test_zlib_is_the_default() -> None:
    """The default compression needs no optional dependency."""
    assert CacheDefaults().compression == "zlib"
    codec = ValueCodec[Any](Any, bytes_max=LIMIT, compress_over_bytes=100)
    assert stored(codec, "a" * 500).codec == "z"


@pytest.mark.parametrize("kind", [ValueCodec, PackedCodec])
def test_missing_zstd_is_reported_at_once(kind, monkeypatch) -> None:
    """C1: the error names the setting, its value and the fix."""
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigError, match=r"cache\.compression = zstd .* 'forebay\[zstd\]'"):
        kind(int, bytes_max=LIMIT, compress_over_bytes=100, compression="zstd")
    assert compressor("zlib") is not None


def test_an_unknown_compression_is_refused() -> None:
    """C1: a codec made without settings checks the value too."""
    with pytest.raises(ConfigError, match="lz4"):
        compressor("lz4")  # type: ignore[arg-type]


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_one_codec_serves_several_threads(compression: str) -> None:
    """C2: concurrent compressions give the same result."""
    codec = codec_of(compression)
    payload = codec.pack([*range(900)])
    with ThreadPoolExecutor(4) as pool:
        tails = set(pool.map(lambda _: codec.tail(payload, EntryMeta()), range(200)))
    assert len(tails) == 1


async def test_the_near_cache_counts_uncompressed_sizes(make_node) -> None:
    """Near N3, N4: loaded and read values count with their size before compression."""
    defaults = CacheDefaults(compress_over_bytes=100, near_value_bytes_max=2_000)
    nodes = [make_node(cache=defaults) for _ in range(2)]
    for node in nodes:

        @node.cached("text:{id}", ttl=600)
        async def text(id: int) -> str:
            return "x" * (1_000 * id)

        node.text = text
    async with nodes[0], nodes[1]:
        for node in nodes:
            assert [len(await node.text(n)) for n in (1, 3)] == [1_000, 3_000]
        loaded, read = (node.text._cache.path.near.statistics() for node in nodes)
        assert (read.entries, read.bytes) == (loaded.entries, loaded.bytes)
        assert (read.entries, read.oversized) == (1, 1)
        assert 1_000 < read.bytes < 2_000
