"""Which sinks the live members of a namespace declare, for whoever publishes writes.

D1  A key is said to have no sink only if the roster was read after the question was asked, has
    live members, and none of them may have a sink for it. With no live member, a roster that
    cannot be read, or one of more than ``_MEMBERS_MAX``, no key is said to lack a sink.
D2  A roster that names a sink for the key may be up to ``_FRESH_S`` old: a read for many questions.
D3  One read is under way at a time; whoever asks meanwhile waits for the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import anyio
import structlog

from ...schemas.errors import ServerRefused, UnreadableRecord
from ...schemas.keys import Names
from ...schemas.replies import array, field_map, integer, pairs
from ..clock import Clock
from ..log_once import LogOnce
from ..valkey.link import Commands, Reply
from ..valkey.scripting import granted
from .roster import Profile, read_member

__all__ = ["SinkDirectory"]

log = structlog.get_logger(__name__)

_FRESH_S = 1.0
_MEMBERS_MAX = 1_000


class SinkDirectory:
    def __init__(self, commands: Commands, names: Names, *, clock: Clock) -> None:
        self._commands = commands
        self._names = names
        self._clock = clock
        self._reading = anyio.Lock()
        self._failing = LogOnce(clock)
        self._read_at = float("-inf")  # when the last read began
        self._profiles: Sequence[Profile] = ()  # of the live members; none: nothing is known

    def __repr__(self) -> str:
        return f"<SinkDirectory of {len(self._profiles)} members>"

    async def without_sink(self, keys: Sequence[str]) -> list[str]:
        """Those of the keys for which no live member declares a sink.

        Raises:
            Unavailable: it is not known.
        """
        asked_at = self._clock.monotonic()
        if asked_at - self._read_at <= _FRESH_S and self._profiles and not self._lacking(keys):
            return []
        async with self._reading:
            if self._read_at < asked_at:
                await self._read_or_tell()
        return self._lacking(keys)

    def _lacking(self, keys: Sequence[str]) -> list[str]:
        if not self._profiles:
            return []
        return [key for key in keys if not any(p.may_have_sink(key) for p in self._profiles)]

    async def _read_or_tell(self) -> None:
        began_at = self._clock.monotonic()
        try:
            self._profiles = await self._read()
        except (ServerRefused, UnreadableRecord) as error:
            self._failing.say(log, "roster.not_read", error)
            self._profiles = ()
        else:
            self._failing.over()
        self._read_at = began_at

    async def _read(self) -> Sequence[Profile]:
        commands = [
            ("TIME",),
            ("ZRANGE", self._names.nodes, 0, -1, "WITHSCORES"),
            ("HGETALL", self._names.members),
        ]
        time, beats, members = granted(await self._commands.call_many(commands))
        now_ms = integer(array(time, "TIME", length=2)[0], "TIME") * 1_000
        beaten_at = dict(pairs(beats, "the beats of the roster"))
        return _live(beaten_at, field_map(members), now_ms)


def _live(
    beaten_at: Mapping[Reply, Reply], records: Mapping[bytes, bytes], now_ms: int
) -> Sequence[Profile]:
    """The profiles of the members that live and take shards, those with equal sinks once."""
    if len(records) > _MEMBERS_MAX:
        return ()
    found: dict[object, Profile] = {}
    for name, record in records.items():
        try:
            member = read_member(name.decode(errors="replace"), record)
            silent_ms = now_ms - float(beaten_at.get(name, b"-inf"))
        except (UnreadableRecord, ValueError):
            continue  # the version of the whole, or what whoever beats reports
        profile = member.profile
        if profile.weight and member.is_live(silent_ms):
            found[profile.sinks, profile.more_sinks] = profile
    return tuple(found.values())
