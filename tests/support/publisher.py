"""Writes for the nodes of shop.py, without end, and the order in which they have to be sunk."""

from __future__ import annotations

from threading import Event, Thread

import msgspec
import valkey

from support.node_process import Shop
from support.valkey_server import ValkeyServer

KEYS = 20


def write_event(number: int, price: int) -> dict[str, object]:
    return {"type": "write", "key": f"product:{number}", "value": {"id": number, "price": price}}


class Publisher(Thread):
    """Writes ever higher prices, round and round, until it is told to end."""

    def __init__(self, server: ValkeyServer, stream: str) -> None:
        super().__init__()
        self.published: dict[str, int] = {}
        self.count = 0
        self._client = valkey.Valkey(unix_socket_path=server.socket_path)
        self._stream = stream
        self._end = Event()

    def run(self) -> None:
        with self._client as client:
            while not self._end.wait(0.002):
                self.count += 1
                number, price = self.count % KEYS, self.count
                event = msgspec.json.encode(write_event(number, price))
                client.xadd(self._stream, {"event": event})
                self.published[f"product:{number}"] = price

    def end(self) -> None:
        self._end.set()
        self.join()


def assert_in_order(shop: Shop) -> None:
    """By their versions, the prices of each key only ever rise."""
    seen: dict[str, int] = {}
    for write in sorted(shop.sunk(), key=lambda write: write["version"]):
        price = write["value"]["price"]
        assert price >= seen.get(write["key"], 0), write
        seen[write["key"]] = price
