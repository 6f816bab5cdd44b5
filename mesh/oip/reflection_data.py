"""Server reflection: our services under the names that clients know.

Inside the process the messages have package names of our own; what a reflection client (grpcurl,
Postman) gets are descriptors with the real ones (``inference``, ``mmesh``, ``grpc.health.v1``).
Pure: ``answer`` turns one reflection request into one response; whoever owns the stream calls it.
Nothing here fails: an unknown name is an ``ErrorResponse`` with NOT_FOUND.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Final

from google.protobuf import descriptor_pb2

from mesh.core.errors import Code
from protos import health_pb2, mesh_admin_pb2, mmesh_pb2, oip_pb2, reflection_pb2

OIP: Final = "inference.GRPCInferenceService"
MODEL_MESH: Final = "mmesh.ModelMesh"
HEALTH: Final = "grpc.health.v1.Health"
REFLECTION_V1: Final = "grpc.reflection.v1.ServerReflection"
REFLECTION_V1ALPHA: Final = "grpc.reflection.v1alpha.ServerReflection"
ADMIN: Final = "mesh.admin.v1.Admin"

# What the router serves on its public port.
PUBLIC_SERVICES: Final = (OIP, MODEL_MESH, HEALTH, REFLECTION_V1, REFLECTION_V1ALPHA, ADMIN)

# (generated module, real package, file name shown, services of the file that are not shown)
_FILES: Final = (
    (oip_pb2, "inference", "inference/grpc_service.proto", ()),
    (mmesh_pb2, "mmesh", "mmesh/model-mesh.proto", ("ModelRuntime",)),
    (health_pb2, "grpc.health.v1", "grpc/health/v1/health.proto", ()),
    (reflection_pb2, "grpc.reflection.v1", "grpc/reflection/v1/reflection.proto", ()),
    (reflection_pb2, "grpc.reflection.v1alpha", "grpc/reflection/v1alpha/reflection.proto", ()),
    (mesh_admin_pb2, "mesh.admin.v1", "mesh/admin/v1/mesh_admin.proto", ()),
)


def file_by_name(file_name: str) -> bytes | None:
    """A serialised FileDescriptorProto; None when there is no such file."""
    return _index()[0].get(file_name)


def file_containing_symbol(symbol: str) -> bytes | None:
    """The file that declares a service, method, message, enum or field of that full name."""
    files, file_of_symbol = _index()
    file_name = file_of_symbol.get(symbol)
    return None if file_name is None else files[file_name]


def answer(
    request: reflection_pb2.ServerReflectionRequest, services: Sequence[str] = PUBLIC_SERVICES
) -> reflection_pb2.ServerReflectionResponse:
    """The response to one message of a ServerReflectionInfo stream (v1 and v1alpha alike)."""
    response = reflection_pb2.ServerReflectionResponse(
        valid_host=request.host, original_request=request
    )
    asked = request.WhichOneof("message_request")
    found: bytes | None = None
    if asked == "list_services":
        for service in services:
            response.list_services_response.service.add(name=service)
        return response
    if asked == "file_by_filename":
        found = file_by_name(request.file_by_filename)
        name = f"file {request.file_by_filename!r}"
    elif asked == "file_containing_symbol":
        found = file_containing_symbol(request.file_containing_symbol)
        name = f"symbol {request.file_containing_symbol!r}"
    elif asked is None:
        response.error_response.error_code = Code.INVALID_ARGUMENT
        response.error_response.error_message = "the request asks for nothing"
        return response
    else:
        name = "extensions: the files here are proto3 and have none"
    if found is None:
        response.error_response.error_code = Code.NOT_FOUND
        response.error_response.error_message = f"there is no {name}"
        return response
    response.file_descriptor_response.file_descriptor_proto.append(found)
    return response


@cache
def _index() -> tuple[dict[str, bytes], dict[str, str]]:
    """Files by name, and for each symbol the file's name; made when first asked for."""
    files: dict[str, bytes] = {}
    symbols: dict[str, str] = {}
    for module, package, file_name, hidden in _FILES:
        described = _renamed(module, package, file_name, hidden)
        files[file_name] = described.SerializeToString()
        for symbol in _symbols(described):
            symbols[symbol] = file_name
    return files, symbols


def _renamed(
    module: Any, package: str, file_name: str, hidden: Sequence[str]
) -> descriptor_pb2.FileDescriptorProto:
    """The module's file as if it had been written in ``package``. Our files import none."""
    described = descriptor_pb2.FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(described)
    before, after = f".{described.package}.", f".{package}."
    described.name = file_name
    described.package = package

    def rename(type_name: str) -> str:
        return after + type_name[len(before) :] if type_name.startswith(before) else type_name

    for message in _messages(described.message_type):
        for member in message.field:
            if member.type_name:
                member.type_name = rename(member.type_name)
    shown = [service for service in described.service if service.name not in hidden]
    for service in shown:
        for method in service.method:
            method.input_type = rename(method.input_type)
            method.output_type = rename(method.output_type)
    del described.service[:]
    described.service.extend(shown)
    return described


def _messages(
    messages: Iterable[descriptor_pb2.DescriptorProto],
) -> Iterator[descriptor_pb2.DescriptorProto]:
    for message in messages:
        yield message
        yield from _messages(message.nested_type)


def _symbols(described: descriptor_pb2.FileDescriptorProto) -> Iterator[str]:
    for service in described.service:
        name = f"{described.package}.{service.name}"
        yield name
        yield from (f"{name}.{method.name}" for method in service.method)
    for enum in described.enum_type:
        yield from _enum_symbols(enum, described.package)
    for message in described.message_type:
        yield from _message_symbols(message, described.package)


def _message_symbols(message: descriptor_pb2.DescriptorProto, scope: str) -> Iterator[str]:
    name = f"{scope}.{message.name}"
    yield name
    yield from (f"{name}.{member.name}" for member in message.field)
    for enum in message.enum_type:
        yield from _enum_symbols(enum, name)
    for nested in message.nested_type:
        yield from _message_symbols(nested, name)


def _enum_symbols(enum: descriptor_pb2.EnumDescriptorProto, scope: str) -> Iterator[str]:
    yield f"{scope}.{enum.name}"
    # An enum's values are siblings of the enum, as in C++.
    yield from (f"{scope}.{value.name}" for value in enum.value)
