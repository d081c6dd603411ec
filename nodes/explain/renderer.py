"""The document in words: why a read of the key hits or misses.

Pure. The first line is the verdict; then one line for each thing that is known, in two columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...schemas.keys import depended_on
from ...schemas.masking import escape_controls
from .document import EntryState, Explanation, NearState, NoticeLine, TagState

__all__ = ["span", "verdict", "words"]

_NODES_NAMED_MAX = 3
_UNITS = ((172_800_000, 86_400_000, "days"), (7_200_000, 3_600_000, "h"), (120_000, 60_000, "min"))
_NEAR = {
    "no_cache": "declares no cache for this key",
    "absent": "no near copy",
    "fresh": "serves its near copy",
    "past": "its near copy is past its lifetime",
    "behind": "its near copy is behind",
    "unknown_tag": "its near copy has a tag of unknown version",
    "not_current": "its near copy is not served, since the log is not known to be current",
    "reset": "its near copy is from before its shard was reset",
}
_TAG = {
    "holds": "holds",
    "stale": "makes the entry stale",
    "invalid": "outdates the entry",
    "lost": "is lost, and outdates the entry",
}
_SHARED = {
    "fresh": "would be served fresh from the shared tier",
    "stale": "would be served stale from the shared tier, and refreshed",
    "absent": "would be loaded: the shared tier has no entry",
    "kept": "would be loaded: the entry in the shared tier is only kept in case that fails",
    "unreadable": "would be loaded: the entry in the shared tier cannot be read",
    "expired": "would be loaded: the entry in the shared tier is past its lifetime",
    "outdated": "would be loaded: a tag outdates the entry in the shared tier",
    "doomed": "would be loaded: the entry was invalidated while its write was pending",
}


def words(document: Explanation) -> list[str]:
    """The lines, without line ends."""
    rows = [*_rows(document)]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}" for name, text in _told_once(rows)]
    return [escape_controls(line) for line in (document.verdict or verdict(document), "", *lines)]


def verdict(document: Explanation) -> str:
    """One sentence: what a reader would get, and on which nodes that is different."""
    near = [each for each in document.nodes.answers if each.state == "fresh"]
    others = [each for each in document.nodes.answers if each.state not in ("fresh", "no_cache")]
    shared = f"{document.key} {_shared_part(document)}"
    if near and not others and not document.nodes.silent:
        return f"{document.key} would be served fresh from the near cache of {_names(near)}"
    if near:
        return f"{shared}; {_names(near)} would serve from the near cache"
    if others:
        has_none = all(each.state == "absent" for each in others)
        return f"{shared}; {_names(others)} {_has(others, none=has_none)}"
    return f"{shared}; {_nobody(document)}"


def _shared_part(document: Explanation) -> str:
    entry, lease = document.entry, document.lease
    if entry.negative and entry.state == "fresh":
        return "would be served as a known absence from the shared tier"
    text = _SHARED[entry.state]
    outdating = next((each for each in entry.tags if each.state != "holds"), None)
    if entry.state == "outdated" and outdating is not None:
        text = f"would be loaded: {_name(outdating.tag)} outdates the entry in the shared tier"
    if "would be loaded" not in text:
        return text
    if lease.state == "held":
        return f"{text}; a load is under way"
    return f"{text}; the source failed lately" if lease.state == "failing" else text


def _has(nodes: Sequence[NearState], *, none: bool) -> str:
    has = "has" if len(nodes) == 1 else "have"
    return f"{has} no near copy" if none else f"{has} no near copy that may be served"


def _nobody(document: Explanation) -> str:
    nodes = document.nodes
    if nodes.unasked:
        return "the nodes could not be asked"
    if nodes.answers:
        return "no node that runs declares a cache for it"
    return "no node answered" if nodes.silent else "no node runs"


def _names(nodes: Sequence[NearState]) -> str:
    named = [each.node for each in nodes[:_NODES_NAMED_MAX]]
    more = len(nodes) - len(named)
    text = ", ".join(named) + (f" and {more} more" if more else "")
    return f"node {text}" if len(nodes) == 1 else f"nodes {text}"


def _told_once(rows: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    before = ""
    for name, text in rows:
        yield "" if name == before else name, text
        before = name


def _rows(document: Explanation) -> Iterator[tuple[str, str]]:
    for text in _entry(document.entry):
        yield "entry", text
    for tag in document.entry.tags:
        yield "tags", _tag(tag)
    if document.entry.tags_omitted:
        yield "tags", f"and {document.entry.tags_omitted} more"
    yield "lease", _lease(document)
    for line in document.log.notices:
        yield "log", _notice(line)
    yield "log", _looked(document)
    for refused in document.log.refused:
        yield "log", f"cannot be read: {refused}"
    for text in _routes(document):
        yield "cache", text
    yield from _nodes(document)
    yield "place", _place(document)


def _entry(entry: EntryState) -> Iterator[str]:
    if entry.state == "absent":
        yield "none in the shared tier"
        return
    if entry.state == "unreadable":
        yield f"cannot be read: {entry.why}; {entry.size} bytes"
        return
    kind = "a known absence" if entry.negative else f"{entry.size} bytes, {entry.codec}"
    yield f"{entry.state}, {_age(entry.age_ms)}, version {entry.version}; {kind}"
    yield _lifetimes(entry)
    if entry.pending:
        fate = ", then dropped" if entry.doomed else ""
        yield f"newer than the source: its write (version {entry.pending}) waits for the sink{fate}"


def _lifetimes(entry: EntryState) -> str:
    if entry.soft_dropped:
        fresh = "made stale by an invalidation"
    else:
        fresh = _until(entry.fresh_ms, "fresh for {}", "stale since {} ago", "fresh for ever")
    gone = _until(entry.left_ms, "served for {} at most", "gone since {} ago", "served for ever")
    if entry.error_ms:
        gone += f" (the last {span(entry.error_ms)} only if the loader fails)"
    kept = "for ever" if entry.kept_ms is None else f"for {span(entry.kept_ms)}"
    return f"{fresh}, {gone}, kept by the server {kept}"


def _until(left_ms: int | None, ahead: str, past: str, never: str) -> str:
    if left_ms is None:
        return never
    return ahead.format(span(left_ms)) if left_ms > 0 else past.format(span(-left_ms))


def _name(tag: str) -> str:
    key = depended_on(tag)
    return f"tag {tag}" if key is None else f"key {key}"


def _tag(tag: TagState) -> str:
    key = depended_on(tag.tag)
    name = tag.tag if key is None else f"key {key}"
    now = f"{tag.version} now" if tag.version is not None else "none now"
    hard = f", {tag.hard_version} at least" if tag.hard_version != tag.version else ""
    return f"{name} {_TAG[tag.state]}: captured at {tag.embedded}, {now}{hard}"


def _lease(document: Explanation) -> str:
    lease = document.lease
    if lease.state == "free":
        return "free: nobody loads"
    if lease.state == "failing":
        return f"the source failed lately; it is left alone for {span(lease.left_ms)} more"
    loading = [each for each in document.nodes.answers if each.loading or each.reserved]
    whose = f", probably by {_names(loading)}" if len(loading) == 1 else ""
    if len(loading) > 1:
        whose = f", by one of {_names(loading)}"
    return f"held for {span(lease.left_ms)} more{whose}; token {lease.token}"


def _notice(line: NoticeLine) -> str:
    shown = " ".join(line.about[:3]) + (" ..." if len(line.about) > 3 else "")
    kind = f"{line.kind} softly" if line.soft else line.kind
    origin = f" by {line.origin}" if line.origin else ""
    return f"{span(line.age_ms)} ago {kind} {shown}{origin} (shard {line.shard}, {line.id})"


def _looked(document: Explanation) -> str:
    log = document.log
    if not log.notices:
        return (
            f"nothing about it among {'the newest' if log.more else 'all'} {log.looked_at} entries"
        )
    return f"found among {'the newest' if log.more else 'all'} {log.looked_at} entries"


def _routes(document: Explanation) -> Iterator[str]:
    told = [_route(each) for each in document.nodes.answers if each.cache or each.sink]
    yield from dict.fromkeys(told) or ["not known: no node has told"]


def _route(node: NearState) -> str:
    sink = f"; sink {node.sink}" if node.sink else "; no sink"
    if not node.cache:
        return f"none{sink}"
    stale = f", stale for {span(node.stale_ms)}" if node.stale_ms else ""
    return f"{node.cache} {node.template}, ttl {span(node.ttl_ms)}{stale}{sink}"


def _nodes(document: Explanation) -> Iterator[tuple[str, str]]:
    for node in document.nodes.answers:
        for text in _node(node, document.cache_version):
            yield f"node {node.node}", text
    if document.nodes.unasked:
        yield "nodes", f"could not be asked: {document.nodes.unasked}"
    elif document.nodes.silent:
        yield "nodes", f"{document.nodes.silent} did not answer in time"
    elif not document.nodes.answers:
        yield "nodes", "none runs"


def _node(node: NearState, cache_version: str) -> Iterator[str]:
    yield _near(node)
    if node.reserved or node.loading:
        under_way = "a read or a load" if node.loading else "a read, a write or a refresh"
        yield f"{under_way} is under way, {node.reserved} reserved"
    if not node.connected or node.breaker != "closed":
        state = "the breaker is " + node.breaker if node.connected else "it is not connected"
        yield f"{state}: its policy is {node.on_disconnected or 'not needed'}"
    if node.loader != "closed":
        yield f"its loader fails: the breaker is {node.loader}"
    if node.cache_version != cache_version:
        yield f"reads entries of cache version {node.cache_version}, not {cache_version}"


def _near(node: NearState) -> str:
    text = _NEAR[node.state]
    if node.tag:
        text += f" ({_name(node.tag)})"
    if node.state in ("no_cache", "absent"):
        return text
    fresh = _until(node.left_ms, "fresh for {}", "past since {}", "")
    return f"{text}: version {node.version}, {_age(node.age_ms)}, {fresh}, {node.size} bytes"


def _age(age_ms: int | None) -> str:
    return "of unknown age" if age_ms is None else f"{span(age_ms)} old"


def _place(document: Explanation) -> str:
    where = f"shard {document.shard} of {document.shards} in {document.namespace}"
    return f"{where}, cache version {document.cache_version}; {document.server}"


def span(ms: int) -> str:
    """A duration in the unit in which people would say it."""
    for above, unit_ms, name in _UNITS:
        if ms >= above:
            return f"{ms // unit_ms} {name}"
    return f"{ms} ms" if ms < 1_000 else f"{ms / 1000:.1f} s"
