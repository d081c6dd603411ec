"""What locks and guards raise: the part of the tree in ``errors`` that is theirs."""

from __future__ import annotations

from typing import Literal

from .errors import CoordinationError

__all__ = [
    "InvalidLock",
    "LeaseLost",
    "LockNotAcquired",
    "LockNotHeld",
    "LossReason",
    "RefusalReason",
    "StaleToken",
]

LossReason = Literal["expired", "taken", "forced", "stopped"]
RefusalReason = Literal["held", "timed_out", "queue_full", "too_many_holders", "not_replicated"]


class InvalidLock(CoordinationError):
    """Raised for terms of a lock that cannot be met; nothing was sent, nothing has changed."""

    def __init__(self, name: str, field: str, value: object, fix: str) -> None:
        super().__init__(f"lock {name!r}: {field} = {value!r} cannot be: {fix}")
        self.name = name
        self.field = field
        self.value = value
        self.fix = fix


class LockNotAcquired(CoordinationError):
    """Raised when a lock was not had; nothing is left of the try, neither lease nor place."""

    def __init__(
        self, name: str, *, waited_ms: int, holder: str = "", reason: RefusalReason = "timed_out"
    ) -> None:
        held = f"; {holder} holds it" if holder else ""
        super().__init__(f"lock {name!r} was not had in {waited_ms} ms: {reason}{held}")
        self.name = name
        self.waited_ms = waited_ms
        self.holder = holder  #: the node, where one is known
        self.reason: RefusalReason = reason


class LeaseLost(CoordinationError):
    """Raised to a holder who must not go on: another may have the lock from now on.

    expired: it could not be renewed in time; taken: the server knows of no such lease;
    forced: somebody released it from outside; stopped: the node has stopped.
    """

    def __init__(self, name: str, reason: LossReason, token: int) -> None:
        super().__init__(f"the lease of {name!r} is lost ({reason}); its token was {token}")
        self.name = name
        self.reason: LossReason = reason
        self.token = token


class LockNotHeld(CoordinationError):
    """Raised to who would release or renew a lock that is not theirs; nothing was changed."""

    def __init__(self, name: str, nonce: str) -> None:
        super().__init__(f"{nonce!r} does not hold the lock {name!r}")
        self.name = name
        self.nonce = nonce


class StaleToken(CoordinationError):
    """Raised by a guard that has seen a higher fencing token; nothing was written."""

    def __init__(self, key: str, token: int, highest: int) -> None:
        super().__init__(f"{key!r} was written under token {highest} already, {token} is too old")
        self.key = key
        self.token = token
        self.highest = highest
