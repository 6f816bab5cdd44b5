"""The objects of one runtime: names, containers, what is passed through, what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mesh.core.errors import InvalidArgument
from mesh.instance.settings import InstanceSettings
from mesh.reconciler.config import ControllerConfig, PodEtcd
from mesh.reconciler.workload import (
    RuntimeSource,
    claims_of,
    refusal,
    runtime_objects,
    service_name,
    workload_name,
)
from mesh.reconciler.workload_names import HASH, MANAGED_BY, MANAGER
from mesh.reconciler.workload_pod import DRAIN_NOTICE_MS, DRAIN_TIMEOUT_MS
from mesh.reconciler.workload_source import ADAPTED
from mesh.runtimes import external_choice
from mesh.runtimes.v2_repository import AdapterSettings
from mesh.serving_runtime import parse_serving_runtime
from tests.deploy.accepting import check_accepted, check_schema, has_schema
from tests.kube_server import KubeServer

CONFIG = ControllerConfig()
SERVER = {"name": "server", "image": "server:1"}


def resource(name: str = "onnx", *, annotations: Any = None, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ServingRuntime",
        "metadata": {"name": name, "uid": "u-1", "annotations": annotations or {}},
        "spec": {
            "supportedModelFormats": [{"name": "onnx", "autoSelect": True}],
            "multiModel": True,
            **spec,
        },
    }


def source(name: str = "onnx", *, annotations: Any = None, **spec: Any) -> RuntimeSource:
    return RuntimeSource.of(resource(name, annotations=annotations, **spec))


def objects(
    of: RuntimeSource, config: ControllerConfig = CONFIG, **more: Any
) -> dict[str, dict[str, Any]]:
    made = runtime_objects(of, config, namespace="n", **{"replicas": 2, **more})
    return {one["kind"]: one for one in made}


def pod(of: RuntimeSource, config: ControllerConfig = CONFIG, **more: Any) -> dict[str, Any]:
    spec: dict[str, Any] = objects(of, config, **more)["Deployment"]["spec"]["template"]["spec"]
    return spec


def container(spec: dict[str, Any], name: str = "mesh") -> dict[str, Any]:
    (found,) = [one for one in spec["containers"] if one["name"] == name]
    return dict(found)


def env(one: dict[str, Any]) -> dict[str, Any]:
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in one["env"]}


def mounts(one: dict[str, Any]) -> dict[str, str]:
    return {mount["mountPath"]: mount["name"] for mount in one["volumeMounts"]}


FULL = source(
    "triton-2.x",
    annotations={"serving.kserve.io/autoscalerClass": "hpa", "serving.kserve.io/max-scale": "5"},
    grpcEndpoint="unix:///tmp/mmesh/grpc.sock",
    containers=[{**SERVER, "resources": {"requests": {"memory": "1Gi"}}}],
    nodeSelector={"disk": "fast"},
    tolerations=[{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    imagePullSecrets=[{"name": "pull"}],
    labels={"team": "a"},
    volumes=[{"name": "scratch", "emptyDir": {}}],
)


@pytest.mark.kube
@pytest.mark.parametrize("of", [source(), FULL], ids=["in the pod", "external"])
def test_the_api_server_takes_them_whole(
    of: RuntimeSource, kube: KubeServer, namespace: str
) -> None:
    config = replace(CONFIG, pull_secrets=("ours",), service_account="mesh")
    for one in runtime_objects(of, config, namespace=namespace, replicas=2, claims=("models",)):
        if has_schema(one):
            check_schema(one)
        else:
            check_accepted(kube, one, namespace)


def test_the_kinds_and_the_order() -> None:
    kinds = [one["kind"] for one in runtime_objects(source(), CONFIG, namespace="n", replicas=1)]
    assert kinds == ["ConfigMap", "Service", "PodDisruptionBudget", "Deployment"]
    assert list(objects(FULL))[-1] == "HorizontalPodAutoscaler"


def test_names_and_selector_are_modelmeshs() -> None:
    deployment = objects(source("triton-2.x"))["Deployment"]
    assert deployment["metadata"]["name"] == "modelmesh-serving-triton-2.x"
    selector = deployment["spec"]["selector"]["matchLabels"]
    assert selector == {
        "modelmesh-service": "modelmesh-serving",
        "name": "modelmesh-serving-triton-2.x",
    }
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert selector.items() <= labels.items()
    assert labels[MANAGED_BY] == MANAGER  # how the controller finds its pods


def test_names_of_services_fit_and_differ() -> None:
    names = ["a.b", "a-b", "x" * 80, "x" * 81, "x" * 60 + ".y"]
    services = [service_name(CONFIG, one) for one in names]
    assert len(set(services)) == len(names)
    assert all(len(one) <= 63 and "." not in one for one in services)
    assert service_name(CONFIG, "a-b") == "modelmesh-serving-a-b"
    assert len(workload_name(CONFIG, "x" * 80)) == 63


def test_owner_and_mark() -> None:
    made = objects(FULL).values()
    assert {one["metadata"]["labels"]["app.kubernetes.io/managed-by"] for one in made} == {
        "mesh-controller"
    }
    assert all(one["metadata"]["ownerReferences"][0]["uid"] == "u-1" for one in made)
    assert len({one["metadata"]["annotations"][HASH] for one in made}) == len(made)


def test_the_hash_is_of_all_but_the_number() -> None:
    def hash_of(of: RuntimeSource, **more: Any) -> str:
        return str(objects(of, **more)["Deployment"]["metadata"]["annotations"][HASH])

    assert hash_of(source(), replicas=2) == hash_of(source(), replicas=9)
    assert hash_of(source()) != hash_of(source(nodeSelector={"a": "b"}))


def test_a_changed_format_rolls_the_pods() -> None:
    def annotations(of: RuntimeSource) -> Any:
        return objects(of)["Deployment"]["spec"]["template"]["metadata"]["annotations"]

    more = [{"name": "onnx"}, {"name": "sklearn"}]
    assert annotations(source()) != annotations(source(supportedModelFormats=more))
    assert annotations(source()) == annotations(source(replicas=7))


def test_the_pods_read_what_was_applied() -> None:
    text = objects(FULL)["ConfigMap"]["data"]["runtime.yaml"]
    assert parse_serving_runtime(yaml.safe_load(text)) == FULL.runtime


def test_variables_of_the_instance() -> None:
    said = env(container(pod(source())))
    assert said["MESH_ETCD"] == "etcd:2379"
    assert said["MESH_NAMESPACE"] == "n"
    assert said["MESH_GROUP"] == "modelmesh-serving-onnx"
    assert said["MESH_LABELS"] == "rt:onnx"
    assert said["MESH_REPLICA_SET"] == {
        "fieldRef": {"fieldPath": "metadata.labels['pod-template-hash']"}
    }
    assert said["MESH_ADVERTISE"] == {"fieldRef": {"fieldPath": "status.podIP"}}


def test_only_our_container_gets_the_secret_of_etcd() -> None:
    spec = pod(FULL, replace(CONFIG, etcd=PodEtcd(from_secret=True)))
    ours, server = container(spec), container(spec, "server")
    assert env(ours)["MESH_ETCD_CONNECTION"] == "/etc/mesh/etcd/etcd_connection"
    assert "MESH_ETCD" not in env(ours)
    assert mounts(ours)["/etc/mesh/etcd"] == "etcd-connection"
    assert "etcd-connection" not in mounts(server).values()
    (volume,) = [one for one in spec["volumes"] if one["name"] == "etcd-connection"]
    assert volume["secret"]["secretName"] == "model-serving-etcd"


@pytest.mark.parametrize(
    ("memory", "room"),
    [("2Gi", "1717986919"), ("1Gi", "671088640"), ("10Gi", "8589934592")],
)
def test_capacity_is_what_the_memory_leaves(memory: str, room: str) -> None:
    one = {"name": "mesh", "resources": {"requests": {"memory": memory}}}
    assert env(container(pod(source(containers=[one]))))["MESH_CAPACITY"] == room


def test_an_external_runtime_says_its_capacity_itself() -> None:
    assert "MESH_CAPACITY" not in env(container(pod(FULL)))


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"requests": {"memory": "256Mi"}}, r"spec\.containers\.resources\.requests\.memory"),
        ({"limits": {"cpu": "1"}}, r"spec\.containers\.resources: expected a request or limit"),
    ],
)
def test_too_little_memory(resources: Any, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        pod(source(containers=[{"name": "mesh", "resources": resources}]))


def test_a_container_called_mesh_is_ours() -> None:
    said = {
        "name": "mesh",
        "image": "mine:2",
        "env": [{"name": "MESH_THREADS", "value": "8"}],
        "resources": {"requests": {"memory": "4Gi"}},
    }
    ours = container(pod(source(containers=[said])))
    assert len(pod(source(containers=[said]))["containers"]) == 1
    assert ours["image"] == "mine:2"
    assert env(ours)["MESH_THREADS"] == "8"
    assert ours["command"] == ["mesh", "instance"]


def test_the_server_shares_models_and_socket() -> None:
    spec = pod(FULL)
    ours, server = container(spec), container(spec, "server")
    for path in ("/models", "/tmp/mmesh"):
        assert mounts(ours)[path] == mounts(server)[path]
    assert server["lifecycle"]["preStop"]["httpGet"] == {"path": "/drained", "port": 2112}
    # Its socket has to be one that our user may write to.
    assert server["securityContext"]["runAsUser"] == ours["securityContext"]["runAsUser"]


def test_a_server_behind_a_port_keeps_its_user() -> None:
    spec = pod(source(grpcEndpoint="port:8085", containers=[SERVER]))
    assert "runAsUser" not in container(spec, "server")["securityContext"]


def test_what_the_server_says_of_itself_counts() -> None:
    said = {
        **SERVER,
        "securityContext": {"runAsUser": 1},
        "lifecycle": {"preStop": {"exec": {"command": ["bye"]}}},
        "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
    }
    server = container(pod(source(grpcEndpoint="unix:/run/x/a.sock", containers=[said])), "server")
    assert server["securityContext"]["runAsUser"] == 1
    assert server["lifecycle"] == said["lifecycle"]
    assert mounts(server)["/scratch"] == "scratch"


def test_passed_through() -> None:
    spec = pod(FULL, replace(CONFIG, pull_secrets=("ours",)))
    assert spec["nodeSelector"] == {"disk": "fast"}
    assert spec["tolerations"] == FULL.spec["tolerations"]
    assert spec["imagePullSecrets"] == [{"name": "ours"}, {"name": "pull"}]
    assert {"name": "scratch", "emptyDir": {}} in spec["volumes"]
    template = objects(FULL)["Deployment"]["spec"]["template"]
    assert template["metadata"]["labels"]["team"] == "a"


def test_a_label_of_the_runtime_does_not_break_the_selector() -> None:
    of = source(labels={"name": "else"})
    template = objects(of)["Deployment"]["spec"]["template"]
    assert template["metadata"]["labels"]["name"] == "modelmesh-serving-onnx"


def test_variables_of_the_adapter() -> None:
    secret = {"name": "X", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}
    adapter = {"serverType": "triton", "env": [{"name": "LOADTIME_TIMEOUT", "value": "9"}, secret]}
    of = source(
        builtInAdapter=adapter,
        containers=[SERVER],
        annotations={"maxLoadingConcurrency": "3"},
    )
    said = env(container(pod(of)))
    assert said["LOADTIME_TIMEOUT"] == "9"
    assert said["MODEL_REPOSITORY"] == "/models/_triton_models"
    assert said["X"] == secret["valueFrom"]
    assert said["MESH_LOAD_SLOTS"] == said["LOADING_CONCURRENCY"] == "3"


def test_an_adapter_writes_where_the_server_looks() -> None:
    said = env(container(pod(source(builtInAdapter={"serverType": "mlserver"}))))
    adapter = AdapterSettings.from_environment(said, capacity_bytes=1 << 30)
    assert adapter.root == Path("/models/_mlserver_models")
    assert AdapterSettings.from_environment({}, capacity_bytes=1 << 30) == AdapterSettings()


def test_the_servers_that_have_an_adapter() -> None:
    assert external_choice._LAYOUTS.keys() == ADAPTED


def test_storage_secret_and_claims_are_mounted() -> None:
    spec = pod(source(), claims=("a", "b"))
    volumes = {one["name"]: one for one in spec["volumes"]}
    assert volumes["storage-config"]["secret"] == {"secretName": "storage-config", "optional": True}
    assert volumes["claim-1"]["persistentVolumeClaim"] == {"claimName": "b", "readOnly": True}
    assert mounts(container(spec))["/pvc_mounts/b"] == "claim-1"


def test_claims_of() -> None:
    storage = {"p": {"type": "pvc", "name": "one"}, "s": {"type": "s3", "name": "two"}, "q": {}}
    assert claims_of(storage, ["three"], CONFIG) == ("one",)
    assert claims_of(storage, ["three"], replace(CONFIG, allow_any_claim=True)) == ("one", "three")


def test_security() -> None:
    spec = pod(source())
    security = container(spec)["securityContext"]
    assert security["runAsNonRoot"] and security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    written = {m["mountPath"] for m in container(spec)["volumeMounts"] if not m.get("readOnly")}
    assert written == {"/tmp", "/models"}


def test_rolls_without_a_pod_less_and_with_time_to_drain() -> None:
    spec = objects(source())["Deployment"]["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": "25%", "maxUnavailable": 0}
    settings = {f.name: f.default for f in InstanceSettings.__dataclass_fields__.values()}
    assert settings["drain_notice_ms"] == DRAIN_NOTICE_MS
    assert settings["drain_timeout_ms"] == DRAIN_TIMEOUT_MS
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] * 1_000 > (
        DRAIN_NOTICE_MS + DRAIN_TIMEOUT_MS
    )


def test_the_resource_stays_as_it_was() -> None:
    before = copy.deepcopy(FULL.resource)
    objects(FULL)
    assert FULL.resource == before


HPA = "serving.kserve.io/"


@pytest.mark.parametrize(
    ("said", "least", "most", "metric", "target"),
    [
        ({}, 1, 1, "cpu", 80),
        ({"min-scale": "2", "max-scale": "6"}, 2, 6, "cpu", 80),
        ({"min-scale": "4", "max-scale": "2"}, 4, 4, "cpu", 80),
        ({"metrics": "memory", "targetUtilizationPercentage": "60"}, 1, 1, "memory", 60),
    ],
)
def test_the_autoscaler(
    said: dict[str, str], least: int, most: int, metric: str, target: int
) -> None:
    marks = {HPA + "autoscalerClass": "hpa", **{HPA + k: v for k, v in said.items()}}
    made = objects(source(annotations=marks))["HorizontalPodAutoscaler"]
    check_schema(made)
    spec = made["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (least, most)
    (wanted,) = spec["metrics"]
    assert wanted["resource"]["name"] == metric
    assert wanted["resource"]["target"]["averageUtilization"] == target
    assert spec["scaleTargetRef"]["name"] == "modelmesh-serving-onnx"


def test_without_the_class_there_is_no_autoscaler() -> None:
    assert "HorizontalPodAutoscaler" not in objects(source(annotations={HPA + "max-scale": "9"}))


@pytest.mark.parametrize(
    ("spec", "marks", "reason", "said"),
    [
        ({"disabled": True}, {}, "RuntimeDisabled", "disabled"),
        ({"multiModel": False}, {}, "SingleModelRuntime", "multiModel"),
        ({"builtInAdapter": {"serverType": "ovms"}}, {}, "ServerTypeUnsupported", "ovms"),
        ({"replicas": "two"}, {}, "InvalidRuntime", "spec.replicas"),
        ({"replicas": -1}, {}, "InvalidRuntime", "spec.replicas"),
        ({}, {"min-scale": "0"}, "InvalidRuntime", "min-scale"),
        ({}, {"max-scale": "many"}, "InvalidRuntime", "max-scale"),
        ({}, {"metrics": "rps"}, "InvalidRuntime", "cpu or memory"),
    ],
)
def test_refused(spec: Any, marks: dict[str, str], reason: str, said: str) -> None:
    annotations = {HPA + "autoscalerClass": "hpa", **{HPA + k: v for k, v in marks.items()}}
    of = source(annotations=annotations, **spec)
    found = refusal(of)
    assert found is not None
    assert found.reason == reason
    assert said in found.message
    assert objects(of) == {}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"containers": [{"image": "x"}]}, r"spec\.containers\[0\]\.name"),
        ({"containers": [{"name": "x"}]}, r"spec\.containers\[0\]\.image"),
        ({"volumes": ["x"]}, r"spec\.volumes"),
        ({"labels": {"a": 1}}, r"spec\.labels"),
        ({"grpcEndpoint": "unix:/x.sock"}, r"spec\.grpcEndpoint"),
        ({"grpcEndpoint": "unix:/a/../b.sock"}, r"spec\.grpcEndpoint"),
    ],
)
def test_bad_pod_specs_name_the_field(spec: Any, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        objects(source(**spec))
