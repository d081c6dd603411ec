"""limit_take.lua and limit_settle.lua on a real server, step by step against the exact model.

The clock is the test's. After each step the machine compares the reply with the model's and
the stored states with the model's states, so that what must write nothing is seen to.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import valkey
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from forebay.coordinator.limits import gcra
from forebay.coordinator.valkey.scripting import load_scripts
from forebay.schemas.limits import Limit, check_limit, terms_of
from support.valkey_server import ValkeyServer

SCRIPTS = load_scripts()
START_US = 1_800_000_000_000_000
Run = tuple[str, int, tuple[int, ...]]


class Model:
    """The limits of one subject as whole numbers; says what the scripts must."""

    def __init__(self, limits: Sequence[Limit]) -> None:
        self.limits = list(limits)
        self.tats: list[gcra.Tat | None] = [None] * len(limits)
        self.now_us = START_US

    @property
    def enforced(self) -> list[int]:
        return [at for at, limit in enumerate(self.limits) if not limit.shadow]

    def take(self, runs: Sequence[Run]) -> list[int]:
        terms = [terms_of(limit) for limit in self.limits]
        debts = [gcra.debt_of(t, self.now_us, x) for t, x in zip(self.tats, terms, strict=True)]
        before, over, replies = list(debts), [0] * len(debts), []
        for at, tat in enumerate(self.tats):
            if gcra.is_set_back(tat, self.now_us):
                before[at] = -1
        for mode, count, costs in runs:
            granted = count
            if mode in "tp":
                for at in self.enforced:
                    granted = min(granted, gcra.fits(debts[at], terms[at], costs[at]))
            for at, limit in enumerate(self.limits):
                units = costs[at] * terms[at].weight
                if mode == "t":
                    charged = granted
                    if limit.shadow:
                        charged = min(granted, gcra.fits(debts[at], terms[at], costs[at]))
                    over[at] += granted - charged
                    debts[at] += charged * units
                elif mode == "f":
                    debts[at] = min(debts[at] + count * units, gcra.DEBT_MAX)
                elif mode == "r":
                    debts[at] = max(debts[at] - count * units, 0)
            replies += [granted, *self._binding(debts, costs)]
        for at, debt in enumerate(debts):
            if debt != before[at]:
                self.tats[at] = gcra.put_debt(debt, self.now_us, terms[at])
        return replies + over

    def _binding(self, debts: Sequence[int], costs: Sequence[int]) -> list[int]:
        best: tuple[int, int] | None = None
        found: list[int] = []
        for at in self.enforced or range(len(self.limits)):
            terms = terms_of(self.limits[at])
            wait = gcra.wait_us(debts[at], terms, costs[at])
            left = gcra.fits(debts[at], terms)
            if best is None or (wait, -left if not wait else 0) > best:
                best = (wait, -left if not wait else 0)
                found = [at + 1, left, wait, -(-debts[at] // terms.drain)]
        return found

    def settle(self, estimate: Sequence[int], actual: Sequence[int]) -> None:
        for at, limit in enumerate(self.limits):
            terms = terms_of(limit)
            debt = gcra.debt_of(self.tats[at], self.now_us, terms)
            debt += (actual[at] - estimate[at]) * terms.weight
            debt = max(0, min(debt, gcra.DEBT_MAX))
            self.tats[at] = gcra.put_debt(debt, self.now_us, terms)


def written(tat: gcra.Tat | None) -> bytes | None:
    if tat is None:
        return None
    rest = f"+{tat.rest}/{tat.drain}" if tat.rest else ""
    return f"{tat.us}{rest}@{tat.written_us}".encode()


RATES = st.one_of(st.integers(1, 20), st.sampled_from([0.3, 7, 33.333, 1_000_003, 2.5e6]))


@st.composite
def limit(draw: st.DrawFn, name: str) -> Limit:
    return check_limit(
        Limit(
            name=name,
            rate=draw(RATES),
            per=draw(st.sampled_from([0.000_007, 0.7, 1, 3])),
            burst=draw(st.integers(1, 12)),
            shadow=draw(st.sampled_from([False, False, True])),
        )
    )


class Machine(RuleBasedStateMachine):
    client: valkey.Valkey
    broken = staticmethod(lambda reply: reply)  #: for the negative control
    reservations = Bundle("reservations")

    @initialize(data=st.data(), count=st.integers(1, 3))
    def begin(self, data: st.DataObject, count: int) -> None:
        self.model = Model([data.draw(limit(name)) for name in "abc"[:count]])
        self.tag = f"{{{uuid.uuid4().hex}}}:"
        self.keys = [self.tag + each.name for each in self.model.limits]

    def _args(self) -> list[int | str]:
        args: list[int | str] = [self.model.now_us, "test:limits", "subject"]
        for each in self.model.limits:
            args += [*terms_of(each), int(each.shadow)]
        return args

    def _take(self, *runs: Run) -> list[int]:
        args = self._args()
        for mode, count, costs in runs:
            args += [mode, count, *costs]
        source = SCRIPTS["limit_take"].source
        reply: Any = self.client.eval(source, len(self.keys), *self.keys, *args)
        assert self.broken(reply) == self.model.take(runs)
        return list(reply)

    def _costs(self, data: st.DataObject) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(1, each.burst)) for each in self.model.limits)

    @rule(data=st.data(), modes=st.lists(st.sampled_from("ttttpfr"), min_size=1, max_size=4))
    def ask(self, data: st.DataObject, modes: list[str]) -> None:
        counts = [data.draw(st.integers(1, 8 if mode in "tr" else 1)) for mode in modes]
        runs = zip(modes, counts, [self._costs(data) for _ in modes], strict=True)
        self._take(*runs)

    @rule(data=st.data())
    def partial(self, data: st.DataObject) -> None:
        self._take(("t", data.draw(st.integers(1, 12)), (1,) * len(self.keys)))

    @rule(data=st.data())
    def refund_then_peek(self, data: st.DataObject) -> None:
        """What was taken and given back at once leaves nothing, if no shadow was full."""
        before = self.model.tats.copy()
        costs = self._costs(data)
        taken = self._take(("t", 1, costs))
        if taken[0] and not any(taken[-len(self.keys) :]):
            owed = [
                gcra.debt_of(tat, self.model.now_us, terms_of(each))
                for tat, each in zip(before, self.model.limits, strict=True)
            ]
            self._take(("r", 1, costs))
            for tat, each, debt in zip(self.model.tats, self.model.limits, owed, strict=True):
                assert gcra.debt_of(tat, self.model.now_us, terms_of(each)) == debt

    @rule(target=reservations, data=st.data())
    def reserve(self, data: st.DataObject) -> tuple[str, tuple[int, ...]]:
        costs = self._costs(data)
        self._take(("f", 1, costs))
        key = self.tag + uuid.uuid4().hex
        self.client.set(key, " ".join(map(str, costs)), px=60_000)
        return key, costs

    def _settle(self, key: str, actual: Sequence[int]) -> int:
        args = [key, *self.keys, *self._args(), *actual]
        source = SCRIPTS["limit_settle"].source
        return int(self.client.eval(source, 1 + len(self.keys), *args))

    @rule(reservation=consumes(reservations), data=st.data())
    def settle(self, reservation: tuple[str, tuple[int, ...]], data: st.DataObject) -> None:
        key, estimate = reservation
        actual = [data.draw(st.integers(0, 15)) for _ in self.keys]
        assert self._settle(key, actual) == 1
        self.model.settle(estimate, actual)
        assert self._settle(key, actual) == 0

    @rule(us=st.one_of(st.integers(0, 5), st.integers(0, 4_000_000)))
    def wait(self, us: int) -> None:
        self.model.now_us += us

    @rule(us=st.one_of(st.integers(0, 5), st.integers(0, 60_000_000)))
    def set_the_clock_back(self, us: int) -> None:
        self.model.now_us -= us

    @rule(data=st.data())
    def change_a_limit(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.keys) - 1))
        self.model.limits[at] = data.draw(limit(self.model.limits[at].name))

    @invariant()
    def states_are_those_of_the_model(self) -> None:
        if hasattr(self, "model"):
            assert self.client.mget(self.keys) == [written(tat) for tat in self.model.tats]


@pytest.fixture
def client(valkey_server: ValkeyServer) -> Iterator[valkey.Valkey]:
    with valkey.Valkey(unix_socket_path=valkey_server.socket_path) as client:
        yield client


RUNS = settings(
    max_examples=80,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
def test_scripts_do_what_the_model_says(client: valkey.Valkey) -> None:
    """I1 to I4 of limit_take, I1 and I2 of limit_settle, G3 and G4, to the microsecond."""

    class OnServer(Machine):
        pass

    OnServer.client = client
    run_state_machine_as_test(OnServer, settings=RUNS)
    assert client.ping()


def test_the_machine_notices_a_token_too_many(client: valkey.Valkey) -> None:
    """Negative control: a reply that is off by one is found."""

    class Broken(Machine):
        broken = staticmethod(lambda reply: [reply[0] + (reply[0] > 2), *reply[1:]])

    Broken.client = client
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            Broken,
            settings=settings(RUNS, derandomize=True, database=None, phases=[Phase.generate]),
        )
