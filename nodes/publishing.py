"""From what an application publishes to the bytes that go into the ingress stream.

E1  A list is expected: one event that stands alone is refused, since its bytes, characters or names
    would be taken for many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..schemas.errors import InvalidEvent
from ..schemas.events import NewerSchema, read_event
from ..schemas.json_form import json_form

__all__ = ["Event", "as_json", "name_of"]

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


def name_of(event: bytes, bytes_max: int) -> str:
    """The name of its type, for counting; raises InvalidEvent."""
    try:
        return read_event(event, bytes_max=bytes_max).name
    except NewerSchema:
        return "unknown"  # ingress holds it for a node that knows


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
