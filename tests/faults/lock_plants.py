"""Faults that the checker of locks has to find: each is what others do, planted in ours."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from importlib.resources import files

import forebay.nodes.runtime as wiring
from faults.lock_setting import PlantedInLocks
from forebay.coordinator.locks.lease import Lease
from forebay.coordinator.locks.renewals import Renewals
from forebay.coordinator.valkey.scripting import Script, Scripts, load_scripts

_TOKEN = re.compile(r"math\.max\(lock\.t \+ 1, now\)")
_SHORTCUT = 'redis.call("HMGET", KEYS[1], "t"'
_FLOOR = re.compile(r"lock\.t = math\.max\(lock\.t, (floor|tonumber\(ARGV\[\d\]\))\)")
_NO_GRACE = "\nlocal function grace_of() return 0, CAP_US end\n"


def plant(what: PlantedInLocks) -> None:
    """In this process, before its node starts."""
    if what == "counted":
        scripts = {name: _counted(script) for name, script in load_scripts().items()}
        wiring.load_scripts = lambda: Scripts(list(scripts.values()))  # type: ignore[assignment]
    elif what == "no grace":
        ungraced = [_without_grace(script) for script in load_scripts().values()]
        wiring.load_scripts = lambda: Scripts(ungraced)  # type: ignore[assignment]
    elif what == "sleepy":
        _renew_sleepily()


def _counted(script: Script) -> Script:
    """Tokens as INCR would give them, in the record that holds the lock."""
    source = _TOKEN.sub("lock.t + 1", script.source)
    if script.name == "lock_acquire":
        assert source != script.source, "tokens are made elsewhere now"
        assert _SHORTCUT in source
        source, count = _FLOOR.subn("", source)
        assert count
        # No record is found by the shortcut, which makes tokens in its own way.
        source = source.replace(_SHORTCUT, 'redis.call("HMGET", KEYS[1] .. "-", "t"')
    return Script.of(script.name, source)


def _without_grace(script: Script) -> Script:
    shared = (files("forebay.coordinator") / "scripts" / "_lock.lua").read_text().rstrip()
    assert "local function grace_of(" in shared
    return Script.of(script.name, script.source.replace(shared, shared + _NO_GRACE))


def _renew_sleepily() -> None:
    renew, choose = Renewals.renew, Renewals._choose

    async def sleepy(self: Renewals, leases: Sequence[Lease]) -> None:
        for lease in leases:
            await renew(self, [lease])
        now = self._clock.monotonic()
        for lease in leases:
            lease.renew_at = now + lease.terms.lease_us / 3e6
            self._due.by(lease.renew_at)

    def unplanned(self: Renewals, now: float) -> list[Lease]:
        chosen = choose(self, now)
        for lease in chosen:
            lease.renew_at = math.inf
        return chosen

    Renewals.renew = sleepy  # type: ignore[method-assign]
    Renewals._choose = unplanned  # type: ignore[method-assign]
