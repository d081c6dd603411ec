"""The publishers in Python, each a process of its own.

    python -m faults.delivery.publishers NAME EVENTS RATE    with DELIVERY in the environment

``python``   XADD by valkey-py; repeats events that were not accepted, with the same id
``service``  a node without workers that calls write_behind; such a call has no event id, so one of
             unknown outcome is not repeated
``gates``    the same as version 2 of the application, before a worker of it runs: every second
             event is an XADD, since ``publish`` refuses keys that no live worker has a sink for

A publisher writes down each attempt before it makes it, and each answer. It ends with exit code 1
where an event is not accepted within ``GIVE_UP_S``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import anyio
import msgspec
import structlog
import valkey

from faults.delivery.application import Application
from faults.delivery.history import Answered, History, Sent
from faults.delivery.setting import DeliverySetup
from faults.delivery.workload import Published, by_call
from forebay.schemas.errors import Backpressure, ForebayError, ServerRefused
from forebay.schemas.settings import Log, NodeSettings, Settings, Valkey, Workers

GIVE_UP_S = 180.0
_BATCH = 16
_PAUSE_S = 0.05
_BEHIND_S_MAX = 1.0  #: the most that a delayed publisher catches up with


def write_events(path: Path, events: Sequence[Published]) -> None:
    path.write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in events))


def read_events(path: Path) -> list[Published]:
    decode = msgspec.json.Decoder(Published).decode
    return [decode(line) for line in path.read_bytes().splitlines()]


def settings_of(setup: DeliverySetup) -> Settings:
    """Those of a node without workers."""
    return Settings(
        node=NodeSettings(namespace=setup.namespace, shards=setup.shards),
        valkey=Valkey(
            url=setup.url, reconnect_jitter_ms=20, reconnect_max_ms=200, breaker_recovery_ms=100
        ),
        log=Log(format="json"),
        workers=Workers(enabled=False),
    )


class _Pace:
    def __init__(self, rate: float) -> None:
        self._interval_s = 1 / rate
        self._due_at = time.monotonic()

    def wait_s(self, events: int) -> float:
        """How long to wait before the next so many."""
        now = time.monotonic()
        due_at, self._due_at = self._due_at, self._due_at + events * self._interval_s
        self._due_at = max(self._due_at, now - _BEHIND_S_MAX)
        return max(0.0, due_at - now)


class _Notes:
    """The history of one publisher."""

    def __init__(self, setup: DeliverySetup, name: str) -> None:
        self._history = History(setup.path, name)

    def sent(self, events: Sequence[Published]) -> None:
        now = time.monotonic_ns()
        self._history.write(
            *(Sent(t_ns=now, event=e.event, key=e.key, seq=e.seq, poison=e.poison) for e in events)
        )

    def answered(self, event: Published, outcome: str, why: str = "") -> None:
        now = time.monotonic_ns()
        self._history.write(Answered(t_ns=now, event=event.event, outcome=outcome, why=why[:200]))


def publish_to_stream(
    setup: DeliverySetup, notes: _Notes, events: Sequence[Published], rate: float
) -> None:
    pace = _Pace(rate)
    client = valkey.Valkey(port=setup.port, socket_timeout=5.0)
    for start in range(0, len(events), _BATCH):
        batch = events[start : start + _BATCH]
        time.sleep(pace.wait_s(len(batch)))
        give_up_at = time.monotonic() + GIVE_UP_S
        while batch:
            if time.monotonic() > give_up_at:
                sys.exit(f"{len(batch)} events are not accepted")
            batch = _attempt(client, setup.stream, notes, batch)
            if batch:
                time.sleep(_PAUSE_S)


def _attempt(
    client: valkey.Valkey, stream: str, notes: _Notes, batch: Sequence[Published]
) -> list[Published]:
    """Send each once, of a key no second before the first was accepted; returns the others."""
    keys: set[str] = set()
    now = [e for e in batch if e.key not in keys and not keys.add(e.key)]  # type: ignore[func-returns-value]
    later = [event for event in batch if event not in now]
    notes.sent(now)
    again = []
    try:
        pipeline = client.pipeline(transaction=False)
        for event in now:
            pipeline.execute_command("XADD", stream, "*", "event", event.raw)
        replies = pipeline.execute(raise_on_error=False)
    except (valkey.ConnectionError, valkey.TimeoutError) as error:
        replies = [error] * len(now)
    for event, reply in zip(now, replies, strict=True):
        if isinstance(reply, bytes):
            notes.answered(event, "accepted")
            continue
        unknown = isinstance(reply, valkey.ConnectionError | valkey.TimeoutError)
        notes.answered(event, "unknown" if unknown else "refused", str(reply))
        again.append(event)
    return again + later


async def publish_by_call(
    setup: DeliverySetup, notes: _Notes, events: Sequence[Published], rate: float
) -> None:
    pace = _Pace(rate)
    service = Application(setup, settings_of(setup))
    async with service.node:
        for event in events:
            await anyio.sleep(pace.wait_s(1))
            give_up_at = time.monotonic() + GIVE_UP_S
            while not await _call(service, notes, event):
                if time.monotonic() > give_up_at:
                    sys.exit(f"{event.event} is not accepted")
                await anyio.sleep(_PAUSE_S)


async def _call(service: Application, notes: _Notes, event: Published) -> bool:
    """Whether there is nothing more to do for this event."""
    called = by_call(event.event)
    notes.sent([event])
    try:
        if called:
            await service.write_behind(event.key, event.value)
        else:
            parts = service.node._parts
            await parts.backend.link.call("XADD", parts.names.events, "*", "event", event.raw)
    except ForebayError as error:
        refused = isinstance(error, Backpressure | ServerRefused)
        unknown = not refused and getattr(error, "outcome_unknown", True)
        notes.answered(event, "unknown" if unknown else "refused", str(error))
        return unknown and called
    notes.answered(event, "accepted")
    return True


def main(name: str, path: str, rate: str) -> None:
    setup = DeliverySetup.from_environ()
    notes, events = _Notes(setup, name), read_events(Path(path))
    if name == "python":
        publish_to_stream(setup, notes, events, float(rate))
    else:
        anyio.run(publish_by_call, setup, notes, events, float(rate))


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    main(*sys.argv[1:])
