"""A wrong gRPC request is INVALID_ARGUMENT and says which input, what was expected, what found."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mesh.core.errors import Code, MeshError
from mesh.oip.tensors import InferCodec
from mesh.runtimes.api import ModelMetadata, TensorSpec
from protos import oip_pb2

from .messages import metadata, request

MODEL = metadata(
    {"x": ("FP32", [-1, 2]), "n": ("INT8", [-1])}, {"y": ("FP32", [-1])}, versions=("1",)
)
TEXT = metadata({"t": ("BYTES", [-1])})

X = np.zeros((1, 2), np.float32)
N = np.zeros(1, np.int8)


def good(raw: bool) -> oip_pb2.ModelInferRequest:
    return request({"x": ("FP32", X), "n": ("INT8", N)}, raw=raw)


Change = Callable[[oip_pb2.ModelInferRequest], Any]


def renamed(message: oip_pb2.ModelInferRequest) -> None:
    message.inputs[0].name = "unknown"


def twice(message: oip_pb2.ModelInferRequest) -> None:
    message.inputs[1].CopyFrom(message.inputs[0])


def missing(message: oip_pb2.ModelInferRequest) -> None:
    del message.inputs[1]
    del message.raw_input_contents[1:]


def other_datatype(message: oip_pb2.ModelInferRequest) -> None:
    message.inputs[0].datatype = "FP64"


def no_datatype(message: oip_pb2.ModelInferRequest) -> None:
    message.inputs[0].datatype = "FLOAT"


def shape(*axes: int) -> Change:
    def change(message: oip_pb2.ModelInferRequest) -> None:
        message.inputs[0].shape[:] = axes

    return change


def raw(content: bytes) -> Change:
    def change(message: oip_pb2.ModelInferRequest) -> None:
        message.raw_input_contents[0] = content

    return change


def fewer_raw(message: oip_pb2.ModelInferRequest) -> None:
    del message.raw_input_contents[1:]


def mixed(message: oip_pb2.ModelInferRequest) -> None:
    message.inputs[1].contents.int_contents.append(1)


def unknown_output(message: oip_pb2.ModelInferRequest) -> None:
    message.outputs.add(name="z")


def output_twice(message: oip_pb2.ModelInferRequest) -> None:
    message.outputs.add(name="y")
    message.outputs.add(name="y")


def bad_classification(message: oip_pb2.ModelInferRequest) -> None:
    message.outputs.add(name="y").parameters["classification"].string_param = "3"


def empty_parameter(message: oip_pb2.ModelInferRequest) -> None:
    message.parameters["p"].SetInParent()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed, ["no input 'unknown'", "'x' (FP32 [-1, 2])", "'n' (INT8 [-1])"]),
        (twice, ["'x'", "more than once"]),
        (missing, ["'n' (INT8 [-1])", "missing", "['x']"]),
        (other_datatype, ["'x'", "FP32", "found FP64"]),
        (no_datatype, ["'x'", "unknown datatype 'FLOAT'", "FP32"]),
        (shape(1, 3), ["'x'", "[-1, 2]", "found [1, 3]"]),
        (shape(2), ["'x'", "[-1, 2]", "found [2]"]),
        (shape(-1, 2), ["'x'", "[-1, 2]", "negative"]),
        (shape(2**62, 2), ["'x'", "elements"]),
        (raw(bytes(7)), ["'x'", "7 bytes", "[1, 2]", "needs 8"]),
        (raw(b""), ["'x'", "0 bytes", "needs 8"]),
        (fewer_raw, ["2 inputs", "1 raw_input_contents"]),
        (mixed, ["'n'", "typed contents", "raw_input_contents"]),
        (unknown_output, ["no output 'z'", "'y' (FP32 [-1])"]),
        (output_twice, ["'y'", "more than once"]),
        (bad_classification, ["'y'", "classification", "'3'"]),
        (empty_parameter, ["'p'", "without a value"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrong_raw_request(change: Change, words: list[str]) -> None:
    codec = InferCodec(MODEL)
    codec.decode(good(raw=True).SerializeToString())  # what it remembers must not help
    message = good(raw=True)
    change(message)
    with pytest.raises(MeshError) as caught:
        codec.decode(message.SerializeToString())
    assert caught.value.code is Code.INVALID_ARGUMENT
    for word in words:
        assert word in caught.value.message


def typed_count(message: oip_pb2.ModelInferRequest) -> None:
    message.inputs[0].contents.fp32_contents.append(1)


def typed_field(message: oip_pb2.ModelInferRequest) -> None:
    message.inputs[0].contents.Clear()
    message.inputs[0].contents.int64_contents.extend([1, 2])


def typed_range(message: oip_pb2.ModelInferRequest) -> None:
    message.inputs[1].contents.int_contents[:] = [128]


def typed_nothing(message: oip_pb2.ModelInferRequest) -> None:
    message.inputs[0].ClearField("contents")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (typed_count, ["'x'", "3 elements", "needs 2"]),
        (typed_field, ["'x'", "FP32", "fp32_contents", "found int64_contents"]),
        (typed_range, ["'n'", "128", "INT8", "-128 to 127"]),
        (typed_nothing, ["'x'", "0 elements", "needs 2"]),
        (shape(-1, 2), ["'x'", "negative"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrong_typed_request(change: Change, words: list[str]) -> None:
    message = good(raw=False)
    change(message)
    with pytest.raises(MeshError) as caught:
        InferCodec(MODEL).decode(message.SerializeToString())
    assert caught.value.code is Code.INVALID_ARGUMENT
    for word in words:
        assert word in caught.value.message


@pytest.mark.parametrize(
    ("content", "count", "words"),
    [
        (b"\x01\x00\x00", 1, ["3 bytes", "at least 4"]),
        (struct.pack("<I", 5) + b"abc", 1, ["element 0", "claims 5", "3 are left"]),
        (struct.pack("<I", 2**32 - 1), 1, ["claims 4294967295", "0 are left"]),
        (struct.pack("<I", 1) + b"a", 2, ["5 bytes", "at least 8"]),
        (struct.pack("<I", 5) + b"abcde", 2, ["ends inside the length of element 1"]),
        (struct.pack("<I", 0) * 2, 1, ["4 bytes behind its last element"]),
        (b"", 2**40, ["at least"]),
    ],
)
def test_bad_length_prefix(content: bytes, count: int, words: list[str]) -> None:
    message = oip_pb2.ModelInferRequest(raw_input_contents=[content])
    message.inputs.add(name="t", datatype="BYTES", shape=[count])
    if not content:  # protobuf keeps an empty element
        assert len(message.raw_input_contents) == 1
    with pytest.raises(MeshError) as caught:
        InferCodec(TEXT).decode(message.SerializeToString())
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert "'t'" in caught.value.message
    for word in words:
        assert word in caught.value.message


def test_fp16_has_no_typed_form() -> None:
    message = oip_pb2.ModelInferRequest()
    tensor = message.inputs.add(name="h", datatype="FP16", shape=[1])
    tensor.contents.fp32_contents.append(1)
    with pytest.raises(MeshError, match=r"'h'.*FP16 has no typed form.*raw_input_contents"):
        InferCodec(metadata({"h": ("FP16", [-1])})).decode(message.SerializeToString())


def test_shared_memory_is_not_implemented() -> None:
    message = good(raw=False)
    message.inputs[0].parameters["shared_memory_region"].string_param = "r"
    with pytest.raises(MeshError, match=r"'x'.*shared memory") as caught:
        InferCodec(MODEL).decode(message.SerializeToString())
    assert caught.value.code is Code.UNIMPLEMENTED


def test_an_unknown_version_is_not_found() -> None:
    message = good(raw=True)
    message.model_version = "7"
    with pytest.raises(MeshError, match=r"'7'.*\['1'\]") as caught:
        InferCodec(MODEL).decode(message.SerializeToString())
    assert caught.value.code is Code.NOT_FOUND


def test_an_unknown_rank_accepts_any_and_any_input_accepts_all() -> None:
    ranked = ModelMetadata("t", (), (TensorSpec("x", "FP32", (), any_rank=True),), ())
    lenient = ModelMetadata("t", (), (), (), accepts_any_input=True)
    for model in (ranked, lenient):
        for array in (X, X[0], X[0, 0]):
            call = InferCodec(model).decode(
                request({"x": ("FP32", array)}, raw=True).SerializeToString()
            )
            assert call.inputs["x"].shape == array.shape
    with pytest.raises(MeshError, match="no input"):
        InferCodec(lenient).decode(b"")


def test_bits_that_an_undeclared_input_would_take_for_numbers_are_refused() -> None:
    lenient = ModelMetadata("t", (), (), (), accepts_any_input=True)
    message = oip_pb2.ModelInferRequest()
    message.inputs.add(name="x", datatype="BF16", shape=[1])
    message.raw_input_contents.append(b"\x80\x3f")
    with pytest.raises(MeshError, match="'x' is BF16") as caught:
        InferCodec(lenient).decode(message.SerializeToString())
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_empty_tensors_are_no_error() -> None:
    for is_raw in (True, False):
        message = request(
            {"x": ("FP32", np.zeros((0, 2), "f4")), "n": ("INT8", np.zeros(0, "i1"))}, raw=is_raw
        )
        call = InferCodec(MODEL).decode(message.SerializeToString())
        assert call.inputs["x"].shape == (0, 2)
