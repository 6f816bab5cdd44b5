"""A tensor as JSON: flat or nested lists to an array, an array to what orjson can write.

Pure. NaN: JSON has no such number. A null, or one of the strings "NaN", "Infinity" and
"-Infinity", is accepted in a float tensor; NaN and the infinities are written as null (the binary
form keeps them apart). What does not fit the datatype is an ``InvalidArgument`` naming the
tensor.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from mesh.core.errors import InvalidArgument
from mesh.oip.datatypes import Array, DataType, bf16_to_fp32, fp32_to_bf16
from mesh.oip.raw_bytes import element_count
from mesh.runtimes.api import Tensor

_FLOATS: Final = frozenset({"FP16", "FP32", "FP64", "BF16"})
_NOT_FINITE: Final[dict[object, float]] = {
    None: float("nan"),
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "-Infinity": float("-inf"),
}


def array_of(data: object, kind: DataType, of: str) -> Array:
    """The array whose shape is the nesting of ``data``."""
    if kind.name == "BYTES":
        return _texts(data, of)
    try:
        array: Array = np.array(data)
    except ValueError:
        raise InvalidArgument(
            f"{of}: the nested lists in 'data' differ in length or depth"
        ) from None
    if array.size == 0:
        return np.empty(array.shape, kind.dtype)
    if kind.name in _FLOATS:
        return _floats(array, data, kind, of)
    if kind.name == "BOOL":
        if array.dtype.kind == "b":
            return array
        if array.dtype.kind in "iu" and bool(((array == 0) | (array == 1)).all()):
            return array.astype(np.bool_)
        raise InvalidArgument(f"{of}: BOOL elements are true and false; found {_sample(array)}")
    return _integers(array, data, kind, of)


def shaped(data: object, kind: DataType, shape: tuple[int, ...], of: str) -> Array:
    """The array of ``data``, given flat or nested exactly as ``shape`` says."""
    count = element_count(shape, of=of)
    array = array_of(data, kind, of)
    if array.shape == shape:
        return array
    if count == 0 and array.size == 0:
        # Lists cannot tell (1, 0, 0) from (1, 0).
        return array.reshape(shape)
    if array.ndim == 1 or (array.ndim == 0 and count == 1):
        if array.size == count:
            return array.reshape(shape)
        raise InvalidArgument(
            f"{of} has {array.size} elements in 'data'; "
            f"{kind.name} of shape {list(shape)} needs {count}"
        )
    raise InvalidArgument(
        f"{of}: 'data' is nested as {list(array.shape)}; its shape says {list(shape)}"
    )


def jsonable(tensor: Tensor) -> Any:
    """The elements, flat, in a form that orjson writes (with OPT_SERIALIZE_NUMPY)."""
    return _readable(tensor).ravel() if tensor.datatype != "BYTES" else _strings(tensor)


def nested(tensor: Tensor) -> Any:
    """The elements, nested as the shape says, as plain lists."""
    if tensor.datatype != "BYTES":
        return _readable(tensor).tolist()
    texts = np.empty(tensor.data.size, dtype=object)
    for index, text in enumerate(_strings(tensor)):
        texts[index] = text
    return texts.reshape(tensor.data.shape).tolist()


def _readable(tensor: Tensor) -> Array:
    data = tensor.data
    if tensor.datatype == "BF16":
        return bf16_to_fp32(data)
    return np.ascontiguousarray(data, dtype=np.float32 if tensor.datatype == "FP16" else None)


def _strings(tensor: Tensor) -> list[str]:
    texts: list[str] = []
    for index, element in enumerate(tensor.data.ravel().tolist()):
        try:
            texts.append(element.decode() if isinstance(element, bytes) else str(element))
        except UnicodeDecodeError:
            raise InvalidArgument(
                f"output {tensor.name!r}: element {index} is not UTF-8 and cannot be written as "
                f"JSON; ask for it with the output parameter 'binary_data': true"
            ) from None
    return texts


def _texts(data: object, of: str) -> Array:
    try:
        array: Array = np.array(data, dtype=object)
    except ValueError:
        raise InvalidArgument(
            f"{of}: the nested lists in 'data' differ in length or depth"
        ) from None
    encoded = np.empty(array.shape, dtype=object)
    flat = encoded.reshape(-1)
    for index, element in enumerate(array.reshape(-1).tolist()):
        if not isinstance(element, str):
            raise InvalidArgument(
                f"{of}: BYTES elements are strings; element {index} is "
                f"{_kind_of(element)}. Send other bytes in binary form"
            )
        try:
            flat[index] = element.encode()
        except UnicodeEncodeError:
            raise InvalidArgument(f"{of}: element {index} holds half a surrogate pair") from None
    return flat.reshape(array.shape)


def _floats(array: Array, data: object, kind: DataType, of: str) -> Array:
    if array.dtype.kind not in "iuf":
        array = _with_not_finite(np.array(data, dtype=object), of)
    with np.errstate(over="ignore"):
        if kind.name == "BF16":
            return fp32_to_bf16(array.astype(np.float32))
        narrowed: Array = array.astype(kind.dtype)
    if kind.name != "FP64":
        lost = np.isinf(narrowed) & ~np.isinf(array.astype(np.float64))
        if lost.any():
            raise InvalidArgument(
                f"{of}: {array[lost].flat[0]} is too large for {kind.name}; use FP64"
            )
    return narrowed


def _with_not_finite(array: Array, of: str) -> Array:
    numbers = np.empty(array.shape, dtype=np.float64)
    flat = numbers.reshape(-1)
    for index, element in enumerate(array.reshape(-1).tolist()):
        if isinstance(element, int | float) and not isinstance(element, bool):
            flat[index] = element
        elif (element is None or isinstance(element, str)) and element in _NOT_FINITE:
            flat[index] = _NOT_FINITE[element]
        else:
            raise InvalidArgument(f"{of}: element {index} is {_kind_of(element)}, not a number")
    return flat.reshape(array.shape)


def _integers(array: Array, data: object, kind: DataType, of: str) -> Array:
    limits = np.iinfo(kind.dtype)
    bounds = f"{kind.name} holds whole numbers from {limits.min} to {limits.max}"
    if array.dtype.kind not in "iu":
        # numpy turns [0, 2**63] into floats: look at the numbers themselves.
        array = np.array(data, dtype=object)
        for element in array.reshape(-1).tolist():
            if type(element) is not int:
                raise InvalidArgument(f"{of}: {bounds}; found {_kind_of(element)}")
    wrong = (array < limits.min) | (array > limits.max)
    if wrong.any():
        raise InvalidArgument(f"{of}: {bounds}; found {array[wrong].flat[0]}")
    narrowed: Array = array.astype(kind.dtype)
    return narrowed


def _sample(array: Array) -> str:
    return repr(array.flat[0].item() if hasattr(array.flat[0], "item") else array.flat[0])[:50]


def _kind_of(element: object) -> str:
    names = {bool: "a boolean", dict: "an object", list: "a list", str: "a string"}
    if element is None:
        return "null"
    return names.get(type(element), f"the number {str(element)[:40]}")
