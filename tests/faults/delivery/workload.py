"""The events published in a run: days 2 to 7 of the flights, repeatedly under fresh keys.

A flight is a key of its own: ``delayed`` at its scheduled minute if it left late, then ``departed``
or ``cancelled``. The latest departure of each airport is a hot key. Now and then there is an event
that can never be sunk, under a key of its own: a poison.

W1  The same seed and size give the same events, in the same order.
W2  All events of a key have one publisher, and rise in ``seq`` from 1 on.
W3  The field ``poison`` marks a poison: the table refuses its row (``row``), the cache's type its
    value (``type``), or it is invalid JSON (``json``).
W4  The bytes of each event contain its id, once at least; no other bytes look like an id.
"""

from __future__ import annotations

import csv
import gzip
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal

import msgspec

DATA = Path(__file__).parents[1] / "data" / "flights-2013-01-02-to-07.csv.gz"
EVENT_ID = re.compile(rb"\b(?:node|python|service|gates|probe)-[0-9]{7}\b")
KEY = re.compile(rb"\b(?:flight|gate):[A-Za-z0-9-]+")
#: Of ten keys: the publisher in Node.js, that in Python, and a service that calls write_behind.
_SHARES = ("node",) * 4 + ("python",) * 4 + ("service",) * 2
_LATEST_EVERY = 5
_POISON_EVERY = 50
_TOO_LATE = 99_999  #: minutes; the table refuses it

Poison = Literal["", "row", "type", "json"]


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """An event that is to be published, with ``raw`` as it goes into the stream."""

    event: str
    key: str
    seq: int
    value: Mapping[str, Any]
    raw: str
    poison: Poison = ""


class _Publisher:
    """Numbers the events of one publisher."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.events: list[Published] = []
        self._seqs: Counter[str] = Counter()

    def add(self, key: str, value: Mapping[str, Any], poison: Poison = "") -> None:
        event = f"{self.name}-{len(self.events):07}"
        self._seqs[key] += 1
        seq = self._seqs[key]
        value = {"event": event, "seq": seq, **value}
        body = {"type": "write", "id": event, "source": f"/{self.name}", "key": key, "value": value}
        raw = msgspec.json.encode(body).decode()
        made = Published(event=event, key=key, seq=seq, value=value, raw=raw, poison=poison)
        if poison == "json":
            made = msgspec.structs.replace(made, raw=raw[:-2])
        self.events.append(made)


def workload(seed: int, events: int) -> dict[str, Sequence[Published]]:
    """As many events in all, by publisher."""
    rng = random.Random(f"workload {seed}")
    publishers = {name: _Publisher(name) for name in sorted(set(_SHARES))}
    days = list(_days())
    made = count(1)
    for again in count():
        for day, flight, airport, value in days:
            key = f"flight:{again}-{day}-{flight}"
            publisher = publishers[_SHARES[zlib.crc32(key.encode()) % len(_SHARES)]]
            publisher.add(key, value)
            if len(publisher.events) % _LATEST_EVERY == 0:
                publisher.add(f"flight:{again}-latest-{airport}-{publisher.name}", value)
            if next(made) % _POISON_EVERY == 0:
                _add_poison(rng, publisher, f"flight:{again}-bad-{next(made)}", value)
            if sum(len(each.events) for each in publishers.values()) >= events:
                return {name: each.events for name, each in publishers.items()}
    raise AssertionError("unreachable")


def by_call(event: str) -> bool:
    """Whether it is published by write_behind, and not as an entry of the ingress stream."""
    publisher, _, number = event.partition("-")
    return publisher == "service" or (publisher == "gates" and int(number) % 2 == 0)


def gates(events: int) -> Sequence[Published]:
    """The events of the application's new version, which has another cache and sink."""
    publisher = _Publisher("gates")
    for number in range(events):
        publisher.add(f"gate:{number // 2}", {"gate": f"B{number % 40}"})
    return publisher.events


def probes(number: int, keys: Sequence[str], first: int) -> Sequence[Published]:
    """One event for each of these keys; ``first`` is the number of the first of them."""
    found = []
    for at, key in enumerate(keys, first):
        event = f"probe-{at:07}"
        value = {
            "event": event,
            "seq": 1,
            "status": "departed",
            "dep_delay": number,
            "tailnum": None,
        }
        body = {"type": "write", "id": event, "source": "/probe", "key": key, "value": value}
        raw = msgspec.json.encode(body).decode()
        found.append(Published(event=event, key=key, seq=1, value=value, raw=raw))
    return found


def _add_poison(
    rng: random.Random, publisher: _Publisher, key: str, value: Mapping[str, Any]
) -> None:
    kind: Poison = "row"
    if publisher.name != "service":  # the service takes typed events only
        kind = rng.choice(("row", "row", "type", "json"))
    wrong: Mapping[Poison, Mapping[str, Any]] = {
        "row": {"dep_delay": _TOO_LATE},
        "type": {"dep_delay": "late"},
    }
    publisher.add(key, {**value, **wrong.get(kind, {})}, kind)


def _days() -> Iterator[tuple[int, str, str, Mapping[str, Any]]]:
    """Day, flight, airport and outcome, in the order of time."""
    with gzip.open(DATA, "rt", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = []
    for row in rows:
        flight = f"{row['carrier']}{row['flight']}-{row['origin']}-{row['dest']}"
        day, due_min = int(row["day"]), _minutes(int(row["sched_dep_time"]))
        tailnum = row["tailnum"] or None
        for at_min, status, delay in _course(due_min, row["dep_delay"]):
            value = {"status": status, "dep_delay": delay, "tailnum": tailnum}
            found.append(((day, at_min, flight, status), row["origin"], value))
    for (day, _, flight, _), airport, value in sorted(found, key=lambda each: each[0]):
        yield day, flight, airport, value


def _course(due_min: int, delay: str) -> Iterator[tuple[int, str, int | None]]:
    if delay in ("", "NA"):
        yield due_min, "cancelled", None
        return
    if int(delay) > 0:
        yield due_min, "delayed", None
    yield due_min + int(delay), "departed", int(delay)


def _minutes(hhmm: int) -> int:
    return hhmm // 100 * 60 + hhmm % 100
