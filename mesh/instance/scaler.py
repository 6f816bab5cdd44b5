"""Watches the rates of this instance's copies and has their number changed where it decides.

``mesh.core.scaling`` decides; this loop measures, reads and carries out. Every
``Policy.scale_sweep_ms`` it takes the differences of each copy's counts since the last look; the
few models for which that could come to something (``worth_reading``) have their copies read from
the store, ``Policy.scale_reads_max`` of them at most, the busiest first. What it was told of a
model's copies is remembered, so that a model that another instance decides about, or about which
there is nothing to do, is not read at every look; every model is read now and then all the same,
so that copies that somebody else made (an outage of the store, a drain) are known of.

Loads and unloads are asked of the other instances (``mesh.instance.neighbours``) in the background,
one change a model at a time; copies are added one claim after another. While the store is away
nothing is decided. An instance that drains decides nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, Final, assert_never

from mesh.core.errors import MeshError
from mesh.core.placement import Placement
from mesh.core.policy import Policy
from mesh.core.scaling import (
    CopyUse,
    Keep,
    Memory,
    ScaleDown,
    ScaleUp,
    decider,
    memory_of,
    note_use,
    scale,
    worth_reading,
)
from mesh.core.types import CopyState, LoadPriority, ModelRecord
from mesh.core.view import ClusterView
from mesh.decision_log import DecisionLog
from mesh.instance.clock import Clock
from mesh.instance.neighbours import Neighbours
from mesh.instance.pod import Pod
from mesh.instance.servable import Servable

log = logging.getLogger(__name__)

# Copies looked at in one turn of the loop: about a millisecond.
_SLICE: Final = 100
# Sweeps for which a model is left alone when there was nothing to do about it ...
_LEFT_ALONE_SWEEPS: Final = 6
# ... and twice as many each time when who was asked did not load it.
_REFUSALS_MAX: Final = 5
# What passes by itself, soon: looked at again at the next sweep. A copy that has just been loaded
# is not in the store yet.
_PASSING: Final = frozenset({"cooldown", "load_under_way", "not_here"})
# Why the number of a busy model's copies is left alone without anything being short.
_WELL: Final = _PASSING | {"enough", "not_the_oldest"}
# Models that are read only because they were not for long, in one sweep.
_ROUTINE_READS: Final = 2
# The next of several copies is placed when the claim of the last one is seen, or after so long.
_CLAIM_LOOKS: Final = 20
_CLAIM_LOOK_S: Final = 0.05


class _Watched:
    """One copy here: its counts at the last look, and what is known of the others."""

    __slots__ = (
        "answered",
        "busy_ns",
        "changed_at_ms",
        "copies",
        "held_back_by",
        "holder",
        "in_flight",
        "looked_at_ms",
        "not_before_ms",
        "noted",
        "read_at_ms",
        "refusals",
        "servable",
        "uses",
    )

    def __init__(self, servable: Servable, now_ms: int) -> None:
        self.servable = servable
        self.looked_at_ms = now_ms
        self.uses = servable.use.uses
        self.busy_ns, self.answered = _served(servable)
        self.in_flight = servable.use.in_flight
        self.noted: tuple[int, ...] = ()
        self.copies = 1  # as last read
        self.holder = ""  # who decides, when it is another one
        self.read_at_ms = now_ms
        self.changed_at_ms = 0
        self.not_before_ms = 0
        self.refusals = 0
        self.held_back_by = ""  # why a copy that it should have was not added, as told last

    def rests(self, now_ms: int, policy: Policy) -> bool:
        """Nothing has happened since the last look, and nothing can come of that."""
        use = self.servable.use
        if use.uses != self.uses or use.in_flight or self.in_flight or self.copies > 1:
            return False
        if now_ms - self.read_at_ms >= policy.second_copy_max_age_ms:
            return False
        self.looked_at_ms = now_ms
        return True

    def look(self, now_ms: int, policy: Policy) -> CopyUse:
        """What happened since the last look."""
        servable, use = self.servable, self.servable.use
        wall_ms = max(1, now_ms - self.looked_at_ms)
        busy_ns, answered = _served(servable)
        spent_ms = (busy_ns - self.busy_ns) / 1e6
        done = answered - self.answered
        uses = use.uses - self.uses
        if uses:
            self.noted = note_use(self.noted, now_ms, policy)
        measured = CopyUse(
            requests_per_minute=uses * 60_000 / wall_ms,
            concurrency=spent_ms / wall_ms,
            latency_ms=spent_ms / done if done else 0.0,
            in_flight=min(self.in_flight, use.in_flight),
            max_concurrency=servable.max_concurrency,
            last_used_at_ms=use.last_used_at_ms,
            noted_uses=self.noted,
            changed_at_ms=self.changed_at_ms,
        )
        self.looked_at_ms, self.uses, self.in_flight = now_ms, use.uses, use.in_flight
        self.busy_ns, self.answered = busy_ns, answered
        return measured


def _served(servable: Servable) -> tuple[int, int]:
    """Nanoseconds that answered requests spent here, and their number."""
    statistics = servable.statistics
    return (
        statistics.success_ns + statistics.fail_ns,
        statistics.success_count + statistics.fail_count,
    )


class Scaler:
    """See the module's docstring. Run ``run()`` as a task; cancelling it ends what it has begun,
    but no load that an instance was asked for."""

    def __init__(
        self,
        pod: Pod,
        neighbours: Neighbours,
        policy: Policy,
        clock: Clock,
        decisions: DecisionLog | None = None,
    ) -> None:
        self._pod = pod
        self._neighbours = neighbours
        self._policy = policy
        self._clock = clock
        self._decisions = decisions
        self._watched: dict[str, _Watched] = {}
        self._changing: dict[str, asyncio.Task[None]] = {}  # model id -> its change under way

    def use_policy(self, policy: Policy) -> None:
        """Other thresholds from the next look on."""
        self._policy = policy

    async def run(self) -> None:
        """For ever."""
        try:
            while True:
                await asyncio.sleep(self._policy.scale_sweep_ms / 1_000)
                try:
                    await self.sweep()
                except MeshError as error:
                    log.info("the numbers of copies are not looked at: %s", error)
                except Exception:
                    log.exception("looking at the numbers of copies: a defect; going on")
        finally:
            changes = tuple(self._changing.values())
            for task in changes:
                task.cancel()
            await asyncio.gather(*changes, return_exceptions=True)

    async def sweep(self) -> None:
        """One look at every copy here. Raises StoreUnavailable."""
        if self._pod.cache.draining:
            return
        looks = await self._measure()
        reads = 0
        for model_id, use, why in looks:
            if why == "routine":
                reads += 1
                if reads > _ROUTINE_READS:
                    continue
            await self._decide(model_id, use, why)

    # ---- measuring ----

    async def _measure(self) -> list[tuple[str, CopyUse, str]]:
        """The models worth a read, the busiest first, at most ``Policy.scale_reads_max``."""
        policy, now_ms = self._policy, self._clock.now_ms()
        servables = self._pod.servables
        memory = memory_of(self._neighbours.view, now_ms, policy)
        for model_id in [m for m, w in self._watched.items() if servables.get(m) is not w.servable]:
            del self._watched[model_id]
        looks: list[tuple[str, CopyUse, str]] = []
        for count, (model_id, servable) in enumerate(list(servables.items()), 1):
            watched = self._watched.get(model_id)
            if watched is None:
                self._watched[model_id] = _Watched(servable, now_ms)
            elif not watched.rests(now_ms, policy):
                use = watched.look(now_ms, policy)
                if why := self._why(model_id, watched, use, memory, now_ms):
                    looks.append((model_id, use, why))
            if count % _SLICE == 0:
                await asyncio.sleep(0)
        looks.sort(key=lambda look: (look[2] == "routine", -_urgency(look[1], policy), look[0]))
        return looks[: policy.scale_reads_max]

    def _why(
        self, model_id: str, watched: _Watched, use: CopyUse, memory: Memory, now_ms: int
    ) -> str:
        policy = self._policy
        if model_id in self._changing or now_ms < watched.not_before_ms:
            return ""
        if now_ms - watched.read_at_ms >= policy.second_copy_max_age_ms:
            return "routine"
        holder = self._neighbours.view.instances.get(watched.holder)
        if holder is not None and holder.ready:
            return ""  # that one decides, and sees as much of the load as we do
        return worth_reading(use, watched.copies, memory, now_ms=now_ms, policy=policy)

    # ---- deciding ----

    async def _decide(self, model_id: str, use: CopyUse, why: str) -> None:
        record, watched = self._pod.records.get(model_id), self._watched.get(model_id)
        if record is None or watched is None:
            return
        me, policy = self._pod.instance_id, self._policy
        view = await self._neighbours.read_copies(model_id)
        now_ms = self._clock.now_ms()
        watched.read_at_ms = now_ms
        copies = _loaded(view, model_id)
        if copies < watched.copies and not watched.holder:  # those that came say when
            watched.changed_at_ms = now_ms
            use = replace(use, changed_at_ms=now_ms)
        watched.copies = max(1, copies)
        holder = decider(view, model_id)
        watched.holder = "" if holder == me else holder
        decision = scale(view, record, me, use, now_ms=now_ms, policy=policy)
        match decision:
            case Keep(reason):
                if reason not in _PASSING:
                    wait_ms = _LEFT_ALONE_SWEEPS * policy.scale_sweep_ms
                    watched.not_before_ms = now_ms + wait_ms
                self._tell_held_back(model_id, watched, decision, why)
            case ScaleUp(placement, reason, detail):
                watched.held_back_by = ""
                told = f"{detail}; {placement.detail}"
                self._note("scale_up", model_id, reason, placement, detail=told)
                self._change(model_id, self._scale_up(record, watched, decision))
            case ScaleDown(instance_id, reason, detail):
                self._note("scale_down", model_id, reason, instance_id=instance_id, detail=detail)
                self._change(model_id, self._scale_down(model_id, watched, decision))
            case _:
                assert_never(decision)

    def _tell_held_back(self, model_id: str, watched: _Watched, kept: Keep, why: str) -> None:
        """Once, until something else is decided: a copy is asked hard and gets no company."""
        held_back_by = kept.reason if why == "hot" and kept.reason not in _WELL else ""
        if held_back_by and held_back_by != watched.held_back_by:
            self._note("keep", model_id, held_back_by, detail=kept.detail)
        watched.held_back_by = held_back_by

    def _note(
        self,
        kind: str,
        model_id: str,
        reason: str,
        placement: Placement | None = None,
        *,
        instance_id: str = "",
        detail: str,
    ) -> None:
        if self._decisions is not None:
            self._decisions.note(
                kind,
                reason,
                model_id=model_id,
                instance_id=placement.instance_id if placement else instance_id,
                runner_up=(placement.runner_up if placement else None) or "",
                detail=detail,
            )

    # ---- carrying out ----

    def _change(self, model_id: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._changing[model_id] = task
        task.add_done_callback(lambda ended: self._changed(model_id, ended))

    def _changed(self, model_id: str, task: asyncio.Task[None]) -> None:
        self._changing.pop(model_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("changing the number of copies of %s: a defect", model_id, exc_info=error)

    async def _scale_up(self, record: ModelRecord, watched: _Watched, decision: ScaleUp) -> None:
        loads: list[asyncio.Task[bool]] = []
        try:
            for placement in decision.placements:
                if loads:
                    await self._until_claimed(record.model_id, loads[-1], decision, len(loads) - 1)
                loading = self._neighbours.load_on(
                    placement.instance_id,
                    record,
                    priority=LoadPriority.COPY,
                    reason=decision.reason,
                    size_bytes=placement.size_bytes,
                )
                loads.append(asyncio.get_running_loop().create_task(loading))
            results = await asyncio.gather(*loads, return_exceptions=True)
        except asyncio.CancelledError:
            for load in loads:
                load.cancel()
            raise
        self._scaled_up(watched, sum(result is True for result in results))

    def _scaled_up(self, watched: _Watched, came: int) -> None:
        """So many copies came of it; after none the next try waits longer each time."""
        now_ms = watched.changed_at_ms = self._clock.now_ms()
        watched.copies += came
        watched.refusals = 0 if came else min(watched.refusals + 1, _REFUSALS_MAX)
        if not came:
            wait_ms = self._policy.scale_up_cooldown_ms << (watched.refusals - 1)
            watched.not_before_ms = now_ms + wait_ms

    async def _until_claimed(
        self, model_id: str, load: asyncio.Task[bool], decision: ScaleUp, at: int
    ) -> None:
        """A claim decided before the last one was seen would lose against it."""
        instance_id = decision.placements[at].instance_id
        for _ in range(_CLAIM_LOOKS):
            await asyncio.wait({load}, timeout=_CLAIM_LOOK_S)
            try:
                view = await self._neighbours.read_copies(model_id)
            except MeshError:
                return
            if load.done() or view.copy(model_id, instance_id) is not None:
                return

    async def _scale_down(self, model_id: str, watched: _Watched, decision: ScaleDown) -> None:
        gone = await self._neighbours.unload_on(decision.instance_id, model_id, decision.reason)
        self._scaled_down(watched, gone)

    def _scaled_down(self, watched: _Watched, gone: bool) -> None:
        now_ms = watched.changed_at_ms = self._clock.now_ms()
        if gone:
            watched.copies = max(1, watched.copies - 1)
        else:
            watched.not_before_ms = now_ms + _LEFT_ALONE_SWEEPS * self._policy.scale_sweep_ms


def _loaded(view: ClusterView, model_id: str) -> int:
    return sum(
        copy.state is CopyState.LOADED and view.instances[copy.instance_id].ready
        for copy in view.copies_of(model_id)
    )


def _urgency(use: CopyUse, policy: Policy) -> float:
    """How far above its thresholds a copy is."""
    most = max(policy.scale_up_concurrency_share * use.max_concurrency, 1e-6)
    return max(use.requests_per_minute / policy.scale_up_requests_per_minute, use.occupied / most)
