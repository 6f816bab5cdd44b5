"""What the cache of a serving pod is told, and what it tells the pod to do.

Events go in, instructions come out of ``mesh.core.cache.Cache.handle``; both are values that can be
printed and replayed. Nothing here decides anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from mesh.core.errors import MeshError
from mesh.core.types import CopyState, LoadPriority


class Reason(Enum):
    """Why the cache did what it did: metric label, log field, and what tests assert."""

    SLOT_FREE = "slot-free"  # a load slot and enough memory were there
    MEMORY_FREED = "memory-freed"  # a load that waited got its memory
    SIZE_PREDICTED = "size-predicted"  # the artifact is here and its prediction is reserved
    LOADED = "loaded"
    ALREADY_LOADED = "already-loaded"
    LOAD_FAILED = "load-failed"
    LOAD_TIMEOUT = "load-timeout"
    MEASURED_TOO_LARGE = "measured-too-large"  # larger than predicted, and nothing can make room
    TOO_LARGE = "larger-than-capacity"  # final for this instance
    NO_ROOM = "no-room"  # pinned copies hold what it needs
    WORTH_LESS = "worth-less"  # what would have to go is worth more than what nobody waits for
    NO_FREE_MEMORY = "no-free-memory"  # a proactive load would have to evict
    MEMORY_TIMEOUT = "memory-timeout"  # waited for memory or a slot for its whole time-out
    CHURN = "cache-churn"  # what would be evicted was in use a moment ago
    STILL_UNLOADING = "still-unloading"
    EVICTED = "evicted"  # to make room: the first in the eviction order
    IDLE = "idle"  # unused for its idle time-out
    ASKED = "asked"  # somebody asked to unload it
    DELETED = "deleted"  # its model record is gone
    DRAINING = "draining"  # this instance is leaving
    LOST = "lost"  # its runtime says that it has it no more


# ---- events -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoadWanted:
    """Have a copy here. Asked again it joins, and a higher priority upgrades it in place.

    ``size_bytes`` is what the record knows (stated or measured before), 0 when nothing is known.
    ``use_score`` is its past elsewhere (``mesh.core.usage``). ``kept`` copies, of a model with a
    minimum, go after all others, within a share of the capacity. ``idle_unload_ms`` 0: never.
    """

    model_id: str
    size_bytes: int
    timeout_ms: int
    last_used_at_ms: int = 0
    priority: LoadPriority = LoadPriority.AWAITED
    pinned: bool = False
    kept: bool = False
    use_score: float = 0.0
    idle_unload_ms: int = 0


@dataclass(frozen=True, slots=True)
class SizePredicted:
    """The artifact is on the disk and the runtime says how much memory it will take."""

    model_id: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class LoadFinished:
    """The runtime holds the model; ``size_bytes`` is measured. ``load_ms`` is what it took, fetch
    included: what its next miss would cost."""

    model_id: str
    size_bytes: int
    load_ms: int = 0


@dataclass(frozen=True, slots=True)
class LoadBroken:
    """Fetch or load ended without a model; nothing of it is in memory."""

    model_id: str
    error: MeshError


@dataclass(frozen=True, slots=True)
class UnloadWanted:
    """Drop the copy once its requests have ended. No-op for a model that is not here."""

    model_id: str
    reason: Reason  # ASKED or DELETED


@dataclass(frozen=True, slots=True)
class UnloadFinished:
    """The runtime has let go of the model's memory."""

    model_id: str


@dataclass(frozen=True, slots=True)
class BecameIdle:
    """Its last request in flight has ended. Only needed while ``Cache.awaiting_idle``."""

    model_id: str


@dataclass(frozen=True, slots=True)
class TermsChanged:
    """What the record says of this copy changed, all of it. No-op for a model that is not here."""

    model_id: str
    pinned: bool
    kept: bool = False
    idle_unload_ms: int = 0


@dataclass(frozen=True, slots=True)
class Drain:
    """The instance leaves: loads end as rejected, no new ones; loaded copies keep serving."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: loads beyond their time-out end, copies beyond their idle one go."""


CopyEvent = (
    LoadWanted
    | SizePredicted
    | LoadFinished
    | LoadBroken
    | UnloadWanted
    | UnloadFinished
    | BecameIdle
    | TermsChanged
)
Event = CopyEvent | Drain | Tick


# ---- instructions -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartFetch:
    """Bring the artifact to the disk, then tell ``SizePredicted`` (or ``LoadBroken``)."""

    model_id: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class StartLoad:
    """``reserved_bytes`` are set aside: load, then tell ``LoadFinished`` (or ``LoadBroken``)."""

    model_id: str
    reserved_bytes: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class AbandonLoad:
    """Nobody wants this load any more. Stop it where that is possible and tell how it ended:
    its bytes count until ``LoadBroken``, or ``LoadFinished`` and the unload that follows."""

    model_id: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class StartUnload:
    """No request is inside: let go of the memory, then tell ``UnloadFinished``.

    ``idle_ms`` is the time since its last use; ``second`` the copy that would have gone next.
    """

    model_id: str
    reason: Reason
    idle_ms: int = 0
    second: str = ""


@dataclass(frozen=True, slots=True)
class Publish:
    """Tell the store: LOADED, or REMOVED when no more requests may come here."""

    model_id: str
    state: CopyState
    size_bytes: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class RejectLoad:
    """No copy here, and it is not the model's fault: whoever waits should try elsewhere."""

    model_id: str
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class LoadEnded:
    """Whoever waits is answered: ``error`` is None when the copy is LOADED."""

    model_id: str
    reason: Reason
    size_bytes: int
    error: MeshError | None = None


Instruction = StartFetch | StartLoad | AbandonLoad | StartUnload | Publish | RejectLoad | LoadEnded
