"""What all processes of a run have to agree on; it travels as JSON in FAULTS.

Subjects are what has a version: "price:7" and "offer:7" are keys with these names, "group:7"
is a tag that the three keys "item:7:0" to "item:7:2" carry. Every fourth is watched: each of
its acks is followed by probes of all nodes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec

ENVIRON = "FAULTS"
ITEMS = 3  #: keys that carry one tag
AIMS = (0.1, 1.0, 2.0, 10.0)  #: when to probe after an ack, in bounds; the first fills near caches
_WATCHED_EVERY = 4
_KINDS = (
    "price",
    "offer",
    "price",
    "group",
)  # half by key, a quarter short-lived, a quarter by tag

Planted = Literal["", "gaps", "blind fill"]


class Subject(msgspec.Struct, frozen=True):
    kind: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind}:{self.number}"

    @classmethod
    def parse(cls, text: str) -> Subject:
        kind, _, number = text.partition(":")
        return cls(kind, int(number))


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    directory: str = ""  #: and the url: of the cluster that was started
    url: str = ""
    namespace: str = "faults"
    shards: int = 64
    seed: int = 1
    bound_ms: int = 500
    subjects: int = 2_000
    rate: float = 1_000.0  #: bumps a second, of all writers
    writers: int = 2
    nodes: tuple[str, ...] = ("one", "two", "three")
    load_s: float = 0.03  #: of a loader that takes long
    planted: Planted = ""  #: a fault that the checker has to find

    @classmethod
    def from_environ(cls) -> Setup:
        return msgspec.json.decode(os.environ[ENVIRON], type=cls)

    def environ(self) -> Mapping[str, str]:
        return {ENVIRON: msgspec.json.encode(self).decode()}

    @property
    def path(self) -> Path:
        return Path(self.directory)

    @property
    def source(self) -> Path:
        return self.path / "source.db"

    def socket(self, node: str) -> str:
        return str(self.path / f"{node}.sock")

    def all_subjects(self) -> Iterator[tuple[Subject, bool]]:
        """Each, and whether it is watched."""
        for number in range(self.subjects):
            yield (
                Subject(_KINDS[number % len(_KINDS)], number),
                (number // len(_KINDS)) % _WATCHED_EVERY == 0,
            )
