"""How large values are made smaller before they are stored.

The choice is for what is written: ``schemas.entry`` reads all forms whatever it is.

C1  What is not there is said when a cache is declared to use it, not at its first large value.
C2  Usable from several threads. A zstd context is not, and costs 8 us to make: idle ones are kept.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

from ...schemas.entry import Codec
from ...schemas.errors import ConfigError
from ...schemas.extras import pip_install
from ...schemas.settings import Compression

__all__ = ["compressor"]

_LEVEL = 1  #: of both: values are read soon, and stored for minutes


def compressor(chosen: Compression) -> tuple[Codec, Callable[[bytes], bytes]] | None:
    """The codec's letter and its function; None: nothing is compressed.

    Raises:
        ConfigError: what is chosen is not installed.
    """
    match chosen:
        case "none":
            return None
        case "zlib":
            return "z", functools.partial(zlib.compress, level=_LEVEL)
        case "zstd":
            return "s", _zstd()
        case _:
            raise _unusable(chosen, "is no way of compression", "choose zlib, zstd or none")


def _zstd() -> Callable[[bytes], bytes]:
    try:
        import zstandard
    except ImportError:
        raise _unusable(
            "zstd", "zstandard is not installed", f"{pip_install('zstd')}, or choose zlib"
        ) from None

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
