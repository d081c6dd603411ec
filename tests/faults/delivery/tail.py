"""A server that is killed, and whose AOF loses its tail: as by a loss of power.

T1  ``lost`` are the commands that the server had carried out and has lost when it is back: it
    drops a command cut short, and a transaction as a whole.
T2  The loss is read from the bytes themselves, by the commands that they hold: which events
    were accepted (in the ingress stream, or as a job of a write_behind), which were dead letters,
    and the keys of all lost records.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from faults.delivery.workload import EVENT_ID, KEY, by_call
from support.valkey_server import ValkeyServer

_TRUNCATED = re.compile(rb"Truncating the AOF \S+ at offset (\d+)")


class LostTail(Struct, frozen=True, kw_only=True):
    bytes: int
    accepted: Sequence[str]
    dead: Sequence[str]
    keys: Sequence[str]


def lose_tail(server: ValkeyServer, cut_bytes: int, stream: str) -> LostTail:
    """Cut so many bytes off the AOF of a server that was killed, and start it."""
    path = max((server.directory / "appendonlydir").glob("*.incr.aof"), key=_generation)
    before = path.stat().st_size
    end = max(0, before - cut_bytes)
    with path.open("rb") as file:
        file.seek(max(0, end - 1_048_576))  # a transaction that is cut short begins before
        start, tail = file.tell(), file.read()
    os.truncate(path, end)
    log = server.directory / "log"
    said = log.stat().st_size
    server.start()
    with log.open("rb") as file:
        file.seek(said)
        truncated = _TRUNCATED.findall(file.read())
    end = int(truncated[-1]) if truncated else end
    assert start <= end
    return lost_in(tail[end - start :], stream)


def lost_in(tail: bytes, stream: str) -> LostTail:
    accepted, dead, keys = set(), set(), set()
    for words in commands_in(tail):
        keys.update(KEY.findall(b" ".join(words)))
        if len(words) < 4 or words[0].upper() != b"XADD":
            continue
        events = EVENT_ID.findall(b" ".join(words[3:]))
        if words[1].endswith(b":dead"):
            dead.update(events)
        elif words[1] == stream.encode():
            accepted.update(events)
        elif words[1].endswith(b":writes"):
            # A job of an event from the stream is made again from it; others are accepted so.
            accepted.update(event for event in events if by_call(event.decode()))
    return LostTail(
        bytes=len(tail),
        accepted=sorted(each.decode() for each in accepted),
        dead=sorted(each.decode() for each in dead),
        keys=sorted(each.decode() for each in keys),
    )


def commands_in(raw: bytes) -> Iterator[Sequence[bytes]]:
    """The commands of a piece of an AOF that begins with one; the last may be cut short."""
    at = 0
    while raw[at : at + 1] == b"*":
        count, at = _number(raw, at)
        words = []
        for _ in range(count):
            if raw[at : at + 1] != b"$":
                return
            length, at = _number(raw, at)
            words.append(raw[at : at + length])
            at += length + 2
        if at > len(raw):
            return
        yield words
    assert at == len(raw) or not raw[at:].strip(b"\0"), raw[at : at + 80]


def _number(raw: bytes, at: int) -> tuple[int, int]:
    end = raw.find(b"\r\n", at)
    return (int(raw[at + 1 : end]), end + 2) if end >= 0 else (0, len(raw) + 1)


def _generation(path: Path) -> int:
    return int(path.name.split(".")[-3])
