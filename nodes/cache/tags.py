"""What this node knows of tag versions.

A tag has two: its version, which every bump raises, and the hard version, which only a hard
one does. An entry carries the versions that its tags had before its loader ran: below the
hard version it is invalid, below the version it is stale.

T1  A ``TagState`` that is known is at least as new as every notice applied so far, in whatever
    order; it is followed through the log from the moment it was looked up.
T2  When the tag's shard was reset, its state is unknown again: entries that carry it do
    not hold until it was looked up anew, or a notice told its version. A reset while the
    server is being asked counts too.
T3  States live as long as an entry of the near cache refers to them; a few more are kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from typing import Literal, NamedTuple
from weakref import WeakValueDictionary

from ...schemas.keys import Names

__all__ = ["Captured", "Standing", "TagState", "TagTable", "TagVersions", "standing"]

Standing = Literal["fresh", "stale", "invalid"]
_KEEP = 10_000
_UNKNOWN = 1 << 62  #: later than any version, so that no entry holds


class TagVersions(NamedTuple):
    version: int
    hard: int


class Captured(NamedTuple):
    """What the server said of a tag. ``made``: it had none, and got this version now; it says
    when a key of its shard was last changed, as a version, or 1.
    """

    version: int
    hard: int
    made: int = 0


class TagState:
    """The newest versions known of one tag."""

    __slots__ = ("__weakref__", "hard", "shard", "tag", "told", "version")

    def __init__(self, tag: str, shard: int) -> None:
        self.tag = tag
        self.shard = shard
        self.version = _UNKNOWN
        self.hard = _UNKNOWN
        self.told = 0  #: the newest version that a notice told, also while it is unknown

    def __repr__(self) -> str:
        return f"<TagState {self.tag} {self.version if self.known else 'unknown'}>"

    @property
    def known(self) -> bool:
        return self.version != _UNKNOWN

    @property
    def versions(self) -> TagVersions:
        return TagVersions(self.version, self.hard)


def standing(embedded: Mapping[str, int], current: Mapping[str, TagVersions]) -> Standing:
    """How an entry with these tag versions stands."""
    found: Standing = "fresh"
    for tag, version in embedded.items():
        now = current.get(tag)
        if now is None or version < now.hard:
            return "invalid"
        if version < now.version:
            found = "stale"
    return found


class TagTable:
    """``capture(tags)`` asks the server for versions, making those that are missing."""

    def __init__(
        self, names: Names, capture: Callable[[Sequence[str]], Awaitable[Mapping[str, Captured]]]
    ) -> None:
        self._names = names
        self._capture = capture
        self._states: WeakValueDictionary[str, TagState] = WeakValueDictionary()
        self._recent: OrderedDict[str, TagState] = OrderedDict()
        self._generations = [0] * names.shards

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, tag: str) -> bool:
        return tag in self._states

    def state(self, tag: str) -> TagState:
        state = self._states.get(tag)
        if state is None:
            state = self._states[tag] = TagState(tag, self._names.shard(tag))
        self._recent[tag] = state
        self._recent.move_to_end(tag)
        if len(self._recent) > _KEEP:
            self._recent.popitem(last=False)
        return state

    def bump(self, tag: str, version: int, *, soft: bool = False) -> None:
        """A notice said so."""
        state = self._states.get(tag)
        if state is None:
            return
        state.told = max(state.told, version)
        if not state.known:
            if soft:  # the hard version is not known by it, nor by an answer from before it
                self._generations[state.shard] += 1
            else:
                state.version, state.hard = state.told, version
            return
        state.version = max(state.version, version)
        if not soft:
            state.hard = max(state.hard, version)

    def reset(self, shard: int) -> None:
        """Notices of this shard may have been missed."""
        self._generations[shard] += 1
        for state in list(self._states.values()):
            if state.shard == shard:
                state.version = state.hard = _UNKNOWN

    async def versions(self, tags: Sequence[str], *, trust: bool) -> Mapping[str, TagVersions]:
        """Current versions; asks the server for the unknown ones, or for all without trust."""
        states = [self.state(tag) for tag in tags]
        asked: dict[str, Captured] = {}
        while missing := [
            each for each in states if each.tag not in asked and not (trust and each.known)
        ]:
            asked.update(await self._ask(missing))
        return {each.tag: _newest(each, asked.get(each.tag)) for each in states}

    async def discovered(
        self, tags: Sequence[str], *, since: int, traced: Container[str] = ()
    ) -> Mapping[str, int] | None:
        """Versions for an entry whose loader named these tags while it ran.

        ``since``: the server's clock, in microseconds, before it ran. None if one was bumped
        since then: what was loaded may be from before the bump. ``traced``: those that are
        only bumped where they exist; one that had to be made may have missed the change of a key.
        """
        found = await self._ask([self.state(tag) for tag in tags])
        for tag, each in found.items():
            bumped = each.version if not each.made else each.made if tag in traced else 0
            if bumped > since:
                return None
        return {tag: each.version for tag, each in found.items()}

    async def _ask(self, states: Sequence[TagState]) -> Mapping[str, Captured]:
        generations = [self._generations[each.shard] for each in states]
        found = await self._capture([each.tag for each in states])
        for state, generation in zip(states, generations, strict=True):
            if generation == self._generations[state.shard]:
                _learn(state, found[state.tag])
        return found

    def stand_as_known(self, embedded: Mapping[str, int]) -> Standing | None:
        """How an entry with these tag versions stands; None if that has to be asked."""
        current = {}
        for tag, version in embedded.items():
            state = self._states.get(tag)
            if state is not None and state.known:
                if version < state.hard:
                    return "invalid"
                current[tag] = state.versions
        return standing(embedded, current) if len(current) == len(embedded) else None


def _learn(state: TagState, found: Captured) -> None:
    if state.known:
        state.version = max(state.version, found.version)
        state.hard = max(state.hard, found.hard)
    else:
        state.version, state.hard = max(state.told, found.version), found.hard


def _newest(state: TagState, asked: Captured | None) -> TagVersions:
    known = state.versions if state.known else TagVersions(state.told, 0)
    if asked is None:
        return known
    return TagVersions(max(known.version, asked.version), max(known.hard, asked.hard))
