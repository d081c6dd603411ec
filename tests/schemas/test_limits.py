"""What a limit may be: schemas/limits.py and schemas/settings_limits.py."""

from __future__ import annotations

from typing import Any

import pytest

from forebay.schemas.errors import ConfigError, InvalidKey
from forebay.schemas.errors_limits import InvalidLimit
from forebay.schemas.limits import Limit, check_cost, check_limit, terms_of
from forebay.schemas.settings import Limiter
from forebay.schemas.settings_limits import default_limit
from forebay.schemas.settings_sources import FileSource, Resolved, describe, resolve

NAN, INF = float("nan"), float("inf")


def limit(**given: Any) -> Limit:
    return Limit(**{"name": "api", "rate": 10} | given)


@pytest.mark.parametrize(
    "field, value",
    [
        *[("rate", value) for value in (0, -1, NAN, INF, 2e9, True, "10", 1e-9)],
        *[("per", value) for value in (0, -1, NAN, INF, 1e-9, 1e9)],
        *[("burst", value) for value in (-1, 1.5, True, 10**9 + 1)],
        *[("concurrency", value) for value in (-1, 1.5)],
        *[("lease_hold", value) for value in (0, NAN, 61)],
        ("store_down", "maybe"),
    ],
)
def test_a_bad_number_is_named(field: str, value: Any) -> None:
    """I3: the field, its value and what to do."""
    with pytest.raises(InvalidLimit) as caught:
        check_limit(limit(**{field: value}))
    assert (caught.value.limit, caught.value.field) == ("api", field)
    assert repr(value)[:40] == caught.value.value
    assert caught.value.fix


@pytest.mark.parametrize("name", ["", "a" * 64, "{a}", "a\x00", "a:b", "a b", "-a", "a\n", 7, None])
def test_a_bad_name_is_an_invalid_key(name: Any) -> None:
    """No name that could be mistaken for another key."""
    with pytest.raises(InvalidKey):
        check_limit(limit(name=name))


@pytest.mark.parametrize("cost", [0, -1, 11, 1.0, True, "1", None, NAN])
def test_a_cost_that_could_never_be_granted(cost: Any) -> None:
    """From 1 to the burst, in whole tokens."""
    with pytest.raises(InvalidLimit) as caught:
        check_cost(check_limit(limit()), cost)
    assert caught.value.field == "cost"


def test_the_burst_is_the_rate_unless_it_is_given() -> None:
    """At least one token."""
    assert [check_limit(limit(rate=rate)).burst for rate in (10, 2.5, 0.01)] == [10, 3, 1]
    assert check_limit(limit(burst=3)).burst == 3


def test_a_limit_that_cannot_be_exact_is_refused() -> None:
    """I2: too many digits for so large a burst; fewer digits will do."""
    with pytest.raises(InvalidLimit, match="fewer digits"):
        check_limit(limit(rate=333.333333, burst=100_000))
    assert terms_of(check_limit(limit(rate=1_000, per=3, burst=100_000))).weight == 3_000


def test_the_default_limit_is_what_the_settings_say() -> None:
    """As many at once as in a window."""
    made = default_limit(Limiter(max_tokens=30, window_s=60))
    assert (made.name, made.rate, made.per, made.burst) == ("default", 30, 60, 30)


# In the configuration


def resolved(text: str, **environ: str) -> Resolved:
    file = FileSource(path="forebay.toml", text=text)
    return resolve(file=file, environ=environ, flags={}, read_secret=lambda _: None)


def test_tables_are_limits() -> None:
    """Beside the bounds of the same section, which are numbers."""
    found = resolved(
        "[limits]\nloads_max = 5\n[limits.login]\nrate = 1\nper = 60\nstore_down = 'closed'\n"
        "[limits.api]\nrate = 100\nburst = 50"
    )
    assert found.settings.limits.loads_max == 5
    api, login = found.settings.limiter.named
    assert (api.name, api.rate, api.burst) == ("api", 100, 50)
    assert (login.name, login.per, login.store_down) == ("login", 60, "closed")
    (row,) = [row for row in describe(found) if row.name == "limiter.named"]
    assert (row.value_shown, row.origin) == ("api, login", "file forebay.toml")


def test_the_default_comes_from_the_neutral_names() -> None:
    """RATE_MAX_TOKENS and RATE_WINDOW_SEC."""
    found = resolved("", RATE_MAX_TOKENS="7", RATE_WINDOW_SEC="2.5")
    made = default_limit(found.settings.limiter)
    assert (made.rate, made.per, made.burst) == (7, 2.5, 7)


def test_limits_in_the_environment_are_json() -> None:
    """As the tables of the file, which they replace; what is wrong is told alike."""
    text = '{"api": {"rate": 5, "per": 2}}'
    (api,) = resolved("[limits.b]\nrate = 1", FOREBAY_LIMITER__NAMED=text).settings.limiter.named
    assert (api.name, api.rate, api.per) == ("api", 5, 2)
    for bad in ("[]", "x", '{"api": 3}', '{"api": {"rate": 0}}', '{"api": {"rat": 1}}'):
        with pytest.raises(ConfigError) as caught:
            resolved("", FOREBAY_LIMITER__NAMED=bad)
        assert caught.value.origin == "environment FOREBAY_LIMITER__NAMED"


@pytest.mark.parametrize(
    "table, setting, says",
    [
        ("[limits.api]\nrat = 1", "limits.api.rat", "did you mean rate"),
        ("[limits.api]\nburst = 1", "limits.api.rate", "is missing"),
        ("[limits.api]\nrate = 'x'", "limits.api.rate", "Expected `float`"),
        ("[limits.api]\nrate = nan", "limits.api.rate", "out of bounds"),
        ("[limits.api]\nrate = 1\nstore_down = 'x'", "limits.api.store_down", "Invalid enum"),
        ("[limits.'a b']\nrate = 1", "limits.a b", "percent-encoded"),
        ("[limits.default]\nrate = 1", "limits.default", "RATE_MAX_TOKENS|max_tokens"),
        ("[limits.loads_max]\nrate = 1", "limits.loads_max", "whole number"),
        ("[limiter]\nnamed = 3", "limiter.named", "NAME"),
        ("[limiter]\nwindow_s = 1e-9", "limiter.window_s", "make no limit"),
    ],
)
def test_a_bad_table_is_a_config_error(table: str, setting: str, says: str) -> None:
    """It names the setting as it stands in the file, and what to do."""
    with pytest.raises(ConfigError, match=says) as caught:
        resolved(table)
    assert (caught.value.setting, caught.value.origin) == (setting, "file forebay.toml")
