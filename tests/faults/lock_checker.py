"""Judges a recorded history of locks: offline, on one clock for all processes of this machine.

H1  Tokens of a lock are unique, and grow in the order in which the grants came.
H2  Believed intervals of two holders never overlap, for a lock that takes one.
H3  What a guard let through after another write was acknowledged carries no lower token.
H4  Waiters are served in the order in which they began to wait, but for those within ``margin``,
    and those whose wait touched a disturbance.
H5  A lock that somebody waits for is taken within ``bound`` after it was last believed held,
    times of disturbance left out.
H6  A lease that is kept by a process is lost in times of disturbance only.

A grant is believed from when its holder knew of it until it released it or stopped believing.
A disturbance is a time in which something was done to servers, connections or processes, and as
long afterwards as leases, grace and hand-overs may take to be right again.
Each fault is a sentence; no fault, no sentence. It takes O(n log n), for few disturbances.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from msgspec import Struct

Times = Sequence[tuple[float, float]]  #: from, until; monotonic seconds


class Granted(Struct, frozen=True, kw_only=True):
    """A critical section, in monotonic seconds."""

    name: str
    token: int
    by: str
    asked_at: float
    granted_at: float
    believed_until: float  #: released, or known to be lost
    lost: str = ""  #: why, if it was


class Written(Struct, frozen=True, kw_only=True):
    """A write that a guard let through: when it was sent, and when it was acknowledged."""

    key: str
    token: int
    sent_at: float
    done_at: float


def faults_of(
    grants: Iterable[Granted],
    writes: Iterable[Written] = (),
    *,
    margin_s: float = 0.05,
    bound_s: float = 5.0,
    disturbed: Times = (),
) -> list[str]:
    of_name: dict[str, list[Granted]] = defaultdict(list)
    for each in grants:
        of_name[each.name].append(each)
    found: list[str] = []
    for history in of_name.values():
        history.sort(key=lambda each: each.granted_at)
        found += _wrong_tokens(history)
        found += _overlaps(history)
        found += _overtaken(history, margin_s, disturbed)
        found += _idle(history, bound_s, disturbed)
        found += _lost(history, disturbed)
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


def _overtaken(history: Sequence[Granted], margin_s: float, disturbed: Times) -> Iterator[str]:
    latest = None
    for each in history:
        if _share(each.asked_at, each.granted_at, disturbed):
            continue
        if latest is not None and each.asked_at + margin_s < latest.asked_at:
            yield f"H4 {each.name}: {latest.by} was served before {each.by}, who came first"
        if latest is None or each.asked_at > latest.asked_at:
            latest = each


def _idle(history: Sequence[Granted], bound_s: float, disturbed: Times) -> Iterator[str]:
    free_at = float("-inf")
    for each in history:
        since = max(free_at, each.asked_at)
        idle_s = each.granted_at - since - _share(since, each.granted_at, disturbed)
        if idle_s > bound_s:
            yield f"H5 {each.name}: free for {idle_s:.3f} s while {each.by} waited"
        free_at = max(free_at, each.believed_until)


def _lost(history: Sequence[Granted], disturbed: Times) -> Iterator[str]:
    for each in history:
        at = each.believed_until
        if each.lost and not any(start <= at <= end for start, end in disturbed):
            yield f"H6 {each.name}: {each.by} lost {each.token} for no reason ({each.lost})"


def _share(start: float, end: float, times: Times) -> float:
    """How much of an interval lies in these times; they do not overlap."""
    return sum(max(0.0, min(end, until) - max(start, since)) for since, until in times)


def _sinking(writes: Iterable[Written]) -> Iterator[str]:
    of_key: dict[str, list[Written]] = defaultdict(list)
    for each in writes:
        of_key[each.key].append(each)
    for key, history in of_key.items():
        highest, under_way = 0, list[tuple[float, int]]()
        for each in sorted(history, key=lambda write: write.sent_at):
            while under_way and under_way[0][0] < each.sent_at:
                highest = max(highest, heapq.heappop(under_way)[1])
            if each.token < highest:
                yield f"H3 {key}: written under {each.token} after {highest}"
            heapq.heappush(under_way, (each.done_at, each.token))
