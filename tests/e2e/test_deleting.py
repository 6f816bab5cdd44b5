"""Deleting a model lets its requests in flight finish; then it is gone from memory."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from protos import oip_pb2 as oip
from tests.e2e.asking import Asker, eventually, instances_of, isvc, total
from tests.e2e.conftest import Shared
from tests.e2e.models import rounds, slow

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]

# A good second on a machine of our day.
ROUNDS = 40_000


def in_flight(shared: Shared) -> float:
    return total(instances_of(shared.mesh), "mesh_inflight_requests")


def begin(shared: Shared, ask: Asker, name: str) -> Any:
    """A request that runs in the instance now."""
    slow(shared.root / name / "model.onnx")
    ask.apply(isvc(name, (shared.root / name).as_uri()))
    ask.infer(rounds(name, 1))
    running = ask.infer_later(rounds(name, ROUNDS))
    eventually(lambda: in_flight(shared) >= 1, "the request inside")
    return running


def test_requests_in_flight_finish(shared: Shared, ask: Asker) -> None:
    running = begin(shared, ask, "leaving")
    assert ask.delete("leaving")
    assert not running.done(), "the request was to outlast the deletion"
    code, message = ask.refused(rounds("leaving", 1))
    assert code is grpc.StatusCode.NOT_FOUND and "leaving" in message
    reply = oip.ModelInferResponse.FromString(running.result(timeout=60))
    assert reply.model_name == "leaving"

    def gone() -> bool:
        models = total(instances_of(shared.mesh), "modelmesh_instance_models_total")
        rows = ask.rows()
        return "leaving" not in rows and models == sum(r["copies_loaded"] for r in rows.values())

    eventually(gone, "the model's unloading")


def test_unload_by_the_repository_lets_requests_finish(shared: Shared, ask: Asker) -> None:
    running = begin(shared, ask, "resting")
    unload = oip.RepositoryModelUnloadRequest(model_name="resting")
    ask.call(
        "/inference.GRPCInferenceService/RepositoryModelUnload",
        unload,
        oip.RepositoryModelUnloadResponse,
    )
    assert running.result(timeout=60)
    assert ask.infer(rounds("resting", 1)).model_name == "resting"  # loaded anew
    assert ask.delete("resting")
