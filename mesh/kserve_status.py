"""The status that KServe and ModelMesh users read: of an InferenceService and of a Predictor. Pure.

``name_state`` takes from a view what one name stands at, ``standing_of`` judges it in KServe's
words, and ``service_status`` writes that down in the form of its kind. All of it is a function of
what instances said in the registry: a Deployment's status is never asked.

What the words mean here:

- *ready*: a request is answered, if after a load. So a model that was evicted (Standby, or Loading
  once more) is ready, and one that has not been loaded for the first time is not.
- ``transitionStatus``: UpToDate when what the resource asks for serves; InProgress until then;
  BlockedByFailedLoad when it did not load; InvalidSpec when it cannot even be tried. In the last
  two the model from before goes on serving and keeps the resource ready, as in ModelMesh.
- ``states``: of the model that answers, and of the one that is to; the same where they are the
  same. A Predictor's ``targetModelState`` is "" then, as it was in ModelMesh.

The time of a condition only moves when its status does. Conditions and components that are not ours
(a transformer's) are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, Literal

from mesh.core.status import model_status
from mesh.core.types import (
    CopyState,
    FailureRecord,
    InstanceState,
    ModelRecord,
    ModelState,
    VModelRecord,
)
from mesh.core.view import ClusterView
from mesh.runtime_selection import Chosen

Obj = dict[str, Any]
State = Literal["Pending", "Standby", "Loading", "Loaded", "FailedToLoad"]
Transition = Literal["UpToDate", "InProgress", "BlockedByFailedLoad", "InvalidSpec"]

LOAD_FAILED: Final = "ModelLoadFailed"
RUNTIME_UNHEALTHY: Final = "RuntimeUnhealthy"
INVALID_SPEC: Final = "InvalidPredictorSpec"

_LOCATION_CHARS: Final = 12  # of a pod's name, as in ModelMesh
_INSTANCE_SUFFIX_CHARS: Final = 9  # "-" and eight hex digits: what an instance adds to its pod's
_MESSAGE_CHARS: Final = 1_024
_OURS: Final = frozenset({"IngressReady", "PredictorReady", "Ready"})
_OTHERS: Final = ("transformer", "explainer")  # components that are somebody else's


# ---- what the registry says ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelSeen:
    """One model behind a name; ``record`` is None while it is not registered. ``pods``: READY
    instances that could run it, None where nobody asked because it has copies. ``failures``:
    unexpired ones, the latest first."""

    model_id: str
    state: ModelState
    record: ModelRecord | None = None
    loaded: int = 0
    failures: tuple[FailureRecord, ...] = ()
    pods: int | None = None


@dataclass(frozen=True, slots=True)
class NameState:
    """One name in the registry. ``active`` and ``target`` are equal but during a switch; None
    without an alias. ``direct``: a model of that id was registered by itself."""

    name: str
    alias: VModelRecord | None = None
    active: ModelSeen | None = None
    target: ModelSeen | None = None
    direct: bool = False


def name_state(view: ClusterView, name: str, now_ms: int) -> NameState:
    alias = view.vmodels.get(name)
    if alias is None:
        return NameState(name, direct=name in view.models)
    active = _seen(view, alias.active_model_id, now_ms)
    same = alias.active_model_id == alias.target_model_id
    target = active if same else _seen(view, alias.target_model_id, now_ms)
    return NameState(name, alias, active, target)


def _seen(view: ClusterView, model_id: str, now_ms: int) -> ModelSeen:
    state = model_status(view, model_id, now_ms).state
    copies = [copy.state for copy in view.copies_of(model_id)]
    return ModelSeen(
        model_id,
        state,
        view.models.get(model_id),
        loaded=copies.count(CopyState.LOADED),
        failures=view.failures_of(model_id, now_ms),
        pods=None if copies else _pods_for(view, model_id),
    )


def _pods_for(view: ClusterView, model_id: str) -> int:
    model = view.models.get(model_id)
    if model is None:
        return 0
    required = set(model.required_labels)
    return sum(
        slot.record.state is InstanceState.READY
        and model.model_type in slot.record.model_types
        and required <= slot.labels
        for slot in view.instances.values()
    )


# ---- what that means ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a resource cannot be acted on: one of KServe's reasons, and what is wrong."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class FailureInfo:
    reason: str
    message: str
    model_id: str = ""
    location: str = ""
    at_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """A name as KServe would put it. ``reason`` and ``message`` say why it is not ready, or what
    keeps its latest spec from serving."""

    ready: bool
    active: State
    target: State
    transition: Transition
    reason: str = ""
    message: str = ""
    failure: FailureInfo | None = None
    copies: int = 0
    failed_copies: int = 0
    active_model_id: str = ""
    target_model_id: str = ""


NO_REGISTRY: Final = Standing(
    ready=False,
    active="Pending",
    target="Pending",
    transition="InProgress",
    reason="RegistryAway",
    message="the mesh's registry (etcd) cannot be reached: it is registered when it is back",
)


def standing_of(
    state: NameState, *, refusal: Refusal | None = None, secret_fault: str = "", runtime: str = ""
) -> Standing:
    """``refusal``: the resource as it is now cannot be acted on. ``secret_fault``: what the storage
    secret lacks for it. ``runtime``: the one that was chosen, for messages."""
    if state.alias is None or state.active is None or state.target is None:
        registering = Standing(
            False,
            "Pending",
            "Pending",
            "InProgress",
            "Pending",
            "it is not registered yet",
        )
        return _refused(registering, refusal) if refusal is not None else registering
    alias, active, target = state.alias, state.active, state.target
    active_state = _state(active, alias)
    target_state = _state(target, alias)
    idle = target_state in ("Pending", "Standby")
    if (alias.failed and target_state not in ("Loaded", "Loading")) or (secret_fault and idle):
        target_state = "FailedToLoad"
    switching = active.model_id != target.model_id
    if not switching:
        active_state = target_state
    again = active_state == "Loading" and not alias.awaits_load
    failure = _failure(target, active, alias, target_state, secret_fault)
    found = Standing(
        ready=again or active_state in ("Loaded", "Standby"),
        active=active_state,
        target=target_state,
        transition=_transition(target_state, switching, alias),
        failure=failure,
        copies=active.loaded,
        failed_copies=len(active.failures) + (len(target.failures) if switching else 0),
        active_model_id=active.model_id,
        target_model_id=target.model_id,
    )
    if refusal is not None:
        return _refused(found, refusal)
    reason, message = _why(found, target, switching, runtime)
    return replace(found, reason=reason, message=message)


def _refused(standing: Standing, refusal: Refusal) -> Standing:
    return replace(
        standing,
        target="FailedToLoad",
        transition="InvalidSpec",
        reason=refusal.reason,
        message=refusal.message,
        failure=FailureInfo(refusal.reason, refusal.message),
    )


def _state(model: ModelSeen, alias: VModelRecord) -> State:
    match model.state:
        case ModelState.LOADED:
            return "Loaded"
        case ModelState.LOADING:
            return "Loading"
        case ModelState.LOADING_FAILED:
            return "FailedToLoad"
        case _:
            fresh = alias.awaits_load or model.model_id != alias.active_model_id
            return "Pending" if fresh or model.state is ModelState.NOT_FOUND else "Standby"


def _transition(target: State, switching: bool, alias: VModelRecord) -> Transition:
    if target == "FailedToLoad" or (switching and alias.failed):
        return "BlockedByFailedLoad"
    waits = alias.awaits_load and target != "Loaded"
    return "InProgress" if switching or waits or target == "Pending" else "UpToDate"


def _failure(
    target: ModelSeen, active: ModelSeen, alias: VModelRecord, state: State, secret_fault: str
) -> FailureInfo | None:
    """What the target lacks, else the latest failed load of it, else of what answers."""
    if secret_fault and state == "FailedToLoad":
        return FailureInfo(LOAD_FAILED, secret_fault, target.model_id)
    for model in (target, active):
        if model.failures:
            last = model.failures[0]
            location = pod_of(last.instance_id)[-_LOCATION_CHARS:]
            message = last.message or last.code
            return FailureInfo(LOAD_FAILED, message, model.model_id, location, last.failed_at_ms)
    if alias.failed:
        reason = RUNTIME_UNHEALTHY if target.pods == 0 else LOAD_FAILED
        return FailureInfo(reason, alias.failed, target.model_id)
    return None


def pod_of(instance_id: str) -> str:
    """The name of an instance's pod: an instance adds eight hex digits to it."""
    name, dash, suffix = instance_id.rpartition("-")
    hexadecimal = all(character in "0123456789abcdef" for character in suffix)
    is_instance = dash and len(suffix) + 1 == _INSTANCE_SUFFIX_CHARS and hexadecimal
    return name if is_instance else instance_id


def _why(standing: Standing, target: ModelSeen, switching: bool, runtime: str) -> tuple[str, str]:
    if standing.target == "FailedToLoad" or standing.transition == "BlockedByFailedLoad":
        failure = standing.failure or FailureInfo(LOAD_FAILED, "the model did not load")
        serving = "; the model from before goes on serving" if switching and standing.ready else ""
        return failure.reason, failure.message + serving
    if standing.transition == "UpToDate":
        return "", ""
    if standing.target == "Loading":
        return "Loading", f"{target.model_id} is being loaded"
    if target.pods == 0:
        of = f" of the runtime {runtime!r}" if runtime else ""
        return "Pending", f"{target.model_id} waits for a serving pod{of} to be ready"
    return "Pending", f"{target.model_id} is registered and about to be loaded"


# ---- how that is written ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where clients reach a namespace's mesh. ``fault``: why nobody does now."""

    grpc: str
    rest: str
    fault: str = ""


def endpoints_of(
    namespace: str,
    *,
    service: str = "modelmesh-serving",
    grpc_port: int = 8033,
    rest_port: int = 8008,
    tls: bool = False,
) -> Endpoints:
    """Of the routers' Service, as ModelMesh wrote them."""
    host = f"{service}.{namespace}"
    scheme = "https" if tls else "http"
    return Endpoints(f"grpc://{host}:{grpc_port}", f"{scheme}://{host}:{rest_port}")


def service_status(
    resource: Mapping[str, Any],
    standing: Standing,
    *,
    chosen: Chosen | None,
    endpoints: Endpoints,
    now_ms: int,
) -> Obj:
    """The whole new status of an InferenceService or a Predictor, from the one it has."""
    before = resource.get("status") or {}
    generation = (resource.get("metadata") or {}).get("generation")
    if resource.get("kind") == "Predictor":
        status = _predictor_status(standing, before, endpoints)
    else:
        status = _inference_service_status(standing, before, chosen, endpoints, now_ms)
    if isinstance(generation, int):
        status["observedGeneration"] = generation
    return status


def _inference_service_status(
    standing: Standing,
    before: Mapping[str, Any],
    chosen: Chosen | None,
    endpoints: Endpoints,
    now_ms: int,
) -> Obj:
    states = {"activeModelState": standing.active, "targetModelState": standing.target}
    known = (before.get("modelStatus") or {}).get("lastFailureInfo")
    failure = _failure_info(standing, known, "modelRevisionName")
    status: Obj = {
        "conditions": _conditions(standing, before, endpoints, now_ms),
        "deploymentMode": "ModelMesh",
        "modelStatus": {
            "transitionStatus": standing.transition,
            "states": states,
            "copies": {"failedCopies": standing.failed_copies, "totalCopies": standing.copies},
            **({"lastFailureInfo": failure} if failure else {}),
        },
    }
    components = {
        name: component
        for name, component in (before.get("components") or {}).items()
        if name in _OTHERS
    }
    if standing.active_model_id:
        status["url"] = endpoints.grpc
        status["address"] = {"url": endpoints.rest}
        components["predictor"] = {
            "url": endpoints.grpc,
            "grpcUrl": endpoints.grpc,
            "restUrl": endpoints.rest,
            "latestCreatedRevision": standing.target_model_id,
            **(_traffic(standing) if standing.ready else {}),
        }
    if components:
        status["components"] = components
    if chosen is not None:
        name = "clusterServingRuntimeName" if chosen.cluster else "servingRuntimeName"
        status[name] = chosen.name
    return status


def _traffic(standing: Standing) -> Obj:
    """All of it goes to the model that answers: what `kubectl get` shows as Latest and Prev."""
    active = standing.active_model_id
    latest = active == standing.target_model_id
    share: Obj = {"revisionName": active, "percent": 100, "latestRevision": latest}
    if not latest:
        share["tag"] = "prev"
    return {"latestReadyRevision": active, "traffic": [share]}


def _conditions(
    standing: Standing, before: Mapping[str, Any], endpoints: Endpoints, now_ms: int
) -> list[Obj]:
    known = {
        one["type"]: one
        for one in before.get("conditions") or ()
        if isinstance(one, dict) and isinstance(one.get("type"), str)
    }
    fault = ("NoEndpoint", endpoints.fault) if endpoints.fault else ("", "")
    ready = standing.ready and not endpoints.fault
    why = (standing.reason, standing.message) if not standing.ready or ready else fault
    ours = {
        "IngressReady": (not endpoints.fault, fault),
        "PredictorReady": (standing.ready, (standing.reason, standing.message)),
        "Ready": (ready, why),
    }
    others = {kind: one for kind, one in known.items() if kind.lower().startswith(_OTHERS)}
    written = {
        kind: _condition(kind, is_true, reason, message, known.get(kind), now_ms)
        for kind, (is_true, (reason, message)) in ours.items()
    }
    return [one for _, one in sorted({**others, **written}.items())]


def _condition(
    kind: str,
    is_true: bool,
    reason: str,
    message: str,
    known: Mapping[str, Any] | None,
    now_ms: int,
) -> Obj:
    status = "True" if is_true else "False"
    since = known.get("lastTransitionTime") if known and known.get("status") == status else None
    found: Obj = {"type": kind, "status": status, "lastTransitionTime": since or rfc3339(now_ms)}
    if reason:
        found["reason"] = reason
    if message:
        found["message"] = _cut(message)
    return found


def _predictor_status(standing: Standing, before: Mapping[str, Any], endpoints: Endpoints) -> Obj:
    same = standing.active_model_id == standing.target_model_id
    settled = same and standing.transition != "InvalidSpec"
    failure = _failure_info(standing, before.get("lastFailureInfo"), "modelId")
    status: Obj = {
        "available": standing.ready and not endpoints.fault,
        "transitionStatus": standing.transition,
        "activeModelState": standing.active,
        "targetModelState": "" if settled else standing.target,
        "totalCopies": standing.copies,
        "failedCopies": standing.failed_copies,
    }
    if failure:
        status["lastFailureInfo"] = failure
    if standing.active_model_id:
        status["grpcEndpoint"] = endpoints.grpc
        status["httpEndpoint"] = endpoints.rest
    return status


def _failure_info(standing: Standing, known: object, model_key: str) -> Obj | None:
    """What failed last. A failure that is not in the registry any more is still told while the
    model that it was of is tried again."""
    failure = standing.failure
    if failure is None:
        trying = standing.transition == "InProgress"
        if trying and isinstance(known, dict) and known.get(model_key) == standing.target_model_id:
            return dict(known) if standing.target_model_id else None
        return None
    found: Obj = {"reason": failure.reason, "message": _cut(failure.message)}
    if failure.model_id:
        found[model_key] = failure.model_id
    if failure.location:
        found["location"] = failure.location
    if failure.at_ms is not None:
        found["time"] = rfc3339(failure.at_ms)
    return found


def _cut(message: str) -> str:
    one_line = " ".join(message.split())
    return one_line if len(one_line) <= _MESSAGE_CHARS else one_line[: _MESSAGE_CHARS - 1] + "…"


def rfc3339(at_ms: int) -> str:
    """As ``metav1.Time`` is written: whole seconds in UTC."""
    return datetime.fromtimestamp(at_ms // 1_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def same_status(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether they say the same, whenever it was that it became so."""
    return one == other or bool(_timeless(one or {}) == _timeless(other or {}))


def _timeless(value: object) -> object:
    match value:
        case dict():
            kept = {k: v for k, v in value.items() if k not in ("lastTransitionTime", "time")}
            return {k: _timeless(v) for k, v in kept.items() if v is not None}
        case list():
            return [_timeless(one) for one in value]
        case _:
            return value
