"""The datatypes of the Open Inference Protocol: how each lies in memory, on the wire and in JSON.

Owns the one table of them. Pure; knows neither protobuf nor HTTP. An unknown name is an
``InvalidArgument`` that lists the known ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mesh.core.errors import InvalidArgument

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class DataType:
    """One datatype.

    ``dtype`` is numpy's, little-endian as on the wire; BYTES is ``object`` (elements are
    ``bytes``) and BF16 is carried as the upper halves of float32, in ``uint16``.
    ``size_bytes`` is 0 for BYTES, whose elements have no fixed size. ``contents_field`` is the
    field of InferTensorContents that holds the typed form; None where there is no typed form.
    """

    name: str
    dtype: np.dtype[Any]
    size_bytes: int
    contents_field: str | None


def _entry(name: str, dtype: str, contents_field: str | None) -> tuple[str, DataType]:
    numpy_type = np.dtype(dtype)
    size = 0 if dtype == "O" else numpy_type.itemsize
    return name, DataType(name, numpy_type, size, contents_field)


DATATYPES: Final[dict[str, DataType]] = dict(
    (
        _entry("BOOL", "?", "bool_contents"),
        _entry("UINT8", "u1", "uint_contents"),
        _entry("UINT16", "<u2", "uint_contents"),
        _entry("UINT32", "<u4", "uint_contents"),
        _entry("UINT64", "<u8", "uint64_contents"),
        _entry("INT8", "i1", "int_contents"),
        _entry("INT16", "<i2", "int_contents"),
        _entry("INT32", "<i4", "int_contents"),
        _entry("INT64", "<i8", "int64_contents"),
        _entry("FP16", "<f2", None),
        _entry("FP32", "<f4", "fp32_contents"),
        _entry("FP64", "<f8", "fp64_contents"),
        _entry("BYTES", "O", "bytes_contents"),
        _entry("BF16", "<u2", None),
    )
)

# BF16 is left out: as an array it cannot be told from UINT16.
_NAME_BY_DTYPE: Final[dict[np.dtype[Any], str]] = {
    entry.dtype: entry.name for entry in DATATYPES.values() if entry.name != "BF16"
}


def datatype(name: str, *, of: str) -> DataType:
    """The table's row; ``of`` names what it is the datatype of, for the error."""
    found = DATATYPES.get(name)
    if found is None:
        raise InvalidArgument(
            f"{of} has the unknown datatype {name!r}; known are {', '.join(DATATYPES)}"
        )
    return found


def datatype_name(dtype: np.dtype[Any]) -> str | None:
    """The datatype that an array of this dtype has; strings of any kind are BYTES."""
    if dtype.kind in "SU":
        return "BYTES"
    return _NAME_BY_DTYPE.get(dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype)


def bf16_to_fp32(data: Array) -> Array:
    """Exact: a bfloat16 is the upper half of the float32 of the same value."""
    widened: Array = data.astype("<u4")
    return (widened << 16).view("<f4")


def fp32_to_bf16(data: Array) -> Array:
    """Rounds to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(data, dtype="<f4").view("<u4")
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    # Adding could carry a NaN's mantissa over into infinity or the sign.
    result: Array = np.where(np.isnan(data), ((bits >> 16) | 0x40).astype("<u2"), rounded)
    return result
