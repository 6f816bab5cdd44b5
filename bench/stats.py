"""Medians, percentiles, spreads and ratios of interleaved runs. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the smallest and the largest value that it was taken from."""

    median: float
    low: float
    high: float
    count: int

    def text(self, digits: int = 3) -> str:
        def short(value: float) -> str:
            return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.{digits}g}"

        if self.count == 1:
            return short(self.median)
        return f"{short(self.median)} ({short(self.low)}..{short(self.high)})"


def spread(values: Sequence[float]) -> Spread:
    if not values:
        raise ValueError("a spread of nothing: the measurement made no run")
    return Spread(median(values), min(values), max(values), len(values))


def pair_ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ratio of each interleaved pair, then their spread: what drifts hits both of a pair."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} runs cannot be paired with {len(theirs)}")
    if not all(theirs):
        raise ValueError("a run measured zero: make it longer (--seconds)")
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of all values do not exceed (nearest rank)."""
    if not values:
        raise ValueError("a percentile of nothing")
    ordered = sorted(values)
    rank = max(1, -(-int(share * 1_000_000) * len(ordered) // 1_000_000))
    return ordered[min(rank, len(ordered)) - 1]
