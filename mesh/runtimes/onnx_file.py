"""What an ONNX file says of its own size, read without loading it.

A graph of many small nodes takes far more memory than its file, and external data lie beside the
file; both are needed for a conservative guess. Reads only field headers of the protobuf through a
memory map. Never fails on a corrupt file: it then knows only the file's size, and the load says
what is wrong.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mesh.oip.protobuf_fields import read_varint

# Fields of onnx.proto (ModelProto, GraphProto, TensorProto, StringStringEntryProto).
_MODEL_GRAPH: Final = 7
_GRAPH_NODE: Final = 1
_GRAPH_INITIALIZER: Final = 5
_TENSOR_EXTERNAL_DATA: Final = 13
_ENTRY_KEY: Final = 1
_ENTRY_VALUE: Final = 2

# Reading stops here: a guess must be near instant.
_FIELDS_MAX: Final = 200_000


@dataclass(frozen=True, slots=True)
class OnnxOutline:
    """``weights_bytes`` is an upper bound: the file and the external files that it names."""

    weights_bytes: int
    node_count: int


def outline(path: Path) -> OnnxOutline:
    """Raises OSError when the file cannot be read."""
    file_bytes = path.stat().st_size
    if file_bytes == 0:
        return OnnxOutline(0, 0)
    node_count = 0
    external: set[str] = set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            budget = [_FIELDS_MAX]
            for number, start, end in _fields(data, 0, file_bytes, budget):
                if number != _MODEL_GRAPH:
                    continue
                for inner, inner_start, inner_end in _fields(data, start, end, budget):
                    if inner == _GRAPH_NODE:
                        node_count += 1
                    elif inner == _GRAPH_INITIALIZER:
                        external |= _locations(data, inner_start, inner_end, budget)
        except (ValueError, IndexError):
            pass
    return OnnxOutline(file_bytes + _sizes(path.parent, external), node_count)


def _sizes(folder: Path, locations: set[str]) -> int:
    total = 0
    for location in locations:
        # What lies outside is refused when the model is loaded.
        target = (folder / location).resolve()
        if target.is_relative_to(folder.resolve()) and target.is_file():
            total += target.stat().st_size
    return total


def _locations(data: mmap.mmap, start: int, end: int, budget: list[int]) -> set[str]:
    found: set[str] = set()
    for number, entry_start, entry_end in _fields(data, start, end, budget):
        if number != _TENSOR_EXTERNAL_DATA:
            continue
        entry = {
            key: data[value_start:value_end]
            for key, value_start, value_end in _fields(data, entry_start, entry_end, budget)
        }
        if entry.get(_ENTRY_KEY) == b"location":
            found.add(entry.get(_ENTRY_VALUE, b"").decode("utf-8"))
    return found


def _fields(
    data: mmap.mmap, start: int, end: int, budget: list[int]
) -> Iterator[tuple[int, int, int]]:
    """(number, content start, content end) of the length-delimited fields between the two."""
    at = start
    while at < end:
        budget[0] -= 1
        if budget[0] < 0:
            raise ValueError("too many fields for a guess")
        key, at = read_varint(data, at)
        wire_type = key & 7
        if wire_type == 0:
            _, at = read_varint(data, at)
        elif wire_type == 1:
            at += 8
        elif wire_type == 5:
            at += 4
        elif wire_type == 2:
            length, at = read_varint(data, at)
            if at + length > end:
                raise ValueError("a field leaves its message")
            yield key >> 3, at, at + length
            at += length
        else:
            raise ValueError(f"wire type {wire_type}")
