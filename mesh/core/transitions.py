"""What the elected leader does about an alias whose target is still to be loaded: before it takes
over from another model, or because it is new (``awaits_load``).

``plan_transition`` looks at one alias, ``plan_transitions`` at those that are under way: so many
loads at once, and so many that need a place in one look, that thousands of new names neither hold
up the leader nor fill the queues that requests wait in. The shell
of the leader carries the actions out; each writes by compare-and-swap against the record that the
decision saw, so a leader that is none any more changes nothing. The old model keeps answering
until its successor is loaded, and for as long as the successor does not load.

| target | action |
|---|---|
| has a copy that answers | ``Switch``; an unnamed ``auto_delete`` old model goes with it |
| the active model is not registered | ``Switch``: there is nothing to protect |
| not registered | ``MarkFailed`` |
| is being loaded | ``Wait`` |
| cannot be loaded (failed, too large, no runtime) | ``MarkFailed`` with the cause, or ``Wait`` |
| nowhere just now | ``Wait`` |
| else | ``LoadTarget`` |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mesh.core.errors import RETRYABLE
from mesh.core.placement import NoPlacement, Placement, place
from mesh.core.policy import Policy
from mesh.core.types import CopyState, VModelRecord
from mesh.core.view import ClusterView


@dataclass(frozen=True, slots=True)
class LoadTarget:
    """Ask ``placement.instance_id`` to load the target."""

    name: str
    model_id: str
    placement: Placement
    reason: str


@dataclass(frozen=True, slots=True)
class Switch:
    """Write ``new`` over ``old``; in the same transaction delete the model ``delete_model_id``."""

    old: VModelRecord
    new: VModelRecord
    delete_model_id: str | None
    reason: str  # target_loaded | active_gone

    @property
    def name(self) -> str:
        return self.new.name


@dataclass(frozen=True, slots=True)
class MarkFailed:
    """Write ``new``, which tells the cause, over ``old``; the active model keeps answering."""

    old: VModelRecord
    new: VModelRecord
    reason: str

    @property
    def name(self) -> str:
        return self.new.name


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do before the view changes or a failure expires."""

    name: str
    reason: str


TransitionAction = LoadTarget | Switch | MarkFailed | Wait


def transitions_pending(view: ClusterView) -> Iterator[VModelRecord]:
    """Aliases on their way, by name."""
    return (view.vmodels[name] for name in sorted(view.vmodels_in_transition()))


@dataclass(frozen=True, slots=True)
class TransitionPlan:
    """``after``: the last name that was looked at; "" when all were, from the first to the last."""

    actions: tuple[TransitionAction, ...]
    after: str = ""


def plan_transitions(
    view: ClusterView, *, now_ms: int, policy: Policy, after: str = ""
) -> TransitionPlan:
    """One action per alias that is on its way, by name from ``after`` on. At most
    ``repair_batch_max`` of them are placed, and at most ``repair_loads_max`` loads are begun or
    under way. Nothing before the view has synced."""
    if not view.synced:
        return TransitionPlan(())
    records = [record for record in transitions_pending(view) if record.name > after]
    loads = sum(_under_way(view, view.vmodels[name]) for name in view.vmodels_in_transition())
    placed = 0
    actions: list[TransitionAction] = []
    for record in records:
        action = _without_placing(view, record, now_ms)
        if action is None:
            if placed >= policy.repair_batch_max:
                return TransitionPlan(tuple(actions), actions[-1].name)
            if loads >= policy.repair_loads_max > 0:
                action = Wait(record.name, "loads_under_way")
            else:
                placed += 1
                action = _placing(view, record, now_ms, policy)
                loads += isinstance(action, LoadTarget)
        actions.append(action)
    return TransitionPlan(tuple(actions))


def plan_transition(
    view: ClusterView, record: VModelRecord, *, now_ms: int, policy: Policy
) -> TransitionAction:
    """See the table in the module's docstring."""
    action = _without_placing(view, record, now_ms)
    return _placing(view, record, now_ms, policy) if action is None else action


def _without_placing(
    view: ClusterView, record: VModelRecord, now_ms: int
) -> TransitionAction | None:
    """The rows of the table that need no place for the target; None for the others."""
    if record.target_model_id not in view.models:
        cause = f"the target model {record.target_model_id!r} is not registered"
        return _mark(record, cause, "target_unregistered", now_ms)
    if view.lasting_on(record.target_model_id):
        return _switch(view, record, "target_loaded", now_ms)
    if record.active_model_id not in view.models:
        return _switch(view, record, "active_gone", now_ms)
    return Wait(record.name, "target_loading") if _under_way(view, record) else None


def _under_way(view: ClusterView, record: VModelRecord) -> bool:
    model_id = record.target_model_id
    loading = any(copy.state is CopyState.LOADING for copy in view.copies_of(model_id))
    return loading or bool(view.pending_of(model_id))


def _placing(
    view: ClusterView, record: VModelRecord, now_ms: int, policy: Policy
) -> LoadTarget | MarkFailed | Wait:
    target = view.models[record.target_model_id]
    placed = place(view, target, now_ms=now_ms, policy=policy)
    if isinstance(placed, Placement):
        return LoadTarget(record.name, target.model_id, placed, placed.reason)
    return _nowhere(record, placed, now_ms)


def _nowhere(record: VModelRecord, nowhere: NoPlacement, now_ms: int) -> MarkFailed | Wait:
    """A failed load is told even when it may heal: it is tried again when its failures expire."""
    if nowhere.reason != "load_failed" and nowhere.code in RETRYABLE:
        return Wait(record.name, nowhere.reason)
    return _mark(record, nowhere.detail, nowhere.reason, now_ms)


def _mark(record: VModelRecord, cause: str, reason: str, now_ms: int) -> MarkFailed | Wait:
    """Written once per cause: no write while nothing changes."""
    if record.failed == cause:
        return Wait(record.name, reason)
    return MarkFailed(record, replace(record, failed=cause, updated_at_ms=now_ms), reason)


def _switch(view: ClusterView, record: VModelRecord, reason: str, now_ms: int) -> Switch:
    new = replace(
        record,
        active_model_id=record.target_model_id,
        failed="",
        awaits_load=False,
        updated_at_ms=now_ms,
    )
    if record.active_model_id == record.target_model_id:  # its first load
        return Switch(record, new, None, reason)
    old_model = view.models.get(record.active_model_id)
    named_by_others = any(n != record.name for n in view.aliases_of(record.active_model_id))
    deletes = old_model is not None and old_model.auto_delete and not named_by_others
    return Switch(record, new, record.active_model_id if deletes else None, reason)
