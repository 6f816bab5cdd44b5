"""Every Prometheus series of the mesh, declared once; the only importer of prometheus_client.

INTERFACE (being implemented). The hit path records into plain ints and lists; a custom collector
turns them into Prometheus families when somebody scrapes. Names, labels, buckets and units are
ModelMesh's where it has the series (``modelmesh_*``, milliseconds), ours start with ``mesh_``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """Fixed buckets, no lock, one thread. ``observe`` is a bisect and three additions."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class RouterMetrics:
    """Series of a router process."""

    def request_done(self, method: str, code: int, duration_ms: float, request_bytes: int, response_bytes: int) -> None:
        """modelmesh_api_request_milliseconds{method,code}, *_size_bytes."""
        raise NotImplementedError

    def counter(self, name: str, *labels: str) -> None:
        """Add 1. Declared names: hits, misses, retries(failure), placements(reason), errors(reason),
        loads_requested(outcome)."""
        raise NotImplementedError

    def render(self) -> tuple[bytes, str]:
        """(body, content type) of /metrics; also process_* series."""
        raise NotImplementedError


class InstanceMetrics:
    """Series of an instance process."""

    def invoke_done(self, method: str, code: int, duration_ms: float) -> None:
        raise NotImplementedError

    def observe(self, name: str, value: float) -> None:
        """loadmodel, unloadmodel, req_queue_delay, loading_queue_delay, model_sizing, cache_miss (ms),
        loaded_model_size (bytes), age_at_eviction (ms)."""
        raise NotImplementedError

    def counter(self, name: str, *labels: str) -> None:
        """loads(model_type, outcome), evictions(reason), loadmodel_failure, unloadmodel_failure."""
        raise NotImplementedError

    def gauge(self, name: str, value: float) -> None:
        """capacity_bytes, used_bytes, models_total, lru_seconds, lru_age_seconds, loading, inflight."""
        raise NotImplementedError

    def render(self) -> tuple[bytes, str]:
        raise NotImplementedError
