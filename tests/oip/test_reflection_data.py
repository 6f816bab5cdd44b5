"""A reflection client can build every service from what we answer, under the real names."""

from __future__ import annotations

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from mesh.oip import reflection_data
from mesh.oip.reflection_data import PUBLIC_SERVICES, answer
from protos import reflection_pb2

Request = reflection_pb2.ServerReflectionRequest


def _file_of(symbol: str) -> descriptor_pb2.FileDescriptorProto:
    response = answer(Request(host="h", file_containing_symbol=symbol))
    assert response.WhichOneof("message_response") == "file_descriptor_response"
    (serialised,) = response.file_descriptor_response.file_descriptor_proto
    return descriptor_pb2.FileDescriptorProto.FromString(serialised)


def test_services_are_listed_under_their_real_names() -> None:
    response = answer(Request(list_services="*"))
    names = [service.name for service in response.list_services_response.service]
    assert names == list(PUBLIC_SERVICES)
    assert "inference.GRPCInferenceService" in names


@pytest.mark.parametrize("service", PUBLIC_SERVICES)
def test_a_client_builds_the_service_from_the_answer(service: str) -> None:
    pool = descriptor_pool.DescriptorPool()
    described = _file_of(service)
    pool.Add(described)
    built = pool.FindServiceByName(service)
    assert len(built.methods) > 0
    for method in built.methods:
        assert method.input_type.full_name.startswith(described.package)
        assert method.output_type.full_name.startswith(described.package)


def test_infer_messages_carry_the_fields_of_the_protocol() -> None:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_file_of("inference.GRPCInferenceService.ModelInfer"))
    message = pool.FindMessageTypeByName("inference.ModelInferRequest")
    assert message.fields_by_name["raw_input_contents"].number == 7
    assert message.fields_by_name["inputs"].message_type.full_name == (
        "inference.ModelInferRequest.InferInputTensor"
    )


@pytest.mark.parametrize(
    "symbol",
    [
        "inference.ModelInferRequest.InferInputTensor",
        "inference.DataType",
        "mmesh.ModelStatusInfo.ModelStatus",
        "grpc.health.v1.HealthCheckResponse.SERVING",
    ],
)
def test_symbols_of_every_kind_are_found(symbol: str) -> None:
    assert reflection_data.file_containing_symbol(symbol) is not None


def test_a_file_is_found_by_the_name_that_it_was_given() -> None:
    described = _file_of("mmesh.ModelMesh")
    response = answer(Request(file_by_filename=described.name))
    assert response.file_descriptor_response.file_descriptor_proto[0] == (
        described.SerializeToString()
    )


def test_the_runtime_spi_is_not_shown() -> None:
    assert reflection_data.file_containing_symbol("mmesh.ModelRuntime") is None
    assert [service.name for service in _file_of("mmesh.ModelMesh").service] == ["ModelMesh"]


@pytest.mark.parametrize(
    ("request_message", "code"),
    [
        (Request(file_containing_symbol="mesh.oip.ModelInferRequest"), 5),
        (Request(file_by_filename="nowhere.proto"), 5),
        (Request(all_extension_numbers_of_type="inference.ModelInferRequest"), 5),
        (Request(), 3),
    ],
    ids=["symbol", "file", "extensions", "nothing"],
)
def test_what_is_not_there_is_an_error_response(request_message: Request, code: int) -> None:
    response = answer(request_message)
    assert response.error_response.error_code == code
    assert response.original_request == request_message
