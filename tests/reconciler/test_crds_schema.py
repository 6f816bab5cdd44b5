"""What the definitions accept, keep and refuse, asked of a real API server."""

from __future__ import annotations

import json

import pytest

from mesh.manifest import parse_resource
from tests.kube_server import KubeServer, Refused, crd_documents
from tests.reconciler.resources import KINDS, example, path_of, put_at

# `kubectl apply` keeps a whole object in one annotation.
ANNOTATION_MAX_CHARS = 262_144
A_MODEL = {"modelFormat": {"name": "onnx"}}


@pytest.mark.kube
@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_of_each_kind_is_taken(kube: KubeServer, namespace: str, kind: str) -> None:
    resource = example(kind, name=namespace)
    stored = kube.request("POST", path_of(kind, namespace), resource)
    assert stored["spec"] == resource["spec"]


WRONG = [
    # InferenceService: what a service is
    ("InferenceService", "spec", None, "spec"),
    ("InferenceService", "spec.predictor", None, "spec.predictor"),
    ("InferenceService", "spec.predictor", {"minReplicas": 1}, "spec.predictor"),
    ("InferenceService", "spec.predictor.sklearn", {"storageUri": "s3://a/b"}, "spec.predictor"),
    ("InferenceService", "spec.predictor.model", "onnx", "spec.predictor.model"),
    ("InferenceService", "spec.predictor.model.storage", {"path": "a"}, "spec.predictor.model"),
    (
        "InferenceService",
        "spec.predictor",
        {"sklearn": {"storageUri": "s3://a/b", "storage": {"path": "a"}}},
        "spec.predictor.sklearn",
    ),
    (
        "InferenceService",
        "spec.predictor.model.modelFormat",
        None,
        "spec.predictor.model.modelFormat",
    ),
    (
        "InferenceService",
        "spec.predictor.model.modelFormat.name",
        "",
        "spec.predictor.model.modelFormat.name",
    ),
    (
        "InferenceService",
        "spec.predictor.model.modelFormat.version",
        1,
        "spec.predictor.model.modelFormat.version",
    ),
    (
        "InferenceService",
        "spec.predictor.model.protocolVersion",
        "v3",
        "spec.predictor.model.protocolVersion",
    ),
    (
        "InferenceService",
        "spec.predictor.model.resources.limits.memory",
        "lots",
        "spec.predictor.model.resources.limits.memory",
    ),
    (
        "InferenceService",
        "spec.predictor.model.env",
        [{"name": "THREADS", "value": 1}],
        "spec.predictor.model.env.value",
    ),
    # ... and how it is run
    ("InferenceService", "spec.predictor.minReplicas", -1, "spec.predictor.minReplicas"),
    ("InferenceService", "spec.predictor.maxReplicas", "3", "spec.predictor.maxReplicas"),
    ("InferenceService", "spec.predictor.scaleMetric", "mood", "spec.predictor.scaleMetric"),
    (
        "InferenceService",
        "spec.predictor.canaryTrafficPercent",
        101,
        "spec.predictor.canaryTrafficPercent",
    ),
    ("InferenceService", "spec.predictor.name", "1st", "spec.predictor.name"),
    ("InferenceService", "spec.predictor.labels", {"a": 1}, "spec.predictor.labels.a"),
    ("InferenceService", "spec.predictor.logger.mode", "some", "spec.predictor.logger.mode"),
    (
        "InferenceService",
        "spec.predictor.batcher.maxBatchSize",
        100_000,
        "spec.predictor.batcher.maxBatchSize",
    ),
    ("InferenceService", "spec.transformer.containers", [{}], "spec.transformer.containers.name"),
    ("InferenceService", "spec.explainer.art.type", "Cubism", "spec.explainer.art.type"),
    (
        "InferenceService",
        "spec.canary",
        [{"predictor": {"model": A_MODEL}}],
        "spec.canary.predictor.name",
    ),
    (
        "InferenceService",
        "spec.canary",
        [{"predictor": {"name": "b", "model": A_MODEL}, "trafficPercent": -1}],
        "spec.canary.trafficPercent",
    ),
    # Predictor
    ("Predictor", "spec.modelType", None, "spec.modelType"),
    ("Predictor", "spec.modelType.name", None, "spec.modelType.name"),
    ("Predictor", "spec.storage", None, "spec"),
    ("Predictor", "spec.storage.path", None, "spec"),
    ("Predictor", "spec.storage.parameters", {"a": 1}, "spec.storage.parameters.a"),
    ("Predictor", "spec.storage.s3", {"bucket": "a"}, "spec.storage.s3.secretKey"),
    ("Predictor", "spec.runtime", {}, "spec.runtime.name"),
    ("Predictor", "spec.gpu", "perhaps", "spec.gpu"),
    # runtimes
    *(
        (kind, path, value, field)
        for kind in ("ServingRuntime", "ClusterServingRuntime")
        for path, value, field in (
            ("spec.supportedModelFormats", None, "spec.supportedModelFormats"),
            ("spec.supportedModelFormats", [], "spec.supportedModelFormats"),
            ("spec.supportedModelFormats.0.name", None, "spec.supportedModelFormats.name"),
            ("spec.supportedModelFormats.0.priority", 0, "spec.supportedModelFormats.priority"),
            ("spec.containers.0.name", None, "spec.containers.name"),
            ("spec.grpcEndpoint", "localhost:8085", "spec.grpcEndpoint"),
            ("spec.grpcDataEndpoint", "port:", "spec.grpcDataEndpoint"),
            ("spec.builtInAdapter.serverType", "vllm", "spec.builtInAdapter.serverType"),
            (
                "spec.builtInAdapter",
                {"serverType": "triton", "runtimeManagementPort": 65_536},
                "spec.builtInAdapter.runtimeManagementPort",
            ),
            ("spec.replicas", -1, "spec.replicas"),
            ("spec.multiModel", "yes", "spec.multiModel"),
            ("spec.volumes", [{}], "spec.volumes.name"),
        )
    ),
    # InferenceGraph
    ("InferenceGraph", "spec.nodes", None, "spec.nodes"),
    ("InferenceGraph", "spec.nodes", {"start": {"routerType": "Sequence"}}, "spec.nodes.root"),
    ("InferenceGraph", "spec.nodes.root.routerType", "Loop", "spec.nodes.root.routerType"),
    ("InferenceGraph", "spec.nodes.root.steps", [{"name": "a"}], "spec.nodes.root.steps"),
    (
        "InferenceGraph",
        "spec.nodes.root.steps.0.nodeName",
        "a",
        "spec.nodes.root.steps",
    ),
    ("InferenceGraph", "spec.nodes.root.steps.0.weight", 101, "spec.nodes.root.steps.weight"),
    (
        "InferenceGraph",
        "spec.nodes.root.steps.0.dependency",
        "Firm",
        "spec.nodes.root.steps.dependency",
    ),
]


@pytest.mark.kube
@pytest.mark.parametrize(
    ("kind", "path", "value", "field"),
    WRONG,
    ids=[f"{kind}-{path}-{json.dumps(value)[:40]}" for kind, path, value, _ in WRONG],
)
def test_a_wrong_field_is_refused_by_its_path(
    kube: KubeServer, namespace: str, kind: str, path: str, value: object, field: str
) -> None:
    resource = example(kind, name=namespace)
    put_at(resource, path, value)
    with pytest.raises(Refused) as caught:
        kube.request("POST", path_of(kind, namespace), resource)
    assert (caught.value.code, caught.value.reason) == (422, "Invalid"), caught.value.message
    # What only some of a mapping's fields may say together is in the message alone.
    said = field in caught.value.fields or f'"{field}" must' in caught.value.message
    assert said, caught.value.message


@pytest.mark.kube
@pytest.mark.parametrize(
    ("path", "warned"),
    [
        ("spec.colour", "spec.colour: unknown field, ignored"),
        ("spec.predictor.colour", "spec.predictor.colour: unknown field, ignored"),
        ("spec.predictor.model.colour", "spec.predictor.model.colour: unknown field, ignored"),
        (
            "spec.predictor.model.modelFormat.colour",
            "spec.predictor.model.modelFormat.colour: unknown field, ignored",
        ),
        (
            "spec.predictor.priorityClassName",
            "spec.predictor.priorityClassName: kept, not acted on",
        ),
        (
            "spec.predictor.model.imagePullPolicy",
            "spec.predictor.model.imagePullPolicy: kept, not acted on",
        ),
    ],
)
def test_a_field_that_no_schema_knows_is_kept_and_can_be_named(
    kube: KubeServer, namespace: str, path: str, warned: str
) -> None:
    resource = example("InferenceService")
    put_at(resource, path, "red")
    stored = kube.request("POST", path_of("InferenceService", namespace), resource)
    assert stored["spec"] == resource["spec"]
    assert warned in parse_resource(stored).warnings


@pytest.mark.kube
def test_a_default_is_filled_in(kube: KubeServer, namespace: str) -> None:
    resource = example("InferenceService")
    resource["spec"]["predictor"]["storageUris"] = [{"uri": "s3://bucket/adapter"}]
    stored = kube.request("POST", path_of("InferenceService", namespace), resource)
    assert stored["spec"]["predictor"]["storageUris"] == [
        {"uri": "s3://bucket/adapter", "mountPath": "/mnt/models"}
    ]


@pytest.mark.parametrize("crd", crd_documents(), ids=lambda crd: crd["spec"]["names"]["kind"])
def test_old_servers_and_plain_kubectl_can_carry_it(crd: dict[str, object]) -> None:
    text = json.dumps(crd)
    assert "x-kubernetes-validations" not in text, "Kubernetes 1.20 has no CEL"
    assert len(text) < ANNOTATION_MAX_CHARS / 2


def test_runtimes_of_a_namespace_and_of_a_cluster_have_one_schema() -> None:
    versions = {crd["spec"]["names"]["kind"]: crd["spec"]["versions"] for crd in crd_documents()}
    assert set(versions) == set(KINDS)
    assert versions["ServingRuntime"] == versions["ClusterServingRuntime"]
