"""What a sink is: where write-behind puts values in the end.

I1  ``write`` either stores the whole batch or raises; a batch holds each key once.
I2  Storing a version that is not newer than the stored one has no effect and no error.
I3  A sink that keeps progress stores it in the same transaction as the values, and refuses
    with ``Fenced`` when a later epoch was there before.

I4  It gets one batch at a time, or as many as its attribute ``concurrency`` says; those have
    different keys.

The worker decides on the class of the error: TransientSinkError (paused, tried again),
BusySinkError (a row is locked: split, and its shard waits), PoisonSinkError (bisected),
FatalSinkError (stopped), Fenced (given up: another owns it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from msgspec import Struct

__all__ = ["Progress", "Sink", "SinkBatch", "Write"]

T = TypeVar("T")


class Write(Struct, Generic[T], frozen=True, kw_only=True):
    """One key's newest value. ``params`` are the fields of the key, as text."""

    key: str
    params: Mapping[str, str]
    value: T | None  #: None: delete the row
    version: int  #: grows with every write of the key, in microseconds of the server's clock


class Progress(Struct, frozen=True, kw_only=True):
    """Everything of this shard up to this position is in the batch, or was sunk before."""

    shard: int
    epoch: int  #: of the ownership under which the batch was made
    position: str  #: id of a stream entry, "<ms>-<seq>"


class SinkBatch(Struct, frozen=True, kw_only=True):
    writes: Sequence[Write[object]]
    progress: Sequence[Progress] = ()


class Sink(Protocol):
    """Opened before the first batch, closed after the drain."""

    name: str

    async def open(self, namespace: str = "") -> None:
        """``namespace``: whose shards these are; another's progress is no business of ours."""
        ...

    async def write(self, batch: SinkBatch) -> None: ...

    async def progress(self, shards: Sequence[int]) -> Mapping[int, str]:
        """Where the sink knows each shard to be; shards it knows nothing of are left out."""
        ...

    async def aclose(self) -> None: ...
