"""Reads the limits anew while `forebay run` runs: on SIGHUP, and when the file is another.

W1  A file that cannot be used, or is gone, changes nothing; a line in the log says why, once.
W2  A change counts within ``LOOK_S`` or so, also where the file is a link that is turned.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import structlog

from ...schemas.errors import ForebayError

__all__ = ["reloads", "watch"]

log = structlog.get_logger(__name__)

LOOK_S = 2.0
Stamp = tuple[int, int, int] | None


@contextmanager
def reloads(reload: Callable[[], list[str]]) -> Iterator[Callable[[], None]]:
    """SIGHUP does what the value given does: read the limits anew, and tell what came of it."""

    def told() -> None:
        try:
            log.info("limits.reloaded", changed=reload())
        except ForebayError as error:
            log.error("limits.not_reloaded", reason=str(error))
        except Exception:  # a fault here must not end the node
            log.exception("limits.not_reloaded")

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, told)
    try:
        yield told
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


async def watch(path: Path, changed: Callable[[], None], *, look_s: float = LOOK_S) -> None:
    """Call ``changed`` each time the file is another than before, until cancelled."""
    known = _stamp(path)
    while True:
        await anyio.sleep(look_s)
        if (found := _stamp(path)) != known:
            known = found
            changed()


def _stamp(path: Path) -> Stamp:
    """None: it is not there, or may not be looked at."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
