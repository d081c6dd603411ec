"""The right to act on a lock until a deadline.

    async with lease:                  # from try_lock; node.lock(...) enters the block itself
        await store(row, lease.token)

A1  A lease ends for its holder no later than for the server: the deadline counts from before the
    request was sent, minus a margin, on the monotonic clock. Only the rates of clocks matter.
A2  When the lease is lost, the body is cancelled at once, and the block raises LeaseLost with the
    reason. With ``on_loss="event"`` only ``lost`` is set, and nothing is raised.
A3  Only the cancellation caused by A2 becomes LeaseLost. Any other cancellation, and an error of
    the body, propagate.
A4  A lease is released once. A second release, or one after the loss, does nothing.
A5  ``token`` is the fencing token, larger than all earlier ones. Storage must refuse a token
    smaller than one it has seen: a suspended process does not notice the loss of its lease.

Only ``release`` suspends. ``Renewals`` renews.
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
        self.reason: LossReason | None = None  #: the reason of the loss
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
        """Whether the lease is valid now."""
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
        """Seconds until the deadline unless it is renewed; 0 if it has ended."""
        if self.reason is not None or self.released:
            return 0.0
        return max(0.0, self.deadline - self._clock.monotonic())

    def check(self) -> None:
        """Return if the lease is valid.

        Raises:
            LeaseLost: it is not, even if the loss was not noticed yet.
        """
        if not self.held:
            raise LeaseLost(self.name, self.reason or "expired", self.token)

    def renewed(self, sent_at: float) -> None:
        """Move the deadline: the server renewed it on a request sent at ``sent_at``."""
        self.deadline = max(self.deadline, sent_at + self.terms.deadline_s)

    def lose(self, reason: LossReason) -> None:
        """Mark the lease as lost, and cancel the block."""
        if self.reason is not None or self.released:
            return
        self.reason = reason
        if self._lost is not None:
            self._lost.set()
        if self._scope is not None:
            self._scope.cancel()

    async def release(self) -> None:
        """Release the lease; the next waiter gets the lock.

        Raises:
            LeaseLost: it was lost before, so another caller may have held the lock.
        """
        await self._give_back(self)
        if self.reason is not None:
            raise LeaseLost(self.name, self.reason, self.token)

    def enter(self) -> None:
        """Enter the scope that is cancelled on loss; ``__aexit__`` leaves it."""
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
            # Our own cancellation ended the block, so the block must raise.
            raise LeaseLost(self.name, self.reason or "expired", self.token) from None
