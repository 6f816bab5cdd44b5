"""`mesh infer`: what a JSON body and .npy files become, and what an answer is shown as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesh.cli.infer import request_from_json, response_to_json
from mesh.cli.up_front import example_request
from protos import oip_pb2
from tests.cli.conftest import Mesh
from tests.cli.fake_router import FakeRouter, echo_infer


def body(datatype: str, shape: list[int], data: Any, **more: Any) -> dict[str, Any]:
    return {
        "inputs": [{"name": "X", "datatype": datatype, "shape": shape, "data": data}],
        **more,
    }


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("FP32", [0.5, -1.0]),
        ("FP64", [0.1, 1e300]),
        ("FP16", [0.5, 2.0]),
        ("BF16", [0.5, 3.0]),
        ("INT8", [-128, 127]),
        ("UINT64", [0, 2**64 - 1]),
        ("BOOL", [True, False]),
        ("BYTES", ["caf\u00e9", ""]),
    ],
)
def test_every_kind_of_tensor_goes_there_and_back(
    router: FakeRouter, mesh: Mesh, datatype: str, data: list[Any]
) -> None:
    router.answers["ModelInfer"] = echo_infer
    text = json.dumps(body(datatype, [1, 2], [data], id="7"))
    result = mesh("infer", "iris", "--json", "-", stdin=text)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {
        "model_name": "iris",
        "id": "7",
        "outputs": [{"name": "OUT_X", "datatype": datatype, "shape": [1, 2], "data": data}],
    }


def test_arrays_from_files(router: FakeRouter, mesh: Mesh, tmp_path: Path) -> None:
    router.answers["ModelInfer"] = echo_infer
    np.save(tmp_path / "x.npy", np.array([[1, 2]], dtype=">f4"))
    np.save(tmp_path / "s.npy", np.array(["a", "bc"]))
    result = mesh("infer", "m", "--npy", f"X={tmp_path}/x.npy", "--npy", f"S={tmp_path}/s.npy")
    assert result.exit_code == 0, result.stderr
    outputs = {o["name"]: o for o in json.loads(result.stdout)["outputs"]}
    assert outputs["OUT_X"]["datatype"] == "FP32" and outputs["OUT_X"]["data"] == [1.0, 2.0]
    assert outputs["OUT_S"]["datatype"] == "BYTES" and outputs["OUT_S"]["data"] == ["a", "bc"]


def test_parameters_and_named_outputs_are_passed_on() -> None:
    request = request_from_json(
        body(
            "FP32",
            [1],
            [1],
            parameters={"a": True, "b": 3, "c": "x", "d": 0.5},
            outputs=[{"name": "Y", "parameters": {"classification": 2}}],
        )
    )
    chosen = {
        key: value.WhichOneof("parameter_choice") for key, value in request.parameters.items()
    }
    assert chosen == {
        "a": "bool_param",
        "b": "int64_param",
        "c": "string_param",
        "d": "double_param",
    }
    assert request.outputs[0].name == "Y"
    assert request.outputs[0].parameters["classification"].int64_param == 2


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[]", '"inputs"'),
        ("{", "not JSON"),
        ('{"inputs": [3]}', "inputs[0]"),
        ('{"inputs": [{"name": "X"}]}', '"shape"'),
        (json.dumps(body("FP99", [1], [1])), "FP99"),
        (json.dumps(body("FP32", [3], [1])), "inputs[0] (X)"),
        (json.dumps(body("UINT8", [1], [300])), "UINT8"),
        (json.dumps(body("INT8", [1], ["x"])), "INT8"),
        (json.dumps(body("BYTES", [1], [5])), "strings"),
        (json.dumps(body("FP32", [1], [1], parameters={"a": []})), "parameters.a"),
        (json.dumps(body("FP32", [1], [1], outputs=["Y"])), "outputs[0]"),
    ],
)
def test_a_wrong_body_is_named_before_anything_is_sent(
    router: FakeRouter, mesh: Mesh, text: str, named: str
) -> None:
    result = mesh("infer", "m", "--json", "-", stdin=text)
    assert result.exit_code == 2 and named in result.stderr
    assert len(result.stderr.splitlines()) == 1 and router.calls == []


@pytest.mark.parametrize(
    "pair", ["X", "=file", "X=/no/such.npy", "X={tmp}/text.npy", "X={tmp}/pickled.npy"]
)
def test_a_wrong_array_file_is_named(mesh: Mesh, tmp_path: Path, pair: str) -> None:
    (tmp_path / "text.npy").write_text("hello")
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    result = mesh("infer", "m", "--npy", pair.format(tmp=tmp_path))
    assert result.exit_code == 2 and "--npy" in result.stderr


def test_an_array_type_that_the_protocol_does_not_have(mesh: Mesh, tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.array([1j]))
    result = mesh("infer", "m", "--npy", f"X={tmp_path}/c.npy")
    assert result.exit_code == 2 and "complex128" in result.stderr


def test_a_typed_answer_is_shown_too() -> None:
    response = oip_pb2.ModelInferResponse(model_name="m")
    output = response.outputs.add(name="Y", datatype="INT32", shape=[2])
    output.contents.int_contents.extend([1, -2])
    assert response_to_json(response)["outputs"][0]["data"] == [1, -2]


def test_the_request_to_paste_has_the_right_shape() -> None:
    metadata = oip_pb2.ModelMetadataResponse(name="m")
    metadata.inputs.add(name="X", datatype="FP32", shape=[-1, 2])
    metadata.inputs.add(name="S", datatype="BYTES", shape=[1])
    example = example_request(metadata)
    assert example == {
        "inputs": [
            {"name": "X", "shape": [1, 2], "datatype": "FP32", "data": [0.5, 1.5]},
            {"name": "S", "shape": [1], "datatype": "BYTES", "data": ["text"]},
        ]
    }
    request_from_json(example)
    metadata.inputs.add(name="IMAGE", datatype="FP32", shape=[-1, 3, 224, 224])
    assert example_request(metadata) is None
