"""Events: what services publish, in any language.

CloudEvents 1.0 JSON with ``type`` ``dev.forebay.cache.<what>.v1`` and the body in ``data``;
or bare, the body with its short type beside it: ``{"type": "invalidate", "keys": ["a"]}``.

I1  The size is checked before anything is decoded.
I2  Any bytes at all give an ``Event``, ``InvalidEvent`` or ``NewerSchema``.
I3  Unknown fields are ignored; an unknown type is refused; a newer version of a known type
    is ``NewerSchema``: it is held until a node comes that can read it.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from .errors import ForebayError, InvalidEvent, InvalidKey
from .jobs import Invalidates
from .keys import check_key

__all__ = ["Body", "Event", "Invalidate", "NewerSchema", "Refresh", "Write", "read_event"]

KeyList = Annotated[tuple[str, ...], Meta(max_length=1_000)]
LifetimeS = Annotated[float, Meta(gt=0, le=31_536_000)]
_UNDECODABLE = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError, MemoryError)
_TYPE = re.compile(r"dev\.forebay\.cache\.([a-z]+)\.v([1-9][0-9]{0,3})")


class Invalidate(Struct, frozen=True, kw_only=True):
    """Copies of these keys, and of what carries these tags, are old."""

    keys: KeyList = ()
    tags: KeyList = ()
    soft: bool = False  #: stale copies may be served while the new value is loaded


class Write(Struct, frozen=True, kw_only=True):
    """Write-behind: the entry now, the source soon. A null value deletes."""

    key: str
    value: msgspec.Raw
    ttl: LifetimeS | None = None  #: seconds; unset: the cache's own
    invalidates: Invalidates = Invalidates()  #: when the source has it


class Refresh(Struct, frozen=True, kw_only=True):
    """Load these keys again, without waiting for a reader."""

    keys: KeyList


Body = Invalidate | Write | Refresh
BodyName = Literal["invalidate", "write", "refresh"]
_BODIES: dict[str, type[Body]] = {"invalidate": Invalidate, "write": Write, "refresh": Refresh}


class Event(Struct, frozen=True, kw_only=True):
    name: BodyName
    body: Body
    id: str = ""  #: source and id; empty: not given, so a repetition is not noticed
    traceparent: str = ""


class NewerSchema(ForebayError):
    """Raised for a type that a newer version of Forebay knows."""

    def __init__(self, type_name: str) -> None:
        super().__init__(f"{type_name} is newer than this node")
        self.type_name = type_name


class _Head(Struct):
    type: str
    specversion: str = ""
    id: Annotated[str, Meta(max_length=256)] = ""
    source: Annotated[str, Meta(max_length=256)] = ""
    traceparent: Annotated[str, Meta(max_length=128)] = ""
    data: msgspec.Raw = msgspec.Raw(b"{}")


_heads = msgspec.json.Decoder(_Head)
_bodies = {name: msgspec.json.Decoder(body) for name, body in _BODIES.items()}


def read_event(raw: bytes, *, bytes_max: int) -> Event:
    """The event in these bytes.

    Raises:
        InvalidEvent: it can never be applied; its fields say why.
        NewerSchema: a newer node can apply it.
    """
    if len(raw) > bytes_max:
        raise InvalidEvent("oversized", f"{len(raw)} bytes, {bytes_max} are allowed")
    try:
        head = _heads.decode(raw)
    except msgspec.ValidationError as error:
        raise _wrong_field(error) from error
    except _UNDECODABLE as error:
        raise InvalidEvent("undecodable", f"not JSON: {error}") from error
    name = _name_of(head)
    try:
        body: Body = _bodies[name].decode(head.data if head.specversion else raw)
        _check(body)
    except msgspec.ValidationError as error:
        raise _wrong_field(error, "data" if head.specversion else "") from error
    except InvalidKey as error:
        raise InvalidEvent("wrong_field", str(error), field=error.name) from error
    except _UNDECODABLE as error:
        raise InvalidEvent("undecodable", f"the body is not JSON: {error}") from error
    event_id = f"{head.source}#{head.id}" if head.id else ""
    return Event(name=name, body=body, id=event_id, traceparent=head.traceparent)


def _name_of(head: _Head) -> BodyName:
    if head.specversion not in ("", "1.0"):
        raise InvalidEvent("wrong_field", f"{head.specversion!r} is not 1.0", field="specversion")
    if not head.specversion and head.type in _BODIES:
        return head.type  # type: ignore[return-value]
    if match := _TYPE.fullmatch(head.type):
        name, version = match.groups()
        if version != "1":
            raise NewerSchema(head.type)
        if name in _BODIES:
            return name  # type: ignore[return-value]
    known = ", ".join(_BODIES)
    raise InvalidEvent(
        "unknown_type",
        f"{head.type[:100]!r}",
        field="type",
        fix=f"use one of {known}, or dev.forebay.cache.<one of them>.v1 in a CloudEvent",
    )


def _check(body: Body) -> None:
    match body:
        case Invalidate(keys=keys, tags=tags):
            if not keys and not tags:
                raise InvalidKey("keys", "", "and tags are both empty")
        case Write(key=key, invalidates=after):
            keys, tags = (key, *after.keys), after.tags
        case Refresh(keys=keys):
            tags = ()
            if not keys:
                raise InvalidKey("keys", "", "is empty")
    for each in keys:
        check_key(each)
    for each in tags:
        check_key(each, name="tag")


def _wrong_field(error: msgspec.ValidationError, within: str = "") -> InvalidEvent:
    problem, _, path = str(error).partition(" - at `$")
    field = (within + path.rstrip("`")).lstrip(".")
    return InvalidEvent("wrong_field", problem, field=field or "the event")
