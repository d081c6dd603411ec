"""Importing modules while an event loop runs.

M1  A module that is not loaded yet is imported in a thread: importing a web server or a database
    driver takes a few hundred milliseconds, and a loop blocked for so long misses its deadlines.
"""

from __future__ import annotations

import importlib
import sys

import anyio.to_thread

__all__ = ["load"]


async def load(*names: str, optional: bool = False) -> None:
    """Import these modules, by their full names; none of them twice.

    ``optional``: one that is not installed is left out.

    Raises:
        ImportError: one cannot be imported, and is not optional.
    """
    missing = [name for name in names if name not in sys.modules]
    if missing:
        await anyio.to_thread.run_sync(_import, missing, optional)


def _import(names: list[str], optional: bool) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            if not optional:
                raise
