"""/metrics: the node's registry in the format that the scraper asks for.

M1  A scrape reads memory only: it is answered while Valkey is away.
M2  Prometheus text and OpenMetrics, plain or gzip, by the Accept headers.
"""

from __future__ import annotations

from aiohttp.typedefs import Handler
from prometheus_client import CollectorRegistry
from prometheus_client.aiohttp import make_aiohttp_handler

__all__ = ["metrics"]


def metrics(registry: CollectorRegistry) -> Handler:
    """The handler that exports this registry."""
    return make_aiohttp_handler(registry)
