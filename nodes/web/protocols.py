"""What the endpoint asks of the node that it serves, and nothing more.

I1  ``checks`` reads memory only: a probe is answered even while Valkey is away.
I2  ``publish`` gets events that were read and found good as such; it stores all of them in their
    order, or raises. It knows which sinks there are, and what values the caches of the node hold.
I3  ``stats``, ``explain`` and ``read`` keep their own deadlines, and raise errors of
    schemas/errors.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from msgspec import Struct
from prometheus_client import CollectorRegistry

from ...coordinator.instruments import Instruments
from ...coordinator.limits.limiter import Limiter
from ...schemas.errors import ForebayError
from ..explain.document import Explanation
from .lock_service import LockService

__all__ = ["Check", "Coordination", "Gate", "Read", "Served", "State"]

Gate = Literal["live", "ready", "start"]
State = Literal["pass", "warn", "fail"]


class Check(Struct, frozen=True, kw_only=True):
    """One thing that is looked at, and which probes fail with it; none: it is only shown."""

    name: str
    state: State
    detail: str = ""
    gates: frozenset[Gate] = frozenset()


class Read(Struct, frozen=True, kw_only=True):
    """A value as this node's cache serves it now."""

    json: bytes  #: ``null`` when negative
    tier: str
    age_ms: int | None  #: None: unknown
    stale: bool
    version: int
    negative: bool = False  #: the source is known not to have it


class Coordination(Struct, frozen=True, kw_only=True):
    """What a node with the coordinator role has for programs that are no node."""

    locks: LockService
    limits: Limiter


class Served(Protocol):
    @property
    def instance(self) -> str: ...

    @property
    def namespace(self) -> str: ...

    @property
    def registry(self) -> CollectorRegistry: ...

    @property
    def instruments(self) -> Instruments: ...

    def checks(self) -> Sequence[Check]: ...

    async def stats(self) -> dict[str, object]: ...

    def coordination(self) -> Coordination | None:
        """None: this node has not that role. Asked once for each endpoint."""
        ...

    async def publish(self, events: Sequence[bytes]) -> list[str]:
        """The stream ids of these events.

        Raises:
            Backpressure: the stream is full.
            Unavailable: Valkey did not answer.
            InvalidEvent: one can never be applied; its field begins with ``events[N]``.
        """
        ...

    async def explain(self, key: str) -> Explanation:
        """Why a read of this key hits or misses.

        Raises:
            Backpressure: too many ask. Unavailable: Valkey did not answer.
        """
        ...

    async def read(self, key: str) -> Read | None:
        """The value of this key; None if no cache of this node declares it.

        Raises:
            LoaderError: the loader failed, and nothing stale could be served.
            Unavailable: Valkey did not answer, and the cache may not do without.
        """
        ...

    async def read_many(self, keys: Sequence[str]) -> list[Read | ForebayError | None]:
        """As ``read``, of many keys at once, in their order; an error stands in its key's place."""
        ...
