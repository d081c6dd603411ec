"""Was every read new enough? Decided afterwards, from the history alone.

Of each subject the source of truth holds a version that only goes up. A *bump* writes a new
version there and then invalidates; it is acknowledged when the invalidation is. A *probe*
reads through the cache of one node.

C1  A probe that began ``bound_ms`` or more after the ack of a version must return that version
    or a later one, or be flagged as stale; else it is a violation. The same is counted for
    the given multiples of the bound: what is stale at ten times the bound is stuck.
C2  What it must return is found from the history, whatever the probe was aimed at: each probe
    is held against every ack of its subject.
C3  A bump without an ack obliges nobody; its version may be read or not.
C4  A probe that returns a version that nobody had begun to write, or another subject's value,
    is a violation, too: flags excuse age only.
C5  A probe that failed returned nothing, and counts as no probe.

A pure function: no clock, no files.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from msgspec import Struct

from .history import Record

CROSSED = "crossed"  #: the note of a probe that got another subject's value
_SHOWN = 20


class Violation(Struct, frozen=True, kw_only=True):
    """A probe that returned what it must not."""

    kind: str
    process: str
    subject: str
    returned: int
    needed: int
    age_ms: float  #: of what was missing, since its ack, when the probe began
    began_ns: int
    tier: str


class Findings(Struct, frozen=True, kw_only=True):
    bumps: int
    acknowledged: int
    attempts_unknown: int
    probes: int  #: that began at least the bound after the ack of some version
    probes_by_aim_ms: dict[int, int]
    probes_by_process: dict[str, int]
    probes_by_tier: dict[str, int]
    failed: int
    flagged: int
    flagged_share: float
    unflagged_stale: dict[int, int]  #: by multiple of the bound
    impossible: int
    crossed: int
    worst_age_ms: float  #: of what was missing in any answer that was not flagged
    worst_flagged_age_ms: float
    violations: Sequence[Violation]  #: the first of them

    @property
    def sound(self) -> bool:
        return not (any(self.unflagged_stale.values()) or self.impossible or self.crossed)


class _Acks:
    """Of one subject: what has to be known when, and since when something was missing."""

    def __init__(self, acks: Iterable[tuple[int, int]]) -> None:
        by_time = sorted(acks)
        self._times = [t_ns for t_ns, _ in by_time]
        self._newest: list[int] = []
        for _, version in by_time:
            self._newest.append(max(version, self._newest[-1] if self._newest else 0))
        by_version = sorted((version, t_ns) for t_ns, version in by_time)
        self._versions = [version for version, _ in by_version]
        self._earliest = [t_ns for _, t_ns in by_version]
        for index in reversed(range(len(self._earliest) - 1)):
            self._earliest[index] = min(self._earliest[index], self._earliest[index + 1])

    def needed(self, at_ns: int) -> int:
        """The newest version that was acknowledged then; 0 if none was."""
        index = bisect_right(self._times, at_ns)
        return self._newest[index - 1] if index else 0

    def missing_ms(self, version: int, at_ns: int) -> float:
        """How long before then the first later version had been acknowledged."""
        index = bisect_right(self._versions, version)
        if index == len(self._versions):
            return 0.0
        return max(0, at_ns - self._earliest[index]) / 1e6


def check(
    records: Sequence[Record], *, bound_ms: int, multiples: Sequence[int] = (1, 2, 10)
) -> Findings:
    """What is to be said of a run."""
    acks, begun = _bumps(records)
    nothing = _Acks(())
    tally: Counter[str] = Counter()
    by_aim: Counter[int] = Counter()
    by_process: Counter[str] = Counter()
    by_tier: Counter[str] = Counter()
    stale_at = dict.fromkeys(multiples, 0)
    worst = {False: 0.0, True: 0.0}
    violations: list[Violation] = []

    def violated(kind: str, probe: Record, needed: int, age_ms: float) -> None:
        if len(violations) < _SHOWN:
            violations.append(
                Violation(
                    kind=kind,
                    process=probe.process,
                    subject=probe.subject,
                    returned=probe.version,
                    needed=needed,
                    age_ms=age_ms,
                    began_ns=probe.began_ns,
                    tier=probe.tier,
                )
            )

    for probe in (record for record in records if record.op == "probe"):
        if probe.note == CROSSED:
            tally["crossed"] += 1
            violated("crossed", probe, 0, 0.0)
            continue
        if probe.phase != "ok":
            tally["failed"] += 1
            continue
        known = acks.get(probe.subject, nothing)
        age_ms = known.missing_ms(probe.version, probe.began_ns)
        if probe.version > _newest_begun(begun.get(probe.subject, ()), probe.t_ns):
            tally["impossible"] += 1
            violated("impossible", probe, 0, 0.0)
        if not known.needed(probe.began_ns - bound_ms * 1_000_000):
            continue
        tally["probes"] += 1
        tally["flagged"] += probe.stale
        by_aim[probe.aim_ms] += 1
        by_process[probe.process] += 1
        by_tier[probe.tier] += 1
        worst[probe.stale] = max(worst[probe.stale], age_ms)
        if probe.stale:
            continue
        for multiple in multiples:
            needed = known.needed(probe.began_ns - multiple * bound_ms * 1_000_000)
            if probe.version < needed:
                stale_at[multiple] += 1
                if multiple == min(multiples):
                    violated("stale", probe, needed, age_ms)

    phases = Counter(record.phase for record in records if record.op == "bump")
    return Findings(
        bumps=phases["invoke"],
        acknowledged=phases["ok"],
        attempts_unknown=phases["unknown"],
        probes=tally["probes"],
        probes_by_aim_ms=dict(sorted(by_aim.items())),
        probes_by_process=dict(sorted(by_process.items())),
        probes_by_tier=dict(sorted(by_tier.items())),
        failed=tally["failed"],
        flagged=tally["flagged"],
        flagged_share=tally["flagged"] / max(1, tally["probes"]),
        unflagged_stale=stale_at,
        impossible=tally["impossible"],
        crossed=tally["crossed"],
        worst_age_ms=round(worst[False], 3),
        worst_flagged_age_ms=round(worst[True], 3),
        violations=violations,
    )


def _bumps(
    records: Iterable[Record],
) -> tuple[dict[str, _Acks], dict[str, Sequence[tuple[int, int]]]]:
    """Acks, and what was begun: (time, highest version so far), by subject."""
    acks: dict[str, list[tuple[int, int]]] = defaultdict(list)
    begun: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for record in records:
        if record.op != "bump":
            continue
        if record.phase == "ok":
            acks[record.subject].append((record.t_ns, record.version))
        elif record.phase == "invoke":
            begun[record.subject].append((record.t_ns, record.version))
    for each in begun.values():
        each.sort()
        highest = 0
        for index, (t_ns, version) in enumerate(each):
            highest = max(highest, version)
            each[index] = t_ns, highest
    return {subject: _Acks(each) for subject, each in acks.items()}, dict(begun)


def _newest_begun(begun: Sequence[tuple[int, int]], at_ns: int) -> int:
    index = bisect_right(begun, at_ns, key=lambda each: each[0])
    return begun[index - 1][1] if index else 0
