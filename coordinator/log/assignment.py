"""Which member should do the work of which resource: bounded-load rendezvous hashing, sticky.

A1  The result follows from the arguments alone, whatever their order: members that know the
    same give the same answer, without a leader.
A2  No member is given more than its share by weight, rounded up; so a newcomer gets one. The
    share grows by what frozen members leave. Only what others decline is given beyond it.
A3  What moves is what nobody owns, and what an owner has above its share: nothing else.
A4  Carried out in part, and computed again, it is the same assignment, if nothing is declined or
    avoided.
A5  Only candidates of the highest rank are given shards, and keep shards; others get the shards
    that all of these decline or avoid. A shard that every candidate avoids or declines goes by
    rank to one that only avoids it. Frozen candidates keep their shards at any rank.

Highest random weight as of Thaler and Ravishankar (1998), with the weights as of Schindelhauer
and Schomaker (-w / ln h), and the bound as of Mirrokni, Thorup and Zadimoghaddam (2016); their
slack is 0 here, since a newcomer among n would get little more than the slack otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from hashlib import blake2b

from msgspec import Struct
from msgspec.structs import replace

__all__ = ["Candidate", "assign"]

_MASK = (1 << 64) - 1


class Candidate(Struct, frozen=True):
    """One who may own. ``frozen`` ones keep what they have, and are given nothing."""

    id: str
    weight: float = 1.0  #: 0: is given nothing, and keeps nothing
    frozen: bool = False
    declines: frozenset[int] = frozenset()  #: what it will never own
    avoids: frozenset[int] = frozenset()  #: shards it owns only if nobody else will
    rank: int = 0


def assign(
    resources: Collection[int], candidates: Iterable[Candidate], owners: Mapping[int, str]
) -> dict[int, str]:
    """The owner that each resource should have; one that nobody can take is not in it."""
    every = list(candidates)
    reluctant = [replace(each, declines=each.declines | each.avoids) for each in every]
    ranks = sorted({each.rank for each in every if each.weight and not each.frozen}, reverse=True)
    wanted: dict[int, str] = {}
    for willing in (reluctant, every):
        for rank in ranks or [0]:
            if rest := [resource for resource in resources if resource not in wanted]:
                wanted |= _assign_among(rest, [_ranked(each, rank) for each in willing], owners)
    return wanted


def _ranked(candidate: Candidate, rank: int) -> Candidate:
    """As it takes part where only candidates of one rank are given anything."""
    takes_part = candidate.frozen or candidate.rank == rank
    return candidate if takes_part else replace(candidate, weight=0)


def _assign_among(
    resources: Collection[int], candidates: Iterable[Candidate], owners: Mapping[int, str]
) -> dict[int, str]:
    known = {each.id: each for each in candidates}
    share = _shares(resources, known, owners)
    wanted = _kept(resources, known, owners, share)
    load = dict.fromkeys(known, 0)
    for owner in wanted.values():
        load[owner] += 1
    takers = [each for _, each in sorted(known.items()) if each.weight and not each.frozen]
    for resource in sorted(resources):
        if resource in wanted or not (able := [t for t in takers if resource not in t.declines]):
            continue
        below = [each for each in able if load[each.id] < share[each.id]]
        taker = _best(resource, below) if below else _idlest(resource, able, load)
        wanted[resource] = taker.id
        load[taker.id] += 1
    return wanted


def _shares(
    resources: Collection[int], known: Mapping[str, Candidate], owners: Mapping[int, str]
) -> dict[str, int]:
    """The most that each may have: its part of all, or of what frozen members leave, if more."""
    members = known.values()
    every = sum(each.weight for each in members) or 1.0
    able = sum(each.weight for each in members if not each.frozen) or 1.0
    frozen = {each.id for each in members if each.frozen}
    left = sum(owners.get(resource) not in frozen for resource in resources)
    part = max(len(resources) / every, left / able)
    # A little less than it is, so that what should be whole is not rounded up by a float's dust.
    return {each.id: math.ceil(part * each.weight - 1e-9) for each in members}


def _kept(
    resources: Collection[int],
    known: Mapping[str, Candidate],
    owners: Mapping[int, str],
    share: Mapping[str, int],
) -> dict[int, str]:
    """What stays where it is: of an owner with too much, what it is best for."""
    held: dict[str, list[int]] = {}
    for resource in resources:
        owner = known.get(owners.get(resource, ""))
        if owner is not None and resource not in owner.declines:
            held.setdefault(owner.id, []).append(resource)
    kept = {}
    for owner_id, mine in held.items():
        stays = mine
        if not known[owner_id].frozen and len(mine) > share[owner_id]:
            best = sorted((-_draw(owner_id, each), each) for each in mine)
            stays = [each for _, each in best[: share[owner_id]]]
        kept.update(dict.fromkeys(stays, owner_id))
    return kept


def _best(resource: int, able: list[Candidate]) -> Candidate:
    return max(able, key=lambda each: -each.weight / math.log(_draw(each.id, resource)))


def _idlest(resource: int, able: list[Candidate], load: Mapping[str, int]) -> Candidate:
    least = min(load[each.id] / each.weight for each in able)
    return _best(resource, [each for each in able if load[each.id] / each.weight == least])


@lru_cache(maxsize=1 << 17)
def _draw(id: str, resource: int) -> float:
    """A number between 0 and 1, both excluded: splitmix64 of the resource, seeded by the id."""
    mixed = (_seed(id) + (resource + 2) * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & _MASK
    return (((mixed ^ mixed >> 31) >> 12) + 0.5) / (1 << 52)


@lru_cache(maxsize=1 << 10)
def _seed(id: str) -> int:
    return int.from_bytes(blake2b(id.encode(), digest_size=8).digest(), "big")
