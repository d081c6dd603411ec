"""Events: what services publish, in any language.

CloudEvents 1.0 JSON with ``type`` ``dev.forebay.cache.<what>.v1`` and the body in ``data``;
or bare, the body with its short type beside it: ``{"type": "invalidate", "keys": ["a"]}``.

I1  The size is checked before anything is decoded.
I2  Any bytes at all give an ``Event``, ``InvalidEvent`` or ``NewerSchema``; an ``InvalidEvent``
    says what is wrong, where, and what to do about it.
I3  Unknown fields are ignored; an unknown type is refused; a newer version of a known form
    is ``NewerSchema``: it is held until a node comes that can read it.
I4  Of a field that is there twice the last one counts, as in most readers of JSON.

A written value is only looked at by the node that applies it, since only that knows its type.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from .errors import InvalidEvent, InvalidKey, NewerSchema
from .jobs import Invalidates
from .keys import check_key

__all__ = ["Body", "Event", "Invalidate", "NewerSchema", "Refresh", "Write", "read_event"]

KeyList = Annotated[tuple[str, ...], Meta(max_length=1_000)]
LifetimeS = Annotated[float, Meta(gt=0, le=31_536_000)]
_UNDECODABLE = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError, MemoryError)
_TYPE = re.compile(r"dev\.forebay\.cache\.([a-z]+)\.v([1-9][0-9]{0,3})")
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_WHOLE = "event"  #: the field of the stream entry; where a fault lies that is everywhere


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
_EXAMPLES = {
    "invalidate": '"keys": ["product:1"], "tags": ["catalog"]',
    "write": '"key": "product:1", "value": {"id": 1}, "ttl": 60',
    "refresh": '"keys": ["product:1"]',
}


class Event(Struct, frozen=True, kw_only=True):
    name: BodyName
    body: Body
    id: str = ""  #: source and id; empty: not given, so a repetition is not noticed
    traceparent: str = ""
    within: str = ""  #: the field that has the body's fields: ``data`` in a CloudEvent

    def place(self, field: str) -> str:
        """A field of the body, as it is found in the event."""
        return _place(self.within, field)


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
        problem, fix = f"{len(raw)} bytes, {bytes_max} are allowed", "send several smaller events"
        raise InvalidEvent("oversized", problem, field=_WHOLE, fix=fix)
    try:
        head = _heads.decode(raw)
    except msgspec.ValidationError as error:
        fix = "send a JSON object such as " + _example("invalidate")
        raise _wrong_field(error, "", fix) from error
    except _UNDECODABLE as error:
        raise _not_json(error, _WHOLE) from error
    name = _name_of(head)
    within = "data" if head.specversion else ""
    try:
        body: Body = _bodies[name].decode(head.data if within else raw)
    except msgspec.ValidationError as error:
        raise _wrong_field(error, within, f"the form is {_example(name, within)}") from error
    except _UNDECODABLE as error:
        raise _not_json(error, within or _WHOLE) from error
    _check(name, body, within)
    event_id = f"{head.source}#{head.id}" if head.id else ""
    return Event(name=name, body=body, id=event_id, traceparent=head.traceparent, within=within)


def _name_of(head: _Head) -> BodyName:
    if head.specversion not in ("", "1.0"):
        problem, fix = f"{head.specversion[:100]!r} is not 1.0", 'send "specversion": "1.0"'
        raise InvalidEvent("wrong_field", problem, field="specversion", fix=fix)
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


def _check(name: str, body: Body, within: str) -> None:
    """What the types cannot say: keys must obey the grammar, and there must be some."""
    if isinstance(body, Write):
        _check_keys((body.key,), within, "key")
        after = body.invalidates
        _check_keys(after.keys, within, "invalidates.keys")
        _check_keys(after.tags, within, "invalidates.tags")
        return
    tags = body.tags if isinstance(body, Invalidate) else ()
    if not body.keys and not tags:
        fix = f"name at least one: {_example(name, within)}"
        raise InvalidEvent("wrong_field", "is empty", field=_place(within, "keys"), fix=fix)
    _check_keys(body.keys, within, "keys")
    if tags:
        _check_keys(tags, within, "tags")


def _check_keys(keys: Sequence[str], within: str, field: str) -> None:
    kind = "tag" if field.endswith("tags") else "key"
    for at, key in enumerate(keys):
        try:
            check_key(key, name=kind)
        except InvalidKey as error:
            place = _place(within, field if field == "key" else f"{field}[{at}]")
            fix = "percent-encode what comes from outside, and keep keys short"
            raise InvalidEvent("wrong_field", str(error), field=place, fix=fix) from error


def _wrong_field(error: msgspec.ValidationError, within: str, fix: str) -> InvalidEvent:
    problem, _, path = str(error).partition(" - at `$")
    field = path.rstrip("`").lstrip(".")
    if missing := _MISSING.match(problem):
        field = _place(field, missing[1])
    return InvalidEvent("wrong_field", problem, field=_place(within, field) or _WHOLE, fix=fix)


def _not_json(error: Exception, field: str) -> InvalidEvent:
    fix = "send one JSON object in UTF-8, without a byte order mark"
    return InvalidEvent("undecodable", f"not JSON: {error}", field=field, fix=fix)


def _place(within: str, field: str) -> str:
    return ".".join(filter(None, (within, field)))


def _example(name: str, within: str = "") -> str:
    fields = _EXAMPLES[name]
    return f'{{"data": {{{fields}}}, ...}}' if within else f'{{"type": "{name}", {fields}}}'
