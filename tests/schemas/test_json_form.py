"""J1: a value is expressed in JSON as it is, or refused."""

from __future__ import annotations

import math
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.schemas.json_form import json_form

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


class Row(msgspec.Struct):
    name: str
    prices: list[float]


def floats_in(value: object) -> list[float]:
    if isinstance(value, float):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [number for each in inner for number in floats_in(each)]


@given(VALUES)
def test_what_has_a_form_comes_back_and_the_rest_is_refused(value: object) -> None:
    """No NaN and no infinity becomes null."""
    if all(map(math.isfinite, floats_in(value))):
        assert msgspec.json.decode(json_form(value)) == value
    else:
        with pytest.raises(ValueError):
            json_form(value)


@pytest.mark.parametrize(
    "value, place",
    [
        (math.nan, "nan is no number in JSON, at the top"),
        ({"a": [None, {"b": -math.inf}]}, "-inf is no number in JSON, at .a[1].b"),
        (Row("tea", [1.0, math.inf]), "inf is no number in JSON, at .prices[1]"),
        ({(1, 2): 3}, "keys"),
        (object(), "object"),
    ],
)
def test_the_error_says_where(value: object, place: str) -> None:
    """The place and the value."""
    with pytest.raises(ValueError, match=re.escape(place)):
        json_form(value)
