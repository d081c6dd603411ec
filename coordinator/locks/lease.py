"""The right to act on a lock until a deadline.

    async with lease:                  # what try_lock gives; node.lock(...) gives it in a block
        await store(row, lease.token)

A1  A lease ends for its holder no later than the server forgets it: the deadline counts from before
    the request left, less a margin, on the monotonic clock. Only the rates of clocks matter.
A2  When it is lost, the body is cancelled at once, and LeaseLost raised out of the block with the
    reason; with ``on_loss="event"`` only ``lost`` is set, and nothing is raised.
A3  Only the cancellation that A2 caused becomes LeaseLost. Another, from outside, passes; and so
    does what the body raised.
A4  Releasing is done once. Again, or after the loss, it does nothing.
A5  ``token`` is the fencing token, larger than any before. Storage that has seen a larger one must
    refuse: a process that stands still notices nothing, so a lease alone stops nobody.

Nothing here suspends but ``release``. Renewing is ``Renewals``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

import anyio

from ...schemas.errors_locks import LeaseLost, LossReason
from ...schemas.locks import Terms
from ..clock import Clock

__all__ = ["Lease"]


class Lease:
    __slots__ = (
        "_clock",
        "_give_back",
        "_lost",
        "_scope",
        "deadline",
        "nonce",
        "reason",
        "released",
        "renew_at",
        "terms",
        "token",
    )

    def __init__(
        self,
        terms: Terms,
        nonce: str,
        token: int,
        *,
        sent_at: float,
        clock: Clock,
        give_back: Callable[[Lease], Awaitable[None]],
    ) -> None:
        self.terms = terms
        self.nonce = nonce
        self.token = token
        self.deadline = sent_at + terms.deadline_s  #: monotonic seconds
        self.renew_at = sent_at + terms.lease_us / 3e6
        self.reason: LossReason | None = None  #: why it is lost
        self.released = False
        self._clock = clock
        self._give_back = give_back
        self._scope: anyio.CancelScope | None = None
        self._lost: anyio.Event | None = None

    def __repr__(self) -> str:
        state = self.reason or ("released" if self.released else "held")
        return f"<Lease {self.name} {self.token} {state}>"

    @property
    def name(self) -> str:
        return self.terms.name

    @property
    def held(self) -> bool:
        """Whether it may be acted on right now."""
        return self.reason is None and not self.released and self._clock.monotonic() < self.deadline

    @property
    def lost(self) -> anyio.Event:
        """Set when the lease is lost."""
        if self._lost is None:
            self._lost = anyio.Event()
            if self.reason is not None:
                self._lost.set()
        return self._lost

    def remaining_s(self) -> float:
        """How long it may be relied on, unless it is renewed; 0 if it is over."""
        if self.reason is not None or self.released:
            return 0.0
        return max(0.0, self.deadline - self._clock.monotonic())

    def check(self) -> None:
        """Nothing, if it is held.

        Raises:
            LeaseLost: it is not, also where nobody has noticed yet.
        """
        if not self.held:
            raise LeaseLost(self.name, self.reason or "expired", self.token)

    def renewed(self, sent_at: float) -> None:
        """The server has renewed it, on a request that left at ``sent_at``."""
        self.deadline = max(self.deadline, sent_at + self.terms.deadline_s)

    def lose(self, reason: LossReason) -> None:
        """It is over: tell whoever is in the block."""
        if self.reason is not None or self.released:
            return
        self.reason = reason
        if self._lost is not None:
            self._lost.set()
        if self._scope is not None:
            self._scope.cancel()

    async def release(self) -> None:
        """Give it back; whoever waits has it then.

        Raises:
            LeaseLost: it was lost before, which means that others may have had the lock.
        """
        await self._give_back(self)
        if self.reason is not None:
            raise LeaseLost(self.name, self.reason, self.token)

    def enter(self) -> None:
        """Begin the block that is cancelled on loss; ``__aexit__`` ends it."""
        if self.terms.on_loss == "cancel":
            self._scope = scope = anyio.CancelScope()
            if self.reason is not None:
                scope.cancel()
            scope.__enter__()

    async def __aenter__(self) -> Self:
        self.check()
        self.enter()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        scope, self._scope = self._scope, None
        ours = scope is not None and bool(scope.__exit__(exc_type, exc, traceback))
        if not self.released:
            await self._give_back(self)
        if ours or (self.reason is not None and scope is not None and exc is None):
            # The cancellation that ended the block was ours: it never ends without an error.
            raise LeaseLost(self.name, self.reason or "expired", self.token) from None
