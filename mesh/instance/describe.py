"""What an instance knows of one model, for `mesh describe`: state, sizes, times, progress."""

from __future__ import annotations

from typing import Any

from mesh.instance.batching import Batching
from mesh.instance.pod import Pod
from mesh.runtimes.api import InternalModel


def describe(pod: Pod, model_id: str) -> dict[str, Any]:
    """JSON-able. ``state`` is "" when the model is not in this instance's cache."""
    document: dict[str, Any] = {"model_id": model_id, "instance_id": pod.instance_id, "state": ""}
    copy = pod.cache.get(model_id)
    if copy is not None:
        document.update(
            state=copy.state.value,
            size_bytes=copy.size_bytes,
            needed_bytes=copy.need_bytes,
            pinned=copy.pinned,
            kept=copy.kept,
            idle_unload_ms=copy.idle_unload_ms,
            priority=copy.priority.value,
            in_flight=copy.use.in_flight,
            last_used_at_ms=copy.use.last_used_at_ms,
            loaded_at_ms=copy.loaded_at_ms,
            leaving_because=copy.reason.value if copy.reason else "",
        )
    job = pod.loader.jobs.get(model_id)
    if job is not None:
        done, total = job.progress
        document["load"] = {"phase": job.phase, "fetched_bytes": done, "total_bytes": total}
    servable = pod.servables.get(model_id)
    if servable is not None:
        s = servable.statistics
        document.update(
            load_ms=round(pod.loader.load_ms.get(model_id, 0.0), 3),
            model_type=servable.model_type,
            platform=servable.metadata.platform,
            running=servable.running,
            queued=len(servable.queue),
            max_concurrency=servable.max_concurrency,
            requests=s.success_count,
            requests_inline=s.inline_count,
            requests_failed=s.fail_count,
            # Smoothed time of one request by the largest message of each class, microseconds.
            estimated_us={
                str((1 << size_class) - 1): round(ns / 1_000, 1)
                for size_class, ns in enumerate(servable.estimates)
                if ns
            },
            batching=_batching(servable.batch),
        )
        if isinstance(servable.remote, InternalModel) and servable.remote.ends.count:
            ends = servable.remote.ends
            document.update(
                process_ends=ends.count,
                process_ended_at_ms=ends.last_at_ms,
                process_end=f"its process {ends.last_cause}",
            )
    document["instance"] = {
        "capacity_bytes": pod.cache.config.capacity_bytes,
        "used_bytes": pod.cache.used_bytes,
        "models": len(pod.servables),
        "loading": pod.cache.loading_count,
        "draining": pod.cache.draining,
    }
    return document


def _batching(batch: Batching) -> dict[str, Any]:
    standing, terms = batch.standing, batch.terms
    return {
        "state": standing.stage.value,
        "reason": standing.reason.value,
        "max_rows": terms.max_rows,
        "max_wait_us": terms.max_wait_us,
        "rows_now": standing.rows,
        # A request's time alone : its share of a joined run, at the last trial.
        "gain": round(standing.gain, 2),
        "joined_runs": batch.joined_runs,
        "joined_requests": batch.joined_requests,
        "mean_rows": round(batch.joined_rows / batch.joined_runs, 1) if batch.joined_runs else 0.0,
    }
