"""The application of the node processes: caches over the source of truth, and an agent.

The loaders write down each call, begun and ended, before it has any effect: a process that is
killed has told of the load that it was in. FAULTS is the setup, FAULTS_NODE the node's name.
"""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any

import forebay
from faults.agent import Agent, Reading
from faults.history import History
from faults.planted import plant
from faults.setting import ITEMS, Setup, Subject
from faults.source import Source

NAME = os.environ["FAULTS_NODE"]
SETUP = Setup.from_environ()

plant(SETUP.planted)
node = forebay.Node(SETUP.namespace)
source = Source(SETUP.source)
history = History(SETUP.path, NAME)
_random = random.Random(f"{SETUP.seed} {NAME}")


async def load(subject: str, *, takes_s: float = 0.0) -> Reading:
    """Read the source, and take a while to return what was read: the time for faults."""
    began_ns = history.write("load", "invoke", subject=subject, at_once=True)
    version = -1
    try:
        version = source.version(subject)
        await agent.pass_gate(subject)
        await asyncio.sleep(takes_s)
    finally:
        phase = "fail" if version < 0 else "ok"
        history.write("load", phase, subject=subject, version=version, began_ns=began_ns)
    return Reading(subject, version)


def now_and_then() -> float:
    return SETUP.load_s * _random.random() if _random.random() < 0.25 else 0.0


@node.cached("price:{number}", ttl=600)
async def price(number: int) -> Reading:
    return await load(f"price:{number}", takes_s=now_and_then())


@node.cached("offer:{number}", ttl=1.5, stale_for=60)
async def offer(number: int) -> Reading:
    """Short-lived: it is refreshed all the time, by jobs."""
    return await load(f"offer:{number}", takes_s=now_and_then())


@node.cached("item:{group}:{number}", ttl=600, tags=["group:{group}"])
async def item(group: int, number: int) -> Reading:
    return await load(f"group:{group}", takes_s=now_and_then())


@node.cached("cold:{number}", ttl=600)
async def cold(number: int) -> Reading:
    return await load(f"cold:{number}", takes_s=SETUP.load_s)


@node.cached("flaky:{number}", ttl=1, stale_for=1, stale_if_error=600)
async def flaky(number: int) -> Reading:
    """Kept for an outage that lasts."""
    return await load(f"flaky:{number}", takes_s=SETUP.load_s)


async def read(subject: str, turn: int) -> Any:
    found = Subject.parse(subject)
    if found.kind == "group":
        return await item.get_with_info(found.number, turn % ITEMS)
    return await (price if found.kind == "price" else offer).get_with_info(found.number)


agent = Agent(NAME, SETUP, history, read=read, read_cold=cold, read_flaky=flaky.get_with_info)
node.on_start(agent.start)
node.on_stop(agent.stop)
