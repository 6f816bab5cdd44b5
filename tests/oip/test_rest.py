"""v2 over HTTP: JSON flat and nested, binary tensors in and out, raw binary requests; v1."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.oip import rest
from mesh.oip.call import InferCall
from mesh.oip.datatypes import DATATYPES
from mesh.oip.raw_bytes import decode_raw
from mesh.runtimes.api import Array, ModelMetadata, Tensor, TensorSpec

from .messages import arrays_of, metadata, raw_oracle

MODEL = metadata({"x": ("FP32", [-1, 2])}, {"y": ("FP32", [-1, 2]), "label": ("INT64", [-1])})


def decode(document: dict[str, Any], model: ModelMetadata = MODEL) -> InferCall:
    return rest.decode_v2(orjson.dumps(document), None, model, model_name="m")


def tensor(data: Any, shape: list[int], datatype: str = "FP32", name: str = "x") -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


def text_safe(kind: str, array: Array) -> Array:
    """BYTES as JSON must be text."""
    if kind != "BYTES":
        return array
    return np.array([e.hex().encode() for e in array.ravel()] + [None], object)[:-1].reshape(
        array.shape
    )


def as_json(kind: str, array: Array) -> Any:
    if kind == "BYTES":
        texts = np.array([e.decode() for e in array.ravel()] + [None], object)[:-1]
        return texts.reshape(array.shape).tolist()
    if kind == "BF16":
        return (array.astype("<u4") << 16).view("<f4").tolist()
    return array.tolist()


@pytest.mark.parametrize("kind", DATATYPES)
@given(data=st.data())
def test_every_datatype_survives_json_and_binary(kind: str, data: st.DataObject) -> None:
    array = text_safe(kind, data.draw(arrays_of(kind)))
    floats = {"FP16", "FP32", "FP64"}
    if kind in floats:
        array = np.nan_to_num(array, nan=0.0, posinf=1.0, neginf=-1.0)
    if kind == "BF16":
        array = np.where(array & 0x7F80 == 0x7F80, np.uint16(0), array)
    shape = list(array.shape)
    model = metadata({"x": (kind, [-1] * array.ndim)})
    nested = as_json(kind, array)
    flat = as_json(kind, array.reshape(-1))
    for form in (nested, flat):
        call = decode({"inputs": [tensor(form, shape, kind)]}, model)
        assert raw_oracle(kind, call.inputs["x"]) == raw_oracle(kind, array)
        assert call.inputs["x"].shape == array.shape

    raw = raw_oracle(kind, array)
    head = {
        "parameters": {"binary_data_output": True},
        "inputs": [
            {
                "name": "x",
                "datatype": kind,
                "shape": shape,
                "parameters": {"binary_data_size": len(raw)},
            }
        ],
    }
    text = orjson.dumps(head)
    call = rest.decode_v2(text + raw, len(text), model)
    assert raw_oracle(kind, call.inputs["x"]) == raw

    answer = [Tensor("x", kind, array)]
    binary = rest.encode_v2(call, answer, "m")
    assert binary.json_bytes is not None
    assert binary.content_type == "application/octet-stream"
    (output,) = json.loads(binary.body[: binary.json_bytes])["outputs"]
    assert output["parameters"] == {"binary_data_size": len(raw)}
    assert binary.body[binary.json_bytes :] == raw

    plain = rest.encode_v2(decode({"inputs": [tensor(flat, shape, kind)]}, model), answer, "m")
    assert plain.json_bytes is None
    (output,) = json.loads(plain.body)["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("x", kind, shape)
    again = decode({"inputs": [output]}, model)
    assert raw_oracle(kind, again.inputs["x"]) == raw


def test_id_parameters_names_and_outputs() -> None:
    call = decode(
        {
            "id": "r1",
            "parameters": {"p": 1, "binary_data_output": True},
            "inputs": [tensor([1, 2], [1, 2])],
            "outputs": [{"name": "label", "parameters": {"binary_data": False}}, {"name": "y"}],
        }
    )
    assert (call.id, call.parameters, call.outputs) == ("r1", {"p": 1}, ("label", "y"))
    y = np.array([[0.5, 1.5]], np.float32)
    reply = rest.encode_v2(
        call, [Tensor("y", "FP32", y), Tensor("label", "INT64", np.array([1]))], "shown"
    )
    document = json.loads(reply.body[: reply.json_bytes])
    assert (document["model_name"], document["id"]) == ("shown", "r1")
    assert [output["name"] for output in document["outputs"]] == ["label", "y"]
    assert document["outputs"][0]["data"] == [1]
    assert "data" not in document["outputs"][1]
    assert reply.body[reply.json_bytes :] == y.tobytes()


def test_several_binary_inputs_in_order() -> None:
    model = metadata({"a": ("INT16", [-1]), "b": ("FP32", [-1]), "c": ("INT64", [-1])})
    a, b = np.array([1], np.int16), np.array([2.5, 3.5], np.float32)
    inputs = [
        {"name": "a", "datatype": "INT16", "shape": [1], "parameters": {"binary_data_size": 2}},
        tensor([7], [1], "INT64", "c"),
        {"name": "b", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}},
    ]
    text = orjson.dumps({"inputs": inputs})
    call = rest.decode_v2(text + a.tobytes() + b.tobytes(), len(text), model)
    assert {name: array.tolist() for name, array in call.inputs.items()} == {
        "a": [1],
        "c": [7],
        "b": [2.5, 3.5],
    }
    assert all(array.flags.aligned for array in call.inputs.values())


class TestRawBinaryRequest:
    def test_the_body_is_the_only_input_and_the_reply_is_binary(self) -> None:
        x = np.arange(6, dtype=np.float32).reshape(3, 2)
        call = rest.decode_v2(x.tobytes(), 0, MODEL)
        np.testing.assert_array_equal(call.inputs["x"], x)
        assert call.head.raw

    def test_bytes_are_one_element_without_a_length(self) -> None:
        call = rest.decode_v2(b"\x00\xff!", 0, metadata({"t": ("BYTES", [-1, 1])}))
        assert call.inputs["t"].tolist() == [[b"\x00\xff!"]]

    @pytest.mark.parametrize(
        ("model", "words"),
        [
            (MODEL, "7 bytes"),
            (metadata({"x": ("FP32", [-1, -1])}), "more than one axis is free"),
            (metadata({"a": ("FP32", [1]), "b": ("FP32", [1])}), "one input"),
        ],
    )
    def test_what_cannot_be_told_is_refused(self, model: ModelMetadata, words: str) -> None:
        with pytest.raises(rest.InvalidArgument, match=words):
            rest.decode_v2(bytes(7), 0, model)


class TestNotFinite:
    def test_nulls_words_and_bare_words_are_read(self) -> None:
        body = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[2,2],"data":%s}]}'
        for data in (b'[null,1,"Infinity","-Infinity"]', b"[[NaN,1],[Infinity,-Infinity]]"):
            call = rest.decode_v2(body % data, None, MODEL)
            np.testing.assert_array_equal(
                call.inputs["x"], np.array([[np.nan, 1], [np.inf, -np.inf]], np.float32)
            )

    def test_they_are_written_as_null(self) -> None:
        call = decode({"inputs": [tensor([1, 2], [1, 2])], "outputs": [{"name": "y"}]})
        data = np.array([[np.nan, np.inf]], np.float32)
        reply = rest.encode_v2(call, [Tensor("y", "FP32", data)], "m")
        assert json.loads(reply.body)["outputs"][0]["data"] == [None, None]
        assert json.loads(rest.encode_v1([Tensor("y", "FP32", data)]).body) == {
            "predictions": [[None, None]]
        }


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({}, "no 'inputs'"),
        ({"inputs": {}}, "'inputs' must be a list"),
        ({"inputs": [{"datatype": "FP32"}]}, r"inputs\[0\] needs 'name'"),
        ({"inputs": [tensor([1, 2], [1, 2], name="z")]}, "no input 'z'"),
        ({"inputs": []}, "'x'.*missing"),
        ({"inputs": [tensor([1, 2], [1, 2], "FP64")]}, "'x' must have the datatype FP32"),
        ({"inputs": [tensor([1, 2], [1, 2], "F")]}, "'x' has the unknown datatype 'F'"),
        ({"inputs": [tensor([1, 2], [2])]}, r"'x' must have the shape \[-1, 2\].*found \[2\]"),
        ({"inputs": [tensor([1, 2], [1.0, 2])]}, "'x' needs 'shape'"),
        ({"inputs": [tensor([1, 2, 3], [1, 2])]}, "'x' has 3 elements.*needs 2"),
        ({"inputs": [tensor([[1], [2]], [1, 2])]}, r"'x': 'data' is nested as \[2, 1\]"),
        ({"inputs": [tensor([[1, 2], [3]], [2, 2])]}, "'x'.*differ in length"),
        ({"inputs": [tensor(["a", 2], [1, 2])]}, "'x': element 0 is a string"),
        ({"inputs": [tensor([True, None], [1, 2])]}, "'x': element 0 is a boolean"),
        ({"inputs": [tensor([1e39, 2], [1, 2])]}, "'x'.*too large for FP32"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2]}]}, "'x' has neither"),
        (
            {"inputs": [tensor([1, 2], [1, 2]) | {"parameters": {"binary_data_size": 8}}]},
            "'x' has both",
        ),
        (
            {
                "inputs": [
                    {
                        "name": "x",
                        "datatype": "FP32",
                        "shape": [1, 2],
                        "parameters": {"binary_data_size": 8},
                    }
                ]
            },
            "'x': 'binary_data_size' is 8, but only 0",
        ),
        ({"inputs": [tensor([1, 2], [1, 2])], "outputs": [{"name": "z"}]}, "no output 'z'"),
        ({"inputs": [tensor([1, 2], [1, 2])], "id": 7}, "'id' must be a string"),
        ({"inputs": [tensor([1, 2], [1, 2])], "parameters": [1]}, "'parameters' must be"),
        (
            {"inputs": [tensor([1, 2], [1, 2])], "parameters": {"binary_data_output": 1}},
            "'binary_data_output' must be true or false",
        ),
    ],
)
def test_wrong_v2_bodies_say_what_is_wrong(document: dict[str, Any], words: str) -> None:
    with pytest.raises(rest.InvalidArgument, match=words):
        decode(document)


@pytest.mark.parametrize(
    ("kind", "data", "words"),
    [
        ("INT8", [128], "-128 to 127; found 128"),
        ("UINT8", [-1], "0 to 255; found -1"),
        ("INT64", [2**63], "found 9223372036854775808"),
        ("INT32", [1.5], "whole numbers.*1.5"),
        ("BOOL", [2], "true and false; found 2"),
        ("BYTES", [1], "element 0 is the number 1"),
        ("BYTES", [["a"], "b"], "differ|list"),
    ],
)
def test_elements_that_do_not_fit_the_datatype(kind: str, data: Any, words: str) -> None:
    with pytest.raises(rest.InvalidArgument, match=words):
        decode({"inputs": [tensor(data, [len(data)], kind)]}, metadata({"x": (kind, [-1])}))


@pytest.mark.parametrize(
    ("body", "length", "words"),
    [
        (b"not json", None, "no JSON"),
        (b"[]", None, "must be a JSON object"),
        (b'{"NaN": ]', None, "no JSON"),
        (b"[" * 100_000, None, "no JSON"),
        (b"{}", 3, "is 3, but the body has 2 bytes"),
        (orjson.dumps({"inputs": [tensor([1, 2], [1, 2])]}) + b"xx", 68, "2 bytes are left|JSON"),
    ],
)
def test_wrong_framing(body: bytes, length: int | None, words: str) -> None:
    with pytest.raises(rest.InvalidArgument, match=words):
        rest.decode_v2(body, length, MODEL)


@pytest.mark.parametrize("value", ["-1", "x", "", "1e3", "٣", "9" * 13])
def test_wrong_content_length_headers(value: str) -> None:
    with pytest.raises(rest.InvalidArgument, match="Inference-Header-Content-Length"):
        rest.header_content_length(value)


def test_content_length_headers() -> None:
    assert rest.header_content_length(None) is None
    assert rest.header_content_length(" 12 ") == 12


class TestV1:
    two = metadata({"a": ("FP32", [-1, 2]), "b": ("INT64", [-1])}, {"y": ("FP32", [-1])})

    def decode(self, document: Any, model: ModelMetadata = MODEL) -> dict[str, Any]:
        call = rest.decode_v1(json.dumps(document).encode(), model)
        return {name: array.tolist() for name, array in call.inputs.items()}

    def test_instances_of_one_input(self) -> None:
        assert self.decode({"instances": [[1, 2], [3, 4]]}) == {"x": [[1, 2], [3, 4]]}
        assert self.decode({"instances": [{"x": [1, 2]}]}) == {"x": [[1, 2]]}
        assert self.decode({"inputs": [[1, 2]]}) == {"x": [[1, 2]]}

    def test_instances_of_several_inputs(self) -> None:
        rows = [{"a": [1, 2], "b": 3}, {"a": [4, 5], "b": 6}]
        columns = {"a": [[1, 2], [4, 5]], "b": [3, 6]}
        assert self.decode({"instances": rows}, self.two) == columns
        assert self.decode({"inputs": columns}, self.two) == columns

    def test_a_model_that_takes_anything_gets_numbers_or_text(self) -> None:
        spec = (TensorSpec("predict", "FP64", (-1, 2)),)
        model = ModelMetadata("sklearn", (), spec, (), accepts_any_input=True)
        assert self.decode({"instances": [[1, 2]]}, model) == {"predict": [[1.0, 2.0]]}
        assert self.decode({"instances": ["é"]}, model) == {"predict": ["é".encode()]}

    @pytest.mark.parametrize(
        ("document", "words"),
        [
            ({}, "needs 'instances' or 'inputs'"),
            ({"instances": [[1, 2]], "inputs": [[1, 2]]}, "one of the two"),
            ({"instances": []}, "at least one instance"),
            ({"instances": 3}, "must be a list"),
            ({"instances": [[1, 2, 3]]}, r"'x' must have the shape \[-1, 2\].*found \[1, 3\]"),
            ({"instances": [{"z": [1, 2]}]}, "no input 'z'"),
            ({"instances": [{"x": [1, 2]}, {"z": [1, 2]}]}, r"instances\[1\]"),
            ({"instances": [{"x": [1, 2]}, 5]}, r"instances\[1\]"),
            ({"instances": [["a", "b"]]}, "'x': element 0 is a string"),
        ],
    )
    def test_wrong_bodies(self, document: Any, words: str) -> None:
        with pytest.raises(rest.InvalidArgument, match=words):
            self.decode(document)

    def test_two_inputs_need_names(self) -> None:
        with pytest.raises(rest.InvalidArgument, match=r"each instance must be an object"):
            self.decode({"instances": [[1, 2]]}, self.two)

    def test_predictions(self) -> None:
        y = Tensor("y", "FP32", np.array([[0.5], [1.5]], np.float32))
        label = Tensor("label", "BYTES", np.array([b"a", b"b"], object))
        column = Tensor("predict", "INT64", np.array([[1], [2]]))
        assert json.loads(rest.encode_v1([y]).body) == {"predictions": [[0.5], [1.5]]}
        assert json.loads(rest.encode_v1([column]).body) == {"predictions": [1, 2]}
        assert json.loads(rest.encode_v1([y, label]).body) == {
            "predictions": [{"y": [0.5], "label": "a"}, {"y": [1.5], "label": "b"}]
        }


def test_bytes_that_are_no_text_need_the_binary_form() -> None:
    array = np.array([b"\xff"], object)
    with pytest.raises(rest.InvalidArgument, match=r"'y'.*binary_data"):
        rest.encode_v1([Tensor("y", "BYTES", array)])
    assert decode_raw(b"\x01\x00\x00\x00\xff", DATATYPES["BYTES"], (1,), of="y")[0] == b"\xff"
