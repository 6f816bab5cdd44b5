"""The files that a cluster takes, applied to the mesh of one machine: secret, runtime and model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.e2e.asking import LABELS, Asker
from tests.e2e.conftest import AWS, StartMesh

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]

RUNTIME = """\
apiVersion: serving.kserve.io/v1alpha1
kind: ServingRuntime
metadata:
  name: onnx-runtime
spec:
  multiModel: true
  supportedModelFormats:
    - {name: onnx, version: "1", autoSelect: true}
  containers:
    - {name: mesh, image: "mesh:latest"}
"""
MODEL = """\
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: iris
  annotations:
    serving.kserve.io/deploymentMode: ModelMesh
spec:
  predictor:
    model:
      modelFormat: {name: onnx}
      runtime: onnx-runtime
      storage: {key: my-store, path: models/iris}
"""


def test_one_file_of_secret_runtime_and_model_is_served_and_told_as_by_kubectl(
    start_mesh: StartMesh, tmp_path: Path, s3_endpoint: str, bucket: str
) -> None:
    runtime = tmp_path / "runtime.yaml"
    runtime.write_text(RUNTIME)
    mesh = start_mesh("--instances", "1", "--serving-runtime", str(runtime)).ready()
    entry = {
        "type": "s3",
        "access_key_id": AWS["AWS_ACCESS_KEY_ID"],
        "secret_access_key": AWS["AWS_SECRET_ACCESS_KEY"],
        "endpoint_url": s3_endpoint,
        "bucket": bucket,
        "region": "us-east-1",
    }
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "storage-config"},
        "stringData": {"my-store": json.dumps(entry)},
    }
    text = "---\n".join((MODEL, RUNTIME, yaml.safe_dump(secret)))
    folder = str(mesh.state["storage_config"])
    done = mesh.mesh("apply", "-f", "-", "--wait", "--storage-config", folder, stdin=text)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "secret/storage-config created",
        "servingruntime.serving.kserve.io/onnx-runtime created",
        "inferenceservice.serving.kserve.io/iris created",
    ]
    with Asker(mesh.address) as ask:
        assert ask.labels("iris") == LABELS
    resource = json.loads(mesh.mesh("get", "isvc", "iris", "-o", "json").stdout)
    applied = yaml.safe_load(MODEL)
    assert resource["spec"] == applied["spec"]
    status = resource["status"]
    assert {one["type"]: one["status"] for one in status["conditions"]} == dict.fromkeys(
        ("IngressReady", "PredictorReady", "Ready"), "True"
    )
    assert status["modelStatus"]["states"]["activeModelState"] == "Loaded"
    assert (status["servingRuntimeName"], status["url"]) == (
        "onnx-runtime",
        f"grpc://{mesh.address}",
    )
