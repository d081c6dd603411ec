"""Several limits that are asked together, as one: all of them grant, or none does.

S1  The limits of a set may be changed while it is in use: the next script already decides by
    the new numbers, on the TAT that there is; what was denied before is forgotten.
S2  An ask is answered here, without a round trip, only with what the server charged before
    (``token_leases``) or would refuse now (``deny_cache``).
S3  A caller that is cancelled gets nothing: what was granted to it goes back.
S4  At most ``LANES_MAX`` subjects are remembered; the oldest with nothing under way goes first,
    and gives back the tokens it holds.
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
from .subject_queue import Answer, Lane, Run

__all__ = ["LANES_MAX", "LimitSet"]

LANES_MAX = 10_000
_EVICTION_LOOKS = 16

Cost = int | Mapping[str, int]


class LimitSet:
    def __init__(self, desk: LimiterState, limits: Sequence[Limit]) -> None:
        self._desk = desk
        self._lanes: dict[str, Lane] = {}
        self.now = desk.clock.monotonic
        self.denied_locally: Counter[str] = Counter()  #: by the limit that refused
        self.leased = 0
        self.change(limits)

    def __repr__(self) -> str:
        return f"<LimitSet {'+'.join(self.names)}: {len(self._lanes)} subjects>"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(limit.name for limit in self.limits)

    def change(self, limits: Sequence[Limit]) -> None:
        """Decide by these from now on; they have the same names."""
        self.limits = tuple(limits)
        self._ones = (1,) * len(self.limits)
        args = [limit_args(terms_of(limit), shadow=limit.shadow) for limit in limits]
        self.args: list[Arg] = [arg for each in args for arg in each]
        self._cost_max = min((x.burst for x in limits if not x.shadow), default=0)
        self._leasing = len(limits) == 1 and limits[0].lease and not limits[0].shadow
        for lane in self._lanes.values():
            lane.denial.forget()
            self._lease(lane)

    def _lease(self, lane: Lane) -> None:
        """Let it have a stock, or no longer."""
        if self._leasing and lane.stock is None:
            lane.stock = self._stock()
        elif not self._leasing and lane.stock is not None:
            self._unload(lane, lane.stock)
            lane.stock = None

    def _unload(self, lane: Lane, stock: LocalTokens) -> None:
        if tokens := stock.take_all():
            lane.give_back(tokens, (1,))

    # Asking

    async def take(
        self, subject: str, cost: Cost = 1, *, partial: bool = False, within: str = ""
    ) -> Verdict:
        lane = self._lanes.get(f"{within} {subject}" if within else subject)
        if lane is None:
            lane = self._lane(subject, within)
        if type(cost) is not int or not 0 < cost <= self._cost_max:
            return await self._joined(lane, *self._checked(cost, partial=partial))
        if lane.denial.cost or lane.stock is not None:
            known = self._known(lane, cost, partial=partial)
            if known is not None:
                return known
        if partial:
            return await self._joined(lane, cost, self._ones)
        costs = self._ones if cost == 1 else (cost,) * len(self.limits)
        answer = lane.join("t", 1, costs)
        try:
            return await answer
        except asyncio.CancelledError:
            self._undo(lane, answer, costs)
            raise

    def _known(self, lane: Lane, cost: int, *, partial: bool) -> Verdict | None:
        """The answer, if it needs no round trip."""
        if lane.stock is not None and not partial and lane.stock.spend(cost):
            return self._leased(lane, lane.stock, cost)
        if not lane.denial.cost:
            return None
        refused = lane.denial.verdict(1 if partial else cost, self.now())
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
        return await self.lane(subject, within).join(mode, 1, costs)

    async def charge(self, lane: Lane, costs: Costs) -> Verdict:
        """Take by asking the server, whatever is known here."""
        return await self._joined(lane, 1, costs)

    async def _joined(self, lane: Lane, count: int, costs: Costs) -> Verdict:
        answer = lane.join("t", count, costs)
        try:
            return await answer
        except asyncio.CancelledError:
            self._undo(lane, answer, costs)
            raise

    def _undo(self, lane: Lane, answer: Answer, costs: Costs) -> None:
        """The caller was cancelled when its grant had come already: give it back."""
        if answer.cancelled() or not answer.done() or answer.exception() is not None:
            return
        verdict = answer.result()
        if verdict.allowed and verdict.source == "server":
            lane.give_back(1 if max(costs) > 1 else verdict.granted, costs)

    def checked_costs(self, cost: Cost) -> Costs:
        return self._checked(cost, partial=False)[1]

    def _checked(self, cost: Cost, *, partial: bool) -> tuple[int, Costs]:
        """How many asks of which costs this is."""
        if isinstance(cost, Mapping):
            if partial or set(cost) != set(self.names):
                fix = f"give one for each of {', '.join(self.names)}, and no partial"
                raise InvalidLimit(self.names[0], "cost", repr(cost)[:40], "does not fit", fix)
            return 1, tuple(check_cost(limit, cost[limit.name]) for limit in self.limits)
        costs = tuple(check_cost(limit, cost) for limit in self.limits)
        return (costs[0], (1,) * len(costs)) if partial else (1, costs)

    def _leased(self, lane: Lane, stock: LocalTokens, cost: int) -> Verdict:
        self.leased += 1
        if stock.low:
            lane.restock()
        return Verdict(True, cost, self.limits[0].name, stock.tokens, 0, 0, "lease")

    # Subjects

    def lane(self, subject: str, within: str = "") -> Lane:
        found = self._lanes.get(f"{within} {subject}" if within else subject)
        return found or self._lane(subject, within)

    def _lane(self, subject: str, within: str) -> Lane:
        check_key(subject, name="subject")
        if within:
            check_key(within, name="within")
        if len(self._lanes) >= LANES_MAX:
            self._evict()
        names = self._desk.ledger.names
        keys = [names.limit("r", name, subject, within) for name in self.names]
        word = f"{within} {subject}" if within else subject  # no key has a space
        lane = Lane(self, keys, word, self._stock() if self._leasing else None, len(keys))
        self._lanes[word] = lane
        return lane

    def _stock(self) -> LocalTokens:
        return LocalTokens(self.lease_hold_s(), self.now())

    def _evict(self) -> None:
        """Forget the oldest that nobody waits for; look at a few only."""
        for _ in range(_EVICTION_LOOKS):
            key = next(iter(self._lanes))
            lane = self._lanes.pop(key)
            if not lane.busy:
                if lane.stock is not None:
                    self._unload(lane, lane.stock)
                self._desk.limit_reached("limiter_subjects")
                return
            self._lanes[key] = lane
        raise Unavailable(f"{LANES_MAX} subjects of {self.names[0]} are busy")

    def forget(self, word: str) -> None:
        """Something was given back to this word's lane; empty: to any."""
        for lane in self._words(word):
            lane.denial.forget()

    def _words(self, word: str) -> Iterable[Lane]:
        if not word:
            return self._lanes.values()
        return (lane,) if (lane := self._lanes.get(word)) is not None else ()

    # What lanes ask of the set: coalescing.Rules

    def spawn(self, lane: Lane) -> None:
        self._desk.spawn(lane.pump)

    def blocked(self) -> bool:
        return self._desk.outage.blocks()

    def remembers(self) -> bool:
        return self._desk.hears

    def lease_most(self) -> int:
        return self.limits[0].burst // (2 * max(1, self._desk.members()))

    def lease_hold_s(self) -> float:
        return self.limits[0].lease_hold

    def given_back(self, count: int) -> None:
        self._desk.count("limiter_returned", self.limits[0].name, by=count)

    async def decide(self, lane: Lane, runs: Sequence[Run]) -> Decided:
        sent = [run.sent for run in runs]
        decided = await self._desk.ledger.decide(lane.keys, self.args, lane.word, sent)
        self._desk.answered()
        for limit, over in zip(self.limits, decided.over, strict=True):
            if over:
                self._desk.count("limiter_shadow_refused", limit.name, by=over)
        return decided

    def decide_alone(self, lane: Lane, run: Run, why: Exception | None) -> Outcome:
        if why is not None:
            self._desk.failed(why)
        now_us = int(self.now() * 1e6)
        return store_down.decide_alone(
            self.limits, lane.local, run.sent, now_us, self._desk.members
        )

    def verdicts(self, run: Run, outcome: Outcome, source: Source) -> tuple[Verdict, Verdict]:
        """What those who were granted are told, and the others."""
        granted, at, left, wait_us, reset_us = outcome
        limit = self.limits[at].name
        reset_ms = math.ceil(reset_us / 1_000)
        amount = run.costs[at] if run.whole else granted
        if run.mode in "tf":
            self._desk.decided(limit, source, granted, run.count - granted)
        if run.mode in "pr":
            amount = 0
        all_of_it = run.whole or granted > 0
        yes = Verdict(all_of_it, amount, limit, left, 0, reset_ms, source)
        no = Verdict(False, 0, limit, left, math.ceil(wait_us / 1_000), reset_ms, source)
        return yes, no

    # The end, and the tokens held

    @property
    def outstanding(self) -> int:
        return sum(lane.stock.tokens for lane in self._lanes.values() if lane.stock is not None)

    def return_tokens(self, until: float) -> list[Lane]:
        """Give back what nobody spent by then; the lanes that do so now."""
        giving: list[Lane] = []
        if not self._leasing:
            return giving
        for lane in self._lanes.values():
            stock = lane.stock
            if stock is not None and stock.tokens and stock.until <= until:
                lane.give_back(stock.take_all(), (1,))
                giving.append(lane)
        return giving

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.close()
