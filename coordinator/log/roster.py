"""Who is in the cluster, as one member knows it: what it says in a beat, what it learns by it.

R1  Members are judged by the server's clock, in the script: suspect after three beats missed,
    after five gone; or away, as long as the place of a member with a label is kept.
R2  A beat that brings no news transfers no members, however many there are.
R3  A record that cannot be read is a member without weight, and no reason to fail; a name that
    cannot be read is left out. Members, resources and bytes of a report are bounded.
R4  A shard, and the ingress stream, goes to a member that declares every sink, else to one that
    declares most. A member without sinks declines all shards. While a member of a release that
    does not publish its sinks is there, sinks do not count: all compute as that release does.
    Of more than ``SINKS_MAX`` sinks, or one with a longer template than others can read, a member
    publishes a part, and that there are more.
R5  A member defers a shard whose held writes another member may be able to store: any other
    goes before it.

An id is one process. A label is what is the same after its restart (``node.id``). Whoever owns
nothing, and wants to be seen, beats with weight 0; who only reads need not beat at all.
Does not do I/O: ``arguments`` are for roster_beat.lua, ``learn`` takes its reply.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Literal, get_args

import msgspec
import structlog
from msgspec import Meta, Struct

from ...schemas.errors import InvalidKey, UnreadableRecord
from ...schemas.keys import EVENTS, KeyTemplate
from ...schemas.replies import integer, raw_bytes, text
from ..valkey.link import Arg, Reply
from .assignment import Candidate, assign

__all__ = [
    "STATES",
    "Member",
    "Profile",
    "Roster",
    "State",
    "is_for",
    "pack",
    "published",
    "read_member",
    "unpack",
    "wanted",
]

log = structlog.get_logger(__name__)

_ID_BYTES_MAX = 512
_MEMBERS_MAX = 1_000
_HELD_DIGITS_MAX = 4_096  #: of 16,383 shards and the ingress stream
State = Literal["active", "suspect", "leaving", "away", "gone"]
_RANK: tuple[State, ...] = ("away", "suspect", "leaving", "active")  #: whose word on owning counts
STATES: tuple[State, ...] = get_args(State)[:-1]  #: those that are in the roster
SINKS_MAX = 256  #: that a member publishes; more do not make it more capable
_TEMPLATE_CHARS_MAX = 512
_PATIENCE_MS_MAX = 600_000  #: with a member that beats not at all; greater ones are made up
Template = Annotated[str, Meta(max_length=_TEMPLATE_CHARS_MAX)]


class Profile(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a member tells of itself. Unknown fields, of later versions, are ignored."""

    incarnation: str = ""
    label: str = ""  #: the same after a restart; empty: none
    http: str = ""  #: host:port
    version: str = ""
    weight: Annotated[float, Meta(ge=0, le=1000)] = 1.0
    held: str = ""  #: what it owns, or has kept for it; see ``pack``
    declines: str = ""  #: what it will not own
    defers: str = ""  #: shards it owns only if nobody else will
    sinks: Annotated[tuple[Template, ...], Meta(max_length=SINKS_MAX)] | None = None
    #: the key templates of its sinks; None: it is of a release that does not publish them
    more_sinks: bool = False  #: it has sinks that are not among ``sinks``

    @property
    def has_sinks(self) -> bool:
        """Whether it has sinks, or is of a release that does not say."""
        return self.sinks != () or self.more_sinks

    def may_take(self, key: str) -> bool:
        """Whether one of its sinks may be for this key."""
        return self.more_sinks or any(is_for(template, key) for template in self.sinks or ())

    def may_have_sink(self, key: str) -> bool:
        """As ``may_take``; true also for a release that does not publish its sinks."""
        return self.sinks is None or self.may_take(key)


class Member(Struct, frozen=True, kw_only=True):
    id: str
    state: State
    profile: Profile
    held: frozenset[int]
    declines: frozenset[int]
    defers: frozenset[int] = frozenset()
    beat_ms: int = 0
    grace_ms: int = 0

    def is_live(self, silent_ms: float) -> bool:
        """Whether it counts as living after this time without a beat, by R1."""
        patience_ms = min(max(5 * self.beat_ms, self.grace_ms), _PATIENCE_MS_MAX)
        return self.state != "gone" and silent_ms < patience_ms


@lru_cache(maxsize=4_096)
def is_for(template: str, key: str) -> bool:
    """Whether a sink with this key template may be for this key."""
    parsed = _parsed(template)
    if parsed is None:  # of a later release: judge how it begins and ends
        head, tail = template.partition("{")[0], template.rpartition("}")[2]
        return key.startswith(head) and key.endswith(tail)
    return parsed.match(key) is not None


@lru_cache(maxsize=1_024)
def _parsed(template: str) -> KeyTemplate | None:
    try:
        return KeyTemplate(template)
    except InvalidKey:
        return None


def published(templates: Iterable[str]) -> tuple[str, ...]:
    """The templates of its sinks that a member publishes."""
    short = {each for each in templates if len(each) <= _TEMPLATE_CHARS_MAX}
    return tuple(sorted(short)[:SINKS_MAX])


def pack(resources: Iterable[int]) -> str:
    """A set of resources as hexadecimal digits: the lowest bit is the ingress stream."""
    bits = 0
    for resource in resources:
        bits |= 1 << (resource - EVENTS)
    return f"{bits:x}" if bits else ""


def unpack(digits: str) -> frozenset[int]:
    if len(digits) > _HELD_DIGITS_MAX:
        raise ValueError("more resources than there can be")
    bits = bin(int(digits or "0", 16))[:1:-1]
    return frozenset(at + EVENTS for at, bit in enumerate(bits) if bit == "1")


class Roster:
    """``version`` 0: nothing is known yet."""

    def __init__(self) -> None:
        self.version = 0
        self.members: dict[str, Member] = {}

    def arguments(
        self, id: str, state: State, profile: Profile, *, beat_ms: int, grace_ms: int
    ) -> list[Arg]:
        return [id, state, beat_ms, grace_ms, msgspec.json.encode(profile), self.version]

    def learn(self, reply: Sequence[Reply]) -> bool:
        """Take in a reply; whether the roster that was known before is lost."""
        known, self.version = self.version, integer(reply[0], "the roster's version")
        whole = bool(reply[1])
        if whole:
            self.members = {}
        for name, record in zip(reply[2::2], reply[3::2], strict=True):
            member = self._member(name, record)
            if member is None:
                continue
            if member.state == "gone":
                self.members.pop(member.id, None)
            else:
                self.members[member.id] = member
        return whole and known > 0

    def _member(self, name: Reply, record: Reply) -> Member | None:
        """None for an impossible record, and for one too many."""
        try:
            member_id = text(name, "a member of the roster", bytes_max=_ID_BYTES_MAX)
        except UnreadableRecord as error:
            log.warning("roster.unreadable", error=str(error))
            return None
        if member_id not in self.members and len(self.members) >= _MEMBERS_MAX:
            log.warning("roster.overgrown", member=member_id, members=_MEMBERS_MAX)
            return None
        return _read_or_weightless(member_id, raw_bytes(record, "a record of the roster"))

    def count(self, state: State) -> int:
        return sum(member.state == state for member in self.members.values())


def read_member(id: str, record: bytes) -> Member:
    """What the roster's record says of a member; raises UnreadableRecord."""
    try:
        _, state, beat, grace, body = record.split(b" ", 4)
        profile = msgspec.json.decode(body, type=Profile)
        known = state.decode(errors="replace")
        return Member(
            id=id,
            state=known if known in get_args(State) else "leaving",  # type: ignore[arg-type]
            profile=profile,
            held=unpack(profile.held),
            declines=unpack(profile.declines),
            defers=unpack(profile.defers),
            beat_ms=int(beat),
            grace_ms=int(grace),
        )
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise UnreadableRecord("a member of the roster", record, str(error)[:200]) from error


def _read_or_weightless(id: str, record: bytes) -> Member:
    try:
        return read_member(id, record)
    except UnreadableRecord as error:
        log.warning("roster.unreadable", member=id, error=error.problem)
        none: frozenset[int] = frozenset()
        profile = Profile(weight=0)
        return Member(id=id, state="active", profile=profile, held=none, declines=none)


def wanted(members: Mapping[str, Member], shards: int) -> dict[int, str]:
    """Who should own what. The ingress stream counts apart: it has no place in the shares.

    Shards of a member that is away are kept for it, or go to the one with its label; the
    ingress stream is not: events must not stand still for a restart.
    """
    heirs = _heirs(members)
    standing = [each for each in members.values() if _stands(each, heirs)]
    owners = _owners(members, heirs)
    sinks_count = all(each.profile.sinks is not None for each in standing if each.profile.weight)
    candidates = [
        Candidate(
            each.id,
            each.profile.weight,
            frozen=each.state != "active",
            declines=each.declines,
            avoids=each.defers if sinks_count else frozenset(),
            rank=len(set(each.profile.sinks or ())) if sinks_count else 0,
        )
        for each in standing
    ]
    present = [each for each in candidates if members[each.id].state != "away"]
    return assign(range(shards), candidates, owners) | assign([EVENTS], present, owners)


def _heirs(members: Mapping[str, Member]) -> dict[str, str]:
    """Of each label the member that is active, to be taken for one that is silent."""
    active = [each for _, each in sorted(members.items()) if each.state == "active"]
    return {each.profile.label: each.id for each in reversed(active) if each.profile.label}


def _stands(member: Member, heirs: Mapping[str, str]) -> bool:
    match member.state:
        case "active":
            return True
        case "suspect" | "away":
            return member.profile.label not in heirs
        case _:
            return False


def _owners(members: Mapping[str, Member], heirs: Mapping[str, str]) -> dict[int, str]:
    """Where two say that they own the same, the one that is heard of counts."""
    owners: dict[int, str] = {}
    for member in sorted(members.values(), key=lambda each: (_RANK.index(each.state), each.id)):
        owner = (
            member.id if member.state == "active" else heirs.get(member.profile.label, member.id)
        )
        owners.update(dict.fromkeys(member.held, owner))
    return owners
