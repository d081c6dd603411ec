"""What the contract tests share: a backend of each kind, and a desk with the scripts on it.

``backend_flavour`` (tests/conftest.py) makes three of every test: an embedded Valkey, fakeredis,
and Debian's redis-server. Where CI runs, a missing server program fails the test.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from forebay.coordinator.valkey.backend import Backend
from forebay.schemas.settings import Valkey
from support.scripts import Desk

Unless = Callable[[str], None]


@pytest.fixture
async def backend(backend_settings: Valkey, namespace: str) -> AsyncIterator[Backend]:
    async with Backend(backend_settings, client_name="test", fake_name=namespace) as backend:
        yield backend


@pytest.fixture
def desk(backend: Backend, namespace: str) -> Desk:
    return Desk(backend.link, namespace)


@pytest.fixture
def not_on_fake(backend_flavour: str) -> Unless:
    """``not_on_fake("why")`` skips the test there: what fakeredis cannot do, with the reason."""

    def unless(reason: str) -> None:
        if backend_flavour == "fake":
            pytest.skip(f"fakeredis {reason}")

    return unless
