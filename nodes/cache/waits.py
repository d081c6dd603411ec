"""Waiting until something is said of a key: how a node waits for another node's load.

W1  A watch that was begun before the question was asked misses no answer.
W2  A wake-up is a hint: the waiter looks again, and also when its time is up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import anyio

__all__ = ["KeyWaits"]


class KeyWaits:
    def __init__(self) -> None:
        self._watched: dict[str, tuple[anyio.Event, int]] = {}

    def __len__(self) -> int:
        return len(self._watched)

    @contextmanager
    def watch(self, key: str) -> Iterator[anyio.Event]:
        """An event that is set by the next notice for the key."""
        event, watchers = self._watched.get(key, (anyio.Event(), 0))
        self._watched[key] = event, watchers + 1
        try:
            yield event
        finally:
            current, watchers = self._watched.get(key, (event, 0))
            if current is event:
                if watchers > 1:
                    self._watched[key] = event, watchers - 1
                else:
                    self._watched.pop(key, None)

    def wake(self, key: str) -> None:
        if found := self._watched.pop(key, None):
            found[0].set()
