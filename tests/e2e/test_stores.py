"""Models in S3: by KServe's storage-config, and by the standard AWS environment."""

from __future__ import annotations

import json

import grpc
import pytest

from tests.e2e.asking import LABELS, Asker, flowers, isvc
from tests.e2e.conftest import Shared
from tests.e2e.test_failed_loads import with_key

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]


def test_a_key_of_the_storage_config(shared: Shared, ask: Asker) -> None:
    ask.apply(with_key(isvc("by-key", ""), "my-store", "models/iris"))
    assert ask.labels("by-key") == LABELS
    assert ask.delete("by-key")


def test_parameters_beside_the_key(shared: Shared, ask: Asker) -> None:
    manifest = with_key(isvc("by-parameters", ""), "my-store", "models/iris")
    storage = manifest["spec"]["predictor"]["model"]["storage"]
    storage["parameters"] = {"bucket": shared.bucket}
    ask.apply(manifest)
    assert ask.labels("by-parameters") == LABELS
    storage["parameters"] = {"bucket": "no-such-bucket"}
    ask.apply({**manifest, "metadata": {"name": "by-wrong-parameters"}})
    code, message = ask.refused(flowers("by-wrong-parameters"))
    assert code is grpc.StatusCode.FAILED_PRECONDITION and "no-such-bucket" in message
    assert ask.delete("by-parameters") and ask.delete("by-wrong-parameters")


def test_a_file_and_a_folder_are_both_artifacts(shared: Shared, ask: Asker) -> None:
    ask.apply(with_key(isvc("by-file", ""), "my-store", "models/iris/model.onnx"))
    assert ask.labels("by-file") == LABELS
    assert ask.delete("by-file")


def test_the_environments_credentials(shared: Shared, ask: Asker) -> None:
    ask.apply(isvc("by-environment", f"s3://{shared.bucket}/models/iris"))
    assert ask.labels("by-environment") == LABELS
    assert ask.delete("by-environment")


def test_no_secret_shows_anywhere(shared: Shared, ask: Asker) -> None:
    ask.apply(with_key(isvc("discreet", ""), "my-store", "models/iris"))
    assert ask.labels("discreet") == LABELS
    assert "test-secret" not in json.dumps(ask.describe("discreet"))
    logs = (shared.mesh.data_dir / "logs").glob("*.log")
    assert not [log for log in logs if b"test-secret" in log.read_bytes()]
    assert ask.delete("discreet")
