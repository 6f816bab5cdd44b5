"""One string at a path of field numbers in the bytes of a protobuf message: read it, set it.

Pure; no schema is needed and nothing is parsed beyond the fields on the way: all other bytes,
unknown fields included, stay as they are. What protobuf says of repeated fields holds: the last
string wins, and the occurrences of a message on the way are parts of one message.

Bytes that are no message, or more fields than ``FIELDS_MAX``, are InvalidArgument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mesh.core.errors import InvalidArgument, MeshError
from mesh.oip.protobuf_fields import varint

# Fields that are looked at in one message: a look costs the event loop some 0.2 us each.
FIELDS_MAX: Final = 65_536
# Of a path; ModelMesh's own users need two or three.
DEPTH_MAX: Final = 16
NUMBER_MAX: Final = (1 << 29) - 1  # protobuf's own
_GROUPS_MAX: Final = 100  # protobuf's own bound on nesting

FieldPath = tuple[int, ...]


def field_path(numbers: Sequence[object], where: str) -> FieldPath:
    """A checked path. ``where`` names its place in an error."""
    if not numbers or len(numbers) > DEPTH_MAX:
        raise InvalidArgument(
            f"{where}: expected 1 to {DEPTH_MAX} field numbers; found {len(numbers)}"
        )
    found: list[int] = []
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise InvalidArgument(f"{where}: expected field numbers; found {number!r:.60}")
        if not 0 < number <= NUMBER_MAX:
            raise InvalidArgument(f"{where}: {number} is no field number of protobuf")
        found.append(number)
    return tuple(found)


def extract(message: bytes, path: FieldPath) -> str | None:
    """The string at ``path``; None when it is not there."""
    found = _extract(message, 0, len(message), path)
    if found is None:
        return None
    try:
        return message[found[0] : found[1]].decode()
    except UnicodeDecodeError:
        raise InvalidArgument(f"the string at field path {list(path)} is not UTF-8") from None


def splice(message: bytes, path: FieldPath, value: bytes, *, create_parents: bool = True) -> bytes:
    """``message`` with ``value`` (UTF-8) at ``path``, in place of what is there.

    Without ``create_parents`` a message that lacks one of those on the way is returned as it is.
    What is missing is put first: behind it a client's own choice of a oneof still counts.
    """
    return _spliced(message, 0, len(message), path, value, create_parents)


def _extract(data: bytes, start: int, end: int, path: FieldPath) -> tuple[int, int] | None:
    found: tuple[int, int] | None = None
    for _, content, stop in _occurrences(data, start, end, path[0]):
        inner = (content, stop) if len(path) == 1 else _extract(data, content, stop, path[1:])
        found = inner or found
    return found


def _spliced(
    data: bytes, start: int, end: int, path: FieldPath, value: bytes, create_parents: bool
) -> bytes:
    places = _occurrences(data, start, end, path[0])
    if places:
        # The last one: what stands there wins, whatever the ones before it say.
        begin, content, stop = places[-1]
        if len(path) > 1:
            value = _spliced(data, content, stop, path[1:], value, create_parents)
        return data[start:begin] + _field(path[0], value) + data[stop:end]
    if len(path) > 1:
        if not create_parents:
            return data[start:end]
        for number in reversed(path[1:]):
            value = _field(number, value)
    return _field(path[0], value) + data[start:end]


def _field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def _occurrences(data: bytes, start: int, end: int, number: int) -> list[tuple[int, int, int]]:
    """(start of the tag, start of the content, its end) of each length-delimited field of this
    number at this level."""
    found: list[tuple[int, int, int]] = []
    groups: list[int] = []
    at, seen = start, 0
    while at < end:
        seen += 1
        if seen > FIELDS_MAX:
            raise InvalidArgument(
                f"the message has more than {FIELDS_MAX} fields where the model's id is looked for"
            )
        begin = at
        tag, at = _varint(data, at, end)
        kind = tag & 7
        if kind == 2:
            size, at = _varint(data, at, end)
            if at + size > end:
                raise _broken()
            if tag >> 3 == number and not groups:
                found.append((begin, at, at + size))
            at += size
        elif kind == 0:
            _, at = _varint(data, at, end)
        elif kind == 5:
            at += 4
        elif kind == 1:
            at += 8
        elif kind == 3 and len(groups) < _GROUPS_MAX:
            groups.append(tag >> 3)
        elif kind != 4 or not groups or groups.pop() != tag >> 3:
            raise _broken()
    if at != end or groups:
        raise _broken()
    return found


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end:
        octet = data[at]
        at += 1
        value |= (octet & 0x7F) << shift
        if octet < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            break
    raise _broken()


def _broken() -> MeshError:
    return InvalidArgument("the request is not a protobuf message")
