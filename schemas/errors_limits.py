"""The errors of rate limits; see ``errors`` for the rules."""

from __future__ import annotations

from .errors import CoordinationError

__all__ = ["InvalidLimit", "RateLimited", "SlotLost", "UnknownReservation"]


class InvalidLimit(CoordinationError):
    """Raised for a limit that cannot work, or a cost that no limit could grant."""

    def __init__(self, limit: str, field: str, value: str, problem: str, fix: str) -> None:
        super().__init__(f"limit {limit}: {field} = {value} {problem}; {fix}")
        self.limit = limit
        self.field = field
        self.value = value
        self.problem = problem
        self.fix = fix


class RateLimited(CoordinationError):
    """Raised where a limit refused and nobody asked for a verdict."""

    def __init__(self, limit: str, retry_after_ms: int) -> None:
        super().__init__(f"limit {limit} is reached, try again in {retry_after_ms} ms")
        self.limit = limit
        self.retry_after_ms = retry_after_ms


class SlotLost(CoordinationError):
    """Raised out of the body of a slot that could not be renewed in time."""

    def __init__(self, limit: str, subject: str, reason: str) -> None:
        super().__init__(f"the slot of {subject!r} in {limit} was lost: {reason}")
        self.limit = limit
        self.subject = subject
        self.reason = reason


class UnknownReservation(CoordinationError):
    """Raised for a reservation that was settled, has expired, or never was."""

    def __init__(self, limit: str, reservation: str) -> None:
        super().__init__(f"limit {limit} holds no reservation {reservation!r}: settled or expired")
        self.limit = limit
        self.reservation = reservation
