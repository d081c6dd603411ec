"""A cache that a whole cluster of services shares on Valkey, kept right by events.

The public face: what is listed here is what a service imports, and nothing else is promised.
Names are loaded when they are first asked for, so that importing ``forebay`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "Backpressure",
    "BusySinkError",
    "ConfigError",
    "CoordinationError",
    "DeadLettered",
    "FatalSinkError",
    "ForebayError",
    "InvalidEvent",
    "InvalidKey",
    "InvalidLimit",
    "InvalidLock",
    "InvalidValue",
    "KeyBusy",
    "Lease",
    "LeaseLost",
    "LoaderError",
    "Loading",
    "LockNotAcquired",
    "LockNotHeld",
    "Node",
    "PartialFailure",
    "PoisonSinkError",
    "RateLimitMiddleware",
    "RateLimited",
    "RequestScopeMiddleware",
    "ServerRefused",
    "SinkError",
    "SlotLost",
    "SourceFailing",
    "SqlSink",
    "StaleToken",
    "StartupError",
    "TransientSinkError",
    "Unavailable",
    "Unconfirmed",
    "UnknownReservation",
    "Verdict",
    "Write",
    "__version__",
    "loading",
    "rate_limit_middleware",
    "request_scope",
    "request_scope_middleware",
]

if TYPE_CHECKING:
    from .coordinator.locks.lease import Lease
    from .nodes.cache.loading import Loading, loading
    from .nodes.node import Node
    from .nodes.request_scope import request_scope
    from .nodes.sinks.base import Write
    from .nodes.sinks.sql import SqlSink
    from .nodes.web.aiohttp_middleware import rate_limit_middleware, request_scope_middleware
    from .nodes.web.asgi import RateLimitMiddleware, RequestScopeMiddleware
    from .schemas.errors import (
        Backpressure,
        BusySinkError,
        ConfigError,
        CoordinationError,
        DeadLettered,
        FatalSinkError,
        ForebayError,
        InvalidEvent,
        InvalidKey,
        InvalidValue,
        KeyBusy,
        LoaderError,
        PartialFailure,
        PoisonSinkError,
        ServerRefused,
        SinkError,
        SourceFailing,
        StartupError,
        TransientSinkError,
        Unavailable,
        Unconfirmed,
    )
    from .schemas.errors_limits import InvalidLimit, RateLimited, SlotLost, UnknownReservation
    from .schemas.errors_locks import (
        InvalidLock,
        LeaseLost,
        LockNotAcquired,
        LockNotHeld,
        StaleToken,
    )
    from .schemas.limits import Verdict

_HOMES = {
    "InvalidLimit": ".schemas.errors_limits",
    "InvalidLock": ".schemas.errors_locks",
    "Lease": ".coordinator.locks.lease",
    "LeaseLost": ".schemas.errors_locks",
    "Loading": ".nodes.cache.loading",
    "LockNotAcquired": ".schemas.errors_locks",
    "LockNotHeld": ".schemas.errors_locks",
    "Node": ".nodes.node",
    "RateLimitMiddleware": ".nodes.web.asgi",
    "RateLimited": ".schemas.errors_limits",
    "RequestScopeMiddleware": ".nodes.web.asgi",
    "SlotLost": ".schemas.errors_limits",
    "SqlSink": ".nodes.sinks.sql",
    "StaleToken": ".schemas.errors_locks",
    "UnknownReservation": ".schemas.errors_limits",
    "Verdict": ".schemas.limits",
    "Write": ".nodes.sinks.base",
    "loading": ".nodes.cache.loading",
    "rate_limit_middleware": ".nodes.web.aiohttp_middleware",
    "request_scope": ".nodes.request_scope",
    "request_scope_middleware": ".nodes.web.aiohttp_middleware",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(
        importlib.import_module(_HOMES.get(name, ".schemas.errors"), __name__), name
    )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
