"""Judges a recorded history of locks: offline, on one clock for all processes of this machine.

H1  Tokens of a lock are unique, and grow in the order in which the grants came.
H2  Believed intervals of two holders never overlap, for a lock that takes one.
H3  What was written through a guard carries tokens that never sink.
H4  Waiters are served in the order in which they began to wait, but for those within ``margin``.
H5  A lock that somebody waits for is taken within ``bound`` after it was last believed held.

A grant is believed from when its holder knew of it until it released it or stopped believing.
Each fault is a sentence; no fault, no sentence. It takes O(n log n).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from msgspec import Struct

__all__ = ["Granted", "Written", "faults_of"]


class Granted(Struct, frozen=True, kw_only=True):
    """A critical section, in monotonic seconds."""

    name: str
    token: int
    by: str
    asked_at: float
    granted_at: float
    believed_until: float  #: released, or known to be lost


class Written(Struct, frozen=True, kw_only=True):
    """A write that a guard let through, in the order of the server."""

    key: str
    token: int


def faults_of(
    grants: Iterable[Granted],
    writes: Iterable[Written] = (),
    *,
    margin_s: float = 0.05,
    bound_s: float = 5.0,
) -> list[str]:
    of_name: dict[str, list[Granted]] = defaultdict(list)
    for each in grants:
        of_name[each.name].append(each)
    found: list[str] = []
    for history in of_name.values():
        history.sort(key=lambda each: each.granted_at)
        found += _wrong_tokens(history)
        found += _overlaps(history)
        found += _overtaken(history, margin_s)
        found += _idle(history, bound_s)
    return found + list(_sinking(writes))


def _wrong_tokens(history: Sequence[Granted]) -> Iterator[str]:
    for one, two in pairwise(history):
        if two.token <= one.token:
            yield f"H1 {two.name}: {two.by} got {two.token} after {one.by} had {one.token}"


def _overlaps(history: Sequence[Granted]) -> Iterator[str]:
    last = None
    for each in history:
        if last is not None and each.granted_at < last.believed_until:
            by_s = last.believed_until - each.granted_at
            yield f"H2 {each.name}: {last.by} believed {by_s:.3f} s into the time of {each.by}"
        if last is None or each.believed_until > last.believed_until:
            last = each


def _overtaken(history: Sequence[Granted], margin_s: float) -> Iterator[str]:
    latest = None
    for each in history:
        if latest is not None and each.asked_at + margin_s < latest.asked_at:
            yield f"H4 {each.name}: {latest.by} was served before {each.by}, who came first"
        if latest is None or each.asked_at > latest.asked_at:
            latest = each


def _idle(history: Sequence[Granted], bound_s: float) -> Iterator[str]:
    free_at = float("-inf")
    for each in history:
        since = max(free_at, each.asked_at)
        if each.granted_at - since > bound_s:
            yield f"H5 {each.name}: free for {each.granted_at - since:.3f} s while {each.by} waited"
        free_at = max(free_at, each.believed_until)


def _sinking(writes: Iterable[Written]) -> Iterator[str]:
    highest: dict[str, int] = {}
    for each in writes:
        if each.token < highest.get(each.key, 0):
            yield f"H3 {each.key}: written under {each.token} after {highest[each.key]}"
        highest[each.key] = max(highest.get(each.key, 0), each.token)
