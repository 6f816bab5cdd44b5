"""The work of loads and unloads of one instance: ``mesh.instance.loader``, with durations instead.

Each load ends by exactly one of ``LoadFinished`` and ``LoadBroken``, also when it was abandoned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.core.cache_events import LoadBroken, LoadFinished, SizePredicted, UnloadFinished
from mesh.core.errors import Code, LoadFailed

if TYPE_CHECKING:
    from bench.sim.instance import SimInstance


class Job:
    """One load on its way."""

    __slots__ = ("abandoned", "began", "fetching")

    def __init__(self, began: float) -> None:
        self.began = began
        self.fetching = True
        self.abandoned = False


class Loading:
    """``apply`` of the instance hears how each job ends."""

    def __init__(self, instance: SimInstance) -> None:
        self._instance = instance
        self._world = instance.world
        self._jobs: dict[str, Job] = {}

    def start_fetch(self, model_id: str) -> None:
        world = self._world
        world.stats.loads_started += 1
        world.stats.bytes_pulled += world.costs.size_bytes[model_id]
        job = self._jobs[model_id] = Job(world.engine.time)
        fetch_ms = self._takes_ms(model_id) * world.settings.fetch_share
        self._instance.after(fetch_ms, self._fetched, model_id, job)

    def start_load(self, model_id: str) -> None:
        load_ms = self._takes_ms(model_id) * (1.0 - self._world.settings.fetch_share)
        self._instance.after(load_ms, self._load_over, model_id)

    def abandon(self, model_id: str) -> None:
        """A fetch is cancelled; a runtime cannot be, and its model is unloaded when it comes."""
        job = self._jobs[model_id]
        if job.fetching:
            job.abandoned = True
            self._instance.after(0.0, self._cancelled, model_id)

    def forget(self, model_id: str) -> None:
        """The cache has dropped a copy that is not in memory: fetched, and refused then."""
        job = self._jobs.get(model_id)
        if job is not None and not job.fetching:
            self._ends(model_id)

    def start_unload(self, model_id: str) -> None:
        ended = UnloadFinished(model_id)
        self._instance.after(self._world.settings.unload_ms, self._instance.apply, ended)

    def _takes_ms(self, model_id: str) -> float:
        factor = self._world.troubles.load_factor.get(self._instance.instance_id, 1.0)
        return self._world.costs.load_ms[model_id] * factor

    def _fetched(self, model_id: str, job: Job) -> None:
        if job.abandoned:
            return
        job.fetching = False
        world = self._world
        size_bytes = world.costs.size_bytes[model_id]
        error_share = world.settings.size_error_share
        if error_share:
            size_bytes = max(1, int(size_bytes * (1.0 - world.random.random() * error_share)))
        self._instance.apply(SizePredicted(model_id, size_bytes))

    def _cancelled(self, model_id: str) -> None:
        self._ends(model_id)
        error = LoadFailed("the load was abandoned", code=Code.UNAVAILABLE)
        self._instance.apply(LoadBroken(model_id, error))

    def _load_over(self, model_id: str) -> None:
        took_ms = int(self._ends(model_id))
        failure = self._world.load_failure(model_id)
        if failure is not None:
            self._instance.apply(LoadBroken(model_id, failure))
        else:
            size_bytes = self._world.costs.size_bytes[model_id]
            self._instance.apply(LoadFinished(model_id, size_bytes, took_ms))

    def _ends(self, model_id: str) -> float:
        self._world.checks.load_ends(self._instance, model_id)
        return self._world.engine.time - self._jobs.pop(model_id).began
