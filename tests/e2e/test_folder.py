"""`--models`: the mesh follows its folder; a changed model switches only when it has loaded."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest

from protos import oip_pb2 as oip
from tests.e2e.asking import Asker, eventually, flowers, raw_request
from tests.e2e.conftest import Shared
from tests.runtimes.models import matmul

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]

ONES = np.ones((1, 4), np.float32)


def weights(seed: int) -> list[float]:
    """What the model of this seed answers to ones."""
    w = np.random.default_rng(seed).standard_normal((4, 3)).astype(np.float32)
    return [round(float(v), 4) for v in (ONES @ w).reshape(-1)]


def answer(ask: Asker, name: str) -> list[float]:
    reply: oip.ModelInferResponse = ask.infer(raw_request(name, x=ONES))
    values = np.frombuffer(reply.raw_output_contents[0], np.float32)
    return [round(float(v), 4) for v in values]


def put(folder: Path, seed: int) -> None:
    """Written beside and renamed, as a careful person does."""
    made = matmul(folder.parent / f".{folder.name}-new" / "model.onnx", seed=seed)
    folder.mkdir(exist_ok=True)
    made.replace(folder / "model.onnx")


def test_a_changed_model_switches_without_a_gap_and_a_broken_one_never(
    shared: Shared, ask: Asker
) -> None:
    folder = shared.models / "changing"
    put(folder, seed=1)
    eventually(lambda: "changing" in ask.rows(), "the new model")
    assert answer(ask, "changing") == weights(1)
    first = ask.rows()["changing"]["model_id"]

    stop, wrong = threading.Event(), list[str]()

    def client() -> None:
        with Asker(shared.grpc) as other:
            while not stop.is_set():
                try:
                    if answer(other, "changing") not in (weights(1), weights(2)):
                        wrong.append("neither the old nor the new answer")
                except grpc.RpcError as error:
                    wrong.append(str(error))

    asking = threading.Thread(target=client)
    asking.start()
    try:
        put(folder, seed=2)
        eventually(lambda: answer(ask, "changing") == weights(2), "the switch")
    finally:
        stop.set()
        asking.join()
    assert not wrong, wrong[:3]
    assert ask.rows()["changing"]["model_id"] != first

    (folder / "model.onnx").write_bytes(b"broken" * 100)

    def failed() -> bool:
        row = ask.rows()["changing"]
        return bool(row["target_failure"])

    eventually(failed, "the failure of the broken one")
    assert answer(ask, "changing") == weights(2)
    shutil.rmtree(folder)
    eventually(lambda: "changing" not in ask.rows(), "the deletion")
    code, _ = ask.refused(flowers("changing"))
    assert code is grpc.StatusCode.NOT_FOUND
