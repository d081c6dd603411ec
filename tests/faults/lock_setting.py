"""What all processes of a run of locks have to agree on; it travels as JSON in LOCK_FAULTS."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from forebay.schemas.locks import LockLevel

__all__ = ["LEASE_S", "LockSetup", "PlantedInLocks"]

ENVIRON = "LOCK_FAULTS"
LEASE_S = 2.0

#: counted: tokens are counted in the record; no grace: a new era grants at once;
#: sleepy: leases are renewed one after the other, and then it sleeps for a third of them.
PlantedInLocks = Literal["", "counted", "no grace", "sleepy"]


class LockSetup(msgspec.Struct, frozen=True, kw_only=True):
    directory: str = ""
    url: str = ""  #: where this process reaches the server; a relay
    process: str = ""  #: unique to this start
    namespace: str = "locks"
    shards: int = 4
    seed: int = 1
    level: LockLevel = "fast"
    names: tuple[str, ...] = ("a", "b")
    tasks: int = 16  #: of each process
    hold_s: float = 0.006  #: on average
    long_hold_s: float = 0.06  #: of each twentieth
    busy_s: float = 0.0  #: for how long the event loop stands still, again and again
    planted: PlantedInLocks = ""

    @classmethod
    def from_environ(cls) -> LockSetup:
        return msgspec.json.decode(os.environ[ENVIRON], type=cls)

    def environ(self) -> Mapping[str, str]:
        return {ENVIRON: msgspec.json.encode(self).decode()}

    @property
    def path(self) -> Path:
        return Path(self.directory)
