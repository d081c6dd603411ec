"""Write-behind: the owner of a shard brings its writes to the sinks, in order.

B1  Each sink has a lane of its own (see ``Lane``): one that is paused or stopped holds up
    nobody else's writes, but the streams keep what it has not stored.
B2  A write that no sink of this node takes is held (see ``Held``).
B3  A yielded shard is left alone first: no more work is handed out, and work under way ends,
    or is given up after half a lease.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import anyio
from anyio.abc import TaskStatus

from ...coordinator.clock import ServerClock
from ...coordinator.instruments import Instruments
from ...coordinator.log.ownership import Claim, Ownership
from ...coordinator.valkey.link import Commands
from ...coordinator.valkey.scripting import Scripts
from ...schemas.keys import EVENTS, Names
from ...schemas.settings import Workers
from .dead_letters import DeadLetters
from .delivery import Delivery
from .held import Held
from .owned_shards import OwnedShard
from .routes import Routes
from .sink_worker import Invalidate, Lane

__all__ = ["WriteBehind"]


class WriteBehind:
    def __init__(
        self,
        commands: Commands,
        names: Names,
        scripts: Scripts,
        ownership: Ownership,
        routes: Routes,
        deliveries: Mapping[str, Delivery],
        dead_letters: DeadLetters,
        *,
        node_id: str,
        options: Workers,
        held_max: int,
        server_clock: ServerClock,
        instruments: Instruments,
        invalidate: Invalidate,
    ) -> None:
        """``held_max`` is the bound of the writes held in one shard."""
        self._options = options
        self._holdings: dict[int, OwnedShard] = {}
        self._idle = anyio.Event()
        self.lanes = tuple(
            Lane(
                index,
                delivery,
                self._holdings,
                commands,
                names,
                scripts,
                ownership,
                routes,
                dead_letters,
                node_id=node_id,
                options=options,
                held_max=held_max,
                instruments=instruments,
                invalidate=invalidate,
                settled=self._settled,
            )
            for index, delivery in enumerate(deliveries.values() or [None])
        )
        self.held = Held(
            self._holdings,
            commands,
            names,
            scripts,
            ownership,
            routes,
            dead_letters,
            node_id=node_id,
            options=options,
            server_clock=server_clock,
            invalidate=invalidate,
        )

    def __repr__(self) -> str:
        return f"<WriteBehind {len(self._holdings)} shards, {len(self.lanes)} lanes>"

    @property
    def backlog(self) -> int:
        """Entries that the slowest lane read in its last round; 0: nothing is known to wait."""
        return max(lane.backlog for lane in self.lanes)

    def gained(self, tenure: Claim) -> None:
        if tenure.resource != EVENTS:
            self._holdings[tenure.resource] = OwnedShard(
                tenure, [lane.checkpoint for lane in self.lanes]
            )
            self._wake()

    def lost(self, tenure: Claim) -> None:
        self._holdings.pop(tenure.resource, None)
        for lane in self.lanes:
            lane.refused.pop(tenure.resource, None)

    async def yielding(self, tenures: Sequence[Claim]) -> None:
        """Hand out no more work of these shards, and wait for what is under way."""
        held = [each for t in tenures if (each := self._holdings.get(t.resource)) is not None]
        for holding in held:
            holding.yielding = True
        with anyio.move_on_after(self._options.handover_ms / 1000):
            while any(holding.busy for holding in held):
                await self._idle.wait()

    def bell(self, shard: int) -> None:
        holding = self._holdings.get(shard)
        if holding is not None:
            for place in holding.places:
                place.rung = True
            self._wake()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Flush until cancelled."""
        async with anyio.create_task_group() as tasks:
            for lane in self.lanes:
                tasks.start_soon(lane.run)
            tasks.start_soon(self.held.run)
            task_status.started()

    async def empty(self) -> None:
        """Wait until nothing is left in the shards that this node owns."""
        for lane in self.lanes:
            await lane.empty(self._round_over)

    async def _round_over(self) -> None:
        await self._idle.wait()

    def _settled(self) -> None:
        self._idle.set()
        self._idle = anyio.Event()

    def _wake(self) -> None:
        for lane in self.lanes:
            lane.wake()
