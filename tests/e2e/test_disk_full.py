"""A disk that is full while a model is pulled: an error that names it, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import grpc
import numpy as np
import pytest

from tests.e2e.asking import LABELS, Asker, eventually, flowers, isvc, raw_request
from tests.e2e.conftest import AWS
from tests.e2e.models import heavy
from tests.e2e.processes import serving
from tests.etcd_server import EtcdServer, free_port

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture
def large_in_the_bucket(s3_endpoint: str, bucket: str, tmp_path: Path) -> Any:
    store = boto3.client(
        "s3",
        endpoint_url=s3_endpoint,
        aws_access_key_id="test-key-id",
        aws_secret_access_key="test-secret",
        region_name="us-east-1",
    )
    path = heavy(tmp_path / "large" / "model.onnx", mib=4)
    store.upload_file(str(path), bucket, "models/large/model.onnx")
    return store


def test_a_full_disk(
    tiny_disk: Path,
    large_in_the_bucket: Any,
    s3_endpoint: str,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {**AWS, "AWS_ENDPOINT_URL": s3_endpoint}.items():
        monkeypatch.setenv(name, value)
    grpc_port = str(free_port())
    with (
        EtcdServer() as etcd,
        serving(tmp_path, "instance", etcd.endpoint, "--cache-dir", str(tiny_disk)) as instance,
        serving(
            tmp_path, "router", etcd.endpoint, "--grpc-port", grpc_port, "--rest-port", "0"
        ) as router,
        Asker(f"127.0.0.1:{grpc_port}") as ask,
    ):
        instance.ready()
        router.ready()
        eventually(lambda: bool(ask.rows("instances")), "the instance in the router's view")
        ask.apply(isvc("large", f"s3://{bucket}/models/large"))
        code, message = ask.refused(raw_request("large", x=np.ones((1, 4), np.float32)))
        assert code is grpc.StatusCode.UNAVAILABLE, message
        assert "No space left" in message or "disk" in message, message
        assert ask.rows()["large"]["state"] == "LOADING_FAILED"
        left = [p for p in tiny_disk.rglob("*") if p.is_file() and p.stat().st_size > 65_536]
        assert left == [], "a partial artifact"
        ask.apply(isvc("small", f"s3://{bucket}/models/iris"))
        assert ask.labels("small") == LABELS
        assert ask.refused(flowers("large"))[0] is grpc.StatusCode.UNAVAILABLE
