"""Locks for programs that are no node: taken, renewed and given back by requests.

D1  Nobody renews but the client. A lease ends by itself, at the server.
D2  A nonce that the client chose may be asked for again, at any node, and gives the same lease
    with the same token. So what was asked for with it is never given back behind the client's
    back: a place in the queue is passed over after 3 s without a request, a lock that was handed
    to it after 1 s.
D3  A nonce that was drawn here is known to nobody before the answer. Whoever is gone by then, or
    gets no answer, leaves neither lease nor place.
D4  Who waits is woken by pub/sub, and asks at least once a second; see ``lock_queue``.

In Valkey a nonce is ``http-BUCKET.NONCE``: to the scripts each bucket is a process, so that any
node can be told of any hand-over, and most hand-overs have to be confirmed.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import anyio
import structlog
from msgspec import Struct

from ...coordinator.background import BackgroundTasks
from ...coordinator.clock import Clock
from ...coordinator.instruments import Instruments
from ...coordinator.locks.locks import LISTED_MAX, PubSubEvents
from ...coordinator.locks.queue import BEAT_S, QueueEntry
from ...coordinator.locks.store import Grant, Held, LockStore, Refusal
from ...coordinator.valkey.link import Commands
from ...coordinator.valkey.scripting import Scripts
from ...schemas.errors import ForebayError, Unavailable
from ...schemas.errors_locks import InvalidLock, LockNotAcquired, LockNotHeld
from ...schemas.keys import Names, check_key
from ...schemas.locks import LEASE_DEFAULT_S, LockView, Terms, about_of, make_terms

__all__ = ["WAIT_MAX_S", "LockService", "Wish"]

log = structlog.get_logger(__name__)

WAIT_MAX_S = 60.0
_BUCKETS = 64
_SOONEST_S = 0.005
_INSIST_S = 1.0
_NONCE = re.compile(r"[A-Za-z0-9_-]{16,64}\Z")


class Wish(Struct, frozen=True, kw_only=True):
    """What a client asks for; checked."""

    terms: Terms
    timeout_s: float
    nonce: str
    drawn: bool  #: here, not by the client: D3


class LockService:
    def __init__(
        self,
        commands: Commands,
        bell: PubSubEvents,
        names: Names,
        scripts: Scripts,
        *,
        node_id: str,
        clock: Clock,
        rng: random.Random,
        ids: Callable[[], str],
        tasks: BackgroundTasks,
        instruments: Instruments,
        waiters_max: int,
    ) -> None:
        """``ids`` gives what no other will have drawn, 16 characters or more."""
        self._records = LockStore(commands, names, scripts, clock=clock, handed=self._handed)
        self._commands = commands
        self._bell = bell
        self._buckets = [names.process(f"http-{number:02d}") for number in range(_BUCKETS)]
        self._channels = {f"{names.wake}{bucket}".encode(): None for bucket in self._buckets}
        self._wake = names.wake
        self._places: dict[str, list[QueueEntry]] = {}
        self._node_id = node_id
        self._clock = clock
        self._rng = rng
        self._ids = ids
        self._tasks = tasks
        self._counts = instruments.counts
        self._waiters_max = waiters_max

    def __repr__(self) -> str:
        return f"<LockService: {len(self._places)} wait>"

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Those who wait are woken while the body runs."""
        self._bell.subscribe(*self._channels)
        forget = self._bell.on_message(self._on_message)
        try:
            yield
        finally:
            forget()

    def wish(
        self,
        name: str,
        *,
        lease: float,
        timeout: float,
        meta: dict[str, object] | None,
        nonce: str | None,
    ) -> Wish:
        """Raises InvalidKey or InvalidLock; nothing was sent then."""
        about = about_of(name, self._node_id, meta)
        terms = make_terms(name, lease=lease, about=about)
        if not 0 <= timeout <= WAIT_MAX_S:
            raise InvalidLock(name, "timeout", timeout, f"give 0 to {WAIT_MAX_S:g} s; ask again")
        if nonce is not None:
            _check_nonce(name, nonce)
        given = nonce or self._ids()
        return Wish(terms=terms, timeout_s=timeout, nonce=given, drawn=nonce is None)

    async def acquire(self, wish: Wish) -> Grant:
        """A lease, as soon as it is this client's turn.

        Raises:
            LockNotAcquired: others have it, or too many wait. InvalidLock: it is in use as
                something else. Unavailable: Valkey does not answer.
        """
        try:
            return await self._acquire(wish)
        except BaseException as error:
            asked_only = isinstance(error, LockNotAcquired) and error.reason != "timed_out"
            if not asked_only:  # else there is neither lease nor place
                await self.give_up(wish)
            raise

    async def give_up(self, wish: Wish) -> None:
        """Leave nothing of what nobody knows of: D3; in spite of cancellation."""
        if not wish.drawn:
            return
        with anyio.move_on_after(_INSIST_S, shield=True):
            try:
                await self._records.release(wish.terms.name, self._inner(wish.nonce))
            except ForebayError as error:
                log.warning("lock.not_released", lock=wish.terms.name, error=str(error))

    async def renew(self, name: str, nonce: str, lease: float = LEASE_DEFAULT_S) -> int:
        """Have it for ``lease`` seconds from now on; returns the token.

        Raises:
            LockNotHeld: not any more, or never; another may have it.
        """
        terms = make_terms(name, lease=lease, about=b"{}")
        inner = self._inner(_check_nonce(name, nonce))
        (view,) = await self._records.show([name])
        token = next((each.token for each in view.holders if each.nonce == inner), 0)
        if token:
            held = Held(terms, inner, token)
            _, (status,) = await self._records.renew([held], timeout_ms=terms.lease_us // 6_000)
            if status == 1:
                return token
        raise LockNotHeld(name, nonce)

    async def release(self, name: str, nonce: str) -> None:
        """Raises LockNotHeld: it is neither held nor waited for, and was not released last."""
        check_key(name, name="lock")
        if not await self._records.release(name, self._inner(_check_nonce(name, nonce))):
            raise LockNotHeld(name, nonce)

    async def list(self) -> list[LockView]:
        return await self._records.held(LISTED_MAX)

    async def show(self, name: str) -> LockView:
        (view,) = await self._records.show([check_key(name, name="lock")])
        return view

    async def _acquire(self, wish: Wish) -> Grant:
        terms, inner = wish.terms, self._inner(wish.nonce)
        if not wish.timeout_s:
            answer = await self._records.acquire(terms, inner, "try")
            if isinstance(answer, Refusal):
                raise LockNotAcquired(terms.name, waited_ms=0, holder=answer.holder, reason="held")
            return answer
        with self._place(terms.name, inner) as place:
            began = self._clock.monotonic()
            while True:
                answer = await self._records.acquire(terms, inner, "wait")
                if isinstance(answer, Grant):
                    return answer
                left_s = began + wish.timeout_s - self._clock.monotonic()
                await place.wait(min(self._patience_s(answer), left_s))
                waited_s = self._clock.monotonic() - began
                if waited_s >= wish.timeout_s:
                    ms = int(waited_s * 1000)
                    raise LockNotAcquired(terms.name, waited_ms=ms, holder=answer.holder)

    def _inner(self, nonce: str) -> str:
        """The nonce as it is in Valkey; no node draws one like it."""
        return f"{self._buckets[_bucket_of(nonce)]}.{nonce}"

    def _patience_s(self, refusal: Refusal) -> float:
        beat_s = BEAT_S * self._rng.uniform(0.8, 1.0)
        return min(beat_s, max(_SOONEST_S, refusal.left_s)) if refusal.first else beat_s

    @contextmanager
    def _place(self, name: str, inner: str) -> Iterator[QueueEntry]:
        """Where a ring for this nonce arrives; requests that repeat it all have one."""
        if sum(map(len, self._places.values())) >= self._waiters_max:
            self._counts["limit_reached", "http_lock_waiters"] += 1
            raise LockNotAcquired(name, waited_ms=0, reason="queue_full")
        place = QueueEntry()
        self._places.setdefault(inner, []).append(place)
        try:
            yield place
        finally:
            self._places[inner].remove(place)
            if not self._places[inner]:
                del self._places[inner]

    def _handed(self, inner: str, _token: int, _sent_at: float) -> None:
        """A release here gave the lock to one of the same bucket, who waits here or elsewhere."""
        with suppress(Unavailable):  # the node is stopped; it asks by itself: D4
            self._tasks.start_soon(self._tell, inner)

    async def _tell(self, inner: str) -> None:
        try:
            channel = f"{self._wake}{inner.partition('.')[0]}"
            await self._commands.call("PUBLISH", channel, f"g {inner}")
        except ForebayError as error:
            log.debug("lock.not_told", error=str(error))  # it asks by itself: D4

    def _on_message(self, channel: bytes, payload: bytes) -> None:
        if channel in self._channels:
            for place in self._places.get(payload.decode(errors="replace").partition(" ")[2], ()):
                place.wake()


def _bucket_of(nonce: str) -> int:
    return zlib.crc32(nonce.encode()) % _BUCKETS


def _check_nonce(name: str, nonce: str) -> str:
    if not _NONCE.match(nonce):
        fix = "draw 16 to 64 letters, digits, '-' or '_' at random"
        raise InvalidLock(name, "nonce", nonce[:80], fix)
    return nonce
