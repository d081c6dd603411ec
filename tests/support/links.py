"""Links and pubsubs to test servers, with limits short enough to wait for."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio

from forebay.coordinator.clock import Clock, SystemClock
from forebay.coordinator.valkey.breaker import Breaker
from forebay.coordinator.valkey.dialer import Dialer
from forebay.coordinator.valkey.link import Link
from forebay.coordinator.valkey.pubsub import PubSub
from forebay.schemas.settings import Secret, Valkey
from forebay.schemas.urls import Endpoint, parse_url

#: Reconnects at once, and gives up soon.
SPEEDY: dict[str, Any] = {
    "command_timeout_ms": 2_000,
    "connect_timeout_ms": 1_000,
    "reconnect_jitter_ms": 5,
    "reconnect_max_ms": 40,
    "breaker_recovery_ms": 100,
}


def endpoint_at(url: str, *, username: str = "", password: str = "") -> Endpoint:
    found = parse_url(url, setting="valkey.url", origin="the test")
    return Endpoint(
        scheme=found.scheme,
        host=found.host,
        port=found.port,
        path=found.path,
        db=found.db,
        tls=found.tls,
        username=username,
        password=Secret(password),
    )


def dialer_to(url: str, *, username: str = "", password: str = "", **options: Any) -> Dialer:
    endpoint = endpoint_at(url, username=username, password=password)
    return Dialer(endpoint, Valkey(**SPEEDY | options), "forebay-test")


def link_to(
    url: str,
    *,
    kind: type[Link] = Link,
    username: str = "",
    password: str = "",
    clock: Clock | None = None,
    **options: Any,
) -> Link:
    clock = clock or SystemClock()
    settings = Valkey(**SPEEDY | options)
    return kind(
        Dialer(endpoint_at(url, username=username, password=password), settings, "forebay-test"),
        settings,
        name="test",
        clock=clock,
        rng=random.Random(1),
        breaker=Breaker(
            "test",
            failures=settings.breaker_failures,
            recovery_ms=settings.breaker_recovery_ms,
            clock=clock,
        ),
    )


def doorbell_to(
    url: str, *, interval_s: float = 1.0, username: str = "", password: str = "", **options: Any
) -> PubSub:
    return PubSub(
        dialer_to(url, username=username, password=password, **options),
        Valkey(**SPEEDY | options),
        clock=SystemClock(),
        rng=random.Random(1),
        interval_s=interval_s,
    )


@asynccontextmanager
async def running(*loops: Link | PubSub, ready: bool = True) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        for loop in loops:
            await tasks.start(loop.run)
            if ready:
                await loop.ready()
        try:
            yield
        finally:
            for loop in loops:
                await loop.aclose()
