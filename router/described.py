"""Models for people, from the cluster view: rows and descriptions of the admin service.

Pure: nothing is asked of anybody here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mesh import admin_views as views
from mesh.core.minimums import shortfall_of
from mesh.core.placement import Candidate
from mesh.core.policy import Policy
from mesh.core.slots import InstanceSlot
from mesh.core.status import model_status, name_status
from mesh.core.types import CopyState, ModelRecord
from mesh.core.view import ClusterView

# The latest use of a model that the answering router, or whom it asked, knows of beyond what the
# store tells; 0 when they do not know.
LastUsed = Callable[[str], int]


def model_row(
    view: ClusterView,
    name: str,
    now_ms: int,
    last_used: LastUsed,
    shortfall: Callable[[ModelRecord], str] = lambda model: "",
) -> views.ModelRow:
    """One name that clients use. A name that is gone has state NOT_FOUND. ``shortfall`` tells why
    a model has fewer copies than it wants."""
    status = name_status(view, name, now_ms)
    alias = view.vmodels.get(name)
    model_id = status.model_id or (alias.active_model_id if alias is not None else name)
    model = view.models.get(model_id)
    copies = view.copies_of(model_id)
    loaded = [copy for copy in copies if copy.state is CopyState.LOADED]
    moving = alias is not None and alias.target_model_id != alias.active_model_id
    target_id = alias.target_model_id if alias is not None and moving else ""
    size_bytes = max((copy.size_bytes for copy in loaded), default=0)
    if not size_bytes and model is not None:
        size_bytes = model.size_bytes_measured or model.size_bytes_stated or 0
    return views.ModelRow(
        name=name,
        model_id=model_id,
        alias=alias is not None,
        state=status.state.value,
        model_type=model.model_type if model is not None else "",
        path=model.path if model is not None else "",
        copies_loaded=len(loaded),
        copies_loading=len(copies) - len(loaded),
        instance_ids=tuple(copy.instance_id for copy in copies),
        size_bytes=size_bytes,
        min_copies=model.min_copies if model is not None else 0,
        pinned=model.pinned if model is not None else False,
        copies_wanted=copies_wanted(model) if model is not None else 0,
        shortfall=shortfall(model) if model is not None else "",
        idle_unload_ms=model.idle_unload_ms if model is not None else None,
        required_labels=model.required_labels if model is not None else (),
        preferred_labels=model.preferred_labels if model is not None else (),
        created_at_ms=model.created_at_ms if model is not None else 0,
        last_used_at_ms=max(view.last_used_at_ms(model_id), last_used(model_id)),
        failure=status.errors[0] if status.errors else "",
        target_model_id=target_id,
        target_state=model_status(view, target_id, now_ms).state.value if target_id else "",
        target_failure=alias.failed if alias is not None and moving else "",
    )


def concrete_model(
    view: ClusterView,
    model: ModelRecord,
    now_ms: int,
    *,
    details: Mapping[tuple[str, str], dict[str, Any]],
    last_used: LastUsed,
    inflight_on: Callable[[str, str], int],
) -> views.ConcreteModel:
    """A concrete model with its copies and its failures, expired ones too until they are swept.

    ``details`` are the instances' own words by (model, instance).
    """
    model_id = model.model_id
    copies = tuple(
        views.CopyView(
            instance_id=copy.instance_id,
            state=copy.state.value,
            address=view.instances[copy.instance_id].record.address,
            size_bytes=copy.size_bytes,
            claimed_at_ms=copy.claimed_at_ms,
            loaded_at_ms=copy.loaded_at_ms,
            pinned=copy.pinned,
            inflight=inflight_on(model_id, copy.instance_id),
            details=details.get((model_id, copy.instance_id), {}),
        )
        for copy in view.copies_of(model_id)
    )
    failures = tuple(
        views.FailureView(
            instance_id=failure.instance_id,
            code=failure.code,
            message=failure.message,
            failed_at_ms=failure.failed_at_ms,
            expires_at_ms=failure.expires_at_ms,
            expired=failure.expires_at_ms <= now_ms,
        )
        for failure in view.failures_of(model_id, 0)
    )
    return views.ConcreteModel(
        model_id=model_id,
        state=model_status(view, model_id, now_ms).state.value,
        model_type=model.model_type,
        path=model.path,
        key=model.key,
        size_bytes_stated=model.size_bytes_stated,
        size_bytes_measured=model.size_bytes_measured,
        min_copies=model.min_copies,
        pinned=model.pinned,
        max_concurrency=model.max_concurrency,
        max_batch_size=model.max_batch_size,
        max_batch_latency_ms=model.max_batch_latency_ms,
        load_timeout_ms=model.load_timeout_ms,
        idle_unload_ms=model.idle_unload_ms,
        required_labels=model.required_labels,
        preferred_labels=model.preferred_labels,
        auto_delete=model.auto_delete,
        labels=model.labels,
        created_at_ms=model.created_at_ms,
        last_used_at_ms=max(view.last_used_at_ms(model_id), last_used(model_id)),
        copies=copies,
        failures=failures,
    )


def copies_wanted(model: ModelRecord) -> int:
    """By a minimum or a pin; 0 when any number will do."""
    return model.min_copies if model.min_copies > 1 else int(model.pinned)


class Shortfalls:
    """Why models have fewer copies than they want, for one answer: of the first ``most`` that do,
    because each takes a look at all minimums."""

    def __init__(self, view: ClusterView, now_ms: int, policy: Policy, most: int = 100) -> None:
        self._view = view
        self._now_ms = now_ms
        self._policy = policy
        self._left = most

    def __call__(self, model: ModelRecord) -> str:
        """ "" when there is none, or it is about to be mended."""
        wanted = copies_wanted(model)
        if not wanted or self._left <= 0:
            return ""
        if len(self._view.loaded_on(model.model_id)) >= wanted and not model.pinned:
            return ""
        self._left -= 1
        short = shortfall_of(self._view, model, self._now_ms, self._policy)
        return "" if short is None else f"{short.missing} missing, {short.reason}: {short.detail}"


def instance_row(slot: InstanceSlot, *, passed_over: bool) -> views.InstanceRow:
    record = slot.record
    return views.InstanceRow(
        instance_id=record.instance_id,
        address=record.address,
        state=record.state.value,
        capacity_bytes=record.capacity_bytes,
        # Not what placement reckons with, which counts loads that wait for memory, too.
        used_bytes=record.used_bytes,
        model_count=len(slot.copies) - slot.loading,
        loading_count=slot.loads_in_progress,
        load_slots=record.load_slots,
        lru_at_ms=record.lru_at_ms,
        requests_per_minute=record.requests_per_minute,
        started_at_ms=record.started_at_ms,
        model_types=record.model_types,
        zone=record.zone,
        labels=record.labels,
        group=record.group,
        replica_set=record.replica_set,
        victim_score=record.victim_score,
        passed_over=passed_over,
        metrics_address=record.metrics_address,
        software_version=record.software_version,
    )


def candidate_view(candidate: Candidate, ranked: list[str], chosen: str) -> views.Candidate:
    """``ranked``: the instances that were not refused, best first."""
    reason = candidate.refusal or (
        f"{candidate.free_bytes} bytes free, {candidate.loads_in_progress} loading"
        + (", has to evict" if candidate.full else "")
        + (f"; {', '.join(candidate.marks)}" if candidate.marks else "")
    )
    rank = ranked.index(candidate.instance_id) + 1 if candidate.refusal is None else 0
    return views.Candidate(
        instance_id=candidate.instance_id,
        reason=reason,
        chosen=candidate.instance_id == chosen,
        rank=rank,
        full=candidate.full,
        free_bytes=candidate.free_bytes,
        loads_in_progress=candidate.loads_in_progress,
        lru_at_ms=candidate.lru_at_ms,
        marks=candidate.marks,
        zone=candidate.zone,
    )


def last_used_told(details: Mapping[tuple[str, str], dict[str, Any]], model_id: str) -> int:
    """The latest use that instances with a copy tell of; 0 for none. A copy that has answered
    nothing yet carries the instant of its load, which is no use."""
    told = (
        d.get("last_used_at_ms")
        for (m, _), d in details.items()
        if m == model_id and d.get("requests")
    )
    return max((at_ms for at_ms in told if isinstance(at_ms, int)), default=0)
