"""The writing half of a cached function: what callers see of the ``WritePath``.

The last argument of each is the value, the ones before are the loader's. How far a write got is
in the ``Receipt``; ``until`` says how far it has to get, within ``timeout`` seconds:

    accepted    the primary has it
    replicated  so have ``valkey.replicas_min`` replicas, in memory
    sink        the source has it

Of a key whose write-behind is pending, a write-through waits until that was sunk.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, Literal, Protocol, TypedDict, TypeVar, Unpack, overload

from ...coordinator.locks.guards import token_of
from ...coordinator.locks.lease import Lease
from ...schemas.errors import ForebayError, InvalidKey, Level
from ...schemas.jobs import Invalidates
from ...schemas.keys import check_key, refuse_one_string
from ..values.packing import Packed
from .declaration import lifetime_ms
from .shared import Receipt
from .write import WritePath

__all__ = ["NOT_RUNNING", "Writable"]

NOT_RUNNING = "the node is not running; use it inside `async with node:`"

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
T_co = TypeVar("T_co", covariant=True)
A_contra = TypeVar("A_contra", contravariant=True)
B_contra = TypeVar("B_contra", contravariant=True)
C_contra = TypeVar("C_contra", contravariant=True)

_INVALIDATES_MAX = 1_000  #: what a write job may carry
_TIMEOUT_S = 5.0


# A type checker compares a cached function with these, to know the arguments of its writers. A
# loader of more than three parameters has writers that take anything; they are checked when they
# are called.


class Takes0(Protocol[T_co]):
    def __call__(self) -> Coroutine[Any, Any, T_co]: ...


class Takes1(Protocol[A_contra, T_co]):
    def __call__(self, a: A_contra, /) -> Coroutine[Any, Any, T_co]: ...


class Takes2(Protocol[A_contra, B_contra, T_co]):
    def __call__(self, a: A_contra, b: B_contra, /) -> Coroutine[Any, Any, T_co]: ...


class Takes3(Protocol[A_contra, B_contra, C_contra, T_co]):
    def __call__(self, a: A_contra, b: B_contra, c: C_contra, /) -> Coroutine[Any, Any, T_co]: ...


class PutOptions(TypedDict, total=False):
    ttl: float | None
    until: Literal["accepted", "replicated"]
    timeout: float
    token: Lease | int


class SourceOptions(TypedDict, total=False):
    timeout: float


class BehindOptions(TypedDict, total=False):
    invalidates_keys: Sequence[str]
    invalidates_tags: Sequence[str]
    until: Level
    timeout: float


class Writable(Generic[T]):
    name: str
    key: Callable[..., str]
    _writes: WritePath[T] | None = None

    @overload
    async def put(
        self: Takes0[T], value: T | None, /, **options: Unpack[PutOptions]
    ) -> Receipt: ...

    @overload
    async def put(
        self: Takes1[A, T], a: A, value: T | None, /, **options: Unpack[PutOptions]
    ) -> Receipt: ...

    @overload
    async def put(
        self: Takes2[A, B, T], a: A, b: B, value: T | None, /, **options: Unpack[PutOptions]
    ) -> Receipt: ...

    @overload
    async def put(
        self: Takes3[A, B, C, T],
        a: A,
        b: B,
        c: C,
        value: T | None,
        /,
        **options: Unpack[PutOptions],
    ) -> Receipt: ...

    @overload
    async def put(
        self,
        a: Any,
        b: Any,
        c: Any,
        d: Any,
        value: T | None,
        /,
        *more: Any,
        **options: Unpack[PutOptions],
    ) -> Receipt: ...

    async def put(
        self,
        *args: Any,
        ttl: float | None = None,
        until: Literal["accepted", "replicated"] = "accepted",
        timeout: float = _TIMEOUT_S,  # noqa: ASYNC109 - part of a bounded wait, not of a scope
        token: Lease | int = 0,
    ) -> Receipt:
        """Store a value that the caller knows to be the newest; the sink is not told.

        None is stored as a known absence, or, where absences are not cached, invalidates.
        ``ttl`` in seconds; by default the cache's. ``token``: the lock's lease under which it is
        put, so that one who lost the lock cannot put what is older than its successor's.

        Raises:
            StaleToken: a put under a later token was there before. LeaseLost: the lease is over.
            Unavailable: it may have been stored. Unconfirmed: it was, and not yet further.
            InvalidValue: no entry can hold it. ConfigError: ``ttl``, ``until`` or ``timeout``.
        """
        key, value = self._key_and_value(args)
        ttl_ms = None if ttl is None else lifetime_ms("ttl", ttl, origin=f"a put of {self.name}")
        return await self.writes.put(
            key,
            value,
            ttl_ms=ttl_ms,
            until=until,
            timeout_ms=self._timeout_ms(timeout),
            token=token_of(token),
        )

    @overload
    async def write_through(
        self: Takes0[T], value: T | None, /, **options: Unpack[SourceOptions]
    ) -> Receipt: ...

    @overload
    async def write_through(
        self: Takes1[A, T], a: A, value: T | None, /, **options: Unpack[SourceOptions]
    ) -> Receipt: ...

    @overload
    async def write_through(
        self: Takes2[A, B, T], a: A, b: B, value: T | None, /, **options: Unpack[SourceOptions]
    ) -> Receipt: ...

    @overload
    async def write_through(
        self: Takes3[A, B, C, T],
        a: A,
        b: B,
        c: C,
        value: T | None,
        /,
        **options: Unpack[SourceOptions],
    ) -> Receipt: ...

    @overload
    async def write_through(
        self,
        a: Any,
        b: Any,
        c: Any,
        d: Any,
        value: T | None,
        /,
        *more: Any,
        **options: Unpack[SourceOptions],
    ) -> Receipt: ...

    async def write_through(self, *args: Any, timeout: float = _TIMEOUT_S) -> Receipt:  # noqa: ASYNC109
        """Store a value in the source, then in the cache; None deletes the row.

        ``timeout``: how long to wait for other loads and writes of the key.

        Raises:
            SinkError: as the sink raised it; nothing was changed, unless its outcome is unknown.
            KeyBusy: others had the key for too long. ConfigError: no sink takes it.
            InvalidValue: no entry can hold it; the sink was not asked.
            Unavailable: Valkey did not answer, perhaps after the source took it; write it again.
        """
        key, value = self._key_and_value(args)
        return await self.writes.through(key, value, timeout_ms=self._timeout_ms(timeout))

    @overload
    async def write_around(
        self: Takes0[T], value: T | None, /, **options: Unpack[SourceOptions]
    ) -> Receipt: ...

    @overload
    async def write_around(
        self: Takes1[A, T], a: A, value: T | None, /, **options: Unpack[SourceOptions]
    ) -> Receipt: ...

    @overload
    async def write_around(
        self: Takes2[A, B, T], a: A, b: B, value: T | None, /, **options: Unpack[SourceOptions]
    ) -> Receipt: ...

    @overload
    async def write_around(
        self: Takes3[A, B, C, T],
        a: A,
        b: B,
        c: C,
        value: T | None,
        /,
        **options: Unpack[SourceOptions],
    ) -> Receipt: ...

    @overload
    async def write_around(
        self,
        a: Any,
        b: Any,
        c: Any,
        d: Any,
        value: T | None,
        /,
        *more: Any,
        **options: Unpack[SourceOptions],
    ) -> Receipt: ...

    async def write_around(self, *args: Any, timeout: float = _TIMEOUT_S) -> Receipt:  # noqa: ASYNC109
        """Store a value in the source, and have every node forget the entry.

        Raises:
            As ``write_through``.
        """
        key, value = self._key_and_value(args)
        return await self.writes.around(key, value, timeout_ms=self._timeout_ms(timeout))

    @overload
    async def write_behind(
        self: Takes0[T], value: T | None, /, **options: Unpack[BehindOptions]
    ) -> Receipt: ...

    @overload
    async def write_behind(
        self: Takes1[A, T], a: A, value: T | None, /, **options: Unpack[BehindOptions]
    ) -> Receipt: ...

    @overload
    async def write_behind(
        self: Takes2[A, B, T], a: A, b: B, value: T | None, /, **options: Unpack[BehindOptions]
    ) -> Receipt: ...

    @overload
    async def write_behind(
        self: Takes3[A, B, C, T],
        a: A,
        b: B,
        c: C,
        value: T | None,
        /,
        **options: Unpack[BehindOptions],
    ) -> Receipt: ...

    @overload
    async def write_behind(
        self,
        a: Any,
        b: Any,
        c: Any,
        d: Any,
        value: T | None,
        /,
        *more: Any,
        **options: Unpack[BehindOptions],
    ) -> Receipt: ...

    async def write_behind(
        self,
        *args: Any,
        invalidates_keys: Sequence[str] = (),
        invalidates_tags: Sequence[str] = (),
        until: Level = "accepted",
        timeout: float = _TIMEOUT_S,  # noqa: ASYNC109
    ) -> Receipt:
        """Store a value now and have it written to the sink soon; None deletes the row.

        Keys and tags in ``invalidates`` are invalidated when the sink has the value.

        Raises:
            Backpressure: the shard's stream is full. Unavailable: the outcome may be unknown.
            Unconfirmed: accepted, and not yet further. DeadLettered: the sink will not take it.
            InvalidKey: one in ``invalidates`` cannot be a key, or there are too many.
            InvalidValue: no entry can hold the value. ConfigError: no sink takes the key.
        """
        key, value = self._key_and_value(args)
        after = Invalidates(
            keys=_checked("invalidates_keys", invalidates_keys),
            tags=_checked("invalidates_tags", invalidates_tags),
        )
        return await self.write_value(
            key, value, after, until=until, timeout_ms=self._timeout_ms(timeout)
        )

    async def write_value(
        self,
        key: str,
        value: T | None,
        after: Invalidates,
        *,
        until: Level = "accepted",
        timeout_ms: int = 0,
    ) -> Receipt:
        """As ``write_behind``, by key."""
        return await self.writes.behind(key, value, after, until=until, timeout_ms=timeout_ms)

    async def pack_published(self, key: str, raw_json: bytes, ttl_ms: int | None) -> Packed:
        """A published value, checked against the declared type; JSON null deletes.

        Raises:
            msgspec.ValidationError: it is not of that type. InvalidEntry: it is too large.
        """
        return await self.writes.pack_published(key, raw_json, ttl_ms)

    def check_published(self, raw_json: bytes) -> None:
        """Whether ``pack_published`` takes this value; raises as that does."""
        self.writes.check_published(raw_json)

    @property
    def writes(self) -> WritePath[T]:
        if self._writes is None:
            raise ForebayError(f"{self.name}: {NOT_RUNNING}")
        self._writes.check_loop()
        return self._writes

    def _key_and_value(self, args: Sequence[Any]) -> tuple[str, Any]:
        if not args:
            raise TypeError(
                f"a write of {self.name} takes the loader's arguments, and the value last"
            )
        *arguments, value = args
        try:
            return self.key(*arguments), value
        except TypeError as error:
            problem = f"a write of {self.name} takes the loader's arguments, and the value last"
            raise TypeError(f"{problem}: {error} before the value") from None

    def _timeout_ms(self, timeout_s: float) -> int:
        return lifetime_ms("timeout", timeout_s, zero=True, origin=f"a write of {self.name}")


def _checked(name: str, keys: Sequence[str]) -> tuple[str, ...]:
    refuse_one_string(name, keys)
    if len(keys) > _INVALIDATES_MAX:
        raise InvalidKey(name, f"{len(keys)} keys", f"are over {_INVALIDATES_MAX}")
    return tuple([check_key(key, name=name) for key in keys])
