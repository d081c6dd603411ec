"""Reads of entries, coalesced: those asked for in one tick of the loop share a round trip.

K1  One MGET brings up to 200 entries; an entry that several ask for travels once.
K2  A failure reaches each who asked, with an exception object of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from ...coordinator.valkey.link import Commands
from ...schemas.errors import ForebayError
from ...schemas.keys import Names
from .failures import own_copy

__all__ = ["Lookups", "Wanted"]

Wanted = asyncio.Future[bytes | None]

_TOGETHER = 200


class Lookups:
    def __init__(self, reader: Commands, names: Names) -> None:
        self._reader = reader
        self._entry = names.entry
        self._asked: dict[str, list[Wanted]] = {}
        self._reading: set[asyncio.Task[None]] = set()

    def get(self, key: str) -> Wanted:
        """The stored bytes of an entry; reads of the same tick share a round trip.

        Raises:
            Unavailable, ServerRefused: nothing was read.
        """
        loop = asyncio.get_running_loop()
        if not self._asked:
            loop.call_soon(self._flush)
        future: Wanted = loop.create_future()
        self._asked.setdefault(self._entry(key), []).append(future)
        return future

    def _flush(self) -> None:
        asked, self._asked = self._asked, {}
        names = list(asked)
        for start in range(0, len(names), _TOGETHER):
            part = names[start : start + _TOGETHER]
            task = asyncio.ensure_future(self._read(part, [asked[name] for name in part]))
            self._reading.add(task)
            task.add_done_callback(self._reading.discard)

    async def _read(self, names: list[str], wanted: list[list[Wanted]]) -> None:
        try:
            replies = await self._reader.call("MGET", *names)
        except ForebayError as error:
            for future in _unanswered(wanted):
                future.set_exception(own_copy(error, "entries", ""))
            return
        except BaseException:
            for future in _unanswered(wanted):
                future.cancel()
            raise
        for futures, reply in zip(wanted, replies, strict=True):
            for future in _unanswered((futures,)):
                future.set_result(reply)


def _unanswered(wanted: Iterable[Iterable[Wanted]]) -> list[Wanted]:
    return [future for futures in wanted for future in futures if not future.done()]
