"""An endpoint on a real socket, over a fake node whose answers the test sets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from random import Random

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from forebay.coordinator.clock import SystemClock
from forebay.coordinator.instruments import Instruments
from forebay.nodes.explain.document import (
    EntryState,
    Explanation,
    LeaseState,
    LogState,
    NodesState,
)
from forebay.nodes.web.protocols import Check, Read
from forebay.nodes.web.server import EndpointAddress, serve
from forebay.schemas.errors import ForebayError
from forebay.schemas.settings import Http
from support import programs

Listening = Callable[[Http], AbstractAsyncContextManager[EndpointAddress]]


class FakeNode:
    """A fake node: it returns the values that the test has set."""

    def __init__(self) -> None:
        self.instance = "node-1"
        self.namespace = "shop"
        self.registry = CollectorRegistry()
        self.instruments = Instruments(self.registry, version="0.1.0")
        self.listed: list[Check] = []
        self.values: dict[str, Read | Exception] = {}
        self.published: list[bytes] = []
        self.failure: Exception | None = None

    def checks(self) -> Sequence[Check]:
        return self.listed

    async def stats(self) -> dict[str, object]:
        if self.failure is not None:
            raise self.failure
        return {"version": "0.1.0", "uptime_s": 1.5, "keys": {"entries": 3}}

    async def publish(self, events: Sequence[bytes]) -> list[str]:
        if self.failure is not None:
            raise self.failure
        self.published += events
        return [f"7-{index}" for index, _ in enumerate(events)]

    async def explain(self, key: str) -> Explanation:
        if self.failure is not None:
            raise self.failure
        return Explanation(
            verdict=f"{key} would be loaded",
            key=key,
            namespace="shop",
            shard=1,
            shards=4,
            cache_version="0",
            server="valkey 9.1.2",
            entry=EntryState(),
            lease=LeaseState(),
            log=LogState(),
            nodes=NodesState(),
        )

    async def read(self, key: str) -> Read | None:
        found = self.values.get(key)
        if isinstance(found, Exception):
            raise found
        return found

    async def read_many(self, keys: Sequence[str]) -> list[Read | ForebayError | None]:
        found = [self.values.get(key) for key in keys]
        return [each if not isinstance(each, Exception) else _ours(each) for each in found]


def _ours(error: Exception) -> ForebayError:
    assert isinstance(error, ForebayError)
    return error


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def fake_node() -> FakeNode:
    return FakeNode()


@pytest.fixture
def listening(fake_node: FakeNode) -> Listening:
    """Opens an endpoint with these settings, on a free port of the loopback."""

    def opened(http: Http) -> AbstractAsyncContextManager[EndpointAddress]:
        clock, random = SystemClock(), Random(7)
        return serve(
            fake_node,
            http,
            instruments=fake_node.instruments,
            event_bytes_max=65_536,
            clock=clock,
            random=random,
        )

    return opened


@pytest.fixture
async def endpoint(listening: Listening) -> AsyncIterator[EndpointAddress]:
    http = Http(port=0, body_bytes_max=100_000, header_timeout_ms=10_000)
    async with listening(http) as address:
        yield address


@pytest.fixture
async def client(endpoint: EndpointAddress) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(endpoint.url) as session:
        yield session


@pytest.fixture
def tool() -> Callable[[str], str]:
    """The path of a program; without it CI fails, and elsewhere the test is skipped."""
    return programs.tool
