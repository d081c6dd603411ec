"""Keys: their grammar, templates that neither lose nor mix up values, and names in Valkey."""

from __future__ import annotations

import enum
import itertools
import uuid
from contextlib import suppress
from datetime import date
from decimal import Decimal
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.schemas.errors import InvalidKey
from forebay.schemas.keys import (
    EVENTS,
    KEY_BYTES_MAX,
    KeyTemplate,
    Names,
    check_key,
    dependents_of,
    refuse_one_string,
    shard_of,
)

GOOD = ["a", "product:42", "käse", "a/b@c.d~e_f-g", "%41", "a+b,c;d=e&f", "日本", "x" * 512, "a|b"]
BAD = {
    "empty": "",
    "space": "a b",
    "line": "a\nb",
    "nul": "a\0",
    "tab": "\ta",
    "delete": "a\x7f",
    "next line": "a\x85",
    "line separator": "a\u2028",
    "right to left": "a\u202eb",
    "isolate": "\u2066a",
    "brace": "{a}",
    "star": "a*",
    "question mark": "a?",
    "bracket": "a[b]",
    "backslash": "a\\b",
    "surrogate": "a\ud800",
    "long": "x" * 513,
    "long in bytes": "ä" * 257,
}
REFUSED = " {}*?[]\\\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
valid_keys = st.text(
    st.characters(exclude_categories=["Cc", "Cs"], exclude_characters=REFUSED),
    min_size=1,
    max_size=KEY_BYTES_MAX // 4,
).map(check_key)
TEMPLATES = [
    "p:{a}",
    "{a}",
    "p:{a}:{b}",
    "p:{a}-{b}",
    "p/{a}/{b}.x",
    "{a}--{b}_{c}",
    "{a}→{b}",
    "k",
]

texts = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("-_.~/@:%{}* +0aZ"),
    min_size=1,
    max_size=12,
)


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class _Nameless:
    pass


@pytest.mark.parametrize("key", GOOD)
def test_a_good_key_is_returned_as_it_is(key: str) -> None:
    """I3: letters of any language, and most signs."""
    assert check_key(key) is key


@pytest.mark.parametrize("key", BAD.values(), ids=BAD)
def test_a_bad_key_is_refused(key: str) -> None:
    """I3: what Valkey, a glob, a template or a terminal reads as more than a letter."""
    with pytest.raises(InvalidKey) as caught:
        check_key(key, name="tag")
    assert caught.value.name == "tag"
    assert str(caught.value).isprintable()


@given(st.text(max_size=600))
def test_any_text_is_a_key_or_refused(text: str) -> None:
    """No other exception; and what passes fits and can be sent."""
    with suppress(InvalidKey):
        assert 1 <= len(check_key(text).encode()) <= KEY_BYTES_MAX


@pytest.mark.parametrize("text", TEMPLATES)
@given(st.lists(texts, min_size=3, max_size=3))
def test_match_gives_back_what_format_took(text: str, values: list[str]) -> None:
    """I4: for any text, and the key keeps to the grammar."""
    template = KeyTemplate(text)
    fields = dict(zip(template.fields, values, strict=False))
    key = template.format(fields)
    assert check_key(key) == key
    assert template.match(key) == fields


@pytest.mark.parametrize("text", [each for each in TEMPLATES if "{" in each])
@given(st.lists(texts, min_size=6, max_size=6))
def test_different_values_never_share_a_key(text: str, values: list[str]) -> None:
    """I4: or two calls would share an entry."""
    template = KeyTemplate(text)
    count = len(template.fields)
    one = dict(zip(template.fields, values[:count], strict=True))
    other = dict(zip(template.fields, values[count:], strict=False))
    assert (template.format(one) == template.format(other)) == (one == other)


@pytest.mark.parametrize("text", [each for each in TEMPLATES if "{" in each])
def test_signs_of_the_template_in_values_mix_nothing_up(text: str) -> None:
    """I4: exhaustively, for short values made of nothing but such signs."""
    template = KeyTemplate(text)
    signs = ["".join(each) for n in (1, 2, 3) for each in itertools.product("-:/1", repeat=n)]
    picked = signs if len(template.fields) < 3 else signs[:20]
    keys = [
        template.format(dict(zip(template.fields, values, strict=True)))
        for values in itertools.product(picked, repeat=len(template.fields))
    ]
    assert len(set(keys)) == len(keys)


@given(texts)
def test_a_key_of_another_template_does_not_match(value: str) -> None:
    """Routes are found by matching."""
    assert (
        KeyTemplate("product:{id}").match(KeyTemplate("order:{id}").format({"id": value})) is None
    )
    assert KeyTemplate("p:{a}").match(KeyTemplate("p:{a}:{b}").format({"a": 1, "b": value})) is None


@pytest.mark.parametrize(
    "key", ["p:a%2fb", "p:%41", "p:a+b", "p:%FF", "p:%", "p:%zz", "p:é", "p:", "p", "xp:1", "p:1\n"]
)
def test_a_key_that_is_spelt_otherwise_does_not_match(key: str) -> None:
    """I4: it is another key; whoever reads through the template would never find its entry."""
    assert KeyTemplate("p:{id}").match(key) is None


@given(st.text(max_size=60))
def test_what_matches_is_a_key_of_the_template(key: str) -> None:
    """I4: for any text at all."""
    for template in (KeyTemplate("{a}"), KeyTemplate("{a}-{b}")):
        found = template.match(key)
        assert found is None or template.format(found) == key


@pytest.mark.parametrize(
    "text",
    ["p:{a}{b}", "p:{a}x{b}", "p:{a}%{b}", "{a}:{a}", "p:{}", "p:{1}", "p:{a", "p:}", "p {a}", "*"],
)
def test_a_template_that_cannot_work_is_refused(text: str) -> None:
    """Fields twice or side by side, nothing between them that tells, or signs of no key."""
    with pytest.raises(InvalidKey):
        KeyTemplate(text)


@pytest.mark.parametrize("text", ["p:{}", "p:{id:>5}", "p:{id!r}", "p:{id", "p:id}:{a}", "p:{1}"])
def test_what_only_looks_like_a_field_is_told_how_to_be_one(text: str) -> None:
    """The whole template is shown, under the name of what it is."""
    with pytest.raises(InvalidKey, match=r"write \{name\}") as caught:
        KeyTemplate(text, name="tag")
    assert (caught.value.name, caught.value.value) == ("tag", text)


@pytest.mark.parametrize("text", [1, None, b"p:{id}", ["p:{id}"]])
def test_a_template_is_text(text: Any) -> None:
    """Anything else is refused as what it is."""
    with pytest.raises(InvalidKey, match="is no text"):
        KeyTemplate(text)


@pytest.mark.parametrize("names", ["catalog", b"catalog"])
def test_one_string_is_no_list(names: Any) -> None:
    """Its characters would be taken for names."""
    refuse_one_string("tags", ["catalog"])
    with pytest.raises(InvalidKey, match="write a list"):
        refuse_one_string("tags", names)


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (42, "p:42"),
        (-1, "p:-1"),
        (True, "p:True"),
        ("a b", "p:a%20b"),
        ("a:b", "p:a%3Ab"),
        ("100%", "p:100%25"),
        ("ü", "p:%C3%BC"),
        (1.5, "p:1.5"),
        (1e30, "p:1e%2B30"),
        (Decimal("1.10"), "p:1.10"),
        (date(2013, 1, 5), "p:2013-01-05"),
        (uuid.UUID(int=1), "p:00000000-0000-0000-0000-000000000001"),
        (Colour.RED, "p:red"),
        (Level.HIGH, "p:3"),
    ],
)
def test_values_have_the_text_that_other_languages_would_give_them(value, key: str) -> None:
    """The fast way of one field gives the same as the slow one."""
    template = KeyTemplate("p:{a}")
    assert template.format({"a": value}) == template.formatter()(value) == key


@pytest.mark.parametrize(
    "value",
    [
        None, "", b"a", bytearray(b"a"), memoryview(b"a"), [1], (1, 2), {1}, frozenset(), {"a": 1},
        _Nameless(), object(), "\ud800", "x" * 600, "ü" * 100, 10**600, -(10**600), 10**5_000,
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_values_without_a_text_of_their_own_are_refused(value) -> None:
    """Or the key would change from process to process, or be none."""
    template = KeyTemplate("p:{a}")
    with pytest.raises(InvalidKey):
        template.format({"a": value})
    with pytest.raises(InvalidKey):
        template.formatter()(value)


def test_a_missing_field_is_refused() -> None:
    """Not taken as the text None."""
    with pytest.raises(InvalidKey, match="b"):
        KeyTemplate("p:{a}:{b}").format({"a": 1})


def test_the_length_counts_in_bytes() -> None:
    """Literal parts may have letters of more than one byte."""
    template = KeyTemplate("ü" * 250 + ":{a}")
    assert len(template.format({"a": "x" * 11}).encode()) == KEY_BYTES_MAX
    with pytest.raises(InvalidKey, match="512"):
        template.format({"a": "x" * 12})


def test_matching_takes_no_longer_for_a_nasty_key() -> None:
    """Keys come from outside: their letters decide how much is tried."""
    template = KeyTemplate("{a}-{b}-{c}-{d}-{e}-{f}-{g}-{h}x")
    assert template.match("-".join(["1"] * 250)) is None
    assert template.match("1" * 512) is None


@given(valid_keys, st.integers(1, 1024))
def test_the_shard_is_a_checksum_that_any_language_knows(key: str, shards: int) -> None:
    """I2: crc32 of the UTF-8 bytes, wherever a name of the key is made."""
    names, expected = Names("n", shards), crc32(key.encode()) % shards
    assert shard_of(key, shards) == names.shard(key) == expected
    prefix = names.prefixes[expected]
    made = (*names.of_key(key), names.fence(key), *names.lock(key), names.limit("r", "api", key))
    assert all(name.startswith(prefix) for name in made)


@given(valid_keys)
def test_what_depends_on_a_key_is_in_its_shard(key: str) -> None:
    """I1: so one script outdates both; a leading "*", which no key has, does not count."""
    tag = dependents_of(key)
    assert shard_of(tag, 64) == Names("n", 64).shard(tag) == shard_of(key, 64)


def test_the_shards_of_known_keys() -> None:
    """I2: as computed elsewhere."""
    assert [shard_of(key, 64) for key in ("product:42", "käse", "123456789")] == [
        crc32(b"product:42") % 64,
        crc32(b"k\xc3\xa4se") % 64,
        0xCBF43926 % 64,
    ]


@pytest.mark.parametrize("shards", [1, 7, 64, 1000])
def test_all_names_of_a_shard_share_its_hash_tag(shards: int) -> None:
    """I1: so that one script may touch them all, on a cluster too."""
    names = Names("shop", shards, cache_version="3")
    for number in range(50):
        key = f"product:{number}"
        shard = names.shard(key)
        tag = names.part(shard, "log").partition("}")[0] + "}"
        assert int(tag.strip("{}").partition(":")[2]) == shard
        mine = [names.entry(key), names.lease(key), names.tag(key), names.part(shard, "seen")]
        assert all(each.startswith(tag + ":") for each in mine)
        assert mine[0] == f"{tag}:e3:{key}"
        assert len(set(mine)) == len(mine)


def test_names_of_a_namespace_never_meet_those_of_another() -> None:
    """Nor does the ingress stream share a slot with a shard."""
    one, other = Names("shop", 4), Names("shop2", 4)
    of_one = {one.entry("k"), one.tag("k"), one.lease("k"), one.events, one.meta, one.nodes}
    of_other = {other.entry("k"), other.tag("k"), other.lease("k"), other.events, other.meta}
    assert not of_one & of_other
    assert one.part(EVENTS, "own") == "{forebay:shop:events}:own"


@pytest.mark.parametrize(
    "channel,ours",
    [
        (b"forebay:shop:reply:0123456789abcdef", True),
        (b"forebay:shop:reply:" + b"a" * 64, True),
        (b"forebay:shop:reply:" + b"a" * 65, False),
        (b"forebay:shop:reply:abc", False),
        (b"forebay:shop:reply:0123456789abcdef\n", False),
        (b"forebay:shop2:reply:0123456789abcdef", False),
        (b"forebay:shop:bell", False),
        (b"", False),
    ],
)
def test_reply_channels_have_a_random_part(channel: bytes, ours: bool) -> None:
    """Nobody can be made to publish anywhere else."""
    names = Names("shop", 4)

    assert names.is_reply(channel) is ours
    assert names.is_reply(names.reply("ab" * 8).encode())
