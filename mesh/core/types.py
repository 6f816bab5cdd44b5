"""The values that the control plane is made of.

Records are what stands in the store, one frozen dataclass each; they are encoded only by
``mesh.registry``. ``extra`` keeps fields that a newer version wrote, so that rewriting a record
loses nothing while adjacent versions run side by side.

Units end a name: ``lru_age_ms`` is a duration, ``last_used_at_ms`` an instant (Unix epoch).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class CopyState(Enum):
    """Where one copy of one model on one instance stands. Only three of these are published."""

    QUEUED = "QUEUED"  # claimed, waits for a load slot
    WAITING = "WAITING"  # has a slot, waits for memory that is being freed
    LOADING = "LOADING"  # artifact is being fetched, or the runtime is loading it
    SIZING = "SIZING"  # loaded, its real size is being taken
    LOADED = "LOADED"  # answers requests
    FAILED = "FAILED"  # did not load; leaves the cache at once, the cause stays in the store
    UNLOADING = "UNLOADING"  # leaves; its bytes count until the runtime has let go
    REMOVED = "REMOVED"  # gone


class ModelState(Enum):
    """A model's state as clients see it (ModelMesh's words)."""

    NOT_FOUND = "NOT_FOUND"
    NOT_LOADED = "NOT_LOADED"
    LOADING = "LOADING"
    LOADED = "LOADED"
    LOADING_FAILED = "LOADING_FAILED"
    UNKNOWN = "UNKNOWN"


class LoadPriority(Enum):
    """Why a load is wanted: who goes first, and who may push others out."""

    AWAITED = "AWAITED"  # a request waits for it: first in the queue, evicts
    COPY = "COPY"  # one more copy (scaling, a minimum, a drain): behind those, evicts what is older
    PROACTIVE = "PROACTIVE"  # ahead of any request: last, and never evicts


class InstanceState(Enum):
    STARTING = "STARTING"  # runtimes are not ready yet
    READY = "READY"
    DRAINING = "DRAINING"  # finishes what is in flight, takes nothing new


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A registered concrete model: ``models/<model_id>``.

    ``model_type``, ``path`` and ``key`` are ModelMesh's ``ModelInfo``: opaque to placement.
    ``path`` is a URI (``s3://bucket/dir``, ``file:///dir``, ``pvc://claim/dir``) or a path inside
    the storage that ``key`` (JSON: ``storage_key``, ``storage_params``, ``schema_path``,
    ``disk_size_bytes``, ``model_type``) names. ``model_type`` is the runtime format, for example
    ``onnx`` or ``sklearn``.
    """

    model_id: str
    model_type: str
    path: str = ""
    key: str = ""
    size_bytes_stated: int | None = None  # by the user: reserved for each load, then measured
    size_bytes_measured: int | None = None  # by the last load: the prediction when none is stated
    min_copies: int = 0  # soft minimum; 0 and 1 pin nothing
    pinned: bool = False  # one copy is kept hard
    max_concurrency: int | None = None  # requests at once on one copy
    max_batch_size: int | None = None  # rows that are run together at most; 0 and 1: never
    max_batch_latency_ms: int | None = None  # a request is held so long for others
    load_timeout_ms: int | None = None
    idle_unload_ms: int | None = (
        None  # unused for so long a copy goes; None: the policy's; 0: never
    )
    required_labels: tuple[str, ...] = ()  # only instances that have all of them
    preferred_labels: tuple[str, ...] = ()  # instances that have all of them, where there is room
    auto_delete: bool = False  # goes when no alias names it any more
    labels: Mapping[str, str] = field(default_factory=dict)
    created_at_ms: int = 0
    last_used_at_ms: int = 0
    version: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VModelRecord:
    """A stable name whose target can move: ``vmodels/<name>``.

    ``active_model_id`` answers requests. ``target_model_id`` differs from it only during a switch:
    the elected leader has the target loaded and then moves ``active`` in one transaction. A new
    name that ``awaits_load`` is on its way as well: its model is loaded before anybody asks.
    ``failed`` tells that the target did not load (the old one keeps serving).
    """

    name: str
    active_model_id: str
    target_model_id: str
    owner: str = ""
    failed: str = ""  # cause, "" when the target has not failed
    awaits_load: bool = False  # the leader has the target loaded once, then it is as any other
    manifest: str = ""  # the resource as applied, JSON; "" when registered otherwise
    created_at_ms: int = 0
    updated_at_ms: int = 0
    version: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """What a serving pod says of itself: ``instances/<instance_id>``, under its lease."""

    instance_id: str
    address: str  # host:port of its gRPC listener
    state: InstanceState
    capacity_bytes: int
    used_bytes: int = 0
    model_count: int = 0
    loading_count: int = 0
    load_slots: int = 1
    lru_at_ms: int = 0  # last use of the model that would be evicted first; 0 when empty
    requests_per_minute: int = 0
    started_at_ms: int = 0
    model_types: tuple[str, ...] = ()  # formats that it can run
    zone: str = ""
    labels: tuple[str, ...] = ()
    group: str = ""  # the deployment that it belongs to
    replica_set: str = ""  # that deployment's generation: a newer one replaces the older ones
    victim_score: float = 0.0  # worth of the copy that would go first; 0.0: nothing to evict
    metrics_address: str = ""
    software_version: str = ""
    version: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def free_bytes(self) -> int:
        return max(0, self.capacity_bytes - self.used_bytes)


@dataclass(frozen=True, slots=True)
class CopyRecord:
    """One copy: ``copies/<model_id>/<instance_id>``, under the instance's lease.

    ``state`` is LOADING (the claim) or LOADED. ``size_bytes`` is predicted while loading and
    measured after.
    """

    model_id: str
    instance_id: str
    state: CopyState
    size_bytes: int = 0
    claimed_at_ms: int = 0
    loaded_at_ms: int = 0
    pinned: bool = False  # this is the copy of a pinned model that stays whatever comes
    version: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FailureRecord:
    """Why a load failed: ``failures/<model_id>/<instance_id>``. No lease: it outlives the pod.

    ``code`` is the name of a ``mesh.core.errors.Code``. Until ``expires_at_ms`` the model is not
    tried on that instance again.
    """

    model_id: str
    instance_id: str
    code: str
    message: str
    failed_at_ms: int
    expires_at_ms: int
    version: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TypeConstraint:
    """What instances must and should have to run a format: of a runtime's resource.

    A model's own ``required_labels`` and ``preferred_labels`` come on top of it.
    """

    model_type: str
    required: tuple[str, ...] = ()
    preferred: tuple[str, ...] = ()
