"""A graceful leave: ``mesh.instance.drainer`` and ``Instance.drain`` on the virtual clock.

Says that it leaves, has others load what is in use here (``mesh.core.drain`` says what and where)
and serves on meanwhile, refuses, lets what is in flight finish, takes its keys away.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from mesh.core.drain import Held, Stay, anybody_there, next_move, worth_moving
from mesh.core.types import CopyState

if TYPE_CHECKING:
    from bench.sim.instance import SimInstance

NOTICE_MS: Final = 500.0
# Kept back for what is in flight at the end.
RESERVE_MS: Final = 2_000.0


class Draining:
    """One instance's leave."""

    def __init__(self, instance: SimInstance, timeout_ms: float) -> None:
        self._instance = instance
        self._world = instance.world
        self._working = 0
        self._done = False
        held = (
            Held(instance.records[copy.model_id], copy.use.last_used_at_ms, copy.pinned)
            for copy in instance.cache.copies()
            if copy.state is CopyState.LOADED and copy.model_id in instance.records
        )
        world = self._world
        wanted = worth_moving(held, now_ms=world.engine.now_ms, policy=world.policy)
        self._queue = deque(wanted)
        self._until = world.engine.time + timeout_ms - RESERVE_MS
        instance.after(NOTICE_MS, self._noticed)
        instance.after(max(NOTICE_MS, timeout_ms - RESERVE_MS), self._moved)
        self._notice_over = False
        for _ in range(min(len(self._queue), world.policy.drain_moves)):
            self._working += 1
            self._next()

    def _noticed(self) -> None:
        self._notice_over = True
        if not self._working:
            self._moved()

    def _moved(self) -> None:
        """Everything is where it should be, or the time is over."""
        if not self._done:
            self._done = True
            self._instance.after(NOTICE_MS, self._instance.refuse)

    def _next(self) -> None:
        instance = self._instance
        view = self._world.neighbours.view
        if not anybody_there(view, instance.instance_id):
            self._queue.clear()
        if self._queue and not self._done:
            self._move(self._queue.popleft(), set())
            return
        self._working -= 1
        if not self._working and self._notice_over:
            self._moved()

    def _move(self, held: Held, tried: set[str]) -> None:
        instance, world = self._instance, self._world
        if not instance.alive:
            return
        if not instance.has(held.model_id) or len(tried) >= world.policy.hops_max:
            self._next()
            return
        step = next_move(
            world.neighbours.view,
            held,
            own_id=instance.instance_id,
            now_ms=world.engine.now_ms,
            policy=world.policy,
            exclude=tried,
        )
        if isinstance(step, Stay):
            self._next()
            return
        world.trace.note("move", held.model_id, step.instance_id, step.reason)

        def told(loaded: bool) -> None:
            if loaded:
                world.stats.moved += 1
                self._next()
            else:
                tried.add(step.instance_id)
                self._move(held, tried)

        world.neighbours.load_on(
            step.instance_id,
            held.record,
            size_bytes=step.size_bytes,
            last_used_at_ms=held.last_used_at_ms,
            use_score=instance.use_of(held.model_id)[1],
            pin=held.pinned,
            told=told,
        )
