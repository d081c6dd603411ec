"""Opens a workshop on the tests' server."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from support.valkey_server import ValkeyServer
from support.workers import Workshop, workshop

OpenShop = Callable[..., AbstractAsyncContextManager[Workshop]]


@pytest.fixture
def open_shop(valkey_server: ValkeyServer, namespace: str) -> OpenShop:
    """``async with open_shop(sinks={"flight:{id}": Table()}) as shop:``"""

    def opened(**options: Any) -> AbstractAsyncContextManager[Workshop]:
        return workshop(valkey_server, namespace, **options)

    return opened
