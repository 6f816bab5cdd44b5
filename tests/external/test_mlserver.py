"""MLServer, unmodified, behind an instance (``--adapter mlserver``): a model of joblib."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import joblib
import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

from mesh.instance.answers import LoadOutcome
from mesh.runtimes.external_choice import adapted, external_runtimes
from protos import oip_pb2 as oip
from tests.external.rig import OIP, QUICK, ROOT, WAIT_S, Pod

PYTHON = ROOT / ".venv-mlserver" / "bin" / "mlserver"

pytestmark = pytest.mark.client


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[Pod]:
    if not PYTHON.exists():
        pytest.skip("MLServer is not installed: make .venv-mlserver/.installed")
    root = tmp_path / "served"
    root.mkdir()
    grpc_port, http_port, metrics_port = free_ports(3)
    settings = {
        "host": "127.0.0.1",
        "grpc_port": grpc_port,
        "http_port": http_port,
        "metrics_port": metrics_port,
        "model_repository_root": str(root / "_repository"),
        "load_models_at_startup": False,
        "parallel_workers": 0,
        "metrics_dir": str(tmp_path),
    }
    (root / "settings.json").write_text(json.dumps(settings))
    log = (tmp_path / "mlserver.log").open("wb")
    process = await asyncio.create_subprocess_exec(
        str(PYTHON), "start", str(root), stdout=log, stderr=log, cwd=tmp_path, env=dict(os.environ)
    )
    runtimes = external_runtimes(
        adapted("mlserver"),
        endpoint=f"127.0.0.1:{grpc_port}",
        env={"ROOT_MODEL_DIR": str(root), "LIMIT_PER_MODEL_CONCURRENCY": "3"},
        times=QUICK,
    )
    assert runtimes is not None
    served = Pod(tmp_path, runtimes, "sklearn")
    try:
        await served.start()
        yield served
    finally:
        await served.close()
        if process.returncode is None:
            process.terminate()
            async with asyncio.timeout(WAIT_S):
                await process.wait()
        log.close()


async def test_a_joblib_model_answers_under_the_clients_name_and_leaves_nothing_behind(
    pod: Pod, tmp_path: Path
) -> None:
    rows, classes = load_iris(return_X_y=True)
    model = LogisticRegression(max_iter=500).fit(rows, classes)
    folder = tmp_path / "models" / "iris__isvc-1"
    folder.mkdir(parents=True)
    joblib.dump(model, folder / "iris.joblib")
    loaded = await pod.load("iris__isvc-1")
    assert loaded.outcome is LoadOutcome.LOADED, loaded
    on_disk = (folder / "iris.joblib").stat().st_size
    assert loaded.size_bytes == round(1.25 * on_disk)
    assert pod.instance.pod.servables["iris__isvc-1"].max_concurrency == 3

    message = oip.ModelInferRequest(model_name="iris", id="7")
    tensor = message.inputs.add(name="predict", datatype="FP64", shape=list(rows.shape))
    tensor.contents.fp64_contents.extend(rows.ravel())
    raw = await pod.call(OIP + "ModelInfer", message, "iris__isvc-1", alias="iris")
    reply = oip.ModelInferResponse.FromString(raw)
    assert (reply.model_name, reply.id) == ("iris", "7")
    found = np.array(reply.outputs[0].contents.int64_contents)
    assert np.array_equal(found, model.predict(rows))

    raw = await pod.call(
        OIP + "ModelMetadata", oip.ModelMetadataRequest(name="iris"), "iris__isvc-1"
    )
    assert oip.ModelMetadataResponse.FromString(raw).name == "iris"

    message.model_version = "9"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await pod.call(OIP + "ModelInfer", message, "iris__isvc-1", alias="iris")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == "Model iris__isvc-1 with version 9 not found"
    assert "iris__isvc-1" in pod.instance.pod.servables  # the client's mistake: it is not lost

    assert await pod.instance.pod.unload("iris__isvc-1", "test")
    assert list((tmp_path / "served" / "_repository").iterdir()) == []


async def test_what_mlserver_cannot_load_fails_with_its_words(pod: Pod, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "broken"
    folder.mkdir(parents=True)
    (folder / "model.joblib").write_bytes(b"no pickle")
    failed = await pod.load("broken")
    assert failed.outcome is LoadOutcome.FAILED
    # What pickle says of the first byte, the n of "no pickle".
    assert failed.message.endswith(f"did not load model 'broken' (INTERNAL): {ord('n')}")
    assert pod.instance.pod.cache.used_bytes == 0
    assert list((tmp_path / "served" / "_repository").iterdir()) == []
