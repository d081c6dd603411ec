"""Settings shared by all processes of a run; passed as JSON in DELIVERY."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from faults.delivery.plants import Plant

_ENVIRON = "DELIVERY"


class DeliverySetup(msgspec.Struct, frozen=True, kw_only=True):
    directory: str = ""  #: this and the addresses are those of the started servers
    url: str = ""
    port: int = 0
    database: str = ""
    namespace: str = "delivery"
    shards: int = 16
    workers: int = 3
    seed: int = 1
    events: int = 1_000
    rate: float = 400.0  #: events a second, of all publishers
    application: int = 1  #: its version; the second has one more cache and sink
    planted: Sequence[Plant] = ()  #: faults that the checker has to find

    @classmethod
    def from_environ(cls) -> DeliverySetup:
        return msgspec.json.decode(os.environ[_ENVIRON], type=cls)

    def environ(self, **changes: object) -> Mapping[str, str]:
        setup = msgspec.structs.replace(self, **changes)
        return {_ENVIRON: msgspec.json.encode(setup).decode()}

    @property
    def path(self) -> Path:
        return Path(self.directory)

    @property
    def stream(self) -> str:
        return f"forebay:{self.namespace}:events"
