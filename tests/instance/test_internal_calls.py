"""How a Load is put, and understood at the other end."""

from __future__ import annotations

import pytest

from mesh.core.policy import Policy
from mesh.core.types import LoadPriority, ModelRecord
from mesh.internal_calls import PATHS, SERVICE, load_request, load_timeout_ms, priority_of
from mesh.registry import decode_model
from protos import mesh_internal_pb2 as pb

TERMS = {"revision": 7, "last_used_at_ms": 8, "pin": True, "use_score": 1.5, "reason": "rate"}


@pytest.mark.parametrize("priority", list(LoadPriority))
def test_what_is_asked_is_what_is_understood(priority: LoadPriority) -> None:
    model = ModelRecord("m", "onnx", path="file:///m")
    request = pb.LoadRequest.FromString(load_request("m", model, priority=priority, **TERMS))
    assert priority_of(request) is priority
    assert {name: getattr(request, name) for name in TERMS} == TERMS
    assert decode_model("m", request.model_record) == model


@pytest.mark.parametrize("told", [-1, 3, 1_000])
def test_a_priority_of_another_version_counts_as_awaited(told: int) -> None:
    assert priority_of(pb.LoadRequest(priority=told)) is LoadPriority.AWAITED


def test_a_load_of_a_model_that_is_not_known_carries_no_record() -> None:
    asked = load_request("m", None, priority=LoadPriority.AWAITED, **TERMS)
    assert pb.LoadRequest.FromString(asked).model_record == b""


def test_a_model_may_say_how_long_its_load_takes() -> None:
    policy = Policy(load_timeout_ms=1_000, queue_timeout_ms=50)
    assert load_timeout_ms(ModelRecord("m", "onnx", load_timeout_ms=20), policy) == 70
    assert load_timeout_ms(ModelRecord("m", "onnx"), policy) == load_timeout_ms(None, policy)
    assert load_timeout_ms(None, policy) == 1_050


def test_each_method_of_the_service_has_its_path() -> None:
    methods = pb.DESCRIPTOR.services_by_name["Instance"].methods_by_name
    assert {path.removeprefix(SERVICE) for path in PATHS} >= set(methods)
