"""Whether a Kubernetes object is one: by a real API server's dry run, or by a schema in the tree.

The API server of the tests is 1.20. It has neither policy/v1 budgets nor autoscaling/v2, and knows
no ServiceMonitor: these are held to ``schemas``. It drops unknown fields in silence, so what it
gives back is compared with what was sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import jsonschema
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from tests.kube_server import KubeServer

_FOLDER: Final = Path(__file__).parent / "schemas"
_SCHEMAS: Final = {path.stem: json.loads(path.read_text()) for path in _FOLDER.glob("*.json")}
_REGISTRY: Final = Registry().with_resource(
    "metadata.json", DRAFT202012.create_resource(_SCHEMAS["metadata"])
)
# Kinds in the order in which others need them, with their plural and whether they have namespaces.
_PLURALS: Final = {
    "Namespace": ("namespaces", False),
    "ServiceAccount": ("serviceaccounts", True),
    "Role": ("roles", True),
    "RoleBinding": ("rolebindings", True),
    "ClusterRole": ("clusterroles", False),
    "ClusterRoleBinding": ("clusterrolebindings", False),
    "ConfigMap": ("configmaps", True),
    "Secret": ("secrets", True),
    "Service": ("services", True),
    "Deployment": ("deployments", True),
    "StatefulSet": ("statefulsets", True),
    "NetworkPolicy": ("networkpolicies", True),
    "ServingRuntime": ("servingruntimes", True),
    "ClusterServingRuntime": ("clusterservingruntimes", False),
    "InferenceService": ("inferenceservices", True),
}


def has_schema(obj: dict[str, Any]) -> bool:
    return obj["kind"].lower() in _SCHEMAS


def check_schema(obj: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError, with the path in it."""
    schema = _SCHEMAS[obj["kind"].lower()]
    validator = jsonschema.Draft202012Validator(schema, registry=_REGISTRY)
    validator.validate(obj)


def check_accepted(kube: KubeServer, obj: dict[str, Any], namespace: str) -> None:
    """The API server takes the object whole, into ``namespace``. Raises Refused or AssertionError.

    It makes nothing.
    """
    plural, namespaced = _PLURALS[obj["kind"]]
    version = obj["apiVersion"]
    path = f"/apis/{version}" if "/" in version else f"/api/{version}"
    name = obj["metadata"]["name"]
    if namespaced:
        path += f"/namespaces/{namespace}"
        obj = {**obj, "metadata": {**obj["metadata"], "namespace": namespace}}
    got = kube.request(
        "PATCH",
        f"{path}/{plural}/{name}?dryRun=All&fieldManager=test&force=true",
        obj,
        content_type="application/apply-patch+yaml",
    )
    missing = list(lost(obj, got))
    assert not missing, f"{obj['kind']} {name}: {missing}"


def lost(sent: Any, got: Any, path: str = "") -> Iterator[str]:
    """Paths of what was sent and did not come back as it was."""
    match sent, got:
        case dict(), dict():
            for key, value in sent.items():
                if key == "stringData":  # comes back as data
                    continue
                if key not in got:
                    # Empty and absent are the same to the API server.
                    if value not in ({}, [], "", None):
                        yield f"{path}.{key}"
                else:
                    yield from lost(value, got[key], f"{path}.{key}")
        case list(), list():
            if len(sent) != len(got):
                yield path
            for at, (one, other) in enumerate(zip(sent, got, strict=False)):
                yield from lost(one, other, f"{path}[{at}]")
        case _:
            if sent != got:
                yield f"{path}: {sent!r} became {got!r}"
