"""A model that cannot be loaded: LOADING_FAILED with its cause wherever one looks, and no loop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from mesh.samples import make_samples
from protos import mmesh_pb2 as mmesh
from tests.e2e.asking import (
    LABELS,
    MMESH,
    Asker,
    eventually,
    flowers,
    instances_of,
    isvc,
    rest,
    total,
)
from tests.e2e.conftest import Shared, StartMesh
from tests.e2e.models import heavy
from tests.etcd_server import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]

Code = grpc.StatusCode
REST_STATUS = {Code.FAILED_PRECONDITION: 412, Code.UNAVAILABLE: 503}


def attempts(shared: Shared) -> float:
    return total(instances_of(shared.mesh), "modelmesh_loadmodel_failure")


def check_failed(shared: Shared, ask: Asker, name: str, code: grpc.StatusCode, cause: str) -> None:
    """The reply by both protocols, `mesh describe`, `mesh get`, ModelMesh's status; no loop."""
    before = attempts(shared)
    found, message = ask.refused(flowers(name))
    assert found is code, message
    assert cause in message and name in message, message
    tried = attempts(shared)
    assert before + 1 <= tried <= before + 2  # at most once on each of two instances
    for _ in range(10):
        again, message = ask.refused(flowers(name))
        assert again is code and cause in message, message
    status, body = rest(shared.rest, "POST", f"/v2/models/{name}/infer", {"inputs": []})
    assert status == REST_STATUS[code] and cause in body["error"], (status, body)
    assert attempts(shared) <= before + 2
    described = shared.mesh.mesh("describe", "model", name)
    assert described.returncode == 0
    assert "LOADING_FAILED" in described.stdout and cause in described.stdout, described.stdout
    row = ask.rows()[name]
    assert row["state"] == "LOADING_FAILED" and cause in row["failure"], row
    model_id = row["model_id"]
    state = ask.call(
        MMESH + "getModelStatus", mmesh.GetStatusRequest(modelId=model_id), mmesh.ModelStatusInfo
    )
    assert state.status == mmesh.ModelStatusInfo.LOADING_FAILED
    assert any(cause in error for error in state.errors), state
    assert ask.delete(name)


def folder_with(root: Path, name: str, content: bytes, file: str = "model.onnx") -> str:
    folder = root / name
    folder.mkdir(exist_ok=True)
    (folder / file).write_bytes(content)
    return folder.as_uri()


def test_a_corrupt_artifact(shared: Shared, ask: Asker) -> None:
    ask.apply(isvc("corrupt", folder_with(shared.root, "corrupt", b"this is no model" * 100)))
    check_failed(shared, ask, "corrupt", Code.FAILED_PRECONDITION, "onnxruntime cannot load")


def test_a_truncated_artifact(shared: Shared, ask: Asker) -> None:
    content = (shared.models / "iris-0001" / "model.onnx").read_bytes()
    ask.apply(isvc("cut-off", folder_with(shared.root, "cut-off", content[: len(content) // 2])))
    check_failed(shared, ask, "cut-off", Code.FAILED_PRECONDITION, "onnxruntime cannot load")


def test_a_missing_artifact(shared: Shared, ask: Asker) -> None:
    ask.apply(isvc("missing", (shared.root / "nothing-here").as_uri()))
    check_failed(shared, ask, "missing", Code.FAILED_PRECONDITION, "nothing-here")


def test_a_missing_object(shared: Shared, ask: Asker) -> None:
    ask.apply(isvc("no-object", f"s3://{shared.bucket}/models/nothing-here"))
    check_failed(shared, ask, "no-object", Code.FAILED_PRECONDITION, "nothing-here")


def test_an_artifact_of_another_format(shared: Shared, ask: Asker) -> None:
    content = (shared.models / "iris-0001" / "model.onnx").read_bytes()
    ask.apply(isvc("wrong-format", folder_with(shared.root, "wrong-format", content), "sklearn"))
    check_failed(shared, ask, "wrong-format", Code.FAILED_PRECONDITION, "skops")


def test_a_pickle_is_refused_and_the_setting_named(shared: Shared, ask: Asker) -> None:
    uri = folder_with(shared.root, "pickled", b"\x80\x04N.", "model.pkl")
    ask.apply(isvc("pickled", uri, "sklearn"))
    check_failed(shared, ask, "pickled", Code.FAILED_PRECONDITION, "--allow-pickle")


def test_a_file_outside_of_the_roots_is_refused(shared: Shared, ask: Asker, tmp_path: Path) -> None:
    shutil.copytree(shared.models / "iris-0001", tmp_path / "iris")
    ask.apply(isvc("outside", (tmp_path / "iris").as_uri()))
    check_failed(shared, ask, "outside", Code.FAILED_PRECONDITION, "--file-root")
    (shared.root / "way-out").symlink_to(tmp_path / "iris")
    ask.apply(isvc("way-out", (shared.root / "way-out").as_uri()))
    check_failed(shared, ask, "way-out", Code.FAILED_PRECONDITION, "--file-root")


def test_a_format_that_nothing_runs(shared: Shared, ask: Asker) -> None:
    ask.apply(isvc("no-runtime", folder_with(shared.root, "no-runtime", b"x"), "paddle"))
    code, message = ask.refused(flowers("no-runtime"))
    assert code is Code.FAILED_PRECONDITION, message
    assert "paddle" in message and "onnx" in message, message
    assert ask.delete("no-runtime")


def with_key(manifest: dict[str, Any], key: str, path: str) -> dict[str, Any]:
    model = manifest["spec"]["predictor"]["model"]
    del model["storageUri"]
    model["storage"] = {"key": key, "path": path}
    return manifest


def store(shared: Shared, key: str, endpoint: str, **changes: str) -> None:
    """Another entry of the storage-config directory."""
    entry = {
        "type": "s3",
        "access_key_id": "test-key-id",
        "secret_access_key": "test-secret",
        "endpoint_url": endpoint,
        "bucket": "the-models",
        "region": "us-east-1",
        **changes,
    }
    (shared.storage_config / key).write_text(json.dumps(entry))


def test_an_unreachable_store(shared: Shared, ask: Asker) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    store(shared, "nobody", f"http://{endpoint}")
    ask.apply(with_key(isvc("unreachable", ""), "nobody", "models/iris"))
    check_failed(shared, ask, "unreachable", Code.UNAVAILABLE, endpoint)


def test_a_bucket_that_is_not_there(shared: Shared, ask: Asker) -> None:
    ask.apply(isvc("no-bucket", "s3://no-such-bucket/models/iris"))
    check_failed(shared, ask, "no-bucket", Code.FAILED_PRECONDITION, "no-such-bucket")


def test_a_key_that_the_storage_config_does_not_hold(shared: Shared, ask: Asker) -> None:
    ask.apply(with_key(isvc("no-key", ""), "no-such-key", "models/iris"))
    check_failed(shared, ask, "no-key", Code.FAILED_PRECONDITION, "no-such-key")


@pytest.fixture
def signing_store(samples: Path, tmp_path: Path) -> Iterator[str]:
    """An S3 server that checks signatures; the secret is ``right``."""
    shutil.copytree(samples / "iris-0001", tmp_path / "the-models" / "models" / "iris")
    command = [str(Path(sys.executable).parent / "rclone"), "serve", "s3"]
    command += ["--config", "/dev/null", "--addr", "127.0.0.1:0", "--auth-key", "id,right"]
    with subprocess.Popen([*command, str(tmp_path)], stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            started = next(line for line in server.stderr if "Starting s3 server on" in line)
            yield started.split("[")[1].split("]")[0].rstrip("/")
        finally:
            os.kill(server.pid, signal.SIGKILL)


def test_a_wrong_secret(shared: Shared, ask: Asker, signing_store: str) -> None:
    store(shared, "wrong", signing_store, access_key_id="id", secret_access_key="wrong")
    ask.apply(with_key(isvc("wrong-secret", ""), "wrong", "models/iris"))
    code, message = ask.refused(flowers("wrong-secret"))
    assert "wrong" in message and "secret" in message.lower(), message
    assert code is Code.FAILED_PRECONDITION, message
    described = ask.describe("wrong-secret")
    assert described["row"]["state"] == "LOADING_FAILED"
    text = json.dumps(described) + message
    assert "right" not in text.replace("copyright", ""), "no secret in any message"
    assert ask.delete("wrong-secret")


def test_a_model_larger_than_any_pod_is_refused_for_good(shared: Shared, ask: Asker) -> None:
    heavy(shared.root / "giant" / "model.onnx", mib=4)
    ask.apply(isvc("giant", (shared.root / "giant").as_uri()))
    for _ in range(2):
        code, message = ask.refused(flowers("giant"))
        assert code is Code.FAILED_PRECONDITION, message
        assert "giant" in message and "capacity" in message, message
    assert ask.delete("giant")


def test_a_stated_size_larger_than_any_pod_is_refused_without_pulling(
    shared: Shared, ask: Asker
) -> None:
    before = attempts(shared)
    size = {"mesh.serving/model-size": "1Gi"}
    uri = (shared.models / "iris-0001").as_uri()
    ask.apply(isvc("stated-giant", uri, annotations=size))
    code, message = ask.refused(flowers("stated-giant"))
    assert code is Code.FAILED_PRECONDITION and "capacity" in message, message
    assert attempts(shared) == before
    assert ask.delete("stated-giant")


def test_a_failed_model_is_tried_again_after_its_expiry(
    start_mesh: StartMesh, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    make_samples(root / "made", 5)
    (root / "late").mkdir()
    expiry = ("--failure-expiry", "1s")
    mesh = start_mesh("--file-root", str(root), "--instances", "1", *expiry).ready()
    with Asker(mesh.address) as ask:
        ask.apply(isvc("late", (root / "late").as_uri()))
        code, message = ask.refused(flowers("late"))
        assert code is Code.FAILED_PRECONDITION, message
        shutil.copy(root / "made" / "iris-0001" / "model.onnx", root / "late" / "model.onnx")

        def answers() -> bool:
            try:
                return ask.labels("late") == LABELS
            except grpc.RpcError:
                return False

        eventually(answers, "the model that can be loaded now")
        assert ask.rows()["late"]["state"] == "LOADED"
