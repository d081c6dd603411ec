"""What a reader would make of what the shared tier has for a key, as pure functions.

J1  The verdict on an entry is the one of ``cache.policy.decide``; here it has reasons.
J2  A tag's value is ``<version>`` or ``<version> <hard version>``: an entry that captured less than
    the hard version is invalid, one that captured less than the version is stale. A tag without
    a value gets a new one when it is asked for, so its entries are invalid.
J3  A write or drop of a key concerns whatever carries a tag named after it: a dependency.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import assert_never

from ...coordinator.valkey.link import Reply
from ...schemas.entry import FOREVER_MS, Entry, decompressed, read_entry
from ...schemas.errors import ForebayError, InvalidEntry
from ...schemas.notices import Bumped, Changed, Dropped, Extended, Notice, Position, read_notice
from ...schemas.replies import digits
from .document import (
    TAGS_SHOWN_MAX,
    EntryState,
    EntryVerdict,
    LeaseState,
    NoticeKind,
    NoticeLine,
    TagState,
)

__all__ = ["FAILING", "entry_state", "lease_state", "notice_line", "read_stored", "tag_state"]

FAILING = b"!"  #: stands for a token while the source is left alone
_CODECS = {"m": "msgpack", "z": "msgpack, zlib", "s": "msgpack, zstd", "j": "JSON"}
_ORDER = ("invalid", "lost", "stale", "holds")


def read_stored(raw: Reply, bytes_max: int) -> Entry | str | None:
    """The entry; or why what is there cannot be read; None if there is nothing."""
    if raw is None:
        return None
    if isinstance(raw, ForebayError):
        return str(raw)
    try:
        entry = read_entry(bytes(raw), bytes_max=bytes_max)
        if not entry.negative:
            decompressed(entry, bytes_max=bytes_max)
    except InvalidEntry as error:
        return str(error)
    return entry


def tag_state(tag: str, embedded: int, raw: Reply) -> TagState:
    """What the present value of a tag means for an entry that captured ``embedded``."""
    version, hard_version = _tag_versions(raw)
    if version is None or hard_version is None:
        state = "lost"
    elif embedded < hard_version:
        state = "invalid"
    else:
        state = "stale" if embedded < version else "holds"
    return TagState(
        tag=tag,
        embedded=embedded,
        version=version,
        hard_version=hard_version,
        state=state,  # type: ignore[arg-type]  # one of the literals
    )


def _tag_versions(raw: Reply) -> tuple[int | None, int | None]:
    parts = bytes(raw).split(b" ") if isinstance(raw, bytes) else []
    numbers = [digits(part) for part in parts]
    if not 1 <= len(numbers) <= 2:
        return None, None
    return (None, None) if None in numbers else (numbers[0], numbers[-1])


def entry_state(
    entry: Entry, *, size: int, now_ms: int, kept_ms: int, tags: Sequence[TagState]
) -> EntryState:
    """``tags`` are all that the entry carries; ``kept_ms`` is as PTTL says it."""
    shown = sorted(tags, key=lambda each: _ORDER.index(each.state))[:TAGS_SHOWN_MAX]
    return EntryState(
        state=_verdict(entry, now_ms, tags),
        negative=entry.negative,
        version=entry.version,
        age_ms=entry.age_ms(now_ms),
        fresh_ms=_left(entry.soft_at_ms, now_ms),
        left_ms=_left(entry.hard_at_ms, now_ms),
        error_ms=entry.meta.error_ms,
        kept_ms=kept_ms if kept_ms >= 0 else None,
        soft_dropped=entry.soft_at_ms == 0,
        size=size,
        codec=_CODECS[entry.codec],
        pending=entry.pending,
        doomed=entry.doomed,
        tags=tuple(shown),
        tags_omitted=len(tags) - len(shown),
    )


def _left(at_ms: int, now_ms: int) -> int | None:
    return None if at_ms >= FOREVER_MS else at_ms - now_ms


def _verdict(entry: Entry, now_ms: int, tags: Sequence[TagState]) -> EntryVerdict:
    states = {each.state for each in tags}
    if entry.pending:
        return "fresh"
    if entry.doomed:
        return "doomed"
    if states & {"invalid", "lost"}:
        return "outdated"
    if now_ms >= entry.hard_at_ms:
        return "expired"
    if entry.meta.error_ms and now_ms >= entry.hard_at_ms - entry.meta.error_ms:
        return "kept"
    return "stale" if now_ms >= entry.soft_at_ms or "stale" in states else "fresh"


def lease_state(token: Reply, left_ms: Reply) -> LeaseState:
    """``left_ms`` as PTTL says it."""
    if not isinstance(token, bytes):
        return LeaseState()
    left = max(0, int(left_ms)) if isinstance(left_ms, int) else 0
    if token == FAILING:
        return LeaseState(state="failing", left_ms=left)
    return LeaseState(state="held", left_ms=left, token=ascii(token[:64].decode("latin-1"))[1:-1])


def notice_line(
    shard: int,
    raw_id: bytes,
    fields: Mapping[bytes, bytes],
    *,
    key: str,
    tags: Sequence[str],
    now_ms: int,
) -> NoticeLine | None:
    """What an entry of a shard's log says of the key or of these tags; None: nothing."""
    notice = read_notice(fields.get(b"n", b""))
    if notice is None:
        return None
    kind, about, meant = _said(notice, key, tags)
    concerned = tuple(each for each in about if each in meant)
    version = digits(fields.get(b"v", b""))
    if not concerned or version is None:
        return None
    return NoticeLine(
        shard=shard,
        id=str(Position.parse(raw_id)),
        version=version,
        age_ms=max(0, now_ms - version // 1000),
        kind=kind,
        about=concerned[:TAGS_SHOWN_MAX],
        soft=bool(getattr(notice, "soft", False)),
        origin=getattr(notice, "origin", ""),
    )


def _said(
    notice: Notice, key: str, tags: Sequence[str]
) -> tuple[NoticeKind, tuple[str, ...], Collection[str]]:
    """What a notice is about, and what of that would be meant."""
    match notice:
        case Changed(key=changed, outdates=outdates):
            return "changed", (changed,), (key, *tags) if outdates else (key,)
        case Extended(key=extended):
            return "extended", (extended,), (key,)
        case Dropped(keys=dropped):
            return "dropped", dropped, (key, *tags)
        case Bumped(tags=bumped):
            return "bumped", bumped, tags
        case _:
            assert_never(notice)
