"""Concurrency limits: slots, each a lease that is renewed.

P1  At most ``concurrency`` slots of a subject are held in the cluster. The slot of a dead holder is
    free after its lease.
P2  If a slot may go to another caller, its body is cancelled before, and raises SlotLost. If a
    stalled event loop prevented the cancellation, SlotLost is raised at the end of the body.
P3  If the caller is cancelled while it acquires or leaves, the slot is still released within one
    second, or ends with its lease.
P4  A slot is renewed at fixed thirds of its lease, independent of the load of the event loop.
P5  If the server is unavailable at the start, ``open`` grants, ``closed`` refuses, and ``local``
    grants the fair share of this process. Such a slot is counted in this process only.
P6  A shadow limit refuses nothing: without a free slot the body runs without one, and is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

import anyio
import structlog
from msgspec import Struct

from ...schemas.errors import ServerRefused, Unavailable
from ...schemas.errors_limits import InvalidLimit, RateLimited, SlotLost
from ...schemas.keys import check_key
from ...schemas.limits import Limit
from ..background import background_tasks
from ..log_once import LogOnce
from ..valkey.link import Arg, Reply
from ..valkey.scripting import Scripts, run
from .outage import CLOSED_RETRY_MS
from .shared_state import LimiterState

__all__ = ["Slot", "Slots"]

log = structlog.get_logger(__name__)

LEASE_S_MIN, LEASE_S_MAX = 2.0, 30.0
_MARGIN_S, _MARGIN = 0.05, 0.02
_RELEASE_S = 1.0


class Slot(Struct):
    """A held slot."""

    key: str
    nonce: str  #: empty: held without the server
    lease_s: float
    until: float  #: monotonic seconds; earlier than its end on the server
    in_use: int = 0


class Slots:
    def __init__(self, state: LimiterState, scripts: Scripts, *, ids: Callable[[], str]) -> None:
        self._state = state
        self._script = scripts["slot_take"]
        self._ids = ids
        self._local: Counter[str] = Counter()
        self._failing = LogOnce(state.clock)

    def __repr__(self) -> str:
        return f"<Slots: {self._local.total()} held without the server>"

    @asynccontextmanager
    async def hold(
        self, limit: Limit, subject: str, *, lease_s: float = 10.0, within: str = ""
    ) -> AsyncGenerator[Slot]:
        """Hold a slot while the body runs.

        Raises:
            RateLimited: no slot is free. SlotLost: the slot could not be renewed.
        """
        self._check(limit, lease_s)
        check_key(subject, name="subject")
        key = self._state.store.names.limit("rs", limit.name, subject, within)
        slot = await self._acquire(limit, key, lease_s)
        lost: list[str] = []
        try:
            async with background_tasks() as tasks:
                with anyio.CancelScope() as body:
                    if slot.nonce:
                        tasks.start_soon(self._renew, slot, limit, body, lost)
                    yield slot
            if slot.nonce and not lost and self._state.clock.monotonic() >= slot.until:
                lost.append("its lease was over before the body was")
        finally:
            await self._release(slot)
        if lost:
            raise SlotLost(limit.name, subject, lost[0])

    async def _acquire(self, limit: Limit, key: str, lease_s: float) -> Slot:
        slot = Slot(key=key, nonce=self._ids(), lease_s=lease_s, until=0.0)
        if self._state.outage.blocks():
            return self._alone(limit, slot)
        try:
            held, in_use, *wait_us = await self._ask(slot, limit, renew=False)
        except (Unavailable, ServerRefused) as error:
            self._state.failed(error)
            self._forgo(slot, error)
            return self._alone(limit, slot)
        except BaseException:
            await self._release(slot)
            raise
        self._state.answered()
        allowed = bool(held or limit.shadow)
        self._state.decided(limit.name, "server", allowed, not allowed)
        if not allowed:
            raise RateLimited(limit.name, -(-wait_us[0] // 1_000))
        if not held:
            self._state.count("limiter_shadow_refused", limit.name, by=1)
            return self._unheld(slot)
        slot.in_use = in_use
        return slot

    def _forgo(self, slot: Slot, error: Exception) -> None:
        """Release a slot that the server may have granted too late, since no caller holds it."""
        if isinstance(error, Unavailable) and error.outcome_unknown:
            granted = Slot(key=slot.key, nonce=slot.nonce, lease_s=slot.lease_s, until=0.0)
            with suppress(Unavailable):  # closed: it ends with its lease
                self._state.spawn(partial(self._release, granted))

    async def _ask(self, slot: Slot, limit: Limit, *, renew: bool) -> Reply:
        sent_at = self._state.clock.monotonic()
        args: list[Arg] = [slot.nonce, round(slot.lease_s * 1_000), limit.concurrency, int(renew)]
        store = self._state.store
        if renew:
            timeout_ms = round(slot.lease_s * 1_000 / 6)
            reply = await run(store.commands, self._script, [slot.key], args, timeout_ms=timeout_ms)
        else:
            reply = await store.within_budget(self._script, [slot.key], args)
        if reply[0]:
            margin_s = max(_MARGIN_S, _MARGIN * slot.lease_s)
            slot.until = sent_at + slot.lease_s - margin_s
        return reply

    def _alone(self, limit: Limit, slot: Slot) -> Slot:
        share = max(1, limit.concurrency // max(1, self._state.members()))
        full = limit.store_down == "local" and self._local[slot.key] >= share
        if (limit.store_down == "closed" or full) and not limit.shadow:
            self._state.decided(limit.name, "local", 0, 1)
            raise RateLimited(limit.name, CLOSED_RETRY_MS)
        self._state.decided(limit.name, "local", 1, 0)
        return self._unheld(slot)

    def _unheld(self, slot: Slot) -> Slot:
        self._local[slot.key] += 1
        slot.nonce = ""
        slot.in_use = self._local[slot.key]
        return slot

    async def _renew(
        self, slot: Slot, limit: Limit, body: anyio.CancelScope, lost: list[str]
    ) -> None:
        clock, step_s = self._state.clock, slot.lease_s / 3
        due = clock.monotonic() + step_s
        while True:
            await anyio.sleep(max(0.0, min(due, slot.until) - clock.monotonic()))
            due += step_s
            if clock.monotonic() >= slot.until:
                reason = "it could not be renewed in time"
                break
            with anyio.move_on_after(slot.until - clock.monotonic()):
                try:
                    if (await self._ask(slot, limit, renew=True))[0]:
                        self._failing.over()
                        continue
                except (Unavailable, ServerRefused) as error:
                    self._failing.say(log, "slot.not_renewed", error, limit=limit.name)
                    continue
                reason = "the server no longer knows it"
                break
        lost.append(reason)
        log.warning("slot.lost", limit=limit.name, reason=reason)
        body.cancel()

    async def _release(self, slot: Slot) -> None:
        if not slot.nonce:
            self._local[slot.key] -= 1
            if self._local[slot.key] <= 0:
                del self._local[slot.key]
            return
        with anyio.move_on_after(_RELEASE_S, shield=True):
            try:
                await self._state.store.commands.call("ZREM", slot.key, slot.nonce)
            except (Unavailable, ServerRefused) as error:
                self._failing.say(log, "slot.not_released", error)

    def _check(self, limit: Limit, lease_s: float) -> None:
        if not limit.concurrency:
            fix = "declare the limit with concurrency="
            raise InvalidLimit(limit.name, "concurrency", "0", "has no slots", fix)
        if not LEASE_S_MIN <= lease_s <= LEASE_S_MAX:
            fix = f"give seconds from {LEASE_S_MIN:g} to {LEASE_S_MAX:g}"
            raise InvalidLimit(limit.name, "lease", repr(lease_s), "is out of bounds", fix)
