"""ONNX models that are slow, large or of an odd type, made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from tests.e2e.asking import raw_request
from tests.runtimes.models import write

_SIDE = 128


def slow(path: Path) -> Path:
    """Multiplies matrices as often as its input ``rounds`` (INT64, [1]) says."""
    weights = numpy_helper.from_array(np.eye(_SIDE, dtype=np.float32), "w")
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["still"]),
            helper.make_node("MatMul", ["so_far", "w"], ["further"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("at", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("so_far", TensorProto.FLOAT, [_SIDE, _SIDE]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("further", TensorProto.FLOAT, [_SIDE, _SIDE]),
        ],
    )
    nodes = [
        helper.make_node("Squeeze", ["rounds"], ["times"]),
        helper.make_node("Loop", ["times", "", "w"], ["last"], body=body),
        helper.make_node("ReduceSum", ["last"], ["total"], keepdims=0),
    ]
    return write(
        path, nodes, {"rounds": (TensorProto.INT64, [1])}, {"total": (TensorProto.FLOAT, [])},
        [weights],
    )  # fmt: skip


def rounds(name: str, count: int) -> Any:
    return raw_request(name, rounds=np.array([count], np.int64))


def heavy(path: Path, mib: int) -> Path:
    """``y = x w`` with so many MiB of weights, which do not compress."""
    columns = mib * (1 << 20) // 16
    weights = np.random.default_rng(mib).standard_normal((4, columns)).astype(np.float32)
    return write(
        path,
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": (TensorProto.FLOAT, ["n", 4])},
        {"y": (TensorProto.FLOAT, ["n", columns])},
        [numpy_helper.from_array(weights, "w")],
    )
