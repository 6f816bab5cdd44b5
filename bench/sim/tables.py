"""What a run counted, and the row that it becomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mesh.core.errors import MeshError


class Stats:
    """Counters; times are virtual milliseconds."""

    def __init__(self) -> None:
        self.requests = 0
        self.hits = 0
        self.cold_requests = self.cold_hits = 0  # before the caches were warm
        self.not_plain = 0
        self.missed = 0
        self.waited_ms: list[float] = []  # of requests that missed, and were answered
        self.loads_started = 0
        self.loads = 0
        self.load_failures = 0
        self.duplicate_loads = 0
        self.bytes_pulled = 0
        self.evictions = 0
        self.unloads = 0
        self.moved = 0  # copies, by instances that left
        self.proactive = 0
        self.parked = 0
        self.scaled_up = 0
        self.scaled_down = 0
        self.failed_requests = 0
        self.failed_broken = 0  # of models that cannot be loaded at all
        self.errors: Counter[str] = Counter()
        self.retries: Counter[str] = Counter()
        self.placements: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.gave_up: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def answered(self, misses: int, waited_ms: float) -> None:
        if misses:
            self.missed += 1
            self.waited_ms.append(waited_ms)
        else:
            self.hits += 1

    def failed(self, reason: str, error: MeshError, *, broken: bool) -> None:
        if broken:
            self.failed_broken += 1
        else:
            self.failed_requests += 1
            self.errors[f"{reason}: {error.code.name}"] += 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is told of one run."""

    workload: str
    placement: str
    requests: int
    hit_ratio: float
    cold_p50_ms: float
    cold_p99_ms: float
    loads_per_min: float
    bytes_pulled: int
    evictions: int
    imbalance: float
    failed: int
    digest: str
    wall_s: float
    cpu_s: float
    warm_hit_ratio: float  # after the first quarter of the requests
    scaled_up: int

    def row(self) -> dict[str, Any]:
        return {
            "placement": self.placement,
            "requests": self.requests,
            "hit ratio": round(self.hit_ratio, 4),
            "warm hits": round(self.warm_hit_ratio, 4),
            "cold p50 ms": round(self.cold_p50_ms),
            "cold p99 ms": round(self.cold_p99_ms),
            "loads/min": round(self.loads_per_min, 1),
            "GiB pulled": round(self.bytes_pulled / (1 << 30), 2),
            "evictions": self.evictions,
            "imbalance": round(self.imbalance, 3),
            "failed": self.failed,
            "copies added": self.scaled_up,
            "CPU s": round(self.cpu_s, 1),
        }


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def imbalance(loads: Iterable[int]) -> float:
    """The most over the mean."""
    counts = list(loads)
    total = sum(counts)
    return max(counts) * len(counts) / total if total else 1.0
