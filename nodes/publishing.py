"""From what an application publishes to the bytes that go into the ingress stream.

E1  A list is expected: one event that stands alone is refused, since its bytes, characters or names
    would be taken for many.
E2  What can never be applied is refused before anything is stored: what ingress would refuse, a
    write to a key for which no live member declares a sink (``no_sink``), and a value that the
    cache of the key cannot hold, where this node declares the cache (``wrong_field``). The
    error's field begins with the event that it is about, ``events[N]``.
E3  A newer schema is not refused: ingress holds it for a node that knows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..coordinator.log.sink_directory import SinkDirectory
from ..schemas.errors import InvalidEvent
from ..schemas.events import Event as Published
from ..schemas.events import NewerSchema, Write, read_event
from ..schemas.json_form import json_form
from .workers.routes import Routes

__all__ = ["Event", "PublishCheck", "as_json", "no_sink"]

Event = bytes | str | Mapping[str, Any]  #: JSON, or what becomes a JSON object


def as_json(events: Sequence[Event]) -> list[bytes]:
    """Each event as JSON, unread.

    Raises:
        InvalidEvent: it is no list of events, or one is no JSON.
    """
    if isinstance(events, bytes | bytearray | str | Mapping):
        problem = f"one event stands alone, as {type(events).__name__}"
        raise InvalidEvent("undecodable", problem, field="events", fix="write a list of events")
    return [_encoded(n, event) for n, event in enumerate(events)]


class PublishCheck:
    """``await check(events)`` gives the names of their types, for counting; raises InvalidEvent."""

    def __init__(
        self,
        routes: Routes,
        directory: SinkDirectory,
        *,
        bytes_max: int,
        works: Callable[[], bool],
    ) -> None:
        """``works`` tells whether this node is a live member, with the sinks that it declares."""
        self._routes = routes
        self._directory = directory
        self._bytes_max = bytes_max
        self._works = works

    async def __call__(self, events: Sequence[bytes]) -> list[str]:
        read = [self._read(n, raw) for n, raw in enumerate(events)]
        writes = [
            (n, event, event.body)
            for n, event in enumerate(read)
            if event is not None and isinstance(event.body, Write)
        ]
        for n, event, body in writes:
            try:
                self._routes.check_published(body.key, bytes(body.value))
            except InvalidEvent as error:
                raise _placed(error, n, event.place(error.field)) from error
        await self._check_sinks(writes)
        return ["unknown" if event is None else event.name for event in read]

    def _read(self, number: int, raw: bytes) -> Published | None:
        """None: it is of a newer schema."""
        try:
            return read_event(raw, bytes_max=self._bytes_max)
        except NewerSchema:
            return None
        except InvalidEvent as error:
            raise _placed(error, number, error.field) from error

    async def _check_sinks(self, writes: Sequence[tuple[int, Published, Write]]) -> None:
        works, sink_of = self._works(), self._routes.sink_of
        asked = {body.key for _, _, body in writes if not (works and sink_of(body.key))}
        lacking = set(await self._directory.without_sink(list(asked))) if asked else ()
        for n, event, body in writes:
            if body.key in lacking:
                error = no_sink(body.key)
                raise _placed(error, n, event.place(error.field))


def no_sink(key: str) -> InvalidEvent:
    """The error for a write to a key for which no live member declares a sink."""
    problem = f"no live member declares a sink for {key!r}"
    fix = "correct the key, or start a worker that declares its sink first"
    return InvalidEvent("no_sink", problem, field="key", fix=fix)


def _placed(error: InvalidEvent, number: int, field: str) -> InvalidEvent:
    where = f"events[{number}].{field}" if field else f"events[{number}]"
    return InvalidEvent(error.fault, error.problem, field=where, fix=error.fix)


def _encoded(number: int, event: object) -> bytes:
    if isinstance(event, bytes):
        return event
    problem = f"it is {type(event).__name__}"
    try:
        if isinstance(event, str):
            return event.encode()
        if isinstance(event, Mapping):
            return json_form(event)
    except ValueError as error:
        problem = str(error)
    fix = "give JSON as bytes or str, or a dict"
    raise InvalidEvent("undecodable", problem, field=f"events[{number}]", fix=fix)
