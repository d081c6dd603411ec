"""The users of ``deploy/valkey/users.acl``, on a server for tests.

with ValkeyServer(acl=shipped_users()) as server:
    restore(server, "-xadd")
"""

from __future__ import annotations

from pathlib import Path

import forebay
from forebay.schemas.settings import Secret, Valkey
from support.valkey_server import Flavour, ValkeyServer

SHIPPED = Path(forebay.__file__).parent / "deploy/valkey/users.acl"


def shipped_users(flavour: Flavour = "valkey") -> list[str]:
    """The file, with the users switched on; Redis 7.0 does not know CLIENT SETINFO."""
    unknown = " +client|setinfo" if flavour == "redis7" else ""
    lines = SHIPPED.read_text().replace(unknown, "").splitlines()
    return [
        "user default on nopass ~* &* +@all",
        *(line.replace(" off ", " on >pw ", 1) for line in lines),
    ]


def restore(server: ValkeyServer, *rules: str) -> None:
    """Give the node's user its rights as shipped, but for these rules."""
    (line,) = [each for each in shipped_users(server.flavour) if "shop-node" in each]
    server.execute("ACL", "SETUSER", "shop-node", "reset", *line.split()[2:], *rules)


def as_node(server: ValkeyServer) -> Valkey:
    """Settings of a node that is this user."""
    return Valkey(
        url=server.socket_url,
        username="shop-node",
        password=Secret("pw"),
        command_timeout_ms=5_000,
    )
