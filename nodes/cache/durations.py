"""Seconds as they are given at the edge, milliseconds as they are used inside."""

from __future__ import annotations

import math

from ...schemas.errors import ConfigError

__all__ = ["lifetime_ms"]

_LONGEST_S = 366 * 86_400


def lifetime_ms(
    name: str, seconds: float, *, zero: bool = False, origin: str = "the declaration of a cache"
) -> int:
    """Checked, in milliseconds.

    Raises:
        ConfigError: it is no number, not positive, or over a year.
    """
    low = 0.0 if zero else 0.001
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        problem = "is not a number"
    elif math.isnan(seconds) or not low <= seconds <= _LONGEST_S:
        problem = f"must lie between {low:g} and {_LONGEST_S} seconds"
    else:
        return int(seconds * 1000)
    raise ConfigError(
        setting=name,
        value=repr(seconds),
        origin=origin,
        problem=problem,
        fix="give seconds, such as 60",
    )
