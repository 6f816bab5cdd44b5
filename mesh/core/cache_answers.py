"""What the cache says to those whose load it cannot carry out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from mesh.core.cache_events import Reason, RejectLoad
from mesh.core.errors import Code, LoadFailed

_WHY: Final[Mapping[Reason, str]] = {
    Reason.DRAINING: "this instance is draining",
    Reason.NO_ROOM: "{need} bytes are needed and pinned copies hold the memory",
    Reason.NO_FREE_MEMORY: "{need} bytes are not free, and nobody waits for this load",
    Reason.WORTH_LESS: "what would have to go for {need} bytes is worth more, and nobody waits",
    Reason.MEMORY_TIMEOUT: "no load slot or no {need} bytes of memory in time",
    Reason.CHURN: "the copies that would have to go were in use a moment ago",
    Reason.STILL_UNLOADING: "an earlier copy is still being unloaded",
    Reason.ASKED: "it was told to unload",
}


def rejection(model_id: str, need_bytes: int, reason: Reason) -> RejectLoad:
    why = _WHY[reason].format(need=need_bytes)
    return RejectLoad(model_id, reason, f"model {model_id!r} is not loaded here: {why}")


def too_large(model_id: str, size_bytes: int, capacity_bytes: int) -> LoadFailed:
    """Final: no eviction can help on this instance."""
    return LoadFailed(
        f"model {model_id!r} needs {size_bytes} bytes; this instance has {capacity_bytes} for all "
        "its models. Give instances more capacity"
    )


def outgrown(model_id: str, size_bytes: int, overrun_bytes: int) -> LoadFailed:
    return LoadFailed(
        f"model {model_id!r} takes {size_bytes} bytes, {overrun_bytes} more than predicted, and "
        "nothing can make room for them",
        code=Code.UNAVAILABLE,
    )


def too_slow(model_id: str) -> LoadFailed:
    return LoadFailed(
        f"loading model {model_id!r} took longer than its time-out", code=Code.UNAVAILABLE
    )
