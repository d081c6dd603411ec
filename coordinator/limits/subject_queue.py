"""The queue of requests for one subject; one script at a time is in flight.

C1  While a script is in flight, further requests queue up. The next script decides all of them in
    order of arrival, as if each had been sent alone at that time. No request waits for others.
C2  A caller cancelled before its request was sent is not charged. The grant of a cancelled caller
    goes to the next equal request in the script, or is returned. A refund is carried out even if
    its caller is cancelled.
C3  Every request is answered: by the server, or by the outage policy of the limits.
C4  At most ``ASKS_MAX`` requests of a subject wait; a further one raises Unavailable.
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

__all__ = ["ASKS_MAX", "Rules", "Run", "SubjectQueue", "runs_of"]

log = structlog.get_logger(__name__)

ASKS_MAX = 100_000
ASKS_PER_FLIGHT = 4_096
RUNS_PER_FLIGHT = 128

Answer = asyncio.Future[Verdict]
Ask = tuple[Answer | None, Mode, int, Costs]


class Run:
    """Equal requests that are adjacent in the queue."""

    __slots__ = ("answers", "costs", "count", "mode", "whole")

    def __init__(self, mode: Mode, count: int, costs: Costs, answers: list[Answer | None]) -> None:
        self.mode = mode
        self.count = count
        self.costs = costs
        self.answers = answers
        self.whole = count == 1  #: each request is one of the count; else one request is all of it

    @property
    def sent(self) -> tuple[Mode, int, Costs]:
        return self.mode, self.count, self.costs

    def asks(self) -> list[Ask]:
        each = 1 if self.whole else self.count
        return [(answer, self.mode, each, self.costs) for answer in self.answers]

    def reach(self, granted: int) -> int:
        """The number of granted requests; peeks do not affect each other."""
        return self.count if granted and self.mode == "p" else granted


def runs_of(asks: Sequence[Ask]) -> list[Run]:
    """The requests of waiting callers and all refunds, in order; equal neighbours are merged."""
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
    """The interface of the limit set that owns the queue."""

    def now(self) -> float: ...
    def spawn(self, queue: SubjectQueue) -> None: ...
    def blocked(self) -> bool: ...
    async def decide(self, queue: SubjectQueue, runs: Sequence[Run]) -> Decided: ...
    def decide_alone(self, queue: SubjectQueue, run: Run, why: Exception | None) -> Outcome: ...
    def verdicts(self, run: Run, outcome: Outcome, source: Source) -> tuple[Verdict, Verdict]: ...
    def lease_most(self) -> int: ...
    def lease_hold_s(self) -> float: ...
    def given_back(self, count: int) -> None: ...
    def remembers(self) -> bool: ...


class SubjectQueue:
    """The queue, the cached denial and the local tokens of one subject."""

    __slots__ = (
        "_asks",
        "_busy",
        "_rules",
        "_starved",
        "denial",
        "keys",
        "local",
        "local_tokens",
        "word",
    )

    def __init__(
        self,
        rules: Rules,
        keys: Sequence[str],
        word: str,
        local_tokens: LocalTokens | None,
        local: int,
    ) -> None:
        self.keys = keys
        self.word = word  #: message published after a refund
        self.denial = CachedDenial()
        self.local_tokens = local_tokens
        self.local: list[Tat | None] = [None] * local  #: states during an outage
        self._rules = rules
        self._asks: list[Ask] = []
        self._busy = False
        self._starved = False

    def __repr__(self) -> str:
        state = " in flight" if self._busy else ""
        return f"<SubjectQueue {self.word}: {len(self._asks)} asks{state}>"

    @property
    def busy(self) -> bool:
        """Whether a caller waits for an answer."""
        return bool(self._busy or self._asks)

    @property
    def idle(self) -> bool:
        """Whether the queue can be dropped without losing state."""
        stocked = self.local_tokens is not None and self.local_tokens.tokens
        return not (self.busy or stocked)

    def join(self, mode: Mode, count: int, costs: Costs) -> Answer:
        """Queue a request, and return the future of its answer.

        Raises:
            Unavailable: the queue is full, or the limiter is closed.
        """
        if len(self._asks) >= ASKS_MAX:
            raise Unavailable(f"{ASKS_MAX} asks of one subject wait already")
        if not self._busy:
            self._wake()
        answer: Answer = asyncio.get_running_loop().create_future()
        self._asks.append((answer, mode, count, costs))
        if self.local_tokens is not None and mode == "t":
            self._starved = True
        return answer

    def give_back(self, count: int, costs: Costs) -> None:
        """Queue a refund without a waiting caller; after close() the charge stays."""
        self._rules.given_back(count)
        with suppress(Unavailable):
            self._wake()
        self._asks.append((None, "r", count, costs))

    def restock(self) -> None:
        """Fetch local tokens, unless a fetch is in flight or the limiter is closed."""
        self._starved = True
        with suppress(Unavailable):
            self._wake()

    def _wake(self) -> None:
        """Send a script after this loop iteration, with all requests that arrived until then."""
        if not self._busy:
            self._rules.spawn(self)
            self._busy = True

    def close(self) -> None:
        """Refuse all waiting callers: there will be no further decision."""
        self._fail(runs_of(self._taken()), "the limiter is closed")
        self._busy = False

    async def pump(self) -> None:
        """Decide until the queue is empty."""
        try:
            while self._asks or self._starved:
                await self._fly(self._next_runs())
                if not self._asks:  # callers just answered may ask again at once
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
        """Append the fetch of local tokens to the script, behind all requests."""
        starved, self._starved = self._starved, False
        if self.local_tokens is None or not starved:
            return 0
        wanted = self.local_tokens.wanted(self._rules.now(), self._rules.lease_most())
        if wanted:
            runs.append(Run("t", wanted, (1,), []))
        return wanted

    def _fetched(self, wanted: int, outcome: Outcome, sent_at: float) -> None:
        if self.local_tokens is not None:
            self.local_tokens.put(outcome.granted, wanted, sent_at + self._rules.lease_hold_s())
        elif outcome.granted:  # local tokens were disabled meanwhile
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
