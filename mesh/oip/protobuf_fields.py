"""Where the fields of a serialised protobuf message lie, without parsing what is in them.

Pure byte work: for the codec's memory of messages that differ only in their tensors' bytes, and
for a look at a model file's size.
"""

from __future__ import annotations

import mmap


def top_level_fields(message: bytes, limit: int) -> list[tuple[int, int, int]] | None:
    """Where the top-level fields lie: (number, content start, content end).

    None when a field is not length-delimited, there are more than ``limit``, or the bytes are no
    message: the caller then takes the general way.
    """
    fields: list[tuple[int, int, int]] = []
    at, end = 0, len(message)
    try:
        while at < end:
            key, at = read_varint(message, at)
            length, at = read_varint(message, at)
            if key & 7 != 2 or len(fields) >= limit or at + length > end:
                return None
            fields.append((key >> 3, at, at + length))
            at += length
    except IndexError:
        return None
    return fields


def read_varint(data: bytes | mmap.mmap, at: int) -> tuple[int, int]:
    """(value, the place behind it); IndexError when it does not end."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError("a varint has at most 10 bytes")


def varint(value: int) -> bytes:
    """``value`` (not negative) as protobuf's varint."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
