"""Whether a namespace is one: each is born when its first node starts.

A command that only talks to a namespace must not be misled by a slip of the pen, or by
``--namespace`` left out: it would wait in a place where nobody ever looks.
"""

from __future__ import annotations

from ...coordinator.valkey.link import Commands
from ...schemas.errors import ConfigError
from ...schemas.keys import Names
from ...schemas.settings_sources import Resolved

__all__ = ["must_be_born"]


async def must_be_born(commands: Commands, names: Names, resolved: Resolved) -> None:
    """Refuse a namespace that no node has ever run in.

    Raises:
        ConfigError: there is none of that name on this server.
    """
    if await commands.call("EXISTS", names.meta):
        return
    raise ConfigError(
        setting="node.namespace",
        value=names.namespace,
        origin=resolved.origins["node.namespace"],
        problem="no node has ever run in it on this server",
        fix="give --namespace as the application does, or start a node first",
    )
