"""Sends queues of asks to the server, all limits of a subject in one script.

L1  Asks are decided in the order in which they stand in the queue, at one server instant.
L2  A decision takes at most ``budget_ms``; what went wrong is Unavailable or ServerRefused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import anyio

from ...schemas.errors import TimedOut
from ...schemas.keys import Names
from ...schemas.limits import Terms
from ..valkey.link import Arg, Commands, Reply
from ..valkey.scripting import Script, Scripts, run

__all__ = ["Costs", "Decided", "LimitStore", "Mode", "Outcome", "limit_args"]

Mode = str  #: t take, p peek, f force, r refund
Costs = tuple[int, ...]
_FIELDS = 5


class Outcome(NamedTuple):
    """What became of one run of equal asks."""

    granted: int
    binding: int  #: index of the limit that binds
    remaining: int
    wait_us: int
    reset_us: int


class Decided(NamedTuple):
    outcomes: list[Outcome]
    over: Sequence[int]  #: for each limit, what it would have refused were it no shadow


class LimitStore:
    def __init__(
        self,
        commands: Commands,
        names: Names,
        scripts: Scripts,
        *,
        budget_ms: int,
        test_clock_us: Callable[[], int] | None = None,
    ) -> None:
        self.commands = commands
        self.names = names
        self.budget_ms = budget_ms
        self._take = scripts["limit_take"]
        self._settle = scripts["limit_settle"]
        self._test_clock_us = test_clock_us

    def __repr__(self) -> str:
        return f"<LimitStore of {self.names.namespace} within {self.budget_ms} ms>"

    def now(self) -> Arg:
        """Empty: the server's own time."""
        return "" if self._test_clock_us is None else self._test_clock_us()

    async def decide(
        self,
        keys: Sequence[str],
        limits: Sequence[Arg],
        subject: str,
        runs: Sequence[tuple[Mode, int, Costs]],
    ) -> Decided:
        args: list[Arg] = [self.now(), self.names.limits, subject, *limits]
        for mode, count, costs in runs:
            args += (mode, count, *costs)
        reply = await self.within_budget(self._take, keys, args)
        end = _FIELDS * len(runs)
        outcomes = [
            Outcome(reply[at], reply[at + 1] - 1, *reply[at + 2 : at + 5])
            for at in range(0, end, _FIELDS)
        ]
        return Decided(outcomes, reply[end:])

    async def settle(
        self,
        keys: Sequence[str],
        limits: Sequence[Arg],
        subject: str,
        actual: Costs,
    ) -> bool:
        """Charge what a reservation (the first key) really cost; false if there is none."""
        args: list[Arg] = [self.now(), self.names.limits, subject, *limits, *actual]
        return bool(await run(self.commands, self._settle, keys, args))

    async def within_budget(
        self, script: Script, keys: Sequence[str], args: Sequence[Arg]
    ) -> Reply:
        # A timeout of the link would count against its breaker, which all of the node shares.
        with anyio.move_on_after(self.budget_ms / 1000):
            return await run(self.commands, script, keys, args)
        raise TimedOut(self.budget_ms)


def limit_args(terms: Terms, *, shadow: bool) -> list[Arg]:
    """A limit as the scripts take it."""
    return [terms.drain, terms.weight, terms.burst, int(shadow)]
