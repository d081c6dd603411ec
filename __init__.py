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
    "ConfigError",
    "CoordinationError",
    "DeadLettered",
    "FatalSinkError",
    "ForebayError",
    "InvalidEvent",
    "InvalidKey",
    "InvalidLock",
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
    "RequestScopeMiddleware",
    "SourceFailing",
    "SqlSink",
    "StaleToken",
    "StartupError",
    "TransientSinkError",
    "Unavailable",
    "Unconfirmed",
    "Write",
    "__version__",
    "loading",
    "request_scope",
    "request_scope_middleware",
]

if TYPE_CHECKING:
    from .coordinator.lease import Lease
    from .nodes.cache.loading import Loading, loading
    from .nodes.cache.scope import request_scope
    from .nodes.node import Node
    from .nodes.sinks.base import Write
    from .nodes.sinks.sql import SqlSink
    from .nodes.web.aiohttp_middleware import request_scope_middleware
    from .nodes.web.asgi import RequestScopeMiddleware
    from .schemas.errors import (
        Backpressure,
        ConfigError,
        CoordinationError,
        DeadLettered,
        FatalSinkError,
        ForebayError,
        InvalidEvent,
        InvalidKey,
        KeyBusy,
        LoaderError,
        PartialFailure,
        PoisonSinkError,
        SourceFailing,
        StartupError,
        TransientSinkError,
        Unavailable,
        Unconfirmed,
    )
    from .schemas.lock_errors import (
        InvalidLock,
        LeaseLost,
        LockNotAcquired,
        LockNotHeld,
        StaleToken,
    )

_HOMES = {
    "InvalidLock": ".schemas.lock_errors",
    "Lease": ".coordinator.lease",
    "LeaseLost": ".schemas.lock_errors",
    "Loading": ".nodes.cache.loading",
    "LockNotAcquired": ".schemas.lock_errors",
    "LockNotHeld": ".schemas.lock_errors",
    "Node": ".nodes.node",
    "RequestScopeMiddleware": ".nodes.web.asgi",
    "SqlSink": ".nodes.sinks.sql",
    "StaleToken": ".schemas.lock_errors",
    "Write": ".nodes.sinks.base",
    "loading": ".nodes.cache.loading",
    "request_scope": ".nodes.cache.scope",
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
