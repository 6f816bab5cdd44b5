"""One InferenceService to be changed by tests."""

from __future__ import annotations

from typing import Any

from mesh.manifest import AppliedModel, parse_resource


def isvc(predictor: object = None, name: object = "iris", **metadata: object) -> dict[str, Any]:
    """``predictor`` defaults to an ONNX model in S3."""
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name, **metadata},
        "spec": {"predictor": {"model": onnx()} if predictor is None else predictor},
    }


def onnx(**fields: object) -> dict[str, Any]:
    """A predictor's model."""
    return {"modelFormat": {"name": "onnx"}, "storageUri": "s3://bucket/iris", **fields}


def applied(resource: dict[str, Any]) -> AppliedModel:
    return parse_resource(resource, now_ms=77)
