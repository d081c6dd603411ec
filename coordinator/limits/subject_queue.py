"""Asks of one subject, of which one script at a time is on its way.

C1  While a script is under way, further asks queue up; the next script decides all of them, in
    the order in which they came, as if each had been sent alone at that instant. Nothing waits
    for more to come.
C2  A caller that is cancelled before its ask was sent is not charged. A grant that finds its
    caller gone goes to the next of the equal asks in that script, else it is given back. A
    refund is carried out whether or not its caller waits for it.
C3  Whatever happens to the server, every ask is answered: by it, or by the limits' policies.
C4  At most ``ASKS_MAX`` asks of a subject wait; one more is Unavailable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import structlog
from anyio.lowlevel import cancel_shielded_checkpoint

from ...schemas.errors import ServerRefused, Unavailable
from ...schemas.limits import Source, Verdict
from .denials import CachedDenial
from .gcra import Tat
from .local_tokens import LocalTokens
from .store import Costs, Decided, Mode, Outcome

__all__ = ["ASKS_MAX", "Lane", "Rules", "Run", "runs_of"]

log = structlog.get_logger(__name__)

ASKS_MAX = 100_000
ASKS_PER_FLIGHT = 4_096
RUNS_PER_FLIGHT = 128

Answer = asyncio.Future[Verdict]
Ask = tuple[Answer | None, Mode, int, Costs]


class Run:
    """Asks that are equal, and stand one behind the other."""

    __slots__ = ("answers", "costs", "count", "mode", "whole")

    def __init__(self, mode: Mode, count: int, costs: Costs, answers: list[Answer | None]) -> None:
        self.mode = mode
        self.count = count
        self.costs = costs
        self.answers = answers
        self.whole = count == 1  #: each ask is one of the count; else one ask is all of it

    @property
    def sent(self) -> tuple[Mode, int, Costs]:
        return self.mode, self.count, self.costs

    def asks(self) -> list[Ask]:
        each = 1 if self.whole else self.count
        return [(answer, self.mode, each, self.costs) for answer in self.answers]

    def reach(self, granted: int) -> int:
        """How many of the asks are told yes: peeks take nothing from each other."""
        return self.count if granted and self.mode == "p" else granted


def runs_of(asks: Sequence[Ask]) -> list[Run]:
    """The asks whose callers are still there, and all refunds, in order; neighbours that are
    equal in one.
    """
    runs: list[Run] = []
    last: Run | None = None
    for answer, mode, count, costs in asks:
        if answer is not None and answer.done() and mode != "r":
            continue
        if (
            last is not None
            and last.whole
            and count == 1
            and last.mode == mode
            and last.costs == costs
        ):
            last.count += 1
            last.answers.append(answer)
            continue
        last = Run(mode, count, costs, [answer])
        runs.append(last)
    return runs


class Rules(Protocol):
    """What a lane asks of the set of limits that it belongs to."""

    def now(self) -> float: ...
    def spawn(self, lane: Lane) -> None: ...
    def blocked(self) -> bool: ...
    async def decide(self, lane: Lane, runs: Sequence[Run]) -> Decided: ...
    def decide_alone(self, lane: Lane, run: Run, why: Exception | None) -> Outcome: ...
    def verdicts(self, run: Run, outcome: Outcome, source: Source) -> tuple[Verdict, Verdict]: ...
    def lease_most(self) -> int: ...
    def lease_hold_s(self) -> float: ...
    def given_back(self, count: int) -> None: ...
    def remembers(self) -> bool: ...


class Lane:
    """The asks of one subject, and what is known of it."""

    __slots__ = ("_asks", "_busy", "_rules", "_starved", "denial", "keys", "local", "stock", "word")

    def __init__(
        self, rules: Rules, keys: Sequence[str], word: str, stock: LocalTokens | None, local: int
    ) -> None:
        self.keys = keys
        self.word = word  #: what is published when something was given back
        self.denial = CachedDenial()
        self.stock = stock
        self.local: list[Tat | None] = [None] * local  #: states while the server is away
        self._rules = rules
        self._asks: list[Ask] = []
        self._busy = False
        self._starved = False

    def __repr__(self) -> str:
        return f"<Lane {self.word}: {len(self._asks)} asks{' under way' if self._busy else ''}>"

    @property
    def busy(self) -> bool:
        """Whether somebody waits for an answer."""
        return bool(self._busy or self._asks)

    @property
    def idle(self) -> bool:
        """Whether nothing would be lost if it were forgotten."""
        stocked = self.stock is not None and self.stock.tokens
        return not (self.busy or stocked)

    def join(self, mode: Mode, count: int, costs: Costs) -> Answer:
        """Queue an ask; the answer is awaited.

        Raises:
            Unavailable: too many wait, or the limiter is closed.
        """
        if len(self._asks) >= ASKS_MAX:
            raise Unavailable(f"{ASKS_MAX} asks of one subject wait already")
        if not self._busy:
            self._wake()
        answer: Answer = asyncio.get_running_loop().create_future()
        self._asks.append((answer, mode, count, costs))
        if self.stock is not None and mode == "t":
            self._starved = True
        return answer

    def give_back(self, count: int, costs: Costs) -> None:
        """Queue a refund that nobody waits for; once closed, the charge stands."""
        self._rules.given_back(count)
        with suppress(Unavailable):
            self._wake()
        self._asks.append((None, "r", count, costs))

    def restock(self) -> None:
        """Fetch tokens ahead, if not already on the way; once closed, none are."""
        self._starved = True
        with suppress(Unavailable):
            self._wake()

    def _wake(self) -> None:
        """Have a script sent after this tick, with all that has come by then."""
        if not self._busy:
            self._rules.spawn(self)
            self._busy = True

    def close(self) -> None:
        """Answer those who wait: nobody will decide any more."""
        self._fail(runs_of(self._taken()), "the limiter is closed")
        self._busy = False

    async def pump(self) -> None:
        """Decide until nobody waits."""
        try:
            while self._asks or self._starved:
                await self._fly(self._next_runs())
                if not self._asks:  # those who were just answered may ask again at once
                    await cancel_shielded_checkpoint()
        finally:
            self._busy = False

    def _next_runs(self) -> list[Run]:
        asks, self._asks = self._asks[:ASKS_PER_FLIGHT], self._asks[ASKS_PER_FLIGHT:]
        runs = runs_of(asks)
        late = [ask for run in runs[RUNS_PER_FLIGHT:] for ask in run.asks()]
        self._asks = late + self._asks
        return runs[:RUNS_PER_FLIGHT]

    async def _fly(self, runs: list[Run]) -> None:
        try:
            if self._rules.blocked():
                self._starved = False
                self._answer_alone(runs, None)
                return
            wanted = self._add_fetch(runs)
            if not runs:
                return
            sent_at, epoch = self._rules.now(), self.denial.epoch
            decided = await self._rules.decide(self, runs)
            if wanted:
                self._fetched(wanted, decided.outcomes[-1], sent_at)
            for run, outcome in zip(runs, decided.outcomes, strict=True):
                self._answer(run, outcome, sent_at, epoch)
        except (Unavailable, ServerRefused) as error:
            self._answer_alone(runs + runs_of(self._taken()), error)
        except BaseException as error:
            closed = not isinstance(error, Exception)
            why = "the limiter is closed" if closed else "the limiter failed, its log says why"
            self._fail(runs + runs_of(self._taken()), why)
            if closed:
                raise
            log.exception("limiter.failed")

    def _taken(self) -> list[Ask]:
        asks, self._asks = self._asks, []
        return asks

    def _add_fetch(self, runs: list[Run]) -> int:
        """Let the tokens that are to be fetched ride along, behind all asks."""
        starved, self._starved = self._starved, False
        if self.stock is None or not starved:
            return 0
        wanted = self.stock.wanted(self._rules.now(), self._rules.lease_most())
        if wanted:
            runs.append(Run("t", wanted, (1,), []))
        return wanted

    def _fetched(self, wanted: int, outcome: Outcome, sent_at: float) -> None:
        if self.stock is not None:
            self.stock.put(outcome.granted, wanted, sent_at + self._rules.lease_hold_s())
        elif outcome.granted:  # leasing was switched off meanwhile
            self.give_back(outcome.granted, (1,))

    def _answer(self, run: Run, outcome: Outcome, sent_at: float, epoch: int) -> None:
        if run.mode == "r":
            self.denial.forget()
            epoch = -1
        if not run.answers:
            return
        yes, no = self._rules.verdicts(run, outcome, "server")
        if outcome.granted < run.count and run.mode == "t" and self._rules.remembers():
            cost = max(run.costs)
            if cost == min(run.costs):
                self.denial.learn(cost, no, outcome.wait_us, sent_at, epoch)
        self._share(run, outcome.granted, yes, no)

    def _share(self, run: Run, granted: int, yes: Verdict, no: Verdict) -> None:
        if not run.whole:
            (answer,) = run.answers
            if answer is not None and not answer.done():
                answer.set_result(yes if granted else no)
            elif granted and run.mode == "t":
                self.give_back(granted, run.costs)
            return
        left = run.reach(granted)
        for answer in run.answers:
            if answer is None or answer.done():
                continue
            answer.set_result(yes if left > 0 else no)
            left -= 1
        if left > 0 and run.mode == "t":
            self.give_back(left, run.costs)

    def _answer_alone(self, runs: Sequence[Run], why: Exception | None) -> None:
        for run in runs:
            if not run.answers:
                continue
            outcome = self._rules.decide_alone(self, run, why)
            yes, no = self._rules.verdicts(run, outcome, "local")
            if run.mode == "t" and not run.whole:
                yes = no if not outcome.granted else yes
            reach = run.reach(outcome.granted)
            for n, answer in enumerate(run.answers):
                if answer is not None and not answer.done():
                    answer.set_result(yes if not run.whole or n < reach else no)

    def _fail(self, runs: Sequence[Run], why: str) -> None:
        for answer in (each for run in runs for each in run.answers):
            if answer is not None and not answer.done():
                answer.set_exception(Unavailable(why))
