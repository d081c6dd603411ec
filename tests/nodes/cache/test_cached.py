"""Declaring a cache: invalid declarations are refused, and keys are correct."""

from __future__ import annotations

import enum
from decimal import Decimal
from typing import Annotated, Any

import pytest
from msgspec import Meta

import forebay
from forebay.nodes.cache.cached import Cached
from forebay.nodes.cache.declaration import Declaration, lifetime_ms
from forebay.nodes.cache.policy import Policy
from forebay.schemas.errors import ConfigError, ForebayError, InvalidKey
from forebay.schemas.settings import CacheDefaults


class Airport(enum.Enum):
    NEWARK = "EWR"


def cached(function: Any, template: str, **options: Any) -> Cached[Any, Any]:
    return Cached(function, Declaration(template=template, **{"ttl": 60, **options}))


async def by_id(id: int) -> str:
    return str(id)


async def by_two(kind: str, id: int = 7) -> str:
    return f"{kind} {id}"


async def by_name_only(*, id: int) -> str:
    return str(id)


async def typed(a: Airport, d: Decimal, n: Annotated[int, Meta(ge=0)], f: bool) -> int | None:
    return None


@pytest.mark.parametrize(
    ("function", "template", "args", "kwargs", "key"),
    [
        (by_id, "p:{id}", (42,), {}, "p:42"),
        (by_id, "p:{id}", (), {"id": 42}, "p:42"),
        (by_two, "p:{kind}:{id}", ("a b",), {}, "p:a%20b:7"),
        (by_two, "p:{kind}:{id}", ("x",), {}, "p:x:7"),
        (by_two, "p:{kind}:{id}", ("x", 8), {}, "p:x:8"),
        (by_two, "p:{id}:{kind}", (), {"id": 8, "kind": "x"}, "p:8:x"),
        (by_name_only, "p:{id}", (), {"id": 42}, "p:42"),
    ],
)
def test_a_call_has_one_key_however_it_is_written(function, template, args, kwargs, key) -> None:
    """Positional, keyword and default arguments give the same key."""
    assert cached(function, template).key(*args, **kwargs) == key


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), ((1, 2), {}), ((1,), {"id": 1}), ((1,), {"x": 1}), ((), {"x": 1})],
)
def test_a_call_that_the_function_would_refuse_is_refused(args, kwargs) -> None:
    """Such a call raises TypeError and is not answered from the cache."""
    with pytest.raises(TypeError):
        cached(by_id, "p:{id}").key(*args, **kwargs)


def test_arguments_without_a_key_are_refused() -> None:
    """None is the most common case."""
    for value in (None, "", b"x", [1]):
        with pytest.raises(InvalidKey):
            cached(by_id, "p:{id}").key(value)


@pytest.mark.parametrize(
    ("function", "template", "tags"),
    [
        (by_id, "p", []),
        (by_id, "p:{other}", []),
        (by_id, "p:{id}:{other}", []),
        (by_two, "p:{id}", []),
        (by_id, "p:{id}", ["t:{other}"]),
        (by_id, "p:{id}", ["t:{id}:{other}"]),
    ],
)
def test_template_and_parameters_must_match(function, template: str, tags: list[str]) -> None:
    """Otherwise two different calls would share an entry."""
    with pytest.raises(ConfigError) as caught:
        cached(function, template, tags=tags)
    assert caught.value.value == (tags or [template])[0]
    if tags:
        with pytest.raises(ConfigError, match=r"use fields of p:\{id\} only"):
            cached(function, template, depends_on=tags)


@pytest.mark.parametrize("template", ["", "p {id}", "p:{id}{id}", "{"])
def test_a_template_must_make_keys(template: str) -> None:
    """An invalid template is refused when the cache is declared."""
    with pytest.raises((ConfigError, InvalidKey)):
        cached(by_id, template)


@pytest.mark.parametrize(
    ("seconds", "ms"), [(60, 60_000), (0.25, 250), (0.001, 1), (366 * 86_400, 31_622_400_000)]
)
def test_lifetimes_are_seconds(seconds: float, ms: int) -> None:
    """Seconds are converted to milliseconds."""
    assert lifetime_ms("ttl", seconds) == ms


@pytest.mark.parametrize("seconds", [0, -1, 1e-9, 1e12, float("nan"), float("inf"), "60", True])
def test_invalid_lifetimes_are_refused(seconds: Any) -> None:
    """Zero is invalid where nothing would be cached."""
    with pytest.raises(ConfigError, match="ttl"):
        lifetime_ms("ttl", seconds)


def test_a_stale_period_may_be_zero() -> None:
    """The lifetime of absences may be zero too."""
    assert lifetime_ms("stale_for", 0, zero=True) == 0
    policy = cached(by_id, "p:{id}", negative_ttl=0)._cache.policy(CacheDefaults())
    assert (policy.stale_ms, policy.negative_ms) == (0, 0)


def test_the_policy_follows_the_declaration() -> None:
    """Arguments that are not given come from the settings."""
    declared = cached(
        by_id,
        "p:{id}",
        stale_for=2,
        stale_if_error=5,
        refresh_ahead=0.8,
        soft_timeout=0.25,
        hard_timeout=0.5,
        max_staleness=0.1,
        on_disconnected="fail",
    )._cache.policy(CacheDefaults(lease_ms=3_000, throttle_ms=70))
    assert declared == Policy(
        ttl_ms=60_000,
        stale_ms=2_000,
        error_ms=3_000,
        negative_ms=10_000,
        lease_ms=3_000,
        jitter=CacheDefaults().jitter,
        refresh_ahead=0.8,
        soft_timeout_ms=250,
        hard_timeout_ms=500,
        throttle_ms=70,
        staleness_ms=100,
        on_disconnected="fail",
    )
    silent = cached(by_id, "p:{id}")._cache.policy(
        CacheDefaults(max_staleness_ms=77, on_disconnected="stale")
    )
    assert (silent.staleness_ms, silent.on_disconnected) == (77, "stale")
    assert (silent.error_ms, silent.soft_timeout_ms, silent.hard_timeout_ms) == (0, 0, 0)
    assert silent.refresh_ahead == 0.0


def test_the_stale_period_counts_towards_the_error_period() -> None:
    """Only the rest of the error period is added."""
    for stale_if_error, error_ms in ((0, 0), (2, 0), (3, 0), (3.5, 500)):
        policy = cached(by_id, "p:{id}", stale_for=3, stale_if_error=stale_if_error)._cache.policy(
            CacheDefaults()
        )
        assert (policy.stale_ms, policy.error_ms) == (3_000, error_ms)


@pytest.mark.parametrize(("ttl", "negative_ms"), [(3, 3_000), (600, 10_000)])
def test_absences_live_at_most_ten_seconds_by_default(ttl: int, negative_ms: int) -> None:
    """A row that is created now becomes visible soon."""
    policy = cached(by_id, "p:{id}", ttl=ttl)._cache.policy(CacheDefaults())
    assert policy.negative_ms == negative_ms


async def test_a_refresh_calls_the_loader_with_arguments_parsed_from_the_key() -> None:
    """They have the types of the parameters: a job carries only the key."""
    got: list[Any] = []

    async def load(a: Airport, d: Decimal, n: int, f: bool) -> int | None:
        got.append((a, d, n, f))
        return None

    load.__annotations__.update(typed.__annotations__)
    made = cached(load, "x:{a}:{d}:{n}:{f}", tags=["t:{a}:{n}", "all"])
    values = (Airport.NEWARK, Decimal("1.50"), 3, True)
    call = made._cache.call_of(made.key(*values))
    await call.run()
    assert got == [values]
    assert call.tags == ["t:EWR:3", "all"]
    with pytest.raises(InvalidKey, match=r"does not match.*>= 0"):
        made._cache.call_of("x:EWR:1.5:-3:True")
    with pytest.raises(InvalidKey, match="does not match"):
        made._cache.call_of("y:1")


def test_it_looks_like_the_function_it_wraps() -> None:
    """Name and docstring of the loader are kept."""
    made = cached(by_two, "p:{kind}:{id}")
    assert (made.__name__, made.name, repr(made)) == (
        "by_two", "by_two", "<Cached by_two p:{kind}:{id}>",
    )  # fmt: skip
    assert made.__wrapped__ is by_two


def test_it_shows_only_what_a_user_calls() -> None:
    """The node's own methods are on the cache behind it."""
    made = cached(by_id, "p:{id}")
    assert {name for name in dir(made) if not name.startswith("_")} == {
        "batch", "get_with_info", "invalidate", "key", "many", "many_with_info", "name", "put",
        "warm", "write_around", "write_behind", "write_through",
    }  # fmt: skip


async def test_it_needs_a_running_node() -> None:
    """A call without a running node raises an error that says so."""
    made = cached(by_id, "p:{id}")
    for use in (made(1), made.get_with_info(1), made.invalidate(1), made.write_behind(1, "x")):
        with pytest.raises(ForebayError, match="the node is not running"):
            await use
    assert made._cache.near_hits == 0


def test_a_node_refuses_invalid_declarations() -> None:
    """The decorator raises the error."""
    node = forebay.Node("x")
    with pytest.raises(ConfigError, match="ttl"):
        node.cached("p:{id}", ttl=0)(by_id)
