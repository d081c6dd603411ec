"""Faults that are put into the workers on purpose, one at least for each rule of the checker.

``drops``     D1  a write is said to be stored, and is not
``swaps``     D2  of a hot key the event before is stored after it (D3: and then it once more)
``doubles``   D3  a write is stored a second time, as if it were newer
``refuses``   D4  a healthy write is called poison
``swallows``  D4  a poison is said to be stored
``deaf``      D5  no key is invalidated, so a dead letter's value stays in the cache
``invents``   D6  something is stored that nobody published
``stuck``     D7  a write is never stored, and its sink waits for it (D6: it is left)

The key alone decides whether an event is hit, so it is known beforehand: see ``hit``.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from forebay.nodes.runtime import Running
from forebay.nodes.sinks.base import Sink, SinkBatch, Write
from forebay.schemas.errors import PoisonSinkError, TransientSinkError

Plant = Literal["drops", "swaps", "doubles", "refuses", "swallows", "deaf", "invents", "stuck"]
PLANTS: Sequence[Plant] = (
    "drops",
    "swaps",
    "doubles",
    "refuses",
    "swallows",
    "deaf",
    "invents",
    "stuck",
)
#: One healthy key in 25 is hit by each of these, and none by two.
_BY_KEY: Sequence[Plant] = ("drops", "doubles", "refuses", "invents", "stuck")
_KEYS = 25
_TOO_LATE = 9_999


def hit(fault: Plant, key: str, value: Mapping[str, Any]) -> bool:
    """Whether a planted fault hits the event of this key and value."""
    number = zlib.crc32(key.encode())
    if fault == "swallows":
        late = isinstance(value["dep_delay"], int) and value["dep_delay"] > _TOO_LATE
        return late and number % 2 == 0
    if fault not in _BY_KEY or number % _KEYS != _BY_KEY.index(fault):
        return False
    only = value["seq"] == 1 and value["status"] != "delayed" and "-latest-" not in key
    return only and "-bad-" not in key and "-probe-" not in key


def invented(key: str) -> tuple[str, str]:
    """The key and the event that ``invents`` stores beside a write of this key."""
    number = zlib.crc32(key.encode()) % 1_000_000
    return f"flight:0-invented-{number}", f"node-{9_000_000 + number}"


def plant(faults: Sequence[Plant]) -> None:
    """Plant the faults of this process that a sink cannot cause."""
    if "deaf" in faults:
        assert callable(Running.invalidate)  # it is still called so
        Running.invalidate = _invalidate_nothing  # type: ignore[method-assign, assignment]


async def _invalidate_nothing(running: Running, *names: object, **how: object) -> None:
    return None


def planted(sink: Sink, faults: Sequence[Plant], events: Mapping[tuple[str, int], str]) -> Sink:
    """``events``: the ids of published events, by key and number."""
    return _FaultySink(sink, faults, events)


class _FaultySink:
    def __init__(
        self, sink: Sink, faults: Sequence[Plant], events: Mapping[tuple[str, int], str]
    ) -> None:
        self.name = sink.name
        self._sink = sink
        self._faults = frozenset(faults)
        self._events = events
        self._swapped: set[str] = set()

    async def open(self, namespace: str = "") -> None:
        await self._sink.open(namespace)

    async def progress(self, shards: Sequence[int]) -> Mapping[int, str]:
        return await self._sink.progress(shards)

    async def aclose(self) -> None:
        await self._sink.aclose()

    async def write(self, batch: SinkBatch) -> None:
        hits: dict[Plant, list[Write[Any]]] = {
            fault: [w for w in batch.writes if hit(fault, w.key, _fields(w))]
            for fault in self._faults
        }
        if hits.get("stuck"):
            raise TransientSinkError("planted: stuck")
        if hits.get("refuses"):
            raise PoisonSinkError("planted: refused")
        gone = {w.key for fault in ("drops", "swallows") for w in hits.get(fault, ())}
        kept = [w for w in batch.writes if w.key not in gone]
        kept += [_invention(w) for w in hits.get("invents", ())]
        await self._sink.write(msgspec.structs.replace(batch, writes=kept))
        again = [_newer(w, 1) for w in hits.get("doubles", ())]
        await self._sink.write(SinkBatch(writes=again))
        if "swaps" in self._faults:
            await self._swap(kept)

    async def _swap(self, writes: Sequence[Write[Any]]) -> None:
        """Store the event before, and then this one again."""
        for write in writes:
            seq = write.value.seq
            if "-latest-" not in write.key or seq < 2 or write.key in self._swapped:
                continue
            event = self._events[write.key, seq - 1]
            value = msgspec.structs.replace(write.value, event=event, seq=seq - 1)
            before = msgspec.structs.replace(_newer(write, 1), value=value)
            await self._sink.write(SinkBatch(writes=[before]))
            await self._sink.write(SinkBatch(writes=[_newer(write, 2)]))
            self._swapped.add(write.key)


def _fields(write: Write[Any]) -> Mapping[str, Any]:
    return msgspec.structs.asdict(write.value)


def _newer(write: Write[Any], by: int) -> Write[Any]:
    return msgspec.structs.replace(write, version=write.version + by)


def _invention(write: Write[Any]) -> Write[Any]:
    key, event = invented(write.key)
    value = msgspec.structs.replace(write.value, event=event)
    return Write(key=key, params={"id": key.partition(":")[2]}, value=value, version=write.version)
