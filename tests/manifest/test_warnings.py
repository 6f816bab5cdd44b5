"""What is not acted on is named by its path, and changes nothing else."""

from __future__ import annotations

import pytest

from tests.manifest.resources import applied, isvc, onnx

KEPT = "kept, not acted on"
UNKNOWN = "unknown field, ignored"


def warnings(resource: dict[str, object]) -> list[str]:
    return list(applied(resource).warnings)


@pytest.mark.parametrize(
    ("resource", "expected"),
    [
        (isvc({"model": onnx(fooBar=1)}), [f"spec.predictor.model.fooBar: {UNKNOWN}"]),
        (
            isvc({"model": onnx(modelFormat={"name": "onnx", "vesion": "1"})}),
            [f"spec.predictor.model.modelFormat.vesion: {UNKNOWN}"],
        ),
        (
            isvc({"model": {"modelFormat": {"name": "a"}, "storage": {"path": "p", "bukket": 1}}}),
            [f"spec.predictor.model.storage.bukket: {UNKNOWN}"],
        ),
        (isvc({"model": onnx(), "replicas": 2}), [f"spec.predictor.replicas: {UNKNOWN}"]),
        ({**isvc(), "extra": 1}, [f"extra: {UNKNOWN}"]),
        (isvc(lables={}), [f"metadata.lables: {UNKNOWN}"]),
        (isvc({"model": onnx(**{"a.b/c": 1})}), [f"spec.predictor.model[a.b/c]: {UNKNOWN}"]),
        (
            isvc({"onnx": {"storageUri": "s3://a/b", "oops": 1}}),
            [f"spec.predictor.onnx.oops: {UNKNOWN}"],
        ),
        (isvc({"model": onnx(runtime="mlserver")}), [f"spec.predictor.model.runtime: {KEPT}"]),
        (
            isvc({"model": onnx(resources={"limits": {"cpu": "1"}})}),
            [f"spec.predictor.model.resources: {KEPT}"],
        ),
        (
            isvc({"model": onnx(), "maxReplicas": 3, "logger": {}, "batcher": {"timeout": 60}}),
            [
                f"spec.predictor.maxReplicas: {KEPT}",
                f"spec.predictor.batcher.timeout: {KEPT}",
                f"spec.predictor.logger: {KEPT}",
            ],
        ),
        (
            isvc({"model": onnx(), "canaryTrafficPercent": 10}),
            [f"spec.predictor.canaryTrafficPercent: {KEPT}"],
        ),
        (
            isvc({"model": onnx(), "containers": [{}], "nodeSelector": {}}),
            [f"spec.predictor.containers: {KEPT}", f"spec.predictor.nodeSelector: {KEPT}"],
        ),
        (
            isvc(annotations={"serving.kserve.io/servingRuntime": "x"}),
            [f"metadata.annotations[serving.kserve.io/servingRuntime]: {KEPT}"],
        ),
        (
            isvc(annotations={"serving.kserve.io/deploymentMode": "Serverless"}),
            [f"metadata.annotations[serving.kserve.io/deploymentMode]: {KEPT}"],
        ),
        (
            isvc(annotations={"mesh.serving/pinn": "true"}),
            ["metadata.annotations[mesh.serving/pinn]: unknown annotation, ignored"],
        ),
        (isvc(annotations={"kubectl.kubernetes.io/last-applied-configuration": "{}"}), []),
        (isvc({"model": onnx(protocolVersion="grpc-v2"), "minReplicas": 1}), []),
    ],
)
def test_warned_of(resource: dict[str, object], expected: list[str]) -> None:
    assert warnings(resource) == expected


@pytest.mark.parametrize("field", ["transformer", "explainer", "canary"])
def test_the_other_components_are_kept(field: str) -> None:
    resource = isvc()
    resource["spec"][field] = {"containers": []}
    assert warnings(resource) == [f"spec.{field}: {KEPT}"]
    assert field in applied(resource).alias.manifest


def test_a_protocol_that_is_not_served_is_told() -> None:
    (told,) = warnings(isvc({"model": onnx(protocolVersion="grpc-v1")}))
    assert told.startswith(f"spec.predictor.model.protocolVersion: {KEPT}")
