"""What routers and instances ask of an instance: the methods of ``mesh.internal.v1.Instance``.

Paths, how a Load is put and understood, and how long who asks waits for it. Asks nothing itself.
"""

from __future__ import annotations

from typing import Final

from mesh.core.policy import Policy
from mesh.core.types import LoadPriority, ModelRecord
from mesh.registry import encode
from protos import mesh_internal_pb2 as internal

SERVICE: Final = "/mesh.internal.v1.Instance/"
LOAD_PATH: Final = SERVICE + "Load"
UNLOAD_PATH: Final = SERVICE + "Unload"
DESCRIBE_PATH: Final = SERVICE + "Describe"
DECISIONS_PATH: Final = SERVICE + "Decisions"
REST_PATH: Final = SERVICE + "Rest"
PATHS: Final = (LOAD_PATH, UNLOAD_PATH, DESCRIBE_PATH, DECISIONS_PATH, REST_PATH)

# An unload waits for the requests inside; it goes on when nobody waits for it any more.
UNLOAD_TIMEOUT_S: Final = 10.0

_TOLD: Final = {
    LoadPriority.AWAITED: internal.LoadRequest.AWAITED,
    LoadPriority.COPY: internal.LoadRequest.COPY,
    LoadPriority.PROACTIVE: internal.LoadRequest.PROACTIVE,
}
_MEANT: Final = {told: priority for priority, told in _TOLD.items()}


def load_request(
    model_id: str,
    model: ModelRecord | None,
    *,
    revision: int,
    last_used_at_ms: int,
    priority: LoadPriority,
    pin: bool,
    use_score: float,
    reason: str,
) -> bytes:
    """``model`` is what the instance loads by while it cannot ask the store."""
    request = internal.LoadRequest(
        model_id=model_id,
        revision=revision,
        last_used_at_ms=last_used_at_ms,
        priority=_TOLD[priority],
        model_record=encode(model) if model is not None else b"",
        pin=pin,
        use_score=use_score,
        reason=reason,
    )
    return request.SerializeToString()


def priority_of(request: internal.LoadRequest) -> LoadPriority:
    """One that a newer version has added counts as awaited, as a load without any does."""
    return _MEANT.get(request.priority, LoadPriority.AWAITED)


def load_timeout_ms(model: ModelRecord | None, policy: Policy) -> int:
    """What a load may take, its wait in the instance's queue included."""
    stated = model.load_timeout_ms if model is not None else None
    return (stated or policy.load_timeout_ms) + policy.queue_timeout_ms
