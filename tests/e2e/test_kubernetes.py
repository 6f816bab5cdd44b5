"""kubectl in, inference out: the real controller between a real API server and a real mesh.

One cluster, one mesh and one controller for the file; each test has services of its own.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.clients.test_clients import PYTHON
from tests.e2e.asking import Asker, eventually, raw_request
from tests.e2e.conftest import AWS, ended_well
from tests.e2e.processes import serving
from tests.etcd_server import EtcdServer
from tests.kube_server import KubeServer
from tests.runtimes.models import write
from tests.up.live import LiveMesh

pytestmark = [pytest.mark.e2e, pytest.mark.etcd, pytest.mark.kube]

BUCKET = "cluster-models"
KSERVE_SCRIPT = Path(__file__).parents[1] / "clients" / "kserve_cluster_script.py"


@dataclass(frozen=True)
class Cluster:
    """What the tests share. ``s3`` is the bucket's client."""

    kube: KubeServer
    namespace: str
    address: str
    s3: Any

    def kubectl(self, *arguments: str, stdin: str = "") -> str:
        done = self.kube.kubectl(*arguments, namespace=self.namespace, stdin=stdin)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def apply(self, *documents: dict[str, Any]) -> None:
        listing = {"apiVersion": "v1", "kind": "List", "items": list(documents)}
        self.kubectl("apply", "-f", "-", stdin=json.dumps(listing))

    def wait_ready(self, name: str) -> None:
        self.kubectl("wait", "--for=condition=Ready", f"isvc/{name}", "--timeout=60s")

    def status(self, name: str) -> dict[str, Any]:
        found = json.loads(self.kubectl("get", "isvc", name, "-o", "json"))
        status: dict[str, Any] = found.get("status") or {}
        return status

    def put_model(self, key: str, factor: float, folder: Path) -> None:
        """``y = x * factor``"""
        weights = numpy_helper.from_array(np.array([factor], np.float32), "w")
        path = write(
            folder / f"{factor}.onnx",
            [helper.make_node("Mul", ["x", "w"], ["y"])],
            {"x": (TensorProto.FLOAT, ["n"])},
            {"y": (TensorProto.FLOAT, ["n"])},
            [weights],
        )
        self.s3.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())

    def answer(self, name: str) -> float:
        """What the model makes of 1.0, asked through the router."""
        with Asker(self.address) as asker:
            reply = asker.infer(raw_request(name, x=np.ones(1, np.float32)))
        return float(np.frombuffer(reply.raw_output_contents[0], np.float32)[0])


def service(name: str, path: str, key: str = "minio") -> dict[str, Any]:
    """As ModelMesh's documentation has it."""
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": name,
            "annotations": {"serving.kserve.io/deploymentMode": "ModelMesh"},
        },
        "spec": {
            "predictor": {
                "model": {
                    "modelFormat": {"name": "onnx"},
                    "storage": {"key": key, "path": path},
                }
            }
        },
    }


RUNTIME = {
    "apiVersion": "serving.kserve.io/v1alpha1",
    "kind": "ServingRuntime",
    "metadata": {"name": "mesh-1.x"},
    "spec": {
        "multiModel": True,
        "supportedModelFormats": [{"name": "onnx", "version": "1", "autoSelect": True}],
        "containers": [],
    },
}


def secret(endpoint: str, **change: str) -> dict[str, Any]:
    entry = {
        "type": "s3",
        "access_key_id": AWS["AWS_ACCESS_KEY_ID"],
        "secret_access_key": AWS["AWS_SECRET_ACCESS_KEY"],
        "endpoint_url": endpoint,
        "bucket": BUCKET,
        "region": "us-east-1",
        **change,
    }
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "storage-config"},
        "stringData": {"minio": json.dumps(entry)},
    }


@pytest.fixture(scope="module")
def cluster(
    kube: KubeServer, s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    base = tmp_path_factory.mktemp("cluster")
    namespace = kube.create_namespace()
    s3 = boto3.client(
        "s3",
        endpoint_url=s3_endpoint,
        aws_access_key_id=AWS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=AWS["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    s3.create_bucket(Bucket=BUCKET)
    secrets = base / "storage"
    secrets.mkdir()
    with EtcdServer() as etcd:
        mesh = LiveMesh(
            base / "data",
            *("--etcd", etcd.endpoint, "--namespace", namespace, "--instances", "1"),
            *("--storage-config", str(secrets)),
        )
        flags = ("--kubeconfig", str(kube.kubeconfig("admin")), "--namespace", namespace)
        flags += ("--no-workloads", "--write-storage-config", str(secrets))
        with ended_well(mesh), serving(base, "controller", etcd.endpoint, *flags) as controller:
            mesh.ready()
            controller.ready()
            yield Cluster(kube, namespace, mesh.address, s3)


def test_kubectl_apply_leads_to_a_served_model_and_a_truthful_status(
    cluster: Cluster, s3_endpoint: str, tmp_path: Path
) -> None:
    cluster.put_model("times/two.onnx", 2.0, tmp_path)
    cluster.apply(RUNTIME, secret(s3_endpoint), service("double", "times/two.onnx"))
    cluster.wait_ready("double")
    assert cluster.answer("double") == 2.0
    header, row = cluster.kubectl("get", "isvc", "double").splitlines()
    shown = dict(zip(header.split(), row.split(), strict=False))
    assert shown["URL"] == f"grpc://modelmesh-serving.{cluster.namespace}:8033"
    assert shown["READY"] == "True"
    status = cluster.status("double")
    assert status["modelStatus"]["transitionStatus"] == "UpToDate"
    assert status["modelStatus"]["copies"] == {"failedCopies": 0, "totalCopies": 1}
    assert status["modelStatus"]["states"]["activeModelState"] == "Loaded"
    assert status["observedGeneration"] == 1


def test_a_changed_spec_answers_anew_and_a_bad_one_leaves_the_old_one_serving(
    cluster: Cluster, s3_endpoint: str, tmp_path: Path
) -> None:
    cluster.put_model("times/three.onnx", 3.0, tmp_path)
    cluster.put_model("times/five.onnx", 5.0, tmp_path)
    cluster.s3.put_object(Bucket=BUCKET, Key="times/broken.onnx", Body=b"not a model")
    cluster.apply(RUNTIME, secret(s3_endpoint), service("changes", "times/three.onnx"))
    cluster.wait_ready("changes")
    assert cluster.answer("changes") == 3.0
    cluster.apply(service("changes", "times/five.onnx"))
    eventually(lambda: cluster.answer("changes") == 5.0, "the new model's answer")
    cluster.apply(service("changes", "times/broken.onnx"))
    eventually(
        lambda: (
            cluster.status("changes")["modelStatus"]["transitionStatus"] == "BlockedByFailedLoad"
        ),
        "BlockedByFailedLoad",
    )
    status = cluster.status("changes")
    assert status["modelStatus"]["lastFailureInfo"]["reason"] == "ModelLoadFailed"
    assert status["modelStatus"]["states"] == {
        "activeModelState": "Loaded",
        "targetModelState": "FailedToLoad",
    }
    cluster.wait_ready("changes")  # still: the old one
    assert cluster.answer("changes") == 5.0
    cluster.apply(service("changes", "times/three.onnx"))
    eventually(lambda: cluster.answer("changes") == 3.0, "the way back")
    cluster.kubectl("delete", "isvc", "changes", "--wait=true", "--timeout=60s")
    with pytest.raises(Exception, match="changes"):
        cluster.answer("changes")


def test_a_model_whose_secret_is_wrong_is_served_soon_after_the_right_one_is_there(
    cluster: Cluster, s3_endpoint: str, tmp_path: Path
) -> None:
    cluster.put_model("times/seven.onnx", 7.0, tmp_path)
    cluster.apply(RUNTIME, secret(s3_endpoint, bucket="no-such-bucket"))
    cluster.apply(service("waits", "times/seven.onnx"))
    eventually(
        lambda: bool((cluster.status("waits").get("modelStatus") or {}).get("lastFailureInfo")),
        "the failure",
    )
    ready = {one["type"]: one["status"] for one in cluster.status("waits")["conditions"]}["Ready"]
    assert ready == "False"
    header, row = cluster.kubectl("get", "isvc", "waits").splitlines()
    assert "False" in row.split(), header
    cluster.apply(secret(s3_endpoint))
    cluster.wait_ready("waits")
    assert cluster.answer("waits") == 7.0


@pytest.mark.client
@pytest.mark.skipif(
    not PYTHON.exists(), reason=f"no {PYTHON}: `make test` installs the clients there"
)
def test_kserves_own_client_creates_one_and_waits_for_it(
    cluster: Cluster, s3_endpoint: str, tmp_path: Path
) -> None:
    cluster.put_model("times/nine.onnx", 9.0, tmp_path)
    cluster.apply(RUNTIME, secret(s3_endpoint))
    config = cluster.kube.kubeconfig("admin", namespace=cluster.namespace)
    done = subprocess.run(
        [str(PYTHON), str(KSERVE_SCRIPT), str(config), cluster.namespace, "times/nine.onnx"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    assert done.stdout.splitlines()[-1] == "passed"
    assert cluster.answer("from-kserve") == 9.0
