"""Moves the copies of a leaving instance to where ``mesh.core.drain`` says.

``Policy.drain_moves`` at once, in order of last use, until the time given is over. This instance
serves its copies meanwhile; routers go over to the new ones as they appear. What cannot be moved is
left: the routers load it where its next request wants it. Never raises but when cancelled.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from mesh.core.drain import Held, Stay, anybody_there, next_move, worth_moving
from mesh.core.types import CopyState, LoadPriority
from mesh.core.view import ClusterView
from mesh.decision_log import DecisionLog
from mesh.instance.clock import Clock
from mesh.instance.pod import Pod
from mesh.instance.publisher import Publisher
from mesh.store.api import StoreUnavailable

log = logging.getLogger(__name__)


class Drainer:
    """``moved`` counts the copies that others have loaded for us."""

    def __init__(
        self, pod: Pod, publisher: Publisher, clock: Clock, decisions: DecisionLog | None = None
    ) -> None:
        self._pod = pod
        self._publisher = publisher
        self._clock = clock
        self._decisions = decisions
        self.moved = 0

    async def run(self, timeout_s: float) -> None:
        """Until everything is where it should be, or the time is over."""
        pod = self._pod
        held = (
            Held(pod.records[copy.model_id], copy.use.last_used_at_ms, copy.pinned)
            for copy in pod.copies()
            if copy.state is CopyState.LOADED and copy.model_id in pod.records
        )
        queue = deque(worth_moving(held, now_ms=self._clock.now_ms(), policy=pod.policy))
        total = len(queue)
        if not total:
            return
        log.info("%d copies are to be moved within %.1f s", total, timeout_s)
        try:
            async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as group:
                for _ in range(min(total, pod.policy.drain_moves)):
                    group.create_task(self._work(queue))
        except TimeoutError:
            self._note("out_of_time", detail=f"{len(queue)} of {total} copies were not begun")
        log.info("%d of %d copies have been moved", self.moved, total)

    async def _work(self, queue: deque[Held]) -> None:
        while queue:
            if not anybody_there(self._pod.neighbours.view, self._pod.instance_id):
                self._note("nobody_there", detail=f"{len(queue)} copies stay until the end")
                queue.clear()
                return
            held = queue.popleft()
            try:
                await self._move(held)
            except Exception:
                log.exception("copy of %s is not moved", held.model_id)

    async def _move(self, held: Held) -> None:
        pod, model_id = self._pod, held.model_id
        tried: set[str] = set()
        for _ in range(pod.policy.hops_max):
            if model_id not in pod.servables:
                return  # evicted or deleted meanwhile
            step = next_move(
                await self._view(model_id),
                held,
                own_id=pod.instance_id,
                now_ms=self._clock.now_ms(),
                policy=pod.policy,
                exclude=tried,
            )
            if isinstance(step, Stay):
                self._note(step.reason, model_id=model_id, detail=step.detail)
                return
            self._note(
                step.reason,
                model_id=model_id,
                instance_id=step.instance_id,
                runner_up=step.runner_up or "",
                detail=step.detail,
            )
            if await pod.neighbours.load_on(
                step.instance_id,
                held.record,
                priority=LoadPriority.COPY,
                reason="drain",
                size_bytes=step.size_bytes,
                pin=held.pinned,
            ):
                self.moved += 1
                return
            tried.add(step.instance_id)
        self._note("not_taken", model_id=model_id, detail=f"tried {', '.join(sorted(tried))}")

    async def _view(self, model_id: str) -> ClusterView:
        neighbours = self._pod.neighbours
        if not self._publisher.away:
            try:
                return await neighbours.read_copies(model_id)
            except StoreUnavailable as error:
                log.info("moving %s by the last view: %s", model_id, error)
        return neighbours.view

    def _note(
        self,
        reason: str,
        *,
        model_id: str = "",
        instance_id: str = "",
        runner_up: str = "",
        detail: str = "",
    ) -> None:
        if self._decisions is not None:
            self._decisions.note(
                "move",
                reason,
                model_id=model_id,
                instance_id=instance_id,
                runner_up=runner_up,
                detail=detail,
            )
