"""Nodes on a real server, and a source that counts its calls."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

import forebay
from forebay.nodes.cache.cached import Cached
from forebay.schemas.settings import (
    CacheDefaults,
    Http,
    Limits,
    NodeSettings,
    Settings,
    Valkey,
    Workers,
)
from support.eventually import until
from support.valkey_server import ValkeyServer


class Source:
    """The table of values that loaders read; its answers can be held back."""

    def __init__(self) -> None:
        self.values: dict[Any, Any] = {}
        self.asked: list[Any] = []
        self.error: BaseException | None = None
        self.before: Callable[[], Awaitable[object]] | None = None
        self.began = anyio.Event()
        self._gate = anyio.Event()
        self._gate.set()

    @property
    def loads(self) -> int:
        return len(self.asked)

    def hold(self) -> None:
        """Hold back the answers from now on; each answer has the value of the time of its call."""
        self.began, self._gate = anyio.Event(), anyio.Event()

    def let_go(self) -> None:
        self._gate.set()

    async def get(self, key: Any) -> Any:
        self.asked.append(key)
        value, error, gate = self.values.get(key), self.error, self._gate
        self.began.set()
        if self.before is not None:
            await self.before()
        await gate.wait()
        if error is not None:
            raise error
        return value


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def make_node(valkey_server: ValkeyServer, namespace: str):
    """Nodes of one namespace: ``make_node(lease_ms=500)`` sets settings of the cache."""

    def make(
        server: ValkeyServer | None = None,
        *,
        limits: Limits | None = None,
        workers: bool = False,
        **cache: Any,
    ) -> forebay.Node:
        where = Valkey(
            url=(server or valkey_server).socket_url,
            command_timeout_ms=30_000 if server is None else 250,
            reconnect_jitter_ms=5,
            reconnect_max_ms=40,
            breaker_recovery_ms=100,
        )
        return forebay.Node(
            settings=Settings(
                node=NodeSettings(namespace=namespace, shards=4),
                valkey=where,
                http=Http(enabled=False),
                workers=Workers(enabled=workers),
                cache=CacheDefaults(**cache),
                limits=limits or Limits(),
            )
        )

    return make


@pytest.fixture
def eventually():
    return until


@pytest.fixture
def grow_old(valkey_server: ValkeyServer):
    """Age a stored entry by some seconds, as these caches see it."""

    def grow(key: str, seconds: float, *caches: Cached[Any, Any]) -> None:
        name = caches[0]._cache.path.shared.names.entry(key)
        raw = valkey_server.execute("GET", name)
        for start, end in ((20, 33), (33, 46)):  # soft_at_ms and hard_at_ms, see entry.py
            at_ms = max(0, int(raw[start:end]) - int(seconds * 1000))
            raw = raw[:start] + b"%013d" % at_ms + raw[end:]
        valkey_server.execute("SET", name, raw, "KEEPTTL")
        for cached in caches:
            cached._cache.path.near.clear()

    return grow
