"""Events: what is read, and what becomes of everything else (I1-I4 of schemas.events)."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

from forebay.schemas.errors import InvalidEvent, NewerSchema
from forebay.schemas.events import Event, Invalidate, Refresh, Write, read_event

LIMIT = 65_536
EMOJI = "\N{SLICE OF PIZZA}"


def read(raw: bytes) -> Event:
    return read_event(raw, bytes_max=LIMIT)


def bare(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def cloud_event(what: str, data: Any, **attributes: Any) -> bytes:
    head = {"specversion": "1.0", "type": f"dev.forebay.cache.{what}.v1"}
    return json.dumps(head | {"id": "7", "source": "/shop", "data": data} | attributes).encode()


def keys(*names: str) -> bytes:
    return bare(type="invalidate", keys=names)


def test_bare_invalidation_is_read() -> None:
    """The shortest form that there is: a type, and what it is about."""
    event = read(b'{"type": "invalidate", "keys": ["a:1", "a:2"], "tags": ["t"], "soft": true}')
    assert event.name == "invalidate"
    assert event.body == Invalidate(keys=("a:1", "a:2"), tags=("t",), soft=True)
    assert event.id == ""


def test_bare_write_keeps_the_value_as_it_came() -> None:
    """The value's bytes are not touched: only the cache knows their type."""
    event = read(b'{"type":"write","key":"a:1","value": {"b" : 1.50},"ttl":2.5}')
    assert isinstance(event.body, Write)
    assert (event.body.key, event.body.ttl) == ("a:1", 2.5)
    assert bytes(event.body.value).strip() == b'{"b" : 1.50}'


def test_refresh_is_read() -> None:
    """A refresh has keys and nothing else."""
    assert read(bare(type="refresh", keys=["a:1"])).body == Refresh(keys=("a:1",))


def test_structured_cloud_event_is_read() -> None:
    """CloudEvents 1.0: the body is in ``data``, source and id make the event's id."""
    raw = cloud_event("invalidate", {"keys": ["a:1"]}, traceparent="00-1-2-01", time="2013-01-01")
    event = read(raw)
    assert event.body == Invalidate(keys=("a:1",))
    assert (event.id, event.traceparent) == ("/shop#7", "00-1-2-01")


def test_cloudevents_of_the_official_library_are_read() -> None:
    """What the CNCF's own package makes is what we read."""
    attributes = {
        "id": "1",
        "source": "/s",
        "type": "dev.forebay.cache.write.v1",
        "specversion": "1.0",
    }
    made = CloudEvent(attributes=attributes, data={"key": "a:1", "value": {"x": EMOJI}})
    event = read(bytes(JSONFormat().write(made)))
    assert event.id == "/s#1"
    assert isinstance(event.body, Write)
    assert json.loads(bytes(event.body.value)) == {"x": EMOJI}


def test_long_type_may_stand_in_the_bare_form() -> None:
    """Whoever knows the full type may use it without the envelope."""
    raw = bare(type="dev.forebay.cache.invalidate.v1", keys=["a"])
    assert read(raw).body == Invalidate(keys=("a",))


def test_unknown_fields_are_ignored() -> None:
    """I3: older nodes read what newer publishers send beside what they know."""
    raw = cloud_event("invalidate", {"keys": ["a"], "why": ["x"]}, dataschema="x", keys=7)
    assert read(raw).body == Invalidate(keys=("a",))


def test_the_last_of_two_equal_fields_counts() -> None:
    """I4: as in most readers of JSON."""
    assert read(b'{"type":"invalidate","keys":["a"],"keys":["b"]}').body == Invalidate(keys=("b",))


@pytest.mark.parametrize("key", ["../../etc/passwd", "a%2F..%2F", "fb:lk:x", "%ff%fe", "-1", EMOJI])
def test_odd_keys_that_mean_nothing_to_us_are_keys(key: str) -> None:
    """What neither Valkey, nor a glob, nor a template reads as more than letters is allowed."""
    assert read(keys(key)).body == Invalidate(keys=(key,))


def test_composed_and_decomposed_letters_are_two_keys() -> None:
    """Keys are bytes: nothing is normalised."""
    body = read(keys("caf\u00e9", "cafe\u0301")).body
    assert isinstance(body, Invalidate)
    assert len(set(body.keys)) == 2


DEEP = b"[" * 100_000
FULL = "dev.forebay.cache."
WRONG: dict[str, tuple[bytes, str, str]] = {
    # name: bytes, fault, field
    "empty": (b"", "undecodable", "event"),
    "truncated": (b'{"type":"invalidate","keys":["a"', "undecodable", "event"),
    "trailing": (keys("a") + b"x", "undecodable", "event"),
    "two": (keys("a") + keys("b"), "undecodable", "event"),
    "bom": (b"\xef\xbb\xbf" + keys("a"), "undecodable", "event"),
    "utf16": (keys("a").decode().encode("utf-16"), "undecodable", "event"),
    "pickle": (b"\x80\x04N.", "undecodable", "event"),
    "msgpack": (msgspec.msgpack.encode({"type": "invalidate"}), "undecodable", "event"),
    "nul": (b"\x00" * 8, "undecodable", "event"),
    "nan": (b'{"type":"write","key":"a","value":1,"ttl":NaN}', "undecodable", "event"),
    "infinity": (b'{"type":"write","key":"a","value":1,"ttl":Infinity}', "undecodable", "event"),
    "bad utf-8 in a key": (b'{"type":"invalidate","keys":["\xff"]}', "undecodable", "event"),
    "lone surrogate": (b'{"type":"invalidate","keys":["\\ud800"]}', "undecodable", "event"),
    "half a pair": (b'{"type":"invalidate","keys":["\\ud83dx"]}', "undecodable", "event"),
    "null": (b"null", "wrong_field", "event"),
    "array": (b"[]", "wrong_field", "event"),
    "string": (b'"invalidate"', "wrong_field", "event"),
    "number": (b"1e9", "wrong_field", "event"),
    "no type": (b"{}", "wrong_field", "type"),
    "type of a wrong type": (bare(type=["invalidate"]), "wrong_field", "type"),
    "no keys": (bare(type="invalidate"), "wrong_field", "keys"),
    "empty keys": (bare(type="refresh", keys=[]), "wrong_field", "keys"),
    "keys no array": (bare(type="invalidate", keys="a"), "wrong_field", "keys"),
    "key no string": (bare(type="invalidate", keys=["a", 1]), "wrong_field", "keys[1]"),
    "too many keys": (keys(*["a"] * 1_001), "wrong_field", "keys"),
    "empty key": (keys("a", ""), "wrong_field", "keys[1]"),
    "long key": (keys("a" * 513), "wrong_field", "keys[0]"),
    "long key in bytes": (keys(EMOJI * 129), "wrong_field", "keys[0]"),
    "nul in a key": (keys("a\x00b"), "wrong_field", "keys[0]"),
    "command in a key": (keys("a\r\nDEL x"), "wrong_field", "keys[0]"),
    "hash tag": (keys("{a}b"), "wrong_field", "keys[0]"),
    "glob": (keys("a*"), "wrong_field", "keys[0]"),
    "many globs": (keys("*a" * 200), "wrong_field", "keys[0]"),
    "class": (keys("[ab]"), "wrong_field", "keys[0]"),
    "question mark": (keys("a?"), "wrong_field", "keys[0]"),
    "right to left": (keys("\u202egpj"), "wrong_field", "keys[0]"),
    "tag": (bare(type="invalidate", tags=["a b"]), "wrong_field", "tags[0]"),
    "soft no bool": (bare(type="invalidate", keys=["a"], soft=1), "wrong_field", "soft"),
    "write without value": (bare(type="write", key="a"), "wrong_field", "value"),
    "write without key": (bare(type="write", value=1), "wrong_field", "key"),
    "key of a write": (bare(type="write", key="a b", value=1), "wrong_field", "key"),
    "key null": (bare(type="write", key=None, value=1), "wrong_field", "key"),
    "after the write": (
        bare(type="write", key="a", value=1, invalidates={"keys": ["a", "*"]}),
        "wrong_field",
        "invalidates.keys[1]",
    ),
    "ttl 0": (bare(type="write", key="a", value=1, ttl=0), "wrong_field", "ttl"),
    "ttl -1": (bare(type="write", key="a", value=1, ttl=-1), "wrong_field", "ttl"),
    "ttl 10^18": (bare(type="write", key="a", value=1, ttl=10**18), "wrong_field", "ttl"),
    "ttl bool": (bare(type="write", key="a", value=1, ttl=True), "wrong_field", "ttl"),
    "ttl text": (bare(type="write", key="a", value=1, ttl="60"), "wrong_field", "ttl"),
    "ttl 1e999": (b'{"type":"write","key":"a","value":1,"ttl":1e999}', "wrong_field", "ttl"),
    "ttl of many digits": (
        b'{"type":"write","key":"a","value":1,"ttl":' + b"9" * 10_000 + b"}",
        "wrong_field",
        "ttl",
    ),
    "id no text": (bare(type="invalidate", keys=["a"], id=7), "wrong_field", "id"),
    "long id": (cloud_event("invalidate", {"keys": ["a"]}, id="x" * 257), "wrong_field", "id"),
    "long traceparent": (
        bare(type="invalidate", keys=["a"], traceparent="0" * 129),
        "wrong_field",
        "traceparent",
    ),
    "specversion": (
        cloud_event("invalidate", {"keys": ["a"]}, specversion="0.3"),
        "wrong_field",
        "specversion",
    ),
    "specversion no text": (
        cloud_event("invalidate", {"keys": ["a"]}, specversion=1.0),
        "wrong_field",
        "specversion",
    ),
    "no data": (
        b'{"specversion":"1.0","type":"dev.forebay.cache.invalidate.v1"}',
        "wrong_field",
        "data.keys",
    ),
    "data null": (cloud_event("invalidate", None), "wrong_field", "data"),
    "data text": (cloud_event("invalidate", "keys"), "wrong_field", "data"),
    "key in data": (cloud_event("invalidate", {"keys": ["a", "*"]}), "wrong_field", "data.keys[1]"),
    "value in data": (cloud_event("write", {"key": "a"}), "wrong_field", "data.value"),
    "bad utf-8 in data": (
        b'{"specversion":"1.0","type":"dev.forebay.cache.refresh.v1","data":{"keys":["\xff"]}}',
        "undecodable",
        "data",
    ),
    "unknown type": (bare(type="drop_everything", keys=["a"]), "unknown_type", "type"),
    "empty type": (bare(type="", keys=["a"]), "unknown_type", "type"),
    "case": (bare(type="Invalidate", keys=["a"]), "unknown_type", "type"),
    "another's type": (bare(type="com.example.order.v1"), "unknown_type", "type"),
    "version 0": (bare(type=FULL + "invalidate.v0", keys=["a"]), "unknown_type", "type"),
    "version of 9 digits": (bare(type=FULL + "invalidate.v123456789"), "unknown_type", "type"),
    "short type in a CloudEvent": (
        cloud_event("x", {"keys": ["a"]}, type="invalidate"),
        "unknown_type",
        "type",
    ),
    "oversized": (keys("a" * LIMIT), "oversized", "event"),
    "deep": (DEEP, "oversized", "event"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_event_says_what_where_and_what_to_do(name: str) -> None:
    """I2: a fault that can be counted, a field that can be found, a fix that can be followed."""
    raw, fault, field = WRONG[name]
    with pytest.raises(InvalidEvent) as caught:
        read(raw)
    error = caught.value
    assert (error.fault, error.field) == (fault, field)
    assert error.problem
    assert error.fix
    assert len(str(error)) < 700
    str(error).encode()


@pytest.mark.parametrize(
    "raw",
    [
        DEEP,
        b'{"type":"invalidate","keys":["a"],"x":' + DEEP + b"]" * 100_000 + b"}",
        b'{"type":' * 100_000,
        b'{"type":"write","key":"a","value":' + DEEP + b"]" * 100_000 + b"}",
    ],
    ids=["arrays", "ignored field", "objects", "value"],
)
def test_deep_nesting_is_refused_also_where_it_would_fit(raw: bytes) -> None:
    """Where the size allows it, the depth does not: no stack is overrun."""
    with pytest.raises(InvalidEvent):
        read_event(raw, bytes_max=10_000_000)


def test_size_is_looked_at_first() -> None:
    """I1: of an oversized event nothing is decoded, whatever it is."""
    with pytest.raises(InvalidEvent) as caught:
        read_event(b"\xff" * 300, bytes_max=299)
    assert caught.value.fault == "oversized"
    assert "300" in caught.value.problem


@pytest.mark.parametrize("name", ["invalidate", "write", "refresh", "warm"])
@pytest.mark.parametrize("version", [2, 10, 9999])
def test_newer_version_of_a_type_is_held(name: str, version: int) -> None:
    """I3: a later version may well mean something, to a later node."""
    with pytest.raises(NewerSchema) as caught:
        read(bare(type=f"{FULL}{name}.v{version}", anything=1))
    assert caught.value.type_name == f"{FULL}{name}.v{version}"


def outcome(raw: bytes) -> str:
    try:
        event = read(raw)
    except (InvalidEvent, NewerSchema) as error:
        str(error).encode()
        return type(error).__name__
    assert event.name in ("invalidate", "write", "refresh")
    return "Event"


@given(st.binary(max_size=300))
def test_any_bytes_have_one_of_three_outcomes(raw: bytes) -> None:
    """I2: nothing else is ever raised."""
    assert outcome(raw) in ("Event", "InvalidEvent", "NewerSchema")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
names = st.sampled_from("type specversion id source data keys tags soft key value ttl".split())
types = st.sampled_from(["invalidate", "write", "refresh", FULL + "write.v1", FULL + "write.v2"])


@given(
    st.dictionaries(names, anything | st.dictionaries(names, anything)),
    types | st.none(),
    st.integers(0, 40),
)
def test_any_json_has_one_of_three_outcomes(
    fields: dict[str, Any], kind: str | None, cut: int
) -> None:
    """I2: however nearly right, with wrong types and with bytes cut out of the middle."""
    if kind is not None:
        fields["type"] = kind
    raw = json.dumps(fields).encode()
    assert outcome(raw) in ("Event", "InvalidEvent", "NewerSchema")
    assert outcome(raw[:cut] + raw[cut + 1 :]) in ("Event", "InvalidEvent", "NewerSchema")


@given(st.lists(st.from_regex(r"[a-z:._/%-]{1,40}", fullmatch=True), min_size=1, max_size=30))
def test_keys_come_out_as_they_went_in(given_keys: list[str]) -> None:
    """Reading neither loses, changes nor reorders keys, in either form."""
    expected = Invalidate(keys=tuple(given_keys))
    assert read(keys(*given_keys)).body == expected
    assert read(cloud_event("invalidate", {"keys": given_keys})).body == expected
