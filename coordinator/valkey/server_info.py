"""Parse INFO: whether a primary answers, and which history its data have.

I1  A server that says it is a replica is refused as READONLY, and its primary is named.
I2  The history is the replication id. It is another one after each restart and each promotion, also
    where the run id is the same: when a primary was demoted and promoted again.
I3  A primary also takes another id when its first replica comes, or its last was long gone; then
    it names none that it had before, and nothing was lost.
"""

from __future__ import annotations

from ...schemas.errors import ServerRefused

__all__ = ["ASK_HISTORY", "history_of", "read_info", "was_promoted"]

ASK_HISTORY = ("INFO", "replication")


def read_info(reply: bytes) -> dict[str, str]:
    pairs = (line.partition(":") for line in reply.decode(errors="replace").splitlines())
    return {name: value.strip() for name, colon, value in pairs if colon}


def history_of(reply: bytes) -> str:
    """The history, as a primary answers ``ASK_HISTORY``.

    Raises:
        ServerRefused: a replica answered.
    """
    info = read_info(reply)
    if info.get("role") == "slave":
        leader = f"{info.get('master_host')}:{info.get('master_port')}"
        raise ServerRefused("READONLY", f"it is a replica of {leader}", " ".join(ASK_HISTORY))
    return info.get("master_replid", "")


def was_promoted(reply: bytes) -> bool:
    """Whether the id came with a promotion, as a primary answers ``ASK_HISTORY``."""
    return bool(read_info(reply).get("master_replid2", "").strip("0"))
