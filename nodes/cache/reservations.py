"""Reservations: what was asked for before a notice came may not be kept after it.

Z1  A reservation made before a read knows the newest version that was told of its key since,
    its ``floor``, and whether its shard was reset since.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ...coordinator.log.follower import ShardView
from ...schemas.keys import shard_of

__all__ = ["Reservation", "Reservations"]


class Reservation:
    """The right to keep what a read or a write that starts now brings back."""

    __slots__ = ("floor", "generation", "key", "view")

    def __init__(self, key: str, view: ShardView) -> None:
        self.key = key
        self.view = view
        self.generation = view.generation
        self.floor = 0


class Reservations:
    def __init__(self, views: Sequence[ShardView]) -> None:
        self._views = views
        #: One is kept as it is: most keys have no more, and a set costs as much as a hit.
        self._by_key: dict[str, Reservation | set[Reservation]] = {}

    def __len__(self) -> int:
        """Keys that are reserved."""
        return len(self._by_key)

    def reserve(self, key: str) -> Reservation:
        """To be made before the shared tier is read or written."""
        views, by_key = self._views, self._by_key
        reservation = Reservation(key, views[shard_of(key, len(views))])
        held = by_key.get(key)
        if held is None:
            by_key[key] = reservation
        elif isinstance(held, set):
            held.add(reservation)
        else:
            by_key[key] = {held, reservation}
        return reservation

    def release(self, reservation: Reservation) -> None:
        """Its read is over; once more does no harm."""
        held = self._by_key.get(reservation.key)
        if held is reservation:
            del self._by_key[reservation.key]
        elif isinstance(held, set):
            held.discard(reservation)
            if not held:
                del self._by_key[reservation.key]

    def raise_floor(self, key: str, version: int) -> None:
        """A notice said that what is older than this version is old."""
        for reservation in self.of(key):
            reservation.floor = max(reservation.floor, version)

    def void(self) -> None:
        """Nothing that is under way may be kept."""
        for key in self._by_key:
            for reservation in self.of(key):
                reservation.generation = -1

    def of(self, key: str) -> Collection[Reservation]:
        """Those of this key."""
        held = self._by_key.get(key, ())
        return (held,) if isinstance(held, Reservation) else held
