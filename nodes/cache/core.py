"""What the paths of a cache pass to each other, and what all caches of a node share."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Generic, Literal, Protocol, TypeVar

from msgspec import Struct

from ...coordinator.background import BackgroundTasks
from ...coordinator.clock import Clock, ServerClock
from ...coordinator.instruments import Instruments
from ...coordinator.log.follower import Follower
from ...coordinator.valkey.link import Commands
from ...schemas.entry import Entry
from ...schemas.notices import Notice
from .shared import SharedTier
from .tags import TagTable
from .waits import KeyWaits

__all__ = ["Core", "Hit", "Lease", "LoadCall", "Tier"]

T = TypeVar("T")
Tier = Literal["near", "shared", "source"]


class Pace(Protocol):
    """Returns when the cluster lets so many more of this name begin."""

    async def __call__(self, name: str, count: int, *, per_second: float, burst: int) -> None: ...


class Core(Struct, kw_only=True):
    """What all caches of a node share."""

    node_id: str
    commands: Commands
    shared: SharedTier
    tags: TagTable
    follower: Follower
    waits: KeyWaits
    tasks: BackgroundTasks
    clock: Clock
    server_clock: ServerClock
    instruments: Instruments
    rng: random.Random
    ids: Callable[[], str]
    invalidate: Callable[[Sequence[str], Sequence[str]], Awaitable[None]]
    hear: Callable[[int, Notice], None]  #: a version and a notice of this node's own
    pace: Pace
    behind: Callable[[Sequence[str]], Sequence[str]]  #: the keys, and what they depend on


class Hit(Struct, Generic[T], frozen=True):
    """A value and where it is from."""

    value: T
    tier: Tier
    version: int
    age_ms: int | None  #: None: unknown, another service stored it
    stale: bool = False
    size: int = 0


class LoadCall(Struct, Generic[T], frozen=True):
    """A call of the loader: how to make it, and which tags its value carries."""

    run: Callable[[], Awaitable[T]]
    tags: Sequence[str] = ()
    waits: Callable[[], None] | None = None  #: told when the load has to wait for another


class Lease(Struct, frozen=True):
    """The right to fill a key, with the tag versions that its value will carry."""

    key: str
    token: str
    tags: Mapping[str, int]
    since: int  #: the server's clock before the loader runs, in microseconds
    previous: Entry | None = None  #: what is stored, and will not do
