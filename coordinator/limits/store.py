"""The scripts of limits: one script decides a queue of requests for all limits of a subject.

L1  Requests are decided in queue order, at one time of the server.
L2  A decision takes at most ``budget_ms``; a failure raises Unavailable or ServerRefused.
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
    """The outcome of a run of equal requests."""

    granted: int
    binding: int  #: index of the limit that refused, or is closest to it
    remaining: int
    wait_us: int
    reset_us: int


class Decided(NamedTuple):
    outcomes: list[Outcome]
    over: Sequence[int]  #: refusals of each shadow limit


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
        """Time for the scripts; empty: the clock of the server."""
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
        """Charge the actual cost of a reservation (the first key); False if there is none."""
        args: list[Arg] = [self.now(), self.names.limits, subject, *limits, *actual]
        return bool(await run(self.commands, self._settle, keys, args))

    async def within_budget(
        self, script: Script, keys: Sequence[str], args: Sequence[Arg]
    ) -> Reply:
        # A timeout of the link would count as a failure in the breaker of the whole node.
        with anyio.move_on_after(self.budget_ms / 1000):
            return await run(self.commands, script, keys, args)
        raise TimedOut(self.budget_ms)


def limit_args(terms: Terms, *, shadow: bool) -> list[Arg]:
    """The arguments of a limit for the scripts."""
    return [terms.drain, terms.weight, terms.burst, int(shadow)]
