"""Carries out what the cache decided: fetch, predict, load, unload. Decides nothing itself.

Each copy that is being loaded has one ``LoadJob``. Blocking work runs in threads of its own;
every job ends by reporting exactly one of ``LoadFinished`` and ``LoadBroken``, also when it was
abandoned, and every unload by ``UnloadFinished``, so that the cache's books follow what memory
really holds.

A fetch is cancelled when it is abandoned, and so is a load in another process that can be called
off; a runtime in this one cannot be, so its thread is let run and its model, should it still come,
is reported and then unloaded.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from time import perf_counter_ns
from typing import Final, Protocol

from mesh.artifacts import Artifact, ArtifactRequest, ArtifactSource
from mesh.core.cache_events import (
    CopyEvent,
    LoadBroken,
    LoadFinished,
    SizePredicted,
    UnloadFinished,
)
from mesh.core.errors import Code, LoadFailed, MeshError
from mesh.core.types import ModelRecord
from mesh.instance.threads import in_thread
from mesh.metrics import InstanceMetrics
from mesh.runtimes.api import AnyModel, CancellableRuntime, ModelSpec, Runtime

log = logging.getLogger(__name__)

# What the machine lacks rather than the model: it may heal, so the failure is transient.
_TRANSIENT_ERRNOS: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}
)


class Runtimes(Protocol):
    """``mesh.runtimes.registry.RuntimeRegistry``, or a fake."""

    @property
    def model_types(self) -> tuple[str, ...]: ...

    def runtime_for(self, model_type: str) -> Runtime: ...


class LoadJob:
    """One load on its way."""

    __slots__ = (
        "abandoned",
        "artifact",
        "asked_ns",
        "fetched_ns",
        "phase",
        "progress",
        "record",
        "started_ns",
        "task",
    )

    def __init__(self, record: ModelRecord) -> None:
        self.record = record
        self.phase = "queued"
        self.artifact: Artifact | None = None
        self.progress: tuple[int, int | None] = (0, None)
        self.asked_ns = perf_counter_ns()
        self.started_ns = 0
        self.fetched_ns = 0
        self.abandoned = False
        self.task: asyncio.Task[None] | None = None


class Loader:
    """``report`` takes events to the cache; it is called from the event loop, never re-entrantly
    from ``start_*`` or ``abandon``."""

    def __init__(
        self,
        source: ArtifactSource,
        runtimes: Runtimes,
        metrics: InstanceMetrics,
        report: Callable[[CopyEvent], None],
    ) -> None:
        self._source = source
        self._runtimes = runtimes
        self._metrics = metrics
        self._report = report
        self.jobs: dict[str, LoadJob] = {}
        self.models: dict[str, AnyModel] = {}  # in memory, until their unload has ended
        self.load_ms: dict[str, float] = {}  # of the copies in ``models``
        self._unloads: set[asyncio.Task[None]] = set()

    def prepare(self, record: ModelRecord) -> LoadJob:
        job = self.jobs[record.model_id] = LoadJob(record)
        return job

    def forget(self, model_id: str) -> None:
        """The cache has dropped a copy that is not in memory: let go of its artifact."""
        job = self.jobs.get(model_id)
        if job is not None and job.task is None:
            del self.jobs[model_id]
            self._release(job)

    # ---- fetch and predict ----

    def start_fetch(self, model_id: str) -> None:
        job = self.jobs[model_id]
        job.started_ns = perf_counter_ns()
        job.phase = "fetching"
        self._metrics.observe(
            "loading_queue_delay", (job.started_ns - job.asked_ns) / 1e6, model_id
        )
        job.task = asyncio.create_task(self._fetch(job), name=f"fetch {model_id}")
        job.task.add_done_callback(lambda task: self._fetch_done(job, task))

    async def _fetch(self, job: LoadJob) -> None:
        record = job.record
        try:
            job.artifact = await self._source.fetch(
                ArtifactRequest(record.model_id, record.path, record.key, record.model_type),
                lambda done, total: setattr(job, "progress", (done, total)),
            )
            size_bytes = record.size_bytes_stated
            if not size_bytes:
                # A load beside others cannot be measured and counts as what the runtime predicts:
                # to reserve only what was measured once would let it pass the capacity.
                predicted = await in_thread(f"size {record.model_id}", lambda: self._predict(job))
                size_bytes = max(predicted, record.size_bytes_measured or 0)
        except Exception as error:
            self._broken(job, as_load_failure(record.model_id, error))
            return
        if job.abandoned:
            self._broken(job, LoadFailed("the load was abandoned", code=Code.UNAVAILABLE))
            return
        job.fetched_ns = perf_counter_ns()
        job.phase = "waiting"
        job.task = None
        self._report(SizePredicted(record.model_id, max(1, size_bytes)))

    def _fetch_done(self, job: LoadJob, task: asyncio.Task[None]) -> None:
        """Here and not in ``_fetch``: a task that is cancelled before its first step never runs."""
        if task.cancelled() and job.abandoned:
            self._broken(job, LoadFailed("the load was abandoned", code=Code.UNAVAILABLE))

    def _predict(self, job: LoadJob) -> int:
        runtime = self._runtimes.runtime_for(job.record.model_type)
        return runtime.predict_size_bytes(_spec(job))

    # ---- load ----

    def start_load(self, model_id: str) -> None:
        job = self.jobs[model_id]
        job.phase = "loading"
        job.task = asyncio.create_task(self._load(job), name=f"load {model_id}")

    async def _load(self, job: LoadJob) -> None:
        model_id = job.record.model_id

        def load() -> tuple[AnyModel, int, float]:
            model = self._runtimes.runtime_for(job.record.model_type).load(_spec(job))
            loaded_ns = perf_counter_ns()
            size_bytes = max(1, model.size_bytes)
            return model, size_bytes, (perf_counter_ns() - loaded_ns) / 1e6

        try:
            model, size_bytes, sizing_ms = await in_thread(f"load {model_id}", load)
        except Exception as error:
            self._broken(job, as_load_failure(model_id, error))
            return
        elapsed_ms = (perf_counter_ns() - job.started_ns) / 1e6
        self._end(job)
        self.models[model_id] = model
        self.load_ms[model_id] = elapsed_ms
        self._metrics.observe("loadmodel", elapsed_ms, model_id)
        self._metrics.observe("model_sizing", sizing_ms, model_id)
        self._metrics.observe("loaded_model_size", size_bytes, model_id)
        self._report(LoadFinished(model_id, size_bytes, max(1, round(elapsed_ms))))

    def abandon(self, model_id: str) -> None:
        job = self.jobs[model_id]
        job.abandoned = True
        if job.phase == "fetching" and job.task is not None:
            job.task.cancel()
        elif job.phase == "loading":
            runtime = self._runtimes.runtime_for(job.record.model_type)
            if isinstance(runtime, CancellableRuntime):
                runtime.cancel_load(model_id)

    def _broken(self, job: LoadJob, error: MeshError) -> None:
        self._end(job)
        self._report(LoadBroken(job.record.model_id, error))

    def _end(self, job: LoadJob) -> None:
        del self.jobs[job.record.model_id]
        self._release(job)

    def _release(self, job: LoadJob) -> None:
        """Never raises: what ended the load is still to be reported, and somebody waits for it."""
        artifact, job.artifact = job.artifact, None
        if artifact is None:
            return
        try:
            self._source.release(artifact)
        except Exception:
            # It stays in use for the source, which so keeps it on disk: space, not correctness.
            log.exception("the artifact of model %r was not released", job.record.model_id)

    # ---- unload ----

    def start_unload(self, model_id: str) -> None:
        model = self.models.pop(model_id)
        self.load_ms.pop(model_id, None)
        task = asyncio.create_task(self._unload(model_id, model), name=f"unload {model_id}")
        self._unloads.add(task)
        task.add_done_callback(self._unloads.discard)

    async def _unload(self, model_id: str, model: AnyModel) -> None:
        started_ns = perf_counter_ns()
        try:
            await in_thread(f"unload {model_id}", model.unload)
        except Exception:
            # Nothing can be retried with a model in this process: its memory goes with the object.
            log.exception("unloading model %r failed", model_id)
            self._metrics.counter("unloadmodel_failure")
        del model
        self._metrics.observe("unloadmodel", (perf_counter_ns() - started_ns) / 1e6, model_id)
        self._report(UnloadFinished(model_id))


def _spec(job: LoadJob) -> ModelSpec:
    assert job.artifact is not None
    record = job.record
    return ModelSpec(
        record.model_id,
        record.model_type,
        job.artifact.path,
        # What ModelMesh's runtimes are told of a model.
        parameters={"path": record.path, "key": record.key},
    )


def as_load_failure(model_id: str, error: Exception) -> MeshError:
    """What is told to clients and kept as the cause: whose fault it is decides when to retry."""
    if isinstance(error, MeshError):
        return error
    transient = isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS
    )
    if not transient:
        log.error("loading model %r failed", model_id, exc_info=error)
    return LoadFailed(
        f"loading model {model_id!r} failed: {type(error).__name__}: {error}",
        code=Code.UNAVAILABLE if transient else Code.FAILED_PRECONDITION,
    )
