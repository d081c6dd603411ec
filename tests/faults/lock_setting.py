"""What all processes of a run of locks have to agree on; it travels as JSON in LOCK_FAULTS."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from forebay.schemas.locks import LockLevel

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
    lease_s: float = LEASE_S
    tasks: int = 16  #: of each process; 0: it does what it is told to, see ``lock_steps``
    hold_s: float = 0.006  #: on average
    long_hold_s: float = 0.06  #: of each twentieth
    planted: PlantedInLocks = ""

    @classmethod
    def from_environ(cls) -> LockSetup:
        return msgspec.json.decode(os.environ[ENVIRON], type=cls)

    def environ(self) -> Mapping[str, str]:
        return {ENVIRON: msgspec.json.encode(self).decode()}

    @property
    def path(self) -> Path:
        return Path(self.directory)


class Take(msgspec.Struct, frozen=True, tag="take"):
    """Take a lock, and hold it."""

    name: str
    timeout_s: float | None = None


class Give(msgspec.Struct, frozen=True, tag="give"):
    """Give back a lock that is held."""

    name: str


class BeBusy(msgspec.Struct, frozen=True, tag="be busy"):
    """Let the event loop stand still for so long, again and again, from now on."""

    pass_s: float


Order = Take | Give | BeBusy
