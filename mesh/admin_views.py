"""What the admin service's JSON answers hold: behind ``mesh get``, ``describe`` and ``explain``.

A router encodes them (``router.admin``), the command line decodes them (``mesh.cli``). They are
views for people: names of states are those of ``mesh.core.types``, instants are Unix milliseconds
(0 is "never" or "unknown"), sizes are bytes.

Adjacent versions mix: ``decode`` leaves out fields that it does not know and fills in defaults for
those that are missing, so that an older command line reads a newer router and the reverse. It
raises ``InvalidArgument`` for what is not JSON or has a field of the wrong shape.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import orjson

from mesh.core.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class CopyView:
    """One copy of a model. ``state`` is a ``CopyState``; what an instance adds of its own (queue,
    progress, timings) stands in ``details``."""

    instance_id: str
    state: str = ""
    address: str = ""
    size_bytes: int = 0
    claimed_at_ms: int = 0
    loaded_at_ms: int = 0
    pinned: bool = False  # it stays whatever comes
    inflight: int = 0  # requests of the answering router on it
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FailureView:
    """A load failure that has not been swept. ``code`` is a gRPC code's name."""

    instance_id: str
    code: str = ""
    message: str = ""
    failed_at_ms: int = 0
    expires_at_ms: int = 0
    expired: bool = False


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One line of ``mesh get models``: a name that clients use, and what answers for it.

    ``name`` is an alias (``alias`` is true) or a directly registered model's id. ``state`` is a
    ``ModelState`` of the active model. ``target_model_id`` is set while a changed spec is being
    loaded, ``target_failure`` when that failed (the old one keeps serving).
    """

    name: str
    model_id: str = ""
    alias: bool = False
    state: str = ""
    model_type: str = ""
    path: str = ""
    copies_loaded: int = 0
    copies_loading: int = 0
    instance_ids: tuple[str, ...] = ()
    size_bytes: int = 0
    min_copies: int = 0
    pinned: bool = False
    copies_wanted: int = 0  # by minimum or pin; 0 for none
    shortfall: str = (
        ""  # why there are fewer than that: reason and detail, "" when it will be mended
    )
    idle_unload_ms: int | None = None  # None: the policy's
    required_labels: tuple[str, ...] = ()
    preferred_labels: tuple[str, ...] = ()
    created_at_ms: int = 0
    last_used_at_ms: int = 0
    failure: str = ""
    target_model_id: str = ""
    target_state: str = ""
    target_failure: str = ""


@dataclass(frozen=True, slots=True)
class InstanceRow:
    """One line of ``mesh get instances``."""

    instance_id: str
    address: str = ""
    state: str = ""
    capacity_bytes: int = 0
    used_bytes: int = 0
    model_count: int = 0
    loading_count: int = 0
    load_slots: int = 0
    lru_at_ms: int = 0
    requests_per_minute: int = 0
    started_at_ms: int = 0
    model_types: tuple[str, ...] = ()
    zone: str = ""
    labels: tuple[str, ...] = ()
    group: str = ""
    replica_set: str = ""
    victim_score: float = 0.0  # worth of the copy that would go first; 0.0: nothing to evict
    passed_over: bool = False  # it does not answer the answering router
    metrics_address: str = ""
    software_version: str = ""

    @property
    def free_bytes(self) -> int:
        return max(0, self.capacity_bytes - self.used_bytes)


@dataclass(frozen=True, slots=True)
class ConcreteModel:
    """A concrete model with everything that the store and its instances say of it."""

    model_id: str
    state: str = ""
    model_type: str = ""
    path: str = ""
    key: str = ""
    size_bytes_stated: int | None = None
    size_bytes_measured: int | None = None
    min_copies: int = 0
    pinned: bool = False
    max_concurrency: int | None = None
    max_batch_size: int | None = None
    max_batch_latency_ms: int | None = None
    load_timeout_ms: int | None = None
    idle_unload_ms: int | None = None
    required_labels: tuple[str, ...] = ()
    preferred_labels: tuple[str, ...] = ()
    auto_delete: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    created_at_ms: int = 0
    last_used_at_ms: int = 0
    copies: tuple[CopyView, ...] = ()
    failures: tuple[FailureView, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """``mesh describe model NAME``. ``target`` only while it is not the active model.

    ``manifest`` is the resource as applied, None when the name was registered otherwise; ``status``
    is what KServe's users read of it (``mesh.kserve_status``).
    ``unreachable`` names instances that did not answer in time, with the reason.
    """

    row: ModelRow
    active: ConcreteModel | None = None
    target: ConcreteModel | None = None
    manifest: Mapping[str, Any] | None = None
    status: Mapping[str, Any] | None = None
    updated_at_ms: int = 0
    unreachable: Mapping[str, str] = field(default_factory=dict)
    view_revision: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """An instance as a placement sees it. ``reason`` says why it was refused outright (``rank`` is
    0 then), or what it has to offer."""

    instance_id: str
    reason: str = ""
    chosen: bool = False
    rank: int = 0  # 1 is best; 0 when it was refused outright
    full: bool = False
    free_bytes: int = 0
    loads_in_progress: int = 0
    lru_at_ms: int = 0
    marks: tuple[str, ...] = ()  # what speaks against it without refusing it
    zone: str = ""


@dataclass(frozen=True, slots=True)
class Explanation:
    """``mesh explain NAME``: where a request for the name would go now, and why.

    ``action``: ``hit`` (a copy answers), ``join`` (it waits for a load under way), ``load`` (a
    load would start), ``wait`` (for a place; in vain, it ends with ``code``), ``refused`` (an
    error; ``code`` names its gRPC code) or ``not_found``. ``shortfall`` tells why the model has
    fewer copies than it wants.
    ``reason`` is the decision's label, the same as in metrics and logs; ``text`` tells it to a
    person. ``candidates`` are best first.
    """

    name: str
    model_id: str = ""
    action: str = ""
    instance_id: str = ""
    address: str = ""
    reason: str = ""
    runner_up: str = ""
    candidates: tuple[Candidate, ...] = ()
    view_revision: int = 0
    text: str = ""
    via: str = ""  # vmodel | model
    state: str = ""
    code: str = ""
    target_model_id: str = ""
    copies: tuple[CopyView, ...] = ()
    errors: tuple[str, ...] = ()
    shortfall: str = ""


@dataclass(frozen=True, slots=True)
class DecisionRow:
    """One line of ``mesh explain --decisions``. ``who`` decided: a router's or instance's id."""

    at_ms: int
    kind: str
    reason: str
    model_id: str = ""
    instance_id: str = ""
    runner_up: str = ""
    detail: str = ""
    who: str = ""


@dataclass(frozen=True, slots=True)
class DecisionList:
    """The last decisions, latest first. ``unreachable`` names who was not heard, with the reason;
    ``asked`` counts the processes that were."""

    rows: tuple[DecisionRow, ...] = ()
    unreachable: Mapping[str, str] = field(default_factory=dict)
    asked: int = 0


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """One line of ``mesh policy``. ``source``: ``default``, ``flag`` (how the answering router was
    started) or ``live`` (``config/policy``)."""

    name: str
    value: Any = None
    default: Any = None
    source: str = ""
    unit: str = ""
    expected: str = ""
    group: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PolicyView:
    """Every threshold as the answering router has it. ``refused`` tells why what stands in
    ``config/policy`` is not acted on, "" where it is; ``warnings`` are about a change."""

    rows: tuple[PolicyRow, ...] = ()
    refused: str = ""
    warnings: tuple[str, ...] = ()


T = TypeVar("T")


def encode(view: object) -> str:
    """JSON text of one view, or of a list or tuple of views."""
    if isinstance(view, (list, tuple)):
        return orjson.dumps([asdict(item) for item in view]).decode()
    assert is_dataclass(view) and not isinstance(view, type)
    return orjson.dumps(asdict(view)).decode()


def decode(cls: type[T], text: str | bytes) -> T:
    """One view of the given class. Raises InvalidArgument."""
    return _build(cls, _parse(text), cls.__name__)


def decode_list(cls: type[T], text: str | bytes) -> tuple[T, ...]:
    """A JSON array of views. Raises InvalidArgument."""
    items = _parse(text)
    if not isinstance(items, list):
        raise InvalidArgument(f"a list of {cls.__name__} was expected, got {type(items).__name__}")
    return tuple(_build(cls, item, f"{cls.__name__}[{at}]") for at, item in enumerate(items))


def _parse(text: str | bytes) -> object:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(f"not JSON: {error}") from error


def _build(cls: type[T], value: object, where: str) -> T:
    if not isinstance(value, dict):
        raise InvalidArgument(f"{where}: an object was expected, got {type(value).__name__}")
    hints = get_type_hints(cls)
    known: dict[str, Any] = {
        item.name: _value(hints[item.name], value[item.name], f"{where}.{item.name}")
        for item in fields(cls)  # type: ignore[arg-type]
        if item.name in value
    }
    try:
        return cls(**known)
    except TypeError as error:
        raise InvalidArgument(f"{where}: {error}") from error


def _value(hint: Any, value: object, where: str) -> Any:
    """Check ``value`` against the few kinds of annotation that the views use."""
    if hint is Any:
        return value
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (one for one in get_args(hint) if one is not type(None))
        return _value(hint, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise InvalidArgument(f"{where}: a list was expected, got {type(value).__name__}")
        item_hint = get_args(hint)[0]
        return tuple(_value(item_hint, one, f"{where}[{at}]") for at, one in enumerate(value))
    if isinstance(hint, type) and is_dataclass(hint):
        return _build(hint, value, where)
    expected = dict if origin is not None else hint
    if not isinstance(value, expected):
        raise InvalidArgument(
            f"{where}: {expected.__name__} was expected, got {type(value).__name__}"
        )
    return value
