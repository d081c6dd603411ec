"""Nodes inside the process of the test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import forebay
from forebay.schemas.settings import NodeSettings, Settings, Valkey
from support.valkey_server import ValkeyServer

MakeNode = Callable[..., forebay.Node]


@pytest.fixture
def make_node(valkey_server: ValkeyServer, namespace: str) -> MakeNode:
    """A node of four shards on the test's server; sections of settings may be given."""

    def make(name: str = namespace, **sections: Any) -> forebay.Node:
        given = {"valkey": Valkey(url=valkey_server.socket_url), "node": NodeSettings(shards=4)}
        return forebay.Node(name, settings=Settings(**{**given, **sections}))

    return make
