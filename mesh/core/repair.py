"""The leader's sweep: what no single copy or model looks after.

``plan_repair`` names, in one printable value, what is to be deleted, unloaded, pinned and loaded.
It decides from the view alone, does nothing before the view has synced (absence would mean
nothing), and bounds every list, so that a large backlog is worked off over several sweeps. Every
deletion is carried out by compare-and-swap. Pins and minimums are ``mesh.core.minimums``'.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import TypeVar

from mesh.core.minimums import (
    NOT_TRIED,
    LoadOrder,
    Minimums,
    Missing,
    Shortfall,
    Tried,
    finish,
    missing_copies,
    missing_in_slices,
    surplus_pins,
)
from mesh.core.policy import Policy
from mesh.core.view import ClusterView

# ``missing_copies`` stands here for the simulator's leader.
__all__ = ["RepairPlan", "missing_copies", "plan_repair"]


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """``delete_failures``, ``delete_copies``, ``unload`` and ``surplus_pins`` hold (model id,
    instance id), ``delete_last_used`` the ids of instances that are gone. ``shortfalls`` are the
    first ones of what ``lacking`` counts: missing copies by reason."""

    delete_failures: tuple[tuple[str, str], ...] = ()
    delete_copies: tuple[tuple[str, str], ...] = ()  # of instances without a record
    unload: tuple[tuple[str, str], ...] = ()  # copies of models that are not registered
    surplus_pins: tuple[tuple[str, str], ...] = ()
    delete_models: tuple[str, ...] = ()
    delete_last_used: tuple[str, ...] = ()
    loads: tuple[LoadOrder, ...] = ()
    crowded: tuple[str, ...] = ()  # their instance gets another load first: ask about them again
    shortfalls: tuple[Shortfall, ...] = ()
    lacking: Mapping[str, int] = field(default_factory=dict)
    minimums: Minimums = field(default_factory=Minimums)
    reason: str = "swept"  # or not_synced


def plan_repair(
    view: ClusterView,
    *,
    now_ms: int,
    policy: Policy,
    tried: Tried = NOT_TRIED,
    absent_since_ms: Mapping[str, int] = MappingProxyType({}),
    missing: Missing | None = None,
) -> RepairPlan:
    """One sweep over failures, copied models and the models with a minimum; not over all models.

    ``absent_since_ms``: since when instances are missed that left copies behind. Their keys vanish
    with the lease that they share; what stays was put without one, and nobody else takes it away.
    ``missing``: what the models with a minimum lack, for who has found that out in slices.
    """
    if not view.synced:
        return RepairPlan(reason="not_synced")
    bound = policy.repair_batch_max
    if missing is None:
        missing = finish(missing_in_slices(view, now_ms=now_ms, policy=policy, tried=tried))
    return RepairPlan(
        delete_failures=_first(
            bound,
            (
                (f.model_id, f.instance_id)
                for f in view.all_failures()
                if f.expires_at_ms <= now_ms or f.model_id not in view.models
            ),
        ),
        delete_copies=_first(
            max(1, bound // 2),  # each is compared with its instance
            (
                (model_id, instance_id)
                for instance_id, copies in view.copies_without_instance().items()
                if now_ms - absent_since_ms.get(instance_id, now_ms) > policy.orphan_grace_ms
                for model_id in copies
            ),
        ),
        unload=_first(bound, _unregistered_copies(view)),
        surplus_pins=_first(bound, surplus_pins(view)),
        delete_models=_first(bound, _orphans(view, now_ms, policy)),
        delete_last_used=_first(
            bound,
            (
                instance_id
                for instance_id, newest_at_ms in view.flushed_by_the_gone()
                if now_ms - newest_at_ms >= policy.last_used_keep_ms
            ),
        ),
        loads=missing.loads,
        crowded=missing.crowded,
        shortfalls=missing.shortfalls,
        lacking=missing.lacking,
        minimums=missing.minimums,
    )


def _unregistered_copies(view: ClusterView) -> Iterator[tuple[str, str]]:
    for model_id in view.copied_models():
        if model_id not in view.models:
            for copy in view.copies_of(model_id):
                yield model_id, copy.instance_id


def _orphans(view: ClusterView, now_ms: int, policy: Policy) -> Iterator[str]:
    """``auto_delete`` models that no alias names, past the time in which the alias may come."""
    for model_id in view.unaliased_models():
        if now_ms - view.models[model_id].created_at_ms >= policy.orphan_grace_ms:
            yield model_id


_T = TypeVar("_T")


def _first(bound: int, items: Iterable[_T]) -> tuple[_T, ...]:
    return tuple(islice(items, bound))
