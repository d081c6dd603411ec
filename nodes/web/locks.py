"""/v1/locks: what other programs do with locks.

    POST   /v1/locks/{name}         200 a lease    423 others have it
    POST   /v1/locks/{name}/renew   200 renewed    409 this nonce does not hold the lock
    DELETE /v1/locks/{name}?nonce=  200 released   409 this nonce does not hold the lock
    GET    /v1/locks, /v1/locks/{name}

W1  A client that is gone waits no more.
W2  A lease whose answer could not be sent is given back, unless the client may ask again for it.

The nonce of a release may be in a JSON body instead. A name is one segment of the path, with what
is no letter in percent-encoding: a slash is %2F.
"""

from __future__ import annotations

from urllib.parse import unquote

import anyio
import msgspec
from aiohttp import web

from ...coordinator.locks.store import Grant
from ...schemas.errors import ForebayError, InvalidKey
from ...schemas.locks import LockView
from .aiohttp_internals import client_gone
from .coordination import (
    Acquire,
    Granted,
    Release,
    Released,
    Renew,
    ShownLock,
    ShownLocks,
    asked,
    decoder,
    serving,
)
from .error_responses import answer
from .lock_service import LockService, Wish
from .protocols import CONTEXT

__all__ = ["acquire", "list_all", "release", "renew", "segment", "show"]

_acquires, _renews, _releases = decoder(Acquire), decoder(Renew), decoder(Release)


async def acquire(request: web.Request) -> web.StreamResponse:
    name, desk = segment(request), serving(request).locks
    body = await asked(request, _acquires)
    wish = desk.wish(name, lease=body.lease, timeout=body.timeout, meta=body.meta, nonce=body.nonce)
    grant = await _while_there(request, desk, wish)
    waited_ms = int((request.app[CONTEXT].clock.monotonic() - grant.sent_at) * 1000)
    lease_ms = wish.terms.lease_us // 1000
    told = answer(
        Granted(
            name=name,
            nonce=wish.nonce,
            token=grant.token,
            lease_ms=lease_ms,
            left_ms=max(0, lease_ms - waited_ms),
        )
    )
    try:
        await told.prepare(request)
        await told.write_eof()
    except BaseException:
        await desk.give_up(wish)
        raise
    return told


async def _while_there(request: web.Request, desk: LockService, wish: Wish) -> Grant:
    """The lease; a ConnectionResetError if the client does not wait for it."""
    grant: Grant | None = None
    failed: Exception = ConnectionResetError("the client is gone")
    async with anyio.create_task_group() as tasks:

        async def leave() -> None:
            await client_gone(request)
            tasks.cancel_scope.cancel()

        tasks.start_soon(leave)
        try:
            grant = await desk.acquire(wish)
        except ForebayError as error:  # as it is, and in no group
            failed = error
        tasks.cancel_scope.cancel()
    if grant is None:
        raise failed
    return grant


async def renew(request: web.Request) -> web.StreamResponse:
    name = segment(request)
    body = await asked(request, _renews)
    token = await serving(request).locks.renew(name, body.nonce, body.lease)
    lease_ms = int(body.lease * 1000)
    return answer(
        Granted(name=name, nonce=body.nonce, token=token, lease_ms=lease_ms, left_ms=lease_ms)
    )


async def release(request: web.Request) -> web.StreamResponse:
    name, nonce = segment(request), request.query.get("nonce")
    if nonce is None:
        nonce = (await asked(request, _releases)).nonce
    await serving(request).locks.release(name, nonce)
    return answer(Released(name=name))


async def list_all(request: web.Request) -> web.StreamResponse:
    views = await serving(request).locks.list()
    return answer(ShownLocks(locks=[_shown(view) for view in views]))


async def show(request: web.Request) -> web.StreamResponse:
    return answer(_shown(await serving(request).locks.show(segment(request))))


def _shown(view: LockView) -> ShownLock:
    return msgspec.convert(view, ShownLock, from_attributes=True)


def segment(request: web.Request) -> str:
    """The name in the path, decoded once: its third segment."""
    # aiohttp's own match leaves bytes that are not UTF-8 as they are: two spellings of one name.
    raw = request.rel_url.raw_path.split("/")[3]
    try:
        return unquote(raw, errors="strict")
    except UnicodeDecodeError:
        raise InvalidKey("name", raw, "is not valid UTF-8") from None
