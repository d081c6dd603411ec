"""Who shares the limits: coordinator/limits/member_count.py."""

from __future__ import annotations

from typing import Any

from forebay.coordinator.limits.member_count import MemberCount
from forebay.schemas.errors import ServerRefused, Unavailable
from forebay.schemas.keys import Names


class Told:
    """A server that says these, one after the other."""

    def __init__(self, *replies: int | Exception) -> None:
        self._replies = list(replies)

    async def call(self, *args: Any, timeout_ms: int | None = None) -> Any:
        reply = self._replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return [args[-1], reply]

    call_many = call


async def counts(*replies: int | Exception) -> list[int]:
    member_count = MemberCount(Told(*replies), Names("shop", 4))
    found = [member_count.count]
    for _ in replies:
        await member_count.look()
        found.append(member_count.count)
    return found


async def test_the_most_of_late_counts() -> None:
    """N2: one that is alone after a failover does not believe it at once."""
    assert await counts(0, 7, 1, 1, 1, 1, 2) == [1, 1, 7, 7, 7, 7, 7, 2]


async def test_what_was_known_stays_while_nobody_tells() -> None:
    """N2: be it that the server is away, or that this user may not ask."""
    assert await counts(4, Unavailable("away"), ServerRefused("NOPERM", "no")) == [1, 4, 4, 4]
