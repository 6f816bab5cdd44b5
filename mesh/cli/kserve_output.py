"""How resources of KServe's kinds are shown: the tables that kubectl shows of them, and a status.

Pure formatting. A resource is what a router's List gives: as it was applied, with its status. The
columns are those of deploy/crds, so that both commands show the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from mesh.cli.output import Column
from mesh.cli.quantities import format_age

Obj = Mapping[str, Any]


def columns_of(resource_kind: str, now_ms: int) -> tuple[Column[Obj], ...]:
    """Of InferenceServices, of Predictors, or of runtimes."""
    name: Column[Obj] = Column("NAME", lambda one: _text(one, "metadata", "name"))
    age: Column[Obj] = Column("AGE", lambda one: _age(one, now_ms))
    match resource_kind:
        case "InferenceService":
            return (name, *_service_columns(age))
        case "Predictor":
            return (name, *_predictor_columns(), age)
        case _:
            return (name, *_runtime_columns(), age)


def _service_columns(age: Column[Obj]) -> Sequence[Column[Obj]]:
    return (
        Column("URL", lambda one: _text(one, "status", "url")),
        Column("READY", lambda one: _condition(one, "Ready").get("status") or "-"),
        Column("PREV", lambda one: _share(one, "percent", latest=False)),
        Column("LATEST", lambda one: _share(one, "percent", latest=True)),
        age,
        Column(
            "PREVROLLEDOUTREVISION",
            lambda one: _share(one, "revisionName", latest=False),
            wide=True,
        ),
        Column(
            "LATESTREADYREVISION", lambda one: _share(one, "revisionName", latest=True), wide=True
        ),
        Column("STATE", lambda one: _state(one, "activeModelState"), wide=True),
        Column("TARGET", lambda one: _state(one, "targetModelState"), wide=True),
        Column(
            "TRANSITION",
            lambda one: _text(one, "status", "modelStatus", "transitionStatus"),
            wide=True,
        ),
        Column("RUNTIME", _runtime, wide=True),
        Column("REASON", lambda one: _condition(one, "Ready").get("reason") or "-", wide=True),
    )


def _predictor_columns() -> Sequence[Column[Obj]]:
    return (
        Column("TYPE", lambda one: _text(one, "spec", "modelType", "name")),
        Column("AVAILABLE", lambda one: _text(one, "status", "available").lower()),
        Column("ACTIVEMODEL", lambda one: _text(one, "status", "activeModelState")),
        Column("TARGETMODEL", lambda one: _text(one, "status", "targetModelState")),
        Column("TRANSITION", lambda one: _text(one, "status", "transitionStatus")),
    )


def _runtime_columns() -> Sequence[Column[Obj]]:
    return (
        Column("KIND", lambda one: _text(one, "kind")),
        Column("DISABLED", lambda one: _text(one, "spec", "disabled").lower()),
        Column("MODELTYPE", lambda one: _names(one, "supportedModelFormats")),
        Column("CONTAINERS", lambda one: _names(one, "containers")),
    )


def status_lines(status: Obj, now_ms: int) -> list[str]:
    """Of an InferenceService or a Predictor, for `mesh describe`."""
    conditions = [one for one in _list(status.get("conditions")) if isinstance(one, Mapping)]
    by_type = {one.get("type"): one for one in conditions}
    ready = by_type.get("Ready", {}).get("status") or str(status.get("available", False))
    model = status.get("modelStatus") or status
    lines = [f"Ready:      {ready}", f"Transition: {model.get('transitionStatus') or '-'}"]
    if status.get("url"):
        lines.append(f"URL:        {status['url']}")
    failure = model.get("lastFailureInfo")
    if isinstance(failure, Mapping):
        lines.append(f"Last failure: {failure.get('reason')}: {failure.get('message')}")
    if conditions:
        lines.append("Conditions:")
    for one in conditions:
        since = format_age(now_ms - _instant_ms(one.get("lastTransitionTime"), now_ms))
        why = ": ".join(str(one[key]) for key in ("reason", "message") if one.get(key))
        told = f"  {one.get('type')}: {one.get('status')} for {since}"
        lines.append(f"{told}; {why}" if why else told)
    return lines


def _state(resource: Obj, which: str) -> str:
    return _text(resource, "status", "modelStatus", "states", which)


def _runtime(resource: Obj) -> str:
    status = resource.get("status") or {}
    return status.get("servingRuntimeName") or status.get("clusterServingRuntimeName") or "-"


def _condition(resource: Obj, kind: str) -> Mapping[str, Any]:
    conditions = _list((resource.get("status") or {}).get("conditions"))
    return next((one for one in conditions if one.get("type") == kind), {})


def _share(resource: Obj, field: str, *, latest: bool) -> str:
    """Of the model that is the latest, or of the one before, in what answers."""
    found = _at(resource, "status", "components", "predictor", "traffic")
    for one in _list(found):
        if one.get("latestRevision") is True if latest else one.get("tag") == "prev":
            return str(one.get(field, "-"))
    return "-"


def _names(resource: Obj, field: str) -> str:
    named = _list(_at(resource, "spec", field))
    return ",".join(dict.fromkeys(str(one.get("name")) for one in named)) or "-"


def _age(resource: Obj, now_ms: int) -> str:
    created = _at(resource, "metadata", "creationTimestamp")
    return format_age(now_ms - _instant_ms(created, now_ms)) if created else "-"


def _instant_ms(text: object, otherwise_ms: int) -> int:
    try:
        parsed = datetime.fromisoformat(str(text))
    except ValueError:
        return otherwise_ms
    return round(parsed.astimezone(UTC).timestamp() * 1_000)


def _text(resource: Obj, *path: str) -> str:
    found = _at(resource, *path)
    return "-" if found is None or found == "" else str(found)


def _at(value: Any, *path: str) -> Any:
    for key in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def _list(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else ()
