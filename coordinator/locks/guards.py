"""Keys that refuse writes with an older fencing token than an earlier write.

    await guards.set("report:7", page, token=lease)

V1  A write with a lower token than one seen for the key is refused, and changes nothing. The same
    token may write again.
V2  The highest token is stored beside the key without expiry, also when the value expires or is
    deleted.

The key is the full key in Valkey. It must be written through its guard only: a plain SET is not
noticed.
"""

from __future__ import annotations

from ...schemas.errors_locks import StaleToken
from ...schemas.keys import check_key
from ...schemas.replies import WHOLE_MAX, integer
from ..valkey.link import Arg, Commands, Reply
from ..valkey.scripting import Scripts, run
from .lease import Lease

__all__ = ["Guards", "fence_of", "token_of"]

Token = Lease | int


class Guards:
    def __init__(self, commands: Commands, scripts: Scripts) -> None:
        self._commands = commands
        self._set = scripts["guard_set"]
        self._delete = scripts["guard_delete"]

    async def set(self, key: str, value: str | bytes, *, token: Token, ttl: float = 0) -> None:
        """Set the key; ``ttl`` in seconds, 0: no expiry.

        Raises:
            StaleToken: refused. LeaseLost: the lease has ended. Unavailable: it may have been set.
        """
        number = token_of(token)
        args: list[Arg] = [number, value, max(1, int(ttl * 1000)) if ttl > 0 else 0]
        _obey(key, number, await run(self._commands, self._set, _keys(key), args))

    async def delete(self, key: str, *, token: Token) -> bool:
        """Delete the key; False if it did not exist. Raises like ``set``."""
        number = token_of(token)
        reply = await run(self._commands, self._delete, _keys(key), [number])
        return bool(_obey(key, number, reply))

    async def highest(self, key: str) -> int:
        """The highest token seen for the key; 0 if there is none."""
        fence = fence_of(check_key(key))
        return integer(await self._commands.call("GET", fence) or 0, fence, high=WHOLE_MAX)


def fence_of(key: str) -> str:
    """The key of the highest token, in the same slot as the key."""
    return f"{{{key}}}:fence"


def _keys(key: str) -> list[str]:
    return [check_key(key), fence_of(key)]


def token_of(token: Token) -> int:
    """The number; raises LeaseLost if the lease has ended."""
    if isinstance(token, Lease):
        token.check()
        return token.token
    return token


def _obey(key: str, token: int, reply: Reply) -> int:
    done, what = reply
    if not done:
        raise StaleToken(key, token, integer(what, fence_of(key), high=WHOLE_MAX))
    return integer(what, fence_of(key))
