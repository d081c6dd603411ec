"""Limits on every kind of backend: the same verdicts, to the millisecond."""

from __future__ import annotations

import random
import uuid

from prometheus_client import CollectorRegistry

from forebay.coordinator.background import background_tasks
from forebay.coordinator.instruments import Instruments
from forebay.coordinator.limits import gcra
from forebay.coordinator.limits.limiter import Limiter
from forebay.coordinator.valkey.backend import Backend
from forebay.coordinator.valkey.scripting import load_scripts
from forebay.schemas.keys import Names
from forebay.schemas.limits import Limit, check_limit, terms_of
from forebay.schemas.settings import Valkey
from support.limiters import ServerTime

ODD = check_limit(Limit(name="odd", rate=7, per=3, burst=5, concurrency=2))


async def test_verdicts_are_those_of_the_model(backend_settings: Valkey, namespace: str) -> None:
    """Fractions of a microsecond, refunds and debts, on servers old, new and made up."""
    rng, time, terms = random.Random(3), ServerTime(), terms_of(ODD)
    tat: gcra.Tat | None = None
    async with (
        Backend(backend_settings, client_name="test") as backend,
        background_tasks() as tasks,
    ):
        limiter = Limiter(
            backend.link,
            Names(namespace, 4),
            load_scripts(),
            clock=time,
            tasks=tasks,
            instruments=Instruments(CollectorRegistry()),
            ids=lambda: uuid.uuid4().hex,
            budget_ms=20_000,
            test_clock_us=time,
        )
        limiter.define([ODD])
        api = limiter.of("odd")
        for _ in range(150):
            time.us += rng.randint(0, 700_000)
            cost, mode = rng.randint(1, 5), rng.choice("tttrf")
            debt = gcra.debt_of(tat, time.us, terms)
            fits = gcra.fits(debt, terms, cost) > 0
            verdict = await {"t": api.take, "r": api.refund, "f": api.force}[mode]("x", cost)
            assert verdict.allowed == (fits or mode != "t")
            units = {"t": cost * fits, "r": -cost, "f": cost}[mode] * terms.weight
            tat = gcra.put_debt(max(0, debt + units), time.us, terms)
            left = gcra.fits(gcra.debt_of(tat, time.us, terms), terms)
            assert verdict.remaining == left
        made = await limiter.reservations.reserve(limiter.of("odd"), "y", 2, ttl_s=10)
        await limiter.reservations.settle(limiter.of("odd"), "y", made.id, 5)
        assert (await api.peek("y")).remaining == 0
        async with limiter.slots.hold(ODD, "z") as slot:
            assert slot.in_use == 1
        await limiter.aclose()
