"""Names, labels and marks of the objects that the controller owns. Pure.

Names and selectors are ModelMesh's: Deployment ``<service>-<runtime>`` and the labels
``modelmesh-service`` and ``name``. Every object carries the label ``managed-by`` and a hash of
what is desired; ``spec.replicas`` of a Deployment is not part of that hash.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Final

from mesh.reconciler.config import ControllerConfig
from mesh.reconciler.kube_resources import (
    AUTOSCALERS,
    BUDGETS,
    CONFIG_MAPS,
    DEPLOYMENTS,
    SERVICES,
    Obj,
    Resource,
)

MANAGED_BY: Final = "app.kubernetes.io/managed-by"
MANAGER: Final = "mesh-controller"
OWNED_SELECTOR: Final = f"{MANAGED_BY}={MANAGER}"  # of lists and watches
HASH: Final = "mesh.serving/hash"
RUNTIME_LABEL: Final = "mesh.serving/runtime"
# In the order in which they are made; removed the other way round.
OWNED: Final[tuple[Resource, ...]] = (CONFIG_MAPS, SERVICES, BUDGETS, DEPLOYMENTS, AUTOSCALERS)
_LABEL_CHARS: Final = 63  # of a label's value, and of a Service's name
_SERVICE_NAME: Final = re.compile(r"[a-z](?:[-a-z0-9]*[a-z0-9])?")


def workload_name(config: ControllerConfig, runtime_name: str) -> str:
    """Of the Deployment and what belongs to it; ModelMesh's, shortened where it must be."""
    return _fitting(f"{config.service_name}-{runtime_name}")


def service_name(config: ControllerConfig, runtime_name: str) -> str:
    """Of the runtime's Service, whose name may have no dots (``triton-2.x``)."""
    name = f"{config.service_name}-{runtime_name}"
    if len(name) <= _LABEL_CHARS and _SERVICE_NAME.fullmatch(name):
        return name
    return _with_hash(re.sub(r"[^-a-z0-9]", "-", name), name)


def _fitting(name: str) -> str:
    return name if len(name) <= _LABEL_CHARS else _with_hash(name, name)


def _with_hash(text: str, name: str) -> str:
    """At most 63 characters, another for every name."""
    mark = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{text[: _LABEL_CHARS - 9].rstrip('-.')}-{mark}"


def selector_of(config: ControllerConfig, name: str) -> dict[str, str]:
    return {"modelmesh-service": config.service_name, "name": name}


def runtime_labels(config: ControllerConfig, runtime_name: str) -> dict[str, str]:
    return {
        **selector_of(config, workload_name(config, runtime_name)),
        "app.kubernetes.io/name": "modelmesh-serving",
        "app.kubernetes.io/component": "serving",
        RUNTIME_LABEL: _fitting(runtime_name),
    }


def owner_reference(owner: Obj) -> dict[str, Any] | None:
    """None for a resource that the API server has not named yet (a file)."""
    metadata = owner["metadata"]
    if not metadata.get("uid"):
        return None
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": metadata["name"],
        "uid": metadata["uid"],
        "controller": True,
    }


def finished(obj: Obj, labels: Mapping[str, str], owner: Mapping[str, Any] | None) -> Obj:
    """With labels, owner and the hash of it all."""
    metadata = obj["metadata"]
    metadata["labels"] = {**labels, **metadata.get("labels", {}), MANAGED_BY: MANAGER}
    if owner is not None:
        metadata["ownerReferences"] = [dict(owner)]
    metadata["annotations"] = {**metadata.get("annotations", {}), HASH: hash_of(obj)}
    return obj


def hash_of(obj: Obj) -> str:
    """Of all that is desired but the number of replicas, which changes by itself."""
    said = {key: value for key, value in obj.items() if key != "spec"}
    said["spec"] = {k: v for k, v in (obj.get("spec") or {}).items() if k != "replicas"}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def new_object(resource: Resource, namespace: str, name: str) -> Obj:
    return {
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "metadata": {"name": name, "namespace": namespace},
    }


def budget(name: str, namespace: str, selector: Mapping[str, str]) -> Obj:
    """One pod at a time may be evicted: also where there is only one, or a node never drains."""
    made = new_object(BUDGETS, namespace, name)
    made["spec"] = {"maxUnavailable": 1, "selector": {"matchLabels": dict(selector)}}
    return made
