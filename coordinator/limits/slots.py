"""A bound on how many do something at a time: slots, each a lease that is renewed.

P1  At most ``concurrency`` slots of a subject are held in the cluster. One whose holder died
    is free again after the lease.
P2  A body whose slot may have been given to another is cancelled before that can be, and
    SlotLost comes out of it. Where the loop stood still for so long that it could not be
    cancelled, SlotLost tells so at its end.
P3  Cancelled while asking or while leaving, the slot is released all the same, in at most a
    second; or else ends with its lease.
P4  Renewal is due at fixed thirds of the lease, whatever else the loop has to do.
P5  While the server is away at the beginning: ``open`` lets in, ``closed`` refuses, ``local``
    lets this process have its fair share of the slots. Such a slot is counted here only.
P6  A shadow refuses nobody: who finds no slot free goes in without one, and is counted.
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
    """A slot while it is held."""

    key: str
    nonce: str  #: empty: held without the server
    lease_s: float
    until: float  #: monotonic seconds; before the server could give it to another
    in_use: int = 0


class Slots:
    def __init__(self, desk: LimiterState, scripts: Scripts, *, ids: Callable[[], str]) -> None:
        self._desk = desk
        self._script = scripts["slot_take"]
        self._ids = ids
        self._local: Counter[str] = Counter()
        self._failing = LogOnce(desk.clock)

    def __repr__(self) -> str:
        return f"<Slots: {self._local.total()} held without the server>"

    @asynccontextmanager
    async def hold(
        self, limit: Limit, subject: str, *, lease_s: float = 10.0, within: str = ""
    ) -> AsyncGenerator[Slot]:
        """Hold a slot while the body runs.

        Raises:
            RateLimited: all are taken. SlotLost: it could not be renewed.
        """
        self._check(limit, lease_s)
        check_key(subject, name="subject")
        key = self._desk.ledger.names.limit("rs", limit.name, subject, within)
        slot = await self._acquire(limit, key, lease_s)
        lost: list[str] = []
        try:
            async with background_tasks() as tasks:
                with anyio.CancelScope() as body:
                    if slot.nonce:
                        tasks.start_soon(self._renew, slot, limit, body, lost)
                    yield slot
            if slot.nonce and not lost and self._desk.clock.monotonic() >= slot.until:
                lost.append("its lease was over before the body was")
        finally:
            await self._release(slot)
        if lost:
            raise SlotLost(limit.name, subject, lost[0])

    async def _acquire(self, limit: Limit, key: str, lease_s: float) -> Slot:
        slot = Slot(key=key, nonce=self._ids(), lease_s=lease_s, until=0.0)
        if self._desk.outage.blocks():
            return self._alone(limit, slot)
        try:
            held, in_use, *wait_us = await self._ask(slot, limit, renew=False)
        except (Unavailable, ServerRefused) as error:
            self._desk.failed(error)
            self._forgo(slot, error)
            return self._alone(limit, slot)
        except BaseException:
            await self._release(slot)
            raise
        self._desk.answered()
        allowed = bool(held or limit.shadow)
        self._desk.decided(limit.name, "server", allowed, not allowed)
        if not allowed:
            raise RateLimited(limit.name, -(-wait_us[0] // 1_000))
        if not held:
            self._desk.count("limiter_shadow_refused", limit.name, by=1)
            return self._unheld(slot)
        slot.in_use = in_use
        return slot

    def _forgo(self, slot: Slot, error: Exception) -> None:
        """Free what the server may have granted too late: nobody will renew or release it."""
        if isinstance(error, Unavailable) and error.outcome_unknown:
            granted = Slot(key=slot.key, nonce=slot.nonce, lease_s=slot.lease_s, until=0.0)
            with suppress(Unavailable):  # closed: it ends with its lease
                self._desk.spawn(partial(self._release, granted))

    async def _ask(self, slot: Slot, limit: Limit, *, renew: bool) -> Reply:
        sent_at = self._desk.clock.monotonic()
        args: list[Arg] = [slot.nonce, round(slot.lease_s * 1_000), limit.concurrency, int(renew)]
        ledger = self._desk.ledger
        if renew:
            timeout_ms = round(slot.lease_s * 1_000 / 6)
            reply = await run(
                ledger.commands, self._script, [slot.key], args, timeout_ms=timeout_ms
            )
        else:
            reply = await ledger.within_budget(self._script, [slot.key], args)
        if reply[0]:
            margin_s = max(_MARGIN_S, _MARGIN * slot.lease_s)
            slot.until = sent_at + slot.lease_s - margin_s
        return reply

    def _alone(self, limit: Limit, slot: Slot) -> Slot:
        share = max(1, limit.concurrency // max(1, self._desk.members()))
        full = limit.store_down == "local" and self._local[slot.key] >= share
        if (limit.store_down == "closed" or full) and not limit.shadow:
            self._desk.decided(limit.name, "local", 0, 1)
            raise RateLimited(limit.name, CLOSED_RETRY_MS)
        self._desk.decided(limit.name, "local", 1, 0)
        return self._unheld(slot)

    def _unheld(self, slot: Slot) -> Slot:
        self._local[slot.key] += 1
        slot.nonce = ""
        slot.in_use = self._local[slot.key]
        return slot

    async def _renew(
        self, slot: Slot, limit: Limit, body: anyio.CancelScope, lost: list[str]
    ) -> None:
        clock, step_s = self._desk.clock, slot.lease_s / 3
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
                await self._desk.ledger.commands.call("ZREM", slot.key, slot.nonce)
            except (Unavailable, ServerRefused) as error:
                self._failing.say(log, "slot.not_released", error)

    def _check(self, limit: Limit, lease_s: float) -> None:
        if not limit.concurrency:
            fix = "declare the limit with concurrency="
            raise InvalidLimit(limit.name, "concurrency", "0", "has no slots", fix)
        if not LEASE_S_MIN <= lease_s <= LEASE_S_MAX:
            fix = f"give seconds from {LEASE_S_MIN:g} to {LEASE_S_MAX:g}"
            raise InvalidLimit(limit.name, "lease", repr(lease_s), "is out of bounds", fix)
