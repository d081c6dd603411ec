"""Several limits in one decision: all of them grant, or none does.

S1  Limits may change while the set is in use: the next script uses the new numbers with the
    present TAT, and cached denials are cleared.
S2  A request is answered without a round trip only from tokens that the server charged before
    (``local_tokens``), or with a denial that the server would repeat (``denials``).
S3  A cancelled caller gets nothing: tokens granted to it are returned.
S4  At most ``SUBJECTS_MAX`` subjects are kept. The oldest idle one is dropped first, and returns
    its tokens.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from ...schemas.errors import Unavailable
from ...schemas.errors_limits import InvalidLimit
from ...schemas.keys import check_key
from ...schemas.limits import Limit, Source, Verdict, check_cost, terms_of
from ..valkey.link import Arg
from . import outage as store_down
from .local_tokens import LocalTokens
from .shared_state import LimiterState
from .store import Costs, Decided, Mode, Outcome, limit_args
from .subject_queue import Answer, Run, SubjectQueue

__all__ = ["SUBJECTS_MAX", "LimitSet"]

SUBJECTS_MAX = 10_000
_EVICTION_LOOKS = 16

Cost = int | Mapping[str, int]


class LimitSet:
    def __init__(self, state: LimiterState, limits: Sequence[Limit]) -> None:
        self._state = state
        self._queues: dict[str, SubjectQueue] = {}
        self.now = state.clock.monotonic
        self.denied_locally: Counter[str] = Counter()  #: counted by the refusing limit
        self.leased = 0
        self.change(limits)

    def __repr__(self) -> str:
        return f"<LimitSet {'+'.join(self.names)}: {len(self._queues)} subjects>"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(limit.name for limit in self.limits)

    def change(self, limits: Sequence[Limit]) -> None:
        """Replace the limits by others of the same names."""
        self.limits = tuple(limits)
        self._ones = (1,) * len(self.limits)
        args = [limit_args(terms_of(limit), shadow=limit.shadow) for limit in limits]
        self.args: list[Arg] = [arg for each in args for arg in each]
        self._cost_max = min((x.burst for x in limits if not x.shadow), default=0)
        self._leasing = len(limits) == 1 and limits[0].lease and not limits[0].shadow
        for queue in self._queues.values():
            queue.denial.forget()
            self._lease(queue)

    def _lease(self, queue: SubjectQueue) -> None:
        """Enable or disable local tokens for the subject."""
        if self._leasing and queue.local_tokens is None:
            queue.local_tokens = self._local_tokens()
        elif not self._leasing and queue.local_tokens is not None:
            self._unload(queue, queue.local_tokens)
            queue.local_tokens = None

    def _unload(self, queue: SubjectQueue, local_tokens: LocalTokens) -> None:
        if tokens := local_tokens.take_all():
            queue.give_back(tokens, (1,))

    # Asking

    async def take(
        self, subject: str, cost: Cost = 1, *, partial: bool = False, within: str = ""
    ) -> Verdict:
        queue = self._queues.get(f"{within} {subject}" if within else subject)
        if queue is None:
            queue = self._queue(subject, within)
        if type(cost) is not int or not 0 < cost <= self._cost_max:
            return await self._joined(queue, *self._checked(cost, partial=partial))
        if queue.denial.cost or queue.local_tokens is not None:
            known = self._known(queue, cost, partial=partial)
            if known is not None:
                return known
        if partial:
            return await self._joined(queue, cost, self._ones)
        costs = self._ones if cost == 1 else (cost,) * len(self.limits)
        answer = queue.join("t", 1, costs)
        try:
            return await answer
        except asyncio.CancelledError:
            self._undo(queue, answer, costs)
            raise

    def _known(self, queue: SubjectQueue, cost: int, *, partial: bool) -> Verdict | None:
        """The answer without a round trip, or None."""
        if queue.local_tokens is not None and not partial and queue.local_tokens.spend(cost):
            return self._leased(queue, queue.local_tokens, cost)
        if not queue.denial.cost:
            return None
        refused = queue.denial.verdict(1 if partial else cost, self.now())
        if refused is not None:
            self.denied_locally[refused.limit] += 1
        return refused

    async def peek(self, subject: str, cost: Cost = 1, *, within: str = "") -> Verdict:
        return await self._one("p", subject, cost, within)

    async def force(self, subject: str, cost: Cost = 1, *, within: str = "") -> Verdict:
        return await self._one("f", subject, cost, within)

    async def refund(self, subject: str, cost: Cost = 1, *, within: str = "") -> Verdict:
        return await self._one("r", subject, cost, within)

    async def _one(self, mode: Mode, subject: str, cost: Cost, within: str) -> Verdict:
        _, costs = self._checked(cost, partial=False)
        return await self.queue(subject, within).join(mode, 1, costs)

    async def charge(self, queue: SubjectQueue, costs: Costs) -> Verdict:
        """Take tokens from the server, and ignore local tokens and cached denials."""
        return await self._joined(queue, 1, costs)

    async def _joined(self, queue: SubjectQueue, count: int, costs: Costs) -> Verdict:
        answer = queue.join("t", count, costs)
        try:
            return await answer
        except asyncio.CancelledError:
            self._undo(queue, answer, costs)
            raise

    def _undo(self, queue: SubjectQueue, answer: Answer, costs: Costs) -> None:
        """Return the grant of a caller that was cancelled after the grant arrived."""
        if answer.cancelled() or not answer.done() or answer.exception() is not None:
            return
        verdict = answer.result()
        if verdict.allowed and verdict.source == "server":
            queue.give_back(1 if max(costs) > 1 else verdict.granted, costs)

    def checked_costs(self, cost: Cost) -> Costs:
        return self._checked(cost, partial=False)[1]

    def _checked(self, cost: Cost, *, partial: bool) -> tuple[int, Costs]:
        """The number of requests, and their cost."""
        if isinstance(cost, Mapping):
            if partial or set(cost) != set(self.names):
                fix = f"give one for each of {', '.join(self.names)}, and no partial"
                raise InvalidLimit(self.names[0], "cost", repr(cost)[:40], "does not fit", fix)
            return 1, tuple(check_cost(limit, cost[limit.name]) for limit in self.limits)
        costs = tuple(check_cost(limit, cost) for limit in self.limits)
        return (costs[0], (1,) * len(costs)) if partial else (1, costs)

    def _leased(self, queue: SubjectQueue, local_tokens: LocalTokens, cost: int) -> Verdict:
        self.leased += 1
        if local_tokens.low:
            queue.restock()
        return Verdict(True, cost, self.limits[0].name, local_tokens.tokens, 0, 0, "lease")

    # Subjects

    def queue(self, subject: str, within: str = "") -> SubjectQueue:
        found = self._queues.get(f"{within} {subject}" if within else subject)
        return found or self._queue(subject, within)

    def _queue(self, subject: str, within: str) -> SubjectQueue:
        check_key(subject, name="subject")
        if within:
            check_key(within, name="within")
        if len(self._queues) >= SUBJECTS_MAX:
            self._evict()
        names = self._state.store.names
        keys = [names.limit("r", name, subject, within) for name in self.names]
        word = f"{within} {subject}" if within else subject  # no key has a space
        queue = SubjectQueue(
            self, keys, word, self._local_tokens() if self._leasing else None, len(keys)
        )
        self._queues[word] = queue
        return queue

    def _local_tokens(self) -> LocalTokens:
        return LocalTokens(self.lease_hold_s(), self.now())

    def _evict(self) -> None:
        """Drop the oldest idle subject; only a few are examined."""
        for _ in range(_EVICTION_LOOKS):
            key = next(iter(self._queues))
            queue = self._queues.pop(key)
            if not queue.busy:
                if queue.local_tokens is not None:
                    self._unload(queue, queue.local_tokens)
                self._state.limit_reached("limiter_subjects")
                return
            self._queues[key] = queue
        raise Unavailable(f"{SUBJECTS_MAX} subjects of {self.names[0]} are busy")

    def forget(self, word: str) -> None:
        """Clear cached denials of the subject of this message; an empty message means all."""
        for queue in self._words(word):
            queue.denial.forget()

    def _words(self, word: str) -> Iterable[SubjectQueue]:
        if not word:
            return self._queues.values()
        return (queue,) if (queue := self._queues.get(word)) is not None else ()

    # The interface for queues of subjects: subject_queue.Rules

    def spawn(self, queue: SubjectQueue) -> None:
        self._state.spawn(queue.pump)

    def blocked(self) -> bool:
        return self._state.outage.blocks()

    def remembers(self) -> bool:
        return self._state.hears

    def lease_most(self) -> int:
        return self.limits[0].burst // (2 * max(1, self._state.members()))

    def lease_hold_s(self) -> float:
        return self.limits[0].lease_hold

    def given_back(self, count: int) -> None:
        self._state.count("limiter_returned", self.limits[0].name, by=count)

    async def decide(self, queue: SubjectQueue, runs: Sequence[Run]) -> Decided:
        sent = [run.sent for run in runs]
        decided = await self._state.store.decide(queue.keys, self.args, queue.word, sent)
        self._state.answered()
        for limit, over in zip(self.limits, decided.over, strict=True):
            if over:
                self._state.count("limiter_shadow_refused", limit.name, by=over)
        return decided

    def decide_alone(self, queue: SubjectQueue, run: Run, why: Exception | None) -> Outcome:
        if why is not None:
            self._state.failed(why)
        now_us = int(self.now() * 1e6)
        return store_down.decide_alone(
            self.limits, queue.local, run.sent, now_us, self._state.members
        )

    def verdicts(self, run: Run, outcome: Outcome, source: Source) -> tuple[Verdict, Verdict]:
        """The verdicts of granted and of refused requests."""
        granted, at, left, wait_us, reset_us = outcome
        limit = self.limits[at].name
        reset_ms = math.ceil(reset_us / 1_000)
        amount = run.costs[at] if run.whole else granted
        if run.mode in "tf":
            self._state.decided(limit, source, granted, run.count - granted)
        if run.mode in "pr":
            amount = 0
        all_of_it = run.whole or granted > 0
        yes = Verdict(all_of_it, amount, limit, left, 0, reset_ms, source)
        no = Verdict(False, 0, limit, left, math.ceil(wait_us / 1_000), reset_ms, source)
        return yes, no

    # The end, and the tokens held

    @property
    def outstanding(self) -> int:
        return sum(
            queue.local_tokens.tokens
            for queue in self._queues.values()
            if queue.local_tokens is not None
        )

    def return_tokens(self, until: float) -> list[SubjectQueue]:
        """Return tokens that were not spent in time, and return the affected queues."""
        giving: list[SubjectQueue] = []
        if not self._leasing:
            return giving
        for queue in self._queues.values():
            local_tokens = queue.local_tokens
            if local_tokens is not None and local_tokens.tokens and local_tokens.until <= until:
                queue.give_back(local_tokens.take_all(), (1,))
                giving.append(queue)
        return giving

    def close(self) -> None:
        for queue in self._queues.values():
            queue.close()
