"""What the handlers of one endpoint share."""

from __future__ import annotations

from random import Random

from aiohttp import web
from msgspec import Struct

from ...coordinator.clock import Clock
from ...schemas.settings import Http
from .bodies import Bodies
from .heartbeat import Heartbeat
from .protocols import Coordination, Served

__all__ = ["CONTEXT", "Context"]


class Context(Struct, frozen=True, kw_only=True):
    served: Served
    http: Http
    event_bytes_max: int
    bodies: Bodies
    heartbeat: Heartbeat
    random: Random
    clock: Clock
    coordination: Coordination | None  #: only on nodes with the coordinator role


CONTEXT = web.AppKey("context", Context)
