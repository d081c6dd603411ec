from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from support.limiters import House, house_of
from support.valkey_server import ValkeyServer


@pytest.fixture
async def house(valkey_server: ValkeyServer, namespace: str) -> AsyncIterator[House]:
    async with house_of(valkey_server, namespace) as made:
        yield made
