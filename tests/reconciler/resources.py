"""The definitions' resources for tests: one valid example of each kind, and where it lives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Final

import yaml

GROUP: Final = "serving.kserve.io"
MANIFESTS: Final = Path(__file__).parent / "manifests"

# kind: (version, plural, a valid spec)
KINDS: Final[dict[str, tuple[str, str, dict[str, Any]]]] = {
    "InferenceService": (
        "v1beta1",
        "inferenceservices",
        {
            "predictor": {
                "model": {"modelFormat": {"name": "onnx"}, "storageUri": "s3://bucket/iris"}
            }
        },
    ),
    "Predictor": (
        "v1alpha1",
        "predictors",
        {"modelType": {"name": "onnx"}, "storage": {"key": "minio", "path": "iris"}},
    ),
    "ServingRuntime": (
        "v1alpha1",
        "servingruntimes",
        {
            "supportedModelFormats": [{"name": "onnx", "version": "1", "autoSelect": True}],
            "containers": [{"name": "server", "image": "example.test/server"}],
            "builtInAdapter": {"serverType": "triton"},
        },
    ),
    "ClusterServingRuntime": (
        "v1alpha1",
        "clusterservingruntimes",
        {"supportedModelFormats": [{"name": "onnx"}], "containers": [{"name": "server"}]},
    ),
    "InferenceGraph": (
        "v1alpha1",
        "inferencegraphs",
        {"nodes": {"root": {"routerType": "Sequence", "steps": [{"serviceName": "iris"}]}}},
    ),
}


def example(kind: str, name: str = "iris") -> dict[str, Any]:
    version, _, spec = KINDS[kind]
    return {
        "apiVersion": f"{GROUP}/{version}",
        "kind": kind,
        "metadata": {"name": name},
        "spec": copy.deepcopy(spec),
    }


def path_of(kind: str, namespace: str, name: str = "") -> str:
    """The API's path of the collection, or of one object."""
    version, plural, _ = KINDS[kind]
    place = "" if kind == "ClusterServingRuntime" else f"/namespaces/{namespace}"
    return f"/apis/{GROUP}/{version}{place}/{plural}" + (f"/{name}" if name else "")


def documents(file: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(file.read_text()) if one]


def put_at(resource: dict[str, Any], path: str, value: object) -> None:
    """Sets ``spec.a.0.b``; ``None`` takes the key away."""
    *parents, last = path.split(".")
    at: Any = resource
    for key in parents:
        at = at[int(key)] if isinstance(at, list) else at.setdefault(key, {})
    if value is None:
        del at[last]
    else:
        at[last] = value
