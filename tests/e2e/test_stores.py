"""Models in S3: by KServe's storage-config, and by the standard AWS environment."""

from __future__ import annotations

import json

import pytest

from tests.e2e.asking import LABELS, Asker, isvc
from tests.e2e.conftest import Shared
from tests.e2e.test_failed_loads import with_key

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]


def test_a_key_of_the_storage_config(shared: Shared, ask: Asker) -> None:
    ask.apply(with_key(isvc("by-key", ""), "my-store", "models/iris"))
    assert ask.labels("by-key") == LABELS
    assert ask.delete("by-key")


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
