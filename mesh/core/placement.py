"""Where a model is to be loaded: hard filters, then an order, and the reason of both.

``place`` (``choose_instance``, as others call it) is a pure function of the view, the model and the
clock's reading. It never names an instance that is not READY, that cannot run the format, that
lacks a required label, that could not hold the model even when empty, that failed to load it
lately, that holds it already or was asked to, or that the caller excludes (``mesh.core.demand``).
Among the rest ``mesh.core.preference`` decides. When nothing is left, ``mesh.core.nowhere`` says
which kind of nothing: final (``FAILED_PRECONDITION``) or to be tried again (``UNAVAILABLE``).

It walks all instances, a thousand of them in well under a millisecond (``bench/placement.py``).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from mesh.core.demand import Demand, demand_of, fitting, predict_size_bytes, refusal
from mesh.core.nowhere import RETRY_SOON_MS, NoPlacement, load_failed, nowhere
from mesh.core.policy import Policy
from mesh.core.preference import Preference
from mesh.core.slots import InstanceSlot
from mesh.core.types import ModelRecord
from mesh.core.view import ClusterView

__all__ = [
    "RETRY_SOON_MS",
    "Candidate",
    "NoPlacement",
    "Placement",
    "candidates",
    "place",
    "predict_size_bytes",
]


@dataclass(frozen=True, slots=True)
class Placement:
    """Load it on ``instance_id``.

    ``reason`` is the first term of the order that parted it from ``runner_up``:
    ``only_candidate``, ``tie_hash``, or one of ``mesh.core.preference``. ``full`` tells that
    something has to be evicted for it. ``marks`` are held against it, and nobody better was left.
    """

    instance_id: str
    reason: str
    runner_up: str | None
    size_bytes: int
    full: bool
    detail: str
    marks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """How one instance looks to a placement. ``refusal`` is None for one that may be chosen;
    ``marks`` speak against it without refusing it: ``avoided``, ``being_replaced``,
    ``not_preferred``, ``hot``."""

    instance_id: str
    refusal: str | None
    full: bool
    free_bytes: int
    loads_in_progress: int
    lru_at_ms: int
    marks: tuple[str, ...] = ()
    zone: str = ""
    victim_score: float = 0.0


def place(
    view: ClusterView,
    model: ModelRecord,
    *,
    now_ms: int,
    policy: Policy,
    exclude: Collection[str] = (),
    avoid: Collection[str] = (),
) -> Placement | NoPlacement:
    """Choose the instance that is to load one more copy of ``model``: never one of ``exclude``,
    one of ``avoid`` only when nobody else is left."""
    demand = demand_of(view, model, now_ms=now_ms, policy=policy, exclude=exclude)
    if len(demand.failures) >= policy.max_load_failures:
        return load_failed(demand, now_ms)
    pool = fitting(view, demand)
    if not pool:
        return nowhere(view, demand, now_ms)
    preference = Preference(view, demand, pool, now_ms=now_ms, policy=policy, avoid=avoid)
    winner, second = preference.choose(pool)
    reason = "only_candidate" if second is None else preference.parting(winner, second)
    marks = preference.marks(winner)
    return Placement(
        instance_id=winner.record.instance_id,
        reason=reason,
        runner_up=second.record.instance_id if second is not None else None,
        size_bytes=demand.size_bytes,
        full=winner.effective_free_bytes < demand.size_bytes,
        detail=_detail(winner, second, reason, demand, marks),
        marks=marks,
    )


def candidates(
    view: ClusterView,
    model: ModelRecord,
    *,
    now_ms: int,
    policy: Policy,
    exclude: Collection[str] = (),
    avoid: Collection[str] = (),
) -> tuple[Candidate, ...]:
    """Every instance as ``place`` sees it, best first, refused ones last."""
    demand = demand_of(view, model, now_ms=now_ms, policy=policy, exclude=exclude)
    pool = fitting(view, demand)
    preference = Preference(view, demand, pool, now_ms=now_ms, policy=policy, avoid=avoid)
    first = preference.choose(pool) if pool else ()
    leading = [slot for slot in first if slot is not None]
    refused = [s for s in view.instances.values() if refusal(s, demand) is not None]
    others = [s for s in pool if s not in leading]
    in_order = [*leading, *preference.in_order(others), *preference.in_order(refused)]
    return tuple(
        Candidate(
            instance_id=slot.record.instance_id,
            refusal=refusal(slot, demand),
            full=slot.effective_free_bytes < demand.size_bytes,
            free_bytes=slot.effective_free_bytes,
            loads_in_progress=slot.loads_in_progress,
            lru_at_ms=slot.record.lru_at_ms,
            marks=preference.marks(slot),
            zone=slot.record.zone,
            victim_score=slot.record.victim_score,
        )
        for slot in in_order
    )


def _detail(
    winner: InstanceSlot,
    second: InstanceSlot | None,
    reason: str,
    demand: Demand,
    marks: tuple[str, ...],
) -> str:
    told = f"{_tell(winner)} for {demand.size_bytes} bytes by {reason}"
    if marks:
        told += f", though {' and '.join(marks)}: nobody better is left"
    return told if second is None else f"{told}; next {_tell(second)}"


def _tell(slot: InstanceSlot) -> str:
    return (
        f"{slot.record.instance_id} ({slot.effective_free_bytes} of {slot.record.capacity_bytes} "
        f"bytes free, {slot.loads_in_progress} loading)"
    )
