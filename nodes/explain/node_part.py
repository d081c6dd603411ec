"""Explaining on one node: it answers those who ask all nodes, and asks for callers of its own.

E1  At most ``ASKING_MAX`` callers at a time; further ones are refused with Backpressure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...coordinator.valkey.backend import Backend
from ...schemas.errors import Backpressure
from ...schemas.keys import check_key
from ...schemas.settings import CacheDefaults
from ..cache.core import Core
from ..workers.routes import Routes
from .answers import Answers
from .collect import explain
from .document import Explanation, NearState
from .near_state import near_state

__all__ = ["ASKING_MAX", "NodePart"]

ASKING_MAX = 4


class NodePart:
    def __init__(
        self, core: Core, routes: Routes, backend: Backend, defaults: CacheDefaults
    ) -> None:
        self._core = core
        self._routes = routes
        self._backend = backend
        self._names = core.shared.names
        self._bytes_max = defaults.value_bytes_max
        self._asking = 0
        answers = Answers(
            backend.link,
            self._names,
            self.near_state,
            tasks=core.tasks,
            clock=core.clock,
            instruments=core.instruments,
        )
        self.asked = answers.asked

    def near_state(self, key: str) -> NearState:
        version = self._names.cache_version
        return near_state(self._core, self._routes, self._backend.link, version, key)

    async def explain(self, key: str) -> Explanation:
        """Why a read of this key hits or misses, here and on all nodes that run.

        Raises:
            InvalidKey: it is none. Backpressure: too many ask at a time.
            Unavailable, ServerRefused: Valkey could not be asked.
        """
        check_key(key)
        with self._one_more():
            nonce = self._core.ids() + self._core.ids()
            return await explain(
                self._backend, self._names, key, nonce=nonce, bytes_max=self._bytes_max
            )

    @contextmanager
    def _one_more(self) -> Iterator[None]:
        if self._asking >= ASKING_MAX:
            self._core.instruments.counts["limit_reached", "explain"] += 1
            raise Backpressure("explain", self._asking, ASKING_MAX)
        self._asking += 1
        try:
            yield
        finally:
            self._asking -= 1
