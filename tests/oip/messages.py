"""Requests to decode, built with protobuf's own classes, and what a decoded one is compared by."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mesh.oip.call import InferCall
from mesh.oip.datatypes import DATATYPES
from mesh.runtimes.api import ModelMetadata, TensorSpec
from protos import oip_pb2

# datatype -> the field of its typed form, spelt out here so that the table under test is checked
TYPED_FIELDS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def metadata(
    inputs: Mapping[str, tuple[str, Sequence[int]]],
    outputs: Mapping[str, tuple[str, Sequence[int]]] | None = None,
    versions: tuple[str, ...] = (),
) -> ModelMetadata:
    def specs(tensors: Mapping[str, tuple[str, Sequence[int]]]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name, kind, tuple(shape)) for name, (kind, shape) in tensors.items()
        )

    return ModelMetadata("test", versions, specs(inputs), specs(outputs or inputs))


def raw_oracle(kind: str, array: np.ndarray[Any, Any]) -> bytes:
    """What tritonclient sends: numpy's bytes; BYTES elements each behind a 4-byte length."""
    if kind == "BYTES":
        return b"".join(
            struct.pack("<I", len(element)) + element for element in array.ravel().tolist()
        )
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def request(
    tensors: Mapping[str, tuple[str, np.ndarray[Any, Any]]],
    *,
    raw: bool,
    outputs: Sequence[str] = (),
    **fields: Any,
) -> oip_pb2.ModelInferRequest:
    message = oip_pb2.ModelInferRequest(model_name="m", **fields)
    for name, (kind, array) in tensors.items():
        tensor = message.inputs.add(name=name, datatype=kind, shape=array.shape)
        if raw:
            message.raw_input_contents.append(raw_oracle(kind, array))
        else:
            tensor.contents.SetInParent()
            getattr(tensor.contents, TYPED_FIELDS[kind]).extend(array.ravel().tolist())
    for name in outputs:
        message.outputs.add(name=name)
    return message


def comparable(call: InferCall) -> tuple[Any, ...]:
    arrays = {
        name: (
            array.dtype.str,
            array.shape,
            raw_oracle("BYTES" if array.dtype == object else "", array),
        )
        for name, array in call.inputs.items()
    }
    return arrays, call.id, call.head


def arrays_of(kind: str, max_side: int = 4) -> st.SearchStrategy[np.ndarray[Any, Any]]:
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=max_side)
    if kind == "BYTES":
        return shapes.flatmap(
            lambda shape: hnp.arrays(
                object, shape, elements=st.binary(max_size=9), fill=st.nothing()
            )
        )
    if kind == "BF16":
        return shapes.flatmap(lambda shape: hnp.arrays(np.uint16, shape))
    return shapes.flatmap(lambda shape: hnp.arrays(DATATYPES[kind].dtype, shape))


def bf16_oracle(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)
