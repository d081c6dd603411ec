"""Wait for an event of another task or process, up to a generous limit.

``until`` is for tests that await, ``wait_until`` for those that do not. Both poll, since the other
side cannot tell the test; neither asserts how long it took.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio
import pytest

PATIENCE_S = 40.0
_PAUSE_S = 0.005

T = TypeVar("T")


async def until(
    found: Callable[[], Any], *, limit_s: float = PATIENCE_S, what: str = "the condition"
) -> Any:
    """Poll ``found`` until it returns a true value, and return that value.

    ``found`` may return an awaitable. The test fails, and names ``what``, after ``limit_s``.
    """
    with anyio.move_on_after(limit_s):
        while True:
            got = found()
            if isinstance(got, Awaitable):
                got = await got
            if got:
                return got
            await anyio.sleep(_PAUSE_S)
    pytest.fail(f"{what} did not come within {limit_s:g} s")


def wait_until(
    found: Callable[[], T], *, limit_s: float = PATIENCE_S, what: str = "the condition"
) -> T:
    """``until`` for a test that cannot await; ``found`` returns a plain value."""
    give_up_at = time.monotonic() + limit_s
    while True:
        got = found()
        if got:
            return got
        assert time.monotonic() < give_up_at, f"{what} did not come within {limit_s:g} s"
        time.sleep(_PAUSE_S)
