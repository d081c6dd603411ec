"""Did every accepted event arrive, once, in order? Decided afterwards, from the history alone.

D1 lost          An accepted event, unless a poison, reaches the sink, or a later event of its key
                 does; and at the end the row is not older than the newest of them.
D2 order         The effects of a key at the sink never go back, neither in the order in which the
                 events were published nor in the version that they were given.
D3 once          An event has one effect at most, however often it was published.
D4 dead letters  The dead letters are exactly the accepted poisons, and no poison is in the sink.
D5 stale         At the end an answer that is not flagged equals the row.
D6 conservation  Nothing waits at the end; each event in the sink or among the dead letters was
                 published in this form; each accepted event is sunk, overtaken, dead or lost with a
                 tail, and only one of these.
D7 liveness      After each fault every shard gets on within the bound.

A server that is killed and whose AOF loses its tail has lost events that it had acknowledged at
level ``accepted``. So an event whose acceptance was in a tail, and that was not accepted again
after it, need not arrive (D1, D4), and a key that lost a record may be read old as long as no
later event of it was accepted (D5). An event that was sent before may be applied again after it,
as its checkpoint may be gone: this is the only exception to D2 and D3. All cases are counted.

A pure function: no clock, no files, no server.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from .history import (
    Answered,
    Cut,
    Dead,
    Effect,
    Left,
    Line,
    Mark,
    Read,
    Recovered,
    Row,
    Sent,
)

RULES = ("D1", "D2", "D3", "D4", "D5", "D6", "D7")
_SHOWN = 20
_NEVER = -1


class Violation(msgspec.Struct, frozen=True, kw_only=True):
    rule: str
    subject: str  #: the event, or the key
    problem: str


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    published: int
    attempts: int
    accepted: int
    unknown: int  #: attempts with no answer, or with an ambiguous one
    refused: int  #: attempts
    sunk: int  #: accepted events with an effect
    overtaken: int  #: accepted events whose key has an effect of a later event
    dead: int  #: accepted events among the dead letters
    lost_with_tail: int  #: accepted events that a cut took, and that are nowhere else
    poison: int  #: accepted ones
    effects: int
    repeated_after_cut: int  #: effects that a cut excuses
    backwards_after_cut: int
    cuts: int
    reads: int
    flagged: int
    old_after_cut: int  #: reads that a cut excuses
    precision: float  #: of the dead letters
    recall: float
    recovery_s_p50: float
    recovery_s_max: float
    broken: dict[str, int]  #: violations, by rule
    violations: Sequence[Violation]

    @property
    def sound(self) -> bool:
        return not self.broken

    def shortened(self) -> Findings:
        """With the first violations of each rule only."""
        return msgspec.structs.replace(self, violations=list(_first_of_each(self.violations)))


class _Event:
    __slots__ = ("accepted_ns", "began_ns", "key", "name", "poison", "seq")

    def __init__(self, sent: Sent) -> None:
        self.name, self.key, self.seq = sent.event, sent.key, sent.seq
        self.poison = bool(sent.poison)
        self.began_ns = sent.t_ns
        self.accepted_ns = _NEVER  #: the last time


class _Run:
    """The history, indexed for the rules."""

    def __init__(self, lines: Iterable[Line]) -> None:
        by: dict[type, list] = defaultdict(list)
        for line in lines:
            by[type(line)].append(line)
        self.sent: list[Sent] = by[Sent]
        self.answers: list[Answered] = by[Answered]
        self.cuts: list[Cut] = sorted(by[Cut], key=lambda cut: cut.number)
        self.marks = {mark.number: mark.place for mark in by[Mark]}
        self.effects: list[Effect] = sorted(by[Effect], key=lambda effect: effect.place)
        self.rows: dict[str, Row] = {row.key: row for row in by[Row]}
        self.reads: list[Read] = by[Read]
        self.left: list[Left] = by[Left]
        self.recovered: list[Recovered] = by[Recovered]
        self.dead = {each.event: each.reason for each in by[Dead]}
        self.events: dict[str, _Event] = {}
        for sent in sorted(self.sent, key=lambda each: each.t_ns):
            self.events.setdefault(sent.event, _Event(sent))
        for answer in self.answers:
            event = self.events.get(answer.event)
            if event is not None and answer.outcome == "accepted":
                event.accepted_ns = max(event.accepted_ns, answer.t_ns)
        self.accepted = [each for each in self.events.values() if each.accepted_ns != _NEVER]
        self.of_key: dict[str, list[Effect]] = defaultdict(list)
        self.of_event: dict[str, list[Effect]] = defaultdict(list)
        for effect in self.effects:
            self.of_key[effect.key].append(effect)
            self.of_event[effect.event].append(effect)
        self._taken = self._last_cuts(cut.accepted for cut in self.cuts)
        self._unburied = {name for cut in self.cuts for name in cut.dead}
        self._touched = self._last_cuts(cut.keys for cut in self.cuts)

    def taken(self, event: _Event) -> bool:
        """Whether a cut took its acceptance, and nobody accepted it since."""
        return event.accepted_ns <= self._taken.get(event.name, _NEVER)

    def unburied(self, event: _Event) -> bool:
        return event.name in self._unburied

    def cut_of_key(self, key: str) -> int:
        """When something of the key was lost for the last time."""
        return self._touched.get(key, _NEVER)

    def applied_again(self, effect: Effect) -> bool:
        """Whether a cut lies between the first attempt to publish it and this effect."""
        event = self.events.get(effect.event)
        return event is not None and any(
            event.began_ns <= cut.t_ns and self.marks.get(cut.number, effect.place) < effect.place
            for cut in self.cuts
        )

    def _last_cuts(self, names: Iterable[Sequence[str]]) -> dict[str, int]:
        return {name: cut.t_ns for cut, each in zip(self.cuts, names, strict=True) for name in each}


def check(lines: Iterable[Line], *, recovery_bound_s: float = 30.0) -> Findings:
    """The findings about a run."""
    run = _Run(lines)
    tally: Counter[str] = Counter()
    found = [
        *_lost(run, tally),
        *_backwards(run, tally),
        *_repeated(run, tally),
        *_wrong_letters(run, tally),
        *_stale(run, tally),
        *_unbalanced(run, tally),
        *_stuck(run, recovery_bound_s),
    ]
    outcomes = Counter(answer.outcome for answer in run.answers)
    times = sorted(each.seconds for each in run.recovered)
    poison = sum(event.poison for event in run.accepted)
    return Findings(
        published=len(run.events),
        attempts=len(run.sent),
        accepted=len(run.accepted),
        unknown=len(run.sent) - outcomes["accepted"] - outcomes["refused"],
        refused=outcomes["refused"],
        sunk=tally["sunk"],
        overtaken=tally["overtaken"],
        dead=tally["dead"],
        lost_with_tail=tally["lost with tail"],
        poison=poison,
        effects=len(run.effects),
        repeated_after_cut=tally["repeated after cut"],
        backwards_after_cut=tally["backwards after cut"],
        cuts=len(run.cuts),
        reads=len(run.reads),
        flagged=sum(read.stale for read in run.reads),
        old_after_cut=tally["old after cut"],
        precision=round(tally["true letters"] / max(1, len(run.dead)), 6) if run.dead else 1.0,
        recall=round(1 - tally["missing letters"] / max(1, poison), 6),
        recovery_s_p50=times[len(times) // 2] if times else 0.0,
        recovery_s_max=max(times, default=0.0),
        broken=dict(sorted(Counter(each.rule for each in found).items())),
        violations=found,
    )


def _lost(run: _Run, tally: Counter[str]) -> Iterator[Violation]:
    newest: dict[str, _Event] = {}
    for event in run.accepted:
        if event.poison or event.name in run.dead or run.taken(event):
            continue
        known = newest.get(event.key)
        if known is None or known.seq < event.seq:
            newest[event.key] = event
        if not _arrived(run, event):
            problem = f"accepted as {event.seq} of {event.key}, and neither it nor a later one came"
            yield Violation(rule="D1", subject=event.name, problem=problem)
    for key, event in newest.items():
        row = run.rows.get(key)
        if _arrived(run, event) and (row is None or row.seq < event.seq):
            problem = f"the row ends as {row.seq if row else None}, {event.seq} was accepted"
            yield Violation(rule="D1", subject=event.name, problem=problem)


def _arrived(run: _Run, event: _Event) -> bool:
    return any(effect.seq >= event.seq for effect in run.of_key.get(event.key, ()))


def _backwards(run: _Run, tally: Counter[str]) -> Iterator[Violation]:
    for key, effects in run.of_key.items():
        newest, version = 0, 0
        for effect in effects:
            if effect.version <= version:
                problem = f"{effect.event} has version {effect.version}, after {version}"
                yield Violation(rule="D2", subject=key, problem=problem)
            if effect.seq < newest:
                if run.applied_again(effect):
                    tally["backwards after cut"] += 1
                else:
                    problem = f"{effect.event} was {effect.seq}, after {newest}"
                    yield Violation(rule="D2", subject=key, problem=problem)
            # An event applied again counts from here on: after it the order holds again.
            newest = effect.seq if run.applied_again(effect) else max(newest, effect.seq)
            version = max(version, effect.version)


def _repeated(run: _Run, tally: Counter[str]) -> Iterator[Violation]:
    for name, effects in run.of_event.items():
        for effect in effects[1:]:
            if run.applied_again(effect):
                tally["repeated after cut"] += 1
            else:
                problem = f"has {len(effects)} effects on {effect.key}"
                yield Violation(rule="D3", subject=name, problem=problem)
                break


def _wrong_letters(run: _Run, tally: Counter[str]) -> Iterator[Violation]:
    for name, reason in run.dead.items():
        event = run.events.get(name)
        if event is not None and event.poison:
            tally["true letters"] += 1
        else:
            problem = f"is a dead letter ({reason}), and no poison"
            yield Violation(rule="D4", subject=name, problem=problem)
    for event in run.accepted:
        if not event.poison:
            continue
        if event.name not in run.dead and not run.taken(event) and not run.unburied(event):
            tally["missing letters"] += 1
            yield Violation(rule="D4", subject=event.name, problem="is poison, and no dead letter")
        if run.of_event.get(event.name):
            yield Violation(rule="D4", subject=event.name, problem="is poison, and was sunk")


def _stale(run: _Run, tally: Counter[str]) -> Iterator[Violation]:
    latest: dict[str, int] = {}  #: when an event of the key was accepted for the last time
    for event in run.accepted:
        latest[event.key] = max(latest.get(event.key, _NEVER), event.accepted_ns)
    for read in run.reads:
        row = run.rows.get(read.key)
        stored = row.event if row is not None else ""
        if read.stale or read.event == stored:
            continue
        if latest.get(read.key, _NEVER) <= run.cut_of_key(read.key):
            tally["old after cut"] += 1
            continue
        problem = f"{read.node} answered {read.event or None}, the row is {stored or None}"
        yield Violation(rule="D5", subject=read.key, problem=problem)


def _unbalanced(run: _Run, tally: Counter[str]) -> Iterator[Violation]:
    for left in run.left:
        if left.events or left.writes or left.held:
            problem = f"{left.events} events, {left.writes} writes and {left.held} held wait"
            yield Violation(rule="D6", subject="", problem=problem)
    for effect in run.effects:
        event = run.events.get(effect.event)
        if event is None or (event.key, event.seq) != (effect.key, effect.seq):
            problem = f"{effect.key} was stored as {effect.seq}; nobody published it so"
            yield Violation(rule="D6", subject=effect.event, problem=problem)
    for name in run.dead:
        if name not in run.events:
            yield Violation(rule="D6", subject=name, problem="is a dead letter of nobody's")
    for event in run.accepted:
        sunk, dead = bool(run.of_event.get(event.name)), event.name in run.dead
        if sunk and dead:
            problem = "is sunk, and a dead letter too"
            yield Violation(rule="D6", subject=event.name, problem=problem)
        if sunk or dead:
            tally["sunk" if sunk else "dead"] += 1
        elif not event.poison and _arrived(run, event):
            tally["overtaken"] += 1
        elif run.taken(event) or (event.poison and run.unburied(event)):
            tally["lost with tail"] += 1
        # else it is lost, which D1 or D4 says


def _stuck(run: _Run, bound_s: float) -> Iterator[Violation]:
    for each in run.recovered:
        if each.missing or each.seconds > bound_s:
            problem = f"after {each.seconds:.1f} s {each.missing} shards had not got on"
            yield Violation(rule="D7", subject=each.kind, problem=problem)


def _first_of_each(found: Sequence[Violation]) -> Iterator[Violation]:
    shown: Counter[str] = Counter()
    for each in found:
        shown[each.rule] += 1
        if shown[each.rule] <= _SHOWN:
            yield each
