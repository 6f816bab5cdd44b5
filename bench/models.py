"""ONNX models made for the measurements, and requests for them. Needs ``onnx`` (a dev extra)."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bench.process import Unavailable
from protos import oip_pb2

FEATURES = 4
HIDDEN = 16
CLASSES = 3


@functools.cache
def small_model() -> bytes:
    """A network of 4 × 16 × 3 with a softmax: what a small classifier costs to run."""
    rng = np.random.default_rng(7)
    weights = {
        "w1": rng.normal(size=(FEATURES, HIDDEN)), "b1": rng.normal(size=HIDDEN),
        "w2": rng.normal(size=(HIDDEN, CLASSES)), "b2": rng.normal(size=CLASSES),
    }  # fmt: skip
    helper = _onnx().helper
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["z"]),
        helper.make_node("Softmax", ["z"], ["y"]),
    ]
    return _serialised(nodes, weights, FEATURES, CLASSES)


def perceptron(widths: Sequence[int]) -> bytes:
    """Dense layers of these widths with a ReLU between them."""
    rng = np.random.default_rng(len(widths))
    helper = _onnx().helper
    weights, nodes, last = {}, [], "x"
    for number, (width_in, width_out) in enumerate(pairwise(widths)):
        scale = (2.0 / width_in) ** 0.5
        weights[f"w{number}"] = rng.normal(size=(width_in, width_out)) * scale
        weights[f"b{number}"] = rng.normal(size=width_out) * 0.1
        final = number == len(widths) - 2
        made = "y" if final else f"z{number}"
        nodes.append(helper.make_node("Gemm", [last, f"w{number}", f"b{number}"], [made]))
        if not final:
            last = f"r{number}"
            nodes.append(helper.make_node("Relu", [made], [last]))
    return _serialised(nodes, weights, widths[0], widths[-1])


def write_big_model(path: Path, size_bytes: int) -> None:
    """A model of about ``size_bytes`` of random weights, that runs all the same."""
    columns = 1_024
    rows = size_bytes // 4 // columns
    weights = {"w": np.random.default_rng(rows).normal(size=(rows, columns))}
    helper = _onnx().helper
    nodes = [
        helper.make_node("Slice", ["x", "zero", "one", "axis"], ["c"]),
        helper.make_node("Mul", ["c", "w"], ["p"]),
        helper.make_node("ReduceSum", ["p"], ["s"], keepdims=0),
        helper.make_node("Add", ["x", "s"], ["y"]),
    ]
    path.write_bytes(
        _serialised(nodes, weights, FEATURES, FEATURES, {"zero": [0], "one": [1], "axis": [1]})
    )


def _serialised(
    nodes: list[Any],
    weights: dict[str, np.ndarray[Any, Any]],
    width_in: int,
    width_out: int,
    integers: dict[str, list[int]] | None = None,
) -> bytes:
    onnx = _onnx()
    helper = onnx.helper
    values = {name: array.astype(np.float32) for name, array in weights.items()}
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in values.items()]
    constants += [
        onnx.numpy_helper.from_array(np.array(numbers, np.int64), name)
        for name, numbers in (integers or {}).items()
    ]
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "bench",
        [helper.make_tensor_value_info("x", kind, ["n", width_in])],
        [helper.make_tensor_value_info("y", kind, ["n", width_out])],
        constants,
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    onnx.checker.check_model(model)
    made: bytes = model.SerializeToString()
    return made


def _onnx() -> Any:
    if importlib.util.find_spec("onnx") is None:
        raise Unavailable("the models of this benchmark need the onnx package (pip install onnx)")
    import onnx
    import onnx.numpy_helper

    return onnx


def request_for(model: str) -> bytes:
    """One row of floats for any of these models."""
    request = oip_pb2.ModelInferRequest(model_name=model, id="1")
    request.inputs.add(name="x", datatype="FP32", shape=[1, FEATURES])
    request.raw_input_contents.append(np.array([5.1, 3.5, 1.4, 0.2], np.float32).tobytes())
    return request.SerializeToString()


def check_reply(model: str, message: bytes) -> None:
    """Raise ValueError unless this is an answer of the small model to ``request_for``."""
    reply = oip_pb2.ModelInferResponse.FromString(message)
    if reply.model_name != model or len(reply.raw_output_contents) != 1:
        raise ValueError(f"not a reply of {model!r}: {reply}")
    values = np.frombuffer(reply.raw_output_contents[0], np.float32)
    if values.shape != (CLASSES,) or abs(float(values.sum()) - 1.0) > 1e-5:
        raise ValueError(f"not three probabilities: {values}")
