"""The leader's sweep: what no single copy or model looks after.

``plan_repair`` names, in one printable value, what is to be deleted, unloaded and loaded. It
decides from the view alone, does nothing before the view has synced (absence would mean nothing),
and bounds every list, so that a large backlog is worked off over several sweeps. Every deletion is
carried out by compare-and-swap.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from mesh.core.placement import Placement, place
from mesh.core.policy import Policy
from mesh.core.types import CopyState, LoadPriority, ModelRecord
from mesh.core.view import ClusterView


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Have ``placement.instance_id`` load it."""

    model_id: str
    placement: Placement
    priority: LoadPriority
    reason: str  # pinned | min_copies


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Copies that are wanted and cannot be had now, and why (a NoPlacement's reason, or
    ``no_room``)."""

    model_id: str
    missing: int
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """``delete_failures`` and ``unload`` hold (model id, instance id), ``delete_last_used`` the
    ids of instances that are gone."""

    delete_failures: tuple[tuple[str, str], ...] = ()
    unload: tuple[tuple[str, str], ...] = ()
    delete_models: tuple[str, ...] = ()
    delete_last_used: tuple[str, ...] = ()
    loads: tuple[LoadOrder, ...] = ()
    shortfalls: tuple[Shortfall, ...] = ()
    reason: str = "swept"  # or not_synced


def plan_repair(view: ClusterView, *, now_ms: int, policy: Policy) -> RepairPlan:
    """One sweep over failures, copies and the models with a minimum; not over all models."""
    if not view.synced:
        return RepairPlan(reason="not_synced")
    bound = policy.repair_batch_max
    loads, shortfalls = missing_copies(view, now_ms=now_ms, policy=policy)
    return RepairPlan(
        delete_failures=_first(
            bound,
            (
                (f.model_id, f.instance_id)
                for f in view.all_failures()
                if f.expires_at_ms <= now_ms or f.model_id not in view.models
            ),
        ),
        unload=_first(
            bound,
            (
                (c.model_id, c.instance_id)
                for c in view.all_copies()
                if c.model_id not in view.models
            ),
        ),
        delete_models=_first(bound, _orphans(view, now_ms, policy)),
        delete_last_used=_first(
            bound,
            (
                instance_id
                for instance_id, newest_at_ms in view.flushed_by_the_gone()
                if now_ms - newest_at_ms >= policy.last_used_keep_ms
            ),
        ),
        loads=loads,
        shortfalls=shortfalls,
    )


def _orphans(view: ClusterView, now_ms: int, policy: Policy) -> Iterable[str]:
    """``auto_delete`` models that no alias names, past the time in which the alias may come."""
    for model_id in view.unaliased_models():
        if now_ms - view.models[model_id].created_at_ms >= policy.orphan_grace_ms:
            yield model_id


def missing_copies(
    view: ClusterView, *, now_ms: int, policy: Policy, among: AbstractSet[str] | None = None
) -> tuple[tuple[LoadOrder, ...], tuple[Shortfall, ...]]:
    """Loads for models below their minimum, pinned ones first, as they alone may evict.

    One load a model and one an instance: the view does not count these loads yet. The shell adds
    them as pending and asks again, up to ``Policy.repair_loads_max`` in one sweep. ``among``: look
    at these models only.
    """
    loads: list[LoadOrder] = []
    shortfalls: list[Shortfall] = []
    wanting = view.models_with_minimum()
    models = sorted(
        (view.models[m] for m in (wanting if among is None else wanting & among)),
        key=lambda m: (not m.pinned, m.model_id),
    )
    taken: set[str] = set()
    for model in models:
        if len(loads) >= policy.repair_loads_max:
            break
        have = _copies_or_coming(view, model.model_id)
        hard = model.pinned and have == 0
        missing = max(1 if model.pinned else 0, model.min_copies) - have
        if missing <= 0:
            continue
        placed = place(view, model, now_ms=now_ms, policy=policy)
        if not isinstance(placed, Placement):
            shortfalls.append(Shortfall(model.model_id, missing, placed.reason, placed.detail))
            continue
        if placed.full and not hard:
            shortfalls.append(Shortfall(model.model_id, missing, "no_room", _no_room(model)))
            continue
        if placed.instance_id in taken:
            continue
        taken.add(placed.instance_id)
        loads.append(
            LoadOrder(
                model.model_id,
                placed,
                LoadPriority.AWAITED if hard else LoadPriority.PROACTIVE,
                "pinned" if hard else "min_copies",
            )
        )
    return tuple(loads), tuple(shortfalls)


def _no_room(model: ModelRecord) -> str:
    return f"model {model.model_id!r} wants {model.min_copies} copies; no instance has free room"


def _copies_or_coming(view: ClusterView, model_id: str) -> int:
    """Copies that will last (a draining instance's do not), and loads that were asked for."""
    lasting = sum(
        1
        for copy in view.copies_of(model_id)
        if copy.state in (CopyState.LOADED, CopyState.LOADING)
        and view.instances[copy.instance_id].ready
    )
    return lasting + len(view.pending_of(model_id))


_T = TypeVar("_T")


def _first(bound: int, items: Iterable[_T]) -> tuple[_T, ...]:
    return tuple(islice(items, bound))
