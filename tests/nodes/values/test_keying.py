"""Keying: arguments to keys and labels, and keys to arguments."""

from __future__ import annotations

import enum
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.nodes.values.keying import Keying
from forebay.schemas.errors import ConfigError, InvalidKey


class Size(enum.Enum):
    LARGE = "L"


async def by_id(id: int) -> str:
    return ""


async def by_two(kind: str, id: int = 7) -> str:
    return ""


async def by_name(*, id: int) -> str:
    return ""


async def typed(size: Size, day: date, flag: bool, text: str) -> int | None:
    return None


def keying(function: Any, template: str, **options: Any) -> Keying:
    return Keying(function, "the cache", template, **options)


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (by_id, (42,), {}),
        (by_id, (), {"id": 42}),
        (by_two, ("x",), {}),
        (by_two, ("x", 7), {}),
        (by_two, (), {"id": 7, "kind": "x"}),
        (by_name, (), {"id": 42}),
    ],
)
def test_bound_arguments_give_the_key(function, args, kwargs) -> None:
    """Y1: positional, keyword and default arguments agree; the fast paths agree with the general
    one.
    """
    parameters = {by_id: ("id",), by_two: ("kind", "id"), by_name: ("id",)}[function]
    made = keying(function, "p:" + ":".join(f"{{{name}}}" for name in parameters))
    assert made.parameters == parameters
    expected = {"id": 7, "kind": "x"} if function is by_two else {"id": 42}
    assert made.key(*args, **kwargs) == made.template.format(expected)
    assert made.arguments(made.key(*args, **kwargs)) == expected
    assert made.item(expected) == (("x", 7) if function is by_two else 42)


@pytest.mark.parametrize(
    ("template", "options"),
    [
        ("p", {}),
        ("p:{other}", {}),
        ("p:{id}:{other}", {}),
        ("p:{id}", {"tags": ["t:{other}"]}),
        ("p:{id}", {"depends_on": ["k:{other}"]}),
        ("p:{id}", {"tags": ["t"], "depends_on": ["k:{id}:{other}"]}),
    ],
)
def test_templates_and_parameters_must_match(template: str, options: dict[str, Any]) -> None:
    """Y1: the error names the cache and the difference."""
    with pytest.raises(ConfigError, match="the cache") as caught:
        keying(by_id, template, **options)
    assert ("id" if template in ("p", "p:{other}") else "other") in caught.value.problem


def test_labels_are_made_from_the_key() -> None:
    """Labels are made of the fields' texts, so a refresh carries the same labels."""
    made = keying(
        by_two,
        "p:{kind}:{id}",
        tags=["all", "kind:{kind}", "{kind}/{id}"],
        depends_on=["base", "row:{id}"],
    )
    assert made.labelled
    expected = (["all", "kind:a%20b", "a%20b/7"], ["base", "row:7"])
    assert made.labels(made.fields(made.key("a b"))) == expected


@pytest.mark.parametrize(
    ("options", "labelled"),
    [({}, False), ({"tags": ["t"]}, True), ({"depends_on": ["k"]}, True)],
)
def test_a_cache_without_labels_need_not_bind(options: dict[str, Any], labelled: bool) -> None:
    """A read of a cache without labels skips that work."""
    made = keying(by_id, "p:{id}", **options)
    assert made.labelled is labelled
    assert made.labels({"id": 1}) == (options.get("tags", []), options.get("depends_on", []))


@pytest.mark.parametrize(
    "key",
    ["typed:L:2020-01-32:True:x", "typed:M:2020-01-31:True:x", "typed:L:2020-01-31:maybe:x",
     "typed:L:2020-01-31:True", "other:L:2020-01-31:True:x", ""],
)  # fmt: skip
def test_a_key_of_another_form_is_refused(key: str) -> None:
    """Y2: a key of another template, or with values of other types, raises InvalidKey."""
    made = keying(typed, "typed:{size}:{day}:{flag}:{text}")
    with pytest.raises(InvalidKey, match="does not match"):
        made.arguments(key)


Texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(st.sampled_from(Size), st.dates(), st.booleans(), Texts)
def test_a_key_is_parsed_to_the_arguments(size, day, flag, text) -> None:
    """Y2: they have the declared types."""
    made = keying(typed, "typed:{size}:{day}:{flag}:{text}")
    values = (size, day, flag, text)
    found = made.arguments(made.key(*values))
    assert tuple(found.values()) == values
    assert [type(each) for each in found.values()] == [type(each) for each in values]
    assert made.item(found) == values


def test_the_type_of_the_values_is_the_return_annotation() -> None:
    """It is Any without an annotation."""

    async def untyped(a: int):  # type: ignore[no-untyped-def]
        return None

    assert keying(untyped, "u:{a}").value_type is Any
    assert keying(typed, "t:{size}:{day}:{flag}:{text}").value_type == int | None
