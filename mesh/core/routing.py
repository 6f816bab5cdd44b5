"""Which copy answers: the one with the fewest requests in flight.

A decision over plain values, on the hit path: no records, no view, no allocation beyond the
result. Chance comes in as ``draw``. ``None`` means that no candidate is left, and the caller goes
on to a miss.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

# Up to so many copies all are compared; past it two drawn ones are (power of two choices): the
# cost stays flat, and routers that do not know of each other do not all pick the same one.
COMPARE_ALL_MAX: Final = 4


@dataclass(frozen=True, slots=True)
class Route:
    """``reason``: ``only_copy``, ``least_inflight``, ``tie_draw`` or ``two_choices``."""

    instance_id: str
    reason: str
    runner_up: str | None = None


def route(
    candidates: Sequence[str],
    inflight: Mapping[str, int],
    *,
    draw: float,
    exclude: Collection[str] = (),
) -> Route | None:
    """Choose among ``candidates`` (``ClusterView.loaded_on``), never one of ``exclude``.

    ``inflight`` counts this router's requests in flight by instance id, absent is 0. ``draw`` is
    in [0, 1). The order of ``candidates`` does not matter.
    """
    if exclude:
        candidates = [c for c in candidates if c not in exclude]
    count = len(candidates)
    if count == 0:
        return None
    if count == 1:
        return Route(candidates[0], "only_copy")
    if count > COMPARE_ALL_MAX:
        return _two_choices(sorted(candidates), inflight, draw)
    ranked = sorted(candidates, key=lambda c: (inflight.get(c, 0), c))
    lowest = inflight.get(ranked[0], 0)
    tied = [c for c in ranked if inflight.get(c, 0) == lowest]
    if len(tied) == 1:
        return Route(ranked[0], "least_inflight", ranked[1])
    first = min(int(draw * len(tied)), len(tied) - 1)
    return Route(tied[first], "tie_draw", tied[first - 1])


def _two_choices(ordered: Sequence[str], inflight: Mapping[str, int], draw: float) -> Route:
    """One draw gives two different places: its whole part the first, its fraction the second."""
    count = len(ordered)
    scaled = draw * count
    first = min(int(scaled), count - 1)
    second = min(int((scaled - first) * (count - 1)), count - 2)
    if second >= first:
        second += 1
    one, other = ordered[first], ordered[second]
    if inflight.get(other, 0) < inflight.get(one, 0):
        one, other = other, one
    return Route(one, "two_choices", other)
