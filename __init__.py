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
    "DeadLettered",
    "FatalSinkError",
    "ForebayError",
    "InvalidEvent",
    "InvalidKey",
    "InvalidValue",
    "KeyBusy",
    "LoaderError",
    "Loading",
    "Node",
    "PartialFailure",
    "PoisonSinkError",
    "RequestScopeMiddleware",
    "SourceFailing",
    "SqlSink",
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
        SourceFailing,
        StartupError,
        TransientSinkError,
        Unavailable,
        Unconfirmed,
    )

_HOMES = {
    "Loading": ".nodes.cache.loading",
    "Node": ".nodes.node",
    "RequestScopeMiddleware": ".nodes.web.asgi",
    "SqlSink": ".nodes.sinks.sql",
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
