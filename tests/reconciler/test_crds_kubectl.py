"""Manifests as KServe's and ModelMesh's documentation has them, and what kubectl shows of them.

``manifests/`` holds the shapes of well-known examples: applied as they are, nothing is lost and
nothing changes when they are applied again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from mesh.core.errors import InvalidArgument
from mesh.manifest import parse_resource
from mesh.serving_runtime import parse_serving_runtime
from tests.kube_server import CRDS, PROJECT, KubeServer, crd_documents
from tests.reconciler.resources import KINDS, MANIFESTS, documents, example, path_of

DOCUMENTS = [one for file in sorted(MANIFESTS.glob("*.yaml")) for one in documents(file)]
RESOURCES = [one for one in DOCUMENTS if one["kind"] in KINDS]
MERGE = "application/merge-patch+json"


def name_of(resource: dict[str, Any]) -> str:
    return f"{resource['kind']}-{resource['metadata']['name']}"


@pytest.fixture(scope="module")
def kubectl_there() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on the PATH: apt-get install kubernetes-client")


@pytest.fixture(scope="module")
def applied(kubectl_there: None, kube: KubeServer) -> Iterator[str]:
    """A namespace with every manifest in it."""
    namespace = kube.create_namespace("applied")
    done = kube.kubectl("apply", "-f", str(MANIFESTS), namespace=namespace)
    assert done.returncode == 0, done.stderr
    yield namespace
    for one in RESOURCES:
        if one["kind"] == "ClusterServingRuntime":
            kube.request("DELETE", path_of(one["kind"], "", one["metadata"]["name"]))


@pytest.mark.kube
def test_nothing_changes_when_a_manifest_is_applied_again(kube: KubeServer, applied: str) -> None:
    """kubectl says "configured" of two: it does not see the default in a list, nor a Secret's
    stringData. No spec is another for it."""
    again = kube.kubectl("apply", "-f", str(MANIFESTS), namespace=applied)
    assert again.returncode == 0, again.stderr
    lines = again.stdout.splitlines()
    assert len(lines) == len(DOCUMENTS)
    changed = {line.split()[0] for line in lines if not line.endswith(" unchanged")}
    assert changed <= {"inferenceservice.serving.kserve.io/own-server", "secret/storage-config"}
    paths = [path_of(one["kind"], applied, one["metadata"]["name"]) for one in RESOURCES]
    assert {kube.request("GET", path)["metadata"]["generation"] for path in paths} == {1}


@pytest.mark.kube
@pytest.mark.parametrize("resource", RESOURCES, ids=name_of)
def test_a_manifest_is_kept_whole(kube: KubeServer, applied: str, resource: dict[str, Any]) -> None:
    path = path_of(resource["kind"], applied, resource["metadata"]["name"])
    stored = kube.request("GET", path)
    assert_holds(stored["spec"], resource["spec"], "spec")


def assert_holds(whole: object, part: object, path: str) -> None:
    """Everything of ``part`` is in ``whole``, which may have more (defaults)."""
    match whole, part:
        case dict(), dict():
            for key, value in part.items():
                assert key in whole, f"{path}.{key}"
                assert_holds(whole[key], value, f"{path}.{key}")
        case list(), list():
            assert len(whole) == len(part), path
            for at, (one, other) in enumerate(zip(whole, part, strict=True)):
                assert_holds(one, other, f"{path}[{at}]")
        case _:
            assert whole == part, path


@pytest.mark.parametrize("resource", RESOURCES, ids=name_of)
def test_the_command_line_takes_the_same_manifests(resource: dict[str, Any]) -> None:
    name = resource["metadata"]["name"]
    match resource["kind"]:
        case "ServingRuntime" | "ClusterServingRuntime":
            assert parse_serving_runtime(resource).name == name
        case "InferenceService" if "containers" in resource["spec"]["predictor"]:
            with pytest.raises(InvalidArgument, match="only containers"):
                parse_resource(resource)
        case "InferenceService" | "Predictor":
            assert parse_resource(resource).name == name
        case kind:
            assert kind == "InferenceGraph"  # which the command line does not serve yet


TRAFFIC = [
    {"revisionName": "iris-2", "latestRevision": True, "percent": 90},
    {"revisionName": "iris-1", "tag": "prev", "percent": 10},
]
READY = [{"type": "Ready", "status": "True"}]
COLUMNS = [
    (
        "isvc",
        "InferenceService",
        {
            "url": "grpc://mesh:8033",
            "conditions": READY,
            "components": {"predictor": {"traffic": TRAFFIC}},
        },
        "NAME URL READY PREV LATEST PREVROLLEDOUTREVISION LATESTREADYREVISION AGE",
        "iris grpc://mesh:8033 True 10 90 iris-1 iris-2",
    ),
    (
        "predictor",
        "Predictor",
        {
            "available": True,
            "activeModelState": "Loaded",
            "targetModelState": "Loading",
            "transitionStatus": "InProgress",
        },
        "NAME TYPE AVAILABLE ACTIVEMODEL TARGETMODEL TRANSITION AGE",
        "iris onnx true Loaded Loading InProgress",
    ),
    (
        "servingruntime",
        "ServingRuntime",
        {},
        "NAME DISABLED MODELTYPE CONTAINERS AGE",
        "iris onnx server",
    ),
    (
        "ig",
        "InferenceGraph",
        {"url": "http://mesh:8008/graphs/iris", "conditions": READY},
        "NAME URL READY AGE",
        "iris http://mesh:8008/graphs/iris True",
    ),
]


@pytest.mark.kube
@pytest.mark.parametrize(
    ("asked", "kind", "status", "header", "row"), COLUMNS, ids=[row[1] for row in COLUMNS]
)
def test_the_columns_of_kubectl_get(
    kubectl_there: None,
    kube: KubeServer,
    namespace: str,
    asked: str,
    kind: str,
    status: dict[str, Any],
    header: str,
    row: str,
) -> None:
    kube.request("POST", path_of(kind, namespace), example(kind))
    path = f"{path_of(kind, namespace, 'iris')}/status"
    kube.request("PATCH", path, {"status": status}, content_type=MERGE)
    lines = kube.kubectl("get", asked, namespace=namespace).stdout.splitlines()
    assert lines[0].split() == header.split()
    *shown, age = lines[1].split()
    assert shown == row.split()
    assert age.endswith("s")


@pytest.mark.kube
def test_one_word_lists_them_all(kubectl_there: None, kube: KubeServer, namespace: str) -> None:
    for kind in KINDS:
        if kind != "ClusterServingRuntime":
            kube.request("POST", path_of(kind, namespace), example(kind))
    listed = kube.kubectl("get", "kserve", "-o", "json", namespace=namespace)
    kinds = {item["kind"] for item in json.loads(listed.stdout)["items"]}
    assert kinds >= set(KINDS) - {"ClusterServingRuntime"}


def test_kustomize_writes_the_definitions_out(kubectl_there: None) -> None:
    """Whatever its age, it understands the files' YAML aliases, and leaves out none of them."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(CRDS.relative_to(PROJECT))],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    built = {one["metadata"]["name"]: one for one in yaml.safe_load_all(done.stdout)}
    assert built == {one["metadata"]["name"]: one for one in crd_documents()}
