"""The records of locks in Valkey: each script as a method.

R1  Every time is the monotonic clock of the caller, read before sending. The server counts from
    later, so the caller's lease ends earlier.
R2  If a reply hands a lock to another waiter of this process, that waiter is woken before the
    method returns, without a message.
R3  No method retries. Each may be repeated with the same nonce; see its script.
R4  Methods that read many keys (``begin``, ``held``) skip keys of the wrong type, with a warning
    that names them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import msgspec
import structlog

from ...schemas.errors import ForebayError, ServerRefused
from ...schemas.errors_locks import InvalidLock, LockNotAcquired
from ...schemas.keys import Names
from ...schemas.locks import KINDS, LEASE_DEFAULT_S, Holder, LockView, Terms, Waiting
from ...schemas.replies import WHOLE_MAX, integer
from ..clock import Clock
from ..valkey.link import Arg, Commands, Reply
from ..valkey.scripting import Call, Scripts, ask_many, granted, run, run_many

__all__ = ["Grant", "Handed", "Held", "LockStore", "Mode", "Refusal"]

log = structlog.get_logger(__name__)

_WAITING = re.compile(rb"([0-9]{1,16}) ([0-9]{1,16}) [0-9]{1,16} (.*)", re.DOTALL)
_USUAL_US = int(LEASE_DEFAULT_S * 1e6)
_SHOWN_MAX = 100
_WARNED_MAX = 3
USED_MAX = 10_000  #: names read per shard

Mode = Literal["try", "wait", "barge"]
Handed = Callable[[str, int, float], None]  #: nonce, token, earliest time of the request


class Grant(NamedTuple):
    token: int
    sent_at: float  #: monotonic seconds; the lease counts from here


class Refusal(NamedTuple):
    left_s: float  #: time until the next request, unless a message arrives earlier
    holder: str
    first: bool  #: whether the caller is first in the queue


class Held(NamedTuple):
    """A lease to renew."""

    terms: Terms
    nonce: str
    token: int


class LockStore:
    def __init__(
        self,
        commands: Commands,
        names: Names,
        scripts: Scripts,
        *,
        clock: Clock,
        handed: Handed,
    ) -> None:
        self.highest = 0  #: highest token that this process has seen
        self.run = ""  #: run id of the server on the present connection, or empty
        self._commands = commands
        self._names = names
        self._clock = clock
        self._handed = handed
        self._scripts = scripts
        self._acquire = scripts["lock_acquire"]
        self._release = scripts["lock_release"]

    async def acquire(self, terms: Terms, nonce: str, mode: Mode) -> Grant | Refusal:
        """Raises LockNotAcquired, InvalidLock or Unavailable."""
        args = (
            nonce,
            terms.kind,
            terms.capacity,
            terms.weight,
            terms.lease_us,
            mode,
            self.highest,
            self.run,
            terms.about,
            terms.name,
        )
        sent_at = self._clock.monotonic()
        reply = await run(self._commands, self._acquire, self._names.lock(terms.name), args)
        if type(reply) is bytes:
            token = int(reply)
            self.highest = max(self.highest, token)
            return Grant(token, sent_at)
        code = reply[0]
        if code == 1:
            if reply[2]:
                self._hand_over(reply[2], sent_at)
            token = int(reply[1])
            self.highest = max(self.highest, token)
            return Grant(token, sent_at)
        if code == 0:
            if reply[4]:
                self._hand_over(reply[4], sent_at)
            return Refusal(int(reply[1]) / 1e6, _about(reply[2])[0], bool(reply[3]))
        if code == -2:
            used_as = _kind(reply[1])
            raise InvalidLock(terms.name, "kind", KINDS[terms.kind], f"it is in use as {used_as}")
        reason: Literal["queue_full", "too_many_holders"]
        reason = "queue_full" if code == -1 else "too_many_holders"
        raise LockNotAcquired(terms.name, waited_ms=0, reason=reason)

    async def release(self, name: str, nonce: str) -> bool:
        """Release a lease or a queue entry; False if there was none."""
        sent_at = self._clock.monotonic()
        reply = await run(
            self._commands, self._release, self._names.lock(name), (nonce, self.run, name)
        )
        return self._released(reply, sent_at)

    def _released(self, reply: Reply, sent_at: float) -> bool:
        if reply == 1:
            return True
        code, handed = reply
        self._hand_over(handed, sent_at)
        return bool(code)

    async def release_many(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """``release`` for many names and nonces; also False if the server refused."""
        calls = [
            Call(
                script=self._release,
                keys=self._names.lock(name),
                args=[nonce, self.run, name],
            )
            for name, nonce in pairs
        ]
        sent_at = self._clock.monotonic()
        replies = await run_many(self._commands, calls)
        return [
            not isinstance(reply, ForebayError) and self._released(reply, sent_at)
            for reply in replies
        ]

    async def renew(self, leases: Sequence[Held], *, timeout_ms: int) -> tuple[int, list[int]]:
        """Renew leases of one shard; returns the server clock in microseconds and the statuses."""
        keys = [self._names.lock(each.terms.name) for each in leases]
        args: list[Arg] = []
        for each in leases:
            args += [each.terms.name, each.nonce, each.token, each.terms.lease_us]
        now_us, *statuses = await run(
            self._commands,
            self._scripts["lock_renew"],
            [keys[0][4], keys[0][3], *(each[0] for each in keys)],
            args,
            timeout_ms=timeout_ms,
        )
        return int(now_us), statuses

    async def reclaim(self, lease: Held, left_s: float) -> bool:
        """Restore a lease that a failover lost, for its remaining time; False if it is taken."""
        terms = lease.terms
        record, queue, _, index, era = self._names.lock(terms.name)
        args: list[Arg] = [
            terms.name,
            lease.nonce,
            terms.kind,
            terms.capacity,
            terms.weight,
            lease.token,
            int(left_s * 1e6),
            terms.about,
        ]
        keys = [record, index, era, queue]
        code, _ = await run(self._commands, self._scripts["lock_reclaim"], keys, args)
        return bool(code)

    async def force(self, name: str) -> int:
        """Release the lock without its holders, and return their number."""
        count, token = await run(
            self._commands, self._scripts["lock_force"], self._names.lock(name), [name]
        )
        self.highest = max(self.highest, int(token))
        return int(count)

    async def resize(self, name: str, capacity: int | None, *, declared: int) -> None:
        """Set the capacity of a semaphore; None restores the declared capacity.

        Raises:
            InvalidLock: the name belongs to another kind of lock.
        """
        args: list[Arg] = [name, capacity or 0, declared]
        done, kind, *_ = await run(
            self._commands, self._scripts["lock_resize"], self._names.lock(name), args
        )
        if not done:
            fix = f"it is in use as {_kind(kind)}"
            raise InvalidLock(name, "kind", KINDS["s"], fix)

    async def first_run(self, run_id: str) -> str:
        """The run id of the server at the first start of locks in the namespace; ``run_id`` if
        this is the first start.
        """
        reply = await run(
            self._commands, self._scripts["meta_set"], [self._names.meta], ["locks", run_id]
        )
        return bytes(reply).decode()

    async def begin(self, *, fresh: bool) -> float:
        """Create missing eras; returns the longest remaining grace period in seconds."""
        script, part = self._scripts["lock_begin"], self._names.part
        calls = [
            Call(
                script=script,
                keys=[part(shard, "era"), part(shard, "locks")],
                args=[int(fresh), _USUAL_US],
            )
            for shard in range(self._names.shards)
        ]
        replies = _readable(await run_many(self._commands, calls))
        return max([int(reply) for reply in replies], default=0) / 1e6

    async def names_used(self) -> list[str]:
        """Names of held locks, and of some released in the last minutes."""
        now = await self._commands.call("TIME")
        now_us = int(now[0]) * 1_000_000 + int(now[1])
        indexes = [self._names.part(shard, "locks") for shard in range(self._names.shards)]
        replies = _readable(
            await ask_many(
                self._commands,
                [("ZRANGEBYSCORE", i, now_us, "+inf", "LIMIT", 0, USED_MAX) for i in indexes],
            )
        )
        return sorted(_text(name) for reply in replies for name in reply)

    async def held(self, bound: int) -> list[LockView]:
        """At most ``bound`` held locks, ordered by name (R4)."""
        names = await self.names_used()
        found: list[LockView] = []
        for at in range(0, len(names), bound):
            views = _readable(await self._views(names[at : at + bound]))
            found += [view for view in views if view.holders]
            if len(found) >= bound:
                break
        return found[:bound]

    async def show(self, names: Sequence[str]) -> list[LockView]:
        """Raises ServerRefused if a key has the wrong type."""
        return list(granted(await self._views(names)))

    async def _views(self, names: Sequence[str]) -> list[LockView | ForebayError]:
        script = self._scripts["lock_show"]
        calls = [
            Call(script=script, keys=self._names.lock(name)[:3], args=[_SHOWN_MAX])
            for name in names
        ]
        replies = await run_many(self._commands, calls)
        return [
            reply if isinstance(reply, ForebayError) else _view(name, reply)
            for name, reply in zip(names, replies, strict=True)
        ]

    def _hand_over(self, handed: Sequence[bytes], sent_at: float) -> None:
        for nonce, token in zip(handed[::2], handed[1::2], strict=True):
            self._handed(_text(nonce), integer(token, "a token"), sent_at)


def _readable(replies: Sequence[Reply]) -> list[Reply]:
    """The replies without refusals of keys of the wrong type (R4); raises other errors."""
    refused = [each for each in replies if isinstance(each, ServerRefused) and each.of_keys]
    for each in refused[:_WARNED_MAX]:
        log.warning("locks.refused", key=each.key, error=str(each), count=len(refused))
    return list(granted([each for each in replies if each not in refused]))


def _text(raw: bytes) -> str:
    """A name or nonce: ASCII from Forebay, any bytes from other programs."""
    return raw.decode(errors="replace")


def _kind(raw: bytes) -> str:
    return KINDS.get(_text(raw), "") or "something else" if raw else ""


def _ticket(raw: bytes) -> int:
    """A ticket from a score, which may be any float; 0 if it is not a valid time."""
    number = float(raw)
    return int(number) if 0 <= number <= WHOLE_MAX else 0


def _about(raw: bytes) -> tuple[str, dict[str, object]]:
    if not raw:
        return "", {}
    try:
        about = msgspec.json.decode(raw, type=dict[str, object])
    except (msgspec.DecodeError, RecursionError):
        return "", {}
    meta = about.get("meta")
    return str(about.get("by", "")), meta if isinstance(meta, dict) else {}


def _view(name: str, reply: Reply) -> LockView:
    now_us, kind, capacity, live, token, holders, queue, waiting = reply
    now, held, asked = int(now_us), iter(holders), iter(queue)
    return LockView(
        name=name,
        kind=_kind(kind),
        capacity=int(capacity),
        live=bool(live),
        token=int(token),
        holders=tuple(
            _holder(now, nonce, line, about)
            for nonce, line, about in zip(held, held, held, strict=True)
        ),
        queue=tuple(
            _waiting(now, nonce, ticket, line)
            for nonce, ticket, line in zip(asked, asked, asked, strict=True)
        ),
        waiting=int(waiting),
    )


def _holder(now_us: int, nonce: bytes, line: bytes, raw: bytes) -> Holder:
    weight, token, ends, since = line.split(b" ")
    by, meta = _about(raw)
    return Holder(
        nonce=_text(nonce),
        by=by,
        meta=meta,
        token=int(token),
        weight=int(weight),
        since_ms=int(since) // 1_000,
        left_ms=(int(ends) - now_us) // 1_000,
    )


def _waiting(now_us: int, nonce: bytes, ticket: bytes, line: bytes) -> Waiting:
    found = _WAITING.fullmatch(line)
    beat, weight, about = (int(found[1]), int(found[2]), found[3]) if found else (0, 0, b"")
    by, meta = _about(about)
    return Waiting(
        nonce=_text(nonce),
        by=by,
        meta=meta,
        weight=weight,
        waited_ms=max(0, now_us - _ticket(ticket)) // 1_000,
        silent_ms=max(0, now_us - beat) // 1_000,
    )
