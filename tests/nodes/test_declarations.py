"""Declarations on a node; tests/test_typing.py tests the types of its decorators."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import forebay
from forebay.schemas.settings import LEASE_MS_MAX, Settings
from forebay.schemas.settings_sources import Resolved

MakeNode = Callable[..., forebay.Node]
PATIENCE_S_MAX = LEASE_MS_MAX / 1000


async def squared(id: int) -> int:
    return id * id


@pytest.mark.parametrize("ttl", [0, -1, math.nan, math.inf, 1e9, 0.0001, True, "60", None])
def test_lifetime_that_cannot_be_is_refused(make_node: MakeNode, ttl: Any) -> None:
    """D1: a lifetime is a number of seconds, above zero and within a year."""
    with pytest.raises(forebay.ConfigError, match="ttl"):
        make_node().cached("a:{id}", ttl=ttl)(squared)


@pytest.mark.parametrize("name", ["stale_for", "negative_ttl"])
@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf, 1e9])
def test_second_lifetimes_are_checked_too(make_node: MakeNode, name: str, seconds: float) -> None:
    """D1: the other lifetimes may be zero, and are otherwise checked in the same way."""
    options: dict[str, Any] = {name: seconds}
    with pytest.raises(forebay.ConfigError, match=name):
        make_node().cached("a:{id}", ttl=60, **options)(squared)
    make_node().cached("a:{id}", ttl=60, **{name: 0})(squared)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("stale_if_error", value) for value in (-1, math.nan, 1e9, "5", True)],
        *[("refresh_ahead", value) for value in (0.0, 1.0, 1, -0.5, math.nan, "0.5", True)],
        *[
            ("soft_timeout", value)
            for value in (0, -1, math.nan, PATIENCE_S_MAX + 0.001, "1", True)
        ],
        *[
            ("hard_timeout", value)
            for value in (0, -1, math.nan, PATIENCE_S_MAX + 0.001, "1", True)
        ],
        *[("max_staleness", value) for value in (0, 0.009, math.nan, "1", True)],
        *[("on_disconnected", value) for value in ("", "Stale", 1, ["fail"])],
        ("harmless", 5),
        ("harmless", [1]),
        ("harmless", (ValueError, "KeyError")),
        ("harmless", (BaseException,)),
    ],
)
def test_other_options_are_checked_where_they_are_declared(
    make_node: MakeNode, name: str, value: Any
) -> None:
    """D1: the error names the option."""
    with pytest.raises(forebay.ConfigError, match=name):
        make_node().cached("a:{id}", ttl=60, **{name: value})


def test_a_caller_is_not_held_longer_for_having_something_to_be_served(
    make_node: MakeNode,
) -> None:
    """D1: the hard timeout must exceed the soft timeout."""
    with pytest.raises(forebay.ConfigError, match="soft_timeout"):
        make_node().cached("a:{id}", ttl=60, soft_timeout=2, hard_timeout=1)
    make_node().cached("a:{id}", ttl=60, soft_timeout=1, hard_timeout=1)
    make_node().cached("a:{id}", ttl=60, soft_timeout=2)


def test_one_exception_is_harmless_without_a_list(make_node: MakeNode) -> None:
    """An option for exceptions takes what an except clause takes."""
    for given in (KeyError, [KeyError], (KeyError,)):
        options: dict[str, Any] = {"harmless": given}
        made = make_node().cached("a:{id}", ttl=60, **options)(squared)
        assert made._cache.declared.harmless == (KeyError,)


@pytest.mark.parametrize("given", ["catalog", ["b*"], ["b:{other}"]])
def test_dependencies_are_keys_like_others(make_node: MakeNode, given: Any) -> None:
    """D1: a list of templates whose fields are parameters."""
    with pytest.raises((forebay.ConfigError, forebay.InvalidKey)):
        make_node().cached("a:{id}", ttl=60, depends_on=given)(squared)


@pytest.mark.parametrize(
    "template,tags",
    [
        ("a", []),
        ("a:{other}", []),
        ("a:{id}:{other}", []),
        ("a:{id}", ["b:{other}"]),
        ("a:{id}{id}", []),
        ("a b:{id}", []),
        ("", []),
        ("a:{id}", ["b*"]),
        ("a:{id}", "catalog"),
    ],
)
def test_template_that_does_not_fit_is_refused(
    make_node: MakeNode, template: str, tags: Any
) -> None:
    """D1: every parameter is a field of the key, every field is a parameter; tags are a list."""
    with pytest.raises((forebay.ConfigError, forebay.InvalidKey)):
        make_node().cached(template, ttl=60, tags=tags)(squared)


def test_two_caches_for_one_key_are_refused(make_node: MakeNode) -> None:
    """D1: a second cache of the same name, or for the same keys, is a mistake."""
    node = make_node()
    node.cached("a:{id}", ttl=60)(squared)

    with pytest.raises(forebay.ConfigError, match="declared already"):
        node.cached("b:{id}", ttl=60)(squared)
    with pytest.raises(forebay.ConfigError, match="declared already"):
        node.cached("a:{id}", ttl=60, name="other")(squared)
    node.cached("b:{id}", ttl=60, name="other")(squared)


def test_two_sinks_of_one_name_are_refused(make_node: MakeNode) -> None:
    """D1: two sinks of one name are refused: writes are assigned by the name."""
    node = make_node()

    def declare(template: str) -> None:
        @node.sink(template)
        async def save(writes: list[forebay.Write[int]]) -> None:
            """Accept all writes."""

    declare("a:{id}")
    with pytest.raises(forebay.ConfigError, match="another sink has that name"):
        declare("b:{id}")
    with pytest.raises(forebay.ConfigError, match="for this key template"):
        node.sink("a:{id}")(_takes_all)


def test_one_sink_may_serve_two_templates(make_node: MakeNode, tmp_path: Path) -> None:
    """One sink object may be declared for several templates."""
    node = make_node()
    sink = forebay.SqlSink(f"sqlite+aiosqlite:///{tmp_path / 'x.db'}", table="x", key=("id",))
    node.sink("a:{id}", sink)
    node.sink("b:{id}", sink)

    assert len(node._routes.all_sinks()) == 1


async def test_nothing_is_declared_on_a_running_node(make_node: MakeNode) -> None:
    """D3: caches, sinks, hooks and settings are refused after the start, also in a start hook."""
    node = make_node()
    refused: list[str] = []

    def try_all() -> None:
        tries: dict[str, Callable[[], object]] = {
            "cached": lambda: node.cached("a:{id}", ttl=60)(squared),
            "sink": lambda: node.sink("a:{id}")(_takes_all),
            "on_start": lambda: node.on_start(_nothing),
            "on_stop": lambda: node.on_stop(_nothing),
            "configure": lambda: node._configure(Resolved(settings=Settings(), origins={})),
        }
        for name, attempt in tries.items():
            with pytest.raises(forebay.ConfigError, match="already running"):
                attempt()
            refused.append(name)

    @node.on_start
    async def early() -> None:
        try_all()

    async with node:
        try_all()
    assert refused == ["cached", "sink", "on_start", "on_stop", "configure"] * 2
    node.cached("a:{id}", ttl=60)(squared)


async def _takes_all(writes: list[forebay.Write[Any]]) -> None:
    """Ignore the writes."""


async def _nothing() -> None:
    """Do nothing."""


@pytest.mark.parametrize(
    "options",
    [
        {"ttl": -1},
        {"ttl": 1, "refresh_ahead": 7},
        {"ttl": 1, "harmless": 5},
        {"ttl": 1, "tags": "catalog"},
        {"ttl": 1, "depends_on": "catalog"},
        {"ttl": 1, "tags": ["x:{other}"]},
    ],
)
def test_a_refusal_says_which_cache_it_is_about(make_node: MakeNode, options: Any) -> None:
    """D1: the error names the declaration."""
    with pytest.raises((forebay.ConfigError, forebay.InvalidKey), match=r"a:\{id\}"):
        make_node().cached("a:{id}", **options)(squared)


@pytest.mark.parametrize("tag", [1, None, "x:{id:d}", "x:{}"])
def test_a_tag_that_cannot_be_is_named(make_node: MakeNode, tag: Any) -> None:
    """D1: an invalid tag is reported as a tag, not as a key template."""
    with pytest.raises(forebay.InvalidKey) as caught:
        make_node().cached("a:{id}", ttl=1, tags=[tag])(squared)
    assert caught.value.name == "tag"
