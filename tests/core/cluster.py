"""Short words to build a view in tests. Sizes are small whole numbers, times start at ``NOW``."""

from __future__ import annotations

from mesh.core.policy import Policy
from mesh.core.types import (
    CopyRecord,
    CopyState,
    FailureRecord,
    InstanceRecord,
    InstanceState,
    ModelRecord,
    VModelRecord,
)
from mesh.core.view import ClusterView

NOW = 1_000_000
POLICY = Policy(default_model_size_bytes=10, max_load_failures=3, hops_max=4)

READY, STARTING, DRAINING = InstanceState.READY, InstanceState.STARTING, InstanceState.DRAINING
LOADED, LOADING = CopyState.LOADED, CopyState.LOADING


def model(model_id: str = "m", **fields: object) -> ModelRecord:
    return ModelRecord(**{"model_id": model_id, "model_type": "onnx", **fields})  # type: ignore[arg-type]


def vmodel(name: str, active: str, target: str | None = None, **fields: object) -> VModelRecord:
    return VModelRecord(name, active, target or active, **fields)  # type: ignore[arg-type]


def instance(
    instance_id: str, state: InstanceState = READY, capacity: int = 100, **fields: object
) -> InstanceRecord:
    base = {"address": f"{instance_id}:1", "model_types": ("onnx",)}
    return InstanceRecord(
        instance_id=instance_id,
        state=state,
        capacity_bytes=capacity,
        **{**base, **fields},  # type: ignore[arg-type]
    )


def copy(
    model_id: str, instance_id: str, state: CopyState = LOADED, size: int = 10, **fields: object
) -> CopyRecord:
    return CopyRecord(model_id, instance_id, state, size_bytes=size, **fields)  # type: ignore[arg-type]


def failure(
    model_id: str, instance_id: str, code: str = "FAILED_PRECONDITION", **fields: object
) -> FailureRecord:
    base = {"failed_at_ms": NOW - 1_000, "expires_at_ms": NOW + 60_000}
    return FailureRecord(
        model_id,
        instance_id,
        code,
        str(fields.pop("message", f"{model_id} is broken on {instance_id}")),
        **{**base, **fields},  # type: ignore[arg-type]
    )


Record = ModelRecord | VModelRecord | InstanceRecord | CopyRecord | FailureRecord


def view_of(*records: Record) -> ClusterView:
    """A synced view of these records."""
    view = ClusterView()
    view.replace_models(r for r in records if isinstance(r, ModelRecord))
    view.replace_vmodels(r for r in records if isinstance(r, VModelRecord))
    view.replace_instances(r for r in records if isinstance(r, InstanceRecord))
    view.replace_copies(r for r in records if isinstance(r, CopyRecord))
    view.replace_failures(r for r in records if isinstance(r, FailureRecord))
    assert view.synced
    return view
