"""What was fixed when a namespace was born: its number of shards."""

from __future__ import annotations

from collections.abc import Mapping

from ..coordinator.link import Commands
from ..coordinator.scripting import Scripts, run
from ..schemas.errors import ConfigError
from ..schemas.keys import Names
from ..schemas.replies import SHARDS_MAX, integer

__all__ = ["check_birth"]


async def check_birth(
    link: Commands, names: Names, scripts: Scripts, origins: Mapping[str, str]
) -> None:
    """The first node decides for all.

    Raises:
        ConfigError: this node was given another number. UnreadableRecord: it cannot be read.
    """
    reply = await run(link, scripts["meta_set"], [names.meta], ["shards", names.shards])
    born_with = integer(reply, f"the field shards of {names.meta}", low=1, high=SHARDS_MAX)
    if born_with != names.shards:
        raise ConfigError(
            setting="node.shards",
            value=str(names.shards),
            origin=origins.get("node.shards", "default"),
            problem=f"the namespace {names.namespace} was born with {born_with}",
            fix=f"set node.shards = {born_with}, or use another namespace",
        )
