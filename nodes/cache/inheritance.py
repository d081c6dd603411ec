"""What an entry inherits from what it depends on: the tags that those entries carry.

Y1  Whatever a loader has named for an entry, its tags and what it depends on, holds for what
    depends on that entry too, through any number of them: each has stored what it inherited.
Y2  Only what is stored can be inherited: an entry that is not there, or cannot be read, passes
    nothing on but what is declared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress

from ...schemas.entry import read_entry
from ...schemas.errors import InvalidEntry
from ...schemas.keys import depended_on
from .shared import SharedTier

__all__ = ["inherited"]


async def inherited(tags: Iterable[str], shared: SharedTier) -> set[str]:
    """The tags of all stored entries that these tags say are depended on.

    Raises:
        Unavailable, ServerRefused: they cannot be asked for.
    """
    keys = [key for tag in tags if (key := depended_on(tag)) is not None]
    found: set[str] = set()
    for raw in await asyncio.gather(*[shared.get(key) for key in keys]):
        if raw:
            with suppress(InvalidEntry):
                found.update(read_entry(raw, bytes_max=len(raw)).meta.tags)
    return found
