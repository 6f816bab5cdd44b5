"""A decoded request as a message for another server of the Open Inference Protocol, and its answer
back as tensors: for what comes by REST to a model that only such a server has.

Pure. An answer that is no ModelInferResponse, or contradicts itself, is INTERNAL: the other server
is at fault, and not the client.
"""

from __future__ import annotations

from typing import assert_never

from google.protobuf.message import DecodeError

from mesh.core.errors import Internal, InvalidArgument
from mesh.oip.call import InferCall, ParameterValue
from mesh.oip.datatypes import DATATYPES, Array, datatype, datatype_name
from mesh.oip.raw_bytes import decode_raw, encode_raw
from mesh.oip.tensors import decode_typed
from mesh.runtimes.api import Tensor
from protos import oip_pb2


def request_of(call: InferCall, model_version: str = "") -> bytes:
    """A serialised ModelInferRequest with raw contents, which every such server takes.

    ``model_version`` as the client asked for it: only that server knows its versions.
    """
    head = call.head
    request = oip_pb2.ModelInferRequest(
        model_name=head.model_name, model_version=model_version, id=call.id
    )
    for name, value in head.parameters.items():
        _set(request.parameters[name], name, value)
    for name, array in call.inputs.items():
        kind = _kind_of(name, array)
        request.inputs.add(name=name, datatype=kind, shape=array.shape)
        request.raw_input_contents.append(encode_raw(array, DATATYPES[kind]))
    for output in head.outputs:  # classes are made of the whole tensor, here
        request.outputs.add(name=output.name)
    message: bytes = request.SerializeToString()
    return message


def _set(parameter: oip_pb2.InferParameter, name: str, value: ParameterValue) -> None:
    try:
        match value:
            case bool():
                parameter.bool_param = value
            case int():
                parameter.int64_param = value
            case float():
                parameter.double_param = value
            case str():
                parameter.string_param = value
            case _:
                assert_never(value)
    except ValueError:
        raise InvalidArgument(f"parameter {name!r} is {value}, beyond 64 bits") from None


def _kind_of(name: str, array: Array) -> str:
    kind = "BYTES" if array.dtype.kind == "O" else datatype_name(array.dtype)
    if kind is None:
        raise InvalidArgument(f"input {name!r} is an array of {array.dtype}, which cannot be sent")
    return kind


def tensors_of(message: bytes) -> list[Tensor]:
    """The tensors of a serialised ModelInferResponse, raw or typed."""
    try:
        response = oip_pb2.ModelInferResponse.FromString(message)
    except DecodeError as error:
        raise Internal(
            f"the model's runtime answered with no ModelInferResponse: {error}"
        ) from None
    raw = list(response.raw_output_contents)
    if raw and len(raw) != len(response.outputs):
        raise Internal(
            f"the model's runtime answered with {len(response.outputs)} outputs and {len(raw)} raw "
            "contents"
        )
    tensors: list[Tensor] = []
    try:
        for index, output in enumerate(response.outputs):
            of = f"output {output.name!r}"
            kind, shape = datatype(output.datatype, of=of), tuple(output.shape)
            if raw:
                array = decode_raw(raw[index], kind, shape, of=of)
            else:
                array = decode_typed(output.contents, kind, shape, of)
            tensors.append(Tensor(output.name, kind.name, array))
    except InvalidArgument as error:
        raise Internal(f"the model's runtime contradicts itself: {error.message}") from None
    return tensors
