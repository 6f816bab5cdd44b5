"""Every datatype survives the way in and the way out, in both forms."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mesh.oip.datatypes import DATATYPES, bf16_to_fp32, datatype_name, fp32_to_bf16
from mesh.oip.raw_bytes import decode_raw, encode_raw
from mesh.oip.tensors import InferCodec
from mesh.runtimes.api import Tensor
from protos import oip_pb2

from .messages import (
    TYPED_FIELDS,
    arrays_of,
    bf16_oracle,
    comparable,
    metadata,
    raw_oracle,
    request,
)

FORMS = [(kind, True) for kind in DATATYPES] + [(kind, False) for kind in TYPED_FIELDS]


def _same(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], kind: str) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert raw_oracle(kind, found) == raw_oracle(kind, wanted)


@pytest.mark.parametrize(("kind", "raw"), FORMS)
@given(data=st.data())
def test_input_and_output_carry_the_same_array(kind: str, raw: bool, data: st.DataObject) -> None:
    array = data.draw(arrays_of(kind))
    codec = InferCodec(metadata({"x": (kind, [-1] * array.ndim)}))
    message = request({"x": (kind, array)}, raw=raw, id="r-1").SerializeToString()
    for _ in range(2):  # the second time from memory
        call = codec.decode(message)
        _same(call.inputs["x"], array, kind)
        assert (call.id, call.model_name, call.outputs) == ("r-1", "m", ())

        reply = oip_pb2.ModelInferResponse.FromString(
            codec.encode(call, [Tensor("x", kind, call.inputs["x"])], "as-asked")
        )
        assert (reply.model_name, reply.id) == ("as-asked", "r-1")
        (output,) = reply.outputs
        assert (output.name, output.datatype) == ("x", kind)
        assert tuple(output.shape) == array.shape
        if raw:
            assert list(reply.raw_output_contents) == [raw_oracle(kind, array)]
            assert not output.HasField("contents")
        else:
            assert not reply.raw_output_contents
            wanted = request({"x": (kind, array)}, raw=False).inputs[0].contents
            assert output.contents.SerializeToString() == wanted.SerializeToString()


@pytest.mark.parametrize("kind", DATATYPES)
@given(data=st.data())
def test_raw_bytes_are_tritonclients(kind: str, data: st.DataObject) -> None:
    array = data.draw(arrays_of(kind))
    raw = encode_raw(array, DATATYPES[kind])
    assert raw == raw_oracle(kind, array)
    _same(decode_raw(raw, DATATYPES[kind], array.shape, of="x"), array, kind)


@given(hnp.arrays(np.float32, 20))
def test_bf16_rounds_as_ml_dtypes_does(values: np.ndarray[Any, Any]) -> None:
    bits = fp32_to_bf16(values)
    nan = np.isnan(values)
    assert (bits[~nan] == bf16_oracle(values)[~nan]).all()
    assert np.isnan(bf16_to_fp32(bits)[nan]).all()
    np.testing.assert_array_equal(
        bf16_to_fp32(bits), bits.view(ml_dtypes.bfloat16).astype(np.float32)
    )


def test_every_bf16_survives_widening_and_narrowing() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    widened = bf16_to_fp32(bits)
    numbers = ~np.isnan(widened)
    assert (fp32_to_bf16(widened)[numbers] == bits[numbers]).all()


def test_booleans_that_are_neither_0_nor_1_are_true() -> None:
    array = decode_raw(b"\x00\x01\x02\xff", DATATYPES["BOOL"], (4,), of="x")
    assert array.tolist() == [False, True, True, True]
    assert array.view(np.uint8).tolist() == [0, 1, 1, 1]


def test_arrays_of_any_byte_order_and_width_have_a_datatype() -> None:
    assert datatype_name(np.dtype(">f4")) == "FP32"
    assert datatype_name(np.dtype("S5")) == "BYTES"
    assert datatype_name(np.dtype("complex64")) is None
    assert encode_raw(np.array([1.0], ">f4"), DATATYPES["FP32"]) == b"\x00\x00\x80\x3f"


def test_a_reply_that_holds_fp16_is_raw_even_when_asked_typed() -> None:
    model = metadata({"x": ("FP32", [-1])}, {"y": ("FP16", [-1]), "z": ("FP32", [-1])})
    codec = InferCodec(model)
    call = codec.decode(
        request({"x": ("FP32", np.ones(2, np.float32))}, raw=False).SerializeToString()
    )
    tensors = [Tensor("y", "FP16", np.ones(2, np.float16)), Tensor("z", "FP32", np.ones(2, "f4"))]
    reply = oip_pb2.ModelInferResponse.FromString(codec.encode(call, tensors, "m"))
    assert list(reply.raw_output_contents) == [b"\x00\x3c" * 2, b"\x00\x00\x80\x3f" * 2]
    assert not any(output.HasField("contents") for output in reply.outputs)


class TestRequestedOutputs:
    model = metadata({"x": ("FP32", [-1])}, {"a": ("FP32", [-1]), "b": ("INT64", [-1])})
    array = np.array([1.0], np.float32)
    tensors = (Tensor("a", "FP32", array), Tensor("b", "INT64", np.array([7])))

    @pytest.mark.parametrize("raw", [True, False])
    def test_subset_and_order_are_the_requests(self, raw: bool) -> None:
        for wanted in (["b"], ["b", "a"], ["a"], []):
            codec = InferCodec(self.model)
            message = request({"x": ("FP32", self.array)}, raw=raw, outputs=wanted)
            for _ in range(2):
                call = codec.decode(message.SerializeToString())
                assert list(call.outputs) == wanted
                reply = oip_pb2.ModelInferResponse.FromString(codec.encode(call, self.tensors, "m"))
                assert [output.name for output in reply.outputs] == (wanted or ["a", "b"])

    def test_classification_gives_the_best_classes(self) -> None:
        message = request({"x": ("FP32", self.array)}, raw=True, outputs=["a"])
        message.outputs[0].parameters["classification"].int64_param = 2
        codec = InferCodec(self.model)
        scores = np.array([[0.1, 0.7, 0.2], [0.5, 0.25, 0.25]], np.float32)
        call = codec.decode(message.SerializeToString())
        reply = oip_pb2.ModelInferResponse.FromString(
            codec.encode(call, [Tensor("a", "FP32", scores)], "m")
        )
        assert (reply.outputs[0].datatype, list(reply.outputs[0].shape)) == ("BYTES", [2, 2])
        found = decode_raw(reply.raw_output_contents[0], DATATYPES["BYTES"], (2, 2), of="a")
        assert found.tolist() == [
            [b"0.700000:1", b"0.200000:2"],
            [b"0.500000:0", b"0.250000:1"],
        ]


def test_parameters_become_plain_values() -> None:
    message = request({"x": ("FP32", np.ones(1, np.float32))}, raw=True)
    values = {"flag": True, "count": -3, "name": "n", "ratio": 0.5, "big": 2**64 - 1}
    fields = ("bool_param", "int64_param", "string_param", "double_param", "uint64_param")
    for (name, value), field in zip(values.items(), fields, strict=True):
        setattr(message.parameters[name], field, value)
    call = InferCodec(metadata({"x": ("FP32", [-1])})).decode(message.SerializeToString())
    assert call.parameters == values


def test_the_version_in_the_reply_is_the_requests_or_the_models_first() -> None:
    codec = InferCodec(metadata({"x": ("FP32", [-1])}, versions=("3", "2")))
    array = np.ones(1, np.float32)
    for asked, answered in (("", "3"), ("2", "2")):
        message = request({"x": ("FP32", array)}, raw=True, model_version=asked)
        call = codec.decode(message.SerializeToString())
        reply = codec.encode(call, [Tensor("x", "FP32", array)], "m")
        assert oip_pb2.ModelInferResponse.FromString(reply).model_version == answered


def test_comparable_tells_calls_apart() -> None:
    codec = InferCodec(metadata({"x": ("FP32", [-1])}))
    one, other = (
        codec.decode(
            request({"x": ("FP32", np.full(1, value, "f4"))}, raw=True).SerializeToString()
        )
        for value in (1, 2)
    )
    assert comparable(one) != comparable(other)
