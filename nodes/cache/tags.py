"""What this node knows of tag versions.

T1  A ``TagState`` that is known is at least as new as every notice applied so far; it is
    followed through the log from the moment it was looked up.
T2  When the tag's shard was reset, its state is unknown again: entries that carry it do
    not hold until it was looked up anew, or a notice told its version. A reset while the
    server is being asked counts too.
T3  States live as long as an entry of the near cache refers to them; a few more are kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from weakref import WeakValueDictionary

from ...schemas.keys import Names

__all__ = ["TagState", "TagTable"]

_KEEP = 10_000
_UNKNOWN = 1 << 62  #: later than any version, so that no entry holds


class TagState:
    """The newest version known of one tag."""

    __slots__ = ("__weakref__", "shard", "tag", "version")

    def __init__(self, tag: str, shard: int) -> None:
        self.tag = tag
        self.shard = shard
        self.version = _UNKNOWN

    def __repr__(self) -> str:
        return f"<TagState {self.tag} {self.version if self.known else 'unknown'}>"

    @property
    def known(self) -> bool:
        return self.version != _UNKNOWN


class TagTable:
    """``capture(tags)`` asks the server for versions, making those that are missing."""

    def __init__(
        self, names: Names, capture: Callable[[Sequence[str]], Awaitable[Mapping[str, int]]]
    ) -> None:
        self._names = names
        self._capture = capture
        self._states: WeakValueDictionary[str, TagState] = WeakValueDictionary()
        self._recent: OrderedDict[str, TagState] = OrderedDict()
        self._generations = [0] * names.shards

    def __len__(self) -> int:
        return len(self._states)

    def state(self, tag: str) -> TagState:
        state = self._states.get(tag)
        if state is None:
            state = self._states[tag] = TagState(tag, self._names.shard(tag))
        self._recent[tag] = state
        self._recent.move_to_end(tag)
        if len(self._recent) > _KEEP:
            self._recent.popitem(last=False)
        return state

    def bump(self, tag: str, version: int) -> None:
        """A notice, or the server, said so."""
        state = self._states.get(tag)
        if state is not None and (not state.known or version > state.version):
            state.version = version

    def reset(self, shard: int) -> None:
        """Notices of this shard may have been missed."""
        self._generations[shard] += 1
        for state in list(self._states.values()):
            if state.shard == shard:
                state.version = _UNKNOWN

    async def versions(self, tags: Sequence[str], *, trust: bool) -> Mapping[str, int]:
        """Current versions; asks the server for the unknown ones, or for all without trust."""
        states = [self.state(tag) for tag in tags]
        asked: dict[str, int] = {}
        while missing := [
            each for each in states if each.tag not in asked and not (trust and each.known)
        ]:
            generations = [self._generations[each.shard] for each in missing]
            asked.update(await self._capture([each.tag for each in missing]))
            for state, generation in zip(missing, generations, strict=True):
                if generation == self._generations[state.shard]:
                    self.bump(state.tag, asked[state.tag])
        return {
            each.tag: max(asked.get(each.tag, 0), each.version if each.known else 0)
            for each in states
        }

    def hold_as_known(self, embedded: Mapping[str, int]) -> bool | None:
        """Whether an entry with these tag versions is valid; None if that has to be asked."""
        found: bool | None = True
        for tag, version in embedded.items():
            state = self._states.get(tag)
            if state is None or not state.known:
                found = None
            elif state.version > version:
                return False
        return found

    def hold(self, embedded: Mapping[str, int], current: Mapping[str, int]) -> bool:
        """Whether an entry with these tag versions is still valid."""
        return all(version >= current.get(tag, _UNKNOWN) for tag, version in embedded.items())
