"""A request that came by REST, written for another server, and that server's answer read."""

from __future__ import annotations

import numpy as np
import orjson
import pytest

from mesh.core.errors import Code, MeshError
from mesh.oip.onward import request_of, tensors_of
from mesh.oip.rest import decode_v2
from mesh.oip.tensors import decode_request
from mesh.runtimes.api import ModelMetadata
from protos import oip_pb2

UNKNOWN = ModelMetadata("external", (), (), (), accepts_any_input=True)


def test_what_was_asked_for_arrives() -> None:
    body = orjson.dumps(
        {
            "id": "7",
            "parameters": {"flag": True, "n": 3, "f": 0.5, "s": "text"},
            "inputs": [
                {"name": "a", "datatype": "INT16", "shape": [2, 2], "data": [1, 2, 3, 4]},
                {"name": "t", "datatype": "BYTES", "shape": [1], "data": ["x"]},
            ],
            "outputs": [{"name": "y"}],
        }
    )
    call = decode_v2(body, None, UNKNOWN, model_name="m")
    request = oip_pb2.ModelInferRequest.FromString(request_of(call, "2"))
    assert (request.model_name, request.model_version, request.id) == ("m", "2", "7")
    request.model_version = ""
    assert [output.name for output in request.outputs] == ["y"]
    again = decode_request(request, UNKNOWN)
    assert again.parameters == {"flag": True, "n": 3, "f": 0.5, "s": "text"}
    assert again.inputs["a"].dtype == np.int16
    assert again.inputs["a"].tolist() == [[1, 2], [3, 4]]
    assert again.inputs["t"].tolist() == [b"x"]


def test_a_number_beyond_64_bits_is_the_clients_mistake() -> None:
    tensor = {"name": "a", "datatype": "INT16", "shape": [1], "data": [1]}
    body = orjson.dumps({"parameters": {"n": 2**64 - 1}, "inputs": [tensor]})
    call = decode_v2(body, None, UNKNOWN)
    with pytest.raises(MeshError, match="'n'") as caught:
        request_of(call)
    assert caught.value.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("raw", [True, False])
def test_an_answer_is_read_in_either_form(raw: bool) -> None:
    response = oip_pb2.ModelInferResponse()
    output = response.outputs.add(name="y", datatype="FP32", shape=[2])
    if raw:
        response.raw_output_contents.append(np.float32([1, 2]).tobytes())
    else:
        output.contents.fp32_contents.extend([1, 2])
    (tensor,) = tensors_of(response.SerializeToString())
    assert (tensor.name, tensor.datatype, tensor.data.tolist()) == ("y", "FP32", [1.0, 2.0])


def test_an_answer_that_contradicts_itself_is_the_runtimes_fault() -> None:
    short = oip_pb2.ModelInferResponse()
    short.outputs.add(name="y", datatype="FP32", shape=[2])
    short.raw_output_contents.append(b"1234")
    uneven = oip_pb2.ModelInferResponse(raw_output_contents=[b""])
    strange = oip_pb2.ModelInferResponse()
    strange.outputs.add(name="y", datatype="FP31", shape=[0])
    for message in (short, uneven, strange):
        with pytest.raises(MeshError) as caught:
            tensors_of(message.SerializeToString())
        assert caught.value.code is Code.INTERNAL
    with pytest.raises(MeshError, match="no ModelInferResponse"):
        tensors_of(b"\xff\xff")
