"""The raw form of a tensor: row-major little-endian bytes, BYTES elements behind their lengths.

Shared by gRPC's ``raw_input_contents`` and REST's binary tensor extension. Pure. A byte count
that does not fit the shape is an ``InvalidArgument`` that names the tensor, what was expected and
what was found; nothing is read past the buffer.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from math import prod
from typing import Final

import numpy as np

from mesh.core.errors import InvalidArgument
from mesh.oip.datatypes import Array, DataType

Buffer = bytes | bytearray | memoryview

# numpy's own bound on axes is 64; no model that we have met has more than 8.
AXES_MAX: Final = 32
# Far above any message limit; keeps products, and the messages that show them, short.
ELEMENTS_MAX: Final = 1 << 40

_LENGTH = struct.Struct("<I")


def element_count(shape: Sequence[int], *, of: str) -> int:
    """The product of the axes; refuses negative axes, too many axes, absurd products."""
    if len(shape) > AXES_MAX:
        raise InvalidArgument(f"{of} has {len(shape)} axes; at most {AXES_MAX} are accepted")
    bound = 1
    for axis in shape:
        if axis < 0:
            raise InvalidArgument(
                f"{of} has the shape {list(shape)}; a request's axes must not be negative"
            )
        # An empty axis must not hide an absurd one beside it: numpy refuses those too.
        bound *= axis or 1
        if bound > ELEMENTS_MAX:
            raise InvalidArgument(
                f"{of} has the shape {list(shape)}, more than {ELEMENTS_MAX} elements"
            )
    return prod(shape)


def decode_raw(buffer: Buffer, kind: DataType, shape: tuple[int, ...], *, of: str) -> Array:
    """The array over ``buffer``: a read-only view of it where it can be, a copy for BYTES."""
    count = element_count(shape, of=of)
    if not kind.size_bytes:
        return _split_bytes(buffer, count, of).reshape(shape)
    found_bytes = len(buffer)
    if found_bytes != count * kind.size_bytes:
        raise InvalidArgument(
            f"{of} has {found_bytes} bytes of raw content; {kind.name} of shape {list(shape)} "
            f"needs {count * kind.size_bytes}"
        )
    if kind.name == "BOOL":
        return _decode_bools(buffer, shape)
    return np.frombuffer(buffer, kind.dtype).reshape(shape)


def _decode_bools(buffer: Buffer, shape: tuple[int, ...]) -> Array:
    """Any non-zero byte is true; numpy's bool must hold 0 or 1 and nothing else."""
    raw = np.frombuffer(buffer, np.uint8)
    if raw.size and raw.max() > 1:
        raw = (raw != 0).view(np.uint8)
    return raw.view(np.bool_).reshape(shape)


def _split_bytes(buffer: Buffer, count: int, of: str) -> Array:
    """One element after the other, each behind its length (4 bytes, little-endian)."""
    end = len(buffer)
    # Checked before anything is allocated: every element takes at least its length.
    if count * 4 > end:
        raise InvalidArgument(
            f"{of} has {end} bytes of raw content; {count} BYTES elements need at least "
            f"{count * 4}: each stands behind its length in 4 bytes, little-endian"
        )
    elements: Array = np.empty(count, dtype=object)
    data = bytes(buffer)
    unpack = _LENGTH.unpack_from
    at = 0
    for index in range(count):
        if at + 4 > end:
            raise InvalidArgument(
                f"{of} ends inside the length of element {index} of {count} (byte {at} of {end})"
            )
        length = unpack(data, at)[0]
        start = at + 4
        at = start + length
        if at > end:
            raise InvalidArgument(
                f"{of}: element {index} of {count} claims {length} bytes, "
                f"only {end - start} are left"
            )
        elements[index] = data[start:at]
    if at != end:
        raise InvalidArgument(
            f"{of} has {end - at} bytes behind its last element; "
            f"the shape asks for {count} elements"
        )
    return elements


def encode_raw(data: Array, kind: DataType) -> bytes:
    """The raw bytes of an array of the datatype's dtype; BYTES elements may be str or bytes."""
    if kind.size_bytes:
        if data.dtype != kind.dtype:
            data = data.astype(kind.dtype)
        return data.tobytes()
    parts: list[bytes] = []
    for element in data.ravel().tolist():
        encoded = as_bytes(element)
        parts.append(_LENGTH.pack(len(encoded)))
        parts.append(encoded)
    return b"".join(parts)


def as_bytes(element: object) -> bytes:
    """One BYTES element: text is UTF-8, anything else its ``str``, as tritonclient has it."""
    if isinstance(element, bytes):
        return element
    return str(element).encode()
