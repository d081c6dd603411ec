"""Limits in the configuration: ``[limits.NAME]`` tables, and the default one.

    [limits.api]
    rate = 100
    per = 1.0          # seconds
    burst = 50

or, where there is no file, the same as JSON in FOREBAY_LIMITER__NAMED. The default limit is
``[limiter]`` with ``max_tokens`` and ``window_s``, or RATE_MAX_TOKENS and RATE_WINDOW_SEC; its
name is ``default``. Bad tables are a ConfigError that names the setting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from msgspec import structs

from .errors import ConfigError, InvalidKey
from .errors_limits import InvalidLimit
from .limits import Limit, check_limit
from .settings import Limiter
from .settings_names import nearest, plainly

__all__ = ["DEFAULT_LIMIT", "default_limit", "named_limits"]

DEFAULT_LIMIT = "default"
_FIELDS = {field.name: field.type for field in structs.fields(Limit) if field.name != "name"}


def default_limit(limiter: Limiter) -> Limit:
    """As many tokens at once as in every window."""
    tokens = limiter.max_tokens
    return check_limit(Limit(name=DEFAULT_LIMIT, rate=tokens, per=limiter.window_s, burst=tokens))


def named_limits(tables: Mapping[str, Mapping[str, Any]], origin: str) -> tuple[Limit, ...]:
    """The limits of these tables, by name."""
    return tuple(_limit(name, table, origin) for name, table in sorted(tables.items()))


def _limit(name: str, table: Mapping[str, Any], origin: str) -> Limit:
    setting = f"limits.{plainly(name)}"

    def refused(leaf: str, problem: str, fix: str) -> ConfigError:
        value = plainly(str(table[leaf])) if leaf in table else "***"
        where = f"{setting}.{plainly(leaf)}" if leaf else setting
        return ConfigError(setting=where, value=value, origin=origin, problem=problem, fix=fix)

    if name == DEFAULT_LIMIT:
        fix = "set limiter.max_tokens and limiter.window_s, or choose another name"
        raise refused("", "the default limit is set elsewhere", fix)
    for leaf, problem, fix in _faults(table):
        raise refused(leaf, problem, fix)
    try:
        return check_limit(msgspec.convert({**table, "name": name}, Limit))
    except InvalidLimit as error:
        raise refused(error.field, error.problem, error.fix) from None
    except InvalidKey as error:
        raise refused("", error.problem, "choose another name") from None


def _faults(table: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What cannot be decoded: the field, the problem, and what to do."""
    for leaf, value in table.items():
        if leaf not in _FIELDS:
            close = nearest(leaf, _FIELDS)
            fix = f"did you mean {close}?" if close else "a limit has " + ", ".join(_FIELDS)
            yield leaf, "is nothing that a limit has", fix
            continue
        try:
            msgspec.convert(value, _FIELDS[leaf])
        except msgspec.ValidationError as error:
            yield leaf, plainly(str(error)), "correct it"
    if "rate" not in table:
        yield "rate", "is missing", "write rate = TOKENS, and per = SECONDS unless it is 1"
