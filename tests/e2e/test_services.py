"""Health, reflection and ModelMesh's management service, as their clients ask them."""

from __future__ import annotations

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from protos import health_pb2 as health
from protos import mmesh_pb2 as mm
from protos import reflection_pb2 as reflection
from tests.e2e.asking import LABELS, MMESH, Asker, failure_of, flowers, raw_request
from tests.e2e.conftest import Shared

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]

Status = mm.ModelStatusInfo
VStatus = mm.VModelStatusInfo


def test_health(ask: Asker) -> None:
    for service in ("", "inference.GRPCInferenceService", "mmesh.ModelMesh"):
        reply = ask.call(
            "/grpc.health.v1.Health/Check",
            health.HealthCheckRequest(service=service),
            health.HealthCheckResponse,
        )
        assert reply.status == health.HealthCheckResponse.SERVING
    watch = ask.channel.unary_stream("/grpc.health.v1.Health/Watch")
    states = watch(health.HealthCheckRequest().SerializeToString(), timeout=60)
    first = health.HealthCheckResponse.FromString(next(states))
    assert first.status == health.HealthCheckResponse.SERVING
    states.cancel()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_what_reflection_tells_is_enough_to_ask_a_model(ask: Asker, version: str) -> None:
    """As grpcurl does: find the service, take its files, build the messages from them."""
    info = ask.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=lambda m: m.SerializeToString(),
        response_deserializer=reflection.ServerReflectionResponse.FromString,
    )
    service = "inference.GRPCInferenceService"
    questions = [
        reflection.ServerReflectionRequest(list_services=""),
        reflection.ServerReflectionRequest(file_containing_symbol=service),
        reflection.ServerReflectionRequest(file_containing_symbol="no.such.Thing"),
    ]
    names, files, unknown = list(info(iter(questions), timeout=60))
    assert service in {s.name for s in names.list_services_response.service}
    assert unknown.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
    pool = descriptor_pool.DescriptorPool()
    for content in files.file_descriptor_response.file_descriptor_proto:
        pool.Add(descriptor_pb2.FileDescriptorProto.FromString(content))
    method = pool.FindServiceByName(service).FindMethodByName("ModelInfer")
    assert method.input_type.full_name == "inference.ModelInferRequest"
    assert "raw_input_contents" in method.input_type.fields_by_name


# ---- mmesh.ModelMesh ----


def status(ask: Asker, model_id: str) -> mm.ModelStatusInfo:
    return ask.call(MMESH + "getModelStatus", mm.GetStatusRequest(modelId=model_id), Status)


def registration(shared: Shared, model_id: str, **fields: bool) -> mm.RegisterModelRequest:
    uri = (shared.models / "iris-0001").as_uri()
    return mm.RegisterModelRequest(
        modelId=model_id, modelInfo=mm.ModelInfo(type="onnx", path=uri), **fields
    )


def test_register_ask_ensure_loaded_and_unregister(shared: Shared, ask: Asker) -> None:
    assert status(ask, "by-id").status == Status.NOT_FOUND
    first = ask.call(MMESH + "registerModel", registration(shared, "by-id"), Status)
    assert first.status == Status.NOT_LOADED
    loaded = ask.call(
        MMESH + "ensureLoaded", mm.EnsureLoadedRequest(modelId="by-id", sync=True), Status
    )
    assert loaded.status == Status.LOADED and len(loaded.modelCopyInfos) == 1
    reply = ask.infer(flowers("anything"), [("mm-model-id", "by-id")])
    assert reply.model_name == "anything"  # the name that the client used
    request = mm.UnregisterModelRequest(modelId="by-id")
    ask.call(MMESH + "unregisterModel", request, mm.UnregisterModelResponse)
    assert status(ask, "by-id").status == Status.NOT_FOUND
    ask.call(MMESH + "unregisterModel", request, mm.UnregisterModelResponse)  # idempotent
    missing = mm.EnsureLoadedRequest(modelId="by-id", sync=True)
    assert ask.call(MMESH + "ensureLoaded", missing, Status).status == Status.NOT_FOUND


def test_registering_with_a_load_answers_when_it_is_loaded(shared: Shared, ask: Asker) -> None:
    wanted = registration(shared, "by-id-now", loadNow=True, sync=True)
    assert ask.call(MMESH + "registerModel", wanted, Status).status == Status.LOADED
    other = registration(shared, "by-id-now")
    other.modelInfo.path += "-elsewhere"
    error = failure_of(lambda: ask.call(MMESH + "registerModel", other, Status))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    ask.call(
        MMESH + "unregisterModel",
        mm.UnregisterModelRequest(modelId="by-id-now"),
        mm.UnregisterModelResponse,
    )


def test_a_registration_without_a_type_is_invalid(shared: Shared, ask: Asker) -> None:
    wanted = registration(shared, "typeless")
    wanted.modelInfo.type = ""
    error = failure_of(lambda: ask.call(MMESH + "registerModel", wanted, Status))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and "type" in error.details()


def test_the_header_routes_whatever_method_a_runtime_has(shared: Shared, ask: Asker) -> None:
    request = raw_request("", input=np.ones((1, 4), np.float32))
    for header in ("mm-vmodel-id", "mm-model-id"):
        reply = ask.infer(request, [(header, "iris-0001")])
        assert reply.model_name == "iris-0001"
    assert ask.labels("iris-0001") == LABELS
