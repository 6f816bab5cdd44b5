"""The number of copies: the production ``mesh.instance.scaler.Scaler`` on the virtual clock.

What it measures and decides is its own; only what waits for others (loads and unloads elsewhere) is
done here, by callbacks instead of tasks. Its sweep is a coroutine that never waits here: copies are
"read" from the view that stands for the store.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from mesh.core.cache import Cache
from mesh.core.cache_table import Copy
from mesh.core.scaling import ScaleDown, ScaleUp
from mesh.core.types import ModelRecord
from mesh.core.usage import Use
from mesh.core.view import ClusterView
from mesh.instance.scaler import _LEFT_ALONE_SWEEPS, _REFUSALS_MAX, Scaler, _Watched

if TYPE_CHECKING:
    from bench.sim.instance import SimInstance

_CLAIM_LOOK_MS = 50.0


class Statistics:
    """Every answered request took equally long."""

    __slots__ = ("_service_ns", "_use")

    fail_ns = fail_count = 0

    def __init__(self, use: Use, service_ms: float) -> None:
        self._use = use
        self._service_ns = int(service_ms * 1e6)

    @property
    def success_count(self) -> int:
        return self._use.uses - self._use.in_flight

    @property
    def success_ns(self) -> int:
        return self.success_count * self._service_ns


class SimServable:
    """What the scaler reads of ``mesh.instance.servable.Servable``."""

    __slots__ = ("max_concurrency", "statistics", "use")

    def __init__(self, copy: Copy, service_ms: float, max_concurrency: int) -> None:
        self.use = copy.use
        self.statistics = Statistics(copy.use, service_ms)
        self.max_concurrency = max_concurrency


class _Pod:
    """What the scaler reads of the pod."""

    def __init__(self, instance: SimInstance) -> None:
        self.instance_id = instance.instance_id
        self.cache: Cache = instance.cache
        self.servables = instance.servables
        self.records = instance.records


class _Clock:
    def __init__(self, instance: SimInstance) -> None:
        self._engine = instance.world.engine

    def now_ms(self) -> int:
        return self._engine.now_ms


class _Neighbours:
    """``read_copies`` is at once what a read of the store would tell a few milliseconds later."""

    def __init__(self, instance: SimInstance) -> None:
        self.view: ClusterView = instance.world.neighbours.view

    async def read_copies(self, model_id: str) -> ClusterView:
        return self.view


class SimScaler(Scaler):
    """One for each instance."""

    def __init__(self, instance: SimInstance) -> None:
        self._instance = instance
        self._world = instance.world
        super().__init__(
            _Pod(instance),  # type: ignore[arg-type]
            _Neighbours(instance),  # type: ignore[arg-type]
            instance.world.policy,
            _Clock(instance),  # type: ignore[arg-type]
        )
        instance.after(self._policy.scale_sweep_ms, self._beat)

    def _beat(self) -> None:
        if not self._world.store.paused:
            work = self.sweep()
            try:
                while True:
                    work.send(None)
            except StopIteration:
                pass
        self._instance.after(self._policy.scale_sweep_ms, self._beat)

    # ---- carrying out, by callbacks -----------------------------------------------------------

    def _change(self, model_id: str, work: Coroutine[Any, Any, None]) -> None:
        self._changing[model_id] = work  # type: ignore[assignment]
        begin: Callable[[], None] = work  # type: ignore[assignment]
        begin()

    def _over(self, model_id: str) -> None:
        self._changing.pop(model_id, None)

    def _scale_up(  # type: ignore[override]
        self, record: ModelRecord, watched: _Watched, decision: ScaleUp
    ) -> Callable[[], None]:
        results: list[bool] = []
        count = len(decision.placements)
        now_ms = self._world.engine

        def told(loaded: bool) -> None:
            results.append(loaded)
            if len(results) < count:
                return
            came = sum(results)
            watched.changed_at_ms = now_ms.now_ms
            watched.copies += came
            watched.refusals = 0 if came else min(watched.refusals + 1, _REFUSALS_MAX)
            if not came:
                wait_ms = self._policy.scale_up_cooldown_ms << (watched.refusals - 1)
                watched.not_before_ms = now_ms.now_ms + wait_ms
            self._over(record.model_id)

        def begin() -> None:
            instance = self._instance
            for number, placement in enumerate(decision.placements):
                self._world.stats.scaled_up += 1
                self._world.trace.note(
                    "scale_up", record.model_id, placement.instance_id, decision.reason
                )
                # The next claim comes when the last one has been seen.
                instance.after(
                    number * _CLAIM_LOOK_MS,
                    instance.load_elsewhere,
                    record,
                    placement.instance_id,
                    placement.size_bytes,
                    told,
                )

        return begin

    def _scale_down(  # type: ignore[override]
        self, model_id: str, watched: _Watched, decision: ScaleDown
    ) -> Callable[[], None]:
        def begin() -> None:
            world = self._world
            world.stats.scaled_down += 1
            world.trace.note("scale_down", model_id, decision.instance_id, decision.reason)
            world.neighbours.unload_on(decision.instance_id, model_id)
            watched.changed_at_ms = world.engine.now_ms
            if world.instances[decision.instance_id].has(model_id):
                watched.copies = max(1, watched.copies - 1)
            else:
                wait_ms = _LEFT_ALONE_SWEEPS * self._policy.scale_sweep_ms
                watched.not_before_ms = world.engine.now_ms + wait_ms
            self._over(model_id)

        return begin
