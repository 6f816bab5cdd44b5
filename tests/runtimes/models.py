"""Small ONNX models made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mesh.runtimes.api import ModelSpec


def spec(path: Path, model_type: str = "onnx") -> ModelSpec:
    return ModelSpec("the-model", model_type, path)


def write(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, tuple[int, Any]],
    outputs: dict[str, tuple[int, Any]],
    initializers: Sequence[onnx.TensorProto] = (),
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)

    def infos(tensors: dict[str, tuple[int, Any]]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(name, kind, shape)
            for name, (kind, shape) in tensors.items()
        ]

    graph = helper.make_graph(nodes, "g", infos(inputs), infos(outputs), initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def identity(path: Path, kind: int, shape: Any = ("n",)) -> Path:
    node = helper.make_node("Identity", ["x"], ["y"])
    return write(path, [node], {"x": (kind, shape)}, {"y": (kind, shape)})


def matmul(path: Path, rows: int = 4, columns: int = 3, seed: int = 0) -> Path:
    weights = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    return write(
        path,
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": (TensorProto.FLOAT, ["n", rows])},
        {"y": (TensorProto.FLOAT, ["n", columns])},
        [numpy_helper.from_array(weights, "w")],
    )


def with_external_weights(path: Path, location: str) -> Path:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return write(
        path,
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": (TensorProto.FLOAT, ["n", 4])},
        {"y": (TensorProto.FLOAT, ["n", 4])},
        [tensor],
    )
