"""The ConfigMap model-serving-config: ModelMesh's fields, what is wrong, what is only said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.core.errors import InvalidArgument
from mesh.reconciler.config import (
    Amounts,
    ControllerConfig,
    PodEtcd,
    amount,
    read_config,
)

FLAGS = ControllerConfig(image="mesh:9", pods_per_runtime=3)

MODELMESH = """
podsPerRuntime: 4
headlessService: false
inferenceServiceName: my-mesh
inferenceServicePort: 9000
storageSecretName: buckets
serviceAccountName: runner
grpcMaxMessageSizeBytes: 33554432
allowAnyPVC: true
metrics:
  enabled: false
  port: 2113
restProxy:
  enabled: false
  port: 8009
scaleToZero:
  enabled: false
  gracePeriodSeconds: 5
tls:
  secretName: certificates
  clientAuth: require
imagePullSecrets:
  - name: pull
runtimePodLabels:
  team: a
runtimePodAnnotations:
  note: b
modelMeshResources:
  requests: {cpu: 100m, memory: 96Mi}
"""


def read(text: str) -> tuple[ControllerConfig, tuple[str, ...]]:
    return read_config({"config.yaml": text}, FLAGS)


@pytest.mark.parametrize("data", [None, {"config.yaml": ""}, {"config.yaml": "# nothing"}])
def test_nothing_said_is_the_flags(data: dict[str, str] | None) -> None:
    assert read_config(data, FLAGS) == (FLAGS, ())


def test_modelmeshs_fields() -> None:
    config, warnings = read(MODELMESH)
    assert warnings == ()
    assert config == replace(
        FLAGS,
        pods_per_runtime=4,
        headless=False,
        service_name="my-mesh",
        grpc_port=9000,
        storage_secret="buckets",
        service_account="runner",
        message_bytes_max=32 << 20,
        allow_any_claim=True,
        metrics_enabled=False,
        metrics_port=2113,
        rest_enabled=False,
        rest_port=8009,
        scale_to_zero=False,
        grace_ms=5_000,
        tls_secret="certificates",
        tls_clients_shown=True,
        pull_secrets=("pull",),
        pod_labels={"team": "a"},
        pod_annotations={"note": "b"},
        sidecar=Amounts("100m", "96Mi", "3", "448Mi"),
    )


def test_the_secret_of_etcd_counts_where_pods_read_it() -> None:
    text = "etcdSecretName: my-etcd"
    config, warnings = read(text)
    assert [one.partition(": ")[2] for one in warnings] == [
        "etcdSecretName: not used, as the controller has no --etcd-connection"
    ]
    mounted = replace(FLAGS, etcd=PodEtcd(from_secret=True))
    config, warnings = read_config({"config.yaml": text}, mounted)
    assert (config.etcd_secret, warnings) == ("my-etcd", ())


def test_our_own_fields() -> None:
    config, warnings = read(
        """
        image: mesh:10
        allDeploymentModes: true
        artifactCacheSize: 50Gi
        router:
          replicas: 3
          resources: {limits: {cpu: "4"}}
        instanceResources:
          requests: {memory: 8Gi}
          limits: {memory: 8Gi}
        """
    )
    assert warnings == ()
    assert config.image == "mesh:10"
    assert config.take_all
    assert config.artifact_cache == "50Gi"
    assert config.router_replicas == 3
    assert config.router.cpu_limit == "4"
    assert config.instance.as_resources() == {
        "requests": {"cpu": "500m", "memory": "8Gi"},
        "limits": {"cpu": "4", "memory": "8Gi"},
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modelMeshImage: {name: kserve/modelmesh}", "modelMeshImage: kept, not acted on"),
        ("podPerRuntime: 2", "podPerRuntime: unknown field, ignored"),
        ("restProxy: {port: 1, colour: red}", "restProxy.colour: unknown field, ignored"),
        ("metrics: {scheme: https}", "metrics.scheme: metrics are served by http"),
        ("tls: {secretName: a, clientAuth: optional}", "tls.clientAuth: optional asks no client"),
    ],
)
def test_only_said(text: str, said: str) -> None:
    _, warnings = read(text)
    assert any(said in one for one in warnings), warnings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("podsPerRuntime: two", "podsPerRuntime: expected a whole number of at least 1"),
        ("podsPerRuntime: 0", "podsPerRuntime"),
        ("podsPerRuntime: 5000", "podsPerRuntime: expected at most 1000"),
        ("headlessService: sure", "headlessService: expected true or false"),
        ("inferenceServicePort: 70000", "inferenceServicePort: expected a port"),
        ("inferenceServiceName: Big", "inferenceServiceName: expected a Kubernetes name"),
        ("inferenceServiceName: a.b", "inferenceServiceName: expected a Kubernetes name"),
        ("storageSecretName: a_b", "storageSecretName"),
        ("scaleToZero: 5", "scaleToZero: expected a mapping"),
        ("scaleToZero: {gracePeriodSeconds: -1}", "scaleToZero.gracePeriodSeconds"),
        ("tls: {clientAuth: require}", "tls.secretName: expected a secret"),
        ("tls: {secretName: a, clientAuth: maybe}", "tls.clientAuth"),
        ("modelMeshResources: {requests: {memory: lots}}", "modelMeshResources.requests.memory"),
        (
            "modelMeshResources: {requests: {memory: 1Gi}}",
            "modelMeshResources.limits.memory: expected at least the request, 1Gi",
        ),
        ("imagePullSecrets: [pull]", "imagePullSecrets[0]"),
        ("artifactCacheSize: 0", "artifactCacheSize: expected more than nothing"),
        ("a: 1\n---\nb: 2", "expected one mapping"),
        ("- a", "expected"),
        ("a: [", "neither YAML nor JSON"),
    ],
)
def test_wrong(text: str, said: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read(text)
    assert caught.value.message.startswith("model-serving-config/config.yaml")
    assert said in caught.value.message


def test_the_key_is_missing() -> None:
    with pytest.raises(InvalidArgument, match=r"expected the key config\.yaml"):
        read_config({"config.yml": ""}, FLAGS)


@pytest.mark.parametrize(
    ("text", "number"), [("300m", 0.3), ("2", 2.0), ("1Gi", float(1 << 30)), ("1500m", 1.5)]
)
def test_amount(text: str, number: float) -> None:
    assert amount(text) == number
