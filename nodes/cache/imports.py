"""Bringing over what another service has stored, ahead of the readers; see ``legacy``.

M1  It does for each key what the first reader would do, without the loader: under the fill lease,
    and only for a key without an entry and without a mark. So it overwrites nothing that is newer,
    may run beside nodes at work, and repeated or ended in the middle it does no harm.
M2  Names are found with SCAN, ``PAGE`` at a time. A name is used only if the cache gives it back
    from the key that was made of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio

from ...coordinator.valkey.link import Commands
from ...schemas.errors import InvalidKey
from ...schemas.keys import KeyTemplate
from ...schemas.replies import array, integer
from .cached import Cached

__all__ = ["PAGE", "OldNames", "import_old"]

PAGE = 500
_CONCURRENCY = 20
_STAR = "*"
_GLOB = re.compile(r"[?\[\]\\]")


class OldNames:
    """The names of a pattern such as ``v1:product:*``, whose stars are the fields in their order.

    Raises:
        InvalidKey: there are not as many stars as fields, or it holds another wildcard.
    """

    def __init__(self, pattern: str, template: KeyTemplate) -> None:
        literals, fields = pattern.split(_STAR), template.fields
        if len(literals) != len(fields) + 1 or _GLOB.search(pattern):
            problem = f"needs one * for each field of {template.text}, and no other wildcard"
            raise InvalidKey("--match", pattern, problem)
        self.pattern = pattern
        self._template = template
        between = "".join(dict.fromkeys("".join(literals[1:-1])))
        field = f"([^{re.escape(between)}]+)" if between else "(.+)"
        parts = [re.escape(literals[0])]
        for literal in literals[1:]:
            parts += [field, re.escape(literal)]
        self._names = re.compile("".join(parts), re.DOTALL)
        named = [literals[0]]
        for name, literal in zip(fields, literals[1:], strict=True):
            named += [f"{{{name}}}", literal]
        self.legacy_key = "".join(named)  #: as a cache declares it

    def key_of(self, name: bytes) -> str:
        """The key that has this name; raises InvalidKey."""
        try:
            found = self._names.fullmatch(name.decode())
        except UnicodeDecodeError:
            found = None
        if found is None:
            raise InvalidKey("the name", ascii(name), f"does not fit {self.pattern}")
        return self._template.of_texts(found.groups())


async def import_old(
    commands: Commands,
    cached: Cached[Any, Any],
    names: OldNames,
    *,
    dry_run: bool = False,
    progress: Callable[[Counter[str]], object] = lambda counts: None,
) -> Counter[str]:
    """How many names came to what: ``present``, ``held``, ``no_key``, or a result of ``legacy``."""
    counts: Counter[str] = Counter()
    limiter, cursor = anyio.CapacityLimiter(_CONCURRENCY), b"0"
    while True:
        reply = await commands.call("SCAN", cursor, "MATCH", names.pattern, "COUNT", PAGE)
        following, page = array(reply, "SCAN", length=2)
        async with anyio.create_task_group() as tasks:
            for name in dict.fromkeys(map(bytes, array(page, "SCAN"))):
                one = partial(_import, cached, names, name, dry_run, limiter, counts)
                tasks.start_soon(one)
        progress(counts)
        cursor = b"%d" % integer(following, "the cursor of SCAN", high=2**64)
        if cursor == b"0":
            return counts


async def _import(
    cached: Cached[Any, Any],
    names: OldNames,
    name: bytes,
    dry_run: bool,
    limiter: anyio.CapacityLimiter,
    counts: Counter[str],
) -> None:
    try:
        key = names.key_of(name)
        is_same = cached.keying.legacy_name(key).encode() == name
        cached.keying.arguments(key)
    except InvalidKey:
        is_same = False
    async with limiter:
        outcome = await cached.import_key(key, dry_run=dry_run) if is_same else "no_key"
    counts[outcome] += 1
