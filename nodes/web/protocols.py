"""The interface between the endpoint and the node that it serves, and the handlers' context.

I1  ``checks`` reads memory only: a probe is answered even while Valkey is away.
I2  ``publish`` gets well-formed events; it stores all of them in their order, or raises. It checks
    them against the declared sinks, and against the types of values of the node's caches.
I3  ``stats``, ``explain`` and ``read`` keep their own deadlines, and raise errors of
    schemas/errors.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Literal, Protocol

from aiohttp import web
from msgspec import Struct
from prometheus_client import CollectorRegistry

from ...coordinator.clock import Clock
from ...coordinator.instruments import Instruments
from ...coordinator.limits.limiter import Limiter
from ...schemas.errors import ForebayError
from ...schemas.settings import Http
from ..explain.document import Explanation
from .lock_service import LockService

Gate = Literal["live", "ready", "start"]
State = Literal["pass", "warn", "fail"]


class Check(Struct, frozen=True, kw_only=True):
    """One health check, and the probes that fail with it; without gates it is only shown."""

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
    """Locks and limits of a node with the coordinator role, for programs that are not nodes."""

    locks: LockService
    limits: Limiter


class Served(Protocol):
    @property
    def instance(self) -> str: ...

    @property
    def namespace(self) -> str: ...

    @property
    def registry(self) -> CollectorRegistry: ...

    def checks(self) -> Sequence[Check]: ...

    async def stats(self) -> dict[str, object]: ...

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
            Backpressure: too many requests. Unavailable: Valkey did not answer.
        """
        ...

    async def read(self, key: str) -> Read | None:
        """The value of this key; None if no cache of this node declares it.

        Raises:
            LoaderError: the loader failed, and nothing stale could be served.
            Unavailable: Valkey did not answer, and the cache requires it.
        """
        ...

    async def read_many(self, keys: Sequence[str]) -> list[Read | ForebayError | None]:
        """Like ``read``, for many keys, in their order; a key that failed has its error."""
        ...


class Context(Struct, frozen=True, kw_only=True):
    """What the handlers of one endpoint share."""

    served: Served
    instruments: Instruments
    http: Http
    event_bytes_max: int
    read_body: Callable[[web.Request], Awaitable[bytes | web.Response]]
    event_loop_check: Callable[[], Check]
    random: Random
    clock: Clock
    coordination: Coordination | None  #: only on nodes with the coordinator role


CONTEXT = web.AppKey("context", Context)
