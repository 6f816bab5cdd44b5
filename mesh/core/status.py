"""How a model stands, in the words that clients see (ModelMesh's).

Read from the view alone; nothing is remembered. A name that resolves to nothing is a status
(NOT_FOUND), not an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mesh.core.types import CopyState, ModelState, VModelRecord
from mesh.core.view import ClusterView, Unresolved


@dataclass(frozen=True, slots=True)
class CopyInfo:
    """One copy, or one place where it did not load. ``at_ms``: loaded, claimed or failed then."""

    instance_id: str
    state: ModelState
    at_ms: int
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """``copies`` and ``errors`` are the latest first; ``model_id`` is "" for NOT_FOUND."""

    name: str
    model_id: str
    state: ModelState
    copies: tuple[CopyInfo, ...] = ()
    errors: tuple[str, ...] = ()


VModelPhase = Literal["NOT_FOUND", "DEFINED", "TRANSITIONING", "TRANSITION_FAILED"]


def name_status(view: ClusterView, name: str, now_ms: int) -> ModelStatus:
    """The status of what ``name`` (alias or model id) means now."""
    found = view.resolve(name)
    if isinstance(found, Unresolved):
        return ModelStatus(name, "", ModelState.NOT_FOUND, errors=(found.detail,))
    return model_status(view, found.model_id, now_ms, name=name)


def model_status(
    view: ClusterView, model_id: str, now_ms: int, *, name: str | None = None
) -> ModelStatus:
    """LOADED if any copy is, else LOADING if any is or was asked for, else what failed last."""
    shown = name if name is not None else model_id
    if model_id not in view.models:
        detail = f"model not found: {model_id!r}"
        return ModelStatus(shown, "", ModelState.NOT_FOUND, errors=(detail,))
    infos: list[CopyInfo] = []
    for copy in view.copies_of(model_id):
        loaded = copy.state is CopyState.LOADED
        state = ModelState.LOADED if loaded else ModelState.LOADING
        at_ms = copy.loaded_at_ms if loaded else copy.claimed_at_ms
        infos.append(CopyInfo(copy.instance_id, state, at_ms, copy.size_bytes))
    for instance_id in view.pending_of(model_id):
        pending = view.instances[instance_id].pending[model_id]
        infos.append(
            CopyInfo(instance_id, ModelState.LOADING, pending.asked_at_ms, pending.size_bytes)
        )
    states = {info.state for info in infos}
    failures = view.failures_of(model_id, now_ms)
    for failure in failures:
        if not any(info.instance_id == failure.instance_id for info in infos):
            infos.append(
                CopyInfo(failure.instance_id, ModelState.LOADING_FAILED, failure.failed_at_ms)
            )
    infos.sort(key=lambda info: (-info.at_ms, info.instance_id))
    if ModelState.LOADED in states:
        overall = ModelState.LOADED
    elif ModelState.LOADING in states:
        overall = ModelState.LOADING
    elif failures:
        overall = ModelState.LOADING_FAILED
    else:
        overall = ModelState.NOT_LOADED
    errors = tuple(f"{f.instance_id}: {f.code}: {f.message}" for f in failures)
    return ModelStatus(shown, model_id, overall, tuple(infos), errors)


def vmodel_phase(record: VModelRecord | None) -> VModelPhase:
    """Where an alias stands: at its target, on its way, or held because the target failed."""
    if record is None:
        return "NOT_FOUND"
    if record.active_model_id == record.target_model_id:
        return "DEFINED"
    return "TRANSITION_FAILED" if record.failed else "TRANSITIONING"
