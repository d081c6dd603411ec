"""When entries will be gone, as far as one node knows: what makes their absence no wonder.

J1  An absence is explained only by the newest that is known of the key: an invalidation, or
    the end of the entry's lifetime. Coalescer order what comes in by different ways.
J2  Of the ``known_max`` keys learned of last; of others nothing is known.
"""

from __future__ import annotations

from ...schemas.entry import FOREVER_MS
from ...schemas.notices import Changed, Dropped, Extended, Notice

__all__ = ["Lifetimes"]

_KNOWN_MAX = 100_000  #: some 30 MB
_SLACK_MS = 100  #: how far our idea of the server's time may be off


class Lifetimes:
    __slots__ = ("_ends", "_known_max")

    def __init__(self, known_max: int = _KNOWN_MAX) -> None:
        self._ends: dict[str, tuple[int, int]] = {}  # version; milliseconds, server's clock
        self._known_max = known_max

    def __len__(self) -> int:
        return len(self._ends)

    def __repr__(self) -> str:
        return f"<Lifetimes of {len(self)} keys>"

    def notice(self, version: int, notice: Notice) -> None:
        """What a notice says of them. A soft drop leaves the entries where they are."""
        match notice:
            case Changed(key=key):
                self._learn(key, version, FOREVER_MS)  # until the entry was looked at
            case Dropped(keys=keys, soft=False):
                for key in keys:
                    self._learn(key, version, 0)
            case Extended(key=key, hard_ms=hard_ms):
                self._learn(key, version, version // 1000 + hard_ms)

    def entry(self, key: str, version: int, gone_at_ms: int) -> None:
        """What the entry says itself, which is more than the notice of the same version."""
        known = self._ends.get(key)
        if known is None or known[0] <= version:
            self._keep(key, version, gone_at_ms)

    def explain(self, key: str, now_ms: float) -> bool:
        """Whether it is no wonder that there is no entry of this key."""
        known = self._ends.get(key)
        return known is not None and known[1] <= now_ms + _SLACK_MS

    def clear(self) -> None:
        self._ends.clear()

    def _learn(self, key: str, version: int, gone_at_ms: int) -> None:
        known = self._ends.get(key)
        if known is None or known[0] < version:
            self._keep(key, version, gone_at_ms)

    def _keep(self, key: str, version: int, gone_at_ms: int) -> None:
        self._ends.pop(key, None)  # so that it is the newest
        self._ends[key] = version, gone_at_ms
        if len(self._ends) > self._known_max:
            del self._ends[next(iter(self._ends))]
